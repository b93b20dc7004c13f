"""Exact posteriors against enumeration of everything, and against what is drawn."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from seguncert.hidden import HiddenObject, segments
from seguncert.posterior import Annotators, Colours, IndependentPixels, MarkovRows, QuadTree
from seguncert.scenes import CLASSIC, SCENES

AB, ABC = ("a", "b"), ("a", "b", "c")
TWO = Colours(((90.0, 100.0), (120.0, 80.0)), ((25.0, 30.0), (40.0, 20.0)))
THREE = Colours(((0.0,), (1.0,), (2.5,)), ((1.0,), (0.7,), (1.2,)), levels=None)
COARSE = Colours(((0.6,), (1.1,), (1.9,)), ((0.7,), (0.5,), (0.8,)), levels=3)
SWITCH, CYCLE = ((0.8, 0.2), (0.35, 0.65)), ((0.7, 0.3, 0.0), (0.0, 0.6, 0.4), (0.5, 0.0, 0.5))
BLOCKS = np.array([[[1, 1], [1, 0]], [[1, 1], [1, 1]], [[0, 1], [1, 1]]], bool)
HIDDEN = HiddenObject(
    ("ground", "corner", "block"), BLOCKS, (1, 2, 1), Colours(((90.0, 90.0), (120.0, 110.0), (100.0, 140.0)), ((25.0, 30.0),) * 3),
    (4, 4), bar=2, barred=0.4, empty=0.2, clutter=0.15,
)  # fmt: skip
TINY = [
    IndependentPixels(ABC, (0.5, 0.3, 0.2), THREE, (2, 3)),
    MarkovRows(AB, (0.3, 0.7), SWITCH, TWO, (4, 4)),
    MarkovRows(ABC, (1.0, 0.0, 0.0), CYCLE, THREE, (2, 4)),
    QuadTree(AB, (0.3, 0.7), SWITCH, TWO, depth=2),
    QuadTree(ABC, (0.0, 0.5, 0.5), CYCLE, THREE, depth=1),
    HIDDEN,
    replace(HIDDEN, barred=0.0, empty=0.0, clutter=0.0),
    replace(HIDDEN, shape=(4, 3), step=2, bar=1),
    replace(HIDDEN, bar=4),
    replace(HIDDEN, shapes=BLOCKS[:, :, :1].repeat(4, 2), bar=3),
]


def density(colours, kind, pixel):
    """p(colour | kind) by scipy."""
    found = 1.0
    for value, mean, sd in zip(pixel, colours.means[kind], colours.sds[kind], strict=True):
        if colours.levels is None:
            found *= stats.norm.pdf(value, mean, sd)
        else:
            above = 1.0 if value == colours.levels - 1 else stats.norm.cdf(float(value) + 0.5, mean, sd)
            found *= above - (0.0 if value == 0 else stats.norm.cdf(float(value) - 0.5, mean, sd))
    return found


def prior(scene, labels_MHW):
    """P(labels) of each label map, by the definition of the scene."""
    if isinstance(scene, IndependentPixels):
        return np.array(scene.priors)[labels_MHW].prod((1, 2))
    step = np.array(scene.transition)
    if isinstance(scene, MarkovRows):
        along = step[labels_MHW[..., :-1], labels_MHW[..., 1:]].prod(2)
        return (np.array(scene.start)[labels_MHW[..., 0]] * along).prod(1)
    total = 0.0
    for root in range(len(scene.classes)):
        if scene.depth == 1:
            total += scene.root[root] * step[root][labels_MHW].prod((1, 2))
            continue
        of_quarter = 1.0  # summed over the class of the quarter's node
        for y, x in itertools.product((0, 2), repeat=2):
            leaves = labels_MHW[:, y : y + 2, x : x + 2]
            of_quarter *= sum(step[root][c] * step[c][leaves].prod((1, 2)) for c in range(len(step)))
        total += scene.root[root] * of_quarter
    return total


def all_labels(scene, image):
    """Every label map with its probability given the picture, by plain loops."""
    H, W = image.shape[:2]
    kinds = range(len(scene.colours.means))
    seen = np.array([[[density(scene.colours, q, image[y, x]) for x in range(W)] for y in range(H)] for q in kinds])
    if not isinstance(scene, HiddenObject):
        maps = np.array(list(itertools.product(kinds, repeat=H * W))).reshape(-1, H, W)
        rows, columns = np.indices((H, W))
        weights = prior(scene, maps) * seen[maps, rows, columns].prod((1, 2))
        return maps, weights / weights.sum()
    maps, weights = [], []
    _, h, w = scene.shapes.shape
    tops, lefts, bars = (range(0, last + 1, scene.step) for last in (H - h, W - w, W - scene.bar))
    places = [(s, y, x) for s in range(len(scene.shapes)) for y in tops for x in lefts]
    for place in [None, *places]:
        labels_HW = np.zeros((H, W), int)
        chance = scene.empty if place is None else (1 - scene.empty) / len(places)
        if place is not None:
            s, y, x = place
            labels_HW[y : y + h, x : x + w] = scene.shapes[s] * scene.shape_classes[s]
        for bar in [None, *bars]:
            weight = chance * (1 - scene.barred if bar is None else scene.barred / len(bars))
            for y, x in np.ndindex(H, W):
                if bar is not None and bar <= x < bar + scene.bar:
                    weight *= seen[2, y, x]
                elif labels_HW[y, x]:
                    weight *= seen[1, y, x]
                else:
                    weight *= (1 - scene.clutter) * seen[0, y, x] + scene.clutter * seen[1, y, x]
            maps.append(labels_HW)
            weights.append(weight)
    return maps, np.array(weights) / np.sum(weights)


@pytest.mark.parametrize("scene", TINY, ids=lambda scene: type(scene).__name__)
def test_posteriors_equal_enumeration(scene):
    for image in scene.sample(2, seed=3)[0]:
        maps, probs = all_labels(scene, image)
        one_hot = np.array(maps)[:, None] == np.arange(len(scene.classes))[:, None, None]
        expected_CHW = np.tensordot(probs, one_hot, 1)
        found_CHW = scene.posterior(image)
        assert found_CHW.dtype == np.float64
        np.testing.assert_allclose(found_CHW, expected_CHW, rtol=0, atol=1e-10)
        np.testing.assert_allclose(found_CHW.sum(0), 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scene", TINY, ids=lambda scene: type(scene).__name__)
def test_label_maps_come_as_often_as_the_joint_posterior_says(scene):
    image = scene.sample(1, seed=5)[0][0]
    maps, probs = all_labels(scene, image)
    expected: dict[bytes, float] = {}
    for each, p in zip(maps, probs, strict=True):
        key = each.astype(np.int64).tobytes()
        expected[key] = expected.get(key, 0.0) + p
    n = 20_000
    drawn, counts = np.unique(scene.draw_labels(image, n, seed=1).reshape(n, -1), axis=0, return_counts=True)
    found = {each.tobytes(): count for each, count in zip(drawn, counts, strict=True)}
    assert found.keys() <= expected.keys()
    count = np.array([found.get(key, 0) for key in expected])
    p = np.array(list(expected.values()))
    assert (stats.binom.cdf(count, n, p) > 1e-9).all() and (stats.binom.sf(count - 1, n, p) > 1e-9).all()


@pytest.mark.parametrize(
    "scene",
    [
        IndependentPixels(ABC, (0.5, 0.3, 0.2), COARSE, (1, 2)),
        MarkovRows(ABC, (0.2, 0.5, 0.3), CYCLE, COARSE, (1, 4)),
        QuadTree(ABC, (0.2, 0.5, 0.3), CYCLE, COARSE, depth=1),
        HiddenObject(ABC, np.ones((2, 1, 1), bool) & np.array([[[True]], [[True]]]), (1, 2), COARSE, (2, 2), bar=1),
    ],
    ids=lambda scene: type(scene).__name__,
)
def test_bayes_rule_by_counting(scene):
    """Of the pictures that look alike, as many pixels have each class as the posterior says."""
    images, labels = scene.sample(200_000, seed=0)
    flat = images.reshape(len(images), -1)
    kinds, of, counts = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    looked = 0
    for k in np.flatnonzero(counts >= 500):
        probs_CHW = scene.posterior(kinds[k].reshape(images.shape[1:]))
        alike = labels[of.ravel() == k]
        for c in range(len(scene.classes)):
            band = 5 * np.sqrt(len(alike) * probs_CHW[c] * (1 - probs_CHW[c])) + 1
            assert (abs((alike == c).sum(0) - len(alike) * probs_CHW[c]) <= band).all()
        looked += len(alike)
    assert looked > 150_000


def test_closed_form_of_the_classic_problems():
    x = np.linspace(-8, 12, 401)
    found = {name: scene.posterior(x.reshape(1, -1, 1))[0, 0] for name, scene in CLASSIC.items()}
    np.testing.assert_allclose(found["equal"], 1 / (1 + np.exp((6 * x - 9) / 2)), rtol=0, atol=1e-12)
    for name, (mean, sd, mean2, sd2) in {"nested": (0, 2, 1, 1), "sparse": (0, 2, 3, 1)}.items():
        first, second = stats.norm.pdf(x, mean, sd), stats.norm.pdf(x, mean2, sd2)
        np.testing.assert_allclose(found[name], first / (first + second), rtol=0, atol=1e-12)
        assert (np.diff(found[name] > 0.5) != 0).sum() == 2


def test_levels_are_probabilities_that_sum_to_one():
    for colours in (TWO, COARSE, Colours(((-50.0,), (300.0,), (1000.0,)), ((3.0,), (0.4,), (2.0,)))):
        for k in range(len(colours.means[0])):
            mass_QL = np.exp(colours._log_mass_QKL[:, k])
            np.testing.assert_allclose(mass_QL.sum(-1), 1, atol=1e-12)
    far = Colours(((-50.0,), (300.0,)), ((3.0,), (0.4,)))
    log = far.log_likelihood(np.array([[[200]]], np.uint8))
    assert log[0, 0, 0] == pytest.approx(stats.norm.logsf(199.5, -50, 3), rel=1e-3) and np.isfinite(log).all()


@pytest.mark.parametrize("name", SCENES)
def test_scenes_are_doubtful_and_the_doubt_is_right(name):
    """Each scene's pixels said to be p sure are right p of the time, over new pictures, within five standard errors."""
    scene = SCENES[name]
    images, labels = scene.sample(150, seed=11)
    probs = np.stack([scene.posterior(image) for image in images])
    right = probs.argmax(1) == labels
    per_picture = (probs.max(1) - right).mean((1, 2))
    assert abs(per_picture.mean()) <= 5 * per_picture.std() / np.sqrt(len(images))
    assert 0.5 < probs.max(1).mean() < 0.99
    again, _ = scene.sample(150, seed=11)
    assert (again == images).all() and images.dtype == np.uint8


