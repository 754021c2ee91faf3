"""Scores by models: what they compute, that they decide, and what a change of them redoes."""

import importlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.data.curate import curate
from pipelines.data.models.heads import Head
from pipelines.data.models.text_detector import TextDetector
from pipelines.data.settings import (
    CaptionConfig,
    CocaConfig,
    DecodeConfig,
    FeatureConfig,
    LooksConfig,
    OpenClipConfig,
)
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.steps.features import FeatureFunction, FeatureScores, TextFunction, similarity
from pipelines.data.video.frames import ClipReader
from pipelines.data.video.looks import wanted_looks
from pipelines.errors import UserError
from tests.pipelines.data.corpora import GOOD, copy_stages, curate_config
from tests.pipelines.data.look_rows import clips_with_looks
from tests.pipelines.data.small_models import COCA, EMBED, write_head, write_open_clip, write_text_detector
from tests.pipelines.data.videos import moving_square, numbered, read_numbers, write_video


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders and files by config key."""
    root = tmp_path_factory.mktemp("models")
    return {
        "features.clip.weights": write_open_clip(root / "clip"),
        "features.aesthetic_head": write_head(root / "aesthetic.pth"),
        "features.nsfw_head": write_head(root / "nsfw.pth", 8, 4, seed=1),
        "features.text_detector": write_text_detector(root / "text.onnx"),
        "captions.coca.weights": write_open_clip(root / "coca", COCA),
    }


def feature_config(models, **options):
    return FeatureConfig(
        clip=OpenClipConfig(weights=str(models["features.clip.weights"]), batch_size=3),
        aesthetic_head=str(models["features.aesthetic_head"]),
        nsfw_head=str(models["features.nsfw_head"]),
        text_detector=str(models["features.text_detector"]),
        **options,
    )


def test_features_are_those_of_open_clip_itself(models, tmp_path):
    frames = moving_square(24, size=(96, 64))
    config = feature_config(models)
    function = FeatureFunction(str(tmp_path), config=config, threads=1)
    [row] = function(clips_with_looks(write_video(tmp_path / "a.mp4", frames), tmp_path))
    found = np.frombuffer(row["clip"], np.float16).reshape(config.num_frames, EMBED).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    open_clip = importlib.import_module("open_clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{config.clip.weights}")
    with torch.inference_mode():
        images = torch.stack([preprocess(Image.fromarray(frames[index])) for index in (0, 6, 12, 18)])
        expected = model.eval().encode_image(images, normalize=True).numpy()
    assert (found * expected).sum(axis=1).min() > 0.995  # compression and another way to scale
    scores = FeatureScores(config).of_clip(row)
    linear = torch.load(config.aesthetic_head, weights_only=True)
    by_hand = found @ linear["weight"].numpy().T + linear["bias"].numpy()
    assert scores["aesthetic"] == pytest.approx(by_hand.mean(), abs=1e-5)


def test_features_do_not_depend_on_what_else_is_in_the_batch(models, tmp_path):
    config = feature_config(models)
    function = FeatureFunction(str(tmp_path), config=config, threads=1)
    clips = [
        clip
        for seed in range(3)
        for clip in clips_with_looks(write_video(tmp_path / f"{seed}.mp4", moving_square(seed=seed)), tmp_path)
    ]
    together = function(clips)
    assert [function([clip])[0] for clip in clips] == together


def test_heads_are_stacks_of_linear_layers(models, tmp_path):
    features = np.random.default_rng(0).standard_normal((5, EMBED)).astype(np.float32)
    state = torch.load(models["features.nsfw_head"], weights_only=True)
    values = torch.from_numpy(features)
    for number in (0, 2, 4):  # their numbers leave room for a ReLU
        values = torch.nn.functional.linear(
            values.relu() if number else values, state[f"layers.{number}.weight"], state[f"layers.{number}.bias"]
        )
    head = Head(str(models["features.nsfw_head"]), "features.nsfw_head", rectified=True)
    np.testing.assert_allclose(head(features), values[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    torch.save({"weight": torch.zeros(2, EMBED)}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"features.nsfw_head .*two.pth is no state dict of linear layers that end in"):
        Head(str(tmp_path / "two.pth"), "features.nsfw_head", rectified=True)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="is no state dict"):
        Head(str(tmp_path / "text.pth"), "features.nsfw_head", rectified=True)


def test_a_head_for_another_model_is_told(models, tmp_path):
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "l14.pth")
    config = FeatureConfig(clip=OpenClipConfig(weights="x"), aesthetic_head=str(tmp_path / "l14.pth"))
    row = {"clip": np.zeros((4, EMBED), np.float16).tobytes(), "text_area": None}
    with pytest.raises(UserError, match="aesthetic_head wants 768 features, but ViT-L-14 gives 16"):
        FeatureScores(config).of_clip(row)


def test_the_text_detector_measures_the_share_of_the_picture(models):
    detector = TextDetector(str(models["features.text_detector"]))
    picture = np.full((480, 640, 3), 60, np.uint8)
    assert detector.area(picture) == 0
    picture[200:216, 100:540] = 255  # a line of text: boxes are larger than what is lit, as detectors shrink them
    assert 16 * 440 / (480 * 640) < detector.area(picture) < 0.15
    with pytest.raises(UserError, match="cannot be loaded as ONNX"):
        TextDetector(str(models["features.aesthetic_head"]))


def test_similarity_takes_the_caption_that_fits_best(models, tmp_path):
    function = TextFunction(
        str(tmp_path), config=OpenClipConfig(weights=str(models["features.clip.weights"])), threads=1
    )
    rows = function([{"work_key": text, "text": text} for text in ("a red ball", "a dog", "a red ball rolls")])
    vectors = [row["clip"] for row in rows]
    assert similarity(vectors[0] + vectors[0], [vectors[1], vectors[0]]) == pytest.approx(1, abs=1e-2)
    alone = [similarity(vectors[0], [vector]) for vector in vectors]
    assert similarity(vectors[0], vectors[1:]) == max(alone[1:]) < 0.9999


@pytest.fixture(scope="module")
def scored(curated, corpus, tokenizer_file, models, tmp_path_factory):
    dataset = copy_stages(curated[0], tmp_path_factory.mktemp("scored") / "dataset")
    options = [f"{key}={path}" for key, path in models.items() if key.startswith("features")]
    options += ["features.clip.batch_size=4", "tokens.decode_back_share=1.0"]
    return dataset, options, curate(curate_config(corpus, dataset, tokenizer_file, *options))


@pytest.mark.slow  # a curation with open_clip in its workers; the scores themselves have tests of their own
def test_scores_by_models_are_in_the_ledger(scored):
    rows = open_snapshot(str(scored[0])).read_ledger().to_pylist()
    for row in rows:
        made = (
            [row["scores"][name] for name in ("text_area", "aesthetic", "nsfw", "similarity", "psnr")]
            if row["scores"]
            else []
        )
        if row["status"] == "kept":
            assert None not in made
            assert -1 <= row["scores"]["similarity"] <= 1
            assert 5 < row["scores"]["psnr"] < 60
            assert row["stage_hashes"]["features"]
        else:  # not looked at by large models
            assert made == [None] * len(made)
    assert scored[2].computed["features"] == GOOD + 1
    assert scored[2].computed["texts"] == GOOD + 1


def test_partial_rebuild_of_heads_and_thresholds_runs_no_model(scored, corpus, tokenizer_file, tmp_path):
    dataset, options, before = scored
    shutil.copytree(dataset, tmp_path / "d")
    values = sorted(
        row["scores"]["aesthetic"]
        for row in open_snapshot(str(dataset)).read_ledger().to_pylist()
        if row["status"] == "kept"
    )
    middle = (values[2] + values[3]) / 2
    result = curate(
        curate_config(corpus, tmp_path / "d", tokenizer_file, *options, f"thresholds.min_aesthetic={middle}")
    )
    assert sum(result.computed.values()) == 0
    assert result.counts["kept"] == before.counts["kept"] - 3
    assert result.reasons["rejected: aesthetic"] == 3
    other = write_head(tmp_path / "other.pth", seed=5)
    result = curate(curate_config(corpus, tmp_path / "d", tokenizer_file, *options, f"features.aesthetic_head={other}"))
    assert sum(result.computed.values()) == 0
    assert result.snapshot_id != before.snapshot_id
    result = curate(curate_config(corpus, tmp_path / "d", tokenizer_file, *options, "thresholds.min_similarity=1.0"))
    assert result.reasons["rejected: similarity"] == GOOD + 1
    assert sum(result.computed.values()) == 0


@pytest.mark.slow
def test_partial_rebuild_of_a_captioner_recaptions_and_nothing_else(scored, corpus, tokenizer_file, models, tmp_path):
    dataset, options, _ = scored
    shutil.copytree(dataset, tmp_path / "d")
    coca = [*options, f"captions.coca.weights={models['captions.coca.weights']}", "captions.coca.max_tokens=6"]
    both = curate_config(corpus, tmp_path / "d", tokenizer_file, *coca, "captions.captioners=[given,coca]")
    result = curate(both)
    made = {name: count for name, count in result.computed.items() if count}
    assert made.pop("captions-coca") == GOOD + 1
    assert set(made) <= {"texts"}  # the new captions are compared with their clips
    snapshot = open_snapshot(str(tmp_path / "d"))
    assert len(snapshot.manifest.captioners) == 2
    shards = [shard for bucket in snapshot.manifest.buckets for shard in bucket.shards]
    rows = [row for shard in shards for row in snapshot.read_shard(shard).to_pylist()]
    for row in rows:
        given, coca_made = row["captions"]
        assert given["captioner"] == "metadata"
        assert coca_made["captioner"].startswith("coca@")
        assert len(coca_made["text"]) > 0
    again = curate(both)
    assert sum(again.computed.values()) == 0
    assert again.snapshot_id == result.snapshot_id


def test_captions_that_are_not_fit_are_left_out(scored, corpus, tokenizer_file, tmp_path):
    dataset, options, _ = scored
    shutil.copytree(dataset, tmp_path / "d")
    strict = [*options, "captions.min_words=4"]
    result = curate(curate_config(corpus, tmp_path / "d", tokenizer_file, *strict))
    assert result.left_out == {"words < 4": GOOD + 1}  # "this is good_000.mp4"
    assert result.reasons["rejected: caption"] == GOOD + 1
    ledger = open_snapshot(str(tmp_path / "d")).read_ledger().to_pylist()
    assert "caption: words 3 < 4" in {row["reason"] for row in ledger}
    assert sum(result.computed.values()) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "features.clip.weights=/nowhere/clip.pt",
            "features.clip.weights /nowhere/clip.pt does not exist; download it",
        ),
        ("features.text_detector=/nowhere.onnx", "take a DB text detection model .*features.text_detector=null"),
        ("thresholds.min_aesthetic=5", "thresholds.min_aesthetic needs a score .*features.aesthetic_head"),
        ("features.nsfw_head=/n.pth", "nsfw_head needs CLIP features"),
        ("captions.captioners=[coca]", "coca.weights is not set"),
        ("captions.captioners=[endpoint]", "endpoint.url is not set"),
        ("captions.captioners=[given,given]", "names one twice"),
    ],
)
def test_missing_models_end_before_any_work(corpus, tokenizer_file, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        curate(curate_config(corpus, tmp_path / "d", tokenizer_file, override))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["features.clip.weights={odd}"], "features.clip.weights .*odd cannot be loaded as a folder of open_clip"),
        (["features.clip.weights={clip}", "features.aesthetic_head={l14}"], "aesthetic_head wants 768 .* gives 16"),
        (["features.text_detector={l14}"], "cannot be loaded as ONNX"),
        (["captions.captioners=[coca]", "captions.coca.weights={odd}"], "captions.coca.weights .*odd cannot be loaded"),
    ],
)
def test_models_that_do_not_fit_end_before_any_work(models, corpus, tokenizer_file, tmp_path, overrides, message):
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "l14.pth")
    clip = models["features.clip.weights"]
    odd = shutil.copytree(models["captions.coca.weights"], tmp_path / "odd")
    shutil.copy(clip / "open_clip_model.safetensors", odd)  # weights of another architecture
    named = [text.format(clip=clip, odd=odd, l14=tmp_path / "l14.pth") for text in overrides]
    with pytest.raises(UserError, match=message):
        curate(curate_config(corpus, tmp_path / "d", tokenizer_file, *named))
    assert not (tmp_path / "d").exists()


def test_settings_name_what_they_lack():
    with pytest.raises(ValueError, match="languages are codes such as en, got 'English'"):
        CaptionConfig(languages=("English",))
    with pytest.raises(ValueError, match=r"max_tokens must be in 1\.\.75"):
        CocaConfig(max_tokens=100)


def test_layers_are_rectified_where_their_numbers_leave_room(tmp_path):
    """As in LAION's h14_nsfw.pth: ReLU and Dropout between layers, but none before the last."""
    torch.manual_seed(0)
    stack = torch.nn.Sequential(
        torch.nn.Linear(EMBED, 8), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)
    ).eval()
    torch.save({f"layers.{name}": value for name, value in stack.state_dict().items()}, tmp_path / "nsfw.pth")
    features = torch.randn(6, EMBED)
    head = Head(str(tmp_path / "nsfw.pth"), "features.nsfw_head", rectified=True)
    np.testing.assert_allclose(head(features.numpy()), stack(features)[:, 0].detach().numpy(), rtol=1e-4, atol=1e-5)
    odd = {"0.weight": torch.zeros(1, EMBED), "1.running_mean": torch.zeros(1)}
    torch.save(odd, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"1\.running_mean belongs to no linear layer"):
        Head(str(tmp_path / "odd.pth"), "features.nsfw_head", rectified=False)


def test_frames_are_evenly_spaced_and_the_second_of_two_is_the_middle(tmp_path):
    [clip] = clips_with_looks(write_video(tmp_path / "a.mp4", numbered(24)), tmp_path)
    reader = ClipReader(str(tmp_path), DecodeConfig())
    for count, expected in ((2, [0, 12]), (4, [0, 6, 12, 18])):
        [(_, frames)] = reader.read([clip], lambda row, count=count: wanted_looks(row, LooksConfig(num_frames=count)))
        assert frames.shape[1:] == (48, 64, 3)
        assert read_numbers(frames) == expected
    reader.child.close()
