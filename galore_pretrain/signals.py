"""SIGINT, SIGTERM and SIGHUP: the first asks a program to stop, one that comes later insists."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from types import FrameType

_TOGETHER = 1.0
"""Seconds within which several signals count as one.

A scheduler or a terminal signals every process of a job, and a sweep's own runs then get the signal twice.
"""


@dataclass
class Ending:
    """Says how the program ends: ``at_once``, or as Python does, which waits for what a run has left behind.

    ``is_asked_for``: a signal has asked this process to end, and will not be sent again.
    """

    at_once: bool = False
    is_asked_for: bool = False


@contextmanager
def on_stop(stop: Callable[[int], None]) -> Iterator[None]:
    """Call ``stop`` with the number of the first signal that comes meanwhile.

    One that comes a second later ends the process at once, with exit code 128 + its number.
    """
    # Python calls handlers in the main thread, between two of its instructions: never while that waits for a library.
    # So the second signal is left to a thread. The interpreter writes the number of each signal to a pipe as soon as
    # it comes, whatever the main thread does, and the thread reads it there.
    caught = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup wants it
        caught.append(signal.SIGHUP)
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if not received:
            received.append(number)
            stop(number)

    def watch() -> None:
        first = None
        while numbers := os.read(reader, 1):
            number = numbers[0]
            if number not in caught:
                continue
            now = time.monotonic()
            if first is None:
                first = now
            if now - first > _TOGETHER:
                os._exit(128 + number)
        os.close(reader)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = [(number, signal.signal(number, handle)) for number in caught]
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_writer)
        for number, handler in previous:
            signal.signal(number, handler)
        os.close(writer)  # which ends the thread
