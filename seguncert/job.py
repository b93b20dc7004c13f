"""One image of a batch: from its file to its line in the ledger and its files.

Whatever is wrong with an image becomes one line of text. Maps of an ordinary photo are made in memory; those of a very large
one go to the disk block by block, and from there into their files, so that 20,000 x 20,000 pixels need no more memory than
the photo itself and one block.
"""

from __future__ import annotations

import io
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from seguncert import maps as maps_
from seguncert import render
from seguncert.calibration import Calibration
from seguncert.calibrators import Calibrator
from seguncert.conformal import ConformalSets
from seguncert.embedding import Embedder, encode
from seguncert.image import LARGE, MAX_BYTES, ImageError, Photo, read_image
from seguncert.model import Model, ModelError
from seguncert.moments import Moments, disagreement
from seguncert.predict import on_backend, predict_logits
from seguncert.run import Settings, describe_blocks, describe_photo, draw_overlay, predict_photo
from seguncert.sheets import Sheet, give_back, let_go, tiff_writer
from seguncert.store import FULL, OURS, cannot_write, stamp_of
from seguncert.tables import BINS
from seguncert.tiles import MOST, Sampler, moments_bytes
from seguncert.video import Carry

FORMATS = ("png16", "npy", "tiff")
ERROR_BINS = 1 << 14  # of the histogram from which the quantile of the Monte-Carlo error is read
ERROR_SHARE = 0.99
OVERLAY = 4096  # pixels of the longest side of the overlay of a large picture


@dataclass(frozen=True)
class Job:
    """What is asked for, the same for every image of a batch."""

    source: Path
    settings: Settings = field(default_factory=Settings)
    format: str = "png16"
    max_pixels: int = 100_000_000
    insert_dropout: dict[str, float] = field(default_factory=dict)
    backend: str = "torch"
    precision: str = "auto"
    calibration: Calibration | None = None
    sets: ConformalSets | None = None
    embeddings: bool = False
    note: str = ""  # of every image

    @property
    def calibrator(self) -> Calibrator | None:
        """What is done to the logits."""
        return self.calibration.calibrator if self.calibration else None

    @property
    def calibrated(self) -> str:
        """That in a few words."""
        return self.calibration.about if self.calibration else "none"

    def engine(self, models: Sequence[Model], workers: int) -> tuple[Model, Sampler | None, dict[str, Any]]:
        """The model on its backend, or a sampler of all models on it; and what run.json says of them."""
        settings = self.settings
        if settings.method == "none" and settings.carry is None and len(models) == 1:
            model, engine = on_backend(models[0], self.backend, self.precision, workers)
            return model, None, {"backend": engine}
        sampler = settings.sampler(models, backend=self.backend, precision=self.precision, streams=workers)
        about: dict[str, Any] = {"samples": settings.samples, "seed": settings.seed} if sampler.drawn else {}
        about |= {"carry": settings.carry} if settings.carry is not None else {}
        about |= {"max_error": settings.max_error} if settings.samples == "auto" else {}
        return models[0], sampler, about | {"inserted_dropout": self.insert_dropout, **sampler.how}

    def embedder(self, models: Sequence[Model], sampler: Sampler | None) -> Embedder | None:
        """What takes embeddings, if they are asked for; those of an ensemble are of its first net."""
        if not self.embeddings:
            return None

        def predict(rgb: np.ndarray) -> None:
            if sampler is None:
                predict_logits(models[0], rgb, "native")
            else:
                sampler.parts()[0].moments(rgb, 2, scale="native", tile=max(rgb.shape))

        return Embedder(models[0], predict)

    def errors(self, sampler: Sampler | None) -> list[str]:
        """Maps whose Monte-Carlo error is told."""
        if sampler is None or not sampler.drawn or self.settings.carry is not None:
            return []
        if self.settings.samples == "auto":
            return [*self.settings.maps]
        return [name for name in self.settings.maps if name == "confidence" and sampler.alike]

    def run_json(self, models: Sequence[Model], sampler: Sampler | None, engine: dict[str, Any]) -> dict[str, Any]:
        """What decides the output: the content of run.json."""
        C = len(models[0].classes)
        about = [
            {
                "name": model.name, "sha256": model.sha256, "classes": list(model.classes), "colours": model.colours.tolist(),
                "mean": list(model.mean), "std": list(model.std), "frame": model.frame and list(model.frame),
                "divisor": model.divisor, "head": model.head, "dropout": model.card.get("dropout", []),
            }
            for model in models
        ]  # fmt: skip
        return {
            "seguncert": version("seguncert"),
            "input": str(self.source.resolve()),
            "model": about[0],
            **({"models": about} if len(about) > 1 else {}),
            "method": self.settings.method,
            **engine,
            "calibration": self.calibrated,
            **({"calibrator": self.calibration.parameters} if self.calibrator and self.calibration else {}),
            **({"sets": self.sets.to_dict()} if self.sets else {}),
            "scale": str(self.settings.scale),
            "tile": self.settings.tile,
            "format": self.format,
            "maps": {
                name: {
                    "title": info.title, "unit": info.unit, "full_scale": info.full_scale(C), "sure_is": info.sure_is, "about": info.about, "drawn_to": info.drawn_to,
                    "stored": "round(65535 × map)" if self.format == "png16" else "float32", "range": [0.0, 1.0],
                }
                for name in self.settings.maps
                for info in [maps_.MAPS[name]]
            },
            "errors": self.errors(sampler),
            "device": str(models[0].device),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy", "opencv-python", "segmentation-models-pytorch")},
        }  # fmt: skip


