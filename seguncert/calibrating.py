"""A labelled folder in, a calibration out: pictures pass by once, pixels are drawn from them, a calibrator is fitted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from seguncert.batch import Spec, load_models, sequences
from seguncert.calibration import Calibration, CalibrationError
from seguncert.calibrators import KINDS
from seguncert.fitting import MOST, Candidate, Drawn, Pixels, choose, fit
from seguncert.image import MAX_PIXELS
from seguncert.job import Job, available_cores
from seguncert.labels import IGNORED, find_pairs, rater_shares
from seguncert.maps import DRAWN, parse_method
from seguncert.model import Model, load_model
from seguncert.predict import rows_at_size
from seguncert.run import Settings, chosen_views
from seguncert.surroundings import FEATURES, OF_SURROUNDINGS, around, pixel_features, surroundings
from seguncert.walk import Failed, Ready, check_file, visit, walk


@dataclass(frozen=True)
class Calibrated:
    """Outcome: the calibration, what each kind brought on held-out pictures if that was asked for, and what failed."""

    calibration: Calibration
    candidates: list[Candidate]
    pixels: int
    pictures: int
    failed: dict[str, str]

    @property
    def about(self) -> str:
        """What was fitted, and what it can be trusted for."""
        found, held_out = self.calibration, self.calibration.protocol["held_out"]
        kind = "none: no calibrator was surely better" if found.calibrator is None else found.kind
        text = f"{kind}, fitted on {self.pixels} pixels of {self.pictures} images"
        for name, reason in (held_out or {}).get("not_fitted", {}).items():
            text += f". {name} was left out of the choice, since it could not be fitted on some of the images: {reason}"
        if held_out and held_out["by"] != "sequence":
            text += (
                ". All are of one sequence, so nothing is known of other scenes, and no more than one temperature was"
                " tried; name a calibrator to have another"
            )
        return text


def calibrate(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: Model | Sequence[Model] | Spec = "street",
    *,
    ignore_index: int | None,
    calibrator: str = "auto",
    raters: Sequence[str | os.PathLike[str]] = (),
    left_out: Sequence[str | os.PathLike[str]] = (),
    all_pixels: bool = False,
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
) -> Calibrated:
    """Fit a calibration on labelled images that the model was not trained on, and write it to `out` as JSON.

    One pixel of twenty is drawn, a million at most, so that memory does not grow with the number of images.

    Args:
        labels: folder of 8- or 16-bit PNG of class indices, each of its image's relative path without suffix.
        ignore_index: label of pixels that do not count; None declares that there are none.
        calibrator: one of `seguncert.calibrators.KINDS`, or auto: what predicts held-out images best, see
            `seguncert.fitting.choose`.
        raters: more folders of labels of the same images; what is fitted is the distribution of what the raters say.
        left_out: folders of nets that `seguncert.apps.train --leave-out SEQUENCE` made: on images of that sequence (their
            names before the first _) they stand in for the model, which may have been trained on these.
        all_pixels: draw every labelled pixel, and keep them all.
        method, samples, seed, views, drop_path, insert_dropout, scale, tile, workers, device, backend, precision,
            max_pixels, progress: as in `seguncert.export`.

    Raises:
        CalibrationError: nothing can be fitted, for the reason that it says.
        ValueError: a setting is wrong, or there is no image with a label.
    """
    images, out = Path(images), Path(out)
    if calibrator not in ("auto", *KINDS):
        raise CalibrationError(f"calibrator: expected auto or one of {', '.join(KINDS)}. Received: {calibrator!r}")
    check_file(out)
    drawn_seed = seed if parse_method(method) & DRAWN else Settings.seed
    settings = Settings(method, samples, drawn_seed, chosen_views(views), drop_path=drop_path, scale=scale, tile=tile)
    pairs = find_pairs(images, labels)
    further = [dict(find_pairs(images, folder)) for folder in raters]
    models, _ = load_models(model, device, insert_dropout or {}, method)
    workers = workers or min(available_cores(), 16)
    job = Job(images, settings, "png16", max_pixels, dict(insert_dropout or {}), backend, precision)
    names = tuple(FEATURES) if calibrator in ("auto", "local", "neighbourhood") else ()
    more: dict[str, Any] = {"run": 1, "most": 1 << 62} if all_pixels else {"most": MOST >> 1} if names else {}
    pixels = Pixels(len(models[0].classes), names, models[0].frame, seed, **more)
    named = [path.relative_to(images).as_posix() for path, _ in pairs]
    group = {path: frames[0] for frames in sequences(named) for path in frames}
    with ExitStack() as stack:
        nets = [_Net("", models[0].sha256, Ready.until(stack, job, models, workers))]
        for folder in left_out:
            nets += _stand_ins(stack, job, folder, models[0], device, workers)
        _check_sequences(nets[1:], pairs)

        def tasks() -> Iterator[Callable[[], Drawn | Failed]]:
            for name, (image, label) in zip(named, pairs, strict=True):
                net = next((each for each in nets[1:] if each.sequence == _sequence(image)), nets[0])
                every = [label, *(folder[image] for folder in further)]
                use = partial(draw, pixels, picture=name, group=group[name])
                yield partial(visit, job, net.ready, image, every, name, ignore_index, use)

        failed = walk(tasks(), len(pairs), workers, pixels.add, progress)
    if failed and not pixels.drawn:
        raise CalibrationError(f"calibrate: expected images with labels. Received: {len(failed)} that failed, the first is"
                               f" {next(iter(failed))}: {next(iter(failed.values()))}")  # fmt: skip
    kind, candidates, how = choose(pixels) if calibrator == "auto" else (calibrator, [], {})
    protocol = {
        "pictures": len(pixels.drawn), "pixels": len(pixels), "raters": 1 + len(raters), "ignore_index": ignore_index,
        "samples": samples if parse_method(method) & DRAWN else None, "seed": seed, "asked_for": calibrator, "held_out": how,
        "left_out": {each.sequence: each.sha256 for each in nets[1:]}, "seguncert": version("seguncert"),
    }  # fmt: skip
    measured = {"candidates": [asdict(each) for each in candidates]} if candidates else {}
    fitted = None if kind == "none" else fit(kind, pixels)
    calibration = Calibration(fitted, *settings.fitted_for(models), protocol, measured)
    calibration.save(out)
    return Calibrated(calibration, candidates, len(pixels), len(pixels.drawn), failed)


@dataclass(frozen=True)
class _Net:
    """A net for the images of that `sequence`, see `_sequence`."""

    sequence: str
    sha256: str
    ready: Ready


def _stand_ins(
    stack: ExitStack, job: Job, folder: str | os.PathLike[str], model: Model, device: str, workers: int
) -> list[_Net]:
    net = load_model(folder, device, job.insert_dropout)
    left_out = (net.card.get("recipe") or {}).get("leave_out") or []
    if net.classes != model.classes or not left_out:
        raise CalibrationError(
            f"left-out: expected a net of the classes of {model.name} that was trained with --leave-out."
            f" Received: {folder}, with {len(net.classes)} classes, trained without {', '.join(left_out) or 'nothing'}."
        )
    ready = Ready.until(stack, job, [net], workers)
    return [_Net(sequence, net.sha256, ready) for sequence in left_out]


def _sequence(image: Path) -> str:
    """As `seguncert.apps.train` tells which images a net is not trained on."""
    return image.stem.split("_")[0]


def _check_sequences(nets: Sequence[_Net], pairs: Sequence[tuple[Path, Path]]) -> None:
    found = {_sequence(image) for image, _ in pairs}
    for net in nets:
        if net.sequence not in found:
            raise CalibrationError(f"left-out: expected a net without one of the sequences {', '.join(sorted(found))}."
                                   f" Received: one without {net.sequence}. A sequence is what an image's name begins with, up to the first _.")  # fmt: skip


def draw(
    pixels: Pixels,
    logits_Chw: Float[Tensor, "C h w"],
    photo_HW3: UInt8[np.ndarray, "H W 3"],
    labels: Sequence[UInt8[np.ndarray, "H W"]],
    picture: str,
    group: str,
) -> Drawn:
    """Some labelled pixels of a picture, with all that `pixels` wants to know of them; `labels` are of one or more raters."""
    C, (H, W) = pixels.C, labels[0].shape
    at_N = pixels.picker(picture, np.flatnonzero(np.logical_or.reduce([each != IGNORED for each in labels])))
    with torch.inference_mode():
        seen = []
        if pixels.names:
            seen.append(surroundings(logits_Chw, tuple(OF_SURROUNDINGS), pixels.frame))
            seen.append(around(logits_Chw, photo_HW3, pixels.frame))
        all_NF = np.empty((len(at_N), C + sum(map(len, seen))), np.float32)
        column = 0
        for maps_Fij in [logits_Chw, *seen]:
            columns, column = slice(column, column + len(maps_Fij)), column + len(maps_Fij)
            as_they_are = maps_Fij.shape[1:] == (H, W)  # bands of these would be copied for the few pixels
            for rows, band_FRW in [(slice(0, H), maps_Fij)] if as_they_are else rows_at_size(maps_Fij, H, W):
                first, last = np.searchsorted(at_N, (rows.start * W, rows.stop * W))
                all_NF[first:last, columns] = band_FRW.flatten(1).numpy()[:, at_N[first:last] - rows.start * W].T
    if len(labels) == 1:
        votes: np.ndarray = labels[0].ravel()[at_N]
    else:
        said_RN = np.stack([each.ravel()[at_N] for each in labels])
        votes = rater_shares(said_RN, C).T.copy()
    logits_NC, S = all_NF[:, :C].copy(), C + len(OF_SURROUNDINGS)
    if not seen:
        return Drawn(logits_NC, votes, np.empty((len(at_N), 0), np.float32), picture, group)
    own_NF = pixel_features(torch.from_numpy(logits_NC).T).T.numpy()
    return Drawn(logits_NC, votes, np.concatenate([own_NF, all_NF[:, C:S]], 1), picture, group, all_NF[:, S:].copy())


def table_of(result: Calibrated) -> tuple[list[str], list[list[str]]]:
    """What the kinds brought on held-out images, in words: header and rows."""
    header = ["calibrator", "NLL held out / nat", "better than", "by", "95 % of bootstrap", "worst fold", "taken"]
    rows = [
        [
            each.kind,
            f"{each.nll:.4f}",
            each.over,
            *((f"{each.gain:+.4f}", f"{each.interval[0]:+.4f} … {each.interval[1]:+.4f}") if each.over else ("", "")),
            f"{-each.worst:+.1%}" if each.over else "",
            "yes" if each.chosen else "",
        ]
        for each in result.candidates
    ]
    return header, rows
