"""Pack and count a store whose shards are all there, in Ray tasks of up to 10,240 tiles each."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError

from softlabel.errors import DISK_FULL, StoreError
from softlabel.shards import pack, to_pack
from softlabel.storage import remove_tree
from softlabel.terminal import say

_AHEAD = 4  # tasks submitted to Ray per CPU: more would only wait in its memory
_LONG_S = 60.0  # a task takes seconds


def pack_store(folder: Path, tiles: Path, splits: Iterable[str] | None) -> Counter[str]:
    """Pack every shard of a store (softlabel.shards.pack), and return the sum of the counts.

    Raises:
        StoreError: A shard is broken or lacks some of its tiles, there is no space left, or Ray lost too much.
    """
    splits = None if splits is None else tuple(splits)
    task = ray.remote(num_cpus=1, max_retries=5)(_pack)
    most = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    total: Counter[str] = Counter()
    waiting: list[ray.ObjectRef] = []
    for number, expected in to_pack(tiles, splits):
        waiting.append(task.remote(folder, tiles, splits, number, expected))
        if len(waiting) >= most:
            done, waiting = _wait(waiting)
            total.update(_told(done))
    while waiting:
        done, waiting = _wait(waiting)
        total.update(_told(done))
    remove_tree(folder / "shards")
    return total


def _pack(
    folder: Path, tiles: Path, splits: tuple[str, ...] | None, number: int, expected: dict[int, int]
) -> Counter[str] | str:
    """The counts, or a user's mistake as text, since Ray would bury an exception."""
    try:
        return pack(folder, tiles, splits, number, expected)
    except StoreError as error:
        return str(error)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        return f"no space left on the disk of {folder}: free some and run the same again"


def _wait(tasks: list["ray.ObjectRef"]) -> tuple[list["ray.ObjectRef"], list["ray.ObjectRef"]]:
    """Like ray.wait, but say so when it takes long: another job may hold every CPU."""
    while True:
        done, waiting = ray.wait(tasks, timeout=_LONG_S)
        if done:
            return done, waiting
        free = ray.available_resources().get("CPU", 0)
        say(f"packing: nothing was packed for {_LONG_S:g} s; {free:g} CPU free, and each task needs one")


def _told(done: list["ray.ObjectRef"]) -> Counter[str]:
    total: Counter[str] = Counter()
    try:
        found = ray.get(done)
    except RayTaskError:  # a bug, which its traceback tells
        raise
    except RayError as error:
        raise StoreError(f"labels could not be packed ({str(error).splitlines()[0]}): run the same again") from error
    for told in found:
        if isinstance(told, str):
            raise StoreError(told)
        total.update(told)
    return total
