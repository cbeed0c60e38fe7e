"""Real updates of processes that torchrun started, and what they send: for test_dist.py. Prints JSON.

    torchrun --nproc_per_node 4 tests/messages.py MODEL ROW,ROW RANK

On the first process of each way to share the model; two processes are said to be a host. Nothing is due.
"""

import itertools
import json
import os
import sys
from typing import Any

from galore_pretrain.build import execution_for, model_for, optimizer_for, prepare
from galore_pretrain.config import RunConfig
from galore_pretrain.dist import joined
from galore_pretrain.model import load_model_config
from galore_pretrain.plan import make_update
from galore_pretrain.recipes import resolve
from galore_pretrain.traffic import FLOPS, Counter

WAYS = [*itertools.product(("full", "hybrid", "none"), ("full",)), ("hybrid", "projected"), ("none", "projected")]


def config_of(model: str, row: str, shard: str, reduce: str, rank: int) -> RunConfig:
    given: dict[str, Any] = {"model": model, "optim": row, "shard": shard, "reduce": reduce, "layerwise": True}
    given |= {"batch_size": 1, "total_batch_size": 12, "max_length": 16, "steps": 10, "data": "sample"}
    given |= {"grad_clip": 0.0, "dtype": "bfloat16"}
    if "galore" in row:
        given |= {"refresh": "together", "rank": rank, "update_proj_gap": 1000}
    return resolve(given, dict.fromkeys(given, "flag"))[0]


def main() -> None:
    model, rows, rank = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3])
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    found = {}
    with joined(config_of(model, rows[0], "full", "full", rank)):
        for row, (shard, reduce) in itertools.product(rows, WAYS):
            if reduce == "projected" and "galore" not in row:
                continue
            config = config_of(model, row, shard, reduce, rank)
            with joined(config) as world:
                model_ = model_for(config, load_model_config(model), mesh=world.mesh)
                optimizer = optimizer_for(config, prepare(config, model_), world.mesh)
                execution = execution_for(config, optimizer)
                make_update(config, model_, execution, config.micro_batches)  # all bases are due
                with Counter() as counter:
                    make_update(config, model_, execution, config.micro_batches)
            del counter.found[FLOPS]
            found[f"{row} {shard} {reduce}"] = {f"{name} {far}": size for (name, far), size in counter.found.items()}
        if world.is_main:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
