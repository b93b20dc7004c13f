"""Calibrators: what turns a net's logits into probabilities that can be believed. They act on logits and give logits,
whose softmax are the probabilities; what they learned is a handful of numbers, kept as JSON.

Letters: C classes, F features, K terms that are weighed (ln p, ln p̄), h × w the scale of the logits, i × j a coarser grid,
H × W the photo, R × W a band of its rows.

    temperature, class-conditional, local    softmax(β z), β > 0 a number of the pixel: the shown class stays the same
    neighbourhood                            softmax(a z + b ln p̄), p̄ the mean of p around, the shown class kept
    vector                                   softmax(a (z − max z) + b), a and b of the class (Guo et al. 2017)
    histogram, isotonic                      the shown class gets the probability g(p̂), the others share the rest

With β = exp η, η is a sum: a constant (temperature: β = 1/T), a number of the shown class (class-conditional), and
piecewise linear functions of what can be seen around the pixel and of how doubtful the whole picture is (local): a picture
that the net finds strange is softened as a whole. In kind neighbourhood p̄ is of what is near in place and of the same colour
in the photo, so that it ends where a thing ends (see `seguncert.bilateral`), and a and b depend on the picture's doubt too:
where the net is at a loss, what it says of the surroundings counts more. A feature beyond what was seen when the calibrator
was fitted counts as the last value seen, and `unfamiliar` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from seguncert.kernels import ONE, compiled
from seguncert.predict import row_makers
from seguncert.scores import BLOCK, ZERO, exponentials
from seguncert.slopes import LEAST_LOG
from seguncert.surroundings import COLOUR, LEAST_DOUBT, OF_PIXEL, PLACE, WIDEST_GAP, around, surroundings

KINDS = ("temperature", "vector", "class-conditional", "local", "neighbourhood", "histogram", "isotonic")
HAIR = 1e-3  # nats by which the shown class stays ahead
SLACK = 1e-3  # of ln of the mean doubt: other numbers of threads round otherwise
FAINTEST = np.float32(-80)  # ln p below which a class is as good as none


@runtime_checkable
class Calibrator(Protocol):
    """Logits in, calibrated logits out."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""

    @property
    def keeps_labels(self) -> bool:
        """Whether the most probable class is the same before and after."""

    def look(
        self, logits_Chw: Float[Tensor, "C h w"], photo_HW3: UInt8[np.ndarray, "H W 3"]
    ) -> Float[Tensor, "F i j"] | None:
        """What it wants to know of the surroundings of each pixel, on a coarser grid; None if nothing."""

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], seen_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """Calibrated logits of a band of rows."""

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """In what the picture is unlike all that it was fitted on, in words; "" if in nothing that it looks at."""


@dataclass(frozen=True)
class Band:
    """Some rows of a photo, not yet made: logits at its size, and what a calibrator wants to see of their surroundings."""

    rows: slice
    make: Callable[[], Float[Tensor, "C R W"]]
    look: Callable[[], Float[Tensor, "F R W"]] | None = None

    def both(self, calibrator: Calibrator | None) -> tuple[Float[Tensor, "C R W"], Float[Tensor, "C R W"]]:
        """The logits, and the same after that calibrator; None changes nothing."""
        logits_CRW = self.make()
        if calibrator is None:
            return logits_CRW, logits_CRW
        return logits_CRW, calibrator(logits_CRW, self.look() if self.look else None)


def bands(
    calibrator: Calibrator | None, logits_Chw: Float[Tensor, "C h w"], photo_HW3: UInt8[np.ndarray, "H W 3"]
) -> Iterator[Band]:
    """The rows of a photo in bands, from the top; each can be made on any thread."""
    H, W = photo_HW3.shape[:2]
    seen_Fij = None if calibrator is None else calibrator.look(logits_Chw, photo_HW3)
    seen: Iterator[tuple[slice, Callable[[], Tensor]]] | None = None
    for rows, make in row_makers(logits_Chw, H, W):
        if seen_Fij is None:
            yield Band(rows, make)
        else:
            seen = seen or row_makers(seen_Fij, H, W, len(seen_Fij) * W * rows.stop)  # as high as those of the logits
            yield Band(rows, make, next(seen)[1])


def both_rows(
    calibrator: Calibrator | None, logits_Chw: Float[Tensor, "C h w"], photo_HW3: UInt8[np.ndarray, "H W 3"]
) -> Iterator[tuple[slice, Float[Tensor, "C rows W"], Float[Tensor, "C rows W"]]]:
    """Logits at the size of the photo in bands of rows, and the same calibrated."""
    return ((band.rows, *band.both(calibrator)) for band in bands(calibrator, logits_Chw, photo_HW3))


