"""A folder of photos in; per image a label map, doubt maps and an overlay out, one table, one gallery."""

from __future__ import annotations

import io
import multiprocessing
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from seguncert import maps as maps_
from seguncert import render
from seguncert.image import IMAGE_SUFFIXES, MAX_PIXELS, ImageError, read_image
from seguncert.model import Model, ModelError, evaluating, load_model
from seguncert.predict import on_backend, scale_factor
from seguncert.run import Sampler, check_settings, describe_photo, draw_overlay, make_sampler, predict_photo
from seguncert.store import OURS, Store, stamp_of
from seguncert.tables import BINS, write_tables

FORMATS = ("png16", "npy", "tiff")
CRASHES = 3  # after so many, an image is tried once more in a process of its own


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


@dataclass(frozen=True)
class Exported:
    """Outcome of a batch: images done in all, of those done before, failed, not yet done; other files by suffix."""

    out: Path
    done: int
    before: int
    failed: int
    left: int
    passed_over: dict[str, int]


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: Model | str | os.PathLike[str] = "street",
    *,
    method: str = "none",
    samples: int = 20,
    seed: int = 0,
    insert_dropout: Mapping[str, float] | None = None,
    maps: Sequence[str] | None = None,
    scale: str | float = "auto",
    format: str = "png16",
    workers: int | None = None,
    device: str = "auto",
    backend: str = "torch",
    precision: str = "auto",
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int, int], None] | None = None,
) -> Exported:
    """Analyse every image under `source` and write label maps, maps, overlays, a table and a gallery to `out`.

    Failures are recorded and the rest goes on. A run that was stopped, in whatever way, goes on when it is called again
    with the same settings. KeyboardInterrupt lets the images under way end, writes table and gallery of what is done,
    and is raised again.

    Args:
        method, samples, seed, maps: as in `seguncert.analyse`; the same masks for every image.
        insert_dropout: as in `seguncert.load_model`; only for a model that is loaded here.
        backend, precision: torch gives the numbers of `seguncert.analyse`; auto takes OpenVINO where it is installed and
            agrees with them, as `seguncert.backends` tells. run.json says which it was.
        workers: images under way at once, a core each, so that the bits do not depend on how many; None is one per
            core, at most 16.
        max_pixels: larger images are not decoded; they become a failed row.
        progress: called with (done, failed, all) after each image.

    Raises:
        StoreError: `out` cannot be written, is in use, or was begun with other settings.
        ValueError: a setting is wrong, or there is no image.
    """
    source, out = Path(source), Path(out)
    maps = check_settings(method, maps, samples, seed)
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}. Received: {format!r}")
    if format == "tiff":
        _tiff_writer()
    if not source.is_dir():
        raise ValueError(
            f"IN: expected a folder of images. Received: {source}, which is {'a file' if source.exists() else 'not there'}"
        )
    if out.exists() and (not out.is_dir() or _identity(out) == _identity(source)):
        raise ValueError(
            f"OUT: expected a new folder or one of an earlier run. Received: {out}, which is {'IN' if out.is_dir() else 'a file'}"
        )
    workers = workers or min(_cores(), 16)
    if insert_dropout and method != "mc-dropout":
        raise ValueError(f"insert-dropout: expected with it the method mc-dropout. Received: {method}")
    if insert_dropout and isinstance(model, Model):
        raise ValueError("insert-dropout: expected a model's name or folder. Received: a model that is loaded already;"
                         " give insert_dropout to load_model")  # fmt: skip
    spec = None if isinstance(model, Model) else model
    model = model if isinstance(model, Model) else load_model(model, device, insert_dropout)
    scale_factor(model, 1, 1, scale)
    paths, passed_over = list_images(source, out)
    if not paths:
        raise ValueError(
            f"no images in {source}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}. Other files: {sum(passed_over.values())}"
        )
    inserted = dict(insert_dropout or {})
    job = _Job(source, maps, scale, format, max_pixels, method, samples, seed, inserted, backend, precision)
    model, sampler, engine = _engine(job, model, workers)
    store = Store(out, _settings(job, model, engine))
    stopped, threads = None, (torch.get_num_threads(), cv2.getNumThreads())
    try:
        todo = [path for path in paths if not store.done(path, stamp_of(source / path))]
        before = len(paths) - len(todo)
        suspects = {path for path in todo if store.interrupted.get(path, 0) >= CRASHES}
        count = _counter(progress, before, len(paths))
        todo.sort(key=lambda path: store.interrupted.get(path, 0))
        try:
            with sampler.ready() if sampler else evaluating(model.module):
                _work(job, model, sampler, store, [path for path in todo if path not in suspects], workers, count)
            for path in sorted(suspects):
                count(_try_alone(job, store, path, spec, device))
        except KeyboardInterrupt as error:
            stopped = error
        counts = write_tables(store, source, paths)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
        store.close()
    if stopped is not None:
        raise stopped
    return Exported(out, counts["ok"], before, counts["failed"], counts["left"], passed_over)


