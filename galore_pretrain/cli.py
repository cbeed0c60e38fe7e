"""The command line: flags from `RunConfig`'s fields, errors as one line, exit codes 0, 2 (input), 1 (failure)."""

import contextlib
import gc
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click
from click.core import ParameterSource
from safetensors import SafetensorError

from galore_pretrain import __version__
from galore_pretrain.check.parts import PARTS
from galore_pretrain.config.evaluated import further_texts
from galore_pretrain.config.flags import OF_TASKS, RATE, RunCommand, flags, resolved, with_run_options
from galore_pretrain.config.options import (
    FLAGS,
    Processes,
    RunConfig,
    model_name,
    optim_settings,
    parse_place,
    texts_of,
)
from galore_pretrain.config.resolve import ALL, left_out, load_named
from galore_pretrain.config.tasks import ENCODER, GLUE, TASKS
from galore_pretrain.errors import InputError, RunError, TrainingFailedError, did_you_mean
from galore_pretrain.signals import Ending
from galore_pretrain.study.sweep import KINDS, Sweep, entries, load_line, own_length
from galore_pretrain.text.hub import check_hub, hub_text
from galore_pretrain.text.sources import open_source
from galore_pretrain.text.tokenizer import find_tokenizer

if TYPE_CHECKING:
    from galore_pretrain.planning.cards import Card
    from galore_pretrain.planning.fit import Fit
    from galore_pretrain.planning.plan import Plan
    from galore_pretrain.planning.traffic import Speeds


_THIS_CARD = "this machine's"

# torchrun ends all processes as soon as one has failed. One that says nothing therefore waits for the one that prints
# the error, in seconds, or that one might be ended before it has. It is itself ended by torchrun as soon as that is so:
# by a signal, and where that came already while the run ended, nothing is waited for.
_REPORT_WAIT = 20.0

_INTERRUPTED = 130
"""The exit code of a program that Ctrl-C has ended."""


class _Root(click.Group):
    """A group that trains without a subcommand. ``--help`` shows training's options, then the subcommands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``train`` before arguments that name no subcommand."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise click.UsageError(f"no command {args[0]!r}; choose from {', '.join(self.commands)}")
        named = (*self.commands, "-h", "--help", "--version")
        if not args or args[0] not in named:
            args = ["train", *args]
        is_run = args[0] in ("train", "finetune")
        if args[0] in self.commands and not is_run and "RANK" in os.environ:
            raise InputError(f"{args[0]} is one process's work: start it without torchrun")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write training's options before the subcommands."""
        self.commands["train"].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=_Root, context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="galore-pretrain")
def cli() -> None:
    """Pretrain a LLaMA on text, with GaLore or a rival, and tell how well it did.

    \b
    galore-pretrain --model llama_60m --optim galore_adamw          # the paper's run, on C4
    galore-pretrain --model llama_1m --data sample --dtype float32  # minutes on a CPU, no download

    Hyper-parameters come from the paper's recipe for the model and optimizer named; each flag replaces one.
    """


@cli.command(cls=RunCommand, params=flags(FLAGS.keys() - OF_TASKS))
@with_run_options
@click.pass_context
def train(ctx: click.Context, /, debug: bool, **values: Any) -> int:
    """Train (the same as without a subcommand)."""
    config, origins = resolved(ctx, values)
    check_hub(config.data, config.tokenizer, goes_on=_goes_on(config))
    find_tokenizer(config.tokenizer)
    if hub_text(config.data) is None:
        eval_paths = [text.path for text in config.eval_texts]
        open_source(config.data, "train", eval_paths, text_key=config.text_key)
    return _run(ctx, config, origins)


@cli.command(cls=RunCommand, params=flags())
@with_run_options
@click.pass_context
def finetune(ctx: click.Context, /, debug: bool, **values: Any) -> int:
    """Fine-tune a model that exists on a task.

    \b
    galore-pretrain finetune --task mrpc --rank 4              # RoBERTa on GLUE, as in GaLore's paper
    galore-pretrain finetune --task chat --model FOLDER --data chats.jsonl

    Its --model is a folder or a hub id with weights. Hyper-parameters come from the task's recipe.
    """
    if values["task"] is None:
        raise InputError(f"--task is missing; choose from {', '.join(TASKS)}")
    config, origins = resolved(ctx, values)
    check_hub(config.data, config.tokenizer, goes_on=_goes_on(config))
    find_tokenizer(config.tokenizer)
    if config.task in GLUE:
        from galore_pretrain.train.scores import load_metrics

        load_metrics()  # which are first wanted when an epoch is over
    return _run(ctx, config, origins)


