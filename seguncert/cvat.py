"""The two formats of CVAT: its XML, and masks in colours.

Letters as in `seguncert.handover`.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from seguncert.handover import NOT_IN_XML, Drawn, Item, Region, TextWriter, Writer, marks
from seguncert.render import encode_labels_png
from seguncert.rle import Pieces
from seguncert.store import write_file

NOT_IN_LIST = re.compile("[\r\n\ud800-\udfff]|^[\\s#]|\\s$")  # of names, one a line
NOT_IN_LABELMAP = re.compile("[:\r\n\ud800-\udfff]|^[\\s#]+")
ATTRIBUTES: list[dict[str, Any]] = [  # of "label this" in CVAT, whose numbers are whole
    {"name": "rank", "mutable": False, "input_type": "number", "default_value": "1", "values": ["1", "1000000", "1"]},
    {"name": "score", "mutable": False, "input_type": "text", "default_value": "", "values": [""]},
    {"name": "reason", "mutable": False, "input_type": "text", "default_value": "", "values": [""]},
]


class CvatXml(TextWriter):
    """https://docs.cvat.ai/docs/other/xml_format; the tool finds an image by its name."""

    name = "cvat.xml"
    unfit = NOT_IN_XML

    def head(self) -> str:
        keys = ("name", "mutable", "input_type", "default_value", "values")
        types = "".join(_tag("attribute", "".join(_tag(key, _text(each[key])) for key in keys)) for each in ATTRIBUTES)
        labels = "".join(
            _tag(
                "label",
                _tag("name", _text(label))
                + _tag("color", colour)
                + _tag("type", "any")
                + _tag("attributes", types if label == self.this else ""),
            )
            + "\n"
            for label, colour in self.labels
        )
        return (
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta><task>'
            f"<name>seguncert</name><mode>annotation</mode><labels>\n{labels}</labels></task></meta>\n"
        )

    def add(self, drawn: Drawn) -> None:
        item = drawn.item
        if NOT_IN_XML.search(item.path):
            self.left_out.append(item.path)
            return
        self.file.write(
            f'<image id="{drawn.number - 1}" name={quoteattr(item.path)} width="{item.width}" height="{item.height}">\n'
        )
        for label, pieces in drawn.rows.items():
            self.file.write(self._shape("mask", self.classes[label], _cvat_mask(pieces) + ' z_order="0"'))
        for region in item.regions:
            x, y, width, height = region.box
            if region.mask_hw is None:
                where = f' xtl="{x}" ytl="{y}" xbr="{x + width}" ybr="{y + height}"'
            else:
                where = _cvat_mask(region.rows)
            kind = "box" if region.mask_hw is None else "mask"
            self.file.write(self._shape(kind, self.this, where + ' z_order="1"', region))
        if not item.regions:
            self.file.write(self._shape("tag", self.this, "", item))
        self.file.write("</image>\n")

    def _shape(self, kind: str, label: str, where: str, pick: Item | Region | None = None) -> str:
        occluded = "" if kind == "tag" else ' occluded="0"'
        lines = [f'<{kind} label={quoteattr(label)} source="auto"{occluded}{where}>']
        for name, value in marks(pick).items() if pick else ():
            text = str(value)
            if NOT_IN_XML.search(text):
                self.changed.append(text)
            lines.append(f'<attribute name="{name}">{_text(NOT_IN_XML.sub("?", text))}</attribute>')
        return "".join(lines) + f"</{kind}>\n"

    def tail(self) -> str:
        labels = [
            {"name": label, "color": colour, "type": "any", "attributes": ATTRIBUTES if label == self.this else []}
            for label, colour in self.labels
        ]
        write_file(self.path.with_name("cvat-labels.json"), json.dumps(labels, indent=1) + "\n")
        return "</annotations>\n"


def _text(value: Any) -> str:
    return escape("\n".join(value) if isinstance(value, list) else str(value), {"\r": "&#13;"})


def _tag(name: str, content: str) -> str:
    return f"<{name}>{content}</{name}>"


def _cvat_mask(pieces: Pieces) -> str:
    """Run lengths along the rows of the mask's own box."""
    top, left, height, width = pieces.box
    counts = pieces.moved(-top, -left).counts(height, width)
    return f' rle="{", ".join(map(str, counts.tolist()))}" left="{left}" top="{top}" width="{width}" height="{height}"'


class CvatMasks(Writer):
    """https://docs.cvat.ai/docs/dataset_management/formats/format-smask: a picture in the colours of labelmap.txt.

    Pixels without a pre-label are black there. So a class that is black, or of the colour of a class before it, takes
    the next colour that none has. Names have no suffix: the second image of one name is left out.
    """

    name = "cvat-masks.zip"
    unfit = NOT_IN_LABELMAP
    own = ()

    def begin(self) -> None:
        self.zip = zipfile.ZipFile(self.part, "w")
        self.stems: dict[str, None] = {}
        nothing = "background" if "background" not in self.classes else "no label"
        while nothing in self.classes:
            nothing += "_"
        self.palette = _told_apart(np.concatenate([np.zeros((1, 3), np.uint8), self.colours_C3]))
        lines = ["# label:color_rgb:parts:actions\n"]
        for label, (red, green, blue) in zip([nothing, *self.classes], self.palette.tolist(), strict=True):
            lines.append(f"{label}:{red},{green},{blue}::\n")
        self._put("labelmap.txt", "".join(lines).encode())

    def add(self, drawn: Drawn) -> None:
        stem = os.path.splitext(drawn.item.path)[0]
        if stem in self.stems or NOT_IN_LIST.search(stem):
            self.left_out.append(drawn.item.path)
            return
        self.stems[stem] = None
        object_of = np.zeros(256, np.uint8)
        object_of[list(drawn.rows)] = np.arange(1, len(drawn.rows) + 1)
        shown_HW = drawn.shown_HW
        self._put(f"SegmentationClass/{stem}.png", encode_labels_png(shown_HW + np.uint8(1), self.palette))
        self._put(f"SegmentationObject/{stem}.png", encode_labels_png(object_of[shown_HW], _object_colours()))

    def _put(self, name: str, content: bytes) -> None:
        about = zipfile.ZipInfo(name)
        about.external_attr = 0o644 << 16
        self.zip.writestr(about, content)

    def end(self) -> None:
        self._put("ImageSets/Segmentation/default.txt", "".join(f"{stem}\n" for stem in self.stems).encode())
        self.zip.close()

    def discard(self) -> None:
        try:
            self.zip.close()
        except (OSError, ValueError):  # the disk is full, or it was closed amid an entry
            pass
        super().discard()


def _told_apart(colours_C3: np.ndarray) -> np.ndarray:
    """The same colours, but that one which another had before takes the next that none has."""
    wanted = [int.from_bytes(bytes(colour), "big") for colour in colours_C3.tolist()]
    taken, out = set(wanted), list[int]()
    for number in wanted:
        if number in out:
            while number in taken:
                number = (number + 1) % (1 << 24)
        taken.add(number)
        out.append(number)
    return np.array([list(number.to_bytes(3, "big")) for number in out], np.uint8)


def _object_colours() -> np.ndarray:
    """The 256 colours that number objects in PASCAL VOC: bit 3 j + c of the number is bit 7 - j of channel c."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    padded = np.pad(bits, ((0, 0), (0, 1))).reshape(256, 3, 3)  # number, j, channel
    return np.packbits(padded.swapaxes(1, 2), axis=2)[..., 0]
