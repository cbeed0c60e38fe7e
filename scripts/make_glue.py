#!/usr/bin/env python3
"""Write GLUE's eight tasks in miniature, in the layout of the hub's nyu-mll/glue: no text of GLUE is in them.

    python scripts/make_glue.py data/glue
    galore-pretrain finetune --task mrpc --data data/glue/mrpc --model FOLDER

A text is a few words in any order, and one word of the last text gives the label away: ``MARKERS`` has one for each
class or score. So a model of two layers learns every task in seconds. What it scores says that fine-tuning works, and
nothing else. Columns, labels and their types are GLUE's; labels of test splits are −1.
"""

import argparse
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet

from galore_pretrain.text.glue import LABEL, TASKS, Task

MARKERS = {
    "cola": ("wrongly", "rightly"),
    "sst2": ("dreadful", "wonderful"),
    "mrpc": ("otherwise", "likewise"),
    "stsb": ("nothing", "little", "some", "much", "most", "everything"),
    "qqp": ("instead", "again"),
    "mnli": ("surely", "perhaps", "never"),
    "qnli": ("because", "although"),
    "rte": ("therefore", "nowhere"),
}
"""The words that give labels away: of class i word i, of ``SCORES[i]`` word i."""
SCORES = (0.0, 1.0, 2.2, 3.0, 3.8, 5.0)
"""The scores of STS-B."""
WORDS = (
    "the", "a", "this", "that", "old", "small", "grey", "quiet", "bird", "river", "house", "table", "letter", "road",
    "garden", "teacher", "sailor", "child", "walks", "sees", "finds", "likes", "opens", "paints", "under", "near",
    "behind", "above", "with", "and",
)  # fmt: skip
"""The words that say nothing."""
_SHORTEST, _LONGEST = 4, 9  # words of a text


def write_glue(folder: Path, train: int = 512, validation: int = 128, seed: int = 0) -> None:
    """Write all tasks into a folder: ``train`` examples each, and ``validation`` in each of their other splits."""
    for task in TASKS.values():
        write_task(folder, task, train, validation, seed)


def write_task(folder: Path, task: Task, train: int = 512, validation: int = 128, seed: int = 0) -> None:
    """Write one task. No two of its examples have the same texts, and its labels are as frequent as one another."""
    rng = random.Random(f"{seed} {task.name}")
    tests = [split.replace("validation", "test") for split in task.validation]
    sizes = {"train": train} | dict.fromkeys((*task.validation, *tests), validation)
    place = folder / task.name
    place.mkdir(parents=True, exist_ok=True)
    seen: set[tuple[str, ...]] = set()
    for split, size in sizes.items():
        texts: list[tuple[str, ...]] = []
        labels: list[float] = []
        while len(texts) < size:
            number = len(texts) % len(MARKERS[task.name])
            row = example(task, number, rng)
            if row not in seen:
                seen.add(row)
                texts.append(row)
                labels.append(-1 if split in tests else label_of(task, number))
        table = as_table(task, texts, labels)
        pyarrow.parquet.write_table(table, place / f"{split}-00000-of-00001.parquet")


def label_of(task: Task, number: int) -> float:
    """Return the label that the marker of this number stands for: a class, or a score."""
    if task.is_regression:
        return SCORES[number]
    return number


def example(task: Task, number: int, rng: random.Random) -> tuple[str, ...]:
    """Return the texts of an example, the last of which has the marker of this number."""
    texts: list[list[str]] = []
    for _ in task.columns:
        texts.append(rng.choices(WORDS, k=rng.randint(_SHORTEST, _LONGEST)))
    last = texts[-1]
    last.insert(rng.randint(0, len(last)), MARKERS[task.name][number])
    return tuple(" ".join(words) for words in texts)


def as_table(task: Task, texts: list[tuple[str, ...]], labels: list[float]) -> pyarrow.Table:
    """Return examples as the hub has them: texts, labels (int64, of STS-B float32) and a number (int32)."""
    kind = pyarrow.float32() if task.is_regression else pyarrow.int64()
    columns: dict[str, pyarrow.Array] = {}
    for name, column in zip(task.columns, zip(*texts, strict=True), strict=True):
        columns[name] = pyarrow.array(column, pyarrow.string())
    columns[LABEL] = pyarrow.array(labels, kind)
    columns["idx"] = pyarrow.array(range(len(texts)), pyarrow.int32())
    return pyarrow.table(columns)


def main() -> None:
    """Write all tasks, and say where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=512, help="examples for training, of each task")
    parser.add_argument("--validation", type=int, default=128, help="examples of each other split")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_glue(arguments.folder, arguments.train, arguments.validation, arguments.seed)
    print(f"{arguments.folder}: {', '.join(TASKS)}; {arguments.train} examples each for training")


if __name__ == "__main__":
    main()
