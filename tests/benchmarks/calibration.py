"""What one temperature costs, in cross-entropy passes over the logits, and an ECE, in passes of `np.bincount`.

    python3 -m venv peers
    peers/bin/pip install fiducio netcal torch-uncertainty torchmetrics
    peers/bin/pip install -e .
    peers/bin/python tests/benchmarks/calibration.py IMAGES LABELS [--ignore-index 11] [--rounds 5] [--few 20]

One process, interleaved, median of the rounds; what takes over 20 s is run once. Times are the processor's, of one thread if
not said otherwise, so that they are those of a machine that does nothing else. The logits are those of the bundled `street`,
deterministic, float32, at the size of the photos; `--keep FOLDER` keeps them for the next run. Known to run with fiducio
0.2.0, netcal 1.4.0, torch-uncertainty 0.13.0 and torchmetrics 1.9.0; what is not installed is named and left out.
The packages want all logits at once and copy them several times, so they get `--few` of the images, at equal distances;
seguncert gets all.

images      that the way was given
passes      time over that of `torch.nn.functional.cross_entropy`, image by image, on the same images just before
memory      growth of the peak, in a process of its own that reads the logits from disk: those that have to be held
            at once are in it; MiB
T           against that of the float64 optimum over every labelled pixel of all images, and of the images it was given
bincount    ECE: time over that of `np.bincount((15 * confidence).astype(int), minlength=16)`, image by image, and over that of
            `np.bincount` alone, the bins being given
off         ECE of 15 bins, less that of a plain float64 sum; the packages get confidences and whether the class was right

fiducio has two optimizers, and takes a table of pixels as well: the last of its ways gets those that seguncert draws. netcal
takes probabilities; of float32 ones it returns T = 1, because its derivatives are differences over 1e-8.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import math
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from seguncert.calibrating import draw
from seguncert.fitting import MOST, RUN, Pixels, fit
from seguncert.image import read_image
from seguncert.labels import IGNORED, find_pairs, read_label
from seguncert.model import load_model
from seguncert.predict import predict_logits, rows_at_size
from seguncert.scores import M, Reliability

SLOW = 20.0  # seconds: what takes longer is run once
PASSES, MEMORY, OFF, BINCOUNT = 2.0, 100.0, 0.002, 0.8  # what ours is to keep


@dataclass(frozen=True)
class Pictures:
    """Logits of each picture, float32 (C, H, W), and its labels, uint8 (H, W); from disk one at a time, or all in memory."""

    folder: Path
    names: Sequence[str]
    held: dict[str, tuple[Tensor, np.ndarray]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        for name in self.names:
            yield self.read(name) if self.held is None else self.held[name]

    def read(self, name: str) -> tuple[Tensor, np.ndarray]:
        """From disk."""
        return torch.from_numpy(np.load(self.folder / f"{name}.logits.npy")), np.load(
            self.folder / f"{name}.labels.npy"
        )

    def all(self) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) and, −100 where there is no label, (B, H, W)."""
        logits, labels = zip(*self, strict=True)
        return torch.stack(logits), torch.from_numpy(
            np.where(np.stack(labels) == IGNORED, -100, np.stack(labels).astype(int))
        )

    def table(self) -> tuple[Tensor, Tensor]:
        """(N, C) and (N,), labelled pixels only."""
        found = [(z_CHW.flatten(1)[:, y_HW.ravel() != IGNORED], y_HW[y_HW != IGNORED]) for z_CHW, y_HW in self]
        return torch.cat([z_CN for z_CN, _ in found], 1).T.contiguous(), torch.from_numpy(np.concatenate([y for _, y in found]).astype(int))  # fmt: skip


@dataclass(frozen=True)
class Forecasts:
    """Confidences, float32 (N,), and whether the class was right, bool (N,), of each picture; as `Pictures`."""

    folder: Path
    names: Sequence[str]
    held: dict[str, tuple[np.ndarray, np.ndarray]] | None = None

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name in self.names:
            yield self.read(name) if self.held is None else self.held[name]

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """From disk."""
        return np.load(self.folder / f"{name}.confidence.npy"), np.load(self.folder / f"{name}.correct.npy")


Temperature = Callable[[Pictures], float]
Error = Callable[[Forecasts], float]


