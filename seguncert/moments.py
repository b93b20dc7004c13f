"""What many softmax samples of one picture come to: their mean, their spread, and the mean of their entropies.

Letters: S samples, C classes, H rows, W columns. Samples are drawn, added and forgotten; memory does not grow with their
number. With p_s the softmax of sample s and H[p] = −Σ p ln p in nats (Gal, Islam, Ghahramani 2017; Kendall, Gal 2017):

    mean                p̄ = (1/S) Σ_s p_s                  the predictive distribution
    predictive entropy  H[p̄]                               all of the doubt
    expected entropy    (1/S) Σ_s H[p_s]                   the part that is there in each sample: of the data
    mutual information  H[p̄] − (1/S) Σ_s H[p_s]            the part on which samples disagree: of the model
    variance            (1/S) Σ_s (p_s − p̄)²               per class; summed over classes at most 1 − 1/C
    disagreement        1 − mean soft Dice of two samples   of a whole picture; see `disagreement`

Sums of p² and squares of sums would lose small variances in float32; what is kept instead is the sum of squared
deviations from the mean, which merges exactly (Chan, Golub, LeVeque 1983).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

BAND = 1 << 18  # values that are squared at once, so that they stay in cache


def _zeros(*shape: int) -> Tensor:
    """Unlike torch's they take no room until they are written to: the pass before the first sample can have it."""
    return torch.from_numpy(np.zeros(shape, np.float32))