def _run(ctx: click.Context, config: RunConfig, origins: Mapping[str, str]) -> int:
    """Make a run, and return its exit code."""
    _let_cuda_grow_segments()
    if config.deterministic:  # which cuBLAS reads when it is loaded
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with _importing():
        from galore_pretrain import run  # torch and transformers: only for a run that makes sense so far

    ending = ctx.ensure_object(Ending)
    return run.train(config, origins, ending)


def _goes_on(config: RunConfig) -> bool:
    """Return whether a run goes on from a checkpoint, as far as can be told before it is opened."""
    output = Path(config.output)
    is_finished = (output / "summary.json").exists() and (output / "model").exists()
    if config.resume == "never" or is_finished:
        return False
    has_checkpoint = any((output / "checkpoints").glob("step_*"))
    return config.resume != "auto" or has_checkpoint


@cli.command(cls=RunCommand, params=flags())
@with_run_options
@click.option("--json", "as_json", is_flag=True, help="Print what a program can read.")
@click.option("--compare", metavar="ROWS", help="Draw a bar for each of these optimizers: adamw,galore_adamw8bit,…")
@click.option("--picture", type=click.Path(path_type=Path), help="Where --compare draws.  [memory-MODEL.png]")
@click.option("--paper", is_flag=True, help="Print the paper's memory tables instead; needs no --model.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Hosts that share the run.")
@click.option("--gpus-per-node", type=click.IntRange(1), default=1, show_default=True, help="Processes on each.")
@click.option("--flops", type=RATE, help="FLOP/s of a GPU at best, such as 400T: then a bound on tokens/s is printed.")
@click.option("--link", type=RATE, help="Bytes/s between the GPUs of a host, each way, of each: 450G.")
@click.option("--network", type=RATE, help="Bytes/s in and out of a host, all its cards together: 400G.")
@click.option(
    "--time",
    "card_name",
    is_flag=False,
    flag_value=_THIS_CARD,
    metavar="[CARD]",
    help="Predict seconds an update and days for the run on a card, such as 4090.  [this machine's]",
)
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    debug: bool,
    as_json: bool,
    compare: str | None,
    picture: Path | None,
    paper: bool,
    nodes: int,
    gpus_per_node: int,
    flops: float | None,
    link: float | None,
    network: float | None,
    card_name: str | None,
    **values: Any,
) -> int:
    """Say what memory a run would take, without running it.

    The flags are those of the run. Of several processes, the memory of each is told. Of them, or with --flops, also
    what an update computes and sends, and what bounds its speed. --optim all makes a table of what fits. With --time
    CARD the plan is of a GPU with that card's memory, and tells how long updates and the run would take there, as a
    range, from a table and not measured.
    """
    if paper:
        return _print_paper(ctx, as_json)
    processes = Processes(nodes * gpus_per_node, gpus_per_node)
    if values["task"] in GLUE and (flops or card_name):
        raise InputError(
            f"--task {values['task']}: the time of decoders alone is predicted; leave --flops and --time out"
        )
    _check_rates(processes, flops, link, network, card_name)
    if card_name is not None:
        values["device"] = _device_of_cards(values["device"])
    if values["optim"] == ALL:
        _check_table(values, compare, processes, flops)
        return _print_cards(ctx, values, card_name, picture, as_json)
    if picture and not compare:
        raise InputError(
            f"--picture {picture}: only --compare draws; give it rows, such as --compare adamw,galore_adamw"
        )
    if compare:
        rows = list(dict.fromkeys(row.strip() for row in compare.split(",")))
        for row in rows:
            load_named(row)
        flags_of_rows = [values | {"optim": row} | left_out(row) for row in rows]
    else:
        rows, flags_of_rows = [values["optim"]], [values]
    configs = [resolved(ctx, flags_of_row, processes)[0] for flags_of_row in flags_of_rows]

    with _importing():
        from galore_pretrain.planning import budget, choice, fit, traffic  # torch and transformers
        from galore_pretrain.study import pictures
        from galore_pretrain.train.build import check_accumulation

    first = configs[0]
    check_accumulation(first)
    fit.warn_of_length(first)
    card, another = _cards_named(card_name, first.device)
    available = budget.budget_of(first, another)
    source = budget.source_of(first, another)
    speeds = traffic.Speeds(flops, link, network)
    planned = [_plan_row(config, available, source, speeds, card) for config in configs]

    if as_json:
        answers = {row: of_row.answer for row, of_row in zip(rows, planned, strict=True)}
        click.echo(json.dumps(answers if compare else planned[0].answer, indent=2))
    else:
        click.echo("\n\n".join(of_row.table for of_row in planned))
    if picture or (compare and not as_json):
        name = model_name(first.model)
        picture = picture or Path(f"memory-{name}.png")
        title = f"{name} in {first.dtype}, updates of {first.total_batch_size} × {first.max_length} tokens"
        with _writing(f"--picture {picture}", "file"):
            bars = choice.bars(rows, [of_row.plan for of_row in planned])
            pictures.draw_memory(picture, title, bars, {"for tensors": available})
        click.echo(f"drawn: {picture}", err=as_json)
    return 0


