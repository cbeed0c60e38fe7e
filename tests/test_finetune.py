"""``finetune`` on GLUE's tasks: what it learns, that a loop by hand does the same, resuming, exporting, refusals."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fakehub import Fault
from galore_pretrain.config.options import Processes
from galore_pretrain.config.resolve import resolve
from galore_pretrain.config.tasks import GLUE
from galore_pretrain.errors import InputError
from galore_pretrain.model.architecture import architecture_of_run
from galore_pretrain.model.encoder import load_encoder_config
from galore_pretrain.planning.plan import make_heaviest_updates, measure, static_bytes
from galore_pretrain.study.sweep import entries
from galore_pretrain.tensors.ledger import allocated_peak
from galore_pretrain.text.glue import TASKS, read_examples
from galore_pretrain.text.labelled import ExampleBatches, encode, load_pair_tokenizer
from galore_pretrain.train.build import execution_for, model_for, optimizer_for, set_up_model
from roberta import make_glue, make_roberta
from runs import COMMAND_LINE, KILLED, Done, lines, python
from test_init_run import at_hub
from warm import WarmHub

SHORT = ("--epochs", "2", "--total-batch-size", "16", "--max-length", "48", "--lr", "1e-3", "--wandb", "disabled")
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks in miniature; an epoch of 16 has 5 updates, of which the last one has 6 rows."""
    folder = tmp_path_factory.mktemp("glue")
    make_glue.write_glue(folder, train=70, validation=20)
    return folder


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_roberta(tmp_path_factory.mktemp("roberta"))


def finetune(task: str, model: str, data: Path, output: Path, *flags: str, script: str = COMMAND_LINE) -> Done:
    given = ("--task", task, "--model", model, "--data", str(data / task), "--output", str(output))
    return python(script, "finetune", *given, *flags)


