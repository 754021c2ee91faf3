import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from lumos.tokenizers import FsqTokenizer
from lumos.tokenizers.fsq import FsqConfig
from pipelines.errors import UserError
from pipelines.sample_corpus import write_video
from pipelines.training.tokenizer.data import ClipPools, ClipSource, recolored
from pipelines.training.tokenizer.filmed import crop_clips, photo_clips
from pipelines.training.tokenizer.procedural import texture_clip
from pipelines.training.tokenizer.train import (
    FsqRun,
    FsqTraining,
    TokenizerTrainConfig,
    train_tokenizer,
    unevenness,
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(2):
        write_video(folder / f"{seed}.mp4", texture_clip(np.random.default_rng(seed), num_frames=30, side=96), fps=24)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(2):
        picture = texture_clip(np.random.default_rng(50 + seed), num_frames=1, side=320)[0]
        cv2.imwrite(str(folder / f"{seed}.jpg"), picture)
    return folder


def test_clips_are_cut_from_videos_at_every_height(videos):
    clips = crop_clips(
        str(videos), np.random.default_rng(0), heights=(48, 96), side=40, num_frames=5, fps=12.0, limit=12
    )
    assert clips.shape == (12, 5, 40, 40, 3)
    # Half the height shows twice as much in the same pixels: steps between neighbours are larger.
    small, large = (part.float().diff(dim=2).abs().mean() for part in (clips[:6], clips[6:]))
    assert small > large
    assert len({clip.numpy().tobytes() for clip in clips}) > 9


def test_photographs_are_filmed_by_a_camera_that_moves(photos):
    clips = photo_clips(str(photos), np.random.default_rng(0), count=24, side=40, num_frames=5).float()
    assert clips.shape == (24, 5, 40, 40, 3)
    moved = (clips[:, 0] - clips[:, 4]).abs().mean(dim=(1, 2, 3))
    assert (moved > 3).sum() > 12
    steps = (clips[:, 1:] - clips[:, :-1]).abs().mean(dim=(1, 2, 3, 4))
    assert (steps < moved + 1).float().mean() > 0.8  # on its way, not a jump to and fro
    again = photo_clips(str(photos), np.random.default_rng(0), count=24, side=40, num_frames=5)
    assert torch.equal(again.float(), clips)


def test_sources_share_a_batch_by_their_numbers(videos, photos):
    source = ClipSource(
        videos=str(videos),
        video_heights=(48,),
        max_video_clips=6,
        photos=str(photos),
        photo_clips=10,
        texture_clips=4,
        corpus_share=0.0,
        size=32,
        num_frames=5,
    )
    pools = ClipPools(source, 0)
    assert pools.others.shape == (20, 5, 42, 42, 3)
    assert pools.batch(0, 3)[0].shape == (3, 5, 32, 32, 3)


def test_recolored_clips_keep_their_light_and_lose_their_colours():
    clip = torch.from_numpy(texture_clip(np.random.default_rng(5), num_frames=5, side=32)).clamp(60, 190)
    others = [recolored(clip, np.random.default_rng(seed)) for seed in range(8)]
    spread = [float(other.float().std(dim=-1).mean()) for other in others]
    assert max(spread) > 1.5 * float(clip.float().std(dim=-1).mean())
    assert min((other.float() - clip.float()).abs().max() for other in others) > 2
    mild = min(others, key=lambda other: float(other.float().std(dim=-1).mean()))
    assert (mild.float().mean(dim=-1) - clip.float().mean(dim=-1)).abs().max() < 1


def test_what_cannot_be_filmed_is_named(tmp_path, videos):
    def read(folder):
        photo_clips(str(folder), np.random.default_rng(0), count=1, side=40, num_frames=5)

    with pytest.raises(UserError, match=r"photos: .* holds no photos"):
        read(videos)
    with pytest.raises(UserError, match=r"photos: .*absent is neither"):
        read(tmp_path / "absent")
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((30, 64, 3), np.uint8))
    with pytest.raises(UserError, match=r"small\.png is 64x30 px; clips of it have 40 px"):
        read(tmp_path)
    (tmp_path / "small.png").write_text("no picture")
    with pytest.raises(UserError, match=r"small\.png cannot be decoded"):
        read(tmp_path)
    with pytest.raises(UserError, match="has 13 frames at 24 fps, 400x400 px"):
        crop_clips(str(videos), np.random.default_rng(0), heights=(96,), side=400, num_frames=13, fps=24.0, limit=4)


