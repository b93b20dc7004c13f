"""Sets of classes for each pixel, with a promise that holds for any net: conformal prediction, an image at a time.

Pixels of one image resemble each other, so what is exchangeable is the image. The set of a pixel grows with a threshold
q; the loss of an image is the share of its labelled pixels whose true class is outside. Conformal risk control
(Angelopoulos, Bates, Fisch, Lei, Schuster 2024, theorem 1; losses in [0, 1] that fall with q) takes, of n images,

    q̂ = inf {q : (Σ_i loss_i(q) + 1) / (n + 1) ≤ α}        then E loss(q̂) of another exchangeable image ≤ α

The + 1 stands for that image at its worst; without it the promise fails for few images. Sets are {c : score_c ≤ q}:

    lac         1 − p_c, and 0 for the shown class (Sadinle, Lei, Wasserman 2019, with the shown class always in)
    lac-empty   1 − p_c as published: smallest on average; where α is above the error rate, some sets are empty
    aps         Σ p_k over p_k > p_c: the mass before the class (Romano, Sesia, Candès 2020, not randomised); never empty
    foreground  1 − Σ_{k in foreground} p_k: a mask rather than sets; the loss is the share of the foreground it misses

Kept are, for each image, a histogram of its scores, and of any number of images the sum of their losses at each of K
thresholds. A score s is binned as odds s/(1 − s), a ratio of two sums of exponentials, so nothing rounds near 0 or 1:
128 bins an octave from 2⁻⁴⁰ to 2⁴⁰. A threshold is the upper end of its bin, at most 0.8 % more odds than needed.

Letters: C classes, R rows of a band, W columns, N pixels, K bins, G groups: all classes together or each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer, UInt8
from torch import Tensor

from seguncert.detection import check_shape, ratio
from seguncert.kernels import compiled
from seguncert.scores import BLOCK, complaint, exponentials

KINDS = ("lac", "lac-empty", "aps", "foreground")
LAC, LAC_EMPTY, APS, FOREGROUND = range(4)
OCTAVES, BITS = 40, 7
BINS = 2 * OCTAVES * 2**BITS + 2  # K
SHIFT, LOWEST_BITS = np.int64(23 - BITS), np.int64((127 - OCTAVES) << BITS)
ABOVE = 1 + 2.0**-20  # a tie at the end of a bin stays in, however its sums are rounded
NEAR = 1e-9  # α (n + 1) is not 1 by a rounding error only


@dataclass(frozen=True)
class Aim:
    """What sets are made of, and what is to hold of them; the module says what each kind is.

    Attributes:
        C: number of classes, 1 to 255.
        kind: one of `KINDS`.
        by_class: a threshold for each class, and the promise for the pixels of each; not for a foreground.
        foreground: classes that make up the foreground, for that kind.
        covered: None bounds the expected share of pixels that are missed. A number β bounds the share of images of which
            less than β is covered; with that loss of 0 or 1 q̂ is the ⌈(n + 1)(1 − α)⌉-th smallest of what images need.
    """

    C: int
    kind: str = "lac"
    by_class: bool = False
    foreground: tuple[int, ...] = ()
    covered: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.C <= 255:
            raise ValueError(f"classes: expected 1 to 255. Received: {self.C}")
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}. Received: {self.kind!r}")
        if bool(self.foreground) != (self.kind == "foreground"):
            raise ValueError(
                f"foreground: expected classes with the kind foreground, and with no other. Received: {self.foreground} with {self.kind}"
            )
        if not set(self.foreground) <= set(range(self.C)) or len(set(self.foreground)) == self.C > 1:
            raise ValueError(
                f"foreground: expected some of the classes 0 to {self.C - 1}, not all. Received: {self.foreground}"
            )
        if self.by_class and self.kind == "foreground":
            raise ValueError("by_class: expected a kind with sets. Received: foreground, which has one threshold")
        if self.covered is not None and not 0 < self.covered <= 1:
            raise ValueError(f"covered: expected a share of an image's pixels in (0, 1]. Received: {self.covered}")

    @property
    def groups(self) -> int:
        """Number of thresholds."""
        return self.C if self.by_class else 1

    def counted_C(self) -> Bool[np.ndarray, " C"]:
        """Classes whose pixels can be missed: all, or the foreground."""
        return np.isin(np.arange(self.C), self.foreground) if self.foreground else np.ones(self.C, bool)


class ImageLosses:
    """Scores of one image's true classes, filled a band of rows at a time; `Losses.add` takes it."""

    def __init__(self, aim: Aim, ignore_index: int | None) -> None:
        self.aim, self.ignore_index = aim, ignore_index
        self.counts_GK = np.zeros((aim.groups, BINS), np.int64)

    def update(self, logits_CRW: Float[Tensor, "C R W"], labels_RW: Integer[np.ndarray, "R W"]) -> None:
        """Add a band of rows whose prediction is softmax(logits); pixels labelled `ignore_index` do not count.

        Raises ValueError for a label outside [0, C) that is not the ignore index, NaN or +∞ among the logits, −∞ for all
        classes, or shapes that differ; the image is to be dropped then.
        """
        aim = self.aim
        check_shape("logits", logits_CRW.shape, (aim.C, *labels_RW.shape))
        logits_CN, labels_N = _flat(logits_CRW), labels_RW.astype(np.int64).ravel()
        if _count(
            logits_CN, labels_N, self.ignore_index is not None, self.ignore_index or 0,
            KINDS.index(aim.kind), aim.by_class, aim.counted_C(), self.counts_GK,
        ):  # fmt: skip
            raise ValueError(complaint(logits_CN, labels_N, self.ignore_index))

    def losses_GK(self) -> Float64[np.ndarray, "G K"]:
        """Loss in [0, 1] at each threshold, falling to 0 at the last; NaN for a group without a pixel."""
        total_G1 = self.counts_GK.sum(1, keepdims=True)
        missed_GK = total_G1 - self.counts_GK.cumsum(1)
        if self.aim.covered is None:
            return ratio(missed_GK, total_G1)
        return np.where(total_G1 > 0, missed_GK > (1 - self.aim.covered) * total_G1 + NEAR, np.nan)


