"""Work keys: the one place that writes and parses the names of files, sources, clips and work on them."""

from collections.abc import Sequence


def clip_key(source_id: str, start_s: float, end_s: float) -> str:
    """Names a clip by what it shows: content hash of the source, and span in milliseconds."""
    return f"{source_id}:{round(start_s * 1000):08d}-{round(end_s * 1000):08d}"


def picture_key(clip: str, picture: Sequence[int]) -> str:
    """Names a clip together with the part of its frame that counts: left, top, width and height."""
    return f"{clip}+{','.join(map(str, picture))}"
