"""Many photos at once: what `seguncert export` writes, as a gallery and as one zip."""

from __future__ import annotations

import base64
import csv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seguncert.apps.place import gr
from seguncert.apps.sessions import Session
from seguncert.apps.sight import SAMPLES, settings, takes_samples, told
from seguncert.apps.uploads import files_input, unpack
from seguncert.batch import export
from seguncert.image import read_image
from seguncert.maps import MAPS
from seguncert.render import encode_jpeg, thumbnail

if TYPE_CHECKING:
    from seguncert.apps.app import Page

CARDS, SIDE = 200, 360  # photos drawn at most; pixels of a side
ZIP = "seguncert.zip"


def run_folder(
    page: Page, session: Session, files: list[tuple[str, str]], model: str, method: str, samples: int, calibrated: bool,
    progress: Callable[..., Any] | None = None,
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """Export uploaded files, zips unpacked; what the gallery shows, and the zip. ValueError with one line for what is wrong."""
    with page.sessions.running(session, "folder") as stop:
        place = page.sessions.place(session, "folder")
        source, out = place / "photos", place / "out"
        source.mkdir()
        unpack(files, source)

        def tell(done: int, failed: int, total: int) -> None:
            if progress is not None:
                progress((done + failed, total), unit="photos")
            if stop.is_set():
                raise KeyboardInterrupt  # export ends what is under way, and writes the tables of what is done

        nets, chosen = page.models(model, method), settings(method, samples, calibrated)
        try:
            export(source, out, nets if len(nets) > 1 else nets[0], embeddings=True, progress=tell, **chosen)
        except KeyboardInterrupt:
            if not (out / "images.csv").is_file():
                raise ValueError("Stopped before the first photo was done.") from None
        return _gallery(out, len(nets[0].classes), stop.is_set()), zipped(out, place / ZIP)


def _gallery(out: Path, C: int, stopped: bool) -> dict[str, Any]:
    with (out / "images.csv").open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    done = [row for row in rows if row["status"] == "ok"]
    means = [name for name in MAPS if done and f"{name}_mean" in done[0]]
    done.sort(key=lambda row: -float(row["entropy_mean"]))
    failed = [{"path": row["path"], "error": row["error"]} for row in rows if row["status"] == "failed"]
    words = f"{len(done)} photo{'s' * (len(done) != 1)}, the most doubtful (mean entropy) first" + (
        f"; {len(failed)} failed" if failed else ""
    )
    words += f"; the {CARDS} most doubtful are drawn, the zip has all" if len(done) > CARDS else ""
    return {
        "words": words + ("; stopped before the end." if stopped else "."),
        "failed": failed,
        "photos": [
            {
                "path": row["path"], "picture": _small(out / row["path"] / "overlay.jpg"),
                "scores": " · ".join(told(name, float(row[f"{name}_mean"]), C) for name in means),
            }
            for row in done[:CARDS]
        ],
    }  # fmt: skip


def _small(file: Path) -> str:
    picture = thumbnail(read_image(file).rgb, SIDE)
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(picture, 85)).decode()


def zipped(out: Path, target: Path) -> Path:
    """All files of a folder; pictures are packed as they are."""
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(out.rglob("*")):
            name = file.relative_to(out)
            if file.is_file() and not name.parts[0].startswith("."):
                packed = (
                    zipfile.ZIP_DEFLATED
                    if file.suffix in (".csv", ".json", ".jsonl", ".html", ".xml")
                    else zipfile.ZIP_STORED
                )
                archive.write(file, name.as_posix(), packed)
    return target


def folder_tab(page: Page, file: Callable[[str], str]) -> None:
    """The tab."""
    with gr.Row():
        files = files_input(label="Photos, or a zip of them", height=190, elem_id="files", min_width=300)
        with gr.Column(min_width=280):
            model = gr.Dropdown(page.names, value=page.first, label="Model", elem_id="folder-model")
            calibrated = gr.Checkbox(True, label="Calibrated, where the model has a calibration")
        with gr.Column(min_width=300):
            method = gr.Radio(page.methods, value="none", label="How the net is asked", elem_id="folder-method")
            samples = gr.Slider(*SAMPLES, 20, step=1, label="Samples", visible=False)
            with gr.Row():
                go = gr.Button("Run", variant="primary", elem_id="folder-run")
                stop = gr.Button("Stop, keep what there is", elem_id="folder-stop")
    download = gr.DownloadButton("Download all that export writes (zip)", visible=False, elem_id="folder-zip")
    gallery = gr.HTML(
        None, html_template=file("gallery.html"), css_template=file("gallery.css"), js_on_load=file("gallery.js"),
        elem_id="gallery", apply_default_css=False,
    )  # fmt: skip

    def run(files, model, method, samples, calibrated, request: gr.Request, progress=gr.Progress()):
        """Export many photos, or a zip of them: a gallery, and one zip of all that `seguncert export` writes."""
        if not files:
            raise gr.Error("Choose photos, or a zip of photos, first.", print_exception=False)
        try:
            session = page.sessions.of(request.session_hash)
            shown, archive = run_folder(page, session, files, model, method, samples, calibrated, progress)
        except (ValueError, OSError) as error:
            raise page.told(error) from None
        return shown, gr.update(value=str(archive), visible=True)

    inputs = [files, model, method, samples, calibrated]
    go.click(run, inputs, [gallery, download], api_name="folder", concurrency_id="folder", show_progress="full")
    stop.click(page.stopper("folder"), None, None, api_visibility="private", queue=False)
    method.change(
        lambda chosen: gr.update(visible=takes_samples(chosen)), method, samples, api_visibility="private", queue=False
    )
