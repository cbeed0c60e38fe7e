"""Which combinations of settings a test takes: all with ``FULL=1``, else as few as let each two of them meet."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

FULL = bool(os.environ.get("FULL"))


# A greedy covering array of strength two: each time the combination that lets most pairs meet which have not met yet,
# and of several the one whose pairs have met least often, so that none is repeated beside every value of a long list.
def pairwise(*lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return tuples of one value of each list, so that any two values of two lists are together in one of them.

    Most faults need one setting, or two of them; those that need three are found with ``FULL=1``.
    """
    everything = list(itertools.product(*(range(len(values)) for values in lists)))
    chosen = everything
    if not FULL:
        chosen, met = [], dict.fromkeys(set().union(*map(_pairs, everything)), 0)
        while not all(met.values()):
            best = max(everything, key=lambda numbers: _gain(_pairs(numbers), met))
            chosen.append(best)
            for pair in _pairs(best):
                met[pair] += 1
    return [tuple(values[i] for values, i in zip(lists, numbers, strict=True)) for numbers in sorted(chosen)]


def _gain(pairs: set[Any], met: dict[Any, int]) -> tuple[int, int]:
    """Return (how many of the pairs have not met, minus how often the others have)."""
    times = [met[pair] for pair in pairs]
    return times.count(0), -sum(times)


def _pairs(numbers: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(numbers), 2))
