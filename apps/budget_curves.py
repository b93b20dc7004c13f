"""What a simulated study of active learning says: quality against budget, in tables and a picture.

The line of a strategy is the mean over seeds, the band the range of the seeds. Differences to random are paired: the same start,
the same seeds of training. Their interval is the middle 95 % of a bootstrap over clusters of val images, of the mean over
seeds: it tells of other images, the range of other seeds.

Letters: C classes, K clusters of val images, S seeds, B replicates, R rounds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seguncert.figures import BLUE, GREEN, INK, LINE, ORANGE, PURPLE, SETTINGS, SOFT, VERMILION

START, FULL, RANDOM = "start", "full", "random"
TARGET = 0.95  # share of the mIoU with all labels that is asked for
TARGETS = (0.9, TARGET)
REPLICATES = 1000
STYLES = ((SOFT, "--", "o"), (ORANGE, "-.", "s"), (BLUE, "-", "D"), (GREEN, (0, (6, 1, 1, 1)), "^"), (PURPLE, ":", "v"), (VERMILION, "-", "P"))  # fmt: skip
ANCHORS = (
    "Published, for scale: PixelPick on CamVid (MobileNetV2) comes to 87, 95 and 96 % of full supervision with 20, 60 and 100"
    " labelled pixels an image; DEAL to 95 % with 40 % of the images. Their nets, sizes and protocols are others."
)


@runtime_checkable
class Shown(Protocol):
    """What of a plan is shown."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def strategies(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, eq=False)
class Curve:
    """One strategy, of the seeds that are done in every round shown.

    `share_R` is what is labelled of all, `counts_SRKC2` the confusion counts of each seed, round and cluster.
    """

    title: str
    seeds: tuple[int, ...]
    share_R: Float64[np.ndarray, " R"]
    labelled_R: Int64[np.ndarray, " R"]
    counts_SRKC2: Int64[np.ndarray, "S R K C2"]

    @property
    def miou_SR(self) -> Float64[np.ndarray, "S R"]:
        """Of all clusters."""
        return miou(squares(self.counts_SRKC2.sum(2)))


def miou(counts_CC: Int64[np.ndarray, "*B C C"]) -> Any:
    """Mean over the classes that occur or are shown of hits / union, as `seguncert.scores` has it.

    >>> float(miou(np.array([[3, 1], [0, 4]])))
    0.775
    >>> float(miou(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])))
    0.775
    """
    hits_C = np.diagonal(counts_CC, axis1=-2, axis2=-1)
    union_C = counts_CC.sum(-1) + counts_CC.sum(-2) - hits_C
    return (hits_C / np.maximum(union_C, 1)).sum(-1) / (union_C > 0).sum(-1)


def squares(counts_C2: np.ndarray) -> np.ndarray:
    """Confusion counts that lie in a row, as a matrix."""
    C = math.isqrt(counts_C2.shape[-1])
    return counts_C2.reshape(*counts_C2.shape[:-1], C, C)


def curves_of(plan: Shown, lines: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Curve], Curve | None]:
    """The curve of each strategy as far as at least one seed has come, and the reference with all labels.

    Rounds that not all of the curve's seeds have are left out, unless that would leave nothing but the start: then the seeds
    that are behind are.
    """
    found: dict[tuple[str, int, int], Mapping[str, Any]] = {}
    for line in lines:
        if line["dataset"] == plan.name:
            found[line["strategy"], line["seed"], line["round"]] = line
    curves = {}
    for name, strategy in plan.strategies.items():
        rows = {
            seed: [found[START, seed, 0], *_consecutive(found, name, seed)]
            for start, seed, _ in found
            if start == START
        }
        most = min((len(row) for row in rows.values() if len(row) > 1), default=0)
        rows = {seed: row[:most] for seed, row in sorted(rows.items()) if len(row) >= most > 1}
        if rows:
            curves[name] = _curve(strategy.title, rows)
    full = {seed: [line] for (name, seed, _), line in sorted(found.items()) if name == FULL}
    return curves, _curve("all labels", full) if full else None


