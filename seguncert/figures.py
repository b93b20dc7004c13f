"""Diagrams of an evaluation as SVG: text stays text, lines differ in style too, and colours follow the page's scheme.

Letters: C classes, M bins, B replicates, Q points of a curve, T thresholds, N images.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from seguncert.detection import AccuracyUncertainty, RiskCoverage
from seguncert.scores import Reliability

# stand-ins that become the page's own colours, light or dark, when a drawing is put into it
PAGE = {"#16191f": "var(--ink)", "#5a606b": "var(--soft)", "#dedbd4": "var(--line)", "#fffffe": "var(--card)"}
INK, SOFT, LINE, CARD = PAGE
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
STYLES = (  # Okabe, Ito: told apart by the colour-blind; in print by the dashes
    (BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, (0, (6, 1, 1, 1, 1, 1))), (SKY, (0, (1, 1))),
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "seguncert", "text.parse_math": False, "font.size": 9, "figure.dpi": 72,
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.edgecolor": SOFT, "axes.facecolor": "none",
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.7, "xtick.color": SOFT, "ytick.color": SOFT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "figure.facecolor": "none", "legend.frameon": True,
    "legend.facecolor": CARD, "legend.edgecolor": LINE, "legend.framealpha": 0.9, "legend.fontsize": 8.5,
    "lines.linewidth": 1.8, "lines.markersize": 4.5, "axes.axisbelow": True,
}  # fmt: skip
RAREST = 1e-4  # share of the pixels at which the axis of counts begins, as in the gallery's histograms
ANNOTATED = 20  # classes up to which a confusion matrix has numbers in its cells
SQUARE_INCHES = 0.36  # of one of its cells
DOTS = 2000  # images at most in a scatter


@dataclass(frozen=True)
class Diagram:
    """What one reliability diagram shows: bins, those of replicates for intervals, and those from before calibration."""

    title: str
    bins: Reliability
    replicates: Reliability | None = None
    before: Reliability | None = None


def reliability(
    name: str, diagrams: Sequence[Diagram], *, forecast: str, event: str, columns: int = 3, small: bool = False
) -> str:
    """How often the event came against how probable it was said to be, with the counts below; as SVG.

    Bars are the middle 95 % of the replicates. A bin without pixels has no point; shares of pixels below `RAREST` have no
    bar. `forecast` and `event` name the axes.
    """
    columns, small = min(columns, len(diagrams)), small and len(diagrams) > 3
    rows = -(-len(diagrams) // columns)
    wide, high = (2.05, 2.75) if small else (3.75, 4.4)  # inches of a cell
    left, top, text, foot = 0.55, 0.3, (0.4 if small else 0.3), (0.42 if small else 0.45)
    W, H = columns * wide + 0.25, rows * high + top
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((W, H))
        for number, diagram in enumerate(diagrams):
            row, column = divmod(number, columns)
            x, floor = column * wide + left, H - top - (row + 1) * high
            across, room = wide - left, high - text - foot
            places = [(floor + foot + 0.27 * room, 0.73 * room), (floor + foot, 0.2 * room)]
            upper, lower = (figure.add_axes((x / W, y / H, across / W, tall / H)) for y, tall in places)
            _diagram(upper, diagram)
            _counts(lower, diagram)
            upper.set_title(diagram.title, fontsize=8.5 if small else 10)
            if number + columns >= len(diagrams) or not small:
                lower.set_xlabel(forecast)
            if column == 0:
                upper.set_ylabel(event)
                lower.set_ylabel("pixels")
            else:
                lower.tick_params(labelleft=False)
        handles, labels = upper.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), handlelength=2.6, borderaxespad=0.1)
        return svg(figure, name, "Reliability diagrams: " + "; ".join(each.title for each in diagrams))


def _diagram(axes: Axes, diagram: Diagram) -> None:
    """Points and intervals; lines join the bins that have a bar below."""
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (1, 2)), label="as said")
    label = "found" if diagram.before is None else "after calibration"
    if diagram.before is not None:
        _points(axes, diagram.before, "before", color=VERMILION, linestyle="--", linewidth=1.2, marker="s")
    if diagram.replicates is not None:
        used = diagram.bins.count > 0
        x = diagram.bins.forecast[used] / diagram.bins.count[used]
        axes.vlines(x, *interval_of_shares(diagram.replicates)[:, used], color=BLUE, linewidth=1.2)
        label += ", with 95 % interval"
    _points(axes, diagram.bins, label, color=BLUE, linestyle="-", linewidth=1.8, marker="o", filled=True)
    _unit_square(axes)
    axes.tick_params(labelbottom=False)


def _points(axes: Axes, bins: Reliability, label: str, filled: bool = False, **style: Any) -> None:
    used = bins.count > 0
    x, y = bins.forecast[used] / bins.count[used], bins.hits[used] / bins.count[used]
    rare = bins.count[used] < RAREST * bins.count.sum()
    inside = style if filled else style | {"markerfacecolor": "none"}
    axes.plot(x[~rare], y[~rare], label=label, **inside)
    axes.plot(x[rare], y[rare], **style | {"linestyle": "none", "markerfacecolor": "none", "markersize": 3})


def interval_of_shares(bins: Reliability, level: float = 0.95) -> Float[np.ndarray, "2 M"]:
    """The middle share `level` of hits / count over replicates (B, M), where a replicate has any; else NaN."""
    share_BM = np.where(bins.count > 0, bins.hits / np.maximum(bins.count, 1), np.nan)
    seen_M = (bins.count > 0).any(0)
    ends_2M = np.full((2, bins.count.shape[-1]), np.nan)
    ends_2M[:, seen_M] = np.nanquantile(share_BM[:, seen_M], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends_2M


def _counts(axes: Axes, diagram: Diagram) -> None:
    """Share of the pixels in each bin, on a logarithmic axis."""
    edges = np.arange(diagram.bins.count.size + 1) / diagram.bins.count.size
    axes.set_yscale("log")
    axes.bar(
        edges[:-1], _shares(diagram.bins), edges[1], align="edge", color=BLUE, alpha=0.75, edgecolor=CARD, linewidth=0.5
    )
    if diagram.before is not None:
        axes.stairs(_shares(diagram.before), edges, color=VERMILION, linestyle="--", linewidth=1.2)
    axes.set_ylim(RAREST, 1)
    axes.set_yticks([1e-4, 1e-2, 1], ["0.01 %", "1 %", "100 %"])
    axes.minorticks_off()
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def _shares(bins: Reliability) -> Float[np.ndarray, " M"]:
    """Of the pixels in each bin; none is drawn as one below the axis."""
    return np.maximum(bins.count / max(1, bins.count.sum()), RAREST / 10)


def risk_coverage(name: str, curves: Mapping[str, RiskCoverage]) -> str:
    """Error rate among the surest pixels against their share, as SVG; the oracle is of the first curve."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((5.6, 4), layout="constrained")
        axes = figure.add_subplot()
        for (title, curve), (colour, line) in zip(curves.items(), cycle(STYLES), strict=False):
            axes.plot(curve.coverage_Q, curve.risk_Q, color=colour, linestyle=line, label=title)
        oracle = next(iter(curves.values()))
        axes.plot(oracle.coverage_Q, oracle.oracle_Q, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="oracle")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, None)
        axes.set_xlabel("coverage: share of pixels kept, the surest first")
        axes.set_ylabel("risk: share of them that is wrong")
        for axis, decimals in ((axes.xaxis, 0), (axes.yaxis, None)):
            axis.set_major_formatter(PercentFormatter(1, decimals, symbol=" %"))
        _legend(axes, "upper left")
        return svg(figure, name, "Risk against coverage for " + ", ".join(curves))


