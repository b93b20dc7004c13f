"""One photo in, its labels, probabilities and maps out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8

from seguncert import maps as maps_
from seguncert.image import ImageError, Photo, read_image
from seguncert.legend import overlay_picture
from seguncert.model import Model
from seguncert.moments import Moments
from seguncert.predict import predict_logits, rows_at_size

DEFAULT_MAPS = {"none": ("confidence", "entropy", "margin"), "mc-dropout": ("confidence", "entropy", "mutual_information", "variance")}  # fmt: skip
NOT_CALIBRATED = "not calibrated"


@dataclass(frozen=True, eq=False)
class Result:
    """What is known of one photo: H × W pixels, C classes.

    Attributes:
        rgb: the photo (H, W, 3) uint8 as it was decoded.
        labels: (H, W) int64, the most probable class.
        maps: name -> (H, W) float32 in [0, 1]; see `seguncert.maps` for formulas.
        logits: of the predictive distribution: those of one pass, at the net's scale, or ln p̄ of the samples.
        calibration: "none" while the numbers are the net's own softmax.
        moments: of the samples, where there are any.
        note: what had to be done to read the photo; "" if nothing.
    """

    rgb: UInt8[np.ndarray, "H W 3"] = field(repr=False)
    labels: Int64[np.ndarray, "H W"] = field(repr=False)
    maps: dict[str, Float[np.ndarray, "H W"]] = field(repr=False)
    classes: tuple[str, ...]
    colours: UInt8[np.ndarray, "C 3"] = field(repr=False)
    logits: Float[torch.Tensor, "C h w"] = field(repr=False)
    calibration: str = "none"
    moments: Moments | None = field(default=None, repr=False)
    note: str = ""

    @cached_property
    def probabilities(self) -> Float[np.ndarray, "C H W"]:
        """Softmax (C, H, W) float32; sums to 1 over C."""
        H, W = self.labels.shape
        probs_CHW = np.empty((len(self.classes), H, W), np.float32)
        for rows, logits_CRW in rows_at_size(self.logits, H, W):
            probs_CHW[:, rows] = logits_CRW.softmax(0).numpy()
        return probs_CHW

    def overlay(self, name: str = "confidence") -> UInt8[np.ndarray, "h w 3"]:
        """The photo under one map, with its legend below: clear where sure, coloured where doubtful."""
        if name not in self.maps:
            raise ValueError(f"overlay: expected one of the maps {', '.join(self.maps)}. Received: {name!r}")
        return draw_overlay(self.rgb, self.maps[name], name, len(self.classes))


def analyse(
    model: Model,
    image: str | os.PathLike[str] | bytes | np.ndarray,
    *,
    method: str = "none",
    samples: int = 20,
    seed: int = 0,
    maps: Sequence[str] | None = None,
    scale: str | float = "auto",
) -> Result:
    """Labels, probabilities and maps of one photo: a file, its bytes, or an RGB array (H, W, 3) uint8.

    Args:
        method: none is one deterministic pass; mc-dropout averages `samples` passes with dropout on, drawn from `seed`.
        maps: names of `seguncert.maps.MAPS`; None is those of `DEFAULT_MAPS` for the method.

    Raises:
        ImageError: the file cannot be opened, or is not a picture that can be read whole.
        ModelError: the net gave values that are not finite, or has no dropout to sample.
        ValueError: unknown method, map or scale, or fewer than two samples.
    """
    maps = check_settings(method, maps, samples, seed)
    if not isinstance(image, (str, os.PathLike, bytes, np.ndarray)):
        raise ImageError(
            f"image: expected a path, bytes or an RGB array. Received: {type(image).__name__}."
            " For a PIL image give numpy.asarray(image.convert('RGB'))."
        )
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ImageError(f"image: expected RGB of shape (H, W, 3), uint8. Received: {image.shape}, {image.dtype}.")
        photo = Photo(image, "")
    else:
        try:
            photo = read_image(image)
        except ImageError as error:
            raise error if isinstance(image, bytes) else ImageError(f"{os.fspath(image)}: {error}") from None
    H, W = photo.rgb.shape[:2]
    logits, moments = predict_photo(model, make_sampler(model, method), photo.rgb, samples, seed, scale)
    labels, found = describe_photo(logits, moments, H, W, maps)
    return Result(
        photo.rgb,
        labels.astype(np.int64),
        found,
        model.classes,
        model.colours,
        logits,
        moments=moments,
        note=photo.note,
    )


def check_settings(method: str, maps: Sequence[str] | None, samples: int, seed: int) -> tuple[str, ...]:
    """The maps to make; ValueError where a setting is wrong."""
    if method not in DEFAULT_MAPS:
        raise ValueError(f"method: expected one of {', '.join(DEFAULT_MAPS)}. Received: {method!r}")
    if method != "none" and samples < 2:
        raise ValueError(f"samples: expected at least 2, since a spread is asked for. Received: {samples}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more. Received: {seed}")
    maps = DEFAULT_MAPS[method] if maps is None else tuple(maps)
    maps_.check_names(maps, sampled=method != "none")
    return maps


@runtime_checkable
class Sampler(Protocol):
    """Draws many predictions for a photo."""

    @property
    def how(self) -> dict[str, Any]:
        """In what way, for run.json."""

    def ready(self) -> AbstractContextManager[None]:
        """Within, the net is set up for sampling; for many photos in a row."""

    def moments(
        self, rgb: UInt8[np.ndarray, "H W 3"], samples: int = 20, seed: int = 0, scale: str | float = "auto"
    ) -> Moments:
        """Of the samples, at the photo's own size."""


