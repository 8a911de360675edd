"""How far a run is, by its folder alone: from any machine that sees it, while it runs and afterwards."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc

from softlabel.errors import StoreError
from softlabel.lease import holders
from softlabel.records import REJECTED
from softlabel.report import wording
from softlabel.shards import committed, shard_files
from softlabel.store import DONE, STORE, is_done, read_json, read_table, summary
from softlabel.tile_table import has_tiles, shard_counts
from softlabel.training.targets import STATE

_RATE_S = 600.0
"""Of the shards that came last, those of so many seconds say how fast labelling is."""
_LOOKED_AT = 200
"""Of the shards that came last, so many are opened to count rejected tiles."""


class _Step(NamedTuple):
    """How far a step is; ``speed`` and seconds ``left`` where they can be told, ``changed`` when it last wrote."""

    how_far: str
    speed: str = ""
    left: float | None = None
    changed: float | None = None


def status(run_dir: Path) -> str:
    """A line for each step that was begun, the one that was begun last at the bottom, and who is at it.

    Raises:
        StoreError: It is no run folder.
    """
    folders = [folder for folder in _folders(run_dir) if folder.name.split("-")[0] in _STEPS]
    if not folders:
        raise StoreError(f"{run_dir} is no run folder, or nothing was begun in it: give what --run-dir was")
    now = time.time()
    rows = [["step", "how far", "speed", "left", "last change"]]
    for folder in sorted(folders, key=_begun):
        step = _looked_at(folder)
        left = "" if step.left is None else wording.duration(step.left)
        changed = "" if step.changed is None else f"{wording.duration(max(0.0, now - step.changed))} ago"
        rows.append([folder.name, step.how_far, step.speed, left, changed])
    return "\n".join([*wording.aligned(rows), "", *_held([run_dir, *folders])])


def _looked_at(folder: Path, tries: int = 5) -> _Step:
    """Files of a step that is at work come and go; a step that ends has others."""
    try:
        return _STEPS[folder.name.split("-")[0]](folder)
    except (FileNotFoundError, StoreError):
        if not tries:
            raise
        return _looked_at(folder, tries - 1)


def _folders(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.iterdir() if path.is_dir()] if run_dir.is_dir() else []


def _begun(folder: Path) -> tuple[float, str]:
    """When, as far as files tell: its recipe is written first."""
    first = (folder / "recipe.yaml", folder / STORE, folder)
    return next(path.stat().st_mtime for path in first if path.exists()), folder.name


def _held(folders: Iterable[Path]) -> list[str]:
    lines = []
    for folder, (who, beats) in holders(folders).items():
        state = "and lives" if beats else "which shows no sign of life: the same command takes over and goes on"
        lines.append(f"{folder.name} is being written by {who}, {state}")
    return lines or ["nobody is writing it, but perhaps a `softlabel train`, which leaves no lease"]


def _tiles(folder: Path) -> _Step:
    if not is_done(folder):
        return _Step("not finished", changed=_changed([folder]))
    said = summary(folder)
    refused = (
        f", {wording.plain(said['scenes_rejected'])} scenes and {wording.plain(said['truth_rejected'])} truth rows"
    )
    told = f"done: {wording.plain(said['tiles'])} tiles of {wording.plain(said['scenes'])} scenes{refused} rejected"
    return _Step(told, changed=_changed([folder / DONE]))


def _labels(folder: Path) -> _Step:
    if is_done(folder):
        said = summary(folder)
        told = ", ".join(f"{said[key]:,} {key}" for key in ("labelled", "rejected", "boxes"))
        speed = f"{said['speed']['tiles_per_s']:,.1f} tiles/s" if said.get("speed") else ""
        return _Step(f"done: {told}", speed, changed=_changed([folder / DONE]))
    identity = read_json(folder / STORE) if (folder / STORE).exists() else {}
    tiles = folder.parent / str(identity.get("tiles"))
    if not has_tiles(tiles):
        return _Step("not finished", changed=_changed([folder]))
    counts = shard_counts(tiles, identity.get("splits"))
    files = shard_files(folder)
    there, asked = int(counts[[shard for shard in committed(folder) if shard < len(counts)]].sum()), int(counts.sum())
    newest = sorted((path.stat().st_mtime, shard) for shard, path in files.items())
    rate = _rate([(when, int(counts[shard])) for when, shard in newest])
    statuses = Counter[str]()
    for _, shard in newest[-_LOOKED_AT:]:
        statuses.update({REJECTED: pc.sum(pc.equal(read_table(files[shard], ["status"])["status"], REJECTED)).as_py()})
    seen = "" if len(newest) <= _LOOKED_AT else f" of the last {_LOOKED_AT} shards"
    told = f"{there:,} of {asked:,} tiles ({there / max(asked, 1):.0%}), {statuses[REJECTED]:,} rejected{seen}"
    left = None if rate is None else (asked - there) / rate
    changed = _changed([folder, *(files[shard] for _, shard in newest[-1:])])
    return _Step(told, "" if rate is None else f"{rate:,.1f} tiles/s", left, changed)


def _rate(shards: list[tuple[float, int]]) -> float | None:
    """Tiles per second of those that came last, by when their files were written; None where two are not enough."""
    recent = [one for one in shards if one[0] >= shards[-1][0] - _RATE_S]
    seconds = recent[-1][0] - recent[0][0] if recent else 0.0
    return sum(tiles for _, tiles in recent[1:]) / seconds if seconds > 0 else None


def _training(folder: Path) -> _Step:
    if is_done(folder):
        said = summary(folder)
        speed = f"{wording.duration(said['seconds'] / said['epochs'])} an epoch"
        told = f"done: {said['epochs']} epochs, best validation mAP50 {said['val_map50']:.3f}"
        return _Step(told, speed, changed=_changed([folder / DONE]))
    path = folder / STATE
    if not path.exists():
        return _Step("no epoch done", changed=_changed([folder]))
    import torch  # takes seconds, which other steps do without

    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # the tensors stay on disk
    history, epochs = state["history"], state.get("epochs")  # format_version 7 had none at first
    each, of = history[-1]["seconds"], "" if epochs is None else f" of {epochs}"
    told = f"epoch {len(history)}{of}, best validation mAP50 {max(row['map50'] for row in history):.3f}"
    left = None if epochs is None else each * (epochs - len(history))
    return _Step(told, f"{wording.duration(each)} an epoch", left, _changed([path]))


def _search(folder: Path) -> _Step:
    trials = [read_json(path) for path in sorted((folder / "trials").glob("[0-9]*.json"))]
    counts = Counter(trial["status"] for trial in trials)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    best = max((row["map50"] for trial in trials for row in trial["history"]), default=None)
    reached = "" if best is None else f"; best validation mAP50 {best:.3f}"
    done = "done: " if is_done(folder) else ""
    changed = _changed([folder, *(folder / "trials").glob("*.json")])
    return _Step(f"{done}{len(trials)} students{': ' + told if told else ''}{reached}", changed=changed)


def _changed(paths: Iterable[Path]) -> float:
    return max(path.stat().st_mtime for path in paths)


_STEPS: dict[str, Callable[[Path], _Step]] = {
    "tiles": _tiles,
    "label": _labels,
    "fused": _labels,
    "subtypes": _labels,
    "train": _training,
    "search": _search,
}
"""By the first word of its folder's name; others take seconds, and say nothing that their results do not."""
