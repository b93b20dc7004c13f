"""One cell of the posterior study: nets trained on so many pictures of a scene, and all that they say held against the truth.

Nets are kept, so that what is judged can change without training again; what a cell found is one JSON file, written last.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from safetensors.torch import load_file, save_file

from seguncert.apps.scene_folder import write_scene
from seguncert.apps.scene_nets import SceneRecipe, as_model, build, net_input, train_net
from seguncert.calibrating import calibrate
from seguncert.calibration import KINDS, Calibration, CalibrationError, Scaling
from seguncert.detection import RIGHT, WRONG, Detection
from seguncert.maps import MAPS
from seguncert.model import Model
from seguncert.posterior import Annotators
from seguncert.run import Result, Settings, analyse
from seguncert.scenes import SCENES
from seguncert.store import write_file
from seguncert.truth import Truth

METHODS = {
    "none": ("confidence", "entropy", "margin"),
    "mc-dropout": ("confidence", "entropy", "margin", "mutual_information", "variance", "expected_entropy"),
    "sampling-free": ("confidence", "entropy", "margin", "mutual_information", "variance", "expected_entropy"),
    "tta": ("confidence", "entropy", "margin", "mutual_information", "variance", "expected_entropy"),
    "ensemble": ("confidence", "entropy", "margin", "mutual_information", "variance", "expected_entropy"),
    "stochastic-head": ("confidence", "entropy", "margin", "mutual_information", "variance", "expected_entropy"),
}
CALIBRATED = ("none", "mc-dropout", "ensemble")  # methods for which `auto` is fitted too
SAMPLES = 20
BANDS = {
    "sure": (0.0, 0.1),
    "in between": (0.1, 0.5),
    "ambiguous": (0.5, 1.01),
}  # of the true entropy, as shares of ln C
LEAST = float(np.log(np.finfo(np.float32).tiny))  # what a probability counts as that float32 rounds to 0
STEP = 8  # of 255, of the adversary
TEST_SEED, FIT_SEED = 10_000_019, 20_000_003


@dataclass(frozen=True)
class Cell:
    """Which scene, how many pictures to train on, and the seed that draws these and the nets."""

    scene: str
    number: int
    seed: int
    recipe: SceneRecipe
    members: int = 3
    test: int = 60  # pictures judged
    fit: int = 60  # pictures to calibrate on
    odd: bool = False  # whether inputs that the scene never gives are shown too
    raters: int = 0  # of each picture to train on; 0: the scene's own labels, −1: its exact posterior

    @property
    def name(self) -> str:
        """Of its files."""
        raters = f"-raters{self.raters if self.raters > 0 else 'all'}" if self.raters else ""
        return f"{self.scene}-{self.number}-seed{self.seed}{raters}"


def find_cell(cell: Cell, out: Path) -> dict[str, Any]:
    """What the cell found, from its file if it is there and of the same settings, else trained and judged now."""
    torch.set_num_threads(1)
    file, wanted = out / "cells" / f"{cell.name}.json", json.loads(json.dumps(asdict(cell)))
    if file.is_file():
        known = json.loads(file.read_text())
        if known["cell"] == wanted:
            found: dict[str, Any] = known
            return found
    for part in ("cells", "nets", "calibrations"):
        (out / part).mkdir(parents=True, exist_ok=True)
    rows = list(_soft_rows(cell, out) if cell.raters else _rows(cell, out))
    write_file(file, json.dumps({"cell": wanted, "rows": rows}, indent=1, allow_nan=True) + "\n")
    return {"cell": wanted, "rows": rows}


def nets_of(cell: Cell, out: Path) -> list[Model]:
    """The cell's nets: `members` of them with dropout, all trained on the same pictures, then one with a stochastic head."""
    scene = SCENES[cell.scene]
    images, targets = scene.sample(cell.number, seed=cell.seed)
    recipes = [cell.recipe] * cell.members
    if cell.raters > 0:
        images, said_NRHW = Annotators(scene, cell.raters).sample(cell.number, seed=cell.seed)
        shares = [(said_NRHW == c).mean(1, dtype=np.float32) for c in range(len(scene.classes))]
        targets = np.stack(shares, 1)
    elif cell.raters < 0:
        targets = np.stack([scene.posterior(image) for image in images]).astype(np.float32)
    else:
        recipes.append(SceneRecipe(**asdict(cell.recipe) | {"rank": 10}))
    return [_net(cell, out, images, targets, recipe, number) for number, recipe in enumerate(recipes)]


