"""Send the numbers of a run to a JSON Lines file, to a progress bar or plain lines, and to wandb."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Protocol
from urllib.parse import urlsplit

from tqdm import tqdm

from galore_pretrain.config.evaluated import further_texts
from galore_pretrain.config.options import RunConfig
from galore_pretrain.config.tasks import GLUE

Metrics = dict[str, float | int | None]
log = logging.getLogger(__name__)


class MetricLogger(Protocol):
    """Takes the numbers of one update at a time."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Take ``metrics``, under the keys of ``metrics.jsonl``, after ``step`` complete updates."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the logger, in plain JSON values, once everything logged is safe.

        Raises OSError where it cannot be made safe now.
        """
        ...

    def close(self) -> bool:
        """Take no more. Return whether the logger has ended: if not, Python's own exit would wait for it."""
        ...


def open_loggers(
    config: RunConfig, folder: Path, step: int, tokens_seen: int, saved: Mapping[str, Any]
) -> list[MetricLogger]:
    """Open the loggers of a run that has made ``step`` updates with ``tokens_seen`` real tokens.

    ``saved`` is the state of a checkpoint in this very ``folder``, whose files are then continued; or empty.
    """
    path = folder / "metrics.jsonl"
    if not saved and path.exists() and path.stat().st_size:
        older = path.with_name("metrics.jsonl.old")
        os.replace(path, older)
        log.warning("no checkpoint was written here: starting anew; the lines of before are in %s", older)
    lines = JsonLines(path, size=saved.get("metrics_bytes", 0))
    if config.steps:
        progress = Progress(config.steps, "step", step, predicts_text=config.task not in GLUE)
    else:
        progress = Progress(config.max_tokens or 0, "token", tokens_seen)
    wandb = Wandb(
        config.wandb,
        folder,
        project=config.wandb_project,
        name=config.name,
        tags=_tags(config),
        config=config.values(),
        run_id=saved.get("wandb_id"),
        earlier=lines.read(),
    )
    return [lines, progress, wandb]


def _tags(config: RunConfig) -> list[str] | None:
    """Return the tags of ``--tags``; None where it was not given."""
    if config.tags is None:
        return None
    return [tag for tag in config.tags.split(",") if tag]


class JsonLines:
    """``metrics.jsonl``: one object a line, numbers with all their digits, a non-finite number as null.

    A resumed run cuts the file to what it held when its checkpoint was written, so it reads as if never interrupted.
    Lines that cannot be written wait until they can.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        self._waiting = b""
        self._warned = False
        self._file = path.open("ab", buffering=0)
        if self._file.tell() < size:
            log.warning("%s is shorter than the checkpoint remembers; its end is missing", path)
            size = path.read_bytes().rfind(b"\n") + 1  # up to the last complete line
        self._file.truncate(size)
        self._size = self._file.seek(0, os.SEEK_END)

    def read(self) -> Iterator[tuple[int, Metrics]]:
        """Yield what the file held when this was called: the steps, each with its numbers. It is read as it is used."""
        return _read_lines(self.path, self._size)

    def log(self, metrics: Metrics, step: int) -> None:
        """Write one line, or keep it until it can be written. The first failure in a row is a warning."""
        line: Metrics = {"step": step}
        for key, value in metrics.items():
            # JSON has no word for infinities and NaN.
            is_non_finite = isinstance(value, float) and not math.isfinite(value)
            line[key] = None if is_non_finite else value
        self._waiting += json.dumps(line).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s): its lines wait", self.path, error.strerror)
            self._warned = True

    def sync(self) -> int:
        """Force the lines to disk, and return the file's size in bytes. OSError where they cannot be written."""
        self._write()
        os.fsync(self._file.fileno())
        return self._size

    def state(self) -> dict[str, Any]:
        """Return the file's size once its lines are on disk: a resumed run cuts it there."""
        return {"metrics_bytes": self.sync()}

    def close(self) -> bool:
        """Write what is waiting, if that can be done now, and close the file."""
        with contextlib.suppress(OSError):
            self._write()
        if self._waiting:
            log.warning("%s lacks its last %d lines", self.path, self._waiting.count(b"\n"))
        self._file.close()
        return True

    def _write(self) -> None:
        """Append all waiting lines or none of them. OSError where that fails.

        A disk that fills up may take half a line, which is cut off again: now, or where that fails too, before the next
        attempt.
        """
        if os.fstat(self._file.fileno()).st_size != self._size:
            self._file.truncate(self._size)
        written = 0
        try:
            while written < len(self._waiting):
                written += self._file.write(self._waiting[written:])
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += written
        self._waiting = b""
        self._warned = False


