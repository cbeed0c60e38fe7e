"""Parts about time: `speed` beside a loop by hand and galore_torch, `compiled` layers, `deterministic` kernels."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.check.part import Part
from galore_pretrain.check.updates import (
    Built,
    build,
    busy_milliseconds,
    config_of,
    forget,
    lacks_8bit,
    launches,
    random_rows,
    timed,
    tokens_per_second,
    wait_for,
)
from galore_pretrain.config.options import RunConfig
from galore_pretrain.model.head import mean_loss
from galore_pretrain.optim import is_projected
from galore_pretrain.train.build import compile_layers

_LEAST_SECONDS = 15.0
_MICRO_BATCHES = 4
_NO_REFRESH = 10_000
_LOSS_BOUND = 1e-2  # of a loss; activations are bf16, of eight bits


@dataclass(frozen=True)
class _Size:
    """Says with which model and how many rows of how many tokens speed is measured."""

    model: str
    rank: int
    rows: int
    length: int

    def tokens(self, device: torch.device) -> Tensor:
        """Return random rows of that size."""
        return random_rows(self.rows, self.length, device)

    def config(self, device: torch.device, optim: str, layerwise: bool = False) -> RunConfig:
        """Return a run's config of that size."""
        return config_of(
            optim,
            {"rank": self.rank, "update_proj_gap": _NO_REFRESH},
            model=self.model,
            layerwise=layerwise,
            activation_checkpointing=False,
            batch_size=self.rows,
            total_batch_size=_MICRO_BATCHES * self.rows,
            max_length=self.length,
            device=str(device),
        )

    def __str__(self) -> str:
        return f"{self.model} {self.rows} × {self.length}"


def _sizes(part: Part) -> list[_Size]:
    """Return the sizes to measure: the first one with every method."""
    if not part.is_on_gpu:
        return [_Size("llama_1m", 32, 2, 64)]
    return [_Size("llama_60m", 128, rows, 256) for rows in (8, 64, 128, 256)]


def speed(part: Part) -> None:
    """Tell tokens a second of methods beside a loop by hand; on a GPU also launches and how long it is idle."""
    for number, size in enumerate(_sizes(part)):
        methods = [("galore_adamw", False)]
        if number == 0:
            methods += [("galore_adamw", True), ("galore_adamw8bit", False), ("adamw", False)]
        for optim, layerwise in methods:
            if lacks_8bit(optim):
                part.skip(f"{size} {optim}", "bitsandbytes is not installed")
            elif part.has_time_for(f"{size} {optim}", _LEAST_SECONDS):
                _time_method(part, size, optim, layerwise)
        _time_by_hand(part, size)
        if number == 0:
            _time_galore_torch(part, size)


def _time_method(part: Part, size: _Size, optim: str, layerwise: bool) -> None:
    """Tell how long updates of one and of four micro-batches take."""
    forget(part.device)
    tokens = size.tokens(part.device)
    label = f"{size} {optim}"
    if layerwise:
        label += " layerwise"
    built = build(size.config(part.device, optim, layerwise), part.device)
    one = timed(lambda: built.update(tokens), part.device)
    part.number(f"{label}: tokens/s", tokens_per_second(tokens.numel(), one.done))
    part.number(f"{label}: ms an update", round(one.done, 1))
    part.number(f"{label}: ms until the host is done", round(one.asked, 1))
    four = timed(lambda: built.update(tokens, _MICRO_BATCHES), part.device, repeats=3, warm_up=1)
    several = tokens_per_second(_MICRO_BATCHES * tokens.numel(), four.done)
    part.number(f"{label}: tokens/s with {_MICRO_BATCHES} micro-batches", several)
    if part.is_on_gpu:
        busy = busy_milliseconds(lambda: built.update(tokens))
        part.number(f"{label}: share of the time that the GPU is idle", round(1 - busy / one.done, 3))
        part.number(f"{label}: launches of an update", launches(lambda: built.update(tokens)))


