"""Where can I trust this segmentation mask?

    import seguncert
    model = seguncert.load_model("street")
    result = seguncert.analyse(model, "photo.jpg")
    result.maps["entropy"]

Names are imported when they are first used, so that `import seguncert` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seguncert.batch import Exported, export
    from seguncert.calibrating import Calibrated, calibrate
    from seguncert.calibration import Calibration, CalibrationError, load_calibration
    from seguncert.conformal import ConformalSets
    from seguncert.conforming import Conformed, conform
    from seguncert.evaluation import Evaluated, evaluate
    from seguncert.image import ImageError, Photo, read_image
    from seguncert.model import Model, ModelError, load_model, save_model, wrap_model
    from seguncert.pool import PoolError
    from seguncert.ranking import Ranking, rank_scores
    from seguncert.run import Result, analyse
    from seguncert.selection import Selected, select
    from seguncert.sets import FittedSets, load_sets
    from seguncert.stochastic import (
        LogitDistribution,
        LowRankHead,
        logit_distribution,
        put_stochastic_head,
        stochastic_nll,
    )
    from seguncert.store import StoreError
    from seguncert.video import Carry

_HOMES = {
    "batch": ("Exported", "export"),
    "calibrating": ("Calibrated", "calibrate"),
    "calibration": ("Calibration", "CalibrationError", "load_calibration"),
    "conformal": ("ConformalSets",),
    "conforming": ("Conformed", "conform"),
    "evaluation": ("Evaluated", "evaluate"),
    "image": ("ImageError", "Photo", "read_image"),
    "model": ("Model", "ModelError", "load_model", "save_model", "wrap_model"),
    "pool": ("PoolError",),
    "ranking": ("Ranking", "rank_scores"),
    "run": ("Result", "analyse"),
    "selection": ("Selected", "select"),
    "sets": ("FittedSets", "load_sets"),
    "stochastic": ("LogitDistribution", "LowRankHead", "logit_distribution", "put_stochastic_head", "stochastic_nll"),
    "store": ("StoreError",),
    "video": ("Carry",),
}

__all__ = [
    "Calibrated",
    "Calibration",
    "CalibrationError",
    "Carry",
    "ConformalSets",
    "Conformed",
    "Evaluated",
    "Exported",
    "FittedSets",
    "ImageError",
    "LogitDistribution",
    "LowRankHead",
    "Model",
    "ModelError",
    "Photo",
    "PoolError",
    "Ranking",
    "Result",
    "Selected",
    "StoreError",
    "analyse",
    "calibrate",
    "conform",
    "evaluate",
    "export",
    "load_calibration",
    "load_model",
    "load_sets",
    "logit_distribution",
    "put_stochastic_head",
    "rank_scores",
    "read_image",
    "save_model",
    "select",
    "stochastic_nll",
    "wrap_model",
]


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"seguncert.{module}"), name)
    raise AttributeError(f"module 'seguncert' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
