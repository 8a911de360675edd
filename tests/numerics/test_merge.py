"""Merging a scene's boxes against brute force, and its promises: any order, nothing dropped, near linear."""

import subprocess
import sys

import numpy as np
import pytest

from softlabel.boxes import iou_matrix
from softlabel.results.merge import cut_by_tiles, merge

SEEDS = range(6)

IOU = 0.4


def merged(*boxes, **how):
    """Boxes, vectors and members."""
    found = merge(*boxes, **how)
    return found.boxes, found.scores, found.members


def crowd(seed, *, size=150, classes=3, ties=True):
    """Overlapping boxes; with ties many share coordinates and scores, and some are the same altogether."""
    rng = np.random.default_rng(seed)
    corner, extent = rng.uniform(0, 60, (size, 2)), rng.uniform(4, 25, (size, 2))
    scores = rng.random((size, classes))
    if ties:
        corner, extent, scores = corner.round(-1), extent.round(-1) + 5, scores.round(1)
    boxes = np.concatenate([corner, corner + extent], axis=1)
    boxes[-10:], scores[-10:] = boxes[:10], scores[:10]
    return boxes, scores.astype(np.float32), np.zeros(size, bool)


def inside(a, b):
    """The share of b that lies in a."""
    wh = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    return wh.prod() / (b[2:] - b[:2]).prod()


def brute_force_clusters(boxes, scores, edge, iou):
    """Members of each cluster, its first box first, by comparing every box with the first of every cluster."""
    keys = [(edge[i], -scores[i].max(), *boxes[i], *scores[i]) for i in range(len(boxes))]
    clusters = []
    for i in sorted(range(len(boxes)), key=keys.__getitem__):
        for members in clusters:
            first = members[0]
            close = iou_matrix(boxes[[first]], boxes[[i]])[0, 0] > iou
            close |= edge[i] and inside(boxes[first], boxes[i]) > iou
            if close and scores[first].argmax() == scores[i].argmax():
                members.append(i)
                break
        else:
            clusters.append([i])
    return clusters


def brute_force_nms(boxes, scores, iou):
    """Kept boxes of plain greedy NMS, class by class, with the score of their class."""
    kept = []
    for class_id in range(scores.shape[1]):
        left = [i for i in range(len(boxes)) if scores[i].argmax() == class_id]
        left.sort(key=lambda i: (-scores[i, class_id], *boxes[i], *scores[i]))
        while left:
            best, *left = left
            kept.append((*boxes[best], class_id, scores[best, class_id]))
            left = [i for i in left if iou_matrix(boxes[[best]], boxes[[i]])[0, 0] <= iou]
    return sorted(kept)


