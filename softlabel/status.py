"""How far a run has got, by its folder alone: from any machine that sees it, while it runs and afterwards.

Files of a run come and go while they are looked at: those that are gone are left out.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from softlabel.errors import StoreError
from softlabel.lease import holders
from softlabel.records import REJECTED
from softlabel.report import wording
from softlabel.shards import shard_files
from softlabel.storage import modified, on_disk
from softlabel.store import DONE, STORE, is_done, read_json, read_table, summary
from softlabel.tile_table import has_tiles, shard_counts
from softlabel.training.targets import STATE

_RATE_S = 600.0
"""Labelling speed is measured over the latest shards, those of so many seconds."""
_LOOKED_AT = 200
"""How many of the latest shards are opened to count rejected tiles."""


class _Step(NamedTuple):
    """How far a step has got; ``changed`` is when it last wrote, ``speed`` and seconds ``left`` are as of then, and
    mean nothing once it has not written for ``stale_s`` seconds."""

    how_far: str
    changed: float
    speed: str = ""
    left: float | None = None
    stale_s: float = 0.0


def status(run_dir: Path) -> str:
    """A line for each step that was begun, in the order of their last changes, and which processes hold leases.

    Raises:
        StoreError: It is no run folder.
    """
    folders = [path for path in run_dir.iterdir() if path.is_dir()] if run_dir.is_dir() else []
    steps = {folder: _looked_at(folder) for folder in folders if folder.name.split("-")[0] in _STEPS}
    if not steps:
        raise StoreError(f"{run_dir} is not a run folder, or nothing has started in it: give the run's --run-dir")
    now, rows = time.time(), [["step", "progress", "speed", "left", "last change"]]
    for folder, step in sorted(steps.items(), key=lambda item: (item[1].changed, item[0])):
        age = max(0.0, now - step.changed)
        is_stale = 0 < step.stale_s < age
        left = "" if step.left is None or is_stale else wording.duration(step.left)
        speed = "" if is_stale else step.speed
        rows.append([folder.name, step.how_far, speed, left, f"{wording.duration(age)} ago"])
    return "\n".join([*wording.aligned(rows), "", *_held([run_dir, *steps])])


def _looked_at(folder: Path) -> _Step:
    try:
        return _STEPS[folder.name.split("-")[0]](folder)
    except (StoreError, OSError) as error:  # of one step: the others can still be reported
        return _Step(" ".join(str(error).split()), _changed([folder]))


def _held(folders: Iterable[Path]) -> list[str]:
    lines = []
    for folder, (who, beats) in holders(folders).items():
        state = "alive" if beats else "no sign of life: the next run with this --run-dir takes over"
        lines.append(f"{folder.name}: held by {who}, {state}")
    return lines or ["no process holds a lease here"]


def _tiles(folder: Path) -> _Step:
    if not is_done(folder):
        return _Step("not finished", _changed([folder, *folder.glob("table/*")]))
    said = summary(folder)
    refused = f"{said['scenes_rejected']:,} scenes and {said['truth_rejected']:,} truth rows rejected"
    return _Step(f"done: {said['tiles']:,} tiles of {said['scenes']:,} scenes, {refused}", _changed([folder / DONE]))


def _labels(folder: Path) -> _Step:
    if is_done(folder):
        said = summary(folder)
        kinds = ("labelled", *(["empty"] if said.get("empty") else []), "rejected", "boxes")
        told = ", ".join(f"{said[kind]:,} {kind}" for kind in kinds)
        speed = f"{said['speed']['tiles_per_s']:,.1f} tiles/s" if said.get("speed") else ""
        return _Step(f"done: {told}", _changed([folder / DONE]), speed)
    identity = read_json(folder / STORE) if (folder / STORE).exists() else {}
    tiles = folder.parent / str(identity.get("tiles"))
    if not has_tiles(tiles):
        return _Step("not finished", _changed([folder / STORE, *shard_files(folder).values()]))
    if packed := list(folder.glob("table/*.parquet")):
        return _Step("all tiles are there; packing them, or retrying rejected ones", _changed(packed))
    return _half_labelled(folder, shard_counts(tiles, identity.get("splits")))


def _half_labelled(folder: Path, counts: Any) -> _Step:
    files, times = shard_files(folder), modified(folder)
    newest = sorted((times[path], shard) for shard, path in files.items() if path in times)
    there, asked = sum(int(counts[shard]) for _, shard in newest), int(counts.sum())
    rejected = sum(_rejected(files[shard]) for _, shard in newest[-_LOOKED_AT:])
    of_those = "" if len(newest) <= _LOOKED_AT else f" in the last {_LOOKED_AT} shards"
    told = f"{there:,} of {asked:,} tiles ({there / max(asked, 1):.0%}), {rejected:,} rejected{of_those}"
    changed = newest[-1][0] if newest else _changed([folder / STORE])
    rate = _rate([(when, int(counts[shard])) for when, shard in newest])
    if rate is None:
        return _Step(told, changed)
    return _Step(told, changed, f"{rate:,.1f} tiles/s", (asked - there) / rate, stale_s=_RATE_S)


def _rejected(shard: Path) -> int:
    try:
        return int(pc.sum(pc.equal(read_table(shard, ["status"])["status"], REJECTED)).as_py() or 0)
    except StoreError:
        if shard.exists():
            raise
        return 0


def _rate(shards: list[tuple[float, int]]) -> float | None:
    """Tiles per second of the latest shards, from when their files were written; None where there are too few."""
    recent = [one for one in shards if one[0] >= shards[-1][0] - _RATE_S]
    seconds = recent[-1][0] - recent[0][0] if recent else 0.0
    return sum(tiles for _, tiles in recent[1:]) / seconds if seconds > 0 else None


def _training(folder: Path) -> _Step:
    state = None if is_done(folder) else _state(folder / STATE)
    if state is not None:
        return _half_trained(state, _changed([folder / STATE, folder]))
    if not is_done(folder):  # a training is marked done before its state is removed
        return _Step("no epoch done", _changed([folder]))
    said = summary(folder)
    told = f"done: {said['epochs']} epochs, best validation mAP50 {said['val_map50']:.3f}"
    return _Step(told, _changed([folder / DONE]), _per_epoch(said["seconds"] / said["epochs"]))


def _state(path: Path) -> dict | None:
    """A training's state, its tensors left on disk; None where there is none, or no longer one."""
    if not path.exists():
        return None
    import torch  # takes seconds, which other steps can do without

    try:
        return torch.load(on_disk(path), map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, RuntimeError):
        if path.exists():
            raise StoreError(f"{path} cannot be read") from None
        return None


