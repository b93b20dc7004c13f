"""Quality of a model over pictures, with intervals, in memory that does not grow with their number.

Pixels are not independent: neighbours agree, and so do pictures of one drive. Intervals therefore come from replicates
in which each cluster of pictures has a random weight, never from the number of pixels. A replicate is the weighted sum
of what `seguncert.scores` and `seguncert.detection` count of each picture; figures follow from it as from the plain sum.

Letters: C classes, R rows of a band, W columns, B replicates, J coarse bins of doubt, I numbers in an array of sums.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Integer
from torch import Tensor

from seguncert.detection import COARSE_BINS, RIGHT, WRONG, Detection, figures
from seguncert.kernels import compiled
from seguncert.scores import M, Reliability, Scores


class ImageScores:
    """Sums of one picture, filled a band of rows at a time; `Evaluation.begin` makes it, `Evaluation.add` takes it."""

    def __init__(
        self, C: int, ignore_index: int | None, maps: Mapping[str, Literal["high", "low"]], raters: int = 1
    ) -> None:
        self.ignore_index, self.maps = ignore_index, maps
        self.scores = Scores.empty(C, raters=raters)
        self.detections = {name: Detection.empty() for name in ("confidence", *maps)}

    def update(
        self,
        logits_CRW: Float[Tensor, "C R W"],
        labels_KRW: Integer[np.ndarray, "*K R W"],
        maps_RW: Mapping[str, Float[Tensor, "R W"] | Float[np.ndarray, "R W"]],
        boundary_RW: Bool[np.ndarray, "R W"] | None = None,
    ) -> None:
        """Add a band of rows with labels of one or of K raters; `maps_RW` has each declared map, float in [0, 1],
        `boundary_RW` is of `boundary_band`.

        Raises ValueError as `Scores.update_raters`, for NaN or a value outside [0, 1] in a map, and for other maps than those
        declared; the picture is to be dropped then, what has been added before is unharmed.
        """
        if set(maps_RW) != set(self.maps):
            raise ValueError(f"maps: expected {_listed(self.maps)}. Received: {_listed(maps_RW)}")
        doubt_RW, outcomes = self.scores.update_raters(
            logits_CRW, labels_KRW, boundary_RW, ignore_index=self.ignore_index
        )
        doubts = {"confidence": doubt_RW}
        for name, sure_is in self.maps.items():
            map_RW = np.asarray(maps_RW[name], np.float32)
            doubts[name] = 1 - map_RW if sure_is == "high" else map_RW
        for name, each_RW in doubts.items():
            for outcome_RW, weight in outcomes:
                self.detections[name].update(each_RW, outcome_RW, name, weight)


@dataclass
class Evaluation:
    """Quality of a model over pictures, with intervals; parts of a run merge to the whole.

    Memory does not grow with the number of pictures: about 1 MB a map, and for B replicates 8 B (C² + 45 C + 1540 maps)
    bytes: 6 MB for 200 replicates, 11 classes and two maps. `confidence` is always one of the maps.

    >>> import torch
    >>> evaluation = Evaluation.empty(2, ignore_index=255)
    >>> for cluster in ("drive 1", "drive 2"):
    ...     image = evaluation.begin()
    ...     image.update(torch.tensor([[[3.0, -1.0]], [[0.0, 0.0]]]), np.array([[0, 255]]), {})
    ...     summary = evaluation.add(image, cluster=cluster)
    >>> summary["pixels"], round(summary["confidence"], 4), evaluation.compute()["accuracy"]
    (1, 0.9526, 1.0)
    """

    C: int
    ignore_index: int | None
    maps: dict[str, Literal["high", "low"]]
    seed: int
    scores: Scores
    detections: dict[str, Detection]
    scores_B: Scores
    detections_B2J: dict[str, Int64[np.ndarray, "B 2 J"]]
    raters: int = 1  # of a pixel at most
    cluster: str | None = None  # the last one
    several: bool = False  # whether there was ever another

    @classmethod
    def empty(
        cls,
        C: int,
        *,
        ignore_index: int | None,
        maps: Mapping[str, Literal["high", "low"]] | None = None,
        replicates: int = 200,
        seed: int = 0,
        raters: int = 1,
    ) -> Evaluation:
        """Of no picture. `ignore_index` None declares that every pixel has a label, by each of the `raters`.

        `maps` names further maps to be judged by how well they find errors, and says which of their ends is sure.
        """
        maps = dict(maps or {})
        if "confidence" in maps or not set(maps.values()) <= {"high", "low"}:
            raise ValueError(
                f"maps: expected names with 'high' or 'low'; confidence is always judged and not named. Received: {maps}"
            )
        names = ("confidence", *maps)
        return cls(
            C, ignore_index, maps, seed, Scores.empty(C, raters=raters), {name: Detection.empty() for name in names},
            Scores.empty(C, replicates, raters=raters),
            {name: np.zeros((replicates, 2, COARSE_BINS), np.int64) for name in names}, raters,
        )  # fmt: skip

    def begin(self) -> ImageScores:
        """Sums of a new picture; several may be filled at once, in threads."""
        return ImageScores(self.C, self.ignore_index, self.maps, self.raters)

    def add(self, image: ImageScores, *, cluster: str) -> dict[str, int | float]:
        """Add a picture, once, from one thread at a time; returns `pixels` and the figures `scores.PER_IMAGE` of it.

        Pictures that resemble each other, as those of one drive, belong in one `cluster`: they share their weights.
        """
        summary = image.scores.close_image()
        self.scores.merge(image.scores)
        weight_B = poisson_weights(self.seed, cluster, len(self.scores_B.confusion))
        for whole, part in zip(self.scores_B.arrays(), image.scores.arrays(), strict=True):
            _add_weighted(whole.reshape(len(whole), -1), weight_B, part.ravel())
        for name, detection in image.detections.items():
            self.detections[name].merge(detection)
            whole = self.detections_B2J[name]
            _add_weighted(whole.reshape(len(whole), -1), weight_B, detection.coarse()[0].ravel())
        self._note(cluster)
        return summary

    def merge(self, other: Evaluation) -> None:
        """Add the pictures of another, which was begun with the same settings."""
        mine, theirs = self._settings(), other._settings()
        if mine != theirs:
            raise ValueError(f"merge: expected an evaluation with {mine}. Received: {theirs}")
        self.scores.merge(other.scores)
        self.scores_B.merge(other.scores_B)
        for name, detection in other.detections.items():
            self.detections[name].merge(detection)
            self.detections_B2J[name] += other.detections_B2J[name]
        self.several |= other.several
        if other.cluster is not None:
            self._note(other.cluster)

    def compute(self) -> dict[str, int | float]:
        """All figures by name: of `Scores.compute`, `ece_equal_mass`, and of `detection.figures` with `.<map>` after it.

        Raises ValueError if no pixel was labelled.
        """
        if not self.scores.confusion.any():
            raise ValueError(
                "quality: expected at least one labelled pixel. Received: none; are all labels the ignore index?"
            )
        result = self.scores.compute() | {"ece_equal_mass": self.detections["confidence"].equal_mass_ece(M)}
        for name, detection in self.detections.items():
            result |= {f"{figure}.{name}": value for figure, value in detection.compute(self.scores.unit).items()}
        return {name: np.asarray(value).item() for name, value in result.items()}

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Low and high end for each figure but counts and `ece_equal_mass`: quantiles over the bootstrap's replicates.

        A replicate gives each cluster a weight that is Poisson with mean 1 (Oza, Russell 2001; Chamandy et al. 2012).
        Those in which a figure is undefined are left out. NaN with fewer than two clusters; with few of them the interval
        is, as with any bootstrap, too narrow.
        """
        values = self.replicates()
        return {name: middle(value_B, level) if self.several else (math.nan,) * 2 for name, value_B in values.items()}

    def replicates(self) -> dict[str, Float64[np.ndarray, " B"]]:
        """Each figure in each replicate. Those of two evaluations of the same pictures, with the same seed, are paired."""
        result, unit = self.scores_B.compute(), self.scores.unit
        for name, detection in self.detections.items():
            counts_2J, tie_J = detection.coarse()
            fine, coarse = detection.compute(unit), figures(counts_2J[RIGHT] / unit, counts_2J[WRONG] / unit, tie_J)
            counts_B2J = self.detections_B2J[name] / unit
            for figure, value_B in figures(counts_B2J[:, RIGHT], counts_B2J[:, WRONG], tie_J).items():
                result[f"{figure}.{name}"] = value_B + (fine[figure] - coarse[figure])
        for count in ("pixels", "images", "nll_infinite_pixels"):
            del result[count]
        return result

    def reliability(self) -> dict[str, Reliability]:
        """Bins of a reliability diagram of the shown class, in the `interior` and in the `boundary` band."""
        bins = self.scores.regions
        parts = enumerate(("interior", "boundary"))
        return {name: Reliability(bins.count[k], bins.hits[k], bins.forecast[k]) for k, name in parts}

    def _settings(self) -> dict[str, object]:
        names = ("C", "ignore_index", "maps", "seed", "raters")
        return {name: getattr(self, name) for name in names} | {"replicates": len(self.scores_B.confusion)}

    def _note(self, cluster: str) -> None:
        self.several |= self.cluster not in (None, cluster)
        self.cluster = cluster


