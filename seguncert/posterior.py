"""Scenes whose exact posterior is known, pixel by pixel: what a perfect net would say of each of their pictures.

A scene is a generative model: labels are drawn from a prior, colours from what each label looks like. Of a photo nobody
knows P(class | picture); of these it is computed exactly, in log space and float64. Minimising the mean cross-entropy over
such pictures is minimising the KL divergence to that posterior, and the minimum is the posterior itself (Richard, Lippmann
1991); so nets, maps, samplers and calibrators can be held against it.

Letters: N pictures, H rows, W columns, K channels, C classes, Q kinds of pixels (what a pixel can look like).

    scene               prior of the labels                              posterior by
    IndependentPixels   each pixel by itself                             Bayes' rule
    MarkovRows          a chain along each row                           forward–backward (Rabiner 1989)
    QuadTree            a tree, four children each                       belief propagation (Pearl 1988; Laferté et al. 2000)
    HiddenObject        one shape somewhere, perhaps behind a bar        all hypotheses
    Annotators          any of these, and several people who label it    that of the scene
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64, Int64, Shaped

Image = Shaped[np.ndarray, "H W K"]


@runtime_checkable
class Scene(Protocol):
    """What all scenes can do."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the C classes."""

    def sample(self, n: int, seed: int) -> tuple[Shaped[np.ndarray, "N H W K"], Int64[np.ndarray, "N H W"]]:
        """Pictures and their labels."""

    def posterior(self, image: Image) -> Float64[np.ndarray, "C H W"]:
        """P(class | picture) of each pixel, exact; sums to 1 over C."""

    def draw_labels(self, image: Image, n: int, seed: int) -> Int64[np.ndarray, "N H W"]:
        """Whole label maps, each a draw from the joint posterior P(all labels | picture)."""


@dataclass(frozen=True)
class Colours:
    """What a pixel of each kind looks like: a Gaussian in each channel, independent of all else.

    With `levels` a value is rounded to a whole number and kept in [0, levels − 1], as in a file with 8 bits; its likelihood
    is then the mass of the interval that is rounded to it, so that a posterior is exact for the file. None: real numbers.

    >>> Colours(((0.0,), (3.0,)), ((1.0,), (1.0,)), levels=None).log_likelihood(np.full((1, 1, 1), 1.5)).round(4).tolist()
    [[[-2.0439]], [[-2.0439]]]
    """

    means: tuple[tuple[float, ...], ...]
    sds: tuple[tuple[float, ...], ...]
    levels: int | None = 256

    def __post_init__(self) -> None:
        shapes = {tuple(map(len, each)) for each in (self.means, self.sds)}
        if len(shapes) != 1 or not min(map(min, self.sds)) > 0:
            raise ValueError(
                "colours: expected a mean and a standard deviation above 0 for each channel of each kind of pixel."
                f" Received: means {self.means}, standard deviations {self.sds}"
            )

    def draw(self, kinds: Int64[np.ndarray, "*N"], rng: np.random.Generator) -> Shaped[np.ndarray, "*N K"]:
        """Colours for pixels of these kinds: uint8 or uint16 with levels, else float64."""
        drawn = rng.normal(np.array(self.means)[kinds], np.array(self.sds)[kinds])
        if self.levels is None:
            return drawn
        return np.clip(np.rint(drawn), 0, self.levels - 1).astype(np.uint8 if self.levels <= 256 else np.uint16)

    def log_likelihood(self, image: Image) -> Float64[np.ndarray, "Q H W"]:
        """ln p(colour | kind) of each pixel: the log of a density, or with levels of a probability."""
        means, sds = np.array(self.means), np.array(self.sds)
        if image.shape[-1] != means.shape[1]:
            raise ValueError(f"image: expected {means.shape[1]} channels. Received: shape {image.shape}")
        if self.levels is None:
            z = (image - means[:, None, None]) / sds[:, None, None]
            return (-0.5 * z**2 - np.log(sds[:, None, None]) - 0.5 * np.log(2 * np.pi)).sum(-1)
        if not np.issubdtype(image.dtype, np.integer) or image.min() < 0 or image.max() >= self.levels:
            raise ValueError(
                f"image: expected whole numbers from 0 to {self.levels - 1}."
                f" Received: {image.dtype}, {image.min()} to {image.max()}"
            )
        total = np.zeros((len(means), *image.shape[:2]))
        for k in range(means.shape[1]):
            total += self._log_mass_QKL[:, k][:, image[..., k]]
        return total

    @cached_property
    def _log_mass_QKL(self) -> Float64[np.ndarray, "Q K L"]:
        """ln P(a value is rounded to l). The two tails belong to the ends."""
        assert self.levels is not None
        edges = np.concatenate([[-np.inf], np.arange(self.levels - 1) + 0.5, [np.inf]])
        z = torch.from_numpy((edges - np.array(self.means)[..., None]) / np.array(self.sds)[..., None])
        low, high = z[..., :-1], z[..., 1:]
        left = low + high > 0  # the mirror image, where the smaller tails are
        low, high = torch.where(left, -high, low), torch.where(left, -low, high)
        below, above = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        return (above + torch.log1p(-(below - above).exp())).numpy()


