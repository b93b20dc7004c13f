"""The table of scenes: fiducio's calibrators, a stand-in and the real ones, get what ours get; and the mark to measure them by."""

import math
import sys
import types

import cv2
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from seguncert.apps.fiducio_kinds import MISSING, fit_theirs, offered
from seguncert.apps.scenes import ORACLE, Labelled, judge, main
from seguncert.calibrating import draw
from seguncert.evaluation import in_order
from seguncert.fitting import Pixels, fit
from seguncert.surroundings import FEATURES

SCENES = {"night": 3, "day": 5, "dusk": 2}  # pictures of each


@pytest.fixture(scope="module")
def seen():
    """Pixels drawn from pictures of three scenes, and the pictures; every fifth pixel is wrong."""
    rng, pixels, kept = np.random.default_rng(0), Pixels(3, tuple(FEATURES), None, run=2), {}
    for scene, count in SCENES.items():
        for k in range(count):
            name, z = f"{scene}/{scene}_{k}.png", 3 * rng.normal(size=(3, 30, 40)).astype(np.float32)
            y = np.where(rng.random((30, 40)) < 0.2, rng.integers(0, 3, (30, 40)), z.argmax(0)).astype(np.uint8)
            y[:2] = 255
            photo = rng.integers(0, 256, (30, 40, 3), np.uint8)
            kept[name] = Labelled(torch.from_numpy(z), photo, y)
            pixels.add(draw(pixels, kept[name].logits_Chw, photo, [y], name, scene))
    return pixels, kept


def pairs(kept):
    """Logits and labels, in numpy."""
    return [(each.logits_Chw.numpy(), each.labels_HW) for each in kept.values()]


@pytest.fixture
def stand_in(monkeypatch):
    """Of fiducio: keeps what it was given, and doubles the logits."""
    module, given = types.ModuleType("fiducio"), []

    class Doubling:
        def __init__(self, **settings):
            self.settings = settings

        def fit(self, predictions, targets, **watched):
            given.append((self.settings, predictions, targets, watched))
            return self

        def decision_function(self, predictions):
            assert predictions.isfinite().all()
            return 2 * predictions

    module.registered_ids = lambda: ["vector_scaling", "temperature_scaling"]
    module.get_calibrator_class = {"vector_scaling": Doubling, "temperature_scaling": Doubling}.__getitem__
    monkeypatch.setitem(sys.modules, "fiducio", module)
    return given


def sorted_rows(*tables):
    """Logits and label of each pixel as rows of one table, in an order of their own."""
    rows = np.concatenate([np.column_stack([z, y]) for z, y in tables])
    return rows[np.lexsort(rows.T)]


def test_their_kinds_get_our_pixels_and_early_stopping_a_scene_of_them(seen, stand_in):
    pixels, _ = seen
    assert offered(2) == ["fiducio temperature_scaling", "fiducio vector_scaling", "fiducio vector_scaling, early"]
    assert offered(1) == ["fiducio temperature_scaling", "fiducio vector_scaling"], "no scene to keep aside"
    for kind in ("fiducio vector_scaling", "fiducio vector_scaling, early"):
        fit_theirs(kind, pixels)
    (_, *whole, none), (settings, *rest, watched) = stand_in
    ours = sorted_rows(*((each.logits_NC, each.votes_NC) for each in pixels.drawn))
    np.testing.assert_array_equal(sorted_rows(whole), ours)
    assert not none and settings["patience"] == 20
    aside = watched["val_predictions"], watched["val_targets"]
    np.testing.assert_array_equal(sorted_rows(rest, aside), ours)
    dusk = [each for each in pixels.drawn if each.group == "dusk"]
    np.testing.assert_array_equal(sorted_rows(aside), sorted_rows(*((each.logits_NC, each.votes_NC) for each in dusk)))


def test_the_table_judges_theirs_as_ours(seen, stand_in):
    pixels, kept = seen
    judged, notes = judge(pixels, kept)
    z = np.concatenate([z[:, y != 255] for z, y in pairs(kept)], 1)
    y = np.concatenate([y[y != 255] for _, y in pairs(kept)])
    nll = {each.kind: each.pooled.compute()["nll"] for each in judged}
    for kind, factor in (("none", 1), ("fiducio vector_scaling, early", 2)):
        expected = -np.take_along_axis(log_softmax(factor * z.astype(float), axis=0), y[None].astype(int), 0).mean()
        assert nll[kind] == pytest.approx(expected, rel=1e-6)
    for each in judged:
        assert sum(e.compute()["pixels"] for e in each.of_scene.values()) == each.pooled.compute()["pixels"] == len(y)
        assert (each.changed > 0) == (each.kind == "vector")
    assert notes[-1] == "fiducio's best: temperature_scaling"


