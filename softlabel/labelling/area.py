"""The ground that a tile covers."""

from functools import lru_cache

from pyproj import Geod, Transformer
from pyproj.exceptions import GeodError, ProjError

_GEOD = Geod(ellps="WGS84")


def tile_km2(row: dict) -> float:
    """The area of a tile on the ellipsoid, whatever its CRS; 0 where the scene has no CRS, or one that is unknown or
    leads to no place on Earth, such as a building site's or the Moon's.

    Args:
        row: A row of the tiles table; ``window``, ``crs`` and ``transform`` are used.
    """
    if row["crs"] is None or row["transform"] is None:
        return 0.0
    column, top, width, height = row["window"]
    a, b, c, d, e, f = row["transform"]
    corners = ((column + x, top + y) for x, y in ((0, 0), (width, 0), (width, height), (0, height)))
    places = [(a * x + b * y + c, d * x + e * y + f) for x, y in corners]
    try:
        lons, lats = zip(*(_to_lonlat(row["crs"]).transform(*place) for place in places), strict=True)
        area_m2, _ = _GEOD.polygon_area_perimeter(lons, lats)
    except (ProjError, GeodError):
        return 0.0
    return abs(area_m2) / 1e6 if area_m2 == area_m2 else 0.0


@lru_cache(maxsize=64)
def _to_lonlat(crs: str) -> Transformer:
    return Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
