"""A finished store read shard by shard, each tile with what was found in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel import shards, tile_table
from softlabel.errors import StoreError
from softlabel.records import LABELLED, REJECTED, TILES, Detections
from softlabel.store import STORE, is_done, read_json, summary


@dataclass(frozen=True)
class Store:
    """A finished store. ``tiles`` is the folder of its tiles; ``splits`` None is every tile; ``parents`` says which
    class of the recipe a finer one belongs to, if a class was split (softlabel.results.subtype)."""

    folder: Path
    tiles: Path
    teacher: dict
    splits: tuple[str, ...] | None
    parents: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """In the order of the class vectors."""
        return self.teacher["classes"]

    @property
    def num_tiles(self) -> int:
        """The tiles asked for."""
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
    """Open a store by its folder.

    Raises:
        StoreError: The folder is no store, the store is not finished, or its tiles are gone.
    """
    if not (folder / STORE).is_file():
        raise StoreError(f"{folder} is no store of soft labels: give a label-*, fused-* or subtypes-* folder")
    if not is_done(folder):
        raise StoreError(f"{folder} is not finished: run the command that makes it again")
    summary(folder)
    made_from = read_json(folder / STORE)
    folder = folder.resolve()
    tiles = folder.parent / made_from["tiles"]
    if not tile_table.has_tiles(tiles):
        raise StoreError(f"{folder} needs its tiles beside it: no table of tiles in {tiles}")
    splits = made_from["splits"]
    splits = None if splits is None else tuple(splits)
    return Store(folder, tiles, made_from["teacher"], splits, made_from.get("parents", {}))


def num_shards(store: Store) -> int:
    """Number of shards of the tiles, including those without a tile of the store's splits."""
    return tile_table.num_shards(store.tiles)


def tile_rows(store: Store, shard: int) -> list[dict]:
    """The rows of a shard's tiles in the store's splits, without their truth."""
    columns = [name for name in TILES.names if name not in ("truth", "labelled_classes")]
    return tile_table.read_shard(store.tiles, shard, columns, store.splits).to_pylist()


def read_shard(store: Store, shard: int) -> list[LabelledTile]:
    """The tiles of a shard with what was found, in order.

    Raises:
        StoreError: The shard is missing, broken, or about other tiles.
    """
    return with_labels(store, shard, tile_rows(store, shard))


def with_labels(store: Store, shard: int, rows: list[dict]) -> list[LabelledTile]:
    """The tiles of a shard, ``rows`` as `tile_rows` gives them, with what was found.

    Raises:
        StoreError: The shard is missing, broken, or about other tiles.
    """
    if not rows:
        return []
    table = shards.read_shard(store.folder, shard)
    if table is None:
        raise StoreError(f"shard {shard} of {store.folder} is missing: run the command that makes it again")
    if table["tile_id"].to_pylist() != [row["tile_id"] for row in rows]:
        raise StoreError(
            f"shard {shard} of {store.folder} is not about the tiles in {store.tiles}: delete it and make it again"
        )
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
    """What was found per tile: through arrays, since a box may have a list of 60 numbers and a shard 64,000 boxes."""
    ends = np.cumsum(pc.list_value_length(table["boxes"]).to_numpy())[:-1]
    boxes = np.split(_values(table["boxes"]).reshape(-1, 4), ends)
    scores = np.split(_values(table["scores"]).reshape(-1, num_classes), ends)
    turned, objectness, agreement = (_of_boxes(table, name, ends) for name in ("xywhr", "objectness", "agreement"))
    return [
        Detections(box, score, saturated, its_objectness, xywhr, agreed)
        for box, score, saturated, its_objectness, xywhr, agreed in zip(
            boxes, scores, table["saturated"].to_pylist(), objectness, turned, agreement, strict=True
        )
    ]


def _of_boxes(table: pa.Table, name: str, ends: NDArray[np.int64]) -> Sequence[NDArray[np.float32] | None]:
    """A column with one value for each box, tile by tile; None where the store has none, as in older formats."""
    if name not in table.column_names or table[name].null_count == len(table):
        return [None] * len(table)
    filled = pc.fill_null(table[name], []).combine_chunks().flatten()  # tiles that were not labelled have no box
    if pa.types.is_fixed_size_list(filled.type):
        return np.split(filled.flatten().to_numpy(zero_copy_only=False).reshape(-1, filled.type.list_size), ends)
    return np.split(filled.to_numpy(zero_copy_only=False), ends)


def _values(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
