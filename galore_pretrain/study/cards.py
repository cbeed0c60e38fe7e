"""Which method for a card: one table of all that fit its memory, with what each can do there."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from galore_pretrain.config.options import RunConfig, find_model, model_name
from galore_pretrain.config.resolve import left_out
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import METHODS, is_own
from galore_pretrain.planning.cards import Card
from galore_pretrain.planning.duration import Duration, predict
from galore_pretrain.planning.largest import LEAST_ROWS, MOST_ROWS, Guide, Largest, largest_updates
from galore_pretrain.planning.plan import Plan
from galore_pretrain.study import paper
from galore_pretrain.study.tables import Table

log = logging.getLogger(__name__)

_GIB = 2**30
_SECONDS_A_DAY = 86_400
TOKENS_A_WEIGHT = 20
_MOST_BARS = 10

Resolve = Callable[[Mapping[str, Any]], RunConfig]
"""Returns the config of a row from the flags that make it, beside those that the user gave."""


@dataclass(frozen=True)
class Row:
    """Holds what a method can do on a card, with weights in the run's dtype or in 8 bits."""

    config: RunConfig
    largest: Largest
    duration: Duration | None

    @property
    def name(self) -> str:
        """Return the method's name and rank."""
        rank = f" --rank {self.config.rank}" if self.config.rank else ""
        return f"{self.config.optim}{rank}"

    @property
    def weights(self) -> str:
        """Return how the matrices are held."""
        return "int8" if self.config.weights == "int8" else self.config.dtype

    @property
    def peak_bytes(self) -> int:
        """Return the planned bytes of an update of 16 rows, or the least that an update takes."""
        smallest = self.largest.smallest
        return smallest.peak_bytes if smallest is not None else self.largest.at_least

    def published(self) -> paper.Cell | None:
        """Return the perplexity that was printed of such a run of this model; None where none was."""
        if self.weights == "int8":
            return None
        return paper.cell(self.config.model, self.config.optim, self.config.rank, self.config.steps)

    def as_json(self) -> dict[str, Any]:
        """Return the keys that programs may rely on: bytes, tokens, seconds and days, the latter as [least, most]."""
        largest = self.largest
        cell = self.published()
        answer: dict[str, Any] = {
            "optim": self.config.optim,
            "rank": self.config.rank,
            "weights": self.weights,
            "fits": largest.fits,
            "peak_bytes": self.peak_bytes,
            "tokens_at_once": _tokens(largest.at_once),
            "tokens_a_micro_batch_with_sums_on_device": _tokens(largest.on_device),
            "tokens_a_micro_batch_with_sums_on_host": _tokens(largest.on_host),
            "perplexity": None if cell is None else cell.perplexity,
            "source": None if cell is None else f"{cell.source}, {cell.length}",
        }
        if self.duration is not None:
            answer["tokens_per_update"] = _tokens_of_update(self.duration)
            answer["seconds_per_update"] = list(self.duration.seconds())
            answer["days"] = list(_days(self.duration))
        return answer


def _tokens(plan: Plan | None) -> int | None:
    """Return the tokens of a micro-batch; None of none."""
    return None if plan is None else plan.config.batch_size * plan.config.max_length


def _tokens_of_update(duration: Duration) -> int:
    return duration.config.total_batch_size * duration.config.max_length


def _days(duration: Duration) -> tuple[float, float]:
    """Return the days, at least and at most, in which updates alone see `TOKENS_A_WEIGHT` tokens for each weight."""
    tokens = TOKENS_A_WEIGHT * _weights(duration.config.model)
    updates = tokens / _tokens_of_update(duration)
    seconds = duration.seconds()
    return updates * seconds.least / _SECONDS_A_DAY, updates * seconds.most / _SECONDS_A_DAY


def _weights(model: str) -> int:
    """Return how many weights a model has as it is trained in full."""
    shape = json.loads(find_model(model).read_text())
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"]
    shared_heads = shape.get("num_key_value_heads") or heads
    head = shape.get("head_dim") or hidden // heads
    layer = 2 * hidden * head * (heads + shared_heads) + 3 * hidden * inner + 2 * hidden
    ends = 1 if shape.get("tie_word_embeddings") else 2
    return int(layers * layer + ends * shape["vocab_size"] * hidden + hidden)


def variants(given_weights: str | None) -> Iterator[dict[str, Any]]:
    """Yield the flags of each row: every method as its recipe has it, and with weights in 8 bits where that has none.

    ``given_weights`` is ``--weights``, which decides where it is given.
    """
    for name in METHODS:
        if is_own(name):
            continue
        unused = left_out(name)
        in_recipe = any(recipe.values.get("weights") == "int8" for recipe in METHODS[name].recipes)
        yield {"optim": name, **unused}
        if given_weights is None and not in_recipe and "weights" not in unused:
            yield {"optim": name, **unused, "weights": "int8"}


