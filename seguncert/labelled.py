"""What is labelled already: lists of images, and selections of earlier rounds with their regions."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image

from seguncert.image import IMAGE_SUFFIXES

OF_BOXES = ("region", "pixel")  # units that their box describes; others have masks


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images that are labelled as a whole, and parts of others: their boxes, or masks as a file has them."""

    images: set[str] = field(default_factory=set)
    boxes: dict[str, list[tuple[int, int, int, int]]] = field(default_factory=dict)
    masks: dict[str, list[tuple[Path, int]]] = field(default_factory=dict)  # a file of numbers, and which of them

    def whole(self, path: str) -> bool:
        """Whether all of the image is labelled."""
        return path in self.images

    @property
    def parts(self) -> set[str]:
        """Images of which a part is labelled."""
        return (self.boxes.keys() | self.masks.keys()) - self.images

    def mask(self, path: str, H: int, W: int) -> Bool[np.ndarray, "H W"] | None:
        """Which pixels of an image are labelled; None where none is."""
        if path in self.images:
            return np.ones((H, W), bool)
        if path not in self.boxes and path not in self.masks:
            return None
        known_HW = np.zeros((H, W), bool)
        for x, y, width, height in self.boxes.get(path, []):
            known_HW[y : y + height, x : x + width] = True
        files = dict[Path, list[int]]()
        for file, number in self.masks.get(path, []):
            files.setdefault(file, []).append(number)
        for file, numbers in files.items():
            try:
                with Image.open(file) as picture:
                    own_HW = np.array(picture)
            except (OSError, ValueError) as error:
                raise ValueError(f"labelled: {file}: expected a PNG of numbers. Received: {error}") from None
            if own_HW.shape != (H, W) or not set(numbers) <= set(np.unique(own_HW).tolist()):
                raise ValueError(
                    f"labelled: {file}: expected {W}x{H} pixels with the numbers {numbers}. Received: {own_HW.shape[::-1]}, of"
                    " another image or selection. Keep the folder that `select` wrote together."
                )
            known_HW |= np.isin(own_HW, numbers)
        return known_HW


def read_labelled(lists: Sequence[str | os.PathLike[str]], paths: Collection[str]) -> Labelled:
    """What lists name: text files of paths, a line each, as in images.csv (a suffix may be missing), or tables with a column
    `path`, of which those that `select` wrote name parts of images too.

    Raises ValueError for a path that is not among `paths`, or that may be two.
    """
    found, by_stem, known = Labelled(), dict[str, list[str]](), set(paths)
    for path in paths:
        by_stem.setdefault(_stem(path), []).append(path)

    def resolve(file: Path, number: int, said: str) -> str:
        said = said if said in known else said.strip()
        names = [said] if said in known else by_stem.get(_stem(said), [])
        if len(names) != 1:
            raise ValueError(
                f"labelled: {file}, line {number}: expected the path of an image of the export, as in its images.csv."
                f" Received: {said!r}, " + (f"which may be {' or '.join(names)}. Write its suffix." if names else "of which there is none. Correct the list.")
            )  # fmt: skip
        return names[0]

    for each in lists:
        file = Path(each)
        try:
            with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
                if file.suffix.lower() == ".csv":
                    table = csv.DictReader(lines)
                    if "path" not in (table.fieldnames or []):
                        raise ValueError(
                            f"labelled: {file}: expected a table with a column path. Received: {table.fieldnames}"
                        )
                    for row in table:
                        _add(found, file, row, resolve(file, table.line_num, row["path"] or ""))
                else:
                    named = enumerate(lines.read().split("\n"), 1)
                    found.images.update(resolve(file, at, line.rstrip("\r")) for at, line in named if line.strip())
        except OSError as error:
            raise ValueError(f"labelled: expected a list of images. Received: {file}: {error.strerror}") from None
        except csv.Error as error:
            raise ValueError(f"labelled: {file}: expected a table. Received: {error}") from None
    return found


def _stem(path: str) -> str:
    suffix = Path(path).suffix
    return path[: len(path) - len(suffix)] if suffix.lower() in IMAGE_SUFFIXES else path


def _add(found: Labelled, file: Path, row: dict[str, str], path: str) -> None:
    """One row of a table: a whole image, unless it says which part."""
    unit = row.get("unit") or "image"
    if unit == "image":
        found.images.add(path)
        return
    try:
        x, y, width, height, number = (int(row[key]) for key in ("x", "y", "width", "height", "number"))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"labelled: {file}: {path}: expected whole numbers x, y, width, height, number. Received: {row}"
        ) from None
    if unit in OF_BOXES:
        found.boxes.setdefault(path, []).append((x, y, width, height))
        return
    numbers = file.parent / masks_beside(file.stem) / f"{path}.png"
    if not numbers.is_file():
        raise ValueError(
            f"labelled: {file}: {path}: expected beside it {masks_beside(file.stem)}/{path}.png, which says where its {unit}s are."
            " Received: none. Keep the folder that `select` wrote together."
        )
    found.masks.setdefault(path, []).append((numbers, number))


def masks_beside(stem: str) -> str:
    """The folder of masks that belongs to a table of `select`.

    >>> masks_beside("selection"), masks_beside("random")
    ('regions', 'random-regions')
    """
    return "regions" if stem == "selection" else f"{stem}-regions"
