import pytest
import torch

from lumos.tokenizers.fsq import FsqAutoencoder, FsqConfig, save_weights
from tests.pipelines.data.corpora import write_corpus


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """An untrained tokenizer: quick, and as exact as a trained one about what equals what."""
    path = tmp_path_factory.mktemp("tokenizer") / "fsq.safetensors"
    torch.manual_seed(0)
    save_weights(path, FsqAutoencoder(FsqConfig(hidden_size=32)), {"test": True})
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "videos")