def _read_lines(path: Path, size: int) -> Iterator[tuple[int, Metrics]]:
    """Yield the steps and the numbers of the first ``size`` bytes of a file of `JsonLines`."""
    with path.open("rb") as file:
        while file.tell() < size:
            metrics = json.loads(file.readline())
            yield metrics.pop("step"), metrics


class Progress:
    """A tqdm bar on a terminal; elsewhere a line every ten seconds and at every evaluation.

    ``total`` and ``done`` count what ``unit`` names: ``step`` (updates) or ``token`` (real tokens). Of a model that
    ``predicts_text``, the perplexity is told.
    """

    def __init__(self, total: int, unit: str, done: int, *, predicts_text: bool = True) -> None:
        self._predicts_text = predicts_text
        self._total = total
        self._unit = unit
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._started = time.monotonic()
        self._done_before = done
        self._next_line = 0.0

    def log(self, metrics: Metrics, step: int) -> None:
        """Move the bar, or log a line if it is time for one."""
        done = step
        if self._unit == "token":
            done = int(metrics["tokens_seen"] or 0)
        done = min(self._total, done)
        if self._bar.disable:
            self._log_line(metrics, done)
        else:
            self._move_bar(metrics, done, step)

    def _described(self, metrics: Metrics) -> str:
        """Return the numbers of one update as a person reads them."""
        return describe(metrics, predicts_text=self._predicts_text)

    def _log_line(self, metrics: Metrics, done: int) -> None:
        """Log a line with an evaluation, at the end, and ten seconds after the last one."""
        now = time.monotonic()
        is_due = now >= self._next_line or done >= self._total
        if not (is_due or _has_evaluation(metrics)):
            return
        line = f"{self._unit} {done}/{self._total}  {self._described(metrics)}"
        if done > self._done_before:
            seconds_a_unit = (now - self._started) / (done - self._done_before)
            line += f"  left {tqdm.format_interval(seconds_a_unit * (self._total - done))}"
        else:  # an evaluation before the first update of this process, which tells nothing of how long updates take
            self._started = now
        log.info("%s", line)
        self._next_line = now + 10

    def _move_bar(self, metrics: Metrics, done: int, step: int) -> None:
        """Move the bar on; leave a line above it at an evaluation."""
        text = self._described(metrics)
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(text)
            if _has_evaluation(metrics):
                self._bar.write(f"step {step}  {text}", file=sys.stderr)

    def state(self) -> dict[str, Any]:
        """Return nothing: a resumed run's bar begins at the trainer's own counts."""
        return {}

    def close(self) -> bool:
        """Leave the bar on the terminal as it is."""
        with contextlib.suppress(OSError):
            self._bar.close()
        return True


def _has_evaluation(metrics: Metrics) -> bool:
    """Return whether the numbers are of an update after which the model was evaluated."""
    return "eval_loss" in metrics


