"""Conformal sets as a file: what they were fitted for, and that they are used for nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seguncert.calibration import Calibration, unlike
from seguncert.conformal import ConformalSets
from seguncert.maps import OF_SETS
from seguncert.store import write_file

VERSION = 1


@dataclass(frozen=True)
class FittedSets:
    """Sets, and what they were fitted for: a promise holds for the logits of that net, sampling and calibration only.

    `model` and `sampling` are as in `Calibration`, `calibration` is what `known_by` tells of one; `protocol` says how the
    sets were fitted, `measured` how large they are there.
    """

    sets: ConformalSets
    model: dict[str, Any]
    sampling: dict[str, Any]
    calibration: dict[str, str]
    protocol: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def unlike(self, model: Mapping[str, Any], sampling: Mapping[str, Any], calibration: Calibration | None) -> str:
        """In what model, sampling or calibration differ from those that it was fitted for, and what to do; "" if in nothing."""
        if differs := unlike((self.model, self.sampling), (model, sampling)):
            return f"{differs} Fit sets with `seguncert conformal`, or set conformal none."
        then, now = self.calibration, known_by(calibration)
        if then["sha256"] == now["sha256"]:
            return ""
        return (
            f"expected one that was fitted after the calibration in use, {_named(now)}. Received: one fitted after"
            f" {_named(then)}. Set that calibration, or fit sets after this one with `seguncert conformal`."
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, by a rename: there is never half a file. Raises StoreError where it cannot be written."""
        content: dict[str, Any] = {"seguncert_conformal": VERSION, "sets": self.sets.to_dict()}
        content |= {name: getattr(self, name) for name in ("model", "sampling", "calibration", "protocol", "measured")}
        write_file(Path(path), json.dumps(content, indent=1) + "\n")


def known_by(calibration: Calibration | None) -> dict[str, str]:
    """A calibration by what it does to logits: one that does nothing is as good as none.

    >>> known_by(Calibration(None, {}, {})) == known_by(None)
    True
    """
    if calibration is None or calibration.calibrator is None:
        return {"about": "none", "sha256": ""}
    learnt = json.dumps(calibration.parameters, sort_keys=True)
    return {"about": calibration.about, "sha256": hashlib.sha256(learnt.encode()).hexdigest()}


def find_sets(
    choice: str | os.PathLike[str] | FittedSets | None,
    folder: Path | None,
    model: Mapping[str, Any],
    sampling: Mapping[str, Any],
    calibration: Calibration | None,
    *,
    asked: bool,
    overridden: bool,
) -> FittedSets | None:
    """What a user's choice means: auto is the file that lies in the model's folder for this method, if any.

    `asked` says that they are needed, `overridden` that the calibration is one that the user set. Raises ValueError where
    sets were fitted for something else, or are needed and there are none. Only those found by auto, if they are not
    needed and do not fit since the user set calibration or sampling otherwise, are passed over.
    """
    if choice is None or choice == "none":
        return None
    if choice == "auto":
        file = None if folder is None else folder / f"conformal-{sampling['method']}.json"
        if file is None or not file.is_file():
            if not asked:
                return None
            raise ValueError(
                f"maps: {OF_SETS} is of conformal sets: expected conformal-{sampling['method']}.json in the folder of {model['name']},"
                " or another file of such. Received: none. Fit sets with `seguncert conformal`."
            )
        found, where = load_sets(file), str(file)
    else:
        found = choice if isinstance(choice, FittedSets) else load_sets(choice)
        where = "conformal" if isinstance(choice, FittedSets) else str(choice)
    differs = found.unlike(model, sampling, calibration)
    if not differs:
        return found
    overridden |= {**found.sampling, "method": ""} != {**sampling, "method": ""}
    if choice == "auto" and overridden and not asked:
        return None
    raise ValueError(f"{where}: {differs}")


def load_sets(path: str | os.PathLike[str]) -> FittedSets:
    """What `FittedSets.save` wrote. Raises ValueError for any other content."""
    try:
        content = json.loads(Path(path).read_text())
        if content["seguncert_conformal"] != VERSION:
            raise ValueError(f"version {content['seguncert_conformal']}")
        about = (content[name] for name in ("model", "sampling", "calibration", "protocol", "measured"))
        found = FittedSets(ConformalSets.from_dict(content["sets"]), *about)
        if found.sets.aim.kind == "foreground" or len(found.model["classes"]) != found.sets.aim.C:
            raise ValueError(f"{found.sets.aim} for {len(found.model['classes'])} classes")
        texts = [found.model["name"], found.model["sha256"], found.calibration["about"], found.calibration["sha256"]]
        if not all(isinstance(text, str) for text in texts) or not isinstance(found.sampling, dict):
            raise ValueError("model, sampling or calibration is not what it should be")
        return found
    except OSError as error:
        raise ValueError(f"{path}: expected a file of conformal sets. Received: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a file that `seguncert conformal` of this version wrote."
            f" Received: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None


def _named(known: Mapping[str, str]) -> str:
    return f"{known['about']} (sha256 {known['sha256'][:12]}…)" if known["sha256"] else "none"
