"""Pooled deep features of a photo, of the very passes that make its maps: photos that look alike to the net lie close.

Letters: K channels of the features, h rows and w columns of them, D numbers of an embedding, at most `MOST`.

An embedding is the mean of the features over their places, and over all passes that there are for a photo: tiles, views,
and samples where the features are behind a dropout; each place of each pass counts the same. More than `MOST` channels are
projected by D random orthonormal rows times √(K / D), which keeps distances on average, and nearly each of them (Johnson,
Lindenstrauss 1984).
"""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from torch import Tensor, nn

from seguncert.model import FORWARDS, Model, ModelError

MOST = 64  # numbers of an embedding
SEED = 0  # of the projection
LEAST = 2  # places of the features each way
Shown = tuple[str, tuple[int, ...]]  # a module's name and the shape of what it gave

_of_thread = threading.local()  # `taking`: the embedder and the sums of the photo that this thread is at


class Pooled:
    """Sums of the features of one photo, float64, over `places`."""

    def __init__(self, K: int):
        self.total_K, self.places = np.zeros(K), 0

    def add(self, features_1Khw: Tensor) -> None:
        """Add all places of one pass, one after another: the bits depend on the features alone, not on threads."""
        places_PK = features_1Khw.detach().float().permute(0, 2, 3, 1).reshape(-1, len(self.total_K)).cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            self.total_K += places_PK.sum(0, dtype=np.float64)
        self.places += len(places_PK)


class Embedder:
    """The deepest features of a net, as `deepest` finds them, taken while photos are predicted.

    Raises ModelError where a net has none.
    """

    def __init__(self, model: Model, predict: Callable[[UInt8[np.ndarray, "H W 3"]], object]):
        """`predict` sends a photo, at its own size, through the net in the way that is used later."""
        self.net, self.module, self.K = model.name, *deepest(model, predict)
        self.part = dict(model.module.named_modules())[self.module]
        self.projection_DK = projection(self.K) if self.K > MOST else None

    @property
    def how(self) -> dict[str, Any]:
        """Which features, and what is made of them, for run.json."""
        made = f"{MOST} orthonormal rows times sqrt({self.K} / {MOST}), numpy PCG64, seed {SEED}"
        return {
            "module": self.module,
            "channels": self.K,
            "numbers": min(self.K, MOST),
            "projection": None if self.projection_DK is None else made,
        }

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, the net tells its features to the `photo` of the thread that runs it. It computes what it did."""

        def hook(module: nn.Module, given: Any, features: Tensor) -> None:
            taking = getattr(_of_thread, "taking", None)
            if taking is not None and taking[0] is self:
                taking[1].add(features)

        with FORWARDS:
            handle = self.part.register_forward_hook(hook)
        try:
            yield
        finally:
            with FORWARDS:
                handle.remove()

    @contextmanager
    def photo(self) -> Iterator[Pooled]:
        """Within, features that this thread's passes come to are those of one photo."""
        before, pooled = getattr(_of_thread, "taking", None), Pooled(self.K)
        _of_thread.taking = (self, pooled)
        try:
            yield pooled
        finally:
            _of_thread.taking = before

    def embedding(self, pooled: Pooled) -> Float32[np.ndarray, " D"]:
        """The mean of what was pooled, projected. Raises ModelError where that is nothing, or not finite."""
        if not pooled.places:
            raise ModelError(f"{self.net}: embeddings: expected features of {self.module} for this picture."
                             " Received: none, the net did not run it. Leave embeddings out.")  # fmt: skip
        with np.errstate(over="ignore", invalid="ignore"):
            mean_K = pooled.total_K / pooled.places
            # not by BLAS, whose bits depend on its threads
            mean_D = mean_K if self.projection_DK is None else (self.projection_DK * mean_K).sum(1)
            embedding_D = mean_D.astype(np.float32)
        if not np.isfinite(embedding_D).all():
            raise ModelError(f"{self.net}: the features of {self.module} are not finite for this picture")
        return embedding_D