def summary(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


def config_of(task: str, model: str, data: Path | None = None, **flags: Any) -> Any:
    given = {"task": task, "model": model, **flags}
    if data is not None:
        given["data"] = str(data / task)
    return resolve(given, dict.fromkeys(given, "flag"))


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", GLUE)
def test_every_task_is_learnt(task: str, tmp_path: Path) -> None:
    make_glue.write_task(tmp_path / "glue", TASKS[task], train=512, validation=128)
    model = make_roberta(tmp_path / "model")
    more = ("--epochs", "4", "--lr", "2e-3", "--rank", "8", "--galore-scale", "4", "--update-proj-gap", "50")
    done = finetune(
        task, model, tmp_path / "glue", tmp_path / "out", "--max-length", "48", "--wandb", "disabled", *more
    )
    assert done.returncode == 0, done.stderr
    told = summary(tmp_path / "out")
    assert told["best_eval_score"] > 0.9, told
    assert set(TASKS[task].metrics) <= {key.removeprefix("eval_").split("_")[0] for key in told if key != "eval_loss"}
    assert told["task"] == task
    if task == "mnli":
        both = (told["eval_accuracy_matched"] + told["eval_accuracy_mismatched"]) / 2
        assert told["eval_score"] == pytest.approx(both)


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_two_epochs_are_those_of_a_loop_by_hand(task: str, glue: Path, tmp_path: Path) -> None:
    """transformers' own model, its loss, torch's AdamW and a linear fall of the rate: loss by loss, score by score."""
    folder = make_roberta(tmp_path / "model", **STILL)
    done = finetune(
        task, folder, glue, tmp_path / "out", *SHORT, "--optim", "adamw", "--batch-size", "4", "--seed", "5"
    )
    assert done.returncode == 0, done.stderr

    tokenizer = load_pair_tokenizer(Path(folder), folder)
    train, validation = (read_examples(TASKS[task], str(glue / task), split) for split in ("train", "validation"))
    pad = tokenizer.pad_token_id
    batches = iter(ExampleBatches(encode(train, tokenizer, 48), train.labels, 16, 5, pad))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=TASKS[task].classes)
    begun = load_file(tmp_path / "out" / "model" / "model.safetensors")
    config, _ = config_of(
        task, folder, glue, epochs=2, total_batch_size=16, max_length=48, lr=1e-3, optim="adamw", seed=5
    )
    take_head(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(10):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - (step + 1) / 10)
        mask = (batch.input_ids != pad).long()
        loss = model.train()(batch.input_ids, attention_mask=mask, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [line["loss"] for line in lines(tmp_path / "out")] == pytest.approx(losses, rel=1e-6)
    rows = tokenizer(*zip(*validation.texts, strict=True), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**rows).logits
    labels = torch.tensor(validation.labels)
    by_hand = F.mse_loss(logits[:, 0], labels) if task == "stsb" else F.cross_entropy(logits, labels)
    assert summary(tmp_path / "out")["eval_loss"] == pytest.approx(by_hand.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if not name.endswith("key.bias"):  # attention does not depend on it: its gradient is a rounding error
            torch.testing.assert_close(begun[name], p.detach(), rtol=1e-4, atol=1e-5)


def take_head(model: Any, config: Any) -> None:
    """Give ``model`` the new head that a run of this config begins with."""
    from galore_pretrain.rundir.initial import open_weights
    from galore_pretrain.train.build import model_for

    ours = model_for(config, architecture_of_run(config), weights=open_weights(config.init))
    model.classifier.load_state_dict(ours.classifier.state_dict())


def test_a_head_of_as_many_classes_is_taken(glue: Path, tmp_path: Path, roberta: str) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    assert finetune("rte", roberta, glue, first, *SHORT, "--optim", "adamw").returncode == 0
    again = finetune("mrpc", str(first / "model"), glue, second, *SHORT, "--optim", "adamw")
    assert "the head is new" not in again.stderr, again.stderr
    other = finetune("mnli", str(first / "model"), glue, third, *SHORT, "--optim", "adamw")
    assert other.returncode == 0, other.stderr
    assert "the head is new, of 3 classes" in other.stderr


# -- executions -------------------------------------------------------------------------------------------------------

WAYS = {
    "accumulated": ("--batch-size", "4"),
    "layerwise and accumulated": ("--layerwise", "--batch-size", "4"),
    "checkpointed": ("--activation-checkpointing",),
}


@pytest.mark.parametrize("optim", ["galore_adamw", "lora", "adamw8bit"])
def test_executions_are_one(optim: str, glue: Path, tmp_path: Path) -> None:
    """The last update of an epoch has 6 rows: fewer micro-batches than the others, the last of them of 2."""
    model = make_roberta(tmp_path / "model", **STILL)
    whole = ("--optim", optim, "--batch-size", "16", "--no-layerwise", "--no-activation-checkpointing")
    rank = () if optim == "adamw8bit" else ("--rank", "4")
    assert finetune("mrpc", model, glue, tmp_path / "whole", *SHORT, *rank, *whole).returncode == 0
    expected = [line["loss"] for line in lines(tmp_path / "whole")]
    for name, flags in WAYS.items():
        output = tmp_path / name.replace(" ", "-")
        done = finetune("mrpc", model, glue, output, *SHORT, *rank, "--optim", optim, *flags)
        assert done.returncode == 0, done.stderr
        assert [line["loss"] for line in lines(output)] == pytest.approx(expected, rel=1e-4), name


def test_checkpointed_layers_drop_out_alike(glue: Path, roberta: str, tmp_path: Path) -> None:
    """What is computed again in backward must have dropped out what it had dropped out in forward."""
    losses = []
    for flag in ("--no-activation-checkpointing", "--activation-checkpointing"):
        output = tmp_path / flag
        done = finetune("rte", roberta, glue, output, *SHORT, "--optim", "adamw", "--batch-size", "16", flag)
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in lines(output)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "optim", ["galore_adamw8bit", "q_galore", "apollo_mini", "muon", "relora", "low_rank", "scale"]
)
def test_methods_fine_tune(optim: str, glue: Path, roberta: str, tmp_path: Path) -> None:
    done = finetune("sst2", roberta, glue, tmp_path / "out", *SHORT, "--optim", optim, *ranks(optim))
    assert done.returncode == 0, done.stderr
    told = lines(tmp_path / "out")
    assert len(told) == 10
    assert told[-1]["eval_loss"] < 1


def ranks(optim: str) -> tuple[str, ...]:
    return () if optim in ("muon", "scale", "apollo_mini", "adamw") else ("--rank", "4")


def test_lora_trains_factors_and_head_alone(glue: Path, roberta: str, tmp_path: Path) -> None:
    assert finetune("cola", roberta, glue, tmp_path / "out", *SHORT, "--optim", "lora").returncode == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(roberta), tmp_path / "out" / "model"))
    changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    assert changed
    assert all(re.search(r"layer\.\d\.(attention|intermediate|output)\..*weight", name) for name in changed)