def sparsification(name: str, curves: Mapping[str, RiskCoverage]) -> str:
    """What is left of the error rate when the most doubtful pixels are taken away, as SVG."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((5.6, 4), layout="constrained")
        axes = figure.add_subplot()
        for (title, curve), (colour, line) in zip(curves.items(), cycle(STYLES), strict=False):
            removed_Q, left_Q, _ = curve.sparsification()
            axes.plot(removed_Q, left_Q, color=colour, linestyle=line, label=title)
        removed_Q, _, oracle_Q = next(iter(curves.values())).sparsification()
        axes.plot(removed_Q, oracle_Q, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="oracle")
        axes.axhline(1, color=SOFT, linewidth=1, linestyle="--", label="at random")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("share of pixels taken away, the most doubtful first")
        axes.set_ylabel("error rate of the rest, relative to all pixels")
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0, symbol=" %"))
        _legend(axes, "upper right")
        return svg(figure, name, "Sparsification curves for " + ", ".join(curves))


def accuracy_uncertainty(name: str, panels: Mapping[str, AccuracyUncertainty]) -> str:
    """P(accurate | certain), P(uncertain | inaccurate) and PAvPU over thresholds of each map's doubt, as SVG."""
    columns = len(panels) if len(panels) <= 3 else 2
    wide = 4.0 if columns == 3 else 5.6
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((columns * wide, 3.4 * -(-len(panels) // columns)), layout="constrained")
        for number, (title, shares) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(-(-len(panels) // columns), columns, number)
            lines = {
                "P(accurate | certain)": shares.accurate_if_certain_T,
                "P(uncertain | inaccurate)": shares.uncertain_if_inaccurate_T,
                "PAvPU": shares.pavpu_T,
            }
            for (label, share_T), (colour, line) in zip(lines.items(), STYLES, strict=False):
                axes.plot(shares.threshold_T, share_T, color=colour, linestyle=line, label=label)
            axes.set_xscale("log")
            axes.set_xlim(shares.threshold_T[0], shares.threshold_T[-1])
            axes.set_ylim(0, 1.02)
            axes.set_title(title)
            axes.set_xlabel("threshold of doubt, log axis")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(PercentFormatter(1, 0, symbol=" %"))
            if (number - 1) % columns == 0:
                axes.set_ylabel("share of pixels")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, handlelength=2.6)
        return svg(figure, name, "Accuracy against uncertainty over thresholds for " + ", ".join(panels))


def confusion(name: str, confusion_CC: Int64[np.ndarray, "C C"], classes: Sequence[str]) -> str:
    """Where the pixels of each true class went, as SVG; rows sum to 100 %."""
    C, count_C = len(classes), confusion_CC.sum(1)
    share_CC = confusion_CC / np.maximum(count_C, 1)[:, None]
    side = max(2.2, C * SQUARE_INCHES) if C <= ANNOTATED else 8.0
    with matplotlib.rc_context(SETTINGS | {"axes.grid": False}):
        figure = Figure((side + 3.4, side + 1.3), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(share_CC, cmap="cividis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        small = 8.5 if C <= 60 else 4
        axes.set_xticks(range(C), classes, rotation=90, fontsize=small)
        labels = [f"{each} ({short(count)})" for each, count in zip(classes, count_C.tolist(), strict=True)]
        axes.set_yticks(range(C), labels, fontsize=small)
        axes.tick_params(length=0)
        axes.set_xlabel("shown class")
        axes.set_ylabel("true class (pixels)")
        for y, x in np.argwhere(share_CC >= 0.0005) if C <= ANNOTATED else []:
            share = share_CC[y, x]
            text = f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.1f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color="#ffffff" if share < 0.3 else "#000000")
        bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.05, 0.2, 0.5, 1])
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, 0, symbol=" %"))
        bar.set_label("share of the true class's pixels")
        return svg(figure, name, "Confusion matrix")


def images(
    name: str,
    accuracy_N: Float[np.ndarray, " N"],
    confidence_N: Float[np.ndarray, " N"],
    before_N: Float[np.ndarray, " N"] | None = None,
) -> str:
    """Accuracy of each image against its mean confidence, as SVG; of more than `DOTS` images every k-th is drawn."""
    step = -(-len(accuracy_N) // DOTS) or 1
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((5.0, 4.6), layout="constrained")
        axes = figure.add_subplot()
        drawn = [accuracy_N, confidence_N] + ([] if before_N is None else [before_N])
        low = max(0.0, min(np.concatenate(drawn), default=0.0) - 0.02)
        axes.plot([low, 1], [low, 1], color=SOFT, linewidth=1, linestyle=(0, (1, 2)), label="as said")
        if before_N is not None:
            axes.plot(
                before_N[::step], accuracy_N[::step], "s", color=VERMILION, markerfacecolor="none", label="before"
            )
        axes.plot(
            confidence_N[::step], accuracy_N[::step], "o", color=BLUE, alpha=0.75,
            label="an image" if before_N is None else "calibrated",
        )  # fmt: skip
        axes.set_xlim(low, 1)
        axes.set_ylim(low, 1)
        axes.set_aspect("equal")
        axes.set_xlabel("mean confidence of the image")
        axes.set_ylabel("share of its pixels that is right")
        axes.text(0.98, 0.03, "below the line: over-confident", ha="right", color=SOFT, transform=axes.transAxes)
        _legend(axes, "upper left")
        of = f"{len(accuracy_N)} images" + (f", every {step}th drawn" if step > 1 else "")
        return svg(figure, name, f"Accuracy against mean confidence of {of}")


def severity(
    name: str,
    panels: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Sequence[tuple[str, str, bool]],
    *,
    calibrated: bool,
) -> str:
    """Figures against severity 0, 1, …: a column for each corruption, a row for each of `rows`, with one axis; as SVG.

    `panels` has for each title the figures of each severity as in metrics.json, None where one is undefined; `rows` have
    the figure's name, its title with its unit, and whether it is a share, which is drawn in percent.
    """
    wide = min(3.0, max(1.62, 8.4 / len(panels)))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((len(panels) * wide + 0.8, 1.75 * len(rows) + 0.7), layout="constrained")
        grid = figure.subplots(len(rows), len(panels), sharex=True, sharey="row", squeeze=False)
        for axes, title in zip(grid[0], panels, strict=True):
            axes.set_title(title)
        for axes in grid[-1]:
            axes.set_xlabel("severity")
        for axes_row, (key, label, share) in zip(grid, rows, strict=True):
            for axes, conditions in zip(axes_row, panels.values(), strict=True):
                _severities(axes, conditions, key, calibrated)
                axes.set_xticks(range(len(conditions)))
            low, high = axes_row[0].get_ylim()
            axes_row[0].set_ylim(0 if key in ("ece", "nll") else max(low, 0), min(high, 1.005) if share else high)
            axes_row[0].set_ylabel(label)
            if share:
                axes_row[0].yaxis.set_major_formatter(PercentFormatter(1, None, symbol=" %"))
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), handlelength=2.6)
        return svg(figure, name, "Quality against severity for " + ", ".join(panels))


