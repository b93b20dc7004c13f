"""The page: upload a photo, see where not to trust the mask.

Everything stays on this machine: no request leaves it, uploads lie in a folder of their own, which is emptied at the start.
"""

from __future__ import annotations

import base64
import html
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from seguncert.apps.folder_tab import folder_tab
from seguncert.apps.labels_tab import labels_tab
from seguncert.apps.place import EXAMPLES, PLACE, clean, gr
from seguncert.apps.samples import write_samples
from seguncert.apps.select_tab import select_tab
from seguncert.apps.sessions import Forgotten, Sessions
from seguncert.apps.sight import SAMPLES, Sight, settings, takes_samples, with_sets
from seguncert.apps.uploads import photo_input
from seguncert.image import read_image
from seguncert.maps import OF_SAMPLES, OF_SOFTMAX
from seguncert.model import Model, bundled_names, load_model
from seguncert.run import analyse
from seguncert.sheets import give_back
from seguncert.stochastic import stochastic_heads

METHODS = {
    "One pass": "none",
    "MC dropout": "mc-dropout",
    "Flips and scales": "tta",
    "MC dropout + flips and scales": "mc-dropout+tta",
    "Whole masks of its stochastic head": "stochastic-head",
    "Ensemble of the models": "ensemble",
}
WAITING = 32  # requests at most in the queue; more are told that the page is busy
UPLOAD = "200mb"
SWEEP = 20.0  # seconds
MOST_PIXELS = 50_000_000  # of a photo


@lru_cache(maxsize=8)
def _model(name: str) -> Model:
    return load_model(name)


class Page:
    """The page for some models, and what its visitors look at."""

    def __init__(self, models: Sequence[str]):
        self.first = models[0]
        self.names = list(dict.fromkeys([*models, *bundled_names()]))
        for name in models:
            _model(name)  # an unknown name is an error now, not at the first click
        self.sessions = Sessions(PLACE / "sessions")

    def models(self, name: str, method: str) -> list[Model]:
        """The model of that name; for an ensemble all that have its classes."""
        if name not in self.names:
            raise ValueError(f"model: expected one of {', '.join(self.names)}. Received: {name!r}")
        if "ensemble" not in method:
            return [_model(name)]
        classes = _model(name).classes
        return [_model(each) for each in self.names if _model(each).classes == classes]

    @property
    def methods(self) -> list[tuple[str, str]]:
        """Those that can be chosen: an ensemble only of two models of the same classes, a stochastic head only where one is."""
        nets = [_model(name) for name in self.names]
        classes, missing = [net.classes for net in nets], set()
        if all(classes.count(each) == 1 for each in classes):
            missing.add("ensemble")
        if not any(stochastic_heads(net.module) for net in nets):
            missing.add("stochastic-head")
        return [(title, method) for title, method in METHODS.items() if method not in missing]

    def look(
        self, photo: str | None, model: str, method: str, samples: int, calibrated: bool, secret: str | None,
        progress: Any = None,
    ) -> Sight:  # fmt: skip
        """Analyse the photo at a path for a session. Raises gr.Error with one line for whatever is wrong."""
        if photo is None:
            raise gr.Error("Choose a photo first.", print_exception=False)
        try:
            session = self.sessions.of(secret)
            maps = [*OF_SOFTMAX, *(OF_SAMPLES if method != "none" else ())]
            started = time.perf_counter()
            with self.sessions.running(session, "photo") as stop:

                def tell(done: int, wanted: int) -> bool:
                    if progress is not None:
                        progress((done, wanted), unit="samples" if takes_samples(method) else "views")
                    return not stop.is_set()

                read = read_image(photo, max_pixels=MOST_PIXELS)
                nets, chosen = self.models(model, method), settings(method, samples, calibrated)
                result = analyse(nets, read.rgb, maps=maps, progress=tell, **chosen)
            result = replace(with_sets(result), note="; ".join(filter(None, [read.note, result.note])))
            sight = Sight(Path(photo).name, result, time.perf_counter() - started)
            self.sessions.keep(session, sight)
            return sight
        except (ValueError, OSError) as error:
            raise self.told(error) from None

    def pixel(self, token: str, x: int, y: int) -> dict[str, Any]:
        """The numbers of one pixel; see `Sight.pixel`. Raises gr.Error."""
        try:
            return self.sessions.sight(token).pixel(int(x), int(y))
        except (ValueError, TypeError, OverflowError) as error:
            raise self.told(error) from None

    def told(self, error: Exception, places: Mapping[Path, str] | None = None) -> gr.Error:
        """What a visitor reads of an error: its one line, without places of this machine, and as text, not as HTML."""
        line = f"failed here: {error.strerror}" if isinstance(error, OSError) else str(error)
        for place, name in (places or {}).items():
            line = line.replace(str(place), name)
        return gr.Error(html.escape(line.replace(f"{PLACE}{os.sep}", "")), print_exception=False)

    def stopper(self, kind: str) -> Callable[[gr.Request], None]:
        """What a button does that stops the visitor's run of that kind."""

        def stop(request: gr.Request) -> None:
            self.sessions.of(request.session_hash).stop(kind)

        return stop