# -- resuming and exporting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["galore_adamw", "lora"])
def test_a_killed_run_goes_on_bit_for_bit(optim: str, glue: Path, roberta: str, tmp_path: Path) -> None:
    """Dropout included: its draws are those that an undisturbed run has."""
    flags = (*SHORT, "--optim", optim, "--rank", "4", "--save-every", "3", "--update-proj-gap", "4")
    flags = flags[:-2] if optim == "lora" else flags
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finetune("mnli", roberta, glue, whole, *flags).returncode == 0
    died = finetune("mnli", roberta, glue, killed, *flags, script=KILLED)
    assert died.returncode == -9, died.stderr
    done = finetune("mnli", roberta, glue, killed, *flags)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert lines(killed) == lines(whole)
    for file in ("model.safetensors",):
        ours, theirs = (load_file(folder / "model" / file) for folder in (killed, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {k: v for k, v in summary(killed).items() if "eval" in k} == {
        k: v for k, v in summary(whole).items() if "eval" in k
    }
    finished = finetune("mnli", roberta, glue, killed, *flags)
    assert "is finished" in finished.stderr


def test_more_epochs_are_another_run(glue: Path, roberta: str, tmp_path: Path) -> None:
    assert finetune("rte", roberta, glue, tmp_path / "out", *SHORT, "--rank", "4").returncode == 0
    longer = ["3" if word == "2" else word for word in SHORT]
    refused = finetune("rte", roberta, glue, tmp_path / "out", *longer, "--rank", "4")
    assert refused.returncode == 2
    assert "--epochs 3 (was 2)" in refused.stderr


def test_the_export_is_transformers_own(glue: Path, roberta: str, tmp_path: Path) -> None:
    done = finetune("mnli", roberta, glue, tmp_path / "out", *SHORT, "--rank", "4")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "model"
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(TASKS["mnli"].class_names))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = read_examples(TASKS["mnli"], str(glue / "mnli"), "validation_matched")
    rows = tokenizer(*zip(*examples.texts, strict=True), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**rows).logits
    accuracy = (logits.argmax(1).numpy() == examples.labels).mean()
    assert summary(tmp_path / "out")["eval_accuracy_matched"] == pytest.approx(accuracy)
    theirs = make_roberta(tmp_path / "same")
    assert tokenizer(["a b"])["input_ids"] == AutoTokenizer.from_pretrained(theirs)(["a b"])["input_ids"]


def test_the_best_epoch_is_told(glue: Path, roberta: str, tmp_path: Path) -> None:
    assert finetune("cola", roberta, glue, tmp_path / "out", *SHORT, "--rank", "4").returncode == 0
    scores = {line["step"]: line["eval_score"] for line in lines(tmp_path / "out") if "eval_score" in line}
    told = summary(tmp_path / "out")
    assert list(scores) == [5, 10]  # an evaluation an epoch, none of the new head
    assert told["best_eval_score"] == max(scores.values())
    assert scores[told["best_step"]] == told["best_eval_score"]
    assert told["eval_score"] == scores[10]


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(warm_hub: WarmHub, tmp_path: Path) -> WarmHub:
    make_roberta(tmp_path / "hub" / "org" / "roberta-tiny")
    make_glue.write_task(tmp_path / "hub" / "nyu-mll" / "glue", TASKS["rte"], train=40, validation=12)
    warm_hub.hold(tmp_path / "hub")
    return warm_hub


@pytest.mark.network
def test_model_and_examples_come_from_the_hub(hub: WarmHub, tmp_path: Path) -> None:
    """What is asked for is asked again: an answer of 503 of the weights, a connection that drops in the examples."""
    hub.fault = Fault(times=2, status=503, suffix=".parquet")
    done = at_hub(
        tmp_path,
        hub,
        "finetune",
        "--task",
        "rte",
        "--model",
        "org/roberta-tiny",
        *SHORT,
        "--output",
        "out",
        "--rank",
        "4",
    )
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "out")["task"] == "rte"
    shutil.rmtree(tmp_path / "hub" / "nyu-mll")
    gone = at_hub(tmp_path, hub, "finetune", "--task", "rte", "--model", "org/none", *SHORT, "--output", "two")
    assert gone.returncode == 2
    assert "org/none" in gone.stderr


