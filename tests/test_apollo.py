"""APOLLO against an fp64 oracle, its limits, the life of its state, and parts of a matrix that processes share.

`main` checks the last of these, in each of two processes.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from crossed import pairwise
from galore_pretrain.optim import GaLore, GlobalStep, Layerwise, RuleOptimizer, Step, apollo
from galore_pretrain.optim.adafactor import Adafactor
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.apollo import Apollo
from galore_pretrain.optim.moments import Blockwise8bit, State
from galore_pretrain.optim.natural import Natural
from galore_pretrain.optim.rule import Direction
from galore_pretrain.optim.sgd import SGD
from galore_pretrain.optim.sketch import gaussian
from galore_pretrain.tensors.ledger import Ledger
from galore_pretrain.tensors.rounding import NoiseTables
from galore_pretrain.tensors.shards import whole
from own_rules import NewtonSchulz
from prescribed import gradients
from test_dist import forked

SEED = 5
SHAPES = [(40, 12), (12, 40), (16, 16), (1, 30), (30, 1)]
MINI = Apollo(rank=1, scale=128.0, channelwise=False, update_proj_gap=7)
RULES = {"apollo": Apollo(rank=4, update_proj_gap=7), "mini": MINI}


def gradients_of(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of channels that differ in size, and of a size that grows and shrinks."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -2, shape[0])[:, None] * torch.logspace(-1, 1, shape[1])
    drift = torch.randn(shape, generator=generator)
    return [
        ((drift + torch.randn(shape, generator=generator)) * sizes * (1 + math.sin(i))).to(dtype) for i in range(count)
    ]


def step_at(count: int, **options: Any) -> Step:
    return Step(count, seed=SEED, **options)


def value_of(direction: Direction) -> Tensor:
    return direction.whole().double() * direction.factor


def made(rule: Apollo, grads: list[Tensor], first: int = 1, state: State | None = None) -> list[Tensor]:
    """The directions of updates by these gradients, in fp64; bf16 moments are rounded stochastically."""
    tables = NoiseTables(0)
    if state is None:
        state = rule.init(grads[0])
    directions = []
    for count, grad in enumerate(grads, first):
        bits = tables.bits(0, count, grad.device) if grad.dtype == torch.bfloat16 else None
        directions.append(value_of(rule.full_update(grad, state, step_at(count, bits=bits))))
    return directions


def projection(rule: Apollo, m: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """P (m × r) at an update, in fp64."""
    rank = min(rule.rank, m)
    draw = (count - 1) // rule.update_proj_gap
    return gaussian(0, m, rank, seed=SEED, draw=draw, device=torch.device("cpu"), dtype=dtype).double()


def oracle(rule: Apollo, grads: list[Tensor]) -> Iterator[Tensor]:
    """Algorithm 1 with Adam in fp64, its step size's bias correction in the direction."""
    beta1, beta2 = 0.9, 0.999
    m, v, last = 0.0, 0.0, 0.0
    for t, grad in enumerate(grads, 1):
        is_tall = grad.shape[0] >= grad.shape[1]
        g = grad.double().T if is_tall else grad.double()
        r = projection(rule, len(g), t, grad.dtype).T @ g
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r**2
        n = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8)  # type: ignore[union-attr]
        dims = (0,) if rule.channelwise else (0, 1)
        s = n.square().sum(dims).sqrt() / (r.square().sum(dims).sqrt() + 1e-8)
        u = math.sqrt(rule.scale) * g * s
        norm = float(u.norm())
        if last and norm > rule.growth * last:
            u *= rule.growth * last / norm
        last = float(u.norm())
        yield u.T if is_tall else u


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.filterwarnings("ignore:APOLLO rank")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("growth", [1.01, math.inf])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RULES)
def test_against_the_oracle(
    name: str, shape: tuple[int, int], growth: float, dtype: torch.dtype, tolerance: float
) -> None:
    """Over three redraws of P, moments kept; scales that 25 updates of a limiter multiply up to rounding."""
    rule = Apollo(**{**vars(RULES[name]), "growth": growth})
    grads = gradients_of(shape, 25, dtype)
    for found, expected in zip(made(rule, grads), oracle(rule, grads), strict=True):
        assert_close(found, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 2000), (2000, 300)])
