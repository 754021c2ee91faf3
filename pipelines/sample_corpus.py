"""The sample corpus: one coloured shape moving over one background, as real H.264 files.

Everything is drawn here, so the demo needs no data and no network. Clips have 13 frames of 96x96 px at 12 fps; curation
halves them to 48x48 px, which is a latent grid of 4x6x6 under a 4x8x8 tokenizer. The geometry is chosen for that grid:
shapes are made of whole latent cells, start on cells, and move one cell in the time of one latent step. A few hundred
different tokens then describe everything, so that a small model has something to learn in a few minutes on a CPU.

One combination of (shape, colour, background, direction) in six never appears in training: these are the demo's
prompts. Every single value, and every pair of values, is seen in training.
"""

import csv
import functools
import itertools
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

SIDE = 96
CELL = 16  # source px of a latent cell
FPS = 12
NUM_FRAMES = 13
STEP = 4  # source px per frame: one latent cell in the 4 frames of one latent step

SHAPES = ("square", "bar", "column", "diagonal")
SIZES = {"small": 32, "large": 48}  # side of the bounding box, source px
COLORS = {
    "red": (214, 38, 44),
    "green": (34, 160, 62),
    "blue": (44, 72, 220),
    "yellow": (244, 212, 44),
    "purple": (190, 56, 206),
    "cyan": (48, 200, 216),
}
BACKGROUNDS = {"white": (240, 240, 236), "gray": (138, 146, 152), "dark": (40, 42, 50), "brown": (116, 80, 56)}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (dy, dx)
_VALUES: dict[str, Iterable[str]] = {
    "shape": SHAPES,
    "size": SIZES,
    "color": COLORS,
    "background": BACKGROUNDS,
    "direction": DIRECTIONS,
}

# All of one length in tokens, since sequences of equal length are attended together, which is faster.
WORDINGS = (
    "A {size} {color} {shape} moves {direction} in front of a {background} background.",
    "On a {background} background, a {size} {color} {shape} is moving {direction}.",
    "A {color} {shape} of {size} size slides {direction} across a {background} background.",
    "A {background} background with a {size} {color} {shape} that is traveling {direction}.",
    "Video of a {size} {color} {shape} going {direction} on a {background} background.",
)

# The files that curation must not keep, and why; `write_corpus` adds them to every corpus.
BAD_FILES = {
    "bad_static_1.mp4": "static",
    "bad_static_2.mp4": "static",
    "bad_black.mp4": "black",
    "bad_truncated_1.mp4": "truncated",
    "bad_truncated_2.mp4": "truncated",
    "bad_not_a_video.mp4": "not a video",
    "bad_too_short_1.mp4": "too short",
    "bad_too_short_2.mp4": "too short",
    "bad_duplicate.mp4": "exact duplicate of clip_00000.mp4",
}


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Everything that determines one clip, in which the subject stays in view."""

    shape: str
    size: str
    color: str
    background: str
    direction: str
    top: int  # first row of the subject's bounding box in the first frame, source px
    left: int  # first column of it
    wording: int = 0  # index into WORDINGS

    def __post_init__(self) -> None:
        for name, known in _VALUES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if not 0 <= self.wording < len(WORDINGS):
            raise ValueError(f"wording {self.wording} is not in 0..{len(WORDINGS) - 1}")
        dy, dx = DIRECTIONS[self.direction]
        for name, start, move in (("top", self.top, dy), ("left", self.left, dx)):
            end = start + move * STEP * (NUM_FRAMES - 1)
            if min(start, end) < 0 or max(start, end) + SIZES[self.size] > SIDE:
                raise ValueError(f"{name} {start} moves the {self.size} subject out of the {SIDE} px frame")

    @property
    def caption(self) -> str:
        """The caption in this clip's wording; it names all five attributes."""
        return WORDINGS[self.wording].format(**vars(self))

    @property
    def combination(self) -> tuple[str, str, str, str]:
        """What the held-out rule looks at: shape, colour, background, direction."""
        return (self.shape, self.color, self.background, self.direction)


