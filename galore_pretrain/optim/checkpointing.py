"""The state of a parameter as a checkpoint holds it: that of one process, however many share the parameter.

Dense tensors are handed over as DTensors, of which each process writes and reads its own part. What is kept in blocks
(8-bit moments, histories) is put together, and taken apart, by way of its values: blocks begin anew in each part.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import UpdateRule
from galore_pretrain.optim.slots import Slot, initial_state, state_on_meta
from galore_pretrain.tensors.shards import Shard, is_shared, local, shard_of, whole

if TYPE_CHECKING:
    from galore_pretrain.optim.optimizer import RuleOptimizer

_Groups = Sequence[Mapping[str, Any]]
_Kind = tuple[torch.Size, torch.dtype]


# A dense state tensor lies as its rule says (`UpdateRule.layout`), and torch's own checkpoint writer handles the
# DTensor that says so. Blocks of 256 elements are another matter: a part may begin in the middle of a block of the
# whole tensor, so bytes and scales of the parts are not those of the whole. Therefore the fp32 values of all parts are
# gathered, and a process that writes puts them into blocks anew.
@torch.no_grad()
def to_checkpoint(rule: UpdateRule, state: State, p: Tensor, *, blocks: bool | None = None) -> State:
    """Return the state of ``p`` as a checkpoint holds it: live tensors, which may be loaded into.

    What is in blocks is new and on the CPU. To be loaded (``blocks`` None), it is empty, and `blocks_from_checkpoint`
    takes it back. To be saved, it is filled with the values of all processes, which must all call this: in those where
    ``blocks`` is true, and left out in the others.
    """
    shard = shard_of(p)
    if shard is None:
        return state
    block_layouts = _block_layouts(rule, state, shard)
    block_entries = _entries(rule, block_layouts, state)
    saved: State = {}
    for name, value in state.items():
        if name not in block_entries:
            layout = rule.layout(name, state, shard)
            saved[name] = value if layout is None else _distributed(value, layout, p)
    if blocks is not False:
        saved |= _empty(rule, p, block_layouts)
    if blocks is None:
        return saved
    for name, layout in block_layouts.items():
        part = rule.moment_values(state, name, layout.part_shape)
        distributed = _distributed(part, _of_values(layout, part), p)
        values = whole(distributed)  # every process takes part in this, also one that drops the result
        if blocks:
            rule.set_moment_values(saved, name, values.cpu())
    return saved


def saved_state(optimizer: "RuleOptimizer", p: Tensor, *, load: bool = False) -> State:
    """Return the state tensors of ``p`` as a checkpoint holds them: with their values, or to ``load`` into.

    All processes must call this for the same parameters. They put moments in blocks together; the first has those.
    """
    blocks = None if load else optimizer.pending.is_first
    return to_checkpoint(optimizer.rule_of(p), optimizer.tensors(p), p, blocks=blocks)


def take_saved_state(optimizer: "RuleOptimizer", p: Tensor, saved: State) -> None:
    """Take into the state of ``p`` what was loaded into the tensors of `saved_state`."""
    blocks_from_checkpoint(optimizer.rule_of(p), optimizer.tensors(p), saved, p)


@torch.no_grad()
def blocks_from_checkpoint(rule: UpdateRule, state: State, saved: State, p: Tensor) -> None:
    """Undo `to_checkpoint` for moments kept in blocks: give ``state`` its part of those loaded into ``saved``."""
    shard = shard_of(p)
    if shard is None:
        return
    for name, layout in _block_layouts(rule, state, shard).items():
        values = rule.moment_values(saved, name, layout.shape)
        part = _of_values(layout, values).of(values)
        rule.set_moment_values(state, name, part.to(p.device))


def _block_layouts(rule: UpdateRule, state: State, shard: Shard) -> dict[str, Shard]:
    """Return, by name, the shard of each moment that is kept in blocks, which cannot be cut like a parameter."""
    layouts: dict[str, Shard] = {}
    for name, store in rule.stores().items():
        is_padded = name in state and rule.has_slots(name)
        if is_padded or store.in_blocks(state, name):
            layout = rule.layout(name, state, shard)
            if layout is not None:
                layouts[name] = layout
    return layouts


def _entries(rule: UpdateRule, moments: Mapping[str, Shard], state: State) -> list[str]:
    """Return the names of all entries of ``state`` that hold these ``moments``."""
    stores = rule.stores()
    entries: list[str] = []
    for name in moments:
        entries.extend(stores[name].entries(state, name))
    return entries


def _empty(rule: UpdateRule, p: Tensor, moments: Mapping[str, Shard]) -> State:
    """Return zeros for the entries of these ``moments``, of the whole of ``p``, on the CPU."""
    if not moments:
        return {}
    whole_p = torch.empty(p.shape, dtype=p.dtype, device="meta")
    whole_state = rule.init(whole_p)
    zeros: State = {}
    for entry in _entries(rule, moments, whole_state):
        like = whole_state[entry]
        zeros[entry] = torch.zeros(like.shape, dtype=like.dtype)
    return zeros


def _of_values(layout: Shard, values: Tensor) -> Shard:
    """Return where ``values`` lie, which may have slots (one dimension more) before the tensor's own dimensions."""
    extra_dims = values.ndim - len(layout.shape)
    shape = (*values.shape[:extra_dims], *layout.shape)
    return replace(layout, dim=layout.dim + extra_dims, shape=shape)