def _cards_named(card_name: str | None, device: str) -> "tuple[Card | None, Card | None]":
    """Return the card that --time means, None without, and the same again where it is not this machine's."""
    from galore_pretrain.planning import cards

    if card_name is None:
        return None, None
    if card_name == _THIS_CARD:
        return cards.card_here(device), None
    card = cards.card_named(card_name)
    return card, card


def _check_table(values: dict[str, Any], compare: str | None, processes: Processes, flops: float | None) -> None:
    """Raise InputError for what a table of all methods finds out by itself, or does not know."""
    why = {
        "--batch-size": (values["batch_size"], "the table finds the largest micro-batch of each"),
        "--accumulate-on": (values["accumulate_on"], "the table has both places"),
        "--fit": (values["fit"], "the table is of what fits"),
        "--compare": (compare, "the table has all rows"),
        "--gpus-per-node and --nodes": (
            processes.total > 1,
            "the table is of one process; plan one method for several",
        ),
        "--flops": (flops, "give --time CARD"),
        "--task": (values["task"], "the table is of pretraining"),
    }
    for flag, (value, reason) in why.items():
        if value:
            raise InputError(f"{flag} with --optim {ALL}: {reason}; leave it out")


def _print_cards(
    ctx: click.Context, values: dict[str, Any], card_name: str | None, picture: Path | None, as_json: bool
) -> int:
    """Print the table of all methods that fit the memory, and draw ten of them where that is asked."""
    with _importing():
        from galore_pretrain.planning import budget
        from galore_pretrain.planning.plan import is_on_gpu
        from galore_pretrain.study import cards as table
        from galore_pretrain.study import pictures

    def config_of(flags: Mapping[str, Any]) -> RunConfig:
        return resolved(ctx, {**values, **flags})[0]

    flags_of_rows = list(table.variants(values["weights"]))
    first = config_of(flags_of_rows[0])
    card, another = _cards_named(card_name, first.device)
    available = budget.budget_of(first, another)
    rows, refused = table.rows_that_fit(flags_of_rows, config_of, available, card)
    if not rows:
        raise InputError(f"--optim {ALL}: none can be planned; {refused[0]}")
    if as_json:
        answer = {"budget_bytes": available, "rows": [row.as_json() for row in rows], "not_planned": refused}
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo(table.report(rows, refused, available, budget.source_of(first, another), card))
    bars = table.bars(rows)
    if picture is None:
        return 0
    if not bars:
        raise InputError(f"--picture {picture}: no method fits with 16 rows at once; give a larger --memory-budget")
    budgets = {"for tensors": available}
    if is_on_gpu(first):
        least = min(sum(parts.values()) for parts in bars.values())
        budgets = {name: size for name, size in budget.budgets_of_cards().items() if size >= least}
    title = f"{model_name(first.model)}, an update of 16 × {first.max_length} tokens at once"
    with _writing(f"--picture {picture}", "file"):
        pictures.draw_memory(picture, title, bars, budgets)
    click.echo(f"drawn: {picture}", err=as_json)
    return 0


@dataclass(frozen=True)
class _Planned:
    """Holds the plan of a row, and all that is predicted of it: for programs, and as a table."""

    plan: "Plan"
    answer: dict[str, Any]
    table: str


def _plan_row(config: RunConfig, available: int, source: str, speeds: "Speeds", card: "Card | None") -> _Planned:
    """Plan a run: its memory, what several processes or --flops ask for, and its time on ``card`` if there is one."""
    from galore_pretrain import dist
    from galore_pretrain.planning import duration, fit, traffic

    with dist.imagined(config) as mesh:
        found = fit.planned(config, available, mesh)
        plan = found.plan
        answer = plan.as_json(available)
        if found.change is not None:
            answer["change"] = found.change.as_json() | {"is_taken": found.is_taken}
        tables = [_table(found, available, source, card)]
        messages: dict[str, float] = {}
        if mesh is not None or speeds.flops:
            update = traffic.count(plan.config, mesh)
            answer["update"] = update.as_json(speeds)
            tables.append(update.table(speeds))
            messages = update.seconds_at_least(speeds._replace(flops=None))
        if card is not None:
            time = duration.predict(plan.config, card, messages, mesh)
            answer["time"] = time.as_json()
            tables.append(time.table())
    return _Planned(plan, answer, "\n".join(tables))


