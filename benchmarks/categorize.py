"""How well does `softlabel categorize` say what is there? Against the truth of made-up scenes, or of a recipe's own.

python benchmarks/categorize.py --model tests/assets/tiny-owlvit --run-dir runs/categorize
python benchmarks/categorize.py --model tests/assets/tiny-owlvit --run-dir runs/overhead-words \
    --config overhead --set tiles.scenes=DIR/images --set tiles.truth.path=DIR/instances.json

Words of which there is nothing are in the vocabulary too. By class: in how many of the scenes that have it it was found
(recall), how many of those where it was found have it (precision), and how far the counts are off.
"""

import argparse
import sys
from pathlib import Path

import ray
from common import machine
from tiny_owlvit import SCENE, SIDE

from softlabel.config import Recipe
from softlabel.recipe_file import load_recipe
from softlabel.workflows.categorize import categorize

_IOU = 0.3  # at 0.5 the tiny model finds many objects twice: see RESULTS.md
_ABSENT = ("bridge", "tennis court", "wind turbine")


def main() -> int:
    """Categorize and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of an OWL-ViT")
    parser.add_argument("--config", type=Path, help="a recipe, YAML (default: 40 made-up scenes)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value")
    parser.add_argument("--threshold", type=float, default=0.5, help="boxes scoring above it count (default: 0.5)")
    parser.add_argument("--run-dir", type=Path, required=True, help="where results go")
    arguments = parser.parse_args()
    model = {"label": {"open_vocabulary": {"model": str(arguments.model)}, "iou": _IOU}}
    if arguments.config:
        settings = [*arguments.set, f"label.open_vocabulary.model={arguments.model}", f"label.iou={_IOU}"]
        recipe = load_recipe(arguments.config, settings)
    else:  # overlapping: every object lies whole in some tile
        scenes = {"num_scenes": 40, "scene_size_px": SCENE, "difficulty": 0.1}
        tiles = {"synthetic": scenes, "size_px": SIDE, "overlap_px": 64}
        recipe = Recipe.model_validate(
            {"name": "words", "seed": 1, "classes": ["car", "plane", "ship"], "tiles": tiles, **model}
        )
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    vocabulary = arguments.run_dir / "words.txt"
    vocabulary.write_text("".join(f"{name}: a {name}\n" for name in (*recipe.classes, *_ABSENT)))
    ray.init(address="local", include_dashboard=True)
    found = categorize(recipe, arguments.run_dir.resolve(), vocabulary, arguments.threshold)
    ray.shutdown()
    print(_table(found))
    return 0


def _table(found: dict) -> str:
    about = machine()
    absent = {row["class"]: row["objects"] for row in found["classes"] if row["class"] in _ABSENT}
    return "\n".join(
        [
            f"{about['cpu']}, {about['cores']} cores, no GPU; {about['date']}, commit {about['commit']}; "
            f"{found['scenes']} scenes, {found['tiles']} tiles, boxes above {found['threshold']:g}",
            "",
            "| class | scenes with it | presence precision | presence recall | objects | found | count error |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {row['class']} | {row['scenes']} | {_number(row['presence_precision'])} | "
                f"{_number(row['presence_recall'])} | {row['truth']} | {row['found']} | "
                f"{_number(row['count_error'])} |"
                for row in found["truth"]
            ),
            "",
            "Absent: " + ", ".join(f"{name} {count}" for name, count in absent.items()),
        ]
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
