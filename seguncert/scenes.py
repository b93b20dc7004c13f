"""The laboratory's own scenes: three classic problems on a line, and pictures of 16 × 16 pixels for segmentation nets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from seguncert.hidden import HiddenObject, segments
from seguncert.posterior import Colours, IndependentPixels, MarkovRows, QuadTree, Scene

SHAPE = (16, 16)


def _two(mean: float, sd: float, mean2: float, sd2: float) -> IndependentPixels:
    """One channel, two classes with equal priors, each with a mean and a standard deviation."""
    return IndependentPixels(
        ("first", "second"), (0.5, 0.5), Colours(((mean,), (mean2,)), ((sd,), (sd2,)), None), (1, 1)
    )


CLASSIC: dict[str, IndependentPixels] = {
    "equal": _two(0.0, 1.0, 3.0, 1.0),  # P(first | x) = 1 / (1 + exp((6x − 9) / 2))
    "nested": _two(0.0, 2.0, 1.0, 1.0),  # crosses 1/2 twice
    "sparse": _two(0.0, 2.0, 3.0, 1.0),  # crosses 1/2 twice, the second time where there is hardly any data
}


def _rgb(*kinds: tuple[int, int, int], sd: float) -> Colours:
    return Colours(tuple(tuple(map(float, kind)) for kind in kinds), tuple((sd, sd, sd) for _ in kinds))


def _digits(names: str, height: int, width: int, strokes: Sequence[int]) -> dict[str, Any]:
    shapes = [(c, segments(digit, height, width, stroke)) for c, digit in enumerate(names, 1) for stroke in strokes]
    return {
        "classes": ("ground", *names), "shapes": np.stack([mask for _, mask in shapes]),
        "shape_classes": tuple(c for c, _ in shapes),
    }  # fmt: skip


_GROUNDS = ((150, 130, 100), (110, 140, 100), (110, 120, 140))
SCENES: dict[str, Scene] = {
    "pixels": IndependentPixels(("sand", "grass", "water"), (0.5, 0.3, 0.2), _rgb(*_GROUNDS, sd=20.0), SHAPE),
    "rows": MarkovRows(
        ("sand", "grass", "water"), (0.5, 0.3, 0.2), ((0.9, 0.06, 0.04), (0.1, 0.85, 0.05), (0.1, 0.075, 0.825)),
        _rgb(*_GROUNDS, sd=40.0), SHAPE,
    ),
    "tree": QuadTree(
        ("sand", "grass", "water"), (0.4, 0.3, 0.3), ((0.85, 0.1, 0.05), (0.1, 0.85, 0.05), (0.05, 0.05, 0.9)),
        _rgb(*_GROUNDS, sd=40.0), depth=4,
    ),
    "digit": HiddenObject(
        **_digits("68", 13, 8, (2, 3)), colours=_rgb((110, 110, 110), (160, 150, 120), (60, 80, 150), sd=20.0), shape=SHAPE,
        step=3, bar=6, barred=0.95, empty=0.05, clutter=0.02,
    ),
}  # fmt: skip
