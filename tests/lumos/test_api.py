import ast
import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import lumos
from lumos.api import SamplingOptions, _seeds
from lumos.config import SamplingConfig
from lumos.guidance import GenerationRequest, GuidedBranches
from lumos.sampling import generate
from lumos.tokenizers import TextTokenizer, TokenizerConfig
from lumos.tokenizers.fsq import EMBEDDED_WEIGHTS, FsqAutoencoder, FsqConfig, save_weights

from .models import save_tiny_folder

PROMPT = "a red square moves left over a blue background"
HEIGHT, WIDTH = 16, 32  # of the folder's first shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "export"
    save_tiny_folder(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return lumos.load(folder, device="cpu")


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (5, HEIGHT, WIDTH, 3), dtype=np.uint8)


def decoded(model, codes):
    return model.tokenizer.decode(torch.as_tensor(codes)[None])[0].numpy()


def test_a_video_is_what_the_sampler_draws_for_the_trained_size_and_recommended_settings(model, folder):
    frames = model.generate(PROMPT, seed=7)
    assert (frames.shape, frames.dtype) == ((5, HEIGHT, WIDTH, 3), np.uint8)
    checkpoint = lumos.load_checkpoint(folder)
    request = GenerationRequest(
        text_ids=TextTokenizer.load().encode(PROMPT),
        shape=(2, 2, 4),
        fps=12.0,
        seed=7,
        config=SamplingConfig(num_steps=3, guidance_scale=2.0),
    )
    assert np.array_equal(frames, decoded(model, generate(checkpoint.model, checkpoint.vocabulary, [request])[0]))
    assert np.array_equal(frames, model.generate(PROMPT, seed=7, num_steps=3, guidance_scale=2.0, history_ratio=0.7))
    for change in ({"seed": 8}, {"num_steps": 5}, {"guidance_scale": 8.0}, {"history_ratio": 0.0}, {"fps": 24.0}):
        assert not np.array_equal(frames, model.generate(PROMPT, **{"seed": 7, **change})), change


def test_several_prompts_at_once_give_what_each_gives_alone(model):
    prompts = [f"prompt number {i}" for i in range(10)]
    videos = model.generate(prompts, seed=3, num_frames=1)
    assert len(videos) == 10
    alone = [model.generate(prompt, seed=3, num_frames=1) for prompt in prompts]
    assert all(np.array_equal(a, b) for a, b in zip(videos, alone, strict=True))
    first, second = model.generate([PROMPT, PROMPT], seed=[1, 2])
    assert np.array_equal(second, model.generate(PROMPT, seed=2))
    assert not np.array_equal(first, second)
    assert model.generate([]) == []


def test_an_image_and_another_size_are_drawn_on_demand(model):
    assert model.generate(PROMPT, num_frames=1).shape == (1, HEIGHT, WIDTH, 3)
    assert model.generate(PROMPT, num_frames=1, size=(16, 48)).shape == (1, 48, 16, 3)
    assert np.array_equal(model.generate(PROMPT, size="16x32"), model.generate(PROMPT, size=(16, 32)))


def test_a_video_begins_with_the_image_given(model, pictures):
    frames = model.generate(PROMPT, image=pictures[0])
    assert frames.shape == (5, HEIGHT, WIDTH, 3)
    codes = model.tokenizer.encode(torch.from_numpy(pictures[None, :1]))
    assert np.array_equal(frames[0], decoded(model, codes[0])[0])
    assert not np.array_equal(frames, model.generate(PROMPT, image=pictures[1]))
    assert np.array_equal(frames, model.generate(PROMPT, image=torch.from_numpy(pictures[0])))


def test_what_is_given_may_have_any_size(model, pictures):
    wide = np.zeros((5, 2 * HEIGHT, 4 * WIDTH, 3), np.uint8)
    wide[:, :, WIDTH : 3 * WIDTH] = pictures.repeat(2, axis=1).repeat(2, axis=2)
    assert np.array_equal(model.generate(PROMPT, image=wide[0]), model.generate(PROMPT, image=pictures[0]))
    continued = model.generate(PROMPT, clip=wide, num_frames=9)
    assert np.array_equal(continued, model.generate(PROMPT, clip=pictures, num_frames=9))
    assert model.generate(PROMPT, image=pictures[0], size="16x48").shape == (5, 48, 16, 3)


