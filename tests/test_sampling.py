"""MC dropout on a photo: the linear tail, shared passes and full passes agree; tiles do not show; nothing is silent."""

import copy
import re
import threading

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from scipy.stats import spearmanr
from torch import nn

import seguncert
from seguncert import tiles
from seguncert.dropout import Masks
from seguncert.model import ModelError, net_logits, put_dropout, wrap_model
from seguncert.moments import Moments
from seguncert.predict import net_input, predict_logits
from seguncert.prefix import Session, in_session
from seguncert.sampling import DropoutSampler, SamplingFree


def unet(dropout="segmentation_head", classes=3):
    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=classes)
    if dropout:
        put_dropout(net, dropout, 0.3)
    return net.eval()


def fpn():
    torch.manual_seed(0)
    return smp.FPN("resnet18", encoder_weights=None, classes=3).eval()


def wrap(net, C=3, **more):
    return wrap_model(net, [str(c) for c in range(C)], name="net", **more)


@pytest.fixture(scope="module")
def photo():
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(coarse, (109, 70), interpolation=cv2.INTER_CUBIC)


def full_passes(sampler, rgb, samples, seed):
    """The plain way: T whole passes, resized by torch, summed by `Moments.update`."""
    H, W = rgb.shape[:2]
    model, session, moments = sampler.model, Session(sampler.plan), Moments.empty(len(sampler.model.classes), H, W)
    with torch.inference_mode(), sampler.ready():
        for sample in range(samples):
            session.begin(Masks(seed, [sample]), full=True)
            with in_session(session):
                moments.update(net_logits(model, net_input(model, rgb))[None, :, :H, :W])
    return moments


def assert_same(one, other, tolerance):
    assert one.n == other.n
    for field in ("mean_CHW", "squares_CHW", "entropy_HW"):
        scale = other.n if field == "squares_CHW" else 1
        torch.testing.assert_close(getattr(one, field), getattr(other, field), atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(
    "net, linear",
    [
        (lambda: unet(), True),
        (fpn, True),
        (lambda: unet("decoder.blocks.2"), False),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=2, dilation=2), nn.Dropout2d(0.4), nn.Conv2d(6, 3, 5, padding=2, bias=False)), True),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Dropout2d(0.4), nn.Conv2d(6, 3, 3, padding=(2, 1), dilation=(2, 1))), True),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Dropout(0.4), nn.Conv2d(6, 3, 1)), True),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 2, stride=2), nn.Dropout(0.4), nn.Conv2d(6, 3, 3, padding=1), nn.UpsamplingBilinear2d(scale_factor=2)), True),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Dropout(0.4), nn.Conv2d(6, 3, 1)), True),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.AlphaDropout(0.4), nn.Conv2d(6, 3, 1)), False),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Dropout2d(0.4), nn.Conv2d(6, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)), False),
    ],
)  # fmt: skip
def test_the_moments_of_full_passes(net, linear, photo):
    torch.manual_seed(1)
    sampler = DropoutSampler(wrap(net().eval()))
    assert bool(sampler.tail) == linear, sampler.how
    expected = full_passes(sampler, photo, 20, seed=4)
    assert expected.variance_CHW().max() > 1e-4
    assert_same(sampler.moments(photo, 20, seed=4), expected, 1e-5)
    sampler.tail = None
    assert_same(sampler.moments(photo, 20, seed=4), expected, 2e-6)


class Head(nn.Module):
    """Dropout, a convolution, and something of the net's own after it."""

    def __init__(self, after, out=3, p=0.4, kernel=1, padding=0):
        super().__init__()
        self.first, self.drop = nn.Conv2d(3, 6, 1), nn.Dropout2d(p)
        self.last, self.side, self.after = nn.Conv2d(6, out, kernel, padding=padding), nn.Conv2d(3, 1, 1), after

    def forward(self, x):
        return self.after(self.last(self.drop(self.first(x))), self.side(x))


