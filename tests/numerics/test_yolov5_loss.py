"""YOLOv5's assignment and loss against small cases worked out by hand, and against plain loops.

Grids are 8, 4 and 2 cells wide and high, as for an input of 64 px. By hand: BCE(logit 0, any target) = ln 2, and
BCE(logit x, target t) = ln(1 + e^x) - t x.
"""

import math

import pytest
import torch

from softlabel.detectors.yolov5_loss import AnchorLoss, assign

LN2 = math.log(2)
GRIDS = (8, 4, 2)
ONE_ANCHOR = torch.tensor([[2.0, 2.0]])
# Level 0 has one anchor of 2 x 2 cells; the others' anchors are too large for every box of these tests.
ANCHORS = torch.tensor([[[2.0, 2.0]], [[90.0, 90.0]], [[90.0, 90.0]]])
BALANCED_LN2 = (4.0 + 1.0 + 0.4) * LN2


def targets(*boxes, grid=8):
    """Rows (image, class, x, y, w, h) with the box in cells, as ultralytics gives them: in units of the image."""
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6)
    return torch.cat((rows[:, :2], rows[:, 2:] / grid), 1)


def cells_of(*boxes, anchors=ONE_ANCHOR, height=8, width=8):
    found = assign(targets(*boxes), anchors, height, width)
    return sorted(zip(found.anchor.tolist(), found.row.tolist(), found.column.tolist(), strict=True))


# --- assignment ---


def test_a_box_in_the_middle_of_a_cell_belongs_to_that_cell_alone():
    found = assign(targets((3, 1, 2.5, 4.5, 2, 2)), ONE_ANCHOR, 8, 8)
    assert (found.image.tolist(), found.target.tolist()) == ([3], [0])
    assert (found.row.tolist(), found.column.tolist()) == ([4], [2])
    torch.testing.assert_close(found.box, torch.tensor([[0.5, 0.5, 2.0, 2.0]]))


@pytest.mark.parametrize(
    ("x", "y", "columns_and_rows"),
    [
        (2.3, 4.5, [(2, 4), (1, 4)]),  # left of the middle: the left neighbour too
        (2.7, 4.5, [(2, 4), (3, 4)]),  # right of it: the right one
        (2.5, 4.2, [(2, 4), (2, 3)]),  # above
        (2.5, 4.9, [(2, 4), (2, 5)]),  # below
        (2.3, 4.9, [(2, 4), (1, 4), (2, 5)]),  # one across and one up or down, never the diagonal
        (0.3, 4.5, [(0, 4)]),  # there is no cell left of the first
        (7.7, 4.5, [(7, 4)]),  # nor right of the last
        (1.0, 4.5, [(1, 4), (1, 4)]),  # x > 1 fails at exactly 1; its distance to the end, 7, is whole: the right one,
        (3.0, 4.5, [(3, 4), (2, 4), (3, 4)]),  # which is trunc(3 + 0.5) = 3 again. On a border both neighbours count.
    ],
)
def test_a_box_also_belongs_to_its_nearest_neighbours(x, y, columns_and_rows):
    assert cells_of((0, 0, x, y, 2, 2)) == sorted((0, row, column) for column, row in columns_and_rows)


@pytest.mark.parametrize(
    ("w", "h", "matches"),
    [
        (7.99, 2, True),  # 7.99 / 2 = 3.995
        (8.0, 2, False),  # 4 itself is too much
        (2, 7.99, True),
        (2, 8.0, False),
        (0.51, 2, True),  # 2 / 0.51 = 3.92
        (0.5, 2, False),
        (7.99, 0.51, True),  # each side by itself
        (7.99, 0.5, False),
    ],
)
def test_a_box_needs_an_anchor_within_a_factor_of_four(w, h, matches):
    assert bool(cells_of((0, 0, 4.5, 4.5, w, h))) is matches


def test_a_box_goes_to_every_anchor_that_fits():
    anchors = torch.tensor([[0.4, 0.4], [2.0, 2.0], [7.0, 7.0]])
    assert cells_of((0, 0, 4.5, 4.5, 2, 2), anchors=anchors) == [(1, 4, 4), (2, 4, 4)]


