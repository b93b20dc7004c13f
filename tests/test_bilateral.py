"""The joint bilateral filter against its formula in plain loops, and what it promises."""

import numpy as np
import pytest

from seguncert.bilateral import joint_bilateral


def bilateral_loops(values_Cij, colours_ij3, place, colour):
    """In float64, pixel by pixel: every third of a standard deviation of place is asked, up to two of them away."""
    _, i, j = values_Cij.shape
    step = max(1, round(place / 3))
    offsets = [d * step for d in range(-int(2 * place / step), int(2 * place / step) + 1)]
    found = np.zeros(values_Cij.shape)
    for y in range(i):
        for x in range(j):
            there = [(y + dy, x + dx) for dy in offsets for dx in offsets if 0 <= y + dy < i and 0 <= x + dx < j]
            off = np.array([(a - y) ** 2 + (b - x) ** 2 for a, b in there]) / place**2
            off = off + np.array([((colours_ij3[each] - colours_ij3[y, x]) ** 2).sum() for each in there]) / colour**2
            weight = np.exp(-off / 2)
            found[:, y, x] = sum(w * values_Cij[(slice(None), *each)] for w, each in zip(weight, there, strict=True)) / weight.sum()  # fmt: skip
    return found


def drawn(C, i, j, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.dirichlet(np.ones(C), (i, j)).transpose(2, 0, 1).astype(np.float32)
    return values, (rng.random((1, 1, 3)) + 0.1 * rng.normal(0, 1, (i, j, 3))).clip(0, 1).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 20, 27), (2, 1, 1), (5, 1, 30), (4, 30, 1), (11, 3, 5)])
@pytest.mark.parametrize(("place", "colour"), [(0.4, 0.05), (2.0, 0.1), (6.0, 0.05), (9.5, 1.0)])
def test_by_its_formula(shape, place, colour):
    values, colours = drawn(*shape)
    expected = bilateral_loops(values.astype(float), colours.astype(float), place, colour)
    np.testing.assert_allclose(joint_bilateral(values, colours, place, colour), expected, atol=2e-6)


def test_a_mean_of_probabilities_is_probabilities():
    values, colours = drawn(7, 40, 50)
    found = joint_bilateral(values, colours, 6.0, 0.05)
    np.testing.assert_allclose(found.sum(0), 1, atol=2e-6)
    assert found.min() >= 0 and found.std() < 0.7 * values.std()
    same = joint_bilateral(np.full((2, 40, 50), 0.3, np.float32), colours, 6.0, 0.05)
    np.testing.assert_allclose(same, 0.3, rtol=2e-6)


def test_nothing_passes_where_the_colour_changes():
    """Left and right differ in colour by 20 standard deviations, and in what they say."""
    left = np.arange(30) < 15
    colours = np.where(left, 0.0, 1.0)[None, :, None] * np.ones((20, 30, 3))
    values = np.where(left, 0.9, 0.2)[None, None] * np.ones((1, 20, 30))
    found = joint_bilateral(values.astype(np.float32), colours.astype(np.float32), 6.0, 0.05)
    np.testing.assert_allclose(found, values, rtol=2e-6)
    blurred = joint_bilateral(values.astype(np.float32), 0 * colours.astype(np.float32), 6.0, 0.05)
    assert abs(blurred - values).max() > 0.2


def test_the_photo_may_be_transposed_or_turned():
    values, colours = drawn(3, 24, 24)
    found = joint_bilateral(values, colours, 6.0, 0.1)
    swapped = joint_bilateral(values.swapaxes(1, 2), colours.swapaxes(0, 1), 6.0, 0.1)
    np.testing.assert_allclose(swapped.swapaxes(1, 2), found, atol=1e-6)
    turned = joint_bilateral(values[:, ::-1, ::-1], colours[::-1, ::-1], 6.0, 0.1)
    np.testing.assert_allclose(turned[:, ::-1, ::-1], found, atol=1e-6)
