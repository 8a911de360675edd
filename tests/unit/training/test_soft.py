"""What is made of labels that are unsure, and how it comes through ultralytics' augmentation."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_stores import CLASSES, made_store, made_tile, write_store, write_tiles
from ultralytics.cfg import get_cfg

from softlabel import rotated
from softlabel.config import Recipe, Soft
from softlabel.errors import RecipeError, TrainingError
from softlabel.records import Detections, Nms, Truth
from softlabel.store import finish
from softlabel.training.arguments import check_soft
from softlabel.training.dataset import TileDataset, looked_up, soft_rows
from softlabel.training.job import recipe_train_job, train_job
from softlabel.training.soft import label_softness, truth_softness
from softlabel.training.targets import TrainJob, truth_targets

BOXES = np.array([[0, 0, 10, 10], [40, 40, 60, 60], [1, 0, 11, 10], [20, 0, 30, 10], [0, 30, 4, 34]], np.float32)
SCORES = np.array(
    [[0.8, 0.1, 0], [0.1, 0.6, 0.3], [0.1, 0, 0.25], [0, 0.2, 0.1], [0.04, 0, 0]], np.float32
)  # the third is the first's object again, as another class
OBJECTNESS = np.array([0.8, 0.6, 0.5, 0.4, 0.05], np.float32)


AGREEMENT = np.array([0.8, np.nan, 0.9, 0.9, np.nan], np.float32)


def softness(objectness=None, *, agreement=None, threshold=0.5, low=1.0, calibrated=False, **options):
    found = Detections(BOXES, SCORES, objectness=objectness, agreement=agreement)
    kept, above_low = found.is_above(threshold), found.is_above(low)
    return label_softness(found, kept, above_low, 3, Soft(**options), calibrated=calibrated)


def test_a_hard_target_is_the_best_class():
    made = softness(weight_power=2.0)
    np.testing.assert_array_equal(made.vectors, [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(made.weights, [0.64, 0.36], rtol=1e-6)
    assert len(made.regions) == len(made.keeps) == 0


def test_a_class_vector_is_given_where_there_is_an_object():
    made = softness(class_targets="vector")
    np.testing.assert_array_equal(made.vectors, SCORES[:2])
    np.testing.assert_array_equal(made.weights, [1, 1])
    made = softness(OBJECTNESS, class_targets="vector")
    np.testing.assert_allclose(made.vectors, [[1, 0.125, 0], [1 / 6, 1, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(made.weights, [0.8, 0.6], rtol=1e-6)
    made = softness(OBJECTNESS, class_targets="vector", weight_power=1.0)
    np.testing.assert_allclose(made.weights, [0.64, 0.36], rtol=1e-6)
    made = softness(OBJECTNESS, class_targets="vector", calibrated=True)  # calibrated scores are no product
    np.testing.assert_array_equal(made.vectors, SCORES[:2])
    np.testing.assert_array_equal(made.weights, [1, 1])


def test_a_temperature_below_1_sharpens():
    made = softness(class_targets="vector", temperature=0.5)
    odds = (SCORES[:2].astype(np.float64) / (1 - SCORES[:2])) ** 2
    np.testing.assert_allclose(made.vectors, odds / (1 + odds), atol=1e-5)


def test_a_box_weighs_its_agreement_and_1_where_that_is_not_known():
    made = softness(agreement=AGREEMENT, localisation_power=2.0, weight_power=1.0)
    np.testing.assert_allclose(made.box_weights, [0.64, 1], rtol=1e-6)
    np.testing.assert_allclose(made.weights, [0.8, 0.6], rtol=1e-6)
    for plain in (softness(agreement=AGREEMENT), softness(localisation_power=2.0)):
        np.testing.assert_array_equal(plain.box_weights, [1, 1])


def test_labels_between_two_thresholds_are_neither():
    made = softness(ignore_above=0.1, low=0.1)
    np.testing.assert_array_equal(made.regions, [[25, 5, 10, 10, 0]])  # not the third, of which the first is sure
    np.testing.assert_array_equal(made.keeps, [[0, 0, 0]])
    made = softness(ignore_above=0.1, low=np.array([0.1, 0.2, 0.1], np.float32))
    assert not len(made.regions)


def test_labels_below_weaken_the_background_by_their_score():
    made = softness(background_doubt=0.5)  # not the last, of which nearly nobody doubts that it is nothing
    np.testing.assert_array_equal(made.regions, [[25, 5, 10, 10, 0]])
    np.testing.assert_allclose(made.keeps, [[0.9, 0.9, 0.9]], rtol=1e-6)


def test_a_tile_without_labels():
    found = Detections(np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32))
    nothing = np.zeros(0, bool)
    soft = Soft(class_targets="vector", temperature=0.5, weight_power=1, background_doubt=1)
    made = label_softness(found, nothing, nothing, 3, soft, calibrated=False)
    assert made.vectors.shape == made.keeps.shape == (0, 3)
    assert made.regions.shape == (0, 5) and made.weights.shape == (0,)


def test_rotated_labels_leave_rotated_regions():
    xywhr = np.array([[30, 30, 20, 10, 0.5]], np.float32)
    found = Detections(np.array([[10, 10, 50, 50]], np.float32), np.array([[0, 0.2, 0]], np.float32), xywhr=xywhr)
    made = label_softness(found, np.array([False]), np.array([True]), 3, Soft(ignore_above=0.1), calibrated=False)
    np.testing.assert_array_equal(made.regions, xywhr)


def test_truth_that_cannot_be_used_is_neither():
    truth = Truth(
        np.array([[0, 0, 10, 10], [20, 20, 30, 40], [5, 5, 6, 6]], np.float32),
        np.array([2, 1, -1], np.int32),
        np.array([False, True, True]),
    )
    tile = {"window": [0, 0, 64, 32], "labelled_classes": None}
    made = truth_softness(tile, truth, 3, Soft(ignore_truth=True))
    np.testing.assert_array_equal(made.vectors, [[0, 0, 1]])
    np.testing.assert_array_equal(made.box_weights, [1])
    np.testing.assert_array_equal(made.regions, [[25, 30, 10, 20, 0], [5.5, 5.5, 1, 1, 0]])
    assert not made.keeps.any()
    assert not len(truth_softness(tile, truth, 3, Soft(smoothing=0.5)).regions)
    made = truth_softness({**tile, "labelled_classes": [0, 2]}, truth, 3, Soft(ignore_truth=True))
    parts, keeps = made.regions[2:], made.keeps[2:]
    np.testing.assert_array_equal(keeps, np.repeat([[1, 0, 1]], 16, axis=0))
    covered = np.zeros((32, 64), int)
    for x, y, w, h, _ in parts.astype(int):
        covered[y - h // 2 : y + h // 2, x - w // 2 : x + w // 2] += 1
    assert (covered == 1).all()


# --- training sets ---


@pytest.fixture
def job(tmp_path):
    """Makes a job on twelve tiles with the labels above."""
    made = [made_tile("s", (64 * i, 0, 64, 64), Detections(BOXES, SCORES), split="train_2") for i in range(12)]
    store = made_store(tmp_path, made)

    def make(threshold=0.5, **soft):
        splits = ("train_2", "val_1", store)
        paths = ("s", tmp_path, tuple(CLASSES), "yolov5n.yaml", None, {}, tmp_path / "tiles-made")
        return TrainJob(*paths, *splits, threshold, None, 1.0, 0, Nms(), Soft(**soft))

    return make


def test_a_training_set_is_soft_as_the_job_says(job):
    assert all(target.soft is None for target in job().targets())
    soft = job(ignore_above={"car": 0.1, "plane": 0.1, "ship": 0.5}, weight_power=1.0).targets()[3].soft
    np.testing.assert_allclose(soft.weights, [0.8, 0.6], rtol=1e-6)
    assert len(soft.regions) == 1
    with pytest.raises(TrainingError, match=r"s: every label weighs 0: lower train\.soft\.weight_power"):
        job(weight_power=1e6).targets()


def test_a_store_without_any_agreement_is_refused_where_it_is_needed(job, tmp_path):
    with pytest.raises(
        TrainingError, match=r"localisation_power .* no box of .*label-w1 has an agreement: delete that"
    ):
        job(localisation_power=1.0).targets()
    found = [Detections(BOXES, SCORES), Detections(BOXES, SCORES, agreement=AGREEMENT), None]
    made = [made_tile("s", (64 * i, 0, 64, 64), one, split="train_2") for i, one in enumerate(found)]
    some = replace(job(localisation_power=1.0), soft_labels=write_store(tmp_path, made, weights="some"))
    weights = [target.soft.box_weights.tolist() for target in some.targets()]
    assert weights == [[1, 1], pytest.approx([0.8, 1]), []]


def test_a_dropped_label_leaves_nothing_behind(job):
    """The same ones for every way to train and every threshold, with the lower labels of the same object."""
    hard, soft = replace(job(), drop=0.5), replace(job(ignore_above=0.1, background_doubt=1.0), drop=0.5)
    low = replace(job(0.15), drop=0.5)
    lengths, low_ones = [], 0
    for plain, target, lower in zip(hard.targets(), soft.targets(), low.targets(), strict=True):
        np.testing.assert_array_equal(plain.boxes, target.boxes)
        lengths.append(len(plain.boxes))
        seen = [*target.boxes.tolist(), *rotated.hulls(target.soft.regions).tolist()]
        assert (BOXES[0].tolist() in lower.boxes.tolist()) == (BOXES[2].tolist() in lower.boxes.tolist())
        assert (BOXES[0].tolist() in plain.boxes.tolist()) == (BOXES[0].tolist() in lower.boxes.tolist())
        assert (BOXES[3].tolist() in seen) == (BOXES[3].tolist() in lower.boxes.tolist())
        low_ones += BOXES[3].tolist() in seen
    assert 2 < low_ones < 10
    assert set(lengths) == {0, 1, 2} and 6 < sum(lengths) < 18
    assert [len(t.boxes) for t in job().targets()] == [2] * 12


@pytest.fixture
def mixed(tmp_path):
    """Makes a job on three tiles of soft labels, and two with truth in the other training set."""
    truth = [
        {"box": (10, 10, 30, 30), "class_id": 2, "visible": 1.0, "ignore": False},
        {"box": (2, 2, 9, 9), "class_id": 0, "visible": 0.1, "ignore": True},
    ]
    soft = [made_tile("s", (64 * i, 0, 64, 64), Detections(BOXES, SCORES), split="train_2") for i in range(3)]
    drawn = [made_tile("t", (64 * i, 0, 64, 64), split="train_1", truth=truth) for i in range(2)]
    store = made_store(tmp_path, [*soft, *drawn], splits=["train_2"])

    def make(**soft):
        paths = ("s", tmp_path, tuple(CLASSES), "yolov5n.yaml", None, {}, tmp_path / "tiles-made")
        return TrainJob(*paths, "train_2", "val_1", store, 0.5, None, 1.0, 0, Nms(), Soft(**soft))

    return make


def test_truth_of_the_other_training_set_supplements_soft_labels(mixed):
    targets = mixed(supplement={"weight": 2.0}, ignore_truth=True, weight_power=1.0).targets()
    assert [target.supplements for target in targets] == [False] * 3 + [True] * 2
    for target in targets[3:]:
        np.testing.assert_array_equal(target.boxes, [[10, 10, 30, 30]])
        np.testing.assert_array_equal(target.soft.weights, [2.0])
        np.testing.assert_array_equal(target.soft.vectors, [[0, 0, 1]])
        np.testing.assert_array_equal(target.soft.regions, [[5.5, 5.5, 7, 7, 0]])
    np.testing.assert_allclose(targets[0].soft.weights, [0.8, 0.6], rtol=1e-6)
    rows = soft_rows(targets)
    assert rows[:, 1].tolist() == [1] * 6 + [0] * 4  # per tile two labels; truth and its region


def test_places_of_tiles_with_soft_labels_are_known_to_a_soft_teacher(mixed):
    targets = mixed(supplement={}, soft_teacher={}, ignore_above=0.1).targets()
    whole = looked_up(_plain_batch(targets), soft_rows(targets))
    is_part = whole["region_is_stored"] & (whole["region_keeps"] == 1).all(1)
    assert whole["region_idx"][is_part].long().bincount(minlength=5).tolist() == [16, 16, 16, 0, 0]
    area = whole["region_bboxes"][is_part][:, 2:4].prod(1).sum()
    assert float(area) == pytest.approx(3)
    assert whole["is_stored"].tolist() == [True] * 6 + [False] * 2


def _plain_batch(targets):
    """What a data set without augmentation gives."""
    data = {"names": dict(enumerate(CLASSES)), "nc": 3, "channels": 3}
    image = np.zeros((64, 64, 3), np.uint8)
    hyp = get_cfg(overrides={"mosaic": 0.0})
    dataset = TileDataset(targets, lambda tile: image, imgsz=64, augment=False, batch_size=4, hyp=hyp, data=data)
    return dataset.collate_fn([dataset[i] for i in range(len(targets))])


def test_truth_of_unknown_class_is_a_region_instead_of_grey_pixels(tmp_path):
    drawn = [((10, 10, 30, 30), -1, True), ((40, 40, 50, 50), 1, False)]
    truth = [{"box": box, "class_id": k, "visible": 1.0, "ignore": ignore} for box, k, ignore in drawn]
    tiles = write_tiles(tmp_path, [made_tile("a", (0, 0, 64, 64), truth=truth, split="train_1")])
    (target,) = truth_targets(tiles, "train_1", Soft(ignore_truth=True), 3)
    assert not len(target.unknown)
    np.testing.assert_array_equal(target.soft.regions, [[20, 20, 20, 20, 0]])


@pytest.mark.parametrize("task", ["detect", "obb"])
def test_labels_come_through_augmentation_as_they_do_without_softness(job, task):
    """Objects are where they would be without, each with its own vector and weight; regions move with them."""
    options = {"mosaic": 1.0, "mixup": 0.5, "degrees": 10, "translate": 0.1, "scale": 0.3, "fliplr": 0.5}
    hyp = get_cfg(overrides=options)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = {"names": dict(enumerate(CLASSES)), "nc": 3, "channels": 3}

    def batch_of(targets):
        fixed = {"imgsz": 64, "augment": True, "batch_size": 4, "hyp": hyp, "data": data, "task": task}
        dataset = TileDataset(targets, lambda tile: image, **fixed)
        np.random.seed(0)
        torch.manual_seed(0)
        random.seed(0)
        return dataset.collate_fn([dataset[i] for i in range(12)])

    hard = batch_of(job().targets())
    targets = job(class_targets="vector", weight_power=1.0, ignore_above=0.1).targets()
    soft = looked_up(batch_of(targets), soft_rows(targets))
    for key in ("img", "batch_idx", "cls", "bboxes"):
        torch.testing.assert_close(soft[key], hard[key])
    assert len(hard["cls"]) > 12
    expected = torch.tensor(SCORES[:2])[hard["cls"].view(-1).long()]
    torch.testing.assert_close(soft["vectors"], expected)
    torch.testing.assert_close(soft["weights"], expected.amax(1))
    assert len(soft["region_idx"]) > 6 and not soft["region_keeps"].any()
    assert soft["region_bboxes"].shape == (len(soft["region_idx"]), hard["bboxes"].shape[1])


def test_each_label_keeps_what_is_its_own(tmp_path, job):
    """Of tiles whose labels are all of other scores and agreements."""
    differing = lambda share: Detections(BOXES, SCORES * share, agreement=AGREEMENT * share)  # noqa: E731
    made = [made_tile("s", (64 * i, 0, 64, 64), differing(np.float32(1 - 0.01 * i)), split="train_2") for i in range(4)]
    own = job(class_targets="vector", weight_power=1.0, localisation_power=1.0, background_doubt=1.0)
    targets = replace(own, soft_labels=write_store(tmp_path, made, weights="differing")).targets()
    data = {"names": dict(enumerate(CLASSES)), "nc": 3, "channels": 3}
    read = lambda tile: np.zeros((64, 64, 3), np.uint8)  # noqa: E731
    dataset = TileDataset(targets, read, imgsz=64, augment=False, hyp=get_cfg(), data=data)
    batch = looked_up(dataset.collate_fn([dataset[i] for i in range(4)]), soft_rows(targets))
    for key, attribute in (
        ("vectors", "vectors"),
        ("weights", "weights"),
        ("box_weights",) * 2,
        ("region_keeps", "keeps"),
    ):
        expected = np.concatenate([getattr(target.soft, attribute) for target in targets])
        assert len(np.unique(expected)) >= 4
        np.testing.assert_array_equal(batch[key], expected)


def test_a_region_lies_where_its_pixels_do(job):
    """Without augmentation: the box of the label between the thresholds."""
    targets = job(ignore_above=0.1).targets()[:2]
    image = np.zeros((64, 64, 3), np.uint8)
    data = {"names": dict(enumerate(CLASSES)), "nc": 3, "channels": 3}
    dataset = TileDataset(targets, lambda tile: image, imgsz=128, augment=False, hyp=get_cfg(), data=data)
    batch = looked_up(dataset.collate_fn([dataset[0], dataset[1]]), soft_rows(targets))
    assert batch["region_idx"].tolist() == [0, 1]
    torch.testing.assert_close(batch["region_bboxes"], torch.tensor([[25, 5, 10, 10]] * 2) / 64)


def test_class_weights_count_classes_and_not_rows(job):
    from softlabel.training.trainer import SoftLabelTrainer

    made = job(smoothing=0.5)
    trainer = SimpleNamespace(targets=made.targets(), _job=made)
    assert SoftLabelTrainer.get_class_counts(trainer).tolist() == [12, 12, 0]


def test_a_student_is_another_one_by_its_softness(tmp_path):
    def folder(recipe, **more):
        made = {"tiles": tmp_path / "t", "split": "train_2", "val_split": "val_1", "soft_labels": tmp_path / "l"}
        return train_job(recipe, tmp_path, "s", recipe.train.student, threshold=0.5, **made, **more).folder

    plain = folder(recipe())
    assert folder(recipe(ignore_truth=True)) == plain  # that is about truth
    ways = [folder(recipe(smoothing=0.5)), folder(recipe(weight_power=1.0)), folder(recipe(), drop=0.3)]
    ways.append(folder(recipe(localisation_power=1.0)))
    assert len({plain, *ways}) == 5


# --- mistakes ---


def test_tiles_labelled_for_some_classes_only_are_pointed_out(job, tmp_path, capsys):
    from softlabel.training.run import _check

    truth = [{"box": (1, 1, 9, 9), "class_id": 0, "visible": 1.0, "ignore": False}]
    rows = [
        made_tile("a", (64 * i, 0, 64, 64), truth=truth, split="train_2", labelled_classes=[0] if i else None)
        for i in range(3)
    ]
    rows.append(made_tile("b", (0, 0, 64, 64), truth=truth, split="val_1"))
    tiles = write_tiles(tmp_path, rows, name="tiles-partly")
    plain = replace(job(), tiles=tiles, soft_labels=None, threshold=None)
    _check(plain)
    assert "2 of 3 tiles were labelled for some classes only" in capsys.readouterr().out
    _check(replace(plain, soft=Soft(ignore_truth=True)))
    assert not capsys.readouterr().out


def recipe(classes=tuple(CLASSES), model="yolov5n.yaml", **soft):
    train = {"student": {"model": model}, "soft": soft}
    return Recipe.model_validate(
        {"name": "r", "classes": classes, "tiles": {"synthetic": {}, "size_px": 64}, "train": train}
    )


@pytest.mark.parametrize(
    ("made", "thresholds", "problem"),
    [
        (lambda: recipe(ignore_above=0.4), [0.5, 0.3], "ignore_above is 0.4 for car, not below its threshold of 0.3"),
        (
            lambda: recipe(ignore_above={"car": 0.1, "plane": 0.4, "ship": 0.1}),
            [{"car": 0.5, "plane": 0.4, "ship": 0.5}],
            "ignore_above is 0.4 for plane, not below its threshold of 0.4",
        ),
        (lambda: recipe(["car"], smoothing=0.5), [0.5], "smoothing has no use"),
        (
            lambda: recipe(["car"], "yolov5n-anchor.yaml", class_targets="vector"),
            [0.5],
            r"class_targets has no use: with one class yolov5n-anchor\.yaml has no class loss",
        ),
    ],
)
def test_what_has_no_use_is_refused(made, thresholds, problem):
    with pytest.raises(RecipeError, match=r"train\.soft\." + problem):
        check_soft(made(), thresholds)


@pytest.mark.parametrize(
    ("soft", "problem"),
    [
        ({"temperature": 0.5}, "temperature is of class vectors"),
        ({"temperature": 0, "class_targets": "vector"}, "greater than 0"),
        ({"ignore_above": {"car": 0.1}}, "ignore_above names car: give each of `classes` one"),
        ({"smoothing": 1}, "less than 1"),
        ({"weigh": 1}, "Extra inputs"),
        ({"soft_teacher": {}}, "soft_teacher needs the truth of some tiles: set supplement too"),
        ({"supplement": {"share": 1}}, "less than 1"),
        ({"rounds": 0}, "greater than or equal to 1"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_softness(soft, problem):
    with pytest.raises(ValueError, match=problem):
        recipe(**soft)


def test_what_is_made_of_scores_is_refused_for_truth(tmp_path):
    of_scores = (
        {"weight_power": 1},
        {"localisation_power": 1},
        {"class_targets": "vector"},
        {"ignore_above": 0.1},
        {"background_doubt": 1},
    )
    for soft in (*of_scores, {"supplement": {}}, {"rounds": 2}):
        with pytest.raises(RecipeError, match=rf"train\.soft\.{next(iter(soft))} is about soft labels"):
            recipe_train_job(recipe(**soft), tmp_path, tmp_path, None)


@pytest.mark.parametrize(
    ("supplement", "split", "problem"),
    [
        ({"split": "train_3"}, "train_2", "no train_3 among train_1, train_2, val_1: name a split with truth"),
        ({"split": "train_2"}, "train_2", "is train_2, which the student learns from or is judged by: name another"),
        ({"split": "val_1"}, "train_2", "is val_1, which"),
        ({}, "train_1", None),
        ({}, "none", None),
    ],
)
def test_a_supplement_is_another_training_set(tmp_path, supplement, split, problem):
    store = made_store(tmp_path, [made_tile("s", (0, 0, 64, 64), split=split, truth=[])])
    finish(tmp_path / "tiles-made", {"splits": {"train_1": 1, "train_2": 1, "val_1": 1}})
    asked = recipe(supplement=supplement)

    def job():
        splits = {"split": split, "val_split": "val_1"}
        return train_job(
            asked,
            tmp_path,
            "s",
            asked.train.student,
            tiles=tmp_path / "tiles-made",
            soft_labels=store,
            threshold=0.3,
            **splits,
        )

    if problem is None:
        assert job().soft.supplement.of(split) == {"train_1": "train_2"}.get(split, "train_1")
    else:
        with pytest.raises(RecipeError, match=rf"train\.soft\.supplement\.split.*{problem}"):
            job()


def test_later_rounds_know_nothing_of_the_teacher_s_calibration():
    asked = recipe(rounds=2)
    train = asked.train.model_copy(update={"calibration": "calibration.json"})
    with pytest.raises(RecipeError, match=r"train\.soft\.rounds is above 1, and train\.calibration"):
        check_soft(asked.model_copy(update={"train": train}), [0.3])
    assert asked.train.soft.of_labels() == Soft()  # a student's own round
