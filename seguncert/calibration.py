"""Calibrators: what turns a net's logits into probabilities that can be believed. They act on logits and give logits,
whose softmax are the probabilities; what they learned is a handful of numbers, kept as JSON.

Letters: C classes, F features, K windows, h × w the scale of the logits, R × W a band of rows of the photo.

    temperature, class-conditional, local    softmax(β z), β > 0 a number of the pixel: the shown class stays the same
    neighbourhood                            softmax(β (a₀ z + Σ aₖ ln mean of p in a window)), then the shown class kept
    vector                                   softmax(a z + b), a and b numbers of the class (Guo et al. 2017)
    histogram, isotonic                      the shown class gets the probability g(p̂), the others share the rest

With β = exp η, η is a sum: a constant (temperature: β = 1/T), a number of the shown class (class-conditional), and
piecewise linear functions of what can be seen around the pixel and of how doubtful the whole picture is (local): a picture
that the net finds strange is softened as a whole. In kind neighbourhood the weights aₖ depend on the picture's doubt too:
where the net is at a loss, what it says of the surroundings counts more. A feature beyond what was seen when the calibrator
was fitted counts as the last value seen, and `unfamiliar` says so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from seguncert.predict import rows_at_size

VERSION = 1
KINDS = ("temperature", "vector", "class-conditional", "local", "neighbourhood", "histogram", "isotonic")
WINDOWS = (19, 77)  # of kind neighbourhood
LEAST_MEAN = 1e-5  # added before the logarithm of a mean probability
LOWEST_DOUBT = 1e-6  # of 1 − p̂: below, one is as good as another
HAIR = 1e-3  # nats by which the shown class stays ahead
WIDEST_GAP = 15.0  # nats between the two largest logits, likewise
LEAST_ENTROPY = 1e-3  # added before the logarithm of a mean
FEATURES = {  # sides of windows are in pixels of the frames that the model was trained on
    "doubt": "ln(1 − p̂) of the pixel",
    "gap": "largest minus second largest logit, in nats",
    "entropy 7": "ln of the mean entropy (full scale 1) of a window of 7 x 7 pixels",
    "entropy 31": "the same of 31 x 31",
    "entropy 127": "the same of 127 x 127",
    "agreement 9": "share of a window of 9 x 9 pixels that shows the same class",
    "agreement 41": "the same of 41 x 41",
    "picture": "ln of the mean doubt 1 − p̂ of the picture",
}


class CalibrationError(ValueError):
    """A calibration that cannot be fitted, read or used here; one line: what, expected, received, what to do."""


@runtime_checkable
class Calibrator(Protocol):
    """Logits in, calibrated logits out."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""

    @property
    def keeps_labels(self) -> bool:
        """Whether the most probable class is the same before and after."""

    def look(self, logits_Chw: Float[Tensor, "C h w"]) -> Float[Tensor, "F h w"] | None:
        """What it wants to know of the picture around each pixel, at the logits' scale; None if nothing."""

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], features_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """Calibrated logits of a band of rows."""

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """In what the picture is unlike all that it was fitted on, in words; "" if in nothing that it looks at."""


def calibrated_rows(
    calibrator: Calibrator | None, logits_Chw: Float[Tensor, "C h w"], H: int, W: int
) -> Iterator[tuple[slice, Float[Tensor, "C rows W"]]]:
    """Logits at the size of the photo in bands of rows, as `rows_at_size` gives them, calibrated."""
    C = len(logits_Chw)
    features_Fhw = None if calibrator is None else calibrator.look(logits_Chw)
    both = logits_Chw if features_Fhw is None else torch.cat([logits_Chw, features_Fhw])
    for rows, both_RW in rows_at_size(both, H, W):
        if calibrator is None:
            yield rows, both_RW
        else:
            yield rows, calibrator(both_RW[:C], None if features_Fhw is None else both_RW[C:])


