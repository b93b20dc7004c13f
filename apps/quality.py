"""Print how good a model is on labelled images: mIoU, pixel accuracy and NLL, overall, per class and per group.

    python -m seguncert.apps.quality street IMAGES LABELS --ignore-index 11 --group sequence
    python -m seguncert.apps.quality nuclei IMAGES LABELS --group look

One deterministic pass per image, at the image's own size; pixels of the ignore index do not count.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from seguncert.evaluation import measure, total
from seguncert.image import read_image
from seguncert.labels import find_pairs
from seguncert.model import Model, bundled_folder, bundled_names, load_model
from seguncert.scores import Scores


class Group(str, Enum):
    none = "none"
    sequence = "sequence"
    look = "look"


def look(rgb: np.ndarray) -> str:
    """Kind of micrograph, from two numbers: median brightness (of 255) and mean saturation (HSV, of 255)."""
    hue_saturation_value = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    dark = np.median(hue_saturation_value[..., 2]) < 100
    if hue_saturation_value[..., 1].mean() > 20:
        return "stained, dark" if dark else "stained, light (histology)"
    return "grey, dark (fluorescence)" if dark else "grey, light (bright field)"


def main(
    model: Annotated[str, typer.Argument(help="bundled model or model folder")],
    images: Path,
    labels: Path,
    ignore_index: Annotated[int | None, typer.Option(help="label of pixels that do not count")] = None,
    group: Annotated[Group, typer.Option(help="sequence: name before _; look: kind of micrograph")] = Group.none,
    only: Annotated[str | None, typer.Option(help="only images whose name begins so")] = None,
    scale: str = "auto",
    record: Annotated[str | None, typer.Option(help="write the figures into the model's card under this name")] = None,
) -> None:
    """Measure and print."""
    net = load_model(model)
    C = len(net.classes)
    pairs = [pair for pair in find_pairs(images, labels) if pair[0].name.startswith(only or "")]
    counts = measure(net, pairs, ignore_index, scale)

    groups: dict[str, list[Scores]] = defaultdict(list)
    for image, part in counts.items():
        groups["all"].append(part)
        if group is Group.sequence:
            groups[image.stem.split("_")[0]].append(part)
        elif group is Group.look:
            groups[look(read_image(image).rgb)].append(part)
    table = Table("group", "images", "mIoU", "pixel accuracy", "NLL / nat", *(f"IoU {name}" for name in net.classes))
    for name, parts in sorted(groups.items(), key=lambda item: -len(item[1])):
        values = total(parts, C).compute()
        numbers = [values[key] for key in ("miou", "accuracy", "nll", *(f"iou.{c}" for c in range(C)))]
        table.add_row(name, str(len(parts)), *(f"{number:.3f}" for number in numbers))
    console = Console(width=60 + 16 * (C + 3))
    console.print(f"{model}, sha256 {net.sha256[:12]}…, {images}, ignore index {ignore_index}, scale {scale}")
    console.print(table)
    if record:
        _record(
            bundled_folder(model) if model in bundled_names() else Path(model), record, total(counts.values(), C), net
        )


def _record(folder: Path, name: str, scores: Scores, net: Model) -> None:
    """Add the figures to card.json, as `seguncert models` prints them."""
    values = scores.compute()
    figures = f"mIoU {values['miou']:.3f}, accuracy {values['accuracy']:.3f}, NLL {values['nll']:.3f} nat"
    if len(net.classes) == 2:
        figures = f"{net.classes[1]} IoU {values['iou.1']:.3f}, " + figures
    card = json.loads((folder / "card.json").read_text())
    card["measured"] = card.get("measured", {}) | {name: figures}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:  # the user's to mend: one line
        print(error, file=sys.stderr)
        sys.exit(2)
