"""Which score finds the images, and the regions, with most error? On labelled images of one's own.

Every aggregate of every map of an export is held against the share of wrong pixels, image by image or cell by cell:

    Spearman    rank correlation of score and error rate, in [−1, 1]; 0 is random
    AURC        mean over i of the error rate of the i surest (Geifman, El-Yaniv 2017); random gives the mean error rate
    found       share of all wrong pixels in those tenth of the units that are picked first; random gives a tenth

Intervals are the middle 95 % of a bootstrap over clusters of images. Letters: U units, K groups of equal score, B replicates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from seguncert.aggregate import DEFAULTS, DISAGREEMENT, KINDS, OF_PICTURES, Term, aggregate, class_weights, doubt_of
from seguncert.candidates import each_of
from seguncert.clusters import FEW, Clusters, find_clusters
from seguncert.detection import area_under_risk_coverage, ratio
from seguncert.job import available_cores
from seguncert.labels import IGNORED, find_labels, read_labels
from seguncert.pool import Pool, read_pool
from seguncert.regions import grid

FIRST = 0.1  # share of the units that are picked first
LEAST = 0.5  # share of a cell that must be labelled
FIGURES = ("spearman", "aurc", "found")
SAMPLES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Ranking:
    """Of each score of each unit, image and cell, best Spearman first: figures, and their intervals as `<name>_interval`."""

    rows: list[dict[str, Any]]
    units: dict[str, int]
    error_rate: dict[str, float]  # of each unit, over its units: what AURC is for a random order
    clusters: Clusters
    notes: list[str]
    failed: dict[str, str]  # labels that cannot be used, by the image's path

    def csv(self) -> str:
        """All rows as a table."""
        columns = ["unit", "score", *(part for name in FIGURES for part in (name, f"{name}_low", f"{name}_high"))]
        lines = [",".join(columns)]
        for row in self.rows:
            numbers = [value for name in FIGURES for value in (row[name], *row[f"{name}_interval"])]
            lines.append(",".join([row["unit"], row["score"], *(f"{value:.6g}" for value in numbers)]))
        return "\n".join(lines) + "\n"


def table_of(found: Ranking) -> tuple[list[str], list[list[str]]]:
    """Header and rows as they are printed; of each unit a random order last."""
    header = ["unit", "score", "Spearman", "AURC", f"errors in the first {FIRST:.0%}"]
    rows = list[list[str]]()
    for unit, rate in found.error_rate.items():
        for row in found.rows:
            if row["unit"] == unit:
                cells = ["{:.3f} [{:.3f}, {:.3f}]".format(row[name], *row[f"{name}_interval"]) for name in FIGURES]
                rows.append([unit, row["score"], *cells])
        rows.append([unit, "(random order)", "0", f"{rate:.3f}", f"{FIRST:.3f}"])
    return header, rows


@dataclass(frozen=True, eq=False)
class _Image:
    """What one labelled image adds: of itself and of its cells, wrong and labelled pixels and scores by name."""

    wrong: dict[str, np.ndarray]
    pixels: dict[str, np.ndarray]
    scores: dict[str, dict[str, np.ndarray]]


def rank_scores(
    exported: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    *,
    ignore_index: int | None,
    side: int = 64,
    background: str | None = None,
    replicates: int = 200,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Judge all scores that `seguncert select` knows on an export of labelled images.

    Args:
        labels: folder of PNGs of class indices, named as the images of the export; images without one are passed over.
        side: of the cells, in pixels.
        background: class that is not foreground; None is the first of two, and no score of the foreground with more.

    Raises:
        PoolError: the export is none or is not finished.
        ValueError: no image has labels that can be used; those of single images that cannot are told in the result.
    """
    pool = read_pool(Path(exported))
    by_stem = find_labels(Path(labels))
    found = [
        (image, by_stem[Path(path).with_suffix("")])
        for image, path in enumerate(pool.paths)
        if Path(path).with_suffix("") in by_stem
    ]
    if not found:
        raise ValueError(
            f"labels: expected a folder of PNGs of class indices, named as the images of {exported}. Received: {labels}, where"
            f" none has the name of one, as {Path(pool.paths[0]).with_suffix('.png')}"
        )
    foreground = -1
    if background is not None:
        if background not in pool.classes:
            raise ValueError(f"background: expected one of {', '.join(pool.classes)}. Received: {background!r}")
        foreground = pool.classes.index(background)
    elif len(pool.classes) == 2:
        foreground = 0
    weights_C = class_weights(pool.areas_NC.sum(0))
    judged: dict[str, _Image] = {}
    notes, failed = list[str](), dict[str, str]()
    if len(found) < len(pool.paths):
        notes.append(f"{len(pool.paths) - len(found)} of {len(pool.paths)} images have no labels and are passed over")

    def judge(at: int) -> _Image | str | None:
        image, file = found[at]
        H, W = pool.sizes_N2[image].tolist()
        try:
            label_HW = read_labels([file], len(pool.classes), ignore_index, H, W)[0]
        except (ValueError, OSError) as error:
            return str(error)
        return _judge(pool, image, label_HW, side, foreground, weights_C)

    for at, one in enumerate(each_of(judge, range(len(found)), workers or min(available_cores(), 16))):
        if isinstance(one, str):
            failed[pool.paths[found[at][0]]] = one
        elif one is not None:
            judged[pool.paths[found[at][0]]] = one
        if progress is not None:
            progress(at + 1, len(found))
    if failed and not judged:
        raise ValueError(f"labels: none of {len(found)} can be used, as {next(iter(failed.values()))}")
    if not judged:
        raise ValueError(f"labels: expected labelled pixels. Received: {len(found)} images of {labels} without any")
    clusters = find_clusters(list(judged))
    rows, units, rates = list[dict[str, Any]](), dict[str, int](), dict[str, float]()
    drawn = len({clusters.of[path] for path in judged})
    weights_BN = _draw(clusters, list(judged), replicates if drawn > 1 else 0, seed)
    for unit in ("image", "cell"):
        wrong_U = np.concatenate([one.wrong[unit] for one in judged.values()])
        pixels_U = np.concatenate([one.pixels[unit] for one in judged.values()])
        image_U = np.repeat(np.arange(len(judged)), [len(one.wrong[unit]) for one in judged.values()])
        units[unit], rates[unit] = len(wrong_U), float(ratio((wrong_U / pixels_U).sum(), len(wrong_U)))
        for name in next(iter(judged.values())).scores[unit]:
            score_U = np.concatenate([one.scores[unit][name] for one in judged.values()])
            rows.append({"unit": unit, "score": name, **figures(score_U, wrong_U, pixels_U, image_U, weights_BN)})
    if drawn < FEW:
        notes.append(
            f"only {drawn} cluster{'s' * (drawn != 1)} of images: "
            + ("no interval can be told" if drawn < 2 else "the intervals are too narrow")
        )
    rows.sort(key=lambda row: (row["unit"] != "image", -np.nan_to_num(row["spearman"], nan=-2.0), row["score"]))
    return Ranking(rows, units, rates, clusters, notes, failed)