def _net(cell: Cell, out: Path, images: np.ndarray, targets: np.ndarray, recipe: SceneRecipe, number: int) -> Model:
    classes = SCENES[cell.scene].classes
    name = f"{cell.name}-{number}"
    file, settings = out / "nets" / f"{name}.safetensors", json.dumps(asdict(recipe))
    if file.is_file() and (about := file.with_suffix(".json")).is_file() and about.read_text() == settings:
        net = build(len(classes), recipe)
        net.load_state_dict(load_file(file))
        net.eval()
    else:
        net = train_net(images, targets, len(classes), recipe, seed=1000 * cell.seed + number)
        part = file.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, part)
        part.replace(file)
        write_file(file.with_suffix(".json"), settings)
    return as_model(net, classes, name)


def _rows(cell: Cell, out: Path) -> Iterator[dict[str, Any]]:
    """Figures, one row for each way of predicting and each kind of pixels."""
    scene = SCENES[cell.scene]
    models = nets_of(cell, out)
    images, _ = scene.sample(cell.test, TEST_SEED)
    truths = [scene.posterior(image) for image in images]
    judged = partial(_judge, cell, models, images, truths)
    for method in METHODS:
        yield from judged(method, None, "none")
    fitted_on = write_pictures(cell.scene, cell.fit, out)
    for method, kind in [*(("none", kind) for kind in KINDS), *((method, "auto") for method in CALIBRATED)]:
        yield from judged(method, partial(_fit, cell, models, fitted_on, out, method, kind), kind)
    yield from judged("none", lambda: broken(models[0]), "broken: T = 3")
    swapped = write_pictures(cell.scene, cell.fit, out, swapped=True)
    yield from judged("none", partial(_fit, cell, models, swapped, out, "none", "vector", "-swapped"), "broken: classes swapped")  # fmt: skip
    if cell.odd:
        yield from _odd_rows(cell, models, images, truths)


def _soft_rows(cell: Cell, out: Path) -> Iterator[dict[str, Any]]:
    scene = SCENES[cell.scene]
    images, _ = scene.sample(cell.test, TEST_SEED)
    truths = [scene.posterior(image) for image in images]
    yield from _judge(cell, nets_of(cell, out), images, truths, "none", None, "none")


def _models(models: Sequence[Model], method: str) -> Model | list[Model]:
    if method == "stochastic-head":
        return models[-1]
    return list(models[:-1]) if method == "ensemble" else models[0]


def look(models: Sequence[Model], image: UInt8[np.ndarray, "H W 3"], method: str, calibration: Any = None) -> Result:
    """`seguncert.analyse`, with the nets that the method takes and all of its maps."""
    drawn: dict[str, Any] = {"samples": SAMPLES} if method in ("mc-dropout", "stochastic-head") else {}
    return analyse(
        _models(models, method), image, method=method, maps=METHODS[method], calibration=calibration, **drawn
    )  # fmt: skip


def log_probs(result: Result) -> Float64[np.ndarray, "C H W"]:
    """ln of the probabilities, from the logits where nothing came after them, so that small ones are told apart."""
    if result.calibrator is None:
        logits_CHW = result.logits.double().clamp(min=LEAST) if result.moments else result.logits.double()
        return logits_CHW.log_softmax(0).numpy()
    with np.errstate(divide="ignore"):
        log_CHW = np.maximum(np.log(result.probabilities.astype(np.float64)), LEAST)
    return log_CHW - np.log(np.exp(log_CHW).sum(0))


