"""The posterior study: segmentation nets trained on scenes whose exact posterior is known, on ever more pictures.

    seguncert posterior study OUT

What each way of predicting and each calibrator says of new pictures is held against the truth (see `seguncert.truth`), by
number of training pictures, over seeds that draw both the pictures and the nets. A run that is stopped goes on.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from seguncert.apps.posterior_cells import BANDS, FIT_SEED, RANK, SAMPLES, SHIFT, STEP, TEST_SEED, Cell, find_cell
from seguncert.apps.processes import processes
from seguncert.apps.scene_nets import SceneRecipe
from seguncert.scenes import SCENES
from seguncert.store import write_file

UPDATES = {"pixels": 400, "rows": 800, "tree": 800, "digit": 2000}
SOFT_SCENE, SOFT_MOST, RATERS = "rows", 1000, (1, 5, -1)  # of the part on soft targets
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is trained: each scene on each number of pictures, for each seed."""

    scenes: tuple[str, ...] = ("pixels", "rows", "digit")
    numbers: tuple[int, ...] = (20, 600, 20000)
    seeds: int = 3
    members: int = 3
    test: int = 60
    fit: int = 60
    updates: int | None = None  # of each training, instead of `UPDATES`

    def __post_init__(self) -> None:
        unknown = [name for name in self.scenes if name not in SCENES]
        if unknown or not self.scenes:
            raise ValueError(
                f"scenes: expected some of {', '.join(SCENES)}. Received: {', '.join(self.scenes) or 'none'}"
            )
        for name in ("scenes", "numbers"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: expected each once. Received: {', '.join(map(str, given))}")
        object.__setattr__(self, "numbers", tuple(sorted(self.numbers)))
        least = {"seeds": 1, "members": 2, "test": 2, "fit": 10, "updates": 1}
        counts = {name: getattr(self, name) for name in least} | {"numbers": min(self.numbers, default=0)}
        for name, value in counts.items():
            if value is not None and value < least.get(name, 1):
                raise ValueError(f"{name}: expected {least.get(name, 1)} or more. Received: {value}")

    @classmethod
    def of(cls, content: dict[str, Any]) -> Plan:
        """That of study.json."""
        plan: dict[str, Any] = content["plan"]
        as_tuples: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in plan.items()}
        return cls(**as_tuples)

    def cells(self) -> list[Cell]:
        """All that is to be trained, the longest first."""
        found = []
        for scene in self.scenes:
            recipe = SceneRecipe(updates=self.updates or UPDATES[scene])
            for number in self.numbers:
                shared = {
                    "members": self.members,
                    "test": self.test,
                    "fit": self.fit,
                    "odd": number == max(self.numbers),
                }
                found += [Cell(scene, number, seed, recipe, **shared) for seed in range(self.seeds)]
                if scene == SOFT_SCENE and number <= SOFT_MOST:
                    soft = {"members": 1, "test": self.test, "fit": 0}
                    found += [
                        Cell(scene, number, seed, recipe, raters=raters, **soft)
                        for raters in RATERS
                        for seed in range(self.seeds)
                    ]
        return sorted(found, key=_cost, reverse=True)

    def protocol(self) -> str:
        """In words."""
        scenes = "; ".join(
            f"{name} ({type(SCENES[name]).__name__}, {self.updates or UPDATES[name]} updates)" for name in self.scenes
        )
        recipe = {key: value for key, value in asdict(SceneRecipe()).items() if key not in ("updates", "rank")}
        bands = ", ".join(f"{name} from {low:g} to {high:g}" for name, (low, high) in BANDS.items())
        return (
            f"Scenes of 16 x 16 pixels: {scenes}. Nets: a Unet of three levels, {recipe}, trained by plain"
            f" cross-entropy on {', '.join(map(str, self.numbers))} pictures; seeds 0 to {self.seeds - 1} draw pictures and"
            f" nets. Each net is judged on the same {self.test} new pictures of the scene (seed {TEST_SEED}), pixel by pixel"
            f" against the exact posterior; bands of pixels are by true entropy as a share of ln C: {bands}. none, mc-dropout,"
            f" sampling-free and tta (both flips): the first net; ensemble: {self.members} nets trained on the same pictures;"
            f" stochastic-head: one more net, with a head of rank {RANK} instead of dropout; {SAMPLES} samples each. Calibrators"
            f" are fitted by `seguncert calibrate` on all pixels of {self.fit} more pictures (seed {FIT_SEED}), in ten groups of"
            f" which each is held out in turn for auto; broken ones are three times the fitted temperature, and vector fitted to"
            f" labels of which each is that of the next class. Odd inputs, for nets of {max(self.numbers)} pictures: uniform"
            f" noise; the test pictures with {SHIFT} added to red, green and blue; and, where the posterior is known still, one step of"
            f" {STEP} of 255 against the class that the first net shows. Soft targets: on {SOFT_SCENE}, up to {SOFT_MOST} pictures,"
            f" one net. The digit's noise and places, and how many updates each scene gets, were chosen on drafts, with other seeds,"
            f" so that a net of this size comes near the posterior at the largest number. A probability that float32 rounds to 0 counts as 1.2e-38. seguncert {version('seguncert')}."
        )


