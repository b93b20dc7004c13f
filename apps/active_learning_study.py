"""Does choosing what to label earn its budget? Active learning, simulated on data whose labels are all there.

    python -m seguncert.apps.active_learning_study OUT --camvid CAMVID --nuclei NUCLEI --seeds 3

Both folders have train/images, train/labels, val/images and val/labels. A small net is trained on what is labelled, exports
the training photos as a user would, `seguncert.select` picks what to label next, and so on; see `seguncert.apps.small_nets` for
the training and `seguncert.apps.budget_curves` for what is printed and drawn. What is known is a line of OUT/results.jsonl and
is not done again: the same command goes on after a stop. `--report-only` prints and draws what there is.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from rich.console import Console

from seguncert.apps.budget_curves import FULL, RANDOM, START, miou, report, squares
from seguncert.apps.processes import processes
from seguncert.apps.small_nets import Encoded, SmallRecipe, save_small, train_small
from seguncert.apps.train import half_precision
from seguncert.batch import export
from seguncert.clusters import find_clusters
from seguncert.evaluation import measure
from seguncert.image import read_image
from seguncert.labels import IGNORED, find_pairs, read_label
from seguncert.model import load_model
from seguncert.selection import COLUMNS, select


@dataclass(frozen=True)
class Strategy:
    """How the next labels are chosen: which table of `select` is read, and its settings and those of `export`.

    Without a table the choice is random and needs no net; it is then drawn here, as `select` draws its random.csv.
    """

    title: str
    table: str = ""
    export: Mapping[str, Any] = field(default_factory=dict)
    select: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A data set, what is labelled at once, and how much after each round; the first budget is chosen at random."""

    name: str
    title: str
    classes: tuple[str, ...]
    ignore_index: int | None
    longest: int  # photos are shrunk by the smallest whole factor that brings both sides to at most this
    unit: str  # as `select` has it
    cell: int  # side of a region
    budgets: tuple[float | int, ...]  # cumulative, in units, or as a share of all where below 1
    recipe: SmallRecipe
    strategies: Mapping[str, Strategy]


AT_RANDOM = Strategy("random")
PLANS = {
    "camvid": Plan(
        "camvid", "CamVid, regions of 30x30 pixels",
        ("Sky", "Building", "Pole", "Road", "Sidewalk", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist"),
        11, 240, "region", 30, (0.01, 0.02, 0.04, 0.08, 0.16, 0.32), SmallRecipe(),
        {
            RANDOM: AT_RANDOM,
            "plain": Strategy("plain mean entropy", "plain", select={"diversity": 0.0}),
            "ours": Strategy("ours", "selection", {"embeddings": True}),
            "ours-score": Strategy("ours, without diversity", "selection", select={"diversity": 0.0}),
        },
    ),
    "nuclei": Plan(
        "nuclei", "nuclei, whole images", ("background", "nucleus"), None, 320, "image", 0, (4, 8, 16, 32, 64, 128),
        SmallRecipe(),
        {
            RANDOM: AT_RANDOM,
            "plain": Strategy("plain mean entropy", "plain", select={"diversity": 0.0}),
            "ours": Strategy("ours", "selection", {"embeddings": True}),
            "ours-score": Strategy("ours, without diversity", "selection", select={"diversity": 0.0}),
        },
    ),
}  # fmt: skip
SHARED = Strategy("")

console = Console(stderr=True)


@dataclass(frozen=True)
class Task:
    """One training: of a strategy after `round` choices, of the common start (round 0), or with all labels."""

    dataset: str
    strategy: str
    seed: int
    round: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.dataset, self.strategy, self.seed, self.round

    @property
    def before(self) -> Task | None:
        """The training whose net chooses what this one is given."""
        if self.strategy in (START, FULL):
            return None
        return replace(self, strategy=START, round=0) if self.round == 1 else replace(self, round=self.round - 1)


@dataclass(frozen=True)
class Place:
    """What may be labelled at once: a photo's path and a box in it."""

    path: str
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Photos:
    """A prepared part of a data set in memory, by path."""

    folder: Path
    rgb: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]


