"""Where the page keeps what visitors send, and gradio, told so before it was imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_WHOSE = os.getuid() if hasattr(os, "getuid") else "user"
ALL = Path(tempfile.gettempdir()) / f"seguncert-page-{_WHOSE}"  # a folder for each page, named by its process
PLACE = ALL / str(os.getpid())
EXAMPLES = ALL / "examples"  # outside of what gradio clears

os.environ["GRADIO_TEMP_DIR"] = str(PLACE)
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # no request leaves the machine
os.environ["HF_HUB_OFFLINE"] = "1"

import gradio as gr  # noqa: E402


def clean() -> None:
    """Make the place, and remove those of pages that did not end well; what pages that run have stays."""
    ALL.mkdir(mode=0o700, exist_ok=True)
    if ALL.is_symlink() or ALL.stat().st_mode & 0o077:
        raise ValueError(f"{ALL}: expected a folder that only you can open. Remove it.")
    for folder in ALL.iterdir():
        if folder == PLACE or not (folder == EXAMPLES or (folder.name.isdigit() and _runs(int(folder.name)))):
            shutil.rmtree(folder, ignore_errors=True)
    PLACE.mkdir(mode=0o700)
    atexit.register(shutil.rmtree, PLACE, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


__all__ = ["ALL", "EXAMPLES", "PLACE", "clean", "gr"]
