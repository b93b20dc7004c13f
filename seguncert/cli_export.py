"""The command `export`, and what `demo` shares with it."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seguncert.cli_options import (
    Backend,
    CalibrationOption,
    ConformalOption,
    Device,
    DeviceOption,
    Precision,
    ScaleOption,
    WorkersOption,
    listed,
    number,
    places_of,
)
from seguncert.cli_terminal import FAILED, STOPPED, err, one_line_errors, progress_bar, tidy_stop

if TYPE_CHECKING:
    from seguncert.batch import Exported


class Format(str, Enum):
    png16 = "png16"
    npy = "npy"
    tiff = "tiff"


def export(
    source: Annotated[Path, typer.Argument(metavar="IN", help="folder of images, with subfolders")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; an unfinished one is gone on with")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="bundled model (see `seguncert models`) or a model folder; several times with the method ensemble [default: street]"
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="none is one pass; mc-dropout many with dropout on, sampling-free its limit by formulas, stochastic-head many"
            " of a head with a distribution over logits, tta mirrored and at other scales, ensemble several models; + combines: mc-dropout+tta"
        ),
    ] = "none",
    samples: Annotated[
        str,
        typer.Option(
            help="of mc-dropout and stochastic-head, for each view and net; auto: until the first map is known to max-error, 1000 at most"
        ),
    ] = "20",
    seed: Annotated[int, typer.Option(min=0, help="of the samples")] = 0,
    views: Annotated[
        str | None,
        typer.Option(
            help="of tta: flip, flip-vertical, factors of the scale; comma between, all are combined"
            " [default: flip,0.8,1.25 for models of whole frames, else both flips]"
        ),
    ] = None,
    max_error: Annotated[
        float,
        typer.Option(help="of samples auto: standard error that 99 % of the pixels may have, as a share of full scale"),
    ] = 0.01,
    carry: Annotated[
        float | None,
        typer.Option(
            help="frames of a video (names that differ in their last number): how much the frame before counts, between 0 and"
            " 1; a video is done by one worker"
        ),
    ] = None,
    drop_path: Annotated[
        bool, typer.Option("--drop-path", help="mc-dropout takes stochastic depth (timm's DropPath) for dropout too")
    ] = False,
    insert_dropout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLACE:P",
            help="channel dropout before a submodule of a net that has none, e.g. segmentation_head:0.2",
        ),
    ] = None,
    maps: Annotated[
        str | None,
        typer.Option(
            help="any of confidence, entropy, margin, and but for the method none mutual_information, variance, expected_entropy,"
            " and set_size with the sets of `conformal`;"
            " comma between; the first is drawn [default: confidence,entropy and margin, or mutual_information,variance]"
        ),
    ] = None,
    calibration: CalibrationOption = "auto",
    conformal: ConformalOption = "auto",
    scale: ScaleOption = "auto",
    tile: Annotated[
        str, typer.Option(help="pixels a side that a net is given at once; auto: 2048, or 896 of larger pictures")
    ] = "auto",
    format: Annotated[Format, typer.Option(help="of the maps")] = Format.png16,
    workers: WorkersOption = None,
    device: DeviceOption = Device.auto,
    backend: Annotated[
        Backend, typer.Option(help="engine of the net; auto: OpenVINO if it is installed and agrees with torch")
    ] = Backend.torch,
    precision: Annotated[
        Precision, typer.Option(help="auto: bf16 on OpenVINO where the maps agree with fp32, fp32 on torch")
    ] = Precision.auto,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings",
            help="pooled deep features of the same pass too, in embeddings.npy and the ledger, to choose images that differ",
        ),
    ] = False,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="larger images are not decoded but named as failed")
    ] = 100_000_000,
) -> None:
    """Run a folder: maps, overlays, table, gallery.

    Writes for every image of IN a label map, the doubt maps and an overlay, and for all of them images.csv, report.html,
    run.json and a ledger. Stopped or failed, the same command goes on. Exit status 1: some images failed.
    """
    with one_line_errors():
        names = model or ["street"]
        err.print(f"loading {', '.join(names)} …")
        from seguncert.batch import export

        job = partial(
            export,
            source,
            out,
            names if len(names) > 1 else names[0],
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
            conformal=conformal,
            scale=scale,
            tile=number("tile", tile),
            format=format.value,
        )
        code = run_batch(
            ", ".join(names),
            out,
            partial(
                job,
                workers=workers,
                device=device.value,
                backend=backend.value,
                precision=precision.value,
                embeddings=embeddings,
                max_pixels=max_pixels,
            ),
        )
    raise typer.Exit(code)


def run_batch(model: str, out: Path, job: Callable[..., Exported]) -> int:
    """Run an export with progress and say what came of it; returns the exit status."""
    with progress_bar(f"{model}: ") as progress, tidy_stop():
        try:
            result = job(progress=progress)
        except KeyboardInterrupt:
            so_far = (
                "what is finished is in images.csv and report.html"
                if (out / "images.csv").exists()
                else "nothing is done yet"
            )
            err.print(f"stopped; {so_far}. The same command goes on from here.")
            raise typer.Exit(STOPPED) from None
    before = f" ({result.before} done before)" if result.before else ""
    others = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in result.passed_over.items())
    passed = f"; passed over, being no images by name: {others}" if others else ""
    err.print(f"{result.done} images done{before}, {result.failed} failed{passed}")
    if result.failed:
        err.print(
            f"the reason of each failure is in {out / 'images.csv'}; after mending, the same command does those again"
        )
    err.print(f"gallery, most uncertain first: {out / 'report.html'}")
    return FAILED if result.failed else 0
