"""Reading for training from S3."""

from pipelines.data.snapshot.read import open_snapshot
from tests.pipelines.training.reading import publish, read_steps


def test_48_workers_fetch_little_more_than_the_rows_they_take(bucket, proxy):
    dataset = f"{bucket}/dataset"
    publish(dataset, videos=1800, images=3600)
    stored = sum(shard.bytes for own in open_snapshot(dataset).manifest.buckets for shard in own.shards)
    proxy.sent, proxy.requests["GET"] = 0, 0
    found = read_steps(dataset)
    assert found.rows > 5000
    assert found.decoded_bytes < 2 * found.own_bytes
    assert proxy.sent < 2 * stored
    assert proxy.requests["GET"] < found.rows / 5
