"""Sums on the host: those on the device bit for bit, and each use of a buffer behind its wait."""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from galore_pretrain.optim import RuleOptimizer
from galore_pretrain.optim.execution import Execution, GlobalStep, Layerwise, Outcome
from galore_pretrain.optim.host_sums import HostSums
from galore_pretrain.optim.methods import METHODS, ROWS
from galore_pretrain.tensors.transport import AtOnce, Transport
from test_layerwise import optimizer_for, parameters

CPU = torch.device("cpu")
MODES = [GlobalStep, Layerwise]
CLIPS = ["off", "full", "projected"]


def made(mode: Any, optimizer: RuleOptimizer, clip: str = "off", transport: Transport | None = None) -> Any:
    """An execution whose sums lie on the host, if there is a transport."""
    host_sums = None
    if transport is not None:
        host_sums = HostSums(transport)
    return mode(optimizer, 0.0 if clip == "off" else 30.0, projected=clip == "projected", host_sums=host_sums)


def known(row: str, mode: Any, clip: str) -> bool:
    """Whether the norm is one that this execution knows, of several micro-batches."""
    if clip == "projected":
        return METHODS[row].projects
    return not (clip == "full" and mode is Layerwise and METHODS[row].projects)


def micro_batch(params: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def backward(params: list[Tensor], grads: list[Tensor], order: list[int]) -> None:
    """Give each parameter its gradient, in this order."""
    for index in order:
        torch.autograd.backward([params[index]], [grads[index]])


def update(
    execution: Execution, params: list[Tensor], number: int, orders: list[list[int]], bad: int | None = None
) -> Outcome:
    """One update of as many micro-batches as there are orders; of the second, gradient number ``bad`` is NaN."""
    for i, order in enumerate(orders):
        grads = micro_batch(params, 100 * number + i)
        if bad is not None and i == 1:
            grads[bad].view(-1)[3] = torch.nan
        execution.begin(i, len(orders))
        backward(params, grads, order)
        assert all(p.grad is None for p in params)
    execution.complete()
    return execution.outcome()


ALL = [4, 3, 2, 1, 0]


def state_of(optimizer: RuleOptimizer) -> list[Tensor]:
    tensors = [p.detach() for p in parameters(optimizer)]
    for p in parameters(optimizer):
        tensors += list(optimizer.tensors(p).values())
    return tensors


def are_equal(one: RuleOptimizer, other: RuleOptimizer) -> bool:
    pairs = zip(state_of(one), state_of(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def cases() -> Iterator[tuple[str, torch.dtype, Any, str]]:
    """Every row in both dtypes and executions, and clipped in each way that it knows."""
    for row in ROWS:
        for mode in MODES:
            yield row, torch.float32, mode, "off"
            for clip in CLIPS:
                if known(row, mode, clip):
                    yield row, torch.bfloat16, mode, clip


@pytest.mark.parametrize(("row", "dtype", "mode", "clip"), cases())
def test_sums_on_the_host_are_those_on_the_device_bitwise(row: str, dtype: torch.dtype, mode: Any, clip: str) -> None:
    """Four micro-batches an update; bases are renewed in some, and the noise of one is measured."""
    one, other = optimizer_for(row, dtype), optimizer_for(row, dtype)
    on_device, on_host = made(mode, one, clip), made(mode, other, clip, AtOnce(CPU))
    for number in range(5):
        bad = 1 if number == 3 else None
        told = update(on_device, parameters(one), number, [ALL] * 4, bad)
        assert update(on_host, parameters(other), number, [ALL] * 4, bad) == told
        assert told.skipped == (bad is not None)
    assert are_equal(one, other)


class Counted(AtOnce):
    """Counts the bytes that are copied, and those of memory."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.copies: list[int] = []
        self.host: list[int] = []
        self.device: list[int] = []

    def host_memory(self, size: int) -> Tensor:
        self.host.append(size)
        return super().host_memory(size)

    def device_memory(self, size: int) -> Tensor:
        self.device.append(size)
        return super().device_memory(size)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.copies.append(target.nbytes)
        super().copy(target, source)


def test_a_sum_is_copied_once_each_way_for_a_micro_batch() -> None:
    """Of four: written four times and fetched four times after backward, three and three inside of it."""
    for mode, times in ((GlobalStep, 8), (Layerwise, 6)):
        optimizer = optimizer_for("adamw", torch.float32)
        params = parameters(optimizer)
        transport = Counted()
        execution = made(mode, optimizer, "full" if mode is GlobalStep else "off", transport)
        update(execution, params, 0, [ALL] * 4)
        matrices = [p.nbytes for p in params if p.ndim == 2]
        assert sorted(transport.copies) == sorted(matrices * times)
        assert transport.device == [max(matrices)] * 2
        assert sum(matrices) <= transport.host[0] < sum(matrices) + 512 * len(matrices)
        update(execution, params, 1, [ALL] * 4)
        assert (len(transport.host), len(transport.device)) == (1, 2)  # the memory is taken once


def test_only_full_sums_of_matrices_lie_on_the_host() -> None:
    """Compressed ones are small, and a vector's is nothing beside them."""
    optimizer = optimizer_for("galore_adamw", torch.float32, update_proj_gap=40, refresh="staggered")
    params = parameters(optimizer)
    execution = made(Layerwise, optimizer, "off", AtOnce(CPU))
    lie_there = []
    for number in range(3):
        execution.begin(0, 2)
        backward(params, micro_batch(params, number), ALL)
        gradients = [optimizer.pending.gradients[p] for p in params]
        lie_there.append([i for i, pending in enumerate(gradients) if pending.host is not None])
        for pending in gradients:
            assert (pending.grad.device.type == "meta") == (pending.host is not None)
        execution.begin(1, 2)
        backward(params, micro_batch(params, 50 + number), ALL)
        execution.complete()
    assert lie_there == [[0, 2, 4], [4], [1, 4]]  # 0, 2 and 1 have a basis due, and 4 is not projected


@settings(deadline=None, max_examples=40)
@given(
    row=st.sampled_from(["adamw", "galore_adamw", "muon"]),
    mode=st.sampled_from(MODES),
    clip=st.sampled_from(CLIPS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    orders=st.lists(st.lists(st.integers(0, 4), unique=True), min_size=2, max_size=5),
)
def test_any_order_and_absent_gradients_change_nothing(
    row: str, mode: Any, clip: str, dtype: torch.dtype, orders: list[list[int]]
) -> None:
    """Each micro-batch has another order, and gradients of some parameters alone; every use is behind its wait."""
    if not known(row, mode, clip):
        clip = "off"
    one, other = optimizer_for(row, dtype), optimizer_for(row, dtype)
    recorder = Recorder()
    on_device, on_host = made(mode, one, clip), made(mode, other, clip, recorder)
    with recorder:
        for number in range(3):
            told = update(on_device, parameters(one), number, orders)
            assert update(on_host, parameters(other), number, orders) == told
    assert are_equal(one, other)
    assert not recorder.violations


@pytest.mark.parametrize("mode", MODES)
def test_an_update_that_is_dropped_leaves_nothing_on_the_host(mode: Any) -> None:
    one, other = optimizer_for("adamw", torch.bfloat16), optimizer_for("adamw", torch.bfloat16)
    disturbed, undisturbed = made(mode, one, "full", AtOnce(CPU)), made(mode, other, "full", AtOnce(CPU))
    for number in range(2):
        disturbed.begin(0, 3)
        backward(parameters(one), micro_batch(parameters(one), 7), ALL)
        disturbed.begin(1, 3)
        backward(parameters(one), micro_batch(parameters(one), 8), ALL[:2])
        disturbed.discard()
        assert not one.pending.gradients
        update(disturbed, parameters(one), number, [ALL] * 3)
        update(undisturbed, parameters(other), number, [ALL] * 3)
    assert are_equal(one, other)


def test_an_update_that_fails_leaves_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = optimizer_for("adamw", torch.float32), optimizer_for("adamw", torch.float32)
    execution = made(GlobalStep, one, "off", AtOnce(CPU))
    params = parameters(one)
    for i in range(2):
        execution.begin(i, 2)
        backward(params, micro_batch(params, 5), ALL)

    def fail(*arguments: Any) -> None:
        raise ValueError("no update")

    with monkeypatch.context() as patched:
        patched.setattr(one, "_update", fail)
        patched.setattr(one, "_update_elements", fail)
        with pytest.raises(ValueError, match="no update"):
            execution.complete()
    for p in params:  # whose rule had begun
        one.state[p]["step"] = 0
    update(execution, params, 1, [ALL] * 3)
    update(made(GlobalStep, other), parameters(other), 1, [ALL] * 3)
    assert are_equal(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_saved_between_two_updates_goes_on_either_way(mode: Any) -> None:
    one, other = optimizer_for("galore_adamw", torch.bfloat16), optimizer_for("galore_adamw", torch.bfloat16)
    first, second = made(mode, one, "projected", AtOnce(CPU)), made(mode, other, "projected")
    for number in range(2):
        update(first, parameters(one), number, [ALL] * 3)
        update(second, parameters(other), number, [ALL] * 3)
    again = optimizer_for("galore_adamw", torch.bfloat16)
    for p, q in zip(parameters(again), parameters(one), strict=True):
        p.data.copy_(q.data)
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    third = made(mode, again, "projected")
    for number in range(2, 4):
        update(second, parameters(other), number, [ALL] * 3)
        update(third, parameters(again), number, [ALL] * 3)
    assert are_equal(again, other)


def test_one_micro_batch_after_several_sums_nothing() -> None:
    one, other = optimizer_for("adamw", torch.float32), optimizer_for("adamw", torch.float32)
    transport = Counted()
    on_host, on_device = made(Layerwise, one, "full", transport), made(Layerwise, other, "full")
    for number, parts in enumerate((3, 1, 2)):
        before = len(transport.copies)
        assert update(on_host, parameters(one), number, [ALL] * parts) == update(
            on_device, parameters(other), number, [ALL] * parts
        )
        assert (len(transport.copies) > before) == (parts > 1)
    assert are_equal(one, other)


def test_a_piece_of_a_gradient_outlives_its_buffer() -> None:
    """A rule may compress by taking some rows, which are a view of the full gradient."""
    optimizer = optimizer_for("galore_adamw", torch.float32, refresh="together")
    for rule in optimizer.slots.rules[:1]:
        object.__setattr__(rule, "compress", lambda grad, state, step: grad[:8] if len(grad) < 80 else grad[:, :8])
    params = parameters(optimizer)
    execution = made(Layerwise, optimizer, "projected", AtOnce(CPU))
    for i in range(2):
        execution.begin(i, 2)
        backward(params, micro_batch(params, i), ALL)
    total = [a + b for a, b in zip(micro_batch(params, 0), micro_batch(params, 1), strict=True)]
    assert torch.equal(optimizer.pending.gradients[params[0]].grad, total[0][:8])
    assert torch.equal(optimizer.pending.gradients[params[1]].grad, total[1][:, :8])


def test_several_processes_are_refused() -> None:
    optimizer = optimizer_for("adamw", torch.float32)
    execution = made(GlobalStep, optimizer, "off", AtOnce(CPU))
    optimizer.pending.distributor = SimpleNamespace(replica=0)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="those of one process"):
        execution.begin(0, 2)


# -- the waits --------------------------------------------------------------------------------------------------------

COMPUTE, SIDE = 0, 1


@dataclass
class Access:
    """One use of a piece of memory, by which stream, and how far that one was."""

    stream: int
    time: int
    writes: bool
    first: int
    end: int


@dataclass
class Memory:
    """A piece of memory whose every use is recorded."""

    storage: torch.UntypedStorage
    uses: list[Access] = field(default_factory=list)


# Two streams run at the same time, and what one does is before what the other does only where the other has waited for
# it. So each stream has a clock of two hands: how far it is itself, and how far the other one was, for certain, when it
# last waited. An event holds the clock of its stream; to wait is to take the later of both hands. A use of memory is
# right if each earlier use of it by the other stream, where one of both writes, is before it by that clock.
#
# What the computing stream uses, no transport is told: it is seen at torch's operations themselves, but for copies of
# the side stream. These are made as late as they may be: when the computing stream waits for them. So a wait that is
# missing is found twice, by the clocks and by what is computed.
class Recorder(TorchDispatchMode):
    """Stands for a card with a side stream, and records where a use of memory is not behind its wait.

    ``left_out`` is the number of the wait that is not made.
    """

    def __init__(self, left_out: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.violations: list[str] = []
        self.waits: list[str] = []
        self._left_out = left_out
        self._clocks = [[0, 0], [0, 0]]
        self._memories: list[Memory] = []
        self._queue: deque[tuple[int, Callable[[], Any]]] = deque()
        self._is_copying = False

    def host_memory(self, size: int) -> Tensor:
        self._check_nothing_is_under_way()
        with torch.utils._python_dispatch._disable_current_modes():
            memory = torch.full((size,), 255, dtype=torch.uint8)
        self._memories.append(Memory(memory.untyped_storage()))
        return memory

    def device_memory(self, size: int) -> Tensor:
        memory = self.host_memory(size)
        # Whoever had this memory before may still compute with it.
        self._use(memory, COMPUTE, writes=True)
        return memory

    def _check_nothing_is_under_way(self) -> None:
        if self._queue:
            self.violations.append("memory is dropped that is copied from or to")

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._use(target, SIDE, writes=True)
        self._use(source, SIDE, writes=False)
        self._queue.append((self._clocks[SIDE][SIDE], lambda: target.copy_(source)))

    def used(self) -> list[int]:
        return list(self._clocks[COMPUTE])

    def moved(self) -> list[int]:
        return list(self._clocks[SIDE])

    def await_used(self, event: list[int]) -> None:
        if self._is_made("the side stream waits", event[COMPUTE] > self._clocks[SIDE][COMPUTE]):
            self._join(SIDE, event)

    def await_moved(self, event: list[int]) -> None:
        if self._is_made("computing waits", event[SIDE] > self._clocks[COMPUTE][SIDE]):
            self._join(COMPUTE, event)
            self._run_until(event[SIDE])

    def synchronize(self) -> None:
        if self._is_made("the host waits", bool(self._queue)):
            self._join(COMPUTE, self.moved())
            self._run_until(self._clocks[SIDE][SIDE])

    def _is_made(self, name: str, changes_something: bool) -> bool:
        """Number a wait, unless an earlier one of the same stream was for something later."""
        if not changes_something:
            return True
        number = len(self.waits)
        self.waits.append(name)
        return number != self._left_out

    def _join(self, stream: int, event: list[int]) -> None:
        self._clocks[stream] = [max(mine, its) for mine, its in zip(self._clocks[stream], event, strict=True)]

    def _run_until(self, time: int) -> None:
        self._is_copying = True
        with torch.no_grad():
            while self._queue and self._queue[0][0] <= time:
                self._queue.popleft()[1]()
        self._is_copying = False

    def _use(self, tensor: Tensor, stream: int, *, writes: bool) -> None:
        storage = tensor.untyped_storage()
        for memory in self._memories:
            if memory.storage._cdata == storage._cdata:
                self._clocks[stream][stream] += 1
                first = tensor.storage_offset() * tensor.itemsize
                access = Access(stream, self._clocks[stream][stream], writes, first, first + tensor.nbytes)
                self._check(memory, access)
                memory.uses.append(access)

    def _check(self, memory: Memory, access: Access) -> None:
        """Compare a use with those of the other stream that it has not waited for."""
        memory.uses = [use for use in memory.uses if use.time > self._clocks[1 - use.stream][use.stream]]
        for other in memory.uses:
            overlaps = other.first < access.end and access.first < other.end
            if other.stream != access.stream and overlaps and (other.writes or access.writes):
                self.violations.append(f"stream {access.stream} uses what stream {other.stream} is not done with")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_copying and not _is_view(func):
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                    self._use(tensor, COMPUTE, writes=True)
        return result


def _is_view(func: Any) -> bool:
    """Whether an operation looks at no values: what it returns shares its memory, and is not written to."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def two_sizes(execution: Execution, optimizer: RuleOptimizer) -> None:
    """Three updates: of two sums; one that is dropped; of more and larger sums, one of which is absent once."""
    params = parameters(optimizer)
    for p in params:
        p.requires_grad_(False)
    params[0].requires_grad_()
    update(execution, params, 0, [[0], [0], [0]])
    params[2].requires_grad_()
    update(execution, params, 1, [[0, 2], [0, 2], [2, 0]])
    execution.begin(0, 2)
    backward(params, micro_batch(params, 7), [0, 2])
    execution.discard()
    for p in params:
        p.requires_grad_()
    update(execution, params, 2, [ALL, [2, 4, 3, 1, 0], [4, 3, 1, 0]])


def recorded(mode: Any, left_out: int | None = None) -> tuple[Recorder, RuleOptimizer]:
    """What a recorder saw of these updates."""
    optimizer = optimizer_for("adamw", torch.bfloat16)
    recorder = Recorder(left_out)
    with recorder:
        two_sizes(made(mode, optimizer, "full" if mode is GlobalStep else "off", recorder), optimizer)
    return recorder, optimizer


@pytest.mark.parametrize("mode", MODES)
def test_every_use_of_a_buffer_is_behind_its_wait(mode: Any) -> None:
    recorder, optimizer = recorded(mode)
    assert not recorder.violations
    assert {"computing waits", "the side stream waits", "the host waits"} == set(recorder.waits)
    plain = optimizer_for("adamw", torch.bfloat16)
    two_sizes(made(mode, plain, "full" if mode is GlobalStep else "off"), plain)
    assert are_equal(plain, optimizer)


def missing() -> Iterator[Any]:
    for mode in MODES:
        for number, name in enumerate(recorded(mode)[0].waits):
            yield pytest.param(mode, number, id=f"{mode.__name__}-{number}-{name.replace(' ', '-')}")


@pytest.mark.parametrize(("mode", "number"), missing())
def test_a_missing_wait_is_found(mode: Any, number: int) -> None:
    recorder, _ = recorded(mode, left_out=number)
    assert recorder.violations
