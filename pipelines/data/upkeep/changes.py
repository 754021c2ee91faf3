"""Two snapshots compared: which clips came and which went, and why, by what either ledger says of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.reasons import reason_classes
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.snapshot.schemas import STATUSES
from pipelines.data.stage.stage import Row
from pipelines.data.upkeep.contact import CLIPS_EACH, Sheet, Tile, hash_strings, name_originals, tiles_of
from pipelines.data.upkeep.stills import Shown, decode_frames
from pipelines.errors import UserError
from pipelines.pages.render import check_writable, write_page

_COLUMNS = ["key", "source_id", "path", "start_s", "end_s", "status", "reason"]
_ABSENT = "not there"  # what is said of a clip that a ledger does not know


@dataclass(frozen=True)
class Change:
    """Clips that are kept in one of two snapshots, for one reason in the other."""

    came: bool  # kept in the later one; else in the earlier one
    why: str  # status and class of reason in the other one
    clips: int
    seconds: float
    sheet: Sheet  # some of them

    def __str__(self) -> str:
        return f"{'came, earlier' if self.came else 'went, now'} {self.why}"


def write_changes(path: Path, before: Snapshot, after: Snapshot, *, frames: bool = True) -> str:
    """Write a page that compares two snapshots; tells in a few words what changed.

    Raises:
        UserError: if the file cannot be written, or both are the same snapshot.
    """
    if before.digest == after.digest:
        raise UserError(
            f"{before.uri} and {after.uri} are the same snapshot: name an earlier and a later one, such as the folders "
            "below snapshots/"
        )
    check_writable(path)
    ledgers = [snapshot.read_ledger(_COLUMNS) for snapshot in (before, after)]
    changes = [*find_changes(ledgers[0], ledgers[1], came=True), *find_changes(ledgers[0], ledgers[1], came=False)]
    shown: dict[str, Tile] = {}
    for snapshot, is_after in ((before, False), (after, True)):
        rows = [row for change in changes if change.came == is_after for row in change.sheet.rows]
        names = name_originals(ledgers[0 if is_after else 1], [row["reason"] for row in rows])
        shown |= tiles_of(snapshot, rows, decode_frames if frames else _no_frames, names)
    kept = [pc.sum(pc.equal(ledger["status"], "kept")).as_py() or 0 for ledger in ledgers]
    came, went = (sum(change.clips for change in changes if change.came == which) for which in (True, False))
    write_page(
        path,
        "data_changes.html.j2",
        before=before.manifest,
        after=after.manifest,
        statuses=STATUSES,
        came=came,
        went=went,
        stayed=kept[0] - went,
        settings=changed_settings(before.manifest.created_from, after.manifest.created_from),
        changes=changes,
        examples=[shown[change.sheet.rows[0]["key"]].row for change in changes],
        frames=frames,
        tiles=shown,
    )
    return f"{came} clips came, {went} went, {kept[0] - went} stayed"


def _no_frames(_: Snapshot, __: Sequence[Row]) -> dict[str, Shown]:
    return {}


def find_changes(before: pa.Table, after: pa.Table, *, came: bool) -> list[Change]:
    """Clips kept in one of two ledgers alone, by what the other says of them; those of most clips first."""
    here, there = (after, before) if came else (before, after)
    kept = here.filter(pc.equal(here["status"], "kept"))
    places = pc.index_in(kept["key"], there["key"].combine_chunks())
    status = pc.fill_null(there["status"].take(places), _ABSENT)
    reason = pc.fill_null(there["reason"].take(places), "")
    why = pc.utf8_rtrim(pc.binary_join_element_wise(status, reason_classes(_chunked(reason)), ": "), ": ")
    rows = kept.drop_columns(["reason"]).append_column("reason", reason).append_column("why", why)
    rows = rows.append_column("hash", pa.array(hash_strings(rows["key"])))
    rows = rows.append_column("seconds", pc.subtract(rows["end_s"], rows["start_s"]))
    rows = rows.filter(pc.not_equal(status, "kept")).sort_by("hash")
    found = []
    counts = rows.group_by("why").aggregate([([], "count_all"), ("seconds", "sum")])
    for count in counts.sort_by([("count_all", "descending"), ("why", "ascending")]).to_pylist():
        some = rows.filter(pc.equal(rows["why"], count["why"])).slice(0, CLIPS_EACH).to_pylist()
        sheet = Sheet("came" if came else "went", count["why"], some, count["count_all"])
        found.append(Change(came, count["why"], count["count_all"], count["seconds_sum"] or 0.0, sheet))
    return found


def _chunked(column: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted keys of what snapshots were made from whose values differ, with both; None where one lacks the key."""
    old, new = (dict(_flat(made)) for made in (before, after))
    return [(key, old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)]


def _flat(values: Mapping[str, Any], prefix: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*prefix, key))
        else:
            yield ".".join((*prefix, key)), value
