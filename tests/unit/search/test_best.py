"""The recipe of the final student."""

from conftest import tiny_recipe

from softlabel.recipe_file import load_recipe
from softlabel.workflows.search import _write_best

VALUES = {"train.threshold": 0.2}


def student(number, seed, map50):
    return {"values": VALUES, "seed": seed, "folder": f"{number:03d}", "history": [{"map50": map50}]}


def test_the_final_student_learns_from_the_labels_that_are_there(tmp_path):
    """Tiles and splits are dealt by the seed: that of the best student would ask for others."""
    for number in range(2):
        folder = tmp_path / "search" / "students" / f"{number:03d}"
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_text(f"of {number}")
    recipe = tiny_recipe(seed=3)
    _write_best(recipe, tmp_path, tmp_path / "search", VALUES, [student(0, 3, 0.5), student(1, 4, 0.6)])
    best = load_recipe(tmp_path / "best.yaml")
    assert (best.seed, best.tiles, best.label) == (3, recipe.tiles, recipe.label)
    assert (best.train.threshold, best.train.labels) == (0.2, "soft")
    assert (tmp_path / "best.safetensors").read_text() == "of 1"
