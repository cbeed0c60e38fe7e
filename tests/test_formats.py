"""Checkpoints of other versions: those of older formats are read, and one of a newer format says who wrote it.

``fixtures/run-0.1`` is what commit 79b9c66, of format 1, left of ten updates, but for its later checkpoints, its model
and its summary. There, in a folder with model.json and the two texts::

    python -m galore_pretrain --model model.json --optim galore_adamw --rank 2 --update-proj-gap 3 --lr 0.02 \
        --weight-decay 0.1 --grad-clip 1 --total-batch-size 4 --batch-size 2 --layerwise --max-length 16 \
        --data train.jsonl --eval-data valid.jsonl --tokenizer sample --steps 10 --save-every 4 --eval-every 5 \
        --eval-tokens 200 --keep 9 --wandb disabled --output run
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from families import make
from galore_pretrain import __version__
from galore_pretrain.cli import cli
from galore_pretrain.errors import InputError
from galore_pretrain.rundir import checkpoint
from galore_pretrain.rundir.environment import describe_environment
from galore_pretrain.text.tokenizer import load_tokenizer
from runs import MEASURED
from test_checkpoint import STATE, seal

FIXTURE = Path(__file__).parent / "fixtures" / "run-0.1"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old run's folder, in the folder that it was started in."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def invoke(*words: str) -> str:
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def command(old: Path) -> list[str]:
    words: list[str] = json.loads((old / "config.json").read_text())["argv"]
    return words


def lines(old: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def test_a_run_of_format_1_goes_on_bit_for_bit(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To the numbers of the old program; on another CPU or torch, which round otherwise, within 1 %."""
    before, known = lines(old), json.loads((old / "config.json").read_text())
    assert "format" not in known
    assert checkpoint.opened(old / "checkpoints" / "step_00000004").format == 1
    with caplog.at_level("INFO", logger="galore_pretrain"):
        invoke(*command(old))
    assert "step_00000004 at update 4" in caplog.text
    here = describe_environment(torch.device("cpu"))
    is_alike = here["versions"]["torch"] == known["versions"]["torch"]
    is_alike = is_alike and here["hardware"]["cpu"] == known["hardware"]["cpu"]
    for line, theirs in zip(lines(old), before, strict=True):
        told_since = ("subspace_", "eval_bits_per_byte")
        ours = {key: value for key, value in line.items() if not key.startswith(told_since)}
        assert ours == (theirs if is_alike else pytest.approx(theirs, rel=0.01))


def test_what_a_run_leaves_names_its_format(old: Path) -> None:
    invoke(*command(old))
    saved = json.loads((old / "checkpoints" / "step_00000010" / "state.json").read_text())
    assert (saved["format"], saved["version"]) == (checkpoint.FORMAT, __version__)
    assert json.loads((old / "config.json").read_text())["format"] == checkpoint.FORMAT


def test_another_method_is_refused_in_one_line(old: Path) -> None:
    with pytest.raises(InputError, match=r"was made with other options: --rank 3 \(was 2\); repeat the old ones"):
        invoke(*command(old), "--rank", "3")


def test_the_weights_of_format_1_are_read(old: Path) -> None:
    """By eval, export and generate."""
    folder = old / "checkpoints" / "step_00000004"
    found = json.loads(invoke("eval", str(folder), "--json"))
    assert found["eval_tokens"] == lines(old)[4]["eval_tokens"]
    assert lines(old)[4]["eval_loss"] < found["eval_loss"] < math.log(1024)
    invoke("export", str(old), "exported")
    (file,) = folder.glob("*.safetensors")
    saved, exported = load_file(file), load_file("exported/model.safetensors")
    assert exported
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in exported.items())
    assert invoke("generate", str(old), "the king", "--tokens", "4").startswith("the king")


