"""Pictures of runs and plans. The only place that draws.

Colours are Okabe and Ito's, which colour-blind readers tell apart; a method has the same one in every picture.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from galore_pretrain.optim import METHODS
from galore_pretrain.study.results import FROZEN, Comparison, Result, final_loss, over_seeds

_PALETTE = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")
_CONTROL = "#999999"
_KINDS = {
    "weights": "#0072B2",
    "moments": "#E69F00",
    "bases": "#F0E442",
    "gradients": "#D55E00",
    "sums": "#CC79A7",
    "activations": "#009E73",
    "temporaries": "#999999",
}


def draw_memory(path: Path, title: str, bars: Mapping[str, Mapping[str, int]], budget: int | None = None) -> None:
    """Stacked bars of bytes: for each name, what its peak is made of. A line marks the budget."""
    pyplot = _pyplot()
    tallest = max(name.count("\n") for name in bars)
    figure, axes = pyplot.subplots(figsize=(8, 1.6 + (0.5 + 0.16 * tallest) * len(bars)), layout="constrained")
    names = list(bars)
    left = [0.0] * len(names)
    for kind, colour in _KINDS.items():
        sizes = [bars[name][kind] / 2**30 for name in names]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=colour, label=kind, edgecolor="white", linewidth=0.5)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for name, total in zip(names, left, strict=True):
        axes.annotate(
            f"{total:.2f}", (total, name), xytext=(4, 0), textcoords="offset points", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, zorder=4,
        )  # fmt: skip
    if budget is not None and budget / 2**30 < 1.6 * max(left):
        axes.axvline(budget / 2**30, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"for tensors: {budget / 2**30:.2f}", (budget / 2**30, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 2), textcoords="offset points", fontsize=9, ha="center", va="bottom",
        )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_title(title, pad=16)
    axes.set_xlabel("peak memory of an update, GiB")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _finish(figure, path)


@dataclass(frozen=True)
class _Style:
    colour: str
    line: str = "-"


def _styles(labels: Sequence[str]) -> dict[str, _Style]:
    """A method's own colour, in broken strokes for its 8-bit form; what else there is takes the colours left over."""
    known = {FROZEN: _Style(_CONTROL)}
    for name, entry in METHODS.items():
        if entry.colour:
            known[name] = _Style(entry.colour, "--" if entry.moments_8bit else "-")
    styles = {label: known[label] for label in labels if label in known}
    own = {style.colour for style in styles.values()}
    left = [c for c in _PALETTE if c not in own]
    others = [_Style(c) for c in left] + [_Style(c, line) for line in ("--", ":", "-.") for c in left or _PALETTE]
    return styles | dict(zip((label for label in labels if label not in styles), cycle(others), strict=False))


Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Axis:
    """Says what a coordinate is: ``of`` gives it for the lines of a run's ``metrics.jsonl`` that ``where`` chooses."""

    label: str
    of: Callable[[Result, Lines], list[float]]
    log: bool = False
    where: Callable[[Result], Lines] = lambda run: run.lines
    band: bool = True


def _values(name: str) -> Callable[[Result, Lines], list[float]]:
    return lambda run, lines: [float("nan") if line.get(name) is None else float(line[name]) for line in lines]


def _minutes(run: Result, lines: Lines) -> list[float]:
    at = {line["step"]: seconds / 60 for line, seconds in zip(run.lines, run.seconds, strict=True)}
    return [at[line["step"]] for line in lines]


