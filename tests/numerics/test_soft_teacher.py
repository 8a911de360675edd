"""Tiles that a student's moving average labels while the student learns: cases worked out by hand, plain loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from soft_batches import ANCHORS, NUM_CLASSES, SIZE, batch_of, losses, made
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from softlabel.config import Soft, SoftTeacher, Supplement
from softlabel.detectors.background import trusted
from softlabel.detectors.soft_loss import soften
from softlabel.detectors.weights import finds_rotated
from softlabel.records import Nms
from softlabel.training.soft_teacher import Relabeller


class Teacher:
    """Finds the same boxes in every image, given as centre and size in pixels, scores of three classes, and more."""

    def __init__(self, *rows):
        self.rows = torch.tensor(rows)
        self.model = [SimpleNamespace(end2end=True)]
        self.seen = []

    def __call__(self, images):
        self.seen.append((images.clone(), self.model[-1].end2end))
        return self.rows.T[None].expand(len(images), -1, -1), None


def relabeller(*, is_rotated=False, **options):
    settings = SoftTeacher(threshold=0.5, burn_in=0.25)
    soft = Soft(soft_teacher=settings, supplement=Supplement(), **options)
    return Relabeller(settings, soft, NUM_CLASSES, Nms(0.01, 0.5, 100), is_rotated=is_rotated)


def labelled(columns=4):
    """Two images: the left half of the first is a tile of soft labels, all else has truth."""
    xywh = [[0.25, 0.25, 0.2, 0.2], [0.75, 0.75, 0.2, 0.2], [0.5, 0.5, 0.1, 0.1]]
    part, band, crowd = [0.25, 0.5, 0.5, 1.0], [0.2, 0.2, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]

    def boxes(rows):
        return torch.cat((torch.tensor(rows), torch.zeros(len(rows), columns - 4)), 1)

    return {
        "img": torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        "cls": torch.tensor([[0.0], [1.0], [2.0]]),
        "bboxes": boxes(xywh),
        "weights": torch.tensor([0.7, 1.0, 1.0]),
        "box_weights": torch.tensor([0.9, 1.0, 1.0]),
        "vectors": torch.eye(3),
        "is_stored": torch.tensor([True, False, False]),
        "region_idx": torch.tensor([0.0, 0.0, 1.0]),
        "region_bboxes": boxes([part, band, crowd]),
        "region_keeps": torch.tensor([[1.0] * 3, [0.0] * 3, [0.0] * 3]),
        "region_is_stored": torch.tensor([True, True, False]),
    }


FOUND = (
    (30.0, 60.0, 10.0, 20.0, 0.1, 0.8, 0.3),
    (31.0, 60.0, 10.0, 20.0, 0.1, 0.7, 0.3),  # the same again
    (70.0, 30.0, 10.0, 10.0, 0.9, 0.0, 0.0),  # where there is truth
    (20.0, 20.0, 10.0, 10.0, 0.4, 0.0, 0.0),  # too unsure
)


def test_what_the_teacher_finds_takes_the_place_of_stored_labels():
    torch.manual_seed(0)
    teacher, batch = Teacher(*FOUND), labelled()
    made = relabeller(class_targets="vector", weight_power=2.0)(teacher, batch)
    assert made["batch_idx"].tolist() == [0, 0, 1]
    assert made["cls"].view(-1).tolist() == [1, 1, 2]
    torch.testing.assert_close(made["bboxes"][0], batch["bboxes"][1])
    torch.testing.assert_close(made["bboxes"][1], torch.tensor([30 / 96, 60 / 96, 10 / 96, 20 / 96]))
    torch.testing.assert_close(made["vectors"][1], torch.tensor([0.1, 0.8, 0.3]))
    torch.testing.assert_close(made["weights"], torch.tensor([1.0, 0.64, 1.0]))
    torch.testing.assert_close(made["region_bboxes"], batch["region_bboxes"][2:])  # truth's alone
    torch.testing.assert_close(made["teacher_bboxes"], batch["region_bboxes"][:1])
    assert made["teacher_scores"].shape == (2, 4, 3)
    ((seen, end2end),) = teacher.seen
    assert torch.equal(seen, batch["img"]) and end2end is False and teacher.model[-1].end2end is True
    assert not torch.equal(made["img"][0], seen[0]) and torch.equal(made["img"][1], seen[1])


def test_with_an_objectness_it_is_divided_out_and_weighs():
    teacher = Teacher((30.0, 60.0, 10.0, 20.0, 0.1, 0.6, 0.3, 0.75))
    made = relabeller(class_targets="vector")(teacher, labelled())
    torch.testing.assert_close(made["vectors"][1], torch.tensor([0.1, 0.6, 0.3]) / 0.75)
    assert float(made["weights"][1]) == 0.75
    torch.testing.assert_close(made["teacher_scores"], torch.full((2, 1, 1), 0.75))


def test_rotated_boxes_keep_their_angle():
    teacher = Teacher((30.0, 60.0, 10.0, 20.0, 0.1, 0.6, 0.3, 0.5))
    made = relabeller(is_rotated=True)(teacher, labelled(columns=5))
    torch.testing.assert_close(made["bboxes"][1], torch.tensor([30 / 96, 60 / 96, 10 / 96, 20 / 96, 0.5]))
    assert made["teacher_scores"].shape == (2, 1, 3) and made["vectors"][1].tolist() == [0, 1, 0]


def test_a_batch_of_truth_alone_stays_as_it_is():
    batch = labelled()
    batch["is_stored"][:] = False
    batch["region_is_stored"][:] = False
    made = relabeller()(Teacher(*FOUND), batch)
    for key in ("img", "batch_idx", "cls", "bboxes", "weights", "vectors", "region_bboxes"):
        assert torch.equal(made[key], batch[key]), key
    assert not len(made["teacher_bboxes"])


def test_it_begins_after_its_share_of_the_epochs():
    assert [relabeller().begins(epochs) for epochs in (1, 4, 30)] == [1, 1, 8]


def test_background_counts_by_the_teacher_s_own_score_where_it_labels():
    points = torch.tensor([[10.0, 10.0], [70.0, 10.0]])
    batch = {"teacher_idx": torch.tensor([1.0]), "teacher_bboxes": torch.tensor([[0.25, 0.5, 0.5, 1.0]])}
    scores = torch.tensor([[[0.5, 0.2], [0.5, 0.2]]]).repeat(2, 1, 1)
    found = trusted(batch, points, torch.tensor([96, 96]), 8.0, scores)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.5, 0.8], [1.0, 1.0]]]))


def relabelled(name):
    """A batch whose middle image, without objects, is a tile that a teacher labels."""
    batch, model = batch_of(name), made(name)
    part = torch.tensor([[0.5, 0.5, 1.0, 1.0, 0.0]])[:, : batch["bboxes"].shape[1]]
    with torch.no_grad():
        decoded = model.eval()(batch["img"])[0]
    places = decoded.shape[2]
    columns = 1 if name == ANCHORS else NUM_CLASSES
    scores = torch.rand(3, places, columns, generator=torch.Generator().manual_seed(3))
    return {**batch, "teacher_idx": torch.tensor([1.0]), "teacher_bboxes": part, "teacher_scores": scores}


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml", "yolo11n-obb.yaml", ANCHORS])
def test_the_loss_of_such_a_tile_is_weighted_place_by_place(name):
    """Against the loss without a teacher: what is missing is the weighted part of the middle image's background."""
    batch = relabelled(name)
    without = {key: value for key, value in batch.items() if not key.startswith("teacher")}
    model = made(name)
    model.criterion = model.init_criterion()
    soften(model.criterion, Soft(), None)
    preds = model(batch["img"])
    heads = [(model.criterion, preds)]
    if hasattr(model.criterion, "one2many"):
        heads = [(getattr(model.criterion, one), preds[one]) for one in ("one2many", "one2one")]
    for criterion, raw in heads:
        if name == ANCHORS:
            plain, weighted = (criterion.terms(raw["feats"], one)[0] for one in (without, batch))
            difference, start = (plain - weighted)[:, 1].sum(), 0
            expected = 0.0
            for level, out in enumerate(raw["feats"]):
                count = out[0, ..., 4].numel()
                scores = batch["teacher_scores"][1, start : start + count, 0].view(out.shape[1:4])
                missing = bce(out[1, ..., 4], torch.zeros_like(out[1, ..., 4]), reduction="none") * scores
                expected += float(missing.sum()) * criterion._obj * criterion._balance[level]
                start += count
        else:
            plain, weighted = (criterion.loss(raw, one)[0] for one in (without, batch))
            difference = (plain - weighted)[1] / 3 / model.args.cls
            logits = raw["scores"][1].T.detach()
            total = normaliser(criterion, raw, without)
            expected = float(
                (bce(logits, torch.zeros_like(logits), reduction="none") * batch["teacher_scores"][1]).sum()
            )
            expected /= total
        assert float(difference) == pytest.approx(expected, rel=1e-3) and not math.isclose(expected, 0)


