import json
from functools import cache

import cv2
import numpy as np
import pytest
import rasterio
import rasterio.warp

from softlabel import store
from softlabel.config import Synthetic
from softlabel.errors import StoreError
from softlabel.imagery import drawing, layouts, synthetic

SIZE_PX = 384
KINDS = range(len(layouts.KINDS))


def settings_at(difficulty):
    return Synthetic(num_scenes=2, scene_size_px=SIZE_PX, difficulty=difficulty)


@cache
def scene(index, difficulty=0.2, seed=0):
    """Truth boxes, and renderings with and without objects."""
    settings = settings_at(difficulty)
    layout = layouts.lay_out(settings, seed, index)
    with_objects, without = (synthetic.render(layout, settings, seed, index, objects=objects) for objects in (1, 0))
    return layout, synthetic.truth_boxes(layout, SIZE_PX), with_objects, without


def change(index, difficulty=0.2, seed=0):
    """What objects change in a scene (S, S), mean of the bands."""
    _, _, with_objects, without = scene(index, difficulty, seed)
    return np.abs(with_objects.astype(int) - without).mean(axis=2)


def write(folder, num_scenes, seed=0, **settings):
    settings = {"scene_size_px": 256, "difficulty": 0.2, **settings}
    scenes, truth = synthetic.write_scenes(folder, Synthetic(num_scenes=num_scenes, **settings), seed)
    pixels = {path.name: rasterio.open(path).read() for path in sorted(scenes.glob("*.tif"))}
    return pixels, json.loads(truth.read_text())["features"]


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    return write(tmp_path_factory.mktemp("six"), 6)


def test_same_seed_same_scenes(six, tmp_path):
    again, truth = write(tmp_path, 6)
    assert again.keys() == six[0].keys() and truth == six[1]
    assert all(np.array_equal(again[name], six[0][name]) for name in again)


def test_other_seed_other_scenes(six, tmp_path):
    other, truth = write(tmp_path, 6, seed=1)
    assert truth != six[1]
    assert all(not np.array_equal(other[name], six[0][name]) for name in other)


def test_more_scenes_change_none(six, tmp_path):
    fewer, truth = write(tmp_path, 3)
    assert len(fewer) == 3
    assert all(np.array_equal(fewer[name], six[0][name]) for name in fewer)
    assert truth == [feature for feature in six[1] if feature["properties"]["image_id"] in fewer]


def test_files_are_tiled_geotiffs_in_places_of_their_own(tmp_path):
    scenes, _ = synthetic.write_scenes(tmp_path, Synthetic(num_scenes=3, scene_size_px=512), 0)
    origins = set()
    for path in scenes.iterdir():
        with rasterio.open(path) as file:
            assert (file.count, file.dtypes[0], file.shape) == (3, "uint8", (512, 512))
            assert file.crs.to_epsg() == 32631 and file.res == (0.5, 0.5)
            assert file.block_shapes[0] == (256, 256) and file.compression.value == "DEFLATE"
            origins.add((file.bounds.left, file.bounds.top))
    assert len(origins) == 3


def test_truth_is_in_xviews_form(tmp_path):
    scenes, truth = synthetic.write_scenes(tmp_path, Synthetic(num_scenes=3), 0)
    collection = json.loads(truth.read_text())
    assert collection["type"] == "FeatureCollection"
    assert {feature["properties"]["type_id"] for feature in collection["features"]} == {11, 18, 40}
    for feature in collection["features"][::7]:
        box = [int(text) for text in feature["properties"]["bounds_imcoords"].split(",")]
        ring = np.array(feature["geometry"]["coordinates"][0])
        with rasterio.open(scenes / feature["properties"]["image_id"]) as file:
            east, north = rasterio.warp.transform("EPSG:4326", file.crs, *ring.T)
            columns_rows = np.array(~file.transform @ np.array([east, north]))
        assert columns_rows.min(axis=1) == pytest.approx(box[:2], abs=0.01)
        assert columns_rows.max(axis=1) == pytest.approx(box[2:], abs=0.01)
        assert ring[0].tolist() == ring[-1].tolist() and len(ring) == 5
        assert np.all(np.abs(ring - (1.8, 48.7)) < 0.3)


def test_no_objects_is_still_a_feature_collection(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "KINDS", ("water",))
    pixels, features = write(tmp_path, 2)
    assert len(pixels) == 2 and features == []


