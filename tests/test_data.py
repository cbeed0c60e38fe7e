"""Sources, shuffling, layouts, and that every position resumes exactly."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from galore_pretrain.errors import InputError
from galore_pretrain.text import readers
from galore_pretrain.text.batches import (
    IGNORE,
    Batch,
    Documents,
    Position,
    TokenRows,
    TrainingData,
    read_ahead,
    validation_rows,
)
from galore_pretrain.text.sources import BadData, LocalFiles, Tally, open_source
from galore_pretrain.text.tokenizer import Ends, Ids
from galore_pretrain.train.inputs import Inputs


class Letters:
    """A tokenizer of one id a letter; end marker 1."""

    name, vocab_size, eos_id, fingerprint = "letters", 130, 1, "-"

    def encode(self, texts: list[str], first: int | None = None) -> list[Ids]:
        return [np.array([ord(c) for c in text], np.int32) for text in texts]

    def byte_ends(self, text: str, first: int | None = None) -> Ends:
        return np.arange(1, len(text) + 1)

    def save(self, folder: Path, model_max_length: int) -> None:
        raise AssertionError


class Lists:
    """A source of given documents."""

    def __init__(self, shards: list[list[str]]) -> None:
        self._documents, self.shards = shards, [f"shard {i}" for i in range(len(shards))]
        self.bad_data = BadData()

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        return iter(list(enumerate(self._documents[shard], 1))[start:])


def write_jsonl(path: Path, texts: list[Any]) -> Path:
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:  # type: ignore[operator]
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def everything(source: Any) -> list[str]:
    return [text for shard in range(len(source.shards)) for _, text in source.read(shard, 0)]


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.json.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"]
)
def test_every_kind_of_file_reads_from_any_position(name: str, tmp_path: Path) -> None:
    texts = [f"document {i} é" for i in range(10)]
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "url": texts}), path, row_group_size=3)
    elif name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    else:
        write_jsonl(path, texts)
    source = LocalFiles([path])
    whole = list(source.read(0, 0))
    assert [text for _, text in whole] == texts
    for i in range(len(texts) + 1):
        start = 0 if i == 0 else whole[i - 1][0]
        assert [text for _, text in source.read(0, start)] == texts[i:]


def test_txt_is_cut_into_passages(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i} " + "word " * 60 for i in range(40)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    source = LocalFiles([path])
    whole = list(source.read(0, 0))
    assert len(whole) == 10
    assert all(len(text) <= 4000 for _, text in whole)
    assert "".join("".join(t.split()) for _, t in whole) == "".join("".join(p.split()) for p in paragraphs)
    assert [t for _, t in source.read(0, whole[3][0])] == [t for _, t in whole[4:]]
    path.write_text("line without end\n" * 2000)  # no blank line at all
    assert 3900 < max(len(text) for text in everything(source)) <= 4000
    path.write_text(("a" * 3900 + "\n" + "b" * 3990 + "\n") * 3)  # together they would be twice as long
    assert [text[0] for text in everything(source)] == ["a", "b"] * 3


def test_text_of_before_its_lines_were_cut_is_another_text(tmp_path: Path) -> None:
    """What a position in it means has changed; the sample is cut as ever, so its runs go on."""
    path = tmp_path / "book.txt"
    path.write_text("x" * 9000)
    written = hashlib.sha256(f"book.txt 9000 {zlib.crc32(b'x' * 18000):08x}".encode()).hexdigest()
    assert LocalFiles([path], passages=readers.WHOLE_LINES).fingerprint == written
    assert LocalFiles([path]).fingerprint != written
    assert everything(LocalFiles([path], passages=readers.WHOLE_LINES)) == ["x" * 9000]
    write_jsonl(tmp_path / "a.jsonl", ["x"])  # of other kinds, nothing has changed
    both = [LocalFiles([tmp_path / "a.jsonl"], passages=rule) for rule in (readers.WHOLE_LINES, readers.CUT_LINES)]
    assert both[0].fingerprint == both[1].fingerprint


def test_the_sample_is_the_one_that_runs_were_made_with() -> None:
    """Down to each passage: checksums of the first versions."""
    checksums = {}
    for split in ("train", "validation"):
        source = open_source("sample", split)
        entries = [f"{i} {n} {text}\0" for i in range(len(source.shards)) for n, text in source.read(i, 0)]
        checksums[split] = (zlib.crc32("".join(entries).encode()), source.fingerprint[:16])
    assert checksums == {
        "train": (3150209798, "19f71e599f861720"),
        "validation": (1843421096, "286f80ac0879a64f"),
    }


@pytest.mark.parametrize(
    "book", ["It was so. It was not. " * 2000, "words without a stop " * 3000, "x" * 50_000, "語" * 9000]
)
def test_a_line_that_holds_a_book_is_cut_where_a_reader_would(tmp_path: Path, book: str) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a preface\n" + book + "\nthe end")
    source = LocalFiles([path])
    whole = list(source.read(0, 0))
    passages = [text for _, text in whole]
    assert "".join("".join(passages).split()) == "".join(("a preface" + book + "the end").split())
    assert all(len(text) <= 4000 for text in passages)
    if ". " in book:
        assert all(text.endswith(".") for text in passages[:-1])
    elif " " in book:
        assert {word for text in passages for word in text.split()} <= set((book + " a preface the end").split())
    assert [t for _, t in source.read(0, whole[2][0])] == passages[3:]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = {"a.txt": "text", "a.jsonl": json.dumps({"text": "text"}), "a.csv": "text\ntext\n"}[name]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert everything(LocalFiles([tmp_path / name])) == ["text"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text\na\n"b\nc\nd\n', r'cannot be read after row 1 \(a quote " is opened there and never closed\)'),
        ('text\na\n"b" c\n', "cannot be read after row 1 .*expected"),
        ("text\ra\rb\r", r"cannot be read after row 0 \(its line ends are \\r alone; convert them"),
    ],
)
def test_a_csv_that_means_nothing_is_refused(tmp_path: Path, content: str, message: str) -> None:
    """A quote that is never closed took all that follows into one document."""
    (tmp_path / "a.csv").write_bytes(content.encode())
    with pytest.raises(InputError, match=message) as error:
        everything(LocalFiles([tmp_path / "a.csv"]))
    assert "open the file" not in str(error.value)
    write_jsonl(tmp_path / "b.jsonl", ["sound"])
    files = [tmp_path / "a.csv", *[tmp_path / "b.jsonl"] * 20]
    assert everything(LocalFiles(files, BadData("skip"))) == ["a"] * ("\na\n" in content) + ["sound"] * 20


def test_quotes_inside_of_csv_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('n,text\n1,5" wide\n2,"5"" and\na line, more"\n3,say "hi"\n')
    assert everything(LocalFiles([tmp_path / "a.csv"])) == ['5" wide', '5" and\na line, more', 'say "hi"']


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"text\n"])
def test_an_empty_csv_is_a_warning(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert everything(LocalFiles([tmp_path / "a.csv"])) == []
    assert "a.csv holds no document" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_utf_16_is_no_text(tmp_path: Path, name: str, encoding: str) -> None:
    """With a byte order mark, it is known from the first line: the lines after it would be text with NULs."""
    content = {"a.txt": "text\n", "a.jsonl": json.dumps({"text": "text"}) + "\n", "a.csv": "text\ntext\n"}[name]
    mark = "" if encoding == "utf-16" else "\ufeff"
    (tmp_path / name).write_bytes((mark + content * 100).encode(encoding))
    with pytest.raises(InputError, match=f"{name} is UTF-16; convert it"):
        everything(LocalFiles([tmp_path / name]))
    write_jsonl(tmp_path / "b.jsonl", ["sound"] * 20)
    files = [tmp_path / name, *[tmp_path / "b.jsonl"] * 20]
    assert everything(LocalFiles(files, BadData("skip"))) == ["sound"] * 400


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=200))
def test_held_out_documents_are_a_partition(texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_jsonl(Path(folder) / "a.jsonl", texts)
        train, validation = (everything(open_source(folder, split)) for split in ("train", "validation"))
    assert Counter(train) + Counter(validation) == Counter(texts)
    assert not set(train) & set(validation)


def test_named_validation_files_and_eval_data(tmp_path: Path) -> None:
    for name in ("c4-train.0.json.gz", "c4-train.1.json.gz", "c4-validation.0.json.gz", "other.jsonl"):
        write_jsonl(tmp_path / name, [name])
    assert everything(open_source(str(tmp_path), "validation")) == ["c4-validation.0.json.gz"]
    assert len(everything(open_source(str(tmp_path), "train"))) == 3
    other = str(tmp_path / "other.jsonl")
    assert everything(open_source(str(tmp_path), "validation", other)) == ["other.jsonl"]
    assert "other.jsonl" not in everything(open_source(str(tmp_path), "train", other))
    assert len(open_source(str(tmp_path / "c4-train*"), "train").shards) == 2
    with pytest.raises(InputError, match="nothing is left to train on"):
        open_source(other, "train", other)


def test_sample_splits_are_whole_speeches() -> None:
    train, validation = open_source("sample", "train"), open_source("sample", "validation")
    assert not set(train.shards) & set(validation.shards)
    assert (len(train.shards), len(validation.shards)) == (237, 12)
    assert not set(everything(train)) & set(everything(validation))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not JSON"),
        (b"[1]", 'line 2 has no string under "text"'),
        (b'{"text": null}', 'line 2 has no string under "text"'),
        (b'{"text": 3}', 'line 2 has no string under "text"'),
        (b'{"txt": "a"}', 'line 2 has no string under "text"'),
        (b'{"text": "\xff"}', "line 2 is not JSON"),
    ],
)
def test_bad_line_names_file_and_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(InputError, match=message) as error:
        everything(LocalFiles([path]))
    assert str(path) in str(error.value)


def test_damaged_files_name_themselves(tmp_path: Path) -> None:
    good = gzip.compress(b'{"text": "good"}\n' * 1000)
    cases = {
        "cut.jsonl.gz": good[:-20],
        "html.json.gz": b"<html>",
        "crc.jsonl.gz": good[:-8] + b"12345678",
        "no.parquet": b"PAR",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            everything(LocalFiles([tmp_path / name]))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"no column \"text\"; its columns: 'body'"):
        everything(LocalFiles([tmp_path / "b.parquet"]))


SOUND = [f"document {i}" for i in range(3000)]
BAD_LINES = {
    "malformed JSON": b'{"text": "cut',
    "a list": b"[1]",
    "nested a million deep": b"[" * 1_000_000,
    "text missing": b'{"txt": "a"}',
    "text null": b'{"text": null}',
    "text a number": b'{"text": 3}',
    "text a list": b'{"text": ["a"]}',
    "invalid UTF-8": b'{"text": "\xff"}',
    "a null byte": b"\x00",
    "half a surrogate pair": rb'{"text": "\ud83d"}',
    "the same in bytes": b'{"text": "\xed\xa0\x80"}',
}


def lines_of(texts: list[str]) -> list[bytes]:
    return [json.dumps({"text": text}).encode() for text in texts]


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines_are_left_out_if_that_is_asked_for(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every other document comes, in its order, from any position on; each is named by file and line."""
    lines, path = lines_of(SOUND), tmp_path / "a.jsonl"
    for place in (0, 1500, 3000):
        lines.insert(place, BAD_LINES[kind])
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(InputError, match=r"a\.jsonl line 1 .*--bad-data skip"):
        everything(LocalFiles([path]))
    found = list(LocalFiles([path], BadData("skip")).read(0, 0))
    assert [text for _, text in found] == SOUND
    assert [f"{path} line {n} " in r.message for n, r in zip((1, 1501, 3001), caplog.records, strict=True)] == [
        True
    ] * 3
    for i in (0, 1, 1498, 1499, 1500, 2998, 2999):
        assert list(LocalFiles([path], BadData("skip")).read(0, found[i][0])) == found[i + 1 :]


