"""The training loop. It is handed its parts, built; it knows nothing of optimizers' rules, data sources or wandb."""

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
    from galore_pretrain.optim import Execution
    from galore_pretrain.text.batches import Batch
    from galore_pretrain.train.evaluate import Evaluation

MAX_SKIPPED = 10
"""Updates in a row with a loss that is not finite, or beyond the guard, or such gradients, after which a run stops."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class _StopRequested(BaseException):
    """Raised by `Trainer.stop` where nothing is lost by it. ``except Exception`` must not take it."""


class Watch(Protocol):
    """A profiler is told what the trainer spends its time on."""

    def span(self, part: str) -> AbstractContextManager[None]:
        """Time inside is spent on this ``part`` of an update."""
        ...

    def update_done(self) -> str | None:
        """Called after each update; returns a text to log, or None."""
        ...

    def close(self) -> str | None:
        """Called after the last update, whenever that is; returns a text to log, or None."""
        ...


class NoWatch:
    """A watch that does nothing."""

    def span(self, part: str) -> AbstractContextManager[None]:
        return nullcontext()

    def update_done(self) -> str | None:
        return None

    def close(self) -> str | None:
        return None


class Checkpoints(Protocol):
    """Where the state of a run is kept."""

    @property
    def saved_step(self) -> int | None:
        """The number of the update that the newest checkpoint is of."""
        ...

    def save(self) -> None:
        """Keep the state as it is now, if that is not done."""
        ...


@dataclass
class TrainState:
    """All that the loop itself has to remember: a few integers, the last evaluation, and the numbers of an update whose
    evaluation was due when the run was stopped."""

    step: int = 0
    tokens_seen: int = 0
    skipped: int = 0
    data: dict[str, Any] | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    unlogged: Metrics | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns all of it as plain JSON values."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values of `state_dict`."""
        vars(self).update(state)


