"""The two errors a person is meant to read: they end a command with one message and no traceback."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_OF_RAY_DATA = "\nFailed to apply UDF transform after "  # begins what it adds to the text of an error of its workers


class UserError(Exception):
    """Bad usage, configuration or input, found before any expensive work begins (exit status 2).

    The message names the thing that is wrong, the value it has and what to do about it.
    """


class JobError(Exception):
    """A job that began and could not finish (exit status 1).

    The message says what failed, what is kept, and how to continue.
    """


_MAX_LISTED = 10


def listed(mistakes: Sequence[str]) -> str:
    """Mistakes as one message: one as it is, several in lines, the first ten of them and how many more there are."""
    if len(mistakes) == 1:
        return mistakes[0]
    more = len(mistakes) - _MAX_LISTED
    last = [f"and {more} more"] if more > 0 else []
    return "\n  ".join([f"{len(mistakes)} mistakes:", *mistakes[:_MAX_LISTED], *last])


def in_words(error: BaseException, *, last_line: bool = False) -> str:
    """An error in one line: of one that Ray wraps, what was raised; its kind only where it is not meant for a person.

    With ``last_line``, of the latter only that line, as of what may be a traceback.
    """
    cause = getattr(error, "cause", None) or error
    own = str(cause).partition(_OF_RAY_DATA)[0]
    lines = [line.strip() for line in own.splitlines() if line.strip()]
    if isinstance(cause, UserError | JobError):
        return " ".join(lines)
    return f"{type(cause).__name__}: {' '.join(lines[-1:] if last_line else lines) or 'no message'}"


@contextmanager
def storage_errors_as(error_class: type[UserError | JobError], remedy: str) -> Iterator[None]:
    """Within the block, what a disk or a store raises becomes an error for a person, which ends with the remedy."""
    try:
        yield
    except BrokenPipeError:  # of the terminal: click ends the command quietly
        raise
    except OSError as error:
        raise error_class(f"{error}; {remedy}") from error
