"""A photo of any size, block by block: what every way of drawing predictions has in common.

Tiles inside out: for each block of a photo all samples are drawn and reduced to moments, and the moments of neighbours are
blended, so that what is held grows neither with the number of samples nor with the picture. A block is cut in the photo's
own pixels; the net is given the pixels around it too, at its own scale, from a multiple of its divisor on. Neighbours
overlap by a strip in which one fades into the other; of one sample they share the dropout masks, so that they agree
wherever the net does not see past what it is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from seguncert.model import Model, ModelError
from seguncert.moments import Moments
from seguncert.predict import positions, resize_photo, scale_factor

SIDE = 2048  # pixels at most of a side of a picture that a net is given whole
TILE = 896  # a side, that it is given of a larger one: what a net holds of them bounds the memory
MARGIN = 128  # of them around each block, whose own results are not used
LEAST = 512  # of what may be asked for in place of both
FADE = (
    32  # pixels, of the photo or of the net if those are fewer, on either side of an edge that fades into its neighbour
)
WHOLE = 1 << 30  # bytes of moments of a photo that is one block
BLOCK = 256 << 20  # of a block of another
MOST = 4 << 30  # bytes of moments that are put together


class Picture:
    """A photo and, once they are asked for, its pixels at other sizes."""

    def __init__(self, rgb: UInt8[np.ndarray, "H W 3"]):
        self.rgb = rgb
        self._sizes: dict[tuple[int, int], np.ndarray] = {}

    def at_size(self, h: int, w: int) -> UInt8[np.ndarray, "h w 3"]:
        """Resized; kept, since every block asks for it."""
        if (h, w) == self.rgb.shape[:2]:
            return self.rgb
        if (h, w) not in self._sizes:
            self._sizes[h, w] = resize_photo(self.rgb, h, w)
        return self._sizes[h, w]


@dataclass(frozen=True)
class Piece:
    """What a net is given of a block: pixels at its scale, and where they begin in the whole.

    `row_position` and `column_position` say where the block's rows and columns lie among them; `same_scale` says that the
    photo was not resized for the net. `whole` is the size of the whole, padded.
    """

    rgb: UInt8[np.ndarray, "h w 3"]
    row_position: np.ndarray
    column_position: np.ndarray
    origin: tuple[int, int]
    whole: tuple[int, int]
    same_scale: bool

    def positions_in(
        self, shape: tuple[int, int], padded: tuple[int, int], align_corners: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where rows and columns lie in a map of `shape` that covers the padded pixels."""
        lines = zip((self.row_position, self.column_position), shape, padded, self.origin, self.whole, strict=True)
        rows, columns = (_position_in(*line, align_corners) for line in lines)
        return rows, columns


