"""Which files of a path are text, and what each is for: training, validation or neither. What is left out is said."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path

from galore_pretrain.errors import InputError
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
KINDS = ".json, .jsonl, .ndjson, .csv, .parquet or .txt"


@dataclass(frozen=True)
class Selection:
    """The files that a path holds, by what they are for, each list in the order of their names.

    ``left_out`` has a reason for each group of files that are not read.
    """

    training: list[Path] = field(default_factory=list)
    validation: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, reason: str, file: Path) -> None:
        """Note that a file is not read."""
        self.left_out.setdefault(reason, []).append(file)


def select(data: str, flag: str = "--data") -> Selection:
    """Sort the files that a file's path, a folder's path or a pattern names by what they are for.

    A file that is named itself is training text, whatever its name. Raises InputError where nothing can be read, or
    nothing is left for training.
    """
    # Of a folder or a pattern, the words of a file's name decide (`role_of`), and where they say nothing, those of the
    # folders that it lies in, the nearest first. A file without any such word is training text.
    if Path(data).is_file():
        return _named_file(Path(data), flag)
    selection = Selection()
    for file, names in _readable(data, flag, selection):
        role = _role_by_all(names, f"{flag} {file}")
        if role == TEST:
            selection.leave_out("test text by their names", file)
        elif role == VALIDATION:
            selection.validation.append(file)
        else:
            selection.training.append(file)
    if not selection.training:
        held_out = [*selection.validation, *selection.left_out.get("test text by their names", [])]
        raise InputError(
            f"{flag} {data}: no training text; {_examples(held_out)} {'is' if len(held_out) == 1 else 'are'} for "
            "validation or test by name; give the folder of the training text, or a file by its own name"
        )
    return selection


def select_all(data: str, flag: str) -> list[Path]:
    """Return all text files of a path or a pattern, whatever their names say. Raises InputError where there is none."""
    if Path(data).is_file():
        return _named_file(Path(data), flag).training
    return [file for file, _ in _readable(data, flag, Selection())]


def _role_by_all(names: list[Path], where: str) -> str:
    """Return what a file is for, which may have several names. InputError where they say different things."""
    says: dict[str, Path] = {}
    for name in names:
        says.setdefault(role_of(name, where) or TRAINING, name)
    if len(says) > 1:
        named = " and ".join(f"{role} text as {name}" for role, name in says.items())
        raise InputError(f"{where}: a link makes it {named}; leave one of these names out")
    return next(iter(says))


# A word is a run of letters, so `validated_part1` says nothing, and `val-00000-of-00003` is validation text. Some
# systems write an accent as a character of its own, which is none of a word: `détest` must not say test there.
def role_of(name: Path, where: str = "--data") -> str | None:
    """Return what a file is for by the words of its name and its folders: training, validation, test, or None.

    ``name`` is relative to what the user named. Raises InputError where one name says two things.
    """
    for part in reversed(name.parts):
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


def summary(selection: Selection, held_out: int, eval_files: list[Path] | None = None) -> str:
    """Return one line that says what is read for training and for validation, and what is left out and why.

    Validation is ``eval_files`` where they are given, or else the selection's own, or else one document in so many.
    """
    training, left_out = selection.training, dict(selection.left_out)
    validation = selection.validation
    if eval_files is not None:
        evaluated = {file.resolve() for file in eval_files}
        training = [file for file in training if file.resolve() not in evaluated]
        unused = [file for file in validation if file.resolve() not in evaluated]
        if unused:
            left_out["validation text by their names, and --eval-data names other"] = unused
        validation = eval_files
    parts = [f"training {_amount(training)}"]
    if validation:
        parts.append(f"validation {_amount(validation)}")
    else:
        parts.append(f"validation 1 document in {held_out} of these")
    for reason, files in left_out.items():
        parts.append(f"left out {_examples(files)}: {reason}")
    return "; ".join(parts)


def _named_file(file: Path, flag: str) -> Selection:
    """Select one file that the user has named."""
    if not readers.is_known(file):
        raise InputError(f"{flag} {file}: unknown kind of file; use {KINDS}, plain or compressed")
    return Selection(training=[file])


def _readable(data: str, flag: str, selection: Selection) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the files that can be read, in order, each with all its names below what the user named.

    A link gives a file, or all files of a folder, another name. Files that cannot be read are noted in ``selection``.
    Raises InputError where there is none that can.
    """
    by_text: dict[Path, Path] = {}  # the same text, compressed and not, by its name without the compression's suffix
    known: list[tuple[Path, Path]] = []
    for file, name in _files(data, flag):
        if any(part.startswith(".") for part in name.parts):
            selection.leave_out("hidden", file)
        elif not readers.is_known(file):
            selection.leave_out("of another kind", file)
        elif not file.is_file():
            selection.leave_out("links to nothing, or no files", file)
        else:
            known.append((file, name))
            text = readers.without_compression(file)
            by_text[text] = min(by_text.get(text, file), file, key=lambda path: (path != text, path))
    if not known:
        raise InputError(f"{flag} {data}: holds no {KINDS} file, plain or compressed{_but(selection)}")
    names_of: dict[Path, list[Path]] = {}
    first_of: dict[Path, Path] = {}
    for file, name in known:
        copied = by_text[readers.without_compression(file)]
        if copied != file:
            selection.leave_out(f"the same text as {copied.name}", file)
            continue
        real = readers.without_compression(file.resolve())
        names_of.setdefault(real, []).append(name)
        first = first_of.setdefault(real, file)
        if first != file:
            selection.leave_out("links to what is read by another name", file)
    for real, first in first_of.items():
        yield first, names_of[real]


