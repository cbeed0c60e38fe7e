"""The loop itself, with parts that misbehave: losses that are not finite, and what is saved among them."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from galore_pretrain import trainer as module
from galore_pretrain.data import Batch
from galore_pretrain.errors import TrainingFailedError
from galore_pretrain.evaluate import Evaluation
from galore_pretrain.execution import GlobalStep, Layerwise
from galore_pretrain.model import mean_loss
from galore_pretrain.optim import build_optimizer
from galore_pretrain.schedule import Schedule
from galore_pretrain.trainer import MAX_SKIPPED, Trainer, TrainState


class Recorder:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log(self, metrics: Any, step: int) -> None:
        self.lines.append({"step": step, **metrics})

    def close(self) -> None: ...


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for i in range(1000):
        ids = torch.randint(0, 1024, (2, 17), generator=generator)
        yield Batch(input_ids=ids[:, :-1], labels=ids[:, 1:], tokens=32, state={"taken": i})


def build(model: LlamaForCausalLM, steps: int, layerwise: bool) -> tuple[Trainer, Recorder, list[int]]:
    optimizer = build_optimizer(model, "galore_adamw", lr=0.01, rank=4)
    lines, saved, state = Recorder(), [], TrainState()
    trainer = Trainer(
        model=model, batches=batches(), optimizer=optimizer,
        execution=Layerwise(optimizer) if layerwise else GlobalStep(optimizer, 0.0),
        after_update=lambda step: None,
        schedule=Schedule(lr=0.01, steps=steps, warmup_steps=1),
        evaluate=lambda: Evaluation(1.0, 2.7, 2.7, 10), save=lambda: saved.append(state.step),
        loggers=[lines], state=state, batch_size=2, eval_every=1000, save_every=2, mean_of_means=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    return trainer, lines, saved


def break_losses(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    calls = [0]

    def loss(*args: Any) -> Tensor:
        calls[0] += 1
        return mean_loss(*args) * (torch.nan if bad(calls[0]) else 1.0)

    monkeypatch.setattr(module, "mean_loss", loss)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_loss_that_is_not_finite_skips_its_update(
    layerwise: bool, build_tiny: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight moves, training goes on, and no checkpoint is written while updates are being skipped."""
    break_losses(monkeypatch, lambda call: call in (4, 5))
    model = build_tiny()
    trainer, lines, saved = build(model, 8, layerwise)
    weights: list[Tensor] = []
    trainer.loggers = [*trainer.loggers, _Weights(model, weights)]
    assert trainer.fit()
    equal = [torch.equal(a, b) for a, b in pairwise(weights)]
    assert equal == [False, False, True, True, False, False, False]
    assert [line["loss"] == line["loss"] for line in lines.lines] == [True] * 3 + [False] * 2 + [True] * 3
    assert saved == [2, 6, 8]
    assert trainer.state.skipped == 0


class _Weights(Recorder):
    def __init__(self, model: LlamaForCausalLM, kept: list[Tensor]) -> None:
        super().__init__()
        self._model, self._kept = model, kept

    def log(self, metrics: Any, step: int) -> None:
        self._kept.append(torch.cat([p.detach().flatten() for p in self._model.parameters()]).clone())


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_run_stops_after_so_many_in_a_row(
    layerwise: bool, build_tiny: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, lambda call: call > 3 and call != 8)
    trainer, lines, saved = build(build_tiny(), 100, layerwise)
    with pytest.raises(TrainingFailedError, match=f"{MAX_SKIPPED} updates in a row, up to {8 + MAX_SKIPPED}"):
        trainer.fit()
    assert len(lines.lines) == 8 + MAX_SKIPPED - 1
    assert saved == [2, 8]


def test_gradients_that_are_not_finite_are_counted_and_stop_a_run(
    build_tiny: Callable[..., LlamaForCausalLM],
) -> None:
    model = build_tiny()
    trainer, lines, _ = build(model, 100, layerwise=False)
    model.lm_head.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(TrainingFailedError, match="loss or gradient"):
        trainer.fit()
    assert [line["skipped_tensors"] for line in lines.lines] == [1] * (MAX_SKIPPED - 1)
