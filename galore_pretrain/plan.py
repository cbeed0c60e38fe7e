"""Memory before the run: the real step, on fake tensors, with a ledger of what it holds."""

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from galore_pretrain.build import device_of, execution_for, optimizer_for, prepare
from galore_pretrain.config import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.memory import Ledger, available_bytes
from galore_pretrain.model import build_model, load_model_config, mean_loss, without_masks
from galore_pretrain.optim.step import abridged
from galore_pretrain.recipes import CHOSEN, micro_batches, with_execution

if TYPE_CHECKING:
    from galore_pretrain.optim import RuleOptimizer


OUTSIDE = 10**9
"""Bytes that tensors do not get: of a card, the driver's, its libraries' and the allocator's fragments; of a machine,
the program's own, its text and what saving takes."""


@dataclass(frozen=True)
class Plan:
    """The peak of one run's updates in bytes: ``parts`` says for what, ``place`` where in the update."""

    config: RunConfig
    peak_bytes: int
    parts: dict[str, int]
    place: str

    def as_json(self, budget: int) -> dict[str, Any]:
        """The keys that programs may rely on. The parts add up to the peak."""
        parts, config = self.parts, self.config
        return {
            "peak_bytes": self.peak_bytes,
            "weights_bytes": parts["weights"],
            "gradients_bytes": parts["gradients"] + parts["sums"],
            "optimizer_bytes": parts["moments"] + parts["bases"],
            "activations_bytes": parts["activations"],
            "temporary_bytes": parts["temporaries"],
            "fits": self.peak_bytes <= budget,
            "budget_bytes": budget,
            "place": self.place,
            "layerwise": config.layerwise,
            "activation_checkpointing": config.activation_checkpointing,
            "batch_size": config.batch_size,
            "total_batch_size": config.total_batch_size,
            "clip_norm": config.clip_norm,
        }

    def table(self, budget: int) -> str:
        """What a person reads."""
        lines = [f"{kind:<13}{size / 2**30:8.2f} GiB   {_MEANING[kind]}" for kind, size in self.parts.items()]
        lines.append(f"{'peak':<13}{self.peak_bytes / 2**30:8.2f} GiB   {self.place}")
        verdict = "fits" if self.peak_bytes <= budget else "does not fit"
        lines.append(f"{verdict} into {budget / 2**30:.2f} GiB, with {describe(self.config)}")
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


def budget_of(config: RunConfig) -> int:
    """Bytes that tensors may take: of ``--memory-budget``, or of what the device has free now."""
    return (config.memory_budget or available_bytes(device_of(config))) - OUTSIDE


def plan(config: RunConfig, origins: Mapping[str, str], budget: int) -> Plan:
    """The plan of the run that `choose` would choose."""
    config, origins, planned = choose(config, origins, budget)
    return planned or measure(config, load_model_config(config.model))


def choose(config: RunConfig, origins: Mapping[str, str], budget: int) -> tuple[RunConfig, dict[str, str], Plan | None]:
    """The fastest way to run the updates that fits the budget; what was forced by a flag stays.

    Candidates are tried in the order of their arithmetic: checkpointing repeats the forward pass, layerwise sums
    project each micro-batch. The plan is None where a bound shows at once that the first fits. Where none does, the
    plan is the one with the smallest peak.
    """
    architecture = load_model_config(config.model)
    candidates = _candidates(config, origins)
    if _upper_bound(candidates[0][0], architecture) <= budget:
        return *candidates[0], None
    plans: list[tuple[RunConfig, dict[str, str], Plan]] = []
    for candidate, its_origins in candidates:
        if _lower_bound(candidate, architecture) <= budget:
            plans.append((candidate, its_origins, measure(candidate, architecture)))
            if plans[-1][2].peak_bytes <= budget:
                return plans[-1]
    if not plans:
        least, its_origins = min(
            candidates,
            key=lambda pair: (
                _lower_bound(pair[0], architecture), not pair[0].activation_checkpointing, pair[0].batch_size,
            ),
        )  # fmt: skip
        return least, its_origins, measure(least, architecture)
    return min(plans, key=lambda found: found[2].peak_bytes)


def _candidates(config: RunConfig, origins: Mapping[str, str]) -> list[tuple[RunConfig, dict[str, str]]]:
    """What may be chosen, the fastest first, but none that clips another norm before one that clips the full one."""

    def options(name: str, values: Sequence[Any]) -> Sequence[Any]:
        return values if origins[name] == CHOSEN else [getattr(config, name)]

    found = []
    for layerwise in options("layerwise", (False, True)):
        for checkpointing in options("activation_checkpointing", (False, True)):
            # The published code's loss depends on the micro-batch.
            sizes = micro_batches(config.total_batch_size) if config.numerics == "sound" else [config.batch_size]
            for size in options("batch_size", sizes):
                with contextlib.suppress(InputError):  # a clip norm that this way does not know
                    found.append(
                        with_execution(
                            config,
                            origins,
                            layerwise=layerwise,
                            activation_checkpointing=checkpointing,
                            batch_size=size,
                        )
                    )
    return sorted(found, key=lambda pair: (pair[0].clip_norm == "projected", *_cost(pair[0])))


