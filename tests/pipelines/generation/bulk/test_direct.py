"""Runs of few videos, which this process makes without Ray."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import ray

import lumos
from lumos.compression import VideoSize
from lumos.config import SamplingConfig
from lumos.sampling import generate as draw_codes
from pipelines.config import config_to_yaml
from pipelines.errors import UserError
from pipelines.generation.bulk.run import generate
from pipelines.generation.config import BatchConfig, GenerateConfig, SamplingChoice, SizeConfig
from pipelines.generation.model import read_card
from pipelines.media import encode_jpeg, encode_video
from pipelines.storage.lock import dataset_lock
from tests.pipelines.data.videos import moving_square, write_video

pytestmark = pytest.mark.usefixtures("no_cluster")

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))


def manifest_of(config: GenerateConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "manifest.jsonl").read_text().splitlines()]


def with_rows(config: GenerateConfig, folder: Path, *rows: dict[str, Any]) -> GenerateConfig:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return replace(config, prompts=str(file))


def test_few_videos_are_the_librarys_and_resume_makes_what_is_missing(
    generate_config: GenerateConfig, tokenizer_path: Path
) -> None:
    config = replace(generate_config, seeds_per_prompt=2)
    said: list[str] = []
    assert generate(config, said.append).generated == 4
    assert said == [f"loading {config.model}"]
    rows = manifest_of(config)
    model = lumos.load(config.model, device="cpu", tokenizer=tokenizer_path)
    for row in rows:
        frames = model.generate(row["prompt"], seed=row["seed"], num_steps=4, guidance_scale=3.0)
        assert encode_video(frames, row["fps"]) == (Path(config.output) / row["path"]).read_bytes()
    (Path(config.output) / rows[2]["path"]).unlink()
    again = generate(config)
    assert (again.generated, again.skipped) == (1, 3)
    assert manifest_of(config) == rows


def test_a_folder_that_another_run_writes_to_is_left_to_it(generate_config: GenerateConfig) -> None:
    """Each of the two would write a manifest without the other's videos."""
    with dataset_lock(generate_config.output), pytest.raises(UserError, match=r"^output: .* in use by another run"):
        generate(generate_config)
    assert generate(generate_config).generated == 2


def test_pictures_and_clips_of_a_file_are_found_beside_it(
    generate_config: GenerateConfig, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "given").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "given" / "a.png").write_bytes(encode_video(picture, 1.0, "png"))
    clip = write_video(tmp_path / "given" / "b.mkv", moving_square(5, size=(32, 32)), codec="ffv1", pixel_format="bgr0")
    config = with_rows(
        generate_config,
        tmp_path,
        {"prompt": "a red square", "image": "given/a.png", "seed": 3},
        {"prompt": "a red square", "clip": str(clip), "seed": 3},
        {"prompt": "a red square", "seed": 3},
    )
    assert generate(config).generated == 3
    rows = manifest_of(config)
    assert [(row.get("image"), row.get("clip")) for row in rows] == [("a.png", None), (None, "b.mkv"), (None, None)]
    assert len({row["config_hash"] for row in rows}) == 3
    model = lumos.load(config.model, device="cpu", tokenizer=tokenizer_path)
    options: dict[str, Any] = {"seed": 3, "num_steps": 4, "guidance_scale": 3.0}
    for row, given in zip(rows, ({"image": picture[0]}, {"clip": moving_square(5, size=(32, 32))}, {}), strict=True):
        frames = model.generate("a red square", **options, **given)
        assert encode_video(frames, 12.0) == (Path(config.output) / row["path"]).read_bytes()
    assert generate(config).skipped == 3
    (tmp_path / "given" / "a.png").write_bytes(encode_video(255 - picture, 1.0, "png"))
    assert generate(config).generated == 1  # what it begins with is another picture now


