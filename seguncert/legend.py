"""What the colours of a picture mean: legends, and photos with a legend below.

Letters and pictures as in `seguncert.render`.
"""

import textwrap
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from seguncert.render import INK, PAPER, Sure, colour_table, doubt_ramp, overlay_doubt

GREY, AMBER = (98, 104, 113), (150, 78, 0)
NARROWEST_PICTURE, NARROWEST_LEGEND, WIDEST_LEGEND = 260, 64, 4000


@lru_cache(maxsize=64)
def legend_bar(
    width: int,
    title: str,
    unit: str = "",
    low: float = 0.0,
    high: float = 1.0,
    *,
    sure_is: Sure | None = None,
    note: str = "",
    name: str = "cividis",
    gamma: float = 0.65,
    opacity: float | None = None,
) -> UInt8[np.ndarray, "h width 3"]:
    """A colour bar `width` pixels wide: title, unit, numbers from `low` to `high`, a word at each end, a note.

    The bar shows the colours of `colour_map`, or with an `opacity` those of `overlay_doubt` over mid grey. Text grows
    with the width; where room is short there are fewer numbers, and what does not fit a line takes one of its own.
    The picture is kept for the next call of the same arguments, so it is read-only.
    Raises ValueError unless width >= 64 and low < high.
    """
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"expected finite numbers low < high. Received: low {low}, high {high}.")
    font, size, pad = _type(width, title + unit + note)
    ramp = (
        colour_table(name) if opacity is None else doubt_ramp(sure_is or "low", name=name, gamma=gamma, opacity=opacity)
    )
    line, right, long = round(1.45 * size), width - pad, font.getlength

    heads: list[list[tuple[float, str, tuple]]] = [[(pad, _fit(font, title, right - pad), INK)]]
    for text, ink, start in ((unit, GREY, 0), (note, AMBER, right - long(note))):
        at, before, _ = heads[-1][-1]
        x = max(at + long(before) + 0.6 * size, start)
        if x + long(text) <= right:
            heads[-1].append((x, text, ink))
        else:
            parts = textwrap.wrap(text, int(right / size / 0.56), break_long_words=False)
            heads += [[(pad, _fit(font, part, right - pad), ink)] for part in parts]

    words = {"high": ("doubtful", "sure"), "low": ("sure", "doubtful"), None: ("", "")}[sure_is]
    gap, foot = size / 2 if sure_is else 0.0, []
    first, last = round(pad + long(words[0]) + gap), round(right - long(words[1]) - gap)
    if last - first < 13 * size:  # the words go below the numbers, on the narrowest legends as "doubt" and "sure"
        left_word, right_word = words if long("doubtful  sure") <= right - pad else [word[:5] for word in words]
        foot, words = (
            [[(pad, left_word, INK), (right - long(right_word), right_word, INK)]] if sure_is else [],
            ("", ""),
        )
        first, last = pad, right
    bar = _row(width, size + 2, font, [(pad, words[0], INK), (last + size / 2, words[1], INK)])
    bar[:, first:last] = ramp[np.rint(np.linspace(0, 255, last - first)).astype(int)]
    ticks, notch = _ticks(font, low, high, first, last, pad, right), size // 3
    numbers = _row(width, notch + line, font, [(start, text, INK) for _, text, start in ticks], notch)
    numbers[:notch, [x for x, _, _ in ticks]] = GREY

    rows = [_row(width, line, font, texts) for texts in heads + foot]
    blank = _row(width, size // 2, font, [])
    out = np.concatenate([blank, *rows[: len(heads)], blank[::2], bar, numbers, *rows[len(heads) :], blank[::2]])
    out.setflags(write=False)
    return out


def legend_classes(
    width: int, names: Sequence[str], colours_C3: UInt8[np.ndarray, "C 3"], shares_C: Float[np.ndarray, " C"]
) -> UInt8[np.ndarray, "h width 3"]:
    """A chip for each class that is present, with its name and its share of the area, in rows that wrap.

    `shares_C` are fractions in [0, 1]; classes with share 0 are left out. Raises ValueError if width < 64.
    """
    font, size, pad = _type(width, "".join(names))
    shown = [
        (names[int(c)], "<0.1 %" if shares_C[c] < 0.001 else f"{100 * shares_C[c]:.1f} %", colours_C3[c])
        for c in np.flatnonzero(shares_C > 0)
    ]
    widest = max([font.getlength(f"{name}  {share}") for name, share, _ in shown], default=0) + 2.2 * size
    columns = max(1, int((width - 2 * pad) // widest))
    cell, rows = (width - 2 * pad) // columns, [_row(width, pad, font, [])]
    for start in range(0, len(shown), columns):
        texts, chips = [], []
        for column, (name, share, colour) in enumerate(shown[start : start + columns]):
            chip = pad + column * cell
            chips.append((chip, colour))
            x, room, share = chip + 1.5 * size, cell - 1.5 * size, f"  {share}"
            if font.getlength(name + share) > room and room < 8 * size:
                share = ""
            name = _fit(font, name, room - font.getlength(share))
            texts += [(x, name, INK), (x + font.getlength(name), share, GREY)]
        rows.append(_row(width, round(1.5 * size), font, texts))
        for chip, colour in chips:
            rows[-1][1 : size + 1, chip : chip + size] = GREY
            rows[-1][2:size, chip + 1 : chip + size - 1] = colour
    return np.concatenate([*rows, rows[0]])


def overlay_picture(
    rgb: UInt8[np.ndarray, "H W 3"],
    map_HW: Float[np.ndarray, "H W"],
    *,
    map_name: str,
    unit: str,
    sure_is: Sure,
    note: str = "",
    full_scale: float = 1.0,
    name: str = "inferno",
    gamma: float = 0.65,
    opacity: float = 0.92,
) -> UInt8[np.ndarray, "h w 3"]:
    """The photo under `overlay_doubt` with its legend below: what `export` writes as overlay.jpg.

    The photo keeps its size and its place, `out[:H, :W]`; narrow ones get a canvas of 260 pixels for the legend.
    The legend counts from 0 to `full_scale`, the value of map 1.0 in `unit`. Raises ValueError as `overlay_doubt`.
    """
    photo = overlay_doubt(rgb, map_HW, sure_is, name=name, gamma=gamma, opacity=opacity)
    H, W = photo.shape[:2]
    wide = max(W, NARROWEST_PICTURE)
    legend = legend_bar(
        min(wide, WIDEST_LEGEND),
        map_name,
        unit,
        0.0,
        full_scale,
        sure_is=sure_is,
        note=note,
        name=name,
        gamma=gamma,
        opacity=opacity,
    )
    out = np.empty((H + len(legend), wide, 3), np.uint8)
    out[:H, :W], out[:H, W:] = photo, PAPER
    out[H:, : legend.shape[1]], out[H:, legend.shape[1] :] = legend, PAPER
    return out


def _type(width: int, text: str) -> tuple[ImageFont.FreeTypeFont, int, int]:
    """Font, its size and the margin for a legend. Made anew each time: a font is not safe to share among threads."""
    if width < NARROWEST_LEGEND:
        raise ValueError(
            f"width: expected {NARROWEST_LEGEND} pixels or more, or nothing is legible. Received: {width}."
        )
    size = int(np.clip(round(0.64 * width**0.5), 11 + (width >= 100), 42))
    if text.isascii():
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
    else:  # Pillow's own font ends with ASCII
        from matplotlib import get_data_path

        font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", round(0.92 * size))
    return font, size, min(size, max(3, width // 40))


def _fit(font: ImageFont.FreeTypeFont, text: str, room: int | float) -> str:
    cuts = (text[:end] + "..." for end in range(len(text) - 1, 0, -1))
    return text if font.getlength(text) <= room else next((cut for cut in cuts if font.getlength(cut) <= room), "...")


def _row(width: int, height: int, font: ImageFont.FreeTypeFont, texts: list[tuple], y: int = 0) -> np.ndarray:
    image = Image.new("RGB", (width, height), PAPER)
    for x, text, ink in texts:
        ImageDraw.Draw(image).text((round(x), y), text, ink, font)
    return np.array(image)


def _ticks(
    font: ImageFont.FreeTypeFont, low: float, high: float, first: int, last: int, left: int, right: int
) -> list[tuple[int, str, int]]:
    """As many numbers as stand clear of each other, both ends and round ones between: (tick x, text, text x) each."""
    decade = 10.0 ** np.floor(np.log10((high - low) / 8))
    for step in [*(decade * factor for factor in (1, 2, 2.5, 5, 10, 20, 25, 50)), 2 * (high - low)]:
        inner = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
        found = []
        for value in (low, *inner[(inner > low + 0.6 * step) & (inner < high - 0.6 * step)], high):
            x, text = round(first + (value - low) / (high - low) * (last - 1 - first)), f"{value + 0.0:.3g}"
            long = font.getlength(text)
            found.append((x, text, round(min(max(x - long / 2, left), right - long))))
        if all(b[2] - a[2] > font.getlength(a[1]) + 2 * font.size for a, b in pairwise(found)):
            break
    return found
