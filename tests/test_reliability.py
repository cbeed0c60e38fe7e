"""What happens to a run: full disks, signals while it saves, damaged checkpoints, no memory, a service that hangs.

Each through the real command line; `finished` (conftest.py) is what they must end as. docs/reliability.md has the list.
"""

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from galore_pretrain.config.options import ExecutionSettings, Processes
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError, TrainingFailedError
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import build_optimizer
from galore_pretrain.planning import fit
from galore_pretrain.planning.plan import Outline
from galore_pretrain.rundir import checkpoint, resume
from galore_pretrain.rundir.directory import RunDirectory
from galore_pretrain.train import metrics
from galore_pretrain.train.metrics import JsonLines, Wandb
from galore_pretrain.train.trainer import TrainState
from runs import COMMAND_LINE, command, lines, python, run
from warm_python import executable

AFTER_IMPORTS = """
import os, resource, signal, sys, time
from galore_pretrain.rundir import checkpoint, resume
from galore_pretrain import cli, meters as memory, run
from galore_pretrain.train import metrics, trainer
{}
sys.argv = ["galore-pretrain", *sys.argv[1:]]
cli.main()
"""


def run_with(
    preparation: str, model: str, output: Path, *flags: str, planned: bool = False
) -> subprocess.CompletedProcess[str]:
    """The command line in a process that something is done to first."""
    return python(AFTER_IMPORTS.format(preparation), *command(model, output, *flags)[3:], planned=planned)


def assert_same(output: Path, finished: Path) -> None:
    assert lines(output) == lines(finished)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (output, finished))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- disks ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(
    tiny_config: str, finished: Path, tmp_path: Path
) -> None:
    """From update 6 on no file may grow beyond 100 kB, so that checkpoints fail and metrics do not."""
    output = tmp_path / "full"
    limit = """
log = metrics.JsonLines.log
def fill(self, metrics, step):
    if step == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    log(self, metrics, step)
metrics.JsonLines.log = fill
"""
    full = run_with(limit, tiny_config, output)
    assert full.returncode == 1, full.stderr
    assert "the checkpoint of update 8 cannot be written (File too large): going on; that of update 4" in full.stderr
    assert full.stderr.splitlines()[-1].startswith(f"Error: update 12 could not be saved in {output}; once it can be")
    assert lines(output) == lines(finished)
    assert [f.name for f in (output / "checkpoints").iterdir()] == ["step_00000004"]
    again = run(tiny_config, output)
    assert again.returncode == 0, again.stderr
    assert_same(output, finished)


def test_a_log_that_cannot_be_written_stops_nothing(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """A sweep's run logs into its folder, so its log fills the disk that its checkpoints are on."""
    with Path("/dev/full").open("w") as full:
        done, refused = (
            subprocess.run([executable(), *words[1:]], stderr=full, timeout=300, check=False)
            for words in (command(tiny_config, tmp_path / "run"), command("nowhere", tmp_path / "no"))
        )
    assert (done.returncode, refused.returncode) == (0, 2)
    assert_same(tmp_path / "run", finished)


class FullFile:
    """A file that takes half a line, and then nothing, for a while."""

    def __init__(self, file: Any) -> None:
        self.file, self.fail = file, False

    def write(self, content: bytes) -> int:
        if self.fail and len(content) < 20:
            raise OSError(28, "No space left on device")
        return int(self.file.write(content[:15] if self.fail else content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_lines_that_cannot_be_written_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = JsonLines(tmp_path / "metrics.jsonl")
    kept._file = file = FullFile(kept._file)  # type: ignore[assignment]
    for step in range(1, 9):
        file.fail = step in (3, 4, 7, 8)
        kept.log({"loss": step / 3}, step)
        written = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in written] == list(
            range(1, {3: 3, 4: 3, 7: 7, 8: 7}.get(step, step + 1))
        )
    with pytest.raises(OSError, match="No space left"):
        kept.sync()
    assert [r.message.rpartition(" cannot")[2] for r in caplog.records] == [
        " be written (No space left on device): its lines wait"
    ] * 2
    file.fail = False
    assert kept.sync() == (tmp_path / "metrics.jsonl").stat().st_size
    kept.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, 9)
    )


def test_a_cut_file_of_metrics_loses_its_cut_line_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    kept = JsonLines(file, size=36)
    kept.log({"loss": 1.0}, 4)
    kept.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 4]
    assert "its end is missing" in caplog.text


