"""A finished store read shard by shard, each tile with what was found in it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from softlabel.errors import StoreError
from softlabel.records import LABELLED, REJECTED, TILES, Detections
from softlabel.store import (
    STORE,
    TILES_FILE,
    is_done,
    num_tile_shards,
    read_json,
    read_table,
    read_tile_shard,
    shard_file,
    summary,
)


@dataclass(frozen=True)
class Store:
    """A finished store. ``tiles`` is the folder of its tiles; ``splits`` None is every tile."""

    folder: Path
    tiles: Path
    teacher: dict
    splits: tuple[str, ...] | None

    @property
    def classes(self) -> list[str]:
        """In the order of the class vectors."""
        return self.teacher["classes"]

    @property
    def num_tiles(self) -> int:
        """Those asked for."""
        return summary(self.folder)["requested"]


@dataclass(frozen=True)
class LabelledTile:
    """A tile row without its truth, what became of it (records.LABELLED, EMPTY or REJECTED), and what was found there.

    ``reason`` is why it was rejected, else None.
    """

    tile: dict
    found: Detections
    status: str = LABELLED
    reason: str | None = None
    retryable: bool = False


def open_store(folder: Path) -> Store:
    """A store by its folder.

    Raises:
        StoreError: The folder is no store, the store is not finished, or its tiles are gone.
    """
    if not (folder / STORE).is_file():
        raise StoreError(f"{folder} is no store of soft labels: give the label-* or fused-* folder of a run")
    if not is_done(folder):
        raise StoreError(f"{folder} is not finished: run the command that makes it again")
    summary(folder)
    made_from = read_json(folder / STORE)
    folder = folder.resolve()
    tiles = folder.parent / made_from["tiles"]
    if not (tiles / TILES_FILE).is_file():
        raise StoreError(f"{folder} needs its tiles beside it: no {TILES_FILE} in {tiles}")
    splits = made_from["splits"]
    return Store(folder, tiles, made_from["teacher"], None if splits is None else tuple(splits))


def num_shards(store: Store) -> int:
    """Row groups of the tiles; a shard without a tile of the store's splits has no file."""
    return num_tile_shards(store.tiles)


def tile_rows(store: Store, shard: int) -> list[dict]:
    """The rows of a shard's tiles, those of the store's splits, without their truth."""
    columns = [name for name in TILES.names if name not in ("truth", "labelled_classes")]
    return read_tile_shard(store.tiles, shard, columns, store.splits).to_pylist()


def read_shard(store: Store, shard: int) -> list[LabelledTile]:
    """The tiles of a shard with what was found, in their order.

    Raises:
        StoreError: The shard is missing, broken, or one of other tiles.
    """
    return with_labels(store, shard, tile_rows(store, shard))


def with_labels(store: Store, shard: int, rows: list[dict]) -> list[LabelledTile]:
    """The tiles of a shard, ``rows`` as `tile_rows` gives them, with what was found.

    Raises:
        StoreError: The shard is missing, broken, or one of other tiles.
    """
    if not rows:
        return []
    path = shard_file(store.folder, shard)
    table = read_table(path)
    if table["tile_id"].to_pylist() != [row["tile_id"] for row in rows]:
        raise StoreError(f"{path} is not about the tiles in {store.tiles}: delete {store.folder} and make it again")
    found = _detections(table, len(store.classes))
    columns = (table[name].to_pylist() for name in ("status", "reason", "retryable"))
    return [
        LabelledTile(row, one, status, (reason or "no reason given") if status == REJECTED else None, retry)
        for row, one, status, reason, retry in zip(rows, found, *columns, strict=True)
    ]


def read_all(store: Store) -> Iterator[LabelledTile]:
    """Every tile of a store, one shard in memory at a time."""
    for shard in range(num_shards(store)):
        yield from read_shard(store, shard)


def _detections(table: pa.Table, num_classes: int) -> list[Detections]:
    """What was found per tile, without objectness (it is in the scores) and agreement: by array, since a box may have a
    list of 60 numbers and a shard 64,000 boxes."""
    ends = np.cumsum(pc.list_value_length(table["boxes"]).to_numpy())[:-1]
    boxes = np.split(_values(table["boxes"]).reshape(-1, 4), ends)
    scores = np.split(_values(table["scores"]).reshape(-1, num_classes), ends)
    saturated = table["saturated"].to_pylist()
    found = [Detections(*arrays) for arrays in zip(boxes, scores, saturated, strict=True)]
    if "xywhr" not in table.column_names or table["xywhr"].null_count == len(table):  # format 4, or all upright
        return found
    # Tiles that were not labelled have no box, turned or not.
    turned = np.split(_values(pc.fill_null(table["xywhr"], [])).reshape(-1, 5), ends)
    return [replace(one, xywhr=xywhr) for one, xywhr in zip(found, turned, strict=True)]


def _values(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
