"""Keeps the bases of a subspace between two updates, dense or in a few bits: an axis of GaLore of its own.

A basis has a name in a rule's state. A dense one is the entry of that name, m × r or r × n. One in 4 or 8 bits has four
entries (`tensors.packing.Packed`).
"""

from torch import Tensor

from galore_pretrain.optim.methods import BASIS_STORES
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors import capability
from galore_pretrain.tensors.packing import Packed

_BITS = {"int8": 8, "int4": 4}
_PARTS = ("scales", "zeros", "shape")


def entries_of_basis(name: str) -> tuple[str, ...]:
    """Return the names of all entries that a basis can have."""
    return (name, *(f"{name}_{part}" for part in _PARTS))


# A byte may have two codes, and the last group may be padded, so the shape does not follow from the codes. It is that
# of an entry without elements.
def empty_basis(name: str, like: Tensor, rows: int, columns: int, store: str) -> State:
    """Return the entries of a basis of zeros, on the device of ``like`` and to be read in its dtype."""
    if store not in BASIS_STORES:
        raise ValueError(f"basis_store {store!r} is unknown; choose from {', '.join(BASIS_STORES)}")
    if store == "dense":
        return {name: like.new_zeros(rows, columns)}
    packed = Packed.empty(like, rows, columns, _BITS[store])
    shape = packed.codes.new_empty(0, rows, columns)
    return _entries(name, packed) | {f"{name}_shape": shape}


def basis_shape(state: State, name: str) -> tuple[int, int] | None:
    """Return the shape of a basis, m × r or r × n; None where there is none of that name."""
    if name not in state:
        return None
    shape = state.get(f"{name}_shape", state[name]).shape
    rows, columns = shape[-2:]
    return rows, columns


def read_basis(state: State, name: str) -> Tensor | None:
    """Return a basis; None where there is none of that name. A dense one is the entry itself."""
    packed = _packed(state, name)
    if packed is None:
        return state.get(name)
    return packed.read(by_kernel=capability.runs_on(packed.codes.device))


def write_basis(state: State, name: str, basis: Tensor, step: Step) -> None:
    """Keep ``basis`` (fp32), rounded to nearest, if the update is valid."""
    packed = _packed(state, name)
    if packed is None:
        step.store(state[name], basis)
        return
    for entry, value in _entries(name, packed.written(basis)).items():
        step.store(state[entry], value)


def _packed(state: State, name: str) -> Packed | None:
    """Return a basis as it is kept in a few bits; None where it is not."""
    shape = basis_shape(state, name)
    if shape is None or f"{name}_shape" not in state:
        return None
    return Packed(state[name], state[f"{name}_scales"], state[f"{name}_zeros"], shape)


def _entries(name: str, packed: Packed) -> State:
    """Return the entries of a packed basis that have elements."""
    return {name: packed.codes, f"{name}_scales": packed.scales, f"{name}_zeros": packed.zeros}
