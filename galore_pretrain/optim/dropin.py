"""The optimizers of ``galore_torch`` under their own names and arguments: a user changes one import.

optimizer = GaLoreAdamW([{"params": rest}, {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 0.25,
                          "proj_type": "std"}], lr=0.01)

A group with ``rank`` is projected, others get the bare rule. ``basis``, ``refresh``, ``moments``, ``numerics`` and
``seed`` are added. State is tensors and integers, so a saved one loads with ``weights_only=True``.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypedDict, Unpack

from torch import Tensor

from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.registry import build_rules, rounding_of

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
    """What every class here takes beside the published arguments; left out, it is as the row has it."""

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
            raise TypeError(f"{type(self).__name__} takes no {', '.join(sorted(unknown))}; rank belongs into a group")
        numerics, seed = added.get("numerics", "sound"), added.get("seed", 0)
        self._options: dict[str, Any] = published | {k: v for k, v in added.items() if k != "seed"}
        self._options |= {"numerics": numerics, **self._own}
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, rounding=rounding_of(numerics), seed=seed)  # type: ignore[arg-type]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state; ``rank`` and its companions in the group make it a projected one."""
        of_group = {key: param_group[key] for key in _OF_GROUP if param_group.get(key) is not None}
        if "rank" not in of_group and of_group:
            raise ValueError(f"a parameter group has {', '.join(of_group)} but no rank; only groups with one project")
        own = {key: param_group[key] for key in self._options if key in param_group}
        if ignored := _NOT_OF_GROUP & param_group.keys() - own.keys():
            raise ValueError(
                f"a parameter group sets {', '.join(sorted(ignored))}, which holds for the whole optimizer"
            )
        rule, bare = build_rules(self.row, **(self._options | own | of_group))
        super().add_param_group(param_group | {"rule": rule if of_group else bare})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `RuleOptimizer.load_state_dict`; ValueError too where a group was saved with other settings."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            for name in (*_OF_GROUP, *self._options):
                if name in saved.keys() & group.keys() and saved[name] != group[name]:
                    raise ValueError(f"the saved group has {name} {saved[name]}; this one has {group[name]}")
        super().load_state_dict(state_dict)


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
