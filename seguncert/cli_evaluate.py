"""The command `evaluate`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from seguncert.cli_options import (
    Backend,
    CalibrationOption,
    Device,
    DeviceOption,
    DropPathOption,
    IgnoreOption,
    InsertOption,
    LabelsArgument,
    MaxPixelsOption,
    ModelsOption,
    Precision,
    ScaleOption,
    TileOption,
    ViewsOption,
    WorkersOption,
    ignored_label,
    listed,
    number,
    places_of,
)
from seguncert.cli_terminal import FAILED, STOPPED, err, one_line_errors, progress_bar, tidy_stop


class Published(str, Enum):
    lts = "lts"


def evaluate(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="folder of images, with subfolders")],
    labels: LabelsArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")],
    ignore_index: IgnoreOption = None,
    rater: Annotated[
        list[Path] | None,
        typer.Option(help="labels of the same images by one more rater; judged is against the distribution of all"),
    ] = None,
    model: ModelsOption = None,
    method: Annotated[str, typer.Option(help="as of export")] = "none",
    samples: Annotated[str, typer.Option(help="of mc-dropout and stochastic-head, as of export")] = "20",
    seed: Annotated[int, typer.Option(min=0, help="of the samples, and of the intervals")] = 0,
    views: ViewsOption = None,
    max_error: Annotated[float, typer.Option(help="of samples auto, as of export")] = 0.01,
    carry: Annotated[float | None, typer.Option(help="frames of a video, as of export; one worker")] = None,
    drop_path: DropPathOption = False,
    insert_dropout: InsertOption = None,
    maps: Annotated[
        str | None, typer.Option(help="judged by how well they find errors, beside confidence; names as of export")
    ] = None,
    calibration: CalibrationOption = "auto",
    scale: ScaleOption = "auto",
    tile: TileOption = "auto",
    boundary: Annotated[int, typer.Option(min=0, help="pixels on either side of a boundary that are judged apart")] = 3,
    replicates: Annotated[int, typer.Option(min=1, help="of the bootstrap that makes the intervals")] = 200,
    protocol: Annotated[
        Published | None,
        typer.Option(help="adds errors as published code makes them; lts: Local Temperature Scaling, for CamVid"),
    ] = None,
    corruptions: Annotated[
        str | None,
        typer.Option(
            metavar="all|NAMES",
            help="judges photos made worse too, in five severities, before and after calibration: gaussian-noise, defocus-blur,"
            " motion-blur, darkness, brightness, fog, contrast, jpeg; comma between. Each of these photos then costs 1 + 5 x"
            " names passes, 41 for all [default: none]",
        ),
    ] = None,
    corrupted: Annotated[int, typer.Option(min=1, help="photos that are made worse at most, evenly spaced")] = 50,
    workers: WorkersOption = None,
    device: DeviceOption = Device.auto,
    backend: Annotated[Backend, typer.Option(help="as of export")] = Backend.torch,
    precision: Annotated[Precision, typer.Option(help="as of export")] = Precision.auto,
    max_pixels: MaxPixelsOption = 100_000_000,
) -> None:
    """Judge a model on labelled images.

    Accuracy, calibration and the finding of errors, with intervals: writes metrics.json, metrics.csv and report.html.
    Exit status 1: some images failed.
    """
    with one_line_errors():
        ignored = ignored_label(ignore_index)
        names = model or ["street"]
        err.print(f"loading {', '.join(names)} …")
        from seguncert.evaluation import evaluate as judge
        from seguncert.findings import shift_summary, summary

        with progress_bar(f"{', '.join(names)}: ") as progress, tidy_stop():
            try:
                result = judge(
                    images,
                    labels,
                    out,
                    names if len(names) > 1 else names[0],
                    ignore_index=ignored,
                    raters=rater or [],
                    boundary=boundary,
                    replicates=replicates,
                    protocol=None if protocol is None else protocol.value,
                    corruptions=listed(corruptions),
                    corrupted=corrupted,
                    method=method,
                    samples=number("samples", samples),
                    seed=seed,
                    views=listed(views),
                    max_error=max_error,
                    carry=carry,
                    drop_path=drop_path,
                    insert_dropout=places_of(insert_dropout or []),
                    maps=listed(maps),
                    calibration=calibration,
                    scale=scale,
                    tile=number("tile", tile),
                    workers=workers,
                    device=device.value,
                    backend=backend.value,
                    precision=precision.value,
                    max_pixels=max_pixels,
                    progress=progress,
                )
            except KeyboardInterrupt:
                err.print("stopped; nothing was written, since figures of some images would be taken for those of all")
                raise typer.Exit(STOPPED) from None
        rows = summary(result.metrics)
        table = Table("", *("calibrated", "before", "change") if len(rows[0][1]) > 1 else ("",), box=None)
        for title, cells in rows:
            table.add_row(title, *(f"{value}  [{ends}]" if ends else value for value, ends in cells))
        console = Console(markup=False, highlight=False, emoji=False)
        console.width = max(console.width, 120)
        console.print(table)
        header, worse = shift_summary(result.metrics)
        if worse:
            table = Table(*header, box=None)
            for row in worse:
                table.add_row(*row)
            console.print()
            console.print(table)
            about = result.metrics["corruptions"]["about"]
            err.print(f"made worse: {about['images']} images judged, {about['chosen']}")
        err.print(
            f"{result.done} images judged, {result.failed} failed; {result.metrics['protocol']['intervals']['number']} clusters"
        )
        if result.failed:
            err.print(f"the reason of each failure is in {out / 'metrics.csv'}")
        err.print(f"report: {out / 'report.html'}")
    raise typer.Exit(FAILED if result.failed else 0)
