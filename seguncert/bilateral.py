"""The joint bilateral filter: what is near in place and of the same colour speaks for a pixel too.

Letters: C classes, i × j the grid.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from seguncert.kernels import LOG2E, LOWEST, MANTISSA, ONE, ONE_BITS, P1, P2, P3, P4, P5, P6, ROUND, compiled

REACH = 2  # standard deviations of place at most: what is farther off in rows or in columns is left out
APART = 1 / 3  # standard deviations of place between those that are asked: beside each other they say the same


def joint_bilateral(
    values_Cij: Float32[np.ndarray, "C i j"], colours_ij3: Float32[np.ndarray, "i j 3"], place: float, colour: float
) -> Float32[np.ndarray, "C i j"]:
    """Mean of the values around each pixel, weighted by how near they are in place and in the colour of the photo.

    At x it is Σ w(x, y) v(y) / Σ w(x, y) with w = exp(−|x − y|² / 2 place² − |I(x) − I(y)|² / 2 colour²) (Petschnigg et al.
    2004, after Tomasi and Manduchi 1998); y goes over a square grid around x, what lies beyond the picture counts nothing.
    `place` is in pixels of the grid, `colour` in the unit of the colours. Of a constant it is the constant, and of
    probabilities it is probabilities.

    >>> halves = np.array([[0, 0, 1, 1]], np.float32)
    >>> found = joint_bilateral(np.array([[[1, 0, 1, 1]]], np.float32), np.stack([halves] * 3, -1), 3.0, 0.05)
    >>> print(found.round(2))  # the third and the fourth are of another colour
    [[[0.51 0.49 1.   1.  ]]]
    """
    step = max(1, round(place * APART))
    reach = int(REACH * place / step) * step
    colours_3ij = np.ascontiguousarray(np.moveaxis(colours_ij3, -1, 0)) / np.float32(colour)
    found_Cij = np.empty(values_Cij.shape, np.float32)
    _filter(np.ascontiguousarray(values_Cij), colours_3ij, np.float32(place), reach, step, found_Cij)
    return found_Cij


@compiled
def _filter(values_Cij, colours_3ij, place, reach, step, found_Cij):
    C, rows, columns = values_Cij.shape
    weight_j, total_j, sum_Cj = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty((C, columns), np.float32)  # fmt: skip
    half = -LOG2E / np.float32(2)
    for y in range(rows):
        total_j[:] = 0
        sum_Cj[:] = 0
        red_j, green_j, blue_j = colours_3ij[0, y], colours_3ij[1, y], colours_3ij[2, y]
        for dy in range(-reach, reach + 1, step):
            if y + dy < 0 or y + dy >= rows:
                continue
            for dx in range(-reach, reach + 1, step):
                first, last = max(0, -dx), min(columns, columns - dx)
                if first >= last:
                    continue
                width = last - first
                here_j, there_j = slice(first, last), slice(first + dx, last + dx)
                r0_j, g0_j, b0_j = red_j[here_j], green_j[here_j], blue_j[here_j]
                r1_j, g1_j, b1_j = (colours_3ij[0, y + dy, there_j], colours_3ij[1, y + dy, there_j], colours_3ij[2, y + dy, there_j])  # fmt: skip
                far = np.float32(dy * dy + dx * dx) / (place * place)
                to_j = total_j[here_j]
                for x in range(width):
                    r, g, b = r0_j[x] - r1_j[x], g0_j[x] - g1_j[x], b0_j[x] - b1_j[x]
                    power = max((far + r * r + g * g + b * b) * half, LOWEST)
                    rounded = power + ROUND
                    f = power - (rounded - ROUND)
                    bits = np.int32((np.float32(rounded).view(np.int32) << MANTISSA) + ONE_BITS)
                    e = ONE + f * (P1 + f * (P2 + f * (P3 + f * (P4 + f * (P5 + f * P6)))))
                    e *= np.int32(bits).view(np.float32)
                    weight_j[x] = e
                    to_j[x] += e
                for c in range(C):
                    sum_j, value_j = sum_Cj[c, here_j], values_Cij[c, y + dy, there_j]
                    for x in range(width):
                        sum_j[x] += weight_j[x] * value_j[x]
        for c in range(C):
            for x in range(columns):
                found_Cij[c, y, x] = sum_Cj[c, x] / total_j[x]