def test_a_refining_decoder_trains_and_its_file_is_read_back(tmp_path, photos):
    model = FsqConfig(
        levels=(8, 8, 5),
        hidden_size=32,
        decoder_size=48,
        encoder_blocks=1,
        decoder_blocks=1,
        memory_blocks=1,
        refine_blocks=1,
        refine_size=16,
    )
    source = ClipSource(photos=str(photos), photo_clips=16, texture_clips=0, corpus_share=0.0, size=32, num_frames=5)
    training = FsqTraining(
        model=model,
        source=source,
        objective="log",
        gradient_weight=0.05,
        steps=40,
        batch_size=4,
        warmup_steps=5,
        save_every=40,
        report_clips=2,
    )
    config = TokenizerTrainConfig(output=str(tmp_path / "fine.safetensors"), fsq=training)
    result = train_tokenizer(config)
    assert result.loss_last < result.loss_first
    tokenizer = FsqTokenizer(tmp_path / "fine.safetensors")
    assert tokenizer.model.config == model
    assert tokenizer.decode(torch.zeros(1, 2, 3, 4, dtype=torch.long)).shape == (1, 5, 24, 32, 3)


def test_of_the_log_objective_an_easy_clip_weighs_as_much_as_a_hard_one(tmp_path):
    source = ClipSource(corpus_clips=1, texture_clips=1)
    training = FsqTraining(source=source, objective="log", report_clips=1)
    run = FsqRun(TokenizerTrainConfig(output=str(tmp_path / "x.safetensors"), fsq=training), training)
    error = torch.full((2, 1, 4, 4, 3), 0.5)
    error[1] = 0.2
    full = run._objective(error)
    for clip in range(2):
        better = error.clone()
        better[clip] /= 2
        assert math.isclose(float(full - run._objective(better)), 0.02 * math.log(4) / 2, rel_tol=0.1)


def test_latents_that_fill_their_range_and_are_uncorrelated_are_even():
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(4000, 3, generator=generator) * 2 - 1
    assert unevenness(even) < 0.002
    assert unevenness(even / 4) > 0.1
    correlated = torch.cat([even[:, :1], even[:, :1], even[:, 2:]], dim=1)
    assert math.isclose(float(unevenness(correlated)), 1 / 3, rel_tol=0.05)
    alike = torch.randn(500, 2, generator=generator) @ torch.tensor([[0.3, 0.3], [0.0, 0.1]])
    latents = torch.nn.Parameter(alike.clone())
    optimizer = torch.optim.Adam([latents], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        unevenness(latents).backward()
        optimizer.step()
    assert unevenness(alike) > 0.8
    assert unevenness(latents) < 0.05


def test_training_begins_from_weights_of_the_same_sizes(tmp_path):
    model = FsqConfig(levels=(4, 4), hidden_size=16, encoder_blocks=1, decoder_blocks=1, memory_blocks=1)
    source = ClipSource(corpus_clips=0, texture_clips=6, corpus_share=0.0, size=16, num_frames=5)
    training = FsqTraining(model=model, source=source, steps=2, batch_size=2, save_every=2, report_clips=1)
    first = TokenizerTrainConfig(output=str(tmp_path / "first.safetensors"), fsq=training)
    train_tokenizer(first)
    on = replace(training, start=first.output)
    run = FsqRun(replace(first, fsq=on), on)
    written = FsqTokenizer(first.output).model.state_dict()
    assert all(torch.equal(value, written[name]) for name, value in run.model.state_dict().items())
    other = replace(on, model=replace(model, hidden_size=32))
    with pytest.raises(UserError, match=r"fsq\.start: .*first\.safetensors has the sizes .*hidden_size=16"):
        FsqRun(replace(first, fsq=other), other)
    absent = replace(on, start="absent.safetensors")
    with pytest.raises(UserError, match=r"fsq\.start: .*absent\.safetensors is not a file"):
        FsqRun(replace(first, fsq=absent), absent)
