"""Each parameter's slot in the optimizer: found by the parameter, in the groups as they are when it is asked for."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import Decay, Layout, Scope, UpdateRule
from galore_pretrain.optim.sharing import Distributor
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors import capability
from galore_pretrain.tensors.place import is_gpu
from galore_pretrain.tensors.rounding import derive_seed
from galore_pretrain.tensors.shards import Shard, is_shared, local, shard_of
from galore_pretrain.tensors.values import HostCopy, has_values

if TYPE_CHECKING:
    from galore_pretrain.optim.optimizer import RuleOptimizer

_GOLDEN = 0.6180339887498949  # the golden ratio's fraction


@dataclass(slots=True)
class Slot:
    """A parameter's place in the optimizer: its group, its index among all, its rule, and which part of it is here.

    ``seed`` is that of its random numbers. ``is_shared`` says that other processes have a part of the parameter, or a
    copy. ``gathers`` says that the rule needs more of the tensor than the part that is here, so it is gathered for each
    update. ``on_gpu`` and ``has_kernels`` say whether ``device`` is a GPU, and whether kernels of our own run there.
    ``phase``, in [0, 1), is the place of its refreshes among those of all.
    The answers of the rule that never change are kept beside it.
    """

    group: int
    index: int
    seed: int
    rule: UpdateRule
    shard: Shard | None
    is_shared: bool
    gathers: bool
    device: torch.device
    on_gpu: bool = field(init=False)
    has_kernels: bool = field(init=False)
    phase: float = field(init=False)
    projects: bool = field(init=False)
    scope: Scope = field(init=False)
    decay: Decay = field(init=False)
    _schedule: HostCopy | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Multiples of the golden ratio's fraction, modulo 1, are spread evenly however many there are. So no update
        # refreshes many matrices at once, whatever the groups.
        self.phase = self.index * _GOLDEN % 1.0
        self.projects = self.rule.projects
        self.scope = self.rule.scope
        self.decay = self.rule.decay
        self.move(self.device)

    def finds_bases(self, state: State, step: Step) -> bool:
        """Return whether an update finds bases. Waits for a GPU only where a state was just loaded."""
        if not self.rule.finds_bases(step):
            return False
        schedule = self.rule.schedule(state)
        if schedule is None or not has_values(schedule):
            return True
        if self._schedule is not None and self._schedule.is_of(schedule):
            return self.rule.finds_bases(step, self._schedule.tolist())
        return self.rule.finds_bases(step, schedule.tolist())

    # Most of a period lies between this and the next question.
    def keep_schedule(self, state: State) -> None:
        """Have the numbers of the rule's schedule on the host by the time that they are asked for."""
        schedule = self.rule.schedule(state)
        if schedule is not None and self.on_gpu and has_values(schedule):
            self._schedule = HostCopy(schedule)

    def move(self, device: torch.device) -> None:
        """Note that the parameter is on ``device`` now."""
        self.device = device
        self.on_gpu = is_gpu(device)
        self.has_kernels = capability.runs_on(device)


