"""Made-up satellite scenes with truth in xView's own format: airports, harbours, car parks, empty land and water.

A scene is first laid out (ground areas and things as data), then painted, so that it can be painted without its
objects too. Scene i depends on (seed, i, settings) alone. ``difficulty`` makes objects smaller, fainter and closer
together, adds look-alikes (crosses and cranes, piers and sandbars, containers and roof units), haze, blur and noise.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform as to_crs

from softlabel import store
from softlabel.config import Synthetic
from softlabel.errors import StoreError
from softlabel.imagery import drawing
from softlabel.imagery.drawing import Image
from softlabel.imagery.layouts import Layout, lay_out

TYPE_IDS = {"plane": 11, "car": 18, "ship": 40}  # xView: Fixed-wing Aircraft, Small Car, Maritime Vessel
GSD_M = 0.5
CRS = "EPSG:32631"


def render(layout: Layout, settings: Synthetic, seed: int, index: int, *, objects: bool = True) -> Image:
    """Paint a layout as RGB (S, S, 3) uint8. Without ``objects``, all else, noise included, stays the same."""
    rng = np.random.default_rng([seed, index, 1])
    things = [thing for thing in layout.things if objects or not thing.label]
    canvas = drawing.paint_ground(rng, layout.areas, settings.scene_size_px)
    drawing.paint_shadows(canvas, things, layout.sun_xy, 0.55 * (1 - 0.5 * settings.difficulty))
    for thing in things:
        drawing.paint_thing(canvas, thing)
    return drawing.develop(rng, canvas, settings.difficulty)


def truth_boxes(layout: Layout, size_px: int) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Class and upright bounding box of each object in whole scene pixels, max edges exclusive, cut to the scene."""
    boxes = []
    for thing in layout.things:
        if thing.label:
            low = np.floor(thing.points_N2.min(axis=0) + 0.25).clip(0, size_px).astype(int).tolist()
            high = np.ceil(thing.points_N2.max(axis=0) - 0.25).clip(0, size_px).astype(int).tolist()
            boxes.append((thing.label, (low[0], low[1], high[0], high[1])))
    return boxes


def write_scenes(folder: Path, settings: Synthetic, seed: int) -> tuple[Path, Path]:
    """Write the scenes (GeoTIFF) and their truth (xView GeoJSON), unless they are there already.

    Returns:
        The folder of scenes and the truth file.

    Raises:
        StoreError: The folder holds finished scenes of other settings or another seed.
    """
    scenes, truth = folder / "scenes", folder / "truth.geojson"
    made_from = {"seed": seed, **settings.model_dump(mode="json")}
    if store.is_done(folder):
        found = store.summary(folder).get("made_from")
        if found != made_from:
            raise StoreError(f"{folder} holds scenes made from {found}, not {made_from}: use another folder")
        return scenes, truth
    counts = dict.fromkeys(TYPE_IDS.values(), 0)
    store.commit(truth, lambda path: _write_truth(path, _write_each(scenes, settings, seed), counts))
    objects = {name: counts[type_id] for name, type_id in TYPE_IDS.items()}
    store.finish(folder, {"made_from": made_from, "objects": objects})
    return scenes, truth


def _write_each(scenes: Path, settings: Synthetic, seed: int) -> Iterator[dict]:
    """Write one scene after another, yielding the features of each."""
    for index in range(settings.num_scenes):
        layout, name = lay_out(settings, seed, index), f"scene-{index:05d}.tif"
        image, transform = render(layout, settings, seed, index), _transform(index, settings)
        store.commit(scenes / name, lambda path: _write_tiff(path, image, transform))  # noqa: B023, runs at once
        yield from _features(name, truth_boxes(layout, settings.scene_size_px), transform)


def _transform(index: int, settings: Synthetic) -> Affine:
    """Scenes lie on a grid, 100 to a row, 100 m apart, whatever their number."""
    step_m = settings.scene_size_px * GSD_M + 100
    return from_origin(400_000 + index % 100 * step_m, 5_400_000 - index // 100 * step_m, GSD_M, GSD_M)


def _write_tiff(path: Path, image: Image, transform: Affine) -> None:
    height, width, bands = image.shape
    layout = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "zlevel": 1}
    size = {"width": width, "height": height, "count": bands, "dtype": "uint8", "photometric": "rgb"}
    with rasterio.open(path, "w", driver="GTiff", crs=CRS, transform=transform, **size, **layout) as file:
        file.write(image.transpose(2, 0, 1))


def _write_truth(path: Path, features: Iterator[dict], counts: dict[int, int]) -> None:
    """Write features as they come, so that memory does not grow with the scenes; count them by type_id."""
    with open(path, "w") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        separator = "\n"
        for feature in features:
            file.write(separator + json.dumps(feature))
            separator = ",\n"
            counts[feature["properties"]["type_id"]] += 1
        file.write("\n]}\n")


def _features(image_id: str, boxes: list[tuple[str, tuple[int, int, int, int]]], transform: Affine) -> Iterator[dict]:
    """xView features: the box in pixels as text, and its ring in lon/lat, clockwise on screen from the top left."""
    rings = np.array([[(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)] for _, (x0, y0, x1, y1) in boxes])
    east_north = transform @ rings.reshape(-1, 2).T if len(boxes) else ([], [])
    lon, lat = to_crs(CRS, "EPSG:4326", *east_north)
    lonlat = np.stack([lon, lat], axis=1).reshape(-1, 5, 2).round(9).tolist()
    for (label, box), ring in zip(boxes, lonlat, strict=True):
        properties = {"bounds_imcoords": ",".join(map(str, box)), "type_id": TYPE_IDS[label], "image_id": image_id}
        yield {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": properties,
        }
