"""Parts of a picture: every pixel in one, boxes as tight as they can be."""

import numpy as np
import pytest

from seguncert.regions import (
    LEAST_SEGMENT,
    Regions,
    estimated_clicks,
    grid,
    parse_region,
    pixels,
    segments,
    superpixels,
)


def check(regions):
    """Boxes and sizes by looking at each pixel."""
    for r, (x, y, width, height) in enumerate(regions.boxes_R4.tolist()):
        rows, columns = np.nonzero(regions.numbers_HW == r)
        assert (x, y, width, height) == (
            columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
        )  # fmt: skip
        assert regions.sizes_R[r] == len(rows) == regions.mask(r).sum()
    assert regions.numbers_HW.max() == len(regions.boxes_R4) - 1


@pytest.mark.parametrize("H, W, side", [(180, 240, 30), (100, 130, 64), (7, 5, 64), (1, 1, 1), (65, 97, 32)])
def test_grid_covers_all_in_cells_of_nearly_one_size(H, W, side):
    cells = grid(H, W, side)
    check(cells)
    assert (cells.numbers_HW >= 0).all() and cells.sizes_R.sum() == H * W
    assert np.ptp(cells.boxes_R4[:, 2]) <= 1 and np.ptp(cells.boxes_R4[:, 3]) <= 1


def test_superpixels_cover_all():
    pytest.importorskip("skimage")
    rng = np.random.default_rng(0)
    rgb = np.kron(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    found = superpixels(rgb, 256)
    check(found)
    assert (found.numbers_HW >= 0).all() and 10 <= len(found.sizes_R) <= 40


def test_segments_hang_together_and_small_ones_are_left_out():
    labels_HW = np.zeros((40, 40), np.uint8)
    labels_HW[2:12, 2:12] = 1
    labels_HW[20:30, 20:30] = 1  # the same class, apart
    labels_HW[35:38, 35:38] = 2  # nine pixels
    found = segments(labels_HW)
    check(found)
    assert sorted(found.sizes_R.tolist()) == [100, 100, 1600 - 209]
    assert (found.numbers_HW[35:38, 35:38] == -1).all() and LEAST_SEGMENT > 9
    assert len(segments(np.zeros((3, 3), np.uint8)).sizes_R) == 0


def test_pixels_are_the_best_with_room_between():
    worth_HW = np.random.default_rng(1).random((50, 60))
    found = pixels(worth_HW, 12, spacing=8)
    check(found)
    places = found.boxes_R4[:, :2]
    apart = np.abs(places[:, None] - places[None]).max(2) + 99 * np.eye(12, dtype=int)
    assert apart.min() >= 8
    values = [worth_HW[y, x] for x, y in places.tolist()]
    assert values == sorted(values, reverse=True) and values[0] == worth_HW.max()
    assert len(pixels(worth_HW[:5, :5], 12, spacing=8).sizes_R) == 1  # no room for more
    known_HW = np.zeros((50, 60), bool)
    known_HW[25, 30] = True
    places = pixels(worth_HW, 40, known_HW, spacing=8).boxes_R4[:, :2]
    assert np.abs(places - [30, 25]).max(1).min() >= 8


def test_regions_of_numbers():
    check(Regions.of(np.array([[0, 0, -1], [1, 0, 1]], np.int32), 2))


@pytest.mark.parametrize("text", ["grid", "grid:", "grid:0", "hexagon:5", "grid:-3", "superpixel:1.5"])
def test_what_is_no_region(text):
    with pytest.raises(ValueError, match="region: expected grid:SIDE"):
        parse_region(text)


def test_clicks_count_corners_of_what_is_drawn():
    labels_HW = np.zeros((60, 60), np.uint8)
    assert estimated_clicks(labels_HW) == 5
    labels_HW[10:40, 10:40] = 1  # a square, and the hole that it leaves
    assert estimated_clicks(labels_HW) == pytest.approx(15, abs=4)
    before = estimated_clicks(labels_HW)
    labels_HW[50, 50] = 2  # too small to be drawn, as a square or as a hole
    assert estimated_clicks(labels_HW) == before
    inside_HW = np.zeros((60, 60), bool)
    inside_HW[10:40, 10:40] = True
    assert estimated_clicks(labels_HW, inside_HW) == 5
    line = np.zeros((60, 160), np.uint8)
    line[30, 5:155] = 1  # one pixel wide, and long
    assert estimated_clicks(line, line > 0) == 4  # of a line two corners are left; a polygon has three
    assert estimated_clicks(line[:, :9], line[:, :9] > 0) == 0  # four pixels
