"""A tiny model with random weights and its tokenizers, as `lumos train` would export it."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lumos.checkpoint import ModelInfo, save_checkpoint
from lumos.config import ModelConfig, TokenizerInfo
from lumos.decoder import Decoder
from lumos.tokenizers import FsqTokenizer, TextTokenizer
from lumos.tokenizers.fsq import FsqAutoencoder, FsqConfig, save_weights
from lumos.vocabulary import Vocabulary
from pipelines.generation.config import (
    BatchConfig,
    GenerateConfig,
    ReplicaConfig,
    SamplingChoice,
    ServeConfig,
    TokenizerSource,
)
from pipelines.storage import s3
from pipelines.storage.store import S3Store
from tests.pipelines.storage.faults import s3_server

CAPTIONS = ("a red square moves left", "a blue circle moves up over a green background")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def s3_uri() -> Iterator[str]:
    """A bucket of a real S3 server, for this process and those that it starts."""
    with s3_server() as port, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        S3Store.clear_instance_cache()
        s3.filesystem().mkdir("jobs")
        yield "s3://jobs"
    S3Store.clear_instance_cache()


def save_tokenizer(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = FsqConfig(levels=(4, 4, 4), hidden_size=16)
    save_weights(path, FsqAutoencoder(config), {})
    return path


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "fsq.safetensors", seed=0)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    text = TextTokenizer.train(CAPTIONS, vocab_size=280)
    tokenizer = FsqTokenizer(tokenizer_path)
    vocabulary = Vocabulary.compact(text.vocab_size, tokenizer.codebook_size, grid_unit=16)
    config = ModelConfig(
        vocab_size=vocabulary.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        max_seq_len=600,
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # larger than at initialisation, so that context decides, and a wrong bit would show
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(8)
    info = ModelInfo(
        fps=12.0,
        shapes=((3, 4, 4),),
        tokenizer=TokenizerInfo(tokenizer.kind, tokenizer.codebook_size, tokenizer.compression, tokenizer.weights_hash),
        text_tokenizer_hash=text.hash,
    )
    folder = tmp_path_factory.mktemp("run") / "export"
    save_checkpoint(folder, model, vocabulary, info=info)
    text.save(folder / "text_tokenizer.json")
    return folder


SAMPLING = SamplingChoice(num_steps=4, guidance_scale=3.0)
REPLICAS = ReplicaConfig(num_cpus=0.5, threads=1)


@pytest.fixture
def generate_config(model_dir: Path, tokenizer_path: Path, tmp_path: Path) -> GenerateConfig:
    return GenerateConfig(
        model=str(model_dir),
        prompts=CAPTIONS,
        output=str(tmp_path / "videos"),
        sampling=SAMPLING,
        tokenizer=TokenizerSource(path=str(tokenizer_path)),
        replicas=REPLICAS,
    )


@pytest.fixture(scope="session")
def serve_config(model_dir: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    return ServeConfig(
        model=str(model_dir),
        sampling=SAMPLING,
        tokenizer=TokenizerSource(path=str(tokenizer_path)),
        replicas=REPLICAS,
        batch=BatchConfig(max_size=2, wait_ms=30.0, max_queued=2),
        timeout_s=60.0,
        jobs=str(tmp_path_factory.mktemp("jobs")),
    )
