"""Text to batches: shuffled documents → token rows → batches, each stage resumable from a few integers.

`Documents` walks a source's shards in a seeded order and shuffles blocks of documents; `TokenRows` tokenizes them and
lays them out in rows; `TrainingData` stacks rows. The position after a row travels with it, so whatever is read
ahead, a checkpoint holds the position of what was trained on.
"""

import contextlib
import logging
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from queue import Full, Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galore_pretrain.errors import InputError
from galore_pretrain.text.sources import NOTHING_READ, DocumentSource, Tally
from galore_pretrain.text.tokenizer import Ids, Tokenizer

IGNORE = -100
BLOCK = 4096
"""Documents that are shuffled among themselves; a resumed run reads the block it stopped in again."""
_TOKENIZE = 256  # documents a call to the tokenizer
_AHEAD = 1 << 18  # tokens that are read before they are needed: those of a few calls to the tokenizer
_EMPTY = 100_000  # documents in a row without a token, after which the data are refused rather than read for ever

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Says where the next document stands: ``taken`` documents into the block that starts at ``document`` of a shard.

    ``shard`` counts in the order of the epoch. ``offset`` counts tokens already used of the document, by ``pack``.
    ``tally`` is of what was read before the block.
    """

    epoch: int = 0
    shard: int = 0
    document: int = 0
    taken: int = 0
    offset: int = 0
    tally: Tally = NOTHING_READ

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Position":
        """The inverse of `state_dict`."""
        tally = {**state["tally"], "broken": tuple(state["tally"]["broken"])}
        return cls(**{**state, "tally": Tally(**tally)})


class Documents:
    """An endless sequence of shuffled documents: shards in a new order each epoch, documents shuffled within blocks."""

    def __init__(self, source: DocumentSource, seed: int, start: Position) -> None:
        self._source, self._seed, self._start = source, seed, start

    def __iter__(self) -> Iterator[tuple[Position, str, Position]]:
        """(position of the document, its text, position after it)"""
        start, bad_data = self._start, self._source.bad_data
        epoch, shard, document, taken = start.epoch, start.shard, start.document, start.taken
        bad_data.go_on(start.tally)
        tally = start.tally
        while True:
            found = (shard, document) != (0, 0)
            for block, first, after in self._blocks(epoch, shard, document):
                found = True
                order = np.random.default_rng([self._seed, epoch, *first]).permutation(len(block))
                before, tally = tally, bad_data.tally
                here, following = Position(epoch, *first, taken, 0, before), Position(epoch, *after, 0, 0, tally)
                for i in range(taken, len(block)):
                    there = Position(epoch, *first, i + 1, 0, before) if i + 1 < len(block) else following
                    yield here, block[order[i]], there
                    here = there
                taken = 0
            if not found:
                raise InputError(
                    f"--data: no document in {len(self._source.shards)} files, the first {self._source.shards[0]}"
                )
            epoch, shard, document = epoch + 1, 0, 0
            if epoch & (epoch - 1) == 0:  # 1, 2, 4, …: said a few times, however short the text
                log.info("the end of the data is read for time %d: from here on they repeat", epoch)

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
    """One row of token ids and the labels that follow them; ``real`` ids are not padding. ``after`` and ``offset``: the
    document that comes next, and how many tokens of it were used. ``check``: of its text, where rows are shared out."""

    input_ids: Ids
    labels: Ids
    real: int
    after: Position
    offset: int = 0
    check: int | None = None


@dataclass(frozen=True)
class Share:
    """Rows ``first:stop`` of every ``of``: what one of several processes takes of an update's."""

    first: int = 0
    stop: int = 1
    of: int = 1

    def __contains__(self, number: int) -> bool:
        return self.first <= number % self.of < self.stop


ALL = Share()
_Tokenized = list[tuple[Position, Ids]]


