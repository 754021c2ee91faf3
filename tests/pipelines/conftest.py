import pytest
import torch

from lumos.tokenizers.fsq import FsqAutoencoder, FsqConfig, save_weights


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """An untrained tokenizer: quick, and as exact as a trained one about what equals what."""
    path = tmp_path_factory.mktemp("tokenizer") / "fsq.safetensors"
    torch.manual_seed(0)
    save_weights(path, FsqAutoencoder(FsqConfig(hidden_size=32)), {"test": True})
    return path
