import os
import tempfile
from pathlib import Path

import pytest

from pipelines.data.curate import curate
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.steps.sources import hash_file
from tests.pipelines.data.bad_videos import write_bad_videos
from tests.pipelines.data.corpora import curate_config, reason_class


@pytest.mark.usefixtures("ray_cluster")
def test_bad_videos_of_every_kind_meet_their_fate(tmp_path, tokenizer_file):
    fates = write_bad_videos(tmp_path / "videos")
    assert len(fates) >= 40
    options = ["captions.require=false", "split.detector=none", "thresholds.max_aspect=4", "thresholds.min_height=16"]
    config = curate_config(tmp_path / "videos", tmp_path / "d", tokenizer_file, *options)
    result = curate(config)
    found = {}
    for row in open_snapshot(result.snapshot_uri).read_ledger().to_pylist():
        assert row["path"] not in found, "one clip each"
        found[row["path"]] = f"{row['status']} {reason_class(row['reason'])}".strip()
    assert found == fates
    assert not list((tmp_path / "d").rglob("crashes")), "none of them may end its decoder"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as a user without rights")
def test_a_file_without_permission_is_told():
    secret = Path(tempfile.gettempdir()) / f"secret-{os.getpid()}.mp4"
    secret.write_bytes(b"x")
    secret.chmod(0o600)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            os.write(theirs, str(hash_file(str(secret))["error"]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    secret.unlink()
    assert os.read(ours, 1000).decode() == "unreadable_file (permanent): no permission to read it"
