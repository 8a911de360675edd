"""Cars split by their colour: how often is the colour right, and how good is a student of the finer classes?

python benchmarks/subtypes.py --run-dir runs/subtypes

It is known what each car of a made-up scene was painted in. First the colours in boxes that people drew, by difficulty
of the scenes. Then what a user would do: a teacher of three classes labels, `softlabel subtype` splits its cars, a
student learns from these, and is judged by the known colours beside one that learned from them.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import machine

from softlabel.config import Recipe, Synthetic
from softlabel.imagery.drawing import CAR_COLOURS, Thing, brightened
from softlabel.imagery.layouts import lay_out
from softlabel.imagery.run import tile
from softlabel.imagery.scenes import read_tile
from softlabel.imagery.synthetic import TYPE_IDS, write_scenes
from softlabel.recipe_file import dump_recipe, load_recipe
from softlabel.records import Detections, Truth
from softlabel.results.colour import FAMILIES, Colour
from softlabel.results.crops import cut_out
from softlabel.store import commit, summary, write_text
from softlabel.tile_table import read_tiles
from softlabel.training.targets import WEIGHTS

_FINER = [f"car-{family}" for family in FAMILIES]
_FINER_IDS = {name: 1000 + place for place, name in enumerate(_FINER)} | {k: TYPE_IDS[k] for k in ("plane", "ship")}
"""Type ids, those of finer classes outside xView's."""
_ROOF = 1  # of a car's parts, painted 14 brighter than the car
_SYNTHETIC = load_recipe("synthetic")
_TRAINED = {"train": _SYNTHETIC.train, "execution": _SYNTHETIC.execution}


class Told(NamedTuple):
    """What a car was painted in, and what its crop was told to be, with and without looking at the tile's levels."""

    known: str
    found: str
    without_levels: str


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="where scenes, stores and students go")
    arguments = parser.parse_args()
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, no GPU; {about['date']}, commit {about['commit']}\n", flush=True)
    rows = []
    for difficulty in (0.1, 0.3, 0.6):
        scenes = Synthetic(num_scenes=40, scene_size_px=384, difficulty=difficulty)
        told = [one for seed in range(3) for one in told_colours(*finer_recipe(arguments.run_dir, scenes, seed))]
        rows.append(_row(difficulty, told))
    print("\n| difficulty | cars | right | without the tile's levels | most frequent errors |\n|---|---|---|---|---|")
    print("\n".join(rows) + "\n", flush=True)
    print("\n" + _students(arguments.run_dir))
    return 0


# --- colours ---


def finer_recipe(folder: Path, scenes: Synthetic, seed: int) -> tuple[Recipe, Path]:
    """A recipe over made-up scenes in which cars are of the classes that their paint says; and where its steps go."""
    folder = folder / f"scenes-{scenes.num_scenes}-{scenes.difficulty:g}-{seed}"
    made, truth = write_scenes(folder, scenes, seed)
    finer = json.loads(truth.read_text())
    for feature, name in zip(finer["features"], _known_classes(scenes, seed), strict=True):
        feature["properties"]["type_id"] = _FINER_IDS[name]
    finer_truth = folder / "finer.geojson"
    commit(finer_truth, lambda path: path.write_text(json.dumps(finer)))
    source = {
        "format": "xview",
        "path": str(finer_truth),
        "mapping": {type_id: name for name, type_id in _FINER_IDS.items()},
    }
    tiles = {"scenes": str(made), "size_px": 192, "truth": source}
    recipe = {"name": "finer", "seed": seed, "classes": list(_FINER_IDS), "tiles": tiles}
    return Recipe.model_validate(recipe), folder / "finer"


def told_colours(recipe: Recipe, folder: Path) -> list[Told]:
    """Every car that is not cut off, in each tile that shows it."""
    return [told for row in read_tiles(tile(recipe, folder)) for told in _told_of(row, recipe.classes)]


def _told_of(row: dict, classes: tuple[str, ...]) -> Iterator[Told]:
    truth = Truth.from_row(row["truth"])
    cars = truth.at((truth.class_ids < len(_FINER)) & ~truth.ignore)
    if not len(cars.boxes):
        return
    colour, pixels = Colour(), read_tile(row)
    boxes = Detections(cars.boxes, np.ones((len(cars.boxes), 1), np.float32))
    found, plain = (colour.shares(cut_out(image, boxes)).argmax(axis=1) for image in (colour.prepare(pixels), pixels))
    for known, with_levels, without in zip(cars.class_ids, found, plain, strict=True):
        yield Told(classes[known], _FINER[with_levels], _FINER[without])


