"""Tiles with truth and detections, for what judges them."""

import numpy as np

from softlabel.evaluation.matching import TileResult
from softlabel.records import Detections, Truth

CLASSES = ("plane", "ship", "truck")


def make_tile(truth, detections, *, labelled=None, num_classes=3):
    """From truth (box, class_id, ignore) and detections (box, class_id, score)."""
    scores = np.zeros((len(detections), num_classes), np.float32)
    for row, (_, class_id, score) in zip(scores, detections, strict=True):
        row[:] = 0.001
        row[class_id] = score
    return TileResult(
        Truth(
            np.array([box for box, _, _ in truth], np.float32).reshape(-1, 4),
            np.array([class_id for _, class_id, _ in truth], np.int32),
            np.array([ignore for _, _, ignore in truth], bool),
        ),
        Detections(np.array([box for box, _, _ in detections], np.float32).reshape(-1, 4), scores),
        labelled,
    )


def random_tiles(seed, *, noise_px=2.0, number=8, ties=True):
    """The truth depends on the tile alone, the detections on the seed as well; crowded, with ignored truth."""
    return [_random_tile(index, seed, noise_px, ties) for index in range(number)]


def _random_tile(index, seed, noise_px, ties):
    rng = np.random.default_rng(index)
    number = int(rng.integers(0, 9))
    corner = rng.uniform(0, 60, (number, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(8, 30, (number, 2))], axis=1)
    truth = list(zip(boxes, rng.integers(0, 1 + index % 3, number), rng.random(number) < 0.2, strict=True))
    rng = np.random.default_rng([index, seed])
    source = [truth[i] for i in rng.integers(0, number, 2 * number)]
    found = [(box + rng.normal(0, noise_px, 4), class_id, rng.uniform(0.05, 1)) for box, class_id, _ in source]
    noise = [((a, a, a + 15, a + 9), rng.integers(0, 3), rng.uniform(0.05, 0.6)) for a in rng.uniform(0, 80, 5)]
    detections = [(box, class_id, round(score, 1) if ties else score) for box, class_id, score in found + noise]
    return make_tile(truth, sorted(detections, key=lambda row: -row[2]))
