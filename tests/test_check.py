"""`check-method` and its pytest plug: shipped methods hold every check; a rule that breaks a promise fails its own."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from torch import multiprocessing

from galore_pretrain import cli
from galore_pretrain.errors import InputError
from galore_pretrain.optim import check
from galore_pretrain.optim.build import REGISTRY
from galore_pretrain.optim.check import CHECKS, Pair, check_methods, run_check
from galore_pretrain.optim.trial import Subject, load_subject
from runs import start_warm
from warm_python import executable

SPAWN = multiprocessing.spawn
RULES = Path(__file__).with_name("broken_rules.py")
BROKEN = {
    "Average": (), "LooksAside": ("layerwise",), "Elsewhere": ("resume",), "InPlace": ("gradients",),
    "NotLinear": ("layerwise", "accumulation", "clipping", "processes"), "LongBases": ("clipping",),
    "Unasked": ("skipping", "processes"), "Replacing": ("state",), "Peeking": ("plan",), "Heavier": ("plan",),
    "OfItsPart": ("processes",), "FirstRate": ("rate",), "NoDecay": ("rate",), "TorchsNumbers": ("seeds",),
}  # fmt: skip
"""A rule of tests/broken_rules.py, and which checks it fails."""
SAID = {
    "LooksAside": "likely the rule keeps something outside its state",
    "Elsewhere": "which no checkpoint has",
    "NotLinear": "likely `compress` is not linear in the gradient",
    "InPlace": "likely the rule writes into the gradient",
    "LongBases": "depend on the gradient's size",
    "Unasked": "write through step.store",
    "Replacing": "puts another tensor into its state as average",
    "Peeking": "likely the rule looks at a tensor's values",
    "Heavier": "likely the rule works otherwise on fake tensors",
    "OfItsPart": "ask the step for sums (Step.total, Step.mean)",
    "FirstRate": "likely the rule uses a learning rate of before",
    "NoDecay": "likely update_weight leaves the decay out",
    "TorchsNumbers": "likely the rule draws from torch's own generator",
}


@pytest.fixture(scope="module", autouse=True)
def _known_garbage() -> None:
    """Nothing that other tests have made is searched for garbage, again and again, by the check of plans."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _warm_pairs() -> Iterator[None]:
    """Two processes are forked from one that has imported all, and not started anew as `Pair` has it."""
    start_warm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "spawn", partial(multiprocessing.start_processes, start_method="forkserver"))
        yield


@pytest.fixture(scope="module")
def shipped() -> tuple[dict[str, Subject], Pair]:
    """Subjects by their names, and their two processes, which are started once for all."""
    subjects = {name: load_subject(name) for name in REGISTRY}
    return subjects, Pair(list(subjects.values()))


@pytest.fixture(scope="module")
def broken() -> tuple[dict[str, Subject], Pair]:
    subjects = {name: load_subject(f"{RULES}:{name}") for name in BROKEN}
    return subjects, Pair(list(subjects.values()))


# All rows of one check are neighbours, so that one worker has those of `processes`.
@pytest.mark.parametrize("row", REGISTRY)
@pytest.mark.parametrize("name", CHECKS)
def test_a_shipped_method_holds(row: str, name: str, shipped: tuple[dict[str, Subject], Pair]) -> None:
    subjects, pair = shipped
    finding = run_check(name, subjects[row], pair)
    assert finding.status == "ok", finding.line()


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_fails_the_check_of_what_it_breaks(rule: str, broken: tuple[dict[str, Subject], Pair]) -> None:
    subjects, pair = broken
    failed = {}
    for name in CHECKS:
        finding = run_check(name, subjects[rule], pair)
        if finding.status != "ok":
            failed[name] = finding.told
    assert tuple(failed) == BROKEN[rule], failed
    for name in BROKEN[rule][:1]:
        assert SAID[rule] in failed[name]


@pytest.mark.slow
def test_a_rule_that_raises_in_one_process_alone_keeps_no_other_from_its_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the two processes are started as a user's are."""
    monkeypatch.setattr(multiprocessing, "spawn", SPAWN)
    subjects = [load_subject(name) for name in (f"{RULES}:StopsAlone", "sgd")]
    pair = Pair(subjects, patience=5.0)
    first, second = (run_check("processes", subject, pair) for subject in subjects)
    assert first.status == "failed"
    assert "process 1: RuntimeError: no second part is known here (broken_rules.py, line " in first.told
    assert second.status == "ok"


