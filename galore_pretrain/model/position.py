"""Tells where a run is in its text, for the parts of a model that draw random numbers of their own."""

from dataclasses import dataclass


@dataclass
class TrainingPosition:
    """Says which rows the next forward pass is of: those of update ``update`` from number ``row`` on, counted from 0.

    A trainer writes it before each forward pass; the layers that were built with it read it.
    """

    update: int = 0
    row: int = 0
