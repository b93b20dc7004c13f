"""One photo in, its labels, probabilities and maps out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8

from seguncert import maps as maps_
from seguncert.calibration import Calibration, find_calibration
from seguncert.calibrators import Band, Calibrator, bands, calibrated_rows
from seguncert.conformal import ConformalSets
from seguncert.image import ImageError, Photo, read_image
from seguncert.legend import overlay_picture
from seguncert.model import Model
from seguncert.moments import Moments
from seguncert.predict import on_all_cores, predict_logits, scale_factor
from seguncert.sets import FittedSets, find_sets
from seguncert.stochastic import stochastic_heads
from seguncert.tiles import LEAST, Sampler, fits
from seguncert.video import Carry

OF_ONE_PASS = ("confidence", "entropy", "margin")
OF_MANY = ("confidence", "entropy", "mutual_information", "variance")
NOT_CALIBRATED, SPREAD = "not calibrated", "of the samples, before calibration"
AUTO_BATCH, AUTO_LEAST, AUTO_MOST = 10, 4, 100  # samples at once, and how many times at least and at most
OR_DRAWN = " or ".join(sorted(maps_.DRAWN))
AUTO_SHARE = 0.99  # of the pixels that must be known well enough
Progress = Callable[[int, int], "bool | None"]


@dataclass(frozen=True, eq=False)
class Result:
    """What is known of one photo: H × W pixels, C classes.

    Attributes:
        rgb: the photo (H, W, 3) uint8 as it was decoded.
        labels: (H, W) int64, the most probable class.
        maps: name -> (H, W) float32 in [0, 1]; see `seguncert.maps` for formulas.
        logits: of the predictive distribution before calibration: those of one pass, at the net's scale, or ln p̄ of
            the samples.
        calibration: what was done to the net's own softmax, "none" if nothing; see `seguncert.calibrators`.
        moments: of the samples, where there are any; `moments.n` is their number.
        errors: name -> (H, W) float32, Monte-Carlo standard error of a map, in the map's own unit of full scale: what
            another number of samples, or another seed, would change. For `samples="auto"` of every map, else of the confidence.
        note: what had to be done to read the photo, whether it is unlike all that the calibration has seen, and whether
            a stochastic head was not sampled; "" if nothing of it.
        conformal: thresholds and promise of the sets, where there are any; see `seguncert.conformal`.
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
    calibrator: Calibrator | None = field(default=None, repr=False)
    conformal: ConformalSets | None = field(default=None, repr=False)

    @cached_property
    def probabilities(self) -> Float[np.ndarray, "C H W"]:
        """Calibrated softmax (C, H, W) float32; sums to 1 over C."""
        H, W = self.labels.shape
        probs_CHW = np.empty((len(self.classes), H, W), np.float32)
        for rows, logits_CRW in calibrated_rows(self.calibrator, self.logits, self.rgb):
            probs_CHW[:, rows] = logits_CRW.softmax(0).numpy()
        return probs_CHW

    @cached_property
    def sets(self) -> Bool[np.ndarray, "C H W"] | None:
        """Which classes are in the conformal set of each pixel, (C, H, W) bool; None where no sets were fitted for this."""
        if self.conformal is None:
            return None
        inside_CHW = np.empty((len(self.classes), *self.labels.shape), bool)
        for rows, logits_CRW in calibrated_rows(self.calibrator, self.logits, self.rgb):
            inside_CHW[:, rows] = self.conformal.members(logits_CRW)
        return inside_CHW

    def overlay(self, name: str = "confidence") -> UInt8[np.ndarray, "h w 3"]:
        """The photo under one map, with its legend below: clear where sure, coloured where doubtful."""
        if name not in self.maps:
            raise ValueError(f"overlay: expected one of the maps {', '.join(self.maps)}. Received: {name!r}")
        return draw_overlay(self.rgb, self.maps[name], name, len(self.classes), self.calibration, self.conformal)


