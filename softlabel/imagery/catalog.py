"""All scenes of a run: what each is, the truth drawn on it, its group and its split. A few numbers each, no pixels.

What cannot be used becomes a row in a list of rejections: kind (scene or truth), file, row, reason, retryable.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from softlabel.config import Recipe, Split, Tiles, TruthSource
from softlabel.errors import RecipeError, SceneError, TruthError
from softlabel.imagery import scenes as scene_files
from softlabel.imagery import tiles
from softlabel.imagery.listing import list_scenes
from softlabel.imagery.scenes import SceneInfo
from softlabel.imagery.truth import RejectedTruth, SceneTruth, TruthSet, lookalike, match_scenes
from softlabel.terminal import progress

MANY_SCENES = 200
"""From this many scenes on, progress is shown."""
_THREADS = 4


@dataclass
class Scene:
    """A readable scene; ``truth`` is None where nobody drew boxes, ``split`` where the scene belongs to none."""

    scene_id: str
    uri: str
    info: SceneInfo
    truth: SceneTruth | None
    group: str
    split: str | None

    def windows(self, recipe: Recipe) -> list[tiles.Window]:
        """Its tiles."""
        return tiles.windows(self.info.width, self.info.height, recipe.tiles.size_px, recipe.tiles.overlap_px)


def given_scenes(settings: Tiles) -> list[tuple[str, str]]:
    """The scenes of a recipe without made-up ones, as `list_scenes` or `stac.list_items` returns them."""
    if settings.stac is None:
        return list_scenes(str(settings.scenes))
    from softlabel.imagery.stac import list_items  # importing shapely takes a fifth of a second

    return list_items(settings.stac)


def load_scenes(
    recipe: Recipe,
    listed: list[tuple[str, str]],
    truth: TruthSet | None,
    source: TruthSource | None,
    rejected: list[dict],
) -> list[Scene]:
    """All readable scenes with their truth, in the order listed; what fails is added to ``rejected``.

    Raises:
        SceneError: None can be read.
        TruthError: The truth matches none of them.
    """
    names = _match(truth, listed, rejected) if truth else {}
    # xView's file lists boxes only: an image that it does not mention was looked at and is empty.
    default = _no_truth(source.path) if source and source.format == "xview" else None
    scenes = []
    for scene_id, uri, info in _describe(recipe, listed):
        drawn = truth.scenes[names[scene_id]] if truth and scene_id in names else default
        if not isinstance(info, SceneError) and drawn and _is_drawn_on_its_side(drawn, info):
            info = SceneError(
                f"scene {uri} is {info.width}x{info.height} px after EXIF orientation {info.orientation}, but its "
                "truth was drawn on the pixels as stored: save it upright, without that tag"
            )
        if isinstance(info, SceneError):
            rejected.append(_rejected_scene(uri, info, drawn))
            continue
        group, split = (drawn.group, drawn.split) if drawn else (None, None)
        fitted = _fit(drawn, info, uri, rejected) if drawn else None
        scenes.append(Scene(scene_id, uri, info, fitted, group or scene_id, split))
    if not scenes:
        raise SceneError(f"none of {len(listed)} scenes can be read; the first: {rejected[-len(listed)]['reason']}")
    return scenes


def set_splits(recipe: Recipe, scenes: list[Scene], source: TruthSource | None) -> None:
    """Assign splits to the scenes with truth; with ``split: truth`` they already have theirs.

    Raises:
        RecipeError: There are too few groups for the splits, or the truth should name the splits and does not.
    """
    split = recipe.tiles.split
    if source is None and isinstance(split, Split):
        return  # nobody drew anything: an archive to label
    if isinstance(split, Split):
        found = tiles.assign_splits(_group_counts(recipe, scenes), split, recipe.seed)
        for scene in scenes:
            scene.split = found[scene.group] if scene.truth is not None else None
    elif all(scene.split is None for scene in scenes):
        raise RecipeError("tiles.split is `truth`, which names no split: give shares, or COCO truth with `split`")


def rejected_truth(row: RejectedTruth) -> dict:
    """A truth row that cannot be used, as a row of the list of rejections."""
    return {"kind": "truth", **asdict(row), "retryable": False}


def groups_in_two_splits(scenes: list[Scene]) -> int:
    """How many groups a truth file puts into several splits: near-duplicates that training and test share."""
    splits: dict[str, set[str | None]] = defaultdict(set)
    for scene in scenes:
        splits[scene.group].update({scene.split} - {None})
    return sum(len(found) > 1 for found in splits.values())


def _match(truth: TruthSet, listed: list[tuple[str, str]], rejected: list[dict]) -> dict[str, str]:
    """Map each scene_id to the truth's image name; images without a scene are rejected."""
    scene_ids = [scene_id for scene_id, _ in listed]
    found = match_scenes(truth.scenes, scene_ids)
    free = set(scene_ids) - set(found.values())
    for name, drawn in truth.scenes.items():
        if name not in found:
            reason = f"scene not found: no scene, or more than one, is named {name}{_difference(name, free)}"
            lost = f"; {len(drawn.boxes)} boxes left out"
            rejected.append(rejected_truth(RejectedTruth(drawn.file, None, reason + lost)))
    if truth.scenes and not found:
        name = next(iter(truth.scenes))
        raise TruthError(
            f"the truth matches none of the scenes: it names {name}, while a scene is named {listed[0][0]}"
            f"{_difference(name, scene_ids)}: set tiles.scenes to the folder that the truth's names are relative to"
        )
    return {scene_id: name for name, scene_id in found.items()}


