"""The recipe runs, resumes to the same weights, and refuses what it should."""

import json
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import seguncert
from seguncert.apps import train
from seguncert.labels import IGNORED, rater_shares
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


@pytest.fixture
def raters(data):
    """A second rater who agrees where he labelled, and leaves void a part of each picture; a third who differs."""
    for name in ("second", "third"):
        (data / name).mkdir()
    for file in sorted((data / "labels").iterdir()):
        label = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(f"third/{file.name}", 1 - label)
        label[:, :20] = 9
        cv2.imwrite(f"second/{file.name}", label)
    return data


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(out, *options):
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(train.train)
    with one_thread():
        return CliRunner().invoke(app, ["images", "labels", str(out), *OPTIONS, *options], catch_exceptions=False)


def small_recipe(C=2, **given):
    return train.Recipe(**{
        "architecture": "Unet", "encoder": "resnet18", "decoder_channels": (8,), "classes": tuple("abcd"[:C]),
        "ignore_index": None, "dropout": 0.2, "epochs": 1, "batch": 2, "crop": (64, 64), "scale_range": (0.6, 1.8),
        "rotate": True, "rate": 1e-3, "encoder_rate": 1.0, "decay": 0.0, "average": 0.9, "seed": 0, "init": "",
        "pretrained": False, "leave_out": (),
    } | given)  # fmt: skip


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
    with pytest.raises(ValueError, match="is from another recipe, other raters or other images. Give the same"):
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
    recipe = small_recipe(crop=(64, 96), scale_range=(0.5, 2.0), rotate=False)
    rgb = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    labels = (rgb[None, ..., 0] > 128).astype(np.uint8)
    seen = set()
    for k in range(20):
        first, second = (train.augment(rgb, labels, recipe, np.random.default_rng([0, 3, k])) for _ in range(2))
        assert (first[0] == second[0]).all() and (first[1] == second[1]).all()
        assert first[0].shape == (3, 64, 96) and first[1].shape == (1, 64, 96) and first[0].dtype == np.float32
        seen.add(first[0].tobytes())
    assert len(seen) == 20


def test_labels_stay_on_their_pixels_through_the_augmentation():
    label = np.zeros((90, 120), np.uint8)
    label[20:70, 30:100] = 1
    rgb = np.repeat(40 + 180 * label[..., None], 3, axis=2)
    for k in range(30):
        image, (moved,) = train.augment(rgb, label[None], small_recipe(), np.random.default_rng(k))
        light, known = image.mean(0), moved != IGNORED
        if (moved == 1).any() and (moved == 0).any():
            middle = (light[moved == 1].mean() + light[moved == 0].mean()) / 2
            assert ((light > middle) == (moved == 1))[known].mean() > 0.97


def test_learning_rate_warms_up_and_ends_at_nothing():
    rates = [train.learning_rate(update, 1000, 2e-3) for update in range(1000)]
    assert max(rates) == pytest.approx(2e-3) and np.argmax(rates) in (29, 30)
    assert rates[0] < 1e-4 and rates[-1] < 1e-7 and np.all(np.diff(rates[30:]) <= 0)


def test_soft_cross_entropy_equals_a_plain_loop_and_that_of_torch():
    rng, C = np.random.default_rng(0), 4
    said_BKHW = rng.integers(0, C + 1, (2, 3, 5, 6)).astype(np.uint8)
    said_BKHW[said_BKHW == C] = IGNORED
    said_BKHW[:, :, 0, 0] = IGNORED
    logits_BCHW = rng.normal(0, 30, (2, C, 5, 6)).astype(np.float32)  # where a softmax would round to 0
    losses = []
    for b, y, x in np.ndindex(2, 5, 6):
        z, said = logits_BCHW[b, :, y, x].astype(np.float64), [c for c in said_BKHW[b, :, y, x] if c != IGNORED]
        log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
        losses += [-np.mean([log_p[c] for c in said])] if said else []
    shares_BCHW = torch.from_numpy(np.stack([rater_shares(each, C) for each in said_BKHW]))
    loss = train.soft_cross_entropy(torch.from_numpy(logits_BCHW), shares_BCHW)
    assert loss.dtype == torch.float32 and len(losses) < 60
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-6)
    whole = shares_BCHW[:, :, 1:].clone()
    whole[:, 0][~whole.any(1)] = 1
    logits_BCHW = torch.from_numpy(logits_BCHW[:, :, 1:])
    torch.testing.assert_close(
        train.soft_cross_entropy(logits_BCHW, whole), torch.nn.functional.cross_entropy(logits_BCHW, whole)
    )


