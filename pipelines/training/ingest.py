"""Ray Data ingest: descriptors of steps in, packed batches out, in order, from any step on.

Each worker has a dataset of its own: the numbers of the steps still to come, as a few stretches. One loader actor per
worker goes through them and makes of each number that worker's share of the step (plan, rows, captions, masks), a few
ahead of the training. Since everything follows from the step's number, a resume begins where it should on any number
of workers, and nothing is skipped or read twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from lumos.batch import PackedBatch
from lumos.compression import VideoSize
from lumos.layout import (
    TAIL,
    SequenceLayout,
    build_sequence,
    motion_level,
    motion_prompt,
    prompt_text,
    video_layout,
)
from lumos.masking import sample_masked_positions
from lumos.tokenizers.text import TextTokenizer
from pipelines.errors import UserError
from pipelines.streams import numpy_stream, torch_stream
from pipelines.training.batch_plan import PlannedStep, rank_rows
from pipelines.training.prepare import PreparedRun
from pipelines.training.rows import open_rows
from pipelines.training.step import StepBatch

# Stretches that the steps to come are cut into: what Ray Data keeps of them does not grow with their number. A loader
# that dies begins its stretch again.
_STRETCHES = 256
_STORE_BYTES = 256 << 20  # prepared batches a worker's dataset may keep ahead in the object store
# Of videos, trained without their motion prefix, so that a prompt may go without one.
_MOTION_DROP = 0.1


@dataclass(frozen=True)
class Document:
    """One row as the model reads it."""

    ids: np.ndarray
    masked: np.ndarray  # where it is masked
    text_tokens: int  # of the prompt, before it was cut to what the model can read
    cut: bool


class StepLoader:
    """Turns step numbers into one worker's packed batches; opened in the actor that runs it."""

    def __init__(self, run: PreparedRun, rank: int, num_workers: int) -> None:
        self.run, self.rank, self.num_workers = run, rank, num_workers
        self.plan = run.plan()
        self.text_tokenizer = TextTokenizer(run.text_tokenizer)
        motion = ["motion"] if run.config.data.motion_prefix else []
        self.rows = open_rows(run, ["clip_id", "captions", "fps", "codes", *motion])

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """The steps of some stretches, a few in each table, which is made when it is asked for."""
        for stretch in table.to_pylist():
            steps = range(stretch["first"], stretch["stop"])
            for start in range(0, len(steps), self.run.config.resources.steps_per_block):
                some = steps[start : start + self.run.config.resources.steps_per_block]
                yield pack([self.load(step) for step in some])

    def load(self, index: int) -> dict[str, Any]:
        """This worker's share of one step as a row of the output table."""
        step = self.plan.step(index)
        passes = self.run.micro_batches(step.bucket.shape, self.num_workers)
        share = rank_rows(step.rows, rank=self.rank, num_workers=self.num_workers, micro_batches=passes)
        documents: list[Document] = []
        for rows in share:
            # Documents of equal length have equal layouts, and neighbours of equal layout are attended together.
            documents += sorted((self.document(step, row) for row in rows), key=lambda document: len(document.ids))
        idle = passes - len(share)
        again = documents[: len(share[0])] * idle  # for passes in which other workers have rows and this one has none
        cut, longest = sum(document.cut for document in documents), max(each.text_tokens for each in documents)
        documents += again
        return {
            "step": index,
            "epoch": step.epoch,
            "shape": list(step.bucket.shape),
            "dataset": step.bucket.dataset,
            "rows": len(step.rows),
            "idle": idle,
            "sizes": [len(rows) for rows in share] + [len(share[0])] * idle,
            "lengths": [len(document.ids) for document in documents],
            "ids": np.concatenate([document.ids for document in documents]),
            "masked": np.concatenate([document.masked for document in documents]),
            "cut_captions": cut,
            "longest_caption": longest,
        }

    def document(self, step: PlannedStep, row: int) -> Document:
        """A row of a step as tokens, with the mask and the caption that this step draws for it."""
        config, bucket, row_id = self.run.config, step.bucket, step.row_id(row)
        record = self.rows[bucket.dataset].row(bucket.index, row)
        stream = numpy_stream(config.seed, "caption", step.index, row_id)
        drop = stream.random() < config.data.caption_drop or not record["captions"]
        caption = None if drop else record["captions"][stream.integers(len(record["captions"]))]["text"]
        with_motion = caption is not None and record.get("motion") is not None and stream.random() >= _MOTION_DROP
        ids, layout, text_tokens = self.sequence(bucket.dataset, record, bucket.shape, caption, motion=with_motion)
        masked = sample_masked_positions(layout, config.mask, torch_stream(config.seed, "mask", step.index, row_id))
        cut = text_tokens > self.run.model.max_seq_len - self.run.row_tokens(bucket.shape)
        return Document(ids.numpy().astype(np.int32), masked.numpy(), text_tokens, cut)

    def sequence(
        self,
        dataset: int,
        record: dict[str, Any],
        shape: tuple[int, int, int],
        caption: str | None,
        *,
        motion: bool = True,
    ) -> tuple[torch.Tensor, SequenceLayout, int]:
        """Tokens and layout of a row of a dataset under one caption or none, and the tokens of its prompt, uncut.

        The prompt is cut to what the model can read beside the frames, which stay whole. ``motion``: it says how much
        moves, if that is known of a video and the run has it so.
        """
        text_ids: list[int] = []
        if caption is not None:
            if motion and shape[0] > 1 and record.get("motion") is not None:
                caption = motion_prompt(caption, motion_level(record["motion"]))
            size = VideoSize.of_latents(shape, record["fps"])
            text_ids = self.text_tokenizer.encode(prompt_text(self.run.config.data.prompt_template, caption, size))
        shown = text_ids[: self.run.model.max_seq_len - self.run.row_tokens(shape)]
        codes = record["codes"].astype(np.int64).reshape(shape)
        try:
            ids, layout = build_sequence(
                self.run.vocabulary, shown, codes, fps=record["fps"], drop_text=caption is None
            )
        except ValueError as error:
            raise UserError(
                f"clip {record['clip_id']} of {self.run.datasets[dataset].uri}: {error}; publish the dataset again"
            ) from error
        return ids, layout, len(text_ids)


