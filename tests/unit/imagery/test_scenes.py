import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window

from softlabel.errors import SceneError
from softlabel.imagery import scenes
from softlabel.imagery.scenes import TileReader, describe_scene, list_scenes

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def formula(width, height, bands=3, dtype="uint8", scale=1):
    """(bands, height, width); no flip, shift or swap of axes or bands leaves it as it is."""
    band, row, column = np.ogrid[:bands, :height, :width]
    return ((band * 70 + row * 3 + column) % 200 * scale).astype(dtype)


def write(path: Path, pixels, **options):
    bands, height, width = pixels.shape
    driver = {".tif": "GTiff", ".jpg": "JPEG", ".png": "PNG"}[path.suffix]
    size = {"driver": driver, "width": width, "height": height, "count": bands, "dtype": pixels.dtype}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **size, **options) as file:
        file.write(pixels)
    return str(path)


def row(uri, window, bands=(1, 2, 3), stretch=None):
    return {"scene_uri": uri, "scene_stamp": None, "window": list(window), "bands": list(bands), "stretch": stretch}


def test_lists_a_folder_a_glob_a_file_and_a_uri(tmp_path):
    for name in ("b.TIF", "a.jpg", "deep/c.png", "deep/d.jpeg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    everything = ["a.jpg", "b.TIF", "deep/c.png", "deep/d.jpeg"]
    assert [scene_id for scene_id, _ in list_scenes(str(tmp_path))] == everything
    assert list_scenes(str(tmp_path / "deep" / "*.png")) == [("c.png", str(tmp_path / "deep" / "c.png"))]
    assert [scene_id for scene_id, _ in list_scenes(str(tmp_path / "**" / "*"))] == everything
    assert list_scenes(str(tmp_path / "a.jpg")) == [("a.jpg", str(tmp_path / "a.jpg"))]
    assert [scene_id for scene_id, _ in list_scenes(f"file://{tmp_path}")] == everything
    assert list_scenes(f"file://{tmp_path}/deep/*.png") == [("c.png", f"file://{tmp_path}/deep/c.png")]
    assert list_scenes("s3://bucket/x/a.tif") == [("a.tif", "s3://bucket/x/a.tif")]


@pytest.mark.parametrize("spec", ["", "nothing", "*.gif", "nothing/*.tif"])
def test_finding_no_scene_says_what_to_do(tmp_path, spec):
    with pytest.raises(SceneError, match=r"no scenes at .*tiles\.scenes"):
        list_scenes(str(tmp_path / spec))


def test_describes_a_georeferenced_scene(tmp_path):
    transform = from_origin(400_000, 5_400_000, 0.5, 0.5)
    uri = write(tmp_path / "a.tif", formula(30, 20), crs="EPSG:32631", transform=transform)
    info = describe_scene(uri, (1, 2, 3), None)
    assert (info.width, info.height, info.crs, info.stretch) == (30, 20, "EPSG:32631", None)
    assert info.transform == (0.5, 0, 400_000, 0, -0.5, 5_400_000)


def test_a_plain_image_has_no_georeference(tmp_path):
    info = describe_scene(write(tmp_path / "a.png", formula(30, 20)), (1, 2, 3), (0, 100))
    assert (info.crs, info.transform, info.stretch) == (None, None, (0, 100))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64"])
def test_stretch_is_the_percentiles_without_nodata_and_nan(tmp_path, dtype):
    pixels = formula(40, 30, dtype=dtype, scale=10)
    valid = np.ones(pixels.shape, bool)
    pixels[:, :5], valid[:, :5] = 30_000, False
    if dtype.startswith("float"):
        pixels[:, 6], valid[:, 6] = np.nan, False
    info = describe_scene(write(tmp_path / "a.tif", pixels, nodata=30_000), (3, 1), None)
    expected = np.percentile(pixels[[2, 0]][valid[[2, 0]]], (2, 98))
    np.testing.assert_allclose(info.stretch, expected)


def test_a_large_scene_is_sampled_not_read(tmp_path, monkeypatch):
    uri = write(tmp_path / "a.tif", formula(3000, 500, dtype="uint16"))
    shapes = []
    real = np.ma.masked_invalid
    monkeypatch.setattr(scenes.np.ma, "masked_invalid", lambda sample: shapes.append(sample.shape) or real(sample))
    describe_scene(uri, (1, 2, 3), None)
    assert shapes == [(3, 170, 1024)]


def test_pixels_are_the_windows_own_in_band_order(tmp_path):
    pixels = formula(50, 40, bands=5)
    for options in ({}, {"tiled": True, "blockxsize": 16, "blockysize": 16}):
        uri = write(tmp_path / "a.tif", pixels, **options)
        found = TileReader().read(row(uri, (7, 11, 20, 9), bands=(4, 1, 5)))
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, pixels[[3, 0, 4], 11:20, 7:27].transpose(1, 2, 0))


