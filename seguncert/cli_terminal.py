"""What every command does with the terminal: progress, tables, one line for an error, a tidy stop, the exit status."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table

err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
FAILED, WRONG, STOPPED = 1, 2, 130


@contextmanager
def one_line_errors() -> Iterator[None]:
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
def tidy_stop() -> Iterator[None]:
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
def progress_bar(title: str) -> Iterator[Callable[[int, int, int], None]]:
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


def say(header: list[str], rows: list[list[str]], failed: dict[str, str]) -> None:
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
