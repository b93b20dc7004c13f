"""How good are the masks of some pixels, and are their probabilities right? One pass over logits, into sums.

Everything that is reported follows from counts (int64) and sums (float64), so pictures, parts of a run and bootstrap
replicates are added alike. With p the softmax, y the true class, ŷ = argmax p and p̂ = max p, over pixels:

    nll      mean −ln p_y in nats          brier   mean Σ_c (p_c − [y = c])², in [0, 2]
    iou_c    n(y = c, ŷ = c) / n(y = c or ŷ = c); `miou` is their mean over classes that occur or are shown

Letters: C classes, K raters, R rows of a band, W columns, N pixels, M bins of equal width over [0, 1]; in front `*B`, replicates or
nothing. In the compiled loops B is a block of pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer, UInt8
from torch import Tensor

from seguncert.detection import RIGHT, VOID, WRONG, check_shape, ratio
from seguncert.kernels import LOG2E, LOWEST, MANTISSA, ONE, ONE_BITS, P1, P2, P3, P4, P5, P6, ROUND, compiled

M = 15
BLOCK = 512  # pixels at once: what is kept of them fits into a first-level cache
PER_IMAGE = ("accuracy", "nll", "brier", "ece", "confidence")
PER_LOG = 32  # pixels whose 1 + Σ exp are multiplied before a logarithm is taken: C^32 is a float64 for C below 2^31
ZERO, BINS = np.float32(0), np.float32(M)


@dataclass
class Reliability:
    """Forecasts of an event in M bins [m/M, (m + 1)/M) of equal width, the last one closed: 1 is in it, 0 in the first.

    `count` says how many, `hits` how often the event came, `forecast` the sum of the probabilities. With n_m, ȳ_m and
    p̄_m the count, the frequency and the mean forecast of bin m, N = Σ n_m:

    >>> bins = Reliability(np.array([4, 0, 6]), np.array([1, 0, 6]), np.array([0.8, 0.0, 5.4]))
    >>> round(float(bins.ece()), 4), round(float(bins.mce()), 4)  # |0.8 − 1| + |5.4 − 6| of 10; 0.1 in the third bin
    (0.08, 0.1)
    """

    count: Int64[np.ndarray, "*B M"]
    hits: Int64[np.ndarray, "*B M"]
    forecast: Float64[np.ndarray, "*B M"]

    @classmethod
    def empty(cls) -> Reliability:
        """Of no forecast."""
        return cls(np.zeros(M, np.int64), np.zeros(M, np.int64), np.zeros(M))

    def update(self, confidence_N: Float32[np.ndarray, " N"], correct_N: Bool[np.ndarray, " N"]) -> None:
        """Add forecasts and whether the event came.

        Raises ValueError for NaN or a confidence outside [0, 1]; the sums are of no use then.
        """
        check_shape("correct", correct_N.shape, confidence_N.shape)
        outside = _fill(confidence_N, correct_N, self.count, self.hits, self.forecast)
        if outside:
            raise ValueError(f"confidence: expected values in [0, 1]. Received: {outside} outside it, or NaN")

    def merge(self, other: Reliability) -> None:
        """Add what another has counted."""
        self.count += other.count
        self.hits += other.hits
        self.forecast += other.forecast

    def ece(self) -> Any:
        """Expected calibration error Σ (n_m/N) |p̄_m − ȳ_m| (Naeini et al. 2015; Guo et al. 2017), in [0, 1]."""
        return ratio(np.abs(self.forecast - self.hits).sum(-1), self.count.sum(-1))

    def mce(self) -> Any:
        """Maximum calibration error max |p̄_m − ȳ_m| over bins that hold anything, in [0, 1]; NaN if none does."""
        gap = np.where(self.count > 0, np.abs(self.forecast - self.hits) / np.maximum(self.count, 1), -1.0)
        return np.where(self.count.sum(-1) > 0, gap.max(-1), np.nan)

    def ece_l2_debiased(self, unit: int = 1) -> Any:
        """√ max(0, Σ (n_m/N) [(p̄_m − ȳ_m)² − ȳ_m(1 − ȳ_m)/(n_m − 1)]) (Kumar, Liang, Ma 2019, section 5), in [0, 1].

        A bin of one pixel says nothing about its frequency's variance and is left out of both sums. The correction is
        for independent pixels; theirs are not, so it is a lower bound of what should be taken off. Each of them was
        counted `unit` times.
        """
        count = np.where(self.count > unit, self.count / unit, 0)
        many = np.maximum(count, 2)
        frequency, forecast = self.hits / unit / many, self.forecast / unit / many
        squared = (forecast - frequency) ** 2 - frequency * (1 - frequency) / (many - 1)
        return np.sqrt(np.maximum(ratio((count * squared).sum(-1), count.sum(-1)), 0))

    def brier_split(self) -> tuple[Any, Any, Any]:
        """Reliability Σ(n_m/N)(p̄_m − ȳ_m)², resolution Σ(n_m/N)(ȳ_m − ȳ)² and uncertainty ȳ(1 − ȳ) (Murphy 1973).

        reliability − resolution + uncertainty is the Brier score of the event when each forecast is replaced by p̄_m.
        """
        many = np.maximum(self.count, 1)
        N = self.count.sum(-1)
        frequency, forecast = self.hits / many, self.forecast / many
        of_all = ratio(self.hits.sum(-1), N)
        resolution = (self.count * (frequency - of_all[..., None]) ** 2).sum(-1)
        return ratio((self.count * (forecast - frequency) ** 2).sum(-1), N), ratio(resolution, N), of_all * (1 - of_all)


def calibration_error(confidence_N: Float32[np.ndarray, " N"], correct_N: Bool[np.ndarray, " N"]) -> float:
    """Expected calibration error of confidences in [0, 1]: see `Reliability`, which adds up pictures. NaN for no pixel.

    Raises ValueError for NaN or a confidence outside [0, 1].

    >>> calibration_error(np.array([1.0, 0.0, 0.5, 0.5], np.float32), np.array([True, False, True, False]))
    0.0
    """
    bins = Reliability.empty()
    bins.update(confidence_N, correct_N)
    return float(bins.ece())


def boundary_band(
    labels_HW: Integer[np.ndarray, "H W"], width: int, *, ignore_index: int | None
) -> Bool[np.ndarray, "H W"]:
    """Labelled pixels from which another label is at most `width` rows and columns away (Chebyshev distance).

    Pixels of the ignore index make no boundary and are not in the band. Raises ValueError for a negative width.

    >>> boundary_band(np.array([[0, 0, 0, 1, 255, 2]]), 1, ignore_index=255).astype(int)
    array([[0, 0, 1, 1, 0, 0]])
    """
    if width < 0:
        raise ValueError(f"boundary width: expected 0 or more pixels. Received: {width}")
    valid_HW = np.ones(labels_HW.shape, bool) if ignore_index is None else labels_HW != ignore_index
    own_HW = labels_HW.astype(np.float32)
    window = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    highest_HW = cv2.dilate(np.where(valid_HW, own_HW, np.float32(-np.inf)), window)
    lowest_HW = cv2.erode(np.where(valid_HW, own_HW, np.float32(np.inf)), window)
    return valid_HW & ((highest_HW != own_HW) | (lowest_HW != own_HW))


@dataclass
class Scores:
    """Counts and sums of a segmentation in C classes, from which all but the finding of errors follows.

    Every field but `unit` is a sum, so parts merge to the whole; replicates lie along leading axes. Where a pixel may have
    several raters, it counts as `unit` pixels, in equal parts with the label of each: counts stay whole numbers.
    """

    confusion: Int64[np.ndarray, "*B C C"]  # pixels of true class i shown as class j
    losses: Float64[np.ndarray, "*B 2"]  # −ln p_y where that is finite, and Brier score
    infinite: Int64[np.ndarray, "*B 1"]  # pixels whose true class has probability 0
    regions: Reliability  # of the shown class: interior and boundary, "*B 2 M"
    classwise: Reliability  # of each class, "*B C M"
    images: Int64[np.ndarray, "*B 2"]  # all pictures, and those with a labelled pixel
    per_image: Float64[np.ndarray, "*B 2 5"]  # of the latter, figures `PER_IMAGE` and their squares
    unit: int = 1

    @classmethod
    def empty(cls, C: int, *leading: int, raters: int = 1) -> Scores:
        """Of no pixel; `leading` axes are those of replicates, `raters` how many a pixel has at most."""

        def counts(*shape: int) -> np.ndarray:
            return np.zeros((*leading, *shape), np.int64)

        def sums(*shape: int) -> np.ndarray:
            return np.zeros((*leading, *shape))

        regions = Reliability(counts(2, M), counts(2, M), sums(2, M))
        classwise = Reliability(counts(C, M), counts(C, M), sums(C, M))
        per_image = sums(2, len(PER_IMAGE))
        return cls(counts(C, C), sums(2), counts(1), regions, classwise, counts(2), per_image, parts_of(raters))

    def arrays(self) -> list[np.ndarray]:
        """All sums, always in the same order."""
        bins = [[part.count, part.hits, part.forecast] for part in (self.regions, self.classwise)]
        return [self.confusion, self.losses, self.infinite, *bins[0], *bins[1], self.images, self.per_image]

    def update(
        self,
        logits_CRW: Float[Tensor, "C R W"],
        labels_RW: Integer[np.ndarray, "R W"],
        boundary_RW: Bool[np.ndarray, "R W"] | None = None,
        *,
        ignore_index: int | None,
    ) -> tuple[Float32[np.ndarray, "R W"], UInt8[np.ndarray, "R W"]]:
        """Add pixels whose prediction is softmax(logits) over C; those labelled `ignore_index` do not count.

        Returns the doubt 1 − p̂ of each pixel, as Σ of the other probabilities and so without rounding near 0, and
        whether it came out `RIGHT`, `WRONG` or `VOID`. Raises ValueError for a label outside [0, C) that is not the
        ignore index, NaN or +∞ among the logits, −∞ for all classes, or shapes that differ; the sums are of no use then.
        """
        check_shape("logits", logits_CRW.shape, (len(self.confusion), *labels_RW.shape))
        if boundary_RW is not None:
            check_shape("boundary", boundary_RW.shape, labels_RW.shape)
        logits_CN = logits_CRW.detach().float().contiguous().flatten(1).numpy()
        labels_N = labels_RW.astype(np.int64).ravel()
        band_N = np.zeros(len(labels_N), bool) if boundary_RW is None else np.ascontiguousarray(boundary_RW).ravel()
        doubt_N, outcome_N = np.empty(len(labels_N), np.float32), np.empty(len(labels_N), np.uint8)
        fault = _score(
            logits_CN, labels_N, ignore_index is not None, ignore_index or 0, band_N, *self.arrays()[:9],
            doubt_N, outcome_N,
        )  # fmt: skip
        if fault:
            raise ValueError(complaint(logits_CN, labels_N, ignore_index))
        return doubt_N.reshape(labels_RW.shape), outcome_N.reshape(labels_RW.shape)

    def update_raters(
        self,
        logits_CRW: Float[Tensor, "C R W"],
        labels_KRW: Integer[np.ndarray, "*K R W"],
        boundary_RW: Bool[np.ndarray, "R W"] | None = None,
        *,
        ignore_index: int | None,
    ) -> tuple[Float32[np.ndarray, "R W"], list[tuple[UInt8[np.ndarray, "R W"], int]]]:
        """Add pixels with labels of one or of K raters; of a pixel those who left it void do not count.

        Each figure becomes its mean over a rater drawn for each pixel: of `nll` that is −Σ_c t_c ln p_c, where t is the share
        of the raters who say c. Only `brier` is Σ_c (p_c − t_c)²; its mean would be larger by 1 − Σ_c t_c².

        Returns doubt, and outcomes as `update` does, each with the weight of its pixels. Raises ValueError as `update`, and
        for more raters than were declared.
        """
        if labels_KRW.ndim == 2:
            labels_KRW = labels_KRW[None]
        K = len(labels_KRW)
        if self.unit % parts_of(K):
            raise ValueError(f"labels: expected those of as many raters as declared, or fewer. Received: those of {K}")
        if K * self.unit == 1:
            doubt_RW, outcome_RW = self.update(logits_CRW, labels_KRW[0], boundary_RW, ignore_index=ignore_index)
            return doubt_RW, [(outcome_RW, 1)]
        void_KRW = np.zeros(labels_KRW.shape, bool) if ignore_index is None else labels_KRW == ignore_index
        said_KRW = np.take_along_axis(labels_KRW, void_KRW.argsort(0, kind="stable"), 0)  # void comes last
        given_RW, outcomes = K - void_KRW.sum(0), []
        for n in np.unique(given_RW[given_RW > 0]).tolist() or [1]:
            part, here_RW = Scores.empty(len(self.confusion)), given_RW == n
            for said_RW in said_KRW[:n]:
                own_RW = said_RW if here_RW.all() else np.where(here_RW, said_RW, ignore_index or 0)
                doubt_RW, outcome_RW = part.update(logits_CRW, own_RW, boundary_RW, ignore_index=ignore_index)
                outcomes.append((outcome_RW, self.unit // n))
            alike = sum(int((one_RW == said_KRW[:n])[:, here_RW].sum()) for one_RW in said_KRW[:n])
            part.losses[1] -= n * here_RW.sum() - alike / n  # n (1 − Σ t²) of each pixel
            self.merge(part, self.unit // n)
        return doubt_RW, outcomes

    def merge(self, other: Scores, weight: int = 1) -> None:
        """Add what another has counted, `weight` times."""
        for mine, theirs in zip(self.arrays(), other.arrays(), strict=True):
            mine += weight * theirs

    def close_image(self) -> dict[str, int | float]:
        """Figures of these pixels, which from now on count as those of one picture: `PER_IMAGE` and `pixels`.

        Without a labelled pixel they are NaN, and the picture does not enter the means over pictures.
        """
        named = self.compute() | {"confidence": ratio(self.regions.forecast.sum(), self.confusion.sum())}
        values = np.array([named[name] for name in PER_IMAGE])
        labelled = int(named["pixels"] > 0)
        self.images[:] = 1, labelled
        if labelled:
            self.per_image[:] = values, values**2
        return {"pixels": int(named["pixels"]), **dict(zip(PER_IMAGE, values.tolist(), strict=True))}

    def compute(self) -> dict[str, Any]:
        """All figures by name, with the leading axes of the sums; NaN where nothing was counted.

        One pixel whose true class has probability 0 makes `nll` infinite; `nll_infinite_pixels` says how many there are.

        >>> scores = Scores.empty(2)
        >>> import torch
        >>> probs_CRW = torch.tensor([[[0.8, 0.4, 0.9]], [[0.2, 0.6, 0.1]]])
        >>> doubt_RW, outcome_RW = scores.update(probs_CRW.log(), np.array([[0, 0, 9]]), ignore_index=9)
        >>> {name: round(float(scores.compute()[name]), 4) for name in ("miou", "accuracy", "nll", "brier", "ece")}
        {'miou': 0.25, 'accuracy': 0.5, 'nll': 0.5697, 'brier': 0.4, 'ece': 0.4}
        """
        count = self.confusion.sum((-1, -2))
        hits = np.diagonal(self.confusion, axis1=-2, axis2=-1)
        union = self.confusion.sum(-1) + self.confusion.sum(-2) - hits
        top = Reliability(self.regions.count.sum(-2), self.regions.hits.sum(-2), self.regions.forecast.sum(-2))
        reliability, resolution, uncertainty = top.brier_split()
        of_region = self.regions.ece()
        result = {
            "pixels": count // self.unit,
            "images": self.images[..., 0],
            "miou": ratio(ratio(hits, np.maximum(union, 1)).sum(-1), (union > 0).sum(-1)),
            "accuracy": ratio(hits.sum(-1), count),
            "nll": np.where(self.infinite[..., 0] > 0, np.inf, ratio(self.losses[..., 0], count)),
            "nll_infinite_pixels": -(-self.infinite[..., 0] // self.unit),
            "brier": ratio(self.losses[..., 1], count),
            "ece": top.ece(),
            "mce": top.mce(),
            "ece_l2_debiased": top.ece_l2_debiased(self.unit),
            "ece_classwise": self.classwise.ece().mean(-1),
            "ece_interior": of_region[..., 0],
            "ece_boundary": of_region[..., 1],
            "reliability": reliability,
            "resolution": resolution,
            "uncertainty": uncertainty,
        }
        labelled = self.images[..., 1:]
        mean = ratio(self.per_image[..., 0, :], labelled)
        with np.errstate(invalid="ignore"):  # an infinite nll has no spread
            variance = ratio(np.maximum(self.per_image[..., 1, :] - labelled * mean**2, 0), labelled - 1)
        for k, name in enumerate(PER_IMAGE):
            result |= {f"{name}_image_mean": mean[..., k], f"{name}_image_sd": np.sqrt(variance[..., k])}
        iou = ratio(hits, union)
        return result | {f"iou.{c}": iou[..., c] for c in range(iou.shape[-1])}


def parts_of(raters: int) -> int:
    """The least number of parts in which a pixel can be shared by so many raters, and by fewer.

    >>> parts_of(1), parts_of(2), parts_of(3), parts_of(4)
    (1, 2, 6, 12)
    """
    return math.lcm(*range(1, raters + 1))


def complaint(logits_CN: np.ndarray, labels_N: np.ndarray, ignore_index: int | None) -> str:
    """Why these pixels cannot be scored."""
    C = len(logits_CN)
    wrong = labels_N[((labels_N < 0) | (labels_N >= C)) & (True if ignore_index is None else labels_N != ignore_index)]
    if wrong.size:
        return (
            f"labels: expected 0 to {C - 1}, or the ignore index {'(none is set)' if ignore_index is None else ignore_index}."
            f" Received: {np.sum(wrong == wrong[0])} pixels with {wrong[0]}. Set the ignore index, or correct the labels."
        )
    bad = int((~(logits_CN < np.inf)).any(0).sum())
    what = (
        f"NaN or +inf at {bad} pixels"
        if bad
        else f"-inf for every class at {np.isneginf(logits_CN).all(0).sum()} pixels"
    )
    return (
        f"logits: expected finite numbers, or -inf for some classes. Received: {what}. Look at what the model returned."
    )


@compiled
def exponentials(logits_CN, start, width, e_CB, max_B, shown_B, others_B, squares_B):
    """e = exp(z − max z) for a block of pixels, the class of the maximum, Σ e and Σ e² of the others.

    False if a logit is NaN or +∞, or all of a pixel are −∞.
    """
    C = len(logits_CN)
    bad = 0
    max_B[:] = -np.inf
    shown_B[:] = 0
    for c in range(C):
        z_B = logits_CN[c, start : start + width]
        for x in range(width):
            z = z_B[x]
            higher = z > max_B[x]
            max_B[x] = z if higher else max_B[x]
            shown_B[x] = c if higher else shown_B[x]
            bad += 0 if z < np.inf else 1
    for x in range(width):
        bad += 0 if max_B[x] > -np.inf else 1
    if bad:
        return False
    others_B[:] = 0
    squares_B[:] = 0
    for c in range(C):
        z_B, e_B = logits_CN[c, start : start + width], e_CB[c]
        for x in range(width):
            power = max((z_B[x] - max_B[x]) * LOG2E, LOWEST)
            rounded = power + ROUND
            f = power - (rounded - ROUND)
            bits = np.int32((np.float32(rounded).view(np.int32) << MANTISSA) + ONE_BITS)
            e = ONE + f * (P1 + f * (P2 + f * (P3 + f * (P4 + f * (P5 + f * P6)))))
            e *= np.int32(bits).view(np.float32)
            e_B[x] = e
            other = ZERO if shown_B[x] == c else e
            others_B[x] += other
            squares_B[x] += other * other
    return True


@compiled
def _score(
    logits_CN, labels_N, ignores, ignore_index, band_N, confusion_CC, losses_2, infinite_1,
    count_2M, hits_2M, forecast_2M, count_CM, hits_CM, forecast_CM, doubt_N, outcome_N,
):  # fmt: skip
    """All sums of `Scores` in one pass; False stands for success, True for a pixel that cannot be scored."""
    C, N = logits_CN.shape
    B = min(BLOCK, N)
    e_CB, inverse_B = np.empty((C, B), np.float32), np.empty(B, np.float32)
    max_B, others_B, squares_B = np.empty(B, np.float32), np.empty(B, np.float32), np.empty(B, np.float32)
    shown_B = np.empty(B, np.int32)
    nll, brier = 0.0, 0.0
    for start in range(0, N, BLOCK):
        width = min(BLOCK, N - start)
        if not exponentials(logits_CN, start, width, e_CB, max_B, shown_B, others_B, squares_B):
            return True
        valid, product = 0, 1.0
        for x in range(width):
            i = start + x
            y, shown, others = labels_N[i], shown_B[x], others_B[x]
            inverse = ONE / (ONE + others)
            doubt_N[i] = others * inverse
            if ignores and y == ignore_index:
                outcome_N[i] = VOID
                inverse_B[x] = 0  # makes all probabilities 0, which no bin above the first counts
                continue
            if y < 0 or y >= C:
                return True
            valid += 1
            inverse_B[x] = inverse
            confusion_CC[y, shown] += 1
            right = y == shown
            outcome_N[i] = RIGHT if right else WRONG
            region, m = np.int64(band_N[i]), min(np.int64(inverse * BINS), M - 1)
            count_2M[region, m] += 1
            hits_2M[region, m] += right
            forecast_2M[region, m] += inverse
            e_y = e_CB[y, x]
            hits_CM[y, min(np.int64(e_y * inverse * BINS), M - 1)] += 1
            z_y = logits_CN[y, i]
            if z_y == -np.inf:
                infinite_1[0] += 1
            else:
                nll += max_B[x] - z_y
                product *= 1.0 + others
            if right:
                brier += (squares_B[x] + others * others) * inverse * inverse
            else:
                missed = 1.0 + others - e_y
                brier += (1.0 + squares_B[x] - e_y * e_y + missed * missed) * inverse * inverse
            if valid % PER_LOG == 0:
                nll += np.log(product)
                product = 1.0
        nll += np.log(product)
        for c in range(C):
            _add_class(e_CB[c, :width], inverse_B[:width], valid, count_CM[c], forecast_CM[c])
    losses_2[0] += nll
    losses_2[1] += brier
    return False


@compiled
def _add_class(e_B, inverse_B, valid, count_M, forecast_M):
    """Add the probabilities of one class for a block of pixels; most are in the first bin, so that is done at once."""
    low, above = _first_bin(e_B, inverse_B)
    forecast_M[0] += low
    count_M[0] += valid - above
    if above:
        for x in range(len(e_B)):
            p = e_B[x] * inverse_B[x]
            if p * BINS >= ONE:
                m = min(np.int64(p * BINS), M - 1)
                count_M[m] += 1
                forecast_M[m] += p


@partial(compiled, also=("reassoc",))
def _first_bin(e_B, inverse_B):
    """Sum of the probabilities in the first bin, and how many are above it."""
    low, above = ZERO, ZERO  # a float32 counts a block exactly, and as fast as it adds
    for x in range(len(e_B)):
        p = e_B[x] * inverse_B[x]
        is_above = p * BINS >= ONE
        low += ZERO if is_above else p
        above += ONE if is_above else ZERO
    return low, np.int64(above)


@compiled
def _fill(confidence_N, correct_N, count_M, hits_M, forecast_M):
    """Sort pixels into bins; the number of confidences outside [0, 1].

    Most pixels are in the last bin, and adding to it waits for what was added before: so there are four of each bin.
    """
    N, outside = len(confidence_N), 0
    counts_LM2, forecast_LM, bin_B = np.zeros((4, M, 2), np.int64), np.zeros((4, M)), np.empty(BLOCK, np.int32)
    for start in range(0, N, BLOCK):
        width = min(BLOCK, N - start)
        confidence_B, correct_B = confidence_N[start : start + width], correct_N[start : start + width]
        bad = 0
        for x in range(width):
            p = confidence_B[x]
            bad += 0 if p >= ZERO and p <= ONE else 1
            m = np.int32(p * BINS)
            bin_B[x] = m if m < M else M - 1
        if bad:
            outside += bad
            continue
        for x in range(width):
            lane, m = x & 3, bin_B[x]
            counts_LM2[lane, m, np.int64(correct_B[x])] += 1
            forecast_LM[lane, m] += confidence_B[x]
    count_M += counts_LM2.sum(0).sum(-1)
    hits_M += counts_LM2[:, :, 1].sum(0)
    forecast_M += forecast_LM.sum(0)
    return outside
