"""Transports move memory between a device and its host on a side stream, while the device computes on another one."""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Transport(Protocol):
    """Moves memory between a device and its host, in the order that is asked for, beside what the device computes.

    Two streams work at the same time: the one that computes, and a side stream that copies. An event says how far one
    of them has come; the other one waits for it. Nobody else waits, but in `synchronize`.
    """

    def host_memory(self, size: int) -> Tensor:
        """Return ``size`` bytes (uint8) of the host's memory, which the side stream can read and write."""
        ...

    def device_memory(self, size: int) -> Tensor:
        """Return ``size`` bytes (uint8) of the device's memory. The computing stream may still use it till `used`."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy on the side stream, after all that was asked of it before."""
        ...

    def used(self) -> Any:
        """Return an event: the computing stream has done all that it was given up to now."""
        ...

    def moved(self) -> Any:
        """Return an event: the side stream has made all copies that it was given up to now."""
        ...

    def await_used(self, event: Any) -> None:
        """Let the side stream wait for an event of the computing stream."""
        ...

    def await_moved(self, event: Any) -> None:
        """Let the computing stream wait for an event of the side stream."""
        ...

    def synchronize(self) -> None:
        """Wait until the side stream has made all copies that it was given."""
        ...


class AtOnce:
    """Copies at once: on a CPU, where nothing runs beside anything, and in a plan, whose tensors are fake."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def host_memory(self, size: int) -> Tensor:
        """Return ``size`` bytes of the host's memory."""
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def device_memory(self, size: int) -> Tensor:
        """Return ``size`` bytes of the device's memory."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy at once."""
        target.copy_(source)

    def used(self) -> None:
        """Return nothing: what was given is done."""

    def moved(self) -> None:
        """Return nothing: what was given is copied."""

    def await_used(self, event: None) -> None:
        """Wait for nothing."""

    def await_moved(self, event: None) -> None:
        """Wait for nothing."""

    def synchronize(self) -> None:
        """Wait for nothing."""


class NotLockedError(MemoryError):
    """The host's memory could not be page-locked, so that no stream can copy to it or from it."""


class SideStream:
    """Copies on a CUDA stream of its own, from and to page-locked memory: a card does that while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    # `torch.empty(pin_memory=True)` may take the next power of two of bytes: for 13 GB, 16. So this locks as many as it
    # is asked for.
    def host_memory(self, size: int) -> Tensor:
        """Return ``size`` bytes of page-locked memory; NotLockedError where the system does not lock so much."""
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
        if error:
            raise NotLockedError(
                f"{size / 2**30:.2f} GiB of the host's memory could not be page-locked: CUDA error {error}"
            )
        unlocked = weakref.finalize(memory, _unlock, memory.data_ptr(), self._stream)
        unlocked.atexit = False  # the system does it then
        return memory

    def device_memory(self, size: int) -> Tensor:
        """Return ``size`` bytes of the card's memory, which is given to others only when the side stream is done."""
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        memory.record_stream(self._stream)
        return memory

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy on the side stream."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def used(self) -> torch.cuda.Event:
        """Return an event of the current stream."""
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def moved(self) -> torch.cuda.Event:
        """Return an event of the side stream."""
        event: torch.cuda.Event = self._stream.record_event()
        return event

    def await_used(self, event: torch.cuda.Event) -> None:
        """Let the side stream wait."""
        self._stream.wait_event(event)

    def await_moved(self, event: torch.cuda.Event) -> None:
        """Let the current stream wait."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def synchronize(self) -> None:
        """Wait for the side stream."""
        self._stream.synchronize()


def _unlock(address: int, stream: torch.cuda.Stream) -> None:
    """Unlock memory that is about to be freed, once no copy reads or writes it."""
    stream.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


def transport_of(tensor: Tensor) -> Transport:
    """Return what moves memory between the host and the device of ``tensor``."""
    if tensor.device.type == "cuda" and not isinstance(tensor, FakeTensor):
        return SideStream(tensor.device)
    return AtOnce(tensor.device)
