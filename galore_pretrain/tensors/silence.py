"""Silence for libraries that write past Python, to the process's own standard output or error."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced(descriptor: int) -> Iterator[None]:
    """Drop meanwhile what anything in the process writes to ``descriptor``: 1 is standard output, 2 standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(descriptor)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
