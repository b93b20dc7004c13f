"""The laboratory in miniature: small nets, calibrations that must help, broken ones that must be found out."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from calls import call
from sklearn.metrics import roc_auc_score

from seguncert import analyse, calibrate, read_image, wrap_model
from seguncert.apps import curves, posterior_cells, posterior_study
from seguncert.apps.posterior_cells import Cell, adversarial, broken, find_cell, log_probs
from seguncert.apps.scene_folder import write_scene
from seguncert.apps.scene_nets import MEAN, STD, SceneRecipe, as_model, train_net
from seguncert.labels import read_label
from seguncert.posterior import Annotators
from seguncert.scenes import SCENES
from seguncert.truth import Truth

PIXELS = SCENES["pixels"]
SHORT = SceneRecipe(updates=8, batch=4, channels=4)


def kl(model, calibration=None, pictures=20):
    truth = Truth()
    for image in PIXELS.sample(pictures, seed=99)[0]:
        truth.update(PIXELS.posterior(image), log_probs(analyse(model, image, calibration=calibration)))
    return truth.compute()["kl"]


@pytest.fixture(scope="module")
def oversure():
    """ln of the exact posterior times 2.5 as a net of one convolution, but for what rounding to 8 bits changes."""
    means, variance = np.array(PIXELS.colours.means), PIXELS.colours.sds[0][0] ** 2
    # of x = 255 (MEAN + STD · input): ln p = (μ · x − |μ|² / 2) / σ² + ln prior
    weight = means / variance * 255 * STD
    bias = (255 * MEAN * means.sum(1) - (means**2).sum(1) / 2) / variance + np.log(PIXELS.priors)
    net = torch.nn.Conv2d(3, 3, 1)
    net.weight.data = 2.5 * torch.from_numpy(weight).float()[..., None, None]
    net.bias.data = 2.5 * torch.from_numpy(bias).float()
    return wrap_model(net, PIXELS.classes, mean=(MEAN,) * 3, std=(STD,) * 3, divisor=1, name="oversure")


@pytest.mark.parametrize("kind", ["temperature", "class-conditional", "vector", "isotonic", "auto"])
def test_a_fitted_calibrator_comes_nearer_to_the_truth(oversure, kind, tmp_path):
    write_scene("pixels", tmp_path / "p", 40, seed=5)
    found = calibrate(
        tmp_path / "p" / "images", tmp_path / "p" / "labels", tmp_path / "c.json", oversure, ignore_index=None,
        calibrator=kind, all_pixels=True, workers=1,
    ).calibration  # fmt: skip
    before, after = kl(oversure), kl(oversure, found)
    assert before > 0.1 and after < before / (5 if kind == "isotonic" else 10)  # isotonic sees the shown class alone
    if kind == "temperature":
        assert math.exp(-found.calibrator.constant) == pytest.approx(2.5, rel=0.05) and after < 2e-3


def test_broken_calibrations_are_caught(oversure, tmp_path):
    before = kl(oversure)
    write_scene("pixels", tmp_path / "swapped", 40, seed=5, shift=1)
    swapped = calibrate(
        tmp_path / "swapped" / "images", tmp_path / "swapped" / "labels", tmp_path / "c.json", oversure, ignore_index=None,
        calibrator="vector", all_pixels=True, workers=1,
    ).calibration  # fmt: skip
    assert kl(oversure, swapped) > before + 0.3
    write_scene("pixels", tmp_path / "p", 40, seed=5)
    right = calibrate(
        tmp_path / "p" / "images", tmp_path / "p" / "labels", tmp_path / "r.json", oversure, ignore_index=None,
        calibrator="temperature", all_pixels=True, workers=1,
    ).calibration  # fmt: skip
    for factor in (3.0, 1 / 3):
        assert kl(oversure, broken(right, factor)) > kl(oversure, right) + 0.05


def test_trainings_repeat_and_leave_random_numbers_alone():
    images, labels = PIXELS.sample(6, seed=0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    nets = [train_net(images, labels, 3, SHORT, seed=1) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    other = train_net(images, labels, 3, SHORT, seed=2)
    assert not torch.equal(other.head.weight, nets[0].head.weight)


def test_soft_targets_of_one_rater_are_hard_labels():
    images, labels = PIXELS.sample(6, seed=0)
    one_hot = (labels[:, None] == np.arange(3)[:, None, None]).astype(np.float32)
    hard, soft = (train_net(images, each, 3, SHORT, seed=1) for each in (labels, one_hot))
    torch.testing.assert_close(hard.head.weight, soft.head.weight, rtol=0, atol=2e-4)


def test_a_net_learns_the_posterior_and_soft_targets_teach_more():
    recipe = SceneRecipe(updates=60, batch=16, channels=8)
    images, labels = PIXELS.sample(12, seed=0)
    exact = np.stack([PIXELS.posterior(image) for image in images]).astype(np.float32)
    of_labels, of_posterior = (
        kl(as_model(train_net(images, each, 3, recipe, seed=0), PIXELS.classes, "small")) for each in (labels, exact)
    )
    truth = Truth()  # of a net that knows nothing but the priors
    for image in PIXELS.sample(20, seed=99)[0]:
        truth.update(PIXELS.posterior(image), np.log(np.array(PIXELS.priors))[:, None, None] * np.ones((1, 16, 16)))
    assert of_posterior < 0.75 * of_labels and of_labels < truth.compute()["kl"]


def test_an_adversary_takes_small_steps_against_the_shown_class():
    images, labels = PIXELS.sample(12, seed=0)
    model = as_model(train_net(images, labels, 3, replace(SHORT, updates=40), seed=0), PIXELS.classes, "small")
    changed = adversarial(model, images[0])
    assert 0 < abs(changed.astype(int) - images[0]).max() <= posterior_cells.STEP
    before, after = (analyse(model, image, calibration=None) for image in (images[0], changed))
    shown = before.labels[None]
    lost = np.take_along_axis(before.probabilities - after.probabilities, shown, 0)
    assert lost.mean() > 0


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A whole study of the smallest kind."""
    out = tmp_path_factory.mktemp("study")
    plan = posterior_study.Plan(("rows",), (4, 16), seeds=2, members=2, test=3, fit=10, updates=6)
    for cell in plan.cells():
        find_cell(cell, out)
    rows = posterior_study.run(out, plan, 1)
    return out, plan, rows


