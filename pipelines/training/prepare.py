"""Everything about a run that can be checked and worked out before a cluster is touched."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lumos.checkpoint import ModelInfo
from lumos.compression import CELL
from lumos.config import ModelConfig
from lumos.layout import TAIL, build_sequence, header_tokens, video_layout
from lumos.tokenizers.text import EMBEDDED_FILE, TextTokenizer
from lumos.vocabulary import Vocabulary
from pipelines.config import config_to_dict
from pipelines.data.snapshot.read import MANIFEST, Snapshot, TokenizerIdentity, open_snapshot
from pipelines.data.snapshot.rows import RowReader
from pipelines.errors import UserError
from pipelines.storage import exists, is_local, join, s3
from pipelines.storage.cache import local_path
from pipelines.tokenizers import load_tokenizer
from pipelines.training.batch_plan import BatchPlan
from pipelines.training.config import TrainConfig
from pipelines.training.engine import check_engine
from pipelines.training.initialize import check_init_from
from pipelines.training.precision import with_precision


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that passed every check: all that its driver, workers and loaders need to know, the same for all."""

    config: TrainConfig
    datasets: tuple[Snapshot, ...]  # of ``data.sources`` in their order, or the one of ``data.dataset``
    vocabulary: Vocabulary
    text_tokenizer: str  # text of the tokenizer's JSON file
    model: ModelConfig
    info: ModelInfo  # goes with the finished model

    @property
    def dataset_digest(self) -> str:
        """What identifies the data: of one snapshot its digest, of several the hash of their digests in order."""
        return _joint_digest(self.datasets)

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """A short name of each dataset, for records: its folder's, numbered where two have the same."""
        places = [(snapshot.dataset or snapshot.uri).rstrip("/").rpartition("/")[2] for snapshot in self.datasets]
        return tuple(
            f"{name}-{number}" if places.count(name) > 1 else name for number, name in enumerate(places, start=1)
        )

    def plan(self) -> BatchPlan:
        """Which rows each step sees."""
        return BatchPlan.from_manifests([snapshot.manifest for snapshot in self.datasets], self.config)

    def row_tokens(self, shape: tuple[int, int, int]) -> int:
        """Tokens of a row of a bucket beside those of its caption."""
        return _row_tokens(self.vocabulary, shape)

    def micro_batches(self, shape: tuple[int, int, int], num_workers: int) -> int:
        """Forward passes of a worker in a step of a bucket, as many on every worker."""
        rows = -(-self.config.batch_rows(shape[0]) // num_workers)
        return -(-rows // self.rows_per_pass(shape))

    def rows_per_pass(self, shape: tuple[int, int, int]) -> int:
        """Most rows of a bucket in one forward pass."""
        return max(1, self.config.micro_batch_tokens // self.row_tokens(shape))


def prepare(config: TrainConfig) -> PreparedRun:
    """Check a run's config against the world.

    Raises:
        UserError: for anything that would stop the run later: missing paths, a snapshot of another tokenizer, too few
            rows, frames the vocabulary cannot write, a checkpoint of another shape.
    """
    config = with_precision(config)
    check_engine(config)
    datasets = _open_snapshots(config)
    plan = BatchPlan.from_manifests([snapshot.manifest for snapshot in datasets], config)
    s3.check_store(config.output)
    text_file = Path(local_path(config.data.text_tokenizer) if config.data.text_tokenizer else EMBEDDED_FILE)
    tokenizer = datasets[0].manifest.tokenizer
    try:
        text = TextTokenizer.load(text_file)
        vocabulary = config.make_vocabulary(text_vocab_size=text.vocab_size, codebook_size=tokenizer.codebook_size)
        model = config.model.resolve(vocabulary.vocab_size, vocabulary.visual_start)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    fps = _check_buckets(datasets, plan, config, vocabulary, model)
    begun = exists(join(os.path.expanduser(config.output), "run.json"))
    if config.init_from is not None and not begun:  # a run that goes on has its own weights
        s3.check_store(config.init_from)
        check_init_from(config.init_from, model, vocabulary, tokenizer)
    info = ModelInfo(
        prompt_template=config.data.prompt_template,
        motion_prefix=config.data.motion_prefix,
        # The first is what is drawn unless another is asked for: of a joint training a video.
        shapes=tuple(sorted(dict.fromkeys(bucket.shape for bucket in plan.buckets), key=lambda shape: shape[0] == 1)),
        fps=fps,
        tokenizer=tokenizer,
        text_tokenizer_hash=text.hash,
        sampling=config.recommended_sampling,
        dataset_digest=_joint_digest(datasets),
        train_config=config_to_dict(config),
    )
    return PreparedRun(
        config=config,
        datasets=datasets,
        vocabulary=vocabulary,
        text_tokenizer=text_file.read_text(encoding="utf-8"),
        model=model,
        info=info,
    )


def _open_snapshots(config: TrainConfig) -> tuple[Snapshot, ...]:
    tokenizer: TokenizerIdentity | None = None
    try:
        if config.data.tokenizer is not None:
            tokenizer = load_tokenizer(config.data.tokenizer)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"data.tokenizer: {error}") from error
    names = [source.dataset for source in config.data.sources] or [str(config.data.dataset)]
    snapshots: dict[str, Snapshot] = {}  # by digest
    for name in names:
        s3.check_store(name)  # within seconds; what reads it would wait for minutes
        if is_local(name) and os.path.isfile(name):
            raise UserError(
                f"data: dataset = {name} is a file; name the folder of a dataset, as `lumos curate` makes one"
            )
        snapshot = open_snapshot(name, expected_tokenizer=tokenizer)
        if is_local(snapshot.uri):  # workers have another working directory
            snapshot = replace(snapshot, uri=os.path.abspath(snapshot.uri.removeprefix("file://")))
        if snapshot.digest in snapshots:
            raise UserError(
                f"data.sources: {name} is the same snapshot as {snapshots[snapshot.digest].uri}: give it one entry, "
                "with a higher weight or repeat"
            )
        snapshots[snapshot.digest] = snapshot
        tokenizer = tokenizer or snapshot.manifest.tokenizer  # what the first has, all must have
    return tuple(snapshots.values())


def _joint_digest(snapshots: Sequence[Snapshot]) -> str:
    digests = [snapshot.digest for snapshot in snapshots]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _row_tokens(vocabulary: Vocabulary, shape: tuple[int, int, int]) -> int:
    header = header_tokens(vocabulary, [], num_latents=1, fps=1.0)
    return video_layout(len(header), shape, tail=TAIL).length


def _check_buckets(
    datasets: Sequence[Snapshot], plan: BatchPlan, config: TrainConfig, vocabulary: Vocabulary, model: ModelConfig
) -> float:
    """Check that the rows of every bucket can be trained on; returns the frame rate of the largest one's first row."""
    rates: dict[int, float] = {}
    readers = [RowReader(snapshot, ["clip_id", "fps", "codes"], max_bytes=0) for snapshot in datasets]
    for bucket in plan.buckets:
        snapshot, shape = datasets[bucket.dataset], bucket.shape
        t, h, w = shape
        name = f"bucket {t}x{h}x{w} of snapshot {snapshot.manifest.snapshot_id}"
        row = readers[bucket.dataset].row(bucket.index, 0)
        fps = rates[bucket.num_rows] = float(row["fps"])
        if (highest := int(row["codes"].max())) >= vocabulary.codebook_size:
            raise UserError(
                f"{join(snapshot.uri, MANIFEST)} says codebook_size = {vocabulary.codebook_size} of the tokenizer, and "
                f"clip {row['clip_id']} has the code {highest}: the file was changed; publish the dataset again"
            )
        try:
            build_sequence(vocabulary, [], np.zeros(shape, dtype=np.int64), fps=fps)
        except ValueError as error:
            raise UserError(
                f"{name}: {error}; set data.grid_unit to {CELL * math.gcd(h, w)} px or a divisor of it that is a "
                f"multiple of {CELL}"
            ) from error
        tokens = _row_tokens(vocabulary, shape)
        if tokens > model.max_seq_len:
            raise UserError(
                f"{name} ({w * CELL}x{h * CELL} px) makes sequences of {tokens} tokens and more, model.max_seq_len is "
                f"{model.max_seq_len}: raise it, or curate shorter or smaller clips"
            )
        if tokens > config.micro_batch_tokens:
            raise UserError(
                f"{name} has rows of {tokens} tokens, more than micro_batch_tokens = {config.micro_batch_tokens}: set "
                f"it to at least {tokens}, or curate shorter or smaller clips"
            )
        manifest_bucket = snapshot.manifest.buckets[bucket.index]
        if config.data.motion_prefix and t > 1 and not readers[bucket.dataset].has_column(manifest_bucket, "motion"):
            raise UserError(
                f"data.motion_prefix: snapshot {snapshot.uri} was published without motion scores: give the `lumos "
                "curate` that made it again, which publishes it with them, or set data.motion_prefix to false"
            )
    return rates[max(rates)]
