"""Sums of segmentation quality against float64 loops; parts merge to the whole; replicates are what they say."""

import inspect
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.metrics import confusion_matrix, log_loss, roc_auc_score

from seguncert.detection import RIGHT, VOID, WRONG
from seguncert.metrics import Evaluation, Reliability, Scores, boundary_band, calibration_error, poisson_weights


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


def evaluate(pictures, order=None, **settings):
    evaluation = Evaluation.empty(5, ignore_index=255, maps={"margin": "high"}, replicates=50, **settings)
    for k in range(len(pictures)) if order is None else order:
        image, (logits, labels, margin) = evaluation.begin(), pictures[k]
        image.update(logits, labels, {"margin": margin}, boundary_band(labels, 1, ignore_index=255))
        evaluation.add(image, cluster=f"drive {k % 3}")
    return evaluation


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


def test_parts_of_a_picture_add_up():
    logits, labels, margin = draw()
    evaluation = Evaluation.empty(5, ignore_index=255, maps={"margin": "high"})
    whole, parts = evaluation.begin(), evaluation.begin()
    whole.update(logits, labels, {"margin": torch.from_numpy(margin)})
    for rows in (slice(0, 1), slice(1, 20), slice(20, 31)):
        parts.update(logits[:, rows], labels[rows], {"margin": margin[rows]})
    for mine, theirs in zip(whole.scores.arrays(), parts.scores.arrays(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    for name in ("confidence", "margin"):
        np.testing.assert_array_equal(whole.detections[name].counts_2K, parts.detections[name].counts_2K)


def test_parts_of_a_run_merge_to_the_whole_in_any_order():
    pictures = [draw(seed=k) for k in range(7)]
    whole, merged = evaluate(pictures), evaluate(pictures, order=[])
    for part in (
        evaluate(pictures, order=[6, 1]),
        evaluate(pictures, order=[]),
        evaluate(pictures, order=[0, 5, 4, 3, 2]),
    ):
        merged.merge(part)
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-9)
    assert merged.intervals().keys() == whole.intervals().keys()
    for name, interval in whole.intervals().items():
        assert merged.intervals()[name] == pytest.approx(interval, rel=1e-9, abs=1e-12), name
    with pytest.raises(ValueError, match="merge: expected an evaluation with .*'seed': 0.* Received: .*'seed': 1"):
        whole.merge(evaluate(pictures, order=[], seed=1))


def test_compute_names_the_maps_with_the_sure_end_turned():
    pictures = [draw(seed=k) for k in range(2)]
    result = evaluate(pictures).compute()
    y, z = np.stack([p[1] for p in pictures]), torch.stack([p[0] for p in pictures])
    valid, wrong = y != 255, z.argmax(1).numpy() != y
    doubts = {"margin": 1 - np.stack([p[2] for p in pictures]), "confidence": 1 - z.softmax(1).amax(1).numpy()}
    for name, doubt in doubts.items():
        assert result[f"error_auroc.{name}"] == pytest.approx(roc_auc_score(wrong[valid], doubt[valid]), abs=2e-5)
        assert f"error_ap.{name}" in result and f"aurc.{name}" in result


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


def test_maps_are_checked_and_a_bad_picture_leaves_the_rest_alone():
    pictures = [draw(seed=k) for k in range(2)]
    evaluation = evaluate(pictures)
    before = evaluation.compute()
    logits, labels, margin = draw(seed=9)
    margin[3, 4] = np.nan
    for maps, text in [({"margin": margin}, "margin: .* Received: 1 .* nan"), ({}, "expected margin. Received: none")]:
        with pytest.raises(ValueError, match=text):
            evaluation.begin().update(logits, labels, maps)
    assert evaluation.compute() == before
    with pytest.raises(ValueError, match="maps: expected names with 'high' or 'low'.*confidence"):
        Evaluation.empty(5, ignore_index=None, maps={"confidence": "high"})


def test_a_true_class_of_probability_zero_is_seen():
    logits = torch.tensor([0.0, -math.inf, -300.0]).view(3, 1, 1).expand(3, 1, 3)
    summary = score(logits, np.array([[0, 1, 2]]))[0].compute()
    assert (summary["nll"], summary["nll_infinite_pixels"]) == (math.inf, 1)
    assert score(logits, np.array([[0, 255, 2]]))[0].compute()["nll"] == pytest.approx(150)  # small, but not 0
    evaluation = Evaluation.empty(3, ignore_index=255)
    for k in range(4):
        image = evaluation.begin()
        image.update(logits, np.array([[0, k % 2, 2]]), {})
        evaluation.add(image, cluster=str(k))
    assert evaluation.compute()["nll_image_mean"] == math.inf and math.isnan(evaluation.compute()["nll_image_sd"])
    assert evaluation.intervals()["nll"][1] == math.inf and evaluation.intervals()["nll_image_mean"][0] < math.inf


def test_many_classes_at_equal_odds():
    assert score(torch.zeros(256, 2, 500), np.ones((2, 500), int))[0].compute()["nll"] == pytest.approx(math.log(256))


@pytest.mark.parametrize("C, right, accuracy, brier", [(1, True, 1, 0), (3, True, 1, 0), (3, False, 0, 2)])
def test_certain_predictions(C, right, accuracy, brier):
    labels = np.arange(C * 4).reshape(C, 4) % C
    logits = torch.full((C, C, 4), -500.0)
    logits.scatter_(0, torch.from_numpy(labels if right else (labels + 1) % C)[None], 500.0)
    evaluation = Evaluation.empty(C, ignore_index=None)
    image = evaluation.begin()
    image.update(logits, labels, {})
    summary, result = evaluation.add(image, cluster="a"), evaluation.compute()
    assert (summary["accuracy"], summary["brier"], summary["ece"], summary["confidence"]) == (
        accuracy,
        brier,
        1 - accuracy,
        1,
    )
    assert result["miou"] == accuracy and result["nll"] == (0 if right else 1000)
    assert math.isnan(result["error_auroc.confidence"]) and math.isnan(result["ece_boundary"])
    assert evaluation.reliability()["interior"].count.tolist() == [0] * 14 + [4 * C]


def test_void_pictures_are_counted_but_do_not_enter_means():
    pictures = [draw(seed=k) for k in range(3)]
    evaluation = evaluate(pictures)
    before = evaluation.compute()
    logits, labels, margin = draw()
    empty = evaluation.begin()
    empty.update(logits, np.full_like(labels, 255), {"margin": margin})
    summary = evaluation.add(empty, cluster="empty")
    assert summary["pixels"] == 0 and all(math.isnan(v) for name, v in summary.items() if name != "pixels")
    nothing = evaluation.begin()
    nothing.update(logits[:, :0], labels[:0], {"margin": margin[:0]})
    evaluation.add(nothing, cluster="empty")
    assert evaluation.compute() == pytest.approx(before | {"images": 5})
    with pytest.raises(ValueError, match="expected at least one labelled pixel"):
        evaluate(pictures, order=[]).compute()


def test_means_over_pictures():
    pictures = [draw(seed=k, spread=1 + k) for k in range(5)]
    result = evaluate(pictures).compute()
    for name in ("accuracy", "nll", "brier", "ece"):
        values = [float(score(*picture[:2])[0].compute()[name]) for picture in pictures]
        assert result[f"{name}_image_mean"] == pytest.approx(np.mean(values))
        assert result[f"{name}_image_sd"] == pytest.approx(np.std(values, ddof=1))


def test_replicates_weight_whole_clusters():
    pictures = [draw(seed=k, spread=1 + k % 3) for k in range(9)]
    evaluation = evaluate(pictures, seed=4)
    hits = [np.diagonal(score(*picture[:2])[0].confusion).sum() for picture in pictures]
    pixels = [(picture[1] != 255).sum() for picture in pictures]
    weight = np.stack([poisson_weights(4, f"drive {k % 3}", 50) for k in range(9)])
    some = weight.sum(0) > 0
    replicates = np.sort((hits @ weight)[some] / (pixels @ weight)[some])
    n = len(replicates) - 1
    assert evaluation.intervals(0.9)["accuracy"] == pytest.approx(
        (replicates[round(n * 0.05)], replicates[round(n * 0.95)])
    )


def test_intervals_are_as_wide_as_those_of_resampled_pictures():
    rng = np.random.default_rng(0)
    pictures = [draw(H=8, W=9, seed=k, spread=rng.uniform(0.5, 4)) for k in range(60)]
    evaluation = Evaluation.empty(5, ignore_index=255, replicates=1000)
    for k, (logits, labels, _) in enumerate(pictures):
        image = evaluation.begin()
        image.update(logits, labels, {})
        evaluation.add(image, cluster=str(k))
    doubts, wrongs = [], []
    for logits, labels, _ in pictures:
        valid = labels != 255
        doubts.append(1 - logits.softmax(0).amax(0).numpy()[valid])
        wrongs.append((logits.argmax(0).numpy() != labels)[valid])
    drawn = []
    for _ in range(400):
        chosen = rng.integers(0, 60, 60)
        doubt, wrong = np.concatenate([doubts[k] for k in chosen]), np.concatenate([wrongs[k] for k in chosen])
        drawn.append((1 - wrong.mean(), calibration_error(1 - doubt, ~wrong), roc_auc_score(wrong, doubt)))
    expected, intervals = np.quantile(drawn, [0.025, 0.975], axis=0).T, evaluation.intervals()
    for name, (low, high) in zip(("accuracy", "ece", "error_auroc.confidence"), expected, strict=True):
        assert intervals[name] == pytest.approx((low, high), abs=0.2 * (high - low)), name
        assert low < evaluation.compute()[name] < high


def test_intervals_of_equal_clusters_have_no_width():
    evaluation = evaluate([draw()] * 3)
    for name, ends in evaluation.intervals().items():
        if not name.startswith(
            ("ece_l2", "error_ap", "error_fpr", "aurc", "e_aurc", "ause")
        ):  # depend on the number too
            assert ends == pytest.approx((evaluation.compute()[name],) * 2, abs=1e-6), name


def test_one_cluster_has_no_interval():
    evaluation = evaluate([draw(seed=k) for k in range(4)], order=[0, 3])
    assert all(math.isnan(end) for ends in evaluation.intervals().values() for end in ends)
    evaluation.merge(evaluate([draw(seed=k) for k in range(4)], order=[1]))
    low, high = evaluation.intervals()["nll"]
    assert low < high


def test_weights_are_poisson_and_differ_by_cluster_and_seed():
    weight = poisson_weights(0, "a", 100_000)
    for k in range(5):
        assert (weight == k).mean() == pytest.approx(math.exp(-1) / math.factorial(k), abs=5e-3)
    for other in (poisson_weights(0, "b", 100_000), poisson_weights(1, "a", 100_000)):
        assert abs(np.corrcoef(weight, other)[0, 1]) < 0.02


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
