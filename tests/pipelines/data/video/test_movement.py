"""What is measured of movement: not brightness, not fades, and the same at every frame rate and in a mirror."""

import numpy as np
import pytest

from pipelines.data.video.movement import CELLS, MAX_SECONDS, RATE, Movement, make_movement, measure_cells

SIZE = (144, 256)


def background(seed=0):
    coarse = np.random.default_rng(seed).integers(40, 200, (9, 16)).astype(np.float64)
    return np.kron(coarse, np.ones((16, 16)))


def moving(times, seed=0):
    """A bright disc on a path over a background: luma of each instant."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    phases = np.random.default_rng([seed, 1]).uniform(0, 6, 2)
    for time in times:
        centre = 72 + 40 * np.sin(3 * time + phases[0]), 128 + 80 * np.cos(4 * time + phases[1])
        disc = np.hypot(rows - centre[0], columns - centre[1]) < 24
        yield np.where(disc, 235.0, background())


def movement(times, pictures, end=None):
    cells = [measure_cells(picture.round().clip(0, 255).astype(np.uint8)) for picture in pictures]
    return Movement(make_movement(list(times), cells, 0.0, end or times[-1] + 0.1))


def cosine(one, other):
    count = min(len(one), len(other))
    return (one[:count] * other[:count]).sum() / np.sqrt((one[:count] ** 2).sum() * (other[:count] ** 2).sum())


TIMES = np.arange(24) / 8


def test_a_disc_that_moves_is_seen_where_it_is():
    found = movement(TIMES, moving(TIMES))
    assert not found.is_still
    assert len(found.packed) == 2 + len(found.samples) * CELLS // 2 <= 700
    assert len(found.samples) == int(TIMES[-1] * RATE) + 1
    for number, picture in enumerate(moving(np.arange(len(found.samples)) / RATE)):
        brighter = measure_cells((picture - background()).clip(0, 255).astype(np.uint8)).ravel() > 64 * 60
        if brighter.any():
            assert found.samples[number][brighter].mean() > found.samples[number][~brighter].mean() + 1


@pytest.mark.parametrize("change", [lambda time: 1.0, lambda time: min(1, 0.2 + time / 2), lambda time: 0.7 - time / 8])
def test_a_still_picture_is_still_though_it_fades(change):
    assert movement(TIMES, (background() * change(time) for time in TIMES)).is_still


def test_brightness_that_is_added_is_no_movement():
    assert movement(TIMES, (background() + 5 * time for time in TIMES)).is_still


def test_a_fade_changes_little_of_what_moves():
    plain = movement(TIMES, moving(TIMES))
    faded = movement(TIMES, (picture * min(1, time) for picture, time in zip(moving(TIMES), TIMES, strict=True)))
    assert cosine(plain.samples[RATE + 1 :], faded.samples[RATE + 1 :]) > 0.8


@pytest.mark.parametrize("rate", [6, 7.5, 10])
def test_frame_rate_changes_little(rate):
    times = np.arange(0, TIMES[-1], 1 / rate)
    assert cosine(movement(TIMES, moving(TIMES)).samples, movement(times, moving(times)).samples) > 0.9


def test_another_path_is_another_movement():
    one, other = (movement(TIMES, moving(TIMES, seed)).samples for seed in (0, 1))
    assert cosine(one, other) < 0.5


def test_a_mirrored_film_has_the_mirrored_samples():
    plain = movement(TIMES, moving(TIMES)).samples.reshape(-1, 8, 8)
    mirrored = movement(TIMES, (picture[:, ::-1] for picture in moving(TIMES))).samples.reshape(-1, 8, 8)
    assert np.array_equal(plain[:, :, ::-1], mirrored)


def test_what_is_too_short_or_too_long_has_none():
    assert not movement(TIMES[:1], moving(TIMES[:1])).is_known
    assert not movement(TIMES, moving(TIMES), end=MAX_SECONDS + 1).is_known
    assert movement(TIMES[:2], moving(TIMES[:2])).is_known
