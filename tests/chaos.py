"""Runs that are killed with SIGKILL again and again, and must end as if nothing had happened.

    python tests/chaos.py FOLDER --kills 100
    python tests/chaos.py FOLDER --every-row both

Each row of `SCENARIOS` is run once undisturbed. Then it is started again and again, each time killed: at a random
moment, or at a random call of what a checkpoint, an evaluation, a backward pass, a line of metrics or the export
goes through. At last it is left alone. Its weights, its last checkpoint and its ``metrics.jsonl`` must be the
undisturbed run's, bit for bit, but for what a clock or the process's memory put there.

With ``--every-row`` each method is killed once, in both executions or in one, on packed and padded rows, of the sample
and of local files.

The command line is called as a user would, in a process of its own, forked from one that has torch imported already.
"""

import argparse
import functools
import gc
import itertools
import json
import logging
import math
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from conftest import TINY  # which also keeps hub, wandb and threads away
from galore_pretrain import cli, run
from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.optim.methods import METHODS
from galore_pretrain.rundir import checkpoint, directory, resume
from galore_pretrain.text.sources import open_source
from galore_pretrain.train import evaluate, metrics, trainer
from runs import MEASURED

COMMON = (
    "--data sample --steps 14 --total-batch-size 4 --max-length 48 --eval-tokens 600 --eval-every 5 --save-every 3 "
    "--dtype float32"
)
SHORT = COMMON.replace("--steps 14", "--steps 5").replace("--eval-every 5", "--eval-every 4")
SHORT = SHORT.replace("--eval-tokens 600", "--eval-tokens 200")
SCENARIOS = {
    "galore_adamw, layerwise sums": "--optim galore_adamw --rank 4 --update-proj-gap 5 --layerwise --batch-size 2",
    "galore_adamw8bit, layerwise, packed": "--optim galore_adamw8bit --rank 4 --update-proj-gap 3 --layerwise "
    "--batch-size 4 --layout pack",
    "natural_galore, bf16": "--optim natural_galore --rank 4 --update-proj-gap 4 --dtype bfloat16",
    "relora, dropout": "--optim relora --rank 4 --relora-every 4 --relora-warmup 1",
    "adamw, checkpointed, clipped": "--optim adamw --activation-checkpointing --grad-clip 1 --batch-size 2",
}
PLACES: dict[str, list[tuple[Any, str]]] = {
    "inside a save": [(checkpoint, "sync"), (os, "replace"), (checkpoint, "prune"), (checkpoint, "_checksums")],
    "inside an evaluation": [(evaluate, "token_losses")],
    "inside the update of a tensor": [(RuleOptimizer, "update_param")],
    "before or after a line of metrics": [(metrics.JsonLines, "log"), (metrics.JsonLines, "sync")],
    "between two updates": [(trainer.Trainer, "_advance")],
    "while going on": [(run, "restore"), (checkpoint, "opened")],
    "at the end": [(directory, "write_json"), (run, "export")],
}
"""Functions, a call of which kills the process: before it does anything, or when it is done."""
ANYWHERE, IN_BACKGROUND = "at a random moment", "saving in the background"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(owner: Any, name: str, call: int, *, done: bool) -> None:
    """Let the ``call``-th call of a function be the last thing that this process does."""
    function, calls = getattr(owner, name), [0]

    @functools.wraps(function)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not done:
            die()
        result = function(*args, **kwargs)
        if calls[0] == call:
            die()
        return result

    setattr(owner, name, deadly)


