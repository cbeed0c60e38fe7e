"""The page of runs that go on: one file of HTML without JavaScript, for a phone and a desk, by day and by night."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from galore_pretrain.study import glue
from galore_pretrain.study.charts import DASHES, Level, Line, draw
from galore_pretrain.study.pictures import Style, styles_of
from galore_pretrain.study.report import heading_of
from galore_pretrain.study.results import Comparison, compare
from galore_pretrain.study.watched import ENDED, RUNNING, SAVING, SILENT, SKIPPED, STARTING, WatchedRun

_GIB = 2**30
_MIB = 2**20

# The states as the page has them, in the order in which its first line counts the runs and its tables have them.
_STATES = {RUNNING: "▶", STARTING: "▷", SAVING: "▶", SILENT: "⚠", ENDED: "✓"}

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f8;--text:#1c1e21;--faint:#5c6370;--rule:#d9dce1;
--good:#1a7f37;--bad:#b35900}
body{font:15px/1.45 system-ui,sans-serif;background:var(--page);color:var(--text);margin:0 auto;max-width:80rem;
padding:1rem}
h1{font-size:1.35rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .6rem}p{margin:.3rem 0}
.faint,small{color:var(--faint)}small{font-size:.85em}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--faint);font-size:.85em}
th,td{text-align:right;padding:.35rem .5rem;border-bottom:1px solid var(--rule);vertical-align:top;white-space:nowrap}
th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}
th:first-child,td:first-child{padding-left:0}th:last-child,td:last-child{padding-right:0}
td:first-child{white-space:normal;overflow-wrap:anywhere}td small{display:block;font-weight:400}
progress{display:block;width:100%;min-width:5rem;height:.4rem;margin-top:.25rem;accent-color:var(--faint)}
.running,.saving,.ended{color:var(--good)}.silent,.warn{color:var(--bad)}.starting{color:var(--faint)}
.key{width:26px;height:10px;margin-right:.4rem;vertical-align:baseline}
.legend span{white-space:nowrap;margin-right:1.2rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:.8rem;margin:1rem 0}
figure{margin:0;background:var(--card);border-radius:8px;padding:.6rem .5rem .3rem}
figcaption{font-size:.9rem;padding:0 .3rem .3rem}
figure svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--faint)}
.grid{stroke:var(--rule);stroke-width:.7;fill:none}.axis{stroke:var(--faint);fill:none}
@media (max-width:60rem){
thead{display:none}table,tbody,tr{display:block}
tr{background:var(--card);border-radius:8px;padding:.6rem .7rem;margin-bottom:.7rem;display:grid;
grid-template-columns:1fr 1fr;gap:.35rem 1rem}
td,td:first-child,td:last-child{display:block;text-align:left;border:0;padding:0;white-space:normal}
td:first-child{grid-column:1/-1;font-weight:600}
td:not(:first-child):before{content:attr(data-name);display:block;color:var(--faint);font-size:.8rem}
td:empty{display:none}}
"""

_ON_CPU = (
    "Memory on a CPU is that of the whole process, its program and libraries included; what is planned is of tensors "
    "alone."
)
_ON_TIME = (
    "Speed and time left are by the last fifty updates, without evaluations and checkpoints. Charts are against the "
    "number of the update; of a long run, a point is the mean of several updates, and a band spans them."
)


@dataclass(frozen=True)
class _Chart:
    """Says what a chart shows: the curves of ``keys`` as ``drawn``; of a second key, dots are rings."""

    title: str
    keys: Sequence[str]
    unit: float = 1.0
    log: bool = False
    from_zero: bool = False
    has_band: bool = False
    drawn: Literal["lines", "lines with dots", "dots"] = "lines"


_CHARTS = (
    _Chart("training loss", ["loss"], has_band=True),
    _Chart("validation perplexity", ["eval_perplexity"], log=True, drawn="lines with dots"),
    _Chart("validation score", ["eval_score"], drawn="lines with dots"),
    _Chart("peak memory, GiB; broken: planned", ["peak_memory_bytes"], unit=_GIB, from_zero=True),
    _Chart("tokens a second", ["tokens_per_second"], from_zero=True),
    _Chart("learning rate", ["lr"], from_zero=True),
    _Chart("overlap of subspaces at a refresh", ["subspace_overlap"], drawn="dots"),
    _Chart(
        "one matrix's overlap; rings: by noise alone",
        ["subspace_overlap_paired", "subspace_overlap_noise"],
        drawn="dots",
    ),
    _Chart("updates skipped so far", [SKIPPED], from_zero=True),
)