def _check_rates(
    processes: Processes, flops: float | None, link: float | None, network: float | None, card_name: str | None
) -> None:
    """Raise InputError where --link and --network bound nothing, and where --time would not know what they bound."""
    if (link or network) and processes.total == 1:
        raise InputError("--link and --network: one process sends nothing; give --gpus-per-node or --nodes")
    if (link or network) and not flops and card_name is None:
        raise InputError("--link and --network: bound nothing by themselves; give --flops or --time")
    if card_name is None:
        return
    if processes.here > 1 and not link:
        raise InputError("--time: the table has no links between the cards of a host; give --link, such as 450G")
    if processes.total > processes.here and not network:
        raise InputError("--time: the table has no network between hosts; give --network, such as 400G")


def _device_of_cards(device: str | None) -> str:
    """Return the --device of a plan with --time: a GPU, unless another device is named, which is refused."""
    if device in (None, "auto"):
        return "cuda"
    if not device.startswith("cuda"):
        raise InputError(f"--time: its table is of GPUs, and --device is {device}; leave --device out")
    return device


def _table(found: "Fit", available: int, source: str, card: "Card | None") -> str:
    """Return the table of what a run would take, and what helps where that is more than the ``available`` bytes."""
    from galore_pretrain.planning.budget import left_on_card
    from galore_pretrain.planning.choice import memory_advice
    from galore_pretrain.planning.plan import is_on_gpu

    plan = found.plan
    table = plan.table(available, source)
    told = found.told()
    if told is not None:
        table += f"\n{told}"
    elif not plan.fits(available):
        table += f"\nwhat helps: {memory_advice(plan.config)}"
    if plan.fits(available) and is_on_gpu(plan.config):
        table += f"\n{left_on_card(plan, available, card)}"
    return table


def _print_paper(ctx: click.Context, as_json: bool) -> int:
    """Print the paper's memory tables. InputError where other flags are given, which would say nothing."""
    given = [p for p in ctx.command.params if ctx.get_parameter_source(p.name or "") is ParameterSource.COMMANDLINE]
    others = [p.opts[-1] for p in given if p.name not in ("paper", "as_json", "debug")]
    if others:
        raise InputError(f"--paper prints the paper's own tables, whatever {', '.join(others)} may say; leave it out")
    from galore_pretrain.study import paper

    if as_json:
        click.echo(json.dumps({"paper": paper.by_the_papers_rule(), "exact": paper.exact()}, indent=2))
    else:
        click.echo(paper.report())
    return 0


@cli.command(cls=RunCommand, params=flags())
@click.argument("kind", metavar=f"{'|'.join(KINDS)}|FILE.json")
@with_run_options
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs of each line, from --seed on."
)
@click.option(
    "--tune-matrices", metavar="FACTORS", help="Try each as --matrix-lr-scale with the first seed: 0.1,0.3,1."
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at a time.")
@click.option("--plan-only", is_flag=True, help="Print the commands instead of running them.")
@click.pass_context
def sweep(
    ctx: click.Context,
    /,
    kind: str,
    debug: bool,
    seeds: int,
    tune_matrices: str | None,
    jobs: int,
    plan_only: bool,
    **values: Any,
) -> int:
    """Make many runs, and report on them.

    They are a table of the paper, a grid of learning rates, or a list in FILE.json. Flags go to every run. The same
    command goes on where it was stopped.
    """
    given = {name: value for name, value in values.items() if value is not None}
    output = Path(given.pop("output", "") or f"sweeps/{Path(kind).stem}")
    tasks: Sequence[str] = GLUE
    if kind == "glue":
        given.setdefault("model", ENCODER)
        task = given.pop("task", None)
        if task is not None and task not in GLUE:
            raise InputError(f"--task {task}: sweep glue has {', '.join(GLUE)}; name one, or leave it out for all")
        tasks = [task] if task else GLUE
    elif "task" in given and kind in KINDS:
        raise InputError(f"--task {given['task']}: sweep {kind} pretrains; leave it out, or make sweep glue")
    model = given.get("model") or given.get("init")
    if model is None:
        raise InputError("--model is missing; name a shipped model such as llama_60m, or a JSON config")
    if not {"steps", "max_tokens"} & given.keys():
        given |= own_length(kind, model)
    if kind == "lr" and "lr" in given:
        raise InputError(f"--lr {given['lr']:g}: sweep lr has a grid of its own; leave it out")
    typed = {name for name in given if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    allows_code = given.pop("allow_code", False)
    if allows_code and "allow_code" not in typed:
        raise InputError(f"{ctx.meta['run_json']} sets allow_code, which only a command line can: leave it out there")
    optim = given.pop("optim", None)
    lines = entries(kind, model, optim, tasks)
    for line in lines:
        load_line(line, optim if "optim" in typed else None, allow_code=allows_code)
    first = given.pop("seed", 0)
    try:
        factors = [float(factor) for factor in (tune_matrices or "").split(",") if factor]
    except ValueError as error:
        raise InputError(f"--tune-matrices {tune_matrices}: not numbers; write 0.1,0.3,1") from error
    work = Sweep(lines, given, range(first, first + seeds), factors, jobs, output)
    work.check()
    if plan_only:
        click.echo("\n".join(work.listing()))
        return 0
    with _writing(f"--output {output}", "folder"):
        output.mkdir(parents=True, exist_ok=True)
    folders, code = work.run()
    if folders:
        click.echo(_report(folders, output / "report"))
    return code


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), default=Path("report"), show_default=True, help="Folder.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program can read, and write nothing.")
@click.option(
    "--watch", type=float, metavar="SECONDS", help="Write a page of runs that go on, index.html, anew so often instead."
)
def report(runs: tuple[Path, ...], output: Path, as_json: bool, watch: float | None) -> int:
    """Compare runs: tables and pictures, as Markdown and HTML. A folder of runs stands for all of them.

    With --watch, index.html shows how far the runs are, until all have ended or Ctrl-C is pressed. It needs no
    JavaScript. Runs that begin later in a folder of runs appear. A run that failed or was stopped may go on later,
    so it is waited for.
    """
    if watch is not None:
        return _watch(runs, output, watch, as_json)
    click.echo(_report(runs, output, as_json=as_json))
    return 0


