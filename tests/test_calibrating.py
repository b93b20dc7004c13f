"""From a labelled folder to a calibration, and from there to maps, exports and figures."""

import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from calls import call
from conftest import CARD, CONFIG
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from seguncert.batch import export
from seguncert.calibrating import calibrate, table_of
from seguncert.calibration import CalibrationError, load_calibration
from seguncert.evaluation import evaluate
from seguncert.fitting import HARM
from seguncert.image import read_image
from seguncert.model import build_net, load_model, save_model
from seguncert.predict import predict_logits
from seguncert.run import analyse, legend_note

VOID, SHARPER = 255, 8.0  # of labels drawn from softmax(8 z), the best temperature is an eighth


def shift(name):
    """Sequences differ a little."""
    return {"s1": 0.2, "s2": -0.2}.get(name.split("_")[0], 0.0)


def label_of(net, file, seed):
    """Drawn from what the net would say if it were sharper; some void."""
    rng = np.random.default_rng(seed)
    z = predict_logits(net, read_image(file).rgb).double().numpy()
    p = np.exp(log_softmax(np.exp(shift(file.name)) * SHARPER * z, 0))
    label = (p.cumsum(0) < rng.random(z.shape[1:])).sum(0).clip(max=2).astype(np.uint8)
    label[:, :3] = VOID
    return label


@pytest.fixture(scope="module")
def net(small_model):
    return load_model(small_model)


@pytest.fixture(scope="module")
def source(tmp_path_factory, net):
    """Nine images of the sequences s1, s2 and s10, and labels by two raters."""
    folder, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(5)
    for kind in ("images", "labels", "second"):
        (folder / kind / "a").mkdir(parents=True)
    for k in range(9):
        name = f"s{(1, 2, 10)[k % 3]}_{k}"
        blocks = rng.integers(0, 256, (6, 8, 3), np.uint8)
        file = folder / "images" / "a" / f"{name}.png"
        cv2.imwrite(str(file), cv2.resize(blocks, (72, 60) if k % 2 else (80, 48), interpolation=cv2.INTER_CUBIC))
        for number, kind in enumerate(("labels", "second")):
            cv2.imwrite(str(folder / kind / "a" / f"{name}.png"), label_of(net, file, [k, number]))
    return folder


@pytest.fixture
def folder(source, tmp_path):
    shutil.copytree(source, tmp_path / "f")
    return tmp_path / "f"


def calibrated(folder, model, out="c.json", **settings):
    settings = {"ignore_index": VOID, "workers": 1, "calibrator": "temperature"} | settings
    return calibrate(folder / "images", folder / "labels", folder / out, model, **settings)


def pixels_of(folder, net_of, kinds=("labels",)):
    """Logits (N, C) and shares of the raters, of all labelled pixels of all images, in float64."""
    logits, shares = [], []
    for file in sorted((folder / "images").rglob("*.png")):
        z = predict_logits(net_of(file), read_image(file).rgb).double().numpy()
        said = [cv2.imread(str(folder / kind / "a" / file.name), -1) for kind in kinds]
        votes = np.array([sum(label == c for label in said) for c in range(3)], float)
        labelled = votes.sum(0) > 0
        logits.append(z[:, labelled].T)
        shares.append((votes[:, labelled] / votes[:, labelled].sum(0)).T)
    return np.concatenate(logits), np.concatenate(shares)


def best_of(logits, shares):
    """ln β of the least NLL."""
    return minimize_scalar(
        lambda eta: -(shares * log_softmax(np.exp(eta) * logits, 1)).sum(1).mean(), bounds=(-4, 4), method="bounded",
        options={"xatol": 1e-9},
    ).x  # fmt: skip


