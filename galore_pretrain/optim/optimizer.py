"""The one ``torch.optim.Optimizer``: it gives each parameter its rule, state and random bits, and writes weights.

``update_param(p)`` is the whole update of one parameter. ``step()`` is a loop over it; a layerwise execution calls the
same method from inside backward. Hence one state, one learning rate and one checkpoint format for both.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.optim.moments import round_stochastic
from galore_pretrain.optim.rules import Decay, Direction, Step, UpdateRule

CHUNK = 1 << 21
"""Elements (8 MiB in fp32) that are updated at a time: no fp32 copy of a large weight or moment ever exists."""


class RuleOptimizer(torch.optim.Optimizer):
    """Applies an update rule to every parameter of a group: ``p -= lr · (direction + weight_decay · p)``.

    ``groups`` are dicts with ``params`` (tensors, or pairs of name and tensor), ``rule``, and optionally ``lr`` and
    ``weight_decay``; other keys are kept for the caller. State is allocated here, whole and at its final shapes and
    dtypes. ``rounding``: how a bf16 weight takes an update, ``"stochastic"`` (computed in fp32, reproducible from
    ``seed`` and the count of updates alone) or ``"nearest"`` (in the weight's own dtype). fp32 weights need neither.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding {rounding!r} is unknown; choose from stochastic, nearest")
        self.rounding = rounding
        self.seed = seed
        self._rules: list[UpdateRule] = []
        self._places: dict[Tensor, tuple[int, int, int]] = {}  # parameter -> (group, index in group, index overall)
        self._generators: dict[torch.device, torch.Generator] = {}
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state (zeros); the rule itself stays out of ``param_groups`` and checkpoints."""
        group = {**self.defaults, **param_group}
        rule: UpdateRule = group.pop("rule")
        for name in ("lr", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} {group[name]} must be finite and not negative")
        super().add_param_group(group)
        self._rules.append(rule)
        for index, p in enumerate(self.param_groups[-1]["params"]):
            self._places[p] = (len(self._rules) - 1, index, len(self._places))
            self.state[p] = {"step": 0, **rule.init(p.detach())}

    def rule_of(self, p: Tensor) -> UpdateRule:
        """The rule that updates ``p``."""
        return self._rules[self._places[p][0]]

    def describe(self, group: dict[str, Any]) -> str:
        """How the rule of a group is composed: ``GaLore(Adam(Dense))``."""

        def composition(part: object) -> str:
            parts = [composition(inner) for inner in vars(part).values() if is_dataclass(inner)]
            return type(part).__name__ + (f"({', '.join(parts)})" if parts else "")

        return composition(self.rule_of(group["params"][0]))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                self.update_param(p)
        return loss

    @torch.no_grad()
    def update_param(self, p: Tensor) -> None:
        """Update ``p`` from ``p.grad``, which is left as it is; does nothing where there is no gradient."""
        if p.grad is None:
            return
        group_index, index, overall = self._places[p]
        group, rule, state = self.param_groups[group_index], self._rules[group_index], self.state[p]
        state["step"] += 1
        step = Step(
            count=state["step"],
            generator=self._random_bits(p.device, overall, state["step"]),
            seed=_mix(self.seed, overall),
            phase=index / len(group["params"]),
        )
        tensors = {name: value for name, value in state.items() if name != "step"}
        if not rule.elementwise:
            self._update(p, p.grad, tensors, rule, group, step)
            return
        weight, grad = p.view(-1), p.grad.reshape(-1)
        for start in range(0, weight.numel(), CHUNK):
            stop = min(start + CHUNK, weight.numel())
            views = rule.narrow(tensors, start, stop)
            self._update(weight[start:stop], grad[start:stop], views, rule, group, step)

    def _update(
        self,
        weight: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        rule: UpdateRule,
        group: dict[str, Any],
        step: Step,
    ) -> None:
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if decay and rule.decay == "l2":
            grad = torch.add(grad if self.rounding == "nearest" else grad.float(), weight, alpha=decay)
        direction = rule.update(grad, state, step)
        if weight.dtype == torch.bfloat16 and self.rounding == "stochastic":
            _subtract_stochastically(weight, direction, lr, decay, rule.decay, step.generator)
        else:
            _subtract(weight, direction, lr, decay, rule.decay)

    def _random_bits(self, device: torch.device, overall: int, count: int) -> torch.Generator | None:
        """The stream of one parameter at one update: the same whatever the order in which parameters are updated."""
        if self.rounding == "nearest" or device.type == "meta":
            return None
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed(_mix(self.seed, overall, count))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state into this one, in place.

        torch's own loader would cast every tensor to its parameter's dtype; here each keeps the dtype that its rule
        gave it. Raises ValueError where groups, names or shapes differ.
        """
        saved_groups, groups = state_dict["param_groups"], self.param_groups
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in groups]:
            raise ValueError("the saved optimizer has other parameter groups than this one")
        for saved_group, group in zip(saved_groups, groups, strict=True):
            group.update({key: value for key, value in saved_group.items() if key not in ("params", "param_names")})
            for key, p in zip(saved_group["params"], group["params"], strict=True):
                saved, state = state_dict["state"][key], self.state[p]
                if saved.keys() != state.keys():
                    raise ValueError(f"the saved state holds {sorted(saved)}; this optimizer's {sorted(state)}")
                for name, value in saved.items():
                    if not isinstance(value, Tensor):
                        state[name] = value
                    elif value.shape != state[name].shape or value.dtype != state[name].dtype:
                        raise ValueError(
                            f"the saved {name} is {value.dtype} {tuple(value.shape)}; "
                            f"this optimizer's is {state[name].dtype} {tuple(state[name].shape)}"
                        )
                    else:
                        state[name].copy_(value)


def _subtract(weight: Tensor, direction: Direction, lr: float, decay: float, order: Decay) -> None:
    """The update in the weight's own dtype."""
    if decay and order == "before":
        weight.mul_(1 - lr * decay)
    direction.add_to(weight, -lr)
    if decay and order == "after":
        weight.add_(weight, alpha=-lr * decay)


def _subtract_stochastically(
    weight: Tensor,
    direction: Direction,
    lr: float,
    decay: float,
    order: Decay,
    generator: torch.Generator | None,
) -> None:
    """The update in fp32, a block of rows at a time, rounded once to the bf16 weight."""
    rows = max(1, CHUNK // weight[0].numel())
    for start in range(0, weight.shape[0], rows):
        stop = min(start + rows, weight.shape[0])
        block = weight[start:stop].float()
        if decay and order == "before":
            block.mul_(1 - lr * decay)
        block.add_(direction.rows(start, stop), alpha=-lr * direction.factor)
        if decay and order == "after":
            block.mul_(1 - lr * decay)
        weight[start:stop] = round_stochastic(block, generator)


def _mix(*numbers: int) -> int:
    """A 63-bit seed from several small integers, without the collisions of sums."""
    digest = hashlib.blake2b(".".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
