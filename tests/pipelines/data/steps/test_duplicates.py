from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.curate import curate
from pipelines.data.settings import SplitConfig
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.stage import tasks
from pipelines.data.stage.values import ValueGroup
from pipelines.data.steps import duplicates
from pipelines.data.steps.duplicates import StoredClips, find_near_duplicates, linked_groups, sign
from pipelines.data.steps.likeness import Limits, similarity, unpack_fingerprint
from pipelines.data.video.fingerprint import DIMENSIONS
from pipelines.data.video.shots import split_source
from tests.pipelines.data.corpora import curate_config
from tests.pipelines.data.videos import moving_square, write_table, write_video

LIMITS = Limits(still=0.99, moving=0.9, motion=0.75)


def film(frames, seed):
    """Thumbnails that change a little from one to the next, as shots do."""
    generator = np.random.default_rng(seed)
    start, drift = generator.uniform(40, 200, DIMENSIONS), generator.normal(0, 12, (frames, DIMENSIONS))
    return np.clip(start + np.cumsum(drift, axis=0), 0, 255).astype(np.uint8)


def prints(*films):
    return [unpack_fingerprint(frames.tobytes()) for frames in films]


def told(*films):
    """Their fingerprints in groups of seven; of what moves in them nothing is known."""
    packed = pa.array([frames.tobytes() for frames in films], pa.binary())
    unknown = pa.nulls(len(films), pa.binary())

    def groups(values, places):
        for at in range(0, len(places), 7):
            rows = np.arange(at, min(at + 7, len(places)))
            yield ValueGroup(rows, partial(pa.chunked_array, [values.take(pa.array(places[rows]))]))

    return StoredClips(partial(groups, packed), partial(groups, unknown))


def test_copies_and_parts_are_found_and_the_lowest_key_is_kept():
    original = film(20, seed=0)
    noisy = np.clip(original + np.random.default_rng(1).normal(0, 2, original.shape), 0, 255).astype(np.uint8)
    others = [film(20, seed=seed) for seed in range(2, 40)]
    clips = [noisy, *others, original, original[5:15]]
    keys = ["k9", *(f"x{index:02d}" for index in range(len(others))), "k1", "k5"]
    found = find_near_duplicates(pa.array(keys), told(*clips), LIMITS)
    kept = keys.index("k1")
    assert {index: duplicate.of for index, duplicate in found.items()} == {0: kept, len(clips) - 1: kept}
    assert all(0.99 <= duplicate.cosine <= 1.0001 for duplicate in found.values())


def test_every_copy_among_thousands_is_found_and_no_other_clip():
    generator = np.random.default_rng(0)
    clips = [film(8, seed) for seed in range(3000)]
    copies = [np.clip(clip + generator.normal(0, 2, clip.shape), 0, 255).astype(np.uint8) for clip in clips[:300]]
    keys = pa.array([f"{number:05d}" for number in range(3300)])
    found = find_near_duplicates(keys, told(*clips, *copies), LIMITS)
    assert {number: duplicate.of for number, duplicate in found.items()} == {3000 + n: n for n in range(300)}


@pytest.mark.parametrize("frames", [30, 240, 1200])
def test_a_few_frames_of_a_long_clip_are_found(frames):
    for seed in range(20):
        generator = np.random.default_rng(seed)
        long = generator.integers(0, 256, (frames, DIMENSIONS), np.uint8)
        at = int(generator.integers(0, frames - 4))
        assert find_near_duplicates(pa.array(["a", "b"]), told(long, long[at : at + 4]), LIMITS).keys() == {1}


