"""The training loop. It is given its parts ready-made; it knows nothing of optimizers' rules, data sources or wandb."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from galore_pretrain.dist import ALONE, World
from galore_pretrain.errors import InputError, TrainingFailedError
from galore_pretrain.meters import peak_memory_bytes, process_peak_bytes
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.position import TrainingPosition
from galore_pretrain.train.metrics import MetricLogger, Metrics
from galore_pretrain.train.schedule import Schedule

if TYPE_CHECKING:  # for their types alone: the trainer is handed its parts
    from galore_pretrain.optim import Execution, Outcome
    from galore_pretrain.text.batches import Batch

MAX_SKIPPED = 10
"""Skipped updates in a row after which a run stops. Their loss or gradients were not finite, or the loss too large."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class _StopRequested(BaseException):
    """Raised by `Trainer.stop` where no work is lost. Not an Exception: ``except Exception`` must not catch it."""


class Watch(Protocol):
    """A profiler, which the trainer tells what it spends its time on."""

    def span(self, part: str) -> AbstractContextManager[None]:
        """Count the time inside the context as spent on this ``part`` of an update."""
        ...

    def update_done(self) -> str | None:
        """Note that an update is complete; return a text to log, or None."""
        ...

    def close(self) -> str | None:
        """Note that no update will follow; return a text to log, or None."""
        ...


class NoWatch:
    """A watch that does nothing."""

    def span(self, part: str) -> AbstractContextManager[None]:
        """Return a context that measures nothing."""
        return nullcontext()

    def update_done(self) -> str | None:
        """Return no text to log."""
        return None

    def close(self) -> str | None:
        """Return no text to log."""
        return None


class Evaluated(Protocol):
    """The numbers of an evaluation."""

    def metrics(self) -> dict[str, float]:
        """Return the values under their keys in ``metrics.jsonl``."""
        ...


class Checkpoints(Protocol):
    """Writes the state of a run to disk."""

    @property
    def saved_step(self) -> int | None:
        """Return the number of the update after which the newest checkpoint was written; None before the first."""
        ...

    def save(self) -> None:
        """Write the state as it is now, unless that was done already."""
        ...


