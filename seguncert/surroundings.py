"""What can be seen around a pixel, for calibrators that ask: doubt and agreement in windows, and what the net says of pixels
nearby that have the same colour in the photo.

Letters: C classes, F features, N pixels, h × w the scale of the logits, i × j a coarser grid, H × W the photo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from seguncert.bilateral import joint_bilateral

PLACE = 24.0  # standard deviation of what is near, in pixels of the model's frames
COLOUR = 3.0  # standard deviation of what has the same colour: a distance in CIE-Lab, of which the eye sees 2.3
STRIDE = 4  # what is seen of the surroundings is made of every fourth pixel of every fourth row
FINE = 2  # likewise, of what is near and of the same colour
LEAST_MEAN = 1e-5  # added before the logarithm of a mean probability
LEAST_DOUBT = 1e-6  # of 1 − p̂: below, one is as good as another
WIDEST_GAP = 15.0  # nats between the two largest logits, likewise
LEAST_ENTROPY = 1e-3  # added before the logarithm of a mean
OF_PIXEL = {"doubt": "ln(1 − p̂)", "gap": "largest minus second largest logit, in nats"}
OF_SURROUNDINGS = {  # sides of windows are in pixels of the frames that the model was trained on
    "picture": "ln of the mean doubt 1 − p̂ of the picture",
    "entropy 31": "ln of the mean entropy (full scale 1) of a window of 31 x 31 pixels",
    "entropy 127": "the same of 127 x 127",
    "agreement 41": "share of a window of 41 x 41 pixels that shows the pixel's class",
}
FEATURES = (*OF_PIXEL, *OF_SURROUNDINGS)


def pixel_features(logits_CN: Float[Tensor, "C N"]) -> Float[Tensor, "2 N"]:
    """`OF_PIXEL` of each; shifts of the logits change none."""
    two_2N = logits_CN.topk(2, 0)
    others_N = (logits_CN - two_2N.values[0]).exp_().scatter_(0, two_2N.indices[:1], 0).sum(0)
    doubt_N = (others_N / (1 + others_N)).clamp_(min=LEAST_DOUBT).log_()
    return torch.stack([doubt_N, (two_2N.values[0] - two_2N.values[1]).clamp_(max=WIDEST_GAP)])


def surroundings(
    logits_Chw: Float[Tensor, "C h w"],
    names: Sequence[str],
    frame: tuple[int, int] | None = None,
) -> Float[Tensor, "F i j"]:
    """The named `OF_SURROUNDINGS`, on a coarser grid.

    Windows have the wanted side on a picture as large as the frames of the model; they grow and shrink with the picture.
    """
    C, unit, stride, coarse_Cij = len(logits_Chw), *_grid(logits_Chw, frame, STRIDE)
    probs_Cij = coarse_Cij.softmax(0)
    sure_ij, label_ij = probs_Cij.max(0)

    def mean(values_ij: Float[Tensor, "i j"], side: int) -> Float32[np.ndarray, "i j"]:
        reach = max(1, round((side * unit / stride - 1) / 2))
        border = cv2.BORDER_REFLECT if reach < min(values_ij.shape) else cv2.BORDER_REPLICATE
        return cv2.blur(values_ij.numpy(), (2 * reach + 1, 2 * reach + 1), borderType=border)

    found = []
    for name in names:
        kind, _, side = name.partition(" ")
        if kind == "picture":
            doubt = float((1 - sure_ij).mean(dtype=torch.float64))
            found.append(np.full(tuple(sure_ij.shape), math.log(max(doubt, LEAST_DOUBT)), np.float32))
        elif kind == "entropy":
            entropy_ij = -torch.xlogy(probs_Cij, probs_Cij).sum(0) / math.log(C)
            found.append(np.log(mean(entropy_ij, int(side)) + LEAST_ENTROPY))
        else:
            share_ij = np.zeros(tuple(sure_ij.shape), np.float32)
            for c in label_ij.unique().tolist():
                shown_ij = (label_ij == c).float()
                share_ij += shown_ij.numpy() * mean(shown_ij, int(side))
            found.append(share_ij)
    return torch.from_numpy(np.stack(found))


def around(
    logits_Chw: Float[Tensor, "C h w"],
    photo_HW3: UInt8[np.ndarray, "H W 3"],
    frame: tuple[int, int] | None = None,
    place: float = PLACE,
    colour: float = COLOUR,
) -> Float[Tensor, "C i j"]:
    """ln p̄ of `Neighbourhood`, on a coarser grid; `place` grows and shrinks with the picture, as windows do."""
    unit, stride, coarse_Cij = _grid(logits_Chw, frame, FINE)
    i, j = coarse_Cij.shape[1:]
    rgb_ij3 = cv2.resize(photo_HW3, (j, i), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    lab_ij3 = cv2.cvtColor(rgb_ij3, cv2.COLOR_RGB2LAB)
    mean_Cij = joint_bilateral(coarse_Cij.softmax(0).numpy(), lab_ij3, place * unit / stride, colour)
    return torch.from_numpy(np.log(mean_Cij + LEAST_MEAN))


def _grid(
    logits_Chw: Float[Tensor, "C h w"], frame: tuple[int, int] | None, wanted: int
) -> tuple[float, int, Float[Tensor, "C i j"]]:
    """How much larger the picture is than the model's frames, how many pixels are between two of the grid, and these."""
    h, w = logits_Chw.shape[1:]
    unit = math.sqrt(h * w / math.prod(frame)) if frame else 1.0
    stride = max(1, min(round(wanted * unit), min(h, w) // 8))
    return unit, stride, logits_Chw[:, stride // 2 :: stride, stride // 2 :: stride]
