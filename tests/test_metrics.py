"""Parts merge to the whole; replicates are what they say, and intervals as wide as of resampled pictures."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_scores import draw, score

from seguncert.metrics import Evaluation, poisson_weights
from seguncert.scores import boundary_band, calibration_error


def evaluate(pictures, order=None, **settings):
    evaluation = Evaluation.empty(5, ignore_index=255, maps={"margin": "high"}, replicates=50, **settings)
    for k in range(len(pictures)) if order is None else order:
        image, (logits, labels, margin) = evaluation.begin(), pictures[k]
        image.update(logits, labels, {"margin": margin}, boundary_band(labels, 1, ignore_index=255))
        evaluation.add(image, cluster=f"drive {k % 3}")
    return evaluation


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


def test_a_true_class_of_probability_zero_is_seen_in_means_and_intervals():
    logits = torch.tensor([0.0, -math.inf, -300.0]).view(3, 1, 1).expand(3, 1, 3)
    evaluation = Evaluation.empty(3, ignore_index=255)
    for k in range(4):
        image = evaluation.begin()
        image.update(logits, np.array([[0, k % 2, 2]]), {})
        evaluation.add(image, cluster=str(k))
    assert evaluation.compute()["nll_image_mean"] == math.inf and math.isnan(evaluation.compute()["nll_image_sd"])
    assert evaluation.intervals()["nll"][1] == math.inf and evaluation.intervals()["nll_image_mean"][0] < math.inf


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
