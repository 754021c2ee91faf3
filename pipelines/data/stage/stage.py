"""A stage: a pure function over rows, and what its table is named by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lumos.config import require
from pipelines.config import config_hash

Row = dict[str, Any]
RowFunction = Callable[[list[Row]], list[Row]]

WORK_KEY = "work_key"
WORK = "work"  # column that inputs may have: how much work each is, in whatever measure; for the time left
ERROR = "error"  # column of a table whose inputs may fail


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """What each process of one stage holds of the cluster, and how many processes there may be."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0  # or a share of one
    memory_mb: float | None = None  # that Ray sets aside for each
    min_workers: int = 1
    max_workers: int | None = None  # none: as many as the cluster can hold

    def __post_init__(self) -> None:
        require(self.num_cpus >= 0, f"num_cpus must not be negative, got {self.num_cpus}")
        require(self.num_gpus >= 0, f"num_gpus must not be negative, got {self.num_gpus}")
        require(self.num_cpus > 0 or self.num_gpus > 0, "num_cpus and num_gpus are both 0; a process needs one of them")
        require(self.memory_mb is None or self.memory_mb > 0, f"memory_mb must be positive, got {self.memory_mb}")
        require(self.min_workers >= 1, f"min_workers must be at least 1, got {self.min_workers}")
        most = self.max_workers
        require(most is None or most >= self.min_workers, f"max_workers must be at least min_workers, got {most}")

    @property
    def threads(self) -> int:
        """Of each process, where a model computes on the CPU."""
        return max(1, int(self.num_cpus))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pure function over rows, and what its table is named by."""

    name: str  # folder of its tables
    settings: dict[str, Any]  # all that its output depends on besides the rows, for JSON; its hash names the table
    schema: pa.Schema  # of the output, ``work_key`` among its columns
    # Picklable; given the URI of the stage's folder for side records, returns the function over a batch of rows. Called
    # once in each worker process, so models load there.
    function: Callable[[str], RowFunction]
    rows_per_part: int  # in one batch, at most; what is lost when a worker dies
    min_rows_per_part: int = 1  # below which a batch is not worth another worker
    # Column of inputs that names a file. Rows of one remote file that follow one another share a part where it holds
    # them, so that it is fetched once.
    file_column: str | None = None
    row_group_rows: int = 1 << 12  # of a part, that can be read alone: few where they are large
    resources: StageResources = field(default_factory=StageResources)
    stateful: bool = True  # whether workers are worth keeping (they hold a model or a child process)

    @property
    def hash(self) -> str:
        """Name of the configuration."""
        return config_hash({"stage": self.name, **self.settings})
