"""The classic curves: quadrature against scipy, stacked nets against torch.nn, and a miniature of the whole command."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from calls import call
from PIL import Image
from scipy import integrate, stats
from sklearn.metrics import roc_auc_score
from torch import nn

from seguncert.apps import curve_pictures, curve_tables, curves, stacked_nets
from seguncert.apps.curves import Line, Plan, Problem, Said, auroc, of_one, of_several, solve
from seguncert.apps.stacked_nets import Recipe
from seguncert.scenes import CLASSIC

PARTS = {"equal": ((0, 1), (3, 1)), "nested": ((0, 2), (1, 1)), "sparse": ((0, 2), (3, 1))}
SMALL = {"equal": (5, 10, 15), "nested": (10, 20, 30), "sparse": (10, 20, 30)}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CLASSIC)
def test_kl_is_the_integral(name):
    """Of a q made by hand, with a kink as nets have them."""
    (first, second), line = (stats.norm(*part) for part in PARTS[name]), Line.of(CLASSIC[name])

    def logit(x):
        return 1.5 - x + 0.4 * abs(x - 0.7)

    def integrand(x):
        a, b = first.pdf(x) / 2, second.pdf(x) / 2
        q = 1 / (1 + np.exp(-logit(x)))
        return a * np.log(a / (a + b) / q) + b * np.log(b / (a + b) / (1 - q))

    expected = integrate.quad(integrand, -16, 16, points=[-4, 0, 0.7, 3, 6], epsabs=1e-12)[0]
    log_CG = -np.log1p(np.exp(np.stack([-logit(line.x_G), logit(line.x_G)])))
    assert line.kl_G(log_CG) @ line.mass_G == pytest.approx(expected, rel=1e-4)
    assert line.kl_G(np.log(line.true_CG)).max() == 0
    deciles = Said(log_CG[None], {}).figures(line)
    assert np.mean([deciles[f"kl.decile {d}"] for d in range(1, 11)]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", CLASSIC)
def test_deciles_hold_a_tenth_of_the_data_each_and_go_by_density(name):
    line = Line.of(CLASSIC[name])
    deciles_DG = line.deciles_DG()
    np.testing.assert_allclose(deciles_DG.sum(1), 0.1, atol=1e-12)
    np.testing.assert_allclose(deciles_DG.sum(0), line.mass_G, atol=1e-12)
    density_G = sum(stats.norm(*part).pdf(line.x_G) for part in PARTS[name]) / 2
    for denser_G, rarer_G in pairwise(deciles_DG):
        assert density_G[denser_G > 1e-15].min() >= density_G[rarer_G > 1e-15].max() - 1e-12
    drawn = CLASSIC[name].sample(100_000, seed=0)[0].ravel()
    of_drawn = deciles_DG.argmax(0)[np.rint((drawn - curves.LOW) / curves.STEP).astype(int)]
    np.testing.assert_allclose(np.bincount(of_drawn) / len(drawn), 0.1, atol=0.01)


def test_crossings_are_where_the_densities_are_equal():
    for name, parts in PARTS.items():
        first, second = (stats.norm(*part) for part in parts)
        for x in Line.of(CLASSIC[name]).crossings():
            assert first.pdf(x) == pytest.approx(second.pdf(x), rel=1e-3)
    assert Line.of(CLASSIC["sparse"]).crossings() == pytest.approx([1.581, 6.418], abs=1e-3)


def test_auroc_of_weighted_points():
    rng = np.random.default_rng(0)
    doubt, off, weight = rng.integers(0, 9, 300) / 9, rng.random(300) < 0.2, rng.random(300)
    assert auroc(doubt, off, weight) == pytest.approx(roc_auc_score(off, doubt, sample_weight=weight))
    assert np.isnan(auroc(doubt, np.zeros(300, bool), weight))


@pytest.mark.parametrize("key", [(0, 0), (3, 1)])
def test_a_stacked_net_is_the_net_of_torch_trained_alone(key):
    """Same start, same draws, Adam of each by itself, the same average."""
    scene, recipe = CLASSIC["nested"], Recipe(hidden=16, batch=50)
    stacked = stacked_nets.train(scene, [(7, 7), key], (20, 60), recipe)
    rng = np.random.default_rng(list(key))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    net = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    layers = [each for each in net if isinstance(each, nn.Linear)]
    with torch.no_grad():
        for layer in layers:
            bound = layer.in_features**-0.5
            layer.weight.T.copy_(torch.empty(layer.weight.T.shape).uniform_(-bound, bound, generator=generator))
            layer.bias.uniform_(-bound, bound, generator=generator)
    averaged = [each.detach().clone() for each in net.parameters()]
    optimiser, update = torch.optim.Adam(net.parameters(), recipe.rate), 0
    for chunk in (20, 40):
        (x_UB,), (label_UB,) = stacked_nets.draw(scene, [rng], (chunk, 50))
        for x_B, label_B in zip(x_UB, label_UB, strict=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x_B[:, None]), label_B).backward()
            optimiser.step()
            for mean, now in zip(averaged, net.parameters(), strict=True):
                mean += (1 - (1 + update) / (10 + update)) * (now.detach() - mean)
            update += 1
    with torch.no_grad():
        for parameter, mean in zip(net.parameters(), averaged, strict=True):
            parameter.copy_(mean)
        x_B = torch.linspace(-8, 10, 50)
        expected_BC, found_MBC = net(x_B[:, None]), stacked_nets.logits(stacked[60], x_B.expand(2, -1))
    torch.testing.assert_close(found_MBC[1], expected_BC, rtol=1e-3, atol=1e-4)


def test_dropout_masks_are_of_each_net_and_a_sample_is_a_function():
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    first, second = stacked_nets.masks_of(generators, 400, 64, 0.1)
    assert set(first.unique().tolist()) == {0.0, float(np.float32(1) / np.float32(0.9))}
    assert (first == 0).double().mean() == pytest.approx(0.1, abs=0.005) and not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    weights = stacked_nets.start(generators, 64)
    same_B = torch.full((5,), 2.0)
    logits_SMBC = stacked_nets.sampled(weights, same_B, 4, 0.1, [0, 1, 2])
    assert (logits_SMBC == logits_SMBC[:, :, :1]).all() and len(logits_SMBC[:, 0, 0].unique(dim=0)) == 4
    weights = stacked_nets.train(CLASSIC["equal"], [(0, 0)], (1,), Recipe(dropout=0.5))[1]
    assert all(each.isfinite().all() for each in weights)


def test_what_several_nets_say():
    """Two nets at one x: 0.9 and 0.5."""
    probs_MGC = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]])
    said = of_several(probs_MGC.log()[:, None])
    entropies = [stats.entropy(p) / np.log(2) for p in ([0.7, 0.3], [0.9, 0.1], [0.5, 0.5])]
    np.testing.assert_allclose(np.exp(said.log_SCG[0, :, 0]), [0.7, 0.3], atol=1e-6)
    expected = {
        "confidence": 0.7, "entropy": entropies[0], "expected_entropy": np.mean(entropies[1:]),
        "mutual_information": entropies[0] - np.mean(entropies[1:]), "variance": 0.08 / 0.5,
    }  # fmt: skip
    assert {name: each.item() for name, each in said.maps.items()} == pytest.approx(expected, abs=1e-6)
    assert said.samples_TG.tolist() == pytest.approx(np.array([[0.9], [0.5]]))
    assert set(of_one(probs_MGC.log()).maps) == {"confidence", "entropy"}


def test_figures_of_a_net_that_is_off_in_one_place():
    """0.3 off beyond x = 8, and doubt nowhere else: found with certainty, though hardly any data is there."""
    line = Line.of(CLASSIC["sparse"])
    away_G = line.x_G > 8.005
    log_1CG = np.log(np.where(away_G, line.true_CG + np.array([[-0.3], [0.3]]), line.true_CG))[None]
    figures = Said(log_1CG, {"entropy": away_G[None].astype(float), "confidence": away_G[None].astype(float)}).figures(
        line
    )
    assert figures["off.even"] == pytest.approx([200 / 1801]) and 0 < figures["off.density"][0] < 1e-4
    assert figures["auroc.even.entropy"] == figures["auroc.density.entropy"] == pytest.approx([1.0])
    assert figures["auroc.even.confidence"] == pytest.approx([0.0])
    assert figures["error at 1.58"] == pytest.approx([0]) and figures["error at 6.42"] == pytest.approx([0])


def test_nets_come_near_the_posterior_and_the_same_seeds_to_the_same_table():
    plan, told = Plan(seeds=3, members=2, samples=5, draws=500), []
    problem = solve("equal", plan, told.append)
    assert sum(told) == 100 * 3 * 3
    kl = problem.nets[100].figures(problem.line)["kl"]
    assert len(kl) == 3 and 0 < max(kl) <= 3e-3
    first, again = (json.dumps(solve("equal", plan, updates=(10,)).rows()) for _ in range(2))
    assert first == again
    more = solve("equal", replace(plan, seeds=4), updates=(10,)).nets[10].log_SCG
    np.testing.assert_allclose(
        more[:3], problem.nets[10].log_SCG, rtol=1e-3, atol=1e-4
    )  # a seed is itself in any company


def test_the_command_writes_all_and_prints_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "UPDATES", SMALL)
    monkeypatch.setattr(curve_pictures, "DOTS_PER_INCH", 40)
    monkeypatch.setattr(curves, "Plan", lambda seeds: Plan(seeds, members=2, samples=4, draws=2000))
    status, output, errors = call("posterior", "curves", tmp_path / "out", "--seeds", 2)
    assert status == 0 and errors == ""
    names = {f"{name}.{kind}" for name in (*CLASSIC, "doubt") for kind in ("png", "svg")}
    assert {each.name for each in (tmp_path / "out").iterdir()} == names | {"curves.csv", "curves.json"}
    written = json.loads((tmp_path / "out" / "curves.json").read_text(), parse_constant=pytest.fail)
    assert written["protocol"]["recipe"]["rate"] == Recipe().rate and written["protocol"]["seeds"] == 2
    rows = written["rows"]
    table = list(csv.DictReader((tmp_path / "out" / "curves.csv").read_text().splitlines()))
    assert len(table) == len(rows) and {row["method"] for row in rows} == set(curves.METHODS)
    for row, line in zip(rows, table, strict=True):
        known = [value for value in row["values"] if value is not None]
        assert len(row["values"]) == 2 and row["seeds"] == len(known) == int(line["seeds"])
        assert (line["mean"] == "") if not known else float(line["mean"]) == pytest.approx(np.mean(known))
    kl = next(row for row in rows if (row["problem"], row["updates"], row["figure"]) == ("sparse", 30, "kl"))
    assert curve_tables._range(kl, curve_tables._thousandths) in output and "a fitted temperature takes" in output
    for name in (*CLASSIC, "doubt"):
        assert np.asarray(Image.open(tmp_path / "out" / f"{name}.png").convert("L")).std() > 5
        svg = (tmp_path / "out" / f"{name}.svg").read_text()
        assert ElementTree.fromstring(svg).get("aria-label") and "var(--ink, #16191f)" in svg


def test_verdicts_say_what_does_best_and_that_nothing_is_off():
    line = Line.of(CLASSIC["equal"])
    right = Said(np.log(line.true_CG)[None], {"entropy": np.ones((1, line.x_G.size))})
    rows = Problem("equal", line, {5: right}, {}).rows()
    said = curve_tables.verdicts(rows, "equal")
    assert len(said) == 2 and all("nothing is off by more than 0.1 anywhere" in each for each in said)
    flat = Said(np.full((1, *line.true_CG.shape), np.log(0.5)), {"entropy": 1.0 * (np.abs(line.x_G - 1.5) > 0.3)[None]})
    rows = Problem("equal", line, {5: flat}, {}).rows()
    assert "is of net entropy, 0.99" in curve_tables.verdicts(rows, "equal")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("out", "--seeds", 0), "seguncert: seeds: expected 1 or more. Received: 0"),
        (("file",), "file: File exists"),
        (("file/out",), "file/out: Not a directory"),
    ],
)
def test_wrong_calls_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    status, output, errors = call("posterior", "curves", *arguments)
    assert status == 2 and output == "" and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "out").exists()


def test_a_stop_is_one_line(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stacked_nets, "train", stopped)
    status, output, errors = call("posterior", "curves", tmp_path)
    assert (status, output, errors) == (130, "", "stopped before the end; the same command begins anew\n")
    assert not list(tmp_path.iterdir())


def test_help_answers_without_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from seguncert.cli import app\n"
        "run = CliRunner().invoke(app, ['posterior', 'curves', '--help'])\n"
        "assert run.exit_code == 0 and '--seeds' in run.output and not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
