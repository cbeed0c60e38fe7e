"""Which files of a path are text, and what each is for: training, validation or neither. What is left out is said."""

import errno
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path

from galore_pretrain.errors import InputError, did_you_mean
from galore_pretrain.text import readers

TRAINING, VALIDATION, TEST = "training", "validation", "test"
_ROLES = {
    "train": TRAINING,
    "training": TRAINING,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "eval": VALIDATION,
    "test": TEST,
}
_TEST_TEXT = "test text by their names"
KINDS = ".json, .jsonl, .ndjson, .csv, .parquet or .txt"


@dataclass(frozen=True)
class TextFile:
    """Holds the ``path`` of a file, its ``name`` below what the user named, and which ``text`` it is.

    Two files of one text hold the same: one file by two paths, or a file and what it is compressed to beside it.
    """

    path: Path
    name: str
    text: str

    @classmethod
    def at(cls, path: str, name: str, real: str) -> "TextFile":
        """Return the file at ``path``, of which ``real`` is the path without links."""
        return cls(Path(path), name, readers.without_compression(real))


@dataclass(frozen=True)
class Selection:
    """The files that a path holds, by what they are for, each list in the order of their names.

    ``left_out`` has a reason for each group of files and folders that are not read.
    """

    training: list[TextFile] = field(default_factory=list)
    validation: list[TextFile] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: Path) -> None:
        """Note that a file, or a folder with all that it holds, is not read."""
        self.left_out.setdefault(reason, []).append(path)


def select(data: str, flag: str = "--data") -> Selection:
    """Sort the files that a file's path, a folder's path or a pattern names by what they are for.

    A file that is named itself is training text, whatever its name. One that several paths lead to is read once: it is
    what its own path says, and not what a link to it says; where links alone lead to it, what the first says. Raises
    InputError where nothing can be read, or nothing is left for training.
    """
    # Of a folder or a pattern, the words of a file's name decide (`role_of`), and where they say nothing, those of the
    # folders that it lies in, the nearest first. A file without any such word is training text.
    selection = Selection()
    if _is_file(data, flag):
        selection.training.append(_named_file(data, flag))
        return selection
    for file in _readable(data, flag, selection):
        role = role_of(file.name, f"{flag} {file.path}")
        if role == TEST:
            selection.leave_out(_TEST_TEXT, file.path)
        elif role == VALIDATION:
            selection.validation.append(file)
        else:
            selection.training.append(file)
    if not selection.training:
        held_out = [file.path for file in selection.validation] + selection.left_out.get(_TEST_TEXT, [])
        verb = "is" if len(held_out) == 1 else "are"
        raise InputError(
            f"{flag} {data}: no training text; {examples(held_out)} {verb} for validation or test by name; give the "
            "folder of the training text, or a file by its own name"
        )
    return selection


def select_all(data: str, flag: str) -> list[TextFile]:
    """Return all text files of a path or a pattern, whatever their names say. Raises InputError where there is none."""
    if _is_file(data, flag):
        return [_named_file(data, flag)]
    return _readable(data, flag, Selection())


# A word is a run of letters, so `validated_part1` says nothing, and `val-00000-of-00003` is validation text. Some
# systems write an accent as a character of its own, which is none of a word: `détest` must not say test there.
def role_of(name: str, where: str = "--data") -> str | None:
    """Return what a file is for by the words of its name and its folders: training, validation, test, or None.

    ``name`` is relative to what the user named. Raises InputError where one name says two things.
    """
    for part in reversed(name.split(os.sep)):
        words = re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", part).lower())
        roles = {_ROLES[word] for word in words if word in _ROLES}
        if len(roles) > 1:
            raise InputError(
                f"{where}: its name {part!r} says {' and '.join(sorted(roles))}; rename it, or give the training text "
                "and --eval-data by paths of their own"
            )
        if roles:
            return roles.pop()
    return None


