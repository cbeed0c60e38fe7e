"""Finds the change of a run's settings by which its updates fit the memory, the cheapest for what the run computes."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.resolve import known_norm, micro_batch_sizes, with_execution
from galore_pretrain.errors import InputError
from galore_pretrain.model.architecture import architecture_of_run
from galore_pretrain.model.families import Architecture
from galore_pretrain.optim import method
from galore_pretrain.planning.choice import candidates, lower_bound
from galore_pretrain.planning.layers import measure_by_layers
from galore_pretrain.planning.plan import Outline, Plan, is_on_gpu, measure

Flags = Mapping[str, Any]
"""Values of flags, by their names."""

_OF_RANK = (3 / 4, 1 / 2, 1 / 4, 1 / 8)


@dataclass(frozen=True)
class Change:
    """Says which flags a run would have to have, the ``config`` that has them, and the plan of its least execution."""

    flags: Flags
    config: RunConfig
    plan: Plan

    def words(self) -> str:
        """Return the flags as they are typed."""
        parts = []
        for name, value in self.flags.items():
            dashed = name.replace("_", "-")
            parts.append(f"--{dashed}" if value is True else f"--{dashed} {value}")
        return " ".join(parts)

    def told(self) -> str:
        """Return the flags, and what an update takes with them."""
        text = f"{self.words()}: {self.plan.peak_bytes / 2**30:.2f} GiB planned"
        if self.plan.host_bytes:
            text += f", and {self.plan.host_bytes / 2**30:.2f} of the host's memory"
        return text

    def as_json(self) -> dict[str, Any]:
        """Return the keys that programs may rely on."""
        return {"flags": dict(self.flags), "peak_bytes": self.plan.peak_bytes, "host_bytes": self.plan.host_bytes}


# What a change costs the one who makes the run is known beforehand: what only takes longer comes first, then what
# rounds otherwise, then fewer numbers of state, then other updates. So the first that fits is the cheapest. Where a
# family of changes does not fit at its farthest, as a rank of an eighth, none of it does, and none is planned.
def cheapest_change(config: RunConfig, budget: int, mesh: Any = None) -> Change | None:
    """Return the first change, or else the first two, with which the updates of ``config`` fit ``budget`` bytes.

    None where no two of them do. The plan of what is returned is made of all layers, and fits.
    """
    search = _Search(budget, architecture_of_run(config), mesh)
    families = [family for family in _families(config) if family]
    for count in (1, 2):
        chosen = sorted(itertools.combinations(range(len(families)), count), key=lambda numbers: numbers[::-1])
        for numbers in chosen:
            change = search.first_that_fits(config, [families[number] for number in numbers])
            if change is not None:
                return change
    return None


def _families(config: RunConfig) -> Iterator[list[Flags]]:
    """Yield changes that are alternatives of each other, each family from the mildest on; the cheapest family first."""
    entry = method(config.optim)
    asked = {"layerwise", "activation_checkpointing", "batch_size"} - config.undecided
    if "layerwise" in asked and not config.layerwise:
        yield [{"layerwise": True}]
    if "activation_checkpointing" in asked and not config.activation_checkpointing:
        yield [{"activation_checkpointing": True}]
    if "batch_size" in asked and config.numerics == "sound":  # the published code's loss depends on the micro-batch
        yield [{"batch_size": size} for size in _halves(config.batch_size)]
    sums_can_move = is_on_gpu(config) and config.accumulate_on == "device" and config.processes.total == 1
    if sums_can_move and config.total_batch_size > 1:
        yield [{"accumulate_on": "host"}]
    if "moment_store" in entry.options and not entry.keeps_8bit(config.moment_store):
        yield [{"moment_store": "8bit"}]
    if "bases" in entry.options:
        smaller = {"dense": ("int8", "int4"), "int8": ("int4",)}
        yield [{"bases": store} for store in smaller.get(config.bases or "dense", ())]
    if config.weights == "dense":
        yield [{"weights": "int8"}]
    if config.rank:
        ranks = [int(config.rank * share) for share in _OF_RANK]
        yield [{"rank": rank} for rank in dict.fromkeys(ranks) if rank]
    yield [{"total_batch_size": total} for total in _totals(config)]


def _halves(number: int) -> list[int]:
    """Return a number's half, the half of that, and so on, as far as they are whole, and 1."""
    halves = []
    while number % 2 == 0:
        number //= 2
        halves.append(number)
    if number > 1:
        halves.append(1)
    return halves


