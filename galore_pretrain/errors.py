"""The exceptions that a user is meant to see: one line on stderr each."""


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