def test_a_size_that_the_model_was_not_trained_on_is_told(generate_config: GenerateConfig) -> None:
    said: list[str] = []
    generate(generate_config, said.append)
    assert not [words for words in said if "trained" in words]
    other = replace(generate_config, prompts=("a red square",), output=f"{generate_config.output}.gif", format="gif")
    generate(replace(other, video=SizeConfig(num_frames=5)), said.append)  # drawn as the begin of such a video
    assert not [words for words in said if "trained" in words]
    generate(replace(other, video=SizeConfig(num_frames=13)), said.append)
    warning = "warning: 32x32, 13 frames at 12 fps is no size that the model was trained on: 32x32, 9 frames at 12 fps"
    assert warning in said


@pytest.mark.parametrize("num_frames", [1, 5])
def test_a_shorter_video_is_untrained_only_where_the_videos_of_the_training_begin_otherwise(
    generate_config: GenerateConfig, num_frames: int
) -> None:
    card = read_card(generate_config)
    short = VideoSize(width=32, height=32, num_frames=num_frames, fps=12.0)
    assert card.untrained(short) is None  # 9 frames at 12 a second are told as one second too
    assert card.untrained(replace(short, fps=24.0)) is not None
    assert card.untrained(replace(short, width=48)) is not None
    moving = replace(card, folder=replace(card.folder, info=replace(card.folder.info, motion_prefix=True)))
    assert (moving.untrained(short) is None) == (num_frames > 1)  # no prompt of an image says how much moves
    for changed in (
        replace(card.folder, prompt_template="lumos1"),  # which tells the number of frames
        replace(card.folder, info=replace(card.folder.info, shapes=((7, 4, 4),))),  # two seconds
    ):
        assert replace(card, folder=changed).untrained(short) is not None


def test_a_shorter_video_is_the_begin_of_one_as_long_as_those_of_the_training(generate_config: GenerateConfig) -> None:
    model = lumos.load(generate_config.model, device="cpu", tokenizer=generate_config.tokenizer.path)

    def codes(num_frames: int) -> Any:
        size = model.encoder.size(width=None, height=None, num_frames=num_frames, fps=None)
        request = model.encoder.encode("a red square", size=size, seed=3, sampling=SamplingConfig(num_steps=4))
        return draw_codes(model.decoder, model.folder.vocabulary, [request])[0]

    whole = codes(9)
    assert len(whole) == 3
    for num_frames, latents in ((5, 2), (1, 1)):
        assert np.array_equal(codes(num_frames), whole[:latents])


