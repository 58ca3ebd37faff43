import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamner.data.documents import document_text, split_of


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("plain", "plain"),
        ({"text": "a", "content": "b"}, "a"),
        ({"id": 1, "content": "b"}, "b"),
        ({"messages": [{"role": "user", "content": "hi"}, {"content": "hello"}]}, "hi\nhello"),
    ],
)
def test_text_of_a_row(row, text):
    assert document_text(row) == text


@pytest.mark.parametrize(
    "row",
    [None, 1, ["a"], {}, {"body": "a"}, {"text": None}, {"text": 3}, {"text": "\ud800"}]
    + [
        {"messages": messages}
        for messages in (None, "a", [None], [{"role": "user"}], [{"content": 1}])
    ],
)
def test_row_without_text_is_refused(row):
    with pytest.raises(ValueError, match="must be|no field|half a surrogate|without"):
        document_text(row)


@given(st.text(), st.floats(0, 1))
def test_split_depends_on_the_text_alone(text, fraction):
    assert split_of(text, fraction) == split_of(text, fraction)
    assert split_of(text, 0.0) == "train"
    assert split_of(text, 1.0) == "validation"


def test_split_is_pinned():
    """A later version must hold out the same documents, or resumed runs train on them."""
    held_out = [i for i in range(100) if split_of(f"document {i}", 0.05) == "validation"]
    assert held_out == [40, 70]


def test_share_of_the_split():
    count = sum(split_of(f"document {i}", 0.1) == "validation" for i in range(10_000))
    assert 900 < count < 1100
