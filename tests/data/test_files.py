import gzip
import itertools
import json
import re
import struct

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamner.data import files
from hamner.data.files import FileChanged, FileSource, last_cut
from hamner.errors import UserError


def texts(location, seed=0, epoch=0):
    return [text for text, _ in FileSource(str(location)).documents(seed, epoch, None)]


def zstd(data):
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zstd"])
def test_jsonl_plain_and_compressed(tmp_path, suffix):
    rows = [{"text": f"naïve {i}"} for i in range(50)] + [{"content": "b"}, "c"]
    data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    compress = {"": bytes, ".gz": gzip.compress}.get(suffix, zstd)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(data))
    assert sorted(texts(tmp_path)) == sorted([f"naïve {i}" for i in range(50)] + ["b", "c"])


@pytest.mark.parametrize("field", ["text", "content"])
def test_parquet(write_parquet, field):
    rows = [f"row {i}" for i in range(35)]
    path = write_parquet("a.parquet", **{"id": list(range(35)), field: rows})
    assert sorted(texts(path)) == sorted(rows)


def test_parquet_of_conversations(write_parquet):
    path = write_parquet("a.parquet", messages=[[{"role": "user", "content": "hi"}]])
    assert texts(path) == ["hi"]


def test_folder_and_glob_take_all_formats_and_leave_other_files(tmp_path, write_jsonl):
    write_jsonl("a.jsonl", ["one"])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b.TXT").write_text("two")
    (tmp_path / "README.md").write_text("three")
    assert sorted(texts(tmp_path)) == ["one", "two"]
    assert texts(tmp_path / "*.jsonl") == ["one"]
    assert sorted(texts(tmp_path / "**" / "*")) == ["one", "two"]


