"""What an update has a GPU do: products, bytes and launches, counted on fake tensors by the part of the update."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from galore_pretrain.config.options import RunConfig
from galore_pretrain.model.architecture import architecture_of_run
from galore_pretrain.model.families import Architecture, CausalLM
from galore_pretrain.model.head import token_losses
from galore_pretrain.optim import Execution
from galore_pretrain.planning.cards import Card
from galore_pretrain.planning.plan import faked, make_update, places_of
from galore_pretrain.planning.traffic import Counts, extrapolated, product_flops, tensors_of
from galore_pretrain.tensors.chunks import ChunkSample
from galore_pretrain.tensors.operations import device_asked_for
from galore_pretrain.train.build import execution_for

FORWARD, BACKWARD, UPDATE, REFRESH, EVALUATION = "forward", "backward", "update", "refresh", "evaluation"
PARTS = (FORWARD, BACKWARD, UPDATE)
"""The parts of every update. A refresh is what an update that renews all bases does beside."""

_PRODUCT_BYTES = "bytes of products"
_OTHER_BYTES = "bytes"
_LAUNCHES = "launches"
_DECOMPOSING = "decomposing"

LAUNCH_NOTHING = {
    "alias", "as_strided", "detach", "device", "diagonal", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "new_empty", "permute", "select", "slice", "split", "squeeze", "squeeze_", "t", "transpose", "unbind",
    "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip
"""Operations by name that make views or memory, for which nothing is launched."""
_ONLY_WRITE = {"copy_", "fill_", "zero_", "normal_", "random_", "uniform_"}
"""Operations that do not read the tensor that they write."""


@dataclass
class Work:
    """Counts what one process has its GPU do.

    ``flops``: of products, by dtype. ``product_bytes`` and ``other_bytes``: what products read and write, and what all
    other operations do. ``launches``: operations that start a kernel. ``decomposing``: FLOPs of QR, SVD and the like.
    """

    flops: Mapping[torch.dtype, float]
    product_bytes: float
    other_bytes: float
    launches: float
    decomposing: float

    @classmethod
    def of(cls, counts: Counts, part: str) -> "Work":
        """Return the work of one part of an update from the counts of a `WorkCounter`."""
        flops = {}
        for (of_part, kind), value in counts.items():
            if of_part == part and isinstance(kind, torch.dtype):
                flops[kind] = value
        return cls(
            flops=flops,
            product_bytes=counts.get((part, _PRODUCT_BYTES), 0.0),
            other_bytes=counts.get((part, _OTHER_BYTES), 0.0),
            launches=counts.get((part, _LAUNCHES), 0.0),
            decomposing=counts.get((part, _DECOMPOSING), 0.0),
        )


# PaLM's definition (arXiv 2204.02311, appendix B): 6N FLOPs a token for N weights, forward and backward, and 12LHQT for
# attention with L layers, H heads of size Q and T positions, whether they are masked or not. What activation
# checkpointing computes again is not counted, and neither is the update. N are the weights that multiply: norms do not,
# and an embedding is looked up, so it counts as the head alone.
def model_flops_per_token(architecture: Architecture, length: int) -> float:
    """Return the FLOPs that a token of a row of ``length`` takes by the model's definition, whatever computes them."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    heads, kv_heads = architecture.num_attention_heads, architecture.num_key_value_heads
    head_size = getattr(architecture, "head_dim", None) or hidden // heads
    layers = architecture.num_hidden_layers
    weights_of_layer = 2 * hidden * head_size * (heads + kv_heads) + 3 * hidden * inner
    weights = layers * weights_of_layer + architecture.vocab_size * hidden
    return float(6 * weights + 12 * layers * heads * head_size * length)


def peak_tokens_per_second(card: Card, config: RunConfig, architecture: Architecture) -> float:
    """Return the tokens/s of all processes at which the model's FLOPs would be the peak of their cards: MFU 1."""
    peak = card.peak(getattr(torch, config.dtype)) * config.processes.total
    return peak / model_flops_per_token(architecture, config.max_length)


# What an update does is counted as `traffic` counts it: of one or two layers and micro-batches, and the rest follows.
# Each of these small updates is made twice, once without and once with all bases due. The difference is a refresh.
def count_work(config: RunConfig, mesh: Any = None) -> dict[str, Work]:
    """Count the work of an update by its parts, of a refresh of all bases, and of a micro-batch of an evaluation."""
    architecture = architecture_of_run(config)
    counts = extrapolated(config, architecture, partial(_counts, mesh=mesh))
    return {part: Work.of(counts, part) for part in (*PARTS, REFRESH, EVALUATION)}


