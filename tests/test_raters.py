"""Judged by several raters: figures against a plain loop over pixels and raters; one rater given twice is one rater."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from seguncert.calibration import Calibration
from seguncert.calibrators import Scaling
from seguncert.evaluation import evaluate
from seguncert.image import read_image
from seguncert.model import load_model
from seguncert.predict import predict_logits, rows_at_size
from seguncert.run import Settings
from seguncert.scores import Scores, boundary_band

VOID, C, FOLDERS = 255, 3, ("labels", "second", "third")


@pytest.fixture
def folder(tmp_path):
    """Six images, and labels by three raters who differ in every fifth block, and in what they leave void."""
    rng = np.random.default_rng(2)
    for k in range(6):
        H, W = ((40, 56), (48, 40))[k % 2]
        truth = rng.integers(0, C, (5, 6)).astype(np.uint8)
        said = [np.where(rng.random((5, 6)) < 0.2, rng.integers(0, C, (5, 6)), truth) for _ in FOLDERS]
        said = [np.where(rng.random((5, 6)) < 0.3, VOID, each).astype(np.uint8) for each in said]
        for kind, blocks in zip(("images", *FOLDERS), (rng.integers(0, 256, (5, 6, 3), np.uint8), *said), strict=True):
            (tmp_path / kind).mkdir(exist_ok=True)
            picture = cv2.resize(blocks, (W, H), interpolation=cv2.INTER_NEAREST)
            cv2.imwrite(str(tmp_path / kind / f"drive{k // 2}_{k}.png"), picture)
    return tmp_path


@pytest.fixture(scope="module")
def model(small_model):
    return load_model(small_model)


def judged(folder, model, raters=(), out="out", **settings):
    settings = {"ignore_index": VOID, "replicates": 20, "workers": 1} | settings
    raters = [folder / name for name in raters]
    return evaluate(folder / "images", folder / "labels", folder / out, model, raters=raters, **settings)


def pixels_of(folder, model):
    """Shares (N, C) of the raters, float64 probabilities (N, C) and whether at a boundary, image by image."""
    for file in sorted((folder / "images").iterdir()):
        said = np.stack([cv2.imread(str(folder / name / file.name), -1) for name in FOLDERS])
        bands = rows_at_size(predict_logits(model, read_image(file).rgb), *said.shape[1:])
        p = torch.cat([band for _, band in bands], 1).double().softmax(0).numpy()
        shares, probabilities, edges = [], [], []
        for y, x in np.ndindex(*said.shape[1:]):
            votes = [int(each) for each in said[:, y, x] if each != VOID]
            if votes:
                shares.append([votes.count(c) / len(votes) for c in range(C)])
                probabilities.append(p[:, y, x])
                edges.append(any(boundary_band(each, 3, ignore_index=VOID)[y, x] for each in said) if y < 8 else None)
        yield np.array(shares), np.array(probabilities), edges


def ece(forecast, event):
    m = np.minimum((forecast * 15).astype(int), 14)
    return sum(abs((forecast - event)[m == k].sum()) for k in range(15)) / len(forecast)


def test_figures_equal_those_of_a_plain_loop_over_pixels_and_raters(folder, model):
    metrics = judged(folder, model, FOLDERS[1:]).metrics
    images = list(pixels_of(folder, model))
    t, p = (np.concatenate([image[k] for image in images]) for k in (0, 1))
    assert {1, 2, 3, 6} <= {round(1 / share) for share in t[t > 0]} | {6}, "one, two and three raters of a pixel"
    shown, confidence = p.argmax(1), p.max(1)
    right = t[np.arange(len(t)), shown]
    both = np.array([[t[shown == j, i].sum() for j in range(C)] for i in range(C)])
    ious = [both[c, c] / (both[c].sum() + both[:, c].sum() - both[c, c]) for c in range(C)]
    certain_first = np.argsort(-confidence, kind="stable")
    wrong_twice, doubt_twice = np.repeat([1, 0], len(t)), np.tile(1 - confidence, 2)
    weights = np.concatenate([1 - right, right])
    expected = {
        "pixels": len(t), "images": 6, "accuracy": right.mean(), "miou": np.mean(ious), "iou.b": ious[1],
        "nll": -(t * np.log(p)).sum(1).mean(), "brier": ((p - t) ** 2).sum(1).mean(),
        "ece": ece(confidence, right), "ece_classwise": np.mean([ece(p[:, c], t[:, c]) for c in range(C)]),
        "ece_image_mean": np.mean([ece(p.max(1), t[np.arange(len(t)), p.argmax(1)]) for t, p, _ in images]),
        "uncertainty": right.mean() * (1 - right.mean()),
        "error_auroc.confidence": roc_auc_score(wrong_twice, doubt_twice, sample_weight=weights),
        "error_ap.confidence": average_precision_score(wrong_twice, doubt_twice, sample_weight=weights),
        "aurc.confidence": ((1 - right[certain_first]).cumsum() / np.arange(1, len(t) + 1)).mean(),
    }  # fmt: skip
    for name, value in expected.items():
        bins = "error" in name or "aurc" in name  # of doubt
        assert metrics[name] == pytest.approx(value, abs=1e-3 if bins else 1e-6), name
    low, high = metrics["nll_interval"]
    assert low <= metrics["nll"] <= high


def test_a_boundary_is_one_of_any_rater(folder, model):
    for file in (folder / "third").iterdir():  # whose labels are flat
        cv2.imwrite(str(file), np.zeros_like(cv2.imread(str(file), -1)))
    alone = judged(folder, model, ["third"], out="alone").metrics
    for name in ("labels", "second"):
        for file in (folder / name).iterdir():
            cv2.imwrite(str(file), np.full_like(cv2.imread(str(file), -1), VOID) if name == "second" else cv2.imread(str(folder / "third" / file.name), -1))  # fmt: skip
    assert alone["ece_boundary"] is not None
    assert judged(folder, model, ["second", "third"]).metrics["ece_boundary"] is None


def test_a_rater_given_twice_is_one_rater(folder, model):
    calibration = Calibration(Scaling("temperature", 0.5), *Settings().fitted_for([model]))
    given = {"calibration": calibration, "corruptions": ["fog"], "corrupted": 2, "maps": ["entropy"]}
    once, twice = (judged(folder, model, raters, out, **given).metrics for raters, out in [((), "once"), (["labels"], "twice")])  # fmt: skip
    about, protocol = once.pop("protocol"), twice.pop("protocol")
    assert (about["raters"], protocol["raters"]) == (1, 2) and "target" not in about

    def same(one, other, name=""):
        assert type(one) is type(other), name
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for key in one:
                same(one[key], other[key], f"{name} {key}")
        elif isinstance(one, list):
            for pair in zip(one, other, strict=True):
                same(*pair, name)
        else:
            assert one == (pytest.approx(other, abs=1e-9, rel=1e-9) if isinstance(one, float) else other), name

    same(once, twice)
    assert (folder / "once" / "metrics.csv").read_text() == (folder / "twice" / "metrics.csv").read_text()
    pages = [(folder / out / "report.html").read_text() for out in ("once", "twice")]
    assert protocol["target"] in pages[1] and "raters" not in pages[0]


def test_what_is_wrong_with_the_labels_of_one_rater_is_a_row(folder, model):
    (folder / "second" / "drive0_0.png").unlink()
    cv2.imwrite(str(folder / "third" / "drive0_1.png"), np.zeros((48, 41), np.uint8))
    cv2.imwrite(str(folder / "third" / "drive1_2.png"), np.full((40, 56), C, np.uint8))
    result = judged(folder, model, FOLDERS[1:])
    rows = csv.DictReader((folder / "out" / "metrics.csv").read_text().splitlines())
    errors = {row["path"]: row["error"] for row in rows if row["status"] == "failed"}
    assert (result.done, result.failed) == (3, 3) == (result.metrics["images"], len(errors))
    assert "no label by 1 of 3 raters: there is no PNG" in errors["drive0_0.png"]
    assert "third/drive0_1.png: expected the size of its image, 40x48. Received: 41x48" in errors["drive0_1.png"]
    assert "third/drive1_2.png: 2240 pixels have label 3" in errors["drive1_2.png"]


@pytest.mark.parametrize(
    "given, text",
    [
        ({"raters": ["nowhere"]}, "rater: expected a folder. Received: .*nowhere, which is not there"),
        ({"raters": ["images"]}, "rater: expected another folder than IMAGES"),
        ({"raters": ["second"], "out": "second"}, "OUT: expected a folder of its own"),
        ({"raters": ["empty"]}, "PNG of the same names in .*empty. Received: 6 images, 0 PNG, and no pair among them"),
        ({"raters": ["second"], "protocol": "lts"}, "protocol lts: expected labels of one rater. Received: those of 2"),
    ],
)
def test_calls_that_are_wrong_are_named(folder, model, given, text):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=text):
        judged(folder, model, **given)


def test_more_raters_than_declared(folder):
    scores, logits = Scores.empty(C, raters=2), torch.zeros(C, 2, 2)
    with pytest.raises(ValueError, match="as many raters as declared, or fewer. Received: those of 3"):
        scores.update_raters(logits, np.zeros((3, 2, 2), np.uint8), ignore_index=VOID)
    scores.update_raters(logits, np.zeros((2, 2), np.uint8), ignore_index=None)
    assert scores.compute()["pixels"] == 4, "a picture with one rater among those with two"


def test_the_result_is_json(folder, model):
    metrics = judged(folder, model, FOLDERS[1:]).metrics
    assert json.loads((folder / "out" / "metrics.json").read_text()) == metrics
    assert metrics["protocol"]["more_labels"] == [str((folder / name).resolve()) for name in FOLDERS[1:]]