def figures(
    score_U: Float64[np.ndarray, " U"],
    wrong_U: Float64[np.ndarray, " U"],
    pixels_U: Float64[np.ndarray, " U"],
    image_U: Int64[np.ndarray, " U"],
    weights_BN: Float64[np.ndarray, "B N"],
) -> dict[str, Any]:
    """Spearman, AURC and what is found of U units, each of an image that is drawn so often; `<name>_interval` of the replicates.

    NaN where they are undefined: Spearman, where score or error rate is the same everywhere; what is found, without errors.
    """
    whole = _figures(score_U, wrong_U, pixels_U, np.ones((1, len(score_U))))
    at_once = max(1, SAMPLES_AT_ONCE // max(1, len(score_U)))
    several = [
        _figures(score_U, wrong_U, pixels_U, weights_BN[start : start + at_once, image_U])
        for start in range(0, len(weights_BN), at_once)
    ]
    told: dict[str, Any] = {}
    for name in FIGURES:
        told[name] = float(whole[name][0])
        values_B = np.concatenate([np.empty(0), *(each[name] for each in several)])
        values_B = values_B[np.isfinite(values_B)]
        told[f"{name}_interval"] = np.quantile(values_B, [0.025, 0.975]).tolist() if len(values_B) else [np.nan] * 2
    return told


def _figures(score_U: np.ndarray, wrong_U: np.ndarray, pixels_U: np.ndarray, weight_BU: np.ndarray) -> dict[str, Any]:
    rate_U = wrong_U / pixels_U
    by_score, by_rate = _Ranks(score_U), _Ranks(rate_U)
    spearman_B = _correlation(by_score.ranks(weight_BU), by_rate.ranks(weight_BU), weight_BU)
    count_BK = by_score.sums(weight_BU)
    wrong_BK = by_score.sums(weight_BU * rate_U)
    aurc_B = area_under_risk_coverage(np.maximum(count_BK - wrong_BK, 0), wrong_BK)
    # from the most doubtful down, until a tenth of the units is reached; of a tie in part
    errors_BK = by_score.sums(weight_BU * wrong_U)[:, ::-1]
    count_BK = count_BK[:, ::-1]
    before_BK = count_BK.cumsum(1) - count_BK
    part_BK = np.clip((FIRST * count_BK.sum(1, keepdims=True) - before_BK) / np.maximum(count_BK, 1e-12), 0, 1)
    return {"spearman": spearman_B, "aurc": aurc_B, "found": ratio((part_BK * errors_BK).sum(1), errors_BK.sum(1))}


class _Ranks:
    """Sorts once; then sums and mean ranks of groups of equal values, for any weights."""

    def __init__(self, value_U: np.ndarray):
        self.order_U = np.argsort(value_U, kind="stable")
        ordered = value_U[self.order_U]
        self.first_K = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        self.group_U = np.empty(len(value_U), np.int64)
        sizes_K = np.diff(np.append(self.first_K, len(value_U)))
        self.group_U[self.order_U] = np.repeat(np.arange(len(self.first_K)), sizes_K)

    def sums(self, weight_BU: np.ndarray) -> np.ndarray:
        """(B, K), groups by rising value."""
        return np.add.reduceat(weight_BU[:, self.order_U], self.first_K, axis=1)

    def ranks(self, weight_BU: np.ndarray) -> np.ndarray:
        """(B, U): the mean rank of each unit's group, where a unit stands there as often as its weight says."""
        sums_BK = self.sums(weight_BU)
        return (sums_BK.cumsum(1) - (sums_BK - 1) / 2)[:, self.group_U]


def _correlation(a_BU: np.ndarray, b_BU: np.ndarray, weight_BU: np.ndarray) -> np.ndarray:
    total_B1 = weight_BU.sum(1, keepdims=True)
    a_BU = a_BU - (weight_BU * a_BU).sum(1, keepdims=True) / total_B1
    b_BU = b_BU - (weight_BU * b_BU).sum(1, keepdims=True) / total_B1
    both_B = (weight_BU * a_BU**2).sum(1) * (weight_BU * b_BU**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(both_B > 1e-9, (weight_BU * a_BU * b_BU).sum(1) / np.sqrt(both_B), np.nan)


def _draw(clusters: Clusters, paths: Sequence[str], replicates: int, seed: int) -> np.ndarray:
    """(B, N): how often each image is in a replicate; clusters are drawn with replacement, as many as there are."""
    names, of_N = np.unique(
        np.array([clusters.of[path] for path in paths], dtype=object).astype(str), return_inverse=True
    )
    count = len(names)
    drawn_BG = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), replicates)
    return drawn_BG[:, of_N].astype(np.float64)


