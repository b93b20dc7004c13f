"""Fits against scipy and scikit-learn in float64 on the same pixels; what is drawn; what is chosen."""

import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.isotonic import IsotonicRegression

from seguncert import fitting
from seguncert.calibration import CalibrationError
from seguncert.calibrators import KINDS, Scaling
from seguncert.fitting import BINS, HARM, MOST, RIDGE, Drawn, Pixels, choose, compare, fit, folds_of
from seguncert.surroundings import FEATURES

NAMES = ("picture", "entropy 31", "agreement 41")


def drawn(picture, group, *, N=400, C=4, beta=0.5, seed=0, spread=3.0, names=NAMES, of_class=None):
    """Pixels whose labels follow softmax(β z); what is seen of the surroundings tells something of β, but for the first."""
    rng = np.random.default_rng([seed, *picture.encode()])
    z = rng.normal(0, spread, (N, C))
    seen = rng.normal(0, 1, (N, len(names)))
    seen[:, :1] = rng.normal(-2, 0.3)
    eta = np.log(beta) + (0.3 * np.tanh(seen[:, 1]) if len(names) > 1 else np.zeros(N))
    if of_class is not None:
        eta = eta + np.array(of_class)[z.argmax(1)]
    p = softmax(np.exp(eta)[:, None] * z, 1)
    label = (p.cumsum(1) < rng.random((N, 1))).sum(1).clip(max=C - 1)
    around = np.log(softmax(0.3 * z + rng.normal(0, 1, (N, C)), 1) + 1e-5)
    return Drawn(z.astype(np.float32), label, seen.astype(np.float32), picture, group, around.astype(np.float32))


def sample(groups=3, pictures=4, C=4, names=NAMES, **options):
    all_of = [drawn(f"s{g}_{k:03}.png", f"s{g}", C=C, names=names, **options) for g in range(groups) for k in range(pictures)]  # fmt: skip
    return Pixels(C, names, drawn=all_of)


def arrays(pixels):
    """Logits less their largest, shares, features, ln of what is around; all float64."""
    z, y, f = (np.concatenate([np.float64(getattr(each, name)) for each in pixels.drawn]) for name in ("logits_NC", "votes_NC", "features_NF"))  # fmt: skip
    around = np.concatenate([np.float64(each.around_NC) for each in pixels.drawn])
    t = np.eye(pixels.C)[y.astype(int)] if y.ndim == 1 else y
    return z - z.max(1, keepdims=True), t, f, around


def nll(logits, t):
    return -(t * log_softmax(logits, 1)).sum(1).mean()


@pytest.fixture(scope="module")
def pixels():
    return sample()


# Fits


@pytest.mark.parametrize("beta, spread", [(0.5, 3.0), (1.0, 1.0), (4.0, 0.3), (0.02, 100.0), (60.0, 0.05)])
def test_temperature_is_the_optimum(beta, spread):
    pixels = sample(beta=beta, spread=spread)
    z, t, _, _ = arrays(pixels)
    best = minimize_scalar(lambda eta: nll(np.exp(eta) * z, t), bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})  # fmt: skip
    assert fit("temperature", pixels).constant == pytest.approx(best.x, abs=2e-5)


def test_class_conditional_is_the_optimum():
    pixels = sample(of_class=(0.6, 0.0, -0.4, 0.2))
    z, t, _, _ = arrays(pixels)
    shown = np.eye(4)[z.argmax(1)]

    def loss(weights):
        ridge = 0.5 * RIDGE["class-conditional"] * (weights[1:] ** 2).sum()
        return nll(np.exp(weights[0] + shown @ weights[1:])[:, None] * z, t) + ridge

    best = minimize(loss, np.zeros(5), tol=1e-10)
    found = fit("class-conditional", pixels)
    weights = np.array([found.constant, *found.of_class])
    assert loss(weights) <= best.fun + 1e-8
    np.testing.assert_allclose(weights, best.x, atol=2e-3)
    assert np.ptp(found.of_class) > 0.5


