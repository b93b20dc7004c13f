"""NLL of softmax(β z) and how it changes with ln β, pixel by pixel, in one compiled loop: what Newton's method asks for.

Letters: N pixels, C classes, B a block of pixels that fits into a first-level cache.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Integer

from seguncert.detection import check_shape
from seguncert.kernels import LOG2E, LOWEST, MANTISSA, ONE, ONE_BITS, P1, P2, P3, P4, P5, P6, ROUND, compiled

LEAST_LOG = np.float32(-104)  # ln of less than any float: stands for the −inf of a class that got nothing
BLOCK = 256
PER_LOG = 16  # pixels whose Σ exp are multiplied before a logarithm is taken: C^16 is a float64 for C below 2^63
ZERO = np.float32(0)


def scaled_nll(
    logits_NC: Float32[np.ndarray, "N C"],
    votes: Float32[np.ndarray, "N C"] | Integer[np.ndarray, " N"],
    eta_N: Float32[np.ndarray, " N"],
) -> tuple[float, Float32[np.ndarray, " N"], Float32[np.ndarray, " N"]]:
    """Σ −Σ_c t_c ln p_c in nats with p = softmax(e^η z), its derivatives by the η, and their curvatures.

    `votes` are shares t of the raters that say each class, or one rater's class. With s = e^η z they are Σ p_c s_c − Σ t_c s_c
    and Var s under p, which is never negative; the exact one is that plus the derivative. NaN for NaN or +∞ in the logits.

    >>> logits, label = np.array([[2.0, 0.0]], np.float32), np.array([0])
    >>> nll, slope, curvature = scaled_nll(logits, label, np.zeros(1, np.float32))  # p = 0.8808, 0.1192
    >>> round(nll, 4), round(float(slope[0]), 4), round(float(curvature[0]), 4)  # ln(1 + e^−2), 2 (p − 1), 4 p (1 − p)
    (0.1269, -0.2384, 0.42)
    """
    check_shape("votes", votes.shape, logits_NC.shape[: votes.ndim])
    check_shape("eta", eta_N.shape, logits_NC.shape[:1])
    if votes.ndim == 1:
        said_N = np.take_along_axis(logits_NC, votes[:, None].astype(np.int64), 1)[:, 0]
    else:
        least_N1 = logits_NC.max(1, keepdims=True) + LEAST_LOG
        said_N = (votes * np.maximum(logits_NC, least_N1)).sum(1)
    slope_N, curvature_N = np.empty_like(eta_N), np.empty_like(eta_N)
    return _scaled_nll(logits_NC, said_N, np.exp(eta_N), slope_N, curvature_N), slope_N, curvature_N


@compiled
def _scaled_nll(logits_NC, said_N, beta_N, slope_N, curvature_N):
    """`said_N` is Σ t z. The sum of the NLL; the other two are filled."""
    N, C = logits_NC.shape
    z_CB, max_B, sum_B = np.empty((C, BLOCK), np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    first_B, second_B = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    total, bad = 0.0, 0
    for start in range(0, N, BLOCK):
        width = min(BLOCK, N - start)
        max_B[:] = -np.inf
        for x in range(width):
            for c in range(C):
                z_CB[c, x] = logits_NC[start + x, c]
        for c in range(C):
            z_B = z_CB[c]
            for x in range(width):
                max_B[x] = z_B[x] if z_B[x] > max_B[x] else max_B[x]
                bad += 0 if z_B[x] < np.inf else 1
        sum_B[:] = 0
        first_B[:] = 0
        second_B[:] = 0
        beta_B = beta_N[start : start + width]
        for c in range(C):
            z_B = z_CB[c]
            for x in range(width):
                z = z_B[x] - max_B[x]
                s = beta_B[x] * (LEAST_LOG if z == -np.inf else z)
                power = max(s * LOG2E, LOWEST)
                rounded = power + ROUND
                f = power - (rounded - ROUND)
                bits = np.int32((np.float32(rounded).view(np.int32) << MANTISSA) + ONE_BITS)
                e = ONE + f * (P1 + f * (P2 + f * (P3 + f * (P4 + f * (P5 + f * P6)))))
                e *= np.int32(bits).view(np.float32)
                sum_B[x] += e
                first_B[x] += e * s
                second_B[x] += e * s * s
        product = 1.0
        for x in range(width):
            i = start + x
            said = said_N[i] - max_B[x]
            said = beta_B[x] * (LEAST_LOG if said == -np.inf else said)
            mean = first_B[x] / sum_B[x]
            slope_N[i] = mean - said
            curvature_N[i] = max(second_B[x] / sum_B[x] - mean * mean, ZERO)
            total -= said
            product *= sum_B[x]
            if (x + 1) % PER_LOG == 0:
                total += np.log(product)
                product = 1.0
        total += np.log(product)
    return np.nan if bad else total
