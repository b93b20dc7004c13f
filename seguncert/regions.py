"""Parts of a picture that can be labelled by themselves: cells of a grid, superpixels, shown segments, single pixels.

Letters: H rows, W columns, R regions. A region's number is the value of its pixels; −1 belongs to none.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, UInt8

UNITS = ("image", "region", "segment", "pixel")
WAYS = ("grid", "superpixel")
LEAST_SEGMENT = 50  # pixels; smaller ones are not worth a visit
LEAST_POLYGON, TOLERANCE = 10, 2.0  # of what an annotator draws: pixels of the smallest, how far a line may be off
SPACING = 8  # pixels between pixels of a picture that are picked


@dataclass(frozen=True, eq=False)
class Regions:
    """The R regions of one picture: `boxes_R4` are x, y, width, height, `sizes_R` pixels."""

    numbers_HW: Int32[np.ndarray, "H W"]
    boxes_R4: Int64[np.ndarray, "R 4"]
    sizes_R: Int64[np.ndarray, " R"]

    def mask(self, number: int) -> Bool[np.ndarray, "h w"]:
        """Which pixels of its box a region has."""
        x, y, width, height = self.boxes_R4[number]
        return self.numbers_HW[y : y + height, x : x + width] == number

    @classmethod
    def of(cls, numbers_HW: Int32[np.ndarray, "H W"], R: int) -> Regions:
        """Boxes and sizes of regions that are numbered already; each has a pixel."""
        H, W = numbers_HW.shape
        flat_N = numbers_HW.ravel()
        inside = flat_N >= 0
        sizes_R = np.bincount(flat_N[inside], minlength=R)
        rows_N, columns_N = np.divmod(np.flatnonzero(inside), W)
        low_R2, high_R2 = np.full((R, 2), max(H, W)), np.full((R, 2), -1)
        for axis, places_N in enumerate((columns_N, rows_N)):
            np.minimum.at(low_R2[:, axis], flat_N[inside], places_N)
            np.maximum.at(high_R2[:, axis], flat_N[inside], places_N)
        return cls(numbers_HW, np.concatenate([low_R2, high_R2 - low_R2 + 1], 1).astype(np.int64), sizes_R)


def grid(H: int, W: int, side: int) -> Regions:
    """Cells of about `side` pixels, all of nearly the same size: none is a sliver.

    >>> grid(100, 130, 64).boxes_R4.tolist()
    [[0, 0, 65, 50], [65, 0, 65, 50], [0, 50, 65, 50], [65, 50, 65, 50]]
    """
    if side < 1:
        raise ValueError(f"region: grid: expected pixels a side, 1 or more. Received: {side}")
    rows, columns = max(1, round(H / side)), max(1, round(W / side))
    tops, lefts = np.arange(rows + 1) * H // rows, np.arange(columns + 1) * W // columns
    heights, widths = np.diff(tops), np.diff(lefts)
    row_H, column_W = np.repeat(np.arange(rows), heights), np.repeat(np.arange(columns), widths)
    y_R, x_R = np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)
    boxes_R4 = np.stack([lefts[x_R], tops[y_R], widths[x_R], heights[y_R]], 1).astype(np.int64)
    numbers_HW = (row_H[:, None] * columns + column_W).astype(np.int32)
    return Regions(numbers_HW, boxes_R4, boxes_R4[:, 2] * boxes_R4[:, 3])


def superpixels(rgb: UInt8[np.ndarray, "H W 3"], area: int) -> Regions:
    """Superpixels of about `area` pixels (SLIC, Achanta et al. 2012), by scikit-image."""
    try:
        from skimage.segmentation import slic
    except ImportError:
        raise ValueError(
            "region: superpixel needs one more package: pip install 'seguncert[superpixel]', or take grid:64"
        ) from None
    if area < 1:
        raise ValueError(f"region: superpixel: expected pixels of one, 1 or more. Received: {area}")
    wanted = max(1, round(rgb.shape[0] * rgb.shape[1] / area))
    found_HW = slic(rgb, n_segments=wanted, compactness=10, start_label=0, channel_axis=-1)
    _, numbers = np.unique(found_HW, return_inverse=True)
    numbers_HW = numbers.reshape(found_HW.shape).astype(np.int32)
    return Regions.of(numbers_HW, int(numbers_HW.max()) + 1)


def segments(labels_HW: UInt8[np.ndarray, "H W"], least: int = LEAST_SEGMENT) -> Regions:
    """What hangs together of one shown class, over corners too, and has at least so many pixels."""
    numbers_HW, boxes, sizes = np.full(labels_HW.shape, -1, np.int32), list[list[int]](), list[int]()
    for c in np.unique(labels_HW):
        count, parts_HW, stats, _ = cv2.connectedComponentsWithStats((labels_HW == c).astype(np.uint8))
        own = np.full(count, -1, np.int32)
        for part in range(1, count):
            if stats[part, cv2.CC_STAT_AREA] >= least:
                own[part] = len(boxes)
                boxes.append(stats[part, :4].tolist())
                sizes.append(int(stats[part, cv2.CC_STAT_AREA]))
        np.maximum(numbers_HW, own[parts_HW], out=numbers_HW)
    return Regions(numbers_HW, np.array(boxes, np.int64).reshape(-1, 4), np.array(sizes, np.int64))


def pixels(
    worth_HW: Float[np.ndarray, "H W"],
    count: int,
    known_HW: Bool[np.ndarray, "H W"] | None = None,
    spacing: int = SPACING,
) -> Regions:
    """The `count` best pixels that are at least `spacing` rows or columns from each other and from what is known, best first;
    regions of one pixel."""
    H, W = worth_HW.shape
    left_HW = worth_HW.astype(np.float32).copy()
    if known_HW is not None:
        near = np.ones((2 * spacing - 1, 2 * spacing - 1), np.uint8)
        left_HW[cv2.dilate(known_HW.astype(np.uint8), near) > 0] = -np.inf
    boxes = list[list[int]]()
    numbers_HW = np.full((H, W), -1, np.int32)
    while len(boxes) < count:
        y, x = divmod(int(left_HW.argmax()), W)
        if left_HW[y, x] == -np.inf:
            break
        numbers_HW[y, x] = len(boxes)
        boxes.append([x, y, 1, 1])
        left_HW[max(0, y - spacing + 1) : y + spacing, max(0, x - spacing + 1) : x + spacing] = -np.inf
    return Regions(numbers_HW, np.array(boxes, np.int64).reshape(-1, 4), np.ones(len(boxes), np.int64))


def parse_region(text: str) -> tuple[str, int]:
    """Way and size, as grid:64 has them; ValueError where it is none.

    >>> parse_region("grid:64")
    ('grid', 64)
    """
    way, _, size = text.partition(":")
    if way not in WAYS or not size.isdecimal() or int(size) < 1:
        raise ValueError(
            f"region: expected grid:SIDE in pixels, or superpixel:AREA in pixels. Received: {text!r}; try grid:64"
        )
    return way, int(size)


def estimated_clicks(labels_HW: UInt8[np.ndarray, "H W"], inside_HW: Bool[np.ndarray, "H W"] | None = None) -> int:
    """Clicks to draw the shown segments as polygons: their corners, lines at most `TOLERANCE` pixels off (Douglas, Peucker
    1973), three at least, and one for the class. Segments and holes of fewer than `LEAST_POLYGON` pixels are not drawn.

    >>> estimated_clicks(np.zeros((10, 10), np.uint8))
    5
    """
    clicks = 0
    for c in np.unique(labels_HW if inside_HW is None else labels_HW[inside_HW]):
        shown_HW = (labels_HW == c if inside_HW is None else (labels_HW == c) & inside_HW).astype(np.uint8)
        _, parts_HW, stats, _ = cv2.connectedComponentsWithStats(shown_HW)
        drawn = stats[:, cv2.CC_STAT_AREA] >= LEAST_POLYGON
        drawn[0] = False
        lines, tree = cv2.findContours(drawn[parts_HW].astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        for line, (_, _, _, around) in zip(lines, () if tree is None else tree[0], strict=True):
            if around < 0 or cv2.contourArea(line) >= LEAST_POLYGON:  # of holes the line runs in what surrounds them
                clicks += max(3, len(cv2.approxPolyDP(line, TOLERANCE, True))) + 1
    return clicks
