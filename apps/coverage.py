"""Do conformal sets keep their promise? Over random halves of one set of images, or from one scene to another.

    python -m seguncert.apps.coverage nuclei IMAGES LABELS --foreground 1
    python -m seguncert.apps.coverage MODEL IMAGES LABELS --ignore-index 11 --shift-images IMAGES --shift-labels LABELS

The first fits on one half of the images and tests on the other, many times: there the promises must hold, and the share
of images has an exact law. The second fits on all IMAGES and tests on others, for which nothing is promised, and prints by
how much it misses; intervals are over blocks of consecutive frames, and speak of that scene only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from seguncert.conformal import KINDS, Aim, ImageLosses, Losses, Sizes, images_needed, risk_control
from seguncert.coverage import Coverage, beta_binomial_pmf, binomial_pmf, central_band
from seguncert.image import read_image
from seguncert.labels import IGNORED, find_pairs, read_label
from seguncert.model import Model, load_model
from seguncert.predict import rows_at_size
from seguncert.run import Settings, predict_photo

Bands = list[tuple[torch.Tensor, np.ndarray]]


def main(
    model: Annotated[str, typer.Argument(help="bundled model or model folder")],
    images: Path,
    labels: Path,
    ignore_index: Annotated[int | None, typer.Option(help="label of pixels that do not count")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="loss that is allowed, several times")] = None,
    covered: Annotated[float, typer.Option(help="share of its pixels that makes an image count as covered")] = 0.95,
    foreground: Annotated[list[int] | None, typer.Option(help="classes of which little may be missed")] = None,
    splits: Annotated[int, typer.Option(help="random halves")] = 200,
    seed: int = 0,
    figure: Annotated[Path | None, typer.Option(help="PNG of the splits against their exact law")] = None,
    shift_images: Annotated[Path | None, typer.Option(help="test on these rather than on halves")] = None,
    shift_labels: Path | None = None,
    shift_only: Annotated[str, typer.Option(help="only images whose name begins so")] = "",
    block: Annotated[int, typer.Option(help="consecutive frames that are one cluster")] = 10,
) -> None:
    """Measure and print."""
    net = load_model(model)
    alphas, console = alpha or [0.1, 0.05], Console(width=150)
    aims = [Aim(len(net.classes), kind) for kind in KINDS[:3]]
    if foreground:
        aims.append(Aim(len(net.classes), "foreground", foreground=tuple(foreground)))
    pairs = find_pairs(images, labels)
    console.print(f"{model}, sha256 {net.sha256[:12]}…, {images}, ignore index {ignore_index}")
    if shift_images is None:
        kept = collect(net, pairs, ignore_index, aims)
        results = [
            run_splits(name, each, a, covered, splits, seed)
            for name, each in kept.items()
            for a in alphas
            if len(each.losses_IK) // 2 >= images_needed(a)
        ]
        console.print(table_of_pixels(results), table_of_images(results))
        if figure is not None:
            draw(results, figure)
        return
    others = [
        pair for pair in find_pairs(shift_images, shift_labels or shift_images) if pair[0].name.startswith(shift_only)
    ]
    aims = [replace(aim, covered=level) for aim in aims for level in (None, covered)]
    aims.append(Aim(len(net.classes), "lac", by_class=True))
    coverages = shifted(net, pairs, others, ignore_index, aims, alphas, block)
    console.print(f"tested on {shift_images}/{shift_only}*: {len(others)} images in blocks of {block}")
    console.print(table_of_shift(coverages), table_of_classes(net, coverages))
    console.print(f"What was promised, of the first: {coverages[0].sets.promise}")


@dataclass(frozen=True)
class Kept:
    """Of I images: loss, and mean size of the sets, at each of K thresholds."""

    losses_IK: np.ndarray
    sizes_IK: np.ndarray


@dataclass(frozen=True)
class Splits:
    """What came of random halves: n images to fit on, m to test on."""

    name: str
    alpha: float
    covered: float
    n: int
    m: int
    share: np.ndarray  # mean over test images of the share covered, for each split
    size: np.ndarray
    enough: np.ndarray  # test images of which `covered` or more is covered, with sets that promise that
    enough_size: np.ndarray


def predictions(
    net: Model, pairs: Sequence[tuple[Path, Path]], ignore_index: int | None
) -> Iterator[tuple[Path, Bands]]:
    """Logits and labels of each image at its own size; the net sees it once."""
    settings = Settings()
    with torch.inference_mode():
        for image, label in pairs:
            rgb, labels_HW = read_image(image).rgb, read_label(label, len(net.classes), ignore_index)
            H, W = labels_HW.shape
            sampler = settings.sampler([net]) if settings.needs_sampler(net, H, W) else None
            logits = predict_photo(net, sampler, rgb, settings)[0]
            yield image, [(logits_CRW, labels_HW[rows]) for rows, logits_CRW in rows_at_size(logits, H, W)]


def losses_of(aim: Aim, bands: Bands) -> ImageLosses:
    """Scores of the true classes of an image."""
    image = ImageLosses(aim, IGNORED)
    for logits_CRW, labels_RW in bands:
        image.update(logits_CRW, labels_RW)
    return image


def collect(
    net: Model, pairs: Sequence[tuple[Path, Path]], ignore_index: int | None, aims: Sequence[Aim]
) -> dict[str, Kept]:
    """The losses of images that have any, by kind."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {aim.kind: [] for aim in aims}
    for _, bands in predictions(net, pairs, ignore_index):
        for aim in aims:
            losses_K = losses_of(aim, bands).losses_GK()[0]
            if np.isnan(losses_K[0]):
                continue
            sizes = Sizes.empty(aim, ignore_index=IGNORED)
            for logits_CRW, labels_RW in bands:
                sizes.update(logits_CRW, labels_RW)
            sizes_K = sizes.counts_GK[0].cumsum() / sizes.pixels
            found[aim.kind].append((losses_K.astype(np.float32), sizes_K.astype(np.float32)))
    return {kind: Kept(*map(np.stack, zip(*rows, strict=True))) for kind, rows in found.items() if rows}


