"""Measure how long a run takes to find its place in the text: a million documents in, and at the very beginning.

    python scripts/bench_resume.py FOLDER

Shards have C4's number of documents and are compressed like C4's; they are made first, once.
"""

import argparse
import gzip
import json
import random
import time
from pathlib import Path

from galore_pretrain.text.batches import Documents, Position, TokenRows, TrainingData
from galore_pretrain.text.sources import open_source
from galore_pretrain.text.tokenizer import load_tokenizer

SHARDS = 4
SHARD = 356_317  # documents in each
PLACE = 1_000_000  # documents in
WORDS = 200  # of a document


def make(folder: Path) -> None:
    """Write shards of documents of 200 words, each a stretch of the sample that begins anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = sample_words()
    for number in range(SHARDS):
        with gzip.open(folder / f"c4-train.{number:05}.json.gz", "wt", compresslevel=4) as file:
            for i in range(SHARD):
                start = rng.randrange(len(words) - WORDS)
                stretch = " ".join(words[start : start + WORDS])
                # The numbers make every document unlike all others, as C4's are.
                document = {"text": f"{number} {i} {stretch}"}
                file.write(json.dumps(document) + "\n")


def sample_words() -> list[str]:
    """Return all words of the sample's training text."""
    sample = open_source("sample", "train")
    words: list[str] = []
    for shard in range(len(sample.shards)):
        for _, text in sample.read(shard, 0):
            words += text.split()
    return words


def main() -> None:
    """Make the shards where there are none, then time a first batch from both places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not folder.exists():
        make(folder)
    source = open_source(str(folder), "train")
    # A run can only stop where a block begins. Validation documents count for positions, so the block is looked up.
    shard, offset = divmod(PLACE, SHARD)
    blocks = Documents(source, 0, Position())._blocks(0, shard, offset)
    _, first, _ = next(blocks)
    rows = TokenRows(load_tokenizer("sample"), "pack", 256)
    positions = {
        "at the beginning": Position(),
        "a million documents in": Position(0, *first, taken=2000),
    }
    for name, position in positions.items():
        data = TrainingData(source, rows, sequences=8, seed=0)
        data.load_state_dict(position.state_dict())
        started = time.perf_counter()
        next(iter(data))
        seconds = time.perf_counter() - started
        print(f"{name}: {seconds:.2f} s to the first batch")


if __name__ == "__main__":
    main()
