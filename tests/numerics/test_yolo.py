"""The detector against ultralytics' own pieces, and promise 1: filtering at t equals labelling at t."""

import copy

import numpy as np
import pytest
import torch
from ultralytics.utils.nms import non_max_suppression

from softlabel.boxes import iou_matrix
from softlabel.detectors.header import Header
from softlabel.detectors.nms import suppressed
from softlabel.detectors.tile_loss import mean_losses
from softlabel.detectors.weights import build_model, load_matching, load_model, save_weights
from softlabel.detectors.yolo import YoloDetector
from softlabel.errors import WeightsError
from softlabel.records import Nms, Truth

CLASSES = ("car", "plane", "ship")


@pytest.fixture(params=["talkative_model", "talkative_anchor_model"])
def model(request):
    """One of ultralytics' own, and YOLOv5 with its anchors and objectness."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    shapes = [(96, 96), (96, 96), (50, 96), (128, 40), (96, 96)]
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def detector(model, batch_size=16, **nms):
    return YoloDetector(copy.deepcopy(model), 96, Nms(**nms), torch.device("cpu"), batch_size=batch_size)


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("max_det", [1000, 40])
def test_filtering_at_a_threshold_equals_labelling_at_it(model, images, threshold, max_det):
    low = detector(model, floor=0.01, max_det=max_det).detect(images)
    high = detector(model, floor=threshold, max_det=max_det).detect(images)
    assert sum(len(found.boxes) for found in high) > 0
    assert sum(len(found.boxes) for found in low) > sum(len(found.boxes) for found in high) or max_det == 40
    for filtered, labelled in zip([found.above(threshold) for found in low], high, strict=True):
        np.testing.assert_array_equal(filtered.boxes, labelled.boxes)
        np.testing.assert_array_equal(filtered.scores, labelled.scores)
        np.testing.assert_array_equal(filtered.objectness, labelled.objectness)
        # Not their agreement: more candidates are above a low floor. What is known at the threshold is known there too.
        assert len(filtered.agreement) == len(labelled.agreement) == len(labelled.boxes)
        assert not np.isnan(filtered.agreement[~np.isnan(labelled.agreement)]).any()


def test_candidates_of_a_model_agree_where_there_is_nms(model, images):
    known = np.concatenate([one.agreement for one in detector(model, iou=0.5).detect(images)])
    known = known[~np.isnan(known)]
    assert len(known) > 10 and known.min() > 0.5 and known.max() <= 1 and known.dtype == np.float32
    assert all(one.agreement is None for one in detector(model, iou=1.0).detect(images))


@pytest.mark.parametrize("crowd", [1, 3, 30])  # boxes around each object, so that NMS leaves all, a third, few
@pytest.mark.parametrize("max_det", [5, 60, 1000])
def test_what_a_cut_tile_keeps_is_the_best_of_what_nms_keeps_of_all(crowd, max_det):
    rng = np.random.default_rng(crowd)
    centres_2A = np.repeat(rng.uniform(0, 2000, (2, 900 // crowd)), crowd, axis=1) + rng.normal(0, 1, (2, 900))
    decoded = torch.from_numpy(np.concatenate([centres_2A, np.full((2, 900), 20.0), rng.random((3, 900))])).float()
    everything = suppressed(decoded, 3, Nms(floor=0.1, max_det=10_000))
    kept = suppressed(decoded, 3, Nms(floor=0.1, max_det=max_det))
    assert torch.equal(kept[:, :-1], everything[: max_det + 1, :-1])  # all but the agreement
    boxes, best, class_ids = everything[:, :4], *everything[:, 4:-1].max(1)
    assert (best.diff() <= 0).all()
    near = iou_matrix(boxes.double().numpy(), boxes.double().numpy()) > 0.7 + 1e-6
    assert not (near & (class_ids[:, None] == class_ids).numpy() & ~np.eye(len(boxes), dtype=bool)).any()


def test_saturation_is_said_and_only_where_something_was_cut(model, images):
    everything = detector(model, floor=0.01).detect(images)
    counts = [len(found.boxes) for found in everything]
    limit = sorted(counts)[2]
    cut = detector(model, floor=0.01, max_det=limit).detect(images)
    assert not any(found.saturated for found in everything)
    # max_det counts boxes beyond the edge too, which have no area in the tile and are left out afterwards.
    assert all(found.saturated for found, count in zip(cut, counts, strict=True) if count > limit)
    assert not any(found.saturated for found in detector(model, floor=0.01, max_det=2 * max(counts)).detect(images))
    assert any(found.saturated for found in cut) and not all(found.saturated for found in cut)


def test_boxes_and_vectors_equal_ultralytics_own_nms(model, images):
    square = [images[0], images[1]]
    found = detector(model, floor=0.05).detect(square)
    x = torch.from_numpy(np.stack(square)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        decoded, _ = copy.deepcopy(model).eval().fuse(verbose=False)(x)
    for i, theirs in enumerate(non_max_suppression(decoded, 0.05, 0.7, max_det=1000, nc=3)):
        ours, boxes = found[i], theirs[:, :4].clamp(0, 96)
        with_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        theirs, boxes = theirs[with_area], boxes[with_area]
        np.testing.assert_allclose(ours.boxes, boxes.numpy(), atol=1e-3)
        np.testing.assert_allclose(ours.best, theirs[:, 4].numpy(), atol=1e-5)
        np.testing.assert_array_equal(ours.class_ids, theirs[:, 5].numpy().astype(int))
        assert ours.scores.shape == (len(boxes), 3) and len(boxes) > 0
        distances = torch.cdist(torch.from_numpy(ours.scores), decoded[i, 4:7].T.contiguous(), p=float("inf"))
        assert float(distances.amin(1).max()) < 1e-5  # whole vectors, as the head gave them
        if theirs.shape[1] > 6:
            np.testing.assert_allclose(ours.objectness, theirs[:, 6].numpy(), atol=1e-5)
            assert (ours.scores <= ours.objectness[:, None]).all()
        else:
            assert ours.objectness is None


def test_a_tile_s_boxes_do_not_depend_on_its_batch(model, images):
    model = copy.deepcopy(model)
    for branch in getattr(model.model[-1], "cv3", []):  # sums of terms near 50 are rounded by more than the bound below
        branch[-1].weight.data *= 0.1
    together = detector(model, floor=0.03).detect(images)
    for image, found in zip(images, together, strict=True):
        alone = detector(model, floor=0.03).detect([image])[0]
        assert len(found.boxes) == len(alone.boxes)
        # Row by row but for the order of equal scores, which rounding may turn.
        rows, others = (torch.from_numpy(np.c_[one.boxes, one.scores * 100]) for one in (found, alone))
        assert float(torch.cdist(rows, others, p=float("inf")).amin(1).max()) < 1e-2


def test_boxes_lie_in_their_tile_and_have_area(model, images):
    for image, found in zip(images, detector(model, floor=0.001).detect(images), strict=True):
        height, width = image.shape[:2]
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 2] <= width).all() and (found.boxes[:, 3] <= height).all()
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_nothing_in_nothing_out(model):
    assert detector(model).detect([]) == []


def test_losses_of_tiles_add_up_to_the_loss_of_the_batch(model, images):
    truths = [
        Truth(np.array([[10, 10, 40, 50]], np.float32), np.array([1], np.int32), np.array([False])),
        Truth(np.array([[5, 60, 30, 90], [50, 50, 70, 80]], np.float32), np.array([0, 2], np.int32), np.zeros(2, bool)),
    ]
    one = detector(model)
    ours = mean_losses(one.loss_names(), one.losses([images[0], images[1]], truths))
    reference = copy.deepcopy(model).eval().fuse(verbose=False)
    x = torch.from_numpy(np.stack(images[:2])).permute(0, 3, 1, 2).float() / 255
    boxes = np.concatenate([truth.boxes for truth in truths])
    batch = {
        "img": x,
        "batch_idx": torch.tensor([0.0, 1, 1]),
        "cls": torch.tensor([[1.0], [0], [2]]),
        "bboxes": torch.from_numpy(np.c_[(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]] / 96),
    }
    with torch.inference_mode():
        _, items = reference.loss(batch)
    theirs = {name.removesuffix("_loss"): float(value) for name, value in items.items()}
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_each_tile_gets_its_own_losses_whatever_its_batch(model, images):
    box = np.array([[10, 10, 30, 35]], np.float32)
    truths = [Truth(box + 2 * i, np.array([i % 3], np.int32), np.array([False])) for i in range(len(images))]
    together = detector(model, batch_size=2).detect_with_losses(images, truths)
    for image, truth, (found, losses) in zip(images, truths, together, strict=True):
        ((alone, own_losses),) = detector(model).detect_with_losses([image], [truth])
        assert losses == pytest.approx(own_losses, rel=1e-3, abs=1e-5)
        assert len(found.boxes) == len(alone.boxes)


def test_ignored_truth_is_left_out_of_the_loss(model, images):
    box = np.array([[10, 10, 40, 50]], np.float32)
    ignored = Truth(box, np.array([1], np.int32), np.array([True]))
    one = detector(model)
    assert one.losses([images[0]], [ignored]) == one.losses([images[0]], [Truth.from_row(None)])


def test_weights_come_back_as_they_were_saved(model, images, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, model, Header(model.yaml, CLASSES, 96, {}))
    loaded, header = load_model(path)
    assert (header.classes, header.imgsz) == (CLASSES, 96)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value)
    found = YoloDetector.from_weights(path, Nms(floor=0.05)).detect(images)
    for ours, theirs in zip(found, detector(model, floor=0.05).detect(images), strict=True):
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-3)


def test_tensors_that_fit_start_another_class_list(model, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, model, Header(model.yaml, CLASSES, 96, {}))
    other = build_model(model.yaml, 5)
    fitting, total = load_matching(other, path)
    assert 300 < fitting < total
    torch.testing.assert_close(other.state_dict()["model.0.conv.weight"], model.state_dict()["model.0.conv.weight"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not tensors", b"\x80\x04cposix\nsystem\n."])
def test_what_is_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_model(path)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"no weights at .*gone\.safetensors"):
        load_model(tmp_path / "gone.safetensors")