def test_a_clip_is_continued(model, pictures):
    frames = model.generate([PROMPT, "another"], clip=pictures, num_frames=9)
    codes = model.tokenizer.encode(torch.from_numpy(pictures[None]))[0]
    for video in frames:
        assert video.shape == (9, HEIGHT, WIDTH, 3)
        assert np.array_equal(video[:5], decoded(model, codes))
    assert not np.array_equal(*frames)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (40, 32)}, "width 40 is not a multiple of 16 px, the model's grid unit: use 32 or 48"),
        ({"size": "large"}, "write it as WIDTHxHEIGHT"),
        ({"num_frames": 6}, r"num_frames 6 is not 1 \+ 4k: use 5 or 9"),
        ({"num_frames": 401}, "alone make .*: use fewer frames or a smaller size"),
        ({"fps": 100.0}, r"fps 100 is outside 1\.\.64"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"seed": [1, 2]}, "seed has 2 numbers for 1 prompts"),
        ({"image": np.zeros((16, 32, 3))}, r"image must be uint8 \[H, W, 3\].*, got float64 \[16, 32, 3\]"),
        ({"image": np.zeros((1, 16, 32, 3), np.uint8)}, r"image must be uint8 \[H, W, 3\]"),
        ({"image": np.zeros((16, 0, 3), np.uint8)}, r"image has no pixels: \[1, 16, 0, 3\]"),
        ({"image": np.zeros((16, 32, 3), np.uint8), "num_frames": 1}, "set num_frames to 5 or more"),
        ({"clip": np.zeros((4, 16, 32, 3), np.uint8)}, r"clip: num_frames 4 is not 1 \+ 4k: use 1 or 5"),
        ({"clip": np.zeros((5, 16, 32, 3), np.uint8)}, "5 frames are given and num_frames is 5: set num_frames to 9"),
        ({"clip": np.zeros((1, 16, 32, 3), np.uint8), "image": np.zeros((16, 32, 3), np.uint8)}, "both given"),
    ],
)
def test_what_cannot_be_drawn_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, **arguments)
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate(" ")


@pytest.mark.parametrize("seed", [1.5, None, "7", True, [1, 2.0]])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(ValueError, match="seed must be a whole number, or one for each prompt, got"):
        _seeds(seed, 2)  # as a program without types asks


def test_seeds_may_be_numpy_s(model):
    by_numpy = model.generate([PROMPT, PROMPT], seed=np.arange(3, 5), num_frames=1)
    assert np.array_equal(by_numpy[1], model.generate(PROMPT, seed=np.int64(4), num_frames=1))
    assert np.array_equal(by_numpy[0], model.generate(PROMPT, seed=3, num_frames=1))


def test_every_setting_of_the_sampler_is_an_option():
    assert list(SamplingOptions.__annotations__) == [f.name for f in fields(SamplingConfig)]


def test_an_option_that_does_not_exist_is_named(model):
    with pytest.raises(TypeError, match="steps"):
        model.generate(PROMPT, steps=3)


