"""The rows of one file with named columns: parquet, lines of JSON, or values separated by commas or tabs.

Such files are small and labelled, unlike those of `galore_pretrain.text.readers`: one is read whole, and nothing of it
is passed over.
"""

import csv
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from galore_pretrain.errors import InputError
from galore_pretrain.text import readers
from galore_pretrain.text.hub import first_line

KINDS = ".parquet, .jsonl, .json, .csv or .tsv"
_BLANK: tuple[list[str], ...] = ([], [""])  # what the lines of .csv and of .tsv are then
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
# A cell in quotes with a quote in it, as programs write it that put cells of .tsv in quotes.
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')

Rows = Iterator[tuple[str, tuple[Any, ...]]]
"""Rows, each with its place in the file, as in ``row 7``."""


def is_table(path: Path) -> bool:
    """Return whether there is a reader for such a file."""
    return readers.kind_of(path) in _READERS


def read_rows(path: Path, columns: Sequence[str], name: str) -> Rows:
    """Yield each row's place and its values in the order of ``columns``; those of a .csv or .tsv are strings.

    ``name`` is what messages call the file. Raises InputError where it cannot be read, or has not all of the columns.
    """
    reader = _READERS[readers.kind_of(path)]
    return reader(path, columns, name)


def _read_parquet(path: Path, columns: Sequence[str], name: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    unreadable = (OSError, ValueError, pyarrow.ArrowException)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except unreadable as error:
        raise InputError(f"{name}: cannot be read as parquet ({first_line(error)})") from error
    _check_columns(columns, names, name)
    try:
        table = file.read(columns=list(columns))
        values = [table.column(column).to_pylist() for column in columns]
    except unreadable as error:
        raise InputError(f"{name}: cannot be read as parquet ({first_line(error)})") from error
    for number, row in enumerate(zip(*values, strict=True), 1):
        yield f"row {number}", row


def _read_jsonl(path: Path, columns: Sequence[str], name: str) -> Rows:
    for number, line in enumerate(_content(path, name).split("\n"), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name}: {place} is not JSON ({error}); one object a line is expected") from error
        if not isinstance(row, dict):
            raise InputError(f"{name}: {place} is no object; jq -c '.[]' makes lines of a JSON array")
        _check_columns(columns, list(row), f"{name}: {place}")
        yield place, tuple(row[column] for column in columns)


def _read_csv(path: Path, columns: Sequence[str], name: str) -> Rows:
    """Yield the rows of values separated by commas, which may stand in quotes and hold line ends there."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(_content(path, name), newline=""), strict=True)
    try:
        yield from _by_header(rows, columns, name)
    except csv.Error as error:
        raise InputError(f"{name}: cannot be read after line {rows.line_num} ({error})") from error


def _read_tsv(path: Path, columns: Sequence[str], name: str) -> Rows:
    """Yield the rows of values separated by tabs, in which quotes are characters as any other, as in GLUE's own."""
    lines = _content(path, name).removesuffix("\n").split("\n")
    for place, row in _by_header((line.removesuffix("\r").split("\t") for line in lines), columns, name):
        for value in row:
            if _QUOTED.fullmatch(value):
                raise InputError(
                    f"{name}: {place} has a cell in quotes, which in .tsv are part of the text; write it as .csv"
                )
        yield place, row


def _by_header(rows: Iterator[list[str]], columns: Sequence[str], name: str) -> Rows:
    """Yield the rows below the first one, which names the columns. Blank lines are passed over."""
    header = next(rows, [])
    if header in _BLANK:  # an empty file, which has no rows
        return
    _check_columns(columns, header, name)
    indices = [header.index(column) for column in columns]
    for number, row in enumerate(rows, 1):
        if row in _BLANK:
            continue
        if len(row) != len(header):
            raise InputError(f"{name}: row {number} has {len(row)} cells, and the first line names {len(header)}")
        yield f"row {number}", tuple(row[i] for i in indices)


def _content(path: Path, name: str) -> str:
    """Return a file's whole text, decompressed. Raises InputError where it cannot be read, or is not UTF-8."""
    try:
        with readers.open_decompressed(path) as stream:
            content: bytes = stream.read()
        return content.decode("utf-8-sig")
    except _UNREADABLE as error:
        raise InputError(f"{name}: cannot be read ({first_line(error)})") from error


def _check_columns(columns: Sequence[str], names: Sequence[str], where: str) -> None:
    """Raise InputError where a column is missing."""
    for column in columns:
        if column not in names:
            raise InputError(
                f'{where}: has no column "{column}"; its columns: {readers.listed(names)}; rename one of them'
            )


_READERS: dict[str, Callable[[Path, Sequence[str], str], Rows]] = {
    ".parquet": _read_parquet,
    ".pq": _read_parquet,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
