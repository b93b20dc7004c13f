"""Does doubt find the wrong pixels? An error is the positive case, a map's doubt in [0, 1] its score.

What is kept of any number of pixels is two histograms over K = 49,154 bins of doubt, one of right pixels and one of wrong
ones: 960 KiB a map. Bins are 1,024 an octave from 2⁻⁴⁸ to 1 (the upper bits of a float32), so they lie close where the
doubt of sharp predictions crowds; 0 and 1 have bins of their own, and what is between 0 and 2⁻⁴⁸ is in one with the next.

A bin that has seen one value only is a tie. Pixels of another bin are taken to be in random order, and figures are the
expectation over it: for doubt of a sharp softmax within 2e-6 of those of a million sorted pixels, 1e-6 of five million.

Letters: K bins from sure to doubtful, J coarse ones, Q points of a curve, T thresholds; `*B` are replicates, or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Real, UInt8

from seguncert.kernels import compiled

RIGHT, WRONG, VOID = 0, 1, 2  # what became of a pixel
OCTAVES = 48
BINS, COARSE_BINS = OCTAVES * 1024 + 2, OCTAVES * 16 + 2  # K and J
SHIFT, LOWEST_BITS = np.int64(23 - 10), np.int64((127 - OCTAVES) << 10)
EMPTY, MIXED = np.int32(-1), np.int32(-2)  # in place of the bits of a bin's only value; doubt is never negative
ROUNDING = 1e-5  # how far outside [0, 1] a map may be and is cut off


@dataclass
class Detection:
    """Right and wrong pixels by doubt; parts merge to the whole.

    `counts_2K` holds both histograms, `only_K` the float32 bits of a bin's only value, or `EMPTY` or `MIXED`.

    >>> detection = Detection.empty()
    >>> doubt = np.array([0.1, 0.2, 0.2, 0.3, 0.9], np.float32)
    >>> detection.update(doubt, np.array([RIGHT, RIGHT, WRONG, VOID, WRONG], np.uint8))
    >>> {name: round(float(value), 4) for name, value in detection.compute().items()}  # doctest: +NORMALIZE_WHITESPACE
    {'error_auroc': 0.875, 'error_ap': 0.8333, 'error_fpr95': 0.5,
     'aurc': 0.2708, 'e_aurc': 0.0625, 'ause': 0.125}
    """

    counts_2K: Int64[np.ndarray, "2 K"]
    only_K: Int32[np.ndarray, " K"]

    @classmethod
    def empty(cls) -> Detection:
        """Of no pixel."""
        return cls(np.zeros((2, BINS), np.int64), np.full(BINS, EMPTY))

    def update(
        self, doubt: Float32[np.ndarray, "*n"], outcome: UInt8[np.ndarray, "*n"], name: str = "doubt", weight: int = 1
    ) -> None:
        """Add pixels with `doubt` in [0, 1] that came out `RIGHT` or `WRONG`, `weight` times; those that are `VOID` do not count.

        Raises ValueError for another shape, NaN or a value outside [0, 1]; `name` says whose, and the sums are of no
        use then.
        """
        check_shape(name, doubt.shape, outcome.shape)
        if _count(doubt.ravel(), outcome.ravel(), weight, self.counts_2K, self.only_K):
            wrong = doubt[~((doubt >= -ROUNDING) & (doubt <= 1 + ROUNDING))]
            raise ValueError(
                f"{name}: expected values in [0, 1]. Received: {wrong.size} outside it, the first is {wrong[0]}."
                " Divide the map by its bound, and look for NaN in what the model returned."
            )

    def merge(self, other: Detection) -> None:
        """Add what another has counted."""
        self.counts_2K += other.counts_2K
        same_K = (self.only_K == other.only_K) | (other.only_K == EMPTY)
        self.only_K = np.where(same_K, self.only_K, np.where(self.only_K == EMPTY, other.only_K, MIXED))

    def tie_K(self) -> Bool[np.ndarray, " K"]:
        """Bins whose pixels all have the same doubt."""
        return self.only_K != MIXED

    def compute(self, unit: int = 1) -> dict[str, np.ndarray]:
        """See `figures`; each pixel was added `unit` times, right and wrong ones together."""
        right_K, wrong_K = self.counts_2K / unit
        return figures(right_K, wrong_K, self.tie_K())

    def coarse(self) -> tuple[Int64[np.ndarray, "2 J"], Bool[np.ndarray, " J"]]:
        """Counts and ties over 16 bins an octave, each the sum of 64."""
        starts_J = np.concatenate([[0], np.arange(1, BINS, 64)])
        used_J = np.add.reduceat(self.only_K != EMPTY, starts_J, dtype=np.int64)
        mixed_J = np.logical_or.reduceat(self.only_K == MIXED, starts_J)
        return np.add.reduceat(self.counts_2K, starts_J, axis=1), (used_J <= 1) & ~mixed_J

    def risk_coverage(self, points: int = 101) -> RiskCoverage:
        """Error rate among the surest pixels, for shares of them from 0 to 1."""
        return _risk_coverage(self.counts_2K[RIGHT], self.counts_2K[WRONG], np.linspace(0, 1, points))

    def accuracy_uncertainty(self, thresholds: Sequence[float]) -> AccuracyUncertainty:
        """Accuracy against doubt when what has doubt below a threshold is called certain (Mukhoti, Gal 2018)."""
        threshold_T = np.array([float(EDGES_K[_bin_of(np.float32(t))]) for t in thresholds])
        below_T = np.searchsorted(EDGES_K, threshold_T, side="left")
        sure_2T = np.concatenate([np.zeros((2, 1), np.int64), self.counts_2K.cumsum(1)], axis=1)[:, below_T]
        total = self.counts_2K.sum()
        doubtful_wrong_T = self.counts_2K[WRONG].sum() - sure_2T[WRONG]
        return AccuracyUncertainty(
            threshold_T,
            ratio(sure_2T[RIGHT], sure_2T.sum(0)),
            ratio(doubtful_wrong_T, self.counts_2K[WRONG].sum()),
            ratio(sure_2T[RIGHT] + doubtful_wrong_T, total),
        )

    def equal_mass_ece(self, bins: int = 15) -> float:
        """Expected calibration error of confidence = 1 − doubt over `bins` bins of (nearly) equal numbers of pixels.

        Bins of doubt are not split, so a tie is in one bin. The doubt of a bin of many values is taken to be its middle:
        at most 1/2048 of itself from what it is (Nixon et al. 2019; Nguyen, O'Connor 2015).
        """
        count_K = self.counts_2K.sum(0)
        confidence_K = 1 - np.where(self.only_K >= 0, self.only_K.view(np.float32), _middle_K()).astype(np.float64)
        if count_K.sum() == 0:
            return float("nan")
        before_K = count_K.cumsum() - count_K / 2
        of_K = np.minimum((bins * before_K / count_K.sum()).astype(np.int64), bins - 1)
        gap_M = np.bincount(of_K, count_K * confidence_K - self.counts_2K[RIGHT], bins)
        return float(np.abs(gap_M).sum() / count_K.sum())


@dataclass(frozen=True)
class RiskCoverage:
    """Error rate `risk_Q` of the share `coverage_Q` of pixels that are surest, and of an oracle's choice.

    At coverage 0 it is that of the surest bin. With 1 − coverage as what is removed, and divided by the error rate of
    all, these are the sparsification curves of Ilg et al. 2018.
    """

    coverage_Q: Float64[np.ndarray, " Q"]
    risk_Q: Float64[np.ndarray, " Q"]
    oracle_Q: Float64[np.ndarray, " Q"]

    def sparsification(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Share removed from 0 up, and what is left of the error rate: by the map, by the oracle; NaN without error."""
        of_all = self.risk_Q[-1:]
        return 1 - self.coverage_Q[::-1], ratio(self.risk_Q[::-1], of_all), ratio(self.oracle_Q[::-1], of_all)


@dataclass(frozen=True)
class AccuracyUncertainty:
    """Shares for each threshold; a pixel is certain if its doubt is below it. NaN where there is no such pixel.

    `threshold_T` is the edge of a bin, at most 1/1024 below what was asked for.
    """

    threshold_T: Float64[np.ndarray, " T"]
    accurate_if_certain_T: Float64[np.ndarray, " T"]
    uncertain_if_inaccurate_T: Float64[np.ndarray, " T"]
    pavpu_T: Float64[np.ndarray, " T"]  # accurate and certain, or neither


def figures(
    right_K: Real[np.ndarray, "*B K"], wrong_K: Real[np.ndarray, "*B K"], tie_K: Bool[np.ndarray, " K"]
) -> dict[str, Any]:
    """How well doubt finds errors, all in [0, 1], for histograms in order of doubt.

    - `error_auroc`: how often a wrong pixel has more doubt than a right one; ties count half.
    - `error_ap`: mean precision at each error found; a tie is one threshold, as in scikit-learn.
    - `error_fpr95`: share of right pixels above the threshold that finds 95 % of the errors.
    - `aurc`: mean over i = 1 … N of the error rate among the i surest pixels; the expectation over the order of ties
      (Geifman, El-Yaniv 2017). `e_aurc`: less that of an oracle, which is sure of all right pixels first (2019).
    - `ause`: area between the sparsification curves of map and oracle (Ilg et al. 2018), each 1 at its start: for an
      error that is 0 or 1 that is e_aurc / error rate.

    NaN: auroc and fpr95 without right or wrong pixels, ap and ause without wrong ones, all without pixels.
    """
    aurc = area_under_risk_coverage(right_K, wrong_K)
    right, wrong = right_K.sum(-1), wrong_K.sum(-1)
    excess = aurc - ratio(wrong - right * harmonic_gap(right, wrong), right + wrong)
    return {
        "error_auroc": auroc(right_K, wrong_K),
        "error_ap": average_precision(right_K, wrong_K, tie_K),
        "error_fpr95": false_positive_rate(right_K, wrong_K, tie_K, 0.95),
        "aurc": aurc,
        "e_aurc": excess,
        "ause": ratio(excess, ratio(wrong, right + wrong)),
    }


def auroc(right_K: Real[np.ndarray, "*B K"], wrong_K: Real[np.ndarray, "*B K"]) -> Any:
    """Probability that a wrong pixel has more doubt than a right one, ties half.

    >>> float(auroc(np.array([2, 1, 0]), np.array([0, 1, 1])))
    0.9166666666666666
    """
    below_K = right_K.cumsum(-1) - right_K / 2
    return ratio((wrong_K * below_K).sum(-1), right_K.sum(-1) * wrong_K.sum(-1).astype(np.float64))


def average_precision(
    right_K: Real[np.ndarray, "*B K"], wrong_K: Real[np.ndarray, "*B K"], tie_K: Bool[np.ndarray, " K"]
) -> Any:
    """Mean over wrong pixels of the precision where each is found, from the most doubtful down.

    In a bin that is no tie the i-th of w wrong pixels has r·i/(w + 1) of the bin's r right ones before it, on average.

    >>> float(average_precision(np.array([2, 1, 0]), np.array([0, 1, 1]), np.ones(3, bool)))  # (1 + 2/3) / 2
    0.8333333333333333
    """
    right_K, wrong_K, tie_K = right_K[..., ::-1], wrong_K[..., ::-1], tie_K[..., ::-1]
    found_K, false_K = wrong_K.cumsum(-1), right_K.cumsum(-1)
    at_once_K = wrong_K * found_K / np.maximum(found_K + false_K, 1)
    step_K = 1 + right_K / (wrong_K + 1)
    offset_K = (found_K - wrong_K + false_K - right_K) / step_K
    one_by_one_K = (wrong_K + (found_K - wrong_K - offset_K) * harmonic_gap(offset_K, wrong_K)) / step_K
    return ratio(np.where(tie_K, at_once_K, one_by_one_K).sum(-1), wrong_K.sum(-1))


def false_positive_rate(
    right_K: Real[np.ndarray, "*B K"], wrong_K: Real[np.ndarray, "*B K"], tie_K: Bool[np.ndarray, " K"], found: float
) -> Any:
    """Share of right pixels among those flagged when, from the most doubtful down, the share `found` of errors is.

    >>> float(false_positive_rate(np.array([2, 1, 0]), np.array([0, 1, 1]), np.ones(3, bool), 0.95))
    0.3333333333333333
    """
    right_K, wrong_K, tie_K = right_K[..., ::-1], wrong_K[..., ::-1], tie_K[..., ::-1]
    found_K, false_K = wrong_K.cumsum(-1), right_K.cumsum(-1)
    target_1 = found * found_K[..., -1:] - 1e-9  # 0.95 · 20 is to be 19
    at_1 = (found_K >= target_1).argmax(-1)[..., None]
    w_1, r_1 = np.take_along_axis(wrong_K, at_1, -1), np.take_along_axis(right_K, at_1, -1)
    before_1 = np.take_along_axis(found_K, at_1, -1) - w_1
    share_1 = np.where(tie_K[at_1], 1.0, (target_1 - before_1) / (w_1 + 1))
    flagged = (np.take_along_axis(false_K, at_1, -1) - r_1 + share_1 * r_1)[..., 0]
    return ratio(np.where(found_K[..., -1] > 0, flagged, np.nan), false_K[..., -1])


def area_under_risk_coverage(right_K: Real[np.ndarray, "*B K"], wrong_K: Real[np.ndarray, "*B K"]) -> Any:
    """Mean over i of the error rate among the i surest pixels, each bin in random order; exact for ties.

    After n₀ pixels with e₀ errors, n pixels with w add Σⱼ (e₀ + j w/n) / (n₀ + j) = w + (e₀ − n₀ w/n) Σⱼ 1/(n₀ + j).

    >>> round(float(area_under_risk_coverage(np.array([1, 0]), np.array([0, 1]))), 6)  # (0 + 1/2) / 2
    0.25
    """
    count_K = right_K + wrong_K
    before_K, errors_K = count_K.cumsum(-1) - count_K, wrong_K.cumsum(-1) - wrong_K
    rate_K = wrong_K / np.maximum(count_K, 1)
    risk_K = wrong_K + (errors_K - before_K * rate_K) * harmonic_gap(before_K, count_K)
    return ratio(risk_K.sum(-1), count_K.sum(-1))


def _risk_coverage(right_K: np.ndarray, wrong_K: np.ndarray, coverage_Q: np.ndarray) -> RiskCoverage:
    count_K = right_K + wrong_K
    used_K = count_K > 0
    right, total = right_K.sum(), count_K.sum()
    if total == 0:
        return RiskCoverage(coverage_Q, np.full_like(coverage_Q, np.nan), np.full_like(coverage_Q, np.nan))
    pixels = np.concatenate([[0], count_K[used_K].cumsum()])
    errors = np.concatenate([[0], wrong_K[used_K].cumsum()])
    asked_Q = coverage_Q * total
    first_risk, first_oracle = errors[1] / pixels[1], float(right == 0)
    risk_Q = np.where(asked_Q > 0, ratio(np.interp(asked_Q, pixels, errors), asked_Q), first_risk)
    oracle_Q = np.where(asked_Q > 0, ratio(np.maximum(asked_Q - right, 0), asked_Q), first_oracle)
    return RiskCoverage(coverage_Q, risk_Q, oracle_Q)


def ratio(above: Any, below: Any) -> Any:
    """above / below, NaN where `below` is not positive.

    >>> ratio(np.array([1.0, 0.0]), np.array([4, 0]))
    array([0.25,  nan])
    """
    above, below = np.broadcast_arrays(np.asarray(above, np.float64), below)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def check_shape(name: str, received: Sequence[int], expected: Sequence[int]) -> None:
    """Raise ValueError unless both are the same; compiled code would read beyond the end."""
    if tuple(received) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}. Received: {tuple(received)}")


