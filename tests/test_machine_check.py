"""`galore-pretrain check`: it runs to its end, and finds what is wrong; whatever ends a part, the rest goes on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from galore_pretrain import cli
from galore_pretrain.check import host, kernels, memory, numerics, prescribed, runner, runs, speed, updates
from galore_pretrain.check.part import Found, Part, Settings
from galore_pretrain.check.parts import PARTS, Entry
from galore_pretrain.check.runner import Runner
from galore_pretrain.errors import InputError
from galore_pretrain.model.llama_config import load_model_config
from galore_pretrain.optim import METHODS
from galore_pretrain.optim import update as update_of_one
from galore_pretrain.planning import plan as plans
from galore_pretrain.tensors.transport import AtOnce
from warm_python import executable

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
    command = [executable(), "-m", "galore_pretrain", "check", *words]
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


@pytest.mark.slow
def test_the_script_runs_on_a_bare_machine(tmp_path: Path) -> None:
    """By its former flags and names of parts, as `make_kit.sh` tells, and without what is not installed there."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(('click', 'bitsandbytes', 'wandb', 'datasets')))"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    output = tmp_path / "out"
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "of no matter"}\n' * 200)
    flags = ["--out", str(output), "--minutes", "9", "--device", "cpu", "--text", str(text), "--tokenizer", "sample"]
    flags += ["--only", "env", "eight_bit"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SCRIPT.parent.parent}"}
    command = [sys.executable, str(SCRIPT), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((output / "check.json").read_text())["parts"]
    assert list(told) == ["environment", "eight_bit"]
    assert told["eight_bit"]["skipped"] == {"8 bits": "bitsandbytes is not installed"}
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
    seeds = iter(range(10_000))
    monkeypatch.setattr("galore_pretrain.tensors.rounding.derive_seed", lambda *_: next(seeds))
    numerics.same_in_every_way(part, METHODS["adamw"])
    assert "adamw: layerwise" in failed(part.found)


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


# -- what a GPU is asked for ------------------------------------------------------------------------------------------


class Card:
    """Stands for a GPU that shows so many GiB, of which its allocator has given out some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: float, allocated: float) -> None:
        self.fractions: list[float] = []
        gib = 2**30
        answers: dict[str, Callable[..., Any]] = {
            "mem_get_info": lambda *_: (int(total * gib / 2), int(total * gib)),
            "max_memory_allocated": lambda *_: int(allocated * gib),
            "max_memory_reserved": lambda *_: int(allocated * gib),
            "memory_allocated": lambda *_: 0,
            "memory_reserved": lambda *_: 0,
            "set_per_process_memory_fraction": lambda fraction, _: self.fractions.append(fraction),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(Part, "is_on_gpu", True)
        monkeypatch.setattr(memory, "launches", lambda work: work() and 7)
        monkeypatch.setattr(speed, "launches", lambda work: work() and 7)
        monkeypatch.setattr(speed, "busy_milliseconds", lambda work: work() and 1.0)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever model is asked for, a small one is made."""

    def config_of(optim: str, low_rank: dict[str, Any] | None = None, **flags: Any) -> Any:
        flags |= {"model": "llama_1m", "batch_size": 2, "max_length": 16}
        if "rank" in flags:
            flags["rank"] = 8
        return updates.config_of(optim, low_rank, **flags)

    for module in (memory, speed):
        monkeypatch.setattr(module, "config_of", config_of)
    monkeypatch.setattr(memory, "random_rows", lambda rows, *_: torch.zeros(2, 16, dtype=torch.long))
    monkeypatch.setattr(speed, "random_rows", lambda rows, *_: torch.zeros(2, 16, dtype=torch.long))


def test_updates_of_7b_are_made_under_a_cap(part: Part, small_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, total=80, allocated=22)
    memory.seven(part)
    assert card.fractions == [pytest.approx((23.64 - 0.5) / 80)]
    card = Card(monkeypatch, total=45.8, allocated=22)  # of which another program has half
    memory.seven(part)
    assert card.fractions == [pytest.approx(0.5)]
    part.found.checks.pop()
    assert [(check.measured, check.ok) for check in part.found.checks] == [(True, True)]
    for rows in (4, 8):
        assert part.found.numbers[f"7B, {rows} rows at a time, clipped: GiB allocated"] == 22
    assert part.found.numbers["7B, 8 rows at a time, clipped: launches of an update"] == 7


def test_7b_that_does_not_fit_is_found(part: Part, small_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, total=80, allocated=22)

    def build(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    monkeypatch.setattr(memory, "build", build)
    memory.seven(part)
    assert [(check.measured, check.ok) for check in part.found.checks] == [("CUDA out of memory. Tried", False)]
    assert part.found.numbers == {"7B, 8 rows at a time, clipped: fits into 23.14 GiB": "CUDA out of memory. Tried"}


def test_a_small_card_is_not_asked_for_7b(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, total=44, allocated=0)
    memory.seven(part)
    assert part.found.checks == []
    assert part.found.skipped["updates of llama_7b"] == "22.00 GiB of the card are free, and it takes 22.64"


@pytest.mark.parametrize(("allocated", "is_right"), [(0.0, False), (1000.0, False), (None, True)])
def test_plans_for_a_card_are_compared_with_its_allocator(
    allocated: float | None, is_right: bool, part: Part, small_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = memory._Case("llama_60m", "adamw", layerwise=False, rows=8, total=8)
    planned = plans.measure(case.config("cpu"), load_model_config("llama_1m")).peak_bytes
    Card(monkeypatch, total=80, allocated=planned / 2**30 if allocated is None else allocated + 1e-6)
    memory._against_plan(part, case)
    (check,) = part.found.checks
    assert check.ok is is_right


def test_updates_that_a_card_has_no_room_for_are_found_where_the_plan_promises_it(
    part: Part, small_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = memory._Case("llama_60m", "adamw", layerwise=False, rows=8, total=8)
    Card(monkeypatch, total=1e-4, allocated=0)
    memory._against_plan(part, case)
    assert part.found.checks == []
    assert "GiB of the card are free" in part.found.skipped[str(case)]
    Card(monkeypatch, total=80, allocated=1)

    def build(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "build", build)
    memory._against_plan(part, case)
    assert failed(part.found)[0] == f"{case}: updates that are planned to fit"


def test_speed_on_a_card_tells_launches_and_idle_time(
    part: Part, small_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(monkeypatch, total=80, allocated=0)
    monkeypatch.setattr(speed, "_sizes", lambda _: [speed._Size("llama_60m", 8, 2, 16)])
    speed.speed(part)
    assert part.found.numbers["llama_60m 2 × 16 galore_adamw layerwise: launches of an update"] == 7
    assert 0 < part.found.numbers["llama_60m 2 × 16 adamw: share of the time that the GPU is idle"] < 1


@pytest.mark.parametrize("is_broken", [False, True])
def test_compiled_layers_that_compute_something_else_are_found(
    is_broken: bool, part: Part, small_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_layers(model: Any) -> None:
        if is_broken:
            model.lm_head.weight.data.mul_(1.5)

    monkeypatch.setattr(speed, "compile_layers", compile_layers)
    speed.compiled(part)
    (check,) = part.found.checks
    assert check.ok is not is_broken, check
    assert "llama_60m 64 × 256 layerwise: seconds to compile" in part.found.numbers


def test_the_price_of_deterministic_kernels_is_told(
    part: Part, small_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def build(config: Any, device: torch.device) -> Any:
        asked.append(config.deterministic)
        return updates.build(config, device)

    monkeypatch.setattr(speed, "build", build)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    try:
        speed.deterministic(part)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
    assert asked == [False, True]
    label = "llama_1m 2 × 64 galore_adamw: ms an update"
    assert list(part.found.numbers) == [label, f"{label}, --deterministic", f"{label}: --deterministic takes, %"]


@pytest.mark.parametrize("waits", [True, False])
def test_sums_on_the_host_that_are_others_are_found(waits: bool, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(AtOnce):
        """Leaves out what is fetched, as if it came too late."""

        def copy(self, target: Tensor, source: Tensor) -> None:
            if waits:
                super().copy(target, source)

    monkeypatch.setattr(host, "transport_of", lambda tensor: Late(tensor.device))
    host.host_sums(part)
    assert [check.ok for check in part.found.checks] == [waits, waits]
    assert part.found.checks[0].bound == "none of 18"


def test_a_gpus_8_bits_are_not_compared_with_themselves(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    kernels.eight_bit(part)
    assert part.found.checks == []
    assert list(part.found.skipped) == ["bitsandbytes' way"]


def test_rows_are_compared_with_the_cpu_where_they_can_be(part: Part) -> None:
    for row in ("fira", "apollo", "apollo_mini", "subtrack", "galore_adamw8bit"):
        numerics.against_cpu(part, METHODS[row])
    compared = [(check.name.split(":")[0], check.measured) for check in part.found.checks]
    assert compared == [("fira", 0), ("apollo", 0), ("apollo_mini", 0)]
    assert [name.split(":")[0] for name in part.found.skipped] == ["subtrack"]
    assert [name.split(":")[0] for name in part.found.numbers] == ["galore_adamw8bit"]


def test_an_update_that_a_device_makes_otherwise_is_found(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    updates_made = prescribed.Small.update
    built: list[int] = []

    def update(self: prescribed.Small, count: int, noise: int = 0) -> dict[str, Tensor]:
        built.append(1)
        changes = updates_made(self, count, noise)
        if len(built) == 2:  # the second one made is that of the device
            changes = {name: 1.01 * change for name, change in changes.items()}
        return changes

    monkeypatch.setattr(prescribed.Small, "update", update)
    numerics.against_cpu(part, METHODS["adamw"])
    assert len(failed(part.found)) == 1


def test_no_number_is_apart_from_all() -> None:
    one = {"a": torch.ones(3), "b": torch.full((3,), torch.nan)}
    assert math.isnan(prescribed.apart(one, {"a": torch.ones(3), "b": torch.ones(3)}))
    assert prescribed.apart({"a": torch.full((3,), 1.5)}, {"a": torch.ones(3)}) == pytest.approx(0.5)


def test_updates_that_come_to_no_number_are_found(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights, and of what a last bit makes of them: nothing is below a bound that is no number."""
    made = prescribed.Small.weights

    def weights(self: prescribed.Small) -> dict[str, Tensor]:
        found = made(self)
        found["model.layers.0.mlp.up_proj.weight"].fill_(math.nan)
        return found

    monkeypatch.setattr(prescribed.Small, "weights", weights)
    numerics.bias(part, METHODS["sgd"])
    assert len(failed(part.found)) == 1
    bound = prescribed.bound_for(part, METHODS["sgd"], 1)
    part.check_below("of no bound", 0.0, bound)
    assert failed(part.found)[1:] == ["of no bound"]


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
        started = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600")
        open(__file__ + ".started", "w").write(str(started))
        time.sleep(600)
"""


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parts that are named for how they end, in processes of a few milliseconds; return the folder of the page."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(runner, "_command", lambda words: [sys.executable, str(script), *words])
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


def has_ended(folder: Path) -> bool:
    """Whether the process that a stub has started ends within seconds."""
    process = int((folder.parent / "stub.py.started").read_text())
    for _ in range(100):
        try:
            status = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return True
        if status.rpartition(")")[2].split()[0] in "ZX":  # nobody has asked for its exit code
            return True
        time.sleep(0.1)
    return False


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
    assert has_ended(stubs)  # what a part has started ends with it
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


def test_a_signal_ends_the_part_and_leaves_the_page(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a terminal."""
    monkeypatch.setitem(runner.PARTS, "hangs", Entry("hangs", "a stub", "none:none", 60))
    started = stubs.parent / "stub.py.started"

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt, daemon=True).start()
    code, answer, _ = run_stubs(stubs, ["fine", "hangs", "wrong"])
    assert code == 128 + signal.SIGINT
    told = {name: (part["status"], part["why"]) for name, part in answer["parts"].items()}
    assert told == {
        "fine": ("done", ""),
        "hangs": ("stopped", "by SIGINT"),
        "wrong": ("skipped", "the check was stopped"),
    }
    assert (stubs / "check.md").read_text().startswith("**galore-pretrain check ")
    assert has_ended(stubs)


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
