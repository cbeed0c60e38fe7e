"""Memory before the run: the real step, on fake tensors, with a ledger of what it holds."""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from galore_pretrain.config.options import RunConfig, model_name
from galore_pretrain.meters import available_bytes
from galore_pretrain.model.coded import CodedLinear
from galore_pretrain.model.encoder import is_encoder
from galore_pretrain.model.families import Architecture, CausalLM, layers_of
from galore_pretrain.model.int8 import Int8Linear
from galore_pretrain.optim import Execution
from galore_pretrain.tensors.capability import runs_on
from galore_pretrain.tensors.chunks import ChunkSample
from galore_pretrain.tensors.coded import held_bytes
from galore_pretrain.tensors.ledger import HOST, Ledger
from galore_pretrain.tensors.place import planned_for_gpu
from galore_pretrain.tensors.shards import local
from galore_pretrain.tensors.transport import AtOnce
from galore_pretrain.train.build import device_of, execution_for, loss_of, model_for, optimizer_for, set_up_model

if TYPE_CHECKING:
    from galore_pretrain.optim import RuleOptimizer


OUTSIDE = 10**9
"""Bytes of a machine's memory that tensors do not get: the program's own, its text and what saving takes."""


@dataclass(frozen=True)
class Plan:
    """The peak of one run's updates in bytes: ``parts`` says of what kinds, ``place`` where in the update it lies."""

    config: RunConfig
    peak_bytes: int
    parts: dict[str, int]
    place: str
    host_bytes: int = 0
    """Of sums of gradients, in page-locked memory of the device's host; no part of the peak."""
    host_budget: int | None = None
    """Bytes that the host has for them; None where the card that is planned for is in another machine."""
    highs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """At each place of an update, the bytes by kind of the most that was held there."""

    @property
    def fits_host(self) -> bool:
        """Return whether the host has room for the sums that are to lie there, as far as that is known."""
        return self.host_budget is None or self.host_bytes <= self.host_budget

    def fits(self, budget: int) -> bool:
        """Return whether the updates fit ``budget`` bytes of the device, and what the host has."""
        return self.peak_bytes <= budget and self.fits_host

    def as_json(self, budget: int) -> dict[str, Any]:
        """Return the keys that programs may rely on, in bytes. The parts add up to the peak.

        ``gradients_bytes`` are the full gradients and the low-rank sums, ``optimizer_bytes`` the moments and bases.
        """
        parts = self.parts
        config = self.config
        return {
            "peak_bytes": self.peak_bytes,
            "weights_bytes": parts["weights"],
            "gradients_bytes": parts["gradients"] + parts["sums"],
            "optimizer_bytes": parts["moments"] + parts["bases"],
            "activations_bytes": parts["activations"],
            "temporary_bytes": parts["temporaries"],
            "parts": parts,
            "fits": self.fits(budget),
            "budget_bytes": budget,
            "host_bytes": self.host_bytes,
            "place": self.place,
            "model": config.model,
            "optim": config.optim,
            "rank": config.rank,
            "dtype": config.dtype,
            "layerwise": config.layerwise,
            "activation_checkpointing": config.activation_checkpointing,
            "batch_size": config.batch_size,
            "total_batch_size": config.total_batch_size,
            "accumulate_on": config.accumulate_on,
            "clip_norm": config.clip_norm,
        }

    def table(self, budget: int, source: str) -> str:
        """Return the table that a person reads; ``source`` says where the budget comes from."""
        config = self.config
        lines = [self._title()]
        for kind, size in self.parts.items():
            meaning = _MEANING[kind]
            if kind == "weights" and config.weights == "int8":
                meaning = "matrices in 8 bits, the rest in the run's dtype"
            lines.append(f"{kind:<13}{size / 2**30:8.2f} GiB   {meaning}")
        lines.append(f"{'peak':<13}{self.peak_bytes / 2**30:8.2f} GiB   {self.place}")
        if self.host_bytes:
            line = f"{'host':<13}{self.host_bytes / 2**30:8.2f} GiB   sums of full gradients, beside the peak"
            if self.host_budget is not None:
                line += f"; {self.host_budget / 2**30:.2f} are to be had"
            lines.append(line)
        verdict = "fits" if self.fits(budget) else "does not fit"
        lines.append(f"{verdict} into {budget / 2**30:.2f} GiB ({source}), with {describe(config)}")
        if not is_on_gpu(config):
            lines.append("planned for this CPU; --device cuda plans for a GPU, which has other temporaries")
        return "\n".join(lines)

    def _title(self) -> str:
        config = self.config
        title = f"{model_name(config.model)} in {config.dtype}, {config.optim}"
        if config.rank:
            title += f" of rank {config.rank}"
        title += f", updates of {config.total_batch_size} × {config.max_length} tokens"
        processes = config.processes.total
        if processes > 1:
            title += f", each of {processes} processes (--shard {config.shard})"
        return title


