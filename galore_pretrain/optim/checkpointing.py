"""The state of a parameter as a checkpoint holds it: that of one process, however many share the parameter.

Dense tensors are handed over as DTensors, of which each process writes and reads its own part. What is kept in blocks
(8-bit moments, histories) is put together, and taken apart, by way of its values: blocks begin anew in each part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import UpdateRule
from galore_pretrain.tensors.shards import Shard, shard_of, whole


@torch.no_grad()
def to_checkpoint(rule: UpdateRule, state: State, p: Tensor, *, blocks: bool | None = None) -> State:
    """Return the state of ``p`` in that form: live tensors, which may be loaded into.

    What is in blocks is new and on the CPU. To be loaded, it is empty, and `blocks_from_checkpoint` takes it back. To
    be saved, it is filled with the values of all processes, which must all call this: in those where ``blocks`` is
    true, and left out in the others.
    """
    shard = shard_of(p)
    if shard is None:
        return state
    in_blocks = _in_blocks(rule, state, shard)
    entries = {entry for name in in_blocks for entry in rule.stores()[name].entries(state, name)}
    saved: State = {}
    for name in (name for name in state if name not in entries):
        layout = rule.layout(name, state, shard)
        saved[name] = state[name] if layout is None else _distributed(state[name], layout, p)
    if blocks is not False:
        saved |= _empty(rule, p, in_blocks)
    if blocks is None:
        return saved
    for name, layout in in_blocks.items():
        here = rule.moment_values(state, name, layout.part_shape)
        values = whole(_distributed(here, _of_values(layout, here), p))
        if blocks:
            rule.set_moment_values(saved, name, values.cpu())
    return saved


@torch.no_grad()
def blocks_from_checkpoint(rule: UpdateRule, state: State, saved: State, p: Tensor) -> None:
    """Give ``state`` its part of what was loaded into ``saved``: the inverse for what is kept in blocks."""
    shard = shard_of(p)
    if shard is None:
        return
    for name, layout in _in_blocks(rule, state, shard).items():
        values = rule.moment_values(saved, name, layout.shape)
        rule.set_moment_values(state, name, _of_values(layout, values).of(values).to(p.device))


def _in_blocks(rule: UpdateRule, state: State, shard: Shard) -> dict[str, Shard]:
    """Return where the moments lie that are shared out and cannot be cut like their tensors, by name."""
    layouts: dict[str, Shard] = {}
    for name, store in rule.stores().items():
        is_padded = name in state and rule.has_slots(name)
        if is_padded or store.in_blocks(state, name):
            layout = rule.layout(name, state, shard)
            if layout is not None:
                layouts[name] = layout
    return layouts


def _empty(rule: UpdateRule, p: Tensor, names: dict[str, Shard]) -> State:
    """Return zeros for the entries of those moments, of the whole of ``p``, on the CPU."""
    if not names:
        return {}
    like = rule.init(torch.empty(p.shape, dtype=p.dtype, device="meta"))
    entries = [entry for name in names for entry in rule.stores()[name].entries(like, name)]
    return {entry: torch.zeros(like[entry].shape, dtype=like[entry].dtype) for entry in entries}


def _of_values(layout: Shard, values: Tensor) -> Shard:
    """Return where values lie that may have slots before the tensor's own dimensions."""
    more = values.ndim - len(layout.shape)
    return replace(layout, dim=layout.dim + more, shape=(*values.shape[:more], *layout.shape))


def _distributed(part: Tensor, layout: Shard, p: Tensor) -> Tensor:
    """Return the DTensor whose ``part`` is here."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Placement

    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    placements = [*[Replicate()] * (mesh.ndim - 1), Placement(layout.dim)]
    stride = torch.empty(layout.shape, device="meta").stride()
    shape = torch.Size(layout.shape)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def checked_state(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """Return the saved state of each parameter, copied to its device.

    ValueError where groups, rules, names, shapes or dtypes differ.
    """
    saved_groups = state_dict["param_groups"]
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
            saved = state_dict["state"].get(key, {})
            _check_shapes(saved, state[p])
            loaded[p] = {name: _copy(value, p.device) for name, value in saved.items()}
    return loaded


def _copy(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _check_shapes(saved: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError where two states of a parameter differ in names, shapes or dtypes."""
    if saved.keys() != state.keys():
        raise ValueError(f"the saved state holds {sorted(saved)}; this optimizer's {sorted(state)}")
    for name, value in saved.items():
        if not isinstance(value, Tensor):
            continue
        own = state[name]
        if (value.shape, value.dtype) != (own.shape, own.dtype):
            raise ValueError(
                f"the saved {name} is {value.dtype} {tuple(value.shape)}; "
                f"this optimizer's is {own.dtype} {tuple(own.shape)}"
            )