def test_progress_counts_every_latent_frame_once(
    generate_config: GenerateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(replace(generate_config, prompts=("one", "two")))
    row = manifest_of(generate_config)[0]
    latents = (row["num_frames"] + 3) // 4
    assert f"{2 * latents}/{2 * latents}" in capsys.readouterr().err


def test_a_video_is_continued_into_one_file(generate_config: GenerateConfig, tmp_path: Path) -> None:
    one = replace(generate_config, prompts=("a red square",), output=str(tmp_path / "one.mp4"))
    generate(one)
    longer = replace(
        one, clip=one.output, output=str(tmp_path / "two.gif"), format="gif", video=SizeConfig(num_frames=17)
    )
    generate(longer)
    with av.open(longer.output) as container:
        assert sum(1 for _ in container.decode(video=0)) == 17
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.mp4", "two.gif"]


def test_equal_rows_get_seeds_of_their_own(generate_config: GenerateConfig, tmp_path: Path) -> None:
    config = with_rows(
        replace(generate_config, seed=5, seeds_per_prompt=2), tmp_path, *[{"prompt": text} for text in "aba"]
    )
    generate(config)
    rows = manifest_of(config)
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("a", 5),
        ("a", 6),
        ("b", 5),
        ("b", 6),
        ("a", 7),
        ("a", 8),
    ]
    assert len({row["sha256"] for row in rows}) == 6


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1}], "line 2 asks for the same video as .* line 1 "),
        ([{"prompt": "a"}, {"prompt": "a", "seed": 0}], r"line 2 asks for the same video as .*\(seed 0\): give it"),
        ([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}], "line 2: the id 'x' is that of .* line 1 too"),
        ([{"prompt": "a", "image": "none.png"}], "line 1: image .*/none.png: it cannot be read: No such file"),
        ([{"prompt": "a", "image": "http://host/a.png"}], "it is named by a URL"),
        ([{"prompt": "a", "clip": "prompts.jsonl"}], "line 1: clip .*: it is neither a picture nor a video"),
        ([{"prompt": "a", "image": 3}], "line 1: image is 3; it must be a path"),
        ([{"prompt": "a", "image": "a.png", "clip": "b.mp4"}], "image and clip are both named"),
    ],
)
def test_rows_that_cannot_be_met_leave_nothing_behind(
    generate_config: GenerateConfig, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(with_rows(generate_config, tmp_path, *rows))
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_every_row_that_cannot_be_met_is_told(generate_config: GenerateConfig, tmp_path: Path) -> None:
    long = {"prompt": "word " * 1000}
    with pytest.raises(UserError) as error:
        generate(with_rows(generate_config, tmp_path, {"prompt": "a", "image": "x.png"}, {"prompt": "b", "clip": "y"}))
    assert [word in str(error.value) for word in ("2 mistakes", "line 1: image", "line 2: clip")] == [True] * 3
    with pytest.raises(UserError) as error:
        generate(with_rows(replace(generate_config, seeds_per_prompt=3), tmp_path, long, {"prompt": "a"}, long))
    assert [line.partition("prompts.jsonl, ")[2][:6] for line in str(error.value).split("\n  ")] == [
        "",
        "line 1",
        "line 3",
    ]


def test_a_picture_is_no_clip_and_a_clip_no_picture(generate_config: GenerateConfig, tmp_path: Path) -> None:
    picture, clip = tmp_path / "photo.jpg", tmp_path / "clip.mp4"
    picture.write_bytes(encode_jpeg(np.zeros((40, 40, 3), np.uint8)))
    write_video(clip, moving_square(9))
    with pytest.raises(UserError, match=r"^clip: [^ ]*photo\.jpg: it is no video: a picture .*as image \(--image\)"):
        generate(replace(generate_config, clip=str(picture)))
    with pytest.raises(UserError, match=r"^image: [^ ]*clip\.mp4: it is no picture: a video .*as clip \(--continue\)"):
        generate(replace(generate_config, image=str(clip)))
    assert not Path(generate_config.output).exists()


def test_a_name_of_an_unknown_kind_is_a_folder_only_where_it_says_so(
    generate_config: GenerateConfig, tmp_path: Path
) -> None:
    config = replace(generate_config, prompts=("a",), video=SizeConfig(num_frames=1))
    for name in ("video.avi", "video.webm", "v.MOV"):
        with pytest.raises(UserError, match=rf"{name} ends in .*one file is \.mp4, \.gif, \.png"):
            generate(replace(config, output=str(tmp_path / name)))
    assert not list(tmp_path.iterdir())
    for output in (f"{tmp_path}/v.avi/", str(tmp_path / "model-1.5"), str(tmp_path / "v.avi")):  # there by now
        generate(replace(config, output=output))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-1.5", "v.avi"]
    (tmp_path / "one.mp4").mkdir()
    with pytest.raises(UserError, match=r"one\.mp4 is a folder"):
        generate(replace(config, output=str(tmp_path / "one.mp4")))


def test_ctrl_c_ends_a_run_and_says_how_to_go_on(generate_config: GenerateConfig, tmp_path: Path) -> None:
    slow = replace(
        generate_config,
        prompts=("a", "b"),
        video=SizeConfig(num_frames=41),
        sampling=SamplingChoice(num_steps=2000),
        batch=BatchConfig(max_size=2),
    )
    (tmp_path / "slow.yaml").write_text(config_to_yaml(slow))
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "generate", str(tmp_path / "slow.yaml")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts tests in the background has its children ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "reading the request\n"
    assert process.stderr.readline().startswith("warning: 32x32, 41 frames at 12 fps is no size that the model was")
    assert process.stderr.readline() == f"loading {slow.model}\n"
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted; what is in" in rest
    assert "the same command continues" in rest
    assert "Traceback" not in rest
    assert os.listdir(slow.output) == [".lock"]  # no video was done
