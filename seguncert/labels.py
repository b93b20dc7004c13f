"""Label pictures: which belongs to which image, and what is in them."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from seguncert.image import IMAGE_SUFFIXES, LARGE

IGNORED = 255  # what the ignore index becomes inside; C is at most 255 here
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, PALETTE = 0, 3  # colour types of the format


def find_pairs(images: str | os.PathLike[str], labels: str | os.PathLike[str]) -> list[tuple[Path, Path]]:
    """Each image with the label PNG of the same relative path without suffix; a missing label is an error."""
    images, labels = Path(images), Path(labels)
    by_stem = find_labels(labels)
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"images: expected a folder with images. Received: {images}, which has none")
    missing = [path for path in found if path.relative_to(images).with_suffix("") not in by_stem]
    if missing:
        raise ValueError(
            f"labels: {len(missing)} of {len(found)} images have no PNG of the same name in {labels}, the first is {missing[0]}"
        )
    return [(path, by_stem[path.relative_to(images).with_suffix("")]) for path in found]


def find_labels(labels: Path) -> dict[Path, Path]:
    """Every PNG under `labels` by its relative path without suffix."""
    return {path.relative_to(labels).with_suffix(""): path for path in sorted(labels.rglob("*.png"))}


def read_label(path: str | os.PathLike[str], C: int, ignore_index: int | None) -> UInt8[np.ndarray, "H W"]:
    """Class indices, `IGNORED` where the file has the ignore index; any other value outside [0, C) is an error.

    The file is a PNG with 8- or 16-bit grey values, or with a palette whose numbers are the classes.
    """
    if C > IGNORED:
        raise ValueError(f"labels: expected at most {IGNORED} classes. Received: {C}")
    label_HW = _decode(Path(path))
    ignored_HW = np.zeros(label_HW.shape, bool) if ignore_index is None else label_HW == ignore_index
    wrong = label_HW[(label_HW >= C) & ~ignored_HW]
    if wrong.size:
        raise ValueError(
            f"{path}: {wrong.size} pixels have label {wrong[0]}. Expected: 0 to {C - 1}, or the ignore index"
            f" {'(none is set)' if ignore_index is None else ignore_index}. Set --ignore-index, or correct the label."
        )
    return np.where(ignored_HW, IGNORED, label_HW).astype(np.uint8)


def read_labels(
    paths: Sequence[str | os.PathLike[str]], C: int, ignore_index: int | None, H: int, W: int
) -> UInt8[np.ndarray, "K H W"]:
    """What K raters say of one image of that size, see `read_label`; a label of another size is an error."""
    said_KHW = np.empty((len(paths), H, W), np.uint8)
    for path, own_HW in zip(paths, said_KHW, strict=True):
        labels_HW = read_label(path, C, ignore_index)
        if labels_HW.shape != (H, W):
            raise ValueError(
                f"{path}: expected the size of its image, {W}x{H}. Received: {labels_HW.shape[1]}x{labels_HW.shape[0]}"
            )
        own_HW[:] = labels_HW
    return said_KHW


def rater_shares(said_KN: UInt8[np.ndarray, "K ..."], C: int) -> Float32[np.ndarray, "C ..."]:
    """Of the raters who labelled a pixel, the share that says each class; 0 for every class where none did.

    `said_KN` are class indices below C, or `IGNORED`, by K raters, of pixels in any arrangement.

    >>> rater_shares(np.array([[0, 1, 255], [1, 1, 255], [255, 1, 255]], np.uint8), 2)
    array([[0.5, 0. , 0. ],
           [0.5, 1. , 0. ]], dtype=float32)
    """
    shares_CN = np.stack([(said_KN == c).sum(0) for c in range(C)]).astype(np.float32)
    shares_CN /= np.maximum(shares_CN.sum(0), 1)
    return shares_CN


def _decode(path: Path) -> np.ndarray:
    """The numbers in the file; Pillow keeps those of a palette, and fails on a file that is cut short."""
    data = path.read_bytes()
    expected = f"{path}: expected an 8- or 16-bit one-channel PNG of class indices"
    if not data.startswith(SIGNATURE) or len(data) < 26:
        raise ValueError(f"{expected}. Received: {len(data)} bytes that begin with {data[:8]!r}")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if colour != PALETTE and (colour != GREY or depth < 8):
        raise ValueError(f"{expected}. Received: {depth} bits of colour type {colour}; convert it")
    if width * height > LARGE:
        raise ValueError(f"{path}: expected at most {LARGE} pixels. Received: {width}x{height}. Cut it into parts.")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return np.array(picture)
    except Exception as error:  # decoders fail on damaged data in every way there is
        raise ValueError(f"{expected}. Received: a damaged one ({error}); copy it again") from error
