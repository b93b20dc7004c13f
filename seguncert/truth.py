"""Predictions held against the exact posterior: no labels, so no noise of labels, and no bins where none are needed.

With p = P(class | picture) of a scene and q what a net says of the same pixel, ŷ the class of the largest q, means over
pixels, in nats where a logarithm is taken:

    kl                  Σ p (ln p − ln q)            what the net's cross-entropy loses beyond what nobody can win
    true_entropy        −Σ p ln p                    the doubt that is in the picture (aleatoric)
    entropy             −Σ q ln q
    entropy_error       |entropy − true entropy| of a pixel
    confidence_error    |max q − p(ŷ)| of a pixel: how far a stated confidence is from the chance to be right
    overconfidence      max q − p(ŷ), with its sign
    ece                 of 15 equal bins of max q the mean of |mean (max q − p(ŷ))|: what a reliability diagram would show
                        of infinitely many labels
    regret              max p − p(ŷ): accuracy that the best possible classes would have more
    off                 the share of pixels where some |p − q| is above 0.1
    expected_entropy, mutual_information   of samples, where there are any

and of each map the area under the ROC curve (AUROC) with which its doubt finds the pixels that are `off`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Real

from seguncert.detection import RIGHT, WRONG, Detection
from seguncert.maps import MAPS

OFF, BINS = 0.1, 15


@dataclass
class Truth:
    """Sums over pixels; parts merge to the whole.

    >>> truth = Truth()
    >>> truth.update(np.array([[[0.5]], [[0.5]]]), np.log([[[0.9]], [[0.1]]]))
    >>> {name: round(value, 4) for name, value in truth.compute().items() if name in ("kl", "confidence_error", "off")}
    {'kl': 0.5108, 'confidence_error': 0.4, 'off': 1.0}
    """

    pixels: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    gap_J: Float64[np.ndarray, " J"] = field(default_factory=lambda: np.zeros(BINS))
    found: dict[str, Detection] = field(default_factory=dict)

    def update(
        self,
        probs_CHW: Float64[np.ndarray, "C H W"],
        log_net_CHW: Real[np.ndarray, "C H W"],
        maps: Mapping[str, Real[np.ndarray, "H W"]] | None = None,
        means: Mapping[str, float] | None = None,
    ) -> None:
        """Add a picture: its posterior, ln q (C, H, W), maps by their names in `seguncert.maps.MAPS`, and what is only averaged.

        A q of 0 where p is not makes the divergence infinite, as it is.
        Raises ValueError where ln q is NaN, or q does not sum to 1.
        """
        log_net_CHW = np.asarray(log_net_CHW, np.float64)
        net_CHW = np.exp(log_net_CHW)
        if not np.abs(net_CHW.sum(0) - 1).max() < 1e-4:
            raise ValueError(
                "truth: expected ln of probabilities that sum to 1."
                f" Received: sums from {net_CHW.sum(0).min():.6g} to {net_CHW.sum(0).max():.6g}"
            )
        shown_1HW = log_net_CHW.argmax(0)[None]
        right_HW = np.take_along_axis(probs_CHW, shown_1HW, 0)[0]
        gap_HW = net_CHW.max(0) - right_HW
        entropy_HW, true_HW = _entropy(net_CHW), _entropy(probs_CHW)
        off_HW = np.abs(net_CHW - probs_CHW).max(0) > OFF
        with np.errstate(divide="ignore", invalid="ignore"):  # what neither gives anything is left out
            apart_CHW = np.where(probs_CHW > 0, np.log(probs_CHW) - log_net_CHW, 0)
        count = off_HW.size
        added = {
            "kl": float((probs_CHW * apart_CHW).sum()), "true_entropy": float(true_HW.sum()),
            "entropy": float(entropy_HW.sum()), "entropy_error": float(np.abs(entropy_HW - true_HW).sum()),
            "confidence_error": float(np.abs(gap_HW).sum()), "overconfidence": float(gap_HW.sum()),
            "regret": float((probs_CHW.max(0) - right_HW).sum()), "off": float(off_HW.sum()),
        } | {name: mean * count for name, mean in (means or {}).items()}  # fmt: skip
        if self.pixels and added.keys() != self.sums.keys():
            raise ValueError(f"truth: expected {', '.join(self.sums)} of each picture. Received: {', '.join(added)}")
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in added.items()}
        self.pixels += count
        bin_HW = np.minimum((net_CHW.max(0) * BINS).astype(np.int64), BINS - 1)
        self.gap_J = self.gap_J + np.bincount(bin_HW.ravel(), gap_HW.ravel(), BINS)
        outcome_HW = np.where(off_HW, WRONG, RIGHT).astype(np.uint8)
        for name, map_HW in (maps or {}).items():
            doubt_HW = 1 - map_HW if MAPS[name].sure_is == "high" else map_HW
            self.found.setdefault(name, Detection.empty()).update(doubt_HW.astype(np.float32), outcome_HW, name)

    def merge(self, other: Truth) -> None:
        """Add another's pixels."""
        if self.pixels and other.pixels and self.sums.keys() != other.sums.keys():
            raise ValueError(f"truth: expected sums of {', '.join(self.sums)}. Received: {', '.join(other.sums)}")
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in other.sums.items()} or self.sums
        self.pixels += other.pixels
        self.gap_J = self.gap_J + other.gap_J
        for name, detection in other.found.items():
            self.found.setdefault(name, Detection.empty()).merge(detection)

    def compute(self) -> dict[str, float]:
        """The figures of the module's text; `auroc.<map>` for the maps, NaN where no pixel is off, or all are."""
        means = {name: value / self.pixels for name, value in self.sums.items()}
        areas = {f"auroc.{name}": float(each.compute()["error_auroc"]) for name, each in self.found.items()}
        return means | {"ece": float(np.abs(self.gap_J).sum() / self.pixels)} | areas


def _entropy(probs_CHW: np.ndarray) -> np.ndarray:
    """In nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(probs_CHW > 0, probs_CHW * np.log(probs_CHW), 0).sum(0)