def test_too_many_bad_lines_are_refused_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = lines_of(SOUND)
    for place in range(0, 3000, 50):
        lines[place] = b"{"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=r"11 of 501 documents cannot be read.*a.jsonl line 501.*1 in 100 at most"):
        everything(LocalFiles([tmp_path / "a.jsonl"], BadData("skip")))
    assert len(caplog.records) == 10


def test_a_bad_place_is_counted_in_the_first_epoch_alone(tmp_path: Path) -> None:
    """Seven bad lines of 400 are allowed, however often the text is read. A run that goes on counts no more either."""
    lines = lines_of(SOUND[:400])
    for place in range(0, 350, 50):
        lines[place] = b"{"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = LocalFiles([tmp_path / "a.jsonl"], BadData("skip"))
    after = [position for _, _, position in islice(Documents(source, 0, Position()), 5 * 393)][-1]
    assert after.tally == source.bad_data.tally == Tally(393, 7)
    again = LocalFiles([tmp_path / "a.jsonl"], BadData("skip"))
    list(islice(Documents(again, 0, after), 3 * 393))
    assert again.bad_data.tally == Tally(393, 7)


def test_a_json_array_is_told_as_one(tmp_path: Path) -> None:
    for name, text in (("a", '[{"text": "b"}]'), ("b", '[\n  {"text": "b"}\n]'), ("c", '{\n  "text": "b"\n}')):
        (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(InputError, match=r"jq -c '\.\[\]'"):
            everything(LocalFiles([tmp_path / f"{name}.json"]))


def test_a_cell_that_is_no_text_is_told_in_a_few_words(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [["word " * 400] * 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"row 1 has no text \(list: \['word word") as error:
        everything(LocalFiles([tmp_path / "a.parquet"]))
    assert len(str(error.value)) < 300


def test_a_place_is_warned_of_once_however_often_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By further epochs, by evaluations, and by the other split. All are counted, each time."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = lines_of(SOUND)
    lines[7] = lines[70] = b"{"
    (folder / "0.jsonl").write_bytes(b"\n".join(lines))
    (folder / "1.jsonl").write_bytes(b"")
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines_of(SOUND)))[:-20])
    for epoch, split in enumerate(("train", "validation", "train")):
        source = open_source(str(folder), split, bad_data="skip")
        for again in range(3):
            everything(source)
            assert source.bad_data.tally.bad == 2 * (again + 1)
        assert len(caplog.records) == 4, (epoch, caplog.text)
    assert len(set(caplog.messages)) == 4


