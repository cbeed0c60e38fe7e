"""``finetune --task chat``: three commands from a model's folder to an answer, what is learnt, resuming, refusals."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.rundir.loaded import load
from pretrained import make_folder
from runs import COMMAND_LINE, KILLED, Done, lines, python
from test_chat import CHATML, LLAMA3, folder_of
from test_dist import run_all
from test_init import ALL, FAMILIES

WORDS = ["hello", "how", "are", "you", "quick", "brown", "fox", "fine"]
ANSWERS = {"hello": "fine thanks", "quick": "brown fox"}
SHORT = (
    "--max-length",
    "64",
    "--total-batch-size",
    "4",
    "--dtype",
    "float32",
    "--wandb",
    "disabled",
    "--device",
    "cpu",
)


def write_chats(file: Path, count: int = 200) -> str:
    """Conversations of one question, whose first word says what the answer is."""
    rng = random.Random(0)
    with file.open("w") as out:
        for _ in range(count):
            first = rng.choice(list(ANSWERS))
            question = " ".join([first, *rng.choices(WORDS, k=rng.randint(1, 5))])
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWERS[first]}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"), CHATML)


def model_folder(folder: Path, template: str, family: str = "Llama", **changes: Any) -> str:
    make_folder(folder, family, tokenizer=None, **changes)
    return folder_of(folder, template)


def finetune(model: str, data: str, output: Path, *flags: str, script: str = COMMAND_LINE) -> Done:
    given = ("--task", "chat", "--model", model, "--data", data, "--output", str(output))
    return python(script, "finetune", *given, *SHORT, *flags)


@torch.no_grad()
def answers_loss(folder: str | Path, file: str) -> float:
    """The loss of the answers by transformers' own model and template, each conversation by itself."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for text in Path(file).read_text().splitlines():
        messages = json.loads(text)["messages"]
        whole, asked = (
            tokenizer.apply_chat_template(
                messages[:n], add_generation_prompt=n == 1, return_tensors="pt", return_dict=True
            )
            for n in (2, 1)
        )
        ids, begin = whole["input_ids"], asked["input_ids"].shape[1]
        logits = theirs(ids).logits[0, begin - 1 : -1]
        total += F.cross_entropy(logits, ids[0, begin:], reduction="sum").item()
        count += ids.shape[1] - begin
    return total / count


@pytest.mark.parametrize("optim", [("adamw", "1e-2"), ("galore_adamw", "1e-2"), ("lora", "3e-2")])
def test_three_commands_make_a_model_that_answers(
    optim: tuple[str, str], model: str, chats: str, tmp_path: Path
) -> None:
    name, rate = optim
    rank = () if name == "adamw" else ("--rank", "8")
    output = tmp_path / "out"
    done = finetune(model, chats, output, "--optim", name, "--lr", rate, "--epochs", "12", *rank)
    assert done.returncode == 0, done.stderr
    first, last = lines(output)[0], lines(output)[-1]
    assert last["eval_loss"] < 0.25 * first["eval_loss"]
    for question, answer in ANSWERS.items():
        said = python(
            COMMAND_LINE, "generate", str(output), f"{question} you", "--chat", "--temperature", "0", "--tokens", "9"
        )
        assert said.stdout.strip() == answer, said.stderr
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    exported = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello fox"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    told = exported.generate(**asked, max_new_tokens=9, do_sample=False, pad_token_id=0)
    tail = tokenizer.decode(told[0, asked["input_ids"].shape[1] :])
    assert tail == "fine thanks<|im_end|>"  # transformers' own loop stops there, by generation_config.json


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_loss_is_of_answers_alone(family: str, chats: str, tmp_path: Path) -> None:
    """Step 0 is transformers' own loss of the answers, each conversation by itself."""
    folder = model_folder(tmp_path / "model", LLAMA3, family, num_key_value_heads=2)
    output = tmp_path / "out"
    done = finetune(folder, chats, output, "--optim", "adamw", "--lr", "1e-3", "--steps", "2", "--eval-data", chats)
    assert done.returncode == 2, done.stderr  # nothing would be left to train on
    own = write_chats(tmp_path / "valid.jsonl", 12)
    done = finetune(folder, chats, output, "--optim", "adamw", "--lr", "1e-3", "--steps", "2", "--eval-data", own)
    assert done.returncode == 0, done.stderr
    assert lines(output)[0]["step"] == 0
    assert lines(output)[0]["eval_loss"] == pytest.approx(answers_loss(folder, own), rel=1e-5)


