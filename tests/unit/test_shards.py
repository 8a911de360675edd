"""The shards of a store: committed one by one, packed into few files, read the same at every stage."""

import errno
from collections import Counter
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_stores import detections, made_tile, write_store, write_tiles

from softlabel import packing, shards, tile_table
from softlabel.errors import StoreError
from softlabel.records import EMPTY
from softlabel.shards import committed, pack, read_shard, read_shards, read_soft_labels, retryable_counts, to_pack
from softlabel.storage import is_remote
from softlabel.store import finish, read_table, write_table

SHARD, FILE = 2, 3
CAR = (1, 1, 9, 9, 0, 0.9)


@pytest.fixture
def made(monkeypatch):
    """21 tiles: the third, fourth and last shard hold none that is asked for, others have a rejected or empty one."""
    monkeypatch.setattr(tile_table, "FILE_SHARDS", FILE)
    rows = []
    for i in range(21):
        split = "train_1" if i in (4, 5, 6, 7, 20) else "test"
        reason, retryable = {2: ("torn", False), 10: (EMPTY, False), 13: ("not there just now", True)}.get(
            i, (None, False)
        )
        found = detections() if reason else detections(*[CAR] * (i % 3))
        rows.append(made_tile(f"s{i:02d}", (0, 0, 64, 64), found, reason=reason, retryable=retryable, split=split))
    return rows


@pytest.fixture
def store(made, anywhere):
    write_tiles(anywhere, made, shard_tiles=SHARD)
    return write_store(anywhere, made, shard_tiles=SHARD, splits=["test"])


def packed(store):
    counts, tiles = Counter(), store.parent / "tiles-made"
    for number, expected in to_pack(tiles, ["test"]):
        counts.update(pack(store, tiles, ["test"], number, expected))
    return counts


def as_one_table(folder):
    """As any reader of Parquet takes it."""
    return pq.read_table(folder.path, filesystem=folder.fs) if is_remote(folder) else pq.read_table(folder)


def rows(store):
    return list(read_soft_labels(store))


def test_a_packed_store_is_the_same_store(store, made):
    before = rows(store)
    (shards.shard_file(store, 0).parent / ".000000.parquet.0123").write_bytes(b"half written when its process died")
    alone = [read_shard(store, i) for i in range(11)]
    assert [tile["tile_id"] for tile, *_ in made if tile["split"] == "test"] == [row["tile_id"] for row in before]
    counts = packed(store)
    files = sorted(path.name for path in (store / "table").iterdir())
    assert files == ["000000.parquet", "000001.parquet", "000002.parquet", "000003.parquet"]
    assert rows(store) == before == as_one_table(store / "table").to_pylist()
    for shard, expected in enumerate(alone):
        found = read_shard(store, shard)
        assert (not found and expected is None) or found.equals(expected)
    assert counts == {
        "labelled": sum(row["status"] == "labelled" for row in before),
        "empty": 1,
        "rejected": 2,
        "retryable": 1,
        "saturated": 0,
        "boxes": sum(len(row["boxes"]) for row in before),
    }
    view = as_one_table(store / "rejected").to_pylist()
    assert [(row["tile_id"][:3], row["scene_uri"], row["retryable"]) for row in view] == [
        ("s02", "/gone/s02", False),
        ("s13", "/gone/s13", True),
    ]
    assert not list(store.glob("shards/*"))


def test_packing_again_changes_nothing(store):
    counts = packed(store)
    before = {path: path.read_bytes() for path in store.glob("**/*.parquet")}
    assert packed(store) == counts
    assert {path: path.read_bytes() for path in store.glob("**/*.parquet")} == before


def test_what_was_killed_between_packing_and_tidying_up_is_read_once_and_packed_again(store):
    before = rows(store)
    kept = {path: path.read_bytes() for path in store.glob("shards/*/*.parquet")}
    packed(store)
    for path, data in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert rows(store) == before
    packed(store)
    assert rows(store) == before and not list(store.glob("shards/*/*"))


def test_a_shard_made_again_goes_before_the_packed_one(store):
    packed(store)
    assert retryable_counts(store) == {6: 1}
    shard = read_shard(store, 6)
    write_table(shards.shard_file(store, 6), shard.slice(0, 1).take([0, 0]))
    assert read_shard(store, 6)["tile_id"].to_pylist() == [shard["tile_id"][0].as_py()] * 2
    assert [row["tile_id"][:3] for row in rows(store)].count("s12") == 2
    write_table(
        shards.shard_file(store, 6), healed := pa.concat_tables([shard.slice(0, 1), read_shard(store, 0).slice(0, 1)])
    )
    assert packed(store)["retryable"] == 0 and retryable_counts(store) == {}
    assert read_shard(store, 6).equals(healed)
    assert len(as_one_table(store / "rejected")) == 1


def test_shards_that_are_there_are_known_at_every_stage(store):
    asked = {0, 1, 4, 5, 6, 7, 8, 9}
    assert committed(store) == asked
    for shard in (1, 8):
        shards.shard_file(store, shard).unlink()
    assert committed(store) == asked - {1, 8}
    tiles = store.parent / "tiles-made"
    numbers = dict(to_pack(tiles, ["test"]))
    pack(store, tiles, ["test"], 3, numbers[3])
    assert committed(store) >= {9} and committed(store) & {1, 8} == set()
    with pytest.raises(StoreError, match=r"does not balance \(shard 1 has 0 of 2 tiles\)"):
        pack(store, tiles, ["test"], 0, numbers[0])
    assert committed(store) >= {0}
    shard = shards.shard_file(store, 4)
    write_table(shard, read_table(shard).slice(1))
    with pytest.raises(StoreError, match=r"does not balance \(shard 4 has 1 of 2 tiles\)"):
        pack(store, tiles, ["test"], 1, numbers[1])


def test_a_store_of_an_older_format_is_read_as_it_is_and_packed_if_it_was_unfinished(store):
    before = rows(store)
    for path in sorted(store.glob("shards/*/*")):
        path.rename(store / f"shard-{path.name}")
    assert rows(store) == before and 4 in committed(store)
    old = store / "shard-000004.parquet"
    write_table(old, read_table(old).drop_columns(["agreement"]))
    packed(store)
    assert rows(store) == before and not list(store.glob("shard-*"))


def test_a_broken_file_is_named_in_one_line(store):
    packed(store)
    path = store / "table" / "000002.parquet"
    whole = path.read_bytes()
    for broken in (b"PAR1", whole[:40] + bytes(40) + whole[80:]):
        path.write_bytes(broken)
        with pytest.raises(StoreError, match=r"000002\.parquet cannot be read"):
            list(read_shards(store))


def test_a_store_that_is_not_finished_is_not_read(made, anywhere):
    finish(anywhere / "x", {})
    assert rows(anywhere / "x") == []
    with pytest.raises(StoreError, match=r"done\.json is missing"):
        rows(anywhere / "y")
    assert np.array_equal(
        tile_table.shard_counts(write_tiles(anywhere, made, shard_tiles=SHARD), ["none"]), np.zeros(11)
    )


def test_a_full_disk_while_packing_is_a_line(store, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(packing, "pack", mock.Mock(side_effect=full))
    said = packing._pack(store, store.parent / "tiles-made", ("test",), 0, {})
    assert said == f"no space left on the disk of {store}: free some and run the same again"
    monkeypatch.setattr(packing.ray, "get", lambda refs: [said])
    with pytest.raises(StoreError, match="no space left"):
        packing._told([])
