"""Arrays to pictures: colour maps, overlays, contours, and the files they become.

Letters: H rows, W columns, C classes, 3 = red, green, blue. Every picture is uint8 RGB. A map holds numbers in
[0, 1] on an absolute scale: the same number has the same colour in every image.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

COLOUR_TABLES = ("cividis", "viridis", "magma", "inferno")
Sure = Literal["high", "low"]  # which end of a map means "sure": high confidence, but low entropy

PAPER, INK = (250, 250, 248), (22, 25, 31)
MID_GREY = 118
JPEG_LONGEST = 65500
PNG16_SETTINGS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE,
                  cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB]  # fmt: skip


def colour_map(map_HW: Float[np.ndarray, "H W"], name: str = "cividis") -> UInt8[np.ndarray, "H W 3"]:
    """Colour a map on the absolute scale: 0 is always the table's first colour, 1 always its last.

    `map_HW` lies in [0, 1]; `name` is cividis, viridis, magma or inferno, whose order the colour-blind see too.
    Raises ValueError for NaN, for values outside [0, 1] and for any other table.

    >>> colour_map(np.array([[0.0, 1.0]]), "viridis").tolist()
    [[[68, 1, 84], [253, 231, 37]]]
    """
    return cv2.applyColorMap(cv2.convertScaleAbs(_checked(map_HW), alpha=255), colour_table(name)[:, None])


def overlay_doubt(
    rgb: UInt8[np.ndarray, "H W 3"],
    map_HW: Float[np.ndarray, "H W"],
    sure_is: Sure,
    *,
    name: str = "inferno",
    gamma: float = 0.65,
    opacity: float = 0.92,
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay doubt over a photo: untouched where the map is sure, ever more opaque and brighter where it doubts.

    With doubt d (the map, or 1 - map where `sure_is` "high") and t = d^gamma, a pixel is t * opacity of the table's
    colour and the rest photo, which loses its own colour by the share t. The scale is absolute; d = 0 returns
    the photo's very bytes. Raises ValueError as `colour_map` does, and unless gamma > 0 and 0 <= opacity <= 1.

    >>> photo = np.full((1, 2, 3), 90, np.uint8)
    >>> overlay_doubt(photo, np.array([[1.0, 0.0]]), sure_is="high").tolist()
    [[[90, 90, 90], [239, 242, 158]]]
    """
    tables = doubt_tables(sure_is, name=name, gamma=gamma, opacity=opacity)
    photo_weight, grey_weight, colour = (table[:, None] for table in tables)
    levels_HW = cv2.convertScaleAbs(_checked(map_HW), alpha=255)
    grey = cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    out = cv2.multiply(rgb, cv2.applyColorMap(levels_HW, photo_weight), scale=1 / 255)
    out = cv2.add(out, cv2.multiply(grey, cv2.applyColorMap(levels_HW, grey_weight), scale=1 / 255))
    return cv2.add(out, cv2.applyColorMap(levels_HW, colour))


def doubt_ramp(
    sure_is: Sure, *, name: str = "inferno", gamma: float = 0.65, opacity: float = 0.92
) -> UInt8[np.ndarray, "256 3"]:
    """The 256 colours `overlay_doubt` gives the map values 0, 1/255, ..., 1 over mid grey, as legends show them."""
    grey = np.full((1, 256, 3), MID_GREY, np.uint8)
    return overlay_doubt(grey, np.linspace(0, 1, 256)[None], sure_is, name=name, gamma=gamma, opacity=opacity)[0]


