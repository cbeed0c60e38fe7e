"""How a run's updates are made to fit the memory that it may take: layerwise, checkpointing and the micro-batch."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LlamaConfig

from galore_pretrain.config.options import RunConfig, processes, processes_here
from galore_pretrain.config.resolve import CHOSEN, micro_batches, with_execution
from galore_pretrain.errors import InputError
from galore_pretrain.meters import available_bytes
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import method
from galore_pretrain.planning.plan import Outline, Plan, Static, describe, measure
from galore_pretrain.train.build import device_of

log = logging.getLogger(__name__)

OUTSIDE = 10**9
"""Bytes of a machine's memory that tensors do not get: the program's own, its text and what saving takes."""
OUTSIDE_CARD = 1_600_000_000
"""Bytes of all that a card shows which tensors do not get: CUDA's context and loaded kernels (0.5 GiB), workspaces and
fragments (0.3 GiB), and a desktop (0.5 GiB) with some room."""
OUTSIDE_FREE = 700_000_000
"""Bytes of what is free on a card once CUDA's context exists which tensors do not get: kernels that are loaded later
(0.25 GiB), workspaces and fragments (0.3 GiB)."""


def budget_of(config: RunConfig) -> int:
    """Bytes that tensors may take: of ``--memory-budget``, or of what the device has free now.

    A GPU gives no more than it shows and has free, whatever ``--memory-budget`` says.
    """
    device = device_of(config)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        asked = total if config.memory_budget is None else config.memory_budget
        return min(min(asked, total) - OUTSIDE_CARD, free - OUTSIDE_FREE)
    if config.memory_budget is not None:
        return config.memory_budget - OUTSIDE
    return available_bytes(device) // processes_here() - OUTSIDE


def source_of(config: RunConfig) -> str:
    """Where `budget_of` comes from, in words."""
    device, asked = device_of(config), ""
    if config.memory_budget is not None:
        asked = f"--memory-budget {config.memory_budget / 2**30:.2f} GiB"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        shown = f"{device} shows {total / 2**30:.2f} GiB and has {free / 2**30:.2f} free"
        rest = f"less {OUTSIDE_CARD / 2**30:.2f} and {OUTSIDE_FREE / 2**30:.2f} for what is no tensor"
        return ", ".join(part for part in (asked, shown, rest) if part)
    less = f"less {OUTSIDE / 2**30:.2f} for what is no tensor"
    if asked:
        return f"{asked} {less}"
    share = f"1/{processes_here()} of " if processes_here() > 1 else ""
    return f"{share}what this machine has free now, {less}"


def in_short(config: RunConfig) -> list[str]:
    """How the updates run, in a few words a line."""
    lines = ["layerwise" if config.layerwise else "after backward"]
    lines += ["checkpointing"] if config.activation_checkpointing else []
    return [
        ", ".join(lines),
        f"{config.batch_size} × {config.max_length}" + (f", {config.clip_norm} norm" if config.clip_norm else ""),
    ]


def bars(rows: Sequence[str], plans: Sequence[Plan]) -> dict[str, dict[str, int]]:
    """What a picture that compares ``rows`` shows, each by the name that its plan gives it."""
    found: dict[str, dict[str, int]] = {}
    for row, plan in zip(rows, plans, strict=True):
        name = "\n".join((plan.config.optim, *in_short(plan.config)))
        found[f"{row}\n{name}" if name in found else name] = plan.parts
    return found


def memory_advice(config: RunConfig, most: int = 9) -> str:
    """What would take less than the updates of ``config`` do, in words, the best first."""
    total, size = config.total_batch_size, config.batch_size * processes()
    ways = [] if config.layerwise else ["--layerwise"]
    ways += [] if config.activation_checkpointing else ["--activation-checkpointing"]
    ways += ["a smaller --batch-size"] if size > 1 else []
    if config.layerwise and total > size:
        ways.append(f"--total-batch-size {size} (one micro-batch an update keeps no sums)")
    ways += ["a smaller --rank"] if config.rank else []
    ways += [] if method(config.optim).moments_8bit else ["an --optim with 8-bit moments"]
    return ", ".join([*ways, "a smaller --max-length", "a larger --memory-budget"][:most])


def planned(config: RunConfig, origins: Mapping[str, str], budget: int, mesh: Any = None) -> Plan:
    """The plan of the run that `choose` would choose."""
    config, _, plan = choose(config, origins, budget, mesh)
    return plan or measure(config, load_model_config(config.model), mesh)


def fitted(
    config: RunConfig, origins: Mapping[str, str], outline: Outline, mesh: Any = None, *, kept: bool
) -> tuple[RunConfig, Mapping[str, str], Plan | None]:
    """The config whose updates fit the memory budget, and their plan where one had to be made.

    What a run that is resumed was doing is ``kept``, and measured only where a budget is named. InputError where
    nothing fits, with the smallest peak that was found and what helps. ``outline`` is of this process's part.
    """
    budget, plan = budget_of(config), None
    if not kept:
        config, origins, plan = choose(config, origins, budget, mesh, outline)
    elif config.memory_budget is not None:
        plan = measure(config, load_model_config(config.model), mesh, outline=outline)
    if plan and plan.peak_bytes > budget:
        raise InputError(
            f"the {'peak' if kept else 'smallest peak found'} is {plan.peak_bytes / 2**30:.2f} GiB "
            f"({describe(plan.config)}), and {budget / 2**30:.2f} GiB are to be had ({source_of(config)}); "
            f"what helps: {memory_advice(plan.config)}"
        )
    if plan:
        log.info("%s: %.2f of %.2f GiB", describe(config), plan.peak_bytes / 2**30, budget / 2**30)
    return config, origins, plan


def choose(
    config: RunConfig, origins: Mapping[str, str], budget: int, mesh: Any = None, outline: Outline | None = None
) -> tuple[RunConfig, dict[str, str], Plan | None]:
    """The fastest way to run the updates that fits the budget; what was forced by a flag stays.

    Candidates are tried in the order of their arithmetic: checkpointing repeats the forward pass, layerwise sums
    project each micro-batch. The plan is None where a bound shows at once that the first fits. Where none does, the
    plan is the one with the smallest peak.
    """
    architecture = load_model_config(config.model)
    outline = outline or Outline.of(config, architecture, mesh)
    candidates, static = _candidates(config, origins), outline.static
    if not candidates:
        raise InputError(
            f"--clip-norm {config.clip_norm}: no way to run these updates knows it with {processes()} processes; "
            "leave out --layerwise, --batch-size and --reduce, or give as many processes as before"
        )
    if upper_bound(candidates[0][0], architecture, static) <= budget:
        return *candidates[0], None
    plans: list[tuple[RunConfig, dict[str, str], Plan]] = []
    for candidate, its_origins in candidates:
        if lower_bound(candidate, architecture, static) <= budget:
            plans.append((candidate, its_origins, measure(candidate, architecture, mesh, outline=outline)))
            if plans[-1][2].peak_bytes <= budget:
                return plans[-1]
    if not plans:
        least, its_origins = min(candidates, key=lambda pair: lower_bound(pair[0], architecture, static))
        return least, its_origins, measure(least, architecture, mesh, outline=outline)
    return min(plans, key=lambda found: found[2].peak_bytes)


def _candidates(config: RunConfig, origins: Mapping[str, str]) -> list[tuple[RunConfig, dict[str, str]]]:
    """What may be chosen, the fastest first, but none that clips another norm before one that clips the full one."""

    def options(name: str, values: Sequence[Any]) -> Sequence[Any]:
        return values if origins[name] == CHOSEN else [getattr(config, name)]

    found = []
    for layerwise in options("layerwise", (False, True)):
        for checkpointing in options("activation_checkpointing", (False, True)):
            # The published code's loss depends on the micro-batch.
            sizes = _sizes(config) if config.numerics == "sound" else [config.batch_size]
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


def _sizes(config: RunConfig) -> list[int]:
    """Rows of a micro-batch that may be chosen, each once. One micro-batch an update keeps no sums."""
    rows = config.total_batch_size // processes()
    if device_of(config).type == "cuda":
        powers = [1 << i for i in range(10) if rows % (1 << i) == 0]
        return powers if rows > 512 else list(dict.fromkeys((*powers, rows)))
    return list(dict.fromkeys((*micro_batches(config.total_batch_size), rows)))


def _cost(config: RunConfig) -> tuple[float, bool, int]:
    """Products with each weight per token, in units of 2mn; at equal cost, the plainer first."""
    tokens = config.batch_size * config.max_length
    several = config.micro_batches > 1
    sums_are_projected = config.layerwise and several and method(config.optim).projects
    projecting = (config.rank or 0) / tokens if sums_are_projected else 0.0
    cost = 3 + config.activation_checkpointing + projecting + _small_or_large(config, tokens)
    return cost, config.layerwise, -config.batch_size


def _small_or_large(config: RunConfig, tokens: int) -> float:
    """What a micro-batch of so many tokens costs beside its products, in the units of `_cost`."""
    if device_of(config).type == "cuda":
        # A micro-batch takes about a thousand launches whatever its size, and a GPU waits for them. Measured on an
        # H200 (docs/benchmarks/gpu.md): llama_60m gains up to 128 Ki tokens, the most that was tried.
        return 1024 / tokens
    few = 256 / min(tokens, 8 * config.max_length)  # a matrix product of few rows is slower
    many = 0.25 if config.batch_size > 8 else 0.0  # so are activations that no cache holds; how much, is a guess
    return few + many


def lower_bound(config: RunConfig, architecture: LlamaConfig, static: Static) -> int:
    """What some update holds for certain: all that is there throughout, the gradients that exist at once, and what the
    matrix products keep for the backward pass; of several micro-batches, the last one's beside the others' sum."""
    hidden, inner, layers = architecture.hidden_size, architecture.intermediate_size, architecture.num_hidden_layers
    size = getattr(architecture, "head_dim", None) or hidden // architecture.num_attention_heads
    heads = architecture.num_attention_heads + architecture.num_key_value_heads
    kept = hidden if config.activation_checkpointing else 2 * hidden + 2 * heads * size + 3 * inner
    activations = config.batch_size * config.max_length * layers * kept * getattr(torch, config.dtype).itemsize
    several = config.micro_batches > 1
    waiting = static.sums if several or config.grad_clip else 0
    gradients = waiting if config.layerwise else static.gradients
    return int(static.weights + static.state + (gradients + activations if several else max(gradients, activations)))


def upper_bound(config: RunConfig, architecture: LlamaConfig, static: Static) -> int:
    """What no update exceeds: everything that is there once, and a generous share for each token of a micro-batch."""
    hidden, inner, heads = architecture.hidden_size, architecture.intermediate_size, architecture.num_attention_heads
    wide = max(hidden, heads * (getattr(architecture, "head_dim", None) or 1))
    layer = 24 * wide + 8 * inner + 2 * heads
    token = 4 * (layer * (architecture.num_hidden_layers + 2) + 4 * architecture.vocab_size)
    largest = 4 * hidden * max(architecture.vocab_size, inner)  # of a decomposition's copies, or of a gradient's sum
    return int(3 * static.weights + static.state + 6 * largest + config.batch_size * config.max_length * token + 2**28)
