"""One page that shows a batch: report.html, self-contained, the most uncertain images first.

The template does the writing; this file works out what it needs: columns of numbers for the gallery's script, the
geometry of the histograms, and every text in a form that a page can hold.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import statistics
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from seguncert.render import doubt_ramp

FAILED_LISTED = 500  # more failures than this are counted; images.csv has them all
FAILED_OPEN = 8  # up to so many are shown without a click
DECADES = 4  # from 100 % down to 0.01 %, the same in every report; rarer values keep a line of their colour
PLOT = {"left": 46, "right": 350, "top": 26, "bottom": 166}  # of a histogram, in the units of its drawing
SUFFIXES = {"png16": ".png", "npy": ".npy", "tiff": ".tiff"}
UNSHOWABLE = re.compile("[\ud800-\udfff]|[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def render_report(
    run: dict[str, Any], rows: list[dict[str, Any]], histograms: dict[str, list[int]], thumbnails: dict[str, bytes]
) -> str:
    """The HTML of a gallery that asks for nothing but the `overlay.jpg` files beside it.

    Args:
        run: the settings of the run. Read are `model` (`name`, `sha256`, `classes`, `colours`), `maps` (by name:
            `title`, `unit`, `full_scale`, `sure_is`, `about`, `drawn_to` (1 if missing); the first one orders the gallery), `calibration`,
            `method`, and where they are there `sets` (their `promise`), `input`, `format`, `version` or `seguncert`.
        rows: one per input image: `path`, `status` ("ok" or anything else), `error`, `note`, `height`, `width` and
            for each map `<name>_mean` in [0, 1]. A path may hold any character a file name may.
        histograms: per map the pixel counts of equal bins of [0, 1] over all images.
        thumbnails: JPEG bytes by path; images without one are loaded from `<path>/overlay.jpg` when seen.

    Returns:
        The page. The same arguments give the same page.
    """
    maps = [{"name": name, **info} for name, info in run["maps"].items()]
    sign = 1 if maps[0]["sure_is"] == "high" else -1
    done = [row for row in rows if row["status"] == "ok"]
    by = _means(done, maps[0]["name"])
    order = sorted(range(len(done)), key=lambda i: (by[i] is None, sign * (by[i] or 0.0), done[i]["path"]))
    done = [done[i] for i in order]
    failed = [row for row in rows if row["status"] != "ok"]
    return (
        environment()
        .get_template("report.html")
        .render(
            run=run,
            version=run.get("version") or run.get("seguncert") or "",
            maps=maps,
            calibrated=run["calibration"] != "none",
            promise=run.get("sets", {}).get("promise", ""),
            samples=run.get("samples"),
            drawn_to=maps[0].get("drawn_to", 1.0),
            done=len(done),
            failed=failed[:FAILED_LISTED],
            failed_count=len(failed),
            failed_open=len(failed) <= FAILED_OPEN,
            averages=[(info, _average(_means(done, info["name"]))) for info in maps],
            classes=[
                (name, css(colour))
                for name, colour in zip(run["model"]["classes"], run["model"]["colours"], strict=True)
            ],
            ramp=", ".join(css(colour) for colour in doubt_ramp("low")[::15]),
            histograms=[_histogram(info, histograms[info["name"]]) for info in maps],
            plot=PLOT,
            data=Markup(_columns(run, maps, done, thumbnails)),
        )
    )


def environment() -> Environment:
    """Templates of pages; text in them is escaped, and shown as far as a page can."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_showable,
    )  # fmt: skip
    found.filters["thousands"] = lambda number: f"{number:,}"
    return found


