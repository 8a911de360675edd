"""The table of tiles: shards, files and counts, as it is written now and as it was."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_stores import made_tile

from softlabel import tile_table
from softlabel.errors import StoreError
from softlabel.records import TILES, TILES_OF_FORMAT_4, TILES_OF_FORMAT_6
from softlabel.tile_table import has_tiles, iterate_tiles, num_shards, read_shard, read_tiles, shard_counts, write_tiles

SHARD, FILE = 3, 2
SPLITS = ["train_1"] * 8 + [None] * 9 + ["test", "val_1"] * 2 + ["train_1"]
ASKED = [None, ["train_1"], ["test", "none"], ["val_2"], []]


def made_rows():
    drawn = {"box": [1.0, 2.0, 5.0, 9.0], "class_id": 1, "visible": 0.5, "ignore": False}
    turned = {**drawn, "xywhr": [3.0, 5.0, 4.0, 2.0, 0.5]}
    truths = [None, [], [drawn], [drawn, turned]]
    places = [
        {"stretch": None, "transform": None},
        {"stretch": [0.0, 9.0], "transform": [1.0, 0.0, 3.0, 0.0, -1.0, 6.0]},
    ]
    return [
        made_tile(f"s{i:02d}", (0, 0, 64, 64), split=split, truth=truths[i % 4], **places[i % 2])[0]
        for i, split in enumerate(SPLITS)
    ]


def new(folder, monkeypatch):
    monkeypatch.setattr(tile_table, "FILE_SHARDS", FILE)
    write_tiles(folder, iter(made_rows()), SHARD)


def old(schema):
    def write(folder, _):
        rows = pa.Table.from_pylist(made_rows(), schema)
        folder.mkdir()
        pq.write_table(rows, folder / "tiles.parquet", row_group_size=SHARD)

    return write


@pytest.mark.parametrize("write", [new, old(TILES_OF_FORMAT_6), old(TILES_OF_FORMAT_4)], ids=["new", "6", "4"])
@pytest.mark.parametrize("asked", ASKED)
def test_whatever_is_asked_for_is_counted_and_read_shard_by_shard(tmp_path, monkeypatch, write, asked):
    folder = tmp_path / "tiles"
    assert not has_tiles(folder)
    write(folder, monkeypatch)
    expected = [f"s{i:02d}" for i, split in enumerate(SPLITS) if asked is None or (split or "none") in asked]
    assert [row["scene_id"] for row in read_tiles(folder, asked, ["scene_id"])] == expected
    assert has_tiles(folder) and num_shards(folder) == len(SPLITS) // SHARD + 1
    shards = [read_shard(folder, i, ["scene_id", "split"], asked).to_pylist() for i in range(num_shards(folder))]
    assert [row["scene_id"] for shard in shards for row in shard] == expected
    assert shard_counts(folder, asked).tolist() == [len(shard) for shard in shards]


@pytest.mark.parametrize("write", [new, old(TILES_OF_FORMAT_6)], ids=["new", "6"])
def test_rows_come_back_as_they_were(tmp_path, monkeypatch, write):
    write(tmp_path / "tiles", monkeypatch)
    expected = pa.Table.from_pylist(made_rows(), TILES).to_pylist()
    assert read_tiles(tmp_path / "tiles") == expected


def test_files_are_of_bounded_size_and_opened_only_where_they_hold_what_is_asked_for(tmp_path, monkeypatch):
    new(tmp_path, monkeypatch)
    files = sorted((tmp_path / "table").iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == [6, 6, 6, 4]
    assert Counter(row["split"] for row in read_tiles(tmp_path))[None] == 9
    files[0].unlink()
    assert [row["scene_id"] for row in iterate_tiles(tmp_path, ["test"])] == ["s17", "s19"]
    with pytest.raises(StoreError, match=r"000000\.parquet is missing: run the step that makes it first"):
        read_tiles(tmp_path, ["train_1"])


def test_a_table_without_a_tile_is_one(tmp_path):
    write_tiles(tmp_path, iter(()))
    assert has_tiles(tmp_path) and read_tiles(tmp_path) == [] and num_shards(tmp_path) == 0
    assert shard_counts(tmp_path, ["test"]).tolist() == []


def test_what_a_killed_run_left_is_no_part_of_the_table(tmp_path, monkeypatch):
    old(TILES_OF_FORMAT_6)(tmp_path / "tiles", None)
    new(tmp_path / "tiles", monkeypatch)
    write_tiles(tmp_path / "tiles", iter(made_rows()[:7]), SHARD)
    assert len(read_tiles(tmp_path / "tiles")) == 7 == pq.read_table(tmp_path / "tiles" / "table").num_rows
    assert read_shard(tmp_path / "tiles", 2, ["scene_id"], None)["scene_id"].to_pylist() == ["s06"]
