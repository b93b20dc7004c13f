"""All that the page can say of one photo: what the browser draws, a pixel in numbers and words, regions by doubt.

Nothing of gradio is in here. The browser gets pictures of at most `SHOWN` pixels a side, and maps in 256 steps to draw
with; what a click tells is of the full maps.

Letters: C classes, H × W the photo, h × w what is shown of it.
"""

from __future__ import annotations

import base64
import math
import secrets
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt16

from seguncert.calibrators import bands, calibrated_rows
from seguncert.maps import MAPS, OF_SETS
from seguncert.render import PNG16_SETTINGS, doubt_ramp, doubt_tables, encode_jpeg, thumbnail
from seguncert.run import Result, legend_note

SHOWN = 1600  # pixels of the longest side sent to the browser
LEAST_SHARE, LEAST_PIXELS = 5e-4, 16  # of what is shown; smaller regions are not listed
MOST_REGIONS = 400
SAMPLES = (2, 100)  # that may be asked for
LIKELY = 0.05  # a class below is not worth a word
DATA_DOUBT, MODEL_DOUBT = 0.2, 0.5  # mutual information as a share of the entropy: below, above


def takes_samples(method: str) -> bool:
    """Whether a method draws samples, as many as are asked for."""
    return any(part in ("mc-dropout", "stochastic-head") for part in method.split("+"))


def settings(method: str, samples: Any, calibrated: bool) -> dict[str, Any]:
    """Arguments of `analyse` and `export` for what can be chosen on the page; ValueError for too many samples."""
    chosen: dict[str, Any] = {"method": method, "calibration": "auto" if calibrated else "none"}
    if not takes_samples(method):
        return chosen
    if not isinstance(samples, (int, float)) or not SAMPLES[0] <= samples <= SAMPLES[1]:
        raise ValueError(f"samples: expected {SAMPLES[0]} to {SAMPLES[1]}. Received: {samples!r}")
    return chosen | {"samples": int(samples)}


def told(name: str, value: float, C: int) -> str:
    """A number of a map in the map's own unit, for C classes.

    >>> told("entropy", 0.5, 2), told("confidence", 0.9, 2)
    ('entropy 0.347 nat', 'confidence 0.900')
    """
    info = MAPS[name]
    unit = "" if info.unit == "probability" else f" {info.unit}"
    return f"{info.title.lower()} {value * info.full_scale(C):.3f}{unit}"


def with_sets(result: Result) -> Result:
    """The result with the map of the sizes of its conformal sets, where it has sets."""
    if result.conformal is None or result.conformal.aim.kind == "foreground":
        return result
    H, W = result.labels.shape
    size_HW = np.empty((H, W), np.float32)
    for rows, logits_CRW in calibrated_rows(result.calibrator, result.logits, result.rgb):
        size_HW[rows] = result.conformal.size_map(logits_CRW)
    return replace(result, maps=result.maps | {OF_SETS: size_HW})


