import pytest

from pipelines.cluster import connect
from tests.pipelines.data.corpora import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "videos")


@pytest.fixture(scope="package")  # one for all modules here, as each start takes seconds
def ray_cluster():
    with connect(num_cpus=6):
        yield