def _distributed(part: Tensor, layout: Shard, p: Tensor) -> Tensor:
    """Return the DTensor of which this process has the ``part``, on the mesh of ``p``."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Placement

    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    replicated_dims = mesh.ndim - 1  # a mesh is of replicas × shards, or of shards alone
    placements = [*[Replicate()] * replicated_dims, Placement(layout.dim)]
    # Shape and stride have to be said: from a part, torch would conclude that all parts are as long as this one.
    shape = torch.Size(layout.shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


# What torch.distributed.checkpoint, and all that is built on it, saves is what `state_dict` returns. A plain tensor
# there is taken for one that all processes have alike, and only the first writes it.
def share_out(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a ``state_dict`` whose states are as checkpoints hold them: of whole parameters, not of the parts here.

    It is registered as a hook of torch's ``state_dict``. Processes that share parameters must all call it.
    """
    if optimizer.pending.distributor is None:
        return state_dict
    states = {**state_dict["state"]}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, p in enumerate(params):
        if states.get(key):
            whole_state = to_checkpoint(optimizer.rule_of(p), optimizer.tensors(p), p, blocks=True)
            states[key] = {"step": states[key]["step"], **whole_state}
    return {**state_dict, "state": states}


# torch's own loader would cast each tensor to its parameter's dtype. So this is the whole of it, hooks included.
def take_state_dict(optimizer: Any, state_dict: Mapping[str, Any]) -> None:
    """Give the optimizer the groups' settings and the states of a ``state_dict``; nothing where these do not fit."""
    optimizer.slots.renew()
    state_dict = {**state_dict}
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        exchanged = before(optimizer, state_dict)
        if exchanged is not None:
            state_dict = exchanged
    _take_groups_and_states(optimizer, state_dict)
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


# First, each group goes on by the rule that the saved settings ask for. Then that rule must be the saved one, which may
# differ in what is no setting of a group.
def _take_groups_and_states(optimizer: "RuleOptimizer", state_dict: Mapping[str, Any]) -> None:
    """Take the groups' settings and the states that were saved; change nothing where these do not fit."""
    groups_before = [{**group} for group in optimizer.param_groups]
    rules_before = optimizer.slots.rules
    try:
        # Groups that only one side has are refused below.
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
            optimizer.take_settings(group, saved)
        optimizer.follow_groups()
        loaded = _checked_state(state_dict, optimizer)
    except Exception:
        for number, (group, before) in enumerate(zip(optimizer.param_groups, groups_before, strict=True)):
            settings = group["settings"]
            group.clear()
            group.update(before)
            group["settings"] = settings  # which `follow` compares
            optimizer.slots.follow(number, rules_before[number])
        optimizer.slots.renew()
        raise
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        group.update(copy.deepcopy(_without_params(saved)))
    optimizer.state.clear()
    optimizer.state.update(loaded)
    optimizer.slots.renew()


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a saved group says besides the numbers and names of its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _checked_state(state_dict: Mapping[str, Any], optimizer: "RuleOptimizer") -> dict[Tensor, dict[str, Any]]:
    """Return the saved state of each parameter that has one, copied to its device; of a shared one, the part here.

    ValueError where groups, rules, names, shapes or dtypes differ.
    """
    saved_groups = state_dict["param_groups"]
    saved_states = state_dict["state"]
    groups = optimizer.param_groups
    _check_groups(saved_groups, groups)
    loaded: dict[Tensor, dict[str, Any]] = {}
    for saved_group, group in zip(saved_groups, groups, strict=True):
        for key, p in zip(saved_group["params"], group["params"], strict=True):
            saved = {**saved_states.get(key, {})}
            if saved:
                if "step" not in saved:
                    raise ValueError(f"the saved state holds {sorted(saved)}; step, the count of updates, is missing")
                step = int(saved.pop("step"))  # others save it as a tensor
                loaded[p] = {"step": step, **_loaded(saved, optimizer.slots[p], p)}
    return loaded


