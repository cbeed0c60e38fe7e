"""GaLore and its rivals: one ``torch.optim.Optimizer``, a row of the registry each.

optimizer = build_optimizer(model, "galore_adamw", lr=0.01, rank=128)

Names are resolved on first use, so that asking for a row's name does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galore_pretrain.optim.dropin import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, NaturalGaLoreAdamW
    from galore_pretrain.optim.galore import GaLore
    from galore_pretrain.optim.optimizer import Faults, RuleOptimizer
    from galore_pretrain.optim.registry import REGISTRY, build_optimizer

__all__ = [
    "REGISTRY",
    "Faults",
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "NaturalGaLoreAdamW",
    "RuleOptimizer",
    "build_optimizer",
]
_HOMES = {"REGISTRY": "registry", "build_optimizer": "registry", "GaLore": "galore"}
_HOMES |= {"RuleOptimizer": "optimizer", "Faults": "optimizer"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'dropin')}"), name)
