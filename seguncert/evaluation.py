"""A labelled folder in, how good a model is out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import UInt8

from seguncert.image import IMAGE_SUFFIXES, read_image
from seguncert.model import Model
from seguncert.predict import rows_at_size
from seguncert.run import Settings, predict_photo
from seguncert.scores import Scores

IGNORED = 255  # what the ignore index becomes inside; C is at most 255 here


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
