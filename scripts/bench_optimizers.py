"""Measure step time, refresh time, peak extra memory and state of every row and its peers, in one interleaved run.

    python scripts/bench_optimizers.py --shapes 60m --dtype bfloat16         # extra `bench`; a table in Markdown
    python scripts/bench_optimizers.py --shapes 7b --refreshes 1 --only galore_adamw --only "galore_torch GaLoreAdamW"

All candidates update the same weights from the same random gradients, one step each in turn, so that what else the
machine does falls on all alike. `refresh` is what a step costs more in which every basis is renewed, against the one
before, in which none is. `extra` is the largest sum of memory allocated and not yet freed inside a step, without and
with a refresh. Ratios are to the published code of the same method, or to torch's AdamW. torchao is a candidate where
it is installed: no extra does that, since transformers then warns at every import.
"""

import argparse
import platform
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from galore_pretrain import load_model_config
from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.optim.build import build_rules, rounding_of
from galore_pretrain.optim.methods import ROWS
from galore_pretrain.tensors.ledger import allocated_peak

Candidate = tuple[str, str, Callable[[int], Any]]
"""A name, what it is compared with, and its builder from the gap between refreshes."""

NEVER = 1_000_000  # updates between refreshes
BASELINE = "torch AdamW foreach"
RANKS = {"60m": 128, "130m": 256, "7b": 1024}


def shapes(name: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of (matrices, other weights) of a model; of 7B one square and one tall matrix stand for 224."""
    if name == "7b":
        return [(4096, 4096), (11008, 4096)], [(4096,)]
    config = load_model_config(f"llama_{name}")
    h = config.hidden_size
    i = config.intermediate_size
    layers = config.num_hidden_layers
    attention = [(h, h)] * 4
    mlp = [(i, h)] * 2 + [(h, i)]
    embeddings_and_head = [(config.vocab_size, h)] * 2
    norms = [(h,)] * (2 * layers + 1)
    return (attention + mlp) * layers, embeddings_and_head + norms


def candidates(matrices: list[Tensor], rest: list[Tensor], rank: int) -> Iterator[Candidate]:
    """Yield this project's rows, then the optimizers of torch and other packages, then the published code."""
    galore = {"rank": rank, "scale": 0.25, "proj_type": "std"}

    def ours(row: str, numerics: str = "sound") -> Callable[[int], Any]:
        def build(gap: int) -> Any:
            options: dict[str, Any] = {}
            if "galore" in row:
                options = {"rank": rank, "update_proj_gap": gap, "refresh": "together"}
            rule, bare = build_rules(row, numerics, **options)
            groups = [{"params": matrices, "rule": rule}, {"params": rest, "rule": bare}]
            return RuleOptimizer(groups, lr=1e-6, rounding=rounding_of(numerics))

        return build

    def theirs(name: str, **kwargs: Any) -> Callable[[int], Any]:
        import galore_torch

        def build(gap: int) -> Any:
            groups = [{"params": rest}, {"params": matrices, "update_proj_gap": gap, **galore}]
            return getattr(galore_torch, name)(groups, lr=1e-6, **kwargs)

        return build

    published = {row: f"galore_torch {name}" for row, name in PUBLISHED.items()}
    for row in ROWS:
        yield row, published.get(row, BASELINE), ours(row)
        if row in ("galore_adamw", "galore_adafactor"):  # the published code's numbers, bit for bit
            yield f"{row} reference", published[row], ours(row, "reference")

    both = matrices + rest
    peers = {
        BASELINE: partial(torch.optim.AdamW, both, lr=1e-6, foreach=True),
        "torch AdamW fused": partial(torch.optim.AdamW, both, lr=1e-6, fused=True),
        "bitsandbytes AdamW8bit": partial(_bitsandbytes, both),
        "transformers Adafactor": partial(_transformers_adafactor, both),
    }
    if _has("torchao"):
        peers["torchao AdamW8bit"] = partial(_torchao, both)
    for name, peer in peers.items():
        yield name, BASELINE, _without_gap(peer)

    if _has("galore_torch"):
        adafactor = {"scale_parameter": False, "relative_step": False}
        yield "galore_torch GaLoreAdamW", BASELINE, theirs("GaLoreAdamW", no_deprecation_warning=True)
        yield "galore_torch GaLoreAdamW8bit", BASELINE, theirs("GaLoreAdamW8bit", weight_decay=0.0)
        yield "galore_torch GaLoreAdafactor", BASELINE, theirs("GaLoreAdafactor", **adafactor)


def _without_gap(build: Callable[[], Any]) -> Callable[[int], Any]:
    """Return a builder that takes a gap between refreshes and has no use for it."""
    return lambda gap: build()


PUBLISHED = {
    "galore_adamw": "GaLoreAdamW",
    "galore_adamw8bit": "GaLoreAdamW8bit",
    "galore_adafactor": "GaLoreAdafactor",
    "natural_galore": "GaLoreAdamW",
    "natural_galore8bit": "GaLoreAdamW8bit",
}


def _bitsandbytes(params: list[Tensor]) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=1e-6, weight_decay=0.0)


