"""Which candidates to take, so that each is worth it and they are not all the same.

Greedy k-center (Gonzalez 1985; Sener, Savarese 2018), weighted: each step takes the candidate of largest

    gain = distance^a · score^b

with the Euclidean distance to the nearest of what is labelled or was taken before, in units of the typical distance of two
candidates. Who is nearer than `radius` is left out as too similar.

It is exact and lazy: a gain only falls as more is taken, so the one computed last is an upper bound (Minoux 1978). Candidates lie
in chunks by falling score, and only the chunk with the highest bound is brought up to date.

Letters: N candidates, D numbers of a vector, M centres, that is labelled ones and then taken ones, K chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from seguncert.kernels import compiled

CHUNK = 256
PAIRS = 2048  # of random candidates, whose median distance is the unit


def typical_distance(vectors_ND: Float32[np.ndarray, "N D"], seed: int = 0) -> float:
    """Median distance of two different candidates, of `PAIRS` drawn at random; 1 where they are all the same.

    >>> typical_distance(np.array([[0.0], [3.0]], np.float32))
    3.0
    """
    N = len(vectors_ND)
    if N < 2:
        return 1.0
    rng = np.random.default_rng(seed)
    first = rng.integers(0, N, PAIRS)
    second = (first + rng.integers(1, N, PAIRS)) % N
    distance = float(np.median(np.linalg.norm(vectors_ND[first].astype(np.float64) - vectors_ND[second], axis=1)))
    return distance if distance > 0 else 1.0


@dataclass(frozen=True)
class Taken:
    """One step: which candidate, its gain, and its distance to the nearest centre, NaN where there was none yet."""

    index: int
    gain: float
    distance: float


class Greedy:
    """Takes one candidate after another. `left_out` tells of those that came up and were too similar: candidate to centre.

    Args:
        vectors_ND: where the candidates lie, in units of the typical distance; None: all at distance 1 of each other.
        score_N: not negative; what each is worth.
        labelled_MD: the first M centres, those that are labelled.
        distance, score: the exponents a and b.

    >>> greedy = Greedy(np.array([[0.0], [0.1], [2.0]], np.float32), np.array([1.0, 0.9, 0.5]), radius=0.5)
    >>> [greedy.take().index for _ in range(2)], greedy.take(), greedy.left_out
    ([0, 2], None, {1: 0})
    """

    def __init__(
        self,
        vectors_ND: Float32[np.ndarray, "N D"] | None,
        score_N: Float64[np.ndarray, " N"],
        labelled_MD: Float32[np.ndarray, "M D"] | None = None,
        *,
        distance: float = 1.0,
        score: float = 1.0,
        radius: float = 0.0,
    ):
        N = len(score_N)
        self.vectors_ND = np.zeros((N, 0), np.float32) if vectors_ND is None else np.ascontiguousarray(vectors_ND)
        D = self.vectors_ND.shape[1]
        known_MD = np.zeros((0, D), np.float32) if labelled_MD is None or not D else labelled_MD
        self.labelled, self.radius, self.a = len(known_MD), radius, distance
        self.centres_MD = np.concatenate([known_MD.astype(np.float32), np.zeros((64, D), np.float32)])
        self.centres = len(known_MD)
        self.worth_N = np.power(score_N, score) if score else np.ones(N)
        self.order_N = np.argsort(-self.worth_N, kind="stable")
        self.square_N = np.full(N, np.inf, np.float32)  # of the distance to the nearest centre so far
        self.nearest_N = np.full(N, -1, np.int64)
        self.open_N = np.ones(N, bool)
        K = -(-N // CHUNK)
        self.seen_K = np.zeros(K, np.int64)  # centres that a chunk's distances know of
        reach = 2 * float(np.sqrt((self._centred() ** 2).sum(1).max())) if D and N else 1.0
        self.far = np.float32(max(reach, 1e-6))  # no distance is larger; of what has no centre yet it is the bound
        self.bound_K = self.worth_N[self.order_N[::CHUNK]] * float(self.far) ** self.a
        self.left_out: dict[int, int] = {}

    def take(self, among_N: Bool[np.ndarray, " N"] | None = None) -> Taken | None:
        """The best of those that are left (and in `among_N`); it becomes a centre. None where there is none."""
        among_N = self.open_N if among_N is None else among_N & self.open_N
        bound_K = self.bound_K.copy()
        best, best_gain = -1, -1.0
        while len(bound_K):
            k = int(bound_K.argmax())
            if bound_K[k] < best_gain or bound_K[k] < 0:
                break
            rows = self.order_N[k * CHUNK : (k + 1) * CHUNK]
            self._bring_up_to_date(k, rows)
            bound_K[k] = -1.0
            here = rows[among_N[rows] & self.open_N[rows]]
            if len(here):
                gains = self._gain(here)
                at = int(gains.argmax())
                if gains[at] > best_gain or (gains[at] == best_gain and here[at] < best):
                    best, best_gain = int(here[at]), float(gains[at])
        if best < 0:
            return None
        known = bool(np.isfinite(self.square_N[best])) and self.vectors_ND.shape[1] > 0
        distance = float(np.sqrt(self.square_N[best])) if known else float("nan")
        self._add_centre(best)
        return Taken(best, best_gain, distance)

    def shut(self, indices: Int64[np.ndarray, " n"]) -> None:
        """These are not to be taken any more."""
        self.open_N[indices] = False

    def centre_of(self, index: int) -> int:
        """The nearest centre of a candidate: below `labelled` a labelled one, else `labelled` + how many were taken before."""
        return int(self.nearest_N[index])

    def _centred(self) -> np.ndarray:
        parts = np.concatenate([self.vectors_ND, self.centres_MD[: self.centres]])
        return parts - parts.mean(0, dtype=np.float64).astype(np.float32)

    def _gain(self, rows: np.ndarray) -> np.ndarray:
        square = self.square_N[rows]
        distance = np.where(np.isfinite(square), np.sqrt(square), self.far)
        return self.worth_N[rows] * distance.astype(np.float64) ** self.a

    def _bring_up_to_date(self, k: int, rows: np.ndarray) -> None:
        if self.vectors_ND.shape[1] and self.seen_K[k] < self.centres:
            _nearer(self.vectors_ND, rows, self.centres_MD, self.seen_K[k], self.centres, self.square_N, self.nearest_N)
            if self.radius > 0:
                near = rows[self.open_N[rows] & (self.square_N[rows] < np.float32(self.radius) ** 2)]
                self.left_out |= {int(row): int(self.nearest_N[row]) for row in near}
                self.open_N[near] = False
        self.seen_K[k] = self.centres
        open_rows = rows[self.open_N[rows]]
        self.bound_K[k] = self._gain(open_rows).max() if len(open_rows) else -1.0

    def _add_centre(self, index: int) -> None:
        self.open_N[index] = False
        if self.centres == len(self.centres_MD):
            self.centres_MD = np.concatenate([self.centres_MD, np.zeros_like(self.centres_MD)])
        self.centres_MD[self.centres] = self.vectors_ND[index]
        self.centres += 1


@partial(compiled, also=["reassoc"])  # the order of the sum over d
def _nearer(vectors_ND, rows, centres_MD, first, last, square_N, nearest_N):
    """Bring squared distances and nearest centres of some rows up to date with centres `first` to `last`."""
    for row in rows:
        least, at = square_N[row], nearest_N[row]
        for m in range(first, last):
            square = np.float32(0)
            for d in range(vectors_ND.shape[1]):
                apart = vectors_ND[row, d] - centres_MD[m, d]
                square += apart * apart
            if square < least:
                least, at = square, m
        square_N[row], nearest_N[row] = least, at