class TokenRows:
    """Documents as rows of ``max_length`` tokens.

    ``pad``: one document a row, cut to ``max_length`` with its end marker, the rest padding without labels (the
    paper's). ``pack``: documents joined by end markers and cut into full rows; each token is predicted exactly once.
    """

    def __init__(self, tokenizer: Tokenizer, layout: str, max_length: int) -> None:
        self._tokenizer, self._layout, self._max_length = tokenizer, layout, max_length

    def __call__(self, documents: Iterable[tuple[Position, str, Position]], share: Share = ALL) -> Iterator[Row]:
        """All rows, of which those outside of ``share`` may be empty: nobody has to tokenize what another does."""
        groups = _in_groups(iter(documents), _TOKENIZE)
        return self._pad(groups, share) if self._layout == "pad" else self._pack(self._tokenize(groups))

    def _tokenize(self, groups: Iterable[list[tuple[Position, str, Position]]]) -> Iterator[_Tokenized]:
        empty = 0
        for group in groups:
            ids = self._tokenizer.encode([text for _, text, _ in group])
            yield [(here, tokens) for (here, _, _), tokens in zip(group, ids, strict=True) if len(tokens)]
            empty = _still_empty(empty, len(group), ids)

    def _pad(self, groups: Iterable[list[tuple[Position, str, Position]]], share: Share) -> Iterator[Row]:
        """A document of white space alone is no row."""
        length, eos, number, empty = self._max_length, self._tokenizer.eos_id, 0, 0
        for group in groups:
            kept = [(text, after) for _, text, after in group if text and not text.isspace()]
            ids = self._tokenizer.encode([text for i, (text, _) in enumerate(kept, number) if i in share], length - 1)
            input_ids = np.full((len(ids), length), eos, np.int32)  # any id: nothing attends to padding
            labels = np.full((len(ids), length), IGNORE, np.int32)
            own = 0
            for i, (text, after) in enumerate(kept, number):
                check = None if share is ALL else zlib.crc32(text.encode())
                if i not in share:
                    yield Row(_NOTHING, _NOTHING, 0, after, check=check)
                    continue
                real = min(len(ids[own]), length - 1)
                input_ids[own, :real] = ids[own][:real]
                labels[own, :real] = input_ids[own, 1 : real + 1]
                yield Row(input_ids[own], labels[own], real + 1, after, check=check)
                own += 1
            number += len(kept)
            empty = _still_empty(empty, len(group), ids or kept)

    def _pack(self, groups: Iterable[_Tokenized]) -> Iterator[Row]:
        length, end = self._max_length, np.array([self._tokenizer.eos_id], np.int32)
        held = _NOTHING
        begins: list[int] = []  # where in held the first token of each document is, or would be
        places: list[Position] = []
        for group in groups:
            parts, size = [held], len(held)
            for here, tokens in group:
                begins.append(size - here.offset)
                places.append(here)
                parts += (tokens[here.offset :], end)
                size += len(tokens) - here.offset + 1
            held, used, document = np.concatenate(parts), 0, 0
            while len(held) - used > length:
                row = held[used : used + length + 1]
                used += length
                document = bisect_right(begins, used, document) - 1
                yield Row(row[:-1], row[1:], length, places[document], used - begins[document])
            held = held[used:]
            begins, places = [begin - used for begin in begins[document:]], places[document:]


_NOTHING = np.empty(0, np.int32)


