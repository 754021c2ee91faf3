"""Ray Data ingest: descriptors of steps in, packed batches out, in order, from any step on.

Each worker has a dataset of its own: the numbers of the steps still to come. One loader actor per worker turns a step
number into that worker's share of the step (plan, rows, captions, masks). Since everything follows from the step's
number, a resume begins where it should on any number of workers, and nothing is skipped or read twice.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from lumos.compression import CELL, num_source_frames
from lumos.config import MaskConfig
from lumos.layout import (
    SequenceLayout,
    build_sequence,
    header_tokens,
    prompt_text,
    video_layout,
)
from lumos.masking import sample_masked_positions
from lumos.tokenizers.text import TextTokenizer
from lumos.vocabulary import Vocabulary
from pipelines.data.snapshot.read import Shard, Snapshot
from pipelines.streams import numpy_stream, torch_stream
from pipelines.training.batch_plan import BatchPlan, PlannedStep, rank_rows
from pipelines.training.config import DataConfig
from pipelines.training.step import PackedBatch, StepBatch

_COLUMNS = ["clip_id", "captions", "fps", "codes"]
_CACHED_BYTES = 512 << 20  # shard tables a loader keeps
_STORE_BYTES = 256 << 20  # prepared batches a worker's dataset may keep ahead in the object store
_TAIL = 2  # tokens after the last frame


@dataclass(frozen=True)
class IngestSpec:
    """Everything a loader needs to know; the same for all workers."""

    snapshot: Snapshot
    data: DataConfig
    mask: MaskConfig
    vocabulary: Vocabulary
    text_tokenizer: str  # text of the tokenizer's JSON file
    max_seq_len: int  # tokens of a document; what of a caption exceeds them is cut off
    seed: int
    global_batch: int
    micro_batch: int
    num_workers: int


class StepLoader:
    """Turns step numbers into one worker's packed batches; opened in the actor that runs it."""

    def __init__(self, spec: IngestSpec, rank: int) -> None:
        torch.set_num_threads(1)
        self.spec = spec
        self.rank = rank
        self.snapshot = spec.snapshot
        self.plan = BatchPlan.from_manifest(
            self.snapshot.manifest, split=spec.data.split, seed=spec.seed, global_batch=spec.global_batch
        )
        self.text_tokenizer = TextTokenizer(spec.text_tokenizer)
        self.shards = ShardCache(self.snapshot)

    def __call__(self, table: pa.Table) -> pa.Table:
        """One output row per step number."""
        return pa.Table.from_pylist([self.load(step) for step in table["step"].to_pylist()], schema=_SCHEMA)

    def load(self, index: int) -> dict[str, Any]:
        """This worker's share of one step as a row of the output table."""
        step = self.plan.step(index)
        micro_batches = rank_rows(
            step.rows, rank=self.rank, num_workers=self.spec.num_workers, micro_batch=self.spec.micro_batch
        )
        # Documents of equal length have equal layouts, and neighbours of equal layout are attended together.
        documents = [
            document
            for rows in micro_batches
            for document in sorted(self._documents(step, rows), key=lambda d: len(d[0]))
        ]
        return {
            "step": index,
            "epoch": step.epoch,
            "shape": list(step.bucket.shape),
            "lengths": [len(ids) for ids, _ in documents],
            "ids": np.concatenate([ids for ids, _ in documents]),
            "masked": np.concatenate([masked for _, masked in documents]),
        }

    def _documents(self, step: PlannedStep, rows: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for row in rows:
            ids, layout = self._sequence(step, row)
            generator = torch_stream(self.spec.seed, "mask", step.index, step.row_id(row))
            masked = sample_masked_positions(layout, self.spec.mask, generator)
            yield ids.numpy().astype(np.int32), masked.numpy()

    def _sequence(self, step: PlannedStep, row: int) -> tuple[torch.Tensor, SequenceLayout]:
        bucket = step.bucket
        record = self.shards.row(self.snapshot.manifest.buckets[bucket.index].shards, row)
        codes = np.asarray(record["codes"], dtype=np.int64).reshape(bucket.shape)
        stream = numpy_stream(self.spec.seed, "caption", step.index, step.row_id(row))
        drop = stream.random() < self.spec.data.caption_drop or not record["captions"]
        text_ids: list[int] = []
        if not drop:
            caption = record["captions"][stream.integers(len(record["captions"]))]["text"]
            text_ids = self.text_tokenizer.encode(self._prompt(caption, bucket.shape, record["fps"]))
            text_ids = text_ids[: self.spec.max_seq_len - self._body(bucket.shape)]  # the frames stay whole
        try:
            return build_sequence(self.spec.vocabulary, text_ids, codes, fps=record["fps"], drop_text=drop)
        except ValueError as error:
            raise ValueError(f"clip {record['clip_id']} of {self.snapshot.uri}: {error}") from error

    def _body(self, shape: tuple[int, int, int]) -> int:
        """Tokens of a document besides its text."""
        frames, rows, cols = shape
        header = header_tokens(self.spec.vocabulary, [], num_latents=1, fps=1.0)
        return video_layout(len(header), num_latents=frames, rows=rows, cols=cols, tail=_TAIL).length

    def _prompt(self, caption: str, shape: tuple[int, int, int], fps: float) -> str:
        frames, rows, cols = shape
        return prompt_text(
            self.spec.data.prompt_template,
            caption,
            width=cols * CELL,
            height=rows * CELL,
            num_frames=num_source_frames(frames),
            fps=fps,
        )


_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int64()),
        ("shape", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),  # tokens of each document
        ("ids", pa.list_(pa.int32())),
        ("masked", pa.list_(pa.bool_())),
    ]
)