def _judge(
    cell: Cell, models: Sequence[Model], images: np.ndarray, truths: Sequence[np.ndarray], method: str,
    calibration: Any, name: str,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """All pixels, and those of each band of true entropy; a calibration that cannot be fitted is a row that says why."""
    row = {"method": method, "calibration": name}
    try:
        fitted = calibration() if calibration else None
    except CalibrationError as error:
        yield row | {"where": "all", "refused": str(error)}
        return
    parts = {"all": Truth(), **{band: Truth() for band in BANDS}}
    for image, truth_CHW in zip(images, truths, strict=True):
        result = look(models, image, method, fitted)
        log_CHW, moments, C = log_probs(result), result.moments, len(truth_CHW)
        means = {}
        if moments is not None:
            means = {"expected_entropy": moments.entropy_HW, "mutual_information": moments.mutual_information_HW()}
        share_HW = -np.where(truth_CHW > 0, truth_CHW * np.log(np.maximum(truth_CHW, 1e-300)), 0).sum(0) / np.log(C)
        masks = {"all": np.ones_like(share_HW, bool)} | {
            band: (share_HW >= low) & (share_HW < high) for band, (low, high) in BANDS.items()
        }
        for part, mask_HW in masks.items():
            if mask_HW.any():
                parts[part].update(
                    truth_CHW[:, mask_HW][:, None],
                    log_CHW[:, mask_HW][:, None],
                    {key: map_HW[mask_HW][None] for key, map_HW in result.maps.items()} if part == "all" else {},
                    {key: float(map_HW.numpy()[mask_HW].mean(dtype=np.float64)) for key, map_HW in means.items()},
                )
    kind = {"kind": fitted.kind} if isinstance(fitted, Calibration) else {}
    for part, truth in parts.items():
        if truth.pixels:
            yield row | {"where": part, "share": truth.pixels / parts["all"].pixels} | kind | truth.compute()


def _fit(
    cell: Cell, models: Sequence[Model], pictures: Path, out: Path, method: str, kind: str, suffix: str = ""
) -> Calibration:
    """By `seguncert calibrate`'s own function, on files."""
    file = out / "calibrations" / f"{cell.name}-{method}-{kind}{suffix}.json"
    samples: dict[str, Any] = {"samples": SAMPLES} if method == "mc-dropout" else {}
    return calibrate(
        pictures / "images", pictures / "labels", file, _models(models, method), ignore_index=None, calibrator=kind,
        all_pixels=True, method=method, workers=1, **samples,
    ).calibration  # fmt: skip


def broken(model: Model, temperature: float = 3.0) -> Calibration:
    """A calibration that is wrong on purpose, in the form of one that is not: a temperature that nobody fitted."""
    of_model, sampling = Settings().fitted_for([model])
    return Calibration(Scaling("temperature", float(-np.log(temperature))), of_model, sampling)


def write_pictures(name: str, number: int, out: Path, swapped: bool = False) -> Path:
    """A labelled folder of a scene to calibrate on; once, also where several processes want it. `swapped`: labels of the next class."""
    folder = out / "pictures" / f"{name}-{number}{'-swapped' if swapped else ''}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            write_scene(name, Path(place) / "new", number, FIT_SEED, posteriors=False, shift=int(swapped))
            try:
                (Path(place) / "new").rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
    return folder


def _odd_rows(
    cell: Cell, models: Sequence[Model], images: UInt8[np.ndarray, "N H W 3"], truths: Sequence[np.ndarray]
) -> Iterator[dict[str, Any]]:
    """Which map tells pixels that the scene never gives from its own; and what small steps against the net do.

    The exact posterior of a picture that an adversary changed is known too, so there `kl` and the AUROC for `off` are given.
    """
    rng, scene = np.random.default_rng(TEST_SEED), SCENES[cell.scene]
    odd = {
        "noise": rng.integers(0, 256, images.shape, dtype=np.uint8),
        "unseen colours": (255 - images[..., ::-1]),
        "adversarial": np.stack([adversarial(models[0], image) for image in images]),
    }
    for method in METHODS:
        clean = [look(models, image, method) for image in images]
        for name, changed in odd.items():
            found = {key: Detection.empty() for key in METHODS[method]}
            means = dict.fromkeys(("confidence", *METHODS[method]), 0.0)
            truth = Truth()
            for image, usual in zip(changed, clean, strict=True):
                seen = look(models, np.ascontiguousarray(image), method)
                for key, detection in found.items():
                    for result, outcome in ((usual, RIGHT), (seen, WRONG)):
                        doubt_HW = result.maps[key] if MAPS[key].sure_is == "low" else 1 - result.maps[key]
                        detection.update(doubt_HW.astype(np.float32), np.full(doubt_HW.shape, outcome, np.uint8), key)
                    means[key] += float(seen.maps[key].mean()) / len(changed)
                if name == "adversarial":
                    truth.update(scene.posterior(image), log_probs(seen), seen.maps)
            row = {"method": method, "calibration": "none", "where": name} | {f"mean.{k}": v for k, v in means.items()}
            row |= {f"tells.{key}": float(each.compute()["error_auroc"]) for key, each in found.items()}
            yield row | (truth.compute() if truth.pixels else {})


def adversarial(model: Model, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """One step of `STEP` a value against the class that the net shows (fast gradient sign; Goodfellow et al. 2015)."""
    input_13HW = net_input(image[None]).requires_grad_()
    with torch.enable_grad():
        logits_1CHW = model.module(input_13HW)
        torch.nn.functional.cross_entropy(logits_1CHW, logits_1CHW.argmax(1)).backward()
    assert input_13HW.grad is not None
    sign_HW3 = input_13HW.grad[0].sign().permute(1, 2, 0).numpy()
    return np.clip(image.astype(np.int64) + STEP * sign_HW3.astype(np.int64), 0, 255).astype(np.uint8)