def summary(selection: Selection, held_out: int, evaluated: list[TextFile] | None = None) -> str:
    """Return one line that says what is read for training and for validation, and what is left out and why.

    Validation is what is ``evaluated`` by --eval-data, or else the selection's own, or else one document in so many.
    """
    training = selection.training
    validation = selection.validation
    left_out = dict(selection.left_out)
    if evaluated is not None:
        texts = {file.text for file in evaluated}
        training = [file for file in training if file.text not in texts]
        unused = [file.path for file in validation if file.text not in texts]
        if unused:
            left_out["validation text by their names, and --eval-data names other"] = unused
        validation = evaluated
    parts = [f"training {_amount(training)}"]
    if validation:
        parts.append(f"validation {_amount(validation)}: {examples([file.path for file in validation])}")
    else:
        parts.append(f"validation 1 document in {held_out} of these")
    for reason, paths in left_out.items():
        parts.append(f"left out {examples(paths)}: {reason}")
    return "; ".join(parts)


def _is_file(data: str, flag: str) -> bool:
    """Return whether a path names a file. Raises InputError where the system does not say."""
    try:
        return Path(data).is_file()
    except OSError as error:
        raise _not_read(data, flag, error) from error


def _not_read(data: str, flag: str, error: OSError) -> InputError:
    """Return the error that something of a path cannot be read."""
    why = error.strerror or str(error)
    if error.filename in (None, data):
        return InputError(f"{flag} {data}: cannot be read ({why})")
    return InputError(f"{flag} {data}: {error.filename} cannot be read ({why}); leave it out")


def _named_file(data: str, flag: str) -> TextFile:
    """Return the file that the user has named by itself."""
    path = Path(data)
    if not readers.is_known(path):
        raise InputError(f"{flag} {data}: unknown kind of file; use {KINDS}, plain or compressed")
    return TextFile.at(data, path.name, os.path.realpath(path))


def _readable(data: str, flag: str, selection: Selection) -> list[TextFile]:
    """Return the files that can be read, in the order of their names.

    Those that cannot be are noted in ``selection``. Raises InputError where there is none.
    """
    files = _files(data, flag, selection)
    if not files:
        raise InputError(f"{flag} {data}: holds no {KINDS} file, plain or compressed{_but(selection)}")
    # A file and what it is compressed to beside it have one name but for the latter's suffix.
    plain_names = [readers.without_compression(file.name) for file in files]
    first_of: dict[str, TextFile] = {}
    for file, plain_name in zip(files, plain_names, strict=True):
        if plain_name not in first_of or file.name == plain_name:
            first_of[plain_name] = file
    readable: list[TextFile] = []
    for file, plain_name in zip(files, plain_names, strict=True):
        first = first_of[plain_name]
        if first is file:
            readable.append(file)
        else:
            selection.leave_out(f"the same text as {first.path.name}", file.path)
    return readable


def _files(data: str, flag: str, selection: Selection) -> list[TextFile]:
    """Return each text file of a folder or a pattern once, in the order of their names."""
    path = Path(data)
    try:
        if path.is_dir():
            walk = _Walk(path, selection)
            walk.visit([path])
        elif has_magic(data):
            walk = _Walk(_fixed_part(path), selection)
            walk.visit(Path(match) for match in glob(data, recursive=True))
        else:
            names: tuple[str, ...] = ()
            choices = "a path"
            if flag == "--data":
                names = ("c4", "sample")
                choices = "c4, hub:ORG/NAME, sample or a path"
            raise InputError(
                f"{flag} {data}: no such file, folder or pattern; {did_you_mean(data, names)}choose {choices}"
            )
    except OSError as error:
        raise _not_read(data, flag, error) from error
    return sorted(walk.found, key=lambda file: file.name.split(os.sep))


