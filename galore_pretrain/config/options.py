"""Every option of a run, once: its flag, default, help and check. No torch in here: ``--help`` must be quick.

defaults < recipe < run JSON < flags. `RunConfig`'s fields are the flags; `resolve` fills in what the recipe of the
model and optimizer says and checks what depends on two fields.
"""

import math
import os
import re
from ast import literal_eval
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from glob import glob
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from galore_pretrain.config.evaluated import EvalText, eval_texts, name_and_path, named_path, parse_eval_text
from galore_pretrain.config.tasks import TASKS
from galore_pretrain.errors import InputError, did_you_mean
from galore_pretrain.optim import (
    BASIS_NAMES,
    BASIS_STORES,
    METHODS,
    MOMENT_STORES,
    MOMENTS,
    NUMERICS,
    OPTIONS,
    PROJ_TYPES,
    REFRESHES,
    method,
)
from galore_pretrain.text.hub import download_model, is_hub_id

_THOUSANDS = {"": 0, "k": 1, "m": 2, "b": 3, "g": 3, "t": 4, "p": 5}
"""Powers of 1000 that a letter behind a number stands for."""


def parse_count(text: str) -> int:
    """Parse ``10M``, ``1.1B`` or ``20000``: a whole number of at least 1, with K, M or B (10³, 10⁶, 10⁹) behind it."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text.strip().lower())
    number = Decimal(0)
    if match:
        # In floating point, 1.001 * 1000 is 1000.9999999999999, and so not a whole number.
        number = Decimal(match[1]) * 1000 ** _THOUSANDS[match[2]]
    if number < 1 or number != int(number):
        raise ValueError(f"{text!r} is not a count; write 20000, 500K, 10M or 1.1B")
    return int(number)


@dataclass(frozen=True)
class Processes:
    """Says how many processes make a run: ``total`` of them, ``here`` of them on this host."""

    total: int = 1
    here: int = 1

    @classmethod
    def started(cls) -> "Processes":
        """Return what torchrun has started (WORLD_SIZE, LOCAL_WORLD_SIZE): one process where it has not."""
        total = os.environ.get("WORLD_SIZE", "1")
        here = os.environ.get("LOCAL_WORLD_SIZE", "1")
        return cls(int(total), int(here))


ONE_PROCESS = Processes()
RECIPE = "recipe"


def parse_tokens(text: str) -> int | str:
    """Parse a count, or the word ``recipe``: as many as the paper's table names."""
    if text.strip() == RECIPE:
        return RECIPE
    return parse_count(text)


def parse_bytes(text: str) -> int:
    """Parse a size of memory: ``24GB`` (10⁹), ``24GiB`` (2³⁰) or a number of bytes. Units are of K, M, G and T."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b)?", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is not a size of memory; write 24GiB, 24GB or 24000MB")
    number, letter, binary = match.groups()
    base = 1024 if binary else 1000
    return int(Decimal(number) * base ** _THOUSANDS[letter or ""])


def parse_rate(text: str) -> float:
    """Parse ``989T``, ``450GB`` or ``12.5G``: so many a second, with K, M, G, T or P (10³ to 10¹⁵)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)b?", text.strip().lower())
    rate = 0.0
    if match:
        rate = float(match[1]) * 1000.0 ** _THOUSANDS[match[2]]
    # No hardware is so slow: a smaller number has lost its letter.
    if rate < 1e6:
        raise ValueError(f"{text!r} is not a rate a second; write 989T, 450G or 12.5GB")
    return rate


def parse_share(text: str) -> float:
    """Parse a share of a whole, from 0 to 1: ``0.05`` or ``5%``."""
    number = text.strip()
    scale = 1
    if number.endswith("%"):
        number = number[:-1]
        scale = 100
    try:
        share = float(number) / scale
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"{text!r} is not a share; write 0.05 or 5%, and 1 for all")
    return share