@dataclass
class Losses:
    """Losses of any number of images at each threshold; parts merge to the whole, up to rounding in the last digits.

    >>> import torch
    >>> losses = Losses.empty(Aim(2), ignore_index=255)
    >>> for p_true in (0.9, 0.8, 0.6, 0.3):  # four images of a pixel each
    ...     image = losses.begin()
    ...     image.update(torch.log(torch.tensor([p_true, 1 - p_true])).view(2, 1, 1), np.array([[0]]))
    ...     losses.add(image)
    >>> sets = losses.fit(alpha=0.2)  # (0 + 1)/(4 + 1): no image may be missed
    >>> bool(0.290 < sets.least_probability()[0] <= 0.3)
    True
    >>> sets.size(torch.log(torch.tensor([[[0.5, 0.9]], [[0.5, 0.1]]])))
    array([[2, 1]], dtype=uint8)
    """

    aim: Aim
    ignore_index: int | None
    sums_GK: Float64[np.ndarray, "G K"]
    images_G: Int64[np.ndarray, " G"]  # those that hold a pixel of the group

    @classmethod
    def empty(cls, aim: Aim, *, ignore_index: int | None) -> Losses:
        """Of no image. `ignore_index` None declares that every pixel has a label."""
        return cls(aim, ignore_index, np.zeros((aim.groups, BINS)), np.zeros(aim.groups, np.int64))

    def begin(self) -> ImageLosses:
        """Scores of a new image; several may be filled at once, in threads."""
        return ImageLosses(self.aim, self.ignore_index)

    def add(self, image: ImageLosses) -> None:
        """Add an image, once, from one thread at a time; without a pixel that counts it is none."""
        losses_GK = image.losses_GK()
        held_G = ~np.isnan(losses_GK[:, 0])
        self.sums_GK[held_G] += losses_GK[held_G]
        self.images_G += held_G

    def merge(self, other: Losses) -> None:
        """Add the images of another, which was begun with the same settings."""
        mine, theirs = (self.aim, self.ignore_index), (other.aim, other.ignore_index)
        if mine != theirs:
            raise ValueError(f"merge: expected losses with {mine}. Received: {theirs}")
        self.sums_GK += other.sums_GK
        self.images_G += other.images_G

    def fit(self, alpha: float) -> ConformalSets:
        """The smallest sets of which the promise holds with the expected loss `alpha` on an exchangeable image.

        A class that too few images hold, n + 1 < 1/α, is in every set. Raises ValueError if that is so of all.
        """
        check_enough(alpha, int(self.images_G.max()))
        bins = [risk_control(sums_K, int(n), alpha) for sums_K, n in zip(self.sums_GK, self.images_G, strict=True)]
        odds = tuple(math.inf if k is None else float(UPPER_K[k]) for k in bins)
        return ConformalSets(self.aim, alpha, odds, tuple(self.images_G.tolist()))


