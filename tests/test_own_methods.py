"""Methods from outside the package through the command line: what is executed, what is refused, and runs of them."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from galore_pretrain.cli import cli
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError
from galore_pretrain.optim import METHODS, build_optimizer, load_method, method
from galore_pretrain.optim.build import rules_by_role
from galore_pretrain.optim.methods import Companion
from own_methods import LION

FILE = (
    LION
    + '''
"""Methods of one's own."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from galore_pretrain.optim import Direction, GaLore, UpdateRule
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.compositions import Composition
from galore_pretrain.optim.methods import Companion, Method, Recipe

with Path("executed").open("a") as note:
    note.write("once ")


@dataclass(frozen=True)
class SignSGD(UpdateRule):
    sharpness: float = 1.0

    def init(self, like, shard=None):
        return {}

    def update(self, grad, state, step):
        return Direction(torch.tanh(self.sharpness * 1e4 * grad))


@dataclass(frozen=True)
class Residual(GaLore):
    """Fira's idea, in a few lines: what is outside of the subspace is added as it is."""

    share: float = 0.1

    @property
    def projects(self):
        return False

    def compress(self, grad, state, step):
        return grad

    def update(self, grad, state, step):
        low = super().compress(grad, state, step)
        left, right = self.bases(state)
        back = left @ low if right is None else low @ right
        rest = (grad - back).sign() * self.share
        return super().update(low, state, step) + Direction(rest)


residual = Method(
    name="residual", description="GaLore and the sign of the rest", home=":inside", companion="adamw",
    companions={"head": Companion(":SignSGD", lr_scale=0.1)}, options=("rank", "update_proj_gap", "betas"),
    recipes=(Recipe({"lr": 0.003}, "made up"),),
)
inside = Composition(Residual(Adam()), Residual(Adam()))


@dataclass(frozen=True)
class Raises(UpdateRule):
    def init(self, like, shard=None):
        return {}

    def update(self, grad, state, step):
        raise ArithmeticError("it does not add up")


@dataclass(frozen=True)
class Square(SignSGD):
    def init(self, like, shard=None):
        if like.ndim != 2:
            raise ValueError("matrices only")
        return {}


@dataclass(frozen=True)
class Unmade(SignSGD):
    table: int = field(default_factory=lambda: {}["b"])


@dataclass(frozen=True)
class NotSquare(SignSGD):
    def init(self, like, shard=None):
        if like.shape[0] == like.shape[-1]:
            raise ArithmeticError("it is square")
        return {}


class Loose(UpdateRule):
    def init(self, like, shard=None):
        return {}

    def update(self, grad, state, step):
        return Direction(grad)


