"""Copies are told from other clips of the same scene: synthetic gestures before one background."""

import cv2
import numpy as np
import pytest

from pipelines.data.steps import likeness as module
from pipelines.data.steps.likeness import Appearance, Limits, likeness, similarity
from pipelines.data.video.fingerprint import make_fingerprint, rgb_thumbnail
from pipelines.data.video.movement import CELLS, make_movement, measure_cells

LIMITS = Limits(still=0.99, moving=0.9, motion=0.75)
ALONE = Limits(still=0.99, moving=0.9, motion=None)
HEIGHT, WIDTH, FPS = 144, 256, 24


def gesture(seed, seconds=3.0, *, start=0.0, speed=1.0, moves=True):
    """Two discs, as hands, that move before a background which is always the same: RGB frames."""
    coarse = np.random.default_rng(7).integers(30, 220, (5, 8, 3)).astype(np.uint8)
    scene = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    paces, phases = np.random.default_rng(seed).uniform([[2], [0]], [[7], [6]], (2, 4))
    frames = np.repeat(scene[None], round(seconds * FPS), axis=0)
    for number, frame in enumerate(frames):
        time = start + speed * number / FPS if moves else 0.0
        swing = np.sin(paces * time + phases)
        for hand, middle in enumerate((90, 166)):
            centre = round(middle + 30 * swing[2 * hand]), round(85 + 32 * swing[2 * hand + 1])
            cv2.circle(frame, centre, 13, (225, 180, 150), -1)
    return frames


def appearance(frames, *, is_known=True):
    times = [number / FPS for number in range(0, len(frames), 3)]
    thumbnails = [(time, rgb_thumbnail(frame).tobytes()) for time, frame in zip(times, frames[::3], strict=True)]
    cells = [measure_cells(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)) for frame in frames[::3]]
    end = len(frames) / FPS
    movement = make_movement(times, cells, 0.0, end) if is_known else None
    return Appearance(make_fingerprint(thumbnails, 0.0, end), movement)


def logo(frames):
    marked = frames.copy()
    marked[:, 6:24, 6:48] = (250, 240, 40)
    return marked


COPIES = {
    "same": lambda seed: gesture(seed),
    "darker": lambda seed: (gesture(seed) * 0.8).astype(np.uint8),
    "cropped": lambda seed: gesture(seed)[:, 7:, 4:-8],
    "later": lambda seed: gesture(seed, start=0.4),
    "earlier and longer": lambda seed: gesture(seed, 4.5, start=-0.6),
    "a part": lambda seed: gesture(seed)[20:],
    "mirrored": lambda seed: gesture(seed)[:, :, ::-1],
    "logo": lambda seed: logo(gesture(seed)),
    "faster": lambda seed: gesture(seed, speed=1.1),
    "slower": lambda seed: gesture(seed, speed=1 / 1.1),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_a_gesture_are_found_in_either_order(kind):
    for seed in range(2):
        one, other = appearance(gesture(seed)), appearance(COPIES[kind](seed))
        cosine = likeness(one, other, LIMITS)
        assert cosine is not None, seed
        assert LIMITS.moving <= cosine <= 1.0001
        assert likeness(other, one, LIMITS) == cosine


def test_other_gestures_before_the_same_background_are_no_copies():
    clips = [appearance(gesture(seed)) for seed in range(9)]
    pairs = [(one, other) for number, one in enumerate(clips) for other in clips[:number]]
    alike = [likeness(one, other, LIMITS) for one, other in pairs]
    assert sum(cosine is not None for cosine in alike) == 0
    by_pictures = [similarity(one.pictures, other.pictures) for one, other in pairs]
    assert min(by_pictures) > LIMITS.moving, "their pictures alone would not tell them apart"


def test_two_fades_are_no_copies_of_each_other():
    share = np.linspace(0, 1, 72)[:, None, None, None]
    one, other, again = (appearance((gesture(seed) * share).astype(np.uint8)) for seed in (0, 1, 0))
    assert likeness(one, other, LIMITS) is None
    assert likeness(one, again, LIMITS) == pytest.approx(1.0)


def test_what_is_unknown_of_movement_leaves_the_pictures_to_decide():
    known, unknown = appearance(gesture(0)), appearance(gesture(0), is_known=False)
    other, loose = appearance(gesture(1)), Limits(still=0.9, moving=0.9, motion=0.75)
    assert likeness(known, unknown, LIMITS) == pytest.approx(1.0)
    assert likeness(other, unknown, loose) == similarity(other.pictures, unknown.pictures)
    assert likeness(other, known, loose) is None
    assert likeness(other, known, Limits(still=0.9, moving=0.9, motion=None)) is not None


def test_where_nothing_moves_the_pictures_decide_mirrored_too():
    still, same, mirrored = (appearance(frames) for frames in (*[gesture(0, moves=False)] * 2, gesture(0)[:, :, ::-1]))
    assert still.movement.is_still
    assert likeness(still, same, LIMITS) == pytest.approx(1.0)
    assert likeness(still, appearance(gesture(0, moves=False)[:, :, ::-1]), LIMITS) == pytest.approx(1.0)
    assert likeness(still, mirrored, LIMITS) is None, "one of the two moves"
    assert likeness(still, appearance(gesture(0, moves=False)[:, 20:, 40:]), LIMITS) is None


def test_the_best_offset_is_that_of_every_window_tried():
    generator = np.random.default_rng(0)
    for lengths in ((18, 18), (12, 30), (25, 9), (7, 6)):
        one, other = (generator.integers(-7, 8, (length, CELLS)).astype(float) for length in lengths)
        tracks = [module._Track(samples, 10, 0) for samples in (one, other)]
        found = {}
        for offset in range(-lengths[0], lengths[1]):
            first, second = one[max(0, -offset) :], other[max(0, offset) :]
            count = min(len(first), len(second))
            if count >= max(module._LEAST_SAMPLES, module._OVERLAP * min(lengths)):
                first, second = (each[:count] - each[:count].mean(axis=0) for each in (first, second))
                found[offset] = (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())
        cosine, offset = module._best_offset(*tracks)
        assert offset == max(found, key=found.get)
        assert cosine == pytest.approx(found[offset])


def test_in_which_order_numbers_are_added_up_changes_nothing(monkeypatch):
    one, other = appearance(gesture(0)), appearance(gesture(0)[:, 6:, 6:])
    expected = likeness(one, other, LIMITS)
    order = np.random.default_rng(0).permutation(CELLS)
    tracks = [module._Track(each.movement.samples, 10, 5) for each in (one, other)]
    shuffled = [module._Track(each.movement.samples[:, order], 10, 5) for each in (one, other)]
    assert module._best_offset(*tracks) == module._best_offset(*shuffled)
    assert expected == likeness(one, other, LIMITS)
