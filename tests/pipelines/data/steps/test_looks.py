"""Looks: what they show, that split workers make them beside their own work, and who reads them."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.data.curate import curate
from pipelines.data.keys import picture_key
from pipelines.data.scores import Thresholds
from pipelines.data.settings import DecodeConfig, LooksConfig, SplitConfig
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.stage.run import StageWorker
from pipelines.data.stage.stage import StageResources
from pipelines.data.stage.table import StageTable, commit_part, table_parts
from pipelines.data.steps.looks import looks_stage
from pipelines.data.steps.split import LOOKED, EarlyLooks, split_stage
from pipelines.data.upkeep import stills
from pipelines.data.upkeep.status import collect_garbage, dataset_status
from pipelines.data.video.looks import Looks, decode_jpeg, encode_jpeg, read_looks
from pipelines.errors import JobError, UserError
from tests.pipelines.data.corpora import GOOD, curate_config
from tests.pipelines.data.look_rows import clip_inputs_of, clips_with_looks
from tests.pipelines.data.videos import moving_square, numbered, read_numbers, still, write_video

SMALL = 64  # px, the least that looks may be told to have


def barred_numbers(path, scale):
    """24 numbered pictures of 64x48 px, that many times larger, between black bars."""
    barred = np.zeros((24, 80 * scale, 64 * scale, 3), np.uint8)
    barred[:, 16 * scale : -16 * scale] = numbered(24, size=(64 * scale, 48 * scale))
    return write_video(path, barred)


@pytest.mark.parametrize(
    ("scale", "config", "numbers", "shape"),
    [
        (1, LooksConfig(), [0, 6, 12, 18], (48, 64, 3)),  # a small picture is not enlarged
        (4, LooksConfig(num_frames=3, shorter_side=SMALL), [0, 8, 16], (SMALL, 85, 3)),
    ],
)
def test_looks_are_evenly_spaced_pictures_without_black_bars(scale, config, numbers, shape, tmp_path):
    [row] = clips_with_looks(barred_numbers(tmp_path / "a.mp4", scale), tmp_path, config)
    [(same, looks)] = read_looks([row])
    assert same is row
    frames = np.stack([decode_jpeg(image) for image in looks.images])
    assert frames.shape[1:] == shape
    assert read_numbers(frames) == numbers


def test_readers_take_some_of_the_looks():
    looks = Looks([b"0", b"1", b"2", b"3", b"4", b"5", b"6"], None)
    assert looks.evenly(7) == list(looks.images)
    assert looks.evenly(3) == [b"0", b"2", b"4"]
    assert looks.evenly(1) == [b"0"]
    assert looks.middle == b"3"


def test_looks_are_read_from_the_files_that_the_rows_name(tmp_path):
    rows = [
        row
        for seed in range(3)
        for row in clips_with_looks(write_video(tmp_path / f"{seed}.mp4", moving_square(seed=seed)), tmp_path)
    ]
    alone = {row["key"]: next(read_looks([row]))[1] for row in rows}
    assert len({looks.images[0] for looks in alone.values()}) == 3
    assert {row["key"]: looks for row, looks in read_looks([rows[2], rows[0], rows[1]])} == alone
    with pytest.raises(JobError, match=r"part-\w+.parquet lacks the looks of 1 clips, such as 1:.* give the same"):
        list(read_looks([rows[1] | {"looks_part": rows[0]["looks_part"]}]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Videos of two shots that are kept, one that is not, and a file that is no video."""
    folder = tmp_path_factory.mktemp("files")
    for seed in range(3):
        shots = [moving_square(24, seed=seed), still(12, level=0), moving_square(24, seed=seed + 10)]
        write_video(folder / f"{seed}.mp4", np.concatenate(shots))
    (folder / "text.mp4").write_text("no video" * 99)
    return sorted(folder.iterdir())


def stages(tmp_path, rows_per_part=64):
    """The split stage without and with looks, and the looks stage."""
    resources, decode, thresholds = StageResources(), DecodeConfig(), Thresholds(min_duration=1.5)
    looks = replace(looks_stage(LooksConfig(), decode, resources), rows_per_part=rows_per_part)
    early = EarlyLooks(looks, StageTable(str(tmp_path), looks).uri, LooksConfig(), thresholds)
    return (
        split_stage(SplitConfig(), decode, resources),
        split_stage(SplitConfig(), decode, resources, looks=early),
        looks,
    )