@pytest.mark.parametrize("room", [10, 9_000], ids=["for nothing", "for the config alone"])
def test_a_disk_that_is_full_from_the_start_is_one_line(room: int, tiny_config: str, tmp_path: Path) -> None:
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))"
    arguments = command(tiny_config, tmp_path / "run")[3:]
    script = [executable(), "-c", AFTER_IMPORTS.format(limit), *arguments]
    failed = subprocess.run(
        script, capture_output=True, text=True, timeout=300, check=False
    )  # by pipes: they have room
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    told = "cannot be written (File too large); once it can be" if room == 10 else "could not be saved in"
    assert last.startswith("Error: ")
    assert told in last
    assert "Traceback" not in failed.stderr


def test_a_disk_without_room_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=39_000_000_000))
    config, _ = resolve({"model": "llama_60m", "data": "sample", "steps": 10, "keep": 2}, {})
    directory = RunDirectory(tmp_path)
    directory.check_space(config, 9_000_000_000)
    assert not caplog.records
    directory.check_space(config, 10_000_000_000)
    assert "39.0 GB are free, and 3 more checkpoints of 10.0 GB and the model may take 40.0 GB" in caplog.text
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    caplog.clear()
    directory.check_space(config, 10_000_000_000)
    assert not caplog.records
    directory.check_space(replace(config, keep=1, keep_every=5), 10_000_000_000)
    assert "3 more checkpoints" in caplog.text  # of the newest, of update 5 and of update 10, one is there


