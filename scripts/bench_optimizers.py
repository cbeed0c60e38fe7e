"""Step time, refresh time, peak extra memory and state of every row and of its peers, in one interleaved run.

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
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from galore_pretrain import load_model_config
from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.optim.build import build_rules, rounding_of
from galore_pretrain.optim.methods import ROWS
from galore_pretrain.planning.ledger import allocated_peak

NEVER = 1_000_000  # updates between refreshes
RANKS = {"60m": 128, "130m": 256, "7b": 1024}


def shapes(name: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(matrices, other weights) of a model; of 7B one square and one tall matrix stand for 224."""
    if name == "7b":
        return [(4096, 4096), (11008, 4096)], [(4096,)]
    config = load_model_config(f"llama_{name}")
    h, i = config.hidden_size, config.intermediate_size
    layer = [(h, h)] * 4 + [(i, h)] * 2 + [(h, i)]
    layers = config.num_hidden_layers
    return layer * layers, [(config.vocab_size, h)] * 2 + [(h,)] * (2 * layers + 1)


def candidates(
    matrices: list[Tensor], rest: list[Tensor], rank: int
) -> Iterator[tuple[str, str, Callable[[int], Any]]]:
    """(name, what it is compared with, builder from the gap between refreshes)."""
    galore = {"rank": rank, "scale": 0.25, "proj_type": "std"}

    def ours(row: str, numerics: str = "sound") -> Callable[[int], Any]:
        def build(gap: int) -> Any:
            options: dict[str, Any] = (
                {"rank": rank, "update_proj_gap": gap, "refresh": "together"} if "galore" in row else {}
            )
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

    both = matrices + rest
    adafactor = {"scale_parameter": False, "relative_step": False}
    published = {row: f"galore_torch {name}" for row, name in PUBLISHED.items()}
    for row in ROWS:
        yield row, published.get(row, "torch AdamW foreach"), ours(row)
        if row in ("galore_adamw", "galore_adafactor"):  # the published code's numbers, bit for bit
            yield f"{row} reference", published[row], ours(row, "reference")
    yield "torch AdamW foreach", "torch AdamW foreach", lambda gap: torch.optim.AdamW(both, lr=1e-6, foreach=True)
    yield "torch AdamW fused", "torch AdamW foreach", lambda gap: torch.optim.AdamW(both, lr=1e-6, fused=True)
    yield "bitsandbytes AdamW8bit", "torch AdamW foreach", lambda gap: _bitsandbytes(both)
    yield "transformers Adafactor", "torch AdamW foreach", lambda gap: _transformers_adafactor(both)
    if _has("torchao"):
        yield "torchao AdamW8bit", "torch AdamW foreach", lambda gap: _torchao(both)
    if _has("galore_torch"):
        yield "galore_torch GaLoreAdamW", "torch AdamW foreach", theirs("GaLoreAdamW", no_deprecation_warning=True)
        yield "galore_torch GaLoreAdamW8bit", "torch AdamW foreach", theirs("GaLoreAdamW8bit", weight_decay=0.0)
        yield "galore_torch GaLoreAdafactor", "torch AdamW foreach", theirs("GaLoreAdafactor", **adafactor)


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
    for p, grad in grads.items():
        p.grad = grad  # GaLoreAdamW8bit leaves its low-rank gradient there
    started = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def extra_bytes(optimizer: Any, grads: dict[Tensor, Tensor], device: torch.device) -> int:
    """The peak of what one step allocates beyond what was there."""
    for p, grad in grads.items():
        p.grad = grad
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        optimizer.step()
        return torch.cuda.max_memory_allocated(device) - before
    return allocated_peak(optimizer.step)


def state_bytes(optimizer: Any) -> int:
    """Every tensor that is reachable from the optimizer's state, counted once."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            parts = [getattr(value, name) for name in getattr(value, "tensor_attrs", [])] or [value]
            found.update({part.data_ptr(): part.nbytes for part in parts})
        elif isinstance(value, dict):
            [visit(v) for k, v in value.items() if k not in ("qmap1", "qmap2")]
        elif isinstance(value, (list, tuple)):
            [visit(v) for v in value]
        elif hasattr(value, "ortho_matrix"):
            visit(value.ortho_matrix)

    visit(dict(optimizer.state))
    return sum(found.values())


def main() -> None:
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
    matrices, rest = (
        [torch.randn(shape, device=device).mul_(0.02).to(dtype).requires_grad_() for shape in group]
        for group in shapes(arguments.shapes)
    )
    grads = {p: (torch.randn(p.shape, device=device) * 1e-3).to(dtype) for p in matrices + rest}
    everything = list(candidates(matrices, rest, RANKS[arguments.shapes]))
    if unknown := set(arguments.only or ()) - {c[0] for c in everything}:
        parser.error(f"--only {unknown.pop()}: choose from {', '.join(c[0] for c in everything)}")
    chosen = [c for c in everything if not arguments.only or c[0] in arguments.only]

    built, extra, state, refresh = {}, {}, {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, _, build in chosen:
            built[name] = build(NEVER)
            for _ in range(2):  # what is set up at first use
                seconds(built[name], grads, device)
            extra[name], state[name] = extra_bytes(built[name], grads, device), state_bytes(built[name])
        times: dict[str, list[float]] = {name: [] for name in built}
        for _ in range(arguments.rounds):
            for name, optimizer in built.items():
                times[name].append(seconds(optimizer, grads, device))
        del built
        steady = {name: statistics.median(values) for name, values in times.items()}
        renewing = {name: build(3) for name, _, build in chosen if "galore" in name.lower()}
        costs: dict[str, list[float]] = {name: [] for name in renewing}
        for optimizer in renewing.values():
            seconds(optimizer, grads, device)  # starts from nothing
        for _ in range(arguments.refreshes):
            for name, optimizer in renewing.items():
                seconds(optimizer, grads, device)  # what others left in the caches falls on neither of the two
                not_renewed, renewed = seconds(optimizer, grads, device), seconds(optimizer, grads, device)
                costs[name].append(renewed - not_renewed)
        refresh = {name: statistics.median(values) for name, values in costs.items()}
        extra_refresh = {}
        for name, optimizer in renewing.items():
            for _ in range(2):
                seconds(optimizer, grads, device)
            extra_refresh[name] = extra_bytes(optimizer, grads, device)

    versions = ", ".join(
        f"{p} {metadata.version(p)}"
        for p in ("torch", "bitsandbytes", "galore-torch", "torchao", "transformers")
        if _has(p)
    )
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(f"llama_{arguments.shapes} shapes, rank {RANKS[arguments.shapes]}, {arguments.dtype}, {machine}; {versions}")
    print(f"medians of {arguments.rounds} interleaved steps\n")
    print("| | step ms | × | refresh ms | × | extra MiB | with refresh | state MiB | compared with |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, other, _ in chosen:
        cells = [f"{1000 * steady[name]:.1f}", _ratio(steady, name, other)]
        cells += [f"{1000 * refresh[name]:.0f}", _ratio(refresh, name, other)] if name in refresh else ["", ""]
        cells += [f"{extra[name] / 2**20:.0f}", f"{extra_refresh[name] / 2**20:.0f}" if name in extra_refresh else ""]
        cells += [f"{state[name] / 2**20:.1f}", "" if other == name else other]
        print(f"| {name} | {' | '.join(cells)} |")


def _ratio(values: dict[str, float], name: str, other: str) -> str:
    return f"{values[name] / values[other]:.2g}" if other in values and other != name else ""


if __name__ == "__main__":
    main()
