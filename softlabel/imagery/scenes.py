"""Scenes: finding them, describing them, reading one tile's pixels. The only file that knows rasterio.

EXIF rotation is not applied: boxes and pixels are both in the file's own orientation. Sidecar files (.aux.xml, .ovr,
world files) are not looked for, so that a scene reads the same from a folder and from an object store.
"""

import glob
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.fs
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import Interleaving, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from softlabel.errors import SceneError

SUFFIXES = (".tif", ".tiff", ".jpg", ".jpeg", ".png")
PERCENTILES = (2, 98)
_SAMPLE_PX = 1024
_CACHE_BYTES, _MAX_CACHE_BYTES = 64_000_000, 256_000_000
_GDAL = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # else each open lists the folder: a request per scene on S3
    # Bytes: rasterio.Env takes no megabytes, and 64 would mean no cache, each tile decoding its JPEG anew. Per process:
    # the default of 5 % of memory, times the readers, is too much.
    "GDAL_CACHEMAX": _CACHE_BYTES,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # else a JPEG cut short reads as grey, with a warning only
    # A remote scene that failed once must not be remembered as missing when it is tried again.
    "CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/:/vsigs/:/vsiaz/",
    "GDAL_HTTP_TIMEOUT": 60,  # else a server that stops answering stops the run
    "GDAL_HTTP_CONNECTTIMEOUT": 20,
    "GDAL_HTTP_MAX_RETRY": 3,
    "GDAL_HTTP_RETRY_DELAY": 1,
}
# Plain photographs have no georeference, and are welcome.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


@dataclass(frozen=True)
class SceneInfo:
    """What a tile row repeats of its scene. ``transform`` is (a, b, c, d, e, f), null without a CRS."""

    width: int
    height: int
    crs: str | None
    transform: tuple[float, ...] | None
    stretch: tuple[float, float] | None
    stamp: str | None


def list_scenes(spec: str) -> list[tuple[str, str]]:
    """All images of a folder (with those below it), of a glob, or one image, local or on an object store.

    Returns:
        (scene_id, uri) pairs sorted by scene_id, which is the path below the folder or below the glob's fixed part;
        for one image its name. Local uris are absolute paths. A single image may have any suffix, others are taken
        by theirs: .tif .tiff .jpg .jpeg .png in any case.

    Raises:
        SceneError: There is none.
    """
    try:
        found = _list_remote(spec) if _has_scheme(spec) else _list_local(spec)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SceneError(f"cannot list scenes at {spec} ({error}): check tiles.scenes and your access") from None
    if not found:
        raise SceneError(f"no scenes at {spec}: give tiles.scenes a folder, glob or file of {' '.join(SUFFIXES)}")
    return sorted(found)


def scene_stamp(uri: str) -> str | None:
    """Size and time of a scene's file, which stand for its content; None where they cannot be asked for (http).

    Raises:
        SceneError: It is not there; ``retryable`` if it is remote.
    """
    if uri.startswith(("http://", "https://", "/vsi")):
        return None
    with _scene_errors(uri):
        if not _has_scheme(uri):
            found = os.stat(uri)
            return f"{found.st_size} bytes of {found.st_mtime_ns} ns"
        system, path = pyarrow.fs.FileSystem.from_uri(uri)
        info = system.get_file_info(path)
        if info.type != pyarrow.fs.FileType.File:
            raise OSError("no such file")
        return f"{info.size} bytes of {info.mtime_ns} ns"


def describe_scene(uri: str, bands: Sequence[int], stretch: tuple[float, float] | None) -> SceneInfo:
    """Size, georeference and stretch of a scene, without reading it whole.

    Reads its last pixel too: a file cut short fails here, and not at its last tile when labelling. (A JPEG or PNG is
    decoded, line by line, to get there.)

    Args:
        uri: A local path or what GDAL can open.
        bands: The 1-based bands that tiles will read.
        stretch: Raw values mapped to 0 and 255. None leaves 8 bit as it is; other scenes get the 2nd and 98th
            percentile over all ``bands`` of the valid pixels, seen at about 1,024 px: one range for the whole scene,
            or tiles and colours would not match.

    Raises:
        SceneError: It cannot be opened, is cut short, lacks a band, or holds no valid pixel.
    """
    stamp = scene_stamp(uri)  # before the first look: a scene replaced meanwhile must not pass for what was seen
    with _open(uri) as dataset:
        _check_bands(uri, dataset, bands)
        dataset.read(list(bands), window=Window(dataset.width - 1, dataset.height - 1, 1, 1))
        crs = dataset.crs.to_string() if dataset.crs else None
        transform = tuple(float(value) for value in dataset.transform[:6]) if crs else None
        found = _find_stretch(uri, dataset, bands, stretch)
        return SceneInfo(dataset.width, dataset.height, crs, transform, found, stamp)


