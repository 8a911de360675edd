"""Each format is read as it is meant, and a bad row costs nothing but itself."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml
from pycocotools.mask import encode

from softlabel import rotated
from softlabel.config import TruthSource
from softlabel.errors import TruthError
from softlabel.imagery.truth import read_truth, truth_digest
from softlabel.imagery.truth_formats import XVIEW_CLASSES

XVIEW_MAPPING = {18: "car", "11": "plane", "Bus": "car"}


def feature(bounds="1,2,5,9", type_id=18, image="a.tif"):
    return {"type": "Feature", "properties": {"bounds_imcoords": bounds, "type_id": type_id, "image_id": image}}


def read_xview(tmp_path, features, classes=("plane", "car"), mapping=XVIEW_MAPPING, **settings):
    path = tmp_path / "truth.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return read_truth(TruthSource(format="xview", path=str(path), mapping=mapping, **settings), classes)


def coco(images=None, annotations=None, categories=None):
    images = images or [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}]
    categories = categories or [{"id": 7, "name": "plane"}, {"id": 9, "name": "car"}]
    return {"images": images, "annotations": annotations or [], "categories": categories}


def note(bbox=(1, 2, 4, 7), category=7, image=1, number=1, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), **more}


def read_coco(tmp_path, data, classes=("plane", "car"), **settings):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data))
    return read_truth(TruthSource(format="coco", path=str(path), **settings), classes)


def reasons(found):
    return {row.row: row.reason for row in found.rejected}


def test_xview_has_60_classes():
    assert len(XVIEW_CLASSES) == 60 and len(set(XVIEW_CLASSES.values())) == 60


def test_xview_rows_by_id_and_by_name(tmp_path):
    features = [feature(), feature("3,4,8,6", 19), feature("0,0,2,2", 11, "b.tif")]
    found = read_xview(tmp_path, features)
    assert set(found.scenes) == {"a.tif", "b.tif"} and not found.rejected
    a = found.scenes["a.tif"]
    np.testing.assert_array_equal(a.boxes, [[1, 2, 5, 9], [3, 4, 8, 6]])
    assert (a.class_ids.tolist(), a.rows.tolist(), a.crowd.tolist()) == ([1, 1], [0, 1], [False, False])
    assert found.scenes["b.tif"].class_ids.tolist() == [0]


BAD_FEATURES = [
    (feature(type_id=75), "unknown class 75"),
    (feature(type_id=82), "unknown class 82"),
    (feature(type_id="18a"), "type_id must be a whole number"),
    (feature(type_id=18.5), "type_id must be a whole number"),
    (feature(type_id=True), "type_id must be a whole number"),
    (feature(type_id=10**30), "64 bits"),
    (feature("1,2,5"), "4 numbers"),
    (feature("a,b,c,d"), "4 numbers"),
    (feature("5,2,1,9"), "inverted"),
    (feature("1,2,1,9"), "without area"),
    (feature("nan,2,5,9"), "finite"),
    (feature("1,2,inf,9"), "finite"),
    (feature("1,2,1e300,9"), "finite"),
    (feature([1, 2, 5, 9]), "bounds_imcoords must be a text"),
    (feature(image=None), "image_id must be a text"),
    (feature(image="\ud800"), "image_id must be a text"),
    (feature(image=".."[:1]), "names no file"),
    (feature(type_id=12), "not mapped"),
    ({"properties": None}, "properties must be an object"),
    (None, "feature must be an object"),
    ([[]], "feature must be an object"),
]


@pytest.mark.parametrize("bad, reason", BAD_FEATURES)
def test_a_bad_feature_is_one_rejection_and_loses_nothing_else(tmp_path, bad, reason):
    found = read_xview(tmp_path, [feature(), bad, feature("3,4,8,6")])
    assert list(reasons(found)) == [1] and reason in reasons(found)[1]
    a = found.scenes["a.tif"]
    assert a.rows[a.class_ids != -1].tolist() == [0, 2] and found.counts["rows"] == 3


def test_the_object_of_a_refused_row_is_no_background(tmp_path):
    """Its box is ignored as every class; where it has none, its class is not known in that image any more."""
    features = [
        feature(),
        feature("30,30,40,40", 75),
        feature("5,2,1,9", image="no place.tif"),
        feature("5,2,1,9", 75, image="nothing known.tif"),
        feature("200,200,300,300", 75, image="outside.tif"),
    ]
    scenes = read_xview(tmp_path, features).scenes
    a = scenes["a.tif"]
    np.testing.assert_array_equal(a.boxes, [[1, 2, 5, 9], [30, 30, 40, 40]])
    assert (a.class_ids.tolist(), a.crowd.tolist(), a.labelled_classes) == ([1, -1], [False, True], None)
    assert [scenes[f"{name}.tif"].labelled_classes for name in ("no place", "nothing known")] == [(0,), ()]
    fitted, rejected = scenes["outside.tif"].fitted(64, 64)
    assert len(fitted.boxes) == 0 and not rejected  # it is among the rejected already


def test_exact_duplicates_count_once(tmp_path):
    found = read_xview(tmp_path, [feature(), feature(), feature(type_id=11), feature(image="b.tif"), feature()])
    assert found.scenes["a.tif"].rows.tolist() == [0, 2] and len(found.scenes["b.tif"].boxes) == 1
    assert (found.counts["duplicates"], found.counts["rows"]) == (2, 3) and not found.rejected


@pytest.mark.parametrize("type_id", ["18", 18.0, "18.0", " 18 "])
def test_a_type_id_may_be_written_as_a_text(tmp_path, type_id):
    found = read_xview(tmp_path, [feature(type_id=type_id)])
    assert found.scenes["a.tif"].class_ids.tolist() == [1] and not found.rejected


def test_known_classes_can_be_left_out_on_purpose(tmp_path):
    found = read_xview(tmp_path, [feature(), feature(type_id=12), feature(type_id=75)], other_classes="drop")
    assert found.counts["dropped"] == 1
    assert "unknown class 75" in reasons(found)[2]  # not known: never silent


def test_an_unnamed_id_can_be_mapped(tmp_path):
    found = read_xview(tmp_path, [feature(type_id=75)], ("car",), {75: "car"})
    assert found.scenes["a.tif"].class_ids.tolist() == [0]


@pytest.mark.parametrize(
    "classes, mapping, message",
    [
        (("plane", "car"), {18: "car"}, "class without mapping.*plane"),
        (("plane",), {}, "class without mapping.*plane"),  # xView calls none so
        (("car",), {"Smal Car": "car"}, "Smal Car"),
    ],
)
def test_a_class_that_cannot_be_made_is_an_error(tmp_path, classes, mapping, message):
    with pytest.raises(TruthError, match=message):
        read_xview(tmp_path, [feature()], classes, mapping)


def test_empty_mapping_wants_equal_names(tmp_path):
    found = read_xview(tmp_path, [feature(), feature(type_id=73)], ("Building", "Small Car"), {})
    assert found.scenes["a.tif"].class_ids.tolist() == [1, 0]


def test_coco_boxes_facts_and_crowds(tmp_path):
    images = [
        {"id": 1, "file_name": "./x/a.jpg", "width": 64, "height": 48, "group": "g", "split": "val"},
        {"id": "two", "file_name": "b.jpg", "group": 3, "labelled_categories": ["car"]},
        {"id": 3, "file_name": "c.jpg", "labelled_categories": [7, 9]},
        {"id": 4, "file_name": "d.jpg", "labelled_categories": []},
    ]
    annotations = [note(number=50), note((0, 0, 2, 3), 9, "two", 51, iscrowd=1)]
    found = read_coco(tmp_path, coco(images, annotations))
    a, b = found.scenes["x/a.jpg"], found.scenes["b.jpg"]
    np.testing.assert_array_equal(a.boxes, [[1, 2, 5, 9]])
    assert (a.rows.tolist(), a.group, a.split, a.size_wh, a.labelled_classes) == ([50], "g", "val", (64, 48), None)
    assert (b.crowd.tolist(), b.group, b.split, b.size_wh, b.labelled_classes) == ([True], "3", None, None, (1,))
    assert found.scenes["c.jpg"].labelled_classes == (0, 1) and len(found.scenes["c.jpg"].boxes) == 0
    assert found.scenes["d.jpg"].labelled_classes == ()
    assert not found.rejected


def test_a_class_of_two_categories_is_labelled_only_with_both(tmp_path):
    categories = [{"id": 1, "name": "small"}, {"id": 2, "name": "large"}]
    images = [{"id": i, "file_name": f"{i}.jpg", "labelled_categories": ["small", 2][:i]} for i in (1, 2)]
    found = read_coco(tmp_path, coco(images, [], categories), ("car",), mapping={"small": "car", "large": "car"})
    assert [found.scenes[f"{i}.jpg"].labelled_classes for i in (1, 2)] == [(), (0,)]


@pytest.mark.parametrize(
    "bad, reason",
    [
        (note((1, 2, 0, 7), number=8), "without area"),
        (note((1, 2, -3, 7), number=8), "inverted"),
        (note((float("nan"), 2, 3, 7), number=8), "finite"),
        (note((1, 2, 3), number=8), "4 numbers"),
        (note((1, 2, None, 4), number=8), "4 numbers"),
        (note((1, 2, True, 4), number=8), "4 numbers"),
        (note((10**400, 2, 3, 4), number=8), "4 numbers"),
        (note(category=8, number=8), "unknown class 8"),
        (note(image=2, number=8), "no image has id 2"),
        (note(image=[1], number=8), "image id must be"),
        (note(iscrowd="no", number=8), "iscrowd must be"),
        (note(category=True, number=8), "category_id must be"),
        ({"id": 8, "image_id": 1, "category_id": 7}, "bbox must be"),
        ({"id": 8, "image_id": 1, "category_id": 7, "segmentation": [[1, 2, 3, 4]]}, "three points"),
        ({"id": 8, "image_id": 1, "category_id": 7, "segmentation": {"size": [4, 5], "counts": [9]}}, "add up"),
        ({"id": 8, "image_id": 1, "category_id": 7, "segmentation": {"size": [4, 5], "counts": "\t"}}, "no mask"),
    ],
)
def test_a_bad_annotation_is_one_rejection(tmp_path, bad, reason):
    found = read_coco(tmp_path, coco(annotations=[note(number=6), bad, note((9, 9, 4, 4), number=9)]))
    assert list(reasons(found)) == [8] and reason in reasons(found)[8]
    a = found.scenes["a.jpg"]
    assert a.rows[a.class_ids != -1].tolist() == [6, 9]


@pytest.mark.parametrize("write", [str, float, lambda number: f"{number}.0", lambda number: number])
def test_numbers_may_be_texts_and_floats(tmp_path, write):
    images = [{"id": write(1), "file_name": "a.jpg", "width": write(64), "height": write(48)}]
    categories = [{"id": write(7), "name": "plane"}, {"id": write(9), "name": "car"}]
    note_ = note(category=write(9), image=write(1), iscrowd=write(1))
    found = read_coco(tmp_path, coco(images, [note_, note(image=1, category=7)], categories))
    a = found.scenes["a.jpg"]
    assert (a.size_wh, a.class_ids.tolist(), a.crowd.tolist()) == ((64, 48), [1, 0], [True, False])
    assert not found.rejected


@pytest.mark.parametrize("crowd", [True, False, None])
def test_a_crowd_may_be_true_or_false(tmp_path, crowd):
    assert read_coco(tmp_path, coco(annotations=[note(iscrowd=crowd)])).scenes["a.jpg"].crowd.tolist() == [bool(crowd)]


MASK = np.zeros((48, 64), np.uint8, order="F")
MASK[3:9, 5:12] = 1
RUNS = np.diff(np.flatnonzero(np.diff(MASK.ravel("F"), prepend=0)), prepend=0, append=[MASK.size]).tolist()


@pytest.mark.parametrize(
    "outline",
    [
        [[5, 3, 12, 3, 8, 9]],
        [5, 3, 12, 3, 8, 9],
        [[5, 3, 7, 3, 7, 9], [9, 4, 12, 4, 9, 5]],
        {"size": [48, 64], "counts": RUNS},
        {"size": [48, 64], "counts": encode(MASK)["counts"].decode()},
    ],
    ids=["polygon", "flat", "two", "runs", "compressed"],
)
@pytest.mark.parametrize("bbox", [{}, {"bbox": None}])
def test_an_outline_alone_is_its_box(tmp_path, outline, bbox):
    found = read_coco(tmp_path, coco(annotations=[{"image_id": 1, "category_id": 7, "segmentation": outline, **bbox}]))
    np.testing.assert_array_equal(found.scenes["a.jpg"].boxes, [[5, 3, 12, 9]])
    assert not found.rejected


def test_a_file_of_two_image_ids_has_the_boxes_of_both(tmp_path):
    images = [{"id": i, "file_name": "a.jpg", "width": 64, "height": 48} for i in (1, 2)]
    found = read_coco(tmp_path, coco(images, [note(), note(image=2, number=2), note((9, 9, 4, 4), 9, 2, 3)]))
    assert found.scenes["a.jpg"].class_ids.tolist() == [0, 1]
    assert found.counts["duplicates"] == 1 and not found.rejected


@pytest.mark.parametrize(
    "image, reason",
    [
        ({"id": 1, "file_name": "b.jpg"}, "twice"),
        ({"id": 2, "file_name": "a.jpg", "width": 9, "height": 9}, "twice, and not the same"),
        ({"id": 2}, "file_name must be"),
        ({"id": 2, "file_name": "b.jpg", "labelled_categories": ["tree"]}, "labelled_categories"),
        ({"id": 2, "file_name": "b.jpg", "labelled_categories": [[7]]}, "labelled_categories"),
        ({"id": 2, "file_name": "b.jpg", "group": []}, "group must be"),
        ({"id": 2, "file_name": "b.jpg", "width": "9x", "height": 9}, "width must be"),
        (7, "image must be an object"),
    ],
)
def test_a_bad_image_is_rejected_with_its_boxes(tmp_path, image, reason):
    images = [{"id": 1, "file_name": "a.jpg"}, image]
    found = read_coco(tmp_path, coco(images, [note(), note(image=2, number=2)]))
    assert set(found.scenes) == {"a.jpg"}
    assert reason in found.rejected[0].reason and "image 1" in found.rejected[0].reason
    assert "no image has id 2" in reasons(found)[2]


def test_a_bad_category_is_rejected_with_its_boxes(tmp_path):
    categories = [{"id": 7, "name": "plane"}, {"id": 7, "name": "car"}, {"id": 8}]
    found = read_coco(tmp_path, coco(None, [note(), note(category=8, number=2)], categories), ("plane",))
    assert [row.reason for row in found.rejected] == [
        "category 1: category id 7 is there twice",
        "category 2: name must be a text, it is None",
        "unknown class 8",
    ]
    assert found.scenes["a.jpg"].class_ids.tolist() == [0, -1]


def make_yolo(tmp_path, labels, **data):
    for name, text in labels.items():
        image, label = tmp_path / "images" / f"{name}.jpg", tmp_path / "labels" / f"{name}.txt"
        image.parent.mkdir(parents=True, exist_ok=True), label.parent.mkdir(parents=True, exist_ok=True)
        image.touch()
        if text is not None:
            label.write_text(text)
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"train": "images", "names": ["plane", "car"], **data}))
    return TruthSource(format="yolo", path=str(path))


def test_yolo_boxes_in_pixels(tmp_path):
    source = make_yolo(tmp_path, {"a": "0 0.5 0.25 0.5 0.1\n\n1 0.9 0.9 0.4 0.1\n", "b": None, "c": ""})
    found = read_truth(source, ("plane", "car"))
    assert set(found.scenes) == {"images/a.jpg", "images/b.jpg", "images/c.jpg"} and not found.rejected
    a, rejected = found.scenes["images/a.jpg"].fitted(200, 100)
    np.testing.assert_allclose(a.boxes, [[50, 20, 150, 30], [140, 85, 200, 95]])  # the second is clipped
    assert (a.class_ids.tolist(), a.rows.tolist(), rejected) == ([0, 1], [1, 3], [])
    assert found.scenes["images/a.jpg"].split is None


def test_yolo_lists_names_and_broken_rows(tmp_path):
    text = "0 .5 .5 .1 .1\n7 .5 .5 .2 .1\n0 .5 .5 .1\n0 .1 .1 .2 .1 .2\nx .5 .5 .3 .1\n0 .5 .5 0 .1\n0 nan .5 .1 .1"
    source = make_yolo(
        tmp_path, {"a": text, "b": "1 .5 .5 .1 .1"}, train="list.txt", val=["images"], names={0: "plane", 1: "car"}
    )
    (tmp_path / "list.txt").write_text("images/a.jpg\n\n./images/b.jpg\n")
    found = read_truth(source, ("plane", "car"))
    assert sorted(reasons(found)) == [2, 3, 4, 5, 6, 7]
    assert set(found.scenes) == {"images/a.jpg", "images/b.jpg"}
    a = found.scenes["images/a.jpg"]
    assert (a.rows.tolist(), a.class_ids.tolist(), a.labelled_classes) == ([1, 2, 5], [0, -1, -1], (1,))
    assert found.rejected[0].file.endswith("labels/a.txt")


@pytest.mark.parametrize("number", ["1", "1.0", "1.0e+00", "01"])
def test_a_yolo_class_as_other_programs_write_it(tmp_path, number):
    found = read_truth(make_yolo(tmp_path, {"a": f"{number} .5 .5 .2 .2\n0.000000 .5 .5 .1 .1\n"}), ("plane", "car"))
    assert found.scenes["images/a.jpg"].class_ids.tolist() == [1, 0] and not found.rejected


def test_yolo_polygons_are_their_boxes_and_counted(tmp_path):
    found = read_truth(make_yolo(tmp_path, {"a": "1 .1 .2 .4 .2 .3 .6\n0 .5 .5 .1 .1\n"}), ("plane", "car"))
    np.testing.assert_allclose(found.scenes["images/a.jpg"].boxes, [[0.1, 0.2, 0.4, 0.6], [0.45, 0.45, 0.55, 0.55]])
    assert found.counts["polygons"] == 1 and not found.rejected


def test_an_unreadable_label_file_says_nothing_of_its_image(tmp_path, monkeypatch):
    source = make_yolo(tmp_path, {"a": "0 .5 .5 .1 .1", "b": "1 .5 .5 .1 .1"})
    real = Path.read_text

    def read(path, *args, **kwargs):
        if path.name == "a.txt":
            raise OSError(5, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    found = read_truth(source, ("plane", "car"))
    assert found.scenes["images/a.jpg"].labelled_classes == () and "cannot be read" in found.rejected[0].reason
    assert found.scenes["images/b.jpg"].labelled_classes is None


def test_an_image_that_a_list_names_and_that_is_not_there_is_a_rejection(tmp_path):
    source = make_yolo(tmp_path, {"a": "0 .5 .5 .1 .1"}, train="list.txt")
    (tmp_path / "list.txt").write_text("images/a.jpg\nimages/gone.jpg\n")
    found = read_truth(source, ("plane", "car"))
    assert set(found.scenes) == {"images/a.jpg"}
    assert [row.reason.split(",")[0] for row in found.rejected] == ["line 2 lists 'images/gone.jpg'"]


@pytest.mark.parametrize(
    ("listed", "line"),
    [
        ("lists/train.txt", "./a.jpg"),  # from the list's own folder, as ultralytics has it
        ("lists/train.txt", "lists/a.jpg"),
        ("train.txt", "data/obj/lists/a.jpg"),  # darknet's, from the folder above the data set's
        ("train.txt", "/home/somebody/set/lists/a.jpg"),
        ("train.txt", "lists\\a.jpg"),
    ],
)
def test_where_the_entries_of_a_list_count_from(tmp_path, listed, line):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.jpg").touch()
    (tmp_path / "lists" / "a.txt").write_text("1 .5 .5 .1 .1")
    source = make_yolo(tmp_path, {}, train=listed)
    (tmp_path / listed).write_text(line)
    found = read_truth(source, ("plane", "car"))
    assert {name: scene.class_ids.tolist() for name, scene in found.scenes.items()} == {"lists/a.jpg": [1]}


def test_an_image_of_the_same_name_elsewhere_is_another(tmp_path):
    source = make_yolo(tmp_path, {}, train="list.txt")
    (tmp_path / "1.jpg").touch()
    (tmp_path / "list.txt").write_text("gone/1.jpg\n")
    found = read_truth(source, ("plane", "car"))
    assert not found.scenes and "gone/1.jpg" in found.rejected[0].reason
    (tmp_path / "list.txt").write_text(f"data/{tmp_path.name}/1.jpg\n")  # darknet's
    assert set(read_truth(source, ("plane", "car")).scenes) == {"1.jpg"}


def test_a_split_without_any_label_is_said(tmp_path):
    source = make_yolo(tmp_path, {"a": None, "b": None}, val="more")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.jpg").touch()
    (tmp_path / "more" / "c.txt").write_text("0 .5 .5 .1 .1")
    (warning,) = read_truth(source, ("plane", "car")).warnings
    assert warning.startswith("none of the 2 images of train has labels") and warning.endswith("labels/a.txt")


@pytest.mark.parametrize(
    ("data", "classes"),
    [
        ({"names": {"0": "plane", "1": "car"}}, ("plane", "car")),
        ({"names": [7, 3.5]}, ("7", "3.5")),
        ({"names": {0: 737}}, ("737",)),
        ({"names": None, "nc": 2}, ("class_0", "class_1")),
        ({"test": "gone"}, ("plane", "car")),
        ({"validation": "images"}, ("plane", "car")),
    ],
)
def test_data_yaml_as_ultralytics_takes_it(tmp_path, data, classes):
    found = read_truth(make_yolo(tmp_path, {"a": "0 .5 .5 .1 .1"}, **data), classes)
    assert found.scenes["images/a.jpg"].class_ids.tolist() == [0] and not found.rejected
    assert [warning.endswith("as test, and it is not there") for warning in found.warnings] == [True] * ("test" in data)


def test_hidden_files_are_no_truth_and_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "P1.txt").write_text("1 1 9 1 9 5 1 5 plane 0")
    (tmp_path / "labels" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "labels" / ".ipynb_checkpoints" / "P2.txt").touch()
    (tmp_path / "labels" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "labels")
    found = read_truth(TruthSource(format="dota", path=str(tmp_path / "labels")), ("plane",))
    assert {name: len(scene.boxes) for name, scene in found.scenes.items()} == {"linked/P1": 1}


@pytest.mark.parametrize(
    "data", [{"names": None}, {"names": [1]}, {"names": {"x": "car"}}, {"train": "gone"}, {"train": [3]}, {"path": 3}]
)
def test_a_broken_data_yaml_is_an_error(tmp_path, data):
    with pytest.raises(TruthError, match=r"data\.yaml"):
        read_truth(make_yolo(tmp_path, {"a": ""}, **data), ("plane", "car"))


def test_dota_hulls_headers_and_difficult(tmp_path):
    (tmp_path / "P1.txt").write_text(
        "imagesource:GoogleEarth\ngsd:0.14\n"
        "2 0 4 2 2 4 0 2 plane 0\n1 1 9 1 9 5 1 5 small-vehicle 1\n1 1 9 1 9 5 1 5 ship 0\n"
        "1 1 9 1 plane 0\n1 1 9 1 9 5 1 x plane 0\n1 1 9 1 9 5 1 5 plane maybe\n"
        "1 1 1 1 1 5 1 5 plane 0\n1 1 9 1 9 5 1 5 ufo 0\n"
    )
    (tmp_path / "P2.txt").touch()
    source = TruthSource(format="dota", path=str(tmp_path), mapping={"plane": "plane", "small-vehicle": "car"})
    found = read_truth(source, ("plane", "car"))
    p1 = found.scenes["P1"]
    np.testing.assert_array_equal(p1.boxes[:2], [[0, 0, 4, 4], [1, 1, 9, 5]])
    np.testing.assert_allclose(p1.xywhr[0], [2, 2, 8**0.5, 8**0.5, np.pi / 4], atol=1e-5)
    np.testing.assert_allclose(rotated.hulls(p1.xywhr), p1.boxes, atol=1e-5)
    known = p1.class_ids != -1
    assert (p1.class_ids[known].tolist(), p1.rows[known].tolist()) == ([0, 1], [3, 4])
    assert p1.crowd.tolist() == [False, *[True] * 4] and p1.rows[~known].tolist() == [5, 8, 10]
    assert p1.labelled_classes == ()  # a line that cannot be read at all may be anything
    assert len(found.scenes["P2"].boxes) == 0
    assert sorted(reasons(found)) == [5, 6, 7, 8, 9, 10]
    assert "not mapped" in reasons(found)[5] and "unknown class" in reasons(found)[10]


def test_dota_names_of_ones_own(tmp_path):
    (tmp_path / "P1.txt").write_text("1 1 9 1 9 5 1 5 tractor 0")
    source = TruthSource(format="dota", path=str(tmp_path))
    assert read_truth(source, ("plane", "tractor")).scenes["P1"].class_ids.tolist() == [1]
    with pytest.raises(TruthError, match=r"class without mapping.*planes"):
        read_truth(source, ("planes", "tractor"))


@pytest.mark.parametrize("format_", ["xview", "coco", "yolo", "dota"])
def test_missing_truth_is_one_line_with_a_remedy(tmp_path, format_):
    source = TruthSource(format=format_, path=str(tmp_path / "gone"))
    for read in (lambda: read_truth(source, ("car",)), lambda: truth_digest(source)):
        with pytest.raises(TruthError, match=r"gone.*tiles\.truth\.path") as caught:
            read()
        assert "\n" not in str(caught.value)


BROKEN = ["", "{", "[]", "null", '{"features": 3}', "[" * 100_000, "!!int ''", "!!bool x", "\x00", "é\ud800"]


@pytest.mark.parametrize("format_", ["xview", "coco", "yolo"])
@pytest.mark.parametrize("text", BROKEN)
def test_broken_files_are_truth_errors(tmp_path, format_, text):
    path = tmp_path / "truth"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(TruthError, match="truth") as caught:
        read_truth(TruthSource(format=format_, path=str(path)), ("car",))
    assert "\n" not in str(caught.value)


VALUES = [None, True, 0, -1, 1.5, 10**30, float("nan"), float("inf"), "", "a", "\ud800", [], [[]], {}, {"id": 1}]


def _damaged(value, rng):
    """A copy with one random place replaced by something that does not belong there."""
    if rng.random() < 0.15 or not isinstance(value, list | dict) or not value:
        return rng.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(list(keys))
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = _damaged(copy[key], rng)
    return copy


@pytest.mark.parametrize("format_", ["xview", "coco", "yolo"])
def test_damage_anywhere_gives_rejections_or_a_truth_error(tmp_path, format_):
    rng = random.Random(0)
    image = {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48, "group": "g", "labelled_categories": ["car", 7]}
    make_yolo(tmp_path, {"a": "0 .5 .5 .1 .1"})
    whole = {
        "xview": {"features": [feature(), feature("3,4,8,6", 11)]},
        "coco": coco([image], [note(), note(category=9, iscrowd=1)]),
        "yolo": {"path": ".", "train": ["images"], "names": ["plane", "car"]},
    }[format_]
    mapping = XVIEW_MAPPING if format_ == "xview" else {}
    path, dump = tmp_path / "data.yaml", yaml.dump if format_ == "yolo" else json.dumps
    clean = 0
    for _ in range(150 if format_ == "yolo" else 400):
        path.write_text(dump(_damaged(whole, rng)))
        try:
            found = read_truth(TruthSource(format=format_, path=str(path), mapping=mapping), ("plane", "car"))
        except TruthError:
            continue
        clean += 1
        for scene in found.scenes.values():
            assert len(scene.fitted(64, 48)[0].boxes) <= 2
    assert clean
