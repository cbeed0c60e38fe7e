"""The real command line in its own process: runs, errors, signals, kills, and what a run leaves."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from galore_pretrain import run as program
from galore_pretrain.cli import _fail, _is_reported_here, cli
from galore_pretrain.config.flags import OF_TASKS, RunCommand, with_run_options
from galore_pretrain.config.flags import flags as flags_of_a_run
from galore_pretrain.config.flags import resolved as resolve_options
from galore_pretrain.config.options import FLAGS, RunConfig, parse_count
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError, ProcessFailedError, TrainingFailedError
from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.planning import plan
from galore_pretrain.rundir import checkpoint
from galore_pretrain.rundir.directory import RunDirectory
from galore_pretrain.signals import Ending
from runs import COMMAND_LINE, MEASURED, command, lines, python, run, start
from warm_python import executable

PLANNED_PEAK = program._planned_peak
"""What plans a run's memory at its end: conftest.py leaves that out."""
KEYS = {"step", "loss", "lr", "tokens_seen"} | (MEASURED - {"mfu"})
EVAL_KEYS = {"eval_loss", "eval_perplexity", "eval_reference_perplexity", "eval_bits_per_byte", "eval_tokens"}
SUMMARY_KEYS = {
    "steps",
    "tokens_seen",
    "peak_memory_bytes",
    "process_peak_bytes",
    "planned_peak_bytes",
    "weights_bytes",
    "optimizer_bytes",
    "wall_seconds",
    "checkpoint_stall_seconds",
} | EVAL_KEYS


