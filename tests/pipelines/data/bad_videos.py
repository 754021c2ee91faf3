"""Files as the world has them: odd, damaged, mislabelled. Each with the fate that it must meet."""

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np

from tests.pipelines.data.videos import moving_square, write_video

KEPT = "kept"
Fate = str  # "kept", or "status reason_class"


def write_bad_videos(folder: Path) -> dict[str, Fate]:
    """Write one file of each kind; returns name -> fate."""
    folder.mkdir(parents=True, exist_ok=True)
    fates: dict[str, Fate] = {}
    for write in (_damaged, _not_videos, _lengths_and_clocks, _pictures, _codecs, _names):
        fates |= write(folder)
    return fates


def _damaged(folder: Path) -> dict[str, Fate]:
    options = {"preset": "veryfast", "crf": "4", "g": "6", "threads": "1"}
    data = write_video(folder / "x.mp4", moving_square(60, seed=1), options=options).read_bytes()
    late_index = write_video(folder / "x.mov", moving_square(60, seed=1), options=options).read_bytes()
    (folder / "x.mp4").unlink()
    (folder / "x.mov").unlink()
    third = len(data) // 3
    zeroed = bytearray(data)
    zeroed[third : third + 200] = bytes(200)
    files = {
        "head cut.mp4": (data[third:], "failed not_a_video"),
        "middle cut.mp4": (data[:third] + data[2 * third :], "rejected decoded_share"),
        "tail cut.mp4": (data[:-third], "rejected decoded_share"),
        "index cut.mov": (late_index[:-third], "failed damaged_container"),
        "zeroed spot.mp4": (bytes(zeroed), "rejected decoded_share"),
        "no bytes.mp4": (b"", "failed empty_file"),
        "only zeros.mp4": (bytes(5000), "failed not_a_video"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return {name: fate for name, (_, fate) in files.items()}


def _not_videos(folder: Path) -> dict[str, Fate]:
    (folder / "text.mp4").write_text("not a video " * 99)
    target = write_video(folder / "good.mp4", moving_square(18, seed=2)).name
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{target}'\n")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        for packet in [*stream.encode(sound), *stream.encode(None)]:
            container.mux(packet)
    picture = io.BytesIO()
    with av.open(picture, "w", format="image2pipe") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
        frame = av.VideoFrame.from_ndarray(moving_square(1)[0], format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    (folder / "photo.mp4").write_bytes(picture.getvalue())
    return {
        "good.mp4": KEPT,
        "text.mp4": "failed not_a_video",
        "playlist.mp4": "failed not_a_video",
        "concat.mp4": "failed not_a_video",
        "sound.mp4": "failed no_video_stream",
        "photo.mp4": "rejected frames",
    }


def _lengths_and_clocks(folder: Path) -> dict[str, Fate]:
    write_video(folder / "one frame.mp4", moving_square(1, seed=3))
    write_video(folder / "two frames.mp4", moving_square(2, seed=3))
    wobble = np.cumsum(np.random.default_rng(0).integers(1, 5, 36)).tolist()
    write_video(folder / "variable rate.mp4", moving_square(36, seed=4), fps=40, times=wobble)
    late = [index + 30 for index in range(18)]
    write_video(folder / "begins late.mp4", moving_square(18, seed=5), times=late)
    b_frames = {"preset": "medium", "bf": "3", "threads": "1"}
    write_video(folder / "edit list.mp4", moving_square(18, seed=6), options=b_frames)
    assert b"elst" in (folder / "edit list.mp4").read_bytes()
    write_video(folder / "long gop.mp4", moving_square(240, seed=7), options={"preset": "ultrafast", "g": "1000"})
    fast = bytearray(write_video(folder / "wrong rate.mp4", moving_square(18, seed=8)).read_bytes())
    for box in (b"mdhd", b"mvhd"):  # the clock ticks a thousand times as fast: frames of microseconds
        where = fast.index(box) + 16
        fast[where : where + 4] = struct.pack(
            ">I", min(2**31 - 1, 1000 * struct.unpack(">I", fast[where : where + 4])[0])
        )
    (folder / "wrong rate.mp4").write_bytes(fast)
    avi = bytearray(
        write_video(
            folder / "wrong count.avi", moving_square(18, seed=9), codec="mpeg4", options={"b": "900000"}
        ).read_bytes()
    )
    where = avi.index(b"strh") + 8 + 32
    assert struct.unpack("<I", avi[where : where + 4])[0] == 18
    avi[where : where + 4] = struct.pack("<I", 40)
    (folder / "wrong count.avi").write_bytes(avi)
    return {
        "one frame.mp4": "rejected duration",
        "two frames.mp4": "rejected duration",
        "variable rate.mp4": KEPT,
        "begins late.mp4": KEPT,
        "edit list.mp4": KEPT,
        "long gop.mp4": KEPT,
        "wrong rate.mp4": "rejected duration",
        "wrong count.avi": "rejected decoded_share",
    }


def _pictures(folder: Path) -> dict[str, Fate]:
    turned = bytearray(write_video(folder / "turned.mp4", moving_square(18, size=(96, 64), seed=10)).read_bytes())
    where = turned.index(b"tkhd") + 4 + 40
    a_quarter = (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    turned[where : where + 36] = struct.pack(">9i", *a_quarter)
    (folder / "turned.mp4").write_bytes(turned)
    write_video(folder / "odd size.webm", moving_square(18, size=(65, 63), seed=11), codec="libvpx-vp9", options={})
    write_video(folder / "ten bits.mp4", moving_square(18, seed=12), pixel_format="yuv420p10le")
    write_video(folder / "full chroma.mp4", moving_square(18, seed=13), pixel_format="yuv444p")
    write_video(folder / "alpha.mov", moving_square(18, seed=14), codec="qtrle", pixel_format="argb", options={})
    interlaced = {"preset": "veryfast", "flags": "+ildct+ilme", "threads": "1"}
    write_video(folder / "interlaced.mp4", moving_square(18, size=(64, 64), seed=15), options=interlaced)
    huge = np.zeros((1, 4320, 7680, 3), np.uint8)
    huge[:, 1000:2000, 3000:5000] = 200
    write_video(folder / "huge.mp4", huge, codec="mpeg4", options={})
    write_video(folder / "ribbon.mp4", moving_square(18, size=(1024, 32), seed=16))
    film = np.zeros((18, 128, 128, 3), np.uint8)
    film[:, 20:108] = moving_square(18, size=(128, 88), seed=17)
    write_video(folder / "letterbox.mp4", film)
    return {
        "turned.mp4": KEPT,
        "odd size.webm": KEPT,
        "ten bits.mp4": KEPT,
        "full chroma.mp4": KEPT,
        "alpha.mov": KEPT,
        "interlaced.mp4": KEPT,
        "huge.mp4": "rejected duration",
        "ribbon.mp4": "rejected aspect",
        "letterbox.mp4": KEPT,
    }


@contextmanager
def _same_scheduling() -> Iterator[None]:
    """Take back that SVT-AV1, run as root, makes its caller a real-time thread, which all it starts would be then."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _codecs(folder: Path) -> dict[str, Fate]:
    quiet = {"x265-params": "log-level=none:pools=1", "preset": "ultrafast"}
    write_video(folder / "hevc.mp4", moving_square(18, seed=20), codec="libx265", options=quiet)
    write_video(folder / "vp9.webm", moving_square(18, seed=21), codec="libvpx-vp9", options={"cpu-used": "8"})
    with _same_scheduling():
        write_video(folder / "av1.mkv", moving_square(18, seed=22), codec="libsvtav1", options={"preset": "12"})
    write_video(folder / "mpeg4.avi", moving_square(18, seed=23), codec="mpeg4", options={"b": "900000"})
    write_video(folder / "h264.mkv", moving_square(18, seed=24))
    write_video(
        folder / "prores.mov", moving_square(18, seed=25), codec="prores_ks", pixel_format="yuv422p10le", options={}
    )
    write_video(folder / "mpeg2.mpg", moving_square(20, seed=26), fps=25, codec="mpeg2video", options={})
    write_video(folder / "moving.gif", moving_square(18, seed=27), codec="gif", pixel_format="rgb8", options={}, fps=10)
    kept = dict.fromkeys(["hevc.mp4", "vp9.webm", "av1.mkv", "mpeg4.avi", "h264.mkv", "prores.mov", "moving.gif"], KEPT)
    return kept | {"mpeg2.mpg": "rejected duration"}


def _names(folder: Path) -> dict[str, Fate]:
    names = ["with 'quotes\" and spaces.mp4", "ünïcödé 視頻.mp4", "new\nline.mp4", "100%_{x}*[1]#?::.mp4", "-dash.mp4"]
    for index, name in enumerate(names):
        write_video(folder / name, moving_square(18, seed=30 + index))
    latin = [b"caf\xe9.mp4", b"dossier \xe9t\xe9/\xff.mp4"]  # not UTF-8, as disks of older systems have them
    for index, name in enumerate(latin):
        path = folder / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(write_video(folder / "x.mp4", moving_square(18, seed=40 + index)).read_bytes())
    (folder / "x.mp4").unlink()
    (folder / "broken link.mp4").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    (folder / "twin.mp4").write_bytes((folder / names[0]).read_bytes())
    (folder / "link.mp4").symlink_to(names[1])
    return dict.fromkeys([*names, "caf\\xe9.mp4", "dossier \\xe9t\\xe9/\\xff.mp4"], KEPT) | {
        "broken link.mp4": "failed missing_file",
        "pipe.mp4": "failed not_a_video",
        "device.mp4": "failed not_a_video",
        names[0]: "duplicate exact",  # "twin.mp4" sorts first
        "twin.mp4": KEPT,
        names[1]: "duplicate exact",
        "link.mp4": KEPT,
    }
