"""Sources taken out of a dataset for good, by the hash of their content, whatever name they come back under."""

from collections.abc import Iterable

from pipelines import storage

_FILE = "removed.json"


def read_removed(dataset: str) -> list[str]:
    """Content hashes of the removed sources, sorted."""
    uri = storage.join(dataset, _FILE)
    return sorted(storage.read_json(uri)["source_ids"]) if storage.exists(uri) else []


def write_removed(dataset: str, source_ids: Iterable[str]) -> None:
    """Replace the list of the removed sources; the caller holds the dataset's lock."""
    storage.write_json_atomic(storage.join(dataset, _FILE), {"source_ids": sorted(source_ids)})
