"""Frames: to the bytes of an mp4, gif or png file (equal frames give equal bytes), and how far two videos are apart."""

import io
import math
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

VideoFormat = Literal["mp4", "gif", "png"]

MEDIA_TYPES: dict[VideoFormat, str] = {"mp4": "video/mp4", "gif": "image/gif", "png": "image/png"}

# 4:2:0 and High profile without B-frames play in every browser and start at time 0; CRF 10 is visually lossless.
# For equal bytes every time: one thread, since the number of cores would show, and no macroblock tree, whose assembly
# gives other bits from run to run in small frames (x264 core 165: one encoding in 4 at 32x32, one in 1,000 at 48x48).
_CRF = 10
_X264_OPTIONS = {"preset": "medium", "bf": "0", "threads": "1", "x264-params": "mbtree=0"}
_MAX_FPS_DENOMINATOR = 1001
_MAX_PSNR = 99.0  # dB; of equal frames
# SSIM's window and constants (Wang et al. 2004) for values 0..255.
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def encode_video(frames: np.ndarray, fps: float, file_format: VideoFormat = "mp4", *, crf: int = _CRF) -> bytes:
    """The bytes of a file that holds exactly these frames at this rate.

    Args:
        frames: uint8 [T, H, W, 3], RGB; H and W even.
        fps: frames per second; kept to within a fraction of denominator 1001, in gif to 1/100 s per frame.
        file_format: png takes a single frame.
        crf: of x264, for an mp4 that may be worse and smaller.

    Raises:
        ValueError: if the frames have another shape or type, or the format cannot hold them.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"expected uint8 frames [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if file_format == "png":
        return _encode_png(frames)
    rate = Fraction(fps).limit_denominator(_MAX_FPS_DENOMINATOR)
    if file_format == "gif":
        return _encode_gif(frames, rate)
    return _encode_mp4(frames, rate, crf)


def _encode_mp4(frames: np.ndarray, rate: Fraction, crf: int) -> bytes:
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"mp4 needs even sides, got {width}x{height}")
    # The index is moved to the front so that a browser plays while it loads; that needs a file, not a buffer.
    with tempfile.TemporaryDirectory(prefix="lumos-") as folder:
        path = Path(folder) / "video.mp4"
        with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), **_X264_OPTIONS})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # Untagged, players guess the colour matrix by the size.
            stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU601, ColorRange.MPEG
            for image in frames:
                picture = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG, threads=1
                )
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        return path.read_bytes()


def _encode_gif(frames: np.ndarray, rate: Fraction) -> bytes:
    _, height, width, _ = frames.shape
    graph = Graph()
    first = av.VideoFrame.from_ndarray(frames[0], format="rgb24")
    source = graph.add_buffer(width=width, height=height, format=first.format, time_base=1 / rate)
    split, palette, use = graph.add("split"), graph.add("palettegen"), graph.add("paletteuse")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="gif") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, 1 / rate
            source.push(frame)
        source.push(None)
        for _ in frames:
            mapped = sink.pull()
            assert isinstance(mapped, av.VideoFrame)
            container.mux(stream.encode(mapped))
        container.mux(stream.encode())
    return buffer.getvalue()


def _encode_png(frames: np.ndarray) -> bytes:
    if len(frames) != 1:
        raise ValueError(f"png holds one frame, got {len(frames)}: use mp4 or gif")
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
    codec.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(frames[0], format="rgb24")
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def encode_jpeg(frame: np.ndarray) -> bytes:
    """The bytes of a JPEG of one frame, uint8 [H, W, 3], RGB."""
    picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuvj420p", threads=1)
    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt = picture.width, picture.height, "yuvj420p"
    codec.time_base = Fraction(1)
    codec.options = {"qmin": "3", "qmax": "3", "strict": "unofficial"}
    picture.pts = None
    return b"".join(bytes(packet) for packet in [*codec.encode(picture), *codec.encode(None)])


def psnr(frames: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of pixels 0..255, dB, over all frames; 99 where they are equal."""
    error = float(np.mean((frames.astype(np.float32) - other.astype(np.float32)) ** 2))
    return min(_MAX_PSNR, 10 * math.log10(255**2 / error)) if error else _MAX_PSNR


def ssim(frame: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Structural similarity of the lumas of two RGB frames [H, W, 3]: 1 where they are equal, about 0 where unrelated.

    Means, variances and covariance are weighted by a Gaussian over 11x11 px (sides less than that: mirrored).
    """
    one, two = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64) for image in (frame, other))

    def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
        window = (_SSIM_WINDOW, _SSIM_WINDOW)
        return np.asarray(cv2.GaussianBlur(values, window, _SSIM_SIGMA, borderType=cv2.BORDER_REFLECT), np.float64)

    mean_one, mean_two = smooth(one), smooth(two)
    variances = smooth(one * one) - mean_one**2 + smooth(two * two) - mean_two**2
    covariance = smooth(one * two) - mean_one * mean_two
    means = (2 * mean_one * mean_two + _SSIM_C1) / (mean_one**2 + mean_two**2 + _SSIM_C1)
    return float(np.mean(means * (2 * covariance + _SSIM_C2) / (variances + _SSIM_C2)))
