"""Links trials, which want students trained, to worker groups, which live as long as the search and train them.

Plain asyncio; worker_groups.py makes a Ray actor of it.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Student:
    job: Any
    until: int | None
    status: str = "waiting"  # or training, stopped, finished, failed
    reason: str = ""
    failures: int = 0
    history: list[dict] = field(default_factory=list)
    seconds: float = 0.0

    def is_held(self, epochs: int) -> bool:
        """Whether it waits to be told whether it goes on."""
        return self.status == "training" and self.until is not None and epochs >= self.until


@dataclass
class _Group:
    """The student that a worker group has in hand, the node of its first worker, and how often that worker asked for a
    student: the last request of a worker that died is still pending, and must not be answered."""

    student: str | None = None
    node: str = ""
    asked: int = 0


class Dispatcher:
    """Students by name, and who trains them.

    Args:
        max_failures: How often a student may be restarted after its workers died.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._students: dict[str, _Student] = {}
        self._groups: dict[int, _Group] = {}
        self._queue: deque[str] = deque()
        self._closed = False
        self._changed = asyncio.Condition()

    async def submit(self, name: str, job: Any, until: int | None = None) -> None:
        """Ask for a student to be trained; one that was stopped goes on, one that is already in training is left alone.

        After epoch ``until`` its group waits for ``extend`` or ``stop``; None: it is trained to its end.
        """
        async with self._changed:
            student = self._students.setdefault(name, _Student(job, until))
            student.until = until
            if student.status == "stopped":
                student.status = "training" if self._in_hand(name) else "waiting"
            if student.status == "waiting" and name not in self._queue:
                self._queue.append(name)
            self._changed.notify_all()

    async def next_job(self, group: int, node: str, timeout_s: float) -> Any:
        """The next student for a worker group; ``wait`` if none comes within ``timeout_s``, ``close`` if none will.

        A group that asks with a student still in hand has lost its workers: it gets the same one again, to go on.
        """
        async with self._changed:
            hand = self._groups.setdefault(group, _Group())
            hand.node, hand.asked = node, hand.asked + 1
            asked = hand.asked
            if hand.student and self._try_again(hand.student):
                return self._students[hand.student].job
            hand.student = None
            try:
                ready = self._changed.wait_for(lambda: self._queue or self._closed or hand.asked != asked)
                await asyncio.wait_for(ready, timeout_s)
            except TimeoutError:
                return "wait"
            if hand.asked != asked:
                return "wait"
            if self._closed:
                return "close"
            hand.student = self._queue.popleft()
            student = self._students[hand.student]
            student.status = "training"
            return student.job

    async def report(self, group: int, history: list[dict], seconds: float) -> bool:
        """A group says what its student has done so far, and hears whether it is to go on."""
        async with self._changed:
            student = self._student_of(group)
            if student is None:
                return False
            student.history, student.seconds = history, seconds
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._closed or not student.is_held(len(history)))
            return student.status == "training" and not self._closed

    async def release(self, group: int, status: str, reason: str, history: list[dict], seconds: float) -> None:
        """A group hands its student back: finished, stopped or failed."""
        async with self._changed:
            if student := self._student_of(group):
                again = status == "stopped" and student.status == "training" and not self._closed
                if again:  # asked for again while it was being handed back
                    status = "waiting"
                    self._queue.appendleft(self._groups[group].student or "")
                student.status, student.reason = status, reason
                student.history, student.seconds = history or student.history, seconds or student.seconds
            self._groups[group].student = None
            self._changed.notify_all()

    async def note_failure(self, group: int, reason: str) -> None:
        """A group says why it is about to restart with its student."""
        async with self._changed:
            if student := self._student_of(group):
                student.reason = reason

    async def wait(self, name: str, epochs_seen: int) -> dict:
        """The status of a student once it has done another epoch, or has ended."""
        async with self._changed:
            student = self._students[name]
            await self._changed.wait_for(
                lambda: len(student.history) > epochs_seen or student.status not in ("waiting", "training")
            )
            return self.status(name)

    def status(self, name: str) -> dict:
        """A student's status, reason, history and seconds now; if it was never submitted, those of a new one."""
        student = self._students.get(name) or _Student(None, None)
        return {key: getattr(student, key) for key in ("status", "reason", "history", "seconds")}

    async def stop(self, name: str) -> None:
        """A student is no longer wanted, or not for now; its group hands it back after the epoch it is in."""
        async with self._changed:
            student = self._students[name]
            if student.status in ("waiting", "training"):
                student.status = "stopped"
            if name in self._queue:
                self._queue.remove(name)
            self._changed.notify_all()

    async def extend(self, name: str, until: int | None) -> None:
        """A student need not wait where it was to, but only after epoch ``until``; None: nowhere."""
        async with self._changed:
            self._students[name].until = until
            self._changed.notify_all()

    async def nodes_lost(self, nodes: list[str]) -> None:
        """Nodes are gone: the students that their groups had in hand go to whichever group is free next."""
        async with self._changed:
            for hand in (hand for hand in self._groups.values() if hand.node in nodes):
                if hand.student and self._try_again(hand.student):
                    self._students[hand.student].status = "waiting"
                    self._queue.appendleft(hand.student)
                hand.student, hand.node, hand.asked = None, "", hand.asked + 1
            self._changed.notify_all()

    async def close(self) -> None:
        """No more students: groups end after the epoch they are in."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _in_hand(self, name: str) -> bool:
        return any(hand.student == name for hand in self._groups.values())

    def _student_of(self, group: int) -> _Student | None:
        hand = self._groups.get(group)
        return self._students[hand.student] if hand and hand.student else None

    def _try_again(self, name: str) -> bool:
        student = self._students[name]
        if student.status != "training":
            return False
        student.failures += 1
        if student.failures <= self._max_failures:
            return True
        student.status = "failed"
        student.reason = f"its workers died {student.failures} times" + (
            f": {student.reason}" if student.reason else ""
        )
        self._changed.notify_all()
        return False
