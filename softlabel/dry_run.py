"""What a run would work on, found out without reading a pixel, writing a file or starting Ray (``--dry-run``)."""

import os
import random
from collections.abc import Iterator

from softlabel.config import Recipe
from softlabel.detectors.class_map import listed
from softlabel.detectors.teachers import recipe_teacher
from softlabel.devices import lines
from softlabel.errors import SceneError
from softlabel.imagery.catalog import given_scenes
from softlabel.imagery.scenes import describe_scene
from softlabel.imagery.tiles import windows
from softlabel.results.chosen import chosen_labels
from softlabel.storage import location
from softlabel.training.arguments import check_models

_SAMPLE = 20


def plan(recipe: Recipe, *, trains: bool, labels: bool) -> Iterator[str]:
    """Lines about scenes, tiles and workers; the number of tiles is estimated from some scenes' sizes.

    Args:
        recipe: What would run.
        trains: Whether models would be trained; then their arguments and, if it is here, ``train.store`` are checked.
        labels: Whether ``label.weights`` would label; then it must be a teacher, if it is here.

    Raises:
        SceneError: There are no scenes, or none of the sample can be read.
        RecipeError: The engine cannot run here, a train argument has no effect, or the teacher or ``train.store`` has
            other classes.
        StoreError: ``train.store`` is no finished store.
        WeightsError: The teacher cannot be read.
    """
    if trains:
        check_models(recipe.train)
        here = recipe.train.store and location(recipe.train.store).is_dir()
        if here and (chosen := chosen_labels(recipe)):
            yield f"labels: {chosen.store.folder}, with the classes {listed(chosen.store.classes)}"
    if labels and recipe.label.weights and location(recipe.label.weights).is_file():
        recipe_teacher(recipe)
    settings = recipe.tiles
    if settings.synthetic:
        count, side = settings.synthetic.num_scenes, settings.synthetic.scene_size_px
        yield f"scenes: {count} made up, {side} x {side} px"
        sizes = [(side, side)]
    else:
        scenes = given_scenes(settings)
        count = len(scenes)
        yield f"scenes: {count} at {settings.stac.url if settings.stac else settings.scenes}"
        sample = random.Random(0).sample(scenes, min(count, _SAMPLE))
        sizes, problems = _sizes(recipe, sorted(uri for _, uri in sample))
        if problems:
            yield f"{len(problems)} of {len(sample)} sampled scenes cannot be read: {problems[0]}"
            count = round(count * len(sizes) / len(sample))
    per_scene = [len(windows(width, height, settings.size_px, settings.overlap_px)) for width, height in sizes]
    tiles = round(count * sum(per_scene) / len(per_scene))
    yield f"tiles: about {tiles} of {settings.size_px} px, background not yet thinned out"
    # A soft label is 4 + K numbers; at a low floor a tile keeps some 50 labels, and zstd halves their size.
    megabytes = tiles * 50 * 4 * (4 + len(recipe.classes)) / 2 / 1e6
    yield f"soft labels: about {max(megabytes, 0.1):.1f} MB per teacher over all tiles"
    yield from lines(recipe, (float(os.cpu_count() or 1),), labels=True, trains=True)


def _sizes(recipe: Recipe, uris: list[str]) -> tuple[list[tuple[int, int]], list[SceneError]]:
    """Width and height of each scene that can be read, and the errors of the others."""
    sizes, problems = [], []
    for uri in uris:
        try:
            info = describe_scene(uri, recipe.tiles.bands, recipe.tiles.stretch or (0, 1))
            sizes.append((info.width, info.height))
        except SceneError as error:
            problems.append(error)
    if not sizes:
        raise SceneError(f"none of {len(uris)} sampled scenes can be read; the first: {problems[0]}")
    return sizes, problems
