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
from galore_pretrain.planning.ledger import Ledger
from galore_pretrain.tensors.chunks import abridged
from galore_pretrain.tensors.rounding import RandomBits
from galore_pretrain.tensors.shards import local
from galore_pretrain.train.build import device_of, execution_for, model_for, optimizer_for, prepare
from galore_pretrain.train.execution import Execution

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
    is added. Updates of equal tensors are made once and then replayed, and of the pieces in which a large tensor is
    updated, three are (``every_update`` makes all). Allocations are counted, without what an allocator or a kernel of
    a library adds for itself. The `faked` model is a copy of that of ``outline``, where there is one.
    """
    ledger = Ledger()
    shortened = contextlib.nullcontext() if every_update else abridged()
    with shortened, faked(config, architecture, mesh, ledger, outline) as (model, optimizer):
        for state in optimizer.state.values():
            for name, value in state.items():
                if name.endswith("basis"):
                    ledger.assign(value, "bases")
        execution = execution_for(config, optimizer)
        _watch(ledger, model, execution)
        _file(ledger, optimizer, each=every_update)
        make_heaviest_updates(config, model, optimizer, execution, min(config.micro_batches, 2))
    return Plan(config, ledger.peak, ledger.at_peak, ledger.place_of_peak)


@contextmanager
def faked(
    config: RunConfig,
    architecture: LlamaConfig,
    mesh: Any = None,
    ledger: Ledger | None = None,
    outline: Outline | None = None,
) -> Iterator[tuple[LlamaForCausalLM, "RuleOptimizer"]]:
    """Meanwhile, tensors are fake: a run's model and optimizer of them, which ``ledger`` sees being made."""
    if mesh is not None:
        import_module("torch.distributed._tools.fake_collectives")  # what they return of fake tensors
    if outline is None or mesh is not None:  # what FSDP2 has shared out cannot be copied
        model = Outline.of(config, architecture, mesh).model  # its optimizer fills caches that fake tensors cannot
    else:
        model = copy.deepcopy(outline.model)

    def kind(name: str) -> AbstractContextManager[None]:
        return ledger.kind(name) if ledger else contextlib.nullcontext()

    with FakeTensorMode(allow_non_fake_inputs=True), device_of(config), ledger or contextlib.nullcontext():
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


def _watch(ledger: Ledger, model: LlamaForCausalLM, execution: Execution) -> None:
    """Tell the ledger where in the update it is, and which tensors are gradients."""

    def say(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            ledger.place = name

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(say(f"forward of layer {i}"))
    model.model.norm.register_forward_hook(say("head and loss"))

    def gradient(name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            ledger.place = f"backward, at {name}"
            if p.grad is not None:
                ledger.assign(p.grad, "gradients")

        return hook

    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        p.register_post_accumulate_grad_hook(gradient(name))

    complete = execution.complete

    def complete_noted() -> None:
        ledger.place = "updates after backward"
        complete()

    execution.complete = complete_noted  # type: ignore[method-assign]


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


def _file(ledger: Ledger, optimizer: "RuleOptimizer", *, each: bool) -> None:
    """Give what an optimizer keeps its kind, and do only once what is alike for many tensors, unless ``each`` is
    wanted."""
    known: dict[Hashable, dict[str, int]] = {}
    gather, settle, update, bits = optimizer.gather, optimizer.settle, optimizer.update_param, optimizer.random_bits

    def once(p: Tensor, name: str, work: Callable[[], None]) -> bool:
        """Whether the work was done; else what it held has been replayed."""
        waiting = optimizer.waiting(p)
        key = (name, p.shape, optimizer.rule_of(p), waiting and waiting.projected, optimizer.is_due(p))
        if each or key not in known:
            known[key] = ledger.episode(work)
            return True
        ledger.replay(known[key])
        return False

    def gather_filed(p: Tensor, **options: Any) -> None:
        optimizer.random_bits(p, optimizer.state[p]["step"] + 1)  # makes some now and then: not a part of what repeats
        if optimizer.waiting(p) is None:
            gather(p, **options)
        elif not once(p, "gather", lambda: gather(p, **options)):
            p.grad = None
        if (waiting := optimizer.waiting(p)) is not None:
            ledger.assign(waiting.grad, "sums" if waiting.projected else "gradients")

    def settle_filed(p: Tensor) -> None:
        settle(p)
        if (waiting := optimizer.waiting(p)) is not None and waiting.projected:
            ledger.assign(waiting.grad, "sums")

    def update_filed(p: Tensor, coefficient: Tensor | None = None) -> None:
        optimizer.random_bits(p, optimizer.state[p]["step"] + 1)
        if not once(p, "update", lambda: update(p, coefficient)):
            optimizer.discard([p])

    def bits_filed(p: Tensor, count: int) -> RandomBits | None:
        with ledger.kind("temporaries"):
            return bits(p, count)

    optimizer.gather, optimizer.settle = gather_filed, settle_filed  # type: ignore[method-assign]
    optimizer.update_param, optimizer.random_bits = update_filed, bits_filed  # type: ignore[method-assign]