def calibrated_rows(
    calibrator: Calibrator | None, logits_Chw: Float[Tensor, "C h w"], photo_HW3: UInt8[np.ndarray, "H W 3"]
) -> Iterator[tuple[slice, Float[Tensor, "C rows W"]]]:
    """The latter of `both_rows`."""
    return ((rows, after_CRW) for rows, _, after_CRW in both_rows(calibrator, logits_Chw, photo_HW3))


@dataclass(frozen=True)
class Curve:
    """A piecewise linear function of one feature: constant outside [low, high], of slope `slopes[0]` from `low` on, which
    changes by `slopes[k]` at `knots[k − 1]`; 0 at `low`.

    >>> curve = Curve("gap", 0.0, 10.0, (4.0,), (0.5, -0.25))
    >>> curve(torch.tensor([-1.0, 2.0, 6.0, 99.0])).tolist()
    [0.0, 1.0, 2.5, 3.5]
    """

    feature: str
    low: float
    high: float
    knots: tuple[float, ...]
    slopes: tuple[float, ...]

    def basis(self, value_N: Float[Tensor, "*N"]) -> list[Float[Tensor, "*N"]]:
        """What the slopes are multiplied with."""
        value_N = value_N.clamp(self.low, self.high)
        return [value_N - self.low, *((value_N - knot).clamp_(min=0) for knot in self.knots)]

    def __call__(self, value_N: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """The function, element by element."""
        total = torch.zeros_like(value_N)
        for slope, part in zip(self.slopes, self.basis(value_N), strict=True):
            total.add_(part, alpha=slope)
        return total


@dataclass(frozen=True)
class Scaling:
    """softmax(β z): kinds temperature, class-conditional and local. ln β = constant + of_class[ŷ] + Σ curves.

    >>> Scaling("temperature", -math.log(2))(torch.tensor([[[4.0]], [[0.0]]]), None).flatten().tolist()
    [0.0, -2.0]
    """

    kind: str
    constant: float
    of_class: tuple[float, ...] = ()
    curves: tuple[Curve, ...] = ()
    frame: tuple[int, int] | None = None  # of the model
    keeps_labels = True

    @property
    def looks(self) -> list[str]:
        """Features of the surroundings."""
        return [curve.feature for curve in self.curves if curve.feature not in OF_PIXEL]

    def look(
        self, logits_Chw: Float[Tensor, "C h w"], photo_HW3: UInt8[np.ndarray, "H W 3"]
    ) -> Float[Tensor, "F i j"] | None:
        """`looks`."""
        return surroundings(logits_Chw, self.looks, self.frame) if self.looks else None

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], seen_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """β (z − max z): what is largest stays so, to the last bit."""
        return _scaled(logits_CRW, seen_FRW, self, np.zeros((0, 2), np.float32), np.zeros(3, np.float32))

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """In what the picture as a whole lies outside of all that the calibrator was fitted on; "" if it does not."""
        for curve in self.curves:
            if curve.feature == "picture":
                return _unfamiliar(logits_Chw, curve.low, curve.high, self.frame)
        return ""


@dataclass(frozen=True)
class Neighbourhood:
    """softmax(Σₖ (aₖ + bₖ (d − middle)) xₖ), x₀ = ln p, x₁ = ln p̄, d = ln(mean doubt of the picture).

    p̄ is the mean of p around, weighted by nearness in place and in the colour of the photo, see `seguncert.bilateral`. A class
    that would come within a hair of the net's, or above it, is put a hair below, so that the labels stay.
    """

    weights: tuple[tuple[float, float], tuple[float, float]]  # (aₖ, bₖ) of the pixel and of what is around it
    middle: float
    low: float
    high: float
    frame: tuple[int, int] | None = None  # of the model
    place: float = PLACE  # standard deviation in pixels of the model's frames
    colour: float = COLOUR  # likewise, in CIE-Lab
    kind = "neighbourhood"
    keeps_labels = True

    @property
    def looks(self) -> list[str]:
        """Features of the surroundings; after them comes ln p̄."""
        return ["picture"]

    def look(self, logits_Chw: Float[Tensor, "C h w"], photo_HW3: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, "F i j"]:
        """`looks`, and ln p̄ of each class."""
        around_Cij = around(logits_Chw, photo_HW3, self.frame, self.place, self.colour)
        picture_1ij = surroundings(logits_Chw, self.looks, self.frame)[:, :1, :1].expand(-1, *around_Cij.shape[1:])
        return torch.cat([picture_1ij, around_Cij])

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], seen_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """Logits, 0 for the shown class and at most −`HAIR` for the others."""
        weights_K2 = np.array(self.weights, np.float32)
        doubts_3 = np.array([self.middle, self.low, self.high], np.float32)
        return _scaled(logits_CRW, seen_FRW, Scaling("temperature", 0.0), weights_K2, doubts_3)

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """As of `Scaling`."""
        return _unfamiliar(logits_Chw, self.low, self.high, self.frame)


