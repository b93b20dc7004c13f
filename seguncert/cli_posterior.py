"""The commands of the exact-posterior laboratory: `posterior curves`."""

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
