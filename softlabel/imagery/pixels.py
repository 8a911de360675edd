"""From raw values to what a person sees: three 8-bit bands, the right way up. Arrays only, no files.

Arrays are (bands, rows, columns) until `to_rgb8` puts the bands last.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Window = tuple[int, int, int, int]
"""Column, row, width, height."""


class Orientation(NamedTuple):
    """How stored pixels become upright ones: rows and columns are transposed, then flipped."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height as seen, from those stored (or the other way round)."""
        return (height, width) if self.transpose else (width, height)

    def stored_window(self, seen: Window, width: int, height: int) -> Window:
        """Where the pixels of a window as ``seen`` are stored; ``width`` and ``height`` are the raster's, as seen."""
        column, row, across, down = seen
        column = width - column - across if self.flip_columns else column
        row = height - row - down if self.flip_rows else row
        return (row, column, down, across) if self.transpose else (column, row, across, down)

    def upright(self, pixels: NDArray) -> NDArray:
        """Stored pixels as they are seen."""
        if self == UPRIGHT:
            return pixels
        turned = pixels.swapaxes(1, 2) if self.transpose else pixels
        return turned[:, :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1].copy()


UPRIGHT = Orientation()
ORIENTATIONS = {
    1: UPRIGHT,
    2: Orientation(flip_columns=True),
    3: Orientation(flip_rows=True, flip_columns=True),
    4: Orientation(flip_rows=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, flip_columns=True),
    7: Orientation(transpose=True, flip_rows=True, flip_columns=True),
    8: Orientation(transpose=True, flip_rows=True),
}
"""By the value of EXIF's Orientation, which is the same as TIFF's (TIFF 6.0, section 8)."""


class Encoding(NamedTuple):
    """What a band's values mean: 1-bit to 7-bit values, white as 0, or indices into a colour table."""

    bits: int = 8
    white_is_zero: bool = False
    palette: Mapping[int, Sequence[int]] | None = None


def valid_pixels(pixels: NDArray) -> NDArray[np.bool_]:
    """Which are valid, (rows, columns): a pixel is missing only where all its bands are nodata, NaN or infinite.

    Band by band, (255, 40, 40) would lose its red under nodata 255, and a saturated roof would turn dark.
    """
    valid = ~np.ma.getmaskarray(pixels)
    if pixels.dtype.kind == "f":
        valid &= np.isfinite(np.ma.getdata(pixels))
    return np.any(valid, axis=0)


def valid_values(pixels: NDArray) -> NDArray:
    """The values (n,) of the valid pixels, to find a range by.

    The nodata value of an unsigned type is one that a sensor reaches, so in a valid pixel it counts as any other. That
    of other types is one that none reaches (-9999), which would spoil the range: it is left out band by band.
    """
    if pixels.dtype.kind == "u":
        values = np.ma.getdata(pixels)
        return np.asarray(values[:, valid_pixels(pixels)] if np.ma.is_masked(pixels) else values).ravel()
    return np.asarray(np.ma.masked_invalid(pixels).compressed())


def apply_palette(indices: NDArray, palette: Mapping[int, Sequence[int]]) -> tuple[NDArray, NDArray[np.bool_]]:
    """Indices (1, rows, columns) to (3, rows, columns) uint8 by a colour table, and where they are not transparent."""
    values = np.ma.getdata(indices)[0]
    table = np.zeros((max(int(values.max(initial=0)), *palette) + 1, 4), np.uint8)
    for index, colour in palette.items():
        table[index] = colour
    found = table[values]
    return np.moveaxis(found[..., :3], 2, 0), found[..., 3] > 0


def to_rgb8(
    pixels: NDArray, stretch: Sequence[float] | None, valid: NDArray[np.bool_] | None, encoding: Encoding
) -> NDArray[np.uint8]:
    """(3, H, W) raw values to (H, W, 3) uint8.

    Args:
        pixels: Raw values, maybe masked.
        stretch: The values that become 0 and 255; None: values of fewer than 8 bits by their range, others as they are.
        valid: (H, W), None where all are valid; the others become 0.
        encoding: What the values mean; a palette has been applied already.
    """
    values = np.ma.getdata(pixels)
    if stretch is None and encoding.bits < 8:
        stretch = 0, 2**encoding.bits - 1
    if stretch is not None:
        low, high = stretch
        # float32 is exact for 16 bit; 32-bit integers and float64 keep their precision.
        values = values.astype(np.result_type(values.dtype, np.float32))
        if pixels.dtype.kind == "f":
            values = np.where(np.isfinite(values), values, low)
        values = np.rint(np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
    if encoding.white_is_zero:
        values = 255 - values
    if valid is not None:
        values = np.where(valid, values, np.uint8(0))
    return np.asarray(cv2.merge(list(values)))  # forty times as fast as a transposed copy
