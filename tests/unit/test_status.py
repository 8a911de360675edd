"""How far a run is, by what lies in its folder; runs that live and die are looked at in integration/test_faults.py."""

import os
import re
from functools import partial

import pytest
import torch
from conftest import tiny_recipe
from made_stores import detections, made_tile, write_store, write_tiles

from softlabel import status as module
from softlabel.cli import main
from softlabel.errors import StoreError
from softlabel.imagery.run import tile
from softlabel.lease import Lease, holders
from softlabel.shards import shard_file, shard_files
from softlabel.status import status
from softlabel.store import DONE, finish, write_json
from softlabel.training.targets import STATE

BEGAN = 1_000_000
FOUND = detections((0, 0, 9, 9, 0, 0.9))


def line(run_dir, step):
    """What is said of a step, its spaces as one."""
    (found,) = [one for one in status(run_dir).splitlines() if one.startswith(f"{step} ")]
    return " ".join(found.split()[1:])


def made(count):
    return [
        made_tile("a.tif", (64 * i, 0, 64, 64), FOUND, reason="cannot be read" if i == 1 else None)
        for i in range(count)
    ]


@pytest.fixture
def half_labelled(tmp_path):
    """Ten tiles in five shards, of which three are there, two seconds apart."""
    tiles = write_tiles(tmp_path, made(10), shard_tiles=2)
    finish(tiles, {"tiles": 10, "scenes": 1, "scenes_rejected": 0, "truth_rejected": 0})
    folder = write_store(tmp_path, made(10), shard_tiles=2)
    (folder / DONE).unlink()
    for shard in range(5):
        os.utime(shard_file(folder, shard), (BEGAN + 2 * shard,) * 2)
    for shard in (3, 4):
        shard_file(folder, shard).unlink()
    return folder


def test_tiles_that_are_cut(tmp_path):
    folder = tile(tiny_recipe(), tmp_path)
    told = line(tmp_path, folder.name)
    assert told.startswith("done: 80 tiles of 20 scenes, 0 scenes and 0 truth rows rejected ")
    assert told.endswith(" ago")


@pytest.fixture
def just_now(monkeypatch):
    """The time is a second after the last shard's."""
    monkeypatch.setattr(module.time, "time", lambda: BEGAN + 5.0)


def test_labelling_that_is_half_done(half_labelled, just_now):
    told = line(half_labelled.parent, half_labelled.name)
    assert told.startswith("6 of 10 tiles (60%), 1 rejected 1.0 tiles/s 4.0 s 1.0 s ago")


def test_of_many_shards_the_last_are_looked_at_for_rejected_tiles(half_labelled, monkeypatch):
    monkeypatch.setattr(module, "_LOOKED_AT", 2)
    assert "6 of 10 tiles (60%), 0 rejected in the last 2 shards" in line(half_labelled.parent, half_labelled.name)


def test_speed_is_of_late(half_labelled, just_now, monkeypatch):
    """Not of the time before somebody stopped it for a day."""
    os.utime(shard_file(half_labelled, 0), (BEGAN - 86_400,) * 2)
    assert "rejected 1.0 tiles/s" in line(half_labelled.parent, half_labelled.name)
    monkeypatch.setattr(module, "_RATE_S", 1e6)
    assert "rejected 0.0 tiles/s" in line(half_labelled.parent, half_labelled.name)


def test_what_a_run_left_long_ago_has_no_speed(half_labelled):
    assert re.search(r"1 rejected \d+ h \d\d min ago$", line(half_labelled.parent, half_labelled.name))


def test_a_shard_that_is_packed_while_it_is_looked_at(half_labelled, monkeypatch):
    gone = shard_file(half_labelled, 1)
    monkeypatch.setattr(module, "shard_files", lambda folder: {**shard_files(folder), 1: gone})
    gone.unlink()
    assert "4 of 10 tiles (40%), 1 rejected" in line(half_labelled.parent, half_labelled.name)


def test_a_store_that_is_packed_or_read_again(half_labelled):
    (half_labelled / "table").mkdir()
    (half_labelled / "table" / "000000.parquet").touch()
    told = "all tiles are there; packing them, or retrying rejected ones "
    assert line(half_labelled.parent, half_labelled.name).startswith(told)


def test_a_store_of_before_format_7(half_labelled):
    for shard in range(3):
        shard_file(half_labelled, shard).rename(half_labelled / f"shard-{shard:06d}.parquet")
    assert "6 of 10 tiles (60%), 1 rejected" in line(half_labelled.parent, half_labelled.name)


