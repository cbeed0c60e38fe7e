"""Weights held as 8-bit integers: their form, what an update makes of them, and runs of them."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model.coded import CodedLinear, code_matrices
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama import build_model
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import METHODS, Execution, GlobalStep, Layerwise, RuleOptimizer, build_optimizer
from galore_pretrain.optim.codes import subtract_codes
from galore_pretrain.optim.rule import Direction
from galore_pretrain.optim.update import Step
from galore_pretrain.planning.plan import measure
from galore_pretrain.tensors.coded import LARGEST, Coded, CodedParameter, held_bytes
from prescribed import meant_for, random_bits
from runs import lines, run
from test_int8 import exact as exact_int8
from test_plan import config_for, real_peak

GROUPS = (None, 16, 40)
ROWS = [row for row, entry in METHODS.items() if not entry.factors_updated_by]


def drawn(*shape: int, seed: int = 0, scale: float = 0.02) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def coded(matrix: Tensor, group: int | None = None) -> Coded:
    made = Coded.empty(*matrix.shape, group)
    made.write(matrix)
    return made


def bits_of(shape: torch.Size, seed: int) -> Tensor:
    return torch.randint(0, 1 << 16, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def steps_of(made: Coded) -> Tensor:
    return made._spread(made.scales.double())


def moved_by(update: Tensor) -> Callable[[Coded], Callable[[Tensor], Tensor]]:
    return lambda made: lambda steps: steps.add_(made.in_steps(update.float().clone()))


# -- the form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_read_as_the_nearest_codes(group: int | None, dtype: torch.dtype) -> None:
    matrix = drawn(7, 100).to(dtype)
    made = coded(matrix, group)
    error = (made.read().double() - matrix.double()).abs()
    assert bool((error <= 0.5001 * steps_of(made)).all())
    assert made.read(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(made.read(torch.bfloat16), made.read().bfloat16())
    assert made.nbytes == 700 + 2 * made.scales.numel()
    assert made.scales.shape == (7, 1 if group is None else -(-100 // group))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_groups_of_one_sign_and_constant_ones_lose_nothing(group: int | None, sign: float) -> None:
    """Codes with an offset that is cut off at 0 would clip them (Q-GaLore's)."""
    positive = sign * (1 + drawn(4, 80).abs())
    constant = torch.full((4, 80), sign * 0.3)
    zeros = torch.zeros(4, 80)
    for matrix in (positive, constant, zeros):
        made = coded(matrix, group)
        assert bool(((made.read() - matrix).abs() <= 0.5001 * steps_of(made)).all())
    assert bool((coded(zeros, group).read() == 0).all())


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([None, 16, 33]), st.integers(0, 99))
def test_any_shape_has_a_form(rows: int, columns: int, group: int | None, seed: int) -> None:
    made = coded(drawn(rows, columns, seed=seed), group)
    assert int(made.codes.abs().max()) <= LARGEST
    update = drawn(rows, columns, seed=seed + 1)
    made.change(moved_by(update)(made), bits_of(made.codes.shape, seed))
    assert int(made.codes.abs().max()) <= LARGEST
    assert bool(torch.isfinite(made.read()).all())


# -- updates ----------------------------------------------------------------------------------------------------------


def step_for(seed: int, lr: float = 1.0, **more: Any) -> Step:
    return Step(1, lr=lr, bits=random_bits(seed), **more)


@pytest.mark.parametrize("group", GROUPS)
def test_a_thousand_updates_of_nothing_change_no_byte(group: int | None) -> None:
    made = coded(drawn(6, 120), group)
    before = made.codes.clone(), made.scales.clone()
    nothing = Direction(torch.zeros(6, 3), torch.zeros(3, 120))
    for number in range(1000):
        subtract_codes(made, nothing, 0.0, True, step_for(number))
    assert torch.equal(made.codes, before[0])
    assert torch.equal(made.scales, before[1])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.05])
def test_an_update_is_made_on_average(group: int | None, size: float) -> None:
    """Also one of a hundredth of a step, and one so large that scales change."""
    start = coded(drawn(6, 120), group)
    update = drawn(6, 120, seed=3, scale=size)
    expected = start.read().double() + update.double()
    total = torch.zeros(6, 120, dtype=torch.float64)
    repeats = 400
    largest_step = torch.zeros(6, 120, dtype=torch.float64)
    for number in range(repeats):
        made = Coded(start.codes.clone(), start.scales.clone(), start.group)
        made.change(moved_by(update)(made), bits_of(made.codes.shape, number))
        total += made.read().double()
        largest_step = torch.maximum(largest_step, steps_of(made))
    # A rounding up or down has a deviation of half a step at most.
    error = (total / repeats - expected).abs()
    assert bool((error <= 6 * 0.5 / math.sqrt(repeats) * largest_step + 1e-7).all())
    mean_error = float(((total / repeats - expected) / largest_step).mean())
    assert abs(mean_error) <= 6 * 0.5 / math.sqrt(repeats * error.numel())


