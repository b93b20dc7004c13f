"""Nets and what must be known to run them: classes, colours, normalisation, scale, dropout.

A *model folder* holds `config.json` and `model.safetensors`, as segmentation-models-pytorch's `save_pretrained` writes
them, and `card.json`, which says what those two cannot. Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import segmentation_models_pytorch as smp
import torch
from jaxtyping import UInt8
from safetensors.torch import load_file, save
from torch import Tensor, nn

from seguncert.card import ModelError, check_card, read_json
from seguncert.stochastic import put_stochastic_head, stochastic_heads

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Model:
    """A net in eval mode on its device, and how to feed it.

    `module` takes (1, 3, h, w) float32, RGB/255 normalised by `mean` and `std`, sides divisible by `divisor`, and gives
    logits: (1, C, h', w'), or (1, 1, h', w') for a sigmoid head with C = 2.
    `folder` is where it was loaded from.
    `frame` is the (height, width) in pixels of the whole pictures it was trained on; None where the size of a pixel
    matters and not the frame (microscopy): such a model sees every picture at its own size.
    """

    name: str
    module: nn.Module = field(repr=False)
    classes: tuple[str, ...]
    colours: UInt8[np.ndarray, "C 3"] = field(repr=False)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    frame: tuple[int, int] | None = None
    divisor: int = 32
    head: Literal["softmax", "sigmoid"] = "softmax"
    sha256: str = ""
    card: dict[str, Any] = field(default_factory=dict, repr=False)
    folder: Path | None = field(default=None, repr=False)

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


def load_model(
    name: str | os.PathLike[str], device: str = "auto", insert_dropout: Mapping[str, float] | None = None
) -> Model:
    """Load a bundled model by name or a model folder by path.

    `insert_dropout` puts channel dropout in front of named submodules, {"decoder.blocks.3": 0.2}, for MC dropout on a
    net that has none or too little. It was not trained with it, which the spread of its samples should be read with.
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
    card = check_card(read_json(folder / "card.json"), f"{folder}/card.json")
    try:
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"{folder}/model.safetensors: {error.strerror}. A model folder needs it.") from None
    if card.get("sha256") != digest:
        raise ModelError(
            f"{folder}: model.safetensors is not the file that card.json describes."
            f" Expected sha256 {card.get('sha256')}. Received: {digest}. Copy the folder again, or correct the card."
        )
    net = load_net(folder, card["stochastic_head"])
    inserted = [{"before": place, "p": p, "inserted": "after training"} for place, p in (insert_dropout or {}).items()]
    card = card | {"dropout": card["dropout"] + inserted}
    for dropout in card["dropout"]:
        put_dropout(net, dropout["before"], dropout["p"])
    model = _model(net.to(pick_device(device)).to(memory_format=torch.channels_last), card, digest)
    return replace(model, folder=folder)


def load_net(folder: str | os.PathLike[str], stochastic_head: Mapping[str, int] | None = None) -> nn.Module:
    """The bare net of a folder with config.json and model.safetensors, in eval mode, float32, on the CPU.

    `stochastic_head` is as a card has it.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("activation"):
        raise ModelError(f"{folder}/config.json: expected activation null, since maps are made from logits."
                         f" Received: {config['activation']!r}. Set it to null; the weights stay as they are.")  # fmt: skip
    try:
        net = build_net(config)
        if stochastic_head:
            put_stochastic_head(net, int(stochastic_head["rank"]))
        net.load_state_dict(load_file(folder / "model.safetensors"))
    except ModelError:
        raise
    except Exception as error:  # whatever the architecture makes of a config that does not fit, or of its weights
        text = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{folder}: config.json and model.safetensors do not make a net: {type(error).__name__}: {text}"
        ) from None
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
    """Write a model folder; weights in half precision, the card completed by their sha256 and a stochastic head's rank."""
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
    ranks = [{"rank": head.rank} for head in stochastic_heads(net).values()]
    more = {"sha256": digest} | ({"stochastic_head": ranks[0]} if ranks else {})
    (folder / "card.json").write_text(json.dumps(card | more, indent=2) + "\n")


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
    entries = {
        "name": name, "classes": list(classes), "mean": list(mean), "std": list(std), "frame": frame and list(frame),
        "divisor": divisor, "head": head, "colours": None if colours is None else np.asarray(colours).tolist(),
    }  # fmt: skip
    return _model(module, check_card(entries, name), fingerprint(module))


