"""Leaderboards: entries from runs of the real command line, refusals, verification, and the page."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from galore_pretrain.cli import cli
from galore_pretrain.config.flags import RunCommand, flags, resolved
from galore_pretrain.errors import InputError
from galore_pretrain.study.leaderboard import Entry, Track
from galore_pretrain.study.standings import page
from galore_pretrain.study.sweep import as_words
from own_methods import LION
from runs import COMMAND_LINE, python

REPOSITORY = Path(__file__).parent.parent


def leaderboard(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, ["leaderboard", *map(str, words)], standalone_mode=False)


def refusal(*words: str | Path) -> str:
    result = leaderboard(*words)
    assert isinstance(result.exception, InputError), (result.output, result.exception)
    return str(result.exception)


@pytest.fixture(scope="session")
def made(tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a track, the runs of three seeds of two methods, one of another, and one of a method of one's own.

    To be copied, not changed.
    """
    folder = tmp_path_factory.mktemp("board")
    track: dict[str, Any] = {
        "title": "Tiny",
        "about": "Nothing is learned here.",
        "flags": {
            "model": tiny_config,
            "data": "sample",
            "max_length": 32,
            "total_batch_size": 2,
            "steps": 8,
            "dtype": "float32",
            "eval_tokens": 300,
        },
        "seeds": [1, 2, 3],
        "baselines": ["adamw", "galore_adamw"],
        "control": "frozen",
        "validation_bytes": 1000,
    }
    (folder / "boards" / "tiny").mkdir(parents=True)
    (folder / "boards" / "tiny" / "track.json").write_text(json.dumps(track))
    (folder / "lion.py").write_text(LION)
    lines = [(row, seed, ()) for row in ("adamw", "galore_adamw") for seed in (1, 2, 3)]
    lines += [("scale", 1, ()), ("adamw", 1, ("--matrix-lr-scale", "0"))]
    lines += [(f"{folder / 'lion.py'}:Lion", 1, ("--lr", "0.001"))]
    for row, seed, more in lines:
        name = "frozen" if "0" in more else row.rpartition(":")[2]
        words = as_words({**track["flags"], "optim": row, "seed": seed, "wandb": "disabled", "eval_every": 4})
        if row == "galore_adamw":
            words += ["--rank", "4"]
        done = python(COMMAND_LINE, *words, *more, "--output", str(folder / "runs" / f"{name}-seed{seed}"))
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def board(made: Path, tmp_path: Path) -> Path:
    """A copy of those, in which entries can be made."""
    return Path(shutil.copytree(made, tmp_path / "board"))


def add(board: Path, *names: str, more: tuple[str | Path, ...] = ()) -> Result:
    runs = [board / "runs" / name for name in names]
    return leaderboard("add", *runs, "--track", board / "boards" / "tiny", *more)


SEEDS_OF_ADAMW = ("adamw-seed1", "adamw-seed2", "adamw-seed3")


def test_an_entry_holds_what_repeats_its_runs(board: Path) -> None:
    tuning = {"seed": 0, "losses": {"adamw": {"0.3": 7.0123456789, "1": 6.5, "3": math.nan}}, "chosen": {"adamw": 1}}
    (board / "tuning.json").write_text(json.dumps(tuning))
    result = add(board, *SEEDS_OF_ADAMW, more=("--tuning", board / "tuning.json"))
    assert result.return_value == 0, result.exception
    entry = Entry.read(board / "boards" / "tiny" / "adamw")
    assert (entry.name, entry.optim, entry.method_file) == ("adamw", "adamw", None)
    assert entry.is_complete
    assert entry.tuning == {"seed": 0, "losses": {"0.3": 7.012346, "1": 6.5, "3": None}}
    assert entry.flags["lr"] == 0.001  # of the recipe, which may change
    assert not {"seed", "optim", "steps", "output", "batch_size", "wandb"} & entry.flags.keys()
    run = entry.runs[0]
    metrics = [json.loads(line) for line in (board / "runs" / "adamw-seed1" / "metrics.jsonl").read_text().splitlines()]
    assert run.first_losses == pytest.approx([line["loss"] for line in metrics], abs=1e-6)
    assert list(run.evaluations) == ["4", "8"]
    assert run.evaluations["8"] == run.loss == pytest.approx(metrics[-1]["eval_loss"], abs=1e-6)
    assert len(entry.made_with["commit"] or "") in (0, 40)

    # The command of an entry resolves to the very config of its run.
    words = as_words(entry.run_flags(1))
    with RunCommand("train", params=flags()).make_context("train", words) as context:
        config, _ = resolved(context, context.params)
    saved = json.loads((board / "runs" / "adamw-seed1" / "config.json").read_text())["config"]
    assert config.differences({name: value["value"] for name, value in saved.items()}) == []
    assert "is there already" in str(add(board, *SEEDS_OF_ADAMW).exception)


