"""Runs and updates that parts of the check make: built as training builds them, without text."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.resolve import resolve
from galore_pretrain.model.families import CausalLM
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import Execution, Outcome, RuleOptimizer, method
from galore_pretrain.train.build import execution_for, model_for, optimizer_for, set_up_model

_LAUNCHING = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclass
class Built:
    """Holds a run's model, with its optimizer and the execution of its updates."""

    model: CausalLM
    optimizer: RuleOptimizer
    execution: Execution

    def update(self, rows: Tensor, micro_batches: int = 1) -> Outcome:
        """Make one update, each of its micro-batches of the same ``rows`` (rows × tokens), and return its outcome."""
        for number in range(micro_batches):
            loss = mean_loss(self.model, rows, rows, rows.numel() * micro_batches)
            self.execution.begin(number, micro_batches)
            loss.backward()
            del loss
        self.execution.complete()
        return self.execution.outcome()


def has_8bit() -> bool:
    """Return whether bitsandbytes is installed, which keeps moments in 8 bits."""
    return find_spec("bitsandbytes") is not None


def lacks_8bit(optim: str) -> bool:
    """Return whether a method keeps moments in 8 bits, and nothing here does."""
    return method(optim).moments_8bit and not has_8bit()


def config_of(optim: str, low_rank: Mapping[str, Any] | None = None, **flags: Any) -> RunConfig:
    """Return the config of a run with these flags, in bf16 and not clipped where they do not say otherwise.

    Flags of ``low_rank`` are left out where the method has none of that name.
    """
    given = {"data": "sample", "wandb": "disabled", "dtype": "bfloat16", "steps": 1000, "grad_clip": 0.0} | flags
    given["optim"] = optim
    for flag, value in (low_rank or {}).items():
        if flag in method(optim).options:
            given[flag] = value
    config, _ = resolve(given, dict.fromkeys(given, "flag"))
    return config


# Weights are drawn on the device: of 7B, that takes seconds, and the CPU would take minutes.
def build(config: RunConfig, device: torch.device) -> Built:
    """Build what a run trains, with random weights, on ``device``."""
    model = model_for(config, load_model_config(config.model), device, fresh=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.02)
            else:
                p.fill_(1.0)
    optimizer = optimizer_for(config, set_up_model(config, model))
    return Built(model, optimizer, execution_for(config, optimizer))


def random_rows(rows: int, length: int, device: torch.device) -> Tensor:
    """Return random tokens (rows × length), of the smallest vocabulary of a shipped model."""
    return torch.randint(0, 1024, (rows, length), device=device)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Free what is garbage, give a GPU's cached memory back, and begin its peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@dataclass(frozen=True)
class Times:
    """Holds median milliseconds of some work: until the device had done it, and until the host had asked for it."""

    done: float
    asked: float


def timed(work: Callable[[], object], device: torch.device, repeats: int = 5, warm_up: int = 2) -> Times:
    """Return how long ``work`` takes, after ``warm_up`` repeats that are not counted."""
    done: list[float] = []
    asked: list[float] = []
    for number in range(-warm_up, repeats):
        wait_for(device)
        began = time.perf_counter()
        work()
        was_asked = time.perf_counter()
        wait_for(device)
        was_done = time.perf_counter()
        if number >= 0:
            asked.append(1000 * (was_asked - began))
            done.append(1000 * (was_done - began))
    return Times(statistics.median(done), statistics.median(asked))


def tokens_per_second(tokens: int, milliseconds: float) -> float:
    """Return how many tokens a second that is."""
    return round(1000 * tokens / milliseconds)


def launches(work: Callable[[], object]) -> int:
    """Return how many kernels, copies and fills a GPU is given for ``work``."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.key.startswith(_LAUNCHING))


def busy_milliseconds(work: Callable[[], object]) -> float:
    """Return for how many milliseconds a GPU computes in ``work``."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    microseconds: float = sum(event.self_device_time_total for event in seen.key_averages())
    return microseconds / 1000
