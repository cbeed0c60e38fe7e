"""The loop itself, with parts that misbehave: losses that are not finite, and what is saved among them."""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from galore_pretrain.errors import InputError, TrainingFailedError
from galore_pretrain.model.head import mean_loss
from galore_pretrain.optim import build_optimizer
from galore_pretrain.optim.execution import GlobalStep, Layerwise
from galore_pretrain.text.batches import Batch
from galore_pretrain.train import trainer as module
from galore_pretrain.train.evaluate import Evaluation
from galore_pretrain.train.schedule import Schedule
from galore_pretrain.train.trainer import MAX_SKIPPED, Trainer, TrainState
from runs import MEASURED


class Recorder:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log(self, metrics: Any, step: int) -> None:
        self.lines.append({"step": step, **metrics})

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> bool:
        return True


class Kept:
    """Remembers of which updates checkpoints were asked for, each once."""

    def __init__(self, state: TrainState, steps: list[int]) -> None:
        self.state, self.steps = state, steps

    @property
    def saved_step(self) -> int | None:
        return self.steps[-1] if self.steps else None

    def save(self) -> None:
        if self.saved_step != self.state.step:
            self.steps.append(self.state.step)


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for i in range(1000):
        ids = torch.randint(0, 1024, (2, 17), generator=generator)
        yield Batch(input_ids=ids[:, :-1], labels=ids[:, 1:], tokens=32, state={"taken": i, "epoch": 0})


def current_loss(*args: Any) -> Tensor:
    """What a test has put in the place of the loss."""
    return module.mean_loss(*args)


def build(model: LlamaForCausalLM, steps: int, layerwise: bool) -> tuple[Trainer, Recorder, list[int]]:
    optimizer = build_optimizer(model, "galore_adamw", lr=0.01, rank=4)
    lines, saved, state = Recorder(), [], TrainState()
    trainer = Trainer(
        model=model, batches=batches(), optimizer=optimizer,
        execution=Layerwise(optimizer) if layerwise else GlobalStep(optimizer, 0.0),
        after_update=lambda step: None,
        schedule=Schedule(lr=0.01, steps=steps, warmup_steps=1),
        evaluate=lambda: Evaluation(1.0, 2.7, 2.7, 10), checkpoints=Kept(state, saved),
        keep_rows=lambda step, batch, loss: None, max_loss=math.inf,
        loggers=[lines], state=state, batch_size=2, eval_every=1000, save_every=2, mean_of_means=False,
        device=torch.device("cpu"), loss=current_loss,
    )  # fmt: skip
    return trainer, lines, saved


