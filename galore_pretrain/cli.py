"""The command line: flags from `RunConfig`'s fields, errors as one line, exit codes 0, 2 (input), 1 (failure)."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

import click
from click.core import ParameterSource

from galore_pretrain import __version__
from galore_pretrain.config import GROUPS, Flag, RunConfig, parse_betas, parse_bytes, parse_count
from galore_pretrain.errors import InputError, TrainingFailedError
from galore_pretrain.hub import check_hub
from galore_pretrain.recipes import resolve, without_meaning
from galore_pretrain.sources import open_source
from galore_pretrain.tokenizer import find_tokenizer


class _Parsed(click.ParamType):  # type: ignore[type-arg]
    """A click type from a function that raises ValueError."""

    def __init__(self, parse: Callable[[str], Any], name: str) -> None:
        self.parse, self.name = parse, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Option(click.Option):
    group = "Other"


def _option(name: str, flag: Flag) -> _Option:
    dashed = name.replace("_", "-")
    kind: Any = flag.kind
    if isinstance(kind, tuple):
        kind = click.Choice(kind)
    elif not isinstance(kind, type):
        kind = _Parsed(kind, {parse_count: "count", parse_betas: "pair", parse_bytes: "size"}[kind])
    declaration = f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}"
    option = _Option([declaration, name], type=kind, default=None, help=f"{flag.help}  [{flag.shown}]")
    option.group = flag.group
    return option


class _TrainCommand(click.Command):
    """Shows its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group in (*GROUPS, "Other"):
            options = [p for p in self.get_params(ctx) if getattr(p, "group", "Other") == group]
            with formatter.section(group):
                formatter.write_dl([record for p in options if (record := p.get_help_record(ctx))])


class _Root(click.Group):
    """Without a subcommand, trains; ``--help`` shows training's options, then the subcommands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help", "--version")):
            args = ["train", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
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


def _with_run_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options that training and planning share beside the flags of `RunConfig`."""
    config = click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        metavar="RUN.json",
        callback=lambda ctx, param, value: _read_run_json(ctx, value),
        help="A JSON object of flags; flags given here win.",
    )
    return config(click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command))


def _flags() -> list[click.Parameter]:
    return [_option(f.name, f.metadata["flag"]) for f in fields(RunConfig)]


