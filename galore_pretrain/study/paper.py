"""The GaLore paper's tables: as printed, memory by its own rule, exactly, and beside what `plan` says."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from galore_pretrain.config.options import RunConfig, find_model
from galore_pretrain.config.resolve import resolve
from galore_pretrain.optim import METHODS

if TYPE_CHECKING:
    from galore_pretrain.planning.plan import Static

Cells = dict[str, list[float]]
"""The numbers of a table: by method, in the order of the models."""

PRINTED = {
    "full": "adamw",
    "galore": "galore_adamw",
    "low_rank": "low_rank",
    "lora": "lora",
    "relora": "relora",
}
"""The methods of Tables 2 and 6: the paper's names for them, and this project's."""

# Parameters in millions, as the paper counts them in its memory estimates.
_NOMINAL = {
    "llama_60m": 60,
    "llama_130m": 130,
    "llama_350m": 350,
    "llama_1b": 1331.2,
}

# The rows of Figure 4: the optimizer, and whether its updates are layerwise.
_FIGURE4 = {
    "adamw_bf16": ("adamw", False),
    "adafactor": ("adafactor", False),
    "adamw8bit": ("adamw8bit", False),
    "galore_adamw8bit_retaining_grad": ("galore_adamw8bit", False),
    "galore_adamw8bit_layerwise": ("galore_adamw8bit", True),
}


def printed() -> dict[str, Any]:
    """Return the numbers of the paper's Tables 2, 3, 6, 11 and Figures 3 and 4, and of Natural GaLore's table."""
    file = resources.files("galore_pretrain") / "configs" / "paper_tables.json"
    tables: dict[str, Any] = json.loads(file.read_text())
    return tables


# -- perplexities -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """The validation perplexity that a paper prints of a run, where, and after how much training."""

    perplexity: float
    source: str
    length: str


def cell(model: str, row: str, rank: int | None, steps: int | None) -> Cell | None:
    """Return what was printed of a run of ``model`` with ``row``; None where nothing was, or at another rank."""
    # From the most specific to the least: a figure and Table 3 name the updates, Table 2 stands for any number of them.
    for look_up in (_in_figure3, _in_table3, _in_table2):
        cell_of_run = look_up(model, row, rank, steps)
        if cell_of_run is not None:
            return cell_of_run
    return None


def _in_figure3(model: str, row: str, rank: int | None, steps: int | None) -> Cell | None:
    """Return the cell of a run that is as long as those of Figure 3."""
    figure = printed()["figure3"]
    if model != figure["model"] or steps != figure["steps"] or row not in figure:
        return None
    length = f"{steps:,} updates"
    if not METHODS[row].projects:
        return Cell(figure[row], "Figure 3", length)
    if rank not in figure["rank"]:
        return None
    column = figure["rank"].index(rank)
    return Cell(figure[row][column], "Figure 3", length)


def _in_table3(model: str, row: str, rank: int | None, steps: int | None) -> Cell | None:
    """Return the cell of a run of the 7B model that is as long as one of Table 3's."""
    table = printed()["table3"]
    if model != "llama_7b" or row not in table or steps not in table["steps"]:
        return None
    if METHODS[row].projects and rank != 1024:
        return None
    column = table["steps"].index(steps)
    tokens = table["tokens_billion"][column]
    return Cell(table[row]["perplexity"][column], "Table 3", f"{tokens:g} billion tokens")


def _in_table2(model: str, row: str, rank: int | None, steps: int | None) -> Cell | None:
    """Return the cell of Table 2, or of Natural GaLore's table for the same runs, for any ``steps``."""
    # The table names tokens, and the paper's counts of updates and of tokens disagree.
    del steps
    tables = printed()
    table = tables["table2"]
    natural = tables["natural_galore"]
    method = _papers_name(row)
    if model not in table["models"]:
        return None
    if method is None and row not in natural:
        return None
    column = table["models"].index(model)
    if method != "full" and rank != table["rank"][column]:
        return None
    length = f"{table['training_tokens_billion'][column]:g} billion tokens"
    if method is None:
        # Natural GaLore's table has losses, of three digits.
        perplexity = math.exp(natural[row][column])
        return Cell(perplexity, "Natural GaLore's table (a logarithm of three digits)", length)
    return Cell(table["perplexity"][method][column], "Table 2", length)


def _papers_name(row: str) -> str | None:
    """Return the paper's name of a row of Table 2; None of another row."""
    for method, name in PRINTED.items():
        if name == row:
            return method
    return None


