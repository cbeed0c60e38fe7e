"""Measure every goal of speed beside its peer: a table of goal, peer, this project, ratio, and whether it is met.

    make bench                                              # an hour; prints Markdown
    make bench BENCH='--only step text --rounds 3'          # a part of it
    make bench BENCH='--data corpus/ --tokenizer spiece.model'      # other text than the sample's

On CPUs alone, also where there is a GPU. Candidates run in fresh processes, one after another, round after round, so
that what else the machine does falls on all alike; figures are medians over the rounds (memory: of one run, which does
not vary), ratios those of medians. Peers: a Trainer of transformers, a loop by hand with torch's fused AdamW and this
project's own loss, bitsandbytes' and torch's optimizers.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

MODEL = "llama_60m"
RANK = 128
ROWS = 8
LENGTH = 256
TOKENS = ROWS * LENGTH  # of an update
WARM_UP = 3  # updates that are not counted
UPDATES = 8  # that are
SLOWEST = 20  # counted updates where the slowest is asked
PEER = "Trainer galore_adamw"
STAGGERED = "galore_adamw, staggered"
median = statistics.median


# -- the training step: each in a process of its own ------------------------------------------------------------------


def batches(options: argparse.Namespace) -> Iterator[Any]:
    """Return the packed batches that all candidates train on."""
    from galore_pretrain.text.batches import TokenRows, TrainingData
    from galore_pretrain.text.sources import open_source
    from galore_pretrain.text.tokenizer import load_tokenizer

    rows = TokenRows(load_tokenizer(options.tokenizer), "pack", LENGTH)
    source = open_source(options.data, "train")
    return iter(TrainingData(source, rows, ROWS, 0))


def ours(options: argparse.Namespace, *flags: str, optim: str = "galore_adamw") -> Any:
    """Run the real command line; what it waits for text is timed where it asks for it."""
    from galore_pretrain import cli, run

    waited: list[float] = []
    read_ahead = run.read_ahead  # type: ignore[attr-defined]

    def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        source = read_ahead(*args, **kwargs)
        while True:
            started = time.perf_counter()
            batch = next(source)
            waited.append(time.perf_counter() - started)
            yield batch

    run.read_ahead = timed  # type: ignore[attr-defined]
    output = options.folder / "run"
    values = {
        "model": MODEL,
        "optim": optim,
        "data": options.data,
        "tokenizer": options.tokenizer,
        "layout": "pack",
        "steps": WARM_UP + options.updates,
        "total-batch-size": ROWS,
        "batch-size": ROWS,
        "eval-every": 10_000,
        "save-every": 10_000,
        "eval-tokens": 1000,
        "lr": 0.001,
        "min-lr-ratio": 1,
        "warmup-steps": 0,
        "grad-clip": 0,
        "wandb": "disabled",
        "output": output,
    }
    if "galore" in optim:
        values["rank"] = RANK
    cli.cli.main([*words(values), *flags], standalone_mode=False)

    seconds = []
    losses = []
    for text in (output / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        seconds.append(TOKENS / line["tokens_per_second"])
        losses.append(line["loss"])
    share = sum(waited[WARM_UP:]) / sum(seconds[WARM_UP:])
    return {"seconds": seconds, "losses": losses, "waited": share}


def words(values: dict[str, Any]) -> list[str]:
    """Return the words of a command line that say ``values``."""
    found: list[str] = []
    for name, value in values.items():
        found += [f"--{name}", str(value)]
    return found


def by_hand(options: argparse.Namespace) -> Any:
    """Train in a loop such as anybody writes: torch's fused AdamW, the chunked loss of this project."""
    import torch

    from galore_pretrain.model.head import mean_loss
    from galore_pretrain.model.llama import build_model
    from galore_pretrain.model.llama_config import load_model_config

    model = build_model(load_model_config(MODEL), dtype=torch.bfloat16, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, weight_decay=0.0)
    seconds = []
    losses = []
    for batch in islice(batches(options), WARM_UP + options.updates):
        started = time.perf_counter()
        loss = mean_loss(model, batch.input_ids, batch.labels, batch.label_tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "losses": losses}


