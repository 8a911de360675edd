"""Which tile killed its process: judged by what the notes of real, really killed processes leave behind."""

import subprocess
import sys

import pytest

from softlabel.labelling import journal
from softlabel.labelling.journal import LABELLING, MAX_DEATHS, READING, Journal

TILES = ["a", "b", "c", "d"]

# Takes the tiles of shard 7 as a stage does, and dies on one.
WORK = """
import os, sys
from pathlib import Path
from softlabel.labelling.journal import READING, Journal

tiles, store, deadly = sys.argv[3:], Path(sys.argv[1]), sys.argv[2]
notes = Journal(store, 7, READING)
for group in notes.groups(tiles):
    verdicts = [notes.verdict(tiles[i]) for i in group]
    if len(group) == 1 and verdicts[0]:
        print(tiles[group[0]], verdicts[0])
        continue
    with notes.in_hand([tiles[i] for i in group]):
        for i in group:
            if tiles[i] == deadly:
                os.abort()
print("done")
"""


def work(store, deadly, tiles=TILES):
    return subprocess.run([sys.executable, "-c", WORK, str(store), deadly, *tiles], capture_output=True, text=True)


def test_a_deadly_tile_is_found_and_left_out(tmp_path):
    for _ in range(1 + MAX_DEATHS):  # once among the others, then alone
        assert work(tmp_path, "c").returncode != 0
    found = work(tmp_path, "c")
    assert found.returncode == 0
    assert found.stdout.splitlines() == [
        "c reading it killed the process 3 times (a crash in native code, or out of memory)",
        "done",
    ]
    assert journal.deaths(tmp_path) == 1 + MAX_DEATHS


def test_the_only_tile_of_a_shard_is_not_alone_before_its_shard_is(tmp_path):
    for _ in range(MAX_DEATHS):  # the first may be another's, of a shard that was in the model beside it
        assert work(tmp_path, "c", ["c"]).returncode != 0
    assert not Journal(tmp_path, 7, READING).verdict("c")
    assert work(tmp_path, "c", ["c"]).returncode != 0
    assert "3 times" in Journal(tmp_path, 7, READING).verdict("c")


def test_a_chance_death_costs_no_tile(tmp_path):
    assert work(tmp_path, "b").returncode != 0
    assert Journal(tmp_path, 7, READING).groups(TILES) == [[0], [1], [2], [3]]
    assert work(tmp_path, "none").stdout.splitlines() == ["done"]
    assert not any(Journal(tmp_path, 7, READING).verdict(tile) for tile in TILES)


def test_stages_and_shards_have_notes_of_their_own(tmp_path):
    assert work(tmp_path, "c").returncode != 0
    assert (
        Journal(tmp_path, 7, LABELLING).groups(TILES) == Journal(tmp_path, 8, READING).groups(TILES) == [[0, 1, 2, 3]]
    )


def test_an_error_that_the_process_survives_is_no_death(tmp_path):
    with pytest.raises(ValueError), Journal(tmp_path, 7, READING).in_hand(TILES):
        raise ValueError
    assert journal.deaths(tmp_path) == 0


def test_what_is_in_hand_can_be_asked(tmp_path):
    with Journal(tmp_path, 7, READING).in_hand(TILES), Journal(tmp_path, 8, LABELLING).in_hand(["x"]):
        assert [found[:2] for found in journal.in_hand(tmp_path)] == [(READING, "a"), (LABELLING, "x")]
    assert journal.in_hand(tmp_path) == []


def test_a_commit_ends_the_notes(tmp_path):
    assert work(tmp_path, "c").returncode != 0
    journal.forget(tmp_path, 7)
    assert journal.deaths(tmp_path) == 0
    journal.forget_all(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_torn_line_is_not_taken_for_a_note(tmp_path):
    with Journal(tmp_path, 7, READING).in_hand(["a"]):
        pass
    (path,) = (tmp_path / journal.FOLDER).iterdir()
    with open(path, "a") as file:
        file.write('{"begin": ["b"')
    assert journal.deaths(tmp_path) == 0
