"""A labelled folder in, how good a model is out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from seguncert import maps as maps_
from seguncert.batch import Spec, list_images, load_models, sequences
from seguncert.calibration import Calibration, find_calibration
from seguncert.calibrators import Calibrator, both_rows
from seguncert.clusters import find_clusters
from seguncert.corruptions import check_names
from seguncert.findings import check_out, write_findings
from seguncert.image import LARGE, MAX_BYTES, MAX_PIXELS, ImageError, read_image
from seguncert.job import PIXELS, Job, available_cores
from seguncert.labels import IGNORED, find_labels, read_label, read_labels
from seguncert.model import Model, ModelError, evaluating
from seguncert.moments import Moments
from seguncert.predict import one_thread, rows_at_size, scale_factor
from seguncert.published import image_errors
from seguncert.run import Settings, chosen_maps, chosen_views, predict_photo
from seguncert.scores import Scores, boundary_band
from seguncert.shift import Shift, Shifted, evenly
from seguncert.tally import Judged, Part, Tally
from seguncert.tiles import MOST, Sampler, moments_bytes
from seguncert.video import Carry
from seguncert.worst import draw_pictures, overconfidence

PROTOCOLS = ("lts",)
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluated:
    """Outcome: images judged and failed, `metrics` as in metrics.json."""

    out: Path
    done: int
    failed: int
    metrics: dict[str, Any]


def evaluate(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: Model | Sequence[Model] | Spec = "street",
    *,
    ignore_index: int | None,
    raters: Sequence[str | os.PathLike[str]] = (),
    calibration: str | os.PathLike[str] | Calibration | None = "auto",
    boundary: int = 3,
    replicates: int = 200,
    protocol: Literal["lts"] | None = None,
    corruptions: str | Sequence[str] | None = None,
    corrupted: int = 50,
    method: str = "none",
    samples: int | Literal["auto"] = 20,
    seed: int = 0,
    views: Sequence[str] | None = None,
    max_error: float = 0.01,
    carry: float | None = None,
    drop_path: bool = False,
    insert_dropout: Mapping[str, float] | None = None,
    maps: Sequence[str] | None = None,
    scale: str | float = "auto",
    tile: int | Literal["auto"] = "auto",
    workers: int | None = None,
    device: str = "auto",
    backend: str = "torch",
    precision: str = "auto",
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int, int], None] | None = None,
) -> Evaluated:
    """Judge a model on labelled images and write metrics.json, metrics.csv and report.html to `out`.

    Each photo is predicted once; memory does not grow with their number. An image that cannot be read, or whose label is
    missing or does not fit, is a failed row, and the rest goes on. The numbers do not depend on `workers`. When it is
    stopped nothing is written: figures of some images would be taken for those of all.

    Args:
        labels: folder of 8- or 16-bit PNG of class indices, each of its image's relative path without suffix.
        ignore_index: label of pixels that do not count; None declares that there are none.
        raters: more folders of labels of the same images. A pixel's target is the distribution of what the raters say who
            labelled it, and each figure the mean over them; see `Scores.update_raters`.
        calibration: as in `seguncert.analyse`; figures from before it are made too.
        boundary: width in pixels of the band along boundaries between classes, on either side.
        replicates: of the bootstrap over `seguncert.clusters`, drawn from `seed`.
        protocol: lts adds the errors of `seguncert.published`.
        corruptions: names of `seguncert.corruptions`, or all: judges photos made worse too, five times for each name.
            A photo that cannot be judged under one of them has failed.
        corrupted: how many photos at most, evenly spaced; what is random in them follows from `seed` and their names.
        carry: as in `seguncert.export`; frames are then taken one after another.
        method, samples, seed, views, max_error, drop_path, insert_dropout, maps, scale, tile, workers, device, backend,
            precision, max_pixels, progress: as in `seguncert.export`.

    Raises:
        StoreError: `out` cannot be written, or holds other files.
        ValueError: a setting is wrong, there is no image with a label, or no pixel counts.
    """
    images, folders, out = Path(images), [Path(each) for each in (labels, *raters)], Path(out)
    drawn_seed = seed if maps_.parse_method(method) & maps_.DRAWN else Settings.seed
    settings = Settings(
        method, samples, drawn_seed, chosen_views(views), max_error, carry, drop_path, scale, tile,
        () if maps is None else chosen_maps(maps),
    )  # fmt: skip
    for name, value, least in (("boundary", boundary, 0), ("replicates", replicates, 1), ("corrupted", corrupted, 1)):
        if value < least:
            raise ValueError(f"{name}: expected {least} or more. Received: {value}")
    if protocol not in (None, *PROTOCOLS):
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, or none. Received: {protocol!r}")
    if protocol is not None and raters:
        raise ValueError(f"protocol {protocol}: expected labels of one rater. Received: those of {len(folders)}")
    names = () if corruptions is None else check_names(corruptions)
    if names and carry is not None:
        raise ValueError(f"corruptions: expected photos by themselves, without carry. Received: carry {carry}")
    paths, of_image = _files(images, folders, out)
    models, _ = load_models(model, device, insert_dropout or {}, method)
    scale_factor(models[0], 1, 1, scale)
    workers = 1 if carry is not None else workers or min(available_cores(), 16)
    fitted = find_calibration(calibration, models[0].folder, *settings.fitted_for(models))
    calibrator = fitted.calibrator if fitted else None
    job = Job(
        images, settings, max_pixels=max_pixels, insert_dropout=dict(insert_dropout or {}), backend=backend,
        precision=precision, calibration=fitted,
    )  # fmt: skip
    net, sampler, engine = job.engine(models, workers)
    labelled = [path for path in paths if all(Path(path).with_suffix("") in each for each in of_image)]
    stages = 1 if calibrator is None else 2
    photos = frozenset(evenly(labelled, corrupted))
    shift = Shift(names, photos, len(labelled), len(net.classes), stages, replicates, seed, len(folders))
    tally = Tally.empty(
        net.classes, settings.maps, find_clusters(paths), calibrated=calibrator is not None, published=protocol == "lts",
        replicates=replicates, seed=seed, shift=shift if names else None, raters=len(folders),
    )  # fmt: skip
    judge = _Judge(job, net, sampler, of_image, ignore_index, boundary, calibrator, tally)
    threads = torch.get_num_threads(), cv2.getNumThreads()
    try:
        with (
            sampler.ready() if sampler else evaluating(net.module),
            closing(in_order(judge.tasks(paths), workers)) as results,
        ):
            if progress is not None:
                progress(0, 0, len(paths))
            for judged in results:
                tally.add(judged)
                if progress is not None:
                    progress(tally.done, tally.failed, len(paths))
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    run = job.run_json(models, sampler, engine) | {
        "labels": str(folders[0].resolve()), "more_labels": [str(each.resolve()) for each in folders[1:]],
        "ignore_index": ignore_index, "boundary": boundary, "replicates": replicates, "seed": seed, "protocol": protocol,
    }  # fmt: skip
    return Evaluated(out, tally.done, tally.failed, write_findings(tally, run, out))


def _files(images: Path, labels: list[Path], out: Path) -> tuple[list[str], list[dict[Path, Path]]]:
    """Relative paths of the images, and each rater's label files by path without suffix; ValueError where the folders do not
    go together."""
    named = list(zip(("LABELS", *["rater"] * (len(labels) - 1)), labels, strict=True))
    for name, folder in [("IMAGES", images), *named]:
        if not folder.is_dir():
            raise ValueError(
                f"{name}: expected a folder. Received: {folder}, which is {'a file' if folder.exists() else 'not there'}"
            )
        if name != "IMAGES" and images.resolve() == folder.resolve():
            raise ValueError(f"{name}: expected another folder than IMAGES. Received: {folder} for both")
        if out.resolve() == folder.resolve():
            raise ValueError(f"OUT: expected a folder of its own. Received: {out}, which holds images or labels")
    check_out(out)
    paths, of_image = list_images(images, out)[0], [find_labels(folder) for folder in labels]
    for folder, found in zip(labels, of_image, strict=True):
        if not any(Path(path).with_suffix("") in found for path in paths):
            raise ValueError(
                f"expected images in {images} and PNG of the same names in {folder}. Received: {len(paths)} images,"
                f" {len(found)} PNG, and no pair among them"
            )
    return paths, of_image


@dataclass(frozen=True)
class _Judge:
    """What the threads share; called with one image after another."""

    job: Job
    model: Model
    sampler: Sampler | None
    labels: Sequence[Mapping[Path, Path]]  # of each rater
    ignore_index: int | None
    boundary: int
    calibration: Calibrator | None
    tally: Tally

    def tasks(self, paths: list[str]) -> Iterator[Callable[[], Judged]]:
        """One for each image; frames of a video, of which something is carried, in their order."""
        keep = self.job.settings.carry
        if keep is None:
            yield from (partial(self, path, number) for number, path in enumerate(paths))
            return
        number = {path: k for k, path in enumerate(paths)}
        for frames in sequences(paths):
            past = Carry(keep)
            yield from (partial(self, path, number[path], past) for path in frames)

    def __call__(self, path: str, number: int, past: Carry | None = None) -> Judged:
        """Judge the image; what is wrong with it becomes one line of its row."""
        row: dict[str, Any] = {"path": path, "status": "failed", "error": ""}
        try:
            return self._judge(path, number, past)
        except (ImageError, ModelError) as error:
            return Judged(row | {"error": str(error)})
        except ValueError as error:
            return Judged(row | {"error": " ".join(str(error).split())[:500]})
        except Exception as error:  # whatever a net or a decoder raises: this image failed, the others go on
            return Judged(
                row | {"error": f"failed inside: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            )

    def _judge(self, path: str, number: int, past: Carry | None) -> Judged:
        model, settings, C = self.model, self.job.settings, len(self.model.classes)
        files = [each[stem] for each in self.labels if (stem := Path(path).with_suffix("")) in each]
        if len(files) < len(self.labels):
            of = f" by {len(self.labels) - len(files)} of {len(self.labels)} raters" if self.labels[1:] else ""
            raise ValueError(f"no label{of}: there is no PNG of the same relative path without suffix")
        photo = read_image(
            self.job.source / path, max_pixels=self.job.max_pixels, max_bytes=max(MAX_BYTES, 8 * self.job.max_pixels)
        )
        H, W = photo.rgb.shape[:2]
        labels_KHW = read_labels(files, C, self.ignore_index, H, W)
        most = min(LARGE, MOST // moments_bytes(C, 1, 1))
        if most < H * W:
            raise ValueError(
                f"expected at most {most} pixels for {C} classes, to be judged whole. Received: {W}x{H}; cut image and label into parts"
            )
        with PIXELS.take(H * W * (1 + C // 3)):
            sampler = self.sampler
            if sampler is None and settings.needs_sampler(model, H, W):
                sampler = settings.sampler([model])
            logits, moments, _ = predict_photo(model, sampler, photo.rgb, settings, past)
            with torch.inference_mode():
                parts, shown_HW, confidence_HW = self._score(photo.rgb, logits, moments, labels_KHW, number)
                shifted = self._shifted(path, photo.rgb, labels_KHW, parts, sampler)
            pictures = self._pictures(parts, photo.rgb, shown_HW, labels_KHW, confidence_HW)
        strange = self.calibration.unfamiliar(logits) if self.calibration else ""
        note = "; ".join(filter(None, [photo.note, strange]))
        row = {"path": path, "status": "ok", "error": "", "note": note, "height": H, "width": W}
        return Judged(row, parts, pictures, shifted)

    def _score(
        self,
        rgb: UInt8[np.ndarray, "H W 3"],
        logits_Chw: Float[Tensor, "C h w"],
        moments: Moments | None,
        labels_KHW: UInt8[np.ndarray, "K H W"],
        number: int,
    ) -> tuple[tuple[Part, ...], UInt8[np.ndarray, "H W"], Float32[np.ndarray, "H W"]]:
        """Sums of the image after calibration and before it, and what is shown after it, band by band."""
        H, W = labels_KHW.shape[1:]
        stages, names = self.tally.stages, self.job.settings.maps
        bands = [boundary_band(each_HW, self.boundary, ignore_index=IGNORED) for each_HW in labels_KHW]
        band_HW = np.logical_or.reduce(bands)
        scores = [stage.evaluation.begin() for stage in stages]
        shown = [(np.empty((H, W), np.uint8), np.empty((H, W), np.float32)) for _ in stages]
        for rows, versions in self._bands(logits_Chw, rgb):
            spread = {} if moments is None else maps_.describe_spread(moments.at(rows), names)
            for each_CRW, sums, (shown_HW, confidence_HW) in zip(versions, scores, shown, strict=True):
                labels_RW, maps_RW = maps_.describe(each_CRW, {"confidence", *names})
                shown_HW[rows], confidence_HW[rows] = labels_RW, maps_RW.pop("confidence")
                sums.update(each_CRW, labels_KHW[:, rows], maps_RW | spread, band_HW[rows])
        parts = tuple(
            Part(
                sums, None if stage.published is None else image_errors(confidence_HW, shown_HW, labels_KHW[0], number)
            )
            for stage, sums, (shown_HW, confidence_HW) in zip(stages, scores, shown, strict=True)
        )
        return parts, *shown[0]

    def _shifted(
        self,
        path: str,
        rgb: UInt8[np.ndarray, "H W 3"],
        labels_KHW: UInt8[np.ndarray, "K H W"],
        parts: tuple[Part, ...],
        sampler: Sampler | None,
    ) -> Shifted | None:
        """What came of the photo made worse, if it is one of those that are."""
        shift = self.tally.shift
        if shift is None or path not in shift.photos:
            return None

        def predict(worse: UInt8[np.ndarray, "H W 3"]) -> Iterator[tuple[slice, list[Tensor]]]:
            logits, _, _ = predict_photo(self.model, sampler, worse, self.job.settings)
            return self._bands(logits, worse)

        return shift.judge(path, rgb, labels_KHW, [part.scores.scores for part in parts], predict)

    def _bands(
        self, logits_Chw: Float[Tensor, "C h w"], rgb: UInt8[np.ndarray, "H W 3"]
    ) -> Iterator[tuple[slice, list[Float[Tensor, "C R W"]]]]:
        """Rows of logits at the photo's size: calibrated, where there is a calibration, and as they were."""
        for rows, before_CRW, after_CRW in both_rows(self.calibration, logits_Chw, rgb):
            yield rows, [before_CRW] if self.calibration is None else [after_CRW, before_CRW]

    def _pictures(
        self,
        parts: tuple[Part, ...],
        rgb: np.ndarray,
        shown_HW: np.ndarray,
        labels_KHW: np.ndarray,
        confidence_HW: np.ndarray,
    ) -> dict[str, bytes] | None:
        """Errors are drawn by the first rater who labelled the pixel."""
        if not self.tally.worst.wants(overconfidence(parts[0].scores.scores)):
            return None
        first_HW = reduce(lambda first, next: np.where(first == IGNORED, next, first), labels_KHW)
        return draw_pictures(rgb, shown_HW, first_HW, confidence_HW, self.model.colours, IGNORED)


