"""Runs on the tasks of GLUE as tables: a column a task, beside what the papers print."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from galore_pretrain.config.options import model_name
from galore_pretrain.config.tasks import GLUE
from galore_pretrain.study.paper import printed
from galore_pretrain.study.results import Comparison, Result, finished
from galore_pretrain.study.seeds import Spread
from galore_pretrain.study.tables import Table

_NAMES = {
    "cola": "CoLA",
    "stsb": "STS-B",
    "mrpc": "MRPC",
    "rte": "RTE",
    "sst2": "SST-2",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "qqp": "QQP",
}
"""What tables call the tasks, in their order."""

NOTES = (
    "Per cent: Matthews' coefficient of CoLA, Pearson's of STS-B, F1 of MRPC, the mean accuracy of MNLI's two "
    "validation splits, accuracy of all others. The paper does not say whether its table has the last epoch or the "
    "best, so both are here. A best epoch is chosen on the examples that it is scored on, and reads higher for it.",
    "GaLore's rows are of 30 epochs, and its LoRA rows are said to have Hu et al.'s hyper-parameters, of 25 to 80. "
    "Natural GaLore's rows are of 3 epochs, beside GaLore's of 30: those two are not like with like.",
)


def is_of_glue(comparison: Comparison) -> bool:
    """Return whether the runs of a comparison are of a task of GLUE."""
    return comparison.setting.get("task") in GLUE


_Rows = dict[tuple[str, int | None, int | None], dict[str, list[Result]]]
"""Runs by method, rank and epochs, and by task."""


def heading(comparisons: Sequence[Comparison]) -> str:
    """Return the heading of the tables of GLUE."""
    models = dict.fromkeys(model_name(str(comparison.setting["model"])) for comparison in comparisons)
    return f"GLUE, fine-tuned from {', '.join(models)}"


def tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """Return a table of the last epoch and one of the best, of runs that have come to their end; none without such."""
    by_row: _Rows = {}
    for comparison in comparisons:
        for runs in comparison.methods.values():
            for run in finished(runs):
                config = run.config
                row = (run.base, config.get("rank"), config.get("epochs"))
                by_row.setdefault(row, {}).setdefault(config["task"], []).append(run)
    if not by_row:
        return []
    return [_table(by_row, "eval_score", "last epoch"), _table(by_row, "best_eval_score", "best epoch")]


def _table(by_row: _Rows, key: str, title: str) -> Table:
    """Return the table of one kind of score, each row above what a paper prints of it."""
    columns = [title, "epochs", *_NAMES.values(), "mean", "weights + state, 10⁶ B", "peak GiB"]
    rows = []
    for (base, rank, epochs), by_task in sorted(by_row.items(), key=lambda item: str(item[0])):
        cells = [_called(base, rank), str(epochs or "")]
        ours: dict[str, float] = {}
        for task in _NAMES:
            scores = _scores(by_task.get(task, []), key)
            cells.append(_in_words(scores))
            if scores:
                ours[task] = mean(scores)
        cells.append(_mean_of_all(ours))
        runs = [run for of_task in by_task.values() for run in of_task]
        held = max(run.summary["weights_bytes"] + run.summary["optimizer_bytes"] for run in runs)
        peak = max(run.summary["peak_memory_bytes"] for run in runs)
        rows.append([*cells, f"{held / 1e6:.0f}", f"{peak / 2**30:.2f}"])
        theirs = _printed(base, rank)
        if theirs:
            of_tasks = [f"{theirs['scores'][task]:.2f}" for task in _NAMES]
            memory = str(theirs.get("memory", ""))
            rows.append(
                [f"– {theirs['source']}", str(theirs["epochs"]), *of_tasks, f"{theirs['mean']:.2f}", memory, ""]
            )
    return Table(columns, rows)


def _called(base: str, rank: int | None) -> str:
    """Return what tables call a method with a rank."""
    return f"{base} r{rank}" if rank else base


def _scores(runs: Sequence[Result], key: str) -> list[float]:
    """Return the scores of runs in per cent; a run in which all that the model said was the same has none."""
    values = [run.summary.get(key) for run in runs]
    return [100 * float(value) for value in values if value is not None]


def _in_words(scores: Sequence[float]) -> str:
    """Return the mean of a task's scores over its seeds, and their deviation if there are several."""
    if not scores:
        return ""
    spread = Spread.of(scores)
    if spread.deviation is None:
        return f"{spread.mean:.2f}"
    return f"{spread.mean:.2f} ± {spread.deviation:.2f}"


def _mean_of_all(scores: dict[str, float]) -> str:
    """Return the mean over the tasks, where all are there."""
    if scores.keys() != _NAMES.keys():
        return ""
    return f"{mean(scores.values()):.2f}"


def _printed(base: str, rank: int | None) -> dict[str, Any] | None:
    """Return what a paper prints of a method with this rank; None where none does."""
    table: dict[str, dict[str, Any]] = printed()["glue"]
    return table.get(_called(base, rank))
