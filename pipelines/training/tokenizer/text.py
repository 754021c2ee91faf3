"""Trains the small text tokenizer of the package: a byte-level BPE over a word list and captions."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from lumos.config import require
from pipelines.config import PROJECT_DIR
from pipelines.errors import UserError
from pipelines.sample_corpus import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, SIZES, WORDINGS

_WORDS_PER_LINE = 20  # words of a list are joined into lines, since a word inside a sentence begins with a space


@dataclass(frozen=True, kw_only=True)
class TextCorpus:
    """What the text tokenizer learns from."""

    vocab_size: int = 1024  # tokens, 257..65536; each costs the model a row of its embedding
    words: tuple[str, ...] = ()  # files with one word per line
    captions: tuple[str, ...] = ()  # files with one caption per line; a relative path may start at the project's folder
    caption_weight: int = 50  # how often each caption counts against once for each listed word
    sample_corpus: bool = True  # whether the sample corpus's caption wordings count as captions too

    def __post_init__(self) -> None:
        require(
            257 <= self.vocab_size <= 65_536,
            f"vocab_size is {self.vocab_size}; it must be in 257..65536 (every byte has a token)",
        )
        require(self.caption_weight >= 1, f"caption_weight is {self.caption_weight}; it must be at least 1")
        require(
            bool(self.words or self.captions or self.sample_corpus),
            "words and captions are empty and sample_corpus is false; there is nothing to learn from",
        )


def read_corpus(corpus: TextCorpus) -> list[str]:
    """The lines to train on.

    Raises:
        UserError: A file is missing, not UTF-8 text, or empty.
    """
    words = [line for name in corpus.words for line in _read_lines("words", name)]
    captions = [line for name in corpus.captions for line in _read_lines("captions", name)]
    if corpus.sample_corpus:
        captions += sample_captions()
    joined = (" " + " ".join(words[i : i + _WORDS_PER_LINE]) for i in range(0, len(words), _WORDS_PER_LINE))
    return [*joined, *(caption for caption in captions for _ in range(corpus.caption_weight))]


def sample_captions() -> list[str]:
    """Each wording of the sample corpus with each value of each attribute at least once."""
    values = {"shape": SHAPES, "size": SIZES, "color": COLORS, "background": BACKGROUNDS, "direction": DIRECTIONS}
    cycles = {name: itertools.cycle(each) for name, each in values.items()}
    return [
        wording.format(**{name: next(cycle) for name, cycle in cycles.items()})
        for wording in WORDINGS
        for _ in range(max(map(len, values.values())))
    ]


def _read_lines(key: str, name: str) -> list[str]:
    path = Path(name)
    if not path.is_file():
        path = PROJECT_DIR / name
    if not path.is_file():
        hint = " (Debian's package wamerican has it)" if name.startswith("/usr/share/dict/") else ""
        raise UserError(f"text.{key}: {name} is not a file{hint}; name a text file with one entry per line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"text.{key}: {name} is not UTF-8 text ({error})") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"text.{key}: {name} is empty; name a text file with one entry per line")
    return lines
