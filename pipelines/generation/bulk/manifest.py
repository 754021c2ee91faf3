"""The manifest of a folder of videos: one JSON line per file, with what made it and its checksum."""

import hashlib
import json
import time
from typing import Any

from pipelines import storage
from pipelines.errors import UserError

MANIFEST_FILE = "manifest.jsonl"
_SAVE_INTERVAL_S = 5.0


class Manifest:
    """The videos a folder holds, by file name.

    A video is written first and its row after it, so a row always stands for a whole file. Rows are saved every few
    seconds, as whole manifests, which object stores can take too; a killed run loses the rows since then and makes
    those videos again, to the same bytes.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.uri = storage.join(folder, MANIFEST_FILE)
        self.rows: dict[str, dict[str, Any]] = {}
        self._saved_at = 0.0

    @classmethod
    def open(cls, folder: str) -> "Manifest":
        """The manifest of a folder, empty where there is none yet; a ``UserError`` if it is damaged."""
        manifest = cls(folder)
        try:
            if not storage.exists(manifest.uri):
                return manifest
            lines = storage.read_bytes(manifest.uri).decode("utf-8").split("\n")  # splitlines() would cut prompts too
            rows = [json.loads(line) for line in lines if line.strip()]
            manifest.rows = {row["path"]: row for row in rows}
        except (NotADirectoryError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"output: {manifest.uri} is no manifest of videos ({error}); name another folder, or remove it to make "
                "all videos again"
            ) from error
        return manifest

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether the folder has the video that a row describes (prompt, seed, config), with its bytes intact."""
        known = self.rows.get(row["path"])
        if known is None or any(known.get(key) != value for key, value in row.items()):
            return False
        try:
            return storage.sha256_file(storage.join(self.folder, row["path"])) == known.get("sha256")
        except FileNotFoundError:
            return False

    def add(self, row: dict[str, Any], data: bytes) -> None:
        """Write a video, then note its row with size and checksum."""
        storage.write_bytes_atomic(storage.join(self.folder, row["path"]), data)
        self.rows[row["path"]] = {**row, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if time.monotonic() - self._saved_at > _SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Write the manifest, sorted by file name, so that equal runs end with equal manifests."""
        lines = [json.dumps(row, ensure_ascii=False) for _, row in sorted(self.rows.items())]
        storage.write_bytes_atomic(self.uri, "".join(f"{line}\n" for line in lines).encode())
        self._saved_at = time.monotonic()
