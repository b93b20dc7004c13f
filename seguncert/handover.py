"""What is handed over to labelling tools, and how the files appear.

Letters: H rows, W columns, C classes; h, w for those of a region.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from seguncert.labels import IGNORED
from seguncert.rle import Pieces, find_pieces
from seguncert.store import cannot_write

THIS, THIS_COLOUR = "label this", "#ff00ff"
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, eq=False)
class Region:
    """A part of an image that is to be labelled: a box, or some pixels of it."""

    rank: int
    box: tuple[int, int, int, int]  # x, y, width, height
    mask_hw: Bool[np.ndarray, "h w"] | None  # of the box; None: all of it
    score: float
    reason: str

    @property
    def rows(self) -> Pieces:
        """Its rows, as pieces of those of the image."""
        x, y, _, _ = self.box
        return find_pieces(self._set_hw, ignored=0)[1].moved(y, x)

    @property
    def columns(self) -> Pieces:
        """Its columns, as pieces of those of the image."""
        x, y, _, _ = self.box
        return find_pieces(self._set_hw.T, ignored=0)[1].moved(x, y)

    @property
    def _set_hw(self) -> np.ndarray:
        _, _, width, height = self.box
        return np.ones((height, width), np.uint8) if self.mask_hw is None else self.mask_hw.view(np.uint8)


@dataclass(frozen=True, eq=False)
class Item:
    """An image of which something is to be labelled: all of it, or only `regions`.

    `labels_HW` are pre-labels, class indices, 255 where there is none; outside of regions they do not count. `path` is
    relative to the folder of images. Raises ValueError for what no tool could show.
    """

    path: str
    width: int
    height: int
    labels_HW: UInt8[np.ndarray, "H W"] | None
    rank: int
    score: float
    reason: str
    regions: tuple[Region, ...] = ()

    def __post_init__(self) -> None:
        if {"", ".", ".."} & set(self.path.split("/")):
            raise ValueError(f"path: expected one relative to the folder of images. Received: {self.path!r}")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"{self.path}: expected at least one pixel. Received: {self.width}x{self.height}")
        if self.labels_HW is not None and self.labels_HW.shape != (self.height, self.width):
            raise ValueError(
                f"{self.path}: labels_HW: expected {self.height} rows of {self.width}. Received: {self.labels_HW.shape}"
            )
        if not all(map(math.isfinite, [self.score, *(region.score for region in self.regions)])):
            raise ValueError(f"{self.path}: expected finite scores. Received: one that is not; leave that pick out.")
        for region in self.regions:
            x, y, width, height = region.box
            inside = 0 <= x < x + width <= self.width and 0 <= y < y + height <= self.height
            if not inside or (region.mask_hw is not None and region.mask_hw.shape != (height, width)):
                shape = "" if region.mask_hw is None else f" and mask {region.mask_hw.shape}"
                raise ValueError(
                    f"{self.path}: expected a box (x, y, width, height) within {self.width}x{self.height}, and a mask of"
                    f" its size. Received: {region.box}{shape}"
                )
            if region.mask_hw is not None and not region.mask_hw.any():
                raise ValueError(f"{self.path}: mask of {region.box}: expected at least one pixel. Received: none")


class Drawn:
    """An item with its pre-labels cut into pieces, once for all formats."""

    def __init__(self, item: Item, number: int):
        self.item, self.number = item, number

    @cached_property
    def shown_HW(self) -> np.ndarray:
        """Pre-labels where something is to be labelled, 255 elsewhere."""
        item = self.item
        if item.labels_HW is None:
            return np.full((item.height, item.width), IGNORED, np.uint8)
        if not item.regions:
            return item.labels_HW
        shown_HW = np.full_like(item.labels_HW, IGNORED)
        for region in item.regions:
            x, y, width, height = region.box
            part = slice(y, y + height), slice(x, x + width)
            np.copyto(shown_HW[part], item.labels_HW[part], where=True if region.mask_hw is None else region.mask_hw)
        return shown_HW

    @cached_property
    def rows(self) -> dict[int, Pieces]:
        """Rows of each class."""
        return find_pieces(self.shown_HW)

    @cached_property
    def columns(self) -> dict[int, Pieces]:
        """Columns of each class."""
        return find_pieces(self.shown_HW.T)


def marks(pick: Item | Region) -> dict[str, Any]:
    """What is said of a pick."""
    return {"rank": int(pick.rank), "score": float(pick.score), "reason": pick.reason}


def to_json(value: Any) -> str:
    """In one line, in ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Turn a failure of the disk into the error that says what to do."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


class Writer:
    """One format: its file, or folder, has a hidden name until it is whole."""

    name = ""
    unfit = re.compile("(?!)")  # what a label of this format cannot hold
    own: tuple[str, ...] = (THIS,)  # labels besides the classes

    def __init__(self, out: Path, classes: Sequence[str], colours_C3: np.ndarray, url_prefix: str):
        self.path, self.part = out / self.name, out / f".{self.name}.part"
        self.colours_C3, self.url_prefix = colours_C3, url_prefix
        colours = [*(f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours_C3.tolist()), THIS_COLOUR]
        self.left_out: list[str] = []
        self.changed: list[str] = []
        wanted, labels = [*classes, *self.own], list[str]()
        for label in wanted:
            held = self.unfit.sub("_", label) or "_"
            while held in labels:
                held += "_"
            labels.append(held)
        self.renamed = [(old, new) for old, new in zip(wanted, labels, strict=True) if old != new]
        self.classes, self.this = labels[: len(classes)], labels[-1]
        self.labels = list(zip(labels, colours[: len(labels)], strict=True))

    def __enter__(self) -> Writer:
        with telling(self.path):
            self.begin()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                with telling(self.path):
                    self.end()
                    os.replace(self.part, self.path)
        finally:
            self.discard()

    def begin(self) -> None:
        """Make what `add` writes to."""
        raise NotImplementedError

    def add(self, drawn: Drawn) -> None:
        """Write an item."""
        raise NotImplementedError

    def end(self) -> None:
        """Write what is known only now, and close."""
        raise NotImplementedError

    def discard(self) -> None:
        """Leave nothing under the hidden name."""
        self.part.unlink(missing_ok=True)

    def told(self) -> Iterator[str]:
        """What could not be held as it is."""
        for old, new in self.renamed:
            yield f"{self.name}: label {old!r} is called {new!r} there"
        if self.left_out:
            yield f"{self.name}: images left out for their names: {len(self.left_out)}, the first {self.left_out[0]!r}"
        if self.changed:
            yield f"{self.name}: reasons with ? for what XML cannot hold: {len(self.changed)}, the first {self.changed[0]!r}"


class TextWriter(Writer):
    """A format that is one text, of a head, a part for each item, and a tail."""

    def begin(self) -> None:
        self.file = open(self.part, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        self.file.write(self.head())

    def end(self) -> None:
        self.file.write(self.tail())
        self.file.close()

    def discard(self) -> None:
        try:
            self.file.close()
        except OSError:  # what is still to be written does not fit the disk
            pass
        super().discard()

    def head(self) -> str:
        """What stands before the items."""
        raise NotImplementedError

    def tail(self) -> str:
        """What stands after them."""
        raise NotImplementedError
