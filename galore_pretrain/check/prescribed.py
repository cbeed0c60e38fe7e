"""Updates of a small LLaMA by prescribed gradients: what a row makes of them, on any device and in any dtype."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.check.part import Part
from galore_pretrain.check.updates import has_8bit
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import METHODS, OPTIONS, Method, RuleOptimizer, build_optimizer, is_own

LR = 1e-3
DECAY = 0.1
RANK = 32
PERIOD = 3
"""Updates that a basis is kept for."""
_LAST_BIT = 2.0**-23
_LEAST_BOUND = 1e-5
_LAST_BITS = 10
_LAST_BITS_ON_GPU = 30
_SCALE = 1e-3
_DIRECTIONS = 48  # of a gradient's spectrum
_DECLINE = 0.9  # from one to the next
_NOISE = 0.01


def rows(part: Part) -> list[Method]:
    """Return the optimizers that are checked; those of 8 bits are skipped where bitsandbytes is missing."""
    found: list[Method] = []
    for entry in METHODS.values():
        if entry.home is None or is_own(entry.name):
            continue
        if entry.moments_8bit and not has_8bit():
            part.skip(entry.name, "bitsandbytes is not installed")
            continue
        found.append(entry)
    return found


@dataclass
class Small:
    """Holds a LLaMA of one layer and a row's optimizer of it."""

    optimizer: RuleOptimizer
    params: dict[str, Tensor]

    # Bases are SVDs, so that they do not depend on random numbers, which another device draws otherwise.
    @classmethod
    def build(cls, entry: Method, device: torch.device, dtype: torch.dtype) -> "Small":
        """Build both. The weights are numbers that bf16 holds, the same on every device."""
        architecture = load_model_config("llama_1m")
        architecture.num_hidden_layers = 1
        architecture.vocab_size = 256
        model = build_model(architecture, device="cpu", dtype=torch.bfloat16, seed=0)
        model.to(device=device, dtype=dtype)
        flags = {"rank": RANK, "update_proj_gap": PERIOD, "basis": "svd", "refresh": "together"}
        options: dict[str, Any] = {
            OPTIONS[flag].argument: value for flag, value in flags.items() if flag in entry.options
        }
        optimizer = build_optimizer(model, entry.name, lr=LR, weight_decay=DECAY, **options)
        optimizer.allocate()
        return cls(optimizer, dict(model.named_parameters()))

    def without_kernels(self) -> "Small":
        """Have updates take single operations where kernels of our own would make them, and return the model."""
        for slot in self.optimizer.slots.values():
            slot.has_kernels = False
        return self

    def holds_bases(self) -> bool:
        """Return whether a rule holds a basis of a matrix; a projection that is computed from a hash is none."""
        held: list[Tensor] = []
        for p, slot in self.optimizer.slots.items():
            held += slot.rule.held_bases(self.optimizer.tensors(p))
        return bool(held)

    def update(self, count: int, noise: int = 0) -> dict[str, Tensor]:
        """Make so many updates, and return what they have changed of each weight, on the CPU in fp64.

        ``noise`` is how many last bits of fp32 the gradients are off at most.
        """
        before = self.weights()
        for number in range(count):
            drawn = gradients(self.params, number, noise)
            for p, gradient in zip(self.params.values(), drawn, strict=True):
                p.grad = gradient.to(dtype=p.dtype, device=p.device)
            self.optimizer.step()
        return {name: weight - before[name] for name, weight in self.weights().items()}

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the weights, on the CPU in fp64."""
        return {name: p.detach().cpu().double() for name, p in self.params.items()}


# Real gradients have a steep spectrum, in which a basis magnifies last bits. All numbers are of bf16, so that runs in
# bf16 and in fp32 get the same.
def gradients(params: dict[str, Tensor], number: int, noise: int = 0) -> Iterator[Tensor]:
    """Yield gradient ``number`` of each parameter (fp32, on the CPU), up to ``noise`` last bits off."""
    generator = torch.Generator().manual_seed(1000 + number)
    other = torch.Generator().manual_seed(1000 * noise + number)
    for p in params.values():
        gradient = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            m, n = p.shape
            left = torch.randn(m, _DIRECTIONS, generator=generator) * _DECLINE ** torch.arange(_DIRECTIONS)
            right = torch.randn(_DIRECTIONS, n, generator=generator)
            gradient = left @ right + _NOISE * gradient
        gradient = (_SCALE * gradient).bfloat16().float()
        if noise:
            signs = torch.randint(-1, 2, gradient.shape, generator=other)
            gradient = gradient * (1 + signs * noise * _LAST_BIT)
        yield gradient


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return how far two changes are apart, of the length of ``other``: of the tensor where that is most."""
    distances: list[float] = []
    for name, change in other.items():
        distances.append(float((one[name] - change).norm() / change.norm()))
    return largest(distances)


def largest(values: Sequence[float]) -> float:
    """Return the largest of ``values``; NaN if any is NaN, which `max` may pass over."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return max(values)


# A basis magnifies last bits, by how much depends on the row. Another device has other last bits in every product and
# decomposition, so that more of them differ: an H200 came 11 times as far from the CPU (docs/benchmarks/gpu.md).
def bound_for(part: Part, entry: Method, count: int, least: float = _LEAST_BOUND) -> float:
    """Return how far ``count`` updates of a row in fp32 may be off: times what a last bit of gradients does on a CPU.

    It is ``least`` at the least, and NaN, which nothing is below, where one of the updates comes to no number.
    """
    cpu = torch.device("cpu")
    exact = Small.build(entry, cpu, torch.float32).without_kernels().update(count)
    times = _LAST_BITS_ON_GPU if part.is_on_gpu else _LAST_BITS
    found = [least]
    for noise in (1, 2):
        moved = Small.build(entry, cpu, torch.float32).without_kernels().update(count, noise)
        found.append(times * apart(moved, exact))
    return largest(found)
