"""Runs that begin from the weights of a folder: --init."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.model.initial import FolderWeights, check_weights
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.model.lowrank import dense_state
from galore_pretrain.optim import METHODS
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.text.tokenizer import begun, load_tokenizer
from galore_pretrain.train.build import model_for, optimizer_for
from galore_pretrain.train.inputs import open_inputs
from pretrained import LLAMA3_ROPE, SMALL, begin_texts, change_config, make_folder, transformers_loss
from runs import COMMAND_LINE, Done, lines, python, run
from test_dist import run_all, torchrun

FOLDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped keys": {"num_key_value_heads": 2},
    "tied head": {"tie_word_embeddings": True},
    "llama3's rope": {"rope_parameters": LLAMA3_ROPE},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "shards": {"shard_size": "40KB"},
    "wide heads": {"head_dim": 12},
    "shards of bf16": {"dtype": torch.bfloat16, "shard_size": "40KB"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 48, "shard_size": "40KB"},
    "Qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 48},
    "Qwen3": {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 16, "attention_bias": True},
}
FAMILIES["Qwen2"] |= {"max_window_layers": 1}
ALL: dict[str, Any] = {key: value for changes in FOLDERS.values() for key, value in changes.items()}
FOLDERS["all of these"] = ALL


SHORT = ["--steps", "6", "--total-batch-size", "4", "--max-length", "48", "--eval-tokens", "2000"]
SHORT += ["--dtype", "float32", "--data", "sample", "--save-every", "2", "--eval-every", "3", "--lr", "0.001"]


def begin(folder: str, output: Path, *flags: str) -> Done:
    """A short run from the weights of a folder."""
    method = [] if "--optim" in flags else ["--optim", "adamw"]
    return python(COMMAND_LINE, *SHORT, *method, "--init", folder, "--output", str(output), *flags)


def first_loss(output: Path) -> float:
    first = lines(output)[0]
    assert first["step"] == 0
    return float(first["eval_loss"])


@pytest.mark.parametrize("name", [*FOLDERS, *FAMILIES])
def test_it_begins_where_transformers_is(name: str, tmp_path: Path) -> None:
    """The loss before the first update, and the model that is exported, by transformers' own class."""
    family = name if name in FAMILIES else "Llama"
    folder = make_folder(tmp_path / "given", family, **(FOLDERS | FAMILIES)[name])
    done = begin(folder, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert first_loss(tmp_path / "run") == pytest.approx(transformers_loss(folder), rel=1e-5)
    exported = tmp_path / "run" / "model"
    model, told = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(told.values())
    assert type(model).__name__ == f"{family}ForCausalLM"
    last = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert last["eval_loss"] == pytest.approx(transformers_loss(exported), rel=1e-5)
    assert last["eval_loss"] < first_loss(tmp_path / "run")


@pytest.mark.slow
def test_every_method_begins_there(tmp_path: Path) -> None:
    """With a tied head, layerwise or not, by one process and by two; low_rank of full rank too."""
    folder = make_folder(tmp_path / "given", num_key_value_heads=2, tie_word_embeddings=True, shard_size="40KB")
    expected = transformers_loss(folder)
    before = load_weights(folder)
    for processes, rows in ((1, list(METHODS)), (2, ["galore_adamw", "scale", "low_rank", "relora"])):
        cases = {}
        for number, row in enumerate(rows):
            output = tmp_path / f"{row}-{processes}"
            ranks = ["--rank", "32"] if "rank" in METHODS[row].options else []
            layerwise = "--layerwise" if number % 2 else "--no-layerwise"
            cases[output] = ["--init", folder, "--output", str(output), "--optim", row, *ranks, layerwise, *SHORT]
            cases[output][cases[output].index("--steps") + 1] = "2"
        run_all(processes, cases, tmp_path)
        for output in cases:
            in_codes = json.loads((output / "config.json").read_text())["config"]["weights"]["value"] == "int8"
            assert first_loss(output) == pytest.approx(expected, rel=0.02 if in_codes else 2e-5), output
            exported = load_file(output / "model" / "model.safetensors")
            assert "lm_head.weight" not in exported
            changed = [name for name, weight in exported.items() if not torch.equal(weight, before[name])]
            assert len(changed) == len(before), (output, before.keys() - changed)


def test_a_tied_head_has_the_rule_of_a_head(tmp_path: Path) -> None:
    """Embedding and head are one full matrix; no method projects it, and SCALE gives it the head's momentum."""
    folder = make_folder(tmp_path / "given", tie_word_embeddings=True)
    architecture = load_model_config(folder)
    for row in METHODS:
        config, _ = resolve({"init": folder, "optim": row, "data": "sample", "steps": 2, "lr": 0.01}, {})
        model = model_for(config, architecture, "meta")
        optimizer = optimizer_for(config, model)
        rule = optimizer.rule_of(model.model.embed_tokens.weight)
        kinds = {"sgd": "SGD", "scale": "Scale"} | {name: "Adafactor" for name in METHODS if "adafactor" in name}
        assert type(rule).__name__ == kinds.get(row, "Adam"), row
        assert not rule.projects
        assert model.lm_head.weight is model.model.embed_tokens.weight
        if row == "scale":
            assert (rule.axis, rule.momentum) == ("rows", 0.9)  # type: ignore[attr-defined]


def load_weights(folder: str) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in Path(folder).glob("*.safetensors"):
        weights |= load_file(file)
    return weights


def test_a_rank_too_small_is_the_nearest_of_its_rank(tmp_path: Path) -> None:
    """low_rank has no matrix beside its factors: what is exported before an update is the best approximation."""
    folder = make_folder(tmp_path / "given")
    config, _ = resolve({"init": folder, "optim": "low_rank", "rank": 5, "dtype": "float32", "data": "sample"}, {})
    weights = FolderWeights(Path(folder), folder)
    model = model_for(config, load_model_config(folder), weights=weights)
    name = "model.layers.1.mlp.up_proj.weight"
    u, s, v = torch.linalg.svd(weights.read(name))
    nearest = u[:, :5] * s[:5] @ v[:5]
    torch.testing.assert_close(dense_state(model)[name], nearest)


def test_codes_are_those_of_the_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "given", dtype=torch.bfloat16)
    done = begin(folder, tmp_path / "run", "--weights", "int8", "--optim", "scale", "--weight-group", "16")
    assert done.returncode == 0, done.stderr
    assert first_loss(tmp_path / "run") == pytest.approx(transformers_loss(folder), rel=0.01)


