"""The one ``torch.optim.Optimizer``: it gives each parameter its rule, state and random bits, and writes weights.

``update_param(p)`` is the whole update of one parameter. ``step()`` is a loop over it; a layerwise execution calls the
same method from inside backward. Hence one state, one learning rate and one checkpoint format for both.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.checkpointing import portable, take_blocks
from galore_pretrain.optim.galore import GaLore
from galore_pretrain.optim.rule import UpdateRule
from galore_pretrain.optim.sharing import Pool, Waiting
from galore_pretrain.optim.update import Step
from galore_pretrain.optim.weights import add, subtract
from galore_pretrain.tensors.chunks import chunk_elements, pieces
from galore_pretrain.tensors.rounding import RandomBits, mix
from galore_pretrain.tensors.shards import local, shard_of
from galore_pretrain.tensors.values import gradient_norm

_GOLDEN = 0.6180339887498949
_UPDATES_A_POOL, _POOLS = 64, 2
_PATIENCE = 100  # steps after which faults that nobody asked for are told


@dataclass(frozen=True)
class Faults:
    """What went wrong since it was last asked: updates of one tensor that were skipped, bases that were not renewed."""

    skipped: int = 0
    failed_refreshes: int = 0


class RuleOptimizer(torch.optim.Optimizer):
    """Applies an update rule to every parameter of a group: ``p -= lr · (direction + weight_decay · p)``.

    ``groups`` are dicts with ``params`` (tensors, or pairs of name and tensor), ``rule``, and optionally ``lr`` and
    ``weight_decay``; other keys are kept for the caller. State is allocated here, whole and at its final shapes and
    dtypes. ``rounding``: how a bf16 weight takes an update, ``"stochastic"`` (computed in fp32, reproducible from
    ``seed`` and the count of updates alone) or ``"nearest"``.

    A gradient that is not finite, or whose squares overflow, changes neither weight nor state, and is counted
    (`take_faults`); where nobody asks for the count, a warning tells it every 100 steps.
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
        self._places: dict[Tensor, tuple[int, int]] = {}  # parameter -> (group, index overall)
        self._pools: dict[tuple[torch.device, int], Tensor] = {}  # what random bits are read from, see random_bits
        self._faults: dict[torch.device, Tensor] = {}  # (skipped, failed refreshes), counted where they happen
        self._waiting: dict[Tensor, Waiting] = {}  # what was gathered, until the update
        self._unasked = 0  # steps since somebody asked for them
        self._pool: Pool | None = None  # the processes, where they are several
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state (zeros). The rule itself stays out of ``param_groups`` and checkpoints;
        its ``settings`` are there as text, by which `load_state_dict` knows another one."""
        group = {**self.defaults, **param_group}
        if "rule" not in group:
            raise ValueError("a parameter group has no rule; build_rules of optim.build makes those of a row")
        rule: UpdateRule = group.pop("rule")
        group["settings"] = _settings(rule)
        for name in ("lr", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} {group[name]} must be finite and not negative")
        super().add_param_group(group)
        self._rules.append(rule)
        self._pool = self._pool or Pool.of(self.param_groups[-1]["params"])
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"a parameter is {p.dtype}; weights in bfloat16 and float32 are supported")
            self._places[p] = (len(self._rules) - 1, len(self._places))
            self.state[p] = {"step": 0, **rule.init(_at_least_1d(local(p)), shard_of(p))}

    def follow(self, group: int, rule: UpdateRule) -> None:
        """Update a group by another rule from now on. ValueError where its state has other names, shapes or dtypes."""
        settings, now = _settings(rule), self.param_groups[group]
        if settings == now["settings"]:
            return
        for p in now["params"]:
            wanted = rule.init(_at_least_1d(local(p).to("meta")), shard_of(p))
            there = {name: value for name, value in self.state[p].items() if name != "step"}
            if _layout(wanted) != _layout(there):
                raise ValueError(
                    f"a group of {now['settings']} cannot go on as {settings}: its state has another shape"
                )
        self._rules[group], now["settings"] = rule, settings

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: torch's own leaves out what a subclass adds."""
        own = {name: getattr(self, name) for name in ("rounding", "seed", "_rules", "_places", "_unasked", "_pool")}
        return {**super().__getstate__(), **own, "_pools": {}, "_faults": {}, "_waiting": {}}

    @property
    def is_shared(self) -> bool:
        """Whether several processes make one update."""
        return self._pool is not None

    @property
    def projects(self) -> bool:
        """Whether some gradients are projected into a subspace."""
        return any(isinstance(rule, GaLore) for rule in self._rules)

    def waits_for_all(self, p: Tensor) -> bool:
        """Whether the gradient of ``p`` is not used before an update's last: where several processes make one, what is
        projected, and where sums are on their way meanwhile, what is small and would have to wait for them."""
        sums = self._pool is not None and self._pool.replica is not None
        return self.is_shared and (self.is_projected(p) or (sums and p.ndim < 2))

    def is_projected(self, p: Tensor) -> bool:
        """Whether the gradient of ``p`` is."""
        return isinstance(self.rule_of(p), GaLore)

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
        self._before_step()
        self.agree(self._places)
        self.renew(self._places)
        for group in self.param_groups:
            for p in group["params"]:
                self.update_param(p)
        self._unasked += 1
        if self._unasked >= _PATIENCE and (faults := self.take_faults()) != Faults():
            warnings.warn(
                f"in the last {_PATIENCE} steps, {faults.skipped} gradients were not finite and their tensors skipped, "
                f"and {faults.failed_refreshes} bases could not be renewed",
                stacklevel=2,
            )
        return loss

    def _before_step(self) -> None:
        """For subclasses: not a ``step`` of their own, whose hooks torch would call twice."""

    @torch.no_grad()
    def update_param(self, p: Tensor, coefficient: Tensor | None = None) -> None:
        """Update ``p`` from what was gathered for it, or else from ``p.grad``; does nothing where there is neither.

        ``coefficient``, a scalar, is multiplied into the gradient: into the low-rank one where the rule projects, else
        into ``p.grad`` itself.
        """
        if not self._all_waiting([p]) or p.numel() == 0:
            return
        self.agree([p])
        waiting = self._waiting.pop(p)
        group, rule, tensors = self._of(p)
        self.state[p]["step"] += 1
        step = waiting.step.only_if(waiting.finite)
        waiting.settle()
        here = local(p)
        grad, weight = waiting.grad, _at_least_1d(here.contiguous())  # itself, if it is
        if coefficient is not None:
            grad.mul_(coefficient)
        if rule.elementwise:
            flat, grad, placed = weight.view(-1), grad.reshape(-1), step.placed()
            in_place = isinstance(rule, Adam) and rule.kernel_suffices(step, flat.dtype)
            for start, stop in pieces(flat.numel(), max(1, flat.numel()) if in_place else chunk_elements(p.device)):
                views = rule.narrow(tensors, start, stop)
                self._update(flat[start:stop], grad[start:stop], views, rule, group, placed.at(start))
        else:
            self._update(weight, grad, tensors, rule, group, step if isinstance(rule, GaLore) else step.placed())
        if not here.is_contiguous():
            here.copy_(weight)  # else it was changed in place
        self._count(step)

    @torch.no_grad()
    def gather(self, p: Tensor, *, project: bool, measure: bool = False) -> None:
        """Add ``p.grad`` to what `update_param` will use, and drop it; nothing where there is none.

        With ``project``, a low-rank sum is kept where the rule projects and no new basis is due at this update, which
        takes r/min(m, n) of the memory. Sums are in the gradient's dtype; where bf16 weights are rounded
        stochastically, so are they. ``measure`` finds the norm of ``p.grad`` before it is dropped.
        """
        if p.grad is None or p.numel() == 0:
            return
        waiting = self._waiting.get(p)
        taken = self._take(p, waiting)
        assert taken is not None
        p.grad = None
        if measure:
            taken.norm = gradient_norm(taken.grad)
        if project and isinstance(taken.rule, GaLore) and not taken.is_due:
            taken.project()
        elif project and waiting is None and taken.grad.untyped_storage().nbytes() > taken.grad.nbytes:
            taken.grad = taken.grad.clone()  # FSDP2 reduces a layer's into one storage, which must not be kept for this
        if waiting is None:
            self._waiting[p] = taken
            return
        waiting.parts += 1
        waiting.finite = waiting.finite & taken.finite
        whose = "" if self._pool is None or self._pool.replica is None else f" of replica {self._pool.replica}"
        add(waiting.grad, taken.grad, taken.place, f"sum {waiting.parts}{whose}")

    @torch.no_grad()
    def reset(self, params: Iterable[Tensor]) -> None:
        """The state of ``params`` as it was before their first update."""
        for p in params:
            self.state[p]["step"] = 0
            for name, value in self.rule_of(p).init(_at_least_1d(local(p)), shard_of(p)).items():
                self.state[p][name].copy_(value)

    @torch.no_grad()
    def settle(self, p: Tensor) -> None:
        """Find the new basis of ``p``, if one is due, in what was gathered, and keep the low-rank gradient alone."""
        if (waiting := self._waiting.get(p)) is not None:
            waiting.settle()

    def norms(self, params: Iterable[Tensor]) -> Tensor:
        """The norm of each gradient of ``params``, fp32 (number of parameters): of the one that was measured, of the
        sum that waits, or of ``p.grad``. 0 where there is none, or one that is not finite, whose update is skipped."""
        found, shared = [], []
        for p in params:
            waiting, shard = self._waiting.get(p), shard_of(p)
            if waiting is None:
                norm = torch.zeros((), device=p.device) if p.grad is None else gradient_norm(local(p.grad))
                found.append(torch.where(norm.isfinite(), norm, 0.0))
            else:
                norm = gradient_norm(waiting.grad) if waiting.norm is None else waiting.norm
                found.append(torch.where(waiting.finite & norm.isfinite(), norm, 0.0))
                if waiting.projected and waiting.norm is None:
                    shard = waiting.step.shard and waiting.place.shard
            shared.append(shard is not None)
        if self._pool is None or not any(shared):
            return torch.stack(found)
        roots = iter(self._pool.norms([norm for norm, part in zip(found, shared, strict=True) if part]))
        return torch.stack([next(roots) if part else norm for norm, part in zip(found, shared, strict=True)])

    @torch.no_grad()
    def start_sum(self, p: Tensor) -> None:
        """Where gradients are summed over replicas here (`sum_over_replicas`), begin with what was gathered for ``p``;
        `agree` ends it."""
        if self._pool is not None and (waiting := self._waiting.get(p)) is not None:
            self._pool.start_sum(waiting)

    @torch.no_grad()
    def agree(self, params: Iterable[Tensor]) -> None:
        """Before `update_param`, where several processes make one update: `Pool.agree` on the gradients."""
        if self._pool is not None and self._pool.may_differ:
            self._pool.agree(self._all_waiting(params))

    @torch.no_grad()
    def renew(self, params: Iterable[Tensor]) -> None:
        """Before `update_param`, where several processes make one update: the bases that are due, shared out."""
        if self._pool is not None:
            self._pool.renew(self._all_waiting(params))

    def _all_waiting(self, params: Iterable[Tensor]) -> list[Waiting]:
        """What was gathered for each, or else its gradient, where there is one."""
        for p in params:
            if p not in self._waiting and (taken := self._take(p, None)) is not None:
                self._waiting[p] = taken
        return [waiting for p in params if (waiting := self._waiting.get(p)) is not None]

    def sum_over_replicas(self, mesh: Any) -> None:
        """Gradients come summed over the shards of ``mesh`` (replicas × shards) alone: the rest is done here, of
        projected ones where there are some."""
        self._pool = Pool(mesh, sums_replicas=True)

    def discard(self, params: Iterable[Tensor] | None = None) -> None:
        """Drop the gradients of ``params``, gathered or not; of all by default."""
        for p in list(self._places) if params is None else params:
            self._waiting.pop(p, None)
            p.grad = None
        if params is None and self._pool is not None:
            self._pool.discard()

    def waiting(self, p: Tensor) -> Waiting | None:
        """What was gathered for the next update of ``p``."""
        return self._waiting.get(p)

    def saved_state(self, p: Tensor, *, load: bool = False) -> dict[str, Tensor]:
        """The tensors of the state of ``p`` as a checkpoint holds them (`portable`); to ``load`` into, or as they are.
        All processes must call this for the same parameters; what is put together of all has then one of them."""
        _, rule, state = self._of(p)
        if load:
            return portable(rule, state, p)
        return portable(rule, state, p, blocks=self._pool is None or self._pool.me == 0)

    def take_saved(self, p: Tensor, saved: dict[str, Tensor]) -> None:
        """Take what was loaded into `saved_state`'s tensors."""
        _, rule, state = self._of(p)
        take_blocks(rule, state, saved, p)

    def state_bytes(self, params: Iterable[Tensor] | None = None) -> int:
        """What the state of ``params`` takes; of all by default."""
        states = [self.state[p] for p in (self._places if params is None else params)]
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    def sum_bytes(self, p: Tensor) -> int:
        """What a gathered gradient of ``p`` takes between two refreshes of its basis."""
        _, rule, state = self._of(p)
        here = local(p)
        return (rule.project(here, state, shard_of(p)) if isinstance(rule, GaLore) else here).nbytes

    def is_due(self, p: Tensor) -> bool:
        """Whether the next update of ``p`` begins with a new basis."""
        count = int(self.state[p]["step"]) + 1
        return self.next_due(p, count) == count

    def next_due(self, p: Tensor, count: int) -> int | None:
        """The number (from ``count`` on) of the first update of ``p`` that begins with a new basis; None: none does."""
        rule = self.rule_of(p)
        return rule.next_due(Step(count, phase=self._phase(p))) if isinstance(rule, GaLore) else None

    def _of(self, p: Tensor) -> tuple[dict[str, Any], UpdateRule, dict[str, Tensor]]:
        """(group, rule, tensors of the state) of a parameter."""
        index, state = self._places[p][0], self.state[p]
        for name, value in state.items():
            if name != "step" and value.device != p.device:  # the model was moved after the optimizer was built
                state[name] = value.to(p.device)
        return self.param_groups[index], self._rules[index], {k: v for k, v in state.items() if k != "step"}

    def _take(self, p: Tensor, waiting: Waiting | None) -> Waiting | None:
        """``p.grad`` as a part of the next update, whose other parts are ``waiting``."""
        if p.grad is None:
            return None
        if p.grad.layout != torch.strided:
            raise ValueError(f"a gradient is {p.grad.layout}; only dense ones are supported (Embedding(sparse=False))")
        _, rule, state = self._of(p)
        step = self._next_step(p) if waiting is None else waiting.step
        if waiting is None and isinstance(rule, GaLore):
            rule.start(state, step)
        # In the gradient's own dtype, which for bf16 has fp32's range and costs an eighth.
        grad = local(p.grad)
        return Waiting(_at_least_1d(grad), step, torch.linalg.vector_norm(grad).isfinite(), rule, state)

    def _next_step(self, p: Tensor) -> Step:
        group, overall = self._places[p]
        count = self.state[p]["step"] + 1
        return Step(
            count=count,
            lr=float(self.param_groups[group]["lr"]),
            seed=mix(self.seed, overall),
            phase=self._phase(p),
            bits=self.random_bits(p, count),
            shard=shard_of(p),
        )

    def _phase(self, p: Tensor) -> float:
        return self._places[p][1] * _GOLDEN % 1.0  # evenly spread, whatever the groups and their number

    def _update(
        self,
        weight: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        rule: UpdateRule,
        group: dict[str, Any],
        step: Step,
    ) -> None:
        decay = float(group["weight_decay"])
        if isinstance(rule, Adam) and rule.update_weight(weight, grad, state, step, decay):
            return
        if decay and rule.decay == "l2":
            against = rule.project(weight, state, step.shard) if isinstance(rule, GaLore) else weight
            grad = torch.add(grad if self.rounding == "nearest" else grad.float(), against, alpha=decay)
        if isinstance(rule, GaLore):
            direction = rule.update_projected(grad, state, step)
            step = step.placed()
        else:
            direction = rule.update(grad, state, step)
        subtract(weight, direction, step.lr * decay if rule.decay != "l2" else 0.0, rule.decay == "before", step)

    def random_bits(self, p: Tensor, count: int) -> RandomBits | None:
        """The streams of one parameter at one update: the same whatever the order in which parameters are updated.

        A pool serves so many updates, each from places of its own; a few are kept, for parameters that are not updated
        every time.
        """
        if self.rounding == "nearest" or p.dtype != torch.bfloat16 or p.device.type == "meta":
            return None
        key = p.device, count // _UPDATES_A_POOL
        if key not in self._pools:
            if len(self._pools) >= _POOLS:
                del self._pools[next(iter(self._pools))]
            self._pools[key] = RandomBits.pool(mix(self.seed, key[1]), p.device)
        return RandomBits(self._pools[key], mix(self.seed, self._places[p][1], count))

    def _count(self, step: Step) -> None:
        if step.ok is None and not step.failures:
            return
        none = torch.zeros((), dtype=torch.bool, device=step.failures[0].device if step.ok is None else step.ok.device)
        skipped = none if step.ok is None else ~step.ok
        new = torch.stack([skipped.long(), torch.stack([none, *step.failures]).sum()])
        self._faults[new.device] = self._faults[new.device] + new if new.device in self._faults else new

    def take_faults(self) -> Faults:
        """What has gone wrong since the last call. Waits for the device."""
        self._unasked = 0
        counts = [count.tolist() for count in self._faults.values()]
        self._faults.clear()
        return Faults(*(sum(values) for values in zip(*counts, strict=True)))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state, each tensor on its parameter's device; nothing is changed if something does not fit.

        torch's own loader would cast every tensor to its parameter's dtype; here each keeps the dtype that its rule
        gave it. Raises ValueError where groups, rules, names, shapes or dtypes differ.
        """
        saved_groups, groups = state_dict["param_groups"], self.param_groups
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in groups]:
            raise ValueError("the saved optimizer has other parameter groups than this one")
        for saved_group, group in zip(saved_groups, groups, strict=True):
            if saved_group.get("settings") != group["settings"]:
                raise ValueError(
                    f"the saved group was updated by {saved_group.get('settings', 'another optimizer')}; "
                    f"this one is by {group['settings']}"
                )
        loaded: dict[Tensor, dict[str, Any]] = {}
        for saved_group, group in zip(saved_groups, groups, strict=True):
            for key, p in zip(saved_group["params"], group["params"], strict=True):
                saved, state = state_dict["state"].get(key, {}), self.state[p]
                if saved.keys() != state.keys():
                    raise ValueError(f"the saved state holds {sorted(saved)}; this optimizer's {sorted(state)}")
                for name, value in saved.items():
                    if isinstance(value, Tensor) and (value.shape, value.dtype) != (
                        state[name].shape,
                        state[name].dtype,
                    ):
                        raise ValueError(
                            f"the saved {name} is {value.dtype} {tuple(value.shape)}; "
                            f"this optimizer's is {state[name].dtype} {tuple(state[name].shape)}"
                        )
                loaded[p] = saved
        for saved_group, group in zip(saved_groups, groups, strict=True):
            group.update({key: value for key, value in saved_group.items() if key not in ("params", "param_names")})
        for p, saved in loaded.items():
            for name, value in saved.items():
                self.state[p][name] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value


def _layout(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def _settings(rule: UpdateRule) -> str:
    """All that a rule is made of, alike in every process."""
    return re.sub(r" at 0x\w+", "", repr(rule))


def _at_least_1d(tensor: Tensor) -> Tensor:
    return tensor.view(1) if tensor.ndim == 0 else tensor
