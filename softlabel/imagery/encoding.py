"""How an open rasterio dataset stores what a person sees: which way up, in which bands, and what its values mean."""

import io
import os
import struct
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from PIL.TiffImagePlugin import ImageFileDirectory_v2
from rasterio.enums import ColorInterp, MaskFlags

from softlabel.imagery.georeference import georeference
from softlabel.imagery.listing import file_system, has_scheme
from softlabel.imagery.pixels import ORIENTATIONS, Encoding

_ORIENTATION_TAG = 274
_PNG_SIGNATURE_BYTES = 8
_REQUEST_BYTES = 1_000_000
# Pillow skips tags it cannot read, with a warning for each: damaged tags do not matter here, and it names no file.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")


def has_mask(dataset: Any) -> bool:
    """Whether the dataset can have missing pixels: by nodata, alpha or a mask."""
    return any(MaskFlags.all_valid not in flags for flags in dataset.mask_flag_enums)


def choose_bands(dataset: Any, bands: Sequence[int]) -> tuple[int, ...]:
    """The bands asked for; a grey image's only band stands in for the usual 1, 2, 3, so that a folder may hold both."""
    coloured = [band for band in dataset.indexes if dataset.colorinterp[band - 1] != ColorInterp.alpha]
    return (1, 1, 1) if tuple(bands) == (1, 2, 3) and coloured == [1] else tuple(bands)


def is_8_bit(dataset: Any, band: int) -> bool:
    """Whether a band is shown as it is; the colours of a palette are 8-bit, whatever its indices are."""
    return dataset.dtypes[band - 1] == "uint8" or _is_palette(dataset, band)


def _is_palette(dataset: Any, band: int) -> bool:
    return dataset.colorinterp[band - 1] == ColorInterp.palette


def encoding(dataset: Any, band: int) -> Encoding:
    """What the values of a band mean."""
    if _is_palette(dataset, band):  # GDAL gives a 1-bit TIFF one too, black or white first
        return Encoding(palette=dataset.colormap(band))
    bits = int(dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", 8))
    white_is_zero = dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
    return Encoding(bits if dataset.dtypes[band - 1] == "uint8" else 8, white_is_zero)


def orientation(uri: str, dataset: Any) -> int:
    """EXIF's orientation, 1 where there is none; a georeferenced TIFF lies as its transform says.

    GDAL itself reports the orientation of JPEGs only.
    """
    if dataset.driver == "JPEG":
        found = dataset.tags().get("EXIF_Orientation", "1")
        return int(found) if found.isdecimal() and int(found) in ORIENTATIONS else 1
    if dataset.driver == "PNG" or (dataset.driver == "GTiff" and georeference(dataset).transform is None):
        found = _stored_orientation(uri, dataset.driver)
        return found if found in ORIENTATIONS else 1
    return 1


def _stored_orientation(uri: str, driver: str) -> Any:
    """The tag of a PNG or TIFF; None over http and /vsi, which are left to GDAL, and GDAL does not read it."""
    if uri.startswith(("http://", "https://", "/vsi")):
        return None
    # Not by Image.open: ultralytics patches it, and it cannot open all that GDAL reads (five bands).
    with _open_bytes(uri) as file:
        try:
            return (_png_exif(file) if driver == "PNG" else _tiff_tags(file)).get(_ORIENTATION_TAG)
        except (SyntaxError, ValueError, TypeError, KeyError, EOFError, struct.error):
            return None


def _open_bytes(uri: str) -> BinaryIO:
    if not has_scheme(uri):
        return open(uri, "rb")
    system, path = file_system(uri)
    return io.BufferedReader(system.open_input_file(path), _REQUEST_BYTES)


def _png_exif(file: BinaryIO) -> Mapping[int, Any]:
    """Found by walking the chunks: EXIF may come after the pixels, which Pillow would decode to get there."""
    file.seek(_PNG_SIGNATURE_BYTES)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"eXIf":
            return _tiff_tags(io.BytesIO(file.read(min(length, _REQUEST_BYTES))))
        file.seek(length + 4, os.SEEK_CUR)  # its checksum follows
    return {}


def _tiff_tags(file: BinaryIO) -> Mapping[int, Any]:
    header = file.read(8)
    tags = ImageFileDirectory_v2(header + file.read(8) if header[2:3] == b"\x2b" else header)  # BigTIFF: 16 bytes
    file.seek(tags.next)
    tags.load(file)
    return tags
