"""The page: upload a photo, see where not to trust the mask."""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: no request leaves the machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from functools import lru_cache

import gradio as gr
import numpy as np

from seguncert.image import ImageError
from seguncert.legend import legend_classes
from seguncert.maps import OF_SOFTMAX
from seguncert.model import Model, bundled_names, load_model
from seguncert.render import fade_classes, thumbnail
from seguncert.run import Result, analyse

SHOWN = 1600  # pixels of the longest side sent to the browser
CLASSES = "classes, faded by doubt"


@lru_cache(maxsize=4)
def _model(name: str) -> Model:
    return load_model(name)


def look(photo: str | None, model: str, shown: str) -> tuple[np.ndarray, str]:
    """Analyse the photo at a path; the picture to show (RGB uint8, legend below) and what to read beside it."""
    if photo is None:
        raise gr.Error("Choose a photo first.")
    try:
        result = analyse(_model(model), photo)
    except ValueError as error:  # ImageError and ModelError are such
        text = str(error).removeprefix(f"{photo}: ") if isinstance(error, ImageError) else str(error)
        raise gr.Error(text) from None
    picture = _classes(result) if shown == CLASSES else result.overlay(shown)
    return thumbnail(picture, SHOWN), _words(result)


def _classes(result: Result) -> np.ndarray:
    faded = fade_classes(result.rgb, result.labels, result.colours, 1 - result.maps["entropy"])
    shares = np.bincount(result.labels.ravel(), minlength=len(result.classes)) / result.labels.size
    legend = legend_classes(max(faded.shape[1], 260), result.classes, result.colours, shares)
    padded = np.full((faded.shape[0], legend.shape[1], 3), 250, np.uint8)
    padded[:, : faded.shape[1]] = faded
    return np.concatenate([padded, legend])


def _words(result: Result) -> str:
    confidence = result.maps["confidence"]
    shares = np.bincount(result.labels.ravel(), minlength=len(result.classes)) / result.labels.size
    told = (
        "**Not calibrated:** these are the net's own numbers, and they are usually too sure."
        if result.calibration == "none"
        else f"**Calibrated** ({result.calibration})."
    )
    lines = [
        f"{told} {100 * (confidence < 0.7).mean():.1f} % of the pixels are less than 70 % sure.",
        "",
        "| class | area | mean confidence |",
        "|---|---:|---:|",
    ]
    for c in np.argsort(-shares):
        if shares[c] > 0:
            sure = confidence[result.labels == c].mean()
            lines.append(f"| {result.classes[c]} | {100 * shares[c]:.1f} % | {sure:.2f} |")
    if result.note:
        lines += ["", f"Note: {result.note}."]
    return "\n".join(lines)


def build(model: str) -> gr.Blocks:
    """The page with `model` chosen at the start; other model folders can be named on the command line."""
    _model(model)  # an unknown name is an error now, not at the first click
    with gr.Blocks(title="seguncert", analytics_enabled=False) as page:
        gr.Markdown("# Where can I trust this mask?\nClear where the net is sure, bright where it doubts.")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photo = gr.Image(type="filepath", image_mode=None, label="Photo", sources=["upload", "clipboard"])
                chosen = gr.Dropdown(sorted({*bundled_names(), model}), value=model, label="Model")
                shown = gr.Radio([*OF_SOFTMAX, CLASSES], value="confidence", label="Map")
                go = gr.Button("Look", variant="primary")
            with gr.Column(scale=2, min_width=340):
                picture = gr.Image(
                    label="Where to look twice",
                    format="jpeg",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    alt_text="The photo under the chosen map, with its legend below",
                )
                words = gr.Markdown()
        inputs, outputs = [photo, chosen, shown], [picture, words]
        go.click(look, inputs, outputs, api_name="look")
        gr.on([photo.upload, shown.change, chosen.change], _again, inputs, outputs, api_visibility="private")
    return page


def _again(photo: str | None, model: str, shown: str):
    return look(photo, model, shown) if photo is not None else (None, "")


def launch(model: str, host: str, port: int) -> None:
    """Serve the page until Ctrl-C."""
    page = build(model).queue(max_size=16, default_concurrency_limit=1)
    page.launch(
        server_name=host, server_port=port, share=False, max_file_size="100mb", allowed_paths=[], show_error=True,
        quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"the page is at http://{host}:{port}; Ctrl-C ends it")
    page.block_thread()
