"""One cell of the posterior study: nets trained on so many pictures of a scene, and all that they say held against the truth.

Nets are kept, so that what is judged can change without training again; what a cell found is one JSON file, written last.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from seguncert.apps.scene_folder import write_scene
from seguncert.apps.scene_nets import SceneRecipe, as_model, build, net_input, train_net
from seguncert.calibrating import calibrate
from seguncert.calibration import Calibration, CalibrationError
from seguncert.calibrators import KINDS, Scaling
from seguncert.detection import RIGHT, WRONG, Detection
from seguncert.hidden import HiddenObject
from seguncert.maps import MAPS
from seguncert.model import Model
from seguncert.posterior import Annotators
from seguncert.run import Result, analyse
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
SAMPLES, RANK, FORMAT = 20, 10, 2
BANDS = {
    "sure": (0.0, 0.1),
    "in between": (0.1, 0.5),
    "ambiguous": (0.5, 1.01),
}  # of the true entropy, as shares of ln C
LEAST = float(np.log(np.finfo(np.float32).tiny))  # what a probability counts as that float32 rounds to 0
STEP = 8  # of 255, of the adversary
SHIFT = (100, -100, 100)  # of 255, what makes colours that scenes hardly ever give
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
    odd: bool = False  # whether inputs that the scene hardly ever gives are shown too
    raters: int = 0  # of each picture to train on; 0: the scene's own labels, −1: its exact posterior

    @property
    def name(self) -> str:
        """Of its files."""
        raters = f"-raters{self.raters if self.raters > 0 else 'all'}" if self.raters else ""
        return f"{self.scene}-{self.number}-seed{self.seed}{raters}"

    @property
    def data(self) -> str:
        """All that decides what is trained on, in a digest: the scene with every number of it."""
        scene = SCENES[self.scene]
        shapes = scene.shapes.astype(int).tolist() if isinstance(scene, HiddenObject) else []
        return _digest(repr(scene), shapes, self.number, self.seed, self.raters)

    @property
    def key(self) -> str:
        """All that decides what is found, in a digest."""
        settings = [SAMPLES, RANK, FORMAT, STEP, SHIFT, BANDS, list(METHODS), TEST_SEED, FIT_SEED, version("seguncert")]
        return _digest(self.data, asdict(self), settings)


def find_cell(cell: Cell, out: Path) -> dict[str, Any]:
    """What the cell found, from its file if it is there and of the same settings, else trained and judged now."""
    torch.set_num_threads(1)
    file, key = out / "cells" / f"{cell.name}.json", cell.key
    if file.is_file():
        known = json.loads(file.read_text())
        if known.get("key") == key:
            found: dict[str, Any] = known
            return found
    for part in ("cells", "nets", "calibrations"):
        (out / part).mkdir(parents=True, exist_ok=True)
    rows = list(_soft_rows(cell, out) if cell.raters else _rows(cell, out))
    found = {"key": key, "cell": asdict(cell), "rows": rows}
    write_file(file, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def nets_of(cell: Cell, out: Path, train: bool = True) -> list[Model]:
    """The cell's nets: `members` of them with dropout, all trained on the same pictures, then one with a stochastic head.

    Raises ValueError where one is missing, or of other settings, and is not to be trained.
    """
    recipes = [cell.recipe] * cell.members + [replace(cell.recipe, rank=RANK)] * (not cell.raters)
    data: list[tuple[np.ndarray, np.ndarray]] = []
    found = []
    for number, recipe in enumerate(recipes):
        name = f"{cell.name}-{number}"
        file, key = out / "nets" / f"{name}.safetensors", _digest(cell.data, asdict(recipe), number)
        if (weights := _read_net(file, key)) is not None:
            net = build(len(SCENES[cell.scene].classes), recipe)
            net.load_state_dict(weights)
            net.eval()
        elif not train:
            raise ValueError(
                f"{file}: expected a net of this study. Received: none. `seguncert posterior study` makes it."
            )
        else:
            data = data or [_data(cell)]
            net = train_net(*data[0], len(SCENES[cell.scene].classes), recipe, seed=1000 * cell.seed + number)
            content = {key: value.contiguous() for key, value in net.state_dict().items()}
            write_file(file, save(content, {"key": key}))
        found.append(as_model(net, SCENES[cell.scene].classes, name))
    return found


def _data(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Pictures to train on, and their targets."""
    scene = SCENES[cell.scene]
    images, targets = scene.sample(cell.number, seed=cell.seed)
    if cell.raters > 0:
        images, said_NRHW = Annotators(scene, cell.raters).sample(cell.number, seed=cell.seed)
        shares = [(said_NRHW == c).mean(1, dtype=np.float32) for c in range(len(scene.classes))]
        targets = np.stack(shares, 1)
    elif cell.raters < 0:
        targets = np.stack([scene.posterior(image) for image in images]).astype(np.float32)
    return images, targets


