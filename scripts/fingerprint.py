#!/usr/bin/env python3
"""Does a change of the code change a number? Short trainings in every way that there is, and digests of each.

    python scripts/fingerprint.py --out before.txt        # three minutes, of two cores; then make the change
    python scripts/fingerprint.py --compare before.txt    # says which lines differ; exits 1 if any does
    python scripts/fingerprint.py --only "galore_adamw bf16" --processes 1    # a part of them

A line is a cell: its name, a digest of the weights and of what all updates reported, and one of the optimizer's state.
A cell that is refused has the beginning of the message instead. Digests are of bits: both files must come from the same
machine with the same torch.
"""

import argparse
import hashlib
import itertools
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, here and in the processes that this one starts

import torch
from torch import Tensor, distributed, multiprocessing

from galore_pretrain.config.options import Processes, RunConfig
from galore_pretrain.config.resolve import resolve, without_meaning
from galore_pretrain.dist import World, joined
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.model.position import TrainingPosition
from galore_pretrain.optim.methods import METHODS, NUMERICS
from galore_pretrain.text.batches import IGNORE, Batch
from galore_pretrain.train.build import execution_for, factors_of, model_for, optimizer_for, set_up_model
from galore_pretrain.train.schedule import Schedule
from galore_pretrain.train.trainer import Trainer, TrainState

# Keys and values are wide matrices, of a width that two processes can halve; the MLP's are long, of a length that they
# cannot. Embeddings, and moments of long matrices at rank 16, have the 4096 elements from which 8 bits are 8 bits.
TINY = {
    "hidden_size": 40, "intermediate_size": 257, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 113, "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "tiny": TINY,
    "deep": TINY | {"num_hidden_layers": 2},  # for two processes: FSDP2 goes from layer to layer
    "tied": TINY | {"tie_word_embeddings": True},
    # Its matrices, and their moments at rank 68, have more elements than are updated at a time.
    "long": TINY | {"hidden_size": 72, "intermediate_size": 4099, "num_key_value_heads": 4},
}
ROWS = 4
GIVEN: dict[str, Any] = {
    "data": "sample", "device": "cpu", "seed": 1, "steps": 12, "warmup_steps": 2, "lr": 0.02, "weight_decay": 0.1,
    "total_batch_size": ROWS, "max_length": 16, "rank": 16, "update_proj_gap": 5, "natural_history": 3,
    "relora_every": 5, "relora_warmup": 2,
}  # fmt: skip
LATE = {"update_proj_gap": 20, "steps": 23}  # from T = 20 on, the first refreshes are spread over two updates
FOR_ALL: list[dict[str, Any]] = [
    {"betas": (0.8, 0.95)},
    {"bad": 9},  # the number of the backward pass
    {"bad": 10},  # of an update in which a basis is due
    {"max_loss": 4.74},  # which some updates exceed
    {"activation_checkpointing": True},
    {"matrix_lr_scale": 0.5},
    {"model": "tied"},
    {"model": "long", "rank": 68, "steps": 6},
]
FOR_GALORE: list[dict[str, Any]] = [
    {"basis": "svd"},
    {"basis": "randomized"},
    {"refresh": "together"} | LATE,
    {"refresh": "staggered"} | LATE,
    *({"proj_type": sides} for sides in ("reverse_std", "left", "right", "full")),
    {"moments": "project"},
    {"moments": "reset"},
    {"moments": "project", "proj_type": "full"},
    {"clip_norm": "projected"},
    {"clip_norm": "full"},
]
FULL, NONE, PROJECTED = {"shard": "full"}, {"shard": "none"}, {"shard": "none", "reduce": "projected"}
Way = tuple[str, str, bool, int, int]
"""How a cell is trained: dtype, numerics, whether layerwise, micro-batches, whether clipped."""
WAYS: list[Way] = list(itertools.product(("float32", "bfloat16"), NUMERICS, (False, True), (1, 2), (0, 1)))
WAYS_OF_MORE: list[Way] = [
    ("bfloat16", "sound", True, 2, 1),
    ("float32", "reference", False, 2, 1),
    ("float32", "sound", False, 1, 1),
    ("bfloat16", "reference", True, 1, 0),
]


