"""Text to batches: shuffled documents → token rows → batches, each stage resumable from a few integers.

`Documents` walks a source's shards in a seeded order and shuffles blocks of documents. `TokenRows` tokenizes them and
lays them out in rows. `TrainingData` stacks rows. The position after a row travels with it, so a checkpoint holds the
position of what was trained on, whatever has been read ahead.
"""

import contextlib
import logging
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby, islice, pairwise
from operator import itemgetter
from queue import Full, Queue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from galore_pretrain.errors import InputError
from galore_pretrain.text.sources import NOTHING_READ, DocumentSource, Tally, in_turn
from galore_pretrain.text.tokenizer import Ids, Tokenizer

IGNORE = -100
"""The label of padding, which the loss leaves out."""
BLOCK = 4096
"""Documents, at most, that are shuffled among themselves; a resumed run reads the block it stopped in again."""
BLOCK_CHARACTERS = 1 << 24
"""Characters after which a block ends, however few its documents are: in memory they take one to four bytes each."""
_TOKENIZE = 256  # documents a call to the tokenizer, at most
_TOKENIZE_CHARACTERS = 1 << 21  # after which a call has enough of them; their ids take four bytes each, and more
_AHEAD = 1 << 18  # tokens that are read before they are needed: those of a few calls to the tokenizer
_EMPTY = 100_000  # documents in a row without a token, after which the data are refused rather than read for ever
_NO_IDS = np.empty(0, np.int32)

log = logging.getLogger(__name__)


# -- documents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """Says where the next document stands: ``taken`` documents into the block that starts at ``document`` of a shard.

    ``shard`` counts in the order of the epoch. ``offset`` of the document's tokens were used already, by ``pack``.
    ``tally`` counts what was read before the block. ``block_characters`` bounds the run's blocks, so that ``taken``
    counts in the same block whenever the run goes on; with None, documents alone bound them.
    """

    epoch: int = 0
    shard: int = 0
    document: int = 0
    taken: int = 0
    offset: int = 0
    tally: Tally = NOTHING_READ
    block_characters: int | None = field(default_factory=lambda: BLOCK_CHARACTERS)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in plain JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Position":
        """Return the position that `state_dict` was called on."""
        counts = dict(state["tally"])
        counts["broken"] = tuple(counts["broken"])  # a list where the state comes from JSON
        values = dict(state)
        values["tally"] = Tally(**counts)
        values.setdefault("block_characters", None)  # of a run that began before characters bounded its blocks
        return cls(**values)


_PlacedText = tuple[Position, str, Position]  # a document's position, its text, the position after it
_BlockStart = tuple[int, int]  # a shard's place in the order of the epoch, a document's in the shard


class Documents:
    """An endless sequence of shuffled documents: shards in a new order each epoch, documents shuffled within blocks.

    Iterating yields the position of a document, its text, and the position after it.
    """

    # All of the order follows from the seed, so that a position needs no generator's state. An epoch's shards are
    # permuted by (seed, epoch). Read in that order, their documents are cut into blocks of BLOCK documents, or of fewer
    # where these are long. A block may span several shards, and is permuted by (seed, epoch, where it starts). A
    # resumed run reads the block it stopped in from its start, and passes over those of the permuted documents that
    # were taken. Reading them counts them once more, which is why a position carries the tally from before its block.

    def __init__(self, source: DocumentSource, seed: int, start: Position) -> None:
        self._source = source
        self._seed = seed
        self._start = start

    def __iter__(self) -> Iterator[_PlacedText]:
        """Yield documents without end; InputError if there is none at all."""
        start = self._start
        epoch, shard, document, taken = start.epoch, start.shard, start.document, start.taken
        bad_data = self._source.bad_data
        bad_data.go_on(start.tally)
        tally = start.tally
        while True:
            bad_data.begin_epoch(epoch)
            is_empty = (shard, document) == (0, 0)  # elsewhere, documents were read before the run stopped
            for texts, block_start, next_start in self._blocks(epoch, shard, document):
                is_empty = False
                before = Position(epoch, *block_start, taken, tally=tally, block_characters=start.block_characters)
                tally = bad_data.tally
                after = Position(epoch, *next_start, tally=tally, block_characters=start.block_characters)
                yield from self._shuffled(texts, before, after)
                taken = 0
            if is_empty:
                shards = self._source.shards
                raise InputError(f"--data: no document in {len(shards)} files, the first {shards[0]}")
            epoch += 1
            shard = 0
            document = 0

    def _blocks(self, epoch: int, shard: int, document: int) -> Iterator[tuple[list[str], _BlockStart, _BlockStart]]:
        """Yield blocks of texts across the ends of shards, each with its own start and that of the next."""
        order = shard_order(self._source, self._seed, epoch)
        most_characters = self._start.block_characters
        texts: list[str] = []
        characters = 0
        block_start = (shard, document)
        for place in range(shard, len(order)):
            for position, text in self._source.read(order[place], document):
                texts.append(text)
                characters += len(text)
                is_long = most_characters is not None and characters >= most_characters
                if len(texts) == BLOCK or is_long:
                    next_start = (place, position)
                    yield texts, block_start, next_start
                    texts = []
                    characters = 0
                    block_start = next_start
            document = 0  # only the first shard is read from its middle
        if texts:
            yield texts, block_start, (len(order), 0)

    def _shuffled(self, texts: list[str], start: Position, next_block: Position) -> Iterator[_PlacedText]:
        """Yield a block's texts in shuffled order, from ``start`` on, each between its position and the next one's."""
        rng = np.random.default_rng([self._seed, start.epoch, start.shard, start.document])
        order = rng.permutation(len(texts))
        position = start
        for i in range(start.taken, len(texts)):
            after = replace(start, taken=i + 1)
            if after.taken == len(texts):
                after = next_block
            yield position, texts[order[i]], after
            position = after


def shard_order(source: DocumentSource, seed: int, epoch: int = 0) -> list[int]:
    """Return the shards of a source in the order in which an epoch reads them."""
    rng = np.random.default_rng([seed, epoch])
    order: list[int] = rng.permutation(len(source.shards)).tolist()
    return order


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of token ids and the label of each; ``real`` of the ids are not padding.

    ``label_bytes`` are the bytes, in UTF-8, of the text that the labels are of; None where nobody has counted them.
    ``after`` is the position of the document that comes next, of which ``offset`` tokens were used. ``check`` is a
    checksum of the row's text, where rows are shared out and a document is a row. ``starts`` has the places at which
    documents begin in the row, the first of them 0; None where documents are joined.
    """

    input_ids: Ids
    labels: Ids
    real: int
    after: Position
    offset: int = 0
    label_bytes: int | None = None
    check: int | None = None
    starts: Ids | None = None