def _columns(run: dict[str, Any], maps: list[dict[str, Any]], done: list[dict[str, Any]], thumbnails: dict) -> str:
    """The gallery's data as JSON that may stand inside a script element: a column each, rare things by row number."""
    paths = [row["path"] for row in done]
    urls = [quote(os.fsencode(path)) for path in paths]
    data = {
        "maps": [{key: info[key] for key in ("name", "title", "sure_is")} for info in maps],
        "suffix": SUFFIXES[run.get("format", "png16")],
        "path": paths,
        "url": {i: url for i, (path, url) in enumerate(zip(paths, urls, strict=True)) if url != path},
        "height": [row["height"] for row in done],
        "width": [row["width"] for row in done],
        "mean": {
            info["name"]: [mean if mean is None else round(mean, 4) for mean in _means(done, info["name"])]
            for info in maps
        },
        "note": {i: row["note"] for i, row in enumerate(done) if row.get("note")},
        "thumbnail": {i: base64.b64encode(thumbnails[p]).decode() for i, p in enumerate(paths) if p in thumbnails},
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _histogram(info: dict[str, Any], counts: list[int]) -> dict[str, Any]:
    """Bars, lines and words of one histogram: shares of the pixels on a logarithmic axis."""
    total, bins = sum(counts), len(counts)
    shares = [count / total if total else 0.0 for count in counts]
    wide, tall = (PLOT["right"] - PLOT["left"]) / bins, PLOT["bottom"] - PLOT["top"]
    ramp, drawn_to = doubt_ramp(info["sure_is"]), info.get("drawn_to", 1.0)
    bars = []
    for i, share in enumerate(shares):
        if share > 0:
            height = max(1.0, tall * (1 + math.log10(share) / DECADES))
            bars.append({
                "x": f"{PLOT['left'] + i * wide:.2f}", "y": f"{PLOT['bottom'] - height:.2f}",
                "width": f"{wide:.2f}", "height": f"{height:.2f}", "colour": css(ramp[min(255, int((2 * i + 1) * 128 / bins / drawn_to))]),
                "title": f"{i / bins:.3g} to {(i + 1) / bins:.3g}: {_percent(share)} ({counts[i]:,} pixels)",
            })  # fmt: skip
    below, reached = 0, 0
    while reached < bins and 2 * (below + counts[reached]) < total:
        below, reached = below + counts[reached], reached + 1
    if drawn_to < 1:  # such maps are low-is-sure
        first = math.ceil(drawn_to * bins)
        words = (
            f"{_percent(sum(counts[first:]) / total)} are above {first / bins:.3g}, where the colours of the overlays end."
            if total
            else ""
        )
    else:
        half = bins // 2
        doubtful = sum(counts[:half] if info["sure_is"] == "high" else counts[half:])
        side = "below" if info["sure_is"] == "high" else "above"
        words = f"{_percent(doubtful / total)} of the pixels are in the doubtful half, {side} 0.5." if total else ""
    return {
        "info": info,
        "bars": bars,
        "lines": [(f"{PLOT['top'] + tall * d / DECADES:.2f}", _percent(10.0**-d)) for d in range(DECADES + 1)],
        "ticks": [
            (f"{PLOT['left'] + (PLOT['right'] - PLOT['left']) * v:.1f}", f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)
        ],
        "ends": ("doubtful", "sure") if info["sure_is"] == "high" else ("sure", "doubtful"),
        "words": f"The median pixel lies between {reached / bins:.3f} and {(reached + 1) / bins:.3f}; {words} {total:,} pixels in all."
        if total
        else "No pixels.",
    }


def _means(rows: list[dict[str, Any]], name: str) -> list[float | None]:
    means = [row.get(f"{name}_mean") for row in rows]
    return [None if mean is None or math.isnan(mean) else mean for mean in means]


def _average(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "-"


def _percent(share: float) -> str:
    """A share as a percentage with two significant digits, never in powers of ten.

    >>> _percent(1.0), _percent(0.0341), _percent(0.000001)
    ('100 %', '3.4 %', '0.0001 %')
    """
    if share == 0:
        return "0 %"
    digits = max(0, 1 - math.floor(math.log10(100 * share)))
    text = f"{100 * share:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def css(colour: Any) -> str:
    """A colour as style sheets write it."""
    red, green, blue = (int(part) for part in colour)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _showable(value: Any) -> Any:
    """Text as a page can show it: control and direction characters spelled out, undecodable bytes as a lozenge.

    >>> _showable("a\\nb"), _showable("caf\\udce9")
    ('a\\\\nb', 'caf\\ufffd')
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return UNSHOWABLE.sub(
        lambda found: "\ufffd" if "\ud800" <= found[0] <= "\udfff" else found[0].encode("unicode_escape").decode(),
        value,
    )