def _watch(runs: Sequence[Path], output: Path, seconds: float, as_json: bool) -> int:
    """Write a page of the runs every so many seconds, and return the exit code."""
    if not 0 < seconds < math.inf:
        raise InputError(f"--watch {seconds:g}: a page is written every so many seconds; give more than 0, such as 10")
    if as_json:
        raise InputError(f"--json with --watch {seconds:g}: a page is written and nothing printed; leave one out")
    from galore_pretrain.study.watch import Watch, check_paths

    check_paths(runs)
    watching = Watch(runs, output, seconds)
    click.echo(f"watching: {watching.file}, anew every {seconds:g} s until all runs have ended, or Ctrl-C")
    with _writing(f"--output {output}", "folder"):
        code = watching.run()
    if code == 0:
        click.echo(f"all runs have ended: {watching.file}")
    return code


def _report(runs: Sequence[Path], output: Path, *, as_json: bool = False) -> str:
    from galore_pretrain.study import report, results

    comparisons = results.compare(results.find(runs))
    if as_json:
        return json.dumps(report.as_json(comparisons), indent=2)
    with _writing(f"--output {output}", "folder"):
        text = report.write(comparisons, output)
    return f"{text}\nwritten: {output / 'report.md'}, {output / 'report.html'}"


@cli.group(context_settings={"help_option_names": ["-h", "--help"]})
def leaderboard() -> None:
    """Methods side by side on a fixed track: add, verify, table."""


@leaderboard.command("add")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--track", type=click.Path(path_type=Path), default=Path("leaderboard/cpu"), show_default=True, help="Its folder."
)
@click.option("--name", help="Of the entry.  [the method's]")
@click.option("--tuning", type=click.Path(path_type=Path), help="The tuning.json of the sweep that found the rate.")
def leaderboard_add(runs: tuple[Path, ...], track: Path, name: str | None, tuning: Path | None) -> int:
    """Make an entry of each method's finished runs.

    RUN is a run's folder, or a folder of such. The runs of an entry differ in their seeds alone.
    """
    from galore_pretrain.study import leaderboard, results

    the_track = leaderboard.Track.read(track)
    comparisons = results.compare(results.find(runs))
    if len(comparisons) > 1:
        raise InputError("the runs differ in model, text or length, so they are not of one track; name those of one")
    methods = comparisons[0].methods
    if name is not None and len(methods) > 1:
        raise InputError(f"--name {name}: the runs are of several methods ({'; '.join(methods)})")
    tuned = None
    if tuning is not None:
        tuned = leaderboard.read_tuning(tuning)
    made = []
    for label, of_method in methods.items():
        folder = name or leaderboard.folder_name(label)
        made.append((leaderboard.entry_of(folder, the_track, of_method, tuned), of_method[0]))
    for entry, first in made:
        with _writing(str(entry.folder), "--track"):
            entry.write(first)
        missing = sorted(set(the_track.seeds) - set(entry.losses))
        note = ""
        if missing:
            note = f" (without seeds {', '.join(map(str, missing))}: it has no rank)"
        click.echo(f"written: {entry.folder}{note}")
    return 0


