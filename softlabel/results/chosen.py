"""The labels that ``train.store`` names, and how their classes become those of the recipe's truth."""

from dataclasses import dataclass
from pathlib import Path

from softlabel.config import Recipe
from softlabel.detectors.class_map import ClassMap, listed
from softlabel.errors import RecipeError
from softlabel.results.stores import Store, open_store
from softlabel.storage import location


@dataclass(frozen=True)
class ChosenLabels:
    """A finished store; ``class_map`` is None where its classes are the recipe's."""

    store: Store
    class_map: ClassMap | None

    def of(self, tiles: Path) -> Path:
        """The store's folder.

        Raises:
            RecipeError: It is of other tiles than these, judged by their folder's name.
        """
        if self.store.tiles.name != tiles.name:
            raise RecipeError(
                f"train.store: {self.store.folder} is of {self.store.tiles.name}, the recipe's tiles are {tiles.name}: "
                "give the classes and tiles that it was made with, or labels of the recipe's tiles"
            )
        return self.store.folder


def chosen_labels(recipe: Recipe) -> ChosenLabels | None:
    """The labels that ``train.store`` names; None where it names nothing.

    Raises:
        StoreError: It is no finished store.
        RecipeError: Its classes are neither the recipe's nor finer ones of these, it lacks ``train.split``, or the
            recipe also asks for truth or for a calibration that does not know its classes.
    """
    settings = recipe.train
    if settings.store is None:
        return None
    if settings.labels == "truth":
        raise RecipeError("train.store is labels to learn from, and train.labels is truth: remove one of them")
    store = open_store(location(settings.store))
    if store.splits is not None and settings.split not in store.splits:
        raise RecipeError(
            f"train.store: {store.folder} has labels of {listed(store.splits)}, and train.split is {settings.split}: "
            "set it to one of these"
        )
    if tuple(store.classes) == recipe.classes:
        return ChosenLabels(store, None)
    if settings.calibration is not None:
        raise RecipeError(
            f"train.calibration is of the recipe's classes, train.store has {listed(store.classes)}: remove it"
        )
    return ChosenLabels(store, _class_map(recipe, store))


def _class_map(recipe: Recipe, store: Store) -> ClassMap:
    parents = {name: store.parents.get(name, name) for name in store.classes}
    own = listed(recipe.classes)
    if others := [name for name, parent in parents.items() if parent not in recipe.classes]:
        raise RecipeError(
            f"train.store: {store.folder} has {listed(others)}, neither among the recipe's classes ({own}) nor finer "
            "ones of them: give the classes that it was labelled with"
        )
    if missing := [name for name in recipe.classes if name not in parents.values()]:
        raise RecipeError(f"train.store: {store.folder} has nothing for {listed(missing)}: remove it from `classes`")
    return ClassMap(recipe.classes, tuple(parents.items()))
