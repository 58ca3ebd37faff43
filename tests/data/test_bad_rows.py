"""Rows without a document: passed over, counted, refused; files from which they went."""

import gzip
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest

from hamner.data import files, scan, sources
from hamner.data.bad_rows import BadRows, BadRowsFile, TooManyBadRows, kind_of
from hamner.data.files import FileSource
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.prepare import prepare
from hamner.data.stages import SourceLost
from hamner.errors import UserError

TEXTS = [f"document {i} {'so ' * (i % 7)}" for i in range(60)]
BAD = (7, 8, 33, 59)
NULL = '"text" must be a string, not null'


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 400)
    monkeypatch.setattr(sources, "DOCUMENTS_PER_BATCH", 4)


def rows_with(changes: dict[int, object]) -> list[object]:
    """The texts with some rows replaced; those replaced by `...` are gone."""
    changed = [changes.get(i, text) for i, text in enumerate(TEXTS)]
    return [row for row in changed if row is not ...]


def write(path, rows) -> str:
    """Writes rows as the name of the file says."""
    if path.suffix == ".parquet":
        table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())})
        pyarrow.parquet.write_table(table, path, row_group_size=9)
    else:
        data = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return str(path)


def read(source, state=None, seed=0) -> list[tuple[str, dict]]:
    return list(source.documents(seed, 0, state))


NAMES = ("a.jsonl", "a.jsonl.gz", "a.parquet")


@pytest.mark.parametrize("name", NAMES)
def test_bad_rows_are_passed_over_counted_and_named(tmp_path, name, caplog):
    path = write(tmp_path / name, rows_with(dict.fromkeys(BAD)))
    bad_rows = BadRows(path, share=0.1)
    texts = [text for text, _ in read(FileSource(path, bad_rows))]
    assert sorted(texts) == sorted(rows_with(dict.fromkeys(BAD, ...)))
    assert bad_rows.counts == {path: {NULL: 4}}
    where = "row 7, row 8, row 33, ..." if name == "a.parquet" else "line 8, line 9, line 34, ..."
    first = where.split(",")[0]
    (message,) = caplog.messages
    assert message == (
        f"--data {path}, {first}: {NULL}; 4 of 60 rows cannot be used ({path}: 4 {NULL} ({where})) "
        "and are passed over"
    )


def test_kinds_are_counted_apart(tmp_path):
    lines = [b'"good"\n'] * 50 + [b"{\n", b"[1\n", b'{"text": 1}\n', b'{"a": 1}\n', b'{"b": 1}\n']
    lines += [b'"\xff"\n', b'\0"x"\n', b'"\\ud800"\n', b"1" * 5000 + b"\n"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    bad_rows = BadRows(str(path), share=1.0)
    assert len(read(FileSource(str(path), bad_rows))) == 50
    assert bad_rows.counts == {
        str(path): {
            "not JSON": 2,
            '"text" must be a string, not int': 1,
            'has no field "text", "content" or "messages"': 2,
            "not UTF-8": 1,
            files.NUL_BYTES: 1,
            '"text" holds half a surrogate pair, which is no text': 1,
            "holds a number of too many digits": 1,
        }
    }


@pytest.mark.parametrize("share", [0.0, 0.066])
def test_more_than_the_share_is_refused_with_all_of_them(tmp_path, share):
    write(tmp_path / "a.jsonl", rows_with({3: None}))
    write(tmp_path / "b.jsonl", rows_with(dict.fromkeys(range(0, 14, 2), 5)))
    with pytest.raises(TooManyBadRows) as caught:
        read(FileSource(str(tmp_path), BadRows("x", share)))
    for part in ("8 of 120 rows", "a.jsonl: 1 ", "not null (line 4)", "not int (line 1, line 3, "):
        assert part in str(caught.value)
    assert f"--bad-rows {share:g}: mend or remove them" in str(caught.value)


def test_the_share_is_one_of_the_whole_source_in_whatever_order(tmp_path, monkeypatch, caplog):
    """One bad row of a small file beside a large one passes, whichever is read first."""
    monkeypatch.setattr(files, "SCAN_BYTES", 0)
    write(tmp_path / "a.jsonl", [None, "good"])
    write(tmp_path / "b.jsonl", TEXTS * 4)
    for seed in range(4):
        texts = read(FileSource(str(tmp_path), BadRows("x", share=0.01)), seed=seed)
        assert len(texts) == 241
    assert "are looked through now, for minutes" in caplog.text


def test_a_file_of_nothing_but_bad_rows_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "GIVE_UP_AFTER", 20)
    write(tmp_path / "a.jsonl", [None] * 500)
    write(tmp_path / "b.jsonl", TEXTS * 100)
    with pytest.raises(TooManyBadRows, match=r"a.jsonl, line 1: .*; (\d\d) of \1 rows"):
        read(FileSource(str(tmp_path), BadRows("x", share=0.4)))


