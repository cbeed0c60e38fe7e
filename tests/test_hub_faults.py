"""A hub that fails while a model or its data come: each run ends as one that nothing disturbed. And one that changes.

Faults come one by one, and each strikes every file that a run reads: where its size and commit are asked for, and in
its bytes.
"""

import json
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file

from fakehub import FakeHub, Fault
from galore_pretrain.errors import InputError
from galore_pretrain.text import hub
from galore_pretrain.text.glue import TASKS
from pretrained import LLAMA3_ROPE, begin_texts, make_folder, transformers_loss
from roberta import make_glue, make_roberta
from runs import COMMAND_LINE, Done, lines
from test_chat import CHATML
from test_finetune_chat import model_folder, write_chats
from test_hub import SOON
from test_init import KILLED, first_loss
from warm import WarmHub

pytestmark = pytest.mark.network

NEW = "0" * 40

# The libraries, and this program, wait for seconds and minutes between two attempts.
SHORT_WAITS = """
import time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
"""
LENGTH = ("--total-batch-size", "4", "--max-length", "48", "--optim", "adamw", "--lr", "1e-3", "--dtype", "float32")
LENGTH += ("--wandb", "disabled", "--output")
MODEL = ("tokenizer_config.json", "config.json", "tokenizer.json", "model.safetensors")
"""What is asked for of any model. One fault of ``config.json`` is one of either file of that ending."""


@dataclass(frozen=True)
class Subject:
    """A run, and the files of the hub that it reads: those that are ``waited`` for as long as it takes, once the hub
    has answered, and ``first`` ones, for which a user waits seconds."""

    arguments: tuple[str, ...]
    first: tuple[str, ...]
    waited: tuple[str, ...]


SUBJECTS = {
    "init": Subject(
        ("--init", "org/model", "--data", "sample", "--steps", "1", "--eval-tokens", "200", *LENGTH),
        MODEL[:2],
        ("tokenizer.json", "model.safetensors.index.json", ".safetensors"),
    ),
    "glue": Subject(
        ("finetune", "--task", "rte", "--model", "org/encoder", "--epochs", "1", *LENGTH),
        (*MODEL[:2], "train-00000-of-00001.parquet"),
        (*MODEL[2:], "validation-00000-of-00001.parquet"),
    ),
    "chat": Subject(
        ("finetune", "--task", "chat", "--model", "org/talker", "--data", "hub:org/chats", "--steps", "1", *LENGTH),
        (*MODEL[:2], ".jsonl"),
        ("chat_template.jinja", *MODEL[2:]),
    ),
}
FAULTS = {
    "too many requests": Fault(times=8, status=429),
    "broken": Fault(times=8, status=500),
    "unavailable": Fault(times=8, status=503),
    "drops": Fault(times=8),
    "slow": Fault(times=1, hang=5.0),
}
"""In a row; of the first files, two are. The hub's library asks seven times by itself."""


def write_hub(root: Path) -> Path:
    make_folder(root / "org" / "model", "Mistral", num_key_value_heads=2, shard_size="100KB")
    make_roberta(root / "org" / "encoder")
    make_glue.write_task(root / "nyu-mll" / "glue", TASKS["rte"], train=8, validation=4)
    model_folder(root / "org" / "talker", CHATML, "Qwen2", num_key_value_heads=2)
    (root / "org" / "chats").mkdir()
    write_chats(root / "org" / "chats" / "train.jsonl", 120)
    return root


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub holds: a Mistral, a RoBERTa with GLUE's data, and a Qwen2 that talks with conversations."""
    return write_hub(tmp_path_factory.mktemp("content"))