def _judge(
    pool: Pool, image: int, label_HW: np.ndarray, side: int, background: int, weights_C: np.ndarray
) -> _Image | None:
    """One image and its cells; None if nothing of it is labelled."""
    shown_HW = pool.labels(image)
    known_HW = label_HW != IGNORED
    if not known_HW.any():
        return None
    wrong_HW = known_HW & (shown_HW != label_HW)
    H, W = label_HW.shape
    cells = grid(H, W, side)
    pixels_R = np.bincount(cells.numbers_HW[known_HW], minlength=len(cells.sizes_R))
    wrong_R = np.bincount(cells.numbers_HW[wrong_HW], minlength=len(cells.sizes_R))
    used_R = pixels_R >= np.maximum(1, LEAST * cells.sizes_R)
    scores: dict[str, dict[str, np.ndarray]] = {"image": {}, "cell": {}}
    for name in pool.means:
        doubt_HW = doubt_of(pool.map(image, name), name)
        for kind in KINDS:
            term = Term(name, kind, DEFAULTS.get(kind, 0.0))
            if kind != "foreground" or background >= 0:
                scores["image"][str(term)] = aggregate(
                    term, doubt_HW, shown_HW, weights_C=weights_C, background=background
                )
            if kind not in OF_PICTURES:
                value_R = aggregate(term, doubt_HW, shown_HW, cells.numbers_HW, len(cells.sizes_R), weights_C)
                scores["cell"][str(term)] = value_R[used_R]
    if pool.disagreement_N is not None:
        scores["image"][DISAGREEMENT] = pool.disagreement_N[image : image + 1]
    return _Image(
        {"image": np.array([wrong_HW.sum()], np.float64), "cell": wrong_R[used_R].astype(np.float64)},
        {"image": np.array([known_HW.sum()], np.float64), "cell": pixels_R[used_R].astype(np.float64)},
        scores,
    )