def test_split_workers_make_the_looks_that_the_stage_would_make_and_split_as_ever(files, tmp_path):
    plain, split, looks = stages(tmp_path, rows_per_part=4)
    assert split.hash == plain.hash
    rows = [{"work_key": path.stem, "uri": str(path)} for path in files]
    clips = split.function(str(tmp_path / "a"))(rows)
    assert clips == plain.function(str(tmp_path / "b"))(rows)
    table = StageTable(str(tmp_path), looks)
    assert len(table.parts()) == 2  # of 4 and 2 rows
    found = table.read().sort_by("work_key").to_pylist()
    assert [row["key"] for row in found] == [
        clip["key"] for clip in clips if clip.get("key") and clip["scores"]["duration"] > 1.5
    ]
    assert len(found) == 6
    inputs = [row for path in files[:3] for row in clip_inputs_of(path, tmp_path, SplitConfig())]
    wanted = {row["work_key"] for row in found}
    made = looks.function(str(tmp_path / "c"))([row for row in inputs if row["work_key"] in wanted])
    assert sorted(made, key=lambda row: row["work_key"]) == [
        {name: value for name, value in row.items() if name != "error"} for row in found
    ]


def test_looks_are_committed_before_the_clips_that_they_are_of(files, tmp_path, monkeypatch):
    _, split, looks = stages(tmp_path)
    table = StageTable(str(tmp_path), split)
    write = storage.write_bytes_atomic

    def write_or_die(uri, data):
        if uri.startswith(table.uri):
            raise KeyboardInterrupt
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes_atomic", write_or_die)
    batch = pa.Table.from_pylist([{"work_key": path.stem, "uri": str(path)} for path in files])
    with pytest.raises(KeyboardInterrupt):
        StageWorker(split, table.uri)(batch)
    assert table.parts() == []
    [part] = StageTable(str(tmp_path), looks).parts()
    monkeypatch.undo()
    StageWorker(split, table.uri)(batch)
    assert StageTable(str(tmp_path), looks).parts() == [part]  # the same clips, so the same file
    assert len(table.parts()) == 1


def test_split_workers_make_no_looks_that_there_are(files, tmp_path):
    _, split, looks = stages(tmp_path)
    table = StageTable(str(tmp_path), looks)
    rows = [{"work_key": path.stem, "uri": str(path)} for path in files[:3]]
    split.function(str(tmp_path / "a"))(rows[:1])
    there = table.read(["work_key"])["work_key"].to_pylist()
    assert len(there) == 2
    shutil.rmtree(table.uri)
    again = [rows[0] | {LOOKED: there[:1]}, rows[1] | {LOOKED: None}]
    split.function(str(tmp_path / "b"))(again)
    made = table.read(["work_key"])["work_key"].to_pylist()
    assert {key[0] for key in made} == {"0", "1"}
    assert len(made) == 3
    assert there[0] not in made
    assert there[1] in made


# --------------------------------------------------------------------------------------------------- whole curations


@pytest.fixture(scope="module")
def looked(corpus, tokenizer_file, tmp_path_factory, ray_cluster):
    """A dataset with looks."""
    dataset = tmp_path_factory.mktemp("looked") / "dataset"
    return dataset, curate(curate_config(corpus, dataset, tokenizer_file, "looks.always=true"))


def shards(dataset):
    manifest = open_snapshot(str(dataset)).manifest
    return [shard.sha256 for bucket in manifest.buckets for shard in bucket.shards]


def look_table(dataset):
    return StageTable(str(dataset), looks_stage(LooksConfig(), DecodeConfig(), StageResources()))


@pytest.mark.slow
def test_looks_are_off_by_default_and_change_nothing_that_is_published(curated, looked):
    (without, off), (dataset, on) = curated, looked
    assert not (without / "stages" / "looks").exists()
    assert "looks" not in off.computed
    assert on.computed["looks"] == 0  # the workers of the split stage had made them
    assert shards(dataset) == shards(without)
    assert on.counts == off.counts
    [status] = [table for table in dataset_status(str(dataset)).tables if table.stage == "looks"]
    assert status.rows == GOOD + 1
    assert status.used_by == (on.snapshot_id,)
    assert (dataset / "stages" / "looks" / status.hash / "stage.json").exists()


@pytest.mark.slow
def test_loosened_thresholds_and_another_config_compute_what_is_missing(looked, corpus, tokenizer_file, tmp_path):
    dataset = shutil.copytree(looked[0], tmp_path / "d")
    loose = ["looks.always=true", "thresholds.min_motion_time=null", "thresholds.min_motion=null"]
    result = curate(curate_config(corpus, dataset, tokenizer_file, *loose))
    assert result.counts["kept"] == GOOD + 2  # static.mp4
    assert result.computed["looks"] == 1
    assert result.computed["split"] == 0
    before = look_table(dataset).uri
    result = curate(curate_config(corpus, dataset, tokenizer_file, *loose, "looks.num_frames=2"))
    assert result.computed["looks"] == GOOD + 2
    dropped = collect_garbage(str(dataset), dry_run=False, keep=1)
    assert before.removeprefix(f"{dataset}/") in dropped
    assert table_parts(before) == []


