"""A folder of photos in; per image a label map, doubt maps and an overlay out, one table, one gallery."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
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
from seguncert.predict import predict_logits, scale_factor
from seguncert.report import render_report
from seguncert.run import DEFAULT_MAPS, describe_photo, draw_overlay
from seguncert.store import Store, write_file

FORMATS = ("png16", "npy", "tiff")
BINS = 64  # of the histograms in the report
GALLERY = 200  # thumbnails inside report.html; the rest is loaded from beside it
CRASHES = 3  # after so many, an image is tried once more in a process of its own


@dataclass(frozen=True)
class Exported:
    """Outcome of a batch: images done in all, of those done before, failed, not yet done, and the files passed over."""

    out: Path
    done: int
    before: int
    failed: int
    left: int
    passed_over: int


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: Model | str | os.PathLike[str] = "street",
    *,
    maps: Sequence[str] = DEFAULT_MAPS,
    scale: str | float = "auto",
    format: str = "png16",
    workers: int | None = None,
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int, int], None] | None = None,
) -> Exported:
    """Analyse every image under `source` and write label maps, maps, overlays, a table and a gallery to `out`.

    Failures are recorded and the rest goes on. A run that was stopped, in whatever way, goes on when it is called again
    with the same settings. KeyboardInterrupt lets the images under way end, writes table and gallery of what is done,
    and is raised again.

    Args:
        workers: images under way at once, a core each, so that the bits do not depend on how many; None is one per
            core, at most 16.
        max_pixels: larger images are not decoded; they become a failed row.
        progress: called with (done, failed, all) after each image.

    Raises:
        StoreError: `out` cannot be written, is in use, or was begun with other settings.
        ValueError: a setting is wrong, or there is no image.
    """
    source, out = Path(source), Path(out)
    maps_.check_names(maps)
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}. Received: {format!r}")
    if format == "tiff":
        _tiff_writer()
    if not source.is_dir():
        raise ValueError(
            f"IN: expected a folder of images. Received: {source}, which is {'a file' if source.exists() else 'not there'}"
        )
    workers = workers or min(_cores(), 16)
    spec = None if isinstance(model, Model) else model
    model = model if isinstance(model, Model) else load_model(model, device)
    scale_factor(model, 1, 1, scale)
    paths, passed_over = list_images(source, out)
    if not paths:
        raise ValueError(
            f"no images in {source}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}. Other files: {passed_over}"
        )
    store = Store(out, _settings(source, model, maps, scale, format))
    job = _Job(source, tuple(maps), scale, format, max_pixels)
    stopped: BaseException | None = None
    try:
        todo = [path for path in paths if not store.done(path, _stamp(source / path))]
        before = len(paths) - len(todo)
        suspects = [path for path in todo if store.interrupted.get(path, 0) >= CRASHES]
        todo.sort(key=lambda path: store.interrupted.get(path, 0))
        try:
            with evaluating(model.module):
                regular = [path for path in todo if path not in suspects]
                _work(job, model, store, regular, workers, _counter(progress, before, len(paths)))
            for path in suspects:
                _try_alone(job, store, path, spec, device)
        except KeyboardInterrupt as error:
            stopped = error
        counts = _write_tables(store, paths)
    finally:
        store.close()
    if stopped is not None:
        raise stopped
    return Exported(out, counts["ok"], before, counts["failed"], counts["left"], passed_over)


def list_images(source: Path, out: Path | None = None) -> tuple[list[str], int]:
    """Relative paths of everything under `source` with an image's suffix, sorted; how many other files there are.

    Links are followed, each folder once; `out` is left out. A folder that is named like an image is listed too: it
    becomes a failed row, not a silence.
    """
    paths, passed_over = [], 0
    seen = {_identity(out)} if out is not None and out.exists() else set()
    for root, folders, files in os.walk(source, followlinks=True):
        identity = _identity(root)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        relative = Path(root).relative_to(source)
        paths += [
            (relative / name).as_posix() for name in files + folders if Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
        passed_over += sum(Path(name).suffix.lower() not in IMAGE_SUFFIXES for name in files)
    return sorted(paths), passed_over


@dataclass(frozen=True)
class _Job:
    source: Path
    maps: tuple[str, ...]
    scale: str | float
    format: str
    max_pixels: int


def _process(job: _Job, model: Model, path: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Ledger line and files of one image; whatever is wrong with it becomes one line of text."""
    started = time.perf_counter()
    line: dict[str, Any] = {"path": path, "status": "failed", "error": "", "input": _stamp(job.source / path)}
    try:
        photo = read_image(job.source / path, max_pixels=job.max_pixels)
        H, W = photo.rgb.shape[:2]
        labels_HW, found = describe_photo(predict_logits(model, photo.rgb, job.scale), H, W, job.maps)
        files = {"labels.png": render.encode_labels_png(labels_HW, model.colours)}
        for name, map_HW in found.items():
            suffix, content = _encode(map_HW, job.format)
            files[name + suffix] = content
        overlay = draw_overlay(photo.rgb, found[job.maps[0]], job.maps[0], len(model.classes))
        files["overlay.jpg"] = render.encode_jpeg(render.thumbnail(overlay, render.JPEG_LONGEST))
    except (ImageError, ModelError) as error:
        return line | {"error": str(error)}, {}
    except OSError as error:
        return line | {"error": f"cannot be read: {error.strerror or error}"}, {}
    except (MemoryError, RuntimeError, cv2.error) as error:
        return line | {"error": f"failed inside: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}, {}
    bins = {
        name: np.bincount((map_HW.ravel() * BINS).astype(np.uint8), minlength=BINS + 1)
        for name, map_HW in found.items()
    }
    done = {
        "status": "ok", "note": photo.note, "height": H, "width": W,
        "mean": {name: float(map_HW.mean(dtype=np.float64)) for name, map_HW in found.items()},
        "histogram": {name: [*counts[: BINS - 1].tolist(), int(counts[BINS - 1 :].sum())] for name, counts in bins.items()},
        "seconds": round(time.perf_counter() - started, 4),
    }  # fmt: skip
    return line | done, files


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


def _work(job: _Job, model: Model, store: Store, paths: list[str], workers: int, count: Callable[[str], None]) -> None:
    """Threads that each take an image from file to files; numpy, OpenCV and torch leave the interpreter lock alone."""

    def attempt(path: str) -> str:
        torch.set_num_threads(1)  # holds for the calling thread only
        folder = store.begin(path)
        line, files = _process(job, model, path)
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


def _try_alone(job: _Job, store: Store, path: str, spec: str | os.PathLike[str] | None, device: str) -> None:
    """One more attempt on an image on which the process died again and again, where a death harms nobody else."""
    folder = store.begin(path)
    failed = {"path": path, "status": "failed", "input": _stamp(job.source / path), "error":
              f"the process died {store.interrupted[path] + 1} times on this image; it may need more memory than there is"}  # fmt: skip
    if spec is None:
        store.finish(folder, failed, {})
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            line, files = pool.submit(_process_alone, job, spec, device, path).result()
        except BrokenProcessPool:
            line, files = failed, {}
    store.finish(folder, line, files)


def _process_alone(
    job: _Job, spec: str | os.PathLike[str], device: str, path: str
) -> tuple[dict[str, Any], dict[str, bytes]]:
    torch.set_num_threads(1)
    return _process(job, load_model(spec, device), path)


def _write_tables(store: Store, paths: list[str]) -> dict[str, int]:
    """images.csv and report.html of what the ledger says of `paths`."""
    wanted = set(paths)
    rows: dict[str, dict[str, Any]] = {}
    settings = store.settings
    histograms = {name: np.zeros(BINS, np.int64) for name in settings["maps"]}
    for line in store.latest():
        if line["path"] not in wanted or line["status"] == "interrupted":
            continue
        for name, counts in line.pop("histogram", {}).items():
            histograms[name] += counts
        rows[line["path"]] = _row(line, list(settings["maps"]))
    ordered = [rows[path] for path in paths if path in rows]
    first, info = next(iter(settings["maps"].items()))
    sign = 1 if info["sure_is"] == "high" else -1
    gallery = sorted(
        (row for row in ordered if row["status"] == "ok"), key=lambda row: (sign * row[f"{first}_mean"], row["path"])
    )[:GALLERY]
    thumbnails = {row["path"]: _thumbnail(store.out / row["path"] / "overlay.jpg") for row in gallery}
    table = io.StringIO(newline="")
    columns = [
        "path",
        "status",
        "error",
        "height",
        "width",
        "seconds",
        *(f"{name}_mean" for name in settings["maps"]),
        "note",
    ]
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(ordered)
    write_file(store.out / "images.csv", table.getvalue())
    for row in ordered:
        del row["seconds"]  # the report is the same however long it took
    histogram_lists = {name: counts.tolist() for name, counts in histograms.items()}
    write_file(store.out / "report.html", render_report(settings, ordered, histogram_lists, thumbnails))
    ok = sum(row["status"] == "ok" for row in ordered)
    return {"ok": ok, "failed": len(ordered) - ok, "left": len(paths) - len(ordered)}


def _row(line: dict[str, Any], names: list[str]) -> dict[str, Any]:
    keys = ("path", "status", "error", "height", "width", "seconds")
    means = {f"{name}_mean": round(line["mean"][name], 6) if "mean" in line else None for name in names}
    return {key: line.get(key) for key in keys} | means | {"note": line.get("note", "")}


def _thumbnail(file: Path) -> bytes:
    overlay = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert overlay is not None, "the ledger says that this file is whole"
    return render.encode_jpeg(render.thumbnail(overlay, 320), 80)


def _settings(source: Path, model: Model, maps: Sequence[str], scale: str | float, format: str) -> dict[str, Any]:
    """What decides the output: the content of run.json."""
    C = len(model.classes)
    return {
        "seguncert": version("seguncert"),
        "input": str(source.resolve()),
        "model": {
            "name": model.name, "sha256": model.sha256, "classes": list(model.classes), "colours": model.colours.tolist(),
            "mean": list(model.mean), "std": list(model.std), "frame": model.frame and list(model.frame),
        },
        "method": "none",
        "calibration": "none",
        "scale": str(scale),
        "format": format,
        "maps": {
            name: {
                "title": info.title, "unit": info.unit, "full_scale": info.full_scale(C), "sure_is": info.sure_is, "about": info.about,
                "stored": "round(65535 × map)" if format == "png16" else "float32", "range": [0.0, 1.0],
            }
            for name in maps
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


def _stamp(path: Path) -> list[int]:
    """Size and time of change of an input: when they move, it is done again."""
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]
    except OSError:
        return [-1, -1]


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