@dataclass(frozen=True)
class Look:
    """A block of a photo, and how a net sees it: mirrored along `axes`, and resized by `scale` as the user says it, times
    `zoom`. If `entire`, the net is given the whole photo for it.

    `kept` is what samplers made of what the net is given; with `again` they are asked for more samples of the same.
    """

    picture: Picture
    rows: slice
    columns: slice
    scale: str | float = "auto"
    zoom: float = 1.0
    axes: tuple[int, ...] = ()
    entire: bool = False
    again: bool = False
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def piece(self, model: Model) -> Piece:
        """What `model` is given for it."""
        H, W = self.picture.rgb.shape[:2]
        factor = scale_factor(model, H, W, self.scale) * self.zoom
        h, w = max(1, round(factor * H)), max(1, round(factor * W))
        resized = self.picture.at_size(h, w)
        rgb = np.flip(resized, self.axes) if self.axes else resized
        row_position, first_row, last_row = self._around(self.rows, H, h, model.divisor)
        column_position, first_column, last_column = self._around(self.columns, W, w, model.divisor)
        return Piece(
            np.ascontiguousarray(rgb[first_row:last_row, first_column:last_column]),
            row_position - first_row,
            column_position - first_column,
            (first_row, first_column),
            (-h // model.divisor * -model.divisor, -w // model.divisor * -model.divisor),
            resized is self.picture.rgb,
        )

    def _around(self, block: slice, size: int, length: int, divisor: int) -> tuple[np.ndarray, int, int]:
        """Where the pixels of a block lie in the resized line, and the part of that line that the net is given."""
        position = positions(length, size)[block]
        if self.entire or block == slice(0, size):
            return position, 0, length
        first = max(0, int(position[0]) - MARGIN) // divisor * divisor
        return position, first, min(length, int(position[-1]) + 2 + MARGIN)

    def seen(self, axes: tuple[int, ...], zoom: float, kept: dict[Any, Any]) -> Look:
        """The same block in the mirror image, at another scale."""
        H, W = self.picture.rgb.shape[:2]
        rows = slice(H - self.rows.stop, H - self.rows.start) if 0 in axes else self.rows
        columns = slice(W - self.columns.stop, W - self.columns.start) if 1 in axes else self.columns
        return replace(self, rows=rows, columns=columns, axes=axes, zoom=self.zoom * zoom, kept=kept)


def _position_in(
    position: np.ndarray, length: int, padded: int, origin: int, whole: int, align_corners: bool
) -> np.ndarray:
    """Where places of a piece lie in its line of `length`: aligned by the corners of the whole, not of the piece."""
    if length == padded:
        return position
    if not align_corners or (not origin and padded == whole):
        return positions(length, padded, align_corners, position)
    before = origin * length / padded
    return np.clip(positions(whole * length // padded, whole, True, position + origin) - before, 0, length - 1)


class Sampler:
    """A way to draw predictions for a photo. Those that there are differ in `add`."""

    classes: tuple[str, ...]
    drawn = True  # whether there is a number of samples to choose
    alike = True  # whether all samples are draws from one distribution

    @property
    def how(self) -> dict[str, Any]:
        """In what way, for run.json."""
        raise NotImplementedError

    def ready(self) -> AbstractContextManager[None]:
        """Within, the nets are set up; for many photos in a row, on any threads."""
        raise NotImplementedError

    def largest(self, H: int, W: int, scale: str | float) -> float:
        """The largest factor by which a photo of H × W pixels is resized."""
        raise NotImplementedError

    def add(self, moments: Moments, look: Look, samples: range, seed: int) -> None:
        """Add samples of the block to its moments. A way that draws none adds the one prediction that it makes."""
        raise NotImplementedError

    def parts(self) -> list[Sampler]:
        """Ways whose moments, merged, are its own, where nothing is drawn."""
        return [self]

    def moments(
        self,
        rgb: UInt8[np.ndarray, "H W 3"],
        samples: int = 20,
        seed: int = 0,
        scale: str | float = "auto",
        tile: int | None = None,
    ) -> Moments:
        """Moments of `samples` samples at the size of the photo.

        `tile` is how many pixels a side a net is given at once; None is `TILE`, of photos larger than `SIDE`.
        Raises ModelError where a net gives a value that is not finite or the moments need more than `MOST` bytes,
        ValueError for fewer than 2 samples.
        """
        H, W, C = *rgb.shape[:2], len(self.classes)
        self._check_bytes(H, W)
        whole = None
        for rows, columns, moments in self.blocks(rgb, samples, seed, scale, tile):
            if moments.entropy_HW.shape == (H, W):
                return moments
            whole = whole or Moments.empty(C, H, W)
            whole.put(rows, columns, moments)
        assert whole is not None
        return whole

    def blocks(
        self,
        rgb: UInt8[np.ndarray, "H W 3"],
        samples: int = 20,
        seed: int = 0,
        scale: str | float = "auto",
        tile: int | None = None,
    ) -> Iterator[tuple[slice, slice, Moments]]:
        """Rows, columns and moments, one block after another; together they are the photo. From the top, row by row."""
        if self.drawn and samples < 2:
            raise ValueError(f"samples: expected at least 2, since a spread is asked for. Received: {samples}")
        H, W, picture = *rgb.shape[:2], Picture(rgb)
        factor, each = self.largest(H, W, scale), moments_bytes(len(self.classes), H, W) / (H * W)
        entire, step, fade = fits(H, W, factor, tile), math.inf, max(1, round(FADE / max(1.0, factor)))
        if not entire:
            step = min(((tile or TILE) - 2 * MARGIN) / factor, math.sqrt(BLOCK / each)) - 2 * fade
        elif each * H * W > WHOLE:
            step = math.sqrt(BLOCK / each)
        kept: dict[Any, Any] = {}

        def predict(rows: slice, columns: slice) -> Moments:
            look = Look(picture, rows, columns, scale, entire=entire, again=entire and step < math.inf and self.alike)
            return self._draw(replace(look, kept=kept) if entire else look, range(samples), seed)

        yield from blended(H, W, max(4.0 * fade, step), predict, 0 if entire else fade)

    def _check_bytes(self, H: int, W: int) -> None:
        if moments_bytes(len(self.classes), H, W) > MOST:
            raise ModelError(
                f"the moments of {len(self.classes)} classes at {W}x{H} pixels take {moments_bytes(len(self.classes), H, W) / 2**30:.1f} GiB."
                f" Expected at most {MOST / 2**30:.0f}. `seguncert export` writes maps of such pictures block by block."
            )

    def batches(
        self,
        rgb: UInt8[np.ndarray, "H W 3"],
        size: int,
        seed: int = 0,
        scale: str | float = "auto",
        tile: int | None = None,
    ) -> Iterator[Moments]:
        """Moments of the first `size` samples, of the next ones, and so on without end. Only for photos that fit."""
        H, W = rgb.shape[:2]
        if not fits(H, W, self.largest(H, W, scale), tile):
            raise ModelError(f"samples auto: expected a picture that is run whole, at most {tile or SIDE} pixels a side."
                             f" Received: {W}x{H} at scale {scale}. Set a number of samples.")  # fmt: skip
        self._check_bytes(H, W)
        look = Look(Picture(rgb), slice(0, H), slice(0, W), scale, entire=True, again=True)
        for first in itertools.count(0, size):
            yield self._draw(look, range(first, first + size), seed)

    def steps(
        self,
        rgb: UInt8[np.ndarray, "H W 3"],
        samples: int = 20,
        seed: int = 0,
        scale: str | float = "auto",
        tile: int | None = None,
        size: int = 2,
    ) -> Iterator[tuple[int, int, Moments]]:
        """`size` samples after another: how many there are then, of how many, and what to merge into the moments.

        All together they are those of `moments`, but for rounding. Where nothing is drawn `parts` are counted instead; the
        samples of a picture that is run in blocks are one step.
        """
        H, W = rgb.shape[:2]
        self._check_bytes(H, W)
        if not self.drawn or not fits(H, W, self.largest(H, W, scale), tile):
            parts = [self] if self.drawn else self.parts()
            for number, part in enumerate(parts, 1):
                yield number, len(parts), part.moments(rgb, samples, seed, scale, tile)
            return
        look = Look(Picture(rgb), slice(0, H), slice(0, W), scale, entire=True, again=True)
        for first in range(0, samples, size):
            drawn = range(first, min(first + size, samples))
            yield drawn.stop, samples, self._draw(look, drawn, seed)

    def _draw(self, look: Look, samples: range, seed: int) -> Moments:
        rows, columns = look.rows, look.columns
        moments = Moments.empty(len(self.classes), rows.stop - rows.start, columns.stop - columns.start)
        with torch.inference_mode(), self.ready():
            self.add(moments, look, samples, seed)
        if not torch.isfinite(moments.entropy_HW.sum()):
            raise ModelError("the net gave values that are not finite for this picture")
        return moments


def moments_bytes(C: int, H: int, W: int) -> int:
    """Of the moments of a photo of H × W pixels."""
    return 4 * (2 * C + 1) * H * W


def fits(H: int, W: int, factor: float, tile: int | None = None) -> bool:
    """Whether a net is given a photo of H × W pixels whole; None is `SIDE`."""
    return factor * max(H, W) <= (tile or SIDE) + 0.5


def blended(
    H: int, W: int, step: float, predict: Callable[[slice, slice], Moments], fade: int = FADE
) -> Iterator[tuple[slice, slice, Moments]]:
    """Moments of blocks about `step` pixels wide, each faded into its neighbours over 2 · `fade` pixels.

    Held besides the block under way are the strips that it shares with the one before it and with those above.
    """
    above: list[tuple[slice, Moments]] = []
    for rows in _ranges(H, step, fade):
        left, below = None, []
        for columns in _ranges(W, step, fade):
            moments = predict(rows, columns)
            _fade(moments, 1, rows, H, fade)
            _fade(moments, 2, columns, W, fade)
            if left is not None:
                moments.at(columns=slice(0, 2 * fade)).plus(left)
            stop = columns.stop
            if stop < W and fade:
                stop -= 2 * fade
                left = moments.at(columns=slice(stop - columns.start, None)).copy()
            done, width = slice(columns.start, stop), stop - columns.start
            moments = moments.at(columns=slice(0, width))
            for place, strip in above:
                if place == done:
                    moments.at(rows=slice(0, 2 * fade)).plus(strip)
            last = rows.stop
            if last < H and fade:
                last -= 2 * fade
                below.append((done, moments.at(rows=slice(last - rows.start, None)).copy()))
            yield slice(rows.start, last), done, moments.at(rows=slice(0, last - rows.start))
        above = below


def _ranges(length: int, step: float, fade: int) -> list[slice]:
    """Ranges of about the same length that cover a line and overlap by 2 · `fade`."""
    count = max(1, math.ceil(length / step))
    edges = [round(length * k / count) for k in range(count + 1)]
    return [
        slice(start - fade if start else 0, stop + fade if stop < length else length)
        for start, stop in itertools.pairwise(edges)
    ]


def _fade(moments: Moments, axis: int, block: slice, length: int, fade: int) -> None:
    """Multiply the ends that a neighbour shares by weights that add up to 1 with the neighbour's."""
    if not fade or (block.start == 0 and block.stop == length):
        return
    weight = torch.ones(block.stop - block.start)
    ramp = (torch.arange(2 * fade) + 0.5) / (2 * fade)
    if block.start > 0:
        weight[: 2 * fade] = ramp
    if block.stop < length:
        weight[-2 * fade :] = ramp.flip(0)
    moments.weigh(weight.view(-1, 1) if axis == 1 else weight)