def test_runs_that_make_no_entry_are_refused(board: Path, tiny_config: str) -> None:
    track = board / "boards" / "tiny"
    assert "are of several methods" in str(add(board, "adamw-seed1", "scale-seed1", more=("--name", "x")).exception)
    shutil.copytree(board / "runs" / "adamw-seed1", board / "runs" / "short")
    config = board / "runs" / "short" / "config.json"
    text = config.read_text()
    values = json.loads(text)

    def changed(name: str, value: object) -> str:
        values["config"][name]["value"] = value
        config.write_text(json.dumps(values))
        told = str(add(board, "short", more=("--name", "x")).exception)
        values.update(json.loads(text))
        return told

    assert "has --max-length 16, and tiny has 32: no run of it" in changed("max_length", 16)
    assert "has --seed 7; the seeds of the track are 1, 2, 3" in changed("seed", 7)
    config.write_text(text)
    (board / "runs" / "short" / "summary.json").unlink()
    assert "has not come to its end" in str(add(board, "short", more=("--name", "x")).exception)
    assert not (track / "x").exists()
    assert "no track; name a folder with a track.json" in refusal("add", board / "runs", "--track", board)
    assert "no entry; name a folder with an entry.json" in refusal("verify", board)
    assert "no leaderboard" in refusal("table", board / "runs")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"output": "x"}, "'output' is no flag that changes what a run computes"),
        ({"allow_code": True}, "'allow_code' is no flag that changes what a run computes"),
        ({"resume": "/tmp/x"}, "'resume' is no flag that changes what a run computes"),
        ({"data": "x"}, "'data' is not said there"),
        ({"seed": 3}, "'seed' is not said there"),
        ({"nothing": 3}, "'nothing' is no flag"),
        ({"text_key": "x"}, "'text_key' is not said there"),  # of what is read, whether the track says it or not
        ({"eval_data": "x"}, "'eval_data' is not said there"),
        ({"weight_decay": True}, "'weight_decay' cannot be True"),  # a bare flag would take the next word
        ({"optim_option": "--optim=evil.py:Evil"}, "cannot be '--optim=evil.py:Evil'"),
        ({"optim_option": ["beta=1", "--output=x"]}, "'optim_option' cannot be"),
        ({"scheduler": "co\x1b[2Jsine"}, "'scheduler' cannot be"),
        ({"lr": {"a": 1}}, "'lr' cannot be"),
        ({"lr": math.nan}, "'lr' cannot be nan"),
    ],
)
def test_an_entry_from_elsewhere_says_nothing_but_its_method(board: Path, change: dict[str, Any], why: str) -> None:
    add(board, *SEEDS_OF_ADAMW)
    file = board / "boards" / "tiny" / "adamw" / "entry.json"
    values = json.loads(file.read_text())
    values["flags"] |= change
    file.write_text(json.dumps(values))
    assert why in refusal("verify", file.parent)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"runs": []}, "no runs"),
        ({"runs": 3}, "no runs"),
        ({"runs": [{"seed": 1}]}, "a run is not as"),
        ({"optim": 5}, "optim 5 is no shipped method"),
        ({"optim": "evil"}, "optim 'evil' is no shipped method"),
        ({"optim": "a.py:b.py:X"}, "optim 'a.py:b.py:X' is no shipped method"),
        ({"optim": "../a.py:X"}, "optim '../a.py:X' is no shipped method"),
        ({"optim": "package.module:X"}, "optim 'package.module:X' is no shipped method"),
        ({"flags": ["lr"]}, "and no object"),
        ({"tuning": {"seed": 0, "losses": {"1": None}}}, "its tuning is not as"),
        ({"tuning": {"seed": 0, "losses": {"one": 3.0}}}, "its tuning is not as"),
        ({"tuning": 3}, "its tuning is not as"),
    ],
)
def test_a_damaged_entry_is_told_in_a_line(board: Path, change: dict[str, Any], why: str) -> None:
    add(board, *SEEDS_OF_ADAMW)
    file = board / "boards" / "tiny" / "adamw" / "entry.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | change))
    assert why in refusal("verify", file.parent, "--yes")
    assert why in refusal("table", board / "boards")


@pytest.mark.parametrize("change", [{"loss": "x"}, {"first_losses": [1.0]}, {"seed": 9}, {"tokens": None}])
def test_a_damaged_run_of_an_entry_is_told_in_a_line(board: Path, change: dict[str, Any]) -> None:
    add(board, *SEEDS_OF_ADAMW)
    file = board / "boards" / "tiny" / "adamw" / "entry.json"
    whole = json.loads(file.read_text())
    whole["runs"][1] |= change
    file.write_text(json.dumps(whole))
    assert "needs finite numbers, the losses of its first 8 updates" in refusal("verify", file.parent)
    whole["runs"][1] = whole["runs"][0]
    file.write_text(json.dumps(whole))
    assert "two runs are of one seed" in refusal("verify", file.parent)


