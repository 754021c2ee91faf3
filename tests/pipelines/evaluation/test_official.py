"""Totals against rows of the public leaderboard, and what cannot be a result."""

import json

import pytest

from jobs.evaluate import import_
from pipelines.benchmark_names import ALSO_CALLED, BENCHMARK_NAMES
from pipelines.errors import UserError
from pipelines.evaluation.official import BENCHMARKS, GENEVAL, VBENCH_2, VBENCH_I2V, import_results

QUALITY = ("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness")
MORE_QUALITY = ("dynamic_degree", "aesthetic_quality", "imaging_quality")
SEMANTIC = ("object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene")
STYLE = ("appearance_style", "temporal_style", "overall_consistency")
NAMES = (*QUALITY, *MORE_QUALITY, *SEMANTIC, *STYLE)
# Percent, as the VBench leaderboard shows them: dimensions in the order of NAMES; quality, semantic and total score.
LEADERBOARD = {
    "ModelScope": (
        (
            89.87,
            95.29,
            98.28,
            95.79,
            66.39,
            52.06,
            58.57,
            82.25,
            38.98,
            92.40,
            81.72,
            33.68,
            39.26,
            23.39,
            25.37,
            25.67,
        ),
        (78.05, 66.54, 75.75),
    ),
    "LaVie": (
        (
            91.41,
            97.47,
            98.30,
            96.38,
            49.72,
            54.94,
            61.90,
            91.82,
            33.32,
            96.80,
            86.39,
            34.09,
            52.69,
            23.56,
            25.93,
            26.41,
        ),
        (78.78, 70.31, 77.08),
    ),
    "VideoCrafter-2.0": (
        (
            96.85,
            98.22,
            98.41,
            97.73,
            42.50,
            63.13,
            67.22,
            92.55,
            40.66,
            95.00,
            92.92,
            35.86,
            55.29,
            25.13,
            25.84,
            28.23,
        ),
        (82.20, 73.42, 80.44),
    ),
}


def write(path, scores):
    """As VBench does: the mean, and what each video got."""
    entries = {name: [score, [{"video_path": "a-0.mp4", "video_results": score}]] for name, score in scores.items()}
    path.write_text(json.dumps(entries))
    return str(path)


@pytest.mark.parametrize("model", LEADERBOARD)
def test_vbench_totals_are_the_leaderboard_s(tmp_path, model):
    percent, (quality, semantic, total) = LEADERBOARD[model]
    files = [
        write(tmp_path / f"results_{name}_eval_results.json", {name: value / 100})
        for name, value in zip(NAMES, percent, strict=True)
    ]
    found = import_results(files)
    assert found.benchmark == "vbench"
    assert not found.missing
    assert 100 * found.groups["quality"] == pytest.approx(quality, abs=0.011)  # of dimensions with two decimals
    assert 100 * found.groups["semantic"] == pytest.approx(semantic, abs=0.011)
    assert 100 * found.total == pytest.approx(total, abs=0.011)
    assert import_results([write(tmp_path / "all.json", found.dimensions)]) == found


def test_no_total_without_every_dimension(tmp_path):
    scores = dict.fromkeys(NAMES, 0.9)
    scores["scene"] = 0.5
    del scores["color"]
    found = import_results([write(tmp_path / "r_eval_results.json", scores)])
    assert found.total is None
    assert found.missing == ("color",)
    assert set(found.groups) == {"quality"}
    assert "no total: 1 dimensions are missing (color)" in str(found)
    assert "vbench/total" not in found.metrics()


def test_image_to_video_by_its_own_weights(tmp_path):
    scores = dict.fromkeys(VBENCH_I2V.dimensions, 0.8)
    scores |= {"camera_motion": 0.3, "dynamic_degree": 0.2}
    found = import_results([write(tmp_path / "i.json", scores)])
    assert found.benchmark == "vbench-i2v"
    subject, background = (0.8 - 0.1462) / 0.8538, (0.8 - 0.2615) / 0.7385
    i2v = (0.1 * 0.3 + subject + background) / 2.1
    quality = (subject + background + (0.8 - 0.706) / 0.2915 + 0.5 * 0.2 + 0.8 + 0.8) / 5.5
    assert found.groups == pytest.approx({"i2v": i2v, "quality": quality})
    assert found.total == pytest.approx((i2v + quality) / 2)


