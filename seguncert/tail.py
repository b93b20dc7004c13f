"""Channel dropout followed by nothing but a convolution and, perhaps, a bilinear resize: all samples in one product.

A mask of whole channels scales what each channel adds to the logits, so with G_k = W_k * F_k (channel k of the features
through its slice of the kernel) sample s has the logits

    b + Σ_k m_sk G_k ,      m_sk = 0 or 1 / (1 − p)

For a kernel of one pixel the mask goes into the weights instead: (m_s W) * F, one convolution with S·C outputs. Both are
made some rows at a time, so that they stay in cache and memory does not grow with S.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from seguncert.dropout import CHANNELWISE
from seguncert.fused import convolve_each, positions
from seguncert.model import Model
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
    sigmoid: bool

    def parts(self, features_KHW: Tensor, rows: slice) -> Tensor:
        """What no mask changes of rows `rows` of the logits: the G_k (K, C, R, W), or the features themselves."""
        K, H, _ = features_KHW.shape
        C, _, i, j = self.weight_CKij.shape
        if i * j == 1:
            return features_KHW[:, rows].contiguous()
        above, beside = self.padding
        first, last = rows.start - above, rows.stop - above + self.dilation[0] * (i - 1)
        band_KRW = features_KHW[:, max(first, 0) : min(last, H)]
        band_KRW = nn.functional.pad(band_KRW, (beside, beside, max(-first, 0), max(last - H, 0)))
        if (i, j) == (3, 3) and self.dilation == (1, 1):
            parts = torch.empty(K, C, rows.stop - rows.start, band_KRW.shape[2] - 2)
            convolve_each(band_KRW, self.weight_CKij, parts)
            return parts
        each_KC = self.weight_CKij.transpose(0, 1).reshape(K * C, 1, i, j)
        parts = nn.functional.conv2d(band_KRW[None], each_KC, dilation=self.dilation, groups=K)
        return parts.view(K, C, *parts.shape[2:])

    def combine(self, parts: Tensor, factors_SK: Tensor) -> Tensor:
        """Logits (S, C, R, W), before any resize, of samples with these masks."""
        C, K, i, j = self.weight_CKij.shape
        S, R, W = len(factors_SK), *parts.shape[-2:]
        if i * j == 1:
            weight = (factors_SK[:, None, :] * self.weight_CKij[None, :, :, 0, 0]).view(S * C, K)
            logits_SCRW = (weight @ parts.view(K, -1)).view(S, C, R, W)
        else:
            logits_SCRW = (factors_SK @ parts.reshape(K, -1)).view(S, C, R, W)
        logits_SCRW += self.bias_C[:, None, None]
        return torch.cat([torch.zeros_like(logits_SCRW), logits_SCRW], 1) if self.sigmoid else logits_SCRW

    def positions(self, length: int, size: int) -> np.ndarray:
        """Where the pixels of a line of `size` lie among `length` columns or rows of the features."""
        return positions(length, size, bool(self.resize))


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
    bias = torch.zeros(len(weight)) if bias is None else bias
    return LinearTail(
        name, float(module.p), weight.detach(), bias.detach(), tuple(padding), tuple(dilation), resize, model.head == "sigmoid"
    )  # fmt: skip
