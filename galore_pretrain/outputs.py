"""What a run leaves beside metrics and checkpoints: ``config.json``, ``summary.json`` and the exported ``model/``."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import transformers

from galore_pretrain.config import RunConfig
from galore_pretrain.errors import InputError
from galore_pretrain.lowrank import dense_state
from galore_pretrain.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def lock(output: Path) -> TextIO:
    """Keep other runs out of ``output`` until the file that is returned is closed, or the process ends in any way."""
    _make_folder(output)
    file = (output / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"--output {output}: another run is writing there; wait for it, or give another") from error
    return file


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json.partial").touch()
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error.strerror}); give another folder") from error


def write_config(output: Path, config: RunConfig, origins: Mapping[str, str], environment: Mapping[str, Any]) -> None:
    """``config.json``: every resolved value with its origin, and what else the run depends on. The values that are
    not defaults are logged, origin by origin."""
    values = asdict(config)
    resolved = {name: {"value": value, "origin": origins[name]} for name, value in values.items()}
    _write_json(output / "config.json", {"config": resolved, **environment})
    by_origin: dict[str, list[str]] = {}
    for name, value in values.items():
        if value is not None and origins[name] != "default":
            by_origin.setdefault(origins[name], []).append(f"{name} {value}")
    for origin, settings in by_origin.items():
        log.info("%s  (%s)", " · ".join(settings), origin)


def write_summary(output: Path, summary: Mapping[str, Any]) -> None:
    """``summary.json``: how the run ended. Also the last three log lines."""
    _write_json(output / "summary.json", summary)
    steps, tokens, seconds = summary["steps"], summary["tokens_seen"], summary["wall_seconds"]
    log.info("done: %d updates, %s tokens in %.0f s; %s", steps, f"{tokens:,}", seconds, output)
    planned, peak, process = (summary[f"{name}_bytes"] for name in ("planned_peak", "peak_memory", "process_peak"))
    parts = [] if planned is None else [f"{planned / 2**30:.2f} GiB of tensors planned"]
    if peak != process:  # a CPU's allocator does not tell
        parts.append(f"{peak / 2**30:.2f} GiB of tensors on the device")
    parts.append(f"{process / 2**30:.2f} GiB of the process, its program and libraries included")
    log.info("peak memory: %s", ", ".join(parts))
    log.info("validation perplexity %.4g over %s tokens", summary["eval_perplexity"], f"{summary['eval_tokens']:,}")


def read_summary(output: Path) -> dict[str, Any]:
    """What `write_summary` wrote; empty where there is none."""
    try:
        summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return summary


def export(folder: Path, model: Any, tokenizer: Tokenizer) -> None:
    """A plain Hugging Face folder of model and tokenizer, written aside and then named."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(aside, state_dict=dense_state(model))
    tokenizer.save(aside, model_max_length=model.config.max_position_embeddings)
    config = json.loads((aside / "config.json").read_text())
    _write_json(aside / "config.json", config | {"use_cache": True})  # training has no use for a cache, generation has
    for file in aside.glob("*.safetensors"):
        file.chmod((aside / "config.json").stat().st_mode)  # safetensors makes them private to the user
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def _write_json(path: Path, value: Any) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)
