import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from affine import Affine
from buckets import PROTOCOLS
from PIL import Image, ImageOps
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.rpc import RPC
from rasterio.transform import from_origin
from rasterio.windows import Window

from softlabel.errors import NoValidPixelError, SceneError
from softlabel.imagery import blocks, scenes
from softlabel.imagery.listing import list_scenes
from softlabel.imagery.scenes import TileReader, describe_scene

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
    for hidden in (".ipynb_checkpoints/a.jpg", "._a.jpg", "deep/.thumbs/c.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).touch()
    everything = ["a.jpg", "b.TIF", "deep/c.png", "deep/d.jpeg"]
    assert [scene_id for scene_id, _ in list_scenes(str(tmp_path))] == everything
    assert list_scenes(str(tmp_path / "deep" / "*.png")) == [("c.png", str(tmp_path / "deep" / "c.png"))]
    assert [scene_id for scene_id, _ in list_scenes(str(tmp_path / "**" / "*"))] == everything
    assert list_scenes(str(tmp_path / "a.jpg")) == [("a.jpg", str(tmp_path / "a.jpg"))]
    assert [scene_id for scene_id, _ in list_scenes(f"file://{tmp_path}")] == everything
    assert list_scenes(f"file://{tmp_path}/deep/*.png") == [("c.png", f"file://{tmp_path}/deep/c.png")]
    assert list_scenes("s3://bucket/x/a.tif") == [("a.tif", "s3://bucket/x/a.tif")]


@pytest.mark.parametrize("protocol", ["s3", PROTOCOLS[-1]])
def test_scenes_in_a_bucket_are_those_of_a_folder(tmp_path, request, protocol):
    bucket = request.getfixturevalue(protocol) / tmp_path.name
    placed = {"transform": from_origin(500000, 4500000, 0.3, 0.3), "crs": "EPSG:32618"}
    write(tmp_path / "a.tif", formula(90, 70), tiled=True, blockxsize=16, blockysize=16, **placed)
    write(tmp_path / "deep" / "b.png", formula(60, 50))
    (tmp_path / "index.csv").write_text("uri\na.tif\ndeep/b.png\n")
    for path in ("a.tif", "deep/b.png", "index.csv"):
        (bucket / path).write_bytes((tmp_path / path).read_bytes())
    here, there = list_scenes(str(tmp_path)), list_scenes(str(bucket))
    assert [scene_id for scene_id, _ in there] == [scene_id for scene_id, _ in here] == ["a.tif", "deep/b.png"]
    assert there == list_scenes(f"{bucket}/index.csv") == list_scenes(f"{bucket}/*")
    (bucket / "a.jp2").write_bytes((tmp_path / "a.tif").read_bytes())
    assert list_scenes(f"{bucket}/a.jp2") == [("a.jp2", f"{bucket}/a.jp2")]  # whatever its suffix
    for (_, path), (_, uri) in zip(here, there, strict=True):
        infos = [describe_scene(scene, (1, 2, 3), None) for scene in (path, uri)]
        assert replace(infos[0], stamp=infos[1].stamp) == infos[1]
        assert re.fullmatch(rf"{Path(path).stat().st_size} bytes of \d+ ns", infos[1].stamp)
        pixels = [TileReader().read(row(scene, (10, 12, 30, 30))) for scene in (path, uri)]
        np.testing.assert_array_equal(*pixels)
    with pytest.raises(SceneError, match="no such file") as caught:
        describe_scene(f"{bucket}/gone.tif", (1, 2, 3), None)
    assert caught.value.retryable


def test_lists_a_table(tmp_path):
    (tmp_path / "index.csv").write_text("uri,taken\n2024/b.tif,1\n/archive/a.jp2,2\ns3://bucket/x/c.tif,3\n")
    assert list_scenes(str(tmp_path / "index.csv")) == [
        ("/archive/a.jp2", "/archive/a.jp2"),
        (f"{tmp_path}/2024/b.tif", f"{tmp_path}/2024/b.tif"),
        ("s3://bucket/x/c.tif", "s3://bucket/x/c.tif"),
    ]
    (tmp_path / "index.CSV").write_text("uri\n2024/b.tif\n2023/deep/a.tif\n")
    assert list_scenes(f"file://{tmp_path}/index.CSV") == [
        ("2023/deep/a.tif", f"file://{tmp_path}/2023/deep/a.tif"),
        ("2024/b.tif", f"file://{tmp_path}/2024/b.tif"),
    ]


def test_lists_a_table_that_names_its_scenes(tmp_path):
    rows = pa.table({"location": ["x/1.tif", "y/1.tif"], "scene_id": [7, 8], "geometry": [b"", b""]})
    pq.write_table(rows, tmp_path / "index.geoparquet")
    found = [("7", str(tmp_path / "x" / "1.tif")), ("8", str(tmp_path / "y" / "1.tif"))]
    assert list_scenes(str(tmp_path / "index.geoparquet")) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path\na.tif\n", "has no column uri or location"),
        ("uri\na.tif\na.tif\n", "a scene twice"),
        ("uri,scene_id\na.tif,1\n,2\n", "has a row without uri or scene_id"),
        ("uri,scene_id\na.tif,1\nb.tif,\n", "has a row without uri or scene_id"),
        ("uri\n", "no scenes at"),
        ("", "cannot list scenes at"),
    ],
)
def test_a_table_that_does_not_say_which_scenes(tmp_path, text, says):
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(SceneError, match=says):
        list_scenes(str(tmp_path / "index.csv"))


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.tif").touch()
    (tmp_path / "scenes" / "one").mkdir(parents=True)
    (tmp_path / "scenes" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "scenes" / "one" / "back").symlink_to(tmp_path / "scenes")
    (tmp_path / "disk" / "round").symlink_to(tmp_path / "scenes" / "one")
    (tmp_path / "scenes" / "b.tif").symlink_to(tmp_path / "disk" / "a.tif")
    assert [scene_id for scene_id, _ in list_scenes(str(tmp_path / "scenes"))] == ["b.tif", "linked/a.tif"]


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
    real = scenes.valid_values
    monkeypatch.setattr(scenes, "valid_values", lambda sample: shapes.append(sample.shape) or real(sample))
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
    pixels = formula(50, 40) + np.uint8(1)
    pixels[:, 0, 0] = 1
    found = TileReader().read(row(write(tmp_path / "a.tif", pixels, nodata=1), (0, 0, 50, 40)))
    assert found[0, 0].tolist() == [0, 0, 0] and found[0, 1].tolist() == [2, 72, 142]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_nodata_is_a_pixel_s_and_no_band_s(tmp_path, dtype):
    pixels = np.zeros((3, 1, 3), dtype)
    pixels[:, 0, 0], pixels[:, 0, 1], pixels[:, 0, 2] = (255, 40, 40), (255, 255, 255), (255, 255, 40)
    uri = write(tmp_path / "a.tif", pixels, nodata=255)
    found = TileReader().read(row(uri, (0, 0, 3, 1), stretch=None if dtype == "uint8" else [0, 255]))
    assert found[0].tolist() == [[255, 40, 40], [0, 0, 0], [255, 255, 40]]


