"""What is a second rater worth? Calibrate to one rater, or to the distribution of two; judge against both.

    python -m seguncert.apps.raters NET IMAGES RATER1 RATER2 --group 8

Eyes of one person (images whose names agree in their first `--group` letters) are left out together: the calibrator is
fitted on the others and judged on them, in nats a pixel, by the mean NLL against the two raters. The interval of the
difference is the middle 95 % of a bootstrap over the groups.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from seguncert.calibrating import draw
from seguncert.fitting import Pixels, compare, fit
from seguncert.image import read_image
from seguncert.labels import find_pairs, read_label
from seguncert.model import load_model
from seguncert.predict import predict_logits
from seguncert.surroundings import FEATURES

KINDS = ("none", "temperature", "vector", "isotonic", "local")


def main(
    model: Annotated[str, typer.Argument(help="bundled model or model folder, not trained on these images")],
    images: Path,
    rater1: Path,
    rater2: Path,
    group: Annotated[int, typer.Option(help="first letters of a name that say which images are left out together")] = 8,
    ignore_index: Annotated[int | None, typer.Option(help="label of pixels that do not count")] = None,
) -> None:
    """Measure and print."""
    net = load_model(model)
    C, second = len(net.classes), dict(find_pairs(images, rater2))
    both, first = (Pixels(C, tuple(FEATURES), net.frame) for _ in range(2))
    for image, label in find_pairs(images, rater1):
        rgb = read_image(image).rgb
        logits = predict_logits(net, rgb)
        one, other = (read_label(each, C, ignore_index) for each in (label, second[image]))
        both.add(draw(both, logits, rgb, [one, other], image.name, image.name[:group]))
        first.add(draw(first, logits, rgb, [one], image.name, image.name[:group]))
    groups = {each.picture: each.group for each in both.drawn}
    console = Console(width=160)
    console.print(
        f"{model}, sha256 {net.sha256[:12]}…, {len(groups)} images, {len(set(groups.values()))} groups left out in turn,"
        f" {len(both)} pixels"
    )
    table = Table(
        "calibrator", "fitted to rater 1", "fitted to both", "both better by", "95 % of bootstrap", "groups better"
    )
    for kind in KINDS:
        found: list[dict[str, tuple[float, int]]] = [{}, {}]
        for left in sorted(set(groups.values())):
            judged = both.only(lambda each, left=left: each.group == left)  # type: ignore[misc]
            for nll, pixels in zip(found, (first, both), strict=True):
                rest = pixels.only(lambda each, left=left: each.group != left)  # type: ignore[misc]
                nll |= judged.nll(None if kind == "none" else fit(kind, rest))
        gain, (low, high), _ = compare(found[0], found[1], groups, groups)
        means = [sum(total for total, _ in nll.values()) / sum(n for _, n in nll.values()) for nll in found]
        better = [
            sum(found[0][name][0] - found[1][name][0] for name in groups if groups[name] == left) > 0
            for left in set(groups.values())
        ]
        table.add_row(
            kind, *(f"{mean:.4f}" for mean in means), f"{gain:+.4f}", f"{low:+.4f} … {high:+.4f}", f"{np.sum(better)} of {len(better)}"
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:  # the user's to mend: one line
        print(error, file=sys.stderr)
        sys.exit(2)
