"""What a checkpoint holds of a run; which one a run goes on from, whether it may, and putting everything back."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from galore_pretrain.config.options import RunConfig, processes
from galore_pretrain.config.resolve import CHOSEN, with_execution
from galore_pretrain.dist import ALONE, World
from galore_pretrain.errors import InputError, TrainingFailedError
from galore_pretrain.meters import spare_bytes
from galore_pretrain.rundir import checkpoint
from galore_pretrain.rundir.checkpoint import Saved
from galore_pretrain.rundir.directory import read_summary
from galore_pretrain.text.batches import TrainingData
from galore_pretrain.train.schedule import Schedule

if TYPE_CHECKING:
    from galore_pretrain.optim import RuleOptimizer
    from galore_pretrain.train.trainer import TrainState

log = logging.getLogger(__name__)


def resolve_resume(
    config: RunConfig, origins: Mapping[str, str], output: Path
) -> tuple[RunConfig, Mapping[str, str], Saved | None, bool]:
    """Find out how a run goes on, if it has begun.

    Returns config and origins as the run was going, the checkpoint that it goes on from, and whether it goes on as
    before. InputError where the options compute something else than those that the checkpoint was made with.
    """
    found = find_checkpoint(config, output)
    if found is None:
        if read_summary(output):
            raise InputError(
                f"--output {output} holds a finished run without its checkpoints, which would be lost; give another"
            )
        return config, origins, None, False
    saved_norm = found.state["config"].get("clip_norm")
    if origins["clip_norm"] == CHOSEN and saved_norm is not None:  # another would be clipped, were it chosen anew
        config, origins = replace(config, clip_norm=saved_norm), {**origins, "clip_norm": "as before"}
    before = restore_execution(config, origins, found)
    config, origins = before or (config, origins)
    if (differences := config.differences(found.state["config"])) and not config.resume_with_changes:
        raise InputError(
            f"{found.folder} was made with other options: {', '.join(differences)}; repeat the old ones, "
            "give another --output, or insist with --resume-with-changes"
        )
    return config, origins, found, before is not None


def resume_hint(config: RunConfig) -> str:
    """The command line that goes on with a run, in words."""
    resume = " and --resume auto" if config.resume == "never" else ""
    return f"the same command with --output {config.output}{resume}"


def find_checkpoint(config: RunConfig, output: Path) -> Saved | None:
    """The checkpoint that ``--resume`` means: the newest whole one of the folder, none, or one that is named, or what
    came of that in the folder."""
    root = output / "checkpoints"
    if config.resume == "auto":
        return checkpoint.newest(root, set_aside=True)
    if config.resume == "never":
        if later := checkpoint.later_than(root, None):
            raise InputError(
                f"--resume never: {output} already holds {later[-1]}; give another --output, or remove that one"
            )
        return None
    found = Path(config.resume)
    if not found.is_dir():
        raise InputError(f"--resume {found}: no such folder; give auto, never, or a checkpoint's folder")
    if not checkpoint.is_checkpoint(found):
        raise InputError(f"--resume {found}: not a checkpoint, which is a folder with state.json")
    own = None if found.resolve().parent == root.resolve() else checkpoint.newest(root, set_aside=True)
    if own is not None and own.state.get("origin") == str(found.resolve()):  # the same command, once more
        return own
    if later := checkpoint.later_than(root, found):
        raise InputError(
            f"--resume {found}: {output} also holds {', '.join(later)}, which would be overtaken; "
            "remove those checkpoints, or give another --output"
        )
    return checkpoint.opened(found)


def restore_execution(
    config: RunConfig, origins: Mapping[str, str], found: Saved
) -> tuple[RunConfig, dict[str, str]] | None:
    """The way in which the run was going, where no flag says otherwise; None where it cannot. The memory that is free
    now may suggest another, which would change roundings."""
    saved = found.state["config"]
    chosen = {
        name: saved.get(name) if origins[name] == CHOSEN else getattr(config, name)
        for name in ("layerwise", "activation_checkpointing", "batch_size")
    }
    if None in chosen.values():
        return None
    if config.total_batch_size % (chosen["batch_size"] * processes()):  # another total batch, refused elsewhere
        return None
    try:
        return with_execution(config, origins, **chosen)
    except InputError:  # so many micro-batches a process, layerwise, do not know the norm that was clipped
        return None


def check_inputs(config: RunConfig, found: Saved, inputs: Mapping[str, str]) -> None:
    """InputError where what the run reads is not what it was."""
    before = found.state.get("inputs", {})
    changed = [name for name, value in inputs.items() if before.get(name, value) != value]
    if changed and not config.resume_with_changes:
        raise InputError(
            f"{found.folder} was made with another {' and '.join(changed)} than there is now; restore it, "
            "give another --output, or insist with --resume-with-changes"
        )


def is_finished(output: Path, found: Saved, schedule: Schedule) -> bool:
    """Whether ``output`` holds all that the run has to leave."""
    trained = found.state["trainer"]
    written = read_summary(output).get("steps") == trained["step"] and (output / "model").is_dir()
    return written and schedule.is_over(trained["step"], trained["tokens_seen"])


def restore(
    found: Saved, model: torch.nn.Module, optimizer: "RuleOptimizer", state: "TrainState", data: TrainingData
) -> None:
    """Put everything back as it was when ``found`` was written."""
    tensors = checkpoint.named_tensors(model, optimizer, load=True)
    found.load(tensors)
    checkpoint.take_loaded(optimizer, tensors)
    state.load_state_dict(found.state["trainer"])
    if state.data is not None:
        data.load_state_dict(state.data)
    checkpoint.restore_counts(optimizer, found.state["counts"])
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], next(model.parameters()).device)
    log.info("going on from %s at update %d", found.folder, state.step)


class Saver:
    """Writes a run's checkpoints. Where the last one took longer than an update, the next is copied and written in the
    background, if the process is alone and the host's memory has room for the copy. One that cannot be written is a
    warning: the run goes on.

    ``extra`` is asked at each for what else goes into it; an OSError of its means that there can be none now.
    ``found``: the checkpoint that the run goes on from. ``stalled``: seconds that training waited for them all, in the
    processes before this one too.
    """

    def __init__(
        self,
        config: RunConfig,
        model: torch.nn.Module,
        optimizer: "RuleOptimizer",
        state: "TrainState",
        extra: Callable[[], Mapping[str, Any]],
        found: Saved | None = None,
        world: World = ALONE,
    ) -> None:
        self._config, self._model, self._optimizer, self._state = config, model, optimizer, state
        self._extra, self._world = extra, world
        self._root = Path(config.output) / "checkpoints"
        own = found is not None and found.is_in(self._root)
        self._tried = self._written = self._moment() if own else None
        self._origin = None if found is None else found.state.get("origin") if own else str(found.folder.resolve())
        self.stalled = float(found.state.get("stalled", 0.0)) if found else 0.0
        self._taken = 0.0  # seconds that the last one took to be written
        self._since = time.monotonic(), state.step
        self._thread: threading.Thread | None = None

    @property
    def saved_step(self) -> int | None:
        """The update that the newest checkpoint of this run's is of; None where there is none."""
        return self._written[0] if self._written else None

    def _moment(self) -> tuple[int, bool]:
        """What tells two states of the run apart: an evaluation may be due after an update, or done."""
        return self._state.step, self._state.unlogged is None

    def save(self) -> None:
        """Save everything as it is now, for `restore`, unless that was tried already."""
        started, state, moment = time.monotonic(), self._state, self._moment()
        if moment == self._tried:
            return
        update = (started - self._since[0]) / max(1, state.step - self._since[1])
        self.wait()
        self._tried = moment
        try:
            extra = self._world.on_rank_zero(self._extra)
        except OSError as error:
            self._missed(state.step, error.strerror or str(error))
            return
        tensors = checkpoint.named_tensors(self._model, self._optimizer)
        meta = {
            "config": asdict(self._config),
            "trainer": state.state_dict(),
            "counts": checkpoint.named_counts(self._optimizer),
            "stalled": self.stalled,
            "origin": self._origin,
            **extra,
        }
        keep = None if state.skipped else self._config.keep  # what is saved among skipped updates pushes out no other
        copy = self._copied(tensors) if self._taken > update and self._world.size == 1 else None
        if copy is not None:
            self._thread = threading.Thread(target=self._write, args=(moment, copy, meta, keep))
            self._thread.start()
        else:
            self._write(moment, tensors, meta, keep)
        self._since = time.monotonic(), state.step
        self.stalled += self._since[0] - started

    def _copied(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Returns a copy of the tensors on the host; None where its memory has no room."""
        if sum(tensor.nbytes for tensor in tensors.values()) > spare_bytes():
            return None
        try:
            return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        except (MemoryError, RuntimeError):
            return None

    def finish(self) -> None:
        """Wait for the last one, and try once more if it failed. TrainingFailedError where it is not on disk."""
        started = time.monotonic()
        self.wait()
        self.stalled += time.monotonic() - started
        if self._written != self._moment():
            self._tried = None
            self.save()
            self.wait()
        if self._written != self._moment():
            raise TrainingFailedError(
                f"update {self._state.step} could not be saved in {self._config.output}; once it can be, "
                f"{resume_hint(self._config)} goes on from update {self.saved_step or 0}"
            )

    def wait(self) -> None:
        """Wait until what is written in the background is on disk, or cannot be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _missed(self, step: int, why: str) -> None:
        have = f"that of update {self.saved_step} is kept" if self.saved_step else "there is none yet"
        log.warning("the checkpoint of update %d cannot be written (%s): going on; %s", step, why, have)

    def _write(
        self, moment: tuple[int, bool], tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], keep: int | None
    ) -> None:
        started = time.monotonic()
        try:
            checkpoint.save(checkpoint.folder_of(self._root, moment[0]), tensors, meta, self._world)
        except checkpoint.NotWrittenError as error:
            self._missed(moment[0], str(error))
            return
        self._written, self._taken = moment, time.monotonic() - started
        if keep is not None and self._world.is_main:
            checkpoint.prune(self._root, keep, self._config.keep_every)