@dataclass(frozen=True)
class Moment:
    """Says when a page is written, in seconds since 1970, and in how many seconds again; None if it is the last."""

    now: float
    again: float | None


def page(runs: Sequence[WatchedRun], moment: Moment) -> str:
    """Return the page of the runs, in sections of one setting each."""
    # Runs that have said nothing of themselves yet are in no setting: they are named, and have no section.
    unknown = [run for run in runs if not run.config and not run.last]
    by_folder = {run.folder: run for run in runs if run not in unknown}
    comparisons = compare([run.result() for run in by_folder.values()])
    counted = _counted(runs, moment.now)
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        _refresh(moment),
        f'<link rel="icon" href="data:,"><title>{counted}</title><style>{_STYLE}{_colours(comparisons)}</style>',
        f"<h1>{counted}</h1>",
        f'<p class="faint">{_written(moment)}</p>',
    ]
    if unknown:
        names = ", ".join(html.escape(str(run.folder)) for run in unknown)
        parts.append(f"<p>About to begin: {names}.</p>")
    for number, comparison in enumerate(comparisons):
        parts += _section(number, comparison, by_folder, moment.now)
    if comparisons:
        parts.append(f'<p class="faint">{_ON_TIME}</p>')
    if any(run.measures_process for run in runs):
        parts.append(f'<p class="faint">{_ON_CPU}</p>')
    return "\n".join([*parts, "</html>\n"])


def _refresh(moment: Moment) -> str:
    """Return the tag that lets a browser load the page again; nothing for the last page."""
    if moment.again is None:
        return ""
    return f'<meta http-equiv="refresh" content="{math.ceil(moment.again)}">'


def _written(moment: Moment) -> str:
    """Return when the page was written, and whether it will be again."""
    when = f"Written {datetime.fromtimestamp(moment.now):%Y-%m-%d %H:%M:%S}"
    if moment.again is None:
        return f"{when}, and not again: nobody watches any more."
    return f"{when}, and anew every {in_words(moment.again)}."


def _counted(runs: Sequence[WatchedRun], now: float) -> str:
    """Return how many runs are in which state."""
    states = [run.state(now) for run in runs]
    words = [f"{states.count(state)} {state}" for state in _STATES if state in states]
    return ", ".join(words) or "no run yet"


def in_words(seconds: float) -> str:
    """Return a duration in its two largest units."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {whole % 60} s"
    return f"{seconds:.3g} s"


# -- colours ----------------------------------------------------------------------------------------------------------


# Methods have the colours that they have in all pictures, which are made for white paper. In the dark, those that are
# too dark are mixed with white.
def _colours(comparisons: Sequence[Comparison]) -> str:
    """Return the CSS variables of all methods' colours: --s0m1 is of the second method of the first section."""
    light = []
    dark = ["--page:#14161a", "--card:#1d2026", "--text:#e6e8eb", "--faint:#9aa2ad", "--rule:#343941"]
    dark += ["--good:#56d364", "--bad:#f0a35e"]
    for number, comparison in enumerate(comparisons):
        for place, style in enumerate(_styles(comparison).values()):
            light.append(f"--s{number}m{place}:{style.colour}")
            dark.append(f"--s{number}m{place}:{on_dark(style.colour)}")
    return f":root{{{';'.join(light)}}}@media (prefers-color-scheme:dark){{:root{{{';'.join(dark)}}}}}"


def _styles(comparison: Comparison) -> dict[str, Style]:
    """Return the styles of the methods, in an order that does not change when one of them gets better."""
    labels = sorted(comparison.methods)
    styles = styles_of(labels)
    return {label: styles[label] for label in labels}


