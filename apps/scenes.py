"""Does a calibration survive a change of scene? Fit on some drives, judge on another; print the table, and write the files.

    python -m seguncert.apps.scenes street IMAGES LABELS --left-out NET --left-out NET --left-out NET
        --more-images IMAGES --more-labels LABELS --ignore-index 11 [--write]

A scene is what stands before the first _ of an image's name. IMAGES are those the model was trained on: each is seen by
the net that was trained without its scene (`seguncert.apps.train --leave-out SCENE`), so its logits are as honest as on new
pictures. More images, which the model was not trained on, are seen by the model itself; they are scenes of their own, for
which the net has seen the place, though the others of that place may be among what is fitted on. Each kind of calibrator is
fitted on all scenes but one and judged on that one, all of its pixels; `auto` chooses by holding out scenes among those that
it is given. Pooled over the scenes held out, in brackets the middle 95 % of a bootstrap over blocks of neighbouring
pictures. Pixels to fit on are drawn from all pictures, one in twenty at most; judged is every `--every`-th picture. Their
logits and photos are held in memory: 14 MB a picture of `street`. Where fiducio is installed its calibrators are fitted on the same
pixels and judged by the same code, see `seguncert.apps.fiducio_kinds`; the best of them is named after the fact.

The last row is no calibrator but a mark to measure by: each picture softened by the temperature that fits its own labels
best, in NLL. Whoever softens pictures as a whole, by whatever tells which of them are strange, can hardly do better.

--write fits auto on all scenes and puts calibration-METHOD.json into the model's folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from seguncert.apps.fiducio_kinds import MISSING, fit_theirs, offered
from seguncert.calibrating import draw
from seguncert.calibration import Calibration, CalibrationError
from seguncert.calibrators import Calibrator, both_rows
from seguncert.clusters import find_clusters
from seguncert.evaluation import in_order
from seguncert.fitting import Candidate, Pixels, choose, fit
from seguncert.image import read_image
from seguncert.job import available_cores
from seguncert.labels import IGNORED, find_pairs, read_labels
from seguncert.metrics import Evaluation, ImageScores
from seguncert.model import Model, load_model
from seguncert.run import Settings, predict_photo
from seguncert.scores import boundary_band
from seguncert.surroundings import FEATURES

ORACLE = "each photo's own temperature"
KINDS = ("none", "temperature", "vector", "class-conditional", "isotonic", "local", "neighbourhood", "auto")
FIGURES = {
    "NLL / nat": "nll", "ECE": "ece", "ECE of a picture": "ece_image_mean", "class-wise ECE": "ece_classwise",
    "boundary ECE": "ece_boundary", "Brier": "brier", "AURC": "aurc.confidence",
}  # fmt: skip
SAMPLE = 1 << 19  # pixels to fit on
BAND = 3  # pixels on either side of a boundary


@dataclass(frozen=True)
class Picture:
    """A labelled picture and the net that has not seen its scene."""

    image: Path
    label: Path
    scene: str
    net: Model

    @property
    def name(self) -> str:
        """Unique, and in the order of the drive."""
        return f"{self.scene}/{self.image.name}"


@dataclass(frozen=True)
class Labelled:
    """A picture to be judged."""

    logits_Chw: Float[Tensor, "C h w"]
    photo_HW3: UInt8[np.ndarray, "H W 3"]
    labels_HW: UInt8[np.ndarray, "H W"]


def main(
    model: Annotated[str, typer.Argument(help="bundled model or model folder")],
    images: Annotated[Path, typer.Argument(help="that the model was trained on")],
    labels: Path,
    left_out: Annotated[list[str], typer.Option(help="folder of a net trained without a scene; several")],
    more_images: Annotated[Path | None, typer.Option(help="that the model was not trained on")] = None,
    more_labels: Path | None = None,
    ignore_index: Annotated[int | None, typer.Option(help="label of pixels that do not count")] = None,
    method: Annotated[list[str] | None, typer.Option(help="as of seguncert export [default: none, mc-dropout]")] = None,
    samples: int = 20,
    every: Annotated[int, typer.Option(min=1, help="of so many pictures one is judged")] = 3,
    without: Annotated[list[str] | None, typer.Option(help="scene to do without, neither fitted on nor judged")] = None,
    write: Annotated[bool, typer.Option("--write", help="put calibration-METHOD.json into the model's folder")] = False,
) -> None:
    """Measure, print, write."""
    net = load_model(model)
    if (more_images is None) != (more_labels is None):
        raise ValueError("more-images, more-labels: expected both or neither. Received: one of them")
    more = find_pairs(more_images, more_labels) if more_images and more_labels else []
    seen = [Picture(*pair, f"{_scene(pair[0])}, known", net) for pair in more]
    pairs, leave = find_pairs(images, labels), set(without or [])
    scenes = {_scene(image) for image, _ in pairs} | {picture.scene for picture in seen}
    if leave - scenes:
        raise ValueError(f"without: expected one of {'; '.join(sorted(scenes))}. Received: {'; '.join(sorted(leave - scenes))}")  # fmt: skip
    pictures = _pictures(net, pairs, [load_model(each) for each in left_out], leave)
    pictures += [picture for picture in seen if picture.scene not in leave]
    console = Console(width=320)
    for name in method or ["none", "mc-dropout"]:
        drawn = {"samples": samples} if "mc-dropout" in name else {}
        settings = Settings(name, **drawn)  # type: ignore[arg-type]
        pixels, kept = collect(pictures, settings, ignore_index, every)
        table = Table("calibrator", *FIGURES, "labels changed", "NLL less none's", *sorted({p.scene for p in pictures}))
        judged, notes = judge(pixels, kept)
        for row in _rows(judged):
            table.add_row(*row)
        count = len({part for part in find_clusters([p.name for p in pictures if p.name in kept]).of.values()})
        console.print(
            f"\n{model}, sha256 {net.sha256[:12]}…, method {name}, {len(pictures)} pictures to fit on ({len(pixels)} pixels),"
            f" {len(kept)} judged, in {count} clusters, boundary {BAND} px, ignore index {ignore_index}"
        )
        console.print(table)
        for note in notes:
            console.print(note)
        if write:
            chosen, candidates, how = choose(pixels)
            _save(net, settings, pixels, chosen, candidates, how, judged, samples, ignore_index, pictures, console)


def _scene(image: Path) -> str:
    return image.stem.split("_")[0]


def _pictures(net: Model, pairs: list[tuple[Path, Path]], left_out: list[Model], leave: set[str]) -> list[Picture]:
    """Of all scenes but those to leave, each with the net that was trained without its scene."""
    without = {scene: each for each in left_out for scene in (each.card.get("recipe") or {}).get("leave_out") or []}
    if any(each.classes != net.classes for each in left_out):
        raise ValueError(f"left-out: expected nets of the classes of {net.name}. Received: others")
    found = []
    for image, label in pairs:
        if _scene(image) in leave:
            continue
        if _scene(image) not in without:
            raise ValueError(
                f"left-out: expected a net trained without {_scene(image)}. Received: ones without"
                f" {', '.join(without) or 'anything'}. Train it with seguncert.apps.train --leave-out {_scene(image)}."
            )
        found.append(Picture(image, label, _scene(image), without[_scene(image)]))
    return found


def collect(
    pictures: list[Picture], settings: Settings, ignore_index: int | None, every: int
) -> tuple[Pixels, dict[str, Labelled]]:
    """Pixels of all pictures, and those to be judged; each is predicted once."""
    net = pictures[0].net
    pixels = Pixels(len(net.classes), tuple(FEATURES), net.frame, most=SAMPLE)
    samplers = {
        id(each): settings.sampler([each]) if settings.method != "none" else None
        for each in {id(p.net): p.net for p in pictures}.values()
    }
    kept = dict[str, Labelled]()

    def task(picture: Picture) -> Any:
        rgb = read_image(picture.image).rgb
        (labels_HW,) = read_labels([picture.label], pixels.C, ignore_index, *rgb.shape[:2])
        logits = predict_photo(picture.net, samplers[id(picture.net)], rgb, settings)[0]
        drawn = draw(pixels, logits, rgb, [labels_HW], picture.name, picture.scene)
        return drawn, Labelled(logits, rgb, labels_HW)

    tasks = ((lambda p=picture: task(p)) for picture in pictures)
    for number, (drawn, labelled) in enumerate(
        track(in_order(tasks, available_cores()), settings.method, len(pictures), console=Console(stderr=True))
    ):
        pixels.add(drawn)
        if number % every == 0:
            kept[pictures[number].name] = labelled
    return pixels, kept


@dataclass(frozen=True)
class Judged:
    """A kind of calibrator on the scenes held out: sums of all, sums by scene, and how many labels it changed."""

    kind: str
    pooled: Evaluation
    of_scene: dict[str, Evaluation]
    changed: int


def judge(pixels: Pixels, kept: dict[str, Labelled]) -> tuple[list[Judged], list[str]]:
    """Each kind, fitted without a scene, on that scene; what auto took, and what there is of fiducio."""
    C, scenes = pixels.C, sorted({each.group for each in pixels.drawn})
    clusters = find_clusters(list(kept)).of
    fitted: dict[tuple[str, str], Calibrator | None] = {}
    notes, theirs = [], offered(len(scenes) - 1)
    for scene in scenes:
        rest = pixels.only(lambda each, scene=scene: each.group != scene)  # type: ignore[misc]
        for kind in KINDS[1:-1]:
            fitted[kind, scene] = fit(kind, rest)
        kind = choose(rest)[0]
        fitted["auto", scene] = fitted.get((kind, scene))
        notes.append(f"auto, {scene} held out: {kind}")
        fits = in_order((partial(fit_theirs, kind, rest) for kind in theirs), available_cores())
        shown = track(fits, f"fiducio, {scene} held out", len(theirs), console=Console(stderr=True), disable=not theirs)
        for kind, each in zip(theirs, shown, strict=True):
            fitted[kind, scene] = each
    fitted |= {(ORACLE, name): _own(pixels, name) for name in kept}
    judged = []
    for kind in track([*KINDS, *theirs, ORACLE], "judging", console=Console(stderr=True)):
        pooled, changed = Evaluation.empty(C, ignore_index=IGNORED, maps={}), 0
        of_scene = {scene: Evaluation.empty(C, ignore_index=IGNORED, maps={}) for scene in scenes}
        scene_of = {name: name.split("/")[0] for name in kept}
        known_by = scene_of if kind != ORACLE else {name: name for name in kept}
        sums = (partial(_sums, pooled, fitted.get((kind, known_by[name])), each) for name, each in kept.items())
        for name, (image, off) in zip(kept, in_order(sums, available_cores()), strict=True):
            changed += off
            for evaluation in (pooled, of_scene[scene_of[name]]):
                evaluation.add(image, cluster=clusters[name])
        judged.append(Judged(kind, pooled, of_scene, changed))
    by_nll = sorted((each.pooled.compute()["nll"], each.kind) for each in judged if each.kind in theirs)
    notes += [f"fiducio's best: {by_nll[0][1].removeprefix('fiducio ')}" if by_nll else MISSING]
    return judged, notes


def _own(pixels: Pixels, picture: str) -> Calibrator | None:
    """The temperature that a picture's own labels ask for; None where there is none, as where all are right."""
    try:
        return fit("temperature", pixels.only(lambda each: each.picture == picture))
    except CalibrationError:
        return None


