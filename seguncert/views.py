"""One prediction for each way of looking: mirror images, other scales, other nets; and all of these together.

Test-time augmentation shows a net the photo mirrored and at other scales and brings what it says back into place; a deep
ensemble (Lakshminarayanan, Pritzel, Blundell 2017) asks several nets that were trained apart. Each *view* is one net, one
mirroring and one scale, and whatever is drawn in it, one pass or many samples with dropout, goes into the same moments.
Where a view has T samples, all views have, so that they weigh the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from seguncert.maps import DRAWN, parse_method
from seguncert.model import Model, ModelError, evaluating, net_logits, raw_logits
from seguncert.moments import Moments
from seguncert.predict import net_input, on_backend, planes, scale_factor
from seguncert.sampling import DropoutSampler, SamplingFree, add_logits
from seguncert.tiles import Look, Sampler

MIRRORS = {"flip": (1,), "flip-vertical": (0,)}
MIRRORED = {(): "as it is", (1,): "left and right", (0,): "up and down", (0, 1): "turned by 180 degrees"}
ZOOMS = (0.8, 1.25)  # of tta, where nothing else is asked for


class OnePass(Sampler):
    """The plain softmax of one deterministic pass, as moments of one sample."""

    drawn = False

    def __init__(self, model: Model, about: str = "torch fp32"):
        self.model, self.classes, self.about = model, model.classes, about

    @property
    def how(self) -> dict[str, Any]:
        """On which engine."""
        return {"backend": self.about}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within, the net is in eval mode."""
        with evaluating(self.model.module):
            yield

    def largest(self, H: int, W: int, scale: str | float) -> float:
        """The factor by which a photo of H × W pixels is resized."""
        return scale_factor(self.model, H, W, scale)

    def add(self, moments: Moments, look: Look, samples: range, seed: int) -> None:
        """Add one pass."""
        piece = look.piece(self.model)
        value = net_input(self.model, piece.rgb)
        logits_Cab = (raw_logits if piece.same_scale else net_logits)(self.model, value)
        padded = value.shape[2], value.shape[3]
        add_logits(moments, planes(logits_Cab.cpu())[None], piece, padded, moments.n)
        moments.n += 1


@dataclass(frozen=True)
class View:
    """A sampler that is shown the photo mirrored along `axes` (0 rows, 1 columns) and resized by `zoom`."""

    sampler: Sampler
    axes: tuple[int, ...] = ()
    zoom: float = 1.0


class Together(Sampler):
    """All of several views."""

    alike = False

    def __init__(self, views: Sequence[View]):
        self.views, self.classes = tuple(views), views[0].sampler.classes
        self.drawn = any(view.sampler.drawn for view in views)
        self.samplers = tuple(dict.fromkeys(view.sampler for view in views))

    @property
    def how(self) -> dict[str, Any]:
        """How each net is run, and the views in which it sees a photo."""
        first = [view for view in self.views if view.sampler is self.samplers[0]]
        seen = [f"{MIRRORED[view.axes]}, scale x {view.zoom:g}" for view in first]
        nets = [sampler.how for sampler in self.samplers]
        return ({"views": seen} if len(seen) > 1 else {}) | (nets[0] if len(nets) == 1 else {"nets": nets})

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within, all nets are set up."""
        with ExitStack() as stack:
            for sampler in self.samplers:
                stack.enter_context(sampler.ready())
            yield

    def largest(self, H: int, W: int, scale: str | float) -> float:
        """The largest factor by which a photo of H × W pixels is resized."""
        return max(view.sampler.largest(H, W, scale) * view.zoom for view in self.views)

    def parts(self) -> list[Sampler]:
        """A view each."""
        return [Together([view]) for view in self.views]

    def add(self, moments: Moments, look: Look, samples: range, seed: int) -> None:
        """Add what each view draws; no two views share masks."""
        for number, view in enumerate(self.views):
            first = samples.start * len(self.views) + number * len(samples)
            own = range(first, first + len(samples))
            seen = look.seen(view.axes, view.zoom, look.kept.setdefault(number, {}))
            if not view.axes:
                view.sampler.add(moments, seen, own, seed)
                continue
            mirrored = Moments.empty(*moments.mean_CHW.shape)
            view.sampler.add(mirrored, seen, own, seed)
            moments.merge(mirrored.mirrored(view.axes))


def make_sampler(
    models: Sequence[Model],
    method: str,
    views: Sequence[str] | None = None,
    drop_path: bool = False,
    backend: str = "torch",
    precision: str = "auto",
    streams: int = 1,
) -> Sampler:
    """What draws predictions as `method` says, on the engines that `seguncert.backends` chooses.

    Args:
        models: one, or for an ensemble several of the same classes.
        views: of tta: flip (left and right), flip-vertical, and factors of the scale, of which each is combined with
            each. None is flip and `ZOOMS` if the first model has a frame, else both flips.
        drop_path: whether mc-dropout takes timm's stochastic depth for dropout.
        streams: how many threads will use it at once.

    Raises:
        ModelError: a net has no dropout or no distribution over logits to sample, or the nets of an ensemble have other classes.
        ValueError: the method or a view is wrong.
    """
    parts = parse_method(method)
    if (len(models) > 1) != ("ensemble" in parts):
        raise ValueError(
            f"method: expected ensemble with several models, and only then. Received: {method!r}, {len(models)} model{'s' * (len(models) > 1)}"
        )
    for model in models[1:]:
        if model.classes != models[0].classes:
            raise ModelError(f"{model.name}: expected the classes of {models[0].name}: {', '.join(models[0].classes)}."
                             f" Received: {', '.join(model.classes)}")  # fmt: skip
    if len({model.sha256 for model in models}) < len(models):
        raise ValueError(f"model: expected several different ones. Received: {', '.join(model.name for model in models)},"
                         " of which two have the same weights")  # fmt: skip
    if views is not None and "tta" not in parts:
        raise ValueError(f"views: expected with them the method tta. Received: {method!r}")
    seen = _views(models[0], views) if "tta" in parts else [((), 1.0)]
    found = []
    for model in models:
        sampler: Sampler
        if parts & DRAWN:
            sampler = DropoutSampler(model, drop_path, backend, precision, streams, parts & DRAWN)
        elif "sampling-free" in parts:
            sampler = SamplingFree(model, backend=backend, precision=precision, streams=streams)
        else:
            sampler = OnePass(*on_backend(model, backend, precision, streams))
        found += [View(sampler, *each) for each in seen]
    return found[0].sampler if len(found) == 1 else Together(found)


def _views(model: Model, names: Sequence[str] | None) -> list[tuple[tuple[int, ...], float]]:
    """Each mirroring with each scale, the photo as it is first."""
    if names is None:
        names = ["flip", *map(str, ZOOMS)] if model.frame else list(MIRRORS)
    mirrors: list[tuple[int, ...]] = [()]
    zooms = [1.0]
    for name in names:
        if name in MIRRORS:
            mirrors += [tuple(sorted(axes + MIRRORS[name])) for axes in mirrors]
        else:
            zooms.append(_zoom(name))
    if len(set(zooms)) < len(zooms) or len(set(names)) < len(names) or not names:
        raise ValueError(f"views: expected each once, and one at least. Received: {', '.join(names) or 'none'}")
    return [(axes, zoom) for zoom in zooms for axes in mirrors]


def _zoom(name: str) -> float:
    try:
        zoom = float(name)
    except ValueError:
        zoom = 0.0
    if not 0.1 <= zoom <= 10:
        raise ValueError(
            f"views: expected flip, flip-vertical, or factors of the scale from 0.1 to 10. Received: {name!r}"
        )
    return zoom
