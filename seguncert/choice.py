"""Which candidates to take for a budget: worth it, apart from each other, and not all of one place or class.

    gain = distance^diversity · score        each time to the nearest of what is labelled or chosen; see `seguncert.diversity`

with a minimum gap between frames of a video, class quotas, and a budget in units or in estimated clicks. Random picks and picks
by the plain mean of a map, of the same budget, are written beside: many ways to choose do not beat random.

Letters: N images of the pool, M candidates, C classes.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image

from seguncert.candidates import BY_SCORE, Candidates, vectors
from seguncert.diversity import Greedy
from seguncert.pool import Pool
from seguncert.regions import UNITS
from seguncert.video import frame_of

BUDGETS = ("units", "clicks")
RADIUS = {"image": 0.1, "region": 0.0, "segment": 0.0, "pixel": 0.0}  # of the typical distance of two candidates
PER_IMAGE = 20  # pixels
EXAMPLES = 24  # of what was left out
CENTRES = 20_000  # labelled candidates from which distances are taken


@dataclass(frozen=True)
class Pick:
    """One thing to label. `box` is x, y, width, height; `distance` NaN where there was nothing to be distant from."""

    rank: int
    path: str
    unit: str
    box: tuple[int, int, int, int]
    number: int
    score: float
    distance: float
    clicks: int
    sequence: str
    frame: int | None
    label: str  # the shown class that most of it is, and once explained, that most of its doubt is in
    reason: str = ""
    row: int = field(default=-1, repr=False)  # among the candidates
    near: str = ""  # the image that it is nearest to
    near_rank: int | None = None  # and its rank, if that was picked


@dataclass(frozen=True, eq=False)
class Chosen:
    """What was chosen; how much was left out as too similar, or too near in a video, with the best `EXAMPLES`; and what to know."""

    picks: list[Pick]
    similar: list[Pick]
    blocked: list[Pick]
    notes: list[str]
    similar_count: int
    blocked_count: int


@dataclass(frozen=True)
class Asked:
    """The arguments of `select` that decide what is chosen, checked."""

    budget: int
    budget_in: str = "units"
    unit: str = "image"
    region: str = "grid:64"
    score: str = ""
    diversity: float = 1.0
    radius: float | None = None
    gap: str = "auto"
    quotas: Mapping[str, float] = field(default_factory=dict)
    per_image: int = PER_IMAGE
    background: str | None = None
    seed: int = 0

    @property
    def least(self) -> float:
        """The radius that holds."""
        return RADIUS[self.unit] if self.radius is None else self.radius

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget: expected 1 or more. Received: {self.budget}")
        if self.budget_in not in BUDGETS:
            raise ValueError(f"budget-in: expected one of {', '.join(BUDGETS)}. Received: {self.budget_in!r}")
        if self.unit not in UNITS:
            raise ValueError(f"unit: expected one of {', '.join(UNITS)}. Received: {self.unit!r}")
        if not 0 <= self.diversity < np.inf:
            raise ValueError(f"diversity: expected a power, 0 or more. Received: {self.diversity}")
        if self.radius is not None and not 0 <= self.radius < np.inf:
            raise ValueError(f"radius: expected 0 or more, in units of the typical distance. Received: {self.radius}")
        if self.per_image < 1:
            raise ValueError(f"per-image: expected 1 or more. Received: {self.per_image}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more. Received: {self.seed}")
        if self.gap != "auto" and not re.fullmatch(r"[0-9]+(\.[0-9]+)?s?", self.gap):
            raise ValueError(
                f"gap: expected auto, a difference of frame numbers, or seconds as 10s. Received: {self.gap!r}"
            )
        for name, share in self.quotas.items():
            if not 0 < share < 1:
                raise ValueError(f"quota: expected a share of the area between 0 and 1. Received: {name}={share}")
        if sum(self.quotas.values()) > 1:
            raise ValueError(f"quota: expected shares of at most 1 together. Received: {sum(self.quotas.values()):g}")


def choose(pool: Pool, asked: Asked, found: Candidates) -> Chosen:
    """The picks of the weighted greedy choice."""
    notes, unit = list[str](), asked.unit
    own_M = (found.ways_M & BY_SCORE).astype(bool)
    vectors_MD = vectors(pool, found, unit) if asked.diversity > 0 or asked.radius else None
    known = np.flatnonzero(found.labelled_M)
    worth_M, radius = found.worth_M if asked.budget_in == "clicks" else found.score_M, asked.least
    if vectors_MD is not None and len(known) > CENTRES:
        notes.append(f"distances to what is labelled are those to {CENTRES:,} of {len(known):,}, drawn at random")
        known = np.sort(np.random.default_rng(asked.seed).choice(known, CENTRES, replace=False))
    greedy = Greedy(
        vectors_MD, worth_M, None if vectors_MD is None else vectors_MD[known], distance=asked.diversity,
        radius=radius if vectors_MD is not None else 0.0,
    )  # fmt: skip
    greedy.shut(np.flatnonzero(found.labelled_M | ~own_M))
    gaps = Gaps(pool, asked, found)
    for at in np.flatnonzero(found.labelled_M & own_M).tolist():
        greedy.shut(gaps.near(at))
    wanted = {pool.classes.index(name): share for name, share in asked.quotas.items()}
    area_C, spent, picks, of_centre = np.zeros(len(pool.classes)), 0, list[Pick](), known.tolist()
    blocked = dict[int, int]()  # candidate to the rank of the pick that it is too near to
    while spent < asked.budget:
        among_M = None
        if asked.budget_in == "clicks":
            among_M = found.clicks_M <= asked.budget - spent
        short = {c: share - area_C[c] / max(area_C.sum(), 1) for c, share in wanted.items()}
        lacking = max(short, key=lambda c: short[c] / wanted[c], default=-1)
        taken, quota = None, ""
        if lacking >= 0 and short[lacking] > 0:
            rich_M = found.shares_MC[:, lacking] >= wanted[lacking]
            taken = greedy.take(rich_M if among_M is None else rich_M & among_M)
            quota = pool.classes[lacking]
            if taken is None:
                del wanted[lacking]
                continue
        if taken is None:
            taken = greedy.take(among_M)
        if taken is None:
            break
        row = taken.index
        spent += int(found.clicks_M[row]) if asked.budget_in == "clicks" else 1
        area_C += found.shares_MC[row] * found.size_M[row]
        centre = greedy.centre_of(row) if vectors_MD is not None else -1
        nearest = _centre(pool, found, of_centre, greedy.labelled, centre)
        of_centre.append(row)
        pick = _pick(pool, asked, found, row, len(picks) + 1, taken.distance, *nearest)
        picks.append(replace(pick, reason=f"for the quota of {quota}" if quota else ""))
        close = gaps.near(row)
        blocked |= {int(other): len(picks) for other in close[greedy.open_N[close]]}
        greedy.shut(close)
    if asked.budget_in == "units" and len(picks) < asked.budget:
        notes.append(
            f"only {len(picks)} of {asked.budget} picked: {len(greedy.left_out)} were too similar to others (radius {radius:g}), {len(blocked)}"
            " too near in a video; lower the radius or the gap for more"
        )
    if asked.budget_in == "clicks" and not picks:
        least = int(found.clicks_M[own_M & ~found.labelled_M].min(initial=np.iinfo(np.int64).max))
        raise ValueError(
            f"budget: expected at least {least} clicks, which the cheapest {unit} is estimated to take. Received: {asked.budget}"
        )
    if asked.budget_in == "clicks" and not greedy.open_N.any():
        notes.append(f"all that there is takes {spent} of {asked.budget} clicks")
    for name, share in asked.quotas.items():
        reached = area_C[pool.classes.index(name)] / max(area_C.sum(), 1)
        if reached < share:
            notes.append(
                f"quota of {name} not met: {reached:.1%} of the picked area, not {share:.1%}; too little of what is left shows it,"
                " or the budget is small for all quotas"
            )
    notes += gaps.notes
    similar = [
        _pick(pool, asked, found, row, 0, float(np.sqrt(greedy.square_N[row])), *_centre(pool, found, of_centre, greedy.labelled, centre))
        for row, centre in _best(greedy.left_out, worth_M)
    ]  # fmt: skip
    too_near = [
        _pick(pool, asked, found, row, 0, float("nan"), picks[rank - 1].path, rank)
        for row, rank in _best(blocked, worth_M)
    ]
    return Chosen(picks, similar, too_near, notes, len(greedy.left_out), len(blocked))


def _best(rows: Mapping[int, int], worth_M: np.ndarray) -> list[tuple[int, int]]:
    return heapq.nsmallest(EXAMPLES, rows.items(), key=lambda each: (-worth_M[each[0]], each[0]))


def _centre(pool: Pool, found: Candidates, rows: Sequence[int], labelled: int, centre: int) -> tuple[str, int | None]:
    """The image of a centre, and its rank where it was picked; of none, nothing."""
    if centre < 0:
        return "", None
    return pool.paths[found.image_M[rows[centre]]], centre - labelled + 1 if centre >= labelled else None


def in_order(pool: Pool, asked: Asked, found: Candidates, way: int, key_M: np.ndarray, reason: str) -> list[Pick]:
    """As many as the budget allows of those that may be taken in that way, by rising key alone; what is labelled is passed over."""
    picks, spent = list[Pick](), 0
    key_M = np.where(found.ways_M & way, key_M, np.inf)
    for row in np.argsort(key_M, kind="stable").tolist():
        if np.isinf(key_M[row]):
            break
        cost = int(found.clicks_M[row]) if asked.budget_in == "clicks" else 1
        if found.labelled_M[row] or spent + cost > asked.budget:
            continue
        spent += cost
        pick = _pick(pool, asked, found, row, len(picks) + 1, float("nan"), "", None)
        picks.append(replace(pick, reason=reason))
        if spent >= asked.budget:
            break
    return picks


class Gaps:
    """Which candidates are too near in a video to one that was picked.

    Of frames of a sequence (names that differ in the number at their end), those whose numbers differ by less than the gap.
    Given in seconds, photos of a folder by the time in their EXIF data. Of parts of images, only those at the same place, and
    not those of the same frame. auto is half of what an even spread of the budget over all images would leave between two.
    What is labelled counts as picked.
    """

    def __init__(self, pool: Pool, asked: Asked, found: Candidates):
        self.found, self.parts, self.notes = found, asked.unit != "image", list[str]()
        named = [frame_of(path) for path in pool.paths]
        if asked.gap.endswith("s"):
            self.gap_N = np.full(len(named), float(asked.gap[:-1]))
            groups, place = [str(Path(path).parent) for path in pool.paths], _times(pool)
        else:
            groups, place = [sequence for sequence, _ in named], [frame for _, frame in named]
            self.gap_N = np.full(len(named), 0.0 if asked.gap == "auto" else float(asked.gap))
        codes = {name: code for code, name in enumerate(dict.fromkeys(groups))}
        self.group_N = np.array([codes[name] for name in groups], np.int64)
        self.place_N = np.array([np.nan if each is None else each for each in place], np.float64)
        if asked.gap == "auto" and not self.parts:
            self._spread(len(named) / (2 * asked.budget))
        lost = int(np.isnan(self.place_N).sum())
        if lost and asked.gap not in ("auto", "0"):
            what = "no time in its EXIF data" if asked.gap.endswith("s") else "a name that does not end in a number"
            self.notes.append(f"the gap does not hold for {lost:,} of {len(named):,} images, each with {what}")
        self.order_N = np.lexsort((self.place_N, self.group_N))
        self.image_order_M = np.argsort(found.image_M, kind="stable")
        self.first_N = np.searchsorted(found.image_M[self.image_order_M], np.arange(len(named) + 1))
        self.at_N = np.empty(len(named), np.int64)
        self.at_N[self.order_N] = np.arange(len(named))

    def near(self, row: int) -> np.ndarray:
        """Rows of candidates that are too near to this one."""
        image = int(self.found.image_M[row])
        gap, place = self.gap_N[image], self.place_N[image]
        if not gap > 0 or np.isnan(place):
            return np.empty(0, np.int64)
        images = list[int]()
        for step in (-1, 1):
            at = int(self.at_N[image]) + step
            while 0 <= at < len(self.order_N):
                other = int(self.order_N[at])
                if self.group_N[other] != self.group_N[image] or not abs(self.place_N[other] - place) < gap:
                    break
                images.append(other)
                at += step
        rows = [self.image_order_M[self.first_N[other] : self.first_N[other + 1]] for other in images]
        close = np.concatenate(rows) if rows else np.empty(0, np.int64)
        if not self.parts or not len(close):
            return close
        x, y, width, height = self.found.boxes_M4[row]
        x_n, y_n, width_n, height_n = self.found.boxes_M4[close].T
        return close[(x_n < x + width) & (x < x_n + width_n) & (y_n < y + height) & (y < y_n + height_n)]

    def _spread(self, frames: float) -> None:
        """The gap of each sequence that is worth so many frames of it."""
        order = np.lexsort((self.place_N, self.group_N))
        for own in np.split(order, np.flatnonzero(np.diff(self.group_N[order])) + 1):
            if len(own) > 1:
                self.gap_N[own] = frames * float(np.median(np.diff(self.place_N[own])))  # NaN without numbers: no gap


def _times(pool: Pool) -> list[float | None]:
    """Seconds at which each photo was taken, as its EXIF data say."""
    times = list[float | None]()
    for path in pool.paths:
        try:
            with Image.open(Path(pool.run["input"]) / path) as photo:
                exif = photo.getexif().get_ifd(0x8769)
            taken = datetime.strptime(str(exif[0x9003]), "%Y:%m:%d %H:%M:%S").timestamp()
            fraction = re.sub(r"[^0-9]", "", str(exif.get(0x9291, "")))
            times.append(taken + float(f"0.{fraction or 0}"))
        except (OSError, KeyError, ValueError):
            times.append(None)
    if not any(time is not None for time in times):
        raise ValueError(
            f"gap: seconds need photos that say when they were taken (EXIF DateTimeOriginal), where the export found them."
            f" Received: none in {pool.run['input']}. Give a difference of frame numbers."
        )
    return times


def _pick(
    pool: Pool, asked: Asked, found: Candidates, row: int, rank: int, distance: float, near: str, near_rank: int | None
) -> Pick:
    image = int(found.image_M[row])
    path, (x, y, width, height) = pool.paths[image], found.boxes_M4[row].tolist()
    sequence, frame = frame_of(path)
    label = pool.classes[int(found.shares_MC[row].argmax())]
    number = 0 if asked.unit == "image" else int(found.number_M[row]) + 1
    return Pick(
        rank, path, asked.unit, (x, y, width, height), number, float(found.score_M[row]), distance, int(found.clicks_M[row]),
        sequence if frame is not None else "", frame, label, row=row, near=near, near_rank=near_rank,
    )  # fmt: skip
