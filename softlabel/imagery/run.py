"""Scenes and truth to a table of tiles: the step that every other begins with.

Two passes. The first describes all scenes and deals out splits, keeping a few numbers per scene; the second cuts
windows, drops surplus background and writes, keeping one row group. No pixel is kept in either.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from softlabel import store
from softlabel.config import Recipe, Split, TruthSource, dump_recipe
from softlabel.errors import RecipeError, SceneError, TruthError
from softlabel.imagery import scenes as scene_files
from softlabel.imagery import synthetic, tiles
from softlabel.imagery.scenes import SceneInfo
from softlabel.imagery.truth import RejectedTruth, SceneTruth, TruthSet, match_scenes, read_truth, truth_digest
from softlabel.records import TILES

TILES_FILE, REJECTED_FILE = "tiles.parquet", "rejected.jsonl"
_THREADS = 4
_MANY_SCENES = 200


@dataclass
class _Scene:
    """A scene that can be read; ``truth`` is None where nobody drew boxes, ``split`` where it belongs to none."""

    scene_id: str
    uri: str
    info: SceneInfo
    truth: SceneTruth | None
    group: str
    split: str | None

    def windows(self, recipe: Recipe) -> list[tiles.Window]:
        return tiles.windows(self.info.width, self.info.height, recipe.tiles.size_px, recipe.tiles.overlap_px)


@dataclass
class _Tally:
    """What is counted while tiles are written."""

    tiles: Counter[str] = field(default_factory=Counter)
    background: int = 0
    boxes: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    ignored: int = 0
    size_sum: np.ndarray = field(default_factory=lambda: np.zeros(2))

    def add(self, row: dict) -> None:
        split = row["split"] or "none"
        classes = [box["class_id"] for box in row["truth"] or [] if not box["ignore"]]
        self.tiles[split] += 1
        self.boxes[split].update(classes)
        self.background += row["truth"] is not None and not classes
        self.ignored += len(row["truth"] or []) - len(classes)
        self.size_sum += row["window"][2:]


def tile(recipe: Recipe, run_dir: Path) -> Path:
    """Cut the recipe's scenes into tiles; done before, it is not done again.

    Bad scenes and truth rows are listed in ``rejected.jsonl`` and cost nothing else. Truth boxes partly outside their
    image are clipped to it, those outside are rejected. Splits are dealt out among the scenes with truth; the others
    have none. A scene without truth in an xView file has no objects (such a file lists boxes, not images); in other
    formats nobody has looked at it, and its truth is null.

    Returns:
        The step's folder: ``tiles.parquet`` (records.TILES, row groups of ``tiles.SHARD_TILES``, by scene_id, then
        row by row), ``rejected.jsonl``, ``recipe.yaml`` and ``done.json`` with the counts.

    Raises:
        SceneError: There are no scenes, or none can be read.
        TruthError: The truth cannot be read, or is about none of the scenes.
        RecipeError: A split would be empty.
    """
    _check_stretch(recipe)
    spec, source = _inputs(recipe, run_dir)
    listed = scene_files.list_scenes(spec)
    step = store.step_dir(run_dir, "tiles", _fingerprint(recipe, listed, source))
    if not store.is_done(step):
        _write_step(recipe, listed, source, step)
    print(_headline(step, store.summary(step)))
    return step


def _inputs(recipe: Recipe, run_dir: Path) -> tuple[str, TruthSource | None]:
    """Where the scenes are, and the truth; made-up scenes are made first."""
    settings, source = recipe.tiles.synthetic, recipe.tiles.truth
    if settings is None:
        return str(recipe.tiles.scenes), source
    folder = store.step_dir(run_dir, "scenes", [settings.model_dump(mode="json"), recipe.seed])
    scenes, truth = synthetic.write_scenes(folder, settings, recipe.seed)
    if source is None:
        mapping: dict[str | int, str] = {
            type_id: name for name, type_id in synthetic.TYPE_IDS.items() if name in recipe.classes
        }
        # What the recipe's classes leave out is left out on purpose.
        return str(scenes), TruthSource(format="xview", path=str(truth), mapping=mapping, other_classes="drop")
    return str(scenes), source.model_copy(update={"format": "xview", "path": str(truth)})


def _check_stretch(recipe: Recipe) -> None:
    stretch = recipe.tiles.stretch
    if stretch is not None and not stretch[0] < stretch[1]:
        raise RecipeError(f"tiles.stretch is {list(stretch)}: the first value becomes 0, it must be below the second")


def _fingerprint(recipe: Recipe, listed: list[tuple[str, str]], source: TruthSource | None) -> dict:
    return {
        "tiles": recipe.tiles.model_dump(mode="json"),
        "classes": recipe.classes,
        "seed": recipe.seed,
        "scenes": store.digest([(scene_id, scene_files.scene_size_bytes(uri)) for scene_id, uri in listed]),
        "truth": truth_digest(source) if source else None,
    }


def _write_step(recipe: Recipe, listed: list[tuple[str, str]], source: TruthSource | None, step: Path) -> None:
    truth = read_truth(source, recipe.classes) if source else None
    rejected = [_rejected_truth(row) for row in truth.rejected] if truth else []
    scenes = _load_scenes(recipe, listed, truth, source, rejected)
    _set_splits(recipe, scenes, source)
    tally = _Tally()
    store.commit(step / TILES_FILE, lambda path: _write_tiles(path, recipe, scenes, tally))
    _check_splits(recipe, source, tally)
    store.write_text(step / REJECTED_FILE, "".join(json.dumps(row) + "\n" for row in rejected))
    store.write_text(step / "recipe.yaml", dump_recipe(recipe))
    store.finish(step, _summary(recipe, scenes, truth, rejected, tally))


def _load_scenes(
    recipe: Recipe,
    listed: list[tuple[str, str]],
    truth: TruthSet | None,
    source: TruthSource | None,
    rejected: list[dict],
) -> list[_Scene]:
    """All readable scenes with their truth, in the order listed; what fails is added to ``rejected``."""
    names = _match(truth, listed, rejected) if truth else {}
    # xView's file lists boxes only: an image that it does not mention was looked at and is empty.
    default = _no_truth(source.path) if source and source.format == "xview" else None
    scenes = []
    for scene_id, uri, info in _describe(recipe, listed):
        drawn = truth.scenes[names[scene_id]] if truth and scene_id in names else default
        if isinstance(info, SceneError):
            rejected.append(_rejected_scene(uri, info, drawn))
            continue
        group, split = (drawn.group, drawn.split) if drawn else (None, None)
        fitted = _fit(drawn, info, uri, rejected) if drawn else None
        scenes.append(_Scene(scene_id, uri, info, fitted, group or scene_id, split))
    if not scenes:
        raise SceneError(f"none of {len(listed)} scenes can be read; the first: {rejected[-len(listed)]['reason']}")
    return scenes


def _match(truth: TruthSet, listed: list[tuple[str, str]], rejected: list[dict]) -> dict[str, str]:
    """scene_id to image name of the truth; images without a scene are rejected."""
    found = match_scenes(truth.scenes, [scene_id for scene_id, _ in listed])
    for name, drawn in truth.scenes.items():
        if name not in found:
            reason = f"scene not found: no scene, or more than one, is named {name}; {len(drawn.boxes)} boxes left out"
            rejected.append(_rejected_truth(RejectedTruth(drawn.file, None, reason)))
    if truth.scenes and not found:
        raise TruthError(
            f"the truth is about none of the scenes: it names {next(iter(truth.scenes))}, a scene is {listed[0][0]}: "
            "set tiles.scenes to the folder that those names count from"
        )
    return {scene_id: name for name, scene_id in found.items()}


def _describe(recipe: Recipe, listed: list[tuple[str, str]]) -> Iterator[tuple[str, str, SceneInfo | SceneError]]:
    """Each scene with what it is or why it cannot be read, in order; reading is mostly waiting, so by threads."""

    def describe(scene: tuple[str, str]) -> tuple[str, str, SceneInfo | SceneError]:
        try:
            return *scene, scene_files.describe_scene(scene[1], recipe.tiles.bands, recipe.tiles.stretch)
        except SceneError as error:
            return *scene, error

    quiet = True if len(listed) < _MANY_SCENES else None  # None: quiet unless on a terminal
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from tqdm(pool.map(describe, listed), "scenes", len(listed), disable=quiet)


def _fit(drawn: SceneTruth, info: SceneInfo, uri: str, rejected: list[dict]) -> SceneTruth | None:
    """The truth in the scene's pixels, None where it was drawn on an image of another size."""
    size = info.width, info.height
    if drawn.size_wh not in (None, size):
        reason = f"drawn on {drawn.size_wh} px, scene {uri} has {size}: {len(drawn.boxes)} boxes left out"
        rejected.append(_rejected_truth(RejectedTruth(drawn.file, None, reason)))
        return None
    fitted, outside = drawn.fitted(*size)
    rejected.extend(_rejected_truth(row) for row in outside)
    return fitted


