"""The detector that a recipe asks for, with its fingerprint. A driver needs no torch for it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np

from softlabel.config import OpenVocabulary, Recipe, default_iou
from softlabel.detectors.class_map import class_map
from softlabel.detectors.describe import read_header
from softlabel.detectors.engine_choice import LIBRARIES, resolve
from softlabel.detectors.families import FAMILIES, Teacher
from softlabel.detectors.header import Header
from softlabel.detectors.queries import Crop, Queries
from softlabel.errors import RecipeError
from softlabel.records import Nms
from softlabel.storage import location
from softlabel.store import file_digest


def weights_teacher(
    recipe: Recipe,
    weights: Path | str,
    classes: Mapping[str, str | None] = MappingProxyType({}),
    *,
    with_losses: bool = False,
) -> Teacher:
    """The trained detector of a weights file, under a recipe's settings.

    Args:
        recipe: Its ``label`` and ``execution`` sections are used.
        weights: The file.
        classes: Which class of the recipe each of the file's becomes, where they differ.
        with_losses: Whether losses against truth are wanted besides the boxes.

    Raises:
        WeightsError: The weights cannot be read.
        RecipeError: The weights know other classes than the recipe, an .onnx was exported for another image size, or
            the engine cannot run here.
    """
    header = read_header(weights)
    mapped = class_map(weights, header.classes, recipe.classes, classes)
    settings, family = recipe.label, header.family
    engine, precision = _engine(recipe, family, with_losses=with_losses)
    default = default_iou(header.yaml) if family == "yolo" else FAMILIES[family].iou
    if family == "onnx" and settings.imgsz not in (None, header.imgsz):
        raise RecipeError(f"label.imgsz: {weights} was exported for {header.imgsz} px: remove it, or export it anew")
    imgsz, nms = settings.imgsz or header.imgsz, settings.nms(default)
    fingerprint = weights_fingerprint(weights, header, imgsz, nms, engine, precision)
    if mapped is not None:
        fingerprint |= {"classes": list(mapped.classes), "class_map": mapped.identity()}
    return Teacher(
        family,
        location(weights),
        fingerprint,
        len(recipe.classes),
        imgsz,
        nms,
        engine,
        precision,
        class_map=mapped,
    )


def transformers_teacher(recipe: Recipe, model: str, classes: Mapping[str, str | None]) -> Teacher:
    """A transformers detector with classes of its own, under a recipe's settings.

    Args:
        recipe: Its ``label`` and ``execution`` sections are used.
        model: A folder, or a name on the hub.
        classes: Which class of the recipe each of the model's becomes, where they differ.

    Raises:
        WeightsError: The model is not there, cannot be fetched, or is not one that softlabel knows.
        RecipeError: It knows other classes than the recipe, is an open-vocabulary model, cannot take the recipe's
            ``imgsz``, or the engine cannot run it.
    """
    from softlabel.detectors.hub import class_names, lasting_name, local_folder, model_type

    settings, folder = recipe.label, local_folder(model)
    family = model_type(folder)
    if FAMILIES[family].open_vocabulary:
        raise RecipeError(f"label.weights: {model} is an open-vocabulary model: give it as label.open_vocabulary.model")
    if settings.imgsz is not None:
        raise RecipeError(f"label.imgsz: {model} sees every tile at the size of its own configuration: remove it")
    mapped = class_map(model, class_names(folder), recipe.classes, classes)
    engine, precision = _engine(recipe, family, with_losses=False)
    nms = settings.nms(FAMILIES[family].iou)
    fingerprint = _folder_fingerprint(folder, recipe.classes, nms, precision)
    if mapped is not None:
        fingerprint["class_map"] = mapped.identity()
    weights = lasting_name(model, folder)
    return Teacher(family, weights, fingerprint, len(recipe.classes), None, nms, engine, precision, class_map=mapped)


def open_vocabulary_teacher(recipe: Recipe) -> Teacher:
    """The open-vocabulary detector that ``label.open_vocabulary`` describes.

    Raises:
        WeightsError: The model is not there, cannot be fetched, or is not one that softlabel knows.
        RecipeError: It is not described, a class has no prompts or examples (or has both), a setting does not suit the
            model, or the engine cannot run it.
    """
    # Imported here, since reading tasks import this module and do not need them.
    from softlabel.detectors.hub import lasting_name, local_folder, model_type

    settings, found = recipe.label, recipe.label.open_vocabulary
    if found is None:
        raise RecipeError("label.open_vocabulary is not set: name a model and a prompt for each class")
    if settings.classes:
        raise RecipeError("label.classes is for label.weights: an open-vocabulary teacher has the recipe's classes")
    if settings.imgsz is not None:
        raise RecipeError(
            "label.imgsz: an open-vocabulary model sees every tile at the size of its own configuration: remove it"
        )
    folder, queries = local_folder(found.model), _queries(recipe.classes, found)
    family = model_type(folder)
    if not FAMILIES[family].open_vocabulary:
        raise RecipeError(f"{found.model} has classes of its own: give it as label.weights, not label.open_vocabulary")
    engine, precision = _engine(recipe, family, with_losses=False)
    nms = settings.nms(FAMILIES[family].iou)
    return Teacher(
        family,
        lasting_name(found.model, folder),
        open_vocabulary_fingerprint(folder, recipe.classes, queries, nms, precision),
        queries.num_classes,
        None,
        nms,
        engine,
        precision,
        queries,
    )


def recipe_teacher(recipe: Recipe) -> Teacher:
    """The teacher that a recipe's own ``label`` section names, in the views that it asks for.

    Raises:
        RecipeError: It names none, or two, or views that the model cannot take.
    """
    return in_views(recipe, _named_teacher(recipe))


def in_views(recipe: Recipe, teacher: Teacher) -> Teacher:
    """A teacher that looks at tiles as ``label.augment`` says; a student under evaluation sees them as they are.

    Raises:
        RecipeError: The model cannot take them.
    """
    views = recipe.label.augment
    if not views:
        return teacher
    if FAMILIES[teacher.family].own_size and (scales := [view for view in views if not isinstance(view, str)]):
        raise RecipeError(f"label.augment: {teacher.family} sees every tile at one size: remove {scales[0]:g}")
    return replace(teacher, augment=views, fingerprint={**teacher.fingerprint, "augment": list(views)})


def _named_teacher(recipe: Recipe) -> Teacher:
    settings = recipe.label
    if (settings.weights is None) == (settings.open_vocabulary is None):
        raise RecipeError(
            "label.weights is not set, nor label.open_vocabulary (or both are): give just one: --set label.weights=PATH"
        )
    if settings.weights is None:
        return open_vocabulary_teacher(recipe)
    from softlabel.detectors.hub import is_file

    if is_file(settings.weights) or location(settings.weights).is_file():
        return weights_teacher(recipe, location(settings.weights).resolve(), settings.classes)
    return transformers_teacher(recipe, settings.weights, settings.classes)


def _engine(recipe: Recipe, family: str, *, with_losses: bool) -> tuple[str, str]:
    asked, cuda = recipe.label.engine, recipe.execution.gpus_per_actor > 0
    if FAMILIES[family].pytorch_alone:
        if asked not in ("auto", "pytorch"):
            raise RecipeError(f"label.engine: {asked} does not run this model ({family}): set it to pytorch or auto")
        asked = "pytorch"
    if family == "onnx":
        return asked, "float32"  # the graph's precision is its own
    return resolve(asked, recipe.label.precision, cuda=cuda, with_losses=with_losses)


def weights_fingerprint(
    weights: Path | str, header: Header, imgsz: int, nms: Nms, engine: str = "pytorch", precision: str = "float32"
) -> dict:
    """All that decides which boxes a teacher finds in given pixels.

    Args:
        weights: The weights file.
        header: What the file says of its model.
        imgsz: Longer side of a tile as the model sees it, in pixels.
        nms: What is kept of a forward pass.
        engine: As softlabel.detectors.engine_choice.resolve gives it, and so is ``precision``.
        precision: That of the convolutions.
    """
    extra = [LIBRARIES[engine]] if engine in LIBRARIES else []
    return {
        "weights": file_digest(weights),
        "architecture": _architecture(header.yaml),
        "classes": list(header.classes),
        "imgsz": imgsz,
        "engine": "onnxruntime" if header.family == "onnx" else engine,
        "precision": precision,
        "nms": asdict(nms),
        "versions": library_versions([*FAMILIES[header.family].libraries, *extra]),
    }


def open_vocabulary_fingerprint(
    folder: Path, classes: Sequence[str], queries: Queries, nms: Nms, precision: str
) -> dict:
    """All that decides which boxes a teacher finds in given pixels.

    Args:
        folder: As ``local_folder`` gives it.
        classes: What the columns of its class vectors are called.
        queries: What it looks for.
        nms: What is kept of a forward pass.
        precision: As for Detector.
    """
    return {**_folder_fingerprint(folder, classes, nms, precision), "queries": queries.identity()}


def _folder_fingerprint(folder: Path, classes: Sequence[str], nms: Nms, precision: str) -> dict:
    from softlabel.detectors.hub import content_digest, model_type

    family = model_type(folder)
    return {
        "weights": content_digest(folder),
        "architecture": family,
        "classes": list(classes),
        "engine": "pytorch",
        "precision": precision,
        "nms": asdict(nms),
        "versions": library_versions(FAMILIES[family].libraries),
    }


def _architecture(yaml: dict) -> str:
    """A short name for an architecture."""
    return f"{yaml.get('yaml_file', 'model')}:{yaml.get('scale', '')}:nc={yaml.get('nc')}"


def library_versions(libraries: Sequence[str]) -> dict[str, str]:
    """Their major and minor version numbers."""
    return {name: ".".join(version(name).split(".")[:2]) for name in libraries}


def _queries(classes: Sequence[str], found: OpenVocabulary) -> Queries:
    unknown = sorted({*found.prompts, *found.examples} - set(classes))
    if unknown:
        raise RecipeError(f"label.open_vocabulary names {', '.join(unknown)}, which `classes` does not")
    for name in classes:
        if bool(found.prompts.get(name)) == bool(found.examples.get(name)):
            raise RecipeError(f"label.open_vocabulary: give {name} prompts, or examples (one of the two)")
    return Queries(
        tuple(found.prompts.get(name, ()) for name in classes),
        tuple(tuple(_crop(path) for path in found.examples.get(name, ())) for name in classes),
        found.combine,
        found.background,
    )


def _crop(path: str) -> Crop:
    try:
        data = np.fromfile(path, np.uint8)
    except OSError:
        data = np.zeros(0, np.uint8)
    pixels = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if len(data) else None
    if pixels is None:
        raise RecipeError(
            f"label.open_vocabulary.examples: cannot read {path} as an image: give a PNG or JPEG of one object"
        )
    return pixels.astype(np.uint8, copy=False)
