"""Time before the run: what an update computes and sends, counted on fake tensors, and the bound that follows."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from galore_pretrain.config.options import RunConfig
from galore_pretrain.model.architecture import architecture_of_run
from galore_pretrain.model.families import Architecture
from galore_pretrain.planning.plan import faked, make_update
from galore_pretrain.tensors.chunks import ChunkSample
from galore_pretrain.tensors.shards import local
from galore_pretrain.train.build import execution_for, model_for, optimizer_for

Counts = dict[Any, float]
FLOPS = "flops"
_SUBTRACT = "galore_pretrain.subtract_"
"""A GPU's kernel that subtracts a low-rank product, which torch has no formula for: see `tensors.fused.subtract_`."""
_ATTENTION_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"


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
    """Counts what one process computes and sends in an update.

    ``sent``: bytes by (collective, whether between hosts), as rings move them: within hosts what passes through each
    process, and between hosts what goes in and out of each host.
    """

    config: RunConfig
    flops: float
    sent: Mapping[tuple[str, bool], float]

    def through(self, *, network: bool) -> float:
        """Return the bytes of all collectives, within hosts or between them (``network``)."""
        return sum(size for (_, between), size in self.sent.items() if between == network)

    def seconds_at_least(self, speeds: Speeds) -> dict[str, float]:
        """Return the least seconds that an update needs of each resource; where all overlap, the largest bounds it."""
        bounds = (
            ("compute", self.flops, speeds.flops),
            ("links", self.through(network=False), speeds.link),
            ("network", self.through(network=True), speeds.network),
        )
        return {name: need / speed for name, need, speed in bounds if speed and need}

    def as_json(self, speeds: Speeds) -> dict[str, Any]:
        """Return the keys that programs may rely on."""
        sent_bytes = {}
        for (name, between), size in self.sent.items():
            sent_bytes[f"{name} {_where(between)}"] = size
        seconds = self.seconds_at_least(speeds)
        rate = None
        if seconds:
            rate = self._tokens() / max(seconds.values())
        return {
            "flops": self.flops,
            "sent_bytes": sent_bytes,
            "seconds_at_least": seconds,
            "tokens_per_second_at_most": rate,
        }

    def table(self, speeds: Speeds) -> str:
        """Return the table that a person reads."""
        lines = [f"an update: {self.flops / 1e12:.3g} TFLOP of each process"]
        if self.through(network=False):
            lines.append(self._line(between=False, what="through each process"))
        if self.through(network=True):
            lines.append(self._line(between=True, what="in and out of each host"))
        seconds = self.seconds_at_least(speeds)
        if seconds:
            slowest = max(seconds, key=lambda name: seconds[name])
            rate = self._tokens() / seconds[slowest]
            bounds = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
            lines.append(f"at most {rate:,.0f} tokens/s, bound by {slowest} ({bounds})")
        return "\n".join(lines)

    def _line(self, *, between: bool, what: str) -> str:
        """Return the line of the bytes between hosts or within them, with the collectives of more than 1 %."""
        total = self.through(network=between)
        parts = []
        for (name, is_between), size in sorted(self.sent.items()):
            if is_between == between and size > total / 100:
                parts.append(f"{name} {size / 2**30:.3g}")
        return f"{_where(between)} {total / 2**30:.3g} GiB {what} ({', '.join(parts)})"

    def _tokens(self) -> int:
        return self.config.total_batch_size * self.config.max_length


def _where(between: bool) -> str:
    return "between hosts" if between else "within hosts"