@pytest.mark.parametrize(
    ("dtype", "nodata", "counts"), [("uint16", 0, True), ("int16", -9999, False), ("float32", -9999, False)]
)
def test_nodata_in_a_valid_pixel_counts_for_the_stretch_where_a_sensor_may_reach_it(tmp_path, dtype, nodata, counts):
    pixels = formula(40, 30, dtype=dtype, scale=10) + np.array(50, dtype)
    pixels[0, :, :20] = nodata  # a third of a half: far beyond the 2nd percentile
    pixels[:, :3] = nodata
    info = describe_scene(write(tmp_path / "a.tif", pixels, nodata=nodata), (1, 2, 3), None)
    seen = pixels[:, 3:]
    expected = np.percentile(seen if counts else seen[seen != nodata], (2, 98))
    np.testing.assert_allclose(info.stretch, expected)


@pytest.mark.parametrize("kind", ["alpha", "mask", "colour", "16 bit alpha"])
def test_alpha_masks_and_a_transparent_colour_say_what_is_missing(tmp_path, kind):
    pixels = formula(50, 40) + np.uint8(1)
    missing = np.zeros((40, 50), bool)
    missing[:, :20] = True
    if kind == "colour":
        pixels[:, missing] = np.array([[9], [8], [7]])
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "a.png", transparency=(9, 8, 7))
        uri = str(tmp_path / "a.png")
    elif kind == "mask":
        uri = write(tmp_path / "a.tif", pixels)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(uri, "r+") as file:
            file.write_mask(~missing)
    else:
        dtype = "uint16" if kind == "16 bit alpha" else "uint8"
        alpha = np.where(missing, 0, 1).astype(dtype)  # hardly there, but there
        uri = write(tmp_path / "a.tif", np.stack([*pixels.astype(dtype), alpha]), photometric="RGB", alpha="YES")
    stretch, reader = [0, 255] if kind == "16 bit alpha" else None, TileReader()
    found = reader.read(row(uri, (0, 0, 50, 40), stretch=stretch))
    np.testing.assert_array_equal(found, np.where(missing, 0, pixels).transpose(1, 2, 0))
    empty = row(uri, (0, 0, 20, 40), stretch=stretch)
    assert reader.is_empty(empty) and not reader.is_empty(row(uri, (19, 0, 20, 40), stretch=stretch))
    with pytest.raises(NoValidPixelError):
        reader.read(empty)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_pixels_are_upright_as_exif_says(tmp_path, suffix, number):
    stored = Image.fromarray(formula(50, 40).transpose(1, 2, 0))
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        stored.save(path, tiffinfo={274: number})
    else:
        exif = Image.Exif()
        exif[274] = number
        stored.save(path, exif=exif, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    info = describe_scene(str(path), (1, 2, 3), None)
    assert (info.height, info.width, info.orientation) == (*expected.shape[:2], number)
    reader = TileReader()
    for column, top, width, height in ((3, 5, 20, 11), (info.width - 9, info.height - 4, 9, 4)):
        found = reader.read(row(str(path), (column, top, width, height)))
        np.testing.assert_allclose(found, expected[top : top + height, column : column + width], atol=2)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("number", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(tmp_path, suffix, number):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[274] = number
    image = Image.fromarray(formula(50, 40).transpose(1, 2, 0))
    image.save(path, **({"tiffinfo": {274: number}} if suffix == "tif" else {"exif": exif}))
    info = describe_scene(str(path), (1, 2, 3), None)
    assert (info.width, info.height, info.orientation) == (50, 40, 1)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("damaged", [b"XX*\0\0\0\0\0", b"II\0\0\x08\0\0\0", b"II*\0\xff\x7f\0\0", b"II*\0\x08\0", b""])
def test_damaged_exif_costs_the_picture_nothing(tmp_path, suffix, damaged):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(formula(50, 40).transpose(1, 2, 0)).save(path, exif=b"Exif\0\0" + damaged)
    info = describe_scene(str(path), (1, 2, 3), None)
    assert (info.width, info.height, info.orientation) == (50, 40, 1)
    assert TileReader().read(row(str(path), (0, 0, 50, 40))).any()


@pytest.mark.parametrize(("placed", "number"), [(True, 1), (False, 6)])
def test_what_is_georeferenced_lies_as_that_says(tmp_path, placed, number):
    path = tmp_path / "a.tif"
    Image.fromarray(formula(50, 40).transpose(1, 2, 0)).save(path, tiffinfo={274: 6})
    with rasterio.open(path, "r+") as file:
        file.crs = "EPSG:32631"
        if placed:
            file.transform = from_origin(400_000, 5_400_000, 0.5, 0.5)
    info = describe_scene(str(path), (1, 2, 3), None)
    assert (info.width, info.height) == ((50, 40) if placed else (40, 50))
    assert (info.orientation, info.transform is None) == (number, not placed)


@pytest.mark.parametrize("where", ["{}", "file://{}"])
def test_the_orientation_of_a_png_may_come_after_its_pixels(tmp_path, where):
    """As the standard allows and exiftool writes; OpenCV and Pillow take it from there."""
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[274] = 6
    Image.fromarray(formula(50, 40).transpose(1, 2, 0)).save(path, exif=exif)
    data = path.read_bytes()
    start, end = data.index(b"eXIf") - 4, data.index(b"IDAT") - 4
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    with Image.open(path) as image:
        assert ImageOps.exif_transpose(image).size == (40, 50)
    info = describe_scene(where.format(path), (1, 2, 3), None)
    assert (info.width, info.height, info.orientation) == (40, 50, 6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_palette_is_read_by_its_colours(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(formula(50, 40).transpose(1, 2, 0)).quantize(16)
    image.save(path)
    info = describe_scene(str(path), (1, 2, 3), None)
    assert (info.bands, info.stretch) == ((1, 1, 1), None)
    found = TileReader().read(row(str(path), (7, 11, 20, 9), info.bands))
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB"))[11:20, 7:27])


def test_a_transparent_colour_of_a_palette_is_nothing(tmp_path):
    image = Image.new("P", (4, 1), 1)
    image.putpalette([0, 0, 0, 200, 10, 20, 9, 9, 9])
    image.putpixel((0, 0), 2)
    image.save(tmp_path / "a.png", transparency=2)
    found = TileReader().read(row(str(tmp_path / "a.png"), (0, 0, 4, 1), (1, 1, 1)))
    assert found[0].tolist() == [[0, 0, 0], *[[200, 10, 20]] * 3]
    with pytest.raises(NoValidPixelError):
        TileReader().read(row(str(tmp_path / "a.png"), (0, 0, 1, 1), (1, 1, 1)))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("bits", "white"), [(1, 255), (2, 85), (4, 17)])
def test_few_bits_fill_the_range(tmp_path, suffix, bits, white):
    pixels = formula(9, 6, bands=1) % 2**bits
    uri = write(tmp_path / f"a.{suffix}", pixels, nbits=bits)
    info = describe_scene(uri, (1, 2, 3), None)
    found = TileReader().read(row(uri, (0, 0, 9, 6), info.bands, info.stretch))
    np.testing.assert_array_equal(found[..., 0], pixels[0] * np.uint8(white))


@pytest.mark.parametrize("bits", [1, 8])
def test_white_as_zero_is_turned_round(tmp_path, bits):
    pixels = formula(9, 6, bands=1) % (2 if bits == 1 else 255)
    uri = write(tmp_path / "a.tif", pixels.astype("uint8"), photometric="MINISWHITE", nbits=bits)
    found = TileReader().read(row(uri, (0, 0, 9, 6), (1, 1, 1)))
    np.testing.assert_array_equal(found[..., 0], 255 - pixels[0].astype(int) * (255 if bits == 1 else 1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_folder_may_mix_grey_and_colour(tmp_path, suffix, mode):
    pixels = formula(9, 6, bands=len(mode))
    image = Image.fromarray((pixels.transpose(1, 2, 0) if len(mode) > 1 else pixels[0]) | 1, mode)
    image.save(tmp_path / f"a.{suffix}")
    info = describe_scene(str(tmp_path / f"a.{suffix}"), (1, 2, 3), None)
    assert info.bands == ((1, 1, 1) if mode in ("L", "LA") else (1, 2, 3))
    found = TileReader().read(row(str(tmp_path / f"a.{suffix}"), (0, 0, 9, 6), info.bands))
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


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
    with pytest.raises(SceneError, match=r"grey\.tif has 1 band.*\[3, 2, 1\].*tiles\.bands"):
        describe_scene(uri, (3, 2, 1), None)
    radar = write(tmp_path / "radar.tif", formula(9, 9, bands=2))  # two bands of which none is alpha: which is meant?
    with pytest.raises(SceneError, match=r"radar\.tif has 2 band"):
        describe_scene(radar, (1, 2, 3), None)
    assert describe_scene(uri, (1, 1, 1), None).width == 9
    assert TileReader().read(row(uri, (0, 0, 9, 9), bands=(1, 1, 1))).shape == (9, 9, 3)


@pytest.mark.parametrize("dtype, nothing", [("uint8", 0), ("uint16", 0), ("float32", np.nan)])
def test_a_scene_of_nodata_is_a_scene_of_empty_tiles(tmp_path, dtype, nothing):
    uri = write(tmp_path / "a.tif", np.full((3, 9, 9), nothing, dtype), nodata=nothing)
    info = describe_scene(uri, (1, 2, 3), None)
    tile, reader = row(uri, (0, 0, 9, 9), stretch=info.stretch), TileReader()
    assert reader.is_empty(tile)
    with pytest.raises(NoValidPixelError):
        reader.read(tile)


def test_a_few_valid_pixels_that_a_sample_misses_give_the_stretch(tmp_path):
    pixels = np.zeros((3, 40, 3000), "uint16")
    pixels[:, 6, 1001:1004] = (100, 200, 300)
    options = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    info = describe_scene(write(tmp_path / "a.tif", pixels, nodata=0, **options), (1, 2, 3), None)
    assert info.stretch == pytest.approx((102, 298), abs=4)


def test_whether_a_tile_is_empty_is_known_without_its_pixels_where_none_can_lack(tmp_path, monkeypatch):
    whole, masked = write(tmp_path / "a.tif", formula(9, 9)), write(tmp_path / "b.tif", formula(9, 9), nodata=0)
    windows, real = [], rasterio.open
    monkeypatch.setattr(scenes.rasterio, "open", lambda uri: SpyDataset(real(uri), windows))
    reader = TileReader()
    assert not reader.is_empty(row(whole, (0, 0, 9, 9))) and not windows
    assert not reader.is_empty(row(masked, (0, 0, 9, 9))) and len(windows) == 1
    assert reader.is_empty(row(masked, (0, 0, 1, 1))) is False  # its green and blue are not 0


def gcps(*places):
    return [GroundControlPoint(row=line, col=column, x=x, y=y) for line, column, x, y in places]


FITTING = gcps((0, 0, 10, 50), (0, 30, 13, 50), (20, 0, 10, 48), (20, 30, 13, 48))
BENT = gcps((0, 0, 10, 50), (0, 30, 13, 50), (20, 0, 10, 48), (20, 30, 14, 47))

ONES = [1.0, *[0.0] * 19]
NAMES = ("height", "lat", "line", "long", "samp")
RPCS = RPC(
    **{f"{name}_{part}": 1.0 for name in NAMES for part in ("off", "scale")},
    **{f"{name}_{part}_coeff": ONES for name in ("line", "samp") for part in ("num", "den")},
    err_bias=0.0,
    err_rand=0.0,
)


@pytest.mark.parametrize(
    ("options", "crs", "transform", "unplaced"),
    [
        ({"crs": "EPSG:4326", "gcps": FITTING}, "EPSG:4326", (0.1, 0, 10, 0, -0.1, 50), None),
        ({"crs": "EPSG:4326", "gcps": BENT}, None, None, "ground control points that no affine transform fits"),
        ({"crs": "EPSG:4326"}, None, None, "a CRS without a geotransform"),
        ({"transform": from_origin(9, 9, 1, 1)}, None, None, "a geotransform without a CRS"),
        ({"crs": "EPSG:4326", "gcps": gcps(*3 * [(0, 0, 10, 50)])}, None, None, "ground control points that no"),
        ({"crs": CRS(), "gcps": FITTING}, None, None, "ground control points without a CRS"),
        ({"crs": "EPSG:4326", "transform": Affine(1, 0, 5, 0, 0, 9)}, None, None, "a geotransform in which pixels"),
        ({"rpcs": RPCS}, None, None, "rational polynomial coefficients"),
        ({}, None, None, None),
    ],
    ids=["gcps", "bent", "no transform", "no crs", "one gcp", "gcps without crs", "flat", "rpc", "nothing"],
)
def test_what_is_no_georeference_is_said_and_not_used(tmp_path, options, crs, transform, unplaced):
    info = describe_scene(write(tmp_path / "a.tif", formula(30, 20), **options), (1, 2, 3), None)
    assert info.crs == crs and (info.transform is None or info.transform == pytest.approx(transform))
    assert (info.transform is None) == (transform is None)
    assert info.unplaced is None if unplaced is None else info.unplaced.startswith(unplaced)


def test_scenes_of_building_sites_and_of_the_moon_are_read(tmp_path):
    site = 'LOCAL_CS["site",UNIT["metre",1]]'
    moon = (
        'GEOGCS["Moon",DATUM["D_Moon",SPHEROID["Moon",1737400,0]],PRIMEM["Reference_Meridian",0],'
        'UNIT["degree",0.0174532925199433]]'
    )
    for number, wkt in enumerate((site, moon)):
        uri = write(tmp_path / f"{number}.tif", formula(9, 9), crs=wkt, transform=from_origin(5, 9, 1, 1))
        info = describe_scene(uri, (1, 2, 3), None)
        assert info.crs and info.transform == (1, 0, 5, 0, -1, 9)
        assert TileReader().read(row(uri, (0, 0, 9, 9))).any()


def test_a_complex_band_that_is_not_read_does_no_harm(tmp_path):
    """A VRT may mix types; the one of its first band says how large its blocks are."""
    rasterio.open(
        tmp_path / "radar.tif", "w", driver="GTiff", width=40, height=30, count=1, dtype="complex_int16"
    ).close()
    uri = write(tmp_path / "plain.tif", formula(40, 30))
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{band}"><SimpleSource><SourceFilename relativeToVRT="1">{name}'
        f"</SourceFilename><SourceBand>{source}</SourceBand></SimpleSource></VRTRasterBand>"
        for band, (kind, name, source) in enumerate(
            [("CInt16", "radar.tif", 1), *(("Byte", "plain.tif", k) for k in (1, 2, 3))], start=1
        )
    )
    mixed = tmp_path / "mixed.vrt"
    mixed.write_text(f'<VRTDataset rasterXSize="40" rasterYSize="30">{bands}</VRTDataset>')
    assert describe_scene(str(mixed), (2, 3, 4), None).width == 40
    tiles = [{**row(uri, (0, 0, 40, 30)), "scene_uri": str(mixed), "bands": [2, 3, 4]}, row(uri, (0, 0, 40, 30))]
    np.testing.assert_array_equal(*(TileReader().read(tile) for tile in tiles))


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
def test_a_tile_without_a_valid_pixel_is_empty_and_its_neighbours_are_not(tmp_path, dtype, nothing):
    pixels = formula(32, 16, dtype=dtype) + np.array(1, dtype)
    pixels[:, :, :16] = nothing
    pixels[:, 0, 16] = nothing
    uri = write(tmp_path / "a.tif", pixels, nodata=None if nothing != nothing else nothing)
    stretch = None if dtype == "uint8" else [0.0, 300.0]
    empty = row(uri, (0, 0, 16, 16), stretch=stretch)
    with pytest.raises(NoValidPixelError, match=r"tile at \[0, 0, 16, 16\] of scene .* has no valid pixel"):
        TileReader().read(empty)
    assert TileReader().is_empty(empty) and not TileReader().is_empty(row(uri, (16, 0, 16, 16), stretch=stretch))
    found = TileReader().read(row(uri, (16, 0, 16, 16), stretch=stretch))
    assert found[0, 0].tolist() == [0, 0, 0] and found[1:].min() > 0


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_a_block_under_several_tiles_is_decoded_once(tmp_path, monkeypatch, interleave):
    """Overlapping tiles over 256 px blocks, a row of tiles larger than the usual cache: the file is read about once."""
    noise = np.random.default_rng(0).integers(0, 60_000, (3, 1024, 2048), dtype=np.uint16)
    options = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "interleave": interleave}
    uri = write(tmp_path / "a.tif", noise, **options)
    monkeypatch.setattr(blocks, "CACHE_BYTES", 4_000_000)  # a third of a row of these tiles
    reader, before = TileReader(), _bytes_read()
    for x, y in ((x, y) for y in (0, 448) for x in range(0, 2048 - 512 + 1, 512 - 64)):
        reader.read(row(uri, (x, y, 512, 512), stretch=[0.0, 60_000.0]))
    assert (_bytes_read() - before) / os.path.getsize(uri) < 1.1


def test_a_turned_scene_is_not_decoded_anew_for_each_tile(tmp_path, monkeypatch):
    """A row of tiles as seen goes up the stored rows, and a JPEG can be decoded downwards only."""
    exif = Image.Exif()
    exif[274] = 6
    noise = np.random.default_rng(0).integers(0, 255, (1024, 2048, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", exif=exif)
    monkeypatch.setattr(blocks, "CACHE_BYTES", 4_000_000)  # two thirds of its pixels
    reader, before = TileReader(), _bytes_read()
    for x, y in ((x, y) for y in range(0, 2048, 256) for x in range(0, 1024, 256)):
        reader.read(row(str(tmp_path / "a.jpg"), (x, y, 256, 256)))
    assert (_bytes_read() - before) / (tmp_path / "a.jpg").stat().st_size < 3


def _bytes_read():
    """What this process has asked the system for so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
