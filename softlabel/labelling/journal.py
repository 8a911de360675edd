"""Which tile killed its process: a note while tiles are in hand, on disk or in a bucket, where it outlives the process.

A note is a file, in a folder for each shard and stage, from before its tiles are touched until after that. One that
stays is of a process that died. Their shard is then taken tile by tile. One death may be chance (a machine
reclaimed, a worker killed from outside); a tile that was then alone in hand at several deaths is taken for the cause,
and is left out with that reason.
"""

import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from softlabel.storage import remove_tree

FOLDER = "journal"
MAX_DEATHS = 3
READING, LABELLING = "reading", "labelling"


class Journal:
    """The notes of one stage, ``reading`` or ``labelling``, on one shard of a store."""

    def __init__(self, store: Path, shard: int, stage: str) -> None:
        self._folder = _folder(store, shard, stage)
        self._stage = stage
        deaths = _notes(self._folder)
        self._suspects = {tile_id for note in deaths for tile_id in note["tiles"]}
        self._deaths = Counter(note["tiles"][0] for note in deaths if note["alone"])

    @property
    def has_suspects(self) -> bool:
        """Whether a process died with tiles of this shard in hand."""
        return bool(self._suspects)

    def groups(self, tile_ids: Sequence[str]) -> list[list[int]]:
        """Indices of the tiles to take at once: all of them, or each alone once a process died on one of them."""
        if self._suspects.isdisjoint(tile_ids):
            return [list(range(len(tile_ids)))]
        return [[index] for index in range(len(tile_ids))]

    def verdict(self, tile_id: str) -> str:
        """The reason to leave a tile out, or nothing."""
        deaths = self._deaths[tile_id]
        if deaths < MAX_DEATHS:
            return ""
        return f"{self._stage} it killed the process {deaths} times (a crash in native code, or out of memory)"

    @contextmanager
    def in_hand(self, tile_ids: Sequence[str]) -> Iterator[None]:
        """Note that these tiles are being worked on, and afterwards, however that ended, that the process lives."""
        if not tile_ids:
            yield
            return
        # The only tile of its shard may have others beside it, of another shard, until that has suspects.
        alone = self.has_suspects and len(tile_ids) == 1
        note = self._folder / f"{uuid.uuid4().hex}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            note.write_text(json.dumps({"tiles": list(tile_ids), "alone": alone, "at": time.time()}))
            yield
        finally:
            note.unlink(missing_ok=True)


def forget(store: Path, shard: int) -> None:
    """A shard is committed: nothing of it is in hand any more."""
    for stage in (READING, LABELLING):
        remove_tree(_folder(store, shard, stage))


def forget_all(store: Path) -> None:
    """A store is finished."""
    remove_tree(store / FOLDER)


def deaths(store: Path) -> int:
    """How many processes have died with tiles of this store in hand: whether a crash led any further."""
    return sum(len(_notes(folder)) for folder in _listed(store / FOLDER))


def in_hand(store: Path) -> list[tuple[str, str, float]]:
    """What is being worked on now: stage, first tile, seconds since."""
    found = [
        (note["at"], folder.name.partition(".")[2], note["tiles"][0])
        for folder in _listed(store / FOLDER)
        for note in _notes(folder)
    ]
    return [(stage, tile_id, time.time() - at) for at, stage, tile_id in sorted(found)]


def _folder(store: Path, shard: int, stage: str) -> Path:
    return store / FOLDER / f"{shard:06d}.{stage}"


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # the latter: notes as they were, whose run may go on
        return []


def _notes(folder: Path) -> list[dict[str, Any]]:
    """The notes of a shard. (Of a machine that lost its power one may be empty.)"""
    notes = []
    for path in _listed(folder):
        with suppress(FileNotFoundError, ValueError):
            notes.append(json.loads(path.read_text()))
    return notes
