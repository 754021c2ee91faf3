"""Sources are taken out of a dataset by a person, and put back: `lumos data remove | restore`."""

from collections import defaultdict

from pipelines.data.keys import is_source_id
from pipelines.data.snapshot.read import open_snapshots
from pipelines.data.snapshot.removals import read_removed, write_removed
from pipelines.data.upkeep.tables import snapshots_of
from pipelines.errors import UserError
from pipelines.storage.lock import check_lock, dataset_lock

_NAMED = 3  # removed sources that an error names


def remove_sources(dataset: str, names: list[str]) -> list[str]:
    """Take sources out of all snapshots to come; those already published stay as they are.

    Names are paths as a ledger has them, or content hashes (``source_id``); returns the content hashes.

    Raises:
        UserError: if there is no such dataset, no ledger knows a path, or a run is using the dataset; nothing was
            removed.
    """
    snapshots = snapshots_of(dataset)
    with dataset_lock(dataset):
        found = _named(dataset, snapshots, names)
        check_lock(dataset)
        write_removed(dataset, found.union(read_removed(dataset)))
    return sorted(found)


def restore_sources(dataset: str, names: list[str]) -> list[str]:
    """Undo ``remove_sources``: the sources are in the snapshots to come again, if they are among the run's.

    Raises:
        UserError: if there is no such dataset, no ledger knows a path, a source was not removed, or a run is using the
            dataset; nothing was restored.
    """
    snapshots = snapshots_of(dataset)
    with dataset_lock(dataset):
        removed = set(read_removed(dataset))
        found: set[str] = set()
        for name in names:
            ids = _named(dataset, snapshots, [name]) & removed
            if not ids:
                raise UserError(f"{name!r} is not removed from {dataset}; there are removed: {_told(removed)}")
            found |= ids
        check_lock(dataset)
        write_removed(dataset, removed - found)
    return sorted(found)


def _named(dataset: str, snapshots: list[str], names: list[str]) -> set[str]:
    """Content hashes of sources that are named by them, or by their paths."""
    if all(map(is_source_id, names)):
        return set(names)
    known: dict[str, set[str]] = defaultdict(set)  # by path, which may have had several contents
    for snapshot in open_snapshots(dataset, snapshots):
        for piece in snapshot.ledger_pieces(["path", "source_id"]):
            for row in piece.group_by(["path", "source_id"]).aggregate([]).to_pylist():
                known[row["path"]] |= {row["source_id"]} - {None}
    found: set[str] = set()
    for name in names:
        ids = {name} if is_source_id(name) else known.get(name)
        if not ids:
            raise UserError(
                f"no snapshot of {dataset} has a source {name!r}; name a path as its ledger has it, or a source_id"
            )
        found |= ids
    return found


def _told(removed: set[str]) -> str:
    """The removed sources, as an error names them."""
    first = ", ".join(sorted(removed)[:_NAMED])
    return f"{first} and {len(removed) - _NAMED} more" if len(removed) > _NAMED else first or "none"
