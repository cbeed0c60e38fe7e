"""Finds the checkpoint that a run goes on from and whether it may; saves a run, and puts everything back."""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from galore_pretrain.config.options import ExecutionSettings, RunConfig
from galore_pretrain.config.resolve import BY_EPOCHS, known_norm, with_execution
from galore_pretrain.config.tasks import CHAT
from galore_pretrain.dist import ALONE, World
from galore_pretrain.errors import InputError, TrainingFailedError
from galore_pretrain.meters import spare_bytes
from galore_pretrain.model.architecture import architecture_of_run
from galore_pretrain.rundir import checkpoint
from galore_pretrain.rundir.checkpoint import Saved
from galore_pretrain.rundir.directory import read_summary
from galore_pretrain.text.batches import TrainingData
from galore_pretrain.text.labelled import ExampleBatches
from galore_pretrain.text.tokenizer import load_folder
from galore_pretrain.train.schedule import schedule_of

if TYPE_CHECKING:
    from galore_pretrain.optim import RuleOptimizer
    from galore_pretrain.train.trainer import TrainState

log = logging.getLogger(__name__)


class Kept(Protocol):
    """A tokenizer whose files a checkpoint holds."""

    fingerprint: str

    def files(self) -> dict[str, bytes]:
        """Return the files by name."""
        ...


@dataclass(frozen=True)
class Resumption:
    """Says how a run goes on.

    ``config`` has the execution as it was, as far as the user leaves it open. ``saved`` is the checkpoint that the run
    goes on from, None for a fresh start. ``restored`` names the settings that were taken from it. ``runs_as_before``
    says that the updates are executed as they were, so that nothing has to be chosen anew.
    """

    config: RunConfig
    saved: Saved | None = None
    restored: frozenset[str] = frozenset()
    runs_as_before: bool = False


def resolve_resume(config: RunConfig, output: Path) -> Resumption:
    """Find out how a run goes on, if it has begun.

    Raises InputError where the options compute something else than those that the checkpoint was made with.
    """
    saved = find_checkpoint(config, output)
    if saved is None:
        if read_summary(output):
            raise InputError(
                f"--output {output} holds a finished run without its checkpoints, which would be lost; give another"
            )
        return Resumption(config)
    before = saved.state["config"]
    if config.fit == "anything":
        config = _with_what_was_taken(config, saved)
    restored: frozenset[str] = frozenset()
    if config.epochs is not None and config.epochs == before.get("epochs"):
        of_epochs = {name: before[name] for name in BY_EPOCHS if getattr(config, name) is None}
        config = replace(config, **of_epochs)
        restored |= {name for name, value in of_epochs.items() if value is not None}
    if config.bos == "auto":  # what that came to is in the checkpoint
        config = replace(config, bos=before.get("bos", "no"))
        restored |= frozenset({"bos"} if config.bos == "yes" else ())
    saved_norm = before.get("clip_norm")
    if "clip_norm" in config.undecided and saved_norm is not None:  # another would be clipped, were it chosen anew
        restored |= {"clip_norm"}
        config = replace(config, clip_norm=saved_norm, undecided=config.undecided - {"clip_norm"})
    execution = saved_execution(config, before)
    if execution is not None:
        restored |= config.undecided - {"clip_norm"}
        config = replace(with_execution(config, execution), undecided=frozenset())
    differences = config.differences(before, without=_undecided_length(config, saved))
    if differences and not config.resume_with_changes:
        raise InputError(
            f"{saved.folder} was made with other options: {', '.join(differences)}; repeat the old ones, "
            "give another --output, or insist with --resume-with-changes"
        )
    return Resumption(config, saved, restored, runs_as_before=execution is not None)


# What --fit anything took, a run that goes on takes again, whatever memory is free now. A flag that asks for something
# else than before is no part of that.
def _with_what_was_taken(config: RunConfig, saved: Saved) -> RunConfig:
    """Return ``config`` with the changes that its checkpoint was made with, of what is asked for as it was then."""
    taken = []
    for name, asked, value in saved.state.get("taken", []):
        if getattr(config, name) == asked:
            taken.append((name, asked, value))
    if not taken:
        return config
    values = {name: value for name, _, value in taken}
    log.info("--fit anything took %s, as before", ", ".join(f"{name} {value}" for name, value in values.items()))
    return replace(config, **values, taken=tuple(taken), undecided=config.undecided - values.keys())


