"""Drawings are whole, say their axes and counts, and do not clash on one page."""

import re
import xml.etree.ElementTree as ElementTree
from functools import cache

import numpy as np
import pytest

from seguncert import figures
from seguncert.detection import RIGHT, WRONG, Detection
from seguncert.figures import Diagram
from seguncert.scores import M, Reliability


def bins(*leading, seed=0, empty=0):
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 1000, (*leading, M))
    count[..., :empty] = 0
    return Reliability(count, rng.binomial(count, 0.5), count * rng.random((*leading, M)))


def detection(pixels=2000, wrong=0.2):
    rng = np.random.default_rng(0)
    found = Detection.empty()
    outcome = (rng.random(pixels) < wrong).astype(np.uint8)
    assert (RIGHT, WRONG) == (0, 1)
    found.update(np.clip(rng.random(pixels) * 0.7 + 0.3 * outcome, 0, 1).astype(np.float32), outcome)
    return found


def texts(svg):
    """What can be read; the drawing must be well-formed."""
    return [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def conditions(*, before=True, several=True):
    found = []
    for severity in range(6):
        each = {"ece": 0.02 + 0.1 * severity, "nll": None if severity == 5 else 0.3 * (1 + severity)}
        each |= {
            f"{key}_interval": [value - 0.01, value + 0.02] if value and several else [None, None]
            for key, value in list(each.items())
        }
        found.append(each | ({"before": dict(each)} if before else {}))
    return found


@cache
def drawings():
    rows = [("ece", "ECE", True), ("nll", "NLL (nat)", False)]
    curves = {"Confidence": detection().risk_coverage(), "Entropy": detection(wrong=0.4).risk_coverage()}
    shares = {name: detection().accuracy_uncertainty(np.geomspace(1e-4, 1, 41).tolist()) for name in curves}
    diagram = Diagram("All pixels: 12,345 pixels", bins(), bins(20), bins(seed=1))
    return {
        "reliability": (figures.reliability("r", [diagram] * 3, forecast="confidence", event="share that is right"), ["confidence", "share that is right", "pixels", "100 %", "before", "as said", "All pixels: 12,345 pixels"]),
        "classes": (figures.reliability("c", [diagram] * 11, forecast="probability", event="share", columns=6, small=True), ["probability", "share", "pixels"]),
        "risk": (figures.risk_coverage("risk", curves), ["coverage: share of pixels kept, the surest first", "risk: share of them that is wrong", "oracle", "Entropy"]),
        "sparse": (figures.sparsification("s", curves), ["share of pixels taken away, the most doubtful first", "error rate of the rest, relative to all pixels", "oracle", "at random"]),
        "certain": (figures.accuracy_uncertainty("a", shares), ["threshold of doubt, log axis", "share of pixels", "P(accurate | certain)", "P(uncertain | inaccurate)", "PAvPU"]),
        "confusion": (figures.confusion("m", np.array([[90, 10], [1, 1_999]]), ["sky", "road"]), ["shown class", "true class (pixels)", "sky (100)", "road (2 k)", "90", "share of the true class's pixels"]),
        "images": (figures.images("i", np.array([0.8, 0.9]), np.array([0.9, 0.9]), np.array([1.0, 1.0])), ["mean confidence of the image", "share of its pixels that is right", "calibrated", "before"]),
        "severity": (figures.severity("w", {"Fog": conditions(), "JPEG": conditions()}, rows, calibrated=True), ["Fog", "JPEG", "ECE", "NLL (nat)", "severity", "5", "20 %", "calibrated, with 95 % interval", "before calibration"]),
        "uncalibrated": (figures.severity("u", {"Fog": conditions(before=False, several=False)}, rows, calibrated=False), ["Fog", "not calibrated", "severity"]),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["reliability", "classes", "risk", "sparse", "certain", "confusion", "images", "severity", "uncalibrated"]
)
def test_axes_units_and_counts_are_text(name):
    svg, expected = drawings()[name]
    assert set(expected) <= set(texts(svg)) and svg.startswith('<svg role="img" aria-label="')
    assert not re.search(r"#16191f|#5a606b|#dedbd4|#fffffe", svg) and "var(--ink)" in svg


def test_the_same_numbers_give_the_same_drawing():
    one, other = (figures.risk_coverage("k", {"Confidence": detection().risk_coverage()}) for _ in range(2))
    assert one == other


def test_ids_do_not_clash_and_all_that_is_referred_to_is_there():
    page = "".join(svg for svg, _ in drawings().values())
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_names_of_classes_are_text_whatever_they_are():
    names = ["$x^2$", "<b>&amp;", "日本", "a_b"]
    svg = figures.confusion("m", np.eye(4, dtype=int), names)
    assert {*names} <= set(texts(svg)) and {"$x^2$ (1)", "日本 (1)"} <= set(texts(svg))


def test_intervals_are_quantiles_over_replicates_that_saw_the_bin():
    replicates = bins(200, empty=1)
    replicates.count[:150, 3] = replicates.hits[:150, 3] = 0
    low, high = figures.interval_of_shares(replicates)
    shares = replicates.hits[150:, 3] / replicates.count[150:, 3]
    assert (low[3], high[3]) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])))
    assert np.isnan([low[0], high[0]]).all() and (low[1:] <= high[1:]).all()


def test_nothing_to_draw_is_drawn():
    none = Reliability(np.zeros(M, int), np.zeros(M, int), np.zeros(M))
    figures.reliability("r", [Diagram("empty", none, bins(20))], forecast="a", event="b")
    right = {"Confidence": detection(wrong=0)}
    texts(figures.risk_coverage("k", {name: each.risk_coverage() for name, each in right.items()}))
    texts(figures.sparsification("s", {name: each.risk_coverage() for name, each in right.items()}))
    texts(figures.accuracy_uncertainty("a", {n: each.accuracy_uncertainty([0.1, 1.0]) for n, each in right.items()}))
    texts(figures.confusion("m", np.zeros((1, 1), int), ["only"]))
    texts(figures.images("i", np.array([1.0]), np.array([1.0])))


def test_many_classes_and_many_images_stay_small():
    rng = np.random.default_rng(0)
    assert len(figures.confusion("m", rng.integers(0, 99, (150, 150)), [f"class {c}" for c in range(150)])) < 400_000
    many = rng.random(10_001)
    svg = figures.images("i", many, many)
    assert "10001 images, every 6th drawn" in svg and len(svg) < 400_000
