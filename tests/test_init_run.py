"""Runs that begin from runs of ours, and from models of the hub: --init RUN, --init ORG/NAME."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fakehub import Fault
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.study.sweep import entries
from pretrained import begin_texts, make_folder, transformers_loss
from runs import COMMAND_LINE, Done, lines, python
from test_dist import run_all
from test_init import SHORT, begin, first_loss
from warm import WarmHub

BEFORE: dict[str, list[str]] = {
    "galore_adamw": ["--rank", "4"],
    "relora": ["--rank", "4", "--lora-alpha", "16"],
    "low_rank": ["--rank", "5"],
    "scale": ["--weights", "int8", "--weight-group", "16"],
}


def summary(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("optim", BEFORE)
def test_a_run_begins_where_another_ended(optim: str, tiny_config: str, tmp_path: Path) -> None:
    """Whatever the method kept the matrices as, with a new optimizer and the run's tokenizer; or in its middle."""
    first = tmp_path / "first"
    new = ["--model", tiny_config, "--output", str(first), "--optim", optim, *BEFORE[optim], *SHORT]
    done = python(COMMAND_LINE, *new, "--keep", "9")
    assert done.returncode == 0, done.stderr
    second = begin(str(first), tmp_path / "second", "--optim", "muon")
    assert second.returncode == 0, second.stderr
    assert first_loss(tmp_path / "second") == pytest.approx(summary(first)["eval_loss"], rel=1e-5)
    assert lines(tmp_path / "second")[1]["step"] == 1
    middle = begin(str(first / "checkpoints" / "step_00000004"), tmp_path / "third", "--optim", optim, *BEFORE[optim])
    assert middle.returncode == 0, middle.stderr
    values = {name: entry["value"] for name, entry in json.loads((first / "config.json").read_text())["config"].items()}
    assert values["bos"] == "no"
    loss = first_loss(tmp_path / "third")
    if optim == "low_rank":  # of its own rank, it is what it was
        told = python(COMMAND_LINE, "eval", str(first / "checkpoints" / "step_00000004"), "--json")
        assert loss == pytest.approx(json.loads(told.stdout)["eval_loss"], rel=1e-4)
    assert summary(tmp_path / "second")["eval_loss"] < summary(first)["eval_loss"]


def test_a_run_of_two_processes_is_read_by_one_and_by_two(tiny_config: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    short = ["--optim", "galore_adamw", "--rank", "4", "--batch-size", "1", *SHORT]
    run_all(2, {first: ["--model", tiny_config, "--output", str(first), *short]}, tmp_path)
    for processes in (1, 2):
        output = tmp_path / f"from-{processes}"
        run_all(processes, {output: ["--init", str(first), "--output", str(output), *short]}, tmp_path)
        assert first_loss(output) == pytest.approx(summary(first)["eval_loss"], rel=1e-5)


def test_a_run_keeps_its_markers(tiny_config: str, tmp_path: Path) -> None:
    """A run with new weights had none, though its tokenizer adds one; one that said so had, and so has what follows."""
    folder = make_folder(tmp_path / "given")
    begin_texts(folder)
    for bos in ("no", "yes"):
        first = tmp_path / bos
        new = ["--model", tiny_config, "--tokenizer", folder, "--bos", bos, "--output", str(first), "--optim", "adamw"]
        assert python(COMMAND_LINE, *new, *SHORT).returncode == 0
        config, origins = resolve({"init": str(first), "steps": 2, "data": "sample", "rank": 4}, {})
        assert (config.bos, origins["bos"], config.tokenizer) == (bos, "init", str(first))
        shutil.rmtree(folder) if bos == "yes" else None
        second = begin(str(first), tmp_path / f"from-{bos}")
        assert second.returncode == 0, second.stderr
        assert first_loss(tmp_path / f"from-{bos}") == pytest.approx(summary(first)["eval_loss"], rel=1e-6)


def test_a_run_is_no_model_by_itself(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"is of a run, with its weights: give --init {finished}"):
        resolve({"model": str(finished), "steps": 1}, {})
    shutil.copytree(finished, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    with pytest.raises(InputError, match=r"is a run without its checkpoints; name .*/bare/model"):
        resolve({"init": str(tmp_path / "bare"), "steps": 1}, {})
    with pytest.raises(InputError, match=f"name that of {finished}/model"):
        entries("figure3", str(finished), None)
    newest = sorted((finished / "checkpoints").iterdir())[-1]
    for place in (finished, newest, finished / "model"):
        assert load_model_config(str(place)).hidden_size == 32


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(output / "model" / "model.safetensors")
    return found


def test_a_decay_is_branched_from_any_checkpoint(tiny_config: str, tmp_path: Path) -> None:
    """Bit for bit what a run of that length is; not where the decay has begun, nor by another schedule."""
    of_all = ["--model", tiny_config, "--optim", "galore_adamw", "--rank", "4", "--update-proj-gap", "3", *SHORT[2:]]
    wsd = [*of_all, "--scheduler", "wsd", "--warmup-steps", "2"]

    def train(name: str, *flags: str) -> Done:
        return python(COMMAND_LINE, *flags, "--output", str(tmp_path / name))

    assert train("long", *wsd, "--steps", "16", "--decay-steps", "4", "--keep", "99").returncode == 0
    assert train("short", *wsd, "--steps", "9", "--decay-steps", "3").returncode == 0
    branch = ["--resume", str(tmp_path / "long" / "checkpoints" / "step_00000006")]
    done = train("branch", *wsd, "--steps", "9", "--decay-steps", "3", *branch)
    assert done.returncode == 0, done.stderr
    ours, theirs = weights_of(tmp_path / "branch"), weights_of(tmp_path / "short")
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert lines(tmp_path / "branch") == lines(tmp_path / "short")[6:]
    late = ["--resume", str(tmp_path / "long" / "checkpoints" / "step_00000014")]
    refused = train("late", *wsd, "--steps", "30", "--decay-steps", "3", *late)
    assert refused.returncode == 2
    assert "--steps 30 (was 16)" in refused.stderr
    other = train("other", *of_all, "--steps", "9", "--warmup-steps", "2", *branch)
    assert other.returncode == 2
    assert "--scheduler cosine (was wsd)" in other.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decay_steps": 3}, "only --scheduler wsd decays at the end"),
        ({"scheduler": "wsd", "decay_steps": 8, "warmup_steps": 3}, "are together more than --steps 10"),
    ],
)
def test_a_decay_that_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve({"model": "llama_1m", "data": "sample", "steps": 10, "rank": 4} | values, {})


