"""Which files a location stands for, and what is said of the others."""

import os

import pytest

from hamner.data.find import find_files
from hamner.data.shards import ShardSource
from hamner.data.specs import parse_specs
from hamner.errors import UserError
from hamner.files import expand_home


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with data, hidden data and links, which is the working folder too."""
    data = tmp_path / "data"
    for name in ("a.jsonl", "sub/b.txt", "lang=en/c.txt", ".git/d.txt", "sub/._b.txt", "README.md"):
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"x"\n')
    monkeypatch.chdir(tmp_path)
    return data


def found(location) -> list[str]:
    return [str(path) for path in find_files(str(location))]


ALL = ["data/a.jsonl", "data/lang=en/c.txt", "data/sub/b.txt"]


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("data", ALL),
        ("data/**", ALL),
        ("data/**/*", ALL),
        ("**/*.txt", ALL[1:]),
        ("d*/**/[bc].txt", ALL[1:]),
        ("data/**/sub/**/b.txt", ALL[2:]),
        ("data/*", ALL[:1]),
        ("data/lang=en/*.txt", ALL[1:2]),
        ("data/**/._b.txt", ["data/sub/._b.txt"]),
        ("data/**/.git/*.txt", ["data/.git/d.txt"]),
        ("data/sub/._b.txt", ["data/sub/._b.txt"]),
    ],
)
def test_locations(tree, location, expected):
    assert found(location) == expected
    assert found(tree.parent / location) == [str(tree.parent / name) for name in expected]


@pytest.mark.parametrize("location", ["data", "data/**/*.txt"])
def test_hidden_data_is_left_out_and_said(tree, location, caplog):
    found(location)
    assert caplog.messages == [
        f"--data {location}: leaves out 2 hidden files: data/.git/d.txt, data/sub/._b.txt"
    ]


def test_loops_of_links_end(tree, tmp_path):
    (tree / "here").symlink_to(".")
    (tree / "sub" / "up").symlink_to("../..")
    (tree / "sub" / "self").symlink_to("self")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "e.txt").write_text("x")
    (tmp_path / "other" / "back").symlink_to(tree)
    (tree / "out").symlink_to(tmp_path / "other")
    assert found("data/**/*.txt") == [*ALL[1:2], "data/out/e.txt", *ALL[2:]]


def test_linked_folders_of_a_folder_are_said(tree, tmp_path, caplog):
    (tmp_path / "other").mkdir()
    (tree / "out").symlink_to(tmp_path / "other")
    assert found("data") == ALL
    assert "leaves out 1 linked folders (give them as --data of their own): data/out" in caplog.text


def test_what_is_no_file_is_said_or_refused(tree, caplog):
    os.mkfifo(tree / "pipe.jsonl")
    (tree / "gone.txt").symlink_to("nowhere.txt")
    assert found("data") == ALL
    assert (
        "leaves out 2 that are no files (broken links, pipes): data/gone.txt, data/pipe.jsonl"
        in (caplog.text)
    )
    with pytest.raises(UserError, match=r"--data data/pipe.jsonl: is a pipe .* write it to a file"):
        find_files("data/pipe.jsonl")
    with pytest.raises(UserError, match="data/gone.txt: is a link to nowhere.txt, which is not"):
        find_files("data/gone.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folders_that_cannot_be_read_are_said(tree, caplog):
    (tree / "sub").chmod(0)
    try:
        assert found("data") == ALL[:2]
    finally:
        (tree / "sub").chmod(0o755)
    assert "leaves out 1 that cannot be read: data/sub" in caplog.text


@pytest.mark.parametrize(
    ("argument", "weight"),
    [
        ("data/lang=en/*.txt", 1.0),
        ("data/lang=en/*.txt=0.5", 0.5),
        ("data/lang=*", 1.0),
        ("hive/lang=en/part-?.txt", 1.0),
        ("hive/year=2024/a.txt", 1.0),
        ("hive/year=2024/a.txt=2", 2.0),
        ("~/year=2024", 1.0),
        ("~/year=2024=3", 3.0),
        ("shards:year=2024", 1.0),
        ("shards:year=2024=3", 3.0),
        ("*/year=2024", 1.0),
        ("*/year=2025", 2025.0),
    ],
)
def test_weights_beside_paths_with_equals_signs(tree, tmp_path, monkeypatch, argument, weight):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "year=2024").mkdir()
    (tree / "year=2024").mkdir()
    (spec,) = parse_specs([argument])
    assert spec.weight == weight
    assert spec.text == (argument if weight == 1.0 else argument.rpartition("=")[0])


def test_a_home_that_is_not_known_is_refused(tree, monkeypatch, tokenizer):
    (tree.parent / "~literal.txt").write_text("x")
    assert found("~literal.txt") == ["~literal.txt"]
    for location in ("~nosuchuser/x", "~nosuchuser/*.txt"):
        with pytest.raises(
            UserError, match=r"--data ~nosuchuser/.*: no home folder .* ~nosuchuser"
        ):
            find_files(location)
        assert parse_specs([location])
    with pytest.raises(UserError, match="shards: ~nosuchuser/x: no home folder is known"):
        ShardSource("~nosuchuser/x", tokenizer)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without HOME and passwd
    with pytest.raises(UserError, match="--x ~/y: no home folder is known for ~; write the whole"):
        expand_home("~/y", "--x")
