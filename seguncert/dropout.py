"""Dropout and stochastic heads at prediction time: which modules of a net are stochastic, and what they draw.

The net stays in eval mode, in which dropout does nothing; while `Masks` are in force, the stochastic modules multiply by
a mask of ours instead. So no flag moves, no batch statistic is touched, no dropout works in place on what somebody else
holds, and torch's own random numbers are left alone: a mask is a function of (seed, sample, which call it is). The noise
of a `LowRankHead` is drawn and placed in the same way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from seguncert.model import FORWARDS, Model, ModelError
from seguncert.noise import keep_or_drop, normals
from seguncert.stochastic import LowRankNoise

ALPHA = 1.7580993408473766  # minus the limit of SELU at −∞, of alpha dropout (Klambauer et al. 2017)
CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)


def stochastic_modules(net: nn.Module, drop_path: bool = False) -> dict[str, nn.Module]:
    """Names and modules of all dropout with p > 0, of any kind; with `drop_path` also timm's stochastic depth."""
    found: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        if (isinstance(module, _DropoutNd) or (drop_path and _is_drop_path(module))) and _probability(module) > 0:
            found[name] = module
    return found


def _probability(module: nn.Module) -> float:
    p: float = getattr(module, "drop_prob" if _is_drop_path(module) else "p")
    return float(p or 0)


def _is_drop_path(module: nn.Module) -> bool:
    return type(module).__name__.endswith("DropPath") and hasattr(module, "drop_prob")


def require_dropout(model: Model, drop_path: bool = False) -> dict[str, nn.Module]:
    """`stochastic_modules`, or a ModelError that names the choices where there are none."""
    found = stochastic_modules(model.module, drop_path)
    if found:
        return found
    idle = [name for name, module in model.module.named_modules() if isinstance(module, _DropoutNd)]
    paths = [name for name, module in model.module.named_modules() if _is_drop_path(module) and _probability(module)]
    hidden = functional_dropout(model)
    places = [name for name, child in model.module.named_children() if any(True for _ in child.parameters())]
    reasons = [
        "it has no dropout" if not idle else f"its dropout has p = 0 ({', '.join(idle[:3])})",
        *([f"stochastic depth ({', '.join(paths[:3])}) is not taken for dropout"] if paths else []),
        *([f"{', '.join(hidden[:3])} call dropout as a function, which cannot be switched on alone"] if hidden else []),
    ]
    raise ModelError(
        f"{model.name}: mc-dropout would give the same numbers for each sample: {'; '.join(reasons)}. Put dropout in"
        f" with insert-dropout PLACE:P (places: {', '.join(places)}), or use the method none."
    )


def require_stochastic(model: Model, parts: Collection[str], drop_path: bool = False) -> dict[str, nn.Module]:
    """Names and modules that the parts mc-dropout and stochastic-head of a method draw for; ModelError where one has none."""
    found = require_dropout(model, drop_path) if "mc-dropout" in parts else {}
    if "stochastic-head" in parts:
        heads = {name: module for name, module in model.module.named_modules() if isinstance(module, LowRankNoise)}
        if not heads:
            raise ModelError(
                f"{model.name}: stochastic-head samples the distribution that a head gives over the logits, and this net's head"
                " gives none. Put one in with put_stochastic_head and train it, or use another method."
            )
        found |= heads
    return found


