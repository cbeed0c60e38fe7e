"""LoRA, ReLoRA and Low-Rank: what is trained, what a merge leaves as it was, and the limits in which they are full."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from galore_pretrain.cli import cli
from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.model.lowrank import Dropout, FactoredLinear, Factors, dense_state, layers
from galore_pretrain.model.position import TrainingPosition
from galore_pretrain.optim import RuleOptimizer, build_optimizer
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.moments import Blockwise8bit, Dense
from galore_pretrain.optim.sgd import SGD
from galore_pretrain.planning.plan import static_bytes
from galore_pretrain.train.build import factors_of, model_for, optimizer_for
from galore_pretrain.train.schedule import Schedule

IDS = torch.arange(40).view(2, 20)


def config_for(model: str, method: str, **given: Any) -> RunConfig:
    values = {"model": model, "optim": method, "data": "sample", "rank": 4, "dtype": "float32", "steps": 20} | given
    return resolve(values, dict.fromkeys(values, "flag"))[0]


def model_of(model: str, method: str, **given: Any) -> LlamaForCausalLM:
    return model_for(config_for(model, method, **given), load_model_config(model))


def test_lora_begins_as_the_full_model(tiny_config: str, build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    """The same W₀, and B zero."""
    model, full = model_of(tiny_config, "lora", lora_dropout=0.3).eval(), build_tiny().eval()
    assert torch.equal(model(IDS).logits, full(IDS).logits)
    assert dense_state(model).keys() == full.state_dict().keys()


def test_low_rank_begins_as_the_best_approximation(
    tiny_config: str, build_tiny: Callable[..., LlamaForCausalLM]
) -> None:
    model, full = model_of(tiny_config, "low_rank"), build_tiny()
    for name, layer in layers(model):
        whole = full.get_parameter(f"{name}.weight").detach()
        error = torch.linalg.norm(layer.dense() - whole)
        assert float(error) == pytest.approx(float(torch.linalg.svdvals(whole)[4:].norm()), rel=1e-4)
        a, b = (torch.linalg.svdvals(part.weight.detach()) for part in (layer.A, layer.B))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # balanced


@pytest.mark.parametrize("method", ["low_rank", "lora", "relora_adamw8bit"])
def test_what_is_trained(tiny_config: str, method: str) -> None:
    """Both factors of every matrix, embeddings, norms and head; W₀ gets no gradient and no state."""
    config = config_for(tiny_config, method)
    architecture = load_model_config(tiny_config)
    model = model_for(config, architecture).train()
    optimizer = optimizer_for(config, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):  # A moves once B has
        mean_loss(model, IDS, IDS.roll(-1, 1), IDS.numel()).backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        frozen = [p for _, layer in layers(model) if (p := layer.weight) is not None]
        assert all(p.grad is None and p not in optimizer.state for p in frozen)
        optimizer.zero_grad()
    names = {id(p): name for name, p in model.named_parameters()}
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(names.values()) - {names[id(p)] for p in frozen}
    assert len(list(layers(model))) == 14
    assert len(frozen) == (0 if method == "low_rank" else 14)
    projections = {n for group in optimizer.param_groups[:1] for n in group["param_names"]}
    assert projections == {f"{name}.{part}.weight" for name, _ in layers(model) for part in "AB"}
    static = static_bytes(config, architecture)
    assert static.weights - static.gradients == sum(p.nbytes for p in frozen)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(deadline=None, max_examples=60)
@given(
    shape=shapes, rank=st.integers(1, 50), alpha=st.floats(0.01, 100), size=st.sampled_from([1e-4, 1.0, 30.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_merge_preserves_the_function(
    shape: tuple[int, int], rank: int, alpha: float, size: float, seed: int
) -> None:
    """And begins anew: B and every moment zero, the count of updates 0, A another one than before."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"mlp": nn.Linear(shape[1], shape[0])})
    factors = Factors(rank, alpha=alpha, every=3)
    factors.apply(model)
    factors.initialize(model, 0.02)
    layer = model["mlp"]
    assert isinstance(layer, FactoredLinear)
    params = [layer.A.weight, layer.B.weight]
    store = Blockwise8bit() if seed % 2 else Dense()
    optimizer = RuleOptimizer([{"params": params, "rule": Adam(store=store)}], lr=1e-3)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    fresh = RuleOptimizer([{"params": params, "rule": Adam(store=store)}], lr=1e-3)
    with torch.no_grad():
        layer.B.weight.normal_(0.0, size)
        x = torch.randn(7, shape[1])
        before, old = layer(x), layer.A.weight.clone()
        for step in (1, 2):
            factors.after_update(model, optimizer, step)
            assert torch.equal(layer.A.weight, old)
        factors.after_update(model, optimizer, 3)
        scale = float((x.abs() @ layer.dense().abs().T).max() + before.abs().max())
        assert (layer(x) - before).abs().max() <= 1e-6 * scale
        assert not torch.equal(layer.A.weight, old)
        assert not layer.B.weight.any()
    for p in params:
        assert optimizer.state[p]["step"] == 0
        for name, value in fresh.state[p].items():
            assert value == 0 if name == "step" else torch.equal(value, optimizer.state[p][name])


