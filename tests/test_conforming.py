"""From a labelled folder to conformal sets, their promise, and from there to maps, exports and pages."""

import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import typer
from calls import call
from scipy.special import softmax

from seguncert import cli_fit, image, job, tiles
from seguncert.batch import export
from seguncert.calibration import Calibration, load_calibration
from seguncert.calibrators import Scaling
from seguncert.conforming import conform, table_of
from seguncert.evaluation import evaluate
from seguncert.image import read_image
from seguncert.model import load_model
from seguncert.predict import predict_logits
from seguncert.run import Settings, analyse
from seguncert.sets import load_sets

VOID, SHARPER, IMAGES = 255, 6.0, 48


@pytest.fixture(scope="module")
def net(small_model):
    return load_model(small_model)


@pytest.fixture(scope="module")
def temperature(net):
    """As if fitted on the labels below: their net is so much sharper, on average."""
    return Calibration(Scaling("temperature", np.log(SHARPER)), *Settings().fitted_for([net]), {"pictures": 9})


@pytest.fixture(scope="module")
def source(tmp_path_factory, net):
    """Images of two sizes, and labels drawn from what the net would say if it were sharper, in some images more than in others."""
    folder, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(3)
    for kind in ("images", "labels"):
        (folder / kind / "a").mkdir(parents=True)
    for k in range(IMAGES):
        file = folder / "images" / "a" / f"{k:02}.png"
        blocks = rng.integers(0, 256, (6, 8, 3), np.uint8)
        cv2.imwrite(str(file), cv2.resize(blocks, (40, 32) if k % 2 else (48, 24), interpolation=cv2.INTER_CUBIC))
        z = predict_logits(net, read_image(file).rgb).double().numpy()
        chances = softmax(SHARPER * np.exp(rng.normal(0, 0.7)) * z, 0).cumsum(0)
        label = (chances < rng.random(z.shape[1:])).sum(0).clip(max=2).astype(np.uint8)
        label[:, :3] = VOID
        cv2.imwrite(str(folder / "labels" / "a" / file.name), label)
    return folder


def conformed(folder, model, out, **settings):
    settings = {"ignore_index": VOID, "workers": 1, "calibration": "none"} | settings
    return conform(folder / "images", folder / "labels", out, model, **settings)


def odds_of(p_CN, kind):
    """s/(1 − s) of every class at every pixel of float64 probabilities, one by one."""
    odds_CN = np.empty(p_CN.shape)
    for n, p in enumerate(p_CN.T):
        for c in range(len(p)):
            if kind == "aps":
                odds_CN[c, n] = p[p > p[c]].sum() / p[p <= p[c]].sum()
            else:
                odds_CN[c, n] = 0 if kind == "lac" and c == p.argmax() else np.delete(p, c).sum() / p[c]
    return odds_CN


# The promise


@pytest.mark.parametrize("covered", [None, 0.7])
def test_the_promise_holds_on_random_halves(source, net, temperature, tmp_path, covered):
    """Fitted by the command's function, judged without it: thresholds from the file, probabilities in float64."""
    alpha, n, names = 0.15, IMAGES // 2, sorted(os.listdir(source / "images" / "a"))
    odds = {}  # of the true class, at each labelled pixel
    for name in names:
        z_CN = predict_logits(net, read_image(source / "images" / "a" / name).rgb).double().flatten(1).numpy()
        label_N = cv2.imread(str(source / "labels" / "a" / name), -1).ravel()
        at_N = np.flatnonzero(label_N != VOID)
        odds[name] = odds_of(softmax(SHARPER * z_CN, 0), "lac")[label_N[at_N], at_N]
    rng, found = np.random.default_rng(0), []
    for split in range(25):
        fit = set(rng.choice(names, n, replace=False))
        half = tmp_path / str(split)
        for kind in ("images", "labels"):
            (half / kind).mkdir(parents=True)
            for name in fit:
                os.link(source / kind / "a" / name, half / kind / name)
        conformed(half, net, half / "c.json", alpha=alpha, covered=covered, calibration=temperature)
        (limit,) = json.loads((half / "c.json").read_text())["sets"]["odds"]

        def loss(name, limit):
            missed = (odds[name] > limit).mean()
            return missed if covered is None else missed > 1 - covered

        enough, tighter = (sum(loss(name, each * limit) for name in fit) + 1 for each in (1, 0.98))
        assert enough <= alpha * (n + 1) + 1e-9 < tighter, "the smallest threshold that will do"
        found.append(np.mean([loss(name, limit) for name in names if name not in fit]))
    assert np.mean(found) <= alpha + 3 * np.std(found, ddof=1) / np.sqrt(len(found))


