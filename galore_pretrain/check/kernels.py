"""Parts about what one kernel does: `kernels` of our own, `eight_bit` moments on any stream, `refresh` of bases."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.check.part import Part
from galore_pretrain.check.prescribed import Small, apart, bound_for, largest, rows
from galore_pretrain.check.updates import has_8bit, timed
from galore_pretrain.optim import Adam, Blockwise8bit, Method, Step, random_basis, randomized_basis
from galore_pretrain.tensors.capability import runs_on, small_updates_are_right, why_not_on

_UPDATES = 4
_EIGHT_BIT_BOUND = 5e-2  # of a direction; on an H200, 8.2e-5
_CODES_BOUND = 1e-2  # of bytes that may be another code than the next one; on an H200, 1e-6
_LEAST_SECONDS = 40.0  # for a row; Triton's interpreter takes that much
_MOMENTS = 2**20
_MOMENTS_ON_CPU = 2**14
_STREAMED = 5
_CYCLES = 50_000_000  # that a side stream sleeps: tens of milliseconds


def kernels(part: Part) -> None:
    """Check that updates by kernels of our own are those by single operations, for each row."""
    why_not = why_not_on(part.device)
    if why_not is not None:
        if part.is_on_gpu:
            part.check(
                "Triton's kernels run here", why_not, "they do, by galore-pretrain[kernels] and a C compiler", False
            )
        part.skip("kernels of our own", f"they do not run on {part.device}: {why_not}")
        return
    is_right = small_updates_are_right(part.device)
    part.check("a small update by each kernel", is_right, "as by torch's operations", is_right)
    for entry in rows(part):
        if part.has_time_for(entry.name, _LEAST_SECONDS):
            _against_composed(part, entry)


def _against_composed(part: Part, entry: Method) -> None:
    """Check a row's updates in fp32 by kernels against those by single operations on the same device."""
    by_kernels = Small.build(entry, part.device, torch.float32).update(_UPDATES)
    composed = Small.build(entry, part.device, torch.float32).without_kernels().update(_UPDATES)
    name = f"{entry.name}: fp32 updates by kernels against single operations"
    if entry.moments_8bit:
        # On a CPU, the single operations are bitsandbytes' coarser quantizer. By value, `eight_bit` checks them.
        part.number(name, apart(by_kernels, composed))
        return
    part.check_below(name, apart(by_kernels, composed), bound_for(part, entry, _UPDATES))


class _Composed(Blockwise8bit):
    """Keeps moments in 8 bits, and has no kernel for both of Adam's: the rule takes single operations."""

    def fused_adam(self, *arguments: Any, **more: Any) -> Tensor | None:
        """Return None."""
        return None


@dataclass
class _Moments:
    """Holds Adam's two moments of a flat tensor in 8 bits, and updates them by kernels of our own or without."""

    rule: Adam
    by_kernels: bool
    state: dict[str, Tensor]

    @classmethod
    def zeros(cls, store: Blockwise8bit, device: torch.device, *, by_kernels: bool) -> "_Moments":
        """Return moments of zeros."""
        rule = Adam(store=store)
        return cls(rule, by_kernels, rule.init(torch.empty(_size(device), device=device)))

    def direction(self, gradient: Tensor, count: int) -> Tensor:
        """Advance the moments by a gradient and return the direction."""
        found = self.rule.update(gradient, self.state, Step(count, kernels=self.by_kernels))
        assert found.left is not None
        return found.left * found.factor


def _size(device: torch.device) -> int:
    """Return how many elements are updated; Triton's interpreter takes a millisecond for some hundred."""
    if device.type == "cpu":
        return _MOMENTS_ON_CPU
    return _MOMENTS


def eight_bit(part: Part) -> None:
    """Check both kernels for 8 bits, bitsandbytes' and ours, against single operations, and on another stream."""
    if not has_8bit():
        part.skip("8 bits", "bitsandbytes is not installed")
        return
    ways: dict[str, Callable[[], _Moments]] = {}
    if part.is_on_gpu:
        ways["bitsandbytes' way"] = lambda: _Moments.zeros(Blockwise8bit(), part.device, by_kernels=False)
    else:
        part.skip("bitsandbytes' way", "on a CPU, it is single operations too")
    if runs_on(part.device):
        ways["our kernel"] = lambda: _Moments.zeros(Blockwise8bit(), part.device, by_kernels=True)
    for name, begin in ways.items():
        _against_single_operations(part, name, begin())
        if part.is_on_gpu:
            _on_side_stream(part, name, begin)


