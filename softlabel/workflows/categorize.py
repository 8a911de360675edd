"""What is in this imagery? A vocabulary over every tile: counts by class and scene, pictures, and a draft recipe.

The "one generalized model that could categorize any satellite image" of Ciolino, Rosario and Noever (arXiv:2212.00585).
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from softlabel.config import Recipe
from softlabel.errors import RecipeError, SceneError
from softlabel.imagery.run import tile
from softlabel.imagery.scenes import TileReader
from softlabel.labelling.job import open_vocabulary_job
from softlabel.labelling.run import label
from softlabel.recipe_file import dump_recipe
from softlabel.records import LABELLED, UNKNOWN_CLASS, Detections, Truth
from softlabel.report import figures, wording
from softlabel.report.categories import Census, Example, against_truth
from softlabel.report.page import render
from softlabel.results.scenes import Scene, read_scenes
from softlabel.results.stores import LabelledTile, Store, num_shards, open_store, read_all
from softlabel.store import summary, write_json, write_table, write_text
from softlabel.terminal import say
from softlabel.tile_table import iterate_tiles
from softlabel.workflows.experiment import Steps
from softlabel.workflows.vocabulary import read_vocabulary

_EXAMPLES, _CROP_PX, _SHEET_BYTES = 12, 120, 120_000
_MAX_PANELS = 60
_SEAM_IOU = 0.5


def categorize(recipe: Recipe, run_dir: Path, vocabulary: Path, threshold: float) -> dict[str, Any]:
    """Look for every class of a vocabulary; write categories.json and .html, scenes.parquet and classes.yaml.

    Args:
        recipe: Its tiles and ``label.open_vocabulary.model`` are used; its ``classes`` only name those of the truth, if
            there is any to compare with.
        run_dir: Where the results go.
        vocabulary: A text file (softlabel.workflows.vocabulary).
        threshold: Boxes scoring above it count.

    Raises:
        RecipeError: The recipe names no open-vocabulary model, or the vocabulary is not valid.
    """
    if recipe.label.open_vocabulary is None:
        raise RecipeError(
            "label.open_vocabulary is not set: --set label.open_vocabulary.model=NAME, a folder or a name on the hub"
        )
    asked = read_vocabulary(vocabulary)
    worded = _worded(recipe, asked)
    steps = Steps(run_dir, total=3)
    write_text(run_dir / "recipe.yaml", dump_recipe(recipe))
    with steps.next("tiles"):
        tiles = tile(recipe, run_dir)
    with steps.next(f"look for {len(asked)} classes"):
        (folder,) = label(worded, [open_vocabulary_job(worded, "vocabulary", tiles, recipe.label.splits)], run_dir)
    with steps.next("count and draw"):
        store = open_store(folder)
        census = _count(store, threshold)
        results = _results(recipe, store, census, threshold)
        _write(run_dir, worded, store, census, results)
    say(f"\n{_in_words(results)}\n\nreport: {run_dir / 'categories.html'}\ndraft:  {run_dir / 'classes.yaml'}")
    return results


def _worded(recipe: Recipe, asked: Mapping[str, tuple[str, ...]]) -> Recipe:
    assert recipe.label.open_vocabulary is not None
    found = recipe.label.open_vocabulary.model_copy(update={"prompts": dict(asked), "examples": {}})
    labelling = recipe.label.model_copy(update={"open_vocabulary": found, "weights": None})
    return recipe.model_copy(update={"classes": tuple(asked), "label": labelling})


def _count(store: Store, threshold: float) -> Census:
    """One pass by scene, one by tile: neither holds more than a scene in memory."""
    census = Census(store.classes, _EXAMPLES)
    for scene in read_scenes(store, 0, num_shards(store), threshold):
        if scene.counts[LABELLED]:
            census.add_scene(scene.scene_id, scene.merged("nms", _SEAM_IOU).scores)
    for one in read_all(store):
        found = one.found.above(threshold)
        for box, class_id, score in zip(found.boxes.tolist(), found.class_ids.tolist(), found.best, strict=True):
            census.add_example(class_id, Example(float(score), one.tile["tile_id"], tuple(box)))
    return census


def _results(recipe: Recipe, store: Store, census: Census, threshold: float) -> dict[str, Any]:
    truth = _truth_counts(recipe, store)
    shared = {name: counts for name, counts in truth.items() if name in census.classes and counts}
    return {
        "name": recipe.name,
        "model": recipe.label.open_vocabulary.model if recipe.label.open_vocabulary else None,
        "threshold": threshold,
        "scenes": census.num_scenes,
        "tiles": summary(store.folder)["requested"],
        "classes": census.table(),
        "truth": against_truth(census.counts(), shared),
    }


def _truth_counts(recipe: Recipe, store: Store) -> dict[str, dict[str, int]]:
    """Objects by class and scene, those on a seam once; under a class only scenes that were searched for it."""
    counts: dict[str, dict[str, int]] = {name: {} for name in recipe.classes}
    scene, known = Scene(""), set[int]()

    def finish() -> None:
        if scene.windows:
            found = scene.merged("nms", _SEAM_IOU).scores
            class_ids = found.argmax(axis=1) if len(found) else np.zeros(0, np.int64)
            totals = np.bincount(class_ids, minlength=len(recipe.classes))
            for k in known:
                counts[recipe.classes[k]][scene.scene_id] = int(totals[k])

    for row in iterate_tiles(store.tiles, store.splits):
        if row["truth"] is None:
            continue
        if row["scene_id"] != scene.scene_id:
            finish()
            scene, known = Scene(row["scene_id"]), set(range(len(recipe.classes)))
        if row["labelled_classes"] is not None:
            known &= set(row["labelled_classes"])
        truth = Truth.from_row(row["truth"])
        of_class = truth.class_ids != UNKNOWN_CLASS
        vectors = np.eye(len(recipe.classes), dtype=np.float32)[truth.class_ids[of_class]]
        scene.add(LabelledTile(row, Detections(truth.boxes[of_class], vectors)), 0.0)
    finish()
    return counts


def _write(run_dir: Path, worded: Recipe, store: Store, census: Census, results: dict[str, Any]) -> None:
    write_json(run_dir / "categories.json", results)
    columns = {key: [row[key] for row in census.rows] for key in ("scene_id", "class", "count", "best")}
    write_table(run_dir / "scenes.parquet", pa.table(columns))
    write_text(run_dir / "classes.yaml", _draft(worded, results))
    histograms = figures.histograms_png(_panels(census), "score")
    view = {
        **{key: results[key] for key in ("name", "model", "scenes", "truth")},
        "threshold": f"{results['threshold']:g}",
        "headline": _headline(results),
        "table": results["classes"],
        "draft": "classes.yaml",
        "histograms": base64.b64encode(histograms).decode(),
        "sheets": _sheets(store, census, results),
    }
    write_text(run_dir / "categories.html", render("categories.html.j2", view))


def _draft(worded: Recipe, results: dict[str, Any]) -> str:
    """The classes that were found, most frequent first, as the beginning of a recipe."""
    assert worded.label.open_vocabulary is not None
    names = [row["class"] for row in results["classes"] if row["objects"]]
    prompts = {name: list(worded.label.open_vocabulary.prompts[name]) for name in names}
    body = {
        "classes": names,
        "label": {"open_vocabulary": {"model": worded.label.open_vocabulary.model, "prompts": prompts}},
    }
    note = f"# Found above {results['threshold']:g} in {results['scenes']} scenes: strike out what is wrong.\n"
    return note + yaml.safe_dump(body, sort_keys=False)


def _panels(census: Census) -> list[tuple[str, np.ndarray, tuple[int, int, int]]]:
    totals = census.histograms_KB.sum(axis=1)
    largest = np.argsort(-totals, kind="stable")[:_MAX_PANELS]
    return [
        (f"{census.classes[k]}: {wording.plain(int(totals[k]))}", census.histograms_KB[k], figures.class_rgb(int(k)))
        for k in largest
    ]


def _sheets(store: Store, census: Census, results: dict[str, Any]) -> list[dict[str, str]]:
    """A contact sheet per class that was found, in the order of the table."""
    examples = dict(zip(census.classes, census.examples, strict=True))
    wanted = {example.tile_id for group in examples.values() for example in group}
    rows = {row["tile_id"]: row for row in iterate_tiles(store.tiles, store.splits) if row["tile_id"] in wanted}
    reader, sheets = TileReader(), []
    for name in (row["class"] for row in results["classes"] if row["objects"]):
        crops = [(example, crop) for example in examples[name] if (crop := _crop(reader, rows, example)) is not None]
        if crops:
            captions = [f"{example.tile_id}  {example.score:.2f}" for example, _ in crops]
            sheet = figures.contact_sheet([crop for _, crop in crops], captions, _CROP_PX)
            sheets.append({"class": name, "jpeg": base64.b64encode(figures.jpeg(sheet, _SHEET_BYTES)).decode()})
    reader.close()
    return sheets


def _crop(reader: TileReader, rows: Mapping[str, dict], example: Example) -> np.ndarray | None:
    """A square around the box, twice as wide as its longer side; None where the scene can no longer be read."""
    try:
        image = reader.read(rows[example.tile_id])
    except SceneError:
        return None
    x0, y0, x1, y1 = example.box
    half = max(x1 - x0, y1 - y0, 8.0)
    left, top = round((x0 + x1) / 2 - half), round((y0 + y1) / 2 - half)
    crop = image[max(top, 0) : max(top, 0) + round(2 * half), max(left, 0) : max(left, 0) + round(2 * half)]
    return figures.enlarged(crop, _CROP_PX)


def _headline(results: dict[str, Any]) -> str:
    found = [row for row in results["classes"] if row["objects"]]
    if not found:
        return f"None of {len(results['classes'])} classes was found in {results['scenes']} scenes"
    first = ", ".join(f"{row['class']} ({row['scenes']} scenes)" for row in found[:4])
    return f"{len(found)} of {len(results['classes'])} classes were found; most often {first}"


def _in_words(results: dict[str, Any]) -> str:
    header = ["class", "scenes", "objects", "median score"]
    rows: Sequence[Sequence[str]] = [
        header,
        *(
            [
                row["class"],
                wording.plain(row["scenes"]),
                wording.plain(row["objects"]),
                wording.number(row["median"], 2),
            ]
            for row in results["classes"][:20]
        ),
    ]
    return "\n".join([_headline(results), "", *wording.aligned(rows)])