class ShardCache:
    """The shard tables used last, up to a number of bytes."""

    def __init__(self, snapshot: Snapshot, max_bytes: int = _CACHED_BYTES) -> None:
        self.snapshot = snapshot
        self.max_bytes = max_bytes
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()

    def row(self, shards: Iterable[Shard], row: int) -> dict[str, Any]:
        """Row ``row`` of a bucket whose rows lie in ``shards``, one after another."""
        for shard in shards:
            if row < shard.rows:
                return dict(self._table(shard).slice(row, 1).to_pylist()[0])
            row -= shard.rows
        raise IndexError("row beyond the bucket's last shard")

    def _table(self, shard: Shard) -> pa.Table:
        table = self._tables.pop(shard.path, None)
        if table is None:
            table = self.snapshot.read_shard(shard, columns=_COLUMNS)
        self._tables[shard.path] = table
        while len(self._tables) > 1 and sum(held.nbytes for held in self._tables.values()) > self.max_bytes:
            self._tables.popitem(last=False)
        return table


class StepSource(Datasource):
    """The numbers ``start..stop-1`` as a column ``step``, a few to a block."""

    def __init__(self, start: int, stop: int, steps_per_block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.start, self.stop, self.steps_per_block = start, stop, steps_per_block

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all blocks."""
        return 8 * (self.stop - self.start)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One task per block; ``parallelism`` is Ray's wish, but the size of a block is set."""
        return [
            _read_task(first, min(first + self.steps_per_block, self.stop))
            for first in range(self.start, self.stop, self.steps_per_block)
        ]


def _read_task(first: int, stop: int) -> ReadTask:
    count = stop - first
    metadata = BlockMetadata(num_rows=count, size_bytes=8 * count, input_files=None, exec_stats=None)
    return ReadTask(
        lambda: [pa.table({"step": np.arange(first, stop)})], metadata, schema=pa.schema([("step", pa.int64())])
    )


def step_batches(
    spec: IngestSpec, *, rank: int, start: int, stop: int, num_cpus: float, steps_per_block: int, prefetch_steps: int
) -> Iterator[StepBatch]:
    """One worker's batches of the steps ``start..stop-1``, in order.

    Args:
        spec: what to load.
        rank: the worker.
        start: first step.
        stop: step after the last.
        num_cpus: CPUs its loader reserves.
        steps_per_block: steps a loader prepares in one call.
        prefetch_steps: steps held ready in this process.

    Raises:
        RuntimeError: if a step comes out of turn.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_STORE_BYTES)
    source = StepSource(start, stop, steps_per_block)
    dataset = ray.data.read_datasource(source, num_cpus=num_cpus, concurrency=1).map_batches(
        StepLoader,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(spec, rank),
        compute=ActorPoolStrategy(size=1),
        num_cpus=num_cpus,
    )
    expected = start
    for table in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=prefetch_steps):
        batch = unpack(table, spec)
        if batch.step != expected:
            raise RuntimeError(f"ingest delivered step {batch.step} where step {expected} was due")
        expected += 1
        yield batch
    if expected != stop:
        raise RuntimeError(f"ingest ended at step {expected}, {stop} were planned")


def unpack(table: pa.Table, spec: IngestSpec) -> StepBatch:
    """The batch in a one-row table of a loader."""
    frames, rows, cols = table["shape"][0].as_py()
    lengths = table["lengths"][0].as_py()
    ids = torch.from_numpy(table["ids"][0].values.to_numpy().astype(np.int64))
    masked = torch.from_numpy(table["masked"][0].values.to_numpy(zero_copy_only=False))
    body = video_layout(0, num_latents=frames, rows=rows, cols=cols, tail=_TAIL).length
    layouts = {
        length: video_layout(length - body, num_latents=frames, rows=rows, cols=cols, tail=_TAIL)
        for length in set(lengths)
    }
    micro_batches, position = [], 0
    for first in range(0, len(lengths), spec.micro_batch):
        sizes = lengths[first : first + spec.micro_batch]
        end = position + sum(sizes)
        micro_batches.append(
            PackedBatch(ids[position:end], masked[position:end], tuple(layouts[length] for length in sizes))
        )
        position = end
    step, epoch = table["step"][0].as_py(), table["epoch"][0].as_py()
    return StepBatch(step=step, epoch=epoch, micro_batches=tuple(micro_batches))
