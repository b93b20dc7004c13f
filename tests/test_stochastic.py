"""A head with a distribution over logits: against torch's, against plain loops, and for what it is there for."""

import csv
import json
import math

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import CARD, CONFIG
from torch import nn
from torch.distributions import LowRankMultivariateNormal
from torch.nn import functional as F

import seguncert
from seguncert import tiles
from seguncert.dropout import Masks
from seguncert.model import ModelError, build_net, put_dropout, save_model, wrap_model
from seguncert.moments import Moments
from seguncert.predict import net_input
from seguncert.stochastic import (
    FLOOR,
    LogitDistribution,
    LowRankHead,
    logit_distribution,
    put_stochastic_head,
    stochastic_nll,
)
from seguncert.views import make_sampler


@pytest.fixture(autouse=True)
def one_core():
    """Nets here are so small that threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def distribution(B=2, R=3, C=2, H=2, W=3, seed=0):
    generator = seeded(seed)
    return LogitDistribution(
        torch.randn(B, C, H, W, generator=generator),
        torch.randn(B, R, C, H, W, generator=generator),
        torch.rand(B, C, H, W, generator=generator) + 0.1,
    )


def unet(classes=3, rank=4):
    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=classes)
    if rank:
        put_stochastic_head(net, rank)
    return net.eval()


def test_samples_have_the_mean_and_the_covariance_of_torchs_distribution():
    found, n = distribution(), 40_000
    samples_SBQ = found.sample(n, seeded(1)).flatten(2)
    for b in range(2):
        expected = LowRankMultivariateNormal(
            found.mean_BCHW[b].flatten(), found.factor_BRCHW[b].flatten(1).T, found.diagonal_BCHW[b].flatten()
        )
        covariance, variance = expected.covariance_matrix, expected.variance
        drawn = samples_SBQ[:, b]
        assert ((drawn.mean(0) - expected.mean).abs() < 5 * (variance / n).sqrt()).all()
        band = 5 * ((variance[:, None] * variance + covariance**2) / n).sqrt()  # of a covariance of normal numbers
        assert ((drawn.T.cov() - covariance).abs() < band).all()
        assert covariance[0, 1:].abs().max() > 10 * band[0, 1:].max(), "there is a covariance to be seen"
    apart = (samples_SBQ[:, 0].T @ samples_SBQ[:, 1]) / n - samples_SBQ[:, 0].mean(0)[:, None] * samples_SBQ[:, 1].mean(
        0
    )
    assert apart.abs().max() < 0.15, "pictures of a batch are independent"


def test_a_generator_is_all_that_samples_depend_on():
    found = distribution()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(found.sample(3, seeded(5)), found.sample(3, seeded(5)))
    assert not torch.equal(found.sample(3, seeded(5)), found.sample(3, seeded(6)))
    assert torch.equal(torch.get_rng_state(), before)


def plain_nll(found, target, samples, generator, counted):
    """One pixel after another, in float64, with the same random numbers."""
    B, C, H, W = found.mean_BCHW.shape
    R = found.factor_BRCHW.shape[1]
    z, e = (
        torch.randn(samples // 2, B, R, generator=generator),
        torch.randn(samples // 2, B, C, H, W, generator=generator),
    )
    mean, factor, diagonal = (each.double() for each in (found.mean_BCHW, found.factor_BRCHW, found.diagonal_BCHW))
    total, pixels = 0.0, 0
    for b in range(B):
        likelihoods = []
        for s in range(samples):
            sign, t = (1, s) if s < samples // 2 else (-1, s - samples // 2)
            log = 0.0
            for y in range(H):
                for x in range(W):
                    if not counted(b, y, x):
                        continue
                    logits = []
                    for c in range(C):
                        moved = sum(float(z[t, b, r]) * float(factor[b, r, c, y, x]) for r in range(R))
                        moved += math.sqrt(float(diagonal[b, c, y, x])) * float(e[t, b, c, y, x])
                        logits.append(float(mean[b, c, y, x]) + sign * moved)
                    norm = math.log(sum(math.exp(value) for value in logits))
                    log += sum(float(target(b, c, y, x)) * (logits[c] - norm) for c in range(C))
            likelihoods.append(log)
        total -= math.log(sum(math.exp(log) for log in likelihoods) / samples)
        pixels += sum(bool(counted(b, y, x)) for y in range(H) for x in range(W))
    return total / pixels


def test_the_loss_is_that_of_a_plain_loop():
    found = distribution(C=3)
    target = torch.randint(0, 3, (2, 2, 3), generator=seeded(2))
    target[0, 1, 2] = target[1, 0, 0] = 255
    received = stochastic_nll(found, target, 6, generator=seeded(7))
    expected = plain_nll(
        found, lambda b, c, y, x: target[b, y, x] == c, 6, seeded(7), lambda b, y, x: target[b, y, x] != 255
    )
    assert received.item() == pytest.approx(expected, rel=1e-5)
    shares = torch.rand(2, 3, 2, 3, generator=seeded(3))
    shares /= shares.sum(1, keepdim=True)
    shares[:, :, 0, 1] = 0  # does not count
    received = stochastic_nll(found, shares, 6, generator=seeded(7))
    expected = plain_nll(found, lambda b, c, y, x: shares[b, c, y, x], 6, seeded(7), lambda b, y, x: (y, x) != (0, 1))
    assert received.item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_tends_to_the_integral():
    """Of one logit of a sigmoid head, which is η ~ N(μ, P² + d): −ln E σ(η) by quadrature."""
    found = LogitDistribution(
        torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1, 1), 1.5), torch.full((1, 1, 1, 1), 0.5)
    )
    received = stochastic_nll(found, torch.ones(1, 1, 1).long(), 200_000, generator=seeded())
    t = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    expected = -torch.trapezoid(
        torch.exp(-(t**2) / 2) / math.sqrt(2 * math.pi) * torch.sigmoid(0.3 + math.sqrt(2.75) * t), t
    ).log()
    assert received.item() == pytest.approx(expected.item(), abs=0.005)


def test_without_spread_it_is_the_cross_entropy_of_the_pixels_that_count():
    mean = torch.randn(2, 4, 5, 6, generator=seeded())
    sure = LogitDistribution(mean, torch.zeros(2, 1, 4, 5, 6), torch.full_like(mean, 1e-14))
    target = torch.randint(0, 4, (2, 5, 6), generator=seeded())
    target[0] = 255
    received = stochastic_nll(sure, target, 2, generator=seeded())
    assert received.item() == pytest.approx(F.cross_entropy(mean, target, ignore_index=255).item(), rel=1e-5)
    assert stochastic_nll(sure, torch.full_like(target, 255), 2, generator=seeded()).item() == 0


def test_gradients_are_those_of_differences():
    parts = [getattr(distribution(C=3), name).double() for name in ("mean_BCHW", "factor_BRCHW", "diagonal_BCHW")]
    target = torch.randint(0, 3, (2, 2, 3), generator=seeded(2))
    target[0, 0, 0] = 255
    drawn = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.autograd.gradcheck(
            lambda *parts: stochastic_nll(LogitDistribution(*parts), target, 4, generator=seeded()),
            [part.requires_grad_() for part in parts],
        )
    finally:
        torch.set_default_dtype(drawn)


def test_what_is_ignored_may_be_anything():
    found, target = distribution(), torch.zeros(2, 2, 3).long()
    target[:, 0, 0] = 255
    parts = [found.mean_BCHW, found.factor_BRCHW, found.diagonal_BCHW]
    received = []
    for wild in (0.0, torch.inf, torch.nan):
        leaves = [part.clone() for part in parts]
        for leaf in leaves:
            leaf[..., 0, 0] = wild
            leaf.requires_grad_()
        loss = stochastic_nll(LogitDistribution(*leaves), target, generator=seeded())
        loss.backward()
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves), wild
        received.append(loss.item())
    assert received[0] == received[1] == received[2]


def test_a_large_picture_and_large_logits_stay_finite():
    mean = torch.randn(1, 2, 200, 200, generator=seeded()) * 1e3
    wide = LogitDistribution(mean, torch.full((1, 2, 2, 200, 200), 1e3), torch.full_like(mean, FLOOR + math.exp(10)))
    wide.mean_BCHW.requires_grad_()
    loss = stochastic_nll(wide, torch.zeros(1, 200, 200).long(), generator=seeded())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(wide.mean_BCHW.grad).all()


@pytest.mark.parametrize("upsampling", [1, 2])
def test_the_head_in_any_mode_gives_the_mean_and_draws_nothing(upsampling):
    torch.manual_seed(0)
    head, features = LowRankHead(5, 3, rank=4, upsampling=upsampling), torch.randn(2, 5, 6, 7)
    before = torch.get_rng_state()
    found = head.distribution(features)
    assert torch.equal(head.train()(features), found.mean_BCHW) and torch.equal(head.eval()(features), found.mean_BCHW)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.factor_BRCHW.shape == (2, 4, 3, 6 * upsampling, 7 * upsampling)
    nn.init.constant_(head.deviation[0].bias, -1e4)
    assert head.distribution(features).diagonal_BCHW.max().item() == pytest.approx(FLOOR)
    nn.init.constant_(head.deviation[0].bias, 1e4)
    assert torch.isfinite(head.distribution(features).diagonal_BCHW).all()


def test_one_convolution_moves_the_mean_as_the_factor_does():
    torch.manual_seed(0)
    head, features = LowRankHead(5, 3, rank=4, upsampling=2), torch.randn(1, 5, 6, 7)
    z, noise = torch.randn(4), torch.randn(1, 3, 12, 14)
    found = head.distribution(features)
    expected = (
        found.mean_BCHW + torch.einsum("r,brchw->bchw", z, found.factor_BRCHW) + found.diagonal_BCHW.sqrt() * noise
    )
    torch.testing.assert_close(head.noise.moved(*head._parts(features), z, noise), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [smp.Unet, smp.FPN, smp.DeepLabV3Plus, smp.Segformer])
def test_a_net_keeps_its_logits_under_a_new_head(kind):
    torch.manual_seed(0)
    net, picture = kind("resnet18", encoder_weights=None, classes=3).eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = net(picture)
        head = put_stochastic_head(net, 5)
        assert not head.training and head.rank == 5
        assert torch.equal(net(picture), before)
        found = logit_distribution(net, picture)
    assert torch.equal(found.mean_BCHW, before)
    assert found.factor_BRCHW.shape == (1, 5, 3, 64, 96)
    assert found.factor_BRCHW.std() > 0


def test_any_last_convolution_can_become_one():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 2, 1)))
    picture = torch.randn(1, 3, 8, 8)
    before = net(picture)
    put_stochastic_head(net, 2, "1.1")
    assert torch.equal(net(picture), before)
    assert logit_distribution(net, picture).factor_BRCHW.shape == (1, 2, 2, 8, 8)
    assert not net[1][1].noise._forward_hooks


def test_wrong_calls_say_what_to_do():
    net = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2))
    with pytest.raises(ModelError, match="last Conv2d that keeps the size. Received: '0', Conv2d. Top-level names: 0"):
        put_stochastic_head(net, 2, "0")
    with pytest.raises(ModelError, match="Received: 'head', no such module"):
        put_stochastic_head(net, 2, "head")
    with pytest.raises(ModelError, match="head without activation"):
        put_stochastic_head(smp.Unet("resnet18", encoder_weights=None, activation="sigmoid"), 2)
    dropped = unet(rank=0)
    put_dropout(dropped, "segmentation_head", 0.2)
    with pytest.raises(
        ModelError, match="segmentation_head has hooks, as put_dropout makes them. Put the stochastic head"
    ):
        put_stochastic_head(dropped)
    with pytest.raises(
        ModelError, match="expected a net with one LowRankHead. Received: 0. put_stochastic_head puts it in."
    ):
        logit_distribution(net, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="rank: expected 1 to 256. Received: 0"):
        LowRankHead(4, 2, rank=0)
    with pytest.raises(
        ValueError, match="kernel_size: expected an odd number, so that logits stay in place. Received: 2"
    ):
        LowRankHead(4, 2, kernel_size=2)
    found, target = distribution(), torch.zeros(2, 2, 3).long()
    with pytest.raises(ValueError, match="samples: expected an even number, 2 or more. Received: 3"):
        stochastic_nll(found, target, 3, generator=seeded())
    with pytest.raises(
        ValueError,
        match=r"target: expected class indices \(2, 2, 3\) or shares \(2, 2, 2, 3\), .* Received: \(2, 3, 3\)",
    ):
        stochastic_nll(found, torch.zeros(2, 3, 3).long(), generator=seeded())
    target[1, 1, 1] = 2
    with pytest.raises(ValueError, match="target: expected classes from 0 to 1, or ignore_index 255. Received: 2"):
        stochastic_nll(found, target, generator=seeded())
    with pytest.raises(ValueError, match="samples: expected 1 or more. Received: 0"):
        found.sample(0, seeded())


@pytest.fixture(scope="module")
def photo():
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(coarse, (109, 70), interpolation=cv2.INTER_CUBIC)


def wrap(net, C=3, **more):
    return wrap_model(net, [str(c) for c in range(C)], **{"name": "net", **more})


def assert_same(one, other, tolerance):
    assert one.n == other.n
    for name in ("mean_CHW", "entropy_HW"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=tolerance, rtol=0)
    torch.testing.assert_close(one.variance_CHW(), other.variance_CHW(), atol=tolerance, rtol=0)


def plain_samples(model, rgb, n, seed):
    """One whole pass, its distribution, and samples of it by the formula, with the noise of the place."""
    H, W = rgb.shape[:2]
    padded = net_input(model, rgb)
    with torch.inference_mode():
        found, moments = logit_distribution(model.module, padded), Moments.empty(len(model.classes), H, W)
        for sample in range(n):
            z_R, noise_1CHW = Masks(seed, [sample]).draw_noise(found.factor_BRCHW.shape[1], found.mean_BCHW)
            shared = torch.einsum("r,brchw->bchw", z_R, found.factor_BRCHW)
            logits = found.mean_BCHW + shared + found.diagonal_BCHW.sqrt() * noise_1CHW
            moments.update(logits[:, :, :H, :W])
    return moments


@pytest.mark.parametrize("kind", [smp.Unet, smp.FPN])
def test_a_sampler_gives_the_moments_of_the_formula(kind, photo):
    torch.manual_seed(0)
    net = kind("resnet18", encoder_weights=None, classes=3).eval()
    put_stochastic_head(net, 4)
    model = wrap(net)
    sampler, flags, rng = (
        make_sampler([model], "stochastic-head"),
        [part.training for part in net.modules()],
        torch.get_rng_state(),
    )
    forwards = [vars(part).get("forward") for part in net.modules()]
    received = sampler.moments(photo, 20, seed=4)
    assert sampler.how["stochastic"] == ["segmentation_head.noise"] and sampler.how["passes"].startswith("one pass for")
    assert received.variance_CHW().max() > 1e-3
    assert_same(received, plain_samples(model, photo, 20, 4), 1e-5)
    assert torch.equal(received.mean_CHW, sampler.moments(photo, 20, seed=4).mean_CHW)
    assert (received.mean_CHW - sampler.moments(photo, 20, seed=5).mean_CHW).abs().max() > 1e-3
    assert torch.equal(torch.get_rng_state(), rng) and [part.training for part in net.modules()] == flags
    assert [vars(part).get("forward") for part in net.modules()] == forwards


def test_everything_before_the_head_runs_once(photo):
    net, calls = unet(), []
    sampler = make_sampler([wrap(net)], "stochastic-head")
    net.encoder.conv1.register_forward_hook(lambda *_: calls.append(1))
    sampler.moments(photo, 20)
    assert len(calls) == 1


def test_an_exception_leaves_the_net_as_it_was(photo):
    net = unet().train()
    sampler = make_sampler([wrap(net)], "stochastic-head")
    rng = torch.get_rng_state()
    with torch.no_grad():
        net.segmentation_head.noise.factor.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match="the net gave values that are not finite for this picture"):
        sampler.moments(photo, 3)
    assert all(part.training for part in net.modules()) and torch.equal(torch.get_rng_state(), rng)
    assert not any("forward" in vars(part) for part in net.modules())


class Pixels(nn.Module):
    """Sees one pixel at a time, so that nothing but the noise could differ from block to block."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 1), LowRankHead(8, 3, rank=4, kernel_size=1)
        nn.init.constant_(self.head.deviation[0].bias, 0.0)

    def forward(self, x):
        return self.head(self.first(x).relu())


