"""Arrays too large for the memory, on the disk: filled block by block, and made into files from there."""

from __future__ import annotations

import ctypes
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

TILE = 256  # of a large TIFF


class Sheet:
    """An array on the disk, H × W; only the rows in use are mapped into memory."""

    def __init__(self, file: Path, H: int, W: int, dtype: np.dtype):
        self.file, self.H, self.W, self.dtype = file, H, W, dtype
        with open(file, "wb") as new:
            if hasattr(os, "posix_fallocate"):  # a disk that is full says so here, and not by a bus error
                os.posix_fallocate(new.fileno(), 0, H * W * dtype.itemsize)
            new.truncate(H * W * dtype.itemsize)

    def rows(self, rows: slice, mode: Literal["r", "r+"] = "r") -> np.memmap:
        """Some rows, mapped until they are let go."""
        offset = rows.start * self.W * self.dtype.itemsize
        return np.memmap(self.file, self.dtype, mode, offset, (rows.stop - rows.start, self.W))

    def put(self, rows: slice, columns: slice, values_RW: np.ndarray) -> None:
        """Write a block."""
        self.rows(rows, "r+")[:, columns] = values_RW

    def shrunk(self, h: int, w: int) -> np.ndarray:
        """(h, w) float32 in [0, 1], by area means."""
        small = np.empty((h, w), np.float32)
        full = 65535 if self.dtype.kind == "u" else 1
        for y in range(h):
            start, stop = y * self.H // h, max(y * self.H // h + 1, (y + 1) * self.H // h)
            line_1W = self.rows(slice(start, stop)).mean(0, dtype=np.float32, keepdims=True) / full
            small[y] = cv2.resize(line_1W, (w, 1), interpolation=cv2.INTER_AREA)
        return small

    def save(self, format: str) -> tuple[str, Path]:
        """As a file of the wanted format."""
        if format == "png16":
            return ".png", self.save_png()
        target = self.file.with_name(self.file.name + f".{format}")
        if format == "npy":
            copy = np.lib.format.open_memmap(target, "w+", self.dtype, (self.H, self.W))
            for start in range(0, self.H, 256):
                copy[start : start + 256] = self.rows(slice(start, min(start + 256, self.H)))
        else:
            settings = {"tile": (TILE, TILE), "compression": "zstd", "predictor": True}
            tiff_writer()(target, self._tiles(), shape=(self.H, self.W), dtype=self.dtype, **settings)
        self.file.unlink()
        return f".{format}", target

    def _tiles(self) -> Iterator[np.ndarray]:
        for start in range(0, self.H, TILE):
            rows_RW = self.rows(slice(start, min(start + TILE, self.H)))
            yield from (np.asarray(rows_RW[:, left : left + TILE]) for left in range(0, self.W, TILE))

    def save_png(self, colours_C3: np.ndarray | None = None) -> Path:
        """As PNG, grey, or with a palette; Pillow takes the pixels where they lie."""
        target = self.file.with_name(self.file.name + ".png")
        mode = "I;16" if self.dtype.itemsize == 2 else "P"
        picture = Image.frombuffer(mode, (self.W, self.H), self.rows(slice(0, self.H)), "raw", mode, 0, 1)
        if colours_C3 is not None:
            picture.putpalette(colours_C3.tobytes())
        picture.save(target, compress_level=1, compress_type=zlib.Z_RLE, bits=8 if mode == "P" else 16)
        self.file.unlink()
        return target


def tiff_writer() -> Callable[..., None]:
    """tifffile's, or a ValueError that says how to get it."""
    try:
        import imagecodecs  # noqa: F401
        import tifffile
    except ImportError:
        raise ValueError("format tiff needs two more packages: pip install 'seguncert[tiff]'") from None
    return tifffile.imwrite


def give_back() -> None:
    """Memory that was freed, to the system: the allocator of glibc keeps some for each thread that there ever was."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another allocator
        pass


def let_go(array: np.ndarray) -> None:
    """Memory in which an array that is mapped from a file lies; what is looked at again is read again."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
