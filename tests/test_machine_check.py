"""`galore-pretrain check`: it runs to its end on a CPU, and finds what is wrong; whatever ends a part, the rest goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from galore_pretrain import cli
from galore_pretrain.check import kernels, memory, numerics, page, parts, runner, runs, speed
from galore_pretrain.check.part import Found, Part, Settings
from galore_pretrain.check.parts import PARTS, Entry
from galore_pretrain.check.runner import Runner, settings_for
from galore_pretrain.errors import InputError
from galore_pretrain.optim import METHODS
from galore_pretrain.optim import update as update_of_one
from galore_pretrain.planning import plan as plans

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """A part of a CPU, whose function a test calls itself."""
    return Part(Settings("cpu", "sample", "sample", str(tmp_path)), tmp_path / "found.jsonl", 600)


def failed(found: Found) -> list[str]:
    return [check.name for check in found.checks if not check.ok]


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    """In its smallest form, as CI makes it."""
    names = "environment,memory,resume,seven"
    words = ["--minutes", "9", "--device", "cpu", "--only", names, "--output", str(tmp_path / "check")]
    command = [sys.executable, "-m", "galore_pretrain", "check", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((tmp_path / "check" / "check.json").read_text())
    assert answer["ok"] is True
    statuses = {name: told["status"] for name, told in answer["parts"].items()}
    assert statuses == {"environment": "done", "memory": "done", "resume": "done", "seven": "skipped"}
    assert answer["parts"]["seven"]["why"] == "it needs a GPU"
    for name in ("environment", "memory", "resume"):
        assert answer["parts"][name]["checks"], name
    assert answer["machine"]["versions"]["torch"] == torch.__version__
    page_text = (tmp_path / "check" / "check.md").read_text()
    assert page_text.startswith("**galore-pretrain check passed: ")
    assert "Not or not wholly made: seven." in page_text.splitlines()[0]
    assert sorted(file.name for file in (tmp_path / "check").iterdir()) == ["check.json", "check.md"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "memry"], "did you mean memory? the parts are environment, numerics, "),
        (["--device", "tpu"], "--device tpu is unknown"),
        (["--device", "cuda:97"], "CUDA devices; use --device auto"),
        (["--data", "c4"], "the check reads no text of the hub"),
        (["--data", "no-such-file.txt", "--tokenizer", "sample"], "no-such-file.txt"),
        (["--data", __file__], "--tokenizer is missing"),
        (["--tokenizer", "no/such/file.model"], "no such file or folder"),
    ],
)
def test_what_cannot_be_checked_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.cli, ["check", *words, "--output", str(tmp_path / "out")], standalone_mode=False)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_script_takes_its_former_flags_and_names(tmp_path: Path) -> None:
    """`make_kit.sh` says how it is started on a bare machine, where nothing of the package is installed."""
    only = ["env", "seven", "compiled"]
    flags = ["--out", str(tmp_path), "--minutes", "5", "--device", "cpu", "--only", *only]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    hidden = "import sys; sys.modules.update(dict.fromkeys(('click', 'bitsandbytes', 'wandb', 'datasets'))); "
    code = f"{hidden}import runpy; sys.argv[0] = {str(SCRIPT)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(json.loads((tmp_path / "check.json").read_text())["parts"]) == ["environment", "seven", "compiled"]
    assert "**galore-pretrain check passed: 2 checks." in done.stdout


# -- what it finds ----------------------------------------------------------------------------------------------------


def test_rounding_is_right(part: Part) -> None:
    numerics.rounding(part)
    assert len(part.found.checks) == 6
    assert failed(part.found) == []


def _cut_off(value: Tensor, bits: Tensor) -> Tensor:
    """Round towards zero."""
    value.view(torch.int32).bitwise_and_(-65536)
    return value


def _to_nearest(value: Tensor, bits: Tensor) -> Tensor:
    return value.copy_(value.bfloat16())


def _too_far(value: Tensor, bits: Tensor) -> Tensor:
    """Round right on average, to numbers that are no neighbours."""
    value.view(torch.int32).add_(4 * bits - 2 * 65536).bitwise_and_(-65536)
    return value


@pytest.mark.parametrize("wrong", [_cut_off, _to_nearest, _too_far])
def test_a_wrong_rounding_is_found(
    wrong: Callable[[Tensor, Tensor], Tensor], part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_of_one, "round_stochastic", wrong)
    numerics.rounding(part)
    assert len(failed(part.found)) >= 3


@pytest.mark.parametrize("row", ["sgd", "galore_adamw", "adafactor", "muon"])
def test_a_rounding_with_a_bias_is_found_in_each_row(row: str, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    numerics.bias(part, METHODS[row])
    assert failed(part.found) == []
    monkeypatch.setattr(update_of_one, "round_stochastic", _cut_off)
    numerics.bias(part, METHODS[row])
    assert len(failed(part.found)) == 1


def test_updates_are_those_of_the_formulas(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    numerics.against_formulas(part)
    assert failed(part.found) == []
    assert [check.name.split(":")[0] for check in part.found.checks] == ["adam", "adamw", "galore_adamw"]
    monkeypatch.setattr(numerics, "DECAY", numerics.DECAY * 1.1)  # of the formulas: an error of a thousandth
    numerics.against_formulas(part)
    assert len(failed(part.found)) == 3


def test_a_row_that_is_not_the_same_in_every_way_is_found(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    numerics.same_in_every_way(part, METHODS["galore_adamw"])
    assert len(part.found.checks) == len(numerics._CHECKS)
    assert failed(part.found) == []
    monkeypatch.setattr(numerics.METHODS["adamw"].__class__, "keeps_8bit", lambda *_: False)  # and nothing else
    seeds = iter(range(10_000))
    monkeypatch.setattr("galore_pretrain.tensors.rounding.derive_seed", lambda *_: next(seeds))
    numerics.same_in_every_way(part, METHODS["adamw"])
    assert "adamw: layerwise" in failed(part.found)


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part `memory` checks a small model alone."""
    monkeypatch.setattr(memory, "_CPU_MODELS", ["llama_1m"])