@pytest.mark.parametrize(
    "head, linear",
    [
        (lambda: Head(lambda y, x: y), True),
        (lambda: Head(lambda y, x: y[:, 1:], out=4), False),
        (lambda: Head(lambda y, x: torch.cat([x, y], 1), out=2), False),
        (lambda: Head(lambda y, x: y[:, :, 2:, 2:]), False),
        (lambda: Head(lambda y, x: y, kernel=3), False),  # smaller by its border, and resized after it
        (lambda: Head(lambda y, x: y, kernel=3, padding=2), False),
        (lambda: Head(lambda y, x: y, p=1.0), False),
    ],
)
def test_what_only_looks_linear_takes_full_passes(head, linear, photo):
    torch.manual_seed(2)
    sampler = DropoutSampler(wrap(head().eval()))
    assert bool(sampler.tail) == linear
    assert_same(sampler.moments(photo, 6, seed=1), full_passes(sampler, photo, 6, seed=1), 1e-5)


@pytest.mark.parametrize("channels", [128, 129, 256])
def test_many_channels(channels, photo):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, channels, 1), nn.Dropout2d(0.3), nn.Conv2d(channels, 3, 1))
    sampler = DropoutSampler(wrap(net.eval()))
    assert sampler.tail
    assert_same(sampler.moments(photo, 4), full_passes(sampler, photo, 4, 0), 1e-5)


@pytest.mark.parametrize("C", [128, 150, 255])
def test_many_classes(C, photo):
    torch.manual_seed(0)
    model = wrap(nn.Conv2d(3, C, 1).to(memory_format=torch.channels_last), C)
    expected = net_logits(model, net_input(model, photo))[:, : photo.shape[0], : photo.shape[1]]
    torch.testing.assert_close(predict_logits(model, photo), expected.detach())


@pytest.mark.parametrize("size", [(1, 1), (1, 1300), (40, 1300), (3, 511)])
@pytest.mark.parametrize("p", [0.2, 0.8])
def test_odd_sizes(size, p):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.Dropout2d(p), nn.Conv2d(12, 3, 3, padding=1))
    rgb = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    sampler = DropoutSampler(wrap(net.eval()))
    assert sampler.tail
    assert_same(sampler.moments(rgb, 5), full_passes(sampler, rgb, 5, 0), 1e-5)
    whole = sampler.moments(rgb, 5, scale=1.5)
    sampler.tail = None
    assert_same(whole, sampler.moments(rgb, 5, scale=1.5), 1e-5)


def test_a_piece_of_the_photos_own_size_is_not_the_photo():
    sampler = DropoutSampler(wrap(fpn()))
    rgb = np.random.default_rng(1).integers(0, 256, (416, 416, 3), dtype=np.uint8)
    cut = sampler.moments(rgb, 2, scale=2.0, tile=400)
    sampler.tail = None
    assert_same(cut, sampler.moments(rgb, 2, scale=2.0, tile=400), 1e-5)


class CallsMore(nn.Module):
    """Cuts a wide picture in two by itself: more calls of everything than on the trace's picture."""

    def __init__(self):
        super().__init__()
        self.a, self.drop, self.b = nn.Conv2d(3, 6, 1), nn.Dropout2d(0.4), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return torch.cat([self.b(self.drop(self.a(part))) for part in x.split(128, 3)], 3)


def test_a_photo_that_makes_the_net_draw_more_masks_than_foreseen():
    torch.manual_seed(0)
    sampler = DropoutSampler(wrap(CallsMore().eval()))
    rgb = np.random.default_rng(1).integers(0, 256, (64, 256, 3), dtype=np.uint8)
    moments = sampler.moments(rgb, 20)
    assert_same(moments, full_passes(sampler, rgb, 20, 0), 1e-5)
    halves = moments.variance_CHW().sum(0).split(128, 1)
    assert all(half.mean() > 1e-4 for half in halves)


def test_dropout_that_is_left_off_is_said():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Dropout2d(0.4), nn.Conv2d(6, 3, 1))
    net[0].register_forward_hook(lambda module, _, y: nn.functional.dropout(y, 0.5, module.training))
    assert DropoutSampler(wrap(net.eval())).how["functional_dropout_left_off"] == ["0"]


