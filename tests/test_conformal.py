"""Conformal sets against float64 loops, and their promise on simulated images that are exchangeable; hostile input."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import softmax

from seguncert.conformal import BINS, KINDS, UPPER_K, Aim, ConformalSets, Losses, Sizes, images_needed, risk_control

VOID = 255


def draw(C=5, H=23, W=31, spread=3.0, seed=0):
    """Logits, and labels drawn from a softmax that is less sure than theirs; one pixel in ten is void."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (C, H, W)).astype(np.float32)
    chances = softmax(0.5 * logits.astype(np.float64), axis=0).cumsum(0)
    labels = (chances < rng.random((H, W))).sum(0).clip(0, C - 1).astype(np.uint8)
    labels[rng.random((H, W)) < 0.1] = VOID
    return torch.from_numpy(logits), labels


def scores(logits_CN, aim):
    """Odds s/(1 − s) of every class at every pixel, a pixel at a time in float64."""
    C, N = logits_CN.shape
    p_CN, odds_CN = softmax(logits_CN.astype(np.float64), axis=0), np.empty((C, N))
    for i in range(N):
        p, z = p_CN[:, i], logits_CN[:, i]
        for c in range(C):
            if aim.kind == "foreground":
                within = p[list(aim.foreground)].sum()
                odds_CN[c, i] = (p.sum() - within) / within
            elif aim.kind == "lac" and c == z.argmax():
                odds_CN[c, i] = 0
            elif aim.kind == "aps":
                odds_CN[c, i] = p[z > z[c]].sum() / p[z <= z[c]].sum()
            else:
                odds_CN[c, i] = np.delete(p, c).sum() / p[c]
    return odds_CN


def aims(C):
    sets = [Aim(C, kind, by_class) for kind in KINDS[:3] for by_class in (False, True)]
    return [*sets, Aim(C, "foreground", foreground=(1, C - 1)), Aim(C, "aps", covered=0.8)]


def losses_of(aim, images, ignore_index=VOID, parts=1):
    losses = Losses.empty(aim, ignore_index=ignore_index)
    for logits, labels in images:
        image = losses.begin()
        for rows in np.array_split(np.arange(len(labels)), parts):
            image.update(logits[:, rows], labels[rows])
        losses.add(image)
    return losses


@pytest.mark.parametrize("aim", aims(5), ids=str)
def test_against_float64_loops(aim):
    images = [draw(seed=seed) for seed in range(12)]
    alpha = 0.1
    sets = losses_of(aim, images, parts=3).fit(alpha)
    risks = np.zeros((aim.groups, 2))  # a loss and a hundredth tighter, at our thresholds
    held = np.zeros(aim.groups)
    for logits, labels in images:
        odds_CN, y_N = scores(logits.flatten(1).numpy(), aim), labels.ravel()
        limit_C = np.broadcast_to(sets.odds, aim.C)[:, None]
        expected_CN = odds_CN <= limit_C
        found = sets.mask(logits) if aim.foreground else sets.members(logits)
        clear_CN = np.abs(odds_CN / limit_C - 1) > 1e-5
        if aim.foreground:
            expected_CN, clear_CN = expected_CN[:1], clear_CN[:1]
        np.testing.assert_array_equal(found.reshape(expected_CN.shape)[clear_CN], expected_CN[clear_CN])
        for g in range(aim.groups):
            classes = [g] if aim.by_class else aim.foreground or range(5)
            own = np.isin(y_N, classes)
            if own.any():
                odds = odds_CN[y_N[own], own]
                missed = np.array([(odds > sets.odds[g] * tighter).mean() for tighter in (1, 0.98)])
                risks[g] += missed if aim.covered is None else missed > 1 - aim.covered
                held[g] += 1
    assert sets.images == tuple(held)
    corrected = (risks + 1) / (held[:, None] + 1)
    assert (corrected[:, 0] <= alpha + 1e-9).all()  # enough, and a little less would not do
    assert ((corrected[:, 1] > alpha) | (np.array(sets.odds) < 1e-11)).all()


@pytest.mark.parametrize("aim", aims(5), ids=str)
def test_sets_grow_as_alpha_falls(aim):
    losses, (logits, _) = losses_of(aim, [draw(seed=seed) for seed in range(120)]), draw(seed=999)
    inside = [
        sets.mask(logits) if aim.foreground else sets.members(logits) for sets in map(losses.fit, (0.3, 0.1, 0.01))
    ]
    assert (inside[0] <= inside[1]).all() and (inside[1] <= inside[2]).all()
    assert inside[0].sum() < inside[2].sum()
    if aim.kind in ("lac", "aps"):
        assert np.take_along_axis(inside[0], logits.argmax(0).numpy()[None], 0).all()  # the shown class is in


