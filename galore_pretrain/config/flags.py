"""The options of the command line, made from `RunConfig`'s fields, and back from them to a config."""

import json
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from galore_pretrain.config.evaluated import parse_eval_text
from galore_pretrain.config.options import (
    FLAGS,
    GROUPS,
    Flag,
    Processes,
    RunConfig,
    parse_betas,
    parse_bytes,
    parse_count,
    parse_factors,
    parse_group,
    parse_place,
    parse_rate,
    parse_setting,
    parse_share,
    parse_tokens,
)
from galore_pretrain.config.resolve import BY_EPOCHS, resolve
from galore_pretrain.errors import InputError


class _Parsed(click.ParamType):  # type: ignore[type-arg]
    """A click type from a function that raises ValueError."""

    def __init__(self, parse: Callable[[str], Any], name: str) -> None:
        self.parse = parse
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse ``value``: a string of the command line, or a number or a list of a run JSON."""
        if isinstance(value, list):
            value = ",".join(map(str, value))
        try:
            return self.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


OF_TASKS = ("task", "epochs")
"""The flags of fine-tuning alone."""
RATE = _Parsed(parse_rate, "rate")
_METAVARS: dict[Any, str] = {
    parse_count: "count",
    parse_tokens: "count",
    parse_betas: "pair",
    parse_bytes: "size",
    parse_factors: "factors",
    parse_group: "group",
    parse_eval_text: "text",
    parse_place: "text",
    parse_setting: "setting",
    parse_share: "share",
}


class _Option(click.Option):
    group = "Other"


def _option(name: str, flag: Flag, shown: str) -> _Option:
    kind: Any = flag.kind
    if isinstance(kind, tuple):
        kind = click.Choice(kind)
    elif not isinstance(kind, type):
        kind = _Parsed(kind, _METAVARS[kind])
    dashed = name.replace("_", "-")
    declaration = f"--{dashed}"
    if kind is bool:
        declaration += f"/--no-{dashed}"
    # The default is not click's to fill in: None says that the user did not set the flag.
    option = _Option(
        [declaration, name],
        type=kind,
        default=None,
        multiple=flag.repeated,
        callback=_value_or_values if flag.repeated else None,
        help=f"{flag.help}  [{shown}]",
    )
    option.group = flag.group
    return option


def _value_or_values(ctx: click.Context, param: click.Parameter, values: Any) -> Any:
    """Return the value of a repeated flag that was given once, all of them if more often, None if never."""
    if not values:
        return None
    if len(values) == 1:
        return values[0]
    return tuple(values)


class RunCommand(click.Command):
    """Shows its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of each group's options, which click calls for ``--help``."""
        for group in (*GROUPS, "Other"):
            records = []
            for param in self.get_params(ctx):
                record = param.get_help_record(ctx)
                if record is not None and getattr(param, "group", "Other") == group:
                    records.append(record)
            with formatter.section(group):
                formatter.write_dl(records)


