"""`softlabel subtype` on a real Ray, and what reads the store that it makes."""

import numpy as np
import pytest
from conftest import tiny_recipe
from made_stores import detections, unpack, write_store

from softlabel.cli import main
from softlabel.errors import StoreError
from softlabel.imagery.run import tile
from softlabel.records import Detections, Truth
from softlabel.results.colour import Colour
from softlabel.results.run import export, subtype
from softlabel.results.stores import open_store, read_all
from softlabel.results.subtype import subtype_job
from softlabel.shards import read_soft_labels
from softlabel.store import read_json, summary
from softlabel.tile_table import read_tiles

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def store(tmp_path):
    """Made-up scenes with their truth as soft labels, and one tile rejected."""
    tiles = tile(tiny_recipe(), tmp_path)
    made = []
    for row in read_tiles(tiles):
        truth = Truth.from_row(row["truth"])
        made.append((row, Detections(truth.boxes, np.eye(3, dtype=np.float32)[truth.class_ids] * 0.7), None, False))
    made[2] = (made[2][0], detections(), "cut short", False)
    return write_store(tmp_path, made, tiles=tiles.name)


def test_a_class_is_split_once_and_gone_on_with(store, tmp_path, capsys):
    job = subtype_job(store, "car", Colour())
    folder = subtype(job)
    assert f"finer classes (of {summary(store)['labelled']} labelled tiles, 1 rejected) in {folder}" in (
        capsys.readouterr().out
    )
    before, after = list(read_all(open_store(store))), list(read_all(open_store(folder)))
    assert [tile.tile["tile_id"] for tile in before] == [tile.tile["tile_id"] for tile in after]
    assert sum(len(tile.found.boxes) for tile in after) == summary(folder)["boxes"] == summary(store)["boxes"]
    first = list(read_soft_labels(folder))
    unpack(folder)[0].unlink()
    assert subtype(job) == folder and list(read_soft_labels(folder)) == first


def test_show_and_export_read_it(store, tmp_path, capsys):
    folder = subtype(subtype_job(store, "car", Colour()))
    assert main(["show", str(folder), "--doubtful", "2"]) == 0
    out = capsys.readouterr().out
    assert "car split by" in out and "car-orange-brown" in out
    done = export(folder, tmp_path / "out", "coco", 0.3, "nms", 0.5)
    document = read_json(tmp_path / "out" / "annotations.json")
    assert len(document["annotations"]) == done["boxes"] == summary(store)["boxes"]
    assert [row["name"] for row in document["categories"]][:2] == ["car-white", "car-grey"]


def test_scenes_that_are_gone_are_named_once_all_is_done_and_can_be_had_again(store, tmp_path):
    job = subtype_job(store, "car", Colour())
    scenes = next(tmp_path.rglob("*.tif")).parent
    away = scenes.rename(tmp_path / "away")
    with pytest.raises(StoreError, match=r"labelled tiles could not be read and were rejected: see .*--retry-rejected"):
        subtype(job)
    assert summary(job.output)["retryable"] > 0
    away.rename(scenes)
    assert summary(subtype(job, retry_rejected=True))["retryable"] == 0
