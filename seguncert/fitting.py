"""How calibrators are fitted: on a sample of pixels drawn while pictures pass by, by Newton's method, gated by held-out NLL.

Letters: N pixels, C classes, F features, K terms that are weighed (ln p, ln p̄), P parameters.

All that is fitted minimises the mean of −Σ_c t_c ln p_c, where t is the share of raters that say class c: one rater's
label is the special case of a single 1. Nothing is fitted on all pixels: those of a picture resemble each other so much that
one in twenty says nearly as much, and the sample is drawn evenly, one pixel of each run of twenty labelled ones.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Integer
from torch import Tensor

from seguncert.calibration import CalibrationError
from seguncert.calibrators import (
    FAINTEST,
    KINDS,
    Calibrator,
    Curve,
    Neighbourhood,
    Remap,
    Scaling,
    Vector,
    floored,
    shown,
)
from seguncert.slopes import scaled_nll

RUN = 20  # labelled pixels of which one is drawn
MOST = 1 << 20  # pixels kept; when there are more, every second one goes
ROWS = 1 << 14  # pixels that are worked on at once
WIDEST = math.log(100.0)  # of |ln β|: beyond, there is no such temperature
STEPS = 60
DONE = 1e-9  # nats: no step that would win more is left
RIDGE = {"class-conditional": 1e-3, "local": 1e-3}  # half of it times the squared size of the curves, in nats
KNOTS = 4  # of a curve, at equal shares of the pixels
TAIL = 0.001  # share of the pixels at either end of a feature over which its curve is constant
BINS = {"histogram": 15, "isotonic": 1 << 12}
BLOCKS = 5  # of consecutive pictures, where there is one sequence
REPLICATES = 1000
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t of 1 to 9 degrees of freedom, 97.5 %
JUDGED = 1 << 18  # pixels that are enough to tell which kind is better
HARM = 0.01  # share by which the NLL of no fold may get worse


@dataclass(frozen=True)
class Drawn:
    """Pixels drawn from one picture: logits, shares of the raters or one rater's class, features, ln of what is around; its name."""

    logits_NC: Float32[np.ndarray, "N C"]
    votes_NC: Float32[np.ndarray, "N C"] | Integer[np.ndarray, " N"]  # shares, or one rater's class
    features_NF: Float32[np.ndarray, "N F"]
    picture: str
    group: str
    around_NC: Float32[np.ndarray, "N C"] | None = None

    def __len__(self) -> int:
        return len(self.logits_NC)

    def every(self, step: int, round: int = 0) -> Drawn:
        """Each `step`-th pixel; the first is picked by the picture's name and the round, so that no place is preferred."""
        if step == 1:
            return self
        part = slice((_digest(self.picture) >> round % 64) % step, None, step)
        around_NC = None if self.around_NC is None else self.around_NC[part].copy()
        logits_NC, votes_NC, features_NF = (
            each[part].copy() for each in (self.logits_NC, self.votes_NC, self.features_NF)
        )
        return Drawn(logits_NC, votes_NC, features_NF, self.picture, self.group, around_NC)


def _digest(picture: str) -> int:
    return int.from_bytes(hashlib.blake2b(picture.encode(), digest_size=8).digest(), "little")


