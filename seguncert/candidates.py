"""What can be chosen from a pool: images, or parts of them, each with its score, its classes, and where it lies among the others.

Letters: N images of the pool, M candidates, C classes, D numbers of an embedding, R regions of one image.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TypeVar

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8

from seguncert.aggregate import (
    DISAGREEMENT,
    OF_PICTURES,
    Term,
    aggregate,
    away_from_boundaries,
    class_weights,
    doubt_of,
)
from seguncert.diversity import typical_distance
from seguncert.labelled import Labelled
from seguncert.pool import Pool, PoolError
from seguncert.regions import Regions, estimated_clicks, grid, parse_region, pixels, segments, superpixels

MOST = 300_000  # candidates kept of those that are best, for each way to choose
BY_SCORE, AT_RANDOM, BY_MEAN = 1, 2, 4  # ways to choose, as bits
PIXEL_KINDS = ("mean", "no-boundary", "class-weighted")
KNOWN = 0.5  # share of a region's pixels from which on it counts as labelled
PLACE = 0.5  # of the distance between opposite corners of an image, in units of the typical distance of two images

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Wish:
    """What is to be chosen, and by what."""

    unit: str
    region: str
    terms: tuple[Term, ...]
    plain: str  # the map of which the plain mean is compared with
    per_image: int
    background: int
    clicks: bool
    seed: int


@dataclass(frozen=True, eq=False)
class Candidates:
    """M candidates. `image_M` is the row in the pool, `number_M` the region's number in its image, `boxes_M4` x, y, width, height;
    `plain_M` is the mean of a map alone, `key_M` random in [0, 1), `shares_MC` the shares of the shown classes, `ways_M` in which
    ways to choose each may be taken: of pixels there are others for each way."""

    image_M: Int64[np.ndarray, " M"]
    number_M: Int64[np.ndarray, " M"]
    boxes_M4: Int64[np.ndarray, "M 4"]
    size_M: Int64[np.ndarray, " M"]
    score_M: Float64[np.ndarray, " M"]
    plain_M: Float64[np.ndarray, " M"]
    key_M: Float64[np.ndarray, " M"]
    shares_MC: Float32[np.ndarray, "M C"]
    clicks_M: Int64[np.ndarray, " M"]
    labelled_M: Bool[np.ndarray, " M"]
    ways_M: UInt8[np.ndarray, " M"]

    @property
    def worth_M(self) -> Float64[np.ndarray, " M"]:
        """Score, for each click where those are counted."""
        return self.score_M / np.maximum(self.clicks_M, 1)

    def at(self, rows: np.ndarray) -> Candidates:
        """Some of them."""
        return Candidates(**{each.name: getattr(self, each.name)[rows] for each in fields(self)})

    @classmethod
    def together(cls, parts: Sequence[Candidates]) -> Candidates:
        """All of several."""
        return cls(**{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)})


def check_wish(pool: Pool, wish: Wish) -> None:
    """Raise PoolError where the export does not have what is asked for, ValueError where a score does not suit the unit."""
    for term in wish.terms:
        if term.map == DISAGREEMENT:
            if wish.unit != "image":
                raise ValueError(
                    f"score: {DISAGREEMENT} is of whole images. Received: unit {wish.unit}; take variance:mean"
                )
            if pool.disagreement_N is None:
                raise PoolError(f"score: {DISAGREEMENT} needs an export with samples. Received: method"
                                f" {pool.run['method']}. Export with --method mc-dropout.")  # fmt: skip
        elif term.map not in pool.means:
            raise PoolError(
                f"score: expected a map of the export: {', '.join(pool.means)}. Received: {term.map}. Export with"
                f" --maps {','.join([*pool.means, term.map])}, into a new folder."
            )
        if wish.unit == "pixel" and term.kind not in PIXEL_KINDS:
            raise ValueError(
                f"score: expected of single pixels one of {', '.join(PIXEL_KINDS)}. Received: {term.kind}; take {term.map}:mean"
            )
        if term.kind in OF_PICTURES and wish.unit != "image":
            raise ValueError(f"score: {term.kind} is of whole images. Received: unit {wish.unit}; take mean or top:5")
    if wish.unit == "region":
        parse_region(wish.region)


@dataclass(frozen=True, eq=False)
class Found:
    """Candidates, and how many there are in all, that may be chosen by score: of more than `MOST` only the best are kept."""

    candidates: Candidates
    total: int
    labelled: int


def find_candidates(
    pool: Pool, wish: Wish, labelled: Labelled, workers: int, progress: Callable[[int, int], None] | None = None
) -> Found:
    """All candidates of the pool; of more than `MOST` those that are best in one of the ways, and the labelled ones."""
    weights_C = class_weights(pool.areas_NC.sum(0))
    quick = all(term.map == DISAGREEMENT or term.kind == "mean" for term in wish.terms) and not wish.clicks
    N = len(pool.paths)
    if wish.unit == "image":
        clicks_N = np.zeros(N, np.int64)
        score_N = _scores_of_means(pool, wish.terms, slice(None)) if quick else np.empty(N)
        if not quick:
            for image, seen in enumerate(
                each_of(lambda k: _look_at_image(pool, wish, weights_C, k), range(N), workers)
            ):
                score_N[image], clicks_N[image] = seen
                if progress is not None:
                    progress(image + 1, N)
        found = _of_images(pool, wish, labelled, score_N, clicks_N)
        return Found(found, N, int(found.labelled_M.sum()))

    kept, waiting, total, known = list[Candidates](), 0, 0, 0
    parts = each_of(lambda image: _look_at_parts(pool, wish, weights_C, labelled, image), range(N), workers)
    for image, part in enumerate(parts):
        kept.append(part)
        own_M = (part.ways_M & BY_SCORE).astype(bool)
        total, known = total + int(own_M.sum()), known + int(part.labelled_M[own_M].sum())
        waiting += len(part.image_M)
        if waiting > 6 * MOST:
            kept = [_best(Candidates.together(kept))]
            waiting = len(kept[0].image_M)
        if progress is not None:
            progress(image + 1, N)
    return Found(_best(Candidates.together(kept)), total, known)


def vectors(pool: Pool, candidates: Candidates, unit: str) -> Float32[np.ndarray, "M D"] | None:
    """Where candidates lie, in units of the typical distance of two of them; None where the export has no embeddings.

    Images lie at their embeddings. Parts of images at the embedding of their image, next to it the square roots of the
    shares of their shown classes (so the distance is Hellinger's, times √2) and their place in the picture.
    """
    if pool.embeddings_ND is None:
        return None
    found_MD = pool.embeddings_ND[candidates.image_M] / np.float32(typical_distance(pool.embeddings_ND))
    if unit != "image":
        H_M, W_M = pool.sizes_N2[candidates.image_M].T
        x_M, y_M, width_M, height_M = candidates.boxes_M4.T
        place_M2 = np.stack([(x_M + width_M / 2) / W_M, (y_M + height_M / 2) / H_M], 1) * (PLACE / np.sqrt(2))
        found_MD = np.concatenate([found_MD, np.sqrt(candidates.shares_MC), place_M2.astype(np.float32)], 1)
    return (found_MD / np.float32(typical_distance(found_MD))).astype(np.float32)


def partition(pool: Pool, wish: Wish, image: int) -> Regions:
    """The regions or segments of an image."""
    if wish.unit == "segment":
        return segments(pool.labels(image))
    way, size = parse_region(wish.region)
    if way == "grid":
        H, W = pool.sizes_N2[image].tolist()
        return grid(H, W, size)
    photo = pool.photo(image)
    if photo is None:
        raise PoolError(
            f"region: superpixel needs the photos where the export found them. Received: no {pool.paths[image]} as it was in"
            f" {pool.run['input']}. Bring it back, or take grid:64."
        )
    return superpixels(photo, size)


def _pixels(
    wish: Wish, doubts: Mapping[str, np.ndarray], labels_HW: np.ndarray, weights_C: np.ndarray, known_HW: np.ndarray | None,
    rng: np.random.Generator,
) -> tuple[Regions, np.ndarray]:  # fmt: skip
    """Pixels of an image, some for each way to choose, as regions, and their ways: by score, at random, by the plain map."""
    worth_HW = np.ones(labels_HW.shape)
    for term in wish.terms:
        doubt_HW = doubts[term.map].astype(np.float64)
        if term.kind == "class-weighted":
            doubt_HW = doubt_HW * weights_C[labels_HW]
        elif term.kind == "no-boundary":
            doubt_HW = doubt_HW * away_from_boundaries(labels_HW)
        worth_HW *= doubt_HW**term.power
    H, W = labels_HW.shape
    free = np.arange(H * W) if known_HW is None else np.flatnonzero(~known_HW)
    at_random = rng.choice(free, min(wish.per_image, len(free)), replace=False)
    boxes = [
        pixels(worth_HW, wish.per_image, known_HW).boxes_R4,
        np.stack([at_random % W, at_random // W, np.ones_like(at_random), np.ones_like(at_random)], 1),
        pixels(doubts[wish.plain], wish.per_image, known_HW).boxes_R4,
    ]
    boxes_R4 = np.concatenate(boxes).astype(np.int64)
    numbers_HW = np.full((H, W), -1, np.int32)
    numbers_HW[boxes_R4[:, 1], boxes_R4[:, 0]] = np.arange(len(boxes_R4))
    ways_R = np.repeat(np.array([BY_SCORE, AT_RANDOM, BY_MEAN], np.uint8), [len(each) for each in boxes])
    return Regions(numbers_HW, boxes_R4, np.ones(len(boxes_R4), np.int64)), ways_R


def _scores_of_means(pool: Pool, terms: Sequence[Term], images: slice) -> np.ndarray:
    score_n = np.ones(len(pool.paths[images]))
    for term in terms:
        if term.map == DISAGREEMENT:
            assert pool.disagreement_N is not None
            value_n = pool.disagreement_N[images]
        else:
            value_n = doubt_of(pool.means[term.map][images], term.map)
        score_n *= np.maximum(value_n, 0) ** term.power
    return score_n


def _look_at_image(pool: Pool, wish: Wish, weights_C: np.ndarray, image: int) -> tuple[float, int]:
    score, labels_HW = 1.0, pool.labels(image)
    for term in wish.terms:
        if term.map == DISAGREEMENT or term.kind == "mean":
            score *= float(_scores_of_means(pool, [term], slice(image, image + 1))[0])
            continue
        doubt_HW = doubt_of(pool.map(image, term.map), term.map)
        value = float(aggregate(term, doubt_HW, labels_HW, weights_C=weights_C, background=wish.background)[0])
        score *= max(value, 0.0) ** term.power
    return score, max(1, estimated_clicks(labels_HW)) if wish.clicks else 0


def _of_images(pool: Pool, wish: Wish, labelled: Labelled, score_N: np.ndarray, clicks_N: np.ndarray) -> Candidates:
    N = len(pool.paths)
    boxes_N4 = np.concatenate([np.zeros((N, 2), np.int64), pool.sizes_N2[:, ::-1]], 1)
    known_N = np.array([labelled.whole(path) for path in pool.paths], bool)
    shares_NC = (pool.areas_NC / pool.areas_NC.sum(1, keepdims=True)).astype(np.float32)
    plain_N = doubt_of(pool.means[wish.plain], wish.plain)
    key_N = np.random.default_rng(wish.seed).random(N)
    size_N = boxes_N4[:, 2] * boxes_N4[:, 3]
    return Candidates(
        np.arange(N), np.zeros(N, np.int64), boxes_N4, size_N, score_N, plain_N, key_N, shares_NC, clicks_N, known_N,
        np.full(N, BY_SCORE | AT_RANDOM | BY_MEAN, np.uint8),
    )  # fmt: skip


def _look_at_parts(pool: Pool, wish: Wish, weights_C: np.ndarray, labelled: Labelled, image: int) -> Candidates:
    labels_HW, C, path = pool.labels(image), len(pool.classes), pool.paths[image]
    doubts = {name: doubt_of(pool.map(image, name), name) for name in {wish.plain, *(term.map for term in wish.terms)}}
    known_HW = labelled.mask(path, *labels_HW.shape)
    rng = np.random.default_rng([wish.seed, zlib.crc32(path.encode("utf-8", "surrogateescape"))])
    if wish.unit == "pixel":
        found, ways_R = _pixels(wish, doubts, labels_HW, weights_C, known_HW, rng)
        places = found.boxes_R4[:, 1], found.boxes_R4[:, 0]
        score_R, plain_R = np.ones(len(ways_R)), doubts[wish.plain][places].astype(np.float64)
        for term in wish.terms:
            weight_R = weights_C[labels_HW[places]] if term.kind == "class-weighted" else 1.0
            away_R = away_from_boundaries(labels_HW)[places] if term.kind == "no-boundary" else 1.0
            score_R *= (doubts[term.map][places].astype(np.float64) * weight_R * away_R) ** term.power
        shares_RC = np.eye(C, dtype=np.float32)[labels_HW[places]]
        known_R, clicks_R = np.zeros(len(ways_R), bool), np.ones(len(ways_R), np.int64)
    else:
        found = partition(pool, wish, image)
        R, inside = len(found.boxes_R4), found.numbers_HW >= 0
        ways_R, score_R = np.full(R, BY_SCORE | AT_RANDOM | BY_MEAN, np.uint8), np.ones(R)
        for term in wish.terms:
            value_R = aggregate(term, doubts[term.map], labels_HW, found.numbers_HW, R, weights_C)
            score_R *= np.maximum(value_R, 0) ** term.power
        plain_R = aggregate(Term(wish.plain), doubts[wish.plain], None, found.numbers_HW, R)
        of_N = found.numbers_HW[inside].astype(np.int64)
        counts_RC = np.bincount(of_N * C + labels_HW[inside], minlength=R * C).reshape(R, C)
        shares_RC = (counts_RC / np.maximum(found.sizes_R, 1)[:, None]).astype(np.float32)
        known_R = np.zeros(R, bool)
        if known_HW is not None:
            known_R = np.bincount(of_N, known_HW[inside], R) >= KNOWN * found.sizes_R
        clicks_R = np.zeros(R, np.int64)
        for r, (x, y, width, height) in enumerate(found.boxes_R4.tolist() if wish.clicks else []):
            clicks_R[r] = max(1, estimated_clicks(labels_HW[y : y + height, x : x + width], found.mask(r)))
    R = len(ways_R)
    return Candidates(
        np.full(R, image, np.int64), np.arange(R), found.boxes_R4, found.sizes_R, score_R, plain_R, rng.random(R), shares_RC,
        clicks_R, known_R, ways_R,
    )  # fmt: skip


def _best(candidates: Candidates) -> Candidates:
    """Those that are among the `MOST` best by score, by the plain mean or by the random key, and the labelled ones."""
    if len(candidates.image_M) <= MOST:
        return candidates
    kept_M = candidates.labelled_M.copy()
    for way, value_M in (
        (BY_SCORE, -candidates.worth_M), (BY_MEAN, -candidates.plain_M), (AT_RANDOM, candidates.key_M)
    ):  # fmt: skip
        own = np.flatnonzero(candidates.ways_M & way)
        kept_M[own[np.argsort(value_M[own], kind="stable")[:MOST]]] = True
    return candidates.at(np.flatnonzero(kept_M))


def each_of(work: Callable[[int], T], images: Sequence[int], workers: int) -> Iterator[T]:
    """What `work` gives of each, in order, on several threads, a few ahead."""

    def alone(image: int) -> T:
        cv2.setNumThreads(1)
        return work(image)

    under_way = deque[Future[T]]()
    with ThreadPoolExecutor(workers) as threads:
        try:
            for image in images:
                under_way.append(threads.submit(alone, image))
                if len(under_way) > 4 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
