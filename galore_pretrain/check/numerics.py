"""The part `numerics`: whether the updates of each row are right by value, and whether rounding keeps the mean."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from galore_pretrain.check.part import Part
from galore_pretrain.check.prescribed import (
    DECAY,
    LR,
    PERIOD,
    RANK,
    Small,
    apart,
    bound_for,
    gradients,
    largest,
    rows,
)
from galore_pretrain.optim import METHODS, Method, RuleOptimizer, build_rules, check_methods, sides

_CHECKS = ("layerwise", "accumulation", "skipping", "resume")
_UPDATES = 5
_ROUNDED_BOUND = 2e-4  # of fp32 against fp64: weights of 1 are rounded at every update
_STANDARD_ERRORS = 6.0
_LEAST_SECONDS = 20.0  # for a row
_VALUES = 64  # that are rounded
_REPEATS = 4096  # times each


def numerics(part: Part) -> None:
    """Check rounding; then each row against itself made otherwise, against a reference, and bf16 against fp32."""
    rounding(part)
    entries = rows(part)
    for entry in entries:
        bias(part, entry)
    against_formulas(part)
    for entry in entries:
        if part.is_on_gpu and part.has_time_for(f"{entry.name} against the CPU", _LEAST_SECONDS):
            against_cpu(part, entry)
    for entry in entries:
        if part.has_time_for(f"{entry.name} made in other ways", _LEAST_SECONDS):
            same_in_every_way(part, entry)


# Sixty-four values are rounded thousands of times each. The first update of AdamW in fp32, from the same numbers, says
# where they lie between two numbers of bf16. The share that went up is then known but for its standard error.
def rounding(part: Part) -> None:
    """Check that weights and moments in bf16 are one of the two neighbours of what they would be, right on average."""
    in_bf16, state_in_bf16 = _first_update(part.device, torch.bfloat16)
    in_fp32, state_in_fp32 = _first_update(part.device, torch.float32)
    pairs = {"weights": (in_bf16, in_fp32)}
    for name, value in state_in_fp32.items():
        pairs[name] = (state_in_bf16[name], value)
    for name, (rounded, exact) in pairs.items():
        steps, errors = _roundings(rounded, exact)
        # A last bit of fp32 may differ, of a value that is next to a number of bf16.
        part.check_below(f"bf16 {name}: distance from the value, in steps of bf16", steps, 1 + 2**-10)
        part.check_below(f"bf16 {name}: mean of roundings, in standard errors", errors, _STANDARD_ERRORS)


def _first_update(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Make the first update of AdamW, and return the weights and the moments."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_VALUES, generator=generator).bfloat16().repeat(_REPEATS)
    gradient = torch.randn(_VALUES, generator=generator).bfloat16().repeat(_REPEATS)
    p = weights.to(device=device, dtype=dtype).requires_grad_()
    rule, _ = build_rules("adamw", "sound")
    optimizer = RuleOptimizer([{"params": [p], "rule": rule}], lr=LR, weight_decay=DECAY)
    p.grad = gradient.to(device=device, dtype=dtype)
    optimizer.step()
    return p.detach(), dict(optimizer.tensors(p))


def _roundings(rounded: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the largest distance from the ``exact`` values in steps of bf16, and their means' in standard errors."""
    values = rounded.cpu().double().view(_REPEATS, _VALUES)
    target = exact.cpu().float()[:_VALUES]
    below = (target.view(torch.int32) & -65536).view(torch.float32)
    above = (below.view(torch.int32) + 65536).view(torch.float32)
    step = (above.double() - below.double()).abs()
    share = (target.double() - below.double()).abs() / step
    distance = (values - target.double()).abs() / step
    error = (values.mean(0) - target.double()).abs() / step
    standard_error = (share * (1 - share) / _REPEATS).sqrt() + 1e-3
    return float(distance.max()), float((error / standard_error).max())


# Rounding towards zero, as cutting bits off does, moves positive and negative weights in opposite directions: their
# mean shows nothing. So errors are also taken along the weights' signs.
def bias(part: Part, entry: Method) -> None:
    """Check that updates in bf16 are on average those in fp32: neither larger nor smaller, up nor down."""
    found: list[float] = []
    in_bf16 = Small.build(entry, part.device, torch.bfloat16)
    in_fp32 = Small.build(entry, part.device, torch.float32)
    in_bf16.update(_UPDATES)
    in_fp32.update(_UPDATES)
    exact = in_fp32.weights()
    for name, weight in in_bf16.weights().items():
        error = weight - exact[name]
        for signed in (error, error * exact[name].sign()):
            standard_error = float(signed.std()) / math.sqrt(signed.numel()) + 1e-12
            found.append(abs(float(signed.mean())) / standard_error)
    part.check_below(f"{entry.name}: mean of bf16 less fp32, in standard errors", largest(found), _STANDARD_ERRORS)


