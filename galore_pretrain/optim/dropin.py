"""The optimizers of ``galore_torch`` under their own names and arguments: a user changes one import.

optimizer = GaLoreAdamW([{"params": rest}, {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 0.25,
                          "proj_type": "std"}], lr=0.01)

A group with ``rank`` is projected, others get the bare rule. ``basis``, ``refresh``, ``moments``, ``numerics`` and
``seed`` are added; their defaults are this project's, ``numerics="reference"`` gives the published numbers. As in
torch, settings live in ``param_groups``: there they can be changed between steps (by ``OneCycleLR``, say), and a saved
state brings its own. State is tensors and integers, so a saved one loads with ``weights_only=True``.

In transformers' ``Trainer``: ``optimizers=(GaLoreAdamW(groups, lr=0.01), None)``, or
``optimizer_cls_and_kwargs=(GaLoreAdamW, {"params": groups, "lr": 0.01})``.
"""

import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypedDict, Unpack

from torch import Tensor

from galore_pretrain.optim.build import build_rules, rounding_of
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.rule import UpdateRule

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
_OF_GROUP = ("rank", "update_proj_gap", "scale", "proj_type")
_NOT_OF_GROUP = {
    "betas",
    "eps",
    "beta1",
    "correct_bias",
    "clip_threshold",
    "decay_rate",
    "scale_parameter",
    "relative_step",
}


class Options(TypedDict, total=False):
    """Names what every class here takes beside the published arguments; left out, it is as the row has it."""

    basis: str
    refresh: str
    moments: str
    numerics: str
    seed: int


class _DropIn(RuleOptimizer):
    row: ClassVar[str]
    _own: Mapping[str, Any] = MappingProxyType({})  # options of one class alone

    def __init__(
        self, params: Params, lr: float, weight_decay: float, published: dict[str, Any], added: Options
    ) -> None:
        if unknown := added.keys() - Options.__annotations__.keys():
            example = '[{"params": rest}, {"params": matrices, "rank": 128}]'
            hint = f"; name it in a parameter group: {example}" if unknown & {*_OF_GROUP} else ""
            raise TypeError(f"{type(self).__name__} takes no {', '.join(sorted(unknown))}{hint}")
        numerics, seed = added.get("numerics", "sound"), added.get("seed", 0)
        self._options: dict[str, Any] = {"basis": None, "refresh": None, "moments": None} | published
        self._options |= {k: v for k, v in added.items() if k != "seed"} | {"numerics": numerics, **self._own}
        self._has_stepped = False
        self._followed: dict[int, list[Any]] = {}  # settings by which each group is updated
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, rounding=rounding_of(numerics), seed=seed)  # type: ignore[arg-type]
        self.defaults |= self._options  # where schedulers look for betas

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options, "_has_stepped": self._has_stepped, "_followed": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state; ``rank`` and its companions in the group make it a projected one."""
        if ignored := _NOT_OF_GROUP & param_group.keys() - self._options.keys():
            raise ValueError(
                f"a parameter group sets {', '.join(sorted(ignored))}, which holds for the whole optimizer"
            )
        group = {**self._options, **param_group}
        super().add_param_group({**group, "rule": self._rule_for(group)})

    def _rule_for(self, group: Mapping[str, Any]) -> UpdateRule:
        """The rule that a group's settings ask for."""
        of_group = {key: group[key] for key in _OF_GROUP if group.get(key) is not None}
        if "rank" not in of_group and of_group:
            raise ValueError(f"a parameter group has {', '.join(of_group)} but no rank; only groups with one project")
        if group["numerics"] != self._options["numerics"]:
            raise ValueError(f"numerics {group['numerics']} of a group: it holds for the whole optimizer")
        rule, bare = build_rules(self.row, **({key: group[key] for key in self._options} | of_group))
        return rule if of_group else bare

    def _before_step(self) -> None:
        """Each group is updated by the settings that it has now."""
        if not self._has_stepped and not self.projects:
            warnings.warn(
                f"{type(self).__name__} projects nothing: no parameter group has a rank (see {__name__})", stacklevel=2
            )
        self._has_stepped = True
        for index, group in enumerate(self.param_groups):
            settings = [group.get(name) for name in (*_OF_GROUP, *self._options)]
            if self._followed.get(index) != settings:
                self.follow(index, self._rule_for(group))
                self._followed[index] = settings

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as `RuleOptimizer` does, and take over the settings that were saved, as torch's optimizers do.

        ValueError where the state would have another shape for it, as for another rank.
        """
        before = [dict(group) for group in self.param_groups]
        try:
            for index, (saved, group) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False)):
                group |= {name: saved[name] for name in (*_OF_GROUP, *self._options) if name in saved}
                self.follow(index, self._rule_for(group))
            super().load_state_dict(state_dict)
        except ValueError:
            for index, group in enumerate(before):
                self.param_groups[index] |= group
                self.follow(index, self._rule_for(group))
            raise


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
        _require(correct_bias=(correct_bias, True))
        super().__init__(params, lr, weight_decay, {"betas": tuple(betas), "eps": eps}, added)


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
        _require(amsgrad=(amsgrad, False), args=(args, None), min_8bit_size=(min_8bit_size, 4096))
        _require(percentile_clipping=(percentile_clipping, 100), block_wise=(block_wise, True))
        _require(is_paged=(is_paged, False))
        super().__init__(params, lr, weight_decay, {"betas": tuple(betas), "eps": eps}, added)


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
        _require(scale_parameter=(scale_parameter, False), relative_step=(relative_step, False))
        _require(warmup_init=(warmup_init, False))
        if lr is None:
            raise ValueError("GaLoreAdafactor needs lr=…; it has no learning rate of its own (relative_step=False)")
        published = {"epsilon": eps[0], "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1}
        super().__init__(params, lr, weight_decay, published, added)


class NaturalGaLoreAdamW(GaLoreAdamW):
    """Natural GaLore with AdamW, one-sided as its paper has it; takes the arguments of `GaLoreAdamW`."""

    row = "natural_galore"

    def __init__(
        self, params: Params, *args: Any, natural_history: int = 20, natural_damping: float = 1e-3, **kwargs: Any
    ) -> None:
        self._own = {"natural_history": natural_history, "natural_damping": natural_damping}
        super().__init__(params, *args, **kwargs)


def _require(**arguments: tuple[Any, Any]) -> None:
    """Refuse a value that would change nothing here, rather than ignore it."""
    for name, (value, supported) in arguments.items():
        if value != supported:
            raise ValueError(f"{name}={value!r} is not supported; pass {name}={supported!r}")