def tasks_of(plan: Plan, seed: int) -> list[Task]:
    """All trainings of a seed, in an order in which each comes after the one it builds on."""
    rounds = range(1, len(plan.budgets))
    return [Task(plan.name, START, seed, 0), Task(plan.name, FULL, seed, 0)] + [
        Task(plan.name, name, seed, number) for number in rounds for name in plan.strategies
    ]


def protocol(plan: Plan, strategy: str) -> str:
    """Identity of all settings that a result depends on; results of others are not mixed with it."""
    settings = {key: value for key, value in asdict(plan).items() if key not in ("title", "strategies")}
    chosen = plan.strategies.get(strategy, SHARED)
    settings |= {"table": chosen.table, "export": dict(chosen.export), "select": dict(chosen.select)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def shrink_factor(height: int, width: int, longest: int) -> int:
    """The smallest whole factor by which both sides come to at most `longest`.

    >>> shrink_factor(360, 480, 240), shrink_factor(256, 320, 320), shrink_factor(1040, 1388, 320)
    (2, 1, 5)
    """
    return -(-max(height, width) // longest)


def prepare(source: Path, target: Path, plan: Plan) -> None:
    """Write the photos of train and val shrunk by area, and their labels by the pixel in the middle, as PNG; once."""
    for part in ("train", "val"):
        pairs, folder = find_pairs(source / part / "images", source / part / "labels"), target / part
        wanted = json.dumps([plan.longest, plan.ignore_index, [image.name for image, _ in pairs]])
        if (folder / "done.json").is_file() and (folder / "done.json").read_text() == wanted:
            continue
        for image, label in pairs:
            rgb, label_HW = read_image(image).rgb, read_label(label, len(plan.classes), plan.ignore_index)
            height, width = label_HW.shape
            f = shrink_factor(height, width, plan.longest)
            H, W = height // f, width // f
            path = image.relative_to(source / part / "images").with_suffix(".png")
            small = cv2.resize(rgb[: H * f, : W * f], (W, H), interpolation=cv2.INTER_AREA)
            for name, picture in (
                ("images", small[..., ::-1]),
                ("labels", label_HW[f // 2 : H * f : f, f // 2 : W * f : f]),
            ):
                (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / name / path), picture)
        (folder / "done.json").write_text(wanted)


@lru_cache(maxsize=2)
def read_photos(folder: Path, C: int) -> Photos:
    """All of a prepared part; labels are `IGNORED` where the file has that."""
    rgb, labels = {}, {}
    for image, label in find_pairs(folder / "images", folder / "labels"):
        path = image.relative_to(folder / "images").as_posix()
        rgb[path], labels[path] = read_image(image).rgb, read_label(label, C, IGNORED)
    return Photos(folder, rgb, labels)


def cells(path: str, height: int, width: int, side: int) -> Iterator[Place]:
    """Squares of that side that cover a photo; what is left at its right and lower edge is narrower."""
    for y in range(0, height, side):
        for x in range(0, width, side):
            yield Place(path, x, y, min(side, width - x), min(side, height - y))


def units_of(plan: Plan, photos: Photos) -> list[Place]:
    """Everything that may be labelled, in a fixed order."""
    sizes = {path: label.shape for path, label in photos.labels.items()}
    if plan.unit == "image":
        return [Place(path, 0, 0, W, H) for path, (H, W) in sizes.items()]
    return [place for path, (H, W) in sizes.items() for place in cells(path, H, W, plan.cell)]


def units_after(plan: Plan, units: int) -> list[int]:
    """How many units are labelled after each round.

    >>> units_after(PLANS["camvid"], 17616), units_after(PLANS["nuclei"], 398)
    ([176, 352, 705, 1409, 2819, 5637], [4, 8, 16, 32, 64, 128])
    """
    return [min(units, round(each * units) if each < 1 else int(each)) for each in plan.budgets]


def run_task(task: Task, plan: Plan, out: Path) -> dict[str, Any]:
    """Choose what is labelled, train, and judge on val; the line that goes into results.jsonl."""
    started = time.monotonic()
    photos = read_photos(out / "data" / plan.name / "train", len(plan.classes))
    units = units_of(plan, photos)
    wanted = units_after(plan, len(units))[task.round]
    folder = folder_of(task, plan, out)
    if task.strategy == FULL:
        places = units
    elif (folder / "labelled.csv").is_file():
        places = read_places(folder / "labelled.csv")
    else:
        places = choose(task, plan, units, wanted, out)
        write_places(folder / "labelled.csv", places, plan.unit)
    chosen = time.monotonic()
    encoded = encode(out / "data" / plan.name / "train", len(plan.classes), plan.recipe)
    net = train_small(known(photos, places), len(plan.classes), plan.recipe, seed_of(task), encoded)
    trained = time.monotonic()
    save_small(folder / "model", net, plan.classes, plan.recipe)
    confusions = judge(folder / "model", out / "data" / plan.name / "val")
    if task.strategy == FULL or task.round == len(plan.budgets) - 1:
        shutil.rmtree(folder / "model")
    before = task.before
    if before is not None and before.strategy != START:
        shutil.rmtree(folder_of(before, plan, out) / "model", ignore_errors=True)
    finished = time.monotonic()
    return {
        "dataset": task.dataset, "strategy": task.strategy, "seed": task.seed, "round": task.round,
        "protocol": protocol(plan, task.strategy), "labelled": len(places), "units": len(units),
        "choose_s": round(chosen - started, 1), "train_s": round(trained - chosen, 1), "judge_s": round(finished - trained, 1),
        "confusions": confusions,
    }  # fmt: skip


def folder_of(task: Task, plan: Plan, out: Path) -> Path:
    """Where a training leaves its labels and its net."""
    name = f"{task.strategy}-{protocol(plan, task.strategy)}"
    return out / "runs" / task.dataset / f"seed-{task.seed}" / name / f"round-{task.round}"


def seed_of(task: Task) -> int:
    """Of a training: the same for all strategies, so that they differ by their labels alone."""
    return 1000 * task.seed + task.round


def choose(task: Task, plan: Plan, units: Sequence[Place], wanted: int, out: Path) -> list[Place]:
    """What is labelled in the round of the task: what was labelled before, and what the strategy adds."""
    rng = np.random.default_rng([task.seed, task.round])
    before = task.before
    if before is None:
        return [units[k] for k in rng.permutation(len(units))[:wanted]]
    earlier = folder_of(before, plan, out)
    places, strategy = read_places(earlier / "labelled.csv"), plan.strategies[task.strategy]
    if not strategy.table:
        taken = set(places)
        left = [unit for unit in units if unit not in taken]
        return places + [left[k] for k in rng.permutation(len(left))[: wanted - len(places)]]
    work = folder_of(task, plan, out) / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    images = out / "data" / plan.name / "train" / "images"
    export(
        images, work / "exported", earlier / "model", calibration="none", backend="torch", workers=1, **strategy.export
    )
    settings: dict[str, Any] = {"region": f"grid:{plan.cell}"} if plan.unit == "region" else {}
    select(
        work / "exported", work / "selected", budget=wanted - len(places), unit=plan.unit,
        labelled=[earlier / "labelled.csv"], seed=task.seed, workers=1, **settings, **strategy.select,
    )  # fmt: skip
    added = read_places(work / "selected" / f"{strategy.table}.csv")
    if len(added) != wanted - len(places) or set(added) & set(places):
        raise ValueError(
            f"select: expected {wanted - len(places)} new {plan.unit}s. Received: {len(set(added) - set(places))}"
        )
    shutil.rmtree(work)
    return places + added


def read_places(table: Path) -> list[Place]:
    """What a selection lists."""
    with table.open(newline="") as lines:
        return [
            Place(row["path"], *(int(row[key]) for key in ("x", "y", "width", "height")))
            for row in csv.DictReader(lines)
        ]


def write_places(table: Path, places: Iterable[Place], unit: str) -> None:
    """A table as `select` writes and reads it."""
    table.parent.mkdir(parents=True, exist_ok=True)
    part = table.with_suffix(".part")
    with part.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for rank, place in enumerate(places, 1):
            writer.writerow({"rank": rank, "unit": unit, "number": 0} | asdict(place))
    os.replace(part, table)


def known(photos: Photos, places: Sequence[Place]) -> dict[str, np.ndarray]:
    """Labels of the photos of which something is labelled, the rest of them ignored."""
    labels: dict[str, np.ndarray] = {}
    for place in places:
        box = np.s_[place.y : place.y + place.height, place.x : place.x + place.width]
        own_HW = labels.setdefault(place.path, np.full_like(photos.labels[place.path], IGNORED))
        own_HW[box] = photos.labels[place.path][box]
    return labels


@lru_cache(maxsize=2)
def encode(part: Path, C: int, recipe: SmallRecipe) -> Encoded:
    """What the encoder gives of a prepared part, kept from training to training."""
    return Encoded(recipe, read_photos(part, C).rgb)


def judge(model: Path, part: Path) -> list[list[int]]:
    """Confusion counts C·C of each cluster of the images, in the order of `seguncert.find_clusters`."""
    pairs = find_pairs(part / "images", part / "labels")
    of = find_clusters([image.name for image, _ in pairs]).of
    sums: dict[str, Any] = defaultdict(int)
    net = load_model(model, "cpu")
    with half_precision(net.device):
        measured = measure(net, pairs, IGNORED)
    for image, scores in measured.items():
        sums[of[image.name]] += scores.confusion
    return [counts_CC.ravel().tolist() for counts_CC in sums.values()]


def run_all(plans: Sequence[Plan], seeds: int, out: Path, workers: int) -> None:
    """Do what is not done, `workers` trainings at once, each on one thread; a line is written as soon as it is known."""
    results = out / "results.jsonl"
    lines = read_results(results, plans)
    by_name = {plan.name: plan for plan in plans}
    tasks = [task for seed in range(seeds) for plan in plans for task in tasks_of(plan, seed)]
    done = {(line["dataset"], line["strategy"], line["seed"], line["round"]) for line in lines}
    todo = [task for task in tasks if task.key not in done]
    console.print(f"{len(tasks) - len(todo)} of {len(tasks)} trainings are done")
    seconds = Seconds(lines)
    running: dict[Future[dict[str, Any]], Task] = {}
    with processes(workers) as pool:
        while todo or running:
            ready = [task for task in todo if task.before is None or task.before.key in done]
            for task in ready[: workers - len(running)]:
                todo.remove(task)
                running[pool.submit(run_task, task, by_name[task.dataset], out)] = task
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task, line = running.pop(future), future.result()
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                done.add(task.key)
                seconds.add(line)
                left = seconds.of([*todo, *running.values()]) / workers / 60
                console.print(
                    f"{len(done)}/{len(tasks)}  {task.dataset} {task.strategy} seed {task.seed} round {task.round}: {line['labelled']}"
                    f" of {line['units']}, mIoU {miou_of(line):.3f}; chosen in {line['choose_s']:.0f} s, trained in"
                    f" {line['train_s']:.0f} s, judged in {line['judge_s']:.0f} s; left {left:.0f} min"
                )


class Seconds:
    """How long trainings took, to tell how long others will take."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]):
        self.seen: dict[tuple[str, bool], list[float]] = defaultdict(list)
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        self.seen[line["dataset"], line["choose_s"] > 3].append(line["choose_s"] + line["train_s"] + line["judge_s"])

    def of(self, tasks: Iterable[Task]) -> float:
        """Of several tasks one after another, by the mean of like ones, or of all where there is none."""
        every = [second for seen in self.seen.values() for second in seen] or [0.0]
        like = {key: sum(seen) / len(seen) for key, seen in self.seen.items()}
        mean = sum(every) / len(every)
        return math.fsum(like.get((task.dataset, task.strategy not in (START, FULL, RANDOM)), mean) for task in tasks)


def read_results(file: Path, plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Lines of results.jsonl that belong to the plans as they are now; a last line that was cut short is left out."""
    if not file.is_file():
        return []
    found, text = [], file.read_text()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        file.write_text(text)
    by_name, others = {plan.name: plan for plan in plans}, 0
    for line in map(json.loads, text.splitlines()):
        plan = by_name.get(line["dataset"])
        if plan is None:
            continue
        if line["protocol"] == protocol(plan, line["strategy"]) and line["strategy"] in (START, FULL, *plan.strategies):
            found.append(line)
        else:
            others += 1
    if others:
        console.print(f"{others} lines of {file} are of other settings, and left out")
    return found


def describe(plan: Plan) -> str:
    """The protocol in words."""
    recipe, budgets = plan.recipe, ", ".join(f"{100 * b:g} %" if b < 1 else f"{b:g}" for b in plan.budgets)
    what = (
        "images"
        if plan.unit == "image"
        else f"cells of {plan.cell}x{plan.cell} pixels, the rest of a photo being ignored"
    )
    lines = [
        f"{plan.title}. Photos are shrunk by the smallest whole factor that brings both sides to at most {plan.longest} pixels; labels"
        f" are those of the pixels in the middle. Labelled at once: {what}; in all after each round {budgets}. The first budget is"
        " drawn at random, by seed, and is the same for all strategies. Random picks are drawn here; the others by `seguncert.select`"
        " from an export of all training photos by the net of the round before.",
        f"Each training begins anew from ImageNet: {recipe}. Its seed follows from the seed and the round, not from the strategy."
        " mIoU is of all val pixels together, at the size of the shrunk photos.",
    ]
    for name, each in plan.strategies.items():
        if each.table:
            lines.append(
                f"{name} ({each.title}): {each.table}.csv, export {dict(each.export)}, select {dict(each.select)}"
            )
    return "\n".join(lines)


def miou_of(line: Mapping[str, Any]) -> float:
    """mIoU of all images of a line."""
    return float(miou(squares(np.sum(line["confusions"], axis=0))))


def main(
    out: Annotated[Path, typer.Argument(help="folder of the study; the same one goes on")],
    camvid: Annotated[Path | None, typer.Option(help="folder with train and val, images and labels")] = None,
    nuclei: Annotated[Path | None, typer.Option(help="the same of nuclei")] = None,
    seeds: Annotated[int, typer.Option(help="how many, and of how many is told")] = 3,
    workers: Annotated[int, typer.Option(help="trainings at once, a thread each")] = 2,
    updates: Annotated[int | None, typer.Option(help="of each training, to try the study out")] = None,
    report_only: Annotated[bool, typer.Option(help="print and draw what there is")] = False,
    jpeg: Annotated[Path | None, typer.Option(help="the curves as a JPEG too")] = None,
) -> None:
    """Run what is not done, print the tables and draw the curves."""
    sources = {name: source for name, source in (("camvid", camvid), ("nuclei", nuclei)) if source is not None}
    plans = [plan for name, plan in PLANS.items() if name in sources or (report_only and not sources)]
    if not plans:
        raise ValueError("data: expected --camvid or --nuclei, or both. Received: none")
    if seeds < 1 or workers < 1:
        raise ValueError(f"seeds, workers: expected 1 or more. Received: {seeds}, {workers}")
    if updates is not None:
        plans = [replace(plan, recipe=replace(plan.recipe, updates=updates)) for plan in plans]
    out.mkdir(parents=True, exist_ok=True)
    if not report_only:
        for plan in plans:
            prepare(sources[plan.name], out / "data" / plan.name, plan)
        try:
            run_all(plans, seeds, out, workers)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on")
            raise typer.Exit(130) from None
    lines = [line for line in read_results(out / "results.jsonl", plans) if line["seed"] < seeds]
    report(plans, lines, out, jpeg, {plan.name: describe(plan) for plan in plans})


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:  # the user's to mend: one line
        print(error, file=sys.stderr)
        sys.exit(2)
