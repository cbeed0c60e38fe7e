"""``galore-pretrain report``: tables and pictures of runs, as Markdown and HTML, from what they wrote."""

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galore_pretrain.errors import InputError
from galore_pretrain.study import paper
from galore_pretrain.study.pictures import draw_comparison
from galore_pretrain.study.results import Comparison, Result, final_loss, paired, told_apart

_PAPERS_NAME = {row: method for method, row in paper.PRINTED.items()}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}figcaption{color:#555}"
)


@dataclass(frozen=True)
class Table:
    """Columns and rows of text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        return f"<table>{line(self.columns, 'th')}{''.join(line(row, 'td') for row in self.rows)}</table>"


def write(comparisons: Sequence[Comparison], folder: Path) -> str:
    """``report.md``, ``report.html`` and the pictures in ``folder``; the Markdown is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, page = ["# Report"], ["<h1>Report</h1>"]
    if len(comparisons) > 1:
        text = (
            f"These runs differ in {', '.join(_differences(comparisons))}. Numbers of different sections are not to be "
            "compared."
        )
        markdown.append(text)
        page.append(f"<p>{html.escape(text)}</p>")
    for i, comparison in enumerate(comparisons, 1):
        heading, notes = _heading(comparison), _notes(comparison)
        markdown.append(f"## {heading}")
        page.append(f"<h2>{html.escape(heading)}</h2>")
        for table in (ranking(comparison), differences(comparison)):
            if table.rows:
                markdown.append(table.markdown())
                page.append(table.html())
        for note in notes:
            markdown.append(note)
            page.append(f"<p>{html.escape(note)}</p>")
        for file, caption in draw_comparison(folder, f"-{i}" if len(comparisons) > 1 else "", comparison):
            markdown.append(f"![{caption}]({file.name})")
            shown = html.escape(caption)
            page.append(f'<figure><img src="{file.name}" alt="{shown}"><figcaption>{shown}</figcaption></figure>')
    text = "\n\n".join(markdown) + "\n"
    (folder / "report.md").write_text(text)
    (folder / "report.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Report</title><style>{_STYLE}</style>'
        f"{''.join(page)}</html>\n"
    )
    return text


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the numbers of the report for a program."""
    found = []
    for comparison in comparisons:
        methods = {}
        for label, runs in comparison.methods.items():
            loss = final_loss(runs)
            methods[label] = {
                "runs": [str(run.folder) for run in runs],
                "eval_loss": loss and loss.mean,
                "eval_loss_deviation": loss and loss.deviation,
                "eval_perplexity": loss and math.exp(loss.mean),
            }
        found.append({"setting": dict(comparison.setting), "methods": methods})
    return found


def ranking(comparison: Comparison) -> Table:
    """The methods, the best first; behind them those that have not come to their end. Columns that have nothing to say
    are left out."""
    lines = [_line(comparison, label, runs) for label, runs in comparison.methods.items()]
    columns = [name for name in lines[0] if any(line[name] for line in lines)]
    return Table(columns, [[line[name] for name in columns] for line in lines])


def _line(comparison: Comparison, label: str, runs: Sequence[Result]) -> dict[str, str]:
    loss, theirs = final_loss(runs), _printed(comparison.setting, runs[0])
    over = [run for run in runs if run.is_over]
    going = [f"{run.lines[-1]['step']} of {run.config.get('steps') or '?'}" for run in runs if run not in over]
    perplexity = math.exp(loss.mean) if loss else None
    reference = [float(run.evaluations[-1]["eval_reference_perplexity"]) for run in over]
    sizes = [r.summary["weights_bytes"] + r.summary["optimizer_bytes"] for r in over if "optimizer_bytes" in r.summary]
    every = [line for run in runs for line in run.lines]
    speeds = [line["tokens_per_second"] for line in every if line.get("tokens_per_second")]
    return {
        "method": label,
        "lr": _agreed(runs, "lr"),
        "matrices ×": _agreed(runs, "matrix_lr_scale"),
        "seeds": f"{len(over)}" + (f" (not over: {', '.join(going)})" if going else ""),
        "validation loss": "" if loss is None else str(loss),
        "perplexity": "" if perplexity is None else f"{perplexity:.2f}",
        "reference perplexity": f"{statistics.geometric_mean(reference):.2f}" if reference else "",
        "the paper's": "" if theirs is None else f"{theirs.perplexity:.2f}",
        "difference": f"{100 * (perplexity / theirs.perplexity - 1):+.1f} %" if perplexity and theirs else "",
        "weights + state, 10⁹ B": f"{max(sizes) / 1e9:.4f}" if sizes else "",
        "the paper's rule, G": _by_the_papers_rule(comparison.setting, runs[0]),
        "peak GiB": f"{max(line['peak_memory_bytes'] for line in every) / 2**30:.2f}",
        "tokens/s": f"{statistics.median(speeds):,.0f}" if speeds else "",
        "million tokens": f"{statistics.mean(run.lines[-1]['tokens_seen'] for run in over or runs) / 1e6:.2f}",
    }


def differences(comparison: Comparison) -> Table:
    """Each method against each better one, seed by seed: what the spread can tell apart."""
    over = [label for label, runs in comparison.methods.items() if final_loss(runs)]
    rows = [
        [label, *(_difference(comparison.methods[label], comparison.methods[other]) for other in over[:i])]
        for i, label in enumerate(over)
        if i
    ]
    return Table(["against", *over[:-1]], [row + [""] * (len(over) - len(row)) for row in rows])


def _difference(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    if (pair := paired(ours, theirs)) is None:
        return "no seed in common"
    mean, error, count = pair
    if error is None:
        return f"{100 * mean:+.1f} %, one seed"
    return f"{100 * mean:+.1f} ± {100 * error:.1f} %" + (" *" if told_apart(mean, error, count) else "")


def _agreed(runs: Sequence[Result], name: str) -> str:
    values = {f"{run.config[name]:g}" for run in runs if run.config.get(name) is not None}
    return values.pop() if len(values) == 1 else ""


def _printed(setting: Mapping[str, Any], run: Result) -> paper.Cell | None:
    """Return what a paper prints of such a run."""
    return paper.cell(str(setting.get("model")), run.base, run.config.get("rank"), setting.get("steps"))


def _by_the_papers_rule(setting: Mapping[str, Any], run: Result) -> str:
    """Weights and optimizer state of a row of Table 2."""
    if (method := _PAPERS_NAME.get(run.base)) is None:
        return ""
    try:
        return f"{sum(paper.rule(str(setting.get('model')), method, run.config.get('rank') or 0)):.3f}"
    except InputError:  # a config file that is not there any more
        return ""


def _heading(comparison: Comparison) -> str:
    setting = comparison.setting
    if not setting.get("model"):
        return "Settings unknown (no config.json that can be read): not to be compared with anything"
    total = setting.get("total_batch_size")
    length = f"{setting['steps']} updates" if setting.get("steps") else f"{setting.get('max_tokens'):,} tokens"
    return (
        f"{Path(setting['model']).stem} on {setting['data']} ({setting['layout']}), {length} of {total} × "
        f"{setting['max_length']} tokens, tokenizer {setting['tokenizer']}"
    )


def _notes(comparison: Comparison) -> list[str]:
    cells = [_printed(comparison.setting, runs[0]) for runs in comparison.methods.values()]
    tokens = max(run.lines[-1]["tokens_seen"] for runs in comparison.methods.values() for run in runs)
    notes = [
        f"The paper's numbers: {source}, after {length} of C4; these runs saw {tokens / 1e9:.4g} billion tokens."
        for source, length in dict.fromkeys((cell.source, cell.length) for cell in cells if cell)
    ]
    for run in (run for runs in comparison.methods.values() for run in runs if run.unread):
        notes.append(f"Of {run.folder}, {' and '.join(run.unread)} cannot be read; what is shown is without them.")
    if differences(comparison).rows:
        notes.append(
            "By how much the line's perplexity exceeds the column's (the mean difference of the logarithms over the "
            "seeds that both have, ± its standard error); * where Student's t tells the two apart at the 95 % level, "
            "which of twenty pairs that are alike happens to one. The best of several is favoured by having been "
            "chosen; so is a seed on which a method was tuned."
        )
    return notes


def _differences(comparisons: Sequence[Comparison]) -> list[str]:
    names = comparisons[0].setting
    return [n.replace("_", " ") for n in names if len({str(c.setting.get(n)) for c in comparisons}) > 1] or ["folder"]
