"""Pictures of the posterior study: curves against the number of training pictures as SVG, and scenes beside their truth as PNG.

python -m seguncert.apps.posterior_pictures STUDY apps/page/truth.png
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import typer
from jaxtyping import Int64, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from seguncert.apps.posterior_cells import TEST_SEED, Cell, look, nets_of
from seguncert.apps.posterior_study import Plan, Row, pick, read_results, span
from seguncert.apps.scene_nets import net_input
from seguncert.figures import BLUE, GREEN, INK, ORANGE, PURPLE, SETTINGS, SKY, VERMILION, svg
from seguncert.model import Model
from seguncert.scenes import SCENES
from seguncert.stochastic import logit_distribution
from seguncert.store import write_file

LOOKS: dict[str, tuple[str, Any, str]] = {  # told apart by colour, dashes and marks
    "none": (BLUE, "-", "o"), "mc-dropout": (VERMILION, "--", "s"), "sampling-free": (ORANGE, (0, (1, 1)), "x"),
    "tta": (SKY, (0, (6, 1, 1, 1, 1, 1)), "v"), "ensemble": (GREEN, "-.", "D"), "stochastic-head": (PURPLE, ":", "^"),
}  # fmt: skip
SAMPLED = ("mc-dropout", "ensemble", "stochastic-head")
TARGETS = {1: (BLUE, "-", "o", "labels of one rater"), 5: (VERMILION, "--", "s", "shares of five raters"), -1: (GREEN, "-.", "D", "the exact posterior")}  # fmt: skip
PLAIN = SETTINGS | {"text.color": "black", "axes.labelcolor": "black", "axes.titlecolor": "black", "axes.grid": False}
MASKS, DOTS_PER_INCH = 6, 150
Shown = tuple[str, Any, "str | None"]  # title, picture, and what is on the colour bar, if anything


def divergences(plan: Plan, rows: Sequence[Row]) -> str:
    """KL from the exact posterior against the number of training pictures, a panel a scene."""

    def draw(axes: Axes, scene: str) -> None:
        for method, look_of in LOOKS.items():
            _line(
                axes,
                plan,
                pick(rows, scene=scene, method=method, calibration="none", where="all", raters=0),
                "kl",
                look_of,
                method,
            )
        _logarithmic(axes)

    return _panels(
        "kl", plan, "KL from the exact posterior / nat", draw, "How far predictions are from the exact posterior"
    )


def entropies(plan: Plan, rows: Sequence[Row]) -> str:
    """Expected entropy and mutual information against the number of training pictures, beside the true entropy."""

    def draw(axes: Axes, scene: str) -> None:
        own = pick(rows, scene=scene, calibration="none", where="all", raters=0)
        truth = span(own, "true_entropy").mean
        axes.axhline(truth, color=INK, linestyle=(0, (4, 2)), label="true entropy: doubt in the picture")
        for method in ("mc-dropout", "ensemble"):
            colour, style, mark = LOOKS[method]
            _line(
                axes,
                plan,
                pick(own, method=method),
                "expected_entropy",
                (colour, style, mark),
                f"expected entropy, {method}",
            )
            _line(
                axes,
                plan,
                pick(own, method=method),
                "mutual_information",
                (colour, style, mark),
                f"mutual information, {method}",
                hollow=True,
            )
        axes.set_ylim(0, None)

    return _panels(
        "entropies", plan, "nat a pixel", draw, "Expected entropy and mutual information beside the true entropy"
    )


def soft_targets(plan: Plan, rows: Sequence[Row]) -> str:
    """KL against the number of pictures for one rater, five, and the posterior itself as targets."""
    own = [row for row in rows if row["raters"] and row["where"] == "all"]
    numbers = [n for n in plan.numbers if pick(own, number=n)]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((5.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for raters, (colour, style, mark, label) in TARGETS.items():
            _line(axes, plan, pick(own, raters=raters), "kl", (colour, style, mark), label, numbers=numbers)
        _logarithmic(axes)
        axes.set_ylabel("KL from the exact posterior / nat")
        _numbers(axes, numbers)
        axes.legend()
        return svg(figure, "soft", "What soft targets are worth")


def _panels(name: str, plan: Plan, label: str, draw: Callable[[Axes, str], None], about: str) -> str:
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((3.6 * len(plan.scenes) + 0.4, 4.0), layout="constrained")
        for number, (axes, scene) in enumerate(
            zip(np.ravel(figure.subplots(1, len(plan.scenes), squeeze=False)), plan.scenes, strict=True)
        ):
            draw(axes, scene)
            axes.set_title(scene)
            _numbers(axes, plan.numbers)
            if number == 0:
                axes.set_ylabel(label)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=3)
        return svg(figure, name, about)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _numbers(axes: Axes, numbers: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(list(numbers), [f"{n:,}" for n in numbers])
    axes.minorticks_off()
    axes.set_xlabel("training pictures")


def _line(
    axes: Axes, plan: Plan, rows: Sequence[Row], name: str, style: tuple[str, Any, str], label: str, hollow: bool = False,
    numbers: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Mean over seeds, and their range as a bar."""
    colour, dashes, mark = style
    numbers = plan.numbers if numbers is None else numbers
    spans = [span(pick(rows, number=n), name) for n in numbers]
    means = [each.mean for each in spans]
    if not all(map(math.isnan, means)):
        face = "none" if hollow else colour
        axes.plot(numbers, means, color=colour, linestyle=dashes, marker=mark, markerfacecolor=face, label=label)
        axes.vlines(numbers, [each.low for each in spans], [each.high for each in spans], color=colour, linewidth=1.1)


