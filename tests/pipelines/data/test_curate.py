import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumos.tokenizers.fsq import FsqAutoencoder, FsqConfig, save_weights
from pipelines.data.curate import curate
from pipelines.data.scores import scores_of
from pipelines.data.snapshot.read import list_snapshots, open_snapshot
from pipelines.data.steps.sources import hash_file
from pipelines.data.upkeep.codes import find_clips
from pipelines.data.upkeep.verify import verify_snapshot
from pipelines.errors import JobError, UserError
from pipelines.storage.lock import dataset_lock
from tests.pipelines.data.corpora import FATES, GOOD, copy_stages, curate_config, published, reason_class
from tests.pipelines.data.videos import moving_square, write_table, write_video

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def copy(curated, tmp_path):
    shutil.copytree(curated[0], tmp_path / "dataset")
    return tmp_path / "dataset"


@pytest.mark.slow  # video/test_bad_videos.py holds the fate of every kind
def test_bad_videos_end_in_the_ledger_with_their_reason(curated):
    ledger = open_snapshot(str(curated[0])).read_ledger().to_pylist()
    fates = {row["path"]: (row["status"], reason_class(row["reason"])) for row in ledger}
    assert FATES.items() <= fates.items()
    assert all(fates[f"good_{index:03d}.mp4"] == ("kept", "") for index in range(GOOD))
    reasons = {row["path"]: row["reason"] for row in ledger}
    assert reasons["static.mp4"] == "motion_time 0 < 0.25"
    assert "brightness 0 < 0.02; dark_share 1 > 0.5" in reasons["black.mp4"]
    assert "(permanent)" in reasons["text.mp4"]


def test_the_ledger_accounts_for_every_source_and_clip(curated, corpus):
    snapshot, result = open_snapshot(str(curated[0])), curated[1]
    ledger = snapshot.read_ledger()
    assert set(ledger["path"].to_pylist()) == {path.name for path in corpus.glob("*.mp4")}
    assert len(set(ledger["key"].to_pylist())) == ledger.num_rows == sum(result.counts.values())
    assert result.counts == {"kept": GOOD + 1, "rejected": 4, "failed": 3, "duplicate": 1}
    assert result.reasons == {f"{s}: {r}": 1 for s, r in sorted(FATES.values()) if s != "kept"}
    for row in ledger.to_pylist():
        if row["status"] in ("kept", "rejected"):
            assert row["start_s"] == 0.0
            assert row["end_s"] > 0
            assert None not in [row["scores"][score.name] for score in scores_of("split")]
            assert row["stage_hashes"]["split"]
        assert (row["stage_hashes"]["tokens"] is not None) == (row["status"] == "kept")


@pytest.mark.slow
def test_what_a_person_decided_is_published_and_told(copy, corpus, tokenizer_file, tmp_path):
    lines = [("static.mp4", "keep", "a still, and fine"), ("good_001.mp4", "reject", "")]
    table = write_table(tmp_path / "overrides.csv", lines, header=("key", "decision", "note"))
    result = curate(curate_config(corpus, copy, tokenizer_file, f"overrides={table}"))
    assert result.computed["split"] == 0
    assert result.computed["tokens"] == 1
    snapshot = open_snapshot(str(copy))
    told = {row["path"]: row for row in snapshot.read_ledger().to_pylist()}
    static = told["static.mp4"]
    assert (static["status"], static["reason"]) == ("kept", "override: a still, and fine (motion_time 0 < 0.25)")
    assert (told["good_001.mp4"]["status"], told["good_001.mp4"]["reason"]) == ("rejected", "override: by hand")
    clips = find_clips(snapshot)["clip_id"].to_pylist()
    assert static["key"] in clips
    assert told["good_001.mp4"]["key"] not in clips
    assert verify_snapshot(snapshot).problems == ()


