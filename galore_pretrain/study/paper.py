"""The GaLore paper's tables: as printed, memory by its own rule, exactly, and beside what `plan` says."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from galore_pretrain.config.options import RunConfig, find_model
from galore_pretrain.config.resolve import resolve
from galore_pretrain.optim import METHODS

if TYPE_CHECKING:
    from galore_pretrain.planning.plan import Static

Cells = dict[str, list[float]]
PRINTED = {"full": "adamw", "galore": "galore_adamw", "low_rank": "low_rank", "lora": "lora", "relora": "relora"}
"""The methods of Tables 2 and 6 by the names that the paper has for them."""
_NOMINAL = {"llama_60m": 60, "llama_130m": 130, "llama_350m": 350, "llama_1b": 1331.2}  # millions, as the paper counts
_ROWS = {
    "adamw_bf16": ("adamw", False),
    "adafactor": ("adafactor", False),
    "adamw8bit": ("adamw8bit", False),
    "galore_adamw8bit_retaining_grad": ("galore_adamw8bit", False),
    "galore_adamw8bit_layerwise": ("galore_adamw8bit", True),
}


def printed() -> dict[str, Any]:
    """The numbers of the paper's Tables 2, 3, 6, 11 and Figures 3 and 4, and of Natural GaLore's table."""
    tables: dict[str, Any] = json.loads(
        (resources.files("galore_pretrain") / "configs" / "paper_tables.json").read_text()
    )
    return tables


@dataclass(frozen=True)
class Cell:
    """The validation perplexity that a paper prints of a run, where, and after how much training."""

    perplexity: float
    source: str
    length: str


def cell(model: str, row: str, rank: int | None, steps: int | None) -> Cell | None:
    """Return what was printed of a run of ``model`` with ``row``; None where nothing was, or at another rank."""
    places = (_in_figure3, _in_table3, _in_table2)
    return next((found for place in places if (found := place(model, row, rank, steps))), None)


def _in_figure3(model: str, row: str, rank: int | None, steps: int | None) -> Cell | None:
    figure = printed()["figure3"]
    if (model, steps) != (figure["model"], figure["steps"]) or row not in figure:
        return None
    by_rank = dict(zip(figure["rank"], figure[row], strict=True)) if METHODS[row].projects else {rank: figure[row]}
    return Cell(by_rank[rank], "Figure 3", f"{steps:,} updates") if rank in by_rank else None


def _in_table3(model: str, row: str, rank: int | None, steps: int | None) -> Cell | None:
    table = printed()["table3"]
    if model != "llama_7b" or row not in table or steps not in table["steps"]:
        return None
    if METHODS[row].projects and rank != 1024:
        return None
    column = table["steps"].index(steps)
    return Cell(table[row]["perplexity"][column], "Table 3", f"{table['tokens_billion'][column]:g} billion tokens")


def _in_table2(model: str, row: str, rank: int | None, steps: int | None) -> Cell | None:
    """For any ``steps``: the table names tokens, and the paper's counts of the two disagree."""
    del steps
    table, natural = printed()["table2"], printed()["natural_galore"]
    method = next((method for method, name in PRINTED.items() if name == row), None)
    if model not in table["models"] or (method is None and row not in natural):
        return None
    column = table["models"].index(model)
    if method != "full" and rank != table["rank"][column]:
        return None
    length = f"{table['training_tokens_billion'][column]:g} billion tokens"
    if method is None:
        return Cell(math.exp(natural[row][column]), "Natural GaLore's table (a logarithm of three digits)", length)
    return Cell(table["perplexity"][method][column], "Table 2", length)


def rule(model: str, method: str, rank: int) -> tuple[float, float]:
    """(weights, optimizer state) of a cell in the paper's G, by a rule inferred from its numbers: within 0.011 of all
    60 cells of Tables 2 and 6.

    Two bytes a number and 1024 million bytes a G; nominal sizes (60, 130, 350 and 1.3 × 1024 million; other models'
    own); GaLore's state as three quarters of LoRA's, embeddings included, which is right for square matrices alone;
    LoRA's embeddings counted twice.
    """
    shape = json.loads(find_model(model).read_text())
    factors, ends = _factors(shape, rank), 2 * shape["vocab_size"] * shape["hidden_size"]
    low, nominal = (factors + ends) / 1e6, _NOMINAL.get(model, (_matrices(shape) + ends) / 1e6)
    weights, optimizer = {
        "full": (2 * nominal, 4 * nominal),
        "galore": (2 * nominal, 3 * low),
        "low_rank": (2 * low, 4 * low),
        "lora": (2 * (nominal + low), 4 * low),
        "relora": (2 * (nominal + low), 4 * low),
    }[method]
    return weights / 1024, optimizer / 1024


def by_the_papers_rule() -> dict[str, Any]:
    """Tables 2 and 6 by `rule`."""
    weights: Cells = {method: [] for method in PRINTED}
    optimizer: Cells = {method: [] for method in PRINTED}
    table = printed()["table2"]
    for name, rank in zip(table["models"], table["rank"], strict=True):
        for method in PRINTED:
            w, o = rule(name, method, rank)
            weights[method].append(w)
            optimizer[method].append(o)
    return _laid_out(weights, optimizer, round_to=4)


