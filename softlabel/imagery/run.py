"""From scenes and truth to a table of tiles: the step that every other starts from.

Two passes. The first describes all scenes and assigns splits (catalog.py), keeping a few numbers per scene; the second
cuts windows, drops surplus background and writes the tiles, keeping one shard. Neither keeps any pixels.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from softlabel import store
from softlabel.config import Recipe, Split, TruthSource
from softlabel.errors import RecipeError, SoftlabelError, TruthError
from softlabel.imagery import synthetic, tiles
from softlabel.imagery.catalog import (
    MANY_SCENES,
    Scene,
    given_scenes,
    groups_in_two_splits,
    load_scenes,
    rejected_truth,
    set_splits,
)
from softlabel.imagery.listing import list_scenes
from softlabel.imagery.truth import SceneTruth, TruthSet, read_truth, truth_digest
from softlabel.recipe_file import dump_recipe
from softlabel.terminal import progress, say
from softlabel.tile_table import NO_SPLIT, write_tiles

REJECTED_FILE = "rejected.jsonl"
_TRUTH_COUNTS = ("rows", "dropped", "duplicates", "polygons")


@dataclass
class _Tally:
    """What is counted while tiles are written."""

    tiles: Counter[str] = field(default_factory=Counter)
    background: int = 0
    boxes: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    ignored: int = 0
    size_sum: np.ndarray = field(default_factory=lambda: np.zeros(2))

    def add(self, row: dict) -> None:
        split = row["split"] or NO_SPLIT
        classes = [box["class_id"] for box in row["truth"] or [] if not box["ignore"]]
        self.tiles[split] += 1
        self.boxes[split].update(classes)
        self.background += row["truth"] is not None and not classes
        self.ignored += len(row["truth"] or []) - len(classes)
        self.size_sum += row["window"][2:]


def tile(recipe: Recipe, run_dir: Path) -> Path:
    """Cut the recipe's scenes into tiles, unless that was done before.

    Bad scenes and truth rows are listed in ``rejected.jsonl`` and stop nothing. Truth boxes partly outside their image
    are clipped to it; those fully outside are rejected. Splits are assigned to the scenes with truth; the others have
    none. A scene that an xView file does not mention has no objects (such a file lists boxes, not images); in other
    formats nobody has looked at it, and its truth is null.

    Returns:
        The step's folder: the table of tiles (softlabel.tile_table; sorted by scene_id, then row by row),
        ``rejected.jsonl``, ``recipe.yaml`` and ``done.json`` with the counts.

    Raises:
        SceneError: There are no scenes, or none can be read.
        TruthError: The truth cannot be read, matches none of the scenes, or a larger share of its rows than
            ``tiles.max_rejected_fraction`` cannot be used (the step is finished all the same).
        RecipeError: A split would be empty.
    """
    _check_stretch(recipe)
    listed, source = _inputs(recipe, run_dir)
    step = store.step_dir(run_dir, "tiles", _fingerprint(recipe, listed, source))
    if not store.is_done(step):
        _write_step(recipe, listed, source, step)
    summary = store.summary(step)
    say(_headline(step, summary))
    for warning in summary["warnings"]:
        say(f"warning: {warning}")
    if refusal := _refusal(recipe, summary["truth_rows"], step):
        raise TruthError(refusal)
    return step


def _inputs(recipe: Recipe, run_dir: Path) -> tuple[list[tuple[str, str]], TruthSource | None]:
    """The scenes' ids and uris, and where the truth is; made-up scenes are made first."""
    settings, source = recipe.tiles.synthetic, recipe.tiles.truth
    if settings is None:
        return given_scenes(recipe.tiles), source
    folder = store.step_dir(run_dir, "scenes", [settings.model_dump(mode="json"), recipe.seed])
    scenes, truth = synthetic.write_scenes(folder, settings, recipe.seed)
    if source is None:
        mapping: dict[str | int, str] = {
            type_id: name for name, type_id in synthetic.TYPE_IDS.items() if name in recipe.classes
        }
        # Types that the recipe's classes do not name are left out on purpose.
        return list_scenes(str(scenes)), TruthSource(
            format="xview", path=str(truth), mapping=mapping, other_classes="drop"
        )
    return list_scenes(str(scenes)), source.model_copy(update={"format": "xview", "path": str(truth)})


def _check_stretch(recipe: Recipe) -> None:
    stretch = recipe.tiles.stretch
    if stretch is not None and not stretch[0] < stretch[1]:
        raise RecipeError(f"tiles.stretch is {list(stretch)}: the first value becomes 0, it must be below the second")


def _fingerprint(recipe: Recipe, listed: list[tuple[str, str]], source: TruthSource | None) -> dict:
    new = {"stac"} if recipe.tiles.stac is None else set()  # so that what earlier versions tiled keeps its name
    return {
        "tiles": recipe.tiles.model_dump(mode="json", exclude={"max_rejected_fraction", *new}),
        "classes": recipe.classes,
        "seed": recipe.seed,
        # Which scenes, not what is in them: labelling rejects the tiles of one that is replaced later, and that is no
        # reason to label all the others again.
        "scenes": store.digest([scene_id for scene_id, _ in listed]),
        "truth": truth_digest(source) if source else None,
    }


def _write_step(recipe: Recipe, listed: list[tuple[str, str]], source: TruthSource | None, step: Path) -> None:
    truth = read_truth(source, recipe.classes) if source else None
    rejected = [rejected_truth(row) for row in truth.rejected] if truth else []
    tally = _Tally()
    try:
        scenes = load_scenes(recipe, listed, truth, source, rejected)
        set_splits(recipe, scenes, source)
        write_tiles(step, _wanted_rows(recipe, scenes, tally))
        _check_splits(recipe, source, tally)
    except SoftlabelError as error:
        _write_rejected(step, rejected)
        # A split may be empty because of the truth that was refused: that is what the user must know.
        empty = isinstance(error, RecipeError)
        if truth and empty and (refusal := _refusal(recipe, truth.counts["rows"], step)):
            raise TruthError(refusal) from error
        raise
    _write_rejected(step, rejected)
    store.write_text(step / "recipe.yaml", dump_recipe(recipe))
    store.finish(step, _summary(recipe, scenes, truth, rejected, tally))


