"""Rotated boxes: their geometry against shapely, their NMS against ultralytics', merging against brute force."""

import copy
import math

import numpy as np
import pytest
import shapely
import shapely.affinity
import torch
from ultralytics.cfg import get_cfg
from ultralytics.utils.nms import non_max_suppression

from softlabel import rotated
from softlabel.detectors.header import Header
from softlabel.detectors.rotated_nms import suppressed_rotated
from softlabel.detectors.tile_loss import mean_losses
from softlabel.detectors.weights import build_model, save_weights
from softlabel.detectors.yolo import YoloDetector
from softlabel.fusion import fuse_tile
from softlabel.records import Detections, Nms, Truth, detections_from_row, soft_labels_table
from softlabel.results.merge import merge


def some(seed, size=200, extent=300):
    rng = np.random.default_rng(seed)
    centres, sides = rng.uniform(0, extent, (size, 2)), rng.uniform(5, 60, (size, 2))
    return np.concatenate([centres, sides, rng.uniform(-4, 4, (size, 1))], axis=1)


def polygon(box):
    x, y, w, h, r = box
    upright = shapely.box(x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    return shapely.affinity.rotate(upright, r, use_radians=True)  # from x towards y, whichever way y goes


def test_corners_and_hulls_are_those_of_a_turned_rectangle():
    boxes = some(0)
    for box, ours, hull in zip(boxes, rotated.polygons(boxes), rotated.hulls(boxes), strict=True):
        assert shapely.hausdorff_distance(ours, polygon(box)) < 1e-9
        np.testing.assert_allclose(hull, polygon(box).bounds)
        assert not shapely.is_ccw(ours.exterior)  # y goes down here: on a map it is


@pytest.mark.parametrize("change", ["regularized", "aligned", "around"])
def test_another_form_is_the_same_rectangle(change):
    boxes = some(1)
    angles = np.random.default_rng(2).uniform(-10, 10, len(boxes))
    match change:
        case "regularized":
            others = rotated.regularized(boxes)
            assert (others[:, 4] >= 0).all() and (others[:, 4] < math.pi / 2).all()
        case "aligned":
            others = rotated.aligned(boxes, angles)
            assert np.abs(others[:, 4] - angles).max() <= math.pi / 4 + 1e-9
        case "around":
            others = np.stack([rotated.around(corners) for corners in rotated.corners(boxes)])
    for one, other in zip(rotated.polygons(boxes), rotated.polygons(others), strict=True):
        assert shapely.hausdorff_distance(one, other) < (1e-2 if change == "around" else 1e-9)


def test_upright_boxes_are_rotated_by_nothing_and_come_back():
    boxes = np.random.default_rng(3).uniform(0, 50, (20, 2))
    boxes = np.concatenate([boxes, boxes + 7], axis=1)
    np.testing.assert_allclose(rotated.hulls(rotated.upright(boxes)), boxes)
    np.testing.assert_allclose(rotated.unturned(rotated.upright(boxes)), boxes)


@pytest.mark.parametrize("max_det", [30, 1000])
@pytest.mark.parametrize("size", [10, 1500])
def test_nms_keeps_what_ultralytics_keeps(size, max_det):
    rng = np.random.default_rng(size)
    boxes = some(size, size)
    decoded = torch.from_numpy(np.concatenate([boxes[:, :4].T, rng.random((3, size)), boxes[:, 4:].T])).float()
    ours = suppressed_rotated(decoded, 3, Nms(0.3, 0.4, max_det))
    theirs = non_max_suppression(decoded[None], 0.3, 0.4, max_det=10**6, nc=3, rotated=True)[0]
    assert len(ours) == min(len(theirs), max_det + 1)
    theirs = theirs[: len(ours)]
    np.testing.assert_allclose(rotated.unturned(theirs[:, :4].numpy()), ours[:, :4].numpy(), atol=1e-3)
    assert torch.equal(ours[:, 4:7].amax(1), theirs[:, 4]) and torch.equal(ours[:, 7], theirs[:, 6])


@pytest.mark.parametrize("threshold", [0.35, 0.6, 0.9])
def test_filtering_at_a_threshold_equals_labelling_at_it(threshold):
    boxes = some(7, 900)
    scores = np.random.default_rng(7).random((3, 900))
    decoded = torch.from_numpy(np.concatenate([boxes[:, :4].T, scores, boxes[:, 4:].T])).float()
    low, high = (suppressed_rotated(decoded, 3, Nms(floor, 0.3, 2000)) for floor in (0.01, threshold))
    above = low[low[:, 4:7].amax(1) > threshold]
    assert torch.equal(above[:, :-1], high[:, :-1]) and 0 < len(high) < len(low)


def brute_nms(boxes, scores, iou):
    polygons = [polygon(box) for box in boxes]
    kept = []
    for i in np.argsort(-scores.max(1), kind="stable"):
        better = [k for k in kept if scores[k].argmax() == scores[i].argmax()]
        shared = [polygons[i].intersection(polygons[k]).area for k in better]
        if all(s / (polygons[i].area + polygons[k].area - s) <= iou for s, k in zip(shared, better, strict=True)):
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(3))
def test_merging_by_nms_is_greedy_by_iou_of_polygons(seed):
    boxes = rotated.regularized(some(seed, 150, 120))
    scores = np.random.default_rng(seed).random((150, 2)).astype(np.float32)
    edge = np.zeros(150, bool)
    found = merge(rotated.hulls(boxes), scores, edge, boxes, method="nms", iou=0.3)
    kept = brute_nms(boxes, scores, 0.3)
    np.testing.assert_array_equal(found.xywhr, boxes[kept])
    np.testing.assert_allclose(found.boxes, rotated.hulls(boxes[kept]))
    assert found.members.sum() == 150 > len(kept)
    order = np.random.default_rng(9).permutation(150)
    again = merge(rotated.hulls(boxes)[order], scores[order], edge, boxes[order], method="nms", iou=0.3)
    assert again.xywhr.tobytes() == found.xywhr.tobytes()


