"""Closed formulas for dropout before a convolution: equal to plain float64 ones, and near what drawing masks gives."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, grid_sample, one_hot, pad, softplus

from seguncert.closed import accumulate_closed
from seguncert.moments import Moments

FIELDS = ("mean_CHW", "squares_CHW", "entropy_HW")


def tail_of(C, K, kernel=(3, 3), dilation=(1, 1), size=(6, 9), spread=1.0, seed=0):
    """Padded features, kernel and bias: logits on `size`, with deviations of about `spread` at p = 1/2."""
    generator = torch.Generator().manual_seed(1000 * C + K + seed)
    margin = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    band = torch.rand(K, size[0] + margin[0], size[1] + margin[1], generator=generator)
    weight = torch.randn(C, K, *kernel, generator=generator) * spread / math.sqrt(K * kernel[0] * kernel[1] / 3)
    return band, weight, torch.randn(C, generator=generator)


def closed(band, weight, bias, dilation, p, row_position, column_position):
    moments = Moments.empty(len(weight), len(row_position), len(column_position))
    accumulate_closed(moments, band, weight, bias, dilation, p, slice(None), slice(None), row_position, column_position)
    moments.n = 1
    return moments


def parts_PKC(band, weight, dilation, row_position, column_position):
    """What each channel adds to the logits of each pixel, from torch's own convolution and interpolation."""
    C, K = weight.shape[:2]
    each = weight.double().transpose(0, 1).reshape(K * C, 1, *weight.shape[2:])
    lines = pad(conv2d(band.double(), each, dilation=dilation, groups=K), (0, 1, 0, 1))
    r, w = (n - 1 for n in lines.shape[1:])
    y, x = 2 * torch.as_tensor(row_position) / r - 1, 2 * torch.as_tensor(column_position) / w - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    return grid_sample(lines[None], grid[None], align_corners=True)[0].reshape(K, C, -1).permute(2, 0, 1)


def plain(parts_PKC, bias, p):
    """The docstring's formulas, a class at a time: mean, variance and expected entropy of P pixels."""
    kappa, (P, _, C) = (2 * p - 1) / math.sqrt(p * (1 - p)), parts_PKC.shape
    a_PKC, mu_PC = parts_PKC * math.sqrt(p / (1 - p)), parts_PKC.sum(1) + bias.double()
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)
    mean_PC, variance_PC, known_P = torch.zeros(P, C).double(), torch.zeros(P, C).double(), torch.zeros(P).double()
    for c in range(C):
        others = [j for j in range(C) if j != c]
        q = mu_PC[:, others].softmax(1)[:, None]
        about = (q * a_PKC[..., others]).sum(2, keepdim=True)
        curvature = (q * (a_PKC[..., others] - about) ** 2).sum(2)
        u = a_PKC[..., c] - about[..., 0]
        m = mu_PC[:, c] - mu_PC[:, others].logsumexp(1) - curvature.sum(1) / 2
        v = straight = (u**2).sum(1)
        bent = (straight - kappa * (u * curvature).sum(1)).clamp(straight / 2, 2 * straight)
        v = torch.where(mu_PC.argmax(1) == c, bent, straight)
        g = (kappa * (u**3).sum(1) / v**1.5).clamp(-1, 1)
        x = torch.from_numpy(nodes)[:, None]
        logit = m + v.sqrt() * (x + g * (x**2 - 1) / 6 - g**2 * (2 * x**3 - 5 * x) / 36)
        w, s = torch.from_numpy(weights / weights.sum())[:, None], logit.sigmoid()
        mean_PC[:, c] = (w * s).sum(0)
        variance_PC[:, c] = (w * (s - mean_PC[:, c]) ** 2).sum(0)
        known_P += -torch.xlogy(mean_PC[:, c], mean_PC[:, c]) - (w * s * softplus(-logit)).sum(0)
    mean_PC /= mean_PC.sum(1, keepdim=True)
    variance_PC = torch.minimum(variance_PC, mean_PC * (1 - mean_PC))
    return mean_PC, variance_PC, -torch.xlogy(mean_PC, mean_PC).sum(1) - known_P