def trainer(options: argparse.Namespace, optim: str) -> Any:
    """Train with transformers' Trainer, with its own loss, on the same rows; weights in bf16 as here."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from galore_pretrain.model.llama import build_model
    from galore_pretrain.model.llama_config import load_model_config

    updates = WARM_UP + options.updates
    rows = []
    for batch in islice(batches(options), updates):
        for ids in batch.input_ids:
            rows.append({"input_ids": ids, "labels": ids})
    model = build_model(load_model_config(MODEL), dtype=torch.bfloat16, seed=0)
    model.set_attn_implementation("sdpa")
    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    galore: dict[str, Any] = {}
    if "galore" in optim:
        galore["optim_target_modules"] = ["attn", "mlp"]
        galore["optim_args"] = f"rank={RANK}, update_proj_gap=200, scale=0.25"
    arguments = TrainingArguments(
        output_dir=str(options.folder),
        per_device_train_batch_size=ROWS,
        max_steps=updates,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        optim=optim,
        max_grad_norm=0.0,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        lr_scheduler_type="constant",
        seed=0,
        **galore,
    )
    # The Trainer prints what it logs, and the last line of this process is its answer.
    with contextlib.redirect_stdout(sys.stderr):
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return {"seconds": seconds, "losses": losses}


STEP: dict[str, Callable[[argparse.Namespace], Any]] = {
    PEER: lambda o: trainer(o, "galore_adamw"),
    "by hand": by_hand,
    "galore_adamw": lambda o: ours(o, "--no-layerwise"),
    "scale": lambda o: ours(o, "--no-layerwise", optim="scale"),
    "galore_adamw, compiled": lambda o: ours(o, "--no-layerwise", "--compile"),
    "galore_adamw, together": lambda o: ours(o, "--no-layerwise", "--refresh", "together"),
    STAGGERED: lambda o: ours(o, "--no-layerwise"),
    "galore_adamw, layerwise": lambda o: ours(o, "--layerwise"),
    "galore_adamw, checkpointed": lambda o: ours(o, "--layerwise", "--activation-checkpointing"),
    "galore_adamw8bit, checkpointed": lambda o: ours(
        o, "--layerwise", "--activation-checkpointing", optim="galore_adamw8bit"
    ),
    "bfloat16, dense": lambda o: ours(o, "--no-layerwise"),
    "bfloat16, int8": lambda o: ours(o, "--no-layerwise", "--matmul", "int8"),
    "float32, dense": lambda o: ours(o, "--no-layerwise", "--dtype", "float32"),
    "float32, int8": lambda o: ours(o, "--no-layerwise", "--dtype", "float32", "--matmul", "int8"),
}
# The candidates of which memory alone is asked.
LEAN = (
    "galore_adamw, layerwise",
    "galore_adamw, checkpointed",
    "galore_adamw8bit, checkpointed",
)
# Those that products of 8-bit integers are asked of.
DTYPES = ("bfloat16", "float32")
MATMULS = tuple(f"{dtype}, {matmul}" for dtype in DTYPES for matmul in ("dense", "int8"))


def in_fresh_process(name: str, options: argparse.Namespace, *, memory: bool = False) -> Any:
    """Run one candidate in a process of its own; return what it measured."""
    updates = UPDATES
    if name == STAGGERED:
        updates = SLOWEST
    if memory:
        updates = 1
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "one": name,
            "data": options.data,
            "tokenizer": options.tokenizer,
            "updates": updates,
            "folder": folder,
        }
        command = [sys.executable, __file__, *words(values)]
        if memory:
            command.append("--memory")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def counted(run: Any) -> list[float]:
    """Return the seconds of the updates after the warm-up."""
    seconds: list[float] = run["seconds"]
    return seconds[WARM_UP:]


def steady_speed(runs: list[Any]) -> float:
    """Return tokens/s of an update: the median over the runs, of each of which the median counts."""
    speeds = []
    for run in runs:
        seconds = median(counted(run))
        speeds.append(TOKENS / seconds)
    return median(speeds)


def speed_with_a_refresh(runs: list[Any]) -> float:
    """Return tokens/s of eight updates and one refresh of all bases: the median over the runs."""
    # A process's first update renews all bases. What it takes longer than others is the refresh, and the first use of
    # libraries, which is in the figure for both sides.
    speeds = []
    for run in runs:
        first = run["seconds"][0]
        longer = max(0.0, first - median(counted(run)))
        speeds.append(UPDATES * TOKENS / (sum(counted(run)) + longer))
    return median(speeds)


def mean_loss_of(runs: list[Any]) -> float:
    """Return the mean loss of the updates after the warm-up: the median over the runs."""
    means = []
    for run in runs:
        losses = run["losses"][WARM_UP:]
        means.append(sum(losses) / UPDATES)
    return median(means)


def slowest_over_median(runs: list[Any]) -> float:
    """Return how many times the median update the slowest takes, each update being the median over the runs."""
    # Update by update over the runs first: what else the machine does makes a different one slow each time.
    updates = []
    for i in range(1, len(runs[0]["seconds"])):
        updates.append(median(run["seconds"][i] for run in runs))
    return max(updates) / median(updates)


def step(options: argparse.Namespace, table: "Table") -> None:
    """Measure the training step, whole runs of each candidate in turn."""
    names = [name for name in STEP if name not in LEAN + MATMULS]
    runs = defaultdict(list)
    for _ in range(options.rounds):
        for name in names:
            runs[name].append(in_fresh_process(name, options))
    steady = {name: steady_speed(runs[name]) for name in names}

    own = steady["galore_adamw"]
    table.step_ms = 1000 * TOKENS / own
    by_hand = "a loop by hand, fused AdamW"
    table.line(f"step, tokens/s, against {by_hand}", steady["by hand"], own, ">= 1")
    table.line(f"step of scale, tokens/s, against {by_hand}", steady["by hand"], steady["scale"], ">= 1.05")
    table.line(f"step, tokens/s, against {PEER}", steady[PEER], own, "")
    their_first = speed_with_a_refresh(runs[PEER])
    our_first = speed_with_a_refresh(runs["galore_adamw, together"])
    table.line("the same, with one refresh of all in 8 updates", their_first, our_first, "")
    table.line("the same with --compile", steady[PEER], steady["galore_adamw, compiled"], "")

    losses = []
    speeds = []
    for name in names:
        speeds.append(f"{name} {steady[name]:.0f}")
        if name != STAGGERED:  # which makes more updates than the others
            losses.append(f"{name} {mean_loss_of(runs[name]):.3f}")
    table.note(f"Mean loss of updates {WARM_UP + 1} to {WARM_UP + UPDATES}: {', '.join(losses)}.")
    table.note(f"Tokens/s: {', '.join(speeds)}.")
    staggered = runs[STAGGERED]
    updates = len(staggered[0]["seconds"]) - 1
    slowest = slowest_over_median(staggered)
    table.line(f"slowest of {updates} updates over the median, staggered, T = 200", 1.0, slowest, "<= 1.1")
    waited = 100 * median(run["waited"] for run in runs["galore_adamw"])
    table.line("share of a step that waits for text, %", 1.0, waited, "<= 1")


def memory(options: argparse.Namespace, table: "Table") -> None:
    """Measure what torch's allocator gives out, from before there is a model to the end of four updates."""
    peer = in_fresh_process(PEER, options, memory=True)["peak"]
    for name in ("galore_adamw", *LEAN):
        peak = in_fresh_process(name, options, memory=True)["peak"]
        wanted = "<= 0.4" if "checkpointed" in name else "<= 0.45"
        table.line(f"memory, MiB, {name}, against {PEER}", peer / 2**20, peak / 2**20, wanted)


