"""The one exception that a user is meant to see."""


class InputError(ValueError):
    """Wrong use, unfit input or an unreachable hub.

    The message is one line that names the bad value, what is accepted and the way out. The command line prints it
    on stderr and exits with 2; every other exception is a fault of the program.
    """