def curve_at(curve, value):
    places = [curve.low, *curve.knots]
    value = np.clip(value, curve.low, curve.high)
    return sum(slope * np.maximum(value - place, 0) for slope, place in zip(curve.slopes, places, strict=True))


def test_local_is_an_optimum_of_what_it_is_made_of(pixels):
    z, t, f, _ = arrays(pixels)
    found = fit("local", pixels)
    assert [curve.feature for curve in found.curves] == list(NAMES)
    assert [len(curve.knots) for curve in found.curves] == [0, 4, 4]

    def loss(weights):
        given = iter(weights[1:])
        curves = [replace(curve, slopes=tuple(next(given) for _ in curve.slopes)) for curve in found.curves]
        eta = weights[0] + sum(curve_at(curve, f[:, NAMES.index(curve.feature)]) for curve in curves)
        ridge = sum((np.array(c.slopes) ** 2).sum() * (c.high - c.low) ** 2 for c in curves)
        return nll(np.exp(eta)[:, None] * z, t) + 0.5 * RIDGE["local"] * ridge

    weights = np.array([found.constant, *(slope for curve in found.curves for slope in curve.slopes)])
    best = minimize(loss, np.zeros(len(weights)), tol=1e-9)
    assert loss(weights) <= best.fun + 1e-7
    assert nll(z, t) > fit_nll(fit("temperature", pixels), pixels) > fit_nll(found, pixels) + 0.002


def fit_nll(calibrator, pixels):
    found = pixels.nll(calibrator).values()
    return sum(total for total, _ in found) / sum(n for _, n in found)


def test_neighbourhood_weighs_what_is_around_as_the_convex_optimum_does(pixels):
    z, t, f, around = arrays(pixels)
    x = np.stack([log_softmax(z, 1), around], 1)
    doubt = f[:, NAMES.index("picture")]
    x = np.concatenate([x, x * (doubt - doubt.mean())[:, None, None]], 1)

    def loss(weights):
        logits = np.einsum("npc,p->nc", x, weights)
        p = softmax(logits, 1)
        return nll(logits, t), np.einsum("npc,nc->p", x, p - t) / len(t)

    best = minimize(loss, np.eye(4)[0], jac=True, tol=1e-10)
    found = fit("neighbourhood", pixels)
    weights = np.array(found.weights).T.ravel()
    assert loss(weights)[0] <= best.fun + 1e-8
    np.testing.assert_allclose(weights, best.x, atol=5e-3)
    assert (found.low, found.high) == (doubt.min(), doubt.max()) and found.middle == pytest.approx(doubt.mean())


def test_vector_is_the_optimum(pixels):
    z, t, _, _ = arrays(pixels)
    best = minimize(lambda w: nll(z * w[:4] + w[4:], t), np.repeat([1.0, 0.0], 4), tol=1e-10)
    found = fit("vector", pixels)
    factors, biases = best.x[:4], best.x[4:] - best.x[4:].mean()
    np.testing.assert_allclose(found.factors, factors, atol=2e-3)
    np.testing.assert_allclose(found.biases, biases, atol=2e-3)
    assert fit_nll(found, pixels) == pytest.approx(best.fun, abs=1e-7)


def test_isotonic_is_that_of_scikit_learn(pixels):
    z, t, _, _ = arrays(pixels)
    few = replace(pixels, drawn=pixels.drawn[:5])
    z, t, _, _ = arrays(few)
    p = softmax(z, 1)
    top, hit = p.max(1), t[np.arange(len(t)), p.argmax(1)]
    assert len(top) < BINS["isotonic"], "a bin for each pixel"
    rising = IsotonicRegression().fit_transform(top, hit)
    found = fit("isotonic", few)
    values, pool = np.unique(rising, return_inverse=True)
    np.testing.assert_allclose(found.values, np.clip(values, 1e-6, 1 - 1e-6), atol=1e-9)
    means = np.bincount(pool, top) / np.bincount(pool)
    np.testing.assert_allclose(found.confidences, means, atol=1e-6)


