"""Several texts to evaluate: their names, their metrics, and that each is what it would be alone."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from galore_pretrain.cli import cli
from galore_pretrain.config.evaluated import EvalText, eval_texts, further_texts, parse_eval_text
from galore_pretrain.config.options import RunConfig, eval_text_seen_from
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.study.report import as_json, ranking
from galore_pretrain.study.results import compare, find
from galore_pretrain.text.sources import open_source
from runs import lines, run

NUMBERS = ("loss", "perplexity", "bits_per_byte", "tokens")


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents() -> Iterator[str]:
    source = open_source("sample", "train")
    for shard in range(len(source.shards)):
        for _, text in source.read(shard, 0):
            yield text


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {}),
        ("a.jsonl", {"a": "a.jsonl"}),
        (("x/wiki.v2.jsonl.gz", "books/"), {"wiki_v2": "x/wiki.v2.jsonl.gz", "books": "books/"}),
        (["lang=de/a.txt", "b-c=y/*.csv"], {"lang": "de/a.txt", "b-c": "y/*.csv"}),
        (("./lang=de/a.txt", "b.parquet"), {"a": "./lang=de/a.txt", "b": "b.parquet"}),
    ],
)
def test_a_text_has_a_name(given: Any, expected: dict[str, str]) -> None:
    assert eval_texts(given) == tuple(EvalText(name, path) for name, path in expected.items())


def test_a_path_that_is_there_is_one_whatever_signs_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was before texts had names."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "lang=de" / "valid.jsonl", "a")
    assert eval_texts("lang=de/valid.jsonl") == (EvalText("valid", "lang=de/valid.jsonl"),)
    assert eval_texts("lang=de/*.jsonl")[0].path == "lang=de/*.jsonl"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_eval_text("~/a") == f"{tmp_path}/a"
    assert parse_eval_text("web=~/a") == f"web={tmp_path}/a"
    monkeypatch.chdir("/")
    assert eval_text_seen_from(tmp_path, "lang=de/valid.jsonl") == str(tmp_path / "lang=de" / "valid.jsonl")
    assert eval_text_seen_from(tmp_path, "web=lang=de/valid.jsonl") == f"web={tmp_path}/lang=de/valid.jsonl"
    assert eval_text_seen_from(tmp_path, "web=nowhere") == "web=nowhere"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a/x.jsonl", "b/x.jsonl"), "two texts have the name x; write NAME=PATH with another for b/x.jsonl"),
        (("x=a", "b/x.jsonl"), "two texts have the name x"),
        (("a.jsonl", "*.jsonl"), r"gives its metrics no name; write NAME=\*\.jsonl"),
        (("a.jsonl", "reference=b.jsonl"), "reference is a name of other metrics"),
    ],
)
def test_a_name_is_of_one_text(given: Any, message: str, tiny_config: str) -> None:
    with pytest.raises(InputError, match=f"--eval-data.*{message}"):
        resolve({"model": tiny_config, "data": "sample", "steps": 2, "eval_data": given}, {})


def test_another_text_or_name_is_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: str) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"model": tiny_config, "data": "sample", "steps": 2, "eval_data": ("a.jsonl", "web=b.jsonl")}
    config, _ = resolve(values, {})
    before = json.loads(json.dumps(config.values()))
    for same in (("./a.jsonl", "web=b.jsonl"), ("a.jsonl", f"web={tmp_path}/b.jsonl")):
        assert replace(config, eval_data=same).differences(before) == []
    other = replace(config, eval_data=("a.jsonl", "net=b.jsonl"))
    assert other.differences(before) == [
        "--eval-data a.jsonl --eval-data net=b.jsonl (was a.jsonl --eval-data web=b.jsonl)"
    ]
    assert RunConfig.of(before).eval_texts == config.eval_texts


def test_the_names_are_known_by_the_keys() -> None:
    keys = ["eval_loss", "eval_perplexity", "eval_reference_perplexity", "eval_a_perplexity", "eval_b_c_perplexity"]
    assert further_texts([*keys, "eval_a_loss", "step"]) == ["a", "b_c"]


def test_all_of_them_are_left_out_of_training(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", name)
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    training = open_source(str(tmp_path), "train", paths)
    assert [text for _, text in training.read(0, 0)] == ["c"]
    assert len(training.shards) == 1
    with pytest.raises(InputError, match=r"--eval-data .*a\.jsonl --eval-data .*c\.jsonl: is all that"):
        open_source(str(tmp_path), "train", [*paths, str(tmp_path / "c.jsonl")])


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three texts."""
    folder = tmp_path_factory.mktemp("texts")
    read = documents()
    write(folder / "speeches.jsonl", *[next(read) for _ in range(20)])
    write(folder / "fox.jsonl", *[f"the quick brown fox number {n} jumps over the lazy dog" for n in range(50)])
    write(folder / "é.jsonl", *["日本 🙂 café " * 5] * 30)
    return folder


def flags_of(texts: Path) -> list[str]:
    words: list[str] = []
    for text in (texts / "speeches.jsonl", texts / "fox.jsonl", f"other={texts / 'é.jsonl'}"):
        words += ["--eval-data", str(text)]
    return words