@dataclass(frozen=True)
class Cell:
    """A training: a row, a way, what else is given, and the options by which two processes share it."""

    row: str
    way: Way
    more: dict[str, Any] = field(default_factory=dict)
    sharing: dict[str, str] | None = None

    @property
    def name(self) -> str:
        dtype, numerics, layerwise, micro, clip = self.way
        words = [self.row, {"float32": "fp32", "bfloat16": "bf16"}[dtype], numerics]
        words += ["layerwise" if layerwise else "global", f"micro={micro}", f"clip={clip}"]
        options = self.more | ({"processes": 2} | self.sharing if self.sharing else {})
        return " ".join(words + [f"{key}={value}".replace(" ", "") for key, value in options.items()])

    def config(self, folder: Path) -> RunConfig:
        """The config is that of a run with these flags; ``folder`` holds the models."""
        dtype, numerics, layerwise, micro, clip = self.way
        model = "deep" if self.sharing and not self.more else "tiny"
        options = {"model": model} | GIVEN | self.more | (self.sharing or {})
        useless = {"bad", *without_meaning(self.row)}
        given = {key: value for key, value in options.items() if key not in useless}
        given |= {"optim": self.row, "dtype": dtype, "numerics": numerics, "layerwise": layerwise}
        given |= {"batch_size": ROWS // micro // (2 if self.sharing else 1), "grad_clip": 0.5 * clip}
        given["model"] = str(folder / f"{given['model']}.json")
        return resolve(given, dict.fromkeys(given, "flag"), Processes.started())[0]


def cells() -> Iterator[Cell]:
    """Cells come row by row; a quarter of them comes again, for two processes."""
    for row in METHODS:
        r = crc32(row.encode())  # not its place in the table, which another row would move
        again: list[tuple[Way, dict[str, Any]]] = []
        for i, way in enumerate(WAYS):
            yield Cell(row, way)
            dtype, numerics, layerwise, micro, clip = (i >> bit & 1 for bit in (4, 3, 2, 1, 0))
            if (dtype ^ layerwise ^ micro) + 2 * (numerics ^ micro ^ clip) == r % 4:  # has each value equally often
                again.append((way, {}))
        options = FOR_ALL + (FOR_GALORE if "galore" in row else [])
        for i, (more, j) in enumerate(itertools.product(options, (0, 1))):
            way = WAYS_OF_MORE[(i // 2 + j + r) % 4]
            yield Cell(row, way, more)
            if (i + r) % 4 == 0 and "bad" not in more:  # no hook of a weight sees what FSDP2 reduces
                again.append((way, more))
        for turn, (way, more) in enumerate(sorted(again, key=lambda pair: pair[0][2]), r):
            yield Cell(row, way, more, (FULL, NONE)[turn % 2])
            if "galore" in row and way[2]:
                yield Cell(row, way, more, PROJECTED)


def batch(update: int, config: RunConfig, world: World) -> Batch:
    """This process's rows of an update; all but the first of them all lack labels at their ends."""
    generator = torch.Generator().manual_seed(update)
    rows = torch.randint(TINY["vocab_size"], (ROWS, config.max_length + 1), generator=generator)
    inputs, labels = rows[:, :-1], rows[:, 1:].clone()
    for i, row in enumerate(labels):
        row[config.max_length - 2 * i :] = IGNORE
    inputs, labels = (part.chunk(world.size)[world.rank] for part in (inputs, labels))
    return Batch(inputs, labels, inputs.numel(), {"epoch": 0})


def spoil(model: Any, number: int) -> None:
    """The first matrix of ``model`` gets a gradient that is not finite in backward pass ``number`` alone, from 0."""
    passes = itertools.count()
    matrix = next(p for p in model.model.layers.parameters() if p.requires_grad)
    matrix.register_hook(lambda grad: grad * math.nan if next(passes) == number else grad)


def train(cell: Cell, config: RunConfig, world: World) -> tuple[str, str]:
    """A training is built and run as run.py does; its digests are those of this process's parts."""
    architecture, position = load_model_config(config.model), TrainingPosition()
    model = model_for(config, architecture, config.device, mesh=world.mesh, position=position)
    optimizer = optimizer_for(config, set_up_model(config, model), world.mesh)
    factors = factors_of(config)
    if "bad" in cell.more:
        spoil(model, cell.more["bad"])
    schedule = Schedule(**{f.name: getattr(config, f.name) for f in fields(Schedule)})
    trainer = Trainer(
        model=model, batches=(), optimizer=optimizer, execution=execution_for(config, optimizer), schedule=schedule,
        after_update=partial(factors.after_update, model, optimizer) if factors else lambda step: None,
        evaluate=None, checkpoints=None, keep_rows=lambda *skipped: None, loggers=(), state=TrainState(),
        batch_size=config.batch_size, eval_every=config.eval_every, save_every=config.save_every,
        mean_of_means=config.numerics == "reference", max_loss=config.max_loss or math.inf,
        device=torch.device(config.device), world=world, position=position,
    )  # fmt: skip
    reports = [trainer.train_step(batch(update, config, world)) for update in range(config.steps)]
    seen = ("loss", "lr", "grad_norm", "skipped_tensors", "failed_refreshes")
    weights: list[Any] = [report.get(name) for report in reports for name in seen]
    states = []
    for _, p in model.named_parameters():
        weights.append(p)
        states.append(digest(*sorted(digest(leaf) for leaf in leaves(optimizer.state.get(p)))))
    return digest(*weights), digest(*states)


def leaves(value: Any) -> Iterator[Any]:
    """What a state holds comes without its names, which may change."""
    if isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(part)
    elif value is not None:
        yield value


def digest(*values: Any) -> str:
    """Tensors count by dtype, shape and bytes, of the part at hand; anything else as it is written."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            here = value.detach().to_local() if hasattr(value, "to_local") else value.detach()
            found.update(f"{here.dtype} {tuple(here.shape)} ".encode())
            found.update(here.flatten().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            found.update(f"{value!r} ".encode())
    return found.hexdigest()[:16]


def fingerprint(chosen: Sequence[Cell], folder: Path) -> dict[str, str]:
    """Each cell gives a line, which the main process prints as it comes."""
    lines = {}
    for shard in sorted({cell.sharing["shard"] if cell.sharing else "" for cell in chosen}):
        sharing = {"shard": shard} if shard else None
        with joined(Cell("adamw", WAYS[0], {}, sharing).config(folder)) as world:  # once, for all that share alike
            for cell in chosen:
                if (cell.sharing or {}).get("shard", "") != shard:
                    continue
                try:
                    found: list[Any] = [train(cell, cell.config(folder), world)]
                    if world.size > 1:
                        mine, found = found[0], [None] * world.size
                        distributed.all_gather_object(found, mine)
                    weights, state = (digest(*parts) for parts in zip(*found, strict=True))
                    lines[cell.name] = f"weights {weights} state {state}"
                except (InputError, ValueError) as error:
                    lines[cell.name] = f"refused: {str(error)[:60]}"
                if world.is_main:
                    print(cell.name, "->", lines[cell.name], flush=True)
    return lines


def settle_down() -> None:
    """Nothing that this process computes shall depend on threads, or on memory that nobody has written."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def one_of_two(rank: int, chosen: Sequence[Cell], folder: Path) -> None:
    """One of two processes trains the cells that they share; the first leaves the lines in ``folder``."""
    settle_down()
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    lines = fingerprint(chosen, folder)
    if rank == 0:
        (folder / "lines.json").write_text(json.dumps(lines))
    distributed.destroy_process_group()


def compare(lines: Mapping[str, str], before: Mapping[str, str]) -> int:
    """What differs is printed; the exit code says whether anything does."""
    names = {**before, **lines}
    differ = [name for name in names if before.get(name) != lines.get(name)]
    for name in differ:
        print(f"{name}\n  before: {before.get(name, 'missing')}\n  now:    {lines.get(name, 'missing')}")
    print(f"{len(names) - len(differ)} lines equal, {len(differ)} differ")
    return 1 if differ else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the lines there")
    parser.add_argument("--only", default="", help="cells with this in their names")
    parser.add_argument("--processes", choices=("1", "2", "both"), default="both", help="cells of so many")
    parser.add_argument("--compare", type=Path, help="a file of --out; of it, the cells that were asked for count")
    arguments = parser.parse_args()

    def is_wanted(name: str) -> bool:
        count = "2" if "processes=2" in name else "1"
        return arguments.only in name and arguments.processes in (count, "both")

    settle_down()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, architecture in MODELS.items():
            (folder / f"{model}.json").write_text(json.dumps(architecture))
        chosen = [cell for cell in cells() if is_wanted(cell.name)]
        alone, shared = ([cell for cell in chosen if bool(cell.sharing) == two] for two in (False, True))
        pair = multiprocessing.spawn(one_of_two, (shared, folder), nprocs=2 if shared else 0, join=False, daemon=True)
        lines = fingerprint(alone, folder)
        while not pair.join():
            pass
        if shared:
            lines |= json.loads((folder / "lines.json").read_text())
    if arguments.out:
        arguments.out.write_text("".join(f"{cell} -> {line}\n" for cell, line in lines.items()))
    if arguments.compare:
        parts = [line.partition(" -> ") for line in arguments.compare.read_text().splitlines()]
        sys.exit(compare(lines, {cell: line for cell, _, line in parts if is_wanted(cell)}))


if __name__ == "__main__":
    main()
