"""A photo cut into blocks: covered once, blended, and the same as the whole wherever the net does not see the cut."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from seguncert import tiles
from seguncert.model import ModelError, wrap_model
from seguncert.moments import Moments
from seguncert.run import Settings, describe_blocks
from seguncert.sampling import DropoutSampler
from seguncert.tiles import FADE, blended
from seguncert.views import OnePass


def photo(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def wrap(net, C=3, **more):
    return wrap_model(net.eval(), [str(c) for c in range(C)], name="net", **more)


def elementwise(stride=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, stride, stride=stride), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.4), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(),
        nn.Dropout2d(0.2), nn.Conv2d(8, 3, 3, padding=1),
    ).to(memory_format=torch.channels_last)  # fmt: skip


@pytest.mark.parametrize(
    "H, W, step", [(1, 1, 50.0), (300, 200, 130.0), (128, 700, 128.0), (1000, 90, 333.0), (257, 513, 256.0)]
)
def test_blocks_cover_a_photo_once_and_blend_to_what_they_agree_on(H, W, step):
    truth = Moments(torch.rand(2, H, W), torch.rand(2, H, W), torch.rand(H, W), 3)
    whole, seen = Moments.empty(2, H, W), np.zeros((H, W), int)
    for rows, columns, moments in blended(H, W, step, lambda rows, columns: truth.at(rows, columns).copy()):
        seen[rows, columns] += 1
        whole.put(rows, columns, moments)
    assert (seen == 1).all() and whole.n == 3
    for field in ("mean_CHW", "squares_CHW", "entropy_HW"):
        torch.testing.assert_close(getattr(whole, field), getattr(truth, field))


def test_neighbours_that_disagree_fade_into_each_other():
    H, W, number = 40, 400, iter(range(10))

    def predict(rows, columns):
        moments = Moments.empty(2, rows.stop - rows.start, columns.stop - columns.start)
        moments.entropy_HW += next(number)
        return moments

    line = torch.cat([moments.entropy_HW[0] for _, _, moments in blended(H, W, 200.0, predict)])
    assert line[: 200 - FADE].max() == 0 and line[200 + FADE :].min() == 1
    steps = line.diff()
    assert steps.min() >= 0 and steps.max() < 1.5 / (2 * FADE)


@pytest.mark.parametrize("size", [(300, 430), (430, 20), (301, 203)])
@pytest.mark.parametrize("scale", ["native", 0.7, 1.3])
@pytest.mark.parametrize("kind", ["one pass", "masks of values", "masks of channels"])
def test_blocks_equal_the_whole(kind, scale, size, monkeypatch):
    monkeypatch.setattr(tiles, "MARGIN", 32)
    if kind == "masks of channels":
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.4), nn.Conv2d(8, 3, 3, padding=1))
        sampler = DropoutSampler(wrap(net))
        assert sampler.tail
    else:
        sampler = (OnePass if kind == "one pass" else DropoutSampler)(wrap(elementwise(), divisor=4))
    rgb = photo(*size)
    whole = sampler.moments(rgb, 3, scale=scale)
    cut = sampler.moments(rgb, 3, scale=scale, tile=84)
    parts = list(sampler.blocks(rgb, 3, 0, scale, tile=84))
    assert len(parts) > 1 and "blocks" not in sampler.how
    assert (cut.mean_CHW - whole.mean_CHW).abs().max() < 1e-4
    assert (cut.entropy_HW - whole.entropy_HW).abs().max() < 2e-4
    assert (cut.variance_CHW() - whole.variance_CHW()).abs().max() < 1e-4
    if kind != "one pass":
        assert whole.variance_CHW().max() > 1e-4
        other = sampler.moments(rgb, 3, seed=1, scale=scale)
        assert (other.mean_CHW - whole.mean_CHW).abs().max() > 1e-2, "other masks would show"


def test_masks_that_have_no_place_are_told():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.last = nn.Conv2d(3, 8, 4, stride=4), nn.Dropout(0.3), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.drop(x.flatten(2).transpose(1, 2))).transpose(1, 2).unflatten(2, x.shape[2:])

    torch.manual_seed(0)
    assert "differ from block to block" in DropoutSampler(wrap(Tokens())).how["blocks"]


def test_what_a_photo_holds_is_bounded_by_blocks(monkeypatch):
    sampler, rgb = OnePass(wrap(elementwise(), divisor=4)), photo(600, 500)
    whole = sampler.moments(rgb, scale="native")
    monkeypatch.setattr(tiles, "WHOLE", 1 << 20)
    monkeypatch.setattr(tiles, "BLOCK", 4 * 7 * 250**2)
    blocks = list(sampler.blocks(rgb, scale="native"))
    assert len(blocks) >= 6
    assert max(moments.entropy_HW.numel() for _, _, moments in blocks) <= 250**2
    assert (sampler.moments(rgb, scale="native").mean_CHW - whole.mean_CHW).abs().max() < 1e-4


def test_a_value_that_is_not_finite_in_any_block_is_an_error():
    class Spoils(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :2] > 4.9, torch.nan, x[:, :2])

    rgb = photo(700, 900) // 2
    sampler = OnePass(wrap(Spoils(), 2, mean=(0.0, 0.0, 0.0), std=(0.2, 0.2, 0.2)))
    sampler.moments(rgb, tile=400)
    rgb[650, 850] = 255
    with pytest.raises(ModelError, match="not finite"):
        sampler.moments(rgb, tile=400)


def test_a_calibrator_sees_the_photo_of_its_block(monkeypatch):
    looked = []

    class Looking:
        kind, keeps_labels = "looking", True

        def look(self, logits_Chw, photo_HW3):
            looked.append((tuple(logits_Chw.shape[1:]), photo_HW3))

        def __call__(self, logits_CRW, seen_FRW):
            return logits_CRW

        def unfamiliar(self, logits_Chw):
            return ""

    rgb, model = photo(300, 430), wrap(elementwise(), divisor=4)
    settings = Settings(maps=("confidence",), scale="native")
    monkeypatch.setattr(tiles, "WHOLE", 1 << 20)
    monkeypatch.setattr(tiles, "BLOCK", 4 * 7 * 150**2)
    parts = list(describe_blocks(model, None, rgb, settings, Looking()))
    assert len(parts) == len(looked) > 1
    for (rows, columns, labels_RW, _, _), (size, part) in zip(parts, looked, strict=True):
        assert size == labels_RW.shape and np.array_equal(part, rgb[rows, columns])
