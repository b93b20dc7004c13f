"""The commands that choose what to label next: `select` and `rank-scores`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from seguncert.cli_options import (
    BackgroundOption,
    ExportedArgument,
    IgnoreOption,
    LabelsArgument,
    WorkersOption,
    ignored_label,
    listed,
    quotas_of,
)
from seguncert.cli_terminal import FAILED, STOPPED, err, one_line_errors, progress_bar, say, tidy_stop


class Unit(str, Enum):
    image = "image"
    region = "region"
    segment = "segment"
    pixel = "pixel"


class BudgetIn(str, Enum):
    units = "units"
    clicks = "clicks"


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
    with one_line_errors():
        if budget is None:
            raise ValueError("budget: expected how much may be picked. Received: nothing. Give --budget N.")
        from seguncert.selection import select as pick

        with progress_bar("reading maps: ") as progress, tidy_stop():
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
                    quotas=quotas_of(quota or []),
                    per_image=per_image,
                    background=background,
                    hand_over=() if hand_over == "none" else listed(hand_over) or (),
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
    with one_line_errors():
        ignored = ignored_label(ignore_index)
        from seguncert.ranking import rank_scores, table_of

        with progress_bar("judging: ") as progress, tidy_stop():
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
        say(*table_of(found), found.failed)
        for note in found.notes:
            err.print(f"note: {note}")
        err.print(f"intervals: middle 95 % of {replicates} replicates over clusters: {found.clusters.about}")
        if out is not None:
            from seguncert.store import write_file

            write_file(out, found.csv())
            err.print(f"table: {out}")
    raise typer.Exit(FAILED if found.failed else 0)
