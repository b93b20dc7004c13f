"""The contact sheet of a selection: selection.html, self-contained, with what to label next in its order.

The template does the writing; this file works out what it needs: which part of a photo a card shows, the bars of the
classes, and every number in words. `draw_picks` outlines what was picked; the sheet only places pictures.

Letters: H rows, W columns, C classes, 3 = red, green, blue.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from seguncert.render import INK, doubt_ramp, encode_jpeg, thumbnail
from seguncert.report import css, environment

LISTED = 2000  # picks on the page; selection.csv has them all
PAIRS = 24  # of what was left out as too similar, side by side
BLOCKED = 12  # examples of what was left out because of the gap
CLASSES_OPEN = 30  # classes shown without a click: those with the largest shares
GAINS = 4  # classes named in the sentence on each side
SIDE = 960  # pixels of a picture's longest side
QUALITY = 82
CONTEXT = 2.5  # a card shows so many times the width and height of a region
NARROWEST = 0.4  # share of the photo's width and height that a card shows at least
SHAPE = 4 / 3  # width to height of a card's picture
WHITE = (255, 255, 255)

# key in `Sheet.balance`, title
SERIES = (
    ("pool", "all images"),
    ("labelled", "labelled already"),
    ("picks", "to label next"),
    ("random", "random picks"),
    ("plain", "plain mean"),
)
# key in `Sheet.comparison`, title, digits after the point, what it says
COMPARED = (
    ("score", "Mean score", 3, "of the score that was asked for, by the model's own doubt"),
    ("distance", "Mean distance to the nearest other", 3, "larger is more varied"),
    ("sequences", "Sequences", 0, "from which something was picked"),
    ("images", "Images", 0, "to open"),
    ("clicks", "Estimated clicks", 0, "what it costs to label them"),
)
WAYS = (("ours", "These picks"), ("random", "Random"), ("plain", "Plain mean"))


@dataclass(frozen=True)
class Asked:
    """What a selection was asked for."""

    unit: str
    """`image`, `region`, `segment` or `pixel`."""
    score: str
    """The score in its own notation, such as `entropy:class-weighted × variance:top5^0.5`."""
    budget: int
    """How much was to be picked."""
    pool: int
    """Images there were to pick from."""
    counted_in: str = "units"
    """What `budget` counts: `units` or `clicks`."""
    labelled: int = 0
    """Images that are labelled already."""
    radius: float | None = None
    """What is nearer is left out as too similar, in units of the typical distance of two candidates; None where nothing is."""
    gap: int | str = 0
    """Frames of a sequence between picks, at least, or words such as `10 s`; 0 where any may be picked."""
    quotas: Mapping[str, int | str] = field(default_factory=dict)
    """By class: picks of it, at least, or words such as `10 % of the area`."""
    seed: int = 0
    """Of all that was drawn."""
    diversity: float = 0.0
    """Power of the distance to the nearest pick or labelled one, by which scores were multiplied; 0 is by score alone."""
    plain: str = "entropy"
    """The map whose plain mean is compared with."""


@dataclass(frozen=True)
class LeftOut:
    """What was left out for one reason: how much, and some of it, the worst loss first."""

    count: int = 0
    examples: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Sheet:
    """All that the page shows. Rows are mappings; of their keys `path` is needed and None is as good as missing."""

    run: Mapping[str, Any]
    """run.json of the export. Read are `model` (`name`, `sha256`, `classes`, `colours`), `method`, `calibration`, and
    where they are there `samples`, `input`, `seguncert`."""
    asked: Asked
    picks: Sequence[Mapping[str, Any]]
    """Rows of selection.csv in their order: `rank`, `path`, `x`, `y`, `width`, `height`, `score`, `distance`, `clicks`,
    `sequence`, `frame`, `class`, `reason`; and where they are known `size` (width and height of the photo, without which a
    card shows all of it) and `picture_url` (where a picture lies that is not among `pictures`, from the page, quoted)."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """By path: JPEG of the whole photo under its doubt, as `outlined_jpeg` makes it."""
    similar: LeftOut = LeftOut()
    """Too similar: rows with `path`, `score`, `near` (path of the pick or labelled image it resembles), `near_rank` (None
    if that is labelled already), `distance`, and `x` to `size` as picks have them."""
    blocked: LeftOut = LeftOut()
    """Too close in time to a pick: rows with `path`, `sequence`, `frame`, `score`, `near`, `near_rank`."""
    balance: Mapping[str, Sequence[float | int] | np.ndarray | None] = field(default_factory=dict)
    """By key of `SERIES`: share of the area of each class of `run`, C numbers in [0, 1]; None where there is no area."""
    comparison: Mapping[str, Mapping[str, float | int | None]] = field(default_factory=dict)
    """By key of `WAYS`: the figures of `COMPARED`, of as many picks made in that way."""
    files: Sequence[tuple[str, str]] = ()
    """Names of the hand-over files beside the page, each with a line on how to import it."""
    notes: Sequence[str] = ()
    """What must not be overlooked, such as a quota that was not met."""


def render_sheet(sheet: Sheet) -> str:
    """The HTML of the sheet. It asks for nothing but pictures that a `picture_url` names.

    Raises ValueError for shares that are not one for each class, for an unknown key, and for a picture that is none.
    """
    asked = sheet.asked
    _check_keys("balance", sheet.balance, SERIES)
    _check_keys("comparison", sheet.comparison, WAYS)
    for figures in sheet.comparison.values():
        _check_keys("comparison", figures, COMPARED)
    places = {path: (f"p{number}", *_size(path, sheet.pictures[path])) for number, path in enumerate(_shown(sheet))}
    picked = {row["rank"]: row for row in sheet.picks}
    images = len({row["path"] for row in sheet.picks})
    clicks = sheet.comparison.get("ours", {}).get("clicks")
    if sheet.picks and all(_known(row.get("clicks")) for row in sheet.picks):
        clicks = sum(float(row["clicks"]) for row in sheet.picks)
    cards = [_card(row, places) for row in sheet.picks[:LISTED]]
    found, rest, axis = _balance(sheet)
    return (
        environment()
        .get_template("selection.html")
        .render(
            run=sheet.run,
            version=sheet.run.get("seguncert", ""),
            input=sheet.run.get("input", ""),
            samples=sheet.run.get("samples"),
            asked=asked,
            headline=_headline(asked, len(sheet.picks), images),
            clicks=round(clicks) if clicks is not None and _known(clicks) else None,
            images=images,
            sequences=len({row.get("sequence") for row in sheet.picks} - {None, ""}),
            notes=sheet.notes,
            ramp=", ".join(css(colour) for colour in doubt_ramp("low")[::15]),
            pictures=[(*places[path], Markup(base64.b64encode(sheet.pictures[path]).decode())) for path in places],
            cards=cards,
            total=len(sheet.picks),
            classes=sorted({card["class"] for card in cards} - {""}),
            series=[
                (key, f"{title} {asked.plain}" if key == "plain" else title)
                for key, title in SERIES if sheet.balance.get(key) is not None
            ],
            balance=found,
            rest=rest,
            axis=axis,
            gains=_gains(sheet),
            similar=[_pair(row, picked, places) for row in sheet.similar.examples[:PAIRS]],
            similar_count=max(sheet.similar.count, len(sheet.similar.examples)),
            blocked=[_pair(row, {}, {}) for row in sheet.blocked.examples[:BLOCKED]],
            blocked_count=max(sheet.blocked.count, len(sheet.blocked.examples)),
            ways=[
                (key, f"{title} {asked.plain}" if key == "plain" else title) for key, title in WAYS if key in sheet.comparison
            ],
            compared=[
                (title, says, [_number(sheet.comparison[way].get(key), digits) for way, _ in WAYS if way in sheet.comparison])
                for key, title, digits, says in COMPARED
                if any(_known(figures.get(key)) for figures in sheet.comparison.values())
            ],
            files=[(name, quote(os.fsencode(name)), how) for name, how in sheet.files],
        )
    )  # fmt: skip


def outlined_jpeg(
    rgb: UInt8[np.ndarray, "H W 3"],
    boxes: Sequence[tuple[int, int, int, int]] = (),
    masks: Sequence[Bool[np.ndarray, "_ _"] | None] | None = None,
    ranks: Sequence[int] = (),
    *,
    side: int = SIDE,
) -> bytes:
    """A picture for the sheet: of `side` pixels at most, and outlined after that, so that lines and numbers stay legible.

    Arguments as `draw_picks` takes them, in pixels of `rgb`. A small photo with outlines is enlarged by a whole factor:
    cards show a part of it, and there its lines would be coarse.
    """
    times = side // max(rgb.shape[:2])
    if len(boxes) and times > 1:
        small = cv2.resize(rgb, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
    else:
        small = thumbnail(rgb, side)
    down, across = small.shape[0] / rgb.shape[0], small.shape[1] / rgb.shape[1]
    scaled = []
    for x, y, width, height in boxes:
        left, top = math.floor(x * across), math.floor(y * down)
        scaled.append((left, top, math.ceil((x + width) * across) - left, math.ceil((y + height) * down) - top))
    if masks is not None:
        masks = [  # more than nothing of a pixel is all of it: thin parts stay
            mask if mask is None else cv2.resize(mask.astype(np.float32), box[2:], interpolation=cv2.INTER_AREA) > 0
            for mask, box in zip(masks, scaled, strict=True)
        ]
    return encode_jpeg(draw_picks(small, scaled, masks, ranks), QUALITY)


def draw_picks(
    rgb: UInt8[np.ndarray, "H W 3"],
    boxes: Sequence[tuple[int, int, int, int]],
    masks: Sequence[Bool[np.ndarray, "_ _"] | None] | None,
    ranks: Sequence[int],
) -> UInt8[np.ndarray, "H W 3"]:
    """Outline each pick in white within a dark halo, which shows on any ground, and write its rank beside it.

    `boxes` are x, y, width, height in pixels of `rgb`; `masks` have the size of their box and are True where the pick is, None
    means all of the box. A box smaller than its outline, such as that of one pixel, gets a ring around it. A number
    that finds no free place is left out, the last ranks first.
    """
    H, W = rgb.shape[:2]
    core = max(1, round(max(H, W) / 320))
    halo = core + 2 * max(1, core // 2)
    outlines, placed = [], []
    for number, (x, y, width, height) in enumerate(boxes):
        mask = None if masks is None else masks[number]
        if mask is not None and min(width, height) >= 2 * halo:
            lines, _ = cv2.findContours(
                mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE, offset=(x, y)
            )  # the mask's own edge pixels, holes too
        else:
            wide, tall = max(width, 3 * halo), max(height, 3 * halo)
            x, y = x + (width - wide) // 2, y + (height - tall) // 2
            right, bottom = x + wide - 1, y + tall - 1
            lines = [np.array([[x, y], [right, y], [right, bottom], [x, bottom]], np.int32)[:, None]]
        edge = halo // 2  # at the edge of the picture a line lies inside
        outlines.append([np.clip(line, edge, (W - 1 - edge, H - 1 - edge)).astype(np.int32) for line in lines])
        placed.append(cv2.boundingRect(np.concatenate(outlines[-1])) if lines else (x, y, width, height))
    out = np.ascontiguousarray(rgb).copy()
    for colour, thick in ((INK, halo), (WHITE, core)):
        for lines in outlines:
            cv2.polylines(out, lines, True, colour, thick)
    return _write_ranks(out, placed, ranks, halo)


def _write_ranks(out: np.ndarray, boxes: Sequence[Sequence[int]], ranks: Sequence[int], gap: int) -> np.ndarray:
    """Tags with numbers, each beside its box or, where there is no room, in its corner."""
    (H, W), font = out.shape[:2], cv2.FONT_HERSHEY_DUPLEX
    size = max(0.36, max(H, W) / 1150)
    thick, pad = max(1, round(size * 1.2)), round(5 * size)
    taken: list[tuple[int, int, int, int]] = []
    for number in np.argsort(ranks, kind="stable"):
        (x, y, width, height), text = boxes[number], str(ranks[number])
        (long, tall), _ = cv2.getTextSize(text, font, size, thick)
        long, tall = long + 2 * pad, tall + 2 * pad
        start, below = min(x, W - long), min(y, H - tall)
        for left, top in (
            (start, y - tall - gap), (start, y + height + gap), (x + width + gap, below), (x - long - gap, below), (x + gap, y + gap)
        ):  # fmt: skip
            right, bottom = left + long, top + tall
            free = all(right <= a or c <= left or bottom <= b or d <= top for a, b, c, d in taken)
            if left >= 0 and top >= 0 and right <= W and bottom <= H and free:
                taken.append((left, top, right, bottom))
                cv2.rectangle(out, (left, top), (right - 1, bottom - 1), INK, cv2.FILLED)
                cv2.putText(out, text, (left + pad, bottom - pad), font, size, WHITE, thick, cv2.LINE_AA)
                break
    return out


def _shown(sheet: Sheet) -> Iterable[str]:
    """Paths of which a picture is needed, once each."""
    paths = [row["path"] for row in sheet.picks[:LISTED]]
    for row in sheet.similar.examples[:PAIRS]:
        paths += [row["path"], row["near"]]
    return dict.fromkeys(path for path in paths if path in sheet.pictures)


def _size(path: str, jpeg: bytes) -> tuple[int, int]:
    """Width and height of a picture."""
    try:
        with Image.open(io.BytesIO(jpeg)) as picture:
            return picture.size
    except UnidentifiedImageError:
        raise ValueError(
            f"pictures: expected the bytes of a JPEG. Received: {len(jpeg)} other bytes for {path!r}. Make it with outlined_jpeg."
        ) from None


Places = Mapping[str, tuple[str, int, int]]  # by path: name, width and height of a picture


def _card(row: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """A pick as the template shows it."""
    folder, _, name = row["path"].rpartition("/")
    frame = row.get("frame")
    part = None if _whole(row) else f"{row['width']} × {row['height']} pixels at ({row['x']}, {row['y']})"
    if part and row["width"] == row["height"] == 1:
        part = f"pixel ({row['x']}, {row['y']})"
    return {
        "rank": row["rank"],
        "path": row["path"],
        "folder": folder + "/" if folder else "",
        "name": name,
        "part": part,
        "sequence": str(row.get("sequence") or ""),
        "frame": "" if frame is None else str(frame),
        "class": str(row.get("class") or ""),
        "reason": row.get("reason") or "",
        "facts": [
            (title, _number(row.get(key), digits))
            for title, key, digits in (("score", "score", 3), ("distance", "distance", 3), ("clicks", "clicks", 0))
            if _known(row.get(key))
        ],
        "shot": _shot(row, places),
    }


def _pair(row: Mapping[str, Any], picked: Mapping[Any, Mapping[str, Any]], places: Places) -> dict[str, Any]:
    """Something left out, and what it resembles, of which a pick shows the same part as its card."""
    near, rank = row.get("near"), row.get("near_rank")
    return _card({"rank": None} | dict(row), places) | {
        "near": near or "",
        "near_rank": rank,
        "near_shot": _shot(picked.get(rank, {"path": near}), places),
    }


def _shot(row: Mapping[str, Any], places: Places) -> dict[str, Any] | None:
    """The part of a picture that a card shows, as the view box of an SVG; `inset` if that is not all of it,
    and `box`, where in the picture something smaller than the photo lies."""
    if row["path"] not in places:
        url = row.get("picture_url")
        return {"url": url} if url else None
    name, w, h = places[row["path"]]
    shot = {"url": "", "name": name, "width": w, "height": h, "view": f"0 0 {w} {h}", "inset": None, "box": None}
    if _whole(row) or not row.get("size"):
        return shot
    W, H = row["size"]
    x, y, width, height = (
        value * scale
        for value, scale in zip((row["x"], row["y"], row["width"], row["height"]), (w / W, h / H) * 2, strict=True)
    )
    wide = max(CONTEXT * width, SHAPE * CONTEXT * height, NARROWEST * w, NARROWEST * h * SHAPE)
    wide, tall = min(wide, w), min(wide / SHAPE, h)
    left = min(max(x + width / 2 - wide / 2, 0), w - wide)
    top = min(max(y + height / 2 - tall / 2, 0), h - tall)
    inset = [f"{value:.1f}" for value in (left, top, wide, tall)]
    shot |= {"box": [f"{value:.1f}" for value in (x, y, width, height)]}
    return shot | ({"view": " ".join(inset), "inset": inset} if wide * tall < 0.8 * w * h else {})


def _whole(row: Mapping[str, Any]) -> bool:
    """Whether all of an image is meant."""
    box = [row.get(key) for key in ("x", "y", "width", "height")]
    if None in box:
        return True
    return row.get("unit") == "image" or (row.get("size") is not None and box == [0, 0, *row["size"]])


def _headline(asked: Asked, picked: int, images: int) -> str:
    """The sentence on top.

    >>> _headline(Asked("image", "entropy", 20, 347), 20, 20)
    '20 images to label next, of 347'
    >>> _headline(Asked("pixel", "entropy", 20, 347), 1, 1)
    '1 pixel to label next, in 1 of 347 images'
    """
    if not picked:
        return f"Nothing to label next among {asked.pool:,} {_plural('image', asked.pool)}"
    what = f"{picked:,} {_plural(asked.unit, picked)} to label next"
    if asked.unit == "image":
        return f"{what}, of {asked.pool:,}"
    return f"{what}, in {images:,} of {asked.pool:,} {_plural('image', asked.pool)}"


def _balance(sheet: Sheet) -> tuple[list[dict], list[dict], list[tuple[str, str]]]:
    """Classes by area, most first; those shown on demand; and where the lines of the axis are.

    Lengths go by the square root of a share: a class of 0.1 % is there to be seen, and nothing has length nothing.
    """
    model = sheet.run["model"]
    C, shares = len(model["classes"]), dict[str, np.ndarray]()
    for key, _ in SERIES:
        given = sheet.balance.get(key)
        if given is not None:
            shares[key] = np.nan_to_num(np.asarray(given, float))
            if shares[key].shape != (C,) or not (
                shares[key].min(initial=0) >= 0 and shares[key].max(initial=0) <= 1 + 1e-6
            ):
                raise ValueError(
                    f"balance: expected {C} shares in [0, 1] for {key!r}, one a class. Received: {len(given)} numbers,"
                    f" {given!r}. Divide the areas by their sum."
                )
    if not shares:
        return [], [], []
    largest_C = np.max([*shares.values()], axis=0)
    end = next(
        end for end in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0) if end >= min(1, largest_C.max())
    )
    rows = []
    for c in np.lexsort((np.arange(C), -largest_C, -shares.get("pool", largest_C))):
        if largest_C[c] > 0:
            before, after = shares.get("pool"), shares.get("picks")
            rows.append({
                "name": model["classes"][c],
                "colour": css(model["colours"][c]),
                "ends": {key: f"{100 * math.sqrt(each[c] / end):.2f}" for key, each in shares.items()},
                "shares": {key: _share(each[c]) for key, each in shares.items()},
                "times": _times(after[c] / before[c]) if before is not None and after is not None and before[c] > 0 else "–",
            })  # fmt: skip
    axis = list[tuple[float, str]]()
    for tick in (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        at = 100 * math.sqrt(tick / end)
        if at <= 100 and (not axis or at - axis[-1][0] >= 11):
            axis.append((at, f"{100 * tick:g} %"))
    return rows[:CLASSES_OPEN], rows[CLASSES_OPEN:], [(f"{at:.2f}", text) for at, text in axis]


def _gains(sheet: Sheet) -> dict[str, list[tuple[str, str]]]:
    """Classes of which the picks hold clearly more and less than all images do, with how many times as much."""
    before, after = (sheet.balance.get(key) for key in ("pool", "picks"))
    found: dict[str, list[tuple[str, str]]] = {"more": [], "less": []}
    if before is None or after is None or not sheet.picks:
        return found
    ratios = [
        (float(later / earlier), -earlier, name)
        for name, earlier, later in zip(sheet.run["model"]["classes"], before, after, strict=True)
        if earlier >= 0.001
    ]
    more = sorted((each for each in ratios if each[0] >= 1.15), key=lambda each: -each[0])
    less = sorted(each for each in ratios if each[0] <= 0.87)
    found["more"], found["less"] = ([(name, _times(ratio)) for ratio, _, name in each[:GAINS]] for each in (more, less))
    return found


def _check_keys(name: str, given: Iterable[str], known: Iterable[tuple]) -> None:
    """A misspelt key would only leave something off the page."""
    names = [key for key, *_ in known]
    for key in given:
        if key not in names:
            raise ValueError(f"{name}: expected keys among {', '.join(names)}. Received: {key!r}.")


def _known(value: Any) -> bool:
    return value is not None and value != "" and math.isfinite(float(value))


def _number(value: Any, digits: int) -> str:
    """A number with its digits, or a dash.

    >>> _number(1234.5, 0), _number(None, 3), _number(float("nan"), 3)
    ('1,234', '–', '–')
    """
    return f"{float(value):,.{digits}f}" if _known(value) else "–"


def _share(share: float) -> str:
    """A share in percent, with as many digits as tell small ones apart.

    >>> [_share(x) for x in (0.0, 0.00001, 0.0004, 0.0123, 0.25, 1.0)]
    ['0 %', '<0.01 %', '0.04 %', '1.2 %', '25 %', '100 %']
    """
    if 0 < share < 0.0001:
        return "<0.01 %"
    digits = 0 if share >= 0.0995 or share == 0 else 1 if share >= 0.00995 else 2
    return f"{100 * share:.{digits}f} %"


def _times(ratio: float) -> str:
    """How many times as much.

    >>> [_times(ratio) for ratio in (2.44, 0.512, 31.2, 0.001, 0.0)]
    ['× 2.4', '× 0.51', '× 31', '× <0.01', 'none']
    """
    if ratio < 0.005:
        return "× <0.01" if ratio else "none"
    return f"× {ratio:.0f}" if ratio >= 9.95 else f"× {ratio:.1f}" if ratio >= 0.95 else f"× {ratio:.2f}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