@pytest.mark.parametrize("scale", ["native", 0.7])
def test_blocks_share_the_noise_of_the_whole(scale, monkeypatch):
    monkeypatch.setattr(tiles, "MARGIN", 32)
    torch.manual_seed(0)
    sampler = make_sampler([wrap(Pixels(), divisor=4)], "stochastic-head")
    rgb = np.random.default_rng(0).integers(0, 256, (200, 230, 3), dtype=np.uint8)
    whole = sampler.moments(rgb, 3, scale=scale)
    assert len(list(sampler.blocks(rgb, 3, 0, scale, tile=84))) > 1 and "blocks" not in sampler.how
    assert whole.variance_CHW().max() > 1e-2
    assert_same(sampler.moments(rgb, 3, scale=scale, tile=84), whole, 2e-4)


def test_noise_has_no_pattern():
    """Of one sample: as many above 0 as below, neighbours and classes independent, other samples too."""
    noise, mean = [Masks(0, [sample]).draw_noise(5, torch.empty(1, 3, 200, 200))[1][0] for sample in (0, 1)], []
    one, other = noise
    for shifted in (one.roll(1, 1), one.roll(1, 2), one.roll(1, 0), other):
        mean.append((one * shifted).mean().item() * math.sqrt(one.numel()))
    assert max(map(abs, mean)) < 4, mean
    z = torch.stack([Masks(0, [sample]).draw_noise(5, torch.empty(1, 3, 1, 1))[0] for sample in range(4000)])
    assert z.mean(0).abs().max() < 4 / math.sqrt(4000)
    assert (z.T.cov() - torch.eye(5)).abs().max() < 5 * math.sqrt(2 / 4000)