@pytest.mark.parametrize(
    "settings",
    [{"kind": "lac"}, {"kind": "lac-empty", "alpha": 0.6}, {"kind": "aps"}, {"kind": "lac", "by_class": True}, {"method": "mc-dropout", "samples": 4}],
    ids=str,
)  # fmt: skip
def test_members_and_their_number_are_those_of_a_float64_loop(source, small_model, tmp_path, settings):
    how = {key: settings[key] for key in ("method", "samples") if key in settings}
    places = {"segmentation_head": 0.3} if how else {}
    net, file = load_model(small_model, "auto", places), tmp_path / "c.json"
    fitted_for = Settings(**how).fitted_for([net])
    calibration = Calibration(Scaling("temperature", np.log(SHARPER)), *fitted_for, {"pictures": 9})
    found = conformed(source, net, file, **{"calibration": calibration, "alpha": 0.2} | settings).fitted
    assert found == load_sets(file) and found.sets.images == (IMAGES,) * found.sets.aim.groups
    sizes, labelled = [], 0
    for path in sorted((source / "images").rglob("*.png")):
        before = analyse(net, path, calibration="none", conformal="none", **how)
        result = analyse(net, path, calibration=calibration, conformal=file, maps=["set_size", "confidence"], **how)
        p_CHW = softmax(SHARPER * np.log(before.probabilities.astype(np.float64)), 0)
        C, H, W = p_CHW.shape
        odds_CN, limit_C1 = odds_of(p_CHW.reshape(C, -1), found.sets.aim.kind), np.broadcast_to(found.sets.odds, C)[:, None]  # fmt: skip
        clear_CHW = (np.abs(odds_CN / limit_C1 - 1) > 1e-4).reshape(C, H, W)
        inside_CHW = (odds_CN <= limit_C1).reshape(C, H, W)
        assert clear_CHW.mean() > 0.99 and result.sets.dtype == bool
        np.testing.assert_array_equal(result.sets[clear_CHW], inside_CHW[clear_CHW])
        clear_HW = clear_CHW.all(0)
        expected_HW = np.maximum(inside_CHW.sum(0) - 1, 0) / (C - 1)
        np.testing.assert_allclose(result.maps["set_size"][clear_HW], expected_HW[clear_HW], atol=1e-6)
        label_HW = cv2.imread(str(source / "labels" / "a" / path.name), -1)
        sizes.append(inside_CHW.sum(0)[label_HW != VOID])
        labelled += (label_HW != VOID).sum()
    sizes = np.concatenate(sizes)
    assert len(np.unique(sizes)) > 1 and (sizes.min() == 0) == (found.sets.aim.kind == "lac-empty")
    assert found.measured["size_mean"] == pytest.approx(sizes.mean(), abs=2e-3)
    assert found.protocol["pixels"] == labelled and found.protocol["images"] == IMAGES


def test_the_file_does_not_depend_on_workers(source, net, tmp_path):
    for workers in (1, 3):
        conformed(source, net, tmp_path / f"{workers}.json", workers=workers, kind="aps", by_class=True)
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "3.json").read_bytes()


def test_void_pixels_and_images_of_nothing_else_do_not_count(source, net, tmp_path):
    shutil.copytree(source, tmp_path / "f")
    before = conformed(tmp_path / "f", net, tmp_path / "c.json").fitted
    shutil.copy(source / "images" / "a" / "00.png", tmp_path / "f" / "images" / "void.png")
    cv2.imwrite(str(tmp_path / "f" / "labels" / "void.png"), np.full((24, 48), VOID, np.uint8))
    after = conformed(tmp_path / "f", net, tmp_path / "c.json").fitted
    assert after.sets == before.sets and after.measured == before.measured
    assert (before.protocol["images"], after.protocol["images"]) == (IMAGES, IMAGES + 1)


