"""Quality against plain loops over pixels, and folders that are not as they should be."""

import csv
import json
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from calls import call
from sklearn.metrics import average_precision_score, confusion_matrix, jaccard_score, log_loss, roc_auc_score
from torch import nn

from seguncert.calibration import Calibration
from seguncert.corruptions import CORRUPTIONS, corrupt, picture_seed
from seguncert.evaluation import evaluate, in_order, measure, total
from seguncert.image import read_image
from seguncert.model import Model, load_model, wrap_model
from seguncert.predict import predict_logits, rows_at_size
from seguncert.run import Settings
from seguncert.scores import Scores
from seguncert.store import StoreError

VOID = 255


@pytest.fixture
def folder(tmp_path):
    """Images of three drives and labels with void, for a model of three classes."""
    rng = np.random.default_rng(1)
    for k in range(8):
        name, (H, W) = f"{'ab'[k % 2]}/drive_{k}", ((60, 72), (48, 80))[k % 2]
        for kind, suffix in (("images", "jpg"), ("labels", "png")):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            blocks = (
                rng.integers(0, 256, (6, 8, 3), np.uint8)
                if kind == "images"
                else rng.choice([0, 1, 2, VOID], (6, 8), p=[0.4, 0.3, 0.2, 0.1]).astype(np.uint8)
            )
            picture = cv2.resize(
                blocks, (W, H), interpolation=cv2.INTER_CUBIC if kind == "images" else cv2.INTER_NEAREST
            )
            cv2.imwrite(str(tmp_path / kind / f"{name}.{suffix}"), picture)
    return tmp_path


@pytest.fixture(scope="session")
def model(small_model):
    return load_model(small_model)


def judged(folder, model, out="out", calibrator=None, **settings):
    settings = {"ignore_index": VOID, "workers": 1, "replicates": 20} | settings
    if calibrator is not None:
        loaded = model if isinstance(model, Model) else load_model(model, "auto", settings.get("insert_dropout"))
        settings["calibration"] = Calibration(
            calibrator, *Settings(settings.get("method", "none")).fitted_for([loaded])
        )
    return evaluate(folder / "images", folder / "labels", folder / out, model, **settings)


def rows_of(folder, out="out"):
    with open(folder / out / "metrics.csv", newline="") as table:
        return list(csv.DictReader(table))


def pixels_of(folder, model, scale=1.0):
    """Labels and float64 probabilities of all labelled pixels, image by image."""
    for file in sorted((folder / "images").rglob("*.jpg")):
        label = cv2.imread(str(folder / "labels" / file.relative_to(folder / "images").with_suffix(".png")), -1)
        logits = torch.cat(
            [band for _, band in rows_at_size(predict_logits(model, read_image(file).rgb), *label.shape)], 1
        )
        valid = label != VOID
        yield label[valid].astype(int), (logits.double() * scale).softmax(0).numpy()[:, valid].T


def ece(forecast, event, bins=15):
    m = np.minimum((forecast * bins).astype(int), bins - 1)
    return sum(abs((forecast - event)[m == k].sum()) for k in range(bins)) / len(forecast)


@pytest.mark.parametrize("calibrated", [False, True])
def test_figures_equal_those_of_plain_float64(folder, model, calibrated):
    result = judged(folder, model, calibrator=Sharper() if calibrated else None)
    saved = json.loads((folder / "out" / "metrics.json").read_text())
    assert saved == result.metrics and (result.done, result.failed) == (8, 0)
    for metrics, scale in [(saved, 2.0), (saved["before"], 1.0)] if calibrated else [(saved, 1.0)]:
        images = list(pixels_of(folder, model, scale))
        y, p = np.concatenate([y for y, _ in images]), np.concatenate([p for _, p in images])
        shown, confidence = p.argmax(1), p.max(1)
        expected = {
            "pixels": len(y), "images": 8, "accuracy": (shown == y).mean(), "nll": log_loss(y, p, labels=[0, 1, 2]),
            "miou": jaccard_score(y, shown, labels=[0, 1, 2], average="macro", zero_division=0),
            "brier": ((p - np.eye(3)[y]) ** 2).sum(1).mean(), "ece": ece(confidence, shown == y),
            "ece_classwise": np.mean([ece(p[:, c], y == c) for c in range(3)]),
            "ece_image_mean": np.mean([ece(p.max(1), p.argmax(1) == y) for y, p in images]),
            "ece_image_sd": np.std([ece(p.max(1), p.argmax(1) == y) for y, p in images], ddof=1),
            "error_auroc.confidence": roc_auc_score(shown != y, 1 - confidence),
            "error_ap.confidence": average_precision_score(shown != y, 1 - confidence),
            "error_auroc.entropy": roc_auc_score(shown != y, -(p * np.log(p)).sum(1)),
        }  # fmt: skip
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, abs=2e-4 if "error" in name else 1e-6), (
                name
            )  # doubt is in bins
        assert metrics["iou.b"] == pytest.approx(jaccard_score(y == 1, shown == 1), abs=1e-9)
        assert confusion_matrix(y, shown).sum() == metrics["pixels"]
        low, high = metrics["nll_interval"]
        assert low <= metrics["nll"] <= high
    (y, p), row = images[0], rows_of(folder)[0]
    if not calibrated:
        assert float(row["overconfidence"]) == pytest.approx(p.max(1).mean() - (p.argmax(1) == y).mean(), abs=1e-5)


