"""The rows of a ledger as the report's script takes them, to filter and sort and to decide about."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.keys import is_clip_key
from pipelines.data.reasons import OVERRIDE, parse_override, with_names
from pipelines.data.scores import SCORES
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.snapshot.schemas import STATUSES
from pipelines.data.stage.columns import take
from pipelines.data.stage.stage import Row
from pipelines.data.upkeep.contact import hash_strings, name_originals

MOST_ROWS = 20_000  # that a page holds, a few megabytes; of more, some are drawn
_COLUMNS = ["key", "source_id", "path", "start_s", "end_s", "status", "reason", "scores"]
_DIGITS = 4  # of scores


def browse_rows(snapshot: Snapshot) -> dict[str, Any]:
    """What the script is given: sources, scores, and a row of each clip and file, in the order of paths and times."""
    drawn = _draw(snapshot)
    columns = ["key", "source_id", "path", "start_s", "end_s"]
    names = name_originals(snapshot.read_ledger(columns), drawn["reason"].to_pylist())
    rows = drawn.to_pylist()
    scores = [name for name in SCORES if any((row["scores"] or {}).get(name) is not None for row in rows)]
    sources = {(row["path"], row["source_id"]): 0 for row in rows}
    sources = {source: number for number, source in enumerate(sources)}
    listed = []
    for row in rows:
        values = row["scores"] or {}
        listed.append(
            [
                sources[row["path"], row["source_id"]],
                row["key"].partition(":")[2] if is_clip_key(row["key"]) else "",  # as the key ends
                STATUSES.index(row["status"]),
                with_names(row["reason"], names),
                _span(row),
                [_short(values.get(name)) for name in scores],
                parse_override(row["reason"], kept=row["status"] == "kept"),
            ]
        )
    return {
        "snapshot": snapshot.manifest.snapshot_id,
        "total": snapshot.manifest.ledger.rows,
        "statuses": STATUSES,
        "sources": list(sources),
        "scores": [{"name": name, "unit": SCORES[name].unit, "about": SCORES[name].about} for name in scores],
        "rows": listed,
    }


def _draw(snapshot: Snapshot) -> pa.Table:
    """All rows of a ledger, by path and time; of very many those decided about by hand, and those of lowest hashes."""
    rows = snapshot.read_ledger(["key", "reason"])
    by_hand = pc.starts_with(rows["reason"], OVERRIDE).to_numpy()
    chosen = np.zeros(rows.num_rows, bool)
    chosen[np.lexsort((hash_strings(rows["key"]), ~by_hand))[:MOST_ROWS]] = True
    pieces, first = [], 0
    for piece in snapshot.ledger_pieces(_COLUMNS):
        pieces.append(piece.filter(pa.array(chosen[first : first + piece.num_rows])))
        first += piece.num_rows
    if not pieces:
        return snapshot.read_ledger(_COLUMNS)
    table = pa.concat_tables(pieces)
    order = pc.sort_indices(table, sort_keys=[("path", "ascending"), ("start_s", "ascending")])
    return take(table, order.to_numpy().astype(np.int64))


def _span(row: Row) -> list[float] | None:
    """Begin and end, s: the same for an image; None for a file that has no clips."""
    if row["end_s"] is None:
        return None
    is_image = bool((row["scores"] or {}).get("image"))
    return [round(row["start_s"], 2), round(row["start_s" if is_image else "end_s"], 2)]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
