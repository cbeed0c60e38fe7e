"""The composition root: the only place where the parts of a run are chosen and joined."""

import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

from galore_pretrain import checkpoint
from galore_pretrain.config import RunConfig, reference_batch
from galore_pretrain.data import Row, TokenRows, TrainingData, validation_rows
from galore_pretrain.errors import InputError
from galore_pretrain.evaluate import Evaluation, evaluate
from galore_pretrain.execution import Execution, GlobalStep, Layerwise
from galore_pretrain.memory import peak_memory_bytes, process_peak_bytes
from galore_pretrain.metrics import JsonLines, Progress, Wandb
from galore_pretrain.model import build_model, load_model_config
from galore_pretrain.optim import RuleOptimizer, build_optimizer
from galore_pretrain.repro import describe_environment
from galore_pretrain.schedule import Schedule
from galore_pretrain.sources import DocumentSource, open_source
from galore_pretrain.tokenizer import Tokenizer, load_tokenizer
from galore_pretrain.trainer import Trainer, TrainState

log = logging.getLogger(__name__)


def train(config: RunConfig, origins: Mapping[str, str]) -> int:
    """One run, from config to exported model; the exit code. What can be refused is refused before weights exist."""
    started = time.monotonic()
    output = Path(config.output)
    schedule = _schedule(config)
    resumed = _find_checkpoint(config, output)
    if resumed and _is_finished(output, resumed, schedule):
        log.info("%s is finished; give another --output to train anew", output)
        return 0
    device = _device(config)
    model_config = load_model_config(config.model)
    training, validation = (open_source(config.data, split, config.eval_data) for split in ("train", "validation"))
    tokenizer = load_tokenizer(config.tokenizer)
    _check_fit(config, model_config, tokenizer)
    output.mkdir(parents=True, exist_ok=True)
    _write_config(output, config, origins, device, tokenizer)

    has_bf16 = any(torch.cpu.get_capabilities().get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
    if device.type == "cpu" and config.dtype == "bfloat16" and not has_bf16:
        log.warning("this CPU has no bfloat16 instructions: --dtype float32 would be several times as fast here")
    model_config.eos_token_id = tokenizer.eos_id
    model = build_model(model_config, device=device, dtype=getattr(torch, config.dtype), seed=config.seed)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = _optimizer(config, model)
    execution: Execution = Layerwise(optimizer) if config.layerwise else GlobalStep(optimizer, config.grad_clip)
    rows = TokenRows(tokenizer, config.layout, config.max_length)
    data = TrainingData(training, rows, config.total_batch_size, config.seed)
    state = TrainState()
    saved = _restore(resumed, model, optimizer, state, data) if resumed else {}
    lines, progress, wandb = _loggers(config, output, state, saved, going_on=resumed is not None)

    def seconds() -> float:
        return float(saved.get("wall_seconds", 0.0)) + time.monotonic() - started

    def save() -> None:
        meta: dict[str, Any] = {"counts": checkpoint.named_counts(optimizer), "config": asdict(config)}
        meta |= {
            "trainer": state.state_dict(),
            "metrics_bytes": lines.sync(),
            "wandb_id": wandb.run_id,
            "wall_seconds": seconds(),
        }
        folder = checkpoint.folder_of(output / "checkpoints", state.step)
        checkpoint.save(folder, checkpoint.named_tensors(model, optimizer), meta)
        checkpoint.prune(folder.parent, config.keep)

    trainer = Trainer(
        model=model,
        batches=data,
        optimizer=optimizer,
        execution=execution,
        schedule=schedule,
        evaluate=_evaluator(config, model, validation, rows, device),
        save=save,
        loggers=[lines, progress, wandb],
        state=state,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        save_every=config.save_every,
        mean_of_means=config.numerics == "reference",
        device=device,
    )
    _stop_on_signals(trainer)
    try:
        finished = trainer.fit()
    finally:
        for logger in trainer.loggers:
            logger.close()
    if not finished:
        log.info("stopped after update %d; the same command with --output %s goes on from there", state.step, output)
        return 128 + (trainer.stop_signal or 0)
    _export(output / "model", model, tokenizer)
    _write_summary(output, state, device, seconds())
    return 0


def _device(config: RunConfig) -> torch.device:
    name = config.device
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise InputError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device auto"
        )
    return device


def _check_fit(config: RunConfig, model_config: Any, tokenizer: Tokenizer) -> None:
    """What the model cannot take of the text."""
    if tokenizer.vocab_size > model_config.vocab_size:
        raise InputError(
            f"--tokenizer {tokenizer.name} produces ids up to {tokenizer.vocab_size - 1}, but --model {config.model} "
            f"has a vocabulary of {model_config.vocab_size}; use another of the two"
        )
    if config.max_length > model_config.max_position_embeddings:
        raise InputError(
            f"--max-length {config.max_length} exceeds the {model_config.max_position_embeddings} positions of "
            f"--model {config.model}"
        )