def in_order(tasks: Iterable[Callable[[], T]], workers: int) -> Generator[T, None, None]:
    """Results of tasks that threads take, a core each, in the order of the tasks: sums of them do not depend on `workers`.

    When it is left early, what is under way is ended and the rest dropped.
    """

    def run(task: Callable[[], T]) -> T:
        one_thread()
        cv2.setNumThreads(1)
        return task()

    waiting = deque[Future[T]]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(run, task))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def measure(
    model: Model, pairs: Iterable[tuple[Path, Path]], ignore_index: int | None, scale: str | float = "auto"
) -> dict[Path, Scores]:
    """Sums of each image of one deterministic pass, at the size of the image."""
    scores, settings = {}, Settings(scale=scale)
    with torch.inference_mode():
        for image, label in pairs:
            labels_HW = read_label(label, len(model.classes), ignore_index)
            rgb = read_image(image).rgb
            if labels_HW.shape != rgb.shape[:2]:
                raise ValueError(
                    f"{label}: expected the size of its image, {rgb.shape[:2]}. Received: {labels_HW.shape}"
                )
            scores[image] = Scores.empty(len(model.classes))
            H, W = labels_HW.shape
            sampler = settings.sampler([model]) if settings.needs_sampler(model, H, W) else None
            logits = predict_photo(model, sampler, rgb, settings)[0]
            for rows, logits_CRW in rows_at_size(logits, H, W):
                scores[image].update(logits_CRW, labels_HW[rows], ignore_index=IGNORED)
    return scores


def total(scores: Iterable[Scores], C: int) -> Scores:
    """The merged sums of many images; ValueError if nothing in them is labelled."""
    merged = Scores.empty(C)
    for part in scores:
        merged.merge(part)
    if not merged.confusion.any():
        raise ValueError(
            "quality: expected at least one labelled pixel. Received: none; are all labels the ignore index?"
        )
    return merged
