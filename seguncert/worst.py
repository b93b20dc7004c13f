"""The images that are most over-confident, with pictures of where: kept while a run goes on, drawn only if they may stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from seguncert import render
from seguncert.detection import ratio
from seguncert.scores import Scores

KEPT = 10
SIDE = 400  # pixels of a picture's longest side
WRONG, RIGHT, UNKNOWN = (213, 94, 0), (244, 243, 240), (120, 124, 132)  # colours of the picture of errors
QUALITY = 82


@dataclass
class Worst:
    """The `KEPT` rows of largest `overconfidence` above 0; whoever is first in name wins a tie."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def wants(self, overconfidence: float) -> bool:
        """Whether an image would be kept now; later it may have to go."""
        full = len(self.rows) == KEPT
        return overconfidence > 0 and (not full or overconfidence >= self.rows[-1]["overconfidence"])

    def add(self, row: dict[str, Any]) -> None:
        """Keep the row, of which `path`, `overconfidence` and `pictures` are read, if it is among the worst."""
        rows = sorted([*self.rows, row], key=lambda each: (-each["overconfidence"], each["path"]))
        self.rows = rows[:KEPT]


def overconfidence(scores: Scores) -> float:
    """Mean confidence less accuracy of an image's pixels; NaN where none is labelled."""
    pixels = scores.confusion.sum()
    return float(ratio(scores.regions.forecast.sum(), pixels) - ratio(scores.regions.hits.sum(), pixels))


def draw_pictures(
    rgb: UInt8[np.ndarray, "H W 3"],
    shown_HW: UInt8[np.ndarray, "H W"],
    labels_HW: UInt8[np.ndarray, "H W"],
    confidence_HW: Float32[np.ndarray, "H W"],
    colours_C3: UInt8[np.ndarray, "C 3"],
    ignored: int,
) -> dict[str, bytes]:
    """Small JPEGs by name: `photo`, `classes` as shown, `errors`, `confidence` laid over the photo."""
    wrong_HW1 = (shown_HW != labels_HW)[..., None]
    errors = np.where(wrong_HW1, WRONG, RIGHT)
    errors = np.where((labels_HW == ignored)[..., None], UNKNOWN, errors).astype(np.uint8)
    grey = cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    pictures = {
        "photo": rgb,
        "classes": cv2.addWeighted(rgb, 0.25, colours_C3[shown_HW], 0.75, 0),
        "errors": cv2.addWeighted(grey, 0.25, errors, 0.75, 0),
        "confidence": render.overlay_doubt(rgb, confidence_HW, "high"),
    }
    return {name: render.encode_jpeg(render.thumbnail(picture, SIDE), QUALITY) for name, picture in pictures.items()}
