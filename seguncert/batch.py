"""A folder of photos in; per image a label map, doubt maps and an overlay out, one table, one gallery."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import torch

from seguncert.calibration import Calibration, find_calibration
from seguncert.embedding import Embedder
from seguncert.image import IMAGE_SUFFIXES, MAX_PIXELS
from seguncert.job import FORMATS, Files, Job, available_cores, look_back, process, readable
from seguncert.maps import OF_SETS
from seguncert.model import Model, evaluating, load_model
from seguncert.predict import one_thread, scale_factor
from seguncert.run import Settings, chosen_maps, chosen_views
from seguncert.sets import FittedSets, find_sets
from seguncert.sheets import tiff_writer
from seguncert.store import Store, stamp_of
from seguncert.tables import write_tables
from seguncert.tiles import Sampler
from seguncert.video import Carry, frame_of

Spec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]  # names or folders of models
CRASHES = 3  # after so many, an image is tried once more in a process of its own


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
    model: Model | Sequence[Model] | Spec = "street",
    *,
    method: str = "none",
    samples: int | Literal["auto"] = 20,
    seed: int = 0,
    views: Sequence[str] | None = None,
    max_error: float = 0.01,
    carry: float | None = None,
    drop_path: bool = False,
    insert_dropout: Mapping[str, float] | None = None,
    maps: Sequence[str] | None = None,
    calibration: str | os.PathLike[str] | Calibration | None = "auto",
    conformal: str | os.PathLike[str] | FittedSets | None = "auto",
    scale: str | float = "auto",
    tile: int | Literal["auto"] = "auto",
    format: str = "png16",
    workers: int | None = None,
    device: str = "auto",
    backend: str = "torch",
    precision: str = "auto",
    embeddings: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int, int], None] | None = None,
) -> Exported:
    """Analyse every image under `source` and write label maps, maps, overlays, a table and a gallery to `out`.

    Failures are recorded and the rest goes on. A run that was stopped, in whatever way, goes on when it is called again
    with the same settings. KeyboardInterrupt lets the images under way end, writes table and gallery of what is done,
    and is raised again.

    Args:
        model: name or folder, or a loaded model; for the method ensemble several of them.
        method, samples, seed, views, max_error, drop_path, maps, calibration, conformal, scale, tile: as in `seguncert.analyse`; the
            same masks for every image. Sets are of no use without the map set_size.
        carry: for frames of video, how much the frame before counts, between 0 and 1; see `seguncert.video`. Frames of a
            folder whose names differ only in their last number are a video, in the order of that number.
        insert_dropout: as in `seguncert.load_model`; only for a model that is loaded here.
        backend, precision: torch gives the numbers of `seguncert.analyse`; auto takes OpenVINO where it is installed and
            agrees with them, as `seguncert.backends` tells. run.json says which it was.
        embeddings: whether to take pooled deep features of the same passes, 64 numbers an image at most, into the ledger
            and, a row for each of images.csv, into embeddings.npy; see `seguncert.embedding`. The net then runs on torch.
        workers: images under way at once, a core each, so that the bits do not depend on how many; None is one per
            core, at most 16.
        max_pixels: larger images are not decoded; they become a failed row.
        progress: called with (done, failed, all) after each image.

    Raises:
        StoreError: `out` cannot be written, is in use, or was begun with other settings.
        ValueError: a setting is wrong, or there is no image.
    """
    source, out = Path(source), Path(out)
    settings = Settings(
        method, samples, seed, chosen_views(views), max_error, carry, drop_path, scale, tile,
        () if maps is None else chosen_maps(maps), conformal not in (None, "none"),
    )  # fmt: skip
    if conformal not in (None, "none", "auto") and OF_SETS not in settings.maps:
        raise ValueError(f"conformal: expected with it the map {OF_SETS}. Received: maps {', '.join(settings.maps)}")
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}. Received: {format!r}")
    if embeddings and backend == "openvino":
        raise ValueError("embeddings: expected with them the backend torch or auto, since OpenVINO does not show a net's inner"
                         " features. Received: openvino. Set another backend, or leave embeddings out.")  # fmt: skip
    backend = "torch" if embeddings and backend == "auto" else backend
    if format == "tiff":
        tiff_writer()
    if not source.is_dir():
        raise ValueError(
            f"IN: expected a folder of images. Received: {source}, which is {'a file' if source.exists() else 'not there'}"
        )
    if out.exists() and (not out.is_dir() or _identity(out) == _identity(source)):
        raise ValueError(
            f"OUT: expected a new folder or one of an earlier run. Received: {out}, which is {'IN' if out.is_dir() else 'a file'}"
        )
    workers = workers or min(available_cores(), 16)
    models, spec = load_models(model, device, insert_dropout or {}, method)
    scale_factor(models[0], 1, 1, scale)
    paths, passed_over = list_images(source, out)
    if not paths:
        raise ValueError(
            f"no images in {source}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}. Other files: {sum(passed_over.values())}"
        )
    fitted = find_calibration(calibration, models[0].folder, *settings.fitted_for(models))
    asked = OF_SETS in settings.maps
    of_model = find_sets(
        conformal, models[0].folder, *settings.fitted_for(models), fitted, asked=asked, overridden=calibration != "auto"
    )
    sets = of_model.sets if of_model and asked else None
    job = Job(
        source, settings, format, max_pixels, dict(insert_dropout or {}), backend, precision, fitted, sets, embeddings,
        settings.note(models),
    )  # fmt: skip
    net, sampler, engine = job.engine(models, workers)
    embedder = job.embedder(models, sampler)
    engine |= {"embedding": embedder.how} if embedder else {}
    store = Store(out, job.run_json(models, sampler, engine))
    stopped, threads = None, (torch.get_num_threads(), cv2.getNumThreads())
    try:
        todo = [path for path in paths if not store.done(path, stamp_of(source / path))]
        before = len(paths) - len(todo)
        suspects = {path for path in todo if store.interrupted.get(path, 0) >= CRASHES}
        count = _counter(progress, before, len(paths))
        todo.sort(key=lambda path: store.interrupted.get(path, 0))
        try:
            with sampler.ready() if sampler else evaluating(net.module), _listening(embedder):
                work = _Work(job, net, sampler, embedder, store, count)
                if carry is None:
                    work.all((partial(work.photo, path) for path in todo if path not in suspects), workers)
                else:
                    every = (partial(work.video, frames, set(todo), suspects) for frames in sequences(paths))
                    work.all(every, workers)
            for path in sorted(suspects):  # what comes before a frame is not known to another process
                count(_try_alone(job, store, path, spec if carry is None and spec else None, device))
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


def load_models(
    model: Model | Sequence[Model] | Spec, device: str, insert_dropout: Mapping[str, float], method: str
) -> tuple[list[Model], list[str | os.PathLike[str]]]:
    """The models that are meant, and the names or folders of those that were loaded here; ValueError where they do not go together."""
    if insert_dropout and not {"mc-dropout", "sampling-free"} & set(method.split("+")):
        raise ValueError(f"insert-dropout: expected with it the method mc-dropout or sampling-free. Received: {method}")
    if not isinstance(model, (Model, str, os.PathLike)) and not model:
        raise ValueError("model: expected at least one. Received: none")
    given = [model] if isinstance(model, (Model, str, os.PathLike)) else list(model)
    loaded = [each for each in given if isinstance(each, Model)]
    spec = [each for each in given if not isinstance(each, Model)]
    if loaded and spec:
        raise ValueError("model: expected names and folders, or loaded models. Received: some of both")
    if insert_dropout and loaded:
        raise ValueError("insert-dropout: expected a model's name or folder. Received: a model that is loaded already;"
                         " give insert_dropout to load_model")  # fmt: skip
    return loaded or _load(spec, device, insert_dropout), spec


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


def sequences(paths: list[str]) -> list[list[str]]:
    """Frames of one folder whose names differ only in their last number are a sequence, in the order of that number.

    >>> sequences(["a/9.png", "a/10.png", "b/x.png", "a/run 2 - 1.png"])
    [['a/9.png', 'a/10.png'], ['a/run 2 - 1.png'], ['b/x.png']]
    """
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for path in paths:
        name, number = frame_of(path)
        found.setdefault((name, Path(path).suffix), []).append((number or 0, path))
    return [[path for _, path in sorted(frames)] for _, frames in sorted(found.items())]


@dataclass(frozen=True)
class _Work:
    """What the threads share. `photos` have nothing to do with each other; of a video the frames are taken in order."""

    job: Job
    model: Model
    sampler: Sampler | None
    embedder: Embedder | None
    store: Store
    count: Callable[[str], None]
    stop: threading.Event = field(default_factory=threading.Event)

    def photo(self, path: str, carry: Carry | None = None, past: str = "") -> bool:
        """Take an image from file to files; whether that went well."""
        folder = self.store.begin(path)
        line, files = process(self.job, self.model, self.sampler, path, folder, carry, self.embedder)
        self.store.finish(folder, line | {"past": past} if carry else line, files)
        self.count(line["status"])
        return line["status"] == "ok"

    def refuse(self, path: str, error: str) -> bool:
        """Record that an image failed before anything was done with it."""
        stamp = stamp_of(self.job.source / path)
        self.store.finish(
            self.store.begin(path), {"path": path, "status": "failed", "error": error, "input": stamp}, {}
        )
        self.count("failed")
        return False

    def video(self, frames: list[str], todo: set[str], suspects: set[str]) -> None:
        """The frames of a video that are not done, or that were done with another past.

        `past` names what a frame has behind it. Frames that are done are predicted again, for the sake of those after
        them, but not before one of these can be read.
        """
        carry, past, unseen = Carry(self.job.settings.carry or 0), "", list[str]()
        for path in frames:
            if self.stop.is_set():
                return
            if path in suspects:
                continue
            good = path not in todo and self.store.lines[path].get("past") == past
            if good:
                unseen.append(path)
            else:
                error = ""
                if unseen and readable(self.job, path):
                    while unseen and not error:
                        error = look_back(self.job, self.model, self.sampler, unseen[0], carry)
                        del unseen[: not error]
                if path not in todo:
                    self.count("again")
                good = self.refuse(path, error) if error else self.photo(path, carry, past)
            if good:
                named = f"{past} {path} {stamp_of(self.job.source / path)}"
                past = hashlib.blake2b(os.fsencode(named), digest_size=12).hexdigest()

    def all(self, tasks: Iterable[Callable[[], object]], workers: int) -> None:
        """Threads that each take a task after another; numpy, OpenCV and torch leave the interpreter lock alone."""

        def run(task: Callable[[], object]) -> None:
            one_thread()
            cv2.setNumThreads(1)
            if not self.stop.is_set():
                task()

        under_way = set[Future[None]]()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for task in tasks:
                    under_way.add(pool.submit(run, task))
                    if len(under_way) >= 2 * workers:
                        under_way = _drain(under_way)
                while under_way:
                    under_way = _drain(under_way)
            except BaseException:
                self.stop.set()
                for future in under_way:
                    future.cancel()
                wait(under_way)
                raise


def _drain(under_way: set[Future[None]]) -> set[Future[None]]:
    ended, under_way = wait(under_way, return_when=FIRST_COMPLETED)
    for future in ended:
        future.result()
    return under_way


def _try_alone(job: Job, store: Store, path: str, spec: Spec | None, device: str) -> str:
    """One more attempt on an image on which the process died again and again, where a death harms nobody else."""
    folder = store.begin(path)
    line: dict[str, Any] = {"path": path, "status": "failed", "input": stamp_of(job.source / path)}
    deaths, files = store.interrupted[path], Files()
    try:
        if spec is None:
            raise BrokenProcessPool  # a wrapped net cannot be sent to another process
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            line, files = pool.submit(_process_alone, job, spec, device, path, folder).result()
    except BrokenProcessPool:
        deaths += spec is not None
        line["error"] = f"the process died {deaths} times on this image; it may need more memory than there is"
    except Exception as error:
        line["error"] = f"failed in a process of its own: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    store.finish(folder, line, files)
    return line["status"]


def _process_alone(job: Job, spec: Spec, device: str, path: str, folder: Path) -> tuple[dict[str, Any], Files]:
    one_thread()
    models = _load(spec, device, job.insert_dropout)
    model, sampler, _ = job.engine(models, 1)
    embedder = job.embedder(models, sampler)
    with _listening(embedder):
        return process(job, model, sampler, path, folder, embedder=embedder)


def _listening(embedder: Embedder | None) -> AbstractContextManager[None]:
    return embedder.listening() if embedder else nullcontext()


def _load(spec: Spec, device: str, insert_dropout: Mapping[str, float]) -> list[Model]:
    each = [spec] if isinstance(spec, (str, os.PathLike)) else spec
    return [load_model(one, device, insert_dropout) for one in each]


def _counter(progress: Callable[[int, int, int], None] | None, before: int, total: int) -> Callable[[str], None]:
    counts, lock = {"ok": before, "failed": 0}, threading.Lock()

    def count(status: str) -> None:
        with lock:
            if status == "again":  # it was done, and is to be done with another past
                counts["ok"] -= 1
                return
            counts[status] += 1
            if progress is not None:
                progress(counts["ok"], counts["failed"], total)

    if progress is not None:
        progress(before, 0, total)
    return count


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
