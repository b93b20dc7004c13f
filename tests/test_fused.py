"""The fused kernel gives the plain loop's moments, at any size, cut into any rows and any chunks of samples."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from seguncert.fused import accumulate
from seguncert.moments import Moments
from seguncert.predict import positions


def logits_of(S, C, h, w, spread=4.0):
    return spread * torch.randn(S, C, h, w, generator=torch.Generator().manual_seed(S * C + h))


def fused(logits, H, W, rows=None, chunk=None, align=False):
    S, C, h, w = logits.shape
    moments = Moments.empty(C, H, W)
    row_position, column_position = positions(h, H, align), positions(w, W, align)
    for start in range(0, H, rows or H):
        band = slice(start, min(start + (rows or H), H))
        for first in range(0, S, chunk or S):
            part = logits[first : first + (chunk or S)]
            accumulate(moments, part, band, slice(0, W), row_position[band], column_position, first)
    moments.n = S
    return moments


def plain(logits, H, W, align=False):
    moments = Moments.empty(logits.shape[1], H, W)
    if logits.shape[2:] != (H, W):
        logits = interpolate(logits, size=(H, W), mode="bilinear", align_corners=align)
    moments.update(logits)
    return moments


def assert_same(one, other, tolerance=4e-6):
    assert one.n == other.n
    for field in ("mean_CHW", "squares_CHW", "entropy_HW"):
        scale = other.n if field == "squares_CHW" else 1
        torch.testing.assert_close(getattr(one, field), getattr(other, field), atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("S, C", [(2, 2), (20, 11), (33, 150), (7, 255)])
@pytest.mark.parametrize("size", [(6, 9), (24, 36), (5, 3), (1, 1), (13, 700)])
def test_equal_to_the_plain_loop(S, C, size):
    logits = logits_of(S, C, 6, 9)
    assert_same(fused(logits, *size), plain(logits, *size))


def test_corners_may_be_aligned():
    logits = logits_of(4, 3, 6, 9)
    assert_same(fused(logits, 24, 33, align=True), plain(logits, 24, 33, align=True))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)])
def test_lines_of_one_pixel(shape):
    logits = logits_of(3, 3, *shape)
    assert_same(fused(logits, 4, 5), plain(logits, 4, 5))


def test_bits_do_not_depend_on_how_the_rows_are_cut():
    logits = logits_of(20, 5, 12, 10)
    whole = fused(logits, 40, 30)
    for rows in (1, 7):
        cut = fused(logits, 40, 30, rows=rows)
        assert all(torch.equal(getattr(cut, f), getattr(whole, f)) for f in ("mean_CHW", "squares_CHW", "entropy_HW"))


@pytest.mark.parametrize("chunk", [1, 6, 19])
def test_samples_may_come_in_chunks(chunk):
    logits = logits_of(20, 5, 12, 10)
    assert_same(fused(logits, 24, 20, chunk=chunk), fused(logits, 24, 20))


def test_columns_may_be_a_part_of_the_picture():
    logits = logits_of(5, 4, 8, 20)
    moments = Moments.empty(4, 8, 50)
    accumulate(moments, logits, slice(0, 8), slice(10, 30), np.arange(8.0), np.arange(20.0), 0)
    moments.n = 5
    assert_same(
        Moments(moments.mean_CHW[..., 10:30], moments.squares_CHW[..., 10:30], moments.entropy_HW[:, 10:30], 5),
        plain(logits, 8, 20),
    )
    assert not moments.mean_CHW[..., :10].any() and not moments.mean_CHW[..., 30:].any()


def test_sure_samples_are_exact():
    logits = torch.zeros(20, 4, 1, 3)
    logits[:, 1] = 300.0
    moments = fused(logits, 1, 3)
    assert torch.equal(moments.mean_CHW[:, 0, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert not moments.entropy_HW.any() and not moments.squares_CHW.any()


def test_minus_infinity_is_no_probability_and_nan_stays_to_be_seen():
    logits = logits_of(3, 3, 1, 2)
    logits[:, 2] = -torch.inf
    assert_same(fused(logits, 1, 2), plain(logits, 1, 2))
    logits[1, 0, 0, 1] = torch.nan
    assert torch.isnan(fused(logits, 1, 2).entropy_HW).tolist() == [[False, True]]