def parse_betas(text: str) -> tuple[float, float]:
    """Parse Adam's two decay rates, as ``0.9,0.999``."""
    message = f"{text!r} is not a pair of numbers in [0, 1); write 0.9,0.999"
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(message) from error
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError(message)
    return first, second


def parse_factors(text: str) -> str:
    """Return ``down=2x,q=0.5x`` as it is, if it names modules and factors; ValueError if not."""
    factors_by_module(text)
    return text


def parse_group(text: str) -> str:
    """Check ``row`` or a number of neighbours: what shares a scale of weights in 8 bits."""
    if text != "row" and not (text.isdigit() and int(text) >= 16):
        raise ValueError(f"{text!r} is neither row nor a number of at least 16")
    return text


def parse_setting(text: str) -> str:
    """Return ``key=value`` as it is, if it is one; ValueError if not."""
    setting_of(text)
    return text


def setting_of(text: str) -> tuple[str, Any]:
    """Return ("beta", 0.9) of ``beta=0.9``. The value is what Python reads it as, or else a string."""
    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key.isidentifier():
        raise ValueError(f"{text!r} is not a setting; write beta=0.9")
    word = value.strip()
    words = {"true": True, "false": False, "inf": math.inf}
    if word.lower() in words:
        return key, words[word.lower()]
    try:
        literal = literal_eval(word)
    except (ValueError, SyntaxError):
        return key, word
    if isinstance(literal, list):  # a rule is a value: what it is made of has to be one too
        literal = tuple(literal)
    return key, literal


def optim_settings(given: str | Sequence[str] | None) -> dict[str, Any]:
    """Return what ``--optim-option`` sets, given never, once or several times. InputError where a key comes twice."""
    texts = (given,) if isinstance(given, str) else tuple(given or ())
    settings: dict[str, Any] = {}
    for text in texts:
        key, value = setting_of(text)
        if key in settings:
            raise InputError(f"--optim-option {text}: {key} is given twice")
        settings[key] = value
    return settings


def factors_by_module(text: str) -> dict[str, float]:
    """Return {"down": 2.0, "q": 0.5} of ``down=2x,q=0.5x``, in its order."""
    factors: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^=\s]+)=(\d*\.?\d+)x\s*", part)
        if not match or float(match[2]) <= 0:
            raise ValueError(f"{part!r} is not a module and a factor; write down=2x,q=0.5x")
        if match[1] in factors:
            raise ValueError(f"{text!r} names {match[1]} twice; give it one factor")
        factors[match[1]] = float(match[2])
    return factors


def parse_place(text: str) -> str:
    """Return a name or a path as it is, but for ``~``, which no shell has replaced in a JSON file or behind a ``=``."""
    if text.startswith("~"):
        return os.path.expanduser(text)
    return text


@dataclass(frozen=True)
class Flag:
    """Says what the command line needs to know of a field.

    ``default`` is None where `resolve` fills the field in, or where None means that it is not in use. ``kind`` is a
    type, the choices, or a parser of strings. Numbers are at ``least``, or ``above``, a bound. ``shown`` stands for the
    default in the help. A ``free`` flag may change when a run is resumed: it does not change what is computed. One that
    is ``repeated`` has a tuple of values where it is given several times.
    """

    default: Any
    help: str
    kind: type | tuple[str, ...] | Callable[[str], Any]
    group: str
    least: float | None = None
    above: float | None = None
    shown: str = "recipe"
    free: bool = False
    repeated: bool = False


def _flag(default: Any, help: str, kind: Any, group: str, **more: Any) -> Any:
    """Return a field of `RunConfig` with its `Flag`. The help shows the default, unless ``shown`` says otherwise."""
    if default is not None and "shown" not in more:
        if kind is bool:
            more["shown"] = "on" if default else "off"
        else:
            more["shown"] = str(default)
    flag = Flag(default, help, kind, group, **more)
    return field(metadata={"flag": flag})