def test_a_picture_too_large_for_its_moments_is_one_line():
    sampler = DropoutSampler(
        wrap(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Dropout2d(0.4), nn.Conv2d(2, 200, 1)).eval(), 200)
    )
    with pytest.raises(
        ModelError, match="the moments of 200 classes at 2000x1500 pixels take 4.5 GiB. Expected at most 4"
    ):
        sampler.moments(np.zeros((1500, 2000, 3), np.uint8), 2)


def test_the_threads_of_the_process_stay(photo):
    sampler, found = DropoutSampler(wrap(unet())), []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sampler.moments(photo, 2)
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [2] and torch.tensor(1e-40) * 1 > 0
    finally:
        torch.set_num_threads(before)


def test_a_sigmoid_head_becomes_two_classes(photo):
    sampler = DropoutSampler(wrap(unet(classes=1), 2, head="sigmoid"))
    expected = full_passes(sampler, photo, 6, seed=0)
    assert sampler.tail and expected.mean_CHW.shape[0] == 2
    assert_same(sampler.moments(photo, 6), expected, 1e-5)


@pytest.mark.parametrize("net", [unet, fpn, lambda: unet("decoder.blocks.2")])
def test_a_photo_that_is_resized_for_the_net(net, photo):
    model = wrap(net())
    big = cv2.resize(photo, (218, 140), interpolation=cv2.INTER_LINEAR)
    sampler = DropoutSampler(model)
    moments = sampler.moments(big, 5, scale=0.5)
    sampler.tail = None
    assert_same(moments, sampler.moments(big, 5, scale=0.5), 1e-5)
    assert moments.mean_CHW.shape == (3, 140, 218)


def test_sums_do_not_depend_on_threads(photo):
    sampler, before = DropoutSampler(wrap(unet())), torch.get_num_threads()
    big, found = cv2.resize(photo, (640, 480)), []
    with torch.inference_mode(), sampler.ready():
        features = sampler.features(net_input(sampler.model, big))
    sampler.features = lambda _: features
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sampler.moments(big, 40))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(
            torch.equal(getattr(found[0], f), getattr(other, f)) for f in ("mean_CHW", "squares_CHW", "entropy_HW")
        )


def test_samples_beyond_a_chunk_and_another_seed(photo):
    sampler = DropoutSampler(wrap(unet()))
    many, other = sampler.moments(photo, 70, seed=1), sampler.moments(photo, 70, seed=2)
    assert_same(many, full_passes(sampler, photo, 70, seed=1), 1e-5)
    assert not torch.equal(many.mean_CHW, other.mean_CHW)
    assert (many.mean_CHW - other.mean_CHW).abs().mean() < (many.variance_CHW().sqrt() / np.sqrt(70)).mean() * 4


def test_pieces_do_not_show(photo):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.4), nn.Conv2d(8, 3, 3, padding=1))
    big = cv2.resize(photo, (1300, 900), interpolation=cv2.INTER_CUBIC)
    sampler = DropoutSampler(wrap(net.eval()))
    whole, cut = sampler.moments(big, 4), sampler.moments(big, 4, tile=400)
    assert_same(cut, whole, 1e-5)
    sampler.tail = None
    assert_same(sampler.moments(big, 4, tile=400), whole, 1e-5)


@pytest.mark.parametrize("net", [unet, fpn])
@pytest.mark.parametrize("scale", [1.0, 0.6, 2.0])
def test_sampling_free_is_the_limit_of_many_samples(net, scale, photo):
    model = wrap(net())
    limit, many = (
        SamplingFree(model).moments(photo, scale=scale),
        DropoutSampler(model).moments(photo, 2000, scale=scale),
    )
    assert limit.n == 1 and SamplingFree(model).how["passes"].endswith("closed formulas; no samples")
    torch.testing.assert_close(limit.mean_CHW.sum(0), torch.ones(70, 109), atol=1e-5, rtol=0)
    one, other = limit.variance_CHW().sum(0), many.variance_CHW().sum(0)
    assert spearmanr(one.ravel(), other.ravel()).statistic > 0.97
    assert (one - other).abs().mean() < 0.08 * other.mean()
    assert (limit.mean_CHW - many.mean_CHW).abs().mean() < 0.015, "2000 samples: 0.3 / 45"
    assert (
        limit.mutual_information_HW() - many.mutual_information_HW()
    ).abs().mean() < 0.1 * many.mutual_information_HW().mean()


