"""The command line, nothing else: its commands are in the files `cli_*`, but for three that only show what there is.

Heavy imports wait until a command runs, so that --help answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from seguncert.cli_evaluate import evaluate
from seguncert.cli_export import export, run_batch
from seguncert.cli_fit import calibrate, conformal
from seguncert.cli_posterior import posterior
from seguncert.cli_select import rank, select
from seguncert.cli_terminal import STOPPED, err, one_line_errors

app = typer.Typer(
    help="Where can I trust this segmentation mask?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> bool:
    if wanted:
        print(version("seguncert"))
        raise typer.Exit()
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    """Where can I trust this segmentation mask?"""


def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="folder to write")] = Path("seguncert-demo"),
) -> None:
    """Try the bundled models on sample pictures.

    Opens nothing, prints where to look.
    """
    with one_line_errors():
        err.print("loading the bundled models …")
        from seguncert.apps.samples import write_samples
        from seguncert.batch import export

        samples = write_samples(out / "pictures")
        code = max(run_batch(name, out / name, partial(export, samples[name], out / name, name)) for name in samples)
    print("\nOpen in a browser:")
    for name in samples:
        print(f"  {(out / name / 'report.html').resolve()}")
    raise typer.Exit(code)


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
    with one_line_errors():
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


# in the order of --help
app.command()(export)
app.command()(evaluate)
app.command()(demo)
app.command()(models)
app.command("app")(page)
app.command()(calibrate)
app.command()(conformal)
app.command()(select)
app.command("rank-scores")(rank)
app.add_typer(posterior, name="posterior")


def main() -> None:
    """Entry point."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
