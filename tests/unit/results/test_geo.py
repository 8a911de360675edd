"""Scenes as layers: coordinates, columns, and files that other programs read."""

import json
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pyproj
import pytest
import shapely

from softlabel.results.geo import SceneDetections, scene_file, to_frame, write_scene

CLASSES = ["car", "plane", "ship"]
NORTH_UP = (0.5, 0.0, 400_000.0, 0.0, -0.5, 5_400_000.0)
ROTATED = (0.0, 0.5, 400_000.0, 0.5, 0.0, 5_400_000.0)  # pixel columns go north, rows go east
COLUMNS = ["scene_id", "class", "score", "scores", "teacher", "members", "xmin", "ymin", "xmax", "ymax", "geometry"]


def scene(crs="EPSG:32631", transform=NORTH_UP, *, boxes=((10, 20, 30, 60), (0, 0, 5.5, 4.25))):
    scores = np.array([[0.1, 0.8, 0.3], [0.6, 0.2, 0.6]], np.float32)[: len(boxes)]
    members = np.arange(1, len(boxes) + 1)
    return SceneDetections("a/b.tif", np.array(boxes, float).reshape(-1, 4), scores, members, crs, transform)


def frame(**changes):
    return to_frame(scene(**changes), CLASSES, "0123 yolo")


def test_a_row_says_all_of_an_object():
    found = frame()
    assert list(found.columns) == COLUMNS
    first = found.iloc[0]
    assert (first["scene_id"], first["class"], first["teacher"], first["members"]) == (
        "a/b.tif",
        "plane",
        "0123 yolo",
        1,
    )
    assert first["score"] == np.float32(0.8)
    np.testing.assert_array_equal(first["scores"], np.array([0.1, 0.8, 0.3], np.float32))
    assert first[["xmin", "ymin", "xmax", "ymax"]].tolist() == [10, 20, 30, 60]
    assert found["class"].tolist() == ["plane", "car"]


@pytest.mark.parametrize(
    ("transform", "corners"),
    [
        (NORTH_UP, {(400_005, 5_399_990), (400_015, 5_399_990), (400_015, 5_399_970), (400_005, 5_399_970)}),
        (ROTATED, {(400_010, 5_400_005), (400_010, 5_400_015), (400_030, 5_400_015), (400_030, 5_400_005)}),
    ],
)
def test_corners_go_through_the_scene_s_affine(transform, corners):
    found = frame(transform=transform)
    assert set(found.geometry[0].exterior.coords) == corners
    assert found.crs == "EPSG:32631"


def test_a_rotated_box_keeps_its_corners_and_its_angle():
    # 10 by 5 px, turned so that its long side runs 4 px along x for 3 px along y.
    xywhr = np.array([[20, 40, 10, 5, np.arctan2(3, 4)]])
    upright = scene(boxes=((14.5, 35, 25.5, 45),))
    found = to_frame(replace(upright, xywhr=xywhr), CLASSES, "0123 obb")
    pixels = [(17.5, 35), (25.5, 41), (22.5, 45), (14.5, 39)]
    expected = shapely.Polygon([(400_000 + x / 2, 5_400_000 - y / 2) for x, y in pixels])
    assert found.geometry[0].symmetric_difference(expected).area < 1e-6
    assert found["angle"].tolist() == [np.arctan2(3, 4)]
    assert found[["xmin", "ymin", "xmax", "ymax"]].iloc[0].tolist() == [14.5, 35, 25.5, 45]


def test_without_a_crs_geometry_is_pixels():
    found = frame(crs=None, transform=None)
    assert found.crs is None
    assert found.geometry[0].bounds == (10, 20, 30, 60)


@pytest.mark.parametrize("crs", ["EPSG:32631", None])
def test_geoparquet_comes_back(tmp_path, crs):
    written = frame(crs=crs, transform=NORTH_UP if crs else None)
    path = scene_file(tmp_path / "deep", "a/b.tif", "geoparquet")
    write_scene(path, written, "geoparquet")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = gpd.read_parquet(path)
    assert found.crs == crs and list(found.columns) == COLUMNS
    assert found.geometry.geom_equals(written.geometry).all()
    np.testing.assert_array_equal(np.stack(found["scores"]), scene().scores)
    meta = json.loads(pq.read_schema(path).metadata[b"geo"])
    assert meta["columns"]["geometry"]["encoding"] == "WKB"
    assert (meta["columns"]["geometry"]["crs"] is None) == (crs is None)


def test_an_empty_scene_has_the_same_columns(tmp_path):
    schemas = []
    for boxes in ((), ((1, 2, 3, 4),)):
        path = tmp_path / f"{len(boxes)}.parquet"
        write_scene(path, frame(boxes=boxes), "geoparquet")
        schemas.append(pq.read_schema(path).remove_metadata())
    assert schemas[0].equals(schemas[1])
    assert schemas[0].field("scores").type.list_size == 3
    write_scene(tmp_path / "0.geojson", frame(boxes=()), "geojson")
    assert json.loads((tmp_path / "0.geojson").read_text()) == {"type": "FeatureCollection", "features": []}


def geojson(tmp_path, **changes):
    path = scene_file(tmp_path, "a/b.tif", "geojson")
    write_scene(path, frame(**changes), "geojson")
    document = json.loads(path.read_text())
    assert "crs" not in document and "name" not in document
    return document["features"]


def test_geojson_is_longitude_and_latitude(tmp_path):
    first, _ = geojson(tmp_path)
    to_lonlat = pyproj.Transformer.from_crs("EPSG:32631", "EPSG:4326", always_xy=True)
    expected = {to_lonlat.transform(*corner) for corner in [(400_005, 5_399_990), (400_015, 5_399_970)]}
    found = shapely.geometry.shape(first["geometry"])
    for corner in expected:
        assert found.exterior.distance(shapely.Point(corner)) < 1e-6
    assert found.exterior.is_ccw
    properties = first["properties"]
    assert (properties["class"], properties["members"], properties["xmax"]) == ("plane", 1, 30)
    assert properties["scores"] == pytest.approx([0.1, 0.8, 0.3])


@pytest.mark.parametrize("crs", [None, 'LOCAL_CS["building site",UNIT["metre",1]]'])
def test_geojson_of_what_has_no_place_on_earth_keeps_its_coordinates(tmp_path, crs):
    transform = None if crs is None else (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    path = tmp_path / "a.geojson"
    write_scene(path, frame(crs=crs, transform=transform), "geojson")
    found = json.loads(path.read_text())["features"][0]["geometry"]
    assert shapely.geometry.shape(found).bounds == (10, 20, 30, 60)


def test_geojson_is_cut_at_the_antimeridian(tmp_path):
    box, _ = geojson(tmp_path, crs="EPSG:32660", transform=(100.0, 0.0, 827_000.0, 0.0, -100.0, 1_000_000.0))
    assert box["geometry"]["type"] == "MultiPolygon"
    assert all(part.bounds[2] - part.bounds[0] < 1 for part in shapely.geometry.shape(box["geometry"]).geoms)
