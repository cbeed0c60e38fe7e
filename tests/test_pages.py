"""The pages: every command that they show is taken by the program that it names, links lead somewhere, Python runs.

A command is followed up to the point where its work would begin, by the real command line: a flag that is renamed, or
a value that is no longer taken, fails here. What cannot be followed is in `NOT_CHECKED`, with the reason.
"""

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import dropwhile, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import click
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.distributed.run import get_args_parser

import pages
from conftest import TINY
from galore_pretrain import build_model, load_model_config
from galore_pretrain import cli as program
from galore_pretrain.cli import cli
from galore_pretrain.config.options import RunConfig, shipped_models
from galore_pretrain.config.recipes import recipe
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.optim import METHODS, GaLoreAdamW, build_optimizer
from galore_pretrain.pytest_plug import pytest_addoption
from galore_pretrain.study.results import SETTING
from pages import PAGES, ROOT, Command
from runs import COMMAND_LINE, lines, python

NOT_CHECKED = {
    "pip install 'lm_eval[hf]'": "another project's package, which no test needs",
    "lm_eval --model hf": "that package, whose tasks are downloaded",
}
"""How commands begin that are neither run nor checked, and why they cannot be."""
AT_MOST = 10
LINKED = [*PAGES, ROOT / "CHANGELOG.md"]
COMMANDS = [command for page in PAGES for command in pages.commands(page)]
PLACEHOLDERS = {
    "CORPUS": "corpus.jsonl",
    "T5": "t5.model",
    "TOKENIZER": "t5.model",
    "FOLDER": "path/to/model",
    "FILE": "tests/test_pages.py",
    "MODEL": "runs/A",
    "FILE.json": "sign.json",
    "FILE.py:NAME": "mine.py:SignMomentum",
    "my_rule.py:MyRule": "mine.py:SignMomentum",
    "CARD": "4090",
    "ROW": "adamw",
    "OPTIM": "adamw",
    "DOCUMENTS": "joined",
    "MATMUL": "int8",
    "LENGTH": "1024",
    "SEED": "1",
    "LR": "0.01",
    "BEST": "0.3",
    "N": "2",
    "W": "2",
}
"""What a page leaves to its reader, and a value of that kind."""
ELLIPSIS = "…"


class ReachedError(Exception):
    """Raised where a command's work would begin."""


