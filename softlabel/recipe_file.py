"""Recipes on disk: found by path or by name, read with overrides, and written as they were resolved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from softlabel.config import Recipe
from softlabel.errors import RecipeError
from softlabel.storage import location

RECIPES = Path(__file__).parent / "recipes"
"""The recipes that come with the package."""


def find_recipe(path: Path | str) -> Path:
    """The file at that path, else the recipe of that name that comes with the package: ``demo`` or ``demo.yaml``.

    Raises:
        RecipeError: There is neither.
    """
    asked = location(path)
    packaged = RECIPES / f"{asked.name.removesuffix('.yaml')}.yaml"
    if asked.is_file() or "/" in str(path) or not packaged.is_file():
        if not asked.exists():
            names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
            raise RecipeError(f"no recipe at {path}: give an existing file with --config, or one of {names}")
        return asked
    return packaged


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe; relative paths in it are relative to the current folder.

    Args:
        path: The YAML file, or the name of a recipe that comes with the package.
        overrides: ``key.sub=value`` strings, values in YAML, as ``--set`` takes them.

    Raises:
        RecipeError: The file is missing or not YAML, a key is unknown or a value does not fit.
    """
    path = find_recipe(path)
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no recipe: it must be a mapping with keys such as name, classes, tiles")
    data = _without_aliases(data)
    for override in overrides or []:
        _apply(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first_problem(error)}") from None


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe with other values for some keys; ``train.threshold.CLASS`` turns one threshold into one per class.

    Raises:
        RecipeError: A key is unknown or a value does not fit.
    """
    data = recipe.model_dump(mode="json")
    train = data["train"]
    if any(key.startswith("train.threshold.") for key in values) and not isinstance(train["threshold"], dict):
        train["threshold"] = dict.fromkeys(recipe.classes, train["threshold"])
    for key, value in values.items():
        _set(data, key, value, key)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_first_problem(error)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, as it is saved beside every output."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _without_aliases(value: Any) -> Any:
    """A YAML alias is the same object twice; --set on one place must not change the other."""
    if isinstance(value, dict):
        return {key: _without_aliases(item) for key, item in value.items()}
    return [_without_aliases(item) for item in value] if isinstance(value, list) else value


def _apply(data: dict, override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override!r}: write key=value, for instance --set train.student.args.epochs=10")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {_one_line(error)}") from None
    _set(data, key, parsed, f"--set {override!r}")


def _set(data: dict, key: str, value: Any, who: str) -> None:
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise RecipeError(f"{who}: {parent} is a value, not a section")
    node[last] = value


def _first_problem(error: ValidationError) -> str:
    problem, *others = error.errors()
    where = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function-"))
    what = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        what = "unknown key; look at docs/recipes.md for those that exist"
    if problem["type"] in ("tuple_type", "list_type"):
        what = f"{problem['input']!r} is no list: give one, as [{problem['input']}]"
    more = f" (and {len(others)} more)" if others else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
