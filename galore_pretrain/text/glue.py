"""The tasks of GLUE, and their labelled texts: of the hub, or of files of one's own."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galore_pretrain.errors import InputError, did_you_mean
from galore_pretrain.text import readers, tables
from galore_pretrain.text.files import examples as named
from galore_pretrain.text.hub import GLUE, download_glue

LABEL = "label"
"""The column of the labels."""
LOWEST, HIGHEST = 0.0, 5.0
"""Between these are the scores of a task without classes."""
_HIDDEN = -1  # what GLUE's test splits have in place of labels
_SPLITS = (
    "train",
    "validation",
    "validation_matched",
    "validation_mismatched",
    "test",
    "test_matched",
    "test_mismatched",
)
_SHOWN = 40  # characters of a value that an error shows

Labels = NDArray[np.int64] | NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """A task of GLUE: which columns hold one text or two, and what is said of them.

    ``class_names`` are those of the classes 0, 1, …; without any, a label is a score from 0 to 5. ``metrics`` are what
    it is scored by, the first of which tables print. ``validation`` are the splits that it is scored on.
    """

    name: str
    columns: tuple[str, ...]
    class_names: tuple[str, ...]
    metrics: tuple[str, ...]
    validation: tuple[str, ...] = ("validation",)

    @property
    def classes(self) -> int:
        """Return the number of a model's outputs: of the classes, or 1 where the label is a score."""
        return max(1, len(self.class_names))

    @property
    def is_regression(self) -> bool:
        """Return whether a label is a score, and not a class."""
        return not self.class_names


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")

# The columns and the order of the classes are those of the hub's data. Of the metrics of a task, the first is what the
# GaLore paper's Table 4 prints: Matthews' of CoLA, Pearson's of STS-B, F1 of MRPC, the accuracy of all others, of MNLI
# the mean of both validation splits'.
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        Task("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        Task("stsb", _SENTENCES, (), ("pearson", "spearman")),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("validation_matched", "validation_mismatched"),
        ),
        Task("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
        Task("rte", _SENTENCES, _ENTAILMENT, ("accuracy",)),
    )
}
"""The tasks by their names."""


@dataclass(frozen=True)
class Examples:
    """Labelled texts: of each example one text or two, and a label: a class (int64), or a score (float32).

    ``fingerprint`` is the SHA-256 of all of them in their order. ``revision`` is the commit of the hub that they are
    of; None of files of one's own.
    """

    texts: list[tuple[str, ...]]
    labels: Labels
    fingerprint: str
    revision: str | None = None

    def __len__(self) -> int:
        return len(self.texts)


def read_examples(task: Task, data: str | None, split: str, revision: str | None = None) -> Examples:
    """Read a split of a task: of the folder ``data``, or, where that is None, of GLUE on the hub.

    A folder's files begin with the split's name, as ``train-1.jsonl`` does. Of the hub, ``revision`` is the commit that
    is read: by default the newest, or the one that an earlier run has downloaded. Raises InputError where something is
    missing, or no text or label is as the task has them.
    """
    commit = None
    if data is None:
        flag = f"--task {task.name}"
        path = download_glue(f"{task.name}/{split}-00000-of-00001.parquet", flag, revision=revision)
        files = [path]
        commit = path.parent.parent.name  # the cache has …/snapshots/COMMIT/TASK/FILE
    else:
        flag = f"--data {data}"
        files = _files(task, data, split)
    texts: list[tuple[str, ...]] = []
    numbers: list[float] = []
    for file in files:
        for text, number in _read_file(task, file, f"{flag}: {file.name}"):
            texts.append(text)
            numbers.append(number)
    if not texts:
        raise InputError(f"{flag}: {named(files)} holds no row; give --data FOLDER with examples of {task.name}")
    labels: Labels
    if task.is_regression:
        labels = np.array(numbers, np.float32)
    else:
        labels = np.array(numbers, np.int64)
    return Examples(texts, labels, _digest(texts, labels), commit)