@pytest.fixture(scope="module")
def undisturbed(content: Path, warm_hub: WarmHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The metrics of each run where the hub has no fault."""
    found = {}
    for name, subject in SUBJECTS.items():
        warm_hub.hold(content)
        folder = tmp_path_factory.mktemp(name)
        done = warm_hub.python(folder, COMMAND_LINE, *subject.arguments, "run")
        assert done.returncode == 0, done.stderr
        found[name] = lines(folder / "run")
    return found


def struck(server: FakeHub, subject: Subject, fault: Fault) -> None:
    """Let a fault strike every file, HEAD and GET."""
    faults = []
    for suffix in (*subject.first, *subject.waited):
        times = min(2, fault.times) if suffix in subject.first else fault.times
        for method in ("HEAD", "GET"):
            if suffix == ".jsonl" and method == "HEAD":  # which is read as a stream
                continue
            faults.append(replace(fault, times=times, at=10, suffix=suffix, methods=(method,)))
    if fault.hang:  # each takes seconds of waiting
        faults = [f for f in faults if f.suffix in (subject.waited[-1], ".jsonl")]
    server.more_faults = faults


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_fault_of_the_hub_changes_nothing(
    name: str, kind: str, content: Path, undisturbed: dict[str, list[Any]], warm_hub: WarmHub, tmp_path: Path
) -> None:
    subject, fault = SUBJECTS[name], FAULTS[kind]
    warm_hub.hold(content)
    struck(warm_hub, subject, fault)
    timeouts = SOON if fault.hang else {}
    done = warm_hub.python(tmp_path, SHORT_WAITS + COMMAND_LINE, *subject.arguments, "run", **timeouts)
    assert done.returncode == 0, done.stderr
    assert not warm_hub.pending()
    assert lines(tmp_path / "run") == undisturbed[name]


class BusyError(Exception):
    """An answer of the hub's that passes."""

    response = SimpleNamespace(status_code=503)


@pytest.mark.parametrize(
    "cause",
    [OfflineModeIsEnabled("offline"), ConnectionRefusedError("refused"), TimeoutError("late"), BusyError("busy")],
)
def test_a_cache_is_enough_where_nothing_answers(
    cause: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A tokenizer that others have put there, without notes of what its repository has not. Who answers is asked."""
    folder = tmp_path / "snapshots" / NEW
    folder.mkdir(parents=True)
    (folder / "tokenizer_config.json").touch()

    def look_up(repository: str, file: str, **_: Any) -> str | None:
        return str(folder / file) if (folder / file).exists() else None

    def ask(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("not in the cache") from cause

    monkeypatch.setattr(hub, "_commits", {})
    monkeypatch.setattr(hub, "_FIRST_PATIENCE", 0.0)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look_up)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask)
    files = ("tokenizer_config.json", "tokenizer.json")
    if isinstance(cause, BusyError):
        with pytest.raises(InputError, match="--tokenizer: org/x cannot be fetched from the hub"):
            hub.download_tokenizer("org/x", files)
    else:
        assert hub.download_tokenizer("org/x", files) == folder
        assert hub.commit_of("org/x") == NEW


# -- a hub that changes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub holds later: of the same shapes, and weights, positions, templates and ids are others."""
    root = tmp_path_factory.mktemp("changed")
    other = {"num_key_value_heads": 2, "initializer_range": 0.3, "rope_parameters": LLAMA3_ROPE}
    make_folder(root / "org" / "model", "Mistral", **other)
    begin_texts(str(root / "org" / "model"))
    make_roberta(root / "org" / "encoder", seed=1, layer_norm_eps=1e-3, texts=["another vocabulary"])
    model_folder(root / "org" / "talker", CHATML.replace("assistant", "answer"), "Qwen2", **other)
    return root


def change(server: FakeHub, content: Path, changed: Path) -> None:
    """Let the hub's newest commit be another one. The one before is still there."""
    server.hold(changed)
    server.older = {server.commit: content}
    server.commit = NEW


def test_model_and_tokenizer_are_of_the_commit_of_the_config(
    content: Path, changed: Path, warm_hub: WarmHub, tmp_path: Path
) -> None:
    """A plan has read config.json, and somebody changes the repository before the run takes the rest."""
    warm_hub.hold(content)
    arguments = SUBJECTS["init"].arguments
    planned = warm_hub.python(tmp_path, COMMAND_LINE, "plan", *arguments, "run")
    assert planned.returncode == 0, planned.stderr
    commit = warm_hub.commit
    change(warm_hub, content, changed)
    done = warm_hub.python(tmp_path, COMMAND_LINE, *arguments, "run", "--eval-tokens", "2000")
    assert done.returncode == 0, done.stderr
    assert first_loss(tmp_path / "run") == pytest.approx(transformers_loss(content / "org" / "model"), rel=1e-5)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_revision"] == commit


CONTINUED = {
    "init": ("--init", "org/model", "--data", "sample", "--steps", "6", "--eval-tokens", "200"),
    "glue": ("finetune", "--task", "rte", "--model", "org/encoder", "--data", "rte", "--epochs", "3"),
    "chat": ("finetune", "--task", "chat", "--model", "org/talker", "--data", "chats.jsonl", "--steps", "6"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTINUED)
def test_a_run_goes_on_with_the_model_that_it_began_with(
    name: str, content: Path, changed: Path, warm_hub: WarmHub, tmp_path: Path
) -> None:
    """Bit for bit, on a machine whose cache is empty, when the hub's model is another."""
    make_glue.write_task(tmp_path, TASKS["rte"], train=8, validation=4)
    write_chats(tmp_path / "chats.jsonl", 120)
    arguments = (*CONTINUED[name], "--save-every", "2", *LENGTH)

    def train(output: str, script: str = COMMAND_LINE) -> Done:
        return warm_hub.python(tmp_path, script, *arguments, output)

    warm_hub.hold(content)
    whole = train("whole")
    assert whole.returncode == 0, whole.stderr
    assert train("run", KILLED).returncode == -signal.SIGKILL
    shutil.rmtree(tmp_path / "hf")
    change(warm_hub, content, changed)
    done = train("run")
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / output / "model" / "model.safetensors") for output in ("run", "whole"))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    for file in ("tokenizer.json", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "run" / "model" / file).read_bytes() == (tmp_path / "whole" / "model" / file).read_bytes()