def test_folders_that_cannot_be_loaded_say_what_to_do(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a checkpoint.*Name the folder that `lumos train`"):
        lumos.load(tmp_path / "nowhere")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "text_tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"text_tokenizer: .*text_tokenizer.json is not a file: name the"):
        lumos.load(bare)
    other = TextTokenizer.train(["other words"], vocab_size=260)
    other.save(bare / "text_tokenizer.json")
    with pytest.raises(ValueError, match=r"text_tokenizer: .* is not the one the model .* was trained with"):
        lumos.load(bare)
    with pytest.raises(FileNotFoundError, match=r"tokenizer: FSQ weights .*none.safetensors is not a file"):
        lumos.load(folder, tokenizer=tmp_path / "none.safetensors")
    save_weights(tmp_path / "small.safetensors", FsqAutoencoder(FsqConfig(levels=(4, 4), hidden_size=8)), {})
    with pytest.raises(ValueError, match=r"tokenizer: the fsq tokenizer .*small.* is not the one the model .* trained"):
        lumos.load(folder, tokenizer=tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"tokenizer: tokenizer kind cosmos needs a path"):
        lumos.load(folder, tokenizer_kind="cosmos")


def test_a_model_finds_the_tokenizer_it_was_trained_with_by_its_kind(tmp_path):
    save_tiny_folder(tmp_path / "m", kind="fsq-footage")
    footage = lumos.load(tmp_path / "m", device="cpu")
    assert footage.folder.video_tokenizer == TokenizerConfig(kind="fsq-footage")
    assert footage.tokenizer.codebook_size == 64_000
    assert footage.generate(PROMPT, num_steps=1).shape == (5, HEIGHT, WIDTH, 3)
    with pytest.raises(
        ValueError, match=r"the fsq tokenizer in the package .* is not the one .* trained with, fsq-foo"
    ):
        lumos.load(tmp_path / "m", tokenizer_kind="fsq")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    raw["lumos"]["info"]["tokenizer"]["kind"] = "newer"
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"kind is 'newer'; known tokenizers: fsq, fsq-footage, cosmos; update lumos"):
        lumos.load(tmp_path / "m")
    weights = EMBEDDED_WEIGHTS["fsq-footage"]
    assert lumos.load(tmp_path / "m", device="cpu", tokenizer=weights, tokenizer_kind="fsq").tokenizer.kind == "fsq"


def test_a_model_that_names_no_size_asks_for_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    raw["lumos"]["info"] = {"tokenizer": raw["lumos"]["info"]["tokenizer"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    silent = lumos.load(tmp_path / "m", device="cpu")
    with pytest.raises(ValueError, match=r"width is not given and the model .* names no size it was trained on"):
        silent.generate(PROMPT)
    assert silent.info.sampling == SamplingConfig()
    frames = silent.generate(PROMPT, size=(32, 16), num_frames=1, fps=12.0, num_steps=1)
    assert frames.shape == (1, 16, 32, 3)


def test_where_and_what_a_model_is_is_told(model, folder):
    name = folder.parent.name  # "export" says nothing
    assert repr(model) == f"<lumos.Model {name}: 0.2 M parameters on cpu, videos 32x16, 5 frames at 12 fps>"
    assert model.folder.video_tokenizer == TokenizerConfig(kind="fsq")
    automatic = lumos.load(folder, dtype=torch.bfloat16).decoder.lm_head.weight
    assert automatic.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert automatic.dtype == torch.bfloat16


def test_every_name_of_the_package_is_there_and_known_to_type_checkers():
    tree = ast.parse(Path(lumos.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == lumos._HOMES
    assert sorted(typed) == lumos.__all__
    assert set(lumos.__all__) <= set(dir(lumos))
    for name in lumos.__all__:
        assert getattr(lumos, name) is not None
    with pytest.raises(AttributeError, match="'lumos' has no attribute 'Modle'"):
        lumos.Modle  # noqa: B018


@pytest.mark.slow  # Inductor compiles for half a minute
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler on PATH, which Inductor needs")
def test_a_compiled_model_gives_what_a_plain_one_does(model, folder):
    compiled = lumos.load(folder, device="cpu", compile=True)
    size = model.encoder.size(width=None, height=None, num_frames=None, fps=None)
    request = model.encoder.encode(PROMPT, size=size, seed=7, sampling=model.info.sampling)
    with torch.inference_mode():
        found = []
        for each in (model, compiled):
            branches = GuidedBranches(each.decoder, each.folder.vocabulary, [request])
            unknown = torch.ones(1, len(branches.slots), dtype=torch.bool)
            frames = branches.frames(torch.zeros(1, len(branches.slots), dtype=torch.int64), unknown)
            found.append(branches.guided(frames, unknown, unknown, step=0, num_steps=4))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
