"""The least that the data stages could do: decode, scale, encode, nothing else. Light, as decode children import it."""

from collections.abc import Callable

from av.video.reformatter import VideoReformatter

from pipelines.data.video.fingerprint import small_size
from pipelines.data.video.reader import VideoFile


def decode_only(path: str, target: int, *, beat: Callable[[], None]) -> int:
    """Decode every frame of a file and scale it down, as the score pass has to; how many there are.

    Args:
        path: A local file.
        target: px of the longer side.
        beat: Called as work goes on.
    """
    count, scaler = 0, VideoReformatter()
    with VideoFile(path) as video:
        for timed in video.frames():
            if count % 16 == 0:
                beat()
            width, height = small_size(timed.frame.width, timed.frame.height, target)
            scaler.reformat(timed.frame, width, height, "yuvj444p", interpolation="AREA", threads=1).to_ndarray()
            count += 1
    return count
