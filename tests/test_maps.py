"""Maps against scipy in float64, at the bounds, and on logits that break naive formulas."""

import numpy as np
import pytest
import scipy.special
import torch

from seguncert import maps
from seguncert.moments import Moments


def reference(logits):
    """Confidence, margin and entropy in float64, by the textbook."""
    probs = scipy.special.softmax(logits.astype(np.float64), axis=0)
    ordered = np.sort(probs, axis=0)
    return {
        "confidence": ordered[-1],
        "margin": ordered[-1] - ordered[-2],
        "entropy": scipy.special.entr(probs).sum(0) / np.log(len(probs)),
    }


@pytest.mark.parametrize("C", [2, 3, 11, 200])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0, 300.0])
def test_equal_to_scipy(C, spread):
    logits = np.random.default_rng(C).normal(0, spread, (C, 13, 17)).astype(np.float32)
    labels, found = maps.describe(torch.from_numpy(logits), list(maps.OF_SOFTMAX))
    assert (labels.numpy() == logits.argmax(0)).all()
    for name, expected in reference(logits).items():
        assert found[name].dtype == torch.float32
        np.testing.assert_allclose(found[name].numpy(), expected, atol=1e-6, err_msg=name)


def test_one_hot_and_uniform_are_exact():
    one_hot = torch.zeros(5, 2, 2)
    one_hot[3] = 1e4
    labels, found = maps.describe(one_hot, list(maps.OF_SOFTMAX))
    assert (labels == 3).all()
    assert (found["entropy"] == 0).all() and (found["confidence"] == 1).all() and (found["margin"] == 1).all()
    _, found = maps.describe(torch.full((5, 2, 2), -7.0), list(maps.OF_SOFTMAX))
    assert (found["margin"] == 0).all()
    torch.testing.assert_close(found["entropy"], torch.ones(2, 2))
    torch.testing.assert_close(found["confidence"], torch.full((2, 2), 0.2))


def test_log_of_a_probability_that_is_zero():
    log_probs = torch.log(torch.tensor([0.5, 0.5, 0.0])).view(3, 1, 1)
    _, found = maps.describe(log_probs, list(maps.OF_SOFTMAX))
    assert found["entropy"].item() == pytest.approx(np.log(2) / np.log(3), abs=1e-6)
    assert found["confidence"].item() == pytest.approx(0.5) and found["margin"].item() == 0


def test_the_first_of_equal_logits_is_shown_and_inputs_stay():
    logits = torch.zeros(4, 3, 3)
    before = logits.clone()
    assert (maps.describe(logits, ["margin"])[0] == 0).all()
    assert torch.equal(logits, before)


def test_values_stay_in_range_for_any_logits():
    logits = torch.randn(7, 64, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 4, 64)
    for name, values in maps.describe(logits, list(maps.OF_SOFTMAX))[1].items():
        assert values.min() >= 0 and values.max() <= 1, name


def test_each_map_alone_equals_the_fused_one():
    logits = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(2))
    together = maps.describe(logits, list(maps.OF_SOFTMAX))[1]
    for function in (maps.confidence, maps.margin, maps.entropy):
        assert torch.equal(function(logits), together[function.__name__])


def test_full_scale():
    assert maps.MAPS["entropy"].full_scale(11) == pytest.approx(2.3978952727983707)
    assert maps.MAPS["margin"].full_scale(11) == 1.0
    assert maps.MAPS["set_size"].full_scale(11) == 10


@pytest.mark.parametrize("names", [[], ["entropy", "entropy"], ["entropie"]])
def test_names_are_checked(names):
    with pytest.raises(
        ValueError, match="expected one or more of confidence, entropy, margin, mutual.*, each once. Received:"
    ):
        maps.check_names(names)


def test_maps_of_samples_need_samples():
    maps.check_names(["variance", "confidence"], sampled=True)
    with pytest.raises(
        ValueError,
        match="maps: variance describe the spread of samples, .* Set a method that has: mc-dropout, sampling-free",
    ):
        maps.check_names(["variance", "confidence"])


def test_the_map_of_sets_needs_sets():
    maps.check_names(["set_size", "confidence"], sets=True)
    with pytest.raises(ValueError, match="maps: set_size is of conformal sets, .* `seguncert conformal` makes them"):
        maps.check_names(["set_size", "confidence"], sampled=True)


def test_maps_of_samples_are_divided_by_their_bounds():
    moments = Moments.empty(4, 1, 1)
    moments.update(1e4 * torch.eye(4).view(4, 4, 1, 1))  # four samples, each sure of another class
    found = maps.describe_spread(moments, maps.OF_SAMPLES)
    assert {name: round(value.item(), 6) for name, value in found.items()} == {
        "mutual_information": 1.0, "variance": 1.0, "expected_entropy": 0.0,
    }  # fmt: skip
    assert maps.MAPS["variance"].full_scale(4) == 0.75
