"""A run's folder: its lock, its room, and what it leaves there beside metrics and checkpoints."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from galore_pretrain.config.options import RunConfig
from galore_pretrain.dist import ALONE, World
from galore_pretrain.errors import InputError
from galore_pretrain.rundir.checkpoint import FORMAT, present, sync
from galore_pretrain.text.batches import Batch

log = logging.getLogger(__name__)
_ROWS_KEPT = 20


class RunDirectory:
    """The folder of a run. The main process of ``world`` alone reads and writes there.

    All processes call each method together: in the others it does nothing, and raises what was raised in the first.
    """

    def __init__(self, path: Path, world: World = ALONE) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self._world = world

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder, made if need be, until the end, or until the process ends in any way.

        Where nothing was written, the folder is left as it was. InputError where a process does not see the lock that
        the first one has just made.
        """
        with ExitStack() as stack:
            self._world.on_rank_zero(lambda: stack.enter_context(_lock(self.path)))
            self._world.on_every_rank(self.check_shared, lambda result: "")
            yield

    def check_shared(self) -> None:
        """Raise InputError where this process does not see the lock that the first one has made."""
        if not (self.path / ".lock").exists():
            unseen = "the first process writes there, and it is not seen here; all hosts must share it"
            raise InputError(f"--output {self.path}: {unseen}")

    def check_space(self, config: RunConfig, checkpoint_bytes: int) -> None:
        """Log a warning where the disk has no room for the checkpoints that are still to come and the exported model.

        Of the checkpoints, those count that will be there at once, one of them being written.
        """
        updates = config.steps or (config.max_tokens or 0) // (config.total_batch_size * config.max_length)
        kept = config.keep
        if config.keep_every:
            kept += updates // config.keep_every  # when the run is over
        self._world.on_rank_zero(lambda: _check_space(self.path, checkpoint_bytes, kept))

    def write_config(self, config: RunConfig, origins: Mapping[str, str], environment: Mapping[str, Any]) -> None:
        """Write ``config.json``: every resolved value with its origin, and what else the run depends on."""
        resolved = {name: {"value": value, "origin": origins[name]} for name, value in config.values().items()}
        content = {"format": FORMAT, "config": resolved, **environment}
        self._world.on_rank_zero(lambda: write_json(self.path / "config.json", content))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``: how the run ended. Its numbers are also the last three log lines."""
        self._world.on_rank_zero(lambda: _write_summary(self.path, summary))

    def keep_rows(self, step: int, batch: Batch, loss: float) -> None:
        """Write the rows of an update that was skipped to ``skipped/``, for a look: those of all processes.

        Of the first twenty such updates. Rows that cannot be written are a warning.
        """
        gathered = self._world.gathered
        rows = {"input_ids": gathered(batch.input_ids), "labels": gathered(batch.labels)}
        if batch.places is not None:
            rows["places"] = gathered(batch.places)
        if not self._world.is_main:
            return
        folder = self.path / "skipped"
        file = folder / f"update_{step:08d}.safetensors"
        noted = {"update": str(step), "loss": str(loss), "position": json.dumps(batch.state)}
        try:
            folder.mkdir(exist_ok=True)
            if len(list(folder.iterdir())) >= _ROWS_KEPT:
                return
            save_file(rows, file, metadata=noted)
        except (OSError, SafetensorError) as error:
            log.warning("the rows of update %d cannot be written to %s (%s)", step, file, error)
            return
        log.warning("the rows of update %d are in %s", step, file)


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """Hold the lock of a folder; InputError where the folder cannot be written, or another run holds its lock."""
    try:
        is_new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("w")
    except (OSError, ValueError) as error:  # a ValueError where no file can have such a name
        why = getattr(error, "strerror", None) or error
        shown = str(output).encode(errors="backslashreplace").decode()
        raise InputError(f"--output {shown} cannot be written ({why}); give another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError("another run has just left")
        except BlockingIOError as error:
            raise InputError(
                f"--output {output}: another run is writing there; wait for it, or give another"
            ) from error
        except OSError as error:  # a file system without locks
            log.warning("--output %s cannot be locked (%s): take care that no other run writes there", output, error)
        try:
            yield
        finally:
            if [f.name for f in output.iterdir()] == [".lock"]:
                (output / ".lock").unlink()
                if is_new:
                    output.rmdir()


def _check_space(output: Path, checkpoint_bytes: int, kept: int) -> None:
    more = max(1, kept + 1 - present(output / "checkpoints"))
    needed = checkpoint_bytes * (more + 1)  # the exported model is not larger than a checkpoint
    free = shutil.disk_usage(output).free
    if needed > free:
        log.warning(
            "--output %s: %.1f GB are free, and %d more checkpoints of %.1f GB and the model may take %.1f GB; make "
            "room, or give a smaller --keep",
            *(output, free / 1e9, more, checkpoint_bytes / 1e9, needed / 1e9),
        )


def log_config(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Log the values that are not defaults, origin by origin."""
    by_origin: dict[str, list[str]] = {}
    for name, value in config.values().items():
        if value is not None and origins[name] != "default":
            by_origin.setdefault(origins[name], []).append(f"{name} {value}")
    for origin, settings in by_origin.items():
        log.info("%s  (%s)", " · ".join(settings), origin)


def _write_summary(output: Path, summary: Mapping[str, Any]) -> None:
    write_json(output / "summary.json", summary)
    tokens = f"{summary['tokens_seen']:,}"
    log.info("done: %d updates, %s tokens in %.0f s; %s", summary["steps"], tokens, summary["wall_seconds"], output)
    planned = summary["planned_peak_bytes"]
    peak = summary["peak_memory_bytes"]
    process = summary["process_peak_bytes"]
    parts = []
    if planned is not None:
        parts.append(f"{planned / 2**30:.2f} GiB of tensors planned")
    if peak != process:  # a CPU's allocator does not tell
        parts.append(f"{peak / 2**30:.2f} GiB of tensors on the device")
    parts.append(f"{process / 2**30:.2f} GiB of the process, its program and libraries included")
    log.info("peak memory: %s", ", ".join(parts))
    if "eval_perplexity" in summary:
        bits = summary.get("eval_bits_per_byte")
        per_byte = "" if bits is None else f", {bits:.4g} bits per byte,"
        evaluated = f"{summary['eval_tokens']:,}"
        log.info("validation perplexity %.4g%s over %s tokens", summary["eval_perplexity"], per_byte, evaluated)
    elif "best_eval_score" in summary:
        log.info(
            "score of the last epoch %.4f, the best %.4f after update %d",
            *(summary["eval_score"], summary["best_eval_score"], summary["best_step"]),
        )
    else:
        log.info("no epoch has a score: all that the model says is the same")


def read_summary(output: Path) -> dict[str, Any]:
    """Return the content of ``summary.json`` under ``output``; empty where there is none."""
    try:
        summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return summary


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, complete or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    sync(aside)
    os.replace(aside, path)