KILLED = """
import os, signal
from galore_pretrain import cli
from galore_pretrain.train.trainer import Trainer
step = Trainer.train_step
def train_step(self, batch):
    if self.state.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
Trainer.train_step = train_step
cli.main()
"""


def test_a_killed_run_goes_on_without_the_weights(tmp_path: Path) -> None:
    """Bit for bit, from its own checkpoint; another --init, or none, is refused, and so is one that comes later."""
    folder = make_folder(tmp_path / "given", shard_size="40KB", num_key_value_heads=2)
    whole = begin(folder, tmp_path / "whole", "--optim", "galore_adamw", "--rank", "4")
    assert whole.returncode == 0, whole.stderr
    flags = ["--init", folder, "--output", str(tmp_path / "run"), "--optim", "galore_adamw", "--rank", "4", *SHORT]
    killed = python(KILLED, *flags)
    assert killed.returncode == -signal.SIGKILL
    for file in Path(folder).glob("model*"):
        file.unlink()
    other = make_folder(tmp_path / "other", num_key_value_heads=2)
    refused = begin(other, tmp_path / "run", "--optim", "galore_adamw", "--rank", "4")
    assert refused.returncode == 2
    assert f"--init {other} (was {folder})" in refused.stderr
    without = python(COMMAND_LINE, "--model", f"{folder}/config.json", "--tokenizer", folder, *flags[2:])
    assert without.returncode == 2
    assert f"--init None (was {folder})" in without.stderr
    done = python(COMMAND_LINE, *flags)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_a_run_that_began_anew_does_not_go_on_with_init(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    refused = run(tiny_config, tmp_path / "run", "--init", make_folder(tmp_path / "given"), "--tokenizer", "sample")
    assert refused.returncode == 2
    assert "(was None)" in refused.stderr
    assert "--init" in refused.stderr


def damage(folder: Path, what: str) -> None:
    """Do to a folder of one file what its name says."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    matrix = "model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        del weights[matrix], weights["model.norm.weight"]
    elif what == "surplus":
        weights["model.layers.1.mlp.up_proj.bias"] = torch.zeros(80)
    elif what == "misshapen":
        weights[matrix] = weights[matrix][:-1].clone()
    elif what == "quantized":
        weights[matrix] = weights[matrix].to(torch.int8)
    elif what == "another head":
        change_config(str(folder), tie_word_embeddings=True)
    elif what == "no head":
        del weights["lm_head.weight"]
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "pickled":
        file.rename(folder / "pytorch_model.bin")
    elif what == "none":
        file.unlink()
    elif what == "a lost shard":
        file.rename(folder / "model-00001-of-00002.safetensors")
        index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
        index["weight_map"][matrix] = "model-00002-of-00002.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "elsewhere":
        file.unlink()
        index = {"weight_map": dict.fromkeys(weights, "../model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, file)


REFUSED = {
    "missing": "lacks model.layers.1.mlp.up_proj.weight and 1 more tensors of the LlamaForCausalLM",
    "surplus": "has model.layers.1.mlp.up_proj.bias, which the LlamaForCausalLM of its config.json has not",
    "misshapen": "model.layers.1.mlp.up_proj.weight is 79 × 32, and 80 × 32 in the LlamaForCausalLM",
    "quantized": "model.layers.1.mlp.up_proj.weight is I8; quantized weights are not read",
    "another head": "lm_head.weight is another matrix than model.embed_tokens.weight",
    "no head": "lacks lm_head.weight of the LlamaForCausalLM of its config.json; where it is the embedding",
    "cut": "model.safetensors cannot be read",
    "pickled": "has pytorch_model.bin, and only safetensors are read",
    "none": "has no model.safetensors",
    "a lost shard": "names model-00002-of-00002.safetensors, which is not there",
    "elsewhere": "names ../model.safetensors, which is no file beside it",
}


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    """Before anything is written, and by a line that says what is wrong."""
    whole = make_folder(tmp_path / "whole")
    config, _ = resolve({"init": whole, "optim": "adamw", "lr": 0.001, "steps": 1, "data": "sample"}, {})
    for what, message in REFUSED.items():
        folder = tmp_path / what
        shutil.copytree(whole, folder)
        damage(folder, what)
        with pytest.raises(InputError) as error:
            check_weights(FolderWeights(folder, str(folder)), load_model_config(str(folder)))
        assert message in str(error.value), what
        assert str(error.value).startswith(f"--init {folder}: "), what
    assert config.tokenizer == whole
    refused = begin(str(tmp_path / "missing"), tmp_path / "run")
    assert refused.returncode == 2
    assert REFUSED["missing"] in refused.stderr
    assert not (tmp_path / "run").exists()


def test_saved_tables_and_a_tied_head_that_is_saved_are_no_surplus(tmp_path: Path) -> None:
    """As older versions of transformers wrote them."""
    folder = Path(make_folder(tmp_path / "given", tie_word_embeddings=True))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    check_weights(FolderWeights(folder, str(folder)), load_model_config(str(folder)))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "no such folder"),
        ("empty", "has neither config.json nor checkpoints"),
        ("given/model.safetensors", "is a file; name its folder"),
    ],
)
def test_a_place_without_a_model_is_refused(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "given")
    with pytest.raises(InputError, match=message):
        resolve({"init": str(tmp_path / place)}, {})


def test_a_plan_reads_the_config_alone(tmp_path: Path) -> None:
    """And is that of the same model named by --model."""
    folder = Path(make_folder(tmp_path / "given", num_key_value_heads=2, tie_word_embeddings=True))
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    flags = ["--optim", "galore_adamw", "--rank", "4", "--max-length", "48", "--steps", "9", "--json"]
    plans = []
    for named in (["--init", str(folder)], ["--model", str(folder / "config.json"), "--tokenizer", "sample"]):
        done = python(COMMAND_LINE, "plan", *named, *flags)
        assert done.returncode == 0, done.stderr
        plans.append(json.loads(done.stdout) | {"model": "", "budget_bytes": 0})
    assert plans[0] == plans[1]


def test_a_folder_without_a_tokenizer_asks_for_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "given", tokenizer=None)
    refused = begin(folder, tmp_path / "run")
    assert refused.returncode == 2
    assert f"--tokenizer {folder}: the folder has no tokenizer" in refused.stderr
    assert begin(folder, tmp_path / "run", "--tokenizer", "sample").returncode == 0


def test_where_each_value_came_from_is_told(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "given")
    _, origins = resolve({"init": folder, "steps": 1, "rank": 4}, {})
    assert (origins["model"], origins["tokenizer"]) == ("init", "init")
    config, _ = resolve({"init": folder, "steps": 1, "rank": 4, "tokenizer": "t5"}, {})
    assert config.tokenizer == "t5"


def test_a_runs_config_with_other_weights_takes_their_model(tmp_path: Path) -> None:
    """Model, tokenizer and marker followed from the other --init, and follow from this one."""
    first, second = (make_folder(tmp_path / name, num_key_value_heads=heads) for name, heads in (("a", 4), ("b", 2)))
    assert begin(first, tmp_path / "run").returncode == 0
    done = python(
        COMMAND_LINE,
        "--config",
        str(tmp_path / "run" / "config.json"),
        "--init",
        second,
        "--output",
        str(tmp_path / "2"),
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "2" / "config.json").read_text())["config"]
    assert [config[name]["value"] for name in ("init", "model", "tokenizer")] == [second] * 3
    assert first_loss(tmp_path / "2") == pytest.approx(transformers_loss(second), rel=1e-5)


def test_a_model_of_the_same_shapes_takes_the_weights(tmp_path: Path) -> None:
    """--model beside --init is another architecture for the same weights: here, longer positions."""
    folder = make_folder(tmp_path / "given")
    longer = tmp_path / "longer.json"
    longer.write_text(json.dumps(SMALL | {"max_position_embeddings": 128, "rope_theta": 50000.0}))
    done = begin(folder, tmp_path / "run", "--model", str(longer))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["max_position_embeddings"] == 128
    assert first_loss(tmp_path / "run") != pytest.approx(transformers_loss(folder), rel=1e-5)


def test_a_report_is_of_updates(tmp_path: Path) -> None:
    """Step 0 has no speed, no memory and no place on a logarithmic axis. A rate of the recipe is warned of."""
    folder = make_folder(tmp_path / "given")
    flags = ["--init", folder, "--output", str(tmp_path / "run"), "--optim", "adamw", *SHORT]
    del flags[flags.index("--lr") : flags.index("--lr") + 2]
    done = python(COMMAND_LINE, *flags)
    assert done.returncode == 0, done.stderr
    assert "--lr 0.001 is of training from new weights" in done.stderr
    reported = python(COMMAND_LINE, "report", str(tmp_path / "run"), "--output", str(tmp_path / "report"))
    assert reported.returncode == 0, reported.stderr
    assert f"given, begun from {folder}, on sample" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.slow
def test_torchrun_begins_from_weights(tmp_path: Path) -> None:
    """Its processes are not forked from one, so nothing that they compare may depend on Python's order of a set."""
    folder = make_folder(tmp_path / "given", shard_size="40KB")
    flags = ["--init", folder, "--output", str(tmp_path / "run"), "--optim", "adamw", *SHORT]
    done = torchrun(2, "-m", "galore_pretrain", *flags)
    assert done.returncode == 0, done.stderr
    assert first_loss(tmp_path / "run") == pytest.approx(transformers_loss(folder), rel=1e-5)


STOPPED = """
import os, signal
from galore_pretrain import cli
from galore_pretrain.train import evaluate
token_losses = evaluate.token_losses
def stopping(*given):
    os.kill(os.getpid(), signal.SIGTERM)
    return token_losses(*given)
evaluate.token_losses = stopping
cli.main()
"""


def test_a_run_that_is_stopped_in_its_first_evaluation_makes_it_again(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "given")
    assert begin(folder, tmp_path / "whole").returncode == 0
    stopped = python(STOPPED, "--init", folder, "--output", str(tmp_path / "run"), "--optim", "adamw", *SHORT)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    for file in Path(folder).glob("*.safetensors"):
        file.unlink()
    assert begin(folder, tmp_path / "run").returncode == 0
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_a_sweep_begins_from_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "given")
    flags = ["--init", folder, "--optim", "adamw", "--steps", "9", "--data", "sample", "--plan-only"]
    done = python(COMMAND_LINE, "sweep", "lr", *flags)
    assert done.returncode == 0, done.stderr
    assert f"--init {folder}" in done.stdout


