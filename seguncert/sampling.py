"""Many samples of a net's softmax for one photo, as `Moments` at the photo's own size.

Tiles inside out: for each piece of a picture all samples are drawn and reduced to moments, so that what is held does not
grow with the number of samples: the features at the dropout, a few rows of logits, and the moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from seguncert.backends import check_backend, choose
from seguncert.dropout import Masks, functional_dropout, require_dropout
from seguncert.fused import accumulate, positions
from seguncert.model import Model, ModelError, evaluating, net_logits
from seguncert.moments import Moments
from seguncert.predict import TILE, at_scale, net_input, pieces, planes
from seguncert.prefix import Plan, Session, in_session, intercepting, make_plan
from seguncert.tail import LinearTail, UpToDropout, find_tail

AT_ONCE = 32  # samples
HELD = 48 << 20  # bytes of logits of samples that wait to be added
MOST = 4 << 30  # bytes of moments
LINES = 16  # of logits, that a thread does in one go


@dataclass(frozen=True)
class _Piece:
    """A part of the picture: its pixels, what the net is given for them, and where in that they lie."""

    rows: slice
    columns: slice
    rgb: UInt8[np.ndarray, "h w 3"]
    row_position: np.ndarray
    column_position: np.ndarray


class DropoutSampler:
    """MC dropout (Gal, Ghahramani 2016): samples of a net whose dropout stays on.

    The net is looked at once, here; `how` says what it allows. The same seed gives the same masks; the sums do not
    depend on how many threads make them.

    Raises:
        ModelError: no dropout with p > 0 is on the way to the logits.
    """

    def __init__(
        self, model: Model, drop_path: bool = False, backend: str = "torch", precision: str = "fp32", streams: int = 1
    ):
        check_backend(backend, precision)
        self.model = model
        found = require_dropout(model, drop_path)
        plan = make_plan(model, set(found))
        self.stochastic = tuple(dict.fromkeys(name for name, _ in plan.draws))
        self.functional = functional_dropout(model)
        self.plan: Plan = replace(plan, operators=())
        self.backend = "torch fp32"
        with self.ready(), torch.no_grad():
            self.tail: LinearTail | None = find_tail(model, plan)
        if self.tail:
            with self.ready():
                part = UpToDropout(model.module, self.plan)
                chosen = choose(part, self.tail.confidence, model.device, model.divisor, backend, precision, streams)
            self.features, self.backend = chosen.run, chosen.about
        elif backend == "openvino" or precision == "bf16":
            raise ValueError(
                f"{model.name}: backend {backend} with precision {precision} runs what comes before the masks only where a"
                " convolution alone follows them. Set backend torch and precision fp32."
            )

    @property
    def how(self) -> dict[str, Any]:
        """Which modules are stochastic, and how their samples are made."""
        if self.plan.note:
            passes = self.plan.note
        elif self.tail:
            passes = f"one pass up to {self.tail.dropout}; what follows is linear, all samples in one product"
            if self.tail.resize is not None:
                passes += (
                    "; of photos that are resized for the net or cut into pieces, one torch pass a sample from there"
                )
        else:
            passes = (
                f"one pass for what comes before the masks, {len(self.plan.settled)} results kept; then one a sample"
            )
        how = {"stochastic": list(self.stochastic), "passes": passes, "backend": self.backend}
        return how | ({"functional_dropout_left_off": self.functional} if self.functional else {})

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within, the net is in eval mode and its dropout listens; for many photos in a row, on any threads."""
        with evaluating(self.model.module), intercepting(self.model.module, self.plan.names):
            yield

    def moments(
        self,
        rgb: UInt8[np.ndarray, "H W 3"],
        samples: int = 20,
        seed: int = 0,
        scale: str | float = "auto",
        tile: int = TILE,
    ) -> Moments:
        """Moments of `samples` samples at the size of the photo.

        Raises ModelError where the net gives a value that is not finite, ValueError for fewer than 2 samples.
        """
        if samples < 2:
            raise ValueError(f"samples: expected at least 2, since a spread is asked for. Received: {samples}")
        H, W, C = *rgb.shape[:2], len(self.model.classes)
        if 4 * (2 * C + 1) * H * W > MOST:
            raise ModelError(
                f"{self.model.name}: the moments of {C} classes at {W}x{H} pixels take {4 * (2 * C + 1) * H * W / 2**30:.1f} GiB."
                f" Expected at most {MOST / 2**30:.0f}. Make the picture smaller, or cut it."
            )
        moments = Moments.empty(C, H, W)
        with torch.inference_mode(), self.ready():
            resized = at_scale(self.model, rgb, scale)
            as_it_is = resized.shape == rgb.shape and max(H, W) <= tile
            for piece in _cut(resized, H, W, tile, self.model.divisor):
                linear = self.tail is not None and (self.tail.resize is None or as_it_is)
                if not (linear and self._add_linear(moments, piece, samples, seed)):
                    self._add_passes(moments, piece, samples, seed)
        moments.n = samples
        if not torch.isfinite(moments.entropy_HW.sum()):
            raise ModelError(f"{self.model.name}: the net gave values that are not finite for this picture")
        return moments

    def _add_passes(self, moments: Moments, piece: _Piece, samples: int, seed: int) -> None:
        """A pass for each sample, sharing what is settled."""
        h, w = piece.rgb.shape[:2]
        value, session, full = net_input(self.model, piece.rgb), Session(self.plan), bool(self.plan.note)
        at_once = max(1, min(AT_ONCE, HELD // (4 * len(self.model.classes) * h * w)))
        for first in range(0, samples, at_once):
            chunk = range(first, min(first + at_once, samples))
            logits_SChw = torch.empty(len(chunk), len(self.model.classes), h, w)
            for sample, logits_Chw in zip(chunk, logits_SChw, strict=True):
                session.begin(Masks(seed, [sample]), full)
                with in_session(session):
                    logits_Chw.copy_(net_logits(self.model, value)[:, :h, :w])
                full = full or not session.as_planned()

            def add(band: slice, logits_SChw: Tensor = logits_SChw, first: int = first) -> None:
                rows = slice(piece.rows.start + band.start, piece.rows.start + band.stop)
                accumulate(
                    moments, logits_SChw, rows, piece.columns, piece.row_position[band], piece.column_position, first
                )

            _on_all_cores(add, list(_bands(piece.row_position, max(1, h // 8))))

    def _add_linear(self, moments: Moments, piece: _Piece, samples: int, seed: int) -> bool:
        """One pass up to the dropout; from there all samples in one product. False, where the net is not so for this size."""
        tail, h, w = self.tail, *piece.rgb.shape[:2]
        assert tail is not None
        value = net_input(self.model, piece.rgb)
        features_KHW = planes(self.features(value)[0].float())
        below, beside = features_KHW.shape[1:]
        if (below * tail.stride[0], beside * tail.stride[1]) != value.shape[2:]:
            return False
        dropout = dict(self.model.module.named_modules())[tail.dropout]
        kept_SK = Masks(seed, range(samples)).draw(dropout, features_KHW[None])[0].flatten(1).numpy() > 0
        row_position, column_position = piece.row_position, piece.column_position
        if tail.resize is not None:  # the picture is at the net's scale: its pixels lie in the padded input as they are
            row_position = positions(below, value.shape[2], tail.resize)[:h]
            column_position = positions(beside, value.shape[3], tail.resize)[:w]

        def add(band: slice) -> None:
            rows = slice(piece.rows.start + band.start, piece.rows.start + band.stop)
            for first in range(0, samples, AT_ONCE):
                kept = kept_SK[first : first + AT_ONCE]
                tail.add(moments, features_KHW, kept, rows, piece.columns, row_position[band], column_position, first)

        _on_all_cores(add, list(_bands(row_position, LINES)))
        return True


def _cut(rgb: UInt8[np.ndarray, "h w 3"], H: int, W: int, tile: int, divisor: int) -> Iterator[_Piece]:
    """The picture at the net's scale in pieces that overlap, with the pixels of the photo that lie in each."""
    h, w = rgb.shape[:2]
    row_position, column_position = positions(h, H), positions(w, W)
    if max(h, w) <= tile:
        yield _Piece(slice(0, H), slice(0, W), rgb, row_position, column_position)
        return
    for inner_rows, outer_rows in pieces(h, tile, divisor):
        top, bottom = np.searchsorted(row_position, [inner_rows.start, inner_rows.stop])
        for inner_columns, outer_columns in pieces(w, tile, divisor):
            left, right = np.searchsorted(column_position, [inner_columns.start, inner_columns.stop])
            if top < bottom and left < right:
                yield _Piece(
                    slice(int(top), int(bottom)),
                    slice(int(left), int(right)),
                    np.ascontiguousarray(rgb[outer_rows, outer_columns]),
                    row_position[top:bottom] - outer_rows.start,
                    column_position[left:right] - outer_columns.start,
                )


def _bands(position: np.ndarray, lines: int) -> Iterator[slice]:
    """Ranges of pixels that together lie in at most so many lines, and at least one pixel each."""
    start = 0
    while start < len(position):
        stop = max(start + 1, int(np.searchsorted(position, np.floor(position[start]) + lines)))
        yield slice(start, stop)
        start = stop


def _on_all_cores(work: Callable[[slice], None], items: list[slice]) -> None:
    """Each item on a thread of its own core, as many as torch may use; the bits do not depend on how many.

    The threads are ours, since in them what underflows becomes 0: squares of tiny probabilities do all the time, and the
    processor is many times slower at numbers below 1e-38.
    """

    def alone(item: slice) -> None:
        with torch.inference_mode():
            work(item)

    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_flush_denormal, initargs=(True,)) as pool:
        list(pool.map(alone, items))