def _consecutive(
    found: Mapping[tuple[str, int, int], Mapping[str, Any]], name: str, seed: int
) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    while (line := found.get((name, seed, len(rows) + 1))) is not None:
        rows.append(line)
    return rows


def _curve(title: str, rows: Mapping[int, Sequence[Mapping[str, Any]]]) -> Curve:
    first = next(iter(rows.values()))
    return Curve(
        title,
        tuple(rows),
        np.array([line["labelled"] / line["units"] for line in first]),
        np.array([line["labelled"] for line in first]),
        np.array([[line["confusions"] for line in row] for row in rows.values()], np.int64),
    )


def area(share_R: Float64[np.ndarray, " R"], miou_R: Float64[np.ndarray, " R"]) -> float:
    """Area under mIoU over the logarithm of the budget, divided by its length: the mean mIoU over doublings of the budget.

    >>> round(area(np.array([0.01, 0.02, 0.08]), np.array([0.2, 0.4, 0.6])), 4)
    0.4333
    """
    x_R = np.log(share_R)
    return float(np.trapezoid(miou_R, x_R) / (x_R[-1] - x_R[0]))


def budget_for(
    target: float, share_R: Float64[np.ndarray, " R"], miou_R: Float64[np.ndarray, " R"]
) -> tuple[float, str]:
    """The first budget at which the line through the points, over the logarithm of the budget, comes to the target.

    The word before it is "" where it does, "<" where the first point is there already, ">" where none is.

    >>> budget_for(0.5, np.array([0.01, 0.04]), np.array([0.4, 0.6]))[0].__round__(4)
    0.02
    >>> budget_for(0.7, np.array([0.01, 0.04]), np.array([0.4, 0.6]))
    (0.04, '>')
    """
    there = np.flatnonzero(miou_R >= target)
    if not there.size:
        return float(share_R[-1]), ">"
    r = int(there[0])
    if r == 0:
        return float(share_R[0]), "" if miou_R[0] == target else "<"
    way = (target - miou_R[r - 1]) / (miou_R[r] - miou_R[r - 1])
    return float(np.exp((1 - way) * np.log(share_R[r - 1]) + way * np.log(share_R[r]))), ""


def against(curve: Curve, other: Curve, replicates: int = REPLICATES) -> tuple[np.ndarray, np.ndarray]:
    """Differences of mIoU to another curve of each common seed and round, and the 2 ends of the interval of their mean by round."""
    seeds = [seed for seed in curve.seeds if seed in other.seeds]
    R = min(len(curve.share_R), len(other.share_R))
    mine, theirs = (each.counts_SRKC2[[each.seeds.index(seed) for seed in seeds], :R] for each in (curve, other))
    K = mine.shape[2]
    draws_BK = np.random.default_rng(0).multinomial(K, np.full(K, 1 / K), replicates)
    samples_BR = np.stack([_of_draw(mine, draw) - _of_draw(theirs, draw) for draw in draws_BK])
    difference_SR = miou(squares(mine.sum(2))) - miou(squares(theirs.sum(2)))
    return difference_SR, np.quantile(samples_BR, [0.025, 0.975], axis=0)


def _of_draw(counts_SRKC2: np.ndarray, draw_K: np.ndarray) -> np.ndarray:
    return miou(squares(np.einsum("srkc,k->src", counts_SRKC2, draw_K))).mean(0)


def report(
    plans: Sequence[Shown],
    lines: Sequence[Mapping[str, Any]],
    out: Path,
    jpeg: Path | None = None,
    protocols: Mapping[str, str] | None = None,
) -> str:
    """Print the protocols and the tables, write them to OUT/table.txt, and draw OUT/curves.png."""
    text = io.StringIO()
    consoles = [Console(file=text, width=150), Console(width=150)]
    drawn = []
    for plan in plans:
        curves, full = curves_of(plan, lines)
        if not curves:
            continue
        drawn.append((plan, curves, full))
        for console in consoles:
            console.print(escape((protocols or {}).get(plan.name, "")))
            console.print(table_of_budgets(plan, curves, full), table_of_summary(plan, curves, full))
    for console in consoles:
        console.print(ANCHORS if drawn else "nothing to report yet")
    (out / "table.txt").write_text(text.getvalue())
    if drawn:
        draw(drawn, out / "curves.png", jpeg)
    return text.getvalue()