def test_texts_for_a_trial_are_read_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are read again by each evaluation, which counts them and warns of them; an empty file is passed over."""
    (tmp_path / "0.jsonl").write_bytes(b"")
    (tmp_path / "1.jsonl").write_bytes(b"\n".join([b"{", *lines_of(SOUND[:5])]))
    (tmp_path / "2.jsonl").write_bytes(b"\n".join([*lines_of(SOUND[5:9]), b"{", *lines_of(SOUND[9:])]))
    source = LocalFiles([tmp_path / f"{n}.jsonl" for n in range(3)], BadData("skip"))
    inputs = Inputs(LlamaConfig(), source, source, Letters(), TokenRows(Letters(), "pad", 6))
    assert inputs.first_texts() == SOUND[:16]
    assert (source.bad_data.tally, caplog.text) == (Tally(), "")
    assert everything(source) == SOUND
    assert source.bad_data.tally == Tally(3000, 2)
    assert len(caplog.records) == 3
    strict = LocalFiles([tmp_path / "1.jsonl"])
    assert replace(inputs, validation=strict).first_texts() == SOUND[:5]
    with pytest.raises(InputError, match=r"1\.jsonl line 1 is not JSON"):
        everything(strict)


BROKEN = {
    "truncated": lambda good: good[: len(good) // 2],
    "bad CRC": lambda good: good[:-8] + b"12345678",
    "flipped bytes": lambda good: good[:5000] + b"!!!!" + good[5004:],
    "HTML": lambda good: b"<html><body>Too many requests</body></html>",
    "not gzip": lambda good: b'{"text": "plain"}\n',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_breaks_off_is_left_out_from_there(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If it is one of many; what comes before the break and after the file is read."""
    rng, files = random.Random(0), []
    texts = [[f"{n} {i} {rng.randbytes(40).hex()}" for i in range(500)] for n in range(4)]
    for n, shard in enumerate(texts):
        files.append(tmp_path / f"{n}.jsonl.gz")
        write_jsonl(files[-1], shard)
    files[1].write_bytes(BROKEN[kind](files[1].read_bytes()))
    with pytest.raises(InputError, match=r"1\.jsonl\.gz cannot be read after line \d+ \(.*--bad-data skip"):
        everything(LocalFiles(files))
    source = LocalFiles(files, BadData("skip"))
    read = everything(source)
    some = len(read) - 1500
    assert read == texts[0] + texts[1][:some] + texts[2] + texts[3]
    assert {"truncated": 0 < some < 500, "bad CRC": some == 500, "flipped bytes": some < 500}.get(kind, some == 0)
    (record,) = caplog.records
    assert f"{files[1]} cannot be read after line" in record.message
    assert "all that comes after it there" in record.message
    files[2].write_bytes(b"")
    assert len(everything(LocalFiles([*files[:1], *files[2:]], BadData("skip")))) == 1000
    assert "holds no document" in caplog.records[-1].message
    files[3].write_bytes(b"<html>")
    with pytest.raises(InputError, match="2 of 4 files break off"):
        everything(LocalFiles(files, BadData("skip")))
    with pytest.raises(InputError, match="1 of 1 files break off"):
        everything(LocalFiles(files[1:2], BadData("skip")))


