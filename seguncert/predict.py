"""Model in, logits out: a photo of any size is brought to the model's scale, padded, run, and cropped back.

Logits stay at the model's scale until `rows_at_size` brings them, some rows at a time, to the photo's own size; the
softmax comes after that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from seguncert.backends import choose
from seguncert.image import pad_to_divisor
from seguncert.model import Model, ModelError, evaluating, net_logits

T = TypeVar("T")


def scale_factor(model: Model, height: int, width: int, scale: str | float = "auto") -> float:
    """By how much a photo is resized before the net sees it.

    auto brings its area to that of the frames the model was trained on, and leaves it alone where the model has no
    frame; native leaves it alone; a number is the factor itself.

    >>> import numpy as np; model = Model("m", torch.nn.Identity(), ("a", "b"), np.zeros((2, 3), np.uint8), frame=(360, 480))
    >>> scale_factor(model, 720, 960), scale_factor(model, 720, 960, "native"), scale_factor(model, 720, 960, 0.25)
    (0.5, 1.0, 0.25)
    """
    if scale == "native" or (scale == "auto" and model.frame is None):
        return 1.0
    if scale == "auto":
        return math.sqrt(math.prod(model.frame or ()) / (height * width))
    try:
        factor = float(scale)
    except ValueError:
        factor = math.nan
    if not 0.01 <= factor <= 100:
        raise ValueError(f"scale: expected auto, native or a factor from 0.01 to 100. Received: {scale!r}")
    return factor


def predict_logits(
    model: Model, rgb: UInt8[np.ndarray, "H W 3"], scale: str | float = "auto"
) -> Float[Tensor, "C h w"]:
    """Logits of one deterministic pass, float32 on the CPU, at the model's scale: h, w = factor · (H, W), at least 1.

    The photo is run whole; `seguncert.views.OnePass` cuts large ones. Raises ModelError where the net gives a value that
    is not finite.
    """
    rgb = at_scale(model, rgb, scale)
    h, w = rgb.shape[:2]
    with torch.inference_mode(), evaluating(model.module):
        logits_Chw = planes(net_logits(model, net_input(model, rgb))[:, :h, :w].cpu())
    if not torch.isfinite(logits_Chw.sum()):  # one NaN or infinity anywhere makes the sum so
        raise ModelError(f"{model.name}: the net gave values that are not finite for this picture")
    return logits_Chw


def at_scale(model: Model, rgb: UInt8[np.ndarray, "H W 3"], scale: str | float = "auto") -> UInt8[np.ndarray, "h w 3"]:
    """The photo at the size at which the net sees it, before padding."""
    H, W = rgb.shape[:2]
    factor = scale_factor(model, H, W, scale)
    return resize_photo(rgb, max(1, round(factor * H)), max(1, round(factor * W)))


def resize_photo(rgb: UInt8[np.ndarray, "H W 3"], h: int, w: int) -> UInt8[np.ndarray, "h w 3"]:
    """Area means to make it smaller, cubic interpolation to make it larger."""
    if (h, w) == rgb.shape[:2]:
        return rgb
    smaller = h * w < rgb.shape[0] * rgb.shape[1]
    return cv2.resize(rgb, (w, h), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def on_backend(model: Model, backend: str, precision: str, streams: int = 1) -> tuple[Model, str]:
    """The model with its net on the engine that `seguncert.backends` chooses, and what that is."""
    part = _Logits(model)
    with evaluating(model.module):
        chosen = choose(
            part, lambda logits: logits.softmax(1).amax(1), model.device, model.divisor, backend, precision, streams
        )
    if chosen.run is part:
        return model, chosen.about
    return replace(model, module=_Runs(chosen.run, part), head="softmax"), chosen.about


class _Logits(nn.Module):
    """A model's net with its ways of giving logits evened out."""

    def __init__(self, model: Model):
        super().__init__()
        self.net, self.model = model.module, model

    def forward(self, value: Tensor) -> Tensor:
        return net_logits(self.model, value)[None]


class _Runs(nn.Module):
    """Calls a function; has the part that it stands for, so that its flags and its device are known."""

    def __init__(self, run: Callable[[Tensor], Tensor], part: nn.Module):
        super().__init__()
        self.run, self.part = run, part

    def forward(self, value: Tensor) -> Tensor:
        return self.run(value)


def rows_at_size(
    logits_Chw: Float[Tensor, "C h w"], height: int, width: int, values: int = 1 << 18, whole: int = 1 << 24
) -> Iterator[tuple[slice, Float[Tensor, "C rows W"]]]:
    """Bilinear resize of logits to (height, width), given out in bands of rows that stay in cache.

    The numbers of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`. Up to `whole` of them are
    made at once; beyond that each band is made by itself, of the rows it needs, columns first. `values` bounds a band.
    """
    return ((rows, make()) for rows, make in row_makers(logits_Chw, height, width, values, whole))


