import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.data import command
from pipelines.data.curate import curate
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.upkeep.verify import recheck
from pipelines.errors import UserError
from tests.pipelines.data.corpora import GOOD, copy_stages, curate_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def rechecked(curated, corpus, tmp_path_factory):
    """A dataset by the embedded tokenizer, all of whose clips were decoded back."""
    root = tmp_path_factory.mktemp("rechecked")
    videos = shutil.copytree(corpus, root / "videos", symlinks=True)
    dataset = copy_stages(curated[0], root / "d")
    shutil.rmtree(dataset / "stages" / "sources")  # it names the files of the corpus, not their copies
    curate(curate_config(videos, dataset, "null", "tokens.decode_back_share=1.0", "tokens.batch_size=1"))
    return dataset, videos


def test_codes_on_disk_are_those_of_their_clips(rechecked):
    snapshot = open_snapshot(str(rechecked[0]))
    found = recheck(snapshot, 100)
    assert len(found.psnr) == GOOD + 1
    assert (found.equal, found.skipped, found.problems) == (1.0, {}, ())
    scores = {row["key"]: row["scores"] for row in snapshot.read_ledger().to_pylist() if row["status"] == "kept"}
    assert {key: scores[key]["psnr"] for key in found.psnr} == pytest.approx(found.psnr, abs=1e-3)
    assert recheck(snapshot, 2).psnr.items() < found.psnr.items()
    done = CliRunner().invoke(command, ["verify", str(rechecked[0]), "--sample", "3"])
    assert done.exit_code == 0, done.output
    assert "3 clips decoded back" in done.output


def test_codes_of_another_clip_are_found(rechecked, tmp_path):
    dataset = shutil.copytree(rechecked[0], tmp_path / "d")
    [path] = dataset.glob("snapshots/*/data/train/**/*.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index("codes")
    rolled = table["codes"].to_pylist()
    rolled = rolled[1:] + rolled[:1]
    pq.write_table(table.set_column(place, "codes", pa.array(rolled, table.schema.field("codes").type)), path)
    found = recheck(open_snapshot(str(dataset)), 100)
    assert found.equal < 0.9
    assert "do not show their clip" in found.problems[0]


def test_what_is_not_at_hand_is_told(rechecked, tokenizer_file, tmp_path):
    dataset, videos = rechecked
    gone = videos.rename(tmp_path / "moved")
    try:
        found = recheck(open_snapshot(str(dataset)), 2)
    finally:
        gone.rename(videos)
    assert not found.psnr
    assert not found.problems
    assert all(why.startswith("missing_file") for why in found.skipped.values())
    with pytest.raises(UserError, match="name its file with --tokenizer"):
        recheck(open_snapshot(str(dataset)), 2, str(tokenizer_file))


def test_a_tokenizer_that_is_not_ours_has_to_be_named(curated, tokenizer_file):
    snapshot = open_snapshot(str(curated[0]))
    assert "name --tokenizer" in str(recheck(snapshot, 2))
    assert recheck(snapshot, 2, str(tokenizer_file)).equal == 1.0


def test_a_snapshot_without_clips_has_nothing_to_look_at(curated, corpus, tmp_path):
    curate(curate_config(corpus, copy_stages(curated[0], tmp_path / "d"), "null", "thresholds.min_fps=99"))
    found = recheck(open_snapshot(str(tmp_path / "d")), 4)
    assert (found.psnr, found.problems) == ({}, ())
    assert CliRunner().invoke(command, ["verify", str(tmp_path / "d")]).exit_code == 0
