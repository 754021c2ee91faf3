"""The least that the data stages could do: decode, scale, encode, nothing else. Light, as decode children import it."""

from collections.abc import Callable

from av.video.reformatter import VideoReformatter

from pipelines.data.video.fingerprint import small_size
from pipelines.decoding.video_file import VideoFile


def decode_only(path: str, target: int, *, beat: Callable[[], None]) -> int:
    """Decode every frame of a local file and scale its longer side to ``target`` px, as the score pass has to.

    Calls ``beat`` as work goes on; returns how many frames there are.
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
