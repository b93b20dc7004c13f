"""What the compiled loops share: how they are compiled, and the constants of their exponential.

With 2^x = 2^i 2^f, i the nearest integer to x and f = x − i in [−½, ½], a polynomial gives 2^f and the bits of a float32
give 2^i; neither branches, so the compiler vectorises the loop around it:

    rounded = x + ROUND      f = x − (rounded − ROUND)      2^i: the bits (bits of rounded << MANTISSA) + ONE_BITS

It is written out in each loop, with x = LOG2E · (z − max z) where e^(z − max z) is wanted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import njit

# A kernel's build on disk is renewed when its own file changes, not when this one does: then delete __pycache__/*.nb*

# 2^f for f in [−½, ½], relative error 2e-9: 1 + f (P1 + f (P2 + …)), minimax polynomial (Lawson's algorithm)
P1, P2, P3 = np.float32(0.6931471824645996), np.float32(0.24022646248340607), np.float32(0.05550328642129898)
P4, P5, P6 = np.float32(0.009618489071726799), np.float32(0.0013399929739534855), np.float32(0.0001534579205326736)
LOG2E, LN2, ONE = np.float32(1.4426950408889634), np.float32(0.6931471805599453), np.float32(1)
LOWEST = np.float32(-127)  # 2^−127 is made 0
ROUND = np.float32(1.5 * 2**23)  # added to a small number, its last bits are the nearest integer
MANTISSA, ONE_BITS = np.int32(23), np.int32(127 << 23)


def compiled(function: Callable[..., Any], also: Sequence[str] = (), *, fast: bool = True) -> Callable[..., Any]:
    """Compiled at the first call, kept on disk; `unwrap` takes off what checks shapes in the tests.

    What may be reordered is, if `fast`, fused multiply-add and the like, and what is named in `also`; infinities and NaN
    stay what they are. A division by 0 is an infinity or NaN, as in numpy.
    """
    flags = {"contract", "nsz", "arcp", *also} if fast else set(also)
    return njit(nogil=True, cache=True, error_model="numpy", fastmath=flags)(inspect.unwrap(function))
