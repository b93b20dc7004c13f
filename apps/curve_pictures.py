"""The pictures of the three classic curves: theory against net, and the doubt of each method on the problem `sparse`.

Lines differ in style as well as in colour, for print and for the colour-blind.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from seguncert.apps.curves import DROPOUT, ENSEMBLE, EVEN, NET, Problem
from seguncert.figures import BLUE, GREEN, INK, ORANGE, PAGE, PURPLE, SETTINGS, SKY, SOFT, VERMILION, svg
from seguncert.maps import MAPS
from seguncert.scenes import CLASSIC
from seguncert.store import write_file
from seguncert.truth import OFF

VIEWS = {"equal": (-4.0, 7.0), "nested": (-7.0, 8.0), "sparse": EVEN}
CLASSES = ((GREEN, "-", "first class"), (PURPLE, "--", "second class"))
LOOKS = {
    "confidence": (SOFT, ":"), "entropy": (INK, "-"), "mutual_information": (VERMILION, "--"),
    "variance": (BLUE, "-."), "expected_entropy": (ORANGE, (0, (6, 1, 1, 1, 1, 1))),
}  # fmt: skip
FAINT = 1e-6  # where the axis of doubt begins
EVERY = 5  # points of the grid of which one is drawn
DOTS_PER_INCH = 170
LARGER = SETTINGS | {"font.size": 10.5, "axes.titlesize": 11.5, "legend.fontsize": 10}


def pictures(problems: Sequence[Problem]) -> dict[str, tuple[Figure, str]]:
    """By name each picture, and what it shows in a sentence."""
    found = {}
    with matplotlib.rc_context(LARGER):
        for problem in problems:
            found[problem.name] = curves(problem), f"Theory against net, problem {problem.name}"
            if problem.name == "sparse":
                found["doubt"] = doubt(problem), "What flags the sparse side: net, MC dropout and ensemble"
    return found


def write_pictures(out: Path, problems: Sequence[Problem]) -> None:
    """As PNG, and as SVG that can be put into a page, whose colours it takes, or stand alone."""
    for name, (figure, about) in pictures(problems).items():
        _write(out, name, figure, about)


def _write(out: Path, name: str, figure: Figure, about: str) -> None:
    png = io.BytesIO()
    with matplotlib.rc_context(LARGER):
        figure.savefig(png, format="png", dpi=DOTS_PER_INCH, facecolor="white")
        text = svg(figure, name, about)
    write_file(out / f"{name}.png", png.getvalue())
    for colour, variable in PAGE.items():
        text = text.replace(variable, f"{variable[:-1]}, {colour})")
    write_file(out / f"{name}.svg", text)


def curves(problem: Problem) -> Figure:
    """A column for each number of updates: the densities of the classes above, below the posterior and the nets."""
    figure = Figure((11.5, 5.4), layout="constrained")
    grid = figure.subplots(2, len(problem.nets), sharex=True, sharey="row", height_ratios=(1, 2.3))
    line, S = problem.line, len(next(iter(problem.nets.values())).log_SCG)
    for upper, lower, (updates, said) in zip(*grid, problem.nets.items(), strict=True):
        upper.set_title(f"after {updates:,} updates")
        _densities(upper, problem)
        probs_SG = np.exp(said.log_SCG[:, 0])
        for s, probs_G in enumerate(probs_SG):
            _plot(lower, line.x_G, probs_G, color=BLUE, linewidth=0.7, alpha=0.45, label="" if s else f"net, {S} seeds")
        _plot(lower, line.x_G, probs_SG.mean(0), color=BLUE, linewidth=2.6, label="net, mean of the seeds")
        _theory(lower, problem)
    _label(grid, problem)
    grid[0, 0].set_ylabel("density")
    grid[1, 0].set_ylabel("P(first class | x)")
    figure.suptitle(_title(problem))
    _legend(figure, _entries(*grid[:, 0]))
    return figure


def doubt(problem: Problem) -> Figure:
    """A column for each of net, MC dropout, ensemble, of the first seed: what it predicts, and below its maps."""
    figure = Figure((11.5, 6.6), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey="row", height_ratios=(1.35, 1))
    line, methods = problem.line, problem.methods
    titles = {NET: "one net", DROPOUT: "MC dropout", ENSEMBLE: "ensemble"}
    for upper, lower, (method, title) in zip(*grid, titles.items(), strict=True):
        said = methods[method]
        probs_G = np.exp(said.log_SCG[0, 0])
        off_G = np.abs(probs_G - line.true_CG[0]) > OFF
        for axes in (upper, lower):
            axes.fill_between(
                line.x_G, 0, 1, where=off_G, transform=axes.get_xaxis_transform(), color=ORANGE, alpha=0.28, linewidth=0,
                label=f"off by more than {OFF}" if axes is upper else None,
            )  # fmt: skip
        if said.samples_TG is not None:
            T = len(said.samples_TG)
            title += f", {T} {'nets' if method == ENSEMBLE else 'samples'}"
            x_G, low_G, high_G = (
                _thinned(line.x_G, each) for each in (line.x_G, said.samples_TG.min(0), said.samples_TG.max(0))
            )
            upper.fill_between(x_G, low_G, high_G, color=SKY, alpha=0.5, linewidth=0, label="range of the samples")
        _plot(upper, line.x_G, probs_G, color=BLUE, linewidth=2.4, label="prediction")
        if method == NET:
            scaled_G = np.exp(methods[f"{NET}, temperature"].log_SCG[0, 0])
            _plot(
                upper,
                line.x_G,
                scaled_G,
                color=VERMILION,
                linestyle=(0, (1, 1.4)),
                label="net, temperature fitted",
            )
        _theory(upper, problem)
        for name, map_SG in said.maps.items():
            colour, style = LOOKS[name]
            title_of_map, doubt_G = MAPS[name].title, map_SG[0]
            if name == "confidence":
                title_of_map, doubt_G = "1 − confidence", 1 - doubt_G
            _plot(lower, line.x_G, doubt_G, color=colour, linestyle=style, label=title_of_map)
        upper.set_title(title)
    _label(grid, problem)
    grid[0, 0].set_ylabel("P(first class | x)")
    grid[1, 0].set_yscale("log")
    grid[1, 0].set_ylim(FAINT, 1.4)
    grid[1, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    grid[1, 0].minorticks_off()
    grid[1, 0].set_ylabel("doubt of the maps, log axis\n(1: its bound)")
    figure.suptitle(f"{_title(problem)}; the first of the seeds")
    _legend(figure, _entries(*grid[0, :2]), _entries(grid[1, 1]))
    return figure


def _densities(axes: Axes, problem: Problem) -> None:
    of_class_CG = problem.line.joint_CG / problem.line.joint_CG.sum(1, keepdims=True) / np.diff(problem.line.x_G)[0]
    for density_G, (colour, style, label) in zip(of_class_CG, CLASSES, strict=True):
        x_G, inside_G = (_thinned(problem.line.x_G, each) for each in (problem.line.x_G, density_G))
        axes.fill_between(x_G, inside_G, color=colour, alpha=0.15, linewidth=0)
        _plot(axes, problem.line.x_G, density_G, color=colour, linestyle=style, label=f"density of the {label}")
    axes.set_ylim(0, None)


def _theory(axes: Axes, problem: Problem) -> None:
    _plot(
        axes,
        problem.line.x_G,
        problem.line.true_CG[0],
        color=INK,
        linestyle=(0, (4, 2)),
        label="theory: exact posterior",
    )
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])


def _plot(axes: Axes, x_G: np.ndarray, y_G: np.ndarray, **style: Any) -> None:
    axes.plot(_thinned(x_G, x_G), _thinned(x_G, y_G), **style)


def _thinned(x_G: np.ndarray, y_G: np.ndarray) -> np.ndarray:
    """What lies in the widest view, and `EVERY`-th of it."""
    kept: np.ndarray = y_G[(x_G >= EVEN[0]) & (x_G <= EVEN[1])][::EVERY]
    return kept


def _label(grid: np.ndarray, problem: Problem) -> None:
    for column in grid.T:
        for axes in column:
            for x in problem.line.crossings():
                axes.axvline(x, color=SOFT, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
        column[-1].set_xlabel("x")
        column[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        column[-1].set_xlim(VIEWS[problem.name])


def _title(problem: Problem) -> str:
    colours = CLASSIC[problem.name].colours
    of_class = [f"N({mean:g}, {sd:g}²)" for (mean,), (sd,) in zip(colours.means, colours.sds, strict=True)]
    return f"Problem {problem.name}: first class {of_class[0]}, second class {of_class[1]}"


def _power(value: float) -> str:
    """Of ten.

    >>> _power(1e-3), _power(1.0)
    ('10⁻³', '1')
    """
    exponent = str(round(math.log10(value)))
    return "1" if exponent == "0" else "10" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _entries(*panels: Axes) -> list[tuple[str, Any]]:
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.items())


def _legend(figure: Figure, *rows: Sequence[tuple[str, Any]]) -> None:
    """Below the panels, in rows of as many entries; a legend is filled column by column."""
    labels, handles = zip(*(entry for column in zip(*rows, strict=True) for entry in column), strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(rows[0]), handlelength=2.8, columnspacing=1.2)