def worst_of(scene: str, test: int) -> tuple[UInt8[np.ndarray, "H W 3"], Int64[np.ndarray, "H W"]]:
    """Of the pictures that nets are judged on the one of most true doubt, and its label."""
    images, labels = SCENES[scene].sample(test, TEST_SEED)
    worst = int(np.argmax([_entropy(SCENES[scene].posterior(image)).mean() for image in images]))
    return images[worst], labels[worst]


def truth_beside_nets(plan: Plan, study: Path, scene: str = "digit") -> bytes:
    """A picture of most doubt, its exact posterior, and what nets of few and of many pictures say of it; PNG."""
    (image, label_HW), C = worst_of(scene, plan.test), len(SCENES[scene].classes)
    truth_CHW = SCENES[scene].posterior(image)
    few, many = (_cell(plan, scene, n) for n in (plan.numbers[0], plan.numbers[-1]))
    first: list[Shown] = [
        ("the picture", image, None),
        (f"its label: {name_of(SCENES[scene].classes, label_HW)}", _classes(C)(label_HW), None),
        *((f"exact P({name})", truth_CHW[c], "probability") for c, name in enumerate(SCENES[scene].classes) if c),
        ("exact entropy", _entropy(truth_CHW) / math.log(C), "entropy / ln C"),
    ]
    shown = [first]
    for cell in (few, many):
        models = nets_of(cell, study, train=False)
        one, several = look(models, image, "none"), look(models, image, "ensemble")
        shown.append(
            [(f"net of {cell.number:,}\npictures: entropy", one.maps["entropy"], "entropy / ln C"),
             *((f"ensemble: P({name})", several.probabilities[c], "probability") for c, name in enumerate(SCENES[scene].classes) if c),
             ("expected entropy", several.maps["expected_entropy"], "entropy / ln C"),
             ("mutual information", several.maps["mutual_information"], "entropy / ln C")]
        )  # fmt: skip
    return _grid(shown)


