"""What a captioner is; each is one file beside this one and a line in registry.py (or in a plugin)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipelines.data.config import CurateConfig
from pipelines.data.snapshot.schemas import CAPTIONS
from pipelines.data.stage.stage import Stage
from pipelines.data.steps.run import Check
from pipelines.data.video.looks import look_inputs

# What a captioner's stage makes of each clip.
CAPTIONED = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("captions", CAPTIONS),
        pa.field("input_tokens", pa.int64()),  # that an endpoint counted, asks money for
        pa.field("output_tokens", pa.int64()),
        pa.field("error", pa.string()),  # why a captioner has none
    ]
)


@dataclass(frozen=True)
class CaptionSource:
    """Raw captions by the URI of their video."""

    captioner: str  # "metadata" or "sidecar"
    texts: dict[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Captioner:
    """One way to get captions."""

    name: str  # in ``captions.captioners``
    stage_name: str  # of its stage, whose table has the columns ``CAPTIONED``
    stage: Callable[[CurateConfig], Stage]  # makes the stage for a run's config; a UserError if a file is missing
    checks: Callable[[CurateConfig], Sequence[Check]] = lambda config: ()  # of what the stage needs
    reads_looks: bool = True  # whether it is shown looks of the clips, which are made then
    # Inputs of the stage, from clips (rows of the split stage with ``uri`` and ``looks_part``) and captions that the
    # user brought; by default the clips, whose looks it is to read (``video.looks.read_looks``).
    inputs: Callable[[pa.Table, CaptionSource], pa.Table] = lambda clips, given: look_inputs(clips)


def clean_captions(texts: Sequence[str], captioner: str) -> list[dict[str, str]]:
    """Captions without stray white space, empty ones and repetitions."""
    cleaned = dict.fromkeys(" ".join(text.split()) for text in texts)
    return [{"text": text, "captioner": captioner} for text in cleaned if text]
