"""How well clips of no use are told without a model: test bars, planes of colour, noise and cards of text, all moving.

Everything is generated, so that a label is a fact: FFmpeg's own sources of test pictures, noise of several kinds, and
text that appears, rolls or is typed. All of it moves, as what stands still is rejected for that alone. Against it stand
real videos of a folder, of which none should be rejected for one of these scores.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import cv2
import numpy as np
from av.filter import Graph
from numpy.typing import NDArray

from pipelines.config import load_config
from pipelines.data.config import CurateConfig
from pipelines.data.settings import SplitConfig
from pipelines.data.steps.decide import decide
from pipelines.data.video.shots import split_source
from pipelines.decoding.errors import VideoError
from pipelines.errors import UserError

Frames = NDArray[np.uint8]  # [T, H, W, 3]

SCORES = ("noise", "plain_share")  # that are to tell such clips
_SIZE = (640, 360)
_FPS, _SECONDS = 24, 2.5
_COUNT = round(_FPS * _SECONDS)
_QUALITIES = ("18", "24", "30")  # of x264, in turns
_SHORT = 1.0  # seconds, below which clips of real videos do not count
_BARS = ("testsrc", "testsrc2", "smptebars", "smptehdbars", "pal75bars", "pal100bars", "rgbtestsrc", "colorchart")
_WORDS = (
    *("a", "the", "light", "of", "every", "river", "and", "directed", "by", "with", "camera", "music", "produced"),
    *("in", "association", "second", "unit", "story", "EPISODE", "ONE", "Chapter", "1984", "sound", "thanks", "to"),
)


def _source(name: str, options: str = "") -> Frames:
    """Frames of one of FFmpeg's sources."""
    graph = Graph()
    source = graph.add(name, f"rate={_FPS}" + options)
    sink = graph.add("buffersink")
    source.link_to(sink)
    graph.configure()
    pulled = [graph.pull() for _ in range(_COUNT)]
    frames = [frame.reformat(*_SIZE, "rgb24").to_ndarray() for frame in pulled if isinstance(frame, av.VideoFrame)]
    return np.stack(frames).astype(np.uint8)


def _rolled(frames: Frames, axis: int, step: int) -> Frames:
    return np.stack([np.roll(frame, index * step, axis) for index, frame in enumerate(frames)])


def make_bars(number: int, generator: np.random.Generator) -> Frames:
    """Bars and charts; such as stand still are rolled, or have a square that moves over them."""
    frames = _source(_BARS[number % len(_BARS)])
    if number % 3 == 0:
        return _rolled(frames, 1, int(generator.integers(1, 6)))
    for index, frame in enumerate(frames):
        left = (7 * index) % (_SIZE[0] - 40)
        frame[-60:-20, left : left + 40] = generator.integers(0, 256, 3) if index == 0 else frames[0][-40, 20]
    return frames


def make_plane(number: int, generator: np.random.Generator) -> Frames:
    """Planes of one colour that changes, ramps that move, and planes of which chroma alone varies."""
    one, other = generator.integers(30, 226, (2, 3)).astype(np.float32)
    share = (np.sin(np.arange(_COUNT) / 5.0) / 2 + 0.5)[:, None, None, None].astype(np.float32)
    if number % 4 == 0:
        return np.broadcast_to(one + (other - one) * share, (_COUNT, _SIZE[1], _SIZE[0], 3)).astype(np.uint8)
    columns = np.linspace(0, 1, _SIZE[0], dtype=np.float32)[None, None, :, None]
    rows = np.linspace(0, 1, _SIZE[1], dtype=np.float32)[None, :, None, None]
    if number % 4 == 1:
        return np.asarray(one + (other - one) * ((columns + rows) / 2 * 0.6 + 0.4 * share), np.uint8)
    if number % 4 == 2:
        return _source("gradients", f":seed={int(generator.integers(1 << 20))}:speed=0.05")
    planes = np.full((_COUNT, _SIZE[1], _SIZE[0], 3), int(generator.integers(60, 190)), np.float32)
    planes[..., 1:] = 128 + 90 * np.concatenate(np.broadcast_arrays((columns - 0.5) * share, rows - 0.5), axis=3)
    return np.stack([cv2.cvtColor(plane.astype(np.uint8), cv2.COLOR_YCrCb2RGB) for plane in planes])