@dataclass(frozen=True)
class Curve:
    """A piecewise linear function of one feature: constant outside [low, high], of slope `slopes[0]` from `low` on, which
    changes by `slopes[k]` at `knots[k − 1]`; 0 at `low`.

    >>> curve = Curve("gap", 0.0, 10.0, (4.0,), (0.5, -0.25))
    >>> curve(torch.tensor([-1.0, 2.0, 6.0, 99.0])).tolist()
    [0.0, 1.0, 2.5, 3.5]
    """

    feature: str
    low: float
    high: float
    knots: tuple[float, ...]
    slopes: tuple[float, ...]

    def basis(self, value_N: Float[Tensor, "*N"]) -> list[Float[Tensor, "*N"]]:
        """What the slopes are multiplied with."""
        value_N = value_N.clamp(self.low, self.high)
        return [value_N - self.low, *((value_N - knot).clamp_(min=0) for knot in self.knots)]

    def __call__(self, value_N: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """The function, element by element."""
        total = torch.zeros_like(value_N)
        for slope, part in zip(self.slopes, self.basis(value_N), strict=True):
            total.add_(part, alpha=slope)
        return total


@dataclass(frozen=True)
class Scaling:
    """softmax(β z): kinds temperature, class-conditional and local. ln β = constant + of_class[ŷ] + Σ curves.

    >>> Scaling("temperature", -math.log(2))(torch.tensor([[[4.0]], [[0.0]]]), None).flatten().tolist()
    [0.0, -2.0]
    """

    kind: str
    constant: float
    of_class: tuple[float, ...] = ()
    curves: tuple[Curve, ...] = ()
    frame: tuple[int, int] | None = None  # of the model
    keeps_labels = True

    @property
    def names(self) -> list[str]:
        """Features that it looks at."""
        return [curve.feature for curve in self.curves]

    def look(self, logits_Chw: Float[Tensor, "C h w"]) -> Float[Tensor, "F h w"] | None:
        """Features of the curves; None where there are none."""
        return features(logits_Chw, self.names, self.frame) if self.curves else None

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], features_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """β (z − max z): what is largest stays so, to the last bit."""
        top_RW, label_RW = logits_CRW.max(0)
        return (logits_CRW - top_RW).mul_(self.beta_RW(label_RW, features_FRW))

    def beta_RW(
        self, label_RW: Integer[Tensor, "R W"], features_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "R W"]:
        """What the logits are multiplied with."""
        eta_RW = torch.full(label_RW.shape, self.constant)
        if self.of_class:
            eta_RW += torch.tensor(self.of_class)[label_RW]
        if self.curves:
            assert features_FRW is not None
            for curve, feature_RW in zip(self.curves, features_FRW, strict=True):
                eta_RW += curve(feature_RW)
        return eta_RW.exp_()

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """In what the picture as a whole lies outside of all that the calibrator was fitted on; "" if it does not."""
        for curve in self.curves:
            if curve.feature == "picture":
                return _unfamiliar(logits_Chw, curve.low, curve.high)
        return ""


