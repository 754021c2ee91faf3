import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.curate import curate
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.upkeep.repair import repair_dataset
from pipelines.data.upkeep.verify import verify_snapshot
from pipelines.errors import UserError
from tests.pipelines.data.corpora import copy_stages, curate_config, published
from tests.pipelines.data.snapshots import as_version_1

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def sharded(curated, corpus, tokenizer_file, tmp_path_factory):
    """A dataset of several shards."""
    dataset = copy_stages(curated[0], tmp_path_factory.mktemp("sharded") / "dataset")
    curate(curate_config(corpus, dataset, tokenizer_file, "publish.shard_mb=0.002", "publish.val_share=0.3"))
    return dataset


@pytest.fixture
def dataset(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "d")
    return tmp_path / "d"


def shards(dataset):
    return sorted(dataset.glob("snapshots/*/data/**/*.parquet"))


def test_nothing_is_repaired_where_nothing_is_wrong(dataset):
    before = published(open_snapshot(str(dataset)))
    done = repair_dataset(str(dataset))
    assert str(done) == "nothing to repair"
    assert published(open_snapshot(str(dataset))) == before


@pytest.mark.parametrize("victims", ["one", "all"])
def test_damaged_and_missing_shards_are_made_again_byte_for_byte(dataset, victims):
    before = published(open_snapshot(str(dataset)))
    files = shards(dataset)
    assert len(files) >= 3
    chosen = files[:1] if victims == "one" else files
    chosen[0].write_bytes(chosen[0].read_bytes()[:-20] + bytes(20))
    for path in chosen[1:]:
        path.unlink()
    (Path(open_snapshot(str(dataset)).uri) / "README.md").unlink()
    assert verify_snapshot(open_snapshot(str(dataset))).problems
    done = repair_dataset(str(dataset))
    assert len(done.restored) == len(chosen) + 1
    assert not done.beyond
    assert published(open_snapshot(str(dataset))) == before
    assert not verify_snapshot(open_snapshot(str(dataset))).problems


def test_a_failed_row_of_a_clip_does_not_keep_its_shard_from_being_made_again(dataset):
    before = published(open_snapshot(str(dataset)))
    part = sorted(dataset.glob("stages/tokens/*/part-*.parquet"))[0]
    rows = pq.read_table(part)
    failed = {"work_key": "other work", "key": rows["key"][0].as_py(), "error": "decode_error (transient): cut off"}
    pq.write_table(pa.concat_tables([pa.Table.from_pylist([failed], rows.schema), rows]), part)
    for path in shards(dataset):
        path.unlink()
    assert not repair_dataset(str(dataset)).beyond
    assert published(open_snapshot(str(dataset))) == before


def test_a_run_restores_what_its_snapshot_lost(dataset, corpus, tokenizer_file):
    snapshot = open_snapshot(str(dataset))
    before = published(snapshot)
    for name in ("ledger/part-00000.parquet", "README.md", shards(dataset)[0].relative_to(snapshot.uri)):
        (Path(snapshot.uri) / name).unlink()
    assert [*repair_dataset(str(dataset)).beyond] == [f"{snapshot.manifest.snapshot_id}/ledger/part-00000.parquet"]
    shards(dataset)[0].unlink()
    options = ["publish.shard_mb=0.002", "publish.val_share=0.3"]
    result = curate(curate_config(corpus, dataset, tokenizer_file, *options))
    assert not any(result.computed.values())
    assert published(open_snapshot(str(dataset))) == before
    assert not verify_snapshot(open_snapshot(str(dataset))).problems
    (Path(snapshot.uri) / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is no manifest .* or delete .* and give the `lumos curate`"):
        open_snapshot(str(dataset))


def spoil_stages(dataset):
    """Damage one file of each of two stages; both, as they are named."""
    split = sorted(dataset.glob("stages/split/*/part-*.parquet"))[0]
    split.write_bytes(b"PAR1 no more")
    tokens = sorted(dataset.glob("stages/tokens/*/part-*.parquet"))[0]
    table = pq.read_table(tokens)
    turned = [codes[::-1] if codes else codes for codes in table["codes"].to_pylist()]
    place = table.schema.get_field_index("codes")
    pq.write_table(table.set_column(place, "codes", pa.array(turned, table.schema.field("codes").type)), tokens)
    return sorted(str(path.relative_to(dataset)) for path in (split, tokens))


def test_unusable_stage_files_are_dropped(dataset):
    spoiled = spoil_stages(dataset)
    assert sorted(repair_dataset(str(dataset)).dropped) == spoiled
    assert not any((dataset / name).exists() for name in spoiled)


@pytest.mark.slow
def test_unusable_stage_files_are_computed_again(dataset, corpus, tokenizer_file):
    before = published(open_snapshot(str(dataset)))
    assert len(spoil_stages(dataset)) == len(repair_dataset(str(dataset)).dropped)
    options = ["publish.shard_mb=0.002", "publish.val_share=0.3"]
    result = curate(curate_config(corpus, dataset, tokenizer_file, *options))
    assert result.computed["split"] > 0
    assert result.computed["tokens"] > 0
    assert published(open_snapshot(str(dataset))) == before


def test_a_snapshot_with_a_ledger_of_version_1_is_repaired(dataset):
    as_version_1(open_snapshot(str(dataset)))
    before = published(open_snapshot(str(dataset)))
    for path in shards(dataset):
        path.unlink()
    done = repair_dataset(str(dataset))
    assert done.restored
    assert not done.beyond
    assert published(open_snapshot(str(dataset))) == before
    ledger = Path(open_snapshot(str(dataset)).uri) / "ledger.parquet"
    ledger.unlink()
    assert [path.partition("/")[2] for path in repair_dataset(str(dataset)).beyond] == [ledger.name]


def test_captioners_are_checked_before_anything_is_repaired(dataset):
    manifest = Path(open_snapshot(str(dataset)).uri) / "manifest.json"
    value = json.loads(manifest.read_text())
    value["created_from"]["config"]["captions"]["captioners"] = ["mute"]
    manifest.write_text(json.dumps(value))
    part = sorted(dataset.glob("stages/split/*/part-*.parquet"))[0]
    part.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="there is no captioner 'mute'"):
        repair_dataset(str(dataset))
    assert part.exists()


def test_what_cannot_be_restored_is_told(dataset):
    shards(dataset)[0].unlink()
    shutil.rmtree(dataset / "stages" / "tokens")
    done = repair_dataset(str(dataset))
    [told] = done.beyond.values()
    assert "it does not come out of the stages as it was" in told
    assert "cannot restore v0001" in str(done)
    with pytest.raises(UserError, match="is no dataset"):
        repair_dataset(str(dataset / "nowhere"))
