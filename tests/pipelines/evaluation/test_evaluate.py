"""Whole evaluations: of folders that `lumos generate` wrote and of VBench's layout, with real files and MLflow."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from jobs.evaluate import command
from pipelines.errors import JobError, UserError
from pipelines.evaluation.evaluate import EvaluateConfig, evaluate, folder_labels
from pipelines.evaluation.gallery import write_gallery
from pipelines.evaluation.models import ModelFiles
from pipelines.evaluation.recording import RecordConfig
from pipelines.evaluation.results import as_json, as_text, verdict, write_results
from pipelines.evaluation.run import run_evaluation
from pipelines.evaluation.videos import read_folder
from pipelines.statistics import bootstrap_interval
from tests.pipelines.evaluation.folders import write_generated, write_plain

PROMPTS = ["a red ball", "two cats - one black", "a street, 3-lane", "the sea"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models' videos of the same prompts and seeds: steady ones, and ones that flicker; one in VBench's layout."""
    root = tmp_path_factory.mktemp("folders")
    return (
        write_generated(root / "steady" / "out", PROMPTS, below="videos/"),
        write_plain(root / "noisy", PROMPTS, noise=25),
    )


def test_folders_are_read_by_manifest_or_by_vbench_s_names(folders):
    generated, plain = (read_folder(str(folder), "x") for folder in folders)
    wanted = {(prompt, seed) for prompt in PROMPTS for seed in (0, 1)}
    for folder in (generated, plain):
        assert {(video.prompt, video.seed) for video in folder.videos} == wanted
        assert len(folder.videos) == 8
    assert generated.videos[0].path == "videos/00000-0.mp4"


def test_figures_are_means_with_intervals_over_prompts(folders):
    result = evaluate(EvaluateConfig(folders=tuple(map(str, folders))))
    steady, noisy = result.runs
    for name in ("temporal_flickering", "frame_consistency"):
        assert steady.figures[name].value > noisy.figures[name].value
        own = [video.values[name] for video in noisy.videos]
        figure = noisy.figures[name]
        assert figure.value == pytest.approx(np.mean(own))
        assert (figure.videos, figure.prompts) == (8, 4)
        assert figure.interval95[0] <= figure.value <= figure.interval95[1]
    # Of the same prompts and seeds, whatever the order of the files.
    before = {(v.file.prompt, v.file.seed): v.values["motion"] for v in steady.videos}
    gaps = [v.values["motion"] - before[v.file.prompt, v.file.seed] for v in noisy.videos]
    assert noisy.differences["motion"].value == pytest.approx(np.mean(gaps))
    flicker = next(metric for metric in result.metrics if metric.name == "temporal_flickering")
    assert verdict(noisy.differences["temporal_flickering"], flicker) == "worse"
    text = as_text(result)
    assert "less out" in text
    assert "out: 8 videos of 4 prompts" in text
    assert not any(name.startswith("judge") for name in steady.figures)  # whose prompts these are not


