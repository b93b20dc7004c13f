"""How sure is each pixel? Maps of a softmax, and of many samples of one, each in [0, 1] by its own bound.

Letters: C classes, H rows, W columns. Everything starts from logits: values whose softmax over C is the predictive
distribution. The log of a probability vector is one such value, so pooled samples take the same path.

With z = logits − max(logits) and s = Σ exp(z), no probability is ever put through a logarithm:

    confidence = max p             = 1 / s
    margin     = p₁ − p₂           = (1 − exp(z₂)) / s          p₁ ≥ p₂ the two largest
    entropy    = −Σ p ln p / ln C  = (ln s − Σ z exp(z) / s) / ln C

A one-hot softmax gives s = 1 and entropy exactly 0; C equal logits give entropy 1. The three maps that need samples are
made from `Moments`: mutual information and expected entropy divided by ln C, the variance summed over classes by 1 − 1/C.
The size of a conformal set less one is divided by C − 1; the sets themselves are in `seguncert.conformal`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from seguncert.moments import Moments

LOWEST = -200.0  # exp(−200) is 0 in float32; keeps 0 · (−inf) out of the entropy


@dataclass(frozen=True)
class MapInfo:
    """What a map's numbers mean: `unit` and `full_scale` (the value shown as 1.0), and which end is sure.

    `drawn_to` is where an overlay's colours end: 1, or a smaller share of full scale for maps that stay far below their
    bound. It is the same for every picture, and the legend says it.
    """

    title: str
    unit: str
    sure_is: Literal["high", "low"]
    about: str
    drawn_to: float = 1.0

    def full_scale(self, C: int) -> float:
        """The map's bound for C classes, in its unit: ln C nats, 1 − 1/C for a variance, C − 1 classes, 1 for a probability."""
        return {"nat": math.log(C), "probability²": 1 - 1 / C, "further classes": C - 1.0}.get(self.unit, 1.0)


MAPS: dict[str, MapInfo] = {
    "confidence": MapInfo("Confidence", "probability", "high", "Probability of the class that is shown."),
    "entropy": MapInfo(
        "Entropy", "nat", "low", "Spread of the probabilities over all classes; 0 when one class has all."
    ),
    "margin": MapInfo("Margin", "probability", "high", "Probability of the shown class minus that of the runner-up."),
    "mutual_information": MapInfo(
        "Mutual information", "nat", "low",
        "How much the samples disagree: doubt of the model, which more data would lessen.", drawn_to=0.1,
    ),
    "variance": MapInfo(
        "Variance of the samples", "probability²", "low",
        "Variance of each class's probability over the samples, summed over classes.", drawn_to=0.1,
    ),
    "expected_entropy": MapInfo(
        "Expected entropy", "nat", "low", "Entropy of the average sample: doubt that is in the picture, not in the model."
    ),
    "set_size": MapInfo(
        "Set size", "further classes", "low", "Classes besides one in the conformal set of a pixel; 0 where one is enough, or none is in."
    ),
}  # fmt: skip
OF_SOFTMAX = ("confidence", "entropy", "margin")
OF_SAMPLES = ("mutual_information", "variance", "expected_entropy")
OF_SETS = "set_size"
METHODS = ("none", "mc-dropout", "sampling-free", "stochastic-head", "tta", "ensemble")
DRAWN = frozenset({"mc-dropout", "stochastic-head"})  # parts that have a number of samples, and a seed


def parse_method(method: str) -> frozenset[str]:
    """The parts of a method, as mc-dropout+tta has two; ValueError where they do not go together."""
    parts = method.split("+")
    if (
        any(part not in METHODS for part in parts)
        or len(set(parts)) < len(parts)
        or ("none" in parts and len(parts) > 1)
    ):
        raise ValueError(
            f"method: expected none, or one or more of {', '.join(METHODS[1:])} with + between. Received: {method!r}"
        )
    if {"mc-dropout", "sampling-free"} <= set(parts):
        raise ValueError(f"method: expected mc-dropout or sampling-free, which stands for it. Received: {method!r}")
    if {"stochastic-head", "sampling-free"} <= set(parts):
        raise ValueError(
            f"method: expected stochastic-head without sampling-free, whose formulas know dropout alone. Received: {method!r}"
        )
    return frozenset(parts) - {"none"}


