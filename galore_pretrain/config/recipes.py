"""The published hyper-parameters, each with its source. No torch in here."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from galore_pretrain.config.options import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.optim import method


def recipe(model: str, optim: str) -> dict[str, tuple[Any, str]]:
    """Hyper-parameters for a model and a method, each with its source; the more particular entry wins.

    ``configs/recipes.json`` has what holds for all and for a model, the table of methods what is a method's own.
    """
    table = _recipes()
    for_all = table["all"], table["models"].get(model, table["models"]["other"])
    found = {name: (value, entry["source"]) for entry in for_all for name, value in entry.items() if name != "source"}
    for own in method(optim).recipes:
        if own.model in (None, model):
            found |= {name: (value, own.source) for name, value in own.values.items()}
    return found


def printed_tokens(model: str) -> tuple[int, str]:
    table = _recipes()["tokens"]
    if model not in table:
        known = ", ".join(name for name in table if name != "source")
        raise InputError(f"--max-tokens recipe: no table of the paper has {model}, only {known}; give a number")
    return table[model], f"recipe: {table['source']}"


def reference_batch(config: RunConfig) -> int:
    """Sequences in a batch of the published script's evaluation, which its perplexity depends on."""
    table = _recipes()["reference_batches"]
    return int(min(table.get(Path(config.model).stem, table["other"]), config.total_batch_size))


def _recipes() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((resources.files("galore_pretrain") / "configs" / "recipes.json").read_text())
    return table