def _counts(config: RunConfig, architecture: Architecture, micro_batches: int, mesh: Any) -> Counts:
    """Count an update of so many micro-batches, a refresh of all bases, and a micro-batch of an evaluation."""
    sample = ChunkSample()
    with faked(config, architecture, mesh, sample=sample) as (model, optimizer):
        execution = execution_for(config, optimizer)
        counter = WorkCounter(sample)
        optimizer.observer = counter
        with counter.following(model, execution):
            for state in optimizer.state.values():
                state["step"] = 1
            with counter:
                make_update(config, model, execution, micro_batches)
            plain = counter.take()
            dues = [optimizer.next_due(p, 2) for p in optimizer.state]
            due = max((number for number in dues if number is not None), default=2)
            for state in optimizer.state.values():
                state["step"] = due - 1
            with counter:
                make_update(config, model, execution, micro_batches)
            with_bases = counter.take()
        model.eval()
        tokens = torch.zeros(config.batch_size, config.max_length, dtype=torch.long)
        counter.part = EVALUATION
        with counter:
            token_losses(model, tokens, tokens, places_of(config, tokens))
    counts = plain | counter.take()
    for (part, kind), value in with_bases.items():
        counts[REFRESH, kind] += value - plain[part, kind]
    return counts


# A kernel reads its arguments and writes its results, or those arguments that it works on in place. Views launch
# nothing. What stays in a card's cache is counted as if it went to memory and came back.
class WorkCounter(TorchDispatchMode):
    """Counts what is done while it is active, on fake tensors or real ones, under (part of an update, kind of work).

    It is an optimizer's observer too, which tells the update's own work from that of the backward pass it may run in.
    """

    def __init__(self, sample: ChunkSample | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = FORWARD
        self._sample = sample or ChunkSample()
        self._counts: Counts = defaultdict(float)

    def take(self) -> Counts:
        """Return the counts and begin anew."""
        counts = self._counts
        self._counts = defaultdict(float)
        return counts

    @contextmanager
    def following(self, model: CausalLM, execution: Execution) -> Iterator[None]:
        """Notice in this context which pass is made: forward from the model's call on, backward once it is begun."""
        begin = execution.begin

        def begin_backward(number: int, micro_batches: int) -> None:
            begin(number, micro_batches)
            self.part = BACKWARD

        def begin_forward(*_: Any) -> None:
            self.part = FORWARD

        execution.begin = begin_backward  # type: ignore[assignment, method-assign]
        hook = model.model.register_forward_pre_hook(begin_forward)
        try:
            yield
        finally:
            hook.remove()
            execution.begin = begin  # type: ignore[method-assign]

    def observe(self, name: str, p: Tensor | None, work: Callable[[], None]) -> None:
        """Do a piece of the optimizer's work and count it as the update's."""
        del name, p
        before, self.part = self.part, UPDATE
        try:
            work()
        finally:
            self.part = before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: else torch wraps each call of `__torch_dispatch__`, so that nothing of it is compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do one operation and count it."""
        del types
        device = device_asked_for(func, args)
        if device is not None:
            return device
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        name = packet.__name__
        if func.namespace == "c10d" or name in LAUNCH_NOTHING:
            return result
        repeats = self._sample.repeats
        moved = _moved_bytes(func, args, kwargs, result)
        flops = product_flops(packet, args, kwargs, result)
        if flops:
            floats = [tensor.dtype for tensor in tensors_of(args) if tensor.is_floating_point()]
            dtype = floats[0] if floats else torch.int8
            self._count(dtype, flops * repeats)
            self._count(_PRODUCT_BYTES, moved * repeats)
        else:
            self._count(_OTHER_BYTES, moved * repeats)
        self._count(_LAUNCHES, repeats)
        self._count(_DECOMPOSING, _decomposing_flops(name, args) * repeats)
        return result

    def _count(self, kind: Any, value: float) -> None:
        self._counts[self.part, kind] += value


def _moved_bytes(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Return the bytes that an operation reads and writes."""
    name = func.overloadpacket.__name__
    written = []
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors_of([value])
    moved = sum(tensor.nbytes for tensor in tensors_of(args))
    mask = kwargs.get("attn_mask")  # of a CPU's attention; a GPU's has it among its arguments, once for each head
    if mask is not None:
        heads = args[0].shape[1]
        moved += heads * mask.nbytes
    if name in _ONLY_WRITE:
        moved -= sum(tensor.nbytes for tensor in written)
    if not written:
        written = tensors_of([result])
    return moved + sum(tensor.nbytes for tensor in written)


# Golub and Van Loan, Matrix Computations: a QR with its Q (§5.2), a thin SVD (§8.6), the symmetric eigenproblem with
# its vectors (§8.3), Cholesky (§4.2). The matrices are taken as they stand, m rows by n columns or the other way round.
def _decomposing_flops(name: str, args: Any) -> float:
    """Return the FLOPs of a decomposition; 0 of any other operation."""
    formula = _DECOMPOSITIONS.get(name)
    if formula is None:
        return 0.0
    *_, rows, columns = args[0].shape
    return float(formula(max(rows, columns), min(rows, columns)))


_DECOMPOSITIONS: dict[str, Callable[[int, int], float]] = {
    "linalg_qr": lambda m, n: 4 * m * n**2 - 4 * n**3 / 3,
    "_linalg_svd": lambda m, n: 14 * m * n**2 + 8 * n**3,
    "_linalg_eigh": lambda m, n: 9 * n**3,
    "linalg_cholesky_ex": lambda m, n: n**3 / 3,
    "linalg_solve_triangular": lambda m, n: m * n**2,
}
