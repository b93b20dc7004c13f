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
            with Image.open(file) as picture:
                known_HW |= np.isin(np.array(picture), numbers)
        return known_HW


def read_labelled(lists: Sequence[str | os.PathLike[str]], paths: Collection[str]) -> Labelled:
    """What lists name: text files of paths, a line each, as in images.csv (a suffix may be missing), or tables with a column
    `path`, of which those that `select` wrote name regions too.

    Raises ValueError for a path that is not among `paths`.
    """
    found, by_stem = Labelled(), dict[str, str]()
    for path in paths:
        by_stem[str(Path(path).with_suffix(""))] = path
    known = set(paths)

    def resolve(file: Path, number: int, path: str) -> str:
        name = path if path in known else by_stem.get(path, by_stem.get(str(Path(path).with_suffix("")), ""))
        if not name:
            raise ValueError(
                f"labelled: {file}, line {number}: expected the path of an image of the export, as in its images.csv."
                f" Received: {path!r}, of which there is none. Correct the list."
            )
        return name

    for each in lists:
        file = Path(each)
        try:
            text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
        except (OSError, IsADirectoryError) as error:
            raise ValueError(f"labelled: expected a list of images. Received: {file}: {error.strerror}") from None
        if file.suffix.lower() != ".csv":
            lines = enumerate(text.splitlines(), 1)
            found.images.update(resolve(file, number, line.strip()) for number, line in lines if line.strip())
            continue
        table = csv.DictReader(text.splitlines(keepends=True))
        if "path" not in (table.fieldnames or []):
            raise ValueError(f"labelled: {file}: expected a table with a column path. Received: {table.fieldnames}")
        for row in table:
            path = resolve(file, table.line_num, row["path"])
            _add(found, file, row, path)
    return found


def _add(found: Labelled, file: Path, row: dict[str, str], path: str) -> None:
    """One row of a table: a whole image, unless it says which part."""
    if row.get("unit", "image") == "image":
        found.images.add(path)
        return
    try:
        x, y, width, height, number = (int(row[key]) for key in ("x", "y", "width", "height", "number"))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"labelled: {file}: {path}: expected whole numbers x, y, width, height, number. Received: {row}"
        ) from None
    numbers = file.parent / "regions" / f"{path}.png"
    if numbers.is_file():
        found.masks.setdefault(path, []).append((numbers, number))
    else:
        found.boxes.setdefault(path, []).append((x, y, width, height))
