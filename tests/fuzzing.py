"""Damaged inputs for the readers: seeds, mutations, and the process that feeds them. test_fuzz.py says what must hold.

    python tests/fuzzing.py TARGET FIRST COUNT FOLDER

Input number N of a target is always the same, and stays in FOLDER until the next is written: COUNT 1 reproduces one.
Each input is one line of JSON on stdout. One that hangs ends the process, as does one that crashes a native decoder:
the caller goes on after it.
"""

import faulthandler
import io
import json
import logging
import resource
import struct
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import rasterio
import torch
import yaml
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from ultralytics.nn.tasks import DetectionModel

from softlabel import shards, store, tile_table
from softlabel.config import TruthSource
from softlabel.detectors.weights import import_weights, load_model
from softlabel.errors import SoftlabelError
from softlabel.imagery.scenes import TileReader, describe_scene
from softlabel.imagery.truth import match_scenes, read_truth, truth_digest
from softlabel.records import soft_labels_schema

HANG_S = 10
"""Of the processor's time; six times as long on the clock ends the process."""
ADDRESS_SPACE_BYTES = 3 << 30
"""What inputs may ask for beyond what the process has at its start."""
GROWTH_MB = 800
"""What one input may add to the highest memory that the process has needed so far."""
BOMB_PX = 60_000

HARMLESS = {"rasterio._env.log_error"}
"""Exceptions that get no further than stderr: rasterio cannot log a message of GDAL that is not UTF-8, and reads on."""

Rng = np.random.Generator
Mutation = Callable[[bytes, bytes, Rng], bytes]
"""A file and another of its target to a damaged one."""


@dataclass(frozen=True)
class Case:
    """An undamaged input: its files with what damages each, and what reads them, giving declared errors and rejects."""

    name: str
    files: dict[Path, Sequence[Mutation]]
    read: Callable[[], tuple[list[SoftlabelError], int]]


def attempts(*steps: Callable[[], object]) -> list[SoftlabelError]:
    """The declared errors of steps that each must run whatever became of the one before."""
    errors = []
    for step in steps:
        try:
            step()
        except SoftlabelError as error:
            message = str(error).encode().decode()  # what cannot be encoded cannot be printed
            assert message.splitlines() == [message], f"more than one line: {message!r}"
            errors.append(error)
    return errors


# ---- mutations of bytes

_INTEGERS = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, BOMB_PX, 65535, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def _integer(rng: Rng, size: int) -> int:
    low = int(rng.integers(1000)) if rng.random() < 0.3 else _INTEGERS[rng.integers(len(_INTEGERS))]
    return low % 256**size


def _span(data: bytes, rng: Rng, most: int = 64) -> tuple[int, int]:
    start = int(rng.integers(len(data) + 1))
    return start, min(len(data), start + 1 + int(rng.integers(most)))


def _flip(data: bytes, _: bytes, rng: Rng) -> bytes:
    damaged = bytearray(data)
    for _bit in range(int(rng.integers(1, 9))):
        damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def _delete(data: bytes, _: bytes, rng: Rng) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + data[stop:]


def _duplicate(data: bytes, _: bytes, rng: Rng) -> bytes:
    start, stop = _span(data, rng)
    return data[:stop] + data[start:stop] * int(rng.integers(1, 4)) + data[stop:]


def _insert(data: bytes, _: bytes, rng: Rng) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + rng.bytes(stop - start) + data[start:]


def _overwrite(data: bytes, _: bytes, rng: Rng) -> bytes:
    start, stop = _span(data, rng)
    fill = [b"\0", b"\xff", rng.bytes(1)][rng.integers(3)]
    return data[:start] + fill * (stop - start) + data[stop:]


def _overwrite_integer(data: bytes, _: bytes, rng: Rng) -> bytes:
    size = int(rng.choice([1, 2, 4, 8]))
    start = int(rng.integers(len(data)))
    return (
        data[:start]
        + _integer(rng, size).to_bytes(size, "little" if rng.random() < 0.5 else "big")
        + data[start + size :]
    )


