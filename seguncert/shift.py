"""Quality against severity: the same photos clean and made worse, after calibration and before it, with intervals.

Of each condition, one corruption at one severity, only sums are kept, of all photos and of each replicate of the
bootstrap: 8 B (3 C + 47) bytes for B replicates and C classes, before calibration and after it; the number of photos does
not matter. The replicates draw clusters as `seguncert.metrics` does, so conditions and stages are paired.

Letters: C classes, K raters, M bins, R rows of a band, W columns; in front `*B`, replicates or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from seguncert import render
from seguncert.corruptions import CORRUPTIONS, SEVERITIES, SIDE, corrupt, picture_seed
from seguncert.detection import ratio
from seguncert.labels import IGNORED
from seguncert.metrics import middle, poisson_weights
from seguncert.scores import M, Reliability, Scores, parts_of

CLEAN = "clean"
SHOWN = (1, 3, 5)  # severities of which pictures are kept
PICTURE, QUALITY = 280, 85  # pixels of the longest side, and quality, of one of those
FIGURES = ("miou", "accuracy", "nll", "ece", "confidence")


@dataclass
class Sums:
    """Counts and sums of the pixels under one condition."""

    right: Int64[np.ndarray, "*B C"]
    true: Int64[np.ndarray, "*B C"]
    shown: Int64[np.ndarray, "*B C"]
    bins: Reliability
    loss: Float64[np.ndarray, "*B"]
    infinite: Int64[np.ndarray, "*B"]

    @classmethod
    def empty(cls, C: int, *leading: int) -> Sums:
        """Of no pixel."""
        right, true, shown = (np.zeros((*leading, C), np.int64) for _ in range(3))
        count, hits = (np.zeros((*leading, M), np.int64) for _ in range(2))
        bins = Reliability(count, hits, np.zeros((*leading, M)))
        return cls(right, true, shown, bins, np.zeros(leading), np.zeros(leading, np.int64))

    @classmethod
    def of(cls, scores: Scores) -> Sums:
        """What is kept of the scores of some pixels."""
        hits, region = np.diagonal(scores.confusion).copy(), scores.regions
        bins = Reliability(region.count.sum(0), region.hits.sum(0), region.forecast.sum(0))
        true, shown = scores.confusion.sum(1), scores.confusion.sum(0)
        return cls(hits, true, shown, bins, np.array(scores.losses[0]), np.array(scores.infinite[0]))

    def arrays(self) -> list[np.ndarray]:
        """All sums, always in the same order."""
        bins = [self.bins.count, self.bins.hits, self.bins.forecast]
        return [self.right, self.true, self.shown, *bins, self.loss, self.infinite]

    def merge(self, other: Sums, weight_B: Int64[np.ndarray, " B"] | None = None) -> None:
        """Add what another has counted; to replicates in front, as often as each one's weight says."""
        for mine, theirs in zip(self.arrays(), other.arrays(), strict=True):
            mine += theirs if weight_B is None else np.multiply.outer(weight_B, theirs)

    def compute(self) -> dict[str, Any]:
        """`FIGURES` by name, as `Scores.compute` has them, and the mean confidence; NaN where nothing was counted.

        >>> import torch
        >>> scores = Scores.empty(2)
        >>> p_CRW = torch.tensor([[[0.8, 0.4, 0.9]], [[0.2, 0.6, 0.1]]])
        >>> _ = scores.update(p_CRW.log(), np.array([[0, 0, 9]]), ignore_index=9)
        >>> {name: round(float(value), 4) for name, value in Sums.of(scores).compute().items()}
        {'miou': 0.25, 'accuracy': 0.5, 'nll': 0.5697, 'ece': 0.4, 'confidence': 0.7}
        """
        pixels, union = self.true.sum(-1), self.true + self.shown - self.right
        return {
            "miou": ratio(ratio(self.right, np.maximum(union, 1)).sum(-1), (union > 0).sum(-1)),
            "accuracy": ratio(self.right.sum(-1), pixels),
            "nll": np.where(self.infinite > 0, np.inf, ratio(self.loss, pixels)),
            "ece": self.bins.ece(),
            "confidence": ratio(self.bins.forecast.sum(-1), pixels),
        }


@dataclass(frozen=True)
class Shifted:
    """Of one photo, by condition: sums of each stage, and small `pictures` if they may be shown."""

    sums: dict[str, tuple[Sums, ...]]
    pictures: dict[str, bytes] | None = None


