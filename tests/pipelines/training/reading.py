"""What many workers decode of a snapshot in an epoch, for tests on several filesystems."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lumos.config import TokenizerInfo
from pipelines.data.settings import PublishConfig
from pipelines.data.snapshot.write import write_snapshot
from pipelines.training.batch_plan import rank_rows
from pipelines.training.config import TrainConfig
from pipelines.training.prepare import prepare
from pipelines.training.rows import open_rows
from tests.pipelines.data.snapshots import snapshot_content
from tests.pipelines.training.runs import tiny_config

WORKERS = 48
VIDEO, IMAGE = (7, 16, 28), (1, 16, 28)
COLUMNS = ["clip_id", "captions", "fps", "codes"]


@dataclass
class Readings:
    """Of all workers together."""

    rows: int = 0
    own_bytes: int = 0  # of the rows that were consumed, decoded
    decoded_bytes: int = 0
    most_held: int = 0  # decoded bytes that one worker holds at the end


def publish(dataset: str, *, videos: int, images: int) -> None:
    """A snapshot of many shards, each of several row groups."""
    draw = np.random.default_rng(0)
    shapes = [VIDEO] * videos + [IMAGE] * images
    clips = {f"{number:05d}:0": draw.integers(0, 64000, shape) for number, shape in enumerate(shapes)}
    config = PublishConfig(val_share=0.0, shard_mb=0.4)
    tokenizer = TokenizerInfo("fsq", 64000, (4, 8, 8), "sha256:" + "0" * 64)
    write_snapshot(dataset, snapshot_content(clips, tokenizer=tokenizer, config=config), config)


def read_steps(dataset: str, steps: int | None = None) -> Readings:
    """Have every worker read its rows of so many steps (none: of an epoch), as its loader does."""
    config = tiny_config(Path("d"), Path("o"), global_batch=WORKERS, image_batch=2 * WORKERS, num_workers=WORKERS)
    config = replace(
        config,
        data=replace(config.data, dataset=dataset),
        model=replace(config.model, max_seq_len=8192),
        micro_batch_tokens=8192,
    )
    return _read(config, steps)


def _read(config: TrainConfig, steps: int | None) -> Readings:
    run = prepare(config)
    plan, found = run.plan(), Readings()
    planned = [plan.step(index) for index in range(steps or int(sum(plan.steps)))]
    for rank in range(WORKERS):
        (reader,) = open_rows(run, COLUMNS)
        for step in planned:
            (own,) = rank_rows(step.rows, rank=rank, num_workers=WORKERS, micro_batches=1)
            for row in own:
                record = reader.row(step.bucket.index, row)
                text = sum(len(caption["text"]) + len(caption["captioner"]) for caption in record["captions"])
                found.own_bytes += record["codes"].nbytes + text + len(record["clip_id"]) + 4
                found.rows += 1
        found.decoded_bytes += reader.decoded_bytes
        found.most_held = max(found.most_held, reader.held_bytes)
    return found
