"""Calibration errors by the protocol of Local Temperature Scaling, to set beside the published numbers.

Ding, Han, Liu, Niethammer, ICCV 2021; here as their published code for CamVid does it (github.com/uncbiag/LTS, commit
f862158), which differs from `seguncert.scores` in more than the number of bins:

- Errors are taken per image, and the mean and standard deviation over images are reported.
- There are 10 bins, open below and closed above; those of ACE hold a tenth of the region's image each.
- SCE and ACE split each bin by the class that is *shown*, and are sums, not means, over classes.
- Pixels of the ignore index count, as errors.
- Boundary: pixels with another label, void being one, 1 or 2 pixels away in their row or column; not within 3 pixels of the
  image's edge. An image without any counts as an error of 0.
- Local: 10 squares of 72 pixels an image, placed at random 84 pixels or more from its edges.

Letters: H rows, W columns, N pixels, M bins, I figures, B replicates.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer, UInt8

from seguncert.detection import ratio
from seguncert.metrics import middle, poisson_weights

M = 10
SQUARES, HALF, FAR, SEED = 10, 36, 84, 10  # of the local region
ERRORS, REGIONS = ("ece", "mce", "sce", "ace"), ("all", "boundary", "local")
NAMES = tuple(f"lts_{error}_{region}" for region in REGIONS for error in ERRORS)


@dataclass
class LocalTemperatureScaling:
    """Sums over images, from which the means and standard deviations of the protocol follow; parts merge to the whole."""

    seed: int
    count_R: Int64[np.ndarray, " regions"]  # images, and squares of images that are large enough for them
    sums_2I: Float64[np.ndarray, "2 I"]  # of the figures and of their squares
    count_BR: Int64[np.ndarray, "B regions"]
    sums_BI: Float64[np.ndarray, "B I"]

    @classmethod
    def empty(cls, *, replicates: int = 200, seed: int = 0) -> LocalTemperatureScaling:
        """Of no image."""
        R, count = len(REGIONS), len(NAMES)
        return cls(
            seed, np.zeros(R, np.int64), np.zeros((2, count)), np.zeros((replicates, R), np.int64), np.zeros((replicates, count))
        )  # fmt: skip

    def add(self, figures_RI: list[Float64[np.ndarray, "_ errors"]], *, cluster: str) -> None:
        """Add an image; `figures_RI` is of `image_errors`."""
        weight_B = poisson_weights(self.seed, cluster, len(self.sums_BI))
        count_R = np.array([len(each) for each in figures_RI])
        sums_2I = np.stack([np.concatenate([(each**power).sum(0) for each in figures_RI]) for power in (1, 2)])
        self.count_R += count_R
        self.sums_2I += sums_2I
        self.count_BR += weight_B[:, None] * count_R
        self.sums_BI += weight_B[:, None] * sums_2I[0]

    def compute(self) -> dict[str, float]:
        """Mean over images, or squares, and with `_sd` the standard deviation; NaN where there are none."""
        count_I = self.count_R.repeat(len(ERRORS))
        mean_I, square_I = ratio(self.sums_2I, count_I)
        sd_I = np.sqrt(np.maximum(square_I - mean_I**2, 0))
        means = dict(zip(NAMES, mean_I.tolist(), strict=True))
        return means | {f"{name}_sd": sd for name, sd in zip(NAMES, sd_I.tolist(), strict=True)}

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """As of `Evaluation.intervals`, for the means."""
        mean_BI = ratio(self.sums_BI, self.count_BR.repeat(len(ERRORS), axis=1))
        return {name: middle(mean_B, level) for name, mean_B in zip(NAMES, mean_BI.T, strict=True)}


def image_errors(
    confidence_HW: Float32[np.ndarray, "H W"],
    shown_HW: UInt8[np.ndarray, "H W"],
    labels_HW: Integer[np.ndarray, "H W"],
    number: int,
) -> list[Float64[np.ndarray, "_ errors"]]:
    """ECE, MCE, SCE and ACE of one image, of its boundary, and of each square; `number` counts images from 0.

    The squares of image `number` are those the published code draws when all images before it had the same size.
    """
    own, boundary_HW = np.percentile(confidence_HW, np.arange(1, M) * 100 / M), boundary(labels_HW)
    everywhere = np.ones(labels_HW.shape, bool)
    squares = []
    for rows, columns in local_squares(len(labels_HW), labels_HW.shape[1], number):
        square = confidence_HW[rows, columns]
        edges = np.percentile(square, np.arange(1, M) * 100 / M)
        squares.append(
            _errors(square, shown_HW[rows, columns], labels_HW[rows, columns], everywhere[rows, columns], edges)
        )
    whole = _errors(confidence_HW, shown_HW, labels_HW, everywhere, own)
    return [
        whole[None],
        _errors(confidence_HW, shown_HW, labels_HW, boundary_HW, own)[None],
        np.reshape(squares, (-1, len(ERRORS))),
    ]


def boundary(labels_HW: Integer[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels with another label 1 or 2 pixels away in their row or column, but none within 3 pixels of the edge."""
    found_HW = np.zeros(labels_HW.shape, bool)
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            found_HW |= labels_HW != np.roll(labels_HW, step, axis)
    inside_HW = np.zeros(labels_HW.shape, bool)
    inside_HW[3:-3, 3:-3] = True
    return found_HW & inside_HW


def local_squares(H: int, W: int, number: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the squares of image `number`; none of one with a side below 168 pixels."""
    if min(H, W) < 2 * FAR:
        return
    source = random.Random(SEED)
    for drawn in range(SQUARES * (number + 1)):
        y, x = source.randint(FAR, H - FAR), source.randint(FAR, W - FAR)
        if drawn >= SQUARES * number:
            yield slice(y - HALF, y + HALF), slice(x - HALF, x + HALF)


def _errors(
    confidence_HW: Float[np.ndarray, "H W"],
    shown_HW: UInt8[np.ndarray, "H W"],
    labels_HW: Integer[np.ndarray, "H W"],
    region_HW: Bool[np.ndarray, "H W"],
    tenths: Float[np.ndarray, " edges"],
) -> Float64[np.ndarray, " errors"]:
    """The four errors of a region; 0 where it has no pixel."""
    confidence_N, shown_N = confidence_HW[region_HW].astype(np.float64), shown_HW[region_HW].astype(np.int64)
    right_N = shown_N == labels_HW[region_HW]
    N, classes = max(1, len(shown_N)), 256
    width_M = np.searchsorted(np.linspace(0, 1, M + 1)[1:-1], confidence_N, side="left")
    mass_M = np.searchsorted(np.asarray(tenths, np.float64), confidence_N, side="left")

    def gaps(bin_N: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
        gap = np.abs(np.bincount(bin_N, confidence_N, bins) - np.bincount(bin_N, right_N, bins))
        return gap, np.bincount(bin_N, minlength=bins)

    gap_M, count_M = gaps(width_M, M)
    sce, ace = (gaps(bin_N * classes + shown_N, M * classes)[0].sum() for bin_N in (width_M, mass_M))
    return np.array([gap_M.sum() / N, (gap_M / np.maximum(count_M, 1)).max(), sce / N, ace / N])