@dataclass
class Shift:
    """The conditions of a run: which photos, of `of` with a label, are made worse, and how."""

    names: tuple[str, ...]
    photos: frozenset[str]
    of: int
    C: int
    stages: int  # 2 with a calibration: after it, before it
    replicates: int
    seed: int
    raters: int = 1
    sums: dict[str, tuple[Sums, ...]] = field(default_factory=dict)
    sums_B: dict[str, tuple[Sums, ...]] = field(default_factory=dict)
    images: int = 0
    clusters: set[str] = field(default_factory=set)  # with a labelled pixel
    example: str = ""  # the photo of the pictures
    pictures: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for condition in conditions(self.names):
            self.sums[condition] = tuple(Sums.empty(self.C) for _ in range(self.stages))
            self.sums_B[condition] = tuple(Sums.empty(self.C, self.replicates) for _ in range(self.stages))

    def judge(
        self,
        path: str,
        rgb: UInt8[np.ndarray, "H W 3"],
        labels_KHW: UInt8[np.ndarray, "*K H W"],
        clean: Sequence[Scores],
        predict: Callable[[UInt8[np.ndarray, "H W 3"]], Iterator[tuple[slice, list[Tensor]]]],
    ) -> Shifted:
        """Sums of one photo under all conditions, in any thread.

        `clean` has what was counted of the photo as it is, stage by stage; `predict` gives bands of rows of the logits
        (C, R, W) of each stage. Raises ValueError that names the condition if a prediction cannot be scored.
        """
        seed, wanted = picture_seed(self.seed, path), not self.example
        sums, pictures = {CLEAN: tuple(map(Sums.of, clean))}, {CLEAN: _picture(rgb)}
        for name in self.names:
            for severity in SEVERITIES:
                condition, worse = f"{name}.{severity}", corrupt(rgb, name, severity, seed)
                scores = [Scores.empty(self.C, raters=self.raters) for _ in clean]
                try:
                    for rows, versions in predict(worse):
                        for stage, logits_CRW in zip(scores, versions, strict=True):
                            stage.update_raters(logits_CRW, labels_KHW[..., rows, :], ignore_index=IGNORED)
                except ValueError as error:
                    raise ValueError(f"{name} of severity {severity}: {error}") from error
                sums[condition] = tuple(map(Sums.of, scores))
                if wanted and severity in SHOWN:
                    pictures[condition] = _picture(worse)
        return Shifted(sums, pictures if wanted else None)

    def add(self, path: str, shifted: Shifted, cluster: str) -> None:
        """Add a photo, from one thread; the pictures of the first one are kept."""
        weight_B = poisson_weights(self.seed, cluster, self.replicates)
        for condition, stages in shifted.sums.items():
            for stage, whole, whole_B in zip(stages, self.sums[condition], self.sums_B[condition], strict=True):
                whole.merge(stage)
                whole_B.merge(stage, weight_B)
        self.images += 1
        if shifted.sums[CLEAN][0].true.any():
            self.clusters.add(cluster)
        if not self.example and shifted.pictures is not None:
            self.example, self.pictures = path, shifted.pictures

    def compute(self, level: float) -> dict[str, dict[str, Any]]:
        """Of each condition `FIGURES` and `<figure>_interval`, and with a calibration `before` it and the paired `change`.

        Intervals are quantiles over the replicates, NaN with fewer than two clusters.
        """
        found = dict[str, dict[str, Any]]()
        several = len(self.clusters) > 1

        def named(values: dict[str, Any], values_B: dict[str, Any]) -> dict[str, Any]:
            result = dict[str, Any]()
            for name in FIGURES:
                result[name] = float(values[name])
                result[f"{name}_interval"] = middle(values_B[name], level) if several else (math.nan,) * 2
            return result

        for condition, stages in self.sums.items():
            values, values_B = ([each.compute() for each in sums] for sums in (stages, self.sums_B[condition]))
            found[condition] = named(values[0], values_B[0])
            if self.stages == 2:
                with np.errstate(invalid="ignore"):  # infinity less infinity is undefined
                    change, change_B = (
                        {name: now[name] - before[name] for name in FIGURES} for now, before in (values, values_B)
                    )
                found[condition] |= {"before": named(values[1], values_B[1]), "change": named(change, change_B)}
        return found

    def about(self) -> dict[str, Any]:
        """What the figures depend on."""
        every = len(self.photos) == self.of
        return {
            "names": list(self.names),
            "images": self.images,
            "chosen": f"{'all' if every else f'{len(self.photos)} evenly spaced of'} {self.of} with a label",
            "pixels": int(self.sums[CLEAN][0].true.sum()) // parts_of(self.raters),
            "clusters": len(self.clusters),
            "seed": self.seed,
            "levels": {
                name: {
                    "about": CORRUPTIONS[name].about,
                    "of_severity": [list(level) for level in CORRUPTIONS[name].levels],
                }
                for name in self.names
            },
            "source": "levels of Hendrycks and Dietterich (ICLR 2019), ImageNet-C, but for darkness; lengths are of a picture"
            f" whose shorter side is {SIDE}, in proportion in others; noise and JPEG are of the pixels as they are",
        }


def conditions(names: Sequence[str]) -> list[str]:
    """Names of the conditions; of one corruption these are by severity, from 0.

    >>> conditions(["fog"])
    ['clean', 'fog.1', 'fog.2', 'fog.3', 'fog.4', 'fog.5']
    """
    return [CLEAN, *(f"{name}.{severity}" for name in names for severity in SEVERITIES)]


def evenly(paths: Sequence[str], most: int) -> tuple[str, ...]:
    """At most so many of the paths: the middle one of each of as many stretches of equal length.

    >>> evenly("abcdefghi", 3), evenly("ab", 3)
    (('b', 'e', 'h'), ('a', 'b'))
    """
    n, N = len(paths), min(most, len(paths))
    return tuple(paths[(2 * k + 1) * n // (2 * N)] for k in range(N))


def _picture(rgb: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The middle of the picture, half as wide and high, as a small JPEG: of the whole, noise would not be seen."""
    H, W = rgb.shape[:2]
    middle_of = np.ascontiguousarray(rgb[H // 4 : H - H // 4, W // 4 : W - W // 4])
    return render.encode_jpeg(render.thumbnail(middle_of, PICTURE), QUALITY)
