"""`softlabel export` and `softlabel fuse` on a real Ray: files that do not depend on how the work was dealt out."""

import contextlib
import json
from pathlib import Path

import cv2
import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import tiny_recipe
from made_stores import CLASSES, detections, made_store, made_tile, unpack, write_store

import softlabel.without_recipe
from softlabel.cli import main
from softlabel.config import TruthSource
from softlabel.errors import StoreError
from softlabel.evaluation.run import evaluate_store, numbers
from softlabel.fusion import fuse_tile
from softlabel.imagery.run import tile
from softlabel.imagery.scenes import TileReader
from softlabel.imagery.truth import read_truth
from softlabel.records import EMPTY
from softlabel.results.datasets import image_file
from softlabel.results.fuse import fuse_job
from softlabel.results.run import export, fuse
from softlabel.results.stores import open_store, read_all
from softlabel.session import LOG
from softlabel.shards import read_soft_labels, shard_file
from softlabel.store import DONE, read_json, read_table, summary, write_table
from softlabel.tile_table import read_tiles
from softlabel.training.targets import soft_targets

pytestmark = pytest.mark.usefixtures("ray_session")

SIZE, STEP = 64, 44


def archive(seed=0, scenes=7):
    """Scenes of overlapping tiles that see parts of the same objects, each with scores of its own."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(scenes):
        place = {} if number % 3 == 2 else {"crs": "EPSG:32631", "transform": [0.5, 0, 4e5, 0, -0.5, 5.4e6 + number]}
        columns, rows = rng.integers(1, 5, 2)
        corners = rng.uniform(0, STEP * 4, (60, 2))
        objects = np.concatenate([corners, corners + rng.uniform(6, 16, (60, 2))], axis=1)
        ids, scores = rng.integers(0, 3, 60), rng.uniform(0.2, 0.9, 60)
        for column in range(columns):
            for row in range(rows):
                window = (int(column) * STEP, int(row) * STEP, SIZE, SIZE)
                boxes = np.clip(objects - np.array(window[:2] * 2), 0, SIZE).astype(np.float32)
                seen = (boxes[:, 2:] - boxes[:, :2] > 3).all(axis=1)
                noise = rng.uniform(-0.1, 0.1, 60)
                found = [(*boxes[i].tolist(), int(ids[i]), float(scores[i] + noise[i])) for i in np.flatnonzero(seen)]
                reason = "no such file" if rng.random() < 0.1 else None
                found = detections() if reason else detections(*found)
                made.append(made_tile(f"area/scene {number}.tif", window, found, reason=reason, **place))
    return made


def shuffled_within_scenes(made, seed):
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(one[0]["scene_id"] for one in made))
    groups = [[one for one in made if one[0]["scene_id"] == name] for name in rng.permutation(names)]
    return [group[i] for group in groups for i in rng.permutation(len(group))]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".json")}


@pytest.mark.parametrize(("fmt", "merge"), [("geoparquet", "nms"), ("geoparquet", "wbf"), ("geojson", "nms")])
def test_scene_files_do_not_depend_on_the_order_of_tiles_or_on_shards(tmp_path, fmt, merge):
    made = archive()
    stores = {
        "one": made_store(tmp_path / "one", made, shard_tiles=64),
        "two": made_store(tmp_path / "two", shuffled_within_scenes(made, 1), shard_tiles=3),
    }
    for name, store in stores.items():
        export(store, tmp_path / f"out-{name}", fmt, 0.3, merge, 0.5)
    found = contents(tmp_path / "out-one")
    assert found == contents(tmp_path / "out-two")
    labelled = {one[0]["scene_id"] for one in made if one[2] is None}
    assert len(found) == len(labelled) and not any(name.startswith(".") for name in found)


def test_seams_are_merged_and_the_counts_balance(tmp_path, capsys):
    made = archive()
    store, output = made_store(tmp_path, made, shard_tiles=4), tmp_path / "out"
    done = export(store, output, "geoparquet", 0.3, "nms", 0.5)
    frames = [gpd.read_parquet(path) for path in output.glob("*.parquet")]
    above = sum(int((found.best > np.float32(0.3)).sum()) for _, found, *_ in made)
    rejected = sum(reason is not None for _, _, reason, _ in made)
    assert sum(frame["members"].sum() for frame in frames) == above
    assert done["boxes"] == sum(map(len, frames)) < above
    assert (done["labelled"], done["rejected"], done["written"]) == (len(made) - rejected, rejected, len(frames))
    assert (done["threshold"], done["merge"], done["iou"]) == (0.3, "nms", 0.5)
    for frame in frames:
        (scene_id,) = set(frame["scene_id"])
        assert (frame.crs is None) == (scene_id in ("area/scene 2.tif", "area/scene 5.tif"))
        assert set(frame["teacher"]) == {"w1 yolov5n.yaml:n:nc=3"} and (frame["score"] > 0.3).all()
    line = capsys.readouterr().out.strip().splitlines()[-1]
    tiles = f"{done['labelled']} labelled tiles, {rejected} rejected"
    assert line == f"{done['boxes']} boxes in {len(frames)} scenes (of {tiles}) in {output}"


def test_a_scene_with_nothing_in_it_has_a_file_and_one_that_nobody_saw_has_none(tmp_path):
    made = [made_tile("empty", (0, 0, 64, 64)), made_tile("unseen", (0, 0, 64, 64), reason="cut short")]
    output = tmp_path / "out"
    export(made_store(tmp_path, made), output, "geojson", 0.3, "nms", 0.5)
    (path,) = output.glob("*.geojson")
    assert path.name.startswith("empty-") and json.loads(path.read_text())["features"] == []


BOX = (10, 10, 20, 20, 0, 0.9)
ROTATED_POLE = "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39.25 +lon_0=18 +to_meter=0.0174532925199433"


def test_a_scene_that_cannot_be_written_costs_no_other(tmp_path, capsys):
    """On Earth, on the Moon, beyond a pole, of no known CRS, on a building site; and of an older version's tiles,
    which took an identity transform for a place."""
    places = {
        "earth": ("EPSG:32631", [0.5, 0, 4e5, 0, -0.5, 5.4e6]),
        "moon": ("IAU_2015:30100", [0.5, 0, 4.0, 0, -0.5, 5.0]),
        "pole": ("EPSG:4326", [0.5, 0, 4.0, 0, 0.5, 85.0]),
        "unknown": ("no CRS at all", [0.5, 0, 4.0, 0, -0.5, 5.0]),
        "site": ('LOCAL_CS["site",UNIT["metre",1]]', [0.5, 0, 4.0, 0, -0.5, 5.0]),
        "identity": ("EPSG:4326", [1, 0, 0, 0, 1, 0]),
        "weather": (ROTATED_POLE, [0.01, 0, 4.0, 0, -0.01, 5.0]),
        "nowhere": ("EPSG:32631", [0.5, 0, float("nan"), 0, -0.5, 5.4e6]),
        "turned": ("EPSG:4326", [0.001, 0, 365.0, 0, -0.001, 5.0]),
    }
    made = [
        made_tile(name, (210, 210, 64, 64), detections(BOX), crs=crs, transform=transform)
        for name, (crs, transform) in places.items()
    ]
    store = made_store(tmp_path, made)
    for fmt, lost in (("geojson", ["moon", "nowhere", "pole", "unknown"]), ("geoparquet", ["nowhere", "unknown"])):
        done = export(store, tmp_path / fmt, fmt, 0.3, "nms", 0.5)
        assert (done["written"], done["failed"], done["boxes"]) == (9 - len(lost), len(lost), 9 - len(lost))
        listed = [json.loads(line) for line in (tmp_path / fmt / "failed.jsonl").read_text().splitlines()]
        assert [row["scene_id"] for row in listed] == lost and all(row["reason"] for row in listed)
        assert f"{len(lost)} scenes failed, the first: {lost[0]}: " in capsys.readouterr().out
    corners = {}
    for name in ("weather", "turned"):
        (path,) = (tmp_path / "geojson").glob(f"{name}-*")
        (feature,) = json.loads(path.read_text())["features"]
        corners[name] = np.array(feature["geometry"]["coordinates"][0])
    assert (np.abs(corners["weather"]) < [180, 90]).all()
    assert (corners["turned"][:, 0] > 5).all() and (corners["turned"][:, 0] < 6).all()  # 365 degrees are 5
    (path,) = (tmp_path / "geojson").glob("identity-*")
    (feature,) = json.loads(path.read_text())["features"]
    assert feature["geometry"]["coordinates"][0][0] == [220, 220]  # pixels, and no latitude of 220
    with pytest.raises(StoreError, match=r"exported: 1 labelled .*, 1 scenes failed, the first: unknown: a CRS"):
        export(made_store(tmp_path / "one", made[3:4]), tmp_path / "none", "geojson", 0.3, "nms", 0.5)


def test_empty_tiles_are_left_out_and_counted(tmp_path):
    made = [made_tile("a", (0, 0, 64, 64), detections(BOX)), made_tile("b", (0, 0, 64, 64), reason=EMPTY)]
    done = export(made_store(tmp_path, made), tmp_path / "out", "geojson", 0.3, "nms", 0.5)
    assert (done["labelled"], done["empty"], done["rejected"], done["written"]) == (1, 1, 0, 1)
    assert [path.name[0] for path in (tmp_path / "out").glob("*.geojson")] == ["a"]


def test_another_threshold_rewrites_and_another_store_is_refused(tmp_path):
    made = archive(scenes=2)
    store, output = made_store(tmp_path, made), tmp_path / "out"
    low = export(store, output, "geojson", 0.2, "nms", 0.5)
    names = set(contents(output))
    high = export(store, output, "geojson", 0.6, "nms", 0.5)
    assert 0 < high["boxes"] < low["boxes"] and set(contents(output)) == names
    other = write_store(tmp_path, made, weights="w2")
    with pytest.raises(StoreError, match="holds an export of"):
        export(other, output, "geojson", 0.2, "nms", 0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "annotations.json").write_text("truth")
    with pytest.raises(StoreError, match="holds something that is no export"):
        export(store, tmp_path / "mine", "coco", 0.2, "nms", 0.5)
    assert (tmp_path / "mine" / "annotations.json").read_text() == "truth"


def test_a_broken_shard_is_one_line(tmp_path):
    store = made_store(tmp_path, archive(scenes=2), shard_tiles=4)
    shard_file(store, 1).write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"000001.parquet cannot be read") as caught:
        export(store, tmp_path / "out", "geojson", 0.2, "nms", 0.5)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / DONE).exists()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A store over made-up scenes that can be read, two boxes per tile and one tile rejected."""
    run_dir = tmp_path_factory.mktemp("real")
    tiles = tile(tiny_recipe(), run_dir)
    found = detections((3.5, 4, 40, 50.25, 0, 0.9), (60, 60, 128, 128, 2, 0.4))
    made = [(row, found, None, False) for row in read_tiles(tiles)]
    made[5] = (made[5][0], detections(), "cut short", False)
    return write_store(run_dir, made, tiles=tiles.name)


