"""Softened losses: equal to the stock ones where nothing is soft, to plain loops and cases worked out by hand else."""

import math
import multiprocessing
import queue

import numpy as np
import pytest
import torch
from soft_batches import ANCHORS, NUM_CLASSES, NUM_IMAGES, SIZE, batch_of, losses, made, of_rank
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from softlabel import rotated
from softlabel.config import Soft
from softlabel.detectors.background import far_weight, kept_in_regions
from softlabel.detectors.smoothing import OnlineSmoothing
from softlabel.detectors.soft_loss import soften
from softlabel.detectors.weights import finds_rotated
from softlabel.detectors.yolov5_loss import AnchorLoss, assign

MODELS = ("yolov8n.yaml", "yolov10n.yaml", "yolo26n.yaml", "yolo11n-obb.yaml", "yolo26n-obb.yaml")


# --- the neutral setting ---


@pytest.mark.parametrize("objects", [9, 0])
@pytest.mark.parametrize("name", [*MODELS, ANCHORS])
def test_with_one_hot_vectors_and_weights_of_1_it_is_the_stock_loss(name, objects):
    model = made(name)
    stock = losses(model, batch_of(name, objects=objects))
    neutral = losses(made(name), batch_of(name, objects=objects, regions=4), Soft())
    for ours, theirs in zip(neutral, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*MODELS, ANCHORS])
@pytest.mark.parametrize("part", ["vectors", "weights", "box_weights", "region_keeps"])
def test_each_part_changes_the_loss(name, part):
    batch = batch_of(name, regions=4)
    stock = losses(made(name), batch)
    changed = losses(made(name), {**batch, part: batch[part] * 0.5}, Soft())
    assert not torch.allclose(changed[1], stock[1], rtol=1e-3)


# --- against plain loops ---


class Seen:
    """What a stock criterion's assigner was given and said, for every head."""

    def __init__(self, criterion):
        self.calls = []
        self.heads = [criterion.one2many, criterion.one2one] if hasattr(criterion, "one2many") else [criterion]
        for head in self.heads:
            head.assigner.register_forward_hook(lambda _, given, said: self.calls.append((given, said)))


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml", "yolo11n-obb.yaml"])
def test_the_class_loss_is_that_of_plain_loops(name):
    batch = batch_of(name, regions=5)
    generator = torch.Generator().manual_seed(1)
    batch["vectors"] = torch.rand(9, NUM_CLASSES, generator=generator)
    batch["weights"] = torch.rand(9, generator=generator)
    batch["box_weights"] = torch.rand(9, generator=generator)  # of no class loss
    batch["region_keeps"] = torch.rand(5, NUM_CLASSES, generator=generator).round(decimals=1)
    if finds_rotated(name):  # v8OBBLoss leaves out what is below 2 px
        batch["bboxes"][2, 3] = 1 / SIZE
    model = made(name)
    model.criterion = model.init_criterion()
    seen = Seen(model.criterion)
    preds = model(batch["img"])
    model.criterion(preds, batch)  # the stock loss: its assignment is the same
    model.criterion = model.init_criterion()
    soften(model.criterion, Soft(background_far=0.25), None)
    heads = [model.criterion.one2many, model.criterion.one2one] if hasattr(model.criterion, "one2many") else None
    raw = [preds["one2many"], preds["one2one"]] if heads else [preds]
    for head, outputs, (given, said) in zip(heads or [model.criterion], raw, seen.calls, strict=True):
        loss, _ = head.loss(outputs, batch)
        expected = class_loss_by_loops(outputs, batch, given, said, least=16.0)
        assert float(loss[1].detach()) / NUM_IMAGES == pytest.approx(expected * model.args.cls, rel=1e-4)


