"""From what the user said to a complete config: the published recipes, what follows from them, and the checks.

defaults < recipe < run JSON < flags. No torch in here: a wrong flag is refused at once.
"""

import json
import math
import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, replace
from glob import has_magic
from pathlib import Path
from typing import Any, NoReturn

from galore_pretrain.config.evaluated import eval_texts
from galore_pretrain.config.options import (
    EXECUTION,
    FLAGS,
    ONE_PROCESS,
    RECIPE,
    ExecutionSettings,
    Flag,
    Processes,
    RunConfig,
    find_init,
    find_model,
    model_name,
    parse_bytes,
    state_of,
    texts_of,
)
from galore_pretrain.config.recipes import printed_tokens, recipe
from galore_pretrain.config.tasks import (
    ENCODER,
    GLUE,
    meaningless_for,
    replaced_defaults,
    task_recipe,
    warmup_share,
)
from galore_pretrain.errors import InputError, did_you_mean
from galore_pretrain.optim import OPTIONS, is_own, method, resolve_name

CHOSEN = "chosen"
"""The origin of a value that the memory budget was free to choose, as ``config.json`` tells it."""
ALL = "all"
"""What ``plan --optim`` takes for all methods."""
FIT = "fit"
"""The origin of a value that ``--fit anything`` took in place of the one that was asked for."""
AS_BEFORE = "as before"
"""The origin of such a value where the run was resumed."""
BY_EPOCHS = (
    "steps",
    "warmup_steps",
    "decay_steps",
    "eval_every",
    "save_every",
    "relora_every",
    "relora_warmup",
)
"""The flags that follow from how many updates an epoch has, where they are left out."""
_LONG_RUN = 20_000
"""Updates. In longer runs, moments that are carried from basis to basis do better with a shorter memory of squares."""
_TRANSPORTED = "moments project in more than 20,000 updates, LDAdam's scripts (arXiv 2410.16103) and arXiv 2607.05872"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack")
"""What files with a model's weights are called."""


def resolve(
    given: Mapping[str, Any], sources: Mapping[str, str], processes: Processes = ONE_PROCESS
) -> tuple[RunConfig, dict[str, str]]:
    """Return the complete config, and where each field's value came from. InputError for what does not fit together.

    ``given`` holds what the user said, field by field; ``sources`` by what means (``flag``, or the name of a run JSON).
    The config's execution is a first proposal: of its fields, ``undecided`` names those that the user left out.
    """
    values: dict[str, Any] = {name: flag.default for name, flag in FLAGS.items()} | dict(given)
    origins = {name: sources.get(name, "default") for name in FLAGS}
    if values["task"] is not None:
        _take_task(values, origins)
    elif values["epochs"] is not None:
        raise InputError(f"--epochs {values['epochs']}: only a task has them; give --steps, or --task")
    _take_model_of_init(values, origins)
    if values["model"] is None:
        raise InputError("--model is missing; name a shipped model such as llama_60m, or a JSON config")
    check_bounds(values)
    find_model(values["model"], on_hub=values["init"] is not None)
    if values["init"] is None:
        _refuse_weights(values["model"])
    model = model_name(values["model"])

    def fill(name: str, value: Any, origin: str) -> None:
        if values[name] is None and value is not None:
            values[name] = value
            origins[name] = origin

    asked = {name for name in EXECUTION if given.get(name) is not None}
    asked |= _resolve_alias(values, origins, asked)
    if is_own(values["optim"]):
        _load_own(values["optim"], values["allow_code"], sources)
    meaningless = without_meaning(values["optim"])
    _check_meaning(values, meaningless)
    left_alone = _left_alone(values["optim"], meaningless)
    if values["max_tokens"] == RECIPE:
        values["max_tokens"], origins["max_tokens"] = printed_tokens(model)
    _fill_from_recipes(values, fill, left_alone)
    for name, (value, origin) in _defaults(values, processes).items():
        if name not in left_alone:
            fill(name, value, origin)

    undecided = frozenset(EXECUTION) - asked
    if not values["grad_clip"]:
        _refuse_norm_of_nothing(values)
        undecided -= {"clip_norm"}
    elif "clip_norm" in undecided:
        values["clip_norm"] = known_norm(values, processes)
    origins |= dict.fromkeys(undecided, CHOSEN)
    _check(values, processes)
    if values["accumulate_on"] == "host":
        _check_host_sums(values, processes, size_is_asked="batch_size" not in undecided)
    return RunConfig(**values, processes=processes, undecided=undecided), origins


