"""Pools without an export: what a choice is made from, as arrays."""

from pathlib import Path

import numpy as np

from seguncert.candidates import Candidates
from seguncert.pool import Pool


def make_pool(paths, C=3, D=4, seed=0, size=(60, 80)):
    """N images that differ at random."""
    rng, N = np.random.default_rng(seed), len(paths)
    run = {
        "model": {"classes": list("abc")[:C], "colours": [[9, 9, 9]] * C},
        "input": "nowhere",
        "format": "png16",
        "method": "none",
    }
    return Pool(
        Path("nowhere"), run, list(paths), np.tile(np.array(size, np.int64), (N, 1)), {"entropy": rng.random(N)},
        rng.integers(1, 1000, (N, C)), None, rng.standard_normal((N, D)).astype(np.float32), 0,
    )  # fmt: skip


def make_candidates(pool, score, labelled=(), shares=None, clicks=None):
    """One for each image, as the unit image has them."""
    N = len(pool.paths)
    boxes = np.concatenate([np.zeros((N, 2), np.int64), pool.sizes_N2[:, ::-1]], 1)
    own = pool.areas_NC / pool.areas_NC.sum(1, keepdims=True)
    return Candidates(
        np.arange(N), np.zeros(N, np.int64), boxes, boxes[:, 2] * boxes[:, 3], np.asarray(score, np.float64),
        pool.means["entropy"], np.random.default_rng(1).random(N), (own if shares is None else shares).astype(np.float32),
        np.zeros(N, np.int64) if clicks is None else np.asarray(clicks, np.int64), np.isin(np.arange(N), labelled),
        np.full(N, 7, np.uint8),
    )  # fmt: skip