def class_loss_by_loops(outputs, batch, given, said, least):
    _, predicted, points, _, boxes, mask = given
    _, _, aligned, is_object, index = said
    logits = outputs["scores"].permute(0, 2, 1).detach().double()
    total = 0.0
    big = torch.ones(len(batch["cls"]), dtype=torch.bool)
    if batch["bboxes"].shape[1] == 5:
        big = (batch["bboxes"][:, 2:4] * SIZE >= 2).all(1)
    for image in range(NUM_IMAGES):
        mine = (batch["batch_idx"] == image) & big
        vectors, weights = batch["vectors"][mine], batch["weights"][mine]
        labelled = boxes[image][mask[image, :, 0] > 0]
        for place, point in enumerate(points.tolist()):
            target, factor = torch.zeros(NUM_CLASSES).double(), torch.ones(NUM_CLASSES)
            if is_object[image, place]:
                which = index[image, place].long()
                target = (vectors[which] * aligned[image, place].sum()).double()
                factor = weights[which].expand(NUM_CLASSES)
            else:
                for region, box in enumerate(batch["region_bboxes"]):
                    if batch["region_idx"][region] == image and is_inside(point, box, least):
                        factor = torch.minimum(factor, batch["region_keeps"][region])
                overlap = max((overlap_of(predicted[image, place], one) for one in labelled), default=0.0)
                factor = factor * (0.25 + 0.75 * math.exp(-50 * math.exp(-20 * overlap)))
            total += float((bce(logits[image, place], target, reduction="none") * factor).sum())
    return total / max(float(aligned.sum()), 1)


def is_inside(point, box, least):
    x, y = point[0] - box[0] * SIZE, point[1] - box[1] * SIZE
    w, h = (max(float(side) * SIZE, least) for side in box[2:4])
    if len(box) == 5:
        angle = float(box[4])
        x, y = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
    return abs(x) <= w / 2 and abs(y) <= h / 2


def overlap_of(one, other):
    if len(one) == 5:
        from ultralytics.utils.metrics import batch_probiou

        return float(batch_probiou(one[None], other[None]))
    (x0, y0, x1, y1), (u0, v0, u1, v1) = one.tolist(), other.tolist()
    shared = max(min(x1, u1) - max(x0, u0), 0) * max(min(y1, v1) - max(y0, v0), 0)
    return shared / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml", "yolo11n-obb.yaml", "yolo26n-obb.yaml", ANCHORS])
