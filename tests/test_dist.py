"""Several processes are the same program: the curves of one, checkpoints that any number of them reads, and an end.

All by gloo on this machine and the real command line: those that are only compared are forked from a process that has
imported all, and torchrun starts those that end, or are lost, by a Python that has (warm_python.py), in all tests but
one. ``FULL=1`` (``make dist``) runs every optimizer in every way to share it, by two and by four processes; CI a part
of that.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed import TCPStore

from galore_pretrain.dist import imagined
from galore_pretrain.errors import InputError
from galore_pretrain.optim.methods import METHODS
from galore_pretrain.planning.traffic import count
from galore_pretrain.rundir.directory import RunDirectory
from messages import config_of
from runs import COMMAND_LINE, command, lines, python, start
from warm_python import UNPLANNED, executable

FULL = bool(os.environ.get("FULL"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TOLERANCES = {row: 1e-3 for row in METHODS if METHODS[row].moments_8bit} | {"natural_galore8bit": 1e-2}
"""Of rows whose state is in blocks of 256, which begin anew in each part. Natural GaLore's system of equations
magnifies what its history is off by. (On the same gradients, shards.py asks for the same bits where blocks align.)"""
WAYS = [(m, "--shard", s) for m, s in itertools.product(("--layerwise", "--no-layerwise"), ("full", "hybrid", "none"))]
ALIKE = ("adam", "q_apollo_mini", "natural_galore8bit", "low_rank_adamw8bit", "lora", "lora_adamw8bit")
"""Rows whose curves by two processes are tried with ``FULL=1`` alone. Each is made of rules of rows that are tried, and
shards.py compares its updates by value."""
PROJECTED = ("--layerwise", "--shard", "none", "--reduce", "projected")
PROJECTING = {2: ("galore_adamw8bit", "natural_galore"), 4: ("galore_adamw",)}
COMPILED = ("--layerwise", "--compile")


def torchrun(
    processes: int, *arguments: str, interpreter: str | None = None, launch: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """What torchrun comes to, which starts its processes by the same interpreter: one that has imported all already."""
    words = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv-endpoint", "localhost:0"]
    words += ["--rdzv-backend", "c10d", *launch, *arguments]
    return subprocess.run(
        [interpreter or executable(), *words],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env=ENVIRONMENT | {UNPLANNED: "1"},
    )


def flags(model: str, output: Path, *more: str) -> list[str]:
    """Of a run of 3 updates, of 8 rows each: bases are made twice, and factors merged between two updates."""
    changed = {"--steps": "3", "--total-batch-size": "8", "--save-every": "100", "--eval-every": "100"}
    changed |= {"--update-proj-gap": "2", "--eval-tokens": "600", "--max-length": "32"}
    words = command(model, output, *more)[3:]
    for name, value in changed.items():
        words[words.index(name) + 1] = value
    return [*words, "--batch-size", "2"]


def of_row(row: str) -> list[str]:
    """A rank means nothing to some, nor an interval of bases."""
    if row not in METHODS:
        return ["--rank", "--update-proj-gap"]
    return [f"--{flag.replace('_', '-')}" for flag in ("rank", "update_proj_gap") if flag not in METHODS[row].options]


def forked(processes: int, module: str, folder: Path, *arguments: str) -> str:
    """What the first process prints, of so many that run a module of tests/ with what torchrun would tell them."""
    codes, said = ended(processes, f"import {module}; {module}.main()", folder, *arguments)
    assert codes == [0] * processes, said[-5000:]
    return (folder / "0.out").read_text()


# torchrun's own process keeps the store in which processes meet, and so does this one here: it is there for a process
# that goes on after the first one has ended.
def ended(processes: int, script: str, folder: Path, *arguments: str) -> tuple[list[int | None], str]:
    """The exit codes of so many processes that execute ``script`` as if torchrun had started them, and their stderr."""
    environment = ENVIRONMENT
    if processes > 1:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        environment = ENVIRONMENT | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    all_started, logs = [], []
    for rank in range(processes):
        number = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        output, log = (folder / f"{rank}.{kind}" for kind in ("out", "err"))
        for file in (output, log):
            file.unlink(missing_ok=True)
        logs.append(log)
        all_started.append(start(script, *arguments, stdout=output, stderr=log, env=environment | number))
    for process in all_started:
        process.join(600)
    codes = [process.exitcode for process in all_started]
    for process in all_started:
        process.kill()  # one that hangs
        process.join()
    return codes, "".join(log.read_text() for log in logs)


UNTOLD = "from galore_pretrain import cli; cli._REPORT_WAIT = 0.0; "
"""Begins a script for `ended`: no torchrun ends the process that leaves an error to another, so it need not wait."""


def run_all(processes: int, cases: dict[Path, list[str]], folder: Path) -> None:
    """The cases, one after another, by so many processes."""
    file = folder / f"cases-{processes}.json"
    file.write_text(json.dumps(list(cases.values())))
    forked(processes, "worlds", folder, str(file))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def case(model: str, output: Path, row: str, *more: str) -> list[str]:
    words = flags(model, output, "--optim", row, *more)
    for name in of_row(row):
        del words[(i := words.index(name)) : i + 2]
    if row in METHODS and any("weights" in recipe.values for recipe in METHODS[row].recipes):
        words += ["--weights", "dense"]  # codes are one process's
    return words + (["--relora-every", "2"] if "relora" in row else [])


def compare(one: Path, other: Path, tolerance: float) -> str | None:
    """What is amiss."""
    ours, theirs = lines(one), lines(other)
    apart = max(
        abs(a[key] - b[key]) for a, b in zip(ours, theirs, strict=True) for key in ("loss", "eval_loss") if key in a
    )
    same = [
        [(line["step"], line["tokens_seen"]) for line in run]
        + [json.loads((folder / "summary.json").read_text())[f"{what}_bytes"] for what in ("weights", "optimizer")]
        for run, folder in ((ours, one), (theirs, other))
    ]
    return None if apart < tolerance and same[0] == same[1] else f"{other.name}: {apart:.1e} (bound {tolerance:g})"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_curves_are_those_of_one_process(processes: int, tiny_config: str, tmp_path: Path) -> None:
    """Also: replicas and bases are equal bit for bit (worlds.py), and the validation loss does not depend on who
    computed it. By two processes, each way meets one micro-batch and two, and models of one layer and of two."""
    rows = [*METHODS] if FULL else [row for row in METHODS if row not in ALIKE]
    if processes == 4 and not FULL:
        rows = ["galore_adamw", "galore_adamw8bit", "adafactor", "relora"]
    shallow = tmp_path / "shallow.json"
    shallow.write_text(json.dumps(json.loads(Path(tiny_config).read_text()) | {"num_hidden_layers": 1}))
    alone, shared, alone_cases, shared_cases = {}, {}, {}, {}
    for i, row in enumerate(rows):
        model = str(shallow) if i // 6 % 2 else tiny_config
        at_once = ("--batch-size", "4") if processes == 2 and (i + i // 6) % 2 else ("--batch-size", "2")
        alone[row] = tmp_path / row
        alone_cases[alone[row]] = [*case(model, alone[row], row), *at_once]
        ways = WAYS if FULL else [WAYS[(i + processes // 2) % 6]]
        ways = [*ways, PROJECTED] if row in PROJECTING[processes] or ("galore" in row and FULL) else ways
        ways = [*ways, COMPILED] if row == "galore_adamw" and processes == 2 else ways
        for way in ways:
            path = shared[(row, *way)] = tmp_path / "-".join((row, *way))
            parts = ("--batch-size", "2") if way == PROJECTED and processes == 2 else at_once  # two a process
            shared_cases[path] = [*case(model, path, row, *way), *parts]
    run_all(1, alone_cases, tmp_path)
    run_all(processes, shared_cases, tmp_path)
    found = [compare(alone[k[0]], path, TOLERANCES.get(k[0], 1e-5)) for k, path in shared.items()]
    assert not [words for words in found if words]


@pytest.mark.slow
def test_rules_of_one_s_own_are_those_of_one_process(tiny_config: str, tmp_path: Path) -> None:
    """One that looks at elements, one at rows, one at whole matrices (own_rules.py), by 2 processes that share all."""
    rows = ("own_sign", "own_rows", "own_newton")
    alone, shared = ({row: tmp_path / f"{row}-{n}" for row in rows} for n in (1, 2))
    run_all(1, {path: case(tiny_config, path, row, "--layerwise") for row, path in alone.items()}, tmp_path)
    run_all(2, {path: case(tiny_config, path, row, "--layerwise") for row, path in shared.items()}, tmp_path)
    assert not [words for row in rows if (words := compare(alone[row], shared[row], 1e-5))]


OWN = Path(__file__).parent / "own_methods.py"


@pytest.mark.slow
def test_methods_of_files_are_those_of_one_process(tiny_config: str, tmp_path: Path) -> None:
    """A class of torch's, one of one's own, and a rule around GaLore, which is the shipped row that it repeats."""
    rate = ("--lr", "0.003")
    low_rank = ("--rank", "4", "--update-proj-gap", "2")
    own = {
        "lion": (f"{OWN}:Lion", *rate),
        "adagrad": ("torch.optim:Adagrad", *rate),
        "own_fira": (f"{OWN}:Fira", *rate, *low_rank),
    }
    alone = {tmp_path / f"{name}-1": words for name, words in own.items()}
    alone[tmp_path / "fira"] = ("fira", *rate)
    shared = {tmp_path / f"{name}-2": words for name, words in own.items()}
    run_all(1, {path: case(tiny_config, path, *words) for path, words in alone.items()}, tmp_path)
    run_all(2, {path: case(tiny_config, path, *words) for path, words in shared.items()}, tmp_path)
    found = [compare(tmp_path / f"{name}-1", tmp_path / f"{name}-2", 1e-5) for name in own]
    found.append(compare(tmp_path / "fira", tmp_path / "own_fira-1", 1e-5))
    assert not [words for words in found if words]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "code", "told"),
    [
        ("raises.py:Lion", 2, "--optim raises.py cannot be loaded: RuntimeError: no luck (raises.py, line 2)"),
        (
            f"{OWN}:RaisesWhenMade",
            2,
            f"--optim {OWN}:RaisesWhenMade: the rule cannot be made: KeyError: 'b' (own_methods.py, ",
        ),
        (f"{OWN}:RaisesLater", 1, "ArithmeticError: it does not add up (--debug shows where)"),
        ("torch.optim:LBFGS", 2, "--optim torch.optim:LBFGS: LBFGS evaluates the loss itself (closure)"),
    ],
    ids=["at import", "when made", "at the first update", "refused"],
)
def test_what_every_process_finds_in_a_method_is_told_once(
    method: str, code: int, told: str, tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of them, and all end."""
    monkeypatch.chdir(tmp_path)
    Path("raises.py").write_text("\nraise RuntimeError('no luck')")
    words = case(tiny_config, tmp_path / "run", method, "--lr", "0.003")
    codes, said = ended(2, UNTOLD + COMMAND_LINE, tmp_path, *words)
    assert codes == [code] * 2, said
    (line,) = [line for line in said.splitlines() if "Error: " in line]
    assert f"Error: {told}" in line


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_updates_of_parts_are_those_of_the_whole(processes: int, tmp_path: Path) -> None:
    """On prescribed gradients, of every row; in 8 bits, bit for bit where blocks align (shards.py)."""
    forked(processes, "shards", tmp_path)


