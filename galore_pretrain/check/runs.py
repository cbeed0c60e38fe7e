"""Parts about whole runs: `resume` by the command line, `export` and the host's memory, and the text's `reader`."""

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from galore_pretrain.check.part import Part
from galore_pretrain.check.updates import Built, build, config_of, has_8bit, timed, wait_for
from galore_pretrain.errors import InputError
from galore_pretrain.meters import forget_process_peak, process_peak_bytes, resident_bytes
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.rundir import checkpoint
from galore_pretrain.rundir.export import export as write_model
from galore_pretrain.text.batches import TokenRows, TrainingData, read_ahead
from galore_pretrain.text.sources import DocumentSource, open_source
from galore_pretrain.text.tokenizer import Tokenizer, load_tokenizer

_GIB = 2**30
_STOPPED_AFTER = 4  # updates, at the earliest
_LEAST_SECONDS = 30.0
_LENGTH = 256
_SHORT_LENGTH = 64


# -- resume -----------------------------------------------------------------------------------------------------------


def resume(part: Part) -> None:
    """Check that a run that a signal stops, and the same command goes on with, has the losses of a whole one."""
    text = _text(part)
    if text is None:
        return
    optims = ["galore_adamw8bit"] if has_8bit() else ["galore_adamw"]
    if part.is_on_gpu and has_8bit():
        optims.append("galore_adamw")
    model = _model_for(part, text.tokenizer)
    for optim in optims:
        if part.has_time_for(optim, _LEAST_SECONDS):
            _compare_runs(part, model, optim)


def _compare_runs(part: Part, model: Path, optim: str) -> None:
    """Make a whole run and one in two parts, and compare what they log."""
    whole = _Run(part, model, optim, "whole")
    code = whole.to_end()
    part.check(f"{optim}: exit code of a run", code, "0", code == 0)
    if code:
        part.number(f"{optim}: the run says", whole.last_words())
        return
    halved = _Run(part, model, optim, "halved")
    code = halved.until_stopped()
    expected = 128 + signal.SIGTERM
    part.check(f"{optim}: exit code of a run that SIGTERM stops", code, str(expected), code == expected)
    stopped_after = len(halved.losses())
    part.number(f"{optim}: updates before it stopped", stopped_after)
    code = halved.to_end()
    part.check(f"{optim}: exit code of the same command, which goes on", code, "0", code == 0)
    is_same = halved.losses() == whole.losses()
    name = f"{optim}: losses of a run in two parts against those of a whole one"
    part.check(name, "the same" if is_same else halved.first_difference(whole), "bit for bit", is_same)
    for key, value in whole.summary().items():
        part.number(f"{optim}: {key}", value)


