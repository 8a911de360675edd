"""What labelling's driver makes of an error and of shards that are there already; the runs are in integration."""

import errno

import pytest
from made_stores import detections, made_tile, write_store, write_tiles
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayTaskError,
)
from tqdm import tqdm

from softlabel.errors import SceneError, StorageError, StoreError
from softlabel.labelling.run import _drop_committed, _raise_unless_lost
from softlabel.shards import shard_file


def in_a_task(cause):
    return RayTaskError("read_item", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        NodeDiedError("gone"),
        in_a_task(OutOfMemoryError("killed")),
        in_a_task(ObjectLostError("00" * 28, None, "")),
        in_a_task(StorageError("s3://b/x cannot be used")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_ray_lost_is_tried_again(error, tmp_path):
    assert _raise_unless_lost(error, [tmp_path]) is None


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (in_a_task(ValueError("a defect")), ValueError, "traceback"),
        (in_a_task(SceneError("no scene")), SceneError, "^no scene$"),
        (in_a_task(OSError(errno.ENOSPC, "full")), StoreError, "no space left"),
        (OutOfDiskError(), StoreError, "no space left"),
    ],
    ids=["defect", "softlabel", "disk", "spilling"],
)
def test_what_another_try_would_meet_again_is_raised(error, raised, words, tmp_path):
    with pytest.raises(raised, match=words):
        _raise_unless_lost(error, [tmp_path])


def test_shards_that_were_committed_by_who_died_are_no_work_any_more(tmp_path):
    tiles = [made_tile("scene", (64 * i, 0, 64, 64), detections((1, 1, 9, 9, 0, 0.9))) for i in range(8)]
    tiles[2] = made_tile("scene", (128, 0, 64, 64), reason="not there just now", retryable=True)
    write_tiles(tmp_path, tiles, shard_tiles=2)
    folder = write_store(tmp_path, tiles, shard_tiles=2)
    shard_file(folder, 3).unlink()
    work = {(0, shard): 2 for shard in range(4)}
    again = set()
    with tqdm(total=8, disable=True) as bar:
        _drop_committed([folder], work, again, bar)
    assert work == {(0, 1): 2, (0, 3): 2}  # one to retry, one that is missing
    assert again == {(0, 1)}
