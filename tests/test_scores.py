"""Sums over pixels against float64 loops and scikit-learn; pixels that cannot be scored; bins; boundaries."""

import inspect
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.metrics import confusion_matrix, log_loss

from seguncert.detection import RIGHT, VOID, WRONG
from seguncert.scores import Reliability, Scores, boundary_band, calibration_error


def draw(C=5, H=31, W=43, spread=2.0, seed=0, void=255):
    """Logits, labels drawn from a softmax that is less sure than theirs, and a map."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (C, H, W)).astype(np.float32)
    chances = softmax(0.6 * logits.astype(np.float64), axis=0).cumsum(0)
    labels = (chances < rng.random((H, W))).sum(0).clip(0, C - 1).astype(np.uint8 if void < 256 else np.int32)
    labels[rng.random((H, W)) < 0.1] = void
    return torch.from_numpy(logits), labels, rng.random((H, W)).astype(np.float32)


def score(logits, labels, boundary=None, ignore_index=255):
    scores = Scores.empty(len(logits))
    doubt, outcome = scores.update(logits, labels, boundary, ignore_index=ignore_index)
    return scores, doubt, outcome


def loop(probs_N, hits_N):
    """ECE, MCE, debiased squared error, and Murphy's three terms, a bin at a time."""
    bin_N, result = np.minimum((probs_N * 15).astype(int), 14), np.zeros(5)
    largest, N = 0.0, len(probs_N)
    for m in np.unique(bin_N):
        p, y, n = probs_N[bin_N == m].mean(), hits_N[bin_N == m].mean(), (bin_N == m).sum()
        largest = max(largest, abs(p - y))
        squared = ((p - y) ** 2 - y * (1 - y) / (n - 1), 1) if n > 1 else (0, 0)
        result += n / N * np.array([abs(p - y), *squared, (p - y) ** 2, (y - hits_N.mean()) ** 2])
    return result[0], largest, result[1] / result[2], result[3], result[4], hits_N.mean() * (1 - hits_N.mean())


@pytest.mark.parametrize("C, spread", [(2, 1), (5, 2), (19, 4), (11, 60)])
def test_against_float64_loops(C, spread):
    logits, labels, _ = draw(C, 61, 47, spread)
    if C > 2:  # the last class neither occurs nor is shown
        logits[-1], labels[labels == C - 1] = -math.inf, 0
    band = boundary_band(labels, 2, ignore_index=255)
    scores, doubt, outcome = score(logits, labels, band)
    valid = labels != 255
    z, y = logits.double().numpy()[:, valid], labels[valid]
    p, shown = softmax(z, axis=0), z.argmax(0)
    hits, top = shown == y, p.max(0)
    result = scores.compute()

    np.testing.assert_array_equal(scores.confusion, confusion_matrix(y, shown, labels=range(C)))
    union = [((y == c) | (shown == c)).sum() for c in range(C)]
    iou = [((y == c) & (shown == c)).sum() / n for c, n in enumerate(union) if n]
    assert result["miou"] == pytest.approx(np.mean(iou)) and result["accuracy"] == pytest.approx(hits.mean())
    assert result["nll"] == pytest.approx(-log_softmax(z, axis=0)[y, range(len(y))].mean(), rel=1e-6)
    assert result["brier"] == pytest.approx(((p - np.eye(C)[y].T) ** 2).sum(0).mean(), rel=1e-6)

    ece, mce, squared, reliability, resolution, uncertainty = loop(top, hits)
    expected = dict(ece=ece, mce=mce, reliability=reliability, resolution=resolution, uncertainty=uncertainty)
    expected["ece_classwise"] = np.mean([loop(p[c], y == c)[0] for c in range(C)])
    expected["ece_boundary"] = loop(top[band[valid]], hits[band[valid]])[0]
    if not band[valid].all():
        expected["ece_interior"] = loop(top[~band[valid]], hits[~band[valid]])[0]
    expected["ece_l2_debiased"] = math.sqrt(max(0, squared))
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=2e-6), name

    np.testing.assert_array_equal(outcome, np.where(valid, np.where(logits.argmax(0) == labels, RIGHT, WRONG), VOID))
    np.put_along_axis(p := softmax(logits.double().numpy(), axis=0), logits.argmax(0).numpy()[None], 0, 0)
    np.testing.assert_allclose(doubt, p.sum(0), rtol=1e-5, atol=1e-37)  # no rounding near 0


