"""The recipe runs, resumes to the same weights, and refuses what it should."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import seguncert
from seguncert.apps import train
from seguncert.model import ModelError

OPTIONS = [
    "--classes", "dark,light", "--encoder", "resnet18", "--decoder-channels", "16,16,8,8,8", "--batch", "2",
    "--crop", "32x64", "--workers", "0", "--val-images", "images", "--val-labels", "labels",
]  # fmt: skip


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Six pictures whose label is whether a pixel is light, of two sequences."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for k in range(6):
        label = cv2.resize(np.random.default_rng(k).integers(0, 2, (3, 4), dtype=np.uint8), (64, 48), interpolation=0)
        cv2.imwrite(f"images/{'ab'[k % 2]}_{k}.png", np.repeat(60 + 120 * label[..., None], 3, axis=2))
        cv2.imwrite(f"labels/{'ab'[k % 2]}_{k}.png", label)
    return tmp_path


def run(out, *options):
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(train.train)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CliRunner().invoke(app, ["images", "labels", str(out), *OPTIONS, *options], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)


def test_a_stopped_run_goes_on_to_the_same_weights(data, monkeypatch):
    assert run(data / "whole", "--epochs", "3").exit_code == 0

    def stop(*arguments, **named):
        measured.append(1)
        raise KeyboardInterrupt

    measured, real = [], torch.save
    saves = iter([real, stop])
    monkeypatch.setattr(train.torch, "save", lambda *arguments: next(saves)(*arguments))
    assert run(data / "stopped", "--epochs", "3").exit_code != 0
    monkeypatch.setattr(train.torch, "save", real)
    assert run(data / "stopped", "--epochs", "3").exit_code == 0
    first, second = (seguncert.load_model(data / name, "cpu") for name in ("whole", "stopped"))
    assert first.sha256 == second.sha256 and measured
    assert first.card["dropout"] == [{"before": "segmentation_head", "p": 0.2}]
    history = torch.load(data / "stopped" / "checkpoint.pt", weights_only=True)["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3] and 0 < history[-1]["miou"] < 1


def test_another_recipe_does_not_go_on_from_the_checkpoint(data):
    run(data / "out", "--epochs", "1")
    with pytest.raises(ValueError, match="is from another recipe or other images. Give the same"):
        run(data / "out", "--epochs", "1", "--seed", "1")


def test_a_sequence_can_be_left_out(data):
    assert "3 images to train on" in run(data / "out", "--epochs", "1", "--leave-out", "a").output
    card = json.loads((data / "out" / "card.json").read_text())
    assert card["recipe"]["leave_out"] == ["a"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--leave-out", "c"], "leave-out: expected some of the sequences a, b, not all. Received: c"),
        (["--leave-out", "a", "--leave-out", "b"], "not all. Received: a, b"),
        (["--rotate"], "rotate: expected a square crop. Received: 32x64"),
        (["--crop", "64"], "expected two numbers with 'x' between. Received: '64'"),
    ],
)
def test_options_that_would_mislead_are_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        run(data / "out", *options)


def test_training_goes_on_from_a_model_folder_and_learns(data):
    run(data / "first", "--epochs", "1")
    assert run(data / "second", "--epochs", "25", "--init", str(data / "first"), "--average", "0.8").exit_code == 0
    history = torch.load(data / "second" / "checkpoint.pt", weights_only=True)["history"]
    assert history[-1]["accuracy"] > 0.85 and history[-1]["nll"] < 0.5
    shutil.rmtree(data / "first")
    with pytest.raises(ModelError, match="no config.json"):
        run(data / "third", "--init", str(data / "first"))


def test_crops_are_a_function_of_seed_epoch_and_image():
    recipe = train.Recipe(
        "Unet",
        "resnet18",
        (8,),
        ("a", "b"),
        None,
        0.2,
        1,
        2,
        (64, 96),
        (0.5, 2.0),
        False,
        1e-3,
        1.0,
        0.0,
        0.9,
        0,
        "",
        False,
        (),
    )
    rgb = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    label = (rgb[..., 0] > 128).astype(np.uint8)
    seen = set()
    for k in range(20):
        first, second = (train.augment(rgb, label, recipe, np.random.default_rng([0, 3, k])) for _ in range(2))
        assert (first[0] == second[0]).all() and (first[1] == second[1]).all()
        assert first[0].shape == (3, 64, 96) and first[1].shape == (64, 96) and first[0].dtype == np.float32
        seen.add(first[0].tobytes())
    assert len(seen) == 20


def test_labels_stay_on_their_pixels_through_the_augmentation():
    recipe = train.Recipe(
        "Unet",
        "resnet18",
        (8,),
        ("a", "b"),
        None,
        0.2,
        1,
        2,
        (64, 64),
        (0.6, 1.8),
        True,
        1e-3,
        1.0,
        0.0,
        0.9,
        0,
        "",
        False,
        (),
    )
    label = np.zeros((90, 120), np.uint8)
    label[20:70, 30:100] = 1
    rgb = np.repeat(40 + 180 * label[..., None], 3, axis=2)
    for k in range(30):
        image, moved = train.augment(rgb, label, recipe, np.random.default_rng(k))
        light, known = image.mean(0), moved != train.IGNORED
        if (moved == 1).any() and (moved == 0).any():
            middle = (light[moved == 1].mean() + light[moved == 0].mean()) / 2
            assert ((light > middle) == (moved == 1))[known].mean() > 0.97


def test_learning_rate_warms_up_and_ends_at_nothing():
    rates = [train.learning_rate(update, 1000, 2e-3) for update in range(1000)]
    assert max(rates) == pytest.approx(2e-3) and np.argmax(rates) in (29, 30)
    assert rates[0] < 1e-4 and rates[-1] < 1e-7 and np.all(np.diff(rates[30:]) <= 0)
