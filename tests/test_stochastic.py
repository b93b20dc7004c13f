"""A head with a distribution over logits: against torch's, against plain loops, and for what it is there for."""

import math

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.distributions import LowRankMultivariateNormal
from torch.nn import functional as F

from seguncert.model import ModelError, put_dropout
from seguncert.stochastic import (
    FLOOR,
    LogitDistribution,
    LowRankHead,
    logit_distribution,
    put_stochastic_head,
    stochastic_nll,
)


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
    assert found.diagonal_BCHW.min() >= FLOOR
    nn.init.constant_(head.log_diagonal.bias, -1e4)
    assert head.distribution(features).diagonal_BCHW.max().item() == pytest.approx(FLOOR)
    nn.init.constant_(head.log_diagonal.bias, 1e4)
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
