"""A shard's pixels, on their way to the model."""

import weakref

import numpy as np
from conftest import tiny_recipe
from made_stores import made_tile, write_tiles

from softlabel.errors import NoValidPixelError, SceneError
from softlabel.labelling.job import label_job
from softlabel.labelling.reading import images_of, read_shard, tiles_of

SIZES_WH = [(64, 32), (32, 64), (48, 48), (64, 64), (16, 80)]


def pixels(row):
    width, height = row["window"][2:]
    return np.random.default_rng(row["window"][0]).integers(0, 256, (height, width, 3), np.uint8)


def read(tmp_path, weights, how):
    rows = [made_tile("scene", (100 * i, 0, *size)) for i, size in enumerate(SIZES_WH)]
    job = label_job(tiny_recipe(), "teacher", weights, write_tiles(tmp_path, rows, shard_tiles=len(rows)), None)
    return tiles_of(read_shard(0, job, tmp_path / "store", 0, how))


def test_tiles_of_any_size_keep_their_pixels_beside_tiles_without_any(tmp_path, weights):
    def some(row):
        if row["window"][0] == 100:
            raise SceneError("it is cut short", retryable=True)
        if row["window"][0] == 300:
            raise NoValidPixelError("nothing there")
        return pixels(row)

    table = read(tmp_path, weights, some)
    assert table["reason"].to_pylist() == [None, "it is cut short", None, None, None]
    assert table["retryable"].to_pylist() == [False, True, False, False, False]
    assert table["empty"].to_pylist() == [False, False, False, True, False]
    for i, (image, (width, height)) in enumerate(zip(images_of(table), SIZES_WH, strict=True)):
        if i in (1, 3):
            assert image.shape == (0, 0, 3)
        else:
            np.testing.assert_array_equal(image, pixels({"window": [100 * i, 0, width, height]}))


def test_no_more_than_a_tile_is_in_memory_twice(tmp_path, weights):
    given = []

    def watched(row):
        assert all(image() is None for image in given[:-1])
        image = pixels(row)
        given.append(weakref.ref(image))
        return image

    read(tmp_path, weights, watched)
    assert len(given) == len(SIZES_WH)