def test_bad_rows_of_parquet_and_lines_of_txt_are_left_out(tmp_path: Path) -> None:
    texts: list[str | None] = [f"row {i}" for i in range(1000)]
    texts[10] = texts[600] = None
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100)
    cut = pyarrow.array([b"sound", b"\xff\xfe", b"sound"]).view(pyarrow.string())  # as a careless writer would
    pyarrow.parquet.write_table(pyarrow.table({"text": cut}), tmp_path / "c.parquet")
    assert everything(LocalFiles([tmp_path / "c.parquet"], BadData("skip"))) == ["sound"] * 2
    (tmp_path / "b.txt").write_bytes(b"a line\n" * 300 + b"\xff\xfe\n" + b"a line\n" * 300)
    for name, message in (
        ("a.parquet", "a.parquet row 11 has no text"),
        ("b.txt", "b.txt line 301 is not UTF-8"),
        ("c.parquet", "c.parquet row 2 is not UTF-8"),
    ):
        with pytest.raises(InputError, match=message):
            everything(LocalFiles([tmp_path / name]))
    rows = list(LocalFiles([tmp_path / "a.parquet"], BadData("skip")).read(0, 0))
    assert [text for _, text in rows] == [text for text in texts if text]
    assert list(LocalFiles([tmp_path / "a.parquet"], BadData("skip")).read(0, rows[599][0])) == rows[600:]
    assert "".join(everything(LocalFiles([tmp_path / "b.txt"], BadData("skip")))).count("a line") == 600