number = 3
'''
)
SMALL = {
    "vocab_size": 1024, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "hidden_act": "silu", "model_type": "llama",
}  # fmt: skip
WORDS = """
    --model=small.json --data=sample --dtype=float32 --total-batch-size=4 --max-length=32 --eval-tokens=500
    --save-every=4 --wandb=disabled
"""
FLAGS = WORDS.split()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a file of methods and a small model. What is loaded from it is forgotten afterwards."""
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget()


def forget() -> None:
    """Let the files be executed anew, as in another process."""
    from galore_pretrain.optim import own

    own._modules.clear()
    for name in [name for name in METHODS if ":" in name]:
        del METHODS[name]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words), catch_exceptions=True)


def error_of(*words: str) -> str:
    """What a command that is refused says."""
    result = invoke(*words)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


def ran(*words: str) -> str:
    """What is printed by a command that has to succeed."""
    result = invoke(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def executed() -> int:
    """How often the file was executed."""
    file = Path("executed")
    return len(file.read_text().split()) if file.exists() else 0


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "mine.py:number",
            "--optim mine.py:number: int is no method: name an UpdateRule, a Composition, a torch.optim",
        ),
        ("mine.py:nothing", "--optim mine.py has no 'nothing'; it has "),
        ("none.py:Lion", "--optim none.py cannot be loaded: FileNotFoundError: no such file; write FILE.py:NAME"),
        ("raises.py:Lion", "--optim raises.py cannot be loaded: RuntimeError: no luck (raises.py, line 2)"),
        ("torch.optim:LBFGS", "--optim torch.optim:LBFGS: LBFGS evaluates the loss itself (closure)"),
        ("no_such_package.optim:Lion", "--optim no_such_package.optim cannot be loaded: ModuleNotFoundError"),
        (
            "mine.py:Raises",
            "--optim mine.py:Raises cannot update a 6 × 8 matrix: ArithmeticError: it does not add up (mi",
        ),
        ("mine.py:Unmade", "--optim mine.py:Unmade: the rule cannot be made: KeyError: 'b' (mine.py, line"),
        (
            "mine.py:NotSquare",
            "--optim mine.py:NotSquare cannot update a 256 × 256 matrix: ArithmeticError: it is square (mine.py, line",
        ),
        ("mine.py:Loose", "--optim mine.py:Loose: Loose must be a dataclass: write @dataclass(frozen=True) above"),
    ],
)
def test_what_is_no_method_is_refused_with_the_reason(name: str, words: str) -> None:
    Path("raises.py").write_text("\nraise RuntimeError('no luck')")
    assert error_of(*FLAGS, "--optim", name, "--lr", "0.01", "--steps", "2").startswith(words)


@pytest.mark.usefixtures("home")
def test_a_rate_is_asked_for_and_options_are_checked() -> None:
    lion = [*FLAGS, "--optim", "mine.py:Lion", "--steps", "2"]
    assert error_of(*lion) == "--lr is missing: --optim mine.py:Lion has no recipe for it; give one, such as 0.001"
    sign = [*FLAGS, "--optim", "mine.py:SignSGD", "--steps", "2", "--lr", "0.01"]
    assert "optimizer mine.py:SignSGD has no option sharp; it has sharpness" in error_of(
        *sign, "--optim-option", "sharp=2"
    )
    assert "sharpness 'much' must be a number" in error_of(*sign, "--optim-option", "sharpness=much")
    assert "sharpness is given twice" in error_of(*sign, *["--optim-option", "sharpness=1"] * 2)
    assert "it has a flag, --betas" in error_of(*lion, "--lr", "0.01", "--optim-option", "betas=(0.5,0.6)")
    assert "--rank 4 has no meaning for --optim mine.py:SignSGD" in error_of(*sign, "--rank", "4")
    assert "--optim-option lr: it has a flag, --lr" in error_of(*sign, "--optim-option", "lr=1")
    sgd = [*FLAGS, "--optim", "torch.optim:SGD", "--steps", "2", "--lr", "0.01"]
    assert "Nesterov momentum requires a momentum" in error_of(*sgd, "--optim-option", "nesterov=True")
    misspelt = invoke(*sign, "--optim-option", "sharpness")
    assert "'sharpness' is not a setting; write beta=0.9" in misspelt.output


@pytest.mark.usefixtures("home")
def test_only_what_a_command_line_names_is_executed() -> None:
    """Not what a config, a sweep's file or a resumed run's config names, unless the command line allows it."""
    Path("run.json").write_text(
        json.dumps({"model": "small.json", "data": "sample", "optim": "mine.py:Lion", "lr": 0.01})
    )
    refusal = "--optim mine.py:Lion stands in run.json, and a file is executed only where this command line names it: "
    assert error_of("--config", "run.json", "--steps", "2") == refusal + "add --optim mine.py:Lion, or --allow-code"
    Path("sweep.json").write_text(json.dumps({"runs": {"lion": {"optim": "mine.py:Lion", "lr": 0.01}}}))
    sweep = ["sweep", "sweep.json", *FLAGS, "--steps=2", "--plan-only"]
    assert "--optim mine.py:Lion stands in a file" in error_of(*sweep)
    Path("sly.json").write_text(Path("run.json").read_text().replace("}", ', "allow_code": true}'))
    assert "sly.json sets allow_code, which only a command line can" in error_of("--config", "sly.json", "--steps", "2")
    # What a run JSON sets for a sweep was not typed either; nor is a key that hides a flag in itself a flag.
    Path("plain.json").write_text(json.dumps({"runs": {"a": {"lr": 0.001}}}))
    by_file = ["--config", "run.json", "--steps=2", "--plan-only"]
    assert "stands in a file" in error_of("sweep", "plain.json", *by_file)
    named = {"model": "small.json", "data": "sample", "optim": "mine.py:Lion"}
    Path("only.json").write_text(json.dumps(named))
    assert "stands in a file" in error_of("sweep", "lr", "--config", "only.json", "--steps=2", "--plan-only")
    Path("allows.json").write_text(json.dumps({"model": "small.json", "data": "sample", "allow_code": True}))
    allowed = ["--config", "allows.json", "--steps=2", "--plan-only"]
    assert "allows.json sets allow_code" in error_of("sweep", "sweep.json", *allowed)
    for key, why in (("optim=mine.py:Lion", "is no flag of a run"), ("allow-code", "only a command line can have")):
        Path("hidden.json").write_text(json.dumps({"runs": {"a": {"optim": "adamw", key: True}}}))
        assert why in error_of("sweep", "hidden.json", *FLAGS, "--steps=2", "--plan-only")
    assert executed() == 0
    ran("plan", "--config", "run.json", "--steps", "2", "--allow-code", "--wandb=disabled")
    assert executed() == 1
    forget()
    ran(*sweep, "--allow-code")
    assert executed() == 2


@pytest.mark.usefixtures("home")
def test_a_run_of_ones_own_class_goes_on_and_what_reads_it_executes_nothing() -> None:
    words = [*FLAGS, "--optim", "mine.py:Lion", "--lr", "0.003", "--output", "run"]
    ran(*words, "--steps", "8")
    saved = json.loads(Path("run/config.json").read_text())
    assert len(saved["method_sha256"]) == 64
    assert saved["config"]["optim"]["value"] == "mine.py:Lion"
    forget()
    ran(*words, "--steps", "8", "--output", "other")
    losses = [json.loads(line).get("eval_loss") for line in Path("run/metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line).get("eval_loss") for line in Path("other/metrics.jsonl").read_text().splitlines()]
    assert losses == again
    forget()
    count = executed()
    for command in (
        ["eval", "run"],
        ["generate", "run", "a", "--tokens", "2"],
        ["export", "run", "exported"],
        ["report", "run"],
    ):
        ran(*command)
    assert executed() == count
    forget()
    with Path("mine.py").open("a") as file:
        file.write("\n# another file now\n")
    later = [*words, "--steps", "8", "--resume", "run/checkpoints/step_00000004", "--output", "third"]
    assert "was made with another method than there is now" in error_of(*later)
    forget()
    ran(*later, "--resume-with-changes")


@pytest.mark.usefixtures("home")
def test_a_method_says_its_companions_recipe_and_options(build_tiny: Any) -> None:
    entry = load_method("mine.py:residual")
    assert method("mine.py:residual") is entry
    assert (entry.home, entry.companion) == ("mine.py:inside", "adamw")
    assert entry.companions == {"head": Companion("mine.py:SignSGD", lr_scale=0.1)}
    ran(
        *FLAGS,
        "--optim",
        "mine.py:residual",
        "--rank",
        "4",
        "--update-proj-gap",
        "3",
        "--steps",
        "6",
        "--output",
        "run",
    )
    rules = rules_by_role("mine.py:residual", "sound", rank=4, share=0.5)
    assert (rules["matrix"].rank, rules["matrix"].share) == (4, 0.5)  # type: ignore[attr-defined]
    config = json.loads(Path("run/config.json").read_text())["config"]
    assert config["lr"] == {"value": 0.003, "origin": "recipe: made up"}
    optimizer = build_optimizer(build_tiny(), "mine.py:residual", lr=0.01, rank=4)
    kinds = {type(optimizer.rule_of(group["params"][0])).__name__ for group in optimizer.param_groups}
    assert kinds == {"Residual", "Adam", "SignSGD"}


@pytest.mark.usefixtures("home")
def test_a_rules_own_values_stay_unless_a_flag_is_given(build_tiny: Any) -> None:
    """No default or recipe of a shipped method replaces them; --moment-store exchanges its store, whichever it is."""
    with Path("mine.py").open("a") as file:
        file.write(
            "from galore_pretrain.optim.moments import Blockwise8bit\n"
            "tuned = GaLore(Adam(), rank=4, basis='svd', refresh='together', moments='project', update_proj_gap=7)\n"
            "small = Adam(store=Blockwise8bit())\n"
        )
    flags = [*FLAGS, "--optim", "mine.py:tuned", "--lr", "0.01", "--steps", "2"]
    ran(*flags, "--output", "run")
    config = json.loads(Path("run/config.json").read_text())["config"]
    names = ("rank", "basis", "refresh", "moments", "update_proj_gap")
    assert [config[name]["value"] for name in names] == [None] * 5
    rules = rules_by_role("mine.py:tuned", "sound", rank=3)
    assert (rules["matrix"].rank, rules["matrix"].basis) == (3, "svd")  # type: ignore[attr-defined]
    assert type(rules["rest"]).__name__ == "Adam"
    optimizer = build_optimizer(build_tiny(), "mine.py:tuned", lr=0.01, rank_by_module={"q": 0.5})
    assert len(optimizer.param_groups) == 3
    assert method("mine.py:tuned").projects
    dense = rules_by_role("mine.py:small", "sound", moment_store="dense")["matrix"]
    assert method("mine.py:small").moments_8bit
    assert all(tensor.dtype == torch.float32 for tensor in dense.init(torch.zeros(256, 256)).values())


@pytest.mark.usefixtures("home")
def test_a_run_of_a_file_in_another_folder_stays_in_runs() -> None:
    config, _ = resolve(
        {"model": "small.json", "data": "sample", "optim": f"{Path.cwd()}/mine.py:Lion", "lr": 0.01, "steps": 2}, {}
    )
    assert re.fullmatch(r"runs/small-mine.py-Lion-[\d-]+", config.output)


@pytest.mark.usefixtures("home")
def test_an_entry_of_ones_own_names_options_and_roles_that_there_are() -> None:
    with Path("mine.py").open("a") as file:
        file.write("typo = Method(name='a', description='', home=':SignSGD', options=('histry',))\n")
        file.write(
            "role = Method(name='a', description='', home=':SignSGD', companions={'norm': Companion('adamw')})\n"
        )
    with pytest.raises(ValueError, match="has the option histry, which is none of rank"):
        load_method("mine.py:typo")
    with pytest.raises(ValueError, match="has the role norm, which is none of embedding, head, vector"):
        load_method("mine.py:role")


@pytest.mark.usefixtures("home")
def test_a_rule_that_takes_matrices_alone_leaves_vectors_to_adamw(build_tiny: Any) -> None:
    for name in ("mine.py:Square", "torch.optim:Muon"):
        load_method(name)
        optimizer = build_optimizer(build_tiny(), name, lr=0.01)
        for group in optimizer.param_groups:
            vectors = [p.ndim < 2 for p in group["params"]]
            assert (type(optimizer.rule_of(group["params"][0])).__name__ == "Adam") == all(vectors) == any(vectors)


def test_a_tilde_is_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    ran("plan", *FLAGS, "--steps=2", "--lr=0.01", "--optim", "~/mine.py:Lion")
    assert executed() == 1


@pytest.mark.usefixtures("home")
def test_plans_and_comparisons_take_it_like_a_shipped_one() -> None:
    result = invoke("plan", *FLAGS, "--steps=2", "--lr=0.01", "--compare", "adamw,mine.py:Lion", "--json")
    plans = json.loads(result.stdout)
    assert plans.keys() == {"adamw", "mine.py:Lion"}
    moments = [plan["parts"]["moments"] for plan in plans.values()]
    assert moments[1] < 0.6 * moments[0]  # one moment, not two
    assert torch.is_grad_enabled()


def test_the_page_on_adding_a_method_leads_to_the_leaderboard(home: Path) -> None:
    """What it says to type is taken: the sweeps make their plans, and `leaderboard` knows its words."""
    page = (Path(__file__).parents[1] / "docs" / "adding-a-method.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (home / "mine.py").write_text(code)
    (block,) = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    first, echo, *lines = block.replace("\\\n", " ").splitlines()
    shared = first.removeprefix('flags="').removesuffix('"')
    (home / "sign.json").write_text(shlex.split(echo)[1])
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line.replace("$flags", shared).replace("BEST", "1"))
        assert words.pop(0) == "galore-pretrain"
        if words[0] == "sweep":
            planned = ran(*words, "--plan-only")
            assert planned.count("--optim mine.py:SignMomentum") == 3
        else:
            assert ran(*words, "--help").startswith("Usage: ")


def test_the_page_on_adding_a_method_leads_to_a_report(home: Path) -> None:
    """Its file and its commands as they stand there, but for the lengths."""
    page = (Path(__file__).parents[1] / "docs" / "adding-a-method.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (home / "mine.py").write_text(code)
    commands = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    lines = "".join(commands).replace("\\\n", " ").splitlines()
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("--steps 300", "--steps 3"))
        assert words.pop(0) == "galore-pretrain"
        if words[0] != "report":
            words += ["--max-length=32", "--eval-tokens=500", "--dtype=float32", "--wandb=disabled"]
        ran(*words)
    report = (home / "report" / "report.md").read_text()
    assert "mine.py:SignMomentum" in report
    assert "adamw" in report
