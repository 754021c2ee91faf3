"""The steps of a curation, from a listing of files to what a snapshot is made of."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipelines.cluster import cluster_is_ours, is_joined
from pipelines.data.captions.choose import Captioning, Captions
from pipelines.data.captions.coca import check_coca
from pipelines.data.captions.endpoint_stage import check_endpoint
from pipelines.data.captions.given import CaptionSource, share_captions
from pipelines.data.config import CurateConfig
from pipelines.data.snapshot.codes import CodeReader
from pipelines.data.snapshot.ledger import build_ledger, removed_rows
from pipelines.data.snapshot.read import TokenizerInfo
from pipelines.data.snapshot.removals import read_removed
from pipelines.data.snapshot.write import PUBLISHED_CLIPS, SnapshotContent, draw_split
from pipelines.data.stage.columns import iterate, sort, take
from pipelines.data.stage.log import RunLog
from pipelines.data.stage.run import TooManyFailuresError, check_fits, run_stage
from pipelines.data.stage.stage import WORK, WORK_KEY, Stage
from pipelines.data.stage.table import PART, StageTable, anti_join
from pipelines.data.steps.clips import Clips
from pipelines.data.steps.duplicates import find_near_duplicates, linked_groups
from pipelines.data.steps.features import TEXT_INPUTS, FeatureScores, features_stage, similarity, texts_stage
from pipelines.data.steps.looks import SourceLooks, looks_stage
from pipelines.data.steps.sources import first_paths, sources_stage
from pipelines.data.steps.split import CLIPS, split_identity, split_stage
from pipelines.data.steps.tokens import token_inputs, tokens_stage
from pipelines.data.video.frames import clip_inputs, picture_keys
from pipelines.data.video.looks import look_inputs
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
        looks = looks_stage(config.looks, config.decode, resources.of("looks"))
        looks_uri = StageTable(config.dataset, looks).uri
        make_looks = partial(SourceLooks, looks, looks_uri, config.looks, config.thresholds)
        clip_work = make_looks if config.reads_looks else None
        stages = [
            sources_stage(resources.of("sources")),
            split_stage(config.split, config.decode, resources.of("split"), clip_work=clip_work),
        ]
        if config.reads_looks:
            stages.append(looks)
        if features.scores:
            stages.append(features_stage(features, looks.hash, resources.of("features")))
        if "similarity" in features.scores:
            stages.append(texts_stage(features.clip, resources.of("features")))
        self.captioning = Captioning(config.captions, given, looks.hash, resources.of("captions"))
        stages += [*self.captioning.stages.values(), tokens_stage(config, tokenizer)]
        self.stages = {stage.name: stage for stage in stages}
        self.feature_scores = FeatureScores(features)
        self.no_endpoint = self._check_endpoint()
        self._check_models()
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
            if self._has_done_nothing(stage):
                raise
            return error
        return None

    def _check_models(self) -> None:
        """Whether models that have done nothing yet can be loaded, before all that comes before them is done.

        Raises:
            UserError: if one cannot.
        """
        checks: dict[str, Callable[[], None]] = {
            "features": self.feature_scores.check,
            "captions-coca": partial(check_coca, self.config.captions.coca),
        }
        for name, check in checks.items():
            if name in self.stages and self._has_done_nothing(self.stages[name]):
                check()
        devices = {
            "features": ("features.clip.device", self.config.features.clip.device),
            "captions-coca": ("captions.coca.device", self.config.captions.coca.device),
            "tokens": ("tokens.tokenizer.device", self.config.tokens.tokenizer.device),
        }
        for name, (key, device) in devices.items():
            if name in self.stages:
                self._unless_done(self.stages[name], partial(_check_device, key, device))

    def _has_done_nothing(self, stage: Stage) -> bool:
        return not StageTable(self.config.dataset, stage).parts()

    def _unless_done(self, stage: Stage, check: Callable[[], None]) -> None:
        """Let a check fail for a stage that has done nothing yet; of others there may be nothing left to do."""
        try:
            check()
        except UserError:
            if self._has_done_nothing(stage):
                raise

    def run(self, listing: pa.Table, log: RunLog) -> Published:
        """Bring every stage up to date, and decide.

        Raises:
            JobError: a stage failed, or too many sources did.
        """
        self.log = log
        for stage in self.stages.values() if cluster_is_ours() else ():
            self._unless_done(stage, partial(check_fits, stage))
        sources, removed = self._without_removed(self._hash(listing))
        first = first_paths(sources)
        self.captioning.given = share_captions(self.captioning.given, sources)
        clips, failed = self._split(sources, first)

        clips.decide(self.config.thresholds)
        clips.plan_shapes(self.config.tokens)
        groups = self._drop_near_duplicates(clips)
        self._look(clips)
        self._features(clips)
        captions = self._caption(clips)
        self._compare_texts(clips, captions)
        tokens = self._tokenize(clips)

        ledger = build_ledger(
            sources, first, clips.table, clips.score_column(), failed, clips.verdicts, self._ledger_hashes()
        )
        ledger = pa.concat_tables([ledger, removed_rows(removed)])
        return Published(self._content(clips, captions, tokens, ledger, groups), captions, self.computed)

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

    def _of_clips(self, name: str, inputs: pa.Table) -> StageTable:
        """A stage over clips, up to date with its inputs."""
        return self._compute(name, inputs, self.config.resources.max_failed_share * inputs.num_rows)

    def _ledger_hashes(self) -> dict[str, str]:
        """Of each column of the ledger's ``stage_hashes``."""
        return {name: stage.hash for name, stage in self.stages.items()} | {"captions": self.captioning.hash}

    def _hash(self, listing: pa.Table) -> pa.Table:
        """The listing with the content hash of each file, or why it has none."""
        keys = pc.unique(listing["work_key"])  # a file may be listed under several names
        files = listing.take(pc.index_in(keys, listing["work_key"].combine_chunks()))
        work = pc.max_element_wise(files["size"], 0).cast(pa.float64())
        table = self._compute("sources", files.append_column(WORK, work))
        hashed = read_in_order(table, ["source_id", "error"], files["work_key"])
        places = pc.index_in(listing["work_key"], keys)
        for name in ("source_id", "error"):
            listing = listing.append_column(name, hashed[name].take(places))
        return listing

    def _without_removed(self, sources: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The sources that may be used, and those that were taken out of the dataset."""
        flags = pc.is_in(sources["source_id"], pa.array(read_removed(self.config.dataset), pa.string()))
        return sources.filter(pc.invert(flags)), sources.filter(flags)

    def _split(self, sources: pa.Table, first: pa.Table) -> tuple[Clips, pa.Table]:
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
        # Fingerprints are most of the table, and read where they are needed.
        columns = [*(name for name in CLIPS.names if name != "fingerprint"), PART]
        parts = table.parts()
        rows = table.read(columns, keys=first["source_id"])
        clips, failed = rows.filter(pc.is_valid(rows["key"])), rows.filter(pc.is_null(rows["key"]))
        del rows
        clips = sort(clips, ["work_key", "start_s"])
        places = pc.index_in(clips["work_key"], first["source_id"].combine_chunks())
        return Clips(clips, first["uri"].take(places), parts), failed

    def _drop_near_duplicates(self, clips: Clips) -> dict[str, str]:
        """Mark them; returns the group of each source that has some, by which its split is drawn."""
        threshold = self.config.near_duplicates
        if threshold is None:
            return {}
        kept = clips.verdicts.kept
        rows = clips.of(kept)
        table = StageTable(self.config.dataset, self.stages["split"])
        found = find_near_duplicates(rows["key"], partial(clips.fingerprints, table, rows["key"]), threshold)
        pairs = []
        for place, duplicate in found.items():
            of = rows["key"][duplicate.of].as_py()
            clips.verdicts.set(int(kept[place]), "duplicate", f"near: of {of} (cosine {duplicate.cosine:.3f})")
            pairs.append((rows["work_key"][place].as_py(), rows["work_key"][duplicate.of].as_py()))
        return linked_groups(pairs)

    def _look(self, clips: Clips) -> None:
        """Looks of the clips kept so far; of most, the split stage's workers have made them."""
        if "looks" in self.stages:
            kept = clips.verdicts.kept
            rows = clips.of(kept)
            clips.add_looks(self._of_clips("looks", clip_inputs(rows, picture_keys(rows))), kept)

    def _features(self, clips: Clips) -> None:
        """What models see in the clips kept so far; decides."""
        if "features" not in self.stages:
            return
        kept = clips.verdicts.kept
        rows = clips.of(kept)
        inputs = look_inputs(rows)
        table = self._of_clips("features", inputs)
        clips.verdicts.mark("features", kept)
        for places, piece in table.pieces(["clip", "text_area", "error"], inputs["work_key"]):
            for index, row in zip(kept[places].tolist(), piece.to_pylist(), strict=True):
                if row["error"]:
                    clips.verdicts.set(index, "failed", row["error"])
                    continue
                for name, value in self.feature_scores.of_clip(row).items():
                    clips.scores[name][index] = value
        clips.decide(self.config.thresholds)

    def _caption(self, clips: Clips) -> Captions:
        """Captions of the clips kept so far."""
        kept = clips.verdicts.kept
        rows = clips.of(kept)
        made = {}
        for name, stage in self.captioning.stages.items():
            inputs = self.captioning.inputs(name, rows)
            if name == "endpoint" and self.no_endpoint is not None and self._is_pending(stage, inputs):
                raise self.no_endpoint
            table = self._of_clips(stage.name, inputs)
            columns = ["captions", "input_tokens", "output_tokens", "error"]
            made[name] = read_in_order(table, columns, inputs["work_key"])
        captions = self.captioning.gather(kept, made)
        clips.verdicts.mark("captions", kept)
        if self.config.captions.require:
            for index, (status, reason) in captions.faults.items():
                clips.verdicts.set(index, status, reason)
        return captions

    def _compare_texts(self, clips: Clips, captions: Captions) -> None:
        """How well clips and their captions go together; decides too."""
        if "texts" not in self.stages:
            return
        kept = clips.verdicts.kept
        captioned = kept[pc.greater(pc.list_value_length(captions.take(kept)), 0).to_numpy()]
        own = captions.take(captioned)
        said = pc.struct_field(pc.list_flatten(own), "text")
        hashes = pa.array((hashlib.sha256(text.encode()).hexdigest() for text in iterate(said)), pa.string())
        keys = pc.unique(hashes)
        texts = take(said, pc.index_in(keys, hashes).to_numpy())
        table = self._of_clips("texts", pa.table([keys, texts], schema=TEXT_INPUTS))
        vectors = read_in_order(table, ["clip"], pa.chunked_array([keys]))["clip"]
        spoken = pc.index_in(hashes, keys).to_numpy()  # numbers of the captions' texts, clip after clip
        bounds = np.concatenate([[0], np.cumsum(pc.list_value_length(own).to_numpy())])
        rows = clips.of(captioned)
        features = StageTable(self.config.dataset, self.stages["features"])
        for places, piece in features.pieces(["clip"], picture_keys(rows)):
            for place, seen in zip(places.tolist(), piece["clip"].to_pylist(), strict=True):
                numbers = spoken[bounds[place] : bounds[place + 1]]
                texts_of_clip = [vectors[number].as_py() for number in numbers.tolist()]
                clips.scores["similarity"][captioned[place]] = similarity(seen, texts_of_clip)
        clips.decide(self.config.thresholds)

    def _tokenize(self, clips: Clips) -> pa.Table:
        """What the token stage made of the clips kept so far, without the codes themselves; ``clip`` numbers them."""
        kept, tokens = clips.verdicts.kept, self.config.tokens
        rows = clips.of(kept)
        inputs = token_inputs(rows, clips.shapes[kept], tokens.decode_back_share)
        columns = ["fps", "t", "h", "w", "codes_sha256", "psnr", "error"]
        made = read_in_order(self._of_clips("tokens", inputs), columns, inputs["work_key"])
        clips.verdicts.mark("tokens", kept)
        clips.scores["psnr"][kept] = made["psnr"].to_numpy()
        for place in np.flatnonzero(made["error"].is_valid().to_numpy()).tolist():
            clips.verdicts.set(int(kept[place]), "failed", made["error"][place].as_py())
        return made.append_column("clip", pa.array(kept))

    def _content(
        self, clips: Clips, captions: Captions, tokens: pa.Table, ledger: pa.Table, groups: dict[str, str]
    ) -> SnapshotContent:
        publish = self.config.publish
        draw = partial(draw_split, seed=publish.seed, val_share=publish.val_share)
        kept = clips.verdicts.kept
        rows = clips.of(kept)
        made = take(tokens, np.searchsorted(tokens["clip"].to_numpy(), kept))
        columns = {
            "clip_id": rows["key"],
            "source_id": rows["work_key"],
            "split": pa.array([draw(groups.get(name, name)) for name in iterate(rows["work_key"])], pa.string()),
            "captions": captions.take(kept),
            **{name: made[name] for name in ("fps", "t", "h", "w", "codes_sha256")},
        }
        table = StageTable(self.config.dataset, self.stages["tokens"])
        return SnapshotContent(
            clips=pa.table(columns).select(PUBLISHED_CLIPS.names).cast(PUBLISHED_CLIPS),
            read_codes=CodeReader(table, rows["key"], made["work_key"]),
            ledger=ledger,
            tokenizer=self.tokenizer,
            created_from={
                "config": _portable(self.config),
                "heads": {name: head.hash for name, head in self.feature_scores.heads.items()},
                "stage_hashes": {name: stage.hash for name, stage in self.stages.items()},
            },
        )


def _check_device(key: str, device: str) -> None:
    """Whether this machine has a device; of a cluster that is joined, others may.

    Raises:
        UserError: if it has not, or torch knows no such device.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"{key}={device}: {str(error).splitlines()[0]}") from error
    if kind == "cuda" and not is_joined() and not torch.cuda.is_available():
        raise UserError(
            f"{key}={device}: torch finds no GPU on this machine; set {key}=cpu, or RAY_ADDRESS to a cluster that has "
            "one"
        )


def read_in_order(table: StageTable, columns: Sequence[str], keys: pa.ChunkedArray) -> pa.Table:
    """Some columns of a stage that makes one row of each input, in the order of the inputs' keys, each told once.

    Raises:
        JobError: the table lacks a key.
    """
    found = [(places, rows.select([WORK_KEY, *columns])) for places, rows in table.pieces(columns, keys)]
    every = np.concatenate([places for places, _ in found] or [np.zeros(0, np.int64)])
    _, first = np.unique(every, return_index=True)  # ascending; a key may have several rows, where it was given twice
    schema = pa.schema([table.schema.field(name) for name in (WORK_KEY, *columns)])
    rows = pa.concat_tables([schema.empty_table(), *(rows for _, rows in found)])
    return take(rows, first)


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
