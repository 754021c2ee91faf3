"""The sample corpus: real files, balanced attributes, the held-out rule, and determinism."""

import csv
import hashlib
from collections import Counter
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines import sample_corpus as corpus
from pipelines.sample_corpus import ClipSpec


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_corpus_is_what_the_contract_asks_for():
    assert len(corpus.SHAPES) >= 4
    assert len(corpus.SIZES) == 2
    assert len(corpus.COLORS) >= 6
    assert len(corpus.BACKGROUNDS) >= 4
    assert len(corpus.DIRECTIONS) == 4
    assert len(corpus.held_out_combinations()) == 64
    assert len(corpus.held_out_specs(0)) == 64


def test_held_out_combinations_are_absent_from_training():
    trained = {spec.combination for seed in range(3) for spec in corpus.sample_specs(seed, 1500)}
    held_out = {spec.combination for spec in corpus.held_out_specs(0)}
    assert held_out == corpus.held_out_combinations()
    assert not trained & held_out
    assert len(trained) == 4 * 6 * 4 * 4 - 64


def test_no_two_clips_show_the_same():
    specs = corpus.sample_specs(0, 2560)
    assert len({(*spec.combination, spec.size, spec.top, spec.left) for spec in specs}) == len(specs)


def test_every_pair_of_values_remains_in_training():
    trained = {spec.combination for spec in corpus.sample_specs(0, 640)}
    sizes = [len(corpus.SHAPES), len(corpus.COLORS), len(corpus.BACKGROUNDS), len(corpus.DIRECTIONS)]
    for i, j in combinations(range(4), 2):
        assert len({(combination[i], combination[j]) for combination in trained}) == sizes[i] * sizes[j]


@pytest.mark.parametrize("name", ["shape", "size", "color", "background", "direction"])
def test_values_are_balanced(name: str):
    for specs in (corpus.sample_specs(1, 640), corpus.held_out_specs(1)):
        counts = Counter(getattr(spec, name) for spec in specs)
        assert min(counts.values()) > 0.6 * max(counts.values())


def test_captions_name_every_attribute_in_several_wordings():
    specs = corpus.sample_specs(0, 200)
    assert {spec.wording for spec in specs} == set(range(len(corpus.WORDINGS)))
    for spec in specs:
        words = spec.caption.lower().replace(".", " ").replace(",", " ").split()
        assert {spec.shape, spec.size, spec.color, spec.background, spec.direction} <= set(words)


def test_spec_rejects_unknown_values_and_subjects_out_of_view():
    good = {"shape": "diagonal", "size": "small", "color": "red", "background": "dark", "direction": "right"}
    assert ClipSpec(**good, top=0, left=0).combination == ("diagonal", "red", "dark", "right")
    with pytest.raises(ValueError, match="color 'pink' is not one of red"):
        ClipSpec(**(good | {"color": "pink"}), top=0, left=0)
    with pytest.raises(ValueError, match="left 32 moves the small subject out"):
        ClipSpec(**good, top=0, left=32)
    with pytest.raises(ValueError, match="wording 9"):
        ClipSpec(**good, top=0, left=0, wording=9)


def test_subject_moves_as_named_and_stays_in_view():
    for spec in corpus.sample_specs(0, 60):
        frames = corpus.render_clip(spec).astype(int)
        assert frames.shape == (corpus.NUM_FRAMES, corpus.SIDE, corpus.SIDE, 3)
        covered = (np.abs(frames - corpus.BACKGROUNDS[spec.background]).sum(-1) > 30).astype(float)
        area = covered.sum(axis=(1, 2))
        assert area.max() - area.min() <= 0.02 * area.max()  # nothing is cut off
        centre = np.stack([covered.sum(2) @ np.arange(96), covered.sum(1) @ np.arange(96)], axis=-1) / area[:, None]
        drift = centre[-1] - centre[0]
        expected = np.array(corpus.DIRECTIONS[spec.direction]) * corpus.STEP * (corpus.NUM_FRAMES - 1)
        np.testing.assert_allclose(drift, expected, atol=1.0)


def test_shapes_are_made_of_whole_cells():
    areas = {"square": (4, 9), "bar": (2, 3), "column": (2, 3), "diagonal": (2, 3)}
    assert set(areas) == set(corpus.SHAPES)
    for shape, cells in areas.items():
        for size, count in zip(corpus.SIZES, cells, strict=True):
            mask = corpus.shape_mask(shape, size)
            assert mask.sum() == count * corpus.CELL**2
            blocks = mask.reshape(len(mask) // corpus.CELL, corpus.CELL, -1, corpus.CELL)
            assert set(np.unique(blocks.mean(axis=(1, 3)))) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="shape 'star' is not one of square, bar"):
        corpus.shape_mask("star", "small")


def test_shapes_of_other_sides_are_antialiased():
    mask = corpus.shape_mask("diagonal", "large", 40)
    assert mask.mean() == pytest.approx(3 / 9, abs=0.001)
    assert ((mask > 0) & (mask < 1)).any()


def test_write_corpus_writes_real_videos_and_metadata(tmp_path: Path):
    specs = corpus.write_corpus(tmp_path, seed=0, num_clips=4)
    with (tmp_path / "captions.csv").open(newline="") as file:
        rows = {row["path"]: row["caption"] for row in csv.DictReader(file)}
    videos = {path.name for path in tmp_path.glob("*.mp4")}
    assert set(rows) == videos == {f"clip_{i:05d}.mp4" for i in range(4)} | set(corpus.BAD_FILES)
    for index, spec in enumerate(specs):
        name = f"clip_{index:05d}.mp4"
        assert rows[name] == spec.caption
        with av.open(str(tmp_path / name)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == corpus.FPS
        error = decode(tmp_path / name).astype(float) - corpus.render_clip(spec)
        assert 10 * np.log10(255**2 / (error**2).mean()) > 30  # chroma subsampling is most of it


def test_bad_videos_are_bad_in_the_way_they_are_named(tmp_path: Path):
    corpus.write_corpus(tmp_path, seed=0, num_clips=2)
    for name, reason in corpus.BAD_FILES.items():
        path = tmp_path / name
        if reason in ("truncated", "not a video"):
            with pytest.raises(av.error.FFmpegError):
                decode(path)
        elif reason == "black":
            assert decode(path).max() < 20
        elif reason == "static":
            frames = decode(path).astype(int)
            assert np.abs(np.diff(frames, axis=0)).mean() < 0.5
        elif reason == "too short":
            assert len(decode(path)) < corpus.NUM_FRAMES // 2
        else:
            assert path.read_bytes() == (tmp_path / "clip_00000.mp4").read_bytes()


def test_write_corpus_is_deterministic_and_seeded(tmp_path: Path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        corpus.write_corpus(tmp_path / name, seed=seed, num_clips=12)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_write_corpus_needs_two_clips(tmp_path: Path):
    with pytest.raises(ValueError, match="num_clips is 1"):
        corpus.write_corpus(tmp_path / "none", seed=0, num_clips=1)
    assert not (tmp_path / "none").exists()
