import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import UserError
from pipelines.generation.bulk.check import check_layout
from pipelines.generation.bulk.layouts import MAX_NAME_BYTES, read_groups, video_names
from pipelines.generation.bulk.plan import Job, plan
from pipelines.generation.bulk.run import generate
from pipelines.generation.config import BatchConfig, GenerateConfig, SizeConfig
from pipelines.generation.model import read_card
from pipelines.media import encode_video

pytestmark = pytest.mark.usefixtures("no_cluster")  # with one, videos are made by Ray Serve

VBENCH = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red square", "dimension": ["appearance_style"], "auxiliary_info": {}},
    {"prompt_en": "a red square", "dimension": ["overall_consistency", "aesthetic_quality"]},  # as two of VBench's are
    {"prompt_en": 'a "blue" circle, 50% done: really?', "dimension": ["color"]},
]
VBENCH2 = [
    {"prompt_en": "A man is playing basketball.", "dimension": ["Diversity"]},
    {"prompt_en": "word " * 60, "dimension": "Composition"},
]
I2V = [
    {"prompt_en": "a cliff", "dimension": ["i2v_background"], "image_name": "a cliff.png"},
    {"prompt_en": "a lake, camera pans left", "dimension": ["camera_motion"], "image_name": "a lake.png"},
]
GENEVAL = [
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
]


def config_of(
    base: GenerateConfig, folder: Path, layout: Any, rows: list[dict[str, Any]], **more: Any
) -> GenerateConfig:
    file = folder / f"{layout}.json"
    file.write_text("\n".join(map(json.dumps, rows)) if layout == "geneval" else json.dumps(rows))
    return replace(base, layout=layout, prompts=str(file), batch=BatchConfig(max_size=64, max_queued=64), **more)


def jobs_of(config: GenerateConfig) -> list[Job]:
    return plan(config, read_card(config))


def test_vbench_names_and_numbers(generate_config: GenerateConfig, tmp_path: Path) -> None:
    rows = [job.row for job in jobs_of(config_of(generate_config, tmp_path, "vbench", VBENCH, seed=1000))]
    videos = [path for row in rows for path in (row["path"], *row.get("copies", ()))]
    assert len(videos) == len(set(videos)) == 3 * 5 + 25
    assert {path for path in videos if "square" in path} == {f"videos/a red square-{i}.mp4" for i in range(5)}
    assert sum(path.startswith("flickering/In a still frame, a stop sign-") for path in videos) == 25
    assert 'videos/a "blue" circle, 50% done: really?-0.mp4' in videos
    assert len({row["seed"] for row in rows}) == len(rows) == 3 * 5 + 20
    assert {row["seed"] for row in rows if row["index"] == 1} == set(range(1100, 1105))