# -- recipes, plans and refusals --------------------------------------------------------------------------------------


def test_recipes_are_the_papers(roberta: str) -> None:
    config, origins = config_of("cola", roberta)
    assert (config.optim, config.rank, config.galore_scale, config.lr) == ("galore_adamw", 4, 4.0, 3e-5)
    assert (config.epochs, config.total_batch_size, config.max_length, config.update_proj_gap) == (30, 32, 512, 500)
    assert (config.dtype, config.scheduler, config.warmup_steps, config.steps) == ("float32", "linear", 0, None)
    assert "Table 7" in origins["lr"]
    assert config_of("stsb", roberta, rank=8)[0].lr == 3e-5
    assert config_of("stsb", roberta, rank=8)[0].galore_scale == 2.0
    lora, _ = config_of("rte", roberta, optim="lora")
    assert (lora.rank, lora.lora_alpha, lora.lr, lora.epochs, lora.total_batch_size) == (8, 8.0, 5e-4, 80, 32)
    natural, _ = config_of("mrpc", roberta, optim="natural_galore")
    assert (natural.epochs, natural.total_batch_size, natural.lr) == (3, 32, 2e-5)


def test_plans_have_the_encoders_weights(roberta: str) -> None:
    """The plan's bytes are those of transformers' own class, and of state of every matrix of rank 4."""
    config, _ = config_of("mnli", roberta, optim="adamw")
    model = AutoModelForSequenceClassification.from_pretrained(roberta, num_labels=3)
    weights = sum(p.nbytes for p in model.parameters())
    static = static_bytes(config, architecture_of_run(config))
    assert static.weights == weights
    assert static.state == 2 * weights


def test_a_plan_is_what_the_run_takes(glue: Path, roberta: str, tmp_path: Path) -> None:
    planned = python(COMMAND_LINE, "plan", "--task", "rte", "--model", roberta, "--lr", "1e-3", "--json")
    assert planned.returncode == 0, planned.stderr
    answer = json.loads(planned.stdout)
    assert answer["peak_bytes"] > answer["weights_bytes"] > 0
    for optim in ("galore_adamw", "lora"):
        assert python(COMMAND_LINE, "plan", "--task", "rte", "--model", roberta, "--optim", optim).returncode == 0


def real_peak(config: Any) -> int:
    """What torch's allocator gave out at most in updates of as many examples as the plan is of, of real tensors."""

    def updates() -> None:
        model = model_for(config, architecture_of_run(config))
        optimizer = optimizer_for(config, set_up_model(config, model))
        execution = execution_for(config, optimizer)
        make_heaviest_updates(config, model, optimizer, execution, config.micro_batches)

    return allocated_peak(updates)