def row_makers(
    logits_Chw: Float[Tensor, "C h w"], height: int, width: int, values: int = 1 << 18, whole: int = 1 << 24
) -> Iterator[tuple[slice, Callable[[], Float[Tensor, "C rows W"]]]]:
    """What `rows_at_size` gives, each band made when it is called, on any thread."""
    C, h, w = logits_Chw.shape
    rows = max(1, values // (C * width))
    if (h, w) != (height, width) and C * height * width <= whole:
        resized_CHW = np.empty((C, height, width), np.float32)
        for logits_hw, resized_HW in zip(logits_Chw.numpy(), resized_CHW, strict=True):
            cv2.resize(logits_hw, (width, height), dst=resized_HW, interpolation=cv2.INTER_LINEAR)
        logits_Chw = torch.from_numpy(resized_CHW)
        h, w = height, width
    if (h, w) == (height, width):
        yield from ((band, partial(logits_Chw.__getitem__, (slice(None), band))) for band in _bands(height, rows))
        return
    source = ((torch.arange(height, dtype=torch.float64) + 0.5) * (h / height) - 0.5).clamp_(0, h - 1)
    upper = source.long().clamp_(max=max(0, h - 2))
    lower = (upper + 1).clamp_(max=h - 1)
    weight = (source - upper).float().view(-1, 1)
    wide_CSW, first = torch.empty(C, 0, width), 0  # rows of the logits from `first` on, as wide as the photo
    for band in _bands(height, rows):
        start, stop = int(upper[band.start]), int(lower[band.stop - 1]) + 1
        done = first + wide_CSW.shape[1]
        wide_CSW, first, done = wide_CSW[:, start - first :], start, max(done, start)
        if stop > done:
            tall = logits_Chw[:, done:stop].reshape(-1, w).numpy()  # all channels below each other: one call
            more = torch.from_numpy(cv2.resize(tall, (width, len(tall)), interpolation=cv2.INTER_LINEAR))
            wide_CSW = torch.cat([wide_CSW, more.view(C, -1, width)], 1)
        yield band, partial(_between, wide_CSW, upper[band] - start, lower[band] - start, weight[band])


def _between(
    wide_CSW: Float[Tensor, "C S W"], upper_R: Tensor, lower_R: Tensor, weight_R1: Float[Tensor, "R 1"]
) -> Float[Tensor, "C R W"]:
    return torch.lerp(wide_CSW.index_select(1, upper_R), wide_CSW.index_select(1, lower_R), weight_R1)


def one_thread() -> None:
    """From here on torch takes one core on this thread, whatever other threads set."""
    torch.get_num_threads()  # at its first call a thread takes over what was set last by any: let that be now
    torch.set_num_threads(1)


def on_all_cores(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Each item once, on as many threads as torch may use, a few items ahead of them; the bits do not depend on how many."""
    count = torch.get_num_threads()
    if count == 1:
        with torch.inference_mode():
            for item in items:
                work(item)
        return

    def alone(item: T) -> None:
        with torch.inference_mode():
            work(item)

    under_way = deque[Future[None]]()
    with ThreadPoolExecutor(count, initializer=one_thread) as pool, torch.inference_mode():
        for item in items:
            under_way.append(pool.submit(alone, item))
            if len(under_way) > 2 * count:
                under_way.popleft().result()
        for future in under_way:
            future.result()
    torch.set_num_threads(count)


def _bands(height: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, height)) for start in range(0, height, rows))


def net_input(model: Model, rgb: UInt8[np.ndarray, "h w 3"]) -> Tensor:
    """(1, 3, h, w) as the net wants it: padded to its divisor, normalised, on its device, channels last."""
    padded = torch.from_numpy(pad_to_divisor(rgb, model.divisor))[None].to(model.device)
    input_1HW3 = padded.float().sub_(255 * padded.new_tensor(model.mean, dtype=torch.float32))
    input_1HW3.div_(255 * padded.new_tensor(model.std, dtype=torch.float32))
    return input_1HW3.permute(0, 3, 1, 2)


def planes(logits_CHW: Float[Tensor, "C H W"]) -> Float[Tensor, "C H W"]:
    """The same logits, each class contiguous: a channels_last net leaves the classes of a pixel side by side."""
    if logits_CHW.stride(0) != 1 or len(logits_CHW) > 128:  # above, OpenCV 5 splits into arrays of its own
        return logits_CHW.contiguous()
    apart_CHW = np.empty(tuple(logits_CHW.shape), np.float32)
    cv2.split(logits_CHW.permute(1, 2, 0).numpy(), list(apart_CHW))  # four times as fast as torch's copy
    return torch.from_numpy(apart_CHW)


def positions(length: int, size: int, align_corners: bool = False, at: np.ndarray | None = None) -> np.ndarray:
    """Where `size` pixels, or those `at` places among them, lie in a line of `length`, as in torch's bilinear resize.

    >>> positions(2, 4)
    array([0.  , 0.25, 0.75, 1.  ])
    """
    at = np.arange(size) if at is None else at
    if align_corners:
        return np.minimum(at * ((length - 1) / max(1, size - 1)), length - 1)
    return np.clip((at + 0.5) * (length / size) - 0.5, 0, length - 1)
