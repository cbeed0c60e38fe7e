"""Real updates of processes that torchrun started, and what they send: for test_dist.py. Prints JSON.

    torchrun --nproc_per_node 4 tests/messages.py MODEL ROW,ROW RANK

Of each way to share the model, on average over the processes, two of which are said to be a host: an update in which
nothing is due, and what the one before, in which all bases are, sent for them.
"""

import itertools
import json
import sys
from typing import Any

from torch import distributed

from galore_pretrain.config.options import Processes, RunConfig
from galore_pretrain.config.resolve import resolve
from galore_pretrain.dist import joined
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.planning.plan import make_update
from galore_pretrain.planning.traffic import FLOPS, Counter
from galore_pretrain.train.build import execution_for, model_for, optimizer_for, set_up_model

WAYS = [*itertools.product(("full", "hybrid", "none"), ("full",)), ("hybrid", "projected"), ("none", "projected")]


def config_of(model: str, row: str, shard: str, reduce: str, rank: int) -> RunConfig:
    given: dict[str, Any] = {"model": model, "optim": row, "shard": shard, "reduce": reduce, "layerwise": True}
    given |= {"batch_size": 1, "total_batch_size": 12, "max_length": 16, "steps": 10, "data": "sample"}
    given |= {"grad_clip": 0.0, "dtype": "bfloat16"}
    if "galore" in row:
        given |= {"refresh": "together", "rank": rank, "update_proj_gap": 1000}
    return resolve(given, dict.fromkeys(given, "flag"), Processes(4, 2))[0]


def main() -> None:
    model, rows, rank = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3])
    found = {}
    with joined(config_of(model, rows[0], "full", "full", rank)):
        for row, (shard, reduce) in itertools.product(rows, WAYS):
            if reduce == "projected" and "galore" not in row:
                continue
            config = config_of(model, row, shard, reduce, rank)
            with joined(config) as world:
                model_ = model_for(config, load_model_config(model), mesh=world.mesh)
                optimizer = optimizer_for(config, set_up_model(config, model_), world.mesh)
                execution = execution_for(config, optimizer)
                with Counter(processes_here=2) as due:
                    make_update(config, model_, execution, config.micro_batches)
                with Counter(processes_here=2) as counter:
                    make_update(config, model_, execution, config.micro_batches)
            own = {key: size for key, size in due.counts.items() if key[0] in ("gather", "broadcast")} | counter.counts
            everywhere: list[Any] = [None] * world.size
            distributed.all_gather_object(everywhere, {key: size for key, size in own.items() if key != FLOPS})
            found[f"{row} {shard} {reduce}"] = {
                f"{name} {far}": mean
                for name, far in sorted(set().union(*everywhere))
                if (mean := sum(sent.get((name, far), 0.0) for sent in everywhere) / world.size)
            }
        if world.is_main:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
