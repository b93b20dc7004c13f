"""A folder goes in: everything that should come out does, whatever happens on the way."""

import csv
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import typer
from calls import call
from conftest import CARD, CONFIG
from PIL import Image
from torch import nn

import seguncert
from hostile import make_hostile
from seguncert import batch, cli, image, job, tiles
from seguncert.batch import export, list_images
from seguncert.calibration import Calibration
from seguncert.calibrators import Neighbourhood, Scaling
from seguncert.image import ImageError, read_image
from seguncert.model import build_net, save_model, wrap_model
from seguncert.tiles import Look, Picture
from seguncert.views import make_sampler

KILLS = int(os.environ.get("SEGUNCERT_KILLS", "4"))


def rows_of(out):
    with open(out / "images.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def ledger_of(out):
    lines = [json.loads(line) for line in (Path(out) / "ledger.jsonl").read_text().splitlines()]
    return {line["path"]: line for line in lines}


def tree(out):
    """Content of every file, without what tells time."""
    found = {}
    for file in sorted(Path(out).rglob("*")):
        name = file.relative_to(out).as_posix()
        if file.is_file() and name != "ledger.jsonl":
            found[name] = file.read_bytes()
        elif file.is_dir():
            found[name] = b"folder"
    table = list(csv.DictReader(found["images.csv"].decode("utf-8", "surrogateescape").splitlines()))
    found["images.csv"] = [{key: value for key, value in row.items() if key != "seconds"} for row in table]
    return found


def command(*arguments):
    return [sys.executable, "-m", "seguncert.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def exported(pictures, small_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, export(pictures, out, small_model)


def test_files_are_as_promised(exported, pictures):
    out, result = exported
    assert (result.done, result.failed, result.left, result.before) == (24, 0, 0, 0)
    assert sorted(os.listdir(out)) == ["drive 0", "drive 1", "images.csv", "ledger.jsonl", "report.html", "run.json"]
    rows = rows_of(out)
    assert list(rows) == sorted(rows) and len(rows) == 24
    assert list(next(iter(rows.values())))[:7] == [
        "path",
        "status",
        "error",
        "height",
        "width",
        "seconds",
        "confidence_mean",
    ]
    for path in rows:
        assert sorted(os.listdir(out / path)) == [
            "confidence.png",
            "entropy.png",
            "labels.png",
            "margin.png",
            "overlay.jpg",
        ]
        assert (pictures / path).is_file()
    run = json.loads((out / "run.json").read_text())
    assert run["model"]["sha256"] and run["calibration"] == "none" and run["method"] == "none"
    assert run["maps"]["entropy"]["full_scale"] == pytest.approx(np.log(3))
    assert all(json.loads(line)["status"] == "ok" for line in (out / "ledger.jsonl").read_text().splitlines())


def test_files_hold_what_analyse_says(exported, pictures, small_model):
    out, _ = exported
    model = seguncert.load_model(small_model, "cpu")
    for path, row in list(rows_of(out).items())[::7]:
        result = seguncert.analyse(model, pictures / path)
        assert result.labels.dtype == np.int64 and result.probabilities.dtype == np.float32
        np.testing.assert_allclose(result.probabilities.sum(0), 1, atol=1e-5)
        assert (result.probabilities.argmax(0) == result.labels).mean() > 0.999
        np.testing.assert_allclose(result.probabilities.max(0), result.maps["confidence"], atol=1e-6)
        with Image.open(out / path / "labels.png") as labels:
            assert labels.mode == "P" and (np.asarray(labels) == result.labels).mean() > 0.999
            assert np.asarray(labels.getpalette()[:9]).reshape(3, 3).tolist() == model.colours.tolist()
        overlay = cv2.imread(str(out / path / "overlay.jpg"), cv2.IMREAD_COLOR_RGB)
        assert (
            np.abs(overlay - result.overlay("confidence").astype(int)).mean()
            < 4
            < np.abs(overlay - result.overlay("entropy").astype(int)).mean()
        )
        for name, map_HW in result.maps.items():
            stored = cv2.imread(str(out / path / f"{name}.png"), cv2.IMREAD_UNCHANGED)
            assert stored.dtype == np.uint16 and stored.shape == map_HW.shape
            assert np.abs(stored / 65535 - map_HW).max() <= 1 / 65535
            assert float(row[f"{name}_mean"]) == pytest.approx(map_HW.mean(), abs=1e-6)


def test_the_ledger_counts_the_pixels_of_each_class_that_is_shown(exported):
    out, _ = exported
    for path, line in ledger_of(out).items():
        with Image.open(out / path / "labels.png") as labels:
            shown = np.asarray(labels)
        assert line["areas"] == [int((shown == c).sum()) for c in range(3)]
        assert "disagreement" not in line and "embedding" not in line
    assert "disagreement" not in next(iter(rows_of(out).values()))


def disagreement_of(samples, labels):
    """1 − soft Dice of all pairs of softmax samples, over the classes that are shown."""
    found, shown = [], [c for c in range(samples.shape[1]) if (labels == c).any()]
    for c in shown:
        pairs = [(s, t) for s in range(len(samples)) for t in range(len(samples)) if s != t]
        both = sum(2 * (samples[s, c] * samples[t, c]).sum() for s, t in pairs)
        found.append(1 - both / sum((samples[s, c] ** 2 + samples[t, c] ** 2).sum() for s, t in pairs))
    return np.mean(found)


@pytest.mark.parametrize("method", ["mc-dropout", "tta", "mc-dropout+tta"])
def test_the_ledger_says_how_far_samples_disagree(method, pictures, small_model, tmp_path):
    insert, S = ({"segmentation_head": 0.3}, 4) if "mc-dropout" in method else (None, 1)
    export(pictures, tmp_path, small_model, device="cpu", method=method, insert_dropout=insert, samples=S if insert else 20)  # fmt: skip
    lines, rows = ledger_of(tmp_path), rows_of(tmp_path)
    sampler = make_sampler([seguncert.load_model(small_model, "cpu", insert)], method)
    for path in list(lines)[::11]:
        rgb, samples = read_image(pictures / path).rgb, []
        look = Look(Picture(rgb), slice(0, len(rgb)), slice(0, rgb.shape[1]), entire=True)
        for number, view in enumerate(sampler.parts()):
            for s in range(S * number, S * number + S):
                samples.append(view._draw(look, range(s, s + 1), 0).mean_CHW)
        samples = torch.stack(samples)
        assert len(samples) == 4 * S if "tta" in method else S
        torch.testing.assert_close(samples.mean(0), sampler.moments(rgb, S).mean_CHW, atol=1e-5, rtol=0)
        with Image.open(tmp_path / path / "labels.png") as labels:
            expected = disagreement_of(samples.double().numpy(), np.asarray(labels))
        assert lines[path]["disagreement"] == pytest.approx(expected, rel=1e-4) and expected > 1e-3
        assert float(rows[path]["disagreement"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", ["sampling-free", "sampling-free+tta"])
def test_without_samples_they_disagree_as_infinitely_many_would(method, pictures, small_model, tmp_path):
    insert = {"segmentation_head": 0.3}
    export(pictures, tmp_path, small_model, device="cpu", method=method, insert_dropout=insert)
    sampler = make_sampler([seguncert.load_model(small_model, "cpu", insert)], method)
    for path, line in list(ledger_of(tmp_path).items())[::11]:
        limit, found = sampler.moments(read_image(pictures / path).rgb), []
        for c in (c for c in range(3) if line["areas"][c]):
            mean, variance = limit.mean_CHW[c].double(), limit.variance_CHW()[c].double()
            found.append(1 - (mean**2).sum().item() / (mean**2 + variance).sum().item())
        assert line["disagreement"] == pytest.approx(np.mean(found), rel=1e-4) and np.mean(found) > 1e-3


@pytest.mark.parametrize("format", ["npy", "tiff"])
def test_other_formats_are_exact(pictures, small_model, tmp_path, format):
    import tifffile

    export(pictures, tmp_path, small_model, maps=["entropy"], format=format)
    model = seguncert.load_model(small_model, "cpu")
    path = next(iter(rows_of(tmp_path)))
    stored = (
        np.load(tmp_path / path / "entropy.npy")
        if format == "npy"
        else tifffile.imread(tmp_path / path / "entropy.tiff")
    )
    np.testing.assert_allclose(stored, seguncert.analyse(model, pictures / path).maps["entropy"], atol=1e-6)
    assert stored.dtype == np.float32


def test_a_second_run_does_nothing_and_a_changed_image_is_done_again(pictures, small_model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number, file in enumerate(sorted(pictures.rglob("*.jpg"))[:4]):
        (source / f"{number}.jpg").write_bytes(file.read_bytes())
    export(source, out, small_model)
    before = tree(out)
    assert export(source, out, small_model).before == 4
    assert tree(out) == before
    (source / "1.jpg").write_bytes((source / "2.jpg").read_bytes())
    (source / "3.jpg").unlink()
    result = export(source, out, small_model)
    assert (result.done, result.before) == (3, 2)
    assert (out / "1.jpg" / "entropy.png").read_bytes() == (out / "2.jpg" / "entropy.png").read_bytes()
    assert list(rows_of(out)) == ["0.jpg", "1.jpg", "2.jpg"]


def test_hostile_inputs_are_right_or_one_clear_line(small_model, tmp_path):
    expected = make_hostile(tmp_path / "in")
    assert len(expected) >= 40
    run = subprocess.run(
        command("export", tmp_path / "in", tmp_path / "out", "--model", small_model), capture_output=True, text=True
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    rows = rows_of(tmp_path / "out")
    assert set(rows) == set(expected)
    for path, text in expected.items():
        row = rows[path]
        if text == "ok":
            assert row["status"] == "ok", (path, row["error"])
            labels = cv2.imdecode(np.fromfile(tmp_path / "out" / path / "labels.png", np.uint8), cv2.IMREAD_UNCHANGED)
            assert labels.shape[:2] == (int(row["height"]), int(row["width"]))
        else:
            assert row["status"] == "failed" and text in row["error"] and "\n" not in row["error"], (path, row)
            assert not (tmp_path / "out" / path).exists()
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000


def test_killed_at_random_moments_and_resumed_it_ends_as_if_nothing_had_been(pictures, small_model, tmp_path, exported):
    out, rng, ledger = tmp_path / "out", random.Random(KILLS), tmp_path / "out" / "ledger.jsonl"
    arguments = command("export", pictures, out, "--model", small_model)
    lines = 0
    for _ in range(KILLS):
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        wanted = lines + rng.randrange(3)
        while process.poll() is None and (not ledger.exists() or ledger.read_bytes().count(b"\n") <= wanted):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
    assert export(pictures, out, small_model).done == 24
    assert tree(out) == tree(exported[0])


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_tidies_up_and_goes_on(pictures, small_model, tmp_path, exported, signal_):
    out = tmp_path / "out"
    arguments = ("export", pictures, out, "--model", small_model, "--workers", "1")
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not (out / "ledger.jsonl").exists() or not (out / "ledger.jsonl").read_bytes()):
        time.sleep(0.001)
    process.send_signal(signal_)
    _, stderr = process.communicate()
    assert process.returncode == 130 and "Traceback" not in stderr and "same command goes on" in stderr, stderr
    rows = rows_of(out)
    done = sum(row["status"] == "ok" for row in rows.values())
    left = [row for row in rows.values() if row["status"] != "ok"]
    assert len(rows) == 24 and {row["status"] for row in left} == {"left"} and not any(row["height"] for row in left)
    assert {row["error"] for row in left} == {"not reached yet; the same command goes on"}
    assert "not reached yet" not in (out / "report.html").read_text()
    assert 0 < done < 24 and (out / "report.html").exists() and not (out / ".partial").exists()
    code, _, told = call(*arguments)
    assert code == 0 and f"24 images done ({done} done before)" in told
    assert tree(out) == tree(exported[0])


def test_an_image_that_kills_the_process_is_given_up_and_the_rest_goes_on(pictures, small_model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    victim = sorted(path for path in list_images(pictures)[0])[5]
    for _ in range(batch.CRASHES):  # what three crashes on this image leave behind
        job = batch.Job(pictures)
        store = batch.Store(out, job.run_json([seguncert.load_model(small_model)], None, {"backend": "torch fp32"}))
        store.begin(victim)
        store._ledger.close()
    monkeypatch.setattr(batch, "_process_alone", _die)
    result = export(pictures, out, small_model)
    assert (result.done, result.failed) == (23, 1)
    assert rows_of(out)[victim]["error"].startswith("the process died 4 times on this image")
    monkeypatch.undo()
    assert export(pictures, out, small_model).failed == 0


def _die(*_):
    os._exit(9)


def test_a_folder_named_like_an_image_does_not_take_its_contents_along(pictures, small_model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "folder.png").mkdir(parents=True)
    (source / "folder.png" / "x.png").write_bytes(next(pictures.rglob("*.png")).read_bytes())
    for before in (0, 1):
        result = export(source, out, small_model)
        assert (result.done, result.failed, result.before) == (1, 1, before)
        assert (out / "folder.png" / "x.png" / "labels.png").exists()


def test_another_order_of_maps_is_another_setting(pictures, small_model, tmp_path):
    export(pictures, tmp_path, small_model, maps=["confidence", "entropy"])
    with pytest.raises(seguncert.StoreError, match="begun with other settings .maps: "):
        export(pictures, tmp_path, small_model, maps=["entropy", "confidence"])


def test_odd_names_and_places(pictures, small_model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    good = next(pictures.rglob("*.png")).read_bytes()
    names = ["a\rb.png", ".partial/x.png", "report.html/x.png", "run.json/y.png", "fine/run.json.png"]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(good)
    export(pictures, source / "earlier", small_model)
    result = export(source, out, small_model)
    assert (result.done, result.failed) == (2, 3)
    rows = rows_of(out)
    assert set(rows) == set(names)
    assert rows["run.json/y.png"]["error"] == "its folder 'run.json' has the name of a file of the output; rename it"
    for place, message in [(source, "which is IN"), (source / "a\rb.png", "which is a file")]:
        with pytest.raises(ValueError, match=message):
            export(source, place, small_model)


def test_pictures_too_long_for_png_or_jpeg(small_model, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("1", (1_000_001, 1)).save(tmp_path / "in" / "longest.png")
    Image.new("L", (70_000, 2)).save(tmp_path / "in" / "long.png")
    result = export(tmp_path / "in", tmp_path / "out", small_model, scale=0.01)
    assert (result.done, result.failed) == (1, 1)
    assert (
        "expected at most 1,000,000 pixels a side. Received: 1000001x1"
        in rows_of(tmp_path / "out")["longest.png"]["error"]
    )
    with Image.open(tmp_path / "out" / "long.png" / "overlay.jpg") as overlay:
        assert max(overlay.size) < 65_500


def test_an_image_that_changed_while_the_run_was_stopped_is_left_to_do(pictures, small_model, tmp_path, monkeypatch):
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(pictures / "drive 0", source)
    export(source, out, small_model)
    first, second = sorted(os.listdir(source))[:2]
    (source / first).write_bytes(b"broken")
    (out / second / "overlay.jpg").unlink()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch._Work, "all", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(source, out, small_model)
    assert {path: row["status"] for path, row in rows_of(out).items()} == {
        path: "left" if path in (first, second) else "ok" for path in os.listdir(source)
    }
    monkeypatch.undo()
    assert (export(source, out, small_model).done, rows_of(out)[first]["status"]) == (11, "failed")


def test_damaged_books_are_named(pictures, small_model, tmp_path):
    export(pictures, tmp_path, small_model)
    ledger = (tmp_path / "ledger.jsonl").read_text()
    (tmp_path / "ledger.jsonl").write_text("5\n" + ledger)
    with pytest.raises(seguncert.StoreError, match="ledger.jsonl: line 1 is damaged"):
        export(pictures, tmp_path, small_model)
    for content in ("{", "[]"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(seguncert.StoreError, match="run.json is damaged. Give another OUT"):
            export(pictures, tmp_path, small_model)


def test_a_full_disk_stops_the_run_with_one_line(pictures, small_model, tmp_path, exported):
    def refuse_files_above_20_kilobytes():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = command("export", pictures, tmp_path / "out", "--model", small_model)
    run = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=refuse_files_above_20_kilobytes)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert "seguncert: no space left to write" in run.stderr and "give the same command again" in run.stderr
    assert export(pictures, tmp_path / "out", small_model).done == 24
    assert tree(tmp_path / "out") == tree(exported[0])


def test_pictures_above_the_cap_are_named_and_done_when_it_is_raised(pictures, small_model, tmp_path):
    result = export(pictures, tmp_path, small_model, max_pixels=6200)
    assert (result.done, result.failed) == (12, 12)
    errors = {row["error"] for row in rows_of(tmp_path).values()} - {""}
    assert errors == {
        "image too large: expected at most 6200 pixels, received 6300; make it smaller or raise max_pixels"
    }
    assert export(pictures, tmp_path, small_model).failed == 0


def test_failures_inside_the_net_are_recorded(pictures, tmp_path):
    class Refuses(nn.Module):
        def forward(self, x):
            if x.shape[-2] == 96:
                raise IndexError("out of\nrange")
            return x[:, :2] * 1.0

    result = export(pictures, tmp_path, wrap_model(Refuses(), ["a", "b"]), maps=["margin"])
    assert result.done == 12 and result.failed == 12
    assert {row["error"] for row in rows_of(tmp_path).values()} == {"", "failed inside: IndexError: out of range"}


def test_listing_follows_links_once_and_leaves_out_the_output(tmp_path):
    for name in ("a.png", "sub/B.JPG", "sub/notes.txt", "out/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert list_images(tmp_path, tmp_path / "out") == (["a.png", "folder.png", "sub/B.JPG"], {".txt": 1})


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("IN", {"model": ["nosuch"]}, "no model 'nosuch': expected a bundled model"),
        (
            "IN",
            {"maps": "entropy,doubt"},
            "mutual_information, variance, expected_entropy, set_size, each once. Received: entropy, doubt",
        ),
        ("IN", {"scale": "big"}, "scale: expected auto, native or a factor"),
        ("nowhere", {}, "IN: expected a folder of images. Received: nowhere, which is not there"),
        ("EMPTY", {}, "no images in"),
    ],
)
def test_wrong_calls_are_one_line_and_status_2(pictures, small_model, tmp_path, capsys, source, options, message):
    (tmp_path / "EMPTY").mkdir()
    source = {"IN": pictures, "EMPTY": tmp_path / "EMPTY"}.get(source, Path(source))
    with pytest.raises(typer.Exit) as end:
        cli.export(source, tmp_path / "out", **({"model": [str(small_model)]} | options))
    told = capsys.readouterr().err
    assert end.value.exit_code == 2 and message in told and len(told.strip().splitlines()) == 2, told  # loading …
    assert not (tmp_path / "out").exists()


def test_help_answers_without_torch():
    code = (
        "import sys, seguncert.cli; sys.exit('torch' in sys.modules or 'gradio' in sys.modules or 'cv2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "export" in subprocess.run(command("--help"), capture_output=True, text=True, check=True).stdout


def test_analyse_takes_files_bytes_and_arrays(pictures, small_model):
    model = seguncert.load_model(small_model, "cpu")
    file = next(pictures.rglob("*.png"))
    results = [
        seguncert.analyse(model, image)
        for image in (file, str(file), file.read_bytes(), seguncert.read_image(file).rgb)
    ]
    assert all((result.maps["entropy"] == results[0].maps["entropy"]).all() for result in results)
    assert results[0].overlay("entropy").shape[1] >= results[0].rgb.shape[1] and results[0].calibration == "none"
    with pytest.raises(ImageError):
        seguncert.analyse(model, b"no picture")
    rgb = results[0].rgb
    for wrong in (rgb.astype(np.float32) / 255, rgb.astype(np.uint16), rgb[..., 0], rgb[..., [0, 1, 2, 0]], rgb[:0]):
        with pytest.raises(ImageError, match=r"image: expected RGB of shape .H, W, 3., uint8. Received: "):
            seguncert.analyse(model, wrong)
    with pytest.raises(ImageError, match="^nowhere.png: cannot open"):
        seguncert.analyse(model, "nowhere.png")


def test_samples_of_a_net_with_dropout_put_in(pictures, small_model, tmp_path):
    settings = {"method": "mc-dropout", "samples": 6, "seed": 2, "insert_dropout": {"segmentation_head": 0.3}}
    for workers in (1, 3):
        batch.export(pictures, tmp_path / str(workers), small_model, workers=workers, device="cpu", **settings)
    run = json.loads((tmp_path / "1" / "run.json").read_text())
    assert (run["method"], run["samples"], run["seed"]) == ("mc-dropout", 6, 2)
    assert run["stochastic"] == ["dropout_before_segmentation_head"]
    assert run["inserted_dropout"] == {"segmentation_head": 0.3}
    assert run["maps"]["variance"]["full_scale"] == pytest.approx(2 / 3)
    assert "variance_mean" in next(iter(rows_of(tmp_path / "1").values()))
    model = seguncert.load_model(small_model, "cpu", insert_dropout={"segmentation_head": 0.3})
    for path in list(rows_of(tmp_path / "1"))[::9]:
        result = seguncert.analyse(model, pictures / path, method="mc-dropout", samples=6, seed=2)
        for name, map_HW in result.maps.items():
            stored = (tmp_path / "1" / path / f"{name}.png").read_bytes()
            assert stored == (tmp_path / "3" / path / f"{name}.png").read_bytes()
            read = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED)
            assert np.abs(read / 65535 - map_HW).max() <= 1 / 65535
        assert result.maps["variance"].max() > 0.001
    with pytest.raises(seguncert.StoreError, match="seed"):
        batch.export(pictures, tmp_path / "1", small_model, device="cpu", **settings | {"seed": 3})


def test_a_net_without_dropout_is_one_line(pictures, small_model, tmp_path):
    arguments = ("export", pictures, tmp_path / "out", "--model", small_model)
    code, _, told = call(*arguments, "--method", "mc-dropout")
    assert code == 2 and "it has no dropout. Put dropout in with insert-dropout PLACE:P" in told
    code, _, told = call(*arguments, "--insert-dropout", "decoder")
    assert code == 2 and "insert-dropout: expected PLACE:P, as segm" in told


@pytest.mark.parametrize(
    "method, more", [("tta", {"views": ["flip"]}), ("ensemble", {}), ("mc-dropout+tta", {"samples": 3})]
)
def test_other_ways_to_draw_predictions(method, more, pictures, small_model, tmp_path):
    insert = {"segmentation_head": 0.3} if "mc-dropout" in method else None
    spec = [small_model] if method != "ensemble" else [small_model, tmp_path / "other"]
    torch.manual_seed(1)
    save_model(tmp_path / "other", build_net(CONFIG), CONFIG, CARD)
    out = tmp_path / "out"
    assert export(pictures, out, spec, device="cpu", method=method, insert_dropout=insert, **more).done == 24
    run, rows = json.loads((out / "run.json").read_text()), rows_of(out)
    assert run["method"] == method and len(run.get("views", run.get("nets", []))) > 1
    path = list(rows)[4]
    loaded = [seguncert.load_model(each, "cpu", insert) for each in spec]
    result = seguncert.analyse(loaded, pictures / path, method=method, **more)
    assert "confidence_error" not in rows[path] and not result.errors, "views are no random draws"
    for name, map_HW in result.maps.items():
        stored = cv2.imread(str(out / path / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        assert np.abs(stored / 65535 - map_HW).max() <= 1 / 65535
    assert result.maps["variance"].max() > 1e-3


def test_as_many_samples_as_it_takes(pictures, small_model, tmp_path):
    settings = {"method": "mc-dropout", "samples": "auto", "insert_dropout": {"segmentation_head": 0.3}}
    maps, source = ["confidence", "mutual_information"], tmp_path / "in"
    source.mkdir()
    for file in sorted((pictures / "drive 0").iterdir())[:4]:
        shutil.copy(file, source)
    for bound in (0.02, 0.005):
        out = tmp_path / str(bound)
        export(source, out, small_model, device="cpu", maps=maps, max_error=bound, **settings)
        rows = rows_of(out).values()
        assert all(float(row["confidence_error"]) <= bound + 1e-4 for row in rows if int(row["samples"]) < 1000)
        assert all(float(row["mutual_information_error"]) > 0 for row in rows)
    few, many = ([int(row["samples"]) for row in rows_of(tmp_path / str(bound)).values()] for bound in (0.02, 0.005))
    assert np.mean(many) > 3 * np.mean(few) and min(few) >= 40
    model = seguncert.load_model(small_model, "cpu", settings["insert_dropout"])
    path = next(iter(rows_of(out)))
    result = seguncert.analyse(model, source / path, method="mc-dropout", samples="auto", maps=maps, max_error=0.02)
    many = seguncert.analyse(model, source / path, method="mc-dropout", samples=1000, seed=9, maps=maps)
    for name in maps:  # the error is about as large as the difference to many samples of another seed
        off = np.abs(result.maps[name] - many.maps[name])
        assert 0.4 < np.sqrt((off**2).mean() / (result.errors[name] ** 2).mean()) < 2.5


def cut_into_blocks(monkeypatch):
    """From here on the pictures of these tests are large ones."""
    monkeypatch.setattr(job, "LARGE", 1000)
    monkeypatch.setattr(image, "LARGE", 1000)
    monkeypatch.setattr(tiles, "WHOLE", 1000)
    monkeypatch.setattr(tiles, "BLOCK", 4 * 7 * 250**2)


@pytest.mark.parametrize("format", ["png16", "npy", "tiff"])
@pytest.mark.parametrize("method", ["none", "mc-dropout"])
def test_maps_of_a_large_picture_go_to_the_disk_block_by_block(
    format, method, pictures, small_model, tmp_path, monkeypatch
):
    import tifffile

    source = tmp_path / "in"
    source.mkdir()
    rgb = cv2.resize(cv2.imread(str(next(pictures.rglob("*.png")))), (610, 433), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(source / "large.png"), rgb)
    settings = {"method": method, "format": format, "device": "cpu", "scale": "native"}
    settings |= {"insert_dropout": {"segmentation_head": 0.3}, "samples": 4} if method != "none" else {}
    export(source, tmp_path / "whole", small_model, **settings)
    cut_into_blocks(monkeypatch)
    export(source, tmp_path / "cut", small_model, **settings)
    folder = tmp_path / "cut" / "large.png"
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / "whole" / "large.png"))
    read = {
        "png16": lambda file: cv2.imread(str(file), cv2.IMREAD_UNCHANGED) / 65535,
        "npy": np.load,
        "tiff": tifffile.imread,
    }[format]
    for file in folder.iterdir():
        whole = tmp_path / "whole" / "large.png" / file.name
        if file.name == "labels.png":
            with Image.open(file) as cut, Image.open(whole) as expected:
                assert cut.mode == "P" and cut.getpalette()[:9] == expected.getpalette()[:9]
                assert (np.asarray(cut) == np.asarray(expected)).mean() > 0.999
        elif file.name == "overlay.jpg":
            one, other = (cv2.imread(str(each)).astype(int) for each in (file, whole))
            assert one.shape == other.shape and np.abs(one - other).mean() < 2
        else:
            cut, expected = read(file), read(whole)
            assert cut.shape == (433, 610) and expected.max() > 0.01
            assert np.abs(cut - expected).max() < 2e-3 and np.abs(cut - expected).mean() < 1e-4
    one, other = (ledger_of(tmp_path / each)["large.png"] for each in ("whole", "cut"))
    assert sum(other["areas"]) == 433 * 610
    np.testing.assert_allclose(one["areas"], other["areas"], atol=433 * 610 * 1e-3)
    assert ("disagreement" in other) == (method != "none")
    assert other.get("disagreement", 0) == pytest.approx(one.get("disagreement", 0), rel=1e-3)
    one, other = (rows_of(tmp_path / each)["large.png"] for each in ("whole", "cut"))
    for name in one:
        if name.endswith(("_mean", "_error")):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=2e-4)


@pytest.mark.parametrize("kind", ["neighbourhood", "temperature"])
def test_that_parts_of_a_large_picture_are_calibrated_one_by_one_is_noted(
    kind, pictures, small_model, tmp_path, monkeypatch
):
    source, model = tmp_path / "in", seguncert.load_model(small_model, "cpu")
    source.mkdir()
    rgb = cv2.resize(cv2.imread(str(next(pictures.rglob("*.png")))), (610, 433), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(source / "large.png"), rgb)
    calibrator = Neighbourhood(((0.6, 0.1), (0.5, 0.0)), -2.0, -9.0, -0.1) if kind == "neighbourhood" else Scaling(kind, -0.5)  # fmt: skip
    Calibration(calibrator, *batch.Settings(scale="native").fitted_for([model])).save(tmp_path / "c.json")
    settings = {"calibration": tmp_path / "c.json", "device": "cpu", "scale": "native"}
    export(source, tmp_path / "whole", small_model, **settings)
    cut_into_blocks(monkeypatch)
    export(source, tmp_path / "cut", small_model, **settings)
    notes = [rows_of(tmp_path / each)["large.png"]["note"] for each in ("whole", "cut")]
    assert notes == ["", "calibrated block by block" if kind == "neighbourhood" else ""]


def test_a_result_keeps_its_photo_when_the_array_is_painted_on(small_model):
    """A camera's frame buffer, say; what is asked for later looks at the photo's colours."""
    model = seguncert.load_model(small_model, "cpu")
    rgb = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    calibrator = Neighbourhood(((0.6, 0.1), (0.5, 0.0)), -2.0, -9.0, -0.1)
    calibration = Calibration(calibrator, *batch.Settings().fitted_for([model]))
    result = seguncert.analyse(model, rgb, calibration=calibration)
    rgb[:, ::2] = 255
    np.testing.assert_allclose(result.probabilities.max(0), result.maps["confidence"], atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"samples": "auto"}, "samples auto: expected a method with mc-dropout or stochastic-head. Received: 'none'"),
        ({"method": "tta", "views": ["spin"]}, "views: expected flip, flip-vertical, or factors"),
        ({"views": ["flip"]}, "views: expected with them the method tta. Received: 'none'"),
        ({"method": "mc-dropout", "samples": "auto", "max_error": 2.0}, "max-error: expected a share of full scale between 0 and 1. Received: 2.0"),
        ({"drop_path": True}, "drop-path: expected with it a method with mc-dropout. Received: 'none'"),
        ({"carry": 1.0}, "carry: expected a share between 0 and 1. Received: 1.0"),
        ({"tile": 100}, "tile: expected auto, or pixels a side, 512 or more. Received: 100"),
        ({"maps": []}, "maps: expected one or more of"),
        ({"seed": 7}, "seed: expected with it a method with mc-dropout or stochastic-head. Received: 'none'"),
        ({"method": "tta", "samples": 7}, "samples: expected with it a method with mc-dropout or stochastic-head. Received: 'tta'"),
        ({"method": "mc-dropout", "max_error": 0.1}, "max-error: expected with it samples auto. Received: 20"),
        ({"method": "tta", "views": "flip"}, "views: expected a list of names. Received: 'flip'"),
        ({"method": "ensemble"}, "method: expected ensemble with several models"),
        ({"insert_dropout": {"encoder": 0.1}}, "insert-dropout: expected with it the method mc-dropout or sampling-free. Received: none"),
    ],
)  # fmt: skip
def test_wrong_settings_of_samples(settings, message, pictures, small_model, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        export(pictures, tmp_path / "o", small_model, **settings)
    assert not (tmp_path / "o").exists()


def test_a_number_of_samples_that_is_none():
    with pytest.raises(ValueError, match="samples: expected a number, or auto. Received: 'many'"):
        batch.Settings("mc-dropout", "many")


def test_frames_of_a_video_carry_their_past_also_over_a_break(pictures, small_model, tmp_path, monkeypatch):
    source = tmp_path / "in"
    big = cv2.resize(cv2.imread(str(next(pictures.rglob("*.png")))), (300, 200), interpolation=cv2.INTER_CUBIC)
    for drive in ("a", "b"):
        (source / drive).mkdir(parents=True)
        for number in range(8, 12):
            frame = big[20:120, 10 * number - 60 : 10 * number + 60]
            cv2.imwrite(str(source / drive / f"frame {number}.png"), frame if drive == "a" else frame[::-1])
    settings = {"carry": 0.6, "maps": ["confidence", "entropy"], "device": "cpu", "workers": 2}
    export(source, tmp_path / "whole", small_model, **settings)
    model, carry = seguncert.load_model(small_model, "cpu"), seguncert.Carry(0.6)
    for number in range(8, 12):
        path = f"a/frame {number}.png"
        result = seguncert.analyse(model, source / path, carry=carry, maps=settings["maps"])
        alone = seguncert.analyse(model, source / path)
        assert (number == 8) == np.allclose(result.maps["confidence"], alone.maps["confidence"], atol=1e-5)
        for name, map_HW in result.maps.items():
            stored = cv2.imread(str(tmp_path / "whole" / path / f"{name}.png"), cv2.IMREAD_UNCHANGED)
            assert np.abs(stored / 65535 - map_HW).max() <= 1 / 65535
    sampled = {"method": "mc-dropout", "samples": 2, "insert_dropout": {"segmentation_head": 0.3}}
    export(source, tmp_path / "sampled", small_model, **settings | sampled)
    assert not any("disagreement" in line for line in ledger_of(tmp_path / "sampled").values()), "others are in it"
    assert "disagreement" not in next(iter(rows_of(tmp_path / "sampled").values()))
    with pytest.raises(ValueError, match="variance describe the spread of samples, and one pass has none"):
        export(source, tmp_path / "o", small_model, **settings | {"maps": ["variance"]})

    def stop_after_three(done, failed, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "cut", small_model, progress=stop_after_three, **settings | {"workers": 1})
    assert export(source, tmp_path / "cut", small_model, **settings).before >= 3
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    good = (source / "a" / "frame 9.png").read_bytes()
    (source / "a" / "frame 9.png").write_bytes(good[:200])
    assert export(source, tmp_path / "cut", small_model, **settings).failed == 1
    seen = [row["status"] for row in rows_of(tmp_path / "cut").values()]
    assert seen == ["ok", "ok", "ok", "failed"] + 4 * ["ok"], "by name, 10 and 11 come first"
    again = export(source, tmp_path / "cut", small_model, **settings)
    assert (again.done, again.failed) == (7, 1)
    (source / "a" / "frame 9.png").write_bytes(good)
    assert export(source, tmp_path / "cut", small_model, **settings).done == 8
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole"), "frames after a mended one are done again"


def test_frames_after_one_that_cannot_be_predicted_again_fail_aloud(pictures, small_model, tmp_path, monkeypatch):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(4):
        (source / f"f{number}.jpg").write_bytes(next(pictures.rglob("*.jpg")).read_bytes())
    settings = {"carry": 0.5, "device": "cpu"}
    export(source, out, small_model, **settings)
    (source / "f2.jpg").write_bytes(sorted(pictures.rglob("*.jpg"))[3].read_bytes())
    whole, predict = tree(out), job.predict_photo
    with monkeypatch.context() as patch:
        calls = iter(range(9))
        patch.setattr(job, "predict_photo", lambda *each: predict(*each) if next(calls) != 1 else 1 / 0)
        result = export(source, out, small_model, **settings)
    rows = rows_of(out)
    assert rows["f2.jpg"]["error"].startswith("the frame f1.jpg before it is done, but could not be predicted again")
    assert (result.done, result.failed) == (3, 1) and [row["status"] for row in rows.values()].count("ok") == 3
    assert export(source, out, small_model, **settings).done == 4
    export(source, tmp_path / "new", small_model, **settings)
    assert tree(out) == tree(tmp_path / "new") != whole


def test_a_frame_that_kills_the_process_is_passed_over(pictures, small_model, tmp_path, monkeypatch):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(4):
        (source / f"f{number}.jpg").write_bytes(next(pictures.rglob("*.jpg")).read_bytes())
    settings = {"carry": 0.5, "device": "cpu"}
    export(source, out, small_model, **settings)
    (source / "f1.jpg").write_bytes(sorted(pictures.rglob("*.jpg"))[3].read_bytes())
    ledger = out / "ledger.jsonl"
    with open(ledger, "a") as lines:
        lines.writelines(json.dumps({"path": "f1.jpg", "status": "interrupted"}) + "\n" for _ in range(batch.CRASHES))
    monkeypatch.setattr(batch, "_process_alone", _die)
    result = export(source, out, small_model, **settings)
    assert (result.done, result.failed) == (3, 1)
    assert rows_of(out)["f1.jpg"]["error"].startswith("the process died 3 times on this image")
