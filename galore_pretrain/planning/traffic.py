"""Time before the run: what an update computes and sends, counted on fake tensors, and the bound that follows."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

from galore_pretrain.config.options import RunConfig
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.planning.plan import faked, make_update
from galore_pretrain.tensors.chunks import ChunkSample
from galore_pretrain.tensors.shards import local
from galore_pretrain.train.build import execution_for, model_for, optimizer_for

Counts = dict[Any, float]
FLOPS = "flops"
_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"


class Speeds(NamedTuple):
    """Says what the hardware can do at best.

    ``flops`` are FLOP/s of a process, ``link`` the bytes/s that each sends and receives within a host, ``network``
    those in and out of a host. None: not said.
    """

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
        """Return what an update takes if all it has to do overlaps perfectly, in seconds, by what bounds it."""
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
        """Return the table that a person reads."""
        lines = [f"an update: {self.flops / 1e12:.3g} TFLOP of each process"]
        for between in (False, True):
            if total := self.through(network=between):
                what = "in and out of each host" if between else "through each process"
                parts = {name: size for (name, far), size in self.sent.items() if far == between and size > total / 100}
                of = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in sorted(parts.items()))
                lines.append(f"{_where(between)} {total / 2**30:.3g} GiB {what} ({of})")
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
    """The products and the messages of an update, and a refresh's share of messages. (A refresh's products are not
    counted: decompositions have no formula, and every T updates they are few.)

    The real update is made on fake tensors, of models with one and two layers and with one and two micro-batches: all
    further ones add the same.
    """
    architecture = load_model_config(config.model)
    layers, parts = architecture.num_hidden_layers, config.micro_batches

    def counted(layers: int, parts: int) -> Counts:
        smaller = copy.deepcopy(architecture)
        smaller.num_hidden_layers = layers
        together = replace(config, refresh="together") if config.update_proj_gap else config
        return _update(together, smaller, mesh, parts)

    first, layer = (counted(n, 1) for n in (1, 2))
    part, both = (counted(n, 2) for n in (1, 2)) if parts > 1 else (first, layer)
    total = _refresh(config, architecture, mesh)
    for key in set().union(first, layer, part, both):
        a, b, c, d = (x[key] for x in (first, layer, part, both))
        total[key] += a + (layers - 1) * (b - a) + (parts - 1) * (c - a) + (layers - 1) * (parts - 1) * (d - b - c + a)
    flops = total.pop(FLOPS)
    return Traffic(config, flops, {key: size for key, size in total.items() if size})


def _refresh(config: RunConfig, architecture: LlamaConfig, mesh: Any) -> Counts:
    """Bytes of the bases, one in T updates, on average over the processes: each gradient goes to one process of one
    replica, and what is found there, in fp32, and whether it is better, to all."""
    found: Counts = defaultdict(float)
    if mesh is None or not config.update_proj_gap:
        return found
    size, shards, here = mesh.size(), mesh.size(-1), config.processes.here
    optimizer = optimizer_for(config, model_for(config, architecture, "meta", mesh=mesh), mesh)
    for p in optimizer.slots:
        bases = sum(4 * b.numel() for b in optimizer.rule_of(p).bases(optimizer.tensors(p)) if b is not None)
        if not bases:
            continue
        sent = bases + 4 * (size > 1)
        inside = min(shards, here)
        for name, between, bytes_ in (
            ("broadcast", False, sent * (here > 1)),
            ("broadcast", True, sent * (size > here)),
            ("gather", False, local(p).nbytes * (inside - 1) / size),
            ("gather", True, local(p).nbytes * (shards - inside) * here / size),
        ):
            found[name, between] += bytes_ / config.update_proj_gap
    return found


def _update(config: RunConfig, architecture: LlamaConfig, mesh: Any, parts: int) -> Counts:
    """One update of so many micro-batches, in which no basis is due, even where one is at each."""
    if config.update_proj_gap:
        config = replace(config, update_proj_gap=max(3, config.update_proj_gap))
    sample = ChunkSample()
    with faked(config, architecture, mesh, sample=sample) as (model, optimizer):
        execution = execution_for(config, optimizer)
        for state in optimizer.state.values():
            state["step"] = 1
        counter = Counter(sample, config.processes.here)
        with counter:
            make_update(config, model, execution, parts)
        return counter.found


class Counter(TorchDispatchMode):
    """Counts products and messages of what is done while it is active, on fake tensors or real ones."""

    def __init__(self, sample: ChunkSample | None = None, processes_here: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._here = processes_here
        self._sample = sample or ChunkSample()
        self.found: Counts = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if func.namespace == "c10d":
            self._message(packet.__name__, args)
        elif (formula := flop_registry.get(_with_formula(packet))) is not None:
            self.found[FLOPS] += formula(*args, **(kwargs or {}), out_val=out) * self._sample.repeats
        return out

    def _message(self, name: str, args: Any) -> None:
        """Bytes that pass through each process of a ring, or in and out of each host that it goes through."""
        from torch import distributed

        group = next(distributed.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
        ranks = distributed.get_process_group_ranks(group)
        host = distributed.get_rank() // self._here
        size, here = len(ranks), sum(rank // self._here == host for rank in ranks)
        tensors = [x for part in args for x in (part if isinstance(part, list) else [part]) if isinstance(x, Tensor)]
        largest = max(x.nbytes for x in tensors)
        if name == "gather_":  # to one, who alone has lists for it
            is_owner = bool(args[0] and args[0][0])
            self.found["gather", False] += tensors[0].nbytes * (here - 1) * is_owner
            self.found["gather", True] += tensors[0].nbytes * (size - here) * is_owner * self._here  # on average
            return
        name, sent = {
            "_allgather_base_": ("all-gather", largest * (size - 1) / size),
            "_reduce_scatter_base_": ("reduce-scatter", largest * (size - 1) / size),
            "allreduce_": ("all-reduce", 2 * largest * (size - 1) / size),
            "broadcast_": ("broadcast", largest),
        }[name]
        if here < size:  # as many such groups as processes on a host that are not in this one
            self.found[name, True] += sent * self._here / here
        if here > 1:
            self.found[name, False] += sent


def _with_formula(packet: Any) -> Any:
    """The attention of CPUs has no formula, nor has what is done in place; a GPU's, of the same arguments, has."""
    name = packet.__name__
    name = name.replace("_for_cpu", "") if name.startswith(_ON_CPU) else name.rstrip("_")
    return getattr(torch.ops.aten, name, packet)