# -- products of 8-bit integers ---------------------------------------------------------------------------------------


def int8(options: argparse.Namespace, table: "Table") -> None:
    """Measure products of 8-bit integers beside dense ones: alone, and in a step with ``--matmul int8``."""
    import torch

    from galore_pretrain.tensors.products import has_fast_bf16

    rates = product_rates(options.rounds)
    for dtype in DTYPES:
        table.line(f"products of int8 alone, GOP/s, against {dtype}", rates[dtype], rates["int8"], "")
    runs = defaultdict(list)
    for _ in range(options.rounds):
        for name in MATMULS:
            runs[name].append(in_fresh_process(name, options))
    wanted = "" if has_fast_bf16(torch.device("cpu")) else ">= 1.5"
    for dtype in DTYPES:
        dense = steady_speed(runs[f"{dtype}, dense"])
        quantized = steady_speed(runs[f"{dtype}, int8"])
        table.line(f"step in {dtype}, tokens/s, --matmul int8 against dense", dense, quantized, wanted)
    losses = [f"{name} {mean_loss_of(runs[name]):.3f}" for name in MATMULS]
    table.note(f"Mean loss of updates {WARM_UP + 1} to {WARM_UP + UPDATES}: {', '.join(losses)}.")


def product_rates(rounds: int) -> dict[str, float]:
    """Return the 10⁹ operations a second of each dtype's products: of a layer's matrices by all tokens of an update."""
    import torch

    from galore_pretrain.model.llama_config import load_model_config

    shape = load_model_config(MODEL)
    width, inner = shape.hidden_size, shape.intermediate_size
    factors: dict[str, list[Any]] = {"int8": [], "float32": [], "bfloat16": []}
    operations = 0
    for rows, columns in ((width, width), (inner, width), (width, inner)):
        operations += 2 * TOKENS * rows * columns
        left = torch.randint(-127, 128, (TOKENS, columns)).float()
        right = torch.randint(-127, 128, (rows, columns)).float()
        for dtype, pairs in factors.items():
            kind = getattr(torch, dtype)
            pairs.append((left.to(kind), right.to(kind).T))
    multiply = {"int8": torch._int_mm, "float32": torch.mm, "bfloat16": torch.mm}
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(1 + 5 * rounds):
        for dtype, pairs in factors.items():
            started = time.perf_counter()
            for pair in pairs:
                multiply[dtype](*pair)
            times[dtype].append(time.perf_counter() - started)
    return {dtype: operations / median(values[1:]) / 1e9 for dtype, values in times.items()}


