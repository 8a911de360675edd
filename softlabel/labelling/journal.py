"""Which tile killed its process: a note of the tiles in hand, on disk or in a bucket, where it outlives the process.

Each shard has a file for each stage, from before its tiles are touched until they are done. If it still has tiles in
hand when another process takes the shard, the process that noted them has died. The shard is then taken tile by tile.
One death may be chance (a machine reclaimed, a worker killed from outside); a tile that was alone in hand at several
deaths is taken for the cause, and is left out with that reason.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from softlabel.storage import remove_tree
from softlabel.store import commit

FOLDER = "journal"
MAX_DEATHS = 3
READING, LABELLING = "reading", "labelling"


class Journal:
    """The notes of one stage, ``reading`` or ``labelling``, on one shard of a store."""

    def __init__(self, store: Path, shard: int, stage: str) -> None:
        self._path = store / FOLDER / f"{shard:06d}.{stage}.json"
        self._stage = stage
        self._deaths = _notes(self._path)

    @property
    def has_suspects(self) -> bool:
        """Whether a process died with tiles of this shard in hand."""
        return bool(self._deaths)

    def groups(self, tile_ids: Sequence[str]) -> list[list[int]]:
        """Indices of the tiles to take together: all of them, or each alone once a process has died on one of them."""
        if {tile_id for note in self._deaths for tile_id in note["tiles"]}.isdisjoint(tile_ids):
            return [list(range(len(tile_ids)))]
        return [[index] for index in range(len(tile_ids))]

    def verdict(self, tile_id: str) -> str:
        """The reason to leave a tile out, empty if there is none."""
        deaths = Counter(note["tiles"][0] for note in self._deaths if note["alone"])[tile_id]
        if deaths < MAX_DEATHS:
            return ""
        return f"{self._stage} it killed the process {deaths} times (a crash in native code, or out of memory)"

    @contextmanager
    def in_hand(self, tile_ids: Sequence[str]) -> Iterator[None]:
        """Note that these tiles are being worked on and, afterwards, however that ended, that the process survived."""
        if not tile_ids:
            yield
            return
        # The only tile of its shard may share the process with tiles of another shard, until its own has suspects.
        alone = self.has_suspects and len(tile_ids) == 1
        try:
            self._write({"tiles": list(tile_ids), "alone": alone, "at": time.time()})
            yield
        finally:
            if self._deaths:
                self._write(None)
            else:
                self._path.unlink(missing_ok=True)

    def _write(self, note: dict[str, Any] | None) -> None:
        text = json.dumps({"deaths": self._deaths, "in_hand": note})
        commit(self._path, lambda path: path.write_text(text), sync=False)


def forget_all(store: Path) -> None:
    """Remove the notes of a finished store."""
    remove_tree(store / FOLDER)


def deaths(store: Path) -> int:
    """How many processes died, or still live, with tiles of this store in hand: only a new maximum is progress."""
    return sum(len(_notes(path)) for path in _paths(store))


def in_hand(store: Path) -> list[tuple[str, str, float]]:
    """What is being worked on now: stage, first tile, seconds since."""
    found = [(path.name.split(".")[1], _read(path)["in_hand"]) for path in _paths(store)]
    now, notes = time.time(), [(note["at"], stage, note["tiles"][0]) for stage, note in found if note]
    return [(stage, tile_id, now - at) for at, stage, tile_id in sorted(notes)]


def _paths(store: Path) -> list[Path]:
    return list((store / FOLDER).glob("*.json"))  # not the folders that earlier versions kept here


def _notes(path: Path) -> list[dict[str, Any]]:
    """The notes that are left on a shard when another process takes it."""
    read = _read(path)
    return [*read["deaths"], *([read["in_hand"]] if read["in_hand"] else [])]


def _read(path: Path) -> dict[str, Any]:
    """What a file says; it may be empty if its machine lost power."""
    with suppress(FileNotFoundError, ValueError):
        return dict(json.loads(path.read_text()))
    return {"deaths": [], "in_hand": None}
