"""The update rules against torch's, transformers' and the GaLore authors' own, on prescribed gradients."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Adafactor as TransformersAdafactor
from transformers import LlamaForCausalLM

from galore_pretrain.optim import REGISTRY, GaLore, build_optimizer, resolve_row
from galore_pretrain.optim.moments import round_stochastic
from galore_pretrain.optim.optimizer import CHUNK, RuleOptimizer
from galore_pretrain.optim.projector import BASES, PROJ_TYPES, project, random_basis, sides
from galore_pretrain.optim.rules import SGD, Adafactor, Adam, Step

galore_torch = pytest.importorskip("galore_torch", reason="the authors' package is a dev dependency")
SHAPES = [(24, 40), (40, 24), (32, 32)]


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(parameters: list[Tensor], steps: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters]


def train(
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    steps: int,
    lr: Callable[[int], float] | None = None,
) -> None:
    for i, grads in enumerate(gradients(parameters, steps)):
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        if lr:
            for group in optimizer.param_groups:
                group["lr"] = lr(i)
        optimizer.step()


def assert_same_training(
    ours: Any,
    theirs: Any,
    shapes: list[tuple[int, ...]],
    *,
    steps: int = 30,
    rel: float = 1e-6,
    lr: Any = None,
) -> None:
    a, b = parameters(shapes), parameters(shapes)
    train(ours(a), a, steps, lr)
    train(theirs(b), b, steps, lr)
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= rel * y.abs().max()


def varying(step: int) -> float:
    return 0.01 * (1 + step % 3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (SGD(), torch.optim.SGD),
        (SGD(momentum=0.9), lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k)),
        (Adam(decay="l2"), torch.optim.Adam),
        (Adam(), torch.optim.AdamW),
        (
            Adam(betas=(0.8, 0.95), eps=1e-4),
            lambda p, **k: torch.optim.AdamW(p, betas=(0.8, 0.95), eps=1e-4, **k),
        ),
    ],
    ids=["sgd", "momentum", "adam", "adamw", "adamw-betas"],
)
def test_torch_parity(rule: Any, theirs: Any, decay: float) -> None:
    assert_same_training(
        lambda p: RuleOptimizer([{"params": p, "rule": rule}], weight_decay=decay),
        lambda p: theirs(p, lr=0.01, weight_decay=decay),
        [*SHAPES, (17,)],
        lr=varying,
    )


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is updated in pieces gets the update it gets whole."""
    monkeypatch.setattr("galore_pretrain.optim.optimizer.CHUNK", 256)
    assert CHUNK > 256
    assert_same_training(
        lambda p: RuleOptimizer([{"params": p, "rule": Adam()}], weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        [(40, 24), (1000,)],
        lr=varying,
    )


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor_parity(beta1: float | None) -> None:
    """At a constant rate: transformers averages lr-scaled directions, this project the directions themselves."""
    assert_same_training(
        lambda p: RuleOptimizer([{"params": p, "rule": Adafactor(beta1=beta1)}], lr=0.01, weight_decay=0.1),
        lambda p: TransformersAdafactor(
            p,
            lr=0.01,
            weight_decay=0.1,
            beta1=beta1,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        ),
        [*SHAPES, (17,)],
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "proj_type"), product(SHAPES, ("std", "left", "right", "full")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_galore_adamw_is_the_authors_under_reference_numerics(
    dtype: torch.dtype, shape: tuple[int, int], proj_type: str, decay: float
) -> None:
    """Bit for bit, bf16 included: 30 updates with a basis every 7, an unprojected vector beside."""
    options = {"rank": 6, "update_proj_gap": 7, "scale": 0.3, "proj_type": proj_type}
    theirs, ours = parameters([shape, (17,)], dtype), parameters([shape, (17,)], dtype)
    groups = [{"params": [theirs[1]]}, {"params": [theirs[0]], **options}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(
            galore_torch.GaLoreAdamW(groups, lr=0.01, weight_decay=decay, no_deprecation_warning=True),
            theirs,
            30,
        )
    rule = replace(REGISTRY["galore_adamw"].reference, **options)
    optimizer = RuleOptimizer(
        [{"params": [ours[1]], "rule": rule.inner}, {"params": [ours[0]], "rule": rule}],
        lr=0.01, weight_decay=decay, rounding="nearest",
    )  # fmt: skip
    train(optimizer, ours, 30)
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def test_galore_adafactor_is_the_authors_in_fp32() -> None:
    options = {"rank": 6, "update_proj_gap": 7, "scale": 0.3, "proj_type": "std"}
    rule = GaLore(Adafactor(), basis="svd_unsigned", refresh="together", **options)
    for shape in SHAPES:
        assert_same_training(
            lambda p: RuleOptimizer([{"params": p, "rule": rule}], lr=0.01, weight_decay=0.1),
            lambda p: galore_torch.GaLoreAdafactor(
                [{"params": p, **options}],
                lr=0.01,
                weight_decay=0.1,
                relative_step=False,
                scale_parameter=False,
            ),
            [shape],
        )


@pytest.mark.parametrize("inner", [SGD(), Adam(), Adafactor()], ids=["sgd", "adam", "adafactor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_identity_basis_and_scale_one_is_the_inner_rule(inner: Any, shape: tuple[int, int]) -> None:
    def identity(grad: Tensor, rank: int, side: str, previous: Tensor, seed: int) -> Tensor:
        return torch.eye(rank)

    rule = GaLore(inner, rank=64, scale=1.0, basis=identity, refresh="together", update_proj_gap=7)
    with pytest.warns(UserWarning, match="is clipped"):
        assert_same_training(
            lambda p: RuleOptimizer([{"params": p, "rule": rule}], lr=0.01, weight_decay=0.1),
            lambda p: RuleOptimizer([{"params": p, "rule": inner}], lr=0.01, weight_decay=0.1),
            [shape],
        )


def test_galore_of_sgd_with_a_full_rank_basis_is_sgd() -> None:
    """PPᵀG = G for any orthonormal P of full rank."""
    rule = GaLore(SGD(), rank=24, scale=1.0, refresh="together", update_proj_gap=7)
    assert_same_training(
        lambda p: RuleOptimizer([{"params": p, "rule": rule}], lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.01),
        [(24, 40), (40, 24)],
        rel=1e-5,
    )


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.sampled_from(["svd", "randomized"]))
def test_any_shape_projects(proj_type: str, m: int, n: int, rank: int, basis: str) -> None:
    """Bases are orthonormal, the update has rank ≤ r, and no shape or rank crashes (the published code's does)."""
    weight = torch.zeros(m, n, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rule = GaLore(Adam(), rank=rank, proj_type=proj_type, basis=basis, refresh="together")
        optimizer = RuleOptimizer([{"params": [weight], "rule": rule}])
    weight.grad = torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))
    optimizer.step()
    r = min(rank, m, n)
    for name, value in optimizer.state[weight].items():
        if "basis" in str(name):
            gram = value.T @ value if name == "left_basis" else value @ value.T
            assert torch.allclose(gram, torch.eye(r), atol=1e-5)
    assert torch.linalg.matrix_rank(weight.detach().double(), rtol=1e-5) <= r


@pytest.mark.parametrize("basis", list(BASES))
def test_bases_capture_the_leading_subspace(basis: str) -> None:
    """Energy captured of a steep spectrum (1/i), against the best that rank 8 can do."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 48, generator=generator))[0] for n in (64, 48))
    grad = u * (1.0 / torch.arange(1, 49)) @ v.T
    best = torch.linalg.svdvals(grad)[:8].square().sum()
    for side, g in (("left", grad), ("right", grad.T)):
        found = BASES[basis](g, 8, side, torch.empty(0), 0)
        low = project(g, found if side == "left" else None, found if side == "right" else None)
        assert low.square().sum() >= 0.98 * best


def test_svd_signs_are_canonical() -> None:
    grad = torch.randn(12, 8)
    for side in ("left", "right"):
        assert torch.allclose(*(BASES["svd"](g, 4, side, grad, 0).abs() for g in (grad, -grad)), atol=1e-5)
        flipped = torch.diag(torch.tensor([-1.0] * 12)) @ grad
        same = BASES["svd"](flipped, 4, "right", grad, 0)
        assert torch.allclose(same, BASES["svd"](grad, 4, "right", grad, 0), atol=1e-5)


@pytest.mark.parametrize(
    ("refresh", "phase", "due"),
    [("together", 0.5, {1, 21, 41}), ("staggered", 0.5, {2, 22, 42}), ("staggered", 0.0, {1, 21, 41})],
)
def test_refresh_schedule(refresh: str, phase: float, due: set[int]) -> None:
    calls: list[int] = []
    current = [0]

    def spy(grad: Tensor, rank: int, side: str, previous: Tensor, seed: int) -> Tensor:
        calls.append(current[0])
        return (
            random_basis((8, rank), "left", seed, grad.device)
            if side == "left"
            else random_basis((rank, 8), "right", seed, grad.device)
        )

    rule = GaLore(SGD(), rank=2, update_proj_gap=20, basis=spy, refresh=refresh)
    state = rule.init(torch.zeros(8, 8))
    for current[0] in range(1, 45):
        rule.update(torch.ones(8, 8), state, Step(current[0], phase=phase))
    assert set(calls) == due


def test_std_projects_the_side_that_leaves_less() -> None:
    assert sides(3, 5, "std") == (True, False)
    assert sides(5, 3, "std") == (False, True)
    assert sides(4, 4, "std") == (False, True)
    assert sides(3, 5, "reverse_std") == (False, True)
    with pytest.raises(ValueError, match="sideways"):
        sides(1, 1, "sideways")


def test_stochastic_rounding_keeps_the_mean_and_neighbours() -> None:
    value = torch.full((200_000,), 1.0 + 2**-10)  # a quarter of the way from 1 to the next bf16, 1 + 2⁻⁷... 1/8 of it
    rounded = round_stochastic(value, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(rounded.mean() - value[0]) < 5 * 2**-7 * (0.125 * 0.875 / 200_000) ** 0.5
    exact = torch.tensor([0.0, 1.0, -2.5, torch.inf, -torch.inf])
    assert torch.equal(round_stochastic(exact, None).float(), exact)
    assert round_stochastic(torch.tensor([torch.nan]), None).isnan().all()


def test_bf16_second_moment_decays_only_when_rounded_stochastically() -> None:
    """The published code's v·0.999 rounds back to v for ever."""
    for numerics, decays in (("sound", True), ("reference", False)):
        p = torch.zeros(4096, dtype=torch.bfloat16, requires_grad=True)
        rule = getattr(REGISTRY["adamw"], numerics)
        optimizer = RuleOptimizer([{"params": [p], "rule": rule}], rounding="stochastic" if decays else "nearest")
        optimizer.state[p]["exp_avg_sq"].fill_(1.0)
        p.grad = torch.zeros_like(p)
        for _ in range(500):
            optimizer.step()
        mean = optimizer.state[p]["exp_avg_sq"].float().mean().item()
        assert mean == pytest.approx(0.999**500, rel=0.01) if decays else mean == 1.0


def test_small_l2_decay_is_not_lost_in_bf16() -> None:
    """1e-3 · 1 added to a gradient of −1 in bf16 would round back to −1."""
    p = torch.ones(40_000, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.full_like(p, -1.0)
    RuleOptimizer([{"params": [p], "rule": SGD()}], lr=1.0, weight_decay=1e-3).step()
    assert p.detach().float().mean().item() == pytest.approx(2.0 - 1e-3, abs=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", REGISTRY)
def test_state_survives_saving(
    row: str, dtype: torch.dtype, build_tiny: Callable[..., LlamaForCausalLM], tmp_path: Any
) -> None:
    """torch.save → weights_only load → the same next updates, each tensor in its own dtype."""
    kwargs: dict[str, Any] = {"lr": 0.01} | ({"rank": 4, "update_proj_gap": 3} if "galore" in row else {})

    def fresh() -> tuple[list[Tensor], RuleOptimizer]:
        model = build_tiny(dtype=dtype)
        return list(model.parameters()), build_optimizer(model, row, **kwargs)

    def run(params: list[Tensor], optimizer: RuleOptimizer, steps: range) -> None:
        for i, grads in enumerate(gradients(params, steps.stop)):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            if i in steps:
                optimizer.step()

    params, optimizer = fresh()
    run(params, optimizer, range(4))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    weights = [p.detach().clone() for p in params]
    run(params, optimizer, range(4, 8))

    again, restored = fresh()
    for p, weight in zip(again, weights, strict=True):
        p.data.copy_(weight)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(again, restored, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_meta_state_has_the_bytes_of_live_state(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    def sizes(device: str, row: str) -> list[tuple[int, torch.dtype]]:
        optimizer = build_optimizer(build_tiny(device=device, dtype=torch.bfloat16), row, lr=0.1)
        return [(t.nbytes, t.dtype) for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in REGISTRY:
            assert sizes("meta", row) == sizes("cpu", row)


def test_groups(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    """Matrices of attention and MLP are projected; embeddings, norms and head are not; nothing is left out."""
    model = build_tiny()
    optimizer = build_optimizer(model, "galore_adamw", lr=0.01, rank=4, matrix_lr_scale=0.5)
    matrices, rest = optimizer.param_groups
    assert all("proj" in name for name in matrices["param_names"])
    assert len(matrices["params"]) == 14
    assert {n.split(".")[-2] for n in rest["param_names"]} == {
        "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert (matrices["lr"], rest["lr"]) == (0.005, 0.01)


def test_refusals(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    model = build_tiny()
    with pytest.raises(ValueError, match="did you mean galore_adamw"):
        resolve_row("galore_adam")
    with pytest.raises(ValueError, match="rank 4 has no meaning for optimizer adamw"):
        build_optimizer(model, "adamw", lr=0.1, rank=4)
    with pytest.raises(ValueError, match="eps 1e-08 has no meaning for optimizer sgd"):
        build_optimizer(model, "sgd", lr=0.1, eps=1e-8)
    with pytest.raises(ValueError, match="numerics 'loose'"):
        build_optimizer(model, "adamw", lr=0.1, numerics="loose")
    with pytest.raises(ValueError, match="basis 'qr'"):
        build_optimizer(model, "galore_adamw", lr=0.1, basis="qr")
    with pytest.raises(ValueError, match="no matrix to project"):
        build_optimizer(torch.nn.Linear(3, 3), "galore_adamw", lr=0.1)
    optimizer = build_optimizer(model, "galore_adamw", lr=0.1, rank=4)
    other = build_optimizer(model, "galore_adamw", lr=0.1, rank=5)
    with pytest.raises(ValueError, match="the saved right_basis"):
        other.load_state_dict(optimizer.state_dict())