def test_bad_pieces_of_plain_text(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "20.txt").write_bytes("Müller".encode("latin-1"))
    (tmp_path / "21.txt").write_bytes(b"half a page" + b"\0" * 300)
    bad_rows = BadRows("x", share=0.1)
    assert len(read(FileSource(str(tmp_path), bad_rows))) == 20
    assert sorted(kind for kinds in bad_rows.counts.values() for kind in kinds) == [
        files.NUL_BYTES,
        "not UTF-8",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(BAD, ...),
        {7: ..., 8: "mended, and longer than it was", 33: "mended", 59: ...},
        {7: "mended", 8: ..., 33: None, 59: "mended"},
        {7: None, 8: None, 33: ..., 59: None},
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_mended_file_goes_on_exactly(tmp_path, name, changes):
    path = write(tmp_path / name, rows_with(dict.fromkeys(BAD)))
    list_path = tmp_path / "list" / "bad_rows.json"
    list_path.parent.mkdir()

    def opened() -> tuple[FileSource, BadRowsFile]:
        listed = BadRowsFile(list_path, share=0.1)
        return FileSource(path, listed.of(path)), listed

    source, listed = opened()
    before, identity = read(source), source.identity()
    listed.write()
    write(tmp_path / name, rows_with(changes))
    mended = [text for i, text in changes.items() if isinstance(text, str)]
    for _ in range(2):  # and when it is opened once more
        source, listed = opened()
        assert source.identity() == identity
        whole = read(source)
        assert [item for item in whole if item[0] not in mended] == before
        assert sorted(text for text, _ in whole) == sorted(
            text for text in rows_with(changes) if text is not None
        )
        for index in (0, 20, 41, len(whole) - 2):
            assert read(source, whole[index][1]) == whole[index + 1 :]
        listed.write()


@pytest.mark.parametrize(
    "changes",
    [
        {**dict.fromkeys(BAD, ...), 20: ...},
        {**dict.fromkeys(BAD, ...), 20: "changed"},
        {**dict.fromkeys(BAD, ...), 20: None},
        {i: None if i in BAD else ... for i in range(40, 60)} | dict.fromkeys(BAD[:3]),
    ],
)
def test_a_file_of_which_other_rows_changed_is_another_one(tmp_path, changes):
    path = write(tmp_path / "a.jsonl", rows_with(dict.fromkeys(BAD)))
    bad_rows = BadRows(path, share=0.1)
    source = FileSource(path, bad_rows)
    read(source)
    write(tmp_path / "a.jsonl", rows_with(changes))
    record = json.loads(json.dumps(bad_rows.record))
    assert FileSource(path, BadRows(path, 0.1, record)).identity() != source.identity()


def test_a_damaged_list_does_not_count(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", rows_with(dict.fromkeys(BAD)))
    bad_rows = BadRows(path, share=0.1)
    read(FileSource(path, bad_rows))
    write(tmp_path / "a.jsonl", rows_with(dict.fromkeys(BAD, ...)))
    for value in (None, -1, "x", [], {}, [[]], {"a": 1}):
        for key in ("identity", "sizes", "files", "before"):
            FileSource(path, BadRows(path, 0.1, {**bad_rows.record, key: value}))
        ((name, state),) = bad_rows.record["files"].items()
        for key in state:
            damaged = {**bad_rows.record, "files": {name: {**state, key: value}}}
            FileSource(path, BadRows(path, 0.1, damaged))
    for content in (b"{", b"[]", b'{"%s": 5}' % path.encode()):
        (tmp_path / "bad_rows.json").write_bytes(content)
        FileSource(path, BadRowsFile(tmp_path / "bad_rows.json", 0.1).of(path))


@pytest.fixture
def late(tmp_path) -> int:
    """The number of a row that is met late."""
    texts = [text for text, _ in read(FileSource(write(tmp_path / "clean.jsonl", TEXTS)))]
    return TEXTS.index(texts[-1])


def config(path, bad_rows=0.001, seq_len=16) -> DataConfig:
    return DataConfig((path,), seq_len, 2, 0, val_fraction=0.0, bad_rows=bad_rows)


def batches(loader, count=10**6) -> list[list]:
    """The inputs of the batches that come before an error or the end of the second epoch."""
    found = []
    for batch in itertools.islice(loader, count):
        found.append(batch.inputs.tolist())
        if loader.progress()[loader._specs[0].text]["epochs"] == 2:
            break
    return found


def test_a_run_that_stopped_goes_on_once_the_file_is_mended(tmp_path, tokenizer, late):
    """The bad row is met late; what follows is what would have come without it."""
    path = write(tmp_path / "a.jsonl", rows_with({late: None}))
    run = tmp_path / "run" / "bad_rows.json"
    run.parent.mkdir()
    passing = TrainLoader(config(path, 0.1), tokenizer)
    expected = batches(passing)
    passing.close()
    stopped = TrainLoader(config(path), tokenizer, bad_rows_file=run)
    with pytest.raises(TooManyBadRows, match=f"line {late + 1}"):
        found = []
        for batch in stopped:
            found.append(batch.inputs.tolist())
    assert found == expected[: len(found)] and len(found) > 5
    state = json.loads(json.dumps(stopped.state_dict()))
    stopped.close()
    write(tmp_path / "a.jsonl", rows_with({late: ...}))
    for _ in range(2):
        resumed = TrainLoader(config(path), tokenizer, bad_rows_file=run)
        resumed.load_state_dict(state)
        found += batches(resumed, 20)
        state = resumed.state_dict()
        resumed.close()
    assert found == expected[: len(found)]
    (run.parent / "bad_rows.json").unlink()
    with pytest.raises(UserError, match="--data is not what the run was saved with"):
        TrainLoader(config(path), tokenizer).load_state_dict(state)


def test_progress_counts_bad_rows_by_file_and_kind(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", rows_with({33: None}))
    for is_known in (False, True):  # the second start knows of the first
        loader = TrainLoader(config(path, 0.1), tokenizer, bad_rows_file=tmp_path / "list.json")
        assert ("bad_rows" in loader.progress()[path]) == is_known
        batches(loader)
        assert loader.progress()[path]["bad_rows"] == {path: {NULL: 1}}
        loader.close()


def test_bad_content_does_not_leave_training_to_the_other_sources(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", rows_with({33: None}))
    other = write(tmp_path / "b.jsonl", TEXTS)
    loader = TrainLoader(DataConfig((path, other), 16, 2, 0, val_fraction=0.0), tokenizer)
    with pytest.raises(TooManyBadRows) as caught:
        batches(loader)
    assert not isinstance(caught.value, SourceLost)
    loader.close()


def test_preparation_lists_bad_rows_and_goes_on_once_they_went(tmp_path, tokenizer, late):
    path = write(tmp_path / "a.jsonl", rows_with({late: None}))
    clean = write(tmp_path / "clean.jsonl", rows_with({late: ...}))
    options = {"shard_tokens": 150, "val_fraction": 0.1}
    with pytest.raises(TooManyBadRows):
        prepare([path], tmp_path / "out", tokenizer, **options)
    assert (tmp_path / "out" / "train-00000.tokens").exists()
    write(tmp_path / "a.jsonl", rows_with({late: ...}))
    index = prepare([path], tmp_path / "out", tokenizer, **options)
    documents = sum(shard["documents"] for shard in index["shards"])
    assert documents == 59 and "bad_rows" not in index
    write(tmp_path / "a.jsonl", rows_with({late: None}))
    index = prepare([path], tmp_path / "passing", tokenizer, bad_rows=0.1, **options)
    assert index["bad_rows"] == {path: {path: {NULL: 1}}}
    with pytest.raises(UserError, match=r"preparation \(--data was .*a.jsonl \(files 1, .* now .*"):
        prepare([clean], tmp_path / "passing", tokenizer, bad_rows=0.1, **options)


def test_kind_leaves_out_particulars():
    assert kind_of("not JSON (Expecting value (x))") == "not JSON"
    assert kind_of(NULL) == NULL
