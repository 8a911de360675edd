"""Files that appear whole or not at all, and folders named by what determines them."""

from pathlib import Path

import pyarrow as pa
import pytest
from made_stores import made_tile, write_tiles

from softlabel.errors import StoreError
from softlabel.shards import read_soft_labels, shard_file
from softlabel.store import (
    commit,
    digest,
    finish,
    is_done,
    read_json,
    read_table,
    step_dir,
    summary,
    write_json,
    write_table,
)
from softlabel.tile_table import read_shard, read_tiles


def test_a_digest_ignores_key_order_and_nothing_else():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert len({digest(value) for value in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"b": 1}, [1, 2], [2, 1])}) == 6


def test_a_step_s_folder_changes_with_its_inputs_only(anywhere):
    assert step_dir(anywhere, "tiles", {"size": 3}) == step_dir(anywhere, "tiles", {"size": 3})
    assert step_dir(anywhere, "tiles", {"size": 3}) != step_dir(anywhere, "tiles", {"size": 4})


def test_a_step_s_folder_keeps_its_name_from_release_to_release():
    # Runs of earlier releases go on where they were: change this only with _HASHED_VERSION, and say so in CHANGELOG.
    assert step_dir(Path("r"), "label", {"a": 1}) == Path("r/label-d70c65b3dd")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(anywhere):
    path = anywhere / "deep" / "file.txt"
    commit(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        commit(path, half)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_nan_is_null(anywhere):
    write_json(anywhere / "x.json", {"a": float("nan"), "b": [float("nan"), 1]})
    assert read_json(anywhere / "x.json") == {"a": None, "b": [None, 1]}


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_missing_and_broken_files_are_named(anywhere, content):
    path = anywhere / "x"
    if content is not None:
        path.write_bytes(content)
    for read in (read_json, read_table):
        with pytest.raises(StoreError, match=str(path)):
            read(path)


def test_a_step_is_done_once_it_says_so(anywhere):
    folder = anywhere / "step"
    write_table(shard_file(folder, 0), pa.table({"a": [1]}))
    assert not is_done(folder)
    with pytest.raises(StoreError, match=r"done\.json is missing"):
        list(read_soft_labels(folder))
    finish(folder, {"rows": 1})
    assert is_done(folder) and summary(folder)["rows"] == 1
    assert list(read_soft_labels(folder)) == [{"a": 1}]


def test_a_newer_format_is_refused(anywhere):
    write_json(anywhere / "done.json", {"format_version": 99})
    with pytest.raises(StoreError, match="format_version 99"):
        summary(anywhere)


def test_tiles_in_no_split_have_a_name(anywhere):
    splits = ["train_1", None, "test", None]
    tiles = write_tiles(anywhere, [made_tile(f"s{i}", (0, 0, 64, 64), split=one) for i, one in enumerate(splits)])
    for asked, expected in ((None, "0123"), (["none"], "13"), (["none", "test"], "123"), (["train_1"], "0")):
        found = [row["scene_id"] for row in read_tiles(tiles, asked)]
        assert found == [f"s{i}" for i in expected]
        assert read_shard(tiles, 0, ["scene_id"], asked)["scene_id"].to_pylist() == found
