"""A small net from few labelled pixels in less than a minute on one core, for studies that train a hundred of them.

An EfficientNet-Lite0 with ImageNet weights and a small Unet decoder. What an update costs is spent where there are labels: a
crop lies around a labelled place. However much is labelled, every training has the same number of updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float32, Int, UInt8
from torch import nn
from torch.nn import functional as F

from seguncert.apps.pretrained import freeze_filters, load_imagenet
from seguncert.apps.train import augment, half_precision, learning_rate, parameter_groups
from seguncert.card import default_colours
from seguncert.labels import IGNORED
from seguncert.model import IMAGENET_MEAN, IMAGENET_STD, build_net, save_model

ENOUGH = 20  # labelled pixels from which on a place has a class


@dataclass(frozen=True)
class SmallRecipe:
    """All that decides the weights but the labels and the seed."""

    updates: int = 400
    batch: int = 8
    crop: tuple[int, int] = (96, 96)
    scale_range: tuple[float, float] = (0.8, 1.25)
    rotate: bool = False
    balanced: bool = True  # rare classes count for more, see `train_small`
    rate: float = 3e-3
    encoder_rate: float = 0.2  # as a share of `rate`
    decay: float = 0.02
    frozen: int = 2  # stages of the encoder that stay as ImageNet left them
    encoder: str = "tu-tf_efficientnet_lite0"
    decoder_channels: tuple[int, ...] = (64, 48, 32, 16)

    def config(self, C: int) -> dict[str, Any]:
        """What config.json says of the net."""
        return {
            "_model_class": "Unet", "encoder_name": self.encoder, "encoder_depth": len(self.decoder_channels),
            "encoder_weights": None, "decoder_channels": list(self.decoder_channels), "in_channels": 3, "classes": C,
        }  # fmt: skip


def train_small(
    photos: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    labels: Sequence[UInt8[np.ndarray, "_ _"]],
    places_K5: Int[np.ndarray, "K 5"],
    C: int,
    recipe: SmallRecipe,
    seed: int,
) -> nn.Module:
    """The net after `recipe.updates`, in eval mode; the same bits for the same labels and seed on one thread.

    Where the recipe is balanced a class is drawn first, then a labelled place that has it; and in the loss a class weighs by its
    labelled pixels to the power −1/2. A few hundred updates teach rare classes nothing otherwise.

    Args:
        labels: `IGNORED` where nothing is known.
        places_K5: number of the photo, x, y, width and height of each place that is labelled; crops lie around these.
    """
    cv2.setNumThreads(0)
    torch.manual_seed(seed)
    net = build_net(recipe.config(C))
    load_imagenet(net.encoder, recipe.encoder)
    fixed = _freeze(net.encoder, recipe.frozen)
    net = net.to(memory_format=torch.channels_last).train()
    for module in fixed:
        module.eval()
    counts_KC = np.stack([_count(labels[n][y : y + height, x : x + width], C) for n, x, y, width, height in places_K5])
    if counts_KC.max(initial=0) < ENOUGH:
        raise ValueError(f"labels: expected a place with {ENOUGH} labelled pixels of a class. Received: none")
    groups, weight_C = [np.arange(len(places_K5))], None
    if recipe.balanced:
        groups = [found for c in range(C) if (found := np.flatnonzero(counts_KC[:, c] >= ENOUGH)).size]
        weight_C = torch.from_numpy(class_weights(labels, C))
    optimiser = torch.optim.AdamW(parameter_groups(net, recipe), lr=recipe.rate)
    device = torch.device("cpu")
    for update in range(recipe.updates):
        rng = np.random.default_rng([seed, update])
        crops = []
        for _ in range(recipe.batch):
            n, x, y, width, height = places_K5[rng.choice(groups[rng.integers(len(groups))])].tolist()
            crops.append(crop_around(photos[n], labels[n], y + height // 2, x + width // 2, recipe, rng))
        input_B3HW = torch.from_numpy(np.stack([rgb for rgb, _ in crops]))
        label_BHW = torch.from_numpy(np.stack([label for _, label in crops]).astype(np.int64))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(update, recipe.updates, recipe.rate) * group["share"]
        with half_precision(device):
            logits_BCHW = net(input_B3HW.contiguous(memory_format=torch.channels_last))
        lost = F.cross_entropy(logits_BCHW.float(), label_BHW, weight_C, ignore_index=IGNORED, reduction="sum")
        optimiser.zero_grad(set_to_none=True)
        (lost / (label_BHW != IGNORED).sum().clamp(min=1)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
    return net.eval()


def class_weights(labels: Sequence[UInt8[np.ndarray, "_ _"]], C: int) -> Float32[np.ndarray, " C"]:
    """Of the labelled pixels of each class to the power −1/2, such that the mean over pixels is 1; 0 for one that is not there.

    >>> class_weights([np.array([[0, 0, 0, 0, 1, 255]], np.uint8)], 3)
    array([0.8333333, 1.6666666, 0.       ], dtype=float32)
    """
    counts_C = np.sum([_count(label, C) for label in labels], axis=0)
    weight_C = np.where(counts_C > 0, np.maximum(counts_C, 1) ** -0.5, 0)
    return (weight_C * counts_C.sum() / (weight_C * counts_C).sum()).astype(np.float32)


def _count(label: UInt8[np.ndarray, "_ _"], C: int) -> np.ndarray:
    return np.bincount(label[label != IGNORED], minlength=C)


def _freeze(encoder: Any, stages: int) -> list[nn.Module]:
    """Keep the depthwise filters and the first stages as they are; returns the normalisations, to be kept in eval mode."""
    fixed = freeze_filters(encoder)
    if stages:
        inside = encoder.model
        for module in (inside.conv_stem, inside.bn1, *inside.blocks[:stages]):
            module.requires_grad_(False)
    return fixed


def crop_around(
    rgb: UInt8[np.ndarray, "H W 3"],
    label: UInt8[np.ndarray, "H W"],
    y: int,
    x: int,
    recipe: SmallRecipe,
    rng: np.random.Generator,
):
    """A crop that has pixel (y, x) in it, moved, scaled, flipped and recoloured as `seguncert.apps.train.augment` does."""
    sides = [round(side / recipe.scale_range[0]) for side in recipe.crop]
    starts = [
        max(0, min(at - side // 2, size - side)) for at, side, size in zip((y, x), sides, label.shape, strict=True)
    ]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    return augment(rgb[rows, columns], label[rows, columns], recipe, rng)


def save_small(folder: Path, net: nn.Module, classes: Sequence[str], recipe: SmallRecipe) -> None:
    """As a model folder, for photos at their own size."""
    known = {
        "name": folder.name, "classes": list(classes), "colours": default_colours(len(classes)), "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD, "frame": None, "recipe": asdict(recipe),
    }  # fmt: skip
    save_model(folder, net, recipe.config(len(classes)), known)
