"""Mending a dataset: stage files that cannot be used are dropped, damaged shards are made again, byte for byte.

A shard is a pure function of what the stages hold, so it can be written anew from them. It counts as restored only if
its SHA-256 is the manifest's.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, product
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.data.captions.choose import caption_fault, unique_captions
from pipelines.data.captions.registry import captioner_named
from pipelines.data.keys import source_of
from pipelines.data.reasons import parse_duplicate
from pipelines.data.settings import CaptionConfig
from pipelines.data.snapshot.card import dataset_card
from pipelines.data.snapshot.read import Bucket, Snapshot, open_snapshots
from pipelines.data.snapshot.shards import PUBLISHED_CLIPS, deal_shards, shard_bytes
from pipelines.data.snapshot.write import draw_split
from pipelines.data.stage.stage import Row
from pipelines.data.stage.table import STAGES, table_parts
from pipelines.data.steps.duplicates import linked_groups
from pipelines.data.upkeep.tables import list_tables, snapshot_rows, snapshots_of
from pipelines.parquet import read_parquet
from pipelines.storage.lock import check_lock, dataset_lock

_TRIES = 64  # versions of a shard that are compared with its hash


@dataclass(kw_only=True)
class Repair:
    """What was done."""

    # stage files that could not be used; the next run computes what they held
    dropped: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)  # files of snapshots, written anew
    beyond: dict[str, str] = field(default_factory=dict)  # files of snapshots that stay damaged, and why

    def __str__(self) -> str:
        lines = [f"dropped {path}: the next `lumos curate` computes it again" for path in self.dropped]
        lines += [f"restored {path}" for path in self.restored]
        lines += [f"cannot restore {path}: {why}" for path, why in self.beyond.items()]
        return "\n".join(lines or ["nothing to repair"])


def repair_dataset(dataset: str) -> Repair:
    """Drop unusable stage files and restore what is damaged or missing of all snapshots.

    A ``UserError`` if there is no such dataset, a run is using it, or a captioner of a plugin is not there.
    """
    snapshots = open_snapshots(dataset, snapshots_of(dataset))
    for name in chain.from_iterable(map(_captioners, snapshots)):
        captioner_named(name)  # one of a plugin may not be there
    done = Repair()
    with dataset_lock(dataset):
        for stage, name in list_tables(dataset):
            for part in table_parts(storage.join(dataset, STAGES, stage, name)):
                if not _usable(part):
                    check_lock(dataset)
                    storage.remove(part)
                    done.dropped.append(part.removeprefix(dataset).lstrip("/"))
        for snapshot in snapshots:
            _repair_snapshot(dataset, snapshot, done)
    return done


def _usable(part: str) -> bool:
    """Whether a stage's file can be read, and its codes are those it had when it was written."""
    data = storage.read_bytes(part)  # what cannot be fetched just now is not damaged
    try:
        table = read_parquet(data)
    except (pa.ArrowException, OSError):
        return False
    if "codes_sha256" not in table.column_names:
        return True
    whole = table.filter(pc.is_valid(table["codes_sha256"]))
    return all(
        hashlib.sha256(codes.values.to_numpy().astype("<u2").tobytes()).hexdigest() == digest
        for codes, digest in zip(whole["codes"], whole["codes_sha256"].to_pylist(), strict=True)
    )


def _intact(snapshot: Snapshot, path: str, sha256: str) -> bytes | None:
    try:
        data = storage.read_bytes(storage.join(snapshot.uri, path))
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _repair_snapshot(dataset: str, snapshot: Snapshot, done: Repair) -> None:
    name, manifest = snapshot.manifest.snapshot_id, snapshot.manifest
    found_parts = {part.path: _intact(snapshot, part.path, part.sha256) for part in manifest.ledger.parts}
    lost = [path for path, part_data in found_parts.items() if part_data is None]
    if lost:
        for path in lost:
            again = "give the `lumos curate` that made it again"
            if manifest.schema_version == 1:
                again = "copy it back; `lumos curate` publishes a new snapshot"
            done.beyond[f"{name}/{path}"] = f"{again}, or delete the snapshot"
        return
    ledger = snapshot.read_ledger()
    if not storage.exists(storage.join(snapshot.uri, "README.md")):
        check_lock(dataset)
        card = dataset_card(manifest, ledger)
        storage.write_bytes_atomic(storage.join(snapshot.uri, "README.md"), card.encode())
        done.restored.append(f"{name}/README.md")
    damaged: list[tuple[Bucket, int]] = []
    found: dict[str, list[str]] = {}  # clips of the intact shards, by path
    for bucket in manifest.buckets:
        for number, shard in enumerate(bucket.shards):
            data = _intact(snapshot, shard.path, shard.sha256)
            if data is None:
                damaged.append((bucket, number))
            else:
                found[shard.path] = read_parquet(data, ["clip_id"])["clip_id"].to_pylist()
    if damaged:
        rebuild = _Rebuild(snapshot, ledger, found)
        check_lock(dataset)
        rebuild.restore(damaged, done)


