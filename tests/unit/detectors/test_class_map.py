"""A teacher's classes become the recipe's as label.classes says; what nobody spoke of is named."""

import numpy as np
import pytest
import torch

from softlabel.config import Recipe
from softlabel.detectors.class_map import class_map, left_out
from softlabel.detectors.families import load
from softlabel.detectors.teachers import recipe_teacher
from softlabel.detectors.yolo import YoloDetector
from softlabel.errors import RecipeError
from softlabel.records import Nms

COCO = ("person", "car", "truck", "boat", "ship")


def test_classes_become_those_asked_for_and_those_of_their_name():
    asked = {"truck": "car", "boat": "ship", "person": None}
    found = class_map("best.pt", COCO, ("ship", "car", "plane"), asked)
    assert found.columns == ((3, 4), (1, 2), ())
    assert found.identity() == {"person": None, "car": "car", "truck": "car", "boat": "ship", "ship": "ship"}
    assert left_out(found, asked) == ["label.classes: the teacher has nothing for plane: no box will be of them"]


def test_what_nobody_spoke_of_is_named_in_one_line():
    asked = {"boat": "ship"}
    found = class_map("best.pt", [*COCO, *map(str, range(20))], ("ship",), asked)
    assert left_out(found, asked) == [
        "label.classes: left out, since no class of the recipe has the same name: "
        "person, car, truck, 0, 1, 2, 3, 4, 5, 6, ... (23)"
    ]


def test_the_same_classes_need_no_mapping_and_others_ask_for_one():
    assert class_map("best.pt", COCO, COCO, {}) is None
    with pytest.raises(RecipeError, match=r"best\.pt knows the classes person, .*label\.classes\.person=ship$"):
        class_map("best.pt", COCO, ("ship",), {})
    with pytest.raises(RecipeError, match=r"label\.classes names tank, which best\.pt does not know: remove it"):
        class_map("best.pt", COCO, ("ship",), {"tank": "ship"})


def test_the_same_classes_in_another_order_need_no_mapping():
    found = class_map("best.pt", COCO, tuple(sorted(COCO)), {})
    assert found.columns == ((3,), (1,), (0,), (4,), (2,)) and left_out(found, {}) == []


@pytest.mark.parametrize("model", ["weights", "anchor_weights"])
def test_boxes_and_vectors_are_those_of_the_mapped_scores(model, request):
    """Against the same network with its scores mapped by hand, before NMS."""
    weights = request.getfixturevalue(model)  # of car, plane and ship
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(2)]
    teacher = teacher_of(weights, {"car": "vehicle", "ship": "vehicle"})
    found = load(teacher, threads=None, batch_size=2).detect(images)
    plain = YoloDetector.from_weights(weights, Nms(0.02, 0.5, 50), batch_size=2)

    class ByHand(torch.nn.Module):
        def forward(self, tiles):
            decoded, raw = plain_forward(tiles)
            car, aircraft, ship = decoded[:, 4:7].unbind(1)
            return torch.cat((decoded[:, :4], torch.stack((aircraft, car.maximum(ship)), 1), decoded[:, 7:]), 1), raw

    network = plain._engine._forward
    plain_forward, plain._num_classes = network, 2
    plain._engine._forward = ByHand()
    assert sum(len(one.boxes) for one in found) > 20
    for one, other in zip(found, plain.detect(images), strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)


def teacher_of(weights, classes):
    return recipe_teacher(recipe_of(weights, classes))


def recipe_of(weights, classes):
    label = {"weights": str(weights), "classes": classes, "floor": 0.02, "iou": 0.5, "max_det": 50, "engine": "pytorch"}
    tiles = {"synthetic": {}}
    return Recipe.model_validate({"name": "x", "classes": ["plane", "vehicle"], "tiles": tiles, "label": label})


def test_the_mapping_is_part_of_what_a_store_says_of_its_teacher(weights):
    one = teacher_of(weights, {"car": "vehicle", "ship": "vehicle"})
    assert one.fingerprint["classes"] == ["plane", "vehicle"]
    assert one.fingerprint["class_map"] == {"car": "vehicle", "plane": "plane", "ship": "vehicle"}
    assert one.fingerprint != teacher_of(weights, {"car": "vehicle", "ship": None}).fingerprint


def test_a_class_that_the_recipe_has_not_is_refused_with_the_recipe(weights):
    with pytest.raises(ValueError, match=r"label\.classes maps to tank, not among `classes` \(plane, vehicle\)"):
        recipe_of(weights, {"car": "tank"})