def _cost(cell: Cell) -> int:
    """Updates of all of its trainings."""
    return cell.recipe.updates * (cell.members + (not cell.raters))


def run(out: Path, plan: Plan, workers: int, tell: Callable[[float], None] | None = None) -> list[Row]:
    """Do what is not done; the rows of all cells, and study.json and study.csv written. `tell` is told the share that is done."""
    cells = plan.cells()
    found: dict[Cell, list[Row]] = {}
    todo, running = list(cells), dict[Future[dict[str, Any]], Cell]()
    with processes(workers) as pool:
        while todo or running:
            while todo and len(running) < workers:
                cell = todo.pop(0)
                running[pool.submit(find_cell, cell, out)] = cell
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                cell = running.pop(future)
                about = {"scene": cell.scene, "number": cell.number, "seed": cell.seed, "raters": cell.raters}
                found[cell] = [about | row for row in future.result()["rows"]]
                if tell:
                    tell(sum(map(_cost, found)) / sum(map(_cost, cells)))
    rows = [row for cell in cells for row in found[cell]]
    write_results(out, plan, rows)
    return rows


def write_results(out: Path, plan: Plan, rows: Sequence[Row]) -> None:
    """All rows with the protocol, as JSON and as a table."""
    content = {"protocol": plan.protocol(), "plan": asdict(plan), "rows": list(rows)}
    write_file(out / "study.json", json.dumps(content, indent=1) + "\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / "study.csv", text.getvalue())


def read_results(out: Path) -> tuple[dict[str, Any], list[Row]]:
    """The plan with its protocol, and the rows, of a study that has ended; ValueError where there is none."""
    file = out / "study.json"
    if not file.is_file():
        raise ValueError(f"{file}: expected the results of `seguncert posterior study`. Received: no such file")
    try:
        content = json.loads(file.read_text())
        return content, content["rows"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{file}: expected what `seguncert posterior study` wrote. Received: {type(error).__name__}: {error}"
        ) from None


@dataclass(frozen=True)
class Span:
    """Mean over seeds, their range, and of how many seeds there was a figure."""

    mean: float
    low: float
    high: float
    seeds: int

    def text(self, digits: int = 4) -> str:
        """Mean and range in few characters."""
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def span(rows: Iterable[Row], name: str) -> Span:
    """Of one figure over the seeds; NaN where no row has it."""
    return span_of([row[name] for row in rows if name in row])


def span_of(values: Sequence[float]) -> Span:
    """Of these values."""
    known = (float(np.mean(values)), min(values), max(values)) if values else (math.nan,) * 3
    return Span(*known, len(values))


def change(rows: Sequence[Row], method: str, calibration: str, number: int, base: str = "none") -> tuple[Span, int]:
    """KL with a calibration less KL with another, seed by seed; and how many seeds it was refused for."""
    own = pick(rows, method=method, where="all", number=number)
    before = {row["seed"]: row["kl"] for row in pick(own, calibration=base) if "kl" in row}
    after = pick(own, calibration=calibration)
    found = [row["kl"] - before[row["seed"]] for row in after if "kl" in row and row["seed"] in before]
    return span_of(found), sum("refused" in row for row in after)


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


Table = tuple[str, list[str], list[list[str]]]


def tables(plan: Plan, rows: Sequence[Row]) -> list[Table]:
    """Title, header and lines of all that the study says."""
    scene_rows = [row for row in rows if not row["raters"]]
    numbers = [str(number) for number in plan.numbers]
    found = []
    for scene in plan.scenes:
        own = pick(scene_rows, scene=scene)
        usual = pick(own, calibration="none", where="all")
        truth = span(usual, "true_entropy").mean
        found.append((f"{scene}: KL from the exact posterior / nat, mean [range] over seeds, by training pictures", ["way", *numbers], [
            [method, *(span(pick(usual, method=method, number=n), "kl").text() for n in plan.numbers)]
            for method in dict.fromkeys(row["method"] for row in usual)
        ]))  # fmt: skip
        found.append((f"{scene}: entropies / nat; the truth is {truth:.4f}; errors are means over pixels of the distance from it", ["way", "", *numbers], [
            [method, name.replace("_", " "), *(span(pick(usual, method=method, number=n), name).text() for n in plan.numbers)]
            for method in dict.fromkeys(row["method"] for row in usual)
            for name in (("entropy", "entropy_error") if method == "none" else ("entropy", "entropy_error", "expected_entropy", "expected_entropy_error", "mutual_information"))
        ]))  # fmt: skip
        largest = max(plan.numbers)
        found.append((f"{scene}, {largest} pictures: which way is true, and where (KL / nat; in brackets the share of pixels)",
            ["way", "all", *(_band(own, band) for band in _BANDS), "entropy error", "ECE with known truth", "off by > 0.1", "its best map, AUROC"], [
            [method, *(span(pick(own, method=method, calibration="none", where=where, number=largest), "kl").text() for where in ("all", *_BANDS)),
             *(span(pick(usual, method=method, number=largest), name).text(4) for name in ("entropy_error", "ece", "off")), best_map(pick(usual, method=method, number=largest))]
            for method in dict.fromkeys(row["method"] for row in usual)
        ]))  # fmt: skip
        found.append((f"{scene}: what calibrators change in the true KL / nat (one pass unless said; below 0 is better)", ["calibrator", *numbers], [
            [name, *(_change(own, method, calibration, n) for n in plan.numbers)]
            for name, method, calibration in _calibrators(own)
        ]))  # fmt: skip
        found.append((f"{scene}, nets of {largest} pictures: inputs that the scene hardly ever gives", ["way", "input", "confidence", "which map tells them from the scene's own (AUROC)"], [
            [method, where, span(pick(own, method=method, where=where), "mean.confidence").text(3), _tells(pick(own, method=method, where=where))]
            for where in ("noise", "unseen colours")
            for method in dict.fromkeys(row["method"] for row in usual)
        ]))  # fmt: skip
        found.append((f"{scene}, nets of {largest} pictures: one small step against the first net, judged by the posterior of the changed pictures",
            ["way", "KL / nat", "KL before", "off by > 0.1", "off before", "overconfidence", "its best map for off, AUROC"], [
            [method, *(span(pick(own, method=method, calibration="none", where=where, number=largest), name).text()
                       for name in ("kl", "off") for where in ("adversarial", "all")),
             span(pick(own, method=method, where="adversarial"), "overconfidence").text(), best_map(pick(own, method=method, where="adversarial"))]
            for method in dict.fromkeys(row["method"] for row in usual)
        ]))  # fmt: skip
    soft = [row for row in rows if row["raters"] and row["where"] == "all"]
    if soft:
        used = [n for n in plan.numbers if pick(soft, number=n)]
        found.append((f"{SOFT_SCENE}: soft targets, KL / nat by training pictures (one net, one pass)", ["targets", *map(str, used)], [
            [_RATERS.get(raters, f"shares of {raters} raters"), *(span(pick(soft, raters=raters, number=n), "kl").text() for n in used)]
            for raters in dict.fromkeys(row["raters"] for row in soft)
        ]))  # fmt: skip
    return found


_BANDS = ("sure", "in between", "ambiguous")
_RATERS = {1: "labels of one rater", -1: "the exact posterior"}


def _band(rows: Sequence[Row], band: str) -> str:
    return f"{band} ({span(pick(rows, where=band, method='none', calibration='none'), 'share').mean:.0%})"


def best_map(rows: Sequence[Row], prefix: str = "auroc.") -> str:
    """The map with the largest mean AUROC, and that; of how many rows, where some have none."""
    found = {
        name.removeprefix(prefix): span(rows, name)
        for name in dict.fromkeys(n for row in rows for n in row)
        if name.startswith(prefix)
    }
    if not found:
        return "-"
    best = max(found, key=lambda name: found[name].mean)
    few = f", of {found[best].seeds} of {len(rows)}" if found[best].seeds < len(rows) else ""
    return f"{best.replace('_', ' ')} {found[best].mean:.2f}{few}"


def _tells(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("tells."))
    return ", ".join(f"{name.removeprefix('tells.').replace('_', ' ')} {span(rows, name).mean:.2f}" for name in names)


def _calibrators(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Name, method and kind of each row of the table of calibrators."""
    pairs = dict.fromkeys((row["method"], row["calibration"]) for row in rows if row["calibration"] != "none")
    return [(kind if method == "none" else f"{kind}, {method}", method, kind) for method, kind in pairs]


def _change(rows: Sequence[Row], method: str, calibration: str, number: int) -> str:
    found, refused = change(rows, method, calibration, number)
    told = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]" if found.seeds else "refused"
    return told + (f", refused for {refused} of {found.seeds + refused}" if refused and found.seeds else "")