def test_a_weight_is_a_share_of_what_a_box_counts(name):
    """Halved weights of all objects, and background that counts half, halve the loss and its gradient."""
    batch = batch_of(name)
    whole = losses(made(name), batch, Soft())
    everywhere = torch.tensor([[0.5, 0.5, 2, 2, 0][: batch["bboxes"].shape[1]]] * NUM_IMAGES)
    halves = {
        "weights": batch["weights"] / 2,
        "region_idx": torch.arange(NUM_IMAGES).float(),
        "region_bboxes": everywhere,
        "region_keeps": torch.full((NUM_IMAGES, NUM_CLASSES), 0.5),
    }
    half = losses(made(name), {**batch, **halves}, Soft())
    for one, other in zip(half, whole, strict=True):
        torch.testing.assert_close(one * 2, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml", "yolo11n-obb.yaml"])
def test_the_losses_of_where_a_box_lies_are_those_of_plain_loops_over_weighted_boxes(name):
    """Box, DFL and angle: each anchor's is what it would be alone, by its object's two weights."""
    batch = batch_of(name)
    weights = torch.tensor([0.5, 1, 0.25, 1, 0, 0.75, 1, 0.1, 0.9])
    batch["weights"], batch["box_weights"] = weights.sqrt(), weights / weights.sqrt().clamp(min=1e-9)
    model = made(name)
    preds = model(batch["img"])

    def where(own):
        """Box, DFL and angle losses of the one object, or of all by their weights, that ``own`` leaves."""
        model.criterion = model.init_criterion()
        soften(model.criterion, Soft(), None)
        loss, _ = model.criterion(preds, {**batch, **own})
        return loss.detach()[[0, *range(2, len(loss))]]

    alone = [
        where({"weights": torch.ones(9), "box_weights": torch.eye(9)[i]}) - where({"box_weights": torch.zeros(9)})
        for i in range(9)
    ]
    nothing = where({"box_weights": torch.zeros(9)})
    expected = nothing + sum(weight * one for weight, one in zip(weights, alone, strict=True))
    torch.testing.assert_close(where({}), expected, rtol=1e-4, atol=1e-5)
    assert (torch.stack(alone).abs().amax(0) > 1e-3)[0]


# --- models with anchors, by hand: a grid of 8 x 8 cells, one anchor of 2 x 2 cells, all outputs 0 ---

LN2 = math.log(2)
ONE_ANCHOR = torch.tensor([[[2.0, 2.0]]])


def anchor_terms(num_classes=2, out=None, soft=None, smoothing=None, **more):
    """Box, objectness and class sums over an image with an object of class 0 in the middle of cell (4, 2), 2 x 2."""
    criterion = AnchorLoss(ONE_ANCHOR, num_classes, box=1 / 3, cls=80 / 3, imgsz=640)
    criterion.soft, criterion.smoothing = soft or Soft(), smoothing
    batch = {
        "batch_idx": torch.zeros(1),
        "cls": torch.zeros(1, 1),
        "bboxes": torch.tensor([[2.5, 4.5, 2, 2]]) / 8,
        "vectors": torch.eye(num_classes)[:1],
        "weights": torch.ones(1),
        "box_weights": torch.ones(1),
        "region_idx": torch.zeros(0),
        "region_bboxes": torch.zeros(0, 4),
        "region_keeps": torch.zeros(0, num_classes),
        **more,
    }
    out = torch.zeros(1, 1, 8, 8, 5 + num_classes) if out is None else out
    sums, counts = criterion.terms([out], batch)
    assert counts.tolist() == [[1, 64, 1]]  # as in the stock loss, whatever the weights
    return sums[0].tolist()


# With one level the gains are 3 times what is given (box 1, class K, objectness 3) and the balance of it is 4.
BOX_0, OBJ_PER_CELL, CLS_PER_CLASS = 0.0, 12 * LN2, LN2


def test_an_anchor_loss_weighs_its_objects():
    box, obj, cls = anchor_terms()
    assert (box, obj, cls) == pytest.approx((BOX_0, 64 * OBJ_PER_CELL, 2 * CLS_PER_CLASS * 80 / 80), abs=1e-4)
    _, obj, cls = anchor_terms(weights=torch.tensor([0.25]))
    assert (obj, cls) == pytest.approx((63.25 * OBJ_PER_CELL, 0.5 * CLS_PER_CLASS), abs=1e-4)
    shifted = torch.zeros(1, 1, 8, 8, 7)
    shifted[0, 0, 4, 2, 0] = math.log(3)  # sigmoid 0.75: the box lies half a cell to the right, IoU 1.5 / 2.5 = 0.6
    whole, half = anchor_terms(out=shifted)[0], anchor_terms(out=shifted, weights=torch.tensor([0.5]))[0]
    assert whole == pytest.approx(1 - (0.6 - 0.25 / (6.25 + 4)), abs=1e-4)  # CIoU: less centres' distance over diagonal
    assert half == pytest.approx(whole / 2, rel=1e-5)
    sure = torch.tensor([0.25])  # that the box is where it is: objectness and class are not asked
    box, obj, cls = anchor_terms(out=shifted, weights=torch.tensor([0.5]), box_weights=sure)
    assert box == pytest.approx(whole / 8, rel=1e-5)
    assert [obj, cls] == anchor_terms(out=shifted, weights=torch.tensor([0.5]))[1:]


def test_an_anchor_loss_learns_class_vectors():
    logits = torch.zeros(1, 1, 8, 8, 7)
    logits[0, 0, 4, 2, 5] = 2.0
    _, _, cls = anchor_terms(out=logits, vectors=torch.tensor([[0.7, 0.2]]))
    assert cls == pytest.approx(math.log(1 + math.exp(2)) - 0.7 * 2 + LN2, abs=1e-4)  # BCE(2, 0.7) + BCE(0, 0.2)


def test_an_anchor_loss_leaves_out_what_may_be_an_object():
    region = {"region_idx": torch.zeros(1), "region_bboxes": torch.tensor([[2.0, 4, 4, 4]]) / 8}
    _, obj, _ = anchor_terms(**region, region_keeps=torch.zeros(1, 2))  # 16 cells, one of them the object's
    assert obj == pytest.approx((64 - 15) * OBJ_PER_CELL, abs=1e-3)
    _, obj, _ = anchor_terms(**region, region_keeps=torch.full((1, 2), 0.4))
    assert obj == pytest.approx((64 - 15 * 0.6) * OBJ_PER_CELL, abs=1e-3)


def test_where_one_class_was_labelled_its_share_of_the_class_scores_counts():
    """An object of class 1 cannot be told from background where only class 0 was labelled: a cell whose class scores
    are 0.25 and 0.75 counts a quarter."""
    out = torch.zeros(1, 1, 8, 8, 7)
    out[..., 5], out[..., 6] = -math.log(3), math.log(3)
    everywhere = {"region_idx": torch.zeros(1), "region_bboxes": torch.tensor([[0.5, 0.5, 1, 1]])}
    _, obj, _ = anchor_terms(out=out, **everywhere, region_keeps=torch.tensor([[1.0, 0.0]]))
    assert obj == pytest.approx((1 + 63 / 4) * OBJ_PER_CELL, abs=1e-3)


def test_background_with_anchors_is_sampled_softly():
    _, obj, _ = anchor_terms(soft=Soft(background_far=0.25))
    expected = 1.0
    for row in range(8):
        for column in range(8):
            if (row, column) != (4, 2):  # each cell's box is the anchor in its middle
                shared = max(2 - abs(column - 2), 0) * max(2 - abs(row - 4), 0)
                overlap = shared / (8 - shared)
                expected += 0.25 + 0.75 * math.exp(-50 * math.exp(-20 * overlap))
    assert obj == pytest.approx(expected * OBJ_PER_CELL, abs=1e-3)


def test_several_objects_in_one_cell_have_the_weight_of_the_last():
    targets = torch.tensor([[0, 0, 2.5, 4.5, 2, 2], [0, 1, 2.5, 4.5, 2, 2]]) / torch.tensor([1, 1, 8, 8, 8, 8])
    assert assign(targets, ONE_ANCHOR[0], 8, 8).target.tolist() == [0, 1]
    more = {"batch_idx": torch.zeros(2), "cls": targets[:, 1:2], "bboxes": targets[:, 2:]}
    criterion = AnchorLoss(ONE_ANCHOR, 2, box=0, cls=0, imgsz=640)
    batch = {**more, "vectors": torch.eye(2), "weights": torch.tensor([1.0, 0.25]), "box_weights": torch.ones(2)}
    batch |= {"region_idx": torch.zeros(0), "region_bboxes": torch.zeros(0, 4), "region_keeps": torch.zeros(0, 2)}
    sums, _ = criterion.terms([torch.zeros(1, 1, 8, 8, 7)], batch)
    assert float(sums[0, 1]) == pytest.approx(63.25 * OBJ_PER_CELL, abs=1e-3)


# --- regions, far background ---


@pytest.mark.parametrize("columns", [4, 5])
def test_regions_keep_what_plain_loops_say(columns, monkeypatch):
    monkeypatch.setattr("softlabel.detectors.background._CHUNK", 500)  # so that there are several
    generator = torch.Generator().manual_seed(0)
    points = torch.cartesian_prod(torch.arange(12.0), torch.arange(9.0)) + 0.5
    boxes = torch.rand(40, columns, generator=generator) * torch.tensor([1, 1, 0.3, 0.3, 3][:columns])
    keeps = torch.rand(40, 2, generator=generator).round(decimals=1)
    keeps[::2] = keeps[::2, :1]
    images = torch.randint(0, 3, (40,), generator=generator)
    batch = {"region_idx": images, "region_bboxes": boxes, "region_keeps": keeps}
    size = torch.tensor([12.0, 9.0])
    found = kept_in_regions(batch, points, size, 1.5, 4)
    assert found.shape == (4, len(points), 2) and (found[3] == 1).all()
    expected = torch.ones_like(found)
    for image, box, keep in zip(images.tolist(), boxes, keeps, strict=True):
        xywhr = np.array([*(box[:4] * torch.tensor([12, 9, 12, 9])).tolist(), box[4] if columns == 5 else 0.0])
        xywhr[2:4] = np.maximum(xywhr[2:4], 1.5)
        polygon = rotated.polygons(xywhr[None])[0]
        import shapely

        inside = torch.tensor(shapely.covers(polygon, shapely.points(points.numpy())))
        expected[image][inside] = torch.minimum(expected[image][inside], keep)
    torch.testing.assert_close(found, expected)
    alike = {key: value[::2] for key, value in batch.items()}
    assert kept_in_regions(alike, points, size, 1.5, 4).shape == (4, len(points), 1)


def test_far_background_counts_as_little_as_asked():
    found = far_weight(torch.tensor([0.0, 0.2, 0.5, 1.0]), 0.25)
    expected = [0.25, 0.25 + 0.75 * math.exp(-50 * math.exp(-4)), 1 - 0.0017, 1.0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-3, rtol=0)
    assert (far_weight(torch.rand(9), 1.0) == 1).all()


# --- online label smoothing ---


def test_smoothing_is_the_mean_of_right_answers():
    smoothing = OnlineSmoothing(0.25, 3)
    given = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert smoothing.mixed(given, torch.tensor([0, 1])).tolist() == given.tolist()  # nothing seen yet: one-hot
    smoothing.see(torch.tensor([[0.6, 0.2, 0.0], [0.3, 0.1, 0.2], [0.1, 0.8, 0.0]]), torch.tensor([0, 0, 0]))
    smoothing.see(torch.tensor([[0.1, 0.2, 0.6]]), torch.tensor([1]))  # wrong
    smoothing.end_epoch(smoothing.sums)
    expected = torch.tensor([[0.9, 0.3, 0.2], [0, 1, 0], [0, 0, 1]])
    expected[0] /= 1.4
    torch.testing.assert_close(smoothing.table, expected)
    mixed = smoothing.mixed(given, torch.tensor([0, 1]))
    torch.testing.assert_close(mixed[0], torch.tensor([0.75, 0, 0]) + 0.25 * expected[0])
    assert not smoothing.sums.any()
    smoothing.end_epoch(smoothing.sums)  # an epoch without a right answer changes nothing
    torch.testing.assert_close(smoothing.table, expected)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml", ANCHORS])
def test_a_model_smooths_its_labels_by_its_own_right_answers(name):
    batch = batch_of(name)
    smoothing = OnlineSmoothing(0.5, NUM_CLASSES)
    stock = losses(made(name), batch)
    first = losses(made(name), batch, Soft(), smoothing)
    torch.testing.assert_close(first[0], stock[0])  # one-hot still
    assert smoothing.sums.any()
    smoothing.end_epoch(smoothing.sums)
    torch.testing.assert_close(smoothing.table.sum(1), torch.ones(NUM_CLASSES))
    second = losses(made(name), batch, Soft(), smoothing)
    assert not torch.allclose(second[0], stock[0])


# --- several ranks ---


def test_two_ranks_have_the_gradient_of_one_with_the_tiles_of_both(tmp_path):
    """With two processes of torch.distributed; the class targets of the second epoch come from both ranks' first."""
    names, context = ("yolov8n.yaml", ANCHORS), multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [(0, 2, names, tmp_path / "meet", answers), (1, 2, names, tmp_path / "meet", answers)]
    started = [context.Process(target=of_rank, args=args, daemon=True) for args in ranks]
    for process in started:
        process.start()
    of_rank(0, 1, names, "", alone := queue.Queue())
    of_two = [answers.get(timeout=300) for _ in range(4)]
    for process in started:
        process.join()
        assert process.exitcode == 0
    for name, _, expected, table in [alone.get() for _ in names]:
        assert np.abs(table - np.eye(NUM_CLASSES)).max() > 0.01
        largest = max(np.abs(grad).max() for grad in expected.values())
        for _, _, grads, seen in [answer for answer in of_two if answer[0] == name]:
            np.testing.assert_allclose(seen, table, rtol=1e-5)
            assert grads.keys() == expected.keys()
            for key, grad in grads.items():
                np.testing.assert_allclose(grad, expected[key], rtol=1e-3, atol=1e-6 * largest, err_msg=key)
