"""Three classic problems on a line: how near small nets come to the exact posterior, and what tells where they are not.

Minimising cross-entropy is estimating the posterior (Richard, Lippmann 1991). With much data a net does, except where there is
none: on the problem `sparse` the posterior crosses 1/2 a second time where hardly any x falls. The nets of `seguncert.apps.
stacked_nets` are held against the exact posterior p by quadrature over the density of x, not by drawing; then ensembles, MC
dropout and calibrators are asked the same, and each map whether its doubt is where the prediction is off by more than `OFF`.

Letters: M nets, S seeds, T samples, C = 2 classes, G points of the grid of x, D = 10 deciles.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from seguncert.apps import stacked_nets
from seguncert.apps.stacked_nets import Recipe, Weights
from seguncert.fitting import Drawn, Pixels, fit
from seguncert.maps import OF_SAMPLES, describe, describe_spread
from seguncert.moments import Moments
from seguncert.posterior import IndependentPixels, log
from seguncert.scenes import CLASSIC
from seguncert.store import write_file
from seguncert.truth import OFF

LOW, HIGH, STEP = -16.0, 16.0, 0.01  # of the grid: eight standard deviations on either side of the widest class
EVEN = (-8.0, 10.0)  # where the maps are judged with every x counting alike
NEAR = 1.0  # how far from a crossing the largest error is looked for
UPDATES = {"equal": (10, 50, 100), "nested": (10, 100, 1000), "sparse": (100, 1000, 10000)}
OF_SOFTMAX = ("confidence", "entropy")  # with two classes the margin says the same
NET, DROPOUT, ENSEMBLE = "net", "mc-dropout", "ensemble"
KINDS = ("temperature", "class-conditional", "vector", "histogram", "isotonic")  # the others look at a picture
METHODS = (NET, *(f"net, {kind}" for kind in KINDS), DROPOUT, ENSEMBLE)
FAINTEST = -87.0  # ln of the least probability that counts: what is left of float32 is 0


@dataclass(frozen=True)
class Plan:
    """The protocol: nets of an ensemble, dropout and its samples, labelled draws that a calibrator is fitted on."""

    seeds: int = 10
    recipe: Recipe = field(default_factory=Recipe)
    members: int = 5
    dropout: float = 0.1
    samples: int = 100
    draws: int = 20_000

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds: expected 1 or more. Received: {self.seeds}")

    def words(self) -> dict[str, Any]:
        """As it stands in curves.json."""
        return asdict(self) | {
            "updates": {name: list(updates) for name, updates in UPDATES.items()},
            "nets": "1 to hidden to hidden to 2, ReLU; Adam; cross-entropy of fresh mini-batches; weights averaged with decay"
            " (1 + u) / (10 + u); dropout on both hidden layers, a sample is one mask for all x; a net is the first of an ensemble, whose nets each draw"
            " mini-batches of their own, so that an ensemble has seen as many times the data as it has nets",
            "quadrature": {"low": LOW, "high": HIGH, "step": STEP},
            "deciles": "x in the order of its density, in ten regions that hold a tenth of the probability each; 1 is the densest",
            "crossing": f"largest |p - q| within {NEAR:g} of where the exact posterior crosses 1/2",
            "off": f"|p - q| > {OFF} of the mean prediction of the method",
            "even": f"every x from {EVEN[0]:g} to {EVEN[1]:g} counts alike", "density": "x counts as often as it occurs",
            "calibrators": f"fitted for each net on {self.draws} labelled draws of its own",
            "mean, lowest, highest": "over seeds; undefined where no x is off", "torch": str(torch.__version__),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Line:
    """The grid of a problem: its density, probability and exact posterior at each x."""

    x_G: Float64[np.ndarray, " G"]
    joint_CG: Float64[np.ndarray, "C G"]  # P(c) p(x | c)
    true_CG: Float64[np.ndarray, "C G"]

    @classmethod
    def of(cls, scene: IndependentPixels) -> Line:
        """From `LOW` to `HIGH` in steps of `STEP`."""
        x_G = np.linspace(LOW, HIGH, round((HIGH - LOW) / STEP) + 1)
        image = x_G[None, :, None]
        joint_CG = np.exp(log(scene.priors)[:, None] + scene.colours.log_likelihood(image)[:, 0])
        return cls(x_G, joint_CG, scene.posterior(image)[:, 0])

    @property
    def mass_G(self) -> Float64[np.ndarray, " G"]:
        """Probability of each point's surroundings: the trapezoidal rule, the ends being nothing."""
        mass_G = self.joint_CG.sum(0) * STEP
        return mass_G / mass_G.sum()

    @property
    def even_G(self) -> Float64[np.ndarray, " G"]:
        """1 where every x counts alike."""
        return ((self.x_G > EVEN[0] - STEP / 2) & (self.x_G < EVEN[1] + STEP / 2)).astype(float)

    def deciles_DG(self) -> Float64[np.ndarray, "10 G"]:
        """What each point adds to the ten regions by density, the densest first; a row sums to 1/10."""
        order = np.argsort(-self.mass_G, kind="stable")
        after_G = self.mass_G[order].cumsum()
        ends_D1 = np.linspace(0, 1, 11)[:, None]
        inside_DG = np.minimum(after_G, ends_D1[1:]) - np.maximum(after_G - self.mass_G[order], ends_D1[:-1])
        found_DG = np.empty((10, order.size))
        found_DG[:, order] = inside_DG.clip(min=0)
        return found_DG

    def crossings(self) -> list[float]:
        """Where P(first class | x) is 1/2."""
        off_G = self.true_CG[0] - 0.5
        at = np.flatnonzero(np.diff(np.sign(off_G)) != 0)
        return [float(self.x_G[g] + STEP * off_G[g] / (off_G[g] - off_G[g + 1])) for g in at]

    def kl_G(self, log_CG: Float64[np.ndarray, "C G"]) -> Float64[np.ndarray, " G"]:
        """Σ p (ln p − ln q) at each x, in nats; its mean is the sum weighted by `mass_G`."""
        apart_CG = log(self.true_CG) - log_CG
        found_G: np.ndarray = np.where(self.true_CG > 0, self.true_CG * apart_CG, 0).sum(0)
        return found_G