def _cost(config: RunConfig) -> tuple[float, bool, int]:
    """Products with each weight per token, in units of 2mn; at equal cost, the plainer first."""
    tokens = config.batch_size * config.max_length
    several = config.total_batch_size > config.batch_size
    projecting = (config.rank or 0) / tokens if config.layerwise and several else 0.0
    few = 256 / tokens  # a matrix product of few rows is slower
    return 3 + config.activation_checkpointing + projecting + few, config.layerwise, -config.batch_size


def _lower_bound(config: RunConfig, architecture: LlamaConfig) -> int:
    """Weights and optimizer state, and all gradients where they exist at once."""
    weights, state = static_bytes(config, architecture)
    return weights + state + (0 if config.layerwise else weights)


def _upper_bound(config: RunConfig, architecture: LlamaConfig) -> int:
    """What no update exceeds: everything that is there once, and a generous share for each token of a micro-batch."""
    weights, state = static_bytes(config, architecture)
    hidden, inner, heads = architecture.hidden_size, architecture.intermediate_size, architecture.num_attention_heads
    wide = max(hidden, heads * (getattr(architecture, "head_dim", None) or 1))
    layer = 24 * wide + 8 * inner + 2 * heads
    token = 4 * (layer * (architecture.num_hidden_layers + 2) + 4 * architecture.vocab_size)
    largest = 4 * hidden * max(architecture.vocab_size, inner)  # of a decomposition's copies, or of a gradient's sum
    return int(3 * weights + state + 6 * largest + config.batch_size * config.max_length * token + 2**28)


def static_bytes(config: RunConfig, architecture: LlamaConfig) -> tuple[int, int]:
    """(weights, optimizer state), exact."""
    model = build_model(architecture, device="meta", dtype=getattr(torch, config.dtype))
    optimizer = optimizer_for(config, model)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    return sum(p.nbytes for p in model.parameters()), state


def measure(config: RunConfig, architecture: LlamaConfig, *, every_update: bool = False) -> Plan:
    """The peak over the updates of a run, by making them on fake tensors: no memory, no arithmetic.

    The update is made in which the largest matrices have a basis due, and the first one, where sums over micro-batches
    do not outweigh its random bases. Of several micro-batches, the first and the last are run: between them nothing
    is added. Updates of equal tensors are made once and then replayed, and of the pieces in which a large tensor is
    updated, three are (``every_update`` makes all). Allocations are counted, without what an allocator or a kernel of
    a library adds for itself.
    """
    optimizer_for(config, build_model(architecture, device="meta"))  # fills caches that fake tensors cannot
    ledger = Ledger()
    shortened = contextlib.nullcontext() if every_update else abridged()
    with FakeTensorMode(allow_non_fake_inputs=True), device_of(config), ledger, shortened:
        with ledger.kind("weights"):
            model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, config.dtype))
            model = without_masks(model)
        with ledger.kind("moments"):
            optimizer = optimizer_for(config, prepare(config, model))
        for state in optimizer.state.values():
            for name, value in state.items():
                if name.endswith("basis"):
                    ledger.assign(value, "bases")
        _watch(ledger, model)
        execution = execution_for(config, optimizer)
        _file_sums(ledger, optimizer, each=every_update)
        shape = config.batch_size, config.max_length
        of_update = min(config.total_batch_size // config.batch_size, 2)
        for count in heaviest_updates(config, optimizer):
            with ledger.kind("moments"):
                put_before(optimizer, count)
            for i in range(of_update):
                rows, labels = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
                loss = mean_loss(model, rows, labels, rows.numel())
                execution.begin(i, of_update)
                loss.backward()
                del loss
            ledger.place = "updates after backward"
            execution.complete()
    return Plan(config, ledger.peak, ledger.at_peak, ledger.place_of_peak)


def _watch(ledger: Ledger, model: LlamaForCausalLM) -> None:
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
        p.register_post_accumulate_grad_hook(gradient(name))


def put_before(optimizer: "RuleOptimizer", count: int) -> None:
    """As if ``count`` - 1 updates had been made, with what random bits were last read from still there."""
    for p, state in optimizer.state.items():
        state["step"] = count - 1
        optimizer.random_bits(p, count + 1000)


def heaviest_updates(config: RunConfig, optimizer: "RuleOptimizer") -> list[int]:
    """Numbers of the updates that can hold most."""
    if not optimizer.projects:
        return [1]
    size: Counter[int] = Counter()
    for p in optimizer.state:
        if (due := optimizer.next_due(p, 2)) is not None:
            size[due] += p.numel()
    heaviest = max(size, key=lambda count: size[count])
    return [heaviest] if config.total_batch_size > config.batch_size else [1, heaviest]


def _file_sums(ledger: Ledger, optimizer: "RuleOptimizer", *, each: bool) -> None:
    """Give sums of gradients their kind, and do only once what is alike for many tensors, unless ``each`` is wanted."""
    known: dict[Hashable, dict[str, int]] = {}
    gather, settle, update = optimizer.gather, optimizer.settle, optimizer.update_param

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

    optimizer.gather, optimizer.settle = gather_filed, settle_filed  # type: ignore[method-assign]
    optimizer.update_param = update_filed  # type: ignore[method-assign]
