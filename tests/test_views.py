"""Mirrored, at other scales, by other nets: each view comes back to its place, and all weigh the same."""

import re

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import seguncert
from seguncert import tiles
from seguncert.maps import parse_method
from seguncert.model import ModelError, wrap_model
from seguncert.moments import Moments
from seguncert.predict import predict_logits
from seguncert.sampling import DropoutSampler
from seguncert.tiles import Look, Picture
from seguncert.views import MIRRORS, ZOOMS, OnePass, Together, View, make_sampler

H, W = 61, 87


@pytest.fixture(scope="module")
def photo():
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(coarse, (W, H), interpolation=cv2.INTER_CUBIC)


def model(seed=0, name="net", frame=None, classes=("a", "b", "c"), p=0.4):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(p), nn.Conv2d(8, len(classes), 3, padding=1)
    )
    return wrap_model(net.eval(), list(classes), name=name, frame=frame, divisor=1)


def softmax_of(net, rgb, scale="native"):
    logits = predict_logits(net, np.ascontiguousarray(rgb), scale)
    return nn.functional.interpolate(logits[None], size=(H, W), mode="bilinear", align_corners=False)[0].softmax(0)


def mean_and_variance(each):
    stack = torch.stack(each).double()
    return stack.mean(0).float(), stack.var(0, unbiased=False).float()


def test_each_view_is_brought_back_into_place(photo):
    net = model()
    sampler = make_sampler([net], "tta", ["flip", "flip-vertical", "0.5"])
    expected = [
        softmax_of(net, np.flip(photo, axes), scale).flip([axis - 2 for axis in axes])
        for axes in [(), (0,), (1,), (0, 1)]
        for scale in (1.0, 0.5)
    ]
    mean, variance = mean_and_variance(expected)
    moments = sampler.moments(photo, scale="native")
    assert moments.n == 8 and variance.max() > 1e-3
    torch.testing.assert_close(moments.mean_CHW, mean, atol=2e-5, rtol=0)
    torch.testing.assert_close(moments.variance_CHW(), variance, atol=2e-5, rtol=0)


def test_an_ensemble_averages_what_its_nets_say(photo):
    nets = [model(seed, f"net {seed}") for seed in range(3)]
    moments = make_sampler(nets, "ensemble").moments(photo)
    mean, variance = mean_and_variance([softmax_of(net, photo) for net in nets])
    torch.testing.assert_close(moments.mean_CHW, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(moments.variance_CHW(), variance, atol=1e-5, rtol=0)
    result = seguncert.analyse(nets, photo, method="ensemble", scale="native")
    np.testing.assert_allclose(result.probabilities, mean, atol=1e-5)


def test_samples_of_all_views_are_merged_and_share_no_masks(photo):
    net = model()
    sampler = make_sampler([net], "mc-dropout+tta", ["flip"])
    alone = DropoutSampler(net)
    moments = sampler.moments(photo, 5, seed=3)
    expected = Moments.empty(3, H, W)
    forwards, mirror = Moments.empty(3, H, W), Moments.empty(3, H, W)
    with torch.inference_mode(), alone.ready():
        for target, rgb, samples in (
            (forwards, photo, range(5)),
            (mirror, np.ascontiguousarray(photo[:, ::-1]), range(5, 10)),
        ):
            look = Look(Picture(rgb), slice(0, H), slice(0, W))
            alone.add(target, look, samples, 3)
    expected.merge(forwards)
    expected.merge(mirror.mirrored((1,)))
    assert moments.n == 10
    torch.testing.assert_close(moments.mean_CHW, expected.mean_CHW, atol=1e-6, rtol=0)
    torch.testing.assert_close(moments.squares_CHW, expected.squares_CHW, atol=1e-5, rtol=0)


def test_views_of_a_photo_in_blocks(photo, monkeypatch):
    monkeypatch.setattr(tiles, "MARGIN", 32)
    big = cv2.resize(photo, (400, 250), interpolation=cv2.INTER_CUBIC)
    sampler = make_sampler([model()], "mc-dropout+tta", ["flip", "0.8"])
    whole, cut = sampler.moments(big, 3, scale="native"), sampler.moments(big, 3, scale="native", tile=160)
    assert (whole.mean_CHW - cut.mean_CHW).abs().max() < 1e-3 and whole.variance_CHW().max() > 1e-2


@pytest.mark.parametrize(
    "frame, names, count",
    [((60, 80), None, 2 * (1 + len(ZOOMS))), (None, None, 4), ((60, 80), ["1.5"], 2), (None, [*MIRRORS, "2"], 8)],
)
def test_which_views_there_are(frame, names, count):
    sampler = make_sampler([model(frame=frame)], "tta", names)
    assert isinstance(sampler, Together) and len(sampler.views) == count == len(set(sampler.views))
    assert sampler.views[0] == View(sampler.views[0].sampler) and isinstance(sampler.views[0].sampler, OnePass)
    assert len(sampler.how["views"]) == count


def test_more_samples_go_on_where_the_last_ended(photo):
    sampler = make_sampler([model()], "mc-dropout+tta", ["flip"])
    batches = sampler.batches(photo, 4, seed=1)
    merged = next(batches)
    merged.merge(next(batches))
    assert merged.n == 16
    each = [DropoutSampler(model()).moments(photo, 2, seed=seed).mean_CHW for seed in range(4)]
    spread = torch.stack(each).std(0).mean()
    again = next(sampler.batches(photo, 8, seed=1))
    assert again.n == 16 and (again.mean_CHW - merged.mean_CHW).abs().mean() < spread
    fresh = next(sampler.batches(photo, 4, seed=1))
    assert not torch.equal(fresh.mean_CHW, merged.mean_CHW)


@pytest.mark.parametrize(
    "count, method, views, error, message",
    [
        (1, "ensemble", None, ValueError, "method: expected ensemble with several models, and only then. Received: 'ensemble', 1 model"),
        (2, "tta", None, ValueError, "method: expected ensemble with several models, and only then. Received: 'tta', 2 models"),
        (1, "mc-dropout", ["flip"], ValueError, "views: expected with them the method tta. Received: 'mc-dropout'"),
        (1, "tta", ["turn"], ValueError, "views: expected flip, flip-vertical, or factors of the scale from 0.1 to 10. Received: 'turn'"),
        (1, "tta", ["0.5", "0.5"], ValueError, "views: expected each once, and one at least. Received: 0.5, 0.5"),
        (-2, "ensemble", None, ValueError, "model: expected several different ones. Received: net, net, of which two have the same weights"),
        (1, "tta", [], ValueError, "views: expected each once, and one at least. Received: none"),
    ],
)  # fmt: skip
def test_wrong_settings(count, method, views, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_sampler([model(seed) for seed in range(count)] or [model(), model()], method, views)


def test_nets_of_other_classes_are_no_ensemble():
    with pytest.raises(ModelError, match="two: expected the classes of one: a, b, c. Received: a, b"):
        make_sampler([model(name="one"), model(name="two", classes=("a", "b"))], "ensemble")


@pytest.mark.parametrize("method", ["", "tta+tta", "none+tta", "dropout", "mc-dropout+", "mc-dropout+sampling-free"])
def test_methods_that_do_not_go_together(method):
    with pytest.raises(ValueError, match="method: expected "):
        parse_method(method)
