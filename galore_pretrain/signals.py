"""SIGINT, SIGTERM and SIGHUP: the first asks a program to stop, one that comes later insists."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

_TOGETHER = 1.0
"""Seconds within which several are one: a scheduler or a terminal signals every process of a job, and a sweep's own
runs then hear of it twice."""


@contextmanager
def on_stop(stop: Callable[[int], None]) -> Iterator[None]:
    """Call ``stop`` with the number of the first signal that comes meanwhile.

    One that comes a second later ends the process at once, by 128 + its number, even where the interpreter waits for a
    library and could call no handler.
    """
    caught = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup wants it
        caught.append(signal.SIGHUP)
    told: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if not told:
            told.append(number)
            stop(number)

    def watch() -> None:
        first = None
        while numbers := os.read(reader, 1):
            if numbers[0] not in caught:
                continue
            first = first or time.monotonic()
            if time.monotonic() - first > _TOGETHER:
                os._exit(128 + numbers[0])
        os.close(reader)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = [(number, signal.signal(number, handle)) for number in caught]
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before:
            signal.signal(number, handler)
        os.close(writer)