def files_of(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


# Fits of folders


def test_the_temperature_of_a_folder_is_that_of_all_its_pixels(source, folder, net):
    logits, shares = pixels_of(source, lambda _: net)
    best = best_of(logits, shares)
    assert best == pytest.approx(np.log(SHARPER), abs=0.1)
    whole = calibrated(folder, net, all_pixels=True)
    assert whole.calibration.calibrator.constant == pytest.approx(best, abs=2e-5)
    assert (whole.pixels, whole.pictures, whole.failed) == (len(logits), 9, {})
    drawn = calibrated(folder, net)
    assert drawn.calibration.calibrator.constant == pytest.approx(best, abs=0.3)
    labelled = [(cv2.imread(str(file), -1) != VOID).sum() for file in (source / "labels").rglob("*.png")]
    assert drawn.pixels == sum(-(-n // 20) for n in labelled)
    protocol = load_calibration(folder / "c.json").protocol
    assert (protocol["pictures"], protocol["pixels"], protocol["raters"], protocol["ignore_index"]) == (9, drawn.pixels, 1, VOID)  # fmt: skip


def test_raters_are_fitted_together(source, folder, net):
    logits, shares = pixels_of(source, lambda _: net, ("labels", "second"))
    assert (shares.max(1) < 1).mean() > 0.05
    both = calibrated(folder, net, all_pixels=True, raters=[folder / "second"])
    assert both.calibration.calibrator.constant == pytest.approx(best_of(logits, shares), abs=2e-5)
    assert both.calibration.protocol["raters"] == 2
    once, twice = (calibrated(folder, net, raters=raters) for raters in ([], [folder / "labels"]))
    assert once.calibration.calibrator.constant == pytest.approx(twice.calibration.calibrator.constant, abs=1e-6)


def test_pixels_that_one_rater_left_out_are_the_others(source, folder, net):
    for file in (folder / "second").rglob("*.png"):
        label = cv2.imread(str(file), -1)
        label[:, :40] = VOID
        cv2.imwrite(str(file), label)
    logits, shares = pixels_of(folder, lambda _: net, ("labels", "second"))
    both = calibrated(folder, net, all_pixels=True, raters=[folder / "second"])
    assert both.pixels == len(logits)
    assert both.calibration.calibrator.constant == pytest.approx(best_of(logits, shares), abs=2e-5)


def stand_in(folder, leave_out, seed=1, classes=3):
    torch.manual_seed(seed)
    save_model(folder, build_net(CONFIG | {"classes": classes}), CONFIG | {"classes": classes}, CARD | {
        "name": "part", "classes": list("abcd"[:classes]), "recipe": {"leave_out": leave_out},
    })  # fmt: skip
    return folder


def test_nets_that_were_not_trained_on_a_sequence_stand_in_on_it(source, folder, net, tmp_path):
    part = load_model(stand_in(tmp_path / "part", ["s1"]))
    found = calibrated(folder, net, all_pixels=True, left_out=[tmp_path / "part"])
    expected = best_of(*pixels_of(source, lambda file: part if file.name.startswith("s1_") else net))
    assert found.calibration.calibrator.constant == pytest.approx(expected, abs=2e-5)
    assert expected != pytest.approx(best_of(*pixels_of(source, lambda _: net)), abs=1e-2)
    assert expected != pytest.approx(best_of(*pixels_of(source, lambda file: part if file.name.startswith("s1") else net)), abs=1e-3)  # fmt: skip
    assert found.calibration.protocol["left_out"] == {"s1": part.sha256}
    assert found.calibration.model["sha256"] == net.sha256, "it is the whole net's calibration"


@pytest.mark.parametrize(
    "leave_out, classes, text",
    [
        ([], 3, "left-out: expected a net of the classes of small that was trained with --leave-out. Received: .*part, with 3 classes, trained without nothing."),
        (["s1"], 4, "Received: .*part, with 4 classes, trained without s1."),
        (["s3"], 3, "left-out: expected a net without one of the sequences s1, s10, s2. Received: one without s3."),
    ],
)  # fmt: skip
def test_nets_that_cannot_stand_in(folder, net, tmp_path, leave_out, classes, text):
    stand_in(tmp_path / "part", leave_out, classes=classes)
    with pytest.raises(CalibrationError, match=text):
        calibrated(folder, net, left_out=[tmp_path / "part"])
    assert not (folder / "c.json").exists()


def test_the_file_does_not_depend_on_workers_or_other_files(folder, net):
    for workers in (1, 3):
        calibrated(folder, net, f"{workers}.json", workers=workers, calibrator="neighbourhood")
    assert (folder / "1.json").read_bytes() == (folder / "3.json").read_bytes()
    before = calibrated(folder, net).calibration.calibrator
    shutil.copy(folder / "images" / "a" / "s1_0.png", folder / "images" / "a0.png")
    cv2.imwrite(str(folder / "labels" / "a0.png"), np.full((48, 80), VOID, np.uint8))
    assert calibrated(folder, net).calibration.calibrator == before, "nothing but void, though it comes first"


def test_another_seed_draws_other_pixels(folder, net):
    one, other = (calibrated(folder, net, seed=seed) for seed in (0, 1))
    assert one.pixels == other.pixels and one.calibration.calibrator != other.calibration.calibrator
    assert other.calibration.protocol["seed"] == 1


def test_what_is_wrong_with_an_image_is_named_and_the_rest_goes_on(folder, net):
    images, labels = folder / "images" / "a", folder / "labels" / "a"
    (images / "s1_0.png").write_bytes((images / "s1_0.png").read_bytes()[:300])
    cv2.imwrite(str(labels / "s2_1.png"), np.zeros((60, 71), np.uint8))
    cv2.imwrite(str(labels / "s10_2.png"), np.full((48, 80), 7, np.uint8))
    steps = []
    found = calibrated(folder, net, progress=lambda *counts: steps.append(counts))
    assert list(found.failed) == ["a/s10_2.png", "a/s1_0.png", "a/s2_1.png"] and found.pictures == 6
    assert "label 7" in found.failed["a/s10_2.png"] and "PNG" in found.failed["a/s1_0.png"]
    assert "expected the size of its image, 72x60. Received: 71x60" in found.failed["a/s2_1.png"]
    assert all("\n" not in error for error in found.failed.values())
    assert steps[-1] == (6, 3, 9)


def test_an_image_on_which_the_net_fails_is_named(folder, net, monkeypatch):
    import seguncert.walk as module

    predict, calls = module.predict_photo, []

    def sometimes(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of\nmemory")
        return predict(*arguments, **more)

    monkeypatch.setattr(module, "predict_photo", sometimes)
    found = calibrated(folder, net)
    assert list(found.failed.values()) == ["failed inside: RuntimeError: out of memory"] and found.pictures == 8


@pytest.mark.parametrize("calibrator", ["temperature", "auto"])
def test_nothing_to_fit_on(folder, net, calibrator):
    with pytest.raises(CalibrationError, match=r"Received: 9 that failed, the first is a/s10_2.png: .*label 255.*Set --ignore-index"):  # fmt: skip
        calibrated(folder, net, calibrator=calibrator, ignore_index=None)
    for file in (folder / "labels").rglob("*.png"):
        cv2.imwrite(str(file), np.full_like(cv2.imread(str(file), -1), VOID))
    with pytest.raises(CalibrationError, match="Received: none; are all labels the ignore index" if calibrator != "auto" else "Received: 0. Name"):  # fmt: skip
        calibrated(folder, net, calibrator=calibrator)
    assert not (folder / "c.json").exists()


def test_one_image_is_enough_for_a_kind_by_name_but_not_for_auto(folder, net):
    for file in sorted((folder / "images" / "a").iterdir())[1:]:
        file.unlink()
    for kind in ("temperature", "vector", "local", "neighbourhood", "isotonic"):
        assert calibrated(folder, net, calibrator=kind, all_pixels=True).calibration.kind == kind
    with pytest.raises(CalibrationError, match="expected at least two pictures with labels, to hold one out. Received: 1"):  # fmt: skip
        calibrated(folder, net, calibrator="auto")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"calibrator": "magic"}, "calibrator: expected auto or one of temperature.*Received: 'magic'"),
        ({"out": "c.txt"}, "OUT: expected a file ending in .json in a folder that is there. Received: .*c.txt"),
        ({"out": "nowhere/c.json"}, "OUT: expected a file ending in .json in a folder that is there"),
        ({"out": "images"}, "OUT: expected a file ending in .json"),
        ({"method": "magic"}, "method: expected none"),
        ({"samples": 3}, "samples: expected with it a method with mc-dropout or stochastic-head. Received: 'none'"),
        ({"scale": "huge"}, "9 that failed, the first is .*scale: expected auto, native or a factor"),
    ],
)
def test_calls_that_are_wrong_are_named(folder, net, change, text):
    (folder / "c.json").write_text("mine")
    with pytest.raises(ValueError, match=text):
        calibrated(folder, net, **change)
    assert (folder / "c.json").read_text() == "mine"


