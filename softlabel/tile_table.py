"""The table of tiles: Parquet files of bounded size with a row group for each shard, and a manifest that counts them.

A tile step's folder has ``table/000000.parquet`` and so on, with 160 shards of 64 tiles each, in order, and
``shards.parquet``: a row for each shard, a column for each split, with the number of its tiles. The manifest tells what
there is to do; a shard is a row group of a small file, read as quickly from the last of a thousand files as from the
first. Steps before format 7 have one ``tiles.parquet``, whose footer grew with it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softlabel.errors import StoreError
from softlabel.records import TILES, TILES_OF_FORMAT_4, TILES_OF_FORMAT_6
from softlabel.store import commit, opened, read_table, write_table

SHARD_TILES = 64
"""What labelling takes, and commits, at once."""
FILE_SHARDS = 160
MANIFEST = "shards.parquet"
NO_SPLIT = "none"
"""The name by which to ask for tiles in no split: where truth covers only part of the scenes, those of the others."""
_OLD_FILE = "tiles.parquet"


def write_tiles(folder: Path, rows: Iterable[dict], shard_tiles: int = SHARD_TILES) -> None:
    """Write rows (records.TILES) in order, with one shard of them in memory at a time; the manifest comes last."""
    for left in (folder / "table").glob("*"):  # by a run that was killed, perhaps when more scenes could be read
        left.unlink()
    (folder / _OLD_FILE).unlink(missing_ok=True)
    shards = _shards(iter(rows), shard_tiles)
    counts: list[Counter[str]] = []
    for number in count():
        if (first := next(shards, None)) is None:
            break
        of_file = chain([first], islice(shards, FILE_SHARDS - 1))
        commit(table_file(folder, number), partial(_write_file, counts, of_file))
    splits = sorted(set(chain.from_iterable(counts)))
    columns = {split: pa.array([shard[split] for shard in counts], pa.int32()) for split in splits}
    write_table(folder / MANIFEST, pa.table(columns))


def _shards(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    while shard := list(islice(rows, size)):
        yield shard


def _write_file(counts: list[Counter[str]], shards: Iterable[list[dict]], path: Path) -> None:
    with pq.ParquetWriter(path, TILES, compression="zstd", write_page_checksum=True) as writer:
        for shard in shards:
            writer.write_table(pa.Table.from_pylist(shard, TILES))
            counts.append(Counter(row.get("split") or NO_SPLIT for row in shard))


def has_tiles(folder: Path) -> bool:
    """Whether a folder has a table of tiles."""
    return (folder / MANIFEST).is_file() or (folder / _OLD_FILE).is_file()


def shard_counts(folder: Path, splits: Iterable[str] | None) -> NDArray[np.int64]:
    """How many tiles of ``splits`` (None: all; NO_SPLIT: those in none) are in each shard, (S,).

    Raises:
        StoreError: The table is missing, broken, or no table of tiles.
    """
    if not (folder / MANIFEST).is_file() and (folder / _OLD_FILE).is_file():
        return _old_counts(folder / _OLD_FILE, splits)
    manifest = read_table(folder / MANIFEST)
    wanted = set(manifest.column_names) if splits is None else set(splits)
    counts = [_integers(manifest[name], folder) for name in manifest.column_names if name in wanted]
    return np.sum([np.zeros(len(manifest), np.int64), *counts], axis=0)


def _integers(column: pa.ChunkedArray, folder: Path) -> NDArray[np.int64]:
    if not pa.types.is_integer(column.type) or column.null_count:
        raise _no_tiles(folder / MANIFEST)
    return column.to_numpy().astype(np.int64)


def _old_counts(path: Path, splits: Iterable[str] | None) -> NDArray[np.int64]:
    with _opened(path) as file:
        if splits is None:
            return np.array([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)], np.int64)
        groups = (file.read_row_group(i, columns=["split"]) for i in range(file.num_row_groups))
        return np.array([pc.sum(_is_in(group["split"], splits)).as_py() or 0 for group in groups], np.int64)


def num_shards(folder: Path) -> int:
    """Number of shards of a table of tiles; raises as `shard_counts`."""
    return len(shard_counts(folder, None))


def read_shard(folder: Path, shard: int, columns: Iterable[str], splits: Iterable[str] | None) -> pa.Table:
    """The rows of one shard's tiles in ``splits`` (as for `shard_counts`), in order.

    Raises:
        StoreError: Its file is missing, broken, or not of a table of tiles.
    """
    path, group = table_file(folder, shard // FILE_SHARDS), shard % FILE_SHARDS
    if _is_old(folder):
        path, group = folder / _OLD_FILE, shard
    with _opened(path) as file:
        return _rows(file, group, list(columns), splits)


def read_tiles(folder: Path, splits: Iterable[str] | None = None, columns: list[str] | None = None) -> list[dict]:
    """`iterate_tiles` as a list, for a training or test set, whose rows fit in memory."""
    return list(iterate_tiles(folder, splits, columns))


def iterate_tiles(
    folder: Path, splits: Iterable[str] | None = None, columns: list[str] | None = None
) -> Iterator[dict]:
    """The rows of a finished tile step's tiles in ``splits`` (as for `shard_counts`), in order; files without any are
    not opened.

    Raises:
        StoreError: The table is missing, broken, or no table of tiles.
    """
    splits = None if splits is None else tuple(splits)
    wanted = np.flatnonzero(shard_counts(folder, splits))
    old = _is_old(folder)
    groups: dict[int, list[int]] = defaultdict(list)
    for shard in wanted.tolist():
        groups[0 if old else shard // FILE_SHARDS].append(shard if old else shard % FILE_SHARDS)
    for number, of_file in groups.items():
        with _opened(folder / _OLD_FILE if old else table_file(folder, number)) as file:
            for group in of_file:
                yield from _rows(file, group, columns or TILES.names, splits).to_pylist()


def _rows(file: pq.ParquetFile, group: int, columns: list[str], splits: Iterable[str] | None) -> pa.Table:
    table = file.read_row_group(group, columns=sorted({*columns, "split"}))
    table.validate(full=True)  # else text that is not UTF-8 fails later, where rows are made of it
    if splits is not None:
        table = table.filter(_is_in(table["split"], splits))
    return table.select(columns)


def _is_in(split: pa.ChunkedArray, splits: Iterable[str]) -> pa.ChunkedArray:
    return pc.is_in(split, pa.array([None if name == NO_SPLIT else name for name in splits], pa.string()))


def table_file(folder: Path, number: int) -> Path:
    """A file of a table: of tiles, or of a store over them (softlabel.shards), which is divided in the same way."""
    return folder / "table" / f"{number:06d}.parquet"


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    with opened(path, _fetched) as file:
        if not any(file.schema_arrow.equals(known) for known in (TILES, TILES_OF_FORMAT_6, TILES_OF_FORMAT_4)):
            raise _no_tiles(path)
        yield file


@lru_cache(maxsize=1)
def _fetched(path: Path) -> bytes:
    """A whole file of a bucket, a megabyte or so: whoever reads one of its shards usually reads the next."""
    return path.read_bytes()


@lru_cache
def _is_old(folder: Path) -> bool:
    """Whether a finished table is from before format 7; a bucket is asked once."""
    return (folder / _OLD_FILE).is_file()


def _no_tiles(path: Path) -> StoreError:
    return StoreError(f"{path} is no table of tiles: delete it and run its step again")