# A rule from outside the package has values of its own. No default of a shipped method replaces them, only a recipe of
# its own, and a flag.
def _left_alone(optim: str, meaningless: Container[str]) -> set[str]:
    """Return the flags that stay unset where the user does not set them: those without meaning, and an own rule's."""
    flags = {flag for flag in FLAGS if flag in meaningless}
    if is_own(optim):
        of_recipes = {flag for entry in method(optim).recipes for flag in entry.values}
        flags |= OPTIONS.keys() - of_recipes
    return flags


def _fill_from_recipes(
    values: Mapping[str, Any], fill: Callable[[str, Any, str], None], left_alone: Container[str]
) -> None:
    """Fill in what the recipes of the task, the model and the method say. InputError for two lengths of a run."""
    of_pretraining = recipe(model_name(values["model"]), values["optim"])
    if values["task"] is not None:
        for name in _fill_from_task(values, fill, left_alone):
            of_pretraining.pop(name, None)
    for name, (value, source) in of_pretraining.items():
        length_is_known = name == "steps" and values["max_tokens"]
        has_no_group = name == "weight_group" and values["weights"] == "dense"
        if name not in left_alone and not length_is_known and not has_no_group:
            fill(name, value, f"recipe: {source}")
    if values["steps"] and values["max_tokens"]:
        raise InputError(
            f"--steps {values['steps']} and --max-tokens {values['max_tokens']} both end the run; give one"
        )


