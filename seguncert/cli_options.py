"""Options that several commands share, and what their words mean."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Backend(str, Enum):
    auto = "auto"
    torch = "torch"
    openvino = "openvino"


class Precision(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


CalibrationOption = Annotated[
    str,
    typer.Option(
        help="auto: the one that comes with the model for this method, if any; none; or a file of `calibrate`"
    ),
]
ConformalOption = Annotated[
    str,
    typer.Option(
        help="of the map set_size; auto: the sets that come with the model for this method; none; or a file of `conformal`"
    ),
]
ScaleOption = Annotated[str, typer.Option(help="auto (the size the model was trained at), native, or a factor")]
DeviceOption = Annotated[Device, typer.Option(help="where the net runs")]

# of the commands that read labels
LabelsArgument = Annotated[
    Path, typer.Argument(metavar="LABELS", help="folder of PNG of class indices, named as the images")
]
FileArgument = Annotated[Path, typer.Argument(metavar="OUT.json", help="file to write")]
IgnoreOption = Annotated[
    str | None,
    typer.Option(metavar="N|none", help="label of pixels that do not count; none: every pixel is labelled. Required"),
]
ModelsOption = Annotated[
    list[str] | None, typer.Option(help="as of export; several times with the method ensemble [default: street]")
]
SamplesOption = Annotated[int, typer.Option(min=2, help="of mc-dropout and stochastic-head")]
ViewsOption = Annotated[str | None, typer.Option(help="of tta, as of export")]
DropPathOption = Annotated[bool, typer.Option("--drop-path", help="as of export")]
InsertOption = Annotated[list[str] | None, typer.Option(metavar="PLACE:P", help="as of export")]
TileOption = Annotated[str, typer.Option(help="as of export")]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="images under way at once, a core each [default: all cores, at most 16]")
]
MaxPixelsOption = Annotated[int, typer.Option(min=1, help="larger images are named as failed")]

# of the commands that read an exported folder
ExportedArgument = Annotated[Path, typer.Argument(metavar="EXPORTED", help="folder that `seguncert export` wrote")]
BackgroundOption = Annotated[
    str | None,
    typer.Option(help="class that is no foreground, for scores of the foreground [default: the first of two]"),
]


def ignored_label(text: str | None) -> int | None:
    """The ignore index; that there is none must be said."""
    if text is None or not (text == "none" or text.isdecimal()):
        raise ValueError(
            f"ignore-index: expected the label of pixels that do not count, or none if every pixel is labelled."
            f" Received: {'nothing' if text is None else repr(text)}. Give --ignore-index N, or --ignore-index none."
        )
    return None if text == "none" else int(text)


def listed(names: str | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(name.strip() for name in names.split(","))


def number(option: str, text: str) -> int | Literal["auto"]:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise ValueError(f"{option}: expected a number, or auto. Received: {text!r}") from None


def places_of(texts: list[str]) -> dict[str, float]:
    places = dict(map(_place, texts))
    if len(places) < len(texts):
        raise ValueError(f"insert-dropout: expected each place once. Received: {', '.join(texts)}")
    return places


def _place(text: str) -> tuple[str, float]:
    place, _, p = text.rpartition(":")
    try:
        if not place:
            raise ValueError
        return place, float(p)
    except ValueError:
        raise ValueError(f"insert-dropout: expected PLACE:P, as segmentation_head:0.2. Received: {text!r}") from None


def quotas_of(texts: list[str]) -> dict[str, float]:
    quotas = dict[str, float]()
    for text in texts:
        name, _, share = text.rpartition("=")
        try:
            quotas[name] = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
        except ValueError:
            name = ""
        if not name or texts.count(text) > 1 or len(quotas) < texts.index(text) + 1:
            raise ValueError(f"quota: expected CLASS=SHARE, as Bicyclist=0.05, each class once. Received: {text!r}")
    return quotas