@functools.cache
def held_out_combinations() -> frozenset[tuple[str, str, str, str]]:
    """The 64 combinations (shape, colour, background, direction) of 384 that training never sees.

    One colour for each shape, background and direction, by a linear rule, so that every value is held out about
    equally often and every pair of values remains in training.
    """
    colors = tuple(COLORS)
    held_out = set()
    for (s, shape), (b, background), (d, direction) in itertools.product(
        enumerate(SHAPES), enumerate(BACKGROUNDS), enumerate(DIRECTIONS)
    ):
        held_out.add((shape, colors[(s + 2 * b + 3 * d + (b * d) // 3) % len(colors)], background, direction))
    return frozenset(held_out)


def start_positions(size: str, direction: str) -> list[tuple[int, int]]:
    """All (top, left) on the lattice from which a subject of this size moves in this direction and stays in view."""
    travel = STEP * (NUM_FRAMES - 1)
    dy, dx = DIRECTIONS[direction]

    def fits(start: int, move: int) -> bool:
        return max(0, -move * travel) <= start <= SIDE - SIZES[size] - max(0, move * travel)

    lattice = range(0, SIDE, CELL)
    return [(top, left) for top in lattice for left in lattice if fits(top, dy) and fits(left, dx)]


def sample_specs(seed: int, n: int) -> list[ClipSpec]:
    """Draw `n` training clips, none of a held-out combination.

    The 640 kinds of clip left (320 combinations, 2 sizes) are dealt like a shuffled deck, again and again, so that
    they are balanced for any `n`; start position and wording are drawn for each clip. No two of up to 2,560 clips show
    the same.
    """
    generator = np.random.default_rng([seed, 0])
    kinds = [
        (shape, size, color, background, direction)
        for shape, size, color, background, direction in itertools.product(*_VALUES.values())
        if (shape, color, background, direction) not in held_out_combinations()
    ]
    # Every start of a kind is used once before any is used again: two clips of one picture would be exact duplicates.
    starts: dict[int, list[tuple[int, int]]] = {}
    specs: list[ClipSpec] = []
    while len(specs) < n:
        for index in generator.permutation(len(kinds)):
            if not starts.get(index):
                _, size, _, _, direction = kinds[index]
                starts[index] = start_positions(size, direction)
                generator.shuffle(starts[index])
            specs.append(_make_spec(kinds[index], starts[index].pop(), generator))
    return specs[:n]


def held_out_specs(seed: int) -> list[ClipSpec]:
    """One clip for each of the 64 held-out combinations, in a fixed order; half of them small.

    These give the demo's prompts (their captions). Their rendering is what a perfect model would make, up to the
    start position. The seed decides wordings and start positions.
    """
    generator = np.random.default_rng([seed, 1])
    # A fixed shuffle, so that neighbours differ and no size is tied to an attribute by the sorted order.
    order = np.random.default_rng(0).permutation(len(held_out_combinations()))
    combinations = [sorted(held_out_combinations())[index] for index in order]
    sizes = itertools.cycle(SIZES)
    specs = []
    for (shape, color, background, direction), size in zip(combinations, sizes, strict=False):
        starts = start_positions(size, direction)
        start = starts[int(generator.integers(len(starts)))]
        specs.append(_make_spec((shape, size, color, background, direction), start, generator))
    return specs


def _make_spec(kind: Sequence[str], start: tuple[int, int], generator: np.random.Generator) -> ClipSpec:
    """A clip in a wording drawn for it."""
    attributes = dict(zip(_VALUES, kind, strict=True))
    return ClipSpec(**attributes, top=start[0], left=start[1], wording=int(generator.integers(len(WORDINGS))))


@functools.cache
def shape_mask(shape: str, size: str, side: int | None = None) -> NDArray[np.float32]:
    """Coverage of a shape in its square bounding box, [side, side], 0..1.

    A shape is made of two by two or three by three cells, by its size. Sides (px) other than the size's own are
    antialiased.
    """
    cells = SIZES[size] // CELL
    pattern = np.zeros((cells, cells), dtype=np.float32)
    if shape == "square":
        pattern[:] = 1
    elif shape == "bar":
        pattern[cells // 2] = 1
    elif shape == "column":
        pattern[:, cells // 2] = 1
    elif shape == "diagonal":
        np.fill_diagonal(pattern, 1)
    else:
        raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    side = side or SIZES[size]
    fine = pattern.repeat(side, axis=0).repeat(side, axis=1)  # [cells * side, cells * side]
    mask: NDArray[np.float32] = fine.reshape(side, cells, side, cells).mean(axis=(1, 3)).astype(np.float32)
    mask.setflags(write=False)
    return mask


def render_clip(spec: ClipSpec, num_frames: int = NUM_FRAMES, step: int = STEP) -> NDArray[np.uint8]:
    """Draw a clip, uint8 [num_frames, 96, 96, 3], RGB.

    Args:
        spec: What to draw.
        num_frames: At most `NUM_FRAMES`, for which `spec` was checked.
        step: Motion in source px per frame; 0 is a still image, the default is what training sees.
    """
    side = SIZES[spec.size]
    coverage = shape_mask(spec.shape, spec.size)[:, :, None]
    paint = np.asarray(COLORS[spec.color], dtype=np.float32)
    dy, dx = DIRECTIONS[spec.direction]
    frames = np.full((num_frames, SIDE, SIDE, 3), BACKGROUNDS[spec.background], dtype=np.float32)
    for index, frame in enumerate(frames):
        top, left = spec.top + dy * step * index, spec.left + dx * step * index
        box = frame[top : top + side, left : left + side]
        box += coverage * (paint - box)
    return np.rint(frames).astype(np.uint8)


def write_video(path: Path, frames: NDArray[np.uint8], fps: int = FPS) -> None:
    """Encode RGB frames [T, H, W, 3], of even height and width, as H.264 in mp4, visually lossless (crf 14).

    The same frames give the same bytes.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Still videos came out in one of two encodings, about once in a hundred, while macroblock-tree rate control was
        # on and the encoder converted the colours itself.
        stream.options = {"preset": "veryfast", "crf": "14", "threads": "1", "bf": "0", "x264-params": "mbtree=0"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def write_corpus(directory: Path | str, seed: int, num_clips: int) -> list[ClipSpec]:
    """Write a corpus: `num_clips` good clips, the `BAD_FILES`, and captions.csv (path, caption) naming them all.

    The same seed and number, at least 2, give the same bytes. Existing files of these names are replaced.

    Returns:
        The specs of the good clips; clip i is the file clip_{i:05d}.mp4.
    """
    if num_clips < 2:
        raise ValueError(f"num_clips is {num_clips}; a corpus needs at least 2 clips")
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    specs = sample_specs(seed, num_clips)
    paths = [root / f"clip_{index:05d}.mp4" for index in range(num_clips)]

    with ThreadPoolExecutor(2) as pool:  # x264 releases the GIL
        list(pool.map(lambda path, spec: write_video(path, render_clip(spec)), paths, specs))
    _write_bad_files(root, specs)
    rows = [(path.name, spec.caption) for path, spec in zip(paths, specs, strict=True)]
    rows += [(name, specs[index % num_clips].caption) for index, name in enumerate(BAD_FILES)]
    with (root / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "caption"))
        writer.writerows(rows)
    return specs


def _write_bad_files(root: Path, specs: Sequence[ClipSpec]) -> None:
    first, second = specs[0], specs[1]
    write_video(root / "bad_static_1.mp4", render_clip(first, step=0))
    write_video(root / "bad_static_2.mp4", render_clip(second, step=0))
    write_video(root / "bad_black.mp4", np.zeros((NUM_FRAMES, SIDE, SIDE, 3), dtype=np.uint8))
    for name, source in (("bad_truncated_1.mp4", 0), ("bad_truncated_2.mp4", 1)):
        # The index of an mp4 file lies at its end, so half a file cannot be opened.
        data = (root / f"clip_{source:05d}.mp4").read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])
    (root / "bad_not_a_video.mp4").write_text("This is text under the name of a video.\n" * 40, encoding="utf-8")
    write_video(root / "bad_too_short_1.mp4", render_clip(first, num_frames=4))
    write_video(root / "bad_too_short_2.mp4", render_clip(second, num_frames=5))
    shutil.copyfile(root / "clip_00000.mp4", root / "bad_duplicate.mp4")
