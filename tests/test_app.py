"""The page's answers; and that the page can be built."""

import subprocess
import sys

import cv2
import gradio as gr
import numpy as np
import pytest

import seguncert
from seguncert.apps import app


@pytest.mark.parametrize("shown", ["confidence", "entropy", app.CLASSES])
def test_look_shows_what_analyse_says(pictures, small_model, shown):
    photo = next(pictures.rglob("*.png"))
    result = seguncert.analyse(seguncert.load_model(small_model), photo)
    picture, words = app.look(str(photo), str(small_model), shown)
    H, W = result.labels.shape
    assert picture.dtype == np.uint8 and picture.shape[0] > H and picture.shape[1] >= W
    if shown != app.CLASSES:
        assert (picture == result.overlay(shown)).all()
    c = np.bincount(result.labels.ravel()).argmax()
    share, sure = (result.labels == c).mean(), result.maps["confidence"][result.labels == c].mean()
    assert f"| {result.classes[c]} | {100 * share:.1f} % | {sure:.2f} |" in words and "Not calibrated" in words


def test_what_cannot_be_read_is_said_in_one_line(tmp_path, small_model):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(gr.Error, match="cannot decode") as error:
        app.look(str(tmp_path / "text.png"), str(small_model), "entropy")
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(gr.Error, match="Choose a photo first"):
        app.look(None, str(small_model), "entropy")


def test_large_pictures_are_shown_smaller(tmp_path, small_model):
    cv2.imwrite(str(tmp_path / "large.jpg"), np.zeros((2000, 1000, 3), np.uint8))
    assert max(app.look(str(tmp_path / "large.jpg"), str(small_model), "margin")[0].shape) == app.SHOWN


def test_the_page_can_be_built_and_an_unknown_model_is_an_error(small_model):
    """In a process of its own: gradio leaves an event loop open, which is a warning, which is an error here."""
    code = f"from seguncert.apps import app; print(*app.build({str(small_model)!r}).get_api_info()['named_endpoints'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["/look"]
    with pytest.raises(seguncert.ModelError):
        app.build("nosuch")