@leaderboard.command("verify")
@click.argument("entry", type=click.Path(path_type=Path))
@click.option("--yes", is_flag=True, help="Execute the entry's file without asking.")
@click.option("--short", is_flag=True, help="Repeat the first updates alone.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run.  [one that is removed at the end]")
def leaderboard_verify(entry: Path, yes: bool, short: bool, output: Path | None) -> int:
    """Repeat an entry: its first 50 updates, and one seed to the end.

    Exit code 1: something came out otherwise.
    """
    import tempfile

    from galore_pretrain.study.leaderboard import Entry
    from galore_pretrain.study.verification import Verification

    the_entry = Entry.read(entry)
    the_entry.check_method()
    click.echo(the_entry.command())
    _consent(the_entry.method_file, entry, yes)
    with tempfile.TemporaryDirectory() as folder:
        return Verification(the_entry, output or Path(folder), short, click.echo).run()


def _consent(file: Path | None, entry: Path, yes: bool) -> None:
    """Ask whether an entry's file may be executed, unless it has none; InputError where nobody can answer."""
    if file is None:
        click.echo("executes no file of the entry")
        return
    click.echo(f"executes {file}")
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError(
            f"{file} is executed only where that is said: read it, then "
            f"galore-pretrain leaderboard verify {entry} --yes"
        )
    click.confirm("Have you read it, and shall it be executed?", abort=True)


@leaderboard.command("table")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("leaderboard"))
@click.option("--output", type=click.Path(path_type=Path), help="File to write.  [standard output]")
def leaderboard_table(folder: Path, output: Path | None) -> int:
    """Write the page of a leaderboard, FOLDER."""
    from galore_pretrain.study import standings

    text = standings.page(folder)
    if output is None:
        click.echo(text, nl=False)
        return 0
    with _writing(f"--output {output}", "file"):
        output.write_text(text)
    click.echo(f"written: {output}")
    return 0


_TEXT = (
    "data",
    "eval_data",
    "text_key",
    "bad_data",
    "tokenizer",
    "bos",
    "layout",
    "documents",
    "max_length",
    "eval_tokens",
    "batch_size",
)
_TEXT_OF_MODEL = {name: f"the run's, or {FLAGS[name].shown}" for name in _TEXT} | {
    "data": "the run's, or sample",
    "tokenizer": "the model's",
}
"""Says what each of these is where it is not given, for the help. A Hugging Face folder has no run's."""


@cli.command("eval", params=flags(_TEXT, _TEXT_OF_MODEL))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--cloze", type=click.IntRange(2), metavar="ITEMS", help="Make a cloze test of so many items, too.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the items of --cloze.")
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print what a program can read.")
def evaluate(path: Path, cloze: int | None, seed: int, device: str, as_json: bool, **values: Any) -> int:
    """Tell the perplexity of a trained model.

    PATH is a run, a checkpoint or a Hugging Face folder. The text is the run's own validation text, or another: all of
    a file, or the validation text of a folder. A Hugging Face folder has no text of its own: for one, --data and
    --layout say how it was trained, or the embedded sample is taken, a document a row. With --cloze, the model also has
    to find out how that text goes on, among four continuations.
    """
    given = {name: value for name, value in values.items() if value is not None}
    with _importing():
        from galore_pretrain.rundir import loaded
        from galore_pretrain.train import build

    torch_device = build.device_named(device)
    model = loaded.load(path, given, torch_device)
    numbers = loaded.perplexity(model, torch_device).metrics()
    if cloze is not None:
        numbers |= loaded.cloze(model, torch_device, items=cloze, seed=seed).metrics()
    if as_json:
        click.echo(json.dumps(numbers, indent=2))
        return 0
    click.echo("\n".join(_told_numbers(model.config, numbers)))
    return 0


def _told_numbers(config: RunConfig, numbers: Mapping[str, float]) -> Iterator[str]:
    """Yield the lines that tell an evaluation's numbers: two of the validation text, one of each further text."""
    text = f"{' + '.join(texts_of(config.data))} (validation)"
    if config.eval_texts:
        text = config.eval_texts[0].path
    how = f"--layout {config.layout} --max-length {config.max_length}"
    if config.documents != "joined":
        how += f" --documents {config.documents}"
    yield f"{text}, {numbers['eval_tokens']:,} tokens, {how}: loss {numbers['eval_loss']:.4f}"
    yield _told_perplexity("eval", numbers)
    for name in further_texts(numbers):
        prefix = f"eval_{name}"
        counted = f"{name}, {numbers[f'{prefix}_tokens']:,} tokens: loss {numbers[f'{prefix}_loss']:.4f}"
        yield f"{counted}, {_told_perplexity(prefix, numbers)}"
    if "cloze_items" in numbers:
        accuracy = f"{numbers['cloze_acc_norm']:.4f} ± {numbers['cloze_acc_norm_stderr']:.4f}"
        yield f"cloze, {numbers['cloze_items']} items of four: acc_norm {accuracy} (chance 0.25)"


