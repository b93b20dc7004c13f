"""A calibrator in a file: for which model and which way of sampling it was fitted, how, and what that brought.

A file is JSON, and is taken only for what it was fitted for: a calibration without identity is a guess.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seguncert.calibrators import KINDS, Calibrator, Curve, Neighbourhood, Remap, Scaling, Vector
from seguncert.store import write_file
from seguncert.surroundings import FEATURES

VERSION = 1


class CalibrationError(ValueError):
    """A calibration that cannot be fitted, read or used here; one line: what, expected, received, what to do."""


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
            return f"as the net is, nothing better was found on {self.protocol.get('pictures', '?')} pictures"
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
        if differs := unlike((self.model, self.sampling), (model, sampling)):
            raise CalibrationError(f"{where}: {differs} Fit one with `seguncert calibrate`, or set calibration none.")

    def fits(self, model: Mapping[str, Any], sampling: Mapping[str, Any]) -> bool:
        """Whether `check` passes."""
        return not unlike((self.model, self.sampling), (model, sampling))

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, by a rename: there is never half a file. Raises StoreError where it cannot be written."""
        content: dict[str, Any] = {"seguncert_calibration": VERSION}
        content |= {name: getattr(self, name) for name in ("model", "sampling", "protocol", "measured", "parameters")}
        write_file(Path(path), json.dumps(content, indent=1) + "\n")


def unlike(
    fitted: tuple[Mapping[str, Any], Mapping[str, Any]], used: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> str:
    """In what a model, or its way of sampling, differs from that for which something was fitted; "" if in nothing."""
    (of_model, of_sampling), (model, sampling) = fitted, used
    known = "sha256" if of_model["sha256"] else "name"
    if of_model[known] != model[known]:
        return (
            f"expected one that was fitted for {model['name']} (sha256 {model['sha256'][:12] or 'unknown'}…)."
            f" Received: one for {of_model['name']} ({of_model['sha256'][:12] or 'unknown'}…)."
        )
    if list(of_model["classes"]) != list(model["classes"]):
        return (
            f"expected one for the classes {', '.join(model['classes'])}. Received: one for"
            f" {', '.join(of_model['classes'])}."
        )
    for key in {**sampling, **of_sampling}:
        if of_sampling.get(key) != sampling.get(key):
            return (
                f"expected one that was fitted with {key} {sampling.get(key)}. Received: one fitted with"
                f" {key} {of_sampling.get(key)}."
            )
    return ""


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
        about = (content[name] for name in ("model", "sampling", "protocol", "measured"))
        found = Calibration(_calibrator(**content["parameters"]), *about)
        _check_content(found)
        return found
    except OSError as error:
        raise CalibrationError(f"{path}: expected a calibration file. Received: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CalibrationError(
            f"{path}: expected a file that `seguncert calibrate` of this version wrote."
            f" Received: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
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
        if "windows" in values:
            raise ValueError("kind neighbourhood of an earlier version; fit it anew with `seguncert calibrate`")
        (a, b), (c, d) = values["weights"]
        return Neighbourhood(**values | {"weights": ((a, b), (c, d))})
    return _scaling(kind, **values)


def _scaling(kind: str, constant: float, of_class: Sequence[float], curves: Any, frame: Any) -> Scaling:
    made = [
        Curve(each["feature"], each["low"], each["high"], tuple(each["knots"]), tuple(each["slopes"]))
        for each in curves
    ]
    return Scaling(kind, constant, tuple(of_class), tuple(made), frame and (frame[0], frame[1]))


def _check_content(found: Calibration) -> None:
    """What a damaged or edited file can be wrong in, before a net is run for it; ValueError, KeyError or TypeError."""
    C, calibrator = len(found.model["classes"]), found.calibrator
    wrong = [name for name in ("name", "sha256") if not isinstance(found.model[name], str)]
    wrong += [name for name in ("sampling", "protocol", "measured") if not isinstance(getattr(found, name), dict)]
    wrong += [f"{name} {value!r}" for name, value in _leaves(found.parameters) if not _good(name, value)]
    lengths: list[tuple[Any, Any]] = []
    if isinstance(calibrator, Vector):
        lengths = [(len(calibrator.factors), C), (len(calibrator.biases), C)]
    elif isinstance(calibrator, Remap):
        lengths = [(len(calibrator.confidences), len(calibrator.values)), (len(calibrator.values) > 0, True)]
        lengths += [(list(calibrator.confidences), sorted(calibrator.confidences))]
    elif isinstance(calibrator, Neighbourhood):
        lengths = [(0.1 <= calibrator.place <= 1e4 and 1e-3 <= calibrator.colour <= 1e3, True)]
    elif calibrator is not None:
        assert isinstance(calibrator, Scaling)
        lengths = [(len(curve.slopes), 1 + len(curve.knots)) for curve in calibrator.curves]
        lengths += [(len(calibrator.of_class), C)] if calibrator.of_class else []
    if wrong or any(is_ != should for is_, should in lengths):
        raise ValueError(", ".join(wrong) or "numbers that do not belong together")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, key)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each, name)
    else:
        yield name, value


def _good(name: str, value: Any) -> bool:
    if name == "kind":
        return value in (*KINDS, "none")
    if name == "feature":
        return value in FEATURES
    if name == "frame":
        return value is None or (type(value) is int and value > 0)
    return isinstance(value, (int, float)) and math.isfinite(value)
