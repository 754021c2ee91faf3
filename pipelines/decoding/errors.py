"""Why a file yields no video."""


class VideoError(Exception):
    """A file that yields no usable video: class of the failure in one word, and whether it may do better again."""

    def __init__(self, code: str, detail: str, *, transient: bool = False) -> None:
        super().__init__(code, detail, transient)
        self.code = code
        self.detail = detail
        self.transient = transient


def unreadable_error(error: OSError, *, transient: bool = False) -> VideoError:
    """The failure of a file that the system does not let us read; transient if it could be read before."""
    if isinstance(error, FileNotFoundError):
        return VideoError("missing_file", "no such file, or a broken link", transient=transient)
    if isinstance(error, PermissionError):
        return VideoError("unreadable_file", "no permission to read it", transient=transient)
    if isinstance(error, IsADirectoryError):
        return VideoError("not_a_video", "a folder", transient=transient)
    return VideoError("unreadable_file", error.strerror or type(error).__name__, transient=True)
