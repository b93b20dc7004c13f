"""Small segmentation nets for the laboratory's scenes, from as many pictures as one likes, in half a minute on one core.

A Unet of three levels, channel dropout before its last convolution as in the bundled models, plain cross-entropy. However
many pictures there are, every training has the same number of updates, so that only what the data say differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from seguncert.apps.train import learning_rate, soft_cross_entropy
from seguncert.model import Model, wrap_model
from seguncert.stochastic import logit_distribution, put_stochastic_head, stochastic_nll

MEAN, STD, DIVISOR = 0.43, 0.2, 8


@dataclass(frozen=True)
class SceneRecipe:
    """All that decides the weights but the data and the seed. `rank` above 0 gives a stochastic head of that rank."""

    updates: int = 600
    batch: int = 32
    rate: float = 5e-3
    channels: int = 16
    dropout: float = 0.1
    rank: int = 0
    samples: int = 10  # of the loss of a stochastic head


class SceneNet(nn.Module):
    """Logits (B, C, H, W) of pictures (B, 3, H, W) whose sides divide by 8."""

    def __init__(self, classes: int, channels: int = 16, dropout: float = 0.1):
        super().__init__()
        f = channels
        self.down = nn.ModuleList([_block(3, f), _block(f, 2 * f), _block(2 * f, 4 * f), _block(4 * f, 4 * f)])
        self.up = nn.ModuleList([_block(8 * f, 4 * f), _block(6 * f, 2 * f), _block(3 * f, 2 * f)])
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(2 * f, classes, 1)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Logits."""
        seen, value = [], image_B3HW
        for level, block in enumerate(self.down):
            value = block(F.max_pool2d(value, 2) if level else value)
            seen.append(value)
        for block, skip in zip(self.up, seen[-2::-1], strict=True):
            value = block(torch.cat([skip, F.interpolate(value, scale_factor=2, mode="nearest")], 1))
        logits_BCHW: Tensor = self.head(self.dropout(value))
        return logits_BCHW


def _block(inside: int, outside: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for channels in (inside, outside):
        parts += [nn.Conv2d(channels, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*parts)


def net_input(images_NHW3: UInt8[np.ndarray, "N H W 3"]) -> Float32[Tensor, "N 3 H W"]:
    """As `Model` feeds it."""
    values_N3HW = torch.from_numpy(images_NHW3.transpose(0, 3, 1, 2).astype(np.float32))
    return ((values_N3HW / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def train_net(
    images_NHW3: UInt8[np.ndarray, "N H W 3"],
    targets: Int64[np.ndarray, "N H W"] | Float32[np.ndarray, "N C H W"],
    classes: int,
    recipe: SceneRecipe,
    seed: int,
) -> SceneNet:
    """The net after `recipe.updates`, in eval mode; `targets` are class indices, or shares of the classes (soft targets).

    The same bits for the same arguments on one thread; torch's own random numbers are as before.
    """
    input_N3HW, target_N = net_input(images_NHW3), torch.from_numpy(targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build(classes, recipe)
        optimiser = torch.optim.AdamW(net.parameters(), lr=recipe.rate, weight_decay=0.0)
        net.train()
        for update in range(recipe.updates):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(update, recipe.updates, recipe.rate)
            drawn = torch.randint(len(input_N3HW), (recipe.batch,), generator=generator)
            image_B3HW, target_B = input_N3HW[drawn], target_N[drawn]
            if recipe.rank:
                found = logit_distribution(net, image_B3HW)
                loss = stochastic_nll(found, target_B, recipe.samples, generator=generator)
            elif target_B.is_floating_point():
                loss = soft_cross_entropy(net(image_B3HW), target_B)
            else:
                loss = F.cross_entropy(net(image_B3HW), target_B)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    return net.eval()


def build(classes: int, recipe: SceneRecipe) -> SceneNet:
    """A net with random weights; with a stochastic head there is no dropout, whose noise would be taken for the data's."""
    net = SceneNet(classes, recipe.channels, 0.0 if recipe.rank else recipe.dropout)
    if recipe.rank:
        put_stochastic_head(net, recipe.rank, "head")
    return net.to(memory_format=torch.channels_last)


def as_model(net: SceneNet, classes: Sequence[str], name: str) -> Model:
    """For the house's own functions."""
    return wrap_model(net, classes, mean=(MEAN,) * 3, std=(STD,) * 3, divisor=DIVISOR, name=name)
