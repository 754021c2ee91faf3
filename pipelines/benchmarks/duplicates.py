"""How well copies of clips are told from other clips of the same scene: copies are made of clips of real videos.

A copy is encoded anew, and besides it is smaller, cropped, later, mirrored, marked or faster. Clips of one shot that do
not overlap, or of files that show one scene, are no copies, however alike they look.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config import load_config
from pipelines.data.config import CurateConfig
from pipelines.data.settings import SplitConfig
from pipelines.data.stage.values import ValueGroup
from pipelines.data.steps.decide import decide
from pipelines.data.steps.duplicates import StoredClips, find_near_duplicates
from pipelines.data.steps.likeness import Appearance, Limits, likeness
from pipelines.data.video.shots import split_source
from pipelines.decoding.errors import VideoError
from pipelines.errors import UserError

Frames = NDArray[np.uint8]  # [T, H, W, 3]

_WIDTH = 480  # px of the pictures that copies are made of, at most
_LEAST = 1.2  # seconds of a clip
_LENGTHS = (1.5, 3.5)  # likewise, where a shot has so many
_SHIFTS = (0.15, 0.5)  # seconds by which a copy begins later
_SHOT_SECONDS = 600.0  # up to which shots are not divided
_QUALITY, _POOR_QUALITY = "24", "34"  # of x264
_FASTER = 1.1
_CROP = 0.05  # of the width and of the height that a cropped copy lacks
_LOGO = (0.12, 0.16)  # of height and width that a logo has
_WORST = 5  # false alarms that are told


@dataclass(frozen=True)
class Shot:
    """Some frames of one shot, of which clips are made."""

    scene: str  # what else shows the same
    name: str
    fps: float
    frames: Frames
    length: int  # frames of the clip, the first of these
    shift: int  # frames by which a shifted copy begins later


Change = Callable[[Shot, np.random.Generator], Frames]


def _clip(shot: Shot) -> Frames:
    return shot.frames[: shot.length]


def _scale(shot: Shot, generator: np.random.Generator) -> Frames:
    share = float(generator.uniform(0.4, 0.7))
    height, width = (round(side * share / 2) * 2 for side in shot.frames.shape[1:3])
    small = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in _clip(shot)]
    return np.stack(small).astype(np.uint8)


def _crop(shot: Shot, generator: np.random.Generator) -> Frames:
    height, width = shot.frames.shape[1:3]
    less = round(height * _CROP), round(width * _CROP)
    top, left = (int(generator.integers(0, each + 1)) for each in less)
    return _clip(shot)[:, top : top + height - less[0], left : left + width - less[1]]


def _mark(shot: Shot, generator: np.random.Generator) -> Frames:
    """With a logo in a corner."""
    found = _clip(shot).copy()
    height, width = found.shape[1:3]
    tall, wide = round(height * _LOGO[0]), round(width * _LOGO[1])
    edge = round(height * 0.04)
    top = edge if generator.random() < 0.5 else height - edge - tall
    left = edge if generator.random() < 0.5 else width - edge - wide
    colour = generator.integers(0, 256, 3)
    logo = np.ascontiguousarray(np.broadcast_to(colour, (tall, wide, 3)), np.uint8)
    ink = [int(255 - value) for value in colour]
    cv2.putText(logo, "LOGO", (2, tall - 4), cv2.FONT_HERSHEY_SIMPLEX, tall / 40, ink, 2)
    found[:, top : top + tall, left : left + wide] = logo
    return found


def _speed_up(shot: Shot, generator: np.random.Generator) -> Frames:
    del generator
    places = np.round(np.arange(0, shot.length, _FASTER)).astype(int).clip(max=shot.length - 1)
    return np.asarray(shot.frames[places])


KINDS: Mapping[str, Change] = {
    "encoded": lambda shot, generator: _clip(shot),
    "scaled": _scale,
    "cropped": _crop,
    "shifted": lambda shot, generator: shot.frames[shot.shift : shot.shift + shot.length],
    "mirrored": lambda shot, generator: _clip(shot)[:, :, ::-1],
    "logo": _mark,
    "faster": _speed_up,
}


def find_shots(path: Path, scene: str | None, config: CurateConfig, generator: np.random.Generator) -> list[Shot]:
    """Clips of a video that do not overlap, of shots in which something moves, without their frames.

    Raises:
        VideoError: it is none.
    """
    split = split_source(str(path), SplitConfig(max_seconds=_SHOT_SECONDS), beat=lambda: None)
    found = []
    for number, shot in enumerate(split.clips):
        rejected = [reason for reason in decide(shot["scores"], config.bounds)[1].split("; ") if reason]
        if any(not reason.startswith(("duration", "freeze")) for reason in rejected):
            continue
        at, fps = shot["start_s"], shot["scores"]["fps"]
        while (room := shot["end_s"] - at) >= _LEAST + _SHIFTS[0]:
            shift = min(float(generator.uniform(*_SHIFTS)), room - _LEAST)
            length = min(float(generator.uniform(*_LENGTHS)), room - shift)
            name = f"{path.name} from {at:.2f} s"
            none = np.zeros((0, 0, 0, 3), np.uint8)
            found.append(
                (at, Shot(scene or f"{path.name} {number}", name, fps, none, int(length * fps), int(shift * fps)))
            )
            at += length + shift
    return _with_frames(path, found)


def _with_frames(path: Path, shots: Sequence[tuple[float, Shot]]) -> list[Shot]:
    """The same shots, with their frames."""
    frames: list[list[Frames]] = [[] for _ in shots]
    origin = None
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            time = float(frame.time or 0.0)
            origin = time if origin is None else origin
            for (start, shot), own in zip(shots, frames, strict=True):
                if time - origin >= start - 1e-3 and len(own) < shot.length + shot.shift:
                    width = min(_WIDTH, frame.width) // 2 * 2
                    height = round(frame.height * width / frame.width / 2) * 2
                    small = frame.reformat(width, height, "rgb24", interpolation="AREA")
                    own.append(np.asarray(small.to_ndarray(), np.uint8))
                    break  # they do not overlap
    return [
        Shot(shot.scene, shot.name, shot.fps, np.stack(own), shot.length, shot.shift)
        for (_, shot), own in zip(shots, frames, strict=True)
        if len(own) == shot.length + shot.shift
    ]


def measure_clip(path: Path, frames: Frames, fps: float, quality: str) -> tuple[bytes, bytes]:
    """Fingerprint and movement of frames, once they are encoded at this path."""
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": quality, "threads": "1"}
        for picture in frames:
            even = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode(None))
    [clip] = split_source(str(path), SplitConfig(detector="none", dark_seconds=None), beat=lambda: None).clips
    return clip["fingerprint"], clip["movement"]


Measured = Sequence[tuple[bytes, bytes]]


def found_copies(originals: Measured, copies: Measured, limits: Limits) -> list[bool]:
    """Of each copy, whether it is found to be one of its original, among all of these clips."""
    both = [*originals, *copies]
    values = [pa.array([clip[column] for clip in both], pa.binary()) for column in (0, 1)]

    def groups(number: int) -> Callable[[NDArray[np.int64]], Iterator[ValueGroup]]:
        def give(places: NDArray[np.int64]) -> Iterator[ValueGroup]:
            yield ValueGroup(np.arange(len(places)), lambda: pa.chunked_array([values[number].take(pa.array(places))]))

        return give

    keys = pa.array([f"{number:08d}" for number in range(len(both))])
    found = find_near_duplicates(keys, StoredClips(groups(0), groups(1)), limits)
    kept = {number: duplicate.of for number, duplicate in found.items()}
    count = len(originals)
    return [kept.get(count + number, -1) in (number, kept.get(number, number)) for number in range(count)]


def alike_pairs(shots: Sequence[Shot], clips: Measured, limits: Limits) -> tuple[int, list[tuple[float, str]]]:
    """How many pairs of different clips of a scene there are; cosine and names of those that are taken for copies."""
    appearances = [Appearance(*clip) for clip in clips]
    count, alike = 0, []
    for one, other in combinations(range(len(shots)), 2):
        if shots[one].scene == shots[other].scene:
            count += 1
            cosine = likeness(appearances[one], appearances[other], limits)
            if cosine is not None:
                alike.append((cosine, f"{shots[one].name}, {shots[other].name}"))
    return count, sorted(alike, reverse=True)


def _draw_shots(
    folder: Path, scenes: Sequence[str], clips: int, config: CurateConfig, generator: np.random.Generator
) -> list[Shot]:
    """So many clips, drawn from the videos of a folder in turns."""
    queues = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        scene = next((pattern for pattern in scenes if fnmatch(path.name, pattern)), None)
        try:
            shots = find_shots(path, scene, config, generator)
        except VideoError:
            continue
        queues.append([shots[place] for place in generator.permutation(len(shots))[:clips]])
    found: list[Shot] = []
    while len(found) < clips and any(queues):
        for queue in queues:
            found += [queue.pop()] if queue and len(found) < clips else []
    if not found:
        raise UserError(f"{folder} holds no video with a shot of {_LEAST + _SHIFTS[0]} s in which something moves")
    return found


def run_duplicates_benchmark(
    folder: Path, *, scenes: Sequence[str], clips: int, seed: int, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Recall of copies by kind and false alarms, of the default config and of its pictures alone.

    Args:
        folder: Holds videos.
        scenes: Patterns of file names; files that match one show one scene.
        clips: To be copied.
        seed: Of what is drawn.
        say: Told the figures.

    Raises:
        UserError: the folder holds no video of use.
    """
    config, generator = load_config(CurateConfig, "default"), np.random.default_rng(seed)
    assert config.near_duplicates is not None
    moving = config.moving_duplicates
    ways = {
        "ours": Limits(still=config.near_duplicates, moving=moving.pictures, motion=moving.motion),
        "pictures alone": Limits(still=config.near_duplicates, moving=moving.pictures, motion=None),
    }
    shots = _draw_shots(folder, scenes, clips, config, generator)
    copies: dict[str, list[tuple[bytes, bytes]]] = {kind: [] for kind in KINDS}
    with TemporaryDirectory(prefix="lumos-duplicates-") as scratch:
        path = Path(scratch) / "clip.mp4"
        originals = [measure_clip(path, _clip(shot), shot.fps, "20") for shot in shots]
        for kind, change in KINDS.items():
            quality = _POOR_QUALITY if kind == "encoded" else _QUALITY
            copies[kind] = [measure_clip(path, change(shot, generator), shot.fps, quality) for shot in shots]
    figures = {}
    for name, limits in ways.items():
        recalls = {kind: float(np.mean(found_copies(originals, made, limits))) for kind, made in copies.items()}
        pairs, alike = alike_pairs(shots, originals, limits)
        false_alarms = len(alike) / max(1, pairs)
        told = "  ".join(f"{kind} {recall:.3f}" for kind, recall in recalls.items())
        say(f"{name:15s} {told}  false alarms {false_alarms:.4f} of {pairs} pairs")
        for cosine, pair in alike[:_WORST]:
            say(f"  taken for copies: {pair} (cosine {cosine:.3f})")
        numbers = {"clips": len(shots), "pairs": pairs, "movement_bytes": _mean_bytes(originals)}
        figures[name] = {**recalls, "false_alarms": false_alarms, **numbers}
    return figures


def _mean_bytes(clips: Measured) -> float:
    return round(float(np.mean([len(movement) for _, movement in clips])), 1)
