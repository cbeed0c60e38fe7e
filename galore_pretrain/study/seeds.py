"""What the seeds of two methods tell apart: means over them, paired differences, and ranks."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Quantiles of Student's t, two-sided at 95 %, for 1 to 9 degrees of freedom; 2.2 stands for all larger numbers.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_T95_BEYOND = 2.2


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the standard deviation (None of one seed)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of ``values``, of which there is at least one."""
        mean = statistics.mean(values)
        if len(values) == 1:
            return cls(mean, None)
        return cls(mean, statistics.stdev(values))

    def __str__(self) -> str:
        """Return both with four digits, the deviation where it is known."""
        if self.deviation is None:
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ± {self.deviation:.4f}"


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences of losses, in nats, over so many ``pairs``, and its standard error.

    ``error`` is None of one pair.
    """

    mean: float
    error: float | None
    pairs: int

    @property
    def half_width(self) -> float | None:
        """Return half the width of the 95 % interval by Student's t, two-sided; None of one pair."""
        if self.error is None:
            return None
        return self.error * _quantile(self.pairs - 1)

    @property
    def is_told_apart(self) -> bool:
        """Return whether the interval leaves out 0; never of one pair."""
        half_width = self.half_width
        return half_width is not None and abs(self.mean) > half_width

    # A loss is the logarithm of a perplexity, so a small difference of losses is a relative excess in perplexity.
    def __str__(self) -> str:
        """Return the difference in per cent of perplexity, its interval, and a star where that leaves out 0."""
        half_width = self.half_width
        if half_width is None:
            return f"{100 * self.mean:+.1f} %, one seed"
        star = " *" if self.is_told_apart else ""
        return f"{100 * self.mean:+.1f} ± {100 * half_width:.1f} %{star}"


# A seed gives both methods the same first weights and the same text. Most of what it does to a loss is the same for
# both and cancels in the difference, so differences scatter far less over the seeds than losses do. The standard error
# of the mean difference is therefore what two methods are told apart by, not the spread of each. With few seeds the
# quantile matters: a mean of 3 pairs must exceed 4.3 of its standard errors, where a normal distribution would ask
# for 2.
def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Compare the losses of two methods seed by seed, each {seed: loss in nats}; None where they share no seed."""
    differences = []
    for seed, loss in ours.items():
        if seed in theirs:
            differences.append(loss - theirs[seed])
    if not differences:
        return None
    pairs = len(differences)
    mean = statistics.mean(differences)
    if pairs == 1:
        return Difference(mean, None, pairs)
    error = statistics.stdev(differences) / math.sqrt(pairs)
    return Difference(mean, error, pairs)


def _quantile(degrees_of_freedom: int) -> float:
    """Return the number of standard errors that a mean has to exceed."""
    if degrees_of_freedom > len(_T95):
        return _T95_BEYOND
    return _T95[degrees_of_freedom - 1]


# Of three methods the first may be told apart from the third while neither is from the second. So there are no groups
# that all within share: a method's rank counts those that are better beyond doubt, and two that overlap may have
# different ranks where a third one is told apart from one of them alone.
def ranks(losses: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
    """Return each method's rank: 1 + the number of methods that `paired` tells apart from it as better.

    ``losses`` has {seed: loss} by method.
    """
    found = {}
    for name, ours in losses.items():
        better = 0
        for theirs in losses.values():
            difference = paired(ours, theirs)
            if difference is not None and difference.is_told_apart and difference.mean > 0:
                better += 1
        found[name] = 1 + better
    return found
