"""A curation under way: what its steps share, and what each leaves for those after it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.cluster import is_joined
from pipelines.data.config import CurateConfig
from pipelines.data.settings import EndpointConfig
from pipelines.data.stage.columns import take
from pipelines.data.stage.log import RunLog
from pipelines.data.stage.run import TooManyFailuresError, run_stage
from pipelines.data.stage.stage import WORK_KEY, Stage
from pipelines.data.stage.table import StageTable, anti_join
from pipelines.data.steps.clips import Clips
from pipelines.errors import JobError, UserError


@dataclass(frozen=True)
class Check:
    """Whether what a stage needs is there, found out before any work."""

    stage: str  # its name
    test: Callable[[], object]  # raises a UserError if it is not; that counts only while the stage has work left
    costly: bool = False  # whether the test is left out once the stage has done something, as it loads a model


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The captions of clips."""

    clips: NDArray[np.int64]  # their numbers, ascending
    of: pa.ChunkedArray  # of each, captions fit to be used, in the order of the captioners, as ``schemas.CAPTIONS``
    faults: dict[int, tuple[str, str]]  # by clip without any: status and reason, as the ledger tells it
    left_out: dict[str, int]  # captions not used, by why
    input_tokens: int  # that endpoints counted for these clips
    output_tokens: int

    def take(self, clips: NDArray[np.int64]) -> pa.ChunkedArray:
        """The captions of some of the clips."""
        return take(self.of, np.searchsorted(self.clips, clips))

    def cost(self, prices: EndpointConfig) -> float:
        """What they cost at these prices, in their currency."""
        return (self.input_tokens * prices.input_price + self.output_tokens * prices.output_price) / 1e6


@dataclass
class Run:
    """What the steps of a curation work on, and what each leaves for those after it."""

    config: CurateConfig
    stages: Mapping[str, Stage]  # by name, all stages of all steps
    unready: Mapping[str, UserError]  # by stage, why it could do no work
    listing: pa.Table  # every file that was named
    log: RunLog  # where to note how far it is
    computed: dict[str, int] = field(init=False, default_factory=dict)  # by stage, inputs that this run computed
    sources: pa.Table = field(init=False)  # files that may be used, with ``source_id`` or ``error``
    removed: pa.Table = field(init=False)  # those that were taken out of the dataset
    first: pa.Table = field(init=False)  # one row per content
    failed: pa.Table = field(init=False)  # the split stage's rows of sources without clips
    clips: Clips = field(init=False)  # all of them
    # Of each source that has one, its duplicate group, by which its split is drawn.
    groups: dict[str, str] = field(init=False, default_factory=dict)
    captions: Captions = field(init=False)  # of the clips that got so far
    # What the token stage made of the kept clips, without codes, which are in ``file``; ``clip`` numbers the clips.
    tokens: pa.Table = field(init=False)

    def table(self, name: str) -> StageTable:
        """The table of a stage."""
        return StageTable(self.config.dataset, self.stages[name])

    def compute(self, name: str, inputs: pa.Table, *, total: float | None = None, failed: int = 0) -> StageTable:
        """Bring a stage's table up to date with its inputs, of which the share may fail that the run bears.

        The share is one of ``total`` if that is told, of which ``failed`` have failed before this stage; if it is
        infinite, all may fail.

        Raises:
            UserError: what it needs is not there, and there is work left.
            JobError: a worker failed, or more inputs than the run bears.
        """
        table, config = self.table(name), self.config
        total = inputs.num_rows if total is None else total
        max_failed = config.resources.max_failed_share * total - failed if math.isfinite(total) else total
        if name in self.unready and anti_join(inputs, table.keys()).num_rows:
            raise self.unready[name]
        try:
            self.computed[name] = run_stage(
                self.stages[name],
                inputs,
                dataset=config.dataset,
                progress=config.progress,
                log=self.log,
                max_failed=max_failed,
            )
        except TooManyFailuresError as error:
            raise self.too_many(error.reason, failed + error.count, int(total), name) from error
        return table

    def too_many(self, reason: str, count: int, total: int, where: str) -> JobError:
        """What ends a run in which too much failed."""
        return JobError(
            f"{count} of {total} sources or clips have failed by the stage {where}, more than "
            f"resources.max_failed_share = {self.config.resources.max_failed_share} allows; one of them: "
            f"{reason}. Something else than the videos may be wrong; if not, raise the share and give the same "
            "command again"
        )


class Step(ABC):
    """One step of a curation: a stage or more, what they need, and what follows from what they make."""

    stages: Sequence[Stage] = ()  # that it runs
    checks: Sequence[Check] = ()  # of what they need

    @abstractmethod
    def apply(self, run: Run) -> None:
        """Do its part: compute what is missing, decide what follows from it."""


def check_device(key: str, device: str) -> None:
    """See that this machine has a device; of a cluster that is joined, others may.

    Raises:
        UserError: if it has not, or torch knows no such device.
    """
    import torch  # here alone: it would come into the processes of stages that do without

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"{key}={device}: {str(error).splitlines()[0]}") from error
    if kind == "cuda" and not is_joined() and not torch.cuda.is_available():
        raise UserError(
            f"{key}={device}: torch finds no GPU on this machine; set {key}=cpu, or RAY_ADDRESS to a cluster that has "
            "one"
        )


def read_in_order(
    table: StageTable, columns: Sequence[str], keys: pa.ChunkedArray, *, parts: Sequence[str] | None = None
) -> pa.Table:
    """Some columns of a stage that makes one row of each input, in the order of the inputs' keys, each told once.

    ``parts`` are the table's files, for who goes by ``PART``.

    Raises:
        JobError: the table lacks a key.
    """
    pieces = table.pieces(columns, keys, parts=parts)
    found = [(places, rows.select([WORK_KEY, *columns])) for places, rows in pieces]
    every = np.concatenate([places for places, _ in found] or [np.zeros(0, np.int64)])
    _, first = np.unique(every, return_index=True)  # ascending; a key may have several rows, where it was given twice
    schema = table.readable.empty_table().select([WORK_KEY, *columns]).schema
    rows = pa.concat_tables([schema.empty_table(), *(rows for _, rows in found)])
    return take(rows, first)