def _no_truth(file: str) -> SceneTruth:
    none = np.zeros(0, np.int64)
    return SceneTruth(file, np.zeros((0, 4)), none.astype(np.int32), none.astype(bool), none)


def _rejected_truth(row: RejectedTruth) -> dict:
    return {"kind": "truth", **asdict(row), "retryable": False}


def _rejected_scene(uri: str, error: SceneError, drawn: SceneTruth | None) -> dict:
    lost = f"; {len(drawn.boxes)} truth boxes left out with it" if drawn and len(drawn.boxes) else ""
    return {"kind": "scene", "file": uri, "row": None, "reason": f"{error}{lost}", "retryable": error.retryable}


def _set_splits(recipe: Recipe, scenes: list[_Scene], source: TruthSource | None) -> None:
    """Deal out splits among the scenes with truth; with ``split: truth`` they have theirs already."""
    split = recipe.tiles.split
    if source is None and isinstance(split, Split):
        return  # nobody drew anything: an archive to label
    if isinstance(split, Split):
        found = tiles.assign_splits(_group_counts(recipe, scenes), split, recipe.seed)
        for scene in scenes:
            scene.split = found[scene.group] if scene.truth is not None else None
    elif all(scene.split is None for scene in scenes):
        raise RecipeError("tiles.split is `truth`, which names no split: give shares, or COCO truth with `split`")


