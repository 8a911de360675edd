"""Test-time augmentation: every view's boxes come back to the tile, and are fused as several teachers' are."""

import numpy as np
import pytest
import torch

from softlabel import rotated
from softlabel.config import Recipe
from softlabel.detectors import families
from softlabel.detectors.augment import IOU, AugmentedDetector, undo
from softlabel.detectors.teachers import recipe_teacher
from softlabel.detectors.yolo import YoloDetector
from softlabel.errors import RecipeError
from softlabel.fusion import fuse_tile
from softlabel.labelling.job import label_job
from softlabel.records import Detections, Nms

NMS = Nms(0.05, 0.5, 60)
VIEWS = {"fliplr": lambda image: image[:, ::-1], "flipud": lambda image: image[::-1], "rot90": np.rot90}


@pytest.mark.parametrize("view", VIEWS)
def test_a_box_of_a_view_is_where_it_is_in_the_tile(view):
    """A bright rectangle is found in the view; what comes back is where it was drawn."""
    tile = np.zeros((40, 60), np.uint8)
    tile[5:12, 20:50] = 255
    rows, columns = np.nonzero(VIEWS[view](tile))
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float32)
    found = undo(Detections(box, np.ones((1, 2), np.float32)), view, tile.shape)
    np.testing.assert_array_equal(found.boxes, [[20, 5, 50, 12]])


@pytest.mark.parametrize("view", VIEWS)
def test_a_rotated_box_of_a_view_is_where_it_is_in_the_tile(view):
    xywhr = np.array([[30.0, 18.0, 24.0, 6.0, 0.4]], np.float32)
    corners = rotated.corners(xywhr)[0]
    seen = {
        "fliplr": corners * [-1, 1] + [60, 0],
        "flipud": corners * [1, -1] + [0, 40],
        "rot90": np.stack([corners[:, 1], 60 - corners[:, 0]], axis=1),
    }[view]
    box = rotated.around(seen)[None].astype(np.float32)
    found = undo(Detections(rotated.hulls(box), np.ones((1, 2), np.float32), xywhr=box), view, (40, 60))
    np.testing.assert_allclose(found.xywhr, xywhr, atol=1e-4)
    np.testing.assert_allclose(found.boxes, rotated.hulls(xywhr), atol=1e-3)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(96, 96), (64, 96), (96, 48)]]


def test_views_are_looked_at_and_fused_by_hand(talkative_model, images):
    """Each view by a detector of its own, scale by another imgsz."""
    import copy

    def detector(imgsz):
        return YoloDetector(copy.deepcopy(talkative_model), imgsz, NMS, torch.device("cpu"), batch_size=2)

    found = AugmentedDetector(detector(96), ["fliplr", "rot90", 1.5]).detect(images)
    for image, ours in zip(images, found, strict=True):
        shape = image.shape[:2]
        flipped = undo(detector(96).detect([np.ascontiguousarray(image[:, ::-1])])[0], "fliplr", shape)
        turned = undo(detector(96).detect([np.ascontiguousarray(np.rot90(image))])[0], "rot90", shape)
        views = [detector(96).detect([image])[0], flipped, turned, detector(144).detect([image])[0]]
        fused = fuse_tile(views, [1.0] * 4, NMS.floor, IOU).above(NMS.floor)
        assert len(ours.boxes) == min(len(fused.boxes), NMS.max_det) > 3
        np.testing.assert_allclose(ours.boxes, fused.boxes[: NMS.max_det], atol=0.05)
        np.testing.assert_allclose(ours.scores, fused.scores[: NMS.max_det], atol=1e-3)
        assert ours.saturated == (len(fused.boxes) > NMS.max_det or any(view.saturated for view in views))


def teacher_of(weights, augment, **label):
    label = {"floor": 0.05, "engine": "pytorch", "augment": augment, **(label or {"weights": str(weights)})}
    tiles = {"synthetic": {}}
    return recipe_teacher(
        Recipe.model_validate({"name": "x", "classes": ["car", "plane", "ship"], "tiles": tiles, "label": label})
    )


def test_views_are_part_of_what_a_store_says_of_its_teacher(weights, images):
    plain, augmented = teacher_of(weights, []), teacher_of(weights, ["fliplr", 0.83])
    assert "augment" not in plain.fingerprint and augmented.fingerprint["augment"] == ["fliplr", 0.83]
    one, other = (families.load(teacher, threads=None, batch_size=2).detect(images) for teacher in (plain, augmented))
    assert any(len(a.boxes) != len(b.boxes) for a, b in zip(one, other, strict=True))


def test_a_model_of_one_size_takes_no_other(tmp_path):
    words = {"model": "tests/assets/tiny-owlvit", "prompts": {name: [name] for name in ("car", "plane", "ship")}}
    assert teacher_of(None, ["fliplr"], open_vocabulary=words).augment == ("fliplr",)
    with pytest.raises(RecipeError, match=r"label\.augment: owlvit sees every tile at one size: remove 0\.83"):
        teacher_of(None, ["fliplr", 0.83], open_vocabulary=words)


@pytest.mark.parametrize("view", ["mirror", 0.0, 11])
def test_a_view_that_is_none_is_refused(weights, view):
    with pytest.raises(ValueError, match=r"label\.augment\.0"):
        teacher_of(weights, [view])


def test_who_teaches_looks_in_views_and_who_is_judged_does_not(weights, tmp_path):
    tiles = {"synthetic": {}}
    label = {"engine": "pytorch", "augment": ["fliplr"]}
    recipe = Recipe.model_validate({"name": "x", "classes": ["car", "plane", "ship"], "tiles": tiles, "label": label})
    taught, judged = (label_job(recipe, "x", weights, tmp_path, None, teaches=teaches) for teaches in (True, False))
    assert (taught.teacher.augment, judged.teacher.augment) == (("fliplr",), ())
    assert taught.identity() != judged.identity()
