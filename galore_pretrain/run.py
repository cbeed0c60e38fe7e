"""The composition root: the only place where the parts of a run are chosen and joined."""

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from transformers import LlamaConfig

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


@dataclass(frozen=True)
class _Inputs:
    """What a run reads, opened and found to fit together."""

    model: LlamaConfig
    training: DocumentSource
    validation: DocumentSource
    tokenizer: Tokenizer
    rows: TokenRows

    def fingerprints(self) -> dict[str, str]:
        """What must be the same when the run goes on: the same flags can name other files."""
        return {
            "model": json.dumps(self.model.to_diff_dict(), sort_keys=True),
            "training text": self.training.fingerprint,
            "validation text": self.validation.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
        }


def train(config: RunConfig, origins: Mapping[str, str]) -> int:
    """One run, from config to exported model; the exit code. What can be refused is refused before weights exist."""
    started = time.monotonic()
    output, schedule, device = Path(config.output), _schedule(config), _device(config)
    resumed = _find_checkpoint(config, output)
    if resumed and _is_finished(output, resumed, schedule):
        log.info("%s is finished; give another --output to train anew", output)
        return 0
    inputs = _open_inputs(config)
    _check_unchanged(config, resumed, inputs.fingerprints())
    _write_config(output, config, origins, device, inputs.tokenizer)
    _hint(config, device)

    model = build_model(inputs.model, device=device, dtype=getattr(torch, config.dtype), seed=config.seed)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = _optimizer(config, model)
    _log_assignment(optimizer)
    execution: Execution = Layerwise(optimizer) if config.layerwise else GlobalStep(optimizer, config.grad_clip)
    data = TrainingData(inputs.training, inputs.rows, config.total_batch_size, config.seed)
    state = TrainState()
    saved = _restore(resumed, model, optimizer, state, data) if resumed else {}
    own = resumed is not None and resumed.resolve().parent == (output / "checkpoints").resolve()
    lines, progress, wandb = _loggers(config, output, state, saved if own else {})
    peaks = _Peaks(device, saved.get("peaks", (0, 0)))

    def seconds() -> float:
        return float(saved.get("wall_seconds", 0.0)) + time.monotonic() - started

    def save() -> None:
        meta: dict[str, Any] = {"counts": checkpoint.named_counts(optimizer), "config": asdict(config)}
        meta |= {
            "trainer": state.state_dict(),
            "metrics_bytes": lines.sync(),
            "wandb_id": wandb.run_id,
            "wall_seconds": seconds(),
            "peaks": peaks.now(),
            "inputs": inputs.fingerprints(),
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
        evaluate=_evaluator(config, model, inputs, device),
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
        if not trainer.fit():
            log.info("stopped after update %d; the same command with --output %s goes on there", state.step, output)
            return 128 + (trainer.stop_signal or 0)
        _export(output / "model", model, inputs.tokenizer)
        _write_summary(output, state, peaks.now(), seconds())
        return 0
    finally:
        for logger in trainer.loggers:
            logger.close()


def _device(config: RunConfig) -> torch.device:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"torchrun started {os.environ['WORLD_SIZE']} processes; only one is supported so far")
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


def _hint(config: RunConfig, device: torch.device) -> None:
    has_bf16 = any(torch.cpu.get_capabilities().get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
    if device.type == "cpu" and config.dtype == "bfloat16" and not has_bf16:
        log.warning("this CPU has no bfloat16 instructions: --dtype float32 would be several times as fast here")


def _open_inputs(config: RunConfig) -> _Inputs:
    """Open everything that a run reads, and refuse what does not fit."""
    model = load_model_config(config.model)
    training, validation = (open_source(config.data, split, config.eval_data) for split in ("train", "validation"))
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"--tokenizer {tokenizer.name} produces ids up to {tokenizer.vocab_size - 1}, but --model {config.model} "
            f"has a vocabulary of {model.vocab_size}; use another of the two"
        )
    if config.max_length > model.max_position_embeddings:
        raise InputError(
            f"--max-length {config.max_length} exceeds the {model.max_position_embeddings} positions of "
            f"--model {config.model}"
        )
    _optimizer(config, build_model(model, device="meta"))  # whether its options fit, at no cost
    rows = TokenRows(tokenizer, config.layout, config.max_length)
    validation_rows(validation, rows, tokens=1)  # a first one, to know that there are any
    model.eos_token_id = tokenizer.eos_id
    return _Inputs(model, training, validation, tokenizer, rows)


def _check_unchanged(config: RunConfig, resumed: Path | None, inputs: Mapping[str, str]) -> None:
    before = checkpoint.read_state(resumed).get("inputs", {}) if resumed else {}
    changed = [name for name, value in inputs.items() if before.get(name, value) != value]
    if changed and not config.resume_with_changes:
        raise InputError(
            f"{resumed} was made with another {' and '.join(changed)} than there is now; restore it, "
            "give another --output, or insist with --resume-with-changes"
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
    return optimizer


def _log_assignment(optimizer: RuleOptimizer) -> None:
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        names = sorted({name.split(".")[-2] for name in group["param_names"]})
        log.info(
            "%s updates %d tensors, %.1fM weights: %s",
            optimizer.describe(group),
            len(group["params"]),
            count / 1e6,
            ", ".join(names),
        )


def _schedule(config: RunConfig) -> Schedule:
    shared = {f.name: getattr(config, f.name) for f in fields(Schedule)}
    return Schedule(**shared)


def _evaluator(
    config: RunConfig, model: torch.nn.Module, inputs: _Inputs, device: torch.device
) -> Callable[[], Evaluation]:
    """Evaluates on the same rows each time, which are read once, when first needed."""
    kept: list[Row] = []

    def evaluate_now() -> Evaluation:
        kept[:] = kept or validation_rows(inputs.validation, inputs.rows, config.eval_tokens)
        size, reference = config.batch_size, reference_batch(config)
        return evaluate(model, kept, batch_size=size, reference_batch=reference, device=device)

    return evaluate_now


def _loggers(
    config: RunConfig, output: Path, state: TrainState, saved: Mapping[str, Any]
) -> tuple[JsonLines, Progress, Wandb]:
    """``saved`` is the state of a checkpoint in this very folder, whose files are then continued."""
    lines = JsonLines(output / "metrics.jsonl", size=saved.get("metrics_bytes", 0))
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
        run_id=saved.get("wandb_id"),
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
        if later := checkpoint.later_than(output / "checkpoints", found):
            raise InputError(
                f"--resume {found}: {output} also holds {', '.join(later)}, which would be overtaken; "
                "remove those checkpoints, or give another --output"
            )
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
    try:
        summary = json.loads((output / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    written = summary.get("steps") == trained["step"] and (output / "model").is_dir()
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
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json.partial").touch()
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error.strerror}); give another folder") from error
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


class _Peaks:
    """The largest memory peaks of a run, over all the processes that it took."""

    def __init__(self, device: torch.device, before: Sequence[int]) -> None:
        self._device, self._before = device, before

    def now(self) -> tuple[int, int]:
        """(of the device's allocator, of the process)"""
        allocator, process = self._before
        return max(allocator, peak_memory_bytes(self._device)), max(process, process_peak_bytes())


def _write_summary(output: Path, state: TrainState, peaks: tuple[int, int], wall_seconds: float) -> None:
    summary = {
        "steps": state.step,
        "tokens_seen": state.tokens_seen,
        **state.evaluation,
        "peak_memory_bytes": peaks[0],
        "process_peak_bytes": peaks[1],
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
