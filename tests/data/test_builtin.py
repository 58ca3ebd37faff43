import sys

import pytest

from hamner.data import builtin
from hamner.data.builtin import BuiltinSource, builtin_documents
from hamner.errors import UserError


@pytest.fixture
def fresh():
    builtin_documents.cache_clear()
    yield
    builtin_documents.cache_clear()


def test_documents_are_unique_prose_of_some_length():
    documents = builtin_documents()
    assert len(documents) > 500
    assert len(set(documents)) == len(documents)
    assert all(len(text) >= builtin.MIN_CHARACTERS for text in documents)
    assert any(text.startswith("Command-line parsing library") for text in documents)
    assert any('The "for" statement' in text for text in documents)


def test_long_texts_are_cut_between_paragraphs():
    text = "\n\n".join(f"paragraph {number} " + "word " * 60 for number in range(20))
    pieces = list(builtin._pieces(text))
    assert "\n\n".join(pieces) == text
    assert len(pieces) == 5
    assert list(builtin._pieces("one line")) == ["one line"]


def test_the_library_is_parsed_and_never_imported(fresh):
    before = set(sys.modules)
    builtin_documents()
    assert set(sys.modules) - before <= {"pydoc_data", "pydoc_data.topics"}


def test_without_sources_the_topics_remain(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert len(builtin_documents()) > 50


def test_without_anything_the_mend_is_named(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="--data builtin"):
        builtin_documents()


def test_source_gives_every_document_once_and_resumes():
    source = BuiltinSource()
    whole = list(source.documents(0, 0, None))
    assert sorted(text for text, _ in whole) == sorted(builtin_documents())
    assert list(source.documents(0, 0, whole[99][1])) == whole[100:]
    assert list(source.documents(0, 0, whole[-1][1])) == []
