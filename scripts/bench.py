"""Every goal of speed beside its peer: one table of goal, peer, this project, ratio, and whether it is met.

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

MODEL, RANK, ROWS, LENGTH = "llama_60m", 128, 8, 256
WARM_UP, UPDATES, SLOWEST = 3, 8, 20  # SLOWEST: updates of which the slowest is asked
STAGGERED = "galore_adamw, staggered"
TOKENS = ROWS * LENGTH
median = statistics.median


# -- the training step: each in a process of its own ------------------------------------------------------------------


def batches(options: argparse.Namespace) -> Iterator[Any]:
    from galore_pretrain.text.batches import TokenRows, TrainingData
    from galore_pretrain.text.sources import open_source
    from galore_pretrain.text.tokenizer import load_tokenizer

    rows = TokenRows(load_tokenizer(options.tokenizer), "pack", LENGTH)
    return iter(TrainingData(open_source(options.data, "train"), rows, ROWS, 0))


def ours(options: argparse.Namespace, *flags: str, optim: str = "galore_adamw") -> Any:
    """The real command line; what it waits for text is timed where it asks for it."""
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
    words = ["--model", MODEL, "--optim", optim, "--data", options.data, "--tokenizer", options.tokenizer]
    words += ["--layout", "pack", "--steps", str(WARM_UP + options.updates), "--total-batch-size", str(ROWS)]
    words += ["--batch-size", str(ROWS), "--eval-every", "10000", "--save-every", "10000", "--eval-tokens", "1000"]
    words += ["--lr", "0.001", "--min-lr-ratio", "1", "--warmup-steps", "0", "--grad-clip", "0"]
    words += ["--wandb", "disabled", "--output", str(output), *flags]
    words += ["--rank", str(RANK)] if "galore" in optim else []
    cli.cli.main(words, standalone_mode=False)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [TOKENS / line["tokens_per_second"] for line in lines]
    return {
        "seconds": seconds,
        "losses": [line["loss"] for line in lines],
        "waited": sum(waited[WARM_UP:]) / sum(seconds[WARM_UP:]),
    }


def by_hand(options: argparse.Namespace) -> Any:
    """A loop such as anybody writes: torch's fused AdamW, the chunked loss of this project."""
    import torch

    from galore_pretrain.model.head import mean_loss
    from galore_pretrain.model.llama import build_model
    from galore_pretrain.model.llama_config import load_model_config

    model = build_model(load_model_config(MODEL), dtype=torch.bfloat16, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, weight_decay=0.0)
    seconds, losses = [], []
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
    """transformers' Trainer, with its own loss, on the same rows; weights in bf16 as here."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from galore_pretrain.model.llama import build_model
    from galore_pretrain.model.llama_config import load_model_config

    rows = [
        {"input_ids": ids, "labels": ids}
        for batch in islice(batches(options), WARM_UP + options.updates)
        for ids in batch.input_ids
    ]
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
            losses.extend([logs["loss"]] if "loss" in logs else [])

    galore = {"optim_target_modules": ["attn", "mlp"], "optim_args": f"rank={RANK}, update_proj_gap=200, scale=0.25"}
    arguments = TrainingArguments(
        output_dir=str(options.folder), per_device_train_batch_size=ROWS, max_steps=WARM_UP + options.updates,
        learning_rate=1e-3, logging_steps=1, report_to=[], save_strategy="no", optim=optim, max_grad_norm=0.0,
        weight_decay=0.0, train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, lr_scheduler_type="constant", seed=0,
        **(galore if "galore" in optim else {}),
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return {"seconds": seconds, "losses": losses}


STEP: dict[str, Callable[[argparse.Namespace], Any]] = {
    "Trainer galore_adamw": lambda o: trainer(o, "galore_adamw"),
    "by hand": by_hand,
    "galore_adamw": lambda o: ours(o, "--no-layerwise"),
    "galore_adamw, compiled": lambda o: ours(o, "--no-layerwise", "--compile"),
    "galore_adamw, together": lambda o: ours(o, "--no-layerwise", "--refresh", "together"),
    STAGGERED: lambda o: ours(o, "--no-layerwise"),
    "galore_adamw, layerwise": lambda o: ours(o, "--layerwise"),
    "galore_adamw, checkpointed": lambda o: ours(o, "--layerwise", "--activation-checkpointing"),
    "galore_adamw8bit, checkpointed": lambda o: ours(
        o, "--layerwise", "--activation-checkpointing", optim="galore_adamw8bit"
    ),
}
LEAN = tuple(name for name in STEP if "layerwise" in name or "checkpointed" in name)  # of which memory is asked


def in_fresh_process(name: str, options: argparse.Namespace, *, memory: bool = False) -> Any:
    command = [sys.executable, __file__, "--one", name, "--data", options.data, "--tokenizer", options.tokenizer]
    command += ["--updates", str(1 if memory else SLOWEST if name == STAGGERED else UPDATES)]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--folder", folder, *["--memory"] * memory]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def step(options: argparse.Namespace, table: "Table") -> None:
    found = defaultdict(list)
    for _ in range(options.rounds):
        for name in (name for name in STEP if name not in LEAN):
            found[name].append(in_fresh_process(name, options))

    def steady(name: str) -> float:
        return median(TOKENS / median(run["seconds"][WARM_UP:]) for run in found[name])

    def from_the_first(name: str) -> float:
        """Tokens/s of eight updates and what a process's first, which renews all bases, takes longer: the first use of
        libraries is in it too, for both."""
        return median(UPDATES * TOKENS / (sum(run["seconds"][WARM_UP:]) + _first(run)) for run in found[name])

    def _first(run: Any) -> float:
        return max(0.0, run["seconds"][0] - median(run["seconds"][WARM_UP:]))

    peer, hand, own = (steady(name) for name in ("Trainer galore_adamw", "by hand", "galore_adamw"))
    table.line("step, tokens/s, against Trainer galore_adamw", peer, own, ">= 1.25")
    first = [from_the_first(name) for name in ("Trainer galore_adamw", "galore_adamw, together")]
    table.line("the same, with one refresh of all in 8 updates", *first, ">= 1.5")
    table.line("the same with --compile", peer, steady("galore_adamw, compiled"), ">= 1.6")
    table.line("step, tokens/s, against a loop by hand, fused AdamW", hand, own, ">= 0.97")
    table.step_ms = 1000 * TOKENS / own
    low, high = WARM_UP + 1, WARM_UP + UPDATES
    losses = {n: median(sum(run["losses"][WARM_UP:]) / UPDATES for run in found[n]) for n in found if n != STAGGERED}
    table.note(f"Mean loss of updates {low} to {high}: {', '.join(f'{n} {v:.3f}' for n, v in losses.items())}.")
    table.note("Tokens/s: " + ", ".join(f"{n} {steady(n):.0f}" for n in found) + ".")
    updates = [median(values) for values in zip(*(run["seconds"][1:] for run in found[STAGGERED]), strict=True)]
    slowest = max(updates) / median(updates)
    table.line(f"slowest of {len(updates)} updates over the median, staggered, T = 200", 1.0, slowest, "<= 1.1")
    waited = 100 * median(run["waited"] for run in found["galore_adamw"])
    table.line("share of a step that waits for text, %", 1.0, waited, "<= 1")


def memory(options: argparse.Namespace, table: "Table") -> None:
    """What torch's allocator gives out, from before there is a model to the end of four updates."""
    names = ("Trainer galore_adamw", "galore_adamw", *LEAN)
    peak = {name: in_fresh_process(name, options, memory=True)["peak"] / 2**20 for name in names}
    for name in names[1:]:
        table.line(f"memory, MiB, {name}, against Trainer galore_adamw", peak[names[0]], peak[name], "<= 0.4")