def _sums(evaluation: Evaluation, calibrator: Calibrator | None, labelled: Labelled) -> tuple[ImageScores, int]:
    """Of one picture, and how many labels the calibrator changed."""
    labels_HW = labelled.labels_HW
    sums, changed, band_HW = evaluation.begin(), 0, boundary_band(labels_HW, BAND, ignore_index=IGNORED)
    with torch.inference_mode():
        for rows, before_CRW, after_CRW in both_rows(calibrator, labelled.logits_Chw, labelled.photo_HW3):
            sums.update(after_CRW, labels_HW[rows], {}, band_HW[rows])
            changed += int((before_CRW.argmax(0) != after_CRW.argmax(0)).sum())
    return sums, changed


def _rows(judged: list[Judged]) -> Iterable[list[str]]:
    none = judged[0].pooled.replicates()["nll"]
    for each in judged:
        values, intervals, off = each.pooled.compute(), each.pooled.intervals(), each.pooled.replicates()["nll"] - none
        low, high = np.nanquantile(off, [0.025, 0.975])
        gain = values["nll"] - judged[0].pooled.compute()["nll"]
        yield [
            each.kind,
            *(f"{values[n]:.4f} [{intervals[n][0]:.3f}, {intervals[n][1]:.3f}]" for n in FIGURES.values()),
            str(each.changed),
            f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]",
            *(f"{e.compute()['nll']:.4f}" for _, e in sorted(each.of_scene.items())),
        ]