# Before the decay of --scheduler wsd, no rate has depended on how long the run will be. So a decay can be branched from
# there, and is bit for bit that of a run which had this length from its beginning.
def _undecided_length(config: RunConfig, saved: Saved) -> frozenset[str]:
    """Return the flags of the run's length, where no update up to the checkpoint has depended on them."""
    step = saved.state["trainer"]["step"]
    schedules = (schedule_of(config.values()), schedule_of(saved.state["config"]))
    if all(schedule.is_stable(step) for schedule in schedules):
        return frozenset({"steps", "warmup_steps", "decay_steps"})
    return frozenset()


def resume_hint(config: RunConfig) -> str:
    """Return the command line that goes on with a run, in words."""
    hint = f"the same command with --output {config.output}"
    if config.resume == "never":
        hint += " and --resume auto"
    return hint


def find_checkpoint(config: RunConfig, output: Path) -> Saved | None:
    """Return the checkpoint that ``--resume`` means, None for a fresh start.

    That is the newest whole one of the folder, or one that is named, or what came of that one in the folder.
    """
    root = output / "checkpoints"
    if config.resume == "auto":
        return checkpoint.newest(root, set_aside=True)
    if config.resume == "never":
        later = checkpoint.later_than(root, None)
        if later:
            raise InputError(
                f"--resume never: {output} already holds {later[-1]}; give another --output, or remove that one"
            )
        return None
    named = Path(config.resume)
    if not named.is_dir():
        raise InputError(f"--resume {named}: no such folder; give auto, never, or a checkpoint's folder")
    if not checkpoint.is_checkpoint(named):
        raise InputError(f"--resume {named}: not a checkpoint, which is a folder with state.json")
    is_from_outside = named.resolve().parent != root.resolve()
    if is_from_outside:
        newest = checkpoint.newest(root, set_aside=True)
        if newest is not None and newest.state.get("origin") == str(named.resolve()):  # the same command, once more
            return newest
    later = checkpoint.later_than(root, named)
    if later:
        raise InputError(
            f"--resume {named}: {output} also holds {', '.join(later)}, which would be overtaken; "
            "remove those checkpoints, or give another --output"
        )
    return checkpoint.opened(named)


# The memory that is free now may suggest another execution than the run had, and that would change roundings.
def saved_execution(config: RunConfig, saved: Mapping[str, Any]) -> ExecutionSettings | None:
    """Return how a run's updates were executed, where no flag says otherwise; None where that is not possible now.

    ``saved`` are the values of the config in its checkpoint.
    """
    names = config.undecided - {"clip_norm"}
    values = asdict(config.execution) | {name: saved.get(name) for name in names}
    if any(values[name] is None for name in names):
        return None
    if "clip_norm" in config.undecided:  # nothing was clipped before
        values["clip_norm"] = known_norm(config.values() | values, config.processes)
    execution = ExecutionSettings(**values)
    try:
        with_execution(config, execution)
    except InputError:
        # Another total batch or number of processes: so many micro-batches, layerwise, may not know the norm that was
        # clipped, or the micro-batch may not divide what a process is given.
        return None
    return execution


def check_inputs(config: RunConfig, saved: Saved, inputs: Mapping[str, str]) -> None:
    """Raise InputError where what the run reads is not what it was. ``inputs`` are fingerprints, by name."""
    before = saved.state.get("inputs", {})
    changed: list[str] = []
    differing: list[str] = []  # keys of the model's config
    for name, value in inputs.items():
        known = before.get(name, value)
        if name == "model":
            differing = _differing(known, value)
            is_same = not differing
        elif name == "tokenizer" and known != value:
            is_same = _kept_tokenizer(saved, config) == value
        else:
            is_same = known == value
        # A run that was stopped by its text, and made no update, begins with the text that was mended.
        is_mended_text = " text" in name and saved.state["trainer"]["step"] == 0
        if not is_same and not is_mended_text:
            changed.append(name)
    _refuse_changes(config, saved, changed, differing)


