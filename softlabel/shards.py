"""The shards of a store: a file each while it is being made, packed into a few large ones when it is done.

While a store is being made, a shard (a row group of the tiles, softlabel.tile_table) is
``shards/000012/001930.parquet``, committed by rename, 160 to a folder. A finished store is packed:
``table/000012.parquet`` has the same 160 as row groups, with no rows where a shard has no tile that was asked for, and
any Parquet reader takes the folder for one table. If a shard of a packed store is made again, it has a file of its own,
which takes precedence until it is packed too. Stores before format 7 have ``shard-001930.parquet``, all in one folder,
and stay so until more is labelled in them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from operator import methodcaller
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabel import tile_table
from softlabel.errors import StoreError
from softlabel.records import EMPTY, LABELLED, REJECTED
from softlabel.storage import remove_tree
from softlabel.store import commit, opened, read_table, summary, write_table
from softlabel.tile_table import table_file

STATUSES = (LABELLED, EMPTY, REJECTED)
_REJECTED_SCHEMA = pa.schema(
    [
        pa.field("tile_id", pa.string(), nullable=False),
        pa.field("scene_uri", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("retryable", pa.bool_(), nullable=False),
    ]
)


def shard_file(folder: Path, shard: int) -> Path:
    """Where a shard of a store that is being made is committed."""
    return _shards_of(folder, shard // tile_table.FILE_SHARDS) / f"{shard:06d}.parquet"


def _shards_of(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:06d}"


def _old_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.parquet"


def shard_files(folder: Path) -> dict[int, Path]:
    """The shards that have a file of their own."""
    return _old_files(folder) | _numbers(folder.glob("shards/**/[0-9]*.parquet"))


def _old_files(folder: Path) -> dict[int, Path]:
    return {int(path.stem.removeprefix("shard-")): path for path in folder.glob("shard-*.parquet")}


def _numbers(paths: Iterable[Path]) -> dict[int, Path]:
    return {int(path.stem): path for path in paths}


def _packed(folder: Path) -> dict[int, Path]:
    """The files of packed shards, by their number."""
    return _numbers(folder.glob("table/[0-9]*.parquet"))


def committed(folder: Path) -> set[int]:
    """The shards that are there, packed ones without a tile included."""
    size = tile_table.FILE_SHARDS
    return set(shard_files(folder)).union(*(range(number * size, number * size + size) for number in _packed(folder)))


def read_shard(folder: Path, shard: int) -> pa.Table | None:
    """The rows of a shard, None where it was not committed.

    Raises:
        StoreError: Its file is broken.
    """
    for path in (shard_file(folder, shard), _old_file(folder, shard)):
        if path.is_file():
            return read_table(path)
    path = table_file(folder, shard // tile_table.FILE_SHARDS)
    if not path.is_file():
        return None
    with opened(path) as file:
        return _one(shard, {}, file, None)


def _row_group(file: pq.ParquetFile, group: int, columns: list[str] | None) -> pa.Table:
    table = file.read_row_group(group, columns=columns)
    table.validate(full=True)
    return table


def _numbered(folder: Path, columns: list[str] | None) -> Iterator[tuple[int, pa.Table]]:
    """Each shard that is there and has a tile, in order; each file of packed shards is opened once."""
    size, alone, packed = tile_table.FILE_SHARDS, shard_files(folder), _packed(folder)
    for number in sorted({shard // size for shard in alone} | set(packed)):
        with opened(packed[number]) if number in packed else nullcontext() as file:
            for shard in range(number * size, number * size + size):
                if table := _one(shard, alone, file, columns):
                    yield shard, table


def _one(
    shard: int, alone: dict[int, Path], packed: pq.ParquetFile | None, columns: list[str] | None
) -> pa.Table | None:
    """The rows of a shard, from a file of its own or from the one that it is packed in; None where it is in neither."""
    group = shard % tile_table.FILE_SHARDS
    if shard in alone:
        return read_table(alone[shard], columns)
    return _row_group(packed, group, columns) if packed and group < packed.num_row_groups else None


def read_shards(folder: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The shards of a finished store, in order.

    Raises:
        StoreError: It did not finish, or a shard is broken.
    """
    summary(folder)
    yield from (table for _, table in _numbered(folder, columns))


def read_soft_labels(folder: Path) -> Iterator[dict]:
    """The rows of a finished store, shard by shard; raises as `read_shards`."""
    for table in read_shards(folder):
        yield from table.to_pylist()


def retryable_ids(labels: pa.Table) -> set[str]:
    """The rejected tiles of a shard that may be readable another time."""
    again = labels.filter(pc.and_(pc.equal(labels["status"], REJECTED), labels["retryable"]))
    return set(again["tile_id"].to_pylist())


def retryable_counts(folder: Path) -> dict[int, int]:
    """How many tiles may be readable another time, for each shard that has any."""
    counts = (
        (shard, len(retryable_ids(table))) for shard, table in _numbered(folder, ["tile_id", "status", "retryable"])
    )
    return {shard: count for shard, count in counts if count}