def test_candidates_do_not_depend_on_how_clips_are_dealt(monkeypatch):
    clips = [film(8, seed % 30) for seed in range(50)]
    packed = pa.array([clip.tobytes() for clip in clips])
    found = []
    for size, frames in ((50, 1 << 20), (1, 40), (7, 100)):
        monkeypatch.setattr(duplicates, "_TASK_FRAMES", frames)
        ranks = np.array_split(np.random.default_rng(size).permutation(50), -(-50 // size))
        signed = [sign(partial(pa.chunked_array, [packed.take(pa.array(own))]), own) for own in ranks]
        seen, ranges = duplicates._candidates(signed, 50, 0.99, remote=False)
        pairs = np.unique(np.concatenate([pair for pieces in ranges for pair in pieces]), axis=0)
        assert np.flatnonzero(seen).tolist() == np.unique(pairs).tolist()
        found.append(pairs.tolist())
    assert found[0] == found[1] == found[2] == [[number, number + 30] for number in range(20)]


@pytest.mark.usefixtures("ray_cluster")
def test_workers_find_the_same(monkeypatch):
    clips = [film(8, seed=index % 90) for index in range(120)]
    keys = pa.array([f"{number:03d}" for number in range(120)])
    here = find_near_duplicates(keys, told(*clips), LIMITS)
    monkeypatch.setattr(tasks, "_FEW_BYTES", 0)
    monkeypatch.setattr(duplicates, "_TASK_FRAMES", 300)
    for size in (1 << 20, 40, 7):  # of ranges and groups, that tasks have
        monkeypatch.setattr(duplicates, "_RANGE", size)
        monkeypatch.setattr(duplicates, "_GROUPED", size)
        assert find_near_duplicates(keys, told(*clips), LIMITS) == here
    assert len(here) == 30


@pytest.mark.usefixtures("ray_cluster")
def test_pairs_are_compared_by_workers_and_only_what_passes_comes_back(monkeypatch):
    clips = [film(8, seed=index % 90) for index in range(120)]
    keys = pa.array([f"{number:03d}" for number in range(120)])
    monkeypatch.setattr(tasks, "_FEW_BYTES", 0)
    monkeypatch.setattr(duplicates, "Appearance", None)  # here, not in the workers
    assert len(find_near_duplicates(keys, told(*clips), LIMITS)) == 30


def test_a_crowd_of_one_picture_is_one_group():
    clips = [film(8, seed=0)] * 500 + [film(8, seed=1)]
    found = find_near_duplicates(pa.array([f"{number:05d}" for number in range(501)]), told(*clips), LIMITS)
    assert {number: duplicate.of for number, duplicate in found.items()} == dict.fromkeys(range(1, 500), 0)


def test_groups_are_the_same_however_many_pairs_are_compared_at_a_time(monkeypatch):
    clips = [film(8, seed=index % 7) for index in range(60)]
    keys = pa.array([f"{number:02d}" for number in range(60)])
    whole = find_near_duplicates(keys, told(*clips), LIMITS)
    assert {number: duplicate.of for number, duplicate in whole.items()} == {n: n % 7 for n in range(7, 60)}
    monkeypatch.setattr(duplicates, "_PAIRS", 5)
    assert find_near_duplicates(keys, told(*clips), LIMITS) == whole


def test_the_result_does_not_depend_on_order():
    clips = [film(12, seed=index // 2) for index in range(40)]
    keys = [f"k{(index * 7) % 40:02d}" for index in range(40)]
    found = {keys[i]: keys[d.of] for i, d in find_near_duplicates(pa.array(keys), told(*clips), LIMITS).items()}
    order = np.random.default_rng(0).permutation(40)
    shuffled = [keys[i] for i in order]
    again = find_near_duplicates(pa.array(shuffled), told(*(clips[i] for i in order)), LIMITS)
    assert {shuffled[i]: shuffled[d.of] for i, d in again.items()} == found
    assert len(found) == 20


def test_in_which_order_numbers_are_added_up_changes_nothing():
    order = np.random.default_rng(0).permutation(DIMENSIONS)
    for seed in range(20):
        film_of_both = (0.9 * film(9, seed) + 0.1 * film(9, 20 + seed)).astype(np.uint8)
        one, other = prints(film(9, seed), film_of_both)
        assert similarity(one[:, order], other[:, order]) == similarity(one, other) > 0.8


def test_time_counts():
    forward = film(12, seed=0)
    assert similarity(*prints(forward, forward)) == pytest.approx(1.0)
    assert similarity(*prints(forward, forward[::-1])) < 0.99


def test_what_shows_nothing_is_like_nothing():
    flat = np.full((10, DIMENSIONS), 3, np.uint8)
    assert similarity(*prints(flat, flat)) == 0.0
    short = film(2, seed=0)
    assert similarity(*prints(short, short)) == 0.0
    assert find_near_duplicates(pa.array(["a", "b", "c"]), told(flat, flat, flat[:0]), LIMITS) == {}
    assert find_near_duplicates(pa.array([], pa.string()), told(), LIMITS) == {}


def chain(count):
    """Clips of which each is like the next, at 0.994, and unlike those after that."""
    generator = np.random.default_rng(0)
    one, other = (generator.normal(0, 1, (8, DIMENSIONS)) for _ in range(2))
    angles = [0.11 * number for number in range(count)]
    return [
        (128 + 30 * (np.cos(angle) * one + np.sin(angle) * other)).clip(0, 255).astype(np.uint8) for angle in angles
    ]


@pytest.mark.parametrize("best", [0, 1, 4])
def test_of_a_chain_no_clip_is_said_to_be_of_one_that_it_is_not_like(best):
    clips = chain(5)
    keys = pa.array([f"k{number}" for number in range(5)])
    found = find_near_duplicates(keys, told(*clips), LIMITS, lambda places: (places != best).astype(np.int64))
    packed = prints(*clips)
    assert best not in found
    assert found
    for place, duplicate in found.items():
        assert duplicate.of not in found
        assert duplicate.cosine == pytest.approx(similarity(packed[place], packed[duplicate.of]))
        assert duplicate.cosine >= 0.99
    kept = [place for place in range(5) if place not in found]
    assert all(similarity(packed[a], packed[b]) < 0.99 for a in kept for b in kept if a != b)


def test_a_whole_chain_is_one_group_though_clips_of_it_are_kept():
    found, links = duplicates._find_linked(pa.array(list("abcde")), told(*chain(5)), LIMITS, None)
    assert len(found) < 4  # so that two are kept at least, whose splits must be one
    assert linked_groups([(f"s{one}", f"s{other}") for one, other in links]) == {f"s{n}": "s0" for n in range(5)}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_a_captioned_copy_is_kept_then_the_larger_then_the_longer(tokenizer_file, tmp_path):
    corpus = tmp_path / "videos"
    corpus.mkdir()
    for seed in range(3):
        frames = moving_square(30, size=(192, 192), seed=seed)
        write_video(corpus / f"{seed}_large.mp4", frames)
        write_video(corpus / f"{seed}_small.mp4", np.stack([frame[::2, ::2] for frame in frames]))
        write_video(corpus / f"{seed}_short.mp4", frames[:20])
    said = {"0_short.mp4": "a square moves", "0_small.mp4": "too short", "1_small.mp4": "a square moves"}
    write_table(corpus / "captions.csv", list(said.items()))
    options = ["captions.require=false", "captions.min_words=3", "near_duplicates=0.98"]
    result = curate(curate_config(corpus, tmp_path / "d", tokenizer_file, *options))
    rows = open_snapshot(result.snapshot_uri).read_ledger().to_pylist()
    kept = {row["path"]: row["key"] for row in rows if row["status"] == "kept"}
    assert sorted(kept) == ["0_short.mp4", "1_small.mp4", "2_large.mp4"]
    of_seed = {path[0]: key for path, key in kept.items()}
    others = [row for row in rows if row["path"] not in kept]
    assert all(row["reason"].startswith(f"near: of {of_seed[row['path'][0]]} ") for row in others)


def test_links_make_groups():
    groups = linked_groups([("b", "c"), ("e", "d"), ("a", "c")])
    assert groups == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "d"}


def test_another_encoding_and_size_of_a_video_is_near_and_another_video_is_not(tmp_path):
    frames = moving_square(48, size=(128, 96), seed=0)
    half = np.stack([frame[::2, ::2] for frame in frames])
    other = moving_square(48, size=(128, 96), seed=1)
    paths = [
        write_video(tmp_path / "a.mp4", frames),
        write_video(tmp_path / "b.webm", half, codec="libvpx-vp9", options={"crf": "40", "b:v": "0"}),
        write_video(tmp_path / "c.mp4", other),
    ]
    config = SplitConfig(detector="none")
    sources = [split_source(str(path), config, beat=lambda: None) for path in paths]
    first, second, third = (unpack_fingerprint(source.clips[0]["fingerprint"]) for source in sources)
    assert len(first) == 8
    assert similarity(first, second) > 0.99
    assert similarity(first, third) < 0.9