# -- the optimizer alone ----------------------------------------------------------------------------------------------


def optimizer(options: argparse.Namespace, table: "Table") -> None:
    """Measure the optimizer's step alone, on random gradients."""
    warnings.simplefilter("ignore")
    for size in ("60m", "130m"):
        ms = optimizer_times(size, options.rounds)
        goal = f"{size}: galore_adamw's update, to nearest, ms, against its floor"
        table.line(goal, ms["floor"], ms["nearest"], "<= 1.4")
        table.line(f"{size}: the same, against fused AdamW", ms["fused"], ms["nearest"], "")
        if size == "60m" and table.step_ms is not None:
            goal = "60m: what stochastic rounding adds, ms, against a step of 8 × 256"
            table.line(goal, table.step_ms, ms["stochastic"] - ms["nearest"], "<= 0.1")
        for row in ("adamw8bit", "galore_adamw8bit"):
            goal = f"{size}: {row}'s update, ms, against bitsandbytes' AdamW8bit"
            table.line(goal, ms["bitsandbytes"], ms[row], "<= 1")


class Floor:
    """Does what no update of GaLore can leave out: projects, makes fused AdamW's step in low rank, and projects back.

    All is in bf16, to nearest. ``matrices`` are projected on their shorter side, to ``rank``; ``rest`` is not.
    """

    def __init__(self, matrices: list[Any], rest: list[Any], rank: int) -> None:
        import torch

        self.bases = []
        for matrix in matrices:
            m, n = matrix.shape
            size = (rank, n) if m >= n else (m, rank)
            basis = (torch.randn(size) / min(m, n) ** 0.5).bfloat16()
            low = torch.zeros((m, rank) if m >= n else (rank, n)).bfloat16().requires_grad_()
            self.bases.append((matrix, basis, low))
        lows = [low for _, _, low in self.bases]
        self.adamw = torch.optim.AdamW(lows + rest, lr=1e-6, fused=True)

    def step(self) -> None:
        """Make one update of the gradients at hand."""
        import torch

        for matrix, basis, low in self.bases:
            is_right = matrix.shape[0] >= matrix.shape[1]
            low.grad = matrix.grad @ basis.T if is_right else basis.T @ matrix.grad
        self.adamw.step()
        with torch.no_grad():
            for matrix, basis, low in self.bases:
                is_right = matrix.shape[0] >= matrix.shape[1]
                if is_right:
                    matrix.addmm_(low, basis)
                else:
                    matrix.addmm_(basis, low)