@dataclass(frozen=True)
class Share:
    """Rows ``first:stop`` of every ``of`` rows: what one of several processes takes of each update's."""

    first: int = 0
    stop: int = 1
    of: int = 1

    def __contains__(self, number: int) -> bool:
        """Return whether row ``number``, counted from the first of the stream, is in the share."""
        return self.first <= number % self.of < self.stop


ALL = Share()
_Tokenized = list[tuple[Position, Ids]]


class Rows(Protocol):
    """Lays out documents in rows: `TokenRows` those of text, `chat.ChatRows` conversations."""

    @property
    def kept(self) -> int | None:
        """Return how many tokens of a document a row has room for; None where rows cut nothing away."""
        ...

    def __call__(self, documents: Iterable[_PlacedText], share: Share = ALL) -> Iterator[Row]:
        """Yield all rows. Those outside of ``share`` may be empty."""
        ...

    def counted(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Row]:
        """Return rows with their ``label_bytes``, as far as these can be counted in the texts of their documents."""
        ...


class TokenRows:
    """Documents as rows of ``max_length`` tokens.

    ``pad``: one document a row, cut to ``max_length`` with its end marker, the rest padding without labels (the
    paper's). ``pack``: documents joined by end markers and cut into full rows; each token is predicted exactly once.
    With ``separate``, packed rows say where their documents begin.
    """

    def __init__(self, tokenizer: Tokenizer, layout: str, max_length: int, *, separate: bool = False) -> None:
        self._tokenizer = tokenizer
        self._layout = layout
        self._max_length = max_length
        self._separate = separate

    @property
    def kept(self) -> int | None:
        """Return how many tokens of a document a row has room for; None where rows cut nothing away."""
        if self._layout == "pad":
            return self._max_length - 1
        return None

    def __call__(self, documents: Iterable[_PlacedText], share: Share = ALL) -> Iterator[Row]:
        """Yield all rows. Those outside of ``share`` may be empty: a process need not tokenize what another does."""
        groups = _in_groups(documents)
        if self._layout == "pad":
            return self._pad(groups, share)
        return self._pack(self._tokenize(groups))

    # A label is of the text of its token. So the first token of a text that is evaluated is of no label, and what `pad`
    # cuts away is of none; an end marker is a label of no byte. The text of a row's labels lies between two places
    # among the tokens of a document, or of two documents. These are tokenized again, to find how many bytes stand
    # before a place. Of documents that no place is in, all bytes count.
    def counted(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Row]:
        """Return rows with their ``label_bytes``.

        The rows are the first ones of ``texts``, which their positions count as documents.
        """
        if self._layout == "pad":
            return [self._counted_alone(row, texts[row.after.document - 1]) for row in rows]
        places = [(self._first_with_tokens(texts), 1)]  # (document, its tokens up to the first label) of each row
        for row in rows:
            places.append((row.after.document, row.offset + 1))
        starts: list[int] = []
        before = 0  # bytes of all documents before this one
        document = 0
        for number, of_one in groupby(places, key=itemgetter(0)):
            while document < number:
                before += self._bytes_of(texts[document])
                document += 1
            for found in self._bytes_before(texts[number], [tokens for _, tokens in of_one]):
                starts.append(before + found)
        counted: list[Row] = []
        for row, (start, stop) in zip(rows, pairwise(starts), strict=True):
            counted.append(replace(row, label_bytes=stop - start))
        return counted

    def _counted_alone(self, row: Row, text: str) -> Row:
        """Return the row of one document with its ``label_bytes``."""
        tokens = row.real - 1  # without the end marker
        if not tokens:
            return replace(row, label_bytes=0)
        start, stop = self._bytes_before(text, [1, tokens])
        return replace(row, label_bytes=stop - start)

    def _bytes_before(self, text: str, places: Sequence[int]) -> list[int]:
        """Return how many bytes the first so many tokens of a text write, for each of ``places``: all, if all do."""
        ends = self._tokenizer.byte_ends(text, max(places) + 1)
        found: list[int] = []
        for tokens in places:
            found.append(int(ends[tokens - 1]) if tokens < len(ends) else len(text.encode()))
        return found

    def _first_with_tokens(self, texts: Sequence[str]) -> int:
        """Return the number of the first document that has any token."""
        return next(number for number, text in enumerate(texts) if len(self._tokenizer.encode([text], 1)[0]))

    def _bytes_of(self, text: str) -> int:
        """Return the bytes of a document: none of white space without a token, which is no document."""
        if text.isspace() and not len(self._tokenizer.encode([text])[0]):
            return 0
        return len(text.encode())

    def _pad(self, groups: Iterable[list[_PlacedText]], share: Share) -> Iterator[Row]:
        """Yield one row a document; a document of white space alone is none."""
        # Every process reads and numbers all documents, so that all agree on a row's number and on the position after
        # it. It tokenizes its own share alone, and sends on the rows of others empty, with a checksum of their text:
        # by these, processes that read different files notice it.
        number = 0
        empty = 0
        for group in groups:
            documents = [(text, after) for _, text, after in group if text and not text.isspace()]
            texts = [text for text, _ in documents]
            own_texts = [text for i, text in enumerate(texts, number) if i in share]
            encoded = self._tokenizer.encode(own_texts, self.kept)
            own_ids = iter(encoded)
            for i, (text, after) in enumerate(documents, number):
                check = None
                if share is not ALL:
                    check = zlib.crc32(text.encode())
                if i in share:
                    yield self._padded(next(own_ids), after, check)
                else:
                    yield Row(_NO_IDS, _NO_IDS, 0, after, check=check)
            number += len(documents)
            # Where all of a group's rows are others', its texts have to do.
            empty = _count_empty(empty, len(group), encoded or texts)

    def _padded(self, ids: Ids, after: Position, check: int | None) -> Row:
        """Return a document's row: ids d₁ … dₙ, the end marker, padding, with labels d₂ … dₙ, the end marker, none."""
        length = self._max_length
        real = len(ids[: self.kept])
        # Any id may stand for padding, since nothing attends to it; this one is the document's end marker as well.
        input_ids = np.full(length, self._tokenizer.eos_id, np.int32)
        input_ids[:real] = ids[:real]
        labels = np.full(length, IGNORE, np.int32)
        labels[:real] = input_ids[1 : real + 1]
        return Row(input_ids, labels, real + 1, after, check=check)

    def _tokenize(self, groups: Iterable[list[_PlacedText]]) -> Iterator[_Tokenized]:
        """Yield the position and the token ids of each document that has any, group by group."""
        empty = 0
        for group in groups:
            encoded = self._tokenizer.encode([text for _, text, _ in group])
            tokenized: _Tokenized = []
            for (position, _, _), ids in zip(group, encoded, strict=True):
                if len(ids):
                    tokenized.append((position, ids))
            yield tokenized
            empty = _count_empty(empty, len(group), encoded)

    def _pack(self, groups: Iterable[_Tokenized]) -> Iterator[Row]:
        """Yield full rows, cut from the joined documents."""
        # The ids of all documents, each followed by an end marker, are one long stream. Row r has the ids
        # [rL, (r+1)L) of it, L = max_length, and as labels the ids one further on, so a row takes L + 1 ids and its
        # last one is the next row's first. `stream` holds the ids that no row has used yet. begins[i] is the place in
        # it of the first id of document positions[i], negative where earlier rows have used that. The position that
        # goes with a row is the document in which the next row begins, with the number of its ids used before.
        #
        # An end marker is its document's last id. What a row cuts off of a document begins the next row, as if it were
        # a document: a row's first document begins at 0, whether more of it went before or not.
        length = self._max_length
        end_marker = np.array([self._tokenizer.eos_id], np.int32)
        stream = _NO_IDS
        begins: list[int] = []
        positions: list[Position] = []
        for group in groups:
            parts = [stream]
            size = len(stream)
            for position, ids in group:
                unused = ids[position.offset :]
                begins.append(size - position.offset)
                positions.append(position)
                parts += (unused, end_marker)
                size += len(unused) + 1
            stream = np.concatenate(parts)
            used = 0
            document = 0
            while len(stream) - used > length:
                window = stream[used : used + length + 1]
                first = document
                used += length
                document = bisect_right(begins, used, document) - 1
                offset = used - begins[document]
                starts = None
                if self._separate:
                    starts = _starts(begins[first + 1 : document + 1], used - length, used)
                yield Row(window[:-1], window[1:], length, positions[document], offset, starts=starts)
            stream = stream[used:]
            begins = [begin - used for begin in begins[document:]]
            positions = positions[document:]


