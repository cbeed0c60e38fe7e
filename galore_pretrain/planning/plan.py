"""Memory before the run: the real step, on fake tensors, with a ledger of what it holds."""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from galore_pretrain.config.options import RunConfig, processes
from galore_pretrain.model.head import mean_loss
from galore_pretrain.optim import Execution
from galore_pretrain.planning.ledger import Ledger
from galore_pretrain.tensors.chunks import ChunkSample
from galore_pretrain.tensors.shards import local
from galore_pretrain.train.build import device_of, execution_for, model_for, optimizer_for, prepare

if TYPE_CHECKING:
    from galore_pretrain.optim import RuleOptimizer


@dataclass(frozen=True)
class Plan:
    """The peak of one run's updates in bytes: ``parts`` says for what, ``place`` where in the update."""

    config: RunConfig
    peak_bytes: int
    parts: dict[str, int]
    place: str

    def as_json(self, budget: int) -> dict[str, Any]:
        """The keys that programs may rely on. The parts add up to the peak; ``gradients_bytes`` are the full gradients
        and the low-rank sums, ``optimizer_bytes`` moments and bases."""
        parts, config = self.parts, self.config
        return {
            "peak_bytes": self.peak_bytes,
            "weights_bytes": parts["weights"],
            "gradients_bytes": parts["gradients"] + parts["sums"],
            "optimizer_bytes": parts["moments"] + parts["bases"],
            "activations_bytes": parts["activations"],
            "temporary_bytes": parts["temporaries"],
            "parts": parts,
            "fits": self.peak_bytes <= budget,
            "budget_bytes": budget,
            "place": self.place,
            "model": config.model,
            "optim": config.optim,
            "rank": config.rank,
            "dtype": config.dtype,
            "layerwise": config.layerwise,
            "activation_checkpointing": config.activation_checkpointing,
            "batch_size": config.batch_size,
            "total_batch_size": config.total_batch_size,
            "clip_norm": config.clip_norm,
        }

    def table(self, budget: int, source: str) -> str:
        """What a person reads; ``source`` says where the budget comes from."""
        config = self.config
        rank = f" of rank {config.rank}" if config.rank else ""
        each = f", each of {processes()} processes (--shard {config.shard})" if processes() > 1 else ""
        lines = [
            f"{Path(config.model).stem} in {config.dtype}, {config.optim}{rank}, updates of "
            f"{config.total_batch_size} × {config.max_length} tokens{each}"
        ]
        lines += [f"{kind:<13}{size / 2**30:8.2f} GiB   {_MEANING[kind]}" for kind, size in self.parts.items()]
        lines.append(f"{'peak':<13}{self.peak_bytes / 2**30:8.2f} GiB   {self.place}")
        verdict = "fits" if self.peak_bytes <= budget else "does not fit"
        lines.append(f"{verdict} into {budget / 2**30:.2f} GiB ({source}), with {describe(self.config)}")
        if device_of(self.config).type == "cpu":
            lines.append("planned with this CPU's kernels; a GPU's have other temporaries")
        return "\n".join(lines)


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
    """How the updates run, in words."""
    how = ["layerwise updates" if config.layerwise else "updates after backward"]
    how += ["activation checkpointing"] if config.activation_checkpointing else []
    how.append(f"micro-batches of {config.batch_size} × {config.max_length} tokens")
    how += [f"the {config.clip_norm} norm clipped"] if config.clip_norm else []
    return ", ".join(how)


class Static(NamedTuple):
    """Bytes that are there throughout a run: exact."""

    weights: int
    gradients: int
    """Of all weights that are trained."""
    state: int
    sums: int
    """Of all gradients as layerwise updates keep them until the last micro-batch: projected where the rule does."""


