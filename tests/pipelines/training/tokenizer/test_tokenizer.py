import json

import numpy as np
import pytest
import torch

from lumos.tokenizers import FsqTokenizer, TextTokenizer, TokenizerConfig
from lumos.tokenizers.fsq import FsqConfig
from lumos.tokenizers.text import EMBEDDED_FILE
from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.sample_corpus import write_video
from pipelines.training.tokenizer.data import ClipSource
from pipelines.training.tokenizer.evaluate import TokenizerEvaluateConfig, evaluate_tokenizer, measure
from pipelines.training.tokenizer.files import fit, list_videos, read_video
from pipelines.training.tokenizer.procedural import texture_clip
from pipelines.training.tokenizer.text import TextCorpus
from pipelines.training.tokenizer.train import FsqRun, FsqTraining, TokenizerTrainConfig, train_tokenizer

TINY = FsqConfig(levels=(4, 4, 4), hidden_size=32, encoder_blocks=1, decoder_blocks=1, memory_blocks=1)


def tiny_config(folder, **changes):
    values = {
        "model": TINY,
        "source": ClipSource(corpus_clips=4, texture_clips=4),
        "steps": 24,
        "batch_size": 4,
        "warmup_steps": 5,
        "save_every": 24,
        "report_clips": 4,
    } | changes
    return TokenizerTrainConfig(output=str(folder / "fsq.safetensors"), fsq=FsqTraining(**values))


def texture_video(path, *, num_frames, side=64, seed=0):
    write_video(path, texture_clip(np.random.default_rng(seed), num_frames=num_frames, side=side), fps=24)


def test_embedded_tokenizer_on_held_out_corpus_clips():
    result = evaluate_tokenizer(TokenizerEvaluateConfig(max_clips=96)).rows[0]
    assert result.clips == 96
    assert result.psnr >= 24
    assert result.codes_used >= result.codebook_size / 4


def test_embedded_tokenizer_on_natural_like_texture():
    clips = [texture_clip(np.random.default_rng([99, i]), num_frames=17, side=64) for i in range(24)]
    assert measure(FsqTokenizer(), torch.from_numpy(np.stack(clips)), name="textures").psnr >= 21


def test_embedded_tokenizer_for_footage_is_better_than_the_demos_on_natural_like_texture():
    clips = [texture_clip(np.random.default_rng([98, i]), num_frames=13, side=64) for i in range(16)]
    filmed = torch.from_numpy(np.stack(clips))
    ours, demos = (measure(FsqTokenizer(kind=kind), filmed, name=kind) for kind in ("fsq-footage", "fsq"))
    assert ours.psnr >= demos.psnr + 2
    assert ours.ssim > demos.ssim
    assert ours.entropy_bits > demos.entropy_bits + 3


def test_embedded_weights_carry_the_shipped_config():
    shipped = load_config(TokenizerTrainConfig, "fsq")
    trained = FsqTokenizer().metadata["train"]
    assert trained["seed"] == shipped.seed
    assert trained["fsq"]["model"]["levels"] == list(shipped.fsq.model.levels)
    assert trained["fsq"]["steps"] == shipped.fsq.steps
    footage = FsqTokenizer(kind="fsq-footage").model.config
    assert footage == load_config(TokenizerTrainConfig, "footage").fsq.model