def test_a_file_is_executed_only_where_that_is_said(board: Path) -> None:
    assert add(board, "Lion-seed1").return_value == 0
    folder = board / "boards" / "tiny" / "Lion"
    entry = Entry.read(folder)
    assert entry.optim == "lion.py:Lion"
    assert (folder / "lion.py").read_text() == LION
    told = refusal("verify", folder)
    assert f"galore-pretrain leaderboard verify {folder} --yes" in told
    values = json.loads((folder / "entry.json").read_text())
    (folder / "entry.json").write_text(json.dumps(values | {"optim": f"{board}/lion.py:Lion"}))
    assert "no FILE.py:NAME in the entry's folder" in refusal("verify", folder, "--yes")
    (folder / "entry.json").write_text(json.dumps(values))
    (folder / "lion.py").write_text(LION + "\n# changed\n")
    assert "its SHA-256 is another" in refusal("verify", folder, "--yes")
    shutil.rmtree(folder)
    (board / "lion.py").write_text(LION + "\n# changed\n")
    config = board / "runs" / "Lion-seed1" / "config.json"
    values = json.loads(config.read_text())
    values["config"]["optim"]["value"] = f"{board / 'lion.py'}:Lion"
    config.write_text(json.dumps(values))
    assert "has changed since" in str(add(board, "Lion-seed1").exception)
    assert not folder.exists()


def test_an_entry_is_repeated(board: Path) -> None:
    add(board, "Lion-seed1")
    folder = board / "boards" / "tiny" / "Lion"
    result = leaderboard("verify", folder, "--yes")
    assert result.return_value == 0, (result.output, result.exception)
    executed, updates, seed = result.output.splitlines()[-3:]
    assert executed == f"executes {folder / 'lion.py'}"
    assert updates.startswith("updates 1 to 8: repeated; losses differ by up to ")
    assert seed.startswith("seed 1: repeated; validation loss ")


def test_an_entry_that_is_not_repeated_is_told(board: Path) -> None:
    add(board, *SEEDS_OF_ADAMW)
    folder = board / "boards" / "tiny" / "adamw"
    values = json.loads((folder / "entry.json").read_text())
    values["runs"][0]["first_losses"][5] += 0.002
    (folder / "entry.json").write_text(json.dumps(values))
    result = leaderboard("verify", folder)
    assert result.return_value == 1, (result.output, result.exception)
    assert "executes no file" in result.output
    assert "updates 1 to 8: not repeated from update 6 on; losses differ by up to 2.0e-03" in result.output
    assert "seed 1:" not in result.output


def test_the_page_ranks_and_compares(board: Path) -> None:
    assert add(board, *SEEDS_OF_ADAMW, "scale-seed1", "frozen-seed1").return_value == 0
    assert add(board, "galore_adamw-seed1", "galore_adamw-seed2", "galore_adamw-seed3").return_value == 0
    result = leaderboard("table", board / "boards", "--output", board / "page.md")
    assert result.return_value == 0
    text = (board / "page.md").read_text()
    assert text == page(board / "boards")
    ranked, others = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert ranked[0] == (
        "| rank | entry | perplexity | against adamw | against galore_adamw | of frozen's | bits per byte | state |"
    )
    assert [line.split("|")[2].strip().partition("]")[0] for line in ranked[2:]] in (
        ["[adamw", "[galore_adamw"],
        ["[galore_adamw", "[adamw"],
    )
    assert others[0].startswith("| entry | perplexity |")
    assert others[0].endswith("| seeds |")
    assert len(others) == 2 + 2
    track = Track.read(board / "boards" / "tiny")
    adamw, frozen = (Entry.read(track.folder / name, track) for name in ("adamw", "frozen"))
    mean = sum(adamw.losses.values()) / 3
    (line,) = [line for line in ranked if "[adamw]" in line]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[2] == f"{math.exp(mean):.2f}"
    assert cells[3] == "–"
    assert "±" in cells[4]
    assert cells[5] == f"{math.exp(mean - frozen.losses[1]):.2f}"
    assert float(cells[6]) == pytest.approx(mean * adamw.runs[0].tokens / math.log(2) / 1000, abs=1e-4)
    assert f"    {adamw.command()}" in text.splitlines()


def test_the_page_of_this_repository_is_made_from_its_entries() -> None:
    assert (REPOSITORY / "docs" / "leaderboard.md").read_text() == page(REPOSITORY / "leaderboard")


def entries_of_the_repository() -> list[Path]:
    return [file.parent for file in sorted((REPOSITORY / "leaderboard").glob("*/*/entry.json"))]


@pytest.mark.parametrize(
    "folder", entries_of_the_repository(), ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
def test_an_entry_of_this_repository_can_be_run(folder: Path) -> None:
    entry = Entry.read(folder)
    entry.check_method()
    for run in entry.runs:
        words = as_words(entry.run_flags(run.seed))
        with RunCommand("train", params=flags()).make_context("train", words) as context:
            config, _ = resolved(context, context.params)
        assert config.seed == run.seed
        assert config.lr == entry.flags["lr"]
    assert entry.made_with["changed"] is False  # of a commit that others can check out
