"""Scale, tiles and resizing against torch's own interpolation and whole-picture passes."""

import numpy as np
import pytest
import torch
from torch import nn

from seguncert import predict
from seguncert.model import ModelError, wrap_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1))
    return wrap_model(net, ["a", "b", "c", "d"], frame=(24, 32))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(24, 32), (1, 1), (7, 90), (100, 3), (48, 64), (31, 33), (24, 100), (70, 32)])
@pytest.mark.parametrize("at_once", [0, 1 << 24])
def test_bands_equal_torch_interpolate(size, at_once):
    logits = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(0))
    whole = nn.functional.interpolate(logits[None].double(), size=size, mode="bilinear", align_corners=False)[0].float()
    banded = torch.empty(4, *size)
    for rows, logits_CRW in predict.rows_at_size(logits, *size, values=4 * 64 * 3, whole=at_once):
        banded[:, rows] = logits_CRW
    torch.testing.assert_close(banded, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("at_once", [0, 1 << 24])
def test_bands_of_logits_one_pixel_thin(shape, at_once):
    logits = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    whole = nn.functional.interpolate(logits[None], size=(9, 11), mode="bilinear", align_corners=False)[0]
    banded = torch.cat([band for _, band in predict.rows_at_size(logits, 9, 11, values=1, whole=at_once)], dim=1)
    torch.testing.assert_close(banded, whole, atol=1e-5, rtol=0)


def test_auto_brings_any_photo_to_the_area_of_the_frame(model):
    for height, width in [(24, 32), (2400, 3200), (12, 16), (10, 1000), (1, 1)]:
        factor = predict.scale_factor(model, height, width)
        assert (factor * height) * (factor * width) == pytest.approx(24 * 32)
    assert predict.scale_factor(model, 2400, 3200, "native") == 1
    assert predict.scale_factor(model, 2400, 3200, "0.5") == 0.5


@pytest.mark.parametrize("scale", ["large", "0", "-1", "nan", "1e9"])
def test_a_scale_that_makes_no_sense(model, scale):
    with pytest.raises(ValueError, match="scale: expected auto, native or a factor from 0.01 to 100. Received: "):
        predict.scale_factor(model, 10, 10, scale)


def test_a_photo_at_the_models_scale_is_not_resized(model):
    rgb = picture(24, 32)
    with torch.inference_mode():
        mean, std = torch.tensor(model.mean).view(3, 1, 1), torch.tensor(model.std).view(3, 1, 1)
        padded = nn.functional.pad(torch.from_numpy(rgb).permute(2, 0, 1).float(), (0, 0, 0, 8), mode="reflect")
        coarse = model.module(((padded / 255 - mean) / std)[None])
        expected = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)[0, :, :24]
    torch.testing.assert_close(predict.predict_logits(model, rgb), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (33, 31)])
def test_every_size_gives_logits_of_its_own_size(model, size):
    assert predict.predict_logits(model, picture(*size), "native").shape == (4, *size)


def test_planes_are_a_contiguous_copy():
    logits = torch.randn(1, 5, 9, 8, generator=torch.Generator().manual_seed(0))
    for layout in (torch.channels_last, torch.contiguous_format):
        cropped = logits.to(memory_format=layout)[0, :, :7, :6]
        assert torch.equal(predict.planes(cropped), cropped) and predict.planes(cropped).is_contiguous()


def test_one_value_that_is_not_finite_is_an_error():
    class Spoils(nn.Module):
        def forward(self, x):
            logits = x[:, :2].clone()
            if x.shape[-1] == 96:
                logits[0, 1, 5, 7] = torch.nan
            return logits

    model = wrap_model(Spoils(), ["a", "b"])
    predict.predict_logits(model, picture(64, 64), "native")
    with pytest.raises(ModelError, match="gave values that are not finite for this picture"):
        predict.predict_logits(model, picture(96, 96), "native")


def test_a_net_in_training_mode_is_run_in_eval_mode_and_given_back():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)).train()
    model = wrap_model(net, ["a", "b"])
    mean = net[1].running_mean.clone()
    first, second = (predict.predict_logits(model, picture(32, 32)) for _ in range(2))
    assert torch.equal(first, second), "dropout acted"
    assert torch.equal(net[1].running_mean, mean) and all(part.training for part in net.modules())
