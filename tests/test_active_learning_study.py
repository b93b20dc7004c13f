"""The study of active learning: labels are only what was chosen, a stop loses nothing, and the figures are what they say."""

import csv
import json
import runpy
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from seguncert.apps import active_learning_study as study
from seguncert.apps import budget_curves as curves
from seguncert.apps import small_nets
from seguncert.labels import IGNORED
from seguncert.model import build_net, load_model

RECIPE = small_nets.SmallRecipe(updates=2, batch=64, encoder="resnet18", channels=8)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """The encoder is a resnet from its random start, so that no package of weights is needed."""
    monkeypatch.setattr(small_nets, "load_imagenet", lambda encoder, name: None)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


@pytest.fixture
def data(tmp_path):
    """Six photos to train on and two to judge on, twice as large as the study takes them; light is class 1, 2 is ignored."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 6), ("val", 2)):
        for kind in ("images", "labels"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
        for k in range(number):
            label = np.repeat(np.repeat(rng.integers(0, 2, (4, 6), dtype=np.uint8), 32, 0), 32, 1)
            label[:10, :20] = 2
            rgb = np.repeat(40 + 80 * label[..., None], 3, axis=2)
            cv2.imwrite(str(tmp_path / "data" / part / "images" / f"drive_{k}.png"), rgb)
            cv2.imwrite(str(tmp_path / "data" / part / "labels" / f"drive_{k}.png"), label)
    return tmp_path / "data"


@pytest.fixture
def plan():
    """Regions of 32 pixels of photos of 96x64: 36 in all."""
    strategies = {
        "random": study.AT_RANDOM,
        "plain": study.Strategy("plain", "plain", select={"diversity": 0.0}),
        "ours": study.Strategy("ours", "selection", {"embeddings": True}),
    }
    return study.Plan("small", "small", ("dark", "light"), 2, 100, "region", 32, (4, 0.25, 18), RECIPE, strategies)


def test_photos_are_shrunk_and_labels_kept_whole(data, plan, tmp_path):
    study.prepare(data, tmp_path / "out", plan)
    photos = study.read_photos(tmp_path / "out" / "train", 2)
    assert len(photos.rgb) == 6
    for path, small_HW in photos.labels.items():
        large_HW = cv2.imread(str(data / "train" / "labels" / path), cv2.IMREAD_UNCHANGED)
        rgb_HW3 = cv2.imread(str(data / "train" / "images" / path))
        assert small_HW.shape == (64, 96) and photos.rgb[path].shape == (64, 96, 3)
        for y, x in np.ndindex(64, 96):
            expected = large_HW[2 * y + 1, 2 * x + 1]
            assert small_HW[y, x] == (IGNORED if expected == 2 else expected)
        assert photos.rgb[path][20, 30, 0] == round(rgb_HW3[40:42, 60:62, 0].mean())
    before = (tmp_path / "out" / "train" / "images" / "drive_0.png").stat().st_mtime_ns
    study.prepare(data, tmp_path / "out", plan)
    assert (tmp_path / "out" / "train" / "images" / "drive_0.png").stat().st_mtime_ns == before


def test_only_what_was_chosen_is_known(data, plan, tmp_path):
    study.prepare(data, tmp_path / "out", plan)
    photos = study.read_photos(tmp_path / "out" / "train", 2)
    units = study.units_of(plan, photos)
    assert len(units) == 36 and sum(unit.width * unit.height for unit in units) == 6 * 64 * 96
    places = [units[3], units[4], units[20]]
    labels = study.known(photos, places)
    assert set(labels) == {place.path for place in places} and len(labels) == 2
    inside = 0
    for place in places:
        box = np.s_[place.y : place.y + place.height, place.x : place.x + place.width]
        assert (labels[place.path][box] == photos.labels[place.path][box]).all()
        inside += (photos.labels[place.path][box] != IGNORED).sum()
    assert sum((label != IGNORED).sum() for label in labels.values()) == inside
    whole = study.known(photos, study.units_of(replace(plan, unit="image"), photos)[:2])
    assert len(whole) == 2 and all((label == photos.labels[path]).all() for path, label in whole.items())


def run(plan, out, data, monkeypatch, seeds=1):
    """The study in this process, since replaced functions do not reach others."""
    import concurrent.futures

    class Here(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers, context, initializer):
            super().__init__(1)

    monkeypatch.setattr("seguncert.apps.processes.ProcessPoolExecutor", Here)
    study.prepare(data, out / "data" / plan.name, plan)
    study.run_all([plan], seeds, out, 1)
    return study.read_results(out / "results.jsonl", [plan])


def test_the_study_runs_and_a_stop_loses_nothing(data, plan, tmp_path, monkeypatch):
    lines = run(plan, tmp_path / "out", data, monkeypatch)
    assert len(lines) == 2 + 3 * 2
    labelled = {(line["strategy"], line["round"]): line["labelled"] for line in lines}
    assert labelled == {
        ("start", 0): 4, ("full", 0): 36, ("random", 1): 9, ("random", 2): 18, ("plain", 1): 9, ("plain", 2): 18,
        ("ours", 1): 9, ("ours", 2): 18,
    }  # fmt: skip
    tables = {}
    for task in study.tasks_of(plan, 0):
        if task.strategy != "full":
            with (study.folder_of(task, plan, tmp_path / "out") / "labelled.csv").open() as file:
                rows = [(row["path"], row["x"], row["y"]) for row in csv.DictReader(file)]
            tables[task.strategy, task.round] = rows
            assert len(set(rows)) == len(rows) == labelled[task.strategy, task.round]
    for name in plan.strategies:
        assert tables["start", 0] == tables[name, 1][:4] and tables[name, 1] == tables[name, 2][:9]
    assert len({tuple(sorted(tables[name, 2])) for name in plan.strategies}) == 3
    assert not list((tmp_path / "out").rglob("work"))

    text = (tmp_path / "out" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "results.jsonl").write_text("".join(text[:-3]) + text[-1][:50])
    asked = []
    real = study.run_task
    monkeypatch.setattr(study, "run_task", lambda task, *more: asked.append(task.key) or real(task, *more))
    again = run(plan, tmp_path / "out", data, monkeypatch)
    assert len(asked) == 3 and sorted(map(identity, again)) == sorted(map(identity, lines))


def identity(line):
    """What must not change when it is done again."""
    return json.dumps({key: value for key, value in line.items() if not key.endswith("_s")}, sort_keys=True)


def test_lines_of_other_settings_are_left_out(plan, tmp_path):
    line = {"dataset": "small", "strategy": "ours", "seed": 0, "round": 1, "protocol": study.protocol(plan, "ours")}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    assert study.read_results(tmp_path / "results.jsonl", [plan]) == [line]
    strategies = dict(plan.strategies) | {"ours": study.Strategy("ours", "selection", select={"diversity": 2.0})}
    assert study.read_results(tmp_path / "results.jsonl", [replace(plan, strategies=strategies)]) == []
    other = replace(plan, recipe=replace(plan.recipe, updates=3))
    assert study.read_results(tmp_path / "results.jsonl", [other]) == []
    titles = dict(plan.strategies) | {"ours": replace(plan.strategies["ours"], title="other words")}
    assert study.read_results(tmp_path / "results.jsonl", [replace(plan, strategies=titles)]) == [line]


@pytest.fixture(scope="module")
def squares():
    """Photos whose brightness is their label, in squares of 16 pixels, of two sizes."""
    rng = np.random.default_rng(1)
    labels = {
        f"{n}.png": np.repeat(np.repeat(rng.integers(0, 2, (4, 4 + n % 2), dtype=np.uint8), 16, 0), 16, 1)
        for n in range(4)
    }
    return {key: np.repeat(60 + 120 * label[..., None], 3, axis=2) for key, label in labels.items()}, labels


def test_training_is_a_function_of_labels_and_seed_and_learns(squares, tmp_path):
    photos, labels = squares
    recipe = replace(RECIPE, updates=60, rate=1e-2)
    encoded = small_nets.Encoded(recipe, photos)
    first, second, other = (small_nets.train_small(labels, 2, recipe, seed, encoded).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    net = build_net(recipe.config(2))
    net.load_state_dict(first)
    small_nets.save_small(tmp_path / "model", net, ("dark", "light"), recipe)
    model = load_model(tmp_path / "model", "cpu")
    assert model.frame is None and model.classes == ("dark", "light")
    import seguncert

    shown = seguncert.analyse(model, photos["0.png"], calibration=None).labels
    assert (shown == labels["0.png"]).mean() > 0.75


def test_places_by_themselves_are_what_the_whole_net_gives(squares):
    photos, labels = squares
    recipe = replace(RECIPE, updates=3)
    encoded = small_nets.Encoded(recipe, photos)
    net = small_nets.train_small(labels, 2, recipe, 0, encoded)
    for key, rgb in photos.items():
        H, W = rgb.shape[:2]
        first = encoded.first[key]
        with torch.inference_mode():
            whole = net.segmentation_head[0](net.decoder(net.encoder(small_nets.net_input(rgb))))[0]
            alone = small_nets._decode(net, encoded.rows_PK[first : first + H * W // 16].float())
        expected = whole[:, : H // 4, : W // 4].flatten(1).T
        assert torch.allclose(alone, expected, atol=0.05 * float(expected.std()) + 1e-3)  # rows are in bfloat16


def test_a_target_is_the_share_of_the_labelled_pixels(squares):
    photos, _ = squares
    label_HW = np.full((64, 64), IGNORED, np.uint8)
    label_HW[0, :3], label_HW[1, 0], label_HW[63, 63] = 1, 0, 0
    row_P, share_PC = small_nets._targets({"2.png": label_HW}, 2, small_nets.Encoded(RECIPE, photos))
    first = 16 * 16 + 16 * 20  # places of the two photos before
    assert row_P.tolist() == [first, first + 255]
    assert share_PC.tolist() == [[1 / 16, 3 / 16], [1 / 16, 0]]


def test_nothing_labelled_is_refused(squares):
    photos, labels = squares
    nothing = {key: np.full_like(label, IGNORED) for key, label in labels.items()}
    with pytest.raises(ValueError, match="labels: expected a labelled pixel. Received: none"):
        small_nets.train_small(nothing, 2, RECIPE, 0, small_nets.Encoded(RECIPE, photos))


def test_miou_is_that_of_scikit_learn():
    rng = np.random.default_rng(2)
    true, shown = rng.integers(0, 4, 500), rng.integers(0, 4, 500)
    counts_CC = np.zeros((5, 5), int)
    np.add.at(counts_CC, (true, shown), 1)
    assert curves.miou(counts_CC) == pytest.approx(jaccard_score(true, shown, average="macro"))


def lines_of(values, dataset="small", units=100, C=2, K=6):
    """Lines whose mIoU is close to the values, by strategy, seed and round: clusters of 1,000 pixels a class."""
    rng = np.random.default_rng(3)
    for (strategy, seed, number, labelled), value in values.items():
        confusions = []
        for _ in range(K):
            wrong = round(1000 * (1 - value) / (1 + value)) + int(rng.integers(-20, 21))  # IoU = (n − w) / (n + w)
            confusions.append([1000 - wrong, wrong, wrong, 1000 - wrong])
        yield {
            "dataset": dataset, "strategy": strategy, "seed": seed, "round": number, "labelled": labelled, "units": units,
            "confusions": confusions,
        }  # fmt: skip


VALUES = {
    ("start", s, 0, 2): 0.40 + 0.01 * s for s in range(3)
} | {
    (name, s, r, 2 * 2**r): 0.40 + 0.01 * s + gain * r for name, gain in (("random", 0.1), ("ours", 0.15)) for s in range(3) for r in (1, 2, 3)
} | {("full", s, 0, 100): 0.80 for s in range(3)}  # fmt: skip


def test_curves_begin_with_the_common_start(plan):
    found, full = curves.curves_of(plan, list(lines_of(VALUES)))
    assert set(found) == {"random", "ours"} and full is not None
    assert found["ours"].labelled_R.tolist() == [2, 4, 8, 16] and found["ours"].share_R[0] == pytest.approx(0.02)
    assert found["ours"].miou_SR.shape == (3, 4)
    np.testing.assert_allclose(found["ours"].miou_SR[1], [0.41, 0.56, 0.71, 0.86], atol=0.02)
    assert full.miou_SR == pytest.approx(0.8, abs=0.02)


def test_partial_results_are_shown_as_far_as_they_go(plan, tmp_path):
    some = {key: value for key, value in VALUES.items() if not (key[0] == "ours" and key[1] == 2 and key[2] > 1)}
    del some["random", 1, 1, 4], some["random", 1, 2, 8], some["random", 1, 3, 16]
    found, _ = curves.curves_of(plan, list(lines_of(some)))
    assert found["ours"].seeds == (0, 1, 2) and found["ours"].labelled_R.tolist() == [2, 4]
    assert found["random"].seeds == (0, 2) and len(found["random"].labelled_R) == 4
    assert "mIoU on val by budget" in curves.report([plan], list(lines_of(some)), tmp_path)
    assert "nothing to report yet" in curves.report([plan], [], tmp_path)


def test_differences_are_paired_and_their_interval_holds_them(plan):
    found, _ = curves.curves_of(plan, list(lines_of(VALUES)))
    difference_SR, ends_2R = curves.against(found["ours"], found["random"])
    expected_SR = found["ours"].miou_SR - found["random"].miou_SR
    np.testing.assert_allclose(difference_SR, expected_SR, atol=1e-12)
    assert (ends_2R[0] <= difference_SR.mean(0) + 1e-12).all() and (difference_SR.mean(0) <= ends_2R[1] + 1e-12).all()
    np.testing.assert_allclose(ends_2R[:, 0], 0, atol=1e-12)  # the start is the same
    assert (ends_2R[0, 1:] > 0).all() and (ends_2R[1, 1:] - ends_2R[0, 1:] < 0.05).all()


def test_area_and_budget_are_those_of_a_fine_line():
    share_R, miou_R = np.array([0.01, 0.03, 0.1, 0.2]), np.array([0.3, 0.5, 0.45, 0.7])
    x = np.linspace(np.log(0.01), np.log(0.2), 200_001)
    line = np.interp(x, np.log(share_R), miou_R)
    assert curves.area(share_R, miou_R) == pytest.approx(line.mean(), abs=1e-5)
    for target in (0.31, 0.4, 0.49, 0.6):
        budget, sign = curves.budget_for(target, share_R, miou_R)
        assert sign == "" and budget == pytest.approx(np.exp(x[np.flatnonzero(line >= target)[0]]), rel=1e-4)
    assert curves.budget_for(0.2, share_R, miou_R) == (0.01, "<")
    assert curves.budget_for(0.71, share_R, miou_R) == (0.2, ">")


def test_the_report_says_what_was_reached(plan, tmp_path):
    text = curves.report([plan], list(lines_of(VALUES)), tmp_path, tmp_path / "curves.jpg")
    assert (tmp_path / "table.txt").read_text() == text
    mean_R = np.mean([[0.40, 0.55, 0.70, 0.85], [0.41, 0.56, 0.71, 0.86], [0.42, 0.57, 0.72, 0.87]], 0)
    expected = 2 * 2 ** np.interp(0.95 * 0.8, mean_R, range(4))  # percent; random comes to 0.71 and not to 0.76
    row = next(line for line in text.splitlines() if "ours" in line and "+0.07" in line)
    cells = [cell.strip() for cell in row.split("│")]
    assert float(cells[6].rstrip(" %")) == pytest.approx(expected, rel=0.1)
    assert float(cells[7].strip("< %")) == pytest.approx(100 * expected / 16, rel=0.1) and cells[7].startswith("<")
    assert "> 16 %: not reached" in next(
        line for line in text.splitlines() if "random" in line and "not reached" in line
    )
    for name in ("curves.png", "curves.jpg"):
        picture = cv2.imread(str(tmp_path / name))
        assert picture.shape[0] > 400 and picture.std() > 5


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["active_learning_study", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(study.__file__, run_name="__main__")
    told = capsys.readouterr().err
    assert end.value.code == 2 and told == "data: expected --camvid or --nuclei, or both. Received: none\n"