def test_vbench_2_is_the_mean_of_five_means(tmp_path):
    names = [name for group in VBENCH_2.groups.values() for name in (dimension.name for dimension in group)]
    scores = {name: (index + 1) / 20 for index, name in enumerate(names)}
    capital = {"_".join(part.capitalize() for part in name.split("_")): score for name, score in scores.items()}
    assert "Multi-view_Consistency" in capital
    capital["Multi-View_Consistency"] = capital.pop("Multi-view_Consistency")  # as its program writes them
    found = import_results([write(tmp_path / "two.json", capital)])
    assert found.benchmark == "vbench2"
    parts = (2, 2, 7, 3, 4)
    values, means = [(index + 1) / 20 for index in range(18)], []
    for part in parts:
        means.append(sum(values[:part]) / part)
        values = values[part:]
    assert list(found.groups.values()) == pytest.approx(means)
    assert found.total == pytest.approx(sum(means) / 5)


def test_the_names_that_the_command_takes_are_those_of_what_can_be_read():
    assert {*BENCHMARKS, GENEVAL} == set(BENCHMARK_NAMES)
    (option,) = [each for each in import_.params if each.name == "benchmark"]
    assert set(option.type.choices) == {*BENCHMARKS, GENEVAL, *ALSO_CALLED}
    assert set(ALSO_CALLED.values()) <= set(BENCHMARKS)


def test_a_benchmark_can_be_named_where_dimensions_fit_several(tmp_path):
    file = write(tmp_path / "one.json", {"subject_consistency": 0.9})
    assert import_results([file]).benchmark == "vbench"
    found = import_results([file], benchmark="vbench-i2v")
    assert found.benchmark == "vbench-i2v"
    assert len(found.missing) == len(BENCHMARKS["vbench-i2v"].dimensions) - 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no json", "is no JSON"),
        ("[]", "holds no dimensions"),
        ('[{"prompt_en": "a", "dimension": ["color"]}]', "not \\*_full_info.json"),
        ('{"color": ["x"]}', "color has no score"),
        ('{"color": [92.5, []]}', "color is 92.5, which is not in 0..1"),
        ('{"color": [NaN, []]}', "color is nan"),
        ('{"colour": [0.5, []]}', "colour is no dimension"),
        ('{"color": [0.5], "diversity": [0.5]}', "dimensions of several.*eval_results.json itself is of several"),
    ],
)
def test_what_is_no_result_of_vbench_is_told(tmp_path, content, words):
    file = tmp_path / "r_eval_results.json"
    file.write_text(content)
    with pytest.raises(UserError, match=words):
        import_results([str(file)])


def test_files_of_several_benchmarks_are_told_apart(tmp_path):
    one, two = write(tmp_path / "1.json", {"color": 0.5}), write(tmp_path / "2.json", {"diversity": 0.6})
    three = write(tmp_path / "3.json", {"imaging_quality": 0.5})
    with pytest.raises(UserError) as error:
        import_results([one, two, three])
    for words in (f"{one} is of vbench;", f"{two} is of vbench2;", f"{three} is of vbench or vbench-i2v)"):
        assert words in str(error.value)
    with pytest.raises(UserError, match=r"lines\.jsonl is GenEval's by its ending, .*1\.json VBench's"):
        import_results([one, str(tmp_path / "lines.jsonl")])
    assert import_results([two], benchmark="vbench-2.0") == import_results([two], benchmark="vbench2")


