"""The optimizers of ``galore_torch`` under their own names and arguments: a user changes one import.

optimizer = GaLoreAdamW([{"params": rest}, {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 0.25,
                          "proj_type": "std"}], lr=0.01)

A group with ``rank`` is projected, others get the bare rule. ``basis``, ``refresh``, ``moments``, ``numerics`` and
``seed`` are added; their defaults are this project's, ``numerics="reference"`` gives the published numbers. As in
torch, settings live in ``param_groups``: there they can be changed between steps (by ``OneCycleLR``, say), and a saved
state brings its own. State is tensors and integers, so a saved one loads with ``weights_only=True``.

An optimizer of one parameter alone takes its place, which its random bits depend on, in the order in which such are
made. To repeat a training in one process, name the place in its group: ``first_index``.

In transformers' ``Trainer``: ``optimizers=(GaLoreAdamW(groups, lr=0.01), None)``, or
``optimizer_cls_and_kwargs=(GaLoreAdamW, {"params": groups, "lr": 0.01})``.
"""

import difflib
import itertools
import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypedDict, Unpack
from weakref import WeakSet

import torch
from torch import Tensor

from galore_pretrain.optim.build import build_rules, rounding_of
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.rule import UpdateRule

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
_GROUP_SETTINGS = ("rank", "update_proj_gap", "scale", "proj_type")
_OPTIMIZER_SETTINGS = {
    "betas",
    "eps",
    "beta1",
    "correct_bias",
    "clip_threshold",
    "decay_rate",
    "scale_parameter",
    "relative_step",
}
_OTHERS = {"params", "param_names", "name", "lr", "weight_decay", "settings", "first_index"}
_OTHERS |= {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"}
"""Keys of a group that the optimizer, schedulers or what logs them read or leave there."""
_OFF_IN_TORCH = {"amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable"}
"""Settings of torch's optimizers that are not supported, which a group of theirs has all the same, switched off."""


class Options(TypedDict, total=False):
    """The keyword arguments that all classes here take beside the published ones; by default, the method's own."""

    basis: str
    refresh: str
    moments: str
    numerics: str
    seed: int


# torch's contract is that ``param_groups`` hold all settings, and that they may be changed there at any time. A rule is
# frozen. So before each step, the settings of each group are compared with those that its rule was made of, and where
# they differ the group goes on by a new rule with the same state.
class _DropIn(RuleOptimizer):
    """Turns the settings of parameter groups, under their published names, into rules of the method ``row``."""

    row: ClassVar[str]
    _class_options: Mapping[str, Any] = MappingProxyType({})  # a class's own; `__init__` reads them

    def __init__(
        self,
        params: Params,
        lr: float,
        weight_decay: float,
        published: dict[str, Any],
        added: Options,
    ) -> None:
        unknown = added.keys() - Options.__annotations__.keys()
        if unknown:
            hint = ""
            if unknown & {*_GROUP_SETTINGS}:
                hint = '; name it in a parameter group: [{"params": rest}, {"params": matrices, "rank": 128}]'
            raise TypeError(f"{type(self).__name__} takes no {', '.join(sorted(unknown))}{hint}")
        numerics = added.get("numerics", "sound")
        seed = added.get("seed", 0)
        self._options: dict[str, Any] = {"basis": None, "refresh": None, "moments": None}
        self._options |= published
        self._options |= added
        self._options.pop("seed", None)  # the optimizer's, and no setting of a rule
        self._options["numerics"] = numerics
        self._options |= self._class_options
        self.has_stepped = False
        self._followed: dict[int, list[Any]] = {}  # settings by which each group is updated
        groups: list[Any] = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        rounding = rounding_of(numerics)
        super().__init__(groups, lr=lr, weight_decay=weight_decay, rounding=rounding, seed=seed)
        self.defaults |= self._options  # where schedulers look for betas
        all_params = [p for group in self.param_groups for p in group["params"]]
        self._is_alone = len(all_params) == 1  # and so perhaps one of many, each of one parameter
        if self._is_alone and "first_index" not in self.param_groups[0]:
            self.param_groups[0]["first_index"] = next(_places)
        _alive.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy take; a copy compares the settings of its groups anew."""
        return {
            **super().__getstate__(),
            "_options": self._options,
            "has_stepped": self.has_stepped,
            "_is_alone": self._is_alone,
            "_followed": {},
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``rank`` and its companions in the group make it a projected one."""
        unused = param_group.keys() - self._options.keys()
        ignored = _OPTIMIZER_SETTINGS & unused
        if ignored:
            names = ", ".join(sorted(ignored))
            raise ValueError(f"a parameter group sets {names}, which holds for the whole optimizer")
        known = {*self._options, *_GROUP_SETTINGS, *_OTHERS}
        for key, value in param_group.items():
            if key not in known and not (key in _OFF_IN_TORCH and not value):
                raise ValueError(_unknown_setting(key, value, known))
        group = {**self._options, **param_group}
        group["rule"] = self._rule_for(group)
        super().add_param_group(group)

    def _rule_for(self, group: Mapping[str, Any]) -> UpdateRule:
        """Return the rule that a group's settings ask for; ValueError where they contradict each other."""
        projection = {name: group[name] for name in _GROUP_SETTINGS if group.get(name) is not None}
        if projection and "rank" not in projection:
            names = ", ".join(projection)
            raise ValueError(f"a parameter group has {names} but no rank; only groups with one project")
        if group["numerics"] != self._options["numerics"]:
            raise ValueError(f"numerics {group['numerics']} of a group: it holds for the whole optimizer")
        options = {name: group[name] for name in self._options}
        options |= projection
        if options.get("betas") is not None:
            options["betas"] = tuple(options["betas"])
        projected, companion = build_rules(self.row, **options)
        if not projection:
            return companion
        return projected

    def follow_groups(self) -> None:
        """Go on with the parameters and the settings that the groups have now."""
        super().follow_groups()
        for number, group in enumerate(self.param_groups):
            settings = [group.get(name) for name in (*_GROUP_SETTINGS, *self._options, "settings")]
            if self._followed.get(number) != settings:
                self.slots.follow(number, self._rule_for(group))
                settings[-1] = group["settings"]
                self._followed[number] = settings

    def _register_hooks(self) -> None:
        """Have the first step warn where nothing is projected, beside what is the optimizer's."""
        super()._register_hooks()
        self.register_step_pre_hook(_warn_once)

    def take_settings(self, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Take over the settings that were saved with a group, as torch's optimizers do."""
        names = (*_GROUP_SETTINGS, *self._options)
        group |= {name: saved[name] for name in names if name in saved}
        if "first_index" in group:
            group["first_index"] = saved.get("first_index", 0)  # which it was where none was saved

    def projects_somewhere(self) -> bool:
        """Return whether this projects, or is one of many, each of one parameter, of which others do."""
        if self.projects:
            return True
        return self._is_alone and any(other.projects for other in _alive)


@torch._disable_dynamo  # compiled code may not write to the optimizer's attributes
def _warn_once(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Warn before the first step of an optimizer that projects nothing; a hook of torch's ``step``."""
    del args, kwargs
    if not optimizer.has_stepped and not optimizer.projects_somewhere():
        name = type(optimizer).__name__
        warnings.warn(f"{name} projects nothing: no parameter group has a rank (see {__name__})", stacklevel=3)
    optimizer.has_stepped = True


# Layerwise recipes make an optimizer for each parameter, and a parameter that is alone has no place among others. All
# would be the first: their bases would be renewed at once, and their weights rounded with the same random bits. The
# order in which such optimizers are made is the same in all processes, whatever their parameters' values.
_places = itertools.count()
_alive: WeakSet[_DropIn] = WeakSet()


class GaLoreAdamW(_DropIn):
    """GaLore with AdamW. ``eps`` None: 1e-8, or the published 1e-6 under reference numerics."""

    row = "galore_adamw"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = True,
        **added: Unpack[Options],
    ) -> None:
        del no_deprecation_warning  # there is none
        _require("correct_bias", correct_bias, supported=True)
        published = {"betas": tuple(betas), "eps": eps}
        super().__init__(params, lr, weight_decay, published, added)


class GaLoreAdamW8bit(_DropIn):
    """GaLore with 8-bit AdamW."""

    row = "galore_adamw8bit"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        **added: Unpack[Options],
    ) -> None:
        del optim_bits  # the published class ignores it too
        _require("amsgrad", amsgrad, supported=False)
        _require("args", args, supported=None)
        _require("min_8bit_size", min_8bit_size, supported=4096)
        _require("percentile_clipping", percentile_clipping, supported=100)
        _require("block_wise", block_wise, supported=True)
        _require("is_paged", is_paged, supported=False)
        published = {"betas": tuple(betas), "eps": eps}
        super().__init__(params, lr, weight_decay, published, added)


class GaLoreAdafactor(_DropIn):
    """GaLore with Adafactor at a given learning rate: pass ``scale_parameter=False, relative_step=False``.

    The defaults are the published ones, which are not supported: leaving them out must not mean something else here.
    """

    row = "galore_adafactor"

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        **added: Unpack[Options],
    ) -> None:
        _require("scale_parameter", scale_parameter, supported=False)
        _require("relative_step", relative_step, supported=False)
        _require("warmup_init", warmup_init, supported=False)
        if lr is None:
            raise ValueError("GaLoreAdafactor needs lr=…; it has no learning rate of its own (relative_step=False)")
        published = {
            "epsilon": eps[0],  # eps[1] is the scale of a parameter, which only scale_parameter has a use for
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
        }
        super().__init__(params, lr, weight_decay, published, added)


class NaturalGaLoreAdamW(GaLoreAdamW):
    """Natural GaLore with AdamW, one-sided as its paper has it; takes the arguments of `GaLoreAdamW`."""

    row = "natural_galore"

    def __init__(
        self,
        params: Params,
        *args: Any,
        natural_history: int = 20,
        natural_damping: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        self._class_options = {"natural_history": natural_history, "natural_damping": natural_damping}
        super().__init__(params, *args, **kwargs)


def _unknown_setting(key: str, value: Any, known: Iterable[str]) -> str:
    """Return what to say of a group's setting that nothing here would follow."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = "a note of your own goes into param_groups when the optimizer is built"
    if near:
        hint = f"did you mean {near[0]}?"
    return f"a parameter group sets {key}={value!r}, which is not supported; {hint}"


def _require(name: str, value: Any, *, supported: Any) -> None:
    """Refuse a value that would change nothing here, rather than ignore it."""
    if value != supported:
        raise ValueError(f"{name}={value!r} is not supported; pass {name}={supported!r}")
