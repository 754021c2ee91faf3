"""Sources taken out of a dataset for good, by the hash of their content, whatever name they come back under."""

from collections import defaultdict

from pipelines import storage
from pipelines.data.keys import is_source_id
from pipelines.data.snapshot.read import list_snapshots, open_snapshots
from pipelines.errors import UserError
from pipelines.storage.lock import check_lock, dataset_lock

_FILE = "removed.json"


def read_removed(dataset: str) -> list[str]:
    """Content hashes of the removed sources, sorted."""
    uri = storage.join(dataset, _FILE)
    return sorted(storage.read_json(uri)["source_ids"]) if storage.exists(uri) else []


def remove_sources(dataset: str, names: list[str]) -> list[str]:
    """Take sources out of all snapshots to come; those already published stay as they are.

    Names are paths as a ledger has them, or content hashes (``source_id``); returns the content hashes.

    Raises:
        UserError: if no ledger knows a path, or a run is using the dataset; nothing was removed.
    """
    with dataset_lock(dataset):
        found = _named(dataset, names)
        check_lock(dataset)
        _write(dataset, found.union(read_removed(dataset)))
    return sorted(found)


def restore_sources(dataset: str, names: list[str]) -> list[str]:
    """Undo ``remove_sources``: the sources are in the snapshots to come again, if they are among the run's.

    Raises:
        UserError: if no ledger knows a path, a source was not removed, or a run is using the dataset; nothing was
            restored.
    """
    with dataset_lock(dataset):
        removed = set(read_removed(dataset))
        found: set[str] = set()
        for name in names:
            ids = _named(dataset, [name]) & removed
            if not ids:
                raise UserError(
                    f"{name!r} is not removed from {dataset}; there are removed: {', '.join(sorted(removed)) or 'none'}"
                )
            found |= ids
        check_lock(dataset)
        _write(dataset, removed - found)
    return sorted(found)


def _write(dataset: str, source_ids: set[str]) -> None:
    storage.write_json_atomic(storage.join(dataset, _FILE), {"source_ids": sorted(source_ids)})


def _named(dataset: str, names: list[str]) -> set[str]:
    """Content hashes of sources that are named by them, or by their paths."""
    if all(map(is_source_id, names)):
        return set(names)
    known: dict[str, set[str]] = defaultdict(set)  # by path, which may have had several contents
    for snapshot in open_snapshots(dataset, list_snapshots(dataset)):
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
