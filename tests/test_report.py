import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from seguncert.render import doubt_ramp
from seguncert.report import render_report

MAPS = {
    "confidence": {
        "unit": "probability", "full_scale": 1.0, "sure_is": "high", "title": "Confidence", "about": "Of the class shown."
    },
    "entropy": {"unit": "nat", "full_scale": 1.0986, "sure_is": "low", "title": "Entropy", "about": "Spread."},
}  # fmt: skip
RUN = {
    "model": {
        "name": "street", "sha256": "ab" * 32, "classes": ["sky", "<road>", "Straße"],
        "colours": [[1, 2, 3], [128, 64, 128], [255, 255, 255]],
    },
    "maps": MAPS, "calibration": "none", "method": "none", "input": "photos", "version": "0.1.0",
}  # fmt: skip
HOSTILE = [
    "plain/a.jpg",
    "new\nline.jpg",
    "\"quotes' & <b>.jpg",
    "</script><script>alert(1)</script>.jpg",
    "<!--.jpg",
    "caf\udce9 not utf-8.jpg",
    "日本/été 100%?#.jpg",
    "scheme:x/c.jpg",
    "\u202egpj.exe",
    "{{ 7*7 }}.jpg",
    "back\\slash\u2028.jpg",
]


def done(path: str, confidence: float | None = 0.9, entropy: float | None = 0.1, note: str = "") -> dict:
    row = {"path": path, "status": "ok", "error": "", "note": note, "height": 360, "width": 480}
    return row | {"confidence_mean": confidence, "entropy_mean": entropy}


def failed(path: str, error: str) -> dict:
    row = {"path": path, "status": "failed", "error": error, "note": "", "height": None, "width": None}
    return row | {"confidence_mean": None, "entropy_mean": None}


def page(rows: list[dict], run: dict = RUN, histograms: dict | None = None, thumbnails: dict | None = None) -> str:
    return render_report(run, rows, histograms or {name: [1] * 64 for name in MAPS}, thumbnails or {})