def _starts(begins: Iterable[int], row: int, next_row: int) -> Ids:
    """Return at which places of the row from ``row`` to ``next_row`` of a stream documents begin: 0, and ``begins``."""
    later = [begin - row for begin in begins if begin < next_row]
    return np.array([0, *later], np.int32)


def _in_groups(documents: Iterable[_PlacedText]) -> Iterator[list[_PlacedText]]:
    """Yield the documents in lists for one call to the tokenizer each, bounded in documents and in characters."""
    group: list[_PlacedText] = []
    characters = 0
    for document in documents:
        _, text, _ = document
        group.append(document)
        characters += len(text)
        if len(group) == _TOKENIZE or characters >= _TOKENIZE_CHARACTERS:
            yield group
            group = []
            characters = 0
    if group:
        yield group


def _count_empty(before: int, documents: int, contents: Sequence[Sized]) -> int:
    """Return how many documents in a row hold no token: ``before`` so many, then so many ``documents`` of a group.

    ``contents`` are those of the group. Raises InputError where the documents without a token are too many.
    """
    if any(len(content) for content in contents):
        return 0
    count = before + documents
    if count > _EMPTY:
        raise InputError(f"--data: {count} documents in a row hold no token at all")
    return count


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A process's rows of one update, and the position after the rows of all processes.

    ``input_ids`` and ``labels`` are (sequences × length, int64), in which ``tokens`` ids are not padding. Of labelled
    texts, ``labels`` are one a sequence: classes (int64) or scores (float32). ``check`` is a checksum of what all
    processes should have read alike. ``places``, of the shape of ``input_ids``, has each token's place in its document,
    counted from 0; None where documents are joined.
    """

    input_ids: Tensor
    labels: Tensor
    tokens: int
    state: dict[str, Any]
    check: int = 0
    places: Tensor | None = None

    def pinned(self) -> "Batch":
        """Return the batch in page-locked memory."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            places=None if self.places is None else self.places.pin_memory(),
        )

    @property
    def fingerprint(self) -> str:
        """Return a text that is alike in processes that read the same text."""
        return f"{self.state} {self.check}"

    @property
    def label_tokens(self) -> int:
        """Return the number of labels that the loss counts."""
        return int((self.labels != IGNORE).sum())


