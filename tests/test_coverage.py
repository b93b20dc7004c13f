"""Coverage against plain loops, its intervals and the law of the share of images against scipy; parts merge to the whole."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import betabinom, binom, binomtest

from seguncert.apps.coverage import Kept, run_splits
from seguncert.conformal import BINS, Aim, ConformalSets
from seguncert.coverage import Coverage, beta_binomial_pmf, binomial_interval, binomial_pmf, central_band

VOID = 255
SETS = ConformalSets(Aim(4, "lac-empty"), 0.2, (3.0,), (9,))  # p ≥ 1/4
MASK = ConformalSets(Aim(4, "foreground", foreground=(1, 2)), 0.2, (1.0,), (9,))  # p_1 + p_2 ≥ 1/2


def draw(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (9, 11))  # the last class has no pixel
    labels[rng.random((9, 11)) < 0.2] = VOID
    logits = rng.normal(0, 1, (4, 9, 11)) + 2 * rng.random() * (labels == np.arange(4)[:, None, None])
    return torch.from_numpy(logits.astype(np.float32)), labels


def cover(images, sets=SETS, clusters=None, **settings):
    coverage = Coverage.empty(sets, ignore_index=VOID, **settings)
    for number, (logits, labels) in images:
        image = coverage.begin()
        image.update(logits[:, :4], labels[:4])
        image.update(logits[:, 4:], labels[4:])
        coverage.add(image, name=str(number), cluster=clusters and clusters[number])
    return coverage


@pytest.mark.parametrize("sets", [SETS, MASK], ids=["sets", "mask"])
def test_against_a_loop(sets):
    images = [(seed, draw(seed)) for seed in range(12)]
    figures = cover(images, sets).compute()
    rows = []
    for seed, (logits, labels) in images:
        p = softmax(logits.double().numpy(), axis=0)
        inside = p >= 0.25 if sets is SETS else np.broadcast_to(p[1] + p[2] >= 0.5, p.shape)
        for at in np.argwhere(labels != VOID):
            y, members = labels[tuple(at)], inside[(slice(None), *at)]
            rows.append((seed, y, members[y], members.sum() if sets is SETS else members[0]))
    seed_N, y_N, hit_N, size_N = np.array(rows).T
    for name, own_N in (("", np.isin(y_N, [1, 2]) if sets is MASK else y_N >= 0), (".1", y_N == 1)):
        shares = np.array([hit_N[own_N & (seed_N == seed)].mean() for seed in range(12)])
        assert figures["coverage" + name] == pytest.approx(hit_N[own_N].mean())
        assert figures["coverage_image_mean" + name] == pytest.approx(shares.mean())
        assert figures["images_covered" + name] == pytest.approx((shares >= 0.8).mean())
        assert figures["size_mean" + name] == pytest.approx(size_N[y_N == 1 if name else y_N >= 0].mean())
    assert math.isnan(figures["coverage.3"]) and math.isnan(figures["coverage_image_mean.3"])


def test_parts_merge_to_the_whole():
    images = [(seed, draw(seed)) for seed in range(9)]
    whole, left, right = (cover(part, replicates=50) for part in (images, images[:4], images[4:]))
    left.merge(right)
    np.testing.assert_allclose(left.sums_BG6, whole.sums_BG6, rtol=1e-12)
    assert left.compute() == pytest.approx(whole.compute(), nan_ok=True)
    assert left.intervals()["images_covered"] == whole.intervals()["images_covered"]
    with pytest.raises(ValueError, match="merge: expected a coverage with"):
        left.merge(cover(images, replicates=51))


def test_intervals():
    images = [(seed, draw(seed)) for seed in range(60)]
    figures, intervals = (coverage := cover(images)).compute(), coverage.intervals()
    shares = np.array([cover([image]).compute()["coverage"] for image in images])
    low, high = intervals["coverage_image_mean"]
    assert low < figures["coverage_image_mean"] < high
    assert high - low == pytest.approx(2 * 1.96 * shares.std() / math.sqrt(60), rel=0.15)
    exact = binomtest(int((shares >= 0.8).sum()), 60).proportion_ci(0.95)
    assert intervals["images_covered"] == pytest.approx(tuple(exact), abs=1e-9)
    assert all(math.isnan(end) for end in intervals["coverage.3"])
    clusters = [f"drive {seed // 20}" for seed in range(60)]
    by_drive = cover(images, clusters=clusters).intervals()
    assert by_drive["images_covered"] != intervals["images_covered"]
    assert all(math.isnan(end) for end in cover(images, clusters=["one"] * 60).intervals()["coverage"])


def test_binomial_intervals_of_scipy():
    for hits, n in ((0, 7), (7, 7), (1, 1), (3, 40), (190, 200)):
        for level in (0.9, 0.99):
            expected = binomtest(hits, n).proportion_ci(level)
            assert binomial_interval(hits, n, level) == pytest.approx(tuple(expected), abs=1e-9)
    with pytest.raises(ValueError, match="binomial interval: expected 0 ≤ hits ≤ n, n at least 1. Received: 3 of 2"):
        binomial_interval(3, 2)


def test_laws_of_scipy():
    np.testing.assert_allclose(binomial_pmf(200, 0.93), binom.pmf(range(201), 200, 0.93), rtol=1e-9)
    for m, n, alpha in ((45, 45, 0.1), (30, 19, 0.05), (7, 99, 0.2)):
        r = math.ceil((n + 1) * (1 - alpha) - 1e-9)
        law = betabinom(m, r, n + 1 - r)
        pmf = beta_binomial_pmf(m, n, alpha)
        np.testing.assert_allclose(pmf, law.pmf(range(m + 1)), rtol=1e-9)
        assert central_band(pmf) == (law.ppf(0.025), law.ppf(0.975))
        assert pmf.sum() == pytest.approx(1) and pmf @ np.arange(m + 1) / m >= 1 - alpha - 1e-12
    with pytest.raises(ValueError, match="beta-binomial: expected n \\+ 1 ≥ 1/alpha. Received: n 8, alpha 0.1"):
        beta_binomial_pmf(5, 8, 0.1)


@pytest.mark.parametrize("alpha", [0.2, 0.05])
def test_random_halves_follow_the_law(alpha):
    rng = np.random.default_rng(0)
    centre_I1 = rng.uniform(1000, 9000, (60, 1))
    losses_IK = 1 / (1 + np.exp((np.arange(BINS) - centre_I1) / 300))
    losses_IK[:, -1] = 0
    kept = Kept(losses_IK.astype(np.float32), np.ones((60, BINS), np.float32))
    splits = run_splits("lac", kept, alpha, 0.9, 300, seed=1)
    law = betabinom(30, r := math.ceil(31 * (1 - alpha) - 1e-9), 31 - r)
    assert splits.enough.mean() == pytest.approx(law.mean(), abs=4 * law.std() / math.sqrt(300))
    assert splits.enough.std() == pytest.approx(law.std(), rel=0.25)
    assert 1 - alpha - 0.01 <= splits.share.mean() <= 1 - alpha + 2 / 31


def test_nothing_labelled():
    coverage = cover([(0, (torch.zeros(4, 9, 11), np.full((9, 11), VOID)))])
    assert all(math.isnan(value) for value in coverage.compute().values())


def test_a_net_without_numbers():
    image = Coverage.empty(SETS, ignore_index=VOID).begin()
    with pytest.raises(ValueError, match="logits: expected finite numbers"):
        image.update(torch.full((4, 2, 2), math.nan), np.zeros((2, 2), int))
