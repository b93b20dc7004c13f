"""What an evaluation writes: metrics.json, metrics.csv, and report.html, a page that needs nothing beside it."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from seguncert import figures
from seguncert import maps as maps_
from seguncert.clusters import FEW
from seguncert.corruptions import CORRUPTIONS
from seguncert.figures import Diagram
from seguncert.metrics import Evaluation
from seguncert.render import doubt_ramp
from seguncert.report import css, environment
from seguncert.scores import PER_IMAGE, M, Reliability
from seguncert.shift import CLEAN, SHOWN, conditions
from seguncert.store import StoreError, cannot_write, write_file
from seguncert.tally import LEVEL, Tally

FILES = ("metrics.json", "metrics.csv", "report.html")
THRESHOLDS = np.geomspace(1e-4, 1, 81)  # of doubt
PANELS = 24  # classes with a reliability diagram of their own: those with most pixels
PUBLISHED = {"all": "whole image", "boundary": "boundary, 2 pixels", "local": "squares of 72 pixels"}
SHARE, NATS, SUM = "share", "nat", ""


# name in metrics.json, title, unit, which end is better, what it says
HEADLINE = (
    ("miou", "Mean IoU", SHARE, "high", "overlap of shown and true class, mean over classes"),
    ("accuracy", "Accuracy", SHARE, "high", "pixels whose shown class is right"),
    ("nll", "NLL", NATS, "low", "mean −ln of the probability that the true class was given"),
    ("brier", "Brier score", SUM, "low", "mean squared distance of the probabilities from the truth; from 0 to 2"),
    ("ece", "ECE, top label", SHARE, "low", f"mean gap between confidence and accuracy, {M} bins of equal width"),
    ("ece_equal_mass", "ECE, equal mass", SHARE, "low", f"the same with {M} bins of equal numbers of pixels"),
    ("ece_l2_debiased", "Calibration error, debiased", SHARE, "low", "root mean square gap, less what chance alone would make"),
    ("ece_classwise", "ECE, class-wise", SHARE, "low", "gap for the probability of each class, mean over classes"),
    ("ece_boundary", "ECE at boundaries", SHARE, "low", "top label, within the band along boundaries"),
    ("ece_interior", "ECE in the interior", SHARE, "low", "top label, outside the band"),
    ("ece_image_mean", "ECE per image, mean", SHARE, "low", "top label, of each image by itself"),
    ("ece_image_sd", "ECE per image, sd", SHARE, "low", "how much images differ"),
    ("reliability", "Brier: reliability", SUM, "low", "of the event that the shown class is right: mean squared gap"),
    ("resolution", "Brier: resolution", SUM, "high", "of the same event: how far the bins lie from the mean accuracy"),
    ("error_auroc.confidence", "Error AUROC", SHARE, "high", "how often a wrong pixel has less confidence than a right one"),
    ("error_ap.confidence", "Error AP", SHARE, "high", "average precision of finding wrong pixels"),
    ("error_fpr95.confidence", "Error FPR95", SHARE, "low", "right pixels flagged when 95 % of the wrong ones are"),
    ("aurc.confidence", "AURC", SHARE, "low", "mean error rate over all coverages, the surest pixels first"),
    ("e_aurc.confidence", "E-AURC", SHARE, "low", "the same less that of an oracle"),
)  # fmt: skip
PRINTED = ("miou", "accuracy", "nll", "brier", "ece", "ece_classwise", "ece_image_mean", "ece_boundary", "error_auroc.confidence", "aurc.confidence")  # fmt: skip
# of photos made worse: name, title, unit, and how many of value, value before calibration and change stand in the table
SHIFTED = (
    ("miou", "Mean IoU", SHARE, 1),
    ("accuracy", "Accuracy", SHARE, 1),
    ("confidence", "Mean confidence", SHARE, 1),
    ("ece", "ECE", SHARE, 3),
    ("nll", "NLL", NATS, 3),
)
RATERS = (
    "{} raters: the target of a pixel is the distribution of what they say who labelled it. Every figure is the mean over a rater drawn"
    " for each pixel: for accuracy, reliability and the finding of errors a pixel is right by the share who name the shown class, IoU"
    " is of confusion counts of such shares, NLL is the cross-entropy with them; only the Brier score is the squared distance from the"
    " shares themselves. Where raters differ no model reaches an accuracy of 1 or an NLL of 0. A boundary is one of any rater; pictures"
    " of errors go by the first who labelled the pixel."
)
OF_MAPS = ("error_auroc", "error_ap", "error_fpr95", "aurc", "e_aurc", "ause")


def check_out(out: Path) -> None:
    """Raise StoreError unless `out` is new, empty or holds what an earlier evaluation wrote."""
    strange = sorted({*os.listdir(out)} - {*FILES, *(f".{name}.part" for name in FILES)}) if out.is_dir() else []
    if strange:
        raise StoreError(f"{out} holds other files ({strange[0]!r}). Give an empty or new folder as OUT.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None


def write_findings(tally: Tally, run: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write the three files, metrics.json last; returns what it holds. ValueError if no pixel counts, after metrics.csv."""
    write_file(out / "metrics.csv", _table(tally))
    if not tally.used:
        failed = [row for row in tally.rows.values() if row["error"]]
        void = [f"{tally.done} images in which no pixel has a label but the ignore index"] if tally.done else []
        wrong = [f"{len(failed)} that failed, the first is {row['path']}: {row['error']}" for row in failed[:1]]
        raise ValueError(f"quality: expected at least one labelled pixel. Received: {' and '.join(void + wrong)}")
    metrics = tally.metrics() | {"protocol": protocol(tally, run)}
    write_file(out / "report.html", render(tally, run, metrics))
    write_file(out / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    return metrics


def protocol(tally: Tally, run: dict[str, Any]) -> dict[str, Any]:
    """All that the figures depend on."""
    left_out = (
        "input", "labels", "more_labels", "format", "maps", "model", "errors", "ignore_index", "boundary", "replicates", "seed", "protocol",
    )  # fmt: skip
    raters = tally.now.evaluation.raters
    return {
        "images": tally.done, "failed": tally.failed, **{key: run[key] for key in ("input", "labels", "ignore_index")},
        "ignored": "no pixel: every one was declared to be labelled" if run["ignore_index"] is None else "pixels of the ignore index",
        "pixels": "all labelled pixels of all images are pooled, at the size of the images; *_image_mean weighs images alike",
        "raters": raters, **({"more_labels": run["more_labels"], "target": RATERS.format(raters)} if raters > 1 else {}),
        "bins": f"{M} of equal width, closed below, the last one at both ends", "boundary": run["boundary"],
        "band": f"boundary: pixels at most {run['boundary']} rows and columns from a pixel of another class; unlabelled ones make none",
        "maps": list(run["maps"]),
        "spread": "mutual information, variance and expected entropy are of the samples, before calibration",
        "intervals": {
            "level": LEVEL, "about": "middle of the replicates of a Poisson bootstrap over clusters", "clusters": tally.clusters.about,
            "number": len(tally.used), "replicates": run["replicates"], "seed": run["seed"],
        },
        "published": None if tally.now.published is None else
        "lts_*: as the published code of Local Temperature Scaling (Ding et al., ICCV 2021) for CamVid; void counts as an error",
        "undefined": "null: undefined, or infinite; nll is infinite where nll_infinite_pixels is not 0",
        "model": {key: run["model"][key] for key in ("name", "sha256", "classes", "frame", "dropout")},
        **{key: value for key, value in run.items() if key not in left_out},
    }  # fmt: skip


def _table(tally: Tally) -> str:
    """metrics.csv: a row for each image in order of their paths, failed ones too."""
    named = [*PER_IMAGE, "overconfidence", *(f"before_{name}" for name in PER_IMAGE if tally.before is not None)]
    columns = ["path", "status", "error", "cluster", "height", "width", "pixels", *named, "note"]
    table = io.StringIO(newline="")
    plain, quoted = (
        csv.DictWriter(table, columns, lineterminator="\n", quoting=each, extrasaction="ignore")
        for each in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    plain.writeheader()
    for path in sorted(tally.rows):
        row = tally.rows[path]
        numbers = {name: round(row[name], 6) if np.isfinite(row.get(name, np.nan)) else None for name in named}
        (quoted if "\r" in path else plain).writerow(row | numbers)  # a bare \r would end a line
    return table.getvalue()


def render(tally: Tally, run: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The page; the same arguments give the same page."""
    C, several = len(tally.classes), tally.now.evaluation.several
    failed = [tally.rows[path] for path in sorted(tally.rows) if tally.rows[path]["status"] != "ok"]
    return environment().get_template("evaluation.html").render(
        run=run,
        samples=run.get("samples"),
        metrics=metrics,
        calibrated=tally.before is not None,
        several=several,
        few=len(tally.used) < FEW,
        clusters=len(tally.used),
        about_clusters=tally.clusters.about,
        done=tally.done,
        failed=failed,
        pixels=metrics["pixels"],
        target=metrics["protocol"].get("target"),
        infinite=metrics["nll_infinite_pixels"],
        headline=[(each, _cells(metrics, each[0], each[2])) for each in HEADLINE],
        maps=[(maps_.MAPS[name].title, [_cells(metrics, f"{figure}.{name}", SHARE)[0] for figure in OF_MAPS]) for name in tally.now.evaluation.detections],
        published=[(title, [_cells(metrics, f"lts_{error}_{region}", SHARE)[0] for error in ("ece", "mce", "sce", "ace")]) for region, title in PUBLISHED.items()] if tally.now.published else [],
        worst=[_worst(row) for row in tally.worst.rows],
        classes=[(name, css(colour)) for name, colour in zip(tally.classes, run["model"]["colours"], strict=True)],
        ramp=", ".join(css(colour) for colour in doubt_ramp("high")[::15]),
        left_out=max(0, C - PANELS),
        shift=_shift(tally, metrics) if tally.shift is not None else None,
        **{name: Markup(drawing) for name, drawing in _drawings(tally, several).items()},
    )  # fmt: skip


def _shift(tally: Tally, metrics: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of the photos made worse."""
    shift, found = tally.shift, metrics["corruptions"]
    assert shift is not None
    panels = {CORRUPTIONS[name].title: [found[each] for each in conditions([name])] for name in shift.names}
    rows = [
        (key, f"{title} ({unit})" if unit != SHARE else title, unit == SHARE)
        for key, title, unit, _ in SHIFTED
        if key != "confidence"
    ]
    return {
        "about": found["about"],
        "several": len(shift.clusters) > 1,
        "few": len(shift.clusters) < FEW,
        "drawing": Markup(figures.severity("severity", panels, rows, calibrated=tally.before is not None)),
        "header": [(title, ("calibrated", "before", "change")[:shown]) for _, title, _, shown in SHIFTED],
        "numbers": [
            (title, severity, [_cells(found[key], name, unit)[:shown] for name, _, unit, shown in SHIFTED])
            for key, title, severity in _conditions(shift.names, SHOWN)
        ],
        "example": shift.example,
        "clean": _encoded(shift.pictures.get(CLEAN, b"")),
        "strips": [
            (CORRUPTIONS[name].title, [(each, _encoded(shift.pictures[f"{name}.{each}"])) for each in SHOWN])
            for name in shift.names
        ] if shift.example else [],
    }  # fmt: skip


def _conditions(names: Sequence[str], severities: Sequence[int]) -> list[tuple[str, str, int]]:
    """Name in metrics.json, title and severity, the clean photos first."""
    worse = [(f"{name}.{each}", CORRUPTIONS[name].title, each) for name in names for each in severities]
    return [(CLEAN, "Clean", 0), *worse]


def _drawings(tally: Tally, several: bool) -> dict[str, str]:
    """All diagrams, as SVG by name."""
    now, before = tally.now.evaluation, None if tally.before is None else tally.before.evaluation
    curves = {_titled(name): each.risk_coverage() for name, each in now.detections.items()}
    if before is not None:
        curves |= {"Confidence, before calibration": before.detections["confidence"].risk_coverage()}
    rows = [row for row in tally.rows.values() if row.get("pixels")]
    column = {name: np.array([row[name] for row in rows]) for name in ("accuracy", "confidence")}
    earlier = None if before is None else np.array([row["before_confidence"] for row in rows])
    top, classwise = _top_diagrams(now, before, several), _class_diagrams(tally, several)
    return {
        "top": figures.reliability("top", top, forecast="confidence: probability of the shown class", event="share that is right"),
        "classwise": figures.reliability("classwise", classwise, forecast="probability of the class", event="share of the class", columns=6, small=True),
        "images": figures.images("images", column["accuracy"], column["confidence"], earlier),
        "risk": figures.risk_coverage("risk", curves),
        "sparse": figures.sparsification("sparse", curves),
        "certain": figures.accuracy_uncertainty("certain", {_titled(name): each.accuracy_uncertainty(THRESHOLDS.tolist()) for name, each in now.detections.items()}),
        "confusion": figures.confusion("confusion", now.scores.confusion // now.scores.unit, tally.classes),
    }  # fmt: skip


def _top_diagrams(now: Evaluation, before: Evaluation | None, several: bool) -> list[Diagram]:
    """Of all pixels, of the boundary band and of the interior."""
    parts = {"All pixels": slice(0, 2), "Boundary": slice(1, 2), "Interior": slice(0, 1)}
    diagrams = []
    for title, part in parts.items():
        bins, replicates = (_summed(each.regions, part) for each in (now.scores, now.scores_B))
        count = int(bins.count.sum()) // now.scores.unit
        if count:
            title = f"{title}: ECE {percent(bins.ece())}, {count:,} pixels"
            earlier = None if before is None else _summed(before.scores.regions, part)
            diagrams.append(Diagram(title, bins, replicates if several else None, earlier))
    return diagrams


def _class_diagrams(tally: Tally, several: bool) -> list[Diagram]:
    """Of the classes with most pixels, in their own order."""
    now, before = tally.now.evaluation, tally.before
    count_C = now.scores.confusion.sum(1) // now.scores.unit
    shown = sorted(np.argsort(-count_C, kind="stable")[:PANELS].tolist())
    diagrams = []
    for c in shown:
        bins = _summed(now.scores.classwise, slice(c, c + 1))
        replicates = _summed(now.scores_B.classwise, slice(c, c + 1)) if several else None
        earlier = None if before is None else _summed(before.evaluation.scores.classwise, slice(c, c + 1))
        title = f"{tally.classes[c]}\nECE {percent(bins.ece())}, {figures.short(int(count_C[c]))} pixels"
        diagrams.append(Diagram(title, bins, replicates, earlier))
    return diagrams


def _summed(bins: Reliability, part: slice) -> Reliability:
    """Bins of some regions or classes as one."""
    return Reliability(*(each[..., part, :].sum(-2) for each in (bins.count, bins.hits, bins.forecast)))


def _cells(metrics: dict[str, Any], name: str, unit: str) -> list[tuple[str, str]]:
    """Value and interval as text: now, and with a calibration before and the change."""
    cells = []
    for key in ("now", "before", "change"):
        source = metrics if key == "now" else metrics.get(key)
        if source is not None:
            ends = source.get(f"{name}_interval") or [None]
            interval = "" if None in ends else " to ".join(number(end, unit, key == "change") for end in ends)
            cells.append((written(source.get(name), unit, key == "change"), interval))
    return cells


def written(value: float | None, unit: str, change: bool = False) -> str:
    """A figure, or the change of one, as the page and the terminal show it.

    >>> written(0.04312, SHARE), written(0.3837, NATS), written(None, SHARE), written(-0.01, SHARE, change=True)
    ('4.31 %', '0.384 nat', '–', '−1.00 points')
    """
    if value is None:
        return "–"
    return f"{number(value, unit, change)} {unit.replace(SHARE, 'points' if change else '%')}".rstrip()


def number(value: float, unit: str, change: bool = False) -> str:
    """Without its unit: shares in percent.

    >>> number(0.04312, SHARE), number(0.000312, SUM), number(-1e-9, SHARE, change=True)
    ('4.31', '0.0003', '0.00')
    """
    digits = {SHARE: 2, NATS: 3, SUM: 4}[unit]
    rounded = round(100 * value if unit == SHARE else value, digits) or 0.0
    return f"{rounded:{'+' if change and rounded else ''}.{digits}f}".replace("-", "−")


def percent(share: Any) -> str:
    """A share in percent, to two digits after the point."""
    return written(float(share), SHARE)


def summary(metrics: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Title and cells of the main figures, for the terminal."""
    return [(title, _cells(metrics, name, unit)) for name, title, unit, *_ in HEADLINE if name in PRINTED]


def shift_summary(metrics: dict[str, Any], severity: int = 3) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the figures of photos made worse, for the terminal; none if there were none."""
    found = metrics.get("corruptions")
    if found is None:
        return [], []
    header, rows = [f"severity {severity}"], []
    calibrated = "before" in found[CLEAN]
    for _, title, _, shown in SHIFTED:
        header += [title, "before"] if calibrated and shown > 1 else [title]
    for condition, title, _ in _conditions(found["about"]["names"], [severity]):
        row = [title]
        stages = [found[condition], *([found[condition]["before"]] if calibrated else [])]
        for key, _, unit, shown in SHIFTED:
            row += [written(stage[key], unit) for stage in stages[:shown]]
        rows.append(row)
    return header, rows


def _worst(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"pictures": {name: _encoded(data) for name, data in row["pictures"].items()}}


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _titled(name: str) -> str:
    return maps_.MAPS[name].title