_MEANING = {
    "weights": "in the run's dtype",
    "moments": "optimizer state",
    "bases": "of GaLore's subspaces",
    "gradients": "full ones that exist at the peak",
    "sums": "low-rank gradients that wait for their update",
    "activations": "kept for the backward pass",
    "temporaries": "everything else",
}


def describe(config: RunConfig) -> str:
    """Say in words how the updates of a run are made."""
    words = ["layerwise updates" if config.layerwise else "updates after backward"]
    if config.activation_checkpointing:
        words.append("activation checkpointing")
    words.append(f"micro-batches of {config.batch_size} × {config.max_length} tokens")
    if config.documents == "separate":
        words.append("a mask that keeps documents apart")
    if config.clip_norm:
        words.append(f"the {config.clip_norm} norm clipped")
    if config.accumulate_on == "host" and config.micro_batches > 1:
        words.append("sums of full gradients on the host")
    return ", ".join(words)


class Static(NamedTuple):
    """Bytes that are held throughout a run. They are exact."""

    weights: int
    gradients: int
    """Of all weights that are trained."""
    state: int
    sums: int
    """Of all gradients as layerwise updates keep them until the last micro-batch: projected where the rule does."""


@dataclass(frozen=True)
class Outline:
    """A run's model and optimizer on ``meta``, or a process's part of them.

    They have the shapes of the real ones and take no memory. Neither depends on the execution and the micro-batch, so
    one outline serves all plans of a search.
    """

    model: CausalLM
    optimizer: "RuleOptimizer"

    @classmethod
    def of(cls, config: RunConfig, architecture: Architecture, mesh: Any = None) -> "Outline":
        """Build the outline; InputError where the config's options do not fit the model."""
        model = model_for(config, architecture, "meta", mesh=mesh)
        return cls(model, optimizer_for(config, model))

    @cached_property
    def static(self) -> Static:
        """Return the bytes that are held before anything is computed."""
        optimizer = self.optimizer
        return Static(
            weights=sum(held_bytes(p) for p in self.model.parameters()),
            gradients=sum(local(p).nbytes for p in optimizer.state),
            state=optimizer.state_bytes(),
            sums=sum(optimizer.slots.sum_bytes(p) for p in optimizer.state),
        )


def static_bytes(config: RunConfig, architecture: Architecture, mesh: Any = None) -> Static:
    """Return what a run, or a process of it, holds before it computes anything."""
    return Outline.of(config, architecture, mesh).static


def is_on_gpu(config: RunConfig) -> bool:
    """Return whether the updates of a run are a GPU's; the machine that plans them need not have one."""
    if config.device == "auto":
        return torch.cuda.is_available()
    return config.device.startswith("cuda")


# By torch's sources (sdp_utils.cpp), FlashAttention takes neither fp32 nor a mask, and is deterministic. The kernels
# that take these are not, so that plain products are left.
def keeps_scores(config: RunConfig) -> bool:
    """Return whether attention keeps the scores of all pairs of tokens, as plain products on a GPU do."""
    has_no_kernel = config.documents == "separate" or config.dtype == "float32"
    return config.deterministic and is_on_gpu(config) and has_no_kernel


