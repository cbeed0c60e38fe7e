"""``galore-pretrain report``: tables and pictures of runs, as Markdown and HTML, from what they wrote."""

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_pretrain.config.options import model_name, texts_of
from galore_pretrain.errors import InputError
from galore_pretrain.study import glue, paper
from galore_pretrain.study.pictures import draw_comparison
from galore_pretrain.study.results import (
    Comparison,
    Result,
    final_loss,
    finished,
    further_of,
    last_mean,
    losses_by_seed,
)
from galore_pretrain.study.seeds import paired, ranks
from galore_pretrain.study.tables import Table

_PAPERS_NAME = {row: method for method, row in paper.PRINTED.items()}

# The columns of the ranking, in their order.
_COLUMNS = (
    "rank",
    "method",
    "lr",
    "matrices ×",
    "seeds",
    "validation loss",
    "perplexity",
    "reference perplexity",
    "bits per byte",
    "the paper's",
    "difference",
    "weights + state, 10⁹ B",
    "the paper's rule, G",
    "peak GiB",
    "tokens/s",
    "million tokens",
)

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}figcaption{color:#555}"
)

_ON_DIFFERENCES = (
    "100 times the natural logarithm of the line's perplexity over the column's. A small one is the percentage by "
    "which it is larger; +20 are 22 %, +90 are 146 %. It is a mean over the seeds that both have, and half the "
    "width of its 95 % interval by Student's t. * where that leaves out 0, "
    "which of twenty pairs that are alike happens to one. A rank is 1 + the methods that are better by such a "
    "difference. The best of several is favoured by having been chosen; so is a seed on which a method was tuned."
)


def write(comparisons: Sequence[Comparison], folder: Path) -> str:
    """Write ``report.md``, ``report.html`` and the pictures into ``folder``; return the Markdown."""
    # Each comparison is a section of its own: between settings, a difference of losses says nothing about methods. With
    # several sections, a first paragraph says what the settings differ in, and the pictures' names get a number.
    folder.mkdir(parents=True, exist_ok=True)
    markdown = ["# Report"]
    page = ["<h1>Report</h1>"]
    of_glue = [comparison for comparison in comparisons if glue.is_of_glue(comparison)]
    of_text = [comparison for comparison in comparisons if not glue.is_of_glue(comparison)]
    has_sections = len(of_text) > 1
    if has_sections:
        warning = (
            f"These runs differ in {', '.join(_differing_settings(of_text))}. "
            "Numbers of different sections are not to be compared."
        )
        markdown.append(warning)
        page.append(_html_paragraph(warning))
    if of_glue:
        section, html_section = _section_of_glue(of_glue)
        markdown += section
        page += html_section
    for number, comparison in enumerate(of_text, 1):
        suffix = f"-{number}" if has_sections else ""
        section, html_section = _section(comparison, folder, suffix)
        markdown += section
        page += html_section
    text = "\n\n".join(markdown) + "\n"
    (folder / "report.md").write_text(text)
    (folder / "report.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Report</title><style>{_STYLE}</style>'
        f"{''.join(page)}</html>\n"
    )
    return text


def _section(comparison: Comparison, folder: Path, suffix: str) -> tuple[list[str], list[str]]:
    """Draw the pictures of one comparison into ``folder``; return its paragraphs in Markdown and in HTML."""
    heading = heading_of(comparison)
    markdown = [f"## {heading}"]
    page = [f"<h2>{html.escape(heading)}</h2>"]
    for table in (ranking(comparison), differences(comparison)):
        if table.rows:
            markdown.append(table.markdown())
            page.append(table.html())
    for note in _notes(comparison):
        markdown.append(note)
        page.append(_html_paragraph(note))
    for file, caption in draw_comparison(folder, suffix, comparison):
        escaped = html.escape(caption)
        markdown.append(f"![{caption}]({file.name})")
        page.append(f'<figure><img src="{file.name}" alt="{escaped}"><figcaption>{escaped}</figcaption></figure>')
    return markdown, page