@pytest.mark.slow
def test_messages_are_those_of_the_plan(tiny_config: str, tmp_path: Path) -> None:
    """What four processes on two hosts send in an update, and for bases; reducing projected gradients sends less."""
    deeper = tmp_path / "deeper.json"  # than what the plan counts
    deeper.write_text(json.dumps(json.loads(Path(tiny_config).read_text()) | {"num_hidden_layers": 3}))
    rows = "galore_adafactor"  # which sends the most kinds of messages
    sent = json.loads(forked(4, "messages", tmp_path, str(deeper), rows, "4"))
    for name, real in sent.items():
        row, shard, reduce = name.split()
        config = config_of(str(deeper), row, shard, reduce, 4)
        with imagined(config) as mesh:
            planned = count(config, mesh)
        kinds = {
            f"{kind} {far}": size * (1000 if kind in ("gather", "broadcast") else 1)  # T
            for (kind, far), size in planned.sent.items()
        }
        assert kinds == pytest.approx(real, rel=1e-6), name
    full, projected = (sent[f"galore_adafactor none {reduce}"]["all-reduce True"] for reduce in ("full", "projected"))
    assert projected < full / 3  # one reduction an update instead of three, and of matrices an eighth


ELASTIC = {"galore_adamw": 1e-5, "adafactor": 1e-5, "relora": 1e-5, "natural_galore8bit": 1e-2}
if FULL:  # which the last has too, beside a history
    ELASTIC["galore_adamw8bit"] = 1e-3


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tiny_config: str, tmp_path: Path) -> None:
    """Saved by four, gone on with by four, two and one: the curve of one. With as many as before, bit for bit, unless
    state is in blocks, which are put together and taken apart. One layerwise micro-batch a process knows the full norm;
    several do not, and are then run otherwise."""
    shallow = tmp_path / "shallow.json"
    shallow.write_text(json.dumps(json.loads(Path(tiny_config).read_text()) | {"num_hidden_layers": 1}))

    def words(row: str, output: Path, *more: str) -> list[str]:
        clipped = ["--grad-clip", "0.5"] if row == "galore_adamw" else []
        longer = ("--steps", "5", "--save-every", "3", "--eval-every", "3")
        return [*case(str(shallow), output, row, "--keep", "9", *more, *clipped), *longer]

    modes = dict(zip(ELASTIC, itertools.cycle(("--layerwise", "--no-layerwise")), strict=False))
    run_all(1, {tmp_path / f"{row}-1": words(row, tmp_path / f"{row}-1") for row in modes}, tmp_path)
    run_all(4, {tmp_path / f"{r}-4": words(r, tmp_path / f"{r}-4", mode) for r, mode in modes.items()}, tmp_path)
    for processes in (4, 2, 1):
        again = {}
        for row in modes:
            folder = tmp_path / f"{row}-4-{processes}"
            shutil.copytree(tmp_path / f"{row}-4", folder)
            (folder / "summary.json").unlink()
            shutil.rmtree(folder / "checkpoints" / "step_00000005")
            again[folder] = words(row, folder)
        run_all(processes, again, tmp_path)
        found = [
            compare(tmp_path / f"{row}-1", tmp_path / f"{row}-4-{processes}", bound) for row, bound in ELASTIC.items()
        ]
        assert not [what for what in found if what], processes
    for row in ("galore_adamw", "adafactor", "relora"):
        assert lines(tmp_path / f"{row}-4-4") == lines(tmp_path / f"{row}-4")


