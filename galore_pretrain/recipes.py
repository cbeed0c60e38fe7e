"""From what the user said to a complete config: the published recipes, what follows from them, and the checks.

defaults < recipe < run JSON < flags. No torch in here: a wrong flag is refused at once.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import resources
from pathlib import Path
from typing import Any

from galore_pretrain.config import Flag, RunConfig, find_model
from galore_pretrain.errors import InputError
from galore_pretrain.optim.names import resolve_name


def resolve(given: Mapping[str, Any], sources: Mapping[str, str]) -> tuple[RunConfig, dict[str, str]]:
    """The complete config, and where each field's value came from. Raises InputError for what does not fit together.

    ``given`` holds what the user said, field by field; ``sources`` by what means (``flag``, or the name of a run JSON).
    """
    values: dict[str, Any] = {f.name: f.default for f in fields(RunConfig)} | dict(given)
    origins = {f.name: sources.get(f.name, "default") for f in fields(RunConfig)}
    origins |= {name: CHOSEN for name in ("layerwise", "activation_checkpointing") if name not in sources}
    if values["model"] is None:
        raise InputError("--model is missing; name a shipped model such as llama_60m, or a JSON config")
    for f in fields(RunConfig):
        _check_bound(f.name, f.metadata["flag"], values[f.name])

    def fill(name: str, value: Any, origin: str) -> None:
        if values[name] is None:
            values[name], origins[name] = value, origin

    find_model(values["model"])
    _name_row(values, origins)
    projected, natural = "galore" in values["optim"], "natural" in values["optim"]
    for name, why in without_meaning(values["optim"]).items():
        if values[name] is not None:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {values[name]} has no meaning for --optim {values['optim']}; {why}")
    for name, (value, source) in recipe(Path(values["model"]).stem, values["optim"]).items():
        if (projected or name not in _GALORE) and not (name == "steps" and values["max_tokens"]):
            fill(name, value, f"recipe: {source}")
    if values["steps"] and values["max_tokens"]:
        raise InputError(
            f"--steps {values['steps']} and --max-tokens {values['max_tokens']} both end the run; give one"
        )

    if projected:
        reference = values["numerics"] == "reference"
        fill("proj_type", "std", "default")
        fill("basis", "svd" if reference else "randomized", "numerics reference" if reference else "default")
        fill(
            "refresh",
            "together" if reference else "staggered",
            "numerics reference" if reference else "default",
        )
        fill("moments", "keep", "default")
    if natural:
        fill("natural_history", 20, "default")
        fill("natural_damping", 1e-3, "default")
    fill("min_lr_ratio", 0.1 if values["scheduler"] == "cosine" else 0.0, f"scheduler {values['scheduler']}")
    updates = values["steps"] or math.ceil(values["max_tokens"] / (values["total_batch_size"] * values["max_length"]))
    if values["steps"]:
        fill("warmup_steps", values["steps"] // 10, "a tenth of steps")
    for name in ("eval_every", "save_every"):
        fill(name, min(1000, math.ceil(updates / 10)), "a tenth of the run, at most 1000")
    fill("batch_size", max(micro_batches(values["total_batch_size"])), CHOSEN)
    _fill_clip_norm(values, origins)
    fill("tokenizer", {"c4": "t5", "sample": "sample"}.get(values["data"]), f"data {values['data']}")
    fill(
        "output",
        f"runs/{Path(values['model']).stem}-{values['optim']}-{time.strftime('%Y%m%d-%H%M%S')}",
        "default",
    )
    _check(values)
    return RunConfig(**values), origins


CHOSEN = "chosen"
"""Where a value came from that may still be changed to fit the memory budget."""


def micro_batches(total: int) -> list[int]:
    """Sizes of micro-batches worth considering: a larger one than 8 was slower on a CPU (8 × 256 beat 32 × 256)."""
    return [size for size in range(1, 9) if total % size == 0]


def with_execution(
    config: RunConfig, origins: Mapping[str, str], *, layerwise: bool, activation_checkpointing: bool, batch_size: int
) -> tuple[RunConfig, dict[str, str]]:
    """``config`` with another way to run its updates; InputError where that does not go with the rest."""
    chosen = {
        "layerwise": layerwise,
        "activation_checkpointing": activation_checkpointing,
        "batch_size": batch_size,
    }
    values, new_origins = asdict(config) | chosen, dict(origins)
    if new_origins["clip_norm"] == CHOSEN:
        values["clip_norm"] = None
    _fill_clip_norm(values, new_origins)
    _check(values)
    return RunConfig(**values), new_origins


def _fill_clip_norm(values: dict[str, Any], origins: dict[str, str]) -> None:
    if not values["grad_clip"]:
        if values["clip_norm"] is not None:
            raise InputError(
                f"--clip-norm {values['clip_norm']} has no meaning without --grad-clip; give one, such as 1"
            )
    elif values["clip_norm"] is None:
        low_rank_sums = values["layerwise"] and values["total_batch_size"] != values["batch_size"]
        values["clip_norm"] = "projected" if low_rank_sums and "galore" in values["optim"] else "full"
        origins["clip_norm"] = CHOSEN


_GALORE = ("rank", "update_proj_gap", "galore_scale", "proj_type", "basis", "refresh", "moments")
_NATURAL = ("natural_history", "natural_damping")


def _check_bound(name: str, flag: Flag, value: Any) -> None:
    low, bound = (flag.above, "greater than") if flag.above is not None else (flag.least, "at least")
    if low is None or value is None:
        return
    if not math.isfinite(value):
        raise InputError(f"--{name.replace('_', '-')} {value} must be a finite number")
    if value < low or value == flag.above:
        raise InputError(f"--{name.replace('_', '-')} {value} must be {bound} {low:g}")


def _name_row(values: dict[str, Any], origins: dict[str, str]) -> None:
    """The row that ``--optim`` means; a name that says so also asks for layerwise updates."""
    name = values["optim"]
    try:
        values["optim"], layerwise = resolve_name(name)
    except ValueError as error:
        raise InputError(f"--optim {error}") from error
    if layerwise and not values["layerwise"]:
        if origins["layerwise"] != CHOSEN:
            raise InputError(
                f"--optim {name} asks for --layerwise; leave out --no-layerwise, or name {values['optim']}"
            )
        values["layerwise"], origins["layerwise"] = True, f"optim {name}"


def without_meaning(optim: str) -> dict[str, str]:
    """The fields that a row has no use for, and why."""
    projected, natural = "galore" in optim, "natural" in optim
    found = {} if projected else dict.fromkeys(_GALORE, "only GaLore rows project")
    return found | ({} if natural else dict.fromkeys(_NATURAL, "only natural_galore rows have a history"))


def _check(values: Mapping[str, Any]) -> None:
    """What depends on two fields; each message says which, and the way out."""
    total, size = values["total_batch_size"], values["batch_size"]
    if total % size:
        below = max(d for d in range(1, min(size, total) + 1) if total % d == 0)
        raise InputError(
            f"--total-batch-size {total} is not a multiple of --batch-size {size}; the nearest divisor is {below}"
        )
    projected = "galore" in values["optim"]
    if values["layerwise"] and total != size and values["clip_norm"] == "full" and projected:
        raise InputError(
            f"--clip-norm full: --layerwise updates of {total // size} micro-batches keep low-rank sums, which do not "
            f"tell the norm of the full gradient; use --clip-norm projected, --batch-size {total}, or --no-layerwise"
        )
    if values["steps"] and values["warmup_steps"] > values["steps"]:
        raise InputError(f"--warmup-steps {values['warmup_steps']} exceeds --steps {values['steps']}")
    if values["min_lr_ratio"] > 1:
        raise InputError(f"--min-lr-ratio {values['min_lr_ratio']} must be at most 1")
    if values["tokenizer"] is None:
        raise InputError(f"--tokenizer is missing: --data {values['data']} needs one; give t5, sample or a .model file")


def recipe(model: str, optim: str) -> dict[str, tuple[Any, str]]:
    """Hyper-parameters for a model and an optimizer, each with its source; the more particular entry wins."""
    table = _recipes()
    entries = [
        table["all"],
        table["models"].get(model, table["models"]["other"]),
        table["optimizers"].get(optim, {}),
        table["cells"].get(f"{model} {optim}", {}),
    ]
    return {name: (value, entry["source"]) for entry in entries for name, value in entry.items() if name != "source"}


def reference_batch(config: RunConfig) -> int:
    """Sequences in a batch of the published script's evaluation, which its perplexity depends on."""
    table = _recipes()["reference_batches"]
    return int(min(table.get(Path(config.model).stem, table["other"]), config.total_batch_size))


def _recipes() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((resources.files("galore_pretrain") / "configs" / "recipes.json").read_text())
    return table