@dataclass(frozen=True)
class Sharper:
    """Logits times two."""

    kind = "sharper"
    keeps_labels = True

    def look(self, logits, photo):
        return None

    def unfamiliar(self, logits):
        return ""

    def __call__(self, logits, features):
        return 2 * logits


def test_before_calibration_is_what_there_is_without_it_and_the_change_is_paired(folder, model):
    plain = judged(folder, model, out="plain").metrics
    both = judged(folder, model, calibrator=Sharper()).metrics
    assert both["before"] == {name: value for name, value in plain.items() if name != "protocol"}
    assert both["change"]["nll"] == pytest.approx(both["nll"] - plain["nll"])
    assert both["change"]["accuracy_interval"] == [0, 0], "the same clusters are drawn before and after"
    assert (plain["protocol"]["calibration"], both["protocol"]["calibration"]) == (
        "none",
        "sharper, fitted on ? pictures",
    )
    assert {"before_nll", "nll"} <= set(rows_of(folder)[0]) and "before_nll" not in rows_of(folder, "plain")[0]


def test_a_calibrator_gets_what_it_saw_of_the_whole_at_the_photos_size(folder, model):
    seen, photos = [], []

    class Looking(Sharper):
        def look(self, logits, photo):
            photos.append(photo)
            return torch.stack([logits.sum(0), logits[0]])

        def __call__(self, logits, features):
            seen.append((logits, features))
            return logits

    judged(folder, model, calibrator=Looking())
    files = [folder / "images" / row["path"] for row in rows_of(folder)]
    assert len(photos) == 8 and all(map(np.array_equal, photos, (read_image(file).rgb for file in files)))
    assert len(seen) >= 8
    for logits, features in seen:
        torch.testing.assert_close(features, torch.stack([logits.sum(0), logits[0]]), atol=1e-4, rtol=1e-4)


def test_of_a_photo_made_worse_a_calibrator_sees_what_it_became(folder, model):
    photos = []

    class Looking(Sharper):
        def look(self, logits, photo):
            photos.append(photo)

    judged(folder, model, calibrator=Looking(), corruptions=["gaussian-noise"], corrupted=2)
    paths = [row["path"] for row in rows_of(folder)]
    worse = [
        corrupt(read_image(folder / "images" / path).rgb, "gaussian-noise", severity, picture_seed(0, path))
        for path in paths
        for severity in range(1, 6)
    ]
    assert sum(any(np.array_equal(photo, each) for photo in photos) for each in worse) == 2 * 5


def test_a_calibration_that_gives_nan_fails_image_by_image(folder, model):
    class Broken(Sharper):
        def __call__(self, logits, features):
            return logits * torch.nan

    with pytest.raises(ValueError, match="Received: 8 that failed, the first is a/drive_0.jpg: .*NaN"):
        judged(folder, model, calibrator=Broken())
    assert len(rows_of(folder)) == 8 and not (folder / "out" / "metrics.json").exists()


def test_what_is_written_does_not_depend_on_the_number_of_workers(folder, small_model):
    sampled = {"method": "mc-dropout", "samples": 3, "insert_dropout": {"segmentation_head": 0.3}}
    for workers in (1, 3):
        judged(folder, small_model, out=str(workers), workers=workers, protocol="lts", **sampled)
    for name in ("metrics.json", "metrics.csv", "report.html"):
        assert (folder / "1" / name).read_bytes() == (folder / "3" / name).read_bytes()


