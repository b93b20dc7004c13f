"""Quality against plain loops, and labels that must not pass."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from seguncert.evaluation import IGNORED, Counts, find_pairs, measure, read_label, total
from seguncert.model import wrap_model


def plain_loop(logits, labels):
    """The textbook, pixel by pixel in float64."""
    C, H, W = logits.shape
    hits, shown, true, nll, pixels = np.zeros(C), np.zeros(C), np.zeros(C), 0.0, 0
    for y in range(H):
        for x in range(W):
            if labels[y, x] == IGNORED:
                continue
            values = logits[:, y, x].astype(np.float64)
            probs = np.exp(values) / np.exp(values).sum()
            nll -= np.log(probs[labels[y, x]])
            shown[values.argmax()] += 1
            true[labels[y, x]] += 1
            hits[labels[y, x]] += values.argmax() == labels[y, x]
            pixels += 1
    union = shown + true - hits
    return np.mean([hits[c] / union[c] for c in range(C) if union[c]]), hits.sum() / pixels, nll / pixels


def drawn(seed, C=4, size=(9, 14)):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C - 1, size).astype(np.uint8)  # the last class never occurs
    labels[rng.random(size) < 0.2] = IGNORED
    return rng.normal(0, 2, (C, *size)).astype(np.float32), labels


def test_counts_equal_a_plain_loop_and_parts_merge_to_the_whole():
    logits, labels = drawn(0)
    whole = Counts.empty(4)
    whole.update(torch.from_numpy(logits), labels)
    miou, accuracy, nll = plain_loop(logits, labels)
    values = whole.compute()
    assert (values["miou"], values["accuracy"], values["nll"]) == pytest.approx((miou, accuracy, nll), abs=1e-6)
    assert values["pixels"] == (labels != IGNORED).sum()
    parts = [Counts.empty(4) for _ in range(3)]
    for part, rows in zip(parts, (slice(0, 2), slice(2, 3), slice(3, 9)), strict=True):
        part.update(torch.from_numpy(logits[:, rows]), labels[rows])
    merged = total(parts, 4)
    assert (merged.confusion_CC == whole.confusion_CC).all() and merged.nll == pytest.approx(whole.nll)


def test_a_class_that_neither_occurs_nor_is_shown_does_not_count():
    counts = Counts.empty(3)
    counts.update(torch.tensor([2.0, 0.0, -9.0]).view(3, 1, 1), np.zeros((1, 1), np.uint8))
    assert np.isnan(counts.iou_C()[2]) and counts.compute()["miou"] == 1.0


def test_nothing_but_ignored_pixels_is_an_error():
    counts = Counts.empty(3)
    counts.update(torch.zeros(3, 2, 2), np.full((2, 2), IGNORED, np.uint8))
    with pytest.raises(ValueError, match="expected at least one labelled pixel. Received: none"):
        counts.compute()


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
