"""Box arithmetic against brute force on pixels."""

import numpy as np
import pytest

from softlabel.boxes import area, clip, iou_matrix


def pixels(box):
    return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}


@pytest.mark.parametrize("seed", range(5))
def test_iou_counts_pixels(seed):
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 12, (2, 6, 2, 2))
    boxes = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1).astype(np.float32)
    found = iou_matrix(boxes[0], boxes[1])
    for i, a in enumerate(boxes[0]):
        for j, b in enumerate(boxes[1]):
            union = pixels(a) | pixels(b)
            assert found[i, j] == pytest.approx(len(pixels(a) & pixels(b)) / len(union) if union else 0)


def test_no_boxes():
    none = np.zeros((0, 4), np.float32)
    assert area(none).shape == (0,)
    assert iou_matrix(none, np.ones((3, 4), np.float32)).shape == (0, 3)


def test_an_inverted_box_has_no_area():
    assert area(np.array([[5, 5, 2, 9]], np.float32)).tolist() == [0]


def test_clipping_keeps_what_is_inside_and_empties_what_is_not():
    boxes = np.array([[1, 1, 3, 3], [-5, 2, 4, 20], [30, 30, 40, 40]], np.float32)
    clipped = clip(boxes, (0, 0, 10, 8))
    assert clipped.tolist() == [[1, 1, 3, 3], [0, 2, 4, 8], [10, 8, 10, 8]]
    assert area(clipped).tolist() == [4, 24, 0]