@pytest.mark.slow
def test_other_split_settings_make_no_looks_twice(looked, corpus, tokenizer_file, tmp_path):
    dataset = shutil.copytree(looked[0], tmp_path / "d")
    parts = look_table(dataset).parts()
    # At this threshold the clips are the same; other workers, as a part of the same keys would only be written again.
    other = ["looks.always=true", "split.threshold=3.5", "resources.workers=3"]
    result = curate(curate_config(corpus, dataset, tokenizer_file, *other))
    assert result.computed["split"] > 0
    assert result.computed["looks"] == 0
    assert look_table(dataset).parts() == parts


@pytest.mark.slow
def test_the_report_takes_no_looks_of_another_crop(looked, tmp_path):
    dataset = shutil.copytree(looked[0], tmp_path / "d")
    snapshot = open_snapshot(str(dataset))
    kept = [row for row in snapshot.read_ledger().to_pylist() if row["status"] == "kept"]
    before = stills.decode_frames(snapshot, kept)
    black = [encode_jpeg(np.zeros((48, 64, 3), np.uint8), 90)] * 4
    looks = look_table(dataset)
    stage = looks_stage(LooksConfig(), DecodeConfig(), StageResources())
    for row in kept:
        other = {"work_key": picture_key(row["key"], (8, 8, 16, 12)), "key": row["key"], "images": black}
        commit_part(stage, looks.uri, [other])
    assert stills.decode_frames(snapshot, kept) == before


@pytest.mark.slow
def test_a_run_that_was_killed_between_looks_and_split_goes_on(looked, corpus, tokenizer_file, tmp_path):
    dataset = shutil.copytree(looked[0], tmp_path / "d")
    [*parts] = (dataset / "stages" / "split").glob("*/part-*.parquet")
    for part in parts[:2]:
        part.unlink()  # as if these had not been committed
    shutil.rmtree(dataset / "snapshots")
    result = curate(curate_config(corpus, dataset, tokenizer_file, "looks.always=true", "resources.workers=3"))
    assert result.computed["split"] > 0
    assert result.computed["looks"] == 0
    assert shards(dataset) == shards(looked[0])
    keys = look_table(dataset).read(["work_key"])["work_key"].to_pylist()
    assert len(keys) == len(set(keys)) == GOOD + 1


@pytest.mark.slow
def test_the_report_takes_looks_and_decodes_sources_for_the_others(looked, corpus, tmp_path, monkeypatch):
    snapshot = open_snapshot(str(looked[0]))
    rows = [row for row in snapshot.read_ledger().to_pylist() if row["end_s"] is not None]
    decoded = []
    decode = stills.decode_clips

    def counting(of, clips, wanted):
        decoded.extend(clips)
        return decode(of, clips, wanted)

    monkeypatch.setattr(stills, "decode_clips", counting)
    shown = stills.decode_frames(snapshot, rows)
    assert {row["status"] for row in decoded} == {"rejected"}
    assert len(decoded) == len(rows) - (GOOD + 1)
    monkeypatch.setattr(stills, "_show_looks", lambda of, clips: {})
    anew = stills.decode_frames(snapshot, rows)
    assert shown.keys() == anew.keys()
    for row in rows:
        ours, theirs = ([decode_jpeg(image) for image in frames[row["key"]]] for frames in (shown, anew))
        assert len(ours) == len(theirs) == 3
        for one, other in list(zip(ours, theirs, strict=True))[:2]:  # the last is of another moment
            assert one.shape == other.shape
            assert np.abs(one.astype(int) - other).mean() < 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["features.clip.weights=x", "features.num_frames=6"],
            r"features.num_frames 6 is more than looks.num_frames 4",
        ),
        (
            [
                "captions.captioners=[endpoint]",
                "captions.endpoint={url: http://h/v1, model: m, num_frames: 8}",
                "looks.num_frames=6",
            ],
            r"captions.endpoint.num_frames 8 is more than looks.num_frames 6, .*: raise looks.num_frames, or lower",
        ),
        (
            ["features.clip.weights=x", "features.num_frames=3"],
            r"looks.num_frames 4 is no multiple of features.num_frames 3, .*: change one of them",
        ),
        (
            ["captions.captioners=[coca]", "captions.coca.weights=x", "looks.num_frames=5"],
            r"looks.num_frames 5 is no multiple of the captioner coca, which takes the middle of 2",
        ),
        (
            ["captions.captioners=[endpoint]", "captions.endpoint={url: http://h/v1, model: m, max_side: 1536}"],
            r"captions.endpoint.max_side 1536 is more than looks have \(960 at most",
        ),
        (["looks.quality=0"], r"quality must be in 1\.\.100, got 0"),
        (["looks.shorter_side=32"], r"shorter_side must be in 64\.\.2160 px, got 32"),
        (["looks.num_frames=0"], r"num_frames must be in 1\.\.64, got 0"),
    ],
)
def test_a_config_that_asks_for_more_than_there_is_is_refused(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        curate_config(tmp_path, tmp_path / "d", tmp_path, *overrides)
    assert curate_config(tmp_path, tmp_path / "d", tmp_path, "features.num_frames=6").looks.num_frames == 4