@pytest.mark.parametrize("calibrated", [False, True])
def test_photos_made_worse_are_judged_as_by_plain_float64(folder, model, calibrated):
    plain = judged(folder, model, out="plain", calibrator=Sharper() if calibrated else None).metrics
    metrics = judged(
        folder, model, calibrator=Sharper() if calibrated else None, corruptions=["jpeg", "gaussian-noise"], corrupted=3
    ).metrics
    found, about = metrics["corruptions"], metrics["corruptions"]["about"]
    assert {name: metrics[name] for name in plain if name != "protocol"} == {
        name: plain[name] for name in plain if name != "protocol"
    }
    assert (about["images"], about["chosen"], len(found)) == (3, "3 evenly spaced of 8 with a label", 12)
    files = sorted((folder / "images").rglob("*.jpg"))
    chosen = [files[k] for k in (1, 4, 6)]
    for condition in ("clean", "jpeg.5", "gaussian-noise.2"):
        for figures, scale in (
            [(found[condition], 2), (found[condition]["before"], 1)] if calibrated else [(found[condition], 1)]
        ):
            truth, probabilities = [], []
            for file in chosen:
                path = file.relative_to(folder / "images")
                label, rgb = cv2.imread(str(folder / "labels" / path.with_suffix(".png")), -1), read_image(file).rgb
                if condition != "clean":
                    name, severity = condition.split(".")
                    rgb = corrupt(rgb, name, int(severity), picture_seed(0, path.as_posix()))
                logits = torch.cat([band for _, band in rows_at_size(predict_logits(model, rgb), *label.shape)], 1)
                truth.append(label[label != VOID].astype(int))
                probabilities.append((logits.double() * scale).softmax(0).numpy()[:, label != VOID].T)
            y, p = np.concatenate(truth), np.concatenate(probabilities)
            expected = {
                "accuracy": (p.argmax(1) == y).mean(), "nll": log_loss(y, p, labels=[0, 1, 2]), "confidence": p.max(1).mean(),
                "ece": ece(p.max(1), p.argmax(1) == y),
                "miou": jaccard_score(y, p.argmax(1), labels=[0, 1, 2], average="macro", zero_division=0),
            }  # fmt: skip
            for name, value in expected.items():
                assert figures[name] == pytest.approx(value, abs=1e-6), (condition, name)
    assert found["jpeg.5"]["nll"] != found["clean"]["nll"] and about["pixels"] == len(y)


def test_photos_made_worse_do_not_depend_on_the_number_of_workers(folder, small_model):
    sampled = {"method": "mc-dropout", "samples": 2, "insert_dropout": {"segmentation_head": 0.3}, "seed": 3}
    for workers in (1, 3):
        judged(
            folder,
            small_model,
            out=str(workers),
            workers=workers,
            corruptions=["fog", "motion-blur"],
            corrupted=4,
            **sampled,
        )
    for name in ("metrics.json", "metrics.csv", "report.html"):
        assert (folder / "1" / name).read_bytes() == (folder / "3" / name).read_bytes()
    about = json.loads((folder / "1" / "metrics.json").read_text())["corruptions"]["about"]
    assert about["seed"] == 3 and about["chosen"] == "4 evenly spaced of 8 with a label"