def _section_of_glue(comparisons: Sequence[Comparison]) -> tuple[list[str], list[str]]:
    """Return the paragraphs of all runs on tasks of GLUE, in Markdown and in HTML."""
    heading = glue.heading(comparisons)
    markdown = [f"## {heading}"]
    page = [f"<h2>{html.escape(heading)}</h2>"]
    for table in glue.tables(comparisons):
        markdown.append(table.markdown())
        page.append(table.html())
    going = [run for comparison in comparisons for runs in comparison.methods.values() for run in runs]
    going = [run for run in going if not run.is_over]
    notes = list(glue.NOTES)
    if going:
        notes.insert(0, f"Not over, and not in the tables: {', '.join(str(run.folder) for run in going)}.")
    for note in notes:
        markdown.append(note)
        page.append(_html_paragraph(note))
    return markdown, page


def _html_paragraph(text: str) -> str:
    """Return a paragraph in HTML, escaped."""
    return f"<p>{html.escape(text)}</p>"


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the numbers of the report for a program; a loss is None where no run of a method has come to its end."""
    sections = []
    for comparison in comparisons:
        methods = {}
        for label, runs in comparison.methods.items():
            loss = final_loss(runs)
            numbers: dict[str, Any] = {
                "runs": [str(run.folder) for run in runs],
                "eval_loss": loss and loss.mean,
                "eval_loss_deviation": loss and loss.deviation,
                "eval_perplexity": loss and math.exp(loss.mean),
                "eval_bits_per_byte": last_mean(runs, "eval_bits_per_byte"),
            }
            for name in further_of(runs):
                of_text = last_mean(runs, f"eval_{name}_loss")
                numbers[f"eval_{name}_loss"] = of_text
                numbers[f"eval_{name}_perplexity"] = of_text and math.exp(of_text)
                numbers[f"eval_{name}_bits_per_byte"] = last_mean(runs, f"eval_{name}_bits_per_byte")
            methods[label] = numbers
        sections.append({"setting": dict(comparison.setting), "methods": methods})
    return sections


def ranking(comparison: Comparison) -> Table:
    """Return the table of methods, the best first; behind them those that have not come to their end.

    Columns in which no method has anything are left out.
    """
    # The comparison is in order already: by the mean over the seeds of the final validation loss. That order alone
    # means nothing: two seeds of one method may lie further apart than two methods. So methods have one rank unless the
    # seeds tell them apart, and none where every method has one seed.
    rank_of = _ranks(comparison)
    lines = []
    for label, runs in comparison.methods.items():
        cells = _cells(label, runs)
        cells |= _cells_of_the_paper(comparison.setting, runs)
        cells["rank"] = rank_of.get(label, "")
        lines.append(cells)
    columns = []
    for name in _columns(comparison):
        if any(line.get(name) for line in lines):
            columns.append(name)
    rows = []
    for line in lines:
        rows.append([line.get(name, "") for name in columns])
    return Table(columns, rows)


def _columns(comparison: Comparison) -> list[str]:
    """Return the columns of the ranking: behind those of the validation text, the perplexity of each further text."""
    further: dict[str, None] = {}
    for runs in comparison.methods.values():
        further |= dict.fromkeys(further_of(runs))
    place = _COLUMNS.index("bits per byte") + 1
    return [*_COLUMNS[:place], *map(_of_further, further), *_COLUMNS[place:]]


def _of_further(name: str) -> str:
    """Return the column of a text that was evaluated beside the validation text."""
    return f"{name} perplexity"


def _ranks(comparison: Comparison) -> dict[str, str]:
    """Return the ranks of the methods of which two seeds at least have come to their end."""
    losses = {}
    for label, runs in comparison.methods.items():
        by_seed = losses_by_seed(runs)
        if len(by_seed) > 1:
            losses[label] = by_seed
    return {label: str(rank) for label, rank in ranks(losses).items()}


def _reference_perplexity(over: Sequence[Result]) -> str:
    """Return the mean of what the published code prints of finished runs; an empty text for a task, which has none."""
    references = [run.evaluations[-1].get("eval_reference_perplexity") for run in over]
    told = [float(reference) for reference in references if reference is not None]
    return f"{statistics.geometric_mean(told):.2f}" if told else ""


def _cells(label: str, runs: Sequence[Result]) -> dict[str, str]:
    """Return a method's cells by column, from its runs alone; an empty text where there is nothing to say.

    Losses, perplexities and sizes are those of finished runs.
    """
    over = finished(runs)
    cells = dict.fromkeys(_COLUMNS, "")
    cells["method"] = label
    cells["lr"] = _common_value(runs, "lr")
    cells["matrices ×"] = _common_value(runs, "matrix_lr_scale")
    cells["seeds"] = _seeds(runs)

    loss = final_loss(runs)
    if loss is not None:
        cells["validation loss"] = str(loss)
        cells["perplexity"] = f"{math.exp(loss.mean):.2f}"
        cells["reference perplexity"] = _reference_perplexity(over)
        bits = last_mean(runs, "eval_bits_per_byte")
        if bits is not None:
            cells["bits per byte"] = f"{bits:.4f}"
        for name in further_of(runs):
            of_text = last_mean(runs, f"eval_{name}_loss")
            if of_text is not None:
                cells[_of_further(name)] = f"{math.exp(of_text):.2f}"

    sizes = []
    for run in over:
        if "optimizer_bytes" in run.summary:
            sizes.append(run.summary["weights_bytes"] + run.summary["optimizer_bytes"])
    if sizes:
        cells["weights + state, 10⁹ B"] = f"{max(sizes) / 1e9:.4f}"

    # Peak memory and speed need no end: lines of runs that are still going count too.
    peaks = []
    speeds = []
    for run in runs:
        for line in run.lines:
            peaks.append(line["peak_memory_bytes"])
            if line.get("tokens_per_second"):
                speeds.append(line["tokens_per_second"])
    cells["peak GiB"] = f"{max(peaks) / 2**30:.2f}"
    if speeds:
        cells["tokens/s"] = f"{statistics.median(speeds):,.0f}"
    tokens = [run.lines[-1]["tokens_seen"] for run in over or runs]
    cells["million tokens"] = f"{statistics.mean(tokens) / 1e6:.2f}"
    return cells


def _cells_of_the_paper(setting: Mapping[str, Any], runs: Sequence[Result]) -> dict[str, str]:
    """Return the cells, by column, that set a method beside what a paper has of it."""
    cells = {"the paper's rule, G": _memory_by_the_papers_rule(setting, runs[0])}
    printed = _printed(setting, runs[0])
    if printed is None:
        return cells
    cells["the paper's"] = f"{printed.perplexity:.2f}"
    loss = final_loss(runs)
    if loss is not None:
        excess = math.exp(loss.mean) / printed.perplexity - 1
        cells["difference"] = f"{100 * excess:+.1f} %"
    return cells


def _seeds(runs: Sequence[Result]) -> str:
    """Return how many of the runs are over, and where the others are."""
    going = []
    for run in runs:
        if not run.is_over:
            steps = run.config.get("steps") or "?"
            going.append(f"{run.lines[-1]['step']} of {steps}")
    count = str(len(runs) - len(going))
    if going:
        return f"{count} (not over: {', '.join(going)})"
    return count


def differences(comparison: Comparison) -> Table:
    """Return the table of each method against each better one, seed by seed: what the spread can tell apart.

    Only methods with a finished run take part.
    """
    # The methods come best first, so that the lower triangle holds every pair once: the best has no line, the last no
    # column. A cell is a mean over the shared seeds of differences of final losses. A loss is the logarithm of a
    # perplexity, so a small difference of losses is the relative excess in perplexity: it is shown in per cent.
    labels = [label for label, runs in comparison.methods.items() if finished(runs)]
    columns = labels[:-1]
    rows = []
    for place, label in enumerate(labels[1:], 1):
        row = [label]
        for better in labels[:place]:
            row.append(_difference(comparison.methods[label], comparison.methods[better]))
        padding = [""] * (len(columns) - place)
        rows.append(row + padding)
    return Table(["against", *columns], rows)


def _difference(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    """Return the mean difference of two methods in per cent, its interval, and a star where it is not chance."""
    difference = paired(losses_by_seed(ours), losses_by_seed(theirs))
    if difference is None:
        return "no seed in common"
    return str(difference)


def _common_value(runs: Sequence[Result], name: str) -> str:
    """Return the number that all runs have for a flag; an empty text where they differ, or none has it."""
    values = set()
    for run in runs:
        value = run.config.get(name)
        if value is not None:
            values.add(f"{value:g}")
    return values.pop() if len(values) == 1 else ""


def _printed(setting: Mapping[str, Any], run: Result) -> paper.Cell | None:
    """Return what a paper prints of such a run."""
    model = str(setting.get("model"))
    return paper.cell(model, run.base, run.config.get("rank"), setting.get("steps"))


def _memory_by_the_papers_rule(setting: Mapping[str, Any], run: Result) -> str:
    """Return weights and optimizer state of a row of Table 2 in the paper's G; an empty text for other rows."""
    method = _PAPERS_NAME.get(run.base)
    if method is None:
        return ""
    model = str(setting.get("model"))
    rank = run.config.get("rank") or 0
    try:
        weights, optimizer = paper.rule(model, method, rank)
    except InputError:  # a model's config file that has been moved since
        return ""
    return f"{weights + optimizer:.3f}"


