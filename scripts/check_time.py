"""Hold `plan --time` against what was measured on GPUs, and print a table for docs/benchmarks/plan.md.

    python scripts/check_time.py

The measured figures are those of the last look in docs/benchmarks/gpu.md, and GaLore's own of a 4090. Of kernels alone,
the time of more rows is predicted.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from galore_pretrain.config.resolve import resolve
from galore_pretrain.planning.cards import card_named
from galore_pretrain.planning.duration import BEST, BYTES, LAUNCHES, PRODUCTS, WORST, Duration, Range, predict

_60M = {"model": "llama_60m", "optim": "galore_adamw"}
_7B = {"model": "llama_7b", "optim": "galore_adamw8bit", "rank": 1024, "grad_clip": 0.0}
_7B |= {"layerwise": True, "activation_checkpointing": True}


@dataclass(frozen=True)
class Measured:
    """A figure that was measured: seconds of an update of ``rows`` a micro-batch, from the least to the most.

    With ``fewer`` rows, the seconds are those of kernels, and by how much they are more than those of an update of so
    many rows.
    """

    where: str
    card: str
    values: dict[str, Any]
    rows: int
    seconds: Range
    micro_batches: int = 1
    fewer: int | None = None


def _rate(rows: int, tokens_per_second: float, micro_batches: int = 1) -> Range:
    seconds = rows * 256 * micro_batches / tokens_per_second
    return Range(seconds, seconds)


def _milliseconds(least: float, most: float | None = None) -> Range:
    return Range(least / 1000, (most or least) / 1000)


FIGURES = [
    Measured("kernels, more rows", "h200", _60M, 256, _milliseconds(59.2), fewer=64),
    Measured("fourth look", "h200", _60M, 8, _milliseconds(40.9)),
    Measured("fourth look", "h200", _60M, 64, _milliseconds(48.6)),
    Measured("fourth look", "h200", _60M, 128, _milliseconds(89.7)),
    Measured("fourth look", "h200", _60M, 256, _milliseconds(85.8)),
    Measured("fourth look", "h200", _60M, 8, _rate(8, 61_133, 4), micro_batches=4),
    Measured("fourth look", "h200", _60M, 64, _rate(64, 352_660, 4), micro_batches=4),
    Measured("fourth look", "h200", _60M, 128, _rate(128, 538_017, 4), micro_batches=4),
    Measured("fourth look", "h200", _60M, 256, _rate(256, 779_162, 4), micro_batches=4),
    Measured("GaLore's README", "4090", _7B, 1, Range(0.37, 0.37)),
]


def predicted(figure: Measured, rows: int) -> Duration:
    """Predict an update of a figure's run, with so many rows a micro-batch."""
    return _predicted(tuple(figure.values.items()), figure.card, rows, figure.micro_batches)


@cache
def _predicted(flags: tuple[tuple[str, Any], ...], card: str, rows: int, micro_batches: int) -> Duration:
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
    print("| measured | model | rows | measured, ms | predicted, ms | launches alone, ms | inside |")
    print("|---|---|---|---|---|---|---|")
    for figure in FIGURES:
        duration = predicted(figure, figure.rows)
        best, worst = duration.needs(BEST), duration.needs(WORST)
        span = duration.seconds()
        launches = _in_ms(Range(best[LAUNCHES], worst[LAUNCHES]))
        rows = str(figure.rows)
        if figure.micro_batches > 1:
            rows = f"{figure.micro_batches} × {figure.rows}"
        if figure.fewer is not None:
            all_rows, fewer = _on_card(duration), _on_card(predicted(figure, figure.fewer))
            span = Range(all_rows.least - fewer.least, all_rows.most - fewer.most)
            rows = f"{figure.rows} less {figure.fewer}"
            launches = "–"
        is_inside = span.least <= figure.seconds.least and figure.seconds.most <= span.most
        inside += is_inside
        verdict = "yes" if is_inside else "no"
        print(
            f"| {figure.where}, {figure.card} | {figure.values['model']} | {rows} | {_in_ms(figure.seconds)} | "
            f"{_in_ms(span)} | {launches} | {verdict} |"
        )
    print(f"\n{inside} of {len(FIGURES)} inside")


def _in_ms(span: Range) -> str:
    """Write a range of seconds in milliseconds."""
    least, most = f"{1000 * span.least:,.0f}", f"{1000 * span.most:,.0f}"
    return least if least == most else f"{least} to {most}"


if __name__ == "__main__":
    main()