def test_a_file_that_is_named_twice_is_one_source(curated, corpus, tokenizer_file, tmp_path):
    shutil.rmtree(copy_stages(curated[0], tmp_path / "dataset") / "stages" / "sources")
    for name in ("a", "b", "c"):
        shutil.copy(corpus / f"good_00{'abc'.index(name)}.mp4", tmp_path / f"{name}.mp4")

    def fates(*names):
        write_table(tmp_path / "list.csv", [(name, f"of {name}") for name in names])
        result = curate(curate_config(tmp_path / "list.csv", tmp_path / "dataset", tokenizer_file))
        ledger = open_snapshot(result.snapshot_uri).read_ledger().to_pylist()
        hashes = {name: hash_file(str(tmp_path / name))["source_id"] for name in names}
        assert {row["path"]: row["source_id"] for row in ledger} == hashes
        return {row["path"]: row["status"] for row in ledger}, result.computed["sources"]

    twice = {"./a.mp4": "kept", "b.mp4": "kept", "a.mp4": "duplicate", "c.mp4": "kept"}
    assert fates("a.mp4", "b.mp4", "./a.mp4", "c.mp4") == (twice, 3)
    assert fates("a.mp4", "b.mp4", "c.mp4") == (dict.fromkeys(["a.mp4", "b.mp4", "c.mp4"], "kept"), 0)
    # As a version before this one left it.
    [part] = (tmp_path / "dataset" / "stages" / "sources").glob("*/part-*")
    table = pq.read_table(part)
    pq.write_table(pa.concat_tables([table.slice(1), table]), part)
    assert fates("c.mp4", "a.mp4", "./a.mp4", "b.mp4") == (twice, 0)


def test_the_snapshot_holds_the_kept_clips_with_their_captions(curated):
    snapshot = open_snapshot(str(curated[0]))
    rows = [
        row
        for bucket in snapshot.manifest.buckets
        for shard in bucket.shards
        for row in snapshot.read_shard(shard).to_pylist()
    ]
    kept = {row["key"]: row for row in snapshot.read_ledger().to_pylist() if row["status"] == "kept"}
    assert {row["clip_id"] for row in rows} == kept.keys()
    for row in rows:
        assert (row["t"], row["h"], row["w"], row["fps"]) == (5, 6, 6, 12.0)
        assert len(row["codes"]) == 180
        assert max(row["codes"]) < snapshot.manifest.tokenizer.codebook_size
        assert row["captions"] == [{"text": f"this is {kept[row['clip_id']]['path']}", "captioner": "metadata"}]
    assert len({tuple(row["codes"]) for row in rows}) == len(rows)
    assert snapshot.manifest.captioners == ("metadata",)
    assert snapshot.manifest.created_from["config"]["tokens"]["fps"] == 12.0


def test_nothing_of_the_run_is_inside(curated, corpus):
    for path in Path(open_snapshot(str(curated[0])).uri).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert str(corpus.parent).encode() not in data
            assert str(curated[0]).encode() not in data


@pytest.mark.slow
def test_another_place_and_other_batches_give_identical_files(curated, corpus, tokenizer_file, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus, moved, symlinks=True)
    result = curate(curate_config(moved, tmp_path / "d", tokenizer_file, "resources.workers=2"))
    assert published(open_snapshot(result.snapshot_uri)) == published(open_snapshot(curated[1].snapshot_uri))


def test_a_second_run_computes_nothing_and_finds_its_snapshot(copy, corpus, tokenizer_file):
    before = list_snapshots(str(copy))
    result = curate(curate_config(corpus, copy, tokenizer_file))
    assert result.computed == {"sources": 0, "split": 0, "captions": 0, "tokens": 0}
    assert list_snapshots(str(copy)) == before == [result.snapshot_id]


def test_partial_rebuild_of_a_threshold_decodes_and_encodes_nothing(copy, corpus, tokenizer_file):
    result = curate(curate_config(corpus, copy, tokenizer_file, "thresholds.min_fps=13"))
    assert result.computed == {"sources": 0, "split": 0, "captions": 0, "tokens": 0}
    assert result.counts["kept"] == 0
    assert len(list_snapshots(str(copy))) == 2
    # A laxer threshold encodes the clips that it lets in, and only those.
    result = curate(curate_config(corpus, copy, tokenizer_file, "thresholds.min_motion_time=0"))
    assert result.computed == {"sources": 0, "split": 0, "captions": 1, "tokens": 1}
    assert result.counts["kept"] == GOOD + 2