def test_a_tokenizer_is_known_again_by_all_that_it_does(tiny_config: str, tmp_path: Path) -> None:
    """Up to format 2 by its vocabulary, which is compared as such: a run of before goes on."""
    folder = make("GPT-2", tmp_path)
    words = ["--model", tiny_config, "--optim", "adamw", "--lr", "0.01", "--data", "sample", "--tokenizer", str(folder)]
    words += ["--steps", "2", "--save-every", "1", "--total-batch-size", "2", "--max-length", "16", "--keep", "9"]
    words += ["--eval-tokens", "50", "--dtype", "float32", "--output", str(tmp_path / "run")]
    invoke(*words)
    first, second = (tmp_path / "run" / "checkpoints" / f"step_0000000{step}" for step in (1, 2))
    tokenizer = load_tokenizer(str(folder))
    state = json.loads((first / "state.json").read_text())
    assert state["inputs"]["tokenizer"] == tokenizer.fingerprint
    tokenizer_json = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json | {"normalizer": {"type": "Lowercase"}}))
    shutil.rmtree(second)
    with pytest.raises(InputError, match="made with another tokenizer than there is now"):
        invoke(*words)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    state["format"] = 2
    state["inputs"]["tokenizer"] = tokenizer.vocabulary_fingerprint
    (first / "state.json").write_text(json.dumps(state))
    seal(first)
    invoke(*words)
    state = json.loads((second / "state.json").read_text())
    assert (state["format"], state["inputs"]["tokenizer"]) == (checkpoint.FORMAT, tokenizer.fingerprint)


def test_what_transformers_has_no_like_of_is_told_before_training(
    tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--model", tiny_config, "--optim", "adamw", "--lr", "0.01", "--data", "sample", "--steps", "1"]
    words += ["--max-length", "16", "--max-unknown", "1", "--output", str(tmp_path / "run")]
    words += ["--tokenizer", str(make("words", tmp_path))]

    def stop(*_: object) -> None:
        raise InputError("training would begin here")

    monkeypatch.setattr("galore_pretrain.run.assemble", stop)
    with pytest.raises(InputError, match="training would begin here"):
        invoke(*words)
    # By transformers 5.23 and by 5.0.
    wanted = ("AutoTokenizer will not take the exported folder", "AutoTokenizer will give")
    assert any(text in caplog.text for text in wanted)


def test_old_names_are_translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"model.first": torch.ones(2), "optimizer.a.weight.first": torch.full((3,), 7.0)}
    checkpoint.save(tmp_path / "step_00000001", tensors, STATE | {"format": 1})
    monkeypatch.setattr(checkpoint, "OLD_NAMES", {"first": "momentum"})
    wanted = {"model.first": torch.zeros(2), "optimizer.a.weight.momentum": torch.zeros(3)}
    checkpoint.opened(tmp_path / "step_00000001").load(wanted)
    assert torch.equal(wanted["optimizer.a.weight.momentum"], tensors["optimizer.a.weight.first"])
    assert torch.equal(wanted["model.first"], tensors["model.first"])
    checkpoint.save(tmp_path / "step_00000002", tensors, STATE)  # today's "first" is no old name
    with pytest.raises(InputError, match="momentum is missing"):
        checkpoint.opened(tmp_path / "step_00000002").load(wanted)


def test_a_newer_format_is_refused_with_the_version_that_wrote_it(old: Path) -> None:
    """As it is: it may hold nothing that this version would look for, and is not damaged for that."""
    folder = old / "checkpoints" / "step_00000004"
    (folder / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT + 1, "version": "7.5"}))
    seal(folder)
    told = (
        rf"step_00000004 is of format {checkpoint.FORMAT + 1}, written by galore-pretrain 7\.5; .*install that version"
    )
    for words in (command(old), ["eval", str(old)], ["export", str(folder), "exported"]):
        with pytest.raises(InputError, match=told) as error:
            invoke(*words)
        assert "\n" not in str(error.value)
    assert os.listdir(old / "checkpoints") == ["step_00000004"]


@pytest.mark.parametrize("number", ["2", 0, 1.5, None])
def test_a_format_that_is_none_is_damage(number: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "step_00000001", {"a": torch.ones(1)}, STATE | {"format": number})
    with pytest.raises(checkpoint.DamagedError, match=r"state\.json names the format"):
        checkpoint.opened(tmp_path / "step_00000001")