def harmonic_gap(q: Any, n: Any) -> Any:
    """Σ 1/(q + j) for j = 1 … n, by eight terms and the asymptotic series: absolute error 1e-8 or less.

    >>> round(float(harmonic_gap(0, 4)), 6)  # 1 + 1/2 + 1/3 + 1/4
    2.083333
    """
    low, high = q + 8.5, q + n + 8.5
    early = sum(n / ((q + k) * (q + n + k + 0.0)) for k in range(1, 9))
    series = (high**-2.0 - low**-2.0) / 24 - (high**-4.0 - low**-4.0) * (7 / 960)
    return early + np.log1p(n / low) + series


@compiled
def _bin_of(doubt):
    """Which bin a float32 in [0, 1] is in."""
    if doubt <= 0:
        return np.int64(0)
    return max((np.int64(np.float32(doubt).view(np.int32)) >> SHIFT) - LOWEST_BITS, np.int64(0)) + 1


@compiled
def _count(doubt_N, outcome_N, weight, counts_2K, only_K):
    """Add pixels to the histograms; the number of values outside [0, 1], at the first of which it stops."""
    low, high = np.float32(-ROUNDING), np.float32(1 + ROUNDING)
    for i in range(len(doubt_N)):
        doubt = doubt_N[i]
        if not (doubt >= low and doubt <= high):
            return 1
        outcome = outcome_N[i]
        if outcome == VOID:
            continue
        doubt = min(doubt, np.float32(1))
        k = _bin_of(doubt)
        bits = np.float32(doubt).view(np.int32) if k else np.int32(0)
        counts_2K[outcome, k] += weight
        only = only_K[k]
        if only != MIXED and only != bits:
            only_K[k] = bits if only == EMPTY else MIXED
    return 0


def _edges_K() -> np.ndarray:
    bits_K = ((np.arange(BINS - 1) + LOWEST_BITS) << SHIFT).astype(np.int32)
    return np.concatenate([[0.0], [0.0], bits_K.view(np.float32)[1:].astype(np.float64)])


EDGES_K = _edges_K()  # where each bin begins; the second begins above 0


def _middle_K() -> np.ndarray:
    return np.append((EDGES_K[:-1] + EDGES_K[1:]) / 2, 1.0)
