"""Curation from end to end: sources, split and scores, decisions, captions, tokens, a published snapshot."""

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.cluster import connect
from pipelines.data.captions import CAPTION_INPUTS, CaptionSource, caption_key, captions_stage, find_captions
from pipelines.data.codes import CodeReader
from pipelines.data.config import CurateConfig
from pipelines.data.decide import decide
from pipelines.data.duplicates import find_near_duplicates, linked_groups, unpack_fingerprint
from pipelines.data.ledger import Verdicts, build_ledger, count_reasons, removed_rows
from pipelines.data.lock import dataset_lock
from pipelines.data.publish import PUBLISHED_CLIPS, SnapshotContent, draw_split, write_snapshot
from pipelines.data.removal import read_removed
from pipelines.data.runner import Row, StageTable, run_stage
from pipelines.data.snapshot import Snapshot, TokenizerInfo
from pipelines.data.sources import first_paths, list_sources, sources_stage
from pipelines.data.split import split_stage
from pipelines.data.tokens import REQUEST_COLUMNS, TOKEN_INPUTS, load_tokenizer_info, plan_shape, tokens_stage
from pipelines.errors import JobError, UserError


@dataclass(frozen=True, kw_only=True)
class CurateResult:
    """What a run published, and what it took.

    Attributes:
        snapshot_uri: The snapshot.
        snapshot_id: Its name.
        counts: Ledger rows by status.
        reasons: Ledger rows not kept by "status: class of reason", most frequent first.
        uncaptioned: Kept clips that have no caption.
        rows: Kept clips by split.
        tokens: Their codes by split.
        computed: By stage, inputs that this run computed; what was there before does not count.
    """

    snapshot_uri: str
    snapshot_id: str
    counts: dict[str, int]
    reasons: dict[str, int]
    uncaptioned: int
    rows: dict[str, int]
    tokens: dict[str, int]
    computed: dict[str, int]

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [f"snapshot {self.snapshot_uri}", "  ".join(f"{name} {count}" for name, count in self.counts.items())]
        lines += [f"  {count:6d}  {reason}" for reason, count in self.reasons.items()]
        sizes = ", ".join(f"{name} {self.rows[name]} clips ({self.tokens[name]} tokens)" for name in self.rows)
        lines.append(f"published: {sizes}")
        if self.uncaptioned:
            lines.append(
                f"{self.uncaptioned} kept clips have no caption: name a table in captions.file, or put a .txt file "
                "beside each video"
            )
        return "\n".join(lines)


def curate(config: CurateConfig) -> CurateResult:
    """Run what is not yet done of a curation, and publish.

    Raises:
        UserError: if sources, captions, tokenizer or dataset are not usable; nothing was begun.
        JobError: if a stage failed. What was done is kept; the same call continues.
    """
    listing = list_sources(config.source)
    captions = find_captions(config.captions, config.source, listing)
    if config.captions.require and not captions.texts:
        raise UserError(
            f"captions.require is true, but there are no captions for {config.source.path}: name a table in "
            "captions.file, put a .txt file beside each video, or set captions.require=false"
        )
    try:
        tokenizer = load_tokenizer_info(config.tokens.tokenizer)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"tokens.tokenizer: {error}") from error
    with dataset_lock(config.dataset), connect():
        return _Curation(config, captions, tokenizer).run(listing)


