"""The two errors a person is meant to read: they end a command with one message and no traceback."""


class UserError(Exception):
    """Bad usage, configuration or input, found before any expensive work begins (exit status 2).

    The message names the thing that is wrong, the value it has and what to do about it.
    """


class JobError(Exception):
    """A job that began and could not finish (exit status 1).

    The message says what failed, what is kept, and how to continue.
    """
