"""Finds the largest updates of a run that fit the memory: at once, and in micro-batches whose gradients are summed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from galore_pretrain.config.options import ExecutionSettings, RunConfig
from galore_pretrain.config.resolve import known_norm, with_execution
from galore_pretrain.errors import InputError
from galore_pretrain.model.families import Architecture
from galore_pretrain.planning.choice import lower_bound
from galore_pretrain.planning.layers import measure_by_layers, uncertain_bytes
from galore_pretrain.planning.plan import Outline, Plan, measure

LEAST_ROWS = 16
"""Sequences of an update that a run has to be able to make before it is said to fit a card."""
MOST_ROWS = 512
"""Sequences of a micro-batch beyond which none is looked for: a run chooses no more."""
_A_ROW = 0.98  # of the bytes of one more: what is left of a budget is less than a row


@dataclass(frozen=True)
class Largest:
    """Holds plans that fit a budget, each None where none does.

    ``least`` is of `LEAST_ROWS` at once, ``at_once`` of the largest update in one micro-batch. ``on_device`` and
    ``on_host`` are of updates of any size, in the largest micro-batches whose sums fit. ``at_least`` are bytes that
    the updates of one row take for certain.
    """

    at_least: int
    least: Plan | None = None
    at_once: Plan | None = None
    on_device: Plan | None = None
    on_host: Plan | None = None

    @property
    def fits(self) -> bool:
        """Return whether an update of `LEAST_ROWS` can be made."""
        return any((self.least, self.on_device, self.on_host))

    @property
    def smallest(self) -> Plan | None:
        """Return the plan of the least memory for an update of at least `LEAST_ROWS`."""
        if self.least is not None:
            return self.least
        plans = [plan for plan in (self.on_device, self.on_host) if plan is not None]
        return min(plans, key=lambda plan: plan.peak_bytes, default=None)


@dataclass
class Guide:
    """Remembers by how many bytes a further row raised the peak, of runs with weights alike: a first guess for others.

    Nothing is said to fit by it.
    """

    slopes: dict[tuple[str, str, int], float] = field(default_factory=dict)

    def slope(self, config: RunConfig) -> float | None:
        """Return the bytes of a further row; None where no run of such weights was planned."""
        return self.slopes.get(self._key(config))

    def learn(self, config: RunConfig, slope: float) -> None:
        """Remember the bytes of a further row."""
        self.slopes[self._key(config)] = slope

    @staticmethod
    def _key(config: RunConfig) -> tuple[str, str, int]:
        return (config.weights, config.dtype, config.max_length)


def executed(
    config: RunConfig, total: int, size: int, *, accumulate_on: str = "device", layerwise: bool = True
) -> RunConfig | None:
    """Return the run with updates of ``total`` sequences in micro-batches of ``size``, in the way that takes least.

    What a flag says stays. None where that does not go together.
    """
    if "layerwise" not in config.undecided:
        layerwise = config.layerwise
    checkpointing = config.activation_checkpointing or "activation_checkpointing" in config.undecided
    asked = replace(config, total_batch_size=total, accumulate_on=accumulate_on, undecided=frozenset())
    norm = config.clip_norm
    if "clip_norm" in config.undecided:
        norm = known_norm(asked.values() | {"layerwise": layerwise, "batch_size": size}, config.processes)
    try:
        return with_execution(asked, ExecutionSettings(layerwise, checkpointing, size, norm))
    except InputError:
        return None


def largest_updates(config: RunConfig, budget: int, architecture: Architecture, guide: Guide) -> Largest:
    """Return the largest updates of ``config`` that fit ``budget`` bytes. InputError where it does not fit the model.

    Each plan that is returned fits. ``config`` leaves the micro-batch open, and its ``total_batch_size`` is that of
    the updates that are summed.
    """
    return _Search(config, budget, architecture, guide).largest()


class _Search:
    """Plans updates of one run."""

    def __init__(self, config: RunConfig, budget: int, architecture: Architecture, guide: Guide) -> None:
        self._config, self._budget, self._architecture, self._guide = config, budget, architecture, guide
        self._outline = Outline.of(config, architecture)
        self._plans: dict[int, Plan | None] = {}
        self._peaks: dict[int, int] = {}  # of updates at once, by their rows, whether they fit or not

    def largest(self) -> Largest:
        """Return the largest updates."""
        one_row = executed(self._config, 1, 1)
        if one_row is None:
            raise InputError(f"--optim {self._config.optim}: its updates cannot be made in one micro-batch")
        at_least = self._bound(one_row)
        if at_least > self._budget:
            return Largest(at_least)
        at_once = self._at_once()
        while at_once is not None and not self._is_sure(at_once):
            at_once = self._plan_at_once(at_once.config.batch_size - 1)
        least = None
        if at_once is not None and at_once.config.batch_size >= LEAST_ROWS:
            least = self._plan_at_once(LEAST_ROWS)
        return Largest(
            at_least,
            least=least,
            at_once=at_once,
            on_device=self._in_sums("device", layerwise=True),
            # There, full sums leave more of the device than low-rank ones, which layerwise updates keep on it.
            on_host=self._in_sums("host", layerwise=False),
        )

    # A row more takes the same bytes, but for a place or two where the peak moves. So from a plan that fits, and the
    # bytes of a row, the largest update is guessed and planned; where the guess was wrong, it is made anew between the
    # largest that fits and the smallest that does not.
    def _at_once(self) -> Plan | None:
        """Return the plan of the largest update in one micro-batch."""
        fitting, failing = 0, MOST_ROWS + 1
        rows = LEAST_ROWS
        while True:
            if self._plan_at_once(rows) is None:
                failing = rows
            else:
                fitting = rows
            if failing == fitting + 1:
                return self._plan_at_once(fitting) if fitting else None
            if fitting == 0:
                rows = 1
                continue
            slope = self._slope(fitting, failing)
            left = self._budget - self._peaks[fitting]
            if slope is not None and left < _A_ROW * slope:
                return self._plan_at_once(fitting)
            further = fitting if slope is None else max(1, int(left / slope))
            rows = min(fitting + further, failing - 1)

    def _slope(self, fitting: int, failing: int) -> float | None:
        """Return the bytes of a further row: by two plans about the budget or below it, or else as the guide has it."""
        others = [rows for rows in self._peaks if rows != fitting]
        if not others:
            return self._guide.slope(self._config)
        other = failing if failing in self._peaks else max(others)
        slope = (self._peaks[other] - self._peaks[fitting]) / (other - fitting)
        if min(other, fitting) >= LEAST_ROWS:  # with fewer, the peak may still be the loss's
            self._guide.learn(self._config, slope)
        return slope

    def _plan_at_once(self, rows: int) -> Plan | None:
        """Return the plan of an update of so many rows in one micro-batch; None where it does not fit, or has none."""
        if not rows:
            return None
        if rows in self._plans:
            return self._plans[rows]
        config = executed(self._config, rows, rows)
        plan = self._planned(config)
        if plan is not None:
            self._peaks[rows] = plan.peak_bytes
        fits = plan is not None and plan.fits(self._budget)
        self._plans[rows] = plan if fits else None
        return self._plans[rows]

    def _in_sums(self, place: str, *, layerwise: bool) -> Plan | None:
        """Return the plan with the largest micro-batches whose sums lie at ``place``."""
        if place == "host" and self._config.device == "cpu":
            return None
        total = self._config.total_batch_size
        for size in _sizes(total):
            config = executed(self._config, total, size, accumulate_on=place, layerwise=layerwise)
            plan = self._planned(config, more=self._missed())
            if plan is not None and plan.fits(self._budget) and self._is_sure(plan):
                return plan
        return None

    def _is_sure(self, plan: Plan) -> bool:
        """Return whether a plan of few layers fits for certain: with what it may be wrong by, or by all layers."""
        if plan.peak_bytes + uncertain_bytes(plan.config, self._outline) <= self._budget:
            return True
        if not uncertain_bytes(plan.config, self._outline):
            return plan.fits(self._budget)
        return measure(plan.config, self._architecture, outline=self._outline).fits(self._budget)

    def _missed(self) -> int:
        """Return how much more an update takes than its lower bound, as the least one seen so far did."""
        missed = [
            plan.peak_bytes - self._bound(plan.config)
            for plan in self._plans.values()
            if plan is not None and plan.config.batch_size >= LEAST_ROWS
        ]
        return min(missed, default=0)

    def _planned(self, config: RunConfig | None, more: int = 0) -> Plan | None:
        """Return the plan of ``config``; None where a lower bound and ``more`` bytes say that it does not fit."""
        if config is None or self._bound(config) + more > self._budget:
            return None
        return measure_by_layers(config, self._architecture, self._outline)

    def _bound(self, config: RunConfig) -> int:
        return lower_bound(config, self._architecture, self._outline.static)


def _sizes(total: int) -> Iterator[int]:
    """Yield the powers of two that divide ``total``, but for itself, the largest first."""
    for power in range(int(math.log2(total)), -1, -1):
        size = 2**power
        if total % size == 0 and size < total and size <= MOST_ROWS:
            yield size