class _LoaderActor(StepLoader):
    """A loader in a process of its own, beside a worker that needs the cores."""

    def __init__(self, run: PreparedRun, rank: int, num_workers: int) -> None:
        torch.set_num_threads(1)
        super().__init__(run, rank, num_workers)


_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int64()),
        ("shape", pa.list_(pa.int32())),
        ("dataset", pa.int32()),
        ("rows", pa.int32()),
        ("idle", pa.int32()),  # of the micro-batches, those at the end that count nothing
        ("sizes", pa.list_(pa.int32())),  # documents of each micro-batch
        ("lengths", pa.list_(pa.int32())),  # tokens of each document
        ("ids", pa.list_(pa.int32())),
        ("masked", pa.list_(pa.bool_())),
        ("cut_captions", pa.int32()),
        ("longest_caption", pa.int32()),
    ]
)


class StepSource(Datasource):
    """The numbers ``start..stop-1`` in at most so many stretches, each a row of columns ``first`` and ``stop``."""

    def __init__(self, start: int, stop: int, stretches: int = _STRETCHES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cuts = [start + (stop - start) * i // stretches for i in range(stretches + 1)]

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all blocks."""
        return 16 * len(self.cuts)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One task per stretch; ``parallelism`` is Ray's wish, but their number is set."""
        return [_read_task(first, stop) for first, stop in pairwise(self.cuts) if first < stop]


def _read_task(first: int, stop: int) -> ReadTask:
    metadata = BlockMetadata(num_rows=1, size_bytes=16, input_files=None, exec_stats=None)
    schema = pa.schema([("first", pa.int64()), ("stop", pa.int64())])
    return ReadTask(lambda: [pa.table([[first], [stop]], schema=schema)], metadata, schema=schema)


def step_batches(run: PreparedRun, *, rank: int, num_workers: int, start: int) -> Iterator[StepBatch]:
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
    context.target_max_block_size = 1  # every table of a loader is a block of its own, there as soon as it is made
    dataset = ray.data.read_datasource(
        StepSource(start, stop), num_cpus=resources.cpus_per_loader, concurrency=1
    ).map_batches(
        _LoaderActor,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(run, rank, num_workers),
        compute=ActorPoolStrategy(size=1),
        num_cpus=resources.cpus_per_loader,
    )
    blocks = -(-resources.prefetch_steps // resources.steps_per_block)
    tables = dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=blocks)
    expected = start
    for batch in (batch for table in tables for batch in unpack(table)):
        if batch.step != expected:
            raise RuntimeError(f"ingest delivered step {batch.step} where step {expected} was due")
        expected += 1
        yield batch
    if expected != stop:
        raise RuntimeError(f"ingest ended at step {expected}, {stop} were planned")


def pack(steps: list[dict[str, Any]]) -> pa.Table:
    """Steps as a loader hands them over: a table of one row, which Ray Data does not cut."""
    rows = pa.RecordBatch.from_pylist(steps, schema=_SCHEMA).to_struct_array()
    return pa.table({"steps": pa.ListArray.from_arrays(pa.array([0, len(steps)], pa.int32()), rows)})


def unpack(table: pa.Table) -> Iterator[StepBatch]:
    """The batches in a table of a loader."""
    for chunk in table["steps"].chunks:
        steps = pa.Table.from_batches([pa.RecordBatch.from_struct_array(chunk.flatten())])
        yield from (_unpack_step(steps.slice(row, 1)) for row in range(steps.num_rows))


def _unpack_step(table: pa.Table) -> StepBatch:
    (row,) = table.drop_columns(["ids", "masked"]).to_pylist()
    ids = torch.from_numpy(table["ids"][0].values.to_numpy().astype(np.int64))
    masked = torch.from_numpy(table["masked"][0].values.to_numpy(zero_copy_only=False))
    shape, lengths = tuple(row.pop("shape")), row.pop("lengths")
    body = video_layout(0, shape, tail=TAIL).length
    layouts = {length: video_layout(length - body, shape, tail=TAIL) for length in set(lengths)}
    ends = np.cumsum([0, *row.pop("sizes")]).tolist()
    groups = [lengths[first:stop] for first, stop in pairwise(ends)]
    sizes = [sum(group) for group in groups]
    micro_batches = tuple(
        PackedBatch(micro_ids, micro_masked, tuple(layouts[length] for length in group))
        for group, micro_ids, micro_masked in zip(groups, ids.split(sizes), masked.split(sizes), strict=True)
    )
    return StepBatch(**row, shape=shape, micro_batches=micro_batches)
