"""Chooses how a run's updates are executed: layerwise, checkpointed, in which micro-batches."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from galore_pretrain.config.options import ExecutionSettings, RunConfig
from galore_pretrain.config.resolve import known_norm, micro_batch_sizes, with_execution
from galore_pretrain.errors import InputError
from galore_pretrain.model.architecture import architecture_of_run
from galore_pretrain.model.documents import mask_bytes
from galore_pretrain.model.encoder import is_encoder
from galore_pretrain.model.families import Architecture
from galore_pretrain.optim import method
from galore_pretrain.planning.plan import Outline, Plan, Static, is_on_gpu, keeps_scores, measure


@dataclass(frozen=True)
class Choice:
    """An execution that was chosen, as a complete config, and its plan, None where it fits without one."""

    config: RunConfig
    plan: Plan | None


# Candidates are tried in the order of their arithmetic: checkpointing repeats the forward pass, layerwise sums project
# each micro-batch. Measuring one takes seconds for a large model. So the first is taken unmeasured where even a
# generous bound fits, and those whose least possible peak is too large are passed over.
def choose(config: RunConfig, budget: int, mesh: Any = None, outline: Outline | None = None) -> Choice:
    """Return the fastest execution of the updates that fits ``budget`` bytes; what was forced by a flag stays.

    Where none fits, the choice is the one with the smallest peak among those measured, and its plan says so.
    """
    architecture = architecture_of_run(config)
    outline = outline or Outline.of(config, architecture, mesh)
    static = outline.static
    ways = candidates(config)
    if not ways:
        raise InputError(
            f"--clip-norm {config.clip_norm}: no way to run these updates knows it with {config.processes.total} "
            "processes; leave out --layerwise, --batch-size and --reduce, or give as many processes as before"
        )
    keeps_on_host = ways[0].accumulate_on == "host" and ways[0].micro_batches > 1
    if not keeps_on_host and upper_bound(ways[0], architecture, static) <= budget:
        return Choice(ways[0], None)

    plans: list[Plan] = []
    for candidate in ways:
        if lower_bound(candidate, architecture, static) > budget:
            continue
        plan = measure(candidate, architecture, mesh, outline=outline)
        if plan.fits(budget):
            return Choice(candidate, plan)
        plans.append(plan)
    if not plans:
        least = min(ways, key=lambda candidate: lower_bound(candidate, architecture, static))
        plans.append(measure(least, architecture, mesh, outline=outline))
    smallest = min(plans, key=lambda plan: (not plan.fits_host, plan.peak_bytes))
    return Choice(smallest.config, smallest)


def candidates(config: RunConfig) -> list[RunConfig]:
    """Return what may be chosen, the fastest first, but none that clips another norm before one that clips the full."""
    undecided = config.undecided
    layerwise = (False, True) if "layerwise" in undecided else (config.layerwise,)
    checkpointing = (False, True) if "activation_checkpointing" in undecided else (config.activation_checkpointing,)
    sizes = [config.batch_size]
    if "batch_size" in undecided and config.numerics == "sound":  # the published code's loss depends on the micro-batch
        sizes = _sizes(config)

    ways = []
    for is_layerwise, is_checkpointed, size in itertools.product(layerwise, checkpointing, sizes):
        norm = config.clip_norm
        if "clip_norm" in undecided:
            values = config.values() | {"layerwise": is_layerwise, "batch_size": size}
            norm = known_norm(values, config.processes)
        try:
            candidate = with_execution(config, ExecutionSettings(is_layerwise, is_checkpointed, size, norm))
        except InputError:  # this execution does not know the norm that is asked for
            continue
        ways.append(candidate)
    return sorted(ways, key=lambda candidate: (candidate.clip_norm == "projected", *_cost(candidate)))


def _sizes(config: RunConfig) -> list[int]:
    """Return the sizes of a micro-batch that may be chosen, each once. One micro-batch an update keeps no sums."""
    rows = config.total_batch_size // config.processes.total
    sizes = micro_batch_sizes(config.total_batch_size, config.processes)
    if is_on_gpu(config):
        sizes = [1 << i for i in range(10) if rows % (1 << i) == 0]
        if rows > 512:
            return sizes
    return list(dict.fromkeys((*sizes, rows)))


# The unit is 2mn a token and weight matrix, one product. A forward and a backward pass are three of them.
def _cost(config: RunConfig) -> tuple[float, bool, int]:
    """Return the products with each weight per token, in units of 2mn; at equal cost, the plainer comes first."""
    tokens = config.batch_size * config.max_length
    cost = 3.0
    if config.activation_checkpointing:
        cost += 1
    sums_are_projected = config.layerwise and config.micro_batches > 1 and method(config.optim).projects
    if sums_are_projected and config.rank:
        cost += config.rank / tokens
    cost += _cost_of_size(config, tokens)
    return cost, config.layerwise, -config.batch_size


def _cost_of_size(config: RunConfig, tokens: int) -> float:
    """Return what a micro-batch of so many tokens costs beside its products, in the units of `_cost`."""
    if is_on_gpu(config):
        # A micro-batch takes about a thousand launches whatever its size, and a GPU waits for them. Measured on an
        # H200 (docs/benchmarks/gpu.md): llama_60m gains up to 128 Ki tokens, the most that was tried.
        return 1024 / tokens
    cost = 256 / min(tokens, 8 * config.max_length)  # a matrix product of few rows is slower
    if config.batch_size > 8:
        cost += 0.25  # so are activations that no cache holds; how much, is a guess
    return cost


def lower_bound(config: RunConfig, architecture: Architecture, static: Static) -> int:
    """Return bytes that some update holds for certain.

    They are all that is there throughout, the gradients that exist at once, and what the matrix products keep for the
    backward pass; of several micro-batches, the last one's beside the sum of the others.
    """
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    heads = architecture.num_attention_heads
    kv_heads = getattr(architecture, "num_key_value_heads", heads)
    head_size = getattr(architecture, "head_dim", None) or hidden // heads
    inner_products = 2 if is_encoder(architecture) else 3
    if config.activation_checkpointing:
        numbers_a_token = hidden
    else:
        numbers_a_token = 2 * hidden + 2 * (heads + kv_heads) * head_size + inner_products * inner
    tokens = config.batch_size * config.max_length
    item_bytes = getattr(torch, config.dtype).itemsize
    activations = tokens * architecture.num_hidden_layers * numbers_a_token * item_bytes
    if config.documents == "separate":
        activations += mask_bytes(config.batch_size, config.max_length, getattr(torch, config.dtype))

    has_several = config.micro_batches > 1
    gradients = static.gradients
    if config.layerwise:
        gradients = static.sums if has_several or config.grad_clip else 0
    if has_several and config.accumulate_on == "host":
        gradients = 0
    throughout = static.weights + static.state
    if has_several:
        return int(throughout + gradients + activations)
    return int(throughout + max(gradients, activations))


def upper_bound(config: RunConfig, architecture: Architecture, static: Static) -> int:
    """Return bytes that no update exceeds: all that is there once, and a generous share for each token."""
    hidden, inner, heads = architecture.hidden_size, architecture.intermediate_size, architecture.num_attention_heads
    wide = max(hidden, heads * (getattr(architecture, "head_dim", None) or 1))
    layer = 24 * wide + 8 * inner + 2 * heads
    if is_encoder(architecture):  # where what is attended to is dropped out, the weights of attention are written
        layer += 6 * heads * config.max_length
    token = 4 * (layer * (architecture.num_hidden_layers + 2) + 4 * architecture.vocab_size)
    activations = config.batch_size * config.max_length * token
    if config.documents == "separate":  # the mask, generously
        activations += 2 * mask_bytes(config.batch_size, config.max_length, torch.float32)
    if keeps_scores(config):  # before and after the softmax, and both of their gradients
        scores = mask_bytes(config.batch_size * heads, config.max_length, torch.float32)
        activations += 4 * (architecture.num_hidden_layers + 2) * scores
    # The largest matrix in fp32: copies in a decomposition, or the sum of its gradient.
    largest = 4 * hidden * max(architecture.vocab_size, inner)
    return int(3 * static.weights + static.state + 6 * largest + activations + 2**28)


def memory_advice(config: RunConfig, most: int = 9) -> str:
    """Return what would take less memory than the updates of ``config`` do, in words, the best first."""
    rows = config.batch_size * config.processes.total
    ways = []
    if not config.layerwise:
        ways.append("--layerwise")
    if not config.activation_checkpointing:
        ways.append("--activation-checkpointing")
    if rows > 1:
        ways.append("a smaller --batch-size")
    if config.layerwise and config.total_batch_size > rows:
        ways.append(f"--total-batch-size {rows} (one micro-batch an update keeps no sums)")
    if is_on_gpu(config) and config.accumulate_on == "device" and _sums_can_lie_on_host(config):
        ways.append("--accumulate-on host (slower)")
    if config.rank:
        ways.append("a smaller --rank")
    entry = method(config.optim)
    if "moment_store" in entry.options and not entry.keeps_8bit(config.moment_store):
        ways.append("--moment-store 8bit")
    ways += ["a smaller --max-length", "a larger --memory-budget"]
    return ", ".join(ways[:most])


def _sums_can_lie_on_host(config: RunConfig) -> bool:
    """Return whether the updates of a run keep sums of full gradients that the host could take."""
    return config.micro_batches > 1 and config.processes.total == 1


def in_short(config: RunConfig) -> list[str]:
    """Return how the updates run, in a few words a line."""
    first = "layerwise" if config.layerwise else "after backward"
    if config.activation_checkpointing:
        first += ", checkpointing"
    second = f"{config.batch_size} × {config.max_length}"
    if config.clip_norm:
        second += f", {config.clip_norm} norm"
    return [first, second]


def bars(rows: Sequence[str], plans: Sequence[Plan]) -> dict[str, dict[str, int]]:
    """Return what a picture that compares ``rows`` shows: bytes by kind, by a name that tells how each row runs."""
    shown: dict[str, dict[str, int]] = {}
    for row, plan in zip(rows, plans, strict=True):
        name = "\n".join((plan.config.optim, *in_short(plan.config)))
        if name in shown:  # two rows can be the same method, executed alike
            name = f"{row}\n{name}"
        shown[name] = plan.parts
    return shown