# -- the optimizer alone ----------------------------------------------------------------------------------------------


def optimizer(options: argparse.Namespace, table: "Table") -> None:
    import torch
    from bench_optimizers import RANKS, _bitsandbytes, seconds, shapes

    from galore_pretrain.optim import RuleOptimizer
    from galore_pretrain.optim.build import build_rules

    warnings.simplefilter("ignore")
    for size in ("60m", "130m"):
        torch.manual_seed(0)
        matrices, rest = (
            [torch.randn(shape).mul_(0.02).bfloat16().requires_grad_() for shape in group] for group in shapes(size)
        )
        grads = {p: (torch.randn(p.shape) * 1e-3).bfloat16() for p in matrices + rest}

        def own(row: str, rounding: str, *groups: Any, rank: int = RANKS[size]) -> RuleOptimizer:
            more = {"rank": rank, "update_proj_gap": 10**6, "refresh": "together"} if "galore" in row else {}
            rule, bare = build_rules(row, "sound", **more)
            parts = [{"params": groups[0], "rule": rule}, {"params": groups[1], "rule": bare}]
            return RuleOptimizer(parts, lr=1e-6, rounding=rounding)

        built = {
            "fused": torch.optim.AdamW(matrices + rest, lr=1e-6, fused=True),
            "nearest": own("galore_adamw", "nearest", matrices, rest),
            "stochastic": own("galore_adamw", "stochastic", matrices, rest),
            "bitsandbytes": _bitsandbytes(matrices + rest),
            "adamw8bit": own("adamw8bit", "stochastic", matrices, rest),
            "galore_adamw8bit": own("galore_adamw8bit", "stochastic", matrices, rest),
        }
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(2 + options.rounds):
            for name, each in built.items():
                times[name].append(1000 * seconds(each, grads, torch.device("cpu")))
        ms = {name: median(values[2:]) for name, values in times.items()}
        goal = f"{size}: galore_adamw's update, to nearest, ms, against fused AdamW"
        table.line(goal, ms["fused"], ms["nearest"], "<= 1.3")
        if size == "60m" and table.step_ms is not None:
            goal = "60m: what stochastic rounding adds, ms, against a step of 8 × 256"
            table.line(goal, table.step_ms, ms["stochastic"] - ms["nearest"], "<= 0.1")
        for row in ("adamw8bit", "galore_adamw8bit"):
            goal = f"{size}: {row}'s update, ms, against bitsandbytes' AdamW8bit"
            table.line(goal, ms["bitsandbytes"], ms[row], "<= 1")


