"""The blocks a file's pixels are stored in: reading any pixel decodes its whole block; a cache keeps decoded blocks."""

import math
from typing import Any

import numpy as np
from rasterio.enums import Interleaving
from rasterio.windows import Window

from softlabel.errors import SceneError

CACHE_BYTES = 64_000_000
_MAX_CACHE_BYTES = 256_000_000
_BOOKKEEPING = 1.1
"""Factor for what GDAL's cache counts for a block beyond its pixels: some 2 % where it is one row of 6,000 pixels."""


def check_blocks(uri: str, dataset: Any) -> None:
    """Refuse blocks too large for any cache: a file of a kilobyte may claim one of 60 GB.

    Raises:
        SceneError: The scene has such blocks.
    """
    height, width = max(dataset.block_shapes, key=math.prod)
    needed = height * width * _block_bands(dataset) * _item_bytes(dataset)
    if needed > _MAX_CACHE_BYTES:
        raise SceneError(
            f"scene {uri} has blocks of {width}x{height} px, {needed / 1e6:,.0f} MB decoded for each tile: rewrite it "
            "with small ones (gdal_translate -co TILED=YES)"
        )


def cache_bytes(dataset: Any, window: Window, transposed: bool) -> int:
    """Cache size for the blocks under a row of tiles and one more row of blocks, of all bands where a block holds all.

    Where rows and columns are transposed, a row of tiles as seen is a column as stored: 24 million pixels of
    JPEG took 78 ms a tile before all their rows had room, and have taken 13 ms since.
    """
    rows = dataset.height if transposed else window.height + 3 * max(height for height, _ in dataset.block_shapes)
    bands = dataset.count if dataset.interleaving == Interleaving.pixel else 3
    needed = rows * dataset.width * bands * _item_bytes(dataset) * _BOOKKEEPING
    return int(min(max(needed, CACHE_BYTES), _MAX_CACHE_BYTES))


def _block_bands(dataset: Any) -> int:
    return dataset.count if dataset.interleaving == Interleaving.pixel else 1


def _item_bytes(dataset: Any) -> int:
    kind = dataset.dtypes[0]
    return 16 if kind.startswith("complex") else np.dtype(kind).itemsize  # NumPy has no complex_int16
