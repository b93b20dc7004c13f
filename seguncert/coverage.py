"""Was the promise of conformal sets kept? Coverage and size over held-out images, with intervals, in constant memory.

Letters: C classes, R rows of a band, W columns, G = 1 + C groups of pixels: all that count, then each class; B replicates, K counts from 0 up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float64, Integer
from torch import Tensor

from seguncert.conformal import NEAR, ConformalSets
from seguncert.detection import ratio
from seguncert.metrics import middle, poisson_weights

PIXELS, COVERED, SIZE, IMAGES, SHARE, ENOUGH = range(6)  # what is summed of each group


class ImageCoverage:
    """Pixels, covered pixels and sizes of sets of one image, by true class; `Coverage.add` takes it."""

    def __init__(self, sets: ConformalSets, ignore_index: int | None) -> None:
        self.sets, self.ignore_index = sets, ignore_index
        self.counts_3C = np.zeros((3, sets.aim.C), np.int64)

    def update(self, logits_CRW: Float[Tensor, "C R W"], labels_RW: Integer[np.ndarray, "R W"]) -> None:
        """Add a band of rows. Labels are class indices or the ignore index; raises ValueError as `ConformalSets.members`."""
        C = self.sets.aim.C
        if self.sets.aim.foreground:
            size_RW = self.sets.mask(logits_CRW).astype(np.uint8)
            covered_RW = size_RW
        else:
            members_CRW = self.sets.members(logits_CRW)
            size_RW = members_CRW.sum(0, dtype=np.uint8)
            index_RW = np.where(labels_RW == self.ignore_index, 0, labels_RW).astype(np.int64)
            covered_RW = np.take_along_axis(members_CRW, index_RW[None], 0)[0]
        labelled_RW = np.ones(labels_RW.shape, bool) if self.ignore_index is None else labels_RW != self.ignore_index
        labels_N = labels_RW[labelled_RW].astype(np.int64)
        for k, weights_RW in ((PIXELS, None), (COVERED, covered_RW), (SIZE, size_RW)):
            weights_N = None if weights_RW is None else weights_RW[labelled_RW]
            self.counts_3C[k] += np.bincount(labels_N, weights_N, C).astype(np.int64)

    def sums_G6(self, enough: float) -> Float64[np.ndarray, "G 6"]:
        """What the image adds: counts; and 1, the share covered, whether that is `enough`, of groups it has pixels of."""
        counted_C = self.sets.aim.counted_C()
        counts_3G = np.concatenate([self.counts_3C[:, counted_C].sum(1)[:, None], self.counts_3C], axis=1)
        counts_3G[SIZE, 0] = self.counts_3C[SIZE].sum()
        held_G = counts_3G[PIXELS] > 0
        share_G = np.where(held_G, ratio(counts_3G[COVERED], counts_3G[PIXELS]), 0)
        enough_G = held_G & (counts_3G[COVERED] >= enough * counts_3G[PIXELS] - NEAR)
        return np.stack([*counts_3G, held_G, share_G, enough_G], axis=1).astype(np.float64)


@dataclass
class Coverage:
    """How often the sets held the true class on images they were not fitted on; parts merge to the whole.

    >>> import torch
    >>> from seguncert.conformal import Aim
    >>> coverage = Coverage.empty(ConformalSets(Aim(2), 0.2, (4.0,), (9,)), ignore_index=255)  # classes with p ≥ 0.2
    >>> for name, p in (("a", 0.7), ("b", 0.9)):
    ...     image = coverage.begin()
    ...     image.update(torch.log(torch.tensor([[[p, p]], [[1 - p, 1 - p]]])), np.array([[0, 1]]))
    ...     coverage.add(image, name=name)
    >>> figures = coverage.compute()
    >>> figures["coverage"], figures["coverage.1"], figures["size_mean"], figures["images_covered"]
    (0.75, 0.5, 1.5, 0.5)
    """

    sets: ConformalSets
    ignore_index: int | None
    seed: int
    sums_G6: Float64[np.ndarray, "G 6"]
    sums_BG6: Float64[np.ndarray, "B G 6"]
    clustered: bool = False
    several: bool = field(default=False, repr=False)
    cluster: str | None = field(default=None, repr=False)  # the last one

    @classmethod
    def empty(cls, sets: ConformalSets, *, ignore_index: int | None, replicates: int = 1000, seed: int = 0) -> Coverage:
        """Of no image. `ignore_index` None declares that every pixel has a label."""
        G = 1 + sets.aim.C
        return cls(sets, ignore_index, seed, np.zeros((G, 6)), np.zeros((replicates, G, 6)))

    @property
    def enough(self) -> float:
        """The share of its pixels from which an image counts as covered: β of the promise, or else 1 − α."""
        return 1 - self.sets.alpha if self.sets.aim.covered is None else self.sets.aim.covered

    def begin(self) -> ImageCoverage:
        """Counts of a new image; several may be filled at once, in threads."""
        return ImageCoverage(self.sets, self.ignore_index)

    def add(self, image: ImageCoverage, *, name: str, cluster: str | None = None) -> None:
        """Add an image, once. Images that resemble each other, as those of one drive, belong in one `cluster`."""
        sums_G6 = image.sums_G6(self.enough)
        self.sums_G6 += sums_G6
        weight_B = poisson_weights(self.seed, name if cluster is None else cluster, len(self.sums_BG6))
        self.sums_BG6 += weight_B[:, None, None] * sums_G6
        self.clustered |= cluster is not None
        self._note(name if cluster is None else cluster)

    def merge(self, other: Coverage) -> None:
        """Add the images of another, which was begun with the same settings."""
        mine, theirs = ((each.sets, each.ignore_index, each.seed, len(each.sums_BG6)) for each in (self, other))
        if mine != theirs:
            raise ValueError(f"merge: expected a coverage with {mine}. Received: {theirs}")
        self.sums_G6 += other.sums_G6
        self.sums_BG6 += other.sums_BG6
        self.clustered |= other.clustered
        self.several |= other.several
        if other.cluster is not None:
            self._note(other.cluster)

    def compute(self) -> dict[str, float]:
        """Figures of all pixels that count, and with `.<c>` of those whose true class is c; NaN where there are none.

        - `coverage`: share of pixels whose true class is in the set, or of the foreground that is in the mask.
        - `coverage_image_mean`: mean of that share over images; of this the promise without β speaks.
        - `images_covered`: share of images in which it is `enough`; of this the promise with β speaks.
        - `size_mean`: classes in a set, or the share of pixels in the mask, over all labelled pixels.
        """
        return {name: float(value) for name, value in _figures(self.sums_G6).items()}

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Low and high end of each figure: quantiles of a bootstrap of clusters, as in `seguncert.metrics`.

        `images_covered` has the exact binomial interval where no clusters were named. NaN with fewer than two images.
        """
        if not self.several:
            return {name: (math.nan, math.nan) for name in self.compute()}
        result = {name: middle(value_B, level) for name, value_B in _figures(self.sums_BG6).items()}
        if not self.clustered:
            for g, name in enumerate(_names("images_covered", len(self.sums_G6))):
                if images := int(self.sums_G6[g, IMAGES]):
                    result[name] = binomial_interval(int(self.sums_G6[g, ENOUGH]), images, level)
        return result

    def _note(self, cluster: str) -> None:
        self.several |= self.cluster not in (None, cluster)
        self.cluster = cluster