@dataclass
class TrainState:
    """All that the loop itself has to remember.

    ``step``: updates complete. ``tokens_seen``: their real tokens. ``skipped``: updates skipped in a row, up to now.
    ``data``: the position in the text. ``evaluation``: the last one. ``unlogged``: the numbers of an update whose
    evaluation was due when the run was stopped; None otherwise.
    """

    step: int = 0
    tokens_seen: int = 0
    skipped: int = 0
    data: dict[str, Any] | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    unlogged: Metrics | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values of `state_dict`."""
        vars(self).update(state)


@dataclass(kw_only=True)
class Trainer:
    """Runs updates until the schedule is over; evaluates, logs and saves on the way.

    ``batches`` yields one update's rows at a time; they are run ``batch_size`` sequences at a time. ``evaluate`` is
    called every ``eval_every`` updates, a checkpoint saved every ``save_every``, and both after the last update.
    ``loss`` takes the model, rows, their labels, a divisor, and the places of tokens in their documents where these are
    apart: a loss for each label, summed and divided.
    ``after_update`` is called with the number of each update but the last, and may change the model. ``mean_of_means``
    averages the loss as the published code does. An update whose loss exceeds ``max_loss`` is skipped; ``keep_rows`` is
    called with the number, the rows and the loss of each skipped update. The processes of ``world`` share the rows of
    an update. The trainer writes into ``position``, which the model was built with, which rows a forward pass is of.
    ``peak_tokens_per_second`` of all processes is where the model FLOP utilization is 1; None where it is not known.
    Where it ``evaluates_first``, the model is evaluated before the first update too, and logged as update 0.
    """

    model: Any
    batches: "Iterable[Batch]"
    optimizer: torch.optim.Optimizer
    execution: "Execution"
    schedule: Schedule
    after_update: Callable[[int], None]
    evaluate: "Callable[[], Evaluated]"
    checkpoints: Checkpoints
    keep_rows: "Callable[[int, Batch, float], None]"
    loggers: Sequence[MetricLogger]
    state: TrainState
    batch_size: int
    eval_every: int
    save_every: int
    mean_of_means: bool
    max_loss: float
    device: torch.device
    loss: Callable[[Any, Tensor, Tensor, int, Tensor | None], Tensor] = mean_loss
    world: World = ALONE
    position: TrainingPosition = field(default_factory=TrainingPosition)
    watch: Watch = field(default_factory=NoWatch)
    evaluates_first: bool = False
    peak_tokens_per_second: float | None = None
    stop_signal: int | None = field(default=None, init=False)
    _is_interruptible: bool = field(default=False, init=False)

    def fit(self) -> bool:
        """Train to the end of the schedule, or until `stop` is called; return whether the end was reached."""
        self.model.train()
        try:
            self._run()
        except _StopRequested:
            pass
        except InputError:  # the text came to an end that it should not have
            self.checkpoints.save()
            raise
        finally:
            _log_report(self.watch.close())
        self.checkpoints.save()
        return self._is_over() and self.state.unlogged is None

    def _run(self) -> None:
        """Make updates until the schedule is over or a stop is asked for, and save every ``save_every`` updates."""
        state = self.state
        if self.evaluates_first and state.step == 0 and not state.evaluation:
            self._evaluate_first()
        batches = iter(self.batches)
        save_is_due = False
        while self._has_work():
            self._advance(batches)
            if state.step % self.save_every == 0:
                save_is_due = True
            # A checkpoint among skipped updates would push out the last good one, so it waits for a sound update.
            if save_is_due and not state.skipped:
                with self.watch.span("checkpoint"):
                    self.checkpoints.save()
                save_is_due = False
            _log_report(self.watch.update_done())

    def _evaluate_first(self) -> None:
        """Evaluate the model that the run begins from, and log it as update 0."""
        with self.watch.span("evaluation"):
            metrics: Metrics = {"tokens_seen": 0, **self._interruptibly(self._evaluate)}
        for logger in self.loggers:
            logger.log(metrics, 0)

    def _has_work(self) -> bool:
        """Return whether another update is to be made, or one that is complete is still to be evaluated and logged."""
        if self.state.unlogged is not None:
            return True
        return not (self._is_over() or self._is_asked_to_stop())

    def stop(self, number: int) -> None:
        """Ask for an end, as a signal's handler does: the update in progress is completed and saved, and `fit` returns.

        Neither text that does not come nor an evaluation is waited for; the latter is made when the run is resumed.
        ``number`` is the signal's.
        """
        self.stop_signal = number
        if self._is_interruptible:
            self._is_interruptible = False
            raise _StopRequested

    def _is_asked_to_stop(self) -> bool:
        """Return whether `stop` was called, in this process or another."""
        if self.world.size > 1:
            (number,) = self.world.largest(self.stop_signal or 0)
            self.stop_signal = int(number) or None
        return self.stop_signal is not None

    # An update's numbers are kept in the state until they are logged. A run that is stopped during the evaluation saves
    # them with its checkpoint, and the resumed run begins with that evaluation: its metrics.jsonl has no gap.
    def _advance(self, batches: "Iterator[Batch]") -> None:
        """Make one update, evaluate if that is due, and log both."""
        state = self.state
        if state.unlogged is None:
            state.unlogged = self._timed_step(batches)
        metrics = state.unlogged
        if self._is_over() or state.step % self.eval_every == 0:
            with self.watch.span("evaluation"):
                metrics = metrics | self._interruptibly(self._evaluate)
        with self.watch.span("logging"):
            for logger in self.loggers:
                logger.log(metrics, state.step)
        state.unlogged = None

    def _interruptibly(self, work: Callable[[], T]) -> T:
        """Do ``work`` that a signal may interrupt. With several processes it is done to its end: the others wait."""
        if self.world.size > 1:
            return work()
        self._is_interruptible = True
        try:
            # The signal may have come before `_is_interruptible` was set, when its handler did not raise.
            if self.stop_signal:
                raise _StopRequested
            return work()
        finally:
            self._is_interruptible = False

    # One training step:
    # 1. Count the tokens of the update over all processes. The loss is divided by that count, and the learning rate may
    #    depend on it. The rate is written before the backward pass, in which layerwise updates happen already.
    # 2. Run the micro-batches forward and backward. A loss that is not sound ends the update before its backward pass.
    # 3. Complete the update: layerwise, only what is left of it; otherwise all of it. Or discard its gradients.
    # 4. Read the loss and the outcome. The device is waited for here and nowhere before, when it has all of its work.
    # 5. Move the state on. A skipped update counts as one: its rows are used up, and the schedule moves on.
    def train_step(self, batch: "Batch") -> Metrics:
        """Make one update with the rows of ``batch``; return its numbers under the keys of ``metrics.jsonl``."""
        state = self.state
        tokens, label_tokens = self.world.total(batch.tokens, batch.label_tokens)
        lr = self.schedule.lr_at(state.step, state.tokens_seen, tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        total_loss, goes_on = self._forward_backward(batch, label_tokens)
        outcome = None
        with self.watch.span("optimizer"):
            if goes_on:
                self.execution.complete()
            else:
                self.execution.discard()
            loss = total_loss.item()
            if goes_on:
                outcome = self.execution.outcome()
        self._count_skipped(batch, loss, outcome)
        state.step += 1
        state.tokens_seen += tokens
        self._tell_of_repetition(batch)
        state.data = batch.state
        if not self._is_over():
            self.after_update(state.step)
        metrics: Metrics = {"loss": loss, "lr": lr, "tokens_seen": state.tokens_seen}
        if outcome is None or not self._is_sound(loss):
            return metrics
        if outcome.skipped and self.world.is_main:
            log.warning("update %d: %d gradients were not finite, their tensors skipped", state.step, outcome.skipped)
        return metrics | _outcome_metrics(outcome)

    # Text is read ahead of the run, so only the trainer knows when it trains on the same documents again.
    def _tell_of_repetition(self, batch: "Batch") -> None:
        """Say that an update was the first to train on the text for the second, third, fifth, ninth, … time."""
        before = 0
        if self.state.data is not None:
            before = self.state.data["epoch"]
        epoch = batch.state["epoch"]
        is_power_of_two = epoch & (epoch - 1) == 0
        if epoch > before and is_power_of_two and self.world.is_main:
            log.info("update %d begins pass %d through the text", self.state.step, epoch + 1)

    def _count_skipped(self, batch: "Batch", loss: float, outcome: "Outcome | None") -> None:
        """Count an update whose loss or gradients were not sound as skipped, and keep its rows to be looked at."""
        state = self.state
        loss_is_sound = self._is_sound(loss)
        if loss_is_sound and outcome and not outcome.skipped:
            state.skipped = 0
            return
        state.skipped += 1
        if not loss_is_sound:
            level = logging.WARNING if self.world.is_main else logging.DEBUG
            log.log(level, "the loss of update %d is %s: skipped", state.step + 1, loss)
        self.keep_rows(state.step + 1, batch, loss)

    # The rows of an update are run `batch_size` at a time. The loss of a micro-batch is its sum of cross-entropies,
    # divided by the label tokens of the whole update, over all processes: the gradients add up to those of the update's
    # mean, however its rows are cut. The published code divides by the label tokens of the micro-batch and by the
    # number of micro-batches instead, so a token counts more in a micro-batch of short rows.
    #
    # A loss that is not sound should end the update before its backward pass, in which layerwise updates would already
    # write weights. On a CPU, looking at a loss is free. On a GPU it waits for the device, so without `max_loss` it is
    # not done: a gradient that is not finite is skipped there tensor by tensor, on the device.
    def _forward_backward(self, batch: "Batch", label_tokens: int) -> tuple[Tensor, bool]:
        """Compute the gradients of the mean loss over the update's ``label_tokens``, whatever the micro-batch.

        Returns that loss, a scalar in fp64 on the device, summed over the processes, and whether the update goes on.
        """
        world = self.world
        inputs = batch.input_ids.split(self.batch_size)
        labels = batch.labels.split(self.batch_size)
        all_places: Sequence[Tensor | None] = [None] * len(inputs)
        if batch.places is not None:
            all_places = batch.places.split(self.batch_size)
        first_row = world.rank * len(batch.input_ids)
        looks_at_each = self._looks_at_each()
        local_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        total_loss = local_loss
        for i, (host_ids, host_labels, host_places) in enumerate(zip(inputs, labels, all_places, strict=True)):
            divisor = max(1, label_tokens)
            if self.mean_of_means:
                micro_batches = len(inputs) * world.size
                divisor = max(1, int((host_labels >= 0).sum())) * micro_batches
            self.position.update = self.state.step
            self.position.row = first_row + i * self.batch_size
            with self.watch.span("forward"):
                input_ids = host_ids.to(self.device, non_blocking=True)
                targets = host_labels.to(self.device, non_blocking=True)
                places = None
                if host_places is not None:
                    places = host_places.to(self.device, non_blocking=True)
                loss = self.loss(self.model, input_ids, targets, divisor, places)
                local_loss += loss.detach()
            if looks_at_each:
                total_loss = world.sum(local_loss)
                if not self._is_sound(total_loss.item()):
                    return total_loss, False
            self.execution.begin(i, len(inputs))
            with self.watch.span("backward"):
                loss.backward()
            del loss  # and its graph, before the next one is made
        if not looks_at_each:
            total_loss = world.sum(local_loss)
        return total_loss, True

    def _looks_at_each(self) -> bool:
        """Return whether the loss of each micro-batch is looked at before its backward pass."""
        return self.device.type == "cpu" or math.isfinite(self.max_loss)

    def _is_sound(self, loss: float) -> bool:
        """Return whether a loss is finite and not beyond ``max_loss``."""
        return math.isfinite(loss) and loss <= self.max_loss

    def _timed_step(self, batches: "Iterator[Batch]") -> Metrics:
        """Read the rows of one update, make it, and return its numbers with its speed and the peaks of memory."""
        started = time.perf_counter()
        tokens_before = self.state.tokens_seen
        with self.watch.span("data"):
            batch = self.world.on_every_rank(
                lambda: self._interruptibly(lambda: next(batches)),
                lambda read: read.fingerprint,
            )
        metrics = self.train_step(batch)
        if self.state.skipped >= MAX_SKIPPED:
            raise _too_many_skipped(self.state.step, self.max_loss, self.checkpoints.saved_step)
        seconds = time.perf_counter() - started
        rate = (self.state.tokens_seen - tokens_before) / seconds
        metrics["tokens_per_second"] = rate
        if self.peak_tokens_per_second is not None:
            metrics["mfu"] = rate / self.peak_tokens_per_second
        metrics["peak_memory_bytes"] = peak_memory_bytes(self.device)
        metrics["process_peak_bytes"] = process_peak_bytes()
        return metrics

    def _evaluate(self) -> Metrics:
        """Evaluate the model, and remember the numbers for the run's summary."""
        self.state.evaluation = self.evaluate().metrics()
        return {**self.state.evaluation}

    def _is_over(self) -> bool:
        """Return whether the schedule is complete."""
        return self.schedule.is_over(self.state.step, self.state.tokens_seen)


