from collections import Counter

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipelines.data.snapshot.read import open_snapshot
from tests.pipelines.training.reading import publish, read_steps

READ = Counter()


class CountedFiles(LocalFileSystem):
    """Local files whose reading is counted."""

    protocol = "counted"

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start=start, end=end, **kwargs)
        READ["bytes"] += len(data)
        READ["requests"] += 1
        return data


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    fsspec.register_implementation("counted", CountedFiles, clobber=True)
    dataset = tmp_path_factory.mktemp("reading") / "dataset"
    publish(str(dataset), videos=3000, images=6000)
    return f"counted://{dataset}"


def test_48_workers_decode_little_more_than_the_rows_they_take(dataset):
    READ.clear()
    found = read_steps(dataset)
    assert found.rows > 8900
    shards = [shard for bucket in open_snapshot(dataset).manifest.buckets for shard in bucket.shards]
    assert len(shards) > 50
    assert found.decoded_bytes < 2 * found.own_bytes
    assert READ["bytes"] < 2 * sum(shard.bytes for shard in shards)
    assert READ["requests"] < found.rows / 10
