"""The learning rate as a pure function of how far the run has come: nothing to save, nothing to step twice."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then ``cosine`` or ``linear`` from ``lr`` down to ``min_lr_ratio`` · ``lr``.

    ``wsd`` (warm-up, stable, decay: arXiv 2404.06395) stays at ``lr`` and falls linearly over the last ``decay_steps``
    updates; ``None``: over the last tenth of the run, in its own unit.

    The run ends after ``steps`` updates, or with the update that reaches ``max_tokens`` real tokens: exactly one of the
    two is given. ``warmup_steps`` is in updates; ``None`` warms up over the first tenth of the run, in its own unit.

    After each of ReLoRA's merges, one every ``relora_every`` updates, the rate rises again over ``relora_warmup``
    updates to what it would be.

    ``sound`` numerics ask for the rate at the end of an update, so the first update has a rate and the last one the
    lowest. ``reference`` asks at its beginning, as torch's LambdaLR in the published code: its first rate is 0.
    """

    lr: float
    steps: int | None = None
    max_tokens: int | None = None
    warmup_steps: int | None = None
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1
    scheduler: str = "cosine"
    numerics: str = "sound"
    relora_every: int | None = None
    relora_warmup: int | None = None

    # The rate is that of one long schedule. ReLoRA (Lialin et al., 2023) merges its factors into the weights every
    # `relora_every` updates and begins new ones, whose moments are empty. Adam's first steps with empty moments are
    # large, so the paper restarts warm: after each merge, the long rate is multiplied by a ramp from 0 to 1 over
    # `relora_warmup` updates. Before the first merge, the long schedule's own warm-up does that.
    def lr_at(self, step: int, tokens_before: int = 0, tokens_in_update: int = 0) -> float:
        """Return the rate of update ``step`` (0 is the first), ``tokens_before`` real tokens into the run."""
        steps, tokens = step, tokens_before
        if self._asks_at_the_end:
            steps += 1
            tokens += tokens_in_update
        rate = self._long_rate(steps, tokens)
        if not self.relora_every or not self.relora_warmup or step < self.relora_every:
            return rate
        since_merge = step % self.relora_every
        if self._asks_at_the_end:
            since_merge += 1
        return rate * min(1.0, since_merge / self.relora_warmup)

    @property
    def _asks_at_the_end(self) -> bool:
        """Return whether an update's rate is that of its end, not of its beginning."""
        return self.numerics == "sound"

    def _long_rate(self, steps: int, tokens: int) -> float:
        """Compute the rate after ``steps`` updates and ``tokens`` real tokens, without ReLoRA's restarts."""
        if self.steps is not None:
            position, length = steps, self.steps
        else:
            assert self.max_tokens is not None
            position, length = tokens, self.max_tokens
        warmup = self._in_own_unit(self.warmup_steps, steps, position, length)
        if position < warmup:
            return self.lr * position / warmup
        begin = warmup  # of the decay
        if self.scheduler == "wsd":
            begin = max(warmup, length - self._in_own_unit(self.decay_steps, steps, position, length))
        # Where the warm-up takes the whole run, nothing is left to decay over: 1e-9 keeps the division defined.
        progress = max(0.0, min(1.0, (position - begin) / max(length - begin, 1e-9)))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * self._height(progress))

    def _height(self, progress: float) -> float:
        """Fall from 1 to 0 in the scheduler's shape, as ``progress`` through the decay goes from 0 to 1."""
        if self.scheduler == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0 - progress

    def _in_own_unit(self, updates: int | None, steps: int, position: int, length: int) -> float:
        """Return how long so many ``updates`` are in the run's own unit, updates or tokens; None is a tenth of it."""
        if updates is None:
            return length / 10
        if self.steps is not None:
            return updates
        if steps == 0:
            return 1.0  # any length above 0: the position is 0, and so is the rate
        # Updates hold different numbers of real tokens. The tokens that the warm-up will have taken are estimated from
        # those of an update so far, which is exact when it ends; and those of the decay likewise.
        return position * updates / steps

    # A run by `wsd` that has not begun to decay has had the same rates whatever its length. So it can be branched: gone
    # on with as if it had always had another length.
    def is_stable(self, step: int) -> bool:
        """Return whether ``step`` updates are over the warm-up and before the decay of ``wsd``, in a run by updates."""
        if self.scheduler != "wsd" or self.steps is None:
            return False
        warmup = self._in_own_unit(self.warmup_steps, step, step, self.steps)
        decay = self._in_own_unit(self.decay_steps, step, step, self.steps)
        return warmup <= step <= self.steps - decay

    def is_over(self, step: int, tokens_seen: int) -> bool:
        """Return whether ``step`` updates and ``tokens_seen`` real tokens complete the run."""
        if self.steps is not None:
            return step >= self.steps
        assert self.max_tokens is not None
        return tokens_seen >= self.max_tokens


def schedule_of(values: Mapping[str, Any]) -> Schedule:
    """Return the schedule that a run's values have; a value that an older version did not know is the default."""
    return Schedule(**{f.name: values[f.name] for f in fields(Schedule) if f.name in values})
