"""What a labelling actor does with shards, without Ray."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
from conftest import tiny_recipe
from made_stores import made_tile, write_tiles

from softlabel.labelling import labeller as module
from softlabel.labelling.labeller import Labeller
from softlabel.labelling.reading import read_shard
from softlabel.labelling.teachers import label_job
from softlabel.labelling.yolo import YoloDetector
from softlabel.store import read_table, shard_file


def pixels(row):
    return np.random.default_rng(row["window"][0]).integers(0, 256, (128, 128, 3), np.uint8)


def test_one_shard_is_committed_while_another_is_in_the_model(weights, tmp_path):
    tiles = write_tiles(tmp_path, [made_tile("scene", (128 * i, 0, 128, 128)) for i in range(4)], shard_tiles=2)
    job, store = label_job(tiny_recipe(), "teacher", weights, tiles, None), tmp_path / "store"
    labeller = Labeller([job], [store], 1, None)
    read = [read_shard(0, job, store, shard, pixels) for shard in range(2)]
    # Each commit waits for the other to begin, and each shard finds itself alone in the model.
    in_model, both = threading.Lock(), threading.Barrier(2, timeout=60)
    detect, write_table = YoloDetector.detect, module.write_table

    def alone(detector, images):
        assert in_model.acquire(blocking=False)
        found = detect(detector, images)
        in_model.release()
        return found

    def together(path, table):
        both.wait()
        write_table(path, table)

    with (
        mock.patch.object(YoloDetector, "detect", alone),
        mock.patch.object(module, "write_table", together),
        ThreadPoolExecutor(2) as calls,
    ):
        rows = [row for table in calls.map(labeller, read) for row in table.to_pylist()]
    assert [row["shard"] for row in rows] == [0, 1]
    found = [tile_id for shard in range(2) for tile_id in read_table(shard_file(store, shard))["tile_id"].to_pylist()]
    assert found == [f"scene#{128 * i}_0_128x128" for i in range(4)]