@dataclass(frozen=True)
class IndependentPixels:
    """Each pixel's class is drawn from `priors`, its colour from the class. A neighbour says nothing.

    >>> line = Colours(((0.0,), (3.0,)), ((1.0,), (1.0,)), levels=None)
    >>> IndependentPixels(("a", "b"), (0.5, 0.5), line).posterior(np.full((1, 1, 1), 1.5)).ravel().tolist()
    [0.5, 0.5]
    """

    classes: tuple[str, ...]
    priors: tuple[float, ...]
    colours: Colours
    shape: tuple[int, int] = (32, 32)

    def __post_init__(self) -> None:
        check(self.classes, self.colours, len(self.classes), priors=self.priors)

    def sample(self, n: int, seed: int) -> tuple[Shaped[np.ndarray, "N H W K"], Int64[np.ndarray, "N H W"]]:
        """Pictures and their labels."""
        rng = np.random.default_rng(seed)
        labels_NHW = rng.choice(len(self.priors), (n, *self.shape), p=self.priors)
        return self.colours.draw(labels_NHW, rng), labels_NHW

    def posterior(self, image: Image) -> Float64[np.ndarray, "C H W"]:
        """P(c | x) ∝ P(c) p(x | c)."""
        return normalised(log(self.priors)[:, None, None] + self.colours.log_likelihood(image))

    def draw_labels(self, image: Image, n: int, seed: int) -> Int64[np.ndarray, "N H W"]:
        """Pixel by pixel, since the joint posterior is a product."""
        probs_HWC = np.moveaxis(self.posterior(image), 0, -1)
        return draw(np.broadcast_to(probs_HWC, (n, *probs_HWC.shape)), np.random.default_rng(seed))


