"""Quality against plain loops, and labels that must not pass."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from seguncert.evaluation import IGNORED, find_pairs, measure, read_label, total
from seguncert.model import wrap_model
from seguncert.scores import Scores


def test_nothing_but_ignored_pixels_is_an_error():
    with pytest.raises(ValueError, match="expected at least one labelled pixel. Received: none"):
        total([Scores.empty(3)], 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_are_read_and_checked(tmp_path, dtype):
    file = tmp_path / "a.png"
    cv2.imwrite(str(file), np.array([[0, 1, 11]], dtype))
    assert read_label(file, 2, 11).tolist() == [[0, 1, IGNORED]]
    with pytest.raises(ValueError, match=r"a.png: 1 pixels have label 11. Expected: 0 to 1, or .* \(none is set\)"):
        read_label(file, 2, None)


def test_labels_that_are_colours_or_broken(tmp_path):
    file = tmp_path / "a.png"
    cv2.imwrite(str(file), np.zeros((2, 2, 3), np.uint8))
    for _ in range(2):
        with pytest.raises(ValueError, match="expected an 8- or 16-bit one-channel PNG"):
            read_label(file, 2, None)
        file.write_bytes(b"no picture")


def test_pairs_go_by_relative_path(tmp_path):
    for name in ("images/x/a.jpg", "images/b.webp", "images/notes.txt", "labels/x/a.png", "labels/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pairs = find_pairs(tmp_path / "images", tmp_path / "labels")
    assert [(i.name, m.relative_to(tmp_path / "labels").as_posix()) for i, m in pairs] == [
        ("b.webp", "b.png"),
        ("a.jpg", "x/a.png"),
    ]
    (tmp_path / "labels" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images have no PNG of the same name .* the first is .*b.webp"):
        find_pairs(tmp_path / "images", tmp_path / "labels")
    with pytest.raises(ValueError, match="which has none"):
        find_pairs(tmp_path / "labels" / "y", tmp_path / "labels")


def test_measure_runs_a_model_over_files(tmp_path):
    net = nn.Conv2d(3, 2, 1)
    with torch.no_grad():  # class 1 where red is above its mean
        net.weight.zero_()
        net.weight[1, 0], net.bias[:] = 50.0, 0.0
    red = np.random.default_rng(0).integers(0, 2, (40, 50)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "i.png"), np.dstack([red * 0, red * 0, red * 255]))
    cv2.imwrite(str(tmp_path / "l.png"), red)
    model = wrap_model(net, ["a", "b"], mean=(0.5, 0.0, 0.0))
    (counts,) = measure(model, [(tmp_path / "i.png", tmp_path / "l.png")], None).values()
    assert counts.compute()["accuracy"] == 1.0 and counts.compute()["nll"] < 1e-6
    cv2.imwrite(str(tmp_path / "l.png"), red[:-1])
    with pytest.raises(ValueError, match=r"l.png: expected the size of its image, .40, 50.. Received: .39, 50."):
        measure(model, [(tmp_path / "i.png", tmp_path / "l.png")], None)