def test_scores_of_few_videos_and_beyond_a_range_are_told(tmp_path):
    scores = dict.fromkeys(NAMES, 0.9) | {"scene": 0.5, "motion_smoothness": 0.999, "appearance_style": 0.0}
    results = [{"video_path": "a-0.mp4", "video_results": 0.9}] * 359
    file = tmp_path / "r.json"
    file.write_text(json.dumps({name: [score, results] for name, score in scores.items()}))
    found = str(import_results([str(file)]))
    assert "fewer than 360 results (" in found
    assert " 359" in found
    assert "and 11 more); such scores cannot be compared" in found
    assert "motion_smoothness: 0.9990 is outside 0.706 to 0.9975, which becomes 0 to 1; it counts as 1.0051" in found
    assert "appearance_style: 0.0000 is outside" in found
    results.append(results[0])
    file.write_text(json.dumps({name: [0.9 if name != "scene" else 0.5, results] for name in ("color", "scene")}))
    assert import_results([str(file)]).notes == ()
    assert import_results([write(tmp_path / "one.json", {"color": 0.5})]).notes[0].startswith("not the whole")


def test_files_that_contradict_each_other_and_missing_ones_are_told(tmp_path):
    one, two = write(tmp_path / "1.json", {"color": 0.5}), write(tmp_path / "2.json", {"color": 0.6})
    with pytest.raises(UserError, match="name the results of one evaluation"):
        import_results([one, two])
    with pytest.raises(UserError, match="cannot be read"):
        import_results([str(tmp_path / "3.json")])


def geneval_line(tag, index, picture, correct):
    metadata = json.dumps({"tag": tag, "prompt": f"{tag} {index}"})
    return json.dumps(
        {
            "filename": f"{index:05d}/samples/{picture:04d}.png",
            "tag": tag,
            "prompt": f"{tag} {index}",
            "correct": correct,
            "reason": "",
            "metadata": metadata,
            "details": "{}",
        }
    )


def test_geneval_is_the_mean_over_tasks(tmp_path):
    sizes = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    lines, right, index = [], {}, 0
    for place, (tag, prompts) in enumerate(sizes.items()):
        for number in range(prompts):
            for picture in range(4):
                correct = (number * 4 + picture) % (place + 2) == 0
                right.setdefault(tag, []).append(correct)
                lines.append(geneval_line(tag, index, picture, correct))
            index += 1
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    found = import_results([str(tmp_path / "results.jsonl")])
    assert found.benchmark == "geneval"
    shares = {tag: sum(values) / len(values) for tag, values in right.items()}
    assert found.dimensions == shares
    assert found.total == pytest.approx(sum(shares.values()) / 6)
    assert "not the whole benchmark" not in str(found)


def test_a_part_of_geneval_is_told(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(geneval_line("colors", 0, picture, True) for picture in range(3)))
    found = import_results([str(file)])
    assert found.total is None
    assert "counting" in found.missing
    assert "1 of 553 prompts, of which 1 have not 4 pictures" in str(found)
    file.write_text(geneval_line("colors", 0, 0, True) + "\n" + geneval_line("colors", 0, 0, True))
    with pytest.raises(UserError, match=r"line 2: 00000/samples/0000\.png is there twice"):
        import_results([str(file)])
    file.write_text('{"tag": "colors"}')
    with pytest.raises(UserError, match="line 1: no result of GenEval"):
        import_results([str(file)])


@pytest.mark.parametrize("data", [b"\xff\n", b"[" * 100_000])
def test_what_is_no_text_or_nested_without_end_is_no_result(tmp_path, data):
    for name in ("results.jsonl", "x_eval_results.json"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=r"no result of GenEval|is no JSON"):
            import_results([str(tmp_path / name)])


def test_a_dimension_that_one_file_gives_by_two_names_is_told(tmp_path):
    (tmp_path / "x_eval_results.json").write_text('{"scene": [0.1, []], "Scene": [0.9, []]}')
    with pytest.raises(UserError, match="gives scene twice"):
        import_results([str(tmp_path / "x_eval_results.json")])


def test_a_line_of_geneval_ends_at_its_end_alone(tmp_path):
    row = {"filename": "a", "tag": "colors", "prompt": "a\u2028b", "correct": True, "metadata": "{}"}
    (tmp_path / "results.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert import_results([str(tmp_path / "results.jsonl")]).dimensions == {"colors": 1.0}