class TrainingData:
    """An endless iterable of shuffled batches, starting after the loaded state if there is one.

    ``sequences`` are the rows of an update, of which process ``rank`` of ``size`` gets its part.
    """

    # Rows are given out in the order of one stream, whatever the number of processes: of every `sequences` rows the
    # first process takes the first part, the second the next, and so on. So an update sees the same rows however many
    # processes share them, and the position after it, that of its last row, is the same in all.

    def __init__(
        self,
        source: DocumentSource,
        rows: Rows,
        sequences: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._source = source
        self._rows = rows
        self._sequences = sequences
        self._seed = seed
        self._share = ALL
        if size > 1:
            part = sequences // size
            first = rank * part
            self._share = Share(first, first + part, sequences)
        self._start = Position()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that carried ``state``."""
        self._start = Position.of(state)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's batches without end."""
        start = self._start
        documents = _with_offset(Documents(self._source, self._seed, start), start.offset)
        rows = self._rows(documents, self._share)
        if start != Position():
            began = time.monotonic()
            first = next(rows)
            rows = chain([first], rows)
            log.info("the place in the text was found again in %.1f s", time.monotonic() - began)
        while True:
            update = list(islice(rows, self._sequences))
            yield stack(update, self._share)


def _with_offset(documents: Iterable[_PlacedText], offset: int) -> Iterator[_PlacedText]:
    """Yield the endless documents, the first with the number of its tokens that were used before the run stopped."""
    remaining = iter(documents)
    position, text, after = next(remaining)
    yield replace(position, offset=offset), text, after
    yield from remaining


def stack(rows: Sequence[Row], share: Share = ALL) -> Batch:
    """Return those of an update's rows that are in ``share`` as one batch, with the position after all of them."""
    own_rows = [row for number, row in enumerate(rows) if number in share]
    input_ids = np.stack([row.input_ids for row in own_rows])
    labels = np.stack([row.labels for row in own_rows])
    starts = [row.starts for row in own_rows if row.starts is not None]
    places = None
    if starts:
        places = torch.from_numpy(np.stack([_places(of_row, input_ids.shape[1]) for of_row in starts]))
    check = 0
    if share is not ALL:
        check = _checksum(rows)
    last = rows[-1]
    return Batch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        tokens=sum(row.real for row in own_rows),
        state=replace(last.after, offset=last.offset).state_dict(),
        check=check,
        places=places,
    )


