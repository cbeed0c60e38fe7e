"""The one ``torch.optim.Optimizer`` gives each parameter its rule, state and random bits, and updates weights.

``update_param(p)`` is the whole update of one parameter. ``step()`` is a loop over it; a layerwise execution calls the
same method from inside backward. Hence one state, one learning rate and one checkpoint format for both.
"""

import math
import re
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


class Observer(Protocol):
    """Is handed every piece of an update's work, and does, measures or counts it."""

    def observe(self, name: str, p: Tensor | None, work: Callable[[], None]) -> None:
        """Do ``work``.

        It is called ``accumulate``, ``compress``, ``refresh`` or ``update`` of ``p``, or ``complete``: all that is done
        after the last backward pass, where ``p`` is None. It is None also where one ``refresh`` is of many parameters.
        """
        ...


class RuleOptimizer(torch.optim.Optimizer):
    """Applies an update rule to every parameter of a group: ``p -= lr · (direction + weight_decay · p)``.

    ``groups`` are dicts with ``params`` (tensors, or pairs of name and tensor), ``rule``, and optionally ``lr`` and
    ``weight_decay``; other keys are kept for the caller. All state is allocated at once, at its final shapes and
    dtypes. ``rounding`` says how a bf16 weight takes an update: ``"stochastic"`` (computed in fp32, reproducible from
    ``seed`` and the count of updates alone) or ``"nearest"``.

    A gradient that is not finite, or whose squares overflow, changes neither weight nor state, and is counted
    (`read_skips`). Where nobody reads the count, a warning tells it every 100 steps.
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
        self.rounding = rounding
        self.seed = seed
        self.slots: dict[Tensor, Slot] = {}
        self.pending = PendingGradients(self)
        self._noise = NoiseTables(seed)
        self._skips = SkipCounts()
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state. ValueError where its rule, its numbers or its tensors do not fit."""
        group = {**self.defaults, **param_group}
        _check_group(group)
        # `param_groups` go into checkpoints, and rules do not: their settings do, by which a loader knows another rule.
        rule: UpdateRule = group.pop("rule")
        group["settings"] = _settings(rule)
        super().add_param_group(group)
        number = len(self.param_groups) - 1
        params = self.param_groups[number]["params"]
        if self.pending.distributor is None:
            self.pending.distributor = Distributor.of(params)
        for p in params:
            index = len(self.slots)
            slot = _slot(p, rule, group=number, index=index, seed=self.seed)
            state = _initial_state(slot, p)
            _check_state(state, slot)
            self.state[p] = {"step": 0, **state}
            self.slots[p] = slot

    def follow(self, group: int, rule: UpdateRule) -> None:
        """Update a group by another rule from now on. ValueError where its state has other names, shapes or dtypes."""
        changed = self.param_groups[group]
        settings = _settings(rule)
        if settings == changed["settings"]:
            return
        slots: dict[Tensor, Slot] = {}
        for p in changed["params"]:
            slots[p] = replace(self.slots[p], rule=rule)
            expected = _initial_state(slots[p], p.to("meta"))
            if _shapes(expected) != _shapes(self.tensors(p)):
                before = changed["settings"]
                raise ValueError(f"a group of {before} cannot go on as {settings}: its state has another shape")
        self.slots.update(slots)
        changed["settings"] = settings

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy take: torch's own method leaves out what a subclass adds."""
        attributes = super().__getstate__()
        for name in ("rounding", "seed", "slots"):
            attributes[name] = getattr(self, name)
        # A copy has no gradients and no skips yet, and draws the same random bits anew.
        attributes["_noise"] = NoiseTables(self.seed)
        attributes["_skips"] = SkipCounts()
        attributes["pending"] = PendingGradients(self, self.pending.distributor)
        return attributes

    @property
    def projects(self) -> bool:
        """Return whether some gradients are kept compressed until their update."""
        return any(slot.rule.projects for slot in self.slots.values())

    def rule_of(self, p: Tensor) -> UpdateRule:
        """Return the rule that updates ``p``."""
        return self.slots[p].rule

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
        self._skips.end_step()
        return loss

    def _before_step(self) -> None:
        """Do nothing: for subclasses. Were they to override ``step``, torch would call the hooks of steps twice."""

    def update_param(self, p: Tensor, coefficient: Tensor | None = None) -> None:
        """Update ``p`` from what was accumulated for it, or else from ``p.grad``; do nothing where there is neither.

        ``coefficient``, a scalar, is multiplied into the gradient in place: the compressed one, if the rule projects.
        """
        if torch.is_grad_enabled():  # it rarely is: `step`, `complete` and backward turn it off for all parameters
            with torch.no_grad():
                self.update_param(p, coefficient)
        elif self.observer is None:
            self._update_param(p, coefficient)
        else:
            self.observer.observe("update", p, lambda: self._update_param(p, coefficient))

    # A rule wants contiguous tensors of at least one dimension. A weight that is no such tensor is updated as a copy,
    # which is written back. Which of three ways the update goes depends on how much of the tensor the rule must see.
    def _update_param(self, p: Tensor, coefficient: Tensor | None) -> None:
        """Take the gradient of ``p`` in its final form, and update ``p`` and its state by it."""
        if p.numel() == 0:
            return
        pending = self.pending.take(p)
        if pending is None:
            return
        slot = self.slots[p]
        self.state[p]["step"] += 1
        if coefficient is not None:
            pending.grad.mul_(coefficient)
        part = local(p) if slot.is_shared else p.detach()
        weight = part.contiguous()  # itself, if it is
        if weight.ndim == 0:
            weight = weight.view(1)
        decay = float(self.param_groups[slot.group]["weight_decay"])
        if slot.gathers:
            direction = update_gathered(self.pending.distributor, pending, weight, decay)
            _subtract(self.weights, weight, direction, slot, pending.step.placed(), decay)
        elif slot.scope is Scope.ELEMENTS:
            self._update_elements(weight, pending, slot, decay)
        elif weight.numel() or slot.scope is Scope.PARTS:  # only a rule that sums over parts is handed an empty one
            self._update(weight, pending.grad, pending.state, slot, pending.step, decay)
        if not part.is_contiguous():
            part.copy_(weight)
        if pending.step.valid is not None or pending.step.failures:
            self._skips.count(pending.step)

    def _update_elements(self, weight: Tensor, pending: PendingGradient, slot: Slot, decay: float) -> None:
        """Update a flattened tensor by chunks, so that temporaries stay small."""
        step = pending.step.placed()
        weight = weight.view(-1)
        grad = pending.grad.reshape(-1)
        total = weight.numel()
        size = total
        if slot.rule.needs_chunks(step, weight.dtype):
            size = chunk_elements(weight.device)
        for start, stop in chunks(weight, total, max(1, size)):
            state = slot.rule.narrow(pending.state, start, stop)
            self._update(weight[start:stop], grad[start:stop], state, slot, step.at(start), decay)

    def _update(self, weight: Tensor, grad: Tensor, state: State, slot: Slot, step: Step, decay: float) -> None:
        """Update ``weight``, or the chunk of it that is handed over, by the rule's direction."""
        can_update_in_one_pass = self.weights.is_dense and not slot.projects
        if can_update_in_one_pass and slot.rule.update_weight(weight, grad, state, step, decay):
            return
        if decay and slot.decay == "l2":
            if self.rounding != "nearest":
                grad = grad.float()
            grad = torch.add(grad, slot.rule.compress(weight, state, step), alpha=decay)
        direction = slot.rule.update(grad, state, step)
        if slot.shard is not None and slot.scope is not Scope.ELEMENTS:  # of elements, the step is placed already
            step = step.placed()
        _subtract(self.weights, weight, direction, slot, step, decay)

    @torch.no_grad()
    def reset(self, params: Iterable[Tensor]) -> None:
        """Make the state of ``params`` what it was before their first update."""
        for p in params:
            self.state[p]["step"] = 0
            initial = _initial_state(self.slots[p], p)
            for name, value in initial.items():
                self.state[p][name].copy_(value)

    def sum_over_replicas(self, mesh: Any) -> None:
        """Sum gradients over the replicas of ``mesh`` here: they come summed over its shards alone."""
        self.pending.distributor = Distributor(mesh, sums_replicas=True)

    def discard(self, params: Iterable[Tensor] | None = None) -> None:
        """Drop the gradients of ``params``, accumulated or not; of all by default."""
        self.pending.discard(params)

    def saved_state(self, p: Tensor, *, load: bool = False) -> dict[str, Tensor]:
        """Return the state tensors of ``p`` as a checkpoint holds them: with their values, or to ``load`` into.

        All processes must call this for the same parameters. They put moments in blocks together; the first has those.
        """
        distributor = self.pending.distributor
        is_first = distributor is None or distributor.rank == 0
        blocks = None if load else is_first
        return to_checkpoint(self.rule_of(p), self.tensors(p), p, blocks=blocks)

    def take_saved(self, p: Tensor, saved: dict[str, Tensor]) -> None:
        """Take into the state of ``p`` what was loaded into the tensors of `saved_state`."""
        blocks_from_checkpoint(self.rule_of(p), self.tensors(p), saved, p)

    def state_bytes(self, params: Iterable[Tensor] | None = None) -> int:
        """Return the bytes of the state of ``params``; of all by default."""
        if params is None:
            params = self.slots
        return sum(value.nbytes for p in params for value in self.tensors(p).values())

    def sum_bytes(self, p: Tensor) -> int:
        """Return the bytes of an accumulated gradient of ``p`` between two refreshes of its basis."""
        slot = self.slots[p]
        step = Step(0, shard=slot.shard)
        return slot.rule.compress(local(p), self.tensors(p), step).nbytes

    def next_due(self, p: Tensor, count: int) -> int | None:
        """Return the number (from ``count`` on) of the first update of ``p`` with a new basis; None where none has."""
        slot = self.slots[p]
        return slot.rule.next_refresh(Step(count, phase=slot.phase))

    def tensors(self, p: Tensor) -> State:
        """Return the tensors of the state of ``p``, on its device."""
        state = self.state[p]
        tensors = {**state}
        del tensors["step"]
        for name, value in tensors.items():
            if value.device != p.device:  # the model was moved after the optimizer was built
                tensors[name] = state[name] = value.to(p.device)
        return tensors

    def random_bits(self, p: Tensor, count: int) -> RandomBits | None:
        """Return the streams of ``p`` at update ``count``, the same whatever the order of updates; None for nearest."""
        if self.rounding == "nearest" or p.dtype != torch.bfloat16 or p.device.type == "meta":
            return None
        return self._noise.bits(self.slots[p].index, count, p.device)

    def read_skips(self) -> Skips:
        """Return what was skipped since the last call. Waits for the device."""
        return self._skips.take()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state, each tensor on its parameter's device; nothing is changed if something does not fit.

        torch's own loader would cast every tensor to its parameter's dtype; here each keeps the dtype that its rule
        gave it. Raises ValueError where groups, rules, names, shapes or dtypes differ.
        """
        loaded = checked_state(state_dict, self.param_groups, self.state)
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(_without_params(saved_group))
        for p, saved_state in loaded.items():
            self.state[p].update(saved_state)


def _subtract(
    weights: WeightStore,
    weight: Tensor,
    direction: Direction,
    slot: Slot,
    step: Step,
    decay: float,
) -> None:
    """Subtract lr · ``direction`` from ``weight``, and lr · ``decay`` · ``weight`` unless that is in the gradient."""
    decay_first = slot.decay == "before"
    decoupled = 0.0
    if slot.decay != "l2":
        decoupled = step.lr * decay
    weights.subtract(weight, direction, decoupled, decay_first, step)


def _check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError where a parameter group has no rule, or its rule or its numbers are not what they must be."""
    if "rule" not in group:
        raise ValueError("a parameter group has no rule; build_rules of optim.build makes those of a row")
    check_scope(group["rule"])
    for name in ("lr", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} {group[name]} must be finite and not negative")