def build(models: str | Sequence[str]) -> gr.Blocks:
    """The page with the first of `models` chosen at the start."""
    page = Page([models] if isinstance(models, str) else models)
    with gr.Blocks(title="seguncert", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as blocks:
        gr.Markdown("# Where can I trust this mask?", elem_id="headline")
        with gr.Tab("Image"):
            _image_tab(page)
        with gr.Tab("Folder"):
            folder_tab(page, _file)
        with gr.Tab("Select"):
            select_tab(page)
        with gr.Tab("Calibration"):
            labels_tab(page)
        with gr.Accordion("What do these maps mean, and what can they not tell?", open=False):
            gr.Markdown(_file("explain.md"))
            gr.HTML(_known_truth(), elem_id="truth")

        def leave(request: gr.Request) -> None:
            page.sessions.end(request.session_hash)

        blocks.unload(leave)
    blocks.seguncert = page
    return blocks


def _file(name: str) -> str:
    return resources.files("seguncert.apps").joinpath("page", name).read_text(encoding="utf-8")


def _known_truth() -> str:
    """A drawn picture whose exact posterior is known beside what nets say of it; part of the page, so that nothing is fetched."""
    picture = resources.files("seguncert.apps").joinpath("page", "truth.png").read_bytes()
    return _file("truth.html").replace("PICTURE", f"data:image/png;base64,{base64.b64encode(picture).decode()}")


def _image_tab(page: Page) -> None:
    def pixel(at: Any) -> dict[str, Any]:
        try:
            return page.sessions.sight(at["token"]).pixel(int(at["x"]), int(at["y"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            return {"error": str(error) if isinstance(error, ValueError) else "pixel: expected token, x and y."}

    with gr.Row(elem_id="controls"):
        photo = photo_input(
            label="Photo: drop, paste or choose one", height=150,
            sources=["upload", "clipboard"], buttons=[], elem_id="photo", min_width=240,
        )  # fmt: skip
        with gr.Column(min_width=280):
            model = gr.Dropdown(page.names, value=page.first, label="Model", elem_id="model")
            calibrated = gr.Checkbox(True, label="Calibrated, where the model has a calibration", elem_id="calibrated")
        with gr.Column(min_width=300):
            method = gr.Radio(page.methods, value="none", label="How the net is asked", elem_id="method")
            samples = gr.Slider(*SAMPLES, 20, step=1, label="Samples", visible=False, elem_id="samples")
            with gr.Row():
                again = gr.Button("Look again", variant="primary", elem_id="again")
                stop = gr.Button("Stop, keep what there is", visible=False, elem_id="stop")
    pictures = write_samples(EXAMPLES)
    rows = [(str(file), name) for name in pictures if name in page.names for file in sorted(pictures[name].iterdir())]
    examples = gr.Dataset(
        components=["image"], samples=[[file] for file, _ in rows], type="index", layout="gallery", label="Examples",
        elem_id="examples",
    )  # fmt: skip
    viewer = gr.HTML(
        None, html_template=_file("viewer.html"), css_template=_file("viewer.css"), js_on_load=_file("viewer.js"),
        server_functions=[pixel], elem_id="viewer", apply_default_css=False,
    )  # fmt: skip

    def draw(photo, model, method, samples, calibrated, request: gr.Request, progress=gr.Progress()):
        if photo is None:
            return None
        return page.look(photo, model, method, samples, calibrated, request.session_hash, progress).payload()

    def example(number: int) -> tuple[str, str]:
        if not isinstance(number, int) or not 0 <= number < len(rows):
            raise gr.Error(f"example: expected 0 to {len(rows) - 1}.", print_exception=False)
        return rows[number]

    inputs = [photo, model, method, samples, calibrated]
    shown = {"api_visibility": "private", "concurrency_id": "net", "show_progress": "full"}
    changed = [photo.upload, photo.clear, model.input, method.input, samples.input, calibrated.input, again.click]
    drawn = gr.on(changed, draw, inputs, viewer, trigger_mode="always_last", **shown)
    chosen = examples.click(example, examples, [photo, model], api_visibility="private", queue=False)
    for run in (drawn, chosen.success(draw, inputs, viewer, trigger_mode="always_last", **shown)):
        run.failure(lambda: None, None, viewer, api_visibility="private", queue=False)  # not the photo before
    method.change(
        lambda chosen: (gr.update(visible=takes_samples(chosen)), gr.update(visible=chosen != "none")),
        method, [samples, stop], api_visibility="private", queue=False,
    )  # fmt: skip
    stop.click(page.stopper("photo"), None, None, api_visibility="private", queue=False)
    _interface(page, inputs)


def _interface(page: Page, inputs: list[Any]) -> None:
    """What programs call, beside the page: /look, /pixel, /models."""

    def look(photo, model, method, samples, calibrated, request: gr.Request) -> dict[str, Any]:
        """Analyse a photo: classes with area and mean confidence, means of the maps, least trusted regions, and a token."""
        return page.look(photo, model, method, samples, calibrated, request.session_hash).summary()

    def pixel(token: str, x: int, y: int) -> dict[str, Any]:
        """Probabilities of one pixel of a photo that /look gave the token of, before and after calibration."""
        return page.pixel(token, x, y)

    def models() -> list[dict[str, Any]]:
        """Names and classes of the models that can be chosen."""
        return [{"name": name, "classes": list(_model(name).classes)} for name in page.names]

    gr.Button(visible=False).click(look, inputs, gr.JSON(visible=False), api_name="look", concurrency_id="net")
    gr.api(pixel, api_name="pixel", queue=False)
    gr.api(models, api_name="models", queue=False)


def launch(
    models: str | Sequence[str], host: str = "127.0.0.1", port: int | None = 7860, auth: list[tuple[str, str]] | None = None,
    wait: bool = True,
) -> tuple[gr.Blocks, str]:  # fmt: skip
    """Serve the page until Ctrl-C; without `wait`, return it and its address. A port of None is any that is free.

    Raises ValueError where the port is taken, ModelError for an unknown model.
    """
    clean()
    blocks = build(models).queue(max_size=WAITING, default_concurrency_limit=1)
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, share=False, auth=auth, max_file_size=UPLOAD, allowed_paths=[], show_error=True,
            quiet=True, prevent_thread_lock=True, ssr_mode=False, enable_monitoring=False, mcp_server=False, pwa=False,
            footer_links=["api"], run_history=False, css=_file("page.css"),
        )  # fmt: skip
    except OSError:
        raise ValueError(
            f"port: expected one that is free on {host}. Received: {port}; choose another with --port"
        ) from None
    threading.Thread(target=_sweep, args=[blocks], daemon=True).start()
    if wait:
        print(f"the page is at {address}; Ctrl-C ends it", flush=True)
        blocks.block_thread()
    return blocks, address


def _sweep(blocks: gr.Blocks) -> None:
    while blocks.is_running:
        time.sleep(SWEEP)
        blocks.seguncert.sessions.sweep()
        give_back()  # what visitors had who left


__all__ = ["Forgotten", "Page", "build", "launch"]