# A plan makes the real model, optimizer and execution, and runs the real update with them, but on torch's fake tensors:
# they have shapes, dtypes and storages of a size, and no memory behind them. A `Ledger` counts these storages. So
# nothing is estimated from formulas, and a change of the training code changes the plan.
#
# How each kind is known: weights and moments by when they are made, bases because the rules name them, gradients by
# hooks of their parameters, and sums because the optimizer's observer sees what was accumulated. What autograd records
# are activations. All else are temporaries.
#
# Only updates that can hold most are made: the one in which the largest matrices have a basis due and, of one
# micro-batch, the first one too: its random bases are not outweighed by sums over micro-batches. Of several
# micro-batches the first and the last are run, since between them nothing is added but the half of one gradient that is
# kept for the noise of its basis, which two keep too.
def measure(
    config: RunConfig,
    architecture: Architecture,
    mesh: Any = None,
    *,
    every_update: bool = False,
    outline: Outline | None = None,
) -> Plan:
    """Measure the peak over the updates of a run, or of a process of ``mesh``, by making them on fake tensors.

    That takes no memory, no arithmetic and no communication. Updates of equal tensors are made once and then replayed,
    and of the chunks in which a large tensor is updated, three are made (``every_update`` makes all). Allocations are
    counted, without what an allocator or a library's kernel adds for itself. The `faked` model is a copy of that of
    ``outline``, where there is one.
    """
    # Only FSDP2 resizes storages.
    ledger = Ledger(resizes=mesh is not None)
    sample = None if every_update else ChunkSample()
    with faked(config, architecture, mesh, ledger, sample, outline) as (model, optimizer):
        for p in optimizer.slots:
            rule = optimizer.rule_of(p)
            for basis in rule.held_bases(optimizer.tensors(p)):
                ledger.assign(basis, "bases")
        execution = execution_for(config, optimizer, transport=_PlannedTransport(ledger, optimizer))
        _add_hooks(ledger, model)
        optimizer.observer = _OptimizerObserver(ledger, optimizer, each=every_update)
        micro_batches = min(config.micro_batches, 2)
        make_heaviest_updates(config, model, optimizer, execution, micro_batches)
        more = _held_by_compiled_layers(config, model)
    parts = ledger.at_peak | {"gradients": ledger.at_peak["gradients"] + more}
    return Plan(
        config,
        ledger.peak + more,
        parts,
        ledger.point_of_peak,
        host_bytes=ledger.host_peak,
        host_budget=host_budget(),
        highs=ledger.highs,
    )


def host_budget() -> int | None:
    """Return the bytes of the host's memory that sums may take; None where this machine has no card to be its host."""
    if not torch.cuda.is_available():
        return None
    return available_bytes(torch.device("cpu")) - OUTSIDE


class _PlannedTransport(AtOnce):
    """Tells the ledger what the memory of host and device is for between which sums are moved."""

    def __init__(self, ledger: Ledger, optimizer: "RuleOptimizer") -> None:
        super().__init__(next(iter(optimizer.slots)).device)
        self._ledger = ledger

    def host_memory(self, size: int) -> Tensor:
        """Return ``size`` bytes of the host's memory."""
        with self._ledger.kind(HOST):
            return super().host_memory(size)

    def device_memory(self, size: int) -> Tensor:
        """Return ``size`` bytes of the device's memory."""
        with self._ledger.kind("gradients"):
            return super().device_memory(size)


def _held_by_compiled_layers(config: RunConfig, model: CausalLM) -> int:
    """Return the bytes of gradients that a compiled layer returns together, but for the largest of them.

    Updates in backward drop each gradient before the next one is made, but where one compiled function makes all.
    """
    if not (config.compile and config.layerwise):
        return 0
    gradients = [[local(p).nbytes for p in layer.parameters() if p.requires_grad] for layer in layers_of(model)]
    return max(sum(sizes) - max(sizes, default=0) for sizes in gradients)