def _slot(
    p: Tensor,
    rule: UpdateRule,
    *,
    group: int,
    index: int,
    seed: int,
) -> Slot:
    """Return the slot of a new parameter. ValueError where its dtype is unknown, or its rule cannot share it out."""
    if p.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"a parameter is {p.dtype}; weights in bfloat16 and float32 are supported")
    shard = shard_of(p)
    gathers = False
    if shard is not None:
        gathers = not rule.scope.allows(shard)
    if gathers and rule.next_refresh(Step(1)) is not None:
        raise ValueError(_cannot_share(rule, "renews bases"))
    return Slot(
        group=group,
        index=index,
        seed=derive_seed(seed, index),
        rule=rule,
        shard=shard,
        is_shared=is_shared(p),
        gathers=gathers,
    )


# A rule that gathers knows no parts. So its whole state is made, and this process keeps its part of each tensor.
def _initial_state(slot: Slot, p: Tensor) -> State:
    """Return this process's part of the state of ``p`` before the first update."""
    part = local(p)
    if part.ndim == 0:
        part = part.view(1)
    if not slot.gathers:
        return slot.rule.init(part, slot.shard)
    assert slot.shard is not None
    whole = part.new_empty(slot.shard.shape)
    whole_state = slot.rule.init(whole)
    state: State = {}
    for name, value in whole_state.items():
        layout = slot.rule.layout(name, whole_state, slot.shard)
        if layout is None:
            state[name] = value
        else:
            state[name] = layout.of(value).clone()
    return state


