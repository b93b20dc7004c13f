import io
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image

from seguncert import legend, render

COLOURS = np.array([[128, 128, 128], [200, 0, 0], [0, 90, 220], [250, 240, 40]], np.uint8)
LEGEND = {"map_name": "Confidence", "unit": "probability", "sure_is": "high", "note": "not calibrated"}


def photo_and_map(H: int, W: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (H, W, 3), np.uint8), random.random((H, W), np.float32)


def luminance(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("name", render.COLOUR_TABLES)
def test_colour_map_is_absolute_and_keeps_its_order_in_luminance(name):
    low, high = np.full((2, 3), 0.3), np.array([[0.3, 1.0]])
    assert (render.colour_map(low, name)[0, 0] == render.colour_map(high, name)[0, 0]).all()
    steps = luminance(render.colour_map(np.linspace(0, 1, 52)[None], name)[0])
    assert (np.diff(steps) > 0).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_colour_map_ends_at_the_tables_ends(dtype):
    assert render.colour_map(np.array([[0, 1]], dtype), "cividis").tolist() == [[[0, 34, 78], [254, 232, 56]]]


@pytest.mark.parametrize("bad", [np.nan, -0.01, 1.01, np.inf])
def test_maps_outside_0_to_1_are_refused_everywhere(bad):
    photo, map_HW = photo_and_map(4, 5)
    map_HW[2, 2] = bad
    for draw in (
        lambda: render.colour_map(map_HW),
        lambda: render.overlay_doubt(photo, map_HW, "low"),
        lambda: render.fade_classes(photo, np.zeros((4, 5), int), COLOURS, map_HW),
        lambda: render.draw_contours(photo, map_HW, [0.5]),
        lambda: render.encode_map_png16(map_HW),
    ):
        with pytest.raises(ValueError, match=r"expected a picture of numbers in \[0, 1\]. Received: shape \(4, 5\)"):
            draw()


def test_errors_name_what_was_expected_and_received():
    photo, map_HW = photo_and_map(4, 5)
    with pytest.raises(ValueError, match=r"one of cividis, viridis, magma, inferno.*Received: 'jet'"):
        render.colour_map(map_HW, "jet")
    with pytest.raises(ValueError, match=r"gamma > 0 and opacity in .*Received: gamma 0.0, opacity 2.0"):
        render.overlay_doubt(photo, map_HW, "low", gamma=0.0, opacity=2.0)
    with pytest.raises(ValueError, match=r"class indices in \[0, 4\).*values from 0 to 4"):
        render.encode_labels_png(np.array([[0, 4]]), COLOURS)
    with pytest.raises(ValueError, match=r"values from -1 to 0"):
        render.fade_classes(photo, np.where(map_HW < map_HW.max(), 0, -1), COLOURS, map_HW)
    with pytest.raises(ValueError, match=r"levels: expected numbers in \[0, 1\]. Received: 1.5"):
        render.draw_contours(photo, map_HW, [0.5, 1.5])
    with pytest.raises(ValueError, match=r"low < high. Received: low 1.0, high 1.0"):
        legend.legend_bar(200, "Entropy", "nat", 1.0, 1.0)
    with pytest.raises(ValueError, match=r"width: expected 64 pixels or more.*Received: 63"):
        legend.legend_bar(63, "Entropy")
    with pytest.raises(ValueError, match=r"side: expected 1 or more. Received: 0"):
        render.thumbnail(photo, 0)
    with pytest.raises(ValueError, match=r"at most 65500 pixels a side.*Received: 65501x1"):
        render.encode_jpeg(np.zeros((1, 65501, 3), np.uint8))


def test_the_photo_stays_as_it_is_where_the_map_is_sure():
    photo, _ = photo_and_map(30, 40)
    assert (render.overlay_doubt(photo, np.ones((30, 40)), "high") == photo).all()
    assert (render.overlay_doubt(photo, np.zeros((30, 40)), "low") == photo).all()
    nearly = render.overlay_doubt(photo, np.full((30, 40), 0.999), "high")
    assert np.abs(nearly.astype(int) - photo).max() <= 12


def test_doubt_hides_the_photo_ever_more_and_ends_in_bright_yellow():
    ramps = [np.full((1, 256, 3), grey, np.uint8) for grey in (0, 255)]
    doubt = np.linspace(0, 1, 256)[None]
    dark, light = (render.overlay_doubt(ramp, doubt, "low").astype(int) for ramp in ramps)
    seen = (light - dark).sum(2)[0]
    assert seen[0] == 3 * 255 and (np.diff(seen) <= 2).all() and seen[-1] < 0.1 * seen[0]
    assert (dark[0, -1] > [220, 220, 100]).all() and dark[0, -1, 2] < dark[0, -1, 0] - 50


def test_overlay_is_absolute_and_the_same_for_both_orientations():
    photo, map_HW = photo_and_map(20, 30)
    levels = np.rint(map_HW * 255) / 255
    whole = render.overlay_doubt(photo, levels, "low")
    assert (whole == render.overlay_doubt(photo, 1 - levels, "high")).all()
    assert (whole[:5, :7] == render.overlay_doubt(photo[:5, :7], levels[:5, :7], "low")).all()


def test_overlay_agrees_with_the_formula():
    photo, map_HW = photo_and_map(20, 30)
    t = (np.rint(map_HW * 255) / 255)[..., None] ** 0.65
    colour = render.colour_table("inferno")[np.rint(90 + 165 * t[..., 0]).astype(int)]
    grey = np.repeat((photo @ np.array([0.299, 0.587, 0.114]))[..., None], 3, 2)
    expected = 0.92 * t * colour + (1 - 0.92 * t) * ((1 - t) * photo + t * grey)
    assert np.abs(render.overlay_doubt(photo, map_HW, "low") - expected).max() < 3


def test_legend_shows_the_overlays_own_colours_at_the_maps_own_values():
    bar = legend.legend_bar(700, "Confidence", sure_is="high", name="inferno", opacity=0.92)
    ramp = render.doubt_ramp("high")
    row = max(bar, key=lambda row: len(np.unique(row, axis=0)))
    coloured = row[(row != render.PAPER).any(1) & (row != render.INK).any(1)]
    assert (coloured == ramp[0]).all(1).any() and (coloured == ramp[255]).all(1).any()
    at = {tuple(colour): x for x, colour in enumerate(row.tolist())}
    assert at[tuple(ramp[0].tolist())] < at[tuple(ramp[255].tolist())]


def test_fading_has_four_steps():
    photo, _ = photo_and_map(1, 400)
    sure = np.linspace(0, 1, 400, dtype=np.float32)[None]
    out = render.fade_classes(np.zeros_like(photo), np.ones((1, 400), np.uint8), COLOURS, sure)
    assert len(np.unique(out.reshape(-1, 3), axis=0)) == 4
    bare = sure[0] < 0.5
    assert (render.fade_classes(photo, np.ones((1, 400), np.uint8), COLOURS, sure)[0, bare] == photo[0, bare]).all()


def test_contours_lie_where_the_map_crosses_the_level():
    map_HW = np.tile(np.linspace(0, 1, 201), (80, 1))
    grey = np.full((80, 201, 3), 150, np.uint8)
    changed = (render.draw_contours(grey, map_HW, [0.25]) != grey).any(2)
    columns = np.flatnonzero(changed[:8].any(0))
    assert abs(columns.mean() - 50) < 0.6 and len(columns) <= 5
    assert changed[:, 30:70].sum() > changed[:8].any(0).sum() * 80  # the number
    assert (render.draw_contours(grey, np.full((80, 201), 0.5), [0.25]) == grey).all()


@pytest.mark.parametrize("H, W", [(1, 1), (2, 2), (64, 64), (1, 20000), (20000, 1), (48, 5000), (300, 480)])
def test_any_shape_gives_a_picture_with_a_legend_below_the_photo(H, W):
    photo, map_HW = photo_and_map(H, W)
    out = legend.overlay_picture(photo, map_HW, **LEGEND)
    assert out.shape[1] == max(W, 260) and 40 < len(out) - H < 260
    assert (out[:H, :W] == render.overlay_doubt(photo, map_HW, "high")).all()
    below = out[H:]
    assert (below == render.INK).all(2).any() and (below == render.PAPER).all(2).mean() > 0.3
    assert cv2.imdecode(np.frombuffer(render.encode_jpeg(out), np.uint8), cv2.IMREAD_COLOR).shape == out.shape
    for draw in (render.thumbnail(out, 100), render.draw_contours(photo, map_HW, [0.5])):
        assert draw.size and draw.dtype == np.uint8


@pytest.mark.parametrize("width", [64, 65, 90, 130, 200, 333, 640, 1921, 4000])
@pytest.mark.parametrize("sure_is", ["high", "low", None])
def test_legends_hold_at_every_width(width, sure_is):
    bar = legend.legend_bar(
        width, "Mutual information", "nat", 0.0, 2.398, sure_is=sure_is, note="stretched to this image"
    )
    names = ["Fußgänger", "Straße", "a name that is much too long for a narrow legend", "absent"]
    chips = legend.legend_classes(width, names, COLOURS, np.array([0.5, 0.4996, 0.0004, 0.0]))
    for strip in (bar, chips):
        assert strip.shape[1] == width and strip.shape[0] < 260
        assert (strip[:, 0] == render.PAPER).all() and (strip[:, -1] == render.PAPER).all()
    present = [(chips == colour).all(2).any() for colour in COLOURS]
    assert present == [True, True, True, False]


def test_text_grows_with_the_width_within_bounds():
    heights = [
        len(legend.legend_bar(width, "Entropy", "nat", sure_is="low")) for width in (500, 1000, 2000, 8000, 20000)
    ]
    assert heights == sorted(heights) and heights[-1] == heights[-2] < 250


def test_thumbnails_keep_the_ratio_and_are_never_enlarged():
    photo, _ = photo_and_map(360, 480)
    small = render.thumbnail(photo, 120)
    assert small.shape == (90, 120, 3)
    assert np.abs(small - photo.reshape(90, 4, 120, 4, 3).mean((1, 3))).max() <= 1
    assert (render.thumbnail(photo, 500) == photo).all()
    assert render.thumbnail(photo[:1], 100).shape == (1, 100, 3)


def test_map_png_gives_the_numbers_back():
    _, map_HW = photo_and_map(50, 70)
    map_HW[0, :2] = 0, 1
    back = cv2.imdecode(np.frombuffer(render.encode_map_png16(map_HW), np.uint8), cv2.IMREAD_UNCHANGED)
    assert back.dtype == np.uint16 and back[0, :2].tolist() == [0, 65535]
    assert np.abs(back / 65535 - map_HW).max() <= 0.501 / 65535


def test_label_png_gives_indices_and_colours_back():
    labels_HW = np.random.default_rng(0).integers(0, 4, (9, 11))
    png = render.encode_labels_png(labels_HW, COLOURS)
    picture = Image.open(io.BytesIO(png))
    assert picture.mode == "P" and (np.asarray(picture) == labels_HW).all() and png[24] == 8
    assert (np.asarray(picture.convert("RGB")) == COLOURS[labels_HW]).all()


def test_label_png_of_many_classes_is_16_bit():
    colours = np.zeros((1000, 3), np.uint8)
    labels_HW = np.arange(1000).reshape(20, 50)
    back = cv2.imdecode(np.frombuffer(render.encode_labels_png(labels_HW, colours), np.uint8), cv2.IMREAD_UNCHANGED)
    assert back.dtype == np.uint16 and (back == labels_HW).all()


def test_the_same_bytes_from_every_thread():
    def files(seed: int) -> tuple[bytes, ...]:
        photo, map_HW = photo_and_map(40, 70 + seed, seed)
        labels_HW = (map_HW * 3.99).astype(np.uint8)
        return (
            render.encode_jpeg(legend.overlay_picture(photo, map_HW, **LEGEND)),
            render.encode_map_png16(map_HW),
            render.encode_labels_png(labels_HW, COLOURS),
            render.fade_classes(photo, labels_HW, COLOURS, map_HW).tobytes(),
            legend.legend_classes(70 + seed, ["a", "b", "c", "ü"], COLOURS, np.full(4, 0.25)).tobytes(),
        )

    legend.legend_bar.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(files, [*range(12)] * 2))
    assert together[:12] == together[12:] == [files(seed) for seed in range(12)]
