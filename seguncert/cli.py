"""The command line, nothing else. Heavy imports wait until a command runs, so that --help answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from seguncert.batch import Exported

app = typer.Typer(
    help="Where can I trust this segmentation mask?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

T = TypeVar("T")
FAILED, WRONG, STOPPED = 1, 2, 130


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


class Published(str, Enum):
    lts = "lts"


class Kind(str, Enum):
    lac = "lac"
    aps = "aps"
    lac_empty = "lac-empty"


class Unit(str, Enum):
    image = "image"
    region = "region"
    segment = "segment"
    pixel = "pixel"


class BudgetIn(str, Enum):
    units = "units"
    clicks = "clicks"


class Format(str, Enum):
    png16 = "png16"
    npy = "npy"
    tiff = "tiff"


ModelOption = Annotated[str, typer.Option(help="bundled model (see `seguncert models`) or a model folder")]
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
# of the commands that fit something on labelled images
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
SamplesOption = Annotated[int, typer.Option(min=2, help="of mc-dropout")]
ViewsOption = Annotated[str | None, typer.Option(help="of tta, as of export")]
DropPathOption = Annotated[bool, typer.Option("--drop-path", help="as of export")]
InsertOption = Annotated[list[str] | None, typer.Option(metavar="PLACE:P", help="as of export")]
TileOption = Annotated[str, typer.Option(help="as of export")]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="images under way at once, a core each [default: all cores, at most 16]")
]
MaxPixelsOption = Annotated[int, typer.Option(min=1, help="larger images are named as failed")]


ExportedArgument = Annotated[Path, typer.Argument(metavar="EXPORTED", help="folder that `seguncert export` wrote")]
BackgroundOption = Annotated[
    str | None,
    typer.Option(help="class that is no foreground, for scores of the foreground [default: the first of two]"),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(version("seguncert"))
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    """Where can I trust this segmentation mask?"""


@app.command()
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
            help="none is one pass; mc-dropout many with dropout on, sampling-free its limit by formulas, tta mirrored and at"
            " other scales, ensemble several models; + combines: mc-dropout+tta"
        ),
    ] = "none",
    samples: Annotated[
        str,
        typer.Option(
            help="of mc-dropout, for each view and net; auto: until the first map is known to max-error, 1000 at most"
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
    workers: Annotated[
        int | None, typer.Option(min=1, help="images under way at once, a core each [default: all cores, at most 16]")
    ] = None,
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
    with _one_line_errors():
        names = model or ["street"]
        err.print(f"loading {', '.join(names)} …")
        from seguncert.batch import export

        job = partial(
            export,
            source,
            out,
            names if len(names) > 1 else names[0],
            method=method,
            samples=_number("samples", samples),
            seed=seed,
            views=_listed(views),
            max_error=max_error,
            carry=carry,
            drop_path=drop_path,
            insert_dropout=_places(insert_dropout or []),
            maps=_listed(maps),
            calibration=calibration,
            conformal=conformal,
            scale=scale,
            tile=_number("tile", tile),
            format=format.value,
        )
        code = _run_batch(
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


@app.command()
def evaluate(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="folder of images, with subfolders")],
    labels: Annotated[
        Path, typer.Argument(metavar="LABELS", help="folder of PNG of class indices, named as the images")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")],
    ignore_index: Annotated[
        str | None,
        typer.Option(
            metavar="N|none", help="label of pixels that do not count; none: every pixel is labelled. Required"
        ),
    ] = None,
    rater: Annotated[
        list[Path] | None,
        typer.Option(help="labels of the same images by one more rater; judged is against the distribution of all"),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="as of export; several times with the method ensemble [default: street]"),
    ] = None,
    method: Annotated[str, typer.Option(help="as of export")] = "none",
    samples: Annotated[str, typer.Option(help="of mc-dropout, as of export")] = "20",
    seed: Annotated[int, typer.Option(min=0, help="of the samples, and of the intervals")] = 0,
    views: Annotated[str | None, typer.Option(help="of tta, as of export")] = None,
    max_error: Annotated[float, typer.Option(help="of samples auto, as of export")] = 0.01,
    carry: Annotated[float | None, typer.Option(help="frames of a video, as of export; one worker")] = None,
    drop_path: Annotated[bool, typer.Option("--drop-path", help="as of export")] = False,
    insert_dropout: Annotated[list[str] | None, typer.Option(metavar="PLACE:P", help="as of export")] = None,
    maps: Annotated[
        str | None, typer.Option(help="judged by how well they find errors, beside confidence; names as of export")
    ] = None,
    calibration: CalibrationOption = "auto",
    scale: ScaleOption = "auto",
    tile: Annotated[str, typer.Option(help="as of export")] = "auto",
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
    workers: Annotated[
        int | None, typer.Option(min=1, help="images under way at once, a core each [default: all cores, at most 16]")
    ] = None,
    device: DeviceOption = Device.auto,
    backend: Annotated[Backend, typer.Option(help="as of export")] = Backend.torch,
    precision: Annotated[Precision, typer.Option(help="as of export")] = Precision.auto,
    max_pixels: Annotated[int, typer.Option(min=1, help="larger images are named as failed")] = 100_000_000,
) -> None:
    """Judge a model on labelled images.

    Accuracy, calibration and the finding of errors, with intervals: writes metrics.json, metrics.csv and report.html.
    Exit status 1: some images failed.
    """
    with _one_line_errors():
        ignored = _ignored(ignore_index)
        names = model or ["street"]
        err.print(f"loading {', '.join(names)} …")
        from seguncert.evaluation import evaluate as judge
        from seguncert.findings import shift_summary, summary

        with _progress(f"{', '.join(names)}: ") as progress, _tidy_stop():
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
                    corruptions=_listed(corruptions),
                    corrupted=corrupted,
                    method=method,
                    samples=_number("samples", samples),
                    seed=seed,
                    views=_listed(views),
                    max_error=max_error,
                    carry=carry,
                    drop_path=drop_path,
                    insert_dropout=_places(insert_dropout or []),
                    maps=_listed(maps),
                    calibration=calibration,
                    scale=scale,
                    tile=_number("tile", tile),
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


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="folder to write")] = Path("seguncert-demo"),
) -> None:
    """Try the bundled models on sample pictures.

    Opens nothing, prints where to look.
    """
    with _one_line_errors():
        err.print("loading the bundled models …")
        from seguncert.apps.samples import write_samples
        from seguncert.batch import export

        samples = write_samples(out / "pictures")
        code = max(_run_batch(name, out / name, partial(export, samples[name], out / name, name)) for name in samples)
    print("\nOpen in a browser:")
    for name in samples:
        print(f"  {(out / name / 'report.html').resolve()}")
    raise typer.Exit(code)


@app.command()
def models() -> None:
    """List the models that can be loaded by name.

    With classes, training data, licence and measured quality.
    """
    table = Table("model", "classes", "trained on", "licence", "measured")
    for entry in sorted(resources.files("seguncert.weights").iterdir(), key=lambda entry: entry.name):
        if entry.joinpath("card.json").is_file():
            card = json.loads(entry.joinpath("card.json").read_text())
            measured = "\n".join(f"{key}: {value}" for key, value in card.get("measured", {}).items())
            table.add_row(
                entry.name, ", ".join(card["classes"]), card.get("trained_on", ""), card.get("licence", ""), measured
            )
    Console(emoji=False).print(table)


@app.command("app")
def page(
    model: Annotated[
        list[str] | None,
        typer.Option(help="to begin with; several can be chosen between, and asked together [default: street]"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="address to listen on; another than this machine needs --auth")
    ] = "127.0.0.1",
    port: int = 7860,
    auth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:PASSWORD",
            help="who may open the page; several times, or lines of the variable SEGUNCERT_AUTH",
        ),
    ] = None,
) -> None:
    """Serve the page: a photo, a folder, how far the model can be believed.

    Upload a photo, see where not to trust the mask. Nothing is sent to anywhere else.
    """
    with _one_line_errors():
        lines = auth or os.environ.get("SEGUNCERT_AUTH", "").splitlines()
        pairs = [(each.partition(":")[0], each.partition(":")[2]) for each in lines]
        if not all(map(all, pairs)):
            raise ValueError("auth: expected NAME:PASSWORD. Received: something else")
        if not pairs and host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(
                f"host: expected 127.0.0.1, or --auth NAME:PASSWORD with it, since others could open the page. Received: {host}"
            )
        from seguncert.apps.app import launch

        launch(model or ["street"], host, port, pairs or None)


@app.command()
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
    with _one_line_errors():
        ignored, names = _ignored(ignore_index), model or ["street"]
        err.print(f"loading {', '.join(names)} …")
        from seguncert.calibrating import calibrate as learn
        from seguncert.calibrating import table_of

        result = _fit(
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
                views=_listed(views),
                drop_path=drop_path,
                insert_dropout=_places(insert_dropout or []),
                scale=scale,
                tile=_number("tile", tile),
                workers=workers,
                device=device.value,
                max_pixels=max_pixels,
            ),
        )
        _say(*table_of(result), result.failed)
        err.print(result.about)
        err.print(f"calibration: {out}")
    raise typer.Exit(FAILED if result.failed else 0)


@app.command()
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
    with _one_line_errors():
        ignored, names = _ignored(ignore_index), model or ["street"]
        err.print(f"loading {', '.join(names)} …")
        from seguncert.conforming import conform, table_of

        result = _fit(
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
                views=_listed(views),
                drop_path=drop_path,
                insert_dropout=_places(insert_dropout or []),
                calibration=calibration,
                scale=scale,
                tile=_number("tile", tile),
                workers=workers,
                device=device.value,
                max_pixels=max_pixels,
            ),
        )
        _say(*table_of(result), result.failed)
        err.print(result.about)
        err.print(f"sets: {out}")
    raise typer.Exit(FAILED if result.failed else 0)


@app.command()
def select(
    exported: ExportedArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; an earlier selection is replaced")],
    budget: Annotated[int | None, typer.Option(help="how much may be picked. Required")] = None,
    budget_in: Annotated[
        BudgetIn, typer.Option(help="units, or clicks that labelling is estimated to take")
    ] = BudgetIn.units,
    unit: Annotated[Unit, typer.Option(help="what is picked: whole images, parts of them, or pixels")] = Unit.image,
    region: Annotated[
        str, typer.Option(help="of the unit region: grid:SIDE or superpixel:AREA, in pixels")
    ] = "grid:64",
    score: Annotated[
        str | None,
        typer.Option(
            help="MAP:KIND; MAP as export --maps has them, KIND one of mean, no-boundary, class-weighted (rare classes count for"
            " more), foreground (as many of the highest pixels as are foreground), top:PERCENT, patch:SIDE; ^POWER and * combine:"
            " entropy:mean*variance:top:5^0.5; or disagreement, of samples [default: entropy:class-weighted]"
        ),
    ] = None,
    labelled: Annotated[
        list[Path] | None,
        typer.Option(
            help="list of what is labelled: a text file of paths, or a selection.csv in the folder it was written to; several times"
        ),
    ] = None,
    diversity: Annotated[
        float | None,
        typer.Option(help="power of the distance to what is labelled or picked; 0: by score alone [default: 1]"),
    ] = None,
    radius: Annotated[
        float | None,
        typer.Option(
            help="what is nearer is too similar, in typical distances of two images [default: 0.1, of parts 0]"
        ),
    ] = None,
    gap: Annotated[
        str,
        typer.Option(
            help="frames of a video must be so far apart in the number that their names end in, or as 10s in their EXIF time; auto:"
            " half of an even spread, for images"
        ),
    ] = "auto",
    quota: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS=SHARE",
            help="share of the picked area, as predicted, that a class is to reach; several times",
        ),
    ] = None,
    per_image: Annotated[int, typer.Option(min=1, help="pixels of an image at most, of the unit pixel")] = 20,
    background: BackgroundOption = None,
    hand_over: Annotated[
        str,
        typer.Option(
            help="files for labelling tools: any of coco, cvat, cvat-masks, label-studio, png; comma between; or none"
        ),
    ] = "coco,cvat,cvat-masks,label-studio,png",
    seed: Annotated[int, typer.Option(min=0, help="of the random picks")] = 0,
    workers: WorkersOption = None,
) -> None:
    """Choose what to label next of an exported folder.

    By doubt and by how different it is from what is labelled or picked; needs no model. Writes selection.csv and .html,
    files for labelling tools, and random and plain picks of the same budget for comparison.
    """
    with _one_line_errors():
        if budget is None:
            raise ValueError("budget: expected how much may be picked. Received: nothing. Give --budget N.")
        from seguncert.selection import select as pick

        with _progress("reading maps: ") as progress, _tidy_stop():
            try:
                found = pick(
                    exported,
                    out,
                    budget=budget,
                    budget_in=budget_in.value,
                    unit=unit.value,
                    region=region,
                    score=score,
                    labelled=labelled or [],
                    diversity=diversity,
                    radius=radius,
                    gap=gap,
                    quotas=_quotas(quota or []),
                    per_image=per_image,
                    background=background,
                    hand_over=() if hand_over == "none" else _listed(hand_over) or (),
                    seed=seed,
                    workers=workers,
                    progress=lambda done, total: progress(done, 0, total),
                )
            except KeyboardInterrupt:
                err.print("stopped; nothing was written")
                raise typer.Exit(STOPPED) from None
        for note in found.notes:
            err.print(f"note: {note}")
        picked, images = len(found.picks), len({pick.path for pick in found.picks})
        where = "" if unit is Unit.image else f" in {images} image{'s' * (images != 1)}"
        err.print(
            f"{picked} {unit.value}{'s' * (picked != 1)} picked{where}, of {found.about['candidates']:,}, by {found.about['score']}"
        )
        err.print(f"contact sheet: {out / 'selection.html'}")


@app.command("rank-scores")
def rank(
    exported: ExportedArgument,
    labels: LabelsArgument,
    ignore_index: IgnoreOption = None,
    side: Annotated[int, typer.Option(min=1, help="of the cells, in pixels")] = 64,
    background: BackgroundOption = None,
    replicates: Annotated[int, typer.Option(min=1, help="of the bootstrap that makes the intervals")] = 200,
    out: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="table to write too")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the intervals")] = 0,
    workers: WorkersOption = None,
) -> None:
    """Which score finds the images and cells with most error?

    On exported images of which you have labels, so that `select --score` can be chosen on your own data. Spearman is the rank
    correlation of score and error rate (1 is best, random 0), AURC the mean error rate of the surest (low is best). Exit
    status 1: some labels could not be used.
    """
    with _one_line_errors():
        ignored = _ignored(ignore_index)
        from seguncert.ranking import rank_scores, table_of

        with _progress("judging: ") as progress, _tidy_stop():
            try:
                found = rank_scores(
                    exported,
                    labels,
                    ignore_index=ignored,
                    side=side,
                    background=background,
                    replicates=replicates,
                    seed=seed,
                    workers=workers,
                    progress=lambda done, total: progress(done, 0, total),
                )
            except KeyboardInterrupt:
                raise typer.Exit(STOPPED) from None
        _say(*table_of(found), found.failed)
        for note in found.notes:
            err.print(f"note: {note}")
        err.print(f"intervals: middle 95 % of {replicates} replicates over clusters: {found.clusters.about}")
        if out is not None:
            from seguncert.store import write_file

            write_file(out, found.csv())
            err.print(f"table: {out}")
    raise typer.Exit(FAILED if found.failed else 0)


def _fit(names: list[str], job: Callable[..., T]) -> T:
    """What the job gives, with progress; a fit is whole or not at all."""
    with _progress(f"{', '.join(names)}: ") as progress, _tidy_stop():
        try:
            return job(progress=progress)
        except KeyboardInterrupt:
            err.print("stopped; nothing was written, since a fit on some images would be taken for one on all")
            raise typer.Exit(STOPPED) from None


def _say(header: list[str], rows: list[list[str]], failed: dict[str, str]) -> None:
    """A table of what was fitted, if there is any, and why images failed."""
    if rows:
        table = Table(*header, box=None)
        for row in rows:
            table.add_row(*row)
        console = Console(markup=False, highlight=False, emoji=False)
        console.width = max(console.width, 110)
        console.print(table)
    for name, error in failed.items():
        err.print(f"failed: {name}: {error}")


def _ignored(text: str | None) -> int | None:
    """The ignore index; that there is none must be said."""
    if text is None or not (text == "none" or text.isdecimal()):
        raise ValueError(
            f"ignore-index: expected the label of pixels that do not count, or none if every pixel is labelled."
            f" Received: {'nothing' if text is None else repr(text)}. Give --ignore-index N, or --ignore-index none."
        )
    return None if text == "none" else int(text)


def _listed(names: str | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(name.strip() for name in names.split(","))


def _number(option: str, text: str) -> int | Literal["auto"]:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise ValueError(f"{option}: expected a number, or auto. Received: {text!r}") from None


def _places(texts: list[str]) -> dict[str, float]:
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


def _quotas(texts: list[str]) -> dict[str, float]:
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


def _run_batch(model: str, out: Path, job: Callable[..., Exported]) -> int:
    """Run an export with progress and say what came of it; returns the exit status."""
    with _progress(f"{model}: ") as progress, _tidy_stop():
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


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors that are the user's to mend become one line and status 2; an output that cannot be written, status 1."""
    try:
        yield
    except Exception as error:
        from seguncert.store import StoreError

        if not isinstance(error, (ValueError, OSError, StoreError)):
            raise
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        err.print(f"seguncert: {text}", style="red")
        raise typer.Exit(FAILED if isinstance(error, StoreError) else WRONG) from None


@contextmanager
def _tidy_stop() -> Iterator[None]:
    """Ctrl-C, and SIGTERM from a batch system, end a run tidily; a second one says what is going on, a third ends it."""
    received = 0

    def stop(*_: object) -> None:
        nonlocal received
        received += 1
        if received == 1:
            raise KeyboardInterrupt
        if received == 2:
            err.print("the images under way are being finished; once more stops at once, and loses only those")
        else:
            os._exit(STOPPED)  # the ledger needs no farewell

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, int], None]]:
    """A bar on a terminal; elsewhere a line every half minute."""
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    started, first, last = time.monotonic(), 0, -1e9
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None, rate="", start=True)

        def show(done: int, failed: int, total: int) -> None:
            nonlocal started, first, last
            now = time.monotonic()
            if last < -1e8:
                started, first, last = now, done + failed, now - 25
            rate = (done + failed - first) / max(now - started, 1e-9)
            text = f"{rate:.1f} images/s" + (f", {failed} failed" if failed else "")
            bar.update(task, completed=done + failed, total=total, rate=text)
            if not err.is_terminal and now - last >= 30:
                last = now
                err.print(f"{title}{done + failed} of {total} images, {text}")

        yield show


def main() -> None:
    """Entry point."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
