import pytest
import torch

from lumos.config import parse_tokenizer_kind
from lumos.tokenizers import FsqTokenizer, TokenizerConfig, VideoTokenizer, load_video_tokenizer
from lumos.tokenizers.fsq import EMBEDDED_WEIGHTS, FsqAutoencoder, FsqConfig, load_weights, save_weights

SMALL = FsqConfig(
    levels=(5, 4, 3), hidden_size=16, encoder_blocks=2, context_blocks=1, decoder_blocks=3, memory_blocks=2
)


@pytest.fixture(scope="module")
def embedded():
    return FsqTokenizer()


@pytest.fixture
def small(tmp_path):
    torch.manual_seed(0)
    model = FsqAutoencoder(SMALL)
    model.encode_latents(torch.rand(2, 9, 16, 16, 3))  # sets the statistics of the latents
    save_weights(tmp_path / "small.safetensors", model, {"note": 1})
    return FsqTokenizer(tmp_path / "small.safetensors")


def video(*shape: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)


def test_embedded_weights_are_small_and_few_codes(embedded):
    assert EMBEDDED_WEIGHTS["fsq"].stat().st_size <= 4_000_000
    assert embedded.codebook_size <= 4096
    assert isinstance(embedded, VideoTokenizer)
    assert embedded.weights_hash.startswith("sha256:")
    assert embedded.compression == (4, 8, 8)


def test_each_kind_has_weights_of_its_own_in_the_package():
    footage = load_video_tokenizer(TokenizerConfig(kind="fsq-footage"))
    assert isinstance(footage, FsqTokenizer)
    assert EMBEDDED_WEIGHTS["fsq-footage"].stat().st_size <= 16_000_000
    assert (footage.kind, footage.codebook_size, footage.compression) == ("fsq-footage", 64_000, (4, 8, 8))
    plain = load_video_tokenizer(TokenizerConfig(kind="fsq"))
    assert plain.kind == FsqTokenizer().kind == "fsq"
    assert plain.weights_hash == FsqTokenizer().weights_hash != footage.weights_hash
    codes = footage.encode(video(1, 5, 16, 24))
    assert codes.shape == (1, 2, 2, 3)
    assert footage.decode(codes).shape == (1, 5, 16, 24, 3)


def test_a_file_of_ones_own_has_the_kind_that_is_asked_for(tmp_path, small):
    path = str(tmp_path / "small.safetensors")
    for kind in ("fsq", "fsq-footage"):
        loaded = load_video_tokenizer(TokenizerConfig(kind=kind, path=path))
        assert (loaded.kind, loaded.codebook_size, loaded.weights_hash) == (kind, 60, small.weights_hash)


def test_an_unknown_kind_is_told_with_those_there_are():
    with pytest.raises(ValueError, match=r"kind is 'vqgan'; known tokenizers: fsq, fsq-footage, cosmos"):
        parse_tokenizer_kind("vqgan")