class Reader(HTMLParser):
    """What a browser would make of the page: elements, the text outside scripts, and what scripts hold."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.text, self.scripts, self.inside = [], "", [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def test_no_path_can_break_out_of_the_page():
    html = page([done(path) for path in HOSTILE] + [failed(path, f"cannot read {path}") for path in HOSTILE])
    read = Reader(html)
    html.encode("utf-8")
    assert len(read.scripts) == 2 and "alert" not in read.scripts[1]
    assert sorted(read.data["path"]) == sorted(HOSTILE)
    assert not {"<", ">", "&"} & set(read.scripts[0])
    assert "</script><script>alert(1)</script>.jpg" in read.text and "new\\nline.jpg" in read.text
    assert "caf\ufffd not utf-8.jpg" in read.text and "\\u202egpj.exe" in read.text and "{{ 7*7 }}" in read.text
    assert "<road>" in read.text


def test_every_link_leads_back_to_the_very_bytes_of_the_path():
    data = Reader(page([done(path) for path in HOSTILE])).data
    for i, path in enumerate(data["path"]):
        url = data["url"].get(str(i), path)
        assert re.fullmatch(r"[A-Za-z0-9_.~/%-]+", url)
        assert unquote_to_bytes(url) == os.fsencode(path)
    assert "plain/a.jpg" not in data["url"].values()


def test_nothing_is_asked_of_another_place():
    html = page([done(path) for path in HOSTILE], thumbnails={"plain/a.jpg": b"\xff\xd8thumb"})
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    for tag, attrs in Reader(html).elements:
        assert tag not in ("link", "iframe", "object", "embed", "base") and not {"src", "srcset"} & set(attrs)
    assert "default-src 'none'" in html


def test_the_most_uncertain_come_first_by_the_first_map():
    rows = [
        done("sure", 0.99, 0.01),
        done("tie b", 0.5),
        done("tie a", 0.5),
        done("none", None),
        done("nan", float("nan")),
    ]
    assert Reader(page(rows)).data["path"] == ["tie a", "tie b", "sure", "nan", "none"]
    by_entropy = RUN | {"maps": {"entropy": MAPS["entropy"]}}
    rows = [done("sure", 0.1, 0.01), done("doubtful", 0.9, 0.7)]
    assert Reader(page(rows, by_entropy)).data["path"] == ["doubtful", "sure"]


def test_columns_hold_the_numbers():
    thumb = b"\xff\xd8\xff jpeg"
    rows = [done("b", 0.123456, 0.7), done("a", 0.9, None, note="alpha channel left out")]
    data = Reader(page(rows, RUN | {"format": "npy"}, thumbnails={"a": thumb, "not here": b""})).data
    assert data["mean"] == {"confidence": [0.1235, 0.9], "entropy": [0.7, None]}
    assert data["height"] == [360, 360] and data["width"] == [480, 480]
    assert data["note"] == {"1": "alpha channel left out"} and data["suffix"] == ".npy"
    assert {key: base64.b64decode(value) for key, value in data["thumbnail"].items()} == {"1": thumb}
    assert [entry["sure_is"] for entry in data["maps"]] == ["high", "low"]


def test_the_page_says_what_it_is_without_a_script():
    rows = [done("a", 0.8), done("b", 0.6), failed("cut.jpg", "the file ends early")]
    text = " ".join(Reader(page(rows)).text.split())
    for part in (
        "Where can this segmentation be trusted?", "Model street · 2 images done · 1 failed · mean confidence 0.700",
        "Not calibrated: these numbers are the network's own softmax and are usually too sure.",
        "1 image could not be analysed", "cut.jpg", "the file ends early", "log scale", "1 = 1.1 nat", "64 pixels in all",
    ):  # fmt: skip
        assert part in text
    calibrated = Reader(page(rows, RUN | {"calibration": "temperature 1.31"})).text
    assert "Calibrated: temperature 1.31." in calibrated and "Not calibrated" not in calibrated


def test_the_page_says_what_sets_promise():
    info = {
        "unit": "further classes",
        "full_scale": 2.0,
        "sure_is": "low",
        "title": "Set size",
        "about": "Besides one.",
    }
    sets = {"sets": {"promise": "At least 0.9 of <most>; no more."}}
    rows = [done("a") | {"set_size_mean": 0.25}]
    both = Reader(page(rows, RUN | sets | {"maps": MAPS | {"set_size": info}}, {name: [1] * 64 for name in (*MAPS, "set_size")})).text  # fmt: skip
    assert "Set size: At least 0.9 of <most>; no more." in both and "1 = 2 further classes" in both
    assert "Not calibrated" in both, "which the other maps are"
    alone = Reader(page(rows, RUN | sets | {"maps": {"set_size": info}}, {"set_size": [1] * 64})).text
    assert "Set size: At least 0.9" in alone and "too sure" not in alone


def test_histograms_draw_shares_on_an_absolute_scale():
    counts = [0] * 64
    counts[0], counts[63] = 100, 9900
    read = Reader(page([done("a")], histograms={"confidence": counts, "entropy": [0] * 64}))
    bars = [attrs for tag, attrs in read.elements if tag == "rect"]
    heights = [float(bar["height"]) for bar in bars]
    assert len(bars) == 2 and heights[0] == pytest.approx(140 / 2) and heights[1] == pytest.approx(140, abs=0.5)
    assert bars[0]["fill"] != bars[1]["fill"]
    assert "1 % of the pixels are in the doubtful half, below 0.5. 10,000 pixels in all." in read.text
    assert "No pixels." in read.text


def test_many_failures_are_folded_and_cut():
    few, many = (page([failed(f"{i}.jpg", "empty file") for i in range(n)]) for n in (8, 700))
    assert '<details class="failed" open>' in few and "None was analysed." in few
    assert '<details class="failed">' in many and many.count("empty file") == 500
    assert "700 images could not be analysed" in many and "images.csv has them all" in many


def test_the_same_arguments_give_the_same_page_and_are_left_as_they_were():
    rows = [done(path, i / 20) for i, path in enumerate(HOSTILE)]
    before = json.dumps(rows)
    assert page(rows) == page(rows) == page(list(reversed(rows)))
    assert json.dumps(rows) == before


def test_a_hundred_thousand_images():
    n = 100_000
    rows = [done(f"part {i // 1000:03d}/frame_{i:06d}.jpg", (i * 7919 % n) / n, 0.25) for i in range(n)]
    html = page(rows, thumbnails={row["path"]: bytes(10_000) for row in rows[:200]})
    assert len(html) < 25e6
    data = Reader(html).data
    assert len(data["path"]) == n == len(set(data["path"])) and len(data["thumbnail"]) == 200
    assert data["mean"]["confidence"] == sorted(data["mean"]["confidence"])


def test_the_gallery_itself(tmp_path: Path):
    """The script of the page, in a browser where there is one."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = Path("/usr/bin/chromium")
    if not browser_path.exists():
        pytest.skip("no chromium")
    rows = [done(f"{path}{i}", i / 200, 1 - i / 200) for i, path in enumerate(HOSTILE * 10)]
    rows.append(done("odd one out", 0.999, 0.5))
    (tmp_path / "report.html").write_text(page(rows), encoding="utf-8")
    troubles = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=str(browser_path), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("dialog", lambda dialog: troubles.append("alert"))
        tab.goto((tmp_path / "report.html").as_uri())
        assert tab.locator(".card").count() == 60
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.locator(".card").first.get_attribute("title") == "plain/a.jpg0"
        tab.select_option("#by", "entropy")
        tab.select_option("#order", "sure")
        assert tab.evaluate("data.mean.entropy[shown[0]] <= data.mean.entropy[shown[1]]")
        tab.click("#after")
        assert tab.locator(".card").count() == 51
        tab.fill("#search", "ODD one")
        tab.locator(".card").nth(1).wait_for(state="detached")
        tab.click(".card")
        tab.wait_for_selector("#box-missing:visible")
        assert tab.inner_text("#box-name") == "odd one out"
        assert tab.locator("#box-links a").nth(2).get_attribute("href") == "odd%20one%20out/confidence.png"
        tab.keyboard.press("Escape")
        assert tab.evaluate("document.activeElement.title") == "odd one out"
        browser.close()
    assert not troubles


def test_maps_whose_colours_end_early_say_so_and_are_coloured_alike():
    disagreement = {
        "unit": "nat", "full_scale": 2.4, "sure_is": "low", "title": "Mutual information", "about": "Of samples.", "drawn_to": 0.1,
    }  # fmt: skip
    counts = [90, 0, 0, 0, 0, 0, 0, 6, 0, 0, 4] + [0] * 53
    run = RUN | {"maps": {"mutual_information": disagreement}, "method": "mc-dropout", "samples": 20}
    html = page([], run, {"mutual_information": counts})
    assert "pooled from many predictions (mc-dropout, 20 samples)" in html and "and end at 0.1 of full scale" in html
    assert "10 % are above 0.109, where the colours of the overlays end. 100 pixels in all." in html
    doubtful = "#{:02x}{:02x}{:02x}".format(*tuple(doubt_ramp("low")[255][:3]))
    assert html.count(f'fill="{doubtful}"') == 2