def _truncate(data: bytes, _: bytes, rng: Rng) -> bytes:
    return data[: rng.integers(len(data))]


def _swap(data: bytes, _: bytes, rng: Rng) -> bytes:
    one, two, three, four = sorted(int(cut) for cut in rng.integers(len(data) + 1, size=4))
    return data[:one] + data[three:four] + data[two:three] + data[one:two] + data[four:]


def _splice(data: bytes, other: bytes, rng: Rng) -> bytes:
    return data[: rng.integers(len(data) + 1)] + other[rng.integers(len(other) + 1) :]


_OPERATIONS = (_flip, _flip, _delete, _duplicate, _insert, _overwrite, _overwrite_integer, _truncate, _swap, _splice)


def havoc(data: bytes, other: bytes, rng: Rng) -> bytes:
    """One to four operations on bytes, mostly one."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        if data:
            data = _OPERATIONS[rng.integers(len(_OPERATIONS))](data, other, rng)
    return data


def flips(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Bits only: lengths and offsets stay, so that more gets past a parser."""
    return _flip(data, other, rng)


# ---- mutations of text and of what it means

_TOKENS = [
    *("null", "NaN", "-Infinity", "1e999", "-1", "true", '"', "'", "[", "]", "{", "}", ",", ":", "\\ud800", "\\u0000"),
    *("[" * 5_000, "9" * 5_000, "0x" + "f" * 4_000, "a" * 5_000, "\ufeff", "\u2028", "\x85", "\x00", "\t", "\r", "\n"),
    *(
        "!!int x",
        "!!bool x",
        "!!python/name:os.system",
        "!!set",
        "&a ",
        "*a",
        "<<: *a\n",
        "? ",
        "- ",
        "---\n",
        "%YAML 9\n",
    ),
    *("2020-99-99", "1:2:3", "0b", "0o9", "1_0", "|\n", "٣", "nan", "inf", "../", "..", ".", "/", "//", "~"),
]
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, -(2**63) - 1, 10**400, 1e300, float("nan"), float("inf")),
    *("", ".", "..", "a", "\ud800", "a\nb", "a\x00b", "x" * 5_000, "1,2,3", "nan,nan,nan,nan", "plane"),
    *([], [[]], {}, {"id": 1}, [None], [1, 2, 3, 4], ["plane"], {"0": "plane"}),
]
_TWIN = "@twin"


def tokens(data: bytes, _: bytes, rng: Rng) -> bytes:
    """One to three words that mean something to some parser, put anywhere; at times bytes that are no UTF-8."""
    for _word in range(int(rng.integers(1, 4))):
        word = (
            b"\xff\xfe\x80"
            if rng.random() < 0.1
            else _TOKENS[rng.integers(len(_TOKENS))].encode("utf-8", "surrogatepass")
        )
        start, stop = _span(data, rng, 12)
        data = data[:start] + word + data[stop if rng.random() < 0.5 else start :]
    return data


def yaml_tokens(data: bytes, other: bytes, rng: Rng) -> bytes:
    """The same in YAML's own form of what is JSON."""
    return tokens(yaml.safe_dump(json.loads(data)).encode(), other, rng)


def fields(data: bytes, _: bytes, rng: Rng) -> bytes:
    """Fields of lines swapped, dropped, doubled or replaced; lines shuffled."""
    lines = [line.split(b" ") for line in data.split(b"\n")]
    for _change in range(int(rng.integers(1, 4))):
        line = lines[rng.integers(len(lines))]
        one, two = rng.integers(len(line), size=2)
        match int(rng.integers(5)):
            case 0:
                line[one], line[two] = line[two], line[one]
            case 1:
                line.append(line[one])
            case 2:
                line[one] = _TOKENS[rng.integers(len(_TOKENS))].encode("utf-8", "surrogatepass")
            case 3:
                line[one] = line[one] + str(_integer(rng, 8)).encode()
            case 4:
                lines.append(lines.pop(rng.integers(len(lines)))[: one + 1] or [b""])
    return b"\n".join(b" ".join(line) for line in lines)


