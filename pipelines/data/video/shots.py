"""The low-resolution pass over a source's frames: finds its shots and measures every clip. Runs in decode children.

Every moment of a decodable source lands in exactly one clip, the too short ones among them: whether to keep a clip is
decided later, from its scores.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter
from numpy.typing import NDArray
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector

from pipelines.data.settings import SplitConfig
from pipelines.data.video.borders import BorderMeter, Box, turn_box
from pipelines.data.video.fingerprint import LOOK_SECONDS, make_fingerprint, small_planes, small_size, thumbnail
from pipelines.data.video.meter import FrameMeter
from pipelines.data.video.movement import Cells, make_movement, measure_cells
from pipelines.data.video.reader import DecodedSource
from pipelines.data.video.transitions import Judgement, TransitionMeter
from pipelines.decoding.errors import VideoError
from pipelines.decoding.video_file import TimedFrame, VideoFile, VideoInfo

if TYPE_CHECKING:
    from pipelines.data.models.transnet import TransNetDetector

_BEAT_FRAMES = 16
_STUTTER = 0.25  # seconds
_NEAR = 2  # frames by which two measures may differ about a cut
_DENIED = 0.1  # of 0..1, below which a cut is none, unless the pictures around are as far apart as:
_UNLIKE = 0.85  # 0..1.4; 0.93 and more was seen of cuts, 0.62 and less of nearly all flashes and sudden motion
_PLANAR = frozenset(f"yuv{j}{kind}p" for j in ("", "j") for kind in ("420", "422", "444"))
# From the range that video leaves at both ends (luma 16..235, chroma 16..240) to all of 0..255.
_STRETCH_LUMA = ((np.arange(256) - 16) * 255 / 219).clip(0, 255).round().astype(np.uint8)
_STRETCH_CHROMA = ((np.arange(256) - 128) * 255 / 224 + 128).clip(0, 255).round().astype(np.uint8)


def split_source(path: str, config: SplitConfig, *, beat: Callable[[], None]) -> DecodedSource:
    """Decode a local file once and cut it into measured clips; ``beat`` is called as work goes on.

    Raises:
        VideoError: the file is no video, or nothing of it can be decoded.
    """
    with VideoFile(path) as video:
        info = video.info()
        seen = _Pass(config, info.declared_fps)
        for index, timed in enumerate(video.frames()):
            if index % _BEAT_FRAMES == 0:
                beat()
            seen.add(timed)
        clean_clock, errors = video.clean_clock, video.errors
    count = len(seen.meter.times)
    if count == 0:
        code = "decode_error" if errors else "no_frames"
        raise VideoError(code, f"{errors} damaged packets and no frame" if errors else "a video stream without frames")
    (width, height), aspect = seen.frame_size, info.pixel_aspect
    if seen.rotation % 180:
        width, height, aspect = height, width, 1 / aspect
    info = replace(info, width=width, height=height, pixel_aspect=aspect)
    return DecodedSource(
        codec=info.codec,
        pixel_format=info.pixel_format,
        pixel_aspect=info.pixel_aspect,
        rotation=seen.rotation,
        picture=seen.picture(),
        origin_s=seen.origin,
        clean_clock=clean_clock,
        source_frames=count,
        clips=_clips(seen, info, config, beat),
    )


class _Pass:
    """What one look at every frame, in order, leaves behind."""

    def __init__(self, config: SplitConfig, declared_fps: float) -> None:
        self.meter, self.borders = FrameMeter(), BorderMeter()
        self.shots = _shot_detector(config, declared_fps)
        self.transitions = TransitionMeter()
        self.fresh: list[int] = []  # numbers of the frames that do not repeat the one before
        self.rotation = 0
        self.origin = 0.0  # seconds, as the file counts
        self.frame_size = (0, 0)  # of the first frame, as coded
        self.last_duration = 0.0
        self.thumbnails: list[tuple[float, bytes]] = []  # several a second, of which clips take some
        self.cells: list[Cells] = []  # of the same frames
        self._target = config.width
        self._small = (0, 0)
        self._changed = 0.0  # when the picture was last another than before, seconds
        # Each keeps what it has set up for frames of one kind, which takes longer than a frame itself.
        self._scaler, self._converter, self._grayer = (VideoReformatter() for _ in range(3))

    def add(self, timed: TimedFrame) -> None:
        """See the next frame."""
        frame = timed.frame
        if not self.meter.times:
            self.rotation, self.origin = frame.rotation % 360 // 90 * 90, timed.time
            self.frame_size = (frame.width, frame.height)
            self._small = small_size(frame.width, frame.height, self._target)
        time, self.last_duration = timed.time - self.origin, timed.duration
        # What is measured is averaged, so that grain is no motion. Shots are told on a picture made as PySceneDetect
        # makes its own, by interpolation: on an averaged one, hues in the dark differ and it sees other cuts.
        planes = small_planes(frame, self._small, self._scaler)
        self.meter.add(time, planes, is_damaged=timed.is_damaged)
        self._changed = self._changed if self.meter.repeats[-1] else time
        # Among frames that repeat one another, as in a film shown faster than it was taken, each that does not would
        # look like a cut; what stands still for longer is a picture like others, and no flash.
        stutters = self.meter.repeats[-1] and time - self._changed < _STUTTER
        self.transitions.add(time, planes, skip=stutters)
        if self.shots is not None and not stutters:
            self.fresh.append(len(self.meter.times) - 1)
            self.shots.add(interpolate(frame, self._small, self._converter))
        if not self.thumbnails or time - self.thumbnails[-1][0] >= LOOK_SECONDS - 1e-3:
            self.thumbnails.append((time, thumbnail(planes).tobytes()))
            self.cells.append(measure_cells(planes[0]))
        if self.borders.wants(time):
            luma = full_luma(frame, self._grayer)
            self.borders.add(time, luma)
            self.meter.add_picture(time, luma, planes[0])

    def picture(self) -> Box:
        """What lies between black bars, px of the upright frame."""
        return turn_box(self.borders.box() or (0, 0, *self.frame_size), self.frame_size, self.rotation)


def _clips(seen: _Pass, info: VideoInfo, config: SplitConfig, beat: Callable[[], None]) -> list[dict[str, Any]]:
    """Span and scores of each clip."""
    meter, (_, _, width, height) = seen.meter, seen.picture()
    count = len(meter.times)
    mean_step = (meter.times[-1] - meter.times[0]) / (count - 1) if count > 1 else 1 / (info.declared_fps or 25)
    end = meter.times[-1] + (seen.last_duration or mean_step)
    picture_share = width * height / (info.width * info.height)
    of_the_source = {
        "image": info.is_image,
        "width": width,
        "height": height,
        "aspect": width * info.pixel_aspect / height,
        "picture_share": picture_share,
        "declared_frames": info.declared_frames,
        "decoded_frames": count,
        "decoded_share": _decoded_share(info, count, end),
    }
    judged = seen.transitions.finish()
    cuts = []
    if seen.shots is not None:
        cuts = [seen.fresh[cut] for cut in seen.shots.finish()]
        cuts = join_cuts(cuts, judged) if config.transitions else cuts
    looked_at = [time for time, _ in seen.thumbnails]
    clips = []
    for first, stop in _spans(meter.times, cuts, end, meter.dark, config):
        beat()
        start_s, end_s = meter.times[first], meter.times[stop] if stop < count else end
        span = {"duration": end_s - start_s, "fps": (stop - first) / (end_s - start_s)}
        looked = judged.looked[slice(*np.searchsorted(judged.looked, (first, stop)))]
        inside = judged.sure[looked[1:]]  # of the steps that both begin and end in the clip
        scores = span | of_the_source | meter.clip_scores(first, stop, picture_share)
        scores["cut"] = float(inside.max()) if len(inside) else 0.0
        rounded = {name: round(float(value), 6) for name, value in scores.items()}
        clips.append(
            {
                "start_s": round(start_s, 3),
                "end_s": round(end_s, 3),
                "scores": rounded,
                "fingerprint": make_fingerprint(seen.thumbnails, start_s, end_s),
                "movement": make_movement(looked_at, seen.cells, start_s, end_s),
            }
        )
    return clips


def join_cuts(cuts: Sequence[int], judged: Judgement) -> list[int]:
    """Where shots are parted: cuts of the first measure that the second does not deny, and what it alone has seen.

    Denied is what has the same picture before and after, as a flash. A transition parts three: the shots, and what
    belongs to both.
    """
    found: set[int] = set()
    for each in judged.transitions:
        # Of fast frames not all were looked at; where between two a cut lies, the first measure may know.
        seen = cuts[bisect_left(cuts, each.first) : bisect_right(cuts, each.stop)]
        found |= {seen[0] if seen else each.stop} if each.is_cut else {each.first, each.stop}
    stops = [each.stop for each in judged.transitions]
    for cut in cuts:
        near = bisect_left(stops, cut - _NEAR)
        known = near < len(stops) and judged.transitions[near].first - _NEAR <= cut
        step = int(np.searchsorted(judged.looked, cut))
        around = judged.looked[max(0, step - _NEAR) : step + _NEAR + 1]
        sure = judged.sure[around].max(initial=0)
        if not known and (sure >= _DENIED or judged.across[around].max(initial=0) >= _UNLIKE):
            found.add(cut)
    return sorted(found)


def _shot_detector(config: SplitConfig, fps: float) -> "_SceneDetect | TransNetDetector | None":
    """What collects the frame numbers at which a new shot begins; None: a source is taken for one shot."""
    if config.detector == "adaptive":
        return _SceneDetect(FastAdaptiveDetector(adaptive_threshold=config.threshold or 3.0, min_scene_len=2), fps)
    if config.detector == "content":
        return _SceneDetect(FastContentDetector(threshold=config.threshold or 27.0, min_scene_len=2), fps)
    if config.detector == "transnetv2":
        from pipelines.data.models import transnet  # brings torch, which the other detectors do without

        assert config.weights is not None
        network = transnet.shared_transnet(config.weights)
        return transnet.TransNetDetector(network, config.threshold or transnet.THRESHOLD)
    return None


class FastContentDetector(ContentDetector):  # type: ignore[misc]
    """PySceneDetect's score of a frame, the mean difference of hue, saturation and value, in one pass over 8-bit data.

    Its own takes three times as long, as it widens every channel to 32 bits first.
    """

    _last_hsv: NDArray[np.uint8] | None = None

    def _calculate_frame_score(self, timecode: FrameTimecode, frame_img: NDArray[np.uint8]) -> float:
        del timecode
        hsv = np.asarray(cv2.cvtColor(frame_img, cv2.COLOR_BGR2HSV), np.uint8)
        last, self._last_hsv = self._last_hsv, hsv
        return 0.0 if last is None else cv2.norm(last, hsv, cv2.NORM_L1) / hsv.size


class FastAdaptiveDetector(FastContentDetector, AdaptiveDetector):  # type: ignore[misc]
    """PySceneDetect's rolling average over the same scores."""


