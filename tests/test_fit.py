"""What does not fit together is refused on every road; what others load has what they ask for; places to write."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from galore_pretrain.cli import cli
from galore_pretrain.errors import InputError
from galore_pretrain.rundir.export import _name_beginning
from runs import command

ROADS = ("", "checkpoints/step_00000012", "model")
"""What `eval`, `export` and `generate` take: a run, a checkpoint, a Hugging Face folder."""
ROWS = ("--max-length", "48", "--eval-tokens", "500")


def invoke(*words: object) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False, catch_exceptions=False)
    return result.stdout


def refusal(*words: object) -> str:
    """The one line by which a command is refused."""
    with pytest.raises(InputError) as error:
        invoke(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of more tokens than the model has, each a number's name."""
    folder: Path = tmp_path_factory.mktemp("tokenizers") / "large"
    words = {"</s>": 0, "<unk>": 1} | {str(number): number for number in range(2, 2000)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    settings = {"eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 8}
    PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(folder)
    return folder


# -- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ROADS)
def test_a_larger_vocabulary_is_refused_on_every_road(road: str, finished: Path, large: Path) -> None:
    message = refusal("eval", finished / road, "--tokenizer", large, *ROWS)
    assert "produces ids up to 1999, but --model" in message
    assert "has a vocabulary of 1024" in message


def test_a_folder_with_another_tokenizer_generates_nothing(finished: Path, large: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "model", tmp_path / "model")
    for file in [*(tmp_path / "model").glob("token*"), *(tmp_path / "model").glob("*.model")]:
        file.unlink()
    for file in large.iterdir():
        shutil.copy(file, tmp_path / "model")
    for words in (("generate", tmp_path / "model", "1999"), ("export", tmp_path / "model", tmp_path / "other")):
        assert "has a vocabulary of 1024" in refusal(*words)


@pytest.mark.parametrize("road", ROADS)
def test_longer_rows_than_positions_are_refused_on_every_road(road: str, finished: Path) -> None:
    message = refusal("eval", finished / road, "--max-length", 65)
    assert message.startswith("--max-length 65 exceeds the 64 positions")
    assert message.endswith("give --max-length 64, or less")
    assert "perplexity" in invoke("eval", finished / road, "--max-length", 64, "--eval-tokens", 500)


def test_the_default_length_is_refused_where_it_does_not_fit(finished: Path) -> None:
    assert refusal("eval", finished / "model").startswith("--max-length 256 exceeds the 64 positions")
    assert invoke("generate", finished / "model", "The", "--tokens", 2).startswith("The")


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(("flag", "value"), [("--batch-size", 0), ("--max-length", 1)])
def test_bounds_of_flags_hold_on_every_road(flag: str, value: int, road: str, finished: Path) -> None:
    assert refusal("eval", finished / road, flag, value).startswith(f"{flag} {value} must be at least")


def test_an_evaluation_takes_any_batch(finished: Path) -> None:
    """It makes no update, whose sequences a batch would have to divide."""
    losses = []
    for road in ROADS:
        for size in (1, 7):
            answer = json.loads(invoke("eval", finished / road, *ROWS, "--batch-size", size, "--json"))
            losses.append(answer["eval_loss"])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


@pytest.mark.parametrize("fault", ["missing", "of another shape", "cut off"])
def test_a_folder_without_all_weights_is_refused(fault: str, finished: Path, tmp_path: Path) -> None:
    """transformers draws new ones for those that are missing, and the number would be of no model."""
    folder = tmp_path / "model"
    shutil.copytree(finished / "model", folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "of another shape":
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    if fault == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    message = refusal("eval", folder, *ROWS)
    assert message.startswith(f"{folder}: ")
    if fault == "missing":
        assert name in message


# -- the published perplexity -----------------------------------------------------------------------------------------


def test_one_model_has_one_reference_perplexity_or_none(finished: Path) -> None:
    """It depends on the batch of the published script, which an exported folder does not tell."""
    summary = json.loads((finished / "summary.json").read_text())
    answers = [
        json.loads(invoke("eval", finished / road, *ROWS[:2], "--eval-tokens", 2000, "--json")) for road in ROADS
    ]
    for answer in answers[:2]:
        assert answer["eval_reference_perplexity"] == summary["eval_reference_perplexity"]
    assert "eval_reference_perplexity" not in answers[2]
    assert answers[2]["eval_perplexity"] == pytest.approx(summary["eval_perplexity"], rel=1e-6)
    assert "(the published code, which divides by a batch too many: " in invoke("eval", finished, *ROWS)
    assert "reference" not in invoke("eval", finished / "model", *ROWS)


# -- what others load -------------------------------------------------------------------------------------------------


def test_an_exported_model_generates_with_a_cache(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert model.config.use_cache is True
    assert model.generation_config.use_cache is True


def test_an_exported_tokenizer_names_a_beginning_and_adds_none(finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert tokenizer.bos_token is not None
    ids = tokenizer("the king")["input_ids"]
    assert ids == tokenizer("the king", add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token_id not in ids


@pytest.mark.parametrize(
    ("settings", "beginning"),
    [
        ({"eos_token": "</s>"}, "</s>"),
        ({"eos_token": "</s>", "bos_token": None}, "</s>"),
        ({"eos_token": "</s>", "bos_token": "<s>"}, "<s>"),
        ({"eos_token": {"content": "</s>"}}, {"content": "</s>"}),
        ({}, None),
    ],
)
def test_a_beginning_is_the_tokenizers_own_or_the_end(settings: dict[str, Any], beginning: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    _name_beginning(file)
    assert not file.exists()
    file.write_text(json.dumps(settings))
    _name_beginning(file)
    assert json.loads(file.read_text()).get("bos_token") == beginning


# -- lines ------------------------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_named(finished: Path, tiny_config: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "inside"
    short = ["--model", tiny_config, "--data", "sample", "--steps", "2", "--total-batch-size", "2"]
    short += ["--max-length", "16"]
    for words, named in (
        (["report", finished, "--output", place], f"--output {place}"),
        (["export", finished, place], str(place)),
        (["sweep", "table2", *short, "--output", place], f"--output {place}"),
        (["plan", *short, "--compare", "adamw", "--picture", place / "a.png"], f"--picture {place / 'a.png'}"),
    ):
        message = refusal(*words)
        assert message.startswith(f"{named} cannot be written (Not a directory); give another")


def test_a_run_shows_no_warnings_of_transformers(large: Path, tiny_config: str, tmp_path: Path) -> None:
    """Of texts longer than the tokenizer's own limit, for one: rows are cut here."""
    config = json.loads(Path(tiny_config).read_text())
    config |= {"vocab_size": 2000, "rope_scaling": {"type": "linear", "factor": 0.5}, "is_llama_config": True}
    (tmp_path / "model.json").write_text(json.dumps(config))
    words = command(str(tmp_path / "model.json"), tmp_path / "run", "--tokenizer", str(large), "--steps", "1")
    words += ["--max-unknown", "1"]
    environment = os.environ | {"WANDB_MODE": "disabled"}
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    # By a Python of its own: in the one that has imported all, transformers has read its variables.
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "transformers]" not in done.stderr
    assert "Token indices" not in done.stderr
    assert done.stderr.count("is_llama_config") == 1


def test_a_path_without_validation_text_is_no_part_of_an_evaluation_in_silence(tmp_path: Path) -> None:
    """Of two paths, one has its text under another name in its validation file alone."""
    for name, key in (("a", "text"), ("b", "body")):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": f"a line of text number {n}"}) for n in range(200)]
        (tmp_path / name / "train.jsonl").write_text("\n".join(lines))
        (tmp_path / name / "validation.jsonl").write_text(json.dumps({key: "a line to evaluate on"}))
    words = ["--model=llama_1m", "--tokenizer=sample", "--steps=1", "--total-batch-size=1", "--bad-data=skip"]
    paths = [f"--data={tmp_path / name}" for name in ("a", "b")]
    said = refusal(*words, *paths, "--wandb=disabled", f"--output={tmp_path / 'run'}")
    assert said.startswith(f"--data {tmp_path / 'b'}: no validation document can be read there")
