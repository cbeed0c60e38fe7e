"""The documents of one local file: lines of JSON, parquet or plain text, compressed or not.

A document is the text under a key, or what a `Record` makes of a whole object. A position is a number of lines, rows or
passages, so reading goes on anywhere; what is no document has a position too.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

TEXT_KEY = "text"
"""The key or the column of a document's text where no other is named."""
_PASSAGE = 1000  # characters after which a .txt document may end
_LONGEST_PASSAGE = 4 * _PASSAGE  # characters that it holds at most
WHOLE_LINES, CUT_LINES = 1, 2
"""Rules by which plain text is cut into passages: lines are kept whole, however long; or no passage is too long."""
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)]*\s+|[。！？\r]")  # old Macs end lines with \r alone
_FROM_LATIN_1 = "if it is Latin-1, iconv -f ISO-8859-1 -t UTF-8 converts it"
_OTHER_KEY = "name one with --text-key, which counts for all files, or rename it here"
_NAMED = 20  # keys or columns that an error names at most
_NAME_LENGTH = 40  # characters that it shows of each
_PART = 1 << 16  # bytes of decompressed text that are read at a time


@dataclass(frozen=True)
class Flaw:
    """Stands where a document was expected, as in ``line 7 is not JSON (…)``, or where so many ``documents`` were.

    ``is_end``: nothing more of the file can be read. ``way_out``: what to do about it, where that is known.
    """

    what: str
    is_end: bool = False
    documents: int = 1
    way_out: str = ""

    def __str__(self) -> str:
        if self.way_out:
            return f"{self.what}; {self.way_out}"
        return self.what


Entries = Iterator[tuple[int, str | Flaw]]
"""Documents and flaws, each with the position after it."""
Record = Callable[[object], str | Flaw]
"""Makes the text of a whole object or row, or says what is wrong with it in words that may follow ``line 7``."""


def read(path: Path, start: int, key: str | Record = TEXT_KEY, passages: int = CUT_LINES) -> Entries:
    """Yield the documents of a file from position ``start`` on, each with the position after it.

    ``key`` is the key or the column of the text, or makes it of the whole object or row. A ``.txt`` has none, and is
    cut by the rule ``passages``. Raises OSError where the system cannot read the file, which may pass.
    """
    kind = kind_of(path)
    if kind == ".txt":
        if not isinstance(key, str):
            return iter([(start, Flaw("is plain text, which has no keys", is_end=True, way_out="leave it out"))])
        return _read_txt(path, start, passages)
    reader = _READERS[kind]
    return reader(path, start, key)


def is_known(path: str | Path) -> bool:
    """Return whether there is a reader for such a file."""
    kind = kind_of(path)
    return kind == ".txt" or kind in _READERS


def kind_of(path: str | Path) -> str:
    """Return the suffix, in lower case, that says how a file is laid out, whatever compresses it; or ''."""
    _, suffix = os.path.splitext(without_compression(path))
    return suffix.lower()


def without_compression(path: str | Path) -> str:
    """Return the path without the suffix of what compresses the file: that of the same text uncompressed."""
    # Of strings, as there may be a million files: a Path takes ten times as long.
    text = os.fspath(path)
    stem, suffix = os.path.splitext(text)
    while suffix.lower() in _OPENERS:
        text = stem
        stem, suffix = os.path.splitext(text)
    return text


def is_text(value: object) -> bool:
    """Return whether ``value`` is a string that can be written as UTF-8: JSON may hold half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_of(document: object, where: str, record: Record) -> str | Flaw:
    """Return the text that ``record`` makes of an object or a row, or a flaw that says ``where`` it is."""
    text = record(document)
    if isinstance(text, Flaw):
        return replace(text, what=f"{where} {text.what}")
    return text


# -- bytes ------------------------------------------------------------------------------------------------------------


def _open_zst(path: Path) -> BinaryIO:
    """Open a file of Zstandard, which Python's library cannot read."""
    import pyarrow

    file = pyarrow.OSFile(str(path))
    stream: BinaryIO = pyarrow.CompressedInputStream(file, "zstd")
    return stream


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
    ".zstd": _open_zst,
}


def open_decompressed(path: Path) -> Any:
    """Open a file for reading the bytes that it holds once decompressed."""
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        return path.open("rb")
    return opener(path)


