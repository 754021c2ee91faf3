r"""Work keys: the one place that writes and parses the names of files, sources, clips and work on them.

    URI\nSIZE\nVERSION                                 a file, in the stage "sources"
    SOURCE_ID                                          a content (SHA-256), in the stage "split"
    SOURCE_ID:START-END                                a clip, its span in milliseconds
    CLIP+LEFT,TOP,WIDTH,HEIGHT                         a clip and the part of its frame that counts
    CLIP@FRAMESxWIDTHxHEIGHT+LEFT,TOP,WIDTH,HEIGHT     likewise and what of it is encoded; "+psnr" if decoded again
    CLIP#HASH                                          a clip with captions that a user brings
    SHA-256                                            a text, in the stage "texts"
    SOURCE_ID@PATH, @PATH                              a file in a ledger that has no clips of its own

All that is done on a source or its clips begins with the source's hash, and whatever else changes a result is named
too, so that it is other work.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.storage import FileInfo

_HASH_DIGITS = 64  # of a source_id


def file_key(file: FileInfo) -> str:
    """Names a file as it is: another size or version is other work."""
    return f"{file.uri}\n{file.size}\n{file.version}"


def uri_of_file(key: str) -> str:
    """The URI in a ``file_key``."""
    return key.rsplit("\n", 2)[0]


def is_source_id(name: str) -> bool:
    """Whether a name is that of a content."""
    return len(name) == _HASH_DIGITS and set(name) <= set("0123456789abcdef")


def is_clip_key(name: str) -> bool:
    """Whether a name may be that of a clip."""
    return name[_HASH_DIGITS : _HASH_DIGITS + 1] == ":" and is_source_id(name[:_HASH_DIGITS])


def source_of(key: str) -> str:
    """The source_id that a key begins with, that of a clip or of any work on it."""
    return key[:_HASH_DIGITS]


def sources_of(keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """The ``source_of`` each of many keys."""
    return pc.utf8_slice_codeunits(keys, 0, _HASH_DIGITS)


def clip_key(source_id: str, start_s: float, end_s: float) -> str:
    """Names a clip by what it shows: content hash of the source, and span in milliseconds."""
    return f"{source_id}:{round(start_s * 1000):08d}-{round(end_s * 1000):08d}"


def picture_keys(clips: pa.Table) -> pa.ChunkedArray:
    """Names clips (rows of the split stage) together with the part of their frame that counts."""
    return pc.binary_join_element_wise(clips["key"], _pictures(clips), "+")


def picture_key(clip: str, picture: Sequence[int]) -> str:
    """As ``picture_keys``, of one clip: the part of its frame that counts is left, top, width and height."""
    return f"{clip}+{','.join(map(str, picture))}"


def token_keys(clips: pa.Table, shapes: NDArray[Any], decode_back: pa.Array) -> pa.ChunkedArray:
    """Names clips (rows of the split stage) together with what of them is encoded.

    ``shapes`` [n, 3] are frames, width and height of each; ``decode_back``, whether its codes are decoded again.
    """
    sizes = pc.binary_join_element_wise(*(pa.array(column).cast(pa.string()) for column in shapes.T), "x")
    parts = [clips["key"], "@", sizes, "+", _pictures(clips), pc.if_else(decode_back, "+psnr", "")]
    return pc.binary_join_element_wise(*parts, "")


def _pictures(clips: pa.Table) -> pa.ChunkedArray:
    """The part of its frame that counts of each clip: "left,top,width,height"."""
    return pc.binary_join(clips["picture"].cast(pa.list_(pa.string())), ",")


def caption_key(clip: str, texts: Sequence[str], captioner: str) -> str:
    """Names a clip with these very captions, so that another text is other work."""
    digest = hashlib.sha256("\0".join([captioner, *texts]).encode()).hexdigest()[:16]
    return f"{clip}#{digest}"


def text_key(text: str) -> str:
    """Names a text by its content."""
    return hashlib.sha256(text.encode()).hexdigest()


def ledger_file_key(path: str, source_id: str | None = None) -> str:
    """Names a file in a ledger that has no clips of its own: unreadable, removed, or with the content of another."""
    return f"{source_id or ''}@{path}"


def are_ledger_files(keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which of a ledger's keys are ``ledger_file_key``s; the others name clips, or the content of a failed source."""
    return pc.match_substring(keys, "@")
