"""What categorize takes for truth."""

from conftest import CLASSES, tiny_recipe
from made_stores import made_store, made_tile

from softlabel.results.stores import open_store
from softlabel.workflows.categorize import _truth_counts


def boxes(*class_ids):
    return [
        {"box": [40.0 * i, 0.0, 40.0 * i + 20, 20.0], "class_id": k, "ignore": False, "visible": 1.0}
        for i, k in enumerate(class_ids)
    ]


def test_a_scene_counts_for_the_classes_that_were_searched_for_in_it(tmp_path):
    made = [
        made_tile("a", (0, 0, 128, 128), truth=boxes(0, 0, 1), labelled_classes=[0, 1]),
        made_tile("b", (0, 0, 128, 128), truth=boxes(2)),
        made_tile("c", (0, 0, 128, 128), truth=None),
    ]
    counts = _truth_counts(tiny_recipe(), open_store(made_store(tmp_path, made)))
    assert [counts[name] for name in CLASSES] == [{"a": 2, "b": 0}, {"a": 1, "b": 0}, {"b": 1}]
