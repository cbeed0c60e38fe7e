"""From what the user said to a complete config: the published recipes, what follows from them, and the checks.

defaults < recipe < run JSON < flags. No torch in here: a wrong flag is refused at once.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from glob import has_magic
from pathlib import Path
from typing import Any

from galore_pretrain.config.options import RECIPE, Flag, RunConfig, find_model, parse_bytes, processes
from galore_pretrain.config.recipes import _printed_tokens, recipe
from galore_pretrain.errors import InputError
from galore_pretrain.optim import OPTIONS, method, resolve_name


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
        if values[name] is None and value is not None:
            values[name], origins[name] = value, origin

    find_model(values["model"])
    _name_row(values, origins)
    meaningless = without_meaning(values["optim"])
    for name, why in meaningless.items():
        if values[name] is not None:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {values[name]} has no meaning for --optim {values['optim']}; {why}")
    if values["max_tokens"] == RECIPE:
        values["max_tokens"], origins["max_tokens"] = _printed_tokens(Path(values["model"]).stem)
    for name, (value, source) in recipe(Path(values["model"]).stem, values["optim"]).items():
        if name not in meaningless and not (name == "steps" and values["max_tokens"]):
            fill(name, value, f"recipe: {source}")
    if values["steps"] and values["max_tokens"]:
        raise InputError(
            f"--steps {values['steps']} and --max-tokens {values['max_tokens']} both end the run; give one"
        )

    for name, (value, origin) in _defaults(values).items():
        if name not in meaningless:
            fill(name, value, origin)
    _fill_clip_norm(values, origins)
    _check(values)
    return RunConfig(**values), origins


def _defaults(values: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Return what follows from the rest where neither the user nor the recipe says anything, and why."""
    steps, total, paper = values["steps"], values["total_batch_size"], "GaLore appendix C.1"
    reference = values["numerics"] == "reference"
    numerics = "numerics reference" if reference else "default"
    updates = steps or math.ceil(values["max_tokens"] / (total * values["max_length"]))
    every = values["relora_every"] or math.ceil(updates / 5)
    often = min(1000, math.ceil(updates / 10)), "a tenth of the run, at most 1000"
    output = f"runs/{Path(values['model']).stem}-{values['optim']}-{time.strftime('%Y%m%d-%H%M%S')}"
    return {
        "proj_type": ("std", "default"),
        "basis": ("svd" if reference else "randomized", numerics),
        "refresh": ("together" if reference else "staggered", numerics),
        "moments": ("keep", "default"),
        "natural_history": (20, "default"),
        "natural_damping": (1e-3, "default"),
        "lora_alpha": (32.0, paper),
        "lora_dropout": (0.05, paper),
        "relora_every": (every, "chosen here: a fifth of the run"),
        "relora_warmup": (min(100, every // 10), "chosen here: a tenth of relora_every, at most 100"),
        "min_lr_ratio": (0.1 if values["scheduler"] == "cosine" else 0.0, f"scheduler {values['scheduler']}"),
        "warmup_steps": (steps // 10 if steps else None, "a tenth of steps"),
        "eval_every": often,
        "save_every": often,
        "batch_size": (max(micro_batches(total), default=1), CHOSEN),
        "tokenizer": ({"c4": "t5", "sample": "sample"}.get(values["data"]), f"data {values['data']}"),
        "output": (output, "default"),
    }


CHOSEN = "chosen"
"""Where a value came from that may still be changed to fit the memory budget."""


def micro_batches(total: int) -> list[int]:
    """Sizes of micro-batches worth considering: a larger one than 8 was slower on a CPU (8 × 256 beat 32 × 256)."""
    return [size for size in range(1, 9) if total % (size * processes()) == 0]


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
    elif values["clip_norm"] == "projected" and not method(values["optim"]).projects:
        raise InputError(f"--clip-norm projected: {values['optim']} projects nothing; leave it out")
    elif values["clip_norm"] is None:
        several = values["total_batch_size"] != values["batch_size"] * processes()
        low_rank_sums = values["layerwise"] and (several or values["reduce"] == "projected")
        values["clip_norm"] = "projected" if low_rank_sums and method(values["optim"]).projects else "full"
        origins["clip_norm"] = CHOSEN


def _check_bound(name: str, flag: Flag, value: Any) -> None:
    if isinstance(value, int) and value >= 2**63:
        raise InputError(f"--{name.replace('_', '-')} {value} must be less than 2^63")
    low, bound = (flag.above, "greater than") if flag.above is not None else (flag.least, "at least")
    if low is None or value is None:
        return
    if not math.isfinite(value):
        raise InputError(f"--{name.replace('_', '-')} {value} must be a finite number")
    if value < low or value == flag.above:
        limit = f"{low:,.0f} bytes; write a unit, such as 24GiB" if flag.kind is parse_bytes else f"{low:g}"
        raise InputError(f"--{name.replace('_', '-')} {value} must be {bound} {limit}")


def _name_row(values: dict[str, Any], origins: dict[str, str]) -> None:
    """The row that ``--optim`` means; a name that says so also asks for layerwise updates, as ``--reduce`` can."""
    name = values["optim"]
    values["optim"], layerwise = _resolved_name(name)
    if layerwise and not values["layerwise"]:
        if origins["layerwise"] != CHOSEN:
            raise InputError(
                f"--optim {name} asks for --layerwise; leave out --no-layerwise, or name {values['optim']}"
            )
        values["layerwise"], origins["layerwise"] = True, f"optim {name}"
    if values["reduce"] == "projected" and origins["layerwise"] == CHOSEN:
        values["layerwise"], origins["layerwise"] = True, "reduce projected"


def _resolved_name(name: str) -> tuple[str, bool]:
    """As `resolve_name`, but a name that is unknown is the user's: InputError."""
    try:
        return resolve_name(name)
    except ValueError as error:
        raise InputError(f"--optim {error}") from error


def without_meaning(optim: str) -> dict[str, str]:
    """The flags that a method has no use for, and why; InputError where ``optim`` names none."""
    name, _ = _resolved_name(optim)
    used = method(name).options
    return {flag: option.why for flag, option in OPTIONS.items() if flag not in used}


def left_out(optim: str) -> dict[str, None]:
    """The flags that a method does not take from those given to several, each as None."""
    flags = dict.fromkeys(without_meaning(optim))
    return flags if method(optim).projects else flags | {"reduce": None}


def _check(values: Mapping[str, Any]) -> None:
    """Check what depends on two fields. Each message says which, and the way out."""
    if values["lr"] is None:
        raise InputError(f"--lr is missing: --optim {values['optim']} has no recipe for it; give one, such as 0.001")
    total, size = values["total_batch_size"], values["batch_size"]
    if total % processes():
        raise InputError(
            f"--total-batch-size {total} is not a multiple of the {processes()} processes; give "
            f"{max(1, round(total / processes())) * processes()}, or start another number of them"
        )
    if total % (size * processes()):
        total //= processes()
        divisors = (d for d in range(1, total + 1) if total % d == 0)
        nearest = min(divisors, key=lambda d: abs(d - size))
        raise InputError(
            f"--total-batch-size {total * processes()} is not a multiple of --batch-size {size}"
            f"{f' × {processes()} processes' if processes() > 1 else ''}; the nearest --batch-size is {nearest}"
        )
    projects = method(values["optim"]).projects
    if values["reduce"] == "projected":
        _check_reduce(values)
    if values["layerwise"] and total != size * processes() and values["clip_norm"] == "full" and projects:
        raise InputError(
            f"--clip-norm full: --layerwise updates of {total // (size * processes())} micro-batches keep low-rank "
            "sums, which do not tell the norm of the full gradient; use --clip-norm projected, "
            f"--batch-size {total // processes()}, or --no-layerwise"
        )
    if values["steps"] and values["warmup_steps"] > values["steps"]:
        raise InputError(f"--warmup-steps {values['warmup_steps']} exceeds --steps {values['steps']}")
    if (values["relora_warmup"] or 0) > (values["relora_every"] or math.inf):
        raise InputError(
            f"--relora-warmup {values['relora_warmup']} exceeds --relora-every {values['relora_every']}: the learning "
            "rate would never recover from a merge"
        )
    if (values["lora_dropout"] or 0) >= 1:
        raise InputError(f"--lora-dropout {values['lora_dropout']} must be less than 1")
    if values["min_lr_ratio"] > 1:
        raise InputError(f"--min-lr-ratio {values['min_lr_ratio']} must be at most 1")
    if not values["output"]:
        raise InputError("--output is empty; give a folder")
    if values["tokenizer"] is None:
        if not Path(values["data"]).exists() and not has_magic(values["data"]):
            raise InputError(f"--data {values['data']}: no such file, folder or pattern; choose c4, sample or a path")
        raise InputError(f"--tokenizer is missing: --data {values['data']} needs one; give t5, sample or a .model file")


def _check_reduce(values: Mapping[str, Any]) -> None:
    why = None
    if not method(values["optim"]).projects:
        why = f"{values['optim']} projects nothing"
    elif not values["layerwise"]:
        why = "only --layerwise projects a gradient before it is reduced; add that"
    elif values["clip_norm"] == "full":
        why = "no process knows the full norm then; use --clip-norm projected"
    elif processes() > 1 and values["shard"] == "full":
        why = "--shard full has no replicas; use --shard hybrid or none"
    if why:
        raise InputError(f"--reduce projected: {why}")