def _outcome_metrics(outcome: "Outcome") -> Metrics:
    """Return what is logged of an update's outcome: counts only where they are not 0."""
    metrics: Metrics = {}
    if outcome.grad_norm is not None:
        metrics["grad_norm"] = outcome.grad_norm
    if outcome.skipped:
        metrics["skipped_tensors"] = outcome.skipped
    if outcome.failed_refreshes:
        metrics["failed_refreshes"] = outcome.failed_refreshes
    if outcome.refreshes_saved:
        metrics["refreshes_saved"] = outcome.refreshes_saved
    metrics.update(outcome.overlaps)
    return metrics


def _too_many_skipped(step: int, max_loss: float, saved_step: int | None) -> TrainingFailedError:
    """Make the error of a run whose updates up to ``step`` were skipped: what happened, and what helps."""
    bound = ""
    if math.isfinite(max_loss):
        bound = f" or exceeded --max-loss {max_loss:g}"
    advice = "there is no checkpoint yet: begin anew with a lower --lr"
    if saved_step:
        start = f"the checkpoint of update {saved_step} is kept: go on from it"
        advice = f"{start} with --resume-with-changes and a lower --lr"
    return TrainingFailedError(
        f"{MAX_SKIPPED} updates in a row, up to {step}, had a loss or gradient that was not finite{bound}; {advice}"
    )


def _log_report(report: str | None) -> None:
    """Log the text of a watch, if it has one."""
    if report:
        log.info("%s", report)