def normaliser(criterion, raw, batch):
    """What the assigner's scores add up to."""
    seen = []
    handle = criterion.assigner.register_forward_hook(lambda _, given, said: seen.append(float(said[2].sum())))
    criterion.loss(raw, batch)
    handle.remove()
    return max(seen[-1], 1.0)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml", "yolo11n-obb.yaml", ANCHORS])
def test_each_model_can_teach_itself(name):
    """The places of the teacher's scores are those of the student's loss."""
    batch, model = relabelled(name), made(name)
    columns = 5 if finds_rotated(name) else 4
    stored = {
        **batch,
        "is_stored": torch.zeros(len(batch["cls"]), dtype=torch.bool),
        "region_idx": torch.tensor([1.0]),
        "region_bboxes": torch.tensor([[0.5, 0.5, 1.0, 1.0, 0.0]])[:, :columns],
        "region_keeps": torch.ones(1, NUM_CLASSES),
        "region_is_stored": torch.tensor([True]),
    }
    one = Relabeller(SoftTeacher(threshold=0.0), Soft(), NUM_CLASSES, Nms(0.0, 0.7, 5), is_rotated=columns == 5)
    again = one(made(name).eval(), stored)
    assert 0 < (again["batch_idx"] == 1).sum() <= 6 and again["bboxes"].shape[1] == columns
    assert again["teacher_scores"].shape == batch["teacher_scores"].shape
    assert again["img"].shape == (3, 3, SIZE, SIZE)
    loss, grads = losses(model, again, Soft())
    assert torch.isfinite(loss).all() and torch.isfinite(grads).all()
