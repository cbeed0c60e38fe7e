"""The exceptions that a user is meant to see: both are one line on stderr."""


class InputError(ValueError):
    """Wrong use, unfit input or an unreachable hub.

    The message is one line that names the bad value, what is accepted and the way out. The command line prints it
    on stderr and exits with 2.
    """


class TrainingFailedError(RuntimeError):
    """A run that cannot go on, such as a loss that stays non-finite. The command line exits with 1."""