def test_stretch_maps_its_range_and_nothing_becomes_black(tmp_path):
    pixels = formula(50, 40, dtype="float32", scale=10)
    pixels[:, 0, 0], pixels[:, 0, 1], pixels[:, 0, 2] = np.nan, -9999, np.inf
    uri = write(tmp_path / "a.tif", pixels, nodata=-9999)
    found = TileReader().read(row(uri, (0, 0, 50, 40), stretch=[200.0, 1200.0]))
    expected = np.rint(np.clip((pixels[:, 1:].astype(float) - 200) / 1000, 0, 1) * 255).transpose(1, 2, 0)
    np.testing.assert_allclose(found[1:], expected, atol=1)
    assert found[0, :3].tolist() == [[0, 0, 0]] * 3
    assert found.max() == 255 and found.min() == 0


def test_8_bit_nodata_becomes_black(tmp_path):
    uri = write(tmp_path / "a.tif", formula(50, 40) + np.uint8(1), nodata=1)
    found = TileReader().read(row(uri, (0, 0, 50, 40)))
    assert found[0, 0, 0] == 0 and found[0, 1, 0] == 2


def test_a_constant_scene_is_no_division_by_zero(tmp_path):
    uri = write(tmp_path / "a.tif", np.full((3, 8, 8), 700, "uint16"))
    info = describe_scene(uri, (1, 2, 3), None)
    assert TileReader().read(row(uri, (0, 0, 8, 8), stretch=info.stretch)).max() == 0


class SpyDataset:
    """A dataset that notes which windows are read."""

    def __init__(self, dataset, windows):
        self._dataset, self._windows = dataset, windows

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def read(self, *args, window=None, **kwargs):
        self._windows.append(window)
        return self._dataset.read(*args, window=window, **kwargs)


def test_reads_only_the_window_and_opens_a_scene_once(tmp_path, monkeypatch):
    one, two = (write(tmp_path / name, formula(50, 40)) for name in ("a.tif", "b.tif"))
    opened, windows, real = [], [], rasterio.open
    monkeypatch.setattr(scenes.rasterio, "open", lambda uri: opened.append(uri) or SpyDataset(real(uri), windows))
    reader = TileReader()
    for uri, window in [(one, (0, 0, 9, 8)), (one, (9, 8, 9, 8)), (two, (1, 2, 3, 4))]:
        reader.read(row(uri, window))
    reader.close()
    assert opened == [one, two]
    assert windows == [Window(0, 0, 9, 8), Window(9, 8, 9, 8), Window(1, 2, 3, 4)]