def _against_single_operations(part: Part, name: str, moments: _Moments) -> None:
    """Check directions and bytes over several updates."""
    composed = _Moments.zeros(_Composed(), part.device, by_kernels=False)
    distances: list[float] = []
    for count in range(1, _UPDATES + 1):
        generator = torch.Generator().manual_seed(count)
        gradient = 1e-3 * torch.randn(_size(part.device), generator=generator).to(part.device)
        expected = composed.direction(gradient.clone(), count)
        direction = moments.direction(gradient.clone(), count)
        distances.append(float((direction - expected).norm() / expected.norm()))
    worst = largest(distances)
    part.check_below(f"{name}: 8-bit directions against single operations", worst, _EIGHT_BIT_BOUND)
    steps = (moments.state["exp_avg"].int() - composed.state["exp_avg"].int()).abs()
    share = float((steps > 1).float().mean())
    part.check_below(f"{name}: share of bytes more than one code off", share, _CODES_BOUND)


# FSDP2 calls the hooks of layerwise updates on a stream of its own. A kernel that was launched on the default stream
# would read a gradient that is not there yet. So the gradient is made late here, by a stream that sleeps first.
def _on_side_stream(part: Part, name: str, begin: Callable[[], _Moments]) -> None:
    """Check that updates on a side stream are those on the default one."""
    side = torch.cuda.Stream(part.device)
    wrong = 0
    for _ in range(_STREAMED):
        source = torch.randn(_size(part.device), device=part.device)
        late, expected = begin(), begin()
        torch.cuda.synchronize(part.device)
        with torch.cuda.stream(side):
            torch.cuda._sleep(_CYCLES)
            direction = late.direction(source * 2, 1)
        torch.cuda.synchronize(part.device)
        wanted = expected.direction(source * 2, 1)
        torch.cuda.synchronize(part.device)
        is_same = torch.equal(direction, wanted) and torch.equal(late.state["exp_avg"], expected.state["exp_avg"])
        wrong += not is_same
    part.check(f"{name}: updates on a side stream that came out wrong", wrong, f"none of {_STREAMED}", wrong == 0)


def refresh(part: Part) -> None:
    """Check that bases are orthonormal, and tell how long one of them takes, beside its QR and an SVD."""
    spectrum = 0.95 ** torch.arange(96)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(1024, 96, generator=generator) * spectrum
    gradient = (left @ torch.randn(96, 2048, generator=generator)).to(part.device)
    identity = torch.eye(64, device=part.device)
    previous = random_basis((1024, 64), "left", 1, part.device)
    for _ in range(3):
        previous = randomized_basis(gradient, 64, "left", previous)
    part.check_below("left basis: ‖PᵀP − I‖", float((previous.T @ previous - identity).norm()), 1e-4)
    previous = random_basis((64, 2048), "right", 1, part.device)
    for _ in range(3):
        previous = randomized_basis(gradient, 64, "right", previous)
    part.check_below("right basis: ‖QQᵀ − I‖", float((previous @ previous.T - identity).norm()), 1e-4)
    sizes = [(128, 352, 32)]
    if part.is_on_gpu:
        sizes = [(512, 1376, 128), (2048, 5461, 512), (4096, 11008, 1024)]
    for m, n, rank in sizes:
        _time_basis(part, m, n, rank)


def _time_basis(part: Part, m: int, n: int, rank: int) -> None:
    """Tell how long a basis of rank r of an m × n gradient takes, its QR, and an SVD where that takes no minute."""
    device = part.device
    gradient = torch.randn(m, n, device=device, dtype=torch.bfloat16)
    previous = random_basis((m, rank), "left", 0, device).bfloat16()
    tall = torch.randn(m, rank, device=device)
    of = f"of rank {rank} of {m} × {n}"
    times = timed(lambda: randomized_basis(gradient, rank, "left", previous), device, repeats=3, warm_up=1)
    part.number(f"ms of a basis {of}", round(times.done, 2))
    times = timed(lambda: torch.linalg.qr(tall), device, repeats=3, warm_up=1)
    part.number(f"ms of its QR by torch {of}", round(times.done, 2))
    if m <= 2048:
        in_fp32 = gradient.float()
        times = timed(lambda: torch.linalg.svd(in_fp32, full_matrices=False), device, repeats=1, warm_up=1)
        part.number(f"ms of an SVD of {m} × {n}", round(times.done, 2))
