"""Fits a run's updates to the memory that they may take, or refuses the run with what helps."""

import logging
from typing import Any

from galore_pretrain.config.options import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import method
from galore_pretrain.planning.budget import budget_of, source_of
from galore_pretrain.planning.choice import Choice, choose, memory_advice
from galore_pretrain.planning.plan import OUTSIDE, Outline, Plan, describe, measure

log = logging.getLogger(__name__)


def planned(config: RunConfig, budget: int, mesh: Any = None) -> Plan:
    """Return the plan of the run that `choose` would choose. ``budget`` is in bytes."""
    choice = choose(config, budget, mesh)
    return choice.plan or measure(choice.config, load_model_config(config.model), mesh)


def fitted(config: RunConfig, outline: Outline, mesh: Any = None, *, runs_as_before: bool) -> Choice:
    """Return an execution whose updates fit the memory budget, and their plan where one had to be made.

    A run that is resumed and ``runs_as_before`` keeps its execution, which is measured only where a budget is named.
    InputError where nothing fits, with the smallest peak that was seen and what helps. ``outline`` is of this process's
    part.
    """
    budget = budget_of(config)
    if not runs_as_before:
        choice = choose(config, budget, mesh, outline)
    elif config.memory_budget is not None or config.accumulate_on == "host":
        choice = Choice(config, measure(config, load_model_config(config.model), mesh, outline=outline))
    else:
        choice = Choice(config, None)
    plan = choice.plan
    if plan is None:
        return choice
    if not plan.fits_host:
        raise InputError(
            f"--accumulate-on host: the sums take {plan.host_bytes:,} bytes of the host's memory "
            f"({describe(plan.config)}), and {plan.host_budget:,} are to be had, {OUTSIDE:,} less than are free; "
            f"what helps: {_host_advice(plan.config)}"
        )
    if plan.peak_bytes > budget:
        peak = "peak" if runs_as_before else "smallest peak found"
        raise InputError(
            f"the {peak} is {plan.peak_bytes / 2**30:.2f} GiB "
            f"({describe(plan.config)}), and {budget / 2**30:.2f} GiB are to be had ({source_of(config)}); "
            f"what helps: {memory_advice(plan.config)}"
        )
    log.info("%s: %.2f of %.2f GiB", describe(choice.config), plan.peak_bytes / 2**30, budget / 2**30)
    return choice


def _host_advice(config: RunConfig) -> str:
    """Return what would take less of the host's memory than the sums of ``config`` do."""
    ways = []
    if not config.layerwise and method(config.optim).projects:
        ways.append("--layerwise, whose sums are low-rank ones but for a few")
    ways.append("--accumulate-on device")
    return ", ".join(ways)
