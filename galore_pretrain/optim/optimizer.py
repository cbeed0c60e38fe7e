"""The one ``torch.optim.Optimizer`` gives each parameter its rule, state and random bits, and updates weights.

``update_param(p)`` is the whole update of one parameter. ``step()`` is a loop over it; a layerwise execution calls the
same method from inside backward. Hence one state, one learning rate and one checkpoint format for both.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from galore_pretrain.optim.checkpointing import share_out, take_state_dict
from galore_pretrain.optim.codes import update_codes
from galore_pretrain.optim.execution import (
    PendingGradient,
    PendingGradients,
    SkipCounts,
    Skips,
    are_zero,
    own_precision,
)
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.overlap import OverlapMeans
from galore_pretrain.optim.rule import Direction, Scope, UpdateRule, check_scope
from galore_pretrain.optim.sharing import Distributor, update_gathered
from galore_pretrain.optim.slots import Slot, Slots, States, initial_state
from galore_pretrain.optim.update import Step
from galore_pretrain.optim.weights import DenseWeights, WeightStore
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.coded import codes_of
from galore_pretrain.tensors.rounding import NoiseTables, RandomBits
from galore_pretrain.tensors.shards import local


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
    ``weight_decay``; other keys are kept for the caller. State is made, at its final shapes and dtypes, when it is
    first asked for: by an update, by ``state[p]`` or by `allocate`. ``rounding`` says how a bf16 weight takes an
    update: ``"stochastic"`` (computed in fp32, reproducible from ``seed`` and the count of updates) or ``"nearest"``.

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
        self.slots = Slots(self)
        self.pending = PendingGradients(self)
        self._noise = NoiseTables(seed)
        self._skips = SkipCounts()
        self.overlaps = OverlapMeans()
        self._seen: list[tuple[int, list[Tensor]]] = []  # of each group, when slots were last given
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.state = States(self.slots)  # type: ignore[assignment]
        self._register_hooks()

    def _register_hooks(self) -> None:
        """Have a saved state be of the groups' settings as they are then, and of whole parameters."""
        self.register_state_dict_pre_hook(_follow_groups)
        self.register_state_dict_post_hook(share_out)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. ValueError where its rule, its numbers or its tensors do not fit."""
        group = {**self.defaults, **param_group}
        _check_group(group)
        # `param_groups` go into checkpoints, and rules do not: their settings do, by which a loader knows another rule.
        rule: UpdateRule = group.pop("rule")
        group["settings"] = self.slots.add_rule(rule)
        super().add_param_group(group)
        self.slots.check_last_group()

    def allocate(self) -> None:
        """Allocate the state of all trained parameters that have none yet."""
        self.follow_groups()
        for p in self.slots:
            self.tensors(p)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy take: torch's own method leaves out what a subclass adds."""
        attributes = super().__getstate__()
        for name in ("rounding", "seed", "slots"):
            attributes[name] = getattr(self, name)
        # A copy has no gradients and no skips yet, and draws the same random bits anew.
        attributes["_noise"] = NoiseTables(self.seed)
        attributes["_skips"] = SkipCounts()
        attributes["overlaps"] = OverlapMeans()
        attributes["_seen"] = []
        attributes["pending"] = PendingGradients(self, self.pending.distributor)
        return attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` returned; torch forgets hooks, its own ones too."""
        super().__setstate__(state)
        self._register_hooks()

    @property
    def projects(self) -> bool:
        """Return whether some gradients are kept compressed until their update."""
        return any(rule.projects for rule in self.slots.rules)

    def rule_of(self, p: Tensor) -> UpdateRule:
        """Return the rule that updates ``p``."""
        return self.slots[p].rule

    # Dynamo would freeze counts and pending gradients into its code. A compiled training step calls this as it is.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, in its own precision also where the caller's is autocast."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.follow_groups()
        params = [p for group in self.param_groups for p in group["params"]]
        if self._only_shows_state(params):
            self.allocate()
            return loss
        with own_precision():
            self.pending.sync(params)
            self.pending.refresh(params)
            for p in params:
                self.update_param(p)
        self._skips.end_step()
        return loss

    # To see what a state holds, torch.distributed.checkpoint makes a first step with gradients of zeros at the rate 0.
    # As an update it would count, and find bases in zeros, which later ones would go on with.
    def _only_shows_state(self, params: Iterable[Tensor]) -> bool:
        """Return whether a step is to change nothing: the first, where the rate and all gradients are 0."""
        if self.state or any(group["lr"] for group in self.param_groups):
            return False
        return are_zero(params, self.pending.distributor)

    def follow_groups(self) -> None:
        """Go on with the parameters that the groups have now, as every update does. Subclasses follow settings too."""
        if not _are_as_seen(self.param_groups, self._seen):
            self.slots.renew()
            self._seen = [(group.get("first_index", 0), list(group["params"])) for group in self.param_groups]

    def take_settings(self, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Do nothing: subclasses write to a group those settings of a saved one that decide on its rule."""

    def update_param(self, p: Tensor, coefficient: Tensor | None = None) -> None:
        """Update ``p`` from what was accumulated for it, or else from ``p.grad``; do nothing where there is neither.

        ``coefficient``, a scalar, is multiplied into the gradient in place: the compressed one, if the rule projects.
        """
        if torch.is_grad_enabled():  # it rarely is: `step`, `complete` and backward turn it off for all parameters
            with torch.no_grad(), own_precision():
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
        self.state[p]["step"] = pending.step.count
        if coefficient is not None:
            pending.grad.mul_(coefficient)
        coded = codes_of(p)
        if coded is not None:
            update_codes(coded, pending, float(self.param_groups[slot.group]["weight_decay"]))
            self.pending.release(pending)
            self._count(pending)
            return
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
            step = pending.step if slot.shard is None else pending.step.placed()
            self._update(weight, pending.grad, pending.state, slot, step, decay)
        if not part.is_contiguous():
            part.copy_(weight)
        self.pending.release(pending)
        self._count(pending)

    def _count(self, pending: PendingGradient) -> None:
        """Count what an update left out, and take what its refresh measured."""
        if pending.step.valid is not None or pending.step.failures:
            self._skips.count(pending.step)
        if pending.overlaps is not None:
            self.overlaps.add(pending.overlaps)

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
        _subtract(self.weights, weight, direction, slot, step, decay)

    @torch.no_grad()
    def reset(self, params: Iterable[Tensor]) -> None:
        """Make the state of ``params`` what it was before their first update."""
        for p in params:
            state = self.tensors(p)
            self.state[p]["step"] = 0
            for name, value in initial_state(self.slots[p], p).items():
                state[name].copy_(value)

    def sum_over_replicas(self, mesh: Any) -> None:
        """Sum gradients over the replicas of ``mesh`` here: they come summed over its shards alone."""
        self.pending.distributor = Distributor(mesh, sums_replicas=True)

    def discard(self, params: Iterable[Tensor] | None = None) -> None:
        """Drop the gradients of ``params``, accumulated or not; of all by default."""
        self.pending.discard(params)

    def state_bytes(self, params: Iterable[Tensor] | None = None) -> int:
        """Return the bytes of the state of ``params``; of all by default."""
        if params is None:
            self.follow_groups()
            params = self.slots
        return sum(value.nbytes for p in params for value in self.slots.state(p).values())

    def next_due(self, p: Tensor, count: int) -> int | None:
        """Return the number (from ``count`` on) of the first update of ``p`` with a new basis; None where none has."""
        slot = self.slots[p]
        return slot.rule.next_refresh(Step(count, phase=slot.phase))

    def is_due(self, p: Tensor) -> bool:
        """Return whether the next update of ``p`` finds a new basis."""
        slot = self.slots[p]
        count = self.state[p]["step"] + 1 if p in self.state else 1
        return slot.finds_bases(self.slots.state(p), Step(count, phase=slot.phase))

    def tensors(self, p: Tensor) -> State:
        """Return the tensors of the state of ``p``, on its device; new ones where it has none or was cleared."""
        state = self.state.get(p)
        if not state:
            state = self.state[p] = self.slots.new_state(p)
        tensors = {**state}
        del tensors["step"]
        for name, value in tensors.items():
            if value.device != p.device:  # the model was moved after the optimizer was built
                tensors[name] = state[name] = value.to(p.device)
        return tensors

    def random_bits(self, p: Tensor, count: int) -> RandomBits | None:
        """Return the streams of ``p`` at update ``count``, the same whatever the order of updates; None for nearest."""
        if p.device.type == "meta":
            return None
        is_rounded = self.rounding != "nearest" and p.dtype == torch.bfloat16
        if not is_rounded and codes_of(p) is None:
            return None
        return self._noise.bits(self.slots[p].index, count, p.device)

    def read_skips(self) -> Skips:
        """Return what was skipped since the last call. Waits for the device."""
        return self._skips.take()

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state, each tensor on its parameter's device; nothing is changed if something does not fit.

        Each keeps the dtype that its rule gave it; torch's own loader would cast it to its parameter's. Processes that
        share parameters must all call this. Raises ValueError where groups, rules, names, shapes or dtypes differ.
        """
        take_state_dict(self, state_dict)


def _follow_groups(optimizer: Any) -> None:
    """Have an optimizer go on with what its groups hold; a hook of torch's ``state_dict``."""
    optimizer.follow_groups()


def _are_as_seen(groups: Sequence[Mapping[str, Any]], seen: Sequence[tuple[int, list[Tensor]]]) -> bool:
    """Return whether ``groups`` have the same first indices and the very tensors, in the same order, as those seen."""
    if len(groups) != len(seen):
        return False
    for group, (first_index, params) in zip(groups, seen, strict=True):
        has_same_tensors = all(map(operator.is_, group["params"], params))
        if len(group["params"]) != len(params) or not has_same_tensors:
            return False
        if group.get("first_index", 0) != first_index:
            return False
    return True


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
