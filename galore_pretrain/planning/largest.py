"""Finds the largest updates of a run that fit the memory: at once, and in micro-batches whose gradients are summed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from transformers import LlamaConfig

from galore_pretrain.config.options import ExecutionSettings, RunConfig
from galore_pretrain.config.resolve import known_norm, with_execution
from galore_pretrain.errors import InputError
from galore_pretrain.planning.choice import lower_bound
from galore_pretrain.planning.layers import measure_by_layers
from galore_pretrain.planning.plan import Outline, Plan

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


def largest_updates(config: RunConfig, budget: int, architecture: LlamaConfig, guide: Guide) -> Largest:
    """Return the largest updates of ``config`` that fit ``budget`` bytes. InputError where it does not fit the model.

    Each plan that is returned fits. ``config`` leaves the micro-batch open, and its ``total_batch_size`` is that of
    the updates that are summed.
    """
    return _Search(config, budget, architecture, guide).largest()


class _Search:
    """Plans updates of one run."""

    def __init__(self, config: RunConfig, budget: int, architecture: LlamaConfig, guide: Guide) -> None:
        self._config, self._budget, self._architecture, self._guide = config, budget, architecture, guide
        self._outline = Outline.of(config, architecture)
        self._plans: dict[int, Plan | None] = {}

    def largest(self) -> Largest:
        """Return the largest updates."""
        one_row = executed(self._config, 1, 1)
        if one_row is None:
            raise InputError(f"--optim {self._config.optim}: its updates cannot be made in one micro-batch")
        at_least = self._bound(one_row)
        if at_least > self._budget:
            return Largest(at_least)
        at_once = self._at_once()
        return Largest(
            at_least,
            least=self._plan_at_once(LEAST_ROWS),
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
        fitting, failing = 0, 0
        rows = LEAST_ROWS
        if self._plan_at_once(rows) is None:
            failing = rows
            rows = 1
        while True:
            plan = self._plan_at_once(rows)
            if plan is None:
                failing = rows
            else:
                fitting = rows
            slope = self._slope(fitting)
            if fitting == 0 and failing == 1:
                return None
            if failing == fitting + 1 or fitting == MOST_ROWS:
                break
            following = fitting + 1
            best = self._plan_at_once(fitting) if fitting else None
            if best is not None and slope:
                left = self._budget - best.peak_bytes
                if left < _A_ROW * slope:
                    break
                following = fitting + max(1, int(left / slope))
            elif fitting:
                following = 2 * fitting
            rows = min(following, MOST_ROWS)
            if failing:
                rows = min(following, failing - 1)
        return self._plan_at_once(fitting)

    def _slope(self, fitting: int) -> float | None:
        """Return the bytes of a further row, by the two largest updates that fit, or as the guide has it."""
        known = sorted(rows for rows, plan in self._plans.items() if plan is not None and rows <= fitting)
        if len(known) < 2:
            return self._guide.slope(self._config)
        first, second = self._plans[known[-2]], self._plans[known[-1]]
        assert first is not None
        assert second is not None
        slope = (second.peak_bytes - first.peak_bytes) / (known[-1] - known[-2])
        if known[-2] >= LEAST_ROWS:  # with fewer, the peak may still be the loss's
            self._guide.learn(self._config, slope)
        return slope

    def _plan_at_once(self, rows: int) -> Plan | None:
        """Return the plan of an update of so many rows in one micro-batch; None where it does not fit."""
        if rows not in self._plans:
            self._plans[rows] = self._fitting(executed(self._config, rows, rows))
        return self._plans[rows]

    def _in_sums(self, place: str, *, layerwise: bool) -> Plan | None:
        """Return the plan with the largest micro-batches whose sums lie at ``place``."""
        if place == "host" and self._config.device == "cpu":
            return None
        total = self._config.total_batch_size
        for size in _sizes(total):
            plan = self._fitting(
                executed(self._config, total, size, accumulate_on=place, layerwise=layerwise), more=self._missed()
            )
            if plan is not None:
                return plan
        return None

    def _missed(self) -> int:
        """Return how much more an update takes than its lower bound, as the least one seen so far did."""
        missed = [
            plan.peak_bytes - self._bound(plan.config)
            for plan in self._plans.values()
            if plan is not None and plan.config.batch_size >= LEAST_ROWS
        ]
        return min(missed, default=0)

    def _fitting(self, config: RunConfig | None, more: int = 0) -> Plan | None:
        """Return the plan of ``config`` if it fits; it is not made where a lower bound and ``more`` bytes do not."""
        if config is None or self._bound(config) + more > self._budget:
            return None
        plan = measure_by_layers(config, self._architecture, self._outline)
        return plan if plan.fits(self._budget) else None

    def _bound(self, config: RunConfig) -> int:
        return lower_bound(config, self._architecture, self._outline.static)


def _sizes(total: int) -> Iterator[int]:
    """Yield the powers of two that divide ``total``, but for itself, the largest first."""
    for power in range(int(math.log2(total)), -1, -1):
        size = 2**power
        if total % size == 0 and size < total and size <= MOST_ROWS:
            yield size
