"""A labelled folder in, how good a model is out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from seguncert.image import IMAGE_SUFFIXES, read_image
from seguncert.model import Model
from seguncert.predict import predict_logits, rows_at_size

IGNORED = 255  # what the ignore index becomes inside; C is at most 255 here


@dataclass
class Counts:
    """Sums over pixels, from which quality follows; parts merge to the whole.

    `confusion_CC[i, j]` counts pixels of true class i shown as class j; `nll` is the sum of −ln p(true class) in nats.
    """

    confusion_CC: Int64[np.ndarray, "C C"]
    nll: float = 0.0

    @classmethod
    def empty(cls, C: int) -> Counts:
        """Counts of nothing, for C classes."""
        return cls(np.zeros((C, C), np.int64))

    def update(self, logits_CRW: Float[Tensor, "C R W"], labels_RW: UInt8[np.ndarray, "R W"]) -> None:
        """Add pixels; those labelled `IGNORED` do not count."""
        C = len(self.confusion_CC)
        valid_RW = torch.from_numpy(labels_RW != IGNORED)
        true_N = torch.from_numpy(labels_RW)[valid_RW].long()
        logits_CN = logits_CRW[:, valid_RW]
        log_true_N = logits_CN.log_softmax(0).gather(0, true_N[None])
        self.nll -= float(log_true_N.sum(dtype=torch.float64))
        pairs_N = C * true_N + logits_CN.argmax(0)
        self.confusion_CC += torch.bincount(pairs_N, minlength=C * C).view(C, C).numpy()

    def merge(self, other: Counts) -> None:
        """Add what another has counted."""
        self.confusion_CC += other.confusion_CC
        self.nll += other.nll

    def compute(self) -> dict[str, float]:
        """`miou` over the classes that occur or are shown, pixel `accuracy`, mean `nll` in nats, number of `pixels`.

        >>> counts = Counts(np.array([[6, 2], [1, 1]]), nll=5.0)
        >>> {name: round(value, 4) for name, value in counts.compute().items()}
        {'miou': 0.4583, 'accuracy': 0.7, 'nll': 0.5, 'pixels': 10}
        """
        pixels = int(self.confusion_CC.sum())
        if pixels == 0:
            raise ValueError(
                "quality: expected at least one labelled pixel. Received: none; are all labels the ignore index?"
            )
        return {
            "miou": float(np.nanmean(self.iou_C())),
            "accuracy": float(self.confusion_CC.trace() / pixels),
            "nll": self.nll / pixels,
            "pixels": pixels,
        }

    def iou_C(self) -> Float[np.ndarray, " C"]:
        """Intersection over union of each class; NaN for one that neither occurs nor is shown."""
        hits_C = self.confusion_CC.diagonal().astype(np.float64)
        union_C = self.confusion_CC.sum(0) + self.confusion_CC.sum(1) - hits_C
        return np.divide(hits_C, union_C, out=np.full_like(hits_C, np.nan), where=union_C > 0)


def find_pairs(images: str | os.PathLike[str], labels: str | os.PathLike[str]) -> list[tuple[Path, Path]]:
    """Each image with the label PNG of the same relative path without suffix; a missing label is an error."""
    images, labels = Path(images), Path(labels)
    by_stem = {path.relative_to(labels).with_suffix(""): path for path in labels.rglob("*.png")}
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"images: expected a folder with images. Received: {images}, which has none")
    missing = [path for path in found if path.relative_to(images).with_suffix("") not in by_stem]
    if missing:
        raise ValueError(
            f"labels: {len(missing)} of {len(found)} images have no PNG of the same name in {labels}, the first is {missing[0]}"
        )
    return [(path, by_stem[path.relative_to(images).with_suffix("")]) for path in found]


def read_label(path: str | os.PathLike[str], C: int, ignore_index: int | None) -> UInt8[np.ndarray, "H W"]:
    """Class indices, `IGNORED` where the file has the ignore index; any other value outside [0, C) is an error."""
    label_HW = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if label_HW is None or label_HW.ndim != 2 or label_HW.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path}: expected an 8- or 16-bit one-channel PNG of class indices")
    ignored_HW = np.zeros(label_HW.shape, bool) if ignore_index is None else label_HW == ignore_index
    wrong = label_HW[(label_HW >= C) & ~ignored_HW]
    if wrong.size:
        raise ValueError(
            f"{path}: {wrong.size} pixels have label {wrong[0]}. Expected: 0 to {C - 1}, or the ignore index"
            f" {'(none is set)' if ignore_index is None else ignore_index}. Set --ignore-index, or correct the label."
        )
    return np.where(ignored_HW, IGNORED, label_HW).astype(np.uint8)


def measure(
    model: Model, pairs: Iterable[tuple[Path, Path]], ignore_index: int | None, scale: str | float = "auto"
) -> dict[Path, Counts]:
    """Counts of each image of one deterministic pass, at the size of the image."""
    counts = {}
    with torch.inference_mode():
        for image, label in pairs:
            labels_HW = read_label(label, len(model.classes), ignore_index)
            rgb = read_image(image).rgb
            if labels_HW.shape != rgb.shape[:2]:
                raise ValueError(
                    f"{label}: expected the size of its image, {rgb.shape[:2]}. Received: {labels_HW.shape}"
                )
            counts[image] = Counts.empty(len(model.classes))
            for rows, logits_CRW in rows_at_size(predict_logits(model, rgb, scale), *labels_HW.shape):
                counts[image].update(logits_CRW, labels_HW[rows])
    return counts


def total(counts: Iterable[Counts], C: int) -> Counts:
    """The merged counts of many images."""
    merged = Counts.empty(C)
    for part in counts:
        merged.merge(part)
    return merged