def exact() -> dict[str, Any]:
    """Return the same cells in 10⁹ bytes, of bf16 weights and optimizer state as they are allocated.

    A frozen matrix has no state, and embeddings are there once.
    """
    weights: Cells = {method: [] for method in PRINTED}
    optimizer: Cells = {method: [] for method in PRINTED}
    table = printed()["table2"]
    for name, rank in zip(table["models"], table["rank"], strict=True):
        for method, row in PRINTED.items():
            static = _static(name, row, rank=None if method == "full" else rank)
            weights[method].append(static.weights / 1e9)
            optimizer[method].append(static.state / 1e9)
    return _laid_out(weights, optimizer, round_to=6)


def _laid_out(weights: Cells, optimizer: Cells, round_to: int) -> dict[str, Any]:
    def rounded(cells: Cells) -> Cells:
        return {method: [round(value, round_to) for value in values] for method, values in cells.items()}

    total = {m: [w + o for w, o in zip(weights[m], optimizer[m], strict=True)] for m in PRINTED}
    return {"memory_g": rounded(total), "weights_g": rounded(weights), "optimizer_g": rounded(optimizer)}


def _factors(shape: Mapping[str, Any], rank: int) -> int:
    """Numbers in the factors A and B of all attention and MLP matrices."""
    h, i = shape["hidden_size"], shape["intermediate_size"]
    return int(shape["num_hidden_layers"] * (8 * h * rank + 3 * (h + i) * rank))


def _matrices(shape: Mapping[str, Any]) -> int:
    """Numbers in all attention and MLP matrices."""
    h, i = shape["hidden_size"], shape["intermediate_size"]
    return int(shape["num_hidden_layers"] * (4 * h * h + 3 * h * i))


def _config(model: str, row: str, **given: Any) -> RunConfig:
    values = {"model": model, "optim": row, "data": "sample", "total_batch_size": 1, "steps": 1, "warmup_steps": 0}
    values |= {"grad_clip": 0.0}  # the authors' layerwise updates ignore it
    config, _ = resolve(values | {key: value for key, value in given.items() if value is not None}, {})
    return config


def _static(model: str, row: str, **given: Any) -> "Static":
    from galore_pretrain.model.llama_config import load_model_config  # torch: printed numbers and the rule need none
    from galore_pretrain.planning.plan import static_bytes

    return static_bytes(_config(model, row, **given), load_model_config(model))


def report() -> str:
    """All of it in Markdown. The plans take minutes."""
    tables, paper, true = printed(), by_the_papers_rule(), exact()
    lines = ["Weights and optimizer state in bf16: printed / by the paper's rule / exact (10⁹ bytes)", ""]
    for title, printed_cells, key in (
        ("Table 2, total", tables["table2"]["memory_g"], "memory_g"),
        ("Table 6, weights", tables["table6"]["weights_g"], "weights_g"),
        ("Table 6, optimizer", tables["table6"]["optimizer_g"], "optimizer_g"),
    ):
        lines += [f"| {title} | {' | '.join(tables['table2']['models'])} |", "|---|---|---|---|---|"]
        for method in PRINTED:
            rows = zip(printed_cells[method], paper[key][method], true[key][method], strict=True)
            lines.append(f"| {method} | {' | '.join(f'{a:.2f} / {b:.3f} / {c:.3f}' for a, b, c in rows)} |")
        lines.append("")
    lines += ["| Table 3, llama_7b | printed G | exact: weights + state, 10⁹ bytes |", "|---|---|---|"]
    for row, rank in (("galore_adamw8bit", 1024), ("adamw8bit", None)):
        static = _static("llama_7b", row, rank=rank)
        bytes_of = f"{static.weights / 1e9:.2f} + {static.state / 1e9:.2f}"
        lines.append(f"| {row} | {tables['table3'][row]['memory_g']} | {bytes_of} |")
    lines += ["", "Peak of an update of 1 × 256 tokens: measured by the authors (GB) / planned here (10⁹ bytes)", ""]
    figure = tables["figure4_measured_gb"]
    lines += [f"| Figure 4 | {' | '.join(figure['models'])} |", "|---|---|---|---|---|"]
    for name, (row, layerwise) in _ROWS.items():
        cells = [
            f"{theirs:.2f} / {planned_peak(model, row, layerwise) / 1e9:.2f}"
            for model, theirs in zip(figure["models"], figure[name], strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| Table 11, llama_1b | after backward | layerwise |", "|---|---|---|"]
    for row in tables["table11"]["global"]:
        cells = [
            f"{tables['table11'][mode][row][0]:.2f} / {planned_peak('llama_1b', row, mode == 'layerwise') / 1e9:.2f}"
            for mode in ("global", "layerwise")
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def planned_peak(model: str, row: str, layerwise: bool) -> int:
    """Bytes that an update of one sequence of 256 tokens takes, at the paper's rank."""
    from galore_pretrain.model.llama_config import load_model_config
    from galore_pretrain.planning.plan import measure

    config = _config(model, row, batch_size=1)
    return measure(replace(config, layerwise=layerwise), load_model_config(model)).peak_bytes