def test_a_low_rank_gradient_of_several_chunks_is_updated_as_the_oracle_s(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rule = Apollo(rank=200, update_proj_gap=2)
    grads = gradients_of(shape, 3, dtype)
    for found, expected in zip(made(rule, grads), oracle(rule, grads), strict=True):
        assert_close(found, expected, 1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("channelwise", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_where_the_inner_direction_is_the_gradient_it_is_sgd(shape: tuple[int, int], channelwise: bool) -> None:
    """Every scale is 1, but for √scale; the limiter is off."""
    rule = Apollo(SGD(), rank=4, scale=4.0, channelwise=channelwise, growth=math.inf)
    grads = gradients_of(shape, 4)
    for found, grad in zip(made(rule, grads), grads, strict=True):
        assert_close(found, 2 * grad, 1e-5)


def rotation(size: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(2)))
    return q


def use_projection(matrix: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(start: int, stop: int, rank: int, **options: Any) -> Tensor:
        return matrix[start:stop, :rank].to(options["dtype"])

    monkeypatch.setattr(apollo, "gaussian", chosen)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_with_a_rotation_for_p_channels_are_as_long_as_adam_s_in_the_rotated_basis(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the full rank. It is not Adam: each channel has the gradient's direction."""
    q = rotation(12)
    use_projection(q, monkeypatch)
    rule, adam = Apollo(rank=12, growth=math.inf), Adam()
    grads = gradients_of(shape, 6)
    channels = 1 if shape[0] > shape[1] else 0
    low = [g @ q if channels else q.T @ g for g in grads]
    state = adam.init(low[0])
    for count, (found, r, g) in enumerate(zip(made(rule, grads), low, grads, strict=True), 1):
        rotated = value_of(adam.update(r, state, Step(count)))
        assert_close(found.norm(dim=channels), rotated.norm(dim=channels), 1e-4)
        cosines = torch.cosine_similarity(found, g.double(), dim=channels)
        assert torch.allclose(cosines, torch.ones_like(cosines))


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_one_scale_without_projection_is_as_long_as_adam_and_parallel_to_the_gradient(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_projection(torch.eye(12), monkeypatch)
    rule, adam = Apollo(rank=12, channelwise=False, growth=math.inf), Adam()
    grads = gradients_of(shape, 6)
    state = adam.init(grads[0])
    for count, (found, g) in enumerate(zip(made(rule, grads), grads, strict=True), 1):
        expected = value_of(adam.update(g.clone(), state, Step(count))).norm()
        assert float(found.norm()) == pytest.approx(float(expected), rel=1e-5)
        assert_close(found / found.norm(), g / g.norm(), 1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("factor", [0.1, 1e3])
def test_a_positive_factor_of_all_gradients_changes_nothing(name: str, factor: float) -> None:
    """Where they are far above both ε."""
    grads = [g * 1e4 for g in gradients_of((12, 40), 20)]
    scaled = [g * factor for g in grads]
    for found, expected in zip(made(RULES[name], scaled), made(RULES[name], grads), strict=True):
        assert_close(found, expected, 1e-3)


@pytest.mark.parametrize("name", RULES)
def test_an_update_s_norm_grows_by_a_hundredth_at_most_and_is_kept(name: str) -> None:
    """Without the limiter some would grow by more."""
    grads = gradients_of((12, 40), 30)
    unlimited = [float(u.norm()) for u in made(Apollo(**{**vars(RULES[name]), "growth": math.inf}), grads)]
    assert any(after > 1.1 * before for before, after in itertools.pairwise(unlimited))
    state = RULES[name].init(grads[0])
    last = math.inf
    for count, grad in enumerate(grads, 1):
        norm = float(value_of(RULES[name].update(grad, state, step_at(count))).norm())
        assert norm <= 1.01 * last * (1 + 1e-5)
        assert float(state["last_norm"]) == pytest.approx(norm, rel=1e-5)
        last = norm


def test_p_is_drawn_anew_every_gap_from_the_seed_and_the_draw_s_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(start: int, stop: int, rank: int, **options: Any) -> Tensor:
        asked.append((start, stop, rank, options["seed"], options["draw"]))
        return gaussian(start, stop, rank, **options)

    monkeypatch.setattr(apollo, "gaussian", noted)
    made(Apollo(rank=4, update_proj_gap=3), gradients_of((12, 40), 7))
    assert asked == [(0, 12, 4, SEED, draw) for draw in (0, 0, 0, 1, 1, 1, 2)]


@pytest.mark.parametrize(
    ("rule", "dtype", "expected"),
    [
        (Apollo(rank=16), torch.float32, 2 * 16 * 300 * 4 + 4),
        (Apollo(rank=16), torch.bfloat16, 2 * 16 * 300 * 2 + 4),
        (Apollo(Adam(store=Blockwise8bit()), rank=16), torch.bfloat16, 2 * (16 * 300 + 19 * 4) + 4),
        (MINI, torch.bfloat16, 2 * 300 * 2 + 4),
        (Apollo(Adam(store=Blockwise8bit()), rank=1), torch.bfloat16, 2 * 300 * 4 + 4),  # few stay in fp32
    ],
)
@pytest.mark.parametrize("shape", [(80, 300), (300, 80)])
def test_the_state_is_the_moments_of_the_low_rank_gradient_and_a_norm(
    rule: Apollo, dtype: torch.dtype, expected: int, shape: tuple[int, int]
) -> None:
    state = rule.init(torch.empty(shape, dtype=dtype))
    assert sum(value.nbytes for value in state.values()) == expected


@pytest.mark.parametrize("name", RULES)
def test_a_gradient_of_zeros_does_nothing_and_leaves_all_finite(name: str) -> None:
    zeros = torch.zeros(12, 40)
    grads = gradients_of((12, 40), 6)
    grads[3] = zeros
    directions = made(RULES[name], grads)
    assert torch.equal(directions[3], zeros.double())
    assert all(direction.isfinite().all() for direction in directions)
    assert directions[4].norm() > 0
    for direction in made(RULES[name], [zeros, zeros]):
        assert torch.equal(direction, zeros.double())


@pytest.mark.parametrize("store", [None, Blockwise8bit()], ids=["dense", "8 bits"])
@pytest.mark.parametrize("name", RULES)
def test_an_update_that_is_dropped_leaves_the_state_as_it_was(name: str, store: Any) -> None:
    """Also the first after P was drawn anew."""
    inner = Adam() if store is None else Adam(store=store)
    rule = Apollo(**{**vars(RULES[name]), "inner": inner})
    grads = gradients_of((64, 5000), 8)
    state = rule.init(grads[0])
    made(rule, grads[:7], state=state)
    before = copy.deepcopy(state)
    bad = grads[7].clone()
    bad[3, 3] = math.nan
    step = step_at(8, valid=torch.tensor(False))
    rule.full_update(bad, state, step)
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_moments_of_8_bits_come_near_those_that_are_not_rounded() -> None:
    """In blocks of 256 and in chunks: 200 × 2000 numbers."""
    grads = gradients_of((300, 2000), 12)
    rounded = Apollo(Adam(store=Blockwise8bit()), rank=200, update_proj_gap=5)
    assert rounded.init(grads[0])["exp_avg"].dtype == torch.uint8
    exact = Apollo(rank=200, update_proj_gap=5)
    for found, expected in zip(made(rounded, grads), made(exact, grads), strict=True):
        assert_close(found, expected, 0.1)
        assert (found != expected).any()


def test_a_history_begins_anew_with_every_p_and_adam_s_moments_do_not() -> None:
    grads = gradients_of((12, 40), 4)
    natural = Apollo(Natural(Adam(), history=3), rank=4, update_proj_gap=3)
    state = natural.init(grads[0])
    made(natural, grads[:3], state=state)
    natural.start(state, step_at(4))
    assert not state["history"].any()
    assert state["exp_avg"].any()
    adafactor = Apollo(Adafactor(), rank=4, update_proj_gap=3)
    assert all(direction.isfinite().all() for direction in made(adafactor, grads))


def built(rule: Apollo, dtype: torch.dtype) -> tuple[RuleOptimizer, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES[:3]]
    return RuleOptimizer([{"params": params, "rule": rule}], lr=0.01, weight_decay=0.1), params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_a_run_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """A saved state holds no P, and P is drawn anew at updates 8 and 15."""

    def train(optimizer: RuleOptimizer, params: list[Tensor], first: int, last: int) -> None:
        for grads in itertools.islice(gradients(params, last), first, last):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()

    uncut, params = built(RULES[name], dtype)
    train(uncut, params, 0, 16)
    first, others = built(RULES[name], dtype)
    train(first, others, 0, 6)
    again, resumed = built(RULES[name], dtype)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for p, other in zip(resumed, others, strict=True):
            p.copy_(other)
    train(again, resumed, 6, 16)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_layerwise_is_global(name: str, parts: int, dtype: torch.dtype) -> None:
    finished = []
    for mode in (GlobalStep, Layerwise):
        optimizer, params = built(RULES[name], dtype)
        execution = mode(optimizer, 0.5)
        drawn = gradients(params, 9 * parts)
        for _ in range(9):
            for part in range(parts):
                execution.begin(part, parts)
                torch.autograd.backward(params, next(drawn))
            execution.complete()
        finished.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*finished, strict=True))


@pytest.mark.parametrize("shape", [(2048, 8192), (8192, 2048)])
def test_no_copy_of_the_gradient_is_made(shape: tuple[int, int]) -> None:
    """Of a bf16 matrix of 32 MiB, whose copy in fp32 would take 64."""
    rule = Apollo(rank=1)
    grad = torch.ones(shape, dtype=torch.bfloat16)
    state = rule.init(grad)
    with Ledger() as ledger:  # which counts the gradient as well
        rule.update(grad, state, step_at(1))
    assert ledger.peak - grad.nbytes < 20 * 2**20


def test_a_rank_above_the_shorter_side_is_clipped_to_it_with_a_warning() -> None:
    grads = gradients_of((12, 40), 3)
    with pytest.warns(UserWarning, match="APOLLO rank 256 exceeds the shorter side"):
        state = Apollo().init(grads[0])
    assert state["exp_avg"].shape == (12, 40)
    clipped = made(Apollo(), grads, state=state)
    for found, expected in zip(clipped, made(Apollo(rank=12), grads), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 2.5}, "rank 2.5"),
        ({"update_proj_gap": 0}, "update_proj_gap 0"),
        ({"scale": -1.0}, "scale -1.0"),
        ({"scale": math.inf}, "scale inf"),
        ({"growth": 0.99}, "growth 0.99"),
        ({"growth": math.nan}, "growth nan"),
        ({"inner": GaLore(Adam())}, "GaLore has bases of its own"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Apollo(**options)


def test_what_it_cannot_update_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(7,\) belongs into a group of another rule"):
        Apollo().init(torch.empty(7))
    grad = torch.ones(12, 40)
    rate_inside = Apollo(Adam(formula="transformers", scaled=True), rank=4)
    with pytest.raises(ValueError, match="Adam has the learning rate in its direction"):
        rate_inside.update(grad, rate_inside.init(grad), step_at(1))
    inside = GaLore(Apollo(rank=2), rank=8, update_proj_gap=1, refresh="together")
    state = inside.init(grad)
    inside.full_update(grad, state, step_at(1))
    with pytest.raises(TypeError, match="not run inside another"):
        inside.full_update(grad, state, step_at(2))


@pytest.mark.slow
def test_parts_of_a_matrix_are_updated_as_the_whole(tmp_path: Path) -> None:
    """By rows and by columns, of even and uneven lengths and of none at all; then the saved state is one process's."""
    forked(2, "test_apollo", tmp_path)


def check_parts(
    mesh: DeviceMesh, rule: Apollo, shape: tuple[int, int], dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    def shared(value: Tensor) -> Tensor:
        return distribute_tensor(value, mesh, [Shard(dim)], src_data_rank=None)

    start = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    alone, together = start.clone().requires_grad_(), shared(start.clone()).requires_grad_()
    optimizers = [RuleOptimizer([{"params": [p], "rule": rule}], lr=0.01) for p in (alone, together)]
    for grad in gradients_of(shape, 4, dtype):
        for p, optimizer in zip((alone, together), optimizers, strict=True):
            p.grad = grad if p is alone else shared(grad)
            optimizer.step()
    way = (alone.detach().float() - start.float()).norm()
    apart = (alone.detach().float() - whole(together).float()).norm()
    case = (rule, shape, dim, dtype)
    assert apart <= tolerance * way, (case, float(apart / way))
    norms = [optimizer.state[p]["last_norm"] for p, optimizer in zip((alone, together), optimizers, strict=True)]
    assert torch.allclose(*norms, rtol=max(tolerance, 1e-4)), case
    saved = optimizers[1].state_dict()["state"][0]
    expected = optimizers[0].state_dict()["state"][0]
    assert saved.keys() == expected.keys(), case
    for name, value in expected.items():
        if name != "step":
            assert whole(saved[name]).shape == value.shape, (case, name)
    fresh = shared(start.clone()).requires_grad_()
    again = RuleOptimizer([{"params": [fresh], "rule": rule}], lr=0.01)
    again.load_state_dict(optimizers[0].state_dict())
    for name, value in optimizers[1].state[together].items():
        if name not in ("step", "last_norm") and value.is_floating_point():
            assert again.state[fresh][name].shape == value.shape, (case, name)
            assert torch.allclose(again.state[fresh][name].float(), value.float(), rtol=0.1, atol=0.1), (case, name)


def check_refusal(mesh: DeviceMesh) -> None:
    """A rule that needs all of the low-rank gradient can run where every process has it, and nowhere else."""
    rule = Apollo(NewtonSchulz(), rank=4)
    for dim, refused in ((0, False), (1, True)):
        p = distribute_tensor(torch.ones(12, 40), mesh, [Shard(dim)], src_data_rank=None).requires_grad_()
        if refused:
            with pytest.raises(ValueError, match="NewtonSchulz needs the whole low-rank gradient"):
                RuleOptimizer([{"params": [p], "rule": rule}])
        else:
            RuleOptimizer([{"params": [p], "rule": rule}])


def main() -> None:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("shards",))
    channelwise, mini = Apollo(rank=4, update_proj_gap=3), Apollo(**{**vars(MINI), "update_proj_gap": 3})
    parts = list(itertools.product(((32, 12), (12, 32), (31, 13), (13, 31), (5, 1), (1, 5)), (0, 1)))
    for rule, (shape, dim), dtype in pairwise((channelwise, mini), parts, (torch.float32, torch.bfloat16)):
        # Parts of rows are rounded as those of the whole are. Columns, and sums over parts, round otherwise.
        rounds_alike = dim == 0 and shape[0] > shape[1]
        tolerances = {torch.float32: 1e-4, torch.bfloat16: 4e-4 if rounds_alike else 0.03}
        check_parts(mesh, rule, shape, dim, dtype, tolerances[dtype])
    in_8_bits = Apollo(Adam(store=Blockwise8bit()), rank=16, update_proj_gap=3)
    for shape, dim in itertools.product(((1024, 32), (32, 1024)), (0, 1)):
        check_parts(mesh, in_8_bits, shape, dim, torch.float32, 0.05)
    check_refusal(mesh)
    distributed.destroy_process_group()