def test_the_study_judges_every_way_and_says_its_protocol(study):
    out, plan, rows = study
    for number in plan.numbers:
        usual = posterior_study.pick(rows, number=number, where="all", calibration="none", raters=0)
        assert {(row["method"], row["seed"]) for row in usual} == {
            (m, s) for m in posterior_cells.METHODS for s in (0, 1)
        }
        assert all(row["kl"] > 0 and 0 < row["entropy"] < math.log(3) for row in usual)
        assert len({round(row["true_entropy"], 9) for row in usual}) == 1  # all were judged on the same pictures
    assert {row["where"] for row in rows if row["number"] == 16} >= {"noise", "unseen colours", "adversarial"}
    assert {row["raters"] for row in rows} == {0, 1, 5, -1}
    content = json.loads((out / "study.json").read_text())
    assert "seeds 0 to 1" in content["protocol"] and len(content["rows"]) == len(rows)
    titles = [title for title, _, _ in posterior_study.tables(plan, rows)]
    assert len(titles) == len(set(titles)) == 7
    (table,) = [lines for title, _, lines in posterior_study.tables(plan, rows) if "soft targets" in title]
    whole = [row["kl"] for row in rows if row["raters"] == 5 and row["number"] == 16 and row["where"] == "all"]
    assert len(whole) == 2 and table[1][2].startswith(f"{np.mean(whole):.4f} [{min(whole):.4f}, {max(whole):.4f}]")
    broken_rows = [row for row in rows if row["calibration"] == "broken: classes swapped" and row["where"] == "all"]
    assert broken_rows and all(row["kind"] == "vector" for row in broken_rows)


