"""What is decoded of a clip again is what was scored: in files whose index lies, above all."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.curate import curate
from pipelines.data.settings import SplitConfig
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.upkeep.verify import recheck
from pipelines.data.video.fingerprint import LOOK_SECONDS, TOLERANCE, FingerprintCheck, make_fingerprint
from pipelines.data.video.reader import MISMATCH, ClipRequest, read_clip
from pipelines.data.video.shots import split_source
from pipelines.decoding.errors import VideoError
from tests.pipelines.data.corpora import curate_config
from tests.pipelines.data.videos import flag_key_frames, moving_square, write_video

ONE_KEY_FRAME = {
    "libx264": {"preset": "veryfast", "g": "1000", "bf": "2", "threads": "1", "sc_threshold": "0"},
    "libx265": {"x265-params": "keyint=1000:log-level=none"},
    "mpeg4": {"g": "1000", "b": "2000000"},
}


def source_thumbnails(times, seed=0):
    """Thumbnails of frames at these times, those that the split pass takes, and all of them."""
    prints = np.random.default_rng(seed).integers(0, 256, (len(times), 8, 8, 3), np.uint8)
    taken, last = [], -np.inf
    for time, picture in zip(times, prints, strict=True):
        if time - last >= LOOK_SECONDS - 1e-3:
            taken.append((float(time), picture.tobytes()))
            last = time
    return taken, prints


def checked(times, pictures, start, fingerprint, whole=True):
    check = FingerprintCheck(start, fingerprint)
    for time, picture in zip(times, pictures, strict=True):
        if check.wants(float(time)):
            check.add(picture)
    return check, check.difference(whole=whole) <= TOLERANCE


@pytest.mark.parametrize("fps", [1, 3, 8, 12, 23.976, 25, 30, 50, 120])
def test_the_very_frames_are_known_again_at_every_rate_and_others_are_not(fps):
    times = np.arange(0, 20, 1 / fps)
    taken, pictures = source_thumbnails(times)
    for start, end in ((0.0, 4.0), (times[np.searchsorted(times, 5.03)], 9.4), (times[np.searchsorted(times, 11)], 19)):
        fingerprint = make_fingerprint(taken, start, end)
        inside = (times >= start - 1e-6) & (times < end)
        check, right = checked(times[inside], pictures[inside], start, fingerprint)
        assert right
        assert check.begins_alike() == (fps <= 8 or np.array_equal(pictures[inside][0], _first(fingerprint)))
        _, right = checked(times[inside], pictures[inside][::-1], start, fingerprint)
        assert not right
        smeared = pictures[inside].copy()
        smeared[: len(smeared) // 2] = 128
        assert not checked(times[inside], smeared, start, fingerprint)[1]


def _first(fingerprint):
    return np.frombuffer(fingerprint, np.uint8)[:192].reshape(8, 8, 3)


def test_frames_at_an_uneven_rate_are_not_judged_where_it_cannot_be_said_which_was_looked_at():
    times = np.cumsum(np.random.default_rng(1).choice([0.02, 0.05, 0.4], 200))
    taken, pictures = source_thumbnails(times)
    start = float(times[20])
    inside = (times >= start) & (times < start + 5)
    check, right = checked(times[inside], pictures[inside], start, make_fingerprint(taken, start, start + 5))
    assert right
    assert check.difference(whole=True) == 0


def test_nothing_known_and_nothing_seen_say_nothing():
    assert checked([0.0, 0.1], np.zeros((2, 8, 8, 3), np.uint8), 0.0, b"")[1]
    assert FingerprintCheck(0.0, bytes(192)).difference(whole=False) == 0


@pytest.mark.parametrize("codec", ONE_KEY_FRAME)
def test_false_key_frames_do_not_smear_what_is_decoded_again(tmp_path, codec):
    frames = moving_square(120, size=(160, 96), side=32)
    good = write_video(tmp_path / "good.mp4", frames, codec=codec, options=ONE_KEY_FRAME[codec])
    false = flag_key_frames(good, tmp_path / "false.mp4", every=7)
    source = split_source(str(false), SplitConfig(detector="stride", max_seconds=2.5), beat=lambda: None)
    smeared = 0
    for clip in source.clips:
        span = {"start_s": clip["start_s"], "end_s": clip["end_s"], "fps": 12.0, "num_frames": 25}
        wanted = span | {"width": 160, "height": 96, "source_frames": 120}
        expected = read_clip(ClipRequest(path=str(good), clean_clock=False, **wanted), beat=lambda: None)
        unchecked = read_clip(ClipRequest(path=str(false), **wanted), beat=lambda: None)
        smeared += int(np.abs(unchecked.astype(int) - expected).mean() > 2)
        request = ClipRequest(path=str(false), fingerprint=clip["fingerprint"], **wanted)
        assert np.array_equal(read_clip(request, beat=lambda: None), expected)
    # FFmpeg's own decoders of H.264 and HEVC wait for a real key frame after a seek; where they do not, there is harm.
    assert smeared or codec != "mpeg4"


def test_a_clip_that_differs_however_it_is_read_fails_with_a_reason(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_square(24))
    other = np.random.default_rng(0).integers(0, 256, 4 * 192, np.uint8).tobytes()
    request = ClipRequest(
        path=str(path),
        start_s=0,
        end_s=2,
        fps=12,
        num_frames=24,
        width=64,
        height=64,
        source_frames=24,
        fingerprint=other,
    )
    with pytest.raises(VideoError) as error:
        read_clip(request, beat=lambda: None)
    assert error.value.code == MISMATCH
    assert "not those that were scored" in error.value.detail


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_another_size_of_the_small_picture_fails_no_clip(tmp_path, width):
    stripes = np.zeros((24, 800, 66, 3), np.uint8)
    for index, frame in enumerate(stripes):
        frame[index % 2 :: 2] = 255
    path = write_video(tmp_path / "stripes.mp4", stripes)
    source = split_source(str(path), SplitConfig(detector="none", width=width), beat=lambda: None)
    [clip] = source.clips
    span = {"start_s": clip["start_s"], "end_s": clip["end_s"], "fps": 12.0, "num_frames": 17}
    request = ClipRequest(
        path=str(path), width=32, height=64, source_frames=24, fingerprint=clip["fingerprint"], **span
    )
    assert read_clip(request, beat=lambda: None).shape == (17, 64, 32, 3)


@pytest.fixture(scope="module")
def curated(tmp_path_factory, ray_cluster):
    """A dataset of a film and of its copy with false key frames."""
    root = tmp_path_factory.mktemp("false-keys")
    (root / "videos").mkdir()
    frames = moving_square(144, size=(96, 64), seed=3)
    good = write_video(root / "videos" / "good.mp4", frames, options=ONE_KEY_FRAME["libx264"])
    flag_key_frames(good, root / "videos" / "false.mp4", every=5)
    options = ["split.detector=stride", "split.max_seconds=2.0", "near_duplicates=null", "captions.require=false"]
    curate(curate_config(root / "videos", root / "d", "null", "tokens.batch_size=1", *options))
    return root / "d"


def test_false_key_frames_leave_no_trace_in_published_tokens(curated):
    snapshot = open_snapshot(str(curated))
    ledger = {row["key"]: row for row in snapshot.read_ledger().to_pylist()}
    codes = {}
    for bucket in snapshot.manifest.buckets:
        for shard in bucket.shards:
            for row in snapshot.read_shard(shard).to_pylist():
                place = ledger[row["clip_id"]]
                codes[place["path"], place["start_s"]] = row["codes"]
    assert len(codes) == 12
    assert all(codes["good.mp4", start] == codes["false.mp4", start] for start in (0, 2, 4, 6, 8, 10))
    found = recheck(snapshot, 100)
    assert (len(found.psnr), found.equal, found.problems) == (12, 1.0, ())


def test_verification_tells_of_clips_that_are_not_what_was_scored(curated, tmp_path):
    dataset = shutil.copytree(curated, tmp_path / "d")
    for path in dataset.glob("stages/split/*/part-*.parquet"):
        table = pq.read_table(path)
        place = table.schema.get_field_index("fingerprint")
        others = pa.array([bytes(255 - level for level in each) for each in table["fingerprint"].to_pylist()])
        pq.write_table(table.set_column(place, "fingerprint", others), path)
    found = recheck(open_snapshot(str(dataset)), 100)
    assert found.problems
    assert all("not those that were scored" in problem for problem in found.problems)
