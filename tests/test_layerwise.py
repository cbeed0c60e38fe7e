"""Layerwise with accumulation and clipping is global: low-rank sums, norms, refreshes, and changing over in between."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from crossed import pairwise
from galore_pretrain.model.head import mean_loss
from galore_pretrain.optim import METHODS, RuleOptimizer, build_optimizer
from galore_pretrain.optim.build import rounding_of
from galore_pretrain.optim.execution import Execution, GlobalStep, Layerwise, Outcome
from galore_pretrain.optim.methods import MOMENTS, PROJ_TYPES, REFRESHES, ROWS
from prescribed import meant_for, rules_that_go_together

SHAPES: list[tuple[int, ...]] = [(48, 80), (80, 48), (64, 64), (40,), (100, 24)]
PROJECTED = 3  # the first of them are


def optimizer_for(row: str, dtype: torch.dtype, numerics: str = "sound", **options: Any) -> RuleOptimizer:
    options = meant_for(row, **{"rank": 8, "update_proj_gap": 3, "basis": "svd"} | options)
    rule, bare = rules_that_go_together(row, numerics, **options)
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]
    groups = [{"params": params[:PROJECTED], "rule": rule}, {"params": params[PROJECTED:], "rule": bare}]
    return RuleOptimizer(groups, lr=0.01, weight_decay=0.1, rounding=rounding_of(numerics))


def parameters(optimizer: RuleOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def update(execution: Execution, params: list[Tensor], number: int, micro_batches: int) -> Outcome:
    for i in range(micro_batches):
        generator = torch.Generator().manual_seed(1000 * number + i)
        grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
        execution.begin(i, micro_batches)
        torch.autograd.backward(params, grads)
    execution.complete()
    return execution.outcome()


@settings(deadline=None, max_examples=120)
@given(
    row=st.sampled_from(ROWS),
    micro_batches=st.sampled_from([1, 2, 5]),
    clip=st.sampled_from(["off", "full", "projected"]),
    proj_type=st.sampled_from(PROJ_TYPES),
    refresh=st.sampled_from(REFRESHES),
    moments=st.sampled_from(MOMENTS),
    gap=st.sampled_from([1, 3, 40]),
)
@example("galore_adamw", 5, "projected", "std", "staggered", "keep", 40)
@example("galore_adamw8bit", 1, "full", "std", "together", "project", 3)
def test_layerwise_is_global(
    row: str, micro_batches: int, clip: str, proj_type: str, refresh: str, moments: str, gap: int
) -> None:
    """fp32: bit for bit with one micro-batch, clipped or not; within 1e-6 where a sum is taken after projecting."""
    assume(row not in ("fira", "subtrack") or proj_type != "full")  # which Fira refuses, with the reason
    if clip == "full" and METHODS[row].projects:
        micro_batches = 1  # of several, refused
    results = []
    for mode in (GlobalStep, Layerwise):
        options = {"proj_type": proj_type, "refresh": refresh, "moments": moments, "update_proj_gap": gap}
        optimizer = optimizer_for(row, torch.float32, **options)
        execution = mode(optimizer, 0.0 if clip == "off" else 30.0, projected=clip == "projected")
        finished = [update(execution, parameters(optimizer), i, micro_batches) for i in range(5)]
        assert all(p.grad is None for p in parameters(optimizer))
        results.append((parameters(optimizer), finished))
    (ours, told), (theirs, told_theirs) = results
    for a, b in zip(ours, theirs, strict=True):
        if micro_batches == 1:
            assert torch.equal(a, b)
        assert (a - b).norm() <= 1e-6 * b.norm()
    for one, other in zip(told, told_theirs, strict=True):
        if clip == "off":
            assert one.grad_norm is other.grad_norm is None
        else:
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)


@pytest.mark.parametrize("clip", [None, "full", "projected"])
@pytest.mark.parametrize("row", ROWS)
def test_bf16_with_one_micro_batch_is_bitwise_the_same(row: str, clip: str | None) -> None:
    results = []
    for mode in (GlobalStep, Layerwise):
        optimizer = optimizer_for(row, torch.bfloat16)
        execution = mode(optimizer, 30.0 if clip else 0.0, projected=clip == "projected")
        for i in range(5):
            update(execution, parameters(optimizer), i, 1)
        results.append(parameters(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", [GlobalStep, Layerwise])
@pytest.mark.parametrize("row", ["adamw", "galore_adamw", "galore_adafactor"])
def test_sums_in_bf16_keep_what_rounding_to_nearest_loses(row: str, mode: Any) -> None:
    """One gradient of 1 and 255 of 2⁻¹⁰: to nearest, the sum in bf16 stays 1; its mean is 1.249."""
    optimizer = optimizer_for(row, torch.bfloat16, rank=48, update_proj_gap=100, refresh="staggered")
    execution = mode(optimizer, 1e9, projected=True)  # the norm is that of the sums
    params = parameters(optimizer)
    for i in range(256):
        execution.begin(i, 256)
        torch.autograd.backward(params, [torch.full_like(p, 1.0 if i == 0 else 2.0**-10) for p in params])
    execution.complete()
    norm = execution.outcome().grad_norm
    unprojected = [
        p for p in params if not METHODS[row].projects or p.shape in SHAPES[PROJECTED:] or min(p.shape) <= 48
    ]
    if len(unprojected) == len(params):
        assert norm == pytest.approx(1.249 * sum(p.numel() for p in params) ** 0.5, rel=0.01)
    else:  # of a matrix of 64 × 64, rank 48 holds only a part
        least = 1.249 * sum(p.numel() for p in unprojected) ** 0.5
        assert 0.99 * least < norm < 1.01 * 1.249 * sum(p.numel() for p in params) ** 0.5


def test_what_is_summed_low_rank_takes_less() -> None:
    """Between two backward passes, matrices hold r × n numbers, and only those with a basis due hold all."""
    optimizer = optimizer_for("galore_adamw", torch.float32, update_proj_gap=40, refresh="staggered")
    execution = Layerwise(optimizer)
    shapes = []
    for _ in range(5):
        params = parameters(optimizer)
        execution.begin(0, 2)
        torch.autograd.backward(params, [torch.ones_like(p) for p in params])
        assert all(p.grad is None for p in params)
        shapes.append([tuple(optimizer.pending.get(p).grad.shape) for p in params])
        execution.begin(1, 2)
        torch.autograd.backward(params, [torch.ones_like(p) for p in params])
        execution.complete()
    low = [(8, 80), (80, 8), (64, 8), (40,), (100, 24)]
    due = {0: (0, 2), 2: (1,)}  # update -> matrices whose first refresh it brings: phases 0, 0.62 and 0.24 of T/10 = 4
    expected = [[SHAPES[i] if i in due.get(number, ()) else low[i] for i in range(5)] for number in range(5)]
    assert shapes == expected


def test_the_full_norm_of_low_rank_sums_is_refused() -> None:
    execution = Layerwise(optimizer_for("galore_adamw", torch.float32), 1.0)
    with pytest.raises(ValueError, match="clip the projected one"):
        execution.begin(0, 2)
    Layerwise(optimizer_for("adamw", torch.float32), 1.0).begin(0, 2)


@pytest.mark.parametrize("mode", [GlobalStep, Layerwise])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("row", ["adamw", "galore_adamw"])
def test_one_bad_micro_batch_skips_its_tensor(row: str, clip: float, mode: Any) -> None:
    optimizer = optimizer_for(row, torch.float32)
    execution = mode(optimizer, clip, projected=True)
    params = parameters(optimizer)
    update(execution, params, 0, 3)
    before = [p.detach().clone() for p in params]
    for i in range(3):
        grads = [torch.ones_like(p) for p in params]
        if i == 1:
            grads[1][5, 5] = torch.nan
        execution.begin(i, 3)
        torch.autograd.backward(params, grads)
    execution.complete()
    finished = execution.outcome()
    assert finished.skipped == 1
    assert finished.grad_norm is None or finished.grad_norm > 1
    assert [torch.equal(a, b) for a, b in zip(params, before, strict=True)] == [False, True, False, False, False]


@pytest.mark.parametrize("mode", [GlobalStep, Layerwise])
def test_a_discarded_update_leaves_nothing(mode: Any) -> None:
    one, other = optimizer_for("galore_adamw", torch.float32), optimizer_for("galore_adamw", torch.float32)
    execution, undisturbed = mode(one), mode(other)
    update(execution, parameters(one), 0, 2)
    update(undisturbed, parameters(other), 0, 2)
    execution.begin(0, 2)
    torch.autograd.backward(parameters(one), [torch.ones_like(p) for p in parameters(one)])
    execution.discard()
    update(execution, parameters(one), 1, 2)
    update(undisturbed, parameters(other), 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(parameters(one), parameters(other), strict=True))


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("mode", [GlobalStep, Layerwise])
def test_a_frozen_parameter_is_left_alone_and_updated_once_it_is_thawed(mode: Any, clip: float) -> None:
    optimizer, plain = optimizer_for("galore_adamw", torch.float32), optimizer_for("galore_adamw", torch.float32)
    params, others = parameters(optimizer), parameters(plain)
    for frozen in (params[0], params[3], others[0], others[3]):
        frozen.requires_grad_(False)
    before = [p.detach().clone() for p in params]
    for made, its in ((mode, params), (GlobalStep, others)):
        owner = optimizer if its is params else plain
        execution = made(owner, clip, projected=True)
        update(execution, its[1:3] + its[4:], 0, 2)
        changed = [not torch.equal(p, was) for p, was in zip(its, before, strict=True)]
        assert changed == [False, True, True, False, True]
        for thawed in (its[0], its[3]):
            thawed.requires_grad_()
        update(execution, its, 1, 2)
        assert not torch.equal(its[0], before[0])
    for p, q in zip(params, others, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, 1024, (10, 17), generator=generator)


@pytest.mark.parametrize(("row", "micro_batches", "clip"), pairwise(ROWS, [1, 2, 5], [None, "projected"]))
def test_losses_of_a_model_are_those_of_global(
    row: str, micro_batches: int, clip: str | None, build_tiny: Callable[..., LlamaForCausalLM]
) -> None:
    """3 updates in fp32; a third run changes over at each update, by way of a saved state.

    The second update is in the bases of the first; the third is in new ones, where a row finds such.
    """
    options: dict[str, Any] = meant_for(row, rank=4, update_proj_gap=2, basis="svd")
    # Adam turns a gradient near 0 into ±1, so that two roundings part: a large ε, where a row has one, prevents that.
    options |= {"eps": 1e-3} if "eps" in METHODS[row].options else {}

    first = build_tiny()

    def train(modes: list[Any]) -> list[float]:
        model, losses, data = first, [], batches()
        saved = None
        for mode in modes:
            model = copy.deepcopy(model)
            for p in model.parameters():
                p.grad = None
            optimizer = build_optimizer(model, row, lr=0.003, seed=3, **options)
            if saved:
                optimizer.load_state_dict(saved)
            execution = mode(optimizer, 0.5 if clip else 0.0, projected=bool(clip))
            for _ in range(3 // len(modes)):
                rows = next(data)
                parts = rows.split(len(rows) // micro_batches)
                total = 0.0
                for i, part in enumerate(parts):
                    loss = mean_loss(model, part[:, :-1], part[:, 1:], 160)
                    total += loss.item()
                    execution.begin(i, len(parts))
                    loss.backward()  # type: ignore[no-untyped-call]
                execution.complete()
                losses.append(total)
            saved = optimizer.state_dict()
        rows = next(data)  # which tell what the last update has done
        losses.append(mean_loss(model, rows[:, :-1], rows[:, 1:], 160).item())
        losses += [float(p.detach().double().square().sum()) for p in model.parameters()]
        return losses

    whole, layerwise, alternating = (
        train(modes) for modes in ([GlobalStep], [Layerwise], [Layerwise, GlobalStep, Layerwise])
    )
    if micro_batches == 1:
        assert whole == layerwise == alternating
    assert layerwise == pytest.approx(whole, rel=1e-5)
    assert alternating == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("row", ["galore_adamw", "adamw", "fira"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_update_may_end_before_the_micro_batches_that_were_announced(row: str, clip: float) -> None:
    """As others' trainers end an epoch: it is the update of as many micro-batches as there were."""
    results: dict[int, list[tuple[list[Tensor], float | None]]] = {2: [], 4: []}
    for announced, told in results.items():
        optimizer = optimizer_for(row, torch.float32)
        execution = Layerwise(optimizer, clip, projected=METHODS[row].projects)
        params = parameters(optimizer)
        for number in range(5):
            for i in range(2):
                generator = torch.Generator().manual_seed(10 * number + i)
                grads = [torch.randn(p.shape, generator=generator) for p in params]
                execution.begin(i, announced)
                torch.autograd.backward(params, grads)
            execution.complete()
            told.append(([p.detach().clone() for p in params], execution.outcome().grad_norm))
    for (exact, norm), (early, norm_early) in zip(*results.values(), strict=True):
        assert norm == norm_early
        assert all(torch.equal(a, b) for a, b in zip(exact, early, strict=True))