def drawn(parts_PKC, bias, p, S):
    """Of S samples, and the standard errors of means over pixels: (mean, variance, entropy) twice."""
    kept = (torch.rand(S, parts_PKC.shape[1], generator=torch.Generator().manual_seed(0)) >= p).double() / (1 - p)
    log = torch.einsum("sk,pkc->spc", kept, parts_PKC).add_(bias).log_softmax(2)
    probs = log.exp()
    shift = (probs - probs.mean(0)) ** 2
    entropy = -(probs * log).sum(2)
    errors = [each.std(0) / math.sqrt(S) for each in (probs, shift.sum(2).mean(1), entropy.mean(1))]
    return (probs.mean(0), shift.mean(0), entropy.mean(0)), errors


@pytest.mark.parametrize(
    "C, K, kernel, dilation, p",
    [
        (2, 32, (3, 3), (1, 1), 0.2),
        (11, 32, (3, 3), (1, 1), 0.2),
        (11, 128, (1, 1), (1, 1), 0.5),
        (5, 7, (3, 1), (2, 1), 0.1),
        (4, 8, (3, 3), (2, 3), 0.7),
        (150, 64, (1, 1), (1, 1), 0.3),
    ],
)
def test_equal_to_the_plain_formulas_also_between_lines(C, K, kernel, dilation, p):
    band, weight, bias = tail_of(C, K, kernel, dilation, spread=3.0)
    rows, columns = np.array([0, 0.4, 1.9, 2, 4.5, 5]), np.linspace(0, 8, 23)
    moments = closed(band, weight, bias, dilation, p, rows, columns)
    expected = plain(parts_PKC(band, weight, dilation, rows, columns), bias, p)
    for field, value in zip(FIELDS, expected, strict=True):
        value = value.movedim(0, -1).reshape(getattr(moments, field).shape).float()
        torch.testing.assert_close(getattr(moments, field), value, atol=2e-5, rtol=1e-4)


def test_small_variances_keep_their_digits():
    band, weight, bias = tail_of(3, 32, spread=0.5)
    bias += torch.tensor([20.0, 0, 0])
    grid = np.arange(6.0), np.arange(9.0)
    moments = closed(band, weight, bias, (1, 1), 0.2, *grid)
    _, variance, _ = plain(parts_PKC(band, weight, (1, 1), *grid), bias, 0.2)
    assert moments.squares_CHW.max() < 1e-14
    expected = variance[:, 1:].T.reshape(2, 6, 9).float()
    torch.testing.assert_close(moments.squares_CHW[1:], expected, atol=0, rtol=1e-3)
    leader = moments.squares_CHW[0]  # varies as all others together: at most the sum of their deviations
    assert (leader > expected.amax(0) / 2).all() and (leader < 2 * expected.sqrt().sum(0) ** 2).all()


@pytest.mark.parametrize(
    "C, p, spread, tolerance",
    [(2, 0.2, 2, 0.1), (2, 0.5, 2, 0.1), (11, 0.2, 1, 0.1), (11, 0.2, 3, 0.2), (11, 0.5, 1, 0.1)],
)
def test_near_brute_force(C, p, spread, tolerance):
    """Five standard errors of the samples, and for the formulas: a mean 0.05 at worst and 0.01 on average; of the rest,
    averages over pixels, `tolerance` of their size."""
    band, weight, bias = tail_of(C, 64, spread=float(spread))
    grid = np.arange(6.0) * 0.9, np.arange(9.0) * 0.9
    moments = closed(band, weight, bias, (1, 1), p, *grid)
    (mean, variance, entropy), (mean_error, variance_error, entropy_error) = drawn(
        parts_PKC(band, weight, (1, 1), *grid), bias, p, 10_000
    )
    off = (moments.mean_CHW.flatten(1).T - mean).abs()
    assert (off - 5 * mean_error).amax() < 0.05 and off.mean() < 0.01
    spread_P, expected_P = moments.squares_CHW.sum(0).flatten().double(), variance.sum(1)
    assert abs(spread_P.mean() - expected_P.mean()) < tolerance * expected_P.mean() + 5 * variance_error
    assert torch.corrcoef(torch.stack([spread_P, expected_P]))[0, 1] > 0.95
    assert abs(moments.entropy_HW.mean() - entropy.mean()) < tolerance * entropy.mean() + 5 * entropy_error
    known = -torch.xlogy(mean, mean).sum(1).mean() - entropy.mean()
    assert abs(moments.mutual_information_HW().mean() - known) < tolerance * known + 5 * entropy_error


