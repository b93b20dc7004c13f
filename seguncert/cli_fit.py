"""The commands that fit something on labelled images: `calibrate` and `conformal`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from seguncert.cli_options import (
    CalibrationOption,
    Device,
    DeviceOption,
    DropPathOption,
    FileArgument,
    IgnoreOption,
    InsertOption,
    LabelsArgument,
    MaxPixelsOption,
    ModelsOption,
    SamplesOption,
    ScaleOption,
    TileOption,
    ViewsOption,
    WorkersOption,
    ignored_label,
    listed,
    number,
    places_of,
)
from seguncert.cli_terminal import FAILED, STOPPED, err, one_line_errors, progress_bar, say, tidy_stop

T = TypeVar("T")


class Kind(str, Enum):
    lac = "lac"
    aps = "aps"
    lac_empty = "lac-empty"


def calibrate(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="folder of images that the model was not trained on")
    ],
    labels: LabelsArgument,
    out: FileArgument,
    ignore_index: IgnoreOption = None,
    calibrator: Annotated[
        str,
        typer.Option(
            help="auto: what predicts held-out images best; temperature, vector, class-conditional, local, neighbourhood,"
            " histogram, isotonic"
        ),
    ] = "auto",
    rater: Annotated[
        list[Path] | None,
        typer.Option(help="labels of the same images by one more rater; what is fitted is the distribution of all"),
    ] = None,
    left_out: Annotated[
        list[Path] | None,
        typer.Option(help="net trained with --leave-out SEQUENCE: stands in for the model on images of that sequence"),
    ] = None,
    all_pixels: Annotated[bool, typer.Option("--all-pixels", help="fit on all of them, not on one of twenty")] = False,
    model: ModelsOption = None,
    method: Annotated[str, typer.Option(help="as of export; each has a calibration of its own")] = "none",
    samples: SamplesOption = 20,
    seed: Annotated[int, typer.Option(min=0, help="of the samples, and of the pixels that are drawn")] = 0,
    views: ViewsOption = None,
    drop_path: DropPathOption = False,
    insert_dropout: InsertOption = None,
    scale: ScaleOption = "auto",
    tile: TileOption = "auto",
    workers: WorkersOption = None,
    device: DeviceOption = Device.auto,
    max_pixels: MaxPixelsOption = 100_000_000,
) -> None:
    """Fit a calibration on labelled images.

    Then `export` and `evaluate` take it by --calibration OUT.json, and by themselves if it lies in the model's folder as
    calibration-METHOD.json. Exit status 1: some images failed.
    """
    with one_line_errors():
        ignored, names = ignored_label(ignore_index), model or ["street"]
        err.print(f"loading {', '.join(names)} …")
        from seguncert.calibrating import calibrate as learn
        from seguncert.calibrating import table_of

        result = fit(
            names,
            partial(
                learn,
                images,
                labels,
                out,
                names if len(names) > 1 else names[0],
                ignore_index=ignored,
                calibrator=calibrator,
                raters=rater or [],
                left_out=left_out or [],
                all_pixels=all_pixels,
                method=method,
                samples=samples,
                seed=seed,
                views=listed(views),
                drop_path=drop_path,
                insert_dropout=places_of(insert_dropout or []),
                scale=scale,
                tile=number("tile", tile),
                workers=workers,
                device=device.value,
                max_pixels=max_pixels,
            ),
        )
        say(*table_of(result), result.failed)
        err.print(result.about)
        err.print(f"calibration: {out}")
    raise typer.Exit(FAILED if result.failed else 0)


def conformal(
    images: Annotated[
        Path,
        typer.Argument(metavar="IMAGES", help="folder of images from which neither model nor calibration has learnt"),
    ],
    labels: LabelsArgument,
    out: FileArgument,
    ignore_index: IgnoreOption = None,
    alpha: Annotated[
        float,
        typer.Option(
            help="share of an image's labelled pixels that may miss their class on average; with covered, share of images"
        ),
    ] = 0.1,
    kind: Annotated[
        Kind,
        typer.Option(
            help="lac: the shown class, and all that are probable enough; lac-empty: without the former, so that sets may be empty;"
            " aps: by the probability of all before a class"
        ),
    ] = Kind.lac,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="a threshold for each class, and the promise for the pixels of each")
    ] = False,
    covered: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="promise that an image has at least this share of its pixels covered, with a chance of 1 - alpha",
        ),
    ] = None,
    model: ModelsOption = None,
    method: Annotated[str, typer.Option(help="as of export; each has sets of its own")] = "none",
    samples: SamplesOption = 20,
    seed: Annotated[int, typer.Option(min=0, help="of the samples")] = 0,
    views: ViewsOption = None,
    drop_path: DropPathOption = False,
    insert_dropout: InsertOption = None,
    calibration: CalibrationOption = "auto",
    scale: ScaleOption = "auto",
    tile: TileOption = "auto",
    workers: WorkersOption = None,
    device: DeviceOption = Device.auto,
    max_pixels: MaxPixelsOption = 100_000_000,
) -> None:
    """Fit sets of classes with a promise.

    Then `export --maps set_size` takes them by --conformal OUT.json, and by itself if they lie in the model's folder as
    conformal-METHOD.json. Exit status 1: some images failed.
    """
    with one_line_errors():
        ignored, names = ignored_label(ignore_index), model or ["street"]
        err.print(f"loading {', '.join(names)} …")
        from seguncert.conforming import conform, table_of

        result = fit(
            names,
            partial(
                conform,
                images,
                labels,
                out,
                names if len(names) > 1 else names[0],
                ignore_index=ignored,
                alpha=alpha,
                kind=kind.value,
                by_class=by_class,
                covered=covered,
                method=method,
                samples=samples,
                seed=seed,
                views=listed(views),
                drop_path=drop_path,
                insert_dropout=places_of(insert_dropout or []),
                calibration=calibration,
                scale=scale,
                tile=number("tile", tile),
                workers=workers,
                device=device.value,
                max_pixels=max_pixels,
            ),
        )
        say(*table_of(result), result.failed)
        err.print(result.about)
        err.print(f"sets: {out}")
    raise typer.Exit(FAILED if result.failed else 0)


def fit(names: list[str], job: Callable[..., T]) -> T:
    """What the job gives, with progress; a fit is whole or not at all."""
    with progress_bar(f"{', '.join(names)}: ") as progress, tidy_stop():
        try:
            return job(progress=progress)
        except KeyboardInterrupt:
            err.print("stopped; nothing was written, since a fit on some images would be taken for one on all")
            raise typer.Exit(STOPPED) from None
