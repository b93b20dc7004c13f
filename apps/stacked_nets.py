"""Many small nets of one shape, trained at once: their weights lie in one tensor a layer, and a layer is one product.

A net is 1 → h → h → 2 with ReLU. Each has its own start, its own mini-batches and its own dropout, all of which follow from
its key: a net is the same one, up to rounding, whichever others are trained beside it.

Letters: M nets, B numbers x of a mini-batch, h hidden units, S samples, C = 2 classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from seguncert.apps.train import moving_average
from seguncert.posterior import IndependentPixels

CHUNK = 50  # mini-batches that are drawn at once
Weights = list[Tensor]  # of three layers (M, from, to) and their biases (M, 1, to), by turns


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights but the scene and the keys; `dropout` acts on both hidden layers."""

    hidden: int = 64
    batch: int = 200
    rate: float = 5e-3  # of Adam
    dropout: float = 0.0


def start(generators: Sequence[torch.Generator], hidden: int) -> Weights:
    """Uniform within ± 1/√(inputs) of a layer, as torch.nn.Linear starts."""
    found: Weights = []
    for inputs, outputs in ((1, hidden), (hidden, hidden), (hidden, 2)):
        bound = 1 / math.sqrt(inputs)
        for rows in (inputs, 1):
            drawn = [torch.empty(rows, outputs).uniform_(-bound, bound, generator=each) for each in generators]
            found.append(torch.stack(drawn))
    return found


def logits(weights: Weights, x_MB: Float32[Tensor, "M B"], masks: Sequence[Tensor] = ()) -> Float32[Tensor, "M B C"]:
    """Of each net for its own numbers. `masks` are what the hidden layers are multiplied with, (M, B or 1, h) each.

    >>> two = [torch.ones(2, 1, 3), torch.zeros(2, 1, 3), torch.ones(2, 3, 3), torch.zeros(2, 1, 3), torch.ones(2, 3, 2), torch.zeros(2, 1, 2)]
    >>> logits(two, torch.tensor([[1.0], [-1.0]])).tolist()
    [[[9.0, 9.0]], [[0.0, 0.0]]]
    """
    first, first_bias, second, second_bias, last, last_bias = weights
    hidden = torch.baddbmm(first_bias, x_MB[..., None], first).relu()
    hidden = hidden * masks[0] if masks else hidden
    hidden = torch.baddbmm(second_bias, hidden, second).relu()
    hidden = hidden * masks[1] if masks else hidden
    return torch.baddbmm(last_bias, hidden, last)


def masks_of(generators: Sequence[torch.Generator], B: int, hidden: int, dropout: float) -> list[Tensor]:
    """For both hidden layers 0 with probability `dropout`, else 1 / (1 − dropout)."""
    found = [torch.empty(len(generators), B, hidden) for _ in range(2)]
    for mask_MBh in found:
        for mask_Bh, generator in zip(mask_MBh, generators, strict=True):
            mask_Bh.bernoulli_(1 - dropout, generator=generator)
        mask_MBh /= 1 - dropout
    return found


def train(
    scene: IndependentPixels,
    keys: Sequence[Sequence[int]],
    milestones: Sequence[int],
    recipe: Recipe,
    progress: Callable[[int], None] = lambda updates: None,
) -> dict[int, Weights]:
    """Weights of all nets, averaged over the updates so far, after each of the rising numbers of updates.

    The loss is the mean cross-entropy of mini-batches that are seen once. The average is exponential with decay
    (1 + u) / (10 + u) after u updates. `progress` is told of updates made.
    """
    rngs = [np.random.default_rng(list(key)) for key in keys]
    generators = [torch.Generator().manual_seed(int(rng.integers(2**62))) for rng in rngs]
    weights = [each.requires_grad_() for each in start(generators, recipe.hidden)]
    averaged = [each.detach().clone() for each in weights]
    average, optimiser = moving_average(1.0), torch.optim.Adam(weights, lr=recipe.rate, fused=True)
    found, update = dict[int, Weights](), 0
    for last in milestones:
        while update < last:
            x_MUB, label_MUB = draw(scene, rngs, (min(CHUNK, last - update), recipe.batch))
            for u in range(x_MUB.shape[1]):
                masks = masks_of(generators, recipe.batch, recipe.hidden, recipe.dropout) if recipe.dropout else ()
                logits_MBC = logits(weights, x_MUB[:, u], masks)
                loss = F.cross_entropy(logits_MBC.flatten(0, 1), label_MUB[:, u].flatten(), reduction="sum")
                optimiser.zero_grad(set_to_none=True)
                (loss / recipe.batch).backward()
                optimiser.step()
                for before, now in zip(averaged, weights, strict=True):
                    before.copy_(average(before, now.detach(), update))
                update += 1
            progress(x_MUB.shape[1])
        found[last] = [each.clone() for each in averaged]
    return found


def draw(
    scene: IndependentPixels, rngs: Sequence[np.random.Generator], shape: tuple[int, ...]
) -> tuple[Float32[Tensor, "M ..."], Int64[Tensor, "M ..."]]:
    """Numbers and their classes, of each generator as many as the shape says; a scene of one pixel and one channel."""
    drawn: list[Any] = [scene.sample(math.prod(shape), int(rng.integers(2**62))) for rng in rngs]
    x_Mn, label_Mn = (np.stack([each[part].reshape(shape) for each in drawn]) for part in (0, 1))
    return torch.from_numpy(x_Mn.astype(np.float32)), torch.from_numpy(label_Mn)


@torch.no_grad()
def sampled(
    weights: Weights, x_B: Float32[Tensor, " B"], samples: int, dropout: float, seeds: Sequence[int]
) -> Float32[Tensor, "S M B C"]:
    """Logits with dropout on. A sample is a function: one mask for all x."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x_MB, hidden = x_B.expand(len(generators), -1), weights[0].shape[-1]
    return torch.stack([logits(weights, x_MB, masks_of(generators, 1, hidden, dropout)) for _ in range(samples)])
