"""Updates of tensors that processes share, and of the same ones whole: for torchrun, see test_dist.py."""

import itertools
import os
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from galore_pretrain.optim import METHODS, GaLore, RuleOptimizer, build_optimizer
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.build import REGISTRY
from galore_pretrain.optim.execution import GlobalStep, Layerwise
from galore_pretrain.optim.fira import Fira
from galore_pretrain.tensors.shards import whole
from own_rules import GaLoreAndRest, NewtonSchulz, RowNorms, SignOfAverage
from prescribed import meant_for

FULL = bool(os.environ.get("FULL"))
SOME = ("adamw8bit", "adafactor", "galore_adamw8bit", "natural_galore", "apollo", "muon", "scale")
"""What four processes share besides two, unless all is asked for: a row of each way to lie. Of these, tensors as small
as `FEW` are left to four."""
ALIGNED = {"tall": (256, 128), "wide": (128, 1024), "square": (256, 256), "head": (256, 128), "norm": (512,)}
FEW = {"tall": (5, 4), "wide": (4, 5), "square": (5, 5), "head": (5, 4), "norm": (5,)}  # the last of four has none
UNEVEN = {"tall": (101, 30), "wide": (30, 101), "square": (34, 34), "head": (33, 20), "norm": (33,)}
RANKS = {(256, 128): 16}
"""By the shape of the tall matrix; else 8. Moments of 4096 elements are the smallest that are kept in 8 bits."""
PAIRWISE = (0, 7, 9, 15, 16, 22)
"""Of `check_fira`'s cases, so many that each value of a setting meets each value of the others."""


