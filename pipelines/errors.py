"""The two errors a person is meant to read: they end a command with one message and no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad usage, configuration or input, found before any expensive work begins (exit status 2).

    The message names the thing that is wrong, the value it has and what to do about it.
    """


class JobError(Exception):
    """A job that began and could not finish (exit status 1).

    The message says what failed, what is kept, and how to continue.
    """


@contextmanager
def storage_errors_as(error_class: type[UserError | JobError], remedy: str) -> Iterator[None]:
    """Within the block, what a disk or a store raises becomes an error for a person, which ends with the remedy."""
    try:
        yield
    except BrokenPipeError:  # of the terminal: click ends the command quietly
        raise
    except OSError as error:
        raise error_class(f"{error}; {remedy}") from error
