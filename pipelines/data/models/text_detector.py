"""How much of a picture text covers."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.data.models.open_clip import fetched
from pipelines.errors import UserError

_TEXT_MULTIPLE = 32  # px that divide the sides of the text detector's input
_PIXEL_THRESHOLD, _BOX_THRESHOLD, _UNCLIP = 0.3, 0.6, 1.5  # as the paper and PaddleOCR set them
_MAX_BOXES, _MIN_SIDE = 1000, 3.0
_TEXT_MEAN = (122.68, 116.67, 104.01)  # of B, G, R in this order, as these models were trained
WHERE = "take a DB text detection model in ONNX form from github.com/opencv/opencv_zoo (text_detection_*)"


class TextDetector:
    """Share of a picture that text covers, by a differentiable-binarization network (Liao et al. 2020, 1911.08947).

    Raises:
        UserError: the file is not there, or cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        here = fetched(path, "features.text_detector", where=WHERE)
        try:
            self._net = cv2.dnn.readNetFromONNX(here)
        except cv2.error as error:
            raise UserError(f"features.text_detector {path} cannot be loaded as ONNX: {error.err}") from error

    def area(self, frame: NDArray[np.uint8]) -> float:
        """Share of an RGB frame [height, width, 3] inside the boxes found."""
        height, width = (max(1, round(side / _TEXT_MULTIPLE)) * _TEXT_MULTIPLE for side in frame.shape[:2])
        picture = np.ascontiguousarray(frame[..., ::-1])
        self._net.setInput(cv2.dnn.blobFromImage(picture, 1 / 255, (width, height), _TEXT_MEAN))
        likely = np.asarray(self._net.forward(), np.float32).reshape(height, width)
        return text_share(likely)


def text_share(likely: NDArray[np.float32]) -> float:
    """Share of a picture inside boxes of text, by the probability of (the inner part of) text, [height, width].

    The network marks shrunk boxes; each is grown again by area * 1.5 / perimeter on every side, as it was trained.
    """
    covered = np.zeros(likely.shape, np.uint8)
    marks = (likely > _PIXEL_THRESHOLD).astype(np.uint8)
    contours, _ = cv2.findContours(marks, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    for contour in sorted(contours, key=len, reverse=True)[:_MAX_BOXES]:
        left, top, width, height = cv2.boundingRect(contour)
        inside = np.zeros((height, width), np.uint8)
        cv2.fillPoly(inside, [np.asarray(contour) - (left, top)], 1)
        part = likely[top : top + height, left : left + width]
        centre, (long, short), angle = cv2.minAreaRect(contour)
        if min(long, short) < _MIN_SIDE or float(part[inside > 0].mean()) < _BOX_THRESHOLD:
            continue
        growth = 2 * _UNCLIP * long * short / (2 * (long + short))
        grown = cv2.boxPoints((centre, (long + growth, short + growth), angle))
        cv2.fillPoly(covered, [grown.round().astype(np.int32)], 1)
    return float(covered.mean())