def _difference(name: str, scene_ids: Iterable[str]) -> str:
    """How a name differs from a scene's that looks the same; escapes expose blanks and look-alike letters."""
    other = lookalike(name, scene_ids)
    return "" if other is None else f" ({name!a} in the truth and {other!a} on disk are not the same)"


def _is_drawn_on_its_side(drawn: SceneTruth, info: SceneInfo) -> bool:
    size = info.width, info.height
    return info.orientation > 4 and drawn.size_wh == size[::-1] != size


def _describe(recipe: Recipe, listed: list[tuple[str, str]]) -> Iterator[tuple[str, str, SceneInfo | SceneError]]:
    """Each scene with what it is or why it cannot be read, in order; in threads, as reading is mostly waiting."""

    def describe(scene: tuple[str, str]) -> tuple[str, str, SceneInfo | SceneError]:
        try:
            return *scene, scene_files.describe_scene(scene[1], recipe.tiles.bands, recipe.tiles.stretch)
        except SceneError as error:
            return *scene, error

    quiet = len(listed) < MANY_SCENES
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from progress(pool.map(describe, listed), desc="scenes", total=len(listed), disable=quiet)


def _fit(drawn: SceneTruth, info: SceneInfo, uri: str, rejected: list[dict]) -> SceneTruth | None:
    """The truth in the scene's pixels; None where it was drawn on an image of another size."""
    size = info.width, info.height
    if drawn.size_wh not in (None, size):
        reason = f"drawn on {drawn.size_wh} px, scene {uri} has {size}: {len(drawn.boxes)} boxes left out"
        rejected.append(rejected_truth(RejectedTruth(drawn.file, None, reason)))
        return None
    fitted, outside = drawn.fitted(*size)
    rejected.extend(rejected_truth(row) for row in outside)
    return fitted


def _no_truth(file: str) -> SceneTruth:
    none = np.zeros(0, np.int64)
    return SceneTruth(file, np.zeros((0, 4)), none.astype(np.int32), none.astype(bool), none)


def _rejected_scene(uri: str, error: SceneError, drawn: SceneTruth | None) -> dict:
    lost = f"; {len(drawn.boxes)} truth boxes left out with it" if drawn and len(drawn.boxes) else ""
    return {"kind": "scene", "file": uri, "row": None, "reason": f"{error}{lost}", "retryable": error.retryable}


def _group_counts(recipe: Recipe, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Per group of scenes with truth: the number of tiles, then of boxes per class."""
    num_classes = len(recipe.classes)
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(1 + num_classes, np.int64))
    for scene in scenes:
        if scene.truth is not None:
            drawn = np.bincount(scene.truth.class_ids[~scene.truth.crowd], minlength=num_classes)
            counts[scene.group] += np.array([len(scene.windows(recipe)), *drawn])
    return dict(counts)
