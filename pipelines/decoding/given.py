"""Pictures and clips that somebody gives for a video to begin with: read in a child, within bounds, cut to its size."""

import io
import json
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from lumos.compression import TEMPORAL_FACTOR, VideoSize
from pipelines import storage
from pipelines.decoding.child import child_command, child_environment
from pipelines.decoding.given_child import REFUSED, GivenJob

_CHILD_MODULE = "pipelines.decoding.given_child"
_OTHER_KINDS = ("not_an_image", "not_a_clip")  # refusals


@dataclass(frozen=True, kw_only=True)
class GivenLimits:
    """What a given file may be, and may cost."""

    max_bytes: int = 64_000_000
    max_pixels: int = 40_000_000  # of a frame
    max_frames: int = 3_000
    max_seconds: float = 30.0  # of decoding, in a process that is killed then
    memory_mb: int = 1_500  # beyond what that process needs to start


class GivenError(ValueError):
    """A given file that cannot be used; the message says what is wrong with it, and does not name it."""


class OtherKindError(GivenError):
    """A picture that is given as a clip, or a clip as a picture."""


def read_image(source: str | bytes, size: VideoSize, limits: GivenLimits | None = None) -> NDArray[np.uint8]:
    """A picture as the first frame of a video: uint8 [1, H, W, 3].

    Args:
        source: a path, local or s3://, or the bytes of the file; PNG, JPEG, WebP, BMP, TIFF, or the first of a GIF.
        size: of the video; the centre of the picture is cut to its shape and scaled, as crops for training are.
        limits: see there.

    Raises:
        GivenError: if it is none, or exceeds a limit; ``OtherKindError`` if it is a clip.
    """
    return _read(source, size, 1, limits or GivenLimits())


def read_clip(
    source: str | bytes, size: VideoSize, limits: GivenLimits | None = None, *, num_given: int | None = None
) -> NDArray[np.uint8]:
    """The frames of a clip with which a video of ``size`` begins: uint8 [1 + 4k, H, W, 3], fewer than it has.

    They are taken at the video's rate. A clip that is shorter than the video is continued whole (but for up to three
    frames at its begin); of one that is as long or longer, the last frames are, which are then half of the video.

    Args:
        source: a path, local or s3://, or the bytes of the file.
        size: of the whole video; cut to it as ``read_image`` does.
        limits: see there.
        num_given: how many of its last frames are taken, whatever its length.

    Raises:
        GivenError: if it is none, or exceeds a limit, or has not so many frames, or the video is an image, which
            nothing can precede; ``OtherKindError`` if it is a picture.
    """
    if size.num_frames == 1:
        raise GivenError(f"a clip cannot be continued by 0 frames: num_frames is 1, set {1 + TEMPORAL_FACTOR} or more")
    frames = _read(source, size, size.num_frames, limits or GivenLimits())
    if num_given is not None:
        if num_given > len(frames):
            raise GivenError(f"it has {len(frames)} frames at {size.fps:g} fps, and num_given is {num_given}")
        return frames[len(frames) - num_given :]
    return frames[len(frames) - num_continued(len(frames), size.num_frames) :]


def num_continued(num_given: int, num_frames: int) -> int:
    """How many of a clip's frames a video of ``num_frames`` begins with: see ``read_clip``."""
    latents = (num_frames - 1) // TEMPORAL_FACTOR  # after the first
    most = latents - 1 if num_given < num_frames else (latents - 1) // 2
    return 1 + TEMPORAL_FACTOR * min((num_given - 1) // TEMPORAL_FACTOR, most)


def _read(source: str | bytes, size: VideoSize, num_frames: int, limits: GivenLimits) -> NDArray[np.uint8]:
    with _local_file(source, limits) as path:
        job = GivenJob(
            path=path,
            width=size.width,
            height=size.height,
            num_frames=num_frames,
            fps=size.fps,
            max_pixels=limits.max_pixels,
            max_frames=limits.max_frames,
            memory_mb=limits.memory_mb,
        )
        command = child_command(_CHILD_MODULE, json.dumps(asdict(job)))
        try:
            done = subprocess.run(
                command,
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=limits.max_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise GivenError(f"it takes longer than {limits.max_seconds:g} s to decode") from None
    if done.returncode == REFUSED:
        refusal = done.stdout.decode(errors="replace")
        raise (OtherKindError if refusal.startswith(_OTHER_KINDS) else GivenError)(_in_words(refusal))
    if done.returncode != 0:
        raise GivenError(f"it ends the process that decodes it (status {done.returncode})")
    frames: NDArray[np.uint8] = np.load(io.BytesIO(done.stdout), allow_pickle=False)
    return frames


def _in_words(refusal: str) -> str:
    code, _, detail = refusal.partition(": ")
    words = {
        "not_an_image": "it is no picture",
        "not_a_clip": "it is no video",
        "not_a_video": "it is neither a picture nor a video",
        "empty_file": "it is empty",
        "too_large": "it is too large",
        "too_long": "it is too long",
    }
    return f"{words.get(code, 'it cannot be decoded')}: {detail}"


@contextmanager
def _local_file(source: str | bytes, limits: GivenLimits) -> Iterator[str]:
    """An absolute path of the content, known to be a plain file that is not too long."""
    if isinstance(source, bytes):
        _check_bytes(len(source), limits)
        with tempfile.TemporaryDirectory(prefix="lumos-given-") as folder:
            path = os.path.join(folder, "file")
            with open(path, "wb") as file:
                file.write(source)
            yield path
        return
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", source) and not source.startswith(("s3://", "file:///")):
        raise GivenError("it is named by a URL; give a path, local or s3://")
    try:
        if storage.is_local(source):
            path = os.path.abspath(storage.filesystem(source)[1])
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise GivenError("it is no file but a folder, a pipe or a device")
            _check_bytes(found.st_size, limits)
            if not os.access(path, os.R_OK):
                raise GivenError("it may not be read: no permission")
            yield path
        else:
            filesystem, remote = storage.filesystem(source)
            _check_bytes(filesystem.size(remote), limits)
            with storage.local_copy(source) as path:
                yield path
    except OSError as error:
        raise GivenError(f"it cannot be read: {error.strerror or error}") from error


def _check_bytes(count: int, limits: GivenLimits) -> None:
    if not count:
        raise GivenError("it is empty")
    if count > limits.max_bytes:
        raise GivenError(f"it has {count / 1e6:.1f} MB, at most {limits.max_bytes / 1e6:g} are taken")