class Masks:
    """Masks of some samples, drawn for a pass: one after another in the order in which the stochastic modules are called.

    Where the pass sees a piece of a picture, `origin` is where that begins in the whole (row and column) and `frame` the
    size of the piece, both in pixels of the net's input; then masks of single values are those of their places in the
    whole, as masks of channels are by themselves. `unplaced` says that a value had no place, as attention has none.
    """

    def __init__(
        self, seed: int, samples: Sequence[int], origin: tuple[int, int] = (0, 0), frame: tuple[int, int] = (0, 0)
    ):
        self.seed, self.samples, self.origin, self.frame = seed, tuple(samples), origin, frame
        self.call, self.unplaced = 0, False

    def apply(self, module: nn.Module, value_N: Tensor, *given: Any) -> Tensor:
        """What `module` in training mode makes of `value_N`; of a batch of one for each sample, where there are many.

        `given` is what it was called with, which the noise of a head needs more of.
        """
        if isinstance(module, LowRankNoise):
            mean_1CHW, features_1Khw, deviation_1CHW = given
            return module.moved(mean_1CHW, features_1Khw, deviation_1CHW, *self.draw_noise(module.rank, value_N))
        noise_N, shift_N = self.draw(module, value_N)
        value_N = value_N * noise_N
        return value_N if shift_N is None else value_N + shift_N

    def draw(self, module: nn.Module, value_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """Factor and, for the alpha kinds, summand."""
        p, alpha = _probability(module), isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout))
        assert len(self.samples) == 1 or len(value_N) == 1, "many samples are of a batch of one"
        if _is_drop_path(module):
            shape = (len(value_N), *(1,) * (value_N.ndim - 1))
        elif isinstance(module, CHANNELWISE):
            shape = (*value_N.shape[:2], *(1,) * (value_N.ndim - 2))
        else:
            shape = tuple(value_N.shape)
        kept = 1 / (1 - p) if p < 1 and not alpha and getattr(module, "scale_by_keep", True) else 1.0
        noise_N = torch.cat([self._keep(sample, 1 - p, kept, shape, value_N) for sample in self.samples])
        self.call += 1
        noise_N = noise_N.to(value_N.device, value_N.dtype)
        if alpha:
            scale = 1 / math.sqrt((ALPHA**2 * p + 1) * (1 - p)) if p < 1 else 0.0
            return noise_N * scale, (noise_N - 1) * (ALPHA * scale) + ALPHA * scale * p
        return noise_N, None

    def draw_noise(self, rank: int, value_1CHW: Tensor) -> tuple[Tensor, Tensor]:
        """Of the one sample: standard normal numbers (rank,) of the whole picture, and those of the places, (1, C, H, W)."""
        (sample,) = self.samples
        assert len(value_1CHW) == 1, "noise is of one picture"
        shared, placed = self._keys(sample, 2)
        self.call += 1
        z_R = torch.from_numpy(normals(shared, (rank, 1, 1)).ravel())
        _, C, H, W = value_1CHW.shape
        noise_CHW = torch.from_numpy(normals(placed, (C, H, W), *self._place(value_1CHW, value_1CHW.shape)))
        return z_R.to(value_1CHW.device, value_1CHW.dtype), noise_CHW[None].to(value_1CHW.device, value_1CHW.dtype)

    def _keys(self, sample: int, n: int = 1) -> list[int]:
        return np.random.SeedSequence([self.seed, sample, self.call]).generate_state(n, np.uint64).tolist()

    def _place(self, value_1CHW: Tensor, shape: Sequence[int]) -> tuple[tuple[int, int], bool]:
        """Where the first of these places is in the whole, and whether the channels of one lie side by side."""
        first, exact = list[int](), True
        for start, length, whole in zip(self.origin, shape[2:], self.frame, strict=True):
            exact = exact and (start == 0 or (whole % length == 0 and start * length % whole == 0))
            first.append(start * length // whole if start and length > 1 else 0)
        self.unplaced |= not exact and math.prod(shape[2:]) > 1
        return (first[0], first[1]), value_1CHW.stride(1) == 1 and shape[1] > 1

    def _keep(self, sample: int, keep: float, kept: float, shape: tuple[int, ...], value_N: Tensor) -> Tensor:
        """The mask of one sample: `kept` or 0."""
        (key,) = self._keys(sample)
        if len(shape) != 4 or len(value_N) > 1:
            self.unplaced |= len(value_N) > 1 or math.prod(shape[2:]) > 1
            flat = (1, math.prod(shape[:-1]), shape[-1])
            return torch.from_numpy(keep_or_drop(key, keep, kept, flat)).view(shape)
        return torch.from_numpy(keep_or_drop(key, keep, kept, shape[1:], *self._place(value_N, shape)))[None]


RANDOM = ("bernoulli", "rand", "dropout", "normal", "uniform", "multinomial", "poisson", "exponential", "geometric")


class _Watch(TorchDispatchMode):
    """Calls `seen` at each random operator."""

    def __init__(self, seen: Callable[[], None]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if any(word in name for word in RANDOM):
            self.seen()
        return function(*args, **(kwargs or {}))


def functional_dropout(model: Model) -> list[str]:
    """Modules that draw random numbers by themselves in training mode, as `torch.nn.functional.dropout` does.

    Found by watching the operators of one pass over noise of a copy of the net, with all but normalisation and known
    dropout in training mode. A net that cannot be copied, or asks for labels in training mode, keeps it to itself.
    """
    try:
        with FORWARDS:
            net = copy.deepcopy(model.module)
    except Exception:  # whatever a module holds
        return []
    for module in net.modules():
        if hasattr(vars(module).get("forward"), "original"):  # set by another thread, and belongs to the net itself
            del module.forward
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        return _functional_dropout(net, probe_input(model))


def _functional_dropout(net: nn.Module, probe: Tensor) -> list[str]:
    found, stack = list[str](), list[str]()
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: stack.append(name))
        module.register_forward_hook(lambda *_: (stack.pop(), None)[1])
        module.training = not isinstance(module, (_DropoutNd, _NormBase))
    try:
        with _Watch(lambda: found.append(stack[-1] or type(net).__name__)):
            net(probe)
    except Exception:
        return []
    return list(dict.fromkeys(found))


def probe_input(model: Model) -> Tensor:
    """Noise of a few dozen pixels, which any net of this divisor takes."""
    side = model.divisor * math.ceil(64 / model.divisor)
    return torch.randn(1, 3, side, side + model.divisor, generator=torch.Generator().manual_seed(0)).to(model.device)