@dataclass(frozen=True)
class Neighbourhood:
    """softmax(β s), s = Σₖ (aₖ + bₖ (d − middle)) xₖ, x₀ = ln p, xₖ = ln(mean of p in a window), d = ln(mean doubt of the
    picture), β that of `local`. Where another class than the net's would come out on top, the two are made equal but for a
    hair, so that the labels stay.
    """

    weights: tuple[tuple[float, float], ...]  # (aₖ, bₖ) of the pixel and of each window
    middle: float
    low: float
    high: float
    local: Scaling
    windows: tuple[int, ...] = WINDOWS
    kind = "neighbourhood"
    keeps_labels = True

    @property
    def names(self) -> list[str]:
        """Features that it looks at."""
        return ["picture", *self.local.names]

    def look(self, logits_Chw: Float[Tensor, "C h w"]) -> Float[Tensor, "F h w"]:
        """The picture's doubt, means of the windows, features of the curves."""
        frame = self.local.frame
        return torch.cat(
            [
                features(logits_Chw, ["picture"], frame),
                window_evidence(logits_Chw, self.windows, frame),
                *([features(logits_Chw, self.local.names, frame)] if self.local.curves else []),
            ]
        )

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], features_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """Logits, 0 for the shown class or where it has been raised."""
        assert features_FRW is not None
        C, K = len(logits_CRW), len(self.windows)
        found_CRW = self.pooled(logits_CRW, features_FRW[: 1 + K * C])
        label_RW = logits_CRW.argmax(0)
        found_CRW *= self.local.beta_RW(label_RW, features_FRW[1 + K * C :])
        found_CRW -= found_CRW.amax(0)
        shown_1RW = found_CRW.gather(0, label_RW[None])
        return torch.where(shown_1RW < 0, found_CRW - HAIR, found_CRW).scatter_(0, label_RW[None], 0)

    def pooled(self, logits_CRW: Float[Tensor, "C R W"], seen_FRW: Float[Tensor, "F R W"]) -> Float[Tensor, "C R W"]:
        """s, before β."""
        C = len(logits_CRW)
        off_RW = seen_FRW[0].clamp(self.low, self.high) - self.middle
        parts = [logits_CRW.log_softmax(0), *seen_FRW[1:].split(C)]
        return sum((a + b * off_RW) * part for (a, b), part in zip(self.weights, parts, strict=True))

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """As of `Scaling`."""
        return _unfamiliar(logits_Chw, self.low, self.high)


def _unfamiliar(logits_Chw: Tensor, low: float, high: float) -> str:
    value = float(features(logits_Chw, ["picture"])[0, 0, 0])
    if low <= value <= high:
        return ""
    return (f"unfamiliar to the calibration: mean doubt {math.exp(value):.3f}, it has seen"
            f" {math.exp(low):.3f} to {math.exp(high):.3f}")  # fmt: skip


@dataclass(frozen=True)
class Vector:
    """softmax(a z + b); the shown class may change.

    >>> Vector((1.0, 2.0), (0.5, 0.0))(torch.tensor([[[4.0]], [[3.0]]]), None).flatten().tolist()
    [4.5, 6.0]
    """

    factors: tuple[float, ...]
    biases: tuple[float, ...]
    kind = "vector"
    keeps_labels = False

    def look(self, logits_Chw: Float[Tensor, "C h w"]) -> None:
        """Nothing."""

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], features_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """a z + b."""
        factors, biases = (torch.tensor(each).view(-1, 1, 1) for each in (self.factors, self.biases))
        return torch.addcmul(biases, factors, logits_CRW)

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """It cannot tell."""
        return ""


@dataclass(frozen=True)
class Remap:
    """P(the shown class is right) = g(p̂), g linear between points; kinds histogram (steps) and isotonic (rising).

    The other classes keep their ratios. g is raised where the second class would overtake the first: the labels stay.

    >>> remap = Remap("isotonic", (0.5, 1.0), (0.5, 0.9))
    >>> [round(p, 4) for p in remap(torch.tensor([[[0.75]], [[0.25]]]).log(), None).exp().flatten().tolist()]
    [0.7, 0.3]
    """

    kind: str
    confidences: tuple[float, ...]
    values: tuple[float, ...]
    keeps_labels = True

    def look(self, logits_Chw: Float[Tensor, "C h w"]) -> None:
        """Nothing."""

    def __call__(
        self, logits_CRW: Float[Tensor, "C R W"], features_FRW: Float[Tensor, "F R W"] | None
    ) -> Float[Tensor, "C R W"]:
        """ln of the probabilities."""
        top_RW, label_RW = logits_CRW.max(0)
        others_CRW = (logits_CRW - top_RW).exp_().scatter_(0, label_RW[None], 0)
        rest_RW, second_RW = others_CRW.sum(0), others_CRW.amax(0)
        confidence_RW = (1 / (1 + rest_RW)).double().numpy()
        value_RW = torch.from_numpy(np.interp(confidence_RW, self.confidences, self.values)).float()
        share_RW = second_RW / rest_RW.clamp(min=1e-30)  # of the second among the others
        value_RW = torch.maximum(value_RW, share_RW / (1 + share_RW) * (1 + 1e-6))
        found = (others_CRW / rest_RW.clamp(min=1e-30)).mul_(1 - value_RW).scatter_(0, label_RW[None], value_RW[None])
        return found.log_()

    def unfamiliar(self, logits_Chw: Float[Tensor, "C h w"]) -> str:
        """It cannot tell."""
        return ""