@dataclass
class _Run:
    """Makes a run of the real command line, in processes of its own."""

    part: Part
    model: Path
    optim: str
    name: str

    @property
    def folder(self) -> Path:
        """Return its output."""
        return self.part.scratch / f"{self.optim}-{self.name}"

    def _start(self) -> subprocess.Popen[bytes]:
        settings = self.part.settings
        updates, rows = 16, 2
        if self.part.is_on_gpu:  # where they are over sooner
            updates, rows = 40, 16
        flags: dict[str, Any] = {
            "model": self.model,
            "optim": self.optim,
            "rank": 16,
            "update-proj-gap": 4,
            "data": settings.data,
            "tokenizer": settings.tokenizer,
            "layout": "pack",
            "max-length": _length(self.part),
            "batch-size": rows,
            "total-batch-size": 2 * rows,
            "steps": updates,
            "warmup-steps": 1,
            "lr": 0.001,
            "eval-tokens": 2000,
            "eval-every": 1000,
            "save-every": 1000,
            "device": settings.device,
            "wandb": "disabled",
            "output": self.folder,
        }
        words: list[str] = []
        for flag, value in flags.items():
            words += [f"--{flag}", str(value)]
        if self.part.is_on_gpu:
            words.append("--deterministic")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            # Not a group of its own: it ends with the part where that is ended.
            return subprocess.Popen(
                [sys.executable, "-m", "galore_pretrain", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def _log(self) -> Path:
        return self.folder.with_suffix(".log")

    def to_end(self) -> int:
        """Run it to its end, and return the exit code."""
        return self._start().wait()

    def until_stopped(self) -> int:
        """Run it until it has made some updates, stop it by SIGTERM, and return the exit code."""
        process = self._start()
        while process.poll() is None and len(self.losses()) < _STOPPED_AFTER:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        return process.wait()

    def losses(self) -> list[tuple[int, float]]:
        """Return the number and the loss of each update that it has logged."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return []
        found: list[tuple[int, float]] = []
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                update = json.loads(line)
                found.append((update["step"], update["loss"]))
        return found

    def first_difference(self, other: "_Run") -> str:
        """Return the first update whose losses differ, in words."""
        for (step, loss), (_, its_loss) in zip(self.losses(), other.losses(), strict=False):
            if loss != its_loss:
                return f"update {step}: {loss} and {its_loss}"
        return f"{len(self.losses())} and {len(other.losses())} updates"

    def summary(self) -> dict[str, float]:
        """Return its peaks of memory in GiB: of the allocator, of the process, and as planned."""
        values: Mapping[str, Any] = json.loads((self.folder / "summary.json").read_text())
        keys = ("peak_memory_bytes", "process_peak_bytes", "planned_peak_bytes")
        return {f"{key.removesuffix('_bytes')}, GiB": round((values[key] or 0) / _GIB, 3) for key in keys}

    def last_words(self) -> str:
        """Return the last line that it printed."""
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "nothing")


# -- export -----------------------------------------------------------------------------------------------------------


def export(part: Part) -> None:
    """Tell what saving takes of the host; check what exporting takes, and that transformers loads what was written."""
    text = _text(part)
    if text is None:
        return
    name = "llama_1b" if part.is_on_gpu else "llama_1m"
    if text.tokenizer.vocab_size > load_model_config(name).vocab_size:
        part.skip(name, f"its vocabulary is smaller than that of {part.settings.tokenizer}")
        return
    config = config_of(
        "galore_adamw",
        model=name,
        rank=32,
        batch_size=1,
        total_batch_size=1,
        device=str(part.device),
    )
    built = build(config, part.device)
    _save(part, name, built)
    weights = sum(p.nbytes for p in built.model.parameters())
    folder = part.scratch / "model"
    before = _begin_peak()
    began = time.monotonic()
    write_model(folder, built.model, text.tokenizer)
    more = process_peak_bytes() - before
    part.number(f"{name}: seconds to export", round(time.monotonic() - began, 1))
    part.number(f"{name}: GiB exported", round(weights / _GIB, 3))
    if part.is_on_gpu:  # on a CPU, the weights are in the host's memory already
        half = weights / 2 / _GIB
        part.check_below(f"{name}: GiB more of the host while it is exported", more / _GIB, half)
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    state = built.model.state_dict()
    is_same = all(torch.equal(exported[key], value.cpu()) for key, value in state.items())
    part.check(f"{name}: weights that transformers loads", is_same, "those that were exported", is_same)


def _save(part: Part, name: str, built: Built) -> None:
    """Tell how long a checkpoint takes and what it takes of the host."""
    tensors: Mapping[str, Tensor] = checkpoint.named_tensors(built.model, built.optimizer)
    before = _begin_peak()
    began = time.monotonic()
    checkpoint.save(part.scratch / "step_00000001", tensors, {})
    more = process_peak_bytes() - before
    part.number(f"{name}: seconds to save", round(time.monotonic() - began, 1))
    part.number(f"{name}: GiB saved", round(sum(value.nbytes for value in tensors.values()) / _GIB, 3))
    part.number(f"{name}: GiB more of the host while it is saved", round(more / _GIB, 3))


def _begin_peak() -> int:
    """Begin the process's peak anew, and return the bytes that it holds."""
    forget_process_peak()
    return resident_bytes()


# -- reader -----------------------------------------------------------------------------------------------------------


def reader(part: Part) -> None:
    """Tell how fast one thread reads text, and what reading beside training costs an update."""
    text = _text(part)
    if text is None:
        return
    for layout in ("pack", "pad"):
        data = TrainingData(text.source, TokenRows(text.tokenizer, layout, _LENGTH), 64, 0)
        part.number(f"--layout {layout}: tokens/s of one thread", _reading_speed(data))
    rows = 64 if part.is_on_gpu else 2
    config = config_of(
        "galore_adamw",
        model=str(_model_for(part, text.tokenizer)),
        rank=16,
        batch_size=rows,
        total_batch_size=rows,
        layerwise=False,
        activation_checkpointing=False,
        device=str(part.device),
    )
    built = build(config, part.device)
    tokens = torch.zeros(rows, _LENGTH, dtype=torch.long, device=part.device)
    repeats = 10 if part.is_on_gpu else 3
    alone = timed(lambda: built.update(tokens), part.device, repeats=repeats)
    part.number("ms an update on ready rows", round(alone.done, 1))
    _read_beside(part, text, built, rows, repeats)


def _reading_speed(data: TrainingData) -> float:
    """Return tokens a second over two seconds, without the first batch."""
    batches = iter(data)
    next(batches)
    tokens = 0
    began = time.perf_counter()
    while time.perf_counter() < began + 2:
        tokens += next(batches).tokens
    return round(tokens / (time.perf_counter() - began))


def _read_beside(part: Part, text: "_Text", built: Built, rows: int, repeats: int) -> None:
    """Tell how long an update takes while a thread reads, and how much of that it waits for text."""
    data = TrainingData(text.source, TokenRows(text.tokenizer, "pack", _LENGTH), rows, 0)
    batches = read_ahead(data, pin=part.is_on_gpu)
    next(batches)
    waited: list[float] = []
    taken: list[float] = []
    for _ in range(repeats):
        wait_for(part.device)
        began = time.perf_counter()
        batch = next(batches)
        waited.append(1000 * (time.perf_counter() - began))
        ids = batch.input_ids.to(part.device, non_blocking=True)
        labels = batch.labels.to(part.device, non_blocking=True)
        loss = mean_loss(built.model, ids, labels, labels.numel())
        built.execution.begin(0, 1)
        loss.backward()
        del loss
        built.execution.complete()
        built.execution.outcome()
        wait_for(part.device)
        taken.append(1000 * (time.perf_counter() - began))
    batches.close()
    part.number("ms an update with text read beside it", round(statistics.median(taken), 1))
    part.number("ms of that it waits for text", round(statistics.median(waited), 2))


# -- text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """Holds the text that parts read, and its tokenizer."""

    source: DocumentSource
    tokenizer: Tokenizer


def _text(part: Part) -> _Text | None:
    """Open the text; None, and it is said why, where it cannot be read."""
    settings = part.settings
    try:
        return _Text(open_source(settings.data, "train"), load_tokenizer(settings.tokenizer))
    except InputError as error:
        part.skip("text", str(error))
        return None


def _length(part: Part) -> int:
    """Return how many tokens a row has."""
    return _LENGTH if part.is_on_gpu else _SHORT_LENGTH


def _model_for(part: Part, tokenizer: Tokenizer) -> Path:
    """Write the config of a small model with the tokenizer's vocabulary, and return its file."""
    architecture = load_model_config("llama_60m" if part.is_on_gpu else "llama_1m")
    architecture.vocab_size = tokenizer.vocab_size
    file = part.scratch / "small.json"
    architecture.to_json_file(file)
    return file
