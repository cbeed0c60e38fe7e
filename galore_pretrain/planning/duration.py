"""How long a run would take on a card: a range, from the card's peaks in a table and the counted work of an update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from galore_pretrain.config.options import RunConfig
from galore_pretrain.model.architecture import architecture_of_run
from galore_pretrain.planning.cards import Card
from galore_pretrain.planning.work import EVALUATION, PARTS, REFRESH, Work, count_work, peak_tokens_per_second

PRODUCTS, BYTES, LAUNCHES = "products", "bytes", "launches"
_SECONDS_A_DAY = 86_400


class Reached(NamedTuple):
    """Says what a card and its host reach.

    ``products`` and ``bandwidth`` are shares of the card's peaks; ``launch`` the seconds of the host for a launch;
    ``decomposing`` the FLOP/s of QR and SVD, which are bound by latency and so hardly depend on the card.
    """

    products: float
    bandwidth: float
    launch: float
    decomposing: float


# Where the shares are from. Best: on an H200, a product of 8192 × 8192 matrices reached 774 of 989 TFLOP/s, a copy 4.2
# of 4.8 TB/s, and a QR of 4096 × 1024 took 7.6 ms (docs/benchmarks/gpu.md). torchao's pretraining of 1B on a 4090, all
# passes in it, reached 68 % of the peak, and GaLore's 7B there 66 % with recomputation (its issue 3). Worst: 40 % is
# the lower end of what nanochat's training reaches on an H100. A Triton kernel that updates small matrices had 1.5 to
# 2.6 of 4.8 TB/s, and an SVD of 4096 × 4096 took 1.96 s in SCALE's paper.
#
# A launch took 17 µs of one core of a server in an update and 25 in transformers' layers; a desktop of 5 GHz is about
# twice as fast. Of three H200s' hosts it was 13, 33 and 40 to 56 µs on average, of eager code without this package's
# too (docs/benchmarks/gpu.md).
BEST = Reached(products=0.78, bandwidth=0.88, launch=8.5e-6, decomposing=2e12)
WORST = Reached(products=0.40, bandwidth=0.50, launch=45e-6, decomposing=0.75e12)


class Range(NamedTuple):
    """Holds the least and the most that something may be."""

    least: float
    most: float

    def text(self, unit: str) -> str:
        """Return both ends as a person reads them, such as ``0.34 to 0.61 s``."""
        return f"{_number(self.least)} to {_number(self.most)} {unit}"


def predict(config: RunConfig, card: Card, messages: Mapping[str, float], mesh: Any = None) -> "Duration":
    """Count the work of a run's updates, or of a process of ``mesh``, and return how long they take on ``card``.

    ``messages`` are the seconds at least that processes send, by what they are sent through; none of one process.
    """
    peak_rate = peak_tokens_per_second(card, config, architecture_of_run(config))
    return Duration(config, card, count_work(config, mesh), messages, peak_rate)


def _number(value: float) -> str:
    """Write a number with two digits that count, or all digits before the point."""
    if value >= 10:
        return f"{value:,.0f}"
    return f"{value:#.2g}"


# The host and the card work side by side: at best the host is ahead throughout, and the slower of the two decides. At
# worst it has no lead in any part of an update, and the slower decides part by part. Messages are sent beside the work
# at best, and after it at worst.
#
# What a card does in a part: its products take the longer of their arithmetic and of reading and writing their
# matrices; all other operations take the time of their bytes. A refresh's share is that of one update: 1 / T.
@dataclass(frozen=True)
class Duration:
    """Tells how long an update, and a whole run, take on a card: predicted from a table, not measured.

    ``messages``: seconds at least of each link that processes share. ``peak_rate``: tokens/s of all processes at which
    the model's arithmetic alone would be the peak of their cards. Where texts are padded, padding counts as tokens.
    """

    config: RunConfig
    card: Card
    work: Mapping[str, Work]
    messages: Mapping[str, float]
    peak_rate: float

    def needs(self, reached: Reached) -> dict[str, float]:
        """Return the seconds of an update that each resource needs by itself."""
        needs = {PRODUCTS: 0.0, BYTES: 0.0, LAUNCHES: 0.0}
        for part in (*PARTS, REFRESH):
            for resource, seconds in self._of_part(part, reached).items():
                needs[resource] += seconds
        return needs | dict(self.messages)

    def seconds(self) -> Range:
        """Return the seconds of an update."""
        at_best = self.needs(BEST)
        on_card = at_best[PRODUCTS] + at_best[BYTES]
        least = max(on_card, at_best[LAUNCHES], *self.messages.values())
        most = sum(self._slower(part, WORST) for part in (*PARTS, REFRESH)) + sum(self.messages.values())
        return Range(least, most)

    def bound_by(self) -> tuple[str, str]:
        """Return which resource needs most of an update's time, at best and at worst."""
        bounds = []
        for reached in (BEST, WORST):
            needs = self.needs(reached)
            bounds.append(max(needs, key=lambda resource: needs[resource]))
        return bounds[0], bounds[1]

    def updates(self) -> int:
        """Return how many updates the run has."""
        if self.config.steps:
            return self.config.steps
        return math.ceil((self.config.max_tokens or 0) / self._tokens())

    def evaluations(self) -> int:
        """Return how many evaluations the run has: one every so many updates, and one after the last."""
        return math.ceil(self.updates() / self.config.eval_every)

    def evaluation_seconds(self) -> Range:
        """Return the seconds of one evaluation."""
        at_once = self.config.batch_size * self.config.max_length * self.config.processes.total
        micro_batches = math.ceil(self.config.eval_tokens / at_once) * max(1, len(self.config.eval_texts))
        at_best = self._of_part(EVALUATION, BEST)
        least = max(at_best[PRODUCTS] + at_best[BYTES], at_best[LAUNCHES])
        return Range(micro_batches * least, micro_batches * self._slower(EVALUATION, WORST))

    def days(self) -> Range:
        """Return the days of the whole run: its updates and evaluations, not its start, its text or its checkpoints."""
        ends = []
        for update, evaluation in zip(self.seconds(), self.evaluation_seconds(), strict=True):
            seconds = self.updates() * update + self.evaluations() * evaluation
            ends.append(seconds / _SECONDS_A_DAY)
        return Range(*ends)

    def rate(self) -> Range:
        """Return the tokens/s of all processes."""
        seconds = self.seconds()
        return Range(self._tokens() / seconds.most, self._tokens() / seconds.least)

    def mfu(self) -> Range:
        """Return the model FLOP utilization, as a run's metrics tell it."""
        rate = self.rate()
        return Range(rate.least / self.peak_rate, rate.most / self.peak_rate)

    def as_json(self) -> dict[str, Any]:
        """Return the keys that programs may rely on; a range is [least, most]."""
        at_best, at_worst = self.needs(BEST), self.needs(WORST)
        return {
            "card": self.card.name,
            "is_measured": False,
            "seconds_per_update": list(self.seconds()),
            "tokens_per_second": list(self.rate()),
            "mfu": list(self.mfu()),
            "updates": self.updates(),
            "evaluations": self.evaluations(),
            "seconds_per_evaluation": list(self.evaluation_seconds()),
            "days": list(self.days()),
            "bound_by": list(self.bound_by()),
            "seconds_of": {resource: [at_best[resource], at_worst[resource]] for resource in at_best},
            "flops": sum(sum(work.flops.values()) for work in self._of_updates()),
            "bytes": sum(work.product_bytes + work.other_bytes for work in self._of_updates()),
            "launches": sum(work.launches for work in self._of_updates()),
        }

    def table(self) -> str:
        """Return the lines that a person reads."""
        rate, days = self.rate(), self.days()
        bounds = " or ".join(dict.fromkeys(self.bound_by()))
        at_best, at_worst = self.needs(BEST), self.needs(WORST)
        parts = ", ".join(f"{name} {Range(at_best[name], at_worst[name]).text('s')}" for name in at_best)
        length = days.text("days")
        if days.most < 2:
            length = Range(24 * days.least, 24 * days.most).text("hours")
        lines = [
            f"on {self.card.devices[0]}, from a table of cards and the counted work, not measured:",
            f"an update    {self.seconds().text('s')}, bound by {bounds} ({parts})",
            f"speed        {rate.text('tokens/s')}, MFU {self.mfu().text('of the peak')}",
            f"the run      {length}: {self.updates():,} updates, {self.evaluations():,} evaluations of "
            f"{self.evaluation_seconds().text('s')}; without its start, reading and checkpoints",
        ]
        if self.config.compile:
            lines.append("counted without --compile, whose fused passes move fewer bytes by fewer launches")
        return "\n".join(lines)

    def _of_part(self, part: str, reached: Reached) -> dict[str, float]:
        """Return the seconds that a part of an update needs of the card's arithmetic, its memory, and the host."""
        work = self.work[part]
        share = 1.0
        if part == REFRESH:
            share = 1 / (self.config.update_proj_gap or 1)
        arithmetic = sum(flops / (reached.products * self.card.peak(dtype)) for dtype, flops in work.flops.items())
        bandwidth = reached.bandwidth * self.card.bandwidth * 1e9
        products_move = work.product_bytes / bandwidth
        others_move = work.other_bytes / bandwidth
        of_products, of_bytes = arithmetic, others_move
        if products_move > arithmetic:
            of_products, of_bytes = 0.0, others_move + products_move
        of_products += work.decomposing / reached.decomposing
        return {
            PRODUCTS: share * of_products,
            BYTES: share * of_bytes,
            LAUNCHES: share * work.launches * reached.launch,
        }

    def _slower(self, part: str, reached: Reached) -> float:
        """Return the seconds of a part of an update in which host and card each wait for the other at its ends."""
        needs = self._of_part(part, reached)
        return max(needs[PRODUCTS] + needs[BYTES], needs[LAUNCHES])

    def _of_updates(self) -> list[Work]:
        return [self.work[part] for part in PARTS]

    def _tokens(self) -> int:
        return self.config.total_batch_size * self.config.max_length
