"""The order of a curation's steps, and what a snapshot is made of in the end."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.cluster import cluster_is_ours
from pipelines.data.captions.captioner import CaptionSource
from pipelines.data.captions.choose import Caption
from pipelines.data.config import CurateConfig
from pipelines.data.snapshot.ledger import build_ledger, removed_rows
from pipelines.data.snapshot.read import TokenizerInfo
from pipelines.data.snapshot.shards import PUBLISHED_CLIPS
from pipelines.data.snapshot.write import SnapshotContent, draw_split
from pipelines.data.stage.columns import iterate, release_memory, take
from pipelines.data.stage.log import RunLog
from pipelines.data.stage.run import check_fits
from pipelines.data.stage.stage import WORK_KEY
from pipelines.data.stage.table import StageTable
from pipelines.data.stage.values import StoredValues
from pipelines.data.steps.duplicates import NearDuplicates
from pipelines.data.steps.features import Features, Similarity
from pipelines.data.steps.looks import Look
from pipelines.data.steps.overrides import ApplyOverrides, Override
from pipelines.data.steps.run import Check, Run, Step
from pipelines.data.steps.sources import HashSources
from pipelines.data.steps.split import SplitSources, split_identity
from pipelines.data.steps.tokens import Tokenize
from pipelines.errors import UserError

_CAPTION_RULES = ("captioners", "require", "min_words", "max_words", "languages", "language_certainty")


class Decide(Step):
    """Rejects clips by the scores of the pass over all frames, and settles what of the others is to be encoded."""

    def apply(self, run: Run) -> None:
        """Decide."""
        run.clips.decide(run.config.bounds)
        run.clips.plan_shapes(run.config.tokens)


class Curation:
    """The steps of one run; a ``UserError`` if a stage with work left lacks what it needs."""

    def __init__(
        self,
        config: CurateConfig,
        given: CaptionSource,
        tokenizer: TokenizerInfo,
        overrides: Mapping[str, Override] | None = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.features = Features(config) if config.features.scores else None
        self.caption = Caption(config, given)
        reads_looks = config.looks.always or self.features is not None or self.caption.reads_looks
        look = Look(config) if reads_looks else None
        self.steps: list[Step] = [
            HashSources(config),
            SplitSources(config, look.stages[0] if look else None),
            *([ApplyOverrides(overrides)] if overrides else []),
            Decide(),
            NearDuplicates(self.caption.given_to),
            *([look] if look else []),
            *([self.features] if self.features else []),
            self.caption,
            *([Similarity(config)] if "similarity" in config.features.scores else []),
            Tokenize(config, tokenizer),
        ]
        self.stages = {stage.name: stage for step in self.steps for stage in step.stages}
        self.unready = dict(self._failed_checks(check for step in self.steps for check in step.checks))

    def _failed_checks(self, checks: Iterator[Check]) -> Iterator[tuple[str, UserError]]:
        """By stage, what it lacks; that a stage which has done nothing yet lacks it ends the run at once."""
        for check in checks:
            if check.costly and not self._is_new(check.stage):
                continue
            try:
                check.test()
            except UserError as error:
                if self._is_new(check.stage):
                    raise
                yield check.stage, error

    def _is_new(self, stage: str) -> bool:
        """Whether a stage has done nothing yet."""
        return not StageTable(self.config.dataset, self.stages[stage]).parts()

    def run(self, listing: pa.Table, log: RunLog) -> Run:
        """Bring every stage up to date, and decide.

        Raises:
            UserError: a stage's processes do not fit this machine.
            JobError: a stage failed, or too many sources did.
        """
        if cluster_is_ours():
            fits = (Check(name, partial(check_fits, stage)) for name, stage in self.stages.items())
            self.unready |= dict(self._failed_checks(fits))
        run = Run(self.config, self.stages, self.unready, listing, log)
        for step in self.steps:
            step.apply(run)
            release_memory()
        return run

    def content(self, run: Run) -> SnapshotContent:
        """What a snapshot of the kept clips is made of."""
        hashes = {name: stage.hash for name, stage in self.stages.items()}
        heads = self.features.scores.heads if self.features else {}
        kept, publish = run.clips.verdicts.kept, self.config.publish
        draw = partial(draw_split, seed=publish.seed, val_share=publish.val_share)
        rows = take(run.clips.table.select(["key", "work_key"]), kept)
        ledger = build_ledger(
            run.sources,
            run.first,
            run.clips.table,
            run.clips.score_column(),
            run.failed,
            run.clips.verdicts,
            hashes | {"captions": self.caption.hash},
        )
        made = take(run.tokens, np.searchsorted(run.tokens["clip"].to_numpy(), kept))
        sizes = 2 * np.prod([made[name].to_numpy().astype(np.int64) for name in ("t", "h", "w")], axis=0)
        codes = StoredValues(files=made["file"], keys=made["work_key"], key_column=WORK_KEY, column="codes")
        columns = {
            "clip_id": rows["key"],
            "source_id": rows["work_key"],
            "split": pa.array([draw(run.groups.get(name, name)) for name in iterate(rows["work_key"])], pa.string()),
            "captions": run.captions.take(kept),
            **{name: made[name] for name in ("fps", "t", "h", "w", "codes_sha256")},
            "motion": pa.array(run.clips.scores["motion"][kept], from_pandas=True),
        }
        return SnapshotContent(
            clips=pa.table(columns).select(PUBLISHED_CLIPS.names).cast(PUBLISHED_CLIPS),
            code_groups=partial(codes.groups, sizes),
            ledger=pa.concat_tables([ledger, removed_rows(run.removed)]),
            tokenizer=self.tokenizer,
            created_from={
                "config": _portable(self.config),
                "heads": {name: head.hash for name, head in heads.items()},
                "stage_hashes": hashes,
            },
        )


def _portable(config: CurateConfig) -> dict[str, Any]:
    """The part of a config that decides what comes out, without places and means: equal wherever it runs."""
    tokens = asdict(config.tokens)
    tokens["tokenizer"] = {"kind": config.tokens.tokenizer.kind}
    return {
        "split": split_identity(config.split),
        "thresholds": asdict(config.bounds),
        "near_duplicates": config.near_duplicates,
        "moving_duplicates": asdict(config.moving_duplicates),
        "features": {"scores": config.features.scores, "num_frames": config.features.num_frames},
        "captions": {name: getattr(config.captions, name) for name in _CAPTION_RULES},
        "tokens": tokens,
    }
