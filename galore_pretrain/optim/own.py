"""Methods from outside the package: ``--optim FILE.py:NAME`` and ``--optim package.module:NAME``.

NAME is a rule or a rule's class, a `Composition`, any ``torch.optim.Optimizer`` class, or a `Method` of the table. To
load it is to execute its file, so that is done only where a caller asks for it by `load_method`.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
import warnings
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from galore_pretrain.optim.compositions import Composition
from galore_pretrain.optim.methods import METHODS, OPTIONS, ROLES, Companion, Method
from galore_pretrain.optim.rule import UpdateRule, option_names
from galore_pretrain.optim.update import Step
from galore_pretrain.optim.wrapped import Wrapped, is_linear_in_rate

_modules: dict[str, ModuleType] = {}
"""The files that were executed, by what named them: each is executed once."""


def load_method(name: str) -> Method:
    """Execute the file that ``name`` (``FILE.py:NAME`` or ``package.module:NAME``) names, and enter it in the table.

    ValueError, with the way out, where it cannot be had, or is nothing that updates weights.
    """
    if name in METHODS:
        return METHODS[name]
    with torch.random.fork_rng(devices=[]):  # trials, and the file itself, may draw from torch's own generator
        entry = _loaded(name)
    METHODS[name] = entry
    return entry


def _loaded(name: str) -> Method:
    """Return the entry of a method, whose rule was tried."""
    place, _, attribute = name.rpartition(":")
    value = _attribute(place, attribute)
    if isinstance(value, Method):
        entry = _placed(value, name, place)
    else:
        entry = Method(name=name, description=f"{attribute} of {place}", home=name)
    if entry.home is None:
        raise ValueError(f"{name} has no home; a Method of one's own names its rule, home=':Rule'")
    _check_entry(entry)
    rule = composition_at(entry.home, name).sound
    _try_out(rule, name)
    if not isinstance(value, Method):
        entry = _described(entry, rule)
    if isinstance(rule, Wrapped) and not is_linear_in_rate(rule.optimizer, rule.options):
        warnings.warn(
            f"{name}: the class does more with its rate than to multiply its updates by it. Here it runs at a rate of "
            "1, and its updates are multiplied by --lr: they are others than its own",
            stacklevel=2,
        )
    return replace(entry, digest=_digest(_source(place, value)))


def _check_entry(entry: Method) -> None:
    """Raise ValueError where an entry names options or roles that there are not."""
    options = {*entry.options, *(entry.matrix_options or ())}
    for companion in entry.companions.values():
        options |= {*(companion.options or ())}
    for what, names, known in (("option", options, OPTIONS), ("role", set(entry.companions), ROLES)):
        unknown = names - set(known)
        if unknown:
            raise ValueError(f"{entry.name} has the {what} {min(unknown)}, which is none of {', '.join(known)}")


def composition_at(home: str, asked: str) -> Composition:
    """Return the rules at ``home``, ``place:attribute``. ValueError where there are none; ``asked`` is what named it.

    A rule, a rule's class or a torch class is itself under both numerics.
    """
    place, _, attribute = home.rpartition(":")
    value = _attribute(place, attribute)
    if isinstance(value, Composition):
        return value
    try:
        rule = _rule(value)
    except ValueError as error:
        raise ValueError(f"{asked}: {error}") from error
    return Composition(rule, rule)


def _rule(value: Any) -> UpdateRule:
    """Return ``value`` as a rule: it is one, or a class of rules or of torch's optimizers. ValueError for all else."""
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
        return Wrapped(value)
    if isinstance(value, type) and issubclass(value, UpdateRule):
        try:
            value = value()
        except TypeError as error:
            raise ValueError(f"the rule needs arguments ({error}); give each field a default") from error
        except Exception as error:  # whatever a default or a check of the rule's own raises
            raise ValueError(f"the rule cannot be made: {told(error)}") from error
    if not isinstance(value, UpdateRule):
        raise ValueError(
            f"{type(value).__name__} is no method: name an UpdateRule, a Composition, a torch.optim.Optimizer class "
            "or a Method"
        )
    if not is_dataclass(value):
        raise ValueError(f"{type(value).__name__} must be a dataclass: write @dataclass(frozen=True) above the class")
    return value


def _attribute(place: str, attribute: str) -> Any:
    """Return what ``place`` calls ``attribute``. ValueError where there is no such place, or none in it."""
    module = _module(place)
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise ValueError(f"{place} has no {attribute!r}; it has {', '.join(names)}")
    return getattr(module, attribute)


