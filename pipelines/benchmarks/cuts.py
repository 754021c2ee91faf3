"""How well shots are parted: films made of shots of real videos, joined in several ways, of which every cut is known.

A cut counts as found if an edge of a clip lies at most two frames outside of it; to a dissolve, fade, wipe or flash
belongs every frame that shows neither shot alone. An edge that lies in none is a false alarm; flashes within a shot and
stretches of repeated frames, which films are given besides, are no cuts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import av
import numpy as np
from numpy.typing import NDArray
from scenedetect import AdaptiveDetector, ContentDetector, detect

from pipelines.data.settings import SplitConfig
from pipelines.data.video.shots import split_source
from pipelines.errors import UserError

Kind = Literal["hard", "dissolve", "fade", "wipe", "flash"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Frames = NDArray[np.uint8]  # [T, H, W, 3]

# Of the videos that stand beside the project: frames of each shot, without the transitions between them.
SHOTS: Mapping[str, Sequence[tuple[int, int]]] = {
    "cartoon_12s.mp4": [(16, 138), (148, 236), (238, 278)],
    "great_wall_12s.mp4": [(0, 288)],
    "sintel_30s.mp4": [
        *((24, 66), (92, 148), (178, 214), (258, 285), (287, 310)),
        *((412, 446), (492, 522), (524, 570), (576, 608), (650, 668)),
    ],
    "slides_123s_1080p.mp4": [(220, 300), (1600, 1680), (2200, 2280), (2705, 2780), (2800, 2880), (3040, 3120)],
    # The beginning of the film, of which the tests have two encodings.
    "sintel_10s.mp4": [(112, 164), (215, 239)],
    "sintel_12s_of_30.mp4": [(8, 66), (88, 142), (256, 284)],
}
TOLERANCE = 2  # frames
_SIZE = (320, 180)
_FPS = 24
_LENGTHS = (36, 80)  # frames of a shot, where it has so many
_PURE = 12  # frames of each that show it alone, at least
_SPANS: Mapping[Kind, tuple[int, int]] = {"dissolve": (6, 24), "fade": (5, 12), "wipe": (6, 20), "flash": (1, 3)}
_HOLD = (0, 10)  # frames of black in a fade
_CUTS = 30  # of a film
GIVEN = ("cartoon_12s.mp4", "great_wall_12s.mp4", "sintel_30s.mp4", "slides_123s_1080p.mp4")


@dataclass(frozen=True)
class Cut:
    """Where one shot follows another."""

    kind: Kind
    first: int  # first frame that does not show the one shot alone
    stop: int  # first frame that shows the other alone

    def holds(self, edge: int) -> bool:
        """Whether an edge at a frame tells of it."""
        return self.first - TOLERANCE <= edge <= self.stop + TOLERANCE


def read_shots(folder: Path, names: Sequence[str]) -> list[list[Frames]]:
    """Of each video, its shots.

    Raises:
        UserError: a video is missing.
    """
    found = []
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder / name} does not exist: name the folder that holds {', '.join(names)}")
        stop = max(end for _, end in SHOTS[name])
        with av.open(str(folder / name)) as container:
            decoded: list[Frames] = []
            wanted = {index for first, end in SHOTS[name] for index in range(first, end)}
            for index, frame in enumerate(container.decode(video=0)):
                if index >= stop:
                    break
                small = frame.reformat(*_SIZE, "rgb24", interpolation="AREA") if index in wanted else None
                decoded.append(np.asarray(small.to_ndarray() if small is not None else np.zeros((1, 1, 3)), np.uint8))
        found.append([np.stack(decoded[first:end]) for first, end in SHOTS[name]])
    return found


def make_film(path: Path, videos: Sequence[Sequence[Frames]], kinds: Sequence[Kind], seed: int) -> list[Cut]:
    """Write a film whose shots are joined in these ways, and tell where."""
    generator = np.random.default_rng(seed)
    parts: list[Frames] = []
    cuts: list[Cut] = []
    length, last = 0, (-1, -1)
    for kind in ("hard", *kinds):
        last, shot = _draw(videos, last, generator)
        if not parts:
            parts, length = [shot], len(shot)
            continue
        before = parts.pop()
        span = min(_span(kind, generator), len(before) - _PURE, (len(shot) - _PURE) // 2)
        join = _join(kind, before[len(before) - span :], shot[:span], generator)
        first = length - span
        cuts.append(Cut(kind, first, first + len(join)))
        rest = shot[span:]
        parts += [before[: len(before) - span], join, rest]
        length = first + len(join) + len(rest)
    _write(path, _disturb(np.concatenate(parts), cuts, generator))
    return cuts


def _draw(
    videos: Sequence[Sequence[Frames]], last: tuple[int, int], generator: np.random.Generator
) -> tuple[tuple[int, int], Frames]:
    """Another shot than the last, and some of its frames; of slides no two follow one another."""
    places = [(one, two) for one, video in enumerate(videos) for two in range(len(video)) if (one, two) != last]
    still = [place for place in places if _is_still(videos[place[0]][place[1]])]
    if last != (-1, -1) and _is_still(videos[last[0]][last[1]]):
        places = [place for place in places if place not in still]
    one, two = places[int(generator.integers(len(places)))]
    shot = videos[one][two]
    wanted = int(generator.integers(min(_LENGTHS[0], len(shot)), min(_LENGTHS[1], len(shot)) + 1))
    first = int(generator.integers(0, len(shot) - wanted + 1))
    return (one, two), shot[first : first + wanted]


def _is_still(shot: Frames) -> bool:
    return float(np.abs(shot[0].astype(np.int16) - shot[-1]).mean()) < 1.0


def _span(kind: Kind, generator: np.random.Generator) -> int:
    return 0 if kind == "hard" else int(generator.integers(_SPANS[kind][0], _SPANS[kind][1] + 1))


def _join(kind: Kind, one: Frames, other: Frames, generator: np.random.Generator) -> Frames:
    """The frames between two shots, from the last of one and the first of the other."""
    span = len(one)
    share = (np.arange(span, dtype=np.float32) + 1)[:, None, None, None] / (span + 1)
    if kind == "dissolve":
        joined = one + (other - one.astype(np.float32)) * share
    elif kind == "wipe":
        columns, rows = np.arange(_SIZE[0]) / _SIZE[0], np.arange(_SIZE[1])[:, None] / _SIZE[1]
        phase = [columns + 0 * rows, 1 - columns + 0 * rows, rows + 0 * columns, (rows + columns) / 2]
        joined = np.where(phase[int(generator.integers(4))][None, :, :, None] < share, other, one)
    else:
        tone = 0.0 if kind == "fade" else 255.0
        hold = int(generator.integers(_HOLD[0], _HOLD[1] + 1)) if kind == "fade" else 0
        between = np.full((hold, *one.shape[1:]), tone, np.float32)
        joined = np.concatenate([one + (tone - one) * share, between, other + (tone - other) * share[::-1]])
    return joined.clip(0, 255).astype(np.uint8)


def _disturb(film: Frames, cuts: Sequence[Cut], generator: np.random.Generator) -> Frames:
    """Give some shots a flash, others frames that stand still, at the same length."""
    edges = [0, *(edge for cut in cuts for edge in (cut.first, cut.stop)), len(film)]
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        if end - begin < 24:
            continue
        middle = (begin + end) // 2
        kind = generator.integers(6)
        if kind == 0:
            film[middle : middle + int(generator.integers(1, 3))] = 255
        elif kind == 1:
            film[middle : middle + 8] = film[middle]
    return film


def _write(path: Path, film: Frames) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_FPS)
        stream.width, stream.height, stream.pix_fmt = *_SIZE, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "21", "threads": "1"}
        for picture in film:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


@dataclass
class Tally:
    """What was found of the cuts of some films."""

    there: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    found: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    false: int = 0  # edges that tell of no cut

    def add(self, cuts: Sequence[Cut], edges: Sequence[int]) -> None:
        """Compare the cuts of a film with edges that were told."""
        for cut in cuts:
            self.there[cut.kind] += 1
            self.found[cut.kind] += any(cut.holds(edge) for edge in edges)
        self.false += sum(not any(cut.holds(edge) for cut in cuts) for edge in edges)

    def recall(self, *kinds: Kind) -> float:
        """Share of the cuts of these kinds that were found; of all, if none is named."""
        wanted = kinds or KINDS
        return sum(self.found[kind] for kind in wanted) / max(1, sum(self.there[kind] for kind in wanted))

    @property
    def precision(self) -> float:
        """Of what was told, the share that is a cut; the edges in one cut count once."""
        found = sum(self.found.values())
        return found / max(1, found + self.false)

    def figures(self) -> dict[str, float]:
        """Recall by kind and of all, and precision."""
        recalls = {kind: self.recall(kind) for kind in KINDS} | {"all": self.recall()}
        return {name: round(value, 3) for name, value in (recalls | {"precision": self.precision}).items()}


def our_edges(path: Path, config: SplitConfig) -> list[int]:
    """Where clips begin, but for the first."""
    clips = split_source(str(path), config, beat=lambda: None).clips
    return [round(clip["start_s"] * _FPS) for clip in clips[1:]]


def their_edges(path: Path, detector: ContentDetector) -> list[int]:
    """Where PySceneDetect has scenes begin."""
    return [start.frame_num for start, _ in detect(str(path), detector)[1:]]


def run_cuts_benchmark(
    folder: Path, names: Sequence[str], *, cuts: int, seed: int, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Figures of ours, of ours without the second measure, and of PySceneDetect's detectors as they are by default.

    Raises:
        UserError: a video is missing.
    """
    ways: dict[str, Callable[[Path], list[int]]] = {
        "ours": lambda path: our_edges(path, SplitConfig(dark_seconds=None)),
        "ours, first measure alone": lambda path: our_edges(path, SplitConfig(dark_seconds=None, transitions=False)),
        "PySceneDetect adaptive": lambda path: their_edges(path, AdaptiveDetector()),
        "PySceneDetect content": lambda path: their_edges(path, ContentDetector()),
    }
    tallies = {name: Tally() for name in ways}
    videos = read_shots(folder, names)
    generator = np.random.default_rng(seed)
    with TemporaryDirectory(prefix="lumos-cuts-") as scratch:
        for number in range(-(-cuts // _CUTS)):
            film = Path(scratch) / f"{number}.mp4"
            kinds = [KINDS[index % len(KINDS)] for index in generator.permutation(min(_CUTS, cuts - number * _CUTS))]
            made = make_film(film, videos, kinds, seed * 1000 + number)
            for name, way in ways.items():
                tallies[name].add(made, way(film))
    for name, tally in tallies.items():
        told = "  ".join(f"{key} {value:.3f}" for key, value in tally.figures().items())
        say(f"{name:26s} {told}")
    return {name: tally.figures() | {"cuts": sum(tally.there.values())} for name, tally in tallies.items()}