def test_it_goes_with_views_ensembles_and_dropout(photo):
    torch.manual_seed(0)
    one, other = wrap(unet()), wrap(unet(), name="other")
    with torch.no_grad():
        other.module.segmentation_head.mean[0].bias.add_(0.1)
    other = wrap(other.module, name="other")
    both = make_sampler([one, other], "stochastic-head+ensemble").moments(photo, 4)
    assert both.n == 8
    flipped = seguncert.analyse(one, photo, method="stochastic-head+tta", views=["flip"], samples=3, maps=["variance"])
    assert flipped.moments.n == 6 and flipped.maps["variance"].max() > 0
    dropped = unet()
    put_dropout(dropped, "segmentation_head", 0.3)
    sampler = make_sampler([wrap(dropped)], "mc-dropout+stochastic-head")
    assert sampler.how["stochastic"] == ["dropout_before_segmentation_head", "segmentation_head.noise"]
    apart = [make_sampler([wrap(dropped)], each).moments(photo, 10) for each in ("mc-dropout", "stochastic-head")]
    together = sampler.moments(photo, 10).variance_CHW().sum()
    assert together > max(each.variance_CHW().sum() for each in apart)
    with pytest.raises(
        ValueError, match="expected stochastic-head without sampling-free, whose formulas know dropout alone"
    ):
        make_sampler([one], "stochastic-head+sampling-free")
    with pytest.raises(
        ModelError, match="plain: stochastic-head samples the distribution that a head gives .* use another method"
    ):
        make_sampler([one, wrap(unet(rank=0), name="plain")], "stochastic-head+ensemble")