def features(
    logits_Chw: Float[Tensor, "C h w"], names: Sequence[str], frame: tuple[int, int] | None = None
) -> Float[Tensor, "F h w"]:
    """The named `FEATURES` of each pixel of a picture, at the logits' scale; shifts of the logits change none."""
    C, h, w = logits_Chw.shape
    top_hw, label_hw = logits_Chw.max(0)
    z_Chw = (logits_Chw - top_hw).clamp_(min=-80)
    e_Chw = z_Chw.exp()
    sum_hw = e_Chw.sum(0)
    doubt_hw = (1 - 1 / sum_hw).clamp_(min=LOWEST_DOUBT)  # 0 to rounding at the surest, where it is cut off anyway
    found = []
    for name in names:
        kind, _, window = name.partition(" ")
        if kind == "doubt":
            found.append(doubt_hw.log())
        elif kind == "gap":
            second_hw = z_Chw.scatter(0, label_hw[None], -torch.inf).amax(0)
            found.append((-second_hw).clamp_(max=WIDEST_GAP))
        elif kind == "picture":
            found.append(doubt_hw.mean(dtype=torch.float64).log().float().expand(h, w))
        elif kind == "entropy":
            entropy_hw = (sum_hw.log() - (z_Chw * e_Chw).sum(0) / sum_hw) / math.log(C)
            found.append((_window_mean(entropy_hw, int(window), frame) + LEAST_ENTROPY).log_())
        else:
            share_hw = torch.zeros(h, w)
            for c in label_hw.unique().tolist():
                shown_hw = (label_hw == c).float()
                share_hw += shown_hw * _window_mean(shown_hw, int(window), frame)
            found.append(share_hw)
    return torch.stack(found)


def window_evidence(
    logits_Chw: Float[Tensor, "C h w"], windows: Sequence[int], frame: tuple[int, int] | None = None
) -> Float[Tensor, "K*C h w"]:
    """ln of the mean probability of each class in windows around each pixel; the classes of a window side by side."""
    probs_Chw = logits_Chw.softmax(0)
    means = [_window_mean(prob_hw, side, frame) for side in windows for prob_hw in probs_Chw]
    return torch.stack(means).add_(LEAST_MEAN).log_()


def _window_mean(values_hw: Float[Tensor, "h w"], side: int, frame: tuple[int, int] | None) -> Float[Tensor, "h w"]:
    """Of a square around each pixel, the picture mirrored at its borders where it is large enough, else repeated.

    The side is that on a picture as large as the frames of the model; it grows and shrinks with the picture.
    """
    h, w = values_hw.shape
    unit = math.sqrt(h * w / math.prod(frame)) if frame else 1.0
    reach = max(1, round((side * unit - 1) / 2))
    border = cv2.BORDER_REFLECT if reach < min(h, w) else cv2.BORDER_REPLICATE
    return torch.from_numpy(cv2.blur(values_hw.contiguous().numpy(), (2 * reach + 1, 2 * reach + 1), borderType=border))


