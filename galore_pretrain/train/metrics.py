"""Where the numbers of a run go: a JSON Lines file always, a progress bar or plain lines, and wandb."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Protocol

from tqdm import tqdm

from galore_pretrain.config.options import RunConfig

Metrics = dict[str, float | int | None]
log = logging.getLogger(__name__)


class MetricLogger(Protocol):
    """Takes the numbers of one update."""

    def log(self, metrics: Metrics, step: int) -> None:
        """``metrics`` under the keys of ``metrics.jsonl``; ``step`` updates are complete."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold of it, in plain JSON values, once all of it is kept. OSError where it cannot
        be now."""
        ...

    def close(self) -> bool:
        """Take no more. Returns whether it has come to its end: if not, Python's own exit would wait for it."""
        ...


def open_loggers(
    config: RunConfig, folder: Path, step: int, tokens_seen: int, saved: Mapping[str, Any]
) -> list[MetricLogger]:
    """The loggers of a run that has come so far. ``saved`` is the state of a checkpoint in this very ``folder``, whose
    files are then continued."""
    path = folder / "metrics.jsonl"
    if not saved and path.exists() and path.stat().st_size:
        os.replace(path, older := path.with_name("metrics.jsonl.old"))
        log.warning("no checkpoint was written here: starting anew; the lines of before are in %s", older)
    lines = JsonLines(path, size=saved.get("metrics_bytes", 0))
    if config.steps:
        progress = Progress(config.steps, "step", step)
    else:
        progress = Progress(config.max_tokens or 0, "token", tokens_seen)
    wandb = Wandb(
        config.wandb,
        folder,
        project=config.wandb_project,
        name=config.name or folder.name,
        tags=[tag for tag in (config.tags or "").split(",") if tag],
        config=config.values(),
        run_id=saved.get("wandb_id"),
    )
    return [lines, progress, wandb]