def _totals(config: RunConfig) -> list[int]:
    """Return smaller updates, in sequences; one micro-batch an update keeps no sums."""
    processes = config.processes.total
    least = processes
    if "batch_size" not in config.undecided:
        least *= config.batch_size
    return [total * least for total in _halves(config.total_batch_size // least)]


def changed(config: RunConfig, flags: Flags) -> RunConfig | None:
    """Return ``config`` with other values of some flags; None where they do not go with the rest.

    What was undecided still is, but for these flags.
    """
    asked = replace(config, **flags, undecided=config.undecided - flags.keys())
    if "batch_size" in asked.undecided:
        sizes = micro_batch_sizes(asked.total_batch_size, asked.processes)
        asked = replace(asked, batch_size=max(sizes, default=1))
    if "clip_norm" in asked.undecided:
        asked = replace(asked, clip_norm=known_norm(asked.values(), asked.processes))
    try:
        return with_execution(asked, asked.execution)
    except InputError:
        return None


def least_executions(config: RunConfig) -> list[RunConfig]:
    """Return the executions of ``config`` one of which takes the least memory.

    They checkpoint activations, and make micro-batches of the fewest rows or of all of an update. Whether they are
    layerwise decides only where sums lie on the host.
    """
    ways = candidates(config)
    saving = [way for way in ways if way.activation_checkpointing] or ways
    if config.accumulate_on == "device":
        saving = [way for way in saving if way.layerwise] or saving
    sizes = {way.batch_size for way in saving}
    return [way for way in saving if way.batch_size in (min(sizes), max(sizes))]


class _Search:
    """Plans changed runs, each outline and each least plan once."""

    def __init__(self, budget: int, architecture: Architecture, mesh: Any) -> None:
        self._budget, self._architecture, self._mesh = budget, architecture, mesh
        self._outlines: dict[tuple[Any, ...], Outline] = {}
        self._plans: dict[tuple[tuple[str, Any], ...], Plan | None] = {}

    def first_that_fits(self, config: RunConfig, families: Sequence[Sequence[Flags]]) -> Change | None:
        """Return the mildest combination of one change of each family that fits; None where the farthest does not."""
        if self._fits(config, [family[-1] for family in families]) is None:
            return None
        for combination in itertools.product(*families):
            change = self._fits(config, combination)
            if change is None:
                continue
            outline = self._outline(change.config)
            plan = measure(change.plan.config, self._architecture, self._mesh, outline=outline)
            if plan.fits(self._budget):
                return replace(change, plan=plan)
        return None

    def _fits(self, config: RunConfig, combination: Sequence[Flags]) -> Change | None:
        """Return the change of a combination if it fits by a quick plan."""
        flags: dict[str, Any] = {}
        for more in combination:
            flags |= more
        key = tuple(flags.items())
        asked = changed(config, flags)
        if asked is None:
            return None
        if key not in self._plans:
            self._plans[key] = self._least_plan(asked)
        plan = self._plans[key]
        if plan is None:
            return None
        return Change(flags, asked, plan)

    def _least_plan(self, config: RunConfig) -> Plan | None:
        """Return the least quick plan among those executions of ``config`` that fit; None where none does."""
        try:
            outline = self._outline(config)
        except InputError:  # such as a group of weights that no matrix can be cut into
            return None
        fitting = []
        for way in least_executions(config):
            if lower_bound(way, self._architecture, outline.static) > self._budget:
                continue
            plan = self._measured(way, outline)
            if plan.fits(self._budget):
                fitting.append(plan)
        return min(fitting, key=lambda plan: plan.peak_bytes, default=None)

    def _measured(self, config: RunConfig, outline: Outline) -> Plan:
        if self._mesh is not None:
            return measure(config, self._architecture, self._mesh, outline=outline)
        return measure_by_layers(config, self._architecture, outline)

    def _outline(self, config: RunConfig) -> Outline:
        """Return the outline of a run, which its execution and the size of its updates do not change."""
        free = {*asdict(config.execution), "total_batch_size", "accumulate_on"}
        key = tuple((name, value) for name, value in config.values().items() if name not in free)
        if key not in self._outlines:
            self._outlines[key] = Outline.of(config, self._architecture, self._mesh)
        return self._outlines[key]