def list_images(source: Path, out: Path | None = None) -> tuple[list[str], dict[str, int]]:
    """Relative paths of everything under `source` with an image's suffix, sorted; how many other files there are of each suffix.

    Links are followed, each folder once; `out` and the outputs of other exports are left out. A folder that is named
    like an image, or that may not be read, is listed too: it becomes a failed row, not a silence.
    """
    paths, passed_over = list[str](), Counter[str]()
    seen = {_identity(out)} if out is not None and out.exists() else set()

    def name_as_failed(error: OSError) -> None:
        paths.append(Path(error.filename).relative_to(source).as_posix())

    for root, folders, files in os.walk(source, onerror=name_as_failed, followlinks=True):
        identity = _identity(root)
        if identity in seen or {"run.json", "ledger.jsonl"} <= set(files):  # a loop, or what an export wrote
            folders.clear()
            continue
        seen.add(identity)
        relative = Path(root).relative_to(source)
        names = files + folders
        paths += [(relative / name).as_posix() for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        passed_over.update(Path(name).suffix.lower() for name in files)
    return sorted(set(paths)), {suffix: n for suffix, n in sorted(passed_over.items()) if suffix not in IMAGE_SUFFIXES}


@dataclass(frozen=True)
class _Job:
    source: Path
    maps: tuple[str, ...]
    scale: str | float
    format: str
    max_pixels: int
    method: str
    samples: int
    seed: int
    insert_dropout: dict[str, float]
    backend: str
    precision: str


def _process(job: _Job, model: Model, sampler: Sampler | None, path: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Ledger line and files of one image; whatever is wrong with it becomes one line of text."""
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
        photo = read_image(file, max_pixels=job.max_pixels)
        H, W = photo.rgb.shape[:2]
        heavier = 1 + len(model.classes) // 3 if sampler else 1  # moments hold floats of each class
        with PIXELS.take(H * W * heavier):
            predicted = predict_photo(model, sampler, photo.rgb, job.samples, job.seed, job.scale)
            labels_HW, found = describe_photo(*predicted, H, W, job.maps)
            files = {"labels.png": render.encode_labels_png(labels_HW, model.colours)}
            for name, map_HW in found.items():
                suffix, content = _encode(map_HW, job.format)
                files[name + suffix] = content
            files["overlay.jpg"] = _overlay(photo.rgb, found[job.maps[0]], job.maps[0], len(model.classes))
            means = {name: float(map_HW.mean(dtype=np.float64)) for name, map_HW in found.items()}
            histograms = {name: _histogram(map_HW) for name, map_HW in found.items()}
    except (ImageError, ModelError) as error:
        return line | {"error": str(error)}, {}
    except Exception as error:  # whatever a net or a decoder raises: this image failed, the others go on
        return line | {"error": f"failed inside: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}, {}
    done = {
        "status": "ok", "note": photo.note, "height": H, "width": W, "mean": means, "histogram": histograms,
        "seconds": round(time.perf_counter() - started, 4),
    }  # fmt: skip
    return line | done, files


def _overlay(rgb: np.ndarray, map_HW: np.ndarray, name: str, C: int) -> bytes:
    if max(rgb.shape) > render.JPEG_LONGEST - 200:  # leave room for the legend
        rgb = render.thumbnail(rgb, render.JPEG_LONGEST - 200)
        map_HW = cv2.resize(map_HW, rgb.shape[1::-1], interpolation=cv2.INTER_AREA)
    return render.encode_jpeg(draw_overlay(rgb, map_HW, name, C))


def _histogram(map_HW: np.ndarray) -> list[int]:
    """Counts of `BINS` equal bins of [0, 1]; by rows, since bincount wants eight bytes a pixel."""
    counts = np.zeros(BINS + 1, np.int64)
    for start in range(0, len(map_HW), 256):
        counts += np.bincount((map_HW[start : start + 256].ravel() * BINS).astype(np.uint8), minlength=BINS + 1)
    return [*counts[: BINS - 1].tolist(), int(counts[BINS - 1 :].sum())]


def _encode(map_HW: np.ndarray, format: str) -> tuple[str, bytes]:
    if format == "png16":
        return ".png", render.encode_map_png16(map_HW)
    buffer = io.BytesIO()
    if format == "npy":
        np.save(buffer, map_HW)
        return ".npy", buffer.getvalue()
    _tiff_writer()(buffer, map_HW, compression="zstd", predictor=True)
    return ".tiff", buffer.getvalue()


def _tiff_writer() -> Callable[..., None]:
    try:
        import imagecodecs  # noqa: F401
        import tifffile
    except ImportError:
        raise ValueError("format tiff needs two more packages: pip install 'seguncert[tiff]'") from None
    return tifffile.imwrite


def _work(
    job: _Job,
    model: Model,
    sampler: Sampler | None,
    store: Store,
    paths: list[str],
    workers: int,
    count: Callable[[str], None],
) -> None:
    """Threads that each take an image from file to files; numpy, OpenCV and torch leave the interpreter lock alone."""

    def attempt(path: str) -> str:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        folder = store.begin(path)
        line, files = _process(job, model, sampler, path)
        store.finish(folder, line, files)
        return line["status"]

    queue, under_way = iter(paths), set[Future[str]]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for path in queue:
                under_way.add(pool.submit(attempt, path))
                if len(under_way) >= 2 * workers:
                    under_way = _drain(under_way, count)
            while under_way:
                under_way = _drain(under_way, count)
        except KeyboardInterrupt:
            for future in under_way:
                future.cancel()
            wait(under_way)
            raise


def _drain(under_way: set[Future[str]], count: Callable[[str], None]) -> set[Future[str]]:
    ended, under_way = wait(under_way, return_when=FIRST_COMPLETED)
    for future in ended:
        count(future.result())
    return under_way


def _try_alone(job: _Job, store: Store, path: str, spec: str | os.PathLike[str] | None, device: str) -> str:
    """One more attempt on an image on which the process died again and again, where a death harms nobody else."""
    folder = store.begin(path)
    line: dict[str, Any] = {"path": path, "status": "failed", "input": stamp_of(job.source / path)}
    deaths, files = store.interrupted[path], dict[str, bytes]()
    try:
        if spec is None:
            raise BrokenProcessPool  # a wrapped net cannot be sent to another process
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            line, files = pool.submit(_process_alone, job, spec, device, path).result()
    except BrokenProcessPool:
        deaths += spec is not None
        line["error"] = f"the process died {deaths} times on this image; it may need more memory than there is"
    except Exception as error:
        line["error"] = f"failed in a process of its own: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    store.finish(folder, line, files)
    return line["status"]


def _process_alone(
    job: _Job, spec: str | os.PathLike[str], device: str, path: str
) -> tuple[dict[str, Any], dict[str, bytes]]:
    torch.set_num_threads(1)
    model, sampler, _ = _engine(job, load_model(spec, device, job.insert_dropout), 1)
    return _process(job, model, sampler, path)


def _engine(job: _Job, model: Model, workers: int) -> tuple[Model, Sampler | None, dict[str, Any]]:
    """The model on its backend, or its sampler on it; and what run.json says of them."""
    sampler = make_sampler(model, job.method, job.backend, job.precision, workers)
    if sampler is None:
        model, about = on_backend(model, job.backend, job.precision, workers)
        return model, None, {"backend": about}
    return (
        model,
        sampler,
        {"samples": job.samples, "seed": job.seed, "inserted_dropout": job.insert_dropout, **sampler.how},
    )


def _settings(job: _Job, model: Model, engine: dict[str, Any]) -> dict[str, Any]:
    """What decides the output: the content of run.json."""
    C = len(model.classes)
    return {
        "seguncert": version("seguncert"),
        "input": str(job.source.resolve()),
        "model": {
            "name": model.name, "sha256": model.sha256, "classes": list(model.classes), "colours": model.colours.tolist(),
            "mean": list(model.mean), "std": list(model.std), "frame": model.frame and list(model.frame),
        },
        "method": job.method,
        **engine,
        "calibration": "none",
        "scale": str(job.scale),
        "format": job.format,
        "maps": {
            name: {
                "title": info.title, "unit": info.unit, "full_scale": info.full_scale(C), "sure_is": info.sure_is, "about": info.about, "drawn_to": info.drawn_to,
                "stored": "round(65535 × map)" if job.format == "png16" else "float32", "range": [0.0, 1.0],
            }
            for name in job.maps
            for info in [maps_.MAPS[name]]
        },
        "device": str(model.device),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy", "opencv-python", "segmentation-models-pytorch")},
    }  # fmt: skip


def _counter(progress: Callable[[int, int, int], None] | None, before: int, total: int) -> Callable[[str], None]:
    counts = {"ok": before, "failed": 0}

    def count(status: str) -> None:
        counts[status] += 1
        if progress is not None:
            progress(counts["ok"], counts["failed"], total)

    if progress is not None:
        progress(before, 0, total)
    return count


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