# What goes wrong


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"alpha": 1.0}, "alpha: expected a loss between 0 and 1. Received: 1.0"),
        ({"alpha": 0.01}, "alpha 0.01: expected at least 99 images .* Received: 48. Label more images, or take alpha 0.020 or more"),
        ({"kind": "foreground"}, "kind: expected lac, lac-empty or aps. Received: foreground"),
        ({"kind": "raps"}, "kind: expected one of lac, lac-empty, aps"),
        ({"covered": 1.5}, "covered: expected a share of an image's pixels in .0, 1.. Received: 1.5"),
        ({"ignore_index": None}, "alpha 0.1: expected at least 9 images .* Received: 0. .* 48 failed, the first is a/00.png: .*label 255.*Set --ignore-index"),
        ({"seed": 3}, "seed: expected with it a method with mc-dropout or stochastic-head. Received: 'none'"),
        ({"calibration": "nowhere.json"}, "nowhere.json: expected a calibration file"),
        ({"out": "c.txt"}, "OUT: expected a file ending in .json in a folder that is there. Received: .*c.txt"),
    ],
)  # fmt: skip
def test_calls_that_are_wrong_are_named_and_write_nothing(source, net, tmp_path, settings, text):
    settings = {"out": "c.json"} | settings
    (tmp_path / "c.json").write_text("mine")
    with pytest.raises(ValueError, match=text):
        conformed(source, net, tmp_path / settings.pop("out"), **settings)
    assert (tmp_path / "c.json").read_text() == "mine" and os.listdir(tmp_path) == ["c.json"]