@dataclass
class Sizes:
    """How many classes the sets of labelled pixels hold, or whether a mask holds them, at each threshold.

    Parts merge to the whole.

    >>> import torch
    >>> sizes = Sizes.empty(Aim(2), ignore_index=255)
    >>> sizes.update(torch.log(torch.tensor([[[0.9, 0.7, 0.6]], [[0.1, 0.3, 0.4]]])), np.array([[0, 0, 255]]))
    >>> sizes.mean(ConformalSets(Aim(2), 0.1, (4.0,), (9,)))  # classes with p ≥ 0.2: one, and two
    1.5
    """

    aim: Aim
    ignore_index: int | None
    counts_GK: Int64[np.ndarray, "G K"]
    pixels: int = 0

    @classmethod
    def empty(cls, aim: Aim, *, ignore_index: int | None) -> Sizes:
        """Of no pixel."""
        return cls(aim, ignore_index, np.zeros((aim.groups, BINS), np.int64))

    def update(self, logits_CRW: Float[Tensor, "C R W"], labels_RW: Integer[np.ndarray, "R W"]) -> None:
        """Add a band of rows; all that matters of a label is whether it is the ignore index. Raises as `ImageLosses`."""
        aim = self.aim
        check_shape("logits", logits_CRW.shape, (aim.C, *labels_RW.shape))
        logits_CN, labels_N = _flat(logits_CRW), labels_RW.ravel()
        valid_N = np.ones(len(labels_N), bool) if self.ignore_index is None else labels_N != self.ignore_index
        if _count_all(logits_CN, valid_N, KINDS.index(aim.kind), aim.by_class, aim.counted_C(), self.counts_GK):
            raise ValueError(complaint(logits_CN, np.zeros(0, np.int64), None))
        self.pixels += int(valid_N.sum())

    def merge(self, other: Sizes) -> None:
        """Add the pixels of another, which was begun with the same settings."""
        if (self.aim, self.ignore_index) != (other.aim, other.ignore_index):
            raise ValueError(f"merge: expected sizes with {self.aim}, {self.ignore_index}. Received: {other.aim}, {other.ignore_index}")  # fmt: skip
        self.counts_GK += other.counts_GK
        self.pixels += other.pixels

    def mean(self, sets: ConformalSets) -> float:
        """Mean size of the sets, or the share that is in the mask; NaN of no pixel. Thresholds are taken for ends of bins."""
        ends_G = np.searchsorted(UPPER_K, np.array(sets.odds))
        inside = sum(int(counts_K[: end + 1].sum()) for counts_K, end in zip(self.counts_GK, ends_G, strict=True))
        return inside / self.pixels if self.pixels else math.nan


def images_needed(alpha: float) -> int:
    """The least number of images n for which 1/(n + 1) ≤ α.

    >>> images_needed(0.1), images_needed(0.05)
    (9, 19)
    """
    return math.ceil(1 / alpha - NEAR) - 1