class Model(nn.Module):
    """Two kinds of parameters: matrices of an mlp, and others."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.mlp = nn.Module()
        for name, shape in shapes.items():
            value = random(shape, name, 0).to(dtype)
            if mesh is not None:
                value = shared(value, name, mesh)
            if name in ("tall", "wide", "square"):
                linear = nn.Linear(1, 1, bias=False)
                linear.weight = nn.Parameter(value)
                setattr(self.mlp, name, linear)
            else:
                setattr(self, name, nn.Parameter(value))


def random(shape: tuple[int, ...], name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step * 100 + sum(map(ord, name)))
    scales = torch.logspace(0, -3, shape[-1])  # so that subspaces are told apart
    return torch.randn(shape, generator=generator) * scales


def shared(value: Tensor, name: str, mesh: DeviceMesh) -> DTensor:
    columns = name == "wide" and value.shape[1] % mesh.size(-1) == 0
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(int(columns))]
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def name_of(parameter: str) -> str:
    return parameter.removesuffix(".weight").rpartition(".")[2]


def compare(row: str, shapes: Any, dtype: torch.dtype, mesh: DeviceMesh, order: float = inf, **options: Any) -> float:
    """After four updates: how far weights are apart, over the way that they have come (norms of that ``order``)."""
    models = [Model(shapes, dtype, m) for m in (None, mesh)]
    before = [p.detach().clone() for p in models[0].parameters()]
    more = meant_for(row, rank=RANKS.get(shapes["tall"], 8), update_proj_gap=3)
    optimizers = [build_optimizer(m, row, lr=0.01, **{**more, **options}) for m in models]
    for step, (model, optimizer) in itertools.product(range(1, 5), zip(models, optimizers, strict=True)):
        for name, p in model.named_parameters():
            grad = random(tuple(p.shape), name, step).to(dtype)
            if step == 2 and name == "norm":  # one process alone has this element, and all must skip the tensor
                grad[0] = torch.nan
            p.grad = shared(grad, name_of(name), mesh) if isinstance(p, DTensor) else grad
        optimizer.step()
    assert [o.read_skips().skipped for o in optimizers] == [1, 1], row
    overlaps = [o.overlaps.take() for o in optimizers]
    assert overlaps[1] == pytest.approx(overlaps[0], abs=0.01), row
    alone, together = ([whole(p).float() for p in m.parameters()] for m in models)
    norms = [
        [torch.linalg.vector_norm(x, order).item() for x in (a - b, a - c.float())]
        for a, b, c in zip(alone, together, before, strict=True)
    ]
    return max(apart / way for apart, way in norms)


def check_collectives(mesh: DeviceMesh) -> None:
    """Between refreshes an update is one message: which gradients are not finite. A refresh gathers the due ones."""
    model = Model(ALIGNED, torch.float32, mesh)
    optimizer = build_optimizer(model, "galore_adamw", lr=0.01, rank=8, update_proj_gap=3, refresh="together")
    counts = []
    for step in range(1, 5):
        for name, p in model.named_parameters():
            p.grad = shared(random(tuple(p.shape), name, step), name_of(name), mesh)
        with CommDebugMode() as mode:
            optimizer.step()
        counts.append({str(op).partition(".")[2]: n for op, n in mode.get_comm_counts().items()})
    due = {"gather_": 3, "broadcast_": 6}  # each basis, and whether it is better
    assert counts[1] == counts[2] == {"allreduce_": 1}, counts
    assert counts[0] == counts[3] == {"allreduce_": 1, **due}, counts


def check_storage(mesh: DeviceMesh) -> None:
    """What FSDP2 reduces for a layer lies in one storage, which must not be kept for the sake of a norm's part."""
    model = Model({"tall": (64, 32), "norm": (64,)}, torch.float32, mesh)
    optimizer = build_optimizer(model, "galore_adamw", lr=0.01, rank=8)
    norm = model.norm
    storage = torch.randn(1000)
    norm.grad = DTensor.from_local(storage[: whole(norm).numel() // mesh.size()], mesh, [Shard(0)])  # type: ignore[assignment]
    optimizer.pending.accumulate(norm, compress=True)  # type: ignore[arg-type]
    waiting = optimizer.pending.get(norm)  # type: ignore[arg-type]
    assert waiting is not None
    assert waiting.grad.untyped_storage().nbytes() == waiting.grad.nbytes


def check_own_rules(mesh: DeviceMesh) -> None:
    """Rules from a file of one's own come to what one process comes to, bit for bit, tensors cut by rows and columns;
    what cannot be shared out is refused. A column of parts is summed in no other order, so nothing else is allowed.
    Each rule meets each shape and each dtype; all of them together with FULL=1."""
    rules, dtypes = (SignOfAverage(), RowNorms(), NewtonSchulz()), (torch.float32, torch.bfloat16)
    cases = itertools.product(enumerate(rules), enumerate((ALIGNED, UNEVEN, FEW)), enumerate(dtypes))
    for (i, rule), (j, shapes), (k, dtype) in cases:
        if not FULL and (i + j + k) % 2:
            continue
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        if dtype == torch.bfloat16:
            del matrices["wide"]  # columns are rounded with other bits
        models = [Model(matrices, dtype, m) for m in (None, mesh)]
        runs = [
            RuleOptimizer([{"params": list(m.parameters()), "rule": rule}], lr=0.01, weight_decay=0.1) for m in models
        ]
        executions = [Layerwise(optimizer) for optimizer in runs]
        for step, part in itertools.product(range(1, 4), range(2)):
            for model, execution in zip(models, executions, strict=True):
                execution.begin(part, 2)
                loss = torch.zeros(())
                for name, p in model.named_parameters():
                    grad = random(tuple(p.shape), name, 10 * part + step).to(dtype)
                    grad = shared(grad, name_of(name), mesh).to_local() if isinstance(p, DTensor) else grad
                    loss = loss + _local(p).mul(grad).sum()
                loss.backward()
                if part:
                    execution.complete()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p, whole(q)), (rule, tuple(p.shape), dtype)
    model = Model({"tall": (64, 32)}, torch.float32, mesh)
    for refused, words in ((GaLoreAndRest(), "renews bases"), (GaLore(NewtonSchulz(), rank=8), "low-rank gradient")):
        with pytest.raises(ValueError, match=words):
            RuleOptimizer([{"params": list(model.parameters()), "rule": refused}])


def check_fira(mesh: DeviceMesh) -> None:
    """A rule that renews bases and does not project: cut across its channels and along them, after backward and in it;
    of two micro-batches and clipped, whose bases are due at an update of their own. All cases with FULL=1."""
    even = {"tall": (96, 32), "wide": (32, 96), "square": (36, 36)}
    two_shapes = (even, UNEVEN) if mesh.size() == 2 else (UNEVEN, FEW)
    cases = list(itertools.product(two_shapes, ("std", "left", "right"), (GlobalStep, Layerwise), (0.0, 0.5)))
    if not FULL:
        cases = [cases[number] for number in PAIRWISE]
    for shapes, proj_type, mode, clip in cases:
        rule = Fira(Adam(), 8, update_proj_gap=3, proj_type=proj_type, basis="random", moments="project")
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        models = [Model(matrices, torch.float32, m) for m in (None, mesh)]
        before = [p.detach().clone() for p in models[0].parameters()]
        executions = [
            mode(RuleOptimizer([{"params": list(m.parameters()), "rule": rule}], lr=0.01), clip) for m in models
        ]
        for step, part in itertools.product(range(1, 6), range(2)):
            for model, execution in zip(models, executions, strict=True):
                execution.begin(part, 2)
                loss = torch.zeros(())
                for name, p in model.named_parameters():
                    grad = random(tuple(p.shape), name, 10 * part + step)
                    grad = shared(grad, name_of(name), mesh).to_local() if isinstance(p, DTensor) else grad
                    loss = loss + _local(p).mul(grad).sum()
                loss.backward()
                if part:
                    execution.complete()
        alone, together = ([whole(p) for p in m.parameters()] for m in models)
        for a, b, c in zip(alone, together, before, strict=True):
            apart = ((a - b).norm() / (a - c).norm()).item()
            assert apart < 2e-4, (shapes, proj_type, mode, clip, tuple(a.shape), apart)


def check_sums_over_replicas(dtype: torch.dtype, clip: float, tolerance: float) -> None:
    """Two layerwise micro-batches, whose low-rank gradients are summed over replicas here; one replica alone meets a
    gradient that is not finite, in the first micro-batch of the third update."""
    size, rank = distributed.get_world_size(), distributed.get_rank()
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("replicas", "shards"))
    models = [Model(UNEVEN, dtype, m) for m in (None, mesh["shards"])]
    before = [p.detach().clone() for p in models[0].parameters()]
    optimizers = [build_optimizer(m, "galore_adamw", lr=0.01, rank=8, update_proj_gap=3) for m in models]
    optimizers[1].sum_over_replicas(mesh)
    runs = [Layerwise(o, clip, projected=True) for o in optimizers]
    skipped = []
    for step in range(1, 6):
        for micro_batch in range(2):
            for which, (model, execution) in enumerate(zip(models, runs, strict=True)):
                execution.begin(micro_batch, 2)
                loss = torch.zeros(())
                for name, p in model.named_parameters():
                    parts = [random(tuple(p.shape), name, 100 * r + 10 * micro_batch + step) for r in range(size)]
                    if (step, micro_batch) == (3, 0) and "tall" in name:
                        parts[1][0, 0] = torch.inf
                    grad = (parts[rank] if which else sum(parts)).to(dtype)  # type: ignore[union-attr]
                    loss = loss + _local(p).mul(grad).sum()
                loss.backward()
        for execution in runs:
            execution.complete()
        skipped.append([execution.outcome().skipped for execution in runs])
    assert skipped == [[int(step == 3)] * 2 for step in range(1, 6)], skipped
    alone, together = ([whole(p).float() for p in m.parameters()] for m in models)
    everywhere: list[Any] = [None] * size
    distributed.all_gather_object(everywhere, together)
    assert all(torch.equal(a, b) for other in everywhere for a, b in zip(other, together, strict=True))
    for a, b, c in zip(alone, together, before, strict=True):
        apart = (a - b).norm() / (a - c.float()).norm()
        assert apart < tolerance, (dtype, clip, apart)