def test_annotators_agree_as_far_as_the_posterior_says():
    several = Annotators(TINY[3], raters=400)
    images, labels = several.sample(2, seed=0)
    assert labels.shape == (2, 400, 4, 4)
    for image, label in zip(images, labels, strict=True):
        probs_CHW = several.posterior(image)
        band = 5 * np.sqrt(probs_CHW[1] * probs_CHW[0] / 400) + 1 / 400
        assert (abs((label == 1).mean(0) - probs_CHW[1]) <= band).all()


def test_a_digit_that_a_bar_hides_is_either():
    """A six and an eight differ in one segment; a bar over it leaves them as probable as before."""
    scene = replace(SCENES["digit"], colours=Colours(((100.0,), (200.0,), (20.0,)), ((3.0,),) * 3), clutter=0.0, bar=3)
    _, h, w = scene.shapes.shape
    image = np.full((16, 16, 1), 100, np.uint8)
    image[3 : 3 + h, 3 : 3 + w][segments("6", h, w, 2)] = 200
    assert scene.posterior(image)[1, 3, 3] > 0.999
    image[:, 9:12] = 20
    assert scene.posterior(image)[1, 3, 3] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IndependentPixels(AB, (0.5, 0.6), TWO), "priors: expected a probability for each of 2 classes, which sum to 1. Received: (0.5, 0.6)"),
        (lambda: MarkovRows(AB, (0.5, 0.5), ((0.5, 0.5), (1.0, 0.5)), TWO), "transition: expected a probability for each of 2 classes after each class"),
        (lambda: QuadTree(ABC, (0.5, 0.3, 0.2), CYCLE, TWO), "colours: expected 3 kinds of pixels"),
        (lambda: Colours(((1.0,),), ((0.0,),)), "colours: expected a mean and a standard deviation above 0"),
        (lambda: replace(HIDDEN, shape=(1, 4)), "shapes: expected one or more for each class but the ground"),
        (lambda: replace(HIDDEN, barred=1.0), "barred, empty, clutter: expected probabilities from 0 to below 1"),
        (lambda: TINY[1].posterior(np.zeros((4, 4, 3), np.uint8)), "image: expected 2 channels. Received: shape (4, 4, 3)"),
        (lambda: TINY[1].posterior(np.zeros((4, 4, 2))), "image: expected whole numbers from 0 to 255. Received: float64, 0.0 to 0.0"),
        (lambda: TINY[3].posterior(np.zeros((4, 8, 2), np.uint8)), "image: expected 4 rows and columns. Received: (4, 8, 2)"),
        (lambda: TINY[0].posterior(np.full((1, 1, 1), np.inf)), "image: expected colours that the scene can give"),
    ],
)  # fmt: skip
def test_wrong_calls_say_what_is_wrong(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