@pytest.mark.parametrize(("factor", "is_found"), [(1.0, False), (0.9, True), (1.1, True)])
def test_a_plan_that_is_a_tenth_off_is_found(
    factor: float, is_found: bool, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*arguments: Any, **more: Any) -> plans.Plan:
        plan = plans.measure(*arguments, **more)
        return plans.Plan(plan.config, round(factor * plan.peak_bytes), plan.parts, plan.place)

    monkeypatch.setattr(memory, "measure", measure)
    memory._against_plan(part, memory._Case("llama_9m", "galore_adamw", layerwise=True, rows=1, total=1))
    (check,) = part.found.checks
    assert check.ok is not is_found, check


# -- parts that end otherwise than well -------------------------------------------------------------------------------

STUB = """
import json, os, signal, sys, time
name, settings, file, limit = sys.argv[1:]
with open(file, "a") as found:
    found.write(json.dumps({"check": {"name": "one", "measured": 1, "bound": "1", "ok": name != "wrong"}}) + "\\n")
    found.write('{"check": {"name": "cut sh')
    found.flush()
    if name == "dies":
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "raises":
        raise ValueError("of some kind")
    if name == "hangs":
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "987654")
        time.sleep(600)
"""


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parts that are named for how they end, in processes of a few milliseconds; return the folder of the page."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    original = subprocess.Popen

    def popen(command: list[str], **more: Any) -> Any:
        assert command[1:3] == ["-m", "galore_pretrain.check"]
        return original([command[0], str(script), *command[3:]], **more)

    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    entries = [Entry(name, "a stub", "none:none", 60) for name in ("fine", "wrong", "dies", "raises")]
    entries += [Entry("hangs", "a stub", "none:none", 2), Entry("of GPUs", "a stub", "none:none", 60, needs_gpu=True)]
    monkeypatch.setattr(runner, "PARTS", {entry.name: entry for entry in entries})
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def run_stubs(folder: Path, names: list[str], minutes: float = 5) -> tuple[int, dict[str, Any], list[str]]:
    said: list[str] = []
    code = Runner(Settings("cpu", "sample", "sample", ""), minutes, folder, said.append).run(names)
    answer: dict[str, Any] = json.loads((folder / "check.json").read_text())
    return code, answer, said


def is_running(words: str) -> bool:
    return subprocess.run(["pgrep", "-f", words], capture_output=True, check=False).returncode == 0


