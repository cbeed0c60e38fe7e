"""A page of runs that go on: what is read on, how a run's state is told, what the page has, and the command itself."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from galore_pretrain.cli import cli
from galore_pretrain.errors import InputError
from galore_pretrain.study.charts import Line, Range, draw, short
from galore_pretrain.study.watch import check_paths, planned_peak
from galore_pretrain.study.watch_page import Moment, in_words, on_dark, page
from galore_pretrain.study.watched import Curve, Watched, WatchedRun
from runs import run
from test_report import make_run

NOW = 2_000_000_000.0
"""When the tests look, in seconds since 1970."""


def watched(folder: Path, age: float = 1.0) -> WatchedRun:
    """A run that was looked at; what it wrote last is ``age`` seconds old at `NOW`."""
    for file in folder.iterdir():
        os.utime(file, (NOW - age, NOW - age))
    found = WatchedRun(folder)
    found.look()
    return found


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def line(step: int, **more: Any) -> str:
    values = {"step": step, "loss": 5.0, "lr": 0.01, "tokens_seen": 1000 * step, "tokens_per_second": 500.0 + step / 7}
    return json.dumps(values | {"peak_memory_bytes": 2**30} | more) + "\n"


# -- reading ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=2000))
def test_a_curve_of_any_length_has_few_points_that_stand_for_all_values(values: list[float]) -> None:
    curve = Curve()
    for x, y in enumerate(values):
        curve.add(x, y)
    assert len(curve.points) <= 120
    assert sum(point.count for point in curve.points) == len(values)
    assert curve.points[-1].x == len(values) - 1
    assert max(point.high for point in curve.points) == max(values)
    assert min(point.low for point in curve.points) == min(values)
    first = curve.points[0]
    assert first.mean == pytest.approx(sum(values[: first.count]) / first.count, abs=1e-9)


def test_what_was_read_is_not_read_again_and_a_half_line_waits(tmp_path: Path, monkeypatch: Any) -> None:
    folder = make_run(tmp_path / "a", 3.0, done=12)
    seen = watched(folder)
    assert seen.last["step"] == 12
    taken: list[bytes] = []
    take = seen._take
    monkeypatch.setattr(seen, "_take", lambda text: taken.append(text) or take(text))
    whole = line(13)
    append(folder, whole[:30])
    seen.look()
    assert seen.last["step"] == 12
    append(folder, whole[30:] + line(14))
    seen.look()
    assert seen.last["step"] == 14
    assert [json.loads(text)["step"] for text in taken] == [13, 14]


@pytest.mark.parametrize("more", [0, 1, 9])
def test_a_resumed_run_that_has_cut_its_lines_is_read_anew(tmp_path: Path, more: int) -> None:
    """Also where it has written as many lines since, or more, than there were."""
    folder = make_run(tmp_path / "a", 3.0, done=12)
    seen = watched(folder)
    kept = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:8]
    (folder / "metrics.jsonl").write_text("".join(kept) + "".join(line(9 + i, loss=4.0) for i in range(more)))
    seen.look()
    assert seen.last["step"] == 8 + more
    points = seen.curves["loss"].points
    assert [point.x for point in points] == list(range(1, 9 + more))
    assert [point.mean for point in points[8:]] == [4.0] * more


def test_what_is_counted_of_updates(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 3.0, done=3, max_loss=6.0)  # of which the first two have more
    append(folder, line(4, loss=None) + line(5, skipped_tensors=2) + line(6, refreshes_saved=3, subspace_overlap=0.5))
    append(folder, line(7, failed_refreshes=1, subspace_overlap=0.25) + "no line\n")
    seen = watched(folder)
    losses = [8.0 - 3.0 * step / 20 for step in (1, 2, 3)]
    assert seen.skipped == sum(loss > 6.0 for loss in losses) + 2
    assert (seen.saved, seen.failed, seen.unread) == (3, 1, 1)
    assert [(point.x, point.mean) for point in seen.curves["subspace_overlap"].points] == [(6, 0.5), (7, 0.25)]
    assert len(seen.curves["loss"].points) == 6  # that of update 4 has no place


def test_time_left_is_by_the_last_fifty_updates(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 3.0, updates=100, done=10)
    append(folder, "".join(line(step, tokens_per_second=250.0) for step in range(11, 61)))
    seen = watched(folder)
    assert seen.tokens_per_second == 250.0
    assert seen.seconds_left == pytest.approx(40 * 1000 / 250)
    config = json.loads((folder / "config.json").read_text())
    config["config"]["steps"]["value"] = None
    config["config"]["max_tokens"]["value"] = 100_000
    (folder / "config.json").write_text(json.dumps(config))
    assert watched(folder).seconds_left == pytest.approx(40_000 / 250)


def test_states(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".lock").touch()
    assert watched(begun).state(NOW) == "starting"
    assert watched(begun, 601).state(NOW) == "silent"
    going = make_run(tmp_path / "going", 3.0, done=12)  # 2 s an update
    assert watched(going, 79).state(NOW) == "running"
    assert watched(going, 81).state(NOW) == "silent"
    append(going, line(13) + line(14))  # before an evaluation, which may take as long as its tokens do in training
    patience = 60 + 10 * 2 + 10_000_000 / 500
    assert watched(going, patience - 40).state(NOW) == "running"
    assert watched(going, patience + 40).state(NOW) == "silent"
    ended = make_run(tmp_path / "ended", 3.0)
    assert watched(ended).state(NOW) == "saving"  # its summary is of no such length
    assert watched(ended, 601).state(NOW) == "ended"
    (ended / "summary.json").write_text(json.dumps({"steps": 20}))
    assert watched(ended).state(NOW) == "ended"


def test_a_run_that_ends_without_a_finite_evaluation_has_ended(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3.0, done=19)
    append(folder, line(20, eval_loss=None, eval_perplexity=None))
    assert watched(folder).state(NOW) == "running"
    (folder / "summary.json").write_text(json.dumps({"steps": 20}))
    assert watched(folder).state(NOW) == "ended"
    config = json.loads((folder / "config.json").read_text())
    config["config"]["steps"]["value"] = 40  # and now it is to be longer
    (folder / "config.json").write_text(json.dumps(config))
    assert watched(folder).state(NOW) == "running"


def test_an_evaluation_at_the_end_by_tokens_is_waited_for(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3.0, done=12)  # 2 s an update of 1,000 tokens
    config = json.loads((folder / "config.json").read_text())
    config["config"]["steps"]["value"] = None
    config["config"]["max_tokens"] = {"value": 13_500, "origin": "flag"}
    (folder / "config.json").write_text(json.dumps(config))
    assert watched(folder, 1000).state(NOW) == "running"
    append(folder, line(13))
    assert watched(folder, 1000).state(NOW) == "running"


def test_runs_that_begin_later_are_found(tmp_path: Path) -> None:
    make_run(tmp_path / "b", 3.0)
    (tmp_path / "report").mkdir()
    both = Watched([tmp_path])
    assert [found.folder.name for found in both.look()] == ["b"]
    make_run(tmp_path / "a", 3.0)
    assert [found.folder.name for found in both.look()] == ["a", "b"]
    assert both.holds_runs
    assert not Watched([tmp_path / "a", tmp_path / "b"]).holds_runs
    assert Watched([tmp_path / "report"]).look() == []


# -- the page ---------------------------------------------------------------------------------------------------------


def pictures(text: str) -> list[ElementTree.Element]:
    """The charts of a page, as XML."""
    found = []
    for part in text.split("<figure>")[1:]:
        found.append(ElementTree.fromstring(part[part.index("<svg") : part.index("</figure>")]))
    return found


def test_the_page_tells_each_run(tmp_path: Path) -> None:
    going = watched(make_run(tmp_path / "going & <b>", 3.0, done=12))
    going.planned = 3 * 2**29
    other = watched(make_run(tmp_path / "other", 3.1, seed=1, optim="lora"))
    text = page([going, other], Moment(NOW, 4.2))
    assert '<meta http-equiv="refresh" content="5">' in text
    assert "<script" not in text
    assert "<b>" not in text.split("<h1>")[1].replace('<b class="warn">', "")
    assert "going &amp; &lt;b&gt;" in text
    assert "<title>1 running, 1 saving</title>" in text
    for cell in (
        'data-name="update">12 of 20<progress value="12" max="20">',
        f'data-name="loss">{8.0 - 3.0 * 12 / 20:.4f}<',
        f'data-name="validation">ppl {math.exp(3.0 + 0.1 * 10):.4g}<small>after 10<',
        'data-name="tokens/s">500<',
        'data-name="left">16 s<',
        'data-name="memory">1.00 GiB<small>planned 1.50 GiB<',
        'data-name="skipped">0<',
        "going &amp; &lt;b&gt;<small>galore_adamw, seed 0<",
    ):
        assert cell in text, cell
    titles = [chart.attrib["aria-label"] for chart in pictures(text)]
    assert titles == [
        "training loss",
        "validation perplexity",
        "peak memory, GiB; broken: planned",
        "tokens a second",
        "learning rate",
    ]
    assert text.count('stroke-dasharray="3 3"') == 1  # the planned peak of one run
    last = page([going, other], Moment(NOW, None))
    assert "http-equiv" not in last
    assert "not again" in last


def test_the_page_of_runs_that_have_not_begun(tmp_path: Path) -> None:
    assert "no run yet" in page([], Moment(NOW, 1))
    (tmp_path / ".lock").touch()
    text = page([watched(tmp_path)], Moment(NOW, 1))
    assert f"About to begin: {tmp_path}." in text
    assert "<table" not in text


def test_what_is_seldom_is_shown_where_it_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 3.0, done=3)
    overlaps = {"subspace_overlap": 0.8, "subspace_overlap_paired": 0.7, "subspace_overlap_noise": 0.6}
    append(folder, line(4, loss=None) + line(5, **overlaps) + line(6, refreshes_saved=2, process_peak_bytes=2**30))
    text = page([watched(folder)], Moment(NOW, 1))
    titles = [chart.attrib["aria-label"] for chart in pictures(text)]
    assert titles[-3:] == [
        "overlap of subspaces at a refresh",
        "one matrix's overlap; rings: by noise alone",
        "updates skipped so far",
    ]
    assert '<b class="warn">1</b><small>refreshes saved 2</small>' in text
    assert "Memory on a CPU" in text


def test_settings_have_sections_and_seeds_a_colour(tmp_path: Path) -> None:
    runs = [watched(make_run(tmp_path / f"a{seed}", 3.0, seed=seed)) for seed in (0, 1)]
    runs.append(watched(make_run(tmp_path / "b", 3.0, model="llama_130m")))
    text = page(runs, Moment(NOW, 1))
    first, second = text.split("<h2>")[1:]
    assert "galore_adamw, seed 1" in first
    assert "var(--s0m0)" in first
    assert "var(--s0m1)" not in first
    assert second.startswith("llama_130m on sample")
    assert "var(--s1m0)" in second


def test_a_task_has_its_score(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 3.0, done=4)
    config = json.loads((folder / "config.json").read_text())
    for name in ("data", "layout", "eval_tokens"):
        config["config"][name]["value"] = None
    config["config"]["task"] = {"value": "mrpc"}
    (folder / "config.json").write_text(json.dumps(config))
    append(folder, line(5, eval_loss=0.5, eval_score=0.8))
    text = page([watched(folder)], Moment(NOW, 1))
    assert "<h2>GLUE, fine-tuned from llama_60m: mrpc</h2>" in text
    assert 'data-name="validation">score 0.8000<small>after 5<' in text
    assert "validation score" in [chart.attrib["aria-label"] for chart in pictures(text)]


def test_a_line_lies_where_its_numbers_say() -> None:
    root = ElementTree.fromstring(
        draw("t", [Line([(0, 0.0), (50, 5.0), (100, 10.0)], "#000")], from_zero=True)
        .removeprefix("<figure><figcaption>t</figcaption>")
        .removesuffix("</figure>")
    )
    inner = root.find("svg")
    assert inner is not None
    width, height = float(inner.attrib["width"]), float(inner.attrib["height"])
    drawn = inner.findall("path")[0].attrib["d"].removeprefix("M").split("L")
    places = [tuple(map(float, place.split())) for place in drawn]
    expected = [(x / 102 * width, (1 - y / 10.5) * height) for x, y in ((0, 0), (50, 5), (100, 10))]
    for place, where in zip(places, expected, strict=True):
        assert place == pytest.approx(where, abs=0.06)
    assert [text.text for text in root.findall("text")] == [
        *("0", "2", "4", "6", "8", "10"),
        *("0", "20", "40", "60", "80", "100"),
    ]


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Range(0, 10), [0, 2, 4, 6, 8, 10]),
        (Range(3.31, 3.52), [3.35, 3.4, 3.45, 3.5]),
        (Range(18, 900, log=True), [20, 50, 100, 200, 500]),
        (Range(65, 310, log=True), [70, 100, 200, 300]),
        (Range(18, 25, log=True), [18, 20, 22, 24]),
        (Range(2, 90_000, log=True), [10, 100, 1000, 10_000]),
    ],
)
def test_ticks_are_round(axis: Range, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)


@given(st.floats(1e-9, 1e9), st.floats(1e-3, 1e3), st.booleans())
def test_any_range_has_ticks_within(low: float, width: float, log: bool) -> None:
    axis = Range(low, low * (1 + width), log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in ticks)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(1e-300, 1e300)), min_size=1, max_size=5), st.booleans())
def test_any_points_can_be_drawn(points: list[tuple[int, float]], log: bool) -> None:
    text = draw("t", [Line(sorted(points), "#000")], log=log)
    assert "nan" not in text
    assert "inf" not in text


def test_numbers_and_durations_in_few_letters() -> None:
    assert [short(value) for value in (0, 0.5, 9000, 12_000, 3e6, 5e-5)] == ["0", "0.5", "9000", "12k", "3M", "5e-05"]
    assert [in_words(seconds) for seconds in (0.25, 59, 61, 3700, 90_000)] == [
        "0.25 s", "59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h",
    ]  # fmt: skip


def test_dark_colours_are_lighter_on_a_dark_page() -> None:
    assert on_dark("#E69F00") == "#e69f00"
    assert on_dark("#000000") == "#e6e6e6"
    assert on_dark("#0072B2") == "#499ac8"


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_seconds_are_positive(tmp_path: Path, seconds: str) -> None:
    with pytest.raises(InputError, match=r"--watch .*give more than 0"):
        CliRunner().invoke(cli, ["report", str(tmp_path), "--watch", seconds], catch_exceptions=False)


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match=r"rums: no such folder; did you mean .*runs"):
        check_paths([tmp_path / "rums"])
    with pytest.raises(InputError, match="--json with --watch"):
        CliRunner().invoke(cli, ["report", str(tmp_path), "--watch", "1", "--json"], catch_exceptions=False)


def until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Wait until something holds, which only a process that is at work can bring about."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def watching(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "galore_pretrain", "report", *arguments, "--watch", "0.1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_follows_runs_and_ends_with_them(tmp_path: Path) -> None:
    """A run goes on, another begins later, and the page is whole whenever it is read."""
    folder = make_run(tmp_path / "runs" / "a", 3.0, done=5, eval_every=100)
    output = tmp_path / "page"
    file = output / "index.html"
    seen: list[str] = []

    def shows(words: str) -> Callable[[], bool]:
        def look() -> bool:
            text = file.read_text() if file.exists() else "</html>\n"
            assert text.endswith("</html>\n")
            seen.append(text)
            return words in text

        return look

    with watching(str(tmp_path / "runs"), "--output", str(output)) as process:
        until(shows("5 of 20"), process)
        append(folder, line(6) + line(7)[:20])
        until(shows("6 of 20"), process)
        append(folder, line(7)[20:])
        make_run(tmp_path / "runs" / "b", 3.0, seed=1)
        until(shows("7 of 20"), process)
        until(shows("galore_adamw, seed 1"), process)
        append(folder, "".join(line(step) for step in range(8, 20)) + line(20, eval_loss=3.0, eval_perplexity=20.1))
        until(shows("2 saving"), process)
        for name in ("a", "b"):
            (tmp_path / "runs" / name / "summary.json").write_text('{"steps": 20, "planned_peak_bytes": 1610612736}')
        until(shows("2 ended"), process)
        for run_file in (tmp_path / "runs").glob("*/*"):  # a sweep may take a minute to begin its next run
            os.utime(run_file, (time.time() - 100,) * 2)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    assert f"all runs have ended: {file}" in stdout
    text = file.read_text()
    assert "http-equiv" not in text
    assert text.count("planned 1.50 GiB") == 2
    assert [part.name for part in output.iterdir()] == ["index.html"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_last_page(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "runs").mkdir()
    file = tmp_path / "index.html"
    with watching(str(tmp_path / "runs"), "--output", str(tmp_path)) as process:
        until(file.exists, process)
        assert "no run yet" in file.read_text()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + number, stderr
    assert "http-equiv" not in file.read_text()


def test_a_real_run_is_planned_as_it_plans_itself(tiny_config: str, tmp_path: Path) -> None:
    done = run(tiny_config, tmp_path / "run", "--betas", "0.8,0.99", planned=True)
    assert done.returncode == 0, done.stderr
    seen = WatchedRun(tmp_path / "run")
    seen.look()
    assert seen.state(time.time()) == "ended"
    assert seen.measures_process
    assert planned_peak(seen) == seen.summary["planned_peak_bytes"]
    assert len(seen.curves["loss"].points) == 12
    assert seen.curves["subspace_overlap"].points
    text = page([seen], Moment(time.time(), None))
    assert "12 of 12" in text
    seen.environment["processes"] = 2
    assert planned_peak(seen) is None
    assert planned_peak(WatchedRun(tmp_path)) is None  # which has no config
