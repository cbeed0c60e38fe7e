"""Reports of runs: finished, going and broken off; what is compared with what, and how far the spread goes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from galore_pretrain.cli import cli
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.study import paper
from galore_pretrain.study.report import as_json, differences, ranking, write
from galore_pretrain.study.results import compare, find, losses_by_seed, over_seeds, read, thinned
from galore_pretrain.study.seeds import Difference, paired, ranks


def make_run(folder: Path, loss: float, *, updates: int = 20, done: int = 20, **given: Any) -> Path:
    """A run whose last validation loss is ``loss``."""
    values = {"model": "llama_60m", "optim": "galore_adamw", "data": "sample", "steps": updates, "eval_every": 5}
    config, origins = resolve(values | given, {})
    folder.mkdir(parents=True)
    entries = {name: {"value": value, "origin": origins[name]} for name, value in config.values().items()}
    (folder / "config.json").write_text(json.dumps({"config": entries}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, done + 1):
            line = {"step": step, "loss": 8.0 - 3.0 * step / updates, "lr": 0.01, "tokens_seen": 1000 * step}
            line |= {"tokens_per_second": 500.0, "peak_memory_bytes": 2**30}
            if step % 5 == 0:
                now = loss + 0.1 * (updates - step)
                line |= {"eval_loss": now, "eval_perplexity": math.exp(now), "eval_tokens": 100}
                line["eval_reference_perplexity"] = math.exp(now - 0.1)
            file.write(json.dumps(line) + "\n")
    if done == updates:
        (folder / "summary.json").write_text(json.dumps({"weights_bytes": 10**8, "optimizer_bytes": 2 * 10**8}))
    return folder


def test_seeds_are_one_method_and_differences_are_paired(tmp_path: Path) -> None:
    for seed, shift in enumerate((0.0, 0.2, 0.5)):  # what a seed changes, it changes for both
        make_run(tmp_path / f"a{seed}", 3.00 + shift, seed=seed)
        make_run(tmp_path / f"b{seed}", 3.04 + shift + 0.01 * (seed - 1), seed=seed, optim="adamw")
    (comparison,) = compare(find([tmp_path]))
    assert list(comparison.methods) == ["galore_adamw", "adamw"]  # the best first
    table = ranking(comparison)
    line = dict(zip(table.columns, table.rows[0], strict=True))
    assert line["seeds"] == "3"
    assert line["validation loss"] == "3.2333 ± 0.2517"
    assert float(line["perplexity"]) == pytest.approx(math.exp(3.2333), rel=1e-3)
    assert float(line["reference perplexity"]) == pytest.approx(math.exp(3.1333), rel=1e-3)
    assert line["the paper's"] == "34.88"
    assert line["difference"] == f"{100 * (math.exp(3.23333) / 34.88 - 1):+.1f} %"
    assert line["weights + state, 10⁹ B"] == "0.3000"
    assert float(line["the paper's rule, G"]) == pytest.approx(0.24, abs=0.011)
    adamw, galore = (losses_by_seed(comparison.methods[name]) for name in ("adamw", "galore_adamw"))
    difference = paired(adamw, galore)
    assert difference is not None
    assert (round(difference.mean, 6), difference.pairs) == (0.04, 3)
    assert difference.error == pytest.approx(0.01 / math.sqrt(3))
    assert difference.half_width == pytest.approx(4.30 * 0.01 / math.sqrt(3))
    assert differences(comparison).rows == [["adamw", "+4.0 ± 2.5 % *"]]
    assert [row[0] for row in table.rows] == ["1", "2"]


@pytest.mark.parametrize(
    ("model", "row", "rank", "steps", "expected"),
    [
        ("llama_130m", "relora", 256, 20000, (29.37, "Table 2")),
        ("llama_130m", "relora", 128, 20000, None),
        ("llama_130m", "adamw", None, None, (25.08, "Table 2")),
        ("llama_1b", "adamw", None, 100000, (15.56, "Table 2")),
        ("llama_1b", "adamw", None, 10000, (22.73, "Figure 3")),
        ("llama_1b", "galore_adafactor", 1024, 10000, (20.31, "Figure 3")),
        ("llama_1b", "galore_adafactor", 1024, 100000, None),
        ("llama_1b", "galore_adamw", 256, 10000, None),
        ("llama_7b", "galore_adamw8bit", 1024, 80000, (15.39, "Table 3")),
        ("llama_7b", "adamw8bit", None, 150000, (14.61, "Table 3")),
        ("llama_7b", "adamw8bit", None, 100, None),
        ("llama_60m", "natural_galore", 128, 10000, (math.exp(3.53), "Natural GaLore's table")),
        ("llama_60m", "frozen", None, 10000, None),
        ("llama_1m", "adamw", None, 900, None),
    ],
)
def test_what_the_papers_print_of_a_run(model: str, row: str, rank: int | None, steps: int, expected: Any) -> None:
    cell = paper.cell(model, row, rank, steps)
    assert (cell is None) == (expected is None)
    if cell:
        assert cell.perplexity == expected[0]
        assert cell.source.startswith(expected[1])


def test_what_sets_runs_of_a_row_apart_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 3.0)
    make_run(tmp_path / "b", 3.1, seed=1)
    make_run(tmp_path / "c", 3.2, lr=0.005)
    make_run(tmp_path / "d", 3.3, optim="adamw", matrix_lr_scale=0.0)
    make_run(tmp_path / "e", 3.4, optim="adamw", layerwise=True, batch_size=4)  # which change no number
    make_run(tmp_path / "f", 3.5, optim="adamw", seed=2)
    (comparison,) = compare(find([tmp_path]))
    make_run(tmp_path / "g", 3.6, optim="adafactor", matrix_lr_scale=0.0)
    make_run(tmp_path / "h", 3.7, optim="adamw", seed=2)  # a repetition is not another seed
    comparison = compare(find([tmp_path]))[0]
    assert {label: len(runs) for label, runs in comparison.methods.items()} == {
        "galore_adamw": 2, "galore_adamw, lr 0.005": 1, "frozen": 1, "adamw": 2, "adafactor, frozen": 1, "adamw (h)": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "other", [{"model": "llama_130m"}, {"steps": 40}, {"layout": "pack"}, {"tokenizer": "t5"}, {"data": "c4"}]
)
def test_what_differs_is_not_ranked_together(tmp_path: Path, other: dict[str, Any]) -> None:
    make_run(tmp_path / "a", 3.0)
    make_run(tmp_path / "b", 3.1, **({"updates": other["steps"]} if "steps" in other else other))
    comparisons = compare(find([tmp_path]))
    assert len(comparisons) == 2
    text = write(comparisons, tmp_path / "report")
    assert "not to be compared" in " ".join(text.split())
    assert next(iter(other)) in text
    assert all(len(ranking(comparison).rows) == 1 for comparison in comparisons)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    sound, damaged = make_run(tmp_path / "sound", 3.0), make_run(tmp_path / "damaged", 3.1, optim="adamw")
    text = (damaged / "metrics.jsonl").read_text()
    (damaged / "metrics.jsonl").write_text("{" + text + '{"step": 13, "lo')
    (sound / "summary.json").write_text("{")
    report = write(compare(find([sound, damaged])), tmp_path / "report")
    assert f"Of {damaged}, 1 lines of metrics.jsonl cannot be read" in report
    assert f"Of {sound}, summary.json cannot be read" in report


def test_runs_that_are_not_over(tmp_path: Path) -> None:
    """A half-written line, a run still going, one without evaluation, one without config: none stops a report."""
    make_run(tmp_path / "whole", 3.0)
    going = make_run(tmp_path / "going", 3.0, seed=1, done=12)
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 5.')
    make_run(tmp_path / "young", 3.0, optim="adamw", done=3)
    bare = make_run(tmp_path / "lora", 3.0, optim="lora")
    (bare / "config.json").unlink()
    (bare / "summary.json").unlink()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").touch()
    seldom = make_run(
        tmp_path / "seldom", 3.0, optim="relora", done=12
    )  # evaluated at another update than its other seed
    make_run(tmp_path / "often", 3.0, optim="relora", done=12, seed=1)
    kept = [line for line in (seldom / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] in (1, 2)]
    kept.append(json.dumps(json.loads(kept[-1]) | {"step": 3, "eval_loss": 4.0, "eval_perplexity": 54.6}))
    (seldom / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert len(read(going).lines) == 12
    comparisons = compare(find([tmp_path]))
    first, unknown = comparisons
    lines = {row[0]: dict(zip(ranking(first).columns, row, strict=True)) for row in ranking(first).rows}
    assert lines["galore_adamw"]["seeds"] == "1 (not over: 12 of 20)"
    assert lines["galore_adamw"]["validation loss"] == "3.0000"  # of the one that is over
    assert lines["adamw"]["seeds"] == "0 (not over: 3 of 20)"
    assert lines["adamw"]["perplexity"] == ""
    text = write(comparisons, tmp_path / "report")
    assert "Settings unknown" in text
    assert list(unknown.methods) == ["lora"]
    assert as_json(comparisons)[0]["methods"]["adamw"]["eval_loss"] is None


def test_a_difference_is_told_apart_by_students_t() -> None:
    """The published quantiles: 12.71, 4.30 and 3.18 standard errors for 2, 3 and 4 pairs."""
    assert not Difference(12.0, 1.0, 2).is_told_apart
    assert Difference(-4.4, 1.0, 3).is_told_apart
    assert not Difference(4.2, 1.0, 3).is_told_apart
    assert Difference(3.2, 1.0, 4).is_told_apart
    assert Difference(2.3, 1.0, 40).is_told_apart
    assert not Difference(9.0, None, 1).is_told_apart


def test_a_rank_counts_the_methods_that_are_better_beyond_doubt() -> None:
    losses = {
        "best": {1: 3.00, 2: 3.10, 3: 3.20},
        "near": {1: 3.02, 2: 3.09, 3: 3.22},  # not told apart from the best
        "worse": {1: 3.10, 2: 3.20, 3: 3.30},  # told apart from the best: always by 0.1
        "last": {1: 4.00, 2: 4.10, 3: 4.20},
        "one seed": {1: 9.0},
    }
    found = ranks(losses)
    assert found["best"] == found["near"] == 1
    assert found["worse"] == 3
    assert found["last"] == 4
    assert found["one seed"] == 1  # nothing is known of its spread
    assert ranks({}) == {}


def test_long_runs_are_thinned_to_their_end() -> None:
    steps = thinned(list(range(1, 60_001)))
    assert len(steps) == 1000
    assert steps[-1] == 60_000
    assert thinned([1, 2, 3]) == [1, 2, 3]
    curve = {step: (float(step), 2.0 * step) for step in range(1, 5001)}
    assert over_seeds([curve, curve])[-1] == (5000.0, 10000.0, 10000.0, 10000.0)
    assert over_seeds([{1: (1.0, 1.0)}, {2: (1.0, 1.0)}]) == []


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run .*metrics\.jsonl"):
        find([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(InputError, match="no line of an update yet"):
        find([tmp_path])


def test_the_command_writes_markdown_html_and_pictures(tmp_path: Path) -> None:
    folders = [str(make_run(tmp_path / name, 3.0, optim=name)) for name in ("adamw", "lora")]
    output = tmp_path / "report"
    result = CliRunner().invoke(cli, ["report", *folders, "--output", str(output)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "| lora | 0.001 | 1 | 1 | 3.0000 |" in result.stdout
    page = (output / "report.html").read_text()
    assert page.count("<table>") == 2
    for picture in ("perplexity", "memory", "loss", "rates"):
        assert (output / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f'src="{picture}.png"' in page
        assert f"({picture}.png)" in (output / "report.md").read_text()
    assert sorted(f.name for f in output.iterdir()) == sorted(
        ["report.html", "report.md", "loss.png", "memory.png", "perplexity.png", "rates.png"]
    )
    answer = json.loads(CliRunner().invoke(cli, ["report", *folders, "--json"], catch_exceptions=False).stdout)
    assert answer[0]["methods"]["lora"]["eval_loss"] == 3.0
    assert len(find([*map(Path, folders), output])) == 2  # as a shell writes it: sweeps/table2/*
    with pytest.raises(InputError, match="no run"):
        find([output])


def test_the_papers_rule_for_any_model(tmp_path: Path) -> None:
    assert sum(paper.rule("llama_60m", "galore", 128)) == pytest.approx(0.24, abs=0.011)
    small = sum(paper.rule("llama_1m", "full", 0))
    assert small == pytest.approx(6 * 0.85 / 1024, rel=0.3)  # two bytes of weights and four of moments a parameter