class _Rebuild:
    """Makes shards of one snapshot again from the stage tables."""

    def __init__(self, snapshot: Snapshot, ledger: pa.Table, found: dict[str, list[str]]) -> None:
        self.snapshot = snapshot
        self.found = found
        self.created_from = snapshot.manifest.created_from
        elsewhere = {clip for clips in found.values() for clip in clips}
        rows = ledger.select(["key", "source_id", "status", "reason"]).to_pylist()
        self.motion = dict(
            zip(ledger["key"].to_pylist(), pc.struct_field(ledger["scores"], "motion").to_pylist(), strict=True)
        )
        duplicates = ((row["source_id"], parse_duplicate(row["reason"])) for row in rows)
        near = [(source_id, source_of(of[1])) for source_id, of in duplicates if of and of[0] == "near"]
        self.groups = linked_groups(near)
        self.missing = {
            row["key"]: row["source_id"] for row in rows if row["status"] == "kept" and row["key"] not in elsewhere
        }
        self.tokens = self._stage_rows("tokens")
        self.rules = CaptionConfig(**_rules(self.created_from["config"]["captions"]))
        self.captions = [self._stage_rows(captioner_named(name).stage_name) for name in _captioners(snapshot)]

    def restore(self, damaged: Sequence[tuple[Bucket, int]], done: Repair) -> None:
        """Write the shards that come out as the manifest has them."""
        for bucket, number in damaged:
            shard, name = bucket.shards[number], self.snapshot.manifest.snapshot_id
            tries = islice(self._versions(bucket, number), _TRIES)
            data = next((data for data in tries if hashlib.sha256(data).hexdigest() == shard.sha256), None)
            if data is not None:
                storage.write_bytes_atomic(storage.join(self.snapshot.uri, shard.path), data)
                done.restored.append(f"{name}/{shard.path}")
            else:
                done.beyond[f"{name}/{shard.path}"] = (
                    "it does not come out of the stages as it was; give the same `lumos curate` again, then repair, or "
                    "publish anew"
                )

    def _stage_rows(self, stage: str) -> dict[str, list[Row]]:
        """By clip: rows of a stage, of the clips that are missing."""
        rows: dict[str, list[Row]] = defaultdict(list)
        for table in snapshot_rows(self.snapshot, stage, "key", self.missing):
            plain = table.drop_columns(["codes"]) if "codes" in table.column_names else table
            for place, row in enumerate(plain.to_pylist()):
                # As an array: lists of Python's numbers weigh many times more.
                codes = {"codes": table["codes"][place].values} if plain is not table else {}
                rows[row["key"]].append(row | codes)
        return rows

    def _versions(self, bucket: Bucket, number: int) -> Iterator[bytes]:
        """What the shard may have been: where a clip was captioned anew, its stage holds several versions."""
        clips = {key: row for key in self.missing if (row := self._clip(key, bucket)) is not None}
        present = [clip for shard in bucket.shards for clip in self.found.get(shard.path, ())]
        ids = sorted([*present, *clips])
        if len(ids) != bucket.rows:
            return
        seed = self.created_from["publish"]["seed"]
        members = [ids[index] for index in deal_shards(ids, len(bucket.shards), seed=seed)[number]]
        if not clips.keys() >= set(members):
            return
        codes = pa.array([clips[key]["codes"].to_numpy() for key in members], pa.list_(pa.uint16()))
        plain = {key: {name: value for name, value in clips[key].items() if name != "codes"} for key in members}
        for captions in product(*(self._captions_of(key) for key in members)):
            rows = [plain[key] | {"captions": own} for key, own in zip(members, captions, strict=True)]
            table = pa.Table.from_pylist(rows, schema=PUBLISHED_CLIPS)
            yield shard_bytes(table, codes, row_group_rows=bucket.row_group_rows)

    def _clip(self, key: str, bucket: Bucket) -> Row | None:
        """The row of a clip, if it belongs to the bucket, without its captions."""
        publish, source_id = self.created_from["publish"], self.missing[key]
        split = draw_split(self.groups.get(source_id, source_id), seed=publish["seed"], val_share=publish["val_share"])
        shape = (bucket.t, bucket.h, bucket.w)
        made = [row for row in self.tokens[key] if (row["t"], row["h"], row["w"]) == shape]
        if split != bucket.split or not made:
            return None
        names = ("fps", "t", "h", "w", "codes_sha256", "codes")
        own = {"clip_id": key, "source_id": source_id, "split": split, "motion": self.motion[key]}
        return own | {name: made[0][name] for name in names}

    def _captions_of(self, key: str) -> list[list[dict[str, str]]]:
        """What the captions of a clip may have been."""
        versions: list[list[dict[str, str]]] = []
        for rows in product(*(by_clip[key] or [{"captions": []}] for by_clip in self.captions)):
            offered = unique_captions([caption for row in rows for caption in row["captions"]])
            fit = [caption for caption in offered if caption_fault(caption["text"], self.rules) is None]
            versions += [fit] if fit not in versions else []
        return versions


def _captioners(snapshot: Snapshot) -> list[str]:
    names: list[str] = snapshot.manifest.created_from["config"]["captions"].get("captioners", ["given"])
    return names


def _rules(recorded: dict[str, Any]) -> dict[str, Any]:
    """What decides which captions are used, of the config in a manifest; older ones lack some of it."""
    rules = {name: recorded[name] for name in ("min_words", "max_words", "language_certainty") if name in recorded}
    return rules | {"languages": tuple(recorded.get("languages", ()))}
