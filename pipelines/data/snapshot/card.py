"""The dataset card: what a person reads who finds a snapshot."""

import pyarrow as pa

from pipelines.data.snapshot.ledger import count_reasons
from pipelines.data.snapshot.read import Manifest
from pipelines.data.snapshot.reconstruction import read_reconstruction

_COLUMNS = """\
| column | type | meaning |
|---|---|---|
| `clip_id` | string | content hash of the source, and the clip's span in milliseconds |
| `source_id` | string | SHA-256 of the source file |
| `split` | string | `train` or `val`, drawn per source: no source is in both |
| `captions` | list of (text, captioner) | none, one or several |
| `fps` | float32 | frames per second that were tokenized |
| `t`, `h`, `w` | int16 | shape of the latent grid: 1 + 4 (t - 1) frames of 8h x 8w px |
| `codes` | list of uint16 | t h w codes in (t, h, w) order |
| `motion` | float32 | share of the picture that changes from one look to the next; null for an image |
"""


def dataset_card(manifest: Manifest, ledger: pa.Table) -> str:
    """The README.md of a snapshot, given its ledger (columns status, reason and scores)."""
    tokenizer = manifest.tokenizer
    ledger_files = "ledger.parquet" if manifest.schema_version == 1 else "ledger/*.parquet"
    cells = "x".join(map(str, tokenizer.compression))
    lines = [
        f"# Video tokens, snapshot {manifest.snapshot_id}",
        "",
        f"Clips of video as grids of discrete codes, made by the tokenizer {tokenizer.kind} "
        f"({tokenizer.codebook_size} codes, compression {cells}, weights `{tokenizer.weights_hash}`).",
        "",
        f"What the codes show, against the frames that were encoded: {read_reconstruction([ledger])}. No model that is "
        "trained on them can draw better.",
        "",
        "## Contents",
        "",
        "| split | latent t x h x w | clips | tokens | shards | MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for b in manifest.buckets:
        size = f"{b.bytes / 1e6:.2f}"
        lines.append(f"| {b.split} | {b.t} x {b.h} x {b.w} | {b.rows} | {b.tokens} | {len(b.shards)} | {size} |")
    lines += ["", "Captions by: " + (", ".join(manifest.captioners) or "nobody") + ".", "", "## Yield", ""]
    lines += ["| status | reason | rows |", "|---|---|---:|"]
    kept = manifest.ledger.counts.get("kept")
    counted = {**count_reasons([ledger]), **({"kept: ": kept} if kept else {})}
    for told, count in sorted(counted.items()):
        status, _, reason = told.partition(": ")
        lines.append(f"| {status} | {reason} | {count} |")
    lines += [
        "",
        f"`{ledger_files}`, sorted by key, has one row per clip, and one per source that yields none, with every "
        "score, the decision and its reason.",
        "",
        "## Rows",
        "",
        _COLUMNS,
        "## Reading",
        "",
        "Plain Parquet (zstd): `pyarrow.parquet.read_table(FILE)`, `pandas.read_parquet(FILE)`, DuckDB "
        "`SELECT * FROM 'data/train/*/*.parquet'`, or "
        '`datasets.load_dataset("parquet", data_files="data/train/*/*.parquet")`. '
        "`manifest.json` lists every shard with its rows, bytes and SHA-256, and the config and stage hashes behind "
        "it.",
        "",
    ]
    return "\n".join(lines)
