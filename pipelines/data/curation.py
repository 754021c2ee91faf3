"""The steps of a curation, from a listing of files to what a snapshot is made of."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.captioning import Captioning, Captions
from pipelines.data.captions import CaptionSource
from pipelines.data.codes import CodeReader
from pipelines.data.config import CurateConfig
from pipelines.data.decide import decide
from pipelines.data.duplicates import find_near_duplicates, linked_groups, unpack_fingerprint
from pipelines.data.endpoint_stage import check_endpoint
from pipelines.data.features import FEATURE_INPUTS, TEXT_INPUTS, FeatureScores, features_stage, similarity, texts_stage
from pipelines.data.frames import clip_inputs, picture_key
from pipelines.data.ledger import Verdicts, build_ledger, removed_rows
from pipelines.data.publish import PUBLISHED_CLIPS, SnapshotContent, draw_split
from pipelines.data.removal import read_removed
from pipelines.data.runlog import RunLog
from pipelines.data.runner import WORK, Row, Stage, StageTable, TooManyFailuresError, anti_join, run_stage
from pipelines.data.schemas import LEDGER
from pipelines.data.snapshot import TokenizerInfo
from pipelines.data.sources import first_paths, sources_stage
from pipelines.data.split import split_identity, split_stage
from pipelines.data.tokens import TOKEN_INPUTS, is_sampled, plan_shape, tokens_stage
from pipelines.errors import JobError, UserError

_CAPTION_RULES = ("captioners", "require", "min_words", "max_words", "languages", "language_certainty")


@dataclass(frozen=True)
class Published:
    """What a curation made.

    Attributes:
        content: Of the snapshot.
        captions: Of the clips that got so far.
        computed: By stage, inputs that were computed; what was there before does not count.
    """

    content: SnapshotContent
    captions: Captions
    computed: dict[str, int]


class Curation:
    """One run; each step takes tables and leaves tables.

    Raises:
        UserError: a model's file is missing, or is not what it should be.
    """

    def __init__(self, config: CurateConfig, given: CaptionSource, tokenizer: TokenizerInfo) -> None:
        self.config = config
        self.tokenizer = tokenizer
        resources, features = config.resources, config.features
        stages = [
            sources_stage(resources.of("sources")),
            split_stage(config.split, config.decode, resources.of("split")),
        ]
        if features.scores:
            stages.append(features_stage(features, config.decode, resources.of("features")))
        if "similarity" in features.scores:
            stages.append(texts_stage(features.clip, resources.of("features")))
        self.captioning = Captioning(config.captions, given, config.decode, resources.of("captions"))
        stages += [*self.captioning.stages.values(), tokens_stage(config, tokenizer)]
        self.stages = {stage.name: stage for stage in stages}
        self.feature_scores = FeatureScores(features)
        self.no_endpoint = self._check_endpoint()
        self.computed: dict[str, int] = {}
        self.log: RunLog | None = None

    def _check_endpoint(self) -> UserError | None:
        """Whether the endpoint that captions is there.

        Raises:
            UserError: if it is not, and has captioned nothing yet. A later run may need none of it.
        """
        stage = self.captioning.stages.get("endpoint")
        if stage is None:
            return None
        try:
            check_endpoint(self.config.captions.endpoint)
        except UserError as error:
            if not StageTable(self.config.dataset, stage).parts():
                raise
            return error
        return None

    def run(self, listing: pa.Table, log: RunLog) -> Published:
        """Bring every stage up to date, and decide.

        Raises:
            JobError: a stage failed, or too many sources did.
        """
        self.log = log
        sources, removed = self._without_removed(self._hash(listing))
        first = first_paths(sources)
        clips, failed = self._split(sources, first)
        places = pc.index_in(clips["work_key"], first["source_id"].combine_chunks())
        uris = first["uri"].take(places).to_pylist()

        rows = clips.to_pylist()
        verdicts = self._decide(rows)
        groups = self._drop_near_duplicates(rows, verdicts)
        features = self._features(rows, uris, verdicts)
        captions = self._caption(rows, uris, verdicts)
        self._compare_texts(rows, verdicts, features, captions)
        tokens = self._tokenize(rows, uris, verdicts)

        clips = _with_scores(clips, rows)
        ledger = build_ledger(sources, first, clips, failed, verdicts, self._ledger_hashes())
        ledger = pa.concat_tables([ledger, removed_rows(removed)])
        content = self._content(rows, verdicts, captions, tokens, ledger, groups)
        return Published(content, captions, self.computed)

    def _compute(self, name: str, inputs: pa.Table, max_failed: float = math.inf) -> StageTable:
        """Bring a stage's table up to date with its inputs.

        Raises:
            JobError: as soon as more inputs have failed than the run bears.
        """
        stage, config = self.stages[name], self.config
        try:
            self.computed[name] = run_stage(
                stage, inputs, dataset=config.dataset, progress=config.progress, log=self.log, max_failed=max_failed
            )
        except TooManyFailuresError as error:
            raise self._too_many(error, inputs.num_rows, stage.name) from error
        return StageTable(config.dataset, stage)

    def _is_pending(self, stage: Stage, inputs: pa.Table) -> bool:
        return bool(anti_join(inputs, StageTable(self.config.dataset, stage).keys()).num_rows)

    def _too_many(self, error: TooManyFailuresError, total: int, where: str) -> JobError:
        return JobError(
            f"{error.count} of {total} sources or clips failed in the stage {where}, more than "
            f"resources.max_failed_share = {self.config.resources.max_failed_share} allows; one of them: "
            f"{error.reason}. Something else than the videos may be wrong; if not, raise the share and give the same "
            "command again"
        )

    def _of_clips(self, name: str, inputs: pa.Table, columns: Sequence[str] | None = None) -> list[Row]:
        """What a stage over clips made of its inputs, in their order."""
        allowed = self.config.resources.max_failed_share * inputs.num_rows
        table = self._compute(name, inputs, allowed).read(columns, keys=inputs["work_key"])
        by_key = {row["work_key"]: row for row in table.to_pylist()}
        return [by_key[key] for key in inputs["work_key"].to_pylist()]

    def _ledger_hashes(self) -> dict[str, str]:
        """Of each column of the ledger's ``stage_hashes``."""
        return {name: stage.hash for name, stage in self.stages.items()} | {"captions": self.captioning.hash}

    def _hash(self, listing: pa.Table) -> pa.Table:
        """The listing with the content hash of each file, or why it has none."""
        work = pc.max_element_wise(listing["size"], 0).cast(pa.float64())
        hashed = self._compute("sources", listing.append_column(WORK, work)).read()
        places = pc.index_in(listing["work_key"], hashed["work_key"].combine_chunks())
        for name in ("source_id", "error"):
            listing = listing.append_column(name, hashed[name].take(places))
        return listing

    def _without_removed(self, sources: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The sources that may be used, and those that were taken out of the dataset."""
        flags = pc.is_in(sources["source_id"], pa.array(read_removed(self.config.dataset), pa.string()))
        return sources.filter(pc.invert(flags)), sources.filter(flags)

    def _split(self, sources: pa.Table, first: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Clips of the sources, and rows of the sources that have none.

        Raises:
            JobError: as soon as more sources have failed than the run bears.
        """
        inputs = pa.table(
            {
                "work_key": first["source_id"],
                "uri": first["uri"],
                WORK: pc.max_element_wise(first["size"], 0).cast(pa.float64()),
            }
        )
        unreadable = pc.drop_null(sources["error"])
        share, total = self.config.resources.max_failed_share, sources.num_rows
        if len(unreadable) > share * total:
            raise self._too_many(TooManyFailuresError(unreadable[0].as_py(), len(unreadable)), total, "sources")
        table = self._compute("split", inputs, max_failed=share * total - len(unreadable))
        rows = table.read(keys=first["source_id"])
        rows = rows.sort_by([("work_key", "ascending"), ("start_s", "ascending")])
        return rows.filter(pc.is_valid(rows["key"])), rows.filter(pc.is_null(rows["key"]))

    def _decide(self, rows: list[Row]) -> Verdicts:
        """Verdicts from scores alone; kept clips get the ``shape`` that is to be encoded."""
        tokens = self.config.tokens
        decisions = [decide(row["scores"], self.config.thresholds) for row in rows]
        verdicts = Verdicts([status for status, _ in decisions], [reason for _, reason in decisions])
        for index in verdicts.kept:
            scores = rows[index]["scores"]
            shape = plan_shape(scores, tokens)
            if shape is None:
                needed = min((count for count in tokens.num_frames if count > 1), default=5)
                have = 1 if scores["image"] else int(scores["duration"] * tokens.fps + 0.01)
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

    def _features(self, rows: list[Row], uris: list[str], verdicts: Verdicts) -> dict[int, Row]:
        """What models see in the clips kept so far, by index; their scores go to the rows, and decide."""
        if "features" not in self.stages:
            return {}
        kept = verdicts.kept
        inputs = [{"work_key": picture_key(rows[index]), **clip_inputs(rows[index], uris[index])} for index in kept]
        made = self._of_clips("features", pa.Table.from_pylist(inputs, schema=FEATURE_INPUTS))
        features = dict(zip(kept, made, strict=True))
        verdicts.mark("features", kept)
        for index, row in features.items():
            if row["error"]:
                verdicts.set(index, "failed", row["error"])
                continue
            rows[index]["scores"] |= self.feature_scores.of_clip(row)
            self._decide_again(index, rows, verdicts)
        return features

    def _decide_again(self, index: int, rows: list[Row], verdicts: Verdicts) -> None:
        """After a kept clip got further scores."""
        status, reason = decide(rows[index]["scores"], self.config.thresholds)
        if status != "kept":
            verdicts.set(index, status, reason)

    def _caption(self, rows: list[Row], uris: list[str], verdicts: Verdicts) -> Captions:
        """Captions of the clips kept so far."""
        kept = verdicts.kept
        clips, places = [rows[index] for index in kept], [uris[index] for index in kept]
        made = {}
        for name, stage in self.captioning.stages.items():
            inputs = self.captioning.inputs(name, clips, places)
            if name == "endpoint" and self.no_endpoint is not None and self._is_pending(stage, inputs):
                raise self.no_endpoint
            made[name] = self._of_clips(stage.name, inputs)
        captions = self.captioning.gather(kept, made)
        verdicts.mark("captions", kept)
        if self.config.captions.require:
            for index, (status, reason) in captions.faults.items():
                verdicts.set(index, status, reason)
        return captions

    def _compare_texts(self, rows: list[Row], verdicts: Verdicts, features: dict[int, Row], captions: Captions) -> None:
        """How well clips and their captions go together; decides too."""
        if "texts" not in self.stages:
            return
        captioned = [index for index in verdicts.kept if captions.of[index]]
        texts = sorted({caption["text"] for index in captioned for caption in captions.of[index]})
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        made = self._of_clips("texts", pa.table({"work_key": keys, "text": texts}, schema=TEXT_INPUTS))
        vectors = {text: row["clip"] for text, row in zip(texts, made, strict=True)}
        for index in captioned:
            own = [vectors[caption["text"]] for caption in captions.of[index]]
            rows[index]["scores"]["similarity"] = similarity(features[index]["clip"], own)
            self._decide_again(index, rows, verdicts)

    def _tokenize(self, rows: list[Row], uris: list[str], verdicts: Verdicts) -> dict[int, Row]:
        """What the token stage made of the clips kept so far, by index, without the codes themselves."""
        kept = verdicts.kept
        inputs = []
        for index in kept:
            row, shape = rows[index], rows[index]["shape"]
            decode_back = is_sampled(row["key"], self.config.tokens.decode_back_share)
            work_key = shape.work_key(row["key"], row["picture"], decode_back=decode_back)
            what = {"work_key": work_key, "decode_back": decode_back, **asdict(shape)}
            inputs.append(what | clip_inputs(row, uris[index]))
        columns = ["work_key", "fps", "t", "h", "w", "codes_sha256", "psnr", "error"]
        made = self._of_clips("tokens", pa.Table.from_pylist(inputs, schema=TOKEN_INPUTS), columns)
        tokens = dict(zip(kept, made, strict=True))
        verdicts.mark("tokens", kept)
        for index, row in tokens.items():
            rows[index]["scores"]["psnr"] = row["psnr"]
            if row["error"]:
                verdicts.set(index, "failed", row["error"])
        return tokens

    def _content(
        self,
        rows: list[Row],
        verdicts: Verdicts,
        captions: Captions,
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
            clips.append(ids | clip | {"captions": captions.of[index]})
        work_keys = {rows[index]["key"]: tokens[index]["work_key"] for index in verdicts.kept}
        table = StageTable(self.config.dataset, self.stages["tokens"])
        return SnapshotContent(
            clips=pa.Table.from_pylist(clips, schema=PUBLISHED_CLIPS),
            read_codes=CodeReader(table, work_keys),
            ledger=ledger,
            tokenizer=self.tokenizer,
            created_from={
                "config": _portable(self.config),
                "heads": {name: head.hash for name, head in self.feature_scores.heads.items()},
                "stage_hashes": {name: stage.hash for name, stage in self.stages.items()},
            },
        )


def _with_scores(clips: pa.Table, rows: list[Row]) -> pa.Table:
    """The clips with all scores that were found since they were split."""
    scores = pa.array([row["scores"] for row in rows], LEDGER.field("scores").type)
    return clips.set_column(clips.schema.get_field_index("scores"), "scores", scores)


def _portable(config: CurateConfig) -> dict[str, Any]:
    """The part of a config that decides what comes out, without places and means: equal wherever it runs."""
    tokens = asdict(config.tokens)
    tokens["tokenizer"] = {"kind": config.tokens.tokenizer.kind}
    return {
        "split": split_identity(config.split),
        "thresholds": asdict(config.thresholds),
        "near_duplicates": config.near_duplicates,
        "features": {"scores": config.features.scores, "num_frames": config.features.num_frames},
        "captions": {name: getattr(config.captions, name) for name in _CAPTION_RULES},
        "tokens": tokens,
    }
