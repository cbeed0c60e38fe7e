"""Time before the run: what an update computes and sends, counted on fake tensors, and the bound that follows."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

from galore_pretrain.build import device_of, execution_for, model_for, optimizer_for, prepare
from galore_pretrain.config import RunConfig, processes_here
from galore_pretrain.model import load_model_config
from galore_pretrain.optim.step import Abridgement, abridged
from galore_pretrain.plan import make_update

Counts = dict[Any, float]
FLOPS = "flops"
_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"


class Speeds(NamedTuple):
    """What the hardware can do at best: FLOP/s of a process, bytes/s that each sends and receives within a host, and
    bytes/s in and out of a host. None: not said."""

    flops: float | None = None
    link: float | None = None
    network: float | None = None


@dataclass(frozen=True)
class Traffic:
    """An update of one process. ``sent``: bytes by (collective, whether between hosts), as rings move them: what passes
    through each process, and for what goes between hosts, in and out of each host."""

    config: RunConfig
    flops: float
    sent: Mapping[tuple[str, bool], float]

    def through(self, *, network: bool) -> float:
        """Bytes of all collectives, within hosts or between them."""
        return sum(size for (_, between), size in self.sent.items() if between == network)

    def seconds_at_least(self, speeds: Speeds) -> dict[str, float]:
        """What an update takes if all it has to do overlaps perfectly, by what bounds it."""
        needs = (self.flops, self.through(network=False), self.through(network=True))
        names = ("compute", "links", "network")
        return {n: need / s for n, need, s in zip(names, needs, speeds, strict=True) if s and need}

    def as_json(self, speeds: Speeds) -> dict[str, Any]:
        """The keys that programs may rely on."""
        seconds = self.seconds_at_least(speeds)
        return {
            "flops": self.flops,
            "sent_bytes": {f"{name} {_where(between)}": size for (name, between), size in self.sent.items()},
            "seconds_at_least": seconds,
            "tokens_per_second_at_most": self._tokens() / max(seconds.values()) if seconds else None,
        }

    def table(self, speeds: Speeds) -> str:
        """What a person reads."""
        lines = [f"an update: {self.flops / 1e12:.1f} TFLOP of each process"]
        for (name, between), size in sorted(self.sent.items()):
            what = "in and out of each host" if between else "through each process"
            lines.append(f"{name:<15}{size / 2**30:9.3f} GiB   {_where(between)}, {what}")
        if seconds := self.seconds_at_least(speeds):
            slowest = max(seconds, key=lambda name: seconds[name])
            each = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
            lines.append(f"at most {self._tokens() / seconds[slowest]:,.0f} tokens/s, bound by {slowest} ({each})")
        return "\n".join(lines)

    def _tokens(self) -> int:
        return self.config.total_batch_size * self.config.max_length


def _where(between: bool) -> str:
    return "between hosts" if between else "within hosts"


def count(config: RunConfig, mesh: Any = None) -> Traffic:
    """The work and the messages of an update, a refresh's share of both included.

    The real update is made on fake tensors, of models with one and two layers and with one and two micro-batches: all
    further ones add the same.
    """
    architecture = load_model_config(config.model)
    layers, parts = architecture.num_hidden_layers, config.micro_batches
    gap = config.update_proj_gap
    together = replace(config, refresh="together") if gap else config

    def counted(layers: int, parts: int, *, due: bool = False) -> Counts:
        smaller = copy.deepcopy(architecture)
        smaller.num_hidden_layers = layers
        return _update(together, smaller, mesh, parts, due=due)

    first, layer = (counted(n, 1) for n in (1, 2))
    part, both = (counted(n, 2) for n in (1, 2)) if parts > 1 else (first, layer)
    due = [counted(n, 1, due=True) for n in (1, 2)] if gap else []
    total: dict[Any, float] = {}
    for key in set().union(first, layer, part, both, *due):
        a, b, c, d = (x[key] for x in (first, layer, part, both))
        total[key] = a + (layers - 1) * (b - a) + (parts - 1) * (c - a) + (layers - 1) * (parts - 1) * (d - b - c + a)
        if due and gap:
            one, two = due[0][key] - a, due[1][key] - b
            total[key] += (one + (layers - 1) * (two - one)) / gap
    flops = total.pop(FLOPS)
    return Traffic(config, flops, {key: size for key, size in total.items() if size})


def _update(config: RunConfig, architecture: LlamaConfig, mesh: Any, parts: int, *, due: bool) -> Counts:
    """One update of so many micro-batches, with all bases ``due`` or none."""
    if mesh is not None:
        import_module("torch.distributed._tools.fake_collectives")  # what they return of fake tensors
    model = model_for(config, architecture, "meta", mesh=mesh)
    optimizer_for(config, model, mesh)  # fills caches that fake tensors cannot
    with FakeTensorMode(allow_non_fake_inputs=True), device_of(config), abridged() as abridgement:
        model.to_empty(device=device_of(config))
        model.tie_weights()
        optimizer = optimizer_for(config, prepare(config, model), mesh)
        execution = execution_for(config, optimizer)
        for state in optimizer.state.values():
            state["step"] = 0 if due else 1
        counter = Counter(abridgement)
        with counter:
            make_update(config, model, execution, parts)
        return counter.found


class Counter(TorchDispatchMode):
    """Counts products and messages of what is done while it is active, on fake tensors or real ones."""

    def __init__(self, abridgement: Abridgement | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._abridgement = abridgement or Abridgement()
        self.found: Counts = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if func.namespace == "c10d":
            self._message(packet.__name__, args)
        elif (formula := flop_registry.get(_for_gpu(packet))) is not None:
            self.found[FLOPS] += formula(*args, **(kwargs or {}), out_val=out) * self._abridgement.alike
        return out

    def _message(self, name: str, args: Any) -> None:
        """Bytes that pass through each process of a ring, or in and out of each host that it goes through."""
        from torch import distributed

        group = next(distributed.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
        ranks = distributed.get_process_group_ranks(group)
        host = distributed.get_rank() // processes_here()
        size, here = len(ranks), sum(rank // processes_here() == host for rank in ranks)
        tensors = [x for part in args for x in (part if isinstance(part, list) else [part]) if isinstance(x, Tensor)]
        largest, least = (pick(x.nbytes for x in tensors) for pick in (max, min))
        name, sent = {
            "_allgather_base_": ("all-gather", largest * (size - 1) / size),
            "_reduce_scatter_base_": ("reduce-scatter", largest * (size - 1) / size),
            "allreduce_": ("all-reduce", 2 * largest * (size - 1) / size),
            "broadcast_": ("broadcast", largest),
            "gather_": ("gather", least * (size - 1) / size),
        }[name]
        if here < size:  # as many such groups as processes on a host that are not in this one
            self.found[name, True] += sent * processes_here() / here
        if here > 1:
            self.found[name, False] += sent


def _for_gpu(packet: Any) -> Any:
    """The attention of CPUs has no formula; a GPU's, of the same arguments, has."""
    name = packet.__name__
    return getattr(torch.ops.aten, name.replace("_for_cpu", "")) if name.startswith(_ON_CPU) else packet