def drawn(pictures: Pictures, run: int = RUN, most: int = MOST) -> Pixels:
    pixels: Pixels | None = None
    for k, (logits_CHW, labels_HW) in enumerate(pictures):
        pixels = pixels or Pixels(len(logits_CHW), run=run, most=most)
        unseen = np.zeros((*labels_HW.shape, 3), np.uint8)  # a temperature does not look at the photo
        pixels.add(draw(pixels, logits_CHW, unseen, [labels_HW], str(k), ""))
    assert pixels is not None
    return pixels


def seguncert() -> Iterator[tuple[str, bool, Temperature]]:
    def temperature(pixels: Pixels) -> float:
        return math.exp(-fit("temperature", pixels).constant)  # type: ignore[union-attr]

    yield "one pixel of twenty, streaming", True, lambda pictures: temperature(drawn(pictures))
    yield "every pixel", False, lambda pictures: temperature(drawn(pictures, 1, 1 << 62))


def fiducio() -> Iterator[tuple[str, bool, Temperature]]:
    from fiducio import TemperatureScaling  # type: ignore[import-not-found]

    for about, settings in (("default, adam", {}), ("optimizer='lbfgs'", {"optimizer": "lbfgs"})):

        def run(pictures: Pictures, settings: dict[str, str] = settings) -> float:
            return TemperatureScaling(**settings).fit(*pictures.all()).temperature

        yield about, False, run

    def on_sample(pictures: Pictures) -> float:
        each = drawn(pictures).drawn
        table_NC, labels_N = (np.concatenate([getattr(e, name) for e in each]) for name in ("logits_NC", "votes_NC"))
        return TemperatureScaling(optimizer="lbfgs").fit(table_NC, labels_N.astype(int)).temperature

    yield "the same, on the pixels that seguncert draws", True, on_sample