def simulated(made: Coded, update: Tensor, decay: float, bits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The same update in fp64, element by element."""
    columns = made.codes.shape[1]
    codes = made.codes.double().numpy() * (1 - decay)
    scales = made.scales.double().numpy()
    for row in range(len(codes)):
        for number, first in enumerate(range(0, columns, made.group)):
            part = slice(first, first + made.group)
            codes[row, part] -= update.double().numpy()[row, part] / scales[row, number]
            largest = np.abs(codes[row, part]).max()
            if largest and not 64 <= largest <= 127:
                scale = torch.tensor(scales[row, number] * largest / 96).bfloat16().double().item()
                codes[row, part] *= scales[row, number] / scale
                scales[row, number] = scale
    return np.clip(np.floor(codes + (bits.double().numpy() + 0.5) / 65536), -127, 127), scales


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("size", [1e-3, 0.05])
def test_updates_are_those_of_a_simulation(group: int | None, size: float) -> None:
    made = coded(drawn(6, 120), group)
    left, right = drawn(6, 4, seed=5, scale=1.0), drawn(4, 120, seed=6, scale=size)
    for number in range(20):
        step = step_for(number, lr=0.5)
        assert step.bits is not None
        bits = step.bits.take("weight", 0, 720).view(6, 120)
        codes, scales = simulated(made, 0.5 * 0.25 * left @ right, 0.01, bits)
        subtract_codes(made, Direction(left, right, factor=0.25), 0.01, True, step)
        apart = np.abs(made.codes.numpy() - codes)
        assert apart.max() <= 1
        assert (apart > 0).mean() <= 0.005  # where fp32 and fp64 fall on two sides of a bound
        assert np.allclose(made.scales.double().numpy(), scales, rtol=2**-8)
        made = Coded(torch.from_numpy(codes).to(torch.int8), torch.from_numpy(scales).bfloat16(), made.group)


def test_scales_change_only_where_they_have_to() -> None:
    made = coded(drawn(50, 64), None)
    before = made.scales.clone()
    largest = made.codes.abs().amax(1)
    made.change(moved_by(drawn(50, 64, seed=2, scale=1e-5))(made), bits_of(made.codes.shape, 1))
    assert torch.equal(made.scales, before)
    made.change(lambda steps: steps.mul_(1.5), bits_of(made.codes.shape, 2))  # 144 of 127
    assert bool((made.scales > before).all())
    assert bool(((made.codes.abs().amax(1) - largest).abs() <= 2).all())
    made.change(lambda steps: steps.mul_(0.5), bits_of(made.codes.shape, 3))  # 48 of 64
    assert bool((made.codes.abs().amax(1) >= 95).all())


def test_what_is_not_valid_changes_nothing() -> None:
    made = coded(drawn(6, 40), 16)
    before = made.codes.clone(), made.scales.clone()
    update = torch.full((6, 40), math.nan)
    subtract_codes(made, Direction(update), 0.1, True, step_for(1, valid=torch.tensor(False)))
    assert torch.equal(made.codes, before[0])
    assert torch.equal(made.scales, before[1])
    subtract_codes(made, Direction(drawn(6, 40)), 0.1, True, step_for(1, valid=torch.tensor(True)))
    assert not torch.equal(made.codes, before[0])


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_its_codes_stand_for(dtype: torch.dtype, bias: bool) -> None:
    layer = CodedLinear(nn.Linear(24, 40, bias=bias, dtype=dtype), 16)
    layer.weight.coded.write(drawn(40, 24))
    dense = nn.Linear(24, 40, bias=bias, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(layer.weight.coded.read(dtype))
        if bias:
            dense.bias.copy_(layer.bias)
    x = drawn(2, 5, 24, seed=4, scale=1.0).to(dtype)
    both = []
    for module in (layer, dense):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        both.append((y, leaf.grad, module.weight.grad))
        if bias:
            both[-1] += (module.bias.grad,)
    for ours, theirs in zip(*both, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == dtype


def small_model(dtype: torch.dtype, group: int | None, seed: int = 0) -> Any:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )  # fmt: skip
    return build_model(config, dtype=dtype, seed=seed, change=lambda model: code_matrices(model, group))


def codes_of(model: nn.Module) -> list[Tensor]:
    found = []
    for p in model.parameters():
        if isinstance(p, CodedParameter):
            found += [p.coded.codes, p.coded.scales.view(torch.int16)]
        else:
            found.append(p.detach())
    return found


def test_a_copy_has_codes_of_its_own() -> None:
    model = small_model(torch.bfloat16, 16)
    copied = copy.deepcopy(model)
    assert all(map(torch.equal, codes_of(model), codes_of(copied)))
    weight = copied.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, CodedParameter)
    weight.coded.codes.zero_()
    assert not all(map(torch.equal, codes_of(model), codes_of(copied)))
    assert held_bytes(weight) == 88 * 32 + 88 * 2 * 2
    assert weight.untyped_storage().nbytes() == 2  # it stands for them, and holds nothing


def test_weights_are_those_that_a_dense_model_begins_with() -> None:
    model = small_model(torch.float32, None)
    dense = build_model(model.config, dtype=torch.float32, seed=0)
    theirs = dict(dense.named_parameters())
    for name, p in model.named_parameters():
        if isinstance(p, CodedParameter):
            assert bool(((p.coded.read() - theirs[name]).abs() <= 0.5001 * steps_of(p.coded)).all())
        else:
            assert torch.equal(p, theirs[name])


def trained(
    row: str, dtype: torch.dtype, execution: type[Execution], micro_batches: int, broken: int | None = None
) -> tuple[Any, RuleOptimizer]:
    model = small_model(dtype, 16)
    optimizer = build_optimizer(model, row, lr=0.01, weight_decay=0.1, **meant_for(row, rank=4, update_proj_gap=2))
    running = execution(optimizer)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        for i in range(micro_batches):
            rows = torch.randint(0, 100, (2, 9), generator=generator)
            running.begin(i, micro_batches)
            mean_loss(model, rows[:, :-1], rows[:, 1:], 16 * micro_batches).backward()
            if number == broken and i == micro_batches - 1:
                model.model.layers[0].mlp.up_proj.weight.grad.view(-1)[3] = math.inf
        running.complete()
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ROWS)
def test_every_method_updates_codes_in_both_ways_alike(row: str, dtype: torch.dtype) -> None:
    after, _ = trained(row, dtype, GlobalStep, 1)
    inside, _ = trained(row, dtype, Layerwise, 1)
    assert all(map(torch.equal, codes_of(after), codes_of(inside)))
    fresh = small_model(dtype, 16)
    changed = [not torch.equal(a, b) for a, b in zip(codes_of(after), codes_of(fresh), strict=True)]
    assert sum(changed) >= 0.6 * len(changed)  # not every scale


@pytest.mark.parametrize("row", ["adamw", "scale", "galore_adamw"])
def test_a_gradient_that_is_not_finite_leaves_codes_alone(row: str) -> None:
    model, optimizer = trained(row, torch.bfloat16, GlobalStep, 1, broken=3)
    before, _ = trained(row, torch.bfloat16, GlobalStep, 1)
    assert optimizer.read_skips().skipped == 1
    broken = model.model.layers[0].mlp.up_proj.weight.coded.codes
    sound = before.model.layers[0].mlp.up_proj.weight.coded.codes
    assert not torch.equal(broken, sound)
    assert torch.equal(
        model.model.layers[0].mlp.down_proj.weight.coded.codes,
        before.model.layers[0].mlp.down_proj.weight.coded.codes,
    )


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ("galore_adamw", ("--layerwise", "--batch-size", "2", "--dtype", "bfloat16")),
        ("galore_adamw8bit", ("--no-layerwise", "--weight-group", "16")),
        pytest.param("galore_adamw", ("--layerwise", "--matmul", "int8", "--dtype", "bfloat16"), marks=exact_int8),
    ],
)
def test_a_run_goes_on_bit_for_bit_and_exports_what_it_evaluates(
    row: str, flags: tuple[str, ...], tiny_config: str, tmp_path: Path
) -> None:
    every = ("--optim", row, "--weights", "int8", "--wandb", "disabled", *flags)
    whole = run(tiny_config, tmp_path / "whole", *every)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")  # as if it had been killed behind the eighth update
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000012")
    (tmp_path / "parts" / "summary.json").unlink()
    again = run(tiny_config, tmp_path / "parts", *every)
    assert again.returncode == 0, again.stderr
    assert "at update 8" in again.stderr
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    exported = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model", dtype="auto") for name in ("whole", "parts")
    ]
    for ours, theirs in zip(exported[0].parameters(), exported[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    config = json.loads((tmp_path / "whole" / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == ("bfloat16" if "bfloat16" in flags else "float32")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optim": "lora"}, "lora trains thin factors"),
        ({"numerics": "reference"}, "rounds to nearest"),
        ({"matmul": "int8", "weight_group": "64"}, "takes one scale a row, and --weight-group is 64; give"),
        ({"compile": True}, "compiler does not know"),
        ({"weights": "dense", "weight_group": "64"}, "give that too"),
    ],
)
def test_what_cannot_be_held_so_is_refused(more: dict[str, Any], message: str) -> None:
    values = {"model": "llama_1m", "optim": "adamw", "data": "sample", "steps": 3, "lr": 0.1, "weights": "int8"}
    with pytest.raises(InputError, match=message):
        resolve(values | more, {})


@pytest.mark.parametrize(
    ("row", "layerwise", "dtype", "group"),
    [
        ("adamw", True, "bfloat16", "row"),
        ("scale", False, "float32", "64"),
        ("galore_adamw", True, "bfloat16", "64"),
    ],
)
def test_a_plan_is_what_the_allocator_says(
    row: str, layerwise: bool, dtype: str, group: str, tiny_config: str, tmp_path: Path
) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps(json.loads(Path(tiny_config).read_text()) | {"hidden_size": 128, "vocab_size": 300}))
    config = config_for(
        str(small),
        row,
        layerwise=layerwise,
        batch_size=2,
        dtype=dtype,
        weights="int8",
        weight_group=group,
        activation_checkpointing=True,
    )
    plan = measure(config, load_model_config(str(small)))
    assert plan.peak_bytes == pytest.approx(real_peak(config), rel=0.03)
