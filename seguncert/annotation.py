"""Hand-over files for labelling tools: what to label, why, and what the model already shows there.

    coco.json           COCO: pycocotools, FiftyOne, CVAT
    cvat.xml            "CVAT 1.1" (for images), with cvat-labels.json for the raw label constructor of CVAT
    cvat-masks.zip      "Segmentation mask 1.1" of CVAT: pre-labels only
    label-studio.json   tasks of Label Studio, with label-studio.xml, the labelling interface that fits
    png/                pre-labels as palette PNGs (255 where there is none), with items.csv

Pre-labels are predicted classes, one mask for each in an image. What is to be labelled bears a label of its own, "label
this", with rank, score and reason. A score is a doubt: the higher, the sooner. Where a tool reads a score of a pre-label
as a confidence, and the least confident first, there stands 1 - score.

Letters: H rows, W columns, C classes; h, w for those of a region.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from jaxtyping import UInt8

from seguncert.cvat import CvatMasks, CvatXml
from seguncert.handover import (
    NOT_IN_XML,
    Drawn,
    Item,
    Region,
    TextWriter,
    Writer,
    marks,
    telling,
    to_json,
)  # fmt: skip
from seguncert.labels import IGNORED
from seguncert.render import encode_labels_png
from seguncert.rle import Pieces, brush_bytes, coco_counts
from seguncert.store import write_file

__all__ = ["FORMATS", "LOCAL_FILES", "Item", "Region", "hand_over"]

LOCAL_FILES = "/data/local-files/?d="  # where Label Studio serves its local storage


def hand_over(
    out: Path,
    classes: Sequence[str],
    colours_C3: UInt8[np.ndarray, "C 3"],
    items: Iterable[Item],
    *,
    formats: Sequence[str] = ("coco", "cvat", "cvat-masks", "label-studio", "png"),
    url_prefix: str = LOCAL_FILES,
) -> list[str]:
    """Write items into the folder `out`, in one pass, one at a time in memory; a file is seen whole or not at all.

    `items` come in the order in which they are to be labelled. `url_prefix` goes before the percent-encoded paths in
    label-studio.json. Returns what a format could not hold as it is, a line each: renamed classes, images left out.
    Raises ValueError for labels outside [0, C) that are not 255, StoreError where `out` cannot be written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"formats: expected some of {', '.join(FORMATS)}. Received: {unknown[0]!r}")
    if len(colours_C3) != len(classes):
        raise ValueError(f"colours: expected one for each of {len(classes)} classes. Received: {len(colours_C3)}")
    writers = [FORMATS[name](out, classes, colours_C3, url_prefix) for name in formats]
    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer)
        paths = set[str]()
        for number, item in enumerate(items, 1):
            if item.path in paths:
                raise ValueError(
                    f"items: expected each image once. Received: {item.path} again; put its regions into one"
                )
            paths.add(item.path)
            drawn = Drawn(item, number)
            wrong = [label for label in drawn.rows if label >= len(classes)]
            if wrong:
                raise ValueError(
                    f"{item.path}: expected labels from 0 to {len(classes) - 1}, or {IGNORED} for none. Received: {wrong[0]}"
                )
            for writer in writers:
                with telling(writer.path):
                    writer.add(drawn)
    return [note for writer in writers for note in writer.told()]


class _Coco(TextWriter):
    """https://cocodataset.org/#format-data, masks as compressed run lengths."""

    name = "coco.json"

    def head(self) -> str:
        self.images: list[str] = []
        self.count = 0
        categories = [{"id": number, "name": label} for number, (label, _) in enumerate(self.labels, 1)]
        return f'{{"info":{{"description":"seguncert: what to label next"}},\n"categories":{to_json(categories)},\n"annotations":['

    def add(self, drawn: Drawn) -> None:
        item = drawn.item
        about = {"id": drawn.number, "file_name": item.path, "width": item.width, "height": item.height}
        self.images.append(to_json(about | marks(item)))
        for label, pieces in drawn.columns.items():
            self._annotate(drawn, label + 1, pieces, {"score": 1 - float(item.score)})
        for region in item.regions:
            self._annotate(drawn, len(self.classes) + 1, region.columns, marks(region))

    def _annotate(self, drawn: Drawn, category: int, pieces: Pieces, told: dict[str, Any]) -> None:
        width, height = drawn.item.width, drawn.item.height
        mask = {"size": [height, width], "counts": coco_counts(pieces.counts(width, height))}
        x, y, box_width, box_height = pieces.box
        self.count += 1
        about = {"id": self.count, "image_id": drawn.number, "category_id": category, "iscrowd": 0, "area": pieces.area,
                 "bbox": [x, y, box_width, box_height], "segmentation": mask} | told  # fmt: skip
        self.file.write(("\n" if self.count == 1 else ",\n") + to_json(about))

    def tail(self) -> str:
        return '],\n"images":[\n' + ",\n".join(self.images) + "]}\n"


