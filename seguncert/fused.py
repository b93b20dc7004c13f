"""`Moments.update` for many samples at once, a row of the picture at a time, so that all of it happens in the cache.

Per pixel, sample and class there is one exponential, by a polynomial that the compiler vectorises; logits that are
coarser than the picture are brought to its size on the way, columns first. The numbers are `Moments.update`'s to a
few units of the last place (tested), and do not depend on how the rows are cut.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
from numba import njit
from torch import Tensor

from seguncert.moments import Moments

BLOCK = 512  # columns at once: all samples of two rows of them fit into a second-level cache


def accumulate(
    moments: Moments,
    logits_SCrw: Tensor,
    rows: slice,
    columns: slice,
    row_position: np.ndarray,
    column_position: np.ndarray,
    n: int,
) -> None:
    """Add S samples to the pixels `rows` × `columns` of `moments`, which hold `n` so far.

    `row_position` and `column_position`, one a row and one a column of those pixels, say where in `logits_SCrw` each
    lies; between lines the logits are interpolated. `moments.n` is the caller's to set, when all pixels are done.
    """
    _, C, r, w = logits_SCrw.shape
    above_R, down_R = _neighbours(row_position, r)
    left_W, right_W = _neighbours(column_position, w)
    same = len(left_W) == w and not right_W.any()
    _accumulate(
        logits_SCrw.contiguous().numpy(), above_R, down_R, left_W, right_W, same, n,
        moments.mean_CHW[:, rows, columns].numpy(), moments.squares_CHW[:, rows, columns].numpy(),
        moments.entropy_HW[rows, columns].numpy(), max(1, int(85 / math.log(C))),
    )  # fmt: skip


def positions(length: int, size: int, align_corners: bool = False) -> np.ndarray:
    """Where `size` pixels lie in a line of `length`, as in torch's bilinear resize.

    >>> positions(2, 4)
    array([0.  , 0.25, 0.75, 1.  ])
    """
    if align_corners:
        return np.arange(size) * ((length - 1) / max(1, size - 1))
    return np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)


def _neighbours(position: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the line before each position, and how far it is from there to the next: [0, 1)."""
    first = np.clip(np.floor(position), 0, length - 1).astype(np.int32)
    return first, (position - first).astype(np.float32)


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled at the first call, kept on disk; `unwrap` takes off what checks shapes in the tests."""
    fast = {"contract", "nsz", "arcp"}  # fused multiply-add and the like; infinities and NaN stay what they are
    return njit(nogil=True, cache=True, error_model="numpy", fastmath=fast)(inspect.unwrap(function))


# 2^f for f in [−½, ½], relative error 2e-9: minimax polynomial (Lawson's algorithm)
P1, P2, P3 = np.float32(0.6931471824645996), np.float32(0.24022646248340607), np.float32(0.05550328642129898)
P4, P5, P6 = np.float32(0.009618489071726799), np.float32(0.0013399929739534855), np.float32(0.0001534579205326736)
LOG2E, LN2, ONE = np.float32(1.4426950408889634), np.float32(0.6931471805599453), np.float32(1)
LOWEST = np.float32(-127)  # 2^−127 is made 0
ROUND = np.float32(1.5 * 2**23)  # added to a small number, its last bits are the nearest integer
MANTISSA, ONE_BITS = np.int32(23), np.int32(127 << 23)


@_compiled
def _accumulate(logits_SCrw, above_R, down_R, left_W, right_W, same, n, mean_CRW, squares_CRW, entropy_RW, per_log):
    S, C = logits_SCrw.shape[:2]
    R, W = entropy_RW.shape
    B = min(W, BLOCK)
    upper_SCB, lower_SCB = np.empty((S, C, B), np.float32), np.empty((S, C, B), np.float32)
    between_CB, e_CB, first_CB = (
        np.empty((C, B), np.float32),
        np.empty((C, B), np.float32),
        np.empty((C, B), np.float32),
    )
    sum_CB, squares_CB = np.empty((C, B), np.float32), np.empty((C, B), np.float32)
    max_B, total_B, spread_B = np.empty(B, np.float32), np.empty(B, np.float32), np.empty(B, np.float32)
    product_B, entropy_B = np.empty(B, np.float32), np.empty(B, np.float32)
    share, shared, inverse = np.float32(S / (n + S)), np.float32(n * S / (n + S)), np.float32(1 / S)
    for start in range(0, W, B):
        width = min(B, W - start)
        upper, lower = -1, -1  # the lines that upper_SCB and lower_SCB hold
        for y in range(R):
            line, down = above_R[y], down_R[y]
            if upper != line:
                if lower == line:
                    upper_SCB, lower_SCB = lower_SCB, upper_SCB
                    upper, lower = lower, upper
                else:
                    _widen(logits_SCrw, line, left_W, right_W, same, start, width, upper_SCB)
                    upper = line
            if down > 0 and lower != line + 1:
                _widen(logits_SCrw, line + 1, left_W, right_W, same, start, width, lower_SCB)
                lower = line + 1
            entropy_B[:] = 0
            product_B[:] = 1
            for s in range(S):
                z_CB = between_CB
                if down > 0:
                    for c in range(C):
                        for x in range(width):
                            z_CB[c, x] = upper_SCB[s, c, x] + down * (lower_SCB[s, c, x] - upper_SCB[s, c, x])
                else:
                    z_CB = upper_SCB[s]
                for x in range(width):
                    max_B[x] = z_CB[0, x]
                for c in range(1, C):
                    for x in range(width):
                        max_B[x] = max(max_B[x], z_CB[c, x])
                total_B[:] = 0
                spread_B[:] = 0
                for c in range(C):
                    for x in range(width):
                        power = max((z_CB[c, x] - max_B[x]) * LOG2E, LOWEST)
                        rounded = power + ROUND
                        f = power - (rounded - ROUND)
                        bits = np.int32((np.float32(rounded).view(np.int32) << MANTISSA) + ONE_BITS)
                        e = ONE + f * (P1 + f * (P2 + f * (P3 + f * (P4 + f * (P5 + f * P6)))))
                        e *= np.int32(bits).view(np.float32)
                        e_CB[c, x] = e
                        total_B[x] += e
                        spread_B[x] += e * power
                for x in range(width):  # H = ln s − ln 2 · Σ e power / s; one logarithm for a product of many s
                    product_B[x] *= total_B[x]
                    total_B[x] = ONE / total_B[x]
                    entropy_B[x] -= LN2 * spread_B[x] * total_B[x]
                if (s + 1) % per_log == 0 or s + 1 == S:
                    for x in range(width):
                        entropy_B[x] += np.log(product_B[x])
                        product_B[x] = 1
                if s == 0:
                    for c in range(C):
                        for x in range(width):
                            first_CB[c, x] = e_CB[c, x] * total_B[x]
                    sum_CB[:] = 0
                    squares_CB[:] = 0
                else:
                    for c in range(C):
                        for x in range(width):
                            shift = e_CB[c, x] * total_B[x] - first_CB[c, x]
                            sum_CB[c, x] += shift
                            squares_CB[c, x] += shift * shift
            for c in range(C):
                for x in range(width):
                    shift = sum_CB[c, x] * inverse
                    squares = max(squares_CB[c, x] - sum_CB[c, x] * shift, np.float32(0))
                    delta = first_CB[c, x] + shift - mean_CRW[c, y, start + x]
                    mean_CRW[c, y, start + x] += share * delta
                    squares_CRW[c, y, start + x] += squares + shared * delta * delta
            for x in range(width):
                entropy_RW[y, start + x] += share * (entropy_B[x] * inverse - entropy_RW[y, start + x])


@_compiled
def _widen(logits_SCrw, line, left_W, right_W, same, start, width, wide_SCB):
    """One line of all samples at the columns of the picture."""
    S, C, _, w = logits_SCrw.shape
    for s in range(S):
        for c in range(C):
            if same:
                for x in range(width):
                    wide_SCB[s, c, x] = logits_SCrw[s, c, line, start + x]
            else:
                for x in range(width):
                    left = left_W[start + x]
                    here, there = logits_SCrw[s, c, line, left], logits_SCrw[s, c, line, min(left + 1, w - 1)]
                    wide_SCB[s, c, x] = here + right_W[start + x] * (there - here)


def convolve_each(band_KRW: Tensor, weight_CKij: Tensor, parts_KCRW: Tensor) -> None:
    """Each channel of a padded band through its slices of a 3 × 3 kernel: parts[k, c] = weight[c, k] * band[k]."""
    _convolve_each(band_KRW.numpy(), weight_CKij.numpy(), parts_KCRW.numpy())


@_compiled
def _convolve_each(band_KRW, weight_CKij, parts_KCRW):
    K, C, R, W = parts_KCRW.shape
    for k in range(K):
        for c in range(C):
            w = weight_CKij[c, k]
            a, b, o, d, e, f, g, h, i = w[0, 0], w[0, 1], w[0, 2], w[1, 0], w[1, 1], w[1, 2], w[2, 0], w[2, 1], w[2, 2]
            for y in range(R):
                for x in range(W):
                    parts_KCRW[k, c, y, x] = (
                        a * band_KRW[k, y, x] + b * band_KRW[k, y, x + 1] + o * band_KRW[k, y, x + 2]
                        + d * band_KRW[k, y + 1, x] + e * band_KRW[k, y + 1, x + 1] + f * band_KRW[k, y + 1, x + 2]
                        + g * band_KRW[k, y + 2, x] + h * band_KRW[k, y + 2, x + 1] + i * band_KRW[k, y + 2, x + 2]
                    )  # fmt: skip
