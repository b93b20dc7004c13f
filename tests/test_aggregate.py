"""Aggregates against plain loops over pixels."""

import numpy as np
import pytest

from seguncert.aggregate import (
    BAND,
    KINDS,
    OF_PICTURES,
    Term,
    aggregate,
    away_from_boundaries,
    class_weights,
    doubt_of,
    parse_score,
)


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(0)
    doubt_HW = rng.random((23, 31)).astype(np.float32)
    labels_HW = np.kron(rng.integers(0, 3, (3, 4)), np.ones((8, 8), int))[:23, :31].astype(np.uint8)
    numbers_HW = rng.integers(-1, 4, (23, 31)).astype(np.int32)
    return doubt_HW, labels_HW, numbers_HW, np.array([0.5, 2.0, 1.3])


def plainly(term, doubt_HW, labels_HW, weights_C, inside_HW):
    """The formulas of the docstring, pixel by pixel."""
    H, W = doubt_HW.shape
    pixels = [(y, x) for y in range(H) for x in range(W) if inside_HW[y, x]]
    values = [float(doubt_HW[at]) for at in pixels]
    if term.kind == "no-boundary":
        kept = []
        for y, x in pixels:
            near = labels_HW[max(0, y - BAND) : y + BAND + 1, max(0, x - BAND) : x + BAND + 1]
            if (near == labels_HW[y, x]).all():
                kept.append(float(doubt_HW[y, x]))
        return sum(kept) / len(kept) if kept else 0.0
    if term.kind == "class-weighted":
        return sum(weights_C[labels_HW[at]] * float(doubt_HW[at]) for at in pixels) / len(pixels)
    if term.kind == "foreground":
        count = sum(labels_HW[at] != 0 for at in pixels)
        return sum(sorted(values)[-count:]) / count
    if term.kind == "top":
        count = int(np.ceil(term.number / 100 * len(values)))
        return sum(sorted(values)[-count:]) / count
    if term.kind == "patch":
        n = int(term.number)
        return max(doubt_HW[y : y + n, x : x + n].mean() for y in range(H - n + 1) for x in range(W - n + 1))
    return sum(values) / len(values)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_picture(scene, kind):
    doubt_HW, labels_HW, _, weights_C = scene
    term = Term("entropy", kind, {"top": 7.0, "patch": 6.0}.get(kind, 0.0))
    (found,) = aggregate(term, doubt_HW, labels_HW, weights_C=weights_C)
    assert found == pytest.approx(plainly(term, doubt_HW, labels_HW, weights_C, np.ones_like(labels_HW)), rel=1e-6)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(OF_PICTURES)))
def test_of_regions(scene, kind):
    doubt_HW, labels_HW, numbers_HW, weights_C = scene
    term = Term("entropy", kind, 7.0 if kind == "top" else 0.0)
    found_R = aggregate(term, doubt_HW, labels_HW, numbers_HW, 5, weights_C)
    for r in range(4):
        expected = plainly(term, doubt_HW, labels_HW, weights_C, numbers_HW == r)
        assert found_R[r] == pytest.approx(expected, rel=1e-6), r
    assert found_R[4] == 0  # has no pixel


def test_a_patch_larger_than_the_picture_is_all_of_it(scene):
    doubt_HW, labels_HW, _, _ = scene
    (found,) = aggregate(Term("entropy", "patch", 1000.0), doubt_HW[:, :23], labels_HW[:, :23])
    assert found == pytest.approx(doubt_HW[:, :23].mean(), rel=1e-6)


def test_no_pixel_is_far_from_a_boundary():
    stripes = np.tile(np.array([0, 1], np.uint8), (9, 5))
    assert not away_from_boundaries(stripes).any()
    assert aggregate(Term("entropy", "no-boundary"), np.ones((9, 10), np.float32), stripes).tolist() == [0.0]
    assert aggregate(
        Term("entropy", "foreground"), np.ones((9, 10), np.float32), np.zeros((9, 10), np.uint8)
    ).tolist() == [0.0]


def test_class_weights_have_mean_one_over_the_pool():
    areas_C = np.array([900, 90, 10, 0])
    weights_C = class_weights(areas_C)
    assert (weights_C * areas_C).sum() / 1000 == pytest.approx(1)
    assert weights_C[2] / weights_C[0] == pytest.approx(np.sqrt(90)) and weights_C[3] == 0


def test_doubt_is_turned_round_where_high_is_sure():
    map_HW = np.array([[0.25]], np.float32)
    assert doubt_of(map_HW, "confidence").item() == 0.75 and doubt_of(map_HW, "entropy").item() == 0.25


@pytest.mark.parametrize(
    "text, told",
    [
        ("entropy", ["entropy:mean"]),
        ("entropy:class-weighted*variance:top:10^0.5", ["entropy:class-weighted", "variance:top:10^0.5"]),
        ("disagreement^2 * confidence:patch", ["disagreement^2", "confidence:patch:32"]),
    ],
)
def test_scores_are_read_and_told_again(text, told):
    assert [str(term) for term in parse_score(text)] == told
    assert parse_score(" * ".join(told)) == parse_score(text)


@pytest.mark.parametrize(
    "text, said",
    [
        ("doubt:mean", "score: expected MAP:KIND"), ("entropy:median", "KIND one of mean"), ("entropy:mean:5", "Received: 'entropy:mean:5'"),
        ("entropy:top:0", "above 0 and up to 100. Received: 0"), ("entropy:patch:1.5", "whole number of pixels"), ("entropy^0", "powers above 0"),
        ("", "score: expected MAP:KIND"), ("entropy**margin", "score: expected MAP:KIND"), ("disagreement:top:5", "score: expected MAP:KIND"),
        ("entropy:top:1.2.3", "score: expected MAP:KIND"),
    ],
)  # fmt: skip
def test_what_is_no_score_is_said_in_one_line(text, said):
    with pytest.raises(ValueError, match=".*") as error:
        parse_score(text)
    assert said in str(error.value) and "\n" not in str(error.value)