def netcal() -> Iterator[tuple[str, bool, Temperature]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from netcal.scaling import TemperatureScaling  # type: ignore[import-not-found]

    for dtype in (torch.float32, torch.float64):

        def run(pictures: Pictures, dtype: torch.dtype = dtype) -> float:
            logits_NC, labels_N = pictures.table()
            scaling = TemperatureScaling().fit(
                logits_NC.to(dtype).softmax(1).numpy(), labels_N.numpy(), tensorboard=False
            )
            return 1 / float(scaling.temperature[0])  # what it calls temperature is what logits are multiplied with

        yield str(dtype).removeprefix("torch."), False, run


def torch_uncertainty() -> Iterator[tuple[str, bool, Temperature]]:
    from torch.utils.data import DataLoader, TensorDataset
    from torch_uncertainty.post_processing import TemperatureScaler  # type: ignore[import-not-found]

    def run(pictures: Pictures) -> float:
        scaler = TemperatureScaler()
        scaler.fit(DataLoader(TensorDataset(*pictures.all()), batch_size=4), progress=False)
        return 1 / scaler.inv_temp.item()

    yield "default", False, run


def seguncert_error() -> Error:
    def run(forecasts: Forecasts) -> float:
        bins = Reliability.empty()
        for confidence_N, correct_N in forecasts:
            bins.update(confidence_N, correct_N)
        return float(bins.ece())

    return run


def netcal_error() -> Error:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from netcal.metrics import ECE  # type: ignore[import-not-found]

    def run(forecasts: Forecasts) -> float:
        confidence_N, correct_N = map(np.concatenate, zip(*forecasts, strict=True))
        return float(ECE(M).measure(confidence_N, correct_N.astype(int)))

    return run


def metric_error(make: Callable[[], Callable[..., object]]) -> Error:
    def run(forecasts: Forecasts) -> float:
        metric = make()
        for confidence_N, correct_N in forecasts:
            metric.update(torch.from_numpy(confidence_N), torch.from_numpy(correct_N).int())  # type: ignore[attr-defined]
        return float(metric.compute())  # type: ignore[attr-defined]

    return run


def torchmetrics_error() -> Error:
    from torchmetrics.classification import BinaryCalibrationError

    return metric_error(lambda: BinaryCalibrationError(M))


def torch_uncertainty_error() -> Error:
    from torch_uncertainty.metrics import CalibrationError  # type: ignore[import-not-found]

    return metric_error(lambda: CalibrationError(task="binary", num_bins=M))


PACKAGES = {"seguncert": seguncert, "fiducio": fiducio, "netcal": netcal, "torch-uncertainty": torch_uncertainty}
ERRORS = {
    "seguncert": seguncert_error,
    "netcal": netcal_error,
    "torchmetrics": torchmetrics_error,
    "torch-uncertainty": torch_uncertainty_error,
}


def ways() -> tuple[dict[str, tuple[bool, Temperature]], dict[str, Error]]:
    """By name: whether it gets all images, and how it is run; and the same for the ECE."""
    temperatures: dict[str, tuple[bool, Temperature]] = {}
    errors: dict[str, Error] = {}
    logging.getLogger().setLevel(logging.ERROR)
    for package, make in PACKAGES.items():
        try:
            found = {f"{package} {version(package)}, {about}": (every, run) for about, every, run in make()}
            temperatures |= found
        except ImportError as error:
            print(f"{package}: not measured, {error.name} is not installed", file=sys.stderr)
    for package, make_error in ERRORS.items():
        try:
            errors[f"{package} {version(package)}"] = make_error()
        except ImportError as error:
            print(f"{package}, ECE: not measured, {error.name} is not installed", file=sys.stderr)
    return temperatures, errors


def cross_entropies(pictures: Pictures) -> float:
    assert pictures.held is not None
    with torch.inference_mode():
        return sum(float(cross_entropy(z_CHW[None], TARGETS[name][None], reduction="sum")) for name, (z_CHW, _) in ((name, pictures.held[name]) for name in pictures.names))  # fmt: skip


TARGETS: dict[str, Tensor] = {}  # of `cross_entropies`, −100 where there is no label


def optimum(pictures: Pictures) -> float:
    """T by Newton's method on 1/T, in float64, on every labelled pixel."""
    beta, step = 1.0, math.inf
    while abs(step) > 1e-9:
        slope = curvature = 0.0
        for logits_CHW, labels_HW in pictures:
            valid_N = torch.from_numpy(labels_HW != IGNORED).flatten()
            z_CN = logits_CHW.flatten(1)[:, valid_N].double()
            label_N = torch.from_numpy(labels_HW).flatten()[valid_N].long()
            p_CN = (beta * z_CN).softmax(0)
            mean_N = (p_CN * z_CN).sum(0)
            slope += float((mean_N - z_CN.gather(0, label_N[None])[0]).sum())
            curvature += float(((z_CN - mean_N).square() * p_CN).sum())
        step = slope / curvature
        beta -= step
    return 1 / beta


def plain_error(forecasts: Forecasts) -> float:
    """ECE by sums in float64."""
    gap_M, total = np.zeros(M), 0
    for confidence_N, correct_N in forecasts:
        bin_N = np.minimum((M * confidence_N).astype(int), M - 1)
        gap_M += np.bincount(bin_N, confidence_N.astype(np.float64) - correct_N, M)
        total += len(bin_N)
    return float(np.abs(gap_M).sum() / total)


def clock(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def growth(name: str, given: Pictures | Forecasts) -> float:
    """MiB by which the peak of this process rises above what it holds before; one image was worked on before that."""
    torch.set_num_threads(1)
    temperatures, errors = ways()
    run: Callable[..., float] = errors[name] if isinstance(given, Forecasts) else temperatures[name][1]
    run(type(given)(given.folder, given.names[:1]))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = status("VmRSS")
    run(given)
    return status("VmHWM") - before


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def growth_alone(name: str, given: Pictures | Forecasts) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        try:
            return alone.submit(growth, name, given).result()
        except BrokenProcessPool:
            return math.nan  # killed, for want of memory


@torch.inference_mode()
def predicted(images: Path, labels: Path, ignore_index: int, folder: Path) -> list[str]:
    """Everything on disk, unless it is there; the names of the pictures."""
    model, names = load_model("street", "cpu"), []
    for image, label in find_pairs(images, labels):
        names.append(image.stem)
        if (folder / f"{names[-1]}.correct.npy").is_file():
            continue
        labels_HW = read_label(label, len(model.classes), ignore_index)
        bands = rows_at_size(predict_logits(model, read_image(image).rgb), *labels_HW.shape)
        logits_CHW = torch.cat([band.clone() for _, band in bands], 1)
        confidence_HW, shown_HW = logits_CHW.softmax(0).max(0)
        valid_HW = labels_HW != IGNORED
        for kind, array in {
            "logits": logits_CHW.numpy(),
            "labels": labels_HW,
            "confidence": confidence_HW.numpy()[valid_HW],
            "correct": (shown_HW.numpy() == labels_HW)[valid_HW],
        }.items():
            np.save(folder / f"{names[-1]}.{kind}.npy", array)
    return names


def fitted(folder: Path, names: list[str], few: int, rounds: int, found: dict[str, tuple[bool, Temperature]]) -> None:
    held = {name: Pictures(folder, names).read(name) for name in names}
    TARGETS.update(
        {name: torch.from_numpy(np.where(y == IGNORED, -100, y.astype(int))) for name, (_, y) in held.items()}
    )
    some = [names[k] for k in np.linspace(0, len(names) - 1, min(few, len(names))).round().astype(int)]
    given = {True: Pictures(folder, names, held), False: Pictures(folder, some, held)}
    best = {every: optimum(pictures) for every, pictures in given.items()}
    pixels = sum(int((y != IGNORED).sum()) for _, y in held.values())
    C, H, W = held[names[0]][0].shape
    print(
        f"temperature: street, {len(names)} images, {W}x{H}, {C} classes, {pixels / 1e6:.1f} million labelled pixels;"
        f" float64 optimum T = {best[True]:.5f}, of {len(some)} images {best[False]:.5f}"
    )
    ratios: dict[str, list[float]] = {name: [] for name in found}
    passes: list[float] = []
    values = {name: run(given[every]) for name, (every, run) in list(found.items())[:1]}  # compiles what is compiled
    cross_entropies(given[True])
    slow: set[str] = set()
    for _ in range(rounds):
        for name, (every, run) in found.items():
            if name in slow:
                continue
            passes.append(clock(lambda every=every: cross_entropies(given[every])))  # type: ignore[misc]
            started = time.process_time()
            values[name] = run(given[every])
            taken = time.process_time() - started
            ratios[name].append(taken / passes[-1])
            if taken > SLOW:
                slow.add(name)
    print(f"{'':62} images  passes  memory       T   off all   off its own")
    for name, (every, _) in found.items():
        ratio, T = median(ratios[name]), values[name]
        memory = growth_alone(name, Pictures(folder, given[every].names))
        off = [abs(T / best[each] - 1) for each in (True, every)]
        remark = "   UNTOUCHED" if T == 1 else ""
        if name == next(iter(found)):
            remark = verdict({"passes": (ratio, PASSES), "memory": (memory, MEMORY), "T": (off[0], OFF)})
        print(f"{name:62} {len(given[every].names):6d}  {ratio:6.2f}  {memory:6.0f}  {T:.4f}   {off[0]:6.3%}      {off[1]:6.3%}{remark}", flush=True)  # fmt: skip


def counted(folder: Path, names: list[str], rounds: int, found: dict[str, Error]) -> None:
    held = {name: Forecasts(folder, names).read(name) for name in names}
    forecasts = Forecasts(folder, names, held)
    bins = [(M * confidence_N).astype(int) for confidence_N, _ in forecasts]
    right = plain_error(forecasts)

    def binned() -> None:
        for confidence_N, _ in forecasts:
            np.bincount((M * confidence_N).astype(int), minlength=M + 1)

    def alone() -> None:
        for bin_N in bins:
            np.bincount(bin_N, minlength=M + 1)

    values = {name: run(forecasts) for name, run in found.items()}
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for _ in range(3 * rounds):
        for name, run in found.items():
            one, other = clock(binned), clock(alone)
            taken = clock(lambda run=run: run(forecasts))  # type: ignore[misc]
            ratios[name].append((taken / one, taken / other))
    print(f"\nECE of {sum(map(len, bins)) / 1e6:.1f} million pixels: {right:.6f}")
    print(f"{'':62} bincount   alone  memory   off")
    for name in found:
        one, other = (median(each) for each in zip(*ratios[name], strict=True))
        memory = growth_alone(name, Forecasts(folder, names))
        remark = verdict({"bincount": (one, BINCOUNT)}) if name == next(iter(found)) else ""
        print(
            f"{name:62} {one:8.2f}  {other:6.2f}  {memory:6.0f}   {abs(values[name] - right):.0e}{remark}", flush=True
        )


def verdict(marks: dict[str, tuple[float, float]]) -> str:
    missed = [f"{name} {limit:g}" for name, (value, limit) in marks.items() if not value <= limit]
    return f"   MISSED: {', '.join(missed)}" if missed else "   kept"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    for option, value in {"ignore-index": 11, "rounds": 5, "few": 20, "threads": 1}.items():
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--keep", type=Path, help="folder for the logits; those that are there are not made again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    temperatures, errors = ways()
    print(f"{options.threads} threads, {options.rounds} rounds, torch {torch.__version__}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        names = predicted(options.images, options.labels, options.ignore_index, folder)
        fitted(folder, names, options.few, options.rounds, temperatures)
        counted(folder, names, options.rounds, errors)


if __name__ == "__main__":
    main()