def test_order_changes_with_the_epoch_not_with_the_call(write_jsonl, write_parquet):
    write_jsonl("a.jsonl", [f"a {i}" for i in range(40)])
    folder = write_parquet("b.parquet", text=[f"b {i}" for i in range(40)]).parent
    assert texts(folder) == texts(folder)
    assert texts(folder) != texts(folder, epoch=1)
    assert texts(folder) != texts(folder, seed=1)
    assert sorted(texts(folder)) == sorted(texts(folder, epoch=1))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_an_epoch_may_begin_anywhere_in_a_file(write_jsonl, write_parquet, monkeypatch, name):
    """Its blocks, of some twenty rows here, are shuffled, not only the rows of each."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 200)
    rows = [f"{i}" for i in range(300)]
    path = write_jsonl(name, rows) if name == "a.jsonl" else write_parquet(name, text=rows)
    first = [int(texts(path, epoch=epoch)[0]) for epoch in range(6)]
    assert max(first) - min(first) > 150


def test_small_text_file_is_one_document(tmp_path):
    text = "\ufeffOne.\n\nTwo.\n\n" + "x" * 60_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    assert texts(tmp_path) == [text.removeprefix("\ufeff")] * 2


def test_the_extent_grows_with_files_blocks_and_rows(write_jsonl, write_parquet, monkeypatch):
    texts = [f"document {number} {'x' * 50}" for number in range(40)]
    monkeypatch.setattr("hamner.data.files.BLOCK_BYTES", 200)
    paths = [write_parquet("a.parquet", text=texts), write_jsonl("b.jsonl", texts)]
    with gzip.open(paths[0].parent / "c.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(text) + "\n" for text in texts)
    source = FileSource(str(paths[0].parent))
    total = sum(path.stat().st_size for path in paths[0].parent.iterdir())
    assert source.extent(3, 1, None) == (0, total, "bytes")
    extents = [source.extent(3, 1, state) for _, state in source.documents(3, 1, None)]
    done = [extent.done for extent in extents]
    assert done == sorted(done)
    # Every row of the parquet file counts, blocks of the other, and the third as a whole.
    assert 40 < len({*done}) < 80
    assert 0.6 * total < done[-1] <= total


def test_separator_lines_part_documents(tmp_path):
    (tmp_path / "a.txt").write_text(
        "<|endoftext|>\nOnce.\n\nEnd.\n<|endoftext|>\nTwice <|endoftext|> inline.\n<|endoftext|>"
    )
    assert sorted(texts(tmp_path)) == [
        "Once.\n\nEnd.\n",
        "Twice <|endoftext|> inline.\n",
    ]
    (tmp_path / "a.txt").write_text("\n")
    assert texts(tmp_path) == ["\n"]


@pytest.mark.parametrize("separator", ["\n\n", "\n", "", "\r\n\r\n"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_large_text_is_cut_without_loss(tmp_path, monkeypatch, separator, suffix):
    monkeypatch.setattr(files, "BLOCK_BYTES", 200_000)
    text = separator.join(f"{i:06d} wörds and 你好 \U0001f600" for i in range(40_000))
    data = text.encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(data, mtime=0) if suffix else data)
    documents = texts(path)
    assert len(documents) > 10
    assert max(len(d.encode()) for d in documents) <= files.TEXT_DOCUMENT_BYTES
    # In the order of the file again, every document found where the one before it ended.
    position = 0
    for document in sorted(documents, key=text.index):
        assert text.startswith(document, position)
        position += len(document)
        assert document.endswith(separator) or position == len(text)
    assert position == len(text)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_large_jsonl_is_read_in_blocks_without_loss(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    rows = [f"{i} " + "x" * (i * 37 % 3000) for i in range(200)]
    data = "\n".join(map(json.dumps, rows)).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(gzip.compress(data, mtime=0) if suffix else data)
    source = FileSource(str(path))
    whole = list(source.documents(0, 0, None))
    assert sorted(text for text, _ in whole) == sorted(rows)
    for index in (0, 57, 150, 199):
        assert list(source.documents(0, 0, whole[index][1])) == whole[index + 1 :]


@given(st.binary(min_size=1, max_size=200))
def test_cut_makes_progress(text):
    assert 0 < last_cut(text) <= len(text)


@given(st.text(min_size=2))
def test_cut_never_splits_a_character(text):
    data = text.encode()
    data[: last_cut(data)].decode()


def test_identity_follows_names_and_sizes(write_jsonl):
    path = write_jsonl("a.jsonl", ["one"])
    before = FileSource(str(path)).identity()
    assert FileSource(str(path.parent)).identity() == before
    renamed = path.rename(path.with_name("b.jsonl"))
    assert FileSource(str(renamed)).identity() != before
    write_jsonl("a.jsonl", ["one", "two"])
    assert FileSource(str(path)).identity() != before


def refused(location, message):
    with pytest.raises(UserError, match=message) as caught:
        texts(location)
    assert str(caught.value).startswith("--data ")
    assert "\n" not in str(caught.value)


def test_nothing_there_is_refused(tmp_path):
    refused(tmp_path / "missing.txt", "missing.txt: no such file or folder")
    refused(tmp_path, "the folder has no file that ends in .txt, .jsonl or .parquet")
    refused(tmp_path / "*.txt", "the glob has no file that ends in")
    (tmp_path / "a.csv").write_text("a,b")
    refused(tmp_path / "a.csv", "name of a data file must end in")
    refused(tmp_path, "the folder has no file")
    refused("x" * 300, "cannot be read")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"text\n1\n", "its content is not parquet"),
        ("a.parquet", b"", "its content is not parquet"),
        ("a.jsonl.gz", b"{}", "its content is not gz"),
        ("a.txt.zst", b"text", "its content is not zst"),
        ("a.txt", gzip.compress(b"text", mtime=0), "its content is gz; rename it to end in .gz"),
        ("a.jsonl", zstd(b"{}"), "its content is zst; rename"),
        ("a.jsonl", b"PAR1....", "its content is parquet; rename"),
        ("a.parquet", b"PAR1 and then nothing", "not a readable parquet file"),
        ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-20], "damaged compressed file"),
        (
            "a.txt.gz",
            gzip.compress(b"text", mtime=0)[:10] + b"\xff" * 50,
            "damaged compressed file",
        ),
        ("a.txt.zst", zstd(b"text" * 999)[:-5], "damaged compressed file"),
        ("a.txt", b"abc \xff\xfe", "byte 4: not UTF-8 .*convert"),
        (
            "a.txt.gz",
            gzip.compress(b"abcd \xff\xfe", mtime=0),
            "decompressed byte 5: not UTF-8 .*convert",
        ),
        ("a.jsonl", b'"ok"\n"\xff"\n', "line 2: not UTF-8 .*convert"),
        ("a.jsonl", b'"ok"\n\n{"text": "cut\n', "line 3: not JSON"),
        ("a.jsonl", b'"ok"\n{"text": null}\n', 'line 2: "text" must be a string, not null'),
        ("a.jsonl", b'{"body": "x"}', r"line 1: has no field .* \(it has body\)"),
        ("a.jsonl", b"[" * 100_000, "line 1: nested too deeply"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: .* half a surrogate pair"),
    ],
)
def test_content_that_cannot_be_read_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, re.escape(str(path)) + ".*" + message)


def skippable(number, size):
    return struct.pack("<II", 0x184D2A50 + number, size) + bytes(size)


@pytest.mark.parametrize(
    "layout",
    [
        [skippable(0, 4), 0, skippable(0, 4), 1],  # as pzstd writes
        [skippable(15, 0), skippable(3, 9_000), 0, 1, skippable(0, 5)],
        [zstd(b""), 0, 1],
        [0, 1],
    ],
)
def test_zstd_of_several_frames(tmp_path, layout):
    frames = [zstd(b'"one"\n"two"\n'), zstd(b'"three"\n')]
    data = b"".join(frames[part] if isinstance(part, int) else part for part in layout)
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert sorted(texts(tmp_path)) == ["one", "three", "two"]
    (tmp_path / "a.jsonl.zst").write_bytes(data[:-3])
    refused(tmp_path, "damaged compressed file")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_wide_encodings_are_named(tmp_path, name, encoding):
    data = '{"text": "Some English, ein Lied, une fête, песня"}\n'.encode(encoding) * 40
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    refused(tmp_path / name, rf"is {encoding[:6].upper()}, not UTF-8; convert it, .* iconv -f")


def test_files_without_text_are_refused_when_the_source_is_opened(tmp_path, write_parquet):
    write_parquet("a.parquet", id=[1])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("wide", "utf-16")
    for location, message in ((tmp_path, "no column"), (tmp_path / "b", "is UTF-16")):
        with pytest.raises(UserError, match=message):
            FileSource(str(location))


@pytest.mark.parametrize("content", ["names\0and\0more\0" * 9, "\0" * 99, "ein\0e Lücke"])
def test_nul_bytes_are_named(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    refused(tmp_path, r"a.txt, byte \d+: holds NUL bytes")


def test_line_number_of_a_compressed_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'"a"\n"b"\nbroken\n', mtime=0))
    refused(path, "line 3: not JSON")


def test_parquet_without_text_is_refused(write_parquet):
    refused(write_parquet("a.parquet", id=[1]), r'no column "text".* \(it has id\)')
    path = write_parquet("b.parquet", text=[None if i == 13 else "x" for i in range(25)])
    refused(path, 'b.parquet, row 13: "text" must be a string, not null')
    refused(write_parquet("c.parquet", text=[1, 2]), 'row 0: "text" must be a string, not int')


def test_parquet_with_broken_utf8_names_the_row(write_parquet):
    broken = pyarrow.array([b"ok", b"abc\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    refused(write_parquet("a.parquet", text=broken), 'row 1: "text" is not UTF-8; 1 of 2 rows')


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_text_that_grows_is_read_as_it_was(tmp_path, write_jsonl, monkeypatch, caplog, name):
    monkeypatch.setattr(files, "BLOCK_BYTES", 200)
    monkeypatch.setattr(files, "TEXT_DOCUMENT_BYTES", 100)
    write_jsonl("a.jsonl", [f"row {i}" for i in range(300)]).rename(tmp_path / name)
    before = [texts(tmp_path, epoch=epoch) for epoch in range(3)]
    source = FileSource(str(tmp_path))
    for epoch, expected in enumerate(before):
        reading = source.documents(0, epoch, None)
        first = next(reading)[0]
        with (tmp_path / name).open("a") as file:
            file.write('"new"\n' * 100)
        assert [first, *(text for text, _ in reading)] == expected
    assert caplog.text.count("has grown from") == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_is_cut_short_or_replaced_is_read_on_once_it_is_back(
    tmp_path, write_jsonl, write_parquet, monkeypatch, name
):
    monkeypatch.setattr(files, "BLOCK_BYTES", 200)

    def write(rows):
        if name == "a.jsonl":
            return write_jsonl(name, rows)
        return write_parquet(name, text=rows)

    rows = [f"row {i}" for i in range(300)]
    expected = texts(write(rows))
    source = FileSource(str(tmp_path))
    reading = source.documents(0, 0, None)
    read = list(itertools.islice(reading, 100))
    write(rows[:150])
    with pytest.raises(FileChanged, match=f"{name} (was cut short|has .* bytes)"):
        read.extend(reading)
    with pytest.raises(FileChanged, match=f"{name} has .* bytes, and had .* at the start"):
        next(source.documents(0, 1, None))
    if name == "a.parquet":  # of text, what was added behind the end does not matter
        write(rows * 2)
        with pytest.raises(FileChanged, match=f"{name} has .* bytes, and had .* at the start"):
            next(source.documents(0, 1, None))
    write(rows)
    read.extend(source.documents(0, 0, read[-1][1]))
    assert [text for text, _ in read] == expected