def test_what_a_run_leaves(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        more = EVAL_KEYS if row["step"] in (6, 12) else set()
        if row["step"] in (6, 11):  # T is 5, and a first refresh replaces random bases
            more = more | {"subspace_overlap"}
        assert set(row) == KEYS | more
    assert rows[-1]["eval_loss"] < rows[5]["eval_loss"] < 7.0
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert 2**20 < summary["planned_peak_bytes"] < summary["process_peak_bytes"]
    assert (summary["steps"], summary["tokens_seen"]) == (12, rows[-1]["tokens_seen"])
    assert summary["eval_loss"] == rows[-1]["eval_loss"]
    assert sorted(f.name for f in (finished / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]
    kinds = {f.suffix for f in (finished / "checkpoints").rglob("*") if f.is_file()}
    assert kinds == {".safetensors", ".json", ".model"}  # the last is the tokenizer


def test_each_part_of_a_run_is_built_once(tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model and optimizer that train, one of each on ``meta`` and, for the plan, a copy and an optimizer."""
    built: list[str] = []

    def note(owner: Any, name: str, what: str) -> None:
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (built.append(what), make(*args, **kwargs))[1])

    note(LlamaForCausalLM, "__init__", "model")
    note(RuleOptimizer, "__init__", "optimizer")
    note(plan, "make_heaviest_updates", "plan")
    monkeypatch.setattr(program, "_planned_peak", PLANNED_PEAK)
    words = [*command(tiny_config, tmp_path / "run")[3:], "--steps", "4", "--save-every", "1", "--eval-every", "1"]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    assert sorted(built) == ["model"] * 2 + ["optimizer"] * 3 + ["plan"]


def test_one_process_prints_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the error names; else the first of each host, if all have found it, and each where it is its own."""

    def printed(error: Exception) -> list[int]:
        ranks = []
        for rank in range(4):  # of two hosts
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
            ranks += [rank] * _is_reported_here(error)
        return ranks

    assert printed(InputError("--lr")) == [0, 2]
    assert printed(InputError("--data", reported_by=3)) == [3]
    assert printed(TrainingFailedError("", reported_by=0)) == [0]
    assert printed(OSError("")) == [0, 1, 2, 3]
    elsewhere = OSError("")
    elsewhere.__cause__ = ProcessFailedError(reported_by=1)
    assert printed(elsewhere) == [1]
    assert pickle.loads(pickle.dumps(InputError("--data", reported_by=3))).reported_by == 3


@pytest.mark.parametrize(("ending", "waits"), [(Ending(at_once=True), True), (Ending(is_asked_for=True), False)])
def test_who_leaves_an_error_to_another_waits_for_torchruns_signal(
    ending: Ending, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it will end at once; but not for one that has come."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    assert _fail(InputError("--lr", reported_by=1), "--lr", 2, False, ending) == 2
    assert bool(waited) is waits


READING = """
import os
from galore_pretrain import cli
from galore_pretrain.text import batches
stack, read = batches.stack, []
def reading(*given):
    read.append(1)
    if len(read) > {}:
        os._exit(3)  # at once, whatever the thread is that reads
    return stack(*given)
batches.stack = reading
cli.main()
"""


def test_no_text_is_read_behind_the_last_update(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """Neither by a run from the beginning nor by one that goes on after update 8."""
    words = command(tiny_config, tmp_path / "run")[3:]
    assert python(READING.format(12), *words).returncode == 0
    assert lines(tmp_path / "run") == lines(finished)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    (tmp_path / "run" / "summary.json").unlink()
    again = python(READING.format(4), *words)
    assert again.returncode == 0, again.stderr
    assert lines(tmp_path / "run") == lines(finished)


def test_one_run_at_a_time_in_a_folder(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """A lock that a dead process left is none; that of a living one refuses."""
    output = tmp_path / "shared"
    with RunDirectory(output).locked():
        refused = run(tiny_config, output)
    assert refused.returncode == 2
    assert "another run is writing there" in refused.stderr
    assert not output.exists()
    with RunDirectory(output).locked():
        (output / "something").touch()
    with RunDirectory(output).locked():
        assert (output / "something").exists()
    assert (finished / ".lock").exists()


def test_changing_over_to_layerwise_and_another_budget(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """Both execution modes go on from the other's checkpoints; a budget that the run would exceed is refused."""
    output = tmp_path / "changing"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "checkpoints" / "step_00000012")
    (output / "summary.json").unlink()
    refused = run(tiny_config, output, "--memory-budget", "1001MB")
    assert refused.returncode == 2
    assert "and 0.00 GiB are to be had (--memory-budget 0.9" in refused.stderr
    assert "what helps: --layerwise" in refused.stderr
    result = run(tiny_config, output, "--layerwise")
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stderr
    assert [row["step"] for row in lines(output)] == list(range(1, 13))
    for ours, theirs in zip(lines(output), lines(finished), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_config_json_says_where_values_come_from(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert set(config["config"]) == set(FLAGS)
    assert config["config"]["rank"] == {"value": 4, "origin": "flag"}
    assert config["config"]["lr"] == {"value": 0.01, "origin": "recipe: GaLore scripts/benchmark_c4"}
    assert config["config"]["layout"]["origin"] == "default"
    assert config["versions"]["torch"] == torch.__version__
    assert config["hardware"]["threads"]
    set_by_user = {name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")}
    assert config["allocator"] == (set_by_user or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_model_folder_is_plain_hugging_face(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    state = checkpoint.folder_of(finished / "checkpoints", 12)
    tensors = {f"model.{name}": torch.empty_like(p) for name, p in model.state_dict().items()}
    torch.distributed.checkpoint.load(
        tensors,
        storage_reader=torch.distributed.checkpoint.HuggingFaceStorageReader(str(state)),
        no_dist=True,
    )
    assert all(torch.equal(tensors[f"model.{name}"], p) for name, p in model.state_dict().items())
    ids = tokenizer("Fellow citizens", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    assert model.config.pad_token_id is None
    assert model.config.use_cache
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert (finished / "model" / "model.safetensors").stat().st_mode == (finished / "config.json").stat().st_mode


@pytest.mark.parametrize(
    "flags",
    [(), ("--layerwise",), ("--layout", "pack", "--optim", "natural_galore8bit", "--dtype", "bfloat16")],
    ids=["global", "layerwise", "packed, 8 bits, a history, bf16"],
)
def test_killed_and_started_again(flags: tuple[str, ...], tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """kill -9 after the first checkpoint; the same command again ends with the same lines and weights, bit for bit."""
    whole = finished
    if "--optim" in flags:
        whole = tmp_path / "whole"
        assert run(tiny_config, whole, *flags).returncode == 0
    output = tmp_path / "killed"
    words = command(tiny_config, output, *flags)[3:]
    process = start(COMMAND_LINE, *words, stdout=tmp_path / "stdout", stderr=tmp_path / "stderr")
    while not (output / "checkpoints" / "step_00000004").exists():
        assert process.exitcode is None
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (output / "summary.json").exists()
    result = run(tiny_config, output, *flags)
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stderr
    assert lines(output) == lines(whole)
    assert (output / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_sigterm_saves_and_the_same_command_goes_on(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    words = command(tiny_config, tmp_path / "run", "--save-every", "1000")[1:]
    process = subprocess.Popen([executable(), *words], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not lines(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    if "done:" not in stderr:  # it may have been too late to stop it
        assert process.returncode == 143, stderr
        assert checkpoint.newest(tmp_path / "run" / "checkpoints", set_aside=False) is not None
    assert run(tiny_config, tmp_path / "run").returncode == 0
    assert lines(tmp_path / "run") == lines(finished)


def test_resume_of_a_finished_run_changes_nothing(tiny_config: str, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    result = run(tiny_config, finished)
    assert result.returncode == 0, result.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_folder_can_be_moved(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """A run stopped in one place and continued in another keeps its lines."""
    shutil.copytree(finished, tmp_path / "moved")
    (tmp_path / "moved" / "summary.json").unlink()  # so that it does not count as finished
    result = run(tiny_config, tmp_path / "moved")
    assert result.returncode == 0, result.stderr
    assert lines(tmp_path / "moved") == lines(finished)


def test_going_back_never_overtakes_later_checkpoints(tiny_config: str, finished: Path) -> None:
    result = run(tiny_config, finished, "--resume", str(finished / "checkpoints" / "step_00000008"))
    assert result.returncode == 2
    assert "also holds step_00000012" in result.stderr


def test_resume_notices_that_the_same_flags_name_other_files(tiny_config: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b", "validation"):
        rows = [json.dumps({"text": f"{name} {i} the people of the United States"}) for i in range(50)]
        (texts / f"{name}.jsonl").write_text("\n".join(rows))
    flags = ("--data", str(texts), "--tokenizer", "sample", "--steps", "2")
    assert run(tiny_config, tmp_path / "run", *flags).returncode == 0
    (tmp_path / "run" / "summary.json").unlink()
    (texts / "c.jsonl").write_text('{"text": "one more"}')
    result = run(tiny_config, tmp_path / "run", *flags)
    assert result.returncode == 2
    assert "was made with another training text" in result.stderr


def test_text_without_validation_is_refused_before_training(tiny_config: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "only one document"}')
    result = run(tiny_config, tmp_path / "run", "--data", str(tmp_path / "a.jsonl"), "--tokenizer", "sample")
    assert result.returncode == 2
    assert "give --eval-data PATH" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_that_is_named_is_refused(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """Not set aside, as the newest of a run's own would be: it is what was asked for."""
    named = tmp_path / "step_00000012"
    shutil.copytree(finished / "checkpoints" / "step_00000012", named)
    (tensors,) = named.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:100])
    result = run(tiny_config, tmp_path / "run", "--resume", str(named))
    assert result.returncode == 2
    assert f"{named}: damaged ({tensors.name} is 100 bytes" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["4.1M", "1.07B", "32.2K", "20000", "1.1B"])
def test_counts_are_exact(text: str) -> None:
    unit = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1], 1)
    assert parse_count(text) == round(float(text.rstrip("KMB")) * unit)


def test_resume_refuses_what_would_compute_something_else(tiny_config: str, finished: Path) -> None:
    result = run(tiny_config, finished, "--lr", "0.02", "--batch-size", "2")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("Error:")
    assert "--lr 0.02 (was 0.01)" in result.stderr
    assert "--batch-size" not in result.stderr
    assert run(tiny_config, finished, "--resume", "never").returncode == 2


def test_changes_can_be_insisted_on(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """Of options and of the text, from the checkpoint of a folder that is left as it is; what computes the same may
    change without."""
    begun = finished / "checkpoints" / "step_00000008"
    other = tmp_path / "text.jsonl"
    other.write_text("".join(json.dumps({"text": f"{i} other words"}) + "\n" for i in range(300)))
    changed = ("--resume", str(begun), "--lr", "0.02", "--data", str(other), "--tokenizer", "sample")
    refused = run(tiny_config, tmp_path / "run", *changed)
    assert refused.returncode == 2
    assert "--lr 0.02 (was 0.01)" in refused.stderr
    assert not (tmp_path / "run").exists()
    insisted = run(tiny_config, tmp_path / "run", *changed, "--resume-with-changes")
    assert insisted.returncode == 0, insisted.stderr
    assert "at update 8" in insisted.stderr
    assert lines(tmp_path / "run")[0]["lr"] > lines(finished)[8]["lr"]
    alike = run(
        tiny_config, tmp_path / "alike", "--resume", str(begun), "--activation-checkpointing", "--batch-size", "2"
    )
    assert alike.returncode == 0, alike.stderr
    expected = lines(finished)[8:]
    assert [line["step"] for line in lines(tmp_path / "alike")] == [9, 10, 11, 12]
    for ours, theirs in zip(lines(tmp_path / "alike"), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    before = (tmp_path / "run" / "config.json").read_bytes()
    (tmp_path / "run" / "summary.json").unlink()
    another = run(tiny_config, tmp_path / "run", "--optim", "natural_galore", "--resume-with-changes")
    assert another.returncode == 2, another.stderr
    assert "another model or optimizer" in another.stderr
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_the_same_command_goes_on_from_what_it_began_with(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """``--resume PATH``, stopped and given again, as a cluster does; nothing else may take its place."""
    begun = str(finished / "checkpoints" / "step_00000008")
    done = run(tiny_config, tmp_path / "run", "--resume", begun, "--save-every", "1")
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "run") == lines(finished)[8:]
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    again = run(tiny_config, tmp_path / "run", "--resume", begun, "--save-every", "1")
    assert again.returncode == 0, again.stderr
    assert "at update 11" in again.stderr
    assert lines(tmp_path / "run") == lines(finished)[8:]
    shutil.copytree(begun, tmp_path / "step_00000008")
    other = run(tiny_config, tmp_path / "run", "--resume", str(tmp_path / "step_00000008"))
    assert other.returncode == 2
    assert "would be overtaken" in other.stderr


def test_a_finished_run_without_checkpoints_is_not_begun_anew(tiny_config: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = sorted(tmp_path.rglob("*"))
    refused = run(tiny_config, tmp_path / "run")
    assert refused.returncode == 2
    assert "holds a finished run without its checkpoints" in refused.stderr
    assert sorted(file for file in tmp_path.rglob("*") if file.name != ".lock") == [
        file for file in before if file.name != ".lock"
    ]


def test_ten_updates_that_are_skipped_end_a_run_and_their_rows_are_kept(tiny_config: str, tmp_path: Path) -> None:
    ended = run(tiny_config, tmp_path / "run", "--max-loss", "0.001")
    assert ended.returncode == 1
    assert "10 updates in a row" in ended.stderr.splitlines()[-1]
    kept = sorted((tmp_path / "run" / "skipped").iterdir())
    assert [file.name for file in kept] == [f"update_{n:08}.safetensors" for n in range(1, 11)]
    assert load_file(kept[0])["input_ids"].shape == (4, 48)


@pytest.mark.parametrize("numerics", ["sound", "reference"])
def test_micro_batch_changes_rounding_only(numerics: str, tiny_config: str, finished: Path, tmp_path: Path) -> None:
    """Sound: the mean over the update's label tokens. Reference: the mean of micro-batch means, as published."""
    words = ["the", "people", "of", "these", "United", "States", "and", "their", "Congress"]
    texts = [" ".join(words * (1 + i % 7)) for i in range(200)]  # documents of uneven length
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i, text in enumerate(texts))
    )
    flags = ("--data", str(tmp_path / "text.jsonl"), "--tokenizer", "sample", "--numerics", numerics)
    flags += ("--eps", "1e-4")  # a larger ε, since Adam amplifies rounding near zero gradients
    for size in (1, 4):
        assert run(tiny_config, tmp_path / str(size), "--batch-size", str(size), *flags).returncode == 0
    one, four = ([row["loss"] for row in lines(tmp_path / str(size))] for size in (1, 4))
    gap = max(abs(a - b) for a, b in zip(one, four, strict=True))
    assert gap < 1e-4 if numerics == "sound" else gap > 1e-4


def test_the_papers_tokens_can_be_asked_for() -> None:
    config, origins = resolve({"model": "llama_130m", "max_tokens": "recipe"}, {"max_tokens": "flag"})
    assert (config.max_tokens, config.steps, config.warmup_steps) == (2_200_000_000, None, None)
    assert "GaLore Tables 2 and 3" in origins["max_tokens"]


def test_max_tokens_ends_with_the_update_that_reaches_them(tiny_config: str, tmp_path: Path) -> None:
    flags = command(tiny_config, tmp_path / "run", "--max-tokens", "1K")[3:]
    del flags[flags.index("--steps") : flags.index("--steps") + 2]
    result = python(COMMAND_LINE, *flags)
    assert result.returncode == 0, result.stderr
    rows = lines(tmp_path / "run")
    assert rows[-2]["tokens_seen"] < 1000 <= rows[-1]["tokens_seen"]
    assert rows[-1]["lr"] == pytest.approx(0.001)
    assert "eval_loss" in rows[-1]


# -- errors and help --------------------------------------------------------------------------------------------------

ERRORS = [
    ([], "--model is missing"),
    (["--model", "llama_6m"], "did you mean llama_60m"),
    (["--model", "llama_60m", "--optim", "galore_adamww"], "did you mean galore_adamw"),
    (["--model", "llama_60m", "--optim", "adamw", "--rank", "3"], "--rank 3 has no meaning for --optim adamw"),
    (["--model", "llama_60m", "--optim", "adamw", "--moments", "reset"], "--moments reset has no meaning for --optim"),
    (["--model", "llama_60m", "--natural-history", "5"], "--natural-history 5 has no meaning for --optim galore_adamw"),
    (["--model", "llama_60m", "--natural-damping", "0"], "--natural-damping 0.0 must be greater than 0"),
    (["--model", "llama_60m", "--optim", "galore_adamw_layerwise", "--no-layerwise"], "asks for --layerwise"),
    (["--model", "llama_60m", "--rank", "0"], "--rank 0 must be at least 1"),
    (["--model", "llama_60m", "--lr", "nan"], "--lr nan must be a finite number"),
    (["--model", "llama_60m", "--lr", "0"], "--lr 0.0 must be greater than 0"),
    (["--model", "llama_60m", "--steps", "0"], "--steps 0 must be at least 1"),
    (["--model", "llama_60m", "--steps", "5", "--max-tokens", "1M"], "both end the run"),
    (["--model", "llama_60m", "--max-tokens", "lots"], "'lots' is not a count"),
    (["--model", "llama_61m"], "did you mean"),
    (["--model", "llama_60m", "--memory-budget", "24"], "write a unit, such as 24GiB"),
    (["--model", "llama_60m", "--batch-size", "7"], "the nearest --batch-size is 8"),
    (["--model", "llama_60m", "--accumulate-on", "host", "--device", "cpu"], "lie in the host's memory already"),
    (
        ["plan", "--model", "llama_60m", "--accumulate-on", "host", "--device", "cuda", "--batch-size", "512"],
        "an update of one micro-batch, which sums nothing",
    ),
    (
        ["plan", "--model", "llama_60m", "--accumulate-on", "host", "--device", "cuda", "--gpus-per-node", "2"],
        "2 processes find norms and bases together",
    ),
    (["--model", "llama_60m", "--optim", "adamw", "--grad-clip", "1", "--clip-norm", "projected"], "keeps whole"),
    (["plan", "--model", "llama_60m", "--picture", "a.png"], "only --compare draws"),
    (["plan", "--paper", "--model", "llama_60m"], "whatever --model may say"),
    (["--model", "llama_60m", "--data", "nowhere/at/all"], "no such file, folder or pattern"),
    (["--model", "llama_60m", "--optim", "sgd", "--eps", "1e-8"], "only methods with an Adam"),
    (["--model", "llama_60m", "--optim", "relora", "--relora-every", "2", "--relora-warmup", "3"], "never recover"),
    (["trian", "--model", "llama_60m"], "no command 'trian'; choose from train"),
    (["--model", "llama_20m", "--max-tokens", "recipe"], "no table of the paper has llama_20m"),
    (["--model", "llama_60m", "--max-tokens", "recipe", "--steps", "5"], "both end the run"),
    (["--model", "llama_60m", "--betas", "1,2"], "not a pair of numbers in [0, 1)"),
    (["--model", "llama_60m", "--batch-size", "24"], "--total-batch-size 512 is not a multiple of --batch-size 24"),
    (["--model", "llama_60m", "--layerwise", "--grad-clip", "1", "--clip-norm", "full"], "keep low-rank sums"),
    (["--model", "llama_60m", "--memory-budget", "800MiB"], "838860800 must be greater than 1,000,000,000"),
    (["--model", "llama_60m", "--memory-budget", "24G"], "'24G' is not a size of memory"),
    (["plan", "--model", "llama_1m", "--device", "cuda:9"], "CUDA devices"),
    (["--model", "llama_60m", "--clip-norm", "full"], "--clip-norm full has no meaning without --grad-clip"),
    (["--model", "llama_60m", "--steps", "5", "--warmup-steps", "6"], "--warmup-steps 6 exceeds --steps 5"),
    (["--model", "llama_60m", "--data", "x", "--tokenizer", "sample"], "no such file, folder or pattern"),
    (["--model", "llama_60m", "--data", "."], "--tokenizer is missing"),
    (["--model", "llama_60m", "--data", "sample", "--max-length", "2000"], "exceeds the 1024 positions"),
    (["--model", "llama_60m", "--data", "sample", "--device", "tpu"], "--device tpu"),
    (["--model", "llama_60m", "--data", "sample", "--resume", "nowhere"], "--resume nowhere: no such folder"),
    (["--model", "llama_60m", "--data", "sample", "--tokenizer", "no.model"], "--tokenizer no.model: no such"),
    (["--model", "llama_60m", "--layout", "heap"], "'heap' is not one of"),
    (["--model", "llama_60m", "--rnk", "3"], "--rnk"),
    (["--model", "llama_60m", "--config", "/nowhere.json"], "--config /nowhere.json: not readable"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_wrong_use_is_one_line_and_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["galore-pretrain", *arguments])
    from galore_pretrain.cli import main

    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("Error: ")
    assert message in errors[0]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_vocabulary_that_does_not_fit_is_refused(tiny_config: str, tmp_path: Path) -> None:
    config = json.loads(Path(tiny_config).read_text()) | {"vocab_size": 1000}
    (tmp_path / "small.json").write_text(json.dumps(config))
    result = run(str(tmp_path / "small.json"), tmp_path / "run")
    assert result.returncode == 2
    assert "produces ids up to 1023" in result.stderr
    assert not (tmp_path / "run").exists()


def test_help_groups_every_flag() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    for group in (
        "Method:",
        "Batch:",
        "Text:",
        "Length and learning rate:",
        "Machine:",
        "Output:",
        "Commands:",
    ):
        assert group in text
    tuned = CliRunner().invoke(cli, ["finetune", "--help"]).output
    for name in FLAGS:
        flag = f"--{name.replace('_', '-')} "
        assert flag in tuned
        assert (flag in text) is (name not in OF_TASKS)


def test_help_of_an_evaluation_names_what_the_run_has() -> None:
    """Not the defaults of a new run."""
    text = CliRunner().invoke(cli, ["eval", "--help"]).output
    assert "[the run's, or sample]" in text
    assert not re.search(r"\[(c4|pad|joined|256|10M|raise)\]", text)


def test_run_json_is_below_flags_and_above_the_recipe(tmp_path: Path, tiny_config: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"lr": 0.5, "steps": 3, "betas": [0.8, 0.9], "eval-tokens": "2K", "layerwise": True}))
    result = run(tiny_config, tmp_path / "run", "--config", str(path))
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["lr"] == {"value": 0.5, "origin": str(path)}
    assert config["betas"]["value"] == [0.8, 0.9]
    assert config["layerwise"]["value"] is True
    assert config["steps"] == {"value": 12, "origin": "flag"}
    assert config["eval_tokens"] == {"value": 2000, "origin": "flag"}
    for bad in ({"lr": {}}, {"batch_size": [1]}, {"steps": 3.7}, {"layerwise": 1}):
        path.write_text(json.dumps(bad))
        with pytest.raises(InputError, match=next(iter(bad))):
            cli(["--model", tiny_config, "--config", str(path)], standalone_mode=False)
    path.write_text(json.dumps({"learning_rate": 0.5}))
    assert "unknown key 'learning_rate'" in run(tiny_config, tmp_path / "run", "--config", str(path)).stderr


def test_a_runs_own_config_repeats_it(finished: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(finished / "config.json"), "--output", str(tmp_path / "again")]
    result = python(COMMAND_LINE, *arguments)
    assert result.returncode == 0, result.stderr
    assert lines(tmp_path / "again") == lines(finished)


def test_an_edited_config_of_a_run_is_what_it_says(finished: Path, tmp_path: Path) -> None:
    """Bare values count too; with another optimizer, what was a recipe's is looked up anew."""
    written = json.loads((finished / "config.json").read_text())
    written["config"]["lr"] = 0.02
    (edited := tmp_path / "edited.json").write_text(json.dumps(written))

    def resolved(*flags: str) -> RunConfig:
        command = with_run_options(RunCommand("train", params=flags_of_a_run()))
        with command.make_context("train", [*flags]) as context:
            return resolve_options(context, {k: v for k, v in context.params.items() if k != "debug"})[0]

    assert resolved("--config", str(edited)).lr == 0.02
    other = resolved("--config", str(edited), "--optim", "galore_adafactor")
    assert (other.lr, other.rank, other.optim) == (0.02, 4, "galore_adafactor")
    del written["config"]["lr"]
    written["config"]["lr"] = {"value": 0.01, "origin": "recipe: of GaLore"}
    written["config"]["rank"]["origin"] = "recipe: of GaLore"
    written["config"]["update_proj_gap"]["origin"] = "recipe: of GaLore"
    edited.write_text(json.dumps(written))
    plain = resolved("--config", str(edited), "--optim", "adamw")
    assert (plain.lr, plain.rank, plain.steps, plain.max_length) == (0.001, None, 12, 48)


def test_tied_embeddings_are_saved_once(tiny_config: str, tmp_path: Path) -> None:
    tied = tmp_path / "tied.json"
    tied.write_text(json.dumps(json.loads(Path(tiny_config).read_text()) | {"tie_word_embeddings": True}))
    for output in ("run", "whole"):
        done = run(str(tied), tmp_path / output)
        assert done.returncode == 0, done.stderr
        if output == "run":
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
            (tmp_path / "run" / "summary.json").unlink()
            assert "at update 8" in run(str(tied), tmp_path / "run").stderr
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_recipes_resolve_to_the_papers_values() -> None:
    config, origins = resolve({"model": "llama_60m"}, {"model": "flag"})
    assert (config.lr, config.rank, config.update_proj_gap, config.galore_scale) == (0.01, 128, 200, 0.25)
    assert (config.steps, config.warmup_steps, config.total_batch_size, config.min_lr_ratio) == (
        10_000,
        1000,
        512,
        0.1,
    )
    assert (config.basis, config.refresh, config.eval_every) == ("randomized", "staggered", 1000)
    assert origins["rank"] == "recipe: GaLore scripts/benchmark_c4/llama_60m.sh"
    config, _ = resolve({"model": "llama_7b", "numerics": "reference"}, {})
    assert (config.lr, config.rank, config.update_proj_gap, config.grad_clip, config.steps) == (
        0.005,
        1024,
        500,
        1.0,
        150_000,
    )
    assert (config.basis, config.refresh) == ("svd", "together")
    config, _ = resolve({"model": "llama_60m", "optim": "adamw"}, {})
    assert (config.rank, config.basis, config.lr) == (None, None, 0.001)
    with pytest.raises(InputError, match="--model is missing"):
        resolve({}, {})


@pytest.mark.parametrize(
    ("given", "betas"),
    [
        ({"moments": "project", "steps": 20_001}, (0.9, 0.99)),
        ({"moments": "project", "max_tokens": 20_001 * 512 * 256}, (0.9, 0.99)),
        ({"moments": "project", "steps": 20_000}, None),
        ({"moments": "keep", "steps": 60_000}, None),
        ({"steps": 60_000}, None),
        ({"moments": "project", "steps": 60_000, "betas": (0.9, 0.999)}, (0.9, 0.999)),
        ({"moments": "project", "steps": 60_000, "optim": "galore_adafactor"}, None),  # has no β₂
    ],
)
def test_moments_that_are_transported_in_a_long_run_have_a_shorter_memory(
    given: dict[str, object], betas: tuple[float, float] | None
) -> None:
    config, origins = resolve({"model": "llama_60m", **given}, {})
    assert config.betas == betas
    if betas == (0.9, 0.99):
        assert "2607.05872" in origins["betas"]


def test_names_of_other_projects_and_what_they_imply() -> None:
    given = {"model": "llama_60m", "optim": "galore_adamw8bit_per_layer"}
    config, origins = resolve(given, {"model": "flag", "optim": "flag"})
    assert (config.optim, config.layerwise) == ("galore_adamw8bit", True)
    assert origins["layerwise"] == "optim galore_adamw8bit_per_layer"
    config, _ = resolve({"model": "llama_60m", "optim": "adam8bit"}, {})
    assert (config.optim, config.layerwise, config.moments) == ("adamw8bit", False, None)
    config, origins = resolve({"model": "llama_60m", "optim": "natural_galore"}, {})
    assert (config.natural_history, config.natural_damping, config.moments) == (20, 1e-3, "keep")


def test_python_dash_m_and_version() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "galore_pretrain", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("galore-pretrain, version ")


def test_several_texts_are_trained_on_together(tiny_config: str, tmp_path: Path) -> None:
    """By flags and by a run JSON; a run on them goes on, and refuses one of them alone."""
    for name in "ab":
        rows = [json.dumps({"text": f"{name} {n} of many"}) for n in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    (tmp_path / "run.json").write_text(json.dumps({"model": tiny_config, "data": paths}))

    def resolved(arguments: list[str]) -> RunConfig:
        with RunCommand("x", params=flags_of_a_run(), callback=lambda: None).make_context("x", arguments) as ctx:
            return resolve_options(ctx, ctx.params)[0]

    shared = ["--tokenizer", "sample", "--model", tiny_config]
    assert resolved([*shared, "--data", paths[0]]).data == paths[0]
    assert resolved([*shared, "--data", paths[0], "--data", paths[1]]).data == tuple(paths)
    with pytest.raises(InputError, match="--data c4: cannot be joined to another --data"):
        resolved([*shared, "--data", paths[0], "--data", "c4"])

    steps = ["--tokenizer", "sample", "--steps", "4", "--save-every", "2", "--wandb", "disabled", "--eval-tokens", "60"]
    arguments = [*steps, "--total-batch-size", "4", "--max-length", "48"]
    arguments += ["--optim", "adamw", "--dtype", "float32", "--output", str(tmp_path / "run")]
    begun = python(COMMAND_LINE, *arguments, "--config", str(tmp_path / "run.json"))
    assert begun.returncode == 0, begun.stderr
    assert all(f"--data {path}: training" in begun.stderr for path in paths)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["data"]["value"] == paths
    (tmp_path / "run" / "summary.json").unlink()
    given = ["--model", tiny_config, "--data", paths[0]]
    alone = python(COMMAND_LINE, *arguments, *given)
    assert alone.returncode == 2
    assert "was made with other options: --data" in alone.stderr
    again = python(COMMAND_LINE, *arguments, *given, "--data", paths[1])
    assert again.returncode == 0, again.stderr


def with_another_wandb(model: str, output: Path, *flags: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A run that imports the wandb of ``env``'s PYTHONPATH: nothing else does, and so no process has before it."""
    words = [executable(), *command(model, output, *flags)[1:]]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=env)


def test_wandb_gets_the_same_numbers(tiny_config: str, tmp_path: Path) -> None:
    environment = os.environ | {"WANDB_MODE": "offline"}
    environment.pop("WANDB_API_KEY", None)
    result = run(tiny_config, tmp_path / "run", "--steps", "3", env=environment)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))

    recorder = tmp_path / "recorder" / "wandb"
    recorder.mkdir(parents=True)
    (recorder / "__init__.py").write_text(
        "import json\n"
        "from types import SimpleNamespace\n"
        "def Settings(**kwargs): return kwargs\n"
        "def setup(_): return SimpleNamespace(settings=SimpleNamespace(base_url='', project=None, run_name=None))\n"
        "def init(*, dir, config, **kwargs):\n"
        "    assert config['steps'] == 3 and kwargs['mode'] == 'offline'\n"
        "    return Run(open(dir / 'recorded.jsonl', 'w'))\n"
        "class Run:\n"
        "    id = 'recorded'\n"
        "    def __init__(self, file): self.file = file\n"
        "    def log(self, metrics, step): self.file.write(json.dumps({'step': step, **metrics}) + '\\n')\n"
        "    def finish(self): self.file.close()\n"
    )
    environment["PYTHONPATH"] = str(recorder.parent)
    result = with_another_wandb(tiny_config, tmp_path / "other", "--steps", "3", env=environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "other" / "recorded.jsonl").read_text() == (tmp_path / "other" / "metrics.jsonl").read_text()


def test_wandb_never_stops_a_run(tiny_config: str, tmp_path: Path) -> None:
    blocked = tmp_path / "broken" / "wandb"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise RuntimeError('wandb is broken')")
    environment = os.environ | {"PYTHONPATH": str(blocked.parent), "WANDB_MODE": "offline"}
    result = with_another_wandb(tiny_config, tmp_path / "run", "--steps", "2", env=environment)
    assert result.returncode == 0, result.stderr
    assert "wandb is off for this run: wandb is broken" in result.stderr
