"""Gaps, quotas, budgets: what the choice may not do, whatever the scores."""

import numpy as np
import pytest
from pools import make_candidates, make_pool

from seguncert.candidates import AT_RANDOM
from seguncert.choice import Asked, choose, in_order

DRIVE = [f"drive/{number:05}.png" for number in range(0, 3000, 30)]  # 100 frames
OTHER = [f"other/{number:05}.png" for number in range(0, 600, 30)]  # 20 frames


def frames(picks, sequence):
    return sorted(pick.frame for pick in picks if pick.sequence == sequence)


@pytest.mark.parametrize("gap", ["150", "31"])
def test_no_two_frames_of_a_sequence_within_the_gap(gap):
    pool = make_pool(sorted(DRIVE + OTHER))
    found = make_candidates(pool, np.random.default_rng(2).random(120) ** 4)
    chosen = choose(pool, Asked(15, gap=gap), found)
    assert len(chosen.picks) == 15
    for sequence in ("drive/", "other/"):
        assert np.diff(frames(chosen.picks, sequence)).min(initial=10_000) >= int(gap)
    assert chosen.blocked_count >= len(chosen.blocked) > 0 and {pick.path for pick in chosen.blocked}.isdisjoint(
        pick.path for pick in chosen.picks
    )


def test_the_gap_of_itself_is_half_an_even_spread():
    pool = make_pool(DRIVE)
    found = make_candidates(pool, np.linspace(1, 0, 100))  # the best are all at the beginning
    chosen = choose(pool, Asked(10, diversity=0.0), found)
    assert frames(chosen.picks, "drive/") == list(range(0, 1500, 150))  # 100 frames / (2 · 10) = 5 of 30
    assert (
        choose(
            make_pool([f"{k}.png" for k in "abcdefgh"]), Asked(8), make_candidates(make_pool("abcdefgh"), [1] * 8)
        ).blocked
        == []
    )


def test_images_without_a_number_have_no_gap_and_it_is_told():
    pool = make_pool(["a.png", "b.png", "c1.png"])
    chosen = choose(pool, Asked(3, gap="1000"), make_candidates(pool, [1, 1, 1]))
    assert len(chosen.picks) == 3 and "the gap does not hold for 2 of 3 images" in chosen.notes[0]
    assert not choose(pool, Asked(3), make_candidates(pool, [1, 1, 1])).notes


def test_the_gap_holds_to_what_is_labelled_and_survives_jumps():
    pool = make_pool(DRIVE)
    found = make_candidates(pool, np.linspace(1, 0, 100), labelled=[0])
    assert frames(choose(pool, Asked(3, diversity=0.0, gap="100"), found).picks, "drive/") == [120, 240, 360]
    jump = make_pool([f"drive/{number:06}.png" for number in [*range(50), *range(100_000, 100_050)]])
    assert len(choose(jump, Asked(10), make_candidates(jump, np.ones(100))).picks) == 10


def test_a_gap_that_leaves_too_few_is_told():
    pool = make_pool(DRIVE)
    chosen = choose(pool, Asked(20, gap="500"), make_candidates(pool, np.ones(100)))
    assert len(chosen.picks) < 20 and "too near in a video" in chosen.notes[0]


def test_quotas_are_met_or_it_is_told():
    rng = np.random.default_rng(3)
    pool = make_pool([f"{k:03}.png" for k in range(200)])
    shares = np.zeros((200, 3))
    shares[:, 2] = np.where(np.arange(200) % 10 == 0, 0.5, 0.0)  # few images have c
    shares[:, 0] = 1 - shares[:, 2]
    score = rng.random(200) * np.where(shares[:, 2] > 0, 0.01, 1)  # and they score low
    found = make_candidates(pool, score, shares=shares)
    without = choose(pool, Asked(20, gap="0"), found)
    assert sum(shares[pick.row, 2] for pick in without.picks) / 20 < 0.2
    chosen = choose(pool, Asked(20, gap="0", quotas={"c": 0.2}), found)
    assert sum(shares[pick.row, 2] for pick in chosen.picks) / 20 >= 0.2 and not chosen.notes
    assert any("for the quota of c" in pick.reason for pick in chosen.picks)
    many = choose(pool, Asked(60, gap="0", quotas={"c": 0.4}), found)
    assert len(many.picks) == 60 and "quota of c not met" in many.notes[0]


