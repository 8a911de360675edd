"""One driver per store: a lease with a heartbeat, in a file, since a folder is all that two drivers share.

The holder counts up a number in the file every few seconds. A driver that finds a lease watches it: if the number
changes, its holder is alive, and the newcomer is refused; if it stands still for long enough, its holder is dead, and
the lease is taken over. The clocks of two machines are never compared. In a bucket, every write is on condition that
the lease is still the one that was read.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from softlabel.errors import StorageError, StoreError
from softlabel.storage import create, is_remote, patiently, read_tagged, replace
from softlabel.store import write_text

LEASE = "lease.json"
BEAT_S = 2.0
DEAD_AFTER_S = 20.0  # ten beats: a busy disk or a paused machine is not death
_KEYS = ("id", "host", "pid", "space", "beat")


def holders(
    folders: Iterable[Path], *, beat_s: float = BEAT_S, dead_after_s: float = DEAD_AFTER_S
) -> dict[Path, tuple[str, bool]]:
    """Who holds each folder that is held, and whether it still beats; to be sure that it does not takes a while."""
    first = {folder: lease for folder in folders if (lease := _read(folder / LEASE))}
    now = dict[Path, dict | None](first)
    deadline = time.monotonic() + dead_after_s
    while any(lease == first[folder] for folder, lease in now.items()) and time.monotonic() < deadline:
        time.sleep(beat_s / 4)
        now = {folder: _read(folder / LEASE) for folder in first}
    return {folder: (_who(lease), lease != first[folder]) for folder, lease in now.items() if lease}


class Lease:
    """Held while the ``with`` block runs.

    Raises:
        StoreError: On entry, another driver holds it.
    """

    def __init__(self, folder: Path, *, beat_s: float = BEAT_S, dead_after_s: float = DEAD_AFTER_S) -> None:
        self._path = folder / LEASE
        self._beat_s, self._dead_after_s = beat_s, dead_after_s
        self._owner = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "space": _pid_space()}
        self._ended = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._keep, name="softlabel-lease", daemon=True)

    def __enter__(self) -> "Lease":
        while not (self._create() or self._inherit()):
            pass
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError, StorageError):  # a network share that is gone: the next run finds a dead lease
            if self._is_ours(_read(self._path)):
                self._path.unlink(missing_ok=True)

    @property
    def is_held(self) -> bool:
        """Whether no other driver has taken the lease over, as may happen after a long pause of this machine."""
        return self._lost is None

    def check(self) -> None:
        """Raise StoreError once another driver has taken it over."""
        if not self.is_held:
            raise StoreError(f"{self._path.parent} was taken over by {self._lost}: this run stops")

    def _create(self) -> bool:
        """Create the lease if there is none; return whether it was created."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return bool(patiently(lambda: create(self._path, self._text(0).encode())))

    def _inherit(self) -> bool:
        """Wait until the existing lease is gone, or its holder is known to be dead; return whether it is ours now.
        Refuse if it beats."""
        first = patiently(lambda: _read(self._path))
        if self._is_ours(first):  # it was written, but the answer was lost
            return True
        if first is not None and self._died_here(first):
            return self._take_over(first)
        still_s, looked = 0.0, time.monotonic()
        while first is not None:
            time.sleep(self._beat_s / 4)
            now = patiently(lambda: _read(self._path))
            if now is None or now["id"] != first["id"]:
                return False
            if now["beat"] != first["beat"]:
                raise StoreError(
                    f"{self._path.parent} is being written by {_who(now)}: wait for it or stop it, then run this again"
                )
            # A slow answer counts for no more than a quick one: the holder may have been held up as well.
            still_s, looked = still_s + min(time.monotonic() - looked, self._beat_s), time.monotonic()
            if still_s > self._dead_after_s:
                return self._take_over(first)
        return False

    def _is_ours(self, lease: dict | None) -> bool:
        return lease is not None and lease["id"] == self._owner["id"]

    def _died_here(self, lease: dict) -> bool:
        """Whether the holder was a process of this machine that no longer exists."""
        if (lease["host"], lease["space"]) != (self._owner["host"], self._owner["space"]):
            return False
        try:
            os.kill(lease["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def _take_over(self, dead: dict) -> bool:
        """In a bucket, replace the dead lease if it is still the same, and say whether it was; on a disk, remove it."""
        if not is_remote(self._path):
            self._remove(dead)
            return False
        found, tag = patiently(lambda: _tagged(self._path))
        return found == dead and bool(patiently(lambda: replace(self._path, self._text(0).encode(), tag)))

    def _remove(self, dead: dict) -> None:
        """Remove the dead lease if it is still the same; newcomers take turns at checking and removing."""
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks: a turn is very short, and a holder notices a thief
                fcntl.flock(folder, fcntl.LOCK_EX)
            if _read(self._path) == dead:
                self._path.unlink()
        finally:
            os.close(folder)

    def _keep(self) -> None:
        beat = 0
        while not self._ended.wait(self._beat_s):
            try:
                found, tag = _tagged(self._path)
                if found is not None and not self._is_ours(found):
                    self._lost = _who(found)
                    return
                beat += 1
                if not is_remote(self._path):
                    write_text(self._path, self._text(beat))
                elif found is None:
                    create(self._path, self._text(beat).encode())
                else:
                    replace(self._path, self._text(beat).encode(), tag)
            except Exception:  # noqa: BLE001  whatever it is, a thread that ends would leave two holders
                continue  # a full disk ends the run where rows are written, with its own message; a share may come back

    def _text(self, beat: int) -> str:
        return json.dumps({**self._owner, "beat": beat})


def _pid_space() -> str | None:
    """The namespace of process ids, since machines and containers may share a host name; None where it is not known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _read(path: Path) -> dict | None:
    return _tagged(path)[0]


def _tagged(path: Path) -> tuple[dict | None, Any]:
    try:
        data, tag = read_tagged(path)
    except FileNotFoundError:
        return None, None
    return _parse(data), tag


def _parse(text: bytes) -> dict:
    """Parse a lease. An invalid one, as when its holder died before writing anything, counts as standing still."""
    try:
        found = json.loads(text)
        return {key: found.get(key) for key in _KEYS}
    except (ValueError, AttributeError):
        return dict.fromkeys(_KEYS)


def _who(lease: dict) -> str:
    return f"process {lease['pid']} on {lease['host']}"
