"""A labelled folder in, conformal sets out: pictures pass by once, and leave a histogram each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from seguncert.batch import Spec, load_models
from seguncert.calibration import Calibration, find_calibration
from seguncert.calibrators import Calibrator, calibrated_rows
from seguncert.conformal import Aim, ImageLosses, Losses, Sizes, check_enough
from seguncert.image import MAX_PIXELS
from seguncert.job import Job, available_cores
from seguncert.labels import IGNORED, find_pairs
from seguncert.maps import DRAWN, parse_method
from seguncert.model import Model
from seguncert.run import Settings, chosen_views
from seguncert.sets import FittedSets, known_by
from seguncert.walk import Failed, Ready, check_file, visit, walk


@dataclass(frozen=True)
class Conformed:
    """Outcome: the sets with what they were fitted for, and what failed."""

    fitted: FittedSets
    failed: dict[str, str]

    @property
    def about(self) -> str:
        """The promise, and what it costs: how large the sets are."""
        sets, protocol = self.fitted.sets, self.fitted.protocol
        return (
            f"{sets.promise}\nA set has {self.fitted.measured['size_mean']:.3f} of {sets.aim.C} classes on average over the labelled pixels of"
            f" the {protocol['images']} images it was fitted on; {len(self.failed)} could not be read."
        )


def conform(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: Model | Sequence[Model] | Spec = "street",
    *,
    ignore_index: int | None,
    alpha: float = 0.1,
    kind: str = "lac",
    by_class: bool = False,
    covered: float | None = None,
    calibration: str | os.PathLike[str] | Calibration | None = "auto",
    method: str = "none",
    samples: int = 20,
    seed: int = 0,
    views: Sequence[str] | None = None,
    drop_path: bool = False,
    insert_dropout: Mapping[str, float] | None = None,
    scale: str | float = "auto",
    tile: int | Literal["auto"] = "auto",
    workers: int | None = None,
    device: str = "auto",
    backend: str = "torch",
    precision: str = "auto",
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int, int], None] | None = None,
) -> Conformed:
    """Fit conformal sets on labelled images from which neither model nor calibration has learnt, and write them to `out` as JSON.

    All labelled pixels count; kept are two histograms, so that memory does not grow with the number of images.

    Args:
        labels: folder of 8- or 16-bit PNG of class indices, each of its image's relative path without suffix.
        ignore_index: label of pixels that do not count; None declares that there are none.
        alpha: share of the labelled pixels of an image that may be missed on average, or with `covered` of the images.
        kind: lac, lac-empty or aps, as `seguncert.conformal` tells.
        by_class, covered: as in `seguncert.conformal.Aim`.
        calibration: as in `seguncert.analyse`; the sets are for the probabilities after it.
        method, samples, seed, views, drop_path, insert_dropout, scale, tile, workers, device, backend, precision,
            max_pixels, progress: as in `seguncert.export`.

    Raises:
        ValueError: a setting is wrong, or too few images have a label, for the reason that it says.
    """
    images, out = Path(images), Path(out)
    check_file(out)
    settings = Settings(method, samples, seed, chosen_views(views), drop_path=drop_path, scale=scale, tile=tile)
    if kind == "foreground":
        raise ValueError("kind: expected lac, lac-empty or aps. Received: foreground, which has a mask, not sets")
    pairs = find_pairs(images, labels)
    check_enough(alpha, len(pairs))
    models, _ = load_models(model, device, insert_dropout or {}, method)
    aim = Aim(len(models[0].classes), kind, by_class, covered=covered)
    calibrated = find_calibration(calibration, models[0].folder, *settings.fitted_for(models))
    calibrator = calibrated.calibrator if calibrated else None
    workers = workers or min(available_cores(), 16)
    job = Job(images, settings, "png16", max_pixels, dict(insert_dropout or {}), backend, precision, calibrated)
    losses, sizes = Losses.empty(aim, ignore_index=IGNORED), Sizes.empty(aim, ignore_index=IGNORED)

    def take(one: tuple[ImageLosses, Sizes]) -> None:
        losses.add(one[0])
        sizes.merge(one[1])

    with ExitStack() as stack:
        net, use = Ready.until(stack, job, models, workers), partial(_count, losses, calibrator)

        def tasks() -> Iterator[Callable[[], tuple[ImageLosses, Sizes] | Failed]]:
            for image, label in pairs:
                yield partial(visit, job, net, image, [label], image.relative_to(images).as_posix(), ignore_index, use)

        failed = walk(tasks(), len(pairs), workers, take, progress)
    try:
        sets = losses.fit(alpha)
    except ValueError as error:
        first = "".join(
            f" {len(failed)} failed, the first is {name}: {text}" for name, text in list(failed.items())[:1]
        )
        raise ValueError(f"{error}{first}") from None
    protocol: dict[str, Any] = {
        "images": len(pairs) - len(failed), "failed": len(failed), "pixels": sizes.pixels, "ignore_index": ignore_index,
        "samples": samples if parse_method(method) & DRAWN else None, "seed": seed, "seguncert": version("seguncert"),
    }  # fmt: skip
    fitted = FittedSets(
        sets, *settings.fitted_for(models), known_by(calibrated), protocol, {"size_mean": sizes.mean(sets)}
    )
    fitted.save(out)
    return Conformed(fitted, failed)


def _count(
    losses: Losses,
    calibrator: Calibrator | None,
    logits_Chw: Float[Tensor, "C h w"],
    photo_HW3: UInt8[np.ndarray, "H W 3"],
    labels: Sequence[UInt8[np.ndarray, "H W"]],
) -> tuple[ImageLosses, Sizes]:
    """What the sets of one image would miss, and how large they would be, at each threshold."""
    (labels_HW,) = labels
    image, sizes = losses.begin(), Sizes.empty(losses.aim, ignore_index=IGNORED)
    with torch.inference_mode():
        for rows, logits_CRW in calibrated_rows(calibrator, logits_Chw, photo_HW3):
            image.update(logits_CRW, labels_HW[rows])
            sizes.update(logits_CRW, labels_HW[rows])
    return image, sizes


def table_of(result: Conformed) -> tuple[list[str], list[list[str]]]:
    """The thresholds, of all classes or each, in words: header and rows."""
    sets = result.fitted.sets
    least = {
        "lac": "in is the shown class, and any of at least this probability",
        "lac-empty": "in is any class of at least this probability",
        "aps": "in is any class that has at least this probability, with all that are less probable",
    }[sets.aim.kind]
    names = result.fitted.model["classes"] if sets.aim.by_class else ["all"]
    shares = (f"{p:.3g}" if p else "0, so it is always in" for p in sets.least_probability())
    rows = [[name, str(n), share] for name, n, share in zip(names, sets.images, shares, strict=True)]
    return ["class", "images", least], rows
