"""Dropout followed by nothing but a convolution and, perhaps, a bilinear resize: all samples in one product.

A mask of whole channels scales what each channel adds to the logits, so with G_k = W_k * F_k (channel k of the features
through its slice of the kernel) sample s has the logits

    b + Σ_k m_sk G_k ,      m_sk = 0 or 1 / (1 − p)

The G_k of a line are made once, in cache, and each sample is a sum of some of them: of all without the few that its mask
drops. So memory does not grow with S, and 20 samples cost less than the pass before them. Masks of single values allow
no such sum; their samples are convolved one by one, from features that are made once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from seguncert.closed import accumulate_closed
from seguncert.dropout import Masks, probe_input
from seguncert.fused import accumulate_linear
from seguncert.model import Model, net_logits
from seguncert.moments import Moments
from seguncert.prefix import Plan, Reached, Session, in_session

# what changes no logit: picking one picture of a batch, the zeros of a sigmoid head; proved on the probe
PASSED_ON = ("select", "slice", "zeros_like", "cat", "alias", "detach", "unsqueeze")


@dataclass(frozen=True)
class LinearTail:
    """`dropout` is the module whose input the features are, `stride` how many pixels a feature spans each way.

    `resize` is None, or the operator's align_corners; `channelwise` tells masks of channels from those of single values.
    """

    dropout: str
    p: float
    channelwise: bool
    weight_CKij: Tensor
    bias_C: Tensor
    padding: tuple[int, int]
    dilation: tuple[int, int]
    resize: bool | None
    stride: tuple[int, int]

    def plain(self, features_1KHW: Tensor) -> Tensor:
        """Logits (1, C, H, W) before any resize, of features as they are."""
        return nn.functional.conv2d(
            features_1KHW, self.weight_CKij, self.bias_C, padding=self.padding, dilation=self.dilation
        )

    def confidence(self, features_1KHW: Tensor) -> Tensor:
        """Of the pass that drops nothing."""
        return self.plain(features_1KHW).softmax(1).amax(1)

    def add(
        self, moments: Moments, features_KHW: Tensor, kept_SK: np.ndarray, rows: slice, columns: slice,
        row_position: np.ndarray, column_position: np.ndarray, n: int,
    ) -> None:  # fmt: skip
        """Add samples that keep the channels `kept_SK` to the pixels `rows` × `columns` of moments that hold `n`.

        The positions say where among the logits before any resize those pixels lie.
        """
        band_KRW, start = self._band(features_KHW, row_position)
        accumulate_linear(
            moments, band_KRW, self.weight_CKij, self.bias_C, self.dilation, kept_SK, 1 / (1 - self.p), rows, columns,
            row_position - start, column_position, n,
        )  # fmt: skip

    def add_closed(
        self, moments: Moments, features_KHW: Tensor, rows: slice, columns: slice,
        row_position: np.ndarray, column_position: np.ndarray,
    ) -> None:  # fmt: skip
        """Set those pixels to what infinitely many samples come to."""

        band_KRW, start = self._band(features_KHW, row_position)
        accumulate_closed(
            moments, band_KRW, self.weight_CKij, self.bias_C, self.dilation, self.p, rows, columns,
            row_position - start, column_position,
        )  # fmt: skip

    def _band(self, features_KHW: Tensor, row_position: np.ndarray) -> tuple[Tensor, int]:
        """The features that lines of logits around some positions are made of, padded, and the first of those lines."""
        H, (above, beside) = features_KHW.shape[1], self.padding
        start, stop = int(row_position[0]), int(row_position[-1]) + 2
        first, last = start - above, stop - above + self.dilation[0] * (self.weight_CKij.shape[2] - 1)
        band_KRW = features_KHW[:, max(first, 0) : min(last, H)]
        missing = max(-first, 0), max(min(last, H + above) - H, 0)
        return nn.functional.pad(band_KRW, (beside, beside, *missing)), start


def find_tail(model: Model, plan: Plan) -> LinearTail | None:
    """The tail of a traced net, or None where more than a convolution and a resize follow the dropout.

    What the trace suggests is proved on its picture: the tail must give the logits of full passes.
    """
    if len(plan.draws) != 1 or plan.note or model.device.type != "cpu":
        return None
    name = plan.draws[0][0]
    module = dict(model.module.named_modules())[name]
    operators = [(o.function.overloadpacket.__name__, o.args) for o in plan.operators]
    operators = [(operator, args) for operator, args in operators if operator not in PASSED_ON]
    names = tuple(operator for operator, _ in operators)
    if type(module) not in (nn.Dropout, nn.Dropout1d, nn.Dropout2d) or names not in (
        ("convolution",),
        ("convolution", "upsample_bilinear2d"),
    ):
        return None
    _, weight, bias, stride, padding, dilation, transposed, _, groups = operators[0][1]
    same_size = all(2 * p == d * (k - 1) for p, d, k in zip(padding, dilation, weight.shape[2:], strict=True))
    p = float(module.p)
    if transposed or groups != 1 or set(stride) != {1} or weight.dtype != torch.float32 or not same_size or p >= 1:
        return None
    resize = bool(operators[1][1][2]) if len(operators) == 2 else None
    weight, bias = weight.detach(), torch.zeros(len(weight)) if bias is None else bias.detach()

    probe, session = probe_input(model), Session(plan)
    features_1KHW = UpToDropout(model.module, plan)(probe)
    if features_1KHW.ndim != 4:
        return None
    across = (probe.shape[2] // features_1KHW.shape[2], probe.shape[3] // features_1KHW.shape[3])
    tail = LinearTail(
        name, p, type(module) is not nn.Dropout, weight, bias, tuple(padding), tuple(dilation), resize, across
    )
    for sample in range(3):
        session.begin(Masks(0, [sample]), full=True)
        with in_session(session):
            expected_CHW = net_logits(model, probe)
        logits_1CHW = tail.plain(Masks(0, [sample]).apply(module, features_1KHW))
        if resize is not None:
            logits_1CHW = nn.functional.interpolate(
                logits_1CHW, size=probe.shape[2:], mode="bilinear", align_corners=resize
            )
        expected_CHW = expected_CHW[1:] if model.head == "sigmoid" else expected_CHW
        if logits_1CHW[0].shape != expected_CHW.shape or not torch.allclose(
            logits_1CHW[0], expected_CHW, rtol=1e-4, atol=1e-5
        ):
            return None
    if model.head == "sigmoid":  # the two logits (0, z)
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros(1), bias])
    return replace(tail, weight_CKij=weight, bias_C=bias)


class UpToDropout(nn.Module):
    """A net up to its first stochastic call, as a module of its own; to be called where the net is intercepted."""

    def __init__(self, net: nn.Module, plan: Plan):
        super().__init__()
        self.net, self.plan = net, plan

    def forward(self, value: Tensor) -> Tensor:
        """The features that the dropout is given."""
        session = Session(self.plan)
        session.begin(None, full=True, stop=True)  # nothing is kept: there is no second pass
        try:
            with in_session(session):
                self.net(value)
        except Reached as reached:
            return reached.value
        raise AssertionError("the plan has a draw")
