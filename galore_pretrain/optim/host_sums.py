"""Sums of full gradients over micro-batches that lie in the host's memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_pretrain.tensors.transport import Transport

if TYPE_CHECKING:
    from galore_pretrain.optim.execution import PendingGradient

_BUFFERS = 2
_ALIGNMENT = 512  # bytes: of where a sum begins, as CUDA's allocator aligns


@dataclass(slots=True, eq=False)
class HostSum:
    """One sum: its bytes on the host (``place``), and the ``buffer`` of the device that holds it too, if one does.

    ``away`` stands for its gradient while that is not on the device: of the same shape and dtype, on the device meta,
    so that it has no values that somebody could take for the sum. ``position`` is its place among the sums that are
    expected, -1 where it is not.
    """

    place: Tensor
    away: Tensor
    buffer: "_Buffer | None" = None
    position: int = -1

    def in_buffer(self, buffer: "_Buffer") -> Tensor:
        """Return the tensor that the sum is in ``buffer``."""
        flat = buffer.memory[: self.away.nbytes].view(self.away.dtype)
        return flat.view(self.away.shape)


@dataclass(slots=True, eq=False)
class _Buffer:
    """A piece of the device's memory for one sum at a time.

    ``holds`` is the sum that is there, or about to come. ``in_use`` says that it is computed with. ``used`` is the
    event after which the side stream may touch it, ``moved`` that after which the computing stream may; None: at once.
    """

    memory: Tensor
    holds: HostSum | None = None
    in_use: bool = False
    used: Any = None
    moved: Any = None


# A sum is on the host. To be added to, it is copied into one of two buffers on the device, and back. Meanwhile the sum
# that is expected next comes into the other one. The order in which the first micro-batch's gradients came is expected
# of the others. Where another sum is asked for it is fetched then: right too, only slower.
#
# Two streams touch a buffer: the computing one adds, a side stream copies. Each change from one to the other is behind
# a wait for an event that the one has recorded when it was done. The host's memory needs none, since the side stream
# alone touches it, in the order of what it is given. Hence four waits, two in `_let_compute` and two in `_let_move`:
#
#     computing waits for the side stream    before it adds to a sum that was fetched,
#                                            before it writes a first gradient where a sum is being written back;
#     the side stream waits for computing    before it writes back a sum that was added to,
#                                            before it fetches a sum where one was used and not written back.
#
# A new buffer may be memory that the computing stream still reads. No wait is needed for that: before the first fetch
# of an update, the side stream has waited to write back a sum, which was added to later.
#
# The results are those of sums on the device bit for bit: they are added there, by the same operations.
class HostSums:
    """Keeps sums of gradients on the host, and brings them to the device, one at a time, where they are needed.

    ``transport`` moves them. At most one sum is used at a time: from `begin_sum` or `bring` on, until `put_back`,
    `keep`, `leave` or `forget`. `prepare` comes first of all.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._host: Tensor | None = None
        self._taken = 0  # bytes of it
        self._limit = 0  # bytes that the sums of this update may take
        self._buffers: list[_Buffer] = []  # the one that was in use longest ago first
        self._live: set[HostSum] = set()
        self._arrived: list[HostSum] = []  # in the order of their first gradients
        self._expected: Sequence[HostSum] = ()
        self._next = 0  # of those expected, the first that was not fetched
        self._passed = 0  # of those expected, the first that comes after all that were brought

    def prepare(self, sizes: Iterable[int]) -> None:
        """Have memory for the sums of an update, of so many bytes each. Memory only grows, so a first update waits.

        An update that was begun and not completed goes on in the memory that it has.
        """
        if self._live:
            return
        self._arrived.clear()
        self._expected = ()
        self._taken = 0
        needed = 0
        largest = 0
        for size in sizes:
            needed += _aligned(size)
            largest = max(largest, size)
        self._limit = needed
        host_is_small = self._host is None or needed > self._host.nbytes
        buffers_are_small = not self._buffers or largest > self._buffers[0].memory.nbytes
        if self._buffers and (host_is_small or buffers_are_small):
            self._transport.synchronize()  # what is freed here may still be copied from or to
        if needed and host_is_small:
            self._host = None  # first, or there would be both
            self._host = self._transport.host_memory(needed)
        if needed and buffers_are_small:
            self._buffers.clear()
            for _ in range(_BUFFERS):
                self._buffers.append(_Buffer(self._transport.device_memory(largest)))

    def begin_sum(self, pending: "PendingGradient") -> None:
        """Take the first gradient of a sum into a buffer. It stays where it is if `prepare` knew of no such sum."""
        size = pending.grad.nbytes
        end = self._taken + size
        if end > self._limit or size > self._buffers[0].memory.nbytes:
            return
        assert self._host is not None
        place = self._host[self._taken : end]
        self._taken += _aligned(size)
        away = torch.empty(pending.grad.shape, dtype=pending.grad.dtype, device="meta")
        host = HostSum(place, away)
        self._live.add(host)
        self._arrived.append(host)
        buffer = self._idle_buffer()
        self._let_compute(buffer, host)
        value = host.in_buffer(buffer)
        value.copy_(pending.grad)
        pending.grad = value
        pending.host = host

    def expect_as_arrived(self) -> None:
        """Expect sums in the order in which their first gradients came."""
        self.expect(self._arrived)

    def expect(self, sums: Iterable[HostSum]) -> None:
        """Expect ``sums`` to be brought next, in this order, and begin to fetch them."""
        for host in self._live:
            host.position = -1
        self._expected = [host for host in sums if host in self._live]
        for position, host in enumerate(self._expected):
            host.position = position
        self._next = 0
        self._passed = 0
        self._fetch_ahead()

    def bring(self, pending: "PendingGradient") -> None:
        """Have the sum of ``pending`` on the device, to be used and changed there. Do nothing where it is there."""
        host = pending.host
        assert host is not None
        buffer = host.buffer
        if buffer is not None and buffer.in_use:
            return
        if buffer is None:
            buffer = self._idle_buffer()
            self._fetch(host, buffer)
        self._let_compute(buffer, host)
        pending.grad = host.in_buffer(buffer)
        self._passed = max(self._passed, host.position + 1)
        self._fetch_ahead()

    def is_here(self, pending: "PendingGradient") -> bool:
        """Return whether the sum of ``pending`` is in use on the device."""
        host = pending.host
        return host is not None and host.buffer is not None and host.buffer.in_use

    def put_back(self, pending: "PendingGradient") -> None:
        """Write the sum of ``pending``, which is in use, back to the host."""
        host = pending.host
        assert host is not None
        buffer = host.buffer
        assert buffer is not None
        self._end_compute(buffer)
        self._let_move(buffer)
        self._transport.copy(host.place, buffer.memory[: host.place.nbytes])
        buffer.moved = self._transport.moved()
        pending.grad = host.away
        self._fetch_ahead()

    def keep(self, pending: "PendingGradient") -> None:
        """Leave the sum of ``pending`` on the host as it is there: it was used, and not changed."""
        host = pending.host
        assert host is not None
        assert host.buffer is not None
        self._end_compute(host.buffer)
        pending.grad = host.away
        self._fetch_ahead()

    def leave(self, pending: "PendingGradient") -> None:
        """Drop the sum of ``pending``, if it has one: what is pending was compressed, and is needed alone."""
        host = pending.host
        if host is None:
            return
        assert host.buffer is not None
        # A rule may compress by taking a piece.
        if pending.grad.untyped_storage() is host.buffer.memory.untyped_storage():
            pending.grad = pending.grad.clone()
        self.forget(pending)

    def forget(self, pending: "PendingGradient") -> None:
        """Drop the sum of ``pending``, if it has one: it was used for the last time, or is not needed."""
        host = pending.host
        if host is None:
            return
        pending.host = None
        self._live.discard(host)
        buffer = host.buffer
        if buffer is not None and buffer.in_use:
            self._end_compute(buffer)
        elif buffer is not None:
            self._empty(buffer)
        self._fetch_ahead()

    def forget_all(self) -> None:
        """Drop all sums, also one whose use was broken off by an error."""
        self._live.clear()
        self._expected = ()
        for buffer in self._buffers:
            if buffer.in_use:
                self._end_compute(buffer)
            self._empty(buffer)

    def _fetch_ahead(self) -> None:
        """Fetch the sums that are expected next into the buffers that are free."""
        while self._next < len(self._expected):
            host = self._expected[self._next]
            is_needed = host in self._live and host.buffer is None and host.position >= self._passed
            if is_needed:
                buffer = self._free_buffer()
                if buffer is None:
                    return
                self._fetch(host, buffer)
            self._next += 1

    def _fetch(self, host: HostSum, buffer: _Buffer) -> None:
        """Copy a sum from the host into a buffer that is not in use."""
        self._empty(buffer)
        self._let_move(buffer)
        self._transport.copy(buffer.memory[: host.place.nbytes], host.place)
        buffer.moved = self._transport.moved()
        buffer.holds = host
        host.buffer = buffer

    def _free_buffer(self) -> _Buffer | None:
        """Return a buffer that holds nothing, or a sum that was expected before the one that came; None without any."""
        for buffer in self._buffers:
            if buffer.holds is None:
                return buffer
        for buffer in self._buffers:
            if not buffer.in_use and buffer.holds is not None and buffer.holds.position < self._passed:
                return buffer
        return None

    def _idle_buffer(self) -> _Buffer:
        """Return a buffer that is not in use: a free one, or that of the sum which is expected the latest."""
        buffer = self._free_buffer()
        if buffer is not None:
            return buffer
        idle = [buffer for buffer in self._buffers if not buffer.in_use]
        latest = max(idle, key=lambda buffer: buffer.holds.position if buffer.holds else -1)
        assert latest.holds is not None
        self._next = min(self._next, latest.holds.position)  # it is to be fetched once more
        return latest

    def _empty(self, buffer: _Buffer) -> None:
        """Let a buffer hold nothing."""
        if buffer.holds is not None:
            buffer.holds.buffer = None
            buffer.holds = None

    def _let_compute(self, buffer: _Buffer, host: HostSum) -> None:
        """Give a buffer to the computing stream, once the side stream is done with it."""
        if buffer.holds is not host:
            self._empty(buffer)
            buffer.holds = host
            host.buffer = buffer
        buffer.in_use = True
        self._buffers.remove(buffer)
        self._buffers.append(buffer)
        if buffer.moved is not None:
            self._transport.await_moved(buffer.moved)
            buffer.moved = None

    def _end_compute(self, buffer: _Buffer) -> None:
        """Take a buffer from the computing stream."""
        buffer.used = self._transport.used()
        buffer.in_use = False
        self._empty(buffer)

    def _let_move(self, buffer: _Buffer) -> None:
        """Give a buffer to the side stream, once the computing stream is done with it."""
        if buffer.used is not None:
            self._transport.await_used(buffer.used)
            buffer.used = None


def _aligned(size: int) -> int:
    """Return the bytes that a sum takes on the host, so that the next one begins where it should."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
