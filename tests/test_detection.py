"""Histograms of doubt against scikit-learn and against loops over sorted pixels; ties; parts merge to the whole."""

import inspect
import itertools

import numpy as np
import pytest
from scipy.special import digamma, softmax
from sklearn.metrics import average_precision_score, roc_auc_score

from seguncert.detection import COARSE_BINS, RIGHT, VOID, WRONG, Detection, figures, harmonic_gap


def draw(n=1_000_000, C=6, spread=6.0, seed=0):
    """Doubt and errors of a net that is sharp and over-confident; one pixel in 20 has doubt below 1e-6."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (n, C)).astype(np.float32)
    probs = softmax(logits, axis=1)
    truth = (softmax(logits.astype(np.float64) / 2, axis=1).cumsum(1) > rng.random((n, 1))).argmax(1)
    return 1 - probs.max(1), probs.argmax(1) != truth


def collect(doubt, wrong):
    detection = Detection.empty()
    detection.update(np.asarray(doubt, np.float32), np.asarray(wrong).astype(np.uint8))
    return detection


def risks(doubt, wrong):
    """Error rate among the i surest for each i, expected over the order of ties."""
    _, group, count = np.unique(doubt, return_inverse=True, return_counts=True)
    errors = np.bincount(group, wrong)
    member = np.sort(group)
    before = (count.cumsum() - count)[member]
    added = errors[member] / count[member] * (np.arange(len(doubt)) + 1 - before)
    return ((errors.cumsum() - errors)[member] + added) / (np.arange(len(doubt)) + 1)


def false_positives(doubt, wrong, found=0.95):
    threshold = np.sort(doubt[wrong])[::-1][int(np.ceil(found * wrong.sum() - 1e-9)) - 1]
    return (doubt[~wrong] >= threshold).mean()


def levels(k):
    return lambda doubt: np.round(doubt * k) / np.float32(k)


@pytest.mark.parametrize(
    "change, tolerance",
    [(np.float32, 3e-6), (np.sqrt, 3e-6), (np.square, 3e-6), (levels(20), 1e-8), (levels(255), 1e-8)],
    ids=["doubt", "root", "square", "20 levels", "255 levels"],
)
def test_against_scikit_learn_and_sorted_pixels(change, tolerance):
    doubt, wrong = draw()
    doubt = change(doubt).astype(np.float32)
    result = collect(doubt, wrong).compute()
    risk, error = risks(doubt, wrong), wrong.mean()
    optimum = (np.maximum(np.arange(1, len(doubt) + 1) - (~wrong).sum(), 0) / np.arange(1, len(doubt) + 1)).mean()
    expected = {
        "error_auroc": roc_auc_score(wrong, doubt),
        "error_ap": average_precision_score(wrong, doubt),
        "error_fpr95": false_positives(doubt, wrong),
        "aurc": risk.mean(),
        "e_aurc": risk.mean() - optimum,
        "ause": (risk.mean() - optimum) / error,
    }
    for name, value in expected.items():
        allowed = tolerance * (5 if name in ("error_fpr95", "ause") else 1)
        assert result[name] == pytest.approx(value, abs=allowed), name


def test_aurc_of_ties_is_the_mean_over_all_orders():
    doubt, wrong = np.float32([0.1, 0.1, 0.1, 0.5, 0.5]), np.array([False, True, False, True, False])
    orders = [
        np.mean(np.cumsum(np.r_[wrong[list(a)], wrong[list(b)]]) / np.arange(1, 6))
        for a in itertools.permutations((0, 1, 2))
        for b in itertools.permutations((3, 4))
    ]
    assert collect(doubt, wrong).compute()["aurc"] == pytest.approx(np.mean(orders), abs=1e-7)


def test_curves_against_sorted_pixels():
    doubt, wrong = draw(n=20_000)
    curve, risk = collect(doubt, wrong).risk_coverage(101), risks(doubt, wrong)
    np.testing.assert_allclose(curve.risk_Q[1:], risk[199::200], atol=2e-4)  # bins are in random order
    oracle = np.cumsum(np.sort(wrong)) / np.arange(1, len(wrong) + 1)
    np.testing.assert_allclose(curve.oracle_Q[1:], oracle[199::200], atol=1e-12)
    assert collect([0.1, 0.1, 0.5], [True, False, False]).risk_coverage(2).risk_Q == pytest.approx([1 / 2, 1 / 3])
    removed, left, best = curve.sparsification()
    assert (removed[0], left[0], best[0]) == (0, 1, 1)
    between = collect(doubt, wrong).risk_coverage(20_001)
    area = np.mean((between.risk_Q - between.oracle_Q)[1:]) / wrong.mean()
    assert collect(doubt, wrong).compute()["ause"] == pytest.approx(area, abs=1e-4)


def test_accuracy_against_uncertainty_counts_pixels():
    doubt, wrong = draw(n=20_000)
    asked = [0.0, 0.125, 0.25, 0.3, 0.75, 1.0]
    result = collect(doubt, wrong).accuracy_uncertainty(asked)
    np.testing.assert_allclose(result.threshold_T, asked, rtol=1 / 1024)
    certain = doubt < result.threshold_T[:, None]
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(result.accurate_if_certain_T, (certain & ~wrong).sum(1) / certain.sum(1))
    np.testing.assert_allclose(result.uncertain_if_inaccurate_T, (~certain & wrong).sum(1) / wrong.sum())
    np.testing.assert_allclose(result.pavpu_T, (certain != wrong).mean(1))


def test_equal_mass_calibration_against_sorted_pixels():
    doubt, wrong = draw(n=150_000)
    order = np.argsort(doubt)
    gaps = [abs((1.0 - doubt[part] - ~wrong[part]).sum()) for part in np.split(order, 15)]
    assert collect(doubt, wrong).equal_mass_ece() == pytest.approx(sum(gaps) / len(doubt), abs=2e-5)
    two = collect(np.repeat(np.float32([0.1, 0.3]), [15, 10]), np.r_[np.arange(15) < 3, np.arange(10) < 2])
    assert two.equal_mass_ece(2) == pytest.approx(0.1)  # 0.9 and 0.7 against 0.8 both times


def test_coarse_bins_are_close_and_keep_ties():
    doubt, wrong = draw()
    fine = collect(doubt, wrong)
    (right_J, wrong_J), tie_J = fine.coarse()
    assert right_J.shape == (COARSE_BINS,) and right_J.sum() + wrong_J.sum() == len(doubt)
    for name, value in figures(right_J, wrong_J, tie_J).items():
        assert value == pytest.approx(fine.compute()[name], abs=2e-3), name
    tied = collect(np.round(doubt, 1), wrong)
    (right_J, wrong_J), tie_J = tied.coarse()
    assert tie_J.all()
    for name, value in figures(right_J, wrong_J, tie_J).items():
        assert value == pytest.approx(tied.compute()[name], abs=1e-12), name


@pytest.mark.parametrize("pair, tied", [((0.6, 0.6), True), ((0.6, 0.601), False), ((0.6, 0.6 + 1e-7), False)])
def test_coarse_bins_of_two_values_are_no_tie(pair, tied):
    counts_2J, tie_J = collect(pair, [True, False]).coarse()
    assert (counts_2J.sum(0) > 0).sum() == 1 and tie_J.all() == tied


def test_parts_merge_to_the_whole():
    doubt, wrong = draw(n=5_000)
    doubt[:1000] = np.round(doubt[:1000], 2)
    whole, merged = collect(doubt, wrong), Detection.empty()
    for part in (slice(0, 0), slice(3000, 5000), slice(0, 1), slice(1, 3000)):
        merged.merge(collect(doubt[part], wrong[part]))
    np.testing.assert_array_equal(merged.counts_2K, whole.counts_2K)
    np.testing.assert_array_equal(merged.only_K, whole.only_K)


@pytest.mark.parametrize(
    "outcome, expected",
    [
        (VOID, dict.fromkeys(("error_auroc", "error_ap", "error_fpr95", "aurc", "e_aurc", "ause"), np.nan)),
        (RIGHT, {"error_auroc": np.nan, "error_ap": np.nan, "error_fpr95": np.nan, "aurc": 0, "e_aurc": 0, "ause": np.nan}),
        (WRONG, {"error_auroc": np.nan, "error_ap": 1, "error_fpr95": np.nan, "aurc": 1, "e_aurc": 0, "ause": 0}),
    ],
)  # fmt: skip
def test_only_one_outcome(outcome, expected):
    detection = collect([0, 0.2, 0.7, 1], np.full(4, outcome))
    assert detection.compute() == pytest.approx(expected, abs=1e-8, nan_ok=True)
    assert np.isnan(detection.risk_coverage(5).risk_Q).all() == (outcome == VOID)
    assert np.isnan(detection.equal_mass_ece()) == (outcome == VOID)


def test_ends_and_rounding_beyond_them():
    detection = collect([-0.0, 0, -1e-6, 1e-30, 1, 1 + 1e-6], [0, 0, 0, 0, 1, 1])
    assert detection.counts_2K[RIGHT, :2].tolist() == [3, 1] and detection.counts_2K[WRONG, -1] == 2
    assert detection.tie_K().all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.1])
def test_a_value_outside_is_refused(bad):
    with pytest.raises(ValueError, match=rf"entropy: expected values in \[0, 1\]. Received: 1 outside it.*{bad}"):
        Detection.empty().update(np.float32([0.5, bad]), np.zeros(2, np.uint8), "entropy")


def test_shapes_are_checked_without_jaxtyping_too():
    with pytest.raises(ValueError, match=r"entropy: expected shape \(3,\). Received: \(2,\)"):
        inspect.unwrap(Detection.update)(Detection.empty(), np.zeros(2, np.float32), np.zeros(3, np.uint8), "entropy")


def test_harmonic_gap_against_digamma():
    q, n = np.array([0, 0, 0.5, 3, 1e3, 1e9]), np.array([0, 1, 7, 1000, 5, 1])
    np.testing.assert_allclose(harmonic_gap(q, n), digamma(q + n + 1) - digamma(q + 1), atol=1e-8)
    assert harmonic_gap(1e9, 1) == pytest.approx(1 / (1e9 + 1), rel=1e-9)