class _Orthonormal(Factors):
    """Whose A is orthonormal whenever it begins."""

    def _begin(self, name: str, layer: FactoredLinear, step: int) -> None:
        super()._begin(name, layer, step)
        layer.A.weight.copy_(torch.linalg.qr(layer.A.weight)[0])


def test_relora_of_full_rank_merged_at_every_update_is_full_training() -> None:
    """The limit: plain SGD, r = the number of inputs, A orthonormal (AᵀA = 1), B zero. An update of rate η then moves
    B by −η(α/r)GAᵀ, and W₀ by −η(α/r)²G: full training at the rate η(α/r)²."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 16, generator=generator), torch.randn(30, 16, generator=generator)
    goal = torch.randn(30, 24, generator=generator)
    scale = 0.5

    def trained(full: bool) -> Tensor:
        model = nn.ModuleDict({"mlp": nn.Linear(16, 24, bias=False)})
        factors = _Orthonormal(16, alpha=16 * scale, every=1)
        model["mlp"].weight.data.copy_(weight)
        if not full:
            factors.apply(model)
            factors.initialize(model, 0.02)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = RuleOptimizer([{"params": params, "rule": SGD()}], lr=0.1 * (scale**2 if full else 1.0))
        for step in range(1, 21):
            (model["mlp"](x) - goal).square().mean(0).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if not full:
                factors.after_update(model, optimizer, step)
        layer = model["mlp"]
        return layer.dense() if isinstance(layer, FactoredLinear) else layer.weight.detach()

    assert torch.dist(trained(full=True), weight) > 0.5
    torch.testing.assert_close(trained(full=False), trained(full=True), rtol=1e-4, atol=1e-5)


def test_as_drawn_a_factor_is_orthonormal_on_average() -> None:
    """As LoRA's authors draw it, a merged update of SGD is on average the full one × (α/r)² · r/(3 · in)."""
    model = nn.ModuleDict({"mlp": nn.Linear(16, 24)})
    factors = Factors(16, alpha=16.0)
    factors.apply(model)
    layer = model["mlp"]
    assert isinstance(layer, FactoredLinear)
    gram = torch.zeros(16, 16)
    for seed in range(2000):
        with torch.no_grad():
            Factors(16, alpha=16.0, seed=seed)._begin("mlp", layer, 0)
        gram += layer.A.weight.detach().T @ layer.A.weight.detach() / 2000
    torch.testing.assert_close(gram, torch.eye(16) / 3, atol=0.02, rtol=0)