def available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Budget:
    """At most `total` of something at once, shared by threads; one that needs more waits until it is alone."""

    def __init__(self, total: int):
        self.total, self.taken, self.changed = total, 0, threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.taken == 0 or self.taken + amount <= self.total)
            self.taken += amount
        try:
            yield
        finally:
            with self.changed:
                self.taken -= amount
                self.changed.notify_all()


PIXELS = _Budget(32_000_000)  # under way at once, so that large pictures do not fill the memory together

Files = dict[str, "bytes | Path"]  # contents, or where a file lies that is to be moved


def process(
    job: Job,
    model: Model,
    sampler: Sampler | None,
    path: str,
    scratch: Path,
    carry: Carry | None = None,
    embedder: Embedder | None = None,
) -> tuple[dict[str, Any], Files]:
    """Ledger line and files of one image. `scratch` is an empty folder for what does not fit into memory.

    An `embedder` must be listening. Of an image that is done the line has `mean`, `histogram` and `areas`, the pixels
    that show each class; where there are samples `disagreement`, and where asked for `errors`, `samples`, `embedding`.
    """
    started = time.perf_counter()
    file, stamp = job.source / path, stamp_of(job.source / path)
    line: dict[str, Any] = {"path": path, "status": "failed", "error": "", "input": stamp}
    if Path(path).parts[0] in OURS:
        return line | {
            "error": f"its folder {Path(path).parts[0]!r} has the name of a file of the output; rename it"
        }, {}
    if file.is_dir() and not os.access(file, os.R_OK | os.X_OK):
        return line | {"error": "the folder cannot be listed; check its permissions"}, {}
    try:
        photo = _read(job, path, scratch / "pixels")
        H, W = photo.rgb.shape[:2]
        taking = embedder.photo() if embedder else nullcontext()
        with PIXELS.take(_weight(model, sampler, photo.rgb)), taking as pooled:
            sampled = sampler is not None or job.settings.needs_sampler(model, H, W)
            if H * W > LARGE or (sampled and moments_bytes(len(model.classes), H, W) > MOST):
                found, files = _in_blocks(job, model, sampler, photo.rgb, scratch)
            else:
                found, files = _in_memory(job, model, sampler, photo.rgb, carry)
        if embedder and pooled:
            found["embedding"] = encode(embedder.embedding(pooled))
    except (ImageError, ModelError) as error:
        return line | {"error": str(error)}, {}
    except OSError as error:
        if error.errno in FULL:
            raise cannot_write(scratch, error) from None
        return line | {"error": f"failed inside: {error}"}, {}
    except Exception as error:  # whatever a net or a decoder raises: this image failed, the others go on
        return line | {"error": f"failed inside: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}, {}
    found["note"] = "; ".join(filter(None, [photo.note, found.get("note"), job.note]))
    return line | {"status": "ok", "height": H, "width": W} | found | {
        "seconds": round(time.perf_counter() - started, 4)
    }, files


def readable(job: Job, path: str) -> bool:
    """Whether a frame can be decoded at all."""
    try:
        _read(job, path)
    except Exception:  # `process` will say what
        return False
    return True


def look_back(job: Job, model: Model, sampler: Sampler | None, path: str, carry: Carry | None) -> str:
    """Predict a frame that is done already, for the sake of those after it; what went wrong, or nothing."""
    try:
        rgb = _read(job, path).rgb
        with PIXELS.take(_weight(model, sampler, rgb)):
            predict_photo(model, sampler, rgb, job.settings, carry)
    except Exception as error:  # as in `process`
        return (
            f"the frame {path} before it is done, but could not be predicted again for this one: "
            f"{' '.join(str(error).split())[:300] or type(error).__name__}; mend or remove that frame"
        )
    return ""


def _read(job: Job, path: str, spill: Path | None = None) -> Photo:
    limit = max(MAX_BYTES, 8 * job.max_pixels)
    return read_image(job.source / path, max_pixels=job.max_pixels, max_bytes=limit, spill=spill)


def _weight(model: Model, sampler: Sampler | None, rgb: np.ndarray) -> int:
    """How much of `PIXELS` a photo takes: moments hold floats of each class."""
    return rgb.shape[0] * rgb.shape[1] * (1 + len(model.classes) // 3 if sampler else 1)


def _in_memory(
    job: Job, model: Model, sampler: Sampler | None, rgb: np.ndarray, carry: Carry | None
) -> tuple[dict[str, Any], Files]:
    H, W = rgb.shape[:2]
    sums, shown = _sums(job, sampler), _Shown(job, len(model.classes))
    if sampler is None and job.settings.needs_sampler(model, H, W):
        sampler = job.settings.sampler([model])
    logits, moments, errors = predict_photo(model, sampler, rgb, job.settings, carry, job.calibrator, job.sets)
    labels_HW, found = describe_photo(rgb, logits, moments, job.settings.maps, job.calibrator, job.sets)
    shown.add(labels_HW, moments)
    files: Files = {"labels.png": render.encode_labels_png(labels_HW, model.colours)}
    for name, map_HW in found.items():
        suffix, content = _encode(map_HW, job.format)
        files[name + suffix] = content
    for name, map_HW in [*found.items(), *((_error(name), each) for name, each in errors.items())]:
        sums[name].add(map_HW)
    files["overlay.jpg"] = _overlay(job, rgb, found[job.settings.maps[0]], len(model.classes))
    told = shown.told() | _told(job, sums, moments.n if job.settings.samples == "auto" and moments else None)
    return told | {"note": job.calibrator.unfamiliar(logits) if job.calibrator else ""}, files


def _in_blocks(
    job: Job, model: Model, sampler: Sampler | None, rgb: np.ndarray, scratch: Path
) -> tuple[dict[str, Any], Files]:
    H, W = rgb.shape[:2]
    if job.settings.samples == "auto" or job.settings.carry is not None:
        most = min(LARGE, MOST // moments_bytes(len(model.classes), 1, 1))
        raise ModelError(f"samples auto and carry: expected at most {most} pixels for {len(model.classes)} classes."
                         f" Received: {W}x{H}. Set a number of samples, and no carry.")  # fmt: skip
    errors, sums, shown = job.errors(sampler), _sums(job, sampler), _Shown(job, len(model.classes))
    stored = np.dtype("<u2" if job.format == "png16" else np.float32)
    sheets = {name: Sheet(scratch / name, H, W, stored) for name in job.settings.maps}
    labels = Sheet(scratch / "labels", H, W, np.dtype(np.uint8))
    blocks = describe_blocks(model, sampler, rgb, job.settings, job.calibrator, job.sets)
    torch.set_num_threads(available_cores())  # it waited until it was alone
    for rows, columns, labels_RW, maps_RW, moments in blocks:
        labels.put(rows, columns, labels_RW)
        shown.add(labels_RW, moments)
        for name, map_RW in maps_RW.items():
            sums[name].add(map_RW)
            sheets[name].put(rows, columns, np.rint(map_RW * 65535) if stored.kind == "u" else map_RW)
        for name in errors:
            sums[_error(name)].add(moments.standard_error_HW().numpy())
        give_back()

    torch.set_num_threads(1)
    small = render.thumbnail(rgb, OVERLAY)
    let_go(rgb)
    first = sheets[job.settings.maps[0]].shrunk(*small.shape[:2])
    files: Files = {"labels.png": labels.save_png(model.colours)}
    for name, sheet in sheets.items():
        suffix, file = sheet.save(job.format)
        files[name + suffix] = file
    files["overlay.jpg"] = _overlay(job, small, first, len(model.classes))
    whole = job.calibrator is not None and "picture" in getattr(job.calibrator, "looks", ())
    return shown.told() | _told(job, sums, None) | {"note": "calibrated block by block" if whole else ""}, files


def _sums(job: Job, sampler: Sampler | None) -> dict[str, _Sums]:
    return {name: _Sums() for name in job.settings.maps} | {
        _error(name): _Sums(ERROR_BINS) for name in job.errors(sampler)
    }


def _error(name: str) -> str:
    return f"{name}_error"


class _Sums:
    """Mean and histogram of values from 0 to 1, added up band by band."""

    def __init__(self, bins: int = BINS):
        self.total, self.pixels, self.bins, self.counts_B = 0.0, 0, bins, np.zeros(bins + 1, np.int64)

    def add(self, map_RW: np.ndarray) -> None:
        """By rows, since bincount wants eight bytes a pixel."""
        self.total += float(map_RW.sum(dtype=np.float64))
        self.pixels += map_RW.size
        kind = np.uint8 if self.bins < 255 else np.uint16
        for start in range(0, len(map_RW), 256):
            bins = (map_RW[start : start + 256].ravel() * self.bins).astype(kind)
            self.counts_B += np.bincount(bins, minlength=self.bins + 1)

    def histogram(self) -> list[int]:
        """Counts of equal bins; 1 is in the last."""
        return [*self.counts_B[: self.bins - 1].tolist(), int(self.counts_B[self.bins - 1 :].sum())]

    def quantile(self, share: float) -> float:
        """Upper end of the bin in which that share of the values is reached."""
        reached = int(np.searchsorted(np.cumsum(self.counts_B), share * self.pixels))
        return min(1.0, (reached + 1) / self.bins)


class _Shown:
    """Pixels that show each class, and how far samples disagree on them, added up band by band."""

    def __init__(self, job: Job, C: int):
        self.told_of, self.limit = job.settings.disagree, "sampling-free" in job.settings.method
        self.areas_C, self.apart_C, self.weight_C = np.zeros(C, np.int64), *torch.zeros(2, C, dtype=torch.float64)

    def add(self, labels_RW: np.ndarray, moments: Moments | None) -> None:
        """By rows, since bincount wants eight bytes a pixel."""
        for start in range(0, len(labels_RW), 256):
            self.areas_C += np.bincount(labels_RW[start : start + 256].ravel(), minlength=len(self.areas_C))
        if self.told_of and moments is not None:
            apart_C, weight_C = moments.dice_sums(self.limit)
            self.apart_C += apart_C
            self.weight_C += weight_C

    def told(self) -> dict[str, Any]:
        """What the ledger says of them."""
        shown_C = torch.from_numpy(self.areas_C > 0)
        each = {"disagreement": disagreement(self.apart_C, self.weight_C, shown_C)} if self.told_of else {}
        return {"areas": self.areas_C.tolist(), **each}


def _told(job: Job, sums: dict[str, _Sums], samples: int | None) -> dict[str, Any]:
    """What the ledger says of the maps."""
    errors = {
        name: round(each.quantile(ERROR_SHARE), 6) for name, each in sums.items() if name not in job.settings.maps
    }
    return {
        "mean": {name: sums[name].total / sums[name].pixels for name in job.settings.maps},
        **({"errors": errors} if errors else {}),
        "histogram": {name: sums[name].histogram() for name in job.settings.maps},
        **({"samples": samples} if samples is not None else {}),
    }


def _overlay(job: Job, rgb: np.ndarray, map_HW: np.ndarray, C: int) -> bytes:
    if max(rgb.shape) > render.JPEG_LONGEST - 200:  # leave room for the legend
        rgb = render.thumbnail(rgb, render.JPEG_LONGEST - 200)
        map_HW = cv2.resize(map_HW, rgb.shape[1::-1], interpolation=cv2.INTER_AREA)
    return render.encode_jpeg(draw_overlay(rgb, map_HW, job.settings.maps[0], C, job.calibrated, job.sets))


def _encode(map_HW: np.ndarray, format: str) -> tuple[str, bytes]:
    if format == "png16":
        return ".png", render.encode_map_png16(map_HW)
    buffer = io.BytesIO()
    if format == "npy":
        np.save(buffer, map_HW)
        return ".npy", buffer.getvalue()
    tiff_writer()(buffer, map_HW, compression="zstd", predictor=True)
    return ".tiff", buffer.getvalue()