def check_names(names: Collection[str], sampled: bool = False, sets: bool = False) -> None:
    """Raise ValueError unless `names` are one or more different maps, none of them of samples or sets where there are none."""
    unknown = [name for name in names if name not in MAPS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"maps: expected one or more of {', '.join(MAPS)}, each once. Received: {', '.join(names) or 'none'}"
        )
    missing = [name for name in names if name in OF_SAMPLES and not sampled]
    if missing:
        raise ValueError(
            f"maps: {', '.join(missing)} describe the spread of samples, and one pass has none. Set a method that has: {', '.join(METHODS[1:])}."
        )
    if OF_SETS in names and not sets:
        raise ValueError(
            f"maps: {OF_SETS} is of conformal sets, and there are none here. `seguncert conformal` makes them, for export and analyse."
        )


def confidence(logits_CHW: Float[Tensor, "C H W"]) -> Float[Tensor, "H W"]:
    """Largest probability of the softmax, in [1/C, 1].

    >>> round(confidence(torch.log(torch.tensor([0.7, 0.2, 0.1])).view(3, 1, 1)).item(), 4)
    0.7
    """
    return describe(logits_CHW, ["confidence"])[1]["confidence"]


def margin(logits_CHW: Float[Tensor, "C H W"]) -> Float[Tensor, "H W"]:
    """Largest minus second largest probability of the softmax, in [0, 1].

    >>> round(margin(torch.log(torch.tensor([0.7, 0.2, 0.1])).view(3, 1, 1)).item(), 4)
    0.5
    """
    return describe(logits_CHW, ["margin"])[1]["margin"]


def entropy(logits_CHW: Float[Tensor, "C H W"]) -> Float[Tensor, "H W"]:
    """Shannon entropy of the softmax divided by ln C, in [0, 1].

    >>> entropy(torch.zeros(4, 1, 1)).item(), entropy(torch.tensor([300.0, 0.0]).view(2, 1, 1)).item()
    (1.0, 0.0)
    """
    return describe(logits_CHW, ["entropy"])[1]["entropy"]


def describe(
    logits_CHW: Float[Tensor, "C H W"], names: Collection[str]
) -> tuple[UInt8[Tensor, "H W"], dict[str, Float[Tensor, "H W"]]]:
    """Labels (the first of the largest logits) and the named maps of a softmax, sharing one exponential per class and pixel.

    C must be between 2 and 256. Finite logits are the caller's duty; −inf is allowed (probability 0) except for all.
    """
    C = logits_CHW.shape[0]
    first_HW, second_HW = logits_CHW[0].clone(), torch.full_like(logits_CHW[0], -torch.inf)
    labels_HW, smaller_HW = torch.zeros_like(first_HW, dtype=torch.uint8), torch.empty_like(first_HW)
    for c in range(1, C):  # arithmetic along the classes is vectorised; argmax, topk and masks are not
        logit_HW = logits_CHW[c]
        torch.maximum(labels_HW, (logit_HW > first_HW).view(torch.uint8).mul_(c), out=labels_HW)
        if "margin" in names:
            torch.minimum(logit_HW, first_HW, out=smaller_HW)
            torch.maximum(second_HW, smaller_HW, out=second_HW)
        torch.maximum(first_HW, logit_HW, out=first_HW)
    z_CHW = (logits_CHW - first_HW).clamp_(min=LOWEST)
    e_CHW = z_CHW.exp()
    s_HW = e_CHW.sum(0)
    found: dict[str, Tensor] = {}
    for name in names:
        if name == "confidence":
            found[name] = s_HW.reciprocal()
        elif name == "margin":
            found[name] = (1 - (second_HW - first_HW).exp_()).div_(s_HW)
        elif name == "entropy":
            spread_HW = z_CHW.mul_(e_CHW).sum(0).div_(s_HW)
            found[name] = s_HW.log().sub_(spread_HW).div_(math.log(C)).clamp_(0, 1)
    return labels_HW, found


def describe_spread(moments: Moments, names: Collection[str]) -> dict[str, Float[Tensor, "H W"]]:
    """The named maps of samples."""
    C = len(moments.mean_CHW)
    found: dict[str, Tensor] = {}
    for name in names:
        if name == "mutual_information":
            found[name] = moments.mutual_information_HW() / math.log(C)
        elif name == "variance":
            found[name] = (moments.variance_CHW().sum(0) / (1 - 1 / C)).clamp_(0, 1)
        elif name == "expected_entropy":
            found[name] = (moments.entropy_HW / math.log(C)).clamp_(0, 1)
    return found