def test_results_say_where_the_distribution_was_not_made_use_of(photo):
    model, note = wrap(unet()), "of the head's mean logits alone: the method stochastic-head samples their distribution"
    plain = seguncert.analyse(model, photo)
    assert plain.note == note
    assert torch.equal(plain.logits, seguncert.analyse(wrap(unet(rank=0)), photo).logits)
    sampled = seguncert.analyse(model, photo, method="stochastic-head", samples=5, seed=2)
    assert sampled.note == "" and set(sampled.maps) == {"confidence", "entropy", "mutual_information", "variance"}
    auto = seguncert.analyse(model, photo, method="stochastic-head", samples="auto", max_error=0.2)
    assert auto.moments.n >= 40
    assert seguncert.analyse(wrap(unet(rank=0)), photo).note == ""
    with pytest.raises(ValueError, match="samples: expected at least 2, since a spread is asked for. Received: 1"):
        seguncert.analyse(model, photo, method="stochastic-head", samples=1)
    with pytest.raises(
        ValueError, match="drop-path: expected with it a method with mc-dropout. Received: 'stochastic-head'"
    ):
        seguncert.analyse(model, photo, method="stochastic-head", drop_path=True)


def saved(folder, rank=4):
    torch.manual_seed(0)
    net = build_net(CONFIG)
    head = put_stochastic_head(net, rank)
    nn.init.normal_(head.deviation[0].weight)
    save_model(folder, net, CONFIG, CARD | {"dropout": [{"before": "segmentation_head", "p": 0.3}]})
    return net.eval()


