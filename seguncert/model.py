"""Nets and what must be known to run them: classes, colours, normalisation, scale, dropout.

A *model folder* holds `config.json` and `model.safetensors`, as segmentation-models-pytorch's `save_pretrained` writes
them, and `card.json`, which says what those two cannot. Nothing in it can run code.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import segmentation_models_pytorch as smp
import torch
from jaxtyping import UInt8
from safetensors.torch import load_file, save
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ModelError(ValueError):
    """A model that cannot be loaded or run as asked; one line: what, expected, received, what to do."""


@dataclass(frozen=True, eq=False)
class Model:
    """A net in eval mode on its device, and how to feed it.

    `module` takes (1, 3, h, w) float32, RGB/255 normalised by `mean` and `std`, sides divisible by `divisor`, and gives
    logits: (1, C, h', w'), or (1, 1, h', w') for a sigmoid head with C = 2.
    `frame` is the (height, width) in pixels of the whole pictures it was trained on; None where the size of a pixel
    matters and not the frame (microscopy): such a model sees every picture at its own size.
    """

    name: str
    module: nn.Module
    classes: tuple[str, ...]
    colours: UInt8[np.ndarray, "C 3"]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    frame: tuple[int, int] | None = None
    divisor: int = 32
    head: Literal["softmax", "sigmoid"] = "softmax"
    sha256: str = ""
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the net's parameters are."""
        return next(self.module.parameters(), torch.empty(0)).device


def bundled_names() -> list[str]:
    """Names of the models that come with the package."""
    root = resources.files("seguncert.weights")
    return sorted(entry.name for entry in root.iterdir() if entry.joinpath("card.json").is_file())


def bundled_folder(name: str) -> Path:
    """Folder of the bundled model `name`."""
    return Path(str(resources.files("seguncert.weights"))) / name


def load_model(name: str | os.PathLike[str], device: str = "auto") -> Model:
    """Load a bundled model by name or a model folder by path.

    A name that is neither is an error: it is never taken for a name on a model hub. `device` is auto, cpu or cuda.
    The sha256 of the weights must be the one in the card.
    """
    folder = Path(name)
    if str(name) in bundled_names():
        folder = bundled_folder(str(name))
    elif not folder.is_dir():
        raise ModelError(
            f"no model {str(name)!r}: expected a bundled model ({', '.join(bundled_names())}) or a folder with config.json,"
            " model.safetensors and card.json. Nothing is fetched from a hub; download the folder first."
        )
    card = _read_json(folder / "card.json")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if card.get("sha256") != digest:
        raise ModelError(
            f"{folder}: model.safetensors is not the file that card.json describes."
            f" Expected sha256 {card.get('sha256')}. Received: {digest}. Copy the folder again, or correct the card."
        )
    net = load_net(folder)
    for dropout in card.get("dropout", []):
        insert_dropout(net, dropout["before"], dropout["p"])
    frame, head = card.get("frame"), card.get("head", "softmax")
    if head not in ("softmax", "sigmoid"):
        raise ModelError(f"{folder}/card.json: head: expected softmax or sigmoid. Received: {head!r}")
    try:
        return _checked(
            Model(
                name=card["name"],
                module=net.to(pick_device(device)).to(memory_format=torch.channels_last),
                classes=tuple(card["classes"]),
                colours=np.array(card.get("colours") or default_colours(len(card["classes"])), np.uint8),
                mean=_three(card["mean"]),
                std=_three(card["std"]),
                frame=(int(frame[0]), int(frame[1])) if frame else None,
                divisor=int(card.get("divisor", 32)),
                head=head,
                sha256=digest,
                card=card,
            )
        )
    except KeyError as error:
        raise ModelError(
            f"{folder}/card.json: {error} is missing; a card needs name, classes, mean, std, sha256"
        ) from None


def load_net(folder: str | os.PathLike[str]) -> nn.Module:
    """The bare net of a folder with config.json and model.safetensors, in eval mode, float32, on the CPU."""
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    if config.get("activation"):
        raise ModelError(f"{folder}/config.json: expected activation null, since maps are made from logits."
                         f" Received: {config['activation']!r}. Set it to null; the weights stay as they are.")  # fmt: skip
    net = build_net(config)
    net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.float().eval()