def test_partial_rebuild_of_captions_recaptions_only_what_changed(copy, corpus, tokenizer_file, tmp_path):
    changed = tmp_path / "captions.csv"
    text = (corpus / "captions.csv").read_text().replace("this is good_001", "that was good_001")
    changed.write_text("\n".join(["path,caption", *(f"{corpus}/{line}" for line in text.splitlines()[1:])]))
    result = curate(curate_config(corpus, copy, tokenizer_file, f"captions.file={changed}"))
    assert result.computed == {"sources": 0, "split": 0, "captions": 1, "tokens": 0}
    assert len(list_snapshots(str(copy))) == 2


def test_partial_rebuild_of_the_tokenizer_redoes_tokens_only(copy, corpus, tokenizer_file, tmp_path):
    other = tmp_path / "other.safetensors"
    save_weights(other, FsqAutoencoder(FsqConfig(hidden_size=32)), {})
    result = curate(curate_config(corpus, copy, other))
    assert result.computed == {"sources": 0, "split": 0, "captions": 0, "tokens": GOOD + 1}
    old, new = (open_snapshot(str(copy / "snapshots" / name)) for name in list_snapshots(str(copy)))
    assert new.manifest.parents == (old.manifest.snapshot_id,)
    assert open_snapshot(str(copy), expected_tokenizer=new.manifest.tokenizer) == new
    with pytest.raises(UserError, match="was made by the tokenizer fsq"):
        open_snapshot(str(copy), expected_tokenizer=old.manifest.tokenizer)
    # Going back costs nothing.
    assert sum(curate(curate_config(corpus, copy, tokenizer_file)).computed.values()) == 0


@pytest.mark.slow
def test_partial_rebuild_of_sizes_redoes_tokens(copy, corpus, tokenizer_file):
    result = curate(curate_config(corpus, copy, tokenizer_file, "tokens.sizes=[48x48,64x64]"))
    assert result.computed["tokens"] == GOOD + 1


