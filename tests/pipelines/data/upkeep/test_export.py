"""Kept clips as files: all of them, with what is known of them, whole or not at all."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import av
import pytest
from click.testing import CliRunner

from jobs.data import command
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.upkeep.codes import snapshot_tokenizer
from pipelines.data.upkeep.export import Export, export_clips, file_name
from pipelines.errors import JobError, UserError


def kept(snapshot) -> list[dict]:
    return [row for row in snapshot.read_ledger().to_pylist() if row["status"] == "kept"]


def test_every_kept_clip_is_a_video_with_captions_and_scores(curated, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(command, ["export", str(curated[0]), str(out), "--clips", "mp4"])
    assert done.exit_code == 0, done.output
    rows = kept(open_snapshot(str(curated[0])))
    listed = {line["key"]: line for line in map(json.loads, (out / "clips.jsonl").read_text().splitlines())}
    assert set(listed) == {row["key"] for row in rows}
    assert len(list((out / "clips").iterdir())) == 3 * len(rows)
    for row in rows:
        base = out / "clips" / file_name(row["key"])
        told = json.loads(Path(f"{base}.json").read_text())
        assert told == listed[row["key"]]
        assert (told["path"], told["start_s"], told["end_s"]) == (row["path"], row["start_s"], row["end_s"])
        assert told["scores"] == {name: value for name, value in row["scores"].items() if value is not None}
        assert Path(f"{base}.txt").read_text() == f"this is {row['path']}"
        with av.open(f"{base}.mp4") as container:
            assert sum(1 for _ in container.decode(video=0)) == 17


def test_a_stopped_export_goes_on_and_another_is_refused(curated, tmp_path):
    snapshot, out = open_snapshot(str(curated[0])), tmp_path / "out"
    whole = export_clips(snapshot, str(out), Export())
    before = {path: path.stat().st_mtime_ns for path in (out / "clips").iterdir()}
    gone = sorted(before)[1]  # a clip's video is the second of its files: json, mp4, txt
    assert gone.suffix == ".mp4"
    gone.unlink()
    again = export_clips(snapshot, str(out), Export())
    assert (again.made, again.before) == (1, whole.made - 1)
    assert {path for path in before if path.stat().st_mtime_ns != before[path]} == {
        path for path in before if path.stem == gone.stem
    }
    with pytest.raises(UserError, match="holds another export"):
        export_clips(snapshot, str(out), Export(clips="gif"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        export_clips(snapshot, str(tmp_path / "full"), Export())


def test_without_a_source_the_others_are_there_and_the_codes_can_be_exported(curated, tokenizer_file, tmp_path):
    dataset = shutil.copytree(curated[0], tmp_path / "dataset")
    shutil.rmtree(dataset / "stages" / "sources")
    snapshot, out = open_snapshot(str(dataset)), tmp_path / "out"
    with pytest.raises(JobError, match=rf"(?s){len(kept(snapshot))} of {len(kept(snapshot))} clips .*unknown_source"):
        export_clips(snapshot, str(out), Export(layout="webdataset"))
    assert [path.name for path in out.iterdir()] == ["export.json"]  # no tar file without all its clips, and no list
    loaded = snapshot_tokenizer(snapshot, str(tokenizer_file))
    codes = tmp_path / "codes"
    export_clips(snapshot, str(codes), Export(layout="webdataset", frames="codes", shard_clips=3), loaded)
    names = []
    for path in sorted(codes.glob("*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    stems = [file_name(row["key"]) for row in kept(snapshot)]
    assert names == [f"{stem}.{ending}" for stem in sorted(stems) for ending in ("json", "txt", "mp4")]
    with tarfile.open(codes / "clips-000000.tar") as tar:
        video = tar.extractfile(names[2]).read()
    with av.open(io.BytesIO(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 17
