"""A rule from a file of one's own works wherever the project's do: nothing in the package knows these."""

import io
import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from galore_pretrain import cli
from galore_pretrain.optim import Direction, GlobalStep, Layerwise, RuleOptimizer, Scope, Step, UpdateRule
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.methods import METHODS
from galore_pretrain.optim.moments import State
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.train.trainer import Trainer
from own_rules import OWN, GaLoreAndRest, NewtonSchulz, RowNorms, SignOfAverage, register
from prescribed import gradients
from runs import command, lines

SHAPES = [(24, 40), (40, 24), (16, 16)]
RULES = [SignOfAverage(), RowNorms(), NewtonSchulz(), GaLoreAndRest()]
NAMES = [type(rule).__name__ for rule in RULES]


def built(rule: UpdateRule, dtype: torch.dtype, **options: Any) -> tuple[RuleOptimizer, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in [*SHAPES, (16,)]]
    groups = [{"params": params[:-1], "rule": rule}, {"params": params[-1:], "rule": Adam()}]
    return RuleOptimizer(groups, lr=0.01, **{"weight_decay": 0.1} | options), params


def updates(mode: Any, optimizer: RuleOptimizer, params: list[Tensor], parts: int, clip: float, count: int) -> None:
    """Updates of so many micro-batches, each by prescribed gradients."""
    execution = mode(optimizer, clip)
    drawn = iter(gradients(params, count * parts))
    for _ in range(count):
        for part in range(parts):
            execution.begin(part, parts)
            torch.autograd.backward(params, [g.to(p.dtype) for g, p in zip(next(drawn), params, strict=True)])
        execution.complete()
        assert execution.outcome().skipped == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("parts", "clip"), [(1, 0.0), (3, 0.0), (1, 0.1), (3, 0.1)])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_layerwise_is_global(rule: UpdateRule, parts: int, clip: float, dtype: torch.dtype) -> None:
    finished = []
    for mode in (GlobalStep, Layerwise):
        optimizer, params = built(rule, dtype)
        before = [p.detach().clone() for p in params]
        updates(mode, optimizer, params, parts, clip, 7)
        assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        finished.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*finished, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_goes_on_bit_for_bit(rule: UpdateRule, dtype: torch.dtype) -> None:
    def step(optimizer: RuleOptimizer, params: list[Tensor], first: int, last: int) -> None:
        for grads in itertools.islice(gradients(params, last), first, last):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.to(dtype)
            optimizer.step()

    whole, params = built(rule, dtype)
    step(whole, params, 0, 8)
    first, others = built(rule, dtype)
    step(first, others, 0, 5)
    torch.save([first.state_dict(), [p.detach() for p in others]], file := io.BytesIO())
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    again, resumed = built(rule, dtype)
    with torch.no_grad():
        for p, weight in zip(resumed, weights, strict=True):
            p.copy_(weight)
    again.load_state_dict(state)
    step(again, resumed, 5, 8)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_gradient_that_is_not_finite_changes_nothing(rule: UpdateRule) -> None:
    optimizer, params = built(rule, torch.bfloat16)
    for i, grads in enumerate(gradients(params, 3)):
        before = [p.detach().clone() for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.to(p.dtype)
        if i == 1:
            params[0].grad[2, 3] = torch.inf  # type: ignore[index]
        optimizer.step()
        assert torch.equal(params[0], before[0]) == (i == 1)
    assert optimizer.read_skips().skipped == 1


def test_a_sum_of_terms_is_subtracted_as_its_terms_are() -> None:
    """Factors, rows and columns included; a row scale alone and a column scale alone count too."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    terms = [
        Direction(draw(6, 2), draw(2, 5), factor=0.5),
        Direction(draw(6, 5), factor=2.0),
        Direction(draw(6, 5), row=draw(6)),
        Direction(draw(6, 5), column=draw(5), factor=-1.0),
        Direction(draw(6, 5), row=draw(6), column=draw(5)),
    ]
    total = terms[0] + terms[1] + terms[2] + terms[3] + terms[4]
    expected = terms[0].left @ terms[0].right * 0.5 + 2 * terms[1].left  # type: ignore[operator]
    expected += terms[2].left * terms[2].row[:, None] - terms[3].left * terms[3].column  # type: ignore[index,operator]
    expected += terms[4].left * terms[4].row[:, None] * terms[4].column  # type: ignore[index,operator]
    assert torch.allclose(total.merged().left, expected, atol=1e-6)
    assert torch.allclose(total.part(2, 5).merged().left, expected[2:5], atol=1e-6)

    @dataclass(frozen=True)
    class Fixed(UpdateRule):
        def init(self, like: Tensor, shard: Shard | None = None) -> State:
            return {}

        def update(self, grad: Tensor, state: State, step: Step) -> Direction:
            return total

    weight = draw(6, 5).requires_grad_()
    wanted = weight.detach() * (1 - 0.1 * 0.2) - 0.1 * expected
    weight.grad = torch.ones(6, 5)
    RuleOptimizer([{"params": [weight], "rule": Fixed()}], lr=0.1, weight_decay=0.2).step()
    assert torch.allclose(weight, wanted, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be added"):
        terms[0] + Direction(draw(6, 5), scaled=True)


@pytest.mark.parametrize("said", [Scope.ELEMENTS, Scope.ROWS, Scope.COLUMNS])
def test_a_promise_that_is_not_kept_is_refused(said: Scope) -> None:
    """Newton–Schulz looks at all of a matrix, whatever it says."""

    @dataclass(frozen=True)
    class Liar(NewtonSchulz):
        @property
        def scope(self) -> Scope:
            return said

    with pytest.raises(ValueError, match=f"Liar says scope {said.name}.*leave scope at WHOLE"):
        RuleOptimizer([{"params": [torch.zeros(4, 4, requires_grad=True)], "rule": Liar()}])


def test_a_state_may_not_take_the_counter_s_name() -> None:
    @dataclass(frozen=True)
    class Counting(SignOfAverage):
        def init(self, like: Tensor, shard: Shard | None = None) -> State:
            return {"step": torch.zeros(())}

        @property
        def scope(self) -> Scope:
            return Scope.WHOLE

    with pytest.raises(ValueError, match="state named step"):
        RuleOptimizer([{"params": [torch.zeros(4, 4, requires_grad=True)], "rule": Counting()}])


def test_what_a_state_does_in_a_new_basis_has_to_be_said() -> None:
    from galore_pretrain.optim import GaLore

    for moments, says in (("keep", True), ("reset", True), ("project", False)):
        rule = GaLore(SignOfAverage(), rank=4, update_proj_gap=2, moments=moments)
        p = torch.randn(12, 20, requires_grad=True)
        optimizer = RuleOptimizer([{"params": [p], "rule": rule}], lr=0.01)
        for i in range(4):
            p.grad = torch.randn(12, 20)
            if says or i < 1:
                optimizer.step()
                continue
            if optimizer.next_due(p, i + 1) == i + 1:
                with pytest.raises(ValueError, match="use moments keep or reset"):
                    optimizer.step()
                break
            optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_the_command_line_takes_it(
    name: str, tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains clipped updates of two micro-batches, layerwise as after backward, is planned, and, killed between two
    checkpoints, goes on bit for bit. In bf16."""
    for other in OWN:
        monkeypatch.delitem(METHODS, other, raising=False)
    register()
    monkeypatch.setattr(logging.getLogger("galore_pretrain"), "handlers", [])

    def flags(output: Path, *more: str) -> list[str]:
        words = command(tiny_config, output, "--optim", name, "--batch-size", "2", "--grad-clip", "0.5", *more)[3:]
        for flag in ("--rank", "--update-proj-gap"):
            del words[(i := words.index(flag)) : i + 2]
        words[words.index("--dtype") + 1] = "bfloat16"
        return words

    def train(output: Path, *more: str) -> None:
        assert cli.cli.main(args=["train", *flags(output, *more)], standalone_mode=False) == 0

    train(tmp_path / "global", "--no-layerwise")
    train(tmp_path / "layerwise", "--layerwise")
    whole = lines(tmp_path / "global")
    assert whole == lines(tmp_path / "layerwise")
    assert len(whole) == 12
    assert whole[-1]["loss"] < whole[0]["loss"]

    class Killed(BaseException):
        pass

    advance = Trainer._advance

    def until_six(self: Trainer, batches: Any) -> None:
        advance(self, batches)
        if self.state.step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", until_six)
        with pytest.raises(Killed):
            train(tmp_path / "killed", "--layerwise")
    train(tmp_path / "killed", "--layerwise")
    assert lines(tmp_path / "killed") == whole
    words = ["plan", *flags(tmp_path / "planned", "--layerwise"), "--json"]
    for flag in ("--output", "--steps", "--save-every", "--eval-every", "--eval-tokens", "--data"):
        if flag in words:
            del words[(i := words.index(flag)) : i + 2]
    plan = json.loads(CliRunner().invoke(cli.cli, words, catch_exceptions=False).stdout)
    summary = json.loads((tmp_path / "global" / "summary.json").read_text())
    assert plan["peak_bytes"] > summary["weights_bytes"]
    assert plan["optimizer_bytes"] == summary["optimizer_bytes"]