def _digest(texts: list[tuple[str, ...]], labels: Labels) -> str:
    """Return the SHA-256 of labelled texts."""
    digest = hashlib.sha256()
    for row, label in zip(texts, labels.tolist(), strict=True):
        line = json.dumps([*row, label])
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _read_file(task: Task, path: Path, name: str) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the texts and the label of each row of a file. ``name`` is what messages call it."""
    for place, row in tables.read_rows(path, (*task.columns, LABEL), name):
        where = f"{name}: {place}"
        texts, label = row[:-1], row[-1]
        for column, text in zip(task.columns, texts, strict=True):
            if not readers.is_text(text):
                raise InputError(f'{where} has no text under "{column}", but {_shown(text)}; mend it, or take it out')
        yield texts, _label(task, label, where)


def _label(task: Task, value: Any, where: str) -> float:
    """Return the label that a file holds, as a number or as its digits. InputError where the task has no such."""
    number = _number(value)
    if task.is_regression:
        is_label = number is not None and LOWEST <= number <= HIGHEST  # which NaN is not
        accepted = f"a score from {LOWEST:g} to {HIGHEST:g}"
    else:
        is_label = number in range(task.classes)
        accepted = ", ".join(f"{i} ({name})" for i, name in enumerate(task.class_names))
    if number == _HIDDEN:
        raise InputError(
            f"{where} has the label {_HIDDEN}, which stands for one that GLUE keeps hidden, as of its test splits; "
            f"give labelled examples: {task.name} has {accepted}"
        )
    if number is None or not is_label:
        raise InputError(f"{where} has the label {_shown(value)}; {task.name} has {accepted}")
    return number


def _number(value: Any) -> float | None:
    """Return a value as a number, or None where it is none."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _shown(value: Any) -> str:
    """Return a value as Python writes it, or its beginning."""
    text = repr(value)
    if len(text) > _SHOWN:
        text = text[:_SHOWN] + "…"
    return text


# -- files of one's own -----------------------------------------------------------------------------------------------


def _files(task: Task, data: str, split: str) -> list[Path]:
    """Return the files of a split in a folder, in the order of their names.

    Raises InputError where there are none, or where they are of several kinds, which mostly hold the same.
    """
    folder = Path(data)
    if folder.is_file():
        raise InputError(f"--data {data}: is a file; give the folder of the files that are named {split}*")
    if not folder.is_dir():
        raise InputError(
            f"--data {data}: no such folder; {did_you_mean(data)}give one with files named {split}*, or leave it out "
            f"for {GLUE} of the hub"
        )
    try:
        beside = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"--data {data}: cannot be read ({error.strerror})") from error
    files = [path for path in beside if tables.is_table(path) and _split_of(path.name) == split]
    if not files:
        raise InputError(
            f"--data {data}: holds no {tables.KINDS} file named {split}*, plain or compressed"
            f"{_instead(task, folder, beside)}"
        )
    first_of: dict[str, Path] = {}
    for path in files:
        first_of.setdefault(_kind(path), path)
    if len(first_of) > 1:
        raise InputError(
            f"--data {data}: {named(list(first_of.values()))} are of several kinds, and may hold the same examples; "
            f"leave those of one kind for {split}"
        )
    return files


def _kind(path: Path) -> str:
    """Return the suffix of a file's kind, with that of what compresses it: ``.jsonl.gz``."""
    stem, _ = os.path.splitext(readers.without_compression(path.name))
    return path.name.removeprefix(stem).lower()


def _split_of(name: str) -> str | None:
    """Return the split that a file's name begins with, the longest of them, or None where it begins with none."""
    splits = [split for split in _SPLITS if name.startswith(split)]
    return max(splits, key=len, default=None)


def _instead(task: Task, folder: Path, beside: list[Path]) -> str:
    """Return what a folder holds instead of a split, to be added to an error."""
    of_task = folder / task.name
    if of_task.is_dir():
        return f"; did you mean {of_task}?"
    if beside:
        return f", but {named(beside)}"
    return ", and no other file"
