"""The lazy choice is the plain one: each step over all candidates."""

import numpy as np
import pytest

from seguncert.diversity import CHUNK, Greedy, typical_distance


def plainly(vectors, score, steps, a, known=(), radius=0.0):
    """Every distance anew at every step; indices taken, and those that are too near in the end."""
    N, taken = len(score), []
    centres = [np.asarray(each, np.float64) for each in known]
    for _ in range(steps):
        best, best_gain = -1, -1.0
        for i in range(N):
            distance = min((np.linalg.norm(vectors[i].astype(np.float64) - c) for c in centres), default=None)
            if i in taken or (distance is not None and distance < radius):
                continue
            gain = score[i] * (1.0 if distance is None else distance**a)
            if gain > best_gain + 1e-12:
                best, best_gain = i, gain
        if best < 0:
            break
        taken.append(best)
        centres.append(vectors[best].astype(np.float64))
    return taken


@pytest.mark.parametrize("a", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("equal", [False, True], ids=["scores differ", "scores equal"])
def test_as_the_plain_loop(a, equal):
    rng = np.random.default_rng(int(10 * a) + equal)
    vectors = rng.standard_normal((3 * CHUNK // 2, 5)).astype(np.float32)
    score = np.ones(len(vectors)) if equal else rng.random(len(vectors))
    greedy = Greedy(vectors, score, distance=a)
    assert [greedy.take().index for _ in range(25)] == plainly(vectors, score, 25, a)


def test_labelled_ones_are_centres_from_the_start():
    rng = np.random.default_rng(1)
    vectors, score = rng.standard_normal((400, 3)).astype(np.float32), rng.random(400)
    known = rng.standard_normal((7, 3)).astype(np.float32)
    greedy = Greedy(vectors, score, known, radius=0.8)
    taken = []
    while (step := greedy.take()) is not None:
        taken.append(step.index)
    assert taken == plainly(vectors, score, 400, 1.0, known, 0.8)
    centres = np.concatenate([known, vectors[taken]]).astype(np.float64)
    apart = np.linalg.norm(centres[7:, None] - centres[None], axis=2)
    np.fill_diagonal(apart[:, 7:], np.inf)
    assert apart.min() >= 0.8 - 1e-6
    assert set(greedy.left_out) == set(range(400)) - set(taken)
    for index, centre in greedy.left_out.items():
        assert np.linalg.norm(vectors[index] - centres[centre]) < 0.8 + 1e-6


def test_the_distance_told_is_that_to_the_nearest():
    vectors = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 3.0]], np.float32)
    greedy = Greedy(vectors, np.array([1.0, 0.9, 0.8]))
    first, second = greedy.take(), greedy.take()
    assert np.isnan(first.distance)
    assert (second.index, second.distance, greedy.centre_of(1)) == (1, 5.0, 0)
    third = greedy.take()
    assert (third.index, third.distance, greedy.centre_of(2)) == (2, 1.0, 1)
    assert greedy.take() is None


def test_among_some_only_and_what_is_shut():
    rng = np.random.default_rng(2)
    vectors, score = rng.standard_normal((1000, 4)).astype(np.float32), rng.random(1000)
    greedy = Greedy(vectors, score)
    few = np.zeros(1000, bool)
    few[[17, 500, 999]] = True
    assert greedy.take(few).index == max((17, 500, 999), key=lambda i: score[i])
    greedy.shut(np.setdiff1d(np.arange(1000), [3, 4]))
    assert {greedy.take().index, greedy.take().index} == {3, 4}
    assert greedy.take() is None and greedy.take(few) is None


def test_without_vectors_by_score_alone():
    score = np.array([0.2, 0.9, 0.9, 0.0])
    greedy = Greedy(None, score, radius=0.5)
    assert [greedy.take().index for _ in range(4)] == [1, 2, 0, 3]


def test_scores_of_zero_are_taken_last_and_in_order():
    vectors = np.arange(5, dtype=np.float32)[:, None]
    greedy = Greedy(vectors, np.array([0.0, 0.0, 1.0, 0.0, 0.0]))
    assert [greedy.take().index for _ in range(5)] == [2, 0, 1, 3, 4]


def test_typical_distance_of_what_is_all_the_same():
    assert typical_distance(np.zeros((10, 3), np.float32)) == 1.0
    assert typical_distance(np.zeros((1, 3), np.float32)) == 1.0
    rng = np.random.default_rng(3)
    cloud = rng.standard_normal((5000, 32)).astype(np.float32)
    assert typical_distance(cloud) == pytest.approx(8.0, rel=0.05)  # √(2 · 32)
