"""One scene's detections as a layer for a GIS: GeoParquet in the scene's CRS, GeoJSON in longitude and latitude.

Shape suffixes: M counts boxes, K classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import shapely.affinity
from numpy.typing import NDArray
from pyproj.exceptions import CRSError, ProjError

from softlabel import rotated
from softlabel.errors import SceneError
from softlabel.results.names import safe_name
from softlabel.store import commit

_WGS84 = "EPSG:4326"
_REMEDY = "use --format geoparquet, which keeps the scene's own coordinates"
SUFFIX = {"geoparquet": "parquet", "geojson": "geojson"}


@dataclass(frozen=True)
class SceneDetections:
    """The objects of one scene.

    Attributes:
        boxes: (M, 4) float64, xyxy in scene pixels.
        scores: (M, K) float32 class vectors.
        members: (M,) how many detections in tiles each was merged from.
        crs: As in the tiles table, None where the scene has none.
        transform: The scene's affine (a, b, c, d, e, f) from pixels to ``crs``, or None.
        xywhr: (M, 5) float64, rotated boxes in scene pixels, of which ``boxes`` are the hulls; None where upright.
    """

    scene_id: str
    boxes: NDArray[np.float64]
    scores: NDArray[np.float32]
    members: NDArray[np.int64]
    crs: str | None
    transform: tuple[float, ...] | None
    xywhr: NDArray[np.float64] | None = None


def to_frame(found: SceneDetections, classes: Sequence[str], teacher: str) -> gpd.GeoDataFrame:
    """A row per object.

    Columns: scene_id, class (name of the best), score (of the best), scores (the class vector, in the order of
    ``classes``), teacher, members, xmin, ymin, xmax, ymax (scene pixels; of a rotated box its hull), for rotated boxes
    angle (radians, from x towards y, y down), geometry: the box's four corners in the scene's CRS, or in pixels (y
    down) and without a CRS where the scene has none.

    Raises:
        SceneError: The scene's CRS is not known, or its transform has a value that is not finite.
    """
    if found.transform is not None and not np.isfinite(found.transform).all():
        raise SceneError("its transform has values that are not finite")
    size = len(found.boxes)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(found.scores.ravel(), pa.float32()), len(classes))
    columns = {
        "scene_id": _repeated(found.scene_id, size),
        "class": pd.array([classes[i] for i in found.scores.argmax(axis=1)], dtype="str"),
        "score": found.scores.max(axis=1),
        "scores": pd.Series(vectors, dtype=pd.ArrowDtype(vectors.type)),
        "teacher": _repeated(teacher, size),
        "members": found.members,
        **dict(zip(("xmin", "ymin", "xmax", "ymax"), found.boxes.T, strict=True)),
        **({} if found.xywhr is None else {"angle": found.xywhr[:, 4]}),
    }
    # Counterclockwise on a map, whose y goes up, as RFC 7946 wants outer rings.
    upright = found.boxes[:, [[0, 1], [0, 3], [2, 3], [2, 1]]]
    corners = upright if found.xywhr is None else rotated.corners(found.xywhr)
    try:
        return gpd.GeoDataFrame(columns, geometry=_polygons(corners, found.transform), crs=found.crs)
    except CRSError as error:
        raise SceneError(f"a CRS that is not known: {' '.join(str(error).split())[:200]}") from None


def scene_file(folder: Path, scene_id: str, fmt: str) -> Path:
    """Where a scene's objects go."""
    return folder / f"{safe_name(scene_id)}.{SUFFIX[fmt]}"


def write_scene(path: Path, frame: gpd.GeoDataFrame, fmt: str) -> None:
    """Commit one scene's file. GeoJSON has longitude and latitude to 7 decimals (RFC 7946), or without a CRS pixels.

    Raises:
        SceneError: GeoJSON cannot say where these boxes are.
    """
    write = _write_geoparquet if fmt == "geoparquet" else _write_geojson
    commit(path, lambda temporary: write(temporary, frame))


def _repeated(text: str, size: int) -> pd.api.extensions.ExtensionArray:
    return pd.array([text] * size, dtype="str")


def _polygons(corners_M42: NDArray[np.float64], transform: tuple[float, ...] | None) -> NDArray:
    x, y = corners_M42.transpose(2, 0, 1)
    if transform is not None:
        a, b, c, d, e, f = transform
        x, y = a * x + b * y + c, d * x + e * y + f
    return shapely.polygons(np.stack([x, y], axis=2))


def _write_geoparquet(path: Path, frame: gpd.GeoDataFrame) -> None:
    frame.to_parquet(path, index=False, compression=None)
    # pandas' own notes on columns are removed: with lists among them, pandas and geopandas cannot read the file back.
    table = pq.read_table(path, partitioning=None)
    notes = {key: value for key, value in table.schema.metadata.items() if key != b"pandas"}
    pq.write_table(table.replace_schema_metadata(notes), path, compression="zstd")


def _write_geojson(path: Path, frame: gpd.GeoDataFrame) -> None:
    # An engineering CRS, of a building site or a ship, leads to no longitude: its coordinates stay as they are, and no
    # CRS is named, since a file that names another than WGS84 is no GeoJSON.
    on_earth = frame.crs is not None and (frame.crs.is_projected or frame.crs.is_geographic)
    frame = _to_lonlat(frame) if on_earth else frame.set_crs(None, allow_override=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'crs' was not provided")
        frame.to_file(
            path,
            driver="GeoJSON",
            engine="pyogrio",
            use_arrow=True,  # the only way to write lists
            geometry_type="Polygon",
            RFC7946="YES" if on_earth else "NO",
            WRITE_NAME="NO",  # it would be that of the temporary file
        )


def _to_lonlat(frame: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """To longitude and latitude; longitudes beyond 180, as of a raster from 0 to 360, are shifted back by whole turns.

    GDAL could do it, but not from every CRS, and it silently drops what lies beyond 360.

    Raises:
        SceneError: There is no way from this CRS, such as one of the Moon, or boxes lie beyond a pole.
    """
    try:
        found = frame.to_crs(_WGS84)
    except ProjError:
        raise SceneError(f"its CRS is not on Earth, or leads to no longitude and latitude: {_REMEDY}") from None
    if not len(found):
        return found
    bounds = found.bounds.to_numpy()
    if not np.isfinite(bounds).all():
        raise SceneError(f"boxes that cannot be projected to longitude and latitude: {_REMEDY}")
    if np.abs(bounds[:, [1, 3]]).max() > 90:
        south, north = bounds[:, 1].min(), bounds[:, 3].max()
        raise SceneError(f"boxes at latitudes {south:g} to {north:g}: {_REMEDY}")
    turns = 360 * np.round((bounds[:, 0] + bounds[:, 2]) / 720)
    moved = [shapely.affinity.translate(box, -turn) for box, turn in zip(found.geometry, turns, strict=True)]
    return found.set_geometry(moved, crs=_WGS84) if turns.any() else found