def test_long_prompts_are_drawn_and_short_ones_name(generate_config: GenerateConfig, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("\n".join(f"text {i} in many words" for i in range(4)))
    config = config_of(generate_config, tmp_path, "vbench", VBENCH, long_prompts=str(tmp_path / "long.txt"))
    found = {(job.row["prompt"], job.row["named_by"]) for job in jobs_of(config)}
    assert found == {(f"text {i} in many words", VBENCH[i]["prompt_en"]) for i in (0, 1, 3)}
    assert {job.request.prompt for job in jobs_of(config)} == {row[0] for row in found}
    (tmp_path / "long.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"has 2 texts, .* 4 entries: they must correspond line by line"):
        jobs_of(config)


def test_vbench2_cuts_names_and_wants_20_of_diversity(generate_config: GenerateConfig, tmp_path: Path) -> None:
    paths = [job.row["path"] for job in jobs_of(config_of(generate_config, tmp_path, "vbench2", VBENCH2))]
    assert len(paths) == 20 + 3
    assert f"videos/{VBENCH2[1]['prompt_en'][:180]}-2.mp4" in paths


def save_picture(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_video(np.full((1, 70, 40, 3), level, np.uint8), 1.0, "png"))


def test_i2v_begins_with_the_crop_of_the_nearest_ratio(generate_config: GenerateConfig, tmp_path: Path) -> None:
    for level, ratio in ((10, "1-1"), (200, "7-4"), (250, "16-9")):
        for row in I2V:
            save_picture(tmp_path / "crop" / ratio / row["image_name"], level)
    config = config_of(generate_config, tmp_path, "vbench-i2v", I2V, images=str(tmp_path))
    for size, level in ((SizeConfig(width=32, height=32), 10), (SizeConfig(width=112, height=64, num_frames=5), 200)):
        jobs = jobs_of(replace(config, video=size))
        assert len(jobs) == 10
        assert {int(job.request.given.mean()) for job in jobs if job.request.given is not None} == {level}
        assert {job.row["image"] for job in jobs} == {"a cliff.png", "a lake.png"}
    early = [I2V[0], {key: value for key, value in I2V[1].items() if key != "image_name"}]
    (tmp_path / "crop" / "1-1" / "a lake.jpg").write_bytes((tmp_path / "crop" / "1-1" / "a lake.png").read_bytes())
    named = [
        job.row["image"]
        for job in jobs_of(config_of(generate_config, tmp_path, "vbench-i2v", early, images=str(tmp_path)))
    ]
    assert set(named) == {"a cliff.png", "a lake.jpg"}
    (tmp_path / "crop" / "1-1" / "a cliff.png").unlink()
    with pytest.raises(UserError, match=r"entry 0: image .*1-1/a cliff\.png: it cannot be read: No such file"):
        jobs_of(config)


def test_geneval_folders_are_made_continued_and_accepted(generate_config: GenerateConfig, tmp_path: Path) -> None:
    size = SizeConfig(num_frames=1)
    config = config_of(generate_config, tmp_path, "geneval", GENEVAL, format="png", video=size)
    assert generate(config).generated == 8
    out = Path(config.output)
    assert json.loads((out / "images/00001/metadata.jsonl").read_text()) == GENEVAL[1]
    assert check_layout(config.output, "geneval").is_valid
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    (out / "images/00000/samples/0002.png").unlink()
    (out / "images/00001/samples/0001.png").write_bytes(b"no picture")
    (out / "images/00001/samples/0004.png").write_bytes(b"")
    (out / "images/00000/metadata.jsonl").write_text(json.dumps(GENEVAL[1]))
    report = check_layout(config.output, "geneval")
    assert report.missing == ["images/00000/samples/0002.png"]
    assert report.surplus == ["images/00001/samples/0004.png"]
    assert [fault.partition(":")[0] for fault in report.wrong] == [
        "images/00000/metadata.jsonl",
        "images/00001/samples/0001.png",
    ]
    assert generate(config).generated == 2
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(UserError, match=r"num_frames is 9: set video\.num_frames=1"):
        jobs_of(replace(config, video=SizeConfig(num_frames=9)))


def test_a_part_of_vbench_without_temporal_flickering_is_made(generate_config: GenerateConfig, tmp_path: Path) -> None:
    rows = [{"prompt_en": "a red car", "dimension": ["color"]}]
    config = config_of(generate_config, tmp_path, "vbench", rows, video=SizeConfig(num_frames=1))
    assert generate(config).generated == 5
    assert check_layout(config.output, "vbench").is_valid


def test_vbench_folder_holds_videos_alone_and_is_accepted(generate_config: GenerateConfig, tmp_path: Path) -> None:
    rows = [*VBENCH[:2], {"prompt_en": "left/right \U0001f600", "dimension": ["color"]}]
    config = config_of(generate_config, tmp_path, "vbench", rows, video=SizeConfig(num_frames=1))
    assert generate(config).generated == 10 + 25
    out = Path(config.output)
    assert check_layout(config.output, "vbench").is_valid
    assert {path.suffix for place in ("videos", "flickering") for path in (out / place).iterdir()} == {".mp4"}
    for i in range(5):
        name = f"In a still frame, a stop sign-{i}.mp4"
        assert (out / "videos" / name).read_bytes() == (out / "flickering" / name).read_bytes()
    names = json.loads((out / "prompts.json").read_text())
    assert set(names.values()) == {"left/right \U0001f600"}
    assert all((out / path).is_file() for path in names)
    subprocess.run(["bash", "-n", out / "evaluate.sh"], check=True)
    (out / "videos" / ".DS_Store").write_bytes(b"")
    (out / "flickering" / "In a still frame, a stop sign-24.mp4").unlink()
    (out / "videos" / ".a red square-0.mp4.77-abcd.tmp").write_bytes(b"")  # of a run that was killed
    report = check_layout(config.output, "vbench")
    assert report.missing == ["flickering/In a still frame, a stop sign-24.mp4"]
    assert len(report.surplus) == 2
    assert "missing (1): flickering/In a still frame" in str(report)
    assert generate(config).generated == 1
    assert check_layout(config.output, "vbench").surplus == ["videos/.DS_Store"]


ODD = (
    "a/b",
    "a_b",
    "a\\b",
    "../../etc/passwd",
    ".hidden",
    "hidden",
    "say \"hi\" to 'them'",
    "new\nline",
    "\U0001f600" * 100,
    "\U0001f600" * 101,
    "مربع أحمر يتحرك إلى اليسار",
    "x" * 300,
    "x" * 301,
    "con",
)


@pytest.mark.parametrize("layout", ["vbench", "vbench2"])
def test_any_prompt_has_a_legal_name_of_its_own(layout: str, tmp_path: Path) -> None:
    prompts = [prompt for prompt in ODD if layout == "vbench" or prompt != "x" * 301]
    names = video_names(layout, prompts)
    for name in names:
        file = f"{name}-24.mp4"
        assert len(file.encode()) <= MAX_NAME_BYTES + 1
        (tmp_path / file).write_text("")
    assert len(list(tmp_path.iterdir())) == len(set(names)) == len(prompts)
    assert video_names(layout, ["a plain prompt, e.g. 50% \\ of it"]) == ["a plain prompt, e.g. 50% \\ of it"]
    assert video_names(layout, prompts[::-1]) == names[::-1]


def test_two_prompts_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="would have one name"):
        video_names("vbench2", ["x" * 300, "x" * 301])


@pytest.mark.parametrize(
    ("layout", "text", "message"),
    [
        ("vbench", "[]", "no list of entries"),
        (
            "vbench",
            "prompt\na red square\n",
            r"as JSON .*VBench_full_info.json; for prompts of your own leave layout out",
        ),
        (
            "vbench",
            '[{"prompt": "x"}]',
            "entry 0: no prompt_en and dimension; layout vbench takes the benchmark's own VBench_full_info",
        ),
        ("geneval", '{"prompt": "x"}', "line 1: no tag, include and prompt; .*evaluation_metadata.jsonl"),
        (
            "vbench-i2v",
            json.dumps([{"prompt_en": "x", "dimension": [], "image_name": name} for name in "ab"]),
            "entry 1: the prompt of entry 0 with another picture",
        ),
    ],
)
def test_a_file_of_another_kind_is_named(
    generate_config: GenerateConfig, tmp_path: Path, layout: Any, text: str, message: str
) -> None:
    (tmp_path / "info").write_text(text)
    more: dict[str, Any] = {"images": str(tmp_path)} if layout == "vbench-i2v" else {}
    more |= {"format": "png", "video": SizeConfig(num_frames=1)} if layout == "geneval" else {}
    config = replace(generate_config, layout=layout, prompts=str(tmp_path / "info"), **more)
    with pytest.raises(UserError, match=message):
        jobs_of(config)
    with pytest.raises(UserError, match="there is no folder"):
        check_layout(config.output, layout)


@pytest.mark.parametrize("content", ["[" * 100_000, '[{"prompt_en": "\\ud83d", "dimension": ["color"]}]'])
def test_a_benchmark_s_file_that_is_no_text_or_nested_without_end_is_told(tmp_path, content):
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(UserError, match=r"info.json cannot be read as JSON"):
        read_groups("vbench", str(tmp_path / "info.json"))