# Text and tokenizer of a run that is finished may be far away, and are not opened.
def check_model(config: RunConfig, saved: Saved) -> None:
    """Raise InputError where the model of a finished run is not what it was. Nothing but its JSON is read."""
    known = saved.state.get("inputs", {}).get("model")
    if known is None:
        return
    now = json.dumps(architecture_of_run(config).to_diff_dict())
    differing = _differing(known, now)
    _refuse_changes(config, saved, ["model"] if differing else [], differing)


def _refuse_changes(config: RunConfig, saved: Saved, changed: Sequence[str], differing: Sequence[str]) -> None:
    """Raise InputError where something that a run reads has changed, unless its user insists.

    ``differing`` are the keys of the model's config that have other values.
    """
    if changed and not config.resume_with_changes:
        keys = f" (of the model, {', '.join(differing)} differ)" if differing else ""
        raise InputError(
            f"{saved.folder} was made with another {' and '.join(changed)} than there is now; restore it, "
            f"give another --output, or insist with --resume-with-changes{keys}"
        )


# A fingerprint is of a tokenizer as its library writes it. Where another version of that writes otherwise, the files in
# the checkpoint are written by the same version now.
def _kept_tokenizer(saved: Saved, config: RunConfig) -> str | None:
    """Return the fingerprint of the tokenizer that a checkpoint holds, as it is made now; None if it holds none."""
    folder = saved.folder / checkpoint.TOKENIZER
    if not folder.is_dir():
        return None
    return load_folder(folder, config.tokenizer, with_template=config.task == CHAT).fingerprint


# Making the files of 128,000 tokens takes seconds, and what is made must be loaded to see that it is this tokenizer. A
# checkpoint's files were, when they were made.
def tokenizer_files(saved: Saved | None, tokenizer: Kept) -> dict[str, bytes]:
    """Return the tokenizer's files for the run's checkpoints, those of the one that it goes on from if it holds them.

    Raises InputError where they have to be made and cannot be, or cannot be read.
    """
    if saved is not None and saved.state.get("inputs", {}).get("tokenizer") == tokenizer.fingerprint:
        kept = saved.tokenizer_files()
        if kept:
            return kept
    return tokenizer.files()


def _differing(known: str, now: str) -> list[str]:
    """Return the keys by which two architectures differ."""
    before = _architecture(known)
    after = _architecture(now)
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _architecture(fingerprint: str) -> dict[str, Any]:
    """Return what a model is: without the version of transformers that wrote it, and the ids that a tokenizer gave it.

    A tokenizer has a fingerprint of its own.
    """
    values: dict[str, Any] = json.loads(fingerprint)
    for name in ("transformers_version", "bos_token_id", "eos_token_id"):
        values.pop(name, None)
    return values


def is_finished(output: Path, saved: Saved, config: RunConfig) -> bool:
    """Return whether ``output`` holds all that the run of ``config`` has to leave."""
    trained = saved.state["trainer"]
    if config.steps is None and config.max_tokens is None:  # as many epochs as are asked for now were not made
        return False
    schedule = schedule_of(config.values())
    if not schedule.is_over(trained["step"], trained["tokens_seen"]):
        return False
    return read_summary(output).get("steps") == trained["step"] and (output / "model").is_dir()


def restore(
    saved: Saved,
    model: torch.nn.Module,
    optimizer: "RuleOptimizer",
    state: "TrainState",
    data: TrainingData | ExampleBatches,
) -> None:
    """Put everything back as it was when the checkpoint was written."""
    tensors = checkpoint.named_tensors(model, optimizer, load=True)
    saved.load(tensors)
    checkpoint.take_loaded(optimizer, tensors)
    state.load_state_dict(saved.state["trainer"])
    if state.data is not None:
        data.load_state_dict(state.data)
    checkpoint.restore_counts(optimizer, saved.state["counts"])
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], next(model.parameters()).device)
    log.info("going on from %s at update %d", saved.folder, state.step)