def percent(share: float) -> str:
    """Of a budget, in two digits where it is small.

    >>> percent(0.00999), percent(0.0525), percent(0.32), percent(0.0103)
    ('1 %', '5.2 %', '32 %', '1 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{float(f'{100 * share:.2g}'):g} %"


def table_of_budgets(plan: Shown, curves: Mapping[str, Curve], full: Curve | None) -> Table:
    """mIoU after each round: mean and range of the seeds, share of the result with all labels, difference to random."""
    table = Table(title=f"{plan.title}: mIoU on val by budget", title_justify="left", caption_justify="left")
    for column in (
        "labelled",
        "strategy",
        "seeds",
        "mIoU, range of seeds",
        "of all labels'",
        "minus random, 95 %",
        "by seed",
    ):
        table.add_column(column, no_wrap=True, justify="left" if column == "strategy" else "right")
    longest = max(curves.values(), key=lambda curve: len(curve.share_R))
    random = curves.get(RANDOM)
    minus = {
        name: against(curve, random)
        for name, curve in curves.items()
        if random is not None and name != RANDOM and set(curve.seeds) & set(random.seeds)
    }
    for r, (labelled, share) in enumerate(zip(longest.labelled_R, longest.share_R, strict=True)):
        words = f"{labelled:,} = {percent(share)}"
        for name, curve in curves.items():
            if r >= len(curve.share_R) or (r == 0 and words == ""):
                continue
            miou_S = curve.miou_SR[:, r]
            whole = f"{100 * miou_S.mean() / full.miou_SR.mean():.1f} %" if full is not None else ""
            title, cells = ("all, at random" if r == 0 else curve.title), ["", ""]
            if r and name in minus and r < minus[name][0].shape[1]:
                difference_S, (low, high) = minus[name][0][:, r], minus[name][1][:, r]
                cells = [
                    f"{difference_S.mean():+.3f} [{low:+.3f}, {high:+.3f}]",
                    " ".join(f"{each:+.3f}" for each in difference_S),
                ]
            table.add_row(words, title, str(len(miou_S)), *map(escape, (_range(miou_S), whole, *cells)))
            words = ""
        table.add_section()
    if full is not None:
        table.add_row(
            f"{full.labelled_R[0]:,}", full.title, str(len(full.seeds)), escape(_range(full.miou_SR[:, 0])), "100 %"
        )
    table.caption = (
        "minus random: of the same seeds, mean; in brackets the middle 95 % of a bootstrap over clusters of val images"
    )
    return table


def table_of_summary(plan: Shown, curves: Mapping[str, Curve], full: Curve | None) -> Table:
    """Area under each curve, and the budget for a share of the result with all labels, as a share of random's."""
    table = Table(title=f"{plan.title}: what the budget buys", title_justify="left", caption_justify="left")
    for column in ("strategy", "area under the curve", "minus random, by seed"):
        table.add_column(column)
    for target in TARGETS if full is not None else ():
        table.add_column(f"{100 * target:.0f} % takes")
        table.add_column("of random's")
    random = curves.get(RANDOM)
    rounds = min(len(curve.share_R) for curve in curves.values())
    for curve in curves.values():
        area_S = np.array([area(curve.share_R[:rounds], miou_R[:rounds]) for miou_R in curve.miou_SR])
        cells = [_range(area_S)]
        if random is None or curve is random:
            cells.append("")
        else:
            of_random = {
                seed: area(random.share_R[:rounds], miou_R[:rounds])
                for seed, miou_R in zip(random.seeds, random.miou_SR, strict=True)
            }
            minus = [a - of_random[seed] for seed, a in zip(curve.seeds, area_S, strict=True) if seed in of_random]
            cells.append(f"{np.mean(minus):+.3f}: {' '.join(f'{each:+.3f}' for each in minus)}" if minus else "")
        for target in TARGETS if full is not None else ():
            assert full is not None
            wanted = target * full.miou_SR.mean()
            budget, sign = budget_for(wanted, curve.share_R, curve.miou_SR.mean(0))
            cells.append(f"{sign} {percent(budget)}".strip() + (": not reached" if sign == ">" else ""))
            cells.append(_of_random(budget, sign, random, wanted) if random is not None else "")
        table.add_row(curve.title, *map(escape, cells))
    table.caption = (
        "area: mean mIoU over the logarithm of the budget, as far as all curves go; 95 % takes: the budget at which the mean curve first"
        " comes to 95 % of the mean mIoU with all labels, by interpolation over the logarithm of the budget"
    )
    return table