def _cut(path: Path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return str(path)


def _noise(path: Path, **options):
    """Pixels that do not compress, so that cutting the file cuts the picture."""
    return write(path, np.random.default_rng(0).integers(0, 255, (3, 200, 200), np.uint8), **options)


@pytest.mark.parametrize("name", ["a.tif", "a.jpg", "a.png"])
def test_a_scene_cut_short_is_an_error_twice(tmp_path, name):
    whole = _noise(tmp_path / name)
    assert TileReader().read(row(whole, (100, 100, 100, 100))).any()
    uri = _cut(tmp_path / name)
    with pytest.raises(SceneError, match=name):
        describe_scene(uri, (1, 2, 3), None)
    reader = TileReader()
    with pytest.raises(SceneError, match=name) as caught:
        reader.read(row(uri, (100, 100, 100, 100)))
    assert not caught.value.retryable
    other = write(tmp_path / "other.tif", formula(9, 9))  # nothing else is lost
    assert reader.read(row(other, (0, 0, 9, 9))).any()


def test_missing_empty_and_foreign_files_are_scene_errors(tmp_path):
    (tmp_path / "empty.tif").touch()
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("empty.tif", "text.jpg", "missing.tif", "not-utf8\udcff.tif"):
        for read in (
            lambda uri: describe_scene(uri, (1, 2, 3), None),
            lambda uri: TileReader().read(row(uri, (0, 0, 1, 1))),
        ):
            with pytest.raises(SceneError, match="cannot read scene") as caught:
                read(str(tmp_path / name))
            assert not caught.value.retryable
            assert "\n" not in str(caught.value)


def test_a_remote_failure_may_be_tried_again(monkeypatch):
    def fail(uri):
        raise rasterio.errors.RasterioIOError("HTTP 503")

    monkeypatch.setattr(scenes.rasterio, "open", fail)
    with pytest.raises(SceneError, match="HTTP 503") as caught:
        TileReader().read(row("https://host/a.tif", (0, 0, 1, 1)))
    assert caught.value.retryable


def test_too_few_bands_name_both_and_the_remedy(tmp_path):
    uri = write(tmp_path / "grey.tif", formula(9, 9, bands=1))
    with pytest.raises(SceneError, match=r"grey\.tif has 1 band.*\[1, 2, 3\].*tiles\.bands"):
        describe_scene(uri, (1, 2, 3), None)
    assert describe_scene(uri, (1, 1, 1), None).width == 9
    assert TileReader().read(row(uri, (0, 0, 9, 9), bands=(1, 1, 1))).shape == (9, 9, 3)


@pytest.mark.parametrize("dtype, nothing", [("uint8", 0), ("uint16", 0), ("float32", np.nan)])
def test_a_scene_of_nodata_is_an_error(tmp_path, dtype, nothing):
    uri = write(tmp_path / "a.tif", np.full((3, 9, 9), nothing, dtype), nodata=nothing)
    with pytest.raises(SceneError, match="no valid pixel"):
        describe_scene(uri, (1, 2, 3), None)


def test_complex_pixels_are_refused(tmp_path):
    uri = write(tmp_path / "radar.tif", np.ones((3, 9, 9), "complex64"))
    with pytest.raises(SceneError, match="complex64"):
        describe_scene(uri, (1, 2, 3), None)


def test_a_scene_that_changed_since_tiling_is_an_error(tmp_path):
    uri = write(tmp_path / "a.tif", formula(9, 9))
    with pytest.raises(SceneError, match="not what was tiled"):
        TileReader().read(row(uri, (4, 4, 6, 5)))
    uri = write(tmp_path / "b.tif", formula(9, 9, dtype="uint16"))
    with pytest.raises(SceneError, match="not what was tiled"):
        TileReader().read(row(uri, (0, 0, 9, 9)))


def test_tiles_of_one_scene_share_the_block_cache():
    """rasterio.Env counts GDAL_CACHEMAX in bytes: 64 would be no cache, and five times slower on JPEG."""
    with rasterio.Env(**scenes._GDAL):
        assert rasterio.env.getenv()["GDAL_CACHEMAX"] >= 16_000_000


def test_a_scene_replaced_after_tiling_is_an_error_whatever_its_size(tmp_path):
    uri = write(tmp_path / "a.tif", formula(50, 40))
    tiled = {**row(uri, (0, 0, 8, 8)), "scene_stamp": describe_scene(uri, (1, 2, 3), None).stamp}
    reader = TileReader()
    assert reader.read(tiled).shape == (8, 8, 3)
    os.utime(uri, ns=(0, 0))  # the same bytes at another time: nobody knows that they are the same
    with pytest.raises(SceneError, match=r"a\.tif was replaced after it was tiled") as found:
        reader.read(tiled)
    assert not found.value.retryable


@pytest.mark.parametrize(("dtype", "nothing"), [("uint16", 0), ("float32", np.nan), ("float32", -9999.0), ("uint8", 0)])
def test_a_tile_without_a_valid_pixel_is_an_error_and_its_neighbours_are_not(tmp_path, dtype, nothing):
    pixels = formula(32, 16, dtype=dtype) + np.array(1, dtype)
    pixels[:, :, :16] = nothing
    pixels[:, 0, 16] = nothing
    uri = write(tmp_path / "a.tif", pixels, nodata=None if nothing != nothing else nothing)
    stretch = None if dtype == "uint8" else [0.0, 300.0]
    with pytest.raises(SceneError, match=r"tile at \[0, 0, 16, 16\] of scene .* has no valid pixel"):
        TileReader().read(row(uri, (0, 0, 16, 16), stretch=stretch))
    found = TileReader().read(row(uri, (16, 0, 16, 16), stretch=stretch))
    assert found[0, 0].tolist() == [0, 0, 0] and found[1:].min() > 0


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_a_block_under_several_tiles_is_decoded_once(tmp_path, monkeypatch, interleave):
    """Overlapping tiles over 256 px blocks, a row of tiles larger than the usual cache: the file is read about once."""
    noise = np.random.default_rng(0).integers(0, 60_000, (3, 1024, 2048), dtype=np.uint16)
    options = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "interleave": interleave}
    uri = write(tmp_path / "a.tif", noise, **options)
    monkeypatch.setattr(scenes, "_CACHE_BYTES", 4_000_000)  # a third of a row of these tiles
    reader, before = TileReader(), _bytes_read()
    for x, y in ((x, y) for y in (0, 448) for x in range(0, 2048 - 512 + 1, 512 - 64)):
        reader.read(row(uri, (x, y, 512, 512), stretch=[0.0, 60_000.0]))
    assert (_bytes_read() - before) / os.path.getsize(uri) < 1.1


def _bytes_read():
    """What this process has asked the system for so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
