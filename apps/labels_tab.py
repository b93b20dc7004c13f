"""How far the loaded model can be believed: what its card says, and on the visitor's own labelled photos."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from seguncert.apps.place import gr
from seguncert.apps.sessions import Session
from seguncert.apps.uploads import files_input, unpack
from seguncert.calibrating import Calibrated, calibrate, table_of
from seguncert.calibrators import KINDS
from seguncert.evaluation import evaluate
from seguncert.figures import Diagram, reliability
from seguncert.scores import Reliability

if TYPE_CHECKING:
    from seguncert.apps.app import Page


FIGURES = {
    "nll": "NLL / nat", "ece": "ECE", "ece_image_mean": "ECE of a photo, mean", "ece_boundary": "ECE at boundaries",
    "brier": "Brier",
}  # fmt: skip


def told_of(page: Page, model: str, method: str) -> str:
    """What card and calibration of a model say, as HTML; all that they say is text."""
    net = page.models(model, "none")[0]
    card, text = net.card, [f"<h3>{_text(net.name)}</h3>", f"<p>{_text(net.card.get('about', ''))}"]
    text.append(f" Trained on {_text(card['trained_on'])}.</p>" if card.get("trained_on") else "</p>")
    if card.get("measured"):
        text.append(_table(["measured on", ""], card["measured"].items()))
    asked = next(title for title, name in page.methods if name == method)
    file = net.folder and net.folder / f"calibration-{method}.json"
    if not file or not file.is_file():
        text.append(
            f"<p><b>There is no calibration for {asked}:</b> its numbers are the net's own, and usually too sure.</p>"
        )
        return "".join(text)
    found = json.loads(file.read_text(encoding="utf-8"))
    kind, pictures = (found["parameters"] or {}).get("kind", "none"), found["protocol"]["pictures"]
    told = (
        f"{kind}, fitted on {pictures} labelled pictures"
        if kind != "none"
        else f"none was surely better than the net itself on {pictures} labelled pictures"
    )
    text.append(f"<p><b>Calibration for {asked}:</b> {_text(told)} that the net was not trained on.</p>")
    if held := found["measured"].get("scenes_held_out"):
        rows = ([kind, *(f"{values[name]:.4f}" for name in FIGURES)] for kind, values in held.items())
        text.append(_table(["on scenes held out", *FIGURES.values()], rows))
    return "".join(text)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{_text(each)}</th>" for each in head)
    return f"<div class='wide'><table><thead><tr>{titles}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table></div>"


def diagram_of(page: Page, model: str, method: str) -> str:
    """The reliability diagram that came with the calibration of a model, on scenes held out, as SVG; or nothing."""
    folder = page.models(model, "none")[0].folder
    file = folder and folder / f"calibration-{method}.json"
    if not file or not file.is_file():
        return ""
    held = json.loads(file.read_text(encoding="utf-8"))["measured"].get("scenes_held_out", {})
    bins = {
        kind: Reliability(*map(np.array, each["reliability"].values()))
        for kind, each in held.items()
        if "reliability" in each
    }
    if not bins:
        return ""
    *before, (kind, now) = bins.items()
    title = "as the net is" if kind == "none" else f"calibrated ({kind})"
    drawn = reliability(
        "card", [Diagram(title, now, before=before[0][1] if before else None)],
        forecast="confidence: probability of the shown class", event="share that is right",
    )  # fmt: skip
    return f'<div class="diagram">{drawn}</div>'


def _uploaded(
    page: Page, session: Session, images: list[tuple[str, str]], labels: list[tuple[str, str]]
) -> tuple[Path, Path, Path]:
    place = page.sessions.place(session, "labels")
    for folder, files in (("images", images), ("labels", labels)):
        (place / folder).mkdir()
        unpack(files, place / folder)
    return place / "images", place / "labels", place


def _index(text: str) -> int | None:
    if text.strip().lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"ignore index: expected a whole number, or none. Received: {text!r}") from None


def _teller(stop: Event, progress: Callable[..., Any] | None) -> Callable[[int, int, int], None]:
    def tell(done: int, failed: int, total: int) -> None:
        if progress is not None:
            progress((done + failed, total), unit="photos")
        if stop.is_set():
            raise KeyboardInterrupt

    return tell


def labels_tab(page: Page) -> None:
    """The tab."""
    with gr.Row():
        model = gr.Dropdown(page.names, value=page.first, label="Model", elem_id="labels-model")
        method = gr.Radio(page.methods, value="none", label="How the net is asked")
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            card = gr.HTML(told_of(page, page.first, "none"), elem_id="card")
        with gr.Column(scale=1, min_width=300):
            diagram = gr.HTML(diagram_of(page, page.first, "none"), elem_id="diagram")
    gr.Markdown(
        "### On your own labelled photos\nLabels are PNGs of class indices, each with the name of its photo. Use photos that the model was not trained on."
    )
    with gr.Row():
        images = files_input(label="Photos, or a zip", height=150, elem_id="labels-images", min_width=260)
        labels = files_input(label="Label PNGs, or a zip", height=150, elem_id="labels-labels", min_width=260)
        with gr.Column(min_width=240):
            ignore = gr.Textbox("255", label="Ignore index (pixels without a label), or none", elem_id="labels-ignore")
            kind = gr.Dropdown(["auto", *KINDS], value="auto", label="Calibrator to fit")
    with gr.Row():
        judge = gr.Button("How reliable is it here?", variant="primary", elem_id="labels-judge")
        fit = gr.Button("Fit a calibration", elem_id="labels-fit")
        stop = gr.Button("Stop", elem_id="labels-stop")
    download = gr.DownloadButton("Download", visible=False, elem_id="labels-download")
    shown = gr.HTML(elem_id="labels-shown")

    def run(work, images, labels, request, progress):
        """Unpack what was sent, do the work on it, and say in one line what is wrong."""
        if not images or not labels:
            raise gr.Error(
                "Choose photos and their label PNGs (class indices, the same names) first.", print_exception=False
            )
        place = Path()
        try:
            session = page.sessions.of(request.session_hash)
            with page.sessions.running(session, "labels") as stop:
                photos, masks, place = _uploaded(page, session, images, labels)
                return work(photos, masks, place, _teller(stop, progress))
        except (ValueError, OSError) as error:
            names = {place / "images": "your photos", place / "labels": "your labels"}
            raise page.told(error, names) from None
        except KeyboardInterrupt:
            raise gr.Error("Stopped: nothing is told of some of the photos only.", print_exception=False) from None

    def evaluate_labels(images, labels, ignore, model, method, request: gr.Request, progress=gr.Progress()):
        """Judge a model on labelled photos; the report as HTML."""

        def work(photos, masks, place, tell):
            nets = page.models(model, method)
            found = evaluate(
                photos, masks, place / "report", nets if len(nets) > 1 else nets[0], ignore_index=_index(ignore),
                method=method, progress=tell,
            )  # fmt: skip
            return found.out / "report.html"

        report = run(work, images, labels, request, progress)
        text = html.escape(report.read_text(encoding="utf-8"), quote=True)
        frame = (
            '<iframe title="Report: how reliable the model is on these photos" sandbox="" style="width:100%;height:85vh;border:0;'
            f'border-radius:10px" srcdoc="{text}"></iframe>'
        )
        return frame, gr.update(value=str(report), label="Download the report", visible=True)

    def fit_labels(images, labels, ignore, model, method, kind, request: gr.Request, progress=gr.Progress()):
        """Fit a calibration on labelled photos; what was found, and the file for `--calibration`."""

        def work(photos, masks, place, tell):
            nets, out = page.models(model, method), place / f"calibration-{method}.json"
            found = calibrate(
                photos, masks, out, nets if len(nets) > 1 else nets[0], ignore_index=_index(ignore), calibrator=kind,
                method=method, progress=tell,
            )  # fmt: skip
            return found, out

        found, out = run(work, images, labels, request, progress)
        return _fitted(found), gr.update(value=str(out), label=f"Download {out.name}", visible=True)

    gr.on(
        [model.change, method.change],
        lambda model, method: (told_of(page, model, method), diagram_of(page, model, method)),
        [model, method],
        [card, diagram],
        api_visibility="private",
        queue=False,
    )
    inputs = [images, labels, ignore, model, method]
    judge.click(evaluate_labels, inputs, [shown, download], api_name="evaluate", concurrency_id="folder")
    fit.click(fit_labels, [*inputs, kind], [shown, download], api_name="calibrate", concurrency_id="folder")
    stop.click(page.stopper("labels"), None, None, api_visibility="private", queue=False)


def _fitted(found: Calibrated) -> str:
    head, rows = table_of(found)
    failed = "".join(f"<li>{_text(name)}: {_text(why)}</li>" for name, why in found.failed.items())
    text = f"<h3>Fitted</h3><p>{_text(found.about)}.</p>{_table(head, rows) if rows else ''}"
    return text + (f"<p>Failed:</p><ul>{failed}</ul>" if failed else "")