# The real update is made on fake tensors, and a `Counter` sees its operations. Making all layers and micro-batches of a
# large model would take minutes, so small updates are made: of L = 1 and 2 layers, with M = 2 and 3 micro-batches. Each
# further layer, and each further micro-batch, adds what the last one does. So a count is bilinear in L and M:
#
#     count(L, M) = once + (L - 1) · per_layer + (M - 2) · per_part + (L - 1) (M - 2) · per_layer_and_part
#
# and the four updates give its four terms exactly. Where an update has one micro-batch or two, it is made with these
# alone. No basis is due in them: a refresh's messages, of which T updates share one, are added by `_refresh_counts`.
def count(config: RunConfig, mesh: Any = None) -> Traffic:
    """Count the products and the messages of an update, and a refresh's share of messages.

    A refresh's products are not counted: decompositions have no formula, and every T updates they are few.
    """
    architecture = architecture_of_run(config)
    total = extrapolated(config, architecture, partial(_update_counts, mesh=mesh))
    for key, value in _refresh_counts(config, architecture, mesh).items():
        total[key] += value
    flops = total.pop(FLOPS)
    sent = {key: size for key, size in total.items() if size}
    return Traffic(config, flops, sent)


def extrapolated(
    config: RunConfig, architecture: Architecture, count_small: Callable[[RunConfig, Architecture, int], Counts]
) -> Counts:
    """Return the counts of an update of the whole model in which no basis is due, from those of small ones.

    ``count_small`` is given a config whose bases are all renewed in the same updates, the architecture with one layer
    or two, and the number of micro-batches.
    """
    config_of_small = config
    if config.update_proj_gap:
        # Bases that are renewed in turn could be due in any update; with T of 1 or 2, in the second, which is counted.
        config_of_small = replace(config, refresh="together", update_proj_gap=max(3, config.update_proj_gap))

    def counted(layers: int, micro_batches: int) -> Counts:
        smaller = copy.deepcopy(architecture)
        smaller.num_hidden_layers = layers
        return count_small(config_of_small, smaller, micro_batches)

    # The first micro-batch begins the sums, so it is like no other; and an update of one has none.
    first = min(config.micro_batches, 2)
    count_1 = counted(1, first)
    count_2 = counted(2, first)
    more_1, more_2 = count_1, count_2
    if config.micro_batches > first:
        more_1 = counted(1, first + 1)
        more_2 = counted(2, first + 1)
    layers = architecture.num_hidden_layers - 1
    parts = config.micro_batches - first
    total: Counts = defaultdict(float)
    for key in count_1 | count_2 | more_1 | more_2:
        once = count_1[key]
        per_layer = count_2[key] - once
        per_part = more_1[key] - once
        per_layer_and_part = more_2[key] - count_2[key] - more_1[key] + once
        total[key] = once + layers * per_layer + parts * per_part + layers * parts * per_layer_and_part
    return total


# A new basis is found by one process of one replica. That process gathers the gradient from all shards, and broadcasts
# the basis in fp32, with one more number: whether the basis is valid; of a lazy refresh, its overlap too. The matrices
# are dealt out among all processes, so on average each of them gathers one in `size`. Bytes between hosts are those of
# a host, of `here` processes.
def _refresh_counts(config: RunConfig, architecture: Architecture, mesh: Any) -> Counts:
    """Return the bytes that new bases send, divided by T: those of a process, and on the network those of a host."""
    counts: Counts = defaultdict(float)
    if mesh is None or not config.update_proj_gap:
        return counts
    size = mesh.size()
    shards = mesh.size(-1)
    here = config.processes.here
    shards_here = min(shards, here)
    model = model_for(config, architecture, "meta", mesh=mesh)
    optimizer = optimizer_for(config, model, mesh)
    for p in optimizer.slots:
        bases = optimizer.rule_of(p).bases(optimizer.tensors(p))
        elements = sum(basis.numel() for basis in bases if basis is not None)
        if not elements:
            continue
        broadcast = 4 * elements
        if size > 1:
            broadcast += 4
        if size > 1 and optimizer.rule_of(p).schedule(optimizer.tensors(p)) is not None:
            broadcast += 4
        gradient = local(p).nbytes
        bytes_per_refresh = {
            ("broadcast", False): broadcast * (here > 1),
            ("broadcast", True): broadcast * (size > here),
            ("gather", False): gradient * (shards_here - 1) / size,
            ("gather", True): gradient * (shards - shards_here) * here / size,
        }
        for key, sent in bytes_per_refresh.items():
            counts[key] += sent / config.update_proj_gap
    return counts