def test_auto_says_what_it_tried(folder, net):
    found = calibrated(folder, net, calibrator="auto", all_pixels=True)
    assert found.calibration.protocol["held_out"] == {"folds": 3, "by": "sequence", "clusters": 3}
    none, temperature, *richer = found.candidates
    assert (
        temperature.interval[0] > 0
        and temperature.worst <= HARM
        and temperature.nll < none.nll
        and found.calibration.kind != "none"
    )
    assert [each.kind for each in found.candidates if each.chosen] == [found.calibration.kind]
    assert [each.kind for each in richer] == ["class-conditional", "vector", "local", "neighbourhood"]
    assert found.about.startswith(f"{found.calibration.kind}, fitted on {found.pixels} pixels of 9 images")
    header, rows = table_of(found)
    assert {len(header)} == {len(row) for row in rows} and rows[1][:3] == ["temperature", f"{temperature.nll:.4f}", "none"]  # fmt: skip
    saved = json.loads((folder / "c.json").read_text())["measured"]["candidates"]
    assert [each["kind"] for each in saved] == [each.kind for each in found.candidates]


# What a calibration does


@pytest.mark.parametrize("kind", ["temperature", "class-conditional", "local", "neighbourhood", "isotonic", "vector"])
def test_maps_of_analyse_and_export_are_calibrated_and_labels_stay(folder, net, small_model, kind):
    calibrated(folder, net, calibrator=kind, all_pixels=True)
    file, image = folder / "c.json", folder / "images" / "a" / "s2_1.png"
    before, after = (analyse(net, image, calibration=each) for each in ("none", file))
    assert (before.calibration, after.calibration) == ("none", f"{kind}, fitted on 9 pictures")
    np.testing.assert_allclose(after.probabilities.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(after.maps["confidence"], after.probabilities.max(0), atol=1e-6)
    assert after.maps["confidence"].mean() > before.maps["confidence"].mean() + 0.1, "the labels are of a sharper net"
    assert (after.labels == after.probabilities.argmax(0)).all()
    plain, done = (
        export(folder / "images", folder / out, small_model, calibration=each, workers=2, format="npy")
        for out, each in (("plain", "none"), ("done", file))
    )
    assert (plain.done, done.done) == (9, 9)
    one, other = files_of(folder / "plain"), files_of(folder / "done")
    for name in ("a/s2_1.png/confidence.npy", "a/s2_1.png/entropy.npy", "a/s2_1.png/margin.npy"):
        stored, wanted = np.load(folder / "done" / name), after.maps[name.split("/")[-1][:-4]]
        np.testing.assert_allclose(stored, wanted, atol=1e-4)  # another number of threads rounds otherwise
        assert one[name] != other[name]
    if kind != "vector":
        assert (before.labels == after.labels).all()
        labels = [name for name in one if name.endswith("labels.png")]
        assert len(labels) == 9 and all(one[name] == other[name] for name in labels)
    run = json.loads(other["run.json"])
    assert run["calibration"] == after.calibration and run["calibrator"]["kind"] == kind
    assert json.loads(one["run.json"])["calibration"] == "none" and "calibrator" not in json.loads(one["run.json"])
    assert after.calibration in other["report.html"].decode()
    assert legend_note("confidence", after.calibration) == f"calibrated: {after.calibration}"
    assert not np.array_equal(after.overlay(), before.overlay())


@pytest.mark.parametrize("kind", ["temperature", "neighbourhood"])
def test_evaluate_judges_what_analyse_gives(folder, net, kind):
    calibrated(folder, net, calibrator=kind, all_pixels=True)
    found = evaluate(folder / "images", folder / "labels", folder / "out", net, ignore_index=VOID,
                     calibration=folder / "c.json", workers=1, replicates=5).metrics  # fmt: skip
    for stage, choice in ((found, folder / "c.json"), (found["before"], "none")):
        losses = []
        for image in sorted((folder / "images").rglob("*.png")):
            label = cv2.imread(str(folder / "labels" / "a" / image.name), -1)
            y, x = np.nonzero(label != VOID)
            losses.append(-np.log(analyse(net, image, calibration=choice).probabilities[label[y, x], y, x]))
        assert stage["nll"] == pytest.approx(np.concatenate(losses).mean(), abs=1e-5)
    assert found["nll"] < found["before"]["nll"] - 0.05 and found["accuracy"] == found["before"]["accuracy"]
    assert found["ece"] < found["before"]["ece"] / 2
    assert found["protocol"]["calibration"] == f"{kind}, fitted on 9 pictures"


def test_one_by_the_model_is_taken_by_itself(folder, small_model, tmp_path):
    beside = tmp_path / "beside"
    shutil.copytree(small_model, beside)
    calibrated(folder, beside, beside / "calibration-none.json")
    net, image = load_model(beside), folder / "images" / "a" / "s2_1.png"
    assert analyse(net, image).calibration == "temperature, fitted on 9 pictures"
    for other in ({"calibration": "none"}, {"scale": "native"}, {"method": "tta"}):
        assert analyse(net, image, **other).calibration == "none"


def test_samples_are_pooled_then_calibrated(folder, small_model):
    places = {"segmentation_head": 0.3}
    sampled = {"method": "mc-dropout", "samples": 4}
    found = calibrated(folder, small_model, insert_dropout=places, all_pixels=True, **sampled)
    assert found.calibration.sampling["method"] == "mc-dropout" and found.calibration.protocol["samples"] == 4
    net, image = load_model(small_model, "auto", places), folder / "images" / "a" / "s2_1.png"
    before, after = (analyse(net, image, calibration=each, **sampled) for each in ("none", folder / "c.json"))
    assert (before.labels == after.labels).all()
    for name in ("mutual_information", "variance"):
        assert (before.maps[name] == after.maps[name]).all()
    factor = np.exp(found.calibration.calibrator.constant)
    expected = torch.from_numpy(before.probabilities).double().log().mul(factor).softmax(0).numpy()
    np.testing.assert_allclose(after.probabilities, expected, atol=1e-5)
    with pytest.raises(CalibrationError, match="c.json: expected one that was fitted with method none. Received: one fitted with method mc-dropout"):  # fmt: skip
        analyse(net, image, calibration=folder / "c.json")
    with pytest.raises(CalibrationError, match="fitted with inserted_dropout"):
        analyse(load_model(small_model, "auto", {"segmentation_head": 0.2}), image, calibration=folder / "c.json", **sampled)  # fmt: skip


@pytest.mark.parametrize("kind", ["local", "neighbourhood"])
def test_a_picture_unlike_all_that_were_seen_is_said_to_be_one(folder, net, small_model, kind):
    calibrated(folder, net, calibrator=kind, all_pixels=True)
    images = folder / "images" / "a"
    for image in sorted(images.iterdir()):
        assert analyse(net, image, calibration=folder / "c.json").note == "", "it was fitted on this one"
    noise = np.random.default_rng(0).integers(0, 2, (60, 72, 3), np.uint8) * 255
    cv2.imwrite(str(images / "strange.png"), noise)
    note = analyse(net, images / "strange.png", calibration=folder / "c.json").note
    assert note.startswith("unfamiliar to the calibration: mean doubt 0.")
    assert analyse(net, images / "strange.png").note == ""
    export(folder / "images", folder / "out", small_model, calibration=folder / "c.json", workers=1)
    rows = (folder / "out" / "images.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows if "unfamiliar" in row] == ["a/strange.png"]
    assert "unfamiliar to the calibration" in (folder / "out" / "report.html").read_text()


# The command line


def test_the_commands(folder, small_model):
    def run(*arguments):
        found = subprocess.run([sys.executable, "-m", "seguncert.cli", *map(str, arguments)], capture_output=True, text=True)  # fmt: skip
        return found.returncode, found.stdout, found.stderr

    (folder / "images" / "a" / "s1_0.png").write_bytes(b"")
    file, model = folder / "c.json", ("--model", small_model)
    code, out, said = run("calibrate", folder / "images", folder / "labels", file, *model, "--ignore-index", VOID, "--all-pixels")  # fmt: skip
    assert code == 1 and "failed: a/s1_0.png: " in said and f"calibration: {file}" in said.replace("\n", "")
    assert "worst fold" in out and "temperature" in out and load_calibration(file).kind != "none"
    code, _, said = call(
        "export", folder / "images", folder / "out", *model, "--calibration", file, "--scale", "native"
    )
    assert code == 2 and "expected one that was fitted with scale native" in said and len(said.splitlines()) == 2
    assert not (folder / "out").exists()