# A task begins from weights that are trained: what --model names is where these are.
def _take_task(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Give a run the model, the text and the defaults of its task; InputError for flags that mean nothing to it."""
    task = values["task"]
    for name, why in meaningless_for(task).items():
        if values[name] != FLAGS[name].default:  # a run's own config.json has all values, those of no meaning too
            raise InputError(f"--{name.replace('_', '-')} has no meaning for --task {task}: {why}; leave it out")
    if values["epochs"] and values["steps"]:
        raise InputError(f"--epochs {values['epochs']} and --steps {values['steps']} both end the run; give one")
    if values["init"] is None:
        if values["model"] is None and task not in GLUE:
            raise InputError(
                f"--model is missing: --task {task} begins from a model that exists; name its folder or hub id"
            )
        if values["model"] is None:
            values["model"] = ENCODER
            origins["model"] = f"task {task}"
        values["init"] = values["model"]
        origins["init"] = "model"
    for name, (value, source) in replaced_defaults(task).items():
        keeps_apart = name == "documents" and values["layout"] == "pad"  # a conversation a row sees no other
        if origins[name] == "default" and not keeps_apart:
            values[name] = value
            origins[name] = f"recipe: {source}"
    if task not in GLUE and origins["data"] == "default":
        raise InputError(f"--data is missing: --task {task} has no text of its own; give a FILE.jsonl of conversations")


def _fill_from_task(
    values: Mapping[str, Any], fill: Callable[[str, Any, str], None], left_alone: Container[str]
) -> set[str]:
    """Fill in a task's recipe, and return the flags that no recipe of pretraining may fill."""
    task, optim = values["task"], values["optim"]
    of_task = task_recipe(task, optim, values["rank"])
    length_is_known = values["steps"] or values["max_tokens"]
    for name, (value, source) in of_task.items():
        if name not in left_alone and not (name == "epochs" and length_is_known):
            fill(name, value, f"recipe: {source}")
    if values["lr"] is None:
        raise InputError(
            f"--lr is missing: no recipe has one for --optim {optim} on --task {task}; give one, such as 2e-5"
        )
    return {"lr", "steps", *of_task}


# How many updates an epoch has is known when the examples are open.
def with_epochs(config: RunConfig, updates: int) -> tuple[RunConfig, dict[str, str]]:
    """Return the config of a run by epochs of so many ``updates`` each, and the origins of what was filled in."""
    assert config.task is not None
    assert config.epochs is not None
    steps = config.epochs * updates
    warmup = round(warmup_share(config.task, config.optim) * steps)
    values: dict[str, tuple[Any, str]] = {
        "steps": (steps, f"{config.epochs} epochs of {updates} updates"),
        "warmup_steps": (warmup, "a share of steps"),
        "eval_every": (updates, "an epoch"),
        "save_every": (updates, "an epoch"),
    }
    if "relora_every" in method(config.optim).options:
        values["relora_every"] = (math.ceil(steps / 5), "chosen here: a fifth of the run")
        values["relora_warmup"] = (min(100, steps // 50), "chosen here: a tenth of relora_every, at most 100")
    if config.scheduler == "wsd":
        values["decay_steps"] = (max(1, steps // 10), "a tenth of steps")
    missing = {name: entry for name, entry in values.items() if getattr(config, name) is None}
    filled = replace(config, **{name: value for name, (value, _) in missing.items()})
    _check_length(filled.values())
    return filled, {name: origin for name, (_, origin) in missing.items()}


def _take_model_of_init(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Take the model from where the weights come from, unless one is named, and of a run whether texts have a marker.

    Raises InputError where there are no weights.
    """
    place = values["init"]
    if place is None:
        return
    find_init(place)
    if values["model"] is None:
        values["model"] = place
        origins["model"] = "init"
    state = state_of(Path(place))
    if state is not None and values["bos"] == "auto":  # its tokenizer may add one that the run did without
        values["bos"] = _saved_values(state, place).get("bos", "no")
        origins["bos"] = "init"


def _saved_values(state: Path, place: str) -> dict[str, Any]:
    """Return the values of the flags in a checkpoint's ``state.json``; InputError where that holds none."""
    try:
        values: dict[str, Any] = json.loads(state.read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--init {place}: {state} is not as a run wrote it ({error}); name another checkpoint"
        ) from error
    return values


def _refuse_weights(model: str) -> None:
    """Raise InputError where ``--model`` names a folder with weights, which a run would not begin from."""
    folder = Path(model)
    if state_of(folder) is not None:
        raise InputError(f"--model {model} is of a run, with its weights: give --init {model} to begin from these")
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if any(file.match(pattern) for pattern in _WEIGHTS):
            raise InputError(
                f"--model {model} holds weights ({file.name}), and a run begins with new ones: give --init {model} "
                f"to begin from these, or name {folder / 'config.json'} to train its architecture from new weights"
            )


def _defaults(values: Mapping[str, Any], processes: Processes) -> dict[str, tuple[Any, str]]:
    """Return what follows from the rest where neither the user nor the recipe says anything, and why."""
    steps, total = values["steps"], values["total_batch_size"]
    paper = "GaLore appendix C.1"
    is_reference = values["numerics"] == "reference"
    numerics = "numerics reference" if is_reference else "default"
    basis = ("svd" if is_reference else "randomized", numerics)
    refresh = ("together" if is_reference else "staggered", numerics)

    updates = steps
    if values["max_tokens"]:
        updates = math.ceil(values["max_tokens"] / (total * values["max_length"]))
    relora_every, relora_warmup, often = values["relora_every"], None, None
    if updates:  # of a run by epochs, the examples have to be counted first: `with_epochs`
        relora_every = relora_every or math.ceil(updates / 5)
        often = min(1000, math.ceil(updates / 10))
    if relora_every:
        relora_warmup = min(100, relora_every // 10)
    min_lr_ratio = 0.1 if values["scheduler"] == "cosine" else 0.0
    warmup_steps = decay_steps = None
    if steps:
        warmup_steps = min(steps // 10, max(0, steps - (values["decay_steps"] or 0)))
        if values["scheduler"] == "wsd":
            decay_steps = max(1, steps // 10)

    betas = None
    transports = values["moments"] == "project" and "eps" in method(values["optim"]).options
    if transports and updates and updates > _LONG_RUN:
        betas = (0.9, 0.99)
    optim = re.sub(r"[^\w.+]+", "-", Path(values["optim"]).name)  # of an own one, FILE.py:NAME without its folder
    parts = (model_name(values["model"]), values["task"], optim, time.strftime("%Y%m%d-%H%M%S"))
    name = "-".join(part for part in parts if part)
    tokenizer = {"c4": "t5", "sample": "sample"}.get(" + ".join(texts_of(values["data"])))
    source_of_tokenizer = f"data {values['data']}"
    if values["init"] is not None:
        tokenizer = values["init"]
        source_of_tokenizer = "init"
    return {
        "weights": ("dense", "default"),
        "weight_group": ("row", "default"),
        "proj_type": ("std", "default"),
        "basis": basis,
        "bases": ("dense", "default"),
        "refresh": refresh,
        "moments": ("keep", "default"),
        "betas": (betas, f"recipe: {_TRANSPORTED}"),
        "natural_history": (20, "default"),
        "natural_damping": (1e-3, "default"),
        "lora_alpha": (32.0, paper),
        "lora_dropout": (0.05, paper),
        "relora_every": (relora_every, "chosen here: a fifth of the run"),
        "relora_warmup": (relora_warmup, "chosen here: a tenth of relora_every, at most 100"),
        "min_lr_ratio": (min_lr_ratio, f"scheduler {values['scheduler']}"),
        "warmup_steps": (warmup_steps, "a tenth of steps"),
        "decay_steps": (decay_steps, "a tenth of steps"),
        "eval_every": (often, "a tenth of the run, at most 1000"),
        "save_every": (often, "a tenth of the run, at most 1000"),
        "batch_size": (max(micro_batch_sizes(total, processes), default=1), CHOSEN),
        "tokenizer": (tokenizer, source_of_tokenizer),
        "output": (f"runs/{name}", "default"),
    }


def micro_batch_sizes(total: int, processes: Processes) -> list[int]:
    """Return the sizes of a micro-batch worth trying: on a CPU, more than 8 were slower (8 × 256 beat 32 × 256)."""
    return [size for size in range(1, 9) if total % (size * processes.total) == 0]


def with_execution(config: RunConfig, execution: ExecutionSettings) -> RunConfig:
    """Return ``config`` with another execution of its updates; InputError where that does not go with the rest."""
    changed = replace(config, **asdict(execution))
    _check(changed.values(), config.processes)
    return changed


# The norm of the full gradient is known where the full gradient is. Layerwise sums of several micro-batches are those
# of projected gradients, and so are those of replicas under ``--reduce projected``.
def known_norm(values: Mapping[str, Any], processes: Processes) -> str:
    """Return which norm can be clipped: ``full``, or ``projected`` where only that of projected gradients is known."""
    has_several = values["total_batch_size"] != values["batch_size"] * processes.total
    keeps_projected = values["layerwise"] and (has_several or values["reduce"] == "projected")
    if keeps_projected and method(values["optim"]).projects:
        return "projected"
    return "full"


def _refuse_norm_of_nothing(values: Mapping[str, Any]) -> None:
    norm = values["clip_norm"]
    if norm is not None:
        raise InputError(f"--clip-norm {norm} has no meaning without --grad-clip; give one, such as 1")


def check_bounds(values: Mapping[str, Any]) -> None:
    """Raise InputError for the first value of a flag that is beyond the flag's bounds."""
    for name, value in values.items():
        _check_bound(name, FLAGS[name], value)


def _check_bound(name: str, flag: Flag, value: Any) -> None:
    dashed = name.replace("_", "-")
    if isinstance(value, int) and value >= 2**63:
        raise InputError(f"--{dashed} {value} must be less than 2^63")
    low, bound = flag.least, "at least"
    if flag.above is not None:
        low, bound = flag.above, "greater than"
    if low is None or value is None:
        return
    if not math.isfinite(value):
        raise InputError(f"--{dashed} {value} must be a finite number")
    if value < low or value == flag.above:
        limit = f"{low:g}"
        if flag.kind is parse_bytes:
            limit = f"{low:,.0f} bytes; write a unit, such as 24GiB"
        raise InputError(f"--{dashed} {value} must be {bound} {limit}")


def _resolve_alias(values: dict[str, Any], origins: dict[str, str], asked: set[str]) -> set[str]:
    """Replace the name that ``--optim`` gives by the row that it means, and return the flags that it asks for.

    A name can ask for layerwise updates (``…_per_layer``), as ``--reduce projected`` does. ``asked`` holds the flags
    that the user gave.
    """
    name = values["optim"]
    values["optim"], is_layerwise = _resolved_name(name)
    if is_layerwise and not values["layerwise"]:
        if "layerwise" in asked:
            raise InputError(
                f"--optim {name} asks for --layerwise; leave out --no-layerwise, or name {values['optim']}"
            )
        values["layerwise"] = True
        origins["layerwise"] = f"optim {name}"
        return {"layerwise"}
    if values["reduce"] == "projected" and "layerwise" not in asked:
        values["layerwise"] = True
        origins["layerwise"] = "reduce projected"
        return {"layerwise"}
    return set()


# To load a method is to execute its file. A config, a sweep's file or a leaderboard's entry can come from anybody, so
# what they name is executed only where the one who types the command says so.
def _load_own(optim: str, allow_code: bool, sources: Mapping[str, str]) -> None:
    """Load a method from outside the package, if this command line names it or allows it; InputError if not."""
    place = sources.get("allow_code", "flag")
    if allow_code and place != "flag":
        raise InputError(f"{place} sets allow_code, which only a command line can: leave it out there")
    place = sources.get("optim", "flag")
    if place != "flag" and not allow_code:
        raise InputError(
            f"--optim {optim} stands in {place}, and a file is executed only where this command line names it: "
            f"add --optim {optim}, or --allow-code"
        )
    load_named(optim)


def load_named(optim: str) -> None:
    """Load a method from outside the package that the command line names; do nothing for a method of the table."""
    if not is_own(optim):
        return
    from galore_pretrain.optim import load_method  # torch

    try:
        load_method(optim)
    except ValueError as error:
        raise InputError(f"--optim {error}") from error


def _resolved_name(name: str) -> tuple[str, bool]:
    """Return what `resolve_name` does; InputError for an unknown name, which is the user's."""
    if name == ALL:
        raise InputError(f"--optim {ALL}: only plan makes a table of all methods; name one")
    try:
        return resolve_name(name)
    except ValueError as error:
        raise InputError(f"--optim {error}") from error


def without_meaning(optim: str) -> dict[str, str]:
    """Return the flags that a method has no use for, and why; InputError where ``optim`` names none."""
    name, _ = _resolved_name(optim)
    used = method(name).options
    return {flag: option.why for flag, option in OPTIONS.items() if flag not in used}


def left_out(optim: str) -> dict[str, None]:
    """Return {flag: None} for the flags that a method is not to get when all methods of a comparison are given them."""
    flags = dict.fromkeys(without_meaning(optim))
    if not method(optim).projects:
        flags["reduce"] = None
    if method(optim).factors_updated_by:
        flags["matmul"] = None
        flags["weights"] = None
        flags["weight_group"] = None
    return flags


def _check_meaning(values: Mapping[str, Any], meaningless: Mapping[str, str]) -> None:
    for name, why in meaningless.items():
        if values[name] is not None:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {values[name]} has no meaning for --optim {values['optim']}; {why}")


def _check(values: Mapping[str, Any], processes: Processes) -> None:
    """Check what depends on two fields. Each message says which, and the way out."""
    if values["lr"] is None:
        raise InputError(f"--lr is missing: --optim {values['optim']} has no recipe for it; give one, such as 0.001")
    _check_batch(values, processes.total)
    if values["clip_norm"] == "projected" and not method(values["optim"]).projects:
        raise InputError(f"--clip-norm projected: {values['optim']} keeps whole gradients; leave it out")
    if values["reduce"] == "projected":
        _check_reduce(values, processes)
    if values["clip_norm"] == "full" and known_norm(values, processes) == "projected":
        _refuse_full_norm(values, processes.total)
    _check_matrices(values, processes)
    _check_length(values)
    check_documents(values["layout"], values["documents"])
    if (values["lora_dropout"] or 0) >= 1:
        raise InputError(f"--lora-dropout {values['lora_dropout']} must be less than 1")
    if not values["output"]:
        raise InputError("--output is empty; give a folder")
    if values["task"] in GLUE and processes.total > 1:
        raise InputError(
            f"--task {values['task']} is one process's work, and torchrun has started {processes.total}: an epoch's "
            "last update may have fewer examples than processes; start it without torchrun"
        )
    texts = texts_of(values["data"])
    if len(texts) > 1:
        _refuse_all_but_paths(texts)
    eval_texts(values["eval_data"])  # refuses two of one name
    if values["tokenizer"] is None:
        for text in texts:
            is_there = text.startswith("hub:") or Path(text).exists() or has_magic(text)
            if not is_there:
                raise InputError(
                    f"--data {text}: no such file, folder or pattern; {did_you_mean(text, ('c4', 'sample'))}"
                    "choose c4, hub:ORG/NAME, sample or a path"
                )
        raise InputError(
            f"--tokenizer is missing: --data {' + '.join(texts)} needs one; "
            "give t5, sample, a .model file, a folder or a hub id"
        )


def check_documents(layout: str, documents: str) -> None:
    """Raise InputError where documents are to be kept apart that share no row."""
    if documents == "separate" and layout == "pad":
        raise InputError(
            "--documents separate: --layout pad has a document a row, which sees no other; leave it out, or give "
            "--layout pack"
        )


def _refuse_all_but_paths(texts: Sequence[str]) -> None:
    """Check that each of several texts may be a path: only files are joined to one text."""
    for text in texts:
        if text in ("c4", "sample") or text.startswith("hub:"):
            raise InputError(
                f"--data {text}: cannot be joined to another --data; give it alone, or paths of local files"
            )


def _check_batch(values: Mapping[str, Any], processes: int) -> None:
    """Check that micro-batches and processes share an update's sequences out evenly."""
    total, size = values["total_batch_size"], values["batch_size"]
    if total % processes:
        nearest = max(1, round(total / processes)) * processes
        raise InputError(
            f"--total-batch-size {total} is not a multiple of the {processes} processes; give "
            f"{nearest}, or start another number of them"
        )
    of_each = total // processes
    if of_each % size:
        divisors = (d for d in range(1, of_each + 1) if of_each % d == 0)
        nearest = min(divisors, key=lambda divisor: abs(divisor - size))
        times = f" × {processes} processes" if processes > 1 else ""
        raise InputError(
            f"--total-batch-size {total} is not a multiple of --batch-size {size}{times}; "
            f"the nearest --batch-size is {nearest}"
        )


def _refuse_full_norm(values: Mapping[str, Any], processes: int) -> NoReturn:
    of_each = values["total_batch_size"] // processes
    raise InputError(
        f"--clip-norm full: --layerwise updates of {of_each // values['batch_size']} micro-batches keep low-rank "
        "sums, which do not tell the norm of the full gradient; use --clip-norm projected, "
        f"--batch-size {of_each}, or --no-layerwise"
    )


def _check_length(values: Mapping[str, Any]) -> None:
    """Check what depends on the run's length and on its learning rate."""
    if values["steps"] and (values["warmup_steps"] or 0) > values["steps"]:
        raise InputError(f"--warmup-steps {values['warmup_steps']} exceeds --steps {values['steps']}")
    decay = values["decay_steps"]
    if decay and values["scheduler"] != "wsd":
        raise InputError(
            f"--decay-steps {decay}: only --scheduler wsd decays at the end; give that, or leave --decay-steps out"
        )
    if decay and values["steps"] and values["warmup_steps"] + decay > values["steps"]:
        raise InputError(
            f"--decay-steps {decay} and --warmup-steps {values['warmup_steps']} are together more than --steps "
            f"{values['steps']}; give less of one"
        )
    if values["min_lr_ratio"] > 1:
        raise InputError(f"--min-lr-ratio {values['min_lr_ratio']} must be at most 1")
    every, warmup = values["relora_every"], values["relora_warmup"]
    if every and warmup and warmup > every:
        raise InputError(
            f"--relora-warmup {warmup} exceeds --relora-every {every}: the learning rate would never recover from a "
            "merge"
        )


# The micro-batch that a budget chooses may be the whole update, which has no sums: so much the better.
def _check_host_sums(values: Mapping[str, Any], processes: Processes, *, size_is_asked: bool) -> None:
    """Check that there are sums to lie on the host, and that they can."""
    why = None
    if values["device"] == "cpu":
        why = "a CPU's sums lie in the host's memory already; leave it out"
    elif processes.total > 1:
        why = (
            f"{processes.total} processes find norms and bases together, in sums that lie on their devices; leave it "
            "out: those that share a model out (--shard full) share its sums out too"
        )
    elif size_is_asked and values["batch_size"] == values["total_batch_size"]:
        why = (
            f"--batch-size {values['batch_size']} makes an update of one micro-batch, which sums nothing; leave it out"
        )
    if why:
        raise InputError(f"--accumulate-on host: {why}")


def _check_matrices(values: Mapping[str, Any], processes: Processes) -> None:
    """Check that matrices can be multiplied and held as 8-bit integers, where they are to be."""
    if values["matmul"] != "dense" and method(values["optim"]).factors_updated_by:
        raise InputError(
            f"--matmul {values['matmul']}: {values['optim']} multiplies by thin factors, to quantize whose other "
            "factor takes about as long as their product; leave it out"
        )
    if values["weights"] == "dense":
        if values["weight_group"] != "row":
            raise InputError(f"--weight-group {values['weight_group']}: says how --weights int8 is held; give that too")
        return
    why = None
    if method(values["optim"]).factors_updated_by:
        why = f"{values['optim']} trains thin factors, and what they are added to is not held so"
    elif values["numerics"] == "reference":
        why = "--numerics reference rounds to nearest, by which most changes of a code would be lost"
    elif values["matmul"] != "dense" and values["weight_group"] != "row":
        raise InputError(
            f"--matmul {values['matmul']}: multiplies by the codes of --weights int8, which takes one scale a row, and "
            f"--weight-group is {values['weight_group']}; give --weight-group row"
        )
    elif values["compile"]:
        why = "torch's compiler does not know of codes that change in place"
    elif processes.total > 1:
        why = f"{processes.total} processes would have to share codes and scales out"
    if why:
        raise InputError(f"--weights {values['weights']}: {why}; leave one out")


def _check_reduce(values: Mapping[str, Any], processes: Processes) -> None:
    why = None
    if not method(values["optim"]).projects:
        why = f"{values['optim']} keeps whole gradients, not projected ones"
    elif not values["layerwise"]:
        why = "only --layerwise projects a gradient before it is reduced; add that"
    elif values["clip_norm"] == "full":
        why = "no process knows the full norm then; use --clip-norm projected"
    elif processes.total > 1 and values["shard"] == "full":
        why = "--shard full has no replicas; use --shard hybrid or none"
    if why:
        raise InputError(f"--reduce projected: {why}")