def test_whatever_ends_a_part_the_rest_goes_on(stubs: Path) -> None:
    names = ["dies", "raises", "hangs", "of GPUs", "wrong", "fine"]
    code, answer, said = run_stubs(stubs, names)
    assert code == 1
    told = {name: (part["status"], part["why"], len(part["checks"])) for name, part in answer["parts"].items()}
    assert told == {
        "dies": ("died", "by SIGSEGV", 1),
        "raises": ("died", "with exit code 1", 1),
        "hangs": ("late", "it took more than its 2 s", 1),
        "of GPUs": ("skipped", "it needs a GPU", 0),
        "wrong": ("done", "", 1),
        "fine": ("done", "", 1),
    }
    assert not is_running("sleep 987654")  # what a part has started ends with it
    verdict = (
        "FAILED: 4 of 5 checks or parts. dies died (by SIGSEGV); raises died (with exit code 1); "
        "hangs late (it took more than its 2 s); wrong: one = 1. Not or not wholly made: of GPUs."
    )
    assert answer["verdict"] == said[-1] == verdict
    text = (stubs / "check.md").read_text()
    assert text.startswith(f"**galore-pretrain check {verdict}**\n")
    assert "about to die" in text
    assert "ValueError: of some kind" in text
    assert text.index("| wrong | one | 1 | 1 |") < text.index("## All checks")
    assert "    FAILED one: 1 (1)" in "\n".join(said)


def test_what_no_time_is_left_for_is_said_and_is_no_fault(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_LEAST_SECONDS", 0.0)
    monkeypatch.setitem(runner.PARTS, "hangs", Entry("hangs", "a stub", "none:none", 60))
    code, answer, _ = run_stubs(stubs, ["fine", "hangs", "wrong"], minutes=2 / 60)
    assert code == 0
    parts = answer["parts"]
    assert (parts["hangs"]["status"], parts["hangs"]["why"]) == ("cut", "the 0.0333333 minutes were over")
    assert (parts["wrong"]["status"], parts["wrong"]["why"]) == ("skipped", "the 0.0333333 minutes were over")
    assert answer["verdict"] == "passed: 2 checks. Not or not wholly made: hangs, wrong."


def test_a_signal_ends_the_part_and_leaves_the_page(stubs: Path) -> None:
    """Ctrl-C in a terminal."""
    interrupter = subprocess.Popen(
        [sys.executable, "-c", f"import os, time; time.sleep(1.5); os.kill({os.getpid()}, {signal.SIGINT.value})"]
    )
    began = time.monotonic()
    code, answer, _ = run_stubs(stubs, ["fine", "hangs", "wrong"])
    interrupter.wait()
    assert time.monotonic() - began < 30
    assert code == 128 + signal.SIGINT
    statuses = {name: part["status"] for name, part in answer["parts"].items()}
    assert statuses in (
        {"fine": "done", "hangs": "stopped", "wrong": "skipped"},
        {"fine": "done", "hangs": "late", "wrong": "skipped"},  # it came as the part's 2 s were over
    )
    assert (stubs / "check.md").read_text().startswith("**galore-pretrain check ")
    assert not is_running("sleep 987654")


def test_what_is_no_number_fails_and_can_be_read(part: Part, tmp_path: Path) -> None:
    part.check_below("a", float("nan"), 1.0)
    part.check_below("b", float("inf"), 1.0)
    part.check_below("c", 1.0, 1.0)
    part.number("d", float("inf"))
    part.skip("e", "of f")
    found = Found.read(tmp_path / "found.jsonl")
    assert found == part.found
    assert failed(found) == ["a", "b"]
    assert found.checks[0].measured == "nan"
    assert (found.numbers, found.skipped) == ({"d": "inf"}, {"e": "of f"})


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", PARTS.values(), ids=PARTS)
def test_a_part_has_a_function(entry: Entry) -> None:
    assert callable(entry.function())
    assert entry.function().__doc__


def test_a_part_without_text_says_so(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise InputError("--data sample: the text is not installed")

    monkeypatch.setattr(runs, "open_source", missing)
    for name in ("resume", "export", "reader"):
        PARTS[name].function()(part)
    assert part.found.skipped == {"text": "--data sample: the text is not installed"}
    assert part.found.checks == []


def test_parts_of_8_bits_need_bitsandbytes(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("updates", "prescribed", "kernels"):
        monkeypatch.setattr(f"galore_pretrain.check.{module}.has_8bit", lambda: False)
    kernels.eight_bit(part)
    assert part.found.skipped == {"8 bits": "bitsandbytes is not installed"}
    assert part.found.checks == []
