"""Train a segmentation net on a folder of images and a folder of label PNGs, and write it as a model folder.

    python -m seguncert.apps.train IMAGES LABELS OUT --classes Sky,Building,... --ignore-index 11

The loss is plain cross-entropy: a proper score, so the softmax estimates a posterior (class weights would bend it).
Labels by more raters (--rater FOLDER) make it that with the distribution of what they say.
The weights written are an exponential moving average over updates. A run that is stopped goes on when the same
command is given again, with the same batches: every random number is drawn from (seed, epoch, image).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from seguncert.apps.pretrained import freeze_filters, load_imagenet
from seguncert.card import default_colours
from seguncert.evaluation import measure, total
from seguncert.image import read_image
from seguncert.labels import IGNORED, find_pairs, rater_shares, read_labels
from seguncert.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Model,
    build_net,
    load_net,
    pick_device,
    put_dropout,
    save_model,
)

Pairs = list[tuple[Path, list[Path]]]  # an image, and its labels by each rater

console = Console(stderr=True)


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights; written into the checkpoint, so that a resumed run cannot differ."""

    architecture: str
    encoder: str
    decoder_channels: tuple[int, ...]
    classes: tuple[str, ...]
    ignore_index: int | None
    dropout: float
    epochs: int
    batch: int
    crop: tuple[int, int]
    scale_range: tuple[float, float]
    rotate: bool
    rate: float
    encoder_rate: float
    decay: float
    average: float
    seed: int
    init: str
    pretrained: bool
    leave_out: tuple[str, ...]
    raters: tuple[str, ...] = ()  # folders of labels, where there are several


