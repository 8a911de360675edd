"""Which tile killed its process: a note before tiles are touched and one after, on disk, where it outlives the process.

Tiles whose note has no end were in hand when their process died. Their shard is then taken tile by tile. One death may
be chance (a machine reclaimed, a worker killed from outside); a tile that was then alone in hand at several deaths is
taken for the cause, and is left out with that reason.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FOLDER = "journal"
MAX_DEATHS = 3
READING, LABELLING = "reading", "labelling"


class Journal:
    """The notes of one stage, ``reading`` or ``labelling``, on one shard of a store."""

    def __init__(self, store: Path, shard: int, stage: str) -> None:
        self._path = store / FOLDER / f"shard-{shard:06d}.{stage}.jsonl"
        self._stage = stage
        deaths = list(_unended(self._path))
        self._suspects = {tile_id for note in deaths for tile_id in note["begin"]}
        self._deaths = Counter(note["begin"][0] for note in deaths if note.get("alone"))

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
        # The only tile of its shard may have others beside it, of another shard, until that has suspects.
        alone = self.has_suspects and len(tile_ids) == 1
        self._note({"begin": list(tile_ids), "alone": alone, "at": time.time()})
        try:
            yield
        finally:
            self._note({"end": len(tile_ids)})

    def _note(self, note: dict) -> None:
        # One write of one line to a file opened for appending: whole or not there, whichever process wrote it.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, json.dumps(note).encode() + b"\n")
        finally:
            os.close(file)


def forget(store: Path, shard: int) -> None:
    """A shard is committed: nothing of it is in hand any more."""
    for stage in (READING, LABELLING):
        (store / FOLDER / f"shard-{shard:06d}.{stage}.jsonl").unlink(missing_ok=True)


def forget_all(store: Path) -> None:
    """A store is finished."""
    for path in (store / FOLDER).glob("*.jsonl"):
        path.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        (store / FOLDER).rmdir()


def deaths(store: Path) -> int:
    """How many processes have died with tiles of this store in hand: whether a crash led any further."""
    return sum(1 for path in (store / FOLDER).glob("*.jsonl") for _ in _unended(path))


def in_hand(store: Path) -> list[tuple[str, str, float]]:
    """What is being worked on now: stage, first tile, seconds since."""
    found = []
    for path in sorted((store / FOLDER).glob("*.jsonl")):
        notes = _notes(path)
        if notes and "begin" in (last := notes[-1]):
            found.append((path.suffixes[0].removeprefix("."), last["begin"][0], time.time() - last["at"]))
    return found


def _unended(path: Path) -> Iterator[dict[str, Any]]:
    begun: dict[str, Any] | None = None
    for note in _notes(path):
        if begun is not None and "begin" in note:
            yield begun
        begun = note if "begin" in note else None
    if begun is not None:
        yield begun


def _notes(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    notes = []
    for line in lines:
        with suppress(ValueError):  # a machine that lost its power in the middle of a line
            notes.append(json.loads(line))
    return notes
