"""matching.py and metrics.py against pycocotools, and its F1 against a matcher written for this test."""

import contextlib
import io
import json
from math import isnan, nan

import numpy as np
import pytest
from judged_tiles import CLASSES, make_tile
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from softlabel.evaluation.matching import TileResult
from softlabel.evaluation.metrics import evaluate
from softlabel.records import Detections, Truth

pytestmark = pytest.mark.filterwarnings("error")
SIZE = 100


def random_boxes(rng, number):
    corner = rng.uniform(0, SIZE - 30, (number, 2))
    return np.concatenate([corner, corner + rng.uniform(5, 30, (number, 2))], axis=1)


def random_tile(rng, *, num_truth, num_noise, num_classes=3, labelled=None):
    """Truth, detections near it (several for some), noise; scores in steps of 0.05, so there are ties."""
    boxes = random_boxes(rng, num_truth)
    class_ids = rng.integers(0, num_classes, num_truth)
    ignore = rng.random(num_truth) < 0.2
    source = rng.integers(0, num_truth, 2 * num_truth) if num_truth else np.zeros(0, int)
    near = boxes[source] + rng.normal(0, 2, (len(source), 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    found = np.concatenate([near, random_boxes(rng, num_noise)])
    wrong = rng.integers(0, num_classes, len(found))
    right = np.concatenate([class_ids[source], wrong[len(source) :]])
    found_ids = np.where(rng.random(len(found)) < 0.15, wrong, right)
    scores = np.round(rng.uniform(0.05, 1, len(found)) * 20) / 20
    order = np.argsort(-scores, kind="stable")
    return make_tile(
        list(zip(boxes, class_ids, ignore, strict=True)),
        list(zip(found[order], found_ids[order], scores[order], strict=True)),
        labelled=labelled,
        num_classes=num_classes,
    )


def random_tiles(seed, number=6):
    rng = np.random.default_rng(seed)
    tiles = [random_tile(rng, num_truth=rng.integers(1, 9), num_noise=rng.integers(0, 12)) for _ in range(number)]
    tiles.append(random_tile(rng, num_truth=0, num_noise=4))
    tiles.append(random_tile(rng, num_truth=3, num_noise=0))
    tiles.append(make_tile([], []))
    return tiles


def by_pycocotools(tiles, num_classes):
    """(10, 101, K) precision; the tiles must be labelled for all classes."""
    truth = [
        {
            "id": 0,
            "image_id": index,
            "category_id": int(class_id),
            "bbox": [float(v) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
            "iscrowd": int(ignore),
        }
        for index, tile in enumerate(tiles)
        for box, class_id, ignore in zip(
            tile.truth.boxes.astype(float), tile.truth.class_ids, tile.truth.ignore, strict=True
        )
    ]
    for number, row in enumerate(truth):
        row.update(id=number + 1, area=row["bbox"][2] * row["bbox"][3])
    results = [
        [index, *box[:2], *(box[2:] - box[:2]), score, class_id]
        for index, tile in enumerate(tiles)
        for box, score, class_id in zip(
            tile.detections.boxes.astype(float), tile.detections.best, tile.detections.class_ids, strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {
            "info": {},
            "images": [{"id": index} for index in range(len(tiles))],
            "categories": [{"id": index} for index in range(num_classes)],
            "annotations": truth,
        }
        dataset.createIndex()
        evaluator = COCOeval(dataset, dataset.loadRes(np.array(results)), "bbox")
        evaluator.params.maxDets = [1000]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"][..., 0, 0]


def assert_equals_pycocotools(tiles, classes=CLASSES):
    precision = by_pycocotools(tiles, len(classes))
    metrics = evaluate(tiles, classes)
    assert metrics.map50 == pytest.approx(precision[0][precision[0] > -1].mean(), abs=1e-6)
    assert metrics.map50_95 == pytest.approx(precision[precision > -1].mean(), abs=1e-6)
    for index, name in enumerate(classes):
        row = metrics.per_class[name]
        if (precision[..., index] == -1).all():
            assert isnan(row["ap50"])
            continue
        assert row["ap50"] == pytest.approx(precision[0, :, index].mean(), abs=1e-6)
        assert row["ap50_95"] == pytest.approx(precision[..., index].mean(), abs=1e-6)
        assert metrics.curves[name]["precision"] == pytest.approx(precision[0, :, index], abs=1e-6)


@pytest.mark.parametrize("seed", range(25))
def test_ap_equals_pycocotools(seed):
    assert_equals_pycocotools(random_tiles(seed))


def test_ap_equals_pycocotools_with_a_class_that_is_only_ignored():
    tiles = random_tiles(1)
    tiles.append(make_tile([((10, 10, 20, 20), 3, True)], [((10, 10, 20, 20), 3, 0.9)], num_classes=4))
    wide = [
        TileResult(t.truth, Detections(t.detections.boxes, np.pad(t.detections.scores, ((0, 0), (0, 1)))), None)
        for t in tiles[:-1]
    ]
    assert_equals_pycocotools([*wide, tiles[-1]], (*CLASSES, "bus"))


def test_only_the_best_1000_of_a_tile_and_class_count_as_in_pycocotools():
    rng = np.random.default_rng(0)
    saturated = random_tile(rng, num_truth=30, num_noise=1500, num_classes=1)
    assert len(saturated.detections.boxes) > 1500
    assert_equals_pycocotools([saturated, random_tile(rng, num_truth=4, num_noise=3, num_classes=1)], ("plane",))
    noise = [((0, 0, 9, 9), 0, 0.9)] * 1000
    late = make_tile([((50, 50, 60, 60), 0, False)], [*noise, ((50, 50, 60, 60), 0, 0.5)], num_classes=1)
    assert evaluate([late], ("plane",)).recall == 0
    in_time = make_tile([((50, 50, 60, 60), 0, False)], [*noise[1:], ((50, 50, 60, 60), 0, 0.5)], num_classes=1)
    assert evaluate([in_time], ("plane",)).recall == 1


def test_three_detections_by_hand():
    here, there, nowhere = (10, 10, 20, 20), (50, 50, 70, 60), (80, 0, 90, 5)
    tile = make_tile(
        [(here, 0, False), (there, 0, False)],
        [(here, 0, 0.9), (nowhere, 0, 0.8), (there, 0, 0.7)],
        num_classes=1,
    )
    metrics = evaluate([tile], ("plane",))
    # Recall 0, 0.01, ... 0.5 at precision 1, the other 50 points at 2 of 3.
    assert (metrics.map50, metrics.map50_95) == pytest.approx(((51 + 50 * 2 / 3) / 101,) * 2)
    assert (metrics.precision, metrics.recall, metrics.f1) == pytest.approx((2 / 3, 1, 4 / 5))
    assert metrics.f1_conf == pytest.approx(0.7, abs=1e-6)
    assert len(tile.detections.above(metrics.f1_conf).boxes) == 3
    assert metrics.per_class["plane"]["truth"] == 2
    assert metrics.per_class["plane"]["detections"] == 3


def overlap(box, truth_box, ignore):
    """IoU; of ignored truth the share of the detection that it covers, as COCO has it for crowds."""
    width = min(box[2], truth_box[2]) - max(box[0], truth_box[0])
    height = min(box[3], truth_box[3]) - max(box[1], truth_box[1])
    intersection = max(width, 0) * max(height, 0)
    area, truth_area = ((b[2] - b[0]) * (b[3] - b[1]) for b in (box, truth_box))
    return intersection / (area if ignore else area + truth_area - intersection)


def count_by_hand(tile, class_id, threshold):
    """(true positives, kept, truth) of one tile and class, of detections above a threshold, at IoU 0.5."""
    truth = [
        (box, bool(ignore), index)
        for index, (box, c, ignore) in enumerate(
            zip(tile.truth.boxes.tolist(), tile.truth.class_ids, tile.truth.ignore, strict=True)
        )
        if c == class_id
    ]
    kept_tile = tile.detections.above(threshold)
    boxes = [b for b, c in zip(kept_tile.boxes.tolist(), kept_tile.class_ids, strict=True) if c == class_id]
    taken, found, kept = set(), 0, 0
    for box in boxes:  # by descending score
        free = [(overlap(box, b, False), index) for b, ignore, index in truth if not ignore and index not in taken]
        best = max(free, default=(0, -1))
        if best[0] >= 0.5:
            taken.add(best[1])
            found, kept = found + 1, kept + 1
        elif not any(overlap(box, b, True) >= 0.5 for b, ignore, _ in truth if ignore):
            kept += 1
    return found, kept, sum(not ignore for _, ignore, _ in truth)


def macro_by_hand(tiles, threshold, num_classes=3):
    """Macro precision, recall and F1 over the classes with truth."""
    rows = []
    for class_id in range(num_classes):
        found, kept, truth = np.sum([count_by_hand(tile, class_id, threshold) for tile in tiles], axis=0)
        if truth:
            rows.append((found / kept if kept else 0, found / truth, 2 * found / (kept + truth)))
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("seed", range(8))
def test_best_f1_equals_trying_every_threshold(seed):
    tiles = random_tiles(seed, number=4)
    metrics = evaluate(tiles, CLASSES)
    every = np.unique(np.concatenate([[0], *(tile.detections.best for tile in tiles)]).astype(np.float32))
    best = max(macro_by_hand(tiles, threshold)[2] for threshold in every)
    assert metrics.f1 == pytest.approx(best)
    at_best = macro_by_hand(tiles, metrics.f1_conf)
    assert (metrics.precision, metrics.recall, metrics.f1) == pytest.approx(tuple(at_best))
    curve = metrics.curves["all"]
    for index in (0, 149, 300, 333, 550, 777):  # 300 and 550 are scores: strictly above leaves them out
        expected = macro_by_hand(tiles, curve["confidence"][index])
        assert curve["f1"][index] == pytest.approx(expected[2])
        assert curve["precision_at"][index] == pytest.approx(expected[0])
        assert curve["recall_at"][index] == pytest.approx(expected[1])


def test_macro_f1_is_the_mean_of_f1_and_precision_counts_a_silent_class_as_zero():
    box = (10, 10, 20, 20)
    tile = make_tile([(box, 0, False), (box, 1, False)], [(box, 0, 0.9)])
    metrics = evaluate([tile], CLASSES)
    assert (metrics.precision, metrics.recall, metrics.f1) == (0.5, 0.5, 0.5)
    assert metrics.per_class["ship"]["precision"] == 0
    assert isnan(metrics.per_class["truck"]["f1"])
    assert set(metrics.curves) == {"all", "plane", "ship"}
    assert np.isnan(metrics.curves["plane"]["precision_at"][950])
    assert metrics.curves["plane"]["precision_at"][850] == 1
    assert np.isnan(metrics.curves["ship"]["precision_at"]).all()


@pytest.mark.parametrize(
    ("tiles", "value"),
    [
        pytest.param([], nan, id="no tiles"),
        pytest.param([make_tile([], [])], nan, id="an empty tile"),
        pytest.param([make_tile([], [((0, 0, 9, 9), 0, 0.9)])], nan, id="no truth"),
        pytest.param([make_tile([((0, 0, 9, 9), 0, True)], [((0, 0, 9, 9), 0, 0.9)])], nan, id="ignored truth only"),
        pytest.param([make_tile([((0, 0, 9, 9), 0, False)], [])], 0, id="no detections"),
        pytest.param([make_tile([((0, 0, 9, 9), 0, False)], [((50, 50, 60, 60), 0, 0.9)])], 0, id="no hit"),
        pytest.param([make_tile([((0, 0, 9, 9), 0, False)], [((0, 0, 9, 9), 1, 0.9)])], 0, id="wrong class"),
    ],
)
def test_nothing_to_judge_is_nan_and_nothing_found_is_zero(tiles, value):
    metrics = evaluate(tiles, CLASSES)
    for name in ("map50", "map50_95", "precision", "recall", "f1", "f1_conf"):
        assert getattr(metrics, name) == pytest.approx(value, nan_ok=True), name
    summary = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert summary["map50"] == (None if isnan(value) else value)
    assert "curves" not in summary
    assert "all" in metrics.curves


def test_empty_class_vectors_of_any_width_are_taken():
    tile = make_tile([((0, 0, 9, 9), 0, False)], [])
    bare = TileResult(tile.truth, Detections(np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32)), None)
    assert evaluate([bare], CLASSES).map50 == 0


def test_ignored_truth_neither_rewards_nor_punishes():
    here, there = (10, 10, 20, 20), (50, 50, 70, 60)
    found_both = [(here, 0, 0.9), (there, 0, 0.95), (there, 0, 0.8)]
    with_ignored = evaluate([make_tile([(here, 0, False), (there, 0, True)], found_both)], CLASSES)
    missed = evaluate([make_tile([(here, 0, False), (there, 0, True)], found_both[:1])], CLASSES)
    assert with_ignored.to_dict() == {**missed.to_dict(), "per_class": with_ignored.to_dict()["per_class"]}
    assert (with_ignored.map50, with_ignored.f1) == pytest.approx((1, 1))
    counted = evaluate([make_tile([(here, 0, False)], found_both)], CLASSES)
    assert counted.map50 == pytest.approx(0.5)


def test_classes_a_tile_was_not_labelled_for_do_not_count():
    here = (10, 10, 20, 20)
    ships = make_tile([(here, 1, False)], [(here, 1, 0.5)])
    planes_everywhere = [(here, 1, 0.5), *[((50, 50, 60, 60), 0, 0.9)] * 3]
    judged_alone = evaluate([ships, make_tile([(here, 0, False)], [(here, 0, 0.8)])], CLASSES)
    for labelled in ((1,), (1, 2)):
        partly = make_tile([(here, 1, False)], planes_everywhere, labelled=labelled)
        metrics = evaluate([partly, make_tile([(here, 0, False)], [(here, 0, 0.8)])], CLASSES)
        assert metrics.to_dict() == judged_alone.to_dict()
    fully = make_tile([(here, 1, False)], planes_everywhere, labelled=(0, 1, 2))
    assert evaluate([fully, make_tile([(here, 0, False)], [(here, 0, 0.8)])], CLASSES).map50 < judged_alone.map50
    blind = make_tile([(here, 1, False)], planes_everywhere, labelled=())
    assert isnan(evaluate([blind], CLASSES).map50)


def test_the_best_class_alone_counts():
    box = np.array([[10, 10, 20, 20]], np.float32)
    truth = Truth(box, np.array([1], np.int32), np.array([False]))
    second = TileResult(truth, Detections(box, np.array([[0.9, 0.8, 0.1]], np.float32)), None)
    assert evaluate([second], CLASSES).map50 == 0
    tied = TileResult(truth, Detections(box, np.array([[0.1, 0.8, 0.8]], np.float32)), None)
    assert evaluate([tied], CLASSES).map50 == pytest.approx(1)


def test_damage_lowers_the_score():
    tiles = [random_tile(np.random.default_rng(seed), num_truth=6, num_noise=3) for seed in range(8)]
    scores = [evaluate(tiles, CLASSES)]
    for shift in (2, 6):
        moved = [
            TileResult(t.truth, Detections(t.detections.boxes + np.float32(shift), t.detections.scores), None)
            for t in tiles
        ]
        scores.append(evaluate(moved, CLASSES))
    assert scores[0].map50_95 > scores[1].map50_95 > scores[2].map50_95
    assert scores[0].map50 > scores[2].map50
    assert scores[0].f1 > scores[2].f1
    rolled = [
        TileResult(t.truth, Detections(t.detections.boxes, np.roll(t.detections.scores, 1, axis=1)), None)
        for t in tiles
    ]
    assert evaluate(rolled, CLASSES).map50 < scores[0].map50 / 2


def test_tile_order_does_not_matter_without_ties():
    rng = np.random.default_rng(3)
    tiles = [random_tile(rng, num_truth=5, num_noise=5) for _ in range(5)]
    tiles = [
        TileResult(t.truth, Detections(t.detections.boxes, rng.random(t.detections.scores.shape, np.float32)), None)
        for t in tiles
    ]
    assert evaluate(tiles, CLASSES).to_dict() == evaluate(tiles[::-1], CLASSES).to_dict()


def test_an_object_of_unknown_class_is_no_false_positive_of_any():
    """Eight objects found: with two of their truth rows refused, mAP50 fell to 0.75 where they counted as nothing."""
    boxes = [(20 * i, 0, 20 * i + 10, 10) for i in range(8)]
    found = [(box, i % 2, 0.99 - 0.1 * i) for i, box in enumerate(boxes)]
    drawn = [(box, i % 2, False) for i, box in enumerate(boxes)]
    whole = evaluate([make_tile(drawn, found)], CLASSES)
    refused = [(box, -1, True) if i < 2 else (box, k, ignore) for i, (box, k, ignore) in enumerate(drawn)]
    left = evaluate([make_tile(refused, found)], CLASSES)
    gone = evaluate([make_tile(drawn[2:], found)], CLASSES)
    assert whole.map50 == left.map50 == pytest.approx(1) and gone.map50 < 0.9
    assert (left.precision, left.recall) == (whole.precision, whole.recall)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (make_tile([], [((0, 0, 9, 9), 1, 0.9)], num_classes=2), r"\[2\] entries, there are 3 classes"),
        (make_tile([((0, 0, 9, 9), 3, False)], []), r"3\.\.3, there are 3 classes"),
        (make_tile([((0, 0, 9, 9), -1, False)], []), r"-1\.\.-1, there are 3 classes"),
    ],
)
def test_other_classes_are_refused(tile, message):
    with pytest.raises(ValueError, match=message):
        evaluate([tile], CLASSES)


def test_nothing_is_printed(capfd):
    evaluate(random_tiles(0), CLASSES)
    assert capfd.readouterr() == ("", "")