def test_sure_pixels_are_exact():
    band, weight, bias = torch.ones(4, 1, 300), torch.zeros(3, 4, 1, 1), torch.zeros(3)
    weight[1], weight[2] = 25.0, -25.0  # logits 0, 100 and −100
    moments = closed(band, weight, bias, (1, 1), 0.01, np.zeros(1), np.arange(300.0))
    assert all(torch.isfinite(getattr(moments, field)).all() for field in FIELDS)
    torch.testing.assert_close(moments.mean_CHW[:, 0, 0], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    assert moments.entropy_HW.max() < 1e-6 and moments.squares_CHW.max() < 1e-6


def test_masks_that_add_the_same_to_every_class_change_nothing():
    band, weight, bias = tail_of(5, 32, spread=9.0)
    weight[:] = weight[:1].clone()
    moments = closed(band, weight, bias, (1, 1), 0.5, np.arange(6.0), np.arange(9.0))
    assert moments.squares_CHW.max() < 1e-12
    expected = bias.softmax(0).view(5, 1, 1).expand(5, 6, 9)
    torch.testing.assert_close(moments.mean_CHW, expected, atol=1e-5, rtol=0)
    assert moments.mutual_information_HW().max() < 1e-6


@pytest.mark.parametrize("C", [2, 3, 11, 255])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0, 100.0])
def test_means_are_probabilities_and_information_is_in_its_range(C, spread):
    for p in (0.01, 0.5, 0.95):
        moments = closed(*tail_of(C, 16, spread=spread), (1, 1), p, np.arange(6.0), np.arange(9.0))
        torch.testing.assert_close(moments.mean_CHW.sum(0), torch.ones(6, 9), atol=1e-5, rtol=0)
        assert moments.mean_CHW.min() >= 0 and moments.squares_CHW.min() >= 0 and moments.entropy_HW.min() >= 0
        assert moments.squares_CHW.max() < 0.251 and moments.squares_CHW.sum(0).max() < 1 - 1 / C + 1e-4
        unclamped = moments.predictive_entropy_HW() - moments.entropy_HW
        assert unclamped.min() > -1e-5 and unclamped.max() < math.log(C) + 1e-5


def test_classes_may_be_named_in_any_order():
    band, weight, bias = tail_of(6, 32, spread=3.0)
    grid, order = (np.arange(6.0), np.arange(9.0)), torch.tensor([3, 0, 5, 1, 4, 2])
    one = closed(band, weight, bias, (1, 1), 0.2, *grid)
    other = closed(band, weight[order], bias[order], (1, 1), 0.2, *grid)
    torch.testing.assert_close(other.mean_CHW, one.mean_CHW[order], atol=2e-6, rtol=0)
    torch.testing.assert_close(other.squares_CHW, one.squares_CHW[order], atol=2e-6, rtol=0)


def test_bits_depend_neither_on_how_rows_are_cut_nor_on_what_was_there():
    band, weight, bias = tail_of(4, 8, size=(12, 300))
    rows, columns = np.linspace(0, 11, 30), np.linspace(0, 299, 401)
    whole, cut = closed(band, weight, bias, (1, 1), 0.2, rows, columns), Moments.empty(4, 30, 401)
    cut.mean_CHW += 7
    for start in range(0, 30, 7):
        part = slice(start, min(start + 7, 30))
        first = int(rows[start])
        accumulate_closed(
            cut, band[:, first : int(rows[part][-1]) + 4], weight, bias, (1, 1), 0.2, part, slice(None),
            rows[part] - first, columns,
        )  # fmt: skip
    assert all(torch.equal(getattr(cut, field), getattr(whole, field)) for field in FIELDS)


def test_columns_may_be_a_part_of_the_picture():
    tail = tail_of(4, 8)
    moments = Moments.empty(4, 9, 30)
    accumulate_closed(moments, *tail, (1, 1), 0.2, slice(2, 8), slice(10, 19), np.arange(6.0), np.arange(9.0))
    whole = closed(*tail, (1, 1), 0.2, np.arange(6.0), np.arange(9.0))
    assert torch.equal(moments.mean_CHW[:, 2:8, 10:19], whole.mean_CHW)
    moments.mean_CHW[:, 2:8, 10:19] = 0
    assert not moments.mean_CHW.any()


def test_nan_stays_to_be_seen():
    band, weight, bias = tail_of(3, 8, (1, 1))
    band[2, 1, 4] = torch.nan
    moments = closed(band, weight, bias, (1, 1), 0.2, np.arange(6.0), np.arange(9.0))
    expected = one_hot(torch.tensor(1 * 9 + 4), 54).view(6, 9).bool()
    assert torch.equal(torch.isnan(moments.entropy_HW), expected)
