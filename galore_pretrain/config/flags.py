"""The options of the command line, made from `RunConfig`'s fields, and back from them to a config."""

import json
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from galore_pretrain.config.options import (
    FLAGS,
    GROUPS,
    Flag,
    Processes,
    RunConfig,
    parse_betas,
    parse_bytes,
    parse_count,
    parse_rate,
    parse_tokens,
)
from galore_pretrain.config.resolve import resolve
from galore_pretrain.errors import InputError


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


RATE = _Parsed(parse_rate, "rate")
_METAVARS: dict[Any, str] = {parse_count: "count", parse_tokens: "count", parse_betas: "pair", parse_bytes: "size"}


class _Option(click.Option):
    group = "Other"


def _option(name: str, flag: Flag) -> _Option:
    dashed = name.replace("_", "-")
    kind: Any = flag.kind
    if isinstance(kind, tuple):
        kind = click.Choice(kind)
    elif not isinstance(kind, type):
        kind = _Parsed(kind, _METAVARS[kind])
    declaration = f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}"
    option = _Option([declaration, name], type=kind, default=None, help=f"{flag.help}  [{flag.shown}]")
    option.group = flag.group
    return option


class RunCommand(click.Command):
    """Shows its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group in (*GROUPS, "Other"):
            options = [p for p in self.get_params(ctx) if getattr(p, "group", "Other") == group]
            with formatter.section(group):
                formatter.write_dl([record for p in options if (record := p.get_help_record(ctx))])


def with_run_options(command: Callable[..., int]) -> Callable[..., int]:
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


def flags(names: Container[str] | None = None) -> list[click.Parameter]:
    """The options of all fields of `RunConfig`, or of those named."""
    return [_option(name, flag) for name, flag in FLAGS.items() if names is None or name in names]


def resolved(
    ctx: click.Context, values: dict[str, Any], processes: Processes | None = None
) -> tuple[RunConfig, dict[str, str]]:
    """Return the complete config from a command's options, and where each value came from.

    ``processes`` are those that torchrun has started, if no others are named.
    """
    given = {name: value for name, value in values.items() if value is not None}
    from_file = {name for name in given if ctx.get_parameter_source(name) == ParameterSource.DEFAULT_MAP}
    if {"model", "optim"} & (given.keys() - from_file):  # of another run, only what its user said holds for this one
        said: set[str] = ctx.meta.get("said", from_file)
        given = {name: value for name, value in given.items() if name not in from_file - said}
    sources = {name: str(ctx.meta["run_json"]) if name in from_file else "flag" for name in given}
    return resolve(given, sources, processes or Processes.started())


def _read_run_json(ctx: click.Context, path: Path | None) -> None:
    if path is None:
        return
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: not readable as JSON ({error})") from error
    if isinstance(values, dict) and isinstance(resolved := values.get("config"), dict):
        # a run's own config.json, perhaps edited: what it was, but for its place
        entries = {k: v if isinstance(v, dict) else {"value": v, "origin": "flag"} for k, v in resolved.items()}
        values = {
            k: v["value"] for k, v in entries.items() if v.get("value") is not None and k not in ("output", "resume")
        }
        origins = {k: str(v.get("origin", "flag")) for k, v in entries.items()}
        ctx.meta["said"] = {k for k, origin in origins.items() if origin == "flag" or origin.endswith(".json")}
    if not isinstance(values, dict) or (unknown := [key for key in values if key.replace("-", "_") not in FLAGS]):
        what = f"unknown key {unknown[0]!r}" if isinstance(values, dict) else "not a JSON object"
        raise InputError(f'--config {path}: {what}; keys are the long flags, such as "total_batch_size"')
    for name, flag in FLAGS.items():
        for key in {name, name.replace("_", "-")} & values.keys():
            if not _fits(values[key], flag.kind):
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
    return (isinstance(value, int) and kind in (int, float, parse_count, parse_tokens, parse_bytes)) or (
        isinstance(value, float) and kind is float
    )
