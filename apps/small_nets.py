"""A small net from few labelled pixels in a quarter of a minute on one core, for studies that train hundreds of them.

The encoder is an EfficientNet-Lite0 as ImageNet left it, and never changes: what it gives of each photo is computed once and
kept. What is trained on it is a decoder of pointwise layers (Xie et al. 2021), so a place of the photo needs no other. Every
labelled one is seen many times, and it is the labels that limit the result and not the computing. However much is labelled,
every training has the same number of updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import BFloat16, Float, Float32, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from seguncert.apps.pretrained import load_imagenet
from seguncert.apps.train import half_precision, learning_rate
from seguncert.card import default_colours
from seguncert.labels import IGNORED
from seguncert.model import IMAGENET_MEAN, IMAGENET_STD, build_net, save_model

DIVISOR, STRIDE = 32, 4


@dataclass(frozen=True)
class SmallRecipe:
    """All that decides the weights but the labels and the seed."""

    updates: int = 1000
    batch: int = 4096  # places
    rate: float = 3e-3
    decay: float = 0.02
    encoder: str = "tu-tf_efficientnet_lite0"
    channels: int = 64  # of the decoder

    def config(self, C: int) -> dict[str, Any]:
        """What config.json says of the net."""
        return {
            "_model_class": "Segformer", "encoder_name": self.encoder, "encoder_depth": 5, "encoder_weights": None,
            "decoder_segmentation_channels": self.channels, "in_channels": 3, "classes": C,
        }  # fmt: skip


class Encoded:
    """What the encoder gives of photos, which are known by a key: a row of numbers for each place of `STRIDE` × `STRIDE` pixels.

    The decoder's own first layer is linear, and so may come after the resize; nothing that is trained comes before a row.
    """

    def __init__(self, recipe: SmallRecipe, photos: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]):
        net: Any = build_net(recipe.config(2))
        self.encoder = net.encoder
        load_imagenet(self.encoder, recipe.encoder)
        self.encoder = self.encoder.eval().to(memory_format=torch.channels_last)
        self.first: dict[str, int] = {}
        rows, found = 0, list[Tensor]()
        for key, rgb in photos.items():
            self.first[key] = rows
            found.append(self._rows(rgb))
            rows += len(found[-1])
        self.rows_PK: BFloat16[Tensor, "P K"] = torch.cat(found)

    def _rows(self, rgb: UInt8[np.ndarray, "H W 3"]) -> BFloat16[Tensor, "p K"]:
        H, W = rgb.shape[:2]
        with torch.inference_mode(), half_precision(torch.device("cpu")):
            features = self.encoder(net_input(rgb))
            size = [side // STRIDE for side in features[0].shape[2:]]
            resized = [F.interpolate(each.float(), size, mode="bilinear") for each in features[:0:-1]]
        inside = torch.cat(resized, 1)[0, :, : -(-H // STRIDE), : -(-W // STRIDE)]
        return inside.flatten(1).T.to(torch.bfloat16).clone()


def net_input(rgb: UInt8[np.ndarray, "H W 3"]) -> Float32[Tensor, "1 3 h w"]:
    """Normalised and padded below and to the right."""
    H, W = rgb.shape[:2]
    padded = np.pad(rgb, ((0, -H % DIVISOR), (0, -W % DIVISOR), (0, 0)), mode="reflect")
    value = (padded.astype(np.float32) / 255 - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    return torch.from_numpy(value.transpose(2, 0, 1).copy())[None].contiguous(memory_format=torch.channels_last)


def train_small(
    labels: Mapping[str, UInt8[np.ndarray, "_ _"]], C: int, recipe: SmallRecipe, seed: int, encoded: Encoded
) -> nn.Module:
    """The net after `recipe.updates`, in eval mode; the same bits for the same labels and seed on one thread.

    The loss is plain cross-entropy; the target of a place is how its labelled pixels are shared among the classes. `labels` are
    by key, `IGNORED` where nothing is known.
    """
    torch.manual_seed(seed)
    net: Any = build_net(recipe.config(C))
    net.encoder.load_state_dict(encoded.encoder.state_dict())
    net.encoder.requires_grad_(False)
    row_P, share_PC = _targets(labels, C, encoded)
    if not len(row_P):
        raise ValueError("labels: expected a labelled pixel. Received: none")
    trained = [each for each in net.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=recipe.decay)
    net.train()
    generator = torch.Generator().manual_seed(seed)
    for update in range(recipe.updates):
        drawn = torch.randint(len(row_P), (recipe.batch,), generator=generator)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(update, recipe.updates, recipe.rate)
        with half_precision(torch.device("cpu")):
            logits_BC = _decode(net, encoded.rows_PK[row_P[drawn]])
        share_BC = share_PC[drawn]
        optimiser.zero_grad(set_to_none=True)
        (-(share_BC * logits_BC.float().log_softmax(1)).sum() / len(drawn)).backward()
        optimiser.step()
    return net.eval()


def _decode(net: Any, rows_BK: Float[Tensor, "B K"]) -> Tensor:
    """Logits of places by themselves, as the net's decoder and head give them: all layers are pointwise."""
    parts = rows_BK.split([stage.linear.in_features for stage in net.decoder.mlp_stage], 1)
    mixed = torch.cat([stage.linear(part) for stage, part in zip(net.decoder.mlp_stage, parts, strict=True)], 1)
    convolution, normalisation, rectify = net.decoder.fuse_stage
    fused = rectify(normalisation(F.linear(mixed, convolution.weight.flatten(1))[..., None, None]))[..., 0, 0]
    head = net.segmentation_head[0]
    return F.linear(fused, head.weight.flatten(1), head.bias)


def _targets(
    labels: Mapping[str, UInt8[np.ndarray, "_ _"]], C: int, encoded: Encoded
) -> tuple[Int64[Tensor, " P"], Float32[Tensor, "P C"]]:
    """Rows of the places that have a labelled pixel, and the share of their pixels that each class has."""
    rows, shares = list[np.ndarray](), list[np.ndarray]()
    for key, label_HW in labels.items():
        H, W = label_HW.shape
        padded_HW = np.pad(label_HW, ((0, -H % STRIDE), (0, -W % STRIDE)), constant_values=IGNORED)
        a, b = padded_HW.shape[0] // STRIDE, padded_HW.shape[1] // STRIDE
        flat_pN = padded_HW.reshape(a, STRIDE, b, STRIDE).transpose(0, 2, 1, 3).reshape(a * b, -1).astype(np.int64)
        known = flat_pN != IGNORED
        of = (np.arange(a * b)[:, None] * C + flat_pN)[known]
        counts_pC = np.bincount(of, minlength=a * b * C).reshape(a * b, C)
        some = np.flatnonzero(counts_pC.any(1))
        rows.append(encoded.first[key] + some)
        shares.append((counts_pC[some] / STRIDE**2).astype(np.float32))
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(shares))


def save_small(folder: Path, net: nn.Module, classes: Sequence[str], recipe: SmallRecipe) -> None:
    """As a model folder, for photos at their own size."""
    known = {
        "name": folder.name, "classes": list(classes), "colours": default_colours(len(classes)), "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD, "frame": None, "recipe": asdict(recipe),
    }  # fmt: skip
    save_model(folder, net, recipe.config(len(classes)), known)
