"""The commands of the exact-posterior laboratory: `posterior curves`, `study`, `report` and `scenes`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from seguncert.cli_terminal import STOPPED, err, one_line_errors

posterior = typer.Typer(help="The exact-posterior laboratory.", no_args_is_help=True, rich_markup_mode=None)


@posterior.callback()
def _laboratory() -> None:
    """The exact-posterior laboratory.

    Nets, maps and calibrators held against what a perfect net would say.
    """


@posterior.command()
def curves(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; files of an earlier run are replaced")],
    seeds: Annotated[int, typer.Option(help="how many, and of how many is told")] = 10,
) -> None:
    """Three classic problems on a line: theory against net, and what flags where the net is wrong.

    Writes a picture of each problem and one of the maps' doubt (PNG and SVG), curves.csv and curves.json. A few minutes.
    """
    with one_line_errors(), progress("training") as show:
        from rich.console import Console

        from seguncert.apps.curve_pictures import write_pictures
        from seguncert.apps.curve_tables import tables, verdicts
        from seguncert.apps.curves import Plan, nets_to_update, solve_all, write_rows

        plan, made = Plan(seeds), 0

        def add(updates: int) -> None:
            nonlocal made
            made += updates
            show(made / nets_to_update(plan))

        out.mkdir(
            parents=True, exist_ok=True
        )  # first, so that minutes of training do not end where nothing can be written
        try:
            problems = solve_all(plan, add)
            rows = [row for problem in problems for row in problem.rows()]
            write_rows(out, plan, rows)
            write_pictures(out, problems)
        except KeyboardInterrupt:
            err.print("stopped before the end; the same command begins anew")
            raise typer.Exit(STOPPED) from None
    Console(width=160, highlight=False).print(*tables(rows), *verdicts(rows), sep="\n\n")
    print(f"\nWritten to {out.resolve()}")


@posterior.command()
def study(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; a study that was stopped goes on")],
    scenes: Annotated[str, typer.Option(help="any of pixels, rows, tree, digit; comma between")] = "pixels,rows,digit",
    numbers: Annotated[str, typer.Option(help="of training pictures; comma between")] = "20,600,20000",
    seeds: Annotated[int, typer.Option(help="each draws pictures and nets anew")] = 3,
    updates: Annotated[int | None, typer.Option(help="of each training, to try the study out")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="trainings at once, a core each [default: all cores]")
    ] = None,
) -> None:
    """Segmentation nets on scenes of known posterior: every way of predicting and every calibrator against the truth.

    Writes study.json and study.csv, and keeps nets and calibrations. About an hour on two cores.
    """
    with one_line_errors(), progress("training and judging") as show:
        from seguncert.apps.posterior_study import Plan, run, tables
        from seguncert.job import available_cores

        try:
            numbered = tuple(int(each) for each in numbers.split(","))
        except ValueError:
            raise ValueError(f"numbers: expected whole numbers with commas between. Received: {numbers!r}") from None
        plan = Plan(tuple(scenes.split(",")), numbered, seeds, updates=updates)
        try:
            rows = run(out, plan, workers or available_cores(), show)
        except KeyboardInterrupt:
            err.print("stopped before the end; the same command goes on")
            raise typer.Exit(STOPPED) from None
    from rich.console import Console
    from rich.table import Table

    console = Console(width=200, highlight=False)
    for title, header, lines in tables(plan, rows):
        table = Table(*header, title=title, title_justify="left", box=None)
        for line in lines:
            table.add_row(*line)
        console.print(table, "")
    console.print(plan.protocol())
    print(f"\nWritten to {out.resolve()}")


@posterior.command()
def report(
    curves: Annotated[Path, typer.Argument(metavar="CURVES", help="folder that `posterior curves` wrote")],
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="folder that `posterior study` wrote")],
    page: Annotated[Path, typer.Argument(metavar="PAGE", help="HTML file to write")],
) -> None:
    """One page for readers: what the numbers mean, and which map to believe when."""
    with one_line_errors():
        from seguncert.apps.posterior_report import write_report

        write_report(curves, study, page)
    print(f"Open in a browser: {page.resolve()}")


@posterior.command()
def scenes(
    scene: Annotated[str, typer.Argument(metavar="SCENE", help="pixels, rows, tree or digit")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")],
    number: Annotated[int, typer.Option(min=1, help="of pictures")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="of the pictures; the study trains on those of 0, 1, …")] = 1000,
) -> None:
    """Draw pictures of a scene, with labels and exact posteriors, to try a net or a calibration of your own on.

    Writes images/ and labels/ as PNG, as `calibrate` and `evaluate` take them, and posteriors/ as NPY, float64 (C, H, W).
    """
    with one_line_errors():
        from seguncert.apps.scene_folder import write_scene

        classes = write_scene(scene, out, number, seed)
    print(f"{number} pictures, labels and posteriors of the classes {', '.join(classes)} in {out.resolve()}")


@contextmanager
def progress(title: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal; elsewhere a line every half minute. It is shown the share that is done."""
    import time

    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    last = time.monotonic()
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)

        def show(share: float) -> None:
            nonlocal last
            bar.update(task, completed=share)
            if not err.is_terminal and time.monotonic() - last >= 30:
                last = time.monotonic()
                err.print(f"{title}: {100 * share:.0f} %")

        yield show
