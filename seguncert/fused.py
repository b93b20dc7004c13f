"""`Moments.update` for many samples at once, a row of the picture at a time, so that all of it happens in the cache.

Per pixel, sample and class there is one exponential, by a polynomial that the compiler vectorises; logits that are
coarser than the picture are brought to its size on the way, columns first. The numbers are `Moments.update`'s to a
few units of the last place (tested), and do not depend on how the rows are cut.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from seguncert.kernels import LN2, LOG2E, LOWEST, MANTISSA, ONE, ONE_BITS, P1, P2, P3, P4, P5, P6, ROUND, compiled
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
    _accumulate(
        logits_SCrw.contiguous().numpy(), above_R, down_R, left_W, right_W, n,
        moments.mean_CHW[:, rows, columns].numpy(), moments.squares_CHW[:, rows, columns].numpy(),
        moments.entropy_HW[rows, columns].numpy(), _per_log(C),
    )  # fmt: skip


def accumulate_linear(
    moments: Moments,
    band_KRW: Tensor,
    weight_CKij: Tensor,
    bias_C: Tensor,
    dilation: tuple[int, int],
    kept_SK: np.ndarray,
    scale: float,
    rows: slice,
    columns: slice,
    row_position: np.ndarray,
    column_position: np.ndarray,
    n: int,
) -> None:
    """As `accumulate`, of the logits b + scale · Σ_k kept_sk · (w_k * band_k), which are made a line at a time.

    `band_KRW` holds the rows needed, padded: line y of the logits comes from rows y … of it. What each channel adds to a
    line is computed once; a sample is the sum of all without those dropped, or of those kept where they are fewer.
    """
    C, K, i, j = weight_CKij.shape
    r, w = band_KRW.shape[1] - dilation[0] * (i - 1), band_KRW.shape[2] - dilation[1] * (j - 1)
    above_R, down_R = _neighbours(row_position, r)
    left_W, right_W = _neighbours(column_position, w)
    few_S = kept_SK.sum(1) < K / 2
    listed = [np.flatnonzero(kept if few else ~kept) for kept, few in zip(kept_SK, few_S, strict=True)]
    index_SK = np.zeros((len(kept_SK), K), np.int32)
    for row, indices in zip(index_SK, listed, strict=True):
        row[: len(indices)] = indices
    _accumulate_linear(
        band_KRW.contiguous().numpy(), weight_CKij.numpy(), bias_C.numpy(), dilation[0], dilation[1], index_SK,
        np.array([len(indices) for indices in listed], np.int32), few_S, np.float32(scale),
        above_R, down_R, left_W, right_W, n, moments.mean_CHW[:, rows, columns].numpy(),
        moments.squares_CHW[:, rows, columns].numpy(), moments.entropy_HW[rows, columns].numpy(), _per_log(C),
    )  # fmt: skip


def spread(
    moments: Moments, coarse: Moments, rows: slice, row_position: np.ndarray, column_position: np.ndarray
) -> None:
    """Set whole rows of `moments` to those of a coarser grid, interpolated: the positions are places in that grid."""
    R, W = coarse.entropy_HW.shape
    places = *_neighbours(row_position, R), *_neighbours(column_position, W)
    _spread(coarse.mean_CHW.numpy(), *places, moments.mean_CHW[:, rows].numpy())
    _spread(coarse.squares_CHW.numpy(), *places, moments.squares_CHW[:, rows].numpy())
    _spread(coarse.entropy_HW[None].numpy(), *places, moments.entropy_HW[None, rows].numpy())


def _per_log(C: int) -> int:
    """Of how many sums over C classes, each from 1 to C, the product is a float32."""
    return max(1, int(85 / math.log(C)))


def _neighbours(position: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the line before each position, and how far it is from there to the next: [0, 1)."""
    first = np.clip(np.floor(position), 0, length - 1).astype(np.int32)
    return first, (position - first).astype(np.float32)


@compiled
def _accumulate(logits_SCrw, above_R, down_R, left_W, right_W, n, mean_CRW, squares_CRW, entropy_RW, per_log):
    S, C = logits_SCrw.shape[:2]
    R, W = entropy_RW.shape
    B = min(W, BLOCK)
    upper_SCB, lower_SCB = np.empty((S, C, B), np.float32), np.empty((S, C, B), np.float32)
    work_5CB, work_5B = np.empty((5, C, B), np.float32), np.empty((5, B), np.float32)
    for start in range(0, W, B):
        stop = min(start + B, W)
        upper, lower = -1, -1  # the lines that upper_SCB and lower_SCB hold
        for y in range(R):
            line, down = above_R[y], down_R[y]
            if upper != line and lower == line:
                upper_SCB, lower_SCB, upper, lower = lower_SCB, upper_SCB, lower, upper
            if upper != line:
                _widen(logits_SCrw[:, :, line], 0, left_W[start:stop], right_W[start:stop], upper_SCB)
                upper = line
            if down > 0 and lower != line + 1:
                _widen(logits_SCrw[:, :, line + 1], 0, left_W[start:stop], right_W[start:stop], lower_SCB)
                lower = line + 1
            _add_row(upper_SCB, lower_SCB, down, stop - start, per_log, work_5CB, work_5B, n,
                     mean_CRW[:, y, start:stop], squares_CRW[:, y, start:stop], entropy_RW[y, start:stop])  # fmt: skip