@dataclass(frozen=True)
class Outline:
    """A run's model and optimizer, or a process's part of them, on ``meta``: they say what the real ones will hold, and
    hold nothing. Neither depends on the execution and the micro-batch."""

    model: LlamaForCausalLM
    optimizer: "RuleOptimizer"

    @classmethod
    def of(cls, config: RunConfig, architecture: LlamaConfig, mesh: Any = None) -> "Outline":
        """Build it; InputError where the config's options do not fit the model."""
        model = model_for(config, architecture, "meta", mesh=mesh)
        return cls(model, optimizer_for(config, model))

    @cached_property
    def static(self) -> Static:
        """Bytes that are there before anything is computed."""
        optimizer = self.optimizer
        sums = sum(optimizer.sum_bytes(p) for p in optimizer.state)
        weights = sum(local(p).nbytes for p in self.model.parameters())
        gradients = sum(local(p).nbytes for p in optimizer.state)
        return Static(weights, gradients, optimizer.state_bytes(), sums)


def static_bytes(config: RunConfig, architecture: LlamaConfig, mesh: Any = None) -> Static:
    """What a run, or a process of it, holds before it computes anything, whatever its execution and micro-batch."""
    return Outline.of(config, architecture, mesh).static


def measure(
    config: RunConfig,
    architecture: LlamaConfig,
    mesh: Any = None,
    *,
    every_update: bool = False,
    outline: Outline | None = None,
) -> Plan:
    """The peak over the updates of a run, or of a process of ``mesh``, by making them on fake tensors: no memory, no
    arithmetic, no communication.

    The update is made in which the largest matrices have a basis due, and the first one, where sums over micro-batches
    do not outweigh its random bases. Of several micro-batches, the first and the last are run: between them nothing
    is added. Updates of equal tensors are made once and then replayed, and of the chunks in which a large tensor is
    updated, three are (``every_update`` makes all). Allocations are counted, without what an allocator or a kernel of
    a library adds for itself. The `faked` model is a copy of that of ``outline``, where there is one.
    """
    ledger = Ledger(resizes=mesh is not None)
    sample = None if every_update else ChunkSample()
    with faked(config, architecture, mesh, ledger, sample, outline) as (model, optimizer):
        for p in optimizer.slots:
            for basis in optimizer.rule_of(p).bases(optimizer.tensors(p)):
                if basis is not None:
                    ledger.assign(basis, "bases")
        execution = execution_for(config, optimizer)
        _watch(ledger, model)
        optimizer.observer = _Filing(ledger, optimizer, each=every_update)
        make_heaviest_updates(config, model, optimizer, execution, min(config.micro_batches, 2))
    return Plan(config, ledger.peak, ledger.at_peak, ledger.moment_of_peak)


@contextmanager
def faked(
    config: RunConfig,
    architecture: LlamaConfig,
    mesh: Any = None,
    ledger: Ledger | None = None,
    sample: ChunkSample | None = None,
    outline: Outline | None = None,
) -> Iterator[tuple[LlamaForCausalLM, "RuleOptimizer"]]:
    """Make tensors fake meanwhile, and give a run's model and optimizer of them, which ``ledger`` sees being made.

    With a ``sample``, only some of a large tensor's chunks are worked on.
    """
    if mesh is not None:
        import_module("torch.distributed._tools.fake_collectives")  # what they return of fake tensors
    if outline is None or mesh is not None:  # what FSDP2 has shared out cannot be copied
        model = Outline.of(config, architecture, mesh).model  # its optimizer fills caches that fake tensors cannot
    else:
        model = copy.deepcopy(outline.model)

    def kind(name: str) -> AbstractContextManager[None]:
        return ledger.kind(name) if ledger else contextlib.nullcontext()

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.chunk_sample = sample  # type: ignore[attr-defined]
    with mode, device_of(config), ledger or contextlib.nullcontext():
        with kind("weights"):
            model.to_empty(device=device_of(config))
            model.tie_weights()  # where the config says so: new storage has parted them
        with kind("moments"):
            optimizer = optimizer_for(config, prepare(config, model), mesh)
        yield model, optimizer


def make_heaviest_updates(
    config: RunConfig, model: LlamaForCausalLM, optimizer: "RuleOptimizer", execution: Execution, micro_batches: int
) -> None:
    """Those updates of a run that can hold most, of so many micro-batches each."""
    for count in heaviest_updates(config, optimizer):
        for p, state in optimizer.state.items():  # as if all before it had been made
            state["step"] = count - 1
            optimizer.random_bits(p, count + 1000)  # what they were last read from is still there
        make_update(config, model, execution, micro_batches)


