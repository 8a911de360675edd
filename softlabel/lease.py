"""One driver per store: a lease with a heartbeat, in a file, since a shared folder is all that two drivers share.

The holder counts up a number in the file every few seconds. Who finds a lease watches it: a number that moves belongs
to a living driver, and the newcomer is refused; one that stands still for longer belongs to a dead one, and is taken
over. Nothing compares the clocks of two machines.
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

from softlabel.errors import StoreError
from softlabel.store import write_text

LEASE = "lease.json"
BEAT_S = 2.0
DEAD_AFTER_S = 20.0  # ten beats: a busy disk or a paused machine is not death
_KEYS = ("id", "host", "pid", "space", "beat")


def holders(
    folders: Iterable[Path], *, beat_s: float = BEAT_S, dead_after_s: float = DEAD_AFTER_S
) -> dict[Path, tuple[str, bool]]:
    """Who holds those of the folders that are held, and whether its heart beats: of a dead one that takes a while."""
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
        while not self._create():
            self._wait_for_death()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError):  # a share that is gone: the next run finds a dead one's lease
            found = _read(self._path)
            if found is not None and found["id"] == self._owner["id"]:
                self._path.unlink(missing_ok=True)

    @property
    def is_held(self) -> bool:
        """Whether no other driver has taken the lease over, as after a long pause of this machine."""
        return self._lost is None

    def check(self) -> None:
        """Raise StoreError once another driver has."""
        if not self.is_held:
            raise StoreError(f"{self._path.parent} was taken over by {self._lost}: this run stops")

    def _create(self) -> bool:
        """Whether there was no lease, and now there is ours."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return _write_new(self._path, self._text(0))

    def _wait_for_death(self) -> None:
        """Return once the lease that is there is gone or removed as a dead one's; refuse when it beats."""
        first = _read(self._path)
        if first is not None and self._died_here(first):
            self._remove(first)
            return
        deadline = time.monotonic() + self._dead_after_s
        while first is not None:
            time.sleep(self._beat_s / 4)
            now = _read(self._path)
            if now is None or now["id"] != first["id"]:
                return
            if now["beat"] != first["beat"]:
                raise StoreError(
                    f"{self._path.parent} is being written by {_who(now)}: wait for it or stop it, then run this again"
                )
            if time.monotonic() > deadline:
                self._remove(first)
                return

    def _died_here(self, lease: dict) -> bool:
        """Whether the holder was a process of this machine that is no more."""
        if (lease["host"], lease["space"]) != (self._owner["host"], self._owner["space"]):
            return False
        try:
            os.kill(lease["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def _remove(self, dead: dict) -> None:
        """Remove the dead lease, if it is still that one: newcomers take turns from looking to removing."""
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks: the turn is a blink, and a holder notices a thief
                fcntl.flock(folder, fcntl.LOCK_EX)
            if _read(self._path) == dead:
                self._path.unlink()
        finally:
            os.close(folder)

    def _keep(self) -> None:
        beat = 0
        while not self._ended.wait(self._beat_s):
            try:
                found = _read(self._path)
                if found is not None and found["id"] != self._owner["id"]:
                    self._lost = _who(found)
                    return
                beat += 1
                write_text(self._path, self._text(beat))
            except OSError:
                continue  # a full disk ends the run where rows are written, in its own words; a share may come back

    def _text(self, beat: int) -> str:
        return json.dumps({**self._owner, "beat": beat})


def _pid_space() -> str | None:
    """What process numbers count in: two containers may have one host name. None where there are no such spaces."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _write_new(path: Path, text: str) -> bool:
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> dict | None:
    try:
        return _parse(path.read_text())
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict:
    """A lease. What is none, as one whose holder died before it wrote anything, is one that stands still."""
    try:
        found = json.loads(text)
        return {key: found.get(key) for key in _KEYS}
    except (ValueError, AttributeError):
        return dict.fromkeys(_KEYS)


def _who(lease: dict) -> str:
    return f"process {lease['pid']} on {lease['host']}"
