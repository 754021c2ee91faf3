"""All captioners of a curation together, and which of their captions a clip gets."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.config import config_hash
from pipelines.data.captions.captioner import CaptionSource, clean_captions
from pipelines.data.captions.given import share_captions
from pipelines.data.captions.registry import captioner_named
from pipelines.data.config import CurateConfig
from pipelines.data.reasons import caption_fault_kind, no_caption, other_language, too_few_words, too_many_words
from pipelines.data.settings import CaptionConfig
from pipelines.data.snapshot.schemas import CAPTIONS
from pipelines.data.stage.columns import take
from pipelines.data.steps.run import Captions, Run, Step, read_in_order

_PIECE = 1 << 14  # clips at a time, as Python's objects weigh several times more


class Caption(Step):
    """Captions the clips kept so far, by all captioners that the config names; some get what the user brought.

    Raises:
        UserError: a captioner is unknown, or a file of its model is missing.
    """

    def __init__(self, config: CurateConfig, given: CaptionSource) -> None:
        self.rules = config.captions
        self.given = given
        self.captioners = [captioner_named(name) for name in config.captions.captioners]
        self.stages = tuple(captioner.stage(config) for captioner in self.captioners)
        self.checks = [check for captioner in self.captioners for check in captioner.checks(config)]

    @property
    def reads_looks(self) -> bool:
        """Whether any of the captioners is shown looks of clips."""
        return any(captioner.reads_looks for captioner in self.captioners)

    @property
    def hash(self) -> str:
        """Of the captioners' configurations, as a ledger names it."""
        hashes = [stage.hash for stage in self.stages]
        return hashes[0] if len(hashes) == 1 else config_hash(hashes)

    def given_to(self, run: Run, uris: Sequence[str]) -> set[str]:
        """Files that have a caption fit to be used by what the user brought, for them or others of their content."""
        texts = share_captions(self.given, run.sources).texts
        return {
            uri
            for uri in uris
            if any(caption_fault(said["text"], self.rules) is None for said in clean_captions(texts.get(uri, ()), ""))
        }

    def apply(self, run: Run) -> None:
        """Caption what is new, and choose; without a caption that is fit, a clip may be rejected."""
        clips, kept = run.clips, run.clips.verdicts.kept
        rows = clips.of(kept)
        given = share_captions(self.given, run.sources)
        columns = ["captions", "input_tokens", "output_tokens", "error"]
        made = {}
        for captioner in self.captioners:
            inputs = captioner.inputs(rows, given)
            table = run.compute(captioner.stage_name, inputs)
            made[captioner.name] = read_in_order(table, columns, inputs["work_key"])
        run.captions = self.gather(kept, made)
        clips.verdicts.mark("captions", kept)
        if self.rules.require:
            for index, (status, reason) in run.captions.faults.items():
                clips.verdicts.set(index, status, reason)

    def gather(self, clips: NDArray[np.int64], made: Mapping[str, pa.Table]) -> Captions:
        """Put together what each captioner made of clips (ascending), without what is not fit or is said twice."""
        rules = self.rules
        if len(made) == 1 and rules.min_words is None and rules.max_words is None and not rules.languages:
            only = next(iter(made.values()))
            if (pc.max(pc.fill_null(pc.list_value_length(only["captions"]), 2)).as_py() or 0) <= 1:
                return self._of_one(clips, only)
        of = [pa.array([], CAPTIONS)]
        faults: dict[int, tuple[str, str]] = {}
        left_out: Counter[str] = Counter()
        for start in range(0, len(clips), _PIECE):
            pieces = [table.slice(start, _PIECE).to_pylist() for table in made.values()]
            chosen = []
            for clip, rows in zip(clips[start : start + _PIECE].tolist(), zip(*pieces, strict=True), strict=True):
                offered = unique_captions([caption for row in rows for caption in row["captions"]])
                judged = [(caption_fault(caption["text"], self.rules), caption) for caption in offered]
                chosen.append([caption for fault, caption in judged if fault is None])
                unfit = [fault for fault, _ in judged if fault is not None]
                left_out.update(caption_fault_kind(fault) for fault in unfit)
                if not chosen[-1]:
                    errors = [row["error"] for row in rows if row["error"]]
                    faults[clip] = ("failed", errors[0]) if errors else ("rejected", no_caption(unfit))
            of.append(pa.array(chosen, CAPTIONS))
        captions = pa.chunked_array(of, CAPTIONS)
        return Captions(clips=clips, of=captions, faults=faults, left_out=dict(left_out), **_tokens(made.values()))

    def _of_one(self, clips: NDArray[np.int64], made: pa.Table) -> Captions:
        """Likewise, where one captioner made all and nothing it said is unfit: it says one thing each."""
        captions = pa.chunked_array([pa.array([], CAPTIONS), *made["captions"].cast(CAPTIONS).chunks])
        lacking = np.flatnonzero(pc.equal(pc.fill_null(pc.list_value_length(captions), 0), 0).to_numpy())
        errors = take(made["error"], lacking).to_pylist()
        faults = {
            clip: ("failed", error) if error else ("rejected", no_caption([]))
            for clip, error in zip(clips[lacking].tolist(), errors, strict=True)
        }
        return Captions(clips=clips, of=captions, faults=faults, left_out={}, **_tokens([made]))


def _tokens(made: Iterable[pa.Table]) -> dict[str, int]:
    """Tokens that endpoints counted, by column."""
    tables = list(made)
    return {
        name: sum(pc.sum(table[name]).as_py() or 0 for table in tables) for name in ("input_tokens", "output_tokens")
    }


def unique_captions(captions: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The captions in their order, each text once, by whoever said it first."""
    unique: dict[str, dict[str, str]] = {}
    for caption in captions:
        unique.setdefault(caption["text"], caption)
    return list(unique.values())


def caption_fault(text: str, config: CaptionConfig) -> str | None:
    """Why a caption is not to be used, such as "words 2 < 3" or "language de"; None if it is."""
    words = len(text.split())
    if config.min_words is not None and words < config.min_words:
        return too_few_words(words, config.min_words)
    if config.max_words is not None and words > config.max_words:
        return too_many_words(words, config.max_words)
    if config.languages:
        language, certainty = _language_identifier().classify(text)
        if language not in config.languages and certainty >= config.language_certainty:
            return other_language(language)
    return None


@lru_cache(maxsize=1)
def _language_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
