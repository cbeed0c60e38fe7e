"""--profile says where time goes, and --compile changes how fast: neither what is computed."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from galore_pretrain.config.resolve import resolve
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.model.position import TrainingPosition
from galore_pretrain.train.build import compile_layers, model_for, set_up_model
from galore_pretrain.train.profile import Profile, union_length
from runs import COMMAND_LINE, TRACED, command, lines, python, run

FULL = bool(os.environ.get("FULL"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--layerwise", "--no-layerwise"])
def test_profile_says_where_the_time_of_updates_goes(mode: str, tiny_config: str, tmp_path: Path) -> None:
    done = run(tiny_config, tmp_path / "profiled", mode, "--profile", "4", "--refresh", "together")
    same = run(tiny_config, tmp_path / "same", mode, "--refresh", "together")
    assert [r.returncode for r in (done, same)] == [0, 0], done.stderr
    assert lines(tmp_path / "profiled") == lines(tmp_path / "same")
    table = (tmp_path / "profiled" / "profile" / "table.txt").read_text()
    assert table.splitlines()[0] in done.stderr
    head, _, heaviest = table.partition("the ten heaviest")
    assert head.startswith("4 updates, ")
    shares = {part: float(share) for part, share in re.findall(r"^(\w+) +[\d.]+ ms +([\d.]+) %", head, re.MULTILINE)}
    assert set(shares) == {
        "data", "forward", "backward", "optimizer", "refresh", "logging", "evaluation", "checkpoint", "other"
    }  # fmt: skip
    assert 99 < sum(shares.values()) < 101
    assert all(shares[part] > 0 for part in ("forward", "backward", "optimizer", "refresh", "checkpoint"))
    assert "aten::mm" in heaviest
    with gzip.open(tmp_path / "profiled" / "profile" / "trace.json.gz") as file:
        named = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"forward", "backward", "optimizer", "refresh"} <= named


def test_a_run_that_ends_sooner_is_profiled_as_far_as_it_went(tiny_config: str, tmp_path: Path) -> None:
    done = run(tiny_config, tmp_path / "run", "--profile", "100", planned=True)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert table.startswith("10 updates, ")
    found = re.search(r"^other .* ([\d.]+) %", table, re.MULTILINE)
    assert found is not None
    assert float(found[1]) < 20  # neither the export nor the plan is an update's


def test_a_run_of_warm_up_alone_says_that_nothing_was_seen(tiny_config: str, tmp_path: Path) -> None:
    done = run(tiny_config, tmp_path / "run", "--profile", "100", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "--profile: the run ended with its first 2 updates, which do not count" in done.stderr
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "script"),
    [
        (("--optim", "lora", "--layerwise", "--activation-checkpointing"), COMMAND_LINE),
        (("--optim", "galore_adamw", "--no-layerwise"), COMMAND_LINE if FULL else TRACED),
    ],
)
def test_compiled_layers_compute_the_same(
    flags: tuple[str, ...], script: str, tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first with all that C++ might draw, save or free otherwise; it is compiled anew, by that process alone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    runs = {}
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        words = command(tiny_config, tmp_path / name, *flags, "--batch-size", "2", *more)[3:]
        if "lora" in flags:
            del words[(i := words.index("--update-proj-gap")) : i + 2]
        done = python(script, *words)
        assert done.returncode == 0, done.stderr
        runs[name] = [line["loss"] for line in lines(tmp_path / name)]
    assert runs["compiled"] == pytest.approx(runs["eager"], rel=1e-4)


def test_all_layers_run_as_the_code_of_one(tiny_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one compilation a layer, nor one an update for what dropout is drawn from. What is traced is counted."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda layer: compiled(layer, backend="eager"))
    config = resolve({"model": tiny_config, "optim": "lora", "rank": 4, "data": "sample", "steps": 10}, {})[0]
    position = TrainingPosition()
    model = set_up_model(config, model_for(config, load_model_config(tiny_config), position=position))
    counters["stats"].clear()
    compile_layers(model)
    rows = torch.zeros(2, 16, dtype=torch.long)
    graphs = []
    for update in range(3):
        position.update = update
        mean_loss(model, rows, rows, rows.numel()).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[2], graphs


class Recorded:
    """Stands for an event of CUDA: the device's clock ticks where it is recorded."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Recorded.now

    def synchronize(self) -> None:
        Recorded.now += 1000.0  # whoever waits sooner than at the end spoils what is measured

    def elapsed_time(self, after: "Recorded") -> float:
        return after.at - self.at


def test_a_gpu_is_timed_without_waiting_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *arguments: pytest.fail("it waits"))
    optimizer = torch.nn.Module()  # on which a profile only leaves its observer
    watch = Profile(2, tmp_path, torch.device("cuda"), optimizer)  # type: ignore[arg-type]
    report = None
    for update in range(5):
        with watch.span("forward"):
            Recorded.now += 3.0
        with watch.span("backward"):
            Recorded.now += 5.0
            with watch.span("optimizer"):
                Recorded.now += 2.0
            Recorded.now += 1.0
        Recorded.now += 0.5
        report = watch.update_done()
        assert (report is None) == (update != 3)
        if report:
            break
    assert report is not None
    times = {part: float(ms) for part, ms in re.findall(r"^(\w+) .* device +([\d.]+) ms", report, re.MULTILINE)}
    assert times["forward"] == 3.0
    assert times["backward"] == 6.0
    assert times["optimizer"] == 2.0
    assert times["other"] == 0.5
    assert "the device was idle for 100.0 % of the time" in report  # a CPU's profile has no event of a device


def test_time_that_several_kernels_cover_counts_once() -> None:
    assert union_length([]) == 0
    assert union_length([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5
