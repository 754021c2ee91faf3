"""What a plan of a training run is asked for: cluster, rows, model; from the command line, and the run's dataset."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumos.config import ModelConfig, TokenizerConfig
from lumos.tokenizers.text import EMBEDDED_FILE, TextTokenizer
from lumos.vocabulary import Vocabulary
from pipelines.data.snapshot.read import Manifest, open_snapshot
from pipelines.errors import UserError
from pipelines.storage.cache import local_path
from pipelines.tokenizers import load_tokenizer
from pipelines.training.accelerators import Cluster
from pipelines.training.batch_plan import BatchPlan
from pipelines.training.config import TrainConfig


@dataclass(frozen=True)
class Rows:
    """Rows of one latent shape."""

    shape: tuple[int, int, int]
    weight: float = 1.0  # how many are seen in an epoch, to those of the same kind
    count: float | None = None  # how many there are, where that was told

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
    dataset_bytes: float | None = None  # on disk; None: it was not read, and the weights of rows say nothing of it

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is a share above 0 and at most 1, got {self.mfu}")
        if not self.rows:
            raise UserError("no rows to plan for: give --rows, such as --rows image:32x56 --rows video:7x32x56")
        if self.tokens is not None and not 0 < self.tokens < math.inf:
            raise UserError(f"--tokens must be a number above 0, got {self.tokens:g}")
        unit = self.cells_per_unit
        for rows in self.rows:
            if rows.shape[1] % unit or rows.shape[2] % unit:
                raise UserError(
                    f"--rows {rows}: the run's frames are whole numbers of {unit} cells each way (data.grid_unit)"
                )


def parse_rows(text: str) -> Rows:
    """Rows such as ``image:32x56`` or ``video:7x32x56``, in latent cells; ``video:7x32x56=10e6`` tells their number.

    Raises:
        UserError: for any other text.
    """
    match = re.fullmatch(r"(?:image:(?:1x)?|video:(\d+)x)(\d+)x(\d+)(?:=(\d+(?:\.\d+)?(?:e\d{1,2})?))?", text.strip())
    sizes = (int(match[1] or 1), int(match[2]), int(match[3])) if match else (0, 0, 0)
    count = float(match[4]) if match and match[4] else None
    if not all(sizes) or count == 0:
        raise UserError(
            f"--rows {text!r}: give a kind and latent sizes, such as image:32x56 or video:7x32x56, and if you like how "
            "many there are, as in video:7x32x56=10e6"
        )
    return Rows(sizes, weight=count or 1.0, count=count)


def _told(rows: Sequence[str]) -> tuple[Rows, ...]:
    found = tuple(map(parse_rows, rows))
    if any(each.count for each in found) and not all(each.count for each in found):
        raise UserError("--rows: tell of all shapes how many rows there are, or of none")
    return found


def _bytes_of(rows: Sequence[Rows]) -> float | None:
    """On disk, if it was told how many there are: two bytes a code, which hardly compress; captions are few beside."""
    counts = [each.count for each in rows]
    return 2 * sum(math.prod(each.shape) * (each.count or 0) for each in rows) if all(counts) else None


def make_question(config: TrainConfig, cluster: Cluster, *, rows: Sequence[str] = (), **options: Any) -> Question:
    """The question about a run, its rows told or those of its dataset; ``options`` are fields of :class:`Question`.

    Raises:
        UserError: if its dataset or a tokenizer cannot be read, or there is too little to train on.
    """
    manifests = [] if rows else _manifests(config)
    text_file = Path(local_path(config.data.text_tokenizer) if config.data.text_tokenizer else EMBEDDED_FILE)
    lumos1 = config.data.vocabulary == "lumos1"
    try:
        if manifests:
            codebook_size = manifests[0].tokenizer.codebook_size
        elif lumos1:
            codebook_size = Vocabulary.lumos1().codebook_size
        else:
            codebook_size = load_tokenizer(config.data.tokenizer or TokenizerConfig()).codebook_size
        # The Lumos-1 vocabulary has its size, wherever the tokenizer is.
        text_size = 1 if lumos1 and not text_file.exists() else TextTokenizer.load(text_file).vocab_size
        vocabulary = config.make_vocabulary(text_vocab_size=text_size, codebook_size=codebook_size)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    told = _told(rows)
    sizes = [bucket.bytes for each in manifests for bucket in each.buckets if bucket.split == config.data.split]
    return Question(
        model=config.model.resolve(vocabulary.vocab_size, vocabulary.visual_start),
        codebook_size=codebook_size,
        cells_per_unit=vocabulary.cells_per_unit,
        rows=told or _rows_of(manifests, config),
        cluster=cluster,
        dataset_bytes=float(sum(sizes)) if manifests else _bytes_of(told),
        **options,
    )


def _manifests(config: TrainConfig) -> list[Manifest]:
    uris = [source.dataset for source in config.data.sources] or [str(config.data.dataset)]
    try:
        first = open_snapshot(uris[0]).manifest
        return [first, *(open_snapshot(uri, expected_tokenizer=first.tokenizer).manifest for uri in uris[1:])]
    except UserError as error:
        raise UserError(f"{error}. To plan without it, give --rows, such as --rows image:32x56") from error


def _rows_of(manifests: Sequence[Manifest], config: TrainConfig) -> tuple[Rows, ...]:
    counts: Counter[tuple[int, int, int]] = Counter()
    plan = BatchPlan.from_manifests(manifests, config)  # which heeds the weights of sources
    for bucket, steps in zip(plan.buckets, plan.steps, strict=True):
        counts[bucket.shape] += steps * bucket.batch  # type: ignore[assignment]
    return tuple(Rows(shape, float(number)) for shape, number in sorted(counts.items()))