def _files(data: str, flag: str) -> Iterator[tuple[Path, Path]]:
    """Yield each file of a folder or a pattern once, in order, with its name below that folder or the pattern's."""
    path = Path(data)
    if path.is_dir():
        base, tops = path, [path]
    elif has_magic(data):
        base = _fixed_part(path)
        tops = sorted(Path(match) for match in glob(data, recursive=True))
    else:
        choices = "c4, hub:ORG/NAME, sample or a path" if flag == "--data" else "a path"
        raise InputError(f"{flag} {data}: no such file, folder or pattern; choose {choices}")
    try:
        files = {file for top in tops for file in _below(top)}
    except OSError as error:
        raise InputError(f"{flag} {data}: {error.filename} cannot be read ({error.strerror}); leave it out") from error
    for file in sorted(files):
        yield file, file.relative_to(base)


def _below(top: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield the files below a folder, through links too, but no folder within itself; or ``top``, if it is no folder.

    ``above`` holds the folders that the walk came through, and those that hold them.
    """
    if not top.is_dir():
        yield top
        return
    real = top.resolve()
    if real not in above:
        for child in top.iterdir():
            yield from _below(child, above | {real, *real.parents})


def _fixed_part(pattern: Path) -> Path:
    """Return the folder that a pattern begins with, up to its first part with a wildcard."""
    fixed: list[str] = []
    for part in pattern.parts:
        if has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _amount(files: list[Path]) -> str:
    """Return how many files of which kinds there are, and their bytes."""
    kinds = Counter(readers.kind_of(file) for file in files)
    size = sum(file.stat().st_size for file in files)
    named = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{named} ({size / 1e6:.3g} MB)"


def _examples(files: list[Path], most: int = 3) -> str:
    """Return the names of the first few files, and how many more there are."""
    names = ", ".join(f"{file.parent.name}/{file.name}" for file in files[:most])
    more = len(files) - most
    return f"{names} and {more} more" if more > 0 else names


def _but(selection: Selection) -> str:
    """Return what a path holds instead of text, to be added to an error."""
    files = [file for group in selection.left_out.values() for file in group]
    return f", but {_examples(files)}" if files else ""