def fade_classes(
    rgb: UInt8[np.ndarray, "H W 3"],
    labels_HW: Integer[np.ndarray, "H W"],
    colours_C3: UInt8[np.ndarray, "C 3"],
    sure_HW: Float[np.ndarray, "H W"],
    *,
    steps: tuple[float, float, float] = (0.5, 0.75, 0.95),
    opacity: float = 0.65,
) -> UInt8[np.ndarray, "H W 3"]:
    """Class colours over a photo, faded in four steps by how sure: full, two thirds, one third, bare photo.

    `sure_HW` lies in [0, 1], 1 = sure (pass 1 - entropy). Below `steps[0]` the photo is bare, from `steps[2]` on the
    colour has its full `opacity`. Raises ValueError for labels outside [0, C) and for a map outside [0, 1].

    >>> photo, red = np.zeros((1, 4, 3), np.uint8), np.array([[200, 0, 0]], np.uint8)
    >>> sure = np.array([[0.4, 0.5, 0.75, 0.95]])
    >>> fade_classes(photo, np.zeros((1, 4), int), red, sure, opacity=0.9)[..., 0].tolist()
    [[0, 60, 120, 180]]
    """
    labels_HW = _checked_labels(labels_HW, len(colours_C3))
    step_HW = np.digitize(_checked(sure_HW), np.asarray(steps, np.float32))
    alpha_HW1 = np.rint(np.arange(4) / 3 * 255 * opacity).astype(np.uint16)[step_HW][..., None]
    colour = colours_C3[labels_HW].astype(np.uint16)
    return ((rgb * (255 - alpha_HW1) + colour * alpha_HW1 + 127) // 255).astype(np.uint8)


def draw_contours(
    rgb: UInt8[np.ndarray, "H W 3"],
    map_HW: Float[np.ndarray, "H W"],
    levels: Sequence[float],
    *,
    smooth: float = 1.5,
    shortest: float = 24.0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw the lines where the map crosses the stated levels, dark in a light halo, each level numbered once.

    The map, in [0, 1], is first smoothed by a Gaussian of `smooth` pixels (0 = not at all), and lines shorter than
    `shortest` pixels are left out: a pixel-sharp map would draw its noise. Raises ValueError as `colour_map` does.
    """
    from contourpy import contour_generator  # comes with matplotlib

    field_HW = _checked(map_HW)
    H, W = field_HW.shape
    for level in levels:
        if not 0 <= level <= 1:
            raise ValueError(f"levels: expected numbers in [0, 1]. Received: {level!r}.")
    if min(H, W) < 2:
        return rgb.copy()
    if smooth > 0:
        field_HW = cv2.GaussianBlur(field_HW, (0, 0), smooth)
    tracer, thick = contour_generator(z=field_HW), max(1, round(max(H, W) / 1000))
    lines: dict[float, list[np.ndarray]] = {}
    for level in levels:
        traced = [np.asarray(line) for line in tracer.lines(level)]
        lines[level] = [line for line in traced if np.hypot(*np.diff(line, axis=0).T).sum() >= shortest]
    fixed = [np.rint(line * 16).astype(np.int32)[:, None] for found in lines.values() for line in found]
    out, halo = rgb.copy(), rgb.copy()
    cv2.polylines(halo, fixed, False, (255, 255, 255), thick + 1, cv2.LINE_AA, 4)
    cv2.addWeighted(halo, 0.7, out, 0.3, 0, dst=out)
    cv2.polylines(out, fixed, False, INK, thick, cv2.LINE_AA, 4)
    return _number_lines(out, lines)


def thumbnail(rgb: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "h w 3"]:
    """Shrink a picture by area averaging until its longest side is `side`; a smaller one is returned as it is.

    >>> thumbnail(np.zeros((360, 480, 3), np.uint8), 160).shape
    (120, 160, 3)
    """
    if side < 1:
        raise ValueError(f"side: expected 1 or more. Received: {side}.")
    H, W = rgb.shape[:2]
    scale = side / max(H, W)
    if scale >= 1:
        return rgb.copy()
    return cv2.resize(rgb, (max(1, round(W * scale)), max(1, round(H * scale))), interpolation=cv2.INTER_AREA)


def encode_jpeg(rgb: UInt8[np.ndarray, "H W 3"], quality: int = 90) -> bytes:
    """JPEG bytes of a picture. Raises ValueError beyond 65,500 pixels a side, which the format cannot hold."""
    if max(rgb.shape) > JPEG_LONGEST:
        raise ValueError(
            f"rgb: expected at most {JPEG_LONGEST} pixels a side, the limit of JPEG. "
            f"Received: {rgb.shape[1]}x{rgb.shape[0]}. Shrink it first."
        )
    return _encoded(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])


def encode_map_png16(map_HW: Float[np.ndarray, "H W"]) -> bytes:
    """16-bit grey PNG of a map in [0, 1]: each pixel is round(65535 * map). Raises ValueError as `colour_map`."""
    return _encoded(".png", np.rint(_checked(map_HW) * 65535).astype(np.uint16), PNG16_SETTINGS)


def encode_labels_png(labels_HW: Integer[np.ndarray, "H W"], colours_C3: UInt8[np.ndarray, "C 3"]) -> bytes:
    """8-bit palette PNG whose pixels are class indices; for more than 256 classes 16-bit grey, without colours.

    Raises ValueError for labels outside [0, C).
    """
    labels_HW = _checked_labels(labels_HW, len(colours_C3))
    if len(colours_C3) > 256:
        return _encoded(".png", labels_HW.astype(np.uint16), PNG16_SETTINGS)
    picture, out = Image.fromarray(labels_HW.astype(np.uint8)), io.BytesIO()
    picture.putpalette(colours_C3.tobytes())
    picture.save(out, "png", compress_level=1, bits=8)
    return out.getvalue()


def _encoded(suffix: str, picture: np.ndarray, settings: list[int]) -> bytes:
    done, content = cv2.imencode(suffix, picture, settings)
    if not done:
        H, W = picture.shape[:2]
        raise ValueError(
            f"{suffix} cannot hold this picture: expected at most 1,000,000 pixels a side. Received: {W}x{H}."
        )
    return content.tobytes()


def _checked(map_HW: np.ndarray) -> np.ndarray:
    out_HW = np.ascontiguousarray(map_HW, np.float32)
    low, high = (out_HW.min(), out_HW.max()) if out_HW.size else (np.nan, np.nan)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"map: expected a picture of numbers in [0, 1]. Received: shape {out_HW.shape}, values "
            f"from {low:.6g} to {high:.6g}. Divide the map by its own full scale."
        )
    return out_HW


def _checked_labels(labels_HW: np.ndarray, C: int) -> np.ndarray:
    low, high = (labels_HW.min(), labels_HW.max()) if labels_HW.size else (-1, -1)
    if low < 0 or high >= C:
        raise ValueError(
            f"labels: expected class indices in [0, {C}), one colour each. Received: shape "
            f"{labels_HW.shape}, values from {low} to {high}."
        )
    return labels_HW


@lru_cache
def colour_table(name: str) -> UInt8[np.ndarray, "256 3"]:
    """The 256 colours of a table; refused unless its order is seen by the colour-blind too."""
    if name not in COLOUR_TABLES:
        raise ValueError(
            f"name: expected one of {', '.join(COLOUR_TABLES)}, whose order the colour-blind can see. "
            f"Received: {name!r}."
        )
    from matplotlib import colormaps

    return np.rint(255 * colormaps[name](np.linspace(0, 1, 256))[:, :3]).astype(np.uint8)


@lru_cache
def doubt_tables(
    sure_is: Sure, *, name: str = "inferno", gamma: float = 0.65, opacity: float = 0.92
) -> tuple[UInt8[np.ndarray, "256 3"], UInt8[np.ndarray, "256 3"], UInt8[np.ndarray, "256 3"]]:
    """What `overlay_doubt` does at each of 256 map levels: weight of the photo in 255, of its grey, and what is added."""
    if sure_is not in ("high", "low"):
        raise ValueError(f"sure_is: expected 'high' or 'low'. Received: {sure_is!r}.")
    if not (gamma > 0 and 0 <= opacity <= 1):
        raise ValueError(f"expected gamma > 0 and opacity in [0, 1]. Received: gamma {gamma}, opacity {opacity}.")
    doubt = np.linspace(0, 1, 256)[:: -1 if sure_is == "high" else 1]
    t = doubt[:, None, None] ** gamma
    alpha, first = t * opacity, 90  # the table's dark beginning would only dirty the photo
    colour = colour_table(name)[np.rint(first + (255 - first) * t[:, 0, 0]).astype(int)][:, None]
    weights = [(1 - alpha) * (1 - t), (1 - alpha) * t]
    photo, grey = (np.rint(255 * weight[:, 0]).astype(np.uint8).repeat(3, 1) for weight in weights)
    return photo, grey, np.rint(alpha * colour).astype(np.uint8)[:, 0]


def _number_lines(rgb: np.ndarray, lines: dict[float, list[np.ndarray]]) -> np.ndarray:
    """Write each level once on its longest line, as near its middle as the picture and the other numbers allow."""
    (H, W), image = rgb.shape[:2], Image.fromarray(rgb)
    size, taken = int(np.clip(round(0.5 * W**0.5), 10, 30)), list[tuple[np.ndarray, np.ndarray]]()
    font = ImageFont.load_default(size)
    for level, found in lines.items():
        line, text = max(found, key=len, default=np.empty((0, 2))), f"{level:.3g}"
        half = np.array([font.getlength(text) / 2 + 2, 0.7 * size])
        for xy in line[np.argsort(np.abs(np.arange(len(line)) - len(line) // 2), kind="stable")]:
            free = all((np.abs(xy - other) > half + its_half).any() for other, its_half in taken)
            if len(line) > 6 * half[0] and free and (xy >= half).all() and (xy + half <= (W, H)).all():
                taken.append((xy, half))
                ImageDraw.Draw(image).text(tuple(xy), text, INK, font, "mm", stroke_width=2, stroke_fill=PAPER)
                break
    return np.array(image)
