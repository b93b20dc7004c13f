"""The command line called in this process: for what a start of Python and torch would add nothing to."""

from typer.testing import CliRunner

from seguncert.cli import app


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit status, output and errors of `seguncert ARGUMENTS`; what would end in a traceback is raised."""
    run = CliRunner().invoke(app, [*map(str, arguments)], prog_name="seguncert")
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        raise run.exception
    return run.exit_code, run.stdout, run.stderr
