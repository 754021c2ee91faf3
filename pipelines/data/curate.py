"""Curation from end to end: sources, split and scores, decisions, captions, tokens, a published snapshot."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.cluster import connect, joining
from pipelines.data.captions.captioner import CaptionSource
from pipelines.data.captions.given import find_captions
from pipelines.data.captions.registry import captioner_named
from pipelines.data.config import CurateConfig
from pipelines.data.models.transnet import load_transnet
from pipelines.data.pipeline import Curation
from pipelines.data.snapshot.ledger import count_reasons
from pipelines.data.snapshot.read import TokenizerInfo
from pipelines.data.snapshot.reconstruction import Reconstruction, read_reconstruction
from pipelines.data.snapshot.write import write_snapshot
from pipelines.data.stage.log import RunLog
from pipelines.data.steps.overrides import read_overrides
from pipelines.data.steps.sources import list_sources
from pipelines.data.steps.tokens import load_tokenizer_info
from pipelines.errors import JobError, UserError, storage_errors_as
from pipelines.storage import s3
from pipelines.storage.cache import local_path
from pipelines.storage.lock import dataset_lock

CONTINUE = "what was done is kept: give the same command again to continue"


@dataclass(frozen=True, kw_only=True)
class CurateResult:
    """What a run published, and what it took."""

    snapshot_uri: str
    snapshot_id: str
    counts: dict[str, int]  # ledger rows by status
    reasons: dict[str, int]  # ledger rows not kept by "status: class of reason", most frequent first
    tokenizer: TokenizerInfo  # that made the codes
    reconstruction: Reconstruction  # of kept clips by their codes
    uncaptioned: int  # kept clips that have no caption
    left_out: dict[str, int]  # captions of kept clips that were not used, by why
    caption_cost: float  # of the endpoint's captions in this snapshot, at the prices that the config names
    rows: dict[str, int]  # kept clips by split
    tokens: dict[str, int]  # their codes by split
    computed: dict[str, int]  # by stage, inputs that this run computed; what was there before does not count

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [f"snapshot {self.snapshot_uri}", "  ".join(f"{name} {count}" for name, count in self.counts.items())]
        lines += [f"  {count:6d}  {reason}" for reason, count in self.reasons.items()]
        sizes = ", ".join(f"{name} {self.rows[name]} clips ({self.tokens[name]} tokens)" for name in self.rows)
        lines.append(f"published: {sizes}")
        made_by = self.tokenizer
        lines.append(f"codes by {made_by.kind} ({made_by.codebook_size} codes, weights {made_by.weights_hash[:19]})")
        if self.counts["kept"]:
            lines.append(f"what they show: {self.reconstruction}")
        if self.uncaptioned:
            lines.append(
                f"{self.uncaptioned} kept clips have no caption: "
                + (
                    "loosen the rules under captions that left theirs out"
                    if self.left_out
                    else "name a table in captions.file, or put a .txt file beside each video"
                )
            )
        if not self.counts["kept"]:
            lines.append("warning: no clip was kept, so the snapshot is empty; the reasons are above")
        if self.left_out:
            told = ", ".join(f"{count} {why}" for why, count in self.left_out.items())
            lines.append(f"captions left out: {told}")
        if self.caption_cost:
            lines.append(f"captions by the endpoint cost {self.caption_cost:.2f}")
        return "\n".join(lines)


def curate(config: CurateConfig, tell: Callable[[str], None] = lambda _: None) -> CurateResult:
    """Run what is not yet done of a curation, and publish; ``tell`` is told in words what goes on before the bars.

    Raises:
        UserError: if sources, captions, models or dataset are not usable; nothing was begun.
        JobError: if a stage failed, or a disk or store. What was done is kept; the same call continues.
    """
    with storage_errors_as(JobError, CONTINUE):
        listing, curation = prepare(config, tell)
        tell("starting Ray" if not os.environ.get("RAY_ADDRESS") else "joining the Ray cluster")
        with (
            joining(_places(config), config.cluster),
            dataset_lock(config.dataset),
            connect(),
            RunLog(config.dataset).record() as log,
        ):
            done = curation.run(listing, log)
            content, captions, computed = curation.content(done), done.captions, done.computed
            del done  # which weighs more than what is published of it
            snapshot = write_snapshot(config.dataset, content, config.publish)
    manifest = snapshot.manifest
    return CurateResult(
        snapshot_uri=snapshot.uri,
        snapshot_id=manifest.snapshot_id,
        counts=manifest.ledger.counts,
        reasons=count_reasons([content.ledger]),
        tokenizer=manifest.tokenizer,
        reconstruction=read_reconstruction([content.ledger]),
        uncaptioned=pc.sum(pc.equal(pc.list_value_length(content.clips["captions"]), 0)).as_py() or 0,
        left_out=captions.left_out,
        caption_cost=captions.cost(config.captions.endpoint),
        rows={name: total.rows for name, total in manifest.totals.items()},
        tokens={name: total.tokens for name, total in manifest.totals.items()},
        computed=computed,
    )


def _places(config: CurateConfig) -> dict[str, str | None]:
    """What the machines of a cluster share of a curation, by the keys that name it."""
    features = config.features
    return {
        "source.path": config.source.path,
        "dataset": config.dataset,
        "tokens.tokenizer.path": config.tokens.tokenizer.path,
        "split.weights": config.split.weights,
        "features.clip.weights": features.clip.weights,
        "features.aesthetic_head": features.aesthetic_head,
        "features.nsfw_head": features.nsfw_head,
        "features.text_detector": features.text_detector,
        "captions.coca.weights": config.captions.coca.weights if "coca" in config.captions.captioners else None,
    }


def prepare(config: CurateConfig, tell: Callable[[str], None] = lambda _: None) -> tuple[pa.Table, Curation]:
    """The listing of the sources and the steps of their curation.

    All that can be checked without work is: a ``UserError`` says what of sources, captions or models is not usable.
    """
    for name in config.captions.captioners:
        captioner_named(name)
    s3.check_store(config.dataset)
    listing = list_sources(config.source)
    size = pc.sum(pc.max_element_wise(listing["size"], 0)).as_py()
    tell(f"{listing.num_rows} files" + (f" of {size / 1e6:.1f} MB" if size else "") + "; checking captions and models")
    overrides = read_overrides(config.overrides, listing) if config.overrides else None
    captions = CaptionSource("given", {})
    if "given" in config.captions.captioners:
        captions = find_captions(config.captions, config.source, listing)
    if config.captions.require and config.captions.captioners == ("given",) and not captions.texts:
        raise UserError(
            f"captions.require is true, but there are no captions for {config.source.path}: name a table in "
            "captions.file, put a .txt file beside each video, or set captions.require=false"
        )
    try:
        tokenizer = load_tokenizer_info(config.tokens.tokenizer)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"tokens.tokenizer: {error}") from error
    if config.split.weights:
        try:
            load_transnet(local_path(config.split.weights))
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"split.weights: {error}") from error
    return listing, Curation(config, captions, tokenizer, overrides)