def poisson_weights(seed: int, cluster: str, B: int) -> Int64[np.ndarray, " B"]:
    """The weights of a cluster in B replicates: Poisson with mean 1, a function of the arguments alone.

    >>> weight_B = poisson_weights(0, "0001TP", 10_000)
    >>> bool(abs(weight_B.mean() - 1) < 0.05), bool(abs((weight_B == 0).mean() - math.exp(-1)) < 0.02)
    (True, True)
    """
    name = hashlib.blake2b(cluster.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    source = np.random.PCG64(np.random.SeedSequence([seed, *np.frombuffer(name, "<u4").tolist()]))
    up_to_k = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(20)])
    return np.searchsorted(
        up_to_k, source.random_raw(B) / 2.0**64, side="right"
    )  # raw bits are the same in every numpy


def middle(value_B: np.ndarray, level: float) -> tuple[float, float]:
    """The middle share `level` of values that are defined; by rank, since infinities cannot be interpolated."""
    sorted_B = np.sort(value_B[~np.isnan(value_B)])
    if not len(sorted_B):
        return math.nan, math.nan
    low, high = (round((len(sorted_B) - 1) * (1 + sign * level) / 2) for sign in (-1, 1))
    return float(sorted_B[low]), float(sorted_B[high])


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none"


@compiled
def _add_weighted(whole_BI, weight_B, part_I):
    """whole += weight · part; a weight of 0 adds nothing, not even of infinity."""
    for b in range(len(weight_B)):
        weight = weight_B[b]
        if weight:
            for i in range(len(part_I)):
                whole_BI[b, i] += weight * part_I[i]
