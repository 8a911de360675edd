"""Evaluation by rotated IoU against pycocotools with the IoU of shapely's polygons, and when it is by hulls."""

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest
import shapely
import shapely.affinity
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from softlabel import rotated
from softlabel.evaluation.matching import TileResult
from softlabel.evaluation.metrics import evaluate
from softlabel.evaluation.quality import bootstrap_difference, label_quality
from softlabel.records import Detections, Truth

CLASSES = ("plane", "ship", "truck")


def boxes_of(rng, number):
    sides = rng.uniform([12, 5], [40, 15], (number, 2))
    return np.concatenate([rng.uniform(20, 80, (number, 2)), sides, rng.uniform(0, np.pi / 2, (number, 1))], axis=1)


def tile(rng, num_truth, num_noise, labelled=None):
    """Truth, of which some is ignored, detections near it and elsewhere; scores in steps, so there are ties."""
    truth, class_ids = boxes_of(rng, num_truth), rng.integers(0, 3, num_truth)
    near = np.repeat(truth, 2, axis=0) + rng.normal(0, [1.5, 1.5, 2, 1, 0.1], (2 * num_truth, 5))
    found = rotated.regularized(np.concatenate([near, boxes_of(rng, num_noise)]))
    best = np.concatenate([np.repeat(class_ids, 2), rng.integers(0, 3, num_noise)])
    order = np.argsort(-(scores := np.round(rng.uniform(0.05, 1, len(found)), 1)), kind="stable")
    found, vectors = found[order].astype(np.float32), np.full((len(found), 3), 0.001, np.float32)
    vectors[np.arange(len(found)), best[order]] = scores[order]
    truth = truth.astype(np.float32)
    return TileResult(
        Truth(rotated.hulls(truth), class_ids.astype(np.int32), rng.random(num_truth) < 0.2, truth),
        Detections(rotated.hulls(found), vectors, xywhr=found),
        labelled,
    )


def tiles_of(seed):
    rng = np.random.default_rng(seed)
    return [tile(rng, int(rng.integers(1, 9)), int(rng.integers(0, 9))) for _ in range(6)] + [
        tile(rng, 0, 4),
        tile(rng, 3, 0),
        tile(rng, 0, 0),
    ]


def polygon(box):
    x, y, w, h, r = box
    return shapely.affinity.rotate(shapely.box(x - w / 2, y - h / 2, x + w / 2, y + h / 2), r, use_radians=True)


class RotatedEval(COCOeval):
    """pycocotools, whose annotations bring a polygon of shapely each."""

    def computeIoU(self, image_id, category_id):
        truth = self._gts[image_id, category_id]
        found = sorted(self._dts[image_id, category_id], key=lambda one: -one["score"])
        if not truth and not found:
            return []
        ious = np.zeros((len(found), len(truth)))
        for i, one in enumerate(found):
            for j, other in enumerate(truth):
                shared = one["polygon"].intersection(other["polygon"]).area
                whole = one["polygon"].area + (0 if other["iscrowd"] else other["polygon"].area - shared)
                ious[i, j] = shared / whole
        return ious


def by_pycocotools(tiles):
    """(10, 101, K) precision."""
    truth, found = [], []
    for index, one in enumerate(tiles):
        for box, class_id, ignore in zip(one.truth.xywhr, one.truth.class_ids, one.truth.ignore, strict=True):
            truth.append({"image_id": index, "category_id": int(class_id), "polygon": polygon(box), "area": 1})
            truth[-1] |= {"id": len(truth), "iscrowd": int(ignore), "bbox": [0, 0, 1, 1]}
        detections = one.detections
        for box, class_id, score in zip(detections.xywhr, detections.class_ids, detections.best, strict=True):
            found.append({"image_id": index, "category_id": int(class_id), "polygon": polygon(box), "area": 1})
            found[-1] |= {"id": len(found), "iscrowd": 0, "bbox": [0, 0, 1, 1], "score": float(score)}
    sets = []
    with contextlib.redirect_stdout(io.StringIO()):
        for annotations in (truth, found):
            sets.append(COCO())
            sets[-1].dataset = {
                "images": [{"id": index} for index in range(len(tiles))],
                "categories": [{"id": index} for index in range(3)],
                "annotations": annotations,
            }
            sets[-1].createIndex()
        evaluator = RotatedEval(*sets, "bbox")
        evaluator.params.maxDets = [1000]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"][..., 0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_ap_equals_pycocotools_with_polygons(seed):
    tiles = tiles_of(seed)
    precision, metrics = by_pycocotools(tiles), evaluate(tiles, CLASSES)
    assert metrics.map50 == pytest.approx(precision[0][precision[0] > -1].mean(), abs=1e-6)
    assert metrics.map50_95 == pytest.approx(precision[precision > -1].mean(), abs=1e-6)
    by_hulls = evaluate([without_angles(one) for one in tiles], CLASSES)
    assert by_hulls.map50_95 != pytest.approx(metrics.map50_95, abs=1e-3)