class _Walk:
    """Finds the text files below a folder or a pattern, through links too: each folder and each file once.

    What is hidden, of another kind, or found already is noted in ``selection``.
    """

    # Links are put aside until all that is reached without them is found, and then followed in the order of their
    # names, a round of them after the other. So a file is found by its own path, where it has one below what the user
    # named, and the time is linear in the number of entries, however links lead from folder to folder. A link that
    # leads up is left out: it would take what the user has not named. Of what is reached without links the real path is
    # known from its folder's, so the system is asked for it at links alone.

    def __init__(self, base: Path, selection: Selection) -> None:
        self.found: list[TextFile] = []
        self._base = base
        self._selection = selection
        self._links: list[tuple[str, str]] = []  # not followed yet, with their names below the base
        self._is_linked: dict[Path, bool] = {base: False}
        self._paths: dict[str, str] = {}  # of each folder and text file that was found, by its real path

    def visit(self, paths: Iterable[Path]) -> None:
        """Find all below these paths, which are the base or below it, and below the links there."""
        real_base = os.path.realpath(self._base)
        for path in sorted(paths):
            parts = path.relative_to(self._base).parts
            name = os.path.join("", *parts)
            if any(part.startswith(".") for part in parts):
                self._selection.leave_out("hidden", path)
            elif self._leads_through_link(path):
                self._links.append((str(path), name))
            else:
                self._enter(str(path), name, os.path.join(real_base, *parts))
        while self._links:
            links = sorted(self._links)
            self._links = []
            for link, name in links:
                real = os.path.realpath(link)
                if _is_within(real_base, real) or _is_within(os.path.realpath(os.path.dirname(link)), real):
                    self._selection.leave_out("leads to a folder that it is in", Path(link))
                else:
                    self._enter(link, name, real)

    def _leads_through_link(self, path: Path) -> bool:
        """Return whether a path below the base is a link, or one of its folders is."""
        if path not in self._is_linked:
            self._is_linked[path] = path.is_symlink() or self._leads_through_link(path.parent)
        return self._is_linked[path]

    def _enter(self, path: str, name: str, real: str) -> None:
        """Find what is at a path, which may be a link: a file, or all that is in a folder."""
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            self._selection.leave_out("leads nowhere", Path(path))
            return
        if stat.S_ISDIR(mode):
            self._enter_folder(path, name, real)
        elif stat.S_ISREG(mode):
            self._take(path, name, real)

    def _enter_folder(self, path: str, name: str, real: str) -> None:
        """Find what is in a folder and in those below it, and put the links there aside."""
        waiting = [(path, name, real)]
        while waiting:
            folder, name, real = waiting.pop()
            if not self._is_new(folder, real):
                continue
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    entry_name = os.path.join(name, entry.name)
                    entry_real = os.path.join(real, entry.name)
                    if entry.name.startswith("."):
                        self._selection.leave_out("hidden", Path(entry.path))
                    elif entry.is_symlink():
                        self._links.append((entry.path, entry_name))
                    elif entry.is_dir():
                        waiting.append((entry.path, entry_name, entry_real))
                    elif entry.is_file():
                        self._take(entry.path, entry_name, entry_real)

    def _take(self, path: str, name: str, real: str) -> None:
        """Add a file, if it is text and new."""
        if not readers.is_known(name):
            self._selection.leave_out("of another kind", Path(path))
        elif self._is_new(path, real):
            self.found.append(TextFile.at(path, name, real))

    def _is_new(self, path: str, real: str) -> bool:
        """Return whether a folder or a text file was not found before, and note that it is found."""
        first = self._paths.get(real)
        if first is None:
            self._paths[real] = path
        elif first != path:
            self._selection.leave_out("links to what is counted already", Path(path))
        return first is None


def _is_within(path: str, folder: str) -> bool:
    """Return whether a real path is that of a folder, or below it."""
    return os.path.commonpath([path, folder]) == folder


def _fixed_part(pattern: Path) -> Path:
    """Return the folder that a pattern begins with, up to its first part with a wildcard."""
    fixed: list[str] = []
    for part in pattern.parts:
        if has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _amount(files: list[TextFile]) -> str:
    """Return how many files of which kinds there are, and their bytes."""
    kinds = Counter(_kind(file.path) for file in files)
    named = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    size = 0
    for file in files:
        try:
            size += file.path.stat().st_size
        except OSError as error:
            raise InputError(f"--data: {file.path} cannot be read ({error.strerror})") from error
    return f"{named} ({size / 1e6:.3g} MB)"


def _kind(path: Path) -> str:
    """Return the suffix of a file's kind, with that of what compresses it: ``.jsonl.gz``."""
    name = path.name.lower()
    plain = readers.without_compression(name)
    return readers.kind_of(plain) + name.removeprefix(plain)


def examples(paths: list[Path], most: int = 3) -> str:
    """Return the names of the first few paths, and how many more there are."""
    names = ", ".join(str(Path(path.parent.name) / path.name) for path in paths[:most])
    more = len(paths) - most
    if more > 0:
        return f"{names} and {more} more"
    return names


def _but(selection: Selection) -> str:
    """Return what a path holds instead of text, to be added to an error."""
    paths = [path for group in selection.left_out.values() for path in group]
    if not paths:
        return ""
    return f", but {examples(paths)}"