@pytest.mark.parametrize(
    ("task", "optim", "given"),
    [
        ("cola", "galore_adamw", {"batch_size": 2, "layerwise": False}),
        ("cola", "galore_adamw", {"batch_size": 4, "layerwise": True, "activation_checkpointing": True}),
        ("cola", "adamw", {"batch_size": 4, "layerwise": False}),
        ("mnli", "lora", {"batch_size": 2, "layerwise": False, "activation_checkpointing": True}),
        ("stsb", "galore_adamw8bit", {"batch_size": 1, "layerwise": True, "dtype": "bfloat16"}),
        ("rte", "q_galore", {"batch_size": 4, "layerwise": True, "dtype": "bfloat16", "lr": 1e-4}),
    ],
)
def test_a_plan_of_a_task_is_what_the_allocator_says(
    task: str, optim: str, given: dict[str, Any], tmp_path: Path
) -> None:
    """Padding, dropout's masks and the head included. A row is as long as it may be, as in the plan."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "max_position_embeddings": 66}
    folder = make_roberta(tmp_path / "model", **sizes)
    flags = {"optim": optim, "max_length": 64, "total_batch_size": 4, "epochs": 1, "activation_checkpointing": False}
    config, _ = config_of(task, folder, **flags | given)
    planned = measure(config, architecture_of_run(config))
    assert planned.peak_bytes == pytest.approx(real_peak(config), rel=0.03)
    assert sum(planned.parts.values()) == planned.peak_bytes


REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "layout": (("--layout", "pack"), "--layout has no meaning for --task rte: .*leave it out"),
    "tokens": (("--max-tokens", "1M"), "--max-tokens has no meaning for --task rte"),
    "both lengths": (("--epochs", "2", "--steps", "3"), "--epochs 2 and --steps 3 both end the run"),
    "compile": (("--compile",), "--compile has no meaning for --task rte"),
    "no rate": (("--optim", "muon"), "--lr is missing: no recipe has one for --optim muon on --task rte"),
    "long rows": (("--max-length", "65"), "--max-length 65 exceeds the 64 positions"),
    "no folder": (("--data", "nowhere"), "--data nowhere: no such folder"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_makes_no_sense_is_refused(case: str, glue: Path, roberta: str, tmp_path: Path) -> None:
    flags, message = REFUSALS[case]
    data = () if "--data" in flags else ("--data", str(glue / "rte"))
    length = () if "--max-length" in flags else ("--max-length", "48")
    done = python(
        COMMAND_LINE,
        "finetune",
        "--task",
        "rte",
        "--model",
        roberta,
        *data,
        *length,
        "--output",
        str(tmp_path / "o"),
        *flags,
    )
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 or "passed over" in done.stderr
    assert not (tmp_path / "o" / "metrics.jsonl").exists()


def test_other_models_are_refused(tiny_config: str, glue: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model_type is None.* 'roberta' alone"):
        load_encoder_config(tiny_config, ("yes", "no"))
    deep = tmp_path / "deep.json"
    deep.write_text(json.dumps({"model_type": "roberta", "num_hidden_layers": 10**9}))
    with pytest.raises(InputError, match="num_hidden_layers is 1000000000; at most 1000 layers are built"):
        load_encoder_config(str(deep), ("yes", "no"))
    values = {"task": "rte", "model": str(glue), "lr": 1.0}
    with pytest.raises(InputError, match="--init"):
        resolve(values, dict.fromkeys(values, "flag"))
    with pytest.raises(InputError, match="--epochs 3: only a task has them"):
        resolve({"model": tiny_config, "epochs": 3}, {"epochs": "flag"})


def test_weights_that_do_not_fit_are_named(glue: Path, tmp_path: Path, roberta: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(roberta, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    done = finetune("rte", str(broken), glue, tmp_path / "out", *SHORT, "--rank", "4")
    assert done.returncode == 2
    assert re.search(r"lacks roberta.encoder.layer.2\S+ and \d+ more tensors", done.stderr), done.stderr


def test_several_processes_are_refused(roberta: str) -> None:
    with pytest.raises(InputError, match="one process's work"):
        resolve({"task": "rte", "model": roberta}, {"task": "flag"}, Processes(2, 2))


def test_commands_for_text_refuse_what_labels_sentences(glue: Path, roberta: str, tmp_path: Path) -> None:
    assert finetune("rte", roberta, glue, tmp_path / "out", *SHORT, "--rank", "4").returncode == 0
    for command in (["eval"], ["export"], ["generate"]):
        more = [str(tmp_path / "e")] if command == ["export"] else ["hello"] if command == ["generate"] else []
        done = python(COMMAND_LINE, *command, str(tmp_path / "out"), *more)
        assert done.returncode == 2
        assert "its model labels sentences" in done.stderr
        assert "scores in summary.json, and the model in model/, for transformers' AutoModelFor" in done.stderr
    replay = python(COMMAND_LINE, "--config", str(tmp_path / "out" / "config.json"), "--output", str(tmp_path / "p"))
    assert replay.returncode == 2
    assert "give it to the command finetune" in replay.stderr
    again = python(
        COMMAND_LINE, "finetune", "--config", str(tmp_path / "out" / "config.json"), "--output", str(tmp_path / "p")
    )
    assert again.returncode == 0, again.stderr
    assert lines(tmp_path / "p") == lines(tmp_path / "out")


# -- tables -----------------------------------------------------------------------------------------------------------


def test_the_sweep_has_every_task_and_row() -> None:
    table = entries("glue", "", None)
    assert len(table) == 8 * 7
    assert {entry.flags["task"] for entry in table} == set(GLUE)
    assert len({entry.folder for entry in table}) == len(table)


def test_a_sweep_lists_a_run_for_each_row(roberta: str) -> None:
    shared = ("sweep", "glue", "--model", roberta, "--epochs", "1", "--plan-only")
    listed = python(COMMAND_LINE, *shared)
    assert listed.stdout.count("galore-pretrain finetune") == 56, listed.stderr
    listed = python(COMMAND_LINE, *shared, "--task", "rte", "--seeds", "2")
    assert listed.stdout.count("--task rte") == 14
    refused = python(COMMAND_LINE, *shared, "--task", "chat")
    assert refused.returncode == 2
    assert "sweep glue has cola, sst2" in refused.stderr
    refused = python(COMMAND_LINE, "sweep", "table2", "--model", "llama_1m", "--task", "rte", "--plan-only")
    assert refused.returncode == 2
    assert "sweep table2 pretrains" in refused.stderr


def test_runs_are_reported_beside_the_paper(glue: Path, roberta: str, tmp_path: Path) -> None:
    """A row a method and rank, the seeds of which are averaged; the line below has what GaLore's paper prints."""
    common = ("--max-length", "48", "--epochs", "1", "--wandb", "disabled")
    scores = []
    for seed in ("0", "1"):
        output = tmp_path / "runs" / f"rte-{seed}"
        assert finetune("rte", roberta, glue, output, *common, "--rank", "4", "--seed", seed).returncode == 0
        scores.append(100 * summary(output)["eval_score"])
    assert finetune("cola", roberta, glue, tmp_path / "runs" / "cola", *common, "--optim", "lora").returncode == 0
    done = python(COMMAND_LINE, "report", str(tmp_path / "runs"), "--output", str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    last = done.stdout.split("best epoch")[0].splitlines()
    row = next(line for line in last if line.startswith("| galore_adamw r4"))
    assert f"{sum(scores) / 2:.2f} ± " in row
    paper = last[last.index(row) + 1].split(" | ")
    assert paper[:6] == ["| – GaLore Table 4", "30", "60.35", "90.73", "92.25", "79.42"]
    assert any(line.startswith("| lora r8 | 1 |") for line in last)
    assert (tmp_path / "report" / "report.html").exists()