class TileReader:
    """Reads tiles, keeping the last scene open. One per process and thread: handles cannot be shared or pickled.

    GDAL's block cache is made large enough for a row of tiles (up to 256 MB), so that the blocks of a scene whose tiles
    come row by row are decoded once.
    """

    def __init__(self) -> None:
        self._uri: str | None = None
        self._dataset: Any = None
        self._cache_bytes = _CACHE_BYTES

    def read(self, row: dict) -> NDArray[np.uint8]:
        """The pixels of one tile.

        Args:
            row: A row of the tiles table; ``scene_uri``, ``scene_stamp``, ``window``, ``bands`` and ``stretch`` are
                used.

        Returns:
            (height, width, 3) uint8, red, green, blue as the row's ``bands`` say; 0 where there is no data.

        Raises:
            SceneError: The scene is missing, cut short or no longer what it was, or the tile has no valid pixel;
                ``retryable`` where the scene is remote and trying again may help.
        """
        uri, window = row["scene_uri"], Window(*row["window"])
        try:
            self._check_stamp(uri, row["scene_stamp"])
            # One Env, its cache sized by the tile before: leaving an inner one would shrink the cache, and empty it.
            with _scene_errors(uri), rasterio.Env(**{**_GDAL, "GDAL_CACHEMAX": self._cache_bytes}):
                dataset = self._open(uri)
                _check_window(uri, dataset, row)
                pixels = dataset.read(list(row["bands"]), window=window, masked=_has_mask(dataset))
                self._cache_bytes = _cache_bytes(dataset, window)
        except SceneError:
            self.close()  # a second try opens it anew
            raise
        _check_valid(uri, pixels, row)
        return _to_rgb8(pixels, row["stretch"])

    def close(self) -> None:
        """Close the scene that is open, if one is."""
        if self._dataset is not None:
            self._dataset.close()
        self._uri = self._dataset = None

    def _open(self, uri: str) -> Any:
        if uri != self._uri:
            self.close()
            self._dataset = rasterio.open(uri)
            self._uri = uri
            _check_blocks(uri, self._dataset)
        return self._dataset

    def _check_stamp(self, uri: str, tiled: str | None) -> None:
        if tiled is None or (uri == self._uri and _has_scheme(uri)):  # a remote one is asked once, it costs a request
            return
        found = scene_stamp(uri)
        if found != tiled:
            raise SceneError(
                f"scene {uri} was replaced after it was tiled ({tiled}, now {found}): use another --run-dir"
            )


_process_reader = TileReader()


def read_tile(row: dict) -> NDArray[np.uint8]:
    """`TileReader.read` by the reader of this process, which keeps its scene open between calls; for one thread."""
    return _process_reader.read(row)


def _has_scheme(spec: str) -> bool:
    return "://" in spec


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _list_local(spec: str) -> list[tuple[str, str]]:
    root = os.path.abspath(spec)
    if os.path.isfile(root):
        return [(os.path.basename(root), root)]
    if os.path.isdir(root):
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    else:
        paths = [path for path in glob.glob(root, recursive=True) if os.path.isfile(path)]
        root = _fixed_part(root)
    return [(Path(path).relative_to(root).as_posix(), path) for path in paths if _is_image(path)]


def _fixed_part(pattern: str) -> str:
    """The folder above the first part of a glob that has a wildcard."""
    parts = Path(pattern).parts
    first = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return str(Path(*parts[:first]))


def _list_remote(spec: str) -> list[tuple[str, str]]:
    if _is_image(spec) and not glob.has_magic(spec):
        return [(PurePosixPath(spec).name, spec)]
    scheme = spec.partition("://")[0]
    root, pattern = (_fixed_part(spec.partition("://")[2]), spec) if glob.has_magic(spec) else (None, None)
    folder = f"{scheme}://{root}" if root else spec
    system, base = pyarrow.fs.FileSystem.from_uri(folder)
    files = system.get_file_info(pyarrow.fs.FileSelector(base, recursive=True))
    names = [str(PurePosixPath(file.path).relative_to(base)) for file in files if file.is_file and _is_image(file.path)]
    found = [(name, f"{folder.rstrip('/')}/{name}") for name in names]
    return [(name, uri) for name, uri in found if pattern is None or fnmatch(uri, pattern)]


@contextmanager
def _scene_errors(uri: str) -> Iterator[None]:
    """Whatever rasterio raises about a scene, as one SceneError line."""
    try:
        yield
    except (RasterioError, CPLE_BaseError, OSError, ValueError, MemoryError) as error:
        # rasterio says "see previous exception"; that one has GDAL's own words.
        reason = " ".join(str(error.__cause__ or error).split())
        remote = _has_scheme(uri) and not uri.startswith("file://")
        raise SceneError(f"cannot read scene {uri}: {reason}", retryable=remote) from error


@contextmanager
def _open(uri: str) -> Iterator[Any]:
    with _scene_errors(uri):
        uri.encode()  # a name that is not UTF-8 cannot be written to a table
        with rasterio.Env(**_GDAL), rasterio.open(uri) as dataset:
            _check_blocks(uri, dataset)
            yield dataset


