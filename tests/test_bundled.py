"""The bundled models on pictures of their kind, the samples, and the demo."""

import csv
import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import SHARED

import seguncert
from seguncert.apps import samples
from seguncert.evaluation import measure, total
from seguncert.image import read_image
from seguncert.labels import find_pairs

needs_camvid = pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="CamVid is not at hand")
needs_nuclei = pytest.mark.skipif(not (SHARED / "nuclei").is_dir(), reason="the nuclei data is not at hand")


def some_pairs(name, step):
    return find_pairs(SHARED / name / "val" / "images", SHARED / name / "val" / "labels")[::step]


@needs_camvid
def test_street_on_some_val_photos():
    values = total(measure(seguncert.load_model("street"), some_pairs("camvid", 12), 11).values(), 11).compute()
    assert values["miou"] > 0.6 and values["accuracy"] > 0.92 and values["nll"] < 0.3


@needs_nuclei
def test_nuclei_on_some_val_images():
    counts = total(measure(seguncert.load_model("nuclei"), some_pairs("nuclei", 6), None).values(), 2)
    assert counts.compute()["iou.1"] > 0.8


@needs_camvid
def test_a_12_megapixel_photo_is_no_worse_than_the_same_at_its_own_size():
    model = seguncert.load_model("street")
    right, pixels = np.zeros(2), 0
    for image, label in some_pairs("camvid", 25):
        rgb, labels = read_image(image).rgb, cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
        large = cv2.resize(rgb, (4000, 3000), interpolation=cv2.INTER_CUBIC)
        shown = seguncert.analyse(model, rgb, maps=["confidence"]).labels
        result = seguncert.analyse(model, large, maps=["confidence"])
        assert result.labels.shape == result.maps["confidence"].shape == (3000, 4000)
        shown_large = cv2.resize(
            result.labels.astype(np.uint8), labels.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT
        )
        right += [((each == labels) & (labels < 11)).sum() for each in (shown, shown_large)]
        pixels += (labels < 11).sum()
    small_accuracy, large_accuracy = right / pixels
    assert large_accuracy >= small_accuracy - 0.001


def test_drawn_nuclei_are_found():
    rgb = samples.draw_nuclei(*samples.DRAWINGS["drawn-sparse.png"])
    result = seguncert.analyse(seguncert.load_model("nuclei"), rgb)
    bright = cv2.GaussianBlur(rgb[..., 0], (0, 0), 1.5) > 35
    assert 0.02 < bright.mean() < 0.3
    assert (bright & (result.labels == 1)).sum() / (bright | (result.labels == 1)).sum() > 0.8


def test_drawings_are_the_same_each_time_and_are_not_written_twice(tmp_path):
    folders = samples.write_samples(tmp_path)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    assert set(folders) == {"street", "nuclei"} and len(stamps) == 5
    samples.write_samples(tmp_path)
    assert stamps == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}


def test_demo_says_where_to_look(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "seguncert.cli", "demo", "demo"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    places = [line.strip() for line in run.stdout.splitlines() if line.endswith("report.html")]
    assert places == [str(tmp_path / "demo" / name / "report.html") for name in ("street", "nuclei")]
    for name, count in (("street", 2), ("nuclei", 3)):
        with open(tmp_path / "demo" / name / "images.csv", newline="") as file:
            assert [row["status"] for row in csv.DictReader(file)] == ["ok"] * count