def _read_net(file: Path, key: str) -> dict[str, Tensor] | None:
    """Weights, if they are there and were trained with just these settings."""
    if not file.is_file():
        return None
    with safe_open(file, "pt") as content:
        return load_file(file) if (content.metadata() or {}).get("key") == key else None


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


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
    yield from judged("none", lambda: broken(_fit(cell, models, fitted_on, out, "none", "temperature")), "broken: 3 T")
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
        true_HW = -np.where(truth_CHW > 0, truth_CHW * np.log(np.maximum(truth_CHW, 1e-300)), 0).sum(0)
        share_HW = true_HW / np.log(C)
        means = {}
        if moments is not None:
            expected_HW = moments.entropy_HW.double().numpy()
            means = {
                "expected_entropy": expected_HW, "expected_entropy_error": np.abs(expected_HW - true_HW),
                "mutual_information": moments.mutual_information_HW().double().numpy(),
            }  # fmt: skip
        masks = {"all": np.ones_like(share_HW, bool)} | {
            band: (share_HW >= low) & (share_HW < high) for band, (low, high) in BANDS.items()
        }
        for part, mask_HW in masks.items():
            if mask_HW.any():
                parts[part].update(
                    truth_CHW[:, mask_HW][:, None],
                    log_CHW[:, mask_HW][:, None],
                    {key: map_HW[mask_HW][None] for key, map_HW in result.maps.items()} if part == "all" else {},
                    {key: float(map_HW[mask_HW].mean()) for key, map_HW in means.items()},
                )
    kind = {"kind": fitted.kind} if isinstance(fitted, Calibration) else {}
    for part, truth in parts.items():
        if truth.pixels:
            yield row | {"where": part, "share": truth.pixels / parts["all"].pixels} | kind | _known(truth.compute())


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


def broken(right: Calibration, factor: float = 3.0) -> Calibration:
    """A calibration that is wrong on purpose, in the form of one that is not: a fitted temperature times a factor."""
    fitted = right.calibrator
    assert isinstance(fitted, Scaling)
    return replace(right, calibrator=replace(fitted, constant=fitted.constant - math.log(factor)))


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
    """Which map tells pixels that the scene hardly ever gives from its own; and what small steps against the first net do.

    The exact posterior of a picture that an adversary changed is known too: there predictions are judged as ever.
    """
    scene = SCENES[cell.scene]
    odd = {"noise": noise(images.shape), "unseen colours": unseen(images)}
    changed = np.stack([adversarial(models[0], image) for image in images])
    changed_truths = [scene.posterior(image) for image in changed]
    for method in METHODS:
        clean = [look(models, image, method) for image in images]
        for name, pictures in odd.items():
            found = {key: Detection.empty() for key in METHODS[method]}
            means = dict.fromkeys(METHODS[method], 0.0)
            for image, usual in zip(pictures, clean, strict=True):
                seen = look(models, image, method)
                for key, detection in found.items():
                    for result, outcome in ((usual, RIGHT), (seen, WRONG)):
                        doubt_HW = result.maps[key] if MAPS[key].sure_is == "low" else 1 - result.maps[key]
                        detection.update(doubt_HW.astype(np.float32), np.full(doubt_HW.shape, outcome, np.uint8), key)
                    means[key] += float(seen.maps[key].mean()) / len(pictures)
            row = {"method": method, "calibration": "none", "where": name} | {f"mean.{k}": v for k, v in means.items()}
            yield row | {f"tells.{key}": float(each.compute()["error_auroc"]) for key, each in found.items()}
        for row in _judge(cell, models, changed, changed_truths, method, None, "none"):
            if row["where"] == "all":
                yield row | {"where": "adversarial"}


def noise(shape: tuple[int, ...]) -> UInt8[np.ndarray, "N H W 3"]:
    """Every value alike, each by itself."""
    return np.random.default_rng([TEST_SEED, 1]).integers(0, 256, shape, dtype=np.uint8)


def unseen(images: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H W 3"]:
    """The pictures in colours that hardly any pixel of the scene has: `SHIFT` is added."""
    return np.clip(images.astype(np.int64) + np.array(SHIFT), 0, 255).astype(np.uint8)


def adversarial(model: Model, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """One step of `STEP` a value against the class that the net shows (fast gradient sign; Goodfellow et al. 2015)."""
    input_13HW = net_input(image[None]).requires_grad_()
    with torch.enable_grad():
        logits_1CHW = model.module(input_13HW)
        loss = torch.nn.functional.cross_entropy(logits_1CHW, logits_1CHW.argmax(1))
        (gradient_13HW,) = torch.autograd.grad(loss, input_13HW)
    sign_HW3 = gradient_13HW[0].sign().permute(1, 2, 0).numpy()
    return np.clip(image.astype(np.int64) + STEP * sign_HW3.astype(np.int64), 0, 255).astype(np.uint8)


def _known(values: dict[str, float]) -> dict[str, float]:
    """Without those that are undefined."""
    return {name: value for name, value in values.items() if not math.isnan(value)}