def make_update(config: RunConfig, model: LlamaForCausalLM, execution: Execution, micro_batches: int) -> None:
    """One update of so many micro-batches, of no text."""
    for i in range(micro_batches):
        rows = torch.zeros(config.batch_size, config.max_length, dtype=torch.long)
        loss = mean_loss(model, rows, rows, rows.numel())
        execution.begin(i, micro_batches)
        loss.backward()
        del loss
    execution.complete()


def _watch(ledger: Ledger, model: LlamaForCausalLM) -> None:
    """Tell the ledger where in the update it is, and which tensors are gradients."""

    def say(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            ledger.moment = name

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(say(f"forward of layer {i}"))
    model.model.norm.register_forward_hook(say("head and loss"))

    def gradient(name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            ledger.moment = f"backward, at {name}"
            if p.grad is not None:
                ledger.assign(p.grad, "gradients")

        return hook

    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        p.register_post_accumulate_grad_hook(gradient(name))


def heaviest_updates(config: RunConfig, optimizer: "RuleOptimizer") -> list[int]:
    """Numbers of the updates that can hold most."""
    if not optimizer.projects:
        return [1]
    size: Counter[int] = Counter()
    for p in optimizer.state:
        if (due := optimizer.next_due(p, 2)) is not None:
            size[due] += p.numel()
    heaviest = max(size, key=lambda count: size[count])
    return [heaviest] if config.micro_batches > 1 else [1, heaviest]


# The optimizer hands over each piece of its work. Pieces that are alike for many tensors are done once, and what they
# held is replayed for the others: a plan of 7B would take minutes otherwise.
class _Filing:
    """Gives what an optimizer keeps its kind in the ledger, and does once what is alike, unless ``each`` is wanted."""

    def __init__(self, ledger: Ledger, optimizer: "RuleOptimizer", *, each: bool) -> None:
        self._ledger, self._optimizer, self._each = ledger, optimizer, each
        self._known: dict[Hashable, dict[str, int]] = {}

    def observe(self, name: str, p: Tensor | None, work: Callable[[], None]) -> None:
        """Do a piece of the optimizer's work, or replay what one like it held."""
        if name == "complete":
            self._ledger.moment = "updates after backward"
        if p is None or name == "refresh":
            work()
            return
        with self._ledger.kind("temporaries"):  # a table of random bits is made now and then: no part of what repeats
            self._optimizer.random_bits(p, self._optimizer.state[p]["step"] + 1)
        if name == "update":
            self._update(p, work)
        elif name == "accumulate":
            self._accumulate(p, work)
        else:
            work()
            self._assign(p, compressed_only=True)

    def _update(self, p: Tensor, work: Callable[[], None]) -> None:
        if not self._once("update", p, work):
            self._optimizer.discard([p])

    def _accumulate(self, p: Tensor, work: Callable[[], None]) -> None:
        if p not in self._optimizer.pending:
            work()
        elif not self._once("accumulate", p, work):
            p.grad = None
        self._assign(p)

    def _assign(self, p: Tensor, *, compressed_only: bool = False) -> None:
        """Say of what kind the pending gradient is."""
        pending = self._optimizer.pending.get(p)
        if pending is None:
            return
        if pending.compressed:
            self._ledger.assign(pending.grad, "sums")
        elif not compressed_only:
            self._ledger.assign(pending.grad, "gradients")

    def _once(self, name: str, p: Tensor, work: Callable[[], None]) -> bool:
        """Whether the work was done; else what it held has been replayed."""
        pending = self._optimizer.pending.get(p)
        compressed = None if pending is None else pending.compressed
        count = int(self._optimizer.state[p]["step"]) + 1
        is_due = self._optimizer.next_due(p, count) == count
        key = (name, p.shape, self._optimizer.rule_of(p), compressed, is_due)
        if self._each or key not in self._known:
            self._known[key] = self._ledger.episode(work)
            return True
        self._ledger.replay(self._known[key])
        return False
