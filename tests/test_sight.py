"""What the page says of one photo, held against the arrays of `analyse`."""

import base64
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

import seguncert
from seguncert.apps import sight as sight_
from seguncert.apps.sight import Sight, settings, with_sets
from seguncert.conformal import Aim, ConformalSets
from seguncert.render import overlay_doubt


@pytest.fixture(scope="module")
def street():
    return seguncert.load_model("street")


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (96, 72), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module", params=["none", "mc-dropout"])
def sight(request, street, photo):
    sampled = request.param != "none"
    maps = [
        "confidence",
        "entropy",
        "margin",
        *(["mutual_information", "variance", "expected_entropy"] if sampled else []),
    ]
    drawn = {"samples": 4} if sampled else {}
    return Sight("photo", seguncert.analyse(street, photo, method=request.param, maps=maps, **drawn), 0.1)


def numbers(url):
    coded = decoded(url).astype(int)
    return coded[..., 2] * 256 + coded[..., 1]  # red and green


def decoded(url, flags=cv2.IMREAD_UNCHANGED):
    return cv2.imdecode(np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8), flags)


def test_a_pixel_is_that_of_the_arrays(sight):
    result = sight.result
    for x, y in [(0, 0), (95, 71), (40, 33)]:
        told = sight.pixel(x, y)
        p = {each["index"]: each["probability"] for each in told["classes"]}
        assert np.abs([p[c] - result.probabilities[c, y, x] for c in range(11)]).max() < 1e-6
        assert told["label"] == result.labels[y, x] == told["classes"][0]["index"]
        assert told["maps"] == {name: pytest.approx(map_HW[y, x]) for name, map_HW in result.maps.items()}
        if result.moments is not None:
            raw = result.moments.mean_CHW[:, y, x].numpy()
            spread = {each["index"]: each["spread"] for each in told["classes"]}
            variance = result.moments.squares_CHW[:, y, x].numpy() / result.moments.n
            assert np.allclose([spread[c] for c in range(11)], np.sqrt(variance), atol=1e-6)
        else:
            assert "spread" not in told["classes"][0]
            raw = seguncert.analyse(seguncert.load_model("street"), result.rgb, calibration="none").probabilities[
                :, y, x
            ]
        assert np.allclose(
            [each["raw"] for each in told["classes"]], raw[[each["index"] for each in told["classes"]]], atol=1e-5
        )


@pytest.mark.parametrize("place", [(-1, 0), (96, 0), (0, 72)])
def test_outside_there_is_no_pixel(sight, place):
    with pytest.raises(ValueError, match="expected x in 0 to 95, y in 0 to 71. Received"):
        sight.pixel(*place)


def test_what_the_browser_gets_is_what_there_is(sight):
    payload, result = sight.payload(), sight.result
    assert (numbers(payload["labels"]) == result.labels).all()
    for each in payload["maps"]:
        levels = decoded(each["picture"]).astype(float) / 255
        cut = each["highest"] / {"nat": np.log(11), "probability²": 1 - 1 / 11}.get(each["unit"], 1)
        assert np.abs(levels - np.minimum(result.maps[each["name"]] / cut, 1)).max() <= 0.5 / 255 + 1e-6
    sure = result.maps["confidence"]
    assert payload["below"] == pytest.approx([(sure < k / 100).mean() for k in range(101)], abs=1e-6)
    areas = {each["index"]: each for each in payload["classes"]}
    for c in np.unique(result.labels):
        assert areas[c]["area"] == pytest.approx((result.labels == c).mean())
        assert areas[c]["confidence"] == pytest.approx(sure[result.labels == c].mean(), rel=1e-5)
    assert [each["area"] for each in payload["classes"]] == sorted(
        (each["area"] for each in payload["classes"]), reverse=True
    )


def test_the_tables_of_colours_are_those_of_the_overlay(sight):
    """What viewer.js does with them, in numpy, is `overlay_doubt` but for rounding."""
    result = sight.result
    each = next(each for each in sight.payload()["maps"] if each["name"] == "confidence")
    table = np.array(each["table"], float).reshape(256, 5)[decoded(each["picture"])]
    grey = cv2.cvtColor(result.rgb, cv2.COLOR_RGB2GRAY).astype(float)
    drawn = table[..., :1] / 255 * result.rgb + (table[..., 1] / 255 * grey)[..., None] + table[..., 2:]
    assert np.abs(drawn - overlay_doubt(result.rgb, result.maps["confidence"], "high").astype(float)).max() <= 2


