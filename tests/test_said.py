"""What is said in other words is the same run: defaults, paths, ``~``; and what names no run is refused."""

import json
import os
import shlex
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from galore_pretrain.cli import cli
from galore_pretrain.config.flags import RunCommand, flags, resolved, with_run_options
from galore_pretrain.config.options import FLAGS, RunConfig, parse_place
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError, did_you_mean
from galore_pretrain.optim import METHODS, NUMERICS, build_rules, method
from galore_pretrain.rundir.resume import resolve_resume
from galore_pretrain.study.sweep import Planned
from galore_pretrain.text.sources import open_source
from galore_pretrain.text.tokenizer import load_tokenizer

SHORT = {"model": "llama_1m", "data": "sample", "steps": 10, "total_batch_size": 4, "rank": 4, "lr": 0.01}


def config_of(name: str, with_numerics: str, **more: Any) -> RunConfig:
    given = SHORT | {"optim": name, "numerics": with_numerics} | more
    if "rank" not in METHODS[name].options:
        del given["rank"]
    return resolve(given, {})[0]


def saved(config: RunConfig) -> dict[str, Any]:
    """The config as a checkpoint gives it back."""
    values: dict[str, Any] = json.loads(json.dumps(config.values()))
    return values


def value_in(rule: Any, name: str) -> Any:
    """The field of a rule, or of one inside of it."""
    for field in fields(rule):
        value = getattr(rule, field.name)
        if field.name == name:
            return value
        if is_dataclass(value):
            inside = value_in(value, name)
            if inside is not None:
                return inside
    return None


# -- defaults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("name", METHODS)
def test_a_default_that_is_said_is_no_change(name: str, numerics: str) -> None:
    holds_codes = any("weights" in recipe.values for recipe in METHODS[name].recipes)
    if holds_codes and numerics == "reference":
        with pytest.raises(InputError, match="--weights int8: --numerics reference rounds to nearest"):
            config_of(name, numerics)
        return
    plain = config_of(name, numerics)
    for flag, value in plain.values().items():
        given = value is not None and flag != "max_tokens"
        if given and not (flag == "clip_norm" and not plain.grad_clip):
            assert config_of(name, numerics, **{flag: value}).differences(saved(plain)) == [], flag
    updater = method(name).updater
    rule, _ = build_rules(updater, numerics)
    for flag in {"betas", "eps"} & {*METHODS[updater].options}:
        default = value_in(rule, flag)
        if default is None:  # SGD and Adafactor have no first moment of their own
            continue
        said = config_of(name, numerics, **{flag: default})
        assert said.differences(saved(plain)) == []
        assert plain.differences(saved(said)) == []
        other = config_of(name, numerics, **{flag: (0.5, 0.6) if flag == "betas" else 0.1})
        assert len(other.differences(saved(plain))) == 1
        assert len(other.differences(saved(said))) == 1
        assert len(plain.differences(saved(other))) == 1


def test_a_first_moment_is_a_change_where_there_was_none() -> None:
    assert (
        len(config_of("adafactor", "sound", betas=(0.0, 0.9)).differences(saved(config_of("adafactor", "sound")))) == 1
    )
    sgd = saved(config_of("sgd", "sound"))
    assert len(config_of("sgd", "sound", betas=(0.9, 0.9)).differences(sgd)) == 1