def make_sampler(
    model: Model, method: str, backend: str = "torch", precision: str = "auto", streams: int = 1
) -> Sampler | None:
    """What the method asks for; None for one pass. `streams` threads will use it at once."""
    if method == "none":
        return None
    from seguncert.sampling import DropoutSampler  # brings numba: half a second that one pass need not wait for

    return DropoutSampler(model, backend=backend, precision=precision, streams=streams)


def predict_photo(
    model: Model,
    sampler: Sampler | None,
    rgb: UInt8[np.ndarray, "H W 3"],
    samples: int,
    seed: int,
    scale: str | float,
) -> tuple[Float[torch.Tensor, "C h w"], Moments | None]:
    """Logits of the predictive distribution, and the samples' moments where there is a sampler."""
    if sampler is None:
        return predict_logits(model, rgb, scale), None
    moments = sampler.moments(rgb, samples, seed, scale)
    return moments.log_mean_CHW(), moments


def describe_photo(
    logits: Float[torch.Tensor, "C h w"], moments: Moments | None, H: int, W: int, names: Sequence[str]
) -> tuple[UInt8[np.ndarray, "H W"], dict[str, Float[np.ndarray, "H W"]]]:
    """Labels and maps at the photo's own size, band by band."""
    labels_HW = np.empty((H, W), np.uint8)
    found = {name: np.empty((H, W), np.float32) for name in names}
    with torch.inference_mode():
        for rows, logits_CRW in rows_at_size(logits, H, W):
            labels_RW, maps_RW = maps_.describe(logits_CRW, names)
            if moments is not None:
                maps_RW |= maps_.describe_spread(moments.rows(rows), names)
            labels_HW[rows] = labels_RW.numpy()
            for name, map_RW in maps_RW.items():
                found[name][rows] = map_RW.numpy()
    return labels_HW, found


def draw_overlay(
    rgb: UInt8[np.ndarray, "H W 3"], map_HW: Float[np.ndarray, "H W"], name: str, C: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The photo under the map `name` of a model with C classes, legend below."""
    info = maps_.MAPS[name]
    highest = info.full_scale(C) * info.drawn_to
    return overlay_picture(
        rgb,
        map_HW if info.drawn_to == 1 else np.minimum(map_HW / np.float32(info.drawn_to), 1),
        map_name=info.title,
        unit=info.unit + (f", {highest:.2g} and more drawn alike" if info.drawn_to < 1 else ""),
        sure_is=info.sure_is,
        full_scale=highest,
        note=NOT_CALIBRATED,
    )