def test_rows_that_cannot_be_decoded_are_left_out_together(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.parquet", [f"row {i} {'x' * 50}" for i in range(2000)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(100).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet rows 1001 to 1010 cannot be read \("):
        everything(LocalFiles([path]))
    read = list(LocalFiles([path], BadData("skip")).read(0, 0))
    assert [text for _, text in read] == texts[:1000] + texts[1010:]
    assert list(LocalFiles([path], BadData("skip")).read(0, 1005)) == read[1000:]


class Stale(io.BufferedReader):
    """A file of a network's file system, which fails so many times after its beginning."""

    left = 0

    def read1(self, size: int = -1) -> bytes:
        if self.tell() and Stale.left:
            Stale.left -= 1
            raise OSError(116, "Stale file handle")
        return super().read1(size // 64)


@pytest.mark.parametrize(("failures", "name"), [(3, "a.jsonl"), (5, "a.jsonl"), (3, "b.txt")])
def test_an_error_of_the_system_is_no_fault_of_the_text(
    failures: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, and nothing is left out for it."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = tmp_path / name
    path.write_bytes(b"\n".join(lines_of(SOUND)) if name == "a.jsonl" else (b"a line\n" * 200 + b"\n") * 9)
    undisturbed, source = everything(LocalFiles([path])), LocalFiles([path], BadData("skip"))
    monkeypatch.setattr(Path, "open", lambda self, mode: Stale(io.FileIO(self)))
    monkeypatch.setattr(Stale, "left", failures)
    if failures == 3:
        assert everything(source) == undisturbed
        assert caplog.text.count("(Stale file handle): trying again") == 3
    else:
        with pytest.raises(InputError, match=r"a\.jsonl cannot be read after document \d+ \(Stale file handle\)"):
            everything(source)
    assert source.bad_data.tally.bad == 0


def test_no_memory_is_no_fault_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")

    def fail(*_: Any, **__: Any) -> None:
        raise pyarrow.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", fail)
    with pytest.raises(MemoryError):
        everything(LocalFiles([tmp_path / "a.parquet"], BadData("skip")))


def test_a_resumed_run_has_the_counts_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an undisturbed run passes, one that was stopped anywhere passes."""
    monkeypatch.setattr("galore_pretrain.text.batches.BLOCK", 100)
    lines = lines_of(SOUND)
    lines[2000:2000] = [b"{"] * 20
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    files = [tmp_path / "a.jsonl"]

    def documents(start: Position) -> list[tuple[str, Position]]:
        stream = islice(Documents(LocalFiles(files, BadData("skip")), 0, start), 2990)
        return [(text, after) for _, text, after in stream]

    whole = documents(Position())
    assert whole[-1][1].tally == Tally(2900, 20)
    for stop in (1, 1950, 1999, 2000, 2001, 2050, 2500):
        start = Position.of(json.loads(json.dumps(whole[stop - 1][1].state_dict())))
        assert documents(start)[: 2990 - stop] == whole[stop:]
    with pytest.raises(InputError, match=r"of .* documents cannot be read"):  # without them
        documents(replace(whole[1949][1], tally=Tally()))


def test_files_are_known_again(tmp_path: Path) -> None:
    """By name, size, and both ends: text that was shuffled or exchanged is noticed."""
    path = tmp_path / "a.jsonl"
    lines = lines_of([f"document {i:05}" for i in range(20_000)])
    path.write_bytes(b"\n".join(lines))
    before = LocalFiles([path]).fingerprint
    assert LocalFiles([path]).fingerprint == before
    for a, b in ((0, 1), (-1, -2)):
        lines[a], lines[b] = lines[b], lines[a]
        path.write_bytes(b"\n".join(lines))
        assert LocalFiles([path]).fingerprint != before
        lines[a], lines[b] = lines[b], lines[a]


def test_what_lies_before_a_position_is_not_read(tmp_path: Path) -> None:
    """Files before it are not opened, lines before it not parsed: they would be refused."""
    for n in range(10):
        (tmp_path / f"{n}.jsonl.gz").write_bytes(b"<html>")
    (tmp_path / "zz.jsonl").write_bytes(b"{\n" * 50_000 + b"\n".join(lines_of(SOUND * 2)))
    source = open_source(str(tmp_path / "*"), "train")
    order = np.random.default_rng([0, 0]).permutation(11).tolist()
    stream = iter(Documents(source, 0, Position(shard=order.index(10), document=50_000)))
    assert next(stream)[1] in SOUND


def test_refused_paths(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    for data, message in (
        (str(tmp_path / "absent"), "no such file, folder or pattern"),
        (str(tmp_path), "holds no"),
        (str(tmp_path / "a.md"), "unknown kind of file"),
        (str(tmp_path / "*.jsonl"), "holds no"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(data, "train")


# -- order ------------------------------------------------------------------------------------------------------------


def test_each_epoch_is_a_new_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galore_pretrain.text.batches.BLOCK", 8)
    shards = [[f"{s}.{i}" for i in range(5 + s)] for s in range(4)]
    total = sum(map(len, shards))
    texts = [text for _, text, _ in islice(Documents(Lists(shards), 0, Position()), 2 * total)]
    first, second = texts[:total], texts[total:]
    assert sorted(first) == sorted(second) == sorted(text for shard in shards for text in shard)
    assert first != second
    assert first != [text for _, text, _ in islice(Documents(Lists(shards), 1, Position()), total)]


def test_long_documents_are_held_by_the_character(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a block nor a call to the tokenizer holds more than its bound and one document."""
    monkeypatch.setattr("galore_pretrain.text.batches.BLOCK_CHARACTERS", 1000)
    monkeypatch.setattr("galore_pretrain.text.batches._TOKENIZE_CHARACTERS", 300)
    documents = Documents(Lists([["x" * 99] * 50, ["y" * 700] * 9, ["z"] * 5000]), 0, Position())
    blocks = [texts for texts, _, _ in documents._blocks(0, 0, 0)]
    assert sum(map(len, blocks)) == 5059
    assert max(sum(map(len, texts)) for texts in blocks) < 1700
    calls: list[list[str]] = []

    class Counting(Letters):
        def encode(self, texts: list[str], first: int | None = None) -> list[Any]:
            calls.append(texts)
            return super().encode(texts, first)

    rows = list(islice(TokenRows(Counting(), "pad", 8)(documents), 400))
    assert len(rows) == 400
    assert max(sum(map(len, texts)) for texts in calls) < 1000
    assert max(map(len, calls)) > 50


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.text("abc", min_size=0, max_size=30), max_size=12), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(1, 200),
    st.data(),
)
def test_documents_resume_anywhere(shards: list[list[str]], block: int, characters: int, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("galore_pretrain.text.batches.BLOCK", block)
        patch.setattr("galore_pretrain.text.batches.BLOCK_CHARACTERS", characters)
        source = Lists(shards)
        total = sum(map(len, shards))
        if total == 0:
            with pytest.raises(InputError, match="no document"):
                next(iter(Documents(source, 0, Position())))
            return
        run = list(islice(Documents(source, 0, Position()), 2 * total + 3))
        cut = data.draw(st.integers(0, len(run) - 1))
        here, _, after = run[cut]
        assert list(islice(Documents(source, 0, here), len(run) - cut)) == run[cut:]
        assert list(islice(Documents(source, 0, after), len(run) - cut - 1)) == run[cut + 1 :]


def test_a_run_of_before_keeps_blocks_without_a_bound_of_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its positions count in blocks of so many documents, however long: none comes twice, and none is lost."""
    monkeypatch.setattr("galore_pretrain.text.batches.BLOCK", 16)
    monkeypatch.setattr("galore_pretrain.text.batches.BLOCK_CHARACTERS", 100)
    shards = [[f"{s}.{i} " + "long " * i for i in range(20)] for s in range(3)]
    written = Position(block_characters=None).state_dict()
    assert written.pop("block_characters", 0) is None  # a state of before has no such key
    whole = list(islice(Documents(Lists(shards), 0, Position.of(written)), 150))
    assert sorted(text for _, text, _ in whole[:60]) == sorted(text for shard in shards for text in shard)
    starts = {(before.shard, before.document) for before, _, _ in whole[:60]}
    assert len(starts) == 4  # 60 documents in blocks of 16
    for stop in (0, 1, 7, 15, 16, 40, 60, 75):
        state = json.loads(json.dumps(whole[stop][0].state_dict()))
        assert state["block_characters"] is None
        del state["block_characters"]
        for start in (Position.of(state), whole[stop][0]):
            assert list(islice(Documents(Lists(shards), 0, start), 150 - stop)) == whole[stop:]
    bounded = next(iter(Documents(Lists(shards), 0, Position())))[2].state_dict()
    assert bounded["block_characters"] == 100


@pytest.mark.parametrize("layout", ["pad", "pack"])
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text("abc", max_size=40), min_size=3, max_size=30),
    st.integers(2, 17),
    st.integers(1, 4),
    st.data(),
)
def test_batches_resume_anywhere(
    layout: str, documents: list[str], length: int, sequences: int, data: st.DataObject
) -> None:
    documents = [*documents, "abcabc"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("galore_pretrain.text.batches.BLOCK", 7)

        def stream() -> TrainingData:
            return TrainingData(Lists([documents, documents[:2]]), TokenRows(Letters(), layout, length), sequences, 3)

        run = list(islice(stream(), 12))
        cut = data.draw(st.integers(0, 10))
        again = stream()
        again.load_state_dict(json.loads(json.dumps(run[cut].state)))
        for a, b in zip(run[cut + 1 :], again, strict=False):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.labels, b.labels)
            assert (a.tokens, a.state) == (b.tokens, b.state)


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_pad_is_one_document_a_row() -> None:
    source = Lists([["abcd", "", "ab", "abcdefgh"]])
    rows = validation_rows(source, TokenRows(Letters(), "pad", 6), 1000)
    a, b, c, d, e = (ord(x) for x in "abcde")
    assert [row.input_ids[: row.real].tolist() for row in rows] == [
        [a, b, c, d, 1],
        [a, b, 1],
        [a, b, c, d, e, 1],
    ]
    assert rows[0].labels.tolist() == [b, c, d, 1, IGNORE, IGNORE]
    assert rows[2].labels.tolist() == [b, c, d, e, 1, IGNORE]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("abcdefgh", max_size=25), max_size=25), st.integers(2, 9))
def test_pack_wastes_no_token(documents: list[str], length: int) -> None:
    """Rows are consecutive windows of the joined documents; every token but the first is a label exactly once."""
    stream = [token for text in documents if text for token in [*map(ord, text), 1]]
    source = Lists([[*documents, "xy"]])
    rows = validation_rows(source, TokenRows(Letters(), "pack", length), 10**6) if len(stream) > length else []
    for i, row in enumerate(rows):
        whole = [*stream, ord("x"), ord("y"), 1]
        assert row.input_ids.tolist() == whole[i * length : (i + 1) * length]
        assert row.labels.tolist() == whole[i * length + 1 : (i + 1) * length + 1]
    if rows:
        assert len(rows) == (len(stream) + 3 - 1) // length


def test_validation_stops_at_its_tokens_and_says_when_there_is_none() -> None:
    source = Lists([["abcd"] * 100])
    assert len(validation_rows(source, TokenRows(Letters(), "pad", 6), 50)) == 10
    with pytest.raises(InputError, match="no validation document"):
        validation_rows(Lists([[]]), TokenRows(Letters(), "pad", 6), 50)


def test_documents_without_tokens_are_refused_rather_than_read_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("galore_pretrain.text.batches._EMPTY", 1000)
    with pytest.raises(InputError, match="hold no token"):
        next(iter(TrainingData(Lists([[""] * 10]), TokenRows(Letters(), "pad", 6), 1, 0)))


def test_batch_counts() -> None:
    batch = next(iter(TrainingData(Lists([["abcd", "ab"]]), TokenRows(Letters(), "pad", 8), 2, 0)))
    assert batch.input_ids.shape == batch.labels.shape == (2, 8)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert (batch.tokens, batch.label_tokens) == (8, 6)
    assert np.asarray(batch.labels)[batch.labels >= 0].size == 6


# -- several processes, and reading ahead ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_processes_share_the_rows_of_one(layout: str) -> None:
    """Put together, their rows are those of one process; where a document is a row, nobody tokenizes another's."""
    documents = ["".join("abcdefgh"[(i * j) % 8] for j in range(i % 23)) for i in range(60)] + [" \n", "  "]

    class Counting(Letters):
        asked = 0

        def encode(self, texts: list[str], first: int | None = None) -> list[Ids]:
            Counting.asked += len(texts)
            return super().encode(texts)

    def batches(rank: int, size: int) -> tuple[list[Batch], int]:
        Counting.asked = 0
        data = TrainingData(Lists([documents]), TokenRows(Counting(), layout, 6), 12, 3, rank=rank, size=size)
        return list(islice(data, 4)), Counting.asked

    whole, asked = batches(0, 1)
    parts = [batches(rank, 4) for rank in range(4)]
    for i, batch in enumerate(whole):
        of_all = [found[i] for found, _ in parts]
        assert torch.equal(torch.cat([part.input_ids for part in of_all]), batch.input_ids)
        assert torch.equal(torch.cat([part.labels for part in of_all]), batch.labels)
        assert sum(part.tokens for part in of_all) == batch.tokens
        assert {part.fingerprint for part in of_all} == {of_all[0].fingerprint}
        assert of_all[0].state == batch.state
    assert sum(count for _, count in parts) <= asked + 4 if layout == "pad" else parts[0][1] == asked


def test_what_is_read_ahead_comes_in_order_and_so_does_an_error() -> None:
    def batches() -> Iterator[Batch]:
        for i in range(5):
            ids = torch.full((2, 4), i)
            yield Batch(ids, ids, 8, {"taken": i})
        raise InputError("line 7 cannot be read")

    found = read_ahead(batches(), pin=False)
    assert [next(found).state["taken"] for _ in range(5)] == list(range(5))
    with pytest.raises(InputError, match="line 7"):
        next(found)


def test_what_is_read_ahead_may_end() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    assert len(list(read_ahead([Batch(ids, ids, 8, {})] * 3, pin=False))) == 3


def test_reading_ahead_is_bounded_and_ends_with_its_reader() -> None:
    read = []

    def batches() -> Iterator[Batch]:
        for i in count():
            read.append(i)
            ids = torch.zeros(2, 1 << 17, dtype=torch.int64)
            yield Batch(ids, ids, 8, {"taken": i})

    before = threading.active_count()
    found = read_ahead(batches(), pin=False)
    next(found)
    time.sleep(0.5)
    assert len(read) <= 4  # one taken, two waiting, one in the hand
    found.close()
    assert threading.active_count() == before
