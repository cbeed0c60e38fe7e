"""Updates by kernels, under Triton's interpreter, against the composed rules; and what both promise."""

import copy
import functools
from typing import Any

import pytest
import torch
from operations import Operations
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from galore_pretrain.optim import Direction, GlobalStep, HostSums, Layerwise, RuleOptimizer, Step, build_optimizer
from galore_pretrain.optim.weights import DenseWeights
from galore_pretrain.tensors import capability
from galore_pretrain.tensors.transport import AtOnce

pytestmark = pytest.mark.usefixtures("few_programs")

ROWS = (
    "adamw",
    "adam",
    "adamw8bit",
    "galore_adamw",
    "galore_adamw8bit",
    "apollo",
    "apollo_mini",
    "scale",
    "fira",
    "foam",
)


class Small(nn.Module):
    """Matrices that are projected from both sides, an embedding, a head and a vector.

    Sizes are odd; one matrix has enough elements for 8 bits, and takes two programs of each kernel. Each program costs.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed_tokens = nn.Embedding(41, 24)
        self.mlp_up = nn.Linear(24, 37, bias=False)
        self.mlp_down = nn.Linear(173, 24, bias=False)
        self.norm = nn.LayerNorm(24, bias=False)
        self.lm_head = nn.Linear(24, 41, bias=False)
        self.to(dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def gradients(model: nn.Module, update: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + update)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in model.parameters()]


def built(row: str, dtype: torch.dtype, **more: Any) -> tuple[nn.Module, RuleOptimizer]:
    model = Small(dtype)
    if "galore" in row or row in ("apollo", "fira"):
        more |= {"rank": 8, "update_proj_gap": 2}
    options = {"lr": 0.01, "weight_decay": 0.1} | more
    return model, build_optimizer(model, row, **options)


def train(
    model: nn.Module,
    optimizer: RuleOptimizer,
    updates: range,
    mode: Any = GlobalStep,
    parts: int = 1,
    clip: float = 0.0,
) -> None:
    execution = mode(optimizer, clip, projected=True)
    for update in updates:
        for part in range(parts):
            execution.begin(part, parts)
            loss = sum(
                (p * g).sum() for p, g in zip(model.parameters(), gradients(model, update * parts + part), strict=True)
            )
            assert isinstance(loss, Tensor)
            loss.backward()
        execution.complete()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@functools.cache
def by_kernels(row: str, dtype: torch.dtype) -> list[Tensor]:
    """The weights after three updates by kernels: the second in the basis of the first, the third in a new one."""
    model, optimizer = built(row, dtype)
    train(model, optimizer, range(3))
    return weights(model)


def both_ways(row: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The weights after three updates by kernels, each beside that of the composed rule."""
    ours = by_kernels(row, dtype)
    monkeypatch.setattr(capability, "runs_on", lambda device: False)
    composed, optimizer = built(row, dtype)
    train(composed, optimizer, range(3))
    return list(zip(ours, weights(composed), strict=True))