def test_quotas_that_stand_in_each_others_way_are_told():
    pool = make_pool([f"{k:03}.png" for k in range(100)])
    shares = np.zeros((100, 3))
    shares[:, 0], shares[:, 1], shares[:, 2] = 0.5, 0.0, 0.5
    shares[::2, 0], shares[::2, 1] = 0.0, 0.5
    chosen = choose(
        pool, Asked(10, gap="0", quotas={"a": 0.4, "b": 0.4}), make_candidates(pool, np.ones(100), shares=shares)
    )
    reached = sum(shares[pick.row] for pick in chosen.picks) / 10
    assert (reached[:2] < 0.4).any() and len(chosen.notes) == (reached[:2] < 0.4).sum()
    assert f"{min(reached[:2]):.1%} of the picked area, not 40.0%" in " ".join(chosen.notes)


def test_a_budget_of_clicks_is_not_passed():
    rng = np.random.default_rng(4)
    pool = make_pool([f"{k}.png" for k in range(100)])
    clicks = rng.integers(10, 90, 100)
    found = make_candidates(pool, rng.random(100), clicks=clicks)
    asked = Asked(500, budget_in="clicks", gap="0")
    for picks in (choose(pool, asked, found).picks, in_order(pool, asked, found, AT_RANDOM, found.key_M, "random")):
        spent = sum(clicks[pick.row] for pick in picks)
        left = np.setdiff1d(np.arange(100), [pick.row for pick in picks])
        assert 500 - clicks[left].min() < spent <= 500  # nothing more would have fitted
    assert "all that there is takes" in choose(pool, Asked(10**6, budget_in="clicks", gap="0"), found).notes[0]
    with pytest.raises(ValueError, match=f"expected at least {clicks.min()} clicks, which the cheapest image"):
        choose(pool, Asked(int(clicks.min()) - 1, budget_in="clicks"), found)
    by_value = choose(pool, Asked(500, budget_in="clicks", gap="0", diversity=0.0), found).picks
    assert by_value[0].row == int(np.argmax(found.score_M / clicks))


def test_what_is_labelled_is_a_centre_and_is_not_picked():
    pool = make_pool([f"{k}.png" for k in range(50)])
    pool.embeddings_ND[7] = pool.embeddings_ND[3]  # the same photo again
    score = np.ones(50)
    score[7] = 100
    found = make_candidates(pool, score, labelled=[3, 20])
    chosen = choose(pool, Asked(30, gap="0"), found)
    assert {3, 7, 20}.isdisjoint(pick.row for pick in chosen.picks)
    (similar,) = [pick for pick in chosen.similar if pick.row == 7]
    assert (similar.near, similar.near_rank, similar.distance) == (pool.paths[3], None, 0.0)
    for pick in chosen.picks:  # and each says truly what is nearest of what there was
        earlier = [other.row for other in chosen.picks[: pick.rank - 1]] + [3, 20]
        apart = np.linalg.norm(pool.embeddings_ND[earlier] - pool.embeddings_ND[pick.row], axis=1)
        assert pool.paths[earlier[int(apart.argmin())]] == pick.near
        assert pick.near_rank == next((other.rank for other in chosen.picks if other.path == pick.near), None)


def test_random_picks_are_uniform():
    pool, hits = make_pool([f"{k}.png" for k in range(10)]), np.zeros(10)
    found = make_candidates(pool, np.ones(10), labelled=[4])
    for seed in range(600):
        key = np.random.default_rng(seed).random(10)
        for pick in in_order(pool, Asked(3), found, AT_RANDOM, key, "random"):
            hits[pick.row] += 1
    assert hits[4] == 0 and abs(hits[np.arange(10) != 4] - 200).max() < 60  # 4 standard deviations are 46


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"budget": 0}, "budget: expected 1 or more"), ({"unit": "frame"}, "unit: expected one of image"), ({"gap": "soon"}, "gap: expected auto"),
        ({"quotas": {"a": 1.5}}, "quota: expected a share"), ({"quotas": {"a": 0.6, "b": 0.6}}, "at most 1 together"),
        ({"radius": -1.0}, "radius: expected 0 or more"), ({"diversity": -1.0}, "diversity: expected a power"), ({"budget_in": "euro"}, "budget-in: expected"),
    ],
)  # fmt: skip
def test_wrong_settings(wrong, said):
    with pytest.raises(ValueError) as error:
        Asked(**({"budget": 5} | wrong))
    assert said in str(error.value) and "Received" in str(error.value) and "\n" not in str(error.value)
