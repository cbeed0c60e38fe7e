"""The documents of one local file: lines of JSON, parquet or plain text, compressed or not.

A position is a number of lines, rows or passages, so reading goes on anywhere; what is no document has a position too.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

_PASSAGE = 1000  # characters after which a .txt document may end


@dataclass(frozen=True)
class Flaw:
    """Stands where a document was expected, as in ``line 7 is not JSON (…)``, or so many ``documents``; ``is_end``:
    nothing more of the file can be read."""

    what: str
    is_end: bool = False
    documents: int = 1


Found = Iterator[tuple[int, str | Flaw]]


def read(path: Path, start: int) -> Found:
    """The documents of a file from position ``start`` on, each with the position after it. OSError where the system
    cannot read it, which may pass."""
    return _READERS[kind_of(path)](path, start)


def is_known(path: Path) -> bool:
    """Whether there is a reader for such a file."""
    return kind_of(path) in _READERS


def kind_of(path: Path) -> str:
    """The suffix that says how a file is laid out, whatever compresses it."""
    suffixes = [s for s in path.suffixes if s not in _OPENERS]
    return suffixes[-1] if suffixes else ""


def is_text(value: object) -> bool:
    """Whether ``value`` is a string that can be written as UTF-8: JSON may hold half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _open_zst(path: Path) -> BinaryIO:
    import pyarrow

    stream: BinaryIO = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return stream


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


class _BrokenError(Exception):
    """A file that cannot be read on."""


def _lines(path: Path) -> Iterator[bytes]:
    """All lines that stand before what cannot be read (of zst, but the last 64 KiB): ``read1`` gives out what was
    decompressed before it fails."""
    opener, number = _OPENERS.get(path.suffix), 0
    unfinished: list[bytes] = []
    try:
        with opener(path) if opener else path.open("rb") as stream:
            while part := stream.read1(1 << 16):
                *lines, last = part.split(b"\n")
                for line in lines:
                    unfinished.append(line)
                    number += 1
                    yield b"".join(unfinished) + b"\n"
                    unfinished.clear()
                unfinished.append(last)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not a decoder's
            raise
        raise _BrokenError(f"cannot be read after line {number} ({error})") from error
    if any(unfinished):
        yield b"".join(unfinished)


def _read_jsonl(path: Path, start: int) -> Found:
    number = start
    try:
        for number, line in enumerate(islice(_lines(path), start, None), start + 1):
            if line.strip():
                yield number, _text_of(line, number)
    except _BrokenError as error:
        yield number, Flaw(str(error), is_end=True)


def _text_of(line: bytes, number: int) -> str | Flaw:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Flaw(f"line {number} is not JSON ({error}); one object a line is expected")
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        return Flaw(f'line {number} has no string under "text"; each line is {{"text": "…"}}')
    return text if is_text(text) else Flaw(f"line {number} has half a surrogate pair, which is no character")


def _read_parquet(path: Path, start: int) -> Found:
    import pyarrow.parquet

    unreadable = (OSError, ValueError, pyarrow.ArrowException)

    def flaw(error: Exception, what: str, **kinds: Any) -> Flaw:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):  # no fault of the file
            raise error
        return Flaw(f"{what} ({error})", **kinds)

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if "text" not in names:
            raise ValueError(f'it has no column "text"; its columns: {", ".join(names)}')
    except unreadable as error:
        yield start, flaw(error, "cannot be read as parquet", is_end=True)
        return
    position = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if position + rows > start:
            try:
                texts = file.read_row_group(group, columns=["text"]).column(0)[max(0, start - position) :]
            except unreadable as error:
                what = f"rows {position + 1} to {position + rows} cannot be read"
                yield position + rows, flaw(error, what, documents=rows)
            else:
                for row, text in enumerate(texts, max(position, start) + 1):
                    yield row, _text_of_row(text, row)
        position += rows


def _text_of_row(scalar: Any, row: int) -> str | Flaw:
    try:
        text = scalar.as_py()
    except UnicodeDecodeError as error:
        return Flaw(f"row {row} is not UTF-8 ({error.reason} at byte {error.start})")
    return text if isinstance(text, str) else Flaw(f"row {row} has no text ({text!r})")


def _read_txt(path: Path, start: int) -> Found:
    """Passages: lines gathered to 1000 characters and ended by a blank line, or by any line past four times that."""
    passage: list[str] = []
    number, length = 0, 0
    try:
        for i, line in enumerate(_lines(path), 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                if number >= start:
                    yield number, Flaw(f"line {i} is not UTF-8 ({error.reason} at byte {error.start})")
                continue
            passage.append(text)
            length += len(text)
            if (length >= _PASSAGE and not text.strip()) or length >= 4 * _PASSAGE:
                number += 1
                if number > start:
                    yield number, "".join(passage).strip()
                passage, length = [], 0
    except _BrokenError as error:
        yield number, Flaw(str(error), is_end=True)
    if number >= start and "".join(passage).strip():
        yield number + 1, "".join(passage).strip()


_READERS: dict[str, Callable[[Path, int], Found]] = {
    ".json": _read_jsonl,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
