"""Updates of two replicas that sum their gradients themselves, with the norms found as on a GPU, for test_dist.py.

Prints JSON: of each dtype, what both replicas came to.
"""

import json
from unittest.mock import patch

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.execution import Layerwise
from galore_pretrain.optim.optimizer import RuleOptimizer


def main() -> None:
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("replicas", "shards"))
    told = {}
    for dtype in (torch.float32, torch.bfloat16):
        with patch("galore_pretrain.optim.slots.is_gpu", lambda device: True):
            p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4, dtype=dtype), mesh["shards"], [Shard(0)]))
            optimizer = RuleOptimizer([{"params": [p], "rule": Adam()}], lr=0.1)
            optimizer.sum_over_replicas(mesh)
            execution = Layerwise(optimizer, 1.0, projected=True)
            norms = []
            for update in range(3):
                execution.begin(0, 1)
                gradient = torch.full((4, 4), (1.0 + 2.0 * rank) * (update + 1) ** 2).to(dtype)
                (p * distribute_tensor(gradient, mesh["shards"], [Shard(0)])).sum().backward()
                execution.complete()
                norms.append(execution.outcome().grad_norm)
        of_replica = [norms, p.to_local().tolist()]  # type: ignore[attr-defined]
        gathered: list[object] = [None] * size
        distributed.all_gather_object(gathered, of_replica)
        told[str(dtype)] = gathered
    if rank == 0:
        print(json.dumps(told))
    distributed.destroy_process_group()
