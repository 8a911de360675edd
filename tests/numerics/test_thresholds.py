"""Thresholds that cost no student, on scores whose making is known."""

import numpy as np
import pytest
from judged_tiles import CLASSES, make_tile

from softlabel.evaluation.thresholds import at_precision, of_mixture

HERE, NOWHERE = (10, 10, 20, 20), (80, 0, 90, 5)


def judged(chance_of, class_id=0, number=4000, seed=0):
    """Tiles of one object and one label each, that hits it with a chance that depends on its score."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.02, 0.98, number)
    boxes = [HERE if rng.random() < chance_of(score) else NOWHERE for score in scores]
    return [make_tile([(HERE, class_id, False)], [(box, class_id, s)]) for box, s in zip(boxes, scores, strict=True)]


def test_labels_are_right_often_enough_above_the_threshold():
    tiles = judged(lambda score: score**2)
    for precision in (0.25, 0.5, 0.8):
        found = at_precision(tiles, CLASSES, precision, per_class=False)
        assert found == pytest.approx(precision**0.5, abs=0.06)


def test_each_class_has_its_own_and_a_rare_one_that_of_all():
    tiles = judged(lambda score: score) + judged(lambda score: score**3, class_id=1)
    tiles += judged(lambda score: 1.0, class_id=2, number=5)
    found = at_precision(tiles, CLASSES, 0.5, per_class=True)
    assert found["plane"] == pytest.approx(0.5, abs=0.06)
    assert found["ship"] == pytest.approx(0.5 ** (1 / 3), abs=0.06)
    assert found["truck"] == at_precision(tiles, CLASSES, 0.5, per_class=False)


def test_no_label_is_right_so_often():
    assert at_precision(judged(lambda score: 0.2), CLASSES, 0.9, per_class=False) is None
    assert at_precision([make_tile([], [])], CLASSES, 0.5, per_class=True) is None


def test_a_mixture_parts_its_two_heaps():
    """Of equal width they part in the middle of their means if they are as large, else nearer the smaller."""
    rng = np.random.default_rng(0)
    low, high = rng.normal(0.3, 0.08, 9000), rng.normal(0.6, 0.08, 9000)
    for few in (9000, 900):
        scores = np.concatenate([low, high[:few]]).astype(np.float32)
        found = of_mixture(scores, np.zeros(len(scores), np.int64), CLASSES, per_class=False)
        # equal densities: w1 N(x; 0.3) = w2 N(x; 0.6), so x = 0.45 + 0.08^2 ln(w1 / w2) / 0.3
        assert found == pytest.approx(0.45 + 0.08**2 / 0.3 * np.log(9000 / few), abs=0.01)


def test_a_class_of_few_labels_has_the_mixture_of_all():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0.2, 0.05, 500), rng.normal(0.7, 0.05, 500), [0.9] * 5]).astype(np.float32)
    ids = np.array([0] * 1000 + [2] * 5)
    found = of_mixture(scores, ids, CLASSES, per_class=True)
    assert found["ship"] == found["truck"] == of_mixture(scores, ids, CLASSES, per_class=False)
    assert set(found) == set(CLASSES)
    assert of_mixture(scores[:5], ids[:5], CLASSES, per_class=True) is None
    assert of_mixture(np.full(99, 0.5, np.float32), np.zeros(99, np.int64), CLASSES, per_class=False) is None