# -- memory -----------------------------------------------------------------------------------------------------------


def rule(model: str, method: str, rank: int) -> tuple[float, float]:
    """Return (weights, optimizer state) of a cell in the paper's G, by a rule inferred from its numbers.

    The rule is within 0.011 of all 60 cells of Tables 2 and 6. ``method`` is one of the paper's names, see `PRINTED`.
    """
    # Two bytes a number and 1024 million bytes a G. Sizes are nominal (60, 130, 350 and 1.3 × 1024 million), those of
    # other models their own. GaLore's state is three quarters of LoRA's, embeddings included, which is right for square
    # matrices alone. LoRA's embeddings are counted twice: in the model and beside the factors.
    shape = json.loads(find_model(model).read_text())
    embeddings_and_head = 2 * shape["vocab_size"] * shape["hidden_size"]
    low = (_factors(shape, rank) + embeddings_and_head) / 1e6
    full = (_matrices(shape) + embeddings_and_head) / 1e6
    nominal = _NOMINAL.get(model, full)
    weights, optimizer = {
        "full": (2 * nominal, 4 * nominal),
        "galore": (2 * nominal, 3 * low),
        "low_rank": (2 * low, 4 * low),
        "lora": (2 * (nominal + low), 4 * low),
        "relora": (2 * (nominal + low), 4 * low),
    }[method]
    return weights / 1024, optimizer / 1024


def by_the_papers_rule() -> dict[str, Any]:
    """Return Tables 2 and 6 by `rule`, in the paper's G."""
    return _memory_tables(rule, digits=4)


def exact() -> dict[str, Any]:
    """Return the same cells in 10⁹ bytes, of bf16 weights and optimizer state as they are allocated.

    A frozen matrix has no state, and embeddings are there once.
    """
    return _memory_tables(_allocated, digits=6)


def _allocated(model: str, method: str, rank: int) -> tuple[float, float]:
    """Return (weights, optimizer state) of a cell in 10⁹ bytes, as they are allocated."""
    has_rank = method != "full"
    static = _static(model, PRINTED[method], rank if has_rank else None)
    return static.weights / 1e9, static.state / 1e9


def _memory_tables(memory_of: Callable[[str, str, int], tuple[float, float]], digits: int) -> dict[str, Any]:
    """Return the paper's three tables of memory, rounded, from (model, method, rank) → (weights, optimizer state)."""
    total: Cells = {}
    weights: Cells = {}
    optimizer: Cells = {}
    table = printed()["table2"]
    for method in PRINTED:
        total[method] = []
        weights[method] = []
        optimizer[method] = []
        for model, rank in zip(table["models"], table["rank"], strict=True):
            weights_of_cell, state_of_cell = memory_of(model, method, rank)
            # The sum of what is not rounded yet.
            total[method].append(round(weights_of_cell + state_of_cell, digits))
            weights[method].append(round(weights_of_cell, digits))
            optimizer[method].append(round(state_of_cell, digits))
    return {"memory_g": total, "weights_g": weights, "optimizer_g": optimizer}


def _factors(shape: Mapping[str, Any], rank: int) -> int:
    """Return how many numbers the factors A and B of all attention and MLP matrices have."""
    h = shape["hidden_size"]
    i = shape["intermediate_size"]
    attention = 4 * (h + h) * rank
    mlp = 3 * (h + i) * rank
    return int(shape["num_hidden_layers"] * (attention + mlp))


def _matrices(shape: Mapping[str, Any]) -> int:
    """Return how many numbers all attention and MLP matrices have."""
    h = shape["hidden_size"]
    i = shape["intermediate_size"]
    attention = 4 * h * h
    mlp = 3 * h * i
    return int(shape["num_hidden_layers"] * (attention + mlp))


def _config(model: str, row: str, **flags: Any) -> RunConfig:
    """Return the configuration of a run as the authors measured it; flags that are None are left out."""
    values = {
        "model": model,
        "optim": row,
        "data": "sample",
        "total_batch_size": 1,
        "steps": 1,
        "warmup_steps": 0,
        "grad_clip": 0.0,  # the authors' layerwise updates ignore it
    }
    for name, value in flags.items():
        if value is not None:
            values[name] = value
    config, _ = resolve(values, {})
    return config


