"""An engine is taken when its maps agree with fp32 torch, and refused with a line when they do not."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from seguncert import backends
from seguncert.backends import choose
from seguncert.batch import export
from seguncert.model import load_model, wrap_model
from seguncert.predict import on_backend, predict_logits
from seguncert.sampling import DropoutSampler

CPU = torch.device("cpu")
openvino = pytest.mark.skipif(not backends._installed(), reason="openvino is not installed")


def confidence(logits):
    return logits.softmax(1).amax(1)


@pytest.fixture
def part():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1)).eval()


def test_torch_in_fp32_is_the_part_itself(part):
    assert choose(part, confidence, CPU, 32, "torch", "auto").run is part
    assert choose(part, confidence, CPU, 32, "torch", "fp32").about == "torch fp32"


def test_torch_in_bf16_says_how_far_off_it_is(part):
    chosen = choose(part, confidence, CPU, 32, "torch", "bf16")
    assert chosen.about.startswith("torch bf16, confidence ") and "from torch fp32 on average" in chosen.about
    value = torch.randn(1, 3, 32, 32)
    off = (confidence(chosen.run(value)) - confidence(part(value))).abs().mean()
    assert 0 < off < backends.TOLERANCE


class Insists(nn.Module):
    """Takes only pictures whose sides divide by 48; has what eval mode must hold still."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, value):
        assert value.shape[2] % 48 == value.shape[3] % 48 == 0
        return self.layers(value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_divisor_and_a_net_in_training_mode(precision):
    net = Insists().train()
    model = wrap_model(net, list("abcd"), divisor=48)
    before = [value.clone() for value in net.state_dict().values()]
    other, _ = on_backend(model, "torch", precision)
    rgb = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    first, second = predict_logits(other, rgb), predict_logits(other, rgb)
    assert torch.equal(first, second) and other.device == model.device
    torch.testing.assert_close(first, predict_logits(model, rgb), atol=0.05, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))
    assert all(module.training for module in net.modules())


def test_what_does_not_agree_is_refused(part, monkeypatch):
    monkeypatch.setattr(backends, "_autocast", lambda part, device: lambda value: part(value) * 3)
    with pytest.raises(
        ValueError, match=r"torch bf16: confidence is 0\.\d+ from torch fp32 on average, more than 0.025"
    ):
        choose(part, confidence, CPU, 32, "torch", "bf16")


def test_auto_falls_back_to_torch_in_fp32(part, monkeypatch):
    def fail(*_):
        raise RuntimeError("an operator that no converter knows")

    monkeypatch.setattr(backends, "_installed", lambda: True)
    monkeypatch.setattr(backends, "_openvino", fail)
    assert choose(part, confidence, CPU, 32, "auto", "auto").about == "torch fp32"
    with pytest.raises(
        ValueError, match="openvino fp32: RuntimeError: an operator that no converter knows. Set it to auto"
    ):
        choose(part, confidence, CPU, 32, "openvino", "fp32")


@pytest.mark.parametrize(
    "settings, message",
    [
        (("tpu", "auto"), "backend: expected one of auto, torch, openvino. Received: 'tpu'"),
        (("auto", "int8"), "precision: expected one of auto, fp32, bf16. Received: 'int8'"),
    ],
)
def test_wrong_settings(part, settings, message):
    with pytest.raises(ValueError, match=message):
        choose(part, confidence, CPU, 32, *settings)


def test_openvino_that_is_not_installed_is_one_line(part, monkeypatch):
    monkeypatch.setattr(backends, "_installed", lambda: False)
    with pytest.raises(ValueError, match="openvino is not installed: pip install 'seguncert.openvino.'"):
        choose(part, confidence, CPU, 32, "openvino", "auto")
    assert choose(part, confidence, CPU, 32, "auto", "auto").about == "torch fp32"


@openvino
def test_openvino_in_fp32_gives_torchs_numbers_at_any_size(part):
    chosen = choose(part, confidence, CPU, 32, "openvino", "fp32")
    assert chosen.about.startswith("openvino fp32")
    for size in ((32, 64), (96, 40)):
        value = torch.randn(1, 3, *size)
        with torch.inference_mode():
            torch.testing.assert_close(chosen.run(value), part(value), atol=1e-5, rtol=1e-5)


@openvino
def test_openvino_does_not_report_to_its_maker():
    code = (
        "import torch, sys; from torch import nn; from seguncert.backends import _openvino;"
        "_openvino(nn.Conv2d(3, 2, 1), 'fp32', 1, 32); import openvino.tools.ovc.telemetry_utils as used;"
        "print(used.tm.__name__, sys.modules['openvino_telemetry'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["openvino.tools.ovc.telemetry_stub", "None"]


@openvino
def test_sampling_on_openvino(small_model):
    model = load_model(small_model, "cpu", insert_dropout={"segmentation_head": 0.3})
    rgb = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    plain = DropoutSampler(model).moments(rgb, 5)
    fast = DropoutSampler(model, backend="openvino", precision="fp32")
    assert fast.how["backend"].startswith("openvino fp32")
    torch.testing.assert_close(fast.moments(rgb, 5).mean_CHW, plain.mean_CHW, atol=1e-4, rtol=0)
    assert "forward" not in vars(model.module.encoder)


@openvino
def test_a_folder_on_openvino(small_model, pictures, tmp_path):
    for workers in (1, 2):
        out = tmp_path / str(workers)
        export(pictures, out, small_model, backend="openvino", precision="fp32", workers=workers)
        assert json.loads((out / "run.json").read_text())["backend"].startswith("openvino fp32")
    export(pictures, tmp_path / "torch", small_model, backend="torch")
    for file in sorted((tmp_path / "torch").rglob("confidence.png"))[::8]:
        from cv2 import IMREAD_UNCHANGED, imread

        relative = file.relative_to(tmp_path / "torch")
        reference = imread(str(file), IMREAD_UNCHANGED).astype(int)
        for workers in ("1", "2"):
            found = imread(str(tmp_path / workers / relative), IMREAD_UNCHANGED).astype(int)
            assert np.abs(found - reference).max() < 65535 * 1e-3
