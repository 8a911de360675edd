import numpy as np
import pytest

from softlabel.config import TruthSource
from softlabel.imagery.truth import SceneTruth, lookalike, match_scenes, truth_digest


def test_boxes_are_fitted_to_their_image():
    bounds = ["0,0,10,10", "-5,-5,4,4", "60,40,70,50", "64,0,70,9", "-9,0,0,9", "0,48,5,50", "1,1,1.001,5"]
    boxes, count = np.array([bound.split(",") for bound in bounds], np.float64), len(bounds)
    truth = SceneTruth("truth", boxes, np.ones(count, np.int32), np.zeros(count, bool), np.arange(count))
    fitted, rejected = truth.fitted(64, 48)
    np.testing.assert_array_equal(fitted.boxes, [[0, 0, 10, 10], [0, 0, 4, 4], [60, 40, 64, 48]])
    assert fitted.rows.tolist() == [0, 1, 2] and fitted.class_ids.tolist() == [1, 1, 1]
    assert [row.row for row in rejected] == [3, 4, 5, 6]
    assert all("outside its image of 64x48" in row.reason for row in rejected)


@pytest.mark.parametrize(
    "names, scene_ids, expected",
    [
        (["a.tif"], ["a.tif"], {"a.tif": "a.tif"}),
        (["x/a.tif"], ["a.tif"], {"x/a.tif": "a.tif"}),
        (["a.tif"], ["x/a.tif"], {"a.tif": "x/a.tif"}),
        (["a.tif"], ["x/a.tif", "y/a.tif"], {}),  # ambiguous
        (["a.tif"], ["a.tif", "y/a.tif"], {"a.tif": "a.tif"}),
        (["x/a.tif", "y/a.tif"], ["a.tif"], {}),
        (["i/x/a.tif", "i/y/a.tif"], ["x/a.tif", "y/a.tif"], {"i/x/a.tif": "x/a.tif", "i/y/a.tif": "y/a.tif"}),
        (["x/a.tif", "y/a.tif"], ["x/a.tif"], {"x/a.tif": "x/a.tif"}),
        (["P1", "P2.5"], ["t/P1.png", "t/P2.5.png"], {"P1": "t/P1.png", "P2.5": "t/P2.5.png"}),
        (["P1"], ["P1.png", "P1.tif"], {}),
        (["a.png"], ["a.tif"], {}),
        ([], ["a.tif"], {}),
        (["x\\a b.tif"], ["x/a b.tif"], {"x\\a b.tif": "x/a b.tif"}),
        (["x/a%20b.tif"], ["x/a b.tif"], {"x/a%20b.tif": "x/a b.tif"}),
        (["a b.tif"], ["a%20b.tif"], {"a b.tif": "a%20b.tif"}),
        (["a.tif?version=2"], ["a.tif"], {"a.tif?version=2": "a.tif"}),
        (["Zu\u0308rich.tif"], ["Z\u00fcrich.tif"], {"Zu\u0308rich.tif": "Z\u00fcrich.tif"}),
        (["a%20b.tif"], ["a%20b.tif", "a b.tif"], {"a%20b.tif": "a%20b.tif"}),  # the one of that very name
        (["a%20b.tif"], ["x/a b.tif", "y/a b.tif"], {}),
        (["a%20b.tif", "a b.tif?x"], ["a b.tif"], {}),
        (["A.tif"], ["a.tif"], {}),
    ],
)
def test_match_scenes(names, scene_ids, expected):
    assert match_scenes(names, scene_ids) == expected


@pytest.mark.parametrize(
    ("name", "scene_id"),
    [("A.TIF", "a.tif"), ("a .tif", "a.tif"), ("x/a.tif", "\uff41.tif"), ("a\u00a0b.tif", "a b.tif"), ("a.tif", None)],
)
def test_names_that_look_the_same(name, scene_id):
    assert lookalike(name, ["b.tif", *([scene_id] if scene_id else [])]) == scene_id


def test_truth_digest_follows_every_label_file(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .1 .1")
    (tmp_path / "data.yaml").write_text("{train: images, names: [plane, car]}")
    yolo = TruthSource(format="yolo", path=str(tmp_path / "data.yaml"))
    dota = TruthSource(format="dota", path=str(tmp_path / "labels"))
    before = truth_digest(yolo), truth_digest(dota)
    assert before == (truth_digest(yolo), truth_digest(dota))
    (tmp_path / "labels" / "a.txt").write_text("1 .5 .5 .1 .1")
    assert all(old != new for old, new in zip(before, (truth_digest(yolo), truth_digest(dota)), strict=True))
    changed = truth_digest(yolo)
    (tmp_path / "images" / "background.jpg").touch()  # it has no label file, and is truth all the same
    assert truth_digest(yolo) != changed