def _unfamiliar(logits_Chw: Tensor, low: float, high: float, frame: tuple[int, int] | None) -> str:
    value = float(surroundings(logits_Chw, ["picture"], frame)[0, 0, 0])
    if low - SLACK <= value <= high + SLACK:
        return ""
    return (f"unfamiliar to the calibration: mean doubt {math.exp(value):.3f}, it has seen"
            f" {math.exp(low):.3f} to {math.exp(high):.3f}")  # fmt: skip


def floored(z: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """The same tensor, −inf in it replaced by `LEAST_LOG`."""
    return z.masked_fill_(z == -torch.inf, float(LEAST_LOG))


def shown(
    logits_CRW: Float[Tensor, "C R W"],
) -> tuple[Integer[Tensor, "R W"], Float[Tensor, "R W"], Float[Tensor, "C R W"]]:
    """The shown class, its probability in float64, and ln of the share of each other class in what is left (−inf: itself).

    >>> label, p, others = shown(torch.tensor([[[200.0]], [[0.0]], [[0.0]]]))
    >>> float(p), [round(share, 6) for share in others.exp().flatten().tolist()]
    (1.0, [0.0, 0.5, 0.5])
    """
    top_RW, label_RW = logits_CRW.max(0)
    others_CRW = floored(logits_CRW - top_RW).scatter_(0, label_RW[None], -torch.inf)
    second_RW = others_CRW.amax(0)
    rest_RW = others_CRW.sub_(second_RW).logsumexp(0)
    return label_RW, torch.sigmoid(-(rest_RW + second_RW).double()), others_CRW.sub_(rest_RW)


@dataclass(frozen=True)
class Vector:
    """softmax(a (z − max z) + b), so that a shift of all logits changes nothing; the shown class may change.

    >>> Vector((1.0, 2.0), (0.5, 0.0))(torch.tensor([[[4.0]], [[3.0]]]), None).flatten().tolist()
    [0.5, -2.0]
    """

    factors: tuple[float, ...]
    biases: tuple[float, ...]
    kind = "vector"
    keeps_labels = False

    def look(self, logits_Chw: Float[Tensor, "C h w"], photo_HW3: UInt8[np.ndarray, "H W 3"]) -> None:
        """Nothing."""

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], seen_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """a (z − max z) + b."""
        factors, biases = (torch.tensor(each).view(-1, 1, 1) for each in (self.factors, self.biases))
        return torch.addcmul(biases, factors, floored(logits_CRW - logits_CRW.amax(0)))

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """It cannot tell."""
        return ""


@dataclass(frozen=True)
class Remap:
    """P(the shown class is right) = g(p̂), g linear between points; kinds histogram (steps) and isotonic (rising).

    The other classes keep their ratios. g is raised where the second class would overtake the first: the labels stay.

    >>> remap = Remap("isotonic", (0.5, 1.0), (0.5, 0.9))
    >>> [round(p, 4) for p in remap(torch.tensor([[[0.75]], [[0.25]]]).log(), None).exp().flatten().tolist()]
    [0.7, 0.3]
    """

    kind: str
    confidences: tuple[float, ...]
    values: tuple[float, ...]
    keeps_labels = True

    def look(self, logits_Chw: Float[Tensor, "C h w"], photo_HW3: UInt8[np.ndarray, "H W 3"]) -> None:
        """Nothing."""

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], seen_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """ln of the probabilities."""
        label_RW, confidence_RW, others_CRW = shown(logits_CRW)
        value_RW = torch.from_numpy(np.interp(confidence_RW.numpy(), self.confidences, self.values)).float()
        value_RW = torch.maximum(
            value_RW, others_CRW.amax(0).sigmoid_() * (1 + 1e-5)
        )  # a share s overtakes at s / (1 + s)
        return others_CRW.add_((-value_RW).log1p_()).scatter_(0, label_RW[None], value_RW.log()[None])

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """It cannot tell."""
        return ""