def binomial_interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a frequency (Clopper, Pearson 1934), by bisection.

    >>> [round(end, 4) for end in binomial_interval(9, 10)]
    [0.555, 0.9975]
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"binomial interval: expected 0 ≤ hits ≤ n, n at least 1. Received: {hits} of {n}")
    tail = (1 - level) / 2
    return (
        0.0 if hits == 0 else _where(lambda p: 1 - _at_most(hits - 1, n, p), tail),
        1.0 if hits == n else 1 - _where(lambda p: _at_most(hits, n, 1 - p), tail),
    )


def binomial_pmf(n: int, p: float) -> Float64[np.ndarray, " K"]:
    """Chances of 0 to n hits, for p in (0, 1)."""
    k = np.arange(n + 1)
    return np.exp(_log_choose(n) + k * math.log(p) + (n - k) * math.log1p(-p))


def beta_binomial_pmf(m: int, n: int, alpha: float) -> Float64[np.ndarray, " K"]:
    """Chances that 0 to m of m new images have at least β of their pixels covered, after a fit on n, without ties.

    The threshold is the r-th smallest of n scores, r = ⌈(n + 1)(1 − α)⌉, so of m exchangeable ones beta-binomially many,
    with r and n + 1 − r, are at most that (Vovk 2012; Angelopoulos, Bates 2023, section 3.2), whatever their distribution.

    >>> beta_binomial_pmf(2, 3, 0.25).round(3)  # r = 3: each is below the largest of three in 3/4 of all cases
    array([0.1, 0.3, 0.6])
    """
    r = math.ceil((n + 1) * (1 - alpha) - NEAR)
    if not 1 <= r <= n:
        raise ValueError(f"beta-binomial: expected n + 1 ≥ 1/alpha. Received: n {n}, alpha {alpha}")
    k = np.arange(m + 1)
    log_beta = [math.lgamma(r + i) + math.lgamma(n + 1 - r + m - i) - math.lgamma(n + 1 + m) for i in k]
    whole = math.lgamma(r) + math.lgamma(n + 1 - r) - math.lgamma(n + 1)
    return np.exp(_log_choose(m) + np.array(log_beta) - whole)


def central_band(pmf_K: Float64[np.ndarray, " K"], level: float = 0.95) -> tuple[int, int]:
    """The counts between which at least `level` lies: at most (1 − level)/2 is below and as much above.

    >>> central_band(binomial_pmf(200, 0.95))
    (184, 196)
    """
    tail = (1 - level) / 2
    below_K, above_K = pmf_K.cumsum(), pmf_K[::-1].cumsum()
    return int((below_K > tail).argmax()), len(pmf_K) - 1 - int((above_K > tail).argmax())


def _figures(sums_G6: np.ndarray) -> dict[str, np.ndarray]:
    """All figures of sums with any leading axes."""
    column = {k: sums_G6[..., k] for k in range(6)}
    size_pixels = np.concatenate([column[PIXELS][..., 1:].sum(-1, keepdims=True), column[PIXELS][..., 1:]], axis=-1)
    parts = {
        "coverage": ratio(column[COVERED], column[PIXELS]),
        "coverage_image_mean": ratio(column[SHARE], column[IMAGES]),
        "images_covered": ratio(column[ENOUGH], column[IMAGES]),
        "size_mean": ratio(column[SIZE], size_pixels),
    }
    G = sums_G6.shape[-2]
    return {each: value[..., g] for name, value in parts.items() for g, each in enumerate(_names(name, G))}


def _names(name: str, G: int) -> list[str]:
    return [name, *(f"{name}.{c}" for c in range(G - 1))]


def _log_choose(n: int) -> np.ndarray:
    return np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)])


def _at_most(k: int, n: int, p: float) -> float:
    return float(binomial_pmf(n, p)[: k + 1].sum())


def _where(rising: Callable[[float], float], target: float) -> float:
    """The place in (0, 1) where a rising function has a value."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2