def run_splits(name: str, kept: Kept, alpha: float, covered: float, splits: int, seed: int) -> Splits:
    """Fit both promises on one half and test on the other, for the same halves whatever the kind and α."""
    rng = np.random.default_rng(seed)
    total = len(kept.losses_IK)
    n, m = total // 2, total - total // 2
    missed_IK = kept.losses_IK > 1 - covered + 1e-6
    rows = []
    for _ in range(splits):
        order = rng.permutation(total)
        fit, test = order[:n], order[n:]
        row: list[float] = []
        for losses_IK in (kept.losses_IK, missed_IK):
            k = risk_control(losses_IK[fit].sum(0, dtype=np.float64), n, alpha)
            assert k is not None
            row += [1 - losses_IK[test, k].mean(dtype=np.float64), kept.sizes_IK[test, k].mean(dtype=np.float64)]
        rows.append(row)
    share, size, enough, enough_size = np.array(rows).T
    return Splits(name, alpha, covered, n, m, share, size, np.rint(enough * m).astype(int), enough_size)


def shifted(
    net: Model,
    pairs: Sequence[tuple[Path, Path]],
    others: Sequence[tuple[Path, Path]],
    ignore_index: int | None,
    aims: Sequence[Aim],
    alphas: Sequence[float],
    block: int,
) -> list[Coverage]:
    """Coverage on the others of sets fitted on the pairs."""
    fits = [Losses.empty(aim, ignore_index=IGNORED) for aim in aims]
    for _, bands in predictions(net, pairs, ignore_index):
        for fit in fits:
            fit.add(losses_of(fit.aim, bands))
    coverages = [Coverage.empty(fit.fit(alpha), ignore_index=IGNORED) for alpha in alphas for fit in fits]
    for number, (path, bands) in enumerate(predictions(net, others, ignore_index)):
        for coverage in coverages:
            image = coverage.begin()
            for logits_CRW, labels_RW in bands:
                image.update(logits_CRW, labels_RW)
            coverage.add(image, name=path.name, cluster=f"block {number // block}")
    return coverages


def table_of_pixels(results: Sequence[Splits]) -> Table:
    """The promise of an expected share of pixels."""
    table = Table(title="Expected share of an image's pixels that is covered: promised at least 1 − α")
    for column in (
        "kind",
        "α",
        "fitted, tested",
        "promised",
        "mean of splits ± s.e.",
        "sd of splits",
        "kept",
        "mean size",
    ):
        table.add_column(column)
    for each in results:
        error = each.share.std(ddof=1) / math.sqrt(len(each.share))
        kept = "yes" if each.share.mean() + 3 * error >= 1 - each.alpha else "NO"
        table.add_row(
            each.name, f"{each.alpha:g}", f"{each.n}, {each.m}", f"≥ {1 - each.alpha:.3f}",
            f"{each.share.mean():.4f} ± {error:.4f}", f"{each.share.std(ddof=1):.4f}", kept, f"{each.size.mean():.3f}",
        )  # fmt: skip
    table.caption = "without ties at most 2/(n + 1) above the promise; kept: not 3 standard errors (s.e.) below it"
    return table


