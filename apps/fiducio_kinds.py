"""fiducio's calibrators behind the interface of ours, so that one table can judge both. fiducio is no dependency.

Each of its kinds is fitted by L-BFGS, to the optimum of the same pixels that ours get. Its authors advise those with many
numbers to be stopped early, so these are fitted once more as they say: by Adam with at most 2000 steps, until the NLL of a
scene kept aside, here the smallest of those given, has not fallen for 20 of them. It computes in float32 whatever it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from seguncert.calibrators import floored
from seguncert.fitting import Drawn, Pixels

OURS, EARLY = "fiducio ", ", early"  # around its own name of a kind
FEW = (
    "temperature_scaling",
    "ensemble_temperature_scaling",
)  # kinds of so few numbers that nothing can be stopped early
ADVISED = {"max_iter": 2000, "patience": 20, "lr_patience": 10}
MISSING = "fiducio: not judged, it is not installed. Get it by pip install fiducio, in an environment of its own."


@dataclass(frozen=True)
class Theirs:
    """One that fiducio has fitted, as a `seguncert.calibrators.Calibrator`."""

    kind: str
    fitted: Any
    keeps_labels = False  # some do; the table counts

    def look(self, logits_Chw: Float[Tensor, "C h w"], photo_HW3: UInt8[np.ndarray, "H W 3"]) -> None:
        """Nothing."""

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], seen_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """Logits whose softmax is what `transform` gives."""
        return self.fitted.decision_function(floored(logits_CRW.clone())[None])[0]

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """It cannot tell."""
        return ""


def offered(scenes: int) -> list[str]:
    """The kinds that can be fitted on so many scenes; none where fiducio is not installed."""
    try:
        import fiducio
    except ImportError:
        return []
    names = sorted(fiducio.registered_ids())
    early = [name for name in names if name not in FEW] if scenes > 1 else []
    return [*(OURS + name for name in names), *(OURS + name + EARLY for name in early)]


def fit_theirs(kind: str, pixels: Pixels) -> Theirs:
    """The kind as `offered` names it; ValueError where fiducio's fit does not come to an end."""
    import fiducio

    make = fiducio.get_calibrator_class(kind.removeprefix(OURS).removesuffix(EARLY))
    if not kind.endswith(EARLY):
        return Theirs(kind, make(optimizer="lbfgs", device="cpu").fit(*_table(pixels, lambda _: True)))
    count = Counter[str]()
    for each in pixels.drawn:
        count[each.group] += len(each)
    aside = min(sorted(count), key=count.__getitem__)
    watched = _table(pixels, lambda each: each.group == aside)
    given = _table(pixels, lambda each: each.group != aside)
    return Theirs(kind, make(**ADVISED, device="cpu").fit(*given, val_predictions=watched[0], val_targets=watched[1]))


def _table(pixels: Pixels, keep: Callable[[Drawn], bool]) -> tuple[Float[Tensor, "N C"], Int64[Tensor, " N"]]:
    """Logits and one rater's labels."""
    drawn = pixels.only(keep).drawn
    logits_NC = floored(torch.from_numpy(np.concatenate([each.logits_NC for each in drawn])))
    return logits_NC, torch.from_numpy(np.concatenate([each.votes_NC for each in drawn]).astype(np.int64))
