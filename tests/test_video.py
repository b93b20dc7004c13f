"""Moments carried from frame to frame follow the motion, and what is new has no past."""

import cv2
import numpy as np
import pytest
import torch

from seguncert.moments import Moments
from seguncert.video import Carry, mix, warp

H, W = 96, 128


def scene(shift=0, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (H // 6, 3 * W // 6, 3), dtype=np.uint8)
    wide = cv2.resize(coarse, (3 * W, H), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(wide[:, W + shift : 2 * W + shift])


def of(value, n=4):
    """Moments of a picture's own brightness, so that they move with it."""
    p = torch.from_numpy(cv2.cvtColor(value, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255)
    return Moments(torch.stack([p, 1 - p]), torch.stack([p, p]) * n * 0.01, p.clone(), n)


def test_a_mixture_is_that_of_the_samples_themselves():
    samples = torch.rand(7, 3, 5, 4, dtype=torch.float64).log_softmax(1).float()
    past, now, both = (Moments.empty(3, 5, 4) for _ in range(3))
    past.update(samples[:3])
    now.update(samples[3:])
    both.update(samples)
    mixed = mix(past, now, torch.full((5, 4), 3 / 7))
    torch.testing.assert_close(mixed.mean_CHW, both.mean_CHW)
    torch.testing.assert_close(mixed.variance_CHW(), both.variance_CHW(), atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(mixed.entropy_HW, both.entropy_HW)


def test_warping_by_whole_pixels_is_exact():
    moments = of(scene())
    y, x = np.mgrid[:H, :W].astype(np.float32)
    moved = warp(moments, np.stack([x + 3, y - 2], 2))
    torch.testing.assert_close(moved.mean_CHW[:, 2:, :-3], moments.mean_CHW[:, :-2, 3:])


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_the_past_comes_along_with_the_motion(keep):
    carry = Carry(keep)
    first = carry.blend(scene(), of(scene()))
    assert first.mean_CHW is not None and torch.equal(first.mean_CHW, of(scene()).mean_CHW), (
        "the first frame has no past"
    )
    blank = Moments(torch.zeros(2, H, W), torch.zeros(2, H, W), torch.zeros(H, W), 4)
    second = carry.blend(scene(5), blank)
    inner = slice(12, -12)
    expected = keep * of(scene(5)).mean_CHW[:, inner, inner]
    assert (second.mean_CHW[:, inner, inner] - expected).abs().mean() < 0.05 * keep
    assert (second.mean_CHW[:, inner, inner] - keep * of(scene()).mean_CHW[:, inner, inner]).abs().mean() > 0.1 * keep
    third = carry.blend(scene(10), blank)
    assert third.mean_CHW[:, inner, inner].mean().item() == pytest.approx(
        keep**2 * of(scene(10)).mean_CHW[:, inner, inner].mean().item(), rel=0.1
    )


def test_what_looks_different_has_no_past():
    carry = Carry(0.9)
    carry.blend(scene(), of(scene()))
    now = of(scene(seed=1))
    changed = scene()
    changed[20:60, 30:90] = 255 - scene()[20:60, 30:90] // 8
    found = carry.blend(changed, now)
    torch.testing.assert_close(found.mean_CHW[:, 30:50, 45:75], now.mean_CHW[:, 30:50, 45:75])
    assert (found.mean_CHW[:, 80:, :] - now.mean_CHW[:, 80:, :]).abs().mean() > 0.05


def test_a_frame_of_another_size_begins_anew():
    carry = Carry(0.9)
    carry.blend(scene(), of(scene()))
    small = np.ascontiguousarray(scene()[:50])
    assert torch.equal(carry.blend(small, of(small)).mean_CHW, of(small).mean_CHW)


def test_a_buffer_that_is_used_again_is_not_the_frame_before():
    buffer, carry = scene().copy(), Carry(0.5)
    first = carry.blend(buffer, of(scene()))
    buffer[:] = scene(7)
    second = carry.blend(buffer, of(scene(7)))
    fresh = Carry(0.5)
    fresh.blend(scene(), first)
    assert torch.equal(second.mean_CHW, fresh.blend(scene(7), of(scene(7))).mean_CHW)
