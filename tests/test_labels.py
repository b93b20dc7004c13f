"""Labels that are read, and those that must not pass."""

import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from seguncert.labels import IGNORED, find_pairs, read_label


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


def test_a_palette_holds_classes_not_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 11]], np.uint8))
    picture.putpalette([200, 10, 10] * 12)
    picture.save(tmp_path / "a.png")
    assert read_label(tmp_path / "a.png", 2, 11).tolist() == [[0, 1, IGNORED]]


def test_void_may_be_any_number_and_need_not_occur(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[0, 1, 65535]], np.uint16))
    assert read_label(tmp_path / "a.png", 2, 65535).tolist() == [[0, 1, IGNORED]]
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[0, 1]], np.uint8))
    assert read_label(tmp_path / "a.png", 2, 7).tolist() == [[0, 1]]
    assert read_label(tmp_path / "a.png", 2, 0).tolist() == [[IGNORED, 1]], "a class may be what does not count"


def test_labels_cut_short_are_not_filled_up(tmp_path):
    file = tmp_path / "a.png"
    cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8))
    whole = file.read_bytes()
    for length in (0, 20, 100, len(whole) // 2):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a.png: expected an 8- or 16-bit one-channel PNG"):
            read_label(file, 2, None)


def test_labels_of_few_bits_or_many_pixels_are_refused(tmp_path):
    Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="Received: 1 bits of colour type 0; convert it"):
        read_label(tmp_path / "a.png", 2, None)
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((2, 2), np.uint8))
    data = bytearray((tmp_path / "b.png").read_bytes())
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    (tmp_path / "b.png").write_bytes(data)
    with pytest.raises(ValueError, match="expected at most 64000000 pixels. Received: 100000x100000"):
        read_label(tmp_path / "b.png", 2, None)


def test_more_classes_than_an_8_bit_label_can_hold(tmp_path):
    with pytest.raises(ValueError, match="labels: expected at most 255 classes. Received: 256"):
        read_label(tmp_path / "a.png", 256, None)
