"""What can be chosen from a pool: images, or parts of them, each with its score, its classes, and where it lies among the others.

Letters: N images of the pool, M candidates, C classes, D numbers of an embedding, R regions of one image.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TypeVar

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from seguncert.aggregate import DISAGREEMENT, OF_PICTURES, Term, aggregate, class_weights, doubt_of
from seguncert.diversity import typical_distance
from seguncert.labelled import Labelled
from seguncert.pool import Pool, PoolError
from seguncert.regions import Regions, estimated_clicks, grid, parse_region, pixels, segments, superpixels

MOST = 300_000  # candidates kept of those that are best, for each way to choose
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
    `plain_M` is the mean of a map alone, `key_M` random in [0, 1), `shares_MC` the shares of the shown classes."""

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
        if term.kind in OF_PICTURES and wish.unit != "image":
            raise ValueError(f"score: {term.kind} is of whole images. Received: unit {wish.unit}; take mean or top:5")
    if wish.unit == "region":
        parse_region(wish.region)


def find_candidates(
    pool: Pool, wish: Wish, labelled: Labelled, workers: int, progress: Callable[[int, int], None] | None = None
) -> Candidates:
    """All candidates of the pool; of more than `MOST` those that are best in one of the ways, and the labelled ones."""
    weights_C = class_weights(pool.areas_NC.sum(0))
    quick = all(term.map == DISAGREEMENT or term.kind == "mean" for term in wish.terms) and not wish.clicks
    if wish.unit == "image":
        score_N = _scores_of_means(pool, wish.terms) if quick else np.empty(len(pool.paths))
        clicks_N = np.zeros(len(pool.paths), np.int64)
        if not quick:
            read = each_of(lambda image: _look_at_image(pool, wish, weights_C, image), range(len(pool.paths)), workers)
            for image, (score, clicks) in enumerate(read):
                score_N[image], clicks_N[image] = score, clicks
                if progress is not None:
                    progress(image + 1, len(pool.paths))
        return _of_images(pool, wish, labelled, score_N, clicks_N)

    kept, waiting = list[Candidates](), 0
    parts = each_of(
        lambda image: _look_at_parts(pool, wish, weights_C, labelled, image), range(len(pool.paths)), workers
    )
    for image, part in enumerate(parts):
        kept.append(part)
        waiting += len(part.image_M)
        if waiting > 6 * MOST:
            kept = [_best(Candidates.together(kept))]
            waiting = len(kept[0].image_M)
        if progress is not None:
            progress(image + 1, len(pool.paths))
    return _best(Candidates.together(kept))


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


def partition(pool: Pool, wish: Wish, image: int, worth_HW: np.ndarray | None = None) -> Regions:
    """The regions of an image; of pixels those of largest `worth_HW`."""
    if wish.unit == "segment":
        return segments(pool.labels(image))
    if wish.unit == "pixel":
        assert worth_HW is not None
        return pixels(worth_HW, wish.per_image)
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


def pixel_worth(pool: Pool, wish: Wish, image: int) -> np.ndarray:
    """(H, W): the score of single pixels, the product of the maps' doubts to their powers."""
    weights_C, worth_HW = class_weights(pool.areas_NC.sum(0)), np.ones(1)
    for term in wish.terms:
        doubt_HW = doubt_of(pool.map(image, term.map), term.map).astype(np.float64)
        if term.kind == "class-weighted":
            doubt_HW *= weights_C[pool.labels(image)]
        worth_HW = worth_HW * doubt_HW**term.power
    return worth_HW


def _scores_of_means(pool: Pool, terms: Sequence[Term]) -> np.ndarray:
    score_N = np.ones(len(pool.paths))
    for term in terms:
        if term.map == DISAGREEMENT:
            assert pool.disagreement_N is not None
            value_N = pool.disagreement_N
        else:
            value_N = doubt_of(pool.means[term.map], term.map)
        score_N *= np.maximum(value_N, 0) ** term.power
    return score_N


def _look_at_image(pool: Pool, wish: Wish, weights_C: np.ndarray, image: int) -> tuple[float, int]:
    score, labels_HW = 1.0, pool.labels(image)
    for term in wish.terms:
        if term.map == DISAGREEMENT or term.kind == "mean":
            value = float(_scores_of_means_at(pool, term, image))
        else:
            doubt_HW = doubt_of(pool.map(image, term.map), term.map)
            value = float(aggregate(term, doubt_HW, labels_HW, weights_C=weights_C, background=wish.background)[0])
        score *= max(value, 0.0) ** term.power
    return score, estimated_clicks(labels_HW) if wish.clicks else 0


