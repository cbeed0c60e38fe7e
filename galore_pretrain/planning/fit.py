"""Fits a run's updates to the memory that they may take, or refuses the run with what helps."""

import logging
from dataclasses import dataclass, replace
from typing import Any

from galore_pretrain.config.options import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.model.architecture import architecture_of_run
from galore_pretrain.optim import method
from galore_pretrain.planning.budget import budget_of, source_of
from galore_pretrain.planning.changes import Change, cheapest_change
from galore_pretrain.planning.choice import Choice, choose, memory_advice
from galore_pretrain.planning.plan import OUTSIDE, Outline, Plan, describe, measure
from galore_pretrain.train.inputs import check_length

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """Holds how a run's updates would be made, their plan, and the change that ``--fit anything`` would make or made.

    ``change`` is None where no change is needed, or none fits. ``plan`` is then of the execution with the least peak.
    """

    plan: Plan
    change: Change | None = None

    @property
    def is_taken(self) -> bool:
        """Return whether the change was made."""
        return bool(self.plan.config.taken)

    def told(self) -> str | None:
        """Return in words what was changed, or what would help; None where the run fits as it is."""
        if self.is_taken and self.change is not None:
            return taken_in_words(self.plan.config)
        if self.change is not None:
            return f"what helps: {self.change.told()} (--fit anything takes it)"
        return None


def planned(config: RunConfig, budget: int, mesh: Any = None) -> Fit:
    """Return the plan of the run that `choose` would choose, and what would make it fit. ``budget`` is in bytes."""
    log.info("planning %s", config.optim)  # which takes tens of seconds for a deep model
    choice = choose(config, budget, mesh)
    plan = choice.plan or measure(choice.config, architecture_of_run(config), mesh)
    if plan.fits(budget):
        return Fit(plan)
    log.info("%s does not fit: looking for a change that does", config.optim)
    change = cheapest_change(config, budget, mesh)
    if change is None or config.fit == "as-asked":
        return Fit(plan, change)
    choice = choose(with_change(config, change), budget, mesh)
    return Fit(choice.plan or measure(choice.config, architecture_of_run(config), mesh), change)


# A plan is arithmetic, and right for a model that has as many positions, be it one that is still to be written.
def warn_of_length(config: RunConfig) -> None:
    """Log a warning where a run would refuse rows of this length."""
    architecture = architecture_of_run(config)
    try:
        check_length(config, architecture)
    except InputError as error:
        log.warning("planned all the same, but a run is refused: %s", error)


def fitted(config: RunConfig, outline: Outline, mesh: Any = None, *, runs_as_before: bool) -> Choice:
    """Return an execution whose updates fit the memory budget, and their plan where one had to be made.

    A run that is resumed and ``runs_as_before`` keeps its execution, which is measured only where a budget is named.
    Where nothing fits, ``--fit anything`` makes the cheapest change that does, and says so. InputError where there is
    none, or as the run was asked for, with the smallest peak that was seen and what helps. ``outline`` is of this
    process's part.
    """
    budget = budget_of(config)
    if not runs_as_before:
        choice = choose(config, budget, mesh, outline)
    elif config.memory_budget is not None or config.accumulate_on == "host":
        choice = Choice(config, measure(config, architecture_of_run(config), mesh, outline=outline))
    else:
        choice = Choice(config, None)
    plan = choice.plan
    if plan is None:
        return choice
    if not plan.fits_host:
        raise InputError(
            f"--accumulate-on host: the sums take {plan.host_bytes:,} bytes of the host's memory "
            f"({describe(plan.config)}), and {plan.host_budget:,} are to be had, {OUTSIDE:,} less than are free; "
            f"what helps: {host_advice(plan.config)}"
        )
    if plan.peak_bytes > budget:
        change = None
        if not runs_as_before:  # a run that goes on keeps what it computes
            log.info("the smallest peak found is %.2f GiB: looking for a change that fits", plan.peak_bytes / 2**30)
            change = cheapest_change(config, budget, mesh)
        if change is None or config.fit == "as-asked":
            raise InputError(_refusal(plan, budget, change, runs_as_before=runs_as_before))
        choice = choose(with_change(config, change), budget, mesh)
        log.warning("%s", taken_in_words(choice.config))
        plan = choice.plan
        if plan is None:
            return choice
    log.info("%s: %.2f of %.2f GiB", describe(choice.config), plan.peak_bytes / 2**30, budget / 2**30)
    return choice


def _refusal(plan: Plan, budget: int, change: Change | None, *, runs_as_before: bool) -> str:
    """Return why a run is refused whose least plan exceeds the budget, and what helps."""
    peak = "peak" if runs_as_before else "smallest peak found"
    helps = f"what helps: {memory_advice(plan.config)}"
    if change is not None:
        helps = Fit(plan, change).told() or helps
    return (
        f"the {peak} is {plan.peak_bytes / 2**30:.2f} GiB "
        f"({describe(plan.config)}), and {budget / 2**30:.2f} GiB are to be had ({source_of(plan.config)}); {helps}"
    )


def with_change(config: RunConfig, change: Change) -> RunConfig:
    """Return the changed run, which remembers what was asked at first and what was taken."""
    taken = {name: (asked, value) for name, asked, value in config.taken}
    for name, value in change.flags.items():
        asked, _ = taken.get(name, (getattr(config, name), value))
        taken[name] = (asked, value)
    return replace(change.config, taken=tuple((name, *values) for name, values in taken.items()))


def taken_in_words(config: RunConfig) -> str:
    """Return what ``--fit anything`` changed of a run."""
    parts = []
    for name, asked, taken in config.taken:
        dashed = name.replace("_", "-")
        parts.append(f"--{dashed} {taken} (asked for: {asked})")
    return f"--fit anything takes {', '.join(parts)}"


def host_advice(config: RunConfig) -> str:
    """Return what would take less of the host's memory than the sums of ``config`` do."""
    ways = []
    if not config.layerwise and method(config.optim).projects:
        ways.append("--layerwise, whose sums are low-rank ones but for a few")
    ways.append("--accumulate-on device")
    return ", ".join(ways)