def heading_of(comparison: Comparison) -> str:
    """Return the setting in words."""
    setting = comparison.setting
    if not setting.get("model"):
        return "Settings unknown (no config.json that can be read): not to be compared with anything"
    model = model_name(setting["model"])
    if setting.get("init"):
        model = f"{model}, begun from {setting['init']},"
    steps = setting.get("steps")
    length = f"{steps} updates" if steps else f"{setting.get('max_tokens'):,} tokens"
    batch = f"{setting.get('total_batch_size')} × {setting['max_length']} tokens"
    text = " + ".join(texts_of(setting["data"]))
    return f"{model} on {text} ({setting['layout']}), {length} of {batch}, tokenizer {setting['tokenizer']}"


def _notes(comparison: Comparison) -> list[str]:
    """Return the paragraphs under the tables: the papers' training lengths, damaged files, how to read differences."""
    all_runs: list[Result] = []
    sources = []
    for runs in comparison.methods.values():
        all_runs += runs
        printed = _printed(comparison.setting, runs[0])
        if printed is not None:
            sources.append((printed.source, printed.length))
    tokens = 0
    for run in all_runs:
        tokens = max(tokens, run.lines[-1]["tokens_seen"])
    notes = []
    # `dict.fromkeys` drops repetitions and keeps the order, which a set does not.
    for source, length in dict.fromkeys(sources):
        notes.append(
            f"The paper's numbers: {source}, after {length} of C4; these runs saw {tokens / 1e9:.4g} billion tokens."
        )
    for run in all_runs:
        if run.unread:
            unread = " and ".join(run.unread)
            notes.append(f"Of {run.folder}, {unread} cannot be read; what is shown is without them.")
    if differences(comparison).rows:
        notes.append(_ON_DIFFERENCES)
    return notes


def _differing_settings(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the names of what the settings differ in; the folder, where they differ in nothing that is known."""
    names = []
    for name in comparisons[0].setting:
        # As texts, since a value may be a list, which a set does not take.
        values = {str(comparison.setting.get(name)) for comparison in comparisons}
        if len(values) > 1:
            names.append(name.replace("_", " "))
    return names or ["folder"]
