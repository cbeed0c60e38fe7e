"""What an update rule is: a gradient and a few state tensors in, a direction out.

A rule is a frozen dataclass of hyper-parameters. Its tensors live in the optimizer's state, and the learning rate and
weight decay are the optimizer's. It works on any shape, so the same object serves a weight matrix and its low-rank
projection. The optimizer never asks which class a rule is: it asks the questions that `UpdateRule` answers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from galore_pretrain.optim.moments import MomentStore, State
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.shards import Shard

Decay = Literal["before", "after", "l2"]


class Scope(Enum):
    """Says how much of a tensor a rule has to see at once."""

    ELEMENTS = "elements"
    """Elements do not see each other: any part of the flattened tensor can be updated by itself."""
    ROWS = "rows"
    """Rows do not see each other."""
    COLUMNS = "columns"
    """Columns do not see each other."""
    WHOLE = "whole"
    """The rule needs all of the tensor. Where processes share it out, it is gathered for each update."""
    PARTS = "parts"
    """The rule updates the part at hand, and asks the step for sums over all parts (`Step.total`, `Step.mean`)."""

    def allows(self, shard: Shard) -> bool:
        """Whether a process can update ``shard`` of a tensor without the other parts being gathered."""
        by_dim = {Scope.ROWS: 0, Scope.COLUMNS: 1}
        return self in (Scope.ELEMENTS, Scope.PARTS) or by_dim.get(self) == shard.dim


class Layout(Enum):
    """Says how a state tensor lies where processes share its parameter out."""

    LIKE_PARAMETER = "like the parameter"
    OF_ROWS = "a number for each row"
    OF_COLUMNS = "a number for each column"
    EVERYWHERE = "whole on every process"


@dataclass(frozen=True)
class Direction:
    """Holds what is subtracted from a weight, times the learning rate: a sum of terms, each kept in its factors.

    A term is ``factor`` · diag(``row``) · ``left`` @ ``right`` · diag(``column``). ``left`` is m × n, or m × r where
    ``right``, r × n, is there. ``row`` (m) and ``column`` (n) are fp32, and each may be absent. So an update of rank r
    never exists as a full matrix. ``rest`` is the next term; ``a + b`` makes one direction of two. ``scaled``: the
    learning rate is in it already.
    """

    left: Tensor
    right: Tensor | None = None
    factor: float = 1.0
    row: Tensor | None = None
    column: Tensor | None = None
    scaled: bool = False
    rest: "Direction | None" = None

    def __add__(self, other: "Direction") -> "Direction":
        """Return the sum. ValueError where one has the learning rate in it and the other has not."""
        if self.scaled != other.scaled:
            raise ValueError("one direction has the learning rate in it and the other has not: they cannot be added")
        return replace(self, rest=other if self.rest is None else self.rest + other)

    def terms(self) -> Iterator["Direction"]:
        """Yield each term by itself."""
        term: Direction | None = self
        while term is not None:
            yield term if term.rest is None else replace(term, rest=None)
            term = term.rest

    def part(self, start: int, stop: int) -> "Direction":
        """Return its rows ``start:stop``, still in factors."""
        row = None if self.row is None else self.row[start:stop]
        rest = None if self.rest is None else self.rest.part(start, stop)
        return replace(self, left=self.left[start:stop], row=row, rest=rest)

    def of(self, shard: Shard) -> "Direction":
        """Return the part of it that meets ``shard``, still in factors."""
        if shard.dim == 0:
            return self.part(shard.start, shard.stop)
        columns = slice(shard.start, shard.stop)
        left, right = self.left, self.right
        if right is None:
            left = left[:, columns]
        else:
            right = right[:, columns]
        column = None if self.column is None else self.column[columns]
        rest = None if self.rest is None else self.rest.of(shard)
        return replace(self, left=left, right=right, column=column, rest=rest)

    def whole(self) -> Tensor:
        """Return the term multiplied out, without ``factor``; in its own dtype, or fp32 where rows are scaled."""
        value = self.left if self.right is None else self.left @ self.right
        if self.row is not None:
            value = value.float() * self.row[:, None]
        if self.column is not None:
            value = value.float() * self.column
        return value

    def merged(self) -> "Direction":
        """Return the same as one term."""
        if self.rest is None:
            return self
        total = sum(term.whole().float() * term.factor for term in self.terms())
        return Direction(torch.as_tensor(total), scaled=self.scaled)

    def add_to(self, target: Tensor, alpha: float) -> None:
        """Add ``alpha`` · the term, ``factor`` not counted, to ``target`` in place and in the target's dtype."""
        if self.right is None or self.row is not None or self.column is not None:
            target.add_(self.whole(), alpha=alpha)
        else:
            target.addmm_(self.left, self.right, alpha=alpha)