@pytest.mark.parametrize("row", ROWS)
def test_fp32_updates_are_the_composed_ones(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = both_ways(row, torch.float32, monkeypatch)
    for ours, theirs in pairs:
        apart = (ours - theirs).abs()
        if "8bit" in row:  # bitsandbytes' CPU does not take the nearest byte for what is small in its block
            assert float(apart.mean()) < 1e-4
            assert float((apart > 1e-3).float().mean()) < 2e-3
        else:
            assert float(apart.max()) < 2e-6


@pytest.mark.parametrize("row", ["adamw8bit", "galore_adamw", "scale", "fira"])
def test_bf16_updates_are_near_the_composed_ones(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = both_ways(row, torch.bfloat16, monkeypatch)
    means = []
    for ours, theirs in pairs:
        apart = ours.float() - theirs.float()
        assert float(apart.abs().max()) < 0.02  # three updates of 0.01, each rounded by other bits
        means.append(float(apart.abs().mean()))
    assert max(means) < 3e-3


@pytest.mark.parametrize("row", ["adam", "adamw8bit", "galore_adamw", "apollo_mini", "scale", "foam"])
def test_updates_in_backward_are_those_after_it(row: str) -> None:
    inside, optimizer = built(row, torch.bfloat16)
    train(inside, optimizer, range(3), Layerwise)
    assert all(map(torch.equal, by_kernels(row, torch.bfloat16), weights(inside)))


@pytest.mark.parametrize("row", ["adamw", "galore_adamw8bit", "apollo", "fira"])
def test_a_loaded_state_goes_on_bit_for_bit(row: str) -> None:
    first, optimizer = built(row, torch.bfloat16)
    train(first, optimizer, range(1))
    second, later = built(row, torch.bfloat16)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, later, range(1, 3))
    assert all(map(torch.equal, by_kernels(row, torch.bfloat16), weights(second)))


@pytest.mark.parametrize("row", ["adamw", "adamw8bit", "galore_adamw8bit", "apollo"])
def test_a_gradient_that_is_not_finite_changes_its_tensor_in_nothing(row: str) -> None:
    model, optimizer = built(row, torch.bfloat16)
    train(model, optimizer, range(2))
    before = weights(model)
    execution = GlobalStep(optimizer, 0.0)
    execution.begin(0, 1)
    broken = gradients(model, 9)
    broken[1][3, 4] = torch.inf
    for p, grad in zip(model.parameters(), broken, strict=True):
        p.grad = grad
    execution.complete()
    assert execution.outcome().skipped == 1
    for index, (p, old) in enumerate(zip(weights(model), before, strict=True)):
        assert torch.equal(p, old) is (index == 1)


def test_an_update_is_few_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that is projected takes its norm, the product, two kernels and little else."""
    model, optimizer = built("galore_adamw", torch.bfloat16, weight_decay=0.0)
    train(model, optimizer, range(3))
    execution = GlobalStep(optimizer, 0.0)
    for p, grad in zip(model.parameters(), gradients(model, 9), strict=True):
        p.grad = grad
    execution.begin(0, 1)
    with Operations() as count:
        execution.complete()
    views = ("view", "detach", "alias", "slice", "aten.t.", "transpose", "expand", "select", "is_same_size")
    launched = [name for name in count.names if not any(view in name for view in views)]
    assert len(launched) <= 6 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ["adamw", "galore_adamw", "scale"])
def test_several_micro_batches_are_summed_by_launches(
    row: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("galore_pretrain.optim.sums._WAITING_BYTES", 6000)  # so that it takes several
    after, optimizer = built(row, dtype)
    train(after, optimizer, range(2), parts=3)
    inside, optimizer = built(row, dtype)
    train(inside, optimizer, range(2), Layerwise, parts=3)
    if row == "galore_adamw":  # layerwise sums are projected: rounded elsewhere
        atol = 1e-5 if dtype == torch.float32 else 0.02
        assert all(torch.allclose(a, b, atol=atol) for a, b in zip(weights(after), weights(inside), strict=True))
    else:
        assert all(map(torch.equal, weights(after), weights(inside)))
    monkeypatch.setattr(capability, "runs_on", lambda device: False)
    composed, optimizer = built(row, dtype)
    train(composed, optimizer, range(2), parts=3)
    for ours, theirs in zip(weights(after), weights(composed), strict=True):
        apart = (ours.float() - theirs.float()).abs()
        assert float(apart.max()) < (2e-6 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("row", ["galore_adamw", "adamw"])
def test_sums_are_whole_before_bases_are_found_in_them(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layerwise, clipped by the projected norm: a basis that is due is found in backward, in the sum of all parts."""
    with monkeypatch.context() as patch:
        for file in ("execution", "slots"):
            patch.setattr(f"galore_pretrain.optim.{file}.is_gpu", lambda device: True)
        after, optimizer = built(row, torch.float32)
        train(after, optimizer, range(3), parts=2, clip=1.0)
        inside, optimizer = built(row, torch.float32)
        train(inside, optimizer, range(3), Layerwise, parts=2, clip=1.0)
    composed, optimizer = built(row, torch.float32)
    train(composed, optimizer, range(3), parts=2, clip=1.0)
    for ours, theirs, expected in zip(weights(inside), weights(after), weights(composed), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)
        assert torch.allclose(theirs, expected, atol=2e-5)


def test_the_trial_of_kernels_sees_no_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is the first to ask whether kernels run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu = torch.device("cpu")
    right = capability.small_updates_are_right
    monkeypatch.setattr(capability, "small_updates_are_right", lambda device: right(cpu))
    capability._why_not_on_cuda.cache_clear()
    with FakeTensorMode():
        assert capability.runs_on(torch.device("cuda"))
    capability._why_not_on_cuda.cache_clear()


def test_a_parameter_that_is_moved_has_the_kernels_of_its_place() -> None:
    model, optimizer = built("adamw", torch.bfloat16)
    slot = optimizer.slots[model.mlp_up.weight]  # type: ignore[union-attr, index]
    assert slot.has_kernels
    slot.move(torch.device("meta"))
    assert not slot.has_kernels
    train(model, optimizer, range(1))
    assert slot.has_kernels


def test_a_part_that_is_not_finite_makes_its_sum_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("execution", "slots"):  # flags are found at the end
        monkeypatch.setattr(f"galore_pretrain.optim.{file}.is_gpu", lambda device: True)
    for bad in range(3):
        model, optimizer = built("adamw", torch.bfloat16)
        before = weights(model)
        execution = GlobalStep(optimizer, 1.0)
        for part in range(3):
            execution.begin(part, 3)
            of_part = gradients(model, part)
            if part == bad:
                of_part[1][3, 4] = -torch.inf
            loss = sum((p * g).sum() for p, g in zip(model.parameters(), of_part, strict=True))
            assert isinstance(loss, Tensor)
            loss.backward()
        execution.complete()
        assert execution.outcome().skipped == 1
        for index, (p, old) in enumerate(zip(weights(model), before, strict=True)):
            assert torch.equal(p, old) is (index == 1)


@pytest.mark.parametrize("mode", [GlobalStep, Layerwise])
@pytest.mark.parametrize("row", ["adamw", "galore_adamw"])
def test_sums_on_the_host_are_those_of_one_launch_for_many(row: str, mode: Any) -> None:
    """A sum on the host is added to by a launch of its own: bits belong to elements, and not to launches."""
    results = []
    for host_sums in (None, HostSums(AtOnce(torch.device("cpu")))):
        model, optimizer = built(row, torch.bfloat16)
        params = list(model.parameters())
        execution = mode(optimizer, 1.0, projected=row == "galore_adamw", host_sums=host_sums)
        for number in range(2):
            for i in range(2):
                execution.begin(i, 2)
                torch.autograd.backward(params, gradients(model, 2 * number + i))
                lies_there = [p for p in params if optimizer.pending.gradients[p].host is not None]
                assert bool(lies_there) == (host_sums is not None)
            execution.complete()
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_may_lie_anywhere(dtype: torch.dtype) -> None:
    """A column of a matrix, and one number for all rows: a kernel takes both for neighbours in memory."""
    scales = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [3.0, 5.0, 7.0], [9.0, 11.0, 13.0]])
    one = torch.full((), 3.0).expand(4)
    for row, column in ((scales[:, 0], None), (one, scales.view(-1)[::2][:5]), (None, one.new_full((), 2.0).expand(5))):
        direction = Direction(torch.ones(4, 5), row=row, column=column)
        pair = []
        for kernels in (True, False):
            weight = torch.zeros(4, 5, dtype=dtype)
            DenseWeights().subtract(weight, direction, 0.0, True, Step(1, lr=1.0, kernels=kernels))
            pair.append(weight)
        assert torch.equal(*pair)
