"""One photo in, its labels, probabilities and maps out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8

from seguncert import maps as maps_
from seguncert.image import ImageError, Photo, read_image
from seguncert.legend import overlay_picture
from seguncert.model import Model
from seguncert.moments import Moments
from seguncert.predict import predict_logits, rows_at_size, scale_factor
from seguncert.tiles import Sampler, fits
from seguncert.video import Carry

OF_ONE_PASS = ("confidence", "entropy", "margin")
OF_MANY = ("confidence", "entropy", "mutual_information", "variance")
NOT_CALIBRATED = "not calibrated"
AUTO_BATCH, AUTO_LEAST, AUTO_MOST = 10, 4, 100  # samples at once, and how many times at least and at most
AUTO_SHARE = 0.99  # of the pixels that must be known well enough


@dataclass(frozen=True, eq=False)
class Result:
    """What is known of one photo: H × W pixels, C classes.

    Attributes:
        rgb: the photo (H, W, 3) uint8 as it was decoded.
        labels: (H, W) int64, the most probable class.
        maps: name -> (H, W) float32 in [0, 1]; see `seguncert.maps` for formulas.
        logits: of the predictive distribution: those of one pass, at the net's scale, or ln p̄ of the samples.
        calibration: "none" while the numbers are the net's own softmax.
        moments: of the samples, where there are any; `moments.n` is their number.
        errors: name -> (H, W) float32, Monte-Carlo standard error of a map, in the map's own unit of full scale: what
            another number of samples, or another seed, would change. For `samples="auto"` of every map, else of the confidence.
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
    errors: dict[str, Float[np.ndarray, "H W"]] = field(default_factory=dict, repr=False)
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
    model: Model | Sequence[Model],
    image: str | os.PathLike[str] | bytes | np.ndarray,
    *,
    method: str = "none",
    samples: int | Literal["auto"] = 20,
    seed: int = 0,
    views: Sequence[str] | None = None,
    max_error: float = 0.01,
    carry: Carry | None = None,
    maps: Sequence[str] | None = None,
    scale: str | float = "auto",
) -> Result:
    """Labels, probabilities and maps of one photo: a file, its bytes, or an RGB array (H, W, 3) uint8.

    Args:
        model: one, or for the method ensemble several of the same classes.
        method: none is one deterministic pass; mc-dropout averages `samples` passes with dropout on, drawn from `seed`;
            sampling-free is its limit of many samples by formulas; tta averages views, ensemble models. Joined with +
            they are combined, as mc-dropout+tta.
        samples: "auto" draws until the standard error of the first map is at most `max_error` of full scale for 99 % of
            the pixels, and 1,000 at most.
        views: of tta; see `seguncert.views.make_sampler`.
        carry: for the frames of a video, one `seguncert.Carry` for all of them in order; what it carries is blended in.
        maps: names of `seguncert.maps.MAPS`; None is confidence, entropy, and by method margin, or mutual information
            and variance.

    Raises:
        ImageError: the file cannot be opened, or is not a picture that can be read whole.
        ModelError: the net gave values that are not finite, or has no dropout to sample.
        ValueError: unknown method, map or scale, or fewer than two samples.
    """
    maps = check_settings(method, maps, samples, seed, max_error, carry.keep if carry else None)
    models = [model] if isinstance(model, Model) else list(model)
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
    plain = method == "none" and len(models) == 1 and views is None and carry is None
    whole = fits(H, W, scale_factor(models[0], H, W, scale))
    sampler = None if plain and whole else sampler_for(models, method, views)
    logits, moments, errors = predict_photo(models[0], sampler, photo.rgb, maps, samples, seed, scale, max_error, carry)
    labels, found = describe_photo(logits, moments, H, W, maps)
    return Result(
        photo.rgb, labels.astype(np.int64), found, models[0].classes, models[0].colours, logits,
        moments=moments if method != "none" else None, errors=errors, note=photo.note,
    )  # fmt: skip