def _transformers_adafactor(params: list[Tensor]) -> Any:
    from transformers import Adafactor

    return Adafactor(params, lr=1e-6, scale_parameter=False, relative_step=False)


def _torchao(params: list[Tensor]) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-6)


def _has(package: str) -> bool:
    try:
        metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return False
    return True


def seconds(optimizer: Any, grads: dict[Tensor, Tensor], device: torch.device) -> float:
    """Return the seconds of one step."""
    for p, grad in grads.items():
        p.grad = grad  # GaLoreAdamW8bit leaves its low-rank gradient there
    started = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def extra_bytes(optimizer: Any, grads: dict[Tensor, Tensor], device: torch.device) -> int:
    """Return the peak of what one step allocates beyond what was there."""
    for p, grad in grads.items():
        p.grad = grad
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        optimizer.step()
        return torch.cuda.max_memory_allocated(device) - before
    return allocated_peak(optimizer.step)


def state_bytes(optimizer: Any) -> int:
    """Return the bytes of every tensor that is reachable from the optimizer's state, each storage counted once."""
    sizes: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            # torchao's quantized tensors are made of several plain ones.
            names = getattr(value, "tensor_attrs", [])
            parts = [getattr(value, name) for name in names] or [value]
            for part in parts:
                sizes[part.data_ptr()] = part.nbytes
        elif isinstance(value, dict):
            for name, item in value.items():
                # bitsandbytes' tables of code points are the same for all parameters, and no state.
                if name not in ("qmap1", "qmap2"):
                    visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif hasattr(value, "ortho_matrix"):  # galore_torch's projector
            visit(value.ortho_matrix)

    visit(dict(optimizer.state))
    return sum(sizes.values())


@dataclass
class Figures:
    """What was measured, by candidate: seconds and bytes. Refreshes are those of projecting candidates alone."""

    steady: dict[str, float]
    extra: dict[str, int]
    state: dict[str, int]
    refresh: dict[str, float]
    extra_refresh: dict[str, int]


def measured(chosen: list[Candidate], grads: dict[Tensor, Tensor], rounds: int, refreshes: int) -> Figures:
    """Measure all candidates: first steps without refreshes, then those with one."""
    # All candidates take one step in turn, round after round, so that what else the machine does falls on all alike.
    # With a gap of 3, each third step renews all bases. A refresh costs what that step takes more than the one before;
    # the step before that pair is not timed: it finds the caches as other candidates left them.
    device = next(iter(grads)).device
    built = {}
    extra = {}
    state = {}
    for name, _, build in chosen:
        optimizer = build(NEVER)
        built[name] = optimizer
        for _ in range(2):  # what is set up at first use
            seconds(optimizer, grads, device)
        extra[name] = extra_bytes(optimizer, grads, device)
        state[name] = state_bytes(optimizer)
    times = defaultdict(list)
    for _ in range(rounds):
        for name, optimizer in built.items():
            times[name].append(seconds(optimizer, grads, device))
    del built, optimizer  # their states would lie beside the next ones'

    renewing = {name: build(3) for name, _, build in chosen if "galore" in name.lower()}
    costs = defaultdict(list)
    for optimizer in renewing.values():
        seconds(optimizer, grads, device)  # starts from nothing
    for _ in range(refreshes):
        for name, optimizer in renewing.items():
            seconds(optimizer, grads, device)
            not_renewed = seconds(optimizer, grads, device)
            renewed = seconds(optimizer, grads, device)
            costs[name].append(renewed - not_renewed)
    extra_refresh = {}
    for name, optimizer in renewing.items():
        for _ in range(2):
            seconds(optimizer, grads, device)
        extra_refresh[name] = extra_bytes(optimizer, grads, device)
    return Figures(medians(times), extra, state, medians(costs), extra_refresh)


