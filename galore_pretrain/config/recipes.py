"""The published hyper-parameters, each with its source. No torch in here."""

import json
from importlib import resources
from typing import Any

from galore_pretrain.config.options import RunConfig, model_name
from galore_pretrain.errors import InputError
from galore_pretrain.optim import method


# A value may be given for all runs, for a model, for a method and for a method's runs of a model. They are entered in
# this order, so that a more particular one replaces what was entered before.
def recipe(model: str, optim: str) -> dict[str, tuple[Any, str]]:
    """Return the hyper-parameters for a model and a method, each with its source.

    ``configs/recipes.json`` has what holds for all runs and for a model. The table of methods has what is a method's.
    """
    table = _recipes()
    models = table["models"]
    values: dict[str, tuple[Any, str]] = {}
    for entry in (table["all"], models.get(model, models["other"])):
        for name, value in entry.items():
            if name != "source":
                values[name] = (value, entry["source"])
    for of_method in method(optim).recipes:
        if of_method.model in (None, model):
            for name, value in of_method.values.items():
                values[name] = (value, of_method.source)
    return values


def printed_tokens(model: str) -> tuple[int, str]:
    """Return the tokens that the paper's table names for ``model``, and the table; InputError where it has none."""
    table = _recipes()["tokens"]
    if model not in table:
        models = ", ".join(name for name in table if name != "source")
        raise InputError(f"--max-tokens recipe: no table of the paper has {model}, only {models}; give a number")
    return table[model], f"recipe: {table['source']}"


def reference_batch(config: RunConfig) -> int | None:
    """Return the sequences in a batch of the published script's evaluation, which its perplexity depends on.

    None for a task: the script is of pretraining.
    """
    if config.task is not None:
        return None
    table = _recipes()["reference_batches"]
    model = model_name(config.model)
    size: int = table.get(model, table["other"])
    return min(size, config.total_batch_size)


def _recipes() -> dict[str, Any]:
    file = resources.files("galore_pretrain") / "configs" / "recipes.json"
    table: dict[str, Any] = json.loads(file.read_text())
    return table
