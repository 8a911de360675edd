"""Several teachers over one tile."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from made_stores import detections, made_store, made_tile, write_store, write_tiles

from softlabel.errors import StoreError
from softlabel.fusion import fuse_tile
from softlabel.records import EMPTY, Detections
from softlabel.results.fuse import fuse_job, fuse_shard

A = detections((0, 0, 10, 10, 0, 0.8))
B = detections((2, 0, 12, 10, 0, 0.4))


def fuse(*found, weights=(1, 1), threshold=0.05, iou=0.5):
    return fuse_tile(found, weights, threshold, iou)


def test_boxes_are_weighted_by_score_and_teacher_and_vectors_by_teacher():
    found = fuse(A, B, weights=(1, 3))
    # Says: 1 x 0.8 and 3 x 0.4.
    np.testing.assert_allclose(found.boxes, [[1.2, 0, 11.2, 10]], rtol=1e-6)
    np.testing.assert_allclose(found.scores, (1 * A.scores + 3 * B.scores) / 4, rtol=1e-6)
    assert found.boxes.dtype == found.scores.dtype == np.float32 and found.objectness is None


def test_fused_boxes_have_no_agreement():
    known = replace(A, agreement=np.ones(1, np.float32))
    assert fuse(known, known).agreement is None


def test_what_only_some_found_scores_their_share_of_the_weights():
    found = fuse(A, detections(), detections(), weights=(2, 1, 1))
    np.testing.assert_array_equal(found.boxes, A.boxes)
    np.testing.assert_allclose(found.scores, A.scores / 2, rtol=1e-6)


def test_two_boxes_of_one_teacher_share_its_say():
    twice = detections((0, 0, 10, 10, 0, 0.8), (0, 1, 10, 11, 0, 0.6))
    np.testing.assert_allclose(fuse(twice, B).best, [(0.7 + 0.4) / 2], rtol=1e-6)
    assert fuse(twice, twice).best[0] <= 1


def test_other_classes_and_far_boxes_stay_apart():
    other_class, far = detections((0, 0, 10, 10, 1, 0.9)), detections((30, 0, 40, 10, 0, 0.9))
    assert fuse(A, other_class).class_ids.tolist() == [1, 0]
    assert len(fuse(A, far).boxes) == 2


def test_boxes_at_the_threshold_take_no_part():
    assert len(fuse(A, B, threshold=0.4).boxes) == 1
    np.testing.assert_allclose(fuse(A, B, threshold=0.4).best, [0.4], rtol=1e-6)
    assert len(fuse(A, B, threshold=0.8).boxes) == 0


def test_tiles_where_nobody_found_anything():
    found = fuse(detections(), Detections(np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32), saturated=True))
    assert found.boxes.shape == (0, 4) and found.saturated


def crowd(seed):
    rng = np.random.default_rng(seed)
    corner, extent = rng.integers(0, 30, (40, 2)), rng.integers(5, 20, (40, 2))
    scores = rng.random((40, 3)).round(1).astype(np.float32)
    return Detections(np.concatenate([corner, corner + extent], axis=1).astype(np.float32), scores)


def test_the_order_of_teachers_changes_no_bit():
    teachers = list(zip(map(crowd, range(3)), (1.0, 0.3, 2.0), strict=True))
    results = set()
    for order in itertools.permutations(teachers):
        found = fuse(*(one for one, _ in order), weights=[weight for _, weight in order])
        assert len(found.boxes) < 100 and (np.diff(found.best) <= 0).all()
        results.add((found.boxes.tobytes(), found.scores.tobytes()))
    assert len(results) == 1


def test_one_teacher_who_agrees_with_itself_is_unchanged():
    apart = detections((0, 0, 10, 10, 0, 0.8), (20, 0, 30, 10, 1, 0.6))
    found = fuse(apart, apart, weights=(3, 1))
    np.testing.assert_allclose(found.boxes, apart.boxes)
    np.testing.assert_allclose(found.scores, apart.scores, rtol=1e-6)


def test_a_tile_that_is_empty_stays_so_unless_another_could_not_be_read(tmp_path):
    box = detections((1, 1, 9, 9, 0, 0.9))
    ones, others = (
        [made_tile("a", (64 * i, 0, 64, 64), box, reason=reason) for i, reason in enumerate(reasons)]
        for reasons in ((EMPTY, EMPTY, None), (EMPTY, "cut", EMPTY))
    )
    write_tiles(tmp_path, ones)
    stores = [write_store(tmp_path, made, weights=name) for name, made in (("w1", ones), ("w2", others))]
    rows = fuse_shard(fuse_job(stores, [1, 1], 0.05, 0.5, tmp_path), 0).to_pylist()
    assert [row["status"] for row in rows] == ["empty", "rejected", "empty"]
    assert not any(row["boxes"] for row in rows)


def test_a_tile_rejected_by_one_is_rejected_with_its_reason(tmp_path):
    windows = [(0, 0, 64, 64), (64, 0, 64, 64), (128, 0, 64, 64)]
    good = [made_tile("s", window, A) for window in windows]
    bad = [good[0], made_tile("s", windows[1], reason="no such file", retryable=True), good[2]]
    worse = [good[0], made_tile("s", windows[1], reason="cut short"), good[2]]
    write_tiles(tmp_path, good)
    stores = [write_store(tmp_path, made, weights=name) for name, made in (("a", good), ("b", bad), ("c", worse))]
    rows = fuse_shard(fuse_job(stores, [1, 1, 1], 0.05, 0.5, tmp_path), 0).to_pylist()
    assert [row["status"] for row in rows] == ["labelled", "rejected", "labelled"]
    assert rows[1]["reason"] == "cut short; no such file" and rows[1]["boxes"] == [] and not rows[1]["retryable"]
    two = fuse_shard(fuse_job(stores[:2], [1, 1], 0.05, 0.5, tmp_path), 0).to_pylist()
    assert two[1]["retryable"]


@pytest.fixture
def stores(tmp_path):
    """Two stores of one tile."""
    tile = [made_tile("s", (0, 0, 64, 64), A, split="test")]
    return [made_store(tmp_path, tile, weights=name) for name in ("a", "b")]


def test_the_folder_depends_on_all_that_determines_the_result_and_on_no_order(tmp_path, stores):
    def folder(stores=stores, weights=(1, 2), threshold=0.05, iou=0.5):
        return fuse_job(stores, weights, threshold, iou, tmp_path).output

    assert folder() == folder(stores[::-1], (2, 1)) == folder(weights=(1.0, 2.0))
    assert folder().parent == tmp_path and folder().name.startswith("fused-")
    changed = [folder(weights=(2, 1)), folder(threshold=0.1), folder(iou=0.6), folder(stores[:1], (1,))]
    assert len({folder(), *changed}) == 5


def test_stores_that_do_not_fit_are_refused_with_the_difference(tmp_path, stores):
    tile = [made_tile("s", (0, 0, 64, 64), split="test")]
    write_tiles(tmp_path, tile, name="tiles-other")
    others = {
        "tiles: tiles-made and tiles-other": write_store(tmp_path, tile, weights="t", tiles="tiles-other"),
        r"splits: None and \('test',\)": write_store(tmp_path, tile, weights="s", splits=["test"]),
        r"classes: \['car', 'plane', 'ship'\] and \['ship', 'plane', 'car'\]": write_store(
            tmp_path, tile, weights="c", classes=["ship", "plane", "car"]
        ),
    }
    for difference, other in others.items():
        with pytest.raises(StoreError, match=difference):
            fuse_job([stores[0], other], [1, 1], 0.05, 0.5, tmp_path)


@pytest.mark.parametrize(
    ("weights", "problem"), [([1], "2 stores and 1 weights"), ([1, 0], "above 0"), ([1, float("nan")], "above 0")]
)
def test_weights_that_do_not_fit_are_refused(tmp_path, stores, weights, problem):
    with pytest.raises(StoreError, match=problem):
        fuse_job(stores, weights, 0.05, 0.5, tmp_path)