def coherent_masks(plan: Plan, study: Path, scene: str = "digit") -> bytes:
    """Whole masks: drawn from the exact joint posterior, from a stochastic head, by MC dropout, pixel by pixel; PNG."""
    (image, _), C = worst_of(scene, plan.test), len(SCENES[scene].classes)
    models = nets_of(_cell(plan, scene, plan.numbers[-1]), study, train=False)
    generator, value = torch.Generator().manual_seed(0), net_input(image[None])
    with torch.inference_mode():
        head_SHW = logit_distribution(models[-1].module, value).sample(MASKS, generator).argmax(2)[:, 0].numpy()
        probs_CHW = models[0].module(value)[0].softmax(0)
        chance_NC = probs_CHW.flatten(1).T
        single_SHW = (
            torch.multinomial(chance_NC, MASKS, replacement=True, generator=generator)
            .T.reshape(MASKS, *image.shape[:2])
            .numpy()
        )
    rows = {
        "drawn from the exact\njoint posterior": SCENES[scene].draw_labels(image, MASKS, seed=0),
        "stochastic head": head_SHW,
        "MC dropout": dropout_masks(models[0], value),
        "each pixel drawn\nby itself": single_SHW,
    }
    with matplotlib.rc_context(PLAIN):
        figure = Figure((1.25 * (MASKS + 2) + 0.6, 1.3 * len(rows) + 0.5), layout="constrained")
        grid = figure.subplots(len(rows), MASKS + 1)
        grid[0, 0].imshow(image, interpolation="nearest")
        for line, (name, masks_SHW) in zip(grid, rows.items(), strict=True):
            for axes, mask_HW in zip(line[1:], masks_SHW, strict=True):
                drawn = axes.imshow(mask_HW, cmap=_classes(C), vmin=-0.5, vmax=C - 0.5, interpolation="nearest")
            for axes in line:
                _bare(axes)
            line[0].set_ylabel(name, fontsize=9)
        for axes in grid[1:, 0]:
            axes.spines[:].set_visible(False)
        grid[0, 0].set_title("the picture")
        bar = figure.colorbar(drawn, ax=grid, shrink=0.5, ticks=range(C))
        bar.ax.set_yticklabels(SCENES[scene].classes)
        return _png(figure)


def name_of(classes: Sequence[str], label_HW: np.ndarray) -> str:
    """Of the classes of a label map that are not the first."""
    return ", ".join(classes[c] for c in np.unique(label_HW) if c) or classes[0]


def dropout_masks(model: Model, value_13HW: Tensor) -> Int64[np.ndarray, "S H W"]:
    """Argmax of each of `MASKS` passes with dropout on; the net and torch's random numbers are as before afterwards."""
    dropout: Any = model.module.dropout
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        dropout.train()
        try:
            found = [model.module(value_13HW).argmax(1)[0].numpy() for _ in range(MASKS)]
        finally:
            dropout.eval()
    return np.stack(found)


def _cell(plan: Plan, scene: str, number: int) -> Cell:
    return next(c for c in plan.cells() if (c.scene, c.number, c.seed, c.raters) == (scene, number, 0, 0))


def _entropy(probs_CHW: np.ndarray) -> np.ndarray:
    found: np.ndarray = -(probs_CHW * np.log(np.maximum(probs_CHW, 1e-300))).sum(0)
    return found


def _grid(shown: Sequence[Sequence[Shown]]) -> bytes:
    """Pictures in rows, each with a title; one colour bar, from 0 to 1, for all maps."""
    with matplotlib.rc_context(PLAIN):
        figure = Figure((1.75 * len(shown[0]) + 0.8, 2.0 * len(shown) + 0.1), layout="constrained")
        grid = figure.subplots(len(shown), len(shown[0]), squeeze=False)
        for line, pictures in zip(grid, shown, strict=True):
            for axes, (title, picture, unit) in zip(line, pictures, strict=True):
                _bare(axes)
                axes.set_title(title, fontsize=9, fontweight="normal")
                if unit is None:
                    axes.imshow(picture, interpolation="nearest")
                else:
                    drawn = axes.imshow(picture, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(drawn, ax=grid, shrink=0.6, label="probability; entropies divided by ln C")
        return _png(figure)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _classes(C: int) -> Any:
    return matplotlib.colors.ListedColormap(["#e9e6df", BLUE, VERMILION, GREEN][:C])


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    return content.getvalue()


def main(study: Path, picture: Path) -> None:
    """Write the picture of a scene beside its truth, as the page's drawer shows it: STUDY PICTURE."""
    content, _ = read_results(study)
    write_file(picture, truth_beside_nets(Plan.of(content), study))


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:  # the user's to mend: one line
        print(error, file=sys.stderr)
        sys.exit(2)