class _BrokenError(Exception):
    """A file that cannot be read on, as its ``flaw`` says."""

    def __init__(self, what: str, way_out: str = "") -> None:
        super().__init__(what)
        self.flaw = Flaw(what, is_end=True, way_out=way_out)


def _is_fault_of_file(error: Exception) -> bool:
    """Return whether an error says that a file is damaged, rather than that the system failed or memory ran out."""
    if isinstance(error, MemoryError):
        return False
    # Decoders raise OSError as well, but without one of the system's numbers.
    is_of_system = isinstance(error, OSError) and bool(error.errno)
    return not is_of_system


def _lines(path: Path) -> Iterator[bytes]:
    """Yield all lines, each with its end, that stand before what cannot be read; _BrokenError says where that is."""
    for number, line in enumerate(_lines_of_bytes(path), 1):
        # Of UTF-16, only the line of the mark is no UTF-8: the others would be text, with a NUL behind each letter.
        if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise _BrokenError("is UTF-16", "convert it, as with iconv -f UTF-16 -t UTF-8")
        yield line


def _lines_of_bytes(path: Path) -> Iterator[bytes]:
    """Yield all lines, in whatever encoding, as `_lines` does."""
    # `read1` gives out what was decompressed before the decoder fails, all but the last 64 KiB of zst. `readline` would
    # lose what stands in its buffer.
    number = 0
    unfinished: list[bytes] = []  # parts of a line whose end was not read yet
    try:
        with open_decompressed(path) as stream:
            while part := stream.read1(_PART):
                *ends, rest = part.split(b"\n")
                for end in ends:
                    unfinished.append(end)
                    number += 1
                    yield b"".join(unfinished) + b"\n"
                    unfinished.clear()
                unfinished.append(rest)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if not _is_fault_of_file(error):
            raise
        raise _BrokenError(f"cannot be read after line {number} ({error})") from error
    last = b"".join(unfinished)
    if last:
        yield last


# -- kinds of files ---------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, start: int, key: str | Record) -> Entries:
    """Yield the text of each line's object; a position is a number of lines, blank ones included."""
    number = start
    lines = islice(_lines(path), start, None)
    try:
        for number, line in enumerate(lines, start + 1):
            if line.strip():
                yield number, _text_of_line(line, number, key)
    except _BrokenError as error:
        yield number, error.flaw


