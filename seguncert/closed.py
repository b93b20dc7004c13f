"""MC dropout without samples: what infinitely many of them come to, for a tail that is linear (`seguncert.tail`).

Letters: K channels, C classes, R rows, W columns, B columns at once, L lines, T taps of the kernel.

With G_k what channel k adds to the logits, and masks m_k that are 1/(1−p), or 0 with probability p, the logits are
z = b + Σ_k m_k G_k. Their cumulants are sums over channels: with a_k = √(p/(1−p)) G_k and the skewness of a mask
κ = (2p−1)/√(p(1−p)), for any direction u of the logits

    E[u·z] = u·μ,  μ = b + Σ_k G_k        Var[u·z] = Σ_k (u·a_k)²        third cumulant of u·z = κ Σ_k (u·a_k)³

What softmax does to them is found one class against the rest (Daunizeau 2017, arXiv:1703.00091): p_c = σ(l_c) with
l_c = z_c − ln Σ_{j≠c} exp z_j. Let q be the softmax of μ without class c. Around μ, to second order in z:

    mean       m_c = μ_c − ln Σ_{j≠c} exp μ_j − ½ Σ_k V_k        V_k = Σ_j q_j a_kj² − (q·a_k)², curvature of the rest
    variance   v_c = Σ_k (a_kc − q·a_k)² − κ Σ_k (a_kc − q·a_k) V_k
    skewness   g_c = κ Σ_k (a_kc − q·a_k)³ / v_c^1.5

The term of the variance in κ is kept for the class that leads: the rest of any other is nearly one class, the leader, and
is nearly straight. So that a sure pixel keeps its digits, all a_k are taken relative to the leader's, and its variance is
that of 1 − p_c. With x the seven nodes of Gauss and Hermite, a distribution of these three moments lies at (Cornish,
Fisher 1938)

    l_c = m_c + √v_c (x + g_c (x² − 1)/6 − g_c² (2x³ − 5x)/36)

and E σ(l), Var σ(l) and E[−σ(l) ln σ(l)] are weighted sums over the nodes. Means are divided by their sum, and a
variance is at most p̄_c (1 − p̄_c). Expected entropy is H[p̄] − Σ_c (−E σ ln E σ − E[−σ ln σ]): no term of the sum is
negative, so nor is mutual information.

It is an expansion around μ, and good where the logits spread by a nat or two, as they do in nets trained with dropout. Where
single channels move them by many nats, or many classes compete within a wide spread, mean and variance are off: sample.

Between lines and columns the logits are interpolated, hence G_k is; a convolution of interpolated features gives it
exactly, once a pixel of the photo.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from torch import Tensor

from seguncert.fused import _neighbours
from seguncert.kernels import LN2, LOG2E, MANTISSA, ONE, ONE_BITS, P1, P2, P3, P4, P5, P6, ROUND, compiled
from seguncert.moments import Moments

HELD = 1 << 18  # floats: what all channels add to all classes, at the columns of one go
MOST = 128  # columns at once


def accumulate_closed(
    moments: Moments,
    band_KRW: Float[Tensor, "K R W"],
    weight_CKij: Float[Tensor, "C K i j"],
    bias_C: Float[Tensor, " C"],
    dilation: tuple[int, int],
    p: float,
    rows: slice,
    columns: slice,
    row_position: np.ndarray,
    column_position: np.ndarray,
) -> None:
    """Write the moments of dropout with probability p, 0 < p < 1, to the pixels `rows` × `columns`, as of one sample.

    As in `seguncert.fused.accumulate_linear`, line y of the logits comes from rows y … of `band_KRW`, which is padded, and
    the positions, rising, say where among the logits those pixels lie. `moments.n` is the caller's to set, to 1.
    """
    C, K, i, j = weight_CKij.shape
    r, w = band_KRW.shape[1] - dilation[0] * (i - 1), band_KRW.shape[2] - dilation[1] * (j - 1)
    above_R, down_R = _neighbours(row_position, r)
    left_W, right_W = _neighbours(column_position, w)
    block = max(16, min(MOST, HELD // (K * C) // 16 * 16))
    _closed(
        band_KRW.contiguous().numpy(), weight_CKij.contiguous().numpy(), bias_C.numpy(), dilation[0], dilation[1],
        np.float32(p / (1 - p)), np.float32((2 * p - 1) / math.sqrt(p * (1 - p))), above_R, down_R, left_W, right_W,
        block, moments.mean_CHW[:, rows, columns].numpy(), moments.squares_CHW[:, rows, columns].numpy(),
        moments.entropy_HW[rows, columns].numpy(),
    )  # fmt: skip


_nodes, _weights = np.polynomial.hermite_e.hermegauss(7)
NODES, WEIGHTS = _nodes.astype(np.float32), (_weights / _weights.sum()).astype(np.float32)
BENDS, TWISTS = ((_nodes**2 - 1) / 6).astype(np.float32), ((5 * _nodes - 2 * _nodes**3) / 36).astype(np.float32)

ZERO, HALF, TWO, TINY = np.float32(0), np.float32(0.5), np.float32(2), np.float32(1e-35)
SLACK = np.float32(2**-23)  # of mean (1 − mean), which no variance exceeds, when the mean is nearly 1
SKEWEST = np.float32(1)  # beyond it the nodes no longer rise
FURTHEST = np.float32(115)  # a power of 2 that, and the reciprocal of which, is a float32
# ln(1 + x) = x − x²/2 + x³ (Q0 + Q1 x + …) between √½ and √2: logf of Moshier's Cephes
Q0, Q1, Q2 = np.float32(3.3333331174e-1), np.float32(-2.4999993993e-1), np.float32(2.0000714765e-1)
Q3, Q4, Q5 = np.float32(-1.6668057665e-1), np.float32(1.4249322787e-1), np.float32(-1.2420140846e-1)
Q6, Q7, Q8 = np.float32(1.1676998740e-1), np.float32(-1.1514610310e-1), np.float32(7.0376836292e-2)
ROOT_BITS, MANTISSA_BITS = np.int32(0x3F3504F3), np.int32(0x7FFFFF)


@compiled
def _closed(
    band_KRW, weight_CKij, bias_C, dilation_y, dilation_x, ratio, skew,
    above_R, down_R, left_W, right_W, block, mean_CRW, squares_CRW, entropy_RW,
):  # fmt: skip
    C, K, i, j = weight_CKij.shape
    R, W = entropy_RW.shape
    B = min(W, block)
    L = dilation_y * (i - 1) + 2
    last = band_KRW.shape[2] - dilation_x * (j - 1) - 1
    wide_LKjB, taps_TB = np.empty((L, K, j, B), np.float32), np.empty((i * j, B), np.float32)
    parts_KCB, logits_CB = np.empty((K, C, B), np.float32), np.empty((C, B), np.float32)
    work_7CB, work_19B = np.empty((7, C, B), np.float32), np.empty((19, B), np.float32)
    for start in range(0, W, B):
        stop = min(start + B, W)
        width, filled = stop - start, 0
        for y in range(R):
            line, down = above_R[y], down_R[y]
            filled = max(filled, line)
            while filled < line + L - (1 if down == 0 else 0):
                _widen_features(
                    band_KRW, filled, dilation_x, left_W[start:stop], right_W[start:stop], last,
                    wide_LKjB[filled % L],
                )  # fmt: skip
                filled += 1
            for c in range(C):
                logits_CB[c] = bias_C[c]
            for k in range(K):
                for v in range(i):
                    upper = (line + v * dilation_y) % L
                    lower = (upper + 1) % L
                    for h in range(j):
                        tap_B, upper_B, lower_B = taps_TB[v * j + h], wide_LKjB[upper, k, h], wide_LKjB[lower, k, h]
                        if down > 0:
                            for x in range(width):
                                tap_B[x] = upper_B[x] + down * (lower_B[x] - upper_B[x])
                        else:
                            for x in range(width):
                                tap_B[x] = upper_B[x]
                _parts(taps_TB, weight_CKij, k, width, parts_KCB[k], logits_CB)
            _pixels(
                logits_CB, parts_KCB, ratio, skew, width, work_7CB, work_19B,
                mean_CRW[:, y, start:stop], squares_CRW[:, y, start:stop], entropy_RW[y, start:stop],
            )  # fmt: skip


@compiled
def _widen_features(band_KRW, row, dilation_x, left_B, right_B, last, wide_KjB):
    """One row of the features at the columns of the photo, shifted by each column of the kernel."""
    width = len(left_B)
    same = left_B[width - 1] == left_B[0] + width - 1 and not right_B.any()
    K, j = wide_KjB.shape[:2]
    for k in range(K):
        row_W = band_KRW[k, row]
        for h in range(j):
            wide_B, shift = wide_KjB[k, h], h * dilation_x
            if same:
                first = left_B[0] + shift
                for x in range(width):
                    wide_B[x] = row_W[first + x]
            else:
                for x in range(width):
                    left = np.uint32(left_B[x])  # unsigned: no index from the end is looked for
                    right = min(left + np.uint32(1), np.uint32(last))
                    here = row_W[left + np.uint32(shift)]
                    wide_B[x] = here + right_B[x] * (row_W[right + np.uint32(shift)] - here)


@compiled
def _parts(taps_TB, weight_CKij, k, width, part_CB, logits_CB):
    """What one channel adds to each class."""
    C, _, i, j = weight_CKij.shape
    for c in range(C):
        w_ij, part_B, logit_B = weight_CKij[c, k], part_CB[c], logits_CB[c]
        if i == 3 and j == 3:
            w0, w1, w2 = w_ij[0, 0], w_ij[0, 1], w_ij[0, 2]
            w3, w4, w5 = w_ij[1, 0], w_ij[1, 1], w_ij[1, 2]
            w6, w7, w8 = w_ij[2, 0], w_ij[2, 1], w_ij[2, 2]
            t0_B, t1_B, t2_B, t3_B, t4_B = taps_TB[0], taps_TB[1], taps_TB[2], taps_TB[3], taps_TB[4]
            t5_B, t6_B, t7_B, t8_B = taps_TB[5], taps_TB[6], taps_TB[7], taps_TB[8]
            for x in range(width):
                part = w0 * t0_B[x] + w1 * t1_B[x] + w2 * t2_B[x]
                part += w3 * t3_B[x] + w4 * t4_B[x] + w5 * t5_B[x]
                part += w6 * t6_B[x] + w7 * t7_B[x] + w8 * t8_B[x]
                part_B[x] = part
                logit_B[x] += part
        else:
            part_B[:width] = 0
            for v in range(i):
                for h in range(j):
                    weight, tap_B = w_ij[v, h], taps_TB[v * j + h]
                    for x in range(width):
                        part_B[x] += weight * tap_B[x]
            for x in range(width):
                logit_B[x] += part_B[x]


@compiled
def _pixels(logits_CB, parts_KCB, ratio, skew, width, work_7CB, work_19B, mean_CB, squares_CB, entropy_B):
    """Moments of one row of pixels, of the mean of their logits and of what each channel adds to these."""
    K, C = parts_KCB.shape[:2]
    e_CB, other_CB, is_top_CB, square_CB = work_7CB[0], work_7CB[1], work_7CB[2], work_7CB[3]
    cross_CB, cube_CB, apart_CB, value_7B = work_7CB[4], work_7CB[5], work_7CB[6], work_19B[11:18]
    max_B, top_B, total_B, rest_B, dot_B = work_19B[0], work_19B[1], work_19B[2], work_19B[3], work_19B[4]
    spread_B, dot2_B, dot3_B, bend_B, sum_B = work_19B[5], work_19B[6], work_19B[7], work_19B[8], work_19B[9]
    known_B = work_19B[10]
    mean_B, deviation_B, skewness_B, information_B = max_B, dot_B, top_B, work_19B[18]

    for x in range(width):
        max_B[x] = logits_CB[0, x]
        top_B[x] = 0
    for c in range(1, C):
        for x in range(width):
            higher = logits_CB[c, x] > max_B[x]
            max_B[x] = logits_CB[c, x] if higher else max_B[x]
            top_B[x] = np.float32(c) if higher else top_B[x]
    index_B = np.empty(width, np.uint32)
    rest_B[:] = TINY
    for c in range(C):
        for x in range(width):
            is_top_CB[c, x] = ONE if top_B[x] == np.float32(c) else ZERO
            apart_CB[c, x] = logits_CB[c, x] - max_B[x]
            e_CB[c, x] = _exp2(apart_CB[c, x] * LOG2E)
            rest_B[x] += e_CB[c, x] * (ONE - is_top_CB[c, x])
    for x in range(width):
        index_B[x] = np.uint32(top_B[x])
    for c in range(C):  # the softmax of all but the leader
        for x in range(width):
            other_CB[c, x] = e_CB[c, x] * (ONE - is_top_CB[c, x]) / rest_B[x]
    for x in range(width):
        total_B[x] = ONE + rest_B[x]
        rest_B[x] = rest_B[x] / total_B[x]

    dot2_B[:] = 0
    dot3_B[:] = 0
    bend_B[:] = 0
    square_CB[:] = 0
    cross_CB[:] = 0
    cube_CB[:] = 0
    for k in range(K):
        part_CB = parts_KCB[k]
        dot_B[:] = 0
        spread_B[:] = 0
        for x in range(width):
            sum_B[x] = part_CB[index_B[x], x]
        for c in range(C):
            for x in range(width):
                g = part_CB[c, x] - sum_B[x]
                weighted = other_CB[c, x] * g
                dot_B[x] += weighted
                spread_B[x] += weighted * g
        for c in range(C):
            for x in range(width):
                g = part_CB[c, x] - sum_B[x]
                u = g - rest_B[x] * dot_B[x]
                square_CB[c, x] += g * g
                cross_CB[c, x] += g * dot_B[x]
                cube_CB[c, x] += u * u * u
        for x in range(width):
            dot = dot_B[x]
            dot2_B[x] += dot * dot
            dot3_B[x] += dot * dot * dot
            bend_B[x] += dot * (spread_B[x] - dot * dot)

    spread_B[:] = 0
    sum_B[:] = 0
    for c in range(C):
        for x in range(width):
            spread_B[x] += other_CB[c, x] * square_CB[c, x]
    root = np.sqrt(ratio)
    known_B[:] = 0
    for c in range(C):
        is_top_B, apart_B, value_B, squares_B = is_top_CB[c], apart_CB[c], square_CB[c], cross_CB[c]
        for x in range(width):
            top = is_top_B[x] > HALF
            R, e, square, dot2 = rest_B[x], e_CB[c, x], square_CB[c, x], dot2_B[x]
            odds = R * total_B[x] if top else total_B[x] - e  # of the rest, in units of the leader
            share, inverse = e / total_B[x], total_B[x] / odds
            apart2 = square - TWO * R * cross_CB[c, x] + R * R * dot2
            along2 = R * R * dot2 - TWO * share * R * cross_CB[c, x] + share * share * square
            spread = (R * spread_B[x] - share * square) * inverse
            curvature = spread_B[x] - dot2 if top else spread - along2 * inverse * inverse
            plain = ratio * (dot2 if top else max(apart2, ZERO) * inverse * inverse)
            bent = plain + skew * ratio * root * bend_B[x]
            variance = min(max(bent, HALF * plain), TWO * plain) if top else plain
            third = -dot3_B[x] if top else cube_CB[c, x] * inverse * inverse * inverse
            deviation = np.sqrt(variance)
            skewness = skew * ratio * root * third / max(variance * deviation, TINY)
            mean_B[x] = LOG2E * (_ln(odds) - apart_B[x] + HALF * ratio * max(curvature, ZERO))
            deviation_B[x] = -LOG2E * deviation
            skewness_B[x] = min(max(skewness, -SKEWEST), SKEWEST)
        value_B[:width] = 0
        information_B[:width] = 0
        for n in range(7):
            node, bend, twist, weight, value_n = NODES[n], BENDS[n], TWISTS[n], WEIGHTS[n], value_7B[n]
            for x in range(width):
                g = skewness_B[x]
                odds = _exp2(mean_B[x] + deviation_B[x] * (node + g * (bend + g * twist)))
                whole = ONE + odds
                probability = ONE / whole
                value = odds * probability if is_top_B[x] > HALF else probability
                value_n[x] = value
                value_B[x] += weight * value
                information_B[x] -= weight * probability * _ln(whole)
        squares_B[:width] = 0
        for n in range(7):
            weight, value_n = WEIGHTS[n], value_7B[n]
            for x in range(width):
                off = value_n[x] - value_B[x]
                squares_B[x] += weight * off * off
        for x in range(width):
            value = max(ONE - value_B[x], ZERO) if is_top_B[x] > HALF else value_B[x]
            value_B[x] = value
            sum_B[x] += value
            known_B[x] += max(information_B[x] - value * _ln(max(value, TINY)), ZERO)
    for x in range(width):
        sum_B[x] = ONE / sum_B[x]
    for c in range(C):
        for x in range(width):
            mean = square_CB[c, x] * sum_B[x]
            known_B[x] += mean * _ln(max(mean, TINY))
            mean_CB[c, x] = mean
            squares_CB[c, x] = min(cross_CB[c, x], mean * (ONE - mean) + SLACK)
    for x in range(width):
        entropy_B[x] = max(-known_B[x], ZERO)


@compiled
def _exp2(power):
    """2^power, of a power that is brought between ±115."""
    power = min(max(power, -FURTHEST), FURTHEST)
    rounded = power + ROUND
    f = power - (rounded - ROUND)
    bits = np.int32((np.float32(rounded).view(np.int32) << MANTISSA) + ONE_BITS)
    e = ONE + f * (P1 + f * (P2 + f * (P3 + f * (P4 + f * (P5 + f * P6)))))
    return e * np.int32(bits).view(np.float32)


@compiled
def _ln(value):
    """Of a normal number above 0."""
    bits = np.int32(np.float32(value).view(np.int32) - ROOT_BITS)
    exponent = np.float32(np.int32(bits >> MANTISSA))
    x = np.int32((bits & MANTISSA_BITS) + ROOT_BITS).view(np.float32) - ONE
    tail = Q0 + x * (Q1 + x * (Q2 + x * (Q3 + x * (Q4 + x * (Q5 + x * (Q6 + x * (Q7 + x * Q8)))))))
    return exponent * LN2 + (x + x * x * (x * tail - HALF))
