"""Ray Data ingest: descriptors of steps in, packed batches out, in order, from any step on.

Each worker has a dataset of its own: the numbers of the steps still to come. One loader actor per worker turns a step
number into that worker's share of the step (plan, rows, captions, masks). Since everything follows from the step's
number, a resume begins where it should on any number of workers, and nothing is skipped or read twice.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from lumos.batch import PackedBatch
from lumos.compression import VideoSize
from lumos.layout import TAIL, SequenceLayout, build_sequence, header_tokens, prompt_text, video_layout
from lumos.masking import sample_masked_positions
from lumos.tokenizers.text import TextTokenizer
from pipelines.data.snapshot.read import Shard, Snapshot
from pipelines.streams import numpy_stream, torch_stream
from pipelines.training.batch_plan import BatchPlan, PlannedStep, rank_rows
from pipelines.training.prepare import PreparedRun
from pipelines.training.step import StepBatch

_COLUMNS = ["clip_id", "captions", "fps", "codes"]
_CACHED_BYTES = 512 << 20  # shard tables a loader keeps
_STORE_BYTES = 256 << 20  # prepared batches a worker's dataset may keep ahead in the object store


class StepLoader:
    """Turns step numbers into one worker's packed batches; opened in the actor that runs it."""

    def __init__(self, run: PreparedRun, rank: int) -> None:
        torch.set_num_threads(1)
        self.run, self.rank = run, rank
        self.plan = BatchPlan.from_manifest(run.snapshot.manifest, run.config)
        self.text_tokenizer = TextTokenizer(run.text_tokenizer)
        self.shards = ShardCache(run.snapshot)

    def __call__(self, table: pa.Table) -> pa.Table:
        """One output row per step number."""
        return pa.Table.from_pylist([self.load(step) for step in table["step"].to_pylist()], schema=_SCHEMA)

    def load(self, index: int) -> dict[str, Any]:
        """This worker's share of one step as a row of the output table."""
        step, config = self.plan.step(index), self.run.config
        share = rank_rows(step.rows, rank=self.rank, num_workers=config.num_workers, micro_batch=config.micro_batch)
        documents = []
        for rows in share:
            # Documents of equal length have equal layouts, and neighbours of equal layout are attended together.
            documents += sorted((self._document(step, row) for row in rows), key=lambda document: len(document[0]))
        return {
            "step": index,
            "epoch": step.epoch,
            "shape": list(step.bucket.shape),
            "lengths": [len(ids) for ids, _ in documents],
            "ids": np.concatenate([ids for ids, _ in documents]),
            "masked": np.concatenate([masked for _, masked in documents]),
        }

    def _document(self, step: PlannedStep, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a row of the step, and where they are masked."""
        config, bucket, row_id = self.run.config, step.bucket, step.row_id(row)
        record = self.shards.row(self.run.snapshot.manifest.buckets[bucket.index].shards, row)
        stream = numpy_stream(config.seed, "caption", step.index, row_id)
        drop = stream.random() < config.data.caption_drop or not record["captions"]
        caption = None if drop else record["captions"][stream.integers(len(record["captions"]))]["text"]
        ids, layout = self.sequence(record, bucket.shape, caption)
        masked = sample_masked_positions(layout, config.mask, torch_stream(config.seed, "mask", step.index, row_id))
        return ids.numpy().astype(np.int32), masked.numpy()

    def sequence(
        self, record: dict[str, Any], shape: tuple[int, int, int], caption: str | None
    ) -> tuple[torch.Tensor, SequenceLayout]:
        """Tokens and layout of a row of a shard, under one caption or none."""
        codes = np.asarray(record["codes"], dtype=np.int64).reshape(shape)
        text_ids = [] if caption is None else self._text_ids(caption, shape, record["fps"])
        try:
            return build_sequence(self.run.vocabulary, text_ids, codes, fps=record["fps"], drop_text=caption is None)
        except ValueError as error:
            raise ValueError(f"clip {record['clip_id']} of {self.run.snapshot.uri}: {error}") from error

    def _text_ids(self, caption: str, shape: tuple[int, int, int], fps: float) -> list[int]:
        """The encoded prompt, cut to what the model can read beside the frames, which stay whole."""
        text = prompt_text(self.run.config.data.prompt_template, caption, VideoSize.of_latents(shape, fps))
        header = header_tokens(self.run.vocabulary, [], num_latents=1, fps=1.0)
        room = self.run.model.max_seq_len - video_layout(len(header), shape, tail=TAIL).length
        return self.text_tokenizer.encode(text)[:room]


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


def step_batches(run: PreparedRun, *, rank: int, start: int) -> Iterator[StepBatch]:
    """One worker's batches of the steps from ``start`` on, in order; none where the run ends before.

    Raises:
        RuntimeError: if a step comes out of turn.
    """
    resources, stop = run.config.resources, run.config.steps
    if start >= stop:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_STORE_BYTES)
    source = StepSource(start, stop, resources.steps_per_block)
    dataset = ray.data.read_datasource(source, num_cpus=resources.cpus_per_loader, concurrency=1).map_batches(
        StepLoader,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(run, rank),
        compute=ActorPoolStrategy(size=1),
        num_cpus=resources.cpus_per_loader,
    )
    tables = dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=resources.prefetch_steps)
    expected = start
    for table in tables:
        batch = unpack(table, run.config.micro_batch)
        if batch.step != expected:
            raise RuntimeError(f"ingest delivered step {batch.step} where step {expected} was due")
        expected += 1
        yield batch
    if expected != stop:
        raise RuntimeError(f"ingest ended at step {expected}, {stop} were planned")


def unpack(table: pa.Table, micro_batch: int) -> StepBatch:
    """The batch in a one-row table of a loader, cut into micro-batches of so many documents."""
    (row,) = table.select(["step", "epoch", "shape", "lengths"]).to_pylist()
    ids = torch.from_numpy(table["ids"][0].values.to_numpy().astype(np.int64))
    masked = torch.from_numpy(table["masked"][0].values.to_numpy(zero_copy_only=False))
    shape, lengths = tuple(row["shape"]), row["lengths"]
    body = video_layout(0, shape, tail=TAIL).length
    layouts = {length: video_layout(length - body, shape, tail=TAIL) for length in set(lengths)}
    groups = [lengths[first : first + micro_batch] for first in range(0, len(lengths), micro_batch)]
    sizes = [sum(group) for group in groups]
    micro_batches = tuple(
        PackedBatch(micro_ids, micro_masked, tuple(layouts[length] for length in group))
        for group, micro_ids, micro_masked in zip(groups, ids.split(sizes), masked.split(sizes), strict=True)
    )
    return StepBatch(step=row["step"], epoch=row["epoch"], micro_batches=micro_batches)
