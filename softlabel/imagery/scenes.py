"""Scenes: describing them, and reading one tile's pixels.

Pixels are read as a person sees them: upright (EXIF orientation), a palette as its colours, fewer than 8 bits scaled
up, white as white. Truth is drawn on what is seen, and other programs read it so too. Sidecar files (.aux.xml, .ovr,
world files) are ignored, so that a scene reads the same from a folder and from an object store.
"""

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.fs
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from softlabel.errors import NoValidPixelError, SceneError, StorageError
from softlabel.imagery import blocks
from softlabel.imagery.encoding import choose_bands, encoding, has_mask, is_8_bit, orientation
from softlabel.imagery.georeference import georeference
from softlabel.imagery.listing import file_system, has_scheme
from softlabel.imagery.pixels import ORIENTATIONS, UPRIGHT, apply_palette, to_rgb8, valid_pixels, valid_values

PERCENTILES = (2, 98)
_SAMPLE_PX = 1024
_GDAL = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # else each open lists the folder: a request per scene on S3
    # Bytes: rasterio.Env takes no megabytes, and 64 would mean no cache, so that each tile would decode its JPEG anew.
    # Per process: the default of 5 % of memory, times the readers, is too much.
    "GDAL_CACHEMAX": blocks.CACHE_BYTES,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # else a JPEG cut short reads as grey, with only a warning
    # A remote scene that failed once must not be remembered as missing when it is tried again.
    "CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/:/vsigs/:/vsiaz/",
    "GDAL_HTTP_TIMEOUT": 60,  # else a server that stops answering stops the run
    "GDAL_HTTP_CONNECTTIMEOUT": 20,
    "GDAL_HTTP_MAX_RETRY": 3,
    "GDAL_HTTP_RETRY_DELAY": 1,
}


def _gdal() -> dict[str, Any]:
    """GDAL's options, including what all else here takes from the environment, under GDAL's own names."""
    return {**_GDAL, **_gdal_s3(), **_gdal_azure()}


