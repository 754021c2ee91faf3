"""What a plan of a training run is asked for: cluster, rows, model; from the command line, and the run's dataset."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lumos.config import ModelConfig
from lumos.tokenizers.text import EMBEDDED_FILE, TextTokenizer
from lumos.vocabulary import Vocabulary
from pipelines.data.snapshot.read import Manifest, open_snapshot
from pipelines.errors import UserError
from pipelines.training.accelerators import Accelerator, Cluster, parse_cluster
from pipelines.training.batch_plan import BatchPlan
from pipelines.training.config import TrainConfig


@dataclass(frozen=True)
class Rows:
    """Rows of one latent shape."""

    shape: tuple[int, int, int]
    weight: float = 1.0  # how many are seen in an epoch, to those of the same kind

    @property
    def kind(self) -> str:
        """Image or video."""
        return "image" if self.shape[0] == 1 else "video"

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a plan is asked for, besides the run's config."""

    model: ModelConfig
    codebook_size: int
    cells_per_unit: int  # sizes of frames are multiples of it
    rows: tuple[Rows, ...]
    cluster: Cluster
    mfu: float = 0.4  # of the exact count, over the whole step
    tokens: float | None = None  # budget; None: the config's steps
    caption_tokens: int = 200
    devices_per_node: int = 8
    dataset_bytes: float | None = None  # on disk, if known
    dataset_tokens: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is a share above 0 and at most 1, got {self.mfu}")
        if not self.rows:
            raise UserError("no rows to plan for: give --rows, such as --rows image:32x56 --rows video:7x32x56")
        if self.tokens is not None and not _is_size(self.tokens):
            raise UserError(f"--tokens must be a number above 0, got {self.tokens:g}")
        unit = self.cells_per_unit
        for rows in self.rows:
            if rows.shape[1] % unit or rows.shape[2] % unit:
                raise UserError(
                    f"--rows {rows}: the run's frames are whole numbers of {unit} cells each way (data.grid_unit)"
                )


def _is_size(value: float) -> bool:
    return 0 < value < math.inf


def parse_rows(text: str) -> Rows:
    """Rows such as ``image:32x56`` or ``video:7x32x56``, in latent cells.

    Raises:
        UserError: for any other text.
    """
    match = re.fullmatch(r"(?:image:(?:1x)?|video:(\d+)x)(\d+)x(\d+)", text.strip())
    sizes = (int(match[1] or 1), int(match[2]), int(match[3])) if match else (0, 0, 0)
    if not all(sizes):
        raise UserError(f"--rows {text!r}: give a kind and latent sizes, such as image:32x56 or video:7x32x56")
    return Rows(sizes)


def find_cluster(text: str, tflops: float | None, memory_gb: float | None) -> Cluster:
    """The cluster that is named, or a number of devices whose figures are told.

    Raises:
        UserError: if neither is the case.
    """
    if tflops is None and memory_gb is None:
        return parse_cluster(text)
    match = re.match(r"\s*(\d+)", text)
    if (
        match is None
        or int(match[1]) < 1
        or tflops is None
        or memory_gb is None
        or not (_is_size(tflops) and _is_size(memory_gb))
    ):
        raise UserError(
            f"--cluster {text!r} with --tflops {tflops} and --memory-gb {memory_gb}: for a device that is not known "
            "give both, above 0, and the number of devices"
        )
    return Cluster(int(match[1]), Accelerator("device", tflops, memory_gb))


def make_question(
    config: TrainConfig,
    cluster: Cluster,
    *,
    rows: Sequence[str] = (),
    tokens: float | None = None,
    mfu: float = 0.4,
    caption_tokens: int = 200,
    devices_per_node: int = 8,
) -> Question:
    """The question about a run, its rows told or those of its dataset.

    Raises:
        UserError: if its dataset or text tokenizer cannot be read, or there is too little to train on.
    """
    manifests = [] if rows else _manifests(config)
    codebook_size = manifests[0].tokenizer.codebook_size if manifests else Vocabulary.lumos1().codebook_size
    try:
        text_size = TextTokenizer.load(Path(config.data.text_tokenizer or EMBEDDED_FILE)).vocab_size
    except (FileNotFoundError, ValueError) as error:
        if config.data.vocabulary == "compact":
            raise UserError(f"data.text_tokenizer: {error}") from error
        text_size = 1  # the Lumos-1 vocabulary has its size, wherever the tokenizer is
    try:
        vocabulary = config.make_vocabulary(text_vocab_size=text_size, codebook_size=codebook_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Question(
        model=config.model.resolve(vocabulary.vocab_size, vocabulary.visual_start),
        codebook_size=codebook_size,
        cells_per_unit=vocabulary.cells_per_unit,
        rows=tuple(map(parse_rows, rows)) if rows else _rows_of(manifests, config),
        cluster=cluster,
        mfu=mfu,
        tokens=tokens,
        caption_tokens=caption_tokens,
        devices_per_node=devices_per_node,
        dataset_bytes=float(sum(b.bytes for m in manifests for b in m.buckets if b.split == config.data.split)),
        dataset_tokens=float(sum(b.tokens for m in manifests for b in m.buckets if b.split == config.data.split)),
    )


def _manifests(config: TrainConfig) -> list[Manifest]:
    uris = [source.dataset for source in config.data.sources] or [str(config.data.dataset)]
    try:
        return [open_snapshot(uri).manifest for uri in uris]
    except UserError as error:
        raise UserError(f"{error}. To plan without it, give --rows, such as --rows image:32x56") from error


def _rows_of(manifests: Sequence[Manifest], config: TrainConfig) -> tuple[Rows, ...]:
    counts: Counter[tuple[int, int, int]] = Counter()
    plan = BatchPlan.from_manifests(manifests, config)  # which heeds the weights of sources
    for bucket, steps in zip(plan.buckets, plan.steps, strict=True):
        counts[bucket.shape] += steps * bucket.batch  # type: ignore[assignment]
    return tuple(Rows(shape, float(number)) for shape, number in sorted(counts.items()))
