"""Where a run is in its text, for the parts of a model that draw random numbers of their own."""

from dataclasses import dataclass


@dataclass
class TrainingPosition:
    """The next forward pass is of the rows from number ``row`` on of those of an ``update``, both counted from 0.

    A trainer writes it before each forward pass; the layers that were built with it read it.
    """

    update: int = 0
    row: int = 0