def on_dark(colour: str) -> str:
    """Return a colour, #RRGGBB, as it is where it is bright enough for a dark page, else mixed with white.

    Black is nearly white there.
    """
    channels = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    weights = (0.2126, 0.7152, 0.0722)
    brightness = sum(weight * channel / 255 for weight, channel in zip(weights, channels, strict=True))
    share = max(0.0, (0.55 - brightness) / (1 - brightness))
    if brightness == 0:
        share = 0.9
    mixed = [round(channel + share * (255 - channel)) for channel in channels]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


@dataclass(frozen=True)
class _Look:
    """The look of a method's lines: a colour of CSS, and matplotlib's sign for the strokes."""

    colour: str
    strokes: str

    def key(self) -> str:
        """Return a short line of that look."""
        return (
            f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5H26" stroke="{self.colour}" '
            f'stroke-width="3" stroke-dasharray="{DASHES[self.strokes]}"/></svg>'
        )


def _looks(number: int, styles: Mapping[str, Style]) -> dict[str, _Look]:
    """Return the looks of the methods of a section."""
    looks = {}
    for place, (label, style) in enumerate(styles.items()):
        looks[label] = _Look(f"var(--s{number}m{place})", style.strokes)
    return looks


# -- a section --------------------------------------------------------------------------------------------------------


def _section(number: int, comparison: Comparison, by_folder: Mapping[Path, WatchedRun], now: float) -> list[str]:
    """Return the section of the runs of one setting: a line a run, and the charts."""
    looks = _looks(number, _styles(comparison))
    method_of: dict[WatchedRun, str] = {}
    for label, results in comparison.methods.items():
        for result in results:
            method_of[by_folder[result.folder]] = label
    if glue.is_of_glue(comparison):
        heading = f"{glue.heading([comparison])}: {comparison.setting['task']}"
    else:
        heading = heading_of(comparison)
    parts = [f"<h2>{html.escape(heading)}</h2>"]
    parts.append(_table(method_of, looks, now))
    if len(looks) > 1:
        keys = [f"<span>{look.key()}{html.escape(label)}</span>" for label, look in looks.items()]
        parts.append(f'<p class="legend">{" ".join(keys)}</p>')
    charts = [_drawn(chart, method_of, looks) for chart in _CHARTS]
    parts.append(f'<div class="charts">{"".join(charts)}</div>')
    return parts


def _table(method_of: Mapping[WatchedRun, str], looks: Mapping[str, _Look], now: float) -> str:
    """Return the table of a section: those that go on come first, else the runs are in the order of their folders."""
    order = list(_STATES)
    runs = sorted(method_of, key=lambda run: (order.index(run.state(now)), str(run.folder)))
    rows = [_cells(run, method_of[run], looks[method_of[run]], now) for run in runs]
    names = list(rows[0])
    head = "".join(f"<th>{name}</th>" for name in names)
    body = ""
    for row in rows:
        cells = [f'<td data-name="{name}">{row[name]}</td>' for name in names]
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _cells(run: WatchedRun, method: str, look: _Look, now: float) -> dict[str, str]:
    """Return a run's cells by their columns, as HTML."""
    state = run.state(now)
    what = f"{method}, seed {run.config['seed']}" if "seed" in run.config else method
    cells = {
        "run": f"{look.key()}{html.escape(run.folder.name)}<small>{html.escape(what)}</small>",
        "state": _state(run, state, now),
        "update": _progress(run),
        "loss": _loss(run),
        "validation": _validation(run),
        "tokens/s": "",
        "left": "",
        "memory": _memory(run),
        "skipped": _skipped(run),
    }
    if run.tokens_per_second:
        cells["tokens/s"] = f"{run.tokens_per_second:,.0f}"
    if state == RUNNING and run.seconds_left is not None:
        cells["left"] = in_words(run.seconds_left)
    return cells


def _state(run: WatchedRun, state: str, now: float) -> str:
    """Return the state with its sign; of a silent run, since when there was no line."""
    text = f'<span class="{state}">{_STATES[state]} {state}</span>'
    if state == SILENT:
        text += f"<small>no line for {in_words(now - run.changed)}</small>"
    return text