def _scaled(
    logits_CRW: Tensor, seen_FRW: Tensor | None, scaling: Scaling, weights_K2: np.ndarray, doubts_3: np.ndarray
) -> Tensor:
    """What `Scaling` and `Neighbourhood` do, in one loop over the pixels; ValueError for NaN and the like."""
    C, R, W = logits_CRW.shape
    names = scaling.looks if not len(weights_K2) else ["picture", *scaling.looks]
    columns = [_PIXEL[c.feature] if c.feature in _PIXEL else len(names) - len(scaling.looks) + scaling.looks.index(c.feature) for c in scaling.curves]  # fmt: skip
    pieces = [(q, origin, slope) for q, curve in enumerate(scaling.curves) for origin, slope in zip((curve.low, *curve.knots), curve.slopes, strict=True)]  # fmt: skip
    seen_FN = torch.empty(0, R * W) if seen_FRW is None else seen_FRW.flatten(1).contiguous()
    out_CRW = torch.empty(C, R, W)
    fault = _scale(
        logits_CRW.detach().float().contiguous().flatten(1).numpy(), seen_FN.numpy(), np.float32(scaling.constant),
        np.array(scaling.of_class or [0.0] * C, np.float32), np.array(columns, np.int64),
        np.array([[c.low, c.high] for c in scaling.curves], np.float32).reshape(-1, 2),
        np.array([q for q, _, _ in pieces], np.int64), np.array([each[1:] for each in pieces], np.float32).reshape(-1, 2),
        len(names), weights_K2, doubts_3, out_CRW.flatten(1).numpy(),
    )  # fmt: skip
    if fault:
        raise ValueError(
            "logits: expected finite numbers, or −∞ for some classes. Received: NaN, +∞, or −∞ for all classes of a pixel"
        )
    return out_CRW


@compiled
def _scale(
    logits_CN, seen_FN, constant, of_class_C, column_Q, range_Q2, curve_P, piece_P2, first, weights_K2, doubts_3, out_CN
):
    """Whether the logits are faulty. A curve's column is −1 for doubt, −2 for the gap, else a row of what is seen."""
    C, N = logits_CN.shape
    K, P = len(weights_K2), len(curve_P)
    e_CB, s_CB = np.empty((C, BLOCK), np.float32), np.empty((C, BLOCK), np.float32)
    max_B, others_B, squares_B = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    shown_B, eta_B = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32)
    value_B, weight_B = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(0, N, BLOCK):
        width = min(BLOCK, N - start)
        if not exponentials(logits_CN, start, width, e_CB, max_B, shown_B, others_B, squares_B):
            return True
        for x in range(width):
            eta_B[x] = constant + of_class_C[shown_B[x]]
        now = -1
        for k in range(P):
            q = curve_P[k]
            if q != now:
                now, low, high = q, range_Q2[q, 0], range_Q2[q, 1]
                if column_Q[q] == -1:
                    for x in range(width):
                        value_B[x] = math.log(max(others_B[x] / (ONE + others_B[x]), np.float32(LEAST_DOUBT)))
                elif column_Q[q] == -2:
                    value_B[:width] = -np.inf
                    for c in range(C):
                        z_B = logits_CN[c, start : start + width]
                        for x in range(width):
                            value_B[x] = max(value_B[x], np.float32(-np.inf) if shown_B[x] == c else z_B[x])
                    for x in range(width):
                        value_B[x] = min(max_B[x] - value_B[x], np.float32(WIDEST_GAP))
                else:
                    value_B[:width] = seen_FN[column_Q[q], start : start + width]
                for x in range(width):
                    value_B[x] = min(max(value_B[x], low), high)
            origin, slope = piece_P2[k, 0], piece_P2[k, 1]
            for x in range(width):
                eta_B[x] += slope * max(value_B[x] - origin, ZERO)
        for x in range(width):
            eta_B[x] = math.exp(eta_B[x])
        if K == 0:
            for c in range(C):
                z_B, out_B = logits_CN[c, start : start + width], out_CN[c, start : start + width]
                for x in range(width):
                    out_B[x] = eta_B[x] * (z_B[x] - max_B[x])
            continue
        for k in range(K):
            for x in range(width):
                off = min(max(seen_FN[0, start + x], doubts_3[1]), doubts_3[2]) - doubts_3[0]
                weight_B[x] = weights_K2[k, 0] + weights_K2[k, 1] * off
            if k == 0:
                for x in range(width):
                    value_B[x] = max_B[x] + np.float32(math.log(ONE + others_B[x]))
            for c in range(C):
                s_B = s_CB[c]
                if k == 0:
                    z_B = logits_CN[c, start : start + width]
                    for x in range(width):
                        s_B[x] = weight_B[x] * max(z_B[x] - value_B[x], FAINTEST)
                else:
                    z_B = seen_FN[first + (k - 1) * C + c, start : start + width]
                    for x in range(width):
                        s_B[x] += weight_B[x] * z_B[x]
        max_B[:width] = -np.inf
        for c in range(C):
            for x in range(width):
                max_B[x] = max(max_B[x], s_CB[c, x])
        for c in range(C):
            out_B = out_CN[c, start : start + width]
            for x in range(
                width
            ):  # below the shown class also where they are equal: the first of equals would be shown
                out_B[x] = ZERO if shown_B[x] == c else min(eta_B[x] * (s_CB[c, x] - max_B[x]), np.float32(-HAIR))
    return False


_PIXEL = {"doubt": -1, "gap": -2}
