"""Masks as lengths of runs, in the three ways that labelling tools write them.

Letters: H rows, W columns, N pieces. A piece is a part of one line that is set; lines are rows, or columns for the
formats that count down the columns. A label map is cut into pieces once, whatever the number of its classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

CHUNK = 1 << 18  # numbers that are spread into digits or bits at a time
BRUSH_BITS = np.array([3, 4, 8, 16])  # how a length may be written: the shortest that holds it is taken


@dataclass(frozen=True, eq=False)
class Pieces:
    """A mask that has at least one pixel, as its pieces in order: the line of each, where it starts and stops."""

    line_N: Int[np.ndarray, " N"]
    start_N: Int[np.ndarray, " N"]
    stop_N: Int[np.ndarray, " N"]

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int((self.stop_N - self.start_N).sum())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """First line, first place within a line, number of lines, number of places."""
        line, start = int(self.line_N[0]), int(self.start_N.min())
        return line, start, int(self.line_N[-1]) - line + 1, int(self.stop_N.max()) - start

    def moved(self, lines: int, places: int) -> Pieces:
        """The same mask elsewhere."""
        return Pieces(self.line_N + lines, self.start_N + places, self.stop_N + places)

    def counts(self, lines: int, places: int) -> Int[np.ndarray, " k"]:
        """Lengths of the runs without and with the mask in turn, through `lines` lines of `places` one after the other.

        The first is without, and may be 0; the others are not. Their sum is lines * places.

        >>> find_pieces(np.array([[1, 1, 0], [1, 0, 0]], np.uint8))[1].counts(2, 3).tolist()
        [0, 2, 1, 1, 2]
        """
        begin_N, end_N = self.line_N * places + self.start_N, self.line_N * places + self.stop_N
        apart_N = np.flatnonzero(begin_N[1:] != end_N[:-1])  # a run may go on in the next line
        edges = np.empty(2 * len(apart_N) + 4, np.int64)
        edges[0], edges[1], edges[-2], edges[-1] = 0, begin_N[0], end_N[-1], lines * places
        edges[2:-2:2], edges[3:-2:2] = end_N[apart_N], begin_N[apart_N + 1]
        counts = np.diff(edges)
        return counts if counts[-1] else counts[:-1]


def find_pieces(labels_HW: UInt8[np.ndarray, "H W"], ignored: int = 255) -> dict[int, Pieces]:
    """The rows of a label map as the pieces of each class in it, without those `ignored`; for columns give its `.T`.

    >>> {label: pieces.box for label, pieces in find_pieces(np.array([[7, 255], [2, 2]], np.uint8)).items()}
    {2: (1, 0, 1, 2), 7: (0, 0, 1, 1)}
    """
    labels_HW = np.ascontiguousarray(labels_HW)
    _, W = labels_HW.shape
    first_HW = np.ones(labels_HW.shape, bool)
    np.not_equal(labels_HW[:, 1:], labels_HW[:, :-1], out=first_HW[:, 1:])
    begin_N = np.flatnonzero(first_HW)
    label_N = labels_HW.reshape(-1)[begin_N]
    line_N = begin_N // W
    start_N = begin_N - line_N * W
    stop_N = np.append(start_N[1:], 0)
    stop_N[stop_N == 0] = W
    order_N = np.argsort(label_N, kind="stable")
    labels, firsts = np.unique(label_N[order_N], return_index=True)
    parts = np.split(order_N, firsts[1:])
    return {
        int(label): Pieces(line_N[part], start_N[part], stop_N[part])
        for label, part in zip(labels, parts, strict=True)
        if label != ignored
    }


def coco_counts(counts: Int[np.ndarray, " k"]) -> str:
    """Run lengths down the columns as the compact text of COCO, which its own library calls `counts`.

    From the fourth on a length is written as its difference to the one before the last. A number is cut into groups
    of 5 bits, the lowest first, and as few as keep its sign; 32 is added to a group that is not the last, 48 to all.

    >>> coco_counts(np.array([6, 1, 40, 4, 5, 4, 5]))
    '61X13mN00'
    """
    numbers = counts.copy()
    numbers[3:] -= counts[1:-2]
    steps, text = np.arange(7), bytearray()
    for at in range(0, len(numbers), CHUNK):
        left_n7 = numbers[at : at + CHUNK, None] >> (5 * steps)
        group_n7 = left_n7 & 31
        last_n1 = np.argmax(left_n7 >> 5 == -(group_n7 >> 4), axis=1)[:, None]
        code_n7 = group_n7 + 48 + 32 * (steps < last_n1)
        text += code_n7[steps <= last_n1].astype(np.uint8).tobytes()
    return text.decode("ascii")


def brush_bytes(counts: Int[np.ndarray, " k"]) -> list[int]:
    """Run lengths along the rows as the bytes of Label Studio's brush, for a picture of four bytes a pixel, 0 or 255.

    A head of 53 bits: the number of bytes of the picture (32), of bits of a value less 1 (5), of bits of a length less
    1, in four sizes (4 each). Then for each run: 1, which of the sizes (2), its length less 1, the value (8).
    Raises ValueError for a picture of more bytes than the head can say.

    >>> brush_bytes(np.array([0, 1]))
    [0, 0, 0, 4, 57, 27, 252, 127, 224]
    """
    size = 4 * int(counts.sum())
    if size >= 1 << 32:
        raise ValueError(f"Label Studio's brush holds fewer than 2^30 pixels. Received: {size // 4}. Cut the picture.")
    value_k = np.where(np.arange(len(counts)) % 2, 255, 0)
    pieces_k = -(-4 * counts // (1 << 16))  # a longer run is written in several; one of length 0 in none
    value_n, length_n = np.repeat(value_k, pieces_k), np.full(pieces_k.sum(), 1 << 16)
    length_n[np.cumsum(pieces_k)[pieces_k > 0] - 1] = ((4 * counts - 1) % (1 << 16) + 1)[pieces_k > 0]
    which_n = np.searchsorted([8, 16, 256], length_n)
    bits_n = BRUSH_BITS[which_n]
    code_n = ((4 | which_n) << bits_n | length_n - 1) << 8 | value_n
    head = size << 21 | 7 << 16 | 0x237F
    bits = [np.unpackbits(np.frombuffer(head.to_bytes(7, "big"), np.uint8))[3:]]
    for at in range(0, len(code_n), CHUNK):
        used_n1 = bits_n[at : at + CHUNK, None] + 11
        left_n = (code_n[at : at + CHUNK, None] << (32 - used_n1)).astype(">u4")
        bits.append(np.unpackbits(left_n.view(np.uint8), axis=1)[np.arange(32) < used_n1])
    return np.packbits(np.concatenate(bits)).tolist()
