"""Labelled images, each read and predicted once, on threads; what is wrong with one becomes a line, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from seguncert.evaluation import in_order
from seguncert.image import MAX_BYTES, read_image
from seguncert.job import PIXELS, Job
from seguncert.labels import read_labels
from seguncert.model import Model, evaluating
from seguncert.run import predict_photo
from seguncert.tiles import Sampler

T = TypeVar("T")
Use = Callable[
    [Float[Tensor, "C h w"], UInt8[np.ndarray, "H W 3"], list[UInt8[np.ndarray, "H W"]]], T
]  # of logits, the photo, and labels of one or more raters


@dataclass(frozen=True)
class Ready:
    """A model, or a sampler of it, that is set up for many photos in a row."""

    model: Model
    sampler: Sampler | None

    @classmethod
    def until(cls, stack: ExitStack, job: Job, models: Sequence[Model], workers: int) -> Ready:
        """Set up until `stack` is closed."""
        model, sampler, _ = job.engine(models, workers)
        stack.enter_context(sampler.ready() if sampler else evaluating(model.module))
        return cls(model, sampler)


@dataclass(frozen=True)
class Failed:
    """What was wrong with an image, in one line."""

    name: str
    error: str


def check_file(out: Path) -> None:
    """Raise ValueError unless a JSON file can be written there: before the walk rather than after it."""
    if out.is_dir() or not out.parent.is_dir() or out.suffix != ".json":
        raise ValueError(f"OUT: expected a file ending in .json in a folder that is there. Received: {out}")


def walk(
    tasks: Iterable[Callable[[], T | Failed]],
    total: int,
    workers: int,
    take: Callable[[T], None],
    progress: Callable[[int, int, int], None] | None,
) -> dict[str, str]:
    """Hand what `visit` gives to `take`, in order, so that nothing depends on `workers`; what failed, by name."""
    done, failed, threads = 0, dict[str, str](), (torch.get_num_threads(), cv2.getNumThreads())
    try:
        with closing(in_order(tasks, workers)) as results:
            for each in results:
                if isinstance(each, Failed):
                    failed[each.name] = each.error
                else:
                    take(each)
                    done += 1
                if progress is not None:
                    progress(done, len(failed), total)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    return failed


def visit(
    job: Job, net: Ready, image: Path, labels: Sequence[Path], name: str, ignore_index: int | None, use: Use[T]
) -> T | Failed:
    """What `use` makes of the logits, the photo and the labels of one image, void pixels being `seguncert.labels.IGNORED`."""
    try:
        return _visit(job, net, image, labels, ignore_index, use)
    except (ValueError, OSError) as error:
        return Failed(name, " ".join(str(error).split())[:500])
    except Exception as error:  # whatever a net or a decoder raises: this image failed, the others go on
        return Failed(name, f"failed inside: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _visit(job: Job, net: Ready, image: Path, labels: Sequence[Path], ignore_index: int | None, use: Use[T]) -> T:
    C, settings = len(net.model.classes), job.settings
    photo = read_image(image, max_pixels=job.max_pixels, max_bytes=max(MAX_BYTES, 8 * job.max_pixels))
    H, W = photo.rgb.shape[:2]
    every = list(read_labels(labels, C, ignore_index, H, W))
    with PIXELS.take(H * W * (1 + C // 3)):
        sampler = net.sampler
        if sampler is None and settings.needs_sampler(net.model, H, W):
            sampler = settings.sampler([net.model])
        return use(predict_photo(net.model, sampler, photo.rgb, settings)[0], photo.rgb, every)
