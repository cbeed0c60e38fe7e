"""What a checkpoint holds of a run; which one a run goes on from, whether it may, and putting everything back."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from galore_pretrain import checkpoint
from galore_pretrain.config import RunConfig
from galore_pretrain.data import TrainingData
from galore_pretrain.errors import InputError
from galore_pretrain.outputs import read_summary
from galore_pretrain.recipes import CHOSEN, with_execution
from galore_pretrain.schedule import Schedule

if TYPE_CHECKING:
    from galore_pretrain.trainer import TrainState

log = logging.getLogger(__name__)


def find_checkpoint(config: RunConfig, output: Path) -> Path | None:
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
        if not found.is_dir():
            raise InputError(f"--resume {found}: no such folder; give auto, never, or a checkpoint's folder")
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


def as_before(config: RunConfig, origins: Mapping[str, str], output: Path) -> tuple[RunConfig, dict[str, str]] | None:
    """The way in which the run in ``output`` was going, where no flag says otherwise; None where none was. The memory
    that is free now may suggest another, which would change roundings."""
    found = Path(config.resume) if config.resume not in ("auto", "never") else checkpoint.latest(output / "checkpoints")
    if config.resume == "never" or found is None or not found.is_dir():
        return None
    saved = checkpoint.read_state(found)["config"]
    chosen = {
        name: saved[name] if origins[name] == CHOSEN else getattr(config, name)
        for name in ("layerwise", "activation_checkpointing", "batch_size")
    }
    if config.total_batch_size % chosen["batch_size"]:  # another total batch, refused elsewhere
        return None
    kept, origins = with_execution(config, origins, **chosen)
    if origins["clip_norm"] == CHOSEN and saved["clip_norm"] == "projected":  # which every way of updating knows
        kept = replace(kept, clip_norm="projected")
    return kept, origins


def is_finished(output: Path, resumed: Path, schedule: Schedule) -> bool:
    trained = checkpoint.read_state(resumed)["trainer"]
    written = read_summary(output).get("steps") == trained["step"] and (output / "model").is_dir()
    return written and schedule.is_over(trained["step"], trained["tokens_seen"])


def restore(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: "TrainState", data: TrainingData
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
        torch.cuda.set_rng_state(tensors["random.cuda"], next(model.parameters()).device)
    log.info("going on from %s at update %d", folder, state.step)
    return saved


def write_checkpoint(
    config: RunConfig,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: "TrainState",
    remains: Mapping[str, Any],
) -> None:
    """Everything as it is now, for `restore`, which returns ``remains`` among the rest."""
    root = Path(config.output) / "checkpoints"
    meta = {
        "config": asdict(config),
        "trainer": state.state_dict(),
        "counts": checkpoint.named_counts(optimizer),
        **remains,
    }
    checkpoint.save(checkpoint.folder_of(root, state.step), checkpoint.named_tensors(model, optimizer), meta)
    checkpoint.prune(root, config.keep)


def check_unchanged(config: RunConfig, resumed: Path | None, inputs: Mapping[str, str]) -> None:
    before = checkpoint.read_state(resumed).get("inputs", {}) if resumed else {}
    changed = [name for name, value in inputs.items() if before.get(name, value) != value]
    if changed and not config.resume_with_changes:
        raise InputError(
            f"{resumed} was made with another {' and '.join(changed)} than there is now; restore it, "
            "give another --output, or insist with --resume-with-changes"
        )
