"""Pictures made worse on purpose, in five severities: is a net still to be trusted when light, weather or lens are not?

Kinds and numbers follow Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations (ICLR 2019), "ImageNet-C", but for `darkness`, which it has not. The code is not theirs, and differs where
a scene with labels does from one object in a frame of 224 x 224:

- Lengths are theirs in a picture whose shorter side is `SIDE`, of which scenes have about been when the same numbers were
  used on them (Michaelis et al. 2019), and in proportion in others: a photo and a smaller copy of it are blurred alike.
  The noise and the blocks of JPEG are of the pixels as they are.
- Motion blurs both ways, not one: things stay where the labels say.
- Fog is a sum of eight octaves of smooth noise, of the same amplitudes, instead of the diamond-square algorithm.

What is random, noise, direction of motion and banks of fog, follows from a seed alone and is the same in all severities.

H height, W width, K side of a kernel; L the longer side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

Level = tuple[float | int, ...]
SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 480  # pixels
ELECTRONS = 1000.0  # that white is on the sensor whose noise is in the dark
OCTAVES = 8  # of fog


def gaussian_noise(rgb: UInt8[np.ndarray, "H W 3"], level: Level, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """Independent normal noise of each pixel and channel; `level` is its standard deviation, of full scale 1."""
    noisy = _random(seed).standard_normal(rgb.shape, np.float32)
    noisy *= 255 * level[0]
    noisy += rgb
    return _rounded(noisy)


def defocus_blur(rgb: UInt8[np.ndarray, "H W 3"], level: Level, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """The mean over a disc; `level` is its radius in pixels of a picture with shorter side `SIDE`."""
    radius = level[0] * min(rgb.shape[:2]) / SIDE
    reach = math.ceil(radius)
    x_K = np.arange(-reach, reach + 1)
    kernel_KK = np.clip(radius + 0.5 - np.hypot(x_K[:, None], x_K), 0, 1)  # of a pixel on the rim a part
    return cv2.filter2D(rgb, -1, kernel_KK / kernel_KK.sum(), borderType=cv2.BORDER_REFLECT_101)


def motion_blur(rgb: UInt8[np.ndarray, "H W 3"], level: Level, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """A weighted mean along a line at most 45° from the horizontal.

    `level` is half the length of the line and the standard deviation of the weights, in pixels as of `defocus_blur`.
    """
    reach, sd = (length * min(rgb.shape[:2]) / SIDE for length in level)
    angle = math.radians(_random(seed).uniform(-45, 45))
    t_N = np.linspace(-reach, reach, 8 * math.ceil(reach) + 1)
    x_N, y_N = t_N * math.cos(angle), t_N * math.sin(angle)
    half = math.ceil(reach) + 1
    kernel_KK = np.zeros((2 * half + 1, 2 * half + 1))
    for dy in (0, 1):  # each point of the line is shared by the four pixels around it
        for dx in (0, 1):
            left, top = np.floor(x_N).astype(int) + dx, np.floor(y_N).astype(int) + dy
            weight_N = (1 - np.abs(x_N - left)) * (1 - np.abs(y_N - top)) * np.exp(-0.5 * (t_N / sd) ** 2)
            np.add.at(kernel_KK, (top + half, left + half), weight_N)
    return cv2.filter2D(rgb, -1, kernel_KK / kernel_KK.sum(), borderType=cv2.BORDER_REFLECT_101)


def darkness(rgb: UInt8[np.ndarray, "H W 3"], level: Level, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """Less light, and the shot noise of what is left; `level` is in stops: one halves the light.

    sRGB is decoded to light x in [0, 1] (IEC 61966-2-1); x 2^−stops has the variance of `ELECTRONS` a white pixel.
    """
    encoded = np.arange(256) / 255
    light_256 = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4) * 2.0 ** -level[0]
    light = light_256.astype(np.float32)[rgb]
    noise = _random(seed).standard_normal(rgb.shape, np.float32)
    noise *= np.sqrt(light_256 / ELECTRONS).astype(np.float32)[rgb]
    light = np.maximum(light + noise, 0)
    return _rounded(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))


def brightness(rgb: UInt8[np.ndarray, "H W 3"], level: Level, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """`level` is added to the value of HSV, of full scale 1, and hue and saturation are kept."""
    value_HW = rgb.max(2).astype(np.float32)
    gain_HW = np.minimum(value_HW + 255 * level[0], 255) / np.maximum(value_HW, 1)
    return _rounded(np.where(value_HW[..., None] > 0, rgb * gain_HW[..., None], np.float32(255 * level[0])))


def fog(rgb: UInt8[np.ndarray, "H W 3"], level: Level, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """White banks f in [0, 1] over the picture x: (x + c f) max(x) / (max(x) + c).

    `level` is c and the decay d: f is noise in which details half as large have 1/d² of the amplitude.
    """
    H, W = rgb.shape[:2]
    c, decay = level
    random, side = _random(seed), 2**OCTAVES
    banks = np.zeros((side, side), np.float32)
    for octave in range(1, OCTAVES + 1):
        grid = random.uniform(-1, 1, (2**octave + 1,) * 2).astype(np.float32)
        banks += cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC) * np.float32(decay ** (-2 * octave))
    L = max(H, W)
    fog_HW = cv2.resize((banks - banks.min()) / np.ptp(banks), (L, L), interpolation=cv2.INTER_CUBIC)[:H, :W]
    highest = float(rgb.max())
    return _rounded((rgb + np.float32(255 * c) * fog_HW[..., None]) * np.float32(highest / (highest + 255 * c)))


def contrast(rgb: UInt8[np.ndarray, "H W 3"], level: Level, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """`level` times what differs from the mean of each channel."""
    mean_3 = rgb.mean((0, 1))
    return _rounded(rgb * np.float32(level[0]) + ((1 - level[0]) * mean_3).astype(np.float32))


def jpeg(rgb: UInt8[np.ndarray, "H W 3"], level: Level, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """Stored as JPEG with `level` as its quality and read again."""
    stored = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(level[0])])[1]
    read = cv2.imdecode(stored, cv2.IMREAD_COLOR_RGB)
    assert read is not None
    return np.asarray(read, np.uint8)


@dataclass(frozen=True)
class Corruption:
    """A function of a picture, the level and a seed; `about` says what the five `levels` are."""

    title: str
    about: str
    levels: tuple[Level, Level, Level, Level, Level]
    apply: Callable[[np.ndarray, Level, int], np.ndarray]


OF_SIDE = f"pixels where the shorter side is {SIDE}, in proportion elsewhere"
CORRUPTIONS = {
    "gaussian-noise": Corruption("Gaussian noise", "standard deviation, of full scale 1", ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)), gaussian_noise),
    "defocus-blur": Corruption("Defocus", f"radius of the disc; {OF_SIDE}", ((3,), (4,), (6,), (8,), (10,)), defocus_blur),
    "motion-blur": Corruption("Motion blur", f"half the length, standard deviation of the weights; {OF_SIDE}", ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), motion_blur),
    "darkness": Corruption("Darkness", f"stops of exposure too few; white is {ELECTRONS:g} electrons before (our own)", ((1,), (2,), (3,), (4,), (5,)), darkness),
    "brightness": Corruption("Brightness", "added to the value of HSV, of full scale 1", ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)), brightness),
    "fog": Corruption("Fog", "amount of white, decay of detail", ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)), fog),
    "contrast": Corruption("Low contrast", "factor of what differs from the mean", ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)), contrast),
    "jpeg": Corruption("JPEG", "quality", ((25,), (18,), (15,), (10,), (7,)), jpeg),
}  # fmt: skip


def corrupt(rgb: UInt8[np.ndarray, "H W 3"], name: str, severity: int, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """The picture made worse: `name` is one of `CORRUPTIONS`, `severity` 1 to 5.

    >>> grey = np.full((1, 2, 3), 100, np.uint8)
    >>> corrupt(grey, "brightness", 2, seed=0)[0, 0].tolist(), corrupt(grey, "contrast", 5, seed=0)[0, 0].tolist()
    ([151, 151, 151], [100, 100, 100])
    """
    corruption = CORRUPTIONS[name]
    return corruption.apply(rgb, corruption.levels[severity - 1], seed)


def check_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of corruptions, each once; "all" is all of them. ValueError names one that is unknown.

    >>> check_names(["fog", "jpeg", "fog"])
    ('fog', 'jpeg')
    """
    if isinstance(names, str) and names != "all":
        raise ValueError(f"corruptions: expected all, or a list of names. Received: {names!r}")
    chosen = tuple(CORRUPTIONS) if isinstance(names, str) or [*names] == ["all"] else tuple(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in CORRUPTIONS]
    if unknown or not chosen:
        received = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"corruptions: expected all, or some of {', '.join(CORRUPTIONS)}. Received: {received}")
    return chosen


def picture_seed(seed: int, path: str) -> int:
    """The seed of one picture of a run: a function of its name, not of the order in which pictures are taken."""
    name = hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(16, "little"))
    return int.from_bytes(name.digest(), "little")


def _random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _rounded(values: Float32[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Of scale 0..255."""
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)