def test_new_sources_are_appended(copy, corpus, tokenizer_file, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(corpus, more, symlinks=True)
    write_video(more / "new.mp4", moving_square(18, seed=77))
    result = curate(curate_config(more, copy, tokenizer_file, "captions.require=false"))
    assert (result.computed["split"], result.computed["tokens"]) == (1, 1)
    assert result.counts["kept"] == GOOD + 2
    assert result.uncaptioned == 1
    assert "1 kept clips have no caption" in result.summary()


def test_long_sources_become_several_clips_of_their_own_shape(tmp_path, tokenizer_file):
    folder = tmp_path / "videos"
    folder.mkdir()
    wide = np.concatenate([moving_square(48, size=(128, 64), seed=1), 255 - moving_square(36, size=(128, 64), seed=2)])
    write_video(folder / "two shots.mkv", wide)
    write_video(folder / "tall.webm", moving_square(30, size=(64, 128)), codec="libvpx-vp9", options={})
    (folder / "tall.txt").write_text("a tall one")
    sizes = "tokens.sizes=[64x32,32x64]"
    options = [sizes, "tokens.num_frames=[17,33]", "captions.require=false", "thresholds.max_aspect=3"]
    result = curate(curate_config(folder, tmp_path / "d", tokenizer_file, *options))
    buckets = {(b.t, b.h, b.w): b.rows for b in open_snapshot(result.snapshot_uri).manifest.buckets}
    assert buckets == {(9, 4, 8): 2, (5, 8, 4): 1}
    assert result.uncaptioned == 2
    ledger = open_snapshot(result.snapshot_uri).read_ledger().to_pylist()
    spans = [(row["path"], row["start_s"], row["end_s"]) for row in ledger]
    assert sorted(spans) == [("tall.webm", 0, 2.5), ("two shots.mkv", 0, 4.0), ("two shots.mkv", 4.0, 7.0)]


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source.path=/nowhere"], "source.path /nowhere does not exist"),
        (["captions.caption_column=text"], "no column 'text'; it has 'path', 'caption'"),
        (["captions.file=/no.csv"], "captions.file /no.csv does not exist"),
        (["tokens.tokenizer.path=/no.safetensors"], "tokens.tokenizer: FSQ weights /no.safetensors"),
        (["tokens.tokenizer.kind=cosmos", "tokens.tokenizer.path=null"], "tokens.tokenizer: .*needs a path"),
        (["tokens.tokenizer.device=cuda"], "tokens.tokenizer.device=cuda: torch finds no GPU on this machine"),
        (["tokens.tokenizer.device=tpu?"], "tokens.tokenizer.device=tpu"),
        (["resources.tokens.num_gpus=1"], r"stage tokens: a process wants 1 GPU \(there is 0\)"),
        (["dataset=/proc/x"], "dataset /proc/x cannot be written"),
        (["dataset=nope://x"], "nope://x"),
    ],
)
def test_bad_input_ends_before_any_work(corpus, tokenizer_file, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        curate(curate_config(corpus, tmp_path / "d", tokenizer_file, *overrides))
    assert not (tmp_path / "d" / "stages").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["thresholds.max_dark_share=2"], "thresholds.max_dark_share must be in 0..1, as the score is, got 2.0"),
        (["thresholds.min_brightness=0.9", "thresholds.max_brightness=0.1"], "nothing could be kept"),
        (["thresholds.min_aspect=9"], "thresholds.min_aspect 9.0 is above thresholds.max_aspect"),
        (["split.max_seconds=1"], "split.max_seconds 1.0 is below thresholds.min_duration 1.41"),
        (["tokens.num_frames=[993]"], "split.max_seconds .* is fewer than the 993 frames of the shortest allowed clip"),
    ],
)
def test_settings_that_nothing_can_meet_are_refused(corpus, tokenizer_file, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        curate_config(corpus, tmp_path / "d", tokenizer_file, *overrides)


def test_an_empty_folder_and_missing_captions_are_told(tmp_path, tokenizer_file):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no video files under"):
        curate(curate_config(tmp_path / "empty", tmp_path / "d", tokenizer_file))
    write_video(tmp_path / "empty" / "a.mp4", moving_square(18))
    with pytest.raises(UserError, match=r"captions\.require is true"):
        curate(curate_config(tmp_path / "empty", tmp_path / "d", tokenizer_file))


@pytest.mark.slow
def test_too_many_failures_stop_the_run_and_a_larger_budget_continues(tmp_path, tokenizer_file):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mp4", moving_square(18))
    (folder / "b.mp4").write_text("no video")
    (folder / "c.mp4").symlink_to("nowhere")  # fails in the stage before, and counts too
    with pytest.raises(
        JobError, match=r"2 of 3 sources .* by the stage split, more than resources\.max_failed_share = 0\.5"
    ):
        curate(curate_config(folder, tmp_path / "d", tokenizer_file, "captions.require=false"))
    options = ["captions.require=false", "resources.max_failed_share=0.7"]
    result = curate(curate_config(folder, tmp_path / "d", tokenizer_file, *options))
    assert (result.computed["split"], result.counts["kept"], result.counts["failed"]) == (0, 1, 2)


def test_two_runs_on_one_dataset_refuse_each_other(corpus, tokenizer_file, tmp_path):
    with dataset_lock(str(tmp_path / "d")), pytest.raises(UserError, match=r"in use by another run .*pid"):
        curate(curate_config(corpus, tmp_path / "d", tokenizer_file))


def test_stage_tables_say_what_they_are(curated):
    names = set()
    for path in (curated[0] / "stages").glob("*/*/stage.json"):
        names.add(json.loads(path.read_text())["stage"])
        assert all(pq.read_table(part).num_rows for part in path.parent.glob("part-*.parquet"))
    assert names == {"sources", "split", "captions", "tokens"}