class Crops(Dataset):
    """Random crops; item (epoch, slot) is a pure function of the seed, the epoch and the slot.

    An image has a slot in each epoch, and more of them the larger it is: the square root of how many crops it holds,
    so that neither the pixels of large images nor small images go short. The target is one rater's classes (H, W), or
    the shares (C, H, W) of several.
    """

    def __init__(self, pairs: Pairs, recipe: Recipe):
        self.recipe = recipe
        self.slots = [
            pair for pair in pairs for _ in range(max(1, math.isqrt(_area(pair[0]) // math.prod(recipe.crop))))
        ]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, slot = key
        cv2.setNumThreads(0)
        rng = np.random.default_rng([self.recipe.seed, epoch, slot])
        (image, labels), C = self.slots[slot], len(self.recipe.classes)
        rgb = read_image(image).rgb
        labels_KHW = read_labels(labels, C, self.recipe.ignore_index, *rgb.shape[:2])
        rgb, labels_KHW = augment(rgb, labels_KHW, self.recipe, rng)
        target = labels_KHW[0].astype(np.int64) if len(labels_KHW) == 1 else rater_shares(labels_KHW, C)
        return torch.from_numpy(rgb), torch.from_numpy(target)


def augment(
    rgb: UInt8[np.ndarray, "H W 3"], labels_KHW: UInt8[np.ndarray, "K H W"], recipe: Recipe, rng: np.random.Generator
) -> tuple[Float32[np.ndarray, "3 h w"], UInt8[np.ndarray, "K h w"]]:
    """A crop of `recipe.crop` at a random scale, flipped, with brightness, contrast, saturation and hue moved."""
    crop_height, crop_width = recipe.crop
    factor = math.exp(rng.uniform(*np.log(recipe.scale_range)))
    height, width = (max(1, round(side * factor)) for side in labels_KHW.shape[1:])
    window_height, window_width = min(height, crop_height), min(width, crop_width)
    top, left = rng.integers(0, height - window_height + 1), rng.integers(0, width - window_width + 1)
    # resize only what the crop needs: source window -> crop
    matrix = np.array([[factor, 0, (factor - 1) / 2 - left], [0, factor, (factor - 1) / 2 - top]])
    size = (window_width, window_height)
    rgb = cv2.warpAffine(rgb, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    moved = [
        cv2.warpAffine(
            each_HW, matrix, size, flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=IGNORED
        )
        for each_HW in labels_KHW
    ]
    labels_KHW = np.stack(moved)
    below, right = crop_height - window_height, crop_width - window_width
    if below or right:
        rgb = cv2.copyMakeBorder(rgb, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(124, 116, 104))
        labels_KHW = np.pad(labels_KHW, ((0, 0), (0, below), (0, right)), constant_values=IGNORED)
    if rng.random() < 0.5:
        rgb, labels_KHW = rgb[:, ::-1], labels_KHW[..., ::-1]
    if recipe.rotate:  # for pictures without an up: any of the eight orientations
        turns = int(rng.integers(4))
        rgb, labels_KHW = np.rot90(rgb, turns), np.rot90(labels_KHW, turns, axes=(1, 2))
    rgb = rgb.astype(np.float32) / 255
    grey = rgb.mean(axis=2, keepdims=True)
    rgb = grey + (rgb - grey) * rng.uniform(0.5, 1.5)
    rgb = (rgb - rgb.mean()) * rng.uniform(0.7, 1.4) + rgb.mean() + rng.uniform(-0.15, 0.15)
    rgb = np.clip(rgb * rng.uniform(0.93, 1.07, 3).astype(np.float32), 0, 1) ** rng.uniform(0.8, 1.25)
    normalised = (rgb - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32), np.ascontiguousarray(labels_KHW)


def _area(image: Path) -> int:
    with Image.open(image) as header:
        return math.prod(header.size)


def soft_cross_entropy(
    logits_BCHW: Float[Tensor, "B C H W"], shares_BCHW: Float32[Tensor, "B C H W"]
) -> Float32[Tensor, ""]:
    """Mean over labelled pixels of −Σ_c t_c ln p_c in nats, p the softmax of the logits; NaN if none is labelled.

    The shares t of a pixel sum to 1, or are all 0 where it has no label, see `seguncert.labels.rater_shares`. A pixel
    counts as one, labelled by all raters or by one of them, as where a calibrator is fitted and a net evaluated.

    >>> logits_BCHW = torch.tensor([0.8, 0.2]).log().reshape(1, 2, 1, 1)
    >>> round(soft_cross_entropy(logits_BCHW, torch.full((1, 2, 1, 1), 0.5)).item(), 4)  # −(ln 0.8 + ln 0.2) / 2
    0.9163
    """
    log_probs_BCHW = logits_BCHW.float().log_softmax(1)
    return -(shares_BCHW * log_probs_BCHW).sum() / shares_BCHW.any(1).sum()


def learning_rate(update: int, updates: int, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a half cosine to zero."""
    warm = max(1, round(0.03 * updates))
    if update < warm:
        return peak * (update + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm)))


def fit(
    net: torch.nn.Module,
    pairs: Pairs,
    recipe: Recipe,
    checkpoint: Path,
    check: Callable[[torch.nn.Module], dict[str, float]],
    workers: int,
) -> torch.nn.Module:
    """Train `net` in place, a checkpoint an epoch; returns its average over updates. `check` measures an average."""
    device = next(net.parameters()).device
    fixed = freeze_filters(net.encoder) if recipe.pretrained else []
    averaged = AveragedModel(net, avg_fn=moving_average(recipe.average), use_buffers=True)
    optimiser = torch.optim.AdamW(parameter_groups(net, recipe), lr=recipe.rate)
    done, history, names = 0, [], [image.name for image, _ in pairs]
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        if state["recipe"] != json.dumps(asdict(recipe)) or state["images"] != names:
            raise ValueError(
                f"{checkpoint} is from another recipe, other raters or other images. Give the same, another OUT, or remove it."
            )
        net.load_state_dict(state["net"])
        averaged.load_state_dict(state["averaged"])
        optimiser.load_state_dict(state["optimiser"])
        done, history = state["epoch"], state["history"]
        console.print(f"going on after epoch {done}")

    crops = Crops(pairs, recipe)
    per_epoch = max(1, len(crops.slots) // recipe.batch)
    batches = [
        [(epoch, int(slot)) for slot in order[at * recipe.batch : (at + 1) * recipe.batch]]
        for epoch in range(done, recipe.epochs)
        for order in [np.random.default_rng([recipe.seed, epoch]).permutation(len(crops.slots))]
        for at in range(per_epoch)
    ]
    loader = iter(DataLoader(crops, batch_sampler=batches, num_workers=workers))
    started = time.monotonic()
    for epoch in range(done, recipe.epochs):
        torch.manual_seed(recipe.seed + 1_000_003 * epoch)  # of the dropout
        net.train()
        for module in fixed:
            module.eval()
        losses = []
        for at in range(per_epoch):
            rate = learning_rate(epoch * per_epoch + at, recipe.epochs * per_epoch, recipe.rate)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["share"]
            input_B3HW, target = next(loader)
            with half_precision(device):
                logits_BCHW = net(input_B3HW.to(device, memory_format=torch.channels_last))
            target = target.to(device)
            if recipe.raters:
                loss = soft_cross_entropy(logits_BCHW, target)
            else:
                loss = F.cross_entropy(logits_BCHW.float(), target, ignore_index=IGNORED)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss became {loss.item()} in epoch {epoch + 1}; lower --rate")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimiser.step()
            averaged.update_parameters(net)
            losses.append(loss.item())
        row = {"epoch": epoch + 1, "loss": float(np.mean(losses)), "seconds": time.monotonic() - started}
        history.append(row | check(averaged.module) if epoch + 1 == recipe.epochs or (epoch + 1) % 5 == 0 else row)
        left = (recipe.epochs - epoch - 1) * row["seconds"] / (epoch + 1 - done) / 60
        console.print("  ".join(f"{key} {value:.4g}" for key, value in history[-1].items()), f" left {left:.0f} min")
        state = {
            "recipe": json.dumps(asdict(recipe)), "images": names, "epoch": epoch + 1, "history": history, "net": net.state_dict(),
            "averaged": averaged.state_dict(), "optimiser": optimiser.state_dict(),
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)
    return averaged.module


def parameter_groups(net: torch.nn.Module, recipe: Recipe) -> list[dict]:
    """The encoder's and the others' parameters; those with one number a channel are not drawn towards zero."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            share = recipe.encoder_rate if name.startswith("encoder.") else 1.0
            groups.setdefault((share, recipe.decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": found, "share": share, "weight_decay": decay} for (share, decay), found in groups.items()]


def moving_average(decay: float) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | int], torch.Tensor]:
    """An exponential average whose memory grows with the number of updates, so that it forgets the random start."""

    def average(before: torch.Tensor, now: torch.Tensor, updates: torch.Tensor | int) -> torch.Tensor:
        weight = 1 - min(decay, (1 + int(updates)) / (10 + int(updates)))
        return torch.lerp(before, now, weight) if before.is_floating_point() else now

    return average


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where the processor has instructions for it; elsewhere a context that does nothing."""
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def train(
    images: Annotated[Path, typer.Argument(help="folder of images")],
    labels: Annotated[Path, typer.Argument(help="folder of PNGs of class indices, same names")],
    out: Annotated[Path, typer.Argument(help="the model folder to write")],
    classes: Annotated[str, typer.Option(help="class names in the order of their indices, comma between")],
    ignore_index: Annotated[int | None, typer.Option(help="label of pixels that do not count")] = None,
    rater: Annotated[
        list[Path] | None,
        typer.Option(help="labels of the same images by one more rater; what is learnt is the distribution of all"),
    ] = None,
    val_images: Annotated[Path | None, typer.Option(help="to watch mIoU, accuracy and NLL every 5 epochs")] = None,
    val_labels: Path | None = None,
    leave_out: Annotated[list[str] | None, typer.Option(help="a sequence (name before _) not trained on")] = None,
    init: Annotated[Path | None, typer.Option(help="model folder whose weights to start from")] = None,
    pretrained: Annotated[bool, typer.Option(help="start from an encoder trained on ImageNet")] = False,
    architecture: Annotated[str, typer.Option(help="of segmentation-models-pytorch")] = "Unet",
    encoder: str = "tu-regnetx_004",
    decoder_channels: str = "128,64,48,32,24",
    dropout: Annotated[float, typer.Option(help="channel dropout before the segmentation head")] = 0.2,
    epochs: int = 200,
    batch: int = 8,
    crop: Annotated[str, typer.Option(help="HEIGHTxWIDTH, multiples of 32")] = "256x320",
    scale_range: Annotated[str, typer.Option(help="smallest and largest random resize")] = "0.6,1.6",
    rotate: Annotated[bool, typer.Option(help="all eight orientations, for pictures without an up")] = False,
    rate: Annotated[float, typer.Option(help="peak learning rate of AdamW")] = 2e-3,
    encoder_rate: Annotated[float, typer.Option(help="the encoder's learning rate, as a share of the others'")] = 1.0,
    decay: Annotated[float, typer.Option(help="weight decay")] = 0.02,
    average: Annotated[float, typer.Option(help="decay per update of the weight average")] = 0.998,
    frame: Annotated[
        str, typer.Option(help="HEIGHTxWIDTH photos are brought to, or none: run at their own size")
    ] = "none",
    card: Annotated[Path | None, typer.Option(help="JSON with more entries for the card: licence, colours, …")] = None,
    workers: Annotated[int, typer.Option(help="processes that read and augment")] = 1,
    seed: int = 0,
) -> None:
    """Train, measure on val while training, and write OUT/config.json, model.safetensors and card.json."""
    left_out = tuple(leave_out or ())
    raters = tuple(str(folder.resolve()) for folder in (labels, *rater)) if rater else ()
    recipe = Recipe(
        architecture, encoder, tuple(int(n) for n in decoder_channels.split(",")), tuple(classes.split(",")),
        ignore_index, dropout, epochs, batch, _pair(crop, "x", int), _pair(scale_range, ",", float), rotate, rate,
        encoder_rate, decay, average, seed, str(init or ""), pretrained, left_out, raters,
    )  # fmt: skip
    if rotate and recipe.crop[0] != recipe.crop[1]:
        raise ValueError(f"rotate: expected a square crop. Received: {crop}")
    if (val_images is None) != (val_labels is None):
        raise ValueError("val: expected --val-images and --val-labels together. Received: one of them")
    of_rater = [dict(find_pairs(images, folder)) for folder in (labels, *(rater or ()))]
    sequences = {image.stem.split("_")[0] for image in of_rater[0]}
    if not set(left_out) < sequences:
        raise ValueError(
            f"leave-out: expected some of the sequences {', '.join(sorted(sequences))}, not all. Received: {', '.join(left_out)}"
        )
    pairs = [
        (image, [each[image] for each in of_rater]) for image in of_rater[0] if image.stem.split("_")[0] not in left_out
    ]
    val_pairs = find_pairs(val_images, val_labels) if val_images and val_labels else []
    more = json.loads(card.read_text()) if card else {}
    C = len(recipe.classes)

    torch.manual_seed(seed)
    config = {
        "_model_class": architecture, "encoder_name": encoder, "encoder_depth": len(recipe.decoder_channels), "encoder_weights": None,
        "decoder_channels": list(recipe.decoder_channels), "in_channels": 3, "classes": C,
    }  # fmt: skip
    net = build_net(config)
    if init is not None:
        net.load_state_dict(load_net(init).state_dict())
    if pretrained:
        load_imagenet(net.encoder, encoder)
    put_dropout(net, "segmentation_head", dropout)
    net = net.to(pick_device("auto")).to(memory_format=torch.channels_last)
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    console.print(
        f"{architecture} {encoder}, {millions:.2f} M parameters, {C} classes; {len(pairs)} images to train on"
    )

    def check(averaged: torch.nn.Module) -> dict[str, float]:
        if not val_pairs:
            return {}
        model = Model("training", averaged, recipe.classes, np.zeros((C, 3), np.uint8))
        with half_precision(model.device):
            values = total(measure(model, val_pairs, ignore_index).values(), C).compute()
        return {name: float(values[name]) for name in ("miou", "accuracy", "nll")}

    out.mkdir(parents=True, exist_ok=True)
    averaged = fit(net, pairs, recipe, out / "checkpoint.pt", check, workers)
    known = {
        "name": out.name, "classes": list(recipe.classes), "colours": default_colours(C), "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD, "frame": None if frame == "none" else _pair(frame, "x", int),
        "dropout": [{"before": "segmentation_head", "p": dropout}],
        "recipe": asdict(recipe) | {"init": init.name if init else None, "raters": [Path(each).name for each in raters]},
    }  # fmt: skip
    save_model(out, averaged, config, known | more)
    console.print(f"wrote {out}; try: seguncert export IMAGES OUT --model {out}")


def in_one_line(error: ValueError) -> str:
    """What was wrong, also where it was said by a process that reads: there it is the last line of a traceback."""
    return re.sub(r"^[\w.]+Error: ", "", str(error).strip().splitlines()[-1])


def _pair(text: str, separator: str, kind: type) -> tuple:
    try:
        first, second = text.split(separator)
        return kind(first), kind(second)
    except ValueError:
        raise ValueError(f"expected two numbers with {separator!r} between. Received: {text!r}") from None


if __name__ == "__main__":
    try:
        typer.run(train)
    except ValueError as error:  # the user's to mend: one line
        print(in_one_line(error), file=sys.stderr)
        sys.exit(2)