def test_a_broken_file_costs_the_line_of_its_step_alone(half_labelled):
    (half_labelled / "store.json").write_text("{")
    told = status(half_labelled.parent)
    assert "store.json cannot be read" in told and "done: 10 tiles of 1 scenes" in told


def test_labels_that_are_done(half_labelled):
    counts = {"labelled": 8, "empty": 1, "rejected": 1, "boxes": 1234}
    finish(half_labelled, {**counts, "speed": {"tiles_per_s": 12.34}})
    told = "done: 8 labelled, 1 empty, 1 rejected, 1,234 boxes 12.3 tiles/s "
    assert line(half_labelled.parent, half_labelled.name).startswith(told)


def test_labelling_that_has_just_begun(tmp_path):
    write_json(tmp_path / "label-labels-1" / "store.json", {"tiles": "tiles-gone"})
    assert line(tmp_path, "label-labels-1").startswith("not finished ")


def test_a_training(tmp_path):
    folder = tmp_path / "train-student-1"
    write_json(folder / "recipe.yaml", {})
    assert line(tmp_path, folder.name).startswith("no epoch done ")
    history = [{"map50": 0.25, "seconds": 90.0}, {"map50": 0.125, "seconds": 120.0}]
    torch.save({"history": history, "epochs": 7, "model": {"w": torch.zeros(9)}}, folder / STATE)
    assert line(tmp_path, folder.name).startswith("epoch 2 of 7, best validation mAP50 0.250 2 min an epoch 10 min ")
    (folder / STATE).unlink()
    finish(folder, {"epochs": 7, "val_map50": 0.5, "seconds": 700})
    assert line(tmp_path, folder.name).startswith("done: 7 epochs, best validation mAP50 0.500 2 min an epoch ")


def test_a_step_that_ends_while_it_is_looked_at(tmp_path, monkeypatch):
    """Its state goes and its summary comes between the two looks."""
    folder = tmp_path / "train-student-1"
    write_json(folder / "recipe.yaml", {})
    (folder / STATE).touch()

    def gone(path, **options):
        path.unlink()
        finish(folder, {"epochs": 7, "val_map50": 0.5, "seconds": 700})
        raise FileNotFoundError(path)

    monkeypatch.setattr(torch, "load", gone)
    assert line(tmp_path, folder.name).startswith("done: 7 epochs")


def test_what_changed_last_is_at_the_bottom(tmp_path):
    for step, when in (("train-b-1", 30), ("label-a-1", 20), ("search-1", 40)):
        write_json(tmp_path / step / "recipe.yaml", {})
        write_json(tmp_path / step / "store.json", {})
        for path in (*(tmp_path / step).iterdir(), tmp_path / step):
            os.utime(path, (BEGAN + when,) * 2)
    told = [one.split()[0] for one in status(tmp_path).splitlines()[1:4]]
    assert told == ["label-a-1", "train-b-1", "search-1"]


def test_a_search(tmp_path):
    folder = tmp_path / "search-1"
    rows = [{"map50": 0.5}, {"map50": 0.25}]
    for number, (state, history) in enumerate([("finished", rows), ("stopped", rows[1:]), ("running", [])]):
        write_json(folder / "trials" / f"{number:03d}.json", {"status": state, "history": history})
    finish(folder, {})  # of before it was gone on with
    told = "3 students: 1 finished, 1 running, 1 stopped; best validation mAP50 0.500 "
    assert line(tmp_path, folder.name).startswith(told)
    write_json(folder / "trials" / "002.json", {"status": "failed", "history": []})
    assert line(tmp_path, folder.name).startswith("done: 3 students: 1 failed, 1 finished, 1 stopped; best ")


def test_who_is_at_it(half_labelled, monkeypatch):
    monkeypatch.setattr(module, "holders", partial(holders, beat_s=0.05, dead_after_s=0.5))
    run_dir = half_labelled.parent
    assert status(run_dir).splitlines()[-1] == "no process holds a lease here"
    with Lease(half_labelled, beat_s=0.05):
        told = status(run_dir).splitlines()[-1]
        assert told.startswith(f"{half_labelled.name}: held by process {os.getpid()} on ") and told.endswith(", alive")
    with Lease(half_labelled, beat_s=600):
        assert "no sign of life" in status(run_dir).splitlines()[-1]


def test_what_is_no_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(StoreError, match="is not a run folder, or nothing has started in it"):
            status(folder)
    assert main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("softlabel status: ")