def test_the_rate_rises_again_after_a_merge() -> None:
    plain = Schedule(lr=1.0, steps=100, warmup_steps=10)
    schedule = Schedule(lr=1.0, steps=100, warmup_steps=10, relora_every=30, relora_warmup=5)
    ratio = [schedule.lr_at(step) / plain.lr_at(step) for step in range(100)]
    assert ratio[:30] == [1.0] * 30  # the first warm-up is the run's own
    for merge in (30, 60, 90):
        assert ratio[merge : merge + 5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert ratio[35:60] == [1.0] * 25
    assert Schedule(lr=1.0, steps=100, relora_every=30, relora_warmup=0).lr_at(30) > 0


def test_options_that_mean_nothing_are_refused(tiny_config: str) -> None:
    for method, option in (
        ("adamw", "rank"),
        ("lora", "update_proj_gap"),
        ("lora", "relora_every"),
        ("low_rank", "lora_alpha"),
    ):
        values = {"optim": method, option: 4} if method != "adamw" else {"optim": method, "rank": 4}
        with pytest.raises(InputError, match=f"--{option.replace('_', '-')} 4.* has no meaning for --optim {method}"):
            resolve({"model": tiny_config, "data": "sample"} | values, {})
    with pytest.raises(InputError, match=r"--lora-dropout 1\.0 must be less than 1"):
        config_for(tiny_config, "lora", lora_dropout=1.0)
    config = config_for(tiny_config, "relora", steps=100)
    assert (config.relora_every, config.relora_warmup, config.lora_alpha, config.lora_dropout) == (20, 2, 32.0, 0.05)
    assert factors_of(config_for(tiny_config, "galore_adamw")) is None
    with pytest.raises(ValueError, match="lora is a way to build a model, not an optimizer"):
        build_optimizer(model_of(tiny_config, "adamw", rank=None), "lora", lr=0.1)


def weights(output: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(output / "model").state_dict())


@pytest.mark.parametrize(("method", "mode"), [("relora", "--layerwise"), ("lora_adamw8bit", "--no-layerwise")])
def test_a_run_resumes_bitwise_and_exports_a_dense_model(
    tiny_config: str, tmp_path: Path, method: str, mode: str
) -> None:
    """Dropout, merges, resets and all, in either execution."""
    flags = ["--model", tiny_config, "--optim", method, mode, "--data", "sample", "--dtype", "float32", "--rank", "4"]
    flags += ["--steps", "10", "--total-batch-size", "4", "--batch-size", "2", "--max-length", "32", "--keep", "9"]
    flags += ["--eval-tokens", "500", "--save-every", "4", "--wandb", "disabled", "--lr", "0.01"]
    flags += ["--relora-every", "3"] if method == "relora" else []

    def run(output: Path) -> None:
        result = CliRunner().invoke(cli, [*flags, "--output", str(output)], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    run(tmp_path / "whole")
    part = tmp_path / "part"
    run(part)
    for later in ("step_00000008", "step_00000010"):
        shutil.rmtree(part / "checkpoints" / later)
    (part / "summary.json").unlink()
    run(part)
    whole, resumed = weights(tmp_path / "whole"), weights(part)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = [
        [json.loads(line) for line in (tmp_path / o / "metrics.jsonl").read_text().splitlines()]
        for o in ("whole", "part")
    ]
    for ours, theirs in zip(*lines, strict=True):
        assert {k: ours[k] for k in ("step", "loss", "lr")} == {k: theirs[k] for k in ("step", "loss", "lr")}
    assert lines[0][-1]["loss"] < lines[0][0]["loss"]


def test_what_is_dropped_depends_on_the_row_alone() -> None:
    """Not on the rows that it is computed with; as often as asked, each layer and update anew."""
    x = torch.zeros(4, 50, 33)
    position = TrainingPosition(update=7, row=8)
    dropout = Dropout("q", 0.05, seed=3, position=position)
    drop, probability = dropout.mask(x)
    assert probability == pytest.approx(0.05, abs=1e-5)
    assert drop.float().mean().item() == pytest.approx(0.05, abs=0.01)
    position.row = 10
    assert torch.equal(dropout.mask(x[:1])[0][0], drop[2])
    assert not torch.equal(drop[0], drop[1])
    position.row = 8
    assert not torch.equal(replace(dropout, name="k").mask(x)[0], drop)
    position.update = 8
    assert not torch.equal(dropout.mask(x)[0], drop)
    assert replace(dropout, probability=1 - 1e-9).mask(x)[1] < 1  # what is kept can be scaled