def test_soft_cross_entropy_of_half_precision_is_computed_in_float32():
    logits_BCHW, shares_BCHW = torch.tensor([0.0, 20.0]).reshape(1, 2, 1, 1), torch.ones(1, 2, 1, 1) / 2
    loss = train.soft_cross_entropy(logits_BCHW.bfloat16(), shares_BCHW)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(10)
    assert train.soft_cross_entropy(logits_BCHW, 0 * shares_BCHW).isnan()


def test_raters_who_agree_train_as_one_however_many_labelled_a_pixel(raters):
    assert run("one", "--epochs", "1", "--ignore-index", "9").exit_code == 0
    assert run("all", "--epochs", "1", "--ignore-index", "9", "--rater", "second", "--rater", "labels").exit_code == 0
    one, every = (seguncert.load_model(raters / name, "cpu") for name in ("one", "all"))
    assert one.sha256 == every.sha256
    assert (one.card["recipe"]["raters"], every.card["recipe"]["raters"]) == ([], ["labels", "second", "labels"])


def test_without_raters_random_numbers_and_loss_are_what_they_always_were(raters, monkeypatch):
    drawn, seen = [], []

    class Noting(np.random.Generator):
        def __getattribute__(self, name):
            def draw(*arguments):
                drawn.append((name, *(np.asarray(each).tolist() for each in arguments)))
                return method(*arguments)

            method = super().__getattribute__(name)
            return draw if name in ("uniform", "integers", "random") else method

    rgb = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    train.augment(rgb, rgb[None, ..., 0] // 128, small_recipe(scale_range=(1.0, 1.0)), Noting(np.random.PCG64(3)))
    assert drawn == [
        ("uniform", 0.0, 0.0), ("integers", 0, 17), ("integers", 0, 37), ("random",), ("integers", 4), ("uniform", 0.5, 1.5),
        ("uniform", 0.7, 1.4), ("uniform", -0.15, 0.15), ("uniform", 0.93, 1.07, 3), ("uniform", 0.8, 1.25),
    ]  # fmt: skip

    def plain(logits, target, **named):
        assert logits.dtype == torch.float32 and target.dtype == torch.int64 and named == {"ignore_index": IGNORED}
        seen.append(target)
        return torch.nn.functional.cross_entropy(logits, target, **named)

    monkeypatch.setattr(train, "F", SimpleNamespace(cross_entropy=plain))
    assert run("out", "--epochs", "1").exit_code == 0 and len(seen) == 3
    files = sorted((raters / "images").iterdir())
    crops = train.Crops([(file, [raters / "labels" / file.name]) for file in files], small_recipe(crop=(32, 64), rotate=False, scale_range=(0.6, 1.6)))  # fmt: skip
    order = np.random.default_rng([0, 0]).permutation(6)
    assert all(torch.equal(each, crops[0, int(slot)][1]) for each, slot in zip(torch.cat(seen), order, strict=True))


def test_labels_of_all_raters_move_alike_and_the_image_as_with_one():
    rng = np.random.default_rng(0)
    rgb, labels_KHW = rng.integers(0, 256, (70, 50, 3), np.uint8), rng.integers(0, 4, (3, 70, 50), np.uint8)
    for k in range(10):
        image, moved_KHW = train.augment(rgb, labels_KHW, small_recipe(4), np.random.default_rng(k))
        for label_HW, moved_HW in zip(labels_KHW, moved_KHW, strict=True):
            alone, own = train.augment(rgb, label_HW[None], small_recipe(4), np.random.default_rng(k))
            assert (alone == image).all() and (own[0] == moved_HW).all()


def test_where_raters_differ_half_and_half_the_softmax_learns_a_half(raters):
    for file in sorted((raters / "labels").iterdir()):  # light is 1 to one of them, 2 to the other; both say dark is 0
        cv2.imwrite(f"second/{file.name}", 2 * cv2.imread(str(file), cv2.IMREAD_UNCHANGED))
    pairs = [(file, [raters / name / file.name for name in ("labels", "second")]) for file in sorted((raters / "images").iterdir())]  # fmt: skip
    recipe = small_recipe(3, epochs=25, batch=1, crop=(32, 32), rate=0.03, raters=("labels", "second"))
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 1))
    with one_thread():
        learnt = train.fit(net, pairs, recipe, raters / "checkpoint.pt", lambda averaged: {}, workers=0)
    grey = (torch.tensor([60.0, 180.0]) / 255).expand(1, 3, 1, 2)
    mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in (train.IMAGENET_MEAN, train.IMAGENET_STD))
    with torch.no_grad():
        dark, light = learnt((grey - mean) / std).softmax(1)[0, :, 0].T.tolist()
    assert light == pytest.approx([0, 0.5, 0.5], abs=0.05) and dark == pytest.approx([1, 0, 0], abs=0.05)


