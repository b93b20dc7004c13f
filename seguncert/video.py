"""Frames of a video: what was predicted for the last ones counts for the next, along the motion between them.

With m_t the moments of frame t and W what brings those of the frame before into its place, the moments carried along are

    M_t = k · W M_{t−1} + (1 − k) · m_t

as a mixture: means and entropies are averaged, and variances too, plus k (1 − k) (difference of means)². So a frame counts
k^a after a further ones. W follows dense optical flow (Kroeger et al. 2016); where the pixel it comes from lies outside the
last frame or looks different, k is 0 there, since what has just come into sight has no past (Huang et al. 2018 smooth so).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8

from seguncert.moments import Moments

DIFFERENT = 24.0  # of 255: mean difference of a pixel's colours from which it is not the same thing
LONGEST = 32_766  # pixels a side that cv2.remap takes
FLOW = cv2.DISOPTICAL_FLOW_PRESET_FAST


def frame_of(path: str) -> tuple[str, int | None]:
    """The sequence that a frame belongs to by its name, and the number that the name ends in, None where it has none.

    >>> frame_of("a/drive 1 - 0090.png"), frame_of("b/x.png")
    (('a/drive 1 - ', 90), ('b/x', None))
    """
    suffix = Path(path).suffix
    name = path[: len(path) - len(suffix)]
    digits = re.search(r"[0-9]*$", name)
    number = digits[0] if digits else ""
    return name[: len(name) - len(number)], int(number) if number else None


@dataclass
class Carry:
    """What is carried from frame to frame of one video. `keep` is k, in (0, 1)."""

    keep: float
    rgb: UInt8[np.ndarray, "H W 3"] | None = None
    moments: Moments | None = None

    def blend(self, rgb: UInt8[np.ndarray, "h w 3"], moments: Moments) -> Moments:
        """The moments of the next frame, with those before in them. A frame of another size begins anew."""
        if max(rgb.shape) > LONGEST:
            raise ValueError(
                f"carry: expected frames of at most {LONGEST} pixels a side. Received: {rgb.shape[1]}x{rgb.shape[0]}"
            )
        if self.rgb is not None and self.moments is not None and self.rgb.shape == rgb.shape:
            places_HW2 = _where_from(self.rgb, rgb)
            keep_HW = torch.from_numpy(self.keep * _same(self.rgb, rgb, places_HW2))
            moments = mix(warp(self.moments, places_HW2), moments, keep_HW)
        self.rgb, self.moments = rgb.copy(), moments  # a reader may write the next frame where this one was
        return moments


def mix(past: Moments, now: Moments, keep_HW: Float[torch.Tensor, "H W"]) -> Moments:
    """keep · past + (1 − keep) · now, as a mixture; counted as the samples of `now`.

    >>> one, other = (Moments(torch.full((2, 1, 1), p), torch.zeros(2, 1, 1), torch.zeros(1, 1), 1) for p in (0.2, 0.6))
    >>> mixed = mix(one, other, torch.full((1, 1), 0.25))
    >>> round(mixed.mean_CHW[0].item(), 4), round(mixed.variance_CHW()[0].item(), 4)
    (0.5, 0.03)
    """
    delta_CHW = past.mean_CHW - now.mean_CHW
    variance_CHW = torch.lerp(now.variance_CHW(), past.variance_CHW(), keep_HW)
    variance_CHW.addcmul_(delta_CHW.square(), keep_HW * (1 - keep_HW))
    return Moments(
        now.mean_CHW + keep_HW * delta_CHW, variance_CHW * now.n, torch.lerp(now.entropy_HW, past.entropy_HW, keep_HW), now.n
    )  # fmt: skip


def warp(moments: Moments, places_HW2: Float32[np.ndarray, "H W 2"]) -> Moments:
    """Each pixel's moments from the place (x, y) given for it, interpolated."""

    def moved(planes_PHW: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.from_numpy(_pull(plane_HW.numpy(), places_HW2)) for plane_HW in planes_PHW])

    return Moments(
        moved(moments.mean_CHW), moved(moments.squares_CHW), moved(moments.entropy_HW[None])[0], moments.n
    )  # fmt: skip


def _where_from(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """(H, W, 2): for each pixel of a frame its x and y in the frame before."""
    grey_before, grey_now = (cv2.cvtColor(each, cv2.COLOR_RGB2GRAY) for each in (before, now))
    H, W = grey_now.shape
    if min(H, W) < 32:  # too small for the pyramid
        flow_HW2 = np.zeros((H, W, 2), np.float32)
    else:
        flow_HW2 = cv2.DISOpticalFlow.create(FLOW).calc(grey_now, grey_before, np.zeros((H, W, 2), np.float32))
    flow_HW2[..., 0] += np.arange(W, dtype=np.float32)
    flow_HW2[..., 1] += np.arange(H, dtype=np.float32)[:, None]
    return flow_HW2


def _same(before: np.ndarray, now: np.ndarray, places_HW2: np.ndarray) -> np.ndarray:
    """(H, W) float32: 1 where a pixel looks as it did at the place in the frame before from which it comes, else 0."""
    H, W = now.shape[:2]
    x_HW, y_HW = places_HW2[..., 0], places_HW2[..., 1]
    inside_HW = (x_HW >= 0) & (x_HW <= W - 1) & (y_HW >= 0) & (y_HW <= H - 1)
    off_HW = cv2.absdiff(_pull(before, places_HW2), now).mean(2)
    return (inside_HW & (cv2.blur(off_HW, (5, 5)) < DIFFERENT)).astype(np.float32)


def _pull(plane_HW: np.ndarray, places_HW2: np.ndarray) -> np.ndarray:
    x_HW, y_HW = cv2.split(places_HW2)
    pulled: np.ndarray = cv2.remap(plane_HW, x_HW, y_HW, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return pulled