@dataclass(frozen=True)
class BasisChange:
    """The gradients to come are in another subspace than those seen, and must not be mixed with them.

    Where moments are to be expressed in the new coordinates (``project``), x becomes ``left`` @ x @ ``right``, each
    r × r or absent.
    """

    project: bool = False
    left: Tensor | None = None
    right: Tensor | None = None

    def mean(self, x: Tensor) -> Tensor:
        """Return a first moment in the new coordinates."""
        x = x if self.left is None else self.left @ x
        return x if self.right is None else x @ self.right

    def variance(self, x: Tensor) -> Tensor:
        """Return a second moment about the mean in the new coordinates, the old ones taken as uncorrelated."""
        x = x if self.left is None else self.left.square() @ x
        return x if self.right is None else x @ self.right.square()


class NewBases(NamedTuple):
    """The bases that a gradient has, in fp32; ``found``, a scalar: whether they are better than those in use."""

    left: Tensor | None
    right: Tensor | None
    found: Tensor


class UpdateRule(ABC):
    """Answers what the optimizer asks of a rule. A plain rule writes `init` and `update`; all else has a default.

    A rule that updates any part of a tensor by itself promises so by `scope`, and saves the gathering where several
    processes share the tensor. The promise is checked when an optimizer is built.
    """

    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType({})
    """How state tensors lie that are not shaped as the parameter, by name."""

    @property
    def decay(self) -> Decay:
        """How weight decay is applied: ``before`` or ``after`` the update (decoupled), or ``l2``, to the gradient."""
        return "before"

    @property
    def scope(self) -> Scope:
        """How much of a tensor the rule has to see at once."""
        return Scope.WHOLE

    @property
    def projects(self) -> bool:
        """Whether `compress` keeps less than the gradient, so that sums of micro-batches are kept compressed."""
        return False

    @abstractmethod
    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return the state tensors of a parameter shaped, typed and placed as ``like``; shapes never change.

        ``shard`` is the part of a tensor that ``like`` is; None means that it is all of it.
        """

    @abstractmethod
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance ``state`` by one update and return the direction. ``grad`` is what `compress` returned.

        State is written through ``step.store`` (or a moment store), which keeps it only if the gradient was finite.
        Where the rule `projects`, ``grad`` may be overwritten; else it is left alone.
        """

    def update_weight(self, weight: Tensor, grad: Tensor, state: State, step: Step, decay: float) -> bool:
        """Make the whole update of ``weight`` in one pass over memory, decay included; False where it cannot."""
        return False

    def needs_chunks(self, step: Step, dtype: torch.dtype) -> bool:
        """Whether a large tensor is updated a chunk at a time, so that temporaries stay small (`Scope.ELEMENTS`)."""
        return True

    def start(self, state: State, step: Step) -> None:  # noqa: B027  (a rule may do nothing)
        """Prepare ``state``, before the first gradient of an update is looked at."""

    def compress(self, grad: Tensor, state: State, step: Step) -> Tensor:
        """Return what is kept of a gradient until the update: a linear function of it, so that sums can be kept."""
        return grad

    def compressed_step(self, state: State, step: Step) -> Step:
        """Return the step that counts elements from where the compressed gradient begins in the whole tensor's."""
        return step.placed()

    def full_update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Make an update from a whole gradient, as the optimizer does: start, refresh if that is due, compress, update.

        So a rule can run another inside itself.
        """
        self.start(state, step)
        if self.next_refresh(step) == step.count:
            self.set_bases(self.find_bases(grad, state), state, step)
        return self.update(self.compress(grad, state, step), state, step)

    def next_refresh(self, step: Step) -> int | None:
        """Return the number of the first update, from this one on, that begins with new bases; None where none does."""
        return None

    def bases(self, state: State) -> tuple[Tensor | None, Tensor | None]:
        """Return the (left, right) bases in use, whole; either may not be."""
        return None, None

    def find_bases(self, grad: Tensor, state: State) -> NewBases:
        """Return new bases from a whole gradient. A rule whose `next_refresh` names an update must have this."""
        raise TypeError(f"{type(self).__name__} names a refresh (next_refresh) and has no find_bases")

    def empty_bases(self, state: State) -> NewBases:
        """Return what `find_bases` returns, for another process's bases to be written into."""
        raise TypeError(f"{type(self).__name__} names a refresh (next_refresh) and has no empty_bases")

    def set_bases(self, new: NewBases, state: State, step: Step) -> None:
        """Take new bases into use. A rule whose `next_refresh` names an update must have this."""
        raise TypeError(f"{type(self).__name__} names a refresh (next_refresh) and has no set_bases")

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """Express ``state`` in new coordinates, where this rule runs in a subspace that has just been replaced."""
        if change.project:
            raise ValueError(
                f"{type(self).__name__} does not say how its state looks in a new basis; use moments keep or reset"
            )

    def stores(self) -> Mapping[str, MomentStore]:
        """Return the moment stores in use, by the name of the moment that each keeps."""
        return {}

    def narrow(self, state: State, start: int, stop: int) -> State:
        """Return views of ``state`` for the elements ``start:stop`` of the flattened parameter (`Scope.ELEMENTS`)."""
        part: State = {}
        for name, store in self.stores().items():
            part |= store.narrow(state, name, start, stop)
        for name in state.keys() - part.keys():
            part[name] = state[name].view(-1)[start:stop]
        return part

    def layout(self, name: str, state: State, shard: Shard) -> Shard | None:
        """Return where a state tensor lies of which this process holds the part ``shard`` of the parameter.

        None: every process has all of it. ValueError for a tensor that is not shaped as the parameter and of which
        `layouts` says nothing.
        """
        declared = self.layouts.get(name)
        if declared is Layout.EVERYWHERE:
            return None
        if declared in (Layout.OF_ROWS, Layout.OF_COLUMNS):
            dim = (Layout.OF_ROWS, Layout.OF_COLUMNS).index(declared)
            return replace(shard, dim=0, shape=(shard.shape[dim],)) if dim == shard.dim else None
        shape = tuple(state[name].shape)
        if declared is Layout.LIKE_PARAMETER or shape in (shard.part_shape, shard.shape):
            return shard
        raise ValueError(
            f"the state tensor {name} of {type(self).__name__} is {shape}, and the parameter is {shard.shape}: say in "
            f"layouts how it is shared out ({', '.join(layout.name for layout in Layout)})"
        )

    def has_slots(self, name: str) -> bool:
        """Whether a moment has slots of padded length, each for a tensor of the parameter's shape."""
        return False

    def moment_values(self, state: State, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the values of a moment of that ``shape`` which a store keeps in a form of its own, fp32."""
        return self.stores()[name].read(state, name, Step(count=0)).view(shape)

    def set_moment_values(self, state: State, name: str, values: Tensor) -> None:
        """Keep what `moment_values` returned."""
        self.stores()[name].write(state, name, values.contiguous(), Step(count=0))


def describe(part: object) -> str:
    """Say how a rule is composed: ``GaLore(Adam(Dense))``."""
    parts = [describe(inner) for inner in vars(part).values() if is_dataclass(inner)]
    return type(part).__name__ + (f"({', '.join(parts)})" if parts else "")


def update_in_chunks(rule: UpdateRule, grad: Tensor, state: State, step: Step) -> Direction:
    """Update as ``rule.update`` does, but overwrite ``grad`` (contiguous), so that temporaries are a few chunks."""
    size = chunk_elements(grad.device)
    if rule.scope is not Scope.ELEMENTS or grad.numel() <= size:
        return rule.update(grad, state, step).merged()
    flat = grad.view(-1)
    for start, stop in chunks(flat, flat.numel(), size):
        piece = rule.update(flat[start:stop], rule.narrow(state, start, stop), step.at(start)).merged()
        flat[start:stop].copy_(piece.left)
    return replace(piece, left=grad)


_kept: dict[UpdateRule, bool] = {}


def check_scope(rule: UpdateRule) -> None:
    """Check that a rule keeps the promise of its `scope`; ValueError where it does not.

    A matrix of 6 × 8 is updated three times whole and three times in two parts, by equal gradients. Where the rule
    promises that parts do not see each other, both come to the same.
    """
    if rule.scope in (Scope.WHOLE, Scope.PARTS) or rule in _kept:
        return
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, 8, generator=generator) for _ in range(3)]
    whole = _directions(rule, grads)
    try:
        parts = _directions_of_parts(rule, grads)
    except Exception as error:  # whatever a rule raises that is not made for parts
        raise ValueError(f"{_promise(rule)} cannot be updated in two parts ({error}): leave scope at WHOLE") from error
    for one, other in zip(whole, parts, strict=True):
        if not torch.allclose(one, other, rtol=1e-5, atol=1e-7):
            raise ValueError(
                f"{_promise(rule)} updated in two parts comes to something else than the whole: leave scope at WHOLE"
            )
    _kept[rule] = True


def _promise(rule: UpdateRule) -> str:
    return f"{type(rule).__name__} says scope {rule.scope.name}, but a 6 × 8 matrix"


def _directions_of_parts(rule: UpdateRule, grads: list[Tensor]) -> list[Tensor]:
    """Return the directions of the same updates made in two parts, put together."""
    if rule.scope is Scope.ELEMENTS:
        return _directions_in_pieces(rule, grads)
    dim = 0 if rule.scope is Scope.ROWS else 1
    halves = [grad.chunk(2, dim) for grad in grads]
    both = [_directions(rule, [half[i].contiguous() for half in halves]) for i in range(2)]
    return [torch.cat(pair, dim) for pair in zip(*both, strict=True)]


def _step(count: int) -> Step:
    return Step(count, lr=0.1, seed=1)


def _directions(rule: UpdateRule, grads: list[Tensor]) -> list[Tensor]:
    """Return the directions of updates by ``grads``, multiplied out."""
    state, found = rule.init(grads[0]), []
    for count, grad in enumerate(grads, 1):
        direction = rule.full_update(grad.clone(), state, _step(count)).merged()
        found.append(direction.whole().float() * direction.factor)
    return found


def _directions_in_pieces(rule: UpdateRule, grads: list[Tensor]) -> list[Tensor]:
    """Return the same, each update made in two pieces of the flattened tensor and of one state."""
    state, found = rule.init(grads[0]), []
    for count, grad in enumerate(grads, 1):
        rule.start(state, _step(count))
        flat, pieces_of = grad.clone().view(-1), []
        for start, stop in ((0, 24), (24, 48)):
            piece = rule.update(flat[start:stop], rule.narrow(state, start, stop), _step(count).at(start)).merged()
            pieces_of.append(piece.whole().float() * piece.factor)
        found.append(torch.cat(pieces_of).view(grad.shape))
    return found
