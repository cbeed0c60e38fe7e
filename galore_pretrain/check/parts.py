"""The table of the parts of the check, in the order of their worth: where time is short, the last ones are left out."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from galore_pretrain.check.part import Part


@dataclass(frozen=True)
class Entry:
    """Describes a part: its name, what it is about, its function, its limit in seconds, and whether it needs a GPU."""

    name: str
    about: str
    place: str
    """``file:function`` of this room, so that naming a part loads no torch."""
    limit: float
    needs_gpu: bool = False

    def function(self) -> "Callable[[Part], None]":
        """Return the function that checks."""
        file, _, name = self.place.partition(":")
        function: Callable[[Part], None] = getattr(import_module(f"galore_pretrain.check.{file}"), name)
        return function


# A limit is some three times what a part took: on an H200, or on a CPU of two cores that others use too.
_ENTRIES = (
    Entry("environment", "the machine and its versions", "machine:environment", 60),
    Entry("numerics", "updates of every row, and rounding", "numerics:numerics", 300),
    Entry("kernels", "kernels against single operations", "kernels:kernels", 180),
    Entry("eight_bit", "moments in 8 bits, and side streams", "kernels:eight_bit", 80),
    Entry("host_sums", "--accumulate-on host", "host:host_sums", 60, needs_gpu=True),
    Entry("seven", "updates of llama_7b with a 24 GB card's memory", "memory:seven", 300, needs_gpu=True),
    Entry("memory", "the plan against torch's allocator", "memory:memory", 300),
    Entry("documents", "packed documents against each by itself", "documents:documents", 60),
    Entry("speed", "tokens/s beside a loop by hand", "speed:speed", 240),
    Entry("resume", "a run in two parts against a whole one", "runs:resume", 400),
    Entry("refresh", "new bases: orthonormal, and how long they take", "kernels:refresh", 90),
    Entry("export", "what saving and exporting take of the host", "runs:export", 110),
    Entry("reader", "whether text comes as fast as it is trained on", "runs:reader", 90),
    Entry("compiled", "--compile", "speed:compiled", 180, needs_gpu=True),
    Entry("deterministic", "the price of --deterministic", "speed:deterministic", 60, needs_gpu=True),
)
PARTS: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
"""The parts by name."""