def save_in_background() -> None:
    """As if every save took longer than an update; each says on stderr that it began."""
    write = resume.Saver._write

    def slow(self: Any, *args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            print(IN_BACKGROUND, file=sys.stderr, flush=True)
        write(self, *args)
        self._taken = math.inf

    resume.Saver._write = slow  # type: ignore[method-assign]


def start(flags: list[str], log: Path, prepare: Callable[[], None]) -> int:
    """The command line in a forked process, ``prepare`` called in it first; its id."""
    if pid := os.fork():
        return pid
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        gc.freeze()
        run._planned_peak = lambda *_: None  # half the time of so small a run, and no part of what must survive
        prepare()
        sys.argv = ["galore-pretrain", *flags]
        cli.main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        traceback.print_exc()
    os._exit(99)


def ended(pid: int, after: float | None = None) -> int:
    """How it ended (-9: killed); ``after`` so many seconds it is killed."""
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def remains(output: Path) -> dict[str, Any]:
    """What two runs that are the same have in common."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    newest = checkpoint.newest(output / "checkpoints", set_aside=False)
    assert newest is not None
    last = newest.folder
    state = json.loads((last / "state.json").read_text())
    return {
        "metrics.jsonl": [{k: v for k, v in line.items() if k not in MEASURED} for line in lines],
        "state.json": {key: state[key] for key in ("trainer", "counts", "inputs")},
        **{
            f"{folder.name}: {name}": (str(tensor.dtype), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            for folder in (output / "model", last)
            for file in folder.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        },
    }


def attempt(flags: list[str], output: Path, prepare: Callable[[], None], after: float | None = None) -> int:
    """Start a run, and see that it goes on from the newest checkpoint that is there; how it ended."""
    found, log = checkpoint.newest(output / "checkpoints", set_aside=False), output.with_suffix(".log")
    log.unlink(missing_ok=True)
    code = ended(start([*flags, "--output", str(output)], log, prepare), after)
    said = log.read_text()
    assert code in (0, -9), said
    if "\nstep " in said or code == 0:
        step = found.state["trainer"]["step"] if found else 0
        assert (f"at update {step}" in said or "is finished" in said) if found else "going on from" not in said, said
    return code


def torment(name: str, folder: Path, kills: int, rng: random.Random, places: Iterator[str]) -> Counter[str]:
    """Kill one scenario's run so often, then let it end; where it was killed, and how often it saved in the background.
    AssertionError where it differs. ``places`` are struck one after another."""
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps(TINY))
    flags = ["--model", str(folder / "model.json"), *COMMON.split(), *SCENARIOS[name].split()]
    began = time.monotonic()
    assert attempt(flags, folder / "whole", lambda: None) == 0
    duration, deaths = time.monotonic() - began, Counter[str]()
    output, killed, where = folder / "killed", 0, next(places)
    for _ in range(20 * kills):
        background = rng.random() < 0.5
        if where in PLACES:
            owner, function = PLACES[where][deaths[where] % len(PLACES[where])]
            call, done = int(math.exp(rng.uniform(0, math.log(60)))), rng.random() < 0.5
            deadly, after = functools.partial(kill_at, owner, function, call, done=done), None
        else:
            deadly, after = (lambda: None), rng.uniform(0, duration)

        def prepare(deadly: Callable[[], None] = deadly, background: bool = background) -> None:
            deadly()
            if background:
                save_in_background()

        code = attempt(flags, output, prepare, after)
        deaths[IN_BACKGROUND] += IN_BACKGROUND in output.with_suffix(".log").read_text()
        if code == -9:
            deaths[where] += 1
            killed += 1
            if killed == kills:
                break
        # It went through without meeting its end, or was over before: it must not be before its next kill.
        elif (output / "summary.json").exists():
            compare(folder)
            os.rename(output, folder / f"killed-{killed}-{time.monotonic_ns()}")
        where = next(places)  # some can only be struck when there is something to go on from
    assert attempt(flags, output, lambda: None) == 0
    compare(folder)
    assert killed == kills, deaths
    return deaths


def every_row(folder: Path, *, both: bool) -> int:
    """How many runs were killed before their fifth update, gone on with from their third, and found to be the same.
    Bases are made every second update: what goes on has those of before, and makes others.

    Each row has two runs if ``both`` executions are asked for, else one, layerwise and global in turn. The model has
    one layer: of each kind of parameter, one.
    """
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps(TINY | {"num_hidden_layers": 1}))
    texts = [text for _, text in open_source("sample", "train").read(0, 0)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    executions = ("--layerwise", "--no-layerwise")
    runs = [(row, execution) for row in METHODS for execution in executions]
    if not both:
        runs = [(row, executions[i % 2]) for i, row in enumerate(METHODS)]
    for i, (row, execution) in enumerate(runs):
        flags = f"--model {folder / 'model.json'} {SHORT} --optim {row} {execution} --batch-size {2 + i // 2 % 2 * 2}"
        flags += " --layout pack" * (i // 4 % 2)
        if i // 8 % 2:
            flags = flags.replace("--data sample", f"--data {folder / 'text.jsonl'} --tokenizer sample")
        for flag, value in (("rank", 4), ("update_proj_gap", 2), ("relora_every", 2)):
            if flag in METHODS[row].options:
                flags += f" --{flag.replace('_', '-')} {value}"
        place = folder / f"{row}{execution}"
        place.mkdir()

        def deadly() -> None:
            resume.Saver._copied = lambda *_: None  # type: ignore[method-assign]  # else the last may not be written yet
            kill_at(trainer.Trainer, "_advance", 5, done=False)

        for output, prepare, expected in (
            ("whole", lambda: None, 0),
            ("killed", deadly, -9),
            ("killed", lambda: None, 0),
        ):
            assert attempt(flags.split(), place / output, prepare) == expected
        assert "at update 3" in (place / "killed.log").read_text()
        compare(place)
    return len(runs)


def compare(folder: Path) -> None:
    whole, killed = remains(folder / "whole"), remains(folder / "killed")
    assert whole.keys() == killed.keys(), (whole.keys(), killed.keys())
    for what in whole:
        assert whole[what] == killed[what], f"{folder}: {what} differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--every-row", choices=("once", "both"), help="each row in one execution, or in both")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.NOTSET)
    if arguments.every_row:
        print(json.dumps({"runs": every_row(arguments.folder, both=arguments.every_row == "both")}))
        return
    rng, total = random.Random(arguments.seed), Counter[str]()
    places = itertools.cycle(rng.sample([ANYWHERE, *PLACES], len(PLACES) + 1))
    for i, name in enumerate(SCENARIOS):
        kills = arguments.kills * (i + 1) // len(SCENARIOS) - arguments.kills * i // len(SCENARIOS)
        total += torment(name, arguments.folder / str(i), kills, rng, places)
        print(f"{name}: killed {kills} times, and ends as the undisturbed run does, bit for bit", flush=True)
    assert arguments.kills < 100 or total.keys() >= {ANYWHERE, IN_BACKGROUND, *PLACES}, total
    saved = total.pop(IN_BACKGROUND)
    print(json.dumps({"kills": total.total(), **total, f"runs {IN_BACKGROUND}": saved}))


if __name__ == "__main__":
    main()
