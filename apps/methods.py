"""Print what sampling is worth: calibration and error detection of none, MC dropout, flips and scales, and all together.

    python -m seguncert.apps.methods street IMAGES LABELS --ignore-index 11

All pixels of all images are pooled, at the images' own sizes; nothing is calibrated. In brackets is the middle 95 % of a
bootstrap over clusters (200 replicates): sequences (the name before _) where there are several, else runs of neighbours.
Below each way stands how far it is from the first, paired by cluster, so that the bootstrap sees the same images.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from seguncert.image import read_image
from seguncert.labels import IGNORED, find_pairs, read_labels
from seguncert.metrics import Evaluation
from seguncert.model import Model, load_model
from seguncert.predict import rows_at_size
from seguncert.run import Settings, describe_photo, predict_photo
from seguncert.video import Carry

METHODS = "none,sampling-free,mc-dropout,tta,mc-dropout+tta"
FIGURES = {
    "NLL / nat": "nll",
    "ECE": "ece",
    "Brier": "brier",
    "mIoU": "miou",
    "AUROC": "error_auroc.confidence",
    "AURC": "aurc.confidence",
}
SPREAD = ("mutual_information", "variance")


def clusters(names: list[str], run: int) -> dict[str, str]:
    """The cluster of each image: its sequence where there are several, else `run` neighbours in a row.

    >>> clusters(["a_1", "a_2", "b_1"], 10)
    {'a_1': 'a', 'a_2': 'a', 'b_1': 'b'}
    >>> clusters(["a_1", "a_2", "a_3"], 2)
    {'a_1': '0', 'a_2': '0', 'a_3': '1'}
    """
    sequences = {name: name.split("_")[0] for name in names}
    if len(set(sequences.values())) > 1:
        return sequences
    return {name: str(number // run) for number, name in enumerate(sorted(names))}


def main(
    model: Annotated[str, typer.Argument(help="bundled model or model folder")],
    images: Path,
    labels: Path,
    ignore_index: Annotated[int | None, typer.Option(help="label of pixels that do not count")] = None,
    methods: Annotated[str, typer.Option(help="as of seguncert export, comma between")] = METHODS,
    samples: int = 20,
    seed: int = 0,
    carry: Annotated[
        float | None, typer.Option(help="rows also for what is carried from frame to frame, the images being a video")
    ] = None,
    run: Annotated[int, typer.Option(help="images in a row that are a cluster, where there is one sequence")] = 10,
    scale: str = "auto",
) -> None:
    """Measure and print."""
    net = load_model(model)
    pairs = find_pairs(images, labels)
    of_cluster = clusters([image.stem for image, _ in pairs], run)
    count = len(set(of_cluster.values()))
    console = Console(width=230)
    console.print(
        f"{model}, sha256 {net.sha256[:12]}…, {len(pairs)} images of {images} in {count} clusters, ignore index {ignore_index},"
        f" {samples} samples, seed {seed}, scale {scale}, not calibrated"
    )
    table = Table("method", *FIGURES, *(f"AUROC {name}" for name in SPREAD), "ms")
    ways: list[tuple[str, float | None]] = [(method, None) for method in methods.split(",")]
    ways += [(method, carry) for method in ("none", "mc-dropout") if carry is not None]
    first: Evaluation | None = None
    for method, keep in ways:
        title = method + (f", carry {keep:g}" if keep else "")
        evaluation, seconds = judge(net, track(pairs, title, console=Console(stderr=True)), method, keep, ignore_index,
                                    of_cluster, samples, seed, scale)  # fmt: skip
        values, intervals = evaluation.compute(), evaluation.intervals()
        spread = [f"error_auroc.{name}" for name in SPREAD if name in evaluation.maps]
        cells = [_cell(values[name], intervals[name]) for name in (*FIGURES.values(), *spread)]
        table.add_row(title, *cells, *[""] * (len(SPREAD) - len(spread)), f"{1000 * seconds / len(pairs):.0f}")
        if first is not None:
            base, off = first.compute(), _differences(first, evaluation)
            more = [_cell(values[name] - base[name], off[name], "+") for name in FIGURES.values()]
            table.add_row(f"  less {ways[0][0]}", *more)
        first = first or evaluation
    console.print(table)


def judge(
    net: Model,
    pairs: Iterable[tuple[Path, Path]],
    method: str,
    keep: float | None,
    ignore_index: int | None,
    of_cluster: dict[str, str],
    samples: int,
    seed: int,
    scale: str,
) -> tuple[Evaluation, float]:
    """The sums of one way to draw predictions, and the seconds that drawing took."""
    spread = SPREAD if method != "none" else ()
    drawn = {"samples": samples, "seed": seed} if "mc-dropout" in method else {}
    settings = Settings(method, **drawn, carry=keep, scale=scale, maps=("confidence", *spread))  # type: ignore[arg-type]
    sampler = settings.sampler([net]) if method != "none" or keep is not None else None
    evaluation = Evaluation.empty(len(net.classes), ignore_index=IGNORED, maps=dict.fromkeys(spread, "low"))
    seconds, past, sequence = 0.0, None, ""
    for image, label in pairs:
        if keep is not None and (past is None or image.stem.split("_")[0] != sequence):
            past, sequence = Carry(keep), image.stem.split("_")[0]
        rgb = read_image(image).rgb
        (labels_HW,) = read_labels([label], len(net.classes), ignore_index, *rgb.shape[:2])
        H, W = labels_HW.shape
        started = time.perf_counter()
        logits, moments, _ = predict_photo(net, sampler, rgb, settings, past)
        seconds += time.perf_counter() - started
        found = describe_photo(rgb, logits, moments, settings.maps)[1]
        logits_CHW = torch.cat([band for _, band in rows_at_size(logits, H, W)], 1)
        sums = evaluation.begin()
        sums.update(logits_CHW, labels_HW, {name: found[name] for name in spread})
        evaluation.add(sums, cluster=of_cluster[image.stem])
    return evaluation, seconds


def _differences(one: Evaluation, other: Evaluation) -> dict[str, tuple[float, float]]:
    """Interval of what the other has more, replicate by replicate: both have the same weights."""
    ones, others = one.replicates(), other.replicates()
    found = {}
    for name in FIGURES.values():
        low, high = np.quantile(others[name] - ones[name], [0.025, 0.975])
        found[name] = float(low), float(high)
    return found


def _cell(value: float, interval: Iterable[float], sign: str = "") -> str:
    low, high = interval
    return f"{value:{sign}.4f} [{low:{sign}.3f}, {high:{sign}.3f}]"


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:  # the user's to mend: one line
        print(error, file=sys.stderr)
        sys.exit(2)