def test_results_are_files_with_what_made_them(folders, tmp_path):
    result = evaluate(EvaluateConfig(folders=(str(folders[0]),)))
    write_results(str(tmp_path / "r"), result)
    found = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert found == json.loads(json.dumps(as_json(result)))
    assert found["schema"] == 1
    assert found["metrics"]["temporal_flickering"]["better"] == "higher"
    assert found["runs"][0]["figures"]["motion"]["videos"] == 8
    assert found["provenance"]["packages"]["torch"]
    rows = [json.loads(line) for line in (tmp_path / "r" / "videos.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [video.file.path for video in result.runs[0].videos]
    assert rows[0]["temporal_flickering"] == result.runs[0].videos[0].values["temporal_flickering"]


def test_results_stay_where_the_next_evaluation_fails(tmp_path):
    folder = write_generated(tmp_path / "out", PROMPTS[:1])
    config = EvaluateConfig(folders=(str(folder),), gallery="none")
    run_evaluation(config, RecordConfig())
    results = {path.name: path.read_bytes() for path in (tmp_path / "out-evaluation").iterdir()}
    assert len(results["videos.jsonl"].splitlines()) == 2
    for video in folder.glob("*.mp4"):
        video.write_bytes(b"")
    with pytest.raises(JobError, match="none of the 2 videos"):
        run_evaluation(config, RecordConfig())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out-evaluation").iterdir()} == results


@pytest.mark.parametrize("wrong", [{"reference": "nope"}, {"models": ModelFiles(clip="nope")}])
def test_an_evaluation_that_cannot_begin_leaves_nothing(folders, tmp_path, wrong):
    config = EvaluateConfig(folders=(str(folders[1]),), out=str(tmp_path / "new" / "results"), **wrong)
    with pytest.raises(UserError, match="nope"):
        run_evaluation(config, RecordConfig())
    assert list(tmp_path.iterdir()) == []


def test_unreadable_videos_are_told_and_the_others_measured(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "v")
    (tmp_path / "v" / "videos" / "00000-0.mp4").write_bytes(b"no video")
    (tmp_path / "v" / "videos" / "00001-1.mp4").unlink()
    result = evaluate(EvaluateConfig(folders=(str(tmp_path / "v"),)))
    assert result.runs[0].figures["motion"].videos == 6
    errors = [video.error for video in result.runs[0].failed]
    assert errors[0].startswith("videos/00000-0.mp4: no frame of it can be decoded")
    assert "00001-1.mp4" in errors[1]
    assert "not measured: videos/00000-0.mp4" in as_text(result)
    page = write_gallery(str(tmp_path / "g"), result).page
    assert "no frame of it can be decoded" in Path(page).read_text(encoding="utf-8")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a-0.mp4").write_bytes(b"no video")
    with pytest.raises(JobError, match="none of the 1 videos"):
        evaluate(EvaluateConfig(folders=(str(tmp_path / "bad"),)))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is no folder"), ("", "holds no videos"), ("{}", "is no manifest"), ("[1]", "is no manifest")],
)
def test_what_is_no_folder_of_videos_is_told(tmp_path, content, words):
    folder = tmp_path / "v"
    if content is not None:
        folder.mkdir()
        if content:
            (folder / "manifest.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        read_folder(str(folder), "v")


def test_a_folder_that_holds_runs_is_not_taken_for_one(tmp_path):
    for name in ("b", "a"):
        write_generated(tmp_path / "runs" / name, PROMPTS[:1], seeds=1)
    (tmp_path / "runs" / "a" / "manifest.jsonl").rename(tmp_path / "runs" / "a" / "old-manifest.jsonl")
    with pytest.raises(UserError, match=f"{tmp_path}/runs holds a run .* and is none: .* {tmp_path}/runs/b$"):
        read_folder(str(tmp_path / "runs"), "r")
    (tmp_path / "runs" / "a" / "old-manifest.jsonl").rename(tmp_path / "runs" / "a" / "manifest.jsonl")
    with pytest.raises(UserError, match=f"holds 2 runs .* themselves, {tmp_path}/runs/a {tmp_path}/runs/b$"):
        evaluate(EvaluateConfig(folders=(str(tmp_path / "runs" / "a"),), reference=str(tmp_path / "runs")))


def test_a_reference_that_has_no_pairs_is_told_to_be_of_no_use(tmp_path):
    write_plain(tmp_path / "ours", ["a", "b"], seeds=1)
    write_plain(tmp_path / "theirs", ["b", "c"], seeds=1)
    write_plain(tmp_path / "others", ["d"], seeds=1)
    ours = (str(tmp_path / "ours"),)
    text = as_text(evaluate(EvaluateConfig(folders=ours, reference=str(tmp_path / "theirs"))))
    assert "of the same prompt and seed, or the same path: 1; psnr, ssim and lpips are of those alone" in text
    assert "no use" not in text
    text = as_text(evaluate(EvaluateConfig(folders=ours, reference=str(tmp_path / "others"))))
    assert "or the same path: 0; psnr, ssim and lpips are left out" in text
    assert "--reference was of no use: with --clip or --fvd the sets are compared" in text
    assert "reference" not in as_text(evaluate(EvaluateConfig(folders=ours, reference=ours[0])))


def test_labels_tell_folders_apart_by_their_ends():
    assert folder_labels(["runs/a/videos", "runs/b/videos/"]) == ["a/videos", "b/videos"]
    assert folder_labels(["s3://bucket/x", "y"]) == ["x", "y"]
    with pytest.raises(UserError, match="named twice"):
        folder_labels(["runs/a", "runs/a/"])


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits, width = 0, []
    for trial in range(400):
        # 30 prompts of 4 alike videos each: an interval over videos would be half as wide, and miss.
        means = generator.normal(0, 1, 30)
        sums = means * 4 + generator.normal(0, 0.2, 30)
        low, high = bootstrap_interval(30, lambda c, s=sums: c @ s / (c.sum(1) * 4), draws=500, seed=trial)
        hits += low <= 0 <= high
        width.append(high - low)
    assert 0.89 <= hits / 400 <= 0.97
    assert np.mean(width) == pytest.approx(2 * 1.96 / 30**0.5, rel=0.1)
    assert bootstrap_interval(1, lambda c: c[:, 0] * 1.0) is None


def test_a_centred_interval_lies_around_the_statistic():
    values = np.random.default_rng(1).normal(0, 1, 20)

    def variance(counts):  # of a draw with repetitions: too small by a twentieth
        means = counts @ values / 20
        return counts @ values**2 / 20 - means**2

    low, high = bootstrap_interval(20, variance, centred=True)
    plain = bootstrap_interval(20, variance)
    shift = low - plain[0]
    assert shift == pytest.approx(values.var() / 20, rel=0.2)
    assert high - plain[1] == pytest.approx(shift)


@pytest.fixture
def trained(folders, tmp_path):
    """A training's run in a real store, its export, and videos whose note names that."""
    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    home = client.create_experiment("e", (tmp_path / "artifacts").as_uri())
    run_id = client.create_run(home, run_name="first").info.run_id
    client.log_batch(run_id, metrics=[Metric("loss", 1.0, 1000 * step, step) for step in (1, 70)])
    client.set_terminated(run_id)
    export = tmp_path / "train" / "export"
    export.mkdir(parents=True)
    (tmp_path / "train" / "run.json").write_text(json.dumps({"run_id": run_id}))
    (export / "config.json").write_text(
        json.dumps({"lumos": {"info": {"train_config": {"output": str(tmp_path / "train")}}}})
    )
    shutil.move(export, tmp_path / "elsewhere")
    shutil.copytree(folders[0], tmp_path / "videos")
    note = {"config": {"model": str(tmp_path / "elsewhere")}}
    (tmp_path / "videos" / "generate.json").write_text(json.dumps(note))
    return client, run_id


def test_results_stand_on_the_run_that_made_the_model(trained, tmp_path):
    client, run_id = trained
    done = CliRunner().invoke(command, [str(tmp_path / "videos")])
    assert done.exit_code == 0, done.output
    (told,) = [line for line in done.output.splitlines() if f"recorded on run {run_id} at step 70" in line]
    assert told.endswith("mlruns.db, where the model of these videos says it was trained; --run names another, or none")
    data = client.get_run(run_id).data.metrics
    figures = json.loads((tmp_path / "videos-evaluation" / "evaluation.json").read_text())["runs"][0]["figures"]
    assert data["eval/motion"] == figures["motion"]["value"]
    assert data["eval/motion_low"] == figures["motion"]["interval95"][0]
    assert client.get_metric_history(run_id, "eval/motion")[0].step == 70
    names = {each.path for each in client.list_artifacts(run_id, "evaluation/videos")}
    assert names == {f"evaluation/videos/{name}" for name in ("evaluation.json", "videos.jsonl", "gallery.html")}
    assert not [path for path in (tmp_path / "videos").rglob("*") if "gallery" in path.name or "evaluat" in path.name]


def test_two_folders_of_one_run_do_not_hide_each_others_figures_there(trained, tmp_path):
    client, run_id = trained
    videos = tmp_path / "videos"
    shutil.copytree(videos, tmp_path / "others")
    done = CliRunner().invoke(command, [str(videos), str(tmp_path / "others")])
    assert done.exit_code == 0, done.output
    assert "several folders are of one run" in done.output
    assert "eval/motion" not in client.get_run(run_id).data.metrics
    done = CliRunner().invoke(
        command, [str(videos), str(tmp_path / "others"), "--run", str(tmp_path / "train"), "--run", "none"]
    )
    (told,) = [line for line in done.output.splitlines() if f"videos: recorded on run {run_id}" in line]
    assert "--run" not in told
    done = CliRunner().invoke(command, [str(videos), str(tmp_path / "others"), "--run", "none"])  # it is of all folders
    assert done.exit_code == 0, done.output
    assert "recorded" not in done.output


def test_a_run_is_named_by_id_or_not_at_all(trained, folders, tmp_path):
    client, run_id = trained
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    out = ["--out", str(tmp_path / "o"), "--gallery", "none"]
    done = CliRunner().invoke(command, [str(folders[1]), *out, "--run", "first", "--tracking-uri", uri, "--step", "40"])
    assert done.exit_code == 0, done.output
    assert client.get_metric_history(run_id, "eval/motion")[0].step == 40
    done = CliRunner().invoke(command, [str(tmp_path / "videos"), *out, "--run", "none"])
    assert done.exit_code == 0, done.output
    assert len(client.get_metric_history(run_id, "eval/motion")) == 1
    assert not (tmp_path / "o" / "gallery.html").exists()
    (tmp_path / "file").write_text("no folder")
    for more, words in (
        (["--out", str(tmp_path / "file")], "name another folder"),
        (["--run", "other", "--tracking-uri", uri], "no experiment, run id, run name"),
        (["--run", "none", "--run", "none"], "names 2 runs for 1 folders"),
    ):
        failed = CliRunner().invoke(command, [str(folders[1]), *out, *more])
        assert isinstance(failed.exception, UserError)
        assert words in str(failed.exception)


def test_official_results_are_imported_and_recorded(trained, tmp_path):
    client, run_id = trained
    file = tmp_path / "r_eval_results.json"
    file.write_text(json.dumps({"color": [0.5, []]}))
    out = ["--out", str(tmp_path / "vbench.json"), "--run", str(tmp_path / "train")]
    done = CliRunner().invoke(command, ["import", str(file), *out])
    assert done.exit_code == 0, done.output
    assert "no total: 15 dimensions are missing" in done.output
    assert json.loads((tmp_path / "vbench.json").read_text())["dimensions"] == {"color": 0.5}
    assert client.get_run(run_id).data.metrics["vbench/color"] == 0.5
    assert client.list_artifacts(run_id, "evaluation/vbench")[0].path.endswith(file.name)
