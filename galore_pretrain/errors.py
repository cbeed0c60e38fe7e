"""The exceptions that a user is meant to see, one line on stderr each, and what such a line proposes."""

import contextlib
import difflib
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

_PROPOSED = 2  # names, and paths, at most
_LOOKED_AT = 10_000  # entries of a folder, at most


class RunError(Exception):
    """An error that the command line prints as one line.

    ``reported_by`` is the number of the process that prints it. None means that the first process of each host does.
    """

    def __init__(self, message: str = "", *, reported_by: int | None = None) -> None:
        super().__init__(message)
        self.reported_by = reported_by


class InputError(RunError, ValueError):
    """Wrong use, unfit input or an unreachable hub.

    The message is one line that names the bad value, what is accepted and the way out. The command line prints it
    on stderr and exits with 2.
    """


class TrainingFailedError(RunError, RuntimeError):
    """A run that cannot go on, such as a loss that stays non-finite. The command line exits with 1."""


class ProcessFailedError(RunError):
    """The cause (``__cause__``) of an exception that was raised in another process first, which prints it."""


# Of a path that is not there, the first part that is missing is compared with what is in its folder.
def did_you_mean(value: str, names: Sequence[str] = ()) -> str:
    """Return the question, with a space behind it, whether one of ``names`` or a path that exists was meant; or ''."""
    near = difflib.get_close_matches(value, names, n=_PROPOSED)
    missing = Path(value)
    with contextlib.suppress(OSError):  # a folder that cannot be looked at, or a name that is too long
        while not missing.parent.is_dir():
            missing = missing.parent
        with os.scandir(missing.parent) as entries:
            beside = [entry.name for entry in islice(entries, _LOOKED_AT)]
        for name in difflib.get_close_matches(missing.name, sorted(beside), n=_PROPOSED):
            near.append(str(missing.parent / name))
    if not near:
        return ""
    return f"did you mean {' or '.join(near)}? "