def rows_that_fit(
    flags_of_rows: Sequence[Mapping[str, Any]], resolve: Resolve, budget: int, card: Card | None
) -> tuple[list[Row], list[str]]:
    """Plan all rows; return them, those that fit first and by their bytes, and why others cannot be planned.

    ``budget`` is in bytes. Their times are of ``card``, where one is given.
    """
    guide = Guide()
    rows, refused = [], []
    for number, flags in enumerate(flags_of_rows, 1):
        name = f"{flags['optim']} --weights int8" if flags.get("weights") == "int8" else flags["optim"]
        log.info("planning %s (%d of %d)", name, number, len(flags_of_rows))
        try:
            config = resolve(flags)
            largest = largest_updates(config, budget, load_model_config(config.model), guide)
        except InputError as error:
            refused.append(f"{name}: {error}")
            continue
        rows.append(Row(config, largest, _duration(largest, card)))
    rows.sort(key=lambda row: (not row.largest.fits, row.peak_bytes))
    return rows, refused


def _duration(largest: Largest, card: Card | None) -> Duration | None:
    """Return how long the update takes that a user would make: with sums on the device, or else the largest at once.

    No table knows the bus over which sums on the host are moved.
    """
    plan = largest.on_device or largest.at_once
    if card is None or plan is None or not largest.fits:
        return None
    return predict(plan.config, card, {})


def report(rows: Sequence[Row], refused: Sequence[str], budget: int, source: str, card: Card | None) -> str:
    """Return the table in Markdown, and below it what does not fit."""
    first = rows[0].config
    length = first.max_length
    columns = ["`--optim`", "weights", "GiB", "at once", "sums on the device", "sums on the host"]
    if card is not None:
        columns += [f"an update on {card.name}", f"days to {TOKENS_A_WEIGHT} tokens a weight"]
    columns.append("published perplexity")
    fitting = [row for row in rows if row.largest.fits]
    table = Table(columns, [_cells(row, card) for row in fitting])
    lines = [
        f"{model_name(first.model)} in {budget / _GIB:.2f} GiB ({source})",
        "",
        table.markdown() if fitting else f"Nothing makes an update of {LEAST_ROWS} × {length} tokens there.",
        "",
        f"GiB: planned for an update of {LEAST_ROWS} × {length} tokens, at once or, where only those fit, with sums.",
        f"At once: the largest update in one micro-batch. Sums: updates of {first.total_batch_size} × {length}, or any",
        "other size, in micro-batches of so much.",
    ]
    if card is not None:
        lines.append("Times: of updates with sums on the device, or else of the largest at once; not measured.")
    clipping = [row.config.optim for row in rows if row.config.grad_clip]
    if clipping:
        lines.append(
            "Clipped, for which gradients wait until their norm is known (--grad-clip 0 is off): "
            f"{', '.join(dict.fromkeys(clipping))}."
        )
    others = [row for row in rows if not row.largest.fits]
    if others:
        lines.append(f"No update of {LEAST_ROWS} × {length} tokens fits of: {', '.join(map(_why_not, others))}.")
    lines += refused
    return "\n".join(lines)


def _why_not(row: Row) -> str:
    name = f"{row.name} ({row.weights}): "
    if row.largest.at_once is not None:
        return f"{name}{row.largest.at_once.config.batch_size} × {row.config.max_length} at most"
    return f"{name}over {row.largest.at_least / _GIB:.1f} GiB"


def _cells(row: Row, card: Card | None) -> list[str]:
    """Return a row of the table."""
    largest = row.largest
    cells = [f"`{row.name}`", row.weights, f"{row.peak_bytes / _GIB:.2f}"]
    cells += [_size(plan) for plan in (largest.at_once, largest.on_device, largest.on_host)]
    if card is not None:
        cells += _times(row.duration)
    cell = row.published()
    cells.append("" if cell is None else f"{cell.perplexity:.2f} ({cell.source}, {cell.length})")
    return cells


def _size(plan: Plan | None) -> str:
    """Return the size of a micro-batch, the largest that fits."""
    if plan is None:
        return "–"
    size = f"{plan.config.batch_size} × {plan.config.max_length}"
    return f"{size} or more" if plan.config.batch_size == MOST_ROWS else size


def _times(duration: Duration | None) -> list[str]:
    """Return the cells of an update's seconds and of the days."""
    if duration is None:
        return ["–", "–"]
    least, most = _days(duration)
    size = f"{duration.config.total_batch_size} × {duration.config.max_length}"
    return [f"{duration.seconds().text('s')} ({size})", f"{least:,.3g} to {most:,.3g}"]


def bars(rows: Sequence[Row]) -> dict[str, Mapping[str, int]]:
    """Return what a picture of the rows that fit shows: bytes by kind, of at most ten methods.

    They are taken evenly from the least to the most, and of a method that fits with both kinds of weights the smaller.
    """
    smallest: dict[str, Row] = {}
    for row in rows:
        if row.largest.least is not None:
            smallest.setdefault(row.config.optim, row)
    chosen = list(smallest.values())
    if len(chosen) > _MOST_BARS:
        step = (len(chosen) - 1) / (_MOST_BARS - 1)
        chosen = [chosen[round(number * step)] for number in range(_MOST_BARS)]
    shown: dict[str, Mapping[str, int]] = {}
    for row in chosen:
        assert row.largest.least is not None
        shown[f"{row.name}\n{row.weights} weights"] = row.largest.least.parts
    return shown