def _told_perplexity(prefix: str, numbers: Mapping[str, float]) -> str:
    """Return the perplexity of the text whose keys begin so, and what else is known of it."""
    told = f"perplexity {numbers[f'{prefix}_perplexity']:.4f}"
    reference = numbers.get(f"{prefix}_reference_perplexity")
    if reference is not None:
        told += f" (the published code, which divides by a batch too many: {reference:.4f})"
    bits = numbers.get(f"{prefix}_bits_per_byte")
    if bits is not None:
        told += f", {bits:.4f} bits per byte"
    return told


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def export(path: Path, folder: Path) -> int:
    """Write a model as a plain Hugging Face folder.

    PATH is a run, whose newest checkpoint is taken, or a checkpoint. FOLDER gets dense matrices and the tokenizer.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; name a new folder")
    with _importing():
        from galore_pretrain.rundir import loaded
        from galore_pretrain.rundir.export import export as write_model
        from galore_pretrain.rundir.export import try_export
        from galore_pretrain.train import build

    model = loaded.load(path, {}, build.device_named("cpu"))
    with _writing(str(folder), "folder"):
        try_export(model.model.config, model.tokenizer, [])
        write_model(folder, model.model, model.tokenizer)
    click.echo(f"written: {folder}")
    return 0


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Answer PROMPT, put to the model by its chat template.")
@click.option("--tokens", type=click.IntRange(1), default=100, show_default=True, help="Written at most.")
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True, help="0: the likeliest token.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
def generate(
    path: Path, prompt: str, chat: bool, tokens: int, temperature: float, top_p: float, seed: int, device: str
) -> int:
    """Continue PROMPT with a trained model.

    PATH is a run, a checkpoint or a Hugging Face folder. With --chat, the answer alone is printed.
    """
    with _importing():
        from galore_pretrain.rundir import loaded
        from galore_pretrain.train import build

    model = loaded.load(path, {}, build.device_named(device), with_template=chat)
    drawing = loaded.Drawing(tokens, temperature, top_p, seed)
    if chat:
        click.echo(loaded.answer(model, prompt, drawing))
    else:
        click.echo(loaded.continue_text(model, prompt, drawing))
    return 0


@cli.command("check-method", params=flags(("rank", "optim_option", "numerics")))
@click.argument("method")
@click.option("--json", "as_json", is_flag=True, help="Print what a program can read.")
def check_method(
    method: str,
    as_json: bool,
    rank: int | None,
    optim_option: str | tuple[str, ...] | None,
    numerics: str | None,
) -> int:
    """Check that a method holds what the project's own methods do.

    METHOD is a shipped method, FILE.py:NAME or package.module:NAME. With a small model, in seconds, it is tried whether
    layerwise updates, accumulation, clipping, resuming, several processes, memory plans and seeds are right. Exit code
    1: something is not.
    """
    options = optim_settings(optim_option)
    if "rank" in options:
        raise InputError("--optim-option rank: it has a flag, --rank")
    if rank is not None:
        options["rank"] = rank
    with _importing():
        from galore_pretrain.optim import check_methods

    try:
        found = check_methods([parse_place(method)], numerics=numerics or "sound", options=options)
    except ValueError as error:
        raise InputError(str(error)) from error
    findings = []
    for finding in found:
        findings.append(finding)
        if not as_json:
            click.echo(finding.line())
    if as_json:
        checks = {finding.check: {"status": finding.status, "told": finding.told} for finding in findings}
        click.echo(json.dumps({"method": method, "checks": checks}, indent=2))
    has_failed = any(finding.status == "failed" for finding in findings)
    return int(has_failed)


@cli.command()
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="For its parts, at most.",
)
@click.option("--only", metavar="PART,…", help=f"Make these parts alone, of {', '.join(PARTS)}.")
@click.option("--device", default="auto", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("check"), show_default=True, help="Folder.")
@click.option("--data", default="sample", show_default=True, help="Text of your own: a file, a folder or a glob.")
@click.option("--tokenizer", help="Its tokenizer: a file, a folder or an id of the hub that was loaded before.")
def check(minutes: float, only: str | None, device: str, output: Path, data: str, tokenizer: str | None) -> int:
    """Check this machine by value: updates, kernels, memory plans, resuming, speed.

    Each part is a process with a limit. The folder gets check.md, whose head can be pasted into an issue, and
    check.json. Exit code 1: a check failed. What cannot be checked here, or no time is left for, is said.
    """
    names = list(PARTS)
    if only is not None:
        names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in PARTS:
            raise InputError(
                f"--only {name}: no such part; {did_you_mean(name, list(PARTS))}the parts are {', '.join(PARTS)}"
            )
    with _importing():
        from galore_pretrain.check.runner import Runner, settings_for

    settings = settings_for(device, data, tokenizer)
    with _writing(f"--output {output}", "folder"):
        output.mkdir(parents=True, exist_ok=True)
    code = Runner(settings, minutes, output, click.echo).run(names)
    click.echo(f"written: {output / 'check.md'}, {output / 'check.json'}")
    return code


def _let_cuda_grow_segments() -> None:
    """Make CUDA's allocator grow its segments, unless the user has set it up otherwise.

    Fragments of fixed segments would take from a card what no plan can know. This must be called before torch is
    imported: its allocator reads the setting once.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@contextmanager
