"""Parts about memory: `memory`, the plan against what torch's allocator gives out, and `seven`, a real update of 7B."""

import time
from dataclasses import dataclass

import torch

from galore_pretrain.check.part import Part
from galore_pretrain.check.updates import (
    Built,
    build,
    config_of,
    first_line,
    forget,
    has_8bit,
    lacks_8bit,
    launches,
    random_rows,
    wait_for,
)
from galore_pretrain.config.options import RunConfig
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.planning.plan import make_heaviest_updates, measure
from galore_pretrain.tensors.ledger import allocated_peak

_GIB = 2**30
_PLAN_BOUND = 3.0  # percent
_SHOWN = 23.64 * _GIB
"""What CUDA shows of a card that is sold with 24 GB (an RTX 4090)."""
_CONTEXT = 0.5 * _GIB
"""What its context takes of that."""
_DESKTOP = 0.5 * _GIB
"""What a desktop takes of it, beside which the updates are to fit."""
_LENGTH = 256
_PROMISED = 4
"""Rows at a time that are to fit. Twice as many fitted an H200 with 0.06 GiB left, so that they are tried, and told."""
_LEAST_SECONDS = 25.0


@dataclass(frozen=True)
class _Case:
    """Describes a run whose plan is checked."""

    model: str
    optim: str
    layerwise: bool
    rows: int
    total: int

    def config(self, device: str) -> RunConfig:
        """Return its config."""
        return config_of(
            self.optim,
            {"update_proj_gap": 200},
            model=self.model,
            layerwise=self.layerwise,
            activation_checkpointing=self.layerwise,
            batch_size=self.rows,
            total_batch_size=self.total,
            device=device,
        )

    def __str__(self) -> str:
        how = "layerwise" if self.layerwise else "after backward"
        return f"{self.model} {self.optim} {how}, {self.rows} rows of {self.total}"


def memory(part: Part) -> None:
    """Check the peak of a plan against that of real updates, for small models on a CPU and to 1B on a GPU."""
    methods = [("galore_adamw", False, 1), ("galore_adamw8bit", True, 2)]
    models, rows = ["llama_9m"], 2
    if part.is_on_gpu:
        methods.append(("adamw", False, 2))
        models, rows = ["llama_60m", "llama_130m", "llama_1b"], 8
        _load_libraries(part.device)
    for model in models:
        for optim, layerwise, micro_batches in methods:
            case = _Case(model, optim, layerwise, rows, rows * micro_batches)
            if lacks_8bit(optim):
                part.skip(str(case), "bitsandbytes is not installed")
            elif part.has_time_for(str(case), _LEAST_SECONDS):
                _against_plan(part, case)


# cuBLAS takes a workspace for each thread that asks for a product: 32 MiB on Hopper. No plan counts them.
def _load_libraries(device: torch.device) -> None:
    """Have a GPU's libraries take what they take once, before anything is measured."""
    layer = torch.nn.Linear(256, 256, device=device, dtype=torch.bfloat16)
    layer(torch.ones(256, 256, device=device, dtype=torch.bfloat16)).sum().backward()


def _against_plan(part: Part, case: _Case) -> None:
    """Check one plan against the same updates, made with real tensors."""
    config = case.config(str(part.device))
    began = time.monotonic()
    planned = measure(config, load_model_config(config.model)).peak_bytes
    part.number(f"{case}: GiB planned", round(planned / _GIB, 3))
    part.number(f"{case}: seconds for the plan", round(time.monotonic() - began, 1))
    forget(part.device)
    if not part.is_on_gpu:
        measured = allocated_peak(lambda: _make_updates(config, part.device))
    else:
        free, _ = torch.cuda.mem_get_info(part.device)
        if planned > free:
            part.skip(str(case), f"{free / _GIB:.2f} GiB of the card are free")
            return
        measured = _measured_on_gpu(part, case, config)
    part.number(f"{case}: GiB allocated", round(measured / _GIB, 3))
    off = 100 * (planned / measured - 1)
    name = f"{case}: the plan against what was allocated, %"
    part.check(name, round(off, 2), f"-{_PLAN_BOUND:g} to {_PLAN_BOUND:g}", abs(off) <= _PLAN_BOUND)