def test_a_run_goes_on_with_its_defaults_said(finished: Path) -> None:
    values = json.loads((finished / "config.json").read_text())["config"]
    config = RunConfig.of({name: entry["value"] for name, entry in values.items()})
    config = replace(config, betas=(0.9, 0.999), eps=1e-8, model=os.path.relpath(config.model))
    checkpoint = resolve_resume(config, finished).saved
    assert checkpoint is not None
    with pytest.raises(InputError, match=r"--betas 0\.8,0\.999 \(was None\)"):
        resolve_resume(replace(config, betas=(0.8, 0.999)), finished)


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["data", "eval_data", "tokenizer", "model"])
def test_a_path_is_the_same_in_every_spelling(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("inner").mkdir()
    for file in ("a", "b", "sample"):
        Path(file).write_text("{}")
    Path("link").symlink_to("a")
    config = replace(config_of("adamw", "sound"), **{flag: "a"})
    for same in (str(tmp_path / "a"), "./a", "inner/../a", "link"):
        assert config.differences(saved(replace(config, **{flag: same}))) == []
        assert replace(config, **{flag: same}).differences(saved(config)) == []
    assert config.differences(saved(replace(config, **{flag: "b"}))) == [f"--{flag.replace('_', '-')} a (was b)"]
    if flag in ("data", "tokenizer"):
        shipped = saved(replace(config, **{flag: "sample"}))
        assert len(replace(config, **{flag: "./sample"}).differences(shipped)) == 1


def test_another_key_of_the_text_is_a_change_where_there_was_no_flag_for_it() -> None:
    config = replace(config_of("adamw", "sound"), text_key="body")
    before = saved(config)
    del before["text_key"]
    assert config.differences(before) == ["--text-key body (was text)"]
    assert replace(config, text_key="text").differences(before) == []


def test_several_texts_are_shown_as_they_are_typed() -> None:
    config = replace(config_of("adamw", "sound"), data=("a", "b"))
    assert config.differences(saved(replace(config, data=("b", "c")))) == ["--data a --data b (was b --data c)"]
    assert config.differences(saved(replace(config, data="a"))) == ["--data a --data b (was a)"]


def test_a_models_folder_is_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = replace(config_of("adamw", "sound"), model=str(tmp_path / "config.json"))
    assert config.differences(saved(replace(config, model=str(tmp_path)))) == []


def of_command(*words: str) -> RunConfig:
    command = with_run_options(RunCommand("train", params=flags()))
    with command.make_context("train", [*words]) as context:
        return resolved(context, {k: v for k, v in context.params.items() if k != "debug"})[0]


# A method's file is executed: that "~" is a home folder in its name too, test_own_methods.py holds.
@pytest.mark.parametrize("flag", [n for n, flag in FLAGS.items() if flag.kind is parse_place and n != "optim"])
def test_a_tilde_is_the_home_folder(
    flag: str, tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile(tiny_config, tmp_path / "tiny.json")
    (tmp_path / "given").mkdir()
    shutil.copyfile(tiny_config, tmp_path / "given" / "config.json")
    place = "given" if flag == "init" else "tiny.json"
    base = {"model": tiny_config, "data": "sample", "tokenizer": "sample", "steps": 2}
    (tmp_path / "run.json").write_text(json.dumps(base | {flag: f"~/{place}"}))
    assert getattr(of_command("--config", str(tmp_path / "run.json")), flag) == str(tmp_path / place)
    words = [f"--{name}={value}" for name, value in base.items() if name != flag]
    assert getattr(of_command(*words, f"--{flag.replace('_', '-')}=~/{place}"), flag) == str(tmp_path / place)
    assert parse_place("a~/b") == "a~/b"


@pytest.mark.parametrize("value", [["a", None], [None], [["a"]], [1], 5])
def test_a_text_in_a_run_json_is_a_name_or_several(value: Any, tiny_config: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"model": tiny_config, "steps": 2, "data": value}))
    with pytest.raises(InputError, match=r"data is .*, which --data cannot be"):
        of_command("--config", str(tmp_path / "run.json"))


# -- commands ---------------------------------------------------------------------------------------------------------


@given(st.text(min_size=1), st.text(min_size=1), st.floats(1e-6, 1))
def test_a_planned_command_can_be_pasted(folder: str, data: str, lr: float) -> None:
    run = Planned(Path(folder), {"data": data, "lr": lr, "layerwise": True, "compile": False, "betas": (0.9, 0.99)})
    assert shlex.split(run.command()) == ["galore-pretrain", *run.arguments()]


# -- a folder with weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "m.gguf"])
@pytest.mark.parametrize("command", [[], ["plan"], ["sweep", "table2"]])
def test_a_folder_with_weights_is_no_architecture(
    command: list[str], file: str, tiny_config: str, tmp_path: Path
) -> None:
    """A run would begin with new weights, and not with those in the folder."""
    folder = tmp_path / "trained"
    folder.mkdir()
    shutil.copyfile(tiny_config, folder / "config.json")
    given = SHORT | {"model": str(folder)}
    assert resolve(given, {})[0].model == str(folder)
    (folder / "training_args.bin").touch()  # a trainer's flags
    assert resolve(given, {})[0].model == str(folder)
    (folder / file).touch()
    words = [*command, "--model", str(folder), "--data", "sample", "--steps", "2", "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match=f"{file}.*name {folder / 'config.json'} to train its architecture") as error:
        CliRunner().invoke(cli, words, standalone_mode=False, catch_exceptions=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert resolve(given | {"model": str(folder / "config.json")}, {})[0].model == str(folder / "config.json")


@pytest.mark.parametrize(
    "written", ["there/text.jsonl", "their", "there/txt/a.jsonl", "there/mine.jsn", "thre/a.jsonl"]
)
@pytest.mark.parametrize("flag", ["--data", "--eval-data", "--tokenizer", "--model"])
def test_a_path_that_is_not_there_is_told_with_its_neighbours(
    flag: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared is the first part of the path that is missing."""
    monkeypatch.chdir(tmp_path)
    for name in ("text", "texts.jsonl", "mine.json", "other.csv"):
        path = tmp_path / "there" / name
        path.mkdir(parents=True) if name == "text" else path.write_text('{"text": "a"}')
    values = {"model": "llama_1m", "data": "sample", "tokenizer": "sample"}
    values[flag[2:].replace("-", "_")] = written
    meant = {"there/text.jsonl": "there/texts.jsonl", "their": "there", "there/txt/a.jsonl": "there/text"}
    meant |= {"there/mine.jsn": "there/mine.json", "thre/a.jsonl": "there"}

    def read() -> None:
        config, _ = resolve({"steps": 4, "lr": 0.01, **values}, {})
        open_source(config.data, "validation", config.eval_data)
        load_tokenizer(config.tokenizer)

    with pytest.raises(InputError, match=f"{flag}:? {written}.*; did you mean .*{meant[written]}[ ?]") as error:
        read()
    assert "other" not in str(error.value)


def test_nothing_is_proposed_where_nothing_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in ("", "x", "/nowhere/at/all", "a" * 5000, "a\0b", "no/way/to/that"):
        assert did_you_mean(value, ("c4", "sample")) == ""
    assert did_you_mean("smaple", ("c4", "sample")) == "did you mean sample? "
