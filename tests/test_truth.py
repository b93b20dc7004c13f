"""Predictions against exact posteriors: plain loops, merge, and what must not pass in silence."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from seguncert.truth import BINS, OFF, Truth


def some(seed, C=3, H=5, W=7):
    rng = np.random.default_rng(seed)
    probs_CHW = rng.dirichlet(np.ones(C), (H, W)).transpose(2, 0, 1)
    logits_CHW = np.log(probs_CHW) + rng.normal(0, 0.4, (C, H, W))
    net_CHW = np.exp(logits_CHW) / np.exp(logits_CHW).sum(0)
    return probs_CHW, np.log(net_CHW)


def by_loops(pictures):
    """Every figure by its definition, a pixel at a time."""
    sums, gaps, pixels = {}, np.zeros(BINS), 0
    for probs_CHW, log_CHW in pictures:
        for y, x in np.ndindex(probs_CHW.shape[1:]):
            p, q = probs_CHW[:, y, x], np.exp(log_CHW[:, y, x])
            shown = max(range(len(q)), key=lambda c: q[c])
            h, g = (-sum(v * np.log(v) for v in each if v > 0) for each in (p, q))
            row = {
                "kl": sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0), "true_entropy": h, "entropy": g,
                "entropy_error": abs(g - h), "confidence_error": abs(q[shown] - p[shown]), "overconfidence": q[shown] - p[shown],
                "regret": max(p) - p[shown], "off": float(max(abs(p - q)) > OFF),
            }  # fmt: skip
            sums = {name: sums.get(name, 0.0) + value for name, value in row.items()}
            gaps[min(int(q[shown] * BINS), BINS - 1)] += q[shown] - p[shown]
            pixels += 1
    return {name: value / pixels for name, value in sums.items()} | {"ece": abs(gaps).sum() / pixels}


def test_figures_equal_plain_loops():
    pictures = [some(0), some(1, H=2, W=3), some(2)]
    truth = Truth()
    for each in pictures:
        truth.update(*each)
    found, expected = truth.compute(), by_loops(pictures)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert 0.1 < expected["off"] < 0.9 and expected["regret"] > 0


def test_parts_merge_to_the_whole():
    whole, parts = Truth(), [Truth(), Truth(), Truth()]
    for k in range(3):
        probs_CHW, log_CHW = some(k)
        maps = {"confidence": np.exp(log_CHW).max(0), "entropy": np.full(log_CHW.shape[1:], 0.1 * k)}
        for each in (whole, parts[k]):
            each.update(probs_CHW, log_CHW, maps, {"mutual_information": 0.1 * k})
    merged = Truth()
    for part in parts:
        merged.merge(part)
    assert merged.compute() == pytest.approx(whole.compute(), abs=1e-14)
    assert whole.compute()["mutual_information"] == pytest.approx(0.1)


def test_maps_are_judged_by_how_they_find_what_is_off():
    probs_CHW, log_CHW = some(3, H=30, W=30)
    net_CHW = np.exp(log_CHW)
    off_HW = abs(net_CHW - probs_CHW).max(0) > OFF
    truth = Truth()
    truth.update(probs_CHW, log_CHW, {"confidence": net_CHW.max(0), "entropy": off_HW * 0.5})
    found = truth.compute()
    assert found["auroc.entropy"] == 1.0
    assert found["auroc.confidence"] == pytest.approx(roc_auc_score(off_HW.ravel(), -net_CHW.max(0).ravel()), abs=1e-3)


def test_the_truth_itself_has_no_error():
    probs_CHW, _ = some(0)
    truth = Truth()
    truth.update(probs_CHW, np.log(probs_CHW), {"confidence": probs_CHW.max(0)})
    found = truth.compute()
    assert all(abs(found[name]) < 1e-12 for name in ("kl", "entropy_error", "confidence_error", "regret", "off", "ece"))
    assert np.isnan(found["auroc.confidence"])  # nothing is off, so nothing can be found


def test_what_the_net_rules_out_but_may_be_is_infinitely_far():
    probs_CHW, log_CHW = np.array([[[0.5]], [[0.5]]]), np.array([[[0.0]], [[-np.inf]]])
    truth = Truth()
    truth.update(probs_CHW, log_CHW)
    assert truth.compute()["kl"] == np.inf
    sure = Truth()
    sure.update(np.array([[[1.0]], [[0.0]]]), log_CHW)
    assert sure.compute()["kl"] == 0


@pytest.mark.parametrize(
    ("log_CHW", "message"),
    [
        (np.full((2, 1, 1), np.nan), "expected ln of probabilities that sum to 1. Received: sums from nan"),
        (np.zeros((2, 1, 1)), "expected ln of probabilities that sum to 1. Received: sums from 2 to 2"),
    ],
)
def test_what_is_no_distribution_is_an_error(log_CHW, message):
    with pytest.raises(ValueError) as caught:
        Truth().update(np.full((2, 1, 1), 0.5), log_CHW)
    assert message in str(caught.value)


def test_sums_of_other_figures_do_not_mix():
    truth, other = Truth(), Truth()
    truth.update(*some(0), means={"mutual_information": 0.1})
    with pytest.raises(ValueError, match="expected kl, true_entropy"):
        truth.update(*some(1))
    other.update(*some(1))
    with pytest.raises(ValueError, match="truth: expected sums of kl"):
        truth.merge(other)
