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
from softlabel.labelling.journal import READING, Journal
from softlabel.storage import location

tiles, store, deadly = sys.argv[3:], location(sys.argv[1]), sys.argv[2]
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


def test_a_deadly_tile_is_found_and_left_out(anywhere):
    for _ in range(1 + MAX_DEATHS):  # once among the others, then alone
        assert work(anywhere, "c").returncode != 0
    found = work(anywhere, "c")
    assert found.returncode == 0
    assert found.stdout.splitlines() == [
        "c reading it killed the process 3 times (a crash in native code, or out of memory)",
        "done",
    ]
    assert journal.deaths(anywhere) == 1 + MAX_DEATHS


def test_the_only_tile_of_a_shard_is_not_alone_before_its_shard_is(anywhere):
    for _ in range(MAX_DEATHS):  # the first may be another's, of a shard that was in the model beside it
        assert work(anywhere, "c", ["c"]).returncode != 0
    assert not Journal(anywhere, 7, READING).verdict("c")
    assert work(anywhere, "c", ["c"]).returncode != 0
    assert "3 times" in Journal(anywhere, 7, READING).verdict("c")


def test_a_chance_death_costs_no_tile(anywhere):
    assert work(anywhere, "b").returncode != 0
    assert Journal(anywhere, 7, READING).groups(TILES) == [[0], [1], [2], [3]]
    assert work(anywhere, "none").stdout.splitlines() == ["done"]
    assert not any(Journal(anywhere, 7, READING).verdict(tile) for tile in TILES)


def test_stages_and_shards_have_notes_of_their_own(anywhere):
    assert work(anywhere, "c").returncode != 0
    assert (
        Journal(anywhere, 7, LABELLING).groups(TILES) == Journal(anywhere, 8, READING).groups(TILES) == [[0, 1, 2, 3]]
    )


def test_an_error_that_the_process_survives_is_no_death(anywhere):
    with pytest.raises(ValueError), Journal(anywhere, 7, READING).in_hand(TILES):
        raise ValueError
    assert journal.deaths(anywhere) == 0


def test_what_is_in_hand_can_be_asked(anywhere):
    with Journal(anywhere, 7, READING).in_hand(TILES), Journal(anywhere, 8, LABELLING).in_hand(["x"]):
        assert [found[:2] for found in journal.in_hand(anywhere)] == [(READING, "a"), (LABELLING, "x")]
    assert journal.in_hand(anywhere) == []


def test_who_died_is_known_until_the_store_is_finished(anywhere):
    assert work(anywhere, "c").returncode != 0
    assert work(anywhere, "none").returncode == 0
    assert journal.deaths(anywhere) == 1
    assert not journal.in_hand(anywhere)
    journal.forget_all(anywhere)
    assert not (anywhere / journal.FOLDER).exists()


def test_half_a_note_is_none(anywhere):
    """As of a machine that lost its power while it wrote: before it touched a tile."""
    with Journal(anywhere, 7, READING).in_hand(["a"]):
        (path,) = (anywhere / journal.FOLDER).iterdir()
        path.write_text(path.read_text()[:-1])
        assert journal.deaths(anywhere) == 0