def _resolved(ctx: click.Context, values: dict[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    given = {name: value for name, value in values.items() if value is not None}
    origins = {}
    for name in given:
        from_file = ctx.get_parameter_source(name) == ParameterSource.DEFAULT_MAP
        origins[name] = str(ctx.meta["run_json"]) if from_file else "flag"
    return resolve(given, origins)


@cli.command(cls=_TrainCommand, params=_flags())
@_with_run_options
@click.pass_context
def train(ctx: click.Context, /, debug: bool, **values: Any) -> int:
    """Train (the same as without a subcommand)."""
    config, origins = _resolved(ctx, values)
    check_hub(config.data, config.tokenizer)
    find_tokenizer(config.tokenizer)
    if config.data != "c4":
        open_source(config.data, "train", config.eval_data)

    _let_cuda_grow_segments()
    from galore_pretrain import run  # torch and transformers: only for a run that makes sense so far

    return run.train(config, origins)


@cli.command(cls=_TrainCommand, params=_flags())
@_with_run_options
@click.option("--json", "as_json", is_flag=True, help="Print what a program can read.")
@click.option("--compare", metavar="ROWS", help="Draw a bar for each of these optimizers: adamw,galore_adamw8bit,…")
@click.option("--picture", type=click.Path(path_type=Path), help="Where --compare draws.  [memory-MODEL.png]")
@click.option("--paper", is_flag=True, help="Print the paper's memory tables instead; needs no --model.")
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    debug: bool,
    as_json: bool,
    compare: str | None,
    picture: Path | None,
    paper: bool,
    **values: Any,
) -> int:
    """Say what memory a run would take, with the same flags, without running it."""
    if paper:
        from galore_pretrain import paper as tables

        click.echo(
            json.dumps({"paper": tables.by_the_papers_rule(), "exact": tables.exact()}, indent=2)
            if as_json
            else tables.report()
        )
        return 0
    rows = list(dict.fromkeys(row.strip() for row in compare.split(","))) if compare else [values["optim"]]
    resolved = [_resolved(ctx, values | {"optim": row} | _cleared(row if compare else "")) for row in rows]

    from galore_pretrain import budget, report  # torch and transformers

    available = budget.budget_of(resolved[0][0])
    found = [budget.planned(config, origins, available) for config, origins in resolved]
    if compare:
        bars: dict[str, dict[str, int]] = {}
        for row, plan in zip(rows, found, strict=True):
            name = plan.config.optim + (" layerwise" if plan.config.layerwise else "")
            bars[row if name in bars else name] = plan.parts
        model = Path(resolved[0][0].model).stem
        picture = picture or Path(f"memory-{model}.png")
        first = resolved[0][0]
        title = f"{model} in {first.dtype}, updates of {first.total_batch_size} × {first.max_length} tokens"
        report.draw_memory(picture, title, bars, available)
    if as_json:
        answers = [plan.as_json(available) for plan in found]
        click.echo(json.dumps(dict(zip(rows, answers, strict=True)) if compare else answers[0], indent=2))
    else:
        for plan in found:
            click.echo((f"{plan.config.optim}\n" if compare else "") + plan.table(available) + "\n" * bool(compare))
        if compare:
            click.echo(f"drawn: {picture}")
    return 0


def _cleared(row: str) -> dict[str, None]:
    """Of rows that are compared, each takes the flags that mean something to it; a rank is GaLore's alone."""
    return dict.fromkeys(without_meaning(row)) if row else {}


def _let_cuda_grow_segments() -> None:
    """Fragments of CUDA's allocator would take from a card what no plan can know. What the user has set stays.

    To be called before torch is imported: its allocator reads this once.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _read_run_json(ctx: click.Context, path: Path | None) -> None:
    if path is None:
        return
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: not readable as JSON ({error})") from error
    names = {f.name for f in fields(RunConfig)}
    if isinstance(values, dict) and isinstance(resolved := values.get("config"), dict):
        # a run's own config.json: what it was, but for its place
        values = {
            k: v["value"] for k, v in resolved.items() if v["value"] is not None and k not in ("output", "resume")
        }
    if not isinstance(values, dict) or (unknown := [key for key in values if key.replace("-", "_") not in names]):
        what = f"unknown key {unknown[0]!r}" if isinstance(values, dict) else "not a JSON object"
        raise InputError(f'--config {path}: {what}; keys are the long flags, such as "total_batch_size"')
    for f in fields(RunConfig):
        for key in {f.name, f.name.replace("_", "-")} & values.keys():
            if not _fits(values[key], f.metadata["flag"].kind):
                raise InputError(
                    f"--config {path}: {key} is {values[key]!r}, which --{key.replace('_', '-')} cannot be"
                )
    ctx.default_map = {key.replace("-", "_"): value for key, value in values.items()}
    ctx.meta["run_json"] = path


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a flag's kind; a string is left to be parsed as on the command line."""
    if isinstance(value, str) or value is None:
        return kind is not bool or value is None
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if isinstance(value, list):
        return kind is parse_betas and all(isinstance(part, (int, float)) for part in value)
    return (isinstance(value, int) and kind in (int, float, parse_count, parse_bytes)) or (
        isinstance(value, float) and kind is float
    )


class _TqdmHandler(logging.Handler):
    """Log lines on stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are log lines; what libraries tell their developers is kept from the user."""
    del category, lineno, file, line
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    logging.getLogger("galore_pretrain").log(logging.WARNING if ours else logging.DEBUG, "%s", message)


def main() -> None:
    """The entry point: exceptions become one line and an exit code."""
    logger = logging.getLogger("galore_pretrain")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_TqdmHandler())
    warnings.showwarning = _show_warning
    debug = "--debug" in sys.argv[1:]
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        code = _fail(error.format_message(), 2, debug)
    except InputError as error:
        code = _fail(str(error), 2, debug)
    except TrainingFailedError as error:
        code = _fail(str(error), 1, debug)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except Exception as error:
        if debug:
            raise
        code = _fail(f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)", 1, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        logging.getLogger("galore_pretrain").exception("with --debug:")
    click.echo(f"Error: {message}", err=True)
    return code
