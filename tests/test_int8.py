"""Products of 8-bit integers: exact but for their factors' rounding, CUDA's rule, and a run that trains with them."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from galore_pretrain.cli import cli
from galore_pretrain.config.options import RunConfig, shipped_models
from galore_pretrain.config.resolve import left_out, resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model import int8
from galore_pretrain.model.coded import CodedLinear
from galore_pretrain.model.head import mean_loss, token_losses
from galore_pretrain.model.int8 import Int8Linear, check_int8, multiplied, multiply_by_int8, quantized
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import is_projected
from galore_pretrain.planning.plan import measure
from galore_pretrain.planning.traffic import count
from galore_pretrain.tensors.chunks import ChunkSample
from galore_pretrain.tensors.place import planned_for_gpu
from galore_pretrain.train.build import model_for, set_up_model
from runs import lines, run

IDS = torch.arange(40).view(2, 20)


def is_exact() -> bool:
    try:
        check_int8(torch.device("cpu"))
    except InputError:
        return False
    return True


exact = pytest.mark.skipif(not is_exact(), reason="this CPU has no exact products of 8-bit integers")


def config_for(model: str, **given: Any) -> RunConfig:
    values = {"model": model, "optim": "adamw", "data": "sample", "lr": 1e-3, "dtype": "float32", "steps": 20}
    values |= {"matmul": "int8"} | given
    return resolve(values, dict.fromkeys(values, "flag"))[0]


def model_of(model: str, **given: Any) -> LlamaForCausalLM:
    config = config_for(model, **given)
    return set_up_model(config, model_for(config, load_model_config(model)))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows and columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator)
    for dim, size in enumerate(shape):
        factors = torch.randn(size, generator=generator).exp()
        numbers = numbers * factors.view([-1 if d == dim else 1 for d in range(len(shape))])
    return numbers.to(dtype)


def oracle_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in steps of a 127th of its largest magnitude: whole numbers, and the steps."""
    steps = (rows.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows.float() * (1 / steps)[:, None]).round().long(), steps


def oracle(left: Tensor, right: Tensor) -> Tensor:
    """``left`` @ ``right``ᵀ of what their rows are rounded to, summed in 64-bit integers."""
    (a, a_steps), (b, b_steps) = oracle_codes(left), oracle_codes(right)
    return (a @ b.T).float() * a_steps[:, None] * b_steps