def _local(p: Tensor) -> Tensor:
    """What a gradient of goes to ``p``."""
    return p.to_local() if isinstance(p, DTensor) else p


def main() -> None:
    distributed.init_process_group("gloo")
    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shards",))
    everything = FULL or size == 2
    for row in REGISTRY if everything else SOME:
        in_8_bits = row in ("adamw8bit", "galore_adamw8bit")
        if everything or in_8_bits:
            found = compare(row, ALIGNED, torch.float32, mesh)
            assert found < (0.2 if row.startswith("q_") else 2e-4), (row, found)
            assert found == 0 or not in_8_bits, (row, found)
        for shapes in (UNEVEN,) if row in SOME and size == 2 and not FULL else (UNEVEN, FEW):
            found = compare(row, shapes, torch.float32, mesh)
            assert found < (0.2 if METHODS[row].moments_8bit else 2e-4), (row, shapes, found)
    ways: list[dict[str, Any]] = [
        {"numerics": "reference", "proj_type": "std", "moments": "keep"},
        {"numerics": "sound", "proj_type": "full", "moments": "keep"},
        {"numerics": "sound", "proj_type": "left", "moments": "project"},
    ]
    cases = list(itertools.product(("galore_adamw", "galore_adafactor", "natural_galore"), ways))
    # Of an SVD from both sides, all off the diagonal is rounding at first, which Adam would make as large as the rest.
    for basis, proj_type in itertools.product(("tracked", "random"), ("std", "left", "full")):
        cases.append(("galore_adafactor", {"basis": basis, "proj_type": proj_type}))
    for row in ("adam", "galore_adamw"):
        cases.append((row, {"weight_decay": 0.1}))
    for row, options in cases if everything else cases[::4]:  # by four processes, five of them
        found = compare(row, UNEVEN, torch.float32, mesh, **options)
        assert found < 2e-4, (row, options, found)
    rows = {name: shape for name, shape in ALIGNED.items() if name != "wide"}  # columns are rounded with other bits
    assert compare("adamw", rows, torch.bfloat16, mesh) == 0
    found = compare("galore_adamw", rows, torch.bfloat16, mesh, 2)
    assert found < 0.1, found
    if size == 4:
        replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        found = compare("galore_adamw8bit", ALIGNED, torch.float32, replicas)
        assert found == 0, found
    for clip in (0.0, 0.5):
        if everything or clip:
            check_sums_over_replicas(torch.float32, clip, 1e-3)
        if everything or not clip:
            check_sums_over_replicas(torch.bfloat16, clip, 0.2)  # other roundings
    check_own_rules(mesh)
    check_fira(mesh)
    check_collectives(mesh)
    check_storage(mesh)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