def test_folders_that_cannot_be_written_are_refused_at_once(tiny_config: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (Path("/proc/self/run"), tmp_path / "file", tmp_path / "file" / "run"):
        refused = run(tiny_config, output)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"Error: --output {output} cannot be written (")
        assert refused.stderr.count("\n") == 1


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_costs_the_updates_since_the_one_before(
    tiny_config: str, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "damaged"
    shutil.copytree(finished, output)
    (output / "summary.json").unlink()
    file = next((output / "checkpoints" / "step_00000012").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    again = run(tiny_config, output)
    assert again.returncode == 0, again.stderr
    assert "step_00000012 is damaged" in again.stderr
    assert "set aside as step_00000012.damaged" in again.stderr
    assert "at update 8" in again.stderr
    assert_same(output, finished)


def test_every_so_many_are_kept(tiny_config: str, tmp_path: Path) -> None:
    done = run(tiny_config, tmp_path / "kept", "--save-every", "1", "--keep", "1", "--keep-every", "5")
    assert done.returncode == 0, done.stderr
    assert sorted(int(f.name[5:]) for f in (tmp_path / "kept" / "checkpoints").iterdir()) == [5, 10, 12]


def _saver(
    build_tiny: Callable[..., LlamaForCausalLM], output: Path, extra: Callable[[], dict[str, Any]] = dict
) -> tuple[resume.Saver, Any, TrainState]:
    model, state = build_tiny(), TrainState(step=3)
    optimizer = build_optimizer(model, "galore_adamw8bit", lr=0.1, rank=4)
    config, _ = resolve({"model": "llama_60m", "data": "sample", "output": str(output), "keep": 2}, {})
    return resume.Saver(config, model, optimizer, state, extra, {}), model, state


def test_a_slow_save_goes_on_in_the_background(
    build_tiny: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what was there when it began, and the loop has gone on meanwhile; where memory has no room for
    the copy, it waits."""
    saver, model, state = _saver(build_tiny, tmp_path)
    write, may_write = checkpoint.save, threading.Event()

    def slow(*args: Any) -> None:
        assert may_write.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoint, "save", slow)
    weight = model.lm_head.weight
    for room, in_background in ((2**40, True), (0, False)):
        monkeypatch.setattr(resume, "spare_bytes", lambda room=room: room)
        may_write.set()
        saver.save()
        assert saver.saved_step == state.step
        before, state.step = weight.detach().clone(), state.step + 1
        saver._taken = math.inf
        if in_background:
            may_write.clear()
        saver.save()
        with torch.no_grad():
            weight.mul_(2)
        assert (saver.saved_step < state.step) == in_background  # type: ignore[operator]
        may_write.set()
        saver.finish()
        assert saver.saved_step == state.step
        found = checkpoint.opened(checkpoint.folder_of(tmp_path / "checkpoints", state.step))
        saved = torch.empty_like(weight)
        rest = {n: torch.empty_like(t) for n, t in checkpoint.named_tensors(model, saver._optimizer).items()}
        found.load(rest | {"model.lm_head.weight": saved})
        assert torch.equal(saved, before)
        state.step, saver._taken = state.step + 1, 0.0


def test_a_save_that_fails_in_the_background_is_told(
    build_tiny: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    saver, _, state = _saver(build_tiny, tmp_path)
    saver.save()
    saver._taken, state.step = 1e9, 4
    tries = []

    def full(*given: Any) -> None:
        tries.append(given)
        if len(tries) < 3:
            raise checkpoint.NotWrittenError("No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    saver.save()
    with pytest.raises(TrainingFailedError, match=r"update 4 could not be saved .* goes on from update 3"):
        saver.finish()
    assert "the checkpoint of update 4 cannot be written (No space left on device)" in caplog.text
    saver.finish()  # which tries again
    assert (len(tries), saver.saved_step) == (3, 4)


def test_no_checkpoint_without_the_lines_before_it(
    build_tiny: Callable[..., LlamaForCausalLM], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would remember lines of metrics.jsonl that are not there."""

    def full() -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    saver, _, state = _saver(build_tiny, tmp_path, full)
    saver.save()
    assert saver.saved_step is None
    assert not (tmp_path / "checkpoints").exists()
    assert f"the checkpoint of update {state.step} cannot be written (No space left on device)" in caplog.text


def test_what_is_saved_among_skipped_updates_pushes_out_no_other(
    build_tiny: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    saver, _, state = _saver(build_tiny, tmp_path)
    for step, skipped in ((1, 0), (2, 0), (3, 1), (4, 2)):
        state.step, state.skipped = step, skipped
        saver.save()
        saver.wait()
    assert sorted(int(f.name[5:]) for f in (tmp_path / "checkpoints").iterdir()) == [1, 2, 3, 4]
    state.step, state.skipped = 5, 0
    saver.save()
    saver.wait()
    assert sorted(int(f.name[5:]) for f in (tmp_path / "checkpoints").iterdir()) == [4, 5]


def test_bad_text_stops_with_a_checkpoint_and_can_be_left_out(tiny_config: str, tmp_path: Path) -> None:
    """With the file and the line; going on with ``--bad-data skip`` is no change of options."""
    lines_of_text = [json.dumps({"text": f"document {i} with some words in it"}) for i in range(6000)]
    lines_of_text[5000] = '{"text": "half of a pair: \\ud83d"}'
    (tmp_path / "text.jsonl").write_text("\n".join(lines_of_text))
    (tmp_path / "held-out.jsonl").write_text("\n".join(lines_of_text[:500]))
    flags = ("--data", str(tmp_path / "text.jsonl"), "--tokenizer", "sample", "--steps", "300", "--eval-every", "500")
    flags += ("--eval-data", str(tmp_path / "held-out.jsonl"))
    flags += ("--save-every", "500", "--max-length", "4", "--total-batch-size", "16")
    stopped = run(tiny_config, tmp_path / "run", *flags)
    assert stopped.returncode == 2, stopped.stderr
    assert "text.jsonl line 5001 has half a surrogate pair" in stopped.stderr.splitlines()[-1]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step_{len(lines(tmp_path / 'run')):08d}" > "step_00000250"
    done = run(tiny_config, tmp_path / "run", *flags, "--bad-data", "skip")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 301))


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_model_folder_with_a_pickle_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused = python(COMMAND_LINE, "generate", str(tmp_path / "model"), "hello")
    assert refused.returncode == 2, refused.stderr
    assert "its weights cannot be loaded" in refused.stderr
    assert not (tmp_path / "exploded").exists()


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_while_a_checkpoint_is_written(name: str, tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """The checkpoint is completed, and the run ends with the code that the signal has: there, or, where it was written
    in the background, soon after."""
    send = f"""
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sync, sent, step = checkpoint.sync, [], trainer.Trainer.train_step
def signalling(path):
    if not sent and "step_00000008" in str(path):
        sent.append(os.kill(os.getpid(), signal.{name}))
    sync(path)
def waiting(self, batch):
    while self.state.step == 8 and not sent:  # an update is quick, and a disk may not be
        time.sleep(0.01)
    return step(self, batch)
checkpoint.sync, trainer.Trainer.train_step = signalling, waiting
"""
    output = tmp_path / "signalled"
    stopped = run_with(send, tiny_config, output)
    assert stopped.returncode == {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}[name], stopped.stderr
    (step,) = re.findall(r"stopped after update (\d+)", stopped.stderr)
    assert 8 <= int(step) < 12
    found = checkpoint.newest(output / "checkpoints", set_aside=False)
    assert found is not None
    assert found.state["trainer"]["step"] == int(step)
    again = run(tiny_config, output)
    assert again.returncode == 0, again.stderr
    assert_same(output, finished)


def test_a_second_signal_ends_at_once(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """Even in the middle of a save; nothing is lost that was saved before."""
    send = """
def hanging(path):
    if "step_00000008" in str(path):
        for pause in (0, 0, 1.2):
            time.sleep(pause)
            print(f"signal after {pause} s", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
checkpoint.sync = hanging
"""
    output = tmp_path / "hurried"
    stopped = run_with(send, tiny_config, output)
    assert stopped.returncode == 143
    assert stopped.stderr.count("signal after") == 3  # the second at once, which is the first's echo
    found = checkpoint.newest(output / "checkpoints", set_aside=False)
    assert found is not None
    assert found.state["trainer"]["step"] == 4
    again = run(tiny_config, output)
    assert again.returncode == 0, again.stderr
    assert "at update 4" in again.stderr
    assert_same(output, finished)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_in_the_middle_of_an_update(name: str, tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """The update is completed and saved."""
    send = f"""
signal.signal(signal.SIGHUP, signal.SIG_DFL)
step, sent = trainer.Trainer.train_step, []
def signalling(self, batch):
    if self.state.step == 5 and not sent:
        sent.append(os.kill(os.getpid(), signal.{name}))
    return step(self, batch)
trainer.Trainer.train_step = signalling
"""
    output = tmp_path / "signalled"
    stopped = run_with(send, tiny_config, output)
    assert stopped.returncode == {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}[name], stopped.stderr
    assert "stopped after update 6; the same command" in stopped.stderr
    again = run(tiny_config, output)
    assert "at update 6" in again.stderr
    assert_same(output, finished)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_one_message(tiny_config: str, tmp_path: Path) -> None:
    """A real failure of the allocator, from a limit on the process's address space."""
    limit = """
import torch
step = trainer.Trainer.train_step
def tight(self, batch):
    if self.state.step == 2:
        held = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (held + 2**21, resource.RLIM_INFINITY))
        torch.empty(2**30)  # more than what the process has freed and kept
    return step(self, batch)
trainer.Trainer.train_step = tight
"""
    flags = ("--total-batch-size", "64", "--batch-size", "64", "--max-length", "64", "--no-layerwise")
    flags += ("--no-activation-checkpointing",)
    failed = run_with(limit, "llama_9m", tmp_path / "large", *flags, planned=True)
    assert failed.returncode == 1, failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("Error: out of memory: "), failed.stderr
    assert "GiB were planned; what helps: --layerwise, --activation-checkpointing, a smaller --batch-size" in last


# -- wandb ------------------------------------------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """As much of wandb as is used; its run takes ``seconds`` for a line."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        super().__init__("wandb")
        self.seconds, self.error, self.taken = seconds, error, []
        self.id, self.Settings = "abc", dict
        self.settings = types.SimpleNamespace(base_url="https://example.com", project=None, run_name=None)

    def setup(self, _: Any) -> "FakeWandb":
        return self

    def init(self, **_: Any) -> "FakeWandb":
        return self

    def log(self, values: Any, step: int) -> None:
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        self.taken.append(step)

    def finish(self) -> None:
        self.taken.append("finished")


def _logged(wandb: FakeWandb, folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> tuple[float, bool]:
    """Seconds that so many lines and the end took; whether it has ended."""
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger = Wandb("offline", folder, project="p", name="n", tags=None, config={}, run_id=None)
    started = time.monotonic()
    for step in range(1, count + 1):
        logger.log({"loss": 1.0}, step)
    has_ended = logger.close()
    assert logger.state() == {"wandb_id": "abc"}
    return time.monotonic() - started, has_ended


def test_wandb_gets_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    _, has_ended = _logged(wandb, tmp_path, monkeypatch, 500)
    assert has_ended
    assert wandb.taken == [*range(1, 501), "finished"]


def test_wandb_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "_FINISH", 0.2)
    seconds, has_ended = _logged(FakeWandb(seconds=30), tmp_path, monkeypatch, 10)
    assert seconds < 15
    assert "wandb has not taken everything within 0 s, and is left" in caplog.text
    assert not has_ended
    caplog.clear()
    monkeypatch.setattr(metrics, "_WAITING", 5)
    seconds, has_ended = _logged(FakeWandb(seconds=30), tmp_path, monkeypatch, 100)
    assert seconds < 15
    assert caplog.text.count("wandb is off from step") == 1
    assert not has_ended  # its thread has not, though nothing is logged any more


def test_a_stopped_wandb_service_does_not_keep_the_process(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """The real one, offline; left alone, its clean-up waits for the service when Python exits, without limit."""
    stop = """
import subprocess
from galore_pretrain.train import metrics
metrics._FINISH = 1.0
log = metrics.JsonLines.log
def stopping(self, values, step):
    log(self, values, step)
    if step == 6:
        found = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
        assert found, "no service"
        for pid in found:
            os.kill(int(pid), signal.SIGSTOP)
        print("stopped", *found, file=sys.stderr)
metrics.JsonLines.log = stopping
"""
    arguments = command(tiny_config, tmp_path / "run", "--wandb", "offline")[3:]
    with (tmp_path / "stderr").open("w") as file:  # no pipe, which the service would hold open
        process = subprocess.Popen([executable(), "-c", AFTER_IMPORTS.format(stop), *arguments], stderr=file)
    try:
        code = process.wait(200)
    finally:
        process.kill()
        said = (tmp_path / "stderr").read_text()
        pids = [int(pid) for line in said.splitlines() if line.startswith("stopped ") for pid in line.split()[1:]]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert pids, said
    assert code == 0, said
    assert "wandb has not taken everything within 1 s" in said
    assert_same(tmp_path / "run", finished)


def test_wandb_that_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _logged(FakeWandb(error=ConnectionError("reset")), tmp_path, monkeypatch, 20)
    assert [r.message for r in caplog.records] == ["wandb is off from step 1 on: reset"]


# -- how updates were executed ----------------------------------------------------------------------------------------


def resumed(monkeypatch: pytest.MonkeyPatch, saved: dict[str, Any], **given: Any) -> resume.Resumption:
    """What comes of a command where a checkpoint has these flags, by one of two processes without shards."""
    shared = {"model": "llama_60m", "data": "sample", "steps": 10, "total_batch_size": 8, "grad_clip": 1.0}
    shared |= {"shard": "none", "rank": 8, "memory_budget": 8 * 2**30}
    before, _ = resolve(shared | saved, {}, Processes(2, 2))
    state = {"config": json.loads(json.dumps(before.values())), "trainer": {"step": 5}}
    monkeypatch.setattr(resume, "find_checkpoint", lambda config, output: checkpoint.Saved(Path("saved"), state))
    config, _ = resolve(shared | given, dict.fromkeys(shared | given, "flag"), Processes(2, 2))
    return resume.resolve_resume(config, Path("run"))


def test_updates_are_executed_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"layerwise": True, "activation_checkpointing": True, "batch_size": 2}
    found = resumed(monkeypatch, how)
    assert found.runs_as_before
    assert found.config.execution == ExecutionSettings(True, True, 2, "projected")
    assert found.restored == {*how, "clip_norm"}
    partly = resumed(monkeypatch, how, batch_size=4)  # one micro-batch, whose full norm would be known
    assert partly.runs_as_before
    assert partly.config.execution == ExecutionSettings(True, True, 4, "projected")
    assert partly.restored == {"layerwise", "activation_checkpointing", "clip_norm"}


@pytest.mark.parametrize("reduce", ["full", "projected"])
def test_a_norm_that_was_clipped_and_is_not_known_any_more_is_refused(
    monkeypatch: pytest.MonkeyPatch, reduce: str
) -> None:
    """Were it taken for the execution of before, replicas would each clip by a norm of their own."""
    saved = {"layerwise": False, "activation_checkpointing": False, "batch_size": 2}
    found = resumed(monkeypatch, saved, **saved | {"layerwise": True, "reduce": reduce})
    assert found.config.clip_norm == "full"
    assert not found.runs_as_before
    assert found.restored == {"clip_norm"}
    with pytest.raises(InputError, match="no way to run these updates knows it with 2 processes"):
        fit.fitted(found.config, Outline.of(found.config, load_model_config("llama_60m")), runs_as_before=False)
