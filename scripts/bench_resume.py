"""How long a run takes to find its place in the text again: a million documents in, and at the very beginning.

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

SHARD, SHARDS, PLACE = 356_317, 4, 1_000_000


def make(folder: Path) -> None:
    """Shards of documents of 200 words, drawn from anywhere in the sample."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, sample = random.Random(0), open_source("sample", "train")
    words = [w for shard in range(len(sample.shards)) for _, text in sample.read(shard, 0) for w in text.split()]
    for number in range(SHARDS):
        with gzip.open(folder / f"c4-train.{number:05}.json.gz", "wt", compresslevel=4) as file:
            for i in range(SHARD):
                start = rng.randrange(len(words) - 200)
                file.write(json.dumps({"text": f"{number} {i} {' '.join(words[start : start + 200])}"}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not folder.exists():
        make(folder)
    source = open_source(str(folder), "train")
    blocks = Documents(source, 0, Position())._blocks(0, PLACE // SHARD, PLACE % SHARD)
    _, first, _ = next(blocks)  # where a block begins, since validation documents count for positions
    rows = TokenRows(load_tokenizer("sample"), "pack", 256)
    for name, position in (
        ("at the beginning", Position()),
        ("a million documents in", Position(0, *first, taken=2000)),
    ):
        data = TrainingData(source, rows, sequences=8, seed=0)
        data.load_state_dict(position.state_dict())
        started = time.perf_counter()
        next(iter(data))
        print(f"{name}: {time.perf_counter() - started:.2f} s to the first batch")


if __name__ == "__main__":
    main()
