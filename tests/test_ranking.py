"""Figures of scores against scipy and plain loops, and what the command prints."""

import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import typer
from PIL import Image
from scipy.stats import spearmanr

import seguncert
from seguncert import cli
from seguncert.ranking import FIRST, figures, rank_scores


def plainly(score, wrong, pixels):
    """Spearman by scipy; AURC and what is found as means over many orders of what is tied."""
    rate, rng = wrong / pixels, np.random.default_rng(0)
    aurc, found = [], []
    for _ in range(4000):
        order = np.lexsort((rng.random(len(score)), score))
        aurc.append((rate[order].cumsum() / np.arange(1, len(score) + 1)).mean())
        first = order[::-1][: round(FIRST * len(score))]
        found.append(wrong[first].sum() / wrong.sum())
    return spearmanr(score, rate).statistic, np.mean(aurc), np.mean(found)


@pytest.mark.parametrize("ties", [False, True])
def test_as_scipy_and_plain_loops(ties):
    rng = np.random.default_rng(ties)
    score = rng.integers(0, 6, 60) / 5 if ties else rng.random(60)
    pixels = rng.integers(50, 100, 60).astype(float)
    wrong = np.floor(pixels * np.clip(score + rng.normal(0, 0.3, 60), 0, 1))
    told = figures(score, wrong, pixels, np.arange(60), np.ones((1, 60)))
    spearman, aurc, found = plainly(score, wrong, pixels)
    assert told["spearman"] == pytest.approx(spearman, abs=1e-9)
    assert told["aurc"] == pytest.approx(aurc, abs=2e-3 if ties else 1e-9)
    assert told["found"] == pytest.approx(found, abs=5e-3 if ties else 1e-9)
    assert told["spearman_interval"] == pytest.approx([told["spearman"]] * 2)


def test_a_replicate_is_the_images_that_were_drawn():
    rng = np.random.default_rng(5)
    score, pixels = rng.integers(0, 9, 40) / 9, np.full(40, 10.0)
    wrong, drawn = rng.integers(0, 10, 40).astype(float), rng.integers(0, 3, 40)
    told = figures(score, wrong, pixels, np.arange(40), drawn[None].astype(float))
    again = np.repeat(np.arange(40), drawn)
    whole = figures(score[again], wrong[again], pixels[again], np.arange(len(again)), np.ones((1, len(again))))
    for name in ("spearman", "aurc", "found"):
        assert told[f"{name}_interval"][0] == pytest.approx(whole[name], abs=1e-9)


def test_what_is_undefined_is_nan():
    told = figures(np.ones(5), np.arange(5.0), np.full(5, 9.0), np.arange(5), np.ones((2, 5)))
    assert np.isnan(told["spearman"]) and told["found"] == pytest.approx(FIRST)
    told = figures(np.arange(5.0), np.zeros(5), np.full(5, 9.0), np.arange(5), np.ones((2, 5)))
    assert np.isnan(told["spearman"]) and np.isnan(told["found"]) and told["aurc"] == 0


@pytest.fixture(scope="module")
def labelled(small_model, pictures, tmp_path_factory):
    """An export, and labels of which the more is wrong the more the net doubts; of one image there are none."""
    place = tmp_path_factory.mktemp("ranking")
    seguncert.export(pictures, place / "out", small_model, workers=1)
    rng = np.random.default_rng(0)
    for file in sorted((place / "out").rglob("labels.png"))[1:]:
        entropy = cv2.imread(str(file.parent / "entropy.png"), cv2.IMREAD_UNCHANGED) / 65535
        shown = np.array(Image.open(file))
        label = np.where(rng.random(shown.shape) < entropy**4, (shown + 1) % 3, shown).astype(np.uint8)
        label[:4] = 255
        target = place / "labels" / file.parent.relative_to(place / "out").with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), label)
    return place


def test_the_score_that_made_the_errors_finds_them(labelled):
    found = rank_scores(labelled / "out", labelled / "labels", ignore_index=255, side=24, replicates=50, background="a")
    assert found.units["image"] == 23 and "1 of 24 images have no labels" in found.notes[0]
    rows = {(row["unit"], row["score"]): row for row in found.rows}
    assert len(rows) == 3 * 6 + 3 * 4  # maps times kinds, of images and of cells
    cells = rows["cell", "entropy:mean"]
    assert cells["spearman"] > 0.5 and cells["spearman_interval"][0] < cells["spearman"] < cells["spearman_interval"][1]
    assert cells["aurc"] < found.error_rate["cell"] and cells["found"] > FIRST
    assert len(found.csv().splitlines()) == 1 + len(rows)


def test_the_command(labelled, tmp_path):
    def call(*arguments):
        command = [sys.executable, "-m", "seguncert.cli", "rank-scores", str(labelled / "out"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    told = call(labelled / "labels", "--ignore-index", "255", "--out", tmp_path / "t.csv")
    assert told.returncode == 0 and "entropy:class-weighted" in told.stdout and "(random order)" in told.stdout
    assert (tmp_path / "t.csv").read_text().startswith("unit,score,spearman,")


def test_labels_that_cannot_be_used_are_named_and_the_rest_goes_on(labelled, tmp_path, capsys):
    shutil.copytree(labelled / "labels", tmp_path / "labels")
    first, second = sorted((tmp_path / "labels").rglob("*.png"))[:2]
    cv2.imwrite(str(first), np.zeros((5, 5), np.uint8))
    second.write_bytes(b"no picture")
    found = rank_scores(labelled / "out", tmp_path / "labels", ignore_index=255, replicates=5)
    assert found.units["image"] == 21 and len(found.failed) == 2
    assert any("expected the size of its image" in why for why in found.failed.values())
    with pytest.raises(typer.Exit) as end:
        cli.rank(labelled / "out", tmp_path / "labels", ignore_index="255", replicates=5)
    assert end.value.exit_code == 1 and capsys.readouterr().err.count("failed: ") == 2


@pytest.mark.parametrize(
    "labels, ignore, said",
    [
        (".", "255", "labels: expected a folder of PNGs of class indices"), ("labels", None, "ignore-index: expected"),
        ("labels", "none", "Set --ignore-index, or correct the label"),
    ],
)  # fmt: skip
def test_wrong_commands_are_one_line(labelled, capsys, labels, ignore, said):
    with pytest.raises(typer.Exit) as end:
        cli.rank(labelled / "out", labelled / labels, ignore_index=ignore)
    told = capsys.readouterr().err
    assert end.value.exit_code == 2 and said in told and len(told.strip().splitlines()) == 1, told