@pytest.fixture(scope="module")
def several(texts: Path, tiny_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is evaluated on all three."""
    output = tmp_path_factory.mktemp("runs") / "several"
    done = run(tiny_config, output, *flags_of(texts))
    assert done.returncode == 0, done.stderr
    assert "; fox " in done.stderr
    return output


def summary(output: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return values


def evaluated(path: Path, *words: object) -> dict[str, Any]:
    arguments = ["eval", str(path), *map(str, words), "--json"]
    answer: dict[str, Any] = json.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)
    return answer


def test_the_first_text_has_the_keys_that_it_has_alone(
    several: Path, texts: Path, tiny_config: str, tmp_path: Path
) -> None:
    assert run(tiny_config, tmp_path / "one", "--eval-data", str(texts / "speeches.jsonl")).returncode == 0
    for alone, together in zip(lines(tmp_path / "one"), lines(several), strict=True):
        assert alone.items() <= together.items()
        further = {f"eval_{name}_{number}" for name in ("fox", "other") for number in NUMBERS}
        assert together.keys() - alone.keys() == (further if "eval_loss" in alone else set())
    assert lines(several)[-1].items() >= {(k, v) for k, v in summary(several).items() if k.startswith("eval_")}
    config = json.loads((several / "config.json").read_text())["config"]
    assert config["eval_data"]["value"] == flags_of(texts)[1::2]


def test_a_further_text_is_what_it_is_alone(several: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluated(several)
    assert whole.items() <= summary(several).items()
    for name, file in (("fox", "fox.jsonl"), ("other", "é.jsonl")):
        alone = evaluated(several, "--eval-data", texts / file)
        for number in NUMBERS:
            assert whole[f"eval_{name}_{number}"] == alone[f"eval_{number}"]
    monkeypatch.chdir(texts)
    two = evaluated(several, "--eval-data", "fox.jsonl", "--eval-data", "x=é.jsonl")
    assert two["eval_loss"] == whole["eval_fox_loss"]
    assert two["eval_x_bits_per_byte"] == whole["eval_other_bits_per_byte"]
    told = CliRunner().invoke(cli, ["eval", str(several)], catch_exceptions=False).stdout
    assert f"other, {whole['eval_other_tokens']:,} tokens: loss {whole['eval_other_loss']:.4f}" in told


def test_a_run_goes_on_with_all_its_texts(several: Path, texts: Path, tiny_config: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(several, output)
    shutil.rmtree(output / "checkpoints" / "step_00000012")
    (output / "summary.json").unlink()
    mine = tmp_path / "texts"
    shutil.copytree(texts, mine)
    write(mine / "fox.jsonl", "another fox")
    for words in (flags_of(texts)[:4], flags_of(mine)):  # paths of its own are another option
        done = run(tiny_config, output, *words)
        assert done.returncode == 2
        assert "--eval-data" in done.stderr
    state = output / "checkpoints" / "step_00000008" / "state.json"
    known = json.loads(state.read_text())["inputs"]
    assert {"validation text", "validation text fox", "validation text other"} <= known.keys()
    before = (texts / "fox.jsonl").read_text()
    write(texts / "fox.jsonl", "another fox")
    try:
        done = run(tiny_config, output, *flags_of(texts))
        assert done.returncode == 2
        assert "was made with another validation text fox than there is now" in done.stderr
    finally:
        (texts / "fox.jsonl").write_text(before)
    done = run(tiny_config, output, *flags_of(texts))
    assert done.returncode == 0, done.stderr
    assert lines(output) == lines(several)


def test_a_text_without_a_row_is_refused_by_its_name(texts: Path, tiny_config: str, tmp_path: Path) -> None:
    write(tmp_path / "empty.jsonl", " ")
    words = ("--eval-data", str(texts / "fox.jsonl"), "--eval-data", str(tmp_path / "empty.jsonl"))
    done = run(tiny_config, tmp_path / "run", *words)
    assert done.returncode == 2
    assert "--eval-data empty: no validation document in 1 files" in done.stderr


def test_a_report_has_a_column_for_each(several: Path) -> None:
    (comparison,) = compare(find([several]))
    table = ranking(comparison)
    line = dict(zip(table.columns, table.rows[0], strict=True))
    found = summary(several)
    assert line["fox perplexity"] == f"{found['eval_fox_perplexity']:.2f}"
    assert list(line).index("bits per byte") + 1 == list(line).index("fox perplexity")
    (method,) = as_json([comparison])[0]["methods"].values()
    for number in ("loss", "perplexity", "bits_per_byte"):
        assert method[f"eval_other_{number}"] == pytest.approx(found[f"eval_other_{number}"], rel=1e-9)


def test_a_run_json_names_them_in_a_list(texts: Path, tiny_config: str, tmp_path: Path) -> None:
    values = {"model": tiny_config, "data": "sample", "steps": 2, "eval_data": flags_of(texts)[1::2], "device": "cpu"}
    (tmp_path / "run.json").write_text(json.dumps(values))
    arguments = ["plan", "--config", str(tmp_path / "run.json"), "--json"]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