def _static(model: str, row: str, rank: int | None) -> "Static":
    """Return the bytes of weights and optimizer state, as they are allocated."""
    # These import torch, which the printed numbers and the rule do without.
    from galore_pretrain.model.llama_config import load_model_config
    from galore_pretrain.planning.plan import static_bytes

    config = _config(model, row, rank=rank)
    return static_bytes(config, load_model_config(model))


def planned_peak(model: str, row: str, layerwise: bool) -> int:
    """Return the bytes that an update of one sequence of 256 tokens takes, at the paper's rank."""
    from galore_pretrain.model.llama_config import load_model_config
    from galore_pretrain.planning.plan import measure

    config = replace(_config(model, row, batch_size=1), layerwise=layerwise)
    return measure(config, load_model_config(model)).peak_bytes


# -- all of it in Markdown --------------------------------------------------------------------------------------------


def report() -> str:
    """Return all of it in Markdown. The plans take minutes."""
    tables = printed()
    lines = ["Weights and optimizer state in bf16: printed / by the paper's rule / exact (10⁹ bytes)", ""]
    lines += _compared_estimates(tables)
    lines += _table3_memory(tables["table3"])
    lines += ["", "Peak of an update of 1 × 256 tokens: measured by the authors (GB) / planned here (10⁹ bytes)", ""]
    lines += _figure4(tables["figure4_measured_gb"])
    lines += ["", *_table11(tables["table11"])]
    return "\n".join(lines)


def _header(columns: Sequence[str]) -> list[str]:
    """Return the first two lines of a table in Markdown."""
    return [_line(columns), "|" + "---|" * len(columns)]


def _line(cells: Sequence[str]) -> str:
    """Return a line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def _compared_estimates(tables: Mapping[str, Any]) -> list[str]:
    """Return the lines of Tables 2 and 6, each cell as printed, by the rule, and exactly."""
    by_rule = by_the_papers_rule()
    by_allocation = exact()
    models = tables["table2"]["models"]
    lines = []
    for title, table, key in (
        ("Table 2, total", "table2", "memory_g"),
        ("Table 6, weights", "table6", "weights_g"),
        ("Table 6, optimizer", "table6", "optimizer_g"),
    ):
        lines += _header([title, *models])
        for method in PRINTED:
            cells = [method]
            for column in range(len(models)):
                in_print = tables[table][key][method][column]
                ruled = by_rule[key][method][column]
                allocated = by_allocation[key][method][column]
                cells.append(f"{in_print:.2f} / {ruled:.3f} / {allocated:.3f}")
            lines.append(_line(cells))
        lines.append("")
    return lines


def _table3_memory(table: Mapping[str, Any]) -> list[str]:
    """Return the lines of Table 3: memory of the 7B model as printed, and exactly."""
    lines = _header(["Table 3, llama_7b", "printed G", "exact: weights + state, 10⁹ bytes"])
    for row, rank in (("galore_adamw8bit", 1024), ("adamw8bit", None)):
        static = _static("llama_7b", row, rank)
        allocated = f"{static.weights / 1e9:.2f} + {static.state / 1e9:.2f}"
        lines.append(_line([row, str(table[row]["memory_g"]), allocated]))
    return lines


def _figure4(figure: Mapping[str, Any]) -> list[str]:
    """Return the lines of Figure 4: peaks as the authors measured them, and as planned."""
    lines = _header(["Figure 4", *figure["models"]])
    for name, (row, layerwise) in _FIGURE4.items():
        cells = [name]
        for model, measured in zip(figure["models"], figure[name], strict=True):
            cells.append(_measured_and_planned(measured, model, row, layerwise))
        lines.append(_line(cells))
    return lines


def _table11(table: Mapping[str, Any]) -> list[str]:
    """Return the lines of Table 11: peaks of the 1B model as the authors measured them, and as planned."""
    lines = _header(["Table 11, llama_1b", "after backward", "layerwise"])
    for row in table["global"]:
        after_backward = _measured_and_planned(table["global"][row][0], "llama_1b", row, layerwise=False)
        layerwise = _measured_and_planned(table["layerwise"][row][0], "llama_1b", row, layerwise=True)
        lines.append(_line([row, after_backward, layerwise]))
    return lines


def _measured_and_planned(measured_gb: float, model: str, row: str, layerwise: bool) -> str:
    """Return a cell: GB as measured by the authors, and 10⁹ bytes as planned."""
    planned = planned_peak(model, row, layerwise)
    return f"{measured_gb:.2f} / {planned / 1e9:.2f}"