def simulate(rng, images):
    """Images of 30 pixels and 3 classes; in each the net finds all true classes about equally likely, in many unlikely."""
    for _ in range(images):
        labels = rng.integers(0, 3, (3, 10))
        truth = labels == np.arange(3)[:, None, None]
        logits = rng.normal(1, 3) * truth + rng.normal(0, 0.2, (3, 3, 10))
        yield torch.from_numpy(logits.astype(np.float32)), labels


@pytest.mark.parametrize(
    "aim, n, alpha",
    [
        (Aim(3, "lac"), 5, 0.2),
        (Aim(3, "lac-empty"), 5, 0.2),
        (Aim(3, "aps"), 9, 0.15),
        (Aim(3, "lac-empty", covered=0.6), 5, 0.2),
        (Aim(3, "foreground", foreground=(2,)), 8, 0.13),
    ],
    ids=str,
)
def test_the_promise_holds_with_few_images_and_needs_its_correction(aim, n, alpha):
    rng = np.random.default_rng(0)
    curves = np.array([losses_of(aim, [each], None).sums_GK[0] for each in simulate(rng, 400)], np.float32)
    found, naive = [], []
    for _ in range(4000):  # n images and one more, of a pool: exchangeable
        chosen = curves[rng.permutation(len(curves))[: n + 1]]
        sums = chosen[:n].sum(0, dtype=np.float64)
        found.append(chosen[n, risk_control(sums, n, alpha)])
        naive.append(chosen[n, (sums <= alpha * n + 1e-6).argmax()])
    error = np.std(found) / math.sqrt(len(found))
    assert alpha / 4 < np.mean(found) <= alpha + 3 * error  # and not by sets that hold everything
    assert np.mean(naive) > alpha + 3 * error


def test_share_of_images_takes_the_right_rank():
    """With β the threshold is the ⌈(n + 1)(1 − α)⌉-th smallest of what the images need."""
    rng = np.random.default_rng(1)
    p = rng.uniform(0.1, 0.9, (19, 20)).astype(np.float32)
    images = [(torch.log(torch.from_numpy(np.stack([row, 1 - row])[:, None])), np.zeros((1, 20), int)) for row in p]
    sets = losses_of(Aim(2, "lac-empty", covered=0.9), images, None).fit(0.1)
    needed = np.sort(p, axis=1)[:, 2]  # 18 of 20 pixels are at least that
    expected = np.sort(needed)[::-1][18 - 1]
    assert expected * 0.994 < sets.least_probability()[0] <= expected


def test_parts_merge_to_the_whole():
    images = [draw(seed=seed) for seed in range(8)]
    aim = Aim(5, "aps", by_class=True)
    whole, left, right = (losses_of(aim, part) for part in (images, images[:3], images[3:]))
    left.merge(right)
    np.testing.assert_allclose(left.sums_GK, whole.sums_GK, atol=1e-12)
    np.testing.assert_array_equal(left.images_G, whole.images_G)
    assert left.fit(0.2) == whole.fit(0.2)
    with pytest.raises(ValueError, match=r"merge: expected losses with \(Aim\(C=5, kind='aps', by_class=True"):
        left.merge(losses_of(Aim(5, "lac", by_class=True), images))


def test_bands_of_an_image_are_the_image():
    images = [draw(seed=seed) for seed in range(3)]
    np.testing.assert_array_equal(
        losses_of(Aim(5), images, parts=1).sums_GK, losses_of(Aim(5), images, parts=7).sums_GK
    )
    sets, (logits, _) = losses_of(Aim(5), images).fit(0.3), images[0]
    np.testing.assert_array_equal(
        sets.members(logits), np.concatenate([sets.members(logits[:, :5]), sets.members(logits[:, 5:])], axis=1)
    )