def _running_mean(name: str) -> Callable[[Result, Lines], list[float]]:
    """Over a fiftieth of what is there; a missing value counts as the one before."""

    def smooth(run: Result, lines: Lines) -> list[float]:
        window, last, sums = max(1, len(lines) // 50), 0.0, [0.0]
        for line in lines:
            last = last if line.get(name) is None else float(line[name])
            sums.append(sums[-1] + last)
        first = [max(0, i - window) for i in range(1, len(sums))]
        return [(sums[i] - sums[start]) / (i - start) for i, start in enumerate(first, 1)]

    return smooth


_TOKENS = _Axis("million tokens", lambda run, lines: [line["tokens_seen"] / 1e6 for line in lines], log=True)
_PLAIN_TOKENS = replace(_TOKENS, log=False)
_MINUTES = _Axis("minutes of training", _minutes, log=True)
_PERPLEXITY = _Axis("validation perplexity", _values("eval_perplexity"), log=True, where=lambda run: run.evaluations)
_LOSS = _Axis("training loss", _running_mean("loss"))
_SPEED = _Axis("tokens a second", _running_mean("tokens_per_second"), band=False)
_RATE = _Axis("learning rate", _values("lr"))
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
    """(file, what it shows) of each picture of runs in one setting: a line is the mean of seeds, a band spans them.

    Of a method, the runs that have come to their end are shown, or all where none has.
    """
    styles, drawn = _styles(list(comparison.methods)), []
    for name, (caption, panels) in _PICTURES.items():
        figure, axes = _pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for panel, (x, y) in zip(axes, panels, strict=True):
            for label, runs in comparison.methods.items():
                shown = [run for run in runs if run.is_over] or [run for run in runs if y.where(run)]
                _draw_curve(panel, label, shown, x, y, styles[label])
            panel.set(xlabel=x.label, ylabel=y.label)
            _scale(panel, x.log, y.log)
        _legend(figure, axes[0])
        _finish(figure, folder / f"{name}{suffix}.png")
        drawn.append((folder / f"{name}{suffix}.png", caption))
    memory = _perplexity_against_memory(folder / f"memory{suffix}.png", comparison, styles)
    return drawn[:1] + ([memory] if memory else []) + drawn[1:]


def _draw_curve(axes: Any, label: str, runs: Sequence[Result], x: _Axis, y: _Axis, style: _Style) -> None:
    if not runs:
        return
    curves = []
    for run in runs:
        lines = y.where(run)
        points = zip(x.of(run, lines), y.of(run, lines), strict=True)
        curves.append({line["step"]: point for line, point in zip(lines, points, strict=True)})
    if not (points_of_all := over_seeds(curves)):
        return
    across, mean, low, high = zip(*points_of_all, strict=True)
    marker = "o" if len(across) == 1 else None
    axes.plot(across, mean, color=style.colour, linestyle=style.line, label=label, linewidth=1.6, marker=marker)
    if len(runs) > 1 and y.band:
        axes.fill_between(across, low, high, color=style.colour, alpha=0.2, linewidth=0)


def _perplexity_against_memory(
    path: Path, comparison: Comparison, styles: Mapping[str, _Style]
) -> tuple[Path, str] | None:
    """Weights and optimizer state where they are known, else the measured peak."""
    known = all("optimizer_bytes" in run.summary for runs in comparison.methods.values() for run in runs if run.is_over)
    points = []
    for label, runs in comparison.methods.items():
        loss = final_loss(runs)
        over = [run for run in runs if run.is_over]
        if loss is None:
            continue
        size = [
            run.summary["weights_bytes"] + run.summary["optimizer_bytes"]
            if known
            else max(line["peak_memory_bytes"] for line in run.lines)
            for run in over
        ]
        values = [run.evaluations[-1]["eval_perplexity"] for run in over]
        points.append((label, max(size) / 2**20, math.exp(loss.mean), values))
    if not points:
        return None
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, size, mean, values in points:
        spread = [[max(0.0, mean - min(values))], [max(0.0, max(values) - mean)]]  # of one seed, rounding is left
        axes.errorbar(
            size, mean, yerr=spread, fmt="o", capsize=3, label=label,
            color=styles[label].colour, markerfacecolor="white" if styles[label].line != "-" else None,
        )  # fmt: skip
    what = "weights and optimizer state" if known else "peak memory"
    axes.set(xlabel=f"{what}, MiB", ylabel="validation perplexity")
    axes.margins(0.1)
    _scale(axes, x_log=False, y_log=True)
    _legend(figure, axes)
    _finish(figure, path)
    return path, f"Validation perplexity against {what}; bars span the seeds"


def _scale(axes: Any, x_log: bool, y_log: bool) -> None:
    """Logarithmic axes with plain numbers; what lies in the first hundredth of a run is left out of them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for wanted, axis, set_scale in ((x_log, axes.xaxis, axes.set_xscale), (y_log, axes.yaxis, axes.set_yscale)):
        if not wanted:
            continue
        if axis is axes.xaxis and axes.lines:
            last = max(max(line.get_xdata()) for line in axes.lines)
            axes.set_xlim(left=max(last / 100, min(min(line.get_xdata()) for line in axes.lines) / 1.1))
        set_scale("log")
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}" if high < 4 * low else NullFormatter())


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(4, max(1, int(figure.get_figwidth() * 11 / (8 + max(map(len, labels), default=1)))))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _finish(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)