def test_the_page_offers_it_where_a_net_has_one(tmp_path, photo):
    from seguncert.apps.app import Page  # slow: gradio

    saved(tmp_path / "model")
    name, file = str(tmp_path / "model"), tmp_path / "photo.png"
    cv2.imwrite(str(file), photo[..., ::-1])
    page = Page([name])
    assert "stochastic-head" in dict(page.methods).values()
    assert "stochastic-head" not in dict(Page(["street"]).methods).values()
    seen = page.look(str(file), name, "stochastic-head", 3, False, "a visitor").result
    expected = seguncert.analyse(seguncert.load_model(name), photo, method="stochastic-head", samples=3)
    assert seen.moments.n == 3
    torch.testing.assert_close(seen.moments.mean_CHW, expected.moments.mean_CHW, rtol=0, atol=1e-6)
    with pytest.raises(Exception, match="street: stochastic-head samples the distribution .*, or use another method"):
        page.look(str(file), "street", "stochastic-head", 3, False, "a visitor")


def test_a_model_folder_keeps_it(tmp_path, photo):
    net = saved(tmp_path / "model")
    card = json.loads((tmp_path / "model/card.json").read_text())
    assert card["stochastic_head"] == {"rank": 4}
    model = seguncert.load_model(tmp_path / "model")
    halved = {key: value.half().float() for key, value in net.state_dict().items() if value.is_floating_point()}
    loaded = model.module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in halved.items())
    received = seguncert.analyse(model, photo, method="mc-dropout+stochastic-head", samples=3)
    assert received.moments.n == 3 and received.maps["variance"].max() > 0
    card["stochastic_head"] = {"rank": 5}
    (tmp_path / "model/card.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="config.json and model.safetensors do not make a net: .*size mismatch"):
        seguncert.load_model(tmp_path / "model")
    for wrong in ({"rank": 0}, {"rank": 2.5}, 4, {"rank": 4, "kernel": 3}):
        card["stochastic_head"] = wrong
        (tmp_path / "model/card.json").write_text(json.dumps(card))
        with pytest.raises(
            ModelError, match='stochastic_head: expected null, or {"rank": a whole number from 1 to 256}. Received'
        ):
            seguncert.load_model(tmp_path / "model")


def test_export_calibrate_and_evaluate_take_it(tmp_path, photo):
    saved(tmp_path / "model")
    (tmp_path / "in").mkdir(), (tmp_path / "labels").mkdir()
    rng = np.random.default_rng(0)
    for k in range(4):
        cv2.imwrite(str(tmp_path / f"in/{k}.png"), np.roll(photo, 9 * k, 1))
        cv2.imwrite(str(tmp_path / f"labels/{k}.png"), rng.integers(0, 3, photo.shape[:2]).astype(np.uint8))
    drawn = {"model": tmp_path / "model", "method": "stochastic-head", "samples": 3, "seed": 1, "workers": 1}
    seguncert.export(tmp_path / "in", tmp_path / "out", **drawn)
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert (run["method"], run["samples"], run["seed"]) == ("stochastic-head", 3, 1)
    with (tmp_path / "out/images.csv").open() as file:
        assert [row["note"] for row in csv.DictReader(file)] == [""] * 4
    seguncert.export(tmp_path / "in", tmp_path / "plain", model=tmp_path / "model", workers=1)
    with (tmp_path / "plain/images.csv").open() as file:
        assert {row["note"] for row in csv.DictReader(file)} == {
            "of the head's mean logits alone: the method stochastic-head samples their distribution"
        }
    labelled = {"ignore_index": 255}
    seguncert.calibrate(
        tmp_path / "in", tmp_path / "labels", tmp_path / "cal.json", calibrator="temperature", **drawn, **labelled
    )
    found = seguncert.evaluate(
        tmp_path / "in",
        tmp_path / "labels",
        tmp_path / "judged",
        calibration=tmp_path / "cal.json",
        replicates=2,
        **drawn,
        **labelled,
    )
    assert found.metrics["protocol"]["samples"] == 3


def test_samples_of_a_trained_head_show_the_object_whole_or_not_at_all():
    """The truth is a square that is there with probability 1/2. A softmax says 1/2 at each pixel, which fits no mask."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), LowRankHead(8, 2, rank=2))
    image, square = torch.zeros(1, 3, 16, 16), (slice(4, 12), slice(4, 12))
    image[(..., *square)] = 1
    there, batch = seeded(1), 8
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(100):
        target = torch.zeros(batch, 16, 16).long()
        target[(..., *square)] = torch.randint(0, 2, (batch, 1, 1), generator=there)
        loss = stochastic_nll(logit_distribution(net, image.expand(batch, -1, -1, -1)), target, 20, generator=there)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 4 * math.log(2) / 256, "there is one coin a picture to be known; a softmax pays for 64"
    with torch.no_grad():
        found = logit_distribution(net.eval(), image)
    inside_SQ = found.sample(400, seeded(2)).argmax(2)[(slice(None), 0, *square)].flatten(1).float()
    shares_S = inside_SQ.mean(1)
    assert inside_SQ.mean().item() == pytest.approx(0.5, abs=0.15)
    assert ((shares_S < 0.05) | (shares_S > 0.95)).float().mean() > 0.8, "a sample is one mask"
    moments = make_sampler([wrap(net, 2, divisor=1)], "stochastic-head").moments(
        (image[0] * 255).byte().permute(1, 2, 0).numpy(), 50
    )
    assert moments.mean_CHW.shape == (2, 16, 16)
