"""Sample pictures: fluorescence nuclei drawn here, and photos that the gradio package carries."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

PHOTOS = {  # in gradio's media; the second shows something a street model has never seen
    "tower-under-a-sky.jpg": "tower.jpg",
    "cheetah-never-seen.jpg": "cheetah.jpg",
}
DRAWINGS = {  # name: (seed, nuclei, blur of the sharpest and the least sharp nucleus in pixels, noise)
    "drawn-sparse.png": (1, 26, (0.8, 1.6), 2.0),
    "drawn-crowded.png": (2, 95, (0.8, 2.5), 3.0),
    "drawn-out-of-focus.png": (3, 45, (1.0, 11.0), 6.0),
}


def write_samples(folder: Path) -> dict[str, Path]:
    """Write all samples under `folder`; returns model name -> folder of its pictures."""
    nuclei, street = folder / "nuclei", folder / "street"
    for target in (nuclei, street):
        target.mkdir(parents=True, exist_ok=True)
    for name, (seed, count, blur, noise) in DRAWINGS.items():
        _write_once(nuclei / name, cv2.imencode(".png", draw_nuclei(seed, count, blur, noise)[..., ::-1])[1].tobytes())
    spec = importlib.util.find_spec("gradio")  # found, not imported: that would take seconds
    media = Path(spec.origin).parent / "media_assets" / "images" if spec and spec.origin else None
    for name, source in PHOTOS.items():
        if media is not None and (media / source).exists():
            _write_once(street / name, (media / source).read_bytes())
    if not any(street.iterdir()):
        shutil.rmtree(street)
        return {"nuclei": nuclei}
    return {"street": street, "nuclei": nuclei}


def draw_nuclei(
    seed: int, count: int, blur: tuple[float, float], noise: float, side: int = 512
) -> UInt8[np.ndarray, "side side 3"]:
    """Stained nuclei on a dark ground, as a fluorescence microscope shows them: each with a shape, a brightness,
    a texture and a focus of its own, some touching; uneven lighting, haze around the cells, shot and read noise."""
    rng = np.random.default_rng(seed)
    light = np.zeros((side, side), np.float32)
    radius = side / 27 * (1 + 0.2 * rng.random())
    sharp, soft = blur
    for depth in np.sort(rng.random(count))[::-1] ** 2:  # far ones first, most of them near focus
        shape = _blob(rng, rng.uniform(0, side, 2), radius * rng.uniform(0.7, 1.35), side)
        texture = cv2.GaussianBlur(rng.normal(0, 1, (side // 4, side // 4)).astype(np.float32), (0, 0), 1.2)
        texture = cv2.resize(texture, (side, side), interpolation=cv2.INTER_CUBIC)
        body = shape * (1 + 0.45 * texture) * rng.lognormal(4.1, 0.35)
        body = cv2.GaussianBlur(body, (0, 0), sharp + (soft - sharp) * float(depth))
        light = np.maximum(light, body) + 0.25 * np.minimum(light, body)
    haze = cv2.GaussianBlur(light, (0, 0), side / 25)
    y, x = np.mgrid[:side, :side] / side - 0.5
    vignette = 1 - 0.5 * ((x - 0.1) ** 2 + (y + 0.1) ** 2)
    photons = np.clip((light + 0.12 * haze) * vignette + 9, 0, None)
    grey = rng.poisson(photons * 4) / 4 + rng.normal(0, noise, photons.shape)
    return np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _blob(rng: np.random.Generator, centre: np.ndarray, radius: float, side: int) -> np.ndarray:
    """A filled, slightly lobed ellipse, 1 inside."""
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    waves = sum(rng.normal(0, 0.06 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
    stretch, turn = rng.uniform(0.62, 0.95), rng.uniform(0, np.pi)
    x, y = radius * (1 + waves) * np.cos(angle), radius * (1 + waves) * np.sin(angle) * stretch
    outline = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=1) + centre
    mask = np.zeros((side, side), np.float32)
    cv2.fillPoly(mask, [np.rint(outline * 16).astype(np.int32)], 1.0, lineType=cv2.LINE_8, shift=4)
    return mask


def _write_once(path: Path, content: bytes) -> None:
    """Leave an equal file alone: a batch that goes on would take a newer one for changed."""
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def main(file: Path) -> None:
    """Draw the picture at the top of the README: a drawing, its classes faded by doubt, its confidence."""
    from seguncert.legend import legend_classes
    from seguncert.model import load_model
    from seguncert.render import encode_jpeg, fade_classes
    from seguncert.run import analyse

    result = analyse(load_model("nuclei"), draw_nuclei(*DRAWINGS["drawn-out-of-focus.png"]))
    confident = result.overlay("confidence")
    faded = fade_classes(result.rgb, result.labels, result.colours, 1 - result.maps["entropy"], opacity=0.8)
    shares = np.bincount(result.labels.ravel(), minlength=2) / result.labels.size
    panels = []
    for picture in (
        result.rgb,
        np.concatenate([faded, legend_classes(faded.shape[1], result.classes, result.colours, shares)]),
    ):
        panel = np.full_like(confident, 250)
        panel[: len(picture)] = picture
        panels += [panel, np.full_like(panel[:, :12], 255)]
    file.write_bytes(encode_jpeg(np.concatenate([*panels, confident], axis=1)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
