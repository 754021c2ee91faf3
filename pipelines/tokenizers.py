"""Video tokenizers whose files may lie in a store."""

from dataclasses import replace

from lumos.tokenizers import TokenizerConfig, VideoTokenizer, load_video_tokenizer
from pipelines.storage.cache import local_path


def load_tokenizer(config: TokenizerConfig) -> VideoTokenizer:
    """As ``lumos.tokenizers.load_video_tokenizer``, of files that are fetched to this machine once if need be.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be.
    """
    return load_video_tokenizer(replace(config, path=local_path(config.path) if config.path else config.path))