def _of_random(budget: float, sign: str, random: Curve, wanted: float) -> str:
    theirs, their_sign = budget_for(wanted, random.share_R, random.miou_SR.mean(0))
    if (sign, their_sign) in ((">", ">"), ("<", "<"), (">", "<")):
        return "unknown"
    bound = "" if sign == their_sign == "" else "< " if "<" in sign or ">" in their_sign else "> "
    return f"{bound}{100 * budget / theirs:.0f} %"


def _range(values_S: np.ndarray) -> str:
    if len(values_S) == 1:
        return f"{values_S[0]:.3f}"
    return f"{values_S.mean():.3f} [{values_S.min():.3f}, {values_S.max():.3f}]"


def draw(
    panels: Sequence[tuple[Shown, Mapping[str, Curve], Curve | None]], file: Path, jpeg: Path | None = None
) -> None:
    """A panel a data set: mIoU over the budget, lines and bands over seeds, the result with all labels and 95 % of it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS | {"figure.facecolor": "white", "savefig.facecolor": "white"}):
        canvas, entries = Figure((5.2 * len(panels) + 0.2, 4.7), layout="constrained"), dict[str, Any]()
        for axes, (plan, curves, full) in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown = {name: style for name, style in zip(plan.strategies, STYLES, strict=False) if name in curves}
            for name, (colour, line, marker) in shown.items():
                curve = curves[name]
                miou_SR = curve.miou_SR
                axes.fill_between(curve.share_R, miou_SR.min(0), miou_SR.max(0), color=colour, alpha=0.15, linewidth=0)
                axes.plot(
                    curve.share_R, miou_SR.mean(0), color=colour, linestyle=line, marker=marker, label=curve.title,
                    markeredgecolor="white", markeredgewidth=0.6, zorder=3,
                )  # fmt: skip
            ticks = max((curve.share_R for curve in curves.values()), key=len)
            if full is not None:
                whole = full.miou_SR.mean()
                for share, style in ((1.0, "-"), (TARGET, (0, (2, 2)))):
                    axes.axhline(share * whole, color=INK, linewidth=1, linestyle=style, zorder=1)
                    words = "all labels" if share == 1 else f"{100 * share:.0f} % of it"
                    axes.annotate(
                        f"{words}, {share * whole:.3f}", (ticks[0], share * whole), (0, 3), textcoords="offset points",
                        fontsize=8.5, color=INK,
                    )  # fmt: skip
                axes.axhspan(
                    *full.miou_SR[[full.miou_SR.argmin(), full.miou_SR.argmax()], 0], color=LINE, alpha=0.5, zorder=0
                )
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xticks(ticks, [percent(share) for share in ticks])
            axes.set_title(plan.title)
            axes.set_xlabel(f"labelled share of the training {plan.unit}s (log axis)")
            axes.set_ylabel("mIoU on val")
            entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        canvas.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), handlelength=3.2
        )
        canvas.savefig(file, dpi=150)
        if jpeg is not None:
            canvas.savefig(jpeg, dpi=150, pil_kwargs={"quality": 88})
