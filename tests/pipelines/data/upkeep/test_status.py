"""Looking after a dataset: what its status says, what verification finds, what is retried and deleted."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.data import command
from pipelines.data.curate import curate
from pipelines.data.snapshot.read import list_snapshots, open_snapshot
from pipelines.data.upkeep import removals, repair, status
from pipelines.data.upkeep.removals import remove_sources, restore_sources
from pipelines.data.upkeep.repair import repair_dataset
from pipelines.data.upkeep.report import score_columns, what_if, write_report
from pipelines.data.upkeep.status import collect_garbage, dataset_status, retry
from pipelines.data.upkeep.verify import verify_snapshot
from pipelines.data.video.decode import CRASHES, CrashLog
from pipelines.errors import JobError, UserError
from pipelines.storage.lock import dataset_lock
from tests.pipelines.data.corpora import GOOD, curate_config, published

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def dataset(curated, tmp_path):
    return shutil.copytree(curated[0], tmp_path / "dataset")


def shards(dataset: Path) -> list[Path]:
    return sorted((dataset / "snapshots").glob("*/data/**/*.parquet"))


def problems(dataset: Path) -> str:
    return "\n".join(verify_snapshot(open_snapshot(str(dataset))).problems)


def rewrite(dataset: Path, change, path: Path | None = None) -> None:
    """Change a shard's rows and tell the manifest its new hash and size, so that only the content is wrong."""
    import hashlib

    path = path or shards(dataset)[0]
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    manifest = next((dataset / "snapshots").glob("*/manifest.json"))
    value = json.loads(manifest.read_text())
    for bucket in value["buckets"]:
        for shard in bucket["shards"]:
            if path.as_posix().endswith(shard["path"]):
                shard |= {"rows": table.num_rows, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                bucket["rows"] = sum(part["rows"] for part in bucket["shards"])
                value["totals"][bucket["split"]]["rows"] = bucket["rows"]
    manifest.write_text(json.dumps(value))


def test_a_whole_snapshot_verifies(dataset):
    found = verify_snapshot(open_snapshot(str(dataset)))
    assert found.problems == ()
    assert found.rows == GOOD + 1
    assert found.tokens == found.rows * 5 * 6 * 6
    shown = CliRunner().invoke(command, ["verify", str(dataset)])
    assert shown.exit_code == 0
    assert "all well" in shown.output


def test_verification_finds_changed_and_missing_files(dataset):
    path = shards(dataset)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "SHA-256" in problems(dataset)
    path.unlink()
    assert "cannot be read" in problems(dataset)
    assert "kept by the ledger but in no shard" in problems(dataset)
    shown = CliRunner().invoke(command, ["verify", str(dataset)])
    assert shown.exit_code == 1


def test_verification_finds_lost_doubled_and_foreign_rows(dataset):
    rewrite(dataset, lambda table: table.slice(1))
    assert "kept by the ledger but in no shard" in problems(dataset)
    rewrite(dataset, lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    assert "in more than one row" in problems(dataset)
    strange = pa.array(["stranger"], pa.string())
    rewrite(
        dataset,
        lambda table: pa.concat_tables([table, table.slice(0, 1).set_column(0, table.schema.field(0), strange)]),
    )
    assert "in a shard but not kept by the ledger: stranger" in problems(dataset)


def test_verification_finds_codes_that_do_not_fit(dataset):
    def shorter(table):
        codes = pa.array([row[:-1] for row in table["codes"].to_pylist()], table.schema.field("codes").type)
        return table.set_column(table.schema.get_field_index("codes"), table.schema.field("codes"), codes)

    def beyond(table):
        codes = pa.array([[9999, *row[1:]] for row in table["codes"].to_pylist()], table.schema.field("codes").type)
        return table.set_column(table.schema.get_field_index("codes"), table.schema.field("codes"), codes)

    rewrite(dataset, beyond)
    assert "code 9999 is outside the codebook" in problems(dataset)
    rewrite(dataset, shorter)
    assert "codes do not fill the grid" in problems(dataset)


def test_status_tells_what_is_there_and_what_failed(dataset):
    status = dataset_status(str(dataset))
    assert len(status.snapshots) == 1
    assert status.counts["kept"] == GOOD + 1
    tables = {table.stage: table for table in status.tables}
    assert set(tables) == {"sources", "split", "captions", "tokens"}
    assert tables["tokens"].rows == GOOD + 1
    assert tables["split"].failed == {"empty_file (permanent)": 1, "not_a_video (permanent)": 1}
    assert tables["sources"].failed == {"missing_file (permanent)": 1}
    assert all(table.used_by == status.snapshots for table in status.tables)
    shown = CliRunner().invoke(command, ["status", str(dataset)])
    assert f"kept {GOOD + 1}" in shown.output
    assert "failed: not_a_video (permanent)" in shown.output


def test_retry_computes_the_forgotten_inputs_alone_and_changes_nothing_else(dataset, corpus, tokenizer_file):
    before = published(open_snapshot(str(dataset)))
    assert retry(str(dataset), "transient") == {}
    forgotten = retry(str(dataset), "not_a_video")
    assert forgotten == {"split": 1}
    result = curate(curate_config(corpus, dataset, tokenizer_file))
    assert result.computed["split"] == 1
    assert result.computed["tokens"] == 0
    assert published(open_snapshot(str(dataset))) == before


def test_a_removed_source_is_in_no_later_snapshot_under_any_name(dataset, corpus, tokenizer_file):
    before = open_snapshot(str(dataset))
    shown = CliRunner().invoke(command, ["remove", str(dataset), "good_001.mp4"])
    assert shown.exit_code == 0, shown.output
    with pytest.raises(UserError, match=r"has a source 'good_999\.mp4'"):
        remove_sources(str(dataset), ["good_999.mp4"])
    result = curate(curate_config(corpus, dataset, tokenizer_file))
    assert result.computed == {"sources": 0, "split": 0, "captions": 0, "tokens": 0}
    after = open_snapshot(str(dataset))
    assert after.manifest.snapshot_id != before.manifest.snapshot_id
    [row] = [row for row in after.read_ledger().to_pylist() if row["path"] == "good_001.mp4"]
    assert (row["status"], row["reason"]) == ("rejected", "removed: taken out of the dataset")
    assert verify_snapshot(after).rows == GOOD
    # The same content twice: neither name brings it back.
    [twin] = [row for row in after.read_ledger().to_pylist() if row["path"] == "good_000.mp4"]
    remove_sources(str(dataset), [twin["source_id"]])
    curate(curate_config(corpus, dataset, tokenizer_file))
    fates = {row["path"]: row["status"] for row in open_snapshot(str(dataset)).read_ledger().to_pylist()}
    assert fates["good_000.mp4"] == fates["twin of 'good' 0.mp4"] == "rejected"
    assert verify_snapshot(open_snapshot(str(dataset))).rows == GOOD - 1
    with pytest.raises(UserError, match=r"'good_002.mp4' is not removed from .*; there are removed: "):
        restore_sources(str(dataset), ["good_000.mp4", "good_002.mp4"])
    shown = CliRunner().invoke(command, ["restore", str(dataset), "good_001.mp4", "good_000.mp4"])
    assert shown.exit_code == 0, shown.output
    result = curate(curate_config(corpus, dataset, tokenizer_file))
    assert result.computed == {"sources": 0, "split": 0, "captions": 0, "tokens": 0}
    again = open_snapshot(str(dataset))
    assert again.read_ledger().equals(before.read_ledger())
    shards = [[shard.sha256 for b in one.manifest.buckets for shard in b.shards] for one in (before, again)]
    assert shards[0] == shards[1]


def test_gc_deletes_what_no_snapshot_needs_and_a_rerun_makes_it_again(dataset, corpus, tokenizer_file):
    (dataset / "stages" / "split" / "0123456789abcdef").mkdir()
    (dataset / "snapshots" / "v0009-00000000").mkdir()
    doomed = ["stages/split/0123456789abcdef", "snapshots/v0009-00000000"]
    assert collect_garbage(str(dataset), dry_run=True) == doomed
    assert (dataset / doomed[0]).is_dir()
    shown = CliRunner().invoke(command, ["gc", str(dataset)])
    assert f"deleted {doomed[0]}" in shown.output
    assert not (dataset / doomed[0]).exists()
    assert not (dataset / doomed[1]).exists()
    assert collect_garbage(str(dataset), dry_run=False) == []
    assert curate(curate_config(corpus, dataset, tokenizer_file)).computed["tokens"] == 0


def test_upkeep_refuses_what_is_no_dataset_or_in_use(dataset, tmp_path):
    calls = (
        dataset_status,
        lambda uri: retry(uri, "transient"),
        lambda uri: remove_sources(uri, ["a.mp4"]),
        lambda uri: restore_sources(uri, ["0" * 64]),
        lambda uri: repair_dataset(uri),
    )
    for call in calls:
        with pytest.raises(UserError, match="is no dataset"):
            call(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()  # not even a lock
    with dataset_lock(str(dataset)), pytest.raises(UserError, match="in use by another run"):
        collect_garbage(str(dataset), dry_run=True)
    shutil.rmtree(dataset / "snapshots")
    with pytest.raises(UserError, match="no published snapshot yet"):
        collect_garbage(str(dataset), dry_run=False)


def test_the_report_shows_yields_scores_and_other_thresholds(dataset, tmp_path):
    shown = CliRunner().invoke(command, ["report", str(dataset), "--out", str(tmp_path / "page" / "report.html")])
    assert shown.exit_code == 0, shown.output
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "twin of &#39;good&#39; 0.mp4" in page
    assert f'<li class="card kept"><b>{GOOD + 1}</b> kept</li>' in page
    assert "thresholds.min_motion_time=0.25" in page
    assert page.count("<svg") == page.count("</svg>") > 4


def test_another_writer_and_missing_ids_are_told(dataset):
    path = shards(dataset)[0]
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "clip_id", table["clip_id"].cast(pa.large_string())), path)
    assert problems(dataset).startswith(f"data/{path.relative_to(next((dataset / 'snapshots').iterdir()) / 'data')}")
    assert "SHA-256" in problems(dataset)
    pq.write_table(table.set_column(0, "clip_id", pa.nulls(table.num_rows, pa.string())), path)
    assert "null values" in problems(dataset)


def test_what_another_threshold_would_keep_is_what_it_keeps(dataset, corpus, tokenizer_file):
    scores = score_columns(open_snapshot(str(dataset)).read_ledger())
    config = curate_config(corpus, dataset, tokenizer_file)
    found = {item.name: item for item in what_if(scores, config.thresholds, vars(config.tokens))}
    assert dict(found["min_duration"].others)[None] == GOOD + 1
    assert found["min_duration"].note == "less changes nothing: shorter clips lack the 17 frames at 12 fps"
    assert not any(item.note for name, item in found.items() if name != "min_duration")
    item = found["min_motion_time"]
    assert item.passing == GOOD + 1
    without = dict(item.others)[None]
    result = curate(curate_config(corpus, dataset, tokenizer_file, "thresholds.min_motion_time=null"))
    assert result.counts["kept"] == without == GOOD + 2
    assert result.computed["split"] == 0


def test_damaged_files_and_impossible_pages_are_told(dataset, tmp_path):
    [part, *_] = sorted(dataset.glob("stages/split/*/part-*"))
    part.write_bytes(part.read_bytes()[:100])
    told = str(dataset_status(str(dataset)))
    assert "1 damaged files: give `lumos data repair`" in told
    stages = [line.split()[0] for line in told.partition("used by\n")[2].splitlines() if line[0] != " "]
    assert stages == ["sources", "split", "captions", "tokens"]
    with pytest.raises(UserError, match=r"is damaged .* drops it"):
        retry(str(dataset), "transient")
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(UserError, match=rf"--out {out} cannot be written \(.*name another file"):
            write_report(out, open_snapshot(str(dataset)))


def test_a_file_that_cannot_be_opened_is_told_in_one_line(dataset):
    [part, *_] = sorted(dataset.glob("stages/split/*/part-*"))
    part.unlink()
    part.symlink_to("nowhere")
    error = CliRunner().invoke(command, ["status", str(dataset)]).exception
    assert isinstance(error, UserError)  # exit status 2
    assert re.search(r"No such file .*part-.*check its address", str(error))


@pytest.mark.parametrize("verb", ["retry", "remove", "gc", "repair"])
def test_a_dataset_that_was_lost_to_another_run_is_not_written_to(dataset, monkeypatch, verb):
    calls = {
        "retry": lambda: retry(str(dataset), "permanent"),
        "remove": lambda: remove_sources(str(dataset), ["good_001.mp4"]),
        "gc": lambda: collect_garbage(str(dataset), dry_run=False),
        "repair": lambda: repair_dataset(str(dataset)),
    }
    unused = dataset / "stages" / "split" / "0123456789abcdef" / "part-1.parquet"
    if verb in ("gc", "repair"):
        unused.parent.mkdir()
        unused.write_bytes(b"damaged")

    def lost(_):
        raise JobError("another run took the dataset over")

    def content():
        return {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file() and path.name != ".lock"}

    for module in (status, removals, repair):
        monkeypatch.setattr(module, "check_lock", lost)
    before = content()
    with pytest.raises(JobError, match="took the dataset over"):
        calls[verb]()
    assert content() == before


def in_groups_of_one(dataset, stage):
    """Write the files of a stage anew, each row a group of its own; returns what tells whether they still are so."""
    parts = sorted(dataset.glob(f"stages/{stage}/*/part-*"))
    for part in parts:
        pq.write_table(pq.read_table(part), part, row_group_size=1)

    def still() -> bool:
        files = [pq.ParquetFile(part).metadata for part in parts if part.exists()]
        return bool(files) and all(file.num_row_groups == file.num_rows for file in files)

    return still


def test_retry_tells_the_codes_there_are(dataset):
    with pytest.raises(UserError, match=r"no failure is bogus; there are 1 .*not_a_video \(permanent\)"):
        retry(str(dataset), "bogus")
    still = in_groups_of_one(dataset, "split")
    assert retry(str(dataset), "not_a_video") == {"split": 1}
    assert still()


def test_gc_deletes_older_snapshots_and_what_removed_sources_left(dataset, corpus, tokenizer_file):
    source = next(
        row["source_id"]
        for row in open_snapshot(str(dataset)).read_ledger().to_pylist()
        if row["path"] == "good_001.mp4"
    )

    def holding():
        return {
            path.parts[-3]
            for path in dataset.glob("stages/*/*/part-*")
            if any(key.startswith(source) for key in pq.read_table(path)["work_key"].to_pylist())
        }

    remove_sources(str(dataset), ["good_001.mp4"])
    curate(curate_config(corpus, dataset, tokenizer_file))
    [old, new] = list_snapshots(str(dataset))
    assert collect_garbage(str(dataset), dry_run=False) == []  # the older snapshot holds it
    would = collect_garbage(str(dataset), dry_run=True, keep=1)
    assert holding() == {"split", "captions", "tokens"}
    still = in_groups_of_one(dataset, "tokens")
    assert collect_garbage(str(dataset), dry_run=False, keep=1) == would
    assert [name.partition("/stages/")[0].split()[0] for name in would] == [f"snapshots/{old}", "1", "1", "1"]
    assert holding() == set()
    assert still()
    assert list_snapshots(str(dataset)) == [new]
    result = curate(curate_config(corpus, dataset, tokenizer_file))
    assert (result.snapshot_id, sum(result.computed.values())) == (new, 0)
    assert not verify_snapshot(open_snapshot(str(dataset))).problems


def test_retry_starts_anew_with_what_ended_its_decoder(dataset):
    [table] = (dataset / "stages" / "split").iterdir()
    failed = {
        row["work_key"] for part in table.glob("part-*") for row in pq.read_table(part).to_pylist() if row["error"]
    }
    crashes = CrashLog(str(table / CRASHES))
    for key in failed:
        crashes.add(key, "stalled")
    crashes.add("of another clip", "SIGSEGV")
    assert retry(str(dataset), "permanent")["split"] == len(failed)
    assert [json.loads(path.read_text())["key"] for path in (table / CRASHES).iterdir()] == ["of another clip"]
