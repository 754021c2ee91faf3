from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.data.settings import PublishConfig
from pipelines.data.snapshot import shards
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.snapshot.rows import RowReader
from pipelines.errors import UserError
from tests.pipelines.data.snapshots import make_snapshot

COLUMNS = ["clip_id", "captions", "fps", "codes"]


@pytest.fixture(params=["today's", "an older program's"])
def snapshot(request, tmp_path, monkeypatch) -> Snapshot:
    if request.param != "today's":
        monkeypatch.setattr(shards, "row_group_rows", lambda *shape: None)
    draw = np.random.default_rng(0)
    clips = {f"s{number:03d}:0": draw.integers(0, 1000, (3, 20, 40)) for number in range(700)}
    return make_snapshot(str(tmp_path), clips, config=PublishConfig(val_share=0.1, shard_mb=1.5))


def first_file(snapshot: Snapshot) -> Path:
    return Path(snapshot.uri) / snapshot.manifest.buckets[0].shards[0].path


def test_rows_are_those_of_the_shards_in_little_memory(snapshot):
    reader = RowReader(snapshot, COLUMNS, max_bytes=300_000)
    largest = 0
    for number, bucket in enumerate(snapshot.manifest.buckets):
        rows = [row for shard in bucket.shards for row in snapshot.read_shard(shard, COLUMNS).to_pylist()]
        for place in np.random.default_rng(1).permutation(len(rows))[:50].tolist():
            found = reader.row(number, place)
            assert found | {"codes": found["codes"].tolist()} == rows[place]
            largest = max(largest, (bucket.row_group_rows or 256) * bucket.row_bytes)
            assert reader.held_bytes <= max(300_000, largest)
    with pytest.raises(IndexError, match=r"bucket 0 has .* rows, none has the number 5000"):
        reader.row(0, 5000)


def test_row_groups_have_the_size_that_the_manifest_says(snapshot):
    for bucket in snapshot.manifest.buckets:
        footer = pq.read_metadata(Path(snapshot.uri) / bucket.shards[0].path)
        assert footer.row_group(0).num_rows == min(bucket.row_group_rows or 256, bucket.shards[0].rows)
        if bucket.row_group_rows is not None:
            assert 100_000 < bucket.row_group_rows * bucket.row_bytes <= 128_000
            assert footer.serialized_size < 0.02 * bucket.shards[0].bytes


def test_codes_take_two_bytes_each(tmp_path):
    draw = np.random.default_rng(0)
    clips = {f"s{number:03d}:0": draw.integers(0, 64000, (7, 32, 56)) for number in range(64)}
    snapshot = make_snapshot(str(tmp_path), clips, config=PublishConfig(val_share=0.0))
    (bucket,) = snapshot.manifest.buckets
    assert bucket.bytes < 1.02 * 2 * bucket.tokens


def test_damaged_shards_are_named_with_a_remedy(snapshot):
    file = first_file(snapshot)
    data = file.read_bytes()
    for wrong, message in (
        (data[:-100], rf"is damaged \(it ends before byte {len(data)}\)"),
        (data[:-4] + b"PARE", "is damaged"),
        (bytes(len(data) - 8) + data[-8:], "is damaged"),
        (data[:4] + bytes(20_000) + data[20_004:], "is damaged"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(UserError, match=rf"(?s){file.name} {message}.*copy it back.*`lumos data verify`"):
            [RowReader(snapshot, COLUMNS, max_bytes=0).row(0, row) for row in range(300)]
    file.unlink()
    with pytest.raises(UserError, match=rf"{file.name} is missing from its snapshot"):
        RowReader(snapshot, COLUMNS, max_bytes=0).row(0, 0)


def test_a_shard_of_other_rows_than_its_manifest_says_is_refused(snapshot):
    (bucket, *others) = snapshot.manifest.buckets
    renamed = (replace(bucket.shards[0], rows=bucket.shards[0].rows + 1), *bucket.shards[1:])
    manifest = replace(snapshot.manifest, buckets=(replace(bucket, shards=renamed), *others))
    with pytest.raises(UserError, match=r"has \d+ rows, its manifest says \d+"):
        RowReader(replace(snapshot, manifest=manifest), COLUMNS, max_bytes=0).row(0, 0)
