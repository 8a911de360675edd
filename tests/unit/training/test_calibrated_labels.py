"""What a calibration changes is counted as it is trained on."""

from conftest import CLASSES, tiny_recipe
from made_stores import detections, made_store, made_tile

from softlabel.calibration import Calibration, Mapping
from softlabel.evaluation.run import quality
from softlabel.workflows.search import _labels_kept

DOUBTS = Mapping(scores=(0.0, 1.0), chances=(0.0, 0.5))  # every score is worth half


def test_labels_are_counted_and_judged_as_the_calibration_maps_them(tmp_path):
    box = (10, 10, 30, 30)
    truth = [{"box": list(box), "class_id": 0, "ignore": False, "visible": 1.0}]
    tile = made_tile("a", (0, 0, 64, 64), detections((*box, 0, 0.8)), split="train_2", truth=truth)
    store = made_store(tmp_path, [tile])
    path = tmp_path / "calibration.json"
    path.write_text(Calibration(CLASSES, (DOUBTS,) * 3, (0.5,) * 3).to_json())
    plain = tiny_recipe()
    mapped = tiny_recipe(train={**plain.train.model_dump(), "calibration": str(path)})
    tiles = tmp_path / "tiles-made"
    for recipe, at_07, at_03 in ((plain, 1, 1), (mapped, 0, 1)):
        kept = _labels_kept(recipe, tiles, "train_2", store)
        assert (kept["0.7"]["all"], kept["0.3"][CLASSES[0]]) == (at_07, at_03)
        rows = quality(recipe, tiles, "train_2", store, [0.7, 0.3])
        assert [row["recall"] for row in rows if row["class"] == CLASSES[0]] == [at_07, at_03]