def test_log_loss_of_scikit_learn():
    logits, labels, _ = draw()
    valid = labels != 255
    expected = log_loss(labels[valid], softmax(logits.double().numpy(), axis=0)[:, valid].T, labels=range(5))
    assert score(logits, labels)[0].compute()["nll"] == pytest.approx(expected, rel=1e-6)


def test_255_as_a_class():
    logits, labels, _ = draw(256, 9, 11)
    as_class = score(logits, labels, ignore_index=None)[0].compute()
    assert as_class["pixels"] == labels.size and score(logits, labels)[0].compute()["pixels"] == (labels != 255).sum()
    expected = -log_softmax(logits.double().numpy(), axis=0)
    assert as_class["nll"] == pytest.approx(np.take_along_axis(expected, labels[None].astype(int), 0).mean(), rel=1e-6)


@pytest.mark.parametrize("dtype, void", [(np.uint16, 65535), (np.int64, -1), (np.uint8, 3)])
def test_other_ignore_indices(dtype, void):
    logits, labels, _ = draw()
    moved = np.where(labels == 255, dtype(void), labels.astype(dtype))
    expected = score(logits, np.where(moved == void, 255, moved))[0]
    assert 900 < expected.compute()["pixels"] < labels.size
    for mine, theirs in zip(score(logits, moved, ignore_index=void)[0].arrays(), expected.arrays(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    "change, text",
    [
        (
            lambda z, y: y.__setitem__((0, slice(0, 3)), 7),
            r"0 to 4, or the ignore index 255. Received: 3 pixels with 7",
        ),
        (lambda z, y: z.__setitem__((1, 2, 3), math.nan), "logits: .* Received: NaN or .inf at 1 pixels"),
        (lambda z, y: z.__setitem__((1, 2, 3), math.inf), "logits: .* Received: NaN or .inf at 1 pixels"),
        (lambda z, y: z.__setitem__((slice(None), 30, 42), -math.inf), "Received: -inf for every class at 1 pixels"),
    ],
)
def test_pixels_that_cannot_be_scored(change, text):
    logits, labels, _ = draw()
    change(logits, labels)
    with pytest.raises(ValueError, match=text):
        score(logits, labels)


@pytest.mark.parametrize(
    "C, labels_shape, band_shape, text",
    [
        (4, (31, 43), (31, 43), r"logits: expected shape \(4, 31, 43\). Received: \(5, 31, 43\)"),
        (5, (31, 42), (31, 42), r"logits: expected shape \(5, 31, 42\). Received: \(5, 31, 43\)"),
        (5, (31, 43), (31, 1), r"boundary: expected shape \(31, 43\). Received: \(31, 1\)"),
    ],
)
def test_shapes_are_checked_without_jaxtyping_too(C, labels_shape, band_shape, text):
    update, labels, band = inspect.unwrap(Scores.update), np.zeros(labels_shape, np.uint8), np.zeros(band_shape, bool)
    with pytest.raises(ValueError, match=text):
        update(Scores.empty(C), draw()[0], labels, band, ignore_index=None)


def test_a_label_without_an_ignore_index_is_an_error():
    logits, labels, _ = draw(void=300)
    with pytest.raises(ValueError, match=rf"\(none is set\). Received: {(labels == 300).sum()} pixels with 300"):
        score(logits, labels, ignore_index=None)


def test_a_true_class_of_probability_zero_is_seen():
    logits = torch.tensor([0.0, -math.inf, -300.0]).view(3, 1, 1).expand(3, 1, 3)
    summary = score(logits, np.array([[0, 1, 2]]))[0].compute()
    assert (summary["nll"], summary["nll_infinite_pixels"]) == (math.inf, 1)
    assert score(logits, np.array([[0, 255, 2]]))[0].compute()["nll"] == pytest.approx(150)  # small, but not 0


def test_many_classes_at_equal_odds():
    assert score(torch.zeros(256, 2, 500), np.ones((2, 500), int))[0].compute()["nll"] == pytest.approx(math.log(256))


def test_calibration_error_of_confidences():
    rng = np.random.default_rng(0)
    confidence = np.r_[rng.random(10_000), np.ones(50), np.zeros(50)].astype(np.float32)
    correct = rng.random(len(confidence)) < 0.5 + 0.5 * np.sin(20 * confidence)  # too sure and too unsure in turn
    assert calibration_error(confidence, correct) == pytest.approx(
        loop(confidence.astype(np.float64), correct)[0], abs=1e-7
    )
    assert calibration_error(np.float32([1, 0]), np.array([False, True])) == 1
    assert math.isnan(calibration_error(np.float32([]), np.array([], bool)))
    with pytest.raises(ValueError, match=r"in \[0, 1\]. Received: 2 outside"):
        calibration_error(np.float32([0.5, math.nan, 1.5]), np.ones(3, bool))


def test_confidences_picture_by_picture_are_those_of_all():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(5000).astype(np.float32), rng.random(5000) < 0.5
    whole, pictures, other = Reliability.empty(), Reliability.empty(), Reliability.empty()
    whole.update(confidence, correct)
    for part in (slice(0, 7), slice(7, 7), slice(7, 3000)):
        pictures.update(confidence[part], correct[part])
    other.update(confidence[3000:], correct[3000:])
    pictures.merge(other)
    bin_N = np.minimum((15 * confidence).astype(int), 14)
    assert (whole.count == np.bincount(bin_N, minlength=15)).all() and (whole.count == pictures.count).all()
    assert (whole.hits == np.bincount(bin_N[correct], minlength=15)).all() and (whole.hits == pictures.hits).all()
    assert whole.forecast == pytest.approx(np.bincount(bin_N, confidence.astype(np.float64)), rel=1e-12)
    assert pictures.forecast == pytest.approx(whole.forecast, rel=1e-12)


def test_debiased_error_is_nearer_to_zero_when_calibrated():
    rng = np.random.default_rng(0)
    plain, debiased = [], []
    for _ in range(200):
        forecast = rng.random((15, 20)) / 15 + np.arange(15)[:, None] / 15
        hits = (rng.random((15, 20)) < forecast).sum(1)
        bins = Reliability(np.full(15, 20), hits, forecast.sum(1))
        plain.append(math.sqrt(bins.brier_split()[0]))
        debiased.append(float(bins.ece_l2_debiased()))
    assert np.mean(debiased) < 0.5 * np.mean(plain)


@pytest.mark.parametrize("width", [0, 1, 3])
@pytest.mark.parametrize("ignore_index", [None, 2, 255])
def test_boundary_band_against_a_loop(width, ignore_index):
    labels = np.kron(np.random.default_rng(width).integers(0, 4, (4, 5)), np.ones((5, 4), int)).astype(np.uint8)
    expected = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(*labels.shape):
        near = labels[max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
        others = near[(near != labels[y, x]) & (near != (-1 if ignore_index is None else ignore_index))]
        expected[y, x] = labels[y, x] != ignore_index and len(others) > 0
    np.testing.assert_array_equal(boundary_band(labels, width, ignore_index=ignore_index), expected)


def test_boundary_width_is_checked():
    with pytest.raises(ValueError, match="boundary width: expected 0 or more pixels. Received: -1"):
        boundary_band(np.zeros((2, 2), np.uint8), -1, ignore_index=None)