@pytest.mark.parametrize("kind", KINDS[:3])
def test_ties_are_in_or_out_together(kind):
    equal = torch.zeros(4, 1, 600)  # longer than a block
    labels = np.tile([0, 1, 2, 3], 150)[None]
    sets = losses_of(Aim(4, kind), [(equal, labels)] * 9, None).fit(0.1)
    assert sets.members(equal).all()  # p = 1/4, and s/(1 − s) = 3 is where a bin ends
    two = torch.tensor([5.0, 5.0, -5.0, -5.0]).view(4, 1, 1).expand(4, 1, 600)
    sets = losses_of(Aim(4, kind), [(two, labels % 2)] * 9, None).fit(0.1)
    np.testing.assert_array_equal(sets.members(two)[:, 0, 7], [True, True, False, False])


@pytest.mark.parametrize("kind", KINDS[:3])
def test_probabilities_of_exactly_0_and_1(kind):
    sure = torch.tensor([0.0, -math.inf, -300.0]).view(3, 1, 1).expand(3, 1, 10)
    right, wrong = np.zeros((1, 10), int), np.ones((1, 10), int)
    alone = losses_of(Aim(3, kind), [(sure, right)] * 9, None).fit(0.1)
    assert alone.odds == (UPPER_K[0],) and alone.size(sure).tolist() == [[1] * 10]
    all_of_it = losses_of(Aim(3, kind), [(sure, wrong)] * 9, None).fit(0.1)
    assert all_of_it.odds == (math.inf,) and all_of_it.size(sure).tolist() == [[3] * 10]
    assert all_of_it.size_map(sure).tolist() == [[1.0] * 10] and "everything is always in" in all_of_it.promise


def test_small_probabilities_are_told_apart():
    """True classes with p of 1e-4 to 1e-10: the threshold lies where it must, not in one last bin."""
    for p in (1e-4, 1e-6, 1e-8, 1e-10):
        logits = torch.log(torch.tensor([1.0, p], dtype=torch.float64)).float().view(2, 1, 1)
        for kind, label in (("lac", 1), ("lac-empty", 1), ("aps", 1), ("lac-empty", 0)):
            sets = losses_of(Aim(2, kind), [(logits, np.array([[label]]))] * 9, None).fit(0.1)
            odds = p if label == 0 else 1 / p
            assert odds < sets.odds[0] < odds * 1.009, (p, kind, label)
            assert sets.members(logits)[label].all()


def test_lac_alone_can_be_empty():
    images = [(torch.tensor([[[3.0] * 19 + [0.1]], [[0.0] * 20]]), np.zeros((1, 20), int))] * 60
    sizes = {kind: losses_of(Aim(2, kind), images, None).fit(0.1).size(images[0][0])[0, -1] for kind in KINDS[:3]}
    assert sizes == {"lac": 1, "lac-empty": 0, "aps": 1}


@pytest.mark.parametrize("aim", aims(5), ids=str)
def test_mean_size_is_that_of_the_sets(aim):
    images = [draw(seed=seed) for seed in range(12)]
    sizes, parts = (Sizes.empty(aim, ignore_index=VOID) for _ in range(2))
    for number, (logits, labels) in enumerate(images):
        part = Sizes.empty(aim, ignore_index=VOID)
        for rows in np.array_split(np.arange(len(labels)), 3):
            sizes.update(logits[:, rows], labels[rows])
            part.update(logits[:, rows], np.where(labels[rows] == VOID, VOID, number % 5))  # whichever class it is
        parts.merge(part)
    for sets in map(losses_of(aim, images).fit, (0.3, 0.1)):
        apply = sets.mask if aim.foreground else sets.size
        expected = np.concatenate([apply(logits)[labels != VOID] for logits, labels in images])
        assert sizes.pixels == parts.pixels == len(expected)
        assert sizes.mean(sets) == parts.mean(sets) == pytest.approx(expected.mean(), abs=1e-3)
    always = ConformalSets(aim, 0.1, (math.inf,) * aim.groups, (9,) * aim.groups)
    assert sizes.mean(always) == (1 if aim.foreground else 5)
    assert math.isnan(Sizes.empty(aim, ignore_index=VOID).mean(always))
    with pytest.raises(ValueError, match="merge: expected sizes with Aim"):
        sizes.merge(Sizes.empty(aim, ignore_index=None))
    with pytest.raises(ValueError, match="logits: expected finite numbers"):
        sizes.update(torch.full((5, 2, 2), math.nan), np.zeros((2, 2), int))