def without_angles(one, *, truth=True, found=True):
    truth_of, detections = one.truth, one.detections
    return replace(
        one,
        truth=replace(truth_of, xywhr=None) if truth else truth_of,
        detections=replace(detections, xywhr=None) if found else detections,
    )


@pytest.mark.parametrize("upright", [{"truth": False}, {"found": False}])
def test_where_only_one_side_is_rotated_hulls_are_compared(upright):
    tiles = tiles_of(0)
    expected = evaluate([without_angles(one) for one in tiles], CLASSES)
    assert evaluate([without_angles(one, **upright) for one in tiles], CLASSES).to_dict() == expected.to_dict()


def test_a_tile_without_rotated_boxes_among_others_has_upright_ones():
    upright = TileResult(
        Truth(np.array([[10, 10, 50, 20]], np.float32), np.array([0], np.int32), np.array([False])),
        Detections(np.array([[10, 10, 50, 20]], np.float32), np.array([[0.95, 0, 0]], np.float32)),
        None,
    )
    found = evaluate([*tiles_of(1), upright], CLASSES)
    truth, detections = (replace(o, xywhr=rotated.upright(o.boxes)) for o in (upright.truth, upright.detections))
    also = TileResult(truth, detections, None)
    assert found.to_dict() == evaluate([*tiles_of(1), also], CLASSES).to_dict()


def test_quality_of_labels_is_by_polygons():
    rng = np.random.default_rng(3)
    truth = boxes_of(rng, 1)
    found = truth + np.array([1, 0, 2, 1, 0.05])
    one = TileResult(
        Truth(rotated.hulls(truth), np.array([1], np.int32), np.array([False]), truth.astype(np.float32)),
        Detections(rotated.hulls(found), np.array([[0, 0.9, 0]], np.float32), xywhr=found.astype(np.float32)),
        None,
    )
    a, b = polygon(truth[0]), polygon(found[0])
    (row, *_) = label_quality([one], CLASSES, [0.5])
    assert row["precision"] == row["recall"] == 1
    assert row["mean_iou"] == pytest.approx(a.intersection(b).area / a.union(b).area, abs=1e-5)


def test_the_difference_of_two_results_is_that_of_their_maps():
    one, other = tiles_of(4), tiles_of(4)
    other = [replace(t, detections=t.detections.at(np.arange(0, len(t.detections.boxes), 2))) for t in other]
    found = bootstrap_difference(one, other, CLASSES, samples=20, seed=0)
    assert found["map50"]["absolute"] == pytest.approx(
        evaluate(other, CLASSES).map50 - evaluate(one, CLASSES).map50, abs=1e-6
    )


def test_what_is_no_class_of_ours_is_ignored_where_it_lies():
    """A rotated box of unknown class takes the false alarms in it, of every class, and in its polygon only."""
    truth = np.array([[50, 50, 60, 10, np.pi / 4], [20, 80, 10, 10, 0.1]], np.float32)
    inside, in_hull = [45, 45, 6, 6, np.pi / 4], [70, 30, 6, 6, np.pi / 4]
    right = truth[1]

    def map50(*boxes):
        found = np.array([*boxes, right], np.float32)
        vectors = np.tile(np.array([0, 0.9, 0], np.float32), (len(found), 1))
        vectors[-1] = [0, 0.5, 0]
        ignored = Truth(rotated.hulls(truth), np.array([-1, 1], np.int32), np.array([True, False]), truth)
        tile = TileResult(ignored, Detections(rotated.hulls(found), vectors, xywhr=found), None)
        return evaluate([tile], CLASSES).map50

    assert map50(inside) == map50() == pytest.approx(1)
    assert map50(in_hull) < 0.6
