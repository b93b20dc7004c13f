"""Against a float64 loop by hand, and finite differences."""

import inspect

import numpy as np
import pytest
from scipy.special import log_softmax

from seguncert.slopes import BLOCK, scaled_nll

C = 11


def plain(logits_NC, shares_NC, eta_N):
    """NLL of each pixel, in float64."""
    log_NC = log_softmax(np.exp(eta_N)[:, None] * logits_NC.astype(np.float64), axis=1)
    return -np.where(shares_NC > 0, shares_NC * log_NC, 0).sum(1)


@pytest.fixture
def pixels():
    rng = np.random.default_rng(0)
    N = 2 * BLOCK + 37
    logits_NC = rng.normal(3, 5, (N, C)).astype(np.float32)
    return logits_NC, rng.integers(0, C, N).astype(np.uint8), rng.normal(0, 0.5, N).astype(np.float32)


@pytest.mark.parametrize("soft", [False, True])
def test_nll_and_derivatives(pixels, soft):
    logits_NC, labels_N, eta_N = pixels
    shares_NC = np.eye(C, dtype=np.float32)[labels_N]
    if soft:
        shares_NC = (shares_NC + np.roll(shares_NC, 1, axis=0)) / 2
    nll, slope_N, curvature_N = scaled_nll(logits_NC, shares_NC if soft else labels_N, eta_N)
    assert nll == pytest.approx(plain(logits_NC, shares_NC, eta_N).sum(), rel=1e-6)
    h, eta_N = 1e-4, eta_N.astype(np.float64)
    below_N, now_N, above_N = (plain(logits_NC, shares_NC, eta_N + step) for step in (-h, 0, h))
    assert np.abs(slope_N - (above_N - below_N) / (2 * h)).max() < 2e-5
    exact_N = (above_N - 2 * now_N + below_N) / h**2  # curvature and slope: ln β stands in the exponent
    assert np.abs(curvature_N + slope_N - exact_N).max() < 2e-4
    assert (curvature_N >= 0).all()


def test_shift_of_a_pixel_changes_nothing(pixels):
    logits_NC, labels_N, eta_N = pixels
    nll, slope_N, _ = scaled_nll(logits_NC, labels_N, eta_N)
    moved, moved_N, _ = scaled_nll(logits_NC + np.float32(256), labels_N, eta_N)
    assert moved == pytest.approx(nll, rel=1e-5)
    assert np.abs(moved_N - slope_N).max() < 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_faulty_logits_are_seen(pixels, value):
    logits_NC, labels_N, eta_N = pixels
    logits_NC[BLOCK + 3, 4] = value
    assert np.isnan(scaled_nll(logits_NC, labels_N, eta_N)[0])


@pytest.mark.parametrize("votes", [np.array([0, 1]), np.array([[1, 0, 0], [0.5, 0.5, 0]], np.float32)])
def test_minus_infinity_is_a_very_small_probability(votes):
    logits_NC = np.array([[0, -np.inf, -np.inf], [0, -np.inf, 1]], np.float32)
    nll, slope_N, curvature_N = scaled_nll(logits_NC, votes, np.zeros(2, np.float32))
    gap = 104 if votes.ndim == 1 else (1 + 104) / 2  # of what the raters say to the largest logit
    assert nll == pytest.approx(gap + np.log1p(np.exp(-1)), rel=1e-6)
    assert np.isfinite(slope_N).all() and np.isfinite(curvature_N).all()


def test_no_pixel():
    nll, slope_N, _ = scaled_nll(np.empty((0, 3), np.float32), np.empty(0, np.uint8), np.empty(0, np.float32))
    assert nll == 0 and len(slope_N) == 0


def test_another_number_of_labels_is_an_error():
    with pytest.raises(ValueError, match=r"votes: expected shape \(2,\). Received: \(3,\)"):
        inspect.unwrap(scaled_nll)(np.zeros((2, 3), np.float32), np.zeros(3, np.uint8), np.zeros(2, np.float32))