@dataclass(frozen=True)
class ExecutionSettings:
    """Says how an update is executed, which its memory and its speed depend on.

    ``batch_size`` is in sequences a micro-batch. ``clip_norm`` is the norm that is clipped, None where none is: some
    executions do not know the full one. The other three change an update by roundings alone; but with reference
    numerics the mean loss depends on the micro-batch.
    """

    layerwise: bool
    activation_checkpointing: bool
    batch_size: int
    clip_norm: str | None


EXECUTION = tuple(f.name for f in fields(ExecutionSettings))
"""The flags that say how an update is executed. The memory budget decides on those that the user left out."""


CLIP_NORMS = ("full", "projected")
BOS = ("auto", "yes", "no")
BAD_DATA = ("raise", "skip")
LAYOUTS = ("pad", "pack")
DOCUMENTS = ("joined", "separate")
SUMS = ("device", "host")
FITS = ("as-asked", "anything")
SHARDS = ("full", "hybrid", "none")
REDUCE = ("full", "projected")
MATMULS = ("dense", "int8")
WEIGHTS = ("dense", "int8")
WANDB_MODES = ("auto", "online", "offline", "disabled")

METHOD = "Method"
BATCH = "Batch"
TEXT = "Text"
LENGTH = "Length and learning rate"
MACHINE = "Machine"
OUTPUT = "Output"
GROUPS = (METHOD, BATCH, TEXT, LENGTH, MACHINE, OUTPUT)
_TENTH = "a tenth, at most 1000"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run, one field a flag, but for the last three. A field is None only where its type says so: no use.

    `resolve` makes it. ``processes`` make the run. ``undecided`` names the flags of its execution that may still be
    changed to fit the memory budget. ``taken`` are the changes that ``--fit anything`` made: flag, what was asked, what
    was taken.
    """

    model: str = _flag(
        None, "A shipped model (llama_60m, …) or a JSON config.", parse_place, METHOD, shown="required, or from --init"
    )
    init: str | None = _flag(
        None,
        "Begin from the weights of a model's folder, a run or a hub id; its model and tokenizer are taken.",
        parse_place,
        METHOD,
        shown="new weights",
    )
    task: str | None = _flag(None, f"Fine-tune for a task: {', '.join(TASKS)}.", TASKS, METHOD, shown="pretraining")
    optim: str = _flag("galore_adamw", f"Optimizer: {', '.join(METHODS)}, or FILE.py:NAME.", parse_place, METHOD)
    optim_option: str | tuple[str, ...] | None = _flag(
        None, "An option of the optimizer, KEY=VALUE; repeatable.", parse_setting, METHOD, shown="none", repeated=True
    )
    allow_code: bool = _flag(
        False, "Execute a FILE.py:NAME that a file, not this command line, names.", bool, METHOD, free=True
    )
    rank: int | None = _flag(None, "Rank r: of GaLore's subspace, or of the factors.", int, METHOD, least=1)
    rank_by_module: str | None = _flag(
        None, "Factors on the rank of modules: down=2x,q=0.5x.", parse_factors, METHOD, shown="off"
    )
    update_proj_gap: int | None = _flag(None, "GaLore: updates T between two bases.", int, METHOD, least=1)
    galore_scale: float | None = _flag(None, "GaLore: factor α on projected updates.", float, METHOD, above=0)
    proj_type: str | None = _flag(None, "GaLore: side that is projected.", PROJ_TYPES, METHOD, shown="std")
    basis: str | None = _flag(None, "GaLore: how a basis is found.", BASIS_NAMES, METHOD, shown="randomized")
    bases: str | None = _flag(
        None, "GaLore: keep bases in --dtype, or in 8 or 4 bits an element.", BASIS_STORES, METHOD, shown="dense"
    )
    refresh: str | None = _flag(
        None, "GaLore: renew bases at once, in turn, or as far as they move.", REFRESHES, METHOD, shown="staggered"
    )
    moments: str | None = _flag(None, "GaLore: moments when a basis is renewed.", MOMENTS, METHOD, shown="keep")
    natural_history: int | None = _flag(None, "Natural GaLore: past gradients s.", int, METHOD, least=1, shown="20")
    natural_damping: float | None = _flag(None, "Natural GaLore: damping λ.", float, METHOD, above=0, shown="0.001")
    lora_alpha: float | None = _flag(None, "LoRA, ReLoRA: α; BA counts α/r.", float, METHOD, above=0, shown="32")
    lora_dropout: float | None = _flag(None, "LoRA, ReLoRA: dropout before A.", float, METHOD, least=0, shown="0.05")
    relora_every: int | None = _flag(
        None, "ReLoRA: updates between two merges.", int, METHOD, least=1, shown="a fifth of the run"
    )
    relora_warmup: int | None = _flag(
        None, "ReLoRA: updates of warm-up after a merge.", int, METHOD, least=0, shown="a tenth of that, at most 100"
    )
    matrix_lr_scale: float = _flag(
        1.0, "Factor on the matrices' learning rate; 0 freezes them.", float, METHOD, least=0
    )
    vector_lr_scale: float | None = _flag(
        None, "Factor on the vectors' learning rate.", float, METHOD, least=0, shown="method"
    )
    numerics: str = _flag("sound", "Sound, or the published code's choices.", NUMERICS, METHOD)
    weight_decay: float = _flag(None, "Weight decay.", float, METHOD, least=0)
    betas: tuple[float, float] | None = _flag(
        None,
        "Adam's β, as 0.9,0.999; the first is sgd's and adafactor's momentum.",
        parse_betas,
        METHOD,
        shown="method",
    )
    eps: float | None = _flag(None, "Adam's ε.", float, METHOD, above=0, shown="method")
    moment_store: str | None = _flag(None, "How Adam's moments are kept.", MOMENT_STORES, METHOD, shown="method")

    layerwise: bool = _flag(
        False,
        "Update inside backward; no full set of gradients exists.",
        bool,
        BATCH,
        free=True,
        shown="chosen from the budget",
    )
    activation_checkpointing: bool = _flag(
        False, "Recompute activations in backward.", bool, BATCH, free=True, shown="chosen from the budget"
    )
    batch_size: int = _flag(None, "Sequences a micro-batch.", int, BATCH, least=1, free=True, shown="from the budget")
    total_batch_size: int = _flag(None, "Sequences an update.", int, BATCH, least=1)
    memory_budget: int | None = _flag(
        None,
        "Of the card, as 24GiB: what the three above are chosen for.",
        parse_bytes,
        BATCH,
        free=True,
        above=10**9,
        shown="what the device can give",
    )
    accumulate_on: str = _flag(
        "device",
        "Where a GPU's sums of full gradients over micro-batches lie: there, or in the host's memory.",
        SUMS,
        BATCH,
        free=True,
    )
    fit: str = _flag(
        "as-asked",
        "Where the run does not fit the memory: refuse it, or take the cheapest change that fits, and say so.",
        FITS,
        BATCH,
        free=True,
    )
    grad_clip: float = _flag(None, "Largest gradient norm; 0 is off.", float, BATCH, least=0)
    clip_norm: str | None = _flag(
        None,
        "Norm that is clipped: of gradients, or of projected ones.",
        CLIP_NORMS,
        BATCH,
        shown="full, or projected where only that is known",
    )

    data: str | tuple[str, ...] = _flag(
        "c4",
        "c4, hub:ORG/NAME[:CONFIG], sample, or a file, folder or glob of text; several of these are one text.",
        parse_place,
        TEXT,
        repeated=True,
    )
    text_key: str = _flag("text", "Key or column of the text in --data and --eval-data.", str, TEXT)
    eval_data: str | tuple[str, ...] | None = _flag(
        None,
        "Validation text, not a part of --data: [NAME=]PATH; more of these are evaluated each by itself.",
        parse_eval_text,
        TEXT,
        shown="from --data",
        repeated=True,
    )
    tokenizer: str = _flag(
        None,
        "t5, sample, a .model file, a folder or a hub id.",
        parse_place,
        TEXT,
        shown="t5 for c4, sample for sample",
    )
    bos: str = _flag(
        "auto",
        "Begin each document with the tokenizer's marker; auto: with --init, where the tokenizer does.",
        BOS,
        TEXT,
    )
    bad_data: str = _flag(
        "raise", "Documents that cannot be read: stop, or leave them out, up to 1 in 100.", BAD_DATA, TEXT, free=True
    )
    max_unknown: float = _flag(
        0.05,
        "Largest share of unknown tokens, or of control characters, that a run begins with; 1 is any.",
        parse_share,
        TEXT,
        free=True,
    )
    layout: str = _flag("pad", "One document a row, or documents packed.", LAYOUTS, TEXT)
    documents: str = _flag(
        "joined",
        "--layout pack: tokens attend to all that went before in their row, or to their own document alone.",
        DOCUMENTS,
        TEXT,
    )
    max_length: int = _flag(256, "Tokens a row.", int, TEXT, least=2)

    epochs: int | None = _flag(
        None, "Passes over a task's examples, instead of --steps.", int, LENGTH, least=1, shown="the task's recipe"
    )
    steps: int | None = _flag(None, "Updates.", int, LENGTH, least=1)
    max_tokens: int | None = _flag(
        None,
        "Real tokens, instead of --steps: 1.1B, or recipe: as many as the paper's table names.",
        parse_tokens,
        LENGTH,
        shown="off",
    )
    warmup_steps: int | None = _flag(None, "Updates of linear warm-up.", int, LENGTH, least=0, shown="a tenth")
    lr: float = _flag(None, "Peak learning rate.", float, LENGTH, above=0)
    min_lr_ratio: float = _flag(
        None, "Last learning rate over the peak.", float, LENGTH, least=0, shown="0.1 for cosine, else 0"
    )
    scheduler: str = _flag("cosine", "Decay after warm-up; wsd: at the end.", ("cosine", "linear", "wsd"), LENGTH)
    decay_steps: int | None = _flag(
        None, "--scheduler wsd: updates of linear decay at the end.", int, LENGTH, least=1, shown="a tenth"
    )
    max_loss: float | None = _flag(
        None, "Skip updates whose loss is larger; ten in a row end the run.", float, LENGTH, above=0, shown="off"
    )
    eval_every: int = _flag(None, "Updates between evaluations.", int, LENGTH, least=1, free=True, shown=_TENTH)
    eval_tokens: int = _flag(10_000_000, "Validation tokens an evaluation.", parse_count, LENGTH, shown="10M")

    dtype: str = _flag("bfloat16", "Of weights, gradients and moments.", ("bfloat16", "float32"), MACHINE)
    weights: str = _flag(
        None,
        "How matrices of attention and MLP are held: in --dtype, or as 8-bit integers with scales.",
        WEIGHTS,
        MACHINE,
        shown="dense",
    )
    weight_group: str = _flag(
        None,
        "--weights int8: what shares a scale, a row of a matrix or so many neighbours in it.",
        parse_group,
        MACHINE,
        shown="row",
    )
    matmul: str = _flag(
        "dense",
        "Training's products of attention and MLP: dense, or of 8-bit integers, forward and backward. On a GPU their "
        "speed is not measured.",
        MATMULS,
        MACHINE,
    )
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N.", str, MACHINE, free=True)
    shard: str = _flag(
        "full",
        "Which processes share a model out: all (FSDP), those of a host (HSDP), or none (DDP).",
        SHARDS,
        MACHINE,
        free=True,
    )
    reduce: str = _flag(
        "full",
        "What replicas (--shard hybrid, none) sum: gradients, or what --layerwise leaves of them.",
        REDUCE,
        MACHINE,
        free=True,
    )
    distributed_timeout: int = _flag(
        600, "Seconds that a process waits for the others before all end.", int, MACHINE, least=1, free=True
    )
    compile: bool = _flag(
        False,
        "Compile the decoder layers: takes a C++ compiler and a minute. Planned as if not, but for gradients.",
        bool,
        MACHINE,
        free=True,
    )
    deterministic: bool = _flag(
        False, "On a GPU, take kernels that repeat a run bit for bit, which are slower.", bool, MACHINE, free=True
    )
    profile: int | None = _flag(
        None,
        "Say, in OUTPUT/profile, where the time of so many updates goes, after the first two.",
        int,
        MACHINE,
        least=1,
        free=True,
        shown="off",
    )
    seed: int = _flag(0, "Of weights, data order and rounding.", int, MACHINE, least=0)

    output: str = _flag(None, "Folder of the run.", parse_place, OUTPUT, free=True, shown="runs/MODEL-OPTIM-TIME")
    resume: str = _flag("auto", "auto (go on in --output), never, or a checkpoint.", parse_place, OUTPUT, free=True)
    resume_with_changes: bool = _flag(
        False, "Resume although options differ that change the computation.", bool, OUTPUT, free=True
    )
    save_every: int = _flag(None, "Updates between checkpoints.", int, OUTPUT, least=1, free=True, shown=_TENTH)
    keep: int = _flag(2, "Checkpoints kept.", int, OUTPUT, least=1, free=True)
    keep_every: int | None = _flag(
        None,
        "Of checkpoints at multiples of so many updates, all are kept.",
        int,
        OUTPUT,
        least=1,
        free=True,
        shown="off",
    )
    wandb: str = _flag(
        "auto", "auto is WANDB_MODE, else online with a key, else offline.", WANDB_MODES, OUTPUT, free=True
    )
    wandb_project: str | None = _flag(
        None, "wandb project.", str, OUTPUT, free=True, shown="WANDB_PROJECT, or galore-pretrain"
    )
    name: str | None = _flag(
        None, "wandb name of the run.", str, OUTPUT, free=True, shown="WANDB_NAME, or name of the folder"
    )
    tags: str | None = _flag(None, "wandb tags, separated by commas.", str, OUTPUT, free=True, shown="WANDB_TAGS")

    processes: Processes = ONE_PROCESS
    undecided: frozenset[str] = frozenset()
    taken: tuple[tuple[str, Any, Any], ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Return the config of a run from its saved values, which another version may have written.

        Flags that are not known any more are passed over, those that were not known then take their defaults.
        """
        return cls(**{name: values.get(name, flag.default) for name, flag in FLAGS.items()})

    def values(self) -> dict[str, Any]:
        """Return the value of each flag, as a checkpoint and ``config.json`` hold them."""
        return {name: getattr(self, name) for name in FLAGS}

    @property
    def execution(self) -> ExecutionSettings:
        """Return how the updates are executed, or will be where the memory budget has no objection."""
        return ExecutionSettings(self.layerwise, self.activation_checkpointing, self.batch_size, self.clip_norm)

    @property
    def eval_texts(self) -> tuple[EvalText, ...]:
        """Return the texts of ``--eval-data``; none where the validation text is of ``--data``."""
        return eval_texts(self.eval_data)

    @property
    def micro_batches(self) -> int:
        """Return the number of micro-batches of an update, in each process."""
        return self.total_batch_size // (self.batch_size * self.processes.total)

    def differences(self, saved: Mapping[str, Any], without: Container[str] = ()) -> list[str]:
        """Return where a checkpoint's config computes something else: ``--lr 0.01 (was 0.005)`` for each such field.

        Fields ``without`` effect so far are passed over.
        """
        changed = {}
        # What runs before there were these flags did.
        before = {name: FLAGS[name].default for name in ("init", "text_key", "documents", "matmul")}
        before |= {"weights": "dense", "weight_group": "row", "bos": "no"}
        if self.bases is not None:
            before["bases"] = "dense"
        before |= saved
        for name, value in self.values().items():
            if name not in before or name in without or self._is_free(name):
                continue
            if not _means_the_same(self, name, before[name]):
                changed[name] = value
        # A field that is not in use any more (None) follows from another one that changed, which says enough.
        in_use = {name: value for name, value in changed.items() if value is not None}
        sentences = []
        for name, value in (in_use or changed).items():
            flag = name.replace("_", "-")
            sentences.append(f"--{flag} {_as_typed(name, value)} (was {_as_typed(name, before[name])})")
        return sentences

    def _is_free(self, name: str) -> bool:
        if name == "batch_size" and self.numerics == "reference":
            # The mean of micro-batch means, which reference numerics take, depends on the micro-batch.
            return False
        return FLAGS[name].free