def test_a_photo_that_fails_only_when_it_is_dark_says_so(folder):
    class Blind(nn.Module):
        def forward(self, x):
            dark = x.min() >= 0 and x.mean() < 0.15
            return torch.cat([x, x.mean(1, keepdim=True)], 1)[:, :3] * (torch.nan if dark else 1)

    (folder / "labels" / "b" / "drive_1.png").unlink()
    result = judged(
        folder,
        wrap_model(Blind(), ["a", "b", "c"], mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        corruptions=["darkness"],
        corrupted=2,
    )
    errors = {row["path"]: row["error"] for row in rows_of(folder) if row["status"] == "failed"}
    assert (result.done, result.failed) == (5, 3) and "no label" in errors.pop("b/drive_1.jpg")
    assert len(errors) == 2 and all(error.startswith("darkness of severity ") for error in errors.values())
    assert result.metrics["corruptions"]["about"]["images"] == 0 and result.metrics["images"] == 5


def test_maps_of_samples_are_judged_and_not_calibrated(folder, small_model):
    result = judged(
        folder, small_model, method="mc-dropout", samples=3, seed=4, insert_dropout={"segmentation_head": 0.3},
        calibrator=Sharper(),
    )  # fmt: skip
    assert 0 < result.metrics["error_auroc.mutual_information"] < 1 and "aurc.variance" in result.metrics
    sums = {name: result.metrics[name] for name in ("error_auroc.mutual_information", "aurc.variance")}
    assert sums == {name: result.metrics["before"][name] for name in sums}
    assert result.metrics["protocol"]["samples"] == 3 and result.metrics["protocol"]["intervals"]["seed"] == 4


def test_frames_of_a_video_are_taken_in_order(folder, model):
    carried = judged(folder, model, out="carried", carry=0.5, workers=4).metrics
    alone = judged(folder, model, out="alone").metrics
    assert carried["nll"] != alone["nll"] and carried["images"] == 8
    assert [row["path"] for row in rows_of(folder, "carried")] == [row["path"] for row in rows_of(folder, "alone")]


def test_what_is_wrong_with_an_image_is_a_row_and_the_rest_goes_on(folder, model):
    images, labels = folder / "images" / "a", folder / "labels" / "a"
    photo = (images / "drive_0.jpg").read_bytes()
    (images / "drive_0.jpg").write_bytes(photo[: len(photo) // 2])
    (labels / "drive_2.png").unlink()
    cv2.imwrite(str(labels / "drive_4.png"), np.zeros((60, 71), np.uint8))
    cv2.imwrite(str(labels / "drive_6.png"), np.full((60, 72), 7, np.uint8))
    (images / "folder.png").mkdir()
    progress = []
    result = judged(folder, model, progress=lambda *counts: progress.append(counts))
    assert (result.done, result.failed, result.metrics["images"]) == (4, 5, 4)
    assert progress[0] == (0, 0, 9) and progress[-1] == (4, 5, 9)
    errors = {row["path"]: row["error"] for row in rows_of(folder) if row["status"] == "failed"}
    assert "complete JPEG" in errors["a/drive_0.jpg"] and "no label" in errors["a/drive_2.jpg"]
    assert "expected the size of its image, 72x60. Received: 71x60" in errors["a/drive_4.jpg"]
    assert "4320 pixels have label 7" in errors["a/drive_6.jpg"] and "no label" in errors["a/folder.png"]
    assert all("\n" not in error for error in errors.values())
    page = (folder / "out" / "report.html").read_text()
    assert "5 images could not be judged" in page and "4320 pixels have label 7" in page


def test_labels_with_void_while_none_is_declared(folder, model):
    with pytest.raises(ValueError, match="quality: .* 8 that failed, the first is .* label 255.*Set --ignore-index"):
        judged(folder, model, ignore_index=None)
    assert {row["status"] for row in rows_of(folder)} == {"failed"}


def test_an_image_of_nothing_but_void_counts_for_nothing(folder, model):
    cv2.imwrite(str(folder / "labels" / "a" / "drive_0.png"), np.full((60, 72), VOID, np.uint8))
    result = judged(folder, model)
    row = rows_of(folder)[0]
    assert (row["status"], row["pixels"], row["accuracy"], row["overconfidence"]) == ("ok", "0", "", "")
    assert result.metrics["images"] == 8
    for file in (folder / "labels").rglob("*.png"):
        cv2.imwrite(str(file), np.full_like(cv2.imread(str(file), -1), VOID))
    with pytest.raises(ValueError, match="Received: 8 images in which no pixel has a label but the ignore index"):
        judged(folder, model, out="void")


def test_one_class_and_one_image_have_no_interval(tmp_path, model):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((40, 40, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "labels" / "a.png"), np.zeros((40, 40), np.uint8))
    metrics = judged(tmp_path, model, ignore_index=None).metrics
    assert metrics["nll_interval"] == [None, None] and metrics["protocol"]["intervals"]["number"] == 1
    assert metrics["ece_boundary"] is None and metrics["protocol"]["ignore_index"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "With one cluster there is no interval" in page


@pytest.mark.parametrize(
    "change, text",
    [
        ({"images": "nowhere"}, "IMAGES: expected a folder. Received: .*nowhere, which is not there"),
        ({"labels": "images"}, "LABELS: expected another folder than IMAGES"),
        ({"out": "labels"}, "OUT: expected a folder of its own"),
        ({"images": "empty"}, "Received: 0 images, 8 PNG, and no pair among them"),
        ({"labels": "empty"}, "Received: 8 images, 0 PNG, and no pair among them"),
        ({"boundary": -1}, "boundary: expected 0 or more. Received: -1"),
        ({"replicates": 0}, "replicates: expected 1 or more. Received: 0"),
        ({"method": "magic"}, "method: expected none"),
        ({"protocol": "other"}, "protocol: expected one of lts, or none. Received: 'other'"),
        ({"corruptions": ["snow"]}, "corruptions: expected all, or some of gaussian-noise, .* Received: 'snow'"),
        (
            {"corruptions": "all", "carry": 0.5},
            "corruptions: expected photos by themselves, without carry. Received: carry 0.5",
        ),
        ({"corrupted": 0}, "corrupted: expected 1 or more. Received: 0"),
    ],
)
def test_calls_that_are_wrong_are_named(folder, model, change, text):
    (folder / "empty").mkdir()
    given = {"images": "images", "labels": "labels", "out": "out"} | change
    places = [folder / given.pop(name) for name in ("images", "labels", "out")]
    with pytest.raises(
        (ValueError, TypeError) if "protocol" in change else ValueError, match=None if "protocol" in change else text
    ):
        evaluate(*places, model, ignore_index=VOID, **given)


def test_an_output_folder_with_other_files_is_left_alone(folder, model):
    (folder / "out").mkdir()
    (folder / "out" / "run.json").touch()
    with pytest.raises(StoreError, match=r"out holds other files \('run.json'\). Give an empty or new folder"):
        judged(folder, model)


def test_results_come_in_the_order_of_the_tasks_and_few_are_under_way():
    begun, gate = [], threading.Event()

    def task(number):
        begun.append(number)
        if number == 0:
            gate.wait(10)
        return number

    with closing(in_order((partial(task, number) for number in range(50)), 3)) as results:
        threading.Timer(0.2, gate.set).start()
        assert next(results) == 0
        assert len(begun) <= 7
        assert list(results) == list(range(1, 50))


def test_a_stop_ends_what_is_under_way_and_writes_nothing(folder, model):
    def stop(done, failed, all_):
        if done == 2:
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        judged(folder, model, progress=stop, workers=2)
    assert not any((folder / "out").iterdir()) and torch.get_num_threads() == threads
    assert threading.active_count() == 1 or not any("ThreadPool" in each.name for each in threading.enumerate())


def test_the_command_says_what_it_found(folder, small_model, monkeypatch):
    (folder / "labels" / "a" / "drive_0.png").unlink()
    command = [
        sys.executable,
        "-m",
        "seguncert.cli",
        "evaluate",
        *(str(folder / name) for name in ("images", "labels", "out")),
    ]
    command += ["--model", str(small_model)]
    again = ["--rater", str(folder / "labels")]
    run = subprocess.run([*command, "--ignore-index", "255", *again], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert json.loads((folder / "out" / "metrics.json").read_text())["protocol"]["raters"] == 2
    assert "Mean IoU" in run.stdout and "ECE, top label" in run.stdout
    assert "7 images judged, 1 failed" in run.stderr and "report.html" in run.stderr
    worse = ["--ignore-index", "255", "--corruptions", "fog, jpeg", "--corrupted", "2"]
    _, table, told = call(*command[3:], *worse)
    assert "severity 3" in table and "JPEG" in table, told
    assert "made worse: 2 images judged, 2 evenly spaced of 7 with a label" in told
    monkeypatch.setenv("COLUMNS", "300")
    _, about, _ = call("evaluate", "--help")
    assert all(name in about for name in CORRUPTIONS) and "1 + 5 x" in about
    for wrong in ([], ["--ignore-index", "void"]):
        code, _, told = call(*command[3:], *wrong)
        assert code == 2 and len(told.splitlines()) == 1
        assert "Give --ignore-index N, or --ignore-index none." in told


def test_nothing_but_ignored_pixels_is_an_error():
    with pytest.raises(ValueError, match="expected at least one labelled pixel. Received: none"):
        total([Scores.empty(3)], 3)


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