@dataclass
class Pixels:
    """A sample of labelled pixels of C classes; memory does not grow with the number of pictures beyond `most` pixels."""

    C: int
    names: tuple[str, ...] = ()  # of the features
    frame: tuple[int, int] | None = None  # of the model
    seed: int = 0
    run: int = RUN
    most: int = MOST
    halved: int = 0
    drawn: list[Drawn] = field(default_factory=list)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(len(each) for each in self.drawn)

    def __len__(self) -> int:
        return self.total

    def picker(self, picture: str, labelled: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, " k"]:
        """Of the places of labelled pixels, one of each run; the same for a picture wherever it comes in the order."""
        rng = np.random.default_rng([self.seed, _digest(picture)])
        starts = np.arange(0, len(labelled), self.run)
        within = np.minimum(self.run, len(labelled) - starts)
        return labelled[starts + (rng.random(len(starts)) * within).astype(np.int64)]

    def add(self, drawn: Drawn) -> None:
        """Keep what was drawn from a picture by `picker`."""
        for round in range(self.halved):
            drawn = drawn.every(2, round)
        self.drawn.append(drawn)
        self.total += len(drawn)
        while self.total > self.most:
            for k, each in enumerate(self.drawn):  # one by one: never all of them twice
                self.drawn[k] = each.every(2, self.halved)
            self.halved += 1
            self.total = sum(len(each) for each in self.drawn)

    def thinned(self, most: int) -> Pixels:
        """About so many of them, each `step`-th of a picture."""
        step = -(-len(self) // most)
        return replace(self, drawn=[each.every(step) for each in self.drawn])

    def only(self, keep: Callable[[Drawn], bool]) -> Pixels:
        """Those of some pictures."""
        return replace(self, drawn=[each for each in self.drawn if keep(each)])

    def parts(self) -> Iterator[Drawn]:
        """At most `ROWS` of a picture at a time."""
        for each in self.drawn:
            for start in range(0, len(each), ROWS):
                rows = slice(start, start + ROWS)
                around_NC = None if each.around_NC is None else each.around_NC[rows]
                yield replace(each, logits_NC=each.logits_NC[rows], votes_NC=each.votes_NC[rows], features_NF=each.features_NF[rows], around_NC=around_NC)  # fmt: skip

    def blocks(self) -> Iterator[tuple[Float[Tensor, "n C"], Float[Tensor, "n C"], Float[Tensor, "n F"]]]:
        """Logits less their largest, shares of the raters, features; after them ln of what is around, if it is known."""
        for part in self.parts():
            logits_NC, votes = torch.from_numpy(part.logits_NC), part.votes_NC
            if votes.ndim == 1:
                votes = np.eye(self.C, dtype=np.float32)[votes]
            z_NC = floored(logits_NC - logits_NC.amax(1, keepdim=True))
            seen = [part.features_NF, *([] if part.around_NC is None else [part.around_NC])]
            yield z_NC, torch.from_numpy(votes), torch.from_numpy(np.concatenate(seen, 1) if seen[1:] else seen[0])

    def nll(self, calibrator: Calibrator | None) -> dict[str, tuple[float, int]]:
        """Sum of −Σ t ln p in nats over the pixels of each picture, and how many they are."""
        found = {}
        for each in self.drawn:
            total = 0.0
            for z_NC, votes_NC, features_NF in replace(self, drawn=[each]).blocks():
                if calibrator is not None:
                    z_NC = calibrator(z_NC.T[:, None].contiguous(), self.seen(calibrator, features_NF).T[:, None])[
                        :, 0
                    ].T
                total -= float((votes_NC * z_NC.log_softmax(1).clamp(min=-1e4)).sum(dtype=torch.float64))
            found[each.picture] = (total, len(each))
        return found

    def seen(self, calibrator: Calibrator, features_NF: Float[Tensor, "n F"]) -> Float[Tensor, "n G"]:
        """Of features and what is around those that the calibrator looks at, as its `look` gives them."""
        columns = [self.names.index(name) for name in getattr(calibrator, "looks", ())]
        if isinstance(calibrator, Neighbourhood):
            columns += range(len(self.names), features_NF.shape[1])
        return features_NF[:, columns]


def fit(kind: str, pixels: Pixels) -> Scaling | Neighbourhood | Vector | Remap:
    """The calibrator of that kind with the least mean NLL on the sample.

    Raises CalibrationError without pixels, for logits that are not finite, where Newton's method does not come to an end,
    and where the best temperature is none: all pixels right, or the logits say nothing.
    """
    if kind not in KINDS:
        raise CalibrationError(f"calibrator: expected auto or one of {', '.join(KINDS)}. Received: {kind!r}")
    if not len(pixels):
        raise CalibrationError("calibrate: expected labelled pixels. Received: none; are all labels the ignore index?")
    if kind == "vector":
        return _fit_vector(pixels)
    if kind in ("histogram", "isotonic"):
        return _fit_remap(kind, pixels)
    if kind == "neighbourhood":
        return _fit_neighbourhood(pixels)
    _check_bounds(pixels)
    temperature = _fit_scaling(Scaling("temperature", 0.0, frame=pixels.frame), pixels)
    if kind == "class-conditional":
        return _fit_scaling(replace(temperature, kind=kind, of_class=(0.0,) * pixels.C), pixels)
    if kind == "local":
        return _fit_scaling(replace(temperature, kind=kind, curves=tuple(_curves(pixels))), pixels)
    return temperature


def _check_bounds(pixels: Pixels) -> None:
    """Raise CalibrationError unless the best temperature lies within `WIDEST`.

    d NLL / dβ rises with β: it must be positive at the largest β and negative at the least, and d NLL / d ln β with it.
    """
    slopes = np.zeros(2)
    for part in pixels.parts():
        for k, eta in enumerate((-WIDEST, WIDEST)):
            nll, slope_N, _ = scaled_nll(part.logits_NC, part.votes_NC, np.full(len(part), eta, np.float32))
            if not math.isfinite(nll):
                raise CalibrationError("temperature: expected finite logits. Received: NaN or infinity among them")
            slopes[k] += slope_N.sum(dtype=np.float64)
    if slopes[0] >= 0 or slopes[1] <= 0:
        found = "less; all pixels are right" if slopes[1] <= 0 else "more; the logits say nothing of the labels"
        raise CalibrationError(
            f"temperature: expected one from {math.exp(-WIDEST):.2g} to {math.exp(WIDEST):.0f}. Received: {found}."
            " Use more pictures, or check that labels and model belong together."
        )


def _fit_scaling(start: Scaling, pixels: Pixels) -> Scaling:
    """Newton's method on what ln β is made of, with the curvature β² Var z ≥ 0 in place of the exact one, which can be negative.

    See `scaled_nll`, of which these are the derivatives by what ln β is made of.
    """
    C, classes, curves = pixels.C, len(start.of_class), start.curves
    P = 1 + classes + sum(len(curve.slopes) for curve in curves)
    columns = [pixels.names.index(curve.feature) for curve in curves]
    scales = np.concatenate([np.ones(1 + classes), *(np.full(len(c.slopes), c.high - c.low) for c in curves)])
    ridge = np.full(P, RIDGE.get(start.kind, 0.0)) * (scales**2)
    ridge[0] = 0

    def design(part: Drawn) -> Tensor:
        factors = [torch.ones(len(part), 1)]
        if classes:
            factors.append(torch.nn.functional.one_hot(torch.from_numpy(part.logits_NC).argmax(1), C).float())
        for curve, column in zip(curves, columns, strict=True):
            factors.append(torch.stack(curve.basis(torch.from_numpy(part.features_NF[:, column])), 1))
        return torch.cat(factors, 1)

    def value(weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        total, gradient, hessian = 0.0, np.zeros(P), np.zeros((P, P))
        weight = torch.from_numpy(weights).float()
        for part in pixels.parts():
            X_NP = design(part) if P > 1 else None  # threads of torch would cost more than one temperature does
            eta_N = np.full(len(part), weights[0], np.float32) if X_NP is None else (X_NP @ weight).numpy()
            nll, slope_N, curvature_N = scaled_nll(part.logits_NC, part.votes_NC, eta_N)
            total += nll
            if X_NP is None:
                gradient += slope_N.sum(dtype=np.float64)
                hessian += curvature_N.sum(dtype=np.float64)
            else:
                gradient += (X_NP.T @ torch.from_numpy(slope_N)).double().numpy()
                hessian += (X_NP.T @ (X_NP * torch.from_numpy(curvature_N)[:, None])).double().numpy()
        N = len(pixels)
        return total / N + 0.5 * float(ridge @ weights**2), gradient / N + ridge * weights, hessian / N + np.diag(ridge)

    slopes = [slope for curve in curves for slope in curve.slopes]
    weights = _newton(value, np.array([start.constant, *start.of_class, *slopes]), start.kind)
    given = iter(weights.tolist())
    constant, of_class = next(given), tuple(next(given) for _ in range(classes))
    fitted = tuple(replace(curve, slopes=tuple(next(given) for _ in curve.slopes)) for curve in curves)
    return replace(start, constant=constant, of_class=of_class, curves=fitted)


def _fit_neighbourhood(pixels: Pixels) -> Neighbourhood:
    """Newton's method on the weights of ln p and of ln p̄, which is convex. Curves as those of `local` on top of them
    won nothing on scenes held out, and made the confidence of single pictures worse.

    d NLL / d weight = E_p[x] − E_t[x], and the Hessian is the covariance under p of what the weights are multiplied with.
    """
    C, at = pixels.C, pixels.names.index("picture")
    doubt = np.concatenate([each.features_NF[:, at] for each in pixels.drawn])
    low, middle, high = float(doubt.min()), float(doubt.mean()), float(doubt.max())
    P = 4

    def value(weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        total, gradient, hessian = 0.0, np.zeros(P), np.zeros((P, P))
        weight_P = torch.from_numpy(weights).float()
        for z_NC, votes_NC, features_NF in pixels.blocks():
            x_NKC = torch.stack(
                [z_NC.log_softmax(1).clamp_(min=float(FAINTEST)), *features_NF[:, len(pixels.names) :].split(C, 1)], 1
            )
            off_N = features_NF[:, at, None, None] - middle
            x_NPC = torch.cat([x_NKC, x_NKC * off_N], 1)
            log_NC = (x_NPC * weight_P[:, None]).sum(1).log_softmax(1)
            total -= float((votes_NC * log_NC).sum(dtype=torch.float64))
            p_NC = log_NC.exp()
            mean_NP = (x_NPC @ p_NC[..., None])[..., 0]
            said_NP = (x_NPC @ votes_NC[..., None])[..., 0]
            gradient += (mean_NP - said_NP).double().sum(0).numpy()
            spread_NPC = (x_NPC - mean_NP[..., None]) * p_NC.sqrt()[:, None]
            flat = spread_NPC.transpose(0, 1).flatten(1)
            hessian += (flat @ flat.T).double().numpy()
        N, tiny = len(pixels), 1e-9 * np.eye(P)
        return total / N, gradient / N, hessian / N + tiny

    weights = _newton(value, np.eye(P)[0], "neighbourhood").tolist()
    pairs = (weights[0], weights[2]), (weights[1], weights[3])
    return Neighbourhood(pairs, middle, low, high, pixels.frame)


def _fit_vector(pixels: Pixels) -> Vector:
    """Newton's method on factors and biases; the problem is convex. The biases' common shift, which means nothing, stays 0."""
    C = pixels.C
    hold = 1e-9 * np.eye(2 * C)  # what the data leave open: the common shift
    said_C = sum((votes_NC.sum(0).numpy() for _, votes_NC, _ in pixels.blocks()), np.zeros(C)) > 0
    for c in np.flatnonzero(~said_C):  # a class that no label has: its bias would run away from the mean of the others
        off_2C = np.concatenate([np.zeros(C), (np.arange(C) == c) - said_C / said_C.sum()])
        hold += np.outer(off_2C, off_2C) + np.diag(np.arange(2 * C) == c)

    def value(weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        total, gradient, hessian = 0.0, np.zeros(2 * C), np.zeros((2 * C, 2 * C))
        factor_C, bias_C = (torch.from_numpy(part).float() for part in (weights[:C], weights[C:]))
        for z_NC, votes_NC, _ in pixels.blocks():
            s_NC = z_NC * factor_C + bias_C
            lse_N = s_NC.logsumexp(1)
            total += float((lse_N - (votes_NC * s_NC).sum(1)).sum(dtype=torch.float64))
            p_NC = (s_NC - lse_N[:, None]).exp_()
            off_NC = p_NC - votes_NC
            gradient += torch.cat([(off_NC * z_NC).sum(0), off_NC.sum(0)]).double().numpy()
            scaled = torch.cat([p_NC * z_NC, p_NC], 1)
            hessian -= (scaled.T @ scaled).double().numpy()
            diagonals = (p_NC * z_NC.square()).sum(0), (p_NC * z_NC).sum(0), p_NC.sum(0)
            own, mixed, bias = (torch.diag(each.double()).numpy() for each in diagonals)
            hessian += np.block([[own, mixed], [mixed, bias]])
        N, off = len(pixels), weights - np.repeat([1.0, 0.0], C)
        return total / N + 0.5 * float(off @ hold @ off), gradient / N + hold @ off, hessian / N + hold

    weights = _newton(value, np.repeat([1.0, 0.0], C), "vector")
    return Vector(tuple(weights[:C].tolist()), tuple((weights[C:] - weights[C:].mean()).tolist()))


def _newton(
    value: Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]], weights: np.ndarray, kind: str
) -> np.ndarray:
    """Damped until no step wins more than `DONE` nats."""
    now, gradient, hessian = value(weights)
    for _ in range(STEPS):
        if not math.isfinite(now):
            raise CalibrationError(f"{kind}: expected finite logits. Received: NaN or infinity among them")
        damping = 1e-12 * max(1.0, float(np.trace(hessian)))
        step = np.linalg.solve(hessian + damping * np.eye(len(weights)), gradient)
        promised = 0.5 * float(gradient @ step)
        if promised < DONE:
            return weights - step
        length = min(1.0, 2.0 / max(1e-12, float(np.abs(step).max()))) if kind == "temperature" else 1.0
        while not (tried := value(weights - length * step))[0] <= now - 1e-4 * length * promised:  # NaN is no gain
            length /= 2
            if length < 1e-6:  # rounding is all that is left
                return weights
        weights = weights - length * step
        now, gradient, hessian = tried
    raise CalibrationError(f"{kind}: expected the fit to end within {STEPS} steps. Received: a gradient of {np.abs(gradient).max():.1g}")  # fmt: skip


def _curves(pixels: Pixels) -> Iterator[Curve]:
    """Of all features, flat; knots at equal shares of the pixels, for the picture's feature none: there are few pictures."""
    for column, name in enumerate(pixels.names):
        values = np.concatenate([each.features_NF[:, column] for each in pixels.drawn])
        if name == "picture":
            low, high, knots = float(values.min()), float(values.max()), ()
        else:
            low, *inner, high = np.quantile(values, [TAIL, *np.linspace(0, 1, KNOTS + 2)[1:-1], 1 - TAIL]).tolist()
            knots = tuple(knot for knot in sorted(set(inner)) if low < knot < high)
        if high > low:
            yield Curve(name, low, high, knots, (0.0,) * (1 + len(knots)))


def _fit_remap(kind: str, pixels: Pixels) -> Remap:
    """How often the shown class is right by confidence; over bins of equal mass, or the nearest that rises (PAV)."""
    confidences, hits = [], []
    for z_NC, votes_NC, _ in pixels.blocks():
        label_1N, p_1N, _ = shown(z_NC.T[:, None])
        confidences.append(p_1N[0].numpy())
        hits.append(votes_NC.gather(1, label_1N.T)[:, 0].double().numpy())
    confidence_N = np.concatenate(confidences)
    order = np.argsort(confidence_N, kind="stable")
    confidence_N, hit_N = confidence_N[order], np.concatenate(hits)[order]
    edges = np.unique(np.searchsorted(confidence_N, confidence_N[np.linspace(0, len(order) - 1, BINS[kind] + 1).astype(int)[:-1]]))  # fmt: skip
    count, forecast, hit = (np.add.reduceat(each, edges) for each in (np.ones(len(order)), confidence_N, hit_N))
    if kind == "histogram":  # steps: each value from the first of its bin to the first of the next
        first, last = confidence_N[edges], np.append(np.nextafter(confidence_N[edges[1:]], 0), 1.0)
        points, values = np.stack([first, np.maximum(first, last)], 1).ravel(), np.repeat(hit / count, 2)
    else:
        points, values = _rising(count, forecast, hit)
    return Remap(kind, tuple(points.tolist()), tuple(np.clip(values, 1e-6, 1 - 1e-6).tolist()))


def _rising(count: np.ndarray, forecast: np.ndarray, hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pool adjacent violators; mean confidence and hit rate of each pool.

    >>> _rising(np.array([1.0, 1, 2]), np.array([0.5, 0.6, 1.6]), np.array([1.0, 0, 2]))
    (array([0.55, 0.8 ]), array([0.5, 1. ]))
    """
    pools: list[list[float]] = []
    for each in zip(count.tolist(), forecast.tolist(), hit.tolist(), strict=True):
        pools.append(list(each))
        while len(pools) > 1 and pools[-2][2] * pools[-1][0] >= pools[-1][2] * pools[-2][0]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    n, p, y = np.array(pools).T
    return p / n, y / n


@dataclass(frozen=True)
class Candidate:
    """A kind of calibrator, judged on pictures that it was not fitted on: NLL in nats, and the gain over none or one
    temperature, with an interval; `worst` is the largest loss of a fold, as a share of its NLL; one kind is chosen."""

    kind: str
    nll: float
    over: str
    gain: float
    interval: tuple[float, float]
    worst: float
    chosen: bool


def choose(pixels: Pixels, kinds: Sequence[str] = ("class-conditional", "vector", "local", "neighbourhood")) -> tuple[str, list[Candidate], dict[str, Any]]:  # fmt: skip
    """Which kind to fit, or "none"; how each did; and how it was done: the least NLL on held-out pictures of what is sure.

    The pictures are folded by sequence. A kind is sure if the 95 % interval of its gain over blocks of pictures does not
    reach 0, and no fold gets worse by more than `HARM`. One temperature is compared with none, every other kind with what
    of these two is taken, and none that has a larger NLL than one temperature is taken at all.
    With one sequence only the folds are blocks of consecutive pictures, and more than one temperature is not
    tried: what looks better on the rest of a scene is often worse on another (here by 5 to 20 %). A kind whose fit fails on
    some pictures is not taken; `not_fitted` of how it was done has the reason.
    """
    pixels = pixels.only(lambda each: len(each) > 0).thinned(JUDGED)
    if len(pixels.drawn) < 2:
        raise CalibrationError("calibrator auto: expected at least two pictures with labels, to hold one out. Received:"
                               f" {len(pixels.drawn)}. Name a calibrator, as temperature.")  # fmt: skip
    folds, clusters, how = folds_of(pixels)
    if how["by"] != "sequence":
        kinds = ()
    held: dict[str, dict[str, tuple[float, int]]] = {kind: {} for kind in ("none", "temperature", *kinds)}
    for fold in sorted(set(folds.values())):
        test = pixels.only(lambda each, fold=fold: folds[each.picture] == fold)  # type: ignore[misc]
        rest = pixels.only(lambda each, fold=fold: folds[each.picture] != fold)  # type: ignore[misc]
        for kind in list(held):
            try:
                held[kind] |= test.nll(None if kind == "none" else fit(kind, rest))
            except CalibrationError as error:
                if kind == "temperature":
                    raise
                del held[kind]  # it is out of the choice, and the others go on
                how.setdefault("not_fitted", {})[kind] = str(error)
    nll = {kind: _mean(of_picture) for kind, of_picture in held.items()}
    base, sure, found = "none", ["none"], {"none": ("", 0.0, (0.0, 0.0), 0.0)}
    for kind in (kind for kind in held if kind != "none"):
        gain, interval, worst = compare(held[base], held[kind], clusters, folds)
        found[kind] = base, gain, interval, worst
        if interval[0] > 0 and worst <= HARM and nll[kind] <= nll["temperature"]:
            sure.append(kind)
            base = "temperature" if kind == "temperature" else base
    best = min(sure, key=nll.__getitem__)
    table = [Candidate(kind, nll[kind], *each, chosen=kind == best) for kind, each in found.items()]
    return best, table, how


def folds_of(pixels: Pixels) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """To which fold a picture belongs, to which cluster of the bootstrap, and that in words."""
    groups: dict[str, list[str]] = {}
    for each in sorted(pixels.drawn, key=lambda each: _in_words_and_numbers(each.picture)):
        groups.setdefault(each.group, []).append(each.picture)
    clusters = dict[str, str]()
    for group, pictures in groups.items():
        blocks = max(1, min(len(pictures), round(len(pictures) / 10) or 1, 50)) if len(groups) < 20 else 1
        blocks = max(blocks, min(len(pictures), 10)) if len(groups) == 1 else blocks
        clusters |= {picture: f"{group} {k * blocks // len(pictures)}" for k, picture in enumerate(pictures)}
    if len(groups) >= 2:
        folds = {picture: group for group, pictures in groups.items() for picture in pictures}
        if len(groups) > 10:
            number = {group: k * 10 // len(groups) for k, group in enumerate(groups)}
            folds = {picture: f"fold {number[group]:02d}" for picture, group in folds.items()}
        by = "sequence"
    else:
        every = [picture for pictures in groups.values() for picture in pictures]
        folds = {picture: f"block {k * BLOCKS // len(every)}" for k, picture in enumerate(every)}
        by = "blocks of consecutive pictures"
    return folds, clusters, {"folds": len(set(folds.values())), "by": by, "clusters": len(set(clusters.values()))}


def _in_words_and_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts picture 9 before picture 10."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", name)]


def compare(
    before: dict[str, tuple[float, int]], after: dict[str, tuple[float, int]], clusters: dict[str, str], folds: dict[str, str]
) -> tuple[float, tuple[float, float], float]:  # fmt: skip
    """Mean gain in NLL, nats a pixel, its 95 % interval, and the worst fold's relative loss.

    The interval is that of a bootstrap of clusters. Of fewer than ten, too few for its quantiles, it is ± t s/√n by the
    linearised ratio of sums (Cochran 1977, section 6.4), with Student's t; of one cluster it has no end.
    """
    names = sorted(set(clusters.values()))
    index = {name: k for k, name in enumerate(names)}
    gain, count = np.zeros(len(names)), np.zeros(len(names))
    loss: dict[str, list[float]] = {}
    for picture, (nll, n) in before.items():
        gain[index[clusters[picture]]] += nll - after[picture][0]
        count[index[clusters[picture]]] += n
        fold = loss.setdefault(folds[picture], [0.0, 0.0])
        fold[0] += after[picture][0] - nll
        fold[1] += nll
    mean, n = float(gain.sum() / count.sum()), len(names)
    if n == 1:
        low, high = -math.inf, math.inf
    elif n <= len(STUDENT):
        half = STUDENT[n - 2] * math.sqrt(n / (n - 1) * float(((gain - mean * count) ** 2).sum())) / float(count.sum())
        low, high = mean - half, mean + half
    else:
        weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), REPLICATES)
        low, high = np.quantile((weights @ gain) / np.maximum(weights @ count, 1), [0.025, 0.975]).tolist()
    worst = max(lost / max(nll, 1e-12) for lost, nll in loss.values())
    return mean, (low, high), worst


def _mean(nll: dict[str, tuple[float, int]]) -> float:
    return sum(total for total, _ in nll.values()) / sum(n for _, n in nll.values())