def medians(values: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each list."""
    result = {}
    for name, numbers in values.items():
        result[name] = statistics.median(numbers)
    return result


def print_table(chosen: list[Candidate], figures: Figures) -> None:
    """Print the table in Markdown."""
    print("| | step ms | × | refresh ms | × | extra MiB; with refresh | state MiB | compared with |")
    print("|---|---|---|---|---|---|---|---|")
    for name, other, _ in chosen:
        refresh = ""
        extra = f"{figures.extra[name] / 2**20:.0f}"
        if name in figures.refresh:
            refresh = f"{1000 * figures.refresh[name]:.0f}"
            extra += f"; {figures.extra_refresh[name] / 2**20:.0f}"
        cells = [
            name,
            f"{1000 * figures.steady[name]:.1f}",
            _ratio(figures.steady, name, other),
            refresh,
            _ratio(figures.refresh, name, other),
            extra,
            f"{figures.state[name] / 2**20:.1f}",
            "" if other == name else other,
        ]
        print(f"| {' | '.join(cells)} |")


def _ratio(values: dict[str, float], name: str, other: str) -> str:
    """Return how many times the other's value this one is; an empty text where one of them was not measured."""
    if name == other or name not in values or other not in values:
        return ""
    return f"{values[name] / values[other]:.2g}"


def print_machine(arguments: argparse.Namespace, device: torch.device) -> None:
    """Print what is measured, where, and with which versions."""
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    versions = []
    for package in ("torch", "bitsandbytes", "galore-torch", "torchao", "transformers"):
        if _has(package):
            versions.append(f"{package} {metadata.version(package)}")
    setting = f"llama_{arguments.shapes} shapes, rank {RANKS[arguments.shapes]}, {arguments.dtype}"
    print(f"{setting}, {machine}; {', '.join(versions)}")
    print(f"medians of {arguments.rounds} interleaved steps\n")


def main() -> None:
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=list(RANKS), default="60m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--refreshes", type=int, default=3, help="measured, after a first one")
    parser.add_argument("--only", action="append", help="a name of the table; may be repeated")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.cuda.synchronize = lambda device=None: None  # GaLoreAdamW8bit waits for a GPU at every parameter
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)

    def weights(sizes: list[tuple[int, ...]]) -> list[Tensor]:
        tensors = []
        for size in sizes:
            numbers = torch.randn(size, device=device).mul_(0.02)
            tensors.append(numbers.to(dtype).requires_grad_())
        return tensors

    matrix_shapes, other_shapes = shapes(arguments.shapes)
    matrices = weights(matrix_shapes)
    rest = weights(other_shapes)
    grads = {}
    for p in matrices + rest:
        numbers = torch.randn(p.shape, device=device) * 1e-3
        grads[p] = numbers.to(dtype)

    everything = list(candidates(matrices, rest, RANKS[arguments.shapes]))
    names = [name for name, _, _ in everything]
    only = arguments.only or names
    unknown = set(only) - set(names)
    if unknown:
        parser.error(f"--only {unknown.pop()}: choose from {', '.join(names)}")
    chosen = [candidate for candidate in everything if candidate[0] in only]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = measured(chosen, grads, arguments.rounds, arguments.refreshes)
    print_machine(arguments, device)
    print_table(chosen, figures)


if __name__ == "__main__":
    main()
