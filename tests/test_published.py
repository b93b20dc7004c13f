"""The published protocol against plain loops over bins, classes and pixels."""

import random

import numpy as np
import pytest

from seguncert.published import NAMES, LocalTemperatureScaling, boundary, image_errors, local_squares


def draw(H=180, W=200, seed=0, C=4, void=11):
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, C, (-(-H // 10), -(-W // 10))), np.ones((10, 10), int))[:H, :W]
    labels[rng.random((H, W)) < 0.05] = void
    shown = np.where(rng.random((H, W)) < 0.8, labels, 0).clip(0, C - 1).astype(np.uint8)
    return (0.25 + 0.75 * rng.random((H, W))).astype(np.float32), shown, labels


def plainly(confidence, shown, labels, region):
    """ECE, MCE, SCE, ACE with a loop over bins, and one over classes within."""
    ece = mce = sce = ace = 0.0
    right = shown == labels
    tenths = [0.0, *(np.percentile(confidence, 10 * k) for k in range(1, 10)), 1.0]
    for k in range(10):
        wide = region & (confidence > k / 10) & (confidence <= (k + 1) / 10)
        if wide.any():
            gap = abs(confidence[wide].astype(float).mean() - right[wide].mean())
            ece, mce = ece + gap * wide.sum() / region.sum(), max(mce, gap)
        same = region & (confidence > tenths[k]) & (confidence <= tenths[k + 1])
        for c in range(12):
            for bins in (wide, same):
                part = bins & (shown == c)
                if part.any():
                    gap = abs(confidence[part].astype(float).mean() - right[part].mean()) * part.sum() / region.sum()
                    sce, ace = (sce + gap, ace) if bins is wide else (sce, ace + gap)
    return [ece, mce, sce, ace]


def test_errors_equal_plain_loops_with_void_as_an_error():
    confidence, shown, labels = draw()
    whole, edge, squares = image_errors(confidence, shown, labels, 0)
    everywhere = np.ones(labels.shape, bool)
    assert whole[0] == pytest.approx(plainly(confidence, shown, labels, everywhere), abs=1e-6)
    assert edge[0] == pytest.approx(plainly(confidence, shown, labels, boundary(labels)), abs=1e-6)
    assert len(squares) == 10
    for found, (rows, columns) in zip(squares, local_squares(180, 200, 0), strict=True):
        cut = confidence[rows, columns], shown[rows, columns], labels[rows, columns]
        assert found == pytest.approx(plainly(*cut, np.ones((72, 72), bool)), abs=1e-6)


def test_the_boundary_is_a_cross_of_two_pixels_away_from_the_edge():
    labels = np.zeros((11, 11), int)
    labels[5, 5] = labels[0, 0] = 1
    expected = np.zeros((11, 11), bool)
    expected[5, 3:8] = expected[3:8, 5] = True
    np.testing.assert_array_equal(boundary(labels), expected)
    assert not boundary(np.zeros((11, 11), int)).any() and not boundary(np.eye(5, dtype=int)).any()


def test_squares_are_those_of_one_sequence_of_draws():
    random.seed(10)
    for number in range(3):
        for rows, columns in local_squares(360, 480, number):
            y, x = random.randint(84, 360 - 84), random.randint(84, 480 - 84)
            assert (rows, columns) == (slice(y - 36, y + 36), slice(x - 36, x + 36))
    assert not list(local_squares(360, 167, 0)) and len(list(local_squares(168, 168, 5))) == 10


def test_means_and_deviations_are_over_images_and_over_squares():
    sums = LocalTemperatureScaling.empty(replicates=20)
    images = [image_errors(*draw(seed=k), k) for k in range(3)] + [image_errors(*draw(60, 60, seed=9), 3)]
    for k, errors in enumerate(images):
        sums.add(errors, cluster=f"drive {k}")
    result = sums.compute()
    for region, name in enumerate(("all", "boundary", "local")):
        every = np.concatenate([errors[region] for errors in images])
        assert len(every) == (30 if name == "local" else 4)
        for k, error in enumerate(("ece", "mce", "sce", "ace")):
            assert result[f"lts_{error}_{name}"] == pytest.approx(every[:, k].mean())
            assert result[f"lts_{error}_{name}_sd"] == pytest.approx(every[:, k].std())
    low, high = sums.intervals()["lts_ece_all"]
    assert low <= result["lts_ece_all"] <= high


def test_nothing_and_a_single_value():
    empty = LocalTemperatureScaling.empty()
    assert all(np.isnan(empty.compute()[name]) for name in NAMES)
    flat = np.ones((20, 20), np.float32), np.zeros((20, 20), np.uint8), np.zeros((20, 20), int)
    whole, edge, squares = image_errors(*flat, 0)
    assert whole.tolist() == [[0] * 4] and edge.tolist() == [[0] * 4] and squares.shape == (0, 4)
