"""Runs of the real command line, one after another in each of the processes that torchrun starts: so that many cases
cost one start. ``torchrun … tests/worlds.py CASES.json``, where that holds lists of arguments.

At the end of each run, what processes hold alike must be alike bit for bit.
"""

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from galore_pretrain import cli, run
from galore_pretrain.config.options import Processes
from galore_pretrain.tensors.shards import local
from own_rules import register

FULL = bool(os.environ.get("FULL"))
optimizers: list[Any] = []
optimizer_for, export = run.optimizer_for, run.export


def check_replicas(folder: Path, model: Any, *rest: Any) -> None:
    """Before the model is exported."""
    mesh = rest[-1].mesh
    if mesh is not None and mesh.ndim == 2:
        mine = [digest(local(p)) for p in model.parameters()]
        replicas: list[Any] = [None] * mesh.size(0)
        distributed.all_gather_object(replicas, mine, group=mesh.get_group(0))
        assert all(other == mine for other in replicas), "weights differ between replicas"
    if mesh is not None:
        states = optimizers[-1].state.values()
        alike = [(name, value) for state in states for name, value in state.items()]
        bases = [digest(value) for name, value in alike if "basis" in name or name == "schedule"]
        everywhere: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everywhere, bases)
        assert all(other == bases for other in everywhere), "bases differ between processes"
    export(folder, model, *rest)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().clone().view(torch.uint8).numpy().tobytes()).hexdigest()


def noted(*arguments: Any) -> Any:
    optimizers[:] = [optimizer_for(*arguments)]
    return optimizers[-1]


def main() -> None:
    if Processes.started().total > 1:
        distributed.init_process_group("gloo")
    register()
    logging.getLogger("galore_pretrain").addHandler(logging.StreamHandler(sys.stderr))
    run.export, run.optimizer_for = check_replicas, noted  # type: ignore[attr-defined]
    if not FULL:  # layers are traced, and torch's own operations run them: no C++ is written and compiled
        compiled = nn.Module.compile
        nn.Module.compile = lambda layer: compiled(layer, backend="aot_eager")  # type: ignore[assignment]
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        code = cli.cli.main(args=arguments, standalone_mode=False)
        assert code == 0, (code, arguments)


if __name__ == "__main__":
    main()
