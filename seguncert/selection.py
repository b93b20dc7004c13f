"""What to label next: from what an export wrote to a list that earns its budget, its contact sheet and its hand-over files.

    gain = distance^diversity · score        each time to the nearest of what is labelled or chosen; see `seguncert.choice`

Random picks, and picks by the plain mean of one map, of the same budget are written beside: many ways to choose do not beat
random.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool

from seguncert import annotation, contact
from seguncert.aggregate import DISAGREEMENT, doubt_of, parse_score
from seguncert.candidates import (
    AT_RANDOM,
    BY_MEAN,
    BY_SCORE,
    MOST,
    Candidates,
    Found,
    Wish,
    check_wish,
    find_candidates,
    partition,
    vectors,
)
from seguncert.choice import Asked, Chosen, Pick, choose, in_order
from seguncert.job import available_cores
from seguncert.labelled import OF_BOXES, Labelled, masks_beside, read_labelled
from seguncert.maps import MAPS
from seguncert.pool import Pool, PoolError, read_pool
from seguncert.regions import estimated_clicks
from seguncert.render import overlay_doubt
from seguncert.store import cannot_write, write_file

COLUMNS = (
    "rank", "path", "unit", "x", "y", "width", "height", "number", "score", "distance", "clicks", "sequence", "frame", "class",
    "reason",
)  # fmt: skip
FILES = {  # beside the contact sheet, by what asks for them
    "": [
        (
            "selection.csv",
            "the picks in their order; `seguncert select --labelled selection.csv` takes them for labelled",
        ),
        ("random.csv", "random picks of the same budget; beside them plain.csv, by a plain mean"),
    ],
    "coco": [("coco.json", "COCO with RLE masks: pycocotools, FiftyOne, CVAT (as “COCO 1.0”)")],
    "cvat": [("cvat.xml", "CVAT: make a task with the labels of cvat-labels.json, then upload as “CVAT 1.1”")],
    "cvat-masks": [("cvat-masks.zip", "CVAT: upload as “Segmentation mask 1.1”; pre-labels only")],
    "label-studio": [
        ("label-studio.json", "Label Studio: a project with the interface of label-studio.xml, then import")
    ],
    "png": [("png/items.csv", "pre-labels as PNGs of class indices, 255 where there is none, and this table")],
}
OURS = (
    "selection.json", "selection.csv", "selection.html", "random.csv", "plain.csv", "regions", "random-regions", "plain-regions",
    "coco.json", "cvat.xml", "cvat-labels.json", "cvat-masks.zip", "label-studio.json", "label-studio.xml", "png",
)  # fmt: skip
FORMER = ".former"  # where an earlier selection lies while it is replaced
PICTURES = 200  # on the contact sheet
MENTIONED = 0.15  # share of the doubt from which on a class is worth a word
PLAIN = "entropy"  # the map whose plain mean is compared with, where the export has it
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Selected:
    """Outcome: what was picked in order, random and plain picks of the same budget, and what the user should know."""

    out: Path
    picks: list[Pick]
    random: list[Pick]
    plain: list[Pick]
    notes: list[str]
    about: dict[str, Any]


def select(
    exported: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    budget: int,
    budget_in: str = "units",
    unit: str = "image",
    region: str = "grid:64",
    score: str | None = None,
    labelled: Sequence[str | os.PathLike[str]] = (),
    diversity: float | None = None,
    radius: float | None = None,
    gap: str | int | float = "auto",
    quotas: Mapping[str, float] | None = None,
    per_image: int = 20,
    background: str | None = None,
    hand_over: Sequence[str] = (),
    url_prefix: str = annotation.LOCAL_FILES,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Selected:
    """Choose what to label next of the images that `seguncert export` wrote maps of; writes a folder.

    Args:
        exported: folder that `seguncert export` wrote, for any diversity with `--embeddings`.
        out: folder to write; an earlier selection in it is replaced, and nothing else.
        budget: how much may be picked; `budget_in` units, or clicks as `seguncert.regions.estimated_clicks` has them. Then
            scores are divided by the clicks.
        unit: image, region (`region` says which: grid:SIDE or superpixel:AREA, in pixels), segment (what hangs together of a
            shown class) or pixel (at most `per_image` of an image).
        score: see `seguncert.aggregate`; None is entropy:class-weighted, or the first map of an export without entropy.
        labelled: lists of what is labelled; see `seguncert.labelled`.
        diversity: power of the distance to the nearest of what is labelled or picked; 0 is by score alone. None is 1.
        radius: what is nearer is left out as too similar, in units of the typical distance of two candidates. None is 0.1 for
            images, else 0.
        gap: difference of frame numbers below which two frames of a video are not both picked, or "10s"; auto is half of what
            an even spread of the budget would leave, for images.
        quotas: by class the share of the picked area, as predicted, that is to be reached.
        background: class that is not foreground, for scores of the foreground; None is the first of two.
        hand_over: files for labelling tools, of `seguncert.annotation.FORMATS`, with the shown classes as pre-labels;
            `url_prefix` goes before the paths in those of Label Studio.
        seed: of the random picks.

    Raises:
        PoolError: the export is none, is not finished, or lacks what is asked for.
        ValueError: a setting is wrong, or more is asked for than there is.
    """
    exported, out = Path(exported), Path(os.path.abspath(out))
    pool = read_pool(exported)
    plain = PLAIN if PLAIN in pool.means else next(iter(pool.means))
    asked = Asked(
        budget, budget_in, unit, region, score or f"{plain}:class-weighted", 1.0 if diversity is None else diversity, radius,
        str(gap), dict(quotas or {}), per_image, background, seed,
    )  # fmt: skip
    unknown = [name for name in asked.quotas if name not in pool.classes]
    if unknown:
        raise ValueError(f"quota: expected classes of the model: {', '.join(pool.classes)}. Received: {unknown[0]!r}")
    wish = Wish(
        unit, region, parse_score(asked.score), plain, per_image, _background(pool, asked), budget_in == "clicks", seed
    )
    check_wish(pool, wish)
    if pool.embeddings_ND is None and (asked.diversity > 0 or asked.radius):
        raise PoolError(
            f"diversity: expected an export with embeddings. Received: {exported}, which has none. Export again with"
            " --embeddings, into a new folder, or give --diversity 0 and no radius."
        )
    hand_over = list(dict.fromkeys(hand_over))
    unknown = [name for name in hand_over if name not in annotation.FORMATS]
    if unknown:
        raise ValueError(f"hand-over: expected some of {', '.join(annotation.FORMATS)}. Received: {unknown[0]!r}")
    _check_out(out, Path(pool.run["input"]), labelled)
    known = read_labelled(labelled, pool.paths)
    every = find_candidates(pool, wish, known, workers or min(available_cores(), 16), progress)
    found, left = every.candidates, every.total - every.labelled
    if asked.budget_in == "units" and budget > left:
        most = f", {per_image} an image" if unit == "pixel" else ""
        raise ValueError(
            f"budget: expected at most {left:,}, the {unit}s that are not labelled{most}. Received: {budget:,}. Lower it, or"
            " export more images."
        )
    chosen = choose(pool, asked, found)
    drawn = in_order(pool, asked, found, AT_RANDOM, found.key_M, "random")
    greedy = in_order(pool, asked, found, BY_MEAN, -found.plain_M, f"mean {plain}")
    if known.parts and unit == "image":
        chosen.notes.append(f"{len(known.parts)} images are labelled in parts, and count as not labelled here")
    if every.total > len(found.image_M):
        chosen.notes.append(f"of {every.total:,} {unit}s the {MOST:,} of best score were looked at")
    scene = _Scene(pool, wish, asked, found, known, every)
    picks = scene.explained(chosen.picks)
    part = out / ".part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            for name, rows in (("selection", picks), ("random", drawn), ("plain", greedy)):
                rows = scene.numbered(rows)
                write_file(part / f"{name}.csv", _table(rows, scene.unit))
                if name == "selection" or scene.unit not in OF_BOXES:
                    scene.write_regions(part / masks_beside(name), rows)
            colours_C3 = np.array(pool.run["model"]["colours"], np.uint8)
            chosen.notes.extend(
                annotation.hand_over(
                    part, pool.classes, colours_C3, scene.items(picks), formats=hand_over, url_prefix=url_prefix
                )
            )
            about = scene.about(picks, drawn, greedy, chosen)
            write_file(part / "selection.html", scene.sheet(picks, chosen, about, hand_over))
            write_file(part / "selection.json", json.dumps(about, indent=2) + "\n")
            _replace(out, part)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            if not any(out.iterdir()):
                out.rmdir()
    except OSError as error:
        raise cannot_write(out, error) from None
    return Selected(out, picks, drawn, greedy, chosen.notes, about)


def _background(pool: Pool, asked: Asked) -> int:
    foreground = any(term.kind == "foreground" for term in parse_score(asked.score))
    if asked.background is None:
        if foreground and len(pool.classes) != 2:
            raise ValueError(
                f"background: expected with a score of the foreground the class that is not: one of {', '.join(pool.classes)}."
                " Received: none. Give --background CLASS."
            )
        return 0
    if asked.background not in pool.classes:
        raise ValueError(f"background: expected one of {', '.join(pool.classes)}. Received: {asked.background!r}")
    return pool.classes.index(asked.background)


def _check_out(out: Path, photos: Path, labelled: Sequence[str | os.PathLike[str]]) -> None:
    """Raise ValueError where writing to `out` would take something from the user."""
    ours = [out / "selection.json", out / FORMER / "selection.json"]  # the latter after a kill between the two
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not any(each.is_file() for each in ours))):
        raise ValueError(
            f"OUT: expected a new folder, or one of an earlier selection. Received: {out}, which holds something else"
        )
    if photos.resolve() in [out.resolve(), *out.resolve().parents]:
        raise ValueError(
            f"OUT: expected a folder apart from the photos. Received: {out}, where the next export would find its PNGs"
        )
    for each in labelled:
        if out.resolve() in Path(each).resolve().parents:
            raise ValueError(
                f"OUT: expected another folder than that of {each}, which says what is labelled and would be replaced. Received: {out}"
            )


def _replace(out: Path, part: Path) -> None:
    """Bring what is in `part` to `out` in place of an earlier selection, which comes back if that fails."""
    former = out / FORMER
    shutil.rmtree(former, ignore_errors=True)
    former.mkdir()
    try:
        for name in OURS:
            if (out / name).exists():
                os.replace(out / name, former / name)
        for name in os.listdir(part):
            os.replace(part / name, out / name)
    except BaseException:
        for name in os.listdir(former):
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            os.replace(former / name, out / name)
        former.rmdir()
        raise
    shutil.rmtree(former)


def _table(picks: Sequence[Pick], unit: str) -> str:
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for pick in picks:
        cells = [
            pick.rank, pick.path, unit, *pick.box, pick.number, f"{pick.score:.6g}",
            "" if np.isnan(pick.distance) else f"{pick.distance:.4g}", pick.clicks or "", pick.sequence,
            "" if pick.frame is None else pick.frame, pick.label, pick.reason,
        ]  # fmt: skip
        quoted = "\r" in pick.path  # it would end a line, and only quoting all of a row quotes it
        (csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_ALL) if quoted else writer).writerow(cells)
    return table.getvalue()


@dataclass(frozen=True, eq=False)
class _Scene:
    """A selection with all that it was made from: what is told of it, and drawn."""

    pool: Pool
    wish: Wish
    asked: Asked
    found: Candidates
    known: Labelled
    every: Found

    @property
    def unit(self) -> str:
        """Of the tables: superpixels are regions that their box does not describe."""
        return (
            "superpixel" if self.wish.unit == "region" and self.wish.region.startswith("superpixel") else self.wish.unit
        )

    def masks(self, image: int, picks: Sequence[Pick]) -> list[Bool[np.ndarray, "h w"] | None]:
        """Which pixels of its box each pick of an image has; None where it is all of them."""
        if self.unit in ("image", *OF_BOXES):
            return [None] * len(picks)
        parts = partition(self.pool, self.wish, image)
        return [parts.mask(int(self.found.number_M[pick.row])) for pick in picks]

    def numbered(self, picks: Sequence[Pick]) -> list[Pick]:
        """Parts of an image numbered from 1, in their order; whole images have number 0."""
        told = list(picks)
        for places in self.by_image(picks).values() if self.unit != "image" else ():
            for number, at in enumerate(places, 1):
                told[at] = replace(told[at], number=number)
        return told

    def by_image(self, picks: Sequence[Pick]) -> dict[int, list[int]]:
        """Places in `picks` by image, images in order of their best."""
        places: dict[int, list[int]] = {}
        for at, pick in enumerate(picks):
            places.setdefault(int(self.found.image_M[pick.row]), []).append(at)
        return places

    def explained(self, picks: Sequence[Pick]) -> list[Pick]:
        """Each with the class that most of its doubt is in, and why it was picked; reads the maps of the picked images."""
        first = next((term.map for term in self.wish.terms if term.map != DISAGREEMENT), self.wish.plain)
        open_M = ~self.found.labelled_M & (self.found.ways_M & BY_SCORE).astype(bool)
        ordered = np.sort(self.found.score_M[open_M])
        told, C = list(picks), len(self.pool.classes)
        for image, places in self.by_image(picks).items():
            labels_HW, doubt_HW = self.pool.labels(image), doubt_of(self.pool.map(image, first), first)
            for at, mask in zip(places, self.masks(image, [picks[at] for at in places]), strict=True):
                x, y, width, height = picks[at].box
                window = (slice(y, y + height), slice(x, x + width))
                inside = np.ones((height, width), bool) if mask is None else mask
                doubt_C = np.bincount(labels_HW[window][inside], doubt_HW[window][inside], C)
                reason = "; ".join(filter(None, [picks[at].reason, self._words(picks[at], ordered, doubt_C, first)]))
                label = self.pool.classes[int(doubt_C.argmax())] if doubt_C.any() else picks[at].label
                told[at] = replace(picks[at], label=label, reason=reason)
        return told

    def _words(self, pick: Pick, ordered: np.ndarray, doubt_C: np.ndarray, name: str) -> str:
        above = len(ordered) - int(np.searchsorted(ordered, pick.score, side="right"))
        place = f"{_ordinal(above + 1)} score of {len(ordered):,}"
        share_C = doubt_C / max(doubt_C.sum(), 1e-12)
        named = [c for c in np.argsort(-share_C, kind="stable")[:3] if share_C[c] >= MENTIONED]
        title = MAPS[name].title.lower() if MAPS[name].sure_is == "low" else f"lack of {MAPS[name].title.lower()}"
        where = ", ".join(f"{self.pool.classes[c]} {share_C[c]:.0%}" for c in named)
        words = [place]
        if where and pick.unit != "pixel":
            words.append(f"{title} mostly where {where} is shown")
        if not np.isnan(pick.distance):
            to = f"pick {pick.near_rank}" if pick.near_rank else "what is labelled"
            words.append(f"{pick.distance:.2g} typical distances from {to}")
        return "; ".join(words)

    def about(
        self, picks: Sequence[Pick], drawn: Sequence[Pick], plain: Sequence[Pick], chosen: Chosen
    ) -> dict[str, Any]:
        """What selection.json says."""
        pool, found = self.pool, self.found
        rows = {
            name: np.array([pick.row for pick in each], np.int64)
            for name, each in (("picks", picks), ("random", drawn), ("plain", plain))
        }
        rows["labelled"] = np.flatnonzero(found.labelled_M)
        balance = {"pool": _shares(pool.areas_NC.sum(0))} | {
            name: _shares(self._areas(each)) for name, each in rows.items()
        }
        where_MD = vectors(pool, found, self.wish.unit)
        comparison = {
            name: self._figures(each, where_MD) for name, each in (("ours", picks), ("random", drawn), ("plain", plain))
        }
        model = {key: pool.run["model"][key] for key in ("name", "sha256", "classes")}
        return {
            "seguncert": version("seguncert"), "exported": str(pool.out.resolve()), "model": model,
            "method": pool.run["method"], "calibration": pool.run["calibration"],
            **asdict(self.asked), "score": " * ".join(map(str, self.wish.terms)), "plain": f"{self.wish.plain}:mean",
            "images": len(pool.paths), "failed": pool.failed, "candidates": self.every.total, "radius": self.asked.least,
            "labelled_images": len(self.known.images), "labelled_candidates": self.every.labelled, "picked": len(picks),
            "too_similar": chosen.similar_count, "too_near_in_video": chosen.blocked_count, "notes": chosen.notes,
            "balance": {name: None if each is None else dict(zip(pool.classes, each, strict=True)) for name, each in balance.items()},
            "comparison": comparison,
        }  # fmt: skip

    def _areas(self, rows: np.ndarray) -> np.ndarray:
        return (self.found.shares_MC[rows].astype(np.float64) * self.found.size_M[rows, None]).sum(0)

    def _figures(self, picks: Sequence[Pick], where_MD: np.ndarray | None) -> dict[str, float | None]:
        """Of one way to choose: mean score, mean distance to the nearest other pick, sequences, images, clicks."""
        rows = np.array([pick.row for pick in picks], np.int64)
        images = np.unique(self.found.image_M[rows])
        sequences = {pick.sequence or pick.path for pick in picks}
        apart = None
        if where_MD is not None and 1 < len(rows) <= 5000:
            own_ND = where_MD[rows].astype(np.float64)
            square_N = (own_ND**2).sum(1)
            square_NN = square_N[:, None] + square_N - 2 * own_ND @ own_ND.T
            np.fill_diagonal(square_NN, np.inf)
            apart = float(np.sqrt(np.maximum(square_NN.min(1), 0)).mean())
        clicks = None
        if len(images) <= 1000:
            by_image = self.by_image(picks).items()
            clicks = sum(self._clicks(image, [picks[at] for at in places]) for image, places in by_image)
        score = float(self.found.score_M[rows].mean()) if len(rows) else None
        return {"score": score, "distance": apart, "sequences": len(sequences), "images": len(images), "clicks": clicks}

    def _clicks(self, image: int, picks: Sequence[Pick]) -> int:
        """What labelling some picks of an image is estimated to take."""
        if self.unit == "pixel":
            return len(picks)
        labels_HW, total = self.pool.labels(image), 0
        for pick, mask in zip(picks, self.masks(image, picks), strict=True):
            x, y, width, height = pick.box
            total += max(1, estimated_clicks(labels_HW[y : y + height, x : x + width], mask))
        return total

    def write_regions(self, folder: Path, picks: Sequence[Pick]) -> None:
        """For each image with picked parts a 16-bit PNG: a part's number where it is, 0 elsewhere."""
        if self.unit == "image":
            return
        for image, places in self.by_image(picks).items():
            own = [picks[at] for at in places]
            if len(own) > 65_535:
                raise ValueError(
                    f"budget: expected at most 65,535 parts of one image. Received: {len(own):,} of {self.pool.paths[image]}; take larger ones"
                )
            numbers_HW = np.zeros(self.pool.sizes_N2[image], np.uint16)
            for pick, mask in zip(own, self.masks(image, own), strict=True):
                x, y, width, height = pick.box
                window_hw = numbers_HW[y : y + height, x : x + width]
                window_hw[True if mask is None else mask] = pick.number
            file = folder / f"{self.pool.paths[image]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(cv2.imencode(".png", numbers_HW)[1].tobytes())

    def items(self, picks: Sequence[Pick]) -> Iterator[annotation.Item]:
        """What labelling tools are told of each picked image."""
        for image, places in self.by_image(picks).items():
            own = [picks[at] for at in places]
            H, W = self.pool.sizes_N2[image].tolist()
            regions = [] if self.unit == "image" else [
                annotation.Region(pick.rank, pick.box, mask, pick.score, pick.reason)
                for pick, mask in zip(own, self.masks(image, own), strict=True)
            ]  # fmt: skip
            first = own[0]
            yield annotation.Item(
                first.path, W, H, self.pool.labels(image), first.rank, first.score, first.reason, tuple(regions)
            )

    def sheet(self, picks: Sequence[Pick], chosen: Chosen, about: dict[str, Any], formats: Sequence[str]) -> str:
        """The contact sheet as HTML."""
        similar = chosen.similar
        pictures = dict[str, bytes]()
        for image, places in list(self.by_image(picks).items())[:PICTURES]:
            pictures[self.pool.paths[image]] = self._picture(image, [picks[at] for at in places])
        row_of = {path: image for image, path in enumerate(self.pool.paths)}
        for path in (path for pick in similar for path in (pick.path, pick.near)):
            if path and path not in pictures:
                pictures[path] = self._picture(row_of[path], [])
        files = [
            (name, told) for kind, told_of in FILES.items() if not kind or kind in formats for name, told in told_of
        ]
        return contact.render_sheet(
            contact.Sheet(
                self.pool.run,
                contact.Asked(
                    unit=self.asked.unit,
                    score=about["score"].replace("*", "×"),
                    budget=self.asked.budget,
                    pool=len(self.pool.paths),
                    counted_in=self.asked.budget_in,
                    labelled=len(self.known.images | self.known.parts),
                    radius=(self.asked.least or None) if self.pool.embeddings_ND is not None else None,
                    gap=self._gap(),
                    quotas={name: f"{share:.0%}" for name, share in self.asked.quotas.items()},
                    seed=self.asked.seed,
                    diversity=self.asked.diversity,
                    plain=self.wish.plain,
                ),
                [self._row(pick) for pick in picks],
                pictures,
                contact.LeftOut(chosen.similar_count, [self._row(pick) for pick in similar]),
                contact.LeftOut(chosen.blocked_count, [self._row(pick) for pick in chosen.blocked]),
                {name: None if each is None else list(each.values()) for name, each in about["balance"].items()},
                about["comparison"],
                files,
                chosen.notes,
            )
        )  # fmt: skip

    def _gap(self) -> int | str:
        """The gap as the sheet says it."""
        gap = self.asked.gap
        if gap == "auto":
            return "half of an even spread" if self.wish.unit == "image" else 0
        return f"{gap[:-1]} s" if gap.endswith("s") else int(float(gap)) if float(gap).is_integer() else gap

    def _row(self, pick: Pick) -> dict[str, Any]:
        H, W = self.pool.sizes_N2[self.found.image_M[pick.row]].tolist()
        x, y, width, height = pick.box
        return {
            "rank": pick.rank, "path": pick.path, "unit": pick.unit, "x": x, "y": y, "width": width, "height": height,
            "score": pick.score, "distance": pick.distance, "clicks": pick.clicks or None, "sequence": pick.sequence,
            "frame": pick.frame, "class": pick.label, "reason": pick.reason, "size": (W, H), "near": pick.near,
            "near_rank": pick.near_rank,
        }  # fmt: skip

    def _picture(self, image: int, picks: Sequence[Pick]) -> bytes:
        """The photo under the first map, parts that are picked outlined."""
        rgb = self.pool.photo(image)
        if rgb is None:
            rgb = self.pool.overlay(image)
        else:
            name = next((term.map for term in self.wish.terms if term.map != DISAGREEMENT), self.wish.plain)
            info = MAPS[name]
            map_HW = self.pool.map(image, name)
            if info.drawn_to < 1:
                map_HW = np.minimum(map_HW / np.float32(info.drawn_to), 1)
            rgb = overlay_doubt(rgb, map_HW, info.sure_is)
        if rgb is None:
            H, W = self.pool.sizes_N2[image].tolist()
            rgb = np.full((H, W, 3), 128, np.uint8)
        if not picks or self.unit == "image":
            return contact.outlined_jpeg(rgb)
        boxes, ranks = [pick.box for pick in picks], [pick.rank for pick in picks]
        return contact.outlined_jpeg(rgb, boxes, self.masks(image, picks), ranks)


def _shares(area_C: np.ndarray) -> list[float] | None:
    return (area_C / area_C.sum()).round(6).tolist() if area_C.sum() > 0 else None


def _ordinal(number: int) -> str:
    """A place, counted from the highest.

    >>> _ordinal(1), _ordinal(12), _ordinal(23)
    ('highest', '12th highest', '23rd highest')
    """
    if number == 1:
        return "highest"
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending} highest"
