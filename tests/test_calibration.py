"""What calibrators do to logits, against plain formulas in float64; and their files."""

import json
import resource
import signal

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax
from test_bilateral import bilateral_loops

from seguncert.calibration import Calibration, CalibrationError, find_calibration, load_calibration
from seguncert.calibrators import (
    HAIR,
    Curve,
    Neighbourhood,
    Remap,
    Scaling,
    Vector,
    calibrated_rows,
)
from seguncert.maps import describe
from seguncert.predict import rows_at_size
from seguncert.store import StoreError
from seguncert.surroundings import LEAST_DOUBT, around, pixel_features, surroundings

CLASSES = {2: ["a", "b"], 3: ["a", "b", "c"]}
CURVES = (
    Curve("doubt", -12.0, -0.5, (-6.0, -3.0), (0.1, -0.3, 0.2)),
    Curve("gap", 0.5, 9.0, (2.0,), (0.3, -0.4)),
    Curve("picture", -4.0, -0.5, (), (0.7,)),
    Curve("entropy 31", -6.0, -0.1, (-2.0,), (0.2, 0.1)),
    Curve("agreement 41", 0.1, 0.9, (0.5,), (-0.5, 1.0)),
)


def calibrators(C):
    local = Scaling("local", -0.3, (), CURVES, (30, 40))
    return {
        "temperature": Scaling("temperature", -0.4),
        "sharp": Scaling("temperature", 2.5),
        "class-conditional": Scaling("class-conditional", 0.2, tuple(0.5 - 0.3 * c for c in range(C))),
        "local": local,
        "neighbourhood": Neighbourhood(((0.3, 0.2), (0.9, -0.1)), -2.0, -4.0, -0.5, (30, 40), 9.0, 20.0),
        "only what is around": Neighbourhood(((0.0, 0.0), (2.0, 0.0)), -2.0, -4.0, -0.5, (30, 40)),
        "vector": Vector(tuple(0.5 + 0.2 * c for c in range(C)), tuple(0.3 - 0.2 * c for c in range(C))),
        "histogram": Remap("histogram", (0.0, 0.7, 0.7000001, 1.0), (0.2, 0.2, 0.9, 0.9)),
        "isotonic": Remap("isotonic", (0.4, 0.6, 0.99), (0.01, 0.5, 0.97)),
    }


KEEPING = [name for name, each in calibrators(2).items() if each.keeps_labels]


def logits_of(C, h, w, spread=3.0, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, spread, (C, h, w)).astype(np.float32))


def photo_of(H, W):
    """A sheet of colours that change slowly, but for a step in the middle."""
    rows, columns = np.linspace(0, 1, H)[:, None, None], np.linspace(0, 1, W)[None, :, None]
    shades = 90 + 60 * np.sin([3.0, 5.0, 7.0] * rows + [4.0, 2.0, 6.0] * columns) + 90 * (columns > 0.5)
    return shades.round().astype(np.uint8)


def whole(calibrator, logits, H, W):
    return torch.cat([band for _, band in calibrated_rows(calibrator, logits, photo_of(H, W))], 1)


def shown_before_and_after(calibrator, logits, H, W):
    before, after = (describe(whole(each, logits, H, W), ["confidence"])[0] for each in (None, calibrator))
    return before, after


# What is shown


@pytest.mark.parametrize("C", [2, 3, 11])
@pytest.mark.parametrize("kind", KEEPING)
def test_the_shown_class_stays(kind, C):
    for spread in (1e-3, 1.0, 30.0):
        logits = logits_of(C, 24, 32, spread)
        for H, W in ((24, 32), (61, 70), (9, 11)):
            before, after = shown_before_and_after(calibrators(C)[kind], logits, H, W)
            assert torch.equal(before, after), (spread, H)


@pytest.mark.parametrize("kind", KEEPING)
def test_the_shown_class_stays_where_classes_tie(kind):
    logits = torch.randint(0, 2, (3, 24, 32), generator=torch.Generator().manual_seed(0)).float()
    two_first = logits.topk(2, 0).values
    assert (two_first[0] == two_first[1]).float().mean() > 0.5
    before, after = shown_before_and_after(calibrators(3)[kind], logits, 24, 32)
    assert torch.equal(before, after) and before.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", KEEPING)
