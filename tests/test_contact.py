"""The contact sheet of a selection: what is drawn on photos, and a page that no name can break."""

import base64
import dataclasses
import io
import itertools
import math
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from hostile import scene
from seguncert.contact import (
    CLASSES_OPEN,
    LISTED,
    PAIRS,
    Asked,
    LeftOut,
    Sheet,
    draw_picks,
    outlined_jpeg,
    render_sheet,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
RUN = {
    "seguncert": "0.1.0", "method": "mc-dropout", "samples": 20, "calibration": "temperature 1.31", "input": "photos",
    "model": {"name": "street & co", "sha256": "ab" * 32, "classes": ["sky", "<road>", "Straße"], "colours": [[1, 2, 3], [128, 64, 128], [255, 255, 255]]},
}  # fmt: skip
HOSTILE = [
    "plain/a.jpg",
    "new\nline.jpg",
    "\"quotes' & <b>.jpg",
    "</script><script>alert(1)</script>.jpg",
    "<!--.jpg",
    "caf\udce9 not utf-8.jpg",
    "日本/été 100%?#.jpg",
    "javascript:alert(1)",
    "\u202egpj.exe",
    "{{ 7*7 }}.jpg",
    "שלום.jpg",
    'x" onerror="alert(1)',
]
FULL = {"score": 0.5, "distance": 0.25, "clicks": 7, "sequence": "drive 1", "frame": 12, "class": "<road>", "reason": "highest <score>"}  # fmt: skip


def whole(rank, path, **more):
    return {"rank": rank, "path": path, "unit": "image", "x": 0, "y": 0, "width": 480, "height": 360, "size": (480, 360)} | FULL | more  # fmt: skip


def part(rank, path, x, y, width, height, size=(480, 360), **more):
    return whole(rank, path) | {"unit": "region", "x": x, "y": y, "width": width, "height": height, "size": size} | more


def sheet(picks=(), unit="image", **more):
    asked = Asked(unit, "entropy:mean × variance:top5^0.5", 20, 347)
    return Sheet(**{"run": RUN, "asked": asked, "picks": list(picks)} | more)


class Reader(HTMLParser):
    """What a browser would make of the page: elements, the text outside scripts, and the scripts."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.scripts, self.inside = [], "", [], ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""
        self.text += " " if tag in ("td", "th", "dt", "dd", "div", "p", "li", "h1", "h2") else ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside not in ("style", "title"):
            self.text += data

    def all(self, tag, name=None):
        return [attrs for each, attrs in self.elements if each == tag and (name is None or name in attrs.get("class", "").split())]  # fmt: skip


def read(*args, **more):
    return Reader(render_sheet(sheet(*args, **more)))


def everything():
    """A sheet in which every text is a hostile one."""
    photo = outlined_jpeg(scene(90, 120))
    picks = [
        whole(k + 1, path, sequence=path, reason=path, frame=path, **{"class": path}) for k, path in enumerate(HOSTILE)
    ]
    resembling = [{"path": path, "score": 0.4, "near": path, "near_rank": k + 1, "distance": 0.1} for k, path in enumerate(HOSTILE)]  # fmt: skip
    classes = {"classes": HOSTILE, "colours": [[k, 0, 255 - k] for k in range(len(HOSTILE))], "name": HOSTILE[3]}
    shares = np.arange(1, len(HOSTILE) + 1) / 100
    return Sheet(
        run=RUN | {"model": RUN["model"] | classes, "input": HOSTILE[5], "calibration": HOSTILE[2]},
        asked=Asked("image", HOSTILE[3], 20, 347, labelled=3, radius=0.1, gap=30, quotas=dict.fromkeys(HOSTILE, 2)),
        picks=picks,
        pictures=dict.fromkeys(HOSTILE[::2], photo),
        similar=LeftOut(40, resembling),
        blocked=LeftOut(30, resembling),
        balance=dict.fromkeys(("pool", "labelled", "random", "plain"), shares) | {"picks": shares[::-1]},
        comparison={way: {"score": 0.5, "distance": None, "sequences": 3, "images": 12, "clicks": 1234.4} for way in ("ours", "random", "plain")},
        files=[(path, path) for path in HOSTILE],
        notes=HOSTILE,
    )  # fmt: skip


# What is drawn on a photo.

NOISE = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
GROUNDS = [np.full((240, 320, 3), grey, np.uint8) for grey in (0, 118, 255)] + [NOISE]


@pytest.mark.parametrize("ground", GROUNDS, ids=["black", "grey", "white", "noise"])
def test_an_outline_is_white_and_dark_on_any_ground_and_touches_nothing_else(ground):
    before = ground.copy()
    out = draw_picks(ground, [(40, 60, 100, 80)], None, [])
    assert (ground == before).all()
    for along in (out[60, 45:135], out[139, 45:135], out[65:135, 40], out[65:135, 139]):
        assert (along == 255).all(), "the line"
    for beside in (out[59, 45:135], out[61, 45:135], out[65:135, 39], out[65:135, 41]):
        assert beside.max() < 40, "its halo"
    rows, columns = np.mgrid[:240, :320]
    away = np.maximum(np.maximum(40 - columns, columns - 139), np.maximum(60 - rows, rows - 139))
    assert (out[np.abs(away) > 2] == ground[np.abs(away) > 2]).all()


def test_a_mask_is_outlined_where_it_ends_and_not_its_box():
    rows, columns = np.mgrid[:80, :100]
    mask = np.hypot((rows - 39.5) / 40, (columns - 49.5) / 50) < 1
    mask[30:50, 40:60] = False  # a hole
    black = np.zeros((240, 320, 3), np.uint8)
    out = draw_picks(black, [(40, 60, 100, 80)], [mask], [])
    padded = np.pad(mask, 1)
    whole_HW = np.zeros((240, 320), bool)
    for y in range(80):
        for x in range(100):
            if mask[y, x] and not (
                padded[y, x + 1] and padded[y + 2, x + 1] and padded[y + 1, x] and padded[y + 1, x + 2]
            ):
                whole_HW[60 + y, 40 + x] = True
    outer = whole_HW.copy()
    outer[88:112, 78:102] = False
    assert (out[outer] == 255).all() and (out[whole_HW & ~outer].mean()) > 100, "the rim of the hole too"
    assert (out[60, 40] == 0).all(), "a corner of the box"


def test_a_pixel_stays_to_be_seen_within_its_ring():
    out = draw_picks(NOISE, [(200, 100, 1, 1)], None, [])
    assert (out[100, 200] == NOISE[100, 200]).all()
    around = out[90:111, 190:211].reshape(-1, 3)
    assert (around == 255).all(1).sum() >= 12 and (around.max(1) < 80).sum() >= 12
    assert (out[:85] == NOISE[:85]).all() and (out[:, :185] == NOISE[:, :185]).all()


def test_at_the_edge_the_whole_line_is_inside():
    grey = np.full((240, 320, 3), 118, np.uint8)
    out = draw_picks(grey, [(0, 0, 320, 240)], None, [])
    for white, dark in (
        (out[1, 2:-2], out[0]),
        (out[-2, 2:-2], out[-1]),
        (out[2:-2, 1], out[:, 0]),
        (out[2:-2, -2], out[:, -1]),
    ):
        assert (white == 255).all() and dark.max() < 40


def test_a_number_stands_above_its_pick_or_where_there_is_room():
    grey = np.full((480, 640, 3), 118, np.uint8)
    for (x, y), where in (((300, 200), "above"), ((300, 3), "below"), ((3, 300), "above"), ((615, 455), "above")):
        box = (x, y, 20, 20)
        changed = (draw_picks(grey, [box], None, []) != draw_picks(grey, [box], None, [12])).any(-1)
        (top, left), (bottom, right) = np.argwhere(changed).min(0), np.argwhere(changed).max(0)
        assert bottom < y if where == "above" else top >= y + 20
        assert 8 <= bottom - top <= 30 and max(y - bottom, top - y - 20) <= 8 and left <= x <= right
        assert (draw_picks(grey, [box], None, [12])[changed] == 255).sum() > 20, "light figures on a dark ground"


def test_in_a_crowd_numbers_never_cover_each_other():
    """Each number drawn last leaves those before it as they were: no pixel is written by two."""
    white = np.full((240, 320, 3), 255, np.uint8)
    boxes = [(150, 110, 20, 20)] * 12
    drawn = [draw_picks(white, boxes, None, list(range(1, n + 1))).astype(int) for n in range(13)]
    written = np.zeros((240, 320), int)
    for earlier, later in itertools.pairwise(drawn):
        new = (earlier != later).any(-1)
        assert not (new & (written > 0)).any()
        written += new
    assert (written > 0).sum() > 0 and (drawn[11] == drawn[12]).all(), "and the last ones find no place"


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (7, 5)])
def test_the_smallest_photos_can_be_drawn_on(shape):
    photo = np.zeros((*shape, 3), np.uint8)
    assert draw_picks(photo, [(0, 0, 1, 1)], [np.ones((1, 1), bool)], [1]).shape == photo.shape
    with Image.open(io.BytesIO(outlined_jpeg(photo, [(0, 0, 1, 1)], None, [1]))) as picture:
        assert max(picture.size) <= 960
    nothing = np.zeros((30, 30), bool)
    assert (draw_picks(GROUNDS[0], [(9, 9, 30, 30)], [nothing], []) == 0).all()


@pytest.mark.parametrize("size", [(2400, 3200), (240, 320)], ids=["shrunk", "enlarged"])
def test_a_picture_is_outlined_at_the_place_it_has_when_shown(size):
    H, W = size
    photo = np.full((H, W, 3), 118, np.uint8)
    box = (W // 4, H // 4, W // 2, H // 2)
    mask = np.zeros((H // 2, W // 2), bool)
    mask[:, : W // 4] = True
    with Image.open(io.BytesIO(outlined_jpeg(photo, [box], [mask], []))) as picture:
        shown = np.asarray(picture.convert("L")).astype(int)
    assert shown.shape == (720, 960)
    bright = np.argwhere(shown > 230)
    (top, left), (bottom, right) = bright.min(0), bright.max(0)
    assert max(abs(left - 240), abs(right - 479), abs(top - 180), abs(bottom - 539)) <= 2
    with Image.open(io.BytesIO(outlined_jpeg(photo))) as picture:
        assert picture.size == (min(960, W), min(720, H)), "without outlines nothing is enlarged"


# The page.


def test_no_text_can_break_out_of_the_page():
    html = render_sheet(everything())
    html.encode("utf-8")
    page = Reader(html)
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    for text in ("</script><script>alert(1)</script>.jpg", "new\\nline.jpg", "caf\ufffd not utf-8.jpg", "\\u202egpj.exe", "{{ 7*7 }}.jpg", "<!--.jpg"):  # fmt: skip
        assert page.text.count(text) >= 4
    assert "\u202e" not in html and "49.jpg" not in html
    assert [attrs["data-path"] for attrs in page.all("li", "card")] == [re.sub("[\udce9]", "\ufffd", path.replace("\n", "\\n").replace("\u202e", "\\u202e")) for path in HOSTILE]  # fmt: skip


def test_links_to_files_lead_to_their_very_bytes_beside_the_page():
    links = [attrs["href"] for attrs in Reader(render_sheet(everything())).all("a")]
    assert [unquote_to_bytes(link) for link in links] == [path.encode("utf-8", "surrogateescape") for path in HOSTILE]
    assert all(re.fullmatch(r"[A-Za-z0-9_.~/%-]+", link) for link in links), "so no link has a scheme"


def test_nothing_is_asked_of_another_place():
    html = render_sheet(everything())
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    page = Reader(html)
    for tag, attrs in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img") and not {"src", "srcset"} & set(attrs)
        assert tag == "a" or attrs.get("href", "#").startswith(("#", "data:image/jpeg;base64,"))
    assert "default-src 'none'" in html


def test_the_least_there_can_be():
    page = read([{"rank": 1, "path": "a.jpg"}])
    assert "1 image to label next, of 347" in page.text and "None" not in page.text and "nan" not in page.text
    assert [attrs["class"] for attrs in page.all("li", "card")] == ["card bare"] and not page.all("button", "shot")
    for absent in ("Classes, before and after", "Left out", "Beside random", "Files to hand over", "yellow"):
        assert absent not in page.text


def test_no_picks_at_all():
    page = read(notes=["Nothing is left to pick from."], balance={"pool": [0.5, 0.5, 0]})
    for text in ("Nothing to label next among 347 images", "Nothing is left to pick from.", "Nothing was picked."):
        assert text in page.text
    assert not page.all("li", "card")


def test_it_says_what_was_asked():
    asked = Asked(
        "region", "entropy:foreground", 400, 1, "clicks", 1, 0.125, 30, {"pole": 2, "sky": "10 % of the area"}, 7, 0.5
    )
    text = read([part(1, "a", 0, 0, 9, 9)], asked=asked).text
    for words in (
        "1 region to label next, in 1 of 1 image", "Model street & co · about 7 clicks to label them · 1 sequence · 1 image labelled already",
        "Asked for: regions for about 400 clicks by the score entropy:foreground, each time the one with the largest product of score and distance to the power 0.5 to what is picked or labelled already.",
        "What is nearer to one of these than 0.125 of the typical distance of two regions is left out as too similar.",
        "at least 30 frames apart", "Quotas: pole at least 2, sky 10 % of the area.", "method mc-dropout, 20 samples, calibration: temperature 1.31", "seed 7",
    ):  # fmt: skip
        assert words in text
    plain = read([whole(1, "a")]).text
    assert "Asked for: 20 images by the score entropy:mean × variance:top5^0.5, the highest first." in plain
    assert "distance to" not in plain and "similar" not in plain and "apart" not in plain and "Quota" not in plain


def test_cards_come_in_order_with_all_that_is_known():
    page = read([whole(1, "a/b.jpg"), whole(2, "c.jpg", distance=math.nan, clicks=None), part(3, "c.jpg", 5, 6, 1, 1)])
    assert [attrs["data-class"] for attrs in page.all("li", "card")] == ["<road>"] * 3
    first, second, third = page.text.split("What to label, in this order")[1].split("seguncert 0.1.0")[0].split("drive 1, frame 12")[1:]  # fmt: skip
    assert first.startswith(" score 0.500 distance 0.250 clicks 7 highest <score> <road>")
    assert second.startswith(" score 0.500 highest")
    assert third.startswith("; pixel (5, 6) score 0.500 distance 0.250 clicks 7")
    assert page.text.index("a/b.jpg") < page.text.index("c.jpg")


def test_a_picture_is_stored_once_and_shown_by_all_that_need_it():
    first, second = outlined_jpeg(scene(90, 120)), outlined_jpeg(scene(60, 120))
    picks = [part(k + 1, "a", 10 * k, 20, 8, 8) for k in range(20)] + [whole(21, "b"), whole(22, "c")]
    similar = LeftOut(1, [{"path": "a", "near": "b", "near_rank": 21}])
    html = render_sheet(sheet(picks, "region", pictures={"a": first, "b": second, "unused": first}, similar=similar))
    assert html.count(base64.b64encode(first).decode()) == html.count(base64.b64encode(second).decode()) == 1
    page = Reader(html)
    images = {attrs["id"]: (attrs["width"], attrs["height"]) for attrs in page.all("image")}
    assert sorted(images.values()) == [("120", "60"), ("120", "90")]
    assert {attrs["href"][1:] for attrs in page.all("use")} == set(images)
    assert len(page.all("li", "bare")) == 1, "c has no picture"
    labels = [attrs["aria-label"] for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert "a under its doubt, number 3" in labels and "a, left out" in labels and "b, which it resembles" in labels


@pytest.mark.parametrize("box", [(0, 0, 20, 10), (470, 350, 10, 10), (200, 100, 1, 1), (100, 5, 90, 200), (0, 170, 480, 4)])  # fmt: skip
@pytest.mark.parametrize("picture", [(90, 120), (120, 90), (30, 200)], ids=["alike", "tall", "wide"])
def test_a_card_shows_a_part_of_the_photo_that_holds_the_pick(box, picture):
    h, w = picture
    html = render_sheet(sheet([part(1, "a", *box)], "region", pictures={"a": outlined_jpeg(scene(h, w))}))
    view = next(attrs["viewbox"] for attrs in Reader(html).all("svg") if attrs.get("role") == "img")
    left, top, wide, tall = (float(value) for value in view.split())
    assert left >= 0 and top >= 0 and left + wide <= w + 0.11 and top + tall <= h + 0.11
    assert (
        wide == pytest.approx(w, abs=0.1)
        or tall == pytest.approx(h, abs=0.1)
        or wide / tall == pytest.approx(4 / 3, rel=0.02)
    )
    x, y = (box[0] + box[2] / 2) * w / 480, (box[1] + box[3] / 2) * h / 360
    assert left <= x <= left + wide and top <= y <= top + tall
    if box[2] * 2.5 <= 480:
        assert wide >= min(w, 2.5 * box[2] * w / 480) - 0.1


def test_a_whole_image_and_a_photo_of_unknown_size_are_shown_whole():
    for row in (whole(1, "a"), part(1, "a", 5, 5, 9, 9, size=None), part(1, "a", 0, 0, 480, 360)):
        page = read([row], pictures={"a": outlined_jpeg(scene(90, 120))})
        views = [attrs["viewbox"] for attrs in page.all("svg") if "viewbox" in attrs and attrs.get("role") == "img"]
        assert views == ["0 0 120 90"] and not page.all("svg", "where")


def test_a_picture_may_lie_elsewhere():
    page = read([whole(1, "a b", picture_url="a%20b/overlay.jpg")])
    (image,) = page.all("img")
    assert image["src"] == "a%20b/overlay.jpg" and image["loading"] == "lazy" and image["alt"].startswith("a b under")


def lengths(page):
    """By kind of bar: lengths in percent, in the order of the page; and where the axis has its ticks, by share."""
    bars = {kind: [float(attrs["width"][:-1]) for attrs in page.all("rect", kind) if attrs["width"].endswith("%")] for kind in ("pool", "labelled", "picks")}  # fmt: skip
    heads = [float(attrs["x"][:-1]) for attrs in page.all("text")]
    shares = re.findall(r"([\d.]+) %", page.text.split("Class ")[1])[: len(heads)]
    return bars, dict(zip(map(float, shares), heads, strict=True))


def test_bars_end_at_the_tick_of_their_share():
    run = RUN | {"model": RUN["model"] | {"classes": list("abcdef"), "colours": [[9, 9, 9]] * 6}}
    pool = [0.4, 0.2, 0.1, 0.05, 0.01, 0]
    page = read([whole(1, "x")], run=run, balance={"pool": pool, "picks": pool[::-1], "labelled": None})
    bars, ticks = lengths(page)
    assert bars["pool"] == [pytest.approx(ticks[100 * share], abs=0.01) if share else 0 for share in pool]
    assert bars["picks"] == [pytest.approx(ticks[100 * share], abs=0.01) if share else 0 for share in pool[::-1]]
    assert bars["labelled"] == [] and "labelled already" not in page.text and max(bars["pool"]) == 100
    assert "a 40 % 0 % none" in page.text and "e 1.0 % 20 % × 20" in page.text and "f 0 % 40 % –" in page.text
    assert "More than in all images: e × 20, d × 2.0. Less: a none, b × 0.05" in page.text


def test_classes_come_by_area_and_many_are_folded():
    names = [f"class{k}" for k in range(150)]
    run = RUN | {"model": RUN["model"] | {"classes": names, "colours": [[k, k, k] for k in range(150)]}}
    shares = np.arange(150) / np.arange(150).sum()
    page = read([whole(1, "x")], run=run, balance={"pool": shares, "picks": np.full(150, 1 / 150)})
    order = re.findall(r"class(\d+)\b", " ".join(attrs.get("aria-label", "") for attrs in page.all("svg")))
    assert [int(k) for k in order] == list(range(149, -1, -1))
    assert f"{150 - CLASSES_OPEN} further classes" in page.text and page.all("details")
    one = read([whole(1, "x")], run=RUN | {"model": RUN["model"] | {"classes": ["all"], "colours": [[0, 0, 0]]}}, balance={"pool": [1.0], "picks": [1.0]})  # fmt: skip
    assert "all 100 % 100 % × 1.0" in one.text and not one.all("details")
    few = read([whole(1, "x")], balance={"pool": [0.0, 1.0, 0.0], "picks": [0.5, 0.5, 0.0]})
    assert len(lengths(few)[0]["pool"]) == 2, "a class without area has no row"


def test_what_was_left_out_stands_beside_what_it_resembles():
    photo, other = outlined_jpeg(scene(90, 120)), outlined_jpeg(scene(80, 120))
    rows = [{"path": f"s{k}", "score": 0.4, "near": "a", "near_rank": 1, "distance": 0.03} for k in range(30)]
    rows[1] |= {"near": "z", "near_rank": None}
    blocked = [{"path": "late.jpg", "sequence": "s", "frame": 13, "score": 0.3, "near": "a", "near_rank": 1}]
    asked = Asked("image", "entropy:mean", 20, 347, gap=30, labelled=4, radius=0.1)
    page = read([whole(1, "a")], asked=asked, pictures={"a": photo, "s0": photo, "z": other}, similar=LeftOut(1234, rows), blocked=LeftOut(1, blocked))  # fmt: skip
    assert len(page.all("li", "pair")) == PAIRS
    assert "1,234 images resemble what is picked or labelled already, the highest scores first." in page.text
    assert f"Shown are the first {PAIRS}." in page.text
    views = {attrs["aria-label"]: attrs["viewbox"] for attrs in page.all("svg") if attrs.get("role") == "img"}
    assert views["z, which it resembles"] == "0 0 120 80"
    assert "left out number 1 s0 resembles a score 0.400 distance 0.030" in page.text
    assert "no pictureleft out labelled already s1 resembles z" in page.text
    assert "1 image lies less than 30 frames from a pick of the same sequence. This one:" in page.text
    assert "late.jpg, frame 13, score 0.300; beside number 1, a" in page.text


def test_what_a_part_resembles_is_shown_as_on_its_card():
    photo = outlined_jpeg(scene(90, 120))
    left_out = part(None, "b", 400, 300, 20, 20) | {"near": "a", "near_rank": 1}
    html = render_sheet(sheet([part(1, "a", 40, 60, 20, 20)], "region", pictures={"a": photo, "b": photo}, similar=LeftOut(1, [left_out])))  # fmt: skip
    views = {attrs["aria-label"]: attrs["viewbox"] for attrs in Reader(html).all("svg") if attrs.get("role") == "img"}
    assert views["a, which it resembles"] == views["a under its doubt, number 1"] != "0 0 120 90"
    (under, box) = [attrs for attrs in Reader(html).all("rect") if float(attrs["width"].rstrip("%")) == 5]
    assert (box["x"], box["y"], box["height"]) == (under["x"], under["y"], under["height"]) == ("100.0", "75.0", "5.0")


def test_gaps_and_the_map_beside_are_told_in_the_words_that_are_given():
    blocked = LeftOut(2, [{"path": "late.jpg"}])
    asked = Asked("image", "margin:mean", 20, 347, gap="10 s", plain="margin")
    text = read([whole(1, "a")], asked=asked, blocked=blocked, comparison={"plain": {"score": 1}}).text
    assert (
        "at least 10 s apart" in text
        and "2 images lie less than 10 s from a pick" in text
        and "Plain mean margin" in text
    )
    text = read([whole(1, "a")], blocked=blocked).text
    assert (
        "2 images lie too close to a pick of the same sequence. Some of them: late.jpg" in text and "apart" not in text
    )


def test_the_comparison_shows_what_is_known_and_does_not_promise():
    ours = {"score": 0.5, "distance": None, "sequences": 3, "images": 20, "clicks": 3056.4}
    page = read([whole(1, "a")], comparison={"ours": ours, "random": ours | {"score": math.nan}, "plain": ours})
    assert "about 7 clicks" in page.text, "which is the sum over the picks"
    assert "about 3,056 clicks" in read([whole(1, "a", clicks=None)], comparison={"ours": ours}).text
    assert "Mean score 0.500 – 0.500" in page.text and "Estimated clicks 3,056 3,056 3,056" in page.text
    assert "distance to the nearest" not in page.text, "a row in which nothing is known"
    assert "no sign that the labels will help" in page.text and "random.csv and plain.csv" in page.text
    assert "random.csv" not in read([whole(1, "a")], comparison={"ours": ours}).text


def test_a_thousand_picks_with_twenty_pictures():
    photo = outlined_jpeg(scene(360, 480))
    picks = [whole(k + 1, f"deep/folder/frame {k:06d}.jpg", sequence=f"drive {k // 100}") for k in range(1000)]
    html = render_sheet(sheet(picks, pictures={row["path"]: photo for row in picks[:20]}))
    page = Reader(html)
    assert len(page.all("li", "card")) == 1000 and len(page.all("li", "bare")) == 980
    assert len(html) < 3_000_000 and "1,000 images to label next, of 347" in page.text and "10 sequences" in page.text


def test_more_than_the_page_can_hold_are_counted():
    page = read([whole(k + 1, f"{k}.jpg") for k in range(LISTED + 5)])
    assert len(page.all("li", "card")) == LISTED
    assert (
        "2,005 images to label next" in page.text
        and "The first 2,000 are shown here; selection.csv has all 2,005." in page.text
    )


def test_the_same_arguments_give_the_same_page_and_are_left_as_they_were():
    given = everything()
    before = repr(given)
    assert render_sheet(given) == render_sheet(everything()) and repr(given) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"balance": {"pool": [0.5, 0.5]}}, "balance: expected 3 shares in [0, 1] for 'pool', one a class. Received: 2 numbers, [0.5, 0.5]. Divide the areas by their sum."),
        ({"balance": {"picks": [10, 20, 30]}}, "balance: expected 3 shares in [0, 1] for 'picks', one a class. Received: 3 numbers, [10, 20, 30]. Divide the areas by their sum."),
        ({"balance": {"picked": [1, 0, 0]}}, "balance: expected keys among pool, labelled, picks, random, plain. Received: 'picked'."),
        ({"comparison": {"mine": {}}}, "comparison: expected keys among ours, random, plain. Received: 'mine'."),
        ({"comparison": {"ours": {"costs": 1.0}}}, "comparison: expected keys among score, distance, sequences, images, clicks. Received: 'costs'."),
        ({"picks": [whole(1, "a")], "pictures": {"a": b"GIF?"}}, "pictures: expected the bytes of a JPEG. Received: 4 other bytes for 'a'. Make it with outlined_jpeg."),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused(more, message):
    with pytest.raises(ValueError) as error:
        render_sheet(dataclasses.replace(sheet(), **more))
    assert str(error.value) == message


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_sheet_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    photo = outlined_jpeg(scene(90, 120))
    given = everything()
    picks = [
        row | {"sequence": f"drive {k % 2}", "class": "odd" if k % 2 else "even"} for k, row in enumerate(given.picks)
    ]
    picks += [part(13, "far away", 300, 200, 20, 20), whole(14, "gone", picture_url="nothing.jpg")]
    pictures = {**given.pictures, "far away": photo}
    (tmp_path / "selection.html").write_text(render_sheet(dataclasses.replace(given, picks=picks, pictures=pictures)), encoding="utf-8")  # fmt: skip
    troubles, asked = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])  # fmt: skip
        for width, scheme in ((1280, "light"), (390, "dark")):
            tab = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme).new_page()
            tab.on("pageerror", lambda error: troubles.append(str(error)))
            tab.on("dialog", lambda dialog: troubles.append("alert"))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto((tmp_path / "selection.html").as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert back == {"light": "rgb(247, 246, 243)", "dark": "rgb(16, 18, 22)"}[scheme]
        assert tab.locator(".card").count() == 14
        tab.locator(".card").last.scroll_into_view_if_needed()
        tab.wait_for_selector(".card.bare[data-path=gone]")
        assert tab.inner_text(".card[data-path=gone] .rank") == "14"
        tab.select_option("#order", "sequence")
        assert tab.locator(".group").all_inner_texts() == ["drive 06", "drive 18"]
        ranks = [int(text) for text in tab.locator(".card .rank").all_inner_texts()]
        assert ranks == [1, 3, 5, 7, 9, 11, 2, 4, 6, 8, 10, 12, 13, 14]
        tab.select_option("#class", "odd")
        assert [int(text) for text in tab.locator(".card .rank").all_inner_texts()] == [2, 4, 6, 8, 10, 12]
        assert tab.inner_text("#count") == "6 of 14 are shown."
        tab.select_option("#class", "")
        tab.fill("#search", "FAR")
        tab.locator(".card").nth(1).wait_for(state="detached")
        tab.focus(".card .shot")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#box svg")
        assert tab.get_attribute("#box svg", "viewBox") == "0 0 120 90", "all of the photo"
        assert tab.inner_text("#box-name").endswith("far away") and "score 0.500 · distance 0.250" in tab.inner_text(
            "#box-facts"
        )
        tab.keyboard.press("Escape")
        assert tab.evaluate("document.activeElement.className") == "shot"
        tab.fill("#search", "")
        tab.locator(".card").nth(5).wait_for()
        tab.locator(".card .shot").first.click()
        for _ in range(20):
            tab.keyboard.press("ArrowRight")
        assert tab.inner_text("#box-name").endswith("far away") and tab.is_disabled("#box-after")
        tab.click("#box-close")
        tab.wait_for_selector(".card[data-path='far away'] .shot:focus")
        browser.close()
    assert not troubles
    assert {url.rpartition("/")[2] for url in asked if not url.startswith("data:")} == {"selection.html", "nothing.jpg"}
