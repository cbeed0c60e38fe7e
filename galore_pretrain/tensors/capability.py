"""Which devices run the kernels: asked once, by a small update that has to come out right."""

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from galore_pretrain.tensors.draws import dropout_mask, gaussian_
from galore_pretrain.tensors.entropy import cross_entropy_
from galore_pretrain.tensors.fused import (
    BLOCK,
    TO_NEAREST,
    AdamNumbers,
    Moment,
    Noise,
    Update,
    adam_,
    add_all_,
    read_codes,
    store_,
    subtract_,
    subtract_codes_,
)
from galore_pretrain.tensors.growth import FactorRule, channel_factors
from galore_pretrain.tensors.packing import Packed
from galore_pretrain.tensors.place import is_gpu

log = logging.getLogger(__name__)


def runs_on(device: torch.device) -> bool:
    """Return whether the kernels run on tensors of ``device``: a GPU, or a CPU under ``TRITON_INTERPRET=1``."""
    return why_not_on(device) is None


def why_not_on(device: torch.device) -> str | None:
    """Return why the kernels do not run on tensors of ``device``, in a line; None where they do."""
    if is_gpu(device):
        card = device if device.type == "cuda" else torch.device("cuda")  # for which the CPU stands in a plan
        return _why_not_on_cuda(card)
    if device.type == "cpu" and _run_on_cpu():
        return None
    return "they are for GPUs, or for a CPU under TRITON_INTERPRET=1"


@cache
def _run_on_cpu() -> bool:
    """Return whether Triton's interpreter stands for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


# To launch a kernel, Triton compiles it, and with a C compiler what calls it. A machine may have no such compiler, or a
# GPU that is too old; and no GPU of a user's has been seen by those who wrote this. So a small update is tried once on
# each GPU. Whoever asks first may be a plan, whose tensors are fake.
@cache
def _why_not_on_cuda(device: torch.device) -> str | None:
    """Return why the kernels do not run on a GPU, the current one where ``device`` has no number; None where they do.

    Where a machine has no GPU, and only plans for one, they do.
    """
    if not torch.cuda.is_available():
        return None
    reason: str | None = None
    try:
        with _disable_current_modes():
            if not small_updates_are_right(device):
                reason = "a small update came out wrong"
    except Exception as error:  # whatever Triton, its compilers or the driver raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    if reason is not None:
        log.warning(
            "Triton's kernels do not run here (%s): updates take single operations, and more time; what may help: "
            "install galore-pretrain[kernels] and a C compiler",
            reason,
        )
    return reason


def kernels_take(target: Tensor, value: Tensor) -> bool:
    """Return whether `store_` and `add_all_` do of such tensors what copying or adding in place would."""
    dtypes = (torch.float32, torch.bfloat16)
    if target.dtype not in dtypes or value.dtype not in dtypes:
        return False
    return runs_on(target.device) and target.is_contiguous() and value.is_contiguous()


# A caller may have set another dtype for new tensors, or be inside autocast: of neither is anything to be seen here.
def small_updates_are_right(device: torch.device) -> bool:
    """Make a small update by each kernel, and return whether all come out as by torch's own operations."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        updates_are_right = _product_is_right(device) and _first_updates_are_right(device)
        updates_are_right = updates_are_right and _factors_are_right(device)
        codes_are_right = _codes_are_right(device) and _packed_is_right(device)
        return updates_are_right and codes_are_right and _rounding_is_right(device) and _loss_is_right(device)


def _product_is_right(device: torch.device) -> bool:
    """Subtract a product from a matrix of ones, of two tiles each way."""
    left = torch.linspace(-1, 1, 70 * 40, dtype=torch.float32, device=device).view(70, 40).bfloat16()
    right = torch.linspace(1, -2, 40 * 130, dtype=torch.float32, device=device).view(40, 130).bfloat16()
    weight = torch.ones(70, 130, dtype=torch.float32, device=device)
    subtract_(weight, Update(left, right, product_rate=0.5), decay=0.1, decay_first=True)
    expected = 0.9 - 0.5 * (left.float() @ right.float())
    return torch.allclose(weight, expected, rtol=1e-4, atol=1e-4)


# From 1 to 1 + 2⁻⁹ is a quarter of the way to the next bf16 number, 1 + 2⁻⁷.
def _rounding_is_right(device: torch.device) -> bool:
    """Round 1 + 2⁻⁹ by each kernel that rounds, and count how often it went up."""
    rounded = torch.ones(4096, dtype=torch.bfloat16, device=device)
    addend = torch.full((4096,), 2.0**-9, dtype=torch.bfloat16, device=device)
    add_all_([rounded], [addend], [7])
    shares = [_share_rounded_up(rounded)]
    total = torch.full((4096,), 1 + 2.0**-9, dtype=torch.float32, device=device)
    for value, is_valid in ((total, True), (torch.zeros_like(total), False)):  # the zeros are not to be taken
        store_(rounded, value, Noise(8), torch.tensor(is_valid, device=device))
        shares.append(_share_rounded_up(rounded))
    return all(0.2 < share < 0.3 for share in shares)


def _share_rounded_up(numbers: Tensor) -> float:
    """Return the share of bf16 numbers that are 1 + 2⁻⁷, where all others are 1."""
    return float(numbers.float().mean() - 1) * 2**7