def _update_counts(config: RunConfig, architecture: Architecture, micro_batches: int, mesh: Any) -> Counts:
    """Count one update of so many micro-batches in which no basis is due."""
    sample = ChunkSample()
    with faked(config, architecture, mesh, sample=sample) as (model, optimizer):
        execution = execution_for(config, optimizer)
        for state in optimizer.state.values():
            state["step"] = 1
        counter = Counter(sample, config.processes.here)
        with counter:
            make_update(config, model, execution, micro_batches)
        return counter.counts


# Products are counted by torch's own formulas, one for each operation that multiplies matrices. Messages are counted by
# the size of their group: a ring of n processes moves (n - 1) / n of a tensor through each of them to gather or to
# reduce-scatter it, twice that to reduce it for all, and the whole tensor to broadcast it. A ring that goes through
# several hosts enters and leaves each of them once.
class Counter(TorchDispatchMode):
    """Counts products and messages of what is done while it is active, on fake tensors or real ones.

    ``counts`` has FLOPs under `FLOPS`, and bytes under (collective, whether between hosts).
    """

    def __init__(self, sample: ChunkSample | None = None, processes_here: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._processes_here = processes_here
        self._sample = sample or ChunkSample()
        self.counts: Counts = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.namespace == "c10d":
            self._count_message(packet.__name__, args)
            return result
        self.counts[FLOPS] += product_flops(packet, args, kwargs, result) * self._sample.repeats
        return result

    def _count_message(self, name: str, args: Any) -> None:
        from torch import distributed

        group = next(distributed.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        ranks = distributed.get_process_group_ranks(group)
        host = distributed.get_rank() // self._processes_here
        size = len(ranks)
        here = sum(rank // self._processes_here == host for rank in ranks)
        tensors = tensors_of(args)
        if name == "gather_":
            # Only the process that gathers has a list of outputs, args[0]. It receives a tensor of each other process.
            receives = bool(args[0] and args[0][0])
            if receives:
                # Between hosts, bytes are those of a host. Each of its processes gathers as often as this one, on
                # average.
                self.counts["gather", False] += tensors[0].nbytes * (here - 1)
                self.counts["gather", True] += tensors[0].nbytes * (size - here) * self._processes_here
            return
        largest = max(tensor.nbytes for tensor in tensors)
        collective, sent = {
            "_allgather_base_": ("all-gather", largest * (size - 1) / size),
            "_reduce_scatter_base_": ("reduce-scatter", largest * (size - 1) / size),
            "allreduce_": ("all-reduce", 2 * largest * (size - 1) / size),
            "broadcast_": ("broadcast", largest),
        }[name]
        if here < size:
            # The host's processes are in so many such groups, all of which leave it.
            self.counts[collective, True] += sent * self._processes_here / here
        if here > 1:
            self.counts[collective, False] += sent


def product_flops(packet: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Return the FLOPs of an operation by torch's own formula; 0 of one that multiplies no matrices."""
    if str(packet) == _SUBTRACT:
        weight, left, *_ = args
        return 0.0 if left is None else 2.0 * weight.numel() * left.shape[1]
    formula = flop_registry.get(_with_formula(packet))
    if formula is None:
        return 0
    return float(formula(*args, **kwargs, out_val=result))


def tensors_of(args: Any) -> list[Tensor]:
    """Return the tensors of an operation: arguments, or in lists that are arguments."""
    tensors = []
    for arg in args:
        values = arg if isinstance(arg, (list, tuple)) else [arg]
        tensors += [value for value in values if isinstance(value, Tensor)]
    return tensors


def _with_formula(packet: Any) -> Any:
    """Return the operation with a formula for FLOPs that computes the same as ``packet``.

    Neither the attention of CPUs nor products of 8-bit integers nor what works in place has one. A GPU's attention and
    the dense product, of the same arguments, have.
    """
    name = packet.__name__.rstrip("_")
    if name.startswith(_ATTENTION_ON_CPU):
        name = name.replace("_for_cpu", "")
    if name == "_int_mm":
        name = "mm"
    return getattr(torch.ops.aten, name, packet)
