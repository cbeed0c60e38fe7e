"""Optimizers of others' training, in two processes, for test_protocol.py."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from galore_pretrain.optim import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GlobalStep,
    Layerwise,
    NaturalGaLoreAdamW,
    build_optimizer,
)

# 8-bit moments have blocks of 256 elements of the whole. Rows of 256, and 256 rows a part, have parts begin where
# blocks do. The MLP has more rows than columns, so its low-rank moments have all rows, and are cut as it is.
IN, OUT, LONG, RANK = 256, 32, 512, 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.Linear(IN, OUT)
        self.norm = nn.LayerNorm(OUT)
        self.mlp = nn.Linear(OUT, LONG)
        self.head = nn.Linear(LONG, 5)
        self.score = nn.Linear(5, 1)  # the first process has all of it, the second nothing

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.head(self.mlp(self.norm(self.attn(x)).relu())))  # type: ignore[no-any-return]


def sharded() -> Net:
    net = Net()
    for part in net.children():
        fully_shard(part)
    return net


def build(optimizer_class: Any, net: Net) -> Any:
    matrices = [net.attn.weight, net.mlp.weight]
    rest = [p for p in net.parameters() if p is not net.attn.weight and p is not net.mlp.weight]
    more: dict[str, Any] = {}
    if optimizer_class is GaLoreAdafactor:
        more = {"scale_parameter": False, "relative_step": False}
    return optimizer_class(
        [{"params": rest}, {"params": matrices, "rank": RANK, "update_proj_gap": 4, "scale": 0.25}], lr=0.01, **more
    )


def train(net: nn.Module, optimizer: Any, first: int, last: int, rank: int) -> None:
    for i in range(first, last):
        x = torch.randn(4, IN, generator=torch.Generator().manual_seed(10 * i + rank))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def whole(net: nn.Module) -> list[Tensor]:
    values = [p.detach() for p in net.parameters()]
    return [(value.full_tensor() if isinstance(value, DTensor) else value).clone() for value in values]


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def check_moment(optimizer: Any, saved: dict[str, Any]) -> None:
    """A moment that is cut is saved as a DTensor of the whole; one in blocks of 8 bits whole."""
    if isinstance(optimizer, GaLoreAdamW8bit):
        assert saved["exp_avg"].dtype == torch.uint8
        assert saved["exp_avg"].shape == (LONG, RANK)
        return
    name, shape = "exp_avg", (LONG, RANK)
    if isinstance(optimizer, GaLoreAdafactor):
        name, shape = "row", (LONG,)
    assert isinstance(saved[name], DTensor)
    assert saved[name].shape == shape
    assert saved[name].to_local().shape == (LONG // 2, *shape[1:])


def check_checkpoints(make: Callable[[Net], Any], folder: str, rank: int) -> None:
    """Saved after five updates, then loaded in several ways into an optimizer that has made none."""
    net = sharded()
    optimizer = make(net)
    train(net, optimizer, 0, 5, rank)
    name = f"{folder}/{type(optimizer).__name__}"
    weights, states = get_state_dict(net, optimizer)
    check_moment(optimizer, states["state"]["mlp.weight"])  # type: ignore[arg-type]
    dcp.save({"weights": weights, "states": states}, checkpoint_id=name)
    options = StateDictOptions(full_state_dict=True)
    full = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    own = copy.deepcopy(optimizer.state_dict())
    parts = {key: dict(optimizer.state[p]) for key, p in enumerate(params_of(optimizer))}  # as an older version saved
    older = copy.deepcopy({"state": parts, "param_groups": own["param_groups"]})
    kept = copy.deepcopy(net.state_dict())
    train(net, optimizer, 5, 8, rank)
    want = whole(net)
    for way in ("checkpoint", "full", "broadcast", "own", "older"):
        net = sharded()
        optimizer = make(net)
        weights, states = get_state_dict(net, optimizer)
        if way == "checkpoint":
            box: dict[str, Any] = {"weights": weights, "states": states}
            dcp.load(box, checkpoint_id=name)
            set_state_dict(net, optimizer, model_state_dict=box["weights"], optim_state_dict=box["states"])
        else:
            net.load_state_dict(kept)
        if way == "full":
            set_optimizer_state_dict(net, optimizer, full, options=options)
        elif way == "broadcast":
            from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(net, optimizer, full if rank == 0 else {}, options=from_first)
        elif way != "checkpoint":
            optimizer.load_state_dict(own if way == "own" else older)
        train(net, optimizer, 5, 8, rank)
        found = largest_difference(want, whole(net))
        assert found < 1e-6, (type(optimizer).__name__, way, found)


def check_a_look() -> None:
    """Trained after its state was looked at, or before, by gradients that are zero in one process alone."""
    results = []
    for is_looked_at in (False, True):
        net = sharded()
        optimizer = build(GaLoreAdamW, net)
        if is_looked_at:
            get_optimizer_state_dict(net, optimizer)
        train(net, optimizer, 0, 5, distributed.get_rank())
        results.append(whole(net))
    assert largest_difference(*results) == 0
    net = sharded()
    optimizer = build(GaLoreAdamW, net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
        local = p.grad.to_local()  # type: ignore[attr-defined]
        local += distributed.get_rank()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {1}


def check_an_exchange(rank: int) -> None:
    """As accelerate does it: made for a model in one piece, which is then shared out, and trained by an execution."""
    results = []
    for execution_class in (None, GlobalStep, Layerwise):
        net = sharded()
        if execution_class is None:
            optimizer = build(GaLoreAdamW, net)
            train(net, optimizer, 0, 5, rank)
        else:
            before = Net()
            optimizer = build(GaLoreAdamW, before)
            pairs = dict(zip(before.parameters(), net.parameters(), strict=True))
            for group in optimizer.param_groups:
                group["params"] = [pairs[p] for p in group["params"]]
            execution = execution_class(optimizer)
            for i in range(5):
                x = torch.randn(4, IN, generator=torch.Generator().manual_seed(10 * i + rank))
                execution.begin(0, 1)
                net(x).square().mean().backward()
                execution.complete()
        results.append(whole(net))
    assert largest_difference(results[0], results[1]) < 1e-6
    assert largest_difference(results[0], results[2]) < 1e-6


def check_places(rank: int) -> None:
    """Optimizers of one parameter have the same places in processes whose values differ, as before a broadcast."""
    places: list[Any] = []
    for value in (rank, 1):
        p = nn.Parameter(torch.full((8, 4), float(value)))
        optimizer = GaLoreAdamW([{"params": [p], "rank": 2}])
        places.append(optimizer.param_groups[0]["first_index"])
    places_of_all: list[Any] = [None, None]
    distributed.all_gather_object(places_of_all, places)
    assert places_of_all[0] == places_of_all[1]
    assert places[0] != places[1]


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_tensor_parallelism() -> None:
    """Columns, rows, a bias that all have, and a norm of whose gradient each has a term: as one process."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {"attn": ColwiseParallel(), "head": RowwiseParallel()}
    results = []
    for is_shared in (False, True):
        net = nn.ModuleDict({"attn": nn.Linear(IN, OUT), "head": nn.Linear(OUT, 6)})
        torch.manual_seed(0)
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
        if is_shared:
            net = parallelize_module(net, mesh, plan)
        rest = [net["attn"].bias, net["head"].bias]
        matrices = [net["attn"].weight, net["head"].weight]
        optimizer = GaLoreAdamW([{"params": rest}, {"params": matrices, "rank": 4, "update_proj_gap": 4}], lr=0.01)
        for i in range(6):
            optimizer.zero_grad()
            x = torch.randn(4, IN, generator=torch.Generator().manual_seed(i))
            net["head"](net["attn"](x).relu()).square().mean().backward()
            optimizer.step()
        results.append(whole(net))
    assert largest_difference(*results) < 1e-5