def _text_of_line(line: bytes, number: int, key: str | Record) -> str | Flaw:
    """Return the string under ``key`` of a line of JSON, or what it makes of the line."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        way_out = "one object a line is expected"
        if line.strip() in (b"[", b"{"):
            way_out += ", as jq -c '.[]' makes them of a JSON array, and jq -c . of indented objects"
        if isinstance(error, UnicodeDecodeError) and error.encoding == "utf-8":
            way_out = _FROM_LATIN_1
        return Flaw(f"line {number} is not JSON ({error})", way_out=way_out)
    if not isinstance(key, str):
        return text_of(document, f"line {number}", key)
    text = None
    if isinstance(document, dict):
        text = document.get(key)
    if not isinstance(text, str):
        way_out = f'each line is {{"{key}": "…"}}'
        if isinstance(document, list):
            way_out += "; jq -c '.[]' makes them of a JSON array"
        if isinstance(document, dict):
            way_out += f"; its keys: {listed(document)}"
            if key not in document:
                way_out += f"; {_OTHER_KEY}, as with jq -c '{{\"{key}\": .KEY}}'"
        return Flaw(f'line {number} has no string under "{key}"', way_out=way_out)
    if not is_text(text):
        return Flaw(f"line {number} has half a surrogate pair, which is no character")
    return text


def _read_csv(path: Path, start: int, key: str | Record) -> Entries:
    """Yield the texts of the column ``key`` of a file of comma-separated values, or what it makes of rows.

    A position is a number of rows.
    """
    # A field in quotes may hold line ends, so rows can only be counted from the file's beginning. Bytes that are no
    # UTF-8 become half surrogate pairs on the way through the parser, which show in the text of their own row alone. A
    # quote that is never closed would take the rest of the file into one field; `strict` makes that an error.
    csv.field_size_limit(2**31 - 1)  # by default a document of 128 KiB would be an error
    number = 0
    rows = csv.reader(_lines_of_csv(path), strict=True)
    try:
        header = next((row for row in rows if row), None)
        if header is None:
            return
        if isinstance(key, str) and key not in header:
            what, way_out = _no_column(key, header)
            yield start, Flaw(what, is_end=True, way_out=way_out)
            return
        for number, row in enumerate(rows, 1):
            if number <= start or not row:
                continue
            if isinstance(key, str):
                yield number, _text_of_cell(row, header.index(key), number)
            else:
                yield number, text_of(dict(zip(header, row, strict=False)), f"row {number}", key)
    except csv.Error as error:
        yield number, Flaw(f"cannot be read after row {number} ({_explained(error)})", is_end=True)
    except _BrokenError as error:
        yield number, error.flaw


def _lines_of_csv(path: Path) -> Iterator[str]:
    """Yield the lines of a file of comma-separated values, without a byte order mark."""
    for number, line in enumerate(_lines(path), 1):
        encoding = "utf-8"
        if number == 1:
            encoding = "utf-8-sig"
        yield line.decode(encoding, "surrogateescape")


def _explained(error: csv.Error) -> str:
    """Return what an error of the csv module means for a file; its own words are for programmers."""
    told = str(error)
    if "new-line character" in told:
        return "its line ends are \\r alone; convert them, as with tr '\\r' '\\n'"
    if "unexpected end of data" in told:
        return 'a quote " is opened there and never closed'
    return told


def _text_of_cell(row: list[str], column: int, number: int) -> str | Flaw:
    """Return the string in one column of a row."""
    if len(row) <= column:
        return Flaw(f"row {number} has no cell in the column of the text")
    if not is_text(row[column]):
        return Flaw(f"row {number} is not UTF-8", way_out=_FROM_LATIN_1)
    return row[column]


def _no_column(key: str, columns: list[str]) -> tuple[str, str]:
    """Return what is wrong with a file without the column of the text, and the way out."""
    return f'has no column "{key}"', f"its columns: {listed(columns)}; {_OTHER_KEY}"


def listed(names: Collection[str]) -> str:
    """Return keys or columns for a message: the first few, each shortened, since they may be text of any length."""
    shown = [_shortened(name) for name in islice(names, _NAMED)]
    more = len(names) - len(shown)
    if more:
        shown.append(f"and {more} more")
    return ", ".join(shown)


def _shortened(name: str) -> str:
    """Return a name as Python writes it, or its beginning."""
    if len(name) > _NAME_LENGTH:
        name = name[:_NAME_LENGTH] + "…"
    return repr(name)


def _read_parquet(path: Path, start: int, key: str | Record) -> Entries:
    """Yield the texts of the column ``key``, or what it makes of rows; a position is a number of rows."""
    # Rows are decoded a row group at a time, so one that cannot be decoded takes all rows of its group with it. Groups
    # that end before `start` are passed over by their number of rows, which stands in the file's footer.
    import pyarrow.parquet

    unreadable = (OSError, ValueError, pyarrow.ArrowException)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except unreadable as error:
        if not _is_fault_of_file(error):
            raise
        yield start, Flaw(f"cannot be read as parquet ({error})", is_end=True)
        return
    if isinstance(key, str) and key not in names:
        what, way_out = _no_column(key, names)
        yield start, Flaw(what, is_end=True, way_out=way_out)
        return
    group_end = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        group_start = group_end
        group_end += rows
        if group_end <= start:
            continue
        skipped = max(0, start - group_start)
        try:
            table = file.read_row_group(group, columns=[key] if isinstance(key, str) else None)
        except unreadable as error:
            if not _is_fault_of_file(error):
                raise
            what = f"rows {group_start + 1} to {group_end} cannot be read ({error})"
            yield group_end, Flaw(what, documents=rows)
            continue
        columns = [column[skipped:] for column in table.columns]
        for row, scalars in enumerate(zip(*columns, strict=True), group_start + skipped + 1):
            yield row, _text_of_row(dict(zip(table.column_names, scalars, strict=True)), row, key)


def _text_of_row(scalars: Mapping[str, Any], row: int, key: str | Record) -> str | Flaw:
    """Return the string that a row of scalars of pyarrow holds under ``key``, or what it makes of the row."""
    try:
        values = {name: scalar.as_py() for name, scalar in scalars.items()}
    except UnicodeDecodeError as error:
        return Flaw(f"row {row} is not UTF-8 ({error.reason} at byte {error.start})")
    if not isinstance(key, str):
        return text_of(values, f"row {row}", key)
    text = values[key]
    if not isinstance(text, str):
        return Flaw(f"row {row} has no text ({type(text).__name__}: {repr(text)[:40]})")
    return text


def _read_txt(path: Path, start: int, passages: int) -> Entries:
    """Yield passages of plain text, cut by the rule ``passages``; a position is a number of them."""
    # Where a passage ends depends on all lines before it, so the file is read from its beginning whatever the position.
    lines = _lines_of_text(path)
    if passages == CUT_LINES:
        cut = _in_passages(lines)
    else:
        cut = _in_passages_of_whole_lines(lines)
    number = 0  # of passages that have ended
    for passage in cut:
        if isinstance(passage, Flaw):
            if number >= start or passage.is_end:
                yield number, passage
        else:
            number += 1
            if number > start:
                yield number, passage


def _lines_of_text(path: Path) -> Iterator[str | Flaw]:
    """Yield the lines of plain text, each with its end, and what is wrong in place of those that are no UTF-8."""
    try:
        for number, line in enumerate(_lines(path), 1):
            encoding = "utf-8"
            if number == 1:
                encoding = "utf-8-sig"  # a byte order mark is no text
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError as error:
                what = f"line {number} is not UTF-8 ({error.reason} at byte {error.start})"
                yield Flaw(what, way_out=_FROM_LATIN_1)
                continue
            # UTF-16 without a byte order mark is valid UTF-8 too, where every other byte is NUL.
            if "\0" in text:
                way_out = "iconv -f UTF-16LE -t UTF-8 may convert it"
                yield Flaw(f"line {number} holds NUL characters", way_out=way_out)
            else:
                yield text
    except _BrokenError as error:
        yield error.flaw


# Lines are gathered until they hold 1000 characters and the last one is blank, so that a passage ends with a paragraph.
# Text without blank lines ends before the line that would make it longer than four times that. A line that is longer
# itself, such as a book without line ends, is cut at the ends of its sentences.
def _in_passages(lines: Iterable[str | Flaw]) -> Iterator[str | Flaw]:
    """Yield the passages that lines make, of `_LONGEST_PASSAGE` characters at most; flaws come through."""
    passage: list[str] = []
    length = 0
    for line in lines:
        if isinstance(line, Flaw):
            yield line
            continue
        for part in _in_parts(line):
            is_whole = length >= _PASSAGE and not part.strip()
            if is_whole or length + len(part) > _LONGEST_PASSAGE:
                yield from _joined(passage)
                passage = []
                length = 0
            passage.append(part)
            length += len(part)
    yield from _joined(passage)


# The rule of the first versions, which the embedded sample keeps: its runs go on, and their numbers stay as they were.
def _in_passages_of_whole_lines(lines: Iterable[str | Flaw]) -> Iterator[str | Flaw]:
    """Yield the passages that lines make, of which the last line may be of any length; flaws come through."""
    passage: list[str] = []
    length = 0
    for line in lines:
        if isinstance(line, Flaw):
            yield line
            continue
        passage.append(line)
        length += len(line)
        is_whole = length >= _PASSAGE and not line.strip()
        if is_whole or length >= _LONGEST_PASSAGE:
            yield from _joined(passage)
            passage = []
            length = 0
    yield from _joined(passage)


def _joined(passage: list[str]) -> Iterator[str]:
    """Yield the text that lines make together, unless it is white space alone."""
    text = "".join(passage).strip()
    if text:
        yield text


def _in_parts(line: str) -> Iterator[str]:
    """Yield a line whole, or in parts of about a passage's length where it is longer than one may be.

    A part ends behind the last sentence that fits, or else behind the last word, or else anywhere.
    """
    start = 0
    while len(line) - start > _LONGEST_PASSAGE:
        latest = start + _LONGEST_PASSAGE
        ends = [match.end() for match in _SENTENCE_END.finditer(line, start + _PASSAGE, latest)]
        if ends:
            stop = ends[-1]
        else:
            stop = line.rfind(" ", start + _PASSAGE, latest) + 1 or latest
        yield line[start:stop]
        start = stop
    yield line[start:]


_READERS: dict[str, Callable[[Path, int, str | Record], Entries]] = {
    ".json": _read_jsonl,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".pq": _read_parquet,
}