def _known_classes(scenes: Synthetic, seed: int) -> Iterator[str]:
    """The finer class of each object, scene by scene, as truth lists them."""
    for index in range(scenes.num_scenes):
        for thing in lay_out(scenes, seed, index).things:
            if thing.label:
                yield f"car-{_paint(thing)}" if thing.label == "car" else thing.label


def _paint(car: Thing) -> str:
    roof = np.array(car.parts[_ROOF].colour)
    return min(CAR_COLOURS, key=lambda named: float(np.abs(brightened(named[1], 14) - roof).sum()))[0]


def _row(difficulty: float, told: list[Told]) -> str:
    right, plain = (np.mean([one[place] == one.known for one in told]) for place in (1, 2))
    wrong = Counter(f"{one.known} as {one.found}" for one in told if one.found != one.known).most_common(3)
    errors = ", ".join(f"{what.replace('car-', '')} {count}" for what, count in wrong)
    return f"| {difficulty:g} | {len(told)} | {right:.3f} | {plain:.3f} | {errors or '-'} |"


# --- students ---


def _students(run_dir: Path) -> str:
    """A table of two students of the finer classes, judged on the test split by the known colours."""
    finer, folder = finer_recipe(run_dir, Synthetic(num_scenes=240, scene_size_px=384, difficulty=0.1), 0)
    write_text(folder / "recipe.yaml", dump_recipe(finer.model_copy(update=_TRAINED)))
    tiles = finer.tiles.model_dump(mode="json", exclude_unset=True)
    mapping = {type_id: name for name, type_id in TYPE_IDS.items()}
    tiles["truth"] |= {"path": str(folder.with_name("truth.geojson")), "mapping": mapping}
    coarse = folder.with_name("three")
    three = {"name": "three", "seed": 0, "classes": list(TYPE_IDS), "tiles": tiles}
    write_text(coarse / "recipe.yaml", dump_recipe(Recipe.model_validate(three).model_copy(update=_TRAINED)))

    teacher = _softlabel("train", coarse, "train.labels=truth", "train.split=train_1") / WEIGHTS
    labels = _softlabel("label", coarse, f"label.weights={teacher}", "label.splits=[train_2]")
    subtypes = _run("subtype", str(labels), "--class", "car", "--by", "colour")
    students = {
        "its teacher's labels, cars split by `subtype`": _softlabel("train", coarse, f"train.store={subtypes}"),
        "truth with the known colours": _softlabel("train", folder, "train.labels=truth"),
    }
    rows = {learned: _judged(student / WEIGHTS, folder) for learned, student in students.items()}
    names = [name for name in _FINER_IDS if all(name in found for found in rows.values())]
    header = f"| a student of | mAP50 | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}"
    return "\n".join([header, *(_student_row(learned, found, names) for learned, found in rows.items())])


def _judged(weights: Path, folder: Path) -> dict[str, float]:
    """AP50 of each class that the test split has."""
    settings = [f"label.weights={weights}", "label.splits=[test]"]
    _softlabel("label", folder, *settings)
    per_class = summary(_softlabel("evaluate", folder, *settings))["per_class"]
    return {name: row["ap50"] for name, row in per_class.items() if row["ap50"] is not None}


def _softlabel(verb: str, folder: Path, *settings: str) -> Path:
    words = [word for setting in settings for word in ("--set", setting)]
    return _run(verb, "--config", str(folder / "recipe.yaml"), "--run-dir", str(folder), *words)


def _run(*words: str) -> Path:
    """Run a command to its end; the last line that it prints is the folder of its result, or ends with " in FOLDER"."""
    command = [str(Path(sys.executable).with_name("softlabel")), *words]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Path(said.splitlines()[-1].rpartition(" in ")[2])


def _student_row(learned: str, found: dict[str, float], names: list[str]) -> str:
    cells = " | ".join(f"{found[name]:.3f}" for name in names)
    return f"| {learned} | {np.mean([found[name] for name in names]):.3f} | {cells} |"


if __name__ == "__main__":
    sys.exit(main())