@pytest.mark.parametrize("time", [1, 5, 17])
def test_shapes(embedded, time):
    codes = embedded.encode(video(2, time, 16, 24))
    assert codes.shape == (2, 1 + (time - 1) // 4, 2, 3)
    assert codes.dtype == torch.int64
    assert embedded.decode(codes).shape == (2, time, 16, 24, 3)


@pytest.mark.parametrize("time", [1, 5, 9, 13])
def test_a_prefix_encodes_and_decodes_to_a_prefix(embedded, time):
    frames = video(1, 17, 32, 32)
    codes, part = embedded.encode(frames), embedded.encode(frames[:, :time])
    assert torch.equal(codes[:, : part.shape[1]], part)
    # Products of other sizes round otherwise, which may move a value across the border between two levels.
    difference = embedded.decode(codes)[:, :time].int() - embedded.decode(part).int()
    assert difference.abs().max() <= 1


def test_a_code_depends_on_no_later_frame_and_on_its_own(small):
    frames = video(1, 9, 16, 16)
    codes = small.encode(frames)
    for changed in range(9):
        other = frames.clone()
        other[:, changed] = 255 - other[:, changed]
        first_affected = (changed + 3) // 4
        equal = (small.encode(other) == codes).flatten(2).all(2)[0].tolist()
        assert equal == [latent != first_affected for latent in range(3)]


def test_decoded_frames_depend_on_no_later_code(small):
    codes = torch.randint(0, 60, (1, 4, 2, 2), generator=torch.Generator().manual_seed(0))
    other = codes.clone()
    other[:, 2] = (other[:, 2] + 17) % 60
    frames, changed = small.decode(codes), small.decode(other)
    assert torch.equal(frames[:, :5], changed[:, :5])
    assert not torch.equal(frames[:, 5:9], changed[:, 5:9])


def test_codes_do_not_depend_on_batch_mates(embedded):
    frames = video(8, 5, 16, 16)
    mixed = torch.cat([frames[:4], video(4, 5, 16, 16, seed=1)])
    assert torch.equal(embedded.encode(frames)[:4], embedded.encode(mixed)[:4])


@pytest.mark.parametrize("time", [2, 4, 16, 18])
def test_frame_counts_other_than_1_plus_4k_are_refused(embedded, time):
    with pytest.raises(ValueError, match=rf"num_frames {time} is not 1 \+ 4k: use"):
        embedded.encode(video(1, time, 16, 16))


def test_sides_that_are_no_multiple_of_8_are_refused(embedded):
    with pytest.raises(ValueError, match="height 20 is not a multiple of 8"):
        embedded.encode(video(1, 5, 20, 16))
    with pytest.raises(ValueError, match="width 4 is not a multiple of 8"):
        embedded.encode(video(1, 5, 16, 4))


def test_without_context_a_code_depends_on_its_own_cell_alone():
    model = FsqAutoencoder(FsqConfig(levels=(8, 8), hidden_size=16, context_blocks=0)).eval()
    frames = torch.rand(1, 5, 24, 24, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = frames.clone()
    other[:, :, 8:16, 8:16] *= -1
    change = (model.encode_latents(frames) - model.encode_latents(other)).abs().amax(-1) > 0
    assert change.sum(dim=(2, 3)).tolist() == [[1, 1]]
    assert change[0, :, 1, 1].all()


def test_refining_blocks_see_across_the_borders_of_cells():
    """What a code changes without them ends at the reach of the decoder's blocks; with them it goes 4 px further."""
    reached = []
    for blocks in (0, 1):
        torch.manual_seed(0)
        model = FsqAutoencoder(
            FsqConfig(levels=(8, 8), hidden_size=16, decoder_blocks=1, memory_blocks=0, refine_blocks=blocks)
        ).eval()
        latents = model.codes_to_latents(torch.zeros(1, 2, 5, 5, dtype=torch.long))
        other = latents.clone()
        other[:, :, 2, 2] += 0.5
        change = (model.decode_latents(latents) - model.decode_latents(other)).abs().amax(dim=(0, 1, 4)) > 0
        reached.append(torch.nonzero(change.any(0)).flatten()[[0, -1]].tolist())
    assert reached == [[8, 31], [4, 35]]


def test_codes_out_of_range_are_refused(small):
    for code in (-1, 60):
        with pytest.raises(ValueError, match=r"has codes 0\.\.59"):
            small.decode(torch.full((1, 1, 2, 2), code))


def test_every_code_is_a_fixed_point_of_rounding():
    model = FsqAutoencoder(SMALL)
    codes = torch.arange(60).view(1, 1, 6, 10)
    latents = model.codes_to_latents(codes)
    assert torch.equal(model.latents_to_codes(latents), codes)
    assert latents.abs().max() < 1
    extremes = torch.tensor([[-1.0] * 3, [1.0] * 3]).view(1, 1, 1, 2, 3)
    assert model.latents_to_codes(extremes).flatten().tolist() == [0, 59]


def test_weights_round_trip(tmp_path, small):
    model, metadata = load_weights(tmp_path / "small.safetensors")
    assert metadata == {"note": 1}
    assert model.config == SMALL
    save_weights(tmp_path / "again.safetensors", model, metadata)
    assert FsqTokenizer(tmp_path / "again.safetensors").weights_hash == small.weights_hash


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors is not a file.*weights in the package"):
        load_video_tokenizer(TokenizerConfig(path=str(tmp_path / "absent.safetensors")))
    (tmp_path / "text.safetensors").write_text("no weights at all")
    with pytest.raises(ValueError, match=r"text\.safetensors holds no FSQ weights"):
        load_video_tokenizer(TokenizerConfig(path=str(tmp_path / "text.safetensors")))


def test_config_is_checked():
    with pytest.raises(ValueError, match="at least 2 levels"):
        FsqConfig(levels=(8, 1))
    with pytest.raises(ValueError, match="over 65536"):
        FsqConfig(levels=(16,) * 5)
    with pytest.raises(ValueError, match="memory_blocks is 9"):
        FsqConfig(memory_blocks=9)
    with pytest.raises(ValueError, match="context_blocks is 3"):
        FsqConfig(encoder_blocks=2, context_blocks=3)
    with pytest.raises(ValueError, match="hidden_size is 0"):
        FsqConfig(hidden_size=0)
    with pytest.raises(ValueError, match="decoder_size is 0"):
        FsqConfig(decoder_size=0)
    with pytest.raises(ValueError, match="refine_blocks is -1"):
        FsqConfig(refine_blocks=-1)
