"""A small untrained net as a model folder, and pictures to run it on."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from seguncert.model import build_net, save_model

collect_ignore = ["readers"]  # runs in an environment of its own
SHARED = Path(__file__).parents[2] / "shared" / "data"

CONFIG = {
    "_model_class": "Unet", "encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [16, 8, 8],
    "encoder_weights": None, "in_channels": 3, "classes": 3,
}  # fmt: skip
CARD = {"name": "small", "classes": ["a", "b", "c"], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """Folder of the small net."""
    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    save_model(folder, build_net(CONFIG), CONFIG, CARD)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder of 24 pictures of two sizes in two subfolders."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k in range(24):
        file = folder / f"drive {k % 2}" / f"{k:03}.{'jpg' if k % 3 else 'png'}"
        file.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(file), cv2.resize(coarse, (96, 64) if k % 2 else (70, 90), interpolation=cv2.INTER_CUBIC))
    return folder