class JsonLines:
    """``metrics.jsonl``: one object a line, numbers with all their digits, a non-finite number as null.

    A resumed run cuts the file to what it held when its checkpoint was written, so it reads as if never interrupted.
    Lines that cannot be written wait until they can.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path, self._waiting, self._warned = path, b"", False
        self._file = path.open("ab", buffering=0)
        if self._file.tell() < size:
            log.warning("%s is shorter than the checkpoint remembers; its end is missing", path)
            size = path.read_bytes().rfind(b"\n") + 1  # without the line that is cut
        self._file.truncate(size)
        self._size = self._file.seek(0, os.SEEK_END)

    def log(self, metrics: Metrics, step: int) -> None:
        values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        self._waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s): its lines wait", self.path, error.strerror)
            self._warned = True

    def sync(self) -> int:
        """Force the lines to disk; the size of the file then. OSError where they cannot be written."""
        self._write()
        os.fsync(self._file.fileno())
        return self._size

    def state(self) -> dict[str, Any]:
        return {"metrics_bytes": self.sync()}

    def close(self) -> bool:
        with contextlib.suppress(OSError):
            self._write()
        if self._waiting:
            log.warning("%s lacks its last %d lines", self.path, self._waiting.count(b"\n"))
        self._file.close()
        return True

    def _write(self) -> None:
        """All that waits, or nothing of it: a disk that fills up may take half a line."""
        if os.fstat(self._file.fileno()).st_size != self._size:
            self._file.truncate(self._size)
        written = 0
        try:
            while written < len(self._waiting):
                written += self._file.write(self._waiting[written:])
        except OSError:
            with contextlib.suppress(OSError):  # else before the next attempt
                self._file.truncate(self._size)
            raise
        self._size, self._waiting, self._warned = self._size + written, b"", False


class Progress:
    """A tqdm bar on a terminal; elsewhere a line every ten seconds and at every evaluation."""

    def __init__(self, total: int, unit: str, done: int) -> None:
        self._total, self._unit = total, unit
        self._bar = tqdm(total=total, initial=done, unit=unit, disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self._started, self._done_before, self._next_line = time.monotonic(), done, 0.0

    def log(self, metrics: Metrics, step: int) -> None:
        done = min(self._total, step if self._unit == "step" else int(metrics["tokens_seen"] or 0))
        text = describe(metrics)
        evaluated = "eval_perplexity" in metrics
        if self._bar.disable:
            now = time.monotonic()
            if evaluated or now >= self._next_line or done >= self._total:
                left = (now - self._started) / max(1, done - self._done_before) * (self._total - done)
                log.info("%s %d/%d  %s  left %s", self._unit, done, self._total, text, tqdm.format_interval(left))
                self._next_line = now + 10
            return
        with contextlib.suppress(OSError):  # a terminal that is gone
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(text)
            if evaluated:
                self._bar.write(f"step {step}  {text}", file=sys.stderr)

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> bool:
        with contextlib.suppress(OSError):
            self._bar.close()
        return True


def describe(metrics: Metrics) -> str:
    """The numbers of one update as a person reads them."""
    loss, rate = metrics["loss"], metrics["tokens_per_second"] or 0
    parts = [f"loss {loss:.4f}", f"ppl {_exp(loss):.4g}"] if loss is not None else ["loss none"]
    parts += [
        f"lr {metrics['lr']:.3g}",
        f"{rate:,.0f} tok/s",
        f"mem {(metrics['peak_memory_bytes'] or 0) / 2**30:.2f} GiB",
    ]
    if metrics.get("eval_perplexity") is not None:
        parts.append(f"| validation loss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.4g}")
    return "  ".join(parts)


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


_WAITING, _FINISH = 10_000, 60.0


class Wandb:
    """The same numbers at wandb. Whatever goes wrong there is one warning here; the run goes on, and waits for nothing:
    lines are handed over by a thread, `_WAITING` at most, and at the end it has `_FINISH` seconds. Where it has not
    ended even then, its own clean-up, when Python exits, would wait for it without limit.

    ``mode``: ``online``, ``offline``, ``disabled``, or ``auto``: online with an API key, else offline. Never prompts.
    """

    def __init__(
        self,
        mode: str,
        folder: Path,
        *,
        project: str,
        name: str,
        tags: list[str],
        config: dict[str, Any],
        run_id: str | None,
    ) -> None:
        self._run: Any = None
        self._is_on = False
        self._waiting: Queue[tuple[int, Metrics] | None] = Queue(_WAITING)
        self.run_id = run_id
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        elif mode == "online" and not _has_key():
            log.warning("--wandb online: no API key (WANDB_API_KEY or wandb login); logging offline")
            mode = "offline"
        if mode == "disabled":
            return
        try:
            import wandb

            self._run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                dir=folder,
                project=project,
                name=name,
                tags=tags,
                config=config,
                id=run_id,
                resume="allow" if run_id else None,
                settings=wandb.Settings(silent=True, console="off", init_timeout=30, x_disable_stats=True),
            )
            self.run_id = self._run.id
        except Exception as error:  # any failure of a service that only watches
            log.warning("wandb is off for this run: %s", str(error).partition("\n")[0])
            return
        self._is_on = True
        self._thread = Thread(target=self._hand_over, daemon=True)
        self._thread.start()

    def log(self, metrics: Metrics, step: int) -> None:
        if not self._is_on:
            return
        try:
            self._waiting.put_nowait((step, metrics))
        except Full:
            log.warning("wandb is off from step %d on: it has not taken the last %d lines", step, _WAITING)
            self._is_on = False

    def state(self) -> dict[str, Any]:
        return {"wandb_id": self.run_id}

    def close(self) -> bool:
        if self._run is None:
            return True
        with contextlib.suppress(Full):
            self._waiting.put_nowait(None)
        self._thread.join(_FINISH)
        if is_stuck := self._thread.is_alive():
            log.warning("wandb has not taken everything within %.0f s, and is left; metrics.jsonl has it all", _FINISH)
        return not is_stuck

    def _hand_over(self) -> None:
        run, step = self._run, 0
        try:
            while (item := self._waiting.get()) is not None:
                step, metrics = item
                run.log(metrics, step=step)
            run.finish()
        except Exception as error:
            log.warning("wandb is off from step %d on: %s", step, error)
            self._is_on = False
            with contextlib.suppress(Exception):
                run.finish()  # else its clean-up would do so, and be waited for


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "api.wandb.ai" in netrc.read_text()
    except OSError:
        return False
