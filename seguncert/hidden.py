"""An object whose shape, class and place are unknown, among clutter and perhaps behind a bar: all hypotheses enumerated.

Letters as in `seguncert.posterior`; S shapes of h × w pixels, Y × X places at which a shape may stand, P hypotheses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from seguncert.posterior import Colours, Image, check, log, logsumexp, normalised


@dataclass(frozen=True, eq=False)
class HiddenObject:
    """One shape at one place, or none, on a ground with clutter; a bar may stand before it and hide all that is behind.

    Which shape, where it is and where the bar is are drawn uniformly; all of these hypotheses are enumerated. A pixel's
    label is the class of the shape wherever the shape is, *behind the bar too*, so two shapes that differ only there are
    truly ambiguous, and so is a boundary that noise blurs.

    Attributes:
        classes: the ground first, then one for each class of `shape_classes`.
        shapes: (S, h, w) bool, all at the same size; `shape_classes` has the index of each one's class.
        colours: of three kinds of pixels: ground, object, bar.
        step: shapes stand at rows and columns that are multiples of it, and so does the bar.
        bar: width of the bar in pixels, from top to bottom; `barred` the probability that there is one.
        empty: the probability that there is no object.
        clutter: the probability that a pixel of the ground looks like the object.
    """

    classes: tuple[str, ...]
    shapes: np.ndarray = field(repr=False)
    shape_classes: tuple[int, ...]
    colours: Colours
    shape: tuple[int, int] = (32, 32)
    step: int = 1
    bar: int = 4
    barred: float = 0.5
    empty: float = 0.1
    clutter: float = 0.1

    def __post_init__(self) -> None:
        check(self.classes, self.colours, 3)
        S, h, w = self.shapes.shape
        (H, W), wanted = self.shape, set(range(1, len(self.classes)))
        if h > H or w > W or not 0 < self.bar <= W or len(self.shape_classes) != S or set(self.shape_classes) != wanted:
            raise ValueError(
                "shapes: expected one or more for each class but the ground, no larger than the picture, and a bar that fits."
                f" Received: {S} of {h}x{w} with classes {self.shape_classes}, a bar of {self.bar}, a picture of {H}x{W}"
            )
        if not all(0 <= each < 1 for each in (self.barred, self.empty, self.clutter)):
            raise ValueError(
                "barred, empty, clutter: expected probabilities from 0 to below 1."
                f" Received: {self.barred}, {self.empty}, {self.clutter}"
            )

    def sample(self, n: int, seed: int) -> tuple[Shaped[np.ndarray, "N H W K"], Int64[np.ndarray, "N H W"]]:
        """Pictures and their labels."""
        rng = np.random.default_rng(seed)
        tops, lefts, bars = self._places(*self.shape)
        labels_NHW = np.zeros((n, *self.shape), np.int64)
        kinds_NHW = (rng.random((n, *self.shape)) < self.clutter).astype(np.int64)
        there_N, barred_N = rng.random(n) >= self.empty, rng.random(n) < self.barred
        shape_N, bar_N = rng.integers(len(self.shapes), size=n), rng.choice(bars, n)
        top_N, left_N = rng.choice(tops, n), rng.choice(lefts, n)
        drawn = zip(there_N, shape_N.tolist(), top_N.tolist(), left_N.tolist(), barred_N, bar_N, strict=True)
        for i, (there, shape, top, left, barred, bar) in enumerate(drawn):
            if there:
                self._put(labels_NHW[i], shape, top, left)
            kinds_NHW[i][labels_NHW[i] > 0] = 1
            if barred:
                kinds_NHW[i][:, bar : bar + self.bar] = 2
        return self.colours.draw(kinds_NHW, rng), labels_NHW

    def posterior(self, image: Image) -> Float64[np.ndarray, "C H W"]:
        """The sum over all hypotheses, each with its probability, of the labels that it says."""
        probs_SYX = self._hypotheses(image)[:-1].reshape(
            len(self.shapes), *map(len, self._places(*image.shape[:2])[:2])
        )
        _, h, w = self.shapes.shape
        one_hot_CS = np.arange(len(self.classes))[:, None] == np.array(self.shape_classes)
        found_CHW = np.zeros((len(self.classes), *image.shape[:2]))
        rows, columns = (self.step * (side - 1) + 1 for side in probs_SYX.shape[1:])
        for i in range(h):
            for j in range(w):
                found_CYX = np.tensordot(one_hot_CS * self.shapes[:, i, j], probs_SYX, 1)
                found_CHW[:, i : i + rows : self.step, j : j + columns : self.step] += found_CYX
        found_CHW[0] = np.maximum(1 - found_CHW[1:].sum(0), 0)
        return found_CHW / found_CHW.sum(0)

    def draw_labels(self, image: Image, n: int, seed: int) -> Int64[np.ndarray, "N H W"]:
        """Hypotheses, each drawn with its probability."""
        probs_P = self._hypotheses(image)
        tops, lefts, _ = self._places(*image.shape[:2])
        labels_NHW = np.zeros((n, *image.shape[:2]), np.int64)
        for i, drawn in enumerate(np.random.default_rng(seed).choice(len(probs_P), n, p=probs_P)):
            if drawn < len(probs_P) - 1:
                s, y, x = np.unravel_index(drawn, (len(self.shapes), len(tops), len(lefts)))
                self._put(labels_NHW[i], int(s), int(tops[y]), int(lefts[x]))
        return labels_NHW

    def _put(self, labels_HW: Int64[np.ndarray, "H W"], s: int, top: int, left: int) -> None:
        _, h, w = self.shapes.shape
        labels_HW[top : top + h, left : left + w][self.shapes[s]] = self.shape_classes[s]

    def _places(self, H: int, W: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and columns at which shapes begin, and columns at which bars do."""
        _, h, w = self.shapes.shape
        return tuple(np.arange(0, last + 1, self.step) for last in (H - h, W - w, W - self.bar))  # type: ignore[return-value]

    def _hypotheses(self, image: Image) -> Float64[np.ndarray, " P"]:
        """P(shape, row, column | picture), flat; the last is that there is no object. Where the bar is, is summed out.

        ln p(picture | hypothesis) is that of bare ground, plus what changes in the bar, plus what changes in the shape where
        the bar is not. Of a shape's columns a bar hides those from d on, if it stands d columns to the right of where the
        shape begins; so the places are looked at once for each d, and once for all bars that hide nothing.
        """
        ground_HW, object_HW, bar_HW = self.colours.log_likelihood(image)
        ground_HW = np.logaddexp(log(1 - self.clutter) + ground_HW, log(self.clutter) + object_HW)
        _, lefts, bars = self._places(*image.shape[:2])
        _, h, w = self.shapes.shape
        windows_YXhw = np.lib.stride_tricks.sliding_window_view(object_HW - ground_HW, (h, w))[
            :: self.step, :: self.step
        ]
        gains_wSYX = np.stack([np.tensordot(self.shapes[..., j] * 1.0, windows_YXhw[..., j], (1, 2)) for j in range(w)])
        up_to_wSYX = np.concatenate([np.zeros((1, *gains_wSYX.shape[1:])), gains_wSYX.cumsum(0)])
        bar_W = np.append(0, (bar_HW - ground_HW).sum(0).cumsum())
        weight_B = bar_W[bars + self.bar] - bar_W[bars] + log(self.barred / len(bars))
        apart_XB = (bars + self.bar <= lefts[:, None]) | (bars >= lefts[:, None] + w)
        aside_X = np.logaddexp(log(1 - self.barred), logsumexp(np.where(apart_XB, weight_B, -np.inf), 1))
        total_SYX = up_to_wSYX[-1] + aside_X
        for d in range(-((self.bar - 1) // self.step) * self.step, w, self.step):
            bar_X = (lefts + d) // self.step
            there_X = (bar_X >= 0) & (bar_X < len(bars))
            weight_X = np.where(there_X, weight_B[bar_X.clip(0, len(bars) - 1)], -np.inf)
            hidden_SYX = up_to_wSYX[min(d + self.bar, w)] - up_to_wSYX[max(d, 0)]
            total_SYX = np.logaddexp(total_SYX, up_to_wSYX[-1] - hidden_SYX + weight_X)
        total_SYX += log((1 - self.empty) / total_SYX.size)
        none = log(self.empty) + np.logaddexp(log(1 - self.barred), logsumexp(weight_B, 0))
        return normalised(np.append(total_SYX, none))


def segments(digit: str, height: int, width: int, stroke: int) -> np.ndarray:
    """A digit of seven segments as a mask (height, width) bool.

    >>> print("\\n".join("".join(".#"[int(on)] for on in row) for row in segments("6", 5, 3, 1)))
    ###
    #..
    ###
    #.#
    ###
    """
    mask = np.zeros((height, width), bool)
    middle = (height - stroke) // 2
    across = {"top": 0, "middle": middle, "bottom": height - stroke}
    for name, row in across.items():
        if name in _LIT[digit]:
            mask[row : row + stroke] = True
    for name, rows, columns in (
        ("upper left", slice(0, middle + stroke), slice(0, stroke)),
        ("upper right", slice(0, middle + stroke), slice(width - stroke, width)),
        ("lower left", slice(middle, height), slice(0, stroke)),
        ("lower right", slice(middle, height), slice(width - stroke, width)),
    ):
        if name in _LIT[digit]:
            mask[rows, columns] = True
    return mask


_ALL = ("top", "middle", "bottom", "upper left", "upper right", "lower left", "lower right")
_LIT = {
    "8": set(_ALL), "6": set(_ALL) - {"upper right"}, "9": set(_ALL) - {"lower left"}, "0": set(_ALL) - {"middle"},
}  # fmt: skip
