"""Pictures of runs and plans. The only place that draws.

Colours are Okabe and Ito's, which colour-blind readers tell apart; a method has the same one in every picture.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, product
from pathlib import Path
from typing import Any

from galore_pretrain.optim import METHODS
from galore_pretrain.study.results import FROZEN, Comparison, Result, final_loss, finished, over_seeds

_PALETTE = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")
_CONTROL = "#999999"
_STROKES = ("-", "--", ":", "-.")

# The parts of a peak, from left to right in a bar, and their colours.
_KINDS = {
    "weights": "#0072B2",
    "moments": "#E69F00",
    "bases": "#F0E442",
    "gradients": "#D55E00",
    "sums": "#CC79A7",
    "activations": "#009E73",
    "temporaries": "#999999",
}

_GIB = 2**30
_MIB = 2**20


def draw_memory(path: Path, title: str, bars: Mapping[str, Mapping[str, int]], budgets: Mapping[str, int]) -> None:
    """Draw stacked bars of bytes: for each name, what its peak is made of. Lines mark ``budgets``, in bytes by name."""
    names = list(bars)
    line_breaks = max(name.count("\n") for name in names)
    height_of_a_bar = 0.5 + 0.16 * line_breaks
    figure = _figure(8, 1.6 + height_of_a_bar * len(names))
    axes = figure.subplots()

    totals = [0.0] * len(names)
    for kind, colour in _KINDS.items():
        sizes = [bars[name][kind] / _GIB for name in names]
        if any(sizes):
            axes.barh(
                names,
                sizes,
                left=totals,
                color=colour,
                label=kind,
                edgecolor="white",
                linewidth=0.5,
            )
        totals = list(map(sum, zip(totals, sizes, strict=True)))
    # The bars that were drawn last end where the whole stacks do. The white box keeps a total readable over the budget.
    axes.bar_label(
        axes.containers[-1],
        labels=[f"{total:.2f}" for total in totals],
        padding=4,
        zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )

    # A budget far beyond all bars would squeeze them into a corner: it is left out.
    seen = {name: budget / _GIB for name, budget in budgets.items() if budget / _GIB < 1.6 * max(totals)}
    for number, (name, budget) in enumerate(sorted(seen.items(), key=lambda item: item[1])):
        _mark_budget(axes, f"{name}: {budget:.2f}", budget, number % 2)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_title(title, pad=16 if len(seen) < 2 else 28)
    axes.set_xlabel("peak memory of an update, GiB")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def _mark_budget(axes: Any, label: str, budget: float, line: int) -> None:
    """Draw a broken line at the budget, in GiB, with a label above the axes, in the first line there or the second."""
    axes.axvline(budget, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        label,
        xy=(budget, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2 + 12 * line),
        textcoords="offset points",
        fontsize=9,
        ha="center",
        va="bottom",
    )


@dataclass(frozen=True)
class Style:
    """The look of a method's lines: colour, and matplotlib's sign for the strokes."""

    colour: str
    strokes: str = "-"


def styles_of(labels: Sequence[str]) -> dict[str, Style]:
    """Return a style for each label: a method's own, or one that is left over."""
    # A method of the table has its own colour, its 8-bit form the same in broken strokes. Labels that name flags as
    # well ("galore_adamw, lr 0.005") are in no table. They share out the colours that are not taken, first in whole
    # lines, then in three kinds of broken ones, then what is left of all colours, then from the start again.
    styles = {}
    for label in labels:
        style = _own_style(label)
        if style is not None:
            styles[label] = style
    taken = {style.colour for style in styles.values()}
    free = [colour for colour in _PALETTE if colour not in taken]
    spare = [Style(colour, strokes) for strokes, colour in product(_STROKES, free)]
    for strokes, colour in product(_STROKES, _PALETTE):
        style = Style(colour, strokes)
        if style not in spare and style not in styles.values():
            spare.append(style)
    supply = cycle(spare or map(Style, _PALETTE))
    for label in labels:
        if label not in styles:
            styles[label] = next(supply)
    return styles


def _own_style(label: str) -> Style | None:
    """Return the style of the control or of a method; None where the label is neither, or the method has no colour."""
    if label == FROZEN:
        return Style(_CONTROL)
    method = METHODS.get(label)
    if method is None or not method.colour:
        return None
    return Style(method.colour, "--" if method.moments_8bit else "-")


Lines = Sequence[Mapping[str, Any]]
"""Lines of a run's ``metrics.jsonl``."""


def _all_lines(run: Result) -> Lines:
    """Return the lines of all updates."""
    return run.lines


def _evaluations(run: Result) -> Lines:
    """Return the lines with a validation loss."""
    return run.evaluations


