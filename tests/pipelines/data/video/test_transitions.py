"""The second measure of cuts: what it sees alone, and that with it films made of known shots fall apart rightly."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.benchmarks.cuts import Cut, Tally, run_cuts_benchmark
from pipelines.data.settings import SplitConfig
from pipelines.data.video.shots import join_cuts, split_source
from pipelines.data.video.transitions import (
    REACH,
    Judgement,
    Transition,
    TransitionMeter,
    _network,
    describe,
    judge,
    measure_steps,
)
from tests.pipelines.data.videos import moving_square, write_video

CLIPS = Path(__file__).parent / "clips"
FILM = ("sintel_10s.mp4", "sintel_12s_of_30.mp4")


def picture(seed, low=20, high=230):
    coarse = np.random.default_rng(seed).integers(low, high, (3, 9, 16))
    return np.kron(coarse, np.ones((1, 8, 8))).astype(np.uint8)


def transitions(frames, step=1 / 24):
    meter = TransitionMeter()
    for index, frame in enumerate(frames):
        meter.add(index * step, frame)
    judged = meter.finish()
    return judged.transitions, judged.sure


def test_a_cut_is_told_at_its_frame_and_one_shot_has_none():
    one, other = [picture(1)] * 30, [picture(2)] * 30
    found, sure = transitions(one + other)
    assert found == [Transition(30, 30, is_cut=True)]
    assert sure[30] > 0.9
    assert np.delete(sure, 30).max() < 0.5
    assert transitions(one * 2)[0] == []


def test_a_cut_between_two_blue_pictures_is_told():
    one, other = picture(3, 60, 130), picture(4, 60, 130)
    for each in (one, other):
        each[1], each[2] = 200, 100
    assert transitions([one] * 30 + [other] * 30)[0] == [Transition(30, 30, is_cut=True)]


@pytest.mark.parametrize("length", [6, 12, 20])
def test_a_dissolve_is_told_as_a_whole(length):
    one, other = picture(1), picture(2)
    shares = (np.arange(length) + 1) / (length + 1)
    mixed = [(one + (other.astype(float) - one) * share).astype(np.uint8) for share in shares]
    [found] = transitions([one] * 40 + mixed + [other] * 40)[0]
    assert abs(found.first - 40) <= 2
    assert abs(found.stop - 40 - length) <= 2


def test_a_flash_is_none_and_a_film_may_be_as_short_as_a_frame():
    flash = np.stack([np.full((72, 128), level, np.uint8) for level in (255, 128, 128)])
    assert transitions([picture(1)] * 30 + [flash] + [picture(1)] * 30)[0] == []
    assert transitions([])[0] == transitions([picture(1)])[0] == []
    assert len(transitions([picture(1), picture(2)])[1]) == 2


def test_frames_come_in_any_number_and_at_any_rate():
    one, other = [picture(1)] * 200, [picture(2)] * 200
    assert transitions(one + other)[0] == [Transition(200, 200, is_cut=True)]
    [found] = transitions(one + other, step=1 / 60)[0]  # of which every second one is looked at
    assert 198 <= found.first <= 200 <= found.stop <= 202


def test_in_which_order_numbers_are_added_up_changes_nothing(monkeypatch):
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (2 * REACH + 30, 3, 36, 64)).astype(np.uint8)
    described = [np.stack(kind) for kind in zip(*map(describe, frames), strict=True)]
    measured = measure_steps(described)
    turned = [kind[:, random.permutation(kind.shape[1])] for kind in described]
    assert np.array_equal(measure_steps(turned), measured)
    judged = judge(measured)
    assert len(np.unique(judged)) > 5
    order = random.permutation(measured.shape[1])
    (weights, biases), *others = _network()
    monkeypatch.setattr("pipelines.data.video.transitions._network", lambda: [(weights[order], biases), *others])
    assert np.array_equal(judge(measured[:, order]), judged)


@pytest.mark.slow
def test_no_kind_of_cpu_tells_another_digit():
    program = (
        "from tests.pipelines.data.video.test_transitions import picture, transitions\n"
        "import numpy as np\n"
        "noise = np.random.default_rng(0).normal(0, 4, (300, 3, 72, 128))\n"
        "shares = [max(0, n % 40 - 30) / 10 for n in range(300)]\n"
        "mixed = [picture(n // 40) * (1 - s) + picture(n // 40 + 1) * s for n, s in enumerate(shares)]\n"
        "print(*transitions((mixed + noise).clip(0, 255).astype(np.uint8))[1].tolist())"
    )
    told = set()
    for kind, lacking in (("SkylakeX", ""), ("Haswell", "X86_V4"), ("Nehalem", "X86_V4 X86_V3")):
        environment = {**os.environ, "OPENBLAS_CORETYPE": kind, "NPY_DISABLE_CPU_FEATURES": lacking}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        told.add(done.stdout)
    assert len(told) == 1
    assert len(set(told.pop().split())) > 10


def test_the_second_measure_denies_and_adds():
    sure, across = np.zeros((2, 100), np.float32)
    sure[[20, 60]], across[80] = (0.3, 1), 1.2

    def joined(cuts, *transitions):
        return join_cuts(cuts, Judgement(list(transitions), sure, across, np.arange(len(sure))))

    assert joined([20, 40, 80], Transition(60, 60)) == [20, 60, 80]
    assert joined([61], Transition(60, 60)) == [60]
    assert joined([65], Transition(60, 70)) == [60, 70]
    assert joined([61], Transition(60, 62, is_cut=True)) == [61]
    assert joined([], Transition(60, 62, is_cut=True)) == [62]


@pytest.mark.parametrize("every", [2, 5])
def test_a_film_that_repeats_its_frames_stays_whole(tmp_path, every):
    frames = np.repeat(moving_square(40, size=(128, 96), side=40), every, axis=0)
    path = write_video(tmp_path / "a.mp4", frames, fps=12 * every)
    [clip] = split_source(str(path), SplitConfig(), beat=lambda: None).clips
    assert clip["scores"]["repeat_share"] > 0.4
    assert clip["scores"]["cut"] < 0.5


def test_a_clip_tells_of_a_cut_that_is_left_inside(tmp_path):
    frames = np.concatenate([moving_square(22, seed=1), 255 - moving_square(22, seed=2)])
    path = write_video(tmp_path / "a.mp4", frames)
    [whole] = split_source(str(path), SplitConfig(detector="none"), beat=lambda: None).clips
    assert whole["scores"]["cut"] > 0.9
    parts = split_source(str(path), SplitConfig(), beat=lambda: None).clips
    assert [clip["scores"]["cut"] < 0.5 for clip in parts] == [True, True]


def test_what_counts_as_found():
    tally = Tally()
    tally.add([Cut("hard", 10, 10), Cut("dissolve", 50, 60)], [12, 48, 62, 80])
    assert (tally.recall("hard"), tally.recall("dissolve"), tally.false) == (1, 1, 1)
    tally.add([Cut("hard", 10, 10)], [13])
    assert tally.recall("hard") == 0.5
    assert tally.figures()["precision"] == 0.5


@pytest.mark.slow  # test_shots.py parts a real film by the same measure
@pytest.mark.parametrize("cuts", [30, 210])
def test_cuts_of_every_kind_are_found_in_films_made_of_a_real_one(cuts):
    found = run_cuts_benchmark(CLIPS, FILM, cuts=cuts, seed=1, say=print)
    ours = found["ours"]
    assert ours["cuts"] == cuts
    assert ours["hard"] >= 0.98
    assert ours["all"] >= 0.9
    assert ours["precision"] >= 0.9
    assert ours["all"] > max(theirs["all"] for name, theirs in found.items() if name != "ours")