def check_partial_gradients() -> None:
    """Sequence parallelism shows each process some of the rows: a norm's gradient is a sum that is still to make."""
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for is_shared in (False, True):
        net: nn.Module = nn.Sequential(nn.LayerNorm(8))
        if is_shared:
            net = parallelize_module(net, mesh, {"0": SequenceParallel(sequence_dim=0)})
        optimizer = GaLoreAdamW([{"params": list(net.parameters())}], lr=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i in range(3):
                optimizer.zero_grad()
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
                if is_shared:
                    x = x.chunk(2)[distributed.get_rank()]
                y = net(x)
                loss = (y * y * y).sum()
                loss.backward()
                optimizer.step()
        results.append(whole(net))
    assert largest_difference(*results) < 1e-5


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    distributed.broadcast_object_list(folder)
    for optimizer_class in (GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor, NaturalGaLoreAdamW):
        check_checkpoints(lambda net, made=optimizer_class: build(made, net), folder[0], rank)  # type: ignore[misc]
    check_checkpoints(lambda net: build_optimizer(net, "galore_adamw", lr=0.01, rank=RANK), folder[0], rank)
    check_a_look()
    check_an_exchange(rank)
    check_places(rank)
    check_tensor_parallelism()
    check_partial_gradients()
    distributed.barrier()  # a process whose peer is gone may not end in peace
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