def rows(boxes, scores):
    return sorted((*box, vector.argmax(), vector.max()) for box, vector in zip(boxes, scores, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ties", [False, True])
def test_nms_keeps_what_greedy_nms_keeps(seed, ties):
    boxes, scores, whole = crowd(seed, ties=ties)
    found, vectors, members = merged(boxes, scores, whole, method="nms", iou=IOU)
    assert rows(found, vectors) == brute_force_nms(boxes, scores, IOU)
    assert len(found) < len(boxes) == members.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_cut_boxes_rank_behind_whole_ones_and_go_where_they_lie_inside_one(seed):
    boxes, scores, _ = crowd(seed, ties=False)
    edge = np.random.default_rng(seed).random(len(boxes)) < 0.4
    expected = brute_force_clusters(boxes, scores, edge, IOU)
    found, vectors, members = merged(boxes, scores, edge, method="nms", iou=IOU)
    by_box = {tuple(boxes[i]): (scores[[i, *others]].max(axis=0), 1 + len(others)) for i, *others in expected}
    assert {tuple(box) for box in found} == set(by_box)
    for box, vector, count in zip(found, vectors, members, strict=True):
        assert count == by_box[tuple(box)][1]
        np.testing.assert_array_equal(vector, by_box[tuple(box)][0])


@pytest.mark.parametrize("seed", SEEDS)
def test_wbf_takes_means_of_each_cluster(seed):
    boxes, scores, whole = crowd(seed, ties=False)
    found, vectors, members = merged(boxes, scores, whole, method="wbf", iou=IOU)
    expected = []
    for cluster in brute_force_clusters(boxes, scores, whole, IOU):
        box = np.average(boxes[cluster], axis=0, weights=scores[cluster].max(axis=1))
        expected.append((*box, *scores[cluster].mean(axis=0), len(cluster)))
    found = np.concatenate([found, vectors, members[:, None]], axis=1)
    np.testing.assert_allclose(sorted(map(tuple, found)), sorted(expected), rtol=1e-6)


@pytest.mark.parametrize("method", ["nms", "wbf"])
@pytest.mark.parametrize("ties", [False, True])
def test_the_order_of_boxes_changes_no_bit(method, ties):
    boxes, scores, _ = crowd(0, size=400, ties=ties)
    edge = np.random.default_rng(1).random(len(boxes)) < 0.3
    expected = merged(boxes, scores, edge, method=method, iou=IOU)
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(len(boxes))
        for found, wanted in zip(
            merged(boxes[order], scores[order], edge[order], method=method, iou=IOU), expected, strict=True
        ):
            assert found.tobytes() == wanted.tobytes()


def test_the_best_score_comes_first():
    _, scores, _ = merged(*crowd(2), method="wbf", iou=IOU)
    assert (np.diff(scores.max(axis=1)) <= 0).all()


def test_class_vectors_are_combined():
    boxes = np.array([[0, 0, 10, 10], [0, 1, 10, 11]], np.float64)
    scores = np.array([[0.8, 0.1], [0.6, 0.5]], np.float32)
    whole = np.zeros(2, bool)
    found, vectors, members = merged(boxes, scores, whole, method="nms", iou=IOU)
    assert found.tolist() == [[0, 0, 10, 10]] and members.tolist() == [2]
    np.testing.assert_allclose(vectors, [[0.8, 0.5]])
    found, vectors, _ = merged(boxes, scores, whole, method="wbf", iou=IOU)
    np.testing.assert_allclose(found, [[0, 0.6 / 1.4, 10, 10 + 0.6 / 1.4]], rtol=1e-6)
    np.testing.assert_allclose(vectors, [[0.7, 0.3]], rtol=1e-6)


def test_classes_do_not_mix():
    boxes = np.array([[0, 0, 10, 10]] * 2, np.float64)
    scores = np.array([[0.8, 0.1], [0.1, 0.7]], np.float32)
    assert len(merged(boxes, scores, np.zeros(2, bool), method="nms", iou=IOU)[0]) == 2


@pytest.mark.parametrize("method", ["nms", "wbf"])
def test_a_surer_half_does_not_beat_the_whole_and_moves_it_nowhere(method):
    boxes = np.array([[100, 0, 140, 10], [100, 0, 112, 10], [100, 0, 135, 10]], np.float64)
    scores = np.array([[0.5, 0.1], [0.9, 0.3], [0.9, 0.3]], np.float32)
    edge = np.array([False, True, True])
    found, vectors, members = merged(boxes, scores, edge, method=method, iou=0.5)
    assert found.tolist() == [[100, 0, 140, 10]] and members.tolist() == [3]
    np.testing.assert_allclose(vectors, [[0.9, 0.3] if method == "nms" else [0.5, 0.1]])


def test_a_large_cut_box_does_not_go_for_a_small_one_inside_it():
    boxes = np.array([[0, 0, 100, 30], [10, 10, 20, 20]], np.float64)
    scores = np.array([[0.9], [0.4]], np.float32)
    found, _, _ = merged(boxes, scores, np.array([True, False]), method="nms", iou=0.5)
    assert len(found) == 2


@pytest.mark.parametrize("method", ["nms", "wbf"])
def test_no_boxes_and_boxes_without_area(method):
    found, scores, members = merged(
        np.zeros((0, 4)), np.zeros((0, 3), np.float32), np.zeros(0, bool), method=method, iou=IOU
    )
    assert found.shape == (0, 4) and scores.shape == (0, 3) and members.shape == (0,)
    flat = np.array([[5, 5, 5, 9]] * 2, np.float64)
    found, _, _ = merged(flat, np.zeros((2, 3), np.float32), np.zeros(2, bool), method=method, iou=IOU)
    assert found.tolist() == flat.tolist()


def test_boxes_at_inner_borders_are_cut_and_those_at_the_scene_s_are_not():
    left, right = [0, 0, 100, 80], [60, 0, 100, 80]
    boxes = np.array([[0, 0, 9, 80], [90, 5, 99, 9], [90, 5, 97, 9], [61, 5, 70, 9], [150, 5, 160, 9]], np.float64)
    windows = np.array([left, left, left, right, right])
    assert cut_by_tiles(boxes, windows, [0, 0, 160, 80]).tolist() == [False, True, False, True, False]
    assert cut_by_tiles(boxes, windows, [0, 0, 160, 160])[[0, 4]].tolist() == [True, False]


HEAVY = """
import json, sys, time
import numpy as np
from softlabel.results.merge import merge

size, side = 100_000, 32.0
rng = np.random.default_rng(0)
# A box meets those whose corner is less than a side away in x and y; 20 others, or all of them.
extent = {"dense": np.sqrt(size * (2 * side) ** 2 / 20), "heap": side / 4}[sys.argv[1]]
corner, wh = rng.uniform(0, extent, (size, 2)), rng.uniform(0.9 * side, 1.1 * side, (size, 2))
boxes, scores = np.concatenate([corner, corner + wh], axis=1), rng.random((size, 1)).astype(np.float32)
started = time.perf_counter()
found = merge(boxes, scores, rng.random(size) < 0.1, method=sys.argv[2], iou=0.5)
seconds = time.perf_counter() - started
status = open("/proc/self/status").read()  # ru_maxrss would be that of the parent, where it was larger
print(json.dumps([seconds, int(status.split("VmHWM:")[1].split()[0]), len(found.boxes)]))
"""


@pytest.mark.parametrize(("layout", "kept"), [("dense", (30_000, 90_000)), ("heap", (1, 100))])
@pytest.mark.parametrize("method", ["nms", "wbf"])
def test_a_hundred_thousand_boxes_take_seconds_and_less_than_a_gigabyte(layout, kept, method):
    done = subprocess.run([sys.executable, "-c", HEAVY, layout, method], capture_output=True, text=True, check=True)
    seconds, kilobytes, left = map(float, done.stdout.strip("[]\n").split(","))
    assert seconds < 5
    assert kilobytes < 1_000_000
    assert kept[0] <= left <= kept[1]