@dataclass(frozen=True)
class _Axis:
    """One coordinate of a curve.

    ``values`` gives a number for each of the lines of a run that it is called with; ``lines`` chooses those. ``band``
    says whether the range over the seeds is drawn.
    """

    label: str
    values: Callable[[Result, Lines], list[float]]
    log: bool = False
    lines: Callable[[Result], Lines] = _all_lines
    band: bool = True


def _values(name: str) -> Callable[[Result, Lines], list[float]]:
    """Return a function that reads the value ``name`` of each line, NaN where there is none."""

    def read(run: Result, lines: Lines) -> list[float]:
        values = []
        for line in lines:
            value = line.get(name)
            values.append(math.nan if value is None else float(value))
        return values

    return read


def _million_tokens(run: Result, lines: Lines) -> list[float]:
    """Return the million tokens that were seen up to each of the lines."""
    return [line["tokens_seen"] / 1e6 for line in lines]


def _minutes(run: Result, lines: Lines) -> list[float]:
    """Return the minutes of training up to each of the lines."""
    # Each line's duration is in all lines' sum, so the time is looked up by the update.
    minutes = {}
    for line, seconds in zip(run.lines, run.seconds, strict=True):
        minutes[line["step"]] = seconds / 60
    return [minutes[line["step"]] for line in lines]


