"""One self-contained page of the laboratory: what the numbers mean, and which map to believe when.

    seguncert posterior report CURVES STUDY PAGE

Every figure is of files that `seguncert posterior curves` and `seguncert posterior study` wrote, and so is every number in its
sentences; what stands in the template holds whatever they found.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.table
from markupsafe import Markup

from seguncert.apps import curve_tables
from seguncert.apps.posterior_pictures import coherent_masks, divergences, entropies, soft_targets, truth_beside_nets
from seguncert.apps.posterior_study import Plan, Row, Table, best_map, change, pick, read_results, span, tables
from seguncert.report import environment
from seguncert.store import write_file

CURVES, STUDY = "seguncert posterior curves CURVES", "seguncert posterior study STUDY"
REPORT = "seguncert posterior report CURVES STUDY PAGE"


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows, and the command that makes it."""

    content: Markup
    caption: str
    command: str


def write_report(curves: Path, study: Path, page: Path) -> None:
    """The page. ValueError where a folder does not hold what the commands write."""
    content, rows = read_results(study)
    plan = Plan.of(content)
    scene = "digit" if "digit" in plan.scenes else plan.scenes[-1]
    try:
        of_curves = json.loads((curves / "curves.json").read_text())
        drawn = {name: Markup((curves / f"{name}.svg").read_text()) for name in ("equal", "nested", "sparse", "doubt")}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{curves / 'curves.json'}: expected what `seguncert posterior curves` wrote. Received: {error}"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{error.filename}: expected what `seguncert posterior curves` wrote. Received: {error.strerror}"
        ) from None
    found = tables(plan, rows)
    figures = {
        "truth": Figure(_inline(truth_beside_nets(plan, study, scene)), _TRUTH.format(few=plan.numbers[0], many=plan.numbers[-1], members=plan.members), REPORT),
        "sparse": Figure(drawn["sparse"], _SPARSE.format(seeds=of_curves["protocol"]["seeds"]), CURVES),
        "doubt": Figure(drawn["doubt"], _DOUBT, CURVES),
        "entropies": Figure(Markup(entropies(plan, rows)), _ENTROPIES, STUDY),
        "kl": Figure(Markup(divergences(plan, rows)), _KL, STUDY),
        "soft": Figure(Markup(soft_targets(plan, rows)), _SOFT, STUDY) if any(row["raters"] for row in rows) else None,
        "masks": Figure(_inline(coherent_masks(plan, study, scene)), _MASKS, REPORT),
    }  # fmt: skip
    more = [Figure(drawn[name], f"Theory against net, problem {name}.", CURVES) for name in ("equal", "nested")]
    text = environment().get_template("posterior.html").render(
        figures=figures, more=more, scene=scene, study=found, protocol=content["protocol"], says=sentences(plan, rows),
        curves=[_of_rich(each) for each in curve_tables.tables(of_curves["rows"])],
        verdicts=curve_tables.verdicts(of_curves["rows"]), believe=believe(plan, rows),
        calibrators=[table for table in found if ": what calibrators change" in table[0]],
    )  # fmt: skip
    write_file(page, text)


_TRUTH = (
    "Above: of the pictures that the nets were judged on the one of most doubt, with its exact posterior. Middle: a net and an ensemble of {members},"
    " trained on {few:,} pictures. Below: on {many:,}. All maps on the same scale."
)
_SPARSE = (
    "Theory against net: above the density of each class, below P(first class | x), exact and of {seeds} nets, each with its own data. The dotted lines mark"
    " where the exact posterior crosses one half."
)
_DOUBT = (
    "Above, predictions; shaded, where they are off by more than 0.1. Below, what the maps say there, each as a share of its bound. The nets of an ensemble draw"
    " their own data, so that it has seen as many times more than one net as it has nets."
)
_ENTROPIES = "Mean over pixels of new pictures and over seeds; bars are the range. Filled marks: expected entropy; hollow ones: mutual information."
_KL = "Mean over pixels of new pictures and over seeds; bars are the range. Every training has the same number of updates."
_SOFT = "One net, one pass; mean over seeds, bars are the range."
_MASKS = "The picture of most doubt again: masks drawn from the exact posterior of whole masks, and from what nets of the largest training set say."


def sentences(plan: Plan, rows: Sequence[Row]) -> dict[str, list[str]]:
    """What the figures come to, in words, from the rows alone."""
    own = [row for row in rows if not row["raters"]]
    soft = [row for row in rows if row["raters"] and row["where"] == "all"]
    said: dict[str, list[str]] = {name: [] for name in ("entropies", "kl", "calibration", "soft", "odd")}
    for scene in plan.scenes:
        of_scene = pick(own, scene=scene)
        said["entropies"].append(_of_entropies(plan, of_scene, scene))
        said["kl"].append(_of_divergence(plan, of_scene, scene))
        said["calibration"].append(_of_calibration(plan, of_scene, scene))
        said["odd"].append(_of_odd(plan, of_scene, scene))
    for number in (n for n in plan.numbers if pick(soft, number=n)):
        each = {raters: span(pick(soft, raters=raters, number=number), "kl").mean for raters in (1, 5, -1)}
        said["soft"].append(
            f"With {number:,} pictures: {each[1]:.4f} nat from one rater, {each[5]:.4f} from the shares of five, {each[-1]:.4f} from the posterior itself."
        )
    return said


