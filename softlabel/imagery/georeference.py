"""Where on Earth, or elsewhere, a scene says that it lies; and, if it only seems to say so, why it cannot be placed."""

import math
from typing import Any, NamedTuple

import numpy as np
from affine import Affine
from rasterio.transform import from_gcps

_MAX_MISFIT_PX = 0.5


class Georeference(NamedTuple):
    """``crs`` and ``transform`` (a, b, c, d, e, f) from pixels to it, or neither; then ``unplaced`` may say why."""

    crs: str | None = None
    transform: tuple[float, ...] | None = None
    unplaced: str | None = None


def georeference(dataset: Any) -> Georeference:
    """The place of an open rasterio dataset.

    A CRS without a geotransform does not say where the pixels are in it. Ground control points count where one affine
    transform, GDAL's own least-squares fit, puts each of them within half a pixel of where it is.
    """
    gcps, gcps_crs = dataset.gcps
    if dataset.transform != Affine.identity():
        return _placed(dataset.crs, dataset.transform)
    if gcps:
        return _placed_by_points(gcps, gcps_crs)
    if dataset.crs:
        return Georeference(unplaced="a CRS without a geotransform")
    if dataset.rpcs is not None:
        return Georeference(unplaced="rational polynomial coefficients, which need a terrain model")
    return Georeference()


def _placed(crs: Any, transform: Affine) -> Georeference:
    if not crs:
        return Georeference(unplaced="a geotransform without a CRS")
    if not _has_area(transform):
        return Georeference(unplaced=f"a geotransform in which pixels have no area, {transform[:6]}")
    return Georeference(crs.to_string(), _six(transform))


def _placed_by_points(gcps: list[Any], crs: Any) -> Georeference:
    if not crs:
        return Georeference(unplaced="ground control points without a CRS")
    transform = _affine_of(gcps)
    if transform is None:
        return Georeference(unplaced="ground control points that no affine transform fits within half a pixel")
    return Georeference(crs.to_string(), _six(transform))


def _affine_of(gcps: list[Any]) -> Affine | None:
    if len(gcps) < 3:
        return None
    transform = from_gcps(gcps)
    if not _has_area(transform):
        return None
    found = np.array([~transform @ (point.x, point.y) for point in gcps])
    misfit = np.hypot(*(found - [(point.col, point.row) for point in gcps]).T)
    return transform if misfit.max() <= _MAX_MISFIT_PX else None


def _has_area(transform: Affine) -> bool:
    return all(map(math.isfinite, transform[:6])) and transform.determinant != 0


def _six(transform: Affine) -> tuple[float, ...]:
    return tuple(float(value) for value in transform[:6])