def test_training_lowers_the_loss_and_is_repeatable(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    result = train_tokenizer(tiny_config(tmp_path / "a"))
    assert result.loss_last < 0.8 * result.loss_first
    assert result.size == 64
    assert result.measurement is not None
    assert "PSNR" in str(result)
    again = train_tokenizer(tiny_config(tmp_path / "b"))
    first, second = (FsqTokenizer(tmp_path / name / "fsq.safetensors").model.state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.loss_last == result.loss_last


def test_resume_continues_as_if_never_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    train_tokenizer(tiny_config(whole, steps=12, save_every=4))
    config = tiny_config(parts, steps=12, save_every=4)
    run = FsqRun(config, config.fsq)
    for _ in range(8):
        run.train_step()
    run.save(parts / "fsq.safetensors")
    train_tokenizer(config)
    assert not (parts / "fsq.state.pt").exists()
    first, second = (FsqTokenizer(path / "fsq.safetensors").model.state_dict() for path in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_state_of_another_config_is_refused(tmp_path):
    config = tiny_config(tmp_path, steps=2, save_every=1)
    run = FsqRun(config, config.fsq)
    run.save(tmp_path / "fsq.safetensors")
    with pytest.raises(UserError, match=r"fsq\.state\.pt belongs to a run of another config"):
        train_tokenizer(tiny_config(tmp_path, steps=3))


def test_training_on_a_folder_of_videos(tmp_path):
    for seed in range(2):
        texture_video(tmp_path / f"{seed}.mp4", num_frames=40, seed=seed)
    source = ClipSource(videos=str(tmp_path), corpus_clips=0, texture_clips=0, corpus_share=0.0, size=16, num_frames=5)
    result = train_tokenizer(tiny_config(tmp_path, source=source, steps=4))
    assert np.isfinite(result.loss_last)


def test_bad_videos_and_folders_are_named(tmp_path):
    source = {"corpus_clips": 0, "texture_clips": 0, "corpus_share": 0.0}
    with pytest.raises(UserError, match="neither a file nor a folder"):
        train_tokenizer(tiny_config(tmp_path, source=ClipSource(videos=str(tmp_path / "absent"), **source)))
    with pytest.raises(UserError, match="holds no videos"):
        train_tokenizer(tiny_config(tmp_path, source=ClipSource(videos=str(tmp_path), **source)))
    (tmp_path / "fake.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"fake\.mp4 cannot be decoded"):
        train_tokenizer(tiny_config(tmp_path, source=ClipSource(videos=str(tmp_path), **source)))
    texture_video(tmp_path / "fake.mp4", num_frames=10)
    with pytest.raises(UserError, match="has 13 frames at 12 fps; name longer videos"):
        train_tokenizer(tiny_config(tmp_path, source=ClipSource(videos=str(tmp_path), **source)))


def test_config_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="give exactly one"):
        TokenizerTrainConfig(output="x.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        TokenizerTrainConfig(output="x.bin", fsq=FsqTraining())
    with pytest.raises(ValueError, match="num_frames is 16"):
        ClipSource(num_frames=16)
    with pytest.raises(ValueError, match="nothing to draw"):
        ClipSource(texture_clips=0)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="not a place for a file"):
        train_tokenizer(TokenizerTrainConfig(output=str(tmp_path / "folder.safetensors"), fsq=FsqTraining()))


def test_evaluation_of_videos(tmp_path):
    texture_video(tmp_path / "a.mp4", num_frames=72)
    texture_video(tmp_path / "b.mp4", num_frames=40, seed=1)
    output = tmp_path / "result" / "evaluation.json"
    config = TokenizerEvaluateConfig(videos=str(tmp_path), height=32, width=48, output=str(output))
    result = evaluate_tokenizer(config)
    assert [(row.name, row.clips) for row in result.rows] == [("a.mp4", 2), ("b.mp4", 1), ("all", 3)]
    total = result.rows[-1]
    assert total.psnr == pytest.approx((2 * result.rows[0].psnr + result.rows[1].psnr) / 3)
    assert total.ssim == pytest.approx((2 * result.rows[0].ssim + result.rows[1].ssim) / 3)
    assert 0.3 < total.ssim < 1
    assert json.loads(output.read_text())["rows"][2]["codes_used"] == total.codes_used
    assert "a.mp4" in str(result)


def test_evaluation_refuses_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer: FSQ weights .*absent\.safetensors is not a file"):
        evaluate_tokenizer(
            TokenizerEvaluateConfig(tokenizer=TokenizerConfig(path=str(tmp_path / "absent.safetensors")))
        )
    texture_video(tmp_path / "short.mp4", num_frames=8)
    with pytest.raises(UserError, match="has 13 frames at 12 fps"):
        evaluate_tokenizer(TokenizerEvaluateConfig(videos=str(tmp_path)))


def test_reading_keeps_time_and_crops_the_centre(tmp_path):
    frames = np.zeros((24, 32, 64, 3), dtype=np.uint8)
    frames[:] = (np.arange(24) * 10)[:, None, None, None]
    frames[:, :, :16] = frames[:, :, 48:] = 255
    write_video(tmp_path / "ramp.mp4", frames, fps=24)
    read = read_video(tmp_path / "ramp.mp4", height=16, width=16, fps=12)
    assert read.shape == (12, 16, 16, 3)
    assert np.abs(read.mean((1, 2, 3)) - np.arange(0, 24, 2) * 10).max() < 12  # every other frame, no white edge
    assert list_videos(str(tmp_path / "ramp.mp4")) == [tmp_path / "ramp.mp4"]
    assert fit(torch.from_numpy(frames), 32, 64) is not None


def test_embedded_text_tokenizer_is_made_by_its_config(tmp_path):
    shipped = load_config(TokenizerTrainConfig, "text")
    assert TextTokenizer.load(EMBEDDED_FILE).vocab_size == shipped.text.vocab_size
    (tmp_path / "words.txt").write_text("red\ngreen\nmoving\n")
    corpus = TextCorpus(vocab_size=300, words=(str(tmp_path / "words.txt"),))
    result = train_tokenizer(TokenizerTrainConfig(output=str(tmp_path / "text.json"), text=corpus))
    assert TextTokenizer.load(tmp_path / "text.json").hash == result.weights_hash
    missing = TextCorpus(words=("absent.txt",))
    with pytest.raises(UserError, match=r"text\.words: absent\.txt is not a file"):
        train_tokenizer(TokenizerTrainConfig(output=str(tmp_path / "text.json"), text=missing))