@compiled
def _accumulate_linear(
    band_KRW, weight_CKij, bias_C, dilation_y, dilation_x, index_SK, count_S, few_S, scale,
    above_R, down_R, left_W, right_W, n, mean_CRW, squares_CRW, entropy_RW, per_log,
):  # fmt: skip
    C, K = weight_CKij.shape[:2]
    S = len(count_S)
    R, W = entropy_RW.shape
    B = min(W, BLOCK)
    widest = 0
    for start in range(0, W, B):
        widest = max(widest, left_W[min(start + B, W) - 1] + 2 - left_W[start])
    upper_SCB, lower_SCB = np.empty((S, C, B), np.float32), np.empty((S, C, B), np.float32)
    line_SCw, parts_KCw, all_Cw = (
        np.empty((S, C, widest), np.float32),
        np.empty((K, C, widest), np.float32),
        np.empty((C, widest), np.float32),
    )
    work_5CB, work_5B = np.empty((5, C, B), np.float32), np.empty((5, B), np.float32)
    columns = band_KRW.shape[2] - dilation_x * (weight_CKij.shape[3] - 1)
    for start in range(0, W, B):
        stop = min(start + B, W)
        first = left_W[start]
        width = min(left_W[stop - 1] + 2, columns) - first
        upper, lower = -1, -1
        for y in range(R):
            line, down = above_R[y], down_R[y]
            if upper != line and lower == line:
                upper_SCB, lower_SCB, upper, lower = lower_SCB, upper_SCB, lower, upper
            for which in range(2):
                wanted = line + which
                if (which == 0 and upper == line) or (which == 1 and (down == 0 or lower == wanted)):
                    continue
                _each_channel(band_KRW, weight_CKij, dilation_y, dilation_x, wanted, first, width, parts_KCw, all_Cw)
                _each_sample(parts_KCw, all_Cw, bias_C, index_SK, count_S, few_S, scale, width, line_SCw)
                target_SCB = upper_SCB if which == 0 else lower_SCB
                _widen(line_SCw[:, :, :width], first, left_W[start:stop], right_W[start:stop], target_SCB)
                if which == 0:
                    upper = wanted
                else:
                    lower = wanted
            _add_row(upper_SCB, lower_SCB, down, stop - start, per_log, work_5CB, work_5B, n,
                     mean_CRW[:, y, start:stop], squares_CRW[:, y, start:stop], entropy_RW[y, start:stop])  # fmt: skip


@compiled
def _each_channel(band_KRW, weight_CKij, dilation_y, dilation_x, line, first, width, parts_KCw, all_Cw):
    """What each channel adds to each class on one line, and the sum of that over channels."""
    C, K, i, j = weight_CKij.shape
    all_Cw[:] = 0
    for k in range(K):
        for c in range(C):
            w_ij, part_w, all_w = weight_CKij[c, k], parts_KCw[k, c], all_Cw[c]
            if i == 3 and j == 3 and dilation_y == 1 and dilation_x == 1:
                a, b, o = w_ij[0, 0], w_ij[0, 1], w_ij[0, 2]
                d, e, f = w_ij[1, 0], w_ij[1, 1], w_ij[1, 2]
                g, h, m = w_ij[2, 0], w_ij[2, 1], w_ij[2, 2]
                above_w = band_KRW[k, line, first : first + width + 2]
                here_w = band_KRW[k, line + 1, first : first + width + 2]
                below_w = band_KRW[k, line + 2, first : first + width + 2]
                for x in range(width):
                    part = a * above_w[x] + b * above_w[x + 1] + o * above_w[x + 2]
                    part += d * here_w[x] + e * here_w[x + 1] + f * here_w[x + 2]
                    part += g * below_w[x] + h * below_w[x + 1] + m * below_w[x + 2]
                    part_w[x] = part
                    all_w[x] += part
            else:
                part_w[:width] = 0
                for y in range(i):
                    for v in range(j):
                        weight, shift = w_ij[y, v], first + v * dilation_x
                        row_w = band_KRW[k, line + y * dilation_y, shift : shift + width]
                        for x in range(width):
                            part_w[x] += weight * row_w[x]
                for x in range(width):
                    all_w[x] += part_w[x]