@pytest.mark.parametrize(
    "flags", [("--optim", "galore_adamw", "--rank", "4"), ("--optim", "lora", "--rank", "4", "--layerwise")]
)
def test_a_killed_run_goes_on_bit_for_bit(flags: tuple[str, ...], model: str, chats: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    common = (*flags, "--lr", "1e-3", "--epochs", "2", "--save-every", "3")
    assert finetune(model, chats, whole, *common).returncode == 0
    died = finetune(model, chats, killed, *common, script=KILLED)
    assert died.returncode == -9, died.stderr
    done = finetune(model, chats, killed, *common)
    assert done.returncode == 0, done.stderr
    assert lines(killed) == lines(whole)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


WITH_ALL: dict[str, dict[str, Any]] = {"Llama": ALL, "Qwen2": {**FAMILIES["Qwen2"], **ALL}}
"""Grouped keys, a tied head, llama3's rope, biases, wide heads, and shards of bf16; of Qwen2, a window besides."""
del WITH_ALL["Qwen2"]["attention_bias"], WITH_ALL["Qwen2"]["mlp_bias"]  # its queries, keys and values always have one


@pytest.mark.parametrize("family", WITH_ALL)
def test_a_model_that_has_all_at_once(family: str, chats: str, tmp_path: Path) -> None:
    """It begins at transformers' own loss, goes on bit for bit, and is exported in its own class, with its logits."""
    folder = model_folder(tmp_path / "model", LLAMA3, family, **WITH_ALL[family])
    assert len(list(Path(folder).glob("*.safetensors"))) > 2
    own = write_chats(tmp_path / "valid.jsonl", 12)
    flags = ("--optim", "galore_adamw", "--rank", "4", "--lr", "1e-3", "--steps", "9", "--max-length", "48")
    flags = (*flags, "--save-every", "3", "--eval-data", own)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = finetune(folder, chats, whole, *flags)
    assert done.returncode == 0, done.stderr
    assert lines(whole)[0]["step"] == 0
    assert lines(whole)[0]["eval_loss"] == pytest.approx(answers_loss(folder, own), rel=1e-5)
    assert finetune(folder, chats, killed, *flags, script=KILLED).returncode == -9
    done = finetune(folder, chats, killed, *flags)
    assert done.returncode == 0, done.stderr
    assert lines(killed) == lines(whole)
    ours, theirs = (load_file(output / "model" / "model.safetensors") for output in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    exported, told = AutoModelForCausalLM.from_pretrained(
        whole / "model", dtype=torch.float32, output_loading_info=True
    )
    assert type(exported).__name__ == f"{family}ForCausalLM"
    assert not any(told.values())
    ids = torch.arange(2, 42)[None]
    trained = load(whole, {}, torch.device("cpu")).model
    with torch.no_grad():
        torch.testing.assert_close(exported.eval()(ids).logits, trained(ids).logits, rtol=1e-5, atol=1e-6)
    assert lines(whole)[-1]["eval_loss"] == pytest.approx(answers_loss(whole / "model", own), rel=1e-5)


TWO_WAYS: dict[str, tuple[str, ...]] = {
    "galore_adamw": ("--rank", "4", "--layerwise"),
    "lora": ("--rank", "4", "--shard", "none"),
    "adamw": ("--layout", "pad"),
}


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(model: str, tmp_path: Path) -> None:
    """Answers are few and in some rows only: each process's share of them counts as much as there are."""
    data = write_chats(tmp_path / "chats.jsonl", 30)
    given = ("finetune", "--task", "chat", "--model", model, "--data", data, *SHORT, "--epochs", "2", "--lr", "1e-3")
    for processes in (1, 2):
        cases = {}
        for optim, more in TWO_WAYS.items():
            output = tmp_path / f"{optim}-{processes}"
            cases[output] = [*given, "--batch-size", "1", "--output", str(output), "--optim", optim, *more]
        run_all(processes, cases, tmp_path)
    for optim in TWO_WAYS:
        one, two = (lines(tmp_path / f"{optim}-{processes}") for processes in (1, 2))
        assert len(one) > 4
        assert [line["step"] for line in two] == [line["step"] for line in one]
        for ours, theirs in zip(two, one, strict=True):
            for key in ours.keys() & {"loss", "eval_loss", "tokens_seen"}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (optim, ours["step"], key)


def test_rows_keep_conversations_apart(model: str, chats: str, tmp_path: Path) -> None:
    """Rows of several conversations have the losses of rows of one each."""
    losses = {}
    for layout in ("pack", "pad"):
        output = tmp_path / layout
        done = finetune(
            model,
            chats,
            output,
            "--optim",
            "adamw",
            "--lr",
            "1e-3",
            "--steps",
            "1",
            "--layout",
            layout,
            "--eval-tokens",
            "1M",
        )
        assert done.returncode == 0, done.stderr
        losses[layout] = lines(output)[0]["eval_loss"]
    assert losses["pack"] == pytest.approx(losses["pad"], rel=1e-5)


def test_commands_read_the_run_as_it_was(model: str, chats: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert finetune(model, chats, output, "--optim", "adamw", "--lr", "1e-3", "--epochs", "1").returncode == 0
    told = python(COMMAND_LINE, "eval", str(output), "--json", "--device", "cpu")
    assert told.returncode == 0, told.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert json.loads(told.stdout)["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-6)
    assert "eval_reference_perplexity" not in summary
    exported = python(COMMAND_LINE, "export", str(output), str(tmp_path / "exported"))
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "exported" / "chat_template.jinja").exists()
    cloze = python(COMMAND_LINE, "eval", str(output), "--cloze", "4")
    assert cloze.returncode == 2
    assert "learned conversations" in cloze.stderr
    report = python(COMMAND_LINE, "report", str(output), "--output", str(tmp_path / "report"))
    assert report.returncode == 0, report.stderr


def test_recipes_and_plans(model: str, chats: str) -> None:
    config, origins = resolve({"task": "chat", "model": model, "data": chats}, {"task": "flag", "data": "flag"})
    assert (config.layout, config.documents, config.max_length, config.epochs) == ("pack", "separate", 1024, 3)
    assert (config.galore_scale, config.lr, config.total_batch_size) == (2.0, 2e-5, 32)
    assert (config.init, config.tokenizer) == (model, model)
    assert "TinyAgent" in origins["epochs"]
    padded, _ = resolve(
        {"task": "chat", "model": model, "data": chats, "layout": "pad"}, {"data": "flag", "layout": "flag"}
    )
    assert padded.documents == "joined"
    planned = python(
        COMMAND_LINE,
        "plan",
        "--task",
        "chat",
        "--model",
        model,
        "--data",
        chats,
        *SHORT[:-2],
        "--device",
        "cuda",
        "--memory-budget",
        "8GB",
        "--json",
    )
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["fits"]


def test_what_makes_no_sense_is_refused(model: str, chats: str, tmp_path: Path) -> None:
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"model": model}, r"--data is missing: --task chat has no text of its own"),
        ({"data": chats}, r"--model is missing: --task chat begins from a model that exists"),
        ({"model": model, "data": chats, "text_key": "body"}, r"--text-key has no meaning for --task chat"),
        ({"model": model, "data": chats, "optim": "muon"}, r"--lr is missing: no recipe has one for --optim muon"),
        ({"model": "llama_1m", "data": chats}, r"--init llama_1m: no such folder"),
    ]
    for given, message in refusals:
        with pytest.raises(InputError, match=message):
            resolve({"task": "chat", **given}, dict.fromkeys(given, "flag"))
    bare = make_folder(tmp_path / "bare")
    done = finetune(bare, chats, tmp_path / "out")
    assert done.returncode == 2
    assert re.search(r"has no chat template, which messages need", done.stderr), done.stderr
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * 3)
    done = finetune(model, str(tmp_path / "bad.jsonl"), tmp_path / "out")
    assert done.returncode == 2
    assert "has no answer" in done.stderr