def test_sampling_free_declines_what_is_not_linear():
    with pytest.raises(
        ModelError,
        match="net: sampling-free needs channel dropout that only one convolution and a resize follow. Received: d",
    ):
        SamplingFree(wrap(unet("decoder.blocks.2")))


def test_sampling_free_with_views_merges_their_limits(photo):
    result = seguncert.analyse(wrap(unet()), photo, method="sampling-free+tta", views=["flip"])
    alone = seguncert.analyse(wrap(unet()), photo, method="sampling-free")
    assert result.moments.n == 2 and alone.moments.n == 1 and not alone.errors
    assert result.maps["variance"].mean() > alone.maps["variance"].mean(), "views differ too"


def test_one_sample_has_no_spread_and_is_refused(photo):
    with pytest.raises(ValueError, match="samples: expected at least 2, since a spread is asked for. Received: 1"):
        DropoutSampler(wrap(unet())).moments(photo, 1)


def test_values_that_are_not_finite_are_an_error(photo):
    sampler = DropoutSampler(wrap(unet()))
    sampler.model.module.encoder.conv1.weight.data[1] = torch.nan
    with pytest.raises(ModelError, match="the net gave values that are not finite for this picture"):
        sampler.moments(photo, 2)


def test_analyse_with_samples(photo):
    model = wrap(unet())
    result = seguncert.analyse(model, photo, method="mc-dropout", samples=30, seed=3)
    assert list(result.maps) == ["confidence", "entropy", "mutual_information", "variance"]
    np.testing.assert_allclose(result.probabilities, result.moments.mean_CHW, atol=1e-6)
    np.testing.assert_allclose(result.maps["confidence"], result.probabilities.max(0), atol=1e-6)
    np.testing.assert_array_equal(result.labels, result.probabilities.argmax(0))
    assert result.maps["mutual_information"].max() > 1e-3
    again = seguncert.analyse(model, photo, method="mc-dropout", samples=30, seed=3)
    assert all(np.array_equal(result.maps[name], again.maps[name]) for name in result.maps)


def test_a_net_without_dropout_is_an_error_that_names_the_choices(photo):
    with pytest.raises(ModelError, match="it has no dropout. Put dropout in with insert-dropout PLACE:P"):
        seguncert.analyse(wrap(unet(None)), photo, method="mc-dropout")


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"method": "dropout"},
            "method: expected none, or one or more of mc-dropout, sampling-free, stochastic-head, tta, ensemble with + between. Received: 'dropout'",
        ),
        ({"method": "mc-dropout", "samples": 1}, "samples: expected at least 2"),
        ({"method": "mc-dropout", "seed": -1}, "seed: expected 0 or more. Received: -1"),
        ({"maps": ["variance"]}, "maps: variance describe the spread of samples"),
    ],
)
def test_wrong_settings(settings, message, photo):
    with pytest.raises(ValueError, match=re.escape(message)):
        seguncert.analyse(wrap(unet()), photo, **settings)


def test_batches_of_a_photo_that_makes_the_net_draw_more_than_foreseen():
    torch.manual_seed(0)
    sampler = DropoutSampler(wrap(CallsMore().eval()))
    rgb = np.random.default_rng(1).integers(0, 256, (64, 256, 3), dtype=np.uint8)
    merged, batches = Moments.empty(3, 64, 256), sampler.batches(rgb, 3)
    for _ in range(4):
        merged.merge(next(batches))
    assert_same(merged, full_passes(sampler, rgb, 12, 0), 1e-5)