# -- text and start ---------------------------------------------------------------------------------------------------


def text(options: argparse.Namespace, table: "Table") -> None:
    """One thread; and a consumer that takes a million tokens a second, as a GPU would."""
    from galore_pretrain.text.batches import TokenRows, TrainingData, read_ahead
    from galore_pretrain.text.sources import open_source
    from galore_pretrain.text.tokenizer import load_tokenizer

    tokenizer, source = load_tokenizer(options.tokenizer), open_source(options.data, "train")
    for layout, goal in (("pack", ">= 1"), ("pad", "")):
        rates = []
        stream = iter(TrainingData(source, TokenRows(tokenizer, layout, LENGTH), 64, 0))
        for _ in range(options.rounds):
            started, tokens = time.perf_counter(), 0
            while time.perf_counter() - started < 2:
                tokens += next(stream).tokens
            rates.append(tokens / (time.perf_counter() - started) / 1e6)
        table.line(f"text, {layout}, million tokens/s of one core", 4.0, median(rates), goal)
    for rows in (8, 512):
        ahead = read_ahead(TrainingData(source, TokenRows(tokenizer, "pack", LENGTH), rows, 0), pin=False)
        next(ahead)
        time.sleep(0.5)
        waited, began = 0.0, time.perf_counter()
        while time.perf_counter() - began < 4:
            started = time.perf_counter()
            batch = next(ahead)
            waited += time.perf_counter() - started
            time.sleep(batch.tokens / 1e6)  # what a GPU would take, which leaves the interpreter alone
        ahead.close()
        share = waited / (time.perf_counter() - began)
        table.line(f"waiting at a million tokens/s, {rows} × {LENGTH} a step, %", 1.0, 100 * share, "<= 1")


def first_update(options: argparse.Namespace) -> float:
    """Seconds from the command to the line of the first update."""
    words = ["--model", MODEL, "--data", options.data, "--tokenizer", options.tokenizer, "--rank", str(RANK)]
    words += ["--steps", "2", "--total-batch-size", "1", "--eval-tokens", "1000", "--wandb", "disabled"]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "run" / "metrics.jsonl"
        words += ["--output", str(lines.parent)]
        began, found = time.perf_counter(), None
        with subprocess.Popen(
            [sys.executable, "-m", "galore_pretrain", *words], stderr=subprocess.PIPE, text=True
        ) as process:
            while found is None and process.poll() is None:
                time.sleep(0.01)
                found = time.perf_counter() - began if lines.exists() and lines.stat().st_size else None
            errors = process.communicate()[1]
        if process.returncode or found is None:
            sys.exit(f"start: {errors[-3000:]}")
    return found


def start(options: argparse.Namespace, table: "Table") -> None:
    helps, firsts = [], []
    for _ in range(options.rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "galore_pretrain", "--help"], capture_output=True, check=True)
        helps.append(time.perf_counter() - began)
        firsts.append(first_update(options))
    table.line("start: from command to first update, s", 8.0, median(firsts), "<= 1")
    table.line("start: --help, s", 0.4, median(helps), "<= 1")
    code = "import sys; from galore_pretrain.cli import cli; cli.main(sys.argv[1:], standalone_mode=False); "
    code += "print(sorted({'wandb', 'datasets'} & set(sys.modules)))"
    words = [sys.executable, "-c", code, "plan", "--model", MODEL, "--data", "sample"]
    loaded = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    table.note(f"Of wandb and datasets, `plan` loads {loaded}.")


# -- two layers of 7B -------------------------------------------------------------------------------------------------