def _time_by_hand(part: Part, size: _Size) -> None:
    """Tell tokens a second of the same model and loss with torch's fused AdamW."""
    forget(part.device)
    model = build(size.config(part.device, "adamw"), part.device).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times = timed(_loop_by_hand(model, optimizer, size.tokens(part.device)), part.device)
    per_second = tokens_per_second(size.rows * size.length, times.done)
    part.number(f"{size} by hand, torch's fused AdamW: tokens/s", per_second)


# The hooks of the run's own execution do nothing where no update was begun.
def _loop_by_hand(model: Any, optimizer: Any, tokens: Tensor) -> Callable[[], None]:
    """Return one update as a user's own loop makes it."""

    def update() -> None:
        mean_loss(model, tokens, tokens, tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def _time_galore_torch(part: Part, size: _Size) -> None:
    """Tell tokens a second of galore_torch, where it is installed."""
    name = f"{size} galore_torch"
    try:
        from galore_torch import GaLoreAdamW
    except Exception as error:  # whatever it needs and does not find
        part.skip(name, f"it cannot be imported ({type(error).__name__})")
        return
    forget(part.device)
    model = build(size.config(part.device, "adamw"), part.device).model
    matrices = [module.weight for name, module in model.named_modules() if is_projected(name, module)]
    ids = {id(weight) for weight in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    galore = {"rank": size.rank, "update_proj_gap": _NO_REFRESH, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([{"params": others}, {"params": matrices, **galore}], lr=1e-4)
    update = _loop_by_hand(model, optimizer, size.tokens(part.device))
    began = time.perf_counter()
    update()
    wait_for(part.device)
    part.number(f"{name}: seconds of the first update, with its SVDs", round(time.perf_counter() - began, 2))
    times = timed(update, part.device)
    part.number(f"{name}: tokens/s", tokens_per_second(size.rows * size.length, times.done))


def compiled(part: Part) -> None:
    """Check the loss of compiled layers, and tell how long a layerwise update takes with and without them."""
    size = _Size("llama_60m", 128, 64, 256)
    tokens = size.tokens(part.device)
    built = build(size.config(part.device, "galore_adamw", layerwise=True), part.device)
    plain = timed(lambda: built.update(tokens), part.device)
    part.number(f"{size} layerwise: ms an update", round(plain.done, 1))
    expected = _loss_of(built, tokens)
    compile_layers(built.model)
    began = time.perf_counter()
    loss = _loss_of(built, tokens)
    built.update(tokens)
    wait_for(part.device)
    part.number(f"{size} layerwise: seconds to compile", round(time.perf_counter() - began, 1))
    part.check_below(f"{size}: the loss of compiled layers, of the loss without", abs(loss / expected - 1), _LOSS_BOUND)
    fast = timed(lambda: built.update(tokens), part.device)
    part.number(f"{size} layerwise, compiled: ms an update", round(fast.done, 1))


def _loss_of(built: Built, tokens: Tensor) -> float:
    """Return the loss of rows (rows × tokens) with the weights that a model has; no gradient comes of it."""
    return float(mean_loss(built.model, tokens, tokens, tokens.numel()).detach())


# What the flag costs is told by two runs that differ in nothing else: cuBLAS works with the same memory in both.
def deterministic(part: Part) -> None:
    """Tell what `--deterministic` costs an update, of one micro-batch in bf16."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before anything asks for a product
    for size in _sizes(part)[:2]:
        tokens = size.tokens(part.device)
        times: list[float] = []
        for wanted in (False, True):
            forget(part.device)
            built = build(replace(size.config(part.device, "galore_adamw"), deterministic=wanted), part.device)
            times.append(timed(partial(built.update, tokens), part.device).done)
            del built
        label = f"{size} galore_adamw: ms an update"
        part.number(label, round(times[0], 1))
        part.number(f"{label}, --deterministic", round(times[1], 1))
        part.number(f"{label}: --deterministic takes, %", round(100 * (times[1] / times[0] - 1), 1))