def with_run_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add the options that training and planning share beside the flags of `RunConfig`."""
    config = click.option(
        "--config",
        type=click.Path(path_type=Path),
        # It must be read before the flags, whose defaults it sets.
        is_eager=True,
        expose_value=False,
        metavar="RUN.json",
        callback=lambda ctx, param, value: _read_run_json(ctx, value),
        help="A JSON object of flags; flags given here win.",
    )
    debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    return config(debug(command))


def flags(names: Container[str] | None = None, shown: Mapping[str, str] | None = None) -> list[click.Parameter]:
    """Return the options of all fields of `RunConfig`, or of those named.

    ``shown`` are defaults for the help of a command whose defaults are not a new run's.
    """
    defaults = shown or {}
    options: list[click.Parameter] = []
    for name, flag in FLAGS.items():
        if names is None or name in names:
            options.append(_option(name, flag, defaults.get(name, flag.shown)))
    return options


def resolved(
    ctx: click.Context, values: dict[str, Any], processes: Processes | None = None
) -> tuple[RunConfig, dict[str, str]]:
    """Return the complete config from a command's options, and where each value came from.

    ``processes`` are those that torchrun has started, if no others are named.
    """
    given = {name: value for name, value in values.items() if value is not None}
    from_file = {name for name in given if ctx.get_parameter_source(name) == ParameterSource.DEFAULT_MAP}
    on_command_line = given.keys() - from_file
    if {"model", "init", "optim"} & on_command_line:
        # The file's other values may follow from its own model and method. Only what its user set holds for these.
        set_by_user: set[str] = ctx.meta.get("set_by_user", from_file)
        for name in from_file - set_by_user:
            del given[name]
    sources = {}
    for name in given:
        sources[name] = str(ctx.meta["run_json"]) if name in from_file else "flag"
    return resolve(given, sources, processes or Processes.started())


# click takes a flag's value from `ctx.default_map` where the command line does not set it, and remembers that it did.
# So the file's values need only be checked and put there.
def _read_run_json(ctx: click.Context, path: Path | None) -> None:
    """Make the values of ``path`` the defaults of the command's options; InputError where it does not fit them."""
    if path is None:
        return
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: not readable as JSON ({error})") from error
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        # It is a run's own config.json, perhaps edited.
        values, ctx.meta["set_by_user"] = _values_of_a_run(values["config"])
    _check_run_json(path, values)
    known = {parameter.name for parameter in ctx.command.params}
    for name in OF_TASKS:
        if name not in known and values.get(name) is not None:
            raise InputError(f"--config {path}: sets {name}, which is fine-tuning's: give it to the command finetune")
    ctx.default_map = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        is_alone = FLAGS[name].repeated and isinstance(value, str)
        ctx.default_map[name] = [value] if is_alone else value
    ctx.meta["run_json"] = path


def _values_of_a_run(config: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return the values of a run's ``config``, without its place, and the names of those that its user had set."""
    values = {}
    set_by_user = set()
    for name, value_or_entry in config.items():
        entry = value_or_entry
        if not isinstance(entry, dict):
            # Its user wrote a plain value in place of the entry.
            entry = {"value": value_or_entry, "origin": "flag"}
        if entry.get("value") is None or name in ("output", "resume", "allow_code"):
            continue
        values[name] = entry["value"]
        origin = str(entry.get("origin", "flag"))
        if origin == "flag" or origin.endswith(".json"):
            set_by_user.add(name)
    if "epochs" in values:  # from which they follow anew
        for name in set(BY_EPOCHS) - set_by_user:
            values.pop(name, None)
    return values, set_by_user


def _check_run_json(path: Path, values: Any) -> None:
    """Raise InputError unless ``values`` is an object of flags, by their names, each with a value that it can have."""
    keys_are = 'keys are the long flags, such as "total_batch_size"'
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: not a JSON object; {keys_are}")
    for key in values:
        if key.replace("-", "_") not in FLAGS:
            raise InputError(f"--config {path}: unknown key {key!r}; {keys_are}")
    for key, value in values.items():
        known = FLAGS[key.replace("-", "_")]
        if known.repeated and isinstance(value, list) and value:
            fits = all(isinstance(part, str) for part in value)
        else:
            fits = _fits(value, known.kind)
        if not fits:
            flag = key.replace("_", "-")
            raise InputError(f"--config {path}: {key} is {value!r}, which --{flag} cannot be")


def _fits(value: Any, kind: Any) -> bool:
    """Say whether a JSON value is of a flag's kind. A string is left to be parsed as on the command line."""
    if value is None:
        return True
    if isinstance(value, str):
        return kind is not bool
    # In Python a bool is an int too, so it must be asked for first.
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, list):
        return kind is parse_betas and all(isinstance(part, (int, float)) for part in value)
    if isinstance(value, int):
        return kind in (int, float, parse_count, parse_tokens, parse_bytes, parse_share)
    return isinstance(value, float) and kind in (float, parse_share)
