import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lumos.tokenizers import TextTokenizer
from lumos.tokenizers.text import BOS_ID

TEXTS = [
    "A small red column moves left on a brown background.",
    "",
    " leading, trailing and  double spaces ",
    "line one\nline two\ttab",
    "naïve café, 日本語の字幕, Привет, عربى",
    "emoji 🎬👩‍🚀🇨🇳",
    "control \x00\x7f and <s> </s> <|endoftext|>",
    "e\u0301 is not \u00e9",
]


@pytest.fixture(scope="module")
def embedded():
    return TextTokenizer.load()


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(embedded, text):
    ids = embedded.encode(text)
    assert embedded.decode(ids) == text
    assert all(0 < i < embedded.vocab_size for i in ids)  # 0 is the beginning of a sequence, never text


def test_embedded_is_small_and_short_on_captions(embedded):
    assert embedded.vocab_size <= 4096
    assert len(embedded.encode("A small red column moves left on a brown background.")) <= 12
    assert embedded.decode([BOS_ID, *embedded.encode("text"), BOS_ID]) == "text"


def test_save_and_load_are_equal(embedded, tmp_path):
    embedded.save(tmp_path / "text_tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "text_tokenizer.json")
    assert loaded.hash == embedded.hash
    assert loaded.vocab_size == embedded.vocab_size
    assert loaded.encode(TEXTS[0]) == embedded.encode(TEXTS[0])


def test_any_tokenizers_file_loads(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "cat": 2, "<unk>": 7}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    loaded = TextTokenizer.load(tmp_path / "words.json")
    assert loaded.encode("a cat sat") == [1, 2, 7]
    assert loaded.vocab_size == 8  # ids may have gaps; every id has a row


def test_training_is_deterministic_and_keeps_every_byte():
    lines = ["a red ball", "a blue ball", "the red cube"] * 3
    first, second = (TextTokenizer.train(lines, vocab_size=270) for _ in range(2))
    assert first.hash == second.hash
    assert first.decode(first.encode("ünknown 🦊")) == "ünknown 🦊"
    assert len(first.encode("a red ball")) < len("a red ball")
    with pytest.raises(ValueError, match="vocab_size is 200"):
        TextTokenizer.train(lines, vocab_size=200)


def test_bad_ids_and_files_are_named(embedded, tmp_path):
    with pytest.raises(ValueError, match="token id 99999"):
        embedded.decode([1, 99999])
    with pytest.raises(FileNotFoundError, match=r"absent\.json is not a file"):
        TextTokenizer.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not a Hugging Face tokenizers JSON"):
        TextTokenizer.load(tmp_path / "bad.json")
