"""A head whose logits are a random picture: pixels that belong together are right or wrong together in each sample.

Stochastic segmentation networks (Monteiro et al., NeurIPS 2020, eqs. 1 to 7): the logits η of a whole picture are normal,
with a covariance of low rank besides its diagonal,

    η = μ + Σ_r z_r P_r + √d ε        z_r ~ N(0, 1) one number for the whole picture, ε ~ N(0, 1) one a pixel and class
    E η = μ,      cov(η_i, η_j) = Σ_r P_ri P_rj + [i = j] d_i         i, j: a pixel and class each

and p(y | η) is the softmax of each pixel. μ, P and ln d are convolutions of the features before them. A softmax of μ says of
an object that may be there or not "1/2" at each pixel; samples of η say it is there whole, or not at all.

Letters: S samples, B pictures, R rank, C classes, K channels of the features, h × w, at H × W logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from segmentation_models_pytorch.base import SegmentationHead
from torch import Tensor, nn
from torch.nn import functional as F

from seguncert.card import ModelError

FLOOR = 1e-5  # of d, as in the authors' code
LARGEST = 10.0  # of ln d before the floor is added: a deviation of 148, beyond which a softmax shows nothing new
FIRST = math.log(1e-2)  # ln d of a new head: noise of single pixels that a mask of thousands does not drown in
MOST = 256  # rank


@dataclass(frozen=True, eq=False)
class LogitDistribution:
    """The normal distribution of the logits of B pictures; float32, shapes and formula in the module's text.

    Attributes:
        mean_BCHW: μ, the mean of the logits.
        factor_BRCHW: P, in logits: how far each of R numbers that a picture shares moves each logit.
        diagonal_BCHW: d ≥ `FLOOR`, in logits²: the variance of each logit by itself.
    """

    mean_BCHW: Float[Tensor, "B C H W"]
    factor_BRCHW: Float[Tensor, "B R C H W"]
    diagonal_BCHW: Float[Tensor, "B C H W"]

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "S B C H W"]:
        """`n` samples of the logits, (n, B, C, H, W): the argmax over C of each is a coherent mask. Gradients flow.

        Pictures of a batch are independent. `generator` may be of the CPU while the net is elsewhere.
        Raises ValueError for n below 1.

        >>> mean, factor = torch.zeros(1, 2, 1, 3), torch.tensor([5.0, -5.0]).view(1, 1, 2, 1, 1).expand(1, 1, 2, 1, 3)
        >>> found = LogitDistribution(mean, factor, torch.full_like(mean, 1e-5))
        >>> found.sample(4, torch.Generator().manual_seed(0)).argmax(2)[:, 0, 0].tolist()
        [[0, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]]
        """
        return self.mean_BCHW + self.deviations(n, generator)

    def deviations(self, n: int, generator: torch.Generator) -> Float[Tensor, "S B C H W"]:
        """What `sample` adds to the mean; its negative has the same distribution."""
        if n < 1:
            raise ValueError(f"samples: expected 1 or more. Received: {n}")
        mean_BCHW, (B, R) = self.mean_BCHW, self.factor_BRCHW.shape[:2]

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=generator.device)
            return drawn.to(mean_BCHW.device, mean_BCHW.dtype)

        shared_SBCHW = torch.einsum("sbr,brchw->sbchw", normal(n, B, R), self.factor_BRCHW)
        return shared_SBCHW.addcmul(self.diagonal_BCHW.sqrt(), normal(n, *mean_BCHW.shape))


class LowRankNoise(nn.Module):
    """What `LowRankHead` adds to its mean when it is sampled; as it is called it hands the mean on.

    It is the stochastic module of such a head, as a dropout is one of others: see `seguncert.dropout.Masks`.
    """

    def __init__(self, in_channels: int, classes: int, rank: int, upsampling: int | float):
        super().__init__()
        self.rank, self.upsampling = rank, upsampling
        self.factor = nn.Conv2d(in_channels, rank * classes, 1)

    def forward(self, mean_BCHW: Tensor, features_BKhw: Tensor, deviation_BCHW: Tensor) -> Tensor:
        """The mean."""
        return mean_BCHW

    def distribution(self, mean_BCHW: Tensor, features_BKhw: Tensor, deviation_BCHW: Tensor) -> LogitDistribution:
        """All of it."""
        factor_BQHW = _resized(self.factor(features_BKhw), self.upsampling).float()
        return LogitDistribution(mean_BCHW.float(), factor_BQHW.unflatten(1, (self.rank, -1)), deviation_BCHW.square())

    def moved(
        self, mean_BCHW: Tensor, features_BKhw: Tensor, deviation_BCHW: Tensor, z_R: Tensor, noise_BCHW: Tensor
    ) -> Tensor:
        """μ + Σ_r z_r P_r + √d ε. P, which is R times as large as the logits, is not made: Σ_r z_r P_r is one convolution."""
        weight_CK11 = torch.einsum("r,rckij->ckij", z_R, self.factor.weight.unflatten(0, (self.rank, -1)))
        assert self.factor.bias is not None
        shared_BChw = F.conv2d(features_BKhw, weight_CK11, z_R @ self.factor.bias.view(self.rank, -1))
        return (mean_BCHW + _resized(shared_BChw, self.upsampling)).addcmul_(deviation_BCHW, noise_BCHW)


class _Deviation(nn.Module):
    """√d of ln d; d is `FLOOR` more than that."""

    def forward(self, log_BCHW: Tensor) -> Tensor:
        return (FLOOR + log_BCHW.float().clamp(max=LARGEST).exp()).sqrt()


class _Resize(nn.Module):
    """`_resized` as a module, whose result many samples share."""

    def __init__(self, factor: int | float):
        super().__init__()
        self.factor = factor

    def forward(self, value_BChw: Tensor) -> Tensor:
        return _resized(value_BChw, self.factor)


def _resized(value_BChw: Tensor, factor: int | float) -> Tensor:
    """As the heads of segmentation-models-pytorch do it."""
    if factor == 1:
        return value_BChw
    return F.interpolate(value_BChw, scale_factor=factor, mode="bilinear", align_corners=True)


class LowRankHead(nn.Module):
    """A last module of a net, that gives the distribution of the logits of a whole picture; see the module's text.

    Takes features (B, K, h, w), gives the mean μ of the logits, (B, C, upsampling · h, upsampling · w), in training mode too:
    nothing is drawn when it is called. `distribution` gives all of it, `logit_distribution` that of a net with such a head,
    `stochastic_nll` is its loss. μ is a convolution of `kernel_size`; P and ln d are of 1 × 1, as in the authors' code.
    Raises ValueError for a rank that is not 1 to `MOST`, and an even kernel size.

    >>> head = LowRankHead(8, classes=3, rank=4, upsampling=2)
    >>> found = head.distribution(torch.ones(1, 8, 5, 6))
    >>> tuple(found.mean_BCHW.shape), tuple(found.factor_BRCHW.shape), round(found.diagonal_BCHW.min().item(), 4)
    ((1, 3, 10, 12), (1, 4, 3, 10, 12), 0.01)
    """

    def __init__(
        self, in_channels: int, classes: int, rank: int = 10, kernel_size: int = 3, upsampling: int | float = 1
    ):
        super().__init__()
        if not 1 <= rank <= MOST:
            raise ValueError(f"rank: expected 1 to {MOST}. Received: {rank}")
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size: expected an odd number, so that logits stay in place. Received: {kernel_size}"
            )
        conv, log = nn.Conv2d(in_channels, classes, kernel_size, padding="same"), nn.Conv2d(in_channels, classes, 1)
        nn.init.zeros_(log.weight)
        nn.init.constant_(log.bias, FIRST)  # type: ignore[arg-type]
        self.mean = nn.Sequential(conv, _Resize(upsampling))
        self.deviation = nn.Sequential(log, _Resize(upsampling), _Deviation())
        self.noise = LowRankNoise(in_channels, classes, rank, upsampling)

    @property
    def rank(self) -> int:
        """R, how many numbers all pixels of a picture share."""
        return self.noise.rank

    def forward(self, features_BKhw: Float[Tensor, "B K h w"]) -> Float[Tensor, "B C H W"]:
        """The mean of the logits."""
        return self.noise(*self._parts(features_BKhw))

    def distribution(self, features_BKhw: Float[Tensor, "B K h w"]) -> LogitDistribution:
        """Of the logits, in float32; may be called under autocast."""
        return self.noise.distribution(*self._parts(features_BKhw))

    def _parts(self, features_BKhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean(features_BKhw), features_BKhw, self.deviation(features_BKhw)


def stochastic_nll(
    distribution: LogitDistribution,
    target: Int64[Tensor, "B H W"] | Float[Tensor, "B C H W"],
    samples: int = 20,
    *,
    generator: torch.Generator,
    ignore_index: int = 255,
) -> Float[Tensor, ""]:
    """Minus the log-likelihood of whole masks, in nats a pixel, estimated from samples of the logits. To train with.

        −Σ_b ln (1/S) Σ_s exp Σ_i Σ_c y_bci ln softmax(η_sbi)_c / number of pixels i that count, of all pictures b

    Monteiro et al. 2020, eqs. 6 and 7; as in their code half of the samples are the others mirrored about the mean. It is
    biased upwards, the less the more samples.

    Args:
        target: class indices (B, H, W), or shares of the classes (B, C, H, W) that sum to 1 in each pixel that counts
            and are 0 in the others. A distribution of one channel z is one of the logits (0, z) of two classes.
        samples: even, 2 or more; memory grows with it.
        ignore_index: of pixels that do not count. They get no noise, so that nothing can grow there without bound and
            spoil the gradient of the others, as the authors' code does outside the region of interest.

    Raises:
        ValueError: shapes that do not fit, an odd number of samples, a class that there is not.

    >>> mean = torch.log(torch.tensor([0.8, 0.2])).view(1, 2, 1, 1)
    >>> sure = LogitDistribution(mean, torch.zeros(1, 1, 2, 1, 1), torch.full_like(mean, 1e-12))
    >>> round(stochastic_nll(sure, torch.zeros(1, 1, 1).long(), 2, generator=torch.Generator()).item(), 4)  # −ln 0.8
    0.2231
    """
    if samples < 2 or samples % 2:
        raise ValueError(f"samples: expected an even number, 2 or more. Received: {samples}")
    counted_BHW = _counted(distribution.mean_BCHW, target, ignore_index)
    seen_B1HW = counted_BHW[:, None]
    seen = replace(
        distribution,
        factor_BRCHW=torch.where(seen_B1HW[:, None], distribution.factor_BRCHW, 0),
        diagonal_BCHW=torch.where(seen_B1HW, distribution.diagonal_BCHW, FLOOR),
    )
    half_SBCHW, mean_BCHW = seen.deviations(samples // 2, generator), torch.where(seen_B1HW, seen.mean_BCHW, 0)
    logits_SBCHW = torch.cat([mean_BCHW + half_SBCHW, mean_BCHW - half_SBCHW])
    if logits_SBCHW.shape[2] == 1:
        logits_SBCHW = torch.cat([torch.zeros_like(logits_SBCHW), logits_SBCHW], 2)
    given = torch.where(counted_BHW, target, 0) if target.ndim == 3 else target.to(logits_SBCHW.dtype)
    likelihood_SBHW = -F.cross_entropy(
        logits_SBCHW.flatten(0, 1), given.repeat(samples, *(1,) * (target.ndim - 1)), reduction="none"
    ).unflatten(0, (samples, -1))
    of_mask_SB = torch.where(counted_BHW, likelihood_SBHW, 0).sum((2, 3))
    of_masks = (of_mask_SB.logsumexp(0) - math.log(samples)).sum()
    return -of_masks / counted_BHW.sum().clamp(min=1)


def _counted(mean_BCHW: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Which pixels count, (B, H, W) bool; ValueError where the target does not fit the logits."""
    B, C, H, W = mean_BCHW.shape
    C = max(C, 2)
    if tuple(target.shape) not in ((B, H, W), (B, C, H, W)):
        raise ValueError(
            f"target: expected class indices ({B}, {H}, {W}) or shares ({B}, {C}, {H}, {W}), as the logits are."
            f" Received: {tuple(target.shape)}"
        )
    if target.ndim == 4:
        return target.sum(1) > 0
    counted_BHW = target != ignore_index
    wrong = counted_BHW & ((target < 0) | (target >= C))
    if wrong.any():
        raise ValueError(
            f"target: expected classes from 0 to {C - 1}, or ignore_index {ignore_index}. Received: {target[wrong][0].item()}"
        )
    return counted_BHW