class _SceneDetect:
    """The cuts of a detector of PySceneDetect."""

    def __init__(self, detector: ContentDetector, fps: float) -> None:
        # Times are taken from the frames, so the rate that PySceneDetect asks for only has to be some number; and
        # length rules are ours, so it gets none but two frames, below which a flash would be a shot.
        self._detector = detector
        self._rate = fps or 25.0
        self._index = -1
        self._cuts: list[FrameTimecode] = []

    def add(self, frame: NDArray[np.uint8]) -> None:
        """See the next frame (BGR)."""
        self._index += 1
        self._cuts += self._detector.process_frame(FrameTimecode(self._index, self._rate), frame)

    def finish(self) -> list[int]:
        """All cuts, once the last frame has been seen."""
        if self._index >= 0:
            self._cuts += self._detector.post_process(FrameTimecode(self._index, self._rate))
        return sorted({int(cut.frame_num) for cut in self._cuts})


def _spans(
    times: Sequence[float], cuts: Sequence[int], end: float, dark: Sequence[bool], config: SplitConfig
) -> list[tuple[int, int]]:
    """Frame ranges of the clips: shots, the long ones divided, what is trimmed of them on its own."""
    instants = np.array([*times, end])
    if config.dark_seconds is not None and config.detector not in ("stride", "none"):
        cuts = sorted({*cuts, *_dark_edges(dark, instants, config.dark_seconds)})
    edges = [0, *(cut for cut in cuts if 0 < cut < len(times)), len(times)]
    spans: list[tuple[int, int]] = []
    for first, stop in pairwise(edges):
        begin, over = _trim(first, stop, instants, config.trim_seconds)
        length = float(instants[over] - instants[begin])
        if config.detector == "stride":
            targets = instants[begin] + config.max_seconds * np.arange(1, math.ceil(length / config.max_seconds - 1e-6))
        elif config.detector == "none":
            targets = np.array([])
        else:
            pieces = max(1, math.ceil(length / config.max_seconds - 1e-6))
            targets = instants[begin] + length * np.arange(1, pieces) / pieces
        inner = np.searchsorted(instants[begin:over], targets - 1e-6) + begin
        bounds = {first, begin, *(int(bound) for bound in inner if begin < bound < over), over, stop}
        spans += pairwise(sorted(bounds))
    return spans


