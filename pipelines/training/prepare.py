"""Everything about a run that can be checked and worked out before a cluster is touched."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lumos.checkpoint import ModelInfo
from lumos.compression import CELL
from lumos.config import ModelConfig
from lumos.layout import build_sequence
from lumos.tokenizers import load_video_tokenizer
from lumos.tokenizers.text import EMBEDDED_FILE, TextTokenizer
from lumos.vocabulary import Vocabulary
from pipelines.config import config_to_dict
from pipelines.data.snapshot.read import Snapshot, open_snapshot
from pipelines.errors import UserError
from pipelines.storage import is_local
from pipelines.training.batch_plan import BatchPlan
from pipelines.training.config import TrainConfig
from pipelines.training.engine import check_engine
from pipelines.training.initialize import check_init_from


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that passed every check: all that its driver, workers and loaders need to know, the same for all."""

    config: TrainConfig
    snapshot: Snapshot
    vocabulary: Vocabulary
    text_tokenizer: str  # text of the tokenizer's JSON file
    model: ModelConfig
    info: ModelInfo  # goes with the finished model


def prepare(config: TrainConfig) -> PreparedRun:
    """Check a run's config against the world.

    Raises:
        UserError: for anything that would stop the run later: missing paths, a snapshot of another tokenizer, too few
            rows, frames the vocabulary cannot write, a checkpoint of another shape.
    """
    check_engine(config)
    snapshot = _open_snapshot(config)
    manifest = snapshot.manifest
    plan = BatchPlan.from_manifest(manifest, config)
    text_file = Path(config.data.text_tokenizer or EMBEDDED_FILE)
    try:
        text = TextTokenizer.load(text_file)
        codebook_size = manifest.tokenizer.codebook_size
        vocabulary = config.make_vocabulary(text_vocab_size=text.vocab_size, codebook_size=codebook_size)
        model = config.model.resolve(vocabulary.vocab_size, vocabulary.visual_start)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    fps = _check_shapes(snapshot, plan, vocabulary, model)
    if config.init_from is not None:
        check_init_from(config.init_from, model, vocabulary)
    info = ModelInfo(
        prompt_template=config.data.prompt_template,
        shapes=tuple(bucket.shape for bucket in plan.buckets),
        fps=fps,
        tokenizer=manifest.tokenizer,
        text_tokenizer_hash=text.hash,
        sampling=config.recommended_sampling,
        dataset_digest=snapshot.digest,
        train_config=config_to_dict(config),
    )
    return PreparedRun(
        config=config,
        snapshot=snapshot,
        vocabulary=vocabulary,
        text_tokenizer=text_file.read_text(encoding="utf-8"),
        model=model,
        info=info,
    )


def _open_snapshot(config: TrainConfig) -> Snapshot:
    try:
        tokenizer = load_video_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"data.tokenizer: {error}") from error
    snapshot = open_snapshot(config.data.dataset, expected_tokenizer=tokenizer)
    if is_local(snapshot.uri):  # workers have another working directory
        snapshot = replace(snapshot, uri=os.path.abspath(snapshot.uri.removeprefix("file://")))
    return snapshot


def _check_shapes(snapshot: Snapshot, plan: BatchPlan, vocabulary: Vocabulary, model: ModelConfig) -> float:
    """Check that every bucket can be written as tokens; returns the frame rate of the largest bucket's first row."""
    rates: dict[int, float] = {}
    for bucket in plan.buckets:
        shape = bucket.shape
        first = snapshot.read_shard(snapshot.manifest.buckets[bucket.index].shards[0], columns=["fps"])
        fps = rates[bucket.num_rows] = float(first["fps"][0].as_py())
        try:
            ids, _ = build_sequence(vocabulary, [], np.zeros(shape, dtype=np.int64), fps=fps)
        except ValueError as error:
            raise UserError(
                f"bucket {shape[0]}x{shape[1]}x{shape[2]} of snapshot {snapshot.manifest.snapshot_id}: {error}; set "
                f"data.grid_unit to {CELL * math.gcd(shape[1], shape[2])} px or a divisor of it that is a multiple of "
                f"{CELL}"
            ) from error
        if len(ids) > model.max_seq_len:
            raise UserError(
                f"bucket {shape[0]}x{shape[1]}x{shape[2]} ({shape[2] * CELL}x{shape[1] * CELL} px) makes sequences of "
                f"{len(ids)} tokens and more, model.max_seq_len is {model.max_seq_len}: raise it, or curate shorter or "
                "smaller clips"
            )
    return rates[max(rates)]