FLAGS: dict[str, Flag] = {f.name: f.metadata["flag"] for f in fields(RunConfig) if "flag" in f.metadata}
"""What the command line knows of each field, by its name."""


def _means_the_same(config: RunConfig, name: str, saved: Any) -> bool:
    """Return whether a flag's value computes the same as the ``saved`` one, said in other words perhaps."""
    value = getattr(config, name)
    if _as_json(value) == _as_json(saved):
        return True
    if (value is None) != (saved is None):
        return _is_default(config, name, value if saved is None else saved)
    return name in _SHIPPED and _places(name, value) == _places(name, saved)


# A flag that is None leaves a method's rules as they are. What they have then, only they know: so they are built
# both ways, and compared.
def _is_default(config: RunConfig, name: str, value: Any) -> bool:
    """Return whether the method has ``value`` where the flag is left out, as Adam has ``--betas 0.9,0.999``."""
    updater = method(method(config.optim).updater)
    if name not in updater.options or not OPTIONS[name].fields:
        return False
    from galore_pretrain.optim import rules_by_role  # torch: a run has it by now, and a sweep is seldom here

    argument = OPTIONS[name].argument
    left_out = {OPTIONS[flag].argument: getattr(config, flag) for flag in updater.options if OPTIONS[flag].fields}
    left_out[argument] = None
    said = dict(left_out)
    said[argument] = tuple(value) if isinstance(value, list) else value
    try:
        rules = rules_by_role(updater.name, config.numerics, **said)
    except ValueError:  # another version took what no rule takes now
        return False
    return rules == rules_by_role(updater.name, config.numerics, **left_out)


