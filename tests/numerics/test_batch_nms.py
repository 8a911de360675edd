"""NMS of a whole batch against that of one image after the other, and against plain loops."""

import numpy as np
import pytest
import torch
from whole_batches import kept

from softlabel.detectors.batch_nms import BLOCK, Effort, suppressed_batch
from softlabel.detectors.nms import suppressed
from softlabel.detectors.rotated_nms import suppressed_rotated
from softlabel.records import Nms


def made(seed, images, classes, anchors, extra=0, *, side=100, step=0.02):
    """Whole numbers for boxes and few values for scores: full of ties, of scores and of overlaps at the limit."""
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.integers(0, side, (images, 2, anchors)), rng.integers(1, 30, (images, 2, anchors))], 1)
    scores = np.round(rng.random((images, classes, anchors)) ** 3 / step) * step
    return torch.from_numpy(np.concatenate([boxes, scores, rng.random((images, extra, anchors))], 1)).float()


CASES = [
    (3, 1, 900, 0, Nms(0.05, 0.6, 1000)),
    (4, 3, 2000, 1, Nms(0.05, 0.6, 50)),
    (2, 40, 3000, 0, Nms(0.05, 0.5, 300)),
    (3, 2, 5, 0, Nms(0.05, 0.6, 10)),
    (2, 3, 700, 0, Nms(0.05, 1.0, 200)),
    (2, 3, 600, 0, Nms(0.99, 0.6, 200)),
    (2, 2, 800, 0, Nms(0.05, 0.2, 400)),
]


@pytest.mark.parametrize(("images", "classes", "anchors", "extra", "nms"), CASES)
@pytest.mark.parametrize("rotated", [False, True])
def test_it_keeps_what_one_image_after_the_other_keeps(images, classes, anchors, extra, nms, rotated):
    decoded = made(anchors, images, classes, anchors, extra + rotated)
    one = suppressed_rotated if rotated else suppressed
    found, _ = kept(decoded, classes, nms, rotated=rotated)
    for rows, image in zip(found, decoded, strict=True):
        assert_alike(rows, one(image, classes, nms))


def assert_alike(rows, others):
    """To the last bit, but for the agreement, whose sums may have another order."""
    torch.testing.assert_close(rows[:, :-1], others[:, :-1], rtol=0, atol=0)
    torch.testing.assert_close(rows[:, -1], others[:, -1], rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", range(3))
def test_both_are_greedy_class_by_class(seed):
    nms, classes = Nms(0.1, 0.4, 40), 3
    decoded = made(seed, 2, classes, 500, side=60)
    for rows, (boxes, scores) in zip(
        kept(decoded, classes, nms)[0],
        ((image[:4].T.double().numpy(), image[4:].T.double().numpy()) for image in decoded),
        strict=True,
    ):
        corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
        best, ids, chosen = scores.max(1), scores.argmax(1), []
        for i in np.argsort(-best, kind="stable"):
            if best[i] > nms.floor and all(ids[i] != ids[j] or iou(corners[i], corners[j]) <= nms.iou for j in chosen):
                chosen.append(i)
        np.testing.assert_allclose(rows[:, :4], corners[chosen[: nms.max_det + 1]])


def iou(a, b):
    width, height = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    # In float32, as torchvision divides: 0.6 of it is above 0.6.
    return float(np.float32(width * height) / np.float32(area(a) + area(b) - width * height))


def test_classes_far_from_the_first_lose_no_bit_of_their_boxes():
    """Moved apart by their number, box and class together, overlaps of the last classes would be off by 1e-3."""
    boxes = torch.tensor([[50.0, 50.0, 20.0, 20.0], [50.0, 50.0, 20.0, 20.0 * 0.7 + 2e-5]])
    for class_id in (0, 999):
        scores = torch.zeros(2, 1000)
        scores[:, class_id] = torch.tensor([0.9, 0.8])
        decoded = torch.cat([boxes, scores], 1).T
        assert len(suppressed(decoded, 1000, Nms(0.1, 0.7))) == 1
        assert len(kept(decoded[None], 1000, Nms(0.1, 0.7))[0][0]) == 1


def test_a_long_chain_and_many_candidates_take_more_effort():
    """Boxes in a row, each overlapping the next: every second stays, and that is known after as many rounds."""
    count = 400
    x = torch.arange(count) * 5.0
    decoded = torch.stack([x, torch.zeros(count), torch.full((count,), 10.0), torch.full((count,), 10.0)])
    decoded = torch.cat([decoded, 0.9 - torch.arange(count)[None] / 1000])[None]
    ((rows,), effort) = kept(decoded, 1, Nms(0.1, 0.3, 1000))
    assert rows[:, 0].tolist() == [10.0 * i - 5 for i in range(count // 2)]
    assert effort == Effort(2, 256, 256)
    ((rows,), effort) = kept(made(0, 1, 1, 3000, side=5000), 1, Nms(0.0, 0.5, 2500))
    assert effort.blocks == 16 > 3000 // BLOCK and effort.room == 4096 and len(rows) > 2048


def test_no_number_is_no_candidate():
    decoded = made(0, 1, 2, 300)
    decoded[0, 4:, 7] = float("nan")
    ((rows,), _) = kept(decoded, 2, Nms(0.05, 0.5, 300))
    assert_alike(rows, suppressed(decoded[0], 2, Nms(0.05, 0.5, 300)))


def test_memory_does_not_grow_with_the_square_of_the_candidates(is_long):
    """30,000 of a tile, all alike, so that every one of them must be looked at: all pairs of them would be 7 GB of
    float32 for a single tile."""
    images = 64 if is_long else 2
    decoded = torch.full((images, 5, 30_000), 0.5)
    decoded[:, :4] = 100.0
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = suppressed_batch(decoded, 1, Nms(0.01, 0.7, 1000), Effort(128, 8, 1024))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert found.count.tolist() == [1] * images
    assert largest < images * 16e6