def reached(*given: Any, **more: Any) -> NoReturn:
    raise ReachedError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the files that the pages name. Models and texts are small, their names the pages'."""
    home = tmp_path_factory.mktemp("home")
    for name in ("configs", "constraints.txt", "docs", "leaderboard", "scripts", "tests", "Makefile", "pyproject.toml"):
        (home / name).symlink_to(ROOT / name)
    for folder in (
        "path/to/model",
        "path/to/Llama-3.2-1B",
        "model",
        "with-template",
        "glue/cola",
        "mytext",
        "web",
        "src",
    ):
        (home / folder).mkdir(parents=True)
    architecture = json.dumps(TINY | {"model_type": "llama", "max_position_embeddings": 4096})
    for folder in ("path/to/model", "path/to/Llama-3.2-1B", "model", "with-template"):
        (home / folder / "config.json").write_text(architecture)
    (home / "encoder").mkdir()
    encoder = {"model_type": "roberta", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    (home / "encoder" / "config.json").write_text(json.dumps(encoder))
    line = json.dumps({"text": "Fellow citizens", "body": "Fellow citizens"})
    for name in ("corpus", "news", "books", "capitals", "a", "web/train", "web/valid", "mytext/a"):
        (home / f"{name}.jsonl").write_text(f"{line}\n")
    (home / "b.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "?"}]}))
    (home / "src" / "a.txt").write_text("Fellow citizens\n")
    (home / "a.csv").write_text("body\nFellow citizens\n")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["Fellow citizens"]}), home / "a.pq")
    (home / "sign.json").write_text('{"runs": {"sign": {}}}')
    sample = ROOT / "galore_pretrain" / "tokenizers" / "sample.model"
    for name in ("t5.model", "spiece.model"):
        shutil.copyfile(sample, home / name)
    checkpoint = home / "runs" / "first" / "checkpoints" / "step_00000100"
    checkpoint.mkdir(parents=True)
    state = {"config": {"bos": "no"}, "inputs": {"model": architecture}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    own = [pages.code("README.md", "python")[0], pages.code("docs/adding-a-method.md", "python")[0]]
    (home / "mine.py").write_text("\n".join(own))
    (home / "runs" / "demo").mkdir()
    demo = {"model": "llama_1m", "data": "sample", "dtype": "float32", "steps": 600, "eval_tokens": 50_000}
    config, origins = resolve(demo, dict.fromkeys(demo, "flag"))
    entries = {name: {"value": value, "origin": origins[name]} for name, value in config.values().items()}
    (home / "runs" / "demo" / "config.json").write_text(json.dumps({"config": entries}))
    (home / "small.json").write_text(pages.code("docs/models.md", "json")[0])
    return home


def config_of(home: Path, name: str) -> Path:
    """The config that a repository of the hub might have."""
    folder = "encoder" if "roberta" in name else "path/to/model"
    return home / folder / "config.json"


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work begins nowhere: each place where it would raises ReachedError. The hub is not asked."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(program, "check_hub", lambda *given, **more: None)
    monkeypatch.setattr("galore_pretrain.config.options.download_model", lambda name, *given: config_of(home, name))
    for name in ("_run", "_plan_row"):
        monkeypatch.setattr(program, name, reached)
    work = (
        "check.runner.settings_for",
        "optim.check.check_methods",
        "rundir.loaded.load",
        "study.leaderboard.Entry.read",
        "study.paper.report",
        "study.results.find",
        "study.standings.page",
        "study.watch.check_paths",
    )
    for place in work:
        monkeypatch.setattr(f"galore_pretrain.{place}", reached)

    def each_row(flags_of_rows: Any, config_of: Any, *more: Any) -> NoReturn:
        for flags in flags_of_rows:
            with suppress(InputError):  # a method that cannot be planned so
                config_of(flags)
        raise ReachedError

    monkeypatch.setattr("galore_pretrain.study.cards.rows_that_fit", each_row)
    return home


def filled(words: Sequence[str]) -> list[str]:
    """What a reader might have put in the place of what a page leaves open."""
    given: list[str] = []
    for word in words:
        if word != ELLIPSIS:
            given.append(PLACEHOLDERS.get(word, word))
        elif given and given[-1] == "--model":
            given += ["llama_1m", "--data", "sample"]
    return given


def follow(words: Sequence[str]) -> None:
    """Give ``words`` to the command line, up to where its work would begin. A sweep resolves each of its runs."""
    given = filled(words)
    if given[:1] == ["sweep"]:
        given.append("--plan-only")
    try:
        cli.main(given, standalone_mode=False)
    except ReachedError:
        return
    assert {"--help", "--plan-only"} & set(given), "it ended without an error, and where its work begins is not known"


def check_ours(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow the command line; a subcommand alone is a name, as a text mentions it."""
    is_name = len(words) == 1 and words[0] in cli.commands
    if not is_name:
        follow(words)


def check_torchrun(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's own parser takes its part, and the command line the rest."""
    launched = get_args_parser().parse_args(list(words))
    if launched.module:
        assert launched.training_script == "galore_pretrain"
        follow(launched.training_script_args)
    else:
        assert (ROOT / launched.training_script).is_file()


def check_slurm(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job is given is a script of ours, and what the command line takes."""
    rest = list(dropwhile(lambda word: not word.startswith(pages.SCRIPTS), words))
    check_launcher(rest, monkeypatch)


def check_launcher(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is there, and passes on what the command line takes."""
    assert (ROOT / words[0]).is_file()
    follow(words[1:])


def check_script(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own parser takes the words. One that has no parser takes none."""
    path, *given = filled(words)
    script = ROOT / path
    assert script.is_file()
    if "argparse" not in script.read_text():
        assert not [word for word in given if word.startswith("-")]
        return
    for name in ("parse_known_args", "parse_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def parsed(*given: Any, parse: Any = parse) -> NoReturn:
            parse(*given)
            raise ReachedError

        monkeypatch.setattr(argparse.ArgumentParser, name, parsed)
    monkeypatch.setattr(sys, "argv", [str(script), *given])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(ReachedError):
        runpy.run_path(str(script), run_name="__main__")


def check_make(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is one, and what it would do with these variables is a command that its script takes."""
    dry = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    for line in dry.stdout.replace("\\\n", " ").splitlines():
        recipe = shlex.split(line)
        if len(recipe) > 1 and recipe[0].endswith("/python") and recipe[1].startswith(pages.SCRIPTS):
            check_script(recipe[1:], monkeypatch)


def check_pip(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed is this project, with extras that it has, and files that are there. Or it is listed."""
    if words == ["list"]:
        return
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if list(words) == ["list"]:
        return
    assert words[0] == "install"
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    named = re.fullmatch(r"\.\[([\w,]+)\]", words[-1])
    assert named is not None
    assert set(named[1].split(",")) <= extras.keys()


class PlugsParser(argparse.ArgumentParser):
    """Takes the option that the package's plug adds to pytest's own."""

    addoption = argparse.ArgumentParser.add_argument

    def getgroup(self, name: str) -> "PlugsParser":
        return self


def check_pytest(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests are there; of the package's own checks, so is the option that its plug adds."""
    if words[0] != "--pyargs":
        files = takewhile(lambda word: not word.startswith("-"), filled(words))
        assert all((ROOT / file).exists() for file in files)
        return
    parser = PlugsParser(exit_on_error=False)
    parser.add_argument("--pyargs")
    config = SimpleNamespace(invocation_params=SimpleNamespace(args=words))
    pytest_addoption(parser, SimpleNamespace(get_plugin=lambda name: config))
    checks = parser.parse_args(words).pyargs
    assert find_spec(checks) is not None


def check_activation(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sourced is the environment that make makes."""
    assert list(words) == [".venv/bin/activate"]
    assert "VENV ?= .venv\n" in (ROOT / "Makefile").read_text()


CHECKS: dict[str, Callable[[Sequence[str], pytest.MonkeyPatch], None]] = {
    "galore-pretrain": check_ours,
    "torchrun": check_torchrun,
    "sbatch": check_slurm,
    "python": check_script,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    ".": check_activation,
}
"""How the words behind a program are checked. What changes texts (jq, sed, echo, python -c) is run."""


def run_in_a_shell(command: Command) -> None:
    """Run a command, with the files of `home`, where its program is there."""
    if shutil.which(command.program) is None:
        pytest.skip(f"{command.program} is not installed")
    text = command.text.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    subprocess.run(["bash", "-c", text], check=True, capture_output=True)


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow a command, by what it begins with."""
    program, *words = command.words
    if program in pages.RUN or words[:1] == ["-c"]:
        run_in_a_shell(command)
    elif program.startswith(pages.SCRIPTS):
        script = check_script if program.endswith(".py") else check_launcher
        script(command.words, monkeypatch)
    else:
        assert program in CHECKS, f"{program}: say in CHECKS how it is checked, or in NOT_CHECKED why it cannot be"
        CHECKS[program](words, monkeypatch)


def reason_of(command: Command) -> str | None:
    for begin, reason in NOT_CHECKED.items():
        if command.text.startswith(begin):
            return reason
    return None


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}:{command.line}")
def test_a_command_that_is_shown_is_taken(command: Command, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = reason_of(command)
    if reason is not None:
        pytest.skip(reason)
    try:
        check(command, monkeypatch)
    except (click.ClickException, InputError) as error:
        told = error.format_message() if isinstance(error, click.ClickException) else str(error)
        pytest.fail(f"{command}\n{told}")


def test_few_commands_are_neither_run_nor_checked() -> None:
    left_out = {command.text for command in COMMANDS if reason_of(command) is not None}
    assert len(left_out) <= AT_MOST, left_out
    for begin in NOT_CHECKED:
        assert any(text.startswith(begin) for text in left_out), f"{begin} is on no page"


def options(command: click.Command) -> Iterator[str]:
    """All options of a command and of those below it."""
    for parameter in command.params:
        yield from parameter.opts
        yield from parameter.secondary_opts
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from options(below)


def known_options() -> set[str]:
    """Options of the command line, of the scripts, of torchrun and of pytest's plug."""
    known = {*options(cli), "--help", "--method"}
    for action in get_args_parser()._actions:
        known |= set(action.option_strings)
    for script in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text()))
    return known


@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_flags_that_a_page_names_exist(page: Path) -> None:
    known = known_options()
    unknown = set()
    for line, span in pages.spans(page):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            if flag not in known:
                unknown.add(f"{line}: {flag}")
    assert not unknown


@pytest.mark.parametrize("page", LINKED, ids=pages.name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """A record's links are of its day: the file is there, whatever its headings are now."""
    for link in pages.links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor and page.name != "LOG.md":
            assert anchor in pages.anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_tables_fit_a_screen(page: Path) -> None:
    most = 9 if page.name == "gpu.md" else 8
    for table in pages.tables(pages.name_of(page)):
        for row in table:
            assert len(row) <= most, row


def test_the_index_has_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    named = {(index.parent / link.partition("#")[0]).resolve() for link in pages.links(index)}
    assert {page for page in PAGES if page.is_relative_to(index.parent)} - {index} <= named


# -- Python -----------------------------------------------------------------------------------------------------------


def test_all_python_is_tried() -> None:
    """A page with a new piece of Python wants a test of it: here, in test_own_methods, test_methods or test_trl."""
    pieces = {pages.name_of(page): len(pages.code(pages.name_of(page), "python")) for page in PAGES}
    tried = {"README.md": 1, "docs/adding-a-method.md": 2, "docs/finetuning.md": 1, "docs/python.md": 4}
    assert {name: count for name, count in pieces.items() if count} == tried


def test_the_readmes_own_method_trains(home: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: str) -> None:
    monkeypatch.chdir(home)
    lines = pages.code("README.md", "python")[0].splitlines()
    assert len([line for line in lines if line and not line.startswith("from")]) == 6
    model = build_model(load_model_config(tiny_config), dtype=torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, "mine.py:SignSGD", lr=0.01)
    tokens = torch.arange(32)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p, old - 0.01 * p.grad.sign())


def test_the_page_on_python_does_what_it_says(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pieces run as they stand, one after the other; what they load is a finished run."""
    train, in_place, load, _ = pages.code("docs/python.md", "python")
    names: dict[str, Any] = {}
    exec(train, names)
    first = names["loss"].item()
    exec(in_place, names)
    exec(train[train.index("for ") :], names)
    assert names["loss"].item() < first
    assert isinstance(names["optimizer"], GaLoreAdamW)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    exec(load, names)
    assert names["tokenizer"].decode(names["tokenizer"]("the")["input_ids"]) == "the"
    assert names["model"].config.hidden_size == TINY["hidden_size"]


def test_the_page_on_fine_tuning_makes_a_model_that_talks(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its Python and its two commands, of a smaller model that has seen less."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    exec(pages.code("docs/finetuning.md", "python")[0], {})
    tune, ask = [command.words[1:] for command in COMMANDS if "runs/capitals" in command.words]
    shorter = [*tune, "--max-length", "64", "--epochs", "1", "--rank", "8"]
    tuned = python(COMMAND_LINE, *shorter)
    assert tuned.returncode == 0, tuned.stderr
    losses = [line["eval_loss"] for line in lines(Path("runs/capitals")) if "eval_loss" in line]
    assert losses[-1] < losses[0] / 2
    answer = python(COMMAND_LINE, *ask, "--tokens", "4")
    assert answer.returncode == 0, answer.stderr


# -- what stands on two pages ----------------------------------------------------------------------------------


def test_the_readmes_methods_are_those_of_the_pages() -> None:
    """Its perplexities are the leaderboard's, its sizes moments and bases of the table of 7B; every method is named."""
    perplexity, size = {}, {}
    for row in pages.tables("docs/leaderboard.md")[0]:
        perplexity[row[1].split("]")[0][1:]] = row[2]
    for row in pages.tables("docs/memory.md")[2]:
        size[row[0].strip("`")] = sum(float(cell) for cell in row[2:4] if cell != "–")
    rows = [row for table in pages.tables("README.md") for row in table if len(row) == 5]
    named = set()
    for _, methods, _, of_7b, told in rows:
        names = re.findall(r"`(\w+)`", methods)
        named |= set(names)
        assert told == perplexity.get(names[0], ""), names
        assert of_7b == (f"{size[names[0]]:.2f}" if names[0] in size else ""), names
    both = {name for name in METHODS if not METHODS[name].factors_updated_by or not name.endswith("8bit")}
    assert named == both


def test_the_readmes_demo_is_what_make_demo_runs() -> None:
    demo = runpy.run_path(str(ROOT / "scripts" / "demo.py"))
    shown = [command.words[1:] for command in COMMANDS if command.page == "README.md" and "600" in command.words]
    assert shown == [tuple(demo["COMMAND"].split())]


def test_one_report_has_the_readmes_demo_and_its_own_method(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []

    def recorded(ctx: click.Context, config: RunConfig, origins: Any) -> NoReturn:
        configs.append(config)
        raise ReachedError

    monkeypatch.setattr(program, "_run", recorded)
    for command in COMMANDS:
        if command.page == "README.md" and command.words[-2:-1] == ("--output",):
            follow(command.words[1:])
    demo, mine = configs
    assert (demo.output, mine.output) == ("runs/demo", "runs/mine")
    for name in SETTING:
        assert getattr(demo, name) == getattr(mine, name), name


def test_the_readmes_cards_are_those_of_the_page_on_memory() -> None:
    in_readme = {row[0]: row for row in pages.tables("README.md")[0]}
    in_page = {row[0]: row for table in pages.tables("docs/memory.md") for row in table if row[0] in in_readme}
    assert len(in_readme) == len(in_page) == 4
    for card, (_, leaves, _, planned) in in_readme.items():
        assert leaves.split()[0] == in_page[card][1]
        assert re.match(r"[\d.]+", planned)[0] in " ".join(in_page[card])  # type: ignore[index]


def test_the_table_of_models_is_theirs() -> None:
    rows = pages.tables("docs/models.md")[0]
    assert {row[0].strip("`") for row in rows} == set(shipped_models())
    for name, millions, share, *shape, rank in rows:
        config = load_model_config(name.strip("`"))
        with torch.device("meta"):
            model = build_model(config, device="meta")
        matrices = sum(p.numel() for key, p in model.named_parameters() if "_proj" in key)
        weights = sum(p.numel() for p in model.parameters())
        assert millions == f"{weights / 1e6:,.1f}"
        assert share == f"{100 * matrices / weights:.0f}"
        sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
        assert shape == [str(size) for size in sizes]
        assert rank == str(recipe(name.strip("`"), "galore_adamw")["rank"][0])


def test_the_page_on_starting_names_what_a_run_writes(finished: Path) -> None:
    page = (ROOT / "docs" / "start.md").read_text()
    for line in (finished / "metrics.jsonl").read_text().splitlines():
        for key in json.loads(line):
            assert f"`{key}`" in page or key.startswith(("eval_", "subspace_overlap_")), key
    for place in finished.iterdir():
        assert f"  {place.name}" in page or place.name.startswith("."), place