def against_formulas(part: Part) -> None:
    """Check three rows in fp32 against their formulas in fp64, computed here or by torch on the CPU."""
    references: dict[str, Callable[[Small], dict[str, Tensor]]] = {
        "adam": lambda small: _by_torch(small, torch.optim.Adam),
        "adamw": lambda small: _by_torch(small, torch.optim.AdamW),
        "galore_adamw": _by_galore,
    }
    for name, reference in references.items():
        entry = METHODS[name]
        expected = reference(Small.build(entry, torch.device("cpu"), torch.float32))
        moved = Small.build(entry, part.device, torch.float32).update(_UPDATES)
        compared = {key: moved[key] for key in expected}
        bound = bound_for(part, entry, _UPDATES, _ROUNDED_BOUND)
        part.check_below(f"{name}: fp32 updates against the formula in fp64", apart(compared, expected), bound)


def _by_torch(small: Small, optimizer_class: type[torch.optim.Adam]) -> dict[str, Tensor]:
    """Return what an optimizer of torch changes in fp64."""
    params = {name: weight.requires_grad_() for name, weight in small.weights().items()}
    optimizer = optimizer_class(params.values(), lr=LR, weight_decay=DECAY)
    for number in range(_UPDATES):
        for p, gradient in zip(params.values(), gradients(params, number), strict=True):
            p.grad = gradient.double()
        optimizer.step()
    before = small.weights()
    return {name: p.detach() - before[name] for name, p in params.items()}


# GaLore (arXiv 2403.03507, Algorithm 1) with AdamW, of the paper's scale 0.25: R = PᵀG or GQ in the basis of the last
# SVD, Adam's direction N of R, and W ← W − η (α P N + λ W). Moments stay as they are where a basis changes; so its
# vectors need a sign that is theirs alone, and the largest entry of each is positive.
def _by_galore(small: Small) -> dict[str, Tensor]:
    """Return what GaLore with AdamW changes of the projected matrices, in fp64."""
    changes: dict[str, Tensor] = {}
    every = [list(gradients(small.params, number)) for number in range(_UPDATES)]
    for index, (name, weight) in enumerate(small.weights().items()):
        if weight.ndim < 2 or not name.endswith("_proj.weight"):
            continue
        of_matrix = [drawn[index].double() for drawn in every]
        changes[name] = _galore_of_matrix(weight.clone(), of_matrix) - weight
    return changes


def _galore_of_matrix(weight: Tensor, every: list[Tensor]) -> Tensor:
    """Return the weight (m × n, fp64) after an update by each of its gradients."""
    m, n = weight.shape
    from_left, _ = sides(m, n, "std")
    rank = min(RANK, m, n)
    beta1, beta2, eps, scale = 0.9, 0.999, 1e-8, 0.25
    mean = torch.zeros(())
    square = torch.zeros(())
    basis = torch.zeros(())
    for number, gradient in enumerate(every):
        if number % PERIOD == 0:
            basis = _leading_vectors(gradient, rank, from_left)
        low = basis.T @ gradient if from_left else gradient @ basis
        mean = beta1 * mean + (1 - beta1) * low
        square = beta2 * square + (1 - beta2) * low**2
        corrected_mean = mean / (1 - beta1 ** (number + 1))
        corrected_square = square / (1 - beta2 ** (number + 1))
        direction = corrected_mean / (corrected_square.sqrt() + eps)
        full = basis @ direction if from_left else direction @ basis.T
        weight = weight - LR * (scale * full + DECAY * weight)
    return weight


def _leading_vectors(gradient: Tensor, rank: int, from_left: bool) -> Tensor:
    """Return the leading left (m × r) or right (n × r) singular vectors, the largest entry of each positive."""
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    vectors = u[:, :rank] if from_left else vh[:rank].T
    largest = vectors.abs().argmax(0, keepdim=True)
    return torch.as_tensor(vectors * vectors.gather(0, largest).sign())


# Bases that a device's generator draws are others on each device; a hash of an entry's place is the same on all. And
# bitsandbytes' quantizer on a CPU is coarser than a GPU's
# (docs/benchmarks/gpu.md).
def against_cpu(part: Part, entry: Method) -> None:
    """Check a row's updates in fp32 on a GPU against those on the CPU."""
    name = f"{entry.name}: fp32 updates of the GPU against the CPU's"
    small = Small.build(entry, torch.device("cpu"), torch.float32)
    if "basis" not in entry.options and small.holds_bases():
        part.skip(name, "its bases are drawn, by each device otherwise")
        return
    on_cpu = small.update(_UPDATES)
    on_gpu = Small.build(entry, part.device, torch.float32).update(_UPDATES)
    if entry.moments_8bit:
        part.number(f"{name}, whose quantizer is coarser", apart(on_gpu, on_cpu))
        return
    part.check_below(name, apart(on_gpu, on_cpu), bound_for(part, entry, _UPDATES))


def same_in_every_way(part: Part, entry: Method) -> None:
    """Check by the checks of methods that a row comes to the same in whatever way its updates are made."""
    for finding in check_methods([entry.name], checks=_CHECKS, device=str(part.device)):
        name = f"{entry.name}: {finding.check}"
        if finding.status == "not checked":
            part.skip(name, finding.told)
            continue
        part.check(name, finding.told or finding.status, _MEANING[finding.check], finding.status == "ok")


_MEANING = {
    "layerwise": "updates in backward are those after it",
    "accumulation": "three micro-batches are their sum",
    "skipping": "inf and nan change nothing of their tensor, and of no other",
    "resume": "a saved state goes on bit for bit",
}