def make_noise(number: int, generator: np.random.Generator) -> Frames:
    """Grey or coloured noise of several strengths and grain sizes, and dots."""
    grain = (1, 2, 4, 8)[number % 4]
    size = (_COUNT, _SIZE[1] // grain, _SIZE[0] // grain, 1 if number % 2 else 3)
    kind = number // 2 % 3
    if kind == 0:
        values = generator.integers(0, 256, size).astype(np.float64)
    elif kind == 1:
        values = generator.normal(generator.integers(80, 170), generator.integers(25, 60), size)
    else:
        values = np.where(generator.random(size) < 0.3, 235.0, 20.0)
    small = np.broadcast_to(values.clip(0, 255), (*size[:3], 3)).astype(np.uint8)
    return small.repeat(grain, axis=1).repeat(grain, axis=2)


def _line(generator: np.random.Generator, words: int) -> str:
    return " ".join(generator.choice(_WORDS, words))


def _write_lines(picture: NDArray[np.uint8], lines: Sequence[str], top: int, scale: float, ink: Sequence[int]) -> None:
    """Lines of text one below the other, each in the middle."""
    for number, text in enumerate(lines):
        (width, height), _ = cv2.getTextSize(text, _font(scale), scale, 1 + round(scale))
        place = ((picture.shape[1] - width) // 2, top + round(number * 1.8 * height) + height)
        cv2.putText(
            picture, text, place, _font(scale), scale, [int(each) for each in ink], 1 + round(scale), cv2.LINE_AA
        )


def _font(scale: float) -> int:
    return (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX)[round(10 * scale) % 3]


def make_text(number: int, generator: np.random.Generator) -> Frames:
    """Credits that roll, titles that fade in, pages that are typed; on black, white, a colour or a ramp of one."""
    colour = generator.integers(0, 256, 3)
    ramp = np.linspace(0.4, 1, _SIZE[1])[:, None, None]
    ground = (np.zeros(3), np.full(3, 255.0), colour * 1.0, colour * ramp)[number % 4]
    ink = (245, 245, 240) if ground.mean() < 128 else (15, 15, 20)
    scale = float(generator.uniform(0.5, 1.4))
    lines = [_line(generator, int(generator.integers(1, 5))) for _ in range(40)]
    frames = np.broadcast_to(ground.astype(np.uint8), (_COUNT, _SIZE[1], _SIZE[0], 3)).copy()
    kind = number // 4 % 3
    for index, frame in enumerate(frames):
        if kind == 0:
            _write_lines(frame, lines, -4 * index, scale, ink)
        elif kind == 1:
            page = frame.copy()
            _write_lines(page, lines[:3], 90, 1.5 * scale, ink)
            share = min(1.0, index / (_COUNT / 2))
            frame[:] = (frame + share * (page.astype(np.float32) - frame)).astype(np.uint8)
        else:
            shown = 1 + index * 8 // _COUNT
            _write_lines(frame, [*lines[:shown], lines[shown][: 1 + index % 8]], 20, 0.7 * scale, ink)
    return frames


KINDS: dict[str, Callable[[int, np.random.Generator], Frames]] = {
    "bars": make_bars,
    "planes": make_plane,
    "noise": make_noise,
    "text": make_text,
}


def _write(path: Path, frames: Frames, quality: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_FPS)
        stream.width, stream.height, stream.pix_fmt = *_SIZE, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": quality, "threads": "1"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def classify(scores: Mapping[str, float], config: CurateConfig) -> tuple[bool, bool]:
    """Whether a clip is rejected for one of the scores of this benchmark, and whether for another."""
    own = {name: value for name, value in scores.items() if name in SCORES}
    other = {name: value for name, value in scores.items() if name not in SCORES}
    return decide(own, config.bounds)[0] == "rejected", decide(other, config.bounds)[0] == "rejected"


def run_patterns_benchmark(
    folder: Path, *, clips: int, seed: int, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """By kind of generated clip, the share that the default config rejects for its scores; of a folder, what it loses.

    Raises:
        UserError: the folder holds no video.
    """
    config = load_config(CurateConfig, "default")
    found: dict[str, dict[str, float]] = {}
    for kind, make in KINDS.items():
        told = []
        with TemporaryDirectory(prefix="lumos-patterns-") as scratch:
            for number in range(clips):
                path = Path(scratch) / f"{number}.mp4"
                generator = np.random.default_rng([seed, number, *kind.encode()])
                _write(path, make(number, generator), _QUALITIES[number % len(_QUALITIES)])
                [clip] = split_source(str(path), SplitConfig(detector="none"), beat=lambda: None).clips
                told.append(classify(clip["scores"], config))
        own, other = np.array(told).mean(axis=0).tolist()
        found[kind] = {"clips": clips, "recall": own, "rejected_otherwise": other}
        say(f"{kind:8s} {clips} clips: {own:.3f} rejected for these scores, {other:.3f} for others")
    found["real"] = _real(folder, config, say)
    return found


def _real(folder: Path, config: CurateConfig, say: Callable[[str], None]) -> dict[str, float]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in config.source.extensions)
    if not paths:
        raise UserError(f"{folder} holds no video: name a folder of files such as {config.source.extensions[0]}")
    count = lost = rejected = 0
    for path in paths:
        try:
            made = split_source(str(path), config.split, beat=lambda: None).clips
        except VideoError as error:
            say(f"{path.name}: {error}")
            continue
        for clip in made:
            if clip["scores"]["duration"] < _SHORT:
                continue
            own, other = classify(clip["scores"], config)
            count, rejected, lost = count + 1, rejected + own, lost + (own and not other)
            if own:
                values = ", ".join(f"{name} {clip['scores'][name]:.2f}" for name in SCORES)
                say(f"  {path.name} from {clip['start_s']:.1f} s: {values}{', rejected otherwise too' * other}")
    say(f"real     {count} clips of {len(paths)} videos: {rejected} rejected for these scores, {lost} for these alone")
    return {"clips": count, "rejected": rejected, "rejected_for_these_alone": lost}