@pytest.mark.parametrize("angle", [0.0, 0.02, math.pi / 4, math.pi / 2 - 0.02])
def test_the_mean_of_boxes_around_one_is_near_it_whatever_way_they_are_written(angle):
    """Angles on either side of a quarter turn are next to each other, with width and height changed."""
    rng = np.random.default_rng(0)
    true = np.array([100.0, 80.0, 40.0, 12.0, angle])
    boxes = rotated.regularized(true + rng.normal(0, [0.3, 0.3, 0.3, 0.3, 0.03], (40, 5)))
    scores = rng.uniform(0.5, 1, (40, 1)).astype(np.float32)
    found = merge(rotated.hulls(boxes), scores, np.zeros(40, bool), boxes, method="wbf", iou=0.4)
    assert found.members.tolist() == [40]
    assert polygon(found.xywhr[0]).intersection(polygon(true)).area > 0.97 * 40 * 12
    upright = Detections(np.array([[80, 74, 120, 86]], np.float32), np.ones((1, 1), np.float32))
    tile = Detections(rotated.hulls(boxes).astype(np.float32), scores, xywhr=boxes.astype(np.float32))
    fused = fuse_tile([tile, tile], [1, 1], 0.0, 0.4)
    assert polygon(fused.xywhr[0]).intersection(polygon(true)).area > 0.97 * 40 * 12
    if angle < 0.1:
        both = fuse_tile([tile, upright], [1, 1], 0.0, 0.3)
        assert len(both.boxes) == 1 and abs((both.xywhr[0, 4] + 0.5) % (math.pi / 2) - 0.5) < 0.05


def test_a_row_of_a_store_keeps_them():
    boxes = rotated.regularized(some(4, 3)).astype(np.float32)
    hulls = rotated.hulls(boxes)
    found = [
        Detections(hulls, np.eye(3, dtype=np.float32), xywhr=boxes),
        Detections(hulls[:0], np.zeros((0, 3), np.float32), xywhr=boxes[:0]),
    ]
    table = soft_labels_table(3, ["a", "b"], found, [None] * 2, [None] * 2, [False] * 2)
    for row, one in zip(table.to_pylist(), found, strict=True):
        read = detections_from_row(row)
        np.testing.assert_array_equal(read.xywhr, one.xywhr)
        np.testing.assert_array_equal(read.above(0.5).xywhr, one.xywhr)


