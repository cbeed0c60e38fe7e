"""eval, export and generate: what training left, loaded again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from galore_pretrain.cli import cli
from galore_pretrain.errors import InputError
from galore_pretrain.rundir import loaded as trained


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module", params=["galore_adamw", "lora"])
def run(request: pytest.FixtureRequest, tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, of a dense model and of one in factors."""
    output = tmp_path_factory.mktemp("runs") / "run"
    invoke(
        "--model", tiny_config, "--optim", request.param, "--rank", 4, "--data", "sample", "--dtype", "float32",
        "--steps", 10, "--lr", 0.02, "--total-batch-size", 4, "--max-length", 32, "--eval-tokens", 500,
        "--wandb", "disabled", "--output", output, "--save-every", 5,
    )  # fmt: skip
    return output


def test_eval_repeats_the_last_evaluation(run: Path, tmp_path: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    newest = run / "checkpoints" / "step_00000010"
    for path in (run, newest):
        answer = json.loads(invoke("eval", path, "--json"))
        assert answer == {name: summary[name] for name in answer}
    older = json.loads(invoke("eval", run / "checkpoints" / "step_00000005", "--json"))
    assert older["eval_loss"] > summary["eval_loss"]
    dense = json.loads(invoke("eval", run / "model", "--max-length", 32, "--eval-tokens", 500, "--json"))
    assert dense["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-6)
    (tmp_path / "text.txt").write_text("What is this? " * 300)
    other = invoke("eval", run, "--data", tmp_path / "text.txt", "--eval-data", tmp_path / "text.txt")
    assert "text.txt" in other
    assert "perplexity" in other
    (tmp_path / "dev.txt").write_text("What is this? Nobody knows.\n\n" * 2000)
    flags = ("--eval-tokens", 3000, "--json")
    alone = json.loads(invoke("eval", run, "--data", tmp_path / "dev.txt", *flags))
    assert alone["eval_tokens"] > 1500  # all of it, where a run would hold out a part
    assert alone == json.loads(invoke("eval", run, "--eval-data", tmp_path / "dev.txt", *flags))


def test_export_writes_what_the_run_wrote(run: Path, tmp_path: Path) -> None:
    invoke("export", run, tmp_path / "dense")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "dense", run / "model"))
    assert type(ours).__name__ == "LlamaForCausalLM"
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert (ours.config.eos_token_id, ours.config.bos_token_id) == (theirs.config.eos_token_id, None)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("the king")["input_ids"]
    with pytest.raises(InputError, match="exists; name a new folder"):
        invoke("export", run, tmp_path / "dense")


def test_generate_says_the_same_for_a_seed(run: Path) -> None:
    one = invoke("generate", run, "The king", "--tokens", 12, "--seed", 3)
    assert one.startswith("The king")
    assert len(one) > len("The king\n")
    assert invoke("generate", run, "The king", "--tokens", 12, "--seed", 3) == one
    assert invoke("generate", run, "The king", "--tokens", 12, "--seed", 4) != one
    likeliest = {
        invoke("generate", path, "The king", "--tokens", 8, "--temperature", 0) for path in (run, run / "model")
    }
    assert len(likeliest) == 1
    with pytest.raises(InputError, match="the model has 64 positions"):
        invoke("generate", run, "word " * 200)
    invoke("generate", run, "", "--tokens", 3)


def test_what_is_no_model_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(InputError, match="neither a run, a checkpoint"):
        invoke("eval", tmp_path)
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(InputError, match=r"nowhen: is not there; did you mean .*nowhere\? give a run"):
        invoke("eval", tmp_path / "nowhen")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    with pytest.raises(InputError, match="nor a folder of one of LlamaForCausalLM"):
        invoke("eval", other)
    copy = tmp_path / "damaged"
    shutil.copytree(run / "checkpoints" / "step_00000010", copy)
    next(copy.glob("*.safetensors")).write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        trained.load(copy, {}, torch.device("cpu"))
