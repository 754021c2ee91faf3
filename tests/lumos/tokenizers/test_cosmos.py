import hashlib

import pytest
import torch
from torch import Tensor, nn

from lumos.tokenizers import CosmosTokenizer, TokenizerConfig, VideoTokenizer, load_video_tokenizer


class Encoder(nn.Module):
    """Obeys the contract: block means of luma in 16 steps, frame 1 alone, then groups of 4, silently padded."""

    def __init__(self, offset: int = 0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))
        self.offset = offset

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        missing = (1 - video.shape[2]) % 4
        video = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        video = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], dim=2)
        means = nn.functional.avg_pool3d(video.mean(1, keepdim=True), [4, 8, 8])[:, 0]
        indices = ((means + 1) * self.scale).floor().clamp(0, 15).to(torch.int32) + self.offset
        return indices, means[:, None].expand(-1, 6, -1, -1, -1), torch.zeros(1)


class Decoder(nn.Module):
    def forward(self, indices: Tensor) -> Tensor:
        values = (indices.float() + 0.5) / 8 - 1
        values = values.repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(4, 1)[:, 3:]
        return values[:, None].expand(-1, 3, -1, -1, -1)


@pytest.fixture
def folder(tmp_path):
    torch.jit.script(Encoder()).save(str(tmp_path / "encoder.jit"))
    torch.jit.script(Decoder()).save(str(tmp_path / "decoder.jit"))
    return tmp_path


@pytest.fixture
def tokenizer(folder):
    return load_video_tokenizer(TokenizerConfig(kind="cosmos", path=str(folder)))


def test_flat_blocks_survive(tokenizer):
    levels = torch.randint(0, 16, (2, 3, 2, 4), generator=torch.Generator().manual_seed(0))
    frames = tokenizer.decode(levels)
    assert frames.shape == (2, 9, 16, 32, 3)
    assert frames.dtype == torch.uint8
    assert torch.equal(tokenizer.encode(frames), levels)


def test_identity(tokenizer, folder):
    assert isinstance(tokenizer, VideoTokenizer)
    assert (tokenizer.kind, tokenizer.codebook_size, tokenizer.compression) == ("cosmos", 64_000, (4, 8, 8))
    for name in ("encoder.jit", "decoder.jit"):
        assert tokenizer.file_hashes[name] == "sha256:" + hashlib.sha256((folder / name).read_bytes()).hexdigest()
    torch.jit.script(Encoder(offset=1)).save(str(folder / "encoder.jit"))
    assert CosmosTokenizer(folder).weights_hash != tokenizer.weights_hash


def test_frame_counts_that_the_file_would_pad_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"num_frames 6 is not 1 \+ 4k: use 5 or 9"):
        tokenizer.encode(torch.zeros(1, 6, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="height 12"):
        tokenizer.encode(torch.zeros(1, 5, 12, 16, 3, dtype=torch.uint8))


@pytest.mark.parametrize("code", [-1, 64_000])
def test_codes_that_the_file_would_decode_silently_are_refused(tokenizer, code):
    with pytest.raises(ValueError, match=r"this tokenizer has codes 0\.\.63999"):
        tokenizer.decode(torch.full((1, 2, 2, 2), code))


def test_a_file_with_codes_out_of_range_is_found_out(folder):
    torch.jit.script(Encoder(offset=64_000)).save(str(folder / "encoder.jit"))
    with pytest.raises(ValueError, match="codes range over"):
        CosmosTokenizer(folder).encode(torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8))


def test_missing_files_are_named_with_the_remedy(folder):
    (folder / "decoder.jit").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs decoder\.jit in .*Cosmos-0\.1-Tokenizer-DV4x8x8.*kind fsq"):
        CosmosTokenizer(folder)
    with pytest.raises(ValueError, match="needs a path"):
        load_video_tokenizer(TokenizerConfig(kind="cosmos"))


def test_a_file_that_is_no_torchscript_is_named(folder):
    (folder / "encoder.jit").write_text("not a module")
    with pytest.raises(ValueError, match=r"encoder\.jit is not a TorchScript file"):
        CosmosTokenizer(folder)


def test_bfloat16_on_cpu_is_refused(folder):
    with pytest.raises(ValueError, match="float32 only on CPU"):
        CosmosTokenizer(folder, dtype=torch.bfloat16)
