"""What an evaluation keeps of the images it has judged, and the figures that follow: before calibration, after, and the change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64

from seguncert import maps as maps_
from seguncert.clusters import Clusters
from seguncert.labels import IGNORED
from seguncert.metrics import Evaluation, ImageScores, middle
from seguncert.published import LocalTemperatureScaling
from seguncert.shift import Shift, Shifted
from seguncert.worst import Worst, overconfidence

LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Part:
    """What one image adds to a `Stage`."""

    scores: ImageScores
    published: list[Float64[np.ndarray, "_ errors"]] | None = None


@dataclass(frozen=True)
class Judged:
    """One image: its row, and unless it failed its parts, those before calibration last; `pictures` if it may be among the worst,
    `shifted` if it was made worse too."""

    row: dict[str, Any]
    parts: tuple[Part, ...] = ()
    pictures: dict[str, bytes] | None = None
    shifted: Shifted | None = None


@dataclass(frozen=True)
class Stage:
    """Sums over images of what was predicted, before calibration or after it."""

    evaluation: Evaluation
    published: LocalTemperatureScaling | None

    def add(self, part: Part, cluster: str) -> dict[str, int | float]:
        """Add an image; its own figures."""
        if self.published is not None and part.published is not None:
            self.published.add(part.published, cluster=cluster)
        return self.evaluation.add(part.scores, cluster=cluster)

    def figures(self, classes: Sequence[str]) -> dict[str, Any]:
        """By name, each figure and its interval: None where it is undefined or infinite."""
        values, ends = self.evaluation.compute(), self.evaluation.intervals(LEVEL)
        if self.published is not None:
            values |= self.published.compute()
            several = self.evaluation.several
            ends |= {
                name: each if several else (math.nan,) * 2 for name, each in self.published.intervals(LEVEL).items()
            }
        found = dict[str, Any]()
        for name, value in values.items():
            key = f"iou.{classes[int(name[4:])]}" if name.startswith("iou.") else name
            found[key] = finite(value)
            if name in ends:
                found[f"{key}_interval"] = [finite(end) for end in ends[name]]
        return found


@dataclass
class Tally:
    """All that is kept; its memory grows only by a row of numbers an image."""

    classes: tuple[str, ...]
    now: Stage
    before: Stage | None
    clusters: Clusters
    shift: Shift | None = None
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    worst: Worst = field(default_factory=Worst)
    used: set[str] = field(default_factory=set)  # clusters with a labelled pixel
    done: int = 0
    failed: int = 0

    @classmethod
    def empty(
        cls, classes: Sequence[str], maps: Sequence[str], clusters: Clusters,
        *, calibrated: bool, published: bool, replicates: int, seed: int, shift: Shift | None = None, raters: int = 1,
    ) -> Tally:  # fmt: skip
        """Of no image. `maps` are judged by how well they find errors, confidence always."""
        sure_is = {name: maps_.MAPS[name].sure_is for name in maps if name != "confidence"}

        def stage() -> Stage:
            return Stage(
                Evaluation.empty(
                    len(classes), ignore_index=IGNORED, maps=sure_is, replicates=replicates, seed=seed, raters=raters
                ),
                LocalTemperatureScaling.empty(replicates=replicates, seed=seed) if published else None,
            )  # fmt: skip

        return cls(tuple(classes), stage(), stage() if calibrated else None, clusters, shift)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """In the order of the parts of an image."""
        return (self.now,) if self.before is None else (self.now, self.before)

    def add(self, judged: Judged) -> None:
        """Add an image, from one thread."""
        row = dict(judged.row)
        path = row["path"]
        row["cluster"] = self.clusters.of[path]
        self.done, self.failed = self.done + bool(judged.parts), self.failed + (not judged.parts)
        for stage, part, prefix in zip(self.stages, judged.parts, ("", "before_"), strict=False):
            summary = stage.add(part, row["cluster"])
            row |= {prefix + name: value for name, value in summary.items() if not prefix or name != "pixels"}
        if row.get("pixels"):
            self.used.add(row["cluster"])
            row["overconfidence"] = overconfidence(judged.parts[0].scores.scores)
        if judged.pictures is not None:
            self.worst.add(row | {"pictures": judged.pictures})
        if self.shift is not None and judged.shifted is not None:
            self.shift.add(path, judged.shifted, row["cluster"])
        self.rows[path] = row

    def metrics(self) -> dict[str, Any]:
        """All figures; with a calibration those from before under `before`, and under `change` what it added, image by image.

        Those of pictures made worse are under `corruptions`, condition by condition. Raises ValueError if no pixel was labelled.
        """
        found = self.now.figures(self.classes)
        if self.shift is not None:
            found["corruptions"] = {"about": self.shift.about(), **_finite(self.shift.compute(LEVEL))}
        if self.before is None:
            return found
        before = self.before.figures(self.classes)
        ours, theirs = self.now.evaluation.replicates(), self.before.evaluation.replicates()
        change = dict[str, Any]()
        for name in ours:
            key = f"iou.{self.classes[int(name[4:])]}" if name.startswith("iou.") else name
            if found[key] is not None and before[key] is not None:
                change[key] = found[key] - before[key]
                with np.errstate(invalid="ignore"):  # infinity less infinity is undefined
                    ends = middle(ours[name] - theirs[name], LEVEL)
                change[f"{key}_interval"] = [finite(end) if self.now.evaluation.several else None for end in ends]
        return found | {"before": before, "change": change}


def finite(value: float | int) -> float | int | None:
    """The value as JSON can hold it.

    >>> finite(0.5), finite(math.inf)
    (0.5, None)
    """
    return value if math.isfinite(value) else None


def _finite(values: Any) -> Any:
    """All numbers of nested figures as JSON can hold them."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    return [finite(value) for value in values] if isinstance(values, tuple) else finite(values)