def _first_updates_are_right(device: torch.device) -> bool:
    """Make a first update of Adam with dense moments and with 8 bits, whose code is here 256 even steps."""
    grad = torch.linspace(-1, 1, 600, dtype=torch.float32, device=device)
    numbers = AdamNumbers(0.9, 0.99, factor=10.0, root=10.0, eps=1e-8, lr=0.5)
    expected = 1 - 0.5 * grad / (grad.abs() + 1e-8)
    zeros = torch.zeros(600, dtype=torch.float32, device=device)
    signed = torch.linspace(-1, 1, 256, dtype=torch.float32, device=device)
    unsigned = torch.linspace(0, 1, 256, dtype=torch.float32, device=device)
    middle = torch.full((600,), 128, dtype=torch.uint8, device=device)
    scales = torch.zeros(3, dtype=torch.float32, device=device)
    dense = (Moment(zeros), Moment(zeros.clone()))
    eight_bit = (Moment(middle, scales, signed), Moment(torch.zeros_like(middle), scales.clone(), unsigned))
    answers = []
    for m, v in (dense, eight_bit):
        weight = torch.ones(600, dtype=torch.float32, device=device)
        adam_(weight, grad, m, v, numbers, TO_NEAREST)
        answers.append(torch.allclose(weight, expected, rtol=1e-4, atol=1e-4))
    kept = signed[middle.long()] * scales.repeat_interleave(BLOCK)[:600]
    answers.append(torch.allclose(zeros, 0.1 * grad, rtol=1e-4))
    answers.append(torch.allclose(kept, 0.1 * grad, atol=0.1 / 255))
    return all(answers)


def _factors_are_right(device: torch.device) -> bool:
    """Find the factors of two channels whose update's norm, of 5, may be 2 at most."""
    low, direction, grad = torch.tensor(
        [[1.0, 2.0], [3.0, 8.0], [1.0, 1.0]], dtype=torch.float32, device=device
    ).unbind()
    last = torch.ones((), dtype=torch.float32, device=device)
    rule = FactorRule(multiple=1.0, growth=2.0, share=0.0, eps=0.0, channelwise=True)
    factors = channel_factors(low, direction, grad, last, None, rule)
    expected = torch.tensor([3.0, 4.0], dtype=torch.float32, device=device) * 2 / 5
    return torch.allclose(factors, expected, rtol=1e-5) and torch.allclose(last, 2 * torch.ones_like(last))


def _codes_are_right(device: torch.device) -> bool:
    """Subtract an update from codes: one row keeps its scale, one has to take another, one is left as it is."""
    codes = torch.tensor([[100, -50], [100, -50], [100, -50]], dtype=torch.int8, device=device)
    scales = torch.full((3, 1), 0.5, dtype=torch.bfloat16, device=device)
    left = torch.tensor([[1.0], [-46.0], [0.0]], dtype=torch.float32, device=device)
    update = Update(left, torch.tensor([[1.0, 0.0]], dtype=torch.float32, device=device), product_rate=1.0)
    subtract_codes_(codes, scales, 2, update, 0.0, True, Noise(5), None)
    values = codes.float() * scales.float()
    expected = torch.tensor([[49.0, -25.0], [96.0, -25.0], [50.0, -25.0]], dtype=torch.float32, device=device)
    is_near = (values - expected).abs() <= scales.float()
    is_near &= read_codes(codes, scales, 2, torch.float32) == values
    keeps_scale = torch.tensor([[True], [False], [True]], device=device)
    return bool(is_near.all()) and bool(((scales == 0.5) == keeps_scale).all())


def _packed_is_right(device: torch.device) -> bool:
    """Read a matrix of 4 bits: numbers that are its codes, less a zero of 5."""
    expected = torch.arange(300, device=device).remainder(16).sub(5).view(10, 30).float()
    packed = Packed.empty(expected, 10, 30, 4).written(expected)
    return torch.equal(packed.read(by_kernel=True), expected)


def _loss_is_right(device: torch.device) -> bool:
    """Find a small loss with its gradient, and draw random numbers: a mask, and the median of a table."""
    logits = torch.linspace(-2, 2, 3 * 50, dtype=torch.float32, device=device).view(3, 50)
    labels = torch.tensor([7, -100, 49], device=device)
    p = logits.softmax(-1)
    expected = 0.5 * p
    expected[0, 7] -= 0.5
    expected[2, 49] -= 0.5
    expected[1] = 0
    expected_losses = -p.log()[[0, 1, 2], labels.clamp(min=0)]
    expected_losses[1] = 0
    losses = cross_entropy_(logits, labels, 0.5)
    loss_is_right = torch.allclose(losses, expected_losses, atol=1e-5)
    gradient_is_right = torch.allclose(logits, expected, atol=1e-6)
    mask = dropout_mask(torch.empty(4096, dtype=torch.float32, device=device), 5, 1, 1 << 14)
    drawn = torch.empty(64, 64, dtype=torch.float32, device=device)
    gaussian_(drawn, torch.linspace(0, 1, 1 << 16, dtype=torch.float32, device=device), 0, 3)
    shares = (float(mask.float().mean()) * 2, float(drawn.mean()))
    draws_are_right = all(0.47 < share < 0.53 for share in shares)
    return loss_is_right and gradient_is_right and draws_are_right