def texts_of(data: str | Sequence[str]) -> tuple[str, ...]:
    """Return each of the texts that ``--data`` names: mostly one."""
    if isinstance(data, str):
        return (data,)
    return tuple(data)


_SHIPPED: dict[str, tuple[str, ...]] = {
    "model": (),
    "init": (),
    "data": ("c4", "sample"),
    "eval_data": (),
    "tokenizer": ("t5", "sample"),
}
"""The flags that name what a run reads, and their values that are no paths, beside the names of shipped models."""


def _as_typed(name: str, value: Any) -> str:
    """Return a value as it is typed behind its flag, with the flag once more before each further one of several."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    parts = [str(part) for part in value]
    flag = name.replace("_", "-")
    separator = f" --{flag} " if FLAGS[name].repeated else ","
    return separator.join(parts)


def text_seen_from(folder: Path, text: str) -> str:
    """Return the path of a text that was named from another working ``folder``; ``text`` itself if it is not there."""
    if text in _SHIPPED["data"] or text.startswith("hub:"):
        return text
    path = str(folder / text)
    if glob(path):
        return path
    return text


def eval_text_seen_from(folder: Path, text: str) -> str:
    """Return what ``--eval-data`` named from another working ``folder``, by the path that it has from here."""
    name, path = name_and_path(text)
    whole = text_seen_from(folder, text)
    if name is None or whole != text:  # a path with a "=" in it
        return whole
    return named_path(name, text_seen_from(folder, path))


def _places(name: str, value: str | Sequence[str]) -> list[str]:
    """Return the `_place` of each text, model or tokenizer that the value of one of these flags names."""
    return [_place(name, part) for part in texts_of(value)]


def _place(name: str, value: str) -> str:
    """Return what a value of one of these flags stands for: a name that is shipped or on the hub, or a whole path."""
    if value in _SHIPPED[name] or value.startswith("hub:") or (name == "model" and value in shipped_models()):
        return value
    given = None
    if name == "eval_data":
        given, value = name_and_path(value)
    path = Path(value)
    if name == "model" and path.is_dir():
        path /= "config.json"
    return named_path(given, f"path {path.resolve()}")


def _as_json(value: Any) -> Any:
    # JSON has no tuples: a checkpoint's are lists.
    if isinstance(value, tuple):
        return list(value)
    return value


def shipped_models() -> list[str]:
    """Return the names of the models whose configs are in the package."""
    folder = resources.files("galore_pretrain") / "configs"
    names = [file.name for file in folder.iterdir() if file.name.startswith("llama_")]
    return sorted(name.removesuffix(".json") for name in names)


def model_name(name_or_path: str) -> str:
    """Return what a model is called: a shipped name, a JSON file's name without its ending, or a folder's."""
    path = Path(name_or_path)
    return path.stem if path.suffix == ".json" else path.name


def find_model(name_or_path: str, *, on_hub: bool = True) -> Traversable:
    """Return the JSON file that ``--model`` means: a shipped one, one at a path, or a folder's ``config.json``.

    Of a run or a checkpoint, it is the ``state.json`` that holds the architecture. Of a repository of the hub, which is
    looked for where it may be ``on_hub``, ``config.json`` alone is downloaded. InputError where there is none, with the
    names that are near.
    """
    shipped = shipped_models()
    if name_or_path in shipped:
        return resources.files("galore_pretrain") / "configs" / f"{name_or_path}.json"
    path = Path(name_or_path)
    state = state_of(path)
    if state is not None:
        return state
    if (path / "config.json").is_file():
        return path / "config.json"
    if path.is_file():
        return path
    if on_hub and is_hub_id(name_or_path):
        return download_model(name_or_path, "config.json")
    raise InputError(
        f"--model {name_or_path}: no such model or file; {did_you_mean(name_or_path, shipped)}shipped: "
        f"{', '.join(shipped)}; or give the path of a JSON config, or of a folder with config.json and without weights"
    )


def state_of(place: Path) -> Path | None:
    """Return ``state.json`` of a checkpoint, or of the newest one of a run; None where ``place`` is neither."""
    if (place / "state.json").is_file():
        return place / "state.json"
    folders = (file.parent for file in (place / "checkpoints").glob("step_*/state.json"))
    whole = sorted(folder for folder in folders if folder.name.removeprefix("step_").isdigit())
    return whole[-1] / "state.json" if whole else None


def find_init(place: str) -> None:
    """Raise InputError unless ``--init`` names a model's folder, a run, a checkpoint, or a repository of the hub."""
    path = Path(place)
    if state_of(path) is not None:
        return
    if (path / "summary.json").is_file() and (path / "model" / "config.json").is_file():
        raise InputError(f"--init {place}: is a run without its checkpoints; name {path / 'model'}")
    if (path / "config.json").is_file() or is_hub_id(place):
        return
    if path.is_dir():
        raise InputError(
            f"--init {place}: has neither config.json nor checkpoints; name a folder of a model, as save_pretrained "
            "writes it, or a run"
        )
    if path.is_file():
        raise InputError(f"--init {place}: is a file; name its folder, which has config.json and the weights")
    raise InputError(f"--init {place}: no such folder; name one with a model's weights, a run, or ORG/NAME of the hub")