def _severities(axes: Axes, conditions: Sequence[Mapping[str, Any]], key: str, calibrated: bool) -> None:
    """One panel; where calibration changes nothing the dashes lie on the line."""
    several = conditions[0].get(f"{key}_interval", [None])[0] is not None
    label = ("calibrated" if calibrated else "not calibrated") + (", with 95 % interval" if several else "")
    before = [each["before"] for each in conditions] if calibrated else []
    _curve(axes, conditions, key, label, color=BLUE, marker="o")
    if before:
        style = {"linestyle": "--", "linewidth": 1.2, "marker": "s", "markerfacecolor": "none", "markersize": 6.5}
        _curve(axes, before, key, "before calibration", color=VERMILION, **style)


def _curve(axes: Axes, conditions: Sequence[Mapping[str, Any]], key: str, label: str, **style: Any) -> None:
    """A line over severities and the band of its intervals, with gaps where a value is undefined."""
    intervals = [each.get(f"{key}_interval") or [None, None] for each in conditions]
    value_S, low_S, high_S = (
        np.array([np.nan if value is None else value for value in values])
        for values in ([each[key] for each in conditions], *zip(*intervals, strict=True))
    )
    axes.fill_between(range(len(conditions)), low_S, high_S, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(value_S, label=label, **style)


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])


def _legend(axes: Axes, place: str) -> None:
    axes.legend(loc=place, handlelength=2.6)


def short(count: int) -> str:
    """A count in three digits.

    >>> short(950), short(12_345), short(2_073_600)
    ('950', '12.3 k', '2.07 M')
    """
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def svg(figure: Figure, name: str, about: str) -> str:
    """The drawing as an element of a page: no ids but what it refers to, which begin with `name`; the page's colours."""
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page's font may have it
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text.replace("xlink:href", "href"))
    text = re.sub(r' (d|x|y|x1|x2|y1|y2|transform)="([^"]*)"', _rounded, text)
    for colour, variable in PAGE.items():
        text = text.replace(colour, variable)
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(about)}" ', 1)


def _rounded(attribute: re.Match[str]) -> str:
    digits = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", attribute[2])
    return f' {attribute[1]}="{digits}"'