def test_the_shown_class_stays_by_the_last_bit(kind):
    low = 1 + logits_of(1, 24, 32, 0.1).abs()
    high = torch.nextafter(low, torch.tensor(9.0))
    swapped = torch.rand(1, 24, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    logits = torch.cat([torch.where(swapped, high, low), torch.where(swapped, low, high), low - 1])
    before, after = shown_before_and_after(calibrators(3)[kind], logits, 24, 32)
    assert torch.equal(before, after) and before.unique().tolist() == [0, 1]


@pytest.mark.parametrize("kind", KEEPING)
@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_huge_logits(kind, size):
    logits = size * logits_of(3, 16, 16, 0.2).clamp(-1, 1)
    found = whole(calibrators(3)[kind], logits, 16, 16)
    probs = found.double().softmax(0)
    assert torch.isfinite(probs).all() and torch.equal(found.argmax(0), logits.argmax(0))


@pytest.mark.parametrize("C", [2, 3])
@pytest.mark.parametrize("kind", list(calibrators(2)))
def test_a_class_that_no_sample_gave_anything(kind, C):
    logits = logits_of(C, 16, 16).log_softmax(0)
    logits[0, :, :5] = -torch.inf
    calibrator = calibrators(C)[kind]
    found = whole(calibrator, logits, 16, 16)
    probs = found.double().softmax(0)
    assert torch.isfinite(probs).all()
    if calibrator.keeps_labels:
        assert torch.equal(found.argmax(0), logits.argmax(0))


def test_the_logits_that_are_calibrated_are_those_that_are_shown_without():
    """Bands that are made one by one and planes that are resized whole differ by bits, which decide between near ties."""
    logits = torch.cat([logits_of(1, 60, 80).repeat(2, 1, 1), logits_of(1, 60, 80) - 9])
    logits[1] += 1e-6
    H, W = 1200, 1810  # three classes are resized whole; with what is seen of the surroundings there would be too many
    assert 3 * H * W < 1 << 24 < 9 * H * W
    one, other = (
        torch.cat([band for _, band in rows_at_size(logits, H, W, whole=size)], 1).argmax(0) for size in (0, 1 << 24)
    )
    assert (one != other).any()
    before, after = shown_before_and_after(calibrators(3)["neighbourhood"], logits, H, W)
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", list(calibrators(2)))
def test_rows_in_bands_equal_the_whole(kind):
    logits, calibrator = logits_of(3, 300, 400), calibrators(3)[kind]
    seen = calibrator.look(logits, photo_of(500, 700))
    at_size = [each if each is None else torch.cat([band for _, band in rows_at_size(each, 500, 700)], 1) for each in (logits, seen)]  # fmt: skip
    bands = list(calibrated_rows(calibrator, logits, photo_of(500, 700)))
    assert len(bands) > 3 and bands[-1][0].stop == 500
    torch.testing.assert_close(torch.cat([band for _, band in bands], 1), calibrator(*at_size), rtol=1e-6, atol=1e-6)


def test_no_calibrator_gives_the_logits_themselves():
    logits = logits_of(3, 20, 30)
    assert torch.equal(whole(None, logits, 20, 30), logits)


def test_a_shift_of_all_logits_changes_nothing():
    logits = logits_of(3, 24, 32)
    for kind, calibrator in calibrators(3).items():
        here, there = (whole(calibrator, logits + shift, 24, 32).softmax(0) for shift in (0, 64))
        torch.testing.assert_close(here, there, rtol=0, atol=2e-4, msg=kind)


@pytest.mark.parametrize("kind", KEEPING)
def test_what_is_not_finite_is_no_probability(kind):
    logits = logits_of(3, 8, 8)
    logits[1, 2, 3] = torch.nan
    try:
        found = whole(calibrators(3)[kind], logits, 8, 8)
    except ValueError as error:
        assert "NaN" in str(error)
    else:
        assert found[:, 2, 3].isnan().any()


# Formulas


def curve(each, value):
    """The curve by interpolation between its corners."""
    places = [each.low, *each.knots, each.high]
    heights, slope = [0.0], 0.0
    for k, part in enumerate(each.slopes):
        slope += part
        heights.append(heights[-1] + slope * (places[k + 1] - places[k]))
    return np.interp(value, places, heights)


def beta(scaling, logits_CN, seen):
    """In float64; `seen` by the feature's name."""
    label = logits_CN.argmax(0)
    total = np.full(len(label), scaling.constant)
    if scaling.of_class:
        total += np.array(scaling.of_class)[label]
    return np.exp(total + sum(curve(each, seen[each.feature]) for each in scaling.curves))


def seen_of(calibrator, logits):
    """Features of each pixel of a picture by name, and ln of what is around it (C, N)."""
    C = len(logits)
    z = np.sort(logits.double().numpy().reshape(C, -1), 0)
    others = np.exp(z[:-1] - z[-1]).sum(0)
    seen = {
        "doubt": np.log(np.maximum(others / (1 + others), LEAST_DOUBT)),
        "gap": np.minimum(z[-1] - z[-2], 15),
    }
    looked = calibrator.look(logits, photo_of(*logits.shape[1:]))
    if looked is not None:
        looked = torch.cat([band for _, band in rows_at_size(looked, *logits.shape[1:])], 1).flatten(1).double().numpy()
        seen |= dict(zip(calibrator.looks, looked, strict=False))
        looked = looked[len(calibrator.looks) :]
    return seen, looked


@pytest.mark.parametrize("kind", ["temperature", "class-conditional", "local"])
def test_scalings_by_their_formula(kind):
    logits, scaling = logits_of(3, 24, 32), calibrators(3)[kind]
    z = logits.double().numpy().reshape(3, -1)
    expected = log_softmax(beta(scaling, z, seen_of(scaling, logits)[0]) * z, 0)
    found = whole(scaling, logits, 24, 32).log_softmax(0).flatten(1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-5)


def test_neighbourhood_by_its_formula():
    logits, calibrator = logits_of(3, 24, 32, 1.5), calibrators(3)["neighbourhood"]
    z = logits.double().numpy().reshape(3, -1)
    seen, around_CN = seen_of(calibrator, logits)
    off = np.clip(seen["picture"], calibrator.low, calibrator.high) - calibrator.middle
    s = sum(
        (a + b * off) * part for (a, b), part in zip(calibrator.weights, [log_softmax(z, 0), around_CN], strict=True)
    )
    s -= s.max(0)
    overtaken = s.argmax(0) != z.argmax(0)
    assert 0.05 < overtaken.mean() < 0.95
    expected = np.minimum(s, -HAIR)
    np.put_along_axis(expected, z.argmax(0)[None], 0, 0)
    found = whole(calibrator, logits, 24, 32).flatten(1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    second = np.sort(found, 0)[-2]
    np.testing.assert_allclose(second[overtaken], -HAIR, rtol=1e-5), "no more is taken than the hair"


def test_vector_by_its_formula():
    logits, vector = logits_of(3, 24, 32), calibrators(3)["vector"]
    z = logits.double().numpy()
    expected = softmax(
        np.array(vector.factors)[:, None, None] * (z - z.max(0)) + np.array(vector.biases)[:, None, None], 0
    )
    found = whole(vector, logits, 24, 32)
    np.testing.assert_allclose(found.softmax(0), expected, atol=1e-6)
    assert (found.argmax(0) != logits.argmax(0)).any() and not vector.keeps_labels


@pytest.mark.parametrize("kind", ["histogram", "isotonic"])
def test_remaps_by_their_formula(kind):
    logits, remap = logits_of(4, 24, 32, 2.0), calibrators(4)[kind]
    p = softmax(logits.double().numpy().reshape(4, -1), 0)
    top, label = p.max(0), p.argmax(0)
    others = np.where(np.arange(4)[:, None] == label, 0, p)
    others /= others.sum(0)
    value = np.interp(top, remap.confidences, remap.values)
    share = others.max(0)
    value = np.maximum(value, share / (1 + share))  # of a share s of 1 − v as much as v is left at v = s / (1 + s)
    expected = np.where(np.arange(4)[:, None] == label, value, (1 - value) * others)
    found = whole(remap, logits, 24, 32).exp().flatten(1)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)


@pytest.mark.parametrize("gap", [20.0, 90.0, 200.0, 1e6])
def test_a_confidence_of_1_is_mapped_as_any_other(gap):
    logits = torch.tensor([0.0, -gap, -gap - 1]).view(3, 1, 1)
    probs = Remap("isotonic", (0.5, 1.0), (0.5, 0.9))(logits, None).softmax(0).flatten()
    assert float(probs[0]) == pytest.approx(0.9, abs=1e-6)
    assert float(probs[1] / probs[2]) == pytest.approx(np.e, rel=1e-5)


def test_curves_are_constant_beyond_what_was_seen():
    for each in CURVES:
        value = torch.linspace(each.low - 5, each.high + 5, 300)
        np.testing.assert_allclose(each(value), curve(each, value.double().numpy()), atol=1e-5)
    scaling = Scaling("local", 0.0, (), (Curve("gap", 0.0, 4.0, (), (0.5,)),))
    gaps = torch.tensor([4.0, 6.0, 14.0, 90.0])
    found = scaling(torch.stack([gaps, 0 * gaps])[:, None], None)[1, 0] / -gaps
    torch.testing.assert_close(found, torch.full((4,), float(np.exp(2))))


def test_doubt_where_the_net_is_surest():
    """1 − p̂ by rounding 1 / sum would be in steps of 6e-8."""
    gaps = torch.linspace(5, 13, 200)
    logits = torch.stack([gaps, 0 * gaps, -1 + 0 * gaps])
    z = logits.double().numpy()
    doubt, gap = pixel_features(logits).numpy()
    np.testing.assert_allclose(doubt, logsumexp(z[1:], 0) - logsumexp(z, 0), rtol=1e-5)
    np.testing.assert_allclose(gap, gaps, rtol=1e-6)
    assert pixel_features(torch.tensor([[500.0], [0.0], [0.0]])).flatten().tolist() == pytest.approx([np.log(LEAST_DOUBT), 15])  # fmt: skip


def window_means(values_hw, reach):
    """Of squares, the picture mirrored at its borders, by a plain loop."""
    h, w = values_hw.shape
    mirrored = np.pad(values_hw, reach, mode="symmetric")
    side = 2 * reach + 1
    return np.array([[mirrored[y : y + side, x : x + side].mean() for x in range(w)] for y in range(h)])


def test_surroundings_by_plain_loops():
    logits = logits_of(3, 48, 64)
    z = logits.double().numpy()[:, 2::4, 2::4]  # every fourth pixel of every fourth row
    p, label = softmax(z, 0), z.argmax(0)
    entropy = -(p * np.log(p)).sum(0) / np.log(3)
    shown = np.array([label == c for c in range(3)], float)
    expected = [
        np.full(label.shape, np.log((1 - p.max(0)).mean())),
        np.log(window_means(entropy, 3) + 1e-3),
        (shown * [window_means(each, 5) for each in shown]).sum(0),
    ]
    found = surroundings(logits, ["picture", "entropy 31", "agreement 41"], (48, 64))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def cie_lab(rgb):
    """Of sRGB from 0 to 1, with the white of D65 (IEC 61966-2-1, CIE 15)."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ np.array([[0.412453, 0.212671, 0.019334], [0.357580, 0.715160, 0.119193], [0.180423, 0.072169, 0.950227]])  # fmt: skip
    share = xyz / [0.950456, 1.0, 1.088754]
    f = np.where(share > 216 / 24389, np.cbrt(share), (24389 / 27 * share + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def test_what_is_around_by_plain_loops():
    """Every second pixel of the logits, colours averaged over as much, and weights of place and colour."""
    logits, photo = logits_of(3, 48, 64), photo_of(96, 128)
    p = softmax(logits.double().numpy()[:, 1::2, 1::2], 0)
    colours = photo.reshape(24, 4, 32, 4, 3).mean((1, 3)).round() / 255
    expected = bilateral_loops(p, cie_lab(colours), 10 / 2, 8.0)
    found = around(logits, photo, (48, 64), 10.0, 8.0).exp() - 1e-5
    off = np.abs(found.numpy() - expected)
    assert off.max() < 0.01 and off.mean() < 0.002  # OpenCV's CIE-Lab is a table, off by up to 0.5
    for place, colour in ((5.0, 16.0), (6.0, 8.0)):
        assert np.abs(bilateral_loops(p, cie_lab(colours), place, colour) - expected).mean() > 0.005


def test_windows_grow_with_the_picture():
    """What is seen of a picture twice as large is what is seen of the small one."""
    small = torch.nn.functional.interpolate(logits_of(3, 6, 8)[None], size=(48, 64), mode="bilinear")[0]
    large = torch.nn.functional.interpolate(small[None], size=(96, 128), mode="bilinear")[0]
    names = ["picture", "entropy 31", "agreement 41"]
    one, two = (surroundings(each, names, (48, 64)) for each in (small, large))
    assert one.shape == two.shape and float((one - two).abs().mean()) < 0.02 < float(one.std())
    one, two = (around(each, photo_of(*each.shape[1:]), (48, 64)).exp() for each in (small, large))
    assert one.shape == two.shape and float((one - two).abs().mean()) < 0.02 < float(one.std())


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 7), (5, 200)])
def test_pictures_smaller_than_a_window(size):
    logits = logits_of(3, *size)
    for kind, calibrator in calibrators(3).items():
        found = whole(calibrator, logits, *size)
        assert found.shape == logits.shape and torch.isfinite(found.exp()).all(), kind


# A picture that is like none before


def test_a_picture_is_unfamiliar_where_its_doubt_was_not_seen():
    logits = logits_of(3, 48, 64)
    value = float(surroundings(logits, ["picture"], (24, 32))[0, 0, 0])
    for low, high, familiar in ((value, value, True), (value - 1, value - 0.01, False), (value + 0.01, 0.0, False)):
        local = Scaling("local", 0.0, (), (Curve("picture", low, high, (), (0.1,)),), (24, 32))
        for calibrator in (local, Neighbourhood(((1.0, 0.0),) * 2, low, low, high, (24, 32))):
            text = calibrator.unfamiliar(logits)
            assert (text == "") == familiar
            if not familiar:
                assert text == (
                    f"unfamiliar to the calibration: mean doubt {np.exp(value):.3f}, it has seen {np.exp(low):.3f} to {np.exp(high):.3f}"
                )
    for kind in ("temperature", "vector", "isotonic"):
        assert calibrators(3)[kind].unfamiliar(logits) == ""


# Files

MODEL = {"name": "small", "sha256": "0123456789abcdef" * 4, "classes": CLASSES[3]}
SAMPLING = {"method": "none", "scale": "auto"}


@pytest.mark.parametrize("kind", [*calibrators(3), "none"])
def test_a_file_gives_back_what_was_saved(kind, tmp_path):
    calibrator = calibrators(3).get(kind)
    saved = Calibration(calibrator, MODEL, SAMPLING, {"pictures": 7, "held_out": {}}, {"candidates": []})
    saved.save(tmp_path / "c.json")
    loaded = load_calibration(tmp_path / "c.json")
    assert loaded == saved and [each.name for each in tmp_path.iterdir()] == ["c.json"]
    logits = logits_of(3, 20, 30)
    assert torch.equal(whole(loaded.calibrator, logits, 33, 44), whole(calibrator, logits, 33, 44))
    unchanged = "as the net is, nothing better was found on 7 pictures"
    assert loaded.about == (unchanged if calibrator is None else f"{calibrator.kind}, fitted on 7 pictures")
    assert json.loads((tmp_path / "c.json").read_text())["parameters"] == json.loads(json.dumps(loaded.parameters))


REFUSED = {
    "another net": ({"sha256": "f" * 64, "name": "other"}, {}, "expected one that was fitted for other (sha256 ffffffffffff…). Received: one for small (0123456789ab…)."),
    "other classes": ({"classes": ["a", "c", "b"]}, {}, "expected one for the classes a, c, b. Received: one for a, b, c."),
    "another method": ({}, {"method": "mc-dropout"}, "expected one that was fitted with method mc-dropout. Received: one fitted with method none."),
    "another scale": ({}, {"scale": "native"}, "expected one that was fitted with scale native. Received: one fitted with scale auto."),
    "something more": ({}, {"drop_path": True}, "expected one that was fitted with drop_path True. Received: one fitted with drop_path None."),
    "many things": ({}, {"drop_path": True, "method": "mc-dropout"}, "expected one that was fitted with method mc-dropout. Received: one fitted with method none."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_calibration_for_something_else_is_refused(case, tmp_path):
    model, sampling, text = REFUSED[case]
    asked = MODEL | model, {**SAMPLING, **sampling}
    found = Calibration(calibrators(3)["temperature"], MODEL, SAMPLING)
    file = tmp_path / "c.json"
    found.save(file)
    for choice, where in ((file, str(file)), (found, "calibration")):
        with pytest.raises(CalibrationError) as error:
            find_calibration(choice, None, *asked)
        assert str(error.value) == f"{where}: {text} Fit one with `seguncert calibrate`, or set calibration none."
    assert not found.fits(*asked) and found.fits(MODEL, SAMPLING)
    assert find_calibration(file, None, MODEL, SAMPLING) == found


def test_a_net_without_a_digest_is_known_by_its_name():
    found = Calibration(None, MODEL | {"sha256": ""}, SAMPLING)
    assert found.fits(MODEL | {"sha256": ""}, SAMPLING) and not found.fits(MODEL | {"sha256": "", "name": "x"}, SAMPLING)  # fmt: skip


def test_auto_takes_the_file_that_lies_by_the_model_if_it_fits(tmp_path):
    found = Calibration(calibrators(3)["temperature"], MODEL, SAMPLING)
    assert find_calibration("auto", tmp_path, MODEL, SAMPLING) is None
    found.save(tmp_path / "calibration-none.json")
    assert find_calibration("auto", tmp_path, MODEL, SAMPLING) == found
    assert find_calibration("auto", tmp_path, MODEL, {**SAMPLING, "scale": "native"}) is None
    assert find_calibration("auto", tmp_path, MODEL, {**SAMPLING, "method": "tta"}) is None
    assert find_calibration("auto", None, MODEL, SAMPLING) is None
    for nothing in ("none", None):
        assert find_calibration(nothing, tmp_path, MODEL, SAMPLING) is None
    (tmp_path / "calibration-none.json").write_text("{")
    with pytest.raises(CalibrationError, match=r"calibration-none.json: expected a file that `seguncert calibrate`"):
        find_calibration("auto", tmp_path, MODEL, SAMPLING)


DAMAGES = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[1, 2]",
    "a number": lambda text: "7",
    "deep": lambda text: "[" * 100_000,
    "bytes": lambda text: "\udcff\udcfe",
    "another version": lambda text: text.replace('"seguncert_calibration": 1', '"seguncert_calibration": 2'),
    "another kind": lambda text: text.replace('"kind": "local"', '"kind": "magic"'),
    "no model": lambda text: text.replace('"model"', '"madel"'),
    "no digest": lambda text: text.replace('"sha256"', '"sha"'),
    "text for a number": lambda text: text.replace("-0.3", '"much"'),
    "not a number": lambda text: text.replace("-0.3", "NaN"),
    "infinity": lambda text: text.replace("-0.3", "Infinity"),
    "an unknown feature": lambda text: text.replace("entropy 31", "entropy 32"),
    "an unknown entry": lambda text: text.replace('"constant"', '"canstant"'),
    "too few slopes": lambda text: text.replace("0.7\n", "0.7, 0.7\n"),
    "a frame of one number": lambda text: text.replace("30,\n", ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_said_to_be_one(damage, tmp_path):
    Calibration(calibrators(3)["local"], MODEL, SAMPLING).save(tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    damaged = DAMAGES[damage](text)
    assert damaged != text
    (tmp_path / "c.json").write_bytes(damaged.encode("utf-8", "surrogateescape"))
    with pytest.raises(CalibrationError) as error:
        load_calibration(tmp_path / "c.json")
    assert f"{tmp_path}/c.json: expected a file that `seguncert calibrate` of this version wrote. Received: " in str(error.value)  # fmt: skip
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "calibrator",
    [
        Vector((1.0, 1.0), (0.0, 0.0)),
        Scaling("class-conditional", 0.0, (0.1, 0.2)),
        Remap("isotonic", (0.5, 0.4), (0.1, 0.2)),
        Remap("isotonic", (0.5,), (0.1, 0.2)),
        Remap("histogram", (), ()),
        Neighbourhood(((1.0, 0.0),) * 2, 0.0, 0.0, 0.0, place=1e-30),
        Neighbourhood(((1.0, 0.0),) * 2, 0.0, 0.0, 0.0, colour=1e60),
        Neighbourhood(((1.0, 0.0),) * 2, 0.0, 0.0, 0.0, colour=-0.1),
    ],
    ids=str,
)
def test_numbers_that_do_not_belong_together_are_no_calibration(calibrator, tmp_path):
    Calibration(calibrator, MODEL, SAMPLING).save(tmp_path / "c.json")
    with pytest.raises(CalibrationError, match="Received: ValueError: numbers that do not belong together"):
        load_calibration(tmp_path / "c.json")


OLD = {
    "kind": "neighbourhood", "weights": [[0.6, -0.2], [0.1, -0.2], [0.3, 0.2]], "middle": -2.5, "low": -3.2, "high": -1.3,
    "frame": [450, 600], "windows": [19, 77],
}  # fmt: skip


def test_a_neighbourhood_of_an_earlier_version_is_to_be_fitted_anew(tmp_path):
    file = tmp_path / "c.json"
    Calibration(calibrators(3)["neighbourhood"], MODEL, SAMPLING).save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"parameters": OLD}))
    with pytest.raises(CalibrationError, match="kind neighbourhood of an earlier version; fit it anew with"):
        load_calibration(file)


@pytest.mark.parametrize("change", [{"weights": [[1.0, 0.0]] * 3}, {"weights": [[1.0], [0.0]]}, {"weights": 1.0}])
def test_another_neighbourhood_is_said_to_be_one(change, tmp_path):
    file = tmp_path / "c.json"
    Calibration(calibrators(3)["neighbourhood"], MODEL, SAMPLING).save(file)
    content = json.loads(file.read_text())
    content["parameters"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="expected a file that `seguncert calibrate` of this version wrote"):
        load_calibration(file)


def test_a_file_that_is_not_there():
    with pytest.raises(CalibrationError) as error:
        load_calibration("nowhere.json")
    assert str(error.value) == "nowhere.json: expected a calibration file. Received: No such file or directory"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    first, second = (Calibration(calibrators(3)[kind], MODEL, SAMPLING) for kind in ("temperature", "local"))
    first.save(tmp_path / "c.json")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error then
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(StoreError, match=r"no space left to write .*c.json"):
            second.save(tmp_path / "c.json")
        with pytest.raises(StoreError, match="no space left"):
            second.save(tmp_path / "new.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_calibration(tmp_path / "c.json") == first and not (tmp_path / "new.json").exists()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StoreError, match=r"cannot write .*c.json: No such file or directory"):
        Calibration(None, MODEL, SAMPLING).save(tmp_path / "nowhere" / "c.json")
    assert not (tmp_path / "nowhere").exists()