def test_regions_hang_together_and_come_by_trust(sight):
    numbers, listed = sight.regions
    labels, sure = sight.result.labels, sight.result.maps["confidence"]
    assert [each["confidence"] for each in listed] == sorted(each["confidence"] for each in listed) and listed
    for k, each in enumerate(listed, 1):
        mask = numbers == k
        assert (labels[mask] == each["class"]).all() and mask.sum() == each["pixels"]
        assert cv2.connectedComponents(mask.astype(np.uint8))[0] == 2
        around = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) & ~mask
        assert (labels[around] != each["class"]).all()
        assert each["confidence"] == pytest.approx(sure[mask].mean(), rel=1e-4)
        ys, xs = np.nonzero(mask)
        assert each["box"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
    assert sum(each["pixels"] for each in listed) == (numbers > 0).sum()


def test_large_photos_are_shown_smaller_and_read_in_full(street, photo, monkeypatch):
    monkeypatch.setattr(sight_, "SHOWN", 48)
    sight = Sight("photo", seguncert.analyse(street, photo), 0.1)
    payload = sight.payload()
    assert payload["shown"] == [48, 36] and (payload["width"], payload["height"]) == (96, 72)
    assert decoded(payload["maps"][0]["picture"]).shape == (36, 48) and decoded(payload["photo"]).shape == (36, 48, 3)
    assert sight.pixel(95, 71)["label"] == sight.result.labels[71, 95]
    assert sum(each["share"] for each in sight.regions[1]) <= 1
    assert sum(each["pixels"] for each in sight.regions[1]) == pytest.approx(4 * (sight.regions[0] > 0).sum(), rel=0.01)


def test_the_sentence_tells_whose_doubt_it_is(street, photo):
    result = seguncert.analyse(street, photo, method="mc-dropout", samples=4, maps=["confidence"], calibration="none")
    moments = result.moments
    for share, words in [(0.8, "model uncertainty dominates"), (0.1, "the doubt is in the picture"), (0.35, "in part")]:
        moments.mean_CHW[:, 0, 0] = 1 / 11
        moments.entropy_HW[0, 0] = np.log(11) * (1 - share)
        assert words in Sight("photo", result, 0.0).pixel(0, 0)["sentence"]
    moments.mean_CHW[:, 0, 0], moments.mean_CHW[3, 0, 0] = 0, 1
    moments.entropy_HW[0, 0] = 0
    told = Sight("photo", result, 0.0).pixel(0, 0)["sentence"]
    assert "The samples agree." in told and told.startswith("Not calibrated: ")


def test_more_classes_than_a_byte_holds(photo):
    labels = np.full((72, 96), 290)
    labels[:10] = 34
    maps = {name: np.full((72, 96), 0.5, np.float32) for name in ("confidence", "entropy")}
    names = tuple(f"c{k}" for k in range(300))
    colours = np.zeros((300, 3), np.uint8)
    sight = Sight("photo", seguncert.Result(photo, labels, maps, names, colours, torch.zeros(300, 72, 96)), 0.1)
    assert (numbers(sight.payload()["labels"]) == labels).all()
    assert {each["class"] for each in sight.regions[1]} == {34, 290}


def test_a_photo_counts_what_it_holds(sight):
    result, pixels = sight.result, 72 * 96
    held = pixels * (3 + 8 + 2 + 4 * len(result.maps) + 4 * len(result.errors)) + 4 * result.logits.numel()
    assert sight.bytes == held + (4 * 23 * pixels if result.moments is not None else 0)


def test_sets_of_classes_are_a_map_and_a_list(street, photo):
    result = seguncert.analyse(street, photo, conformal="none")
    assert with_sets(result) is result
    sets = ConformalSets(Aim(11), 0.1, (4.0,), (50,))  # lac: classes of at least 1 in 5
    sight = Sight("photo", with_sets(replace(result, conformal=sets)), 0.1)
    inside = (result.probabilities >= 0.2) | (np.arange(11)[:, None, None] == result.labels)
    assert np.allclose(sight.result.maps["set_size"], (inside.sum(0) - 1) / 10, atol=1e-6) and inside.sum(0).max() > 1
    y, x = np.argwhere(inside.sum(0) > 1)[0].tolist()
    assert sight.pixel(x, y)["set"] == [
        name for name, held in zip(result.classes, inside[:, y, x], strict=True) if held
    ]
    told = next(each for each in sight.payload()["maps"] if each["name"] == "set_size")
    assert told["highest"] == 10 and "10 %" in told["note"]


def test_settings_of_the_page():
    assert settings("none", None, True) == {"method": "none", "calibration": "auto"}
    assert settings("mc-dropout", 7, False) == {"method": "mc-dropout", "calibration": "none", "samples": 7}
    for wrong in (1, 101, 10**9, "20", None):
        with pytest.raises(ValueError, match="samples: expected 2 to 100. Received"):
            settings("mc-dropout+tta", wrong, True)
