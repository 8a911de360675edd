"""The evaluation step: from a detection store and the tiles' truth to numbers. It never runs a model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabel.calibration import calibration_of
from softlabel.config import Recipe
from softlabel.detectors.tile_loss import mean_losses
from softlabel.errors import StoreError
from softlabel.evaluation.calibrate import calibrate
from softlabel.evaluation.matching import TileResult
from softlabel.evaluation.metrics import evaluate
from softlabel.evaluation.quality import bootstrap_difference, label_quality
from softlabel.records import LABELLED, LOSS_NAMES, Truth, detections_from_row
from softlabel.shards import read_shards, read_soft_labels
from softlabel.store import finish, is_done, read_json, step_dir, summary, write_json, write_text
from softlabel.tile_table import read_tiles

CURVES = "curves.json"
CALIBRATION = "calibration.json"
QUALITY_THRESHOLDS = [round(0.05 * step, 2) for step in range(1, 20)]


def evaluate_store(recipe: Recipe, name: str, tiles: Path, split: str, store: Path, run_dir: Path) -> Path:
    """Judge one store on one split; the numbers are in done.json and curves.json of the folder returned.

    Raises:
        StoreError: The store or the tiles are not finished, or the split has no labelled tile with truth.
    """
    folder = step_dir(run_dir, f"evaluate-{name}", {"tiles": tiles.name, "split": split, "store": store.name})
    if not is_done(folder):
        results = list(tile_results(tiles, split, store).values())
        metrics = evaluate(results, recipe.classes)
        write_json(folder / CURVES, metrics.curves)
        losses = _losses(tiles, split, store)
        finish(folder, {"name": name, "split": split, "tiles": len(results), **metrics.to_dict(), "losses": losses})
    return folder


def calibrate_store(recipe: Recipe, tiles: Path, store: Path, run_dir: Path) -> Path:
    """Calibrate a store's scores on the split that ``calibrate`` names; in the folder returned, calibration.json is for
    ``train.calibration``, and done.json has a row per class.

    Raises:
        StoreError: The store or the tiles are not finished, or the split has no labelled tile with truth.
    """
    asked = {"tiles": tiles.name, "store": store.name, **recipe.calibrate.model_dump(mode="json")}
    folder = step_dir(run_dir, "calibrate", asked)
    if not is_done(folder):
        results = tile_results(tiles, recipe.calibrate.split, store)
        groups = {
            row["tile_id"]: row["group"] for row in read_tiles(tiles, [recipe.calibrate.split], ["tile_id", "group"])
        }
        found, rows = calibrate(
            list(results.values()), recipe.classes, [groups[tile_id] for tile_id in results], recipe.calibrate.method
        )
        write_text(folder / CALIBRATION, found.to_json())
        finish(folder, {"name": "calibrate", **asked, "tiles_used": len(results), "rows": rows})
    return folder


def numbers(folder: Path) -> dict:
    """What ``evaluate_store`` found, without the curves."""
    return summary(folder)


def curves(folder: Path) -> dict:
    """The precision-recall and F1 curves that ``evaluate_store`` found, by class name and ``all``."""
    return read_json(folder / CURVES)


def quality(recipe: Recipe, tiles: Path, split: str, store: Path, thresholds: Sequence[float]) -> list[dict]:
    """Soft labels against truth that their teacher never saw, per threshold and class; mapped by
    ``train.calibration``, if that is set."""
    return label_quality(judged_labels(recipe, tiles, split, store), recipe.classes, thresholds)


def judged_labels(recipe: Recipe, tiles: Path, split: str, store: Path) -> list[TileResult]:
    """Soft labels beside the truth of a split, mapped by ``train.calibration``, if that is set."""
    results = list(tile_results(tiles, split, store).values())
    if calibration := calibration_of(recipe):
        results = [replace(one, detections=calibration.apply(one.detections)) for one in results]
    return results


def label_scores(recipe: Recipe, tiles: Path, split: str, store: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Best score and class of every label of a split, (N,) each, mapped by ``train.calibration``, if that is set."""
    calibration = calibration_of(recipe)
    asked = {row["tile_id"] for row in read_tiles(tiles, [split], ["tile_id", "split"])}
    found = [
        detections_from_row(row)
        for row in read_soft_labels(store)
        if row["status"] == LABELLED and row["tile_id"] in asked and row["boxes"]
    ]
    mapped = [calibration.apply(one) if calibration else one for one in found]
    scores = np.concatenate([np.zeros(0, np.float32), *(one.best for one in mapped)])
    return scores, np.concatenate([np.zeros(0, np.int64), *(one.class_ids for one in mapped)])


def difference(recipe: Recipe, tiles: Path, split: str, reference: Path, store: Path) -> dict:
    """How far ``store`` is from ``reference`` on a split, with a bootstrap interval over groups of images."""
    a, b = tile_results(tiles, split, reference), tile_results(tiles, split, store)
    both = [tile_id for tile_id in a if tile_id in b]
    groups = {row["tile_id"]: row["group"] for row in read_tiles(tiles, [split], ["tile_id", "group"])}
    return bootstrap_difference(
        [a[tile_id] for tile_id in both],
        [b[tile_id] for tile_id in both],
        recipe.classes,
        samples=recipe.evaluate.bootstrap,
        seed=recipe.seed,
        groups=[groups[tile_id] for tile_id in both],
    )


def tile_results(tiles: Path, split: str, store: Path) -> dict[str, TileResult]:
    """Truth and detections of a split's labelled tiles that have truth, by tile_id, in the order of the store.

    Raises:
        StoreError: There are none.
    """
    rows = {row["tile_id"]: row for row in read_tiles(tiles, [split]) if row["truth"] is not None}
    results = {}
    for label in read_soft_labels(store):
        row = rows.get(label["tile_id"])
        if row is not None and label["status"] == LABELLED:
            classes = row["labelled_classes"]
            known = None if classes is None else tuple(classes)
            results[row["tile_id"]] = TileResult(Truth.from_row(row["truth"]), detections_from_row(label), known)
    if not results:
        raise StoreError(f"{store} has no labelled tile with truth in split {split}: label that split, or name another")
    return results


def _losses(tiles: Path, split: str, store: Path) -> dict[str, float]:
    """The losses on a split, over the tiles whose losses labelling kept; empty where it kept none."""
    wanted = {row["tile_id"] for row in read_tiles(tiles, [split], ["tile_id", "split"])}
    rows = [row for row in read_soft_labels(store) if row["tile_id"] in wanted and row["losses"]]
    if not rows:
        return {}
    metadata = next(read_shards(store, ["tile_id"])).schema.metadata
    return mean_losses(metadata[LOSS_NAMES].decode().split(","), [row["losses"] for row in rows])
