"""Files of a batch on this machine: their own, or copies that are fetched."""

from contextlib import ExitStack

from pipelines import storage
from pipelines.data.video.reader import unreadable_error


class LocalFiles:
    """Local paths of the files of a batch, the fetched ones removed at the end."""

    def __init__(self) -> None:
        self._open: dict[str, ExitStack] = {}
        self._paths: dict[str, str] = {}

    def path(self, uri: str) -> str:
        """Where a file's content is on this machine.

        Raises:
            VideoError: if it cannot be fetched.
        """
        if uri not in self._paths:
            stack = ExitStack()
            try:
                self._paths[uri] = stack.enter_context(storage.local_copy(uri))
            except OSError as error:  # it could be read when it was hashed
                raise unreadable_error(error).as_transient() from error
            self._open[uri] = stack
        return self._paths[uri]

    def release(self, uri: str) -> None:
        """Forget a file, and its copy."""
        self._paths.pop(uri, None)
        if stack := self._open.pop(uri, None):
            stack.close()