def optimizer_times(size: str, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a step of each optimizer, over the shapes of a model: medians over the rounds."""
    import torch
    from bench_optimizers import RANKS, _bitsandbytes, seconds, shapes

    from galore_pretrain.optim import RuleOptimizer
    from galore_pretrain.optim.build import build_rules

    def weights(tensor_shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        tensors = []
        for shape in tensor_shapes:
            numbers = torch.randn(shape).mul_(0.02)
            tensors.append(numbers.bfloat16().requires_grad_())
        return tensors

    def own(row: str, rounding: str) -> RuleOptimizer:
        projection: dict[str, Any] = {}
        if "galore" in row:
            projection = {"rank": RANKS[size], "update_proj_gap": 10**6, "refresh": "together"}
        rule, bare = build_rules(row, "sound", **projection)
        groups = [{"params": matrices, "rule": rule}, {"params": rest, "rule": bare}]
        return RuleOptimizer(groups, lr=1e-6, rounding=rounding)

    torch.manual_seed(0)
    matrix_shapes, other_shapes = shapes(size)
    matrices = weights(matrix_shapes)
    rest = weights(other_shapes)
    both = matrices + rest
    grads = {p: (torch.randn(p.shape) * 1e-3).bfloat16() for p in both}
    optimizers = {
        "floor": Floor(matrices, rest, RANKS[size]),
        "fused": torch.optim.AdamW(both, lr=1e-6, fused=True),
        "nearest": own("galore_adamw", "nearest"),
        "stochastic": own("galore_adamw", "stochastic"),
        "bitsandbytes": _bitsandbytes(both),
        "adamw8bit": own("adamw8bit", "stochastic"),
        "galore_adamw8bit": own("galore_adamw8bit", "stochastic"),
    }
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(2 + rounds):
        for name, candidate in optimizers.items():
            times[name].append(1000 * seconds(candidate, grads, torch.device("cpu")))
    # The first two steps set up states and, with a projection, bases.
    return {name: median(values[2:]) for name, values in times.items()}


# -- text and start ---------------------------------------------------------------------------------------------------


def text(options: argparse.Namespace, table: "Table") -> None:
    """Measure one thread, and the waiting of a consumer that takes a million tokens a second, as a GPU would."""
    for layout, bound in (("pack", 4.0), ("pad", 3.0)):
        rates = []
        for _ in range(options.rounds):
            rates.append(text_rate(options, layout))
        table.line(f"text, {layout}, million tokens/s of one core", bound, median(rates), ">= 1")
    for rows in (8, 512):
        share = waiting_share(options, rows)
        table.line(f"waiting at a million tokens/s, {rows} × {LENGTH} a step, %", 1.0, 100 * share, "<= 1")


def training_data(options: argparse.Namespace, layout: str, rows: int) -> Any:
    """Return the training text in batches of so many rows."""
    from galore_pretrain.text.batches import TokenRows, TrainingData
    from galore_pretrain.text.sources import open_source
    from galore_pretrain.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    return TrainingData(open_source(options.data, "train"), TokenRows(tokenizer, layout, LENGTH), rows, 0)


def text_rate(options: argparse.Namespace, layout: str) -> float:
    """Return the million tokens/s that one thread makes, over two seconds."""
    stream = iter(training_data(options, layout, 64))
    started = time.perf_counter()
    tokens = 0
    while time.perf_counter() - started < 2:
        tokens += next(stream).tokens
    return tokens / (time.perf_counter() - started) / 1e6


def waiting_share(options: argparse.Namespace, rows: int) -> float:
    """Return the share of its time in which a consumer of a million tokens/s waits, over four seconds."""
    from galore_pretrain.text.batches import read_ahead

    ahead = read_ahead(training_data(options, "pack", rows), pin=False)
    next(ahead)
    time.sleep(0.5)  # in which the thread that reads ahead fills its queue
    waited = 0.0
    began = time.perf_counter()
    while time.perf_counter() - began < 4:
        started = time.perf_counter()
        batch = next(ahead)
        waited += time.perf_counter() - started
        time.sleep(batch.tokens / 1e6)  # what a GPU would take, which leaves the interpreter alone
    ahead.close()
    return waited / (time.perf_counter() - began)


def first_update(options: argparse.Namespace) -> float:
    """Return the seconds from the command to the line of the first update."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        values = {
            "model": MODEL,
            "data": options.data,
            "tokenizer": options.tokenizer,
            "rank": RANK,
            "steps": 2,
            "total-batch-size": 1,
            "eval-tokens": 1000,
            "wandb": "disabled",
            "output": output,
        }
        command = [sys.executable, "-m", "galore_pretrain", *words(values)]
        metrics = output / "metrics.jsonl"
        seconds = None
        began = time.perf_counter()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while seconds is None and process.poll() is None:
                time.sleep(0.01)
                if metrics.exists() and metrics.stat().st_size > 0:
                    seconds = time.perf_counter() - began
            _, errors = process.communicate()
        if process.returncode != 0 or seconds is None:
            sys.exit(f"start: {errors[-3000:]}")
    return seconds