def deepest(model: Model, predict: Callable[[UInt8[np.ndarray, "H W 3"]], object]) -> tuple[str, int]:
    """Name and number of channels of the module with the deepest features.

    In a pass over a picture of noise, 128 x 192 pixels or the next that the divisor allows, that is the module whose
    output (1, K, h, w) has the fewest places, 2 x 2 at least, and the last to run of those. An output must keep the
    picture's proportions, about: what is pooled to a given size, and maps of attention, say nothing of a place. It has
    another number of channels than the logits, which are shown anyway, and the same shape in all calls of its module.

    Raises:
        ModelError: there is none.
    """
    side = model.divisor * math.ceil(64 / model.divisor)
    rgb = np.random.default_rng(0).integers(0, 256, (2 * side, 3 * side, 3), dtype=np.uint8)
    seen, thread = list[Shown](), threading.get_ident()

    def note(name: str, module: nn.Module, given: Any, output: Any) -> None:
        if threading.get_ident() == thread and isinstance(output, Tensor):
            seen.append((name, tuple(output.shape)))

    with ExitStack() as stack:
        for name, module in model.module.named_modules():
            with FORWARDS:
                handle = module.register_forward_hook(partial(note, name))
            stack.callback(_remove, handle)
        predict(rgb)
    found = choose(seen, 1 if model.head == "sigmoid" else len(model.classes))
    if found is None:
        raise ModelError(f"{model.name}: embeddings: expected a module inside the net that gives features of a picture's proportions,"
                         " 2 x 2 places or more. Received: none such. Leave embeddings out.")  # fmt: skip
    return found


def choose(seen: Sequence[Shown], logits: int) -> tuple[str, int] | None:
    """The name and channels of the deepest features among modules in the order in which they ran; see `deepest`.

    >>> choose([("stem", (1, 8, 16, 24)), ("deep", (1, 32, 4, 6)), ("squeeze", (1, 32, 1, 1)), ("head", (1, 3, 4, 6))], 3)
    ('deep', 32)
    """
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, shape in seen:
        shapes.setdefault(name, set()).add(shape)
    fitting = [
        (name, shape)
        for name, (shape, *others) in shapes.items()
        if not others and len(shape) == 4 and shape[0] == 1 and shape[1] != logits
        if min(shape[2:]) >= LEAST and 1.2 < shape[3] / shape[2] < 1.8
    ]
    if not fitting:
        return None
    name, shape = min(reversed(fitting), key=lambda each: each[1][2] * each[1][3])
    return name, shape[1]


def projection(K: int, D: int = MOST) -> Float64[np.ndarray, "D K"]:
    """D random orthonormal rows times √(K / D), the same everywhere: of a vector's squared length D / K is kept on average.

    Gram and Schmidt, twice over, on rows of normal numbers; not by BLAS, whose bits depend on its threads.

    >>> rows_DK = projection(100, 3)
    >>> (np.round(rows_DK @ rows_DK.T * 3 / 100, 12) == np.eye(3)).all()
    np.True_
    """
    rows_DK = np.random.Generator(np.random.PCG64(SEED)).standard_normal((D, K))
    for d, row_K in enumerate(rows_DK):
        for _ in range(2):
            along_d = (rows_DK[:d] * row_K).sum(1)
            row_K -= (along_d[:, None] * rows_DK[:d]).sum(0)
        row_K /= math.sqrt((row_K * row_K).sum())
    return rows_DK * math.sqrt(K / D)


def encode(embedding_D: Float32[np.ndarray, " D"]) -> str:
    """As a line of the ledger holds it: base64 of float32, little endian."""
    return base64.b64encode(embedding_D.astype("<f4").tobytes()).decode()


def _remove(handle: Any) -> None:
    with FORWARDS:
        handle.remove()