def test_the_mark_is_the_best_temperature_of_each_photo(seen):
    pixels, kept = seen
    judged, _ = judge(pixels, kept)
    kinds = [each.kind for each in judged]
    found = dict(zip(kinds, (each.pooled.compute() for each in judged), strict=True))[ORACLE]
    total, count = 0.0, 0
    for z, y in pairs(kept):
        z, y = z.astype(float)[:, y != 255], y[y != 255][None].astype(int)
        best = minimize_scalar(lambda beta, z=z, y=y: -np.take_along_axis(log_softmax(beta * z, axis=0), y, 0).sum())
        total, count = total + best.fun, count + y.size
    assert kinds[-1] == ORACLE and found["nll"] == pytest.approx(total / count, rel=2e-3), (
        "fitted on every second pixel"
    )
    assert found["nll"] >= total / count * (1 - 1e-6)


def test_a_photo_that_is_all_right_has_no_temperature():
    pixels, kept = Pixels(2, tuple(FEATURES), None, run=1), {}
    photo = np.zeros((4, 4, 3), np.uint8)
    z = torch.tensor([[[5.0, 4, 3, 2]] * 4, [[0.0] * 4] * 4])
    for scene in ("dawn", "day", "night"):
        for k in range(2):
            name, y = f"{scene}/{k}.png", np.zeros((4, 4), np.uint8)
            y[0, :k] = 1  # of the first photo no pixel is wrong
            kept[name] = Labelled(z, photo, y)
            pixels.add(draw(pixels, z, photo, [y], name, scene))
    judged, _ = judge(pixels, kept)
    none, own = judged[0].pooled.compute(), judged[-1].pooled.compute()
    assert judged[-1].kind == ORACLE and 0 < own["nll"] < none["nll"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"without": ["noon"]}, "without: expected one of day; night. Received: noon"),
        ({"without": ["day", "night, known"]}, "without: expected one of day; night. Received: night, known"),
        ({"more_images": "images"}, "more-images, more-labels: expected both or neither. Received: one of them"),
        ({}, "left-out: expected a net trained without day. Received: ones without anything"),
    ],
)
def test_what_is_asked_for_and_not_there_is_told(settings, text, small_model, tmp_path):
    for folder, shape in (("images", (8, 8, 3)), ("labels", (8, 8))):
        (tmp_path / folder).mkdir()
        for scene in ("day", "night"):
            cv2.imwrite(str(tmp_path / folder / f"{scene}_0.png"), np.zeros(shape, np.uint8))
    settings = {name: tmp_path / each if isinstance(each, str) else each for name, each in settings.items()}
    with pytest.raises(ValueError, match=text):
        main(str(small_model), tmp_path / "images", tmp_path / "labels", [], **settings)


def test_without_fiducio_a_line_says_how_to_get_it(seen, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiducio", None)
    judged, notes = judge(*seen)
    assert notes[-1] == MISSING and "pip install fiducio" in MISSING
    assert not any("fiducio" in each.kind for each in judged)


def test_the_real_one(seen):
    pytest.importorskip("fiducio", reason="fiducio is no dependency; pip install fiducio in an environment of its own")
    pixels, kept = seen
    kinds = offered(2)
    assert len(kinds) == 16
    theirs = dict(zip(kinds, in_order([lambda k=kind: fit_theirs(k, pixels) for kind in kinds], 2), strict=True))
    assert theirs["fiducio temperature_scaling"].fitted.temperature == pytest.approx(math.exp(-fit("temperature", pixels).constant), rel=1e-3)  # fmt: skip
    z = next(iter(kept.values())).logits_Chw
    for kind, each in theirs.items():
        expected = each.fitted.transform(z[None])[0].numpy()
        np.testing.assert_allclose(softmax(each(z, None).numpy(), axis=0), expected, atol=1e-6, err_msg=kind)