def test_a_run_with_raters_goes_on_with_the_same_raters_only(raters):
    given = ["--epochs", "1", "--ignore-index", "9"]
    assert run("out", *given, "--rater", "second").exit_code == 0
    assert "going on after epoch 1" in run("out", *given, "--rater", str(raters / "second")).output
    for other in ([], ["--rater", "third"], ["--rater", "second", "--rater", "third"]):
        with pytest.raises(ValueError, match="is from another recipe, other raters or other images. Give the same"):
            run("out", *given, *other)


def _no_png(file):
    file.unlink()


def _other_size(file):
    cv2.imwrite(str(file), np.zeros((48, 65), np.uint8))


def _other_class(file):
    cv2.imwrite(str(file), np.full((48, 64), 2, np.uint8))


def _colours(file):
    cv2.imwrite(str(file), np.zeros((48, 64, 3), np.uint8))


def _cut_short(file):
    file.write_bytes(file.read_bytes()[:50])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_no_png, "labels: 1 of 6 images have no PNG of the same name in third, the first is images/a_2.png"),
        (_other_size, "third/a_2.png: expected the size of its image, 64x48. Received: 65x48"),
        (_other_class, "third/a_2.png: 3072 pixels have label 2. Expected: 0 to 1, or the ignore index 9."),
        (_colours, "third/a_2.png: expected an 8- or 16-bit one-channel PNG of class indices. Received: 8 bits of colour type 2"),
        (_cut_short, "third/a_2.png: expected an 8- or 16-bit one-channel PNG of class indices. Received: a damaged one"),
        (lambda file: shutil.rmtree(file.parent), "labels: 6 of 6 images have no PNG of the same name in third"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_labels_of_one_rater_is_named(raters, spoil, message):
    spoil(raters / "third" / "a_2.png")
    with pytest.raises(ValueError) as error:
        run("out", "--epochs", "1", "--ignore-index", "9", "--rater", "second", "--rater", "third")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_what_a_process_that_reads_found_wrong_is_one_line(raters):
    _other_class(raters / "labels" / "a_2.png")
    with pytest.raises(ValueError) as error:
        run("out", "--epochs", "1", "--workers", "1")
    assert train.in_one_line(error.value).startswith("labels/a_2.png: 3072 pixels have label 2.")
    assert train.in_one_line(ValueError("val: one")) == "val: one"