def _running_mean(name: str) -> Callable[[Result, Lines], list[float]]:
    """Return a function that gives the mean of the value ``name`` over the last fiftieth of all lines, at each line."""

    # sums[i] is the sum of the first i values, so that a window costs one subtraction. A missing value counts as the
    # one before it. At the beginning, the window is what there is so far.
    def smooth(run: Result, lines: Lines) -> list[float]:
        window = max(1, len(lines) // 50)
        last = 0.0
        sums = [0.0]
        for line in lines:
            value = line.get(name)
            if value is not None:
                last = float(value)
            sums.append(sums[-1] + last)
        means = []
        for end in range(1, len(sums)):
            start = max(0, end - window)
            means.append((sums[end] - sums[start]) / (end - start))
        return means

    return smooth


_TOKENS = _Axis("million tokens", _million_tokens, log=True)
_PLAIN_TOKENS = replace(_TOKENS, log=False)
_MINUTES = _Axis("minutes of training", _minutes, log=True)
_PERPLEXITY = _Axis("validation perplexity", _values("eval_perplexity"), log=True, lines=_evaluations)
_LOSS = _Axis("training loss", _running_mean("loss"))
_SPEED = _Axis("tokens a second", _running_mean("tokens_per_second"), band=False)
_RATE = _Axis("learning rate", _values("lr"))

# Of each picture: its caption, and the (x, y) of its two panels.
_PICTURES = {
    "perplexity": (
        "Validation perplexity against tokens, and against the time spent training",
        ((_TOKENS, _PERPLEXITY), (_MINUTES, _PERPLEXITY)),
    ),
    "loss": (
        "Training loss, a running mean, against tokens, and against the time spent training",
        ((_TOKENS, _LOSS), (_MINUTES, _LOSS)),
    ),
    "rates": (
        "Tokens a second, a running mean, and the learning rate of embeddings and head",
        ((_PLAIN_TOKENS, _SPEED), (_PLAIN_TOKENS, _RATE)),
    ),
}


def draw_comparison(folder: Path, suffix: str, comparison: Comparison) -> list[tuple[Path, str]]:
    """Draw the pictures of runs in one setting; return (file, what it shows) of each.

    A line is the mean of a method's seeds, a band spans them. The runs that have come to their end are shown, or all
    runs of a method where none has.
    """
    styles = styles_of(list(comparison.methods))
    drawn = []
    for name, (caption, panels) in _PICTURES.items():
        path = folder / f"{name}{suffix}.png"
        figure = _figure(11, 4.2)
        both_axes = figure.subplots(1, 2)
        for axes, (x, y) in zip(both_axes, panels, strict=True):
            for label, runs in comparison.methods.items():
                shown = finished(runs) or list(filter(y.lines, runs))
                if shown:
                    _draw_curve(axes, label, shown, x, y, styles[label])
            axes.set(xlabel=x.label, ylabel=y.label)
            _scale(axes, x.log, y.log)
        _add_legend(figure, both_axes[0])
        _save(figure, path)
        drawn.append((path, caption))
    memory = _perplexity_against_memory(folder / f"memory{suffix}.png", comparison, styles)
    if memory is not None:
        drawn.insert(1, memory)  # beside the perplexities, which most readers came for
    return drawn


def _draw_curve(axes: Any, label: str, runs: Sequence[Result], x: _Axis, y: _Axis, style: Style) -> None:
    """Draw the mean of the runs' curves and the band that they span, at the updates that all have come to."""
    curves = []
    for run in runs:
        lines = y.lines(run)
        xs = x.values(run, lines)
        ys = y.values(run, lines)
        curve = {}
        for line, point in zip(lines, zip(xs, ys, strict=True), strict=True):
            curve[line["step"]] = point
        curves.append(curve)
    merged = over_seeds(curves)
    if not merged:
        return
    mean_x, mean_y, low, high = zip(*merged, strict=True)
    axes.plot(
        mean_x,
        mean_y,
        color=style.colour,
        linestyle=style.strokes,
        label=label,
        linewidth=1.6,
        marker="o" if len(mean_x) == 1 else None,  # a line through one point is invisible
    )
    if len(runs) > 1 and y.band:
        axes.fill_between(mean_x, low, high, color=style.colour, alpha=0.2, linewidth=0)


def _perplexity_against_memory(
    path: Path, comparison: Comparison, styles: Mapping[str, Style]
) -> tuple[Path, str] | None:
    """Draw a point for each method with a finished run; return (file, what it shows), None where there is no method."""
    methods: dict[str, list[Result]] = {}
    for label, runs in comparison.methods.items():
        if finished(runs):
            methods[label] = finished(runs)
    if not methods:
        return None
    # Weights and optimizer state are what a method decides on, and are the same on every machine. They are in a run's
    # summary. Where one run has lost it, all are shown by their measured peaks: an axis must mean one thing.
    summaries = [run.summary for run in chain.from_iterable(methods.values())]
    if all("optimizer_bytes" in summary for summary in summaries):
        size_of = _weights_and_state
        what = "weights and optimizer state"
    else:
        size_of = _measured_peak
        what = "peak memory"

    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for label, runs in methods.items():
        loss = final_loss(runs)
        assert loss is not None
        mean = math.exp(loss.mean)
        perplexities = [run.evaluations[-1]["eval_perplexity"] for run in runs]
        # Of one seed, the mean is the perplexity but for rounding, which must not make a length negative.
        below = max(0.0, mean - min(perplexities))
        above = max(0.0, max(perplexities) - mean)
        style = styles[label]
        axes.errorbar(
            max(map(size_of, runs)) / _MIB,
            mean,
            yerr=[[below], [above]],
            fmt="o",
            capsize=3,
            label=label,
            color=style.colour,
            markerfacecolor=None if style.strokes == "-" else "white",
        )
    axes.set(xlabel=f"{what}, MiB", ylabel="validation perplexity")
    axes.margins(0.1)
    _scale(axes, x_log=False, y_log=True)
    _add_legend(figure, axes)
    _save(figure, path)
    return path, f"Validation perplexity against {what}; bars span the seeds"


def _weights_and_state(run: Result) -> int:
    """Return the bytes of a finished run's weights and optimizer state."""
    return int(run.summary["weights_bytes"] + run.summary["optimizer_bytes"])


def _measured_peak(run: Result) -> int:
    """Return the most bytes that were measured in a run."""
    peaks = [int(line["peak_memory_bytes"]) for line in run.lines]
    return max(peaks)


def _scale(axes: Any, x_log: bool, y_log: bool) -> None:
    """Make the chosen axes logarithmic, with plain numbers at their ticks."""
    if x_log:
        _leave_out_the_beginning(axes)
        axes.set_xscale("log")
        _choose_ticks(axes.xaxis)
    if y_log:
        axes.set_yscale("log")
        _choose_ticks(axes.yaxis)


def _leave_out_the_beginning(axes: Any) -> None:
    """Let the horizontal axis begin at a hundredth of its end, or at the first point if that comes later."""
    # On a logarithmic axis, the first per cent of a run would take as much room as all that comes after it or more, and
    # there is nothing to compare in it.
    if not axes.lines:
        return
    coordinates: list[float] = []
    for line in axes.lines:
        coordinates += list(line.get_xdata())
    a_hundredth = max(coordinates) / 100
    before_the_first = min(coordinates) / 1.1
    axes.set_xlim(left=max(a_hundredth, before_the_first))


def _choose_ticks(axis: Any) -> None:
    """Choose the ticks of a logarithmic axis by how far it reaches."""
    # Below two decades and a bit, 1, 2 and 5 of each decade have room for their numbers; beyond, the decades alone.
    # Within a factor of four there may be one such tick or none, so the small ticks between are numbered too.
    # matplotlib's own formatter would write powers of ten, which hide what a perplexity is.
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    multiples = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}" if high < 4 * low else NullFormatter())


def _add_legend(figure: Any, axes: Any) -> None:
    """Put the legend of ``axes`` under the figure, and make the figure higher by the legend's rows."""
    # An inch of width has room for 11 letters at this size of type; 8 stand for a column's line and its margins.
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = int(figure.get_figwidth() * 11 / (8 + longest))
    columns = min(4, max(1, columns))
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _figure(width: float, height: float) -> Any:
    """Return a new figure, in inches."""
    # Made without pyplot, a figure needs no screen and is freed like any object.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """Write the figure, without the upper and right lines of its frames, into a file; make the folder for it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