FIRST = 'self.world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"'
LOSING = """
import os, signal, sys, time
from galore_pretrain import cli
from galore_pretrain.train import trainer
step = trainer.Trainer.train_step
def losing(self, batch):
    if self.state.step == 6 and {}:
        {}
    return step(self, batch)
trainer.Trainer.train_step = losing
sys.argv = ["galore-pretrain", *sys.argv[1:]]
cli.main()
"""


LATE = """
import os, sys, time
from galore_pretrain import cli
if os.environ["RANK"] == "0":
    time.sleep(3)
sys.argv = ["galore-pretrain", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.slow
def test_a_process_is_killed_and_torchrun_starts_all_again(tiny_config: str, tmp_path: Path) -> None:
    """They go on from the newest checkpoint, to the curve of a run that nothing disturbed. All begin as a user's do."""
    script = tmp_path / "losing.py"
    script.write_text(LOSING.format(FIRST, "os.kill(os.getpid(), signal.SIGKILL)"))
    words = ["--total-batch-size", "8", "--layerwise"]
    run_all(2, {tmp_path / "whole": command(tiny_config, tmp_path / "whole", *words)[3:]}, tmp_path)
    arguments = command(tiny_config, tmp_path / "lost", *words)[3:]
    done = torchrun(2, str(script), *arguments, interpreter=sys.executable, launch=("--max-restarts", "1"))
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Error: another process has ended, or not answered for --distributed-timeout 600 s" in done.stderr
    assert "at update 4" in done.stderr
    assert lines(tmp_path / "lost") == lines(tmp_path / "whole")


