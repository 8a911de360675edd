"""From the tiles of one shard to pixels, in one Arrow row: uint8 in one buffer, which no process on the way copies.

One row, since Ray Data may merge blocks, or cut one in two, but never cuts a row.

A tile that cannot be read carries the reason instead, and so does one that killed its process before. One without a
valid pixel is empty: nothing is wrong with it, and there is nothing to see.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel import shards
from softlabel.errors import NoValidPixelError, SceneError
from softlabel.labelling.area import tile_km2
from softlabel.labelling.job import LabelJob
from softlabel.labelling.journal import READING, Journal
from softlabel.shards import retryable_ids

Image = NDArray[np.uint8]

_COLUMNS = ("tile_id", "scene_uri", "scene_stamp", "window", "bands", "stretch", "crs", "transform")
_NO_PIXELS = np.zeros((0, 0, 3), np.uint8)


def read_item(
    jobs: Sequence[LabelJob], stores: Sequence[Path], read: Callable[[dict], Image], item: pa.Table
) -> pa.Table:
    """``read_shard`` for the job and shard in the one row of ``item``."""
    index, shard, again = (item[name][0].as_py() for name in ("job", "shard", "again"))
    return read_shard(index, jobs[index], stores[index], shard, read, again=again)


def read_shard(
    index: int, job: LabelJob, store: Path, shard: int, read: Callable[[dict], Image], *, again: bool = False
) -> pa.Table:
    """The pixels of a shard's tiles that are still to be labelled.

    Args:
        index: The job's number, passed on.
        job: Which tiles are asked for.
        store: The job's folder, with the journal.
        shard: The shard's number.
        read: Reads one tile row as uint8 (H, W, 3); raises SceneError, or NoValidPixelError for an empty tile.
        again: The shard is there already: only those of its tiles that are to be retried are read.

    Returns:
        One row: job, shard, again and, for `tiles_of`, lists with a value per tile: its id, height, width, pixels, km2,
        reason (null where it was read), retryable and empty.
    """
    rows = job.tile_rows(shard, _COLUMNS).to_pylist()
    if again and (labels := shards.read_shard(store, shard)) is not None:
        chosen = retryable_ids(labels)
        rows = [row for row in rows if row["tile_id"] in chosen]
    journal = Journal(store, shard, READING)
    groups = journal.groups([row["tile_id"] for row in rows])
    pixels = _Pixels(sum(3 * row["window"][2] * row["window"][3] for row in rows))
    seen = [one for group in groups for one in _read_group([rows[i] for i in group], journal, read, pixels)]
    tiles = pa.table(
        {
            "tile_id": pa.array([row["tile_id"] for row in rows], pa.string()),
            "height": pa.array([one.height for one in seen], pa.int32()),
            "width": pa.array([one.width for one in seen], pa.int32()),
            "pixels": pixels.as_array(),
            "km2": pa.array([tile_km2(row) for row in rows], pa.float64()),
            "reason": pa.array([one.reason or None for one in seen], pa.string()),
            "retryable": pa.array([one.retryable for one in seen], pa.bool_()),
            "empty": pa.array([one.empty for one in seen], pa.bool_()),
        }
    )
    lists = {name: _as_list(tiles[name].chunk(0)) for name in tiles.column_names}
    return pa.table({"job": [index], "shard": [shard], "again": [again], **lists})


def tiles_of(row: pa.Table) -> pa.Table:
    """A table with a row per tile, from the one row that ``read_shard`` made; nothing is copied."""
    lists = (name for name in row.column_names if name not in ("job", "shard", "again"))
    return pa.table({name: row[name].chunk(0).flatten() for name in lists})


def _as_list(column: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array([0, len(column)], pa.int64()), column)


def images_of(table: pa.Table) -> list[Image]:
    """The pixels of a table that ``tiles_of`` gave, uint8 (H, W, 3) each, not copied."""
    (pixels,) = table["pixels"].chunks  # one shard is one chunk; taking scalars from it would copy
    _, offsets, data = pixels.buffers()
    starts = np.frombuffer(offsets, np.int64)[pixels.offset : pixels.offset + len(pixels)]
    sizes = zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
    return [
        np.frombuffer(data, np.uint8, height * width * 3, start).reshape(height, width, 3)
        for start, (height, width) in zip(starts, sizes, strict=True)
    ]


class _Pixels:
    """Images, one after the other, in one buffer.

    Each is copied there at once, while the CPU has it in a cache, and the next tile is decoded into its memory. Kept
    until all were there they took twice as much, and reading them was 7 % slower.
    """

    def __init__(self, num_bytes: int) -> None:
        self._data, self._ends = np.empty(num_bytes, np.uint8), [0]

    def append(self, image: Image) -> None:
        start = self._ends[-1]
        self._ends.append(start + image.size)
        self._data[start : self._ends[-1]] = image.ravel()

    def as_array(self) -> pa.Array:
        buffers = [None, pa.py_buffer(np.array(self._ends, np.int64)), pa.py_buffer(self._data[: self._ends[-1]])]
        return pa.Array.from_buffers(pa.large_binary(), len(self._ends) - 1, buffers)


class _Seen(NamedTuple):
    """A tile's size, or why it has no pixels."""

    height: int = 0
    width: int = 0
    reason: str = ""
    retryable: bool = False
    empty: bool = False


def _read_group(rows: list[dict], journal: Journal, read: Callable[[dict], Image], pixels: _Pixels) -> list[_Seen]:
    verdict = journal.verdict(rows[0]["tile_id"]) if len(rows) == 1 else ""
    if verdict:
        pixels.append(_NO_PIXELS)
        return [_Seen(reason=verdict)]
    with journal.in_hand([row["tile_id"] for row in rows]):
        return [_read_tile(row, read, pixels) for row in rows]


def _read_tile(row: dict, read: Callable[[dict], Image], pixels: _Pixels) -> _Seen:
    image, why = _NO_PIXELS, _Seen()
    try:
        image = read(row)
    except NoValidPixelError:
        why = _Seen(empty=True)
    except SceneError as error:
        why = _Seen(reason=str(error), retryable=error.retryable)
    pixels.append(image)
    return why._replace(height=image.shape[0], width=image.shape[1])