def _gdal_s3() -> dict[str, str]:
    if not (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        return {}
    scheme, _, host = endpoint.rstrip("/").rpartition("://")
    https = "NO" if scheme == "http" else "YES"
    return {"AWS_S3_ENDPOINT": host, "AWS_HTTPS": https, "AWS_VIRTUAL_HOSTING": "FALSE"}


def _gdal_azure() -> dict[str, str]:
    """https://gdal.org/en/stable/user/virtual_file_systems.html#vsiaz-microsoft-azure-blob-files"""
    names = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ENDPOINT")
    account, key, endpoint = (os.environ.get(name) for name in names)
    if not (account and key):
        return {}
    if not endpoint:
        return {"AZURE_STORAGE_ACCOUNT": account, "AZURE_STORAGE_ACCESS_KEY": key}
    parts = {"DefaultEndpointsProtocol": endpoint.partition(":")[0], "AccountName": account, "AccountKey": key}
    told = "".join(f"{name}={value};" for name, value in (parts | {"BlobEndpoint": endpoint}).items())
    return {"AZURE_STORAGE_CONNECTION_STRING": told}


# Plain photographs have no georeference, and are welcome.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


@dataclass(frozen=True)
class SceneInfo:
    """What tile rows repeat about their scene, and what the user is told.

    Attributes:
        width: In pixels, as seen; so is ``height``.
        crs: Null where the scene's place is not known; then ``unplaced`` may say why.
        transform: (a, b, c, d, e, f), null without a CRS.
        stretch: Raw values that become 0 and 255; null for 8 bit, unless the recipe gives them.
        stamp: `scene_stamp`.
        bands: The 1-based bands read as red, green, blue.
        orientation: EXIF's, 1 (upright) to 8.
    """

    width: int
    height: int
    crs: str | None
    transform: tuple[float, ...] | None
    unplaced: str | None
    stretch: tuple[float, float] | None
    stamp: str | None
    bands: tuple[int, ...]
    orientation: int


def scene_stamp(uri: str) -> str | None:
    """Size and modification time of a scene's file, which stand for its content; None where they cannot be had (http).

    Raises:
        SceneError: It is not there; ``retryable`` if it is remote.
    """
    if uri.startswith(("http://", "https://", "/vsi")):
        return None
    with _scene_errors(uri):
        if not has_scheme(uri):
            found = os.stat(uri)
            return f"{found.st_size} bytes of {found.st_mtime_ns} ns"
        system, path = file_system(uri)
        info = system.get_file_info(path)
        if info.type != pyarrow.fs.FileType.File:
            raise OSError("no such file")
        return f"{info.size} bytes of {info.mtime_ns} ns"


def describe_scene(uri: str, bands: Sequence[int], stretch: tuple[float, float] | None) -> SceneInfo:
    """Size, georeference and stretch of a scene, without reading it whole.

    Reads its last pixel too: a file cut short fails here, not at its last tile when labelling. (A JPEG or PNG is
    decoded, line by line, to get there.)

    Args:
        uri: A local path, or anything that GDAL can open.
        bands: The 1-based bands that tiles will read; a grey image's only band stands in for the usual 1, 2, 3.
        stretch: Raw values mapped to 0 and 255. None leaves 8 bit as it is; other scenes get the 2nd and 98th
            percentile of the valid pixels over all ``bands``, sampled at about 1,024 px: one range for the whole scene,
            or tiles and colours would not match.

    Raises:
        SceneError: It cannot be opened, is cut short, or lacks a band.
    """
    stamp = scene_stamp(uri)  # before the first read: a scene replaced meanwhile must not pass for what was read
    with _open(uri) as dataset:
        chosen = choose_bands(dataset, bands)
        _check_bands(uri, dataset, chosen)
        dataset.read(list(chosen), window=Window(dataset.width - 1, dataset.height - 1, 1, 1))
        turned = orientation(uri, dataset)
        width, height = ORIENTATIONS[turned].size(dataset.width, dataset.height)
        found = _find_stretch(uri, dataset, chosen, stretch)
        return SceneInfo(width, height, *georeference(dataset), found, stamp, chosen, turned)


class TileReader:
    """Reads tiles, keeping the last scene open. One per process and thread: handles cannot be shared or pickled.

    GDAL's block cache is made large enough for a row of tiles (up to 256 MB), so that the blocks of a scene whose tiles
    come row by row are decoded once.
    """

    def __init__(self) -> None:
        self._uri: str | None = None
        self._dataset: Any = None
        self._orientation = UPRIGHT
        self._cache_bytes = blocks.CACHE_BYTES

    def read(self, row: dict) -> NDArray[np.uint8]:
        """The pixels of one tile.

        Args:
            row: A row of the tiles table; ``scene_uri``, ``scene_stamp``, ``window``, ``bands`` and ``stretch`` are
                used.

        Returns:
            (height, width, 3) uint8, red, green, blue as the row's ``bands`` say; 0 where there is no data.

        Raises:
            NoValidPixelError: All of the tile is nodata, transparent or NaN.
            SceneError: The scene is missing, cut short or no longer what it was; ``retryable`` where it is remote and
                trying again may help.
        """
        with self._dataset_of(row) as dataset:
            coded = encoding(dataset, row["bands"][0])
            window = Window(*self._stored_window(row, dataset))
            bands = row["bands"][:1] if coded.palette else row["bands"]
            pixels = dataset.read(list(bands), window=window, masked=has_mask(dataset))
            self._cache_bytes = blocks.cache_bytes(dataset, window, self._orientation.transpose)
        pixels = self._orientation.upright(pixels)
        valid = valid_pixels(pixels) if np.ma.is_masked(pixels) or pixels.dtype.kind == "f" else None
        if coded.palette:
            pixels, opaque = apply_palette(pixels, coded.palette)
            valid = opaque if valid is None else valid & opaque
        if valid is not None and not valid.any():
            raise NoValidPixelError(f"tile at {list(row['window'])} of scene {row['scene_uri']} has no valid pixel")
        return to_rgb8(pixels, row["stretch"], valid, coded)

    def is_empty(self, row: dict) -> bool:
        """Whether a tile has no valid pixel; its pixels are read only where the scene can have missing ones.

        Raises:
            SceneError: As for `read`.
        """
        with self._dataset_of(row) as dataset:
            band = row["bands"][0]
            whole = dataset.dtypes[band - 1][0] in "ui" and not has_mask(dataset)
            if whole and not encoding(dataset, band).palette:
                return False
        try:
            self.read(row)
        except NoValidPixelError:
            return True
        return False

    def close(self) -> None:
        """Close the scene that is open, if one is."""
        if self._dataset is not None:
            self._dataset.close()
        self._uri = self._dataset = None

    @contextmanager
    def _dataset_of(self, row: dict) -> Iterator[Any]:
        """A tile's open scene, checked to be what was tiled; after an error it is opened anew."""
        uri = row["scene_uri"]
        try:
            self._check_stamp(uri, row["scene_stamp"])
            # One Env, its cache sized by the previous tile: leaving a nested one would shrink and so empty the cache.
            with _scene_errors(uri), rasterio.Env(**{**_gdal(), "GDAL_CACHEMAX": self._cache_bytes}):
                if uri != self._uri:
                    self._open(uri)
                self._check_window(row)
                yield self._dataset
        except SceneError:
            self.close()
            raise

    def _open(self, uri: str) -> None:
        self.close()
        self._dataset = rasterio.open(uri)
        self._uri = uri
        _forget_errors(self._dataset)
        blocks.check_blocks(uri, self._dataset)
        self._orientation = ORIENTATIONS[orientation(uri, self._dataset)]

    def _stored_window(self, row: dict, dataset: Any) -> tuple[int, int, int, int]:
        size = self._orientation.size(dataset.width, dataset.height)
        return self._orientation.stored_window(tuple(row["window"]), *size)

    def _check_window(self, row: dict) -> None:
        dataset = self._dataset
        seen_width, seen_height = self._orientation.size(dataset.width, dataset.height)
        column, top, width, height = row["window"]
        fits = column + width <= seen_width and top + height <= seen_height and max(row["bands"]) <= dataset.count
        kind = dataset.dtypes[row["bands"][0] - 1] if fits else ""
        shown_as_is = fits and is_8_bit(dataset, row["bands"][0])
        if not fits or (row["stretch"] is None and not shown_as_is) or kind.startswith("complex"):
            raise SceneError(
                f"scene {row['scene_uri']} is not what was tiled: {dataset.count} bands of {seen_width}x{seen_height} "
                f"px {dataset.dtypes[0]}, tile at {list(row['window'])}: tile it again in another --run-dir"
            )

    def _check_stamp(self, uri: str, tiled: str | None) -> None:
        if tiled is None or (uri == self._uri and has_scheme(uri)):  # a remote one only once, it costs a request
            return
        found = scene_stamp(uri)
        if found != tiled:
            raise SceneError(
                f"scene {uri} was replaced after it was tiled ({tiled}, now {found}): use another --run-dir"
            )


class _Readers(threading.local):
    """A reader for each thread that asks."""

    def __init__(self) -> None:
        self.own = TileReader()


_readers = _Readers()


def read_tile(row: dict) -> NDArray[np.uint8]:
    """`TileReader.read` by the reader of this thread, which keeps its scene open between calls."""
    return _readers.own.read(row)


@contextmanager
def _scene_errors(uri: str) -> Iterator[None]:
    """Turn whatever rasterio raises about a scene into a SceneError of one line."""
    try:
        yield
    except (RasterioError, CPLE_BaseError, OSError, ValueError, MemoryError, StorageError) as error:
        # rasterio says "see previous exception"; the previous one has GDAL's own words.
        reason = " ".join(str(error.__cause__ or error).split())
        remote = has_scheme(uri) and not uri.startswith("file://")
        raise SceneError(f"cannot read scene {uri}: {reason}", retryable=remote) from error


@contextmanager
def _open(uri: str) -> Iterator[Any]:
    with _scene_errors(uri):
        uri.encode()  # a name that is not UTF-8 cannot be written to a table
        with rasterio.Env(**_gdal()), rasterio.open(uri) as dataset:
            _forget_errors(dataset)
            blocks.check_blocks(uri, dataset)
            yield dataset


def _forget_errors(dataset: Any) -> None:
    """GDAL opens a JPEG with damaged EXIF, but keeps an error for the next call to raise; once raised, it is gone."""
    with suppress(CPLE_BaseError):
        _ = dataset.colorinterp


def _check_bands(uri: str, dataset: Any, bands: Sequence[int]) -> None:
    if max(bands) > dataset.count:
        raise SceneError(
            f"scene {uri} has {dataset.count} band(s), tiles.bands asks for {list(bands)}: set tiles.bands to those it "
            "has (for one band: [1, 1, 1])"
        )
    kinds = {dataset.dtypes[band - 1] for band in bands}
    if len(kinds) > 1 or "complex" in " ".join(kinds):
        raise SceneError(f"scene {uri} has bands of {', '.join(sorted(kinds))}: choose tiles.bands of one real type")


def _find_stretch(
    uri: str, dataset: Any, bands: Sequence[int], given: tuple[float, float] | None
) -> tuple[float, float] | None:
    if given is not None or is_8_bit(dataset, bands[0]):
        return given
    for level in range(len(dataset.overviews(bands[0]))):  # the sample comes from one of them
        with rasterio.open(uri, overview_level=level) as overview:
            blocks.check_blocks(uri, overview)
    factor = max(1.0, max(dataset.width, dataset.height) / _SAMPLE_PX)
    shape = (len(bands), max(1, int(dataset.height / factor)), max(1, int(dataset.width / factor)))
    sample = _valid_values(dataset, bands, out_shape=shape)
    if not len(sample):
        sample = _first_valid_values(dataset, bands)
    low, high = (float(value) for value in np.percentile(sample, PERCENTILES)) if len(sample) else (0.0, 1.0)
    return low, high


def _valid_values(dataset: Any, bands: Sequence[int], **options: Any) -> NDArray:
    return valid_values(dataset.read(list(bands), masked=True, **options))


def _first_valid_values(dataset: Any, bands: Sequence[int]) -> NDArray:
    """The valid values of the first block that has any: a sample can miss a few valid pixels."""
    values = (_valid_values(dataset, bands, window=window) for _, window in dataset.block_windows(bands[0]))
    return next((found for found in values if len(found)), np.zeros(0))