def _progress(run: WatchedRun) -> str:
    """Return how many of the updates, or of the tokens, are made."""
    steps = run.config.get("steps")
    step = run.last.get("step", 0)
    if steps:
        return f'{step:,} of {steps:,}<progress value="{step}" max="{steps}"></progress>'
    tokens = run.config.get("max_tokens")
    seen = run.last.get("tokens_seen", 0)
    if not tokens:
        return f"{step:,}"
    of_tokens = f"<small>{seen / 1e6:,.4g} of {tokens / 1e6:,.4g} million tokens</small>"
    return f'{step:,}{of_tokens}<progress value="{seen}" max="{tokens}"></progress>'


def _loss(run: WatchedRun) -> str:
    """Return the last training loss."""
    if not run.last:
        return ""
    loss = run.last.get("loss")
    return "not finite" if loss is None else f"{loss:.4f}"


def _validation(run: WatchedRun) -> str:
    """Return the last perplexity, or a task's score, and after which update."""
    if not run.evaluation:
        return ""
    after = f"<small>after {run.evaluation['step']:,}</small>"
    score = run.evaluation.get("eval_score")
    if score is not None:
        return f"score {score:.4f}{after}"
    perplexity = run.evaluation.get("eval_perplexity")
    if perplexity is not None:
        return f"ppl {perplexity:.4g}{after}"
    return f"loss {run.evaluation['eval_loss']:.4f}{after}"


def _memory(run: WatchedRun) -> str:
    """Return the peak of memory so far, and what is planned."""
    peak = run.last.get("peak_memory_bytes")
    text = "" if peak is None else _size(peak)
    if run.planned is not None:
        text += f"<small>planned {_size(run.planned)}</small>"
    return text


def _size(size: float) -> str:
    """Return bytes in MiB or GiB."""
    if size < _GIB:
        return f"{size / _MIB:.0f} MiB"
    return f"{size / _GIB:.2f} GiB"


def _skipped(run: WatchedRun) -> str:
    """Return how many updates were skipped, and what refreshes failed or were left out."""
    if not run.last:
        return ""
    text = f"{run.skipped:,}"
    if run.skipped:
        text = f'<b class="warn">{text}</b>'
    if run.failed:
        text += f'<small class="warn">refreshes failed {run.failed:,}</small>'
    if run.saved:
        text += f"<small>refreshes saved {run.saved:,}</small>"
    if run.unread:
        text += f'<small class="warn">lines unread {run.unread:,}</small>'
    return text


def _drawn(chart: _Chart, method_of: Mapping[WatchedRun, str], looks: Mapping[str, _Look]) -> str:
    """Return a chart of the runs; nothing where none has a value for it, or none was skipped."""
    lines: list[Line] = []
    levels: dict[Level, None] = {}  # a set that keeps its order
    for run, method in method_of.items():
        look = looks[method]
        for place, key in enumerate(chart.keys):
            line = _line(chart, run, key, look, is_second=place > 0)
            if line is not None:
                lines.append(line)
        if "peak_memory_bytes" in chart.keys and run.planned is not None:
            level = Level(run.planned / chart.unit, look.colour)
            levels[level] = None
    if not lines or (SKIPPED in chart.keys and not any(run.skipped for run in method_of)):
        return ""
    return draw(chart.title, lines, list(levels), log=chart.log, from_zero=chart.from_zero)


def _line(chart: _Chart, run: WatchedRun, key: str, look: _Look, *, is_second: bool) -> Line | None:
    """Return the line of a run's curve; None where it has no value yet."""
    points = run.curves[key].points
    # Of what is noisy, a mean of few values behind means of many looks like news.
    is_noisy = key in ("loss", "tokens_per_second")
    if is_noisy and len(points) > 2 and 2 * points[-1].count <= points[-2].count:
        points = points[:-1]
    if not points:
        return None
    through = [(point.x, point.mean / chart.unit) for point in points]
    if chart.drawn == "dots":
        return Line(through, look.colour, None, marks="rings" if is_second else "dots")
    if chart.drawn == "lines with dots":
        return Line(through, look.colour, look.strokes, marks="dots")
    band = []
    if chart.has_band and points[0].count > 1:
        band = [(point.x, point.low / chart.unit, point.high / chart.unit) for point in points]
    return Line(through, look.colour, look.strokes, band)
