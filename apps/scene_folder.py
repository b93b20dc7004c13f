"""Pictures of a scene as files: what `seguncert calibrate` and `evaluate` take, with the exact posterior beside."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np

from seguncert.scenes import SCENES
from seguncert.store import write_file

GROUPS = "abcdefghij"  # names begin with one of these: ten sequences, of which a calibrator can hold out each


def write_scene(
    name: str, out: Path, number: int, seed: int, *, posteriors: bool = True, shift: int = 0
) -> tuple[str, ...]:
    """images/, labels/ and posteriors/ of so many pictures; gives the classes. `shift` makes each label a wrong one.

    Raises ValueError for an unknown scene, and for a folder that holds other things.
    """
    if name not in SCENES:
        raise ValueError(f"scene: expected one of {', '.join(SCENES)}. Received: {name!r}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: expected a new or an empty folder. Received: one with files in it")
    scene = SCENES[name]
    parts = ("images", "labels", *(["posteriors"] if posteriors else []))
    for part in parts:
        (out / part).mkdir(parents=True, exist_ok=True)
    images, labels = scene.sample(number, seed)
    for k, (image, label_HW) in enumerate(zip(images, labels, strict=True)):
        stem = f"{GROUPS[k % len(GROUPS)]}_{k // len(GROUPS):04}"
        given_HW = ((label_HW + shift) % len(scene.classes)).astype(np.uint8)
        for part, picture in (("images", cv2.cvtColor(image, cv2.COLOR_RGB2BGR)), ("labels", given_HW)):
            write_file(out / part / f"{stem}.png", cv2.imencode(".png", picture)[1].tobytes())
        if posteriors:
            content = io.BytesIO()
            np.save(content, scene.posterior(image))
            write_file(out / "posteriors" / f"{stem}.npy", content.getvalue())
    return scene.classes
