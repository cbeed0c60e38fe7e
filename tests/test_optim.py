"""The update rules against torch's, transformers' and the GaLore authors' own, on prescribed gradients."""

import copy
import pickle
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Adafactor as TransformersAdafactor
from transformers import LlamaForCausalLM

from galore_pretrain.optim import REGISTRY, GaLore, RuleOptimizer, build_optimizer
from galore_pretrain.optim.adafactor import Adafactor
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.build import build_rules
from galore_pretrain.optim.methods import PROJ_TYPES, ROWS, resolve_name
from galore_pretrain.optim.moments import Blockwise8bit
from galore_pretrain.optim.projector import BASES, project, random_basis, sides
from galore_pretrain.optim.rule import Direction
from galore_pretrain.optim.sgd import SGD
from galore_pretrain.optim.update import Step
from galore_pretrain.optim.weights import DenseWeights
from galore_pretrain.tensors import products
from galore_pretrain.tensors.rounding import PERIOD, RandomBits, round_stochastic
from prescribed import gradients, meant_for, parameters, random_bits, train

galore_torch = pytest.importorskip("galore_torch", reason="the authors' package is a dev dependency")
SHAPES = [(24, 40), (40, 24), (32, 32)]


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
    shapes = [(40, 24), (1000,), (300, 16)]
    for rule in (
        Adam(),
        Adam(store=Blockwise8bit()),
        Adafactor(),
        GaLore(Adam(), rank=16),
        GaLore(Adafactor(), rank=16),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            results = []
            for size in (1 << 18, 256):
                for module in ("optimizer", "rule", "adafactor"):
                    monkeypatch.setattr(
                        f"galore_pretrain.optim.{module}.chunk_elements", lambda device, size=size: size
                    )
                monkeypatch.setattr("galore_pretrain.optim.galore.SMALL_CHUNK", size)
                params = parameters([s for s in shapes if len(s) == 2 or not isinstance(rule, GaLore)], dtype)
                train(RuleOptimizer([{"params": params, "rule": rule}], weight_decay=0.1), params, 5, varying)
                results.append(params)
            for a, b in zip(*results, strict=True):
                # fp32 sums of blocks differ in their last bits, and so may a bf16 weight that rounding has parted
                assert (a.float() - b.float()).abs().max() <= (1e-5 if dtype == torch.float32 else 0.01), rule


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("published", [False, True])
def test_adafactor_parity(beta1: float | None, published: bool) -> None:
    """At a constant rate: transformers averages lr-scaled directions, sound numerics the directions themselves."""
    rule = Adafactor(beta1=beta1, published=published)
    assert_same_training(
        lambda p: RuleOptimizer([{"params": p, "rule": rule}], lr=0.01, weight_decay=0.1),
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


def authors(row: str, groups: list[dict[str, Any]], decay: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The published optimizer that a row repeats."""
    if row == "galore_adamw":
        return galore_torch.GaLoreAdamW(groups, lr=0.01, weight_decay=decay, no_deprecation_warning=True)
    if row == "galore_adafactor":
        kwargs: dict[str, Any] = {"relative_step": False, "scale_parameter": False}
        return galore_torch.GaLoreAdafactor(groups, lr=0.01, weight_decay=decay, **kwargs)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # it waits for a GPU that is not there
    return galore_torch.GaLoreAdamW8bit(groups, lr=0.01, weight_decay=decay)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "proj_type"), product(SHAPES, ("std", "left", "right", "full")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ["galore_adamw", "galore_adafactor"])
def test_reference_numerics_are_the_authors(
    row: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    proj_type: str,
    decay: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, bf16 included: 30 updates with a basis every 7, an unprojected vector beside."""
    options = {"rank": 6, "update_proj_gap": 7, "scale": 0.3, "proj_type": proj_type}
    theirs, ours = parameters([shape, (17,)], dtype), parameters([shape, (17,)], dtype)
    groups = [{"params": [theirs[1]]}, {"params": [theirs[0]], **options}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(authors(row, groups, decay, monkeypatch), theirs, 30)
    rule, bare = build_rules(row, "reference", **options)
    optimizer = RuleOptimizer(
        [{"params": [ours[1]], "rule": bare}, {"params": [ours[0]], "rule": rule}],
        lr=0.01, weight_decay=decay, rounding="nearest",
    )  # fmt: skip
    train(optimizer, ours, 30)
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (128, 128)])
def test_reference_8bit_is_the_authors(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large enough that the low-rank moments are quantized: small moments the published class leaves frozen."""
    options = {"rank": 48, "update_proj_gap": 7, "scale": 0.3, "proj_type": "std"}
    theirs, ours = parameters([shape, (64, 80)], dtype), parameters([shape, (64, 80)], dtype)
    train(
        authors("galore_adamw8bit", [{"params": [theirs[1]]}, {"params": [theirs[0]], **options}], 0.1, monkeypatch),
        theirs,
        30,
    )
    rule, bare = build_rules("galore_adamw8bit", "reference", **options)
    groups = [{"params": [ours[1]], "rule": bare}, {"params": [ours[0]], "rule": rule}]
    train(RuleOptimizer(groups, lr=0.01, weight_decay=0.1, rounding="nearest"), ours, 30)
    for x, y in zip(ours, theirs, strict=True):
        # a few ulps of fp32 part before something is rounded to a byte, or to bf16
        assert (x - y).abs().max() <= (1e-4 if dtype == torch.float32 else 2**-7) * y.abs().max()
        assert dtype == torch.float32 or (x != y).float().mean() < 0.01


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw8bit_is_bitsandbytes(decay: float) -> None:
    import bitsandbytes

    shapes = [(80, 64), (64, 67), (100,)]  # quantized, quantized with a last block that is not full, dense
    a, b = parameters(shapes), parameters(shapes)
    ours = RuleOptimizer([{"params": a, "rule": REGISTRY["adamw8bit"].sound}], weight_decay=decay)
    theirs = bitsandbytes.optim.AdamW8bit(b, lr=0.01, weight_decay=decay)
    train(ours, a, 30, varying)
    train(theirs, b, 30, varying)
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= 1e-6 * y.abs().max()
        mine, other = ours.state[x], theirs.state[y]
        assert torch.equal(mine["exp_avg"], other["state1"])
        assert torch.equal(mine["exp_avg_sq"], other["state2"])
        if "absmax1" in other:
            assert torch.equal(mine["exp_avg_absmax"], other["absmax1"])


def _kernel_agrees_with_the_rule(device: str) -> None:
    store, shape = Blockwise8bit(), (64, 80)
    rule = Adam(store=store)
    states = [{k: v.to(device) for k, v in rule.init(torch.empty(shape)).items()} for _ in range(2)]
    for count, (grad,) in enumerate(gradients([torch.empty(shape)], 20), 1):
        g = grad.to(device)
        fused = store.fused_adam(g, states[0], Step(count), rule.betas, rule.eps, always=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Blockwise8bit, "fused_adam", lambda *args, **kwargs: None)
            composed = rule.update(g, states[1], Step(count))
        assert fused is not None
        expected = composed.left * composed.factor
        # A GPU's kernel rounds some bytes to the neighbour, which the directions to come show.
        bound = 1e-6 if device == "cpu" else 1e-2
        assert (fused + expected).norm() <= bound * expected.norm()
    # A GPU's kernel takes 1 - beta2 in fp32, of 0.999 in fp32: that is 1.3e-5 less, and so are the second moments.
    rtol = 1e-5 if device == "cpu" else 2e-5
    for name, value in states[0].items():
        # A kernel may order its sums otherwise, and round a byte otherwise: to its neighbour.
        if value.is_floating_point():
            assert torch.allclose(value, states[1][name], rtol=rtol)
        else:
            apart = (value.int() - states[1][name].int()).abs()
            assert apart.max() <= 1, name
            assert (apart > 0).float().mean() <= 0.01, name


def test_the_fused_kernel_agrees_with_the_composed_rule() -> None:
    _kernel_agrees_with_the_rule("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_fused_kernel_agrees_on_cuda() -> None:
    _kernel_agrees_with_the_rule("cuda")


@pytest.mark.parametrize("inner", [SGD(), Adam(), Adafactor()], ids=["sgd", "adam", "adafactor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_identity_basis_and_scale_one_is_the_inner_rule(inner: Any, shape: tuple[int, int]) -> None:
    def identity(grad: Tensor, rank: int, side: str, previous: Tensor) -> Tensor:
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


@pytest.mark.parametrize("basis", ["svd", "randomized", "svd_unsigned"])
def test_bases_capture_the_leading_subspace(basis: str) -> None:
    """Energy captured of a steep spectrum (1/i), against the best that rank 8 can do: at first, and later."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 48, generator=generator))[0] for n in (64, 48))
    grad = u * (1.0 / torch.arange(1, 49)) @ v.T
    best = torch.linalg.svdvals(grad)[:8].square().sum()
    for side, g in (("left", grad), ("right", grad.T)):
        found = random_basis((64, 8) if side == "left" else (8, 64), side, 0, grad.device)
        for least in (0.95, 0.98, 0.99):
            found = BASES[basis](g, 8, side, found)
            low = project(g, found if side == "left" else None, found if side == "right" else None)
            assert low.square().sum() >= least * best


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_products_by_blocks(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through fp32 where a CPU has no bf16 instructions; a sum over blocks stays in it."""
    monkeypatch.setattr(products, "has_fast_bf16", lambda device: fast)
    monkeypatch.setattr(products, "chunk_elements", lambda device: 64)
    generator = torch.Generator().manual_seed(0)
    wide, thin = torch.randn(70, 50, generator=generator).bfloat16(), torch.randn(70, 8, generator=generator)
    for found, exact, tolerance in (
        (products.product(wide.T, thin), wide.T.double() @ thin.double(), 6e-3 if fast else 2e-3),
        (products.product_of_transposed(wide, thin), wide.T.double() @ thin.double(), 6e-3 if fast else 1e-6),
    ):
        assert (found.double() - exact).norm() <= tolerance * exact.norm()


def test_a_subspace_that_stays_keeps_its_basis() -> None:
    """Moments are carried over a refresh by coordinate: the same gradient must not turn the basis that it gave."""
    grad = torch.randn(48, 40, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 41).float() ** -2
    basis = random_basis((6, 40), "right", 0, grad.device)
    for _ in range(30):
        basis, before = BASES["randomized"](grad, 6, "right", basis), basis
    assert (basis * before).sum(1).min() > 0.999


@pytest.mark.parametrize("row", ["adamw8bit", "natural_galore"])
def test_a_copy_goes_on_alike(row: str) -> None:
    """By deepcopy and by pickle, which also carry the parameters along."""
    rule, _ = build_rules(row, "sound", **meant_for(row, rank=4, update_proj_gap=3))
    params = parameters([(96, 80), (80, 96)], torch.bfloat16)
    optimizer = RuleOptimizer([{"params": params, "rule": rule}], lr=0.01)
    train(optimizer, params, 5)
    copies = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    train(optimizer, params, 5)
    for others, other in copies:
        train(other, others, 5)
        assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_svd_signs_are_canonical() -> None:
    """LAPACK may give either sign; the sum of a vector with its largest entry's sign is the same for both."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        grad = torch.randn(12, 8, generator=generator)
        for side, along in (("left", 0), ("right", 1)):
            basis, opposite = (BASES["svd"](g, 4, side, grad) for g in (grad, -grad))
            assert torch.allclose(basis, opposite, atol=1e-4)
            assert (basis.gather(along, basis.abs().argmax(along, keepdim=True)) > 0).all()


def test_std_projects_the_side_that_leaves_less() -> None:
    assert sides(3, 5, "std") == (True, False)
    assert sides(5, 3, "std") == (False, True)
    assert sides(4, 4, "std") == (False, True)
    assert sides(3, 5, "reverse_std") == (False, True)
    with pytest.raises(ValueError, match="sideways"):
        sides(1, 1, "sideways")


def bits_for(seed: int) -> RandomBits:
    return random_bits(seed, seed)


def test_stochastic_rounding_keeps_the_mean_and_neighbours() -> None:
    value = torch.full((200_000,), 1.0 + 2**-10)  # an eighth of the way from 1 to the next bf16, 1 + 2⁻⁷
    rounded = round_stochastic(value.clone(), bits_for(0).take("weight", 0, 200_000)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(rounded.mean() - value[0]) < 5 * 2**-7 * (0.125 * 0.875 / 200_000) ** 0.5
    exact = torch.tensor([0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan])
    assert torch.equal(round_stochastic(exact.clone(), bits_for(0).take("weight", 0, 6)).float()[:5], exact[:5])
    assert round_stochastic(exact.clone(), bits_for(0).take("weight", 0, 6)).isnan()[5]


def test_random_streams_are_reproducible_and_apart() -> None:
    a, b = bits_for(3), bits_for(3)
    assert torch.equal(a.take_rows(PERIOD + 100, 3, 50), b.take_rows(100, 3, 50))  # wherever a chunk begins
    assert torch.equal(a.take("weight", PERIOD - 20, 50)[20:], b.take("weight", 0, 30))
    assert torch.equal(a.take("weight", 100, 50), b.take("weight", 0, 200)[100:150])
    streams = [a.take("weight", 0, 5000), a.take("exp_avg", 0, 5000), bits_for(4).take("weight", 0, 5000)]
    for i, one in enumerate(streams):
        assert abs(one.float().mean() / 2**16 - 0.5) < 5 * (1 / 12 / 5000) ** 0.5
        for other in streams[i + 1 :]:
            correlation = torch.corrcoef(torch.stack([one, other]).double())[0, 1]
            assert abs(correlation) < 5 / 5000**0.5


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
    kwargs: dict[str, Any] = {"lr": 0.01} | meant_for(row, rank=4, update_proj_gap=3)

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
        optimizer.allocate()
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


def test_targets_and_decay(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    """A caller chooses the matrices, and the parameters that no weight decay reaches; nothing is left out."""
    model = build_tiny()
    norms = [name for name, _ in model.named_parameters() if "norm" in name]

    def is_target(name: str, module: torch.nn.Module) -> bool:
        return isinstance(module, torch.nn.Linear) and name.endswith(("q_proj", "lm_head"))

    undecayed = [*norms, "model.layers.1.self_attn.q_proj.weight"]
    built: dict[str, Any] = {"rank": 4, "weight_decay": 0.1, "targets": is_target, "undecayed": undecayed}
    groups = build_optimizer(model, "galore_adamw", lr=0.01, **built).param_groups
    assert [(group["param_names"], group["weight_decay"]) for group in groups[:2]] == [
        (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], 0.1),
        (["model.layers.1.self_attn.q_proj.weight"], 0.0),
    ]
    assert groups[0]["settings"] == groups[1]["settings"] != groups[2]["settings"] == groups[3]["settings"]
    assert set(groups[3]["param_names"]) == set(norms)
    assert groups[3]["weight_decay"] == 0.0
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())

    model.lm_head.weight = model.model.embed_tokens.weight
    tied = build_optimizer(model, "galore_adamw", lr=0.01, **built).param_groups
    assert tied[0]["param_names"] == ["model.layers.0.self_attn.q_proj.weight"]  # a tied head is the embedding too
    with pytest.raises(ValueError, match="muon found no matrix to project, or to update by its own rule"):
        build_optimizer(model, "muon", lr=0.01, targets=lambda name, module: False)


def test_refusals(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    model = build_tiny()
    with pytest.raises(ValueError, match="did you mean galore_adam"):
        resolve_name("galore_adan")
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
    with pytest.raises(ValueError, match=r"the saved group was updated by .*rank=4.*this one is by .*rank=5"):
        other.load_state_dict(optimizer.state_dict())


def test_every_row_has_a_name_and_aliases_resolve() -> None:
    assert tuple(REGISTRY) == ROWS
    for name, expected in {
        "adam8bit": ("adamw8bit", False),
        "AdamW_8bit": ("adamw8bit", False),
        "galore_adamw_8bit": ("galore_adamw8bit", False),
        "galore_adamw_layerwise": ("galore_adamw", True),
        "galore_adamw8bit_per_layer": ("galore_adamw8bit", True),
        "galore_adamw_8bit_layerwise": ("galore_adamw8bit", True),
        "galore_adafactor_per_layer": ("galore_adafactor", True),
        "natural-galore": ("natural_galore", False),
        "adamw_torch": ("adamw", False),
    }.items():
        assert resolve_name(name) == expected
    for row in ROWS:
        assert resolve_name(row) == (row, False)


def test_8bit_moments_take_a_byte_an_element() -> None:
    p = torch.zeros(256, 512, dtype=torch.bfloat16, requires_grad=True)
    state = RuleOptimizer([{"params": [p], "rule": Adam(store=Blockwise8bit())}]).state[p]
    sizes = {name: t.nbytes for name, t in state.items() if isinstance(t, Tensor)}
    n = 256 * 512
    assert sizes == {"exp_avg": n, "exp_avg_sq": n, "exp_avg_absmax": n // 64, "exp_avg_sq_absmax": n // 64}


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("numel_is_bare", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_no_full_size_temporary(row: str, numel_is_bare: bool) -> None:
    """Neither a matrix nor an embedding of 4M bf16 weights is ever copied whole, in fp32 or at all. A chunk is of 256K.

    The direction of FOAM and of Muon has no factors: it is one tensor of that size, in bf16.
    """
    rules = build_rules(row, "sound", **meant_for(row, rank=64, update_proj_gap=100))
    p = torch.zeros(4096, 1024, dtype=torch.bfloat16, requires_grad=True)
    optimizer = RuleOptimizer([{"params": [p], "rule": rules[numel_is_bare]}])
    p.grad = torch.randn(p.shape).bfloat16()
    optimizer.step()  # a basis, and constants
    with _LargestTensor() as largest:
        optimizer.step()
    if row in ("foam", "muon") and not numel_is_bare:
        assert largest.bytes == p.nbytes
    else:
        assert largest.bytes < p.nbytes


# -- tensors of other people's models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ROWS)
def test_transposed_scalar_and_empty_parameters(row: str, dtype: torch.dtype) -> None:
    """A weight that is not contiguous gets the update of one that is; scalars and empty tensors do no harm."""
    rule, bare = build_rules(row, "sound", **meant_for(row, rank=4))
    (first,) = parameters([(24, 16)], dtype)
    second = first.detach().clone().T.contiguous().T.requires_grad_()
    assert not second.is_contiguous()
    for p in (first, second):
        odd = [torch.tensor(2.0, dtype=dtype, requires_grad=True), torch.zeros(0, 3, dtype=dtype, requires_grad=True)]
        groups = [{"params": [p], "rule": rule}, {"params": odd, "rule": bare}]
        train(RuleOptimizer(groups, lr=0.01, weight_decay=0.1), [p, *odd], 5)
        assert odd[0].isfinite()
    assert torch.equal(first, second)


def test_refreshes_are_spread_whatever_the_groups() -> None:
    """Also if each matrix has a group of its own, as with learning rates by layer."""
    params = parameters([(12, 8)] * 20)
    rule = GaLore(Adam(), rank=2, update_proj_gap=200)
    optimizer = RuleOptimizer([{"params": [p], "rule": rule} for p in params])
    due: dict[int, int] = {}
    for i, grads in enumerate(gradients(params, 20)):
        before = [optimizer.state[p]["right_basis"].clone() for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        if i:  # the first update also starts every basis
            due[i] = sum(
                not torch.equal(b, optimizer.state[p]["right_basis"]) for p, b in zip(params, before, strict=True)
            )
    assert sum(due.values()) >= 18
    assert max(due.values()) <= 3


def test_parameters_that_rest_do_not_cost_new_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    original = RandomBits.table
    monkeypatch.setattr(RandomBits, "table", staticmethod(lambda *args: drawn.append(1) or original(*args)))
    params = parameters([(8, 8)] * 6, torch.bfloat16)
    optimizer = RuleOptimizer([{"params": params, "rule": Adam()}])
    for i, p in enumerate(params):
        optimizer.state[p]["step"] = 3 * i
    train(optimizer, params, 20)
    assert len(drawn) == 1


@pytest.mark.parametrize("row", ["adam", "adamw", "galore_adamw"])
def test_whole_bf16_tensors_are_rounded_as_fp32_copies_of_them(row: str) -> None:
    """To nearest, torch's kernel works on tensors themselves: with the bits of fp32 copies rounded afterwards."""
    p = torch.nn.Parameter(torch.randn(700, 500).bfloat16())  # more than a piece
    options: dict[str, Any] = meant_for(row, rank=8, update_proj_gap=100)
    rule, _ = build_rules(row, "sound", **options)
    optimizer = RuleOptimizer([{"params": [p], "rule": rule}], lr=0.01, weight_decay=0.1, rounding="nearest")
    inner = rule.inner if isinstance(rule, GaLore) else rule
    assert isinstance(inner, Adam)
    for step in range(1, 6):
        weight, state = p.detach().float(), {k: v.clone() for k, v in optimizer.state[p].items() if k != "step"}
        p.grad = torch.randn(700, 500).bfloat16()
        grad = p.grad.clone()
        optimizer.step()
        now = optimizer.state[p]
        if isinstance(rule, GaLore):
            grad = rule.compress(grad, now, Step(step))
            weight = torch.zeros_like(grad, dtype=torch.float32)
        m, v = state["exp_avg"].float(), state["exp_avg_sq"].float()
        kernel = torch._fused_adam_ if inner.decay == "l2" else torch._fused_adamw_
        kernel(
            [weight], [grad.float()], [m], [v], [], [torch.tensor(float(step))], lr=0.01, beta1=0.9, beta2=0.999,
            eps=1e-8, weight_decay=0.0 if isinstance(rule, GaLore) else 0.1, amsgrad=False, maximize=False,
        )  # fmt: skip
        assert torch.equal(now["exp_avg"], m.bfloat16())
        assert torch.equal(now["exp_avg_sq"], v.bfloat16())
        if not isinstance(rule, GaLore):
            assert torch.equal(p, weight.bfloat16())


@pytest.mark.parametrize("shape", [(5, 0), (0, 5)])
def test_a_process_without_a_part_of_a_weight_subtracts_nothing(shape: tuple[int, int]) -> None:
    """Neither scaled rows nor a sum of terms."""
    weight = torch.empty(shape)
    term = Direction(torch.empty(shape), row=torch.ones(shape[0]))
    for direction in (term, term + term):
        DenseWeights().subtract(weight, direction, decay=0.1, decay_first=True, step=Step(1, lr=0.1))