@compiled
def _each_sample(parts_KCw, all_Cw, bias_C, index_SK, count_S, few_S, scale, width, line_SCw):
    """The logits of one line: of few channels their sum, of many that of all less the others."""
    S, C = len(count_S), len(bias_C)
    for s in range(S):
        few, count = few_S[s], count_S[s]
        share = scale if few else -scale
        for c in range(C):
            line_w, all_w, bias = line_SCw[s, c], all_Cw[c], bias_C[c]
            for x in range(width):
                line_w[x] = bias if few else bias + scale * all_w[x]
            for q in range(0, count - 3, 4):
                p0_w, p1_w = parts_KCw[index_SK[s, q], c], parts_KCw[index_SK[s, q + 1], c]
                p2_w, p3_w = parts_KCw[index_SK[s, q + 2], c], parts_KCw[index_SK[s, q + 3], c]
                for x in range(width):
                    line_w[x] += share * ((p0_w[x] + p1_w[x]) + (p2_w[x] + p3_w[x]))
            for q in range(count - count % 4, count):
                p_w = parts_KCw[index_SK[s, q], c]
                for x in range(width):
                    line_w[x] += share * p_w[x]


@compiled
def _widen(line_SCw, first, left_B, right_B, wide_SCB):
    """One line of all samples, which begins at column `first`, at the columns of the picture."""
    S, C, w = line_SCw.shape
    width = len(left_B)
    last = np.uint32(w - 1)
    same = left_B[0] == first and left_B[width - 1] == first + width - 1 and not right_B.any()
    for s in range(S):
        for c in range(C):
            line_w, wide_B = line_SCw[s, c], wide_SCB[s, c]
            if same:
                for x in range(width):
                    wide_B[x] = line_w[x]
            else:
                for x in range(width):
                    left = np.uint32(left_B[x] - first)  # unsigned: no index from the end is looked for
                    here, there = line_w[left], line_w[min(left + np.uint32(1), last)]
                    wide_B[x] = here + right_B[x] * (there - here)


@compiled
def _spread(coarse_PHW, above_R, down_R, left_W, right_W, fine_PRW):
    P, H, W = coarse_PHW.shape
    between_W, last = np.empty(W, np.float32), np.uint32(W - 1)
    for p in range(P):
        for y in range(len(above_R)):
            upper_W, lower_W = coarse_PHW[p, above_R[y]], coarse_PHW[p, min(above_R[y] + 1, H - 1)]
            down, fine_W = down_R[y], fine_PRW[p, y]
            for x in range(W):
                between_W[x] = upper_W[x] + down * (lower_W[x] - upper_W[x])
            for x in range(len(left_W)):
                left = np.uint32(left_W[x])
                here, there = between_W[left], between_W[min(left + np.uint32(1), last)]
                fine_W[x] = here + right_W[x] * (there - here)


@compiled
def _add_row(upper_SCB, lower_SCB, down, width, per_log, work_5CB, work_5B, n, mean_CB, squares_CB, entropy_B):
    """Softmax, entropy and sums of all samples for one row of pixels, `down` of the way from one line to the other."""
    S, C = upper_SCB.shape[:2]
    between_CB, e_CB, first_CB, shift_CB, shift2_CB = work_5CB[0], work_5CB[1], work_5CB[2], work_5CB[3], work_5CB[4]
    max_B, total_B, spread_B, product_B, h_B = work_5B[0], work_5B[1], work_5B[2], work_5B[3], work_5B[4]
    share, shared, inverse = np.float32(S / (n + S)), np.float32(n * S / (n + S)), np.float32(1 / S)
    h_B[:] = 0
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
            h_B[x] -= LN2 * spread_B[x] * total_B[x]
        if (s + 1) % per_log == 0 or s + 1 == S:
            for x in range(width):
                h_B[x] += np.log(product_B[x])
                product_B[x] = 1
        if s == 0:
            for c in range(C):
                for x in range(width):
                    first_CB[c, x] = e_CB[c, x] * total_B[x]
            shift_CB[:] = 0
            shift2_CB[:] = 0
        else:
            for c in range(C):
                for x in range(width):
                    shift = e_CB[c, x] * total_B[x] - first_CB[c, x]
                    shift_CB[c, x] += shift
                    shift2_CB[c, x] += shift * shift
    for c in range(C):
        for x in range(width):
            shift = shift_CB[c, x] * inverse
            squares = max(shift2_CB[c, x] - shift_CB[c, x] * shift, np.float32(0))
            delta = first_CB[c, x] + shift - mean_CB[c, x]
            mean_CB[c, x] += share * delta
            squares_CB[c, x] += squares + shared * delta * delta
    for x in range(width):
        entropy_B[x] += share * (h_B[x] * inverse - entropy_B[x])