def table_of_images(results: Sequence[Splits]) -> Table:
    """The promise of a share of images, and its exact law."""
    level = results[0].covered
    table = Table(title=f"Share of images with at least {level:g} of their pixels covered: promised at least 1 − α")
    for column in (
        "kind", "α", "promised", "exact mean", "mean of splits ± s.e.", "95 % band of one split",
        "splits below, in, above", "expected in (95 %)", "in its band", "mean size",
    ):  # fmt: skip
        table.add_column(column)
    for each in results:
        S, pmf_K = len(each.enough), beta_binomial_pmf(each.m, each.n, each.alpha)
        low, high = central_band(pmf_K)
        below, above = int((each.enough < low).sum()), int((each.enough > high).sum())
        least, most = central_band(binomial_pmf(S, float(pmf_K[low : high + 1].sum())))
        inside = S - below - above
        verdict = "yes" if least <= inside else ("above: ties" if below <= S - least else "NO")
        mean, error = each.enough.mean() / each.m, each.enough.std(ddof=1) / each.m / math.sqrt(S)
        table.add_row(
            each.name, f"{each.alpha:g}", f"≥ {1 - each.alpha:.3f}", f"{pmf_K @ np.arange(each.m + 1) / each.m:.4f}",
            f"{mean:.4f} ± {error:.4f}", f"{low} to {high} of {each.m}", f"{below}, {inside}, {above}",
            f"{least} to {most} of {S}", verdict, f"{each.enough_size.mean():.3f}",
        )  # fmt: skip
    table.caption = (
        "the band is of the beta-binomial law, exact without ties; sets that are never empty have ties and cover more"
    )
    return table


def table_of_shift(coverages: Sequence[Coverage]) -> Table:
    """What came of promises that nothing supports."""
    table = Table(title="Fitted on one scene, tested on another: the promise need not hold here")
    for column in (
        "kind",
        "α",
        "promise",
        "promised",
        "found (95 %)",
        "misses by (95 %), points",
        "pooled",
        "mean size",
    ):
        table.add_column(column)
    for coverage in coverages:
        sets, figures, intervals = coverage.sets, coverage.compute(), coverage.intervals()
        aim, promised = sets.aim, 1 - sets.alpha
        if aim.by_class:
            continue
        name = "coverage_image_mean" if aim.covered is None else "images_covered"
        what = "share of pixels" if aim.covered is None else f"images with ≥ {aim.covered:g}"
        found, (low, high) = figures[name], intervals[name]
        miss = [100 * (promised - value) for value in (found, high, low)]
        table.add_row(
            aim.kind, f"{sets.alpha:g}", what, f"≥ {promised:.3f}", f"{found:.4f} ({low:.4f} to {high:.4f})",
            f"{miss[0]:+.1f} ({miss[1]:+.1f} to {miss[2]:+.1f})", f"{figures['coverage']:.4f}", f"{figures['size_mean']:.2f}",
        )  # fmt: skip
    table.caption = (
        "a positive miss is less coverage than promised; the interval is over blocks of frames of this scene"
    )
    return table


def table_of_classes(net: Model, coverages: Sequence[Coverage]) -> Table:
    """Mean coverage of each class over images that hold it, with one threshold for all and with one each."""
    shown = [each for each in coverages if each.sets.aim.kind == "lac" and each.sets.aim.covered is None]
    table = Table(title="The same by class: mean over images of the share covered (95 %)")
    table.add_column("class")
    table.add_column("fitted on")
    for each in shown:
        table.add_column(f"lac{' by class' if each.sets.aim.by_class else ''}, α {each.sets.alpha:g}")
    numbers = next(each.sets.images for each in shown if each.sets.aim.by_class)
    columns = [(each.compute(), each.intervals()) for each in shown]
    for c, name in enumerate(net.classes):
        cells = []
        for figures, intervals in columns:
            low, high = intervals[key := f"coverage_image_mean.{c}"]
            cells.append(f"{figures[key]:.3f} ({low:.3f} to {high:.3f})")
        table.add_row(name, f"{numbers[c]} images", *cells)
    sizes = [f"{figures['size_mean']:.2f}" for figures, _ in columns]
    table.add_row("mean size", "", *sizes)
    return table


def draw(results: Sequence[Splits], file: Path) -> None:
    """Of each kind and α: covered images over the splits as bars, the exact law as dots."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(each.name for each in results))
    alphas = list(dict.fromkeys(each.alpha for each in results))
    canvas = Figure(figsize=(4.2 * len(alphas), 2.4 * len(names)), layout="constrained")
    axes = canvas.subplots(len(names), len(alphas), squeeze=False, sharex="col")
    for each in results:
        axis = axes[names.index(each.name), alphas.index(each.alpha)]
        counts = np.bincount(each.enough, minlength=each.m + 1)
        pmf_K = beta_binomial_pmf(each.m, each.n, each.alpha)
        axis.bar(np.arange(each.m + 1), counts, color="#9ecae1", label=f"{len(each.enough)} random halves")
        axis.plot(len(each.enough) * pmf_K, "o", ms=3, color="#08306b", label="beta-binomial, without ties")
        axis.axvline(each.m * (1 - each.alpha), color="#d95f02", ls="--", lw=1, label="promised on average")
        axis.set_xlim(central_band(pmf_K, 0.9999)[0] - 1, each.m + 1)
        axis.set_title(f"{each.name}, α = {each.alpha:g}, fitted on {each.n} images", fontsize=9)
        axis.set_xlabel(f"of {each.m} test images, those with ≥ {each.covered:g} covered", fontsize=8)
        axis.set_ylabel("splits", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].legend(fontsize=7, loc="upper left")
    canvas.savefig(file, dpi=130)


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:  # the user's to mend: one line
        print(error, file=sys.stderr)
        sys.exit(2)