def _places(starts: Ids, length: int) -> Any:
    """Return each token's place in its document (int64), in a row of ``length`` whose documents begin at ``starts``."""
    lengths = np.diff(starts, append=length)
    return np.arange(length, dtype=np.int64) - np.repeat(starts, lengths)


def _checksum(rows: Sequence[Row]) -> int:
    """Return a checksum of what all processes read: of each row's text, or of its ids where those are in all."""
    check = 0
    for row in rows:
        if row.check is None:
            content = row.input_ids.tobytes()
        else:
            content = row.check.to_bytes(4, "little")
        check = zlib.crc32(content, check)
    return check


def validation_rows(source: DocumentSource, rows: Rows, tokens: int, flag: str = "--data") -> list[Row]:
    """Return the source's first rows, as `in_turn` orders them, until they hold ``tokens`` real tokens, or all rows.

    Their ``label_bytes`` are counted. Their positions count the documents in that order. Raises InputError, which names
    the ``flag`` that the text is of, where there is none.
    """
    texts: list[str] = []

    def documents() -> Iterator[_PlacedText]:
        for number, (_, _, text) in enumerate(in_turn(source)):
            texts.append(text)
            yield Position(document=number), text, Position(document=number + 1)

    chosen: list[Row] = []
    seen = 0
    for row in rows(documents()):
        chosen.append(row)
        seen += row.real
        if seen >= tokens:
            break
    if not chosen and flag == "--data":
        raise InputError("--data: no validation document, of so short a text none is held out; give --eval-data PATH")
    if not chosen:
        raise InputError(f"{flag}: no validation document in {len(source.shards)} files; give --eval-data PATH")
    return rows.counted(chosen, texts)


def count_rows(source: DocumentSource, rows: Rows) -> int:
    """Return how many rows the source's documents fill, each taken once."""

    def documents() -> Iterator[_PlacedText]:
        for shard, position, text in in_turn(source):
            yield Position(), text, Position(0, shard, position)

    with source.bad_data.trial():
        return sum(1 for _ in rows(documents()))


# -- reading ahead ----------------------------------------------------------------------------------------------------


def read_ahead(batches: Iterable[Batch], *, pin: bool) -> Generator[Batch, None, None]:
    """Yield ``batches``, read by a thread before they are asked for: `_AHEAD` tokens of them, and two at least.

    What goes wrong is raised where the batch would have come. With ``pin``, tensors are where a GPU can copy them from
    while it computes.
    """
    # A thread is enough: tokenizing and decompressing leave the interpreter to others meanwhile. The queue is what
    # bounds the reader. It holds two batches until the first one tells how large they are.
    ready: Queue[Batch | BaseException | None] = Queue(2)  # None: there are no more
    is_over = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        # A full queue is looked at again and again, since nobody will empty it once the reading is over.
        while not is_over.is_set():
            with contextlib.suppress(Full):
                ready.put(item, timeout=0.2)
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
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_over.set()
        thread.join(timeout=1)