@dataclass(frozen=True)
class Settings:
    """How predictions are drawn; the arguments of `analyse` and of `seguncert export`, checked.

    Raises ValueError where one is wrong, or goes with no other.
    """

    method: str = "none"
    samples: int | str = 20
    seed: int = 0
    views: tuple[str, ...] | None = None
    max_error: float = 0.01
    carry: float | None = None
    drop_path: bool = False
    scale: str | float = "auto"
    tile: int | str = "auto"
    maps: tuple[str, ...] = ()
    sets: bool = False  # whether conformal sets may be asked for

    def __post_init__(self) -> None:
        for name in ("samples", "seed", "tile"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise ValueError(f"{name}: expected a whole number. Received: {value!r}")
        if not isinstance(self.method, str):
            raise ValueError(f"method: expected its name. Received: {self.method!r}")
        parts = maps_.parse_method(self.method)
        drawn = bool(parts & maps_.DRAWN)
        if isinstance(self.samples, str) and self.samples != "auto":
            raise ValueError(f"samples: expected a number, or auto. Received: {self.samples!r}")
        if self.samples == "auto" and not drawn:
            raise ValueError(f"samples auto: expected a method with {OR_DRAWN}. Received: {self.method!r}")
        if drawn and not isinstance(self.samples, str) and self.samples < 2:
            raise ValueError(f"samples: expected at least 2, since a spread is asked for. Received: {self.samples}")
        if self.drop_path and "mc-dropout" not in parts:
            raise ValueError(f"drop-path: expected with it a method with mc-dropout. Received: {self.method!r}")
        if self.views is not None and "tta" not in parts:
            raise ValueError(f"views: expected with them the method tta. Received: {self.method!r}")
        for name in ("samples", "seed"):
            if not drawn and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name}: expected with it a method with {OR_DRAWN}. Received: {self.method!r}")
        if self.samples != "auto" and self.max_error != type(self).max_error:
            raise ValueError(f"max-error: expected with it samples auto. Received: {self.samples}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more. Received: {self.seed}")
        if not 0 < self.max_error < 1:
            raise ValueError(f"max-error: expected a share of full scale between 0 and 1. Received: {self.max_error}")
        if self.carry is not None and not 0 < self.carry < 1:
            raise ValueError(f"carry: expected a share between 0 and 1. Received: {self.carry}")
        if self.carry is not None and self.samples == "auto":
            raise ValueError("carry: expected with it a number of samples. Received: samples auto")
        if self.tile != "auto" and (isinstance(self.tile, str) or self.tile < LEAST):
            raise ValueError(f"tile: expected auto, or pixels a side, {LEAST} or more. Received: {self.tile!r}")
        if not self.maps:
            object.__setattr__(self, "maps", OF_MANY if parts else OF_ONE_PASS)
        # a carried single pass has no spread where a frame shows something new
        maps_.check_names(self.maps, sampled=bool(parts), sets=self.sets)

    @property
    def pixels(self) -> int | None:
        """`tile` as a number, or None."""
        return None if isinstance(self.tile, str) else self.tile

    @property
    def disagree(self) -> bool:
        """Whether there are samples to tell apart; what is carried from frame to frame is no sample of a frame."""
        return self.method != "none" and self.carry is None

    def fitted_for(self, models: Sequence[Model]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Model and way of sampling, as a calibration knows them: whatever decides how logits are distributed."""
        inserted = [each for each in models[0].card.get("dropout", []) if each.get("inserted")]
        sampling = {
            "method": self.method, "scale": str(self.scale), "views": self.views and list(self.views), "carry": self.carry,
            "drop_path": self.drop_path or None, "inserted_dropout": inserted or None,
        }  # fmt: skip
        return identity(models), {key: value for key, value in sampling.items() if value is not None}

    def note(self, models: Sequence[Model]) -> str:
        """What is to be said of each result: that a distribution over logits was not made use of."""
        unused = "stochastic-head" not in self.method and any(stochastic_heads(model.module) for model in models)
        return (
            "of the head's mean logits alone: the method stochastic-head samples their distribution" if unused else ""
        )

    def sampler(self, models: Sequence[Model], **engine: Any) -> Sampler:
        """As `seguncert.views.make_sampler`, which brings numba: half a second that one pass need not wait for."""
        from seguncert.views import make_sampler

        return make_sampler(models, self.method, self.views, self.drop_path, **engine)

    def needs_sampler(self, model: Model, H: int, W: int) -> bool:
        """False where one pass over the whole photo is all there is to it."""
        whole = fits(H, W, scale_factor(model, H, W, self.scale), self.pixels)
        return self.method != "none" or self.carry is not None or not whole


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
    drop_path: bool = False,
    maps: Sequence[str] | None = None,
    calibration: str | os.PathLike[str] | Calibration | None = "auto",
    conformal: str | os.PathLike[str] | FittedSets | None = "auto",
    scale: str | float = "auto",
    tile: int | Literal["auto"] = "auto",
    progress: Progress | None = None,
) -> Result:
    """Labels, probabilities and maps of one photo: a file, its bytes, or an RGB array (H, W, 3) uint8.

    Args:
        model: one, or for the method ensemble several of the same classes.
        method: none is one deterministic pass; mc-dropout averages `samples` passes with dropout on, drawn from `seed`;
            sampling-free is its limit of many samples by formulas; stochastic-head averages samples of a net with a
            `LowRankHead`; tta averages views, ensemble models. Joined with + they are combined, as mc-dropout+tta.
        samples: "auto" draws until the standard error of the first map is at most `max_error` of full scale for 99 % of
            the pixels, and 1,000 at most.
        views: of tta; see `seguncert.views.make_sampler`.
        carry: for the frames of a video, one `seguncert.Carry` for all of them in order; what it carries is blended in.
        drop_path: whether timm's stochastic depth is dropout too.
        maps: names of `seguncert.maps.MAPS`; None is confidence, entropy, and by method margin, or mutual information
            and variance. set_size needs conformal sets.
        calibration: auto is the one that comes with the model for this method, if there is one; none, a file that
            `seguncert calibrate` wrote, or what `load_calibration` gives. It changes the probabilities and the maps of
            them; mutual information and variance describe the samples, before calibration.
        conformal: likewise the sets that come with the model for this method and calibration, none, a file that
            `seguncert conformal` wrote, or what `load_sets` gives; see `seguncert.sets.find_sets` for what is refused.
        tile: pixels a side that a net is given at once; auto is 2,048, or 896 of larger pictures.
        progress: called with the samples (or views) there are, and of how many; where it returns False no more are drawn,
            and the result, whose note says so, is of those.

    Raises:
        ImageError: the file cannot be opened, or is not a picture that can be read whole.
        ModelError: the net gave values that are not finite, or has no dropout or stochastic head to sample.
        ValueError: unknown method, map or scale, fewer than two samples, a calibration for another model or method, sets
            for another calibration too, or none where the map set_size is asked for.
    """
    models = [model] if isinstance(model, Model) else list(model)
    if not models or not all(isinstance(each, Model) for each in models):
        raise ValueError(f"model: expected what load_model or wrap_model gives, or a list of such. Received: {model!r}")
    settings = Settings(
        method, samples, seed, chosen_views(views), max_error, carry.keep if carry else None, drop_path,
        scale, tile, () if maps is None else chosen_maps(maps), conformal not in (None, "none"),
    )  # fmt: skip
    if not isinstance(image, (str, os.PathLike, bytes, np.ndarray)):
        raise ImageError(
            f"image: expected a path, bytes or an RGB array. Received: {type(image).__name__}."
            " For a PIL image give numpy.asarray(image.convert('RGB'))."
        )
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ImageError(f"image: expected RGB of shape (H, W, 3), uint8. Received: {image.shape}, {image.dtype}.")
        photo = Photo(np.array(image, order="C"), "")  # a copy: what is asked of the result later is of this photo
    else:
        try:
            photo = read_image(image)
        except ImageError as error:
            raise error if isinstance(image, bytes) else ImageError(f"{os.fspath(image)}: {error}") from None
    H, W = photo.rgb.shape[:2]
    fitted = find_calibration(calibration, models[0].folder, *settings.fitted_for(models))
    calibrator = fitted.calibrator if fitted else None
    of_model = find_sets(
        conformal, models[0].folder, *settings.fitted_for(models), fitted,
        asked=maps_.OF_SETS in settings.maps, overridden=calibration != "auto",
    )  # fmt: skip
    sets = of_model.sets if of_model else None
    plain = len(models) == 1 and not settings.needs_sampler(models[0], H, W)
    sampler = None if plain else settings.sampler(models)
    stopped = _Stopped(progress) if progress is not None else None
    logits, moments, errors = predict_photo(models[0], sampler, photo.rgb, settings, carry, calibrator, sets, stopped)
    labels, found = describe_photo(photo.rgb, logits, moments, settings.maps, calibrator, sets)
    strange = calibrator.unfamiliar(logits) if calibrator else ""
    return Result(
        photo.rgb, labels.astype(np.int64), found, models[0].classes, models[0].colours, logits,
        fitted.about if fitted else "none", moments if method != "none" else None, errors,
        "; ".join(filter(None, [photo.note, strange, stopped.note if stopped else "", settings.note(models)])), calibrator, sets,
    )  # fmt: skip


class _Stopped:
    """Remembers where `progress` said to stop."""

    def __init__(self, progress: Progress):
        self.progress, self.note = progress, ""

    def __call__(self, done: int, wanted: int) -> bool:
        if self.progress(done, wanted) is not False:
            return True
        self.note = f"stopped after {done} of {wanted}" if done < wanted else ""
        return False


def identity(models: Sequence[Model]) -> dict[str, Any]:
    """Name, sha256 and classes; those of an ensemble are of all its nets."""
    digests = [model.sha256 for model in models]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(sorted(digests)).encode()).hexdigest()
    names = " + ".join(model.name for model in models)
    return {"name": names, "sha256": digest if all(digests) else "", "classes": list(models[0].classes)}


def chosen_views(views: Sequence[str] | None) -> tuple[str, ...] | None:
    """Their names; numbers are taken for scales."""
    if isinstance(views, str):
        raise ValueError(f"views: expected a list of names. Received: {views!r}")
    return None if views is None else tuple(str(view) for view in views)


def chosen_maps(maps: Sequence[str]) -> tuple[str, ...]:
    """Those that were named, of which there must be one; in `Settings` none stands for the method's own."""
    if not maps:
        maps_.check_names(maps)
    return tuple(maps)


def predict_photo(
    model: Model,
    sampler: Sampler | None,
    rgb: UInt8[np.ndarray, "H W 3"],
    settings: Settings,
    carry: Carry | None = None,
    calibrator: Calibrator | None = None,
    sets: ConformalSets | None = None,
    progress: Progress | None = None,
) -> tuple[Float[torch.Tensor, "C h w"], Moments | None, dict[str, Float[np.ndarray, "H W"]]]:
    """Logits of the predictive distribution, the samples' moments where there is a sampler, and Monte-Carlo errors.

    The logits are not calibrated; what samples auto wants to know are the maps after `calibrator`, and of `sets`.
    """
    if sampler is None:
        assert carry is None
        return predict_logits(model, rgb, settings.scale), None, {}
    if isinstance(settings.samples, str):
        moments, errors = _until_known(sampler, rgb, settings, calibrator, sets, progress)
    else:
        how = (rgb, settings.samples, settings.seed, settings.scale, settings.pixels)
        moments = sampler.moments(*how) if progress is None else _told(sampler.steps(*how), progress)
        if carry is not None:
            moments = carry.blend(rgb, moments)
        known = "confidence" in settings.maps and sampler.drawn and sampler.alike and carry is None
        # of the confidence before calibration: what it does to each sample cannot be said
        errors = {"confidence": moments.standard_error_HW().numpy()} if known else {}
    return moments.log_mean_CHW(), moments, errors


def _told(steps: Iterator[tuple[int, int, Moments]], progress: Progress) -> Moments:
    """Steps merged until all are there, or `progress` says to stop."""
    done, wanted, moments = next(steps)
    while progress(done, wanted) is not False and (step := next(steps, None)) is not None:
        done, wanted, more = step
        moments.merge(more)
    return moments


def _until_known(
    sampler: Sampler,
    rgb: UInt8[np.ndarray, "H W 3"],
    settings: Settings,
    calibrator: Calibrator | None,
    sets: ConformalSets | None,
    progress: Progress | None,
) -> tuple[Moments, dict[str, Float[np.ndarray, "H W"]]]:
    """Batches of samples until the first map is known; the standard error is that of the mean of the batches' maps."""
    H, W, names = *rgb.shape[:2], settings.maps
    moments = Moments.empty(len(sampler.classes), H, W)
    mean = {name: np.zeros((H, W), np.float32) for name in names}
    squares = {name: np.zeros((H, W), np.float32) for name in names}
    batches = sampler.batches(rgb, AUTO_BATCH, settings.seed, settings.scale, settings.pixels)
    for number, batch in enumerate(batches, 1):
        found = describe_photo(rgb, batch.log_mean_CHW(), batch, names, calibrator, sets)[1]
        moments.merge(batch)
        for name, map_HW in found.items():
            delta_HW = map_HW - mean[name]
            mean[name] += delta_HW / number
            squares[name] += delta_HW * (map_HW - mean[name])
        if number >= AUTO_LEAST:
            error_HW = np.sqrt(squares[names[0]] / (number * (number - 1)))
            if np.quantile(error_HW, AUTO_SHARE) <= settings.max_error or number == AUTO_MOST:
                break
        if progress is not None and progress(number * AUTO_BATCH, AUTO_MOST * AUTO_BATCH) is False and number > 1:
            break
    return moments, {name: np.sqrt(each / (number * (number - 1))) for name, each in squares.items()}


def describe_photo(
    rgb: UInt8[np.ndarray, "H W 3"],
    logits: Float[torch.Tensor, "C h w"],
    moments: Moments | None,
    names: Sequence[str],
    calibrator: Calibrator | None = None,
    sets: ConformalSets | None = None,
) -> tuple[UInt8[np.ndarray, "H W"], dict[str, Float[np.ndarray, "H W"]]]:
    """Labels and maps at the photo's own size, calibrated, band by band; the spread of samples is not calibrated."""
    assert moments is not None or not set(names) & set(maps_.OF_SAMPLES)
    assert sets is not None or maps_.OF_SETS not in names
    H, W = rgb.shape[:2]
    labels_HW = np.empty((H, W), np.uint8)
    found = {name: np.empty((H, W), np.float32) for name in names}

    def describe(band: Band) -> None:
        rows, (_, logits_CRW) = band.rows, band.both(calibrator)
        labels_RW, maps_RW = maps_.describe(logits_CRW, names)
        if moments is not None:
            maps_RW |= maps_.describe_spread(moments.at(rows), names)
        labels_HW[rows] = labels_RW.numpy()
        for name, map_RW in maps_RW.items():
            found[name][rows] = map_RW.numpy()
        if sets is not None and maps_.OF_SETS in names:
            found[maps_.OF_SETS][rows] = sets.size_map(logits_CRW)

    on_all_cores(describe, bands(calibrator, logits, rgb))
    return labels_HW, found


def describe_blocks(
    model: Model,
    sampler: Sampler | None,
    rgb: UInt8[np.ndarray, "H W 3"],
    settings: Settings,
    calibrator: Calibrator | None = None,
    sets: ConformalSets | None = None,
) -> Iterator[tuple[slice, slice, UInt8[np.ndarray, "R W"], dict[str, Float[np.ndarray, "R W"]], Moments]]:
    """Rows, columns, labels, maps and moments of one block after another, for photos too large to hold their maps.

    To a calibrator that looks at the whole picture, each block is one.
    """
    sampler = sampler or settings.sampler([model])
    assert not isinstance(settings.samples, str)
    for rows, columns, moments in sampler.blocks(rgb, settings.samples, settings.seed, settings.scale, settings.pixels):
        block = np.ascontiguousarray(rgb[rows, columns])
        labels_RW, found = describe_photo(block, moments.log_mean_CHW(), moments, settings.maps, calibrator, sets)
        yield rows, columns, labels_RW, found, moments


def draw_overlay(
    rgb: UInt8[np.ndarray, "H W 3"],
    map_HW: Float[np.ndarray, "H W"],
    name: str,
    C: int,
    calibration: str = "none",
    sets: ConformalSets | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """The photo under the map `name` of a model with C classes, legend below, which says how far it can be believed."""
    info = maps_.MAPS[name]
    highest = info.full_scale(C) * info.drawn_to
    return overlay_picture(
        rgb,
        map_HW if info.drawn_to == 1 else np.minimum(map_HW / np.float32(info.drawn_to), 1),
        map_name=info.title,
        unit=info.unit + (f", {highest:.2g} and more drawn alike" if info.drawn_to < 1 else ""),
        sure_is=info.sure_is,
        full_scale=highest,
        note=legend_note(name, calibration, sets),
    )


def legend_note(name: str, calibration: str, sets: ConformalSets | None = None) -> str:
    """What a legend says of the calibration of a map, or of the promise that comes with it."""
    if name == maps_.OF_SETS and sets is not None:
        return sets.note
    if name in maps_.OF_SAMPLES:
        return SPREAD
    return NOT_CALIBRATED if calibration == "none" else f"calibrated: {calibration}"