def _group_counts(recipe: Recipe, scenes: list[_Scene]) -> dict[str, np.ndarray]:
    """Per group of scenes with truth: the number of tiles, then of boxes per class."""
    num_classes = len(recipe.classes)
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(1 + num_classes, np.int64))
    for scene in scenes:
        if scene.truth is not None:
            drawn = np.bincount(scene.truth.class_ids[~scene.truth.crowd], minlength=num_classes)
            counts[scene.group] += np.array([len(scene.windows(recipe)), *drawn])
    return dict(counts)


def _write_tiles(path: Path, recipe: Recipe, scenes: list[_Scene], tally: _Tally) -> None:
    chances = _background_chances(recipe, scenes)
    rows: list[dict] = []
    quiet = True if len(scenes) < _MANY_SCENES else None
    with pq.ParquetWriter(path, TILES, compression="zstd") as writer:
        for scene in tqdm(scenes, "tiles", disable=quiet):
            for row in _rows(recipe, scene):
                if _is_wanted(row, recipe.seed, chances):
                    tally.add(row)
                    rows.append(row)
                if len(rows) == tiles.SHARD_TILES:
                    writer.write_table(pa.Table.from_pylist(rows, TILES))
                    rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, TILES))


def _rows(recipe: Recipe, scene: _Scene) -> Iterator[dict]:
    """The scene's tiles as rows, row by row of the scene."""
    shared = _scene_columns(recipe, scene)
    for window, truth in _windows_with_truth(recipe, scene):
        column, row, width, height = window
        drawn = None if scene.truth is None or truth is None else _truth_column(scene.truth, truth)
        tile_id = f"{scene.scene_id}#{column}_{row}_{width}x{height}"
        yield {"tile_id": tile_id, "window": window, "truth": drawn, **shared}


def _scene_columns(recipe: Recipe, scene: _Scene) -> dict[str, Any]:
    return {
        "scene_id": scene.scene_id,
        "scene_uri": scene.uri,
        "bands": recipe.tiles.bands,
        "stretch": scene.info.stretch,
        "split": scene.split,
        "group": scene.group,
        "labelled_classes": scene.truth.labelled_classes if scene.truth else None,
        "crs": scene.info.crs,
        "transform": scene.info.transform,
    }


def _windows_with_truth(recipe: Recipe, scene: _Scene) -> Iterator[tuple[tiles.Window, tiles.TileTruth | None]]:
    """Windows, and the truth in each with its indices into the scene's."""
    if scene.truth is None:
        yield from ((window, None) for window in scene.windows(recipe))
        return
    boxes, top, band = scene.truth.boxes, -1, np.zeros(0, np.int64)
    for window in scene.windows(recipe):
        if window[1] != top:  # once per row of tiles: windows times boxes is too many in a large scene
            top = window[1]
            band = np.flatnonzero((boxes[:, 1] < top + window[3]) & (boxes[:, 3] > top))
        truth = tiles.clip_truth(boxes[band], window, recipe.tiles.min_visible)
        yield window, truth._replace(kept_T=band[truth.kept_T])