def _damaged(value: Any, rng: Rng) -> Any:
    """A copy with one place replaced, dropped, doubled or nested."""
    if rng.random() < 0.05 or not isinstance(value, list | dict) or not value:
        nested: Any = _VALUES[rng.integers(len(_VALUES))]
        for _ in range(int(rng.choice([0, 0, 0, 0, 1, 300]))):
            nested = [nested]
        return nested
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[rng.integers(len(keys))]
    copy = dict(value) if isinstance(value, dict) else list(value)
    match int(rng.integers(8)):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[f"{key}{_TWIN}"] = _damaged(copy[key], rng)
        case 1:
            copy.append(copy[key])
        case 2 if isinstance(copy, dict):
            copy[str(_VALUES[rng.integers(len(_VALUES))])[:100]] = copy.pop(key)
        case _:
            copy[key] = _damaged(copy[key], rng)
    return copy


def objects(data: bytes, _: bytes, rng: Rng) -> bytes:
    """JSON that still parses: one or two places of what it says are damaged."""
    value = json.loads(data)
    for _change in range(int(rng.integers(1, 3))):
        value = _damaged(value, rng)
    return json.dumps(value).replace(f'{_TWIN}"', '"').encode()


# ---- mutations of binary formats that leave their checksums and lengths right


def tags(data: bytes, _: bytes, rng: Rng) -> bytes:
    """A TIFF (little-endian, classic or big) with one to three fields of its directories changed."""
    damaged, entries = bytearray(data), list(_tiff_entries(data))
    for _change in range(int(rng.integers(1, 4))):
        _, entry, size = entries[rng.integers(len(entries))]
        offset, width = [(0, 2), (2, 2), (4, size), (4 + size, size), (4 + size, size)][rng.integers(5)]
        damaged[entry + offset : entry + offset + width] = _integer(rng, width).to_bytes(width, "little")
    return bytes(damaged)


