"""Videos on S3 are measured as the same ones on a disk, and results and gallery can stand there too."""

import json

from pipelines.evaluation.evaluate import EvaluateConfig
from pipelines.evaluation.recording import RecordConfig
from pipelines.evaluation.run import run_evaluation
from tests.pipelines.evaluation.folders import write_generated, write_plain


def test_evaluation_on_s3(bucket, direct, tmp_path):
    write_generated(tmp_path / "made", ["a ball", "a cat"], below="videos/")
    write_plain(tmp_path / "plain", ["a ball", "a cat"], noise=20.0)
    root = bucket.removeprefix("s3://")
    direct.put(str(tmp_path / "made"), f"{root}/made", recursive=True)
    direct.put(str(tmp_path / "plain"), f"{root}/plain", recursive=True)
    figures = []
    for where in (str(tmp_path), bucket):
        config = EvaluateConfig(folders=(f"{where}/made", f"{where}/plain"), gallery="folder")
        report = run_evaluation(config, RecordConfig())
        assert report.asides == (f"open {where}/made-comparison/gallery.html",)
        if where == bucket:
            found = json.loads(direct.cat(f"{root}/made-comparison/evaluation.json"))
        else:
            found = json.loads((tmp_path / "made-comparison" / "evaluation.json").read_text())
        figures.append([run["figures"] for run in found["runs"]])
    assert figures[0] == figures[1]
    names = sorted(path.removeprefix(f"{root}/made-comparison/") for path in direct.find(f"{root}/made-comparison"))
    videos = [f"gallery-videos/{run}/{index:06d}.mp4" for run in (0, 1) for index in range(4)]
    assert names == sorted(["evaluation.json", "gallery.html", "videos.jsonl", *videos])
