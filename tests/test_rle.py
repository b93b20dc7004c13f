"""Run lengths against decoders written as plain loops from the descriptions of the formats."""

import numpy as np
import pytest

from seguncert.rle import brush_bytes, coco_counts, find_pieces


def decode_counts(counts, shape):
    """0 and 1 in turn, along the rows."""
    assert sum(counts) == np.prod(shape) and all(counts[1:]) and min(counts) >= 0
    flat = [value % 2 for value, count in enumerate(counts) for _ in range(count)]
    return np.array(flat, bool).reshape(shape)


def decode_coco(text, shape):
    """A mask (H, W) from the compact text of COCO, which counts down the columns."""
    counts, at = [], 0
    while at < len(text):
        number, shift, more = 0, 0, True
        while more:
            code = ord(text[at]) - 48
            assert 0 <= code < 64
            number |= (code & 31) << shift
            at, shift, more = at + 1, shift + 5, code & 32
        if code & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
    return decode_counts(counts, shape[::-1]).T


def decode_brush(data, shape):
    """A mask (H, W) from the bytes of Label Studio's brush: all four bytes of a pixel are 0, or all are 255."""
    assert all(0 <= byte < 256 for byte in data)
    bits = "".join(f"{byte:08b}" for byte in data)
    at = 0

    def read(length):
        nonlocal at
        at += length
        assert at <= len(bits)
        return int(bits[at - length : at], 2)

    size, word, sizes = read(32), read(5) + 1, [read(4) + 1 for _ in range(4)]
    out = []
    while len(out) < size:
        same = read(1)
        length = read(sizes[read(2)]) + 1
        out += [read(word)] * length if same else [read(word) for _ in range(length)]
    assert len(out) == size == 4 * np.prod(shape) and len(bits) - at < 8
    rgba = np.array(out).reshape(*shape, 4)
    assert set(out) <= {0, 255} and (rgba == rgba[..., :1]).all()
    return rgba[..., 3] == 255


def masks():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 9), (9, 1), (7, 5), (20, 33)):
        yield np.ones(shape, bool)
        for share in (0.1, 0.5, 0.9):
            mask = rng.random(shape) < share
            mask.flat[rng.integers(mask.size)] = True
            yield mask
    for start, length in ((0, 300), (7, 200)):  # long runs, and two that are alike but for one pixel
        mask = np.zeros((300, 250), bool)
        mask[start : start + length, 3:60] = True
        mask[150, 40] = False
        yield mask


@pytest.mark.parametrize("mask", list(masks()), ids=lambda mask: f"{mask.shape} {mask.sum()}")
def test_a_mask_comes_back_from_each_format(mask):
    H, W = mask.shape
    rows, columns = (find_pieces(each.view(np.uint8), ignored=0)[1] for each in (mask, mask.T))
    np.testing.assert_array_equal(decode_counts(rows.counts(H, W).tolist(), (H, W)), mask)
    np.testing.assert_array_equal(decode_coco(coco_counts(columns.counts(W, H)), (H, W)), mask)
    np.testing.assert_array_equal(decode_brush(brush_bytes(rows.counts(H, W)), (H, W)), mask)
    assert rows.area == columns.area == mask.sum()
    y, x = np.nonzero(mask)
    top, left, height, width = (int(n) for n in (y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1))
    assert rows.box == (top, left, height, width) and columns.box == (left, top, width, height)
    own = rows.moved(-top, -left).counts(height, width)
    np.testing.assert_array_equal(decode_counts(own.tolist(), (height, width)), mask[top:, left:][:height, :width])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 63, 64, 65, 16383, 16384, 16385, 32768, 32769, 70000])
def test_runs_at_the_edges_of_what_a_length_can_say(length):
    counts = np.array([length, length, 1, 0 + length])
    shape = (1, counts.sum())
    np.testing.assert_array_equal(decode_brush(brush_bytes(counts), shape), decode_counts(counts.tolist(), shape))
    np.testing.assert_array_equal(
        decode_coco(coco_counts(counts), shape[::-1]).T, decode_counts(counts.tolist(), shape)
    )


def test_every_class_of_a_map_is_found_and_none_that_is_ignored():
    labels_HW = np.random.default_rng(1).permutation(np.arange(2 * 256) % 256).astype(np.uint8).reshape(16, 32)
    found = find_pieces(labels_HW)
    assert list(found) == list(range(255))
    for label, pieces in found.items():
        np.testing.assert_array_equal(decode_counts(pieces.counts(16, 32).tolist(), (16, 32)), labels_HW == label)
    assert find_pieces(np.full((3, 2), 255, np.uint8)) == {}


def test_many_runs_are_written_in_parts():
    mask = np.indices((700, 800)).sum(0) % 2 == 0  # more runs than are spread at a time
    counts = find_pieces(mask.view(np.uint8), ignored=0)[1].counts(700, 800)
    np.testing.assert_array_equal(decode_coco(coco_counts(counts), (800, 700)).T, mask)
    np.testing.assert_array_equal(decode_brush(brush_bytes(counts), (700, 800)), mask)


def test_a_picture_beyond_the_brush_is_an_error():
    with pytest.raises(ValueError, match="brush holds fewer than 2\\^30 pixels. Received: 1073741824. Cut the picture"):
        brush_bytes(np.array([1 << 30]))


@pytest.mark.parametrize(("run", "bits"), [(8, 14), (12, 15), (16, 15), (256, 19), (65536, 27), (65540, 27 + 14)])
def test_a_length_takes_as_few_bits_as_hold_it(run, bits):
    assert len(brush_bytes(np.array([0] + 8 * [run // 4]))) == -(-(53 + 8 * bits) // 8)