def test_two_processes_read_their_parts(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "given")
    weights = FolderWeights(Path(folder), folder)
    name = "model.layers.0.mlp.down_proj.weight"
    whole = weights.read(name)
    for dim, start, stop in ((0, 0, 20), (0, 20, 32), (1, 40, 80), (0, 32, 32)):
        shard = Shard(dim, start, stop, tuple(whole.shape), 2, None)
        assert torch.equal(weights.read(name, shard), shard.of(whole))


def test_weights_cannot_be_a_model_by_themselves(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "given")
    with pytest.raises(InputError, match=f"give --init {folder} to begin from these"):
        resolve({"model": folder, "steps": 1}, {})


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_documents_begin_as_the_model_was_trained(layout: str, tmp_path: Path) -> None:
    """With the marker that its tokenizer adds: in training, evaluation, the exported tokenizer and what goes on."""
    folder = make_folder(tmp_path / "given")
    begin_texts(folder)
    output = tmp_path / "run"
    done = begin(folder, output, "--layout", layout)
    assert done.returncode == 0, done.stderr
    assert "AutoTokenizer" not in done.stderr
    config = json.loads((output / "config.json").read_text())["config"]
    assert config["bos"] == {"value": "yes", "origin": f"tokenizer {folder}"}
    exported = output / "model"
    if layout == "pad":
        assert first_loss(output) == pytest.approx(transformers_loss(folder), rel=1e-5)
        told = python(COMMAND_LINE, "eval", str(exported), "--json", *SHORT[4:8], "--data", "sample")
        last = json.loads((output / "summary.json").read_text())["eval_loss"]
        assert json.loads(told.stdout)["eval_loss"] == pytest.approx(last, rel=1e-6)
        again = json.loads(python(COMMAND_LINE, "eval", str(output), "--json").stdout)
        assert again["eval_loss"] == pytest.approx(last, rel=1e-6)
        other = json.loads(python(COMMAND_LINE, "eval", str(output), "--json", "--bos", "no").stdout)
        assert other["eval_loss"] != pytest.approx(last, rel=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer("The state")["input_ids"][0] == 0
    assert AutoModelForCausalLM.from_pretrained(exported).config.bos_token_id == 0
    shutil.rmtree(output / "model")
    shutil.rmtree(sorted((output / "checkpoints").iterdir())[-1])
    before = lines(output)
    gone_on = begin(folder, output, "--layout", layout)
    assert gone_on.returncode == 0, gone_on.stderr
    assert lines(output) == before
    assert begin(folder, output, "--layout", layout, "--bos", "no").returncode == 2


def test_a_marker_is_as_it_is_said(tmp_path: Path) -> None:
    """None with new weights, unless --bos asks for one; none where the tokenizer has none."""
    folder = make_folder(tmp_path / "given")
    with pytest.raises(InputError, match=r"--bos yes: --tokenizer .*given has no token for a beginning"):
        begun(load_tokenizer(folder), "yes")
    begin_texts(folder)
    tokenizer = load_tokenizer(folder)
    plain = tokenizer.encode(["The state of", ""])
    for bos, is_begun in (("auto", True), ("yes", True), ("no", False)):
        ids = begun(tokenizer, bos).encode(["The state of", ""])
        assert ids[0].tolist() == [0] * is_begun + plain[0].tolist()
        assert ids[1].tolist() == []
    values = {"model": "llama_1m", "data": "sample", "tokenizer": folder, "steps": 1, "rank": 4}
    for more, bos in (({}, "no"), ({"bos": "yes"}, "yes"), ({"bos": "no"}, "no")):
        assert open_inputs(resolve(values | more, {})[0]).bos == bos


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_methods_take_any_family(family: str, tmp_path: Path) -> None:
    """Projected, factored or in codes; killed and gone on; evaluated, exported, and asked to write."""
    folder = make_folder(tmp_path / "given", family, **FAMILIES[family])
    before = load_weights(folder)
    for optim, more in (("galore_adamw", ["--layerwise"]), ("relora", []), ("scale", ["--weights", "int8"])):
        output = tmp_path / optim
        rank = ["--rank", "4"] if "rank" in METHODS[optim].options else []
        done = begin(folder, output, "--optim", optim, *rank, *more)
        assert done.returncode == 0, done.stderr
        last = json.loads((output / "summary.json").read_text())["eval_loss"]
        assert last == pytest.approx(transformers_loss(output / "model"), rel=1e-5)
        assert load_weights(str(output / "model")).keys() == before.keys()
        expected = lines(output)
        shutil.rmtree(output / "model")
        shutil.rmtree(sorted((output / "checkpoints").iterdir())[-1])
        done = begin(folder, output, "--optim", optim, *rank, *more)
        assert done.returncode == 0, done.stderr
        assert lines(output) == expected
    for place in (output, output / "model"):
        told = python(COMMAND_LINE, "eval", str(place), "--json", *SHORT[4:8], "--data", "sample")
        assert json.loads(told.stdout)["eval_loss"] == pytest.approx(last, rel=1e-5), told.stderr
        written = python(COMMAND_LINE, "generate", str(place), "The state", "--tokens", "60")
        assert written.returncode == 0, written.stderr


@pytest.mark.slow
def test_two_processes_take_any_family(tmp_path: Path) -> None:
    """Biases, norms of heads and tied heads are shared out as all else; the curve is that of one process."""
    for processes in (1, 2):
        cases = {}
        for family, changes in FAMILIES.items():
            folder = str(tmp_path / family)
            if processes == 1:
                make_folder(tmp_path / family, family, **changes)
            output = tmp_path / f"{family}-{processes}"
            flags = ["--optim", "galore_adamw", "--rank", "4", "--batch-size", "2", *SHORT]
            flags += ["--steps", "3", "--save-every", "3", "--eval-tokens", "600"]
            cases[output] = ["--init", folder, "--output", str(output), *flags]
        run_all(processes, cases, tmp_path)
    for family in FAMILIES:
        curves = [[line.get("loss") or line["eval_loss"] for line in lines(tmp_path / f"{family}-{n}")] for n in (1, 2)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_rows_beyond_a_window_are_refused(tmp_path: Path) -> None:
    """A row that is no longer than the window is right without a mask: see above."""
    for family in ("Mistral", "Qwen2"):
        folder = make_folder(tmp_path / family, family, **FAMILIES[family])
        refused = begin(folder, tmp_path / "run", "--max-length", "49")
        assert refused.returncode == 2
        assert "--max-length 49 exceeds the window of 48 positions" in refused.stderr