def stochastic_heads(net: nn.Module) -> dict[str, LowRankHead]:
    """Names and modules of the heads of this kind."""
    return {name: module for name, module in net.named_modules() if isinstance(module, LowRankHead)}


def logit_distribution(net: nn.Module, images_BNHW: Float[Tensor, "B N H W"]) -> LogitDistribution:
    """The distribution that the head of a net gives for a batch of pictures, in whatever mode the net is; gradients flow.

    What the net does after its head is not part of it. Raises ModelError where the net has no such head, or two.
    """
    heads, given = stochastic_heads(net), list[Any]()
    if len(heads) != 1:
        raise ModelError(
            f"logit_distribution: expected a net with one LowRankHead. Received: {len(heads)}. put_stochastic_head puts it in."
        )
    noise = next(iter(heads.values())).noise
    handle = noise.register_forward_hook(lambda _, inputs, output: given.append(inputs))
    try:
        net(images_BNHW)
    finally:
        handle.remove()
    return noise.distribution(*given[-1])


def put_stochastic_head(net: nn.Module, rank: int = 10, place: str = "segmentation_head") -> LowRankHead:
    """Put a `LowRankHead` in place of the last module of a net, whose convolution stays as that of the mean.

    So the net gives the logits that it gave, and training goes on from there. `place` is the name of the head of a
    segmentation-models-pytorch net, or of a last `Conv2d` in any other. Gives the new head.

    Raises:
        ModelError: there is no such module there, or dropout was put in before it, which would be lost.
    """
    old = dict(net.named_modules()).get(place)
    conv, upsampling, *after = [*old, None, None] if isinstance(old, SegmentationHead) else [old, None]
    active = [leaf for part in after if part for leaf in part.modules() if not any(leaf.children())]
    if (
        not isinstance(conv, nn.Conv2d)
        or any(not isinstance(leaf, nn.Identity) for leaf in active)
        or not _keeps_size(conv)
    ):
        raise ModelError(
            "stochastic head: expected the name of a segmentation-models-pytorch head without activation, or of a last Conv2d"
            f" that keeps the size. Received: {place!r}, {type(old).__name__ if old else 'no such module'}."
            f" Top-level names: {', '.join(name for name, _ in net.named_children())}"
        )
    assert old is not None
    if old._forward_pre_hooks or old._forward_hooks:
        raise ModelError(
            f"stochastic head: {place} has hooks, as put_dropout makes them. Put the stochastic head in first."
        )
    head = LowRankHead(
        conv.in_channels, conv.out_channels, rank, upsampling=float(getattr(upsampling, "scale_factor", 1))
    )
    head.mean[0] = conv
    head.to(conv.weight.device, conv.weight.dtype).train(old.training)
    parent, _, name = place.rpartition(".")
    setattr(net.get_submodule(parent), name, head)
    return head


def _keeps_size(conv: nn.Conv2d) -> bool:
    padding = conv.padding if isinstance(conv.padding, tuple) else (-1, -1)
    each = zip(padding, conv.dilation, conv.kernel_size, strict=True)
    return conv.padding == "same" or (set(conv.stride) == {1} and all(2 * p == d * (k - 1) for p, d, k in each))
