"""A map of doubt to one number: for a picture, or for each of its regions.

No aggregate wins everywhere, so there is a choice, and `seguncert rank-scores` tells which finds the errors on one's own data.
With d the doubt of a pixel in [0, 1] (the map, or 1 − map where high is sure) and a region of n pixels:

    mean            Σ d / n
    no-boundary     mean over the pixels farther than BAND from a boundary between shown classes; 0 where there is none
    class-weighted  Σ w_c d / n with c the shown class and w_c ∝ 1 / √(share of c in the pool), of mean 1 over the pool: what is
                    rare counts for more
    foreground      mean of the n_f largest d, n_f the pixels that are not shown as background: above that quantile (pictures only)
    top:P           mean of the P % largest d
    patch:N         largest mean of N × N pixels (pictures only)

A score is a product of such numbers, each to a power: `entropy:class-weighted * variance:top:5^0.5`.

Letters: H rows, W columns, C classes, R regions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float64, Int32, Int64, UInt8

from seguncert.maps import MAPS

BAND = 3  # pixels
KINDS = ("mean", "no-boundary", "class-weighted", "foreground", "top", "patch")
OF_PICTURES = ("foreground", "patch")
DISAGREEMENT = "disagreement"  # of a picture's samples, as the export tells it; no map
DEFAULTS = {"top": 5.0, "patch": 32.0}
PARTS = re.compile(r"(?P<map>[a-z_]+)(:(?P<kind>[a-z-]+)(:(?P<number>[0-9.]+))?)?(\^(?P<power>[0-9.]+))?")


@dataclass(frozen=True)
class Term:
    """One factor of a score: the aggregate `kind` (with its number, where it has one) of a map, to a power."""

    map: str
    kind: str = "mean"
    number: float = 0.0
    power: float = 1.0

    def __str__(self) -> str:
        name = self.map + ("" if self.map == DISAGREEMENT else f":{self.kind}")
        number = f":{self.number:g}" if self.kind in DEFAULTS else ""
        return name + number + (f"^{self.power:g}" if self.power != 1 else "")


def parse_score(text: str) -> tuple[Term, ...]:
    """The factors of a score; ValueError where it is none.

    >>> [str(term) for term in parse_score("entropy * variance:top:10^0.5")]
    ['entropy:mean', 'variance:top:10^0.5']
    """
    return tuple(_term(part.strip(), text) for part in text.split("*"))


def _term(part: str, text: str) -> Term:
    found = PARTS.fullmatch(part)
    expected = (
        f"score: expected MAP:KIND[^POWER], with * between several; MAP one of {', '.join(MAPS)}, KIND one of"
        f" {', '.join(KINDS)} (top:5 for the top 5 %, patch:32 for squares of 32 pixels); or {DISAGREEMENT}."
    )
    if found is None or (found["map"] not in MAPS and part.partition("^")[0] != DISAGREEMENT):
        raise ValueError(f"{expected} Received: {text!r}")
    kind = found["kind"] or "mean"
    if kind not in KINDS or (found["number"] and kind not in DEFAULTS):
        raise ValueError(f"{expected} Received: {text!r}")
    try:
        number = float(found["number"]) if found["number"] else DEFAULTS.get(kind, 0.0)
        power = float(found["power"]) if found["power"] else 1.0
    except ValueError:
        raise ValueError(f"{expected} Received: {text!r}") from None
    if kind == "top" and not 0 < number <= 100:
        raise ValueError(f"score: top: expected a percentage above 0 and up to 100. Received: {number:g}")
    if kind == "patch" and (number < 1 or number != int(number)):
        raise ValueError(f"score: patch: expected a whole number of pixels, 1 or more. Received: {number:g}")
    if power <= 0:
        raise ValueError(f"score: expected powers above 0. Received: {text!r}")
    return Term(found["map"], kind, number, power)


def doubt_of(values: Float[np.ndarray, "*n"], name: str) -> Float[np.ndarray, "*n"]:
    """Values of a map, turned round where high is sure."""
    return values if MAPS[name].sure_is == "low" else 1 - values


def class_weights(areas_C: Int64[np.ndarray, " C"] | Float64[np.ndarray, " C"]) -> Float64[np.ndarray, " C"]:
    """1 / √share, scaled so that the mean over all pixels is 1; 0 for a class that is nowhere.

    >>> class_weights(np.array([75.0, 0.0, 25.0])).round(4).tolist()
    [0.8453, 0.0, 1.4641]
    """
    share_C = areas_C / max(1, areas_C.sum())
    weights_C = np.divide(1, np.sqrt(share_C), out=np.zeros(len(share_C)), where=share_C > 0)
    total = float((weights_C * share_C).sum())
    return weights_C / total if total else weights_C


def away_from_boundaries(labels_HW: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """1 where no pixel within `BAND` rows and columns is shown as another class, else 0."""
    side = np.ones((2 * BAND + 1, 2 * BAND + 1), np.uint8)
    return (cv2.erode(labels_HW, side) == cv2.dilate(labels_HW, side)).astype(np.uint8)


def aggregate(
    term: Term,
    doubt_HW: Float[np.ndarray, "H W"],
    labels_HW: UInt8[np.ndarray, "H W"] | None,
    numbers_HW: Int32[np.ndarray, "H W"] | None = None,
    regions: int = 1,
    weights_C: Float64[np.ndarray, " C"] | None = None,
    background: int = 0,
) -> Float64[np.ndarray, " R"]:
    """One number for each region, before the term's power. `numbers_HW` tells the region of a pixel, −1 for none; None is
    the whole picture.

    `labels_HW` may be None where the kind does not ask for the shown classes.

    >>> doubt_HW = np.array([[0.0, 0.2], [0.4, 0.6]], np.float32)
    >>> aggregate(Term("entropy", "top", 50.0), doubt_HW, None).round(4).tolist()
    [0.5]
    """
    if numbers_HW is None:
        return np.array([_of_picture(term, doubt_HW, labels_HW, weights_C, background)])
    assert term.kind not in OF_PICTURES
    inside = numbers_HW.ravel() >= 0
    of_N, doubt_N = numbers_HW.ravel()[inside], doubt_HW.ravel()[inside].astype(np.float64)
    if term.kind == "top":
        return _top(doubt_N, of_N, regions, term.number / 100)
    weight_N: np.ndarray = np.ones(len(doubt_N))
    if term.kind == "no-boundary":
        assert labels_HW is not None
        weight_N = away_from_boundaries(labels_HW).ravel()[inside].astype(np.float64)
    count_R = np.bincount(of_N, weight_N, regions)
    if term.kind == "class-weighted":
        assert labels_HW is not None and weights_C is not None
        weight_N = weights_C[labels_HW.ravel()[inside]]
    sum_R = np.bincount(of_N, weight_N * doubt_N, regions)
    return np.divide(sum_R, count_R, out=np.zeros(regions), where=count_R > 0)


def _of_picture(
    term: Term,
    doubt_HW: np.ndarray,
    labels_HW: np.ndarray | None,
    weights_C: np.ndarray | None,
    background: int,
) -> float:
    if term.kind == "patch":
        side = min(int(term.number), *doubt_HW.shape)
        means_HW = cv2.blur(doubt_HW.astype(np.float64), (side, side), anchor=(0, 0), borderType=cv2.BORDER_ISOLATED)
        return float(means_HW[: doubt_HW.shape[0] - side + 1, : doubt_HW.shape[1] - side + 1].max())
    if term.kind == "mean":
        return float(doubt_HW.mean(dtype=np.float64))
    if term.kind == "top":
        return _largest(doubt_HW, math.ceil(term.number / 100 * doubt_HW.size))
    assert labels_HW is not None
    if term.kind == "foreground":
        return _largest(doubt_HW, int((labels_HW != background).sum()))
    if term.kind == "class-weighted":
        assert weights_C is not None
        return float((weights_C[labels_HW] * doubt_HW).mean())
    away_HW = away_from_boundaries(labels_HW).astype(bool)
    return float(doubt_HW[away_HW].mean(dtype=np.float64)) if away_HW.any() else 0.0


def _largest(doubt_HW: np.ndarray, count: int) -> float:
    """Mean of so many largest values; 0 of none."""
    if not count:
        return 0.0
    values = doubt_HW.ravel()
    return float(np.partition(values, values.size - count)[values.size - count :].mean(dtype=np.float64))


def _top(doubt_N: np.ndarray, of_N: np.ndarray, regions: int, share: float) -> np.ndarray:
    order_N = np.lexsort((-doubt_N, of_N))
    sizes_R = np.bincount(of_N, minlength=regions)
    rank_N = np.arange(len(of_N)) - np.repeat(sizes_R.cumsum() - sizes_R, sizes_R)
    kept_R = np.ceil(share * sizes_R)
    of_N, doubt_N = of_N[order_N], doubt_N[order_N]
    kept_N = rank_N < kept_R[of_N]
    sum_R = np.bincount(of_N[kept_N], doubt_N[kept_N], regions)
    return np.divide(sum_R, kept_R, out=np.zeros(regions), where=kept_R > 0)
