"""Hold `plan --time` against what was measured on GPUs, and print a table for docs/benchmarks/plan.md.

    python scripts/check_time.py

The measured figures are those of docs/benchmarks/gpu.md, made before updates had kernels of their own, and GaLore's own
of a 4090. An update took more launches then, of which gpu.md tells the number: it is put in place of what is counted
now. The bytes of those updates are not known, and are taken as they are now. So of the time of kernels alone, that of
more rows is predicted, in which the update has no part.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from galore_pretrain.config.resolve import resolve
from galore_pretrain.planning.cards import card_named
from galore_pretrain.planning.duration import BEST, BYTES, LAUNCHES, PRODUCTS, WORST, Duration, Range, predict
from galore_pretrain.planning.work import UPDATE

_60M = {"model": "llama_60m", "optim": "galore_adamw"}
_7B = {"model": "llama_7b", "optim": "galore_adamw8bit", "rank": 1024, "grad_clip": 0.0}
_7B |= {"layerwise": True, "activation_checkpointing": True}
_FIRST, _SECOND = 4195 - 983, 3970 - 983  # launches of an update of llama_60m, without a forward and a backward pass
_FIRST_7B = 54_280 - 4_703
_SUM = 895  # launches that each further micro-batch of llama_60m took to be added, beside its forward and backward


@dataclass(frozen=True)
class Measured:
    """A figure that was measured: seconds of an update of ``rows`` a micro-batch, from the least to the most.

    ``launches``: of the update itself, by then. With ``fewer`` rows, the seconds are those of kernels, and by how much
    they are more than those of an update of so many rows.
    """

    where: str
    card: str
    values: dict[str, Any]
    rows: int
    seconds: Range
    launches: int | None = None
    micro_batches: int = 1
    fewer: int | None = None


def _rate(rows: int, tokens_per_second: float, micro_batches: int = 1) -> Range:
    seconds = rows * 256 * micro_batches / tokens_per_second
    return Range(seconds, seconds)


def _milliseconds(least: float, most: float | None = None) -> Range:
    return Range(least / 1000, (most or least) / 1000)


FIGURES = [
    Measured("kernels, more rows", "h200", _60M, 64, _milliseconds(25.8, 25.9), fewer=8),
    Measured("kernels, more rows", "h200", _60M, 256, _milliseconds(87.2, 87.3), fewer=64),
    Measured("kernels, more rows", "h200", _60M, 512, _milliseconds(115.0, 115.4), fewer=256),
    Measured("first look", "h200", _60M, 8, _milliseconds(98, 138), _FIRST),
    Measured("first look", "h200", _60M, 64, _milliseconds(118, 129), _FIRST),
    Measured("first look", "h200", _60M, 128, _milliseconds(159), _FIRST),
    Measured("first look", "h200", _60M, 256, _milliseconds(203, 246), _FIRST),
    Measured("first look", "h200", _60M, 512, _milliseconds(384), _FIRST),
    Measured("first look", "h200", _60M, 8, _rate(8, 37_000, 4), _FIRST, 4),
    Measured("first look", "h200", _60M, 64, _rate(64, 173_000, 4), _FIRST, 4),
    Measured("first look", "h200", _60M, 128, _rate(128, 316_000, 4), _FIRST, 4),
    Measured("first look", "h200", _60M, 256, _rate(256, 422_000, 4), _FIRST, 4),
    Measured("second look", "h200", _60M, 8, _milliseconds(47, 55), _SECOND),
    Measured("second look", "h200", _60M, 64, _milliseconds(70, 95), _SECOND),
    Measured("second look", "h200", _60M, 128, _milliseconds(91), _SECOND),
    Measured("second look", "h200", _60M, 256, _milliseconds(149, 152), _SECOND),
    Measured("second look", "h200", _60M, 512, _milliseconds(269), _SECOND),
    Measured("second look", "h200", _60M, 256, _rate(256, 500_000, 4), _SECOND, 4),
    Measured("first look", "h200", _7B, 16, Range(1.13, 1.13), _FIRST_7B),
    Measured("GaLore's README", "4090", _7B, 1, Range(0.37, 0.37)),
]


def predicted(figure: Measured) -> Duration:
    """Predict one figure, with the launches of the update as it was made by then, where they are known."""
    duration = _of_rows(figure, figure.rows)
    if figure.launches is None:
        return duration
    launches = figure.launches + (figure.micro_batches - 1) * _SUM
    update = replace(duration.work[UPDATE], launches=launches)
    return replace(duration, work={**duration.work, UPDATE: update})


def _of_rows(figure: Measured, rows: int) -> Duration:
    """Predict an update of so many rows a micro-batch as it is made now."""
    return _predicted_now(tuple(figure.values.items()), figure.card, rows, figure.micro_batches)


@cache
def _predicted_now(flags: tuple[tuple[str, Any], ...], card: str, rows: int, micro_batches: int) -> Duration:
    values = dict(flags) | {"data": "sample", "device": "cuda", "memory_budget": 80 * 2**30}
    values |= {"batch_size": rows, "total_batch_size": rows * micro_batches}
    config, _ = resolve(values, dict.fromkeys(values, "flag"))
    return predict(config, card_named(card), {})


def _on_card(duration: Duration) -> Range:
    """Return the seconds of an update's kernels."""
    best, worst = duration.needs(BEST), duration.needs(WORST)
    return Range(best[PRODUCTS] + best[BYTES], worst[PRODUCTS] + worst[BYTES])


def main() -> None:
    """Print the table and how many of the figures lie inside of what is predicted."""
    inside = 0
    print(
        "| measured | model | rows | measured, ms | predicted, ms | launches alone, ms | inside | predicted now, ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for figure in FIGURES:
        duration = predicted(figure)
        best, worst = duration.needs(BEST), duration.needs(WORST)
        span = duration.seconds()
        launches = _in_ms(Range(best[LAUNCHES], worst[LAUNCHES]))
        now = "–"
        if figure.launches is not None:
            now = _in_ms(_of_rows(figure, figure.rows).seconds())
        rows = str(figure.rows)
        if figure.micro_batches > 1:
            rows = f"{figure.micro_batches} × {figure.rows}"
        if figure.fewer is not None:
            all_rows, fewer = _on_card(duration), _on_card(_of_rows(figure, figure.fewer))
            span = Range(all_rows.least - fewer.least, all_rows.most - fewer.most)
            rows = f"{figure.rows} less {figure.fewer}"
            launches = "–"
        is_inside = span.least <= figure.seconds.least and figure.seconds.most <= span.most
        inside += is_inside
        verdict = "yes" if is_inside else "no"
        print(
            f"| {figure.where}, {figure.card} | {figure.values['model']} | {rows} | {_in_ms(figure.seconds)} | "
            f"{_in_ms(span)} | {launches} | {verdict} | {now} |"
        )
    print(f"\n{inside} of {len(FIGURES)} inside")


def _in_ms(span: Range) -> str:
    """Write a range of seconds in milliseconds."""
    least, most = f"{1000 * span.least:,.0f}", f"{1000 * span.most:,.0f}"
    return least if least == most else f"{least} to {most}"


if __name__ == "__main__":
    main()
