"""The ways to train that `softlabel compare` compares, each as a recipe of its own."""

from softlabel.config import HARD, Recipe
from softlabel.errors import RecipeError
from softlabel.recipe_file import with_values
from softlabel.training.arguments import check_models, check_soft

PLAIN, TRUTH = "plain", "truth"


def ways(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe for each way, by its name: the plain one first, then ``compare.methods``, and truth last.

    Raises:
        RecipeError: Whatever can be found wrong with them before anything is done.
    """
    check_models(recipe.train)
    if recipe.train.soft != HARD:
        raise RecipeError("train.soft changes the plain students that methods are compared with: move it to a method")
    found = {PLAIN: recipe}
    for name, values in recipe.compare.methods.items():
        try:
            found[name] = with_values(recipe, values)
            check_models(found[name].train)
            check_soft(found[name], [found[name].train.threshold])
            _check_views(found[name], recipe)
        except RecipeError as error:
            raise RecipeError(f"compare.methods.{name}: {error}") from None
    return {**found, TRUTH: recipe}


def _check_views(way: Recipe, recipe: Recipe) -> None:
    if way.train.soft.rounds > 1 and way.label.augment != recipe.label.augment:
        raise RecipeError("label.augment is of the teacher, and with train.soft.rounds students label too: remove one")


def in_words(recipe: Recipe) -> str:
    """How many students there will be."""
    count, settings = len(ways(recipe)), recipe.compare
    total = count * settings.seeds * len(settings.splits)
    return (
        f"students: {total}, {count} methods by {settings.seeds} seeds on {', '.join(settings.splits)}; "
        "more where a method has train.soft.rounds"
    )