def test_a_decay_has_its_defaults() -> None:
    base = {"model": "llama_1m", "data": "sample", "steps": 50, "rank": 4}
    for given, warmup, decay in (
        ({}, 5, None),
        ({"scheduler": "wsd"}, 5, 5),
        ({"scheduler": "wsd", "decay_steps": 50}, 0, 50),
    ):
        config, _ = resolve(base | given, {})
        assert (config.warmup_steps, config.decay_steps) == (warmup, decay)
        assert config.min_lr_ratio == (0.0 if given else 0.1)


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(warm_hub: WarmHub, tmp_path: Path) -> WarmHub:
    make_folder(tmp_path / "hub" / "org" / "small-1.5B", num_key_value_heads=2, shard_size="100KB")
    warm_hub.hold(tmp_path / "hub")
    return warm_hub


def at_hub(tmp_path: Path, hub: WarmHub, *arguments: str) -> Done:
    return hub.python(tmp_path, COMMAND_LINE, *arguments)


def downloaded(tmp_path: Path) -> set[str]:
    folder = tmp_path / "hf" / "hub" / "models--org--small-1.5B" / "snapshots"
    return {file.name for file in folder.rglob("*") if file.is_file()}


MODEL = ["--init", "org/small-1.5B", "--optim", "adamw", "--output", "run", *SHORT]


@pytest.mark.slow
@pytest.mark.network
def test_a_model_of_the_hub(hub: WarmHub, tmp_path: Path) -> None:
    """A plan takes config.json alone; a run takes safetensors and tokenizer, and needs no hub to go on."""
    planned = at_hub(tmp_path, hub, "plan", "--init", "org/small-1.5B", "--optim", "adamw", "--lr", "1", "--steps", "1",
                     "--max-length", "48")  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith("small-1.5B in bfloat16")
    assert downloaded(tmp_path) == {"config.json"}
    done = at_hub(tmp_path, hub, *MODEL)
    assert done.returncode == 0, done.stderr
    expected = transformers_loss(tmp_path / "hub" / "org" / "small-1.5B")
    assert first_loss(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert len([name for name in downloaded(tmp_path) if name.endswith(".safetensors")]) > 1
    before = lines(tmp_path / "run")
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    shutil.rmtree(tmp_path / "run" / "model")
    hub.fault = Fault(times=10**6, status=500, suffix="")
    done = at_hub(tmp_path, hub, *MODEL)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "run") == before


@pytest.mark.network
@pytest.mark.parametrize("status", [429, 503, None])
def test_a_busy_hub_and_a_connection_that_drops_are_asked_again(
    status: int | None, hub: WarmHub, tmp_path: Path
) -> None:
    hub.fault = Fault(times=2, status=status, at=50_000 if status is None else 0, suffix=".safetensors")
    done = at_hub(tmp_path, hub, *MODEL)
    assert done.returncode == 0, done.stderr
    assert hub.fault.times == 0
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in exported.values())
    expected = transformers_loss(tmp_path / "hub" / "org" / "small-1.5B")
    assert first_loss(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


@pytest.mark.network
def test_what_the_hub_has_not_is_told(hub: WarmHub, tmp_path: Path) -> None:
    model = tmp_path / "hub" / "org" / "small-1.5B"
    unknown = at_hub(tmp_path, hub, "--init", "org/smal", *MODEL[2:])
    assert unknown.returncode == 2
    assert "--init org/smal: no such folder here, and the hub has no model of that name" in unknown.stderr
    for file in model.glob("*.safetensors"):
        file.unlink()
    lost = at_hub(tmp_path, hub, *MODEL)
    assert lost.returncode == 2
    assert "names model-0000" in lost.stderr
    (model / "model.safetensors.index.json").unlink()
    shutil.rmtree(tmp_path / "hf")
    bare = at_hub(tmp_path, hub, *MODEL)
    assert bare.returncode == 2
    assert "has neither model.safetensors nor model.safetensors.index.json" in bare.stderr
    (model / "config.json").unlink()
    shutil.rmtree(tmp_path / "hf")
    empty = at_hub(tmp_path, hub, *MODEL)
    assert empty.returncode == 2
    assert "has no config.json" in empty.stderr
    assert not (tmp_path / "run").exists()