def _optimizer(config: RunConfig, model: torch.nn.Module) -> RuleOptimizer:
    try:
        optimizer = build_optimizer(
            model,
            config.optim,
            lr=config.lr,
            rank=config.rank,
            update_proj_gap=config.update_proj_gap,
            scale=config.galore_scale,
            proj_type=config.proj_type,
            basis=config.basis,
            refresh=config.refresh,
            betas=config.betas,
            eps=config.eps,
            numerics=config.numerics,
            weight_decay=config.weight_decay,
            matrix_lr_scale=config.matrix_lr_scale,
            seed=config.seed,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        names = sorted({re.sub(r"\d+", "*", name) for name in group["param_names"]})
        log.info(
            "%s updates %d tensors, %.1fM weights: %s",
            optimizer.describe(group),
            len(group["params"]),
            count / 1e6,
            ", ".join(names),
        )
    return optimizer


def _schedule(config: RunConfig) -> Schedule:
    shared = {f.name: getattr(config, f.name) for f in fields(Schedule)}
    return Schedule(**shared)


def _evaluator(
    config: RunConfig, model: torch.nn.Module, source: DocumentSource, rows: TokenRows, device: torch.device
) -> Callable[[], Evaluation]:
    """Evaluates on the same rows each time, which are read once, when first needed."""
    kept: list[Row] = []

    def evaluate_now() -> Evaluation:
        kept[:] = kept or validation_rows(source, rows, config.eval_tokens)
        size, reference = config.batch_size, reference_batch(config)
        return evaluate(model, kept, batch_size=size, reference_batch=reference, device=device)

    return evaluate_now


def _loggers(
    config: RunConfig, output: Path, state: TrainState, saved: Mapping[str, Any], *, going_on: bool
) -> tuple[JsonLines, Progress, Wandb]:
    """A run that goes on in its own folder goes on in its own files."""
    own = going_on and Path(saved["config"]["output"]).resolve() == output.resolve()
    lines = JsonLines(output / "metrics.jsonl", size=saved["metrics_bytes"] if own else 0)
    if config.steps:
        progress = Progress(config.steps, "step", state.step)
    else:
        progress = Progress(config.max_tokens or 0, "token", state.tokens_seen)
    wandb = Wandb(
        config.wandb,
        output,
        project=config.wandb_project,
        name=config.name or output.name,
        tags=[tag for tag in (config.tags or "").split(",") if tag],
        config=asdict(config),
        run_id=saved["wandb_id"] if own else None,
    )
    return lines, progress, wandb


def _find_checkpoint(config: RunConfig, output: Path) -> Path | None:
    """The checkpoint to go on from; refused where its config computes something else."""
    found = checkpoint.latest(output / "checkpoints")
    if config.resume == "never":
        if found:
            raise InputError(
                f"--resume never: {output} already holds {found.name}; give another --output, or remove that one"
            )
        return None
    if config.resume != "auto":
        found = Path(config.resume)
    if found is None:
        return None
    state = checkpoint.read_state(found)
    if (differences := config.differences(state["config"])) and not config.resume_with_changes:
        raise InputError(
            f"{found} was made with other options: {', '.join(differences)}; repeat the old ones, "
            "give another --output, or insist with --resume-with-changes"
        )
    return found


def _is_finished(output: Path, resumed: Path, schedule: Schedule) -> bool:
    trained = checkpoint.read_state(resumed)["trainer"]
    written = (output / "summary.json").is_file() and (output / "model").is_dir()
    return written and schedule.is_over(trained["step"], trained["tokens_seen"])


def _restore(
    folder: Path, model: torch.nn.Module, optimizer: RuleOptimizer, state: TrainState, data: TrainingData
) -> dict[str, Any]:
    """Everything as it was when ``folder`` was written; what else it remembers is returned."""
    tensors = checkpoint.named_tensors(model, optimizer)
    saved = checkpoint.load(folder, tensors)
    state.load_state_dict(saved["trainer"])
    if state.data is not None:
        data.load_state_dict(state.data)
    checkpoint.restore_counts(optimizer, saved["counts"])
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    log.info("going on from %s at update %d", folder, state.step)
    return saved


def _write_config(
    output: Path, config: RunConfig, origins: Mapping[str, str], device: torch.device, tokenizer: Tokenizer
) -> None:
    """``config.json``: every resolved value with its origin, and what else the run depends on."""
    values = asdict(config)
    resolved = {name: {"value": value, "origin": origins[name]} for name, value in values.items()}
    rest = {"tokenizer_sha256": tokenizer.fingerprint, "device": str(device), **describe_environment(device)}
    _write_json(output / "config.json", {"config": resolved, **rest})
    by_origin: dict[str, list[str]] = {}
    for name, value in values.items():
        if value is not None and origins[name] != "default":
            by_origin.setdefault(origins[name], []).append(f"{name} {value}")
    for origin, settings in by_origin.items():
        log.info("%s  (%s)", " · ".join(settings), origin)


def _write_summary(output: Path, state: TrainState, device: torch.device, wall_seconds: float) -> None:
    summary = {
        "steps": state.step,
        "tokens_seen": state.tokens_seen,
        **state.evaluation,
        "peak_memory_bytes": peak_memory_bytes(device),
        "process_peak_bytes": process_peak_bytes(),
        "planned_peak_bytes": None,
        "wall_seconds": wall_seconds,
    }
    _write_json(output / "summary.json", summary)
    perplexities = state.evaluation["eval_perplexity"], state.evaluation["eval_reference_perplexity"]
    log.info("done: %d updates, %s tokens in %.0f s; %s", state.step, f"{state.tokens_seen:,}", wall_seconds, output)
    log.info("validation perplexity %.4g (%.4g as the published code counts)", *perplexities)


def _export(folder: Path, model: Any, tokenizer: Tokenizer) -> None:
    """A plain Hugging Face folder, written aside and then named."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(aside)
    tokenizer.save(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def _write_json(path: Path, value: Any) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)


def _stop_on_signals(trainer: Trainer) -> None:
    """The first SIGINT or SIGTERM lets the update finish and be saved; a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        trainer.stop_signal = number
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