def to_pack(tiles: Path, splits: Iterable[str] | None) -> Iterator[tuple[int, dict[int, int]]]:
    """For each file that a store over those splits has once it is packed: its number, and the number of tiles of each
    of its shards that has any."""
    counts, size = tile_table.shard_counts(tiles, splits), tile_table.FILE_SHARDS
    for number in np.unique(np.flatnonzero(counts) // size).tolist():
        of_file = range(number * size, min(number * size + size, len(counts)))
        yield number, {shard: int(counts[shard]) for shard in of_file if counts[shard]}


def pack(
    folder: Path, tiles: Path, splits: Iterable[str] | None, number: int, expected: dict[int, int]
) -> Counter[str]:
    """Put the shards of one file of tiles into one file, and list its rejected tiles in another, for people
    (``rejected/``); the shards' own files are removed. Repeating it gives the same result.

    Args:
        folder: The store.
        tiles: The folder of its tiles.
        splits: Those that the store was asked for.
        number: The file's, as `to_pack` gives it.
        expected: The tiles of its shards, likewise.

    Returns:
        Counts: tiles by status, tiles that are retryable or saturated, and boxes.

    Raises:
        StoreError: A shard is broken or lacks some of its tiles.
    """
    counts: Counter[str] = Counter()
    rejected: list[pa.Table] = []
    old = {shard: path for shard, path in _old_files(folder).items() if shard in expected}
    alone = old | _numbers(_shards_of(folder, number).glob("[0-9]*.parquet"))
    path = table_file(folder, number)
    packed = path if path.is_file() else None

    def counted() -> Iterator[tuple[int, pa.Table]]:
        for shard, table in _checked(folder, alone, packed, expected):
            counts.update(_count(table))
            if len(bad := table.filter(pc.equal(table["status"], REJECTED))):
                rows = tile_table.read_shard(tiles, shard, ("tile_id", "scene_uri"), splits)
                rejected.append(_with_scenes(bad, rows))
            yield shard, table

    if alone:
        commit(path, partial(_write_packed, _schema(alone, packed), number, counted()))
    else:
        for _ in counted():
            pass
    view = folder / "rejected" / f"{number:06d}.parquet"
    if rejected:
        write_table(view, pa.concat_tables(rejected))
    else:
        view.unlink(missing_ok=True)
    remove_tree(_shards_of(folder, number))
    for path in old.values():
        path.unlink(missing_ok=True)
    return counts


def _checked(
    folder: Path, alone: dict[int, Path], packed: Path | None, expected: dict[int, int]
) -> Iterator[tuple[int, pa.Table]]:
    with opened(packed) if packed else nullcontext() as file:
        for shard, count in sorted(expected.items()):
            table = _one(shard, alone, file, None)
            there = 0 if table is None else len(table)
            if table is None or there != count:
                problem = f"shard {shard} has {there} of {count} tiles"
                raise StoreError(f"{folder} does not balance ({problem}): delete it and make it again")
            yield shard, table


def _schema(alone: dict[int, Path], packed: Path | None) -> pa.Schema:
    """The schema of the shards to pack: the newest one, if some are from before a format that added columns."""
    files = [(path, methodcaller("read_bytes")) for path in alone.values()]  # small: one request each
    schemas = []
    for path, fetch in [*files, *([(packed, None)] if packed else [])]:
        with opened(path, fetch) as file:
            schemas.append(file.schema_arrow)
    return max(schemas, key=len)


def _write_packed(schema: pa.Schema, number: int, shards: Iterator[tuple[int, pa.Table]], path: Path) -> None:
    first = number * tile_table.FILE_SHARDS
    written = 0
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for shard, table in shards:
            for _ in range(shard - first - written):
                writer.write_table(schema.empty_table())
            writer.write_table(_fitted(table, schema))
            written = shard - first + 1


def _fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with the columns that it lacks added, all null."""
    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).cast(schema)


def _count(table: pa.Table) -> Counter[str]:
    counts = Counter(dict.fromkeys((*STATUSES, "retryable", "boxes", "saturated"), 0))
    counts.update(table["status"].to_pylist())
    counts["retryable"] = len(retryable_ids(table))
    counts["boxes"] = pc.sum(pc.list_value_length(table["boxes"])).as_py() or 0
    counts["saturated"] = pc.sum(table["saturated"]).as_py() or 0
    return counts


def _with_scenes(bad: pa.Table, tiles: pa.Table) -> pa.Table:
    scenes = tiles["scene_uri"].take(pc.index_in(bad["tile_id"], value_set=tiles["tile_id"]))
    columns = [bad["tile_id"], scenes, bad["reason"], bad["retryable"]]
    return pa.Table.from_arrays(columns, schema=_REJECTED_SCHEMA)