@dataclass(frozen=True)
class MarkovRows:
    """Each row is a Markov chain from left to right: the first class from `start`, the next from `transition[class]`."""

    classes: tuple[str, ...]
    start: tuple[float, ...]
    transition: tuple[tuple[float, ...], ...]
    colours: Colours
    shape: tuple[int, int] = (32, 32)

    def __post_init__(self) -> None:
        check(self.classes, self.colours, len(self.classes), start=self.start, transition=self.transition)

    def sample(self, n: int, seed: int) -> tuple[Shaped[np.ndarray, "N H W K"], Int64[np.ndarray, "N H W"]]:
        """Pictures and their labels."""
        rng = np.random.default_rng(seed)
        H, W = self.shape
        labels_NHW = np.empty((n, H, W), np.int64)
        labels_NHW[..., 0] = rng.choice(len(self.classes), (n, H), p=self.start)
        for t in range(1, W):
            labels_NHW[..., t] = draw(np.array(self.transition)[labels_NHW[..., t - 1]], rng)
        return self.colours.draw(labels_NHW, rng), labels_NHW

    def posterior(self, image: Image) -> Float64[np.ndarray, "C H W"]:
        """P(c_t | row) ∝ α_t(c) β_t(c), the messages from the left and from the right."""
        seen_WHC = self.colours.log_likelihood(image).transpose(2, 1, 0)
        step_CC = log(self.transition)
        beta_WHC = np.zeros_like(seen_WHC)
        for t in range(len(seen_WHC) - 2, -1, -1):
            beta_WHC[t] = logsumexp(step_CC + (seen_WHC[t + 1] + beta_WHC[t + 1])[:, None], -1)
        return normalised((self._forward(seen_WHC) + beta_WHC).transpose(2, 1, 0))

    def draw_labels(self, image: Image, n: int, seed: int) -> Int64[np.ndarray, "N H W"]:
        """From the right to the left: the last of a row from α, each before it from α_t(c) · transition[c, next]."""
        rng = np.random.default_rng(seed)
        alpha_WHC = self._forward(self.colours.log_likelihood(image).transpose(2, 1, 0))
        W, H, C = alpha_WHC.shape
        step_CC = log(self.transition)
        labels_NHW = np.empty((n, H, W), np.int64)
        reach_NHC = np.zeros((n, H, C))
        for t in range(W - 1, -1, -1):
            labels_NHW[..., t] = draw(normalised(alpha_WHC[t] + reach_NHC, -1), rng)
            reach_NHC = step_CC.T[labels_NHW[..., t]]
        return labels_NHW

    def _forward(self, seen_WHC: Float64[np.ndarray, "W H C"]) -> Float64[np.ndarray, "W H C"]:
        """ln α_t(c) = ln p(x_1 … x_t, c_t = c)."""
        step_CC = log(self.transition)
        alpha_WHC = np.empty_like(seen_WHC)
        alpha_WHC[0] = log(self.start) + seen_WHC[0]
        for t in range(1, len(seen_WHC)):
            alpha_WHC[t] = logsumexp(alpha_WHC[t - 1][..., None] + step_CC, -2) + seen_WHC[t]
        return alpha_WHC


