"""Text tokenizer: any tokenizer file of Hugging Face `tokenizers`, or the small byte-level BPE in the package.

In the embedded one id 0 is `<s>`, kept for the beginning of a sequence and for padding, which no text produces; every
byte has a token of its own, so no text fails to encode, and decoding gives the text back exactly.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EMBEDDED_FILE = Path(__file__).parent / "weights" / "text.json"
BOS = "<s>"
BOS_ID = 0

_MIN_VOCAB_SIZE = 257  # <s> and the 256 bytes


class TextTokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: Ids are 0..vocab_size - 1.
        hash: "sha256:" and the hash of the file that `save` writes.
    """

    def __init__(self, serialised: str) -> None:
        """Make a tokenizer from the text of a `tokenizers` JSON file.

        Raises:
            ValueError: It is none.
        """
        try:
            self._tokenizer = Tokenizer.from_str(serialised)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"not a Hugging Face tokenizers JSON file: {error}") from error
        # A caption that spells a special token means its letters, not the token.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._serialised = serialised
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.hash = "sha256:" + hashlib.sha256(serialised.encode("utf-8")).hexdigest()

    @classmethod
    def load(cls, path: str | Path | None = None) -> "TextTokenizer":
        """Load a tokenizer file, or the embedded tokenizer for None.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a tokenizer file.
        """
        file = EMBEDDED_FILE if path is None else Path(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"text tokenizer {file} is not a file; name a Hugging Face tokenizers JSON file (for Lumos-1 its "
                "text_tokenizer.json), or none for the embedded tokenizer"
            )
        try:
            return cls(file.read_bytes().decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"text tokenizer {file}: {error}") from error

    @classmethod
    def train(cls, lines: Iterable[str], *, vocab_size: int) -> "TextTokenizer":
        """Learn a byte-level BPE.

        Args:
            lines: Text; more frequent words get fewer tokens.
            vocab_size: At least 257; with little text the result has fewer.

        Raises:
            ValueError: `vocab_size` is too small to hold every byte.
        """
        if vocab_size < _MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_size is {vocab_size}; {BOS} and the 256 bytes need {_MIN_VOCAB_SIZE}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer.to_str(pretty=False))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without a beginning or end of sequence."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens vanish.

        Raises:
            ValueError: An id is out of range.
        """
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is not in 0..{self.vocab_size - 1}")
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def save(self, path: str | Path) -> None:
        """Write the tokenizer file; loading it gives an equal tokenizer with an equal hash."""
        Path(path).write_bytes(self._serialised.encode("utf-8"))