def check_settings(
    method: str, maps: Sequence[str] | None, samples: int | str, seed: int, max_error: float = 0.01,
    carry: float | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """The maps to make; ValueError where a setting is wrong."""
    parts = maps_.parse_method(method)
    if isinstance(samples, str) and samples != "auto":
        raise ValueError(f"samples: expected a number, or auto. Received: {samples!r}")
    if samples == "auto" and "mc-dropout" not in parts:
        raise ValueError(f"samples auto: expected a method with mc-dropout. Received: {method!r}")
    if "mc-dropout" in parts and not isinstance(samples, str) and samples < 2:
        raise ValueError(f"samples: expected at least 2, since a spread is asked for. Received: {samples}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more. Received: {seed}")
    if not 0 < max_error < 1:
        raise ValueError(f"max-error: expected a share of full scale between 0 and 1. Received: {max_error}")
    if carry is not None and not 0 < carry < 1:
        raise ValueError(f"carry: expected a share between 0 and 1. Received: {carry}")
    if carry is not None and samples == "auto":
        raise ValueError("carry: expected with it a number of samples. Received: samples auto")
    maps = (OF_MANY if parts else OF_ONE_PASS) if maps is None else tuple(maps)
    maps_.check_names(
        maps, sampled=bool(parts)
    )  # a carried single pass has no spread where a frame shows something new
    return maps


def sampler_for(models: Sequence[Model], method: str, views: Sequence[str] | None = None, **engine: Any) -> Sampler:
    """As `seguncert.views.make_sampler`, which brings numba: half a second that one pass need not wait for."""
    from seguncert.views import make_sampler

    return make_sampler(models, method, views, **engine)


def predict_photo(
    model: Model,
    sampler: Sampler | None,
    rgb: UInt8[np.ndarray, "H W 3"],
    names: Sequence[str],
    samples: int | Literal["auto"],
    seed: int,
    scale: str | float,
    max_error: float = 0.01,
    carry: Carry | None = None,
) -> tuple[Float[torch.Tensor, "C h w"], Moments | None, dict[str, Float[np.ndarray, "H W"]]]:
    """Logits of the predictive distribution, the samples' moments where there is a sampler, and Monte-Carlo errors."""
    if sampler is None:
        assert carry is None
        return predict_logits(model, rgb, scale), None, {}
    if isinstance(samples, str):
        moments, errors = _until_known(sampler, rgb, names, seed, scale, max_error)
    else:
        moments = sampler.moments(rgb, samples, seed, scale)
        if carry is not None:
            moments = carry.blend(rgb, moments)
        known = "confidence" in names and sampler.drawn and sampler.alike and carry is None
        errors = {"confidence": moments.standard_error_HW().numpy()} if known else {}
    return moments.log_mean_CHW(), moments, errors


def _until_known(
    sampler: Sampler, rgb: UInt8[np.ndarray, "H W 3"], names: Sequence[str], seed: int, scale: str | float, bound: float
) -> tuple[Moments, dict[str, Float[np.ndarray, "H W"]]]:
    """Batches of samples until the first map is known; the standard error is that of the mean of the batches' maps."""
    H, W = rgb.shape[:2]
    moments = Moments.empty(len(sampler.classes), H, W)
    mean = {name: np.zeros((H, W), np.float32) for name in names}
    squares = {name: np.zeros((H, W), np.float32) for name in names}
    for number, batch in enumerate(sampler.batches(rgb, AUTO_BATCH, seed, scale), 1):
        found = describe_photo(batch.log_mean_CHW(), batch, H, W, names)[1]
        moments.merge(batch)
        for name, map_HW in found.items():
            delta_HW = map_HW - mean[name]
            mean[name] += delta_HW / number
            squares[name] += delta_HW * (map_HW - mean[name])
        if number >= AUTO_LEAST:
            error_HW = np.sqrt(squares[names[0]] / (number * (number - 1)))
            if np.quantile(error_HW, AUTO_SHARE) <= bound or number == AUTO_MOST:
                break
    return moments, {name: np.sqrt(each / (number * (number - 1))) for name, each in squares.items()}


def describe_photo(
    logits: Float[torch.Tensor, "C h w"], moments: Moments | None, H: int, W: int, names: Sequence[str]
) -> tuple[UInt8[np.ndarray, "H W"], dict[str, Float[np.ndarray, "H W"]]]:
    """Labels and maps at the photo's own size, band by band."""
    assert moments is not None or not set(names) & set(maps_.OF_SAMPLES)
    labels_HW = np.empty((H, W), np.uint8)
    found = {name: np.empty((H, W), np.float32) for name in names}
    with torch.inference_mode():
        for rows, logits_CRW in rows_at_size(logits, H, W):
            labels_RW, maps_RW = maps_.describe(logits_CRW, names)
            if moments is not None:
                maps_RW |= maps_.describe_spread(moments.at(rows), names)
            labels_HW[rows] = labels_RW.numpy()
            for name, map_RW in maps_RW.items():
                found[name][rows] = map_RW.numpy()
    return labels_HW, found


def describe_blocks(
    model: Model,
    sampler: Sampler | None,
    rgb: UInt8[np.ndarray, "H W 3"],
    names: Sequence[str],
    samples: int,
    seed: int,
    scale: str | float,
) -> Iterator[tuple[slice, slice, UInt8[np.ndarray, "R W"], dict[str, Float[np.ndarray, "R W"]], Moments]]:
    """Rows, columns, labels, maps and moments of one block after another, for photos too large to hold their maps."""
    sampler = sampler or sampler_for([model], "none")
    for rows, columns, moments in sampler.blocks(rgb, samples, seed, scale):
        R, W = moments.entropy_HW.shape
        labels_RW, found = describe_photo(moments.log_mean_CHW(), moments, R, W, names)
        yield rows, columns, labels_RW, found, moments


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