def test_truth_drawn_rotated_comes_with_the_upright_boxes_among_it():
    box = {"class_id": 1, "visible": 1.0, "ignore": False}
    turned = [5, 5, 4, 2, 0.5]
    truth = Truth.from_row([{**box, "box": [3, 3, 7, 7], "xywhr": turned}, {**box, "box": [0, 2, 4, 8], "xywhr": None}])
    np.testing.assert_allclose(truth.xywhr, [turned, [2, 5, 4, 6, 0]])
    assert truth.xywhr.dtype == np.float32
    np.testing.assert_allclose(truth.at(np.array([1])).xywhr, [[2, 5, 4, 6, 0]])
    upright = [{**box, "box": [0, 2, 4, 8], "xywhr": None}, {**box, "box": [0, 2, 4, 8]}]  # format 4 has no such field
    assert Truth.from_row(upright).xywhr is Truth.from_row(None).xywhr is None


@pytest.mark.parametrize("name", ["yolo11n-obb", "yolo26n-obb"])
def test_losses_of_tiles_add_up_to_the_loss_of_the_batch(name):
    torch.manual_seed(0)
    model = build_model(f"{name}.yaml", 3)
    model.args = get_cfg(overrides={"imgsz": 96, "angle": 2.0})
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (96, 96, 3), np.uint8) for _ in range(2)]
    boxes = np.array([[40, 40, 50, 20, 0.6], [60, 30, 24, 30, 1.2], [30, 70, 40, 12, 0.1]], np.float32)
    class_ids, ignored = np.array([1, 0, 2], np.int32), np.array([[48, 48, 30, 30, 0.3]], np.float32)
    drawn = [(boxes[:1], class_ids[:1]), (boxes[1:], class_ids[1:])]
    truths = [
        Truth(
            rotated.hulls(np.concatenate([b, ignored])),
            np.append(k, [1]).astype(np.int32),
            np.append(np.zeros(len(b), bool), [True]),
            np.concatenate([b, ignored]),
        )
        for b, k in drawn
    ]
    reference = copy.deepcopy(model).eval().fuse(verbose=False)
    detector = YoloDetector(model, 96, Nms(), torch.device("cpu"))
    assert detector.loss_names() == ["box", "cls", "l1" if name == "yolo26n-obb" else "dfl", "angle"]
    ours = mean_losses(detector.loss_names(), detector.losses(images, truths))
    scaled = boxes / np.array([96, 96, 96, 96, 1], np.float32)
    batch = {
        "img": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255,
        "batch_idx": torch.tensor([0.0, 1, 1]),
        "cls": torch.tensor([[1.0], [0], [2]]),
        "bboxes": torch.from_numpy(scaled),
    }
    with torch.inference_mode():
        raw = reference(batch["img"])[1]
        criterion = reference.init_criterion()
        _, items = getattr(criterion, "one2many", criterion).loss(raw.get("one2many", raw), batch)
    theirs = {key.removesuffix("_loss"): float(value) for key, value in items.items()}
    assert ours == pytest.approx(theirs, rel=1e-4) and all(value > 0 for value in ours.values())


def test_the_loss_of_angles_has_the_gain_it_was_trained_with(tmp_path):
    torch.manual_seed(0)
    model = build_model("yolo11n-obb.yaml", 3)
    image, box = np.full((96, 96, 3), 100, np.uint8), np.array([[40, 40, 50, 20, 0.6]], np.float32)
    truth = Truth(rotated.hulls(box), np.array([1], np.int32), np.array([False]), box)
    found = {}
    for gain in (1.0, 3.0):
        save_weights(tmp_path / f"{gain}.safetensors", model, Header(model.yaml, tuple("abc"), 96, {"angle": gain}))
        detector = YoloDetector.from_weights(tmp_path / f"{gain}.safetensors", Nms())
        found[gain] = mean_losses(detector.loss_names(), detector.losses([image], [truth]))
    assert found[3.0]["angle"] == pytest.approx(3 * found[1.0]["angle"]) and found[1.0]["angle"] > 0
    assert found[3.0]["box"] == pytest.approx(found[1.0]["box"])