class Saver:
    """Writes a run's checkpoints. One that cannot be written is a warning: the run goes on.

    Where the last one took longer than an update, the next is copied and written in the background, if the process is
    alone and the host's memory has room for the copy.

    ``extra`` is called at each for what else goes into it; if it raises OSError, there can be no checkpoint now.
    ``tokenizer`` are the files of the main process's tokenizer, which each checkpoint holds. ``resumed`` is the
    checkpoint that the run goes on from. ``stalled`` counts the seconds that training waited for
    all checkpoints, those before the run was last resumed included.
    """

    def __init__(
        self,
        config: RunConfig,
        model: torch.nn.Module,
        optimizer: "RuleOptimizer",
        state: "TrainState",
        extra: Callable[[], Mapping[str, Any]],
        tokenizer: Mapping[str, bytes],
        resumed: Saved | None = None,
        world: World = ALONE,
    ) -> None:
        self._config, self._model, self._optimizer, self._state = config, model, optimizer, state
        self._extra, self._tokenizer, self._world = extra, tokenizer, world
        self._root = Path(config.output) / "checkpoints"
        self._tried: tuple[int, bool] | None = None  # what was last tried to save
        self._written: tuple[int, bool] | None = None  # what the newest checkpoint on disk holds
        self._origin: str | None = None  # the checkpoint of another run that this one began from
        self.stalled = 0.0
        if resumed is not None:
            self.stalled = float(resumed.state.get("stalled", 0.0))
            self._origin = str(resumed.folder.resolve())
            if resumed.is_in(self._root):
                self._origin = resumed.state.get("origin")
                self._tried = self._written = self._progress()
        self._taken = 0.0  # seconds that the last one took to be written
        self._since = (time.monotonic(), state.step)  # the end of the last call of `save`, and its update
        self._thread: threading.Thread | None = None

    @property
    def saved_step(self) -> int | None:
        """Return the update after which the run's newest checkpoint was made; None where there is none."""
        if self._written is None:
            return None
        return self._written[0]

    def _progress(self) -> tuple[int, bool]:
        """Return what tells two states of the run apart: an evaluation may be due after an update, or done."""
        return self._state.step, self._state.unlogged is None

    def save(self) -> None:
        """Save everything as it is now, for `restore`, unless that was tried already."""
        started = time.monotonic()
        state, progress = self._state, self._progress()
        if progress == self._tried:
            return
        last_time, last_step = self._since
        seconds_an_update = (started - last_time) / max(1, state.step - last_step)
        self.wait()
        self._tried = progress
        try:
            extra = self._world.on_rank_zero(self._extra)
        except OSError as error:
            self._missed(state.step, error.strerror or str(error))
            return
        tensors = checkpoint.named_tensors(self._model, self._optimizer)
        meta = {
            "config": self._config.values(),
            "taken": self._config.taken,
            "trainer": state.state_dict(),
            "counts": checkpoint.named_counts(self._optimizer),
            "stalled": self.stalled,
            "origin": self._origin,
            "folder": str(Path.cwd()),  # which the relative paths of the config begin in
            **extra,
        }
        keep = None if state.skipped else self._config.keep  # what is saved among skipped updates pushes out no other
        copy = None
        if self._taken > seconds_an_update and self._world.size == 1:
            copy = self._copied(tensors)
        if copy is not None:
            self._thread = threading.Thread(target=self._write, args=(progress, copy, meta, keep))
            self._thread.start()
        else:
            self._write(progress, tensors, meta, keep)
        ended = time.monotonic()
        self._since = (ended, state.step)
        self.stalled += ended - started

    def _copied(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Return a copy of the tensors on the host; None where its memory has no room."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > spare_bytes():
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
        if self._written != self._progress():
            self._tried = None
            self.save()
            self.wait()
        if self._written != self._progress():
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
        have = "there is none yet"
        if self.saved_step:
            have = f"that of update {self.saved_step} is kept"
        log.warning("the checkpoint of update %d cannot be written (%s): going on; %s", step, why, have)

    def _write(
        self,
        progress: tuple[int, bool],
        tensors: Mapping[str, torch.Tensor],
        meta: Mapping[str, Any],
        keep: int | None,
    ) -> None:
        """Write a checkpoint, and remove what ``keep`` leaves no room for; None removes nothing."""
        step, _ = progress
        started = time.monotonic()
        try:
            folder = checkpoint.folder_of(self._root, step)
            checkpoint.save(folder, tensors, meta, self._world, self._tokenizer)
        except checkpoint.NotWrittenError as error:
            self._missed(step, str(error))
            return
        self._written = progress
        self._taken = time.monotonic() - started
        if keep is not None and self._world.is_main:
            checkpoint.prune(self._root, keep, self._config.keep_every)