def tiles_of(store):
    return [row.tile for row in read_all(open_store(store)) if row.reason is None]


@pytest.mark.parametrize(("fmt", "index"), [("coco", "annotations.json"), ("yolo", "data.yaml")])
def test_a_data_set_has_every_labelled_tile_and_comes_back(real, tmp_path, fmt, index):
    output = tmp_path / "out"
    done = export(real, output, fmt, 0.5, "nms", 0.5)
    tiles, total = tiles_of(real), open_store(real).num_tiles
    counts = [done[name] for name in ("labelled", "rejected", "written", "failed", "boxes")]
    assert counts == [total - 1, 1, total - 1, 0, total - 1] and "merge" not in done
    truth = read_truth(TruthSource(format=fmt, path=str(output / index)), tuple(CLASSES))
    scenes = {Path(name).name: scene.fitted(128, 128)[0] for name, scene in truth.scenes.items()}
    reader = TileReader()
    for row in tiles:
        image = image_file(row, by_split=fmt == "yolo")
        assert (cv2.imread(str(output / image))[:, :, ::-1] == reader.read(row)).all()
        scene = scenes.pop(image.name)
        np.testing.assert_allclose(scene.boxes, [[3.5, 4, 40, 50.25]], atol=1e-5)
        assert scene.class_ids.tolist() == [0]
    reader.close()
    assert not scenes and len(tiles) == len(list(output.rglob("*.png"))) == total - 1