def _dark_edges(dark: Sequence[bool], instants: NDArray[np.float64], seconds: float) -> Iterator[int]:
    """Where stretches of black frames begin and end that last at least so long."""
    steps = np.diff([0, *map(int, dark), 0])
    for begin, over in zip(np.flatnonzero(steps > 0), np.flatnonzero(steps < 0), strict=True):
        if instants[over] - instants[begin] >= seconds - 1e-6:
            yield from (int(begin), int(over))


def _trim(first: int, stop: int, instants: NDArray[np.float64], seconds: float) -> tuple[int, int]:
    """The frames of a shot without what lies so close to its cuts; all, if none would stay."""
    begin, over = first, stop
    if seconds and first > 0:
        begin = int(np.searchsorted(instants, instants[first] + seconds - 1e-6))
    if seconds and stop < len(instants) - 1:
        over = int(np.searchsorted(instants, instants[stop] - seconds - 1e-6))
    return (begin, over) if begin < over else (first, stop)


def interpolate(frame: av.VideoFrame, size: tuple[int, int], converter: VideoReformatter) -> NDArray[np.uint8]:
    """A frame as BGR of (width, height), each pixel interpolated between its nearest neighbours, as OpenCV does it.

    Of planar 8-bit frames only the pixels that are needed are read: interpolation and conversion to BGR (BT.601, as in
    OpenCV) may change places, as both are linear.
    """
    if frame.format.name not in _PLANAR:
        whole = np.asarray(converter.reformat(frame, format="bgr24", threads=1).to_ndarray(), np.uint8)
        return np.asarray(cv2.resize(whole, size, interpolation=cv2.INTER_LINEAR), np.uint8)
    luma, blue, red = (cv2.resize(_plane(plane), size, interpolation=cv2.INTER_LINEAR) for plane in frame.planes)
    if not _has_full_range(frame):
        luma, blue, red = cv2.LUT(luma, _STRETCH_LUMA), cv2.LUT(blue, _STRETCH_CHROMA), cv2.LUT(red, _STRETCH_CHROMA)
    return np.asarray(cv2.cvtColor(cv2.merge([luma, red, blue]), cv2.COLOR_YCrCb2BGR), np.uint8)


def full_luma(frame: av.VideoFrame, converter: VideoReformatter) -> NDArray[np.uint8]:
    """Luma of a frame at its full size, [height, width], 0 black to 255 white."""
    if frame.format.name not in _PLANAR:
        return np.asarray(converter.reformat(frame, format="gray", threads=1).to_ndarray(), np.uint8)
    luma = _plane(frame.planes[0])
    return luma if _has_full_range(frame) else np.asarray(cv2.LUT(luma, _STRETCH_LUMA), np.uint8)


def _has_full_range(frame: av.VideoFrame) -> bool:
    return frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")


def _plane(plane: av.video.plane.VideoPlane) -> NDArray[np.uint8]:
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return np.asarray(rows[: plane.height, : plane.width])


def _decoded_share(info: VideoInfo, frames: int, seconds: float) -> float:
    """How much of what the file declares could be decoded; 1 where it declares nothing."""
    if info.declared_frames:
        return frames / info.declared_frames
    return seconds / info.declared_seconds if info.declared_seconds else 1.0