def net_logits(model: Model, input_13HW: Tensor) -> Tensor:
    """Logits (C, h, w) float32 of one padded picture, at the size of the input."""
    logits_Cab = raw_logits(model, input_13HW)
    if logits_Cab.shape[-2:] == input_13HW.shape[-2:]:
        return logits_Cab
    return nn.functional.interpolate(
        logits_Cab[None], size=input_13HW.shape[-2:], mode="bilinear", align_corners=False
    )[0]


def raw_logits(model: Model, input_13HW: Tensor) -> Tensor:
    """Logits (C, a, b) float32 of one padded picture as the net gives them, which may be coarser than the input."""
    output = model.module(input_13HW)
    if isinstance(output, dict) and "out" in output:
        output = output["out"]
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.ndim != 4:
        raise ModelError(f"{model.name}: expected logits of shape (1, C, h, w). Received: {_shape(output)}")
    logits_Cab = output[0].float()
    if model.head == "sigmoid":
        logits_Cab = torch.cat([torch.zeros_like(logits_Cab[:1]), logits_Cab])
    return logits_Cab


FORWARDS = threading.Lock()  # held while methods of a net's modules are replaced, or the net is copied


class evaluating:
    """Context in which a module is in eval mode; every flag is as before afterwards. Nests, and threads share it: the first
    one in notes the flags, the last one out sets them again."""

    _inside: ClassVar[dict[int, tuple[int, list[nn.Module]]]] = {}
    _lock = threading.Lock()

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        with self._lock:
            count, training = self._inside.get(id(self.module), (0, []))
            if not count:
                training = [part for part in self.module.modules() if part.training]
                for part in training:
                    part.training = False
            self._inside[id(self.module)] = count + 1, training

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            count, training = self._inside.pop(id(self.module))
            if count > 1:
                self._inside[id(self.module)] = count - 1, training
                return
            for part in training:
                part.training = True


class _ApplyFirst:
    """Forward pre-hook that sends the first input through `module`; a class, so that a net can be copied with it."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.module(inputs[0]), *inputs[1:])


def put_dropout(net: nn.Module, before: str, p: float) -> None:
    """Put channel dropout in front of the submodule named `before`; the net's state dict stays as it is."""
    names = dict(net.named_modules())
    if not before or before not in names or not 0 < p < 1:
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


def fingerprint(module: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the state dict: the identity of a net that has no file."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _model(module: nn.Module, card: dict[str, Any], sha256: str) -> Model:
    """The model of a checked card, after one pass over noise has shown that the net gives what the card promises."""
    frame, (red, green, blue), (red_std, green_std, blue_std) = card["frame"], card["mean"], card["std"]
    model = Model(
        name=card["name"],
        module=module,
        classes=tuple(card["classes"]),
        colours=np.array(card["colours"], np.uint8),
        mean=(float(red), float(green), float(blue)),
        std=(float(red_std), float(green_std), float(blue_std)),
        frame=(int(frame[0]), int(frame[1])) if frame else None,
        divisor=int(card["divisor"]),
        head=card["head"],
        sha256=sha256,
        card=card,
    )
    side = model.divisor * math.ceil(64 / model.divisor)
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.inference_mode(), evaluating(module):
        logits_CHW = net_logits(model, noise)
    C, channels = len(model.classes), logits_CHW.shape[0] - (model.head == "sigmoid")
    expected = 1 if model.head == "sigmoid" else C
    if channels == 1 and C == 2 and model.head == "softmax":
        raise ModelError(
            f'{model.name}: the net gives 1 channel for 2 classes. If that is a sigmoid head, say head="sigmoid".'
        )
    if channels != expected or (model.head == "sigmoid" and C != 2):
        raise ModelError(
            f"{model.name}: expected one channel for each of {C} classes, or head sigmoid with one channel for two."
            f" Received: head {model.head}, {channels} channels. Correct classes or head."
        )
    given_CHW = logits_CHW[-channels:]  # without the zeros that stand for the background of a sigmoid head
    if not torch.isfinite(given_CHW).all():
        raise ModelError(f"{model.name}: the net gives values that are not finite for an input of noise")
    sums_to_one = C > 1 and bool((given_CHW.sum(0) - 1).abs().max() < 1e-3)
    if 0 <= given_CHW.min() < given_CHW.max() <= 1 and (sums_to_one or given_CHW.max() > 0.4):
        raise ModelError(
            f"{model.name}: the net gives values from 0 to 1, which are probabilities. Expected logits: take the softmax"
            " or sigmoid out of it."
        )
    return model


def _shape(output: object) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