def _scores_of_means_at(pool: Pool, term: Term, image: int) -> float:
    if term.map == DISAGREEMENT:
        assert pool.disagreement_N is not None
        return float(pool.disagreement_N[image])
    return float(doubt_of(pool.means[term.map][image : image + 1], term.map)[0])


def _of_images(pool: Pool, wish: Wish, labelled: Labelled, score_N: np.ndarray, clicks_N: np.ndarray) -> Candidates:
    N = len(pool.paths)
    boxes_N4 = np.concatenate([np.zeros((N, 2), np.int64), pool.sizes_N2[:, ::-1]], 1)
    known_N = np.array([labelled.whole(path) for path in pool.paths], bool)
    shares_NC = (pool.areas_NC / pool.areas_NC.sum(1, keepdims=True)).astype(np.float32)
    plain_N = doubt_of(pool.means[wish.plain], wish.plain)
    key_N = np.random.default_rng(wish.seed).random(N)
    size_N = boxes_N4[:, 2] * boxes_N4[:, 3]
    return Candidates(
        np.arange(N), np.zeros(N, np.int64), boxes_N4, size_N, score_N, plain_N, key_N, shares_NC, clicks_N, known_N
    )


def _look_at_parts(pool: Pool, wish: Wish, weights_C: np.ndarray, labelled: Labelled, image: int) -> Candidates:
    labels_HW, C = pool.labels(image), len(pool.classes)
    doubts = {name: doubt_of(pool.map(image, name), name) for name in {wish.plain, *(term.map for term in wish.terms)}}
    worth_HW = pixel_worth(pool, wish, image) if wish.unit == "pixel" else None
    found = partition(pool, wish, image, worth_HW)
    R, inside = len(found.boxes_R4), found.numbers_HW >= 0
    score_R = np.ones(R)
    for term in wish.terms:
        value_R = aggregate(
            Term(term.map, "class-weighted" if term.kind == "class-weighted" else "mean") if wish.unit == "pixel" else term,
            doubts[term.map], labels_HW, found.numbers_HW, R, weights_C,
        )  # fmt: skip
        score_R *= np.maximum(value_R, 0) ** term.power
    plain_R = aggregate(Term(wish.plain), doubts[wish.plain], None, found.numbers_HW, R)
    of_N = found.numbers_HW[inside].astype(np.int64)
    counts_RC = np.bincount(of_N * C + labels_HW[inside], minlength=R * C).reshape(R, C)
    known_R = np.zeros(R, bool)
    known_HW = labelled.mask(pool.paths[image], *labels_HW.shape)
    if known_HW is not None:
        known_R = np.bincount(of_N, known_HW[inside], R) >= KNOWN * found.sizes_R
    clicks_R = np.ones(R, np.int64) if wish.unit == "pixel" else np.zeros(R, np.int64)
    if wish.clicks and wish.unit != "pixel":
        for r, (x, y, width, height) in enumerate(found.boxes_R4.tolist()):
            window_hw = labels_HW[y : y + height, x : x + width]
            clicks_R[r] = estimated_clicks(window_hw, found.mask(r))
    key_R = np.random.default_rng([wish.seed, zlib.crc32(pool.paths[image].encode("utf-8", "surrogateescape"))]).random(
        R
    )
    return Candidates(
        np.full(R, image, np.int64), np.arange(R), found.boxes_R4, found.sizes_R, score_R, plain_R, key_R,
        (counts_RC / np.maximum(found.sizes_R, 1)[:, None]).astype(np.float32), clicks_R, known_R,
    )  # fmt: skip


def _best(candidates: Candidates) -> Candidates:
    """Those that are among the `MOST` best by score, by the plain mean or by the random key, and the labelled ones."""
    M = len(candidates.image_M)
    if M <= MOST:
        return candidates
    kept_M = candidates.labelled_M.copy()
    for value_M in (-candidates.score_M, -candidates.plain_M, candidates.key_M):
        kept_M[np.argsort(value_M, kind="stable")[:MOST]] = True
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