def test_text_that_comes_again_is_told_when_it_is_trained_on(
    build_tiny: Callable[..., LlamaForCausalLM], caplog: pytest.LogCaptureFixture
) -> None:
    """Not when it is read, which is long before. It is told a few times, however short the text."""
    trainer, _, _ = build(build_tiny(), 12, layerwise=False)
    again = [replace(batch, state={"epoch": i // 2}) for i, batch in enumerate(islice(trainer.batches, 12))]
    trainer.batches = again
    with caplog.at_level("INFO"):
        trainer.fit()
    told = [message for message in caplog.messages if "through the text" in message]
    assert told == [f"update {n} begins pass {t} through the text" for n, t in ((3, 2), (5, 3), (9, 5))]


def break_losses(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    calls = [0]

    def loss(*args: Any) -> Tensor:
        calls[0] += 1
        return mean_loss(*args) * (torch.nan if bad(calls[0]) else 1.0)

    monkeypatch.setattr(module, "mean_loss", loss)


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_loss_that_is_not_finite_skips_its_update(
    layerwise: bool, looks: bool, build_tiny: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight moves, training goes on, and no checkpoint is written while updates are being skipped; also where the
    loss is not looked at before the backward pass, as on a GPU."""
    monkeypatch.setattr(Trainer, "_looks_at_each", lambda self: looks)
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
    assert {s["step"] for s in trainer.optimizer.state.values()} == {
        6 if looks else 8
    }  # tensors that are skipped count


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
    told = rf"{MAX_SKIPPED} updates in a row, up to {8 + MAX_SKIPPED}, .* the checkpoint of update 8 is kept: go on"
    with pytest.raises(TrainingFailedError, match=told):
        trainer.fit()
    assert len(lines.lines) == 8 + MAX_SKIPPED - 1
    assert saved == [2, 8]


def test_gradients_that_are_not_finite_are_counted_and_stop_a_run(
    build_tiny: Callable[..., LlamaForCausalLM],
) -> None:
    model = build_tiny()
    trainer, lines, _ = build(model, 100, layerwise=False)
    model.lm_head.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(TrainingFailedError, match=r"loss or gradient .*; there is no checkpoint yet: begin anew"):
        trainer.fit()
    assert [line["skipped_tensors"] for line in lines.lines] == [1] * (MAX_SKIPPED - 1)


def test_a_loss_beyond_the_guard_is_skipped_and_set_aside(
    build_tiny: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def loss(*args: Any) -> Tensor:
        calls[0] += 1
        return mean_loss(*args) + (100.0 if calls[0] == 4 or calls[0] > 6 else 0.0)

    monkeypatch.setattr(module, "mean_loss", loss)
    trainer, lines, saved = build(build_tiny(), 100, layerwise=True)
    kept: list[tuple[int, Batch, float]] = []
    trainer.max_loss = 50.0
    trainer.keep_rows = lambda *given: kept.append(given)
    with pytest.raises(TrainingFailedError, match="or exceeded --max-loss 50"):
        trainer.fit()
    assert [step for step, _, _ in kept] == [4, *range(7, 7 + MAX_SKIPPED)]
    assert kept[0][1].state == {"taken": 3, "epoch": 0}
    assert kept[0][2] == lines.lines[3]["loss"] > 100
    assert saved == [2, 5, 6]  # that of update 4, which was skipped, after the next


def test_text_that_fails_is_an_error_after_a_checkpoint(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    def failing() -> Iterator[Batch]:
        yield from islice(batches(), 5)
        raise InputError("--data: the hub is gone")

    trainer, lines, saved = build(build_tiny(), 100, layerwise=False)
    trainer.batches = failing()
    with pytest.raises(InputError, match="the hub is gone"):
        trainer.fit()
    assert (len(lines.lines), saved) == (5, [2, 4, 5])


def test_a_signal_ends_the_wait_for_text(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    def waiting() -> Iterator[Batch]:
        yield from islice(batches(), 3)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)
        raise AssertionError("the wait went on")

    trainer, lines, saved = build(build_tiny(), 100, layerwise=False)
    trainer.batches = waiting()
    with handled(trainer):
        assert not trainer.fit()
    assert (trainer.stop_signal, len(lines.lines), saved) == (signal.SIGUSR1, 3, [2, 3])


def test_an_evaluation_that_a_signal_ends_is_made_when_the_run_goes_on(
    build_tiny: Callable[..., LlamaForCausalLM],
) -> None:
    """The lines are those of a run that was never stopped."""
    whole, undisturbed, _ = build(build_tiny(), 8, layerwise=True)
    whole.eval_every = 3
    assert whole.fit()

    model = build_tiny()
    stopped, lines, saved = build(model, 8, layerwise=True)
    stopped.eval_every = 3

    def evaluate() -> Evaluation:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)
        raise AssertionError("the evaluation went on")

    stopped.evaluate = evaluate
    with handled(stopped):
        assert not stopped.fit()
    assert stopped.state.unlogged is not None
    assert (len(lines.lines), saved) == (2, [2, 3])

    again, rest, saved = build(model, 8, layerwise=True)
    again.optimizer, again.execution = stopped.optimizer, stopped.execution
    again.state.load_state_dict(json.loads(json.dumps(stopped.state.state_dict())))
    again.batches, again.eval_every = islice(batches(), 3, None), 3
    assert again.fit()
    both = [{k: v for k, v in line.items() if k not in MEASURED} for line in lines.lines + rest.lines]
    assert both == [{k: v for k, v in line.items() if k not in MEASURED} for line in undisturbed.lines]


@contextlib.contextmanager
def handled(trainer: Trainer) -> Iterator[None]:
    """A signal reaches the trainer."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: trainer.stop(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("how", ["signal", "text"])
def test_a_run_that_ends_among_skipped_updates_is_saved(
    how: str, build_tiny: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before them counts; and a checkpoint that was due then is written after the next sound update."""
    break_losses(monkeypatch, lambda call: call in (4, 5, 9))
    trainer, _, saved = build(build_tiny(), 100, layerwise=False)
    trainer.save_every = 4

    def ending() -> Iterator[Batch]:
        yield from islice(batches(), 9)
        if how == "text":
            raise InputError("--data: the hub is gone")
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)

    trainer.batches = ending()
    with handled(trainer), pytest.raises(InputError) if how == "text" else contextlib.nullcontext():
        assert not trainer.fit()
    assert trainer.state.skipped == 1
    assert saved == [6, 8, 9]
