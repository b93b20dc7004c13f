"""What must be known of a net besides its weights: the entries of a card, each checked once, when it is read.

    name       what to call the model
    classes    names of the C classes, in the order of the channels
    mean, std  of R, G and B, of values from 0 to 1, as in training
    colours    red, green, blue of each class, 0 to 255                     [evenly spaced hues]
    frame      height and width of the pictures it was trained on, where the size of the frame matters      [null]
    divisor    sides are padded to a multiple of it                         [32]
    head       softmax: a channel a class; sigmoid: one channel, two classes                                [softmax]
    dropout    list of {"before": submodule, "p": probability}, inserted at load                            [none]
    stochastic_head   {"rank": R} of the `LowRankHead` that is put in place of the net's own at load        [null]

More entries (licence, trained_on, measured, ...) are kept as they are.
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any


class ModelError(ValueError):
    """A model that cannot be loaded or run as asked; one line: what, expected, received, what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent}: no {path.name}. A model folder needs config.json and model.safetensors (save_pretrained writes"
            " them) and card.json: name, classes, mean, std, sha256 of model.safetensors; optional: colours, frame, dropout."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: expected a file of JSON. Received: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object. Received: {type(found).__name__}")
    return found


def check_card(entries: dict[str, Any], where: str) -> dict[str, Any]:
    """The entries of a card with defaults filled in; `where` begins the message of an error.

    >>> check_card({"name": "n", "classes": ["a"], "mean": [0, 0, 0], "std": [1, 1, 1]}, "card.json")
    Traceback (most recent call last):
    seguncert.card.ModelError: card.json: classes: expected 2 to 255 different names. Received: ['a']
    """
    missing = [key for key in ("name", "classes", "mean", "std") if entries.get(key) is None]
    if missing:
        raise ModelError(f"{where}: {missing[0]!r} is missing; a card needs name, classes, mean, std, sha256")
    defaults: dict[str, Any] = {"frame": None, "divisor": 32, "head": "softmax", "dropout": [], "stochastic_head": None}
    card = defaults | {key: value for key, value in entries.items() if value is not None}
    for key, expected, holds in _CHECKS:
        if not holds(card[key]):
            raise ModelError(f"{where}: {key}: expected {expected}. Received: {card[key]!r}")
    C = len(card["classes"])
    card.setdefault("colours", default_colours(C))
    triples = _list_of(card["colours"], C, lambda colour: _list_of(colour, 3, lambda value: _whole(value, 0, 255)))
    if not triples:
        raise ModelError(f"{where}: colours: expected {C} triples of 0 to 255. Received: {card['colours']!r}")
    return card


def default_colours(C: int) -> list[list[int]]:
    """C colours, evenly spaced in hue with two brightnesses; background (first) is dark grey where C is 2."""
    if C == 2:
        return [[40, 40, 40], [255, 196, 0]]
    hues = [(k / C, 0.65, 0.95 if k % 2 else 0.7) for k in range(C)]
    return [[round(255 * value) for value in colorsys.hsv_to_rgb(*hue)] for hue in hues]


def _number(value: Any, low: float | int, high: float | int) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) <= high


def _whole(value: Any, low: int, high: int) -> bool:
    return _number(value, low, high) and float(value).is_integer()


def _list_of(values: Any, length: int, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == length and all(holds(value) for value in values)


def _names(values: Any) -> bool:
    named = isinstance(values, (list, tuple)) and all(isinstance(value, str) and value for value in values)
    return named and 2 <= len(values) <= 255 and len(set(values)) == len(values)


def _insertions(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    return all(isinstance(each, dict) and {"before", "p"} <= set(each) and _number(each["p"], 0, 1) for each in values)


def _rank(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"rank"} and _whole(value["rank"], 1, 256)


_CHECKS: list[tuple[str, str, Callable[[Any], bool]]] = [
    ("name", "a name", lambda value: isinstance(value, str) and bool(value)),
    ("classes", "2 to 255 different names", _names),
    ("mean", "three numbers from 0 to 1, of RGB/255", lambda v: _list_of(v, 3, lambda x: _number(x, 0, 1))),
    ("std", "three numbers above 0 and up to 1, of RGB/255", lambda v: _list_of(v, 3, lambda x: _number(x, 1e-6, 1))),
    ("frame", "null, or [height, width]", lambda v: v is None or _list_of(v, 2, lambda x: _whole(x, 1, 100_000))),
    ("divisor", "a whole number from 1 to 1024", lambda value: _whole(value, 1, 1024)),
    ("head", "softmax or sigmoid", lambda value: value in ("softmax", "sigmoid")),
    ("stochastic_head", 'null, or {"rank": a whole number from 1 to 256}', lambda v: v is None or _rank(v)),
    ("dropout", 'a list of {"before": name, "p": probability}', _insertions),
]