def check_enough(alpha: float, n: int) -> None:
    """Raise ValueError unless α is in (0, 1) and n images, or more, can be fitted on with it."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a loss between 0 and 1. Received: {alpha}")
    if n < (least := images_needed(alpha)):
        raise ValueError(
            f"alpha {alpha}: expected at least {least} images with labelled pixels to fit on, since 1/(n + 1) is to be at most alpha."
            f" Received: {n}. Label more images, or take alpha {1 / (n + 1):.3f} or more."
        )


def risk_control(sums_K: Float64[np.ndarray, " K"], n: int, alpha: float) -> int | None:
    """The first threshold at which (Σ loss + 1)/(n + 1) ≤ α, for sums over n images; None if there is none.

    >>> risk_control(np.array([12.0, 3.0, 1.0, 0.0]), 19, alpha=0.1)
    2
    """
    fits_K = sums_K + 1 <= alpha * (n + 1) + NEAR
    return int(fits_K.argmax()) if fits_K.any() else None


@dataclass(frozen=True)
class ConformalSets:
    """Sets of classes, or a mask of the foreground, as fitted; logits in, at any size and in any bands.

    `odds` has for each group the largest s/(1 − s) that is in, infinity where all is; `images` on how many it was fitted.
    """

    aim: Aim
    alpha: float
    odds: tuple[float, ...]
    images: tuple[int, ...]

    def __post_init__(self) -> None:
        groups = self.aim.groups
        if len(self.odds) != groups or len(self.images) != groups:
            raise ValueError(
                f"conformal sets: expected {groups} thresholds and numbers of images. Received: {len(self.odds)}, {len(self.images)}"
            )
        if not 0 < self.alpha < 1 or not all(odds >= 0 for odds in self.odds):
            raise ValueError(
                f"conformal sets: expected alpha in (0, 1), odds of 0 or more. Received: {self.alpha}, {self.odds}"
            )

    def least_probability(self) -> tuple[float, ...]:
        """1 − q of each group: the probability from which lac has a class in, or a mask a pixel; 0 where all are."""
        return tuple(1 / (1 + odds) for odds in self.odds)

    def members(self, logits_CRW: Float[Tensor, "C R W"]) -> Bool[np.ndarray, "C R W"]:
        """Which classes are in the set of each pixel. Raises ValueError for NaN, other shapes, or a foreground."""
        if self.aim.kind == "foreground":
            raise ValueError("members: expected a kind with sets. Received: foreground, which has a mask")
        return self._inside(logits_CRW)

    def size(self, logits_CRW: Float[Tensor, "C R W"]) -> UInt8[np.ndarray, "R W"]:
        """Number of classes in the set of each pixel; 0 only of lac-empty."""
        return self.members(logits_CRW).sum(0, dtype=np.uint8)

    def size_map(self, logits_CRW: Float[Tensor, "C R W"]) -> Float32[np.ndarray, "R W"]:
        """(size − 1)/(C − 1) in [0, 1]: 0 for one class, or none, 1 for all."""
        others_RW = np.maximum(self.size(logits_CRW).astype(np.float32) - 1, 0)
        return others_RW / np.float32(max(1, self.aim.C - 1))

    def mask(self, logits_CRW: Float[Tensor, "C R W"]) -> Bool[np.ndarray, "R W"]:
        """Where the foreground may be: its probability is `least_probability` or more. ValueError for other kinds."""
        if self.aim.kind != "foreground":
            raise ValueError(f"mask: expected the kind foreground. Received: {self.aim.kind}, which has sets")
        return self._inside(logits_CRW)[self.aim.foreground[0]]

    def _inside(self, logits_CRW: Tensor) -> np.ndarray:
        """Members; of a foreground its classes, which are in or out together."""
        aim = self.aim
        check_shape("logits", logits_CRW.shape, (aim.C, *logits_CRW.shape[1:]))
        logits_CN = _flat(logits_CRW)
        odds_C = np.broadcast_to(np.array(self.odds), aim.C).copy()
        inside_CN = np.zeros(logits_CN.shape, bool)
        if _apply(logits_CN, KINDS.index(aim.kind), aim.counted_C(), odds_C, inside_CN):
            raise ValueError(complaint(logits_CN, np.zeros(0, np.int64), None))
        return inside_CN.reshape(logits_CRW.shape)

    @property
    def promise(self) -> str:
        """What holds, on which images, and what does not; no set should be shown without it."""
        aim, what, n = self.aim, "labelled pixels whose true class is in the set", f"{self.images[0]}"
        if aim.by_class:
            few, many = min(self.images), max(self.images)
            what, n = (
                "a class's pixels whose set holds it",
                f"{few}{f' to {many}' if few < many else ''} with that class",
            )
        elif aim.foreground:
            what, n = f"the foreground (class {_listed(aim.foreground)}) that is in the mask", f"{n} with foreground"
        held = f"the expected share of {what} is at least {1 - self.alpha:.4g}"
        if aim.covered is not None:
            held = f"the chance that the share of {what} is at least {aim.covered:.4g} is at least {1 - self.alpha:.4g}"
        everywhere = [c for c, odds in enumerate(self.odds) if math.isinf(odds)]
        if everywhere:
            held += f"; {f'class {_listed(everywhere)}' if aim.by_class else 'everything'} is always in, since no smaller sets would do"
        return (
            f"On images exchangeable with the {n} it was fitted on, which net and calibration have not learnt, {held};"
            " no promise for one given image or pixel, nor for another scene."
        )

    @property
    def note(self) -> str:
        """The promise in as few words as there is room for in a legend."""
        missed = "the labelled pixels of an exchangeable image miss their class"
        if self.aim.by_class:
            missed = "a class's pixels in an exchangeable image miss it"
        elif self.aim.foreground:
            missed = "the foreground of an exchangeable image is missed"
        if self.aim.covered is None:
            return f"on average at most {100 * self.alpha:.4g} % of {missed}"
        sure = f"{100 * (1 - self.alpha):.4g} %"
        return f"with a chance of {sure} or more, at most {100 * (1 - self.aim.covered):.4g} % of {missed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite threshold is null."""
        aim = self.aim
        return {
            "kind": aim.kind, "classes": aim.C, "by_class": aim.by_class, "foreground": list(aim.foreground),
            "covered": aim.covered, "alpha": self.alpha,
            "odds": [None if math.isinf(odds) else odds for odds in self.odds],
            "images": list(self.images), "promise": self.promise,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConformalSets:
        """What `to_dict` gave. Raises ValueError for anything else."""
        try:
            aim = Aim(
                values["classes"], values["kind"], values["by_class"], tuple(values["foreground"]), values["covered"]
            )
            odds = tuple(math.inf if each is None else float(each) for each in values["odds"])
            return cls(aim, float(values["alpha"]), odds, tuple(int(n) for n in values["images"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"conformal sets: expected what to_dict writes. Received: {dict(values)}, {error!r}"
            ) from None


def _listed(classes: Any) -> str:
    return ", ".join(map(str, classes))


def _flat(logits_CRW: Tensor) -> Float32[np.ndarray, "C N"]:
    return logits_CRW.detach().float().contiguous().flatten(1).numpy()


def _upper_K() -> np.ndarray:
    bits_K = ((np.arange(BINS - 1) + LOWEST_BITS) << SHIFT).astype(np.int32)
    return np.append(bits_K.view(np.float32).astype(np.float64) * ABOVE, math.inf)


UPPER_K = _upper_K()  # odds where each bin ends


@compiled
def _sums(e_CB, class_B, shown_B, others_B, kind, counted_C, against_B, within_B):
    """s and 1 − s of a class at each pixel of a block, times Σ e, with e = exp(z − max z) and others = Σ e − 1.

    Where the class is −1 they are 1 and 0, which no threshold but infinity lets in.
    """
    zero, one = np.float32(0), np.float32(1)
    for x in range(len(against_B)):
        c, against, within = class_B[x], zero, zero
        if c < 0:
            against = one
        elif kind == FOREGROUND:
            for k in range(len(e_CB)):
                if counted_C[k]:
                    within += e_CB[k, x]
                else:
                    against += e_CB[k, x]
        elif c == shown_B[x]:
            within, against = one, others_B[x] if kind == LAC_EMPTY else zero
        elif kind == APS:
            for k in range(len(e_CB)):
                if e_CB[k, x] > e_CB[c, x]:
                    against += e_CB[k, x]
                else:
                    within += e_CB[k, x]
        else:
            within = e_CB[c, x]
            against = others_B[x] + (one - within)
        against_B[x], within_B[x] = against, within


@compiled
def _buffers(C, B):
    """What the loops below keep of a block: exponentials, the shown class and the class in question, odds and the like."""
    e_CB, shown_B, class_B = np.empty((C, B), np.float32), np.empty(B, np.int32), np.empty(B, np.int32)
    max_B, others_B, squares_B = np.empty(B, np.float32), np.empty(B, np.float32), np.empty(B, np.float32)
    return e_CB, shown_B, class_B, max_B, others_B, squares_B, np.empty(B, np.float32), np.empty(B, np.float32)


@compiled
def _bin(against_B, within_B, class_B, by_class, counts_GK):
    """Add odds to the histograms; a class of −1 is none."""
    K = counts_GK.shape[1]
    for x in range(len(class_B)):
        if class_B[x] >= 0:
            k = (np.int64(np.float32(against_B[x] / within_B[x]).view(np.int32)) >> SHIFT) - LOWEST_BITS + 1
            counts_GK[class_B[x] if by_class else 0, min(max(k, 0), K - 1)] += 1


@compiled
def _count(logits_CN, labels_N, ignores, ignore_index, kind, by_class, counted_C, counts_GK):
    """Add the odds of true classes to the histograms; False stands for success, True for a pixel without odds."""
    C, N = logits_CN.shape
    e_CB, shown_B, class_B, max_B, others_B, squares_B, against_B, within_B = _buffers(C, min(BLOCK, N))
    for start in range(0, N, BLOCK):
        width = min(BLOCK, N - start)
        if not exponentials(logits_CN, start, width, e_CB, max_B, shown_B, others_B, squares_B):
            return True
        for x in range(width):
            y = labels_N[start + x]
            void = ignores and y == ignore_index
            if not void and (y < 0 or y >= C):
                return True
            class_B[x] = y if not void and counted_C[y] else -1
        _sums(e_CB, class_B, shown_B, others_B, kind, counted_C, against_B[:width], within_B[:width])
        _bin(against_B, within_B, class_B[:width], by_class, counts_GK)
    return False


@compiled
def _count_all(logits_CN, valid_N, kind, by_class, counted_C, counts_GK):
    """As `_count`, of every class at the valid pixels, as if each were the true one; a foreground is one class."""
    C, N = logits_CN.shape
    e_CB, shown_B, class_B, max_B, others_B, squares_B, against_B, within_B = _buffers(C, min(BLOCK, N))
    for start in range(0, N, BLOCK):
        width = min(BLOCK, N - start)
        if not exponentials(logits_CN, start, width, e_CB, max_B, shown_B, others_B, squares_B):
            return True
        for c in range(1 if kind == FOREGROUND else C):
            for x in range(width):
                class_B[x] = c if valid_N[start + x] else -1
            _sums(e_CB, class_B, shown_B, others_B, kind, counted_C, against_B[:width], within_B[:width])
            _bin(against_B, within_B, class_B[:width], by_class, counts_GK)
    return False


@compiled
def _apply(logits_CN, kind, counted_C, odds_C, inside_CN):
    """Mark the classes whose odds are at most their threshold; False stands for success."""
    C, N = logits_CN.shape
    e_CB, shown_B, class_B, max_B, others_B, squares_B, against_B, within_B = _buffers(C, min(BLOCK, N))
    for start in range(0, N, BLOCK):
        width = min(BLOCK, N - start)
        if not exponentials(logits_CN, start, width, e_CB, max_B, shown_B, others_B, squares_B):
            return True
        for c in range(C):
            odds, everywhere = np.float32(odds_C[c]), odds_C[c] == np.inf
            if not counted_C[c]:
                continue
            reach = np.float32(1.001) * C * (1 + odds)
            for x in range(width):
                # from class c on aps has at most C e_c left: where that is too little for the threshold, it is out
                class_B[x] = c if kind != APS or e_CB[c, x] * reach >= 1 + others_B[x] else -1
            _sums(e_CB, class_B, shown_B, others_B, kind, counted_C, against_B[:width], within_B[:width])
            for x in range(width):
                inside_CN[c, start + x] = everywhere or against_B[x] <= odds * within_B[x]
    return False
