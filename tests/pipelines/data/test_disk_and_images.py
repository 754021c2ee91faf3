"""A disk that is full, and images among videos."""

import shutil
import subprocess

import cv2
import numpy as np
import pytest

from pipelines.data.curate import curate
from pipelines.data.snapshot.read import open_snapshot
from pipelines.errors import JobError
from tests.pipelines.data.corpora import GOOD, curate_config, published
from tests.pipelines.data.videos import moving_square

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, as large as the test makes it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)

    if resize("size=40k").returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder, lambda: resize("remount,size=100m").check_returncode()
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_more_room_lets_it_go_on(small_disk, corpus, tokenizer_file, tmp_path):
    dataset, enlarge = small_disk
    (dataset / "ballast").write_bytes(bytes(16_384))
    with pytest.raises(JobError, match=r"No space left on device(.|\n)*give the same command again"):
        curate(curate_config(corpus, dataset, tokenizer_file))
    assert not list(dataset.rglob("*.tmp"))
    enlarge()
    curate(curate_config(corpus, dataset, tokenizer_file))
    curate(curate_config(corpus, tmp_path / "elsewhere", tokenizer_file))
    assert published(open_snapshot(str(dataset))) == published(open_snapshot(str(tmp_path / "elsewhere")))


@pytest.mark.slow
def test_images_are_clips_of_one_frame_where_they_are_asked_for(corpus, tokenizer_file, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "mixed", symlinks=True)
    names = ("a.png", "b.jpg", "c.webp", "d.bmp", "e.tiff", "f%03d.png")
    for seed, name in enumerate(names):
        cv2.imwrite(str(folder / name), moving_square(1, size=(80, 64), seed=seed)[0])
    photo = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    cv2.imwrite(str(folder / "photo.jpg"), cv2.resize(photo, (1024, 768), interpolation=cv2.INTER_CUBIC))
    assert (folder / "photo.jpg").stat().st_size > 100_000  # FFmpeg tells small ones otherwise
    cv2.imwrite(str(folder / "black.png"), 0 * moving_square(1)[0])
    cv2.imwrite(str(folder / "tiny.png"), moving_square(1, size=(32, 32))[0])
    extensions = "source.extensions=[.mp4,.png,.jpg,.webp,.bmp,.tiff]"
    plain = curate(curate_config(folder, tmp_path / "plain", tokenizer_file, extensions, "captions.require=false"))
    assert plain.counts["kept"] == GOOD + 1
    assert plain.reasons["rejected: frames"] == 7
    options = [extensions, "captions.require=false", "tokens.num_frames=[1,17]"]
    taken = curate(curate_config(folder, tmp_path / "taken", tokenizer_file, *options))
    assert taken.counts["kept"] == GOOD + 1 + 7
    snapshot = open_snapshot(taken.snapshot_uri)
    rows = {row["path"]: row for row in snapshot.read_ledger().to_pylist()}
    assert rows["black.png"]["reason"].startswith("brightness")
    assert rows["tiny.png"]["reason"].startswith("width")
    assert rows["short.mp4"]["status"] == "rejected"  # a video too short is no image
    assert {rows[name]["status"] for name in (*names, "photo.jpg")} == {"kept"}
    shapes = {(bucket.t, bucket.h, bucket.w): bucket.rows for bucket in snapshot.manifest.buckets}
    assert sum(count for shape, count in shapes.items() if shape[0] == 1) == 7
