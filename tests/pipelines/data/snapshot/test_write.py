import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.data.settings import PublishConfig
from pipelines.data.snapshot import ledger, shards
from pipelines.data.snapshot.card import dataset_card
from pipelines.data.snapshot.read import list_snapshots, open_snapshot
from pipelines.data.snapshot.schemas import LEDGER, TOKENS
from pipelines.data.snapshot.write import draw_split, write_snapshot
from pipelines.data.stage import tasks
from pipelines.data.upkeep.status import dataset_status
from pipelines.data.upkeep.verify import verify_snapshot
from pipelines.errors import UserError
from pipelines.storage import write_bytes_atomic
from tests.pipelines.data.snapshots import TOKENIZER, as_version_1, make_snapshot, snapshot_content

CONFIG = PublishConfig(val_share=0.3, shard_mb=0.01)


def clips(count=60):
    generator = np.random.default_rng(0)
    shapes = [(5, 6, 6), (2, 4, 8)]
    return {f"src{i // 2:02d}:{i % 2}": generator.integers(0, 1000, shapes[i % 3 == 0]) for i in range(count)}


def hashed_clips() -> dict[str, np.ndarray]:
    """The same under keys as sources have them."""
    return {f"{hashlib.sha256(key.encode()).hexdigest()}:{key}": codes for key, codes in clips().items()}


