"""The learning rate as a pure function of how far the run has come: nothing to save, nothing to step twice."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then ``cosine`` or ``linear`` from ``lr`` down to ``min_lr_ratio`` · ``lr``.

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
    min_lr_ratio: float = 0.1
    scheduler: str = "cosine"
    numerics: str = "sound"
    relora_every: int | None = None
    relora_warmup: int | None = None

    def lr_at(self, step: int, tokens_before: int = 0, tokens_in_update: int = 0) -> float:
        """The rate of update ``step`` (0 is the first), ``tokens_before`` real tokens into the run."""
        rate = self._global_rate(step, tokens_before, tokens_in_update)
        if not self.relora_every or not self.relora_warmup or step < self.relora_every:
            return rate
        since = step % self.relora_every + (self.numerics == "sound")
        return rate * min(1.0, since / self.relora_warmup)

    def _global_rate(self, step: int, tokens_before: int, tokens_in_update: int) -> float:
        at_end = self.numerics == "sound"
        done_steps = step + at_end
        done_tokens = tokens_before + at_end * tokens_in_update
        position, length = (done_tokens, self.max_tokens) if self.steps is None else (done_steps, self.steps)
        assert length is not None
        if self.warmup_steps is None:
            warmup = length / 10
        elif self.steps is not None:
            warmup = self.warmup_steps
        else:
            # Tokens that the warm-up will have taken, at the rate of tokens an update so far: exact when it ends.
            warmup = position * self.warmup_steps / done_steps if done_steps else 1.0
        if position < warmup:
            return self.lr * position / warmup
        progress = min(1.0, (position - warmup) / max(length - warmup, 1e-9))
        height = 1.0 - progress if self.scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * height)

    def is_over(self, step: int, tokens_seen: int) -> bool:
        """Whether ``step`` updates and ``tokens_seen`` real tokens complete the run."""
        if self.steps is not None:
            return step >= self.steps
        assert self.max_tokens is not None
        return tokens_seen >= self.max_tokens