def three_products(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW of a layer in training."""
    layer = Int8Linear(nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype))
    layer.weight = nn.Parameter(weight.clone())
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad


sizes = st.integers(1, 70)


@exact
@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_products_are_those_of_the_rounded_factors(
    tokens: int, inner: int, outer: int, dtype: torch.dtype, zeros: bool
) -> None:
    """Bit for bit what sums in 64-bit integers give, whatever the sizes, rows and columns of zeros included."""
    x, weight, grad = (
        random(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate([(tokens, inner), (outer, inner), (tokens, outer)])
    )
    if zeros:
        x[0], x[:, -1], grad[-1], weight[0] = 0, 0, 0, 0
    y, grad_x, grad_weight = three_products(x, weight, grad)
    assert torch.equal(y, oracle(x, weight).to(dtype))
    assert torch.equal(grad_x, oracle(grad, weight.T).to(dtype))
    assert torch.equal(grad_weight, oracle(grad.T, x.T).to(dtype))


@exact
@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from([torch.float32, torch.bfloat16]))
def test_codes_of_weights_are_multiplied_as_they_are(tokens: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    """Backward, a row's scale is a factor of the gradient, which is rounded after it."""
    x, weight, grad = (
        random(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate([(tokens, inner), (outer, inner), (tokens, outer)])
    )
    layer = CodedLinear(nn.Linear(inner, outer, bias=False, dtype=dtype), None, by_int8=True)
    coded = layer.weight.coded
    coded.write(weight)
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    codes, scales = coded.codes.long(), coded.scales[:, 0].float()
    x_codes, x_steps = oracle_codes(x.detach())
    assert torch.equal(y, ((x_codes @ codes.T).float() * x_steps[:, None] * scales).to(dtype))
    g_codes, g_steps = oracle_codes(grad.float() * scales)
    assert x.grad is not None
    assert torch.equal(x.grad, ((g_codes @ codes).float() * g_steps[:, None]).to(dtype))
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, oracle(grad.T, x.detach().T).to(dtype))
    expected = x.detach() @ coded.read(dtype).T
    torch.testing.assert_close(layer.eval()(x), expected)


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_is_about_a_hundredth(dtype: torch.dtype) -> None:
    """Of normal numbers in 512 dimensions: the largest of a row is 3 deviations, so a step is a 42th of one."""
    x, weight, grad = (torch.randn(shape).to(dtype) for shape in [(300, 512), (256, 512), (300, 256)])
    found = three_products(x, weight, grad)
    dense = x.double() @ weight.double().T, grad.double() @ weight.double(), grad.double().T @ x.double()
    for product, expected in zip(found, dense, strict=True):
        error = (product.double() - expected).norm() / expected.norm()
        assert 0.003 < error < 0.015


@exact
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = random(50, 20), random(30, 20), random(50, 30)
    whole = three_products(*arguments)
    monkeypatch.setattr(int8, "chunk_elements", lambda device: 64)
    for one, other in zip(whole, three_products(*arguments), strict=True):
        assert torch.equal(one, other)


@exact
def test_sums_longer_than_32_bits_hold_are_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the tokens, in parts that each have scales of their own."""
    assert 127**2 * int8._LONGEST_SUM < 2**31 <= 127**2 * 2 * int8._LONGEST_SUM
    monkeypatch.setattr(int8, "_LONGEST_SUM", 32)
    x, weight, grad = random(80, 20), random(30, 20), random(80, 30)
    *_, found = three_products(x, weight, grad)
    parts = [oracle(g.T, part.T) for g, part in zip(grad.split(32), x.split(32), strict=True)]
    assert torch.equal(found, parts[0] + parts[1] + parts[2])


@exact
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(value: float, dtype: torch.dtype) -> None:
    """Where a dense product is not finite, this one is not, and the other rows are as they were."""
    x, weight, grad = random(40, 24, dtype=dtype), random(32, 24, dtype=dtype), random(40, 32, dtype=dtype)
    whole = three_products(x, weight, grad)
    for faulty, (row, column) in ((x, (3, 5)), (grad, (7, 2)), (weight, (1, 4))):
        kept = faulty[row, column].clone()
        faulty[row, column] = value
        dense = x.float() @ weight.float().T, grad.float() @ weight.float(), grad.float().T @ x.float()
        found = three_products(x, weight, grad)
        for product, expected, before in zip(found, dense, whole, strict=True):
            finite = expected.isfinite()
            assert not product[~finite].isfinite().any()
            assert torch.equal(product[finite], before[finite])
        faulty[row, column] = kept


@exact
@pytest.mark.parametrize("largest", [1e-44, 1e-38, 1e-30, 1e30])
def test_tiny_and_huge_rows_have_codes(largest: float) -> None:
    """Below the smallest normal number a row may vanish; nothing is infinite, and codes are not clipped."""
    x = torch.full((40, 24), largest)
    x[1] = 1.0
    codes = quantized(x, over=1)
    assert codes.scales.isfinite().all()
    assert codes.values[1, :24].eq(127).all()
    assert codes.values[0, :24].eq(127).all() or largest < 1e-36
    product = multiplied(codes, quantized(torch.eye(24), over=1), torch.float32)
    torch.testing.assert_close(product, x, rtol=1e-5, atol=1e-38)


class CudasRule(TorchDispatchMode):
    """Raises for a product that CUDA would refuse, or cuBLAS be slow at; counts the others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._int_mm.default:
            left, right = args
            rows, inner = left.shape
            columns = right.shape[1]
            assert rows > 16, f"{rows} rows"
            assert inner % 8 == 0, f"a sum of {inner} terms"
            assert columns % 8 == 0, f"{columns} columns"
            assert left.is_contiguous()
            assert right.T.is_contiguous(), "the second factor is no transposed view"
            self.products.append((rows, inner, columns))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", ["dense", "int8"])
@pytest.mark.parametrize("name", shipped_models())
def test_every_product_of_every_shipped_config_is_one_that_cuda_takes(name: str, weights: str) -> None:
    """5461 (llama_1b) and 1708 (llama_100m) are padded to 5464 and 1712, and one token to 24.

    Of layers that have the same shape, one is asked.
    """
    architecture = load_model_config(name)
    architecture.num_hidden_layers = 1
    model = model_for(config_for(name, weights=weights), architecture, "meta")
    layers = [layer for name, layer in model.named_modules() if is_projected(name, layer)]
    hidden, inner = architecture.hidden_size, -(-architecture.intermediate_size // 8) * 8
    assert len(layers) == 7
    of_each_shape = {(layer.in_features, layer.out_features): layer for layer in layers}
    # Fake tensors on the CPU stand for a GPU's.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.chunk_sample = ChunkSample()  # type: ignore[attr-defined]
    with planned_for_gpu(), mode:
        for layer in of_each_shape.values():
            layer.to_empty(device="cpu")
        for tokens, padded_tokens in ((1, 24), (17, 24), (2048, 2048)):
            with CudasRule() as rule:
                for layer in of_each_shape.values():
                    x = torch.zeros(1, tokens, layer.in_features, requires_grad=True)
                    layer(x).sum().backward()
                    assert x.grad is not None
                    assert layer.weight.grad is not None
                    assert x.grad.shape == x.shape
                    assert layer.weight.grad.shape == layer.weight.shape
            assert len(rule.products) == 3 * len(of_each_shape)
            assert {size for product in rule.products for size in product} == {hidden, inner, padded_tokens}


@exact
def test_a_layout_for_cuda_computes_the_same() -> None:
    x = random(40, 24)
    codes = quantized(x, over=0)
    with planned_for_gpu():
        for_gpu = quantized(x, over=0)
    assert not codes.values.is_contiguous()
    assert for_gpu.values.is_contiguous()
    assert torch.equal(codes.values, for_gpu.values)


@exact
def test_training_multiplies_by_int8_and_evaluation_does_not(
    tiny_config: str, build_tiny: Callable[..., LlamaForCausalLM]
) -> None:
    """The weights are those of a dense model, and so is what they compute outside of training."""
    model, dense = model_of(tiny_config), build_tiny()
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in dense.named_parameters()
    }
    labels = IDS.roll(-1, 1)
    loss, expected = (mean_loss(m, IDS, labels, IDS.numel()) for m in (model, dense))
    assert loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    loss.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert p.grad is not None
        assert (p.grad - q.grad).norm() < 0.05 * q.grad.norm(), name
    assert torch.equal(token_losses(model.eval(), IDS, labels), token_losses(dense.eval(), IDS, labels))


@exact
@pytest.mark.parametrize("weights", ["dense", "int8"])
def test_checkpointing_changes_nothing(weights: str, tiny_config: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = model_of(tiny_config, activation_checkpointing=checkpointing, weights=weights)
        mean_loss(model, IDS, IDS, IDS.numel()).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@exact
def test_a_bias_is_added() -> None:
    dense = nn.Linear(24, 40)
    layer = Int8Linear(dense)
    x = random(2, 5, 24)
    torch.testing.assert_close(layer(x), oracle(x.flatten(0, 1), dense.weight).view(2, 5, 40) + dense.bias)
    layer(x).sum().backward()
    torch.testing.assert_close(dense.bias.grad, torch.full((40,), 10.0))


def test_only_attention_and_mlp_are_replaced(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    model = build_tiny()
    multiply_by_int8(model)
    assert {type(module) for name, module in model.named_modules() if is_projected(name, module)} == {Int8Linear}
    assert type(model.lm_head) is nn.Linear


def test_an_inexact_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's on a CPU without VNNI: a first factor made positive, and pairs of terms that 16 bits should hold."""

    def saturating(a: Tensor, b: Tensor) -> Tensor:
        terms = (a.int() + 128)[:, :, None] * b.int()[None]
        pairs = terms.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(1) - 128 * b.int().sum(0)).int()

    small = torch.randint(-60, 60, (8, 8)).to(torch.int8)
    assert torch.equal(saturating(small, small.T), small.int() @ small.T.int())
    monkeypatch.setattr(torch, "_int_mm", saturating)
    with pytest.raises(InputError, match=r"multiplies 8-bit integers inexactly.*use --matmul dense"):
        check_int8(torch.device("cpu"))

    def missing(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch, "_int_mm", missing)
    with pytest.raises(InputError, match=r"has no such products \(not implemented\)"):
        check_int8(torch.device("cpu"))


def test_thin_factors_are_refused(tiny_config: str) -> None:
    with pytest.raises(InputError, match="--matmul int8: lora multiplies by thin factors"):
        config_for(tiny_config, optim="lora", rank=4)
    assert "matmul" in left_out("relora")
    assert "matmul" not in left_out("galore_adamw")


def test_a_run_from_before_the_flag_was_dense(tiny_config: str) -> None:
    config = config_for(tiny_config)
    saved = {name: value for name, value in config.values().items() if name != "matmul"}
    assert config.differences(saved) == ["--matmul int8 (was dense)"]
    assert config_for(tiny_config, matmul="dense").differences(saved) == []


def test_a_plan_counts_the_same_activations_and_products(tiny_config: str) -> None:
    """And the codes and sums of one layer at a time beside them."""
    given = {"max_length": 64, "total_batch_size": 4, "batch_size": 4, "layerwise": False, "grad_clip": 0.0}
    dense, by_int8 = (config_for(tiny_config, matmul=matmul, **given) for matmul in ("dense", "int8"))
    architecture = load_model_config(tiny_config)
    before, after = measure(dense, architecture), measure(by_int8, architecture)
    assert after.parts["weights"] == before.parts["weights"]
    assert after.parts["moments"] == before.parts["moments"]
    assert after.peak_bytes <= 1.1 * before.peak_bytes
    assert count(by_int8).flops == pytest.approx(count(dense).flops, rel=0.01)


@pytest.fixture(scope="module")
def trained(tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run as that of ``finished``, but by 8-bit integers. To be copied, not changed."""
    output = tmp_path_factory.mktemp("runs") / "int8"
    result = run(tiny_config, output, "--matmul", "int8")
    assert result.returncode == 0, result.stderr
    return output


@exact
def test_a_run_is_evaluated_as_the_dense_model_that_it_exports(trained: Path, finished: Path) -> None:
    for dense, by_int8 in zip(lines(finished), lines(trained), strict=True):
        assert dense["loss"] != by_int8["loss"]
        assert dense["loss"] == pytest.approx(by_int8["loss"], rel=0.02)
    summary = json.loads((trained / "summary.json").read_text())
    flags = ["--max-length", "48", "--eval-tokens", "2000", "--json"]
    for path in (trained, trained / "model"):
        answer = CliRunner().invoke(cli, ["eval", str(path), *flags], catch_exceptions=False)
        assert json.loads(answer.stdout)["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-6)


@exact
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(trained: Path, tiny_config: str, tmp_path: Path) -> None:
    parted = tmp_path / "parted"
    shutil.copytree(trained, parted)
    shutil.rmtree(parted / "checkpoints" / "step_00000012")
    (parted / "summary.json").unlink()
    result = run(tiny_config, parted, "--matmul", "int8")
    assert result.returncode == 0, result.stderr
    assert lines(parted) == lines(trained)
    other = run(tiny_config, parted, "--steps", "20")
    assert "--matmul dense (was int8)" in other.stderr
