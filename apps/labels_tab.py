"""How far the loaded model can be believed: what its card says, and on the visitor's own labelled photos."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seguncert.apps.place import gr
from seguncert.apps.sessions import Session
from seguncert.apps.uploads import files_input, unpack
from seguncert.calibrating import calibrate, table_of
from seguncert.calibration import KINDS
from seguncert.evaluation import evaluate

if TYPE_CHECKING:
    from seguncert.apps.app import Page


def told_of(page: Page, model: str, method: str) -> str:
    """What card and calibration of a model say, as Markdown."""
    net = page.models(model, "none")[0]
    card = net.card
    lines = [f"### {net.name}", card.get("about", "")]
    if card.get("trained_on"):
        lines.append(f"Trained on {card['trained_on']}.")
    if card.get("measured"):
        lines += [
            "| measured on | |",
            "|---|---|",
            *(f"| {what} | {found} |" for what, found in card["measured"].items()),
        ]
    file = net.folder and net.folder / f"calibration-{method}.json"
    if not file or not file.is_file():
        return "\n".join(
            [
                *lines,
                "",
                f"**There is no calibration for {method}:** its numbers are the net's own, and usually too sure.",
            ]
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    protocol, held = found["protocol"], found["measured"].get("scenes_held_out", {})
    lines += ["", f"**Calibration for {method}:** {found['parameters']['kind'] if found.get('parameters') else 'none was surely better than the net itself'},"
              f" fitted on {protocol['pictures']} labelled pictures that the net was not trained on."]  # fmt: skip
    if held:
        names = {
            "nll": "NLL / nat",
            "ece": "ECE",
            "ece_image_mean": "ECE of a photo, mean",
            "ece_boundary": "ECE at boundaries",
            "brier": "Brier",
        }
        lines += ["", "| on scenes held out | " + " | ".join(names.values()) + " |", "|---|" + "---:|" * len(names)]
        lines += [
            f"| {kind} | " + " | ".join(f"{values[name]:.4f}" for name in names) + " |" for kind, values in held.items()
        ]
    return "\n".join(lines)


def _uploaded(
    page: Page, session: Session, images: list[tuple[str, str]], labels: list[tuple[str, str]]
) -> tuple[Path, Path, Path]:
    if not images or not labels:
        raise ValueError("Choose photos and their label PNGs (class indices, the same names) first.")
    place = page.sessions.place(session)
    for folder, files in (("images", images), ("labels", labels)):
        (place / folder).mkdir()
        unpack(files, place / folder)
    session.stop.clear()
    return place / "images", place / "labels", place


def _index(text: str) -> int | None:
    if text.strip().lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"ignore index: expected a whole number, or none. Received: {text!r}") from None


def _teller(session: Session, progress: Callable[..., Any] | None) -> Callable[[int, int, int], None]:
    def tell(done: int, failed: int, total: int) -> None:
        if progress is not None:
            progress((done + failed, total), unit="photos")
        if session.stop.is_set():
            raise KeyboardInterrupt

    return tell


def labels_tab(page: Page) -> None:
    """The tab."""
    with gr.Row():
        model = gr.Dropdown(page.names, value=page.first, label="Model", elem_id="labels-model")
        method = gr.Radio(page.methods, value="none", label="How the net is asked")
    card = gr.Markdown(told_of(page, page.first, "none"), elem_id="card")
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

    def evaluate_labels(images, labels, ignore, model, method, request: gr.Request, progress=gr.Progress()):
        """Judge a model on labelled photos; the report as HTML."""
        try:
            session = page.sessions.of(request.session_hash)
            photos, masks, place = _uploaded(page, session, images, labels)
            nets = page.models(model, method)
            found = evaluate(
                photos,
                masks,
                place / "report",
                nets if len(nets) > 1 else nets[0],
                ignore_index=_index(ignore),
                method=method,
                progress=_teller(session, progress),
            )
        except ValueError as error:
            raise page.told(error) from None
        except KeyboardInterrupt:
            raise gr.Error(
                "Stopped: figures of some photos would be taken for those of all, so there are none.",
                print_exception=False,
            ) from None
        report = found.out / "report.html"
        text = html.escape(report.read_text(encoding="utf-8"), quote=True)
        frame = f'<iframe title="Report: how reliable the model is on these photos" sandbox="" srcdoc="{text}" style="width:100%;height:85vh;border:0;border-radius:10px"></iframe>'
        return frame, gr.update(value=str(report), label="Download the report", visible=True)

    def fit_labels(images, labels, ignore, model, method, kind, request: gr.Request, progress=gr.Progress()):
        """Fit a calibration on labelled photos; what was found, and the file for `--calibration`."""
        try:
            session = page.sessions.of(request.session_hash)
            photos, masks, place = _uploaded(page, session, images, labels)
            nets, out = page.models(model, method), place / f"calibration-{method}.json"
            found = calibrate(
                photos,
                masks,
                out,
                nets if len(nets) > 1 else nets[0],
                ignore_index=_index(ignore),
                calibrator=kind,
                method=method,
                progress=_teller(session, progress),
            )
        except ValueError as error:
            raise page.told(error) from None
        except KeyboardInterrupt:
            raise gr.Error("Stopped before anything was fitted.", print_exception=False) from None
        return _fitted(found), gr.update(value=str(out), label=f"Download {out.name}", visible=True)

    def ask_to_stop(request: gr.Request) -> None:
        page.sessions.of(request.session_hash).stop.set()

    gr.on(
        [model.change, method.change],
        lambda model, method: told_of(page, model, method),
        [model, method],
        card,
        api_visibility="private",
        queue=False,
    )
    inputs = [images, labels, ignore, model, method]
    judge.click(evaluate_labels, inputs, [shown, download], api_name="evaluate", concurrency_id="folder")
    fit.click(fit_labels, [*inputs, kind], [shown, download], api_name="calibrate", concurrency_id="folder")
    stop.click(ask_to_stop, None, None, api_visibility="private", queue=False)


def _fitted(found: Any) -> str:
    head, rows = table_of(found)
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    table = f"<table><thead><tr>{''.join(f'<th>{html.escape(each)}</th>' for each in head)}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in cells)}</tbody></table>"
    failed = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in found.failed.items())
    return f"<h3>Fitted</h3><p>{html.escape(found.about)}.</p>{table if rows else ''}{f'<p>Failed:</p><ul>{failed}</ul>' if failed else ''}"