def test_what_is_done_is_not_done_again(study, monkeypatch):
    out, plan, _ = study
    monkeypatch.setattr(posterior_cells, "train_net", lambda *_, **__: pytest.fail("trained again"))
    cell = plan.cells()[0]
    known = (out / "cells" / f"{cell.name}.json").read_text()
    assert find_cell(cell, out) == json.loads(known)
    (out / "cells" / f"{cell.name}.json").unlink()  # as after a stop: the nets are there
    assert json.dumps(find_cell(cell, out)["rows"]) == json.dumps(json.loads(known)["rows"])
    with pytest.raises(BaseException, match="trained again"):
        find_cell(replace(cell, recipe=replace(cell.recipe, updates=7)), out)


def test_the_error_of_the_expected_entropy_is_pixel_by_pixel(study):
    out, plan, rows = study
    cell = next(cell for cell in plan.cells() if not cell.raters and cell.number == 16 and cell.seed == 1)
    models, errors = posterior_cells.nets_of(cell, out, train=False), []
    for image in SCENES["rows"].sample(plan.test, posterior_cells.TEST_SEED)[0]:
        truth = SCENES["rows"].posterior(image)
        probs = np.stack([analyse(model, image, calibration=None).probabilities for model in models[:-1]]).astype(float)
        expected = -(probs * np.log(probs)).sum(1).mean(0)
        errors.append(abs(expected + (truth * np.log(truth)).sum(0)).mean())
    (row,) = posterior_study.pick(rows, number=16, seed=1, method="ensemble", calibration="none", where="all")
    assert row["expected_entropy_error"] == pytest.approx(np.mean(errors), abs=1e-4)


@pytest.mark.parametrize("name", SCENES)
def test_unseen_colours_are_hardly_ever_given_by_the_scene(name):
    """By the exact likelihood nearly every pixel of them is less probable than nearly every pixel of the scene's own."""
    images, _ = SCENES[name].sample(20, seed=7)

    def best(pictures):
        return np.concatenate([SCENES[name].colours.log_likelihood(image).max(0).ravel() for image in pictures])

    odd, own = best(posterior_cells.unseen(images)), best(images)
    assert roc_auc_score(np.repeat([1, 0], [len(odd), len(own)]), -np.concatenate([odd, own])) > 0.97


def test_a_probability_that_float32_rounds_to_0_is_no_infinity():
    net = torch.nn.Conv2d(3, 3, 1)
    net.weight.data.zero_()
    net.bias.data = torch.tensor([0.0, 300.0, 0.0])
    sure = wrap_model(net, PIXELS.classes, divisor=1, name="sure")
    image = PIXELS.sample(1, seed=0)[0][0]
    plain = log_probs(analyse(sure, image, calibration=None))
    views = log_probs(analyse(sure, image, method="tta", calibration=None))
    assert plain[0, 0, 0] == pytest.approx(-300) and views[0, 0, 0] == pytest.approx(posterior_cells.LEAST, abs=1e-3)


def test_the_page_holds_figures_commands_and_nothing_from_elsewhere(study, tmp_path, monkeypatch):
    out, _, _ = study
    monkeypatch.setattr(curves, "UPDATES", {name: (2, 4, 8) for name in curves.UPDATES})
    status, _, errors = call("posterior", "curves", tmp_path / "curves", "--seeds", "2")
    assert status == 0, errors
    status, _, errors = call("posterior", "report", tmp_path / "curves", out, tmp_path / "page.html")
    assert status == 0, errors
    page = (tmp_path / "page.html").read_text()
    for text in (
        "Why not just use the softmax?",
        "What is the difference between the two entropies?",
        "seguncert posterior curves",
        "seguncert posterior study",
    ):
        assert text in page
    assert (
        page.count("<figure>") >= 8
        and "http://" not in page.replace("http://www.w3.org", "")
        and "https://" not in page
    )
    assert not re.search(r"\bnan\b", page)


