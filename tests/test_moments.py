"""Sums over samples against float64 numpy; parts merge to the whole; small variances survive."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy

from seguncert.moments import Moments, disagreement


def draw(S, C, H=5, W=7, spread=3.0, seed=0):
    return np.random.default_rng(seed).normal(0, spread, (S, C, H, W)).astype(np.float32)


def collect(logits):
    moments = Moments.empty(*logits.shape[1:])
    moments.update(torch.from_numpy(logits))
    return moments


@pytest.mark.parametrize("S, C, spread", [(2, 2, 1), (20, 11, 3), (200, 3, 20)])
def test_against_scipy_in_float64(S, C, spread):
    logits = draw(S, C, spread=spread)
    moments, probs = collect(logits), softmax(logits.astype(np.float64), axis=1)
    mean = probs.mean(0)
    np.testing.assert_allclose(moments.mean_CHW, mean, atol=3e-7)
    np.testing.assert_allclose(moments.variance_CHW(), probs.var(0), atol=3e-7)
    np.testing.assert_allclose(moments.predictive_entropy_HW(), entropy(mean, axis=0), atol=2e-6)
    np.testing.assert_allclose(moments.entropy_HW, entropy(probs, axis=1).mean(0), atol=2e-6)
    divergence = rel_entr(probs, mean).sum(1).mean(0)  # mutual information is the mean divergence from the mean
    np.testing.assert_allclose(moments.mutual_information_HW(), divergence, atol=4e-6)
    np.testing.assert_allclose(moments.log_mean_CHW().softmax(0), mean, atol=3e-7)


def pairs_in_a_loop(probs):
    """Per class Σ_i 2 p_s p_t and Σ_i p_s² + p_t², each a mean over the ordered pairs of different samples."""
    S, C = probs.shape[:2]
    both, weight = np.zeros(C), np.zeros(C)
    for s in range(S):
        for t in range(S):
            if s != t:
                both += 2 * (probs[s] * probs[t]).sum((1, 2)) / (S * (S - 1))
                weight += (probs[s] ** 2 + probs[t] ** 2).sum((1, 2)) / (S * (S - 1))
    return both, weight


@pytest.mark.parametrize("S, C, spread, W", [(2, 2, 1, 7), (20, 11, 3, 7), (50, 3, 20, 7), (3, 4, 2, 70_000)])
def test_disagreement_is_that_of_all_pairs_of_samples(S, C, spread, W):
    logits = draw(S, C, W=W, spread=spread)
    both, weight = pairs_in_a_loop(softmax(logits.astype(np.float64), axis=1))
    apart_C, weight_C = collect(logits).dice_sums()
    np.testing.assert_allclose(weight_C, weight / 2, rtol=1e-6)
    np.testing.assert_allclose(apart_C, (weight - both) / 2, rtol=1e-5)
    shown_C = torch.arange(C) != 1
    expected = np.mean(1 - np.delete(both / weight, 1))
    assert 0.01 < expected < 1
    assert disagreement(apart_C, weight_C, shown_C) == pytest.approx(expected, rel=1e-5)


def test_disagreement_of_samples_that_nearly_agree_keeps_its_digits():
    logits = draw(1, 3) + 1e-3 * draw(20, 3, seed=1)
    both, weight = pairs_in_a_loop(softmax(logits.astype(np.float64), axis=1))
    found = disagreement(*collect(logits).dice_sums(), torch.ones(3, dtype=torch.bool))
    assert found < 1e-5 and found == pytest.approx(np.mean(1 - both / weight), rel=1e-3)


def test_disagreement_of_many_samples_goes_to_that_of_the_limit():
    logits = draw(1, 3, spread=2) + draw(4000, 3, spread=1, seed=1)
    moments, shown_C = collect(logits), torch.ones(3, dtype=torch.bool)
    limit = Moments(moments.mean_CHW, moments.variance_CHW(), moments.entropy_HW, 1)  # as sampling-free gives it
    found = disagreement(*limit.dice_sums(limit=True), shown_C)
    assert found == pytest.approx(disagreement(*moments.dice_sums(), shown_C), rel=1e-3)
    merged = Moments.empty(3, 5, 7)
    for _ in range(2):  # two views that say the same are not two samples of which each is certain
        merged.merge(limit)
    assert disagreement(*merged.dice_sums(limit=True), shown_C) == pytest.approx(found, rel=1e-6)


def test_disagreement_of_blocks_adds_up_to_that_of_the_whole():
    moments, shown_C = collect(draw(9, 3)), torch.ones(3, dtype=torch.bool)
    blocks = [moments.at(rows, columns) for rows in (slice(0, 2), slice(2, 5)) for columns in (slice(0, 3), slice(3, 7))]  # fmt: skip
    sums = [torch.stack(block.dice_sums()) for block in blocks]
    found = disagreement(*sum(sums[1:], sums[0]), shown_C)
    assert found == pytest.approx(disagreement(*moments.dice_sums(), shown_C), rel=1e-6)


def test_disagreement_reaches_its_bounds_and_passes_over_what_is_not_there():
    same = collect(np.repeat(draw(1, 3), 5, axis=0))
    assert disagreement(*same.dice_sums(), torch.ones(3, dtype=torch.bool)) < 1e-12
    apart = collect(1e4 * np.eye(3, dtype=np.float32)[:2].reshape(2, 3, 1, 1))  # the third class has no mass at all
    assert disagreement(*apart.dice_sums(), torch.ones(3, dtype=torch.bool)) == 1
    assert disagreement(*apart.dice_sums(), torch.zeros(3, dtype=torch.bool)) == 0


def test_samples_of_nearly_one_probability_keep_their_variance():
    logits = np.array([0.0, 9.0]).reshape(1, 2, 1, 1) + 1e-3 * draw(50, 2, 1, 1)
    expected = softmax(logits.astype(np.float32).astype(np.float64), axis=1).var(0)
    assert expected.max() < 1e-12
    np.testing.assert_allclose(collect(logits.astype(np.float32)).variance_CHW(), expected, rtol=0.15)


def test_parts_merge_to_the_whole():
    logits = draw(30, 4)
    whole, parts = collect(logits), [collect(logits[a:b]) for a, b in ((0, 1), (1, 13), (13, 30))]
    merged = Moments.empty(*logits.shape[1:])
    for part in [Moments.empty(*logits.shape[1:]), *parts]:
        merged.merge(part)
    assert merged.n == whole.n == 30
    for field in ("mean_CHW", "squares_CHW", "entropy_HW"):
        torch.testing.assert_close(getattr(merged, field), getattr(whole, field), atol=2e-6, rtol=2e-6)


def test_equal_samples_have_no_variance_and_no_mutual_information():
    moments = collect(np.repeat(draw(1, 5), 20, axis=0))
    assert moments.variance_CHW().max() < 1e-13
    assert moments.mutual_information_HW().min() >= 0 and moments.mutual_information_HW().max() < 1e-6


def test_one_hot_samples_reach_the_bounds():
    moments = collect(1e4 * np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1))
    assert moments.mutual_information_HW().item() == pytest.approx(np.log(4), abs=1e-6)
    assert moments.variance_CHW().sum().item() == pytest.approx(1 - 1 / 4, abs=1e-6)
    assert moments.entropy_HW.item() == 0


def test_a_class_that_no_sample_allows_has_logarithm_minus_infinity():
    moments = collect(np.array([0, 0, -1e5], np.float32).reshape(1, 3, 1, 1))
    assert moments.log_mean_CHW().flatten().tolist() == pytest.approx([np.log(0.5), np.log(0.5), -np.inf])
    assert np.isfinite(log_softmax(moments.log_mean_CHW()[:2].numpy(), axis=0)).all()
