"""What a run computes on: the GPUs that it takes where its recipe leaves that open, and the lines that say so."""

import math
from collections.abc import Iterator

from softlabel.config import Label, Recipe, Train
from softlabel.detectors.engine_choice import CPU_BATCH, resolve
from softlabel.labelling.resources import Resources

_TILES_PER_WORKER = 8
"""A worker gets at least so many of a batch: with fewer, batch normalisation learns from too little."""
_ULTRALYTICS_BATCH = 16


def with_gpus(recipe: Recipe, gpus: float, *, side_by_side: bool = False) -> Recipe:
    """The recipe fitted to so many GPUs, as far as ``execution`` leaves that open: an actor on each, or as many actors
    as it says, sharing them; and a training worker on each, as long as every worker has 8 tiles of the batch.

    Args:
        recipe: What runs. ``execution.device: cpu`` keeps all of it off GPUs, engine openvino just its labelling.
        gpus: How many there are.
        side_by_side: Whether several students are trained at once, with a GPU each, instead of one on all GPUs.
    """
    execution, said = recipe.execution, recipe.execution.model_fields_set
    if gpus < 1 or execution.device == "cpu":
        return recipe
    found: dict[str, float] = {}
    if "gpus_per_actor" not in said and recipe.label.engine != "openvino":
        actors = Resources(execution, (), gpus).least_actors if "actors" in said else 1
        found["gpus_per_actor"] = 1 / math.ceil(actors / int(gpus))
    if "gpus_per_worker" not in said:
        found["gpus_per_worker"] = 1.0
    per_actor = found.get("gpus_per_actor", execution.gpus_per_actor)
    if per_actor and "actors" not in said:
        found["actors"] = max(1, int(gpus / per_actor + 1e-6))
    per_worker = found.get("gpus_per_worker", execution.gpus_per_worker)
    if per_worker and "workers" not in said and not side_by_side:
        found["workers"] = _workers(recipe.train, int(gpus / max(1.0, per_worker)))
    return recipe.model_copy(update={"execution": execution.model_copy(update=found)})


def _workers(train: Train, most: int) -> int:
    batches = [int(model.args.get("batch", _ULTRALYTICS_BATCH)) for model in (train.teacher, train.student)]
    fit = (n for n in range(most, 1, -1) if all(b % n == 0 and b // n >= _TILES_PER_WORKER for b in batches))
    return next(fit, 1)


def possible(recipe: Recipe) -> list[Recipe]:
    """The recipes that labelling may have run with, where the device is not known: one for GPUs, if the recipe leaves
    that open, and one for CPUs alone, if engine and precision can do without a GPU."""
    needs_cuda = recipe.label.engine == "tensorrt" or recipe.label.precision == "float16"
    with_one = with_gpus(recipe, 1)
    differ = with_one.execution.gpus_per_actor != recipe.execution.gpus_per_actor
    return [with_one, recipe] if differ and not needs_cuda else [with_one]


def lines(recipe: Recipe, node_cpus: tuple[float, ...], *, labels: bool, trains: bool) -> Iterator[str]:
    """Lines that say what labelling and training will use.

    Raises:
        RecipeError: The engine cannot run here.
    """
    if labels:
        yield _labelling(recipe, node_cpus)
    if trains:
        execution = recipe.execution
        workers = "1 worker" if execution.workers == 1 else f"{execution.workers} workers"
        yield f"training: {workers} of {execution.cpus_per_worker:g} CPU and {execution.gpus_per_worker:g} GPU"


def _labelling(recipe: Recipe, node_cpus: tuple[float, ...]) -> str:
    execution, cuda = recipe.execution, recipe.execution.gpus_per_actor > 0
    engine, precision = resolve(_engine(recipe.label), recipe.label.precision, cuda=cuda, with_losses=False)
    resources = Resources(execution, node_cpus, 0)
    most = "" if resources.most_actors == resources.least_actors else f" to {resources.most_actors}"
    actors = "1 actor" if resources.most_actors == 1 else f"{resources.least_actors}{most} actors"
    size = "as many tiles as fit" if cuda and not execution.batch_size else f"{execution.batch_size or CPU_BATCH} tiles"
    batch = "tile by tile" if engine == "openvino" else f"{size} per forward pass"
    share = f"{resources.cpus_per_actor:g} CPU and {round(execution.gpus_per_actor, 3):g} GPU"
    needed = resources.least_actors * resources.cpus_per_actor + resources.cpus_per_reader
    more = f": more than the {sum(node_cpus):g} CPUs here" if needed > sum(node_cpus) and not cuda else ""
    return f"labelling: {actors} of {share}, {engine} in {precision}, {batch}{more}"


def _engine(label: Label) -> str:
    """The engine asked for; if that is auto and the teacher is no YOLO, the one that runs it."""
    is_yolo = label.open_vocabulary is None and (
        label.weights is None or label.weights.endswith((".pt", ".safetensors"))
    )
    return label.engine if is_yolo or label.engine != "auto" else "pytorch"
