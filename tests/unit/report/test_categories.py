"""What a vocabulary found, in numbers."""

import numpy as np
import pytest

from softlabel.report.categories import Census, Example, against_truth

CLASSES = ("plane", "ship", "tree")


def scores(*pairs):
    """A class vector per (class, score)."""
    found = np.full((len(pairs), 3), 0.01, np.float32)
    for row, (k, score) in enumerate(pairs):
        found[row, k] = score
    return found


@pytest.fixture
def census():
    found = Census(CLASSES, 2)
    found.add_scene("a", scores((0, 0.9), (0, 0.5), (1, 0.3)))
    found.add_scene("b", scores((1, 0.6)))
    found.add_scene("c", np.zeros((0, 3), np.float32))
    return found


def test_objects_are_counted_by_class_and_scene(census):
    assert census.num_scenes == 3
    assert census.counts() == {"plane": {"a": 2}, "ship": {"a": 1, "b": 1}, "tree": {}}
    ship, plane, tree = census.table()
    assert (ship["class"], ship["scenes"], ship["objects"], ship["per_scene"]) == ("ship", 2, 2, 1)
    assert (plane["class"], plane["scenes"], plane["objects"], plane["per_scene"]) == ("plane", 1, 2, 2)
    assert tree == {"class": "tree", "objects": 0, "scenes": 0, "per_scene": None, "median": None}
    assert census.histograms_KB.sum(axis=1).tolist() == [2, 2, 0]
    assert ship["median"] == pytest.approx(0.305, abs=0.011)
    assert {row["best"] for row in census.rows if row["class"] == "plane"} == {0.9}


def test_the_surest_boxes_are_kept(census):
    for score in (0.2, 0.9, 0.5, 0.7):
        census.add_example(0, Example(score, f"tile {score}", (0, 0, 1, 1)))
    assert [example.score for example in census.examples[0]] == [0.9, 0.7]
    assert census.examples[1] == []


def test_against_truth():
    found = {"plane": {"a": 2, "b": 1}, "ship": {}, "tree": {"a": 5}}
    truth = {"plane": {"a": 3, "b": 0, "c": 1}, "ship": {"a": 0, "b": 2, "c": 0}, "car": {"a": 0, "b": 0, "c": 0}}
    plane, ship, car = against_truth(found, truth)
    assert (plane["presence_precision"], plane["presence_recall"]) == (0.5, 0.5)
    assert plane["count_error"] == pytest.approx((1 + 1 + 1) / 4) and (plane["truth"], plane["found"]) == (4, 3)
    assert (ship["presence_precision"], ship["presence_recall"], ship["count_error"]) == (None, 0.0, 1.0)
    # Nobody looked for planes in b: what was found there is not wrong.
    (only_a,) = against_truth(found, {"plane": {"a": 3}})
    assert (only_a["presence_precision"], only_a["found"], only_a["count_error"]) == (1.0, 2, pytest.approx(1 / 3))
    assert (car["presence_precision"], car["presence_recall"], car["count_error"]) == (None, None, None)
