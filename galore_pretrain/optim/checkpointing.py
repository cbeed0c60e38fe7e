"""The state of a parameter as a checkpoint holds it: that of one process, however many share the parameter.

Dense tensors are handed over as DTensors, of which each process writes and reads its own part. What is kept in blocks
(8-bit moments, histories) is put together, and taken apart, by way of its values: blocks begin anew in each part.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.optim.galore import GaLore
from galore_pretrain.optim.moments import MomentStore, State
from galore_pretrain.optim.natural import Natural
from galore_pretrain.optim.rule import UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.shards import Shard, shard_of, whole

_READ = Step(count=0)


@torch.no_grad()
def portable(rule: UpdateRule, state: State, p: Tensor, *, blocks: bool | None = None) -> State:
    """The state of ``p`` in that form: live tensors, which may be loaded into.

    But for what is in blocks, which is new and on the CPU. To be loaded, it is empty, and `take_blocks` takes it back.
    To be saved, it is filled with the values of all processes, which must all call this, in those where ``blocks`` is
    true, and left out in the others.
    """
    shard = shard_of(p)
    if shard is None:
        return state
    found: State = {}
    for name, value in state.items():
        if (place := _place(rule, state, name, shard)) is None:
            found[name] = value
        elif not _is_in_blocks(rule, state, name):
            found[name] = _distributed(value, place, p)
    empty = _blocks_like(rule, state, p) if blocks is not False else {}
    for name, store, place in _in_blocks(rule, state, p) if blocks is not None else ():
        here = _values(rule, state, store, name, place)
        values = whole(_distributed(here, _of_values(place, here), p))
        if blocks:
            _write(store, empty, name, values.cpu())
    return found | empty


@torch.no_grad()
def take_blocks(rule: UpdateRule, state: State, saved: State, p: Tensor) -> None:
    """The inverse: ``state`` takes its part of what was loaded into ``saved``."""
    for name, store, place in _in_blocks(rule, state, p):
        values = _values(rule, saved, store, name, replace(place, start=0, stop=place.shape[place.dim]))
        _write(store, state, name, _of_values(place, values).of(values).to(p.device))


def _in_blocks(rule: UpdateRule, state: State, p: Tensor) -> list[tuple[str, MomentStore, Shard]]:
    """(name, store, where the moment lies) of what is kept in blocks and shared out."""
    shard = shard_of(p)
    names = [name for name in state if not name.endswith("_absmax") and _is_in_blocks(rule, state, name)]
    places = [] if shard is None else [(name, _place(rule, state, name, shard)) for name in names]
    return [(name, _store(rule, name), place) for name, place in places if place is not None]


def _blocks_like(rule: UpdateRule, state: State, p: Tensor) -> State:
    """What is in blocks, for the whole of ``p``."""
    names = {name for name, _, _ in _in_blocks(rule, state, p)}
    like: Mapping[str, Tensor] = rule.init(torch.empty(p.shape, dtype=p.dtype, device="meta")) if names else {}
    kept = {name: value for name, value in like.items() if name.removesuffix("_absmax") in names}
    return {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in kept.items()}


def _values(rule: UpdateRule, state: State, store: MomentStore, name: str, place: Shard) -> Tensor:
    """The moment's values, in fp32 and shaped as what lies at ``place``; a history's with its slots before."""
    shape = list(place.shape)
    shape[place.dim] = place.stop - place.start
    values = store.read({n: v for n, v in state.items() if n.removesuffix("_absmax") == name}, name, _READ)
    return values[:, : prod(shape)].reshape(-1, *shape) if name == "history" else values.view(shape)


def _write(store: MomentStore, state: State, name: str, values: Tensor) -> None:
    if name == "history":
        flat = torch.zeros(state[name].shape, dtype=torch.float32, device=values.device)
        flat[:, : values[0].numel()] = values.flatten(1)
        values = flat
    store.write(state, name, values.contiguous(), _READ)


def _of_values(place: Shard, values: Tensor) -> Shard:
    """Where values lie that may have slots before."""
    more = values.ndim - len(place.shape)
    return replace(place, dim=place.dim + more, shape=(*values.shape[:more], *place.shape))


def _place(rule: UpdateRule, state: State, name: str, shard: Shard) -> Shard | None:
    """Where a tensor of the state of ``shard`` lies; None where each process has all of it."""
    if isinstance(rule, GaLore):
        low = rule.low_shard(state, shard)
        return None if low is None or name.endswith("basis") else _place(rule.inner, state, name, low)
    if name in ("row", "column"):  # a number for each row, and each column
        dim = ("row", "column").index(name)
        return replace(shard, dim=0, shape=(shard.shape[dim],)) if dim == shard.dim else None
    return None if name == "gram" else shard


def _is_in_blocks(rule: UpdateRule, state: State, name: str) -> bool:
    return name == "history" or f"{name}_absmax" in state or name.endswith("_absmax")


def _store(rule: Any, name: str) -> MomentStore:
    while isinstance(rule, GaLore) or (isinstance(rule, Natural) and name != "history"):
        rule = rule.inner
    store: MomentStore = rule.store
    return store


def _distributed(part: Tensor, place: Shard, p: Tensor) -> Tensor:
    """The DTensor whose ``part`` is here."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Placement

    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    placements = [*[Replicate()] * (mesh.ndim - 1), Placement(place.dim)]
    stride = torch.empty(place.shape, device="meta").stride()
    shape = torch.Size(place.shape)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