@pytest.fixture
def leave_checks() -> Iterator[Callable[..., None]]:
    """Leave some of the checks. All come back in their order: put back one by one, they would come last."""
    kept = dict(CHECKS)

    def leave(*names: str) -> None:
        for name in kept.keys() - set(names):
            del CHECKS[name]

    yield leave
    CHECKS.clear()
    CHECKS.update(kept)


def asked(*words: str) -> Result:
    return CliRunner().invoke(cli.cli, ["check-method", *words], standalone_mode=False)


def test_the_command_prints_a_line_a_check_and_fails_where_one_does(leave_checks: Callable[..., None]) -> None:
    leave_checks("gradients", "state")
    assert "processes" not in CHECKS
    result = asked("galore_adamw", "--rank", "4")
    assert result.return_value == 0
    first, second = result.stdout.splitlines()
    assert first == "gradients    ok"
    assert second.startswith("state        ok          bytes a weight, of 115,776: ")
    result = asked(f"{RULES}:InPlace", "--optim-option", "beta=0.5")
    assert result.return_value == 1
    assert result.stdout.startswith("gradients    FAILED      the gradient of embed_tokens.weight after an update: ")
    result = asked(f"{RULES}:Replacing", "--json")
    assert result.return_value == 1
    told = json.loads(result.stdout)["checks"]
    assert [told[name]["status"] for name in told] == ["ok", "failed"]


def test_json_is_all_that_is_printed(leave_checks: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    """MKL complains on standard output of what is not finite, where a basis is found by SVD."""
    leave_checks("plan", "skipping")
    words = ["check-method", "galore_adamw", "--numerics", "reference", "--json"]
    assert cli.cli.main(args=words, standalone_mode=False) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["checks"]["skipping"]["status"] == "ok"
    assert "profiler" not in printed.err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["lora"], "lora is a way to build a model"),
        (["adamv"], "did you mean adam"),
        (["adamw", "--rank", "4"], "rank 4 has no meaning for optimizer adamw"),
        (["galore_adamw", "--optim-option", "rank=4"], "it has a flag, --rank"),
        (["nowhere.py:Rule"], "nowhere.py cannot be loaded"),
        (["torch.optim:LBFGS"], "evaluates the loss itself"),
    ],
)
def test_what_a_run_would_refuse_is_refused(words: list[str], why: str) -> None:
    result = asked(*words)
    assert isinstance(result.exception, InputError)
    assert why in str(result.exception)


def test_what_cannot_be_checked_is_told(leave_checks: Callable[..., None]) -> None:
    leave_checks("plan")
    (finding,) = check_methods(["torch.optim:NAdam"])
    assert finding.line() == "plan         not checked what NAdam allocates is the class's own"


def test_a_method_that_raises_fails_with_what_it_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(subject: Subject) -> str:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(CHECKS, "state", raises)
    subject = load_subject("sgd")
    finding = run_check("state", subject, Pair([subject]))
    assert finding.status == "failed"
    assert finding.told.startswith("the method raises RuntimeError: no such luck (test_check.py, line ")


def pytest_run(folder: Path, *words: str, interpreter: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [interpreter, "-m", "pytest", "-p", "galore_pretrain.pytest_plug", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_pytest_makes_a_test_of_each_check(tmp_path: Path) -> None:
    words = ["--pyargs", check.__name__, "--method", f"{RULES}:InPlace", "--method", "sgd", "-k", "gradients or rate"]
    result = pytest_run(tmp_path, *words, interpreter=executable())
    assert result.returncode == 1, result.stdout
    assert "1 failed, 3 passed" in result.stdout
    assert "likely the rule writes into the gradient" in result.stdout


@pytest.mark.parametrize(
    ("methods", "why"),
    [([], "no method to check: add --method METHOD"), (["lora"], "--method lora is a way to build a model")],
)
def test_pytest_says_what_is_missing(methods: list[str], why: str) -> None:
    config = SimpleNamespace(getoption=lambda name, default: methods)
    with pytest.raises(pytest.UsageError, match=why):
        check.pytest_generate_tests(SimpleNamespace(config=config))


def test_other_sessions_of_pytest_notice_nothing(tmp_path: Path) -> None:
    """They may have a --method of their own, and torch is not imported for them."""
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--method')\n")
    (tmp_path / "test_it.py").write_text(
        "import sys\ndef test_it(request):\n"
        "    assert request.config.getoption('method') == 'theirs'\n    assert 'torch' not in sys.modules\n"
    )
    result = pytest_run(tmp_path, "--method", "theirs")
    assert result.returncode == 0, result.stdout + result.stderr