def test_done_is_not_done_again_and_never_mistaken(tmp_path):
    write(tmp_path, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write(tmp_path, 2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(StoreError, match="another folder"):
        write(tmp_path, 2, seed=1)


def test_half_written_is_written_again(six, tmp_path):
    _, truth = write(tmp_path, 6)
    (tmp_path / store.DONE).unlink()
    (tmp_path / "truth.geojson").unlink()
    (tmp_path / "scenes" / "scene-00001.tif").write_bytes(b"half")
    pixels, truth = write(tmp_path, 6)
    assert truth == six[1] and np.array_equal(pixels["scene-00001.tif"], six[0]["scene-00001.tif"])
    assert not list(tmp_path.rglob(".*"))


def test_counts_are_in_the_summary(tmp_path):
    _, features = write(tmp_path, 3)
    objects = store.summary(tmp_path)["objects"]
    assert objects.keys() == {"plane", "car", "ship"} and sum(objects.values()) == len(features)


@pytest.mark.parametrize("index", KINDS)
@pytest.mark.parametrize("difficulty", [0, 1])
def test_boxes_lie_inside(index, difficulty):
    for _, (x0, y0, x1, y1) in scene(index, difficulty)[1]:
        assert 0 <= x0 < x1 <= SIZE_PX and 0 <= y0 < y1 <= SIZE_PX
        assert min(x1 - x0, y1 - y0) >= 3


def test_all_classes_and_empty_scenes():
    found = [{label for label, _ in scene(index)[1]} for index in KINDS]
    assert set().union(*found) == {"plane", "car", "ship"}
    empty = {kind for kind, labels in zip(layouts.KINDS, found, strict=True) if not labels}
    assert empty == {"land", "water"}
    assert all(labels for kind, labels in zip(layouts.KINDS, found, strict=True) if kind not in empty)


@pytest.mark.parametrize("index", KINDS)
def test_objects_change_pixels_in_their_boxes_and_nowhere_else(index):
    layout, boxes, with_objects, without = scene(index)
    changed, elsewhere = change(index), np.ones((SIZE_PX, SIZE_PX), bool)
    # the tallest object has 5 px; then 3 for the shadow's soft, antialiased edge and 3 for the camera's blur
    shadow = np.abs(layout.sun_xy).max() * 5 + 6
    for label, (x0, y0, x1, y1) in boxes:
        assert changed[y0:y1, x0:x1].mean() > 8, label
        low = np.maximum([x0 - shadow, y0 - shadow], 0).astype(int)
        elsewhere[low[1] : int(y1 + shadow), low[0] : int(x1 + shadow)] = False
    assert changed[elsewhere].max() == 0
    assert boxes or np.array_equal(with_objects, without)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_boxes_fit_to_the_pixel(index):
    layout, boxes, _, _ = scene(index)
    objects = [thing for thing in layout.things if thing.label]
    for thing, (label, box) in zip(objects, boxes, strict=True):
        # against near black and near white, since hulls come in both
        drawn = np.zeros((SIZE_PX, SIZE_PX), bool)
        for ground in (0, 255):
            canvas = np.full((SIZE_PX, SIZE_PX, 3), ground, np.uint8)
            drawing.paint_thing(canvas, thing)
            drawn |= (np.abs(canvas.astype(int) - ground) > 60).any(axis=2)
        rows, columns = np.nonzero(drawn)
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        slack = 1 if min(box) > 0 and max(box) < SIZE_PX else 8  # a corner outside may hold the widest part
        assert np.abs(np.subtract(box, seen)).max() <= slack, label


@pytest.mark.parametrize("difficulty", [0, 0.5, 1])
def test_objects_do_not_overlap_and_are_half_inside(difficulty):
    for index in (0, 1, 2):
        margin = SIZE_PX
        canvas = np.zeros((3 * SIZE_PX, 3 * SIZE_PX), np.uint8)
        for thing in (thing for thing in scene(index, difficulty)[0].things if thing.label):
            mask = np.zeros_like(canvas)
            hull = drawing.convex_hull(thing.points_N2) + margin
            cv2.fillConvexPoly(mask, drawing.fixed_point(hull), 1, shift=4)
            assert mask[margin:-margin, margin:-margin].sum() >= 0.5 * mask.sum()
            canvas += mask
        # hulls are drawn with their border pixels, so neighbours may share a few
        assert (canvas > 1).sum() <= 0.002 * (canvas > 0).sum()


def test_difficulty_lowers_contrast_and_size():
    contrast, length = [], []
    for difficulty in (0, 0.5, 1):
        boxes = [(change(i, difficulty, 3), box) for i in (0, 1, 2) for _, box in scene(i, difficulty, 3)[1]]
        contrast.append(np.mean([changed[y0:y1, x0:x1].mean() for changed, (x0, y0, x1, y1) in boxes]))
        ships = [box for label, box in scene(1, difficulty, 3)[1] if label == "ship"]
        length.append(np.mean([max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in ships]))
    assert contrast[0] > 1.4 * contrast[1] > 1.4**2 * contrast[2]
    assert length[0] > length[2]


def test_difficulty_adds_lookalikes_and_noise():
    def others(difficulty):
        laid = [layouts.lay_out(settings_at(difficulty), 0, index) for index in (3, 7)]
        return sum(not thing.label for layout in laid for thing in layout.things)

    def noise(difficulty):
        pixels = scene(7, difficulty)[3].astype(int)
        return np.abs(np.diff(pixels, axis=1)).mean()

    assert others(1) > others(0.5) > others(0)
    assert noise(1) > noise(0.5) > noise(0)


@pytest.mark.parametrize("index", KINDS)
def test_smallest_scenes(index):
    settings = Synthetic(num_scenes=1, scene_size_px=128)
    layout = layouts.lay_out(settings, 0, index)
    assert synthetic.render(layout, settings, 0, index).shape == (128, 128, 3)
    assert all(
        0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 128 for _, (x0, y0, x1, y1) in synthetic.truth_boxes(layout, 128)
    )
