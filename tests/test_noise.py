"""The hash behind dropout masks and noise behaves like independent draws, and depends on nothing but the place."""

import numpy as np
import pytest
from scipy import stats

from seguncert.noise import _quantiles, keep_or_drop, normals

SHAPE = 64, 96, 120


def signs(key, keep=0.5):
    return (keep_or_drop(key, keep, 1.0, SHAPE) - keep) / np.sqrt(keep * (1 - keep))


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9])
def test_as_many_are_kept_as_should_be(keep):
    mask = keep_or_drop(11, keep, 3.0, SHAPE)
    assert set(np.unique(mask)) <= {0.0, 3.0}
    assert stats.binomtest(int((mask > 0).sum()), mask.size, keep).pvalue > 1e-4


@pytest.mark.parametrize("keep", [0.1, 0.5])
@pytest.mark.parametrize("axis, shift", [(0, 1), (0, 32), (1, 1), (1, 2), (2, 1), (2, 2), (2, 16), (2, 64)])
def test_neighbours_are_independent(keep, axis, shift):
    one = signs(2**40 + 5, keep)
    z = (one * np.roll(one, shift, axis)).mean() * np.sqrt(one.size)
    assert abs(z) < 4


@pytest.mark.parametrize("key", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_keys_are_independent_also_close_ones(key):
    z = (signs(77) * signs(77 ^ max(key, 1))).mean() * np.sqrt(np.prod(SHAPE))
    assert abs(z) < 4


@pytest.mark.parametrize("axes", [(1, 2), (0, 2), (0, 1), (2,), (1,), (0,)])
def test_sums_along_any_axis_spread_as_those_of_coins(axes):
    one = signs(5)
    sums = one.sum(axes).ravel() / np.sqrt(np.prod([SHAPE[axis] for axis in axes]))
    low, high = stats.chi2(len(sums)).ppf([1e-5, 1 - 1e-5]) / len(sums)
    assert low < (sums**2).mean() < high


def test_triples_are_independent():
    one = signs(9)
    for other, third in ((np.roll(one, 1, 2), np.roll(one, 1, 1)), (np.roll(one, 1, 0), np.roll(one, 3, 2))):
        assert abs((one * other * third).mean()) * np.sqrt(one.size) < 4


def test_a_window_is_cut_out_of_the_whole_in_any_layout():
    whole = keep_or_drop(3, 0.7, 1.0, (5, 40, 60))
    for last in (False, True):
        part = keep_or_drop(3, 0.7, 1.0, (5, 17, 23), (11, 29), last)
        np.testing.assert_array_equal(part, whole[:, 11:28, 29:52])


def test_quantiles_are_scipys():
    middle = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint64)
    bits_N = np.r_[0:9, 2**32 - 9 : 2**32, 2**31 - 9 : 2**31 + 9, middle].astype(np.uint32)
    found_N = np.empty(len(bits_N), np.float32)
    _quantiles(bits_N, found_N)
    np.testing.assert_allclose(found_N, stats.norm.ppf((bits_N + 0.5) / 2**32), rtol=1e-6, atol=1e-7)


def test_noise_is_standard_normal_and_of_its_place_in_any_layout():
    whole = normals(3, SHAPE)
    assert stats.kstest(whole.ravel()[::5], "norm").pvalue > 1e-4
    for last in (False, True):
        np.testing.assert_array_equal(normals(3, (64, 17, 23), (11, 29), last), whole[:, 11:28, 29:52])