def test_stopped_it_writes_nothing(source, net, tmp_path):
    def stop(done, failed, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conformed(source, net, tmp_path / "c.json", progress=stop)
    assert not os.listdir(tmp_path)


def test_the_map_without_sets_names_the_command(source, net, small_model, tmp_path):
    image = source / "images" / "a" / "00.png"
    assert analyse(net, image).sets is None
    for choice in ("auto", "none", None):
        with pytest.raises(ValueError, match="maps: set_size is of conformal sets.*`seguncert conformal`"):
            analyse(net, image, maps=["set_size"], conformal=choice)
    with pytest.raises(ValueError, match="maps: set_size is of conformal sets.*`seguncert conformal`"):
        export(source / "images", tmp_path / "out", small_model, maps=["set_size"])
    with pytest.raises(ValueError, match="maps: set_size is of conformal sets, and there are none here"):
        evaluate(source / "images", source / "labels", tmp_path / "out", net, ignore_index=VOID, maps=["set_size"])
    conformed(source, net, tmp_path / "c.json")
    with pytest.raises(ValueError, match="conformal: expected with it the map set_size. Received: maps confidence, entropy, margin"):  # fmt: skip
        export(source / "images", tmp_path / "out", small_model, conformal=tmp_path / "c.json")
    assert os.listdir(tmp_path) == ["c.json"]


# From the model's folder to maps, exports and pages


@pytest.fixture(scope="module")
def beside(small_model, source, temperature, tmp_path_factory):
    """A model folder with a calibration, and sets that were fitted after it."""
    folder = tmp_path_factory.mktemp("beside") / "small"
    shutil.copytree(small_model, folder)
    temperature.save(folder / "calibration-none.json")
    conformed(source, folder, folder / "conformal-none.json", calibration="auto", alpha=0.2)
    return folder


def test_sets_by_the_model_are_taken_by_themselves(beside, source):
    net, image = load_model(beside), source / "images" / "a" / "00.png"
    result = analyse(net, image, maps=["set_size", "entropy"])
    assert result.calibration == "temperature, fitted on 9 pictures" and result.sets.sum(0).max() > 1
    assert result.conformal == load_sets(beside / "conformal-none.json").sets
    assert (analyse(net, image).sets == result.sets).all(), "the map need not be asked for"
    for other in ({"calibration": "none"}, {"scale": "native"}, {"method": "tta"}):
        assert analyse(net, image, **other).sets is None
        with pytest.raises(ValueError, match=r"Fit sets|fit sets|conformal-tta.json"):
            analyse(net, image, maps=["set_size"], **other)


def test_sets_are_stale_once_the_calibration_beside_them_is_another(beside, source, tmp_path):
    shutil.copytree(beside, tmp_path / "small")
    file = tmp_path / "small" / "calibration-none.json"
    file.write_text(file.read_text().replace('"constant": 1.', '"constant": 1.0'))
    assert load_calibration(file).calibrator != load_calibration(beside / "calibration-none.json").calibrator
    text = "conformal-none.json: expected one that was fitted after the calibration in use, temperature, fitted on 9 pictures"
    for maps in (None, ["set_size"]):
        with pytest.raises(ValueError, match=text):
            analyse(load_model(tmp_path / "small"), source / "images" / "a" / "00.png", maps=maps)
        with pytest.raises(ValueError, match=text):
            export(source / "images", tmp_path / "out", tmp_path / "small", maps=maps)
    assert not (tmp_path / "out").exists()
    assert export(source / "images", tmp_path / "out", tmp_path / "small", conformal="none", workers=1).done == IMAGES


@pytest.mark.parametrize("format", ["png16", "npy", "tiff"])
def test_export_writes_what_analyse_gives(beside, source, tmp_path, format):
    import tifffile

    out, maps = tmp_path / "out", ["set_size", "confidence"]
    assert export(source / "images", out, beside, maps=maps, format=format, workers=2, device="cpu").done == IMAGES
    net = load_model(beside, "cpu")
    for path in ("a/03.png", "a/10.png"):
        result = analyse(net, source / "images" / path, maps=maps)
        if format == "png16":
            stored = cv2.imread(str(out / path / "set_size.png"), -1)
            np.testing.assert_array_equal(stored, np.rint(result.maps["set_size"] * 65535))
        else:
            file = out / path / f"set_size.{format}"
            stored = np.load(file) if format == "npy" else tifffile.imread(file)
            np.testing.assert_array_equal(stored, result.maps["set_size"])
        overlay = cv2.imread(str(out / path / "overlay.jpg"), cv2.IMREAD_COLOR_RGB)
        assert np.abs(overlay - result.overlay("set_size").astype(int)).mean() < 4
    run, sets = json.loads((out / "run.json").read_text()), result.conformal
    assert run["sets"] == sets.to_dict() and run["sets"]["promise"] == sets.promise
    about = run["maps"]["set_size"]
    assert about["unit"] == "further classes" and about["full_scale"] == 2 and about["sure_is"] == "low"
    assert sets.promise in (out / "report.html").read_text().replace("&#39;", "'")
    header = (out / "images.csv").read_text().splitlines()[0].split(",")
    assert "set_size_mean" in header


def test_the_legend_says_what_is_promised(beside, source):
    result = analyse(load_model(beside), source / "images" / "a" / "03.png", maps=["set_size", "confidence"])
    from seguncert.run import draw_overlay, legend_note

    note = legend_note("set_size", result.calibration, result.conformal)
    assert note == "on average at most 20 % of the labelled pixels of an exchangeable image miss their class"
    assert legend_note("confidence", result.calibration, result.conformal) == f"calibrated: {result.calibration}"
    plain = draw_overlay(result.rgb, result.maps["set_size"], "set_size", 3, result.calibration)
    assert result.overlay("set_size").shape != plain.shape, "two lines of legend more or less"


def test_another_set_of_sets_is_another_setting(beside, source, tmp_path):
    from seguncert.store import StoreError

    settings = {"maps": ["set_size"], "workers": 1}
    export(source / "images", tmp_path / "out", beside, **settings)
    conformed(source, beside, tmp_path / "c.json", calibration="auto", alpha=0.3)
    with pytest.raises(StoreError, match="begun with other settings .sets: "):
        export(source / "images", tmp_path / "out", beside, conformal=tmp_path / "c.json", **settings)


def test_large_pictures_block_by_block(beside, source, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    small = cv2.imread(str(source / "images" / "a" / "03.png"))
    cv2.imwrite(str(tmp_path / "in" / "large.png"), cv2.resize(small, (610, 433), interpolation=cv2.INTER_CUBIC))
    settings = {"maps": ["set_size", "confidence"], "device": "cpu"}
    export(tmp_path / "in", tmp_path / "whole", beside, **settings)
    for module in (job, image):
        monkeypatch.setattr(module, "LARGE", 1000)
    monkeypatch.setattr(tiles, "WHOLE", 1000)
    monkeypatch.setattr(tiles, "BLOCK", 4 * 7 * 250**2)
    export(tmp_path / "in", tmp_path / "cut", beside, **settings)
    whole, cut = (cv2.imread(str(tmp_path / each / "large.png" / "set_size.png"), -1) for each in ("whole", "cut"))
    assert len(np.unique(whole)) > 1 and (whole == cut).mean() > 0.999
    one, other = (cv2.imread(str(tmp_path / each / "large.png" / "overlay.jpg")) for each in ("whole", "cut"))
    assert one.shape == other.shape and np.abs(one.astype(int) - other).mean() < 2


def test_as_many_samples_as_it_takes(source, small_model, tmp_path):
    net, image = load_model(small_model, "cpu", {"segmentation_head": 0.3}), source / "images" / "a" / "03.png"
    conformed(source, net, tmp_path / "c.json", method="mc-dropout", samples=20, alpha=0.2)
    settings = {"method": "mc-dropout", "maps": ["confidence", "set_size"], "conformal": tmp_path / "c.json"}
    result = analyse(net, image, samples="auto", max_error=0.02, **settings)
    assert result.moments.n >= 40 and result.errors["set_size"].max() > 0
    expected_HW = (result.sets.sum(0) - 1) / 2
    np.testing.assert_allclose(result.maps["set_size"], expected_HW, atol=1e-6)


# The command line


def test_the_commands(source, small_model, tmp_path):
    def run(*arguments):
        found = subprocess.run([sys.executable, "-m", "seguncert.cli", *map(str, arguments)], capture_output=True, text=True)  # fmt: skip
        return found.returncode, found.stdout, found.stderr.replace("\n", " ")

    shutil.copytree(source, tmp_path / "f")
    images, labels, file = tmp_path / "f" / "images", tmp_path / "f" / "labels", tmp_path / "c.json"
    (images / "a" / "00.png").write_bytes(b"")
    model, ignored = ("--model", small_model), ("--ignore-index", VOID)
    code, out, said = run("conformal", images, labels, file, *model, *ignored, "--alpha", 0.2, "--by-class")
    sets = load_sets(file).sets
    assert code == 1 and "failed: a/00.png: " in said and "1 could not be read." in said and f"sets: {file}" in said
    assert sets.promise in said and sets.aim.by_class and sets.alpha == 0.2
    for name, p in zip("abc", sets.least_probability(), strict=True):
        assert [name, str(IMAGES - 1), f"{p:.3g}"] in [line.split() for line in out.splitlines()]
    (images / "a" / "00.png").unlink()
    code, _, said = call("export", images, tmp_path / "out", *model, "--maps", "set_size", "--conformal", file)
    assert code == 0 and (tmp_path / "out" / "a" / "01.png" / "set_size.png").exists(), said
    for arguments, text in (
        (("conformal", images, labels, file, *model), "ignore-index: expected the label of pixels that do not count"),
        (("export", images, tmp_path / "o", *model, "--maps", "set_size"), "Fit sets with `seguncert conformal`."),
        (("export", images, tmp_path / "o", *model, "--maps", "set_size", "--conformal", file, "--scale", "native"), "c.json: expected one that was fitted with scale native. Received: one fitted with scale auto."),
    ):  # fmt: skip
        code, _, said = call(*arguments)
        assert code == 2 and text in said, said
    assert load_sets(file).sets == sets and not (tmp_path / "o").exists()


def test_a_stopped_fit_says_so(capsys):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as end:
        cli_fit.fit(["small"], stop)
    assert end.value.exit_code == 130 and "stopped; nothing was written" in capsys.readouterr().err


def test_thresholds_in_words(source, net, tmp_path):
    header, rows = table_of(found := conformed(source, net, tmp_path / "c.json", kind="aps", alpha=0.2))
    (p,) = found.fitted.sets.least_probability()
    assert header[2].startswith("in is any class that has at least this probability, with all that are less probable")
    assert rows == [["all", str(IMAGES), f"{p:.3g}"]]
    label = cv2.imread(str(source / "labels" / "a" / "00.png"), -1)
    assert set(np.unique(label)) == {0, 1, 2, VOID}
    for file in (tmp_path / "labels" / "a", tmp_path / "images" / "a"):
        shutil.copytree(source / file.relative_to(tmp_path), file)
    for file in sorted((tmp_path / "labels" / "a").iterdir())[3:]:
        label = cv2.imread(str(file), -1)
        label[label == 1] = VOID
        cv2.imwrite(str(file), label)
    _, rows = table_of(conformed(tmp_path, net, tmp_path / "c.json", by_class=True))
    assert rows[1] == ["b", "3", "0, so it is always in"] and rows[0][1] == str(IMAGES)
