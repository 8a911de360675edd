"""Stores read shard by shard, and scenes found in them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_stores import detections, made_store, made_tile, write_tiles

from softlabel.errors import StoreError
from softlabel.evaluation.run import tile_results
from softlabel.records import LABELLED, detections_from_row
from softlabel.results.scenes import read_scenes
from softlabel.results.stores import num_shards, open_store, read_all
from softlabel.shards import read_soft_labels, shard_file
from softlabel.store import DONE, read_json, read_table, write_json, write_table

ASSETS = Path(__file__).parents[2] / "assets"
FOUND = detections((1, 2, 3, 4, 1, 0.9), (0, 0, 8, 8, 2, 0.2))


def made(sizes, splits=()):
    """Scenes of so many tiles each, side by side, a box per tile."""
    found = []
    for number, size in enumerate(sizes):
        split = splits[number] if splits else None
        for i in range(size):
            box = detections((0, 0, 5, 5, 0, 0.5))
            found.append(made_tile(f"scene-{number}", (i * 8, 0, 8, 8), box, split=split))
    return found


def test_a_store_of_format_3_opens():
    """Written by softlabel as it was before format 4, by a teacher of random weights, over 10 made-up scenes."""
    store = open_store(next((ASSETS / "format-3").glob("label-*")))
    rows = list(read_all(store))
    assert (store.classes, len(rows)) == (["car", "plane", "ship"], 10)
    assert {row.status for row in rows} == {LABELLED}
    assert sum(len(row.found.boxes) for row in rows) == 200
    assert all(row.found.best.min() > 0.05 for row in rows)
    assert sum(scene.counts[LABELLED] for scene in read_scenes(store, 0, num_shards(store), 0.0)) == 10
    results = tile_results(store.tiles, "test", store.folder)
    assert sum(len(one.truth.boxes) for one in results.values()) == 2


def test_a_store_comes_back_as_it_was_labelled(tmp_path):
    tiles = [
        made_tile("s", (0, 0, 8, 8), FOUND),
        made_tile("s", (8, 0, 8, 8)),
        made_tile("s", (16, 0, 8, 8), reason="no such file", retryable=True),
        made_tile("s", (24, 0, 8, 8), FOUND),
    ]
    store = open_store(made_store(tmp_path, tiles, shard_tiles=3))
    rows = list(read_all(store))
    assert [row.tile["tile_id"] for row in rows] == [tile["tile_id"] for tile, *_ in tiles]
    for row, (_, expected, reason, retryable) in zip(rows, tiles, strict=True):
        np.testing.assert_array_equal(row.found.boxes, expected.boxes)
        np.testing.assert_array_equal(row.found.scores, expected.scores)
        assert (row.reason, row.retryable) == (reason, retryable)
    assert store.classes == ["car", "plane", "ship"] and store.num_tiles == 4


def test_agreement_comes_back_and_a_store_of_format_5_has_none(tmp_path):
    known = replace(FOUND, agreement=np.linspace(0.7, 1, len(FOUND.boxes), dtype=np.float32))
    known.agreement[0] = np.nan
    folder = made_store(tmp_path, [made_tile("s", (0, 0, 8, 8), known), made_tile("s", (8, 0, 8, 8), FOUND)])
    first, second = map(detections_from_row, read_soft_labels(folder))
    np.testing.assert_array_equal(first.agreement, known.agreement)
    assert first.agreement.dtype == np.float32 and second.agreement is None
    order = np.arange(len(known.boxes))[::-1]
    np.testing.assert_array_equal(first.at(order).agreement, known.agreement[::-1])
    path = shard_file(folder, 0)
    write_table(path, read_table(path).drop_columns(["agreement"]))
    write_json(folder / DONE, {**read_json(folder / DONE), "format_version": 5})
    for found, row in zip(
        map(detections_from_row, read_soft_labels(folder)), read_all(open_store(folder)), strict=True
    ):
        np.testing.assert_array_equal(found.boxes, FOUND.boxes)
        np.testing.assert_array_equal(row.found.scores, FOUND.scores)
        assert found.agreement is None and row.found.agreement is None


def test_what_is_no_finished_store_is_refused_in_words(tmp_path):
    folder = made_store(tmp_path, made([1]))
    for place in (tmp_path / "gone", tmp_path / "tiles-made"):
        with pytest.raises(StoreError, match="is no store of soft labels"):
            open_store(place)
    (folder / DONE).rename(tmp_path / "done")
    with pytest.raises(StoreError, match="is not finished"):
        open_store(folder)
    (tmp_path / "done").rename(folder / DONE)
    (tmp_path / "tiles-made" / "shards.parquet").unlink()
    with pytest.raises(StoreError, match="needs its tiles beside it"):
        open_store(folder)


def test_a_store_of_other_tiles_than_those_beside_it_is_refused(tmp_path):
    folder = made_store(tmp_path, made([2]))
    write_tiles(tmp_path, made([1, 1]))
    with pytest.raises(StoreError, match="is not about the tiles"):
        list(read_all(open_store(folder)))


SIZES = [[1], [5, 1, 1], [2, 2, 2, 2], [1, 1, 11, 3], [3, 1, 4, 1, 5]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shard_tiles", [1, 2, 3])
@pytest.mark.parametrize("step", [1, 2])
def test_every_scene_is_read_once_and_whole_however_shards_are_dealt_out(tmp_path, sizes, shard_tiles, step):
    store = open_store(made_store(tmp_path, made(sizes), shard_tiles=shard_tiles))
    shards = num_shards(store)
    scenes = [
        scene
        for first in range(0, shards, step)
        for scene in read_scenes(store, first, min(first + step, shards), threshold=0.1)
    ]
    assert [(scene.scene_id, scene.counts[LABELLED], len(scene.windows)) for scene in scenes] == [
        (f"scene-{number}", size, size) for number, size in enumerate(sizes)
    ]


def test_scenes_of_other_splits_are_not_there(tmp_path):
    sizes, splits = [3, 4, 2, 5, 1], ["test", "train_1", "train_1", "test", "train_1"]
    store = open_store(made_store(tmp_path, made(sizes, splits), shard_tiles=2, splits=["test"]))
    for step in (1, 3):
        found = [
            (scene.scene_id, scene.counts[LABELLED])
            for first in range(0, num_shards(store), step)
            for scene in read_scenes(store, first, first + step, threshold=0.1)
        ]
        assert found == [("scene-0", 3), ("scene-3", 5)]


def test_only_shards_with_one_s_scenes_are_read(tmp_path):
    """A shard that is broken does no harm to who has no scene in it."""
    folder = made_store(tmp_path, made([6, 2, 2]), shard_tiles=2)
    write_table(shard_file(folder, 1), pa.table({"tile_id": ["other"]}))
    store = open_store(folder)
    assert list(read_scenes(store, 1, 3, threshold=0.1)) == []
    assert [scene.scene_id for scene in read_scenes(store, 2, 4, threshold=0.1)] == ["scene-1"]
    with pytest.raises(StoreError, match="is not about the tiles"):
        list(read_scenes(store, 0, 1, threshold=0.1))


def scene_of(tmp_path, *tiles, threshold=0.1, method="nms"):
    (scene,) = read_scenes(open_store(made_store(tmp_path, list(tiles))), 0, 1, threshold)
    return scene.merged(method, 0.5)


@pytest.mark.parametrize("method", ["nms", "wbf"])
def test_an_object_that_two_tiles_see_is_one(tmp_path, method):
    left = made_tile("s", (0, 0, 64, 64), detections((50, 10, 60, 20, 0, 0.8)))
    right = made_tile("s", (40, 0, 64, 64), detections((10, 10, 20, 20, 0, 0.9)))
    found = scene_of(tmp_path, left, right, method=method)
    assert found.boxes.tolist() == [[50, 10, 60, 20]] and found.members.tolist() == [2]


@pytest.mark.parametrize("method", ["nms", "wbf"])
def test_the_half_that_a_tile_s_border_cuts_off_vanishes(tmp_path, method):
    """An object at 50-75: the left tile sees its first 14 px, and is very sure of them."""
    left = made_tile("s", (0, 0, 64, 64), detections((50, 10, 64, 20, 0, 0.95)))
    right = made_tile("s", (40, 0, 64, 64), detections((10, 10, 35, 20, 0, 0.6)))
    found = scene_of(tmp_path, left, right, method=method)
    assert found.boxes.tolist() == [[50, 10, 75, 20]] and found.members.tolist() == [2]


def test_a_box_at_the_scene_s_own_border_is_whole(tmp_path):
    """Both reach the right border of their tile; only that of the left tile goes on behind it."""
    left = made_tile("s", (0, 0, 64, 64), detections((56, 10, 64, 20, 0, 0.9)))
    right = made_tile("s", (40, 0, 64, 64), detections((10, 10, 64, 20, 0, 0.6), (60, 40, 64, 50, 1, 0.5)))
    found = scene_of(tmp_path, left, right)
    assert found.boxes.tolist() == [[50, 10, 104, 20], [100, 40, 104, 50]]


def test_only_boxes_above_the_threshold_are_merged(tmp_path):
    tile = made_tile("s", (0, 0, 64, 64), detections((0, 0, 9, 9, 0, 0.5), (0, 0, 9, 10, 0, 0.3)))
    assert scene_of(tmp_path, tile, threshold=0.3).members.tolist() == [1]
    assert scene_of(tmp_path, tile, threshold=0.2).members.tolist() == [2]
    assert len(scene_of(tmp_path, tile, threshold=0.5).boxes) == 0