def _check_state(state: State, slot: Slot) -> None:
    """Raise ValueError where a name of a state is taken, or where processes cannot share a tensor of it out."""
    rule = slot.rule
    if "step" in state:
        raise ValueError(f"{type(rule).__name__} has a state named step: updates are counted there; give another name")
    if slot.shard is None:
        return
    entries_in_blocks: set[str] = set()
    for name, store in rule.stores().items():
        if not store.in_blocks(state, name):
            continue
        if slot.gathers:
            raise ValueError(_cannot_share(rule, "keeps moments in blocks"))
        entries_in_blocks.update(store.entries(state, name))
    for name in state.keys() - entries_in_blocks:
        rule.layout(name, state, slot.shard)  # raises where it does not know


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a saved group says besides the numbers and names of its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _cannot_share(rule: UpdateRule, what: str) -> str:
    """Return the error text for a rule that cannot be shared out, because it needs whole tensors and does ``what``."""
    return (
        f"{type(rule).__name__} needs whole tensors (scope {rule.scope.name}) and {what}: several processes cannot "
        "share its tensors out; use one process, or --shard none"
    )


def _shapes(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor of a state, by its name."""
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def _settings(rule: UpdateRule) -> str:
    """Return all that a rule is made of, as text that is alike in every process."""
    return re.sub(r" at 0x\w+", "", repr(rule))  # a function in a field has an address in its repr
