"""The manifest of a bulk run's folder: a JSON line per video, with what made it."""

import hashlib
import json
import time
from typing import Any

from pipelines import storage
from pipelines.errors import UserError
from pipelines.storage.lock import check_lock

MANIFEST_FILE = "manifest.jsonl"
_SAVE_INTERVAL_S = 5.0


class Manifest:
    """The videos a folder holds, by file name; a ``UserError`` if what says so is damaged.

    A video is written first and its row after it, so a row always stands for a whole file. Rows are saved every few
    seconds, as whole manifests, which object stores can take too; a killed run loses the rows since then and makes
    those videos again, to the same bytes.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.uri = folder, storage.join(folder, MANIFEST_FILE)
        self.rows: dict[str, dict[str, Any]] = {}
        self._saved_at = 0.0
        try:
            if storage.exists(self.uri):
                lines = storage.read_bytes(self.uri).decode("utf-8").split("\n")  # splitlines() would cut prompts too
                rows = [json.loads(line) for line in lines if line.strip()]
                self.rows = {row["path"]: row for row in rows}
        except (NotADirectoryError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"output: {self.uri} is no manifest of videos ({error}); name another folder, or remove it to make all "
                "videos again"
            ) from error

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether the folder has the video that a row describes (prompt, seed, config), with its bytes intact."""
        known = self.rows.get(row["path"])
        if known is None or any(known.get(key) != value for key, value in row.items()):
            return False
        try:
            sums = {storage.sha256_file(storage.join(self.folder, path)) for path in _paths(row)}
        except FileNotFoundError:
            return False
        return sums == {known.get("sha256")}

    def add(self, row: dict[str, Any], data: bytes) -> None:
        """Write a video, then note its row with size and checksum."""
        for path in _paths(row):
            storage.write_bytes_atomic(storage.join(self.folder, path), data)
        self.rows[row["path"]] = {**row, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if time.monotonic() - self._saved_at > _SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Write the manifest, sorted by file name, so that equal runs end with equal manifests."""
        check_lock(self.folder)
        lines = [json.dumps(row, ensure_ascii=False) for _, row in sorted(self.rows.items())]
        storage.write_bytes_atomic(self.uri, "".join(f"{line}\n" for line in lines).encode())
        self._saved_at = time.monotonic()


def _paths(row: dict[str, Any]) -> list[str]:
    """Where the video of a row lies: its file, and copies in other folders of a benchmark's layout."""
    return [row["path"], *row.get("copies", ())]
