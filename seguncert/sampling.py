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
from torch import Tensor, nn

from seguncert.backends import check_backend, choose
from seguncert.dropout import Masks, require_dropout
from seguncert.fused import accumulate, positions
from seguncert.model import Model, ModelError, evaluating, net_logits
from seguncert.moments import Moments
from seguncert.predict import TILE, at_scale, net_input, pieces, planes
from seguncert.prefix import Plan, Reached, Session, in_session, intercepting, make_plan
from seguncert.tail import LinearTail, find_tail

AT_ONCE = 32  # samples
HELD = 48 << 20  # bytes of logits of samples that wait to be added
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

    The net is looked at once, here; `how` says what it allows. The same seed gives the same moments, bit for bit,
    however many threads there are.

    Raises:
        ModelError: no dropout with p > 0 is on the way to the logits.
    """

    def __init__(
        self, model: Model, drop_path: bool = False, backend: str = "torch", precision: str = "fp32", streams: int = 1
    ):
        check_backend(backend, precision)
        self.model = model
        self.stochastic = tuple(require_dropout(model, drop_path))
        plan = make_plan(model, set(self.stochastic))
        self.plan: Plan = replace(plan, operators=())
        self.tail: LinearTail | None = find_tail(model, plan) if model.device.type == "cpu" else None
        self.backend = "torch fp32"
        if self.tail:
            with self.ready():
                part = _UpToDropout(model.module, self.plan)
                chosen = choose(part, self.tail.confidence, model.device, backend, precision, streams)
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
        else:
            passes = (
                f"one pass for what comes before the masks, {len(self.plan.settled)} results kept; then one a sample"
            )
        return {"stochastic": list(self.stochastic), "passes": passes, "backend": self.backend}

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
        H, W = rgb.shape[:2]
        moments = Moments.empty(len(self.model.classes), H, W)
        with torch.inference_mode(), self.ready():
            for piece in _cut(at_scale(self.model, rgb, scale), H, W, tile, self.model.divisor):
                if self.tail and (self.tail.resize is None or piece.rgb.shape[:2] == (H, W)):
                    self._add_linear(self.tail, moments, piece, samples, seed)
                else:
                    self._add_passes(moments, piece, samples, seed)
        moments.n = samples
        if not torch.isfinite(moments.entropy_HW.sum()):
            raise ModelError(f"{self.model.name}: the net gave values that are not finite for this picture")
        return moments

    def _add_passes(self, moments: Moments, piece: _Piece, samples: int, seed: int) -> None:
        """A pass for each sample, sharing what is settled."""
        h, w = piece.rgb.shape[:2]
        value, session = net_input(self.model, piece.rgb), Session(self.plan)
        at_once = max(1, min(AT_ONCE, HELD // (4 * len(self.model.classes) * h * w)))
        for first in range(0, samples, at_once):
            chunk = range(first, min(first + at_once, samples))
            logits_SChw = torch.empty(len(chunk), len(self.model.classes), h, w)
            for sample, logits_Chw in zip(chunk, logits_SChw, strict=True):
                session.begin(Masks(seed, [sample]), full=bool(self.plan.note))
                with in_session(session):
                    logits_Chw.copy_(net_logits(self.model, value)[:, :h, :w])

            def add(band: slice, logits_SChw: Tensor = logits_SChw, first: int = first) -> None:
                rows = slice(piece.rows.start + band.start, piece.rows.start + band.stop)
                accumulate(
                    moments, logits_SChw, rows, piece.columns, piece.row_position[band], piece.column_position, first
                )

            _on_all_cores(add, list(_bands(piece.row_position, max(1, h // 8))))

    def _add_linear(self, tail: LinearTail, moments: Moments, piece: _Piece, samples: int, seed: int) -> None:
        """One pass up to the dropout; from there all samples in one product, a band of rows at a time."""
        h, w = piece.rgb.shape[:2]
        value = net_input(self.model, piece.rgb)
        features_KHW = planes(self.features(value)[0].float())
        dropout = dict(self.model.module.named_modules())[tail.dropout]
        kept_SK = Masks(seed, range(samples)).draw(dropout, features_KHW[None])[0].flatten(1).numpy() > 0
        row_position, column_position = piece.row_position, piece.column_position
        if tail.resize is not None:  # the picture is at the net's scale: its pixels lie in the padded input as they are
            below, beside = features_KHW.shape[1:]
            row_position = positions(below, value.shape[2], tail.resize)[:h]
            column_position = positions(beside, value.shape[3], tail.resize)[:w]

        def add(band: slice) -> None:
            rows = slice(piece.rows.start + band.start, piece.rows.start + band.stop)
            for first in range(0, samples, AT_ONCE):
                kept = kept_SK[first : first + AT_ONCE]
                tail.add(moments, features_KHW, kept, rows, piece.columns, row_position[band], column_position, first)

        _on_all_cores(add, list(_bands(row_position, LINES)))


class _UpToDropout(nn.Module):
    """A net up to its first stochastic call, as a module of its own; to be called where the net is intercepted."""

    def __init__(self, net: nn.Module, plan: Plan):
        super().__init__()
        self.net, self.plan = net, plan

    def forward(self, value: Tensor) -> Tensor:
        session = Session(self.plan)
        session.begin(None, stop=True)
        try:
            with in_session(session):
                self.net(value)
        except Reached as reached:
            return reached.value
        raise AssertionError("the plan has a draw")


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

    def prepare() -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)

    def alone(item: slice) -> None:
        with torch.inference_mode():
            work(item)

    with ThreadPoolExecutor(torch.get_num_threads(), initializer=prepare) as pool:
        list(pool.map(alone, items))
