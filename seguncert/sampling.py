"""Samples of a net with dropout or a stochastic head for one photo, as `Moments` at the photo's own size; and a limit of them.

What is held does not grow with the number of samples: the features at the dropout, a few rows of logits, the moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seguncert.backends import check_backend, choose
from seguncert.dropout import Masks, functional_dropout, require_stochastic
from seguncert.fused import accumulate, spread
from seguncert.model import Model, ModelError, evaluating, net_logits, raw_logits
from seguncert.moments import Moments
from seguncert.predict import net_input, planes, scale_factor
from seguncert.prefix import Plan, Session, in_session, intercepting, make_plan
from seguncert.tail import LinearTail, UpToDropout, find_tail
from seguncert.tiles import Look, Piece, Sampler

AT_ONCE = 32  # samples
HELD = 8 << 20  # bytes of logits of samples that wait to be added
LINES = 16  # of logits, that a thread does in one go


class DropoutSampler(Sampler):
    """MC dropout (Gal, Ghahramani 2016): samples of a net whose dropout stays on.

    And samples of a head with a distribution over logits (see `seguncert.stochastic`), or of both, as `parts` of a method
    say: mc-dropout, stochastic-head. The net is looked at once, here; `how` says what it allows. The same seed gives the
    same masks and noise; the sums do not depend on how many threads make them.

    Raises:
        ModelError: no dropout with p > 0, or no such head, is on the way to the logits.
    """

    def __init__(
        self, model: Model, drop_path: bool = False, backend: str = "torch", precision: str = "fp32", streams: int = 1,
        parts: Collection[str] = ("mc-dropout",),
    ):  # fmt: skip
        check_backend(backend, precision)
        self.model, self.classes = model, model.classes
        found = require_stochastic(model, parts, drop_path)
        plan = make_plan(model, set(found))
        self.stochastic = tuple(dict.fromkeys(name for name, _ in plan.draws))
        self.functional = functional_dropout(model) if "mc-dropout" in parts else []
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
            passes = f"one pass up to {self.tail.dropout}; what follows is linear, " + (
                "all samples in one product" if self.tail.channelwise else "a product a sample"
            )
            if self.tail.resize is not None:
                passes += "; of photos that are resized for the net, one torch pass a sample from there"
        else:
            passes = (
                f"one pass for what comes before the masks, {len(self.plan.settled)} results kept; then one a sample"
            )
        how: dict[str, Any] = {"stochastic": list(self.stochastic), "passes": passes, "backend": self.backend}
        if self.plan.unplaced:
            how["blocks"] = (
                "large pictures: masks of values that have no place in the picture differ from block to block"
            )
        return how | ({"functional_dropout_left_off": self.functional} if self.functional else {})

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within, the net is in eval mode and its dropout listens; for many photos in a row, on any threads."""
        with evaluating(self.model.module), intercepting(self.model.module, self.plan.names):
            yield

    def largest(self, H: int, W: int, scale: str | float) -> float:
        """The factor by which a photo of H × W pixels is resized."""
        return scale_factor(self.model, H, W, scale)

    def add(self, moments: Moments, look: Look, samples: range, seed: int) -> None:
        """Add samples of the block to its moments."""
        piece, kept = look.piece(self.model), look.kept
        if "value" not in kept:
            kept["value"] = net_input(self.model, piece.rgb)
        if not self._add_linear(moments, piece, kept, samples, seed):
            self._add_passes(moments, piece, kept, samples, seed)
        moments.n += len(samples)
        if not look.again:
            kept.clear()

    def _add_passes(self, moments: Moments, piece: Piece, kept: dict[str, Any], samples: range, seed: int) -> None:
        """A pass for each sample, sharing what is settled."""
        value, session, full = kept["value"], kept.setdefault("session", Session(self.plan)), bool(self.plan.note)
        padded, n, waiting, full = (value.shape[2], value.shape[3]), moments.n, list[Tensor](), kept.get("full", full)
        for sample in samples:
            session.begin(Masks(seed, [sample], piece.origin, padded), full)
            with in_session(session):  # logits that are coarser than the picture are resized where they are added
                logits_Cab = (raw_logits if piece.same_scale else net_logits)(self.model, value)
            full = full or not session.as_planned()
            waiting.append(planes(logits_Cab.cpu()))
            if len(waiting) == AT_ONCE or waiting[0].nbytes * (len(waiting) + 1) > HELD or sample == samples[-1]:
                add_logits(moments, torch.stack(waiting), piece, padded, n)
                n, waiting = n + len(waiting), []
        kept["full"] = full

    def _add_linear(self, moments: Moments, piece: Piece, kept: dict[str, Any], samples: range, seed: int) -> bool:
        """One pass up to the dropout; from there all samples in one product. False, where the net is not so for this size."""
        tail = self.tail
        if tail is None or (tail.resize is not None and not piece.same_scale) or not self._keep_features(kept):
            return False
        dropout = dict(self.model.module.named_modules())[tail.dropout]
        if not tail.channelwise:
            self._add_products(moments, piece, kept, samples, seed, tail, dropout)
            return True
        ones_1K11 = torch.ones(1, tail.weight_CKij.shape[1], 1, 1)
        kept_SK = Masks(seed, samples).draw(dropout, ones_1K11)[0].flatten(1).numpy() > 0
        features_KHW = kept["features"]
        row_position, column_position = self._positions(piece, kept)

        def add(band: slice) -> None:
            for first in range(0, len(samples), AT_ONCE):
                some_SK, n = kept_SK[first : first + AT_ONCE], moments.n + first
                tail.add(moments, features_KHW, some_SK, band, slice(None), row_position[band], column_position, n)

        _on_all_cores(add, list(_bands(row_position, LINES)))
        return True

    def _add_products(
        self, moments: Moments, piece: Piece, kept: dict[str, Any], samples: range, seed: int, tail: LinearTail,
        dropout: nn.Module,
    ) -> None:  # fmt: skip
        """A product for each sample; logits that are coarser than the picture are resized where they are added."""
        padded = kept["value"].shape[2], kept["value"].shape[3]
        features_1KHW, n, waiting = kept["features"][None], moments.n, list[Tensor]()
        for sample in samples:
            masked_1KHW = Masks(seed, [sample], piece.origin, padded).apply(dropout, features_1KHW)
            waiting.append(tail.plain(masked_1KHW)[0])
            if len(waiting) == AT_ONCE or waiting[0].nbytes * (len(waiting) + 1) > HELD or sample == samples[-1]:
                add_logits(moments, torch.stack(waiting), piece, padded, n, bool(tail.resize))
                n, waiting = n + len(waiting), []

    def _keep_features(self, kept: dict[str, Any]) -> bool:
        """Make the features at the dropout, unless they are there; False if their size is unforeseen."""
        assert self.tail is not None
        if "features" not in kept:
            value: Tensor = kept["value"]
            features_KHW = planes(self.features(value)[0].float())
            below, beside = features_KHW.shape[1:]
            if (below * self.tail.stride[0], beside * self.tail.stride[1]) != value.shape[2:]:
                return False
            kept["features"] = features_KHW
        return True

    def _positions(self, piece: Piece, kept: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Where among the logits before any resize the rows and columns of the block lie."""
        (below, beside), (height, width) = kept["features"].shape[1:], kept["value"].shape[2:]
        assert self.tail is not None
        return piece.positions_in((below, beside), (height, width), bool(self.tail.resize))


class SamplingFree(DropoutSampler):
    """What infinitely many samples of MC dropout come to, by closed formulas after one pass; see `seguncert.closed`.

    Raises:
        ModelError: besides those of `DropoutSampler`: more than a convolution and a resize follow the dropout.
    """

    drawn = False

    def __init__(self, model: Model, backend: str = "torch", precision: str = "fp32", streams: int = 1):
        super().__init__(model, backend=backend, precision=precision, streams=streams)
        if self.tail is None or not self.tail.channelwise:
            raise ModelError(
                f"{model.name}: sampling-free needs channel dropout that only one convolution and a resize follow."
                f" Received: {', '.join(self.stochastic)}, with more behind. Set the method to mc-dropout."
            )

    @property
    def how(self) -> dict[str, Any]:
        """What is linear, and how the softmax of it is approximated."""
        assert self.tail is not None
        return super().how | {"passes": f"one pass up to {self.tail.dropout}, then closed formulas; no samples"}

    def add(self, moments: Moments, look: Look, samples: range, seed: int) -> None:
        """Add the limit, as one sample."""
        piece, tail, C = look.piece(self.model), self.tail, len(self.classes)
        kept = look.kept
        if "value" not in kept:
            kept["value"] = net_input(self.model, piece.rgb)
        if tail is None or not self._keep_features(kept):
            raise ModelError(f"{self.model.name}: sampling-free: for this picture the net gives features of a size that was not"
                             " foreseen. Set the method to mc-dropout.")  # fmt: skip
        features_KHW = kept["features"]
        row_position, column_position = self._positions(piece, kept)
        limit = (
            moments
            if moments.n == 0
            else Moments.empty(C, look.rows.stop - look.rows.start, look.columns.stop - look.columns.start)
        )
        if tail.resize is None:
            self._write(limit, features_KHW, row_position, column_position)
        else:  # coarse logits change little within half of one of their pixels
            row_grid, column_grid = (_halves(each) for each in (row_position, column_position))
            coarse = Moments.empty(C, len(row_grid), len(column_grid))
            self._write(coarse, features_KHW, row_grid, column_grid)
            rows, columns = 2 * (row_position - row_grid[0]), 2 * (column_position - column_grid[0])
            _on_all_cores(lambda band: spread(limit, coarse, band, rows[band], columns), list(_bands(rows, LINES)))
        limit.n = 1
        if limit is not moments:
            moments.merge(limit)
        if not look.again:
            kept.clear()

    def _write(
        self, limit: Moments, features_KHW: Tensor, row_position: np.ndarray, column_position: np.ndarray
    ) -> None:
        tail = self.tail
        assert tail is not None

        def write(band: slice) -> None:
            tail.add_closed(limit, features_KHW, band, slice(None), row_position[band], column_position)

        _on_all_cores(write, list(_bands(row_position, LINES)))


def _halves(position: np.ndarray) -> np.ndarray:
    """Whole and half places around these; the last may lie half a place beyond the end, where nothing changes."""
    return np.arange(math.floor(2 * position[0]), math.ceil(2 * position[-1]) + 1) / 2


def add_logits(
    moments: Moments, logits_SCab: Tensor, piece: Piece, padded: tuple[int, int], n: int, align_corners: bool = False
) -> None:
    """Add the softmax of logits, wherever they are coarser than the block interpolated, to moments that hold `n`."""
    if not torch.isfinite(logits_SCab.sum()):
        raise ModelError("the net gave values that are not finite for this picture")
    a, b = logits_SCab.shape[2:]
    row_position, column_position = piece.positions_in((a, b), padded, align_corners)

    def add(band: slice) -> None:
        accumulate(moments, logits_SCab, band, slice(None), row_position[band], column_position, n)

    _on_all_cores(add, list(_bands(row_position, max(1, a // 8))))


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
