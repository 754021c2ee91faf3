"""All captioners of a curation together: what each is asked, and which of their captions a clip gets."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.config import config_hash
from pipelines.data.captions.coca import coca_stage
from pipelines.data.captions.endpoint_stage import endpoint_stage
from pipelines.data.captions.given import (
    CAPTION_INPUTS,
    CaptionSource,
    caption_fault,
    caption_key,
    captions_stage,
    unique_captions,
)
from pipelines.data.settings import CaptionConfig, EndpointConfig
from pipelines.data.snapshot.schemas import CAPTIONS
from pipelines.data.stage.columns import take
from pipelines.data.stage.stage import Stage, StageResources
from pipelines.data.video.looks import look_inputs

_PIECE = 1 << 14  # clips at a time, as Python's objects weigh several times more


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The captions of clips.

    Attributes:
        clips: Their numbers, ascending.
        of: Of each, captions fit to be used, in the order of the captioners, as ``schemas.CAPTIONS``.
        faults: By clip without any: status and reason, as the ledger tells it.
        left_out: Captions not used, by why.
        input_tokens: That endpoints counted for these clips.
        output_tokens: Likewise.
    """

    clips: NDArray[np.int64]
    of: pa.ChunkedArray
    faults: dict[int, tuple[str, str]]
    left_out: dict[str, int]
    input_tokens: int
    output_tokens: int

    def take(self, clips: NDArray[np.int64]) -> pa.ChunkedArray:
        """The captions of some of the clips."""
        return take(self.of, np.searchsorted(self.clips, clips))

    def cost(self, prices: EndpointConfig) -> float:
        """What they cost at these prices, in their currency."""
        return (self.input_tokens * prices.input_price + self.output_tokens * prices.output_price) / 1e6


class Captioning:
    """The captioners that a config names.

    Raises:
        UserError: a model's file is missing.
    """

    def __init__(self, config: CaptionConfig, given: CaptionSource, looks_hash: str, resources: StageResources) -> None:
        self.config = config
        self.given = given
        self.stages: dict[str, Stage] = {}
        for name in config.captioners:
            if name == "given":
                self.stages[name] = captions_stage(resources)
            elif name == "coca":
                self.stages[name] = coca_stage(config.coca, looks_hash, resources)
            else:
                self.stages[name] = endpoint_stage(config.endpoint, looks_hash, resources)

    @property
    def hash(self) -> str:
        """Of the captioners' configurations, as a ledger names it."""
        hashes = [stage.hash for stage in self.stages.values()]
        return hashes[0] if len(hashes) == 1 else config_hash(hashes)

    def inputs(self, name: str, clips: pa.Table) -> pa.Table:
        """What a captioner is asked about clips: rows as ``look_inputs`` takes them."""
        if name != "given":
            return look_inputs(clips)
        captioner = self.given.captioner
        made = [CAPTION_INPUTS.empty_table()]
        for start in range(0, clips.num_rows, _PIECE):
            texts = [self.given.texts.get(uri, ()) for uri in clips["uri"].slice(start, _PIECE).to_pylist()]
            keys = clips["key"].slice(start, _PIECE).to_pylist()
            columns = {
                "work_key": [caption_key(key, text, captioner) for key, text in zip(keys, texts, strict=True)],
                "key": keys,
                "texts": texts,
                "captioner": [captioner] * len(keys),
            }
            made.append(pa.table(columns, schema=CAPTION_INPUTS))
        return pa.concat_tables(made)

    def gather(self, clips: NDArray[np.int64], made: Mapping[str, pa.Table]) -> Captions:
        """Put together what the captioners made of clips, leave out what is not fit and what is said twice.

        Args:
            clips: By which the captions are told, ascending.
            made: By captioner, its row for each clip.
        """
        of = [pa.array([], CAPTIONS)]
        faults: dict[int, tuple[str, str]] = {}
        left_out: Counter[str] = Counter()
        for start in range(0, len(clips), _PIECE):
            pieces = [table.slice(start, _PIECE).to_pylist() for table in made.values()]
            chosen = []
            for clip, rows in zip(clips[start : start + _PIECE].tolist(), zip(*pieces, strict=True), strict=True):
                offered = unique_captions([caption for row in rows for caption in row["captions"]])
                judged = [(caption_fault(caption["text"], self.config), caption) for caption in offered]
                chosen.append([caption for fault, caption in judged if fault is None])
                unfit = [fault for fault, _ in judged if fault is not None]
                left_out.update(_kind(fault) for fault in unfit)
                if not chosen[-1]:
                    errors = [row["error"] for row in rows if row["error"]]
                    told = "; ".join(unfit) or "none"
                    faults[clip] = ("failed", errors[0]) if errors else ("rejected", f"caption: {told}")
            of.append(pa.array(chosen, CAPTIONS))
        tokens = [
            sum(pc.sum(table[name]).as_py() or 0 for table in made.values())
            for name in ("input_tokens", "output_tokens")
        ]
        return Captions(
            clips=clips,
            of=pa.chunked_array(of, CAPTIONS),
            faults=faults,
            left_out=dict(left_out),
            input_tokens=tokens[0],
            output_tokens=tokens[1],
        )


def _kind(fault: str) -> str:
    words = fault.split()
    return fault if words[0] == "language" else f"{words[0]} {words[2]} {words[3]}"