@dataclass(kw_only=True)
class Trainer:
    """Runs updates until the schedule is over; evaluates, logs and saves on the way.

    ``batches`` yields one update's rows at a time; they are run ``batch_size`` sequences at a time. ``evaluate`` is
    called, and a checkpoint kept, every so many updates and after the last one. ``after_update`` is called with the
    number of each update but the last, and may change the model. ``mean_of_means`` averages the loss as the published
    code does. ``keep_rows`` is handed the number, the rows and the loss of an update that was skipped, as one is whose
    loss is beyond ``max_loss``. The processes of ``world`` share the rows of an update. ``position``, which the model
    was built with, says before each forward pass what it is of; ``watch`` is told what the time is spent on.
    """

    model: Any
    batches: "Iterable[Batch]"
    optimizer: torch.optim.Optimizer
    execution: "Execution"
    schedule: Schedule
    after_update: Callable[[int], None]
    evaluate: "Callable[[], Evaluation]"
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
    world: World = ALONE
    position: TrainingPosition = field(default_factory=TrainingPosition)
    watch: Watch = field(default_factory=NoWatch)
    stop_signal: int | None = field(default=None, init=False)
    _may_leave: bool = field(default=False, init=False)

    def fit(self) -> bool:
        """Train to the end of the schedule, or until `stop` is called; return whether it is the end."""
        self.model.train()
        try:
            self._run()
        except _StopRequested:
            pass
        except InputError:  # the text came to an end that it should not have
            self.checkpoints.save()
            raise
        finally:
            if said := self.watch.close():
                log.info("%s", said)
        self.checkpoints.save()
        return self._is_over() and self.state.unlogged is None

    def _run(self) -> None:
        state, batches = self.state, iter(self.batches)
        due = False
        while state.unlogged is not None or not (self._is_over() or self._is_asked_to_stop()):
            self._advance(batches)
            due = due or state.step % self.save_every == 0
            if due and not state.skipped:  # a checkpoint among skipped updates would push out the last good one
                with self.watch.span("checkpoint"):
                    self.checkpoints.save()
                due = False
            if said := self.watch.update_done():
                log.info("%s", said)

    def stop(self, number: int) -> None:
        """Ask for an end, as a signal's handler does: the update in progress is completed and saved, and `fit` returns.
        Neither text that does not come nor an evaluation is waited for; the latter is made when the run goes on."""
        self.stop_signal = number
        if self._may_leave:
            self._may_leave = False
            raise _StopRequested

    def _is_asked_to_stop(self) -> bool:
        """Whether `stop` was called, in this process or another."""
        if self.world.size > 1:
            (number,) = self.world.largest(self.stop_signal or 0)
            self.stop_signal = int(number) or None
        return self.stop_signal is not None

    def _advance(self, batches: "Iterator[Batch]") -> None:
        """Make one update, evaluate if that is due, and log both."""
        state = self.state
        if state.unlogged is None:
            state.unlogged = self._timed_step(batches)
        metrics = state.unlogged
        if self._is_over() or state.step % self.eval_every == 0:
            with self.watch.span("evaluation"):
                metrics = metrics | self._leaving(self._evaluate)
        with self.watch.span("logging"):
            for logger in self.loggers:
                logger.log(metrics, state.step)
        state.unlogged = None

    def _leaving(self, work: Callable[[], T]) -> T:
        """Do work that a signal may end in the middle. One of several processes does it to its end: the others wait."""
        if self.world.size > 1:
            return work()
        self._may_leave = True
        try:
            if self.stop_signal:
                raise _StopRequested
            return work()
        finally:
            self._may_leave = False

    def train_step(self, batch: "Batch") -> Metrics:
        """Make one update. Layerwise updates need the learning rate in backward already: it is written before."""
        state = self.state
        tokens, label_tokens = self.world.total(batch.tokens, batch.label_tokens)
        lr = self.schedule.lr_at(state.step, state.tokens_seen, tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        total, goes_on = self._forward_backward(batch, label_tokens)
        with self.watch.span("optimizer"):
            if goes_on:
                self.execution.complete()
            else:
                self.execution.discard()
            loss = total.item()  # here a GPU is waited for: it has got all the work of the update
            outcome = self.execution.outcome() if goes_on else None
        is_sound = self._is_sound(loss)
        state.skipped = 0 if is_sound and outcome and not outcome.skipped else state.skipped + 1
        if not is_sound:
            level = logging.WARNING if self.world.is_main else logging.DEBUG
            log.log(level, "the loss of update %d is %s: skipped", state.step + 1, loss)
        if state.skipped:
            self.keep_rows(state.step + 1, batch, loss)
        state.step += 1
        state.tokens_seen += tokens
        state.data = batch.state
        if not self._is_over():
            self.after_update(state.step)
        metrics: Metrics = {"loss": loss, "lr": lr, "tokens_seen": state.tokens_seen}
        if outcome is None or not is_sound:
            return metrics
        if outcome.skipped and self.world.is_main:
            log.warning("update %d: %d gradients were not finite, their tensors skipped", state.step, outcome.skipped)
        if outcome.grad_norm is not None:
            metrics["grad_norm"] = outcome.grad_norm
        counts = {"skipped_tensors": outcome.skipped, "failed_refreshes": outcome.failed_refreshes}
        return metrics | {name: count for name, count in counts.items() if count}

    def _forward_backward(self, batch: "Batch", label_tokens: int) -> tuple[Tensor, bool]:
        """Compute the gradients of the mean loss over the update's ``label_tokens``, whatever the micro-batch. Returns
        that loss, a scalar in fp64 on the device, and whether the update goes on.

        The published code averages the means of micro-batches instead (``mean_of_means``). A non-finite loss, or one
        beyond ``max_loss``, ends the update before its backward pass. Where looking at a loss would wait for a GPU, and
        there is no bound, that is done when the update is made: what is not finite is skipped tensor by tensor.
        """
        world, first = self.world, self.world.rank * len(batch.input_ids)
        inputs, labels = batch.input_ids.split(self.batch_size), batch.labels.split(self.batch_size)
        total = sum_ = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, (input_ids, targets) in enumerate(zip(inputs, labels, strict=True)):
            parts = len(inputs) * world.size
            divisor = max(1, int((targets >= 0).sum())) * parts if self.mean_of_means else max(1, label_tokens)
            self.position.update, self.position.row = self.state.step, first + i * self.batch_size
            with self.watch.span("forward"):
                ids, wanted = (part.to(self.device, non_blocking=True) for part in (input_ids, targets))
                loss = mean_loss(self.model, ids, wanted, divisor)
                sum_ += loss.detach()
            if self._looks_at_each() and not self._is_sound((total := world.sum(sum_)).item()):
                return total, False
            self.execution.begin(i, len(inputs))
            with self.watch.span("backward"):
                loss.backward()
            del loss  # and its graph, before the next one is made
        return total if self._looks_at_each() else world.sum(sum_), True

    def _looks_at_each(self) -> bool:
        """Whether the loss of each micro-batch is looked at before its backward pass."""
        return self.device.type == "cpu" or math.isfinite(self.max_loss)

    def _is_sound(self, loss: float) -> bool:
        return math.isfinite(loss) and loss <= self.max_loss

    def _timed_step(self, batches: "Iterator[Batch]") -> Metrics:
        started, tokens = time.perf_counter(), self.state.tokens_seen
        with self.watch.span("data"):
            batch = self.world.on_every_rank(
                lambda: self._leaving(lambda: next(batches)), lambda read: read.fingerprint
            )
        metrics = self.train_step(batch)
        if self.state.skipped >= MAX_SKIPPED:
            kept = self.checkpoints.saved_step
            raise TrainingFailedError(
                f"{MAX_SKIPPED} updates in a row, up to {self.state.step}, had a loss or gradient that was not finite"
                f"{'' if math.isinf(self.max_loss) else f' or exceeded --max-loss {self.max_loss:g}'}; "
                + (f"the checkpoint of update {kept} is kept: go on" if kept else "there is no checkpoint yet: begin")
                + (" from it with --resume-with-changes and a lower --lr" if kept else " anew with a lower --lr")
            )
        seconds = time.perf_counter() - started
        metrics["tokens_per_second"] = (self.state.tokens_seen - tokens) / seconds
        metrics |= {"peak_memory_bytes": peak_memory_bytes(self.device), "process_peak_bytes": process_peak_bytes()}
        return metrics

    def _evaluate(self) -> Metrics:
        self.state.evaluation = self.evaluate().metrics()
        return {**self.state.evaluation}

    def _is_over(self) -> bool:
        return self.schedule.is_over(self.state.step, self.state.tokens_seen)