def _tiff_entries(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Number of the directory (the image, then overviews and masks), place of each entry, bytes of its count."""
    big = data[2] == 43
    number, count_format, size = ("<Q", "<Q", 8) if big else ("<I", "<H", 4)
    (place,) = struct.unpack_from(number, data, size)
    directory = 0
    while place:
        (count,) = struct.unpack_from(count_format, data, place)
        first, step = place + struct.calcsize(count_format), 4 + 2 * size
        yield from ((directory, first + step * index, size) for index in range(count))
        (place,) = struct.unpack_from(number, data, first + step * count)
        directory += 1


def chunks(data: bytes, other: bytes, rng: Rng) -> bytes:
    """A PNG with one chunk damaged and its checksum set right."""
    parts = list(_png_chunks(data))
    index = int(rng.integers(len(parts)))
    kind, body = parts[index]
    if rng.random() < 0.2:
        parts.insert(index, parts[rng.integers(len(parts))])
    else:
        parts[index] = kind, havoc(body, other, rng) if body else body
    return data[:8] + b"".join(map(_png_chunk, parts))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += 12 + length


def _png_chunk(part: tuple[bytes, bytes]) -> bytes:
    kind, body = part
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def segments(data: bytes, other: bytes, rng: Rng) -> bytes:
    """A JPEG damaged in its header: size, components, tables."""
    stop = data.index(b"\xff\xda") + 14
    if rng.random() < 0.5:
        stop = _jpeg_frame(data) + 19
        start = stop - 17
    else:
        start = 2
    change = [_flip, _overwrite_integer][rng.integers(2)](data[start:stop], other, rng)
    return data[:start] + change + data[stop:]


def _jpeg_frame(data: bytes) -> int:
    """Where the frame header (SOF0 or SOF2) is."""
    return max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))


def footer(data: bytes, other: bytes, rng: Rng) -> bytes:
    """A Parquet file damaged in its metadata, its length set right."""
    (length,) = struct.unpack("<I", data[-8:-4])
    damaged = (havoc if rng.random() < 0.5 else flips)(data[-8 - length : -8], other, rng)
    return data[: -8 - length] + damaged + struct.pack("<I", len(damaged)) + b"PAR1"


def pages(data: bytes, other: bytes, rng: Rng) -> bytes:
    """A Parquet file damaged in its pages only."""
    (length,) = struct.unpack("<I", data[-8:-4])
    stop = len(data) - 8 - length
    operation = (_flip, _overwrite, _overwrite_integer)[rng.integers(3)]
    return data[:4] + operation(data[4:stop], other, rng)[: stop - 4] + data[stop:]


def bomb(data: bytes, _: bytes, rng: Rng) -> bytes:
    """An image whose header claims ``BOMB_PX`` squared, at times in one block; of a TIFF maybe its overviews only."""
    if data[:2] == b"II":
        return _tiff_bomb(data, rng)
    if data[:4] == b"\x89PNG":
        (kind, body), *rest = _png_chunks(data)
        size = struct.pack(">II", BOMB_PX, BOMB_PX)
        return data[:8] + b"".join(map(_png_chunk, [(kind, size + body[8:]), *rest]))
    place = _jpeg_frame(data) + 5
    return data[:place] + struct.pack(">HH", BOMB_PX, BOMB_PX) + data[place + 4 :]


def _tiff_bomb(data: bytes, rng: Rng) -> bytes:
    damaged, first = bytearray(data), int(rng.random() < 0.3)
    sizes = {256, 257} | ({278, 322, 323} if rng.random() < 0.5 else set())  # width, height; rows a strip, tile size
    for directory, entry, size in _tiff_entries(data):
        if directory >= first and struct.unpack_from("<H", data, entry)[0] in sizes:
            damaged[entry + 2 : entry + 4] = struct.pack("<H", 4)  # LONG
            damaged[entry + 4 + size : entry + 8 + size] = struct.pack("<I", BOMB_PX)
    return bytes(damaged)


# ---- truth

CLASSES = ("plane", "car")
_WORDS = (havoc, tokens)


def truth_cases(folder: Path) -> list[Case]:
    """A small source of each format."""
    return [_xview_case(folder), _coco_case(folder), _yolo_case(folder), _dota_case(folder)]


def _xview_case(folder: Path) -> Case:
    def feature(bounds: str, type_id: int, image: str) -> dict:
        return {"type": "Feature", "properties": {"bounds_imcoords": bounds, "type_id": type_id, "image_id": image}}

    features = [feature("1,2,5,9", 18, "a.tif"), feature("3,4,8,6", 11, "a.tif"), feature("0,0,9,9", 11, "x/b.tif")]
    path = _written(folder / "xview.geojson", json.dumps({"type": "FeatureCollection", "features": features}))
    source = TruthSource(format="xview", path=str(path), mapping={18: "car", "11": "plane"})
    return Case("xview", {path: (*_WORDS, objects, objects, objects)}, lambda: _read_truth(source))


def _coco_case(folder: Path) -> Case:
    images = [
        {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48, "group": "g", "split": "val"},
        {"id": "two", "file_name": "x/b.jpg", "labelled_categories": ["car", 7]},
    ]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 4, 7]},
        {"id": 2, "image_id": "two", "category_id": 9, "bbox": [0, 0, 2.5, 3], "iscrowd": 1},
    ]
    data = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "plane"}, {"id": 9, "name": "car"}],
    }
    path = _written(folder / "coco.json", json.dumps(data))
    source = TruthSource(format="coco", path=str(path))
    return Case("coco", {path: (*_WORDS, objects, objects, objects)}, lambda: _read_truth(source))


def _yolo_case(folder: Path) -> Case:
    """In a folder of its own, deep enough that ``..`` leads nowhere else."""
    root = folder / "yolo" / "deep" / "down"
    for name in ("a", "b"):
        _written(root / "images" / f"{name}.jpg", "")
    settings = {"path": ".", "train": ["images"], "val": "list.txt", "names": ["plane", "car"]}
    data = _written(root / "data.yaml", json.dumps(settings))  # which is YAML too
    listed = _written(root / "list.txt", "images/a.jpg\n./images/b.jpg\n")
    label = _written(root / "labels" / "a.txt", "0 0.5 0.25 0.5 0.1\n\n1 0.9 0.9 0.1 0.1\n0 0.1 0.2 0.1 0.1\n")
    files = {
        data: (*_WORDS, objects, objects, yaml_tokens),
        listed: (*_WORDS, fields),
        label: (*_WORDS, fields, fields),
    }
    source = TruthSource(format="yolo", path=str(data))
    return Case("yolo", files, lambda: _read_truth(source))


def _dota_case(folder: Path) -> Case:
    root = folder / "dota"
    text = "imagesource:GoogleEarth\ngsd:0.14\n2 0 4 2 2 4 0 2 plane 0\n1 1 9 1 9 5 1 5 small-vehicle 1\n"
    path = _written(root / "P1.txt", text)
    source = TruthSource(format="dota", path=str(root), mapping={"plane": "plane", "small-vehicle": "car"})
    return Case("dota", {path: (*_WORDS, fields, fields)}, lambda: _read_truth(source))


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _read_truth(source: TruthSource) -> tuple[list[SoftlabelError], int]:
    rejected = 0

    def read() -> None:
        nonlocal rejected
        found = read_truth(source, CLASSES)
        match_scenes(found.scenes, ["a.tif", "x/b.tif", "a.jpg", "x/b.jpg", "P1.png"])
        for scene in found.scenes.values():
            fitted, outside = scene.fitted(64, 48)
            assert ((fitted.boxes >= 0) & (fitted.boxes <= 64)).all()
            assert set(fitted.class_ids.tolist()) <= {-1, 0, 1} >= {-1, *(scene.labelled_classes or ())}
            pa.array([scene.group, scene.split], pa.string())  # what cannot be encoded cannot be written
            rejected += len(outside)
        rejected += len(found.rejected)
        json.dumps([(row.file, row.row, row.reason) for row in found.rejected])

    return attempts(read, lambda: truth_digest(source)), rejected


# ---- rasters

_SIDE = (48, 40)


def raster_cases(folder: Path) -> list[Case]:
    """Small images of each kind that people have."""
    return [_raster_case(folder / name, mutation) for name, mutation in _rasters(folder)]


def bomb_cases(folder: Path) -> list[Case]:
    """The same with headers that claim far more."""
    return [_raster_case(folder / name, bomb, only=True) for name, _ in _rasters(folder)]


def _rasters(folder: Path) -> Iterator[tuple[str, Mutation]]:
    width, height = _SIDE
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(height) * 3, np.arange(width))[None] + np.array([0, 40, 80])[:, None, None]
    noisy = rng.integers(0, 200, (4, height, width))
    real = np.where(noisy[:3] < 20, np.nan, noisy[:3] * 1.5).astype("float32")
    block = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    placed = {"crs": "EPSG:32631", "transform": from_origin(400_000, 5_400_000, 0.5, 0.5)}
    tiffs: dict[str, tuple[np.ndarray, dict]] = {
        "tiled-deflate.tif": (noisy[:3].astype("uint8"), {**block, **placed, "compress": "deflate", "predictor": 2}),
        "striped.tif": (noisy[:3].astype("uint8"), {"blockysize": 8}),
        "lzw-nodata.tif": (smooth.astype("uint8"), {"compress": "lzw", "nodata": 7, "interleave": "band"}),
        "jpeg.tif": (
            smooth.astype("uint8"),
            {**block, "compress": "jpeg", "photometric": "ycbcr", "interleave": "pixel"},
        ),
        "deflate-16.tif": ((noisy[:3] * 300).astype("uint16"), {**block, "compress": "deflate", "nodata": 0}),
        "packbits-16.tif": ((smooth * 9 - 500).astype("int16"), {"compress": "packbits"}),
        "float-nan.tif": (real, {**placed, "compress": "deflate", "predictor": 3, "nodata": float("nan")}),
        "float64.tif": (real.astype("float64") * 1e6, {"nodata": -9999.0}),
        "alpha-zstd.tif": (noisy.astype("uint8"), {**block, "compress": "zstd", "photometric": "rgb", "alpha": "yes"}),
        "big-webp.tif": (
            smooth.astype("uint8"),
            {**block, "compress": "webp", "interleave": "pixel", "bigtiff": "yes"},
        ),
        "lerc.tif": (real, {**block, "compress": "lerc"}),
        "bits-12.tif": ((smooth * 9).astype("uint16"), {"compress": "deflate", "nbits": 12}),
        "mask.tif": (noisy[:3].astype("uint16"), {**block, "compress": "deflate"}),
    }
    for name, (pixels, options) in tiffs.items():
        _write_raster(folder / name, pixels, "GTiff", **options)
        if name in ("deflate-16.tif", "mask.tif"):
            _add_overviews(folder / name, with_mask=name == "mask.tif")
        yield name, tags
    for name, pixels in (("rgb.png", smooth.astype("uint8")), ("rgba-16.png", noisy.astype("uint16"))):
        _write_raster(folder / name, pixels, "PNG")
        yield name, chunks
    for name, options in (("base.jpg", {}), ("progressive.jpg", {"progressive": "on"})):
        _write_raster(folder / name, smooth.astype("uint8"), "JPEG", **options)
        yield name, segments


def _write_raster(path: Path, pixels: np.ndarray, driver: str, **options: Any) -> None:
    bands, height, width = pixels.shape
    size = {"driver": driver, "width": width, "height": height, "count": bands, "dtype": pixels.dtype}
    path.unlink(missing_ok=True)  # GDAL opens what it writes over, and an earlier run may have left a damaged one
    with rasterio.open(path, "w", **size, **options) as file:
        file.write(pixels)
        if bands == 4 and driver == "GTiff":
            file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]


def _add_overviews(path: Path, with_mask: bool) -> None:
    options = {"GDAL_TIFF_OVR_BLOCKSIZE": 64, "GDAL_TIFF_INTERNAL_MASK": True}
    with rasterio.Env(**options), rasterio.open(path, "r+") as file:
        if with_mask:
            file.write_mask(np.tri(*file.shape, dtype=bool))
        file.build_overviews([2])


def _raster_case(path: Path, structured: Mutation, only: bool = False) -> Case:
    bands, (width, height) = (1, 2, 3), _SIDE
    stretch = describe_scene(str(path), bands, None).stretch

    def tile(window: tuple[int, int, int, int], stretch: tuple[float, float] | None) -> None:
        reader = TileReader()
        row = {"scene_uri": str(path), "scene_stamp": None, "window": window, "bands": bands, "stretch": stretch}
        try:
            pixels = reader.read(row)
        finally:
            reader.close()
        assert pixels.shape == (window[3], window[2], 3) and pixels.dtype == np.uint8

    def tiled_anew() -> None:
        info = describe_scene(str(path), bands, None)
        size = min(64, info.width), min(64, info.height)
        tile((info.width - size[0], info.height - size[1], *size), info.stretch)

    def read() -> tuple[list[SoftlabelError], int]:
        return attempts(lambda: tile((8, 6, width - 8, height - 6), stretch), tiled_anew), 0

    return Case(path.name, {path: (structured,) if only else (havoc, flips, structured, structured)}, read)


# ---- stores


def store_cases(folder: Path) -> list[Case]:
    """A tiles folder and a labelling store on it."""
    tiles, labels = folder / "tiles-0", folder / "label-0"
    rows = [soft_label(number) for number in range(6)]
    tile_table.write_tiles(tiles, [tile_row(number) for number in range(6)], shard_tiles=4)
    for shard in range(2):
        part = pa.Table.from_pylist(rows[4 * shard :][:4], soft_labels_schema(3))
        store.write_table(shards.shard_file(labels, shard), part)
    identity = {"teacher": {"classes": ["car", "plane", "ship"], "floor": 0.01}, "tiles": tiles.name, "splits": None}
    store.write_json(labels / "store.json", identity)
    store.finish(labels, {"name": "t", "requested": 6, "labelled": 5, "rejected": 1, "boxes": 4, "saturated": 0})
    binary = (havoc, footer, footer, pages, pages)
    files: dict[Path, Sequence[Mutation]] = {
        tiles / "table" / "000000.parquet": binary,
        tiles / tile_table.MANIFEST: binary,
        shards.shard_file(labels, 0): binary,
        shards.shard_file(labels, 1): binary,
        labels / store.DONE: (*_WORDS, objects, objects),
        labels / "store.json": (*_WORDS, objects),
    }

    def read() -> tuple[list[SoftlabelError], int]:
        return attempts(
            lambda: tile_table.read_tiles(tiles),
            lambda: tile_table.read_tiles(tiles, ["train_1"], ["tile_id", "split"]),
            lambda: store.read_json(labels / "store.json"),
            lambda: store.summary(labels),
            lambda: list(shards.read_soft_labels(labels)),
        ), 0

    return [Case("store", files, read)]


def tile_row(number: int) -> dict:
    box = {"box": [1.0, 2.0, 5.0, 9.0 + number], "class_id": 1, "visible": 0.5, "ignore": False}
    return {
        "tile_id": f"é{number}", "scene_id": "s", "scene_uri": "s.tif", "scene_stamp": None,
        "window": [0, 0, 64, 64], "bands": [1, 2, 3],
        "stretch": [0.0, 9.0] if number % 2 else None, "split": ("train_1", "test", None)[number % 3], "group": "g",
        "truth": [box] * number if number else None, "labelled_classes": [0, 2] if number == 3 else None,
        "crs": "EPSG:32631", "transform": [0.5, 0.0, 4e5, 0.0, -0.5, 5.4e6],
    }  # fmt: skip


def soft_label(number: int) -> dict:
    return {
        "tile_id": f"é{number}", "boxes": [[0.0, 1.0, 2.0, 3.0]] * number, "scores": [[0.1, 0.9, 0.3]] * number,
        "objectness": [0.5] * number if number % 2 else None, "saturated": False, "losses": None,
        "status": "rejected" if number == 5 else "labelled", "reason": "gone" if number == 5 else None,
        "retryable": False,
    }  # fmt: skip


# ---- weights


def pickled(data: bytes, other: bytes, rng: Rng) -> bytes:
    """A checkpoint (a zip file) with what it says damaged, and its checksums right."""
    damaged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as file, zipfile.ZipFile(damaged, "w") as copy:
        for item in file.infolist():
            content = file.read(item)
            if item.filename.endswith("data.pkl"):
                content = [havoc, flips, flips][rng.integers(3)](content, other, rng)
            copy.writestr(item, content)
    return damaged.getvalue()


def checkpoint_values(data: bytes, _: bytes, rng: Rng) -> bytes:
    """A checkpoint whose model says something else of itself: its yaml, its names, its arguments."""
    content = torch.load(io.BytesIO(data), weights_only=False)
    key = ("yaml", "yaml", "yaml", "names", "args")[rng.integers(5)]
    setattr(content["model"], key, _damaged(getattr(content["model"], key), rng))
    return _torch_saved(content)


def metadata(data: bytes, other: bytes, rng: Rng) -> bytes:
    """A safetensors file with what it says of its model damaged, its lengths right."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["softlabel"] = objects(header["__metadata__"]["softlabel"].encode(), other, rng).decode()
    damaged = json.dumps(header).encode()
    return struct.pack("<Q", len(damaged)) + damaged + data[8 + length :]


def weights_cases(folder: Path) -> list[Case]:
    """The least of models, as ultralytics and as YOLOv5 would save it, and as softlabel does."""
    model = _least_model()
    whole = {"model": model, "ema": None, "train_args": {"imgsz": 64}}
    boxes, anchors, before, ours = (folder / f"{name}.pt" for name in ("boxes", "anchors", "before-1.6", "ours"))
    boxes.write_bytes(_torch_saved(whole))
    before.write_bytes(_torch_saved(whole, zipped=False))
    ours.with_suffix(".safetensors").unlink(missing_ok=True)
    import_weights(boxes, ours.with_suffix(".safetensors"))
    head = model.model[-1]
    head.m = torch.nn.ModuleList([torch.nn.Conv2d(8, 3 * 7, 1)])
    head._buffers["anchors"] = torch.ones(1, 3, 2)
    del head.cv2, head.cv3, head.dfl
    anchors.write_bytes(_torch_saved(whole))
    zipped, plain = (pickled, pickled, checkpoint_values, checkpoint_values, havoc), (havoc, flips, flips)
    return [
        _weights_case(boxes, zipped),
        _weights_case(anchors, zipped),
        _weights_case(before, plain),
        _weights_case(ours.with_suffix(".safetensors"), (havoc, metadata, metadata)),
    ]


def _weights_case(path: Path, mutations: Sequence[Mutation]) -> Case:
    return Case(path.name, {path: mutations}, lambda: (attempts(lambda: load_model(path)), 0))


def _least_model() -> DetectionModel:
    yaml = {
        "nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0,
        "backbone": [[-1, 1, "Conv", [8, 3, 8]], [-1, 1, "nn.Upsample", [None, 2, "nearest"]]],
        "head": [[[1], 1, "Detect", ["nc"]]],
    }  # fmt: skip
    model = DetectionModel(yaml, verbose=False)
    model.names, model.args = {0: "car", 1: "plane"}, {"imgsz": 64, "box": 7.5}
    return model


def _torch_saved(content: object, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


# ---- the process

TARGETS = {
    "truth": truth_cases,
    "rasters": raster_cases,
    "bombs": bomb_cases,
    "stores": store_cases,
    "weights": weights_cases,
}


def main(target: str, first: int, count: int, folder: Path) -> None:
    """Read ``count`` damaged inputs from number ``first`` on."""
    faulthandler.enable()
    logging.disable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = _address_space_bytes() + ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    folder.mkdir(parents=True, exist_ok=True)
    cases = TARGETS[target](folder)
    whole = {path: path.read_bytes() for case in cases for path in case.files}
    for case in cases:
        errors, rejected = case.read()
        assert not errors and not rejected, f"{case.name} is not whole: {errors}"
    for number in range(first, first + count):
        case, path, data = _input(cases, whole, np.random.default_rng([sorted(TARGETS).index(target), number]))
        path.write_bytes(data)
        print(json.dumps({"number": number, "case": case.name, "file": path.name, **_judge(case)}), flush=True)
        if number < first + count - 1:
            path.write_bytes(whole[path])


def _input(cases: list[Case], whole: dict[Path, bytes], rng: Rng) -> tuple[Case, Path, bytes]:
    case = cases[rng.integers(len(cases))]
    path = list(case.files)[rng.integers(len(case.files))]
    others = list(whole.values())
    mutations = case.files[path]
    data = mutations[rng.integers(len(mutations))](whole[path], others[rng.integers(len(others))], rng)
    return case, path, data


def _judge(case: Case) -> dict:
    """What became of one input: result, declared (an error) or rejected (rows), else failed with the traceback."""
    before, start, ignored = _peak_mb(), time.process_time(), []
    sys.unraisablehook = lambda said: ignored.append(said) if said.object not in HARMLESS else None
    faulthandler.dump_traceback_later(6 * HANG_S, exit=True)
    try:
        errors, rejected = case.read()
        outcome, detail = "declared" if errors else "rejected" if rejected else "result", " / ".join(map(str, errors))
    except BaseException:  # noqa: BLE001
        outcome, detail = "failed", traceback.format_exc()
    faulthandler.cancel_dump_traceback_later()
    seconds, grown = time.process_time() - start, _peak_mb() - before
    if ignored or seconds > HANG_S or grown > GROWTH_MB:
        outcome, detail = "failed", f"{ignored} took {seconds:.1f} s, {grown:.0f} MB: {detail}"
    return {"outcome": outcome, "detail": detail, "seconds": seconds, "grown_mb": grown}


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