def _save(
    net: Model,
    settings: Settings,
    pixels: Pixels,
    kind: str,
    candidates: list[Candidate],
    how: dict[str, Any],
    judged: list[Judged],
    samples: int,
    ignore_index: int | None,
    pictures: list[Picture],
    console: Console,
) -> None:
    """Fit what auto took on all scenes, and write it beside the model."""
    if net.folder is None:
        raise ValueError(f"write: expected a model of a folder. Received: {net.name}")
    nets = {picture.net.sha256: picture.scene for picture in pictures if picture.net is not net}
    protocol = {
        "pictures": len(pictures), "pixels": len(pixels), "raters": 1, "ignore_index": ignore_index,
        "samples": samples if "mc-dropout" in settings.method else None, "seed": pixels.seed, "asked_for": "auto",
        "held_out": how, "left_out": {scene: digest for digest, scene in nets.items()}, "seguncert": version("seguncert"),
    }  # fmt: skip
    told = {name: each.pooled for name in ("none", kind) for each in judged if each.kind == name}
    figures = {
        name: {figure: float(pooled.compute()[figure]) for figure in FIGURES.values()} | {"reliability": _bins(pooled)}
        for name, pooled in told.items()
    }
    measured = {"candidates": [asdict(each) for each in candidates], "scenes_held_out": figures}
    calibrator = None if kind == "none" else fit(kind, pixels)
    file = net.folder / f"calibration-{settings.method}.json"
    Calibration(calibrator, *settings.fitted_for([net]), protocol, measured).save(file)
    console.print(f"wrote {kind} to {file}")


def _bins(pooled: Evaluation) -> dict[str, list[float]]:
    """Of the reliability diagram of all pixels, inside of things and along their boundaries."""
    parts = [vars(each) for each in pooled.reliability().values()]
    return {key: sum(part[key] for part in parts).tolist() for key in parts[0]}


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:  # the user's to mend: one line
        print(error, file=sys.stderr)
        sys.exit(2)