def _half_trained(state: dict, changed: float) -> _Step:
    history, epochs = state["history"], state.get("epochs")  # format_version 7 had none at first
    each, of = history[-1]["seconds"], "" if epochs is None else f" of {epochs}"
    told = f"epoch {len(history)}{of}, best validation mAP50 {max(row['map50'] for row in history):.3f}"
    left = None if epochs is None else each * (epochs - len(history))
    return _Step(told, changed, _per_epoch(each), left, stale_s=max(_RATE_S, 3 * each))


def _per_epoch(seconds: float) -> str:
    return f"{wording.duration(seconds)} an epoch"


def _search(folder: Path) -> _Step:
    files = sorted((folder / "trials").glob("[0-9]*.json"))
    trials = [read_json(path) for path in files]
    states = [trial["status"] for trial in trials]
    told = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    best = max((row["map50"] for trial in trials for row in trial["history"]), default=None)
    reached = "" if best is None else f"; best validation mAP50 {best:.3f}"
    done = "done: " if is_done(folder) and "running" not in states else ""  # a search that is resumed keeps its summary
    students = f"{len(trials)} student{'' if len(trials) == 1 else 's'}{': ' + told if told else ''}"
    return _Step(f"{done}{students}{reached}", _changed([*files, folder / DONE, folder / "recipe.yaml"]))


def _changed(paths: Iterable[Path]) -> float:
    """When the newest of those that are there was written; 0 where none is."""
    return max((when for path in paths if (when := _when(path)) is not None), default=0.0)


def _when(path: Path) -> float | None:
    try:
        return path.stat().st_mtime or None  # a bucket has no folders
    except FileNotFoundError:
        return None


_STEPS: dict[str, Callable[[Path], _Step]] = {
    "tiles": _tiles,
    "label": _labels,
    "fused": _labels,
    "subtypes": _labels,
    "train": _training,
    "search": _search,
}
"""By the first word of a step's folder name; other steps take seconds, and their results say all there is to say."""