AGENT = "import os; os.environ['AGENT'] = str(os.getpid()); from torch.distributed.run import main; main()"


def agent(host: int, port: int, log: Path, *arguments: str) -> subprocess.Popen[str]:
    """torchrun of two processes, as on one of two hosts; the first keeps the place where they meet. Its processes know
    its number by AGENT."""
    words = ["--nnodes", "2", "--nproc_per_node", "2", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", f"is_host={host == 1},keep_alive_interval=1"]
    environment = {**ENVIRONMENT, "HOST": str(host), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as slurm.sh has it
    environment |= {UNPLANNED: "1"}
    with log.open("w") as stderr:
        return subprocess.Popen([executable(), "-c", AGENT, *words, *arguments], stderr=stderr, env=environment)


@pytest.mark.slow
def test_one_of_two_hosts_is_lost_and_comes_back(tiny_config: str, tmp_path: Path) -> None:
    """Two agents that meet on loopback, 2 replicas × 2 shards; the second is killed with its processes in the middle of
    an update, and started again. Both end, with the curve of one process."""
    script, mark = tmp_path / "losing.py", tmp_path / "lost"
    when = f'os.environ["HOST"] == "2" and not os.path.exists("{mark}")'
    what = f'open("{mark}", "w").close(); os.kill(int(os.environ["AGENT"]), 9); os.kill(os.getpid(), 9)'
    script.write_text(LOSING.format(when, what))
    row = "galore_adamw"
    longer = ("--steps", "8", "--save-every", "4")
    run_all(1, {tmp_path / "one": case(tiny_config, tmp_path / "one", row, *longer)}, tmp_path)
    arguments = case(tiny_config, tmp_path / "two", row, *longer, "--shard", "hybrid", *PROJECTED[3:])
    port = free_port()
    logs = [tmp_path / f"{name}.log" for name in ("first", "second", "back")]
    hosts = [agent(1 + (i > 0), port, log, str(script), *arguments) for i, log in enumerate(logs[:2])]
    try:
        lost = hosts[1].wait(300)
        assert lost == -signal.SIGKILL, logs[1].read_text()
        time.sleep(5)  # until the first knows, by three heartbeats that did not come
        hosts.append(agent(2, port, logs[2], str(script), *arguments))
        assert [host.wait(300) for host in (hosts[0], hosts[2])] == [0, 0], [log.read_text() for log in logs]
    finally:
        for host in hosts:
            host.kill()
    assert "at update 4" in logs[0].read_text() + logs[2].read_text()
    assert not compare(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.mark.slow
def test_a_process_that_hangs_ends_all(tiny_config: str, tmp_path: Path) -> None:
    script = tmp_path / "losing.py"
    mark = tmp_path / "it hangs"
    script.write_text(LOSING.format(FIRST, f"open({str(mark)!r}, 'w').close(); time.sleep(8)"))
    started = time.monotonic()
    words = ["--total-batch-size", "8", "--distributed-timeout", "5"]
    done = torchrun(2, str(script), *command(tiny_config, tmp_path / "run", *words)[3:])
    assert done.returncode == 1
    assert mark.exists(), done.stderr
    assert "Error: another process has ended, or not answered for --distributed-timeout 5 s" in done.stderr
    assert time.monotonic() - started < 90  # torchrun gives the one that hangs 30 s to end


@pytest.mark.slow
def test_a_signal_stops_all_after_the_same_update(tiny_config: str, tmp_path: Path) -> None:
    """Though one process alone gets it; what one says, all do. A refusal is printed once, however late."""
    script = tmp_path / "losing.py"
    script.write_text(LOSING.format(FIRST, "os.kill(os.getpid(), signal.SIGTERM)"))
    arguments = command(tiny_config, tmp_path / "run", "--total-batch-size", "8")[3:]
    stopped = torchrun(2, str(script), *arguments)
    assert stopped.returncode == 1  # torchrun's own
    assert "stopped after update 7; the same command" in stopped.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000007").is_dir()
    late = tmp_path / "late.py"
    late.write_text(LATE)
    refused = torchrun(2, str(late), *arguments, "--total-batch-size", "7")
    assert "Error: --total-batch-size 7 is not a multiple of the 2 processes; give 8" in refused.stderr
    assert refused.stderr.count("Error: --") == 1, refused.stderr
    chinese = tmp_path / "chinese.jsonl"
    chinese.write_text("".join(json.dumps({"text": f"{i} 从前有一个人住在河边的小村子里"}) + "\n" for i in range(200)))
    arguments = flags(tiny_config, tmp_path / "refused", "--tokenizer", "sample")
    arguments[arguments.index("--data") + 1] = str(chinese)
    codes, said = ended(2, UNTOLD + COMMAND_LINE, tmp_path, *arguments)
    assert codes == [2, 2], said
    assert said.count("are unknown to --tokenizer sample") == 1, said
    assert not (tmp_path / "refused").exists()


def test_what_is_not_for_several_processes(tmp_path: Path) -> None:
    """Each would do all of the work. And a folder that a process does not see is not one to save in."""
    told = {**ENVIRONMENT, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    for words in (["sweep", "lr", "--model", "llama_1m"], ["plan", "--model", "llama_1m"], ["report", "runs"]):
        refused = python(COMMAND_LINE, *words, env=told)
        assert refused.stderr == f"Error: {words[0]} is one process's work: start it without torchrun\n"
        assert refused.returncode == 2
    with pytest.raises(InputError, match="all hosts must share it"):
        RunDirectory(tmp_path).check_shared()


@pytest.mark.slow
def test_odd_shapes_and_tied_embeddings(tmp_path: Path) -> None:
    """Columns that cannot be dealt out, rows that come out uneven; and one tensor under two names is exported once."""
    model = tmp_path / "odd.json"
    shape = {"hidden_size": 40, "intermediate_size": 97, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"vocab_size": 1027, "max_position_embeddings": 64}
    model.write_text(json.dumps(shape | {"tie_word_embeddings": True}))
    batch = ("--total-batch-size", "6", "--batch-size", "1")
    rows = ("galore_adamw", "galore_adafactor", "relora")
    for processes in (1, 3):
        folders = {row: tmp_path / f"{row}-{processes}" for row in rows}
        cases = {folder: [*case(str(model), folder, row), *batch] for row, folder in folders.items()}
        run_all(processes, cases, tmp_path)
    assert not [what for r in rows if (what := compare(tmp_path / f"{r}-1", tmp_path / f"{r}-3", 2e-5))]
    for row in rows:
        ours, theirs = (load_file(tmp_path / f"{row}-{n}" / "model" / "model.safetensors") for n in (1, 3))
        assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
        assert "lm_head.weight" not in ours


READING = """
import os, sys
from galore_pretrain import cli
from galore_pretrain.text import batches
from galore_pretrain.errors import InputError
stack, read = batches.stack, []
def reading(*given):
    read.append(stack(*given))
    if os.environ["RANK"] == "1" and len(read) == 6:
        {}
    return read[-1]
batches.stack = reading
rows = batches.TokenRows.__call__
def other(self, documents, *share):
    differs = {} and bool(share) and os.environ["RANK"] == "1"
    changed = ((a, text + "!" * (differs and i == 45), b) for i, (a, text, b) in enumerate(documents))
    return rows(self, changed, *share)
batches.TokenRows.__call__ = other
sys.argv = ["galore-pretrain", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.slow
def test_what_one_process_finds_ends_all(tiny_config: str, tmp_path: Path) -> None:
    """With a checkpoint, and at once."""
    script = tmp_path / "reading.py"
    script.write_text(READING.format("raise InputError('text.jsonl line 7 cannot be read')", False))
    words = ["--total-batch-size", "8", "--eval-every", "100", "--save-every", "100"]
    done = torchrun(2, str(script), *command(tiny_config, tmp_path / "run", *words)[3:])
    assert done.returncode == 1  # torchrun's own
    (line,) = [line for line in done.stderr.splitlines() if "Error: " in line and "elastic" not in line]
    assert "[process 1] Error: text.jsonl line 7 cannot be read" in line
    assert (tmp_path / "run" / "checkpoints" / "step_00000005").is_dir()


@pytest.mark.slow
def test_texts_that_differ_end_all(tiny_config: str, tmp_path: Path) -> None:
    words = ["--total-batch-size", "8", "--eval-every", "100", "--save-every", "100"]
    arguments = command(tiny_config, tmp_path / "run", *words)[3:]
    codes, said = ended(2, UNTOLD + READING.format("pass", True), tmp_path, *arguments)
    assert codes == [2, 2], said
    (line,) = [line for line in said.splitlines() if "Error: " in line]
    assert "Error: the processes do not read the same text" in line
    assert (tmp_path / "run" / "checkpoints" / "step_00000005").is_dir()


ASKED = """
import os, signal
from galore_pretrain import cli
from galore_pretrain.errors import InputError
from galore_pretrain.train import metrics
cli._REPORT_WAIT = 99.0
def asked():
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
close = metrics.JsonLines.close
def closing(self):
    {}
    return close(self)
metrics.JsonLines.close = closing
"""


@pytest.mark.slow
@pytest.mark.parametrize(("sooner", "later"), [("asked(); ", "pass"), ("", "asked()")], ids=["as it fails", "after it"])
def test_a_process_that_is_asked_to_end_leaves_the_error_to_another(
    sooner: str, later: str, tiny_config: str, tmp_path: Path
) -> None:
    """torchrun's signal comes while the first process ends by the second one's error: it is not sent again."""
    arguments = command(tiny_config, tmp_path / "run", "--total-batch-size", "8")[3:]
    fails = f"{sooner}raise InputError('the text is no text', reported_by=1)"
    codes, said = ended(2, ASKED.format(later) + LOSING.format(True, fails), tmp_path, *arguments)
    assert codes == [2, 2], said
    assert said.count("Error: the text is no text") == 1, said


def test_replicas_clip_by_the_norm_of_the_sum(tmp_path: Path) -> None:
    """Where norms are found as on a GPU: before the sum over replicas, a gradient's own norm is of this one alone."""
    told = json.loads(forked(2, "replicas", tmp_path))
    for dtype in ("torch.float32", "torch.bfloat16"):
        first, second = told[dtype]
        assert first == second
        assert first[0] == [16.0, 64.0, 144.0]  # 4 elements squared, each 1 + 3, times 1, 4 and 9


@pytest.mark.slow
def test_products_by_int8_are_those_of_one_process(tiny_config: str, tmp_path: Path) -> None:
    """Each process quantizes what it gathers. Scales along the tokens are those of a micro-batch, of which each process
    has others: so the curves agree to the rounding of 8 bits."""
    words = ("--optim", "galore_adamw", "--matmul", "int8")
    alone = tmp_path / "one"
    ways = [("--layerwise", "--shard", "full"), ("--no-layerwise", "--shard", "none")]
    shared = {tmp_path / "-".join(way): way for way in ways}
    run_all(1, {alone: flags(tiny_config, alone, *words)}, tmp_path)
    run_all(2, {path: flags(tiny_config, path, *words, *way) for path, way in shared.items()}, tmp_path)
    found = [compare(alone, path, 5e-3) for path in shared]
    assert not [told for told in found if told]
    first = [lines(path)[0]["loss"] for path in (alone, *shared)]
    assert max(first) - min(first) < 1e-5  # of the forward pass alone, whose scales are each token's own