def _of_entropies(plan: Plan, rows: Sequence[Row], scene: str) -> str:
    usual = pick(rows, where="all", calibration="none")
    parts = []
    for number in (plan.numbers[0], plan.numbers[-1]):
        several = pick(usual, number=number, method="ensemble")
        truth = span(several, "true_entropy").mean
        share, error = span(several, "expected_entropy").mean / truth - 1, span(several, "expected_entropy_error").mean
        parts.append(
            f"{number:,} pictures {share:+.1%} in the mean and {error:.4f} nat pixel by pixel, with a mutual information of"
            f" {span(several, 'mutual_information').mean:.4f} nat"
        )
    return (
        f"{scene}, true entropy {truth:.4f} nat: the ensemble's expected entropy is off, at {parts[0]}; at {parts[1]}."
    )


def _of_divergence(plan: Plan, rows: Sequence[Row], scene: str) -> str:
    usual = pick(rows, where="all", calibration="none")
    parts = []
    for number in (plan.numbers[0], plan.numbers[-1]):
        found = {row["method"]: span(pick(usual, number=number, method=row["method"]), "kl").mean for row in usual}
        best = min(found, key=lambda method: found[method])
        parts.append(
            f"with {number:,} pictures one pass is {found['none']:.4f} nat away, and {best} is nearest ({found[best]:.4f})"
        )
    return f"{scene}: {'; '.join(parts)}."


def _of_calibration(plan: Plan, rows: Sequence[Row], scene: str) -> str:
    few = plan.numbers[0]
    kinds = dict.fromkeys(row["calibration"] for row in pick(rows, method="none"))
    fitted = {
        kind: change(rows, "none", kind, few)[0] for kind in kinds if kind != "none" and not kind.startswith("broken")
    }
    fitted = {kind: each for kind, each in fitted.items() if each.seeds == plan.seeds}
    best = min(fitted, key=lambda kind: fitted[kind].mean, default=None)
    text = f"{scene}: with {few:,} training pictures"
    text += (
        f" {best} changes the KL by {fitted[best].mean:+.4f} nat"
        if best
        else " no calibrator could be fitted for all seeds"
    )
    broken = [
        change(rows, "none", kind, number, "temperature")[0]
        for kind in kinds
        if kind.startswith("broken")
        for number in plan.numbers
    ]
    known = [each for each in broken if each.seeds]
    if known and all(each.low > 0 for each in known):
        text += f"; the broken ones are found out, always: beside the fitted temperature they add {min(each.low for each in known):.4f} nat or more"
    elif known:
        missed = sum(each.low <= 0 for each in known)
        text += (
            f"; beside the fitted temperature a broken one is no worse for some seed in {missed} of {len(known)} cases"
        )
    return text + "."


def _of_odd(plan: Plan, rows: Sequence[Row], scene: str) -> str:
    parts = []
    for where in ("noise", "unseen colours"):
        kept = pick(rows, where=where)
        sure = span(pick(kept, method="none"), "mean.confidence").mean
        pairs = {
            (row["method"], name): span(pick(kept, method=row["method"]), name).mean
            for row in kept for name in row if name.startswith("tells.")
        }  # fmt: skip
        method, name = max(pairs, key=lambda pair: pairs[pair])
        parts.append(
            f"of {where} one pass is {sure:.0%} sure on average, and what tells it best is {name.removeprefix('tells.').replace('_', ' ')}"
            f" of {method} (AUROC {pairs[method, name]:.2f})"
        )
    return f"{scene}, nets of {plan.numbers[-1]:,} pictures: {'; '.join(parts)}."


def believe(plan: Plan, rows: Sequence[Row]) -> list[Table]:
    """Which map finds what, over all scenes: one table."""
    own = [row for row in rows if not row["raters"]]
    lines = []
    for method in dict.fromkeys(row["method"] for row in own):
        kept = pick(own, method=method, calibration="none")
        cells = [method]
        for scene in plan.scenes:
            for number in (plan.numbers[0], plan.numbers[-1]):
                cells.append(best_map(pick(kept, scene=scene, where="all", number=number)))
        cells += [best_map(pick(kept, where=where), "tells.") for where in ("noise", "unseen colours")]
        lines.append(cells)
    header = ["way", *(f"{scene}, {n:,}" for scene in plan.scenes for n in (plan.numbers[0], plan.numbers[-1])),
              "noise", "unseen colours"]  # fmt: skip
    return [
        ("The best map of each way, and its AUROC: for pixels off by more than 0.1, by scene and training pictures; and for inputs that the"
         f" scenes hardly ever give (mean over scenes and seeds, nets of {plan.numbers[-1]:,} pictures)", header, lines)
    ]  # fmt: skip


def _of_rich(table: rich.table.Table) -> tuple[str, list[str], list[list[str]], str]:
    columns: list[list[Any]] = [list(column.cells) for column in table.columns]
    return (
        str(table.title),
        [str(column.header) for column in table.columns],
        [list(map(str, line)) for line in zip(*columns, strict=True)],
        str(table.caption or ""),
    )


def _inline(png: bytes) -> Markup:
    return Markup(f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">')
