"""Random bits for every place of a feature map: a function of a key, the channel, the row and the column, and of nothing else.

A dropout mask made of them is the same for a place whether a picture is run whole or in pieces, in whatever memory
layout and by however many threads, and no number before it need be drawn. A place hashes its coordinates by rounds of
shift and multiply over 32 bits (constants of the low-bias search of C. Wellons, "Prospecting for hash functions", 2018);
64 bits of key, then channel, row and column go in one after another.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from seguncert.kernels import compiled

GOLDEN, MIX, MIX_LAST = np.uint32(0x9E3779B9), np.uint32(0x21F0AAAD), np.uint32(0x735A2D97)
SHIFT_15, SHIFT_16 = np.uint32(15), np.uint32(16)


def keep_or_drop(
    key: int,
    keep: float,
    kept: float,
    shape: tuple[int, int, int],
    origin: tuple[int, int] = (0, 0),
    last: bool = False,
) -> np.ndarray:
    """(K, H, W) float32: `kept` with probability `keep`, else 0, for the rows and columns from `origin` on.

    `key` has 64 bits. With `last` the channels of a place lie side by side in memory, as a net may have its features.

    >>> whole = keep_or_drop(7, 0.5, 2.0, (3, 8, 8))
    >>> bool((whole[:, 2:, 3:] == keep_or_drop(7, 0.5, 2.0, (3, 6, 5), (2, 3), last=True)).all())
    True
    """
    K, H, W = shape
    mask_KHW = np.empty((H, W, K), np.float32).transpose(2, 0, 1) if last else np.empty(shape, np.float32)
    _fill(
        np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32 & 0xFFFFFFFF), np.uint32(min(round(keep * 2**32), 2**32 - 1)),
        np.float32(kept), np.uint32(origin[0]), np.uint32(origin[1]),
        mask_KHW.transpose(1, 2, 0) if last else mask_KHW, last,
    )  # fmt: skip
    return mask_KHW


def normals(key: int, shape: tuple[int, int, int], origin: tuple[int, int] = (0, 0), last: bool = False) -> np.ndarray:
    """(K, H, W) float32: standard normal numbers of places, as `keep_or_drop` has its masks; −6.3 to 6.3.

    The 32 bits of a place are a probability, and its quantile is the number (Wichura 1988, algorithm AS 241, PPND7: within
    one part in 10⁷).

    >>> normals(7, (1, 1, 3)).round(4).tolist()
    [[[2.6108999252319336, -0.5929999947547913, -1.4157999753952026]]]
    """
    K, H, W = shape
    noise_KHW = np.empty((H, W, K), np.float32).transpose(2, 0, 1) if last else np.empty(shape, np.float32)
    _fill_normal(
        np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32 & 0xFFFFFFFF), np.uint32(origin[0]), np.uint32(origin[1]),
        noise_KHW.transpose(1, 2, 0) if last else noise_KHW, last,
    )  # fmt: skip
    return noise_KHW


_exact = partial(compiled, fast=False)  # a mask is to be the same everywhere: nothing may be reordered


@_exact
def _hash(value, other):
    h = np.uint32(value ^ np.uint32(value >> SHIFT_16))
    h = np.uint32(np.uint32(h * MIX) ^ other)
    h = np.uint32(np.uint32(h ^ np.uint32(h >> SHIFT_15)) * MIX_LAST)
    return np.uint32(h ^ np.uint32(h >> SHIFT_15))


@_exact
def _begin_row(key, key2, row, row_K, row2_K):
    """Hashes of the channels at a row."""
    for k in range(len(row_K)):
        channel = _hash(np.uint32(key + np.uint32(k)), key2)
        channel2 = _hash(np.uint32(key2 + np.uint32(k)), key)
        row_K[k] = _hash(np.uint32(channel + row), channel2)
        row2_K[k] = _hash(np.uint32(channel2 + row), channel)


@_exact
def _fill(key, key2, below, kept, first_row, first_column, mask, last):
    """`mask` is (H, W, K) if `last`, else (K, H, W); the innermost loop is along what lies side by side."""
    H, W, K = mask.shape if last else (mask.shape[1], mask.shape[2], mask.shape[0])
    row_K, row2_K = np.empty(K, np.uint32), np.empty(K, np.uint32)
    for y in range(H):
        _begin_row(key, key2, np.uint32(first_row + np.uint32(y)), row_K, row2_K)
        if last:
            for x in range(W):
                place, mask_K = np.uint32(np.uint32(np.uint32(x) + first_column) * GOLDEN), mask[y, x]
                for k in range(K):
                    mask_K[k] = kept if _hash(np.uint32(place + row_K[k]), row2_K[k]) < below else np.float32(0)
        else:
            for k in range(K):
                row, row2, mask_W = row_K[k], row2_K[k], mask[k, y]
                for x in range(W):
                    place = np.uint32(np.uint32(np.uint32(x) + first_column) * GOLDEN)
                    mask_W[x] = kept if _hash(np.uint32(place + row), row2) < below else np.float32(0)


@_exact
def _fill_normal(key, key2, first_row, first_column, noise, last):
    """As `_fill`."""
    H, W, K = noise.shape if last else (noise.shape[1], noise.shape[2], noise.shape[0])
    row_K, row2_K, bits_N = np.empty(K, np.uint32), np.empty(K, np.uint32), np.empty(W * K if last else W, np.uint32)
    for y in range(H):
        _begin_row(key, key2, np.uint32(first_row + np.uint32(y)), row_K, row2_K)
        if last:
            for x in range(W):
                place, bits_K = np.uint32(np.uint32(np.uint32(x) + first_column) * GOLDEN), bits_N[x * K : (x + 1) * K]
                for k in range(K):
                    bits_K[k] = _hash(np.uint32(place + row_K[k]), row2_K[k])
            _quantiles(bits_N, noise[y].reshape(-1))
        else:
            for k in range(K):
                row, row2 = row_K[k], row2_K[k]
                for x in range(W):
                    place = np.uint32(np.uint32(np.uint32(x) + first_column) * GOLDEN)
                    bits_N[x] = _hash(np.uint32(place + row), row2)
                _quantiles(bits_N, noise[k, y])


A0, A1, A2, A3 = np.float32(3.3871327179), np.float32(50.434271938), np.float32(159.29113202), np.float32(59.109374720)
B1, B2, B3 = np.float32(17.895169469), np.float32(78.757757664), np.float32(67.187563600)
C0, C1, C2, C3 = np.float32(1.4234372777), np.float32(2.7568153900), np.float32(1.3067284816), np.float32(0.17023821103)
D1, D2 = np.float32(0.73700164250), np.float32(0.12021132975)
MIDDLE, MIDDLE_SQUARED, FROM = np.float32(0.425), np.float32(0.180625), np.float32(1.6)
UNIT, HALF, ONE, TOP = np.float32(2.0**-32), np.float32(0.5), np.float32(1), np.uint32(1 << 31)


@_exact
def _quantiles(bits_N, value_N):
    """Of (bits + ½) / 2³²; first all as if they were in the middle, without a branch, then those that are not again."""
    for x in range(len(bits_N)):
        q = (np.float32(np.int32(bits_N[x] ^ TOP)) + HALF) * UNIT
        r = MIDDLE_SQUARED - q * q
        value_N[x] = q * (((A3 * r + A2) * r + A1) * r + A0) / (((B3 * r + B2) * r + B1) * r + ONE)
    for x in range(len(bits_N)):
        bits = bits_N[x]
        upper = bits >= TOP
        tail = (np.float32(np.uint32(~bits) if upper else bits) + HALF) * UNIT
        if tail < HALF - MIDDLE:
            r = np.sqrt(-np.log(tail)) - FROM
            value = (((C3 * r + C2) * r + C1) * r + C0) / ((D2 * r + D1) * r + ONE)
            value_N[x] = value if upper else -value
