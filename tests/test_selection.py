"""From an export to a list, its sheet and its files: what is written agrees, is the same each time, and bad calls are one line."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

import seguncert
from seguncert import cli, selection
from seguncert.annotation import FORMATS
from seguncert.pool import PoolError
from seguncert.selection import select
from seguncert.store import StoreError


@pytest.fixture(scope="module")
def exported(small_model, pictures, tmp_path_factory):
    """An export of the pictures with embeddings."""
    out = tmp_path_factory.mktemp("selection") / "out"
    seguncert.export(pictures, out, small_model, embeddings=True, workers=1)
    return out


def rows_of(file):
    with file.open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def fingerprint(folder):
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".zip"  # which holds the time of the day
    }


UNITS = {
    "image": {}, "region": {"region": "grid:32"}, "superpixel": {"region": "superpixel:300"}, "segment": {}, "pixel": {"per_image": 4},
}  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_written_agrees(exported, tmp_path, unit):
    if unit == "superpixel":
        pytest.importorskip("skimage")
    settings = {
        "budget": 7,
        "unit": "region" if unit == "superpixel" else unit,
        "hand_over": tuple(FORMATS),
        **UNITS[unit],
    }
    found = select(exported, tmp_path / "one", **settings)
    select(exported, tmp_path / "two", workers=2, **settings)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    picked = rows_of(tmp_path / "one" / "selection.csv")
    assert [int(row["rank"]) for row in picked] == list(range(1, 8)) and len(
        rows_of(tmp_path / "one" / "random.csv")
    ) == 7
    assert len(rows_of(tmp_path / "one" / "plain.csv")) == 7
    assert len({(row["path"], row["number"]) for row in picked}) == 7
    page = (tmp_path / "one" / "selection.html").read_text(encoding="utf-8")
    for row in picked:
        assert row["path"].split("/")[-1] in page and "score" in row["reason"]
        if unit == "image":
            continue
        numbers = np.array(Image.open(tmp_path / "one" / "regions" / f"{row['path']}.png"))
        ys, xs = np.nonzero(numbers == int(row["number"]))
        box = (xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1)
        assert box == tuple(int(row[key]) for key in ("x", "y", "width", "height"))
    about = json.loads((tmp_path / "one" / "selection.json").read_text())
    assert about["picked"] == 7 and about["comparison"]["ours"]["images"] == len({row["path"] for row in picked})
    for shares in about["balance"].values():
        assert shares is None or sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert {"coco.json", "cvat.xml", "cvat-masks.zip", "label-studio.json", "png"} <= {
        file.name for file in (tmp_path / "one").iterdir()
    }
    assert found.picks[0].path == picked[0]["path"]


def test_scores_are_those_of_the_formulas(exported, tmp_path):
    """By score alone, an order that a plain loop over the files gives."""
    found = select(
        exported, tmp_path / "out", budget=24, score="entropy:top:10*confidence:mean^0.5", diversity=0.0, gap=0
    )
    expected = {}
    for path in (pick.path for pick in found.picks):
        entropy = np.array(Image.open(exported / path / "entropy.png")) / 65535
        doubt = 1 - np.array(Image.open(exported / path / "confidence.png")) / 65535
        top = np.sort(entropy.ravel())[-int(np.ceil(entropy.size / 10)) :].mean()
        expected[path] = top * np.sqrt(doubt.mean())
    assert [pick.path for pick in found.picks] == sorted(expected, key=lambda path: -expected[path])
    for pick in found.picks:
        assert pick.score == pytest.approx(expected[pick.path], rel=1e-4)


def test_rounds_go_on_from_each_other(exported, tmp_path):
    for unit, settings in (("image", {}), ("region", {"region": "grid:32"}), ("segment", {})):
        first = select(exported, tmp_path / f"{unit}-1", budget=5, unit=unit, **settings)
        lists = [tmp_path / f"{unit}-1" / "selection.csv"]
        second = select(exported, tmp_path / f"{unit}-2", budget=5, unit=unit, labelled=lists, **settings)
        drawn = [tmp_path / f"{unit}-1" / "random.csv"]
        third = select(exported, tmp_path / f"{unit}-3", budget=5, unit=unit, labelled=drawn, **settings)
        assert third.about["labelled_candidates"] == 5
        assert {(pick.path, pick.box) for pick in first.random}.isdisjoint(
            (pick.path, pick.box) for pick in third.picks
        )
        seen = {(pick.path, pick.box) for pick in first.picks}
        assert seen.isdisjoint((pick.path, pick.box) for pick in second.picks)
        assert all(not np.isnan(pick.distance) for pick in second.picks)


def test_an_earlier_selection_is_replaced_and_nothing_else(exported, tmp_path):
    select(exported, tmp_path / "out", budget=3, unit="region", region="grid:32", hand_over=["coco"])
    (tmp_path / "out" / "my labels").mkdir()
    select(exported, tmp_path / "out", budget=3)
    names = ["my labels", "plain.csv", "random.csv", "selection.csv", "selection.html", "selection.json"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    with pytest.raises(
        ValueError, match="OUT: expected another folder than that of .*selection.csv, which says what is labelled"
    ):
        select(exported, tmp_path / "out", budget=3, labelled=[tmp_path / "out" / "selection.csv"])
    photos = Path(json.loads((exported / "run.json").read_text())["input"])
    with pytest.raises(ValueError, match="OUT: expected a folder apart from the photos"):
        select(exported, photos / "next", budget=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="OUT: expected a new folder, or one of an earlier selection"):
        select(exported, tmp_path / "mine", budget=3)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match="OUT: expected"):
        select(exported, exported, budget=3)


def test_what_fails_half_way_leaves_the_earlier_selection(exported, tmp_path, monkeypatch):
    select(exported, tmp_path / "out", budget=3, unit="region", region="grid:32")
    before = fingerprint(tmp_path / "out")
    move, moved = os.replace, []

    def fail(source, target):
        if Path(source).parent.name == ".part" and len(moved) == 2:
            raise OSError(5, "Input/output error")
        moved.extend([source] * (Path(source).parent.name == ".part"))
        move(source, target)

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(selection, "write_file", lambda path, content: path.write_text(content))
    with pytest.raises(StoreError, match="cannot write .*out: Input/output error"):
        select(exported, tmp_path / "out", budget=5)
    assert fingerprint(tmp_path / "out") == before and len(moved) == 2
    monkeypatch.undo()
    (tmp_path / "out" / ".former").mkdir()  # and after a kill between the two
    for file in ("selection.json", "selection.csv"):
        os.replace(tmp_path / "out" / file, tmp_path / "out" / ".former" / file)
    assert len(select(exported, tmp_path / "out", budget=5).picks) == 5


def test_random_pixels_are_not_the_doubtful_ones(exported, tmp_path):
    found = select(exported, tmp_path / "out", budget=240, unit="pixel", per_image=40, score="entropy:mean")
    entropy = {}
    for name, picks in (("ours", found.picks), ("random", found.random), ("plain", found.plain)):
        maps = {
            path: np.array(Image.open(exported / path / "entropy.png")) / 65535
            for path in {pick.path for pick in picks}
        }
        entropy[name] = np.mean([maps[pick.path][pick.box[1], pick.box[0]] for pick in picks])
    everywhere = np.mean([(np.array(Image.open(file)) / 65535).mean() for file in exported.rglob("entropy.png")])
    assert abs(entropy["random"] - everywhere) < 0.02 < entropy["plain"] - everywhere
    again = select(
        exported,
        tmp_path / "next",
        budget=100,
        unit="pixel",
        per_image=40,
        labelled=[tmp_path / "out" / "selection.csv"],
    )
    for pick in again.picks:
        near = [other.box for other in found.picks if other.path == pick.path]
        assert all(max(abs(pick.box[0] - x), abs(pick.box[1] - y)) >= 8 for x, y, _, _ in near)


def test_the_sheet_says_what_was_asked(exported, tmp_path):
    select(exported, tmp_path / "out", budget=3, gap=7, radius=0.2, quotas={"b": 0.05})
    page = (tmp_path / "out" / "selection.html").read_text()
    asked = " ".join(page[page.index("Asked for") :][:1500].split())
    assert "7 frames" in asked and "0.2" in asked and "5%" in asked and "highest first" not in asked
    select(exported, tmp_path / "out", budget=3, diversity=0.0, gap=0)
    assert "the highest first" in (tmp_path / "out" / "selection.html").read_text()


def test_without_the_photos_the_overlays_are_shown(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "moved")
    run = json.loads((tmp_path / "moved" / "run.json").read_text())
    (tmp_path / "moved" / "run.json").write_text(json.dumps(run | {"input": str(tmp_path / "gone")}))
    there = select(exported, tmp_path / "a", budget=4)
    gone = select(tmp_path / "moved", tmp_path / "b", budget=4)
    assert [pick.path for pick in there.picks] == [pick.path for pick in gone.picks]
    assert (tmp_path / "b" / "selection.html").read_text().count("data:image/jpeg") >= 4
    with pytest.raises(PoolError, match="superpixel needs the photos where the export found them"):
        pytest.importorskip("skimage")
        select(tmp_path / "moved", tmp_path / "c", budget=4, unit="region", region="superpixel:300")


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"budget": 25}, "budget: expected at most 24, the images that are not labelled. Received: 25"), ({"score": "variance:mean"}, "score: expected a map of the export: confidence"),
        ({"score": "disagreement"}, "needs an export with samples. Received: method none"), ({"quotas": {"tree": 0.1}}, "quota: expected classes of the model: a, b, c. Received: 'tree'"),
        ({"score": "entropy:foreground"}, "background: expected with a score of the foreground"), ({"unit": "region", "score": "entropy:patch:8"}, "patch is of whole images"),
        ({"gap": "10s"}, "gap: seconds need photos that say when they were taken"), ({"hand_over": ["yolo"]}, "hand-over: expected some of coco"),
        ({"unit": "pixel", "score": "entropy:top:5"}, "score: expected of single pixels one of mean, no-boundary"), ({"diversity": float("nan")}, "diversity: expected a power"),
        ({"background": "z"}, "background: expected one of a, b, c"), ({"unit": "region", "region": "hexagon:9"}, "region: expected grid:SIDE"),
    ],
)  # fmt: skip
def test_bad_calls_are_one_line(exported, tmp_path, wrong, said):
    with pytest.raises(ValueError) as error:
        select(exported, tmp_path / "out", **({"budget": 5} | wrong))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_export_without_embeddings(small_model, pictures, tmp_path):
    seguncert.export(pictures, tmp_path / "out", small_model, workers=1)
    with pytest.raises(
        PoolError, match="expected an export with embeddings.*--embeddings, into a new folder, or give --diversity 0"
    ):
        select(tmp_path / "out", tmp_path / "sel", budget=3)
    assert len(select(tmp_path / "out", tmp_path / "sel", budget=3, diversity=0.0).picks) == 3


def test_the_command(exported, tmp_path):
    def call(*arguments):
        command = [sys.executable, "-m", "seguncert.cli", "select", str(exported), str(tmp_path / "out"), *arguments]
        run = subprocess.run(command, capture_output=True, text=True)
        return run.returncode, run.stderr

    code, told = call("--budget", "4", "--quota", "a=10%", "--hand-over", "coco")
    assert code == 0 and "4 images picked, of 24, by entropy:class-weighted" in told
    assert (tmp_path / "out" / "coco.json").is_file() and not (tmp_path / "out" / "cvat.xml").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({}, "budget: expected how much may be picked"), ({"budget": 99}, "budget: expected at most 24"), ({"budget": 4, "quota": ["a"]}, "quota: expected CLASS=SHARE"),
        ({"budget": 4, "labelled": [Path("none.txt")]}, "labelled: expected a list"), ({"budget": 4, "quota": ["a=.1", "a=.2"]}, "each class once"),
    ],
)  # fmt: skip
def test_wrong_commands_are_one_line(exported, tmp_path, capsys, arguments, said):
    with pytest.raises(typer.Exit) as end:
        cli.select(exported, tmp_path / "out", **arguments)
    told = capsys.readouterr().err
    assert end.value.exit_code == 2 and said in told and len(told.strip().splitlines()) == 1, told
