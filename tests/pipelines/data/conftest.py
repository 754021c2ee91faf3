import pytest

from pipelines.data.curate import curate
from tests.pipelines.data.corpora import curate_config, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "videos")


@pytest.fixture(scope="session")
def curated(corpus, tokenizer_file, tmp_path_factory, ray_cluster):
    """The dataset and result of one usual run over the corpus; tests that change the dataset copy it."""
    dataset = tmp_path_factory.mktemp("curated") / "dataset"
    return dataset, curate(curate_config(corpus, dataset, tokenizer_file))