def test_coco_says_where_its_boxes_come_from(real, tmp_path):
    export(real, tmp_path / "out", "coco", 0.25, "nms", 0.5)
    document = json.loads((tmp_path / "out" / "annotations.json").read_text())
    info = document["info"]
    assert (info["threshold"], info["store"]) == (0.25, real.name)
    assert (info["teacher"], info["fingerprint"]) == (
        "w1 yolov5n.yaml:n:nc=3",
        read_json(real / "store.json")["teacher"],
    )
    assert {one["score"] for one in document["annotations"]} == {0.9, 0.4}
    assert {one["split"] for one in document["images"]} == {row["split"] for row in tiles_of(real)}


@pytest.mark.parametrize("fmt", ["coco", "yolo"])
def test_tiles_that_cannot_be_read_any_more_are_left_out_and_counted(tmp_path, capsys, fmt):
    tiles = tile(tiny_recipe(), tmp_path)
    made = [(row, detections((1, 1, 9, 9, 0, 0.9)), None, False) for row in read_tiles(tiles)]
    store, output = write_store(tmp_path, made, tiles=tiles.name), tmp_path / "out"
    export(store, output, fmt, 0.5, "nms", 0.5)
    gone = Path(made[0][0]["scene_uri"])
    lost = [row for row, *_ in made if row["scene_uri"] == str(gone)]
    gone.rename(tmp_path / "moved")
    done = export(store, output, fmt, 0.5, "nms", 0.5)
    assert (done["failed"], done["written"]) == (len(lost), len(made) - len(lost))
    assert f"{len(lost)} tiles failed, the first: cannot read scene {gone}" in capsys.readouterr().out
    listed = [json.loads(line) for line in (output / "failed.jsonl").read_text().splitlines()]
    assert [row["tile_id"] for row in listed] == sorted(row["tile_id"] for row in lost)
    assert not any((output / image_file(row, by_split=fmt == "yolo")).exists() for row in lost)
    if fmt == "coco":
        assert len(json.loads((output / "annotations.json").read_text())["images"]) == done["written"]