def auroc(
    doubt_G: Float[np.ndarray, " G"], off_G: Bool[np.ndarray, " G"], weight_G: Float64[np.ndarray, " G"]
) -> float:
    """P(what is off has more doubt than what is not), ties halved, of weighted points; NaN where all or none is off.

    >>> auroc(np.array([0.1, 0.2, 0.2, 0.9]), np.array([False, False, True, True]), np.array([2.0, 1.0, 1.0, 1.0]))
    0.9166666666666666
    """
    _, place = np.unique(doubt_G, return_inverse=True)
    off, on = (np.bincount(place, weight_G * side) for side in (off_G, ~off_G))
    pairs = off.sum() * on.sum()
    return float((off * (on.cumsum() - on / 2)).sum() / pairs) if pairs > 0 else float("nan")


@dataclass(frozen=True, eq=False)
class Said:
    """What one method says on the grid, of each seed: ln of its mean prediction, and its maps in [0, 1]."""

    log_SCG: Float64[np.ndarray, "S C G"]
    maps: Mapping[str, Float[np.ndarray, "S G"]]
    samples_TG: Float[np.ndarray, "T G"] | None = (
        None  # P(first class | x) of the first seed's samples, where there are any
    )

    def figures(self, line: Line) -> dict[str, list[float]]:
        """Each figure of merit of each seed."""
        found: dict[str, list[float]] = {}
        deciles_DG, even_G = line.deciles_DG(), line.even_G
        for s, log_CG in enumerate(self.log_SCG):
            kl_G, error_G = line.kl_G(log_CG), np.abs(np.exp(log_CG) - line.true_CG).max(0)
            values = {"kl": kl_G @ line.mass_G}
            values |= {f"kl.decile {d}": 10 * kl_G @ inside_G for d, inside_G in enumerate(deciles_DG, 1)}
            for x in line.crossings():
                values[f"error at {x:.2f}"] = error_G[np.abs(line.x_G - x) <= NEAR].max()
            for weighting, weight_G in (("even", even_G / even_G.sum()), ("density", line.mass_G)):
                values[f"off.{weighting}"] = (error_G > OFF) @ weight_G
                for name, map_SG in self.maps.items():
                    doubt_G = 1 - map_SG[s] if name == "confidence" else map_SG[s]
                    values[f"auroc.{weighting}.{name}"] = auroc(doubt_G, error_G > OFF, weight_G)
            for key, value in values.items():
                found.setdefault(key, []).append(float(value))
        return found


def of_one(logits_MGC: Float[Tensor, "M G C"]) -> Said:
    """Of nets by themselves."""
    maps = [describe(each.T[:, None].contiguous(), OF_SOFTMAX)[1] for each in logits_MGC]
    return Said(*_planes(logits_MGC.double().log_softmax(-1).transpose(1, 2), maps))


def of_several(logits_TMGC: Float[Tensor, "T M G C"]) -> Said:
    """Of M predictions, each of T samples: the grid is a picture of one row."""
    _, M, G, C = logits_TMGC.shape
    log_MCG, maps = torch.empty(M, C, G, dtype=torch.float64), []
    for m in range(M):
        moments = Moments.empty(C, 1, G)
        moments.update(logits_TMGC[:, m].transpose(1, 2)[:, :, None].contiguous())
        log_MCG[m] = moments.mean_CHW[:, 0].double().log().clamp(min=FAINTEST)
        maps.append(describe(moments.log_mean_CHW(), OF_SOFTMAX)[1] | describe_spread(moments, OF_SAMPLES))
    return Said(*_planes(log_MCG, maps), logits_TMGC[:, 0].softmax(-1)[..., 0].numpy())