class _LabelStudio(TextWriter):
    """https://labelstud.io/guide/predictions; a task is first in line whose prediction has the lowest score."""

    name = "label-studio.json"
    unfit = NOT_IN_XML

    def head(self) -> str:
        return "["

    def add(self, drawn: Drawn) -> None:
        item = drawn.item
        data = {"image": self.url_prefix + quote(item.path, errors="surrogateescape")} | marks(item)
        results = [self._brush(drawn, pieces, self.classes[label]) for label, pieces in drawn.rows.items()]
        for region in item.regions:
            drawing = self._box(drawn, region) if region.mask_hw is None else self._brush(drawn, region.rows, self.this)
            meta = {"text": [region.reason], "rank": int(region.rank)}
            results.append(drawing | {"score": float(region.score), "meta": meta})
        for number, result in enumerate(results, 1):
            result["id"] = f"s{number}"
        prediction = {"model_version": "seguncert", "score": 1 - float(item.score), "result": results}
        self.file.write(("\n" if drawn.number == 1 else ",\n") + to_json({"data": data, "predictions": [prediction]}))

    def _brush(self, drawn: Drawn, pieces: Pieces, label: str) -> dict[str, Any]:
        counts = pieces.counts(drawn.item.height, drawn.item.width)
        return _result(drawn, "brush", {"format": "rle", "rle": brush_bytes(counts), "brushlabels": [label]})

    def _box(self, drawn: Drawn, region: Region) -> dict[str, Any]:
        x, y, width, height = region.box
        across, down = 100 / drawn.item.width, 100 / drawn.item.height
        where = {"x": x * across, "y": y * down, "width": width * across, "height": height * down, "rotation": 0}
        return _result(drawn, "rectangle", where | {"rectanglelabels": [self.this]})

    def tail(self) -> str:
        *classes, this = (f'<Label value={quoteattr(label)} background="{colour}"/>\n' for label, colour in self.labels)
        config = (
            '<View>\n<Header value="$reason"/>\n<Image name="image" value="$image" zoom="true"/>\n'
            f'<BrushLabels name="brush" toName="image">\n{"".join(classes)}{this}</BrushLabels>\n'
            f'<RectangleLabels name="rectangle" toName="image">\n{this}</RectangleLabels>\n</View>\n'
        )
        write_file(self.path.with_suffix(".xml"), config)
        return "]\n"


def _result(drawn: Drawn, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": f"{kind}labels", "from_name": kind, "to_name": "image", "image_rotation": 0,
        "original_width": drawn.item.width, "original_height": drawn.item.height, "value": value,
    }  # fmt: skip


class _Png(Writer):
    """Label PNGs in the places of the images, as `seguncert evaluate` reads them, and a table."""

    name = "png"
    own = ()

    def begin(self) -> None:
        if self.path.exists() and not (self.path / "items.csv").exists():
            raise ValueError(
                f"{self.path}: expected a folder of an earlier hand-over. Received: something else; move it"
            )
        self.discard()
        self.part.mkdir()
        self.palette = np.zeros((256, 3), np.uint8)
        self.palette[: len(self.colours_C3)] = self.colours_C3
        self.names: set[str] = set()
        self.table = io.StringIO(newline="")
        self.rows = csv.writer(self.table, lineterminator="\n")
        self.rows.writerow(["path", "labels", "rank", "score", "reason", "boxes"])

    def add(self, drawn: Drawn) -> None:
        item = drawn.item
        name = f"{os.path.splitext(item.path)[0]}.png"
        while name in self.names:  # two images that differ in their suffix
            name = f"{item.path}.{len(self.names)}.png"
        self.names.add(name)
        file = self.part / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_labels_png(drawn.shown_HW, self.palette))
        boxes = ";".join(" ".join(map(str, region.box)) for region in item.regions)
        self.rows.writerow([item.path, name, int(item.rank), float(item.score), item.reason, boxes])

    def end(self) -> None:
        (self.part / "items.csv").write_bytes(self.table.getvalue().encode("utf-8", "surrogateescape"))
        shutil.rmtree(self.path, ignore_errors=True)

    def discard(self) -> None:
        shutil.rmtree(self.part, ignore_errors=True)


FORMATS: dict[str, type[Writer]] = {
    "coco": _Coco, "cvat": CvatXml, "cvat-masks": CvatMasks, "label-studio": _LabelStudio, "png": _Png,
}  # fmt: skip