@contextmanager
def faked(
    config: RunConfig,
    architecture: Architecture,
    mesh: Any = None,
    ledger: Ledger | None = None,
    sample: ChunkSample | None = None,
    outline: Outline | None = None,
) -> Iterator[tuple[CausalLM, "RuleOptimizer"]]:
    """Make all tensors fake in this context, and yield a run's model and optimizer made of such.

    ``ledger`` counts them as they are made. With a ``sample``, only some of a large tensor's chunks are worked on.
    """
    if mesh is not None:
        # Importing this teaches torch what its collectives return of fake tensors.
        import_module("torch.distributed._tools.fake_collectives")
    if outline is None or mesh is not None:
        # What FSDP2 has shared out cannot be copied. The outline's optimizer is dropped, but building it has filled
        # caches of constants, which fake tensors could not fill.
        model = Outline.of(config, architecture, mesh).model
    else:
        model = copy.deepcopy(outline.model)

    def kind(name: str) -> AbstractContextManager[None]:
        if ledger is None:
            return contextlib.nullcontext()
        return ledger.kind(name)

    device = torch.device("cpu")
    place: AbstractContextManager[None] = planned_for_gpu()
    if torch.cuda.is_available() or not is_on_gpu(config):
        device = device_of(config)
        place = contextlib.nullcontext()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.chunk_sample = sample  # type: ignore[attr-defined]
    attention: AbstractContextManager[None] = contextlib.nullcontext()
    if keeps_scores(config):
        attention = sdpa_kernel(SDPBackend.MATH)
    default: AbstractContextManager[Any] = device
    if torch.get_default_device() == device:
        # To say so again is not needed, and has each of torch's functions called by way of Python.
        default = contextlib.nullcontext()
    with place, mode, default, attention, ledger or contextlib.nullcontext():
        with kind("weights"):
            model.to_empty(device=device)
            # `to_empty` has given tied weights storages of their own.
            model.tie_weights()
        if not is_encoder(architecture):
            # Kinds of RoPE that grow with a text ask for its length, which fake tensors do not know. They hold no more.
            model.model.rotary_emb.rope_type = "default"
        with kind("moments"):
            optimizer = optimizer_for(config, set_up_model(config, model), mesh)
        yield model, optimizer


def make_heaviest_updates(
    config: RunConfig, model: CausalLM, optimizer: "RuleOptimizer", execution: Execution, micro_batches: int
) -> None:
    """Make those updates of a run that can hold most, of ``micro_batches`` each."""
    for count in heaviest_updates(config, optimizer):
        for p, state in optimizer.state.items():
            # As if all updates before this one had been made: a run still holds the table that their random bits were
            # read from, beside this update's. Reading a bit of a far update makes such a table; kernels read none.
            state["step"] = count - 1
            for number in (count + 1000, count):
                bits = optimizer.random_bits(p, number)
                if bits is not None and not runs_on(p.device):
                    bits.take("weight", 0, 1)
        make_update(config, model, execution, micro_batches)


def make_update(config: RunConfig, model: CausalLM, execution: Execution, micro_batches: int) -> None:
    """Make one update of ``micro_batches``, whose tokens are all zero."""
    loss_function = loss_of(model.config)
    for i in range(micro_batches):
        tokens = torch.zeros(config.batch_size, config.max_length, dtype=torch.long)
        labels = tokens[:, 0] if is_encoder(model.config) else tokens
        loss = loss_function(model, tokens, labels, labels.numel(), places_of(config, tokens))
        execution.begin(i, micro_batches)
        loss.backward()
        del loss
    execution.complete()


def places_of(config: RunConfig, tokens: Tensor) -> Tensor | None:
    """Return the place of each of ``tokens`` in its document; None where documents are joined.

    All are first ones, each of a document of its own: the mask takes what it takes of any other text.
    """
    if config.documents == "joined":
        return None
    return torch.zeros_like(tokens)


