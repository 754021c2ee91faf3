import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from lumos.compression import VideoSize
from lumos.pictures import fit_frames
from pipelines.decoding.given import GivenError, GivenLimits, num_continued, read_clip, read_image
from pipelines.media import encode_video
from tests.pipelines.data.videos import moving_square, numbered, read_numbers, write_video

SIZE = VideoSize(width=48, height=32, num_frames=13, fps=12.0)
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 100, 130, 3), dtype=np.uint8)


def test_a_picture_is_cut_and_scaled(tmp_path: Path) -> None:
    data = encode_video(PICTURE, 1.0, "png")
    (tmp_path / "50%d of it.jpg").write_bytes(data)  # a pattern to FFmpeg, under another format's name
    expected = fit_frames(PICTURE, (48, 32))
    assert np.array_equal(read_image(data, SIZE), expected)
    assert np.array_equal(read_image(str(tmp_path / "50%d of it.jpg"), SIZE), expected)


def test_a_picture_stands_as_its_camera_was_held(tmp_path: Path) -> None:
    import cv2

    upright = np.zeros((60, 40, 3), np.uint8)
    upright[:20] = 255
    _, jpeg = cv2.imencode(".jpg", np.rot90(upright, 1))
    ifd = struct.pack(">HHHI4sI", 1, 0x0112, 3, 1, struct.pack(">HH", 6, 0), 0)  # orientation: turn right by 90 degrees
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08" + ifd
    data = jpeg.tobytes()
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    (frame,) = read_image(turned, VideoSize(width=32, height=48, num_frames=13, fps=12.0))
    assert frame[:14].mean() > 240
    assert frame[20:].mean() < 15


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [
        (13, 12, [8, 9, 10, 11, 12]),  # as long as the video: the last ones, half of it
        (40, 12, [35, 36, 37, 38, 39]),
        (12, 12, list(range(3, 12))),  # 9 of them, and 4 new ones
        (5, 12, [0, 1, 2, 3, 4]),
        (4, 12, [3]),
        (19, 24, list(range(2, 19, 2))),  # every second one, from the first on: 0, 2, ... 18
        (3, 6, [0, 0, 1, 1, 2]),  # the last counts for its whole time but not beyond it
    ],
)
def test_the_end_of_a_clip_is_continued_at_the_rate_of_the_video(
    tmp_path: Path, frames: int, fps: int, expected: list[int]
) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered(frames), fps=fps)
    clip = read_clip(str(path), SIZE)
    assert clip.shape[1:] == (32, 48, 3)
    assert read_numbers(clip) == expected


def test_a_video_has_always_a_new_part() -> None:
    for num_frames in (5, 9, 13, 25, 85):
        for given in range(1, 200):
            taken = num_continued(given, num_frames)
            assert taken % 4 == 1
            assert 1 <= taken <= min(given, num_frames - 4)


