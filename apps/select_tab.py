"""What to label next of the photos in the Folder tab: the contact sheet of `seguncert select`, and all that it writes as one zip."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seguncert.annotation import FORMATS
from seguncert.apps.folder_tab import zipped
from seguncert.apps.place import gr
from seguncert.apps.sessions import Session
from seguncert.selection import select

if TYPE_CHECKING:
    from seguncert.apps.app import Page

UNITS = {"Photos": "image", "Cells of 64 pixels": "region", "Shown segments": "segment", "Pixels, 20 a photo": "pixel"}
SCORES = {
    "Doubt, where rare classes count more": "entropy:class-weighted",
    "Mean doubt": "entropy:mean",
    "Doubt away from boundaries": "entropy:no-boundary",
    "The most doubtful 5 % of pixels": "entropy:top:5",
    "Mean disagreement of samples": "mutual_information:mean",
}
MOST = 1000


def run_select(
    page: Page, session: Session, unit: str, budget: float, score: str, diverse: bool,
    progress: Callable[..., Any] | None = None,
) -> tuple[str, Path]:  # fmt: skip
    """The contact sheet as HTML and the zip of a selection among what the session's last folder run left."""
    folder = session.folders.get("folder")
    if folder is None or not (folder / "out" / "run.json").is_file():
        raise ValueError("Run photos in the Folder tab first: what to label next is chosen among these.")
    if not 1 <= budget <= MOST:
        raise ValueError(f"budget: expected 1 to {MOST}. Received: {budget}")
    with page.sessions.running(session, "select") as stop:
        place = page.sessions.place(session, "select")

        def tell(done: int, total: int) -> None:
            if progress is not None:
                progress((done, total), unit="photos")
            if stop.is_set():
                raise KeyboardInterrupt

        try:
            found = select(
                folder / "out", place / "selection", budget=int(budget), unit=unit, score=score,
                diversity=1.0 if diverse else 0.0, hand_over=list(FORMATS), progress=tell,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise ValueError("Stopped: nothing was chosen.") from None
        text = html.escape((found.out / "selection.html").read_text(encoding="utf-8"), quote=True)
        frame = (  # its scripts run without any right to the page around it
            '<iframe title="Contact sheet: what to label next" sandbox="allow-scripts" style="width:100%;height:90vh;border:0;'
            f'border-radius:10px" srcdoc="{text}"></iframe>'
        )
        return frame, zipped(found.out, place / "selection.zip")


def select_tab(page: Page) -> None:
    """The tab."""
    gr.Markdown(
        "### What to label next\nOf the photos that you ran in the Folder tab: those that are doubtful, and unlike each other. The"
        " zip has the list, the shown classes as pre-labels for CVAT, Label Studio and COCO tools, and random picks to compare with."
    )
    with gr.Row():
        unit = gr.Radio(list(UNITS.items()), value="image", label="What is labelled at a time", elem_id="select-unit")
        score = gr.Dropdown(
            list(SCORES.items()), value="entropy:class-weighted", label="By what", elem_id="select-score", min_width=280
        )
        with gr.Column(min_width=220):
            budget = gr.Number(
                10, minimum=1, maximum=MOST, precision=0, label="Budget: how many", elem_id="select-budget"
            )
            diverse = gr.Checkbox(True, label="Unlike each other", elem_id="select-diverse")
    with gr.Row():
        go = gr.Button("Choose", variant="primary", elem_id="select-run")
        stop = gr.Button("Stop", elem_id="select-stop")
    download = gr.DownloadButton(
        "Download list and files for labelling tools (zip)", visible=False, elem_id="select-zip"
    )
    shown = gr.HTML(elem_id="select-shown")

    def run(unit, budget, score, diverse, request: gr.Request, progress=gr.Progress()):
        """Choose what to label next of the session's last /folder run: contact sheet as HTML, and a zip of all files."""
        places: dict[Path, str] = {}
        try:
            session = page.sessions.of(request.session_hash)
            places = {folder / "out": "the folder" for kind, folder in session.folders.items() if kind == "folder"}
            frame, archive = run_select(page, session, unit, budget or 0, score, diverse, progress)
        except (ValueError, OSError) as error:
            raise page.told(error, places) from None
        return frame, gr.update(value=str(archive), visible=True)

    go.click(
        run, [unit, budget, score, diverse], [shown, download], api_name="select", concurrency_id="folder",
        show_progress="full",
    )  # fmt: skip
    stop.click(page.stopper("select"), None, None, api_visibility="private", queue=False)
