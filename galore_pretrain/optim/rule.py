"""This file says what an update rule is: a gradient and a few state tensors go in, a direction comes out.

A rule is a frozen dataclass of hyper-parameters. Its tensors live in the optimizer's state, and the learning rate and
weight decay are the optimizer's. A rule works on any shape, so the same object serves a weight matrix and its low-rank
projection. The optimizer never asks which class a rule is: it calls the methods of `UpdateRule`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

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
        """Return whether a process can update ``shard`` of a tensor without the other parts being gathered."""
        if self is Scope.ROWS:
            return shard.dim == 0
        if self is Scope.COLUMNS:
            return shard.dim == 1
        return self is not Scope.WHOLE


class Layout(Enum):
    """Says how a state tensor lies where processes share its parameter out."""

    LIKE_PARAMETER = "like the parameter"
    OF_ROWS = "a number for each row"
    OF_COLUMNS = "a number for each column"
    EVERYWHERE = "whole on every process"


@dataclass(frozen=True)
class Direction:
    """Holds what is subtracted from a weight, times the learning rate: a sum of terms, each kept in its factors.

    A term is ``factor`` · diag(``row``) · ``left`` @ ``right`` · diag(``column``). ``left`` is m × r and ``right`` is
    r × n; without ``right``, ``left`` is m × n. ``row`` (m) and ``column`` (n) are fp32, and each may be absent. So an
    update of rank r never exists as a full matrix. ``rest`` is the next term; ``a + b`` makes one direction of two.
    ``scaled`` says that the learning rate is multiplied in already.
    """

    left: Tensor
    right: Tensor | None = None
    factor: float = 1.0
    row: Tensor | None = None
    column: Tensor | None = None
    scaled: bool = False
    rest: "Direction | None" = None

    def __add__(self, other: "Direction") -> "Direction":
        """Return the sum of two directions. ValueError if one has the learning rate in it and the other has not."""
        if self.scaled != other.scaled:
            raise ValueError("one direction has the learning rate in it and the other has not: they cannot be added")
        if self.rest is None:
            return replace(self, rest=other)
        return replace(self, rest=self.rest + other)

    def terms(self) -> Iterator["Direction"]:
        """Yield each term as a direction of its own."""
        term: Direction | None = self
        while term is not None:
            if term.rest is None:
                yield term
            else:
                yield replace(term, rest=None)
            term = term.rest

    def part(self, start: int, stop: int) -> "Direction":
        """Return the rows ``start:stop`` of the direction, still in factors."""
        row = self.row
        if row is not None:
            row = row[start:stop]
        rest = self.rest
        if rest is not None:
            rest = rest.part(start, stop)
        left = self.left[start:stop]
        return replace(self, left=left, row=row, rest=rest)

    def of(self, shard: Shard) -> "Direction":
        """Return the part of the direction that belongs to ``shard``, still in factors."""
        if shard.dim == 0:
            return self.part(shard.start, shard.stop)
        columns = slice(shard.start, shard.stop)
        left = self.left
        right = self.right
        if right is None:
            left = left[:, columns]
        else:
            right = right[:, columns]
        column = self.column
        if column is not None:
            column = column[columns]
        rest = self.rest
        if rest is not None:
            rest = rest.of(shard)
        return replace(self, left=left, right=right, column=column, rest=rest)

    def whole(self) -> Tensor:
        """Return this one term multiplied out (m × n), ``factor`` and ``rest`` not counted.

        It has the dtype of ``left``, or fp32 where ``row`` or ``column`` scales it.
        """
        value = self.left
        if self.right is not None:
            value = value @ self.right
        if self.row is not None:
            value = value.float() * self.row[:, None]
        if self.column is not None:
            value = value.float() * self.column
        return value

    def merged(self) -> "Direction":
        """Return the same direction as one term; a sum of several is multiplied out in fp32."""
        if self.rest is None:
            return self
        total = sum(term.whole().float() * term.factor for term in self.terms())
        return Direction(torch.as_tensor(total), scaled=self.scaled)

    def add_to(self, target: Tensor, alpha: float) -> None:
        """Add ``alpha`` · this one term, ``factor`` not counted, to ``target`` (m × n), in place and in its dtype."""
        has_scales = self.row is not None or self.column is not None
        if self.right is None or has_scales:
            target.add_(self.whole(), alpha=alpha)
        else:
            target.addmm_(self.left, self.right, alpha=alpha)


@dataclass(frozen=True)
class BasisChange:
    """Tells a rule that the gradients to come lie in another subspace than those seen, and must not be mixed with them.

    Where moments are to be expressed in the new coordinates (``project``), x becomes ``left`` @ x @ ``right``. Each of
    the two is r × r, or absent.
    """

    project: bool = False
    left: Tensor | None = None
    right: Tensor | None = None

    def mean(self, x: Tensor) -> Tensor:
        """Return the first moment ``x`` in the new coordinates."""
        if self.left is not None:
            x = self.left @ x
        if self.right is not None:
            x = x @ self.right
        return x

    def variance(self, x: Tensor) -> Tensor:
        """Return the variance ``x`` in the new coordinates; the old coordinates are taken as uncorrelated."""
        # The variance of a sum of uncorrelated values, each times a_i, is the sum of a_i² times the value's variance.
        if self.left is not None:
            x = self.left.square() @ x
        if self.right is not None:
            x = x @ self.right.square()
        return x


class NewBases(NamedTuple):
    """Holds the bases that were found in a gradient, fp32: ``left`` is m × r, ``right`` is r × n, either may be absent.

    ``found``, a scalar, says whether they are better than those in use. ``overlap``, an fp32 scalar, is that of both
    subspaces, for a rule to which it matters: processes would not all measure the same to the last bit.
    """

    left: Tensor | None
    right: Tensor | None
    found: Tensor
    overlap: Tensor | None = None


class UpdateRule(ABC):
    """Answers what the optimizer asks of a rule. A plain rule writes `init` and `update`; all else has a default.

    A rule that can update any part of a tensor by itself says so by `scope`. Where several processes share a tensor,
    that saves the gathering of it. What a rule says is checked when an optimizer is built (`check_scope`).
    """

    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType({})
    """Names the state tensors that are not shaped as the parameter, and says of each how it lies."""

    @property
    def decay(self) -> Decay:
        """Say how weight decay is applied: ``before`` or ``after`` the update, or to the gradient (``l2``)."""
        return "before"

    @property
    def scope(self) -> Scope:
        """Say how much of a tensor the rule has to see at once."""
        return Scope.WHOLE

    @property
    def projects(self) -> bool:
        """Say whether `compress` keeps less than the gradient, so that sums of micro-batches are kept compressed."""
        return False

    @abstractmethod
    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return the state tensors of a parameter that has the shape, dtype and device of ``like``.

        Their shapes never change. ``shard`` says which part of a tensor ``like`` is; None means all of it.
        """

    @abstractmethod
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance ``state`` by one update and return the direction. ``grad`` is what `compress` returned.

        State must be written through ``step.store`` or a moment store: they keep a value only if the gradient was
        finite. ``step`` counts elements from where the part at hand begins, so that each part is rounded with the
        random bits of its place. Where the rule `projects`, ``grad`` may be overwritten; else it is left alone.
        """

    def update_weight(
        self,
        weight: Tensor,
        grad: Tensor,
        state: State,
        step: Step,
        decay: float,
    ) -> bool:
        """Make the whole update of ``weight`` in one pass over memory, decay included. Return False if it cannot."""
        return False

    def needs_chunks(self, step: Step, dtype: torch.dtype) -> bool:
        """Return whether a large tensor is updated chunk by chunk to keep temporaries small (`Scope.ELEMENTS`)."""
        return True

    def start(self, state: State, step: Step) -> None:  # noqa: B027  (a rule may do nothing)
        """Prepare ``state`` before the first gradient of an update is looked at."""

    def compress(self, grad: Tensor, state: State, step: Step) -> Tensor:
        """Return what is kept of a gradient until the update: a linear function of it, so that sums can be kept."""
        return grad

    def compressed_step(self, state: State, step: Step) -> Step:
        """Return the step of the compressed gradient; its ``start`` is that of this process's part of it."""
        return step.placed()

    def full_update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Make an update from a whole gradient as the optimizer does, and return its direction.

        A rule that runs another one inside itself can call this.
        """
        self.start(state, step)
        schedule = self.schedule(state)
        if self.finds_bases(step, None if schedule is None else schedule.tolist()):
            self.set_bases(self.find_bases(grad, state, step), state, step)
        compressed = self.compress(grad, state, step)
        return self.update(compressed, state, step.placed())

    def next_refresh(self, step: Step) -> int | None:
        """Return the number of the first update, from this one on, that begins with new bases; None if none does."""
        return None

    def schedule(self, state: State) -> Tensor | None:
        """Return the tensor of the state that decides, beside the count, which updates find bases; None if none does.

        It is of some numbers, and all processes have it.
        """
        return None

    def finds_bases(self, step: Step, schedule: Sequence[float] | None = None) -> bool:
        """Say whether an update finds bases. ``schedule`` has the numbers of `schedule`; None if they are not known.

        Then the answer is true for any update that might.
        """
        return self.next_refresh(step) == step.count

    def probes(self, step: Step) -> bool:
        """Say whether the bases that an update finds are only compared with those in use, and not taken."""
        return False

    @property
    def draws_bases(self) -> bool:
        """Say whether new bases are drawn, whatever the gradient: none of its noise is in them."""
        return False

    def bases(self, state: State) -> tuple[Tensor | None, Tensor | None]:
        """Return the bases in use: left (m × r) and right (r × n) of the whole matrix; either may be None."""
        return None, None

    def held_bases(self, state: State) -> list[Tensor]:
        """Return the tensors of the state that hold the bases."""
        return [basis for basis in self.bases(state) if basis is not None]

    def find_bases(self, grad: Tensor, state: State, step: Step) -> NewBases:
        """Find the new bases of an update in its whole gradient. A rule whose `next_refresh` names one must have this.

        It changes nothing: it is called with halves of a gradient too, to measure its noise. Where processes share the
        tensor out, one of them finds the bases for all: ``step`` is then still of its part.
        """
        raise TypeError(f"{type(self).__name__} names a refresh (next_refresh) and has no find_bases")

    def empty_bases(self, state: State) -> NewBases:
        """Return bases of the shapes that `find_bases` returns, for another process's bases to be written into."""
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
        """Return the moment stores in use, each by the name of its moment."""
        return {}

    def narrow(self, state: State, start: int, stop: int) -> State:
        """Return views of ``state`` for the elements ``start:stop`` of the flattened parameter (`Scope.ELEMENTS`)."""
        part: State = {}
        for name, store in self.stores().items():
            part |= store.narrow(state, name, start, stop)
        for name in state.keys() - part.keys():
            flat = state[name].view(-1)
            part[name] = flat[start:stop]
        return part

    def layout(self, name: str, state: State, shard: Shard) -> Shard | None:
        """Return where a state tensor lies when this process holds the part ``shard`` of its parameter.

        None means that every process has all of it. ValueError if the tensor is not shaped as the parameter and
        `layouts` does not name it. That its shape is no accident is checked when an optimizer is built.
        """
        declared = self.layouts.get(name)
        if declared is Layout.EVERYWHERE:
            return None
        if declared is Layout.OF_ROWS:
            return _layout_of_vector(shard, 0)
        if declared is Layout.OF_COLUMNS:
            return _layout_of_vector(shard, 1)
        shape = tuple(state[name].shape)
        has_shape_of_parameter = shape in (shard.part_shape, shard.shape)
        if declared is Layout.LIKE_PARAMETER or has_shape_of_parameter:
            return shard
        raise ValueError(
            f"the state tensor {name} of {type(self).__name__} is {shape}, and the parameter is {shard.shape}: say in "
            f"layouts how it is shared out ({', '.join(layout.name for layout in Layout)})"
        )

    def has_slots(self, name: str) -> bool:
        """Return whether a moment has slots of padded length, each for a tensor of the parameter's shape."""
        return False

    def moment_values(self, state: State, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return, in fp32, the values of a moment of that ``shape`` which its store keeps in another form."""
        store = self.stores()[name]
        values = store.read(state, name, Step(count=0))
        return values.view(shape)

    def set_moment_values(self, state: State, name: str, values: Tensor) -> None:
        """Write ``values``, of the form that `moment_values` returns, into a moment."""
        store = self.stores()[name]
        store.restore(state, name, values.contiguous().view(state[name].shape))


class OuterRule(UpdateRule):
    """Runs another rule, ``inner``, inside itself: what concerns moments and weight decay is asked of that one."""

    inner: UpdateRule

    @property
    def decay(self) -> Decay:
        """Weight decay is the inner rule's."""
        return self.inner.decay

    def stores(self) -> Mapping[str, MomentStore]:
        """Return the moment stores of the inner rule."""
        return self.inner.stores()

    def has_slots(self, name: str) -> bool:
        """Return whether a moment of the inner rule has slots of padded length."""
        return self.inner.has_slots(name)

    def moment_values(self, state: State, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the values of a moment of the inner rule."""
        return self.inner.moment_values(state, name, shape)

    def set_moment_values(self, state: State, name: str, values: Tensor) -> None:
        """Keep what `moment_values` returned."""
        self.inner.set_moment_values(state, name, values)


def check_count(name: str, number: int) -> None:
    """Raise ValueError for a number of a rule that is not whole or is below 1."""
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} {number!r} must be a whole number of at least 1")


def check_low_rank_scope(inner: UpdateRule, low_shard: Shard | None) -> None:
    """Raise ValueError for an inner rule that cannot update a part of the low-rank gradient by itself."""
    if low_shard is not None and not inner.scope.allows(low_shard):
        raise ValueError(
            f"{type(inner).__name__} needs the whole low-rank gradient (scope {inner.scope.name}), of "
            "which each process has a part here: use --shard none, or one process"
        )


def _layout_of_vector(shard: Shard, dim: int) -> Shard | None:
    """Return where a vector lies that has a number for each row (``dim`` 0) or column (1); None: whole everywhere."""
    if dim != shard.dim:
        return None
    shape = (shard.shape[dim],)
    return replace(shard, dim=0, shape=shape)


def describe(part: object) -> str:
    """Return how a rule is composed, as text: ``GaLore(Adam(Dense))``."""
    name = getattr(part, "label", type(part).__name__)
    inner_parts = [describe(inner) for inner in vars(part).values() if is_dataclass(inner)]
    if not inner_parts:
        return name
    return f"{name}({', '.join(inner_parts)})"


def option_names(part: Any) -> list[str]:
    """Return the names of what can be set of a rule: its fields, and those of the rules and stores inside of it.

    A part whose options are no fields returns them by a method of this name.
    """
    if hasattr(part, "option_names"):
        own: list[str] = part.option_names()
        return own
    names: list[str] = []
    for field in fields(part):
        names.append(field.name)
        value = getattr(part, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            names += option_names(value)
    return list(dict.fromkeys(names))


# An elementwise rule can take the flattened gradient (m · n) a chunk at a time. Each chunk's direction is written where
# its gradient was, which is not needed any more. The directions differ in ``left`` alone: factors depend on the step.
def update_in_chunks(rule: UpdateRule, grad: Tensor, state: State, step: Step) -> Direction:
    """Update as ``rule.update`` does, but overwrite ``grad`` (contiguous), so that temporaries are a few chunks."""
    size = chunk_elements(grad.device)
    has_kernel = step.kernels and not rule.needs_chunks(step, grad.dtype)
    if rule.scope is not Scope.ELEMENTS or grad.numel() <= size or has_kernel:
        return rule.update(grad, state, step).merged()
    flat = grad.view(-1)
    total = flat.numel()
    for start, stop in chunks(flat, total, size):
        chunk = flat[start:stop]
        chunk_state = rule.narrow(state, start, stop)
        direction = rule.update(chunk, chunk_state, step.at(start))
        direction = direction.merged()
        chunk.copy_(direction.left)
    return replace(direction, left=grad)


# A check takes six small updates, and rules are values: once for each is enough.
_rules_that_passed: set[UpdateRule] = set()


# A 6 × 8 matrix is updated three times whole, and three times in two parts by the same gradients. Three, so that what
# one update leaves in the state counts in the next. If parts do not see each other, both come to the same.
def check_scope(rule: UpdateRule) -> None:
    """Check by trial that a rule can be updated in the parts that its `scope` allows; ValueError if it cannot."""
    if rule.scope in (Scope.WHOLE, Scope.PARTS):  # such a rule is never updated in parts that know nothing of others
        return
    if rule in _rules_that_passed:
        return
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, 8, generator=generator) for _ in range(3)]
    of_whole = _directions(rule, grads)
    try:
        of_parts = _directions_of_parts(rule, grads)
    except Exception as error:  # whatever a rule raises that is not made for parts
        raise ValueError(f"{_promise(rule)} cannot be updated in two parts ({error}): leave scope at WHOLE") from error
    for expected, direction in zip(of_whole, of_parts, strict=True):
        is_same = torch.allclose(expected, direction, rtol=1e-5, atol=1e-7)
        if not is_same:
            raise ValueError(
                f"{_promise(rule)} updated in two parts comes to something else than the whole: leave scope at WHOLE"
            )
    _rules_that_passed.add(rule)


def _promise(rule: UpdateRule) -> str:
    """Return how a message of `check_scope` begins."""
    return f"{type(rule).__name__} says scope {rule.scope.name}, but a 6 × 8 matrix"


def _trial_step(count: int) -> Step:
    """Return the step of update number ``count`` of a trial."""
    return Step(count, lr=0.1, seed=1)


def _directions(rule: UpdateRule, grads: list[Tensor]) -> list[Tensor]:
    """Update once by each of ``grads`` (m × n) and return the directions, multiplied out in fp32."""
    state = rule.init(grads[0])
    directions: list[Tensor] = []
    for count, grad in enumerate(grads, 1):
        step = _trial_step(count)
        direction = rule.full_update(grad.clone(), state, step)
        direction = direction.merged()
        directions.append(direction.whole().float() * direction.factor)
    return directions


def _directions_of_parts(rule: UpdateRule, grads: list[Tensor]) -> list[Tensor]:
    """Return the directions of the same updates made in two parts, the parts of each put together."""
    if rule.scope is Scope.ELEMENTS:
        return _directions_in_pieces(rule, grads)
    dim = 0
    if rule.scope is Scope.COLUMNS:
        dim = 1
    first_halves: list[Tensor] = []
    second_halves: list[Tensor] = []
    for grad in grads:
        first, second = grad.chunk(2, dim)
        first_halves.append(first.contiguous())
        second_halves.append(second.contiguous())
    first_directions = _directions(rule, first_halves)
    second_directions = _directions(rule, second_halves)
    pairs = zip(first_directions, second_directions, strict=True)
    return [torch.cat(pair, dim) for pair in pairs]


def _directions_in_pieces(rule: UpdateRule, grads: list[Tensor]) -> list[Tensor]:
    """Return the directions of the same updates, each made in two pieces of the flattened tensor and of one state."""
    state = rule.init(grads[0])
    directions: list[Tensor] = []
    for count, grad in enumerate(grads, 1):
        step = _trial_step(count)
        rule.start(state, step)
        flat = grad.clone().view(-1)
        pieces: list[Tensor] = []
        for start, stop in ((0, 24), (24, 48)):
            piece_state = rule.narrow(state, start, stop)
            direction = rule.update(flat[start:stop], piece_state, step.at(start))
            direction = direction.merged()
            pieces.append(direction.whole().float() * direction.factor)
        directions.append(torch.cat(pieces).view(grad.shape))
    return directions