# `param_groups` are everybody's: FSDP2 of accelerate exchanges the parameters in them, a training that thaws layer by
# layer sets requires_grad, others add and remove. A group keeps the text of its rule (`settings`), so a parameter that
# turns up in it gets the group's rule, and the index of its place among all. Frozen parameters are counted, so that the
# indices of others do not depend on them, and get no slot before they are updated.
class Slots(dict[Tensor, Slot]):
    """Holds the slots of an optimizer's trained parameters, and makes one where a parameter is asked for without.

    A group's ``first_index``, of the first group, is the index of the first parameter: 0, where it has none.
    """

    def __init__(self, optimizer: "RuleOptimizer") -> None:
        super().__init__()
        self._optimizer = optimizer
        self._rules: dict[str, UpdateRule] = {}  # by their settings
        self._groups_by: Counter[str] = Counter()  # how many groups a rule has, also of those that are out for a while
        self._checked: set[tuple[str, torch.Size, torch.dtype]] = set()

    def add_rule(self, rule: UpdateRule) -> str:
        """Know the rule of one more group, and return the settings by which the group names it."""
        settings = settings_of(rule)
        self._rules[settings] = rule
        self._groups_by[settings] += 1
        return settings

    def rule_named(self, settings: str) -> UpdateRule:
        """Return the rule that groups name by these ``settings``."""
        return self._rules[settings]

    def _forget_rule(self, settings: str) -> None:
        """Forget the rule of a group that goes on by another one, if it was the last that named it."""
        self._groups_by[settings] -= 1
        if not self._groups_by[settings]:
            del self._groups_by[settings]
            del self._rules[settings]

    # No slot is kept: slots hold parameters, and others may be about to exchange these, to free their memory.
    def check_last_group(self) -> None:
        """Take out the last group and raise ValueError where a trained parameter of it does not fit its rule."""
        groups = self._optimizer.param_groups
        group = groups[-1]
        try:
            for p in group["params"]:
                if p.requires_grad:
                    self._made(p, self._rules[group["settings"]], number=len(groups) - 1, index=0)
            self._find_distributor()
        except ValueError:
            groups.pop()
            self._forget_rule(group["settings"])
            raise

    def _find_distributor(self) -> None:
        """See which processes share the parameters that the groups have now."""
        pending = self._optimizer.pending
        if not pending.sums_replicas:
            params = [p for group in self._optimizer.param_groups for p in group["params"]]
            pending.distributor = Distributor.of(params)

    @property
    def rules(self) -> list[UpdateRule]:
        """Return the rule of each group."""
        return [self._rules[group["settings"]] for group in self._optimizer.param_groups]

    def has(self, p: Tensor) -> bool:
        """Return whether ``p`` is in one of the groups."""
        return any(other is p for group in self._optimizer.param_groups for other in group["params"])

    def __missing__(self, p: Tensor) -> Slot:
        """Make the slot of a parameter of the groups; ValueError where it is in none, or does not fit its rule."""
        index = self._first_index()
        for number, group in enumerate(self._optimizer.param_groups):
            for other in group["params"]:
                if other is p:
                    slot = self._made(p, self._rules[group["settings"]], number, index)
                    self[p] = slot
                    return slot
                index += 1
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is in no group of this optimizer; add it to one")

    def renew(self) -> None:
        """Give slots to the groups' trained parameters as they are now."""
        slots: dict[Tensor, Slot] = {}
        index = self._first_index()
        for number, group in enumerate(self._optimizer.param_groups):
            rule = self._rules[group["settings"]]
            for p in group["params"]:
                slot = self.get(p)
                if slot is not None and (slot.group, slot.index, slot.rule) == (number, index, rule):
                    slots[p] = slot
                elif slot is not None or p.requires_grad:
                    slots[p] = self._made(p, rule, number, index)
                    self._check_kept(p, slots[p])
                index += 1
        self.clear()
        self.update(slots)
        self._find_distributor()

    def _check_kept(self, p: Tensor, slot: Slot) -> None:
        """Raise ValueError where the state that ``p`` has already is none of its rule: it is in another group now."""
        if not self._optimizer.state.get(p):
            return
        if _shapes(state_on_meta(slot, p)) != _shapes(self._optimizer.tensors(p)):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is now in a group of {settings_of(slot.rule)}, and its state "
                "has another shape: del optimizer.state[p] to begin it anew"
            )

    # A group's rule may only be exchanged for one with the same state. Where that was made already, it is compared as
    # it is; else as the rule before would make it.
    def follow(self, number: int, rule: UpdateRule) -> None:
        """Update group ``number`` by ``rule`` from now on. ValueError where its state has another form."""
        group = self._optimizer.param_groups[number]
        before = group["settings"]
        settings = settings_of(rule)
        if settings == before:
            return
        followed: dict[Tensor, Slot] = {}
        for p in group["params"]:
            slot = self.get(p)
            if slot is None:
                continue
            followed[p] = replace(slot, rule=rule)
            if _shapes(state_on_meta(followed[p], p)) != _shapes(self.state(p)):
                raise ValueError(f"a group of {before} cannot go on as {settings}: its state has another shape")
        self.update(followed)
        group["settings"] = self.add_rule(rule)
        self._forget_rule(before)

    def state(self, p: Tensor) -> State:
        """Return the tensors of the state of ``p``, on the device meta where none were made yet."""
        if self._optimizer.state.get(p):
            return self._optimizer.tensors(p)
        return state_on_meta(self[p], p)

    def sum_bytes(self, p: Tensor) -> int:
        """Return the bytes of an accumulated gradient of ``p`` between two refreshes of its basis."""
        slot = self[p]
        step = Step(0, shard=slot.shard)
        return slot.rule.compress(local(p), self._optimizer.tensors(p), step).nbytes

    def new_state(self, p: Tensor) -> dict[str, Any]:
        """Return the state of ``p`` before its first update."""
        return {"step": 0, **initial_state(self[p], p)}

    def _first_index(self) -> int:
        """Return the index of the first parameter."""
        groups = self._optimizer.param_groups
        if not groups:
            return 0
        return int(groups[0].get("first_index", 0))

    # What a rule makes of equal parameters is alike, so one of each kind is checked. Of those that processes share out,
    # each part is.
    def _made(self, p: Tensor, rule: UpdateRule, number: int, index: int) -> Slot:
        """Return the slot of a parameter. ValueError where parameter, rule and state do not fit."""
        slot = _slot(p, rule, group=number, index=index, seed=self._optimizer.seed)
        kind = (settings_of(rule), p.shape, p.dtype)
        if slot.shard is not None:
            _check_state(state_on_meta(slot, p), slot)
        elif kind not in self._checked:
            _check_state(state_on_meta(slot, p), slot)
            self._checked.add(kind)
        return slot


