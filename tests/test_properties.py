"""What holds for every row, shape, rank, dtype and scale."""

import io
import warnings
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.optim.build import rounding_of
from galore_pretrain.optim.execution import GlobalStep, Layerwise
from galore_pretrain.optim.methods import BASIS_NAMES, MOMENTS, PROJ_TYPES, REFRESHES, ROWS
from galore_pretrain.optim.projector import BASES, random_basis
from prescribed import gradients, meant_for, rules_that_go_together

CASES = {
    "row": st.sampled_from(ROWS),
    "numerics": st.sampled_from(["sound", "reference"]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "shape": st.tuples(st.integers(1, 90), st.integers(1, 90)),
    "scale": st.sampled_from([1e-6, 1.0, 1e4]),
    "options": st.fixed_dictionaries(
        {
            "rank": st.integers(1, 70),
            "update_proj_gap": st.sampled_from([1, 3, 20]),  # staggered, the first refresh of the last is at update 2
            "proj_type": st.sampled_from(PROJ_TYPES),
            "refresh": st.sampled_from(REFRESHES),
            "moments": st.sampled_from(MOMENTS),
            "basis": st.sampled_from(BASIS_NAMES),
        }
    ),
}


def optimizer_for(p: Tensor, row: str, numerics: str, options: dict[str, Any]) -> RuleOptimizer:
    assume(row not in ("fira", "subtrack") or options["proj_type"] != "full")  # which Fira refuses, with the reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks above a dimension are clipped
        rule, bare = rules_that_go_together(row, numerics, **meant_for(row, **options))
        vector = torch.zeros(p.shape[0], dtype=p.dtype, requires_grad=True)
        groups = [{"params": [vector], "rule": bare}, {"params": [p], "rule": rule}]
        return RuleOptimizer(groups, lr=0.01, weight_decay=0.1, rounding=rounding_of(numerics))


@settings(deadline=None, max_examples=100)
@given(**CASES)
def test_layerwise_is_global_whatever_the_tensor(
    row: str, numerics: str, dtype: torch.dtype, shape: tuple[int, int], scale: float, options: dict[str, Any]
) -> None:
    results = []
    for layerwise in (False, True):
        p = torch.ones(shape, dtype=dtype, requires_grad=True)
        optimizer = optimizer_for(p, row, numerics, options)
        params = [q for group in optimizer.param_groups for q in group["params"]]
        execution = Layerwise(optimizer) if layerwise else GlobalStep(optimizer, 0.0)
        for grads in gradients(params, 6):
            sum((q.float() * g.float() * scale).sum() for q, g in zip(params, grads, strict=True)).backward()  # type: ignore[union-attr]
            execution.complete()
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@settings(deadline=None, max_examples=100)
@given(**CASES, cut=st.integers(1, 6))
def test_saving_in_the_middle_changes_nothing(
    row: str,
    numerics: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    scale: float,
    options: dict[str, Any],
    cut: int,
) -> None:
    p = torch.ones(shape, dtype=dtype, requires_grad=True)
    optimizer = optimizer_for(p, row, numerics, options)
    for i, (grad,) in enumerate(gradients([p], 7)):
        if i == cut:
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            q = p.detach().clone().requires_grad_()
            again = optimizer_for(q, row, numerics, options)
            again.load_state_dict(torch.load(buffer, weights_only=True))
        for weight, o in [(p, optimizer)] + ([(q, again)] if i >= cut else []):
            weight.grad = grad * scale
            o.step()
    assert torch.equal(p, q)


@settings(deadline=None, max_examples=60)
@given(
    row=st.sampled_from([row for row in ROWS if "galore" in row]), numerics=CASES["numerics"], shape=CASES["shape"],
    scale=CASES["scale"], options=CASES["options"],
)  # fmt: skip
def test_an_update_has_at_most_the_rank_of_the_basis(
    row: str, numerics: str, shape: tuple[int, int], scale: float, options: dict[str, Any]
) -> None:
    p = torch.zeros(shape, requires_grad=True)  # in fp32 and without decay, its change is the update itself
    optimizer = optimizer_for(p, row, numerics, options)
    for grads in gradients([p], 4):
        p.data.zero_()
        p.grad = grads[0] * scale
        optimizer.step()
        values = torch.linalg.svdvals(p.detach().double())
        assert values[0] > 0
        assert (values[options["rank"] :] < 1e-5 * values[0]).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.sampled_from(["svd", "randomized"]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1e-12, 1.0, 1e12]), st.floats(0.0, 4.0),
)  # fmt: skip
def test_bases_are_orthonormal_on_any_spectrum(
    m: int, n: int, rank: int, basis: str, dtype: torch.dtype, scale: float, decay: float
) -> None:
    """Down to spectra that fall by i⁻⁴, and to gradients of rank one."""
    generator = torch.Generator().manual_seed(m * n)
    k = min(m, n)
    u, v = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    grad = (scale * (u * torch.arange(1, k + 1).float() ** -decay) @ v).to(dtype)
    rank = min(rank, k)
    for side in ("left", "right"):
        previous = random_basis((m, rank) if side == "left" else (rank, n), side, 0, grad.device)
        found = BASES[basis](grad, rank, side, previous)
        gram = found.T @ found if side == "left" else found @ found.T
        assert (gram - torch.eye(rank)).abs().max() < 1e-4
