"""One self-contained page of the laboratory: what the numbers mean, and which map to believe when.

    seguncert posterior report CURVES STUDY PAGE

Every figure is of files that `seguncert posterior curves` and `seguncert posterior study` wrote, and so is every number in its
sentences.
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
from seguncert.apps.posterior_study import Plan, Row, Table, best_map, pick, read_results, span, tables
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
    plan = Plan(**{key: tuple(value) if isinstance(value, list) else value for key, value in content["plan"].items()})
    scene = "digit" if "digit" in plan.scenes else plan.scenes[-1]
    try:
        of_curves = json.loads((curves / "curves.json").read_text())
        drawn = {name: Markup((curves / f"{name}.svg").read_text()) for name in ("equal", "nested", "sparse", "doubt")}
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
        figures=figures, more=more, study=found, protocol=content["protocol"], says=sentences(plan, rows),
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
_DOUBT = "Above, predictions; shaded, where they are off by more than 0.1. Below, what the maps say there, each as a share of its bound."
_ENTROPIES = "Mean over pixels of new pictures and over seeds; bars are the range. Filled marks: expected entropy; hollow ones: mutual information."
_KL = "Mean over pixels of new pictures and over seeds; bars are the range. Every training has the same number of updates."
_SOFT = "One net, one pass; mean over seeds, bars are the range."
_MASKS = "The picture of most doubt again. A sample of the head is one mask; MC dropout has the doubt of its weights only; drawn pixel by pixel nothing hangs together."


def sentences(plan: Plan, rows: Sequence[Row]) -> dict[str, str]:
    """What the figures come to, in words, from the rows alone."""
    own = [row for row in rows if not row["raters"]]
    usual = pick(own, where="all", calibration="none")
    few, many = plan.numbers[0], plan.numbers[-1]
    said: dict[str, list[str]] = {name: [] for name in ("entropies", "kl", "calibration", "soft", "odd")}
    for scene in plan.scenes:
        last = pick(usual, scene=scene, number=many)
        truth = span(last, "true_entropy").mean
        of = {
            method: span(pick(last, method=method), "expected_entropy").mean / truth - 1
            for method in ("mc-dropout", "ensemble")
        }
        spread = {
            n: span(pick(usual, scene=scene, number=n, method="ensemble"), "mutual_information").mean
            for n in (few, many)
        }
        said["entropies"].append(
            f"{scene}: at {many:,} pictures the expected entropy is {of['mc-dropout']:+.1%} (MC dropout) and {of['ensemble']:+.1%}"
            f" (ensemble) from the true {truth:.3f} nat; the ensemble's mutual information falls from {spread[few]:.3f} to {spread[many]:.4f} nat."
        )
        divergence = {
            n: {m: span(pick(usual, scene=scene, number=n, method=m), "kl").mean for m in dict.fromkeys(r["method"] for r in usual)}
            for n in (few, many)
        }  # fmt: skip
        best = {n: min(divergence[n], key=lambda m, n=n: divergence[n][m]) for n in divergence}  # type: ignore[misc]
        said["kl"].append(
            f"{scene}: one pass goes from {divergence[few]['none']:.3f} to {divergence[many]['none']:.4f} nat; nearest to the truth are"
            f" {best[few]} ({divergence[few][best[few]]:.3f}) with {few:,} pictures and {best[many]} ({divergence[many][best[many]]:.4f}) with {many:,}."
        )
        said["calibration"].append(_of_calibration(plan, pick(own, scene=scene), scene))
        noise = pick(own, scene=scene, where="noise", method="none")
        tells = best_map([row for row in pick(own, scene=scene, where="noise")], "tells.")
        said["odd"].append(
            f"{scene}: shown pure noise, one pass is {span(noise, 'mean.confidence').mean:.0%} sure on average; over all ways, the map that tells"
            f" noise best is {tells} (AUROC)."
        )
    soft = [row for row in rows if row["raters"]]
    for number in (n for n in plan.numbers if pick(soft, number=n)):
        each = {raters: span(pick(soft, raters=raters, number=number), "kl").mean for raters in (1, 5, -1)}
        said["soft"].append(
            f"With {number:,} pictures: {each[1]:.4f} nat from one rater, {each[5]:.4f} from the shares of five, {each[-1]:.4f} from the posterior itself."
        )
    return {name: " ".join(each) for name, each in said.items()}


def _of_calibration(plan: Plan, rows: Sequence[Row], scene: str) -> str:
    few = plan.numbers[0]
    kept = pick(rows, method="none", where="all", number=few)
    before = span(pick(kept, calibration="none"), "kl").mean
    changes = {
        kind: span(pick(kept, calibration=kind), "kl").mean - before
        for kind in dict.fromkeys(row["calibration"] for row in kept)
        if kind != "none" and not kind.startswith("broken") and not all("refused" in row for row in pick(kept, calibration=kind))
    }  # fmt: skip
    if not changes:
        return f"{scene}: no calibrator could be fitted."
    best = min(changes, key=lambda kind: changes[kind])
    broken = pick(rows, method="none", where="all")
    worse = [
        row["kl"] - next(r["kl"] for r in pick(broken, calibration="none", number=row["number"], seed=row["seed"]))
        for row in broken
        if row["calibration"].startswith("broken") and row["number"] == plan.numbers[-1]
    ]
    caught = (
        f"the broken ones raise it by {min(worse):.3f} nat or more at {plan.numbers[-1]:,} pictures" if worse else ""
    )
    return f"{scene}: with {few:,} training pictures the KL is {before:.3f} nat, and {best} changes it by {changes[best]:+.3f}; {caught}."


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
        cells += [best_map(pick(kept, where=where), "tells.") for where in ("noise", "unseen colours", "adversarial")]
        lines.append(cells)
    header = ["way", *(f"{scene}, {n:,}" for scene in plan.scenes for n in (plan.numbers[0], plan.numbers[-1])),
              "noise", "unseen colours", "adversarial"]  # fmt: skip
    return [
        ("The best map of each way, and its AUROC: for pixels off by more than 0.1, by scene and training pictures; and for inputs that the"
         f" scenes never give (mean over scenes, nets of {plan.numbers[-1]:,} pictures)", header, lines)
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
