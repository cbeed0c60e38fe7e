"""The one ``torch.optim.Optimizer``: it gives each parameter its rule, state and random bits, and writes weights.

``update_param(p)`` is the whole update of one parameter. ``step()`` is a loop over it; a layerwise execution calls the
same method from inside backward. Hence one state, one learning rate and one checkpoint format for both.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from galore_pretrain.optim.checkpointing import blocks_from_checkpoint, checked_state, to_checkpoint
from galore_pretrain.optim.execution import PendingGradient, PendingGradients, SkipCounts, Skips, Slot
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import Direction, Scope, UpdateRule, check_scope
from galore_pretrain.optim.sharing import Distributor, update_gathered
from galore_pretrain.optim.update import Step
from galore_pretrain.optim.weights import DenseWeights, WeightStore
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.rounding import NoiseTables, RandomBits, derive_seed
from galore_pretrain.tensors.shards import is_shared, local, shard_of

_PATIENCE = 100  # steps after which skipped updates that nobody asked for are told


class Observer(Protocol):
    """Is handed every piece of an update's work, to be done, measured or counted."""

    def observe(self, name: str, p: Tensor | None, work: Callable[[], None]) -> None:
        """Do ``work``: ``accumulate``, ``compress``, ``update`` of ``p``, or ``complete``, what follows backward."""
        ...