def _write_rejected(step: Path, rejected: list[dict]) -> None:
    store.write_text(step / REJECTED_FILE, "".join(json.dumps(row) + "\n" for row in rejected))


def _refusal(recipe: Recipe, rows: int, step: Path) -> str | None:
    """What to say about truth rows that cannot be used, if there are more than the recipe allows."""
    refused = [row["reason"] for row in _read_rejected(step) if row["kind"] == "truth" and row["row"] is not None]
    allowed = recipe.tiles.max_rejected_fraction
    if len(refused) <= allowed * rows:
        return None
    return (
        f"{len(refused)} of {rows} truth rows cannot be used ({len(refused) / rows:.0%}; tiles.max_rejected_fraction "
        f"is {allowed:.0%}), the first: {refused[0]} ({refused.count(refused[0])} of them); all are in "
        f"{step / REJECTED_FILE}"
    )


def _read_rejected(step: Path) -> list[dict]:
    return [json.loads(line) for line in (step / REJECTED_FILE).read_text().splitlines()]


def _wanted_rows(recipe: Recipe, scenes: list[Scene], tally: _Tally) -> Iterator[dict]:
    """The rows of all scenes except surplus background, counted on the way."""
    chances = _background_chances(recipe, scenes)
    for scene in progress(scenes, desc="tiles", disable=len(scenes) < MANY_SCENES):
        for row in _rows(recipe, scene):
            if _is_wanted(row, recipe.seed, chances):
                tally.add(row)
                yield row


def _rows(recipe: Recipe, scene: Scene) -> Iterator[dict]:
    """The scene's tiles as rows, row by row of the scene."""
    shared = _scene_columns(recipe, scene)
    for window, truth in _windows_with_truth(recipe, scene):
        column, row, width, height = window
        drawn = None if scene.truth is None or truth is None else _truth_column(scene.truth, truth, window)
        tile_id = f"{scene.scene_id}#{column}_{row}_{width}x{height}"
        yield {"tile_id": tile_id, "window": window, "truth": drawn, **shared}


def _scene_columns(recipe: Recipe, scene: Scene) -> dict[str, Any]:
    return {
        "scene_id": scene.scene_id,
        "scene_uri": scene.uri,
        "scene_stamp": scene.info.stamp,
        "bands": scene.info.bands,
        "stretch": scene.info.stretch,
        "split": scene.split,
        "group": scene.group,
        "labelled_classes": scene.truth.labelled_classes if scene.truth else None,
        "crs": scene.info.crs,
        "transform": scene.info.transform,
    }


def _windows_with_truth(recipe: Recipe, scene: Scene) -> Iterator[tuple[tiles.Window, tiles.TileTruth | None]]:
    """Windows, and the truth in each with its indices into the scene's truth."""
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


def _truth_column(scene: SceneTruth, truth: tiles.TileTruth, window: tiles.Window) -> list[dict]:
    columns: dict[str, Any] = {
        "box": truth.boxes_T4,
        "class_id": scene.class_ids[truth.kept_T],
        "visible": truth.visible_T,
        "ignore": truth.ignore_T | scene.crowd[truth.kept_T],
    }
    if scene.xywhr is not None:
        columns["xywhr"] = scene.xywhr[truth.kept_T] - [*window[:2], 0, 0, 0]
    rows = zip(*(part.tolist() for part in columns.values()), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in rows]


def _background_chances(recipe: Recipe, scenes: list[Scene]) -> dict[str, float]:
    """Per split, the share of its background tiles to keep for them to be ``tiles.background`` of what is left."""
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
    """Whether a tile stays: all do, except some of those whose truth says that nothing is there."""
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
    recipe: Recipe, scenes: list[Scene], truth: TruthSet | None, rejected: list[dict], tally: _Tally
) -> dict[str, Any]:
    num_tiles = sum(tally.tiles.values())
    unplaced = [scene for scene in scenes if scene.info.unplaced]
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
        **{f"truth_{name}": truth.counts[name] if truth else 0 for name in _TRUTH_COUNTS},
        "unplaced": len(unplaced),
        "mean_tile_px": (tally.size_sum / num_tiles).tolist(),
        "groups_in_two_splits": groups_in_two_splits(scenes),
        "warnings": [*(truth.warnings if truth else []), *_unplaced_in_words(unplaced)],
    }


def _unplaced_in_words(unplaced: list[Scene]) -> list[str]:
    if not unplaced:
        return []
    first = f"{unplaced[0].scene_id} has {unplaced[0].info.unplaced}"
    return [f"{len(unplaced)} scenes have no place on a map, their boxes stay in pixels: {first}"]


def _headline(step: Path, summary: dict) -> str:
    splits = ", ".join(f"{'in no split' if name == NO_SPLIT else name} {n}" for name, n in summary["splits"].items())
    boxes = ", ".join(f"{name} {count}" for name, count in summary["boxes"].items())
    lost = f"{summary['scenes_rejected']} scenes and {summary['truth_rejected']} truth rows rejected"
    leak = f"; {summary['groups_in_two_splits']} groups lie in two splits" if summary["groups_in_two_splits"] else ""
    return f"{summary['tiles']} tiles of {summary['scenes']} scenes ({splits}; {boxes}; {lost}{leak}) in {step}"