def start(options: argparse.Namespace, table: "Table") -> None:
    """Measure how long a command takes to begin its work, and what it loads that it has no use for."""
    helps = []
    firsts = []
    for _ in range(options.rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "galore_pretrain", "--help"], capture_output=True, check=True)
        helps.append(time.perf_counter() - began)
        firsts.append(first_update(options))
    table.line("start: from command to first update, s", 8.0, median(firsts), "<= 1")
    table.line("start: --help, s", 0.4, median(helps), "<= 1")
    code = (
        "import sys; from galore_pretrain.cli import cli; cli.main(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'wandb', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "plan", "--model", MODEL, "--data", "sample"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *_, loaded = done.stdout.splitlines()
    table.note(f"Of wandb and datasets, `plan` loads {loaded}.")


# -- two layers of 7B -------------------------------------------------------------------------------------------------


def seven(options: argparse.Namespace, table: "Table") -> None:
    """Measure two layers of 7B: galore_adamw8bit, rank 1024."""
    # A step of 512 × 256 tokens would take an hour: it is put together by arithmetic from what a few updates take. It
    # has 128 micro-batches of 4 × 256, forward and backward of each. Layerwise updates add the gradients of all but the
    # first to their sums. The rest of an update is there once, and the bases once in 500 updates.
    import torch
    from bench_growth import BASE, gathering, measured, two_layers_of

    from galore_pretrain.config.resolve import resolve

    values: dict[str, Any] = BASE | {
        "model": two_layers_of("llama_7b"),
        "optim": "galore_adamw8bit",
        "rank": 1024,
        "batch_size": 4,
        "total_batch_size": 4,
    }
    config, _ = resolve(values, dict.fromkeys(values, "flag"))
    a = torch.randn(2048, 4096).bfloat16()
    b = torch.randn(4096, 4096).bfloat16()
    peaks = []
    rounds = []
    for _ in range(3):
        for _ in range(3):
            started = time.perf_counter()
            a @ b
            peaks.append(2 * 2048 * 4096 * 4096 / (time.perf_counter() - started))
        rounds.append(measured(config, 2))
    passes, update, bases, _ = map(median, zip(*rounds, strict=True))
    peak = median(peaks)
    speed = flop_of_passes(config.model, 4 * LENGTH) / passes
    table.line("7B, two layers: forward and backward, GFLOP/s, against the peak", peak / 1e9, speed / 1e9, ">= 0.6")

    adding = gathering(config, 3)
    micro_batches = 512 // 4
    own = update + (micro_batches - 1) * adding + bases / 500
    goal = "7B: update, sums and bases, s of a step of 512 × 256 of two layers"
    table.line(goal, micro_batches * passes + own, own, "<= 0.3")
    table.note(
        f"7B, two layers, embeddings and head: forward and backward of 4 × 256 tokens {passes:.2f} s, adding their "
        f"gradients {adding:.2f} s, an update {update:.2f} s, all 14 bases {bases:.2f} s."
    )


def flop_of_passes(model: str, tokens: int) -> int:
    """Return the arithmetic of forward and backward of so many tokens, in rows of 256."""
    # Two FLOP a weight and token forward, four backward; embeddings are looked up. Attention's two products of a layer,
    # scores and their mean of values, take 4 h FLOP for each pair of positions forward, three times that in all.
    from galore_pretrain.model.llama_config import load_model_config

    shape = load_model_config(model)
    h = shape.hidden_size
    i = shape.intermediate_size
    layers = shape.num_hidden_layers
    weights = layers * (4 * h * h + 3 * h * i) + h * shape.vocab_size
    attention = 12 * layers * h * LENGTH * tokens
    return 6 * weights * tokens + attention


# -- the table --------------------------------------------------------------------------------------------------------


class Table:
    """Lines of goal, peer (or bound), this project, ratio, and whether the ratio is as wanted."""

    step_ms: float | None = None  # of galore_adamw, where it was measured

    def __init__(self) -> None:
        self.notes: list[str] = []
        print("| goal | peer, or bound | here | ratio | wanted | met |")
        print("|---|---|---|---|---|---|", flush=True)

    def line(self, goal: str, peer: float, here: float, wanted: str) -> None:
        """Print a line; ``wanted`` bounds the ratio here / peer, as ">= 1.25" or "<= 1", and may be empty."""
        ratio = here / peer
        met = ""
        if wanted:
            sign, bound = wanted.split()
            is_met = ratio >= float(bound) if sign == ">=" else ratio <= float(bound)
            met = "yes" if is_met else "**no**"
        print(f"| {goal} | {peer:.4g} | {here:.4g} | {ratio:.3g} | {wanted} | {met} |", flush=True)

    def note(self, text: str) -> None:
        """Keep a paragraph for the end."""
        self.notes.append(text)


PARTS = {
    "step": step,
    "memory": memory,
    "int8": int8,
    "optimizer": optimizer,
    "text": text,
    "start": start,
    "seven": seven,
}


def print_machine(options: argparse.Namespace) -> None:
    """Print what is measured, where, on what text, and with which versions."""
    import torch

    packages = ("torch", "transformers", "accelerate", "galore-torch", "bitsandbytes")
    versions = [f"{package} {metadata.version(package)}" for package in packages]
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{MODEL}, bf16, {ROWS} × {LENGTH} tokens, rank {RANK}; {machine}; {', '.join(versions)}")
    date = time.strftime("%Y-%m-%d")
    text = f"{Path(options.data).name}, tokenizer {Path(options.tokenizer).name}"
    print(f"{date}, medians of {options.rounds}; text: {text}. `wanted`: of the ratio, here / peer\n")


def check_text(options: argparse.Namespace) -> None:
    """Exit where the text or the tokenizer cannot be opened, before an hour of measuring."""
    from galore_pretrain.errors import InputError
    from galore_pretrain.text.sources import open_source
    from galore_pretrain.text.tokenizer import load_tokenizer

    try:
        open_source(options.data, "train")
        load_tokenizer(options.tokenizer)
    except InputError as error:
        sys.exit(f"Error: {error}")


def measure_one(options: argparse.Namespace) -> Any:
    """Run one candidate of the step in this process; return what it measured, or its peak of memory in bytes."""
    candidate = STEP[options.one]
    if not options.memory:
        return candidate(options)
    from galore_pretrain.tensors.ledger import allocated_peak

    return {"peak": allocated_peak(lambda: candidate(options))}


def main() -> None:
    """Print the table, or measure the one candidate that another process asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only_help = "parts of the table; seven: two layers of llama_7b"
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help=only_help)
    parser.add_argument("--rounds", type=int, choices=range(1, 100), default=5, metavar="N", help="5 by default")
    parser.add_argument("--data", default="sample", help="as of galore-pretrain: sample by default")
    parser.add_argument("--tokenizer", default="sample", help="as of galore-pretrain: sample by default")
    parser.add_argument("--one", choices=list(STEP), help=argparse.SUPPRESS)
    parser.add_argument("--updates", type=int, default=UPDATES, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.one:
        print(json.dumps(measure_one(options)))
        return
    check_text(options)
    print_machine(options)
    table = Table()
    for name in options.only:
        PARTS[name](options, table)
    print("\n" + "\n\n".join(table.notes))


if __name__ == "__main__":
    main()