def build_net(config: dict[str, Any]) -> nn.Module:
    """A segmentation-models-pytorch net with fresh weights from what its config.json says."""
    architectures = {cls.__name__: cls for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    name = config.get("_model_class")
    if name not in architectures:
        raise ModelError(f"config.json: expected _model_class one of {', '.join(architectures)}. Received: {name!r}")
    return architectures[name](
        **{key: value for key, value in config.items() if key != "_model_class"} | {"encoder_weights": None}
    )


def save_model(folder: str | os.PathLike[str], net: nn.Module, config: dict[str, Any], card: dict[str, Any]) -> None:
    """Write a model folder; weights in half precision, the card completed by their sha256."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        key: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for key, value in net.state_dict().items()
    }
    content = save(weights)
    (folder / "model.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    (folder / "config.json").write_text(json.dumps(config | {"encoder_weights": None}, indent=2) + "\n")
    (folder / "card.json").write_text(json.dumps(card | {"sha256": digest}, indent=2) + "\n")


def wrap_model(
    module: nn.Module,
    classes: Sequence[str],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    colours: UInt8[np.ndarray, "C 3"] | None = None,
    frame: tuple[int, int] | None = None,
    divisor: int = 32,
    head: Literal["softmax", "sigmoid"] = "softmax",
    name: str = "wrapped",
) -> Model:
    """Any module that gives logits for (1, 3, h, w) pictures, with what is needed to run it on photos.

    Args:
        module: gives a tensor, or an object with it under "out" (torchvision) or `.logits` (transformers). Its state is
            not changed; it is put into eval mode only while it runs. Logits may be coarser than the input.
        classes: one name a channel; two names (background first) for a one-channel sigmoid head.
        mean, std: of the RGB/255 values it was trained with.
        frame: (height, width) of the pictures it was trained on, where the frame matters; see `Model`.
        divisor: sides are padded to a multiple of it.
        head: "sigmoid" turns one channel z into the two logits (0, z), whose softmax is (1 − σ(z), σ(z)).

    Raises:
        ModelError: the channels do not fit the classes, or what comes out is not finite, or is already a probability.
    """
    if colours is None:
        colours = np.array(default_colours(len(classes)), np.uint8)
    return _checked(
        Model(
            name, module, tuple(classes), colours, _three(mean), _three(std), frame, divisor, head, fingerprint(module)
        )
    )


def net_logits(model: Model, input_13HW: Tensor) -> Tensor:
    """Logits (C, h, w) float32 of one padded picture, at the size of the input."""
    output = model.module(input_13HW)
    if isinstance(output, dict) and "out" in output:
        output = output["out"]
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.ndim != 4:
        raise ModelError(f"{model.name}: expected logits of shape (1, C, h, w). Received: {_shape(output)}")
    if output.shape[-2:] != input_13HW.shape[-2:]:
        output = nn.functional.interpolate(
            output.float(), size=input_13HW.shape[-2:], mode="bilinear", align_corners=False
        )
    logits_CHW = output[0].float()
    if model.head == "sigmoid":
        logits_CHW = torch.cat([torch.zeros_like(logits_CHW[:1]), logits_CHW])
    return logits_CHW


class evaluating:
    """Context in which a module is in eval mode; every flag is as before afterwards."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.training = [part for part in self.module.modules() if part.training]
        for part in self.training:
            part.training = False

    def __exit__(self, *exception: object) -> None:
        for part in self.training:
            part.training = True


class _ApplyFirst:
    """Forward pre-hook that sends the first input through `module`; a class, so that a net can be copied with it."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.module(inputs[0]), *inputs[1:])


def insert_dropout(net: nn.Module, before: str, p: float) -> None:
    """Put channel dropout in front of the submodule named `before`; the net's state dict stays as it is."""
    names = dict(net.named_modules())
    if before not in names or not 0 < p < 1:
        raise ModelError(f"dropout: expected a submodule's name and 0 < p < 1. Received: {before!r}, p = {p}."
                         f" Top-level names: {', '.join(name for name, _ in net.named_children())}")  # fmt: skip
    dropout = nn.Dropout2d(p)
    dropout.training = net.training
    net.add_module(f"dropout_before_{before.replace('.', '_')}", dropout)
    names[before].register_forward_pre_hook(_ApplyFirst(dropout))


def pick_device(device: str) -> torch.device:
    """auto is cuda where there is one; asking for a cuda that is not there is an error."""
    if device not in ("auto", "cpu", "cuda"):
        raise ModelError(f"device: expected auto, cpu or cuda. Received: {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "device: cuda was asked for and torch finds none. Use auto or cpu, or install a CUDA build of torch."
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def default_colours(C: int) -> list[list[int]]:
    """C colours, evenly spaced in hue with two brightnesses; background (first) is dark grey where C is 2."""
    if C == 2:
        return [[40, 40, 40], [255, 196, 0]]
    hues = [(k / C, 0.65, 0.95 if k % 2 else 0.7) for k in range(C)]
    return [[round(255 * value) for value in colorsys.hsv_to_rgb(*hue)] for hue in hues]


def fingerprint(module: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the state dict: the identity of a net that has no file."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checked(model: Model) -> Model:
    """The model, after one pass over noise has shown that its output is what the card promises."""
    C, colours = len(model.classes), model.colours
    if C < 2 or C > 256 or colours.shape != (C, 3):
        raise ModelError(
            f"{model.name}: expected 2 to 256 classes and a colour for each. Received: {C} classes, {len(colours)} colours"
        )
    side = model.divisor * max(1, -(-64 // model.divisor))
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.inference_mode(), evaluating(model.module):
        logits_CHW = net_logits(model, noise)
    channels = logits_CHW.shape[0]
    if channels == 1 and C == 2:
        raise ModelError(
            f'{model.name}: the net gives 1 channel for 2 classes. If that is a sigmoid head, say head="sigmoid".'
        )
    if channels != C:
        raise ModelError(f"{model.name}: expected one channel for each of {C} classes. Received: {channels} channels")
    if not torch.isfinite(logits_CHW).all():
        raise ModelError(f"{model.name}: the net gives values that are not finite for an input of noise")
    if logits_CHW.min() >= 0 and torch.allclose(logits_CHW.sum(0), torch.ones((), device=model.device), atol=1e-3):
        raise ModelError(
            f"{model.name}: the net gives probabilities (they sum to 1). Expected logits: take the softmax out of it."
        )
    if model.head == "sigmoid" and logits_CHW[1].min() >= 0 and logits_CHW[1].max() <= 1:
        raise ModelError(
            f"{model.name}: the net gives probabilities (all in [0, 1]). Expected logits: take the sigmoid out of it."
        )
    return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent}: no {path.name}. A model folder needs config.json and model.safetensors (save_pretrained writes"
            " them) and card.json: name, classes, mean, std, sha256 of model.safetensors; optional: colours, frame, dropout."
        ) from None
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ModelError(f"mean, std: expected three numbers, for R, G, B. Received: {list(values)}")
    return float(values[0]), float(values[1]), float(values[2])


def _shape(output: object) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