def test_isotonic_of_many_pixels_is_that_of_their_bins():
    pixels = sample(pictures=8)
    z, t, _, _ = arrays(pixels)
    assert len(z) > 2 * BINS["isotonic"]
    p = softmax(z, 1)
    top, hit = p.max(1), t[np.arange(len(t)), p.argmax(1)]
    exact = IsotonicRegression(out_of_bounds="clip").fit(top, hit)
    found, at = fit("isotonic", pixels), np.linspace(0.3, 1, 200)
    difference = np.interp(at, found.confidences, found.values) - exact.predict(at)
    assert np.abs(difference).mean() < 0.02 and np.all(np.diff(found.values) > 0)


def test_histogram_is_the_rate_of_hits_in_bins_of_equal_mass(pixels):
    z, t, _, _ = arrays(pixels)
    p = softmax(z, 1)
    top, hit = p.max(1), t[np.arange(len(t)), p.argmax(1)]
    order = np.argsort(top)
    found = fit("histogram", pixels)
    assert len(found.values) == 30
    start = 0
    for k in range(1, 16):
        end = len(top) if k == 15 else int(np.linspace(0, len(top) - 1, 16)[k])
        expected = hit[order[start:end]].mean()
        middle = top[order[start + 1 : end - 1]]
        np.testing.assert_allclose(np.interp(middle, found.confidences, found.values), expected, atol=1e-9)
        start = end


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_what_is_fitted(kind, pixels):
    """What the fit believes and what the calibrator does to logits are the same: NLL on the sample is not above none's."""
    found = fit(kind, pixels)
    before, after = fit_nll(None, pixels), fit_nll(found, pixels)
    z, t, _, _ = arrays(pixels)
    assert before == pytest.approx(nll(z, t), rel=1e-6)
    assert after < before - 0.02
    if isinstance(found, Scaling) and not found.curves:
        beta = np.exp(found.constant + np.array(found.of_class or [0] * 4)[z.argmax(1)])
        assert after == pytest.approx(nll(beta[:, None] * z, t), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_of_the_logits_does_not_matter(kind, pixels):
    moved = replace(pixels, drawn=[replace(each, logits_NC=each.logits_NC + np.float32(32)) for each in pixels.drawn])
    here, there = fit(kind, pixels), fit(kind, moved)
    assert fit_nll(here, pixels) == pytest.approx(fit_nll(there, moved), abs=1e-5)
    assert fit_nll(here, moved) == pytest.approx(fit_nll(here, pixels), abs=1e-4)


@pytest.mark.parametrize("kind", ["temperature", "class-conditional", "vector", "isotonic", "local", "neighbourhood"])
def test_shares_of_raters_are_as_good_as_their_labels_one_after_another(kind, pixels):
    rng, twice, shares = np.random.default_rng(3), [], []
    for each in pixels.drawn:
        other = rng.integers(0, 4, len(each))
        both = np.where(rng.random(len(each)) < 0.2, other, each.votes_NC)
        shares.append(replace(each, votes_NC=np.float32((np.eye(4)[each.votes_NC] + np.eye(4)[both]) / 2)))
        twice += [each, replace(each, votes_NC=both)]
    soft, hard = (fit(kind, replace(pixels, drawn=all_of)) for all_of in (shares, twice))
    one, two = (fit_nll(each, replace(pixels, drawn=shares)) for each in (soft, hard))
    assert one == pytest.approx(two, abs=2e-5 if kind != "isotonic" else 2e-3)  # twice the pixels have other bins
    if kind in ("temperature", "class-conditional"):
        assert soft.constant == pytest.approx(hard.constant, abs=1e-5)


# Where there is no best temperature


def with_labels(pixels, label_of, scale=1.0):
    return replace(pixels, drawn=[
        replace(each, logits_NC=np.float32(scale) * each.logits_NC, votes_NC=label_of(each.logits_NC)) for each in pixels.drawn
    ])  # fmt: skip


@pytest.mark.parametrize("kind", ["temperature", "class-conditional", "local"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 1e3, 1e6])
def test_all_pixels_right_is_an_error_however_far_the_logits_are_apart(kind, scale, pixels):
    apart = replace(pixels, drawn=[replace(each, logits_NC=np.float32(5) * np.sign(each.logits_NC - each.logits_NC.max(1, keepdims=True) + 1e-6)) for each in pixels.drawn])  # fmt: skip
    for some in (pixels, apart):
        with pytest.raises(CalibrationError) as error:
            fit(kind, with_labels(some, lambda z: z.argmax(1), scale))
        assert str(error.value) == (
            "temperature: expected one from 0.01 to 100. Received: less; all pixels are right."
            " Use more pictures, or check that labels and model belong together."
        )


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_labels_that_the_logits_say_nothing_of_are_an_error(scale, pixels):
    with pytest.raises(CalibrationError, match="Received: more; the logits say nothing of the labels. Use more"):
        fit("temperature", with_labels(pixels, lambda z: z.argmin(1), scale))
    rng = np.random.default_rng(0)
    with pytest.raises(CalibrationError, match="the logits say nothing of the labels"):
        fit("temperature", with_labels(pixels, lambda z: rng.integers(0, 4, len(z)), 1e3 * scale))


def test_one_wrong_pixel_is_enough_for_a_temperature(pixels):
    def label(z):
        found = z.argmax(1)
        found[0] = z[0].argsort()[-2]
        return found

    z, t, _, _ = arrays(with_labels(pixels, label))
    best = minimize_scalar(lambda eta: nll(np.exp(eta) * z, t), bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})  # fmt: skip
    assert fit("temperature", with_labels(pixels, label)).constant == pytest.approx(best.x, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_fitted_is_named(kind, pixels):
    with pytest.raises(CalibrationError, match="expected labelled pixels. Received: none; are all labels the ignore"):
        fit(kind, replace(pixels, drawn=[]))
    if kind not in ("histogram", "isotonic"):
        broken = [replace(each, logits_NC=each.logits_NC * np.float32(np.nan)) for each in pixels.drawn]
        with pytest.raises(CalibrationError, match="expected finite logits. Received: NaN or infinity among them"):
            fit(kind, replace(pixels, drawn=broken))


def test_an_unknown_kind(pixels):
    with pytest.raises(CalibrationError, match="calibrator: expected auto or one of temperature, .*. Received: 'magic'"):  # fmt: skip
        fit("magic", pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_no_sample_gave_anything(kind, pixels):
    logits = [np.where(each.logits_NC < -4, -np.inf, each.logits_NC - 1).astype(np.float32) for each in pixels.drawn]
    some = replace(pixels, drawn=[replace(each, logits_NC=z) for each, z in zip(pixels.drawn, logits, strict=True)])
    assert sum(np.isneginf(z).sum() for z in logits) > 100
    assert np.isfinite(fit_nll(fit(kind, some), some))


# Classes and features that say nothing


def test_classes_that_never_occur_are_left_alone():
    few = sample(C=3)
    more = replace(few, C=5, drawn=[
        replace(
            each, logits_NC=np.concatenate([each.logits_NC, np.full((len(each), 2), -40, np.float32)], 1),
            around_NC=np.concatenate([each.around_NC, np.full((len(each), 2), -11.5, np.float32)], 1),
        )
        for each in few.drawn
    ])  # fmt: skip
    for kind in KINDS:
        here, there = fit_nll(fit(kind, few), few), fit_nll(fit(kind, more), more)
        assert there == pytest.approx(here, abs=2e-5), kind
    assert fit("class-conditional", more).of_class[3:] == pytest.approx((0, 0), abs=1e-6)


def test_a_feature_that_is_the_same_everywhere_has_no_curve(pixels):
    same = [replace(each, features_NF=np.float32([1, 0, 1]) * each.features_NF) for each in pixels.drawn]
    found = fit("local", replace(pixels, drawn=same))
    assert [curve.feature for curve in found.curves] == ["picture", "agreement 41"]
    one = replace(pixels, drawn=pixels.drawn[:1])
    assert "picture" not in [curve.feature for curve in fit("local", one).curves]
    assert np.isfinite(fit_nll(fit("neighbourhood", one), pixels))


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_unit_of_a_feature_does_not_matter(factor, pixels):
    unit = np.float32([1, factor, 1])
    other = replace(pixels, drawn=[replace(each, features_NF=unit * each.features_NF) for each in pixels.drawn])
    assert fit_nll(fit("local", other), other) == pytest.approx(fit_nll(fit("local", pixels), pixels), abs=2e-6)


def test_most_values_the_same_and_a_few_far_away(pixels):
    rare = [replace(each, features_NF=np.where(each.features_NF > 2.2, 1e5, -1.0).astype(np.float32)) for each in pixels.drawn]  # fmt: skip
    some = replace(pixels, drawn=rare)
    assert fit_nll(fit("local", some), some) <= fit_nll(fit("temperature", some), some) + 1e-6


# The sample


def test_one_pixel_of_each_run_is_drawn():
    pixels = Pixels(3, run=20)
    labelled = np.arange(7, 7 + 3 * 1010, 3)
    at = pixels.picker("a", labelled)
    assert len(at) == 51 and set(at) <= set(labelled.tolist())
    assert [int(place - 7) // 3 // 20 for place in at] == list(range(51))
    assert np.array_equal(at, Pixels(3, run=20).picker("a", labelled))
    for other in (pixels.picker("b", labelled), Pixels(3, seed=1, run=20).picker("a", labelled)):
        assert 1 < (other == at).sum() + 2 < 20
    assert len(pixels.picker("a", labelled[:0])) == 0 and pixels.picker("a", labelled[:1]).tolist() == [7]
    assert np.array_equal(Pixels(3, run=1).picker("a", labelled), labelled)


def places(picture, N):
    """Pixels that can be told apart."""
    number = np.arange(N, dtype=np.float32)[:, None]
    return Drawn(number.repeat(2, 1), np.zeros(N, int), number[:, :0], picture, "g")


def filled(pictures, most):
    pixels = Pixels(2, most=most)
    for each in pictures:
        pixels.add(each)
        assert len(pixels) == sum(len(part.logits_NC) for part in pixels.drawn) <= most
    return {each.picture: each.logits_NC[:, 0].tolist() for each in pixels.drawn}, pixels.halved


def test_thinning_does_not_depend_on_the_order_and_prefers_no_place():
    pictures = [places(f"p{k}", 16) for k in range(400)]
    kept, halved = filled(pictures, 1000)
    shuffled = [pictures[k] for k in np.random.default_rng(0).permutation(400)]
    assert filled(shuffled, 1000) == (kept, halved) and halved == 3
    where = np.concatenate([kept[f"p{k}"] for k in range(400)])
    assert len(where) == 800
    assert where.mean() == pytest.approx(7.5, abs=4 * np.sqrt(21 / 800)) and set(where) == set(range(16))
    assert filled(pictures, 6400) == ({f"p{k}": list(range(16)) for k in range(400)}, 0)


def test_pictures_of_one_pixel_are_thinned_too():
    kept, _ = filled([places(f"p{k}", 1) for k in range(200)], 50)
    assert 0 < sum(map(len, kept.values())) <= 50


def test_a_hundred_pictures_fit_into_memory():
    """101 pictures of 360 x 480 with 11 classes, one pixel of 20, and all that the richest kind wants to know."""
    pixels, N = Pixels(11, FEATURES, most=MOST >> 1), 360 * 480 // 20
    tracemalloc.start()
    try:
        for k in range(101):
            z, f, around = (np.empty((N, width), np.float32) for width in (11, len(FEATURES), 11))
            pixels.add(Drawn(z, np.zeros(N, np.uint8), f, str(k), "g", around))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(pixels) == 101 * N // 2 and peak < 100 << 20


# What is chosen


def test_a_temperature_is_chosen_where_the_net_is_over_confident():
    kind, table, how = choose(sample(pictures=5, beta=0.5), ())
    none, temperature = table
    assert kind == "temperature" and temperature.chosen and (temperature.over, none.kind) == ("none", "none")
    assert none.nll - temperature.nll == pytest.approx(temperature.gain, abs=1e-9)
    assert 0 < temperature.interval[0] <= temperature.gain <= temperature.interval[1] and temperature.worst < 0
    assert how == {"folds": 3, "by": "sequence", "clusters": 3}


def test_none_is_chosen_where_the_net_is_calibrated():
    chosen = Counter(choose(sample(groups=12, pictures=3, N=100, beta=1.0, seed=seed, names=NAMES[:1]), ())[0] for seed in range(20))  # fmt: skip
    assert chosen["none"] >= 18, "the gain's interval of 95 % lies above 0 once in forty"


def test_a_kind_is_judged_on_pictures_it_was_not_fitted_on():
    """Scenes that want the opposite of each other: what fits all others is wrong for each."""
    wants = {f"s{k}": 0.4 if k % 2 else 2.5 for k in range(4)}
    every = [drawn(f"{group}_{k}.png", group, beta=beta) for group, beta in wants.items() for k in range(4)]
    kind, table, _ = choose(Pixels(4, NAMES, drawn=every), ())
    assert kind == "none" and not table[1].chosen and table[1].worst > HARM


def test_what_harms_a_fold_is_not_taken_however_good_it_is_for_the_rest():
    rest = [drawn(f"s{g}_{k:03}.png", f"s{g}", beta=0.5) for g in range(3) for k in range(20)]
    one = drawn("t_1.png", "t", beta=3.0)
    kind, table, how = choose(Pixels(4, NAMES, drawn=[*rest, one]), ())
    assert how["by"] == "sequence" and table[1].interval[0] > 0 and table[1].worst > HARM
    assert kind == "none" and not table[1].chosen
    assert choose(Pixels(4, NAMES, drawn=rest), ())[0] == "temperature"


def test_a_richer_kind_is_chosen_where_it_is_surely_better():
    pixels = sample(groups=4, pictures=6, of_class=(0.8, 0.0, -0.8, 0.3))
    kind, table, _ = choose(pixels, ("class-conditional",))
    assert kind == "class-conditional" and [each.over for each in table] == ["", "none", "temperature"]
    alike = sample(groups=4, pictures=6, names=NAMES[:1])
    assert choose(alike, ("class-conditional",))[0] == "temperature"


def test_of_all_that_is_surely_better_than_a_temperature_the_best_is_taken(monkeypatch):
    """Also where it is not surely better than the second best; and nothing that a single temperature beats on average."""
    pixels = sample(groups=4, pictures=6, beta=0.5)
    gains = {"none": (0, 0), "temperature": (0.10, 0.01), "vector": (0.20, 0.01), "local": (0.21, 0.06), "class-conditional": (0.3, 1.0)}  # fmt: skip

    def nll(_, kind):
        """Of each picture: better than none by a mean gain, with a spread that comes from the scene."""
        gain, spread = gains[kind or "none"]
        return {
            each.picture: (len(each) * (1 - gain - spread * (int(each.group[1:]) % 2 - 0.5)), len(each))
            for each in pixels.drawn
        }

    monkeypatch.setattr(Pixels, "nll", nll)
    monkeypatch.setattr(fitting, "fit", lambda kind, _: kind)
    kind, table, _ = choose(pixels, ("vector", "local", "class-conditional"))
    assert kind == "local" and [each.kind for each in table if each.chosen] == ["local"]
    assert [each.over for each in table] == ["", "none", "temperature", "temperature", "temperature"]
    sure, unsure = table[3], table[4]
    assert sure.interval[0] > 0 and unsure.gain > sure.gain and unsure.interval[0] < 0
    gains["temperature"] = 0.4, 2.0  # not sure itself
    kind, table, _ = choose(pixels, ("vector", "local"))
    assert kind == "none" and not table[1].chosen and table[2].interval[0] > 0


def test_a_kind_that_cannot_be_fitted_leaves_the_choice_to_the_others(monkeypatch):

    def fails(kind, pixels):
        if kind == "vector" and "s1" not in {each.group for each in pixels.drawn}:
            raise CalibrationError("vector: did not end")
        return fit(kind, pixels)

    pixels = sample(groups=4, pictures=6, of_class=(0.8, 0.0, -0.8, 0.3))
    wanted = choose(pixels, ("class-conditional",))
    monkeypatch.setattr(fitting, "fit", fails)
    kind, table, how = choose(pixels, ("vector", "class-conditional"))
    assert (kind, table) == wanted[:2] and how == wanted[2] | {"not_fitted": {"vector": "vector: did not end"}}
    monkeypatch.setattr(fitting, "fit", lambda kind, pixels: fails("vector", pixels))
    with pytest.raises(CalibrationError, match="did not end"):  # without a temperature there is no choice
        choose(pixels, ())


def test_with_one_sequence_no_more_than_a_temperature_is_tried():
    kind, table, how = choose(sample(groups=1, pictures=10, of_class=(0.8, 0.0, -0.8, 0.3)))
    assert kind == "temperature" and [each.kind for each in table] == ["none", "temperature"]
    assert how == {"folds": 5, "by": "blocks of consecutive pictures", "clusters": 10}


@pytest.mark.parametrize("number", [0, 1])
def test_auto_needs_two_pictures(number):
    some = sample(groups=1, pictures=number)
    void = places("void", 0)
    for pixels in (some, replace(some, drawn=[*some.drawn, void])):
        with pytest.raises(CalibrationError) as error:
            choose(pixels)
        assert str(error.value) == (
            f"calibrator auto: expected at least two pictures with labels, to hold one out. Received: {number}."
            " Name a calibrator, as temperature."
        )


def test_pictures_without_labels_make_no_fold():
    pixels = sample(groups=2, pictures=4, names=())
    void = [replace(places(f"v{k}", 0), group=f"v{k}", logits_NC=np.empty((0, 4), np.float32)) for k in range(3)]
    assert choose(replace(pixels, drawn=[*void, *pixels.drawn]), ())[2] == choose(pixels, ())[2]


@pytest.mark.parametrize("sizes", [[7], [5], [2], [3, 2], [1, 1, 1], [31, 7, 4], [1] * 23, [40, 1]])
def test_folds(sizes):
    every = [places(f"g{g}_{k}", 1) for g, size in enumerate(sizes) for k in range(size)]
    every = [replace(each, group=each.picture.split("_")[0]) for each in every]
    folds, clusters, how = folds_of(Pixels(2, drawn=every))
    assert set(folds) == set(clusters) == {each.picture for each in every}
    assert how["folds"] == len(set(folds.values())) >= 2 and how["clusters"] == len(set(clusters.values())) >= 2
    if len(sizes) == 1:
        assert how["by"] != "sequence" and how["folds"] == min(5, sizes[0])
        within = Counter(folds.values()).values()
        assert max(within) - min(within) <= 1
        numbers = [int(folds[f"g0_{k}"].split()[1]) for k in range(sizes[0])]
        assert numbers == sorted(numbers), "neighbours, by number: 9 comes before 10"
    else:
        groups = {(each.group, folds[each.picture]) for each in every}
        assert how["by"] == "sequence" and len(groups) == len(sizes), "a sequence is never cut in two"
        assert how["folds"] == min(10, len(sizes))
        assert max(Counter(fold for _, fold in groups).values()) <= -(-len(sizes) // 10)
    of_cluster = {}
    for each in every:
        of_cluster.setdefault(clusters[each.picture], set()).add(each.group)
    assert all(len(groups) == 1 for groups in of_cluster.values())
    longest = [Counter(clusters[e.picture] for e in every if e.group == f"g{g}") for g in range(len(sizes))]
    assert all(max(counts.values()) - min(counts.values()) <= 1 for counts in longest)


def test_numbers_in_names_are_numbers():
    every = [replace(places(f"s_{k}", 1), group="s") for k in range(98, 103)]
    folds = folds_of(Pixels(2, drawn=every))[0]
    assert [folds[f"s_{k}"] for k in range(98, 103)] == [f"block {k}" for k in range(5)]


def test_gain_by_a_plain_loop():
    rng = np.random.default_rng(0)
    names = [f"p{k}" for k in range(40)]
    n = {name: int(rng.integers(50, 90)) for name in names}
    before = {name: (float(rng.gamma(9, n[name] / 20)), n[name]) for name in names}
    after = {name: (total - rng.normal(0.05, 0.1) * n[name], n[name]) for name, (total, _) in before.items()}
    clusters = {name: f"c{k // 4}" for k, name in enumerate(names)}
    folds = {name: f"f{k % 3}" for k, name in enumerate(names)}
    gain, (low, high), worst = compare(before, after, clusters, folds)
    lost = {name: after[name][0] - before[name][0] for name in names}
    assert gain == pytest.approx(-sum(lost.values()) / sum(n.values()))
    assert worst == pytest.approx(max(
        sum(lost[name] for name in names if folds[name] == fold) / sum(before[name][0] for name in names if folds[name] == fold)
        for fold in ("f0", "f1", "f2")
    ))  # fmt: skip
    of_cluster = np.array([[-sum(lost[m] for m in names if clusters[m] == c), sum(n[m] for m in names if clusters[m] == c)] for c in sorted(set(clusters.values()))])  # fmt: skip
    draws = [np.divide(*of_cluster[rng.integers(0, 10, 10)].sum(0)) for _ in range(4000)]
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.025, 0.975]), atol=0.15 * (high - low))


def test_few_clusters_have_the_interval_of_student(pixels):
    rng = np.random.default_rng(3)
    gains = rng.normal(0.01, 0.02, 6)
    before = {f"p{k}": (100.0, 50) for k in range(6)}
    after = {f"p{k}": (100.0 - 50 * gain, 50) for k, gain in enumerate(gains)}
    names = {name: name for name in before}
    mean, interval, worst = compare(before, after, names, dict.fromkeys(before, "all"))
    expected = stats.t.interval(0.95, 5, gains.mean(), stats.sem(gains))
    assert mean == pytest.approx(gains.mean()) and interval == pytest.approx(expected, rel=1e-3)
    assert worst == pytest.approx(-50 * gains.sum() / 600)
    assert compare(before, after, dict.fromkeys(before, "one"), names)[1] == (-np.inf, np.inf)


def test_vector_leaves_classes_alone_that_no_label_has(pixels):
    without = replace(pixels, drawn=[replace(each, votes_NC=np.minimum(each.votes_NC, 2)) for each in pixels.drawn])
    found = fit("vector", without)
    assert abs(found.factors[3] - 1) < 0.2 and abs(found.biases[3] - np.mean(found.biases[:3])) < 3
