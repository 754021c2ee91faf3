"""All captioners of a curation together: what each is asked, and which of their captions a clip gets."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipelines.config import config_hash
from pipelines.data.captions import (
    CAPTION_INPUTS,
    CaptionSource,
    caption_fault,
    caption_key,
    captions_stage,
    unique_captions,
)
from pipelines.data.coca import coca_stage
from pipelines.data.endpoint_settings import EndpointConfig
from pipelines.data.endpoint_stage import endpoint_stage
from pipelines.data.frames import CLIP_INPUTS, clip_inputs, picture_key
from pipelines.data.model_settings import CaptionConfig
from pipelines.data.runner import Row, Stage
from pipelines.data.settings import DecodeConfig, StageResources

Caption = dict[str, str]  # text, captioner


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The captions of clips.

    Attributes:
        of: By clip: captions fit to be used, in the order of the captioners.
        faults: By clip without any: status and reason, as the ledger tells it.
        left_out: Captions not used, by why.
        input_tokens: That endpoints counted for these clips.
        output_tokens: Likewise.
    """

    of: dict[int, list[Caption]]
    faults: dict[int, tuple[str, str]]
    left_out: dict[str, int]
    input_tokens: int
    output_tokens: int

    def cost(self, prices: EndpointConfig) -> float:
        """What they cost at these prices, in their currency."""
        return (self.input_tokens * prices.input_price + self.output_tokens * prices.output_price) / 1e6


class Captioning:
    """The captioners that a config names.

    Raises:
        UserError: a model's file is missing.
    """

    def __init__(
        self, config: CaptionConfig, given: CaptionSource, decode: DecodeConfig, resources: StageResources
    ) -> None:
        self.config = config
        self.given = given
        self.stages: dict[str, Stage] = {}
        for name in config.captioners:
            if name == "given":
                self.stages[name] = captions_stage(resources)
            elif name == "coca":
                self.stages[name] = coca_stage(config.coca, decode, resources)
            else:
                self.stages[name] = endpoint_stage(config.endpoint, decode, resources)

    @property
    def hash(self) -> str:
        """Of the captioners' configurations, as a ledger names it."""
        hashes = [stage.hash for stage in self.stages.values()]
        return hashes[0] if len(hashes) == 1 else config_hash(hashes)

    def inputs(self, name: str, rows: Sequence[Row], uris: Sequence[str]) -> pa.Table:
        """What a captioner is asked about clips (rows of the split stage) of these files."""
        if name != "given":
            asked = [
                {"work_key": picture_key(row), **clip_inputs(row, uri)} for row, uri in zip(rows, uris, strict=True)
            ]
            return pa.Table.from_pylist(asked, schema=CLIP_INPUTS)
        captioner = self.given.captioner
        texts = [self.given.texts.get(uri, ()) for uri in uris]
        keys = [row["key"] for row in rows]
        columns = {
            "work_key": [caption_key(key, text, captioner) for key, text in zip(keys, texts, strict=True)],
            "key": keys,
            "texts": texts,
            "captioner": [captioner] * len(keys),
        }
        return pa.table(columns, schema=CAPTION_INPUTS)

    def gather(self, clips: Sequence[int], made: Mapping[str, Sequence[Row]]) -> Captions:
        """Put together what the captioners made of clips, leave out what is not fit and what is said twice.

        Args:
            clips: By which the captions are told.
            made: By captioner, its row for each clip.
        """
        of: dict[int, list[Caption]] = {}
        faults: dict[int, tuple[str, str]] = {}
        left_out: Counter[str] = Counter()
        for place, clip in enumerate(clips):
            rows = [rows[place] for rows in made.values()]
            offered = unique_captions([caption for row in rows for caption in row["captions"]])
            judged = [(caption_fault(caption["text"], self.config), caption) for caption in offered]
            of[clip] = [caption for fault, caption in judged if fault is None]
            unfit = [fault for fault, _ in judged if fault is not None]
            left_out.update(_kind(fault) for fault in unfit)
            if not of[clip]:
                errors = [row["error"] for row in rows if row["error"]]
                told = "; ".join(unfit) or "none"
                faults[clip] = ("failed", errors[0]) if errors else ("rejected", f"caption: {told}")
        tokens = [
            sum(row[name] or 0 for rows in made.values() for row in rows) for name in ("input_tokens", "output_tokens")
        ]
        return Captions(of=of, faults=faults, left_out=dict(left_out), input_tokens=tokens[0], output_tokens=tokens[1])


def _kind(fault: str) -> str:
    words = fault.split()
    return fault if words[0] == "language" else f"{words[0]} {words[2]} {words[3]}"
