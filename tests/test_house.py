"""The house rules that a machine can check: style, types, and that data flows one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [  # a module imports only modules above it
    "kernels", "bilateral", "posterior", "hidden", "scenes", "moments", "video", "detection", "slopes", "scores", "metrics", "conformal", "coverage", "maps", "truth", "image", "corruptions", "labels", "render", "legend", "report", "contact", "store", "rle", "handover", "cvat", "annotation", "tables", "card", "stochastic", "model", "embedding", "noise", "dropout", "prefix",
    "backends", "fused", "closed", "tail", "predict", "surroundings", "calibrators", "calibration", "sets", "fitting", "tiles", "sampling", "views", "run", "sheets", "job", "batch", "pool", "labelled", "aggregate", "regions", "diversity", "candidates", "choice", "selection", "clusters", "ranking", "published", "worst", "shift", "tally", "figures", "findings", "evaluation", "walk", "calibrating", "conforming", "cli_options", "cli_terminal", "cli_export", "cli_evaluate", "cli_fit", "cli_select", "cli_posterior", "cli",
]  # fmt: skip
SHELLS = {"cli", "cli_posterior"}  # they start what lies under apps
LEAVES = {"kernels", "moments", "image", "corruptions", "render", "store", "card", "posterior"}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_up_only(name):
    allowed = [] if name in LEAVES else ORDER[: ORDER.index(name)]
    for imported in imports(ROOT / "seguncert" / f"{name}.py"):
        package, _, rest = imported.partition(".")
        if package == "seguncert" and not (name in SHELLS and rest.startswith("apps.")):
            assert rest.split(".")[0] in allowed, f"{name} imports {imported}"
        assert package != "gradio", "gradio belongs to apps"


def test_every_module_has_its_place():
    found = {file.stem for file in (ROOT / "seguncert").glob("*.py")} - {"__init__"}
    assert found == set(ORDER)


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["lint", "format", "types"]
)
def test_style_and_types(command):
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
