"""What a labelling actor does with shards, without Ray."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from buckets import Faults, environment, serve
from conftest import tiny_recipe
from made_stores import made_tile, write_tiles

from softlabel.detectors.yolo import YoloDetector
from softlabel.errors import NoValidPixelError, RecipeError
from softlabel.labelling import labeller as module
from softlabel.labelling.job import label_job
from softlabel.labelling.journal import LABELLING, Journal
from softlabel.labelling.labeller import Labeller
from softlabel.labelling.reading import read_shard
from softlabel.shards import pack, shard_file
from softlabel.storage import location
from softlabel.store import read_table


def pixels(row):
    return np.random.default_rng(row["window"][0]).integers(0, 256, (128, 128, 3), np.uint8)


@pytest.fixture
def shards(weights, tmp_path):
    """A job of two shards with two tiles each, its store, a labeller, and what was read of the shards."""
    tiles = write_tiles(tmp_path, [made_tile("scene", (128 * i, 0, 128, 128)) for i in range(4)], shard_tiles=2)
    job, store = label_job(tiny_recipe(), "teacher", weights, tiles, None), tmp_path / "store"
    return job, store, [read_shard(0, job, store, shard, pixels) for shard in range(2)]


def label_both(job, store, read):
    """Both shards at once; the rows that say how it went."""
    labeller = Labeller([job], [store], 1, None)
    with ThreadPoolExecutor(2) as calls:
        rows = [row for table in calls.map(labeller, read) for row in table.to_pylist()]
    assert [row["shard"] for row in rows] == [0, 1]
    found = [tile_id for shard in range(2) for tile_id in read_table(shard_file(store, shard))["tile_id"].to_pylist()]
    assert found == [f"scene#{128 * i}_0_128x128" for i in range(4)]
    return rows


def test_one_shard_starts_while_another_waits_for_its_last_tiles(shards):
    starting, second = threading.Lock(), threading.Event()
    start, calls = YoloDetector.start, []

    def start_alone(detector, images):
        assert starting.acquire(blocking=False)
        calls.append(images)
        finish = start(detector, images)
        starting.release()
        if len(calls) == 1:
            return lambda: finish() if second.wait(60) else pytest.fail("the second shard did not start")
        second.set()
        return finish

    with mock.patch.object(YoloDetector, "start", start_alone):
        rows = label_both(*shards)
    together_s = max(row["end"] for row in rows) - min(row["begin"] for row in rows)
    assert sum(row["busy_s"] for row in rows) <= together_s  # what both were in the model counts once


def test_one_shard_is_committed_while_another_is_in_the_model(shards):
    # Each commit waits for the other to begin, and each shard finds itself alone among those that start.
    starting, both = threading.Lock(), threading.Barrier(2, timeout=60)
    start, write_table, met = YoloDetector.start, module.write_table, []

    def start_alone(detector, images):
        assert starting.acquire(blocking=False)
        finish = start(detector, images)
        starting.release()
        return finish

    def together(path, table):
        met.append(both.wait())
        write_table(path, table)

    with (
        mock.patch.object(YoloDetector, "start", start_alone),
        mock.patch.object(module, "write_table", together),
    ):
        label_both(*shards)
    assert sorted(met) == [0, 1]


def test_a_shard_that_killed_its_process_is_alone_in_the_model(shards):
    job, store, read = shards
    dead = Journal(store, 1, LABELLING).in_hand(["scene#256_0_128x128"])
    dead.__enter__()  # and no end, until the last line
    in_model, start = threading.Lock(), YoloDetector.start

    def start_alone(detector, images):
        assert in_model.acquire(blocking=False)
        finish = start(detector, images)

        def finish_alone():
            found = finish()
            in_model.release()
            return found

        return finish_alone

    with mock.patch.object(YoloDetector, "start", start_alone):
        label_both(job, store, read)
    dead.__exit__(None, None, None)


def test_an_empty_tile_is_a_row_of_its_own_kind_and_never_in_the_model(shards):
    job, store, _ = shards
    first = "scene#0_0_128x128"

    def read(row):
        if row["tile_id"] == first:
            raise NoValidPixelError("all is nodata")
        return pixels(row)

    seen, start = [], YoloDetector.start
    with mock.patch.object(YoloDetector, "start", lambda self, images: seen.append(len(images)) or start(self, images)):
        (said,) = Labeller([job], [store], 1, None)(read_shard(0, job, store, 0, read)).to_pylist()
    empty, labelled = read_table(shard_file(store, 0)).to_pylist()
    assert (empty["tile_id"], empty["status"], empty["boxes"], empty["reason"]) == (first, "empty", [], None)
    assert labelled["status"] == "labelled" and labelled["boxes"]
    assert seen == [1] and (said["tiles"], said["empty"], said["rejected"], said["pixels"]) == (2, 1, 0, 128 * 128)


OF_THE_MACHINE = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(OF_THE_MACHINE)], ids=repr
)
def test_a_batch_too_large_for_the_memory_is_said_to_be(shards, error):
    job, store, read = shards
    with (
        mock.patch.object(YoloDetector, "start", side_effect=error),
        pytest.raises(RecipeError, match=r"lower execution\.batch_size"),
    ):
        Labeller([job], [store], 1, None)(read[0])


def test_another_error_is_not_taken_for_too_little_memory(shards):
    job, store, read = shards
    with (
        mock.patch.object(YoloDetector, "start", side_effect=RuntimeError("shapes differ")),
        pytest.raises(RuntimeError, match="shapes differ"),
    ):
        Labeller([job], [store], 1, None)(read[0])


@pytest.mark.parametrize("missing", [["xywhr", "agreement"], ["agreement"]])
def test_tiles_that_had_failed_join_a_shard_of_format_4_or_5(shards, missing):
    job, store, read = shards
    label_both(job, store, read)
    after = read_table(shard_file(store, 0))
    both = module._together(after.drop_columns(missing), after)
    assert both.schema.equals(after.schema.remove_metadata())
    assert both["tile_id"].to_pylist() == 2 * after["tile_id"].to_pylist()
    assert all(both[name].to_pylist()[:2] == [None, None] for name in missing)
    assert [len(one) for one in both["agreement"].to_pylist()[2:]] == [len(one) for one in after["boxes"].to_pylist()]


def test_a_shard_asks_little_of_a_bucket(weights, monkeypatch):
    """Two looks for notes, two notes that come and go, and the shard; its tiles are in a file that is there already."""
    made = [made_tile("scene", (128 * i, 0, 128, 128)) for i in range(8)]
    with serve("s3") as (url, bucket), Faults(url) as counting:
        for key, value in environment("s3", counting.url).items():
            monkeypatch.setenv(key, value)
        run_dir = location(f"s3://{bucket}/run")
        tiles, store = write_tiles(run_dir, made, shard_tiles=2), run_dir / "store"
        job = label_job(tiny_recipe(), "teacher", weights, tiles, None)
        labeller, asked = Labeller([job], [store], 1, None), []
        for shard in range(4):
            before = Counter(counting.requests)
            labeller(read_shard(0, job, store, shard, pixels))
            asked.append(counting.requests - before)
        before = Counter(counting.requests)
        counts = pack(store, tiles, None, 0, dict.fromkeys(range(4), 2))
        packing = counting.requests - before
    assert asked[1:] == 3 * [{"GET": 2, "PUT": 3, "POST": 2}]
    assert counts["labelled"] == 8
    assert packing == {"LIST": 3, "HEAD": 1, "GET": 2 * 4, "PUT": 1, "POST": 4 + 1}