def _truth_column(scene: SceneTruth, truth: tiles.TileTruth) -> list[dict]:
    ignore = truth.ignore_T | scene.crowd[truth.kept_T]
    columns = (truth.boxes_T4, scene.class_ids[truth.kept_T], truth.visible_T, ignore)
    names = ("box", "class_id", "visible", "ignore")
    return [dict(zip(names, values, strict=True)) for values in zip(*(part.tolist() for part in columns), strict=True)]


def _background_chances(recipe: Recipe, scenes: list[_Scene]) -> dict[str, float]:
    """Per split, the share of its background tiles to keep so that they are ``tiles.background`` of what is left."""
    share = recipe.tiles.background
    if share is None:
        return {}
    positive, background = Counter[str](), Counter[str]()
    for scene in scenes:
        if scene.truth is None or scene.split is None:
            continue
        for _, truth in _windows_with_truth(recipe, scene):
            drawn = truth is not None and bool((~(truth.ignore_T | scene.truth.crowd[truth.kept_T])).any())
            (positive if drawn else background)[scene.split] += 1
    wanted = {split: positive[split] * share / (1 - share) for split in background}
    return {split: min(1.0, wanted[split] / count) for split, count in background.items()}


def _is_wanted(row: dict, seed: int, chances: dict[str, float]) -> bool:
    """Whether a tile stays: all do but some of those whose truth says that nothing is there."""
    if row["split"] not in chances or row["truth"] is None or any(not box["ignore"] for box in row["truth"]):
        return True
    return tiles.keep_background(row["tile_id"], seed, chances[row["split"]])


def _check_splits(recipe: Recipe, source: TruthSource | None, tally: _Tally) -> None:
    if source is None or not isinstance(recipe.tiles.split, Split):
        return
    empty = [name for name in tiles.split_names(recipe.tiles.split) if not tally.tiles[name]]
    if empty:
        raise RecipeError(
            f"empty split {', '.join(empty)}: its scenes have no tile left: raise tiles.background, or give more scenes"
        )


def _summary(
    recipe: Recipe, scenes: list[_Scene], truth: TruthSet | None, rejected: list[dict], tally: _Tally
) -> dict[str, Any]:
    num_tiles = sum(tally.tiles.values())
    by_split = {
        split: {name: counts[index] for index, name in enumerate(recipe.classes)}
        for split, counts in sorted(tally.boxes.items())
    }
    return {
        "classes": list(recipe.classes),
        "scenes": len(scenes),
        "scenes_rejected": sum(row["kind"] == "scene" for row in rejected),
        "tiles": num_tiles,
        "background": tally.background,
        "splits": dict(sorted(tally.tiles.items())),
        "boxes": {name: sum(counts[name] for counts in by_split.values()) for name in recipe.classes},
        "boxes_by_split": by_split,
        "ignored": tally.ignored,
        "truth_rejected": sum(row["kind"] == "truth" for row in rejected),
        "truth_dropped": truth.dropped if truth else 0,
        "mean_tile_px": (tally.size_sum / num_tiles).tolist(),
        "groups_in_two_splits": _straddling(scenes),
    }


def _straddling(scenes: list[_Scene]) -> int:
    """Groups that a truth file puts into two splits: near-duplicates that training and test share."""
    splits: dict[str, set[str | None]] = defaultdict(set)
    for scene in scenes:
        splits[scene.group].update({scene.split} - {None})
    return sum(len(found) > 1 for found in splits.values())


def _headline(step: Path, summary: dict) -> str:
    splits = ", ".join(f"{name} {count}" for name, count in summary["splits"].items())
    boxes = ", ".join(f"{name} {count}" for name, count in summary["boxes"].items())
    lost = f"{summary['scenes_rejected']} scenes and {summary['truth_rejected']} truth rows rejected"
    leak = f"; {summary['groups_in_two_splits']} groups lie in two splits" if summary["groups_in_two_splits"] else ""
    return f"{summary['tiles']} tiles of {summary['scenes']} scenes ({splits}; {boxes}; {lost}{leak}) in {step}"
