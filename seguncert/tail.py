"""Channel dropout followed by nothing but a convolution and, perhaps, a bilinear resize: all samples in one product.

A mask of whole channels scales what each channel adds to the logits, so with G_k = W_k * F_k (channel k of the features
through its slice of the kernel) sample s has the logits

    b + Σ_k m_sk G_k ,      m_sk = 0 or 1 / (1 − p)

The G_k of a line are made once, in cache, and each sample is a sum of some of them: of all without the few that its mask
drops. So memory does not grow with S, and 20 samples cost less than the pass before them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from seguncert.dropout import CHANNELWISE
from seguncert.fused import accumulate_linear
from seguncert.model import Model
from seguncert.moments import Moments
from seguncert.prefix import Plan

PASSED_ON = (
    "select",
    "slice",
    "zeros_like",
    "cat",
    "alias",
    "detach",
)  # what may follow the logits: of one picture of a batch


@dataclass(frozen=True)
class LinearTail:
    """`dropout` is the module whose input the features are; `resize` is None, or the operator's align_corners."""

    dropout: str
    p: float
    weight_CKij: Tensor
    bias_C: Tensor
    padding: tuple[int, int]
    dilation: tuple[int, int]
    resize: bool | None

    def confidence(self, features_1KHW: Tensor) -> Tensor:
        """Of the pass that drops nothing."""
        logits = nn.functional.conv2d(
            features_1KHW, self.weight_CKij, self.bias_C, padding=self.padding, dilation=self.dilation
        )
        return logits.softmax(1).amax(1)

    def add(
        self, moments: Moments, features_KHW: Tensor, kept_SK: np.ndarray, rows: slice, columns: slice,
        row_position: np.ndarray, column_position: np.ndarray, n: int,
    ) -> None:  # fmt: skip
        """Add samples that keep the channels `kept_SK` to the pixels `rows` × `columns` of moments that hold `n`.

        The positions say where among the logits before any resize those pixels lie.
        """
        H, (above, beside) = features_KHW.shape[1], self.padding
        start, stop = int(row_position[0]), int(row_position[-1]) + 2
        first, last = start - above, stop - above + self.dilation[0] * (self.weight_CKij.shape[2] - 1)
        band_KRW = features_KHW[:, max(first, 0) : min(last, H)]
        band_KRW = nn.functional.pad(band_KRW, (beside, beside, max(-first, 0), max(min(last, H + above) - H, 0)))
        accumulate_linear(
            moments, band_KRW, self.weight_CKij, self.bias_C, self.dilation, kept_SK, 1 / (1 - self.p), rows, columns,
            row_position - start, column_position, n,
        )  # fmt: skip


def find_tail(model: Model, plan: Plan) -> LinearTail | None:
    """The tail of a traced net, or None where more than a convolution and a resize follow the dropout."""
    if len(plan.draws) != 1 or plan.note:
        return None
    name = plan.draws[0][0]
    module = dict(model.module.named_modules())[name]
    operators = [(o.function.overloadpacket.__name__, o.args) for o in plan.operators]
    while operators and operators[-1][0] in PASSED_ON:
        operators.pop()
    names = tuple(operator for operator, _ in operators)
    if type(module) not in (nn.Dropout1d, nn.Dropout2d) or names not in (
        ("convolution",),
        ("convolution", "upsample_bilinear2d"),
    ):
        return None
    assert isinstance(module, CHANNELWISE)
    _, weight, bias, stride, padding, dilation, transposed, _, groups = operators[0][1]
    if transposed or groups != 1 or set(stride) != {1} or weight.dtype != torch.float32:
        return None
    resize = bool(operators[1][1][2]) if len(operators) == 2 else None
    weight, bias = weight.detach(), torch.zeros(len(weight)) if bias is None else bias.detach()
    if model.head == "sigmoid":  # the two logits (0, z)
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros(1), bias])
    return LinearTail(name, float(module.p), weight, bias, tuple(padding), tuple(dilation), resize)