def _writing(place: str, kind: str) -> Iterator[None]:
    """Raise InputError, which names the ``place``, where nothing can be written there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{place} cannot be written ({why}); give another {kind}") from error


# torch and transformers make a million objects when they are imported, none of which is garbage. Looking for some among
# them takes a fifth of the time of the import, and a second when the program ends.
@contextmanager
def _importing() -> Iterator[None]:
    """Import torch and what needs it inside without a search for garbage among what is made, now or later."""
    if "torch" in sys.modules:  # then what is new may be garbage, of whoever imported it
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _TqdmHandler(logging.Handler):
    """A handler that writes log lines to stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line. A full disk or a terminal that is gone is no reason to stop."""
        from tqdm import tqdm

        with contextlib.suppress(OSError, ValueError):
            tqdm.write(_tagged(self.format(record)), file=sys.stderr)


_shown: set[str] = set()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log each of our own warnings once; what libraries tell their developers is kept from the user."""
    del category, lineno, file, line
    if str(message) in _shown:
        return
    _shown.add(str(message))
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    logging.getLogger("galore_pretrain").log(logging.WARNING if ours else logging.DEBUG, "%s", message)


def main() -> None:
    """Run the command line; exceptions become one line and an exit code."""
    logger = logging.getLogger("galore_pretrain")
    logger.setLevel(logging.INFO if _is_main() else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(_TqdmHandler())
    warnings.showwarning = _show_warning
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that nobody asked for
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # of --profile, before torch reads it
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # it warns its developers, and what matters is checked here
    debug = "--debug" in sys.argv[1:]
    ending = Ending()
    try:
        code = cli(standalone_mode=False, obj=ending)
    except click.ClickException as error:
        code = _fail(error, error.format_message(), 2, debug, ending)
    except InputError as error:
        code = _fail(error, str(error), 2, debug, ending)
    except TrainingFailedError as error:
        code = _fail(error, str(error), 1, debug, ending)
    except (click.Abort, KeyboardInterrupt):
        code = _fail(click.ClickException("interrupted"), "interrupted", _INTERRUPTED, False, ending)
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        code = _fail(error, f"{type(error).__name__}: {message} (--debug shows where)", 1, debug, ending)
    _exit(code if isinstance(code, int) else 0, ending)


def _exit(code: int, ending: Ending) -> NoReturn:
    if ending.at_once:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if "triton" in sys.modules:  # its binding complains of every object that is not collected when Python ends
        gc.unfreeze()
    sys.exit(code)


def _is_main() -> bool:
    """Return whether this process speaks for all that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def _tagged(line: str) -> str:
    if _is_main():
        return line
    return f"[process {os.environ['RANK']}] {line}"


def _fail(error: BaseException, message: str, code: int, debug: bool, ending: Ending) -> int:
    if debug:
        logging.getLogger("galore_pretrain").exception("with --debug:")
    if not _is_reported_here(error):
        if code != _INTERRUPTED and not ending.is_asked_for:
            time.sleep(_REPORT_WAIT)
        return code
    with contextlib.suppress(OSError, ValueError):
        click.echo(_tagged(f"Error: {message}"), err=True)
    return code


def _is_reported_here(error: BaseException) -> bool:
    """Return whether this process is the one that prints an error, which others may have too."""
    run_error = error if isinstance(error, RunError) else error.__cause__
    if isinstance(run_error, RunError) and run_error.reported_by is not None:
        return run_error.reported_by == int(os.environ.get("RANK", "0"))
    # What a user gets wrong is found by all processes of a host, and printed by one of them; so is a run's own end.
    is_found_by_all = isinstance(error, (RunError, click.ClickException))
    return not is_found_by_all or os.environ.get("LOCAL_RANK", "0") == "0"