def _add_hooks(ledger: Ledger, model: CausalLM) -> None:
    """Have the model tell the ledger where in the update it is, and which tensors are gradients."""

    def says(moment: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            ledger.point = moment

        return hook

    def assigns_gradient(name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            ledger.point = f"backward, at {name}"
            if p.grad is not None:
                ledger.assign(p.grad, "gradients")

        return hook

    # Inside of a function of our own autograd records nothing, but layers behind it keep what it returns.
    def keeps_result(module: torch.nn.Linear, inputs: object, result: Tensor) -> None:
        ledger.assign(result, "activations")

    for i, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(says(f"forward of layer {i}"))
    if is_encoder(model.config):
        model.classifier.register_forward_pre_hook(says("head and loss"))
    else:
        model.model.norm.register_forward_hook(says("head and loss"))
    for layer in model.modules():
        if isinstance(layer, (Int8Linear, CodedLinear)):
            layer.register_forward_hook(keeps_result)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(assigns_gradient(name))


def heaviest_updates(config: RunConfig, optimizer: "RuleOptimizer") -> list[int]:
    """Return the numbers of the updates that can hold most."""
    elements_due: Counter[int] = Counter()  # by the number of an update, in matrices that get a new basis there
    for p in optimizer.state:
        due = optimizer.next_due(p, 2)
        if due is not None:
            elements_due[due] += p.numel()
    if not elements_due:
        return [1]
    heaviest = max(elements_due, key=lambda count: elements_due[count])
    if config.micro_batches == 1:
        return [1, heaviest]
    firsts = [p for p in optimizer.state if optimizer.next_due(p, 1) == heaviest]
    if not firsts:
        return [heaviest]
    # Of several micro-batches, a half is kept from a matrix's second refresh on, for the noise of its basis.
    seconds = [optimizer.next_due(p, heaviest + 1) for p in firsts]
    return [heaviest, min(due for due in seconds if due is not None)]


# The optimizer hands over each piece of its work for a parameter p. Two pieces hold the same if they are the same work
# by the same rule for tensors of the same shape, and both or neither have a basis due. The first one is done, and the
# ledger remembers by how much each kind grew at its maximum. For the others that is replayed on top of what is held by
# then, and what the work would have freed is freed here. Without this, a plan of 7B would take minutes.
class _OptimizerObserver:
    """Tells the ledger of what kind an optimizer's tensors are, and does equal work once, or ``each`` time if asked."""

    def __init__(self, ledger: Ledger, optimizer: "RuleOptimizer", *, each: bool) -> None:
        self._ledger = ledger
        self._optimizer = optimizer
        self._each = each
        self._episodes: dict[Hashable, dict[str, int]] = {}

    def observe(self, name: str, p: Tensor | None, work: Callable[[], None]) -> None:
        """Do a piece of the optimizer's work, or replay what an equal one held."""
        if name == "complete":
            self._ledger.point = "updates after backward"
        if p is None or name == "refresh":
            work()
            return
        # A table of random bits is made for every so many updates. It must not become part of what is replayed.
        with self._ledger.kind("temporaries"):
            self._optimizer.random_bits(p, self._optimizer.state[p]["step"] + 1)
        if name == "update":
            self._update(p, work)
        elif name == "accumulate":
            self._accumulate(p, work)
        else:
            work()
            self._assign_sum(p)

    def _update(self, p: Tensor, work: Callable[[], None]) -> None:
        done = self._do_or_replay("update", p, work)
        if not done:
            self._optimizer.discard([p])

    def _accumulate(self, p: Tensor, work: Callable[[], None]) -> None:
        if p not in self._optimizer.pending.gradients:
            # The first gradient of an update becomes the sum itself, so it must exist.
            work()
        else:
            done = self._do_or_replay("accumulate", p, work)
            if not done:
                p.grad = None
        self._assign_sum(p)
        self._assign_gradient(p)

    def _assign_sum(self, p: Tensor) -> None:
        pending = self._optimizer.pending.get(p)
        if pending is not None and pending.compressed:
            self._ledger.assign(pending.grad, "sums")

    def _assign_gradient(self, p: Tensor) -> None:
        pending = self._optimizer.pending.get(p)
        if pending is not None and not pending.compressed:
            self._ledger.assign(pending.grad, "gradients")

    def _do_or_replay(self, name: str, p: Tensor, work: Callable[[], None]) -> bool:
        """Do the work and return True, or replay what equal work held and return False."""
        pending = self._optimizer.pending.get(p)
        compressed = None if pending is None else pending.compressed
        measures_noise = pending is not None and pending.first_half is not None
        is_due = self._optimizer.is_due(p)
        key = (name, p.shape, self._optimizer.rule_of(p), compressed, is_due, measures_noise)
        if self._each or key not in self._episodes:
            self._episodes[key] = self._ledger.episode(work)
            return True
        self._ledger.replay(self._episodes[key])
        return False