def test_damaged_results_are_named(study, tmp_path):
    out, _, _ = study
    for content in ("{broken", "[]", "{}"):
        (tmp_path / "study.json").write_text(content)
        status, _, errors = call("posterior", "report", tmp_path, tmp_path, tmp_path / "page.html")
        assert status == 2 and len(errors.strip().splitlines()) == 1
        assert f"{tmp_path / 'study.json'}: expected what `seguncert posterior study` wrote" in errors
    (tmp_path / "curves.json").write_text("{broken")
    status, _, errors = call("posterior", "report", tmp_path, out, tmp_path / "page.html")
    assert status == 2 and f"{tmp_path / 'curves.json'}: expected what `seguncert posterior curves` wrote" in errors


def test_a_page_trains_no_net(study, tmp_path):
    out, plan, _ = study
    (tmp_path / "study.json").write_text((out / "study.json").read_text())
    cell = next(cell for cell in plan.cells() if not cell.raters)
    with pytest.raises(ValueError, match="expected a net of this study. Received: none"):
        posterior_cells.nets_of(cell, tmp_path, train=False)


def test_annotators_train_as_their_shares(tmp_path):
    cell = Cell("rows", 3, 0, SHORT, members=1, test=2, fit=0, raters=5)
    (model,) = posterior_cells.nets_of(cell, _made(tmp_path))
    images, said = Annotators(SCENES["rows"], 5).sample(3, seed=0)
    shares = np.stack([(said == c).mean(1) for c in range(3)], 1).astype(np.float32)
    net = train_net(images, shares, 3, SHORT, seed=0)
    assert torch.equal(model.module.head.weight, net.head.weight)


def _made(out):
    for part in ("cells", "nets", "calibrations"):
        (out / part).mkdir()
    return out


def test_scenes_are_written_with_their_posteriors(tmp_path):
    status, _, errors = call("posterior", "scenes", "digit", tmp_path / "out", "--number", "3", "--seed", "4")
    assert status == 0, errors
    images, labels = SCENES["digit"].sample(3, seed=4)
    for k, letter in enumerate("abc"):
        found = np.load(tmp_path / "out" / "posteriors" / f"{letter}_0000.npy")
        np.testing.assert_array_equal(found, SCENES["digit"].posterior(images[k]))
        np.testing.assert_array_equal(read_image(tmp_path / "out" / "images" / f"{letter}_0000.png").rgb, images[k])
        np.testing.assert_array_equal(
            read_label(tmp_path / "out" / "labels" / f"{letter}_0000.png", 3, None), labels[k]
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scenes", "forest", "OUT"], "scene: expected one of pixels, rows, tree, digit. Received: 'forest'"),
        (["study", "OUT", "--scenes", "forest"], "scenes: expected some of pixels, rows, tree, digit. Received: forest"),
        (["study", "OUT", "--numbers", "ten"], "numbers: expected whole numbers with commas between. Received: 'ten'"),
        (["study", "OUT", "--seeds", "0"], "seeds: expected 1 or more. Received: 0"),
        (["study", "OUT", "--numbers", "20,20"], "numbers: expected each once. Received: 20, 20"),
        (["report", "OUT", "OUT", "OUT/page.html"], "expected the results of `seguncert posterior study`. Received: no such file"),
    ],
)  # fmt: skip
def test_wrong_calls_are_one_line(words, message, tmp_path):
    status, _, errors = call("posterior", *(word.replace("OUT", str(tmp_path / "out")) for word in words))
    assert status == 2 and message in errors and len(errors.strip().splitlines()) == 1
