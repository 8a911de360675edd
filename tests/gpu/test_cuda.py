"""What a CUDA device finds, against a CPU; skipped where there is none."""

import copy
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from softlabel.boxes import iou_matrix
from softlabel.detectors.batch_nms import START, suppressed_batch
from softlabel.detectors.resize import resized
from softlabel.detectors.weights import load_model
from softlabel.detectors.yolo import YoloDetector
from softlabel.records import Nms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
SHAPES = [(96, 96)] * 9 + [(50, 96)] * 3 + [(128, 40)] * 2


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    small = [torch.from_numpy(rng.integers(0, 256, (1, 3, h // 8, w // 8))).float() for h, w in SHAPES]
    grown = [
        torch.nn.functional.interpolate(one, size=s, mode="bilinear") for one, s in zip(small, SHAPES, strict=True)
    ]
    return [np.ascontiguousarray(one[0].permute(1, 2, 0).to(torch.uint8).numpy()) for one in grown]


@pytest.fixture(scope="module", params=["talkative_model", "talkative_anchor_model"])
def model(request):
    return request.getfixturevalue(request.param)


def detector(model, device, nms=None, **options):
    return YoloDetector(copy.deepcopy(model), 96, nms or Nms(0.05), device, **options)


def exactly():
    """Convolutions in float32 proper, not in TF32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def test_float32_finds_the_same_boxes(model, images):
    exactly()
    for ours, theirs in zip(
        detector(model, CUDA, batch_size=4).detect(images), detector(model, CPU).detect(images), strict=True
    ):
        assert len(ours.boxes) == len(theirs.boxes)
        rows, others = (np.column_stack([one.boxes / 1e-3, one.scores / 1e-4]) for one in (ours, theirs))
        assert torch.cdist(torch.from_numpy(rows), torch.from_numpy(others), p=float("inf")).amin(1).max() < 1


def test_a_graph_finds_what_single_kernels_find(model, images):
    exactly()
    many = images[:9] * 8
    graphs, kernels = (detector(model, CUDA, batch_size=8) for _ in range(2))
    kernels._pipeline._capturable = False
    found = [one.detect(many) for one in (graphs, kernels)]
    assert any(callable(run) for run in graphs._pipeline._runs.values())
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        np.testing.assert_array_equal(ours.scores, theirs.scores)


def test_graphs_of_several_shapes_do_not_disturb_each_other(model, images):
    exactly()
    one = detector(model, CUDA, batch_size=2)
    alone = [one.detect(images[i : i + 1])[0] for i in range(len(images))]
    for turn in range(12):
        order = np.random.default_rng(turn).permutation(len(images))
        for i, found in zip(order, one.detect([images[i] for i in order]), strict=True):
            np.testing.assert_allclose(found.boxes, alone[i].boxes, atol=1e-3)


def test_labelling_at_a_threshold_is_filtering_at_it(model, images):
    low, high = (detector(model, CUDA, Nms(floor), batch_size=4).detect(images) for floor in (0.05, 0.2))
    for everything, some in zip(low, high, strict=True):
        above = everything.above(0.2)
        np.testing.assert_array_equal(above.boxes, some.boxes)
        np.testing.assert_array_equal(above.scores, some.scores)


def test_nothing_waits_for_the_device_while_a_pass_is_launched(model, images):
    one = detector(model, CUDA, batch_size=4)
    one.detect(images)
    pipeline = one._pipeline
    torch.cuda.synchronize()
    with torch.inference_mode(), pipeline._queue.computing():
        selection = one._selection(one.geometry((96, 96)))
        tiles = pipeline._queue.pinned((4, 96, 96, 3), torch.uint8)
        torch.cuda.set_sync_debug_mode("error")
        try:
            kept = pipeline._run(selection, pipeline._queue.upload(tiles), START)
            into = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in (kept.rows, kept.count)]
            done = pipeline._queue.download([kept.rows, kept.count], into)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    done.synchronize()
    for copied, found in zip(into, (kept.rows, kept.count), strict=True):
        torch.testing.assert_close(copied, found.cpu(), rtol=0, atol=0, equal_nan=True)


def test_nms_and_resizing_are_the_cpu_s_to_the_last_bit():
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.integers(0, 100, (4, 2, 3000)), rng.integers(1, 30, (4, 2, 3000))], 1)
    decoded = torch.from_numpy(np.concatenate([boxes, np.round(rng.random((4, 3, 3000)), 2)], 1)).float()
    here, there = (suppressed_batch(decoded.to(device), 3, Nms(0.1, 0.6), START) for device in (CPU, CUDA))
    for ours, theirs in ((here.count, there.count), (here.effort, there.effort)):
        assert torch.equal(ours, theirs.cpu())
    for count, ours, theirs in zip(here.count, here.rows, there.rows.cpu(), strict=True):
        assert torch.equal(ours[:count, :-1], theirs[:count, :-1])
        torch.testing.assert_close(ours[:count, -1], theirs[:count, -1], rtol=1e-5, atol=0, equal_nan=True)
    tiles = torch.from_numpy(rng.integers(0, 256, (3, 70, 90, 3), dtype=np.uint8))
    for size in ((100, 128), (35, 45), (33, 41)):
        assert torch.equal(resized(tiles, size), resized(tiles.to(CUDA), size).cpu())


def test_float16_finds_nearly_the_same():
    """On real images by real weights."""
    weights, folder = os.environ.get("SOFTLABEL_GPU_WEIGHTS"), os.environ.get("SOFTLABEL_GPU_IMAGES")
    if not weights or not folder:
        pytest.skip("SOFTLABEL_GPU_WEIGHTS and SOFTLABEL_GPU_IMAGES name a teacher and a folder of its images")
    real = [np.ascontiguousarray(cv2.imread(str(path))[..., ::-1]) for path in sorted(Path(folder).glob("*.jpg"))[:64]]
    exactly()
    reference, found = (
        YoloDetector(*sized(weights), Nms(0.05), device, precision=precision).detect(real)
        for device, precision in ((CPU, "float32"), (CUDA, "float16"))
    )
    matched = total = 0
    for ours, theirs in zip(found, reference, strict=True):
        sure = theirs.above(0.25)
        near = iou_matrix(sure.boxes, ours.boxes) >= 0.9
        near &= np.abs(sure.best[:, None] - ours.best[None]) <= 0.02
        near &= sure.class_ids[:, None] == ours.class_ids[None]
        matched, total = matched + int(near.any(1).sum()), total + len(sure.boxes)
    print(f"{matched} of {total} boxes matched")
    assert total and matched >= 0.99 * total


def sized(weights):
    model, header = load_model(weights)
    return model, header.imgsz
