"""Calibration against scikit-learn and brute force."""

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from softlabel.calibration import Calibration, Mapping, read_calibration
from softlabel.errors import StoreError
from softlabel.evaluation.calibrate import _fit, calibrate, expected_calibration_error
from softlabel.evaluation.matching import TileResult
from softlabel.records import Detections, Truth

CLASSES = ("car", "plane")


def sample(num=2000, seed=0, chance=lambda s: s**3):
    """Scores, and whether each box is right: with a chance that is not its score."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0, 1, num).round(3).astype(np.float32)
    return scores, rng.uniform(0, 1, num) < chance(scores)


def test_isotonic_is_scikit_learns():
    scores, right = sample()
    mapping = _fit(scores, right, "isotonic")
    reference = IsotonicRegression(out_of_bounds="clip").fit(scores, right)
    at = np.linspace(0, 1, 1001).astype(np.float32)
    np.testing.assert_allclose(mapping(scores), reference.predict(scores), atol=1e-5)
    np.testing.assert_allclose(mapping(at), reference.predict(at), atol=1e-5)


def test_a_temperature_is_the_likeliest():
    def chance(scores, temperature=2.5):
        logits = np.log(np.clip(scores, 1e-6, 1 - 1e-6) / (1 - np.clip(scores, 1e-6, 1 - 1e-6)))
        return 1 / (1 + np.exp(-logits / temperature))

    scores, right = sample(20_000, chance=chance)
    assert _fit(scores, right, "temperature").temperature == pytest.approx(2.5, rel=0.1)


def test_the_error_is_what_brute_force_says():
    scores, right = sample(500)
    total = 0.0
    for low in np.arange(15) / 15:
        inside = [(s, r) for s, r in zip(scores, right, strict=True) if int(min(s * 15, 14)) == round(low * 15)]
        if inside:
            s, r = zip(*inside, strict=True)
            total += len(inside) * abs(np.mean(s) - np.mean(r))
    assert expected_calibration_error(scores, right) == pytest.approx(total / 500, abs=1e-6)
    assert expected_calibration_error(scores[:0], right[:0]) is None


def bent(best, class_ids):
    """Cars are overconfident, planes shy."""
    return np.where(class_ids == 0, best**3, np.sqrt(best))


def heated(best, class_ids):
    """Cars too extreme, planes too timid: what a temperature can mend."""
    logits = np.log(best / (1 - np.minimum(best, 0.9999)))
    return 1 / (1 + np.exp(-logits * np.where(class_ids == 0, 0.3, 3)))


def tiles_of(num_tiles=60, seed=0, chance=bent):
    """Ten boxes a tile far from each other; what is right has truth under it."""
    rng = np.random.default_rng(seed)
    tiles = []
    for _ in range(num_tiles):
        class_ids, best = rng.integers(0, 2, 10), rng.uniform(0.02, 1, 10).astype(np.float32)
        right = rng.uniform(0, 1, 10) < chance(best, class_ids)
        boxes = np.array([[20 * i, 0, 20 * i + 10, 10] for i in range(10)], np.float32)
        scores = np.zeros((10, 2), np.float32)
        scores[np.arange(10), class_ids] = best
        order = np.argsort(-best)
        truth = Truth(boxes[right], class_ids[right].astype(np.int32), np.zeros(right.sum(), bool))
        tiles.append(TileResult(truth, Detections(boxes[order], scores[order]), None))
    return tiles


@pytest.mark.parametrize(("method", "chance"), [("isotonic", bent), ("temperature", heated)])
def test_scores_come_nearer_to_chances_on_tiles_left_out(method, chance):
    tiles = tiles_of(400, chance=chance)
    found, rows = calibrate(tiles, CLASSES, [f"group {i // 2}" for i in range(len(tiles))], method)
    *by_class, everything = rows
    assert sum(row["boxes"] for row in by_class) == everything["boxes"] == 4000
    assert all(row["ece_calibrated"] < 0.3 * row["ece"] for row in by_class), rows
    assert found.classes == CLASSES and all(0 < threshold < 1 for threshold in found.thresholds)


def test_a_threshold_is_where_f1_is_best():
    tiles = tiles_of()
    found, _ = calibrate(tiles, CLASSES, [str(i) for i in range(len(tiles))], "isotonic")
    for k, mapping in enumerate(found.mappings):
        pairs = [
            (float(mapping(one.detections.best[i : i + 1])[0]), bool((one.truth.boxes == box).all(axis=1).any()))
            for one in tiles
            for i, box in enumerate(one.detections.boxes)
            if one.detections.class_ids[i] == k
        ]
        total = sum(right for _, right in pairs)

        def f1(threshold, pairs=pairs, total=total):
            kept = [right for chance, right in pairs if chance > threshold]
            return 2 * sum(kept) / (len(kept) + total)

        assert f1(found.thresholds[k]) == pytest.approx(max(f1(t) for t, _ in [(-1, 0), *pairs]), abs=1e-9)


def test_a_class_with_too_few_boxes_keeps_its_scores():
    tiles = tiles_of(2)
    found, rows = calibrate(tiles, CLASSES, ["a", "b"], "isotonic")
    assert [row.get("mapped") for row in rows] == [False, False, None]
    scores = np.linspace(0.01, 0.99, 50).astype(np.float32)
    np.testing.assert_allclose(found.mappings[0](scores), scores, atol=1e-6)


def test_mapped_vectors_are_ordered_anew_and_may_change_their_class():
    found = Detections(
        np.array([[0, 0, 1, 1], [2, 2, 3, 3]], np.float32), np.array([[0.9, 0.5], [0.6, 0.1]], np.float32)
    )
    calibration = Calibration(
        CLASSES,
        (Mapping(None, (0.0, 1.0), (0.0, 0.5)), Mapping(None, (0.0, 0.4, 0.5, 1.0), (0.0, 0.1, 0.8, 1.0))),
        (0.1, 0.1),
    )
    mapped = calibration.apply(found)
    assert mapped.class_ids.tolist() == [1, 0] and (np.diff(mapped.best) <= 0).all()
    np.testing.assert_allclose(mapped.scores[1], [0.3, 0.025], atol=1e-6)
    swapped = calibration.apply(Detections(found.boxes, np.array([[0.3, 0.2], [0.2, 0.9]], np.float32)))
    assert swapped.boxes[0].tolist() == [2, 2, 3, 3]


def test_it_travels_as_json(tmp_path):
    tiles = tiles_of()
    found, _ = calibrate(tiles, CLASSES, [str(i) for i in range(len(tiles))], "isotonic")
    path = tmp_path / "calibration.json"
    with pytest.raises(StoreError, match="no calibration at"):
        read_calibration(path, CLASSES)
    path.write_text(found.to_json())
    assert read_calibration(path, CLASSES) == found
    with pytest.raises(StoreError, match="is for the classes car, plane, the recipe has ship"):
        read_calibration(path, ("ship",))
    path.write_text("{}")
    with pytest.raises(StoreError, match="is no calibration"):
        read_calibration(path, CLASSES)