def _measured_on_gpu(part: Part, case: _Case, config: RunConfig) -> int:
    """Return the bytes that CUDA's allocator had given out at most; where there were not enough, all there were."""
    before = torch.cuda.memory_allocated(part.device)
    reserved_before = torch.cuda.memory_reserved(part.device)
    try:
        _make_updates(config, part.device)
        wait_for(part.device)
    except torch.OutOfMemoryError as error:
        part.check(f"{case}: updates that are planned to fit", first_line(error), "fit", False)
    allocated = torch.cuda.max_memory_allocated(part.device) - before
    reserved = torch.cuda.max_memory_reserved(part.device) - reserved_before
    part.number(f"{case}: MiB reserved beyond that", round((reserved - allocated) / 2**20))
    return allocated


def _make_updates(config: RunConfig, device: torch.device) -> None:
    """Make the updates that the plan is of."""
    built = build(config, device)
    with device:
        micro_batches = min(config.micro_batches, 2)
        make_heaviest_updates(config, built.model, built.optimizer, built.execution, micro_batches)


def seven(part: Part) -> None:
    """Make real updates of llama_7b where the allocator may take no more than a 24 GB card leaves it, or has free."""
    free, total = torch.cuda.mem_get_info(part.device)
    cap = min(_SHOWN - _CONTEXT, free)
    least = _SHOWN - _CONTEXT - _DESKTOP
    if free < least:
        part.skip("updates of llama_7b", f"{free / _GIB:.2f} GiB of the card are free, and it takes {least / _GIB:.2f}")
        return
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), part.device)
    for rows in (_PROMISED, 2 * _PROMISED):
        _update_seven(part, rows, cap)
        forget(part.device)
        if part.seconds_left() < 60:
            return


def _update_seven(part: Part, rows: int, cap: float) -> None:
    """Make two clipped updates, of three micro-batches of so many rows each."""
    label = f"7B, {rows} rows at a time, clipped"
    optim = "galore_adamw8bit" if has_8bit() else "galore_adamw"
    config = config_of(
        optim,
        model="llama_7b",
        rank=1024,
        layerwise=True,
        activation_checkpointing=True,
        batch_size=rows,
        total_batch_size=512,
        grad_clip=1.0,
        device=str(part.device),
    )
    told = f"{label}: fits into {cap / _GIB:.2f} GiB"
    try:
        built = build(config, part.device)
        tokens = random_rows(rows, _LENGTH, part.device)
        for number in (1, 2):
            _tell_seconds(part, f"{label}: update {number}", built, tokens)
    except torch.OutOfMemoryError as error:
        if rows == _PROMISED:
            part.check(told, first_line(error), "it does", False)
        else:
            part.number(told, first_line(error))
        return
    peak = torch.cuda.max_memory_allocated(part.device)
    if rows == _PROMISED:
        part.check(told, peak <= cap, "it does", peak <= cap)
    part.number(f"{label}: GiB allocated", round(peak / _GIB, 2))
    part.number(f"{label}: GiB reserved", round(torch.cuda.max_memory_reserved(part.device) / _GIB, 2))
    free, total = torch.cuda.mem_get_info(part.device)
    outside = total - free - torch.cuda.memory_reserved(part.device)
    part.number(f"{label}: GiB beside the allocator", round(outside / _GIB, 2))
    if part.seconds_left() > 60:
        part.number(f"{label}: launches of an update", launches(lambda: built.update(tokens)))


def _tell_seconds(part: Part, label: str, built: Built, tokens: torch.Tensor) -> None:
    """Make an update of three micro-batches, and tell how long it took and how long the first pass did."""
    wait_for(part.device)
    began = time.perf_counter()
    first_pass = 0.0
    for number in range(3):
        loss = mean_loss(built.model, tokens, tokens, 3 * tokens.numel())
        built.execution.begin(number, 3)
        loss.backward()
        wait_for(part.device)
        if number == 0:
            first_pass = time.perf_counter() - began
        del loss
    built.execution.complete()
    built.execution.outcome()
    wait_for(part.device)
    part.number(f"{label}: seconds", round(time.perf_counter() - began, 2))
    part.number(f"{label}: seconds of the first forward and backward", round(first_pass, 2))