@dataclass
class Moments:
    """Sums over `n` samples for each of C classes at H × W pixels, float32.

    `mean_CHW` is p̄, `squares_CHW` the sum of (p − p̄)², `entropy_HW` the mean of H[p] in nats.
    """

    mean_CHW: Float[Tensor, "C H W"]
    squares_CHW: Float[Tensor, "C H W"]
    entropy_HW: Float[Tensor, "H W"]
    n: int = 0

    @classmethod
    def empty(cls, C: int, H: int, W: int) -> Moments:
        """Moments of no sample."""
        return cls(_zeros(C, H, W), _zeros(C, H, W), _zeros(H, W))

    def update(self, logits_SCHW: Float[Tensor, "S C H W"]) -> None:
        """Add samples. This is the plain reference; `seguncert.fused` does the same in one pass through the cache.

        >>> moments = Moments.empty(2, 1, 1)
        >>> moments.update(torch.log(torch.tensor([[0.9, 0.1], [0.5, 0.5]])).view(2, 2, 1, 1))
        >>> [round(value, 4) for value in (moments.mean_CHW[0].item(), moments.variance_CHW()[0].item())]
        [0.7, 0.04]
        """
        for logits_CHW in logits_SCHW:
            log_CHW = logits_CHW.log_softmax(0)
            probs_CHW = log_CHW.exp()
            surprise_CHW = torch.where(probs_CHW > 0, -log_CHW, 0)
            self._add(probs_CHW, torch.zeros_like(probs_CHW), (probs_CHW * surprise_CHW).sum(0), 1)

    def merge(self, other: Moments) -> None:
        """Add the samples of another."""
        self._add(other.mean_CHW, other.squares_CHW, other.entropy_HW, other.n)

    def _add(self, mean_CHW: Tensor, squares_CHW: Tensor, entropy_HW: Tensor, n: int) -> None:
        if n == 0:
            return
        total = self.n + n
        delta_CHW = mean_CHW - self.mean_CHW
        self.squares_CHW += squares_CHW
        self.squares_CHW.addcmul_(delta_CHW, delta_CHW, value=self.n * n / total)
        self.mean_CHW.add_(delta_CHW, alpha=n / total)
        self.entropy_HW.add_(entropy_HW - self.entropy_HW, alpha=n / total)
        self.n = total

    def at(self, rows: slice = slice(None), columns: slice = slice(None)) -> Moments:
        """A view of some rows and columns."""
        return self._each(lambda plane: plane[..., rows, columns])

    def copy(self) -> Moments:
        """The same numbers, not shared."""
        return self._each(Tensor.clone)

    def mirrored(self, axes: tuple[int, ...]) -> Moments:
        """Of the mirror image: reversed along rows (0), columns (1) or both."""
        return self._each(lambda plane: plane.flip([axis - 2 for axis in axes]))

    def put(self, rows: slice, columns: slice, other: Moments) -> None:
        """Set some rows and columns to another's."""
        for mine, others in zip(self.at(rows, columns)._planes(), other._planes(), strict=True):
            mine.copy_(others)
        self.n = other.n

    def weigh(self, weight: Float[Tensor, "#H #W"] | Float[Tensor, " W"]) -> None:
        """Multiply what is known of each pixel by a weight. With `plus`, moments of as many samples are blended."""
        for each in self._planes():
            each.mul_(weight)

    def plus(self, other: Moments) -> None:
        """Add another's numbers to one's own, both of them weighted."""
        for mine, others in zip(self._planes(), other._planes(), strict=True):
            mine.add_(others)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Moments:
        return Moments(change(self.mean_CHW), change(self.squares_CHW), change(self.entropy_HW), self.n)

    def _planes(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean_CHW, self.squares_CHW, self.entropy_HW

    def log_mean_CHW(self) -> Float[Tensor, "C H W"]:
        """ln p̄: logits whose softmax is the mean of the samples; −inf where no sample gave the class anything."""
        return self.mean_CHW.log()

    def predictive_entropy_HW(self) -> Float[Tensor, "H W"]:
        """H[p̄] in nats, in [0, ln C]."""
        return -torch.xlogy(self.mean_CHW, self.mean_CHW).sum(0)

    def mutual_information_HW(self) -> Float[Tensor, "H W"]:
        """H[p̄] − mean H[p] in nats, in [0, ln C]; rounding is kept from making it negative."""
        return (self.predictive_entropy_HW() - self.entropy_HW).clamp_(0, math.log(len(self.mean_CHW)))

    def variance_CHW(self) -> Float[Tensor, "C H W"]:
        """Variance of each class's probability over the samples, divided by their number: in [0, 1/4]."""
        return self.squares_CHW / max(self.n, 1)

    def standard_error_HW(self) -> Float[Tensor, "H W"]:
        """Of the largest mean probability, as an estimate of what infinitely many samples would give: √(s² / n).

        s² is the unbiased variance of the shown class over n ≥ 2 samples, all of them draws from one distribution.

        >>> moments = Moments.empty(2, 1, 1)
        >>> moments.update(torch.log(torch.tensor([[0.9, 0.1], [0.5, 0.5]])).view(2, 2, 1, 1))
        >>> round(moments.standard_error_HW().item(), 4)
        0.2
        """
        shown_1HW = self.mean_CHW.argmax(0, keepdim=True)
        return (self.squares_CHW.gather(0, shown_1HW)[0] / (self.n * (self.n - 1))).sqrt_()

    def dice_sums(self, limit: bool = False) -> tuple[Float64[Tensor, " C"], Float64[Tensor, " C"]]:
        """Of each class two sums over the pixels: what parts two samples, and what one weighs; for `disagreement`.

        Over all pairs s ≠ t of n samples the means of (p_s − p_t)² / 2 and of (p_s² + p_t²) / 2 are, with the variance v,
        v n/(n − 1) and p̄² + v. `limit` is for moments of infinitely many samples, as of the method sampling-free, however
        they are counted: there the first is v.

        >>> moments = Moments.empty(2, 1, 1)
        >>> moments.update(torch.log(torch.tensor([[0.9, 0.1], [0.5, 0.5]])).view(2, 2, 1, 1))
        >>> [[round(value, 4) for value in each.tolist()] for each in moments.dice_sums()]
        [[0.08, 0.08], [0.53, 0.13]]
        """
        C, H, W = self.mean_CHW.shape
        squares_C, spread_C = torch.zeros(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
        step = max(1, BAND // (C * W))
        for start in range(0, H, step):
            rows = slice(start, start + step)
            squares_C += self.mean_CHW[:, rows].square().sum(2).double().sum(1)
            spread_C += self.squares_CHW[:, rows].sum(2).double().sum(1)
        return spread_C / max(self.n if limit else self.n - 1, 1), squares_C + spread_C / max(self.n, 1)


def disagreement(apart_C: Float64[Tensor, " C"], weight_C: Float64[Tensor, " C"], shown_C: Bool[Tensor, " C"]) -> float:
    """1 − soft Dice of two samples of a picture on average, in [0, 1]: how far whole samples differ in what they show.

    Soft Dice with squares (Milletari, Navab, Ahmadi 2016), of class c over the pixels i and all pairs s ≠ t of samples:
    Σ_i mean 2 p_s p_t / Σ_i mean (p_s² + p_t²), which is 1 − apart / weight of the sums of `Moments.dice_sums`, added up
    over the blocks of a picture. Classes that are shown somewhere count alike, whatever their area; the others do not.

    >>> apart_C, weight_C = torch.tensor([0.08, 0.08]).double(), torch.tensor([0.53, 0.13]).double()
    >>> round(disagreement(apart_C, weight_C, torch.tensor([True, False])), 4)
    0.1509
    """
    shown_C = shown_C & (weight_C > 0)
    if not shown_C.any():
        return 0.0
    return float((apart_C[shown_C] / weight_C[shown_C]).mean().clamp(0, 1))
