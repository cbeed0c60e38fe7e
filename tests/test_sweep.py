"""Sweeps: the right runs with the right flags, tuned where asked, stopped and gone on with, and reported."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from galore_pretrain.cli import cli
from galore_pretrain.errors import InputError
from galore_pretrain.optim.methods import _ENTRIES
from galore_pretrain.study.sweep import GRID, Entry, Planned, Sweep, entries
from warm_python import UNPLANNED, executable

FULL = bool(os.environ.get("FULL"))


def short(model: str, output: Path, *more: str) -> list[str]:
    flags = ["--model", model, "--data", "sample", "--dtype", "float32", "--steps", "6", "--total-batch-size", "2"]
    flags += ["--max-length", "32", "--eval-tokens", "300", "--wandb", "disabled"]
    return ["sweep", *more, *flags, "--output", str(output)]


def test_the_papers_tables_are_lists_of_runs() -> None:
    assert [entry.name for entry in entries("table2", "llama_60m", None)] == [
        "adamw", "galore_adamw", "low_rank", "lora", "relora", "frozen",
    ]  # fmt: skip
    assert [entry.flags["lr"] for entry in entries("lr", "llama_60m", "lora")] == list(GRID)
    figure = {entry.name: entry.flags for entry in entries("figure3", "llama_1b", None)}
    assert figure["galore_adafactor r1024"] == {"optim": "galore_adafactor", "rank": 1024, "betas": (0.9, 0.999)}
    assert len(figure) == 9
    assert {entry.name for entry in entries("table3", "llama_7b", None)} == {"adamw8bit", "galore_adamw8bit"}
    assert "natural_galore" in {entry.name for entry in entries("natural", "llama_60m", None)}
    assert entries("lr", "llama_60m", None)[0].flags["optim"] == "galore_adamw"
    with pytest.raises(InputError, match="has rows of its own"):
        entries("table2", "llama_60m", "lora")
    with pytest.raises(InputError, match="neither one of methods, table2"):
        entries("table9", "llama_60m", None)


def test_a_figure_has_the_papers_length() -> None:
    arguments = ["sweep", "figure3", "--model", "llama_1b", "--data", "sample", "--plan-only"]
    assert CliRunner().invoke(cli, arguments).output.count("--steps 10000 ") == 9
    assert CliRunner().invoke(cli, [*arguments, "--steps", "7"]).output.count("--steps 7 ") == 9
    assert "--steps" not in CliRunner().invoke(cli, [*arguments, "--max-tokens", "recipe"]).output


def test_commands_are_shown_without_being_run(tiny_config: str, tmp_path: Path) -> None:
    arguments = short(
        tiny_config, tmp_path / "out", "table2", "--seeds", "2", "--tune-matrices", "0.1,1", "--plan-only"
    )
    shown = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout.splitlines()
    assert len(shown) == 5 * 2 + 2 + 1  # each of five at two factors, frozen with two seeds, and a word on the rest
    assert all(line.startswith("galore-pretrain --model ") for line in shown[:-1])
    assert shown[-1].startswith("# and factors beyond these, where the smallest or largest does best; then seeds 1 of")
    assert not (tmp_path / "out").exists()


def test_a_flag_goes_to_the_rows_that_know_it(tiny_config: str, tmp_path: Path) -> None:
    arguments = short(tiny_config, tmp_path / "out", "table2", "--rank", "4", "--lora-alpha", "8", "--plan-only")
    shown = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout.splitlines()
    with_rank = {line.split("--optim ")[1].split()[0] for line in shown if "--rank 4" in line}
    assert with_rank == {"galore_adamw", "low_rank", "lora", "relora"}
    assert {line.split("--optim ")[1].split()[0] for line in shown if "--lora-alpha 8" in line} == {"lora", "relora"}
    more = ["--lora-alpha", "8", "--tune-matrices", "0.1,1", "--seeds", "2", "--plan-only"]
    arguments = short(tiny_config, tmp_path / "out", "table2", *more)
    shown = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout.splitlines()
    assert {line.split("--optim ")[1].split()[0] for line in shown if "--lora-alpha 8" in line} == {"lora", "relora"}


def test_names_of_one_folder_are_refused(tiny_config: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"runs": {"a b": {"optim": "adamw"}, "a-b": {"optim": "adamw"}}}))
    with pytest.raises(InputError, match="two names make one folder"):
        entries(str(file), tiny_config, None)
    file.write_text(json.dumps({"runs": {"a": {}, "b": {"optim": "lora"}}}))
    assert [entry.flags["optim"] for entry in entries(str(file), tiny_config, "sgd")] == ["sgd", "lora"]
    for flags, message in (
        ({"optim": "adamw", "max-tokens": "much"}, "not a count"),
        ({"lrr": 1}, "is no flag of a run"),
    ):
        file.write_text(json.dumps({"runs": {"a": flags}}))
        arguments = short(tiny_config, tmp_path / "out", str(file))
        with pytest.raises((InputError, click.UsageError), match=message):
            CliRunner().invoke(cli, arguments, standalone_mode=False, catch_exceptions=False)


def test_flags_that_do_not_fit_are_refused_before_any_run(tiny_config: str, tmp_path: Path) -> None:
    for arguments, message in (
        (["table3", "--lora-alpha", "5"], "no meaning for --optim adamw8bit"),
        (["table2", "--tune-matrices", "much"], "not numbers"),
        (["table2", "--optim", "lora"], "rows of its own"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(
                cli, short(tiny_config, tmp_path / "out", *arguments), standalone_mode=False, catch_exceptions=False
            )
    assert not (tmp_path / "out").exists()


def finished(sweep: Sweep, entry: Entry, losses: dict[float, float]) -> dict[float, Planned]:
    """Runs of an entry at factors, with these losses."""
    runs = {factor: sweep._planned(entry, 0, factor) for factor in losses}
    for factor, loss in losses.items():
        runs[factor].folder.mkdir(parents=True)
        (runs[factor].folder / "summary.json").write_text(json.dumps({"eval_loss": loss}))
    return runs


@pytest.mark.parametrize(
    ("losses", "further"),
    [
        ({0.1: 3.0, 0.3: 2.0, 1.0: 4.0}, None),
        ({0.1: 2.0, 0.3: 3.0, 1.0: 4.0}, 0.03),
        ({0.1: 4.0, 0.3: 3.0, 1.0: 2.0}, 3.0),
        ({0.1: 4.0, 0.3: math.nan, 1.0: 2.0}, 3.0),
        ({0.1: 4.0, 0.3: 3.0, 1.0: math.nan}, None),  # it lies between, as far as can be told
        ({0.0: 1.0, 0.1: 2.0, 0.3: 3.0}, 0.03),  # nothing lies beyond frozen matrices
        ({0.9: 4.0, 1.0: 3.0}, 1.1),  # to one digit it is the same
        ({1.1: 3.0, 1.2: 2.0}, 1.3),
        ({2.0: 1.0, 2.4: 2.0}, 1.7),
        ({0.1: 2.0, 0.3: 3.0, 1.0: 4.0, 0.03: 1.5, 0.009: 1.2, 0.003: 1.0}, None),  # far enough
        ({1.0: 2.0}, None),
    ],
)
def test_beyond_an_edge_that_does_best_more_is_tried(
    losses: dict[float, float], further: float | None, tmp_path: Path
) -> None:
    entry = Entry("adamw", {"optim": "adamw"})
    sweep = Sweep([entry], {"model": "llama_1m"}, [0], (0.1, 0.3, 1.0), 1, tmp_path)
    assert sweep._beyond(finished(sweep, entry, losses)) == further


def test_all_methods_are_a_sweep_and_the_frozen_control() -> None:
    lines = entries("methods", "llama_1m", None)
    assert [line.flags["optim"] for line in lines] == [*(entry.name for entry in _ENTRIES), "adamw"]
    assert lines[-1].flags["matrix_lr_scale"] == 0


def command(arguments: list[str]) -> list[str]:
    """The command line, in a process of its own that starts its runs so too."""
    return [executable(), "-m", "galore_pretrain", *arguments]


def swept(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {UNPLANNED: "1"}
    return subprocess.run(command(arguments), capture_output=True, text=True, timeout=500, check=False, env=environment)


@pytest.fixture
def own(tmp_path: Path) -> str:
    """One method to tune, and with FULL=1 a second one, before one that diverges."""
    file = tmp_path / "mine.json"
    runs: dict[str, Any] = {"low rank": {"optim": "galore_adamw", "rank": 4, "update-proj-gap": 3}}
    if FULL:
        runs["plain"] = {"optim": "adamw"}
    file.write_text(json.dumps({"runs": runs | {"diverging": {"optim": "sgd", "lr": 1e30, "steps": 14}}}))
    return str(file)


@pytest.mark.slow
def test_a_sweep_tunes_goes_on_and_reports(tiny_config: str, own: str, tmp_path: Path) -> None:
    """A run that fails does not stop the others; what is finished is not made again."""
    output = tmp_path / "out"
    arguments = short(tiny_config, output, own, "--tune-matrices", "0.01,1", "--seeds", "2", "--jobs", "2")
    result = swept(arguments)
    assert result.returncode == 1, result.stderr
    assert "failed: " in result.stderr
    assert "diverging" in result.stderr
    tuning = json.loads((output / "tuning.json").read_text())
    assert set(tuning["chosen"]) == {"low rank", *["plain"] * FULL}
    for name, chosen in tuning["chosen"].items():
        losses = tuning["losses"][name]
        assert losses[str(chosen)] == min(losses.values())
        edges = {min(map(float, losses)), max(map(float, losses))}
        assert chosen not in edges or len(losses) == 2 + 3, "an edge is no optimum"
        factor = f"{chosen:g}"
        for seed in (0, 1):
            assert (output / f"{name.replace(' ', '-')}-m{factor}-seed{seed}" / "summary.json").exists()
    assert "| method | lr | matrices × | seeds |" in result.stdout
    assert (output / "report" / "report.html").exists()
    before = {file: file.stat().st_mtime_ns for file in output.glob("*/summary.json")}
    again = swept(arguments)
    finished = [line for line in result.stdout.splitlines() if not line.startswith("| sgd")]  # which is tried again
    assert [line for line in again.stdout.splitlines() if not line.startswith("| sgd")] == finished
    assert {file: file.stat().st_mtime_ns for file in output.glob("*/summary.json")} == before


@pytest.mark.slow
def test_a_signal_reaches_the_runs_and_the_sweep_goes_on(tiny_config: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"runs": {"long": {"optim": "adamw"}}}))
    arguments = [*short(tiny_config, output, str(file)), "--steps", "250", "--eval-every", "250"]
    with subprocess.Popen(command(arguments), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        metrics = output / "long-seed0" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
    saved = [folder.name for folder in (output / "long-seed0" / "checkpoints").iterdir()]
    assert saved
    assert "step_00000250" not in saved
    result = swept(arguments)
    assert result.returncode == 0, result.stderr
    assert "going on from" in (output / "long-seed0" / "log.txt").read_text()


def test_a_folder_that_holds_another_run_is_refused(tiny_config: str, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"model": tiny_config, "data": "sample", "steps": 5, "grad_clip": 1.0}
    work = Sweep([Entry("a", {"optim": "adamw"})], shared, [0], [], 1, tmp_path)
    work.check()
    (tmp_path / "a-seed0").mkdir()
    entries_of = {"steps": {"value": 5, "origin": "flag"}, "clip_norm": {"value": "projected", "origin": "chosen"}}
    (tmp_path / "a-seed0" / "config.json").write_text(json.dumps({"config": entries_of}))
    work.check()  # what a run chose for itself is no other option
    entries_of["clip_norm"]["origin"] = "flag"  # but what its user chose is
    (tmp_path / "a-seed0" / "config.json").write_text(json.dumps({"config": entries_of}))
    with pytest.raises(InputError, match=r"made with other options: --clip-norm full \(was projected\)"):
        work.check()
    entries_of["clip_norm"]["origin"] = "as before"
    entries_of["lr"] = {"value": 0.5, "origin": "flag"}
    (tmp_path / "a-seed0" / "config.json").write_text(json.dumps({"config": entries_of}))
    with pytest.raises(InputError, match=r"made with other options: --lr 0\.001 \(was 0\.5\)"):
        work.check()


def test_each_of_several_texts_goes_to_every_run(tmp_path: Path) -> None:
    planned = Planned(tmp_path, {"data": ("a", "b"), "betas": (0.9, 0.99)})
    assert planned.arguments()[:6] == ["--data", "a", "--data", "b", "--betas", "0.9,0.99"]