def test_void_pixels_and_images_without_labels_do_not_count():
    logits, labels = draw()
    other = logits.clone()
    other[:, torch.from_numpy(labels == VOID)] = 7.0
    nothing = (logits, np.full_like(labels, VOID))
    first, second = losses_of(Aim(5), [(logits, labels)]), losses_of(Aim(5), [nothing, (other, labels), nothing])
    np.testing.assert_array_equal(first.sums_GK, second.sums_GK)
    assert second.images_G.tolist() == [1]


def test_one_class():
    logits, labels = torch.randn(1, 4, 5), np.zeros((4, 5), int)
    sets = losses_of(Aim(1), [(logits, labels)] * 9, None).fit(0.1)
    assert (sets.size(logits) == 1).all() and (sets.size_map(logits) == 0).all()
    logits, labels = torch.randn(3, 4, 5), np.full((4, 5), 2)  # of three, one occurs
    sets = losses_of(Aim(3, by_class=True), [(logits, labels)] * 9, None).fit(0.1)
    assert sets.images == (0, 0, 9) and math.isinf(sets.odds[0])


def test_a_class_of_few_images_is_always_in():
    images = [draw(3, seed=seed) for seed in range(20)]
    for _, labels in images[3:]:
        labels[labels == 1] = 0
    sets = losses_of(Aim(3, by_class=True), images).fit(0.1)
    assert sets.images == (20, 3, 20) and [math.isinf(odds) for odds in sets.odds] == [False, True, False]
    assert sets.members(images[0][0])[1].all() and not sets.members(images[0][0])[2].all()
    assert "class 1 is always in" in sets.promise and "3 to 20 with that class" in sets.promise


def test_too_few_images():
    images = [draw(seed=seed) for seed in range(8)]
    with pytest.raises(
        ValueError,
        match="alpha 0.1: expected at least 9 images .* Received: 8. Label more images, or take alpha 0.111 or more",
    ):
        losses_of(Aim(5), images).fit(0.1)
    losses_of(Aim(5), [*images, draw(seed=9)]).fit(0.1)
    with pytest.raises(ValueError, match="Received: 0. Label more images"):
        Losses.empty(Aim(5), ignore_index=None).fit(0.1)
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="alpha: expected a loss between 0 and 1. Received: "):
            losses_of(Aim(5), images).fit(alpha)
    for alpha in (0.5, 0.3, 0.1, 0.05, 0.01, 0.001):
        n = images_needed(alpha)
        assert risk_control(np.zeros(1), n, alpha) == 0 and (n == 0 or risk_control(np.zeros(1), n - 1, alpha) is None)


@pytest.mark.parametrize("aim", [*aims(5), Aim(2, by_class=True)], ids=str)
def test_there_and_back_through_json(aim):
    images = [draw(aim.C, seed=seed) for seed in range(12)]
    sets = losses_of(aim, images).fit(0.1)
    text = json.dumps(sets.to_dict(), allow_nan=False)
    assert ConformalSets.from_dict(json.loads(text)) == sets
    always = ConformalSets(Aim(2), 0.1, (math.inf,), (9,))
    assert ConformalSets.from_dict(json.loads(json.dumps(always.to_dict(), allow_nan=False))) == always


def test_promises_in_words():
    def words(aim, *images):
        return ConformalSets(aim, 0.1, (1.0,) * len(images), images).promise

    end = "; no promise for one given image or pixel, nor for another scene."
    assert words(Aim(2), 45) == (
        "On images exchangeable with the 45 it was fitted on, which net and calibration have not learnt, the expected"
        " share of labelled pixels whose true class is in the set is at least 0.9" + end
    )
    assert (
        "the chance that the share of labelled pixels whose true class is in the set is at least 0.95 is at least 0.9;"
        in words(Aim(2, covered=0.95), 45)
    )
    assert "share of the foreground (class 1) that is in the mask is at least 0.9;" in words(
        Aim(2, "foreground", foreground=(1,)), 45
    )


@pytest.mark.parametrize(
    "aim, words",
    [
        (Aim(2), "on average at most 10 % of the labelled pixels of an exchangeable image miss their class"),
        (Aim(2, by_class=True), "on average at most 10 % of a class's pixels in an exchangeable image miss it"),
        (Aim(2, covered=0.95), "with a chance of 90 % or more, at most 5 % of the labelled pixels of an exchangeable image miss their class"),
        (Aim(2, "foreground", foreground=(1,)), "on average at most 10 % of the foreground of an exchangeable image is missed"),
    ],
)  # fmt: skip
def test_promises_in_few_words(aim, words):
    assert ConformalSets(aim, 0.1, (1.0,) * aim.groups, (9,) * aim.groups).note == words


