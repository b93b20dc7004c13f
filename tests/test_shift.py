"""Sums under conditions against `Scores`, replicates against a plain loop, and parts that give the whole."""

import numpy as np
import pytest
import torch

from seguncert.labels import IGNORED
from seguncert.metrics import poisson_weights
from seguncert.scores import Scores
from seguncert.shift import CLEAN, SHOWN, Shift, Shifted, Sums, conditions

C, H, W = 4, 24, 36


def scores_of(seed, infinite=False):
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    logits = 3 * torch.randn(C, H, W, generator=generator)
    if infinite:
        logits[:3, 0, 0], logits[3, 0, 0] = -torch.inf, 0
    labels = np.where(rng.random((H, W)) < 0.6, logits.argmax(0).numpy(), 0)
    labels[rng.random((H, W)) < 0.1] = IGNORED
    labels[0, 0] = 0
    scores = Scores.empty(C)
    scores.update(logits, labels, np.arange(W) % 3 == labels * 0, ignore_index=IGNORED)
    return scores


@pytest.mark.parametrize("infinite", [False, True])
def test_figures_are_those_of_the_scores(infinite):
    scores = scores_of(1, infinite)
    found, expected = Sums.of(scores).compute(), scores.compute()
    expected["confidence"] = scores.regions.forecast.sum() / scores.confusion.sum()
    assert np.isinf(found["nll"]) == infinite
    for name, value in found.items():
        assert value == pytest.approx(float(expected[name])), name
    assert all(np.isnan(value) for value in Sums.empty(C).compute().values())


def test_parts_merge_to_the_whole_and_replicates_are_weighted_sums():
    parts, weights = [scores_of(k) for k in range(3)], np.random.default_rng(0).integers(0, 4, (3, 5))
    whole, merged, replicates = Scores.empty(C), Sums.empty(C), Sums.empty(C, 5)
    for part, weight_B in zip(parts, weights, strict=True):
        whole.merge(part)
        merged.merge(Sums.of(part))
        replicates.merge(Sums.of(part), weight_B)
    for mine, theirs in zip(merged.arrays(), Sums.of(whole).arrays(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    for b in range(5):
        drawn = Sums.empty(C)
        for part, weight_B in zip(parts, weights, strict=True):
            for _ in range(weight_B[b]):
                drawn.merge(Sums.of(part))
        for name, value in drawn.compute().items():
            assert replicates.compute()[name][b] == pytest.approx(float(value), nan_ok=True), name


def shift_of(photos, stages=2, replicates=40):
    return Shift(("fog", "jpeg"), frozenset(photos), len(photos), C, stages, replicates, 0)


def test_conditions_and_stages_are_paired():
    shift, paths = shift_of("abcd"), "abcd"
    for k, path in enumerate(paths):
        now, before = Sums.of(scores_of(k)), Sums.of(scores_of(10 + k))
        shift.add(path, Shifted(dict.fromkeys(conditions(shift.names), (now, before))), cluster=path)
    found = shift.compute(0.95)
    assert set(found) == set(conditions(["fog", "jpeg"])) and found["fog.1"] == found[CLEAN] == found["jpeg.5"]
    one = found["fog.1"]
    assert one["change"]["nll"] == pytest.approx(one["nll"] - one["before"]["nll"])
    each_B = []
    for stage in (0, 10):
        drawn = Sums.empty(C, 40)
        for k, path in enumerate(paths):
            drawn.merge(Sums.of(scores_of(stage + k)), poisson_weights(0, path, 40))
        each_B.append(drawn.compute()["nll"])
    low, high = one["change"]["nll_interval"]
    change_B = each_B[0] - each_B[1]
    assert {low, high} <= set(change_B.tolist()) and low < one["change"]["nll"] < high
    assert shift.images == 4 and len(shift.clusters) == 4


def test_one_cluster_has_no_interval_and_no_photo_no_figures():
    shift = shift_of("a", stages=1)
    assert np.isnan(shift.compute(0.95)[CLEAN]["ece"])
    shift.add("a", Shifted({each: (Sums.of(scores_of(1)),) for each in conditions(shift.names)}), cluster="a")
    found = shift.compute(0.95)["jpeg.2"]
    assert found["ece"] > 0 and np.isnan(found["ece_interval"]).all() and "before" not in found


def test_pictures_are_of_the_first_photo_and_names_stand_in_errors():
    shift, rgb, labels = shift_of("ab", stages=1), np.full((40, 60, 3), 90, np.uint8), np.zeros((40, 60), np.uint8)
    seen = []

    def predict(worse):
        seen.append(worse)
        yield slice(0, 40), [torch.zeros(C, 40, 60)]

    for path in "ab":
        shifted = shift.judge(path, rgb, labels, [scores_of(0)], predict)
        assert (shifted.pictures is None) == (path == "b")
        shift.add(path, shifted, cluster=path)
    assert shift.example == "a" and len(seen) == 20 and not np.array_equal(seen[0], seen[10])
    assert set(shift.pictures) == {CLEAN, *(f"{name}.{each}" for name in shift.names for each in SHOWN)}
    with pytest.raises(ValueError, match="fog of severity 1: logits: expected finite numbers"):
        shift.judge(
            "a", rgb, labels, [scores_of(0)], lambda worse: iter([(slice(0, 40), [torch.full((C, 40, 60), torch.nan)])])
        )