def _in_groups(documents: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(islice(documents, size)):
        yield group


def _still_empty(count: int, more: int, found: Sequence[Sized]) -> int:
    """Documents in a row without a token, after so many ``more`` with what was ``found`` in them; InputError where they
    are too many."""
    count = 0 if any(map(len, found)) else count + more
    if count > _EMPTY:
        raise InputError(f"--data: {count} documents in a row hold no token at all")
    return count


@dataclass(frozen=True)
class Batch:
    """A process's rows of one update: ``input_ids`` and ``labels`` (sequences × length, int64), in which ``tokens`` are
    not padding; and the position after the rows of all."""

    input_ids: Tensor
    labels: Tensor
    tokens: int
    state: dict[str, Any]
    check: int = 0

    def pinned(self) -> "Batch":
        """Return the batch in page-locked memory."""
        return replace(self, input_ids=self.input_ids.pin_memory(), labels=self.labels.pin_memory())

    @property
    def fingerprint(self) -> str:
        """Alike in processes that read the same text."""
        return f"{self.state} {self.check}"

    @property
    def label_tokens(self) -> int:
        """Labels that are counted by the loss."""
        return int((self.labels != IGNORE).sum())


def read_ahead(batches: Iterable[Batch], *, pin: bool) -> Generator[Batch, None, None]:
    """``batches``, read by a thread before they are asked for: as many as make up `_AHEAD` tokens, and two at least.

    Tokenizing and decompressing leave the interpreter to others meanwhile. What goes wrong is raised where the batch
    would have come. With ``pin``, tensors are where a GPU can copy them from while it computes.
    """
    ready: Queue[Batch | BaseException | None] = Queue(2)  # None: there are no more
    is_over = threading.Event()

    def put(found: Batch | BaseException | None) -> None:
        while not is_over.is_set():
            with contextlib.suppress(Full):
                ready.put(found, timeout=0.2)
                break

    def read() -> None:
        try:
            for batch in batches:
                ready.maxsize = max(2, _AHEAD // batch.input_ids.numel())
                put(batch.pinned() if pin else batch)
                if is_over.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, daemon=True)  # it may wait for a hub that is away
    thread.start()
    try:
        while (found := ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        is_over.set()
        thread.join(timeout=1)


class TrainingData:
    """An endless iterable of shuffled batches, starting at ``state`` if one was loaded. Process ``rank`` of ``size``
    gets its part of an update's rows."""

    def __init__(
        self, source: DocumentSource, rows: TokenRows, sequences: int, seed: int, rank: int = 0, size: int = 1
    ) -> None:
        self._source, self._rows, self._sequences, self._seed = source, rows, sequences, seed
        own = sequences // size
        self._share = Share(rank * own, (rank + 1) * own, sequences) if size > 1 else ALL
        self._start = Position()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that carried ``state``."""
        self._start = Position.of(state)

    def __iter__(self) -> Iterator[Batch]:
        documents = _with_offset(Documents(self._source, self._seed, self._start), self._start.offset)
        rows = self._rows(documents, self._share)
        if self._start != Position():
            started = time.monotonic()
            rows = chain([next(rows)], rows)
            log.info("the place in the text was found again in %.1f s", time.monotonic() - started)
        while True:
            yield stack(list(islice(rows, self._sequences)), self._share)


def _with_offset(
    documents: Iterable[tuple[Position, str, Position]], offset: int
) -> Iterator[tuple[Position, str, Position]]:
    """Tell the first document how much of it was used before the run stopped."""
    for here, text, after in documents:
        yield (replace(here, offset=offset) if offset else here), text, after
        offset = 0


def stack(rows: Sequence[Row], share: Share = ALL) -> Batch:
    """Rows as one batch of tensors, of those in ``share``."""
    own = [row for number, row in enumerate(rows) if number in share]
    check = 0
    for row in rows if share is not ALL else ():
        known = row.input_ids.tobytes() if row.check is None else row.check.to_bytes(4, "little")
        check = zlib.crc32(known, check)
    return Batch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in own]).astype(np.int64)),
        labels=torch.from_numpy(np.stack([row.labels for row in own]).astype(np.int64)),
        tokens=sum(row.real for row in own),
        state=replace(rows[-1].after, offset=rows[-1].offset).state_dict(),
        check=check,
    )


def validation_rows(source: DocumentSource, rows: TokenRows, tokens: int) -> list[Row]:
    """The first rows of the source, in its own order, until they hold ``tokens`` real tokens or there are no more."""

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