def _planes(log_MCG: Tensor, maps: Sequence[Mapping[str, Tensor]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return log_MCG.numpy(), {name: np.stack([each[name][0].numpy() for each in maps]) for name in maps[0]}


def calibrated(
    scene: IndependentPixels, weights: Weights, logits_MGC: Float[Tensor, "M G C"], plan: Plan
) -> dict[str, Said]:
    """Of each kind of calibrator, fitted for each net on labelled draws."""
    M, C = len(logits_MGC), len(scene.classes)
    x_Mn, label_Mn = stacked_nets.draw(scene, [np.random.default_rng([m, 1 << 20]) for m in range(M)], (plan.draws,))
    with torch.no_grad():
        drawn_MnC = stacked_nets.logits(weights, x_Mn).numpy()
    found = {}
    for kind in KINDS:
        after = []
        for m in range(M):
            drawn = Drawn(drawn_MnC[m], label_Mn[m].numpy(), np.empty((plan.draws, 0), np.float32), "draws", "draws")
            calibrator = fit(kind, Pixels(C, drawn=[drawn]))
            after.append(calibrator(logits_MGC[m].T[:, None].contiguous(), None)[:, 0].T)
        found[f"net, {kind}"] = of_one(torch.stack(after))
    return found


@dataclass(frozen=True, eq=False)
class Problem:
    """What was found on one problem: the net after each number of updates, the methods after the last."""

    name: str
    line: Line
    nets: Mapping[int, Said]
    methods: Mapping[str, Said]

    def rows(self) -> list[dict[str, Any]]:
        """A row a figure of merit; `values` are of the seeds, None where undefined."""
        last = max(self.nets)
        said = [(NET, updates, each) for updates, each in self.nets.items()]
        said += [(method, last, each) for method, each in self.methods.items() if method != NET]
        return [
            {"problem": self.name, "method": method, "updates": updates, "figure": figure, **summary(values)}
            for method, updates, each in said
            for figure, values in each.figures(self.line).items()
        ]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and range of those that are defined.

    >>> summary([1.0, 2.0, float("nan")])
    {'mean': 1.5, 'lowest': 1.0, 'highest': 2.0, 'seeds': 2, 'values': [1.0, 2.0, None]}
    """
    known = [value for value in values if value == value]
    ends = (float(np.mean(known)), min(known), max(known)) if known else (None, None, None)
    return dict(zip(("mean", "lowest", "highest"), ends, strict=True)) | {
        "seeds": len(known), "values": [value if value == value else None for value in values],
    }  # fmt: skip


def solve(
    name: str, plan: Plan, progress: Callable[[int], None] = lambda updates: None, updates: Sequence[int] | None = None
) -> Problem:
    """Train all nets of a problem and ask all methods; `progress` is told of updates of a net that were made."""
    scene, milestones, seeds = CLASSIC[name], updates or UPDATES[name], range(plan.seeds)
    line = Line.of(scene)
    x_G = torch.from_numpy(line.x_G).float()

    def trained(keys: list[tuple[int, int]], recipe: Recipe) -> dict[int, Weights]:
        return stacked_nets.train(scene, keys, milestones, recipe, lambda made: progress(made * len(keys)))

    plain = trained([(seed, member) for seed in seeds for member in range(plan.members)], plan.recipe)
    dropped = trained([(seed, plan.members) for seed in seeds], replace(plan.recipe, dropout=plan.dropout))
    with torch.no_grad():
        logits = {made: stacked_nets.logits(each, x_G.expand(len(each[0]), -1)) for made, each in plain.items()}
    nets = {made: of_one(each_MGC[:: plan.members]) for made, each_MGC in logits.items()}
    last, first = milestones[-1], [each[:: plan.members] for each in plain[milestones[-1]]]
    methods = {NET: nets[last], **calibrated(scene, first, logits[last][:: plan.members], plan)}
    methods[DROPOUT] = of_several(stacked_nets.sampled(dropped[last], x_G, plan.samples, plan.dropout, seeds))
    methods[ENSEMBLE] = of_several(logits[last].unflatten(0, (plan.seeds, plan.members)).transpose(0, 1))
    return Problem(name, line, nets, methods)


def nets_to_update(plan: Plan) -> int:
    """Updates of a net in all, for a progress bar."""
    return sum(max(updates) for updates in UPDATES.values()) * plan.seeds * (plan.members + 1)


def solve_all(plan: Plan, progress: Callable[[int], None] = lambda updates: None) -> list[Problem]:
    """The three problems, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [solve(name, plan, progress) for name in CLASSIC]
    finally:
        torch.set_num_threads(threads)


def write_rows(out: Path, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """As curves.csv, and as curves.json with the protocol and the values of all seeds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [key for key in rows[0] if key != "values"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / "curves.csv", text.getvalue())
    write_file(out / "curves.json", json.dumps({"protocol": plan.words(), "rows": rows}, indent=1))