@pytest.mark.parametrize("method", ["none", "tta"])
def test_a_logit_of_minus_infinity_is_an_error(method, photo):
    class Never(nn.Module):
        def forward(self, x):
            return torch.cat([x[:, :1], torch.full_like(x[:, :1], -torch.inf if x.shape[-1] > 64 else 0.0)], 1)

    with pytest.raises(ModelError, match="not finite"):
        seguncert.analyse(wrap(Never(), 2), photo, method=method)


def test_many_threads_may_analyse_with_one_net_in_training_mode(photo):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout2d(0.4), nn.Conv2d(8, 3, 1))
    model = wrap(net.train())
    expected = seguncert.analyse(model, photo, method="mc-dropout", samples=4).maps["confidence"]
    mean, found = net[1].running_mean.clone(), []

    def run():
        for _ in range(6):
            found.append(seguncert.analyse(model, photo, method="mc-dropout", samples=4).maps["confidence"])

    threads = [threading.Thread(target=run) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 18 and all(np.allclose(each, expected, atol=1e-5) for each in found)
    assert torch.equal(net[1].running_mean, mean) and all(module.training for module in net.modules())


def test_corners_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(tiles, "MARGIN", 64)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8), nn.Dropout2d(0.4), nn.Conv2d(8, 3, 1), nn.UpsamplingBilinear2d(scale_factor=8)
    )
    sampler = DropoutSampler(wrap(net.eval()))
    rgb = cv2.resize(
        np.random.default_rng(0).integers(0, 256, (9, 90, 3), dtype=np.uint8), (900, 90), interpolation=cv2.INTER_CUBIC
    )
    whole, cut = sampler.moments(rgb, 3), sampler.moments(rgb, 3, tile=256)
    assert sampler.tail and sampler.tail.resize
    assert_same(cut, whole, 1e-4)


def test_a_photo_that_the_net_sees_whole_is_cut_for_its_moments_alone(photo, monkeypatch):
    big = cv2.resize(photo, (300, 260), interpolation=cv2.INTER_CUBIC)
    for model in (wrap(unet()), wrap(unet("decoder.blocks.2")), wrap(fpn())):
        sampler = DropoutSampler(model)
        whole = sampler.moments(big, 3, scale=0.5)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "WHOLE", 1000)
            patch.setattr(tiles, "BLOCK", 4 * 7 * 150**2)
            assert len(list(sampler.blocks(big, 3, scale=0.5))) == 4
            assert_same(sampler.moments(big, 3, scale=0.5), whole, 1e-6)


def test_a_copy_of_a_net_made_in_inference_mode(photo):
    with torch.inference_mode():
        model = wrap(copy.deepcopy(unet()))
    assert DropoutSampler(model).moments(photo, 2).n == 2


def test_progress_tells_of_samples_and_can_stop(photo):
    told, model = [], wrap(unet())
    whole = seguncert.analyse(model, photo, method="mc-dropout", samples=7)
    told_of = seguncert.analyse(
        model, photo, method="mc-dropout", samples=7, progress=lambda done, wanted: told.append((done, wanted))
    )
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)] and told_of.note == whole.note
    assert np.abs(whole.probabilities - told_of.probabilities).max() < 1e-6
    part = seguncert.analyse(model, photo, method="mc-dropout", samples=7, progress=lambda done, wanted: done < 3)
    four = seguncert.analyse(model, photo, method="mc-dropout", samples=4)
    assert part.moments.n == 4 and part.note.endswith("stopped after 4 of 7")
    assert np.abs(part.probabilities - four.probabilities).max() < 1e-6


def test_progress_tells_of_views(photo):
    told, model = [], wrap(unet())
    whole = seguncert.analyse(model, photo, method="tta", views=["flip", "0.8"])
    told_of = seguncert.analyse(
        model, photo, method="tta", views=["flip", "0.8"], progress=lambda done, wanted: told.append((done, wanted))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert np.abs(whole.probabilities - told_of.probabilities).max() < 1e-6