@dataclass(frozen=True)
class QuadTree:
    """The root's class is drawn from `root`, each of four children's from `transition[class of the parent]`; leaves are pixels.

    A picture has 2^depth rows and columns.
    """

    classes: tuple[str, ...]
    root: tuple[float, ...]
    transition: tuple[tuple[float, ...], ...]
    colours: Colours
    depth: int = 5

    def __post_init__(self) -> None:
        check(self.classes, self.colours, len(self.classes), root=self.root, transition=self.transition)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a picture."""
        return 2**self.depth, 2**self.depth

    def sample(self, n: int, seed: int) -> tuple[Shaped[np.ndarray, "N H W K"], Int64[np.ndarray, "N H W"]]:
        """Pictures and their labels."""
        rng = np.random.default_rng(seed)
        labels_Nab = rng.choice(len(self.classes), (n, 1, 1), p=self.root)
        for _ in range(self.depth):
            labels_Nab = draw(np.array(self.transition)[_children(labels_Nab)], rng)
        return self.colours.draw(labels_Nab, rng), labels_Nab

    def posterior(self, image: Image) -> Float64[np.ndarray, "C H W"]:
        """Up, what is seen below each node; then down, what is seen elsewhere."""
        up = self._upward(image)
        belief_Cab = up[0][0] + log(self.root)[:, None, None]
        for below_Cab, message_Cab in up[1:]:
            # a parent's class that a child rules out is ruled out: there is nothing to take away
            above_Cab = _children(belief_Cab) - np.where(np.isfinite(message_Cab), message_Cab, 0)
            belief_Cab = below_Cab + logsumexp(above_Cab[:, None] + log(self.transition)[..., None, None], 0)
        return normalised(belief_Cab)

    def draw_labels(self, image: Image, n: int, seed: int) -> Int64[np.ndarray, "N H W"]:
        """From the root to the leaves: a child's class from transition[parent, c] · p(what is seen below | c)."""
        rng = np.random.default_rng(seed)
        up = self._upward(image)
        root_C = normalised(up[0][0][:, 0, 0] + log(self.root))
        labels_Nab = rng.choice(len(root_C), (n, 1, 1), p=root_C)
        for below_Cab, _ in up[1:]:
            chance_NabC = log(self.transition)[_children(labels_Nab)] + np.moveaxis(below_Cab, 0, -1)
            labels_Nab = draw(normalised(chance_NabC, -1), rng)
        return labels_Nab

    def _upward(self, image: Image) -> list[tuple[Float64[np.ndarray, "C _ _"], Float64[np.ndarray, "C _ _"]]]:
        """From the root to the leaves: ln p(what is seen below a node | its class), and | its parent's class."""
        below_Cab = self.colours.log_likelihood(image)
        if image.shape[:2] != self.shape:
            raise ValueError(f"image: expected {self.shape[0]} rows and columns. Received: {image.shape}")
        found = []
        for _ in range(self.depth):
            message_Cab = logsumexp(log(self.transition)[..., None, None] + below_Cab, 1)
            found.append((below_Cab, message_Cab))
            C, a, b = message_Cab.shape
            below_Cab = message_Cab.reshape(C, a // 2, 2, b // 2, 2).sum((2, 4))
        return [(below_Cab, below_Cab), *found[::-1]]


@dataclass(frozen=True)
class Annotators:
    """Pictures of a scene, each labelled by several people: each label map a draw from the joint posterior.

    How much they differ has a known truth: the share of people who say c goes to P(c | picture).
    """

    scene: Scene
    raters: int = 5

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the scene."""
        return self.scene.classes

    def sample(self, n: int, seed: int) -> tuple[Shaped[np.ndarray, "N H W K"], Int64[np.ndarray, "N R H W"]]:
        """Pictures, and R label maps of each."""
        images_NHWK, _ = self.scene.sample(n, seed)
        seeds = np.random.default_rng([seed, 1]).integers(2**31, size=n)
        drawn = [
            self.scene.draw_labels(image, self.raters, int(s)) for image, s in zip(images_NHWK, seeds, strict=True)
        ]
        return images_NHWK, np.stack(drawn)

    def posterior(self, image: Image) -> Float64[np.ndarray, "C H W"]:
        """Of the scene."""
        return self.scene.posterior(image)


def check(classes: Sequence[str], colours: Colours, kinds: int, **chances: Any) -> None:
    if len(colours.means) != kinds or len(classes) < 2:
        raise ValueError(
            f"colours: expected {kinds} kinds of pixels, for two or more classes."
            f" Received: {len(colours.means)} kinds, classes {', '.join(classes)}"
        )
    for name, given in chances.items():
        table = np.array(given, float)
        square = name == "transition"
        if table.shape != (len(classes),) * (1 + square) or table.min() < 0 or np.abs(table.sum(-1) - 1).max() > 1e-9:
            raise ValueError(
                f"{name}: expected a probability for each of {len(classes)} classes{' after each class' if square else ''},"
                f" which sum to 1. Received: {given}"
            )


def log(chances: Any) -> Any:
    """ln, and −inf of 0 without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(chances)


def logsumexp(values: np.ndarray, axis: int) -> Any:
    """ln Σ exp along an axis, also where all is −inf."""
    top = values.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    return log(np.exp(values - top).sum(axis)) + top.squeeze(axis)


def normalised(log_weights: np.ndarray, axis: int = 0) -> np.ndarray:
    """Probabilities along an axis; ValueError where nothing is possible."""
    top = log_weights.max(axis, keepdims=True)
    if not np.isfinite(top).all():
        raise ValueError("image: expected colours that the scene can give. Received: a pixel that no class explains")
    weights = np.exp(log_weights - top)
    return weights / weights.sum(axis, keepdims=True)


def draw(probs: Float64[np.ndarray, "*N C"], rng: np.random.Generator) -> Int64[np.ndarray, "*N"]:
    """A class for each row of probabilities: the first whose cumulated probability exceeds a uniform number."""
    cumulated = probs.cumsum(-1)
    drawn = rng.random((*probs.shape[:-1], 1)) * cumulated[..., -1:]
    found: np.ndarray = (cumulated <= drawn).sum(-1)
    return found


def _children(values: np.ndarray) -> np.ndarray:
    """Each of the last two axes' entries twice: what four children have of their parent."""
    return values.repeat(2, -2).repeat(2, -1)