def _check_blocks(uri: str, dataset: Any) -> None:
    """Refuse blocks that no cache holds: any pixel decodes its whole block, and a kilobyte may claim one of 60 GB."""
    height, width = max(dataset.block_shapes, key=math.prod)
    needed = height * width * _block_bands(dataset) * _item_bytes(dataset)
    if needed > _MAX_CACHE_BYTES:
        raise SceneError(
            f"scene {uri} has blocks of {width}x{height} px, {needed / 1e6:,.0f} MB decoded for each tile: rewrite it "
            "with small ones (gdal_translate -co TILED=YES)"
        )


def _block_bands(dataset: Any) -> int:
    return dataset.count if dataset.interleaving == Interleaving.pixel else 1


def _item_bytes(dataset: Any) -> int:
    kind = dataset.dtypes[0]
    return 16 if kind.startswith("complex") else np.dtype(kind).itemsize  # complex_int16 is none of NumPy's


def _check_bands(uri: str, dataset: Any, bands: Sequence[int]) -> None:
    if max(bands) > dataset.count:
        raise SceneError(
            f"scene {uri} has {dataset.count} band(s), tiles.bands asks for {list(bands)}: set tiles.bands to those it "
            "has (for one band: [1, 1, 1])"
        )
    kinds = {dataset.dtypes[band - 1] for band in bands}
    if len(kinds) > 1 or "complex" in " ".join(kinds):
        raise SceneError(f"scene {uri} has bands of {', '.join(sorted(kinds))}: choose tiles.bands of one real type")


def _check_window(uri: str, dataset: Any, row: dict) -> None:
    column, top, width, height = row["window"]
    fits = column + width <= dataset.width and top + height <= dataset.height and max(row["bands"]) <= dataset.count
    kind = dataset.dtypes[row["bands"][0] - 1] if fits else ""
    if not fits or (row["stretch"] is None and kind != "uint8") or kind.startswith("complex"):
        raise SceneError(
            f"scene {uri} is not what was tiled: {dataset.count} bands of {dataset.width}x{dataset.height} px "
            f"{dataset.dtypes[0]}, tile at {list(row['window'])}: tile it again in another --run-dir"
        )


def _cache_bytes(dataset: Any, window: Window) -> int:
    """Room for the blocks under a row of tiles, and another row of blocks, for all bands where a block holds all."""
    rows = window.height + 3 * max(height for height, _ in dataset.block_shapes)
    bands = dataset.count if dataset.interleaving == Interleaving.pixel else 3
    needed = int(rows * dataset.width * bands * np.dtype(dataset.dtypes[0]).itemsize)
    return min(max(needed, _CACHE_BYTES), _MAX_CACHE_BYTES)


def _check_valid(uri: str, pixels: NDArray, row: dict) -> None:
    masked = np.ma.is_masked(pixels) and bool(np.ma.getmaskarray(pixels).all())
    if masked or (pixels.dtype.kind == "f" and not np.isfinite(np.ma.getdata(pixels)).any()):
        raise SceneError(f"tile at {list(row['window'])} of scene {uri} has no valid pixel: all is nodata or NaN")


def _has_mask(dataset: Any) -> bool:
    return any(MaskFlags.all_valid not in flags for flags in dataset.mask_flag_enums)


def _find_stretch(
    uri: str, dataset: Any, bands: Sequence[int], given: tuple[float, float] | None
) -> tuple[float, float] | None:
    is_8_bit = dataset.dtypes[bands[0] - 1] == "uint8"
    if is_8_bit and not _has_mask(dataset):
        return given
    for level in range(len(dataset.overviews(bands[0]))):  # the sample comes from one of them
        with rasterio.open(uri, overview_level=level) as overview:
            _check_blocks(uri, overview)
    factor = max(1.0, max(dataset.width, dataset.height) / _SAMPLE_PX)
    shape = (len(bands), max(1, int(dataset.height / factor)), max(1, int(dataset.width / factor)))
    sample = np.ma.masked_invalid(dataset.read(list(bands), out_shape=shape, masked=True)).compressed()
    if not len(sample):
        raise SceneError(f"scene {uri} holds no valid pixel: every one is nodata or NaN")
    if given is not None or is_8_bit:
        return given
    low, high = (float(value) for value in np.percentile(sample, PERCENTILES))
    return low, high


def _to_rgb8(pixels: NDArray, stretch: Sequence[float] | None) -> NDArray[np.uint8]:
    """(3, H, W) raw, maybe masked, to (H, W, 3) uint8; NaN, infinite and masked values become 0."""
    values = np.ma.getdata(pixels)
    if stretch is not None:
        low, high = stretch
        # float32 is exact for 16 bit; 32-bit integers and float64 keep their precision.
        values = values.astype(np.result_type(values.dtype, np.float32))
        values = np.where(np.isfinite(values), values, low)
        values = np.rint(np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
    if np.ma.is_masked(pixels):
        values = np.where(np.ma.getmaskarray(pixels), np.uint8(0), values)
    return np.asarray(cv2.merge(list(values)))  # forty times as fast as a transposed copy