def png_of(width: int, height: int, rows: int) -> bytes:
    """A PNG file that says how large it is, and holds so many black rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(rows * (1 + 3 * width)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def clip_bytes(folder: Path) -> bytes:
    return write_video(folder / "clip.mp4", moving_square(24)).read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: b"", "it is empty"),
        (lambda _: b"GIF89a but no more", "cannot be decoded|neither a picture"),
        (lambda _: b"just text " * 99, "it is neither a picture nor a video"),
        (lambda _: png_of(10_000, 10_000, 10_000), "it is too large: 10000x10000 px, more than 40 million"),
        (lambda _: png_of(60_000, 60_000, 1), "too large|cannot be decoded"),
        (clip_bytes, "it is no picture: a video"),
        (lambda folder: str(folder / "nothing.png"), "it cannot be read: No such file"),
        (lambda folder: str(folder), "it is no file but a folder"),
        (lambda _: "http://127.0.0.1:1/picture.png", "named by a URL"),
        (lambda _: "rtmp://127.0.0.1/stream", "named by a URL"),
        (lambda _: "concat:/etc/passwd|/etc/hosts", "named by a URL"),
        (lambda _: "data:image/png;base64,AAAA", "named by a URL"),
        (lambda _: "/dev/zero", "a pipe or a device"),
        (lambda _: b"\x89PNG\r\n\x1a\n" + bytes(70_000_000), r"it has 70\.0 MB, at most 64 are taken"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, make: Callable[[Path], str | bytes], message: str) -> None:
    with pytest.raises(GivenError, match=message):
        read_image(make(tmp_path), SIZE)


@pytest.mark.parametrize("address", ["secret.mp4", "http://127.0.0.1:1/x.mp4", "file:///etc/passwd"])
def test_a_playlist_reads_nothing_else(tmp_path: Path, address: str) -> None:
    clip_bytes(tmp_path)
    (tmp_path / "clip.mp4").rename(tmp_path / "secret.mp4")
    for text in (f"#EXTM3U\n#EXTINF:2,\n{address}\n#EXT-X-ENDLIST\n", f"ffconcat version 1.0\nfile '{address}'\n"):
        (tmp_path / "clip.mp4").write_text(text)
        with pytest.raises(GivenError, match="neither a picture nor a video"):
            read_clip(str(tmp_path / "clip.mp4"), SIZE)


def test_work_without_end_is_ended(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "clip.mp4", moving_square(48)))
    for limits, message in (
        (GivenLimits(max_frames=20), "it is too long: more than 20 frames"),
        (GivenLimits(max_seconds=0.01), r"it takes longer than 0\.01 s"),
        (GivenLimits(max_pixels=64 * 64 - 1), "it is too large: 64x64 px"),
    ):
        with pytest.raises(GivenError, match=message):
            read_clip(path, SIZE, limits)
    with pytest.raises(GivenError, match=r"takes more than 100 MB|status"):
        read_image(png_of(6_000, 6_000, 6_000), SIZE, GivenLimits(memory_mb=100))


# Light gray pictures of 96x64: encoders of AV1 leave threads that may spin as the process ends.
AVIF = base64.b64decode(
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUIAAAD5bWV0YQAAAAAAAAAvaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAAAFBpY3R1cm"
    "VIYW5kbGVyAAAAAA5waXRtAAAAAAABAAAAHmlsb2MAAAAARAAAAQABAAAAAQAAASEAAAAeAAAAKGlpbmYAAAAAAAEAAAAaaW5mZQIAAAAAAQAA"
    "YXYwMUNvbG9yAAAAAGppcHJwAAAAS2lwY28AAAAUaXNwZQAAAAAAAABgAAAAQAAAABBwaXhpAAAAAAMICAgAAAAMYXYxQ4EADAAAAAATY29scm"
    "5jbHgAAgACAAIAAAAAF2lwbWEAAAAAAAAAAQABBAECgwQAAAAmbWRhdAoKAAAAAy3/xK+QBDIQEACWAQKKEECAAAADFHbQXA=="
)
# The same picture twice, side by side as the tiles of one of 192x64, as phones write theirs.
TILED_AVIF = base64.b64decode(
    "AAAAHGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZgAAAUBtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAAA5waXRtAAAAAA"
    "ADAAAAOmlsb2MAAAAARAAAAwABAAAAAQAAAWQAAAAeAAIAAAABAAABggAAAB4AAwAAAAEAAAGgAAAACAAAAE1paW5mAAAAAAADAAAAFWluZmUCAAAA"
    "AAEAAGF2MDEAAAAAFWluZmUCAAAAAAIAAGF2MDEAAAAAFWluZmUCAAAAAAMAAGdyaWQAAAAAHGlyZWYAAAAAAAAAEGRpbWcAAwACAAEAAgAAAGJpcH"
    "JwAAAAPGlwY28AAAAUaXNwZQAAAAAAAABgAAAAQAAAAAxhdjFDgQAMAAAAABRpc3BlAAAAAAAAAMAAAABAAAAAHmlwbWEAAAAAAAAAAwABAgECAAIC"
    "AQIAAwEDAAAATG1kYXQKCgAAAAMt/8SvkAQyEBAAlgECihBAgAAAAxR20FwKCgAAAAMt/8SvkAQyEBAAlgECihBAgAAAAxR20FwAAAABAMAAQA=="
)
# It once, and one of 48x32 as its thumbnail.
AVIF_AND_THUMBNAIL = base64.b64decode(
    "AAAAHGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZgAAARdtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAAA5waXRtAAAAAA"
    "ABAAAALGlsb2MAAAAARAAAAgABAAAAAQAAATsAAAAeAAIAAAABAAABWQAAACUAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABhdjAxAAAAABVp"
    "bmZlAgAAAAACAABhdjAxAAAAABppcmVmAAAAAAAAAA50aG1iAAIAAQABAAAAXmlwcnAAAAA8aXBjbwAAABRpc3BlAAAAAAAAAGAAAABAAAAADGF2MU"
    "OBAAwAAAAAFGlzcGUAAAAAAAAAMAAAACAAAAAaaXBtYQAAAAAAAAACAAECAQIAAgIDAgAAAEttZGF0CgoAAAADLf/Er5AEMhAQAJYBAooQQIAAAAMU"
    "dtBcEgAKCRgVL/tEBDQaEDIWGUeHhiGHnnnmgAAA3KwBAvk+XasKoA=="
)
ANIMATED_WEBP = base64.b64decode(
    "UklGRjIBAABXRUJQVlA4WAoAAAACAAAAXwAAPwAAQU5JTQYAAAAAAAAAAABBTk1GVgAAAAAAAAAAAF8AAD8AAGQAAAJWUDggPgAAAFAEAJ0BKm"
    "AAQAAuTTabTaEkJCQEAExLSDFAABKzKGcYbISgfBlA+DKB7QAA/vpFi568ucn3nJ95yfecfAAAQU5NRk4AAAAAAAAAAABfAAA/AABkAAAAVlA4"
    "IDYAAAC0AwCdASpgAEAALk02m02AAATEtIAA8VwQPxp8KWKZwZQPgyf0AAD+3EswD2PJzFulw2BAAABBTk1GUgAAAAAAAAAAAF8AAD8AAGQAAA"
    "BWUDggOgAAAPQDAJ0BKmAAQAAuTTabTYAABMS0gxQAASsyhnGGyEoHwZQPgyge0AAA/vdGLuMo25m7czduZu3EAAA="
)


def test_an_avif_is_a_picture() -> None:
    assert abs(read_image(AVIF, SIZE).mean() - 200) < 4
    with pytest.raises(GivenError, match=r"it is no video: a picture"):
        read_clip(AVIF, SIZE)


@pytest.mark.parametrize("data", [TILED_AVIF, AVIF_AND_THUMBNAIL])
def test_a_picture_of_tiles_or_with_a_thumbnail_is_refused_with_a_remedy(data: bytes) -> None:
    """FFmpeg tells of each as a stream of its own; the first alone would be a part of the picture."""
    with av.open(io.BytesIO(data)) as container:
        assert len(container.streams.video) == 2
    with pytest.raises(GivenError, match=r"several pictures or tiles \(libdav1d\): save it as JPEG or PNG"):
        read_image(data, SIZE)
    with pytest.raises(GivenError, match=r"it is no video: a picture"):
        read_clip(data, SIZE)


def test_an_animated_webp_is_refused_as_what_it_is() -> None:
    with pytest.raises(GivenError, match="it cannot be decoded: an animated WebP: save it as GIF, or"):
        read_image(ANIMATED_WEBP, SIZE)
    with pytest.raises(GivenError):
        read_image(ANIMATED_WEBP[:20], SIZE)


def test_an_image_continues_no_clip(tmp_path: Path) -> None:
    with pytest.raises(GivenError, match="num_frames is 1, set 5 or more"):
        read_clip(clip_bytes(tmp_path), VideoSize(width=48, height=32, num_frames=1, fps=12.0))