def describe(metrics: Metrics, *, predicts_text: bool = True) -> str:
    """Return the numbers of one update as a person reads them; the perplexity of a model that ``predicts_text``."""
    parts = []
    if "loss" in metrics:  # what a run begins from is evaluated before the first update
        loss = metrics["loss"]
        rate = metrics["tokens_per_second"] or 0
        memory = (metrics["peak_memory_bytes"] or 0) / 2**30
        parts.append("loss none" if loss is None else f"loss {loss:.4f}")
        if predicts_text and loss is not None:
            parts.append(f"ppl {_exp(loss):.4g}")
        parts.append(f"lr {metrics['lr']:.3g}")
        parts.append(f"{rate:,.0f} tok/s")
        parts.append(f"mem {memory:.2f} GiB")
    if metrics.get("eval_score") is not None:
        parts.append(f"| validation loss {metrics['eval_loss']:.4f}, score {metrics['eval_score']:.4f}")
    if metrics.get("eval_perplexity") is not None:
        parts.append(f"| validation loss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.4g}")
        if metrics.get("eval_bits_per_byte") is not None:
            parts[-1] += f", {metrics['eval_bits_per_byte']:.4g} bits per byte"
        for name in further_texts(metrics):
            parts[-1] += f"; {name} {metrics[f'eval_{name}_perplexity']:.4g}"
    return "  ".join(parts)


def _exp(loss: float) -> float:
    """Compute exp(loss), but of 700 at most: Python's own raises OverflowError beyond 709."""
    return math.exp(min(loss, 700.0))


_WAITING = 10_000  # lines that wandb may have to take yet, before it is given up
_FINISH = 60.0  # seconds that wandb has at the end of a run
_INIT = 6.0  # seconds that its server has to answer at the beginning
_PROJECT = "galore-pretrain"


# A service that only watches must not slow a run down or end it. wandb's own calls can block, for instance without a
# network, so a thread of ours makes them all and takes the lines from a queue. The training loop only ever puts a line
# into that queue, which never waits. A queue that is full, or any exception, turns wandb off for the run.
class Wandb:
    """Sends the same numbers to wandb. Whatever goes wrong there is one warning here, and the run goes on.

    The run waits `_INIT` seconds for wandb's server, and goes on offline where it does not answer. It waits for nothing
    else: a thread hands the lines over, at most `_WAITING` of them are held back, and at the end it has `_FINISH`
    seconds. Where it has not ended even then, wandb's own clean-up, when Python exits, would wait for it without limit;
    and where the server did not answer at the beginning, for some twenty seconds more of trying.

    ``mode``: ``online``, ``offline``, ``disabled``, or ``auto``: what wandb's own settings say (``WANDB_MODE``), but
    offline without an API key. Never prompts. Where ``project``, ``name`` or ``tags`` is None, wandb's own settings
    hold (``WANDB_PROJECT``, …), and last a default of ours. ``earlier`` are a resumed run's lines: they are handed over
    again, since a process that is killed takes with it what wandb had not yet written.
    """

    def __init__(
        self,
        mode: str,
        folder: Path,
        *,
        project: str | None,
        name: str | None,
        tags: list[str] | None,
        config: dict[str, Any],
        run_id: str | None,
        earlier: Iterable[tuple[int, Metrics]] = (),
    ) -> None:
        self._run: Any = None
        self._is_on = False
        self._tries_on = False
        """Whether wandb goes on trying to reach a server that did not take the run."""
        self._waiting: Queue[tuple[int, Metrics] | None] = Queue(_WAITING)  # None: there are no more
        self._earlier = earlier
        self.run_id = run_id
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or "auto"
        if mode == "disabled":  # before the import, which takes seconds
            return
        try:
            import wandb

            own = wandb.setup(wandb.Settings(silent=True)).settings
            mode = _resolve_mode(mode)
            if mode == "disabled":
                return
            options: dict[str, Any] = {
                # wandb finds its own place by WANDB_DIR where it is given none.
                "dir": None if os.environ.get("WANDB_DIR") else folder,
                "project": project or own.project or _PROJECT,
                "name": name or own.run_name or folder.name,
                "tags": tags,
                "config": config,
                "id": run_id,
                "resume": "allow" if run_id else None,
                "settings": wandb.Settings(silent=True, console="off", init_timeout=_INIT, x_disable_stats=True),
            }
            self._run, self._tries_on = _start(mode, own.base_url, options)
            self.run_id = self._run.id
        except Exception as error:  # any failure of a service that only watches
            log.warning("wandb is off for this run: %s", _first_line(error))
            return
        self._is_on = True
        self._thread = Thread(target=self._hand_over, daemon=True)
        self._thread.start()

    def log(self, metrics: Metrics, step: int) -> None:
        """Queue the numbers. A queue that is full turns wandb off with a warning."""
        if not self._is_on:
            return
        try:
            self._waiting.put_nowait((step, metrics))
        except Full:
            log.warning("wandb is off from step %d on: it has not taken the last %d lines", step, _WAITING)
            self._is_on = False

    def state(self) -> dict[str, Any]:
        """Return the id of wandb's run, which a resumed run continues."""
        return {"wandb_id": self.run_id}

    def close(self) -> bool:
        """Give the thread `_FINISH` seconds to hand over what is queued; return whether wandb has ended."""
        if self._run is None:
            return True
        with contextlib.suppress(Full):
            self._waiting.put_nowait(None)
        self._thread.join(_FINISH)
        is_stuck = self._thread.is_alive()
        if is_stuck:
            log.warning("wandb has not taken everything within %.0f s, and is left; metrics.jsonl has it all", _FINISH)
        return not is_stuck and not self._tries_on

    def _hand_over(self) -> None:
        """Give wandb the earlier lines, and then those queued up to the None behind the last; the thread's work."""
        # What wandb's server has already, by the step, it passes over by itself.
        step = 0
        try:
            for step, metrics in self._earlier:
                self._run.log(metrics, step=step)
            while (item := self._waiting.get()) is not None:
                step, metrics = item
                self._run.log(metrics, step=step)
            self._run.finish()
        except Exception as error:
            log.warning("wandb is off from step %d on: %s", step, error)
            self._is_on = False
            # A run that is left open is finished by wandb's clean-up when Python exits, which would be waited for.
            with contextlib.suppress(Exception):
                self._run.finish()