def seven(options: argparse.Namespace, table: "Table") -> None:
    """galore_adamw8bit, rank 1024; an update of 512 × 256 tokens by arithmetic from what a few take: forward and
    backward of each 4 × 256, whose gradients are added to layerwise updates' sums but for the first's, the rest of an
    update once, the bases once in 500."""
    import torch
    from bench_growth import gathering, measured, two_layers_of

    from galore_pretrain.config.resolve import resolve
    from galore_pretrain.model.llama_config import load_model_config

    given: dict[str, Any] = {"model": two_layers_of("llama_7b"), "optim": "galore_adamw8bit", "rank": 1024}
    given |= {"data": "sample", "steps": 1000, "grad_clip": 0.0, "layerwise": False, "activation_checkpointing": False}
    given |= {"refresh": "together", "batch_size": 4, "total_batch_size": 4}
    config, _ = resolve(given, dict.fromkeys(given, "flag"))
    shape, tokens = load_model_config(config.model), 4 * LENGTH
    h, i, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    weights = layers * (4 * h * h + 3 * h * i) + h * shape.vocab_size
    work = 6 * weights * tokens + 12 * layers * h * LENGTH * tokens
    a, b = torch.randn(2048, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
    peaks, passes, updates, bases = [], [], [], []
    for _ in range(3):
        for _ in range(3):
            started = time.perf_counter()
            a @ b
            peaks.append(2 * 2048 * 4096 * 4096 / (time.perf_counter() - started))
        found = measured(config, 2)
        passes.append(found.passes)
        updates.append(found.update)
        bases.append(found.bases)
    peak, fb, update, refresh = (median(values) for values in (peaks, passes, updates, bases))
    table.line("7B, two layers: forward and backward, GFLOP/s, against the peak", peak / 1e9, work / fb / 1e9, ">= 0.6")
    adding, parts = gathering(config, 3), 512 // 4
    own = update + (parts - 1) * adding + refresh / 500
    goal = "7B: update, sums and bases, s of a step of 512 × 256 of two layers"
    table.line(goal, parts * fb + own, own, "<= 0.3")
    table.note(
        f"7B, two layers, embeddings and head: forward and backward of 4 × 256 tokens {fb:.2f} s, adding their "
        f"gradients {adding:.2f} s, an update {update:.2f} s, all 14 bases {refresh:.2f} s."
    )


# -- the table --------------------------------------------------------------------------------------------------------


class Table:
    """Lines of goal, peer (or bound), this project, ratio, and whether the ratio is as wanted."""

    step_ms: float | None = None  # of galore_adamw, where it was measured

    def __init__(self) -> None:
        self.notes: list[str] = []
        print("| goal | peer, or bound | here | ratio | wanted | met |\n|---|---|---|---|---|---|", flush=True)

    def line(self, goal: str, peer: float, here: float, wanted: str) -> None:
        ratio = here / peer
        bound = float(wanted[3:] or 0)
        met = {">": ratio >= bound, "<": ratio <= bound}.get(wanted[:1])
        words = {True: "yes", False: "**no**", None: ""}[met]
        print(f"| {goal} | {peer:.4g} | {here:.4g} | {ratio:.3g} | {wanted} | {words} |", flush=True)

    def note(self, words: str) -> None:
        self.notes.append(words)


PARTS = {"step": step, "memory": memory, "optimizer": optimizer, "text": text, "start": start, "seven": seven}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = "parts of the table; seven: two layers of llama_7b"
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help=words)
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
        from galore_pretrain.planning.ledger import allocated_peak

        found: list[Any] = []
        work = lambda: found.append(STEP[options.one](options))  # noqa: E731
        print(json.dumps({"peak": allocated_peak(work)} if options.memory else work() or found[0]))
        return
    import torch

    from galore_pretrain.errors import InputError
    from galore_pretrain.text.sources import open_source
    from galore_pretrain.text.tokenizer import load_tokenizer

    try:
        open_source(options.data, "train")
        load_tokenizer(options.tokenizer)
    except InputError as error:
        sys.exit(f"Error: {error}")
    versions = ", ".join(
        f"{p} {metadata.version(p)}" for p in ("torch", "transformers", "accelerate", "galore-torch", "bitsandbytes")
    )
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{MODEL}, bf16, {ROWS} × {LENGTH} tokens, rank {RANK}; {machine}; {versions}")
    text = f"{Path(options.data).name}, tokenizer {Path(options.tokenizer).name}"
    print(
        f"{time.strftime('%Y-%m-%d')}, medians of {options.rounds}; text: {text}. `wanted`: of the ratio, here / peer\n"
    )
    table = Table()
    for name in options.only:
        PARTS[name](options, table)
    print("\n" + "\n\n".join(table.notes))


if __name__ == "__main__":
    main()
