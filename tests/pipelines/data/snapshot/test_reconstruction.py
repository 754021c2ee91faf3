"""What a ledger says of how well its clips are reconstructed, and where that is told."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.data.settings import PublishConfig
from pipelines.data.snapshot.read import Snapshot, TokenizerInfo, open_snapshot
from pipelines.data.snapshot.reconstruction import Reconstruction, Spread, read_reconstruction
from pipelines.data.snapshot.schemas import LEDGER
from pipelines.data.snapshot.write import write_snapshot
from pipelines.data.upkeep.report import write_report
from pipelines.data.upkeep.verify import verify_snapshot
from tests.pipelines.data.snapshots import snapshot_content

# Of the kept clips the second was not measured; what was not kept does not count.
SCORES = [("kept", 30.0, 0.9), ("kept", None, None), ("kept", 24.5, 0.7), ("rejected", 9.0, 0.1)]
TOLD = "PSNR 27.2 dB on average, 24.5 dB at worst; SSIM 0.800 on average, 0.700 at worst (measured on 2 of 3 clips)"
FOOTAGE = TokenizerInfo("fsq-footage", 64_000, (4, 8, 8), "sha256:" + "ab" * 32)


def ledger(rows=SCORES) -> pa.Table:
    row = {"source_id": "s", "path": "a.mp4", "start_s": 0.0, "end_s": 2.0, "reason": ""}
    made = [
        row | {"key": f"s:{number}", "status": status, "scores": {"psnr": psnr, "ssim": ssim}}
        for number, (status, psnr, ssim) in enumerate(rows)
    ]
    gone = {"key": "s@b.mp4", "source_id": "s", "path": "b.mp4", "status": "failed", "reason": "gone", "scores": None}
    return pa.Table.from_pylist([*made, gone], schema=LEDGER)


def publish(folder: Path, table: pa.Table) -> Snapshot:
    clips = {key: np.zeros((1, 4, 4), int) for key in ("s:0", "s:1", "s:2")}
    content = replace(snapshot_content(clips, tokenizer=FOOTAGE), ledger=table)
    created = {"config": {"thresholds": {}}, "stage_hashes": {}}
    return write_snapshot(str(folder), replace(content, created_from=created), PublishConfig())


def without_ssim(snapshot: Snapshot) -> Snapshot:
    """As a program left it that knew no such score."""
    manifest = json.loads(storage.read_bytes(f"{snapshot.uri}/manifest.json"))
    [part] = manifest["ledger"]["parts"]
    table = pq.read_table(f"{snapshot.uri}/{part['path']}")
    place = table.schema.get_field_index("scores")
    older = pa.struct([field for field in table.schema.field(place).type if field.name != "ssim"])
    rows = [
        row and {name: value for name, value in row.items() if name != "ssim"} for row in table["scores"].to_pylist()
    ]
    pq.write_table(table.set_column(place, "scores", pa.array(rows, older)), f"{snapshot.uri}/{part['path']}")
    part["sha256"] = storage.sha256_file(f"{snapshot.uri}/{part['path']}")
    storage.write_json_atomic(f"{snapshot.uri}/manifest.json", manifest)
    return open_snapshot(snapshot.uri)


def test_mean_and_lowest_are_those_of_the_measured_kept_clips():
    table = ledger()
    found = read_reconstruction([table])
    assert found == Reconstruction(3, Spread(2, 27.25, 24.5), Spread(2, pytest.approx(0.8), 0.7))
    assert read_reconstruction([table[:1], table[1:]]) == found
    assert str(found) == TOLD
    nothing = read_reconstruction([ledger([("kept", None, None)] * 4)])
    assert nothing == Reconstruction(4, None, None)
    assert read_reconstruction([]) == Reconstruction(0, None, None)


def test_the_card_says_which_tokenizer_made_the_codes_and_how_well_it_does(tmp_path):
    card = Path(publish(tmp_path / "measured", ledger()).uri, "README.md").read_text()
    assert f"tokenizer fsq-footage (64000 codes, compression 4x8x8, weights `{FOOTAGE.weights_hash}`)" in card
    assert f"against the frames that were encoded: {TOLD}." in card
    card = Path(publish(tmp_path / "not", ledger([("kept", None, None)] * 3)).uri, "README.md").read_text()
    assert "not measured on any of 3 clips; raise tokens.decode_back_share" in card


def test_a_snapshot_whose_ledger_knows_no_ssim_is_read_as_before(tmp_path):
    old = without_ssim(publish(tmp_path / "d", ledger()))
    found = read_reconstruction(old.ledger_pieces(["status", "scores"]))
    assert (found.psnr, found.ssim) == (Spread(2, 27.25, 24.5), None)
    assert verify_snapshot(old).problems == ()
    write_report(tmp_path / "report.html", old, frames=False)
    told = " ".join((tmp_path / "report.html").read_text(encoding="utf-8").split())
    assert "PSNR 27.2 dB on average, 24.5 dB at worst (measured on 2 of 3 clips)" in told
    assert "<b>fsq-footage</b>: 64000 codes, weights <code>sha256:abababababab</code>" in told