class States(dict[Any, dict[str, Any]]):
    """Makes the state of a trained parameter of the groups where one is asked for; of all else, as torch, ``{}``."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = slots

    def __missing__(self, key: Any) -> dict[str, Any]:
        """Make the state that is not there."""
        state: dict[str, Any] = {}
        if isinstance(key, Tensor) and key.requires_grad and self._slots.has(key):
            state = self._slots.new_state(key)
        self[key] = state
        return state


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
        device=p.device,
    )


def state_on_meta(slot: Slot, p: Tensor) -> State:
    """Return what `initial_state` returns, with shapes and dtypes but without values."""
    return initial_state(slot, local(p).to("meta"))


# A rule that gathers knows no parts. So its whole state is made, and this process keeps its part of each tensor.
def initial_state(slot: Slot, p: Tensor) -> State:
    """Return this process's part of the state of ``p`` before the first update."""
    part = local(p)
    if part.ndim == 0:
        part = part.view(1)
    if not slot.gathers:
        return slot.rule.init(part, slot.shard)
    assert slot.shard is not None
    whole = part.new_empty(slot.shard.shape)
    whole_state = slot.rule.init(whole)
    for name, store in slot.rule.stores().items():
        if store.in_blocks(whole_state, name):
            raise ValueError(_cannot_share(slot.rule, "keeps moments in blocks"))
    state: State = {}
    for name, value in whole_state.items():
        layout = slot.rule.layout(name, whole_state, slot.shard)
        _check_layout(slot.rule, name, layout, whole=value)
        if layout is None:
            state[name] = value
        else:
            state[name] = layout.of(value).clone()
    return state


# A rule says of shapes how they lie (`UpdateRule.layout`), and a shape can be that of a part by accident. So it is held
# against what the rule makes of the whole parameter.
def _check_state(state: State, slot: Slot) -> None:
    """Raise ValueError where a name of a state is taken, or where processes cannot share a tensor of it out."""
    rule = slot.rule
    if "step" in state:
        raise ValueError(f"{type(rule).__name__} has a state named step: updates are counted there; give another name")
    if slot.shard is None:
        return
    apart: set[str] = set()  # what is not cut as a tensor of its shape is
    for name, store in rule.stores().items():
        if store.in_blocks(state, name) or rule.has_slots(name):
            apart.update(store.entries(state, name))
    whole = state
    if not slot.gathers:
        whole = rule.init(torch.empty(slot.shard.shape, device="meta"))
    for name in state.keys() - apart:
        layout = rule.layout(name, state, slot.shard)  # raises where it does not know
        if not slot.gathers:  # else it was checked when the state was made
            _check_layout(rule, name, layout, whole=whole[name], part=state[name])


def _check_layout(
    rule: UpdateRule, name: str, layout: Shard | None, *, whole: Tensor, part: Tensor | None = None
) -> None:
    """Raise ValueError where a state tensor does not lie as ``layout`` says.

    ``whole`` is that of the whole parameter, and ``part`` that of this process's part of it, where the rule makes one.
    """
    shapes = [tuple(whole.shape)]
    if part is not None:
        shapes.append(tuple(part.shape))
    expected = [shapes[0], shapes[0]]
    if layout is not None:
        expected = [layout.shape, layout.part_shape]
    if shapes != expected[: len(shapes)]:
        found = " and of a part ".join(map(str, shapes))
        raise ValueError(
            f"the state tensor {name} of {type(rule).__name__} is of a whole parameter {found}, where "
            f"{' and '.join(map(str, expected))} were expected: say in layouts how it is shared out "
            f"({', '.join(kind.name for kind in Layout)})"
        )


def _cannot_share(rule: UpdateRule, what: str) -> str:
    """Return the message for a rule that needs whole tensors and does ``what`` no process can do with its part."""
    return (
        f"{type(rule).__name__} needs whole tensors (scope {rule.scope.name}) and {what}: several processes cannot "
        "share its tensors out; use one process, or --shard none"
    )


def _shapes(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor of a state, by its name."""
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def settings_of(rule: UpdateRule) -> str:
    """Return all that a rule is made of, as text that is alike in every process."""
    return re.sub(r" at 0x\w+", "", repr(rule))  # a function in a field has an address in its repr