def _start(mode: str, server: str, options: dict[str, Any]) -> tuple[Any, bool]:
    """Start wandb's run: online where it is asked for and ``server`` takes the run, else offline.

    Return it, and whether wandb goes on trying to reach a server that did not take it.
    """
    import wandb

    if mode == "offline":
        return wandb.init(mode="offline", **options), False
    try:
        return wandb.init(mode=mode, **options), False  # type: ignore[arg-type]
    except Exception as error:
        run = wandb.init(mode="offline", **options)
        log.warning(
            "wandb logs offline: %s did not take the run (%s); once it does, wandb sync %s hands it over",
            server,
            _first_line(error),
            run.settings.sync_dir,
        )
        return run, True


def _resolve_mode(mode: str) -> str:
    """Return the mode that wandb is started in. Online it needs an API key: without one, it would prompt for it."""
    import wandb

    is_asked_for = mode != "auto"
    if not is_asked_for:
        mode = wandb.setup().settings.mode
    if mode != "online" or _has_key():
        return mode
    if is_asked_for:
        log.warning("wandb online: no API key (WANDB_API_KEY or wandb login); logging offline")
    return "offline"


def _has_key() -> bool:
    """Return whether there is an API key for wandb's server where wandb looks for one: in its settings, or in netrc."""
    import wandb

    own = wandb.setup().settings
    if own.api_key or own.identity_token_file:
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc(file).authenticators(urlsplit(own.base_url).netloc) is not None
    except (OSError, NetrcParseError):
        return False


def _first_line(error: Exception) -> str:
    """Return the first line of what an exception says."""
    return str(error).partition("\n")[0]