class RuleOptimizer(torch.optim.Optimizer):
    """Applies an update rule to every parameter of a group: ``p -= lr · (direction + weight_decay · p)``.

    ``groups`` are dicts with ``params`` (tensors, or pairs of name and tensor), ``rule``, and optionally ``lr`` and
    ``weight_decay``; other keys are kept for the caller. State is allocated here, whole and at its final shapes and
    dtypes. ``rounding``: how a bf16 weight takes an update, ``"stochastic"`` (computed in fp32, reproducible from
    ``seed`` and the count of updates alone) or ``"nearest"``.

    A gradient that is not finite, or whose squares overflow, changes neither weight nor state, and is counted
    (`read_skips`); where nobody asks for the count, a warning tells it every 100 steps.
    """

    observer: Observer | None = None
    weights: WeightStore = DenseWeights()

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
        self.rounding, self.seed = rounding, seed
        self.slots: dict[Tensor, Slot] = {}
        self.pending = PendingGradients(self)
        self._noise, self._skips, self._steps_since_read = NoiseTables(seed), SkipCounts(), 0
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state. The rule itself stays out of ``param_groups`` and checkpoints; its
        ``settings`` are there as text, by which `load_state_dict` knows another one."""
        group = {**self.defaults, **param_group}
        if "rule" not in group:
            raise ValueError("a parameter group has no rule; build_rules of optim.build makes those of a row")
        rule: UpdateRule = group.pop("rule")
        check_scope(rule)
        group["settings"] = _settings(rule)
        for name in ("lr", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} {group[name]} must be finite and not negative")
        super().add_param_group(group)
        added = self.param_groups[-1]
        if self.pending.distributor is None:
            self.pending.distributor = Distributor.of(added["params"])
        for p in added["params"]:
            slot = _slot(p, rule, group=len(self.param_groups) - 1, index=len(self.slots), seed=self.seed)
            self.state[p] = {"step": 0, **_checked(_initial(slot, p), slot)}
            self.slots[p] = slot

    def follow(self, group: int, rule: UpdateRule) -> None:
        """Update a group by another rule from now on. ValueError where its state has other names, shapes or dtypes."""
        settings, now = _settings(rule), self.param_groups[group]
        if settings == now["settings"]:
            return
        for p in now["params"]:
            expected = _initial(replace(self.slots[p], rule=rule), p.to("meta"))
            if _shapes(expected) != _shapes(self.tensors(p)):
                before = now["settings"]
                raise ValueError(f"a group of {before} cannot go on as {settings}: its state has another shape")
        for p in now["params"]:
            self.slots[p] = replace(self.slots[p], rule=rule)
        now["settings"] = settings

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy take: torch's own method leaves out what a subclass adds."""
        own = {name: getattr(self, name) for name in ("rounding", "seed", "slots", "_steps_since_read")}
        pending = PendingGradients(self, self.pending.distributor)
        fresh = {"_noise": NoiseTables(self.seed), "_skips": SkipCounts(), "pending": pending}
        return {**super().__getstate__(), **own, **fresh}

    @property
    def is_shared(self) -> bool:
        """Whether several processes make one update."""
        return self.pending.distributor is not None

    @property
    def projects(self) -> bool:
        """Whether some gradients are kept compressed until their update."""
        return any(slot.rule.projects for slot in self.slots.values())

    def rule_of(self, p: Tensor) -> UpdateRule:
        """Return the rule that updates ``p``."""
        return self.slots[p].rule

    def observed(self, name: str, p: Tensor | None, work: Callable[[], None]) -> None:
        """Do ``work``, by way of the observer if there is one."""
        if self.observer is None:
            work()
        else:
            self.observer.observe(name, p, work)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_step()
        self.pending.sync(self.slots)
        self.pending.refresh(self.slots)
        for group in self.param_groups:
            for p in group["params"]:
                self.update_param(p)
        self._steps_since_read += 1
        if self._steps_since_read >= _PATIENCE and (faults := self.read_skips()) != Skips():
            warnings.warn(
                f"in the last {_PATIENCE} steps, {faults.skipped} gradients were not finite and their tensors skipped, "
                f"and {faults.failed_refreshes} bases could not be renewed",
                stacklevel=2,
            )
        return loss

    def _before_step(self) -> None:
        """Let a subclass do something first: not in a ``step`` of its own, whose hooks torch would call twice."""

    def update_param(self, p: Tensor, coefficient: Tensor | None = None) -> None:
        """Update ``p`` from what was accumulated for it, or else from ``p.grad``; do nothing where there is neither.

        ``coefficient``, a scalar, is multiplied into the gradient: into the compressed one where the rule projects,
        else into ``p.grad`` itself.
        """
        with torch.no_grad():
            if self.observer is None:
                self._update_param(p, coefficient)
            else:
                self.observer.observe("update", p, lambda: self._update_param(p, coefficient))

    def _update_param(self, p: Tensor, coefficient: Tensor | None) -> None:
        if p.numel() == 0 or (pending := self.pending.take(p)) is None:
            return
        slot = self.slots[p]
        self.state[p]["step"] += 1
        if coefficient is not None:
            pending.grad.mul_(coefficient)
        here = local(p) if slot.is_shared else p.detach()
        weight = here.contiguous()  # itself, if it is
        weight = weight.view(1) if weight.ndim == 0 else weight
        if slot.gathers:
            decay = float(self.param_groups[slot.group]["weight_decay"])
            direction = update_gathered(self.pending.distributor, pending, weight, decay)
            self._subtract(weight, direction, slot, pending.step.placed())
        elif slot.scope is Scope.ELEMENTS:
            self._update_elements(weight, pending, slot)
        elif weight.numel() or slot.scope is Scope.PARTS:  # only a rule that sums over parts is handed an empty one
            self._update(weight, pending.grad, pending.state, slot, pending.step)
        if not here.is_contiguous():
            here.copy_(weight)  # else it was changed in place
        if pending.step.valid is not None or pending.step.failures:
            self._skips.count(pending.step)

    def _update_elements(self, weight: Tensor, pending: PendingGradient, slot: Slot) -> None:
        """Update a flattened tensor by chunks, so that temporaries stay small."""
        rule, step = slot.rule, pending.step.placed()
        weight, grad = weight.view(-1), pending.grad.reshape(-1)
        total = weight.numel()
        size = chunk_elements(weight.device) if rule.needs_chunks(step, weight.dtype) else total
        for start, stop in chunks(weight, total, max(1, size)):
            state = rule.narrow(pending.state, start, stop)
            self._update(weight[start:stop], grad[start:stop], state, slot, step.at(start))

    def _update(self, weight: Tensor, grad: Tensor, state: State, slot: Slot, step: Step) -> None:
        """Update ``weight``, or the chunk of it that is handed over, by the rule's direction."""
        decay = float(self.param_groups[slot.group]["weight_decay"])
        in_one_pass = self.weights.is_dense and not slot.projects
        if in_one_pass and slot.rule.update_weight(weight, grad, state, step, decay):
            return
        if decay and slot.decay == "l2":
            like = grad if self.rounding == "nearest" else grad.float()
            grad = torch.add(like, slot.rule.compress(weight, state, step), alpha=decay)
        direction = slot.rule.update(grad, state, step)
        if slot.shard is not None and slot.scope is not Scope.ELEMENTS:
            step = step.placed()
        self._subtract(weight, direction, slot, step)

    def _subtract(self, weight: Tensor, direction: Direction, slot: Slot, step: Step) -> None:
        decay = float(self.param_groups[slot.group]["weight_decay"])
        decoupled = 0.0 if slot.decay == "l2" else step.lr * decay
        self.weights.subtract(weight, direction, decoupled, slot.decay == "before", step)

    @torch.no_grad()
    def reset(self, params: Iterable[Tensor]) -> None:
        """Make the state of ``params`` what it was before their first update."""
        for p in params:
            self.state[p]["step"] = 0
            for name, value in _initial(self.slots[p], p).items():
                self.state[p][name].copy_(value)

    def sum_over_replicas(self, mesh: Any) -> None:
        """Sum gradients over the replicas of ``mesh`` here: they come summed over its shards alone."""
        self.pending.distributor = Distributor(mesh, sums_replicas=True)

    def discard(self, params: Iterable[Tensor] | None = None) -> None:
        """Drop the gradients of ``params``, accumulated or not; of all by default."""
        self.pending.discard(params)

    def saved_state(self, p: Tensor, *, load: bool = False) -> dict[str, Tensor]:
        """Return the tensors of the state of ``p`` as a checkpoint holds them, to ``load`` into or as they are.

        All processes must call this for the same parameters; what is put together of all has then one of them.
        """
        if load:
            return to_checkpoint(self.rule_of(p), self.tensors(p), p)
        distributor = self.pending.distributor
        blocks = distributor is None or distributor.rank == 0
        return to_checkpoint(self.rule_of(p), self.tensors(p), p, blocks=blocks)

    def take_saved(self, p: Tensor, saved: dict[str, Tensor]) -> None:
        """Take what was loaded into `saved_state`'s tensors."""
        blocks_from_checkpoint(self.rule_of(p), self.tensors(p), saved, p)

    def state_bytes(self, params: Iterable[Tensor] | None = None) -> int:
        """Return what the state of ``params`` takes; of all by default."""
        counted = self.slots if params is None else params
        return sum(value.nbytes for p in counted for value in self.tensors(p).values())

    def sum_bytes(self, p: Tensor) -> int:
        """Return what an accumulated gradient of ``p`` takes between two refreshes of its basis."""
        slot = self.slots[p]
        return slot.rule.compress(local(p), self.tensors(p), Step(0, shard=slot.shard)).nbytes

    def next_due(self, p: Tensor, count: int) -> int | None:
        """Return the number (from ``count`` on) of the first update of ``p`` with a new basis; None where none has."""
        return self.rule_of(p).next_refresh(Step(count, phase=self.slots[p].phase))

    def tensors(self, p: Tensor) -> State:
        """Return the tensors of the state of ``p``, on its device."""
        state = self.state[p]
        for name, value in state.items():
            if name != "step" and value.device != p.device:  # the model was moved after the optimizer was built
                state[name] = value.to(p.device)
        return {name: value for name, value in state.items() if name != "step"}

    def random_bits(self, p: Tensor, count: int) -> RandomBits | None:
        """Return the streams of one parameter at one update: the same whatever the order of updates."""
        if self.rounding == "nearest" or p.dtype != torch.bfloat16 or p.device.type == "meta":
            return None
        return self._noise.bits(self.slots[p].index, count, p.device)

    def read_skips(self) -> Skips:
        """Return what was skipped since the last call. Waits for the device."""
        self._steps_since_read = 0
        return self._skips.take()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state, each tensor on its parameter's device; nothing is changed if something does not fit.

        torch's own loader would cast every tensor to its parameter's dtype; here each keeps the dtype that its rule
        gave it. Raises ValueError where groups, rules, names, shapes or dtypes differ.
        """
        loaded = checked_state(state_dict, self.param_groups, self.state)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})
        for p, saved_state in loaded.items():
            self.state[p].update(saved_state)


def _slot(p: Tensor, rule: UpdateRule, *, group: int, index: int, seed: int) -> Slot:
    """Return the place of a new parameter. ValueError where its rule or dtype cannot be had."""
    if p.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"a parameter is {p.dtype}; weights in bfloat16 and float32 are supported")
    shard = shard_of(p)
    gathers = shard is not None and not rule.scope.allows(shard)
    if gathers and rule.next_refresh(Step(1)) is not None:
        raise ValueError(_cannot_share(rule, "renews bases"))
    return Slot(group, index, derive_seed(seed, index), rule, shard, is_shared(p), gathers)


def _initial(slot: Slot, p: Tensor) -> State:
    """Return the state before the first update; of a rule that gathers, this process's part of the whole one."""
    here = local(p)
    here = here.view(1) if here.ndim == 0 else here
    if not slot.gathers:
        return slot.rule.init(here, slot.shard)
    assert slot.shard is not None
    state = slot.rule.init(here.new_empty(slot.shard.shape))
    places = {name: slot.rule.layout(name, state, slot.shard) for name in state}
    return {n: value if (at := places[n]) is None else at.of(value).clone() for n, value in state.items()}


def _checked(state: State, slot: Slot) -> State:
    """Return the state of a parameter. ValueError for a name that is taken, or where processes cannot share it out."""
    rule = slot.rule
    if "step" in state:
        raise ValueError(f"{type(rule).__name__} has a state named step: updates are counted there; give another name")
    if slot.shard is None:
        return state
    kept_in_blocks = {name for name, store in rule.stores().items() if store.in_blocks(state, name)}
    if slot.gathers and kept_in_blocks:
        raise ValueError(_cannot_share(rule, "keeps moments in blocks"))
    entries = {entry for name in kept_in_blocks for entry in rule.stores()[name].entries(state, name)}
    for name in state.keys() - entries:
        rule.layout(name, state, slot.shard)
    return state


def _cannot_share(rule: UpdateRule, what: str) -> str:
    return (
        f"{type(rule).__name__} needs whole tensors (scope {rule.scope.name}) and {what}: several processes cannot "
        "share its tensors out; use one process, or --shard none"
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def _settings(rule: UpdateRule) -> str:
    """Return all that a rule is made of, as text that is alike in every process."""
    return re.sub(r" at 0x\w+", "", repr(rule))