@pytest.mark.parametrize(
    "broken", [{}, {"kind": "lac"}, {"odds": []}, {"odds": [-1.0]}, {"odds": ["a"]}, {"alpha": 2}, {"classes": None}]
)
def test_files_that_were_not_written_here(broken):
    good = ConformalSets(Aim(2), 0.1, (1.0,), (9,)).to_dict()
    with pytest.raises(ValueError):
        ConformalSets.from_dict((good | broken) if broken and broken != {"kind": "lac"} else broken)


@pytest.mark.parametrize("aim", [Aim(3), Aim(3, "aps"), Aim(3, "foreground", foreground=(1,))], ids=str)
def test_pixels_without_probabilities(aim):
    sets = ConformalSets(aim, 0.1, (1.0,), (9,))
    apply = sets.mask if aim.foreground else sets.members
    for value, words in (
        (math.nan, "NaN or +inf at 1 pixels"),
        (math.inf, "NaN or +inf at 1 pixels"),
        (-math.inf, "-inf for every class at 1"),
    ):
        logits = torch.zeros(3, 4, 5)
        logits[:, 2, 3] = value
        for act in (apply, lambda z: Losses.empty(aim, ignore_index=None).begin().update(z, np.zeros((4, 5), int))):
            with pytest.raises(ValueError, match="logits: expected finite numbers") as error:
                act(logits)
            assert words in str(error.value)


def test_labels_and_shapes_that_are_wrong():
    image = Losses.empty(Aim(3), ignore_index=VOID).begin()
    with pytest.raises(ValueError, match="labels: expected 0 to 2, or the ignore index 255. Received: 1 pixels with 7"):
        image.update(torch.zeros(3, 1, 2), np.array([[0, 7]]))
    with pytest.raises(ValueError, match="logits: expected"):
        image.update(torch.zeros(4, 1, 2), np.array([[0, 1]]))
    with pytest.raises(ValueError, match="logits: expected"):
        ConformalSets(Aim(3), 0.1, (1.0,), (9,)).members(torch.zeros(2, 1, 2))


def test_aims_that_mean_nothing():
    for wrong, words in (
        (dict(C=0), "classes: expected 1 to 255. Received: 0"),
        (dict(C=256), "classes: expected 1 to 255. Received: 256"),
        (dict(C=3, kind="raps"), "kind: expected one of lac, lac-empty, aps, foreground. Received: 'raps'"),
        (dict(C=3, kind="foreground"), "foreground: expected classes with the kind foreground"),
        (dict(C=3, foreground=(1,)), "foreground: expected classes with the kind foreground"),
        (dict(C=3, kind="foreground", foreground=(3,)), "foreground: expected some of the classes 0 to 2"),
        (dict(C=2, kind="foreground", foreground=(0, 1)), "not all. Received: (0, 1)"),
        (dict(C=3, kind="foreground", foreground=(1,), by_class=True), "by_class: expected a kind with sets"),
        (dict(C=3, covered=0.0), "covered: expected a share of an image's pixels in (0, 1]. Received: 0.0"),
    ):
        with pytest.raises(ValueError) as error:
            Aim(**wrong)
        assert words in str(error.value)
    sets, mask = (
        ConformalSets(Aim(2), 0.1, (1.0,), (9,)),
        ConformalSets(Aim(2, "foreground", foreground=(1,)), 0.1, (1.0,), (9,)),
    )
    with pytest.raises(ValueError, match="mask: expected the kind foreground. Received: lac"):
        sets.mask(torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match="members: expected a kind with sets. Received: foreground"):
        mask.size(torch.zeros(2, 1, 1))


def test_an_empty_band_and_many_classes():
    aim = Aim(255, "aps")
    image = Losses.empty(aim, ignore_index=None).begin()
    image.update(torch.zeros(255, 0, 4), np.zeros((0, 4), int))
    assert not image.counts_GK.any() and image.counts_GK.shape == (1, BINS)
    sets = ConformalSets(aim, 0.1, (math.inf,), (9,))
    logits = torch.randn(255, 1, 600) * 40
    assert (sets.size(logits) == 255).all()
    assert (
        ConformalSets(aim, 0.1, (9.0,), (9,)).members(logits) == (scores(logits.flatten(1).numpy(), aim) <= 9)[:, None]
    ).all()
