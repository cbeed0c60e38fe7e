"""The registry: a method is a row, composed of a wrapper, a rule and a moment store.

optimizer = build_optimizer(model, "galore_adamw", lr=0.01, rank=128)
"""

import difflib
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from galore_pretrain.optim.galore import GaLore, is_projected
from galore_pretrain.optim.moments import Dense
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.rules import SGD, Adafactor, Adam, Direction, Step, UpdateRule

__all__ = [
    "REGISTRY",
    "Direction",
    "GaLore",
    "RuleOptimizer",
    "Step",
    "UpdateRule",
    "build_optimizer",
    "resolve_row",
]

_NEAREST = Dense(rounding="nearest")


def _published(inner: UpdateRule) -> GaLore:
    return GaLore(inner, basis="svd_unsigned", refresh="together", materialize=True)


@dataclass(frozen=True)
class Row:
    """A method as it should be, and as torch's, transformers' or the GaLore authors' code computes it."""

    sound: Any
    reference: Any


REGISTRY: dict[str, Row] = {
    "sgd": Row(SGD(), SGD(store=_NEAREST)),
    "adam": Row(Adam(decay="l2"), Adam(decay="l2", store=_NEAREST)),
    "adamw": Row(Adam(), Adam(store=_NEAREST)),
    "adafactor": Row(Adafactor(), Adafactor(store=_NEAREST)),
    "galore_adamw": Row(
        GaLore(Adam()), _published(Adam(eps=1e-6, formula="transformers", decay="after", store=_NEAREST))
    ),
    "galore_adafactor": Row(GaLore(Adafactor()), _published(Adafactor(store=_NEAREST))),
}


def resolve_row(name: str) -> str:
    """The registry row that ``name`` means; ValueError with the near ones where there is none."""
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? All rows: " if near else "choose from "
        raise ValueError(f"optimizer {name!r} is unknown; {hint}{', '.join(REGISTRY)}")
    return name


def build_optimizer(
    model: torch.nn.Module,
    row: str,
    *,
    lr: float,
    rank: int | None = None,
    update_proj_gap: int | None = None,
    scale: float | None = None,
    proj_type: str | None = None,
    basis: str | None = None,
    refresh: str | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    numerics: str = "sound",
    weight_decay: float = 0.0,
    matrix_lr_scale: float = 1.0,
    seed: int = 0,
) -> RuleOptimizer:
    """One optimizer for all trainable parameters of ``model``, in two groups: its matrices, and everything else.

    The matrices are the linear layers of attention and MLP. A GaLore row projects them; embeddings, norms and head get
    the row's bare inner rule. ``matrix_lr_scale`` multiplies the matrices' learning rate. What is ``None`` stays as the
    row has it; an option that the row cannot use raises ValueError. ``betas[0]`` is SGD's momentum and Adafactor's
    first moment, which they lack otherwise. A schedule writes ``group["lr"] = lr * group["lr_scale"]``.
    """
    if numerics not in ("sound", "reference"):
        raise ValueError(f"numerics {numerics!r} is unknown; choose from sound, reference")
    prototype = getattr(REGISTRY[resolve_row(row)], numerics)
    if numerics == "reference" and basis == "svd":
        basis = "svd_unsigned"
    options: dict[str, Any] = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    options |= {"basis": basis, "refresh": refresh, "betas": betas, "eps": eps}
    rule = _configure(row, prototype, {key: value for key, value in options.items() if value is not None})

    matrices = {f"{name}.weight" for name, module in model.named_modules() if is_projected(name, module)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in trained if n in matrices], "rule": rule, "lr_scale": matrix_lr_scale},
        {
            "params": [(n, p) for n, p in trained if n not in matrices],
            "rule": rule.inner if isinstance(rule, GaLore) else rule,
            "lr_scale": 1.0,
        },
    ]
    if not groups[0]["params"] and isinstance(rule, GaLore):
        raise ValueError(f"{row} found no matrix to project: no linear layer of the model has attn or mlp in its name")
    for group in groups:
        group |= {"lr": lr * group["lr_scale"], "weight_decay": weight_decay}
    rounding = "nearest" if numerics == "reference" else "stochastic"
    return RuleOptimizer([g for g in groups if g["params"]], rounding=rounding, seed=seed)


def _configure(row: str, prototype: UpdateRule, options: dict[str, Any]) -> UpdateRule:
    """The row with its fields replaced by the options of the same name, through all its layers."""
    used: set[str] = set()

    def replaced(part: Any) -> Any:
        changes = {}
        for field in fields(part):
            name = "betas" if field.name in ("momentum", "beta1") else field.name
            if name in options:
                used.add(name)
                changes[field.name] = options[name] if field.name == name else options[name][0]
            elif is_dataclass(value := getattr(part, field.name)):
                changes[field.name] = replaced(value)
        return replace(part, **changes)

    rule: UpdateRule = replaced(prototype)
    if unused := options.keys() - used:
        name = sorted(unused)[0]
        raise ValueError(f"{name} {options[name]} has no meaning for optimizer {row}; leave it out")
    return rule