class _Curation:
    """One run; each step takes tables and leaves tables."""

    def __init__(self, config: CurateConfig, captions: CaptionSource, tokenizer: TokenizerInfo) -> None:
        self.config = config
        self.captions = captions
        self.tokenizer = tokenizer
        split = split_stage(config.split, config.decode, config.resources)
        stages = (sources_stage(), split, captions_stage(), tokens_stage(config, tokenizer))
        self.stages = {stage.name: stage for stage in stages}
        self.computed: dict[str, int] = {}

    def run(self, listing: pa.Table) -> CurateResult:
        sources, removed = self._without_removed(self._hash(listing))
        first = first_paths(sources)
        clips, failed = self._split(first)
        self._check_failures(sources, failed)
        places = pc.index_in(clips["work_key"], first["source_id"].combine_chunks())
        uris = first["uri"].take(places).to_pylist()

        rows = clips.to_pylist()
        verdicts = self._decide(rows)
        groups = self._drop_near_duplicates(rows, verdicts)
        captions = self._caption(rows, uris, verdicts)
        tokens = self._tokenize(rows, uris, verdicts)

        ledger = build_ledger(
            sources, first, clips, failed, verdicts, {name: stage.hash for name, stage in self.stages.items()}
        )
        ledger = pa.concat_tables([ledger, removed_rows(removed)])
        content = self._content(rows, verdicts, captions, tokens, ledger, groups)
        snapshot = write_snapshot(self.config.dataset, content, self.config.publish)
        return self._result(snapshot, ledger, content.clips)

    def _compute(self, name: str, inputs: pa.Table) -> StageTable:
        """Bring a stage's table up to date with its inputs."""
        stage, config = self.stages[name], self.config
        self.computed[name] = run_stage(
            stage, inputs, dataset=config.dataset, workers=config.resources.workers, progress=config.progress
        )
        return StageTable(config.dataset, stage)

    def _hash(self, listing: pa.Table) -> pa.Table:
        """The listing with the content hash of each file, or why it has none."""
        hashed = self._compute("sources", listing).read()
        places = pc.index_in(listing["work_key"], hashed["work_key"].combine_chunks())
        for name in ("source_id", "error"):
            listing = listing.append_column(name, hashed[name].take(places))
        return listing

    def _without_removed(self, sources: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The sources that may be used, and those that were taken out of the dataset."""
        flags = pc.is_in(sources["source_id"], pa.array(read_removed(self.config.dataset), pa.string()))
        return sources.filter(pc.invert(flags)), sources.filter(flags)

    def _split(self, first: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Clips of the sources, and rows of the sources that have none."""
        inputs = first.select(["source_id", "uri"]).rename_columns(["work_key", "uri"])
        rows = self._compute("split", inputs).read()
        rows = rows.filter(pc.is_in(rows["work_key"], first["source_id"].combine_chunks()))
        rows = rows.sort_by([("work_key", "ascending"), ("start_s", "ascending")])
        return rows.filter(pc.is_valid(rows["key"])), rows.filter(pc.is_null(rows["key"]))

    def _check_failures(self, sources: pa.Table, failed: pa.Table) -> None:
        reasons = [reason for reason in sources["error"].to_pylist() if reason] + failed["error"].to_pylist()
        allowed = self.config.resources.max_failed_share
        if len(reasons) > allowed * sources.num_rows:
            raise JobError(
                f"{len(reasons)} of {sources.num_rows} sources failed, more than resources.max_failed_share = "
                f"{allowed} allows; the first: {reasons[0]}. Something else than the videos may be wrong; if not, "
                "raise the share and give the same command again"
            )

    def _decide(self, rows: list[Row]) -> Verdicts:
        """Verdicts from scores alone; kept clips get the ``shape`` that is to be encoded."""
        tokens = self.config.tokens
        decisions = [decide(row["scores"], self.config.thresholds) for row in rows]
        verdicts = Verdicts([status for status, _ in decisions], [reason for _, reason in decisions])
        for index in verdicts.kept:
            duration, aspect = rows[index]["scores"]["duration"], rows[index]["scores"]["aspect"]
            shape = plan_shape(duration, aspect, tokens)
            if shape is None:
                needed = min(tokens.num_frames)
                have = int(duration * tokens.fps + 0.01)
                verdicts.set(index, "rejected", f"frames {have} < {needed} at {tokens.fps:g} fps")
            rows[index]["shape"] = shape
        return verdicts

    def _drop_near_duplicates(self, rows: list[Row], verdicts: Verdicts) -> dict[str, str]:
        """Mark them; returns the group of each source that has some, by which its split is drawn."""
        threshold = self.config.near_duplicates
        if threshold is None:
            return {}
        kept = verdicts.kept
        keys = [rows[index]["key"] for index in kept]
        prints = [unpack_fingerprint(rows[index]["fingerprint"]) for index in kept]
        pairs = []
        for place, duplicate in find_near_duplicates(keys, prints, threshold).items():
            index, of = kept[place], kept[duplicate.of]
            verdicts.set(index, "duplicate", f"near: of {rows[of]['key']} (cosine {duplicate.cosine:.3f})")
            pairs.append((rows[index]["work_key"], rows[of]["work_key"]))
        return linked_groups(pairs)

    def _caption(self, rows: list[Row], uris: list[str], verdicts: Verdicts) -> dict[int, list[dict[str, str]]]:
        """Captions of the clips kept so far, by index."""
        captioner = self.captions.captioner
        kept = verdicts.kept
        texts = [self.captions.texts.get(uris[index], ()) for index in kept]
        inputs = {
            "work_key": [caption_key(rows[i]["key"], text, captioner) for i, text in zip(kept, texts, strict=True)],
            "key": [rows[i]["key"] for i in kept],
            "texts": texts,
            "captioner": [captioner] * len(kept),
        }
        table = self._compute("captions", pa.table(inputs, schema=CAPTION_INPUTS)).read(["work_key", "captions"])
        found = dict(zip(table["work_key"].to_pylist(), table["captions"].to_pylist(), strict=True))
        captions = {index: found[key] for index, key in zip(kept, inputs["work_key"], strict=True)}
        verdicts.mark("captions", kept)
        if self.config.captions.require:
            for index in kept:
                if not captions[index]:
                    verdicts.set(index, "rejected", "caption: none")
        return captions

    def _tokenize(self, rows: list[Row], uris: list[str], verdicts: Verdicts) -> dict[int, Row]:
        """What the token stage made of the clips kept so far, by index, without the codes themselves."""
        kept = verdicts.kept
        inputs = []
        for index in kept:
            row, shape = rows[index], rows[index]["shape"]
            request = {name: row[name] for name in REQUEST_COLUMNS}
            work_key = shape.work_key(row["key"], row["picture"])
            inputs.append({"work_key": work_key, "key": row["key"], "uri": uris[index], **asdict(shape), **request})
        table = self._compute("tokens", pa.Table.from_pylist(inputs, schema=TOKEN_INPUTS))
        done = table.read(["work_key", "fps", "t", "h", "w", "codes_sha256", "error"]).to_pylist()
        by_key = {row["work_key"]: row for row in done}
        tokens = {index: by_key[row["work_key"]] for index, row in zip(kept, inputs, strict=True)}
        verdicts.mark("tokens", kept)
        for index, row in tokens.items():
            if row["error"]:
                verdicts.set(index, "failed", row["error"])
        return tokens

    def _content(
        self,
        rows: list[Row],
        verdicts: Verdicts,
        captions: dict[int, list[dict[str, str]]],
        tokens: dict[int, Row],
        ledger: pa.Table,
        groups: dict[str, str],
    ) -> SnapshotContent:
        publish = self.config.publish
        clips = []
        for index in verdicts.kept:
            made = tokens[index]
            source_id: str = rows[index]["work_key"]
            clip = {name: made[name] for name in ("fps", "t", "h", "w", "codes_sha256")}
            split = draw_split(groups.get(source_id, source_id), seed=publish.seed, val_share=publish.val_share)
            ids = {"clip_id": rows[index]["key"], "source_id": source_id, "split": split}
            clips.append(ids | clip | {"captions": captions[index]})
        work_keys = {rows[index]["key"]: tokens[index]["work_key"] for index in verdicts.kept}
        table = StageTable(self.config.dataset, self.stages["tokens"])
        return SnapshotContent(
            clips=pa.Table.from_pylist(clips, schema=PUBLISHED_CLIPS),
            read_codes=CodeReader(table, work_keys),
            ledger=ledger,
            tokenizer=self.tokenizer,
            created_from={
                "config": _portable(self.config),
                "stage_hashes": {name: stage.hash for name, stage in self.stages.items()},
            },
        )

    def _result(self, snapshot: Snapshot, ledger: pa.Table, clips: pa.Table) -> CurateResult:
        manifest = snapshot.manifest
        return CurateResult(
            snapshot_uri=snapshot.uri,
            snapshot_id=manifest.snapshot_id,
            counts=manifest.ledger.counts,
            reasons=count_reasons(ledger),
            uncaptioned=sum(not captions for captions in clips["captions"].to_pylist()),
            rows={name: total.rows for name, total in manifest.totals.items()},
            tokens={name: total.tokens for name, total in manifest.totals.items()},
            computed=dict(self.computed),
        )


def _portable(config: CurateConfig) -> dict[str, Any]:
    """The part of a config that decides what comes out, without places and means: equal wherever it runs."""
    tokens = asdict(config.tokens)
    tokens["tokenizer"] = {"kind": config.tokens.tokenizer.kind}
    return {
        "split": asdict(config.split),
        "thresholds": asdict(config.thresholds),
        "near_duplicates": config.near_duplicates,
        "captions": {"require": config.captions.require},
        "tokens": tokens,
    }