@dataclass(frozen=True, eq=False)
class Sight:
    """One photo as analysed, and the secret word by which its session asks for more."""

    name: str
    result: Result
    seconds: float
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        result = self.result
        arrays = [result.rgb, result.labels, *result.maps.values(), *result.errors.values(), self.shown_labels]
        planes = [result.logits]
        if result.moments is not None:
            planes += [result.moments.mean_CHW, result.moments.squares_CHW, result.moments.entropy_HW]
        return sum(array.nbytes for array in arrays) + sum(plane.nbytes for plane in planes)

    @cached_property
    def shown_labels(self) -> UInt16[np.ndarray, "h w"]:
        """Class indices of what is shown, each of the pixel nearest."""
        h, w = self.shown_size
        return cv2.resize(self.result.labels.astype(np.uint16), (w, h), interpolation=cv2.INTER_NEAREST_EXACT)

    @property
    def shown_size(self) -> tuple[int, int]:
        """h, w."""
        H, W = self.result.labels.shape
        scale = min(1.0, SHOWN / max(H, W))
        return max(1, round(H * scale)), max(1, round(W * scale))

    def shown_map(self, name: str) -> Float[np.ndarray, "h w"]:
        """A map, each pixel the mean of those that it stands for."""
        h, w = self.shown_size
        map_HW = self.result.maps[name]
        return map_HW if (h, w) == map_HW.shape else cv2.resize(map_HW, (w, h), interpolation=cv2.INTER_AREA)

    def payload(self) -> dict[str, Any]:
        """What the browser needs to draw by itself; plain values, pictures as data URLs."""
        result, (H, W), (h, w) = self.result, self.result.labels.shape, self.shown_size
        numbers_hw, regions = self.regions
        spread = result.moments is not None and result.moments.n > 1
        return {
            "token": self.token, "name": self.name, "width": W, "height": H, "shown": [w, h],
            "photo": _jpeg(thumbnail(result.rgb, SHOWN)),
            "labels": _png16(self.shown_labels),
            "regions": _png16(numbers_hw),
            "maps": [self._map(name) for name in result.maps],
            "classes": self.classes,
            "region_list": regions,
            "below": self._below(),
            "calibration": result.calibration,
            "notes": [result.note] if result.note else [],
            "samples": result.moments.n if spread and result.moments else 0,
            "seconds": round(self.seconds, 2),
        }  # fmt: skip

    def _map(self, name: str) -> dict[str, Any]:
        info, C = MAPS[name], len(self.result.classes)
        weights, grey, colour = doubt_tables(info.sure_is)
        levels_hw = np.rint(np.minimum(self.shown_map(name) / info.drawn_to, 1) * 255).astype(np.uint8)
        return {
            "name": name, "title": info.title, "unit": info.unit, "about": info.about, "sure_is": info.sure_is,
            "full_scale": info.full_scale(C), "highest": info.full_scale(C) * info.drawn_to, "cut": info.drawn_to < 1,
            "note": legend_note(name, self.result.calibration, self.result.conformal),
            "picture": _png(levels_hw),
            "table": np.concatenate([weights[:, :1], grey[:, :1], colour], 1).ravel().tolist(),  # of each level: photo, grey, R G B
            "ramp": doubt_ramp(info.sure_is).tolist(),
        }  # fmt: skip

    def _below(self) -> list[float]:
        """Share of the photo's pixels less sure than 0, 1, … 100 %; who is wholly sure is never among them."""
        sure = self.result.maps["confidence"].ravel()
        hundredths, lines = (sure * np.float32(100)).astype(np.uint8), (np.arange(102) / 100).astype(np.float32)
        hundredths -= sure < lines[hundredths]  # the product was rounded onto a line, or below one
        hundredths += sure >= lines[hundredths + np.uint8(1)]
        counts = np.bincount(hundredths, minlength=101)[:101]
        return [0.0, *np.round(counts[:100].cumsum() / hundredths.size, 6).tolist()]

    @cached_property
    def classes(self) -> list[dict[str, Any]]:
        """Of each class in the photo, largest first: index, name, colour, share of the area, mean confidence."""
        result, C = self.result, len(self.result.classes)
        labels = result.labels.ravel()
        counts = np.bincount(labels, minlength=C)
        sums = np.bincount(labels, result.maps["confidence"].ravel(), minlength=C)
        return [
            {
                "index": int(c), "name": result.classes[c], "colour": result.colours[c].tolist(),
                "area": counts[c] / labels.size, "confidence": sums[c] / counts[c],
            }
            for c in np.argsort(-counts, kind="stable") if counts[c]
        ]  # fmt: skip

    @cached_property
    def regions(self) -> tuple[UInt16[np.ndarray, "h w"], list[dict[str, Any]]]:
        """Number of the region of each shown pixel, 0 for those not listed; and the `MOST_REGIONS` least trusted, these first.

        A region is what hangs together of one class, over corners too, in what is shown, and is not tiny; `pixels` are the
        photo's, about so many where fewer are shown.
        """
        labels_hw, confidence_hw = self.shown_labels, self.shown_map("confidence")
        least = max(LEAST_PIXELS, LEAST_SHARE * labels_hw.size)
        grain = self.result.labels.size / labels_hw.size
        found: list[dict[str, Any]] = []
        parts: list[tuple[np.ndarray, int, int]] = []
        for c in np.unique(labels_hw):
            count, numbers_hw, stats, _ = cv2.connectedComponentsWithStats((labels_hw == c).astype(np.uint8))
            sums = np.bincount(numbers_hw.ravel(), confidence_hw.ravel(), count)
            parts.append((numbers_hw, len(found), count))
            found += [
                {
                    "class": int(c), "pixels": round(float(area * grain)), "share": float(area / labels_hw.size),
                    "confidence": float(total / max(area, 1)), "box": [int(x), int(y), int(w), int(h)], "small": bool(area < least),
                }
                for total, (x, y, w, h, area) in zip(sums[1:], stats[1:], strict=True)
            ]  # fmt: skip
        order = sorted((k for k, each in enumerate(found) if not each["small"]), key=lambda k: found[k]["confidence"])
        order = order[:MOST_REGIONS]
        rank = np.zeros(len(found) + 1, np.uint16)
        rank[np.array(order, int)] = np.arange(1, len(order) + 1)
        where_hw = np.zeros(labels_hw.shape, np.uint16)
        for numbers_hw, first, count in parts:
            own = np.append(np.uint16(0), rank[first : first + count - 1])
            where_hw += own[numbers_hw]
        listed = [{key: found[k][key] for key in found[k] if key != "small"} for k in order]
        return where_hw, listed

    def pixel(self, x: int, y: int) -> dict[str, Any]:
        """Column `x`, row `y` of the photo: its classes with probabilities before and after calibration, and a sentence.

        `spread` is the standard deviation of the samples, before calibration; `maps` the values of all maps in [0, 1];
        `set` the classes of the conformal set, where there is one.
        Raises ValueError for a place outside.
        """
        result, (H, W) = self.result, self.result.labels.shape
        if not (0 <= x < W and 0 <= y < H):
            raise ValueError(f"pixel: expected x in 0 to {W - 1}, y in 0 to {H - 1}. Received: {x}, {y}")
        before_C11, after_C11 = self._logits(x, y)
        raw_C, probs_C = (logits_C11.softmax(0).flatten().numpy() for logits_C11 in (before_C11, after_C11))
        moments = result.moments if result.moments is not None and result.moments.n > 1 else None
        spread_C = None
        if moments is not None:
            spread_C = moments.at(slice(y, y + 1), slice(x, x + 1)).variance_CHW().sqrt().flatten().tolist()
        order = np.argsort(-probs_C, kind="stable")
        return {
            "x": x, "y": y, "label": int(result.labels[y, x]), "calibrated": result.calibration != "none",
            "classes": [
                {
                    "index": int(c), "name": result.classes[c], "colour": result.colours[c].tolist(),
                    "probability": float(probs_C[c]), "raw": float(raw_C[c]),
                    **({"spread": spread_C[c]} if spread_C else {}),
                }
                for c in order
            ],
            "maps": {name: float(map_HW[y, x]) for name, map_HW in result.maps.items()},
            "sentence": self._sentence(x, y, order, probs_C, raw_C),
            **self._set(after_C11),
        }  # fmt: skip

    def _logits(self, x: int, y: int) -> tuple[Float[torch.Tensor, "C 1 1"], Float[torch.Tensor, "C 1 1"]]:
        """Of one pixel, before and after calibration."""
        result = self.result
        with torch.inference_mode():
            held = bands(result.calibrator, result.logits, result.rgb)
            band = next(band for band in held if band.rows.start <= y < band.rows.stop)
            row, column = y - band.rows.start, slice(x, x + 1)
            before_CRW, after_CRW = band.both(result.calibrator)
            return before_CRW[:, row : row + 1, column], after_CRW[:, row : row + 1, column]

    def _set(self, after_C11: Float[torch.Tensor, "C 1 1"]) -> dict[str, Any]:
        if OF_SETS not in self.result.maps or self.result.conformal is None:
            return {}
        inside_C = self.result.conformal.members(after_C11)[:, 0, 0]
        return {"set": [name for name, inside in zip(self.result.classes, inside_C, strict=True) if inside]}

    def _sentence(self, x: int, y: int, order: np.ndarray, probs_C: np.ndarray, raw_C: np.ndarray) -> str:
        result = self.result
        named = [c for c in order[:3] if probs_C[c] >= LIKELY] or [order[0]]
        told = ", ".join(f"{_percent(float(probs_C[c]))} {result.classes[c]}" for c in named)
        words = [f"{'Not calibrated' if result.calibration == 'none' else 'Calibrated'}: {told}."]
        shift = raw_C[order[0]] - probs_C[order[0]]
        if result.calibration != "none" and abs(shift) >= 0.02:
            words.append(f"The net by itself said {_percent(float(raw_C[order[0]]))}.")
        moments = result.moments
        if moments is None or moments.n < 2:
            return " ".join(words)
        here = moments.at(slice(y, y + 1), slice(x, x + 1))
        total, disagreement = here.predictive_entropy_HW().item(), here.mutual_information_HW().item()
        if total < 0.1 * math.log(len(result.classes)):
            words.append("The samples agree.")
        elif disagreement >= MODEL_DOUBT * total:
            words.append(
                "The samples disagree: model uncertainty dominates here, and more labels like this would help."
            )
        elif disagreement <= DATA_DOUBT * total:
            words.append("The samples agree that it is unclear: the doubt is in the picture, not in the model.")
        else:
            words.append("The samples disagree in part: some of the doubt is the model's, some the picture's.")
        return " ".join(words)

    def summary(self) -> dict[str, Any]:
        """For programs: the figures of the photo, and the token by which pixels can be asked for."""
        H, W = self.result.labels.shape
        return {
            "token": self.token, "width": W, "height": H, "calibration": self.result.calibration,
            "samples": self.result.moments.n if self.result.moments is not None else 1,
            "classes": [{key: each[key] for key in ("index", "name", "area", "confidence")} for each in self.classes],
            "means": {name: float(map_HW.mean()) for name, map_HW in self.result.maps.items()},
            "least_trusted": self.regions[1][:10],
            "note": self.result.note,
        }  # fmt: skip


def _percent(p: float) -> str:
    """

    >>> _percent(0.623), _percent(0.9996), _percent(1.0), _percent(0.0004)
    ('62 %', 'over 99.9 %', '100 %', 'under 0.1 %')
    """
    if 0.999 < p < 1:
        return "over 99.9 %"
    if 0 < p < 0.001:
        return "under 0.1 %"
    return f"{100 * p:.0f} %" if 0.1 <= p <= 0.99 or p in (0, 1) else f"{100 * p:.1f} %"


def _png(picture: np.ndarray) -> str:
    content = cv2.imencode(".png", picture[..., ::-1] if picture.ndim == 3 else picture, PNG16_SETTINGS)[1]
    return "data:image/png;base64," + base64.b64encode(content.tobytes()).decode()


def _png16(numbers_hw: UInt16[np.ndarray, "h w"]) -> str:
    """Numbers as red · 256 + green: what a browser reads of a picture has 8 bits."""
    return _png(np.stack([numbers_hw >> 8, numbers_hw & 255, numbers_hw * 0], 2).astype(np.uint8))


def _jpeg(rgb: np.ndarray) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(rgb, 92)).decode()