def test_a_store_with_nothing_to_export_is_a_mistake(tmp_path):
    store = made_store(tmp_path, [made_tile("s", (0, 0, 64, 64), detections((1, 1, 9, 9, 0, 0.9)))])
    with pytest.raises(StoreError, match=r"exported: 1 labelled tiles, 0 rejected, 1 tiles failed, the first: can"):
        export(store, tmp_path / "out", "coco", 0.5, "nms", 0.5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two teachers' stores of made-up scenes, the second with two tiles rejected and other boxes."""
    run_dir = tmp_path_factory.mktemp("pair")
    tiles = tile(tiny_recipe(), run_dir)
    rows, rng = read_tiles(tiles), np.random.default_rng(0)
    stores = []
    for name, bad in (("w1", ()), ("w2", (3, 70))):
        made = []
        for i, row in enumerate(rows):
            corner = rng.integers(0, 60, (20, 2))
            boxes = np.concatenate([corner, corner + rng.integers(8, 60, (20, 2)), rng.integers(0, 3, (20, 1))], axis=1)
            found = detections(*(([*box, score]) for box, score in zip(boxes, rng.uniform(0.02, 0.9, 20), strict=True)))
            made.append((row, detections() if i in bad else found, "cut short" if i in bad else None, False))
        stores.append(write_store(run_dir, made, tiles=tiles.name, weights=name))
    return stores, tiles


def test_a_fused_store_is_a_store(pair, tmp_path, capsys):
    stores, tiles = pair
    folder = fuse(stores, [2, 1], 0.05, 0.55, tiles.parent)
    done, total = summary(folder), len(read_tiles(tiles))
    assert (done["requested"], done["labelled"], done["rejected"]) == (total, total - 2, 2)
    line = f"{done['boxes']} boxes of 2 teachers (of {total - 2} labelled tiles, 2 rejected) in {folder}"
    assert capsys.readouterr().out.strip().splitlines()[-1] == line
    fused, one, two = ({row.tile["tile_id"]: row for row in read_all(open_store(at))} for at in (folder, *stores))
    for tile_id, row in fused.items():
        if row.reason is None:
            expected = fuse_tile([one[tile_id].found, two[tile_id].found], [2, 1], 0.05, 0.55)
            np.testing.assert_array_equal(row.found.boxes, expected.boxes)
            np.testing.assert_array_equal(row.found.scores, expected.scores)
    rejected = [tile_id for tile_id, row in two.items() if row.reason]
    assert [tile_id for tile_id, row in fused.items() if row.reason == "cut short"] == rejected
    assert pd.read_parquet(folder / "rejected")["tile_id"].tolist() == rejected
    assert done["boxes"] == sum(len(row["boxes"]) for row in read_soft_labels(folder)) > 0
    teacher = read_json(folder / "store.json")["teacher"]
    assert teacher["weights"] == [2, 1] and [found["weights"] for found in teacher["fused"]] == ["w1", "w2"]


def test_readers_of_stores_take_a_fused_one(pair, tmp_path):
    stores, tiles = pair
    folder = fuse(stores, [2, 1], 0.05, 0.55, tiles.parent)
    evaluated = numbers(evaluate_store(tiny_recipe(), "fused", tiles, "test", folder, tmp_path))
    assert 0 <= evaluated["map50"] <= 1 and evaluated["losses"] == {}
    assert soft_targets(tiles, "train_1", folder, 0.3)
    export(folder, tmp_path / "out", "geoparquet", 0.3, "nms", 0.5)
    frame = gpd.read_parquet(next((tmp_path / "out").glob("*.parquet")))
    assert set(frame["teacher"]) == {"fused(2 x w1 yolov5n.yaml:n:nc=3, 1 x w2 yolov5n.yaml:n:nc=3)"}


def test_fusing_again_in_any_order_does_no_work_and_goes_on_where_it_was(pair):
    stores, tiles = pair
    folder = fuse(stores, [1, 1], 0.1, 0.55, tiles.parent)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("**/*")}
    assert fuse(stores[::-1], [1, 1], 0.1, 0.55, tiles.parent) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.glob("**/*")} == before
    whole, counts = list(read_soft_labels(folder)), summary(folder)
    first, second, *_ = unpack(folder)
    second.unlink()
    column = read_table(first).schema.get_field_index("saturated")
    marked = read_table(first)
    marked = marked.set_column(column, marked.schema.field(column), pa.array([True] * len(marked)))
    write_table(first, marked)
    fuse(stores, [1, 1], 0.1, 0.55, tiles.parent)
    assert list(read_soft_labels(folder)) == marked.to_pylist() + whole[len(marked) :]  # the first was not made anew
    assert summary(folder) == {**counts, "saturated": len(marked)}


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in the Ray that is there."""
    monkeypatch.setattr(softlabel.without_recipe, "ray_session", lambda run_dir, verbose: contextlib.nullcontext())

    def call(*words):
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def test_export_on_the_command_line(tmp_path, run):
    store = made_store(tmp_path, archive(scenes=2))
    code, out, _ = run("export", store, "--threshold", "0.4", "--merge", "wbf", "--iou", "0.6")
    folder = store.with_name(f"export-geoparquet-{store.name}")
    log, said = out.splitlines()
    assert code == 0 and log == f"log: {tmp_path / LOG}" and said.endswith(f" in {folder}")
    done = summary(folder)
    assert [done[key] for key in ("format", "threshold", "merge", "iou")] == ["geoparquet", 0.4, "wbf", 0.6]
    code, out, _ = run("export", store, "--format", "geojson", "--output", tmp_path / "there")
    assert code == 0 and summary(tmp_path / "there")["threshold"] == 0.3


def test_fuse_on_the_command_line(pair, run):
    stores, tiles = pair
    code, out, _ = run("fuse", *stores, "--weights", "1", "2", "--threshold", "0.1", "--iou", "0.6")
    folder = fuse_job(stores, [1, 2], 0.1, 0.6, tiles.parent).output
    assert code == 0 and out.endswith(f" in {folder}\n") and summary(folder)["name"] == "fused"
    assert run("fuse", *stores)[0] == 0
    assert fuse_job(stores, [1, 1], 0.05, 0.55, tiles.parent).output.exists()


@pytest.mark.parametrize("verb", ["export", "fuse"])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, run, verb):
    monkeypatch.setattr(
        softlabel.without_recipe, "ray_session", lambda *_, **__: pytest.fail("a Ray was started for nothing")
    )
    store = made_store(tmp_path, archive(scenes=1))
    for place, problem in ((tmp_path / "gone", "is no store"), (tmp_path / "tiles-made", "is no store")):
        code, _, error = run(verb, place)
        assert code == 2 and problem in error and error.count("\n") == 1 and error.startswith(f"softlabel {verb}: ")
    (store / DONE).unlink()
    code, _, error = run(verb, store)
    assert code == 2 and "is not finished" in error and error.count("\n") == 1