# Up to 0.1 of 2026-11-26, `state_dict` held the parts themselves. They are known by their shapes. Where one process has
# all of a tensor, and others nothing, its part has the shape of the whole, and may come as a DTensor.
def _loaded(saved: Mapping[str, Any], slot: Slot, p: Tensor) -> State:
    """Return this process's copy of a saved state; ValueError where it is not one of ``p``."""
    expected = state_on_meta(slot, p)
    if slot.shard is None or _shapes(saved) == _shapes(expected):
        _check_shapes(_shapes(saved), _shapes(expected))
        return {name: local(value).to(p.device, copy=True) for name, value in saved.items()}
    rule = slot.rule
    block_layouts = _block_layouts(rule, expected, slot.shard)
    wholes = _empty(rule, p, block_layouts)
    layouts: dict[str, Shard | None] = {}
    whole_shapes = _shapes(wholes)
    for name in expected.keys() - _entries(rule, block_layouts, expected):
        layout = layouts[name] = rule.layout(name, expected, slot.shard)
        shape = expected[name].shape if layout is None else torch.Size(layout.shape)
        whole_shapes[name] = (shape, expected[name].dtype)
    _check_shapes(_shapes(saved), whole_shapes)
    state = initial_state(slot, p)
    for name, layout in layouts.items():
        state[name].copy_(_part(saved[name], layout))
    blocks_from_checkpoint(rule, state, {name: whole(saved[name]) for name in wholes}, p)
    return state


def _part(value: Tensor, layout: Shard | None) -> Tensor:
    """Return this process's part of a saved tensor, which is whole or a DTensor."""
    if layout is None:
        return whole(value)
    if is_shared(value) and value.placements[-1].is_shard(layout.dim):  # type: ignore[attr-defined]
        part = local(value)
        if part.shape == layout.part_shape:
            return part
    return layout.of(whole(value))


def _check_groups(saved_groups: _Groups, groups: _Groups) -> None:
    """Raise ValueError where groups differ in number, size or rule."""
    saved_sizes = [len(group["params"]) for group in saved_groups]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise ValueError("the saved optimizer has other parameter groups than this one")
    for saved_group, group in zip(saved_groups, groups, strict=True):
        settings = group["settings"]
        if saved_group.get("settings") != settings:
            saved_settings = saved_group.get("settings", "another optimizer")
            raise ValueError(f"the saved group was updated by {saved_settings}; this one is by {settings}")


def _shapes(state: Mapping[str, Any]) -> dict[str, _Kind]:
    """Return the shape and dtype of each tensor of a state, by its name; ValueError for anything else in it."""
    shapes: dict[str, _Kind] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the saved {name} is {value!r}; this optimizer's is a tensor")
        shapes[name] = (value.shape, value.dtype)
    return shapes


def _check_shapes(saved: Mapping[str, _Kind], expected: Mapping[str, _Kind]) -> None:
    """Raise ValueError where two states of a parameter differ in names, shapes or dtypes."""
    if saved.keys() != expected.keys():
        raise ValueError(f"the saved state holds {sorted(saved)}; this optimizer's {sorted(expected)}")
    for name, (shape, dtype) in saved.items():
        expected_shape, expected_dtype = expected[name]
        if shape != expected_shape or dtype != expected_dtype:
            raise ValueError(
                f"the saved {name} is {dtype} {tuple(shape)}; "
                f"this optimizer's is {expected_dtype} {tuple(expected_shape)}"
            )