# A file is a module of its own name, so that its dataclasses and its tracebacks are as if it were imported. A package
# that Python does not find is looked for in the working directory too.
def _module(place: str) -> ModuleType:
    """Execute a file or import a module, once. ValueError where that fails, with what it raised and where."""
    if place in _modules:
        return _modules[place]
    try:
        if place.endswith(".py"):
            module = _executed(Path(place))
        else:
            module = _imported(place)
    except Exception as error:
        raise ValueError(f"{place} cannot be loaded: {told(error)}") from error
    _modules[place] = module
    return module


def _imported(place: str) -> ModuleType:
    """Return a module of a package that is installed, or lies in the working directory."""
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name != place.split(".", maxsplit=1)[0]:  # it is another one that is missing
            raise
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    finally:  # a file there must not stand for a library that is imported later
        sys.path.remove(str(Path.cwd()))


def _executed(file: Path) -> ModuleType:
    """Return a Python file as a module."""
    if not file.is_file():
        raise FileNotFoundError("no such file; write FILE.py:NAME or package.module:NAME")
    name = f"galore_pretrain_own_{file.stem}_{_digest(file)[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _source(place: str, value: Any) -> Path:
    """Return the file that a class or a rule is written in: a module may only pass on what it names."""
    if place.endswith(".py"):
        return Path(place)
    kind = value if isinstance(value, type) else type(value)
    return Path(inspect.getsourcefile(kind) or _modules[place].__file__ or "")


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _placed(entry: Method, name: str, place: str) -> Method:
    """Return an entry under the name by which it was asked for. Homes that begin with a colon are in its own file."""

    def placed(home: str | None) -> str | None:
        return f"{place}{home}" if home is not None and home.startswith(":") else home

    companions = {
        role: Companion(placed(companion.home) or "", companion.lr_scale)
        for role, companion in entry.companions.items()
    }
    return replace(
        entry, name=name, home=placed(entry.home), companion=placed(entry.companion), companions=companions, aliases=()
    )


# What a `Method` would say is asked of the rule. A rule that projects or renews bases takes matrices alone, and one
# that refuses a vector leaves vectors to AdamW.
def _described(entry: Method, rule: UpdateRule) -> Method:
    """Return an entry with what follows from its rule: options, whether it projects, and what updates the rest."""
    names = set(option_names(rule))
    options: list[str] = []
    for flag, option in OPTIONS.items():
        settable = {option.argument} if isinstance(rule, Wrapped) else set(option.fields)
        if names & settable:
            options.append(flag)
    if rule.projects and "rank" in options:
        options.append("rank_by_module")
    companion: str | None = None
    companions: dict[str, Companion] = {}
    if rule.projects or rule.next_refresh(Step(1)) is not None:
        companion = "adamw"
    else:
        try:
            _update_three_times(rule, (8,))
        except Exception:  # whatever a rule raises for a shape that it does not take
            companions["vector"] = Companion("adamw")
    state = rule.init(torch.zeros(256, 256))
    return replace(
        entry,
        options=tuple(options),
        projects=rule.projects,
        moments_8bit=any(tensor.dtype == torch.uint8 for tensor in state.values()),
        companion=companion,
        companions=companions,
    )


# A rule that raises is to be refused before anything is read, not at the first update. Of a large matrix, the state
# alone is made: that takes no time.
def _try_out(rule: UpdateRule, name: str) -> None:
    """Update a 6 × 8 matrix three times, and begin a 256 × 256 one. ValueError where the rule raises, with what."""
    size = "6 × 8"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a rank may be too large for this matrix
            _update_three_times(rule, (6, 8))
            size = "256 × 256"
            rule.init(torch.zeros(256, 256))
    except Exception as error:  # whatever a rule raises
        raise ValueError(f"{name} cannot update a {size} matrix: {told(error)}") from error


def _update_three_times(rule: UpdateRule, shape: tuple[int, ...]) -> None:
    """Update a tensor of that shape. ValueError where the direction has another one."""
    state = rule.init(torch.zeros(shape))
    for count in (1, 2, 3):
        direction = rule.full_update(torch.ones(shape), state, Step(count, lr=0.1))
        for term in direction.terms():
            found = tuple(term.whole().shape)
            if found != shape:
                raise ValueError(f"its direction has the shape {found}, and the gradient {shape}")


def told(error: Exception) -> str:
    """Return what an exception says, in one line, with the line of the file that raised it."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    where = ""
    if frames:
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return f"{type(error).__name__}: {text}{where}"
