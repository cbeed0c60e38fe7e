"""A gradient that is not finite reaches neither weight nor moment nor basis, in either execution, on any device."""

import warnings
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.optim.build import build_rules, rounding_of
from galore_pretrain.optim.execution import GlobalStep, Layerwise, Outcome
from galore_pretrain.optim.methods import METHODS, ROWS
from prescribed import gradients, meant_for, parameters

SHAPES: list[tuple[int, ...]] = [(96, 80), (80, 96), (40,)]
BAD = {"nan": torch.nan, "inf": torch.inf, "overflow": 1e30}


def run(
    row: str,
    numerics: str,
    dtype: torch.dtype,
    *,
    layerwise: bool = False,
    bad: dict[int, tuple[int, float]],
    clip: float = 0.0,
) -> tuple[list[Tensor], RuleOptimizer, list[Outcome]]:
    """Eight updates; ``bad`` maps an update to (tensor, the value of one element of its gradient)."""
    rule, bare = build_rules(row, numerics, **meant_for(row, rank=64, update_proj_gap=3))
    params = parameters(SHAPES, dtype)
    groups = [{"params": params[:2], "rule": rule}, {"params": params[2:], "rule": bare}]
    optimizer = RuleOptimizer(groups, lr=0.01, weight_decay=0.1, rounding=rounding_of(numerics))
    execution: Any = Layerwise(optimizer) if layerwise else GlobalStep(optimizer, clip)
    finished = []
    for i in range(8):
        generator = torch.Generator().manual_seed(i)
        grads = [torch.randn(p.shape, generator=generator).to(dtype) for p in params]
        if i in bad:
            grads[bad[i][0]].view(-1)[7] = bad[i][1]
        torch.autograd.backward(params, grads)
        execution.complete()
        finished.append(execution.outcome())
    return params, optimizer, finished


CHOICES = [(row, "keep") for row in ROWS]
CHOICES += [(row, moments) for row in ROWS if "moments" in METHODS[row].options for moments in ("project", "reset")]


@pytest.mark.parametrize("numerics", ["sound", "reference"])
@pytest.mark.parametrize(("row", "moments"), CHOICES)
def test_a_bad_gradient_changes_nothing_of_its_tensor(row: str, numerics: str, moments: str) -> None:
    """Neither weight nor moments nor basis, whether a basis is due or not; only ``reset`` resets when it is due."""
    options: dict[str, Any] = meant_for(row, rank=64, update_proj_gap=3, refresh="together", moments=moments)
    rule, bare = build_rules(row, numerics, **options)
    for dtype, (kind, bad), (update, due) in product(
        (torch.float32, torch.bfloat16), BAD.items(), ((3, True), (4, False))
    ):
        params = parameters(SHAPES, dtype)
        groups = [{"params": params[:2], "rule": rule}, {"params": params[2:], "rule": bare}]
        optimizer = RuleOptimizer(groups, lr=0.01, weight_decay=0.1, rounding=rounding_of(numerics))
        for i, grads in enumerate(gradients(params, 6)):
            if i == update:
                for grad in grads:
                    grad.view(-1)[7] = bad
                before = [
                    (p.detach().clone(), {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()})
                    for p in params
                ]
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            if i > update:
                break
            optimizer.step()
        assert optimizer.read_skips().skipped == 3, kind
        for p, (weight, state) in zip(params, before, strict=True):
            assert torch.equal(p, weight)
            for name, value in optimizer.state[p].items():
                if isinstance(value, Tensor) and not (due and moments == "reset" and "basis" not in name):
                    assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("row", ROWS)
def test_only_the_tensor_with_the_bad_gradient_is_skipped(row: str) -> None:
    for tensor in (0, 2):
        params, _, finished = run(row, "sound", torch.float32, bad={7: (tensor, torch.nan)})
        healthy, _, _ = run(row, "sound", torch.float32, bad={})
        assert [f.skipped for f in finished] == [0] * 7 + [1]
        for i, (a, b) in enumerate(zip(params, healthy, strict=True)):
            assert torch.equal(a, b) == (i != tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numerics", ["sound", "reference"])
@pytest.mark.parametrize("row", ROWS)
def test_both_executions_and_every_device_skip_alike(
    row: str, numerics: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nobody waits to see whether a gradient is finite; that path is taken here too, bad gradient or not."""
    bad = {0: (0, torch.nan), 3: (1, torch.inf), 4: (2, torch.nan)}
    plain, _, finished = run(row, numerics, dtype, bad=bad)
    layerwise, _, finished_layerwise = run(row, numerics, dtype, bad=bad, layerwise=True)
    monkeypatch.setattr("galore_pretrain.optim.update.known_true", lambda condition: False)
    unseen, _, finished_unseen = run(row, numerics, dtype, bad=bad)
    assert [f.skipped for f in finished] == [1, 0, 0, 1, 1, 0, 0, 0]
    assert finished == finished_layerwise == finished_unseen
    for a, b, c in zip(plain, layerwise, unseen, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert a.isfinite().all()


def test_who_does_not_ask_is_told() -> None:
    """In another trainer nobody calls ``read_skips``, and weights that silently stay would look like a plateau."""
    p = torch.ones(4, requires_grad=True)
    rule, _ = build_rules("adamw", "sound")
    optimizer = RuleOptimizer([{"params": [p], "rule": rule}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(300):
            p.grad = torch.full_like(p, torch.nan if 100 <= i < 107 else 0.1)
            optimizer.step()
    assert [str(w.message).split(" gradients")[0] for w in caught] == ["in the last 100 steps, 7"]


def test_clipping_leaves_the_bad_gradient_out_of_the_norm() -> None:
    good, _, finished = run("adamw", "sound", torch.float32, bad={5: (0, torch.nan)}, clip=1.0)
    assert finished[5].skipped == 1
    assert finished[5].grad_norm is not None
    assert 1.0 < finished[5].grad_norm < 200.0
    assert all(p.isfinite().all() for p in good)