@dataclass(frozen=True)
class Calibration:
    """A calibrator, what it was fitted for, and how it was found.

    `model` has the model's name, sha256 and classes; `sampling` what decides the distribution of the logits (see
    `sampling_of`); `protocol` says how it was fitted, `measured` what that brought, on pictures held out.
    """

    calibrator: Calibrator | None
    model: dict[str, Any]
    sampling: dict[str, Any]
    protocol: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """In a few words, for legends and pages."""
        if self.calibrator is None:
            return "none"
        return f"{self.kind}, fitted on {self.protocol.get('pictures', '?')} pictures"

    @property
    def parameters(self) -> dict[str, Any]:
        """The numbers that it learned, with its kind."""
        return {"kind": self.kind} | (asdict(self.calibrator) if self.calibrator else {})  # type: ignore[call-overload]

    @property
    def kind(self) -> str:
        """That of the calibrator, or "none" where none was better."""
        return self.calibrator.kind if self.calibrator else "none"

    def check(self, model: Mapping[str, Any], sampling: Mapping[str, Any], where: str = "calibration") -> None:
        """Raise CalibrationError unless it was fitted for this model and this way of sampling."""
        known = "sha256" if self.model["sha256"] else "name"
        if self.model[known] != model[known] or list(self.model["classes"]) != list(model["classes"]):
            raise CalibrationError(
                f"{where}: expected one that was fitted for {model['name']} (sha256 {model['sha256'][:12] or 'unknown'}…)."
                f" Received: one for {self.model['name']} ({self.model['sha256'][:12] or 'unknown'}…). Fit one with"
                " `seguncert calibrate`, or set calibration none."
            )
        for key in {*self.sampling, *sampling}:
            if self.sampling.get(key) != sampling.get(key):
                raise CalibrationError(
                    f"{where}: expected one that was fitted with {key} {sampling.get(key)}. Received: one fitted with"
                    f" {key} {self.sampling.get(key)}. Fit one with `seguncert calibrate`, or set calibration none."
                )

    def fits(self, model: Mapping[str, Any], sampling: Mapping[str, Any]) -> bool:
        """Whether `check` passes."""
        try:
            self.check(model, sampling)
        except CalibrationError:
            return False
        return True

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, by a rename: there is never half a file."""
        path = Path(path)
        content: dict[str, Any] = {"seguncert_calibration": VERSION}
        content |= {name: getattr(self, name) for name in ("model", "sampling", "protocol", "measured", "parameters")}
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(path)


def find_calibration(
    choice: str | os.PathLike[str] | Calibration | None,
    folder: Path | None,
    model: Mapping[str, Any],
    sampling: Mapping[str, Any],
) -> Calibration | None:
    """What a user's choice means: auto is the file that lies in the model's folder for this way of sampling, if any.

    Raises CalibrationError where a named one was fitted for another model or another way of sampling.
    """
    if choice is None or choice == "none":
        return None
    if choice == "auto":
        file = None if folder is None else folder / f"calibration-{sampling['method']}.json"
        if file is None or not file.is_file():
            return None
        found = load_calibration(file)
        return found if found.fits(model, sampling) else None
    found = choice if isinstance(choice, Calibration) else load_calibration(choice)
    found.check(model, sampling, "calibration" if isinstance(choice, Calibration) else str(choice))
    return found


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """What `Calibration.save` wrote. Raises CalibrationError for any other content."""
    try:
        content = json.loads(Path(path).read_text())
        if content["seguncert_calibration"] != VERSION:
            raise ValueError(f"version {content['seguncert_calibration']}")
        parameters = content["parameters"]
        return Calibration(_calibrator(**parameters), *(content[name] for name in ("model", "sampling", "protocol", "measured")))  # fmt: skip
    except OSError as error:
        raise CalibrationError(f"{path}: expected a calibration file. Received: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f"{path}: expected a file that `seguncert calibrate` of this version wrote. Received: {type(error).__name__}: {error}"
        ) from None


def _calibrator(kind: str, **parameters: Any) -> Scaling | Neighbourhood | Vector | Remap | None:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()}
    if kind == "none":
        return None
    if kind == "vector":
        return Vector(**values)
    if kind in ("histogram", "isotonic"):
        return Remap(kind, **values)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}")
    if kind == "neighbourhood":
        weights = tuple((a, b) for a, b in values["weights"])
        local = _scaling(**values["local"])
        return Neighbourhood(weights, values["middle"], values["low"], values["high"], local, values["windows"])
    return _scaling(kind, **values)


def _scaling(kind: str, constant: float, of_class: Sequence[float], curves: Any, frame: Any) -> Scaling:
    made = [
        Curve(each["feature"], each["low"], each["high"], tuple(each["knots"]), tuple(each["slopes"]))
        for each in curves
    ]
    return Scaling(kind, constant, tuple(of_class), tuple(made), frame and (frame[0], frame[1]))