def test_no_box_no_target():
    assert len(assign(torch.zeros(0, 6), ONE_ANCHOR, 8, 8).image) == 0


def test_assignment_agrees_with_plain_loops():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(200, 6, generator=generator)
    rows[:, 0], rows[:, 1] = (rows[:, 0] * 4).floor(), (rows[:, 1] * 3).floor()
    rows[:, 4:] = rows[:, 4:] ** 3
    anchors = torch.tensor([[1.0, 1.5], [2.0, 1.0], [3.0, 4.0]])
    height, width = 6, 10
    expected = []
    for image, class_id, *box in rows.tolist():
        x, y, w, h = box[0] * width, box[1] * height, box[2] * width, box[3] * height
        for a, (aw, ah) in enumerate(anchors.tolist()):
            if max(w / aw, aw / w, h / ah, ah / h) >= 4:
                continue
            places = {(int(x), int(y))}
            if x % 1 < 0.5 and x > 1:
                places.add((int(x) - 1, int(y)))
            if x % 1 > 0.5 and x < width - 1:
                places.add((int(x) + 1, int(y)))
            if y % 1 < 0.5 and y > 1:
                places.add((int(x), int(y) - 1))
            if y % 1 > 0.5 and y < height - 1:
                places.add((int(x), int(y) + 1))
            expected += [(int(image), a, row, column, int(class_id), x - column, y - row) for column, row in places]
    found = assign(rows, anchors, height, width)
    columns = (found.image, found.anchor, found.row, found.column, rows[found.target, 1].int())
    ours = list(zip(*(c.tolist() for c in columns), *found.box[:, :2].T.tolist(), strict=True))
    assert len(ours) == len(expected) > 300
    for mine, theirs in zip(sorted(ours), sorted(expected), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


# --- loss ---


def outputs(batch=1, classes=3):
    """Logits of zero: every predicted box is its anchor, in the middle of its cell."""
    return [torch.zeros(batch, 1, grid, grid, 5 + classes) for grid in GRIDS]


def losses(feats, rows, *, classes=3, imgsz=640, anchors=ANCHORS):
    criterion = AnchorLoss(anchors, classes, box=0.05, cls=0.5, imgsz=imgsz)
    batch = {"batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:]}
    total, items = criterion({"feats": feats}, batch)
    for name, one in zip(criterion.loss_names, total, strict=True):
        assert float(items[name]) * len(feats[0]) == pytest.approx(float(one))
    return {name.removesuffix("_loss"): float(value) for name, value in items.items()}


def test_one_box_that_is_found_exactly():
    found = losses(outputs(), targets((0, 1, 2.5, 4.5, 2, 2)))
    assert found["box"] == pytest.approx(0, abs=1e-6)
    assert found["obj"] == pytest.approx(BALANCED_LN2)
    assert found["cls"] == pytest.approx(0.5 * 3 / 80 * LN2)


def test_a_box_of_half_the_height():
    # Prediction 2 x 2, truth 2 x 1, same centre: IoU 1/2, no distance, and of the aspect ratios
    # v = 4/pi^2 (atan(2/1) - atan(2/2))^2, alpha = v / (v - IoU + 1).
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    ciou = 0.5 - v * v / (v - 0.5 + 1)
    assert losses(outputs(), targets((0, 1, 2.5, 4.5, 2, 1)))["box"] == pytest.approx(0.05 * (1 - ciou), rel=1e-5)


def test_classes_are_judged_one_by_one():
    feats = outputs()
    feats[0][0, 0, 4, 2, 5:] = torch.tensor([1.0, 2.0, -1.0])
    by_hand = (math.log(1 + math.e) + math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 3
    assert losses(feats, targets((0, 1, 2.5, 4.5, 2, 2)))["cls"] == pytest.approx(0.5 * 3 / 80 * by_hand, rel=1e-5)


def objectness_target(boxes, prepare=lambda feats: None):
    """What the cell (row 4, column 2) is asked for, read off the objectness loss with its logit at 2."""
    feats = outputs()
    prepare(feats)
    feats[0][0, 0, 4, 2, 4] = 2.0
    cell = losses(feats, boxes)["obj"] / 4.0 - 63 / 64 * LN2 - (1.0 + 0.4) / 4.0 * LN2
    return (math.log(1 + math.exp(2)) - cell * 64) / 2


def test_the_objectness_asked_for_is_the_ciou():
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    ciou = 0.5 - v * v / (v - 0.5 + 1)
    assert objectness_target(targets((0, 1, 2.5, 4.5, 2, 1))) == pytest.approx(ciou, abs=1e-4)
    assert objectness_target(targets()) == pytest.approx(0, abs=1e-4)


def test_a_negative_ciou_asks_for_no_objectness():
    def shrink(feats):  # to nothing: no overlap worth the name, and another shape
        feats[0][0, 0, 4, 2, 0:4] = torch.tensor([9.0, 9.0, -9.0, 9.0])

    box = targets((0, 1, 2.5, 4.5, 0.6, 7.9))
    feats = outputs()
    shrink(feats)
    assert losses(feats, box)["box"] > 0.05
    assert objectness_target(box, shrink) == pytest.approx(0, abs=1e-4)


def test_objectness_does_not_move_boxes():
    feats = [feature.requires_grad_() for feature in outputs()]
    rows = targets((0, 1, 2.5, 4.5, 2, 1))
    criterion = AnchorLoss(ANCHORS, 3, box=0.05, cls=0.5, imgsz=640)
    total, _ = criterion({"feats": feats}, {"batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:]})
    total[1].backward()
    assert feats[0].grad is not None
    assert feats[0].grad[..., 4].abs().sum() > 0
    assert feats[0].grad[..., :4].abs().sum() == 0


def test_of_two_targets_on_one_cell_the_last_wins():
    whole, half = (0, 1, 2.5, 4.5, 2, 2), (0, 1, 2.5, 4.5, 2, 1)
    assert objectness_target(targets(half, whole)) == pytest.approx(1.0, abs=1e-4)
    assert objectness_target(targets(whole, half)) < 0.6


def test_an_empty_image_has_objectness_alone_and_every_cell_learns():
    feats = [feature.requires_grad_() for feature in outputs()]
    assert losses([f.detach() for f in feats], targets()) == {"box": 0, "obj": pytest.approx(BALANCED_LN2), "cls": 0}
    criterion = AnchorLoss(ANCHORS, 3, box=0.05, cls=0.5, imgsz=640)
    total, _ = criterion(
        {"feats": feats}, {"batch_idx": torch.zeros(0), "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4)}
    )
    total.sum().backward()
    for feature in feats:
        assert torch.isfinite(feature.grad).all() and (feature.grad[..., 4] > 0).all()


def test_one_class_has_no_class_loss():
    assert losses(outputs(classes=1), targets((0, 0, 2.5, 4.5, 2, 2)), classes=1)["cls"] == 0


def test_gains_follow_classes_and_image_size():
    rows = targets((0, 1, 2.5, 4.5, 2, 1))
    at_640, at_320 = losses(outputs(), rows), losses(outputs(), rows, imgsz=320)
    assert at_320["obj"] == pytest.approx(at_640["obj"] / 4)
    assert (at_320["box"], at_320["cls"]) == pytest.approx((at_640["box"], at_640["cls"]))
    eighty = losses(outputs(classes=80), rows, classes=80)
    assert eighty["cls"] == pytest.approx(0.5 * LN2) and eighty["box"] == pytest.approx(at_640["box"])


def test_a_level_is_a_mean_over_the_batch():
    """Two images, one box each, one found exactly and one of half the height: the mean of both."""
    alone = losses(outputs(), targets((0, 1, 2.5, 4.5, 2, 1)))["box"]
    both = losses(outputs(batch=2), targets((0, 1, 2.5, 4.5, 2, 2), (1, 1, 2.5, 4.5, 2, 1)))
    assert both["box"] == pytest.approx(alone / 2, rel=1e-5)
    assert both["obj"] == pytest.approx(BALANCED_LN2)