def files(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def test_what_is_written_is_read(tmp_path):
    made = clips()
    snapshot = make_snapshot(str(tmp_path), made, config=CONFIG)
    assert open_snapshot(str(tmp_path)) == snapshot
    assert open_snapshot(snapshot.uri) == snapshot
    seen = {}
    for bucket in snapshot.manifest.buckets:
        for shard in bucket.shards:
            table = snapshot.read_shard(shard)
            assert table.schema.equals(TOKENS)
            for row in table.to_pylist():
                assert (row["split"], row["t"], row["h"], row["w"]) == (bucket.split, bucket.t, bucket.h, bucket.w)
                assert row["split"] == draw_split(row["source_id"], seed=0, val_share=0.3)
                seen[row["clip_id"]] = np.array(row["codes"]).reshape(row["t"], row["h"], row["w"])
    assert seen.keys() == made.keys()
    assert all(np.array_equal(seen[key], made[key]) for key in made)
    totals = snapshot.manifest.totals
    assert totals["train"].rows + totals["val"].rows == 60
    assert totals["train"].tokens + totals["val"].tokens == sum(codes.size for codes in made.values())
    assert max(len(bucket.shards) for bucket in snapshot.manifest.buckets) > 1
    assert snapshot.read_shard(snapshot.manifest.buckets[0].shards[0], columns=["fps"]).column_names == ["fps"]
    assert snapshot.read_ledger().num_rows == 60 == sum(snapshot.manifest.ledger.counts.values())


def test_the_manifest_has_the_hash_of_every_file(tmp_path):
    snapshot = make_snapshot(str(tmp_path), clips(), config=CONFIG)
    manifest = snapshot.manifest
    hashes = {shard.path: shard.sha256 for bucket in manifest.buckets for shard in bucket.shards}
    hashes |= {part.path: part.sha256 for part in manifest.ledger.parts}
    found = files(Path(snapshot.uri))
    assert found.pop("manifest.json") == snapshot.digest
    found.pop("README.md")
    assert found == hashes


def test_the_same_content_gives_the_same_bytes_in_any_order(tmp_path):
    made = clips()
    first = make_snapshot(str(tmp_path / "a"), made, config=CONFIG)
    second = make_snapshot(str(tmp_path / "b"), dict(reversed(made.items())), config=CONFIG)
    assert files(Path(first.uri)) == files(Path(second.uri))


def test_an_unchanged_dataset_keeps_its_snapshot_and_a_changed_one_gets_a_child(tmp_path):
    made = clips()
    first = make_snapshot(str(tmp_path), made, config=CONFIG)
    assert make_snapshot(str(tmp_path), made, config=CONFIG) == first
    made.popitem()
    second = make_snapshot(str(tmp_path), made, config=CONFIG)
    assert second.manifest.parents == (first.manifest.snapshot_id,)
    assert list_snapshots(str(tmp_path)) == [first.manifest.snapshot_id, second.manifest.snapshot_id]
    assert open_snapshot(str(tmp_path)) == second
    assert open_snapshot(first.uri) == first


def test_an_unfinished_snapshot_is_invisible_and_removed(tmp_path):
    made = clips()
    first = make_snapshot(str(tmp_path), made, config=CONFIG)
    unfinished = tmp_path / "snapshots" / "v0002-12345678"
    (unfinished / "data").mkdir(parents=True)
    assert open_snapshot(str(tmp_path)) == first
    made.popitem()
    assert make_snapshot(str(tmp_path), made, config=CONFIG).manifest.snapshot_id.startswith("v0002-")
    assert not unfinished.exists()


def times(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*.parquet")}


def test_what_an_interrupted_publication_wrote_is_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_PART_ROWS", 20)
    made = hashed_clips()
    untouched = make_snapshot(str(tmp_path / "a"), made, config=CONFIG)
    parquet = [path for path in files(Path(untouched.uri)) if path.endswith(".parquet")]
    shard_files = [path for path in parquet if path.startswith("data/")]
    for most in (2, len(shard_files) + 1):  # files that are there when it is interrupted: shards, and of the ledger one

        def write(uri, data, *, most=most):
            if len(times(tmp_path / "b")) == most:
                raise OSError("no more")
            write_bytes_atomic(uri, data)

        with monkeypatch.context() as patched:
            patched.setattr(storage, "write_bytes_atomic", write)
            with pytest.raises(OSError, match="no more"):
                make_snapshot(str(tmp_path / "b"), made, config=CONFIG)
        assert list_snapshots(str(tmp_path / "b")) == []
        before = times(tmp_path / "b")
        assert len(before) == most
    assert len(shard_files) > 2
    assert len(parquet) > len(shard_files) + 1
    again = make_snapshot(str(tmp_path / "b"), made, config=CONFIG)
    assert files(Path(again.uri)) == files(Path(untouched.uri))
    assert {path: time for path, time in times(tmp_path / "b").items() if path in before} == before


def test_parts_of_a_ledger_that_are_gone_or_damaged_are_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_PART_ROWS", 20)
    snapshot = make_snapshot(str(tmp_path), hashed_clips(), config=CONFIG)
    expected, before = files(Path(snapshot.uri)), times(Path(snapshot.uri))
    gone, cut_off, turned = (Path(snapshot.uri) / part.path for part in snapshot.manifest.ledger.parts[:3])
    gone.unlink()
    cut_off.write_bytes(cut_off.read_bytes()[:-9])
    turned.write_bytes(turned.read_bytes()[::-1])  # of the same size
    assert make_snapshot(str(tmp_path), hashed_clips(), config=CONFIG) == snapshot
    assert files(Path(snapshot.uri)) == expected
    written = {path for path, time in times(Path(snapshot.uri)).items() if time != before[path]}
    assert written == {f"ledger/{path.name}" for path in (gone, cut_off, turned)}


@pytest.mark.parametrize("published", [True, False])
def test_what_a_killed_writer_left_is_removed(tmp_path, published):
    snapshot = make_snapshot(str(tmp_path), clips(), config=CONFIG)
    expected = files(Path(snapshot.uri))
    if not published:
        (Path(snapshot.uri) / "manifest.json").unlink()
    left = Path(snapshot.uri) / snapshot.manifest.buckets[0].shards[0].path
    left.with_name(f".{left.name}.123-0123abcd.tmp").write_bytes(b"half")
    assert make_snapshot(str(tmp_path), clips(), config=CONFIG) == snapshot
    assert files(Path(snapshot.uri)) == expected


@pytest.mark.usefixtures("ray_cluster")
def test_workers_write_the_same_bytes_in_whatever_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_PART_ROWS", 20)
    content = snapshot_content(hashed_clips(), config=CONFIG)
    expected = files(Path(write_snapshot(str(tmp_path / "here"), content, CONFIG).uri))
    assert sum(path.startswith("ledger/") for path in expected) > 2
    monkeypatch.setattr(tasks, "_FEW_BYTES", 0)
    for size in (1, 20_000, 10**9):
        monkeypatch.setattr(shards, "_TASK_BYTES", size)
        found = write_snapshot(str(tmp_path / str(size)), content, CONFIG)
        assert files(Path(found.uri)) == expected


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("few", [0, 1 << 40])  # bytes below which no worker is asked
def test_codes_that_the_store_cannot_hold_are_dealt_in_rounds(tmp_path, monkeypatch, few):
    content = snapshot_content(hashed_clips(), config=CONFIG)
    expected = files(Path(write_snapshot(str(tmp_path / "at once"), content, CONFIG).uri))
    monkeypatch.setattr(tasks, "_FEW_BYTES", few)
    monkeypatch.setattr(shards, "_TASK_BYTES", 5_000)
    monkeypatch.setattr(shards, "_ROUND_BYTES", 10_000)
    written = []

    def code_groups():
        written.append(len(list((tmp_path / "in rounds").rglob("*.parquet"))))
        return content.code_groups()

    found = write_snapshot(str(tmp_path / "in rounds"), replace(content, code_groups=code_groups), CONFIG)
    assert files(Path(found.uri)) == expected
    assert len(written) > 2
    assert written == sorted(set(written))


def test_the_parts_of_a_ledger_are_sorted_and_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_PART_ROWS", 20)
    content = snapshot_content(hashed_clips(), config=CONFIG)
    names = [f"@odd {number}" for number in range(9)] + ["", "zz"]  # of files that cannot be read, and others
    rows = [{"key": name, "path": name, "status": "failed", "reason": "x (permanent): y"} for name in names]
    more = pa.concat_tables([content.ledger, pa.Table.from_pylist(rows, schema=LEDGER)])
    snapshot = write_snapshot(str(tmp_path), replace(content, ledger=more), CONFIG)
    pieces = [piece["key"].to_pylist() for piece in snapshot.ledger_pieces(["key"])]
    assert len(pieces) > 2
    assert [key for keys in pieces for key in keys] == sorted(more["key"].to_pylist())
    assert snapshot.read_ledger()["key"].to_pylist() == sorted(more["key"].to_pylist())
    assert [part.rows for part in snapshot.manifest.ledger.parts] == [len(keys) for keys in pieces]


def test_a_snapshot_with_a_ledger_of_version_1_is_read_and_appended_to(tmp_path):
    made = clips()
    first = make_snapshot(str(tmp_path), made, config=CONFIG)
    table = first.read_ledger()
    as_version_1(first)
    before = files(Path(first.uri))
    old = open_snapshot(str(tmp_path))
    assert old.manifest.schema_version == 1
    assert "\n`ledger.parquet`, sorted by key" in dataset_card(old.manifest, old.read_ledger())
    assert old.read_ledger().equals(table)
    assert not verify_snapshot(old).problems
    second = make_snapshot(str(tmp_path), made | {"src99:0": made["src00:0"]}, config=CONFIG)
    assert second.manifest.parents == (first.manifest.snapshot_id,)
    assert second.read_ledger().num_rows == table.num_rows + 1
    assert dataset_status(str(tmp_path)).snapshots == (first.manifest.snapshot_id, second.manifest.snapshot_id)
    assert files(Path(first.uri)) == before


def test_the_seed_shuffles(tmp_path):
    orders = []
    for seed in (0, 1):
        config = PublishConfig(seed=seed, val_share=0.0)
        snapshot = make_snapshot(str(tmp_path / str(seed)), clips(), config=config)
        shard = snapshot.manifest.buckets[0].shards[0]
        orders.append(snapshot.read_shard(shard)["clip_id"].to_pylist())
    assert sorted(orders[0]) == sorted(orders[1])
    assert len({*map(tuple, orders), tuple(sorted(orders[0]))}) == 3


def test_an_empty_snapshot_is_published_and_opened(tmp_path):
    snapshot = make_snapshot(str(tmp_path), {})
    assert open_snapshot(str(tmp_path)).manifest.buckets == ()
    assert snapshot.manifest.totals["train"].rows == 0


def test_plain_pandas_reads_a_shard(tmp_path):
    snapshot = make_snapshot(str(tmp_path), clips(), config=CONFIG)
    frame = pq.read_table(Path(snapshot.uri) / snapshot.manifest.buckets[0].shards[0].path).to_pandas()
    assert set(frame.columns) == set(TOKENS.names)


def test_no_snapshot_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match="lumos curate"):
        open_snapshot(str(tmp_path / "nothing"))


def test_another_tokenizer_is_refused(tmp_path):
    content = snapshot_content(clips())
    snapshot = write_snapshot(str(tmp_path), content, PublishConfig())
    assert open_snapshot(str(tmp_path), expected_tokenizer=TOKENIZER) == snapshot
    for change in ({"kind": "cosmos"}, {"codebook_size": 64000}, {"weights_hash": "sha256:other"}):
        with pytest.raises(UserError, match="was made by the tokenizer"):
            open_snapshot(str(tmp_path), expected_tokenizer=replace(TOKENIZER, **change))


def test_unknown_keys_of_a_manifest_are_left_aside(tmp_path):
    snapshot = make_snapshot(str(tmp_path), clips())
    path = Path(snapshot.uri) / "manifest.json"
    value = json.loads(path.read_text())
    value["buckets"][0]["later"] = value["later"] = 1
    path.write_text(json.dumps(value))
    assert open_snapshot(str(tmp_path)).manifest == snapshot.manifest


def test_a_newer_schema_version_is_refused(tmp_path):
    snapshot = make_snapshot(str(tmp_path), clips())
    path = Path(snapshot.uri) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        open_snapshot(str(tmp_path))


def test_a_damaged_manifest_or_shard_is_named(tmp_path):
    snapshot = make_snapshot(str(tmp_path), clips(), config=CONFIG)
    first, second = snapshot.manifest.buckets[1].shards[:2]
    (Path(snapshot.uri) / first.path).unlink()
    with pytest.raises(UserError, match=first.path):
        snapshot.read_shard(first)
    pq.write_table(pa.table({"fps": [1.0]}), Path(snapshot.uri) / second.path)
    with pytest.raises(UserError, match="has 1 rows"):
        snapshot.read_shard(second)
    (Path(snapshot.uri) / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"no manifest of a snapshot \(KeyError\('schema_version'\)\): copy it back"):
        open_snapshot(snapshot.uri)
    (Path(snapshot.uri) / "manifest.json").write_text('{"schema_version": 1}')
    with pytest.raises(UserError, match=r"no manifest of a snapshot \(snapshot_id: Field required\): copy it back"):
        open_snapshot(snapshot.uri)
    part = Path(snapshot.uri) / snapshot.manifest.ledger.parts[0].path
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"{part.name} is damaged .*copy it back"):
        snapshot.read_ledger()
