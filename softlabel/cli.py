"""The command line: what each verb does with its recipe. Verbs without one are in .without_recipe, flags in .flags."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from softlabel import without_recipe
from softlabel.config import Recipe
from softlabel.errors import DISK_FULL, RecipeError, SoftlabelError
from softlabel.flags import WITHOUT_RAY, parser
from softlabel.recipe_file import dump_recipe, load_recipe
from softlabel.session import Terminated, check_writable, cluster, name_log, ray_session
from softlabel.storage import location
from softlabel.terminal import say

if TYPE_CHECKING:
    from softlabel.results.chosen import ChosenLabels

# Importing torch, Ray and ultralytics takes 10 s: each verb imports what it needs, so that a typo in a recipe is
# reported at once.


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0, or 2 after a user's mistake (one line on stderr), 130 after Ctrl-C, 141 where nobody reads the output any
        more (`| head`), 143 after SIGTERM.
    """
    try:
        arguments = parser().parse_args(argv)
    except SoftlabelError as error:
        print(f"softlabel: {error}", file=sys.stderr)
        return 2
    try:
        if arguments.verb in _JOBLESS_VERBS:
            _JOBLESS_VERBS[arguments.verb](arguments)
        elif arguments.verb in _STORE_VERBS:
            _STORE_VERBS[arguments.verb](arguments)
        else:
            _run_recipe(arguments)
        sys.stdout.flush()
    except SoftlabelError as error:  # from a Ray task, its message is a traceback, and its cause the error
        print(f"softlabel {arguments.verb}: {' '.join(str(getattr(error, 'cause', error)).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter meets it again at exit
        return 141
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"softlabel {arguments.verb}: no space left{where}: free some and run the same again", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        again = "the same command with --resume" if arguments.verb == "search" else "the same command"
        print(f"softlabel {arguments.verb}: stopped; {again} goes on from here", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    return 0


def _run_recipe(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.config, arguments.set)
    if recipe.train.store and arguments.verb in _TRAIN and arguments.verb != "train":
        raise RecipeError(
            f"train.store is for `softlabel train` alone, and {arguments.verb} labels by itself: remove it"
        )
    run_dir = (arguments.run_dir or Path("runs") / recipe.name).resolve()
    if arguments.dry_run:
        _print_plan(arguments.verb, recipe, run_dir)
        return
    check_writable(run_dir)
    options = {key: getattr(arguments, key) for key in _OPTIONS.get(arguments.verb, ())}
    if arguments.verb not in WITHOUT_RAY:
        name_log(run_dir, arguments.verbose)
        options["verbose"] = arguments.verbose
    _VERBS[arguments.verb](recipe, run_dir, **options)


def _tile(recipe: Recipe, run_dir: Path) -> None:
    print(_tiles(recipe, run_dir))


@contextmanager
def _session(recipe: Recipe, run_dir: Path, verb: str, *, verbose: bool) -> Iterator[Recipe]:
    """Run Ray for a verb; yields the recipe fitted to the resources there, after printing what it will use."""
    from softlabel.devices import lines, with_gpus

    with ray_session(run_dir, verbose=verbose) as joined:
        there = cluster(joined=joined)
        recipe = with_gpus(recipe, there.gpus, side_by_side=verb in _SIDE_BY_SIDE)
        for line in lines(recipe, there.node_cpus, labels=verb != "train", trains=verb in _TRAIN):
            say(line)
        yield recipe


def _label(recipe: Recipe, run_dir: Path, *, verbose: bool, retry_rejected: bool = False) -> None:
    from softlabel.detectors.class_map import left_out
    from softlabel.detectors.teachers import recipe_teacher
    from softlabel.devices import possible
    from softlabel.labelling.job import recipe_label_job
    from softlabel.labelling.run import label

    class_map = recipe_teacher(possible(recipe)[0]).class_map  # a mistake is reported before scenes are read
    tiles = _tiles(recipe, run_dir)
    if class_map is not None:
        for line in left_out(class_map, recipe.label.classes):
            say(line)
    with _session(recipe, run_dir, "label", verbose=verbose) as recipe:
        (folder,) = label(recipe, [recipe_label_job(recipe, tiles)], run_dir, retry_rejected=retry_rejected)
    print(folder)


def _train(recipe: Recipe, run_dir: Path, *, verbose: bool) -> None:
    from softlabel.training.job import recipe_train_job
    from softlabel.training.run import train
    from softlabel.workflows.self_training import in_one_launch, self_train

    chosen = _checked_labels(recipe)  # a mistake in them is reported before scenes are read
    tiles = _tiles(recipe, run_dir)
    if chosen:
        store: Path | None = chosen.of(tiles)
    else:
        store = _store(recipe, run_dir, tiles) if _soft(recipe) else None
    job = recipe_train_job(recipe, run_dir, tiles, store, chosen.class_map if chosen else None)
    with _session(recipe, run_dir, "train", verbose=verbose) as recipe:
        train(recipe, [job], run_dir)
        rounds = {"student": recipe.train.soft.rounds}
        job = self_train(recipe, run_dir, {"student": job}, rounds, in_one_launch(recipe, run_dir))["student"]
    print(job.folder)


def _checked_labels(recipe: Recipe) -> "ChosenLabels | None":
    """Check that the recipe's student can be trained; return the labels that ``train.store`` names, if any."""
    from softlabel.results.chosen import chosen_labels
    from softlabel.training.arguments import check_models, check_soft
    from softlabel.training.job import check_finer, check_truth

    check_models(recipe.train)
    chosen = chosen_labels(recipe)
    finer = chosen.class_map if chosen else None
    if _soft(recipe):
        check_soft(recipe, [recipe.train.threshold], len(finer.becomes) if finer else None)
    else:
        check_truth(recipe.train.soft)
    if finer:
        check_finer(recipe.train.soft)
    return chosen


def _evaluate(recipe: Recipe, run_dir: Path) -> None:
    from softlabel.evaluation.run import evaluate_store, numbers

    tiles = _tiles(recipe, run_dir)
    store = _store(recipe, run_dir, tiles)
    folder = evaluate_store(recipe, "labels", tiles, recipe.evaluate.split, store, run_dir)
    found = numbers(folder)
    print(", ".join(f"{key} {found[key]}" for key in ("map50", "map50_95", "f1", "f1_conf")))
    print(folder)


def _calibrate(recipe: Recipe, run_dir: Path) -> None:
    from softlabel.evaluation.run import CALIBRATION, calibrate_store, numbers
    from softlabel.report.wording import format_calibration

    tiles = _tiles(recipe, run_dir)
    folder = calibrate_store(recipe, tiles, _store(recipe, run_dir, tiles), run_dir)
    print(format_calibration(numbers(folder)["rows"]))
    print(folder / CALIBRATION)


def _experiment(recipe: Recipe, run_dir: Path, *, verbose: bool) -> None:
    from softlabel.workflows.experiment import experiment

    with _session(recipe, run_dir, "experiment", verbose=verbose) as recipe:
        experiment(recipe, run_dir)


def _search(recipe: Recipe, run_dir: Path, *, verbose: bool, budget: float | None = None, resume: bool = False) -> None:
    from softlabel.workflows.search import search_experiment

    with _session(recipe, run_dir, "search", verbose=verbose) as recipe:
        search_experiment(recipe, run_dir, budget, resume=resume)


def _compare(recipe: Recipe, run_dir: Path, *, verbose: bool) -> None:
    from softlabel.workflows.compare import compare

    with _session(recipe, run_dir, "compare", verbose=verbose) as recipe:
        compare(recipe, run_dir)


def _categorize(recipe: Recipe, run_dir: Path, *, verbose: bool, vocabulary: Path, threshold: float = 0.1) -> None:
    from softlabel.workflows.categorize import categorize

    with _session(recipe, run_dir, "categorize", verbose=verbose) as recipe:
        categorize(recipe, run_dir, vocabulary, threshold)


_VERBS: dict[str, Callable[..., None]] = {
    "tile": _tile,
    "label": _label,
    "train": _train,
    "evaluate": _evaluate,
    "calibrate": _calibrate,
    "experiment": _experiment,
    "search": _search,
    "compare": _compare,
    "categorize": _categorize,
    "demo": _experiment,
}


_SIDE_BY_SIDE = ("search", "compare")
_TRAIN = ("train", "experiment", "search", "compare", "demo")
_OPTIONS = {"label": ("retry_rejected",), "search": ("budget", "resume"), "categorize": ("vocabulary", "threshold")}
_JOBLESS_VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "describe": without_recipe.describe,
    "import-weights": without_recipe.import_weights,
    "status": without_recipe.status,
}
_STORE_VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "export": without_recipe.export,
    "fuse": without_recipe.fuse,
    "show": without_recipe.show,
    "subtype": without_recipe.subtype,
}


def _tiles(recipe: Recipe, run_dir: Path) -> Path:
    from softlabel.imagery.run import tile

    return tile(recipe, run_dir)


def _soft(recipe: Recipe) -> bool:
    return recipe.train.labels == "soft"


def _store(recipe: Recipe, run_dir: Path, tiles: Path) -> Path:
    """The store that ``softlabel label`` filled, whichever device it ran on."""
    from softlabel.devices import possible
    from softlabel.labelling.job import recipe_label_job
    from softlabel.labelling.run import finished_store
    from softlabel.store import is_done

    jobs = [recipe_label_job(each, tiles) for each in possible(recipe)]
    done = [job for job in jobs if is_done(job.folder(run_dir))]
    if len(done) > 1:
        say(f"labels of a GPU and of a CPU are here: taking {done[0].folder(run_dir).name}, the GPU's")
    return finished_store((done or jobs[-1:])[0], run_dir)


def _print_plan(verb: str, recipe: Recipe, run_dir: Path) -> None:
    import torch

    from softlabel.devices import with_gpus
    from softlabel.dry_run import plan

    gpus = torch.cuda.device_count()
    recipe = with_gpus(recipe, gpus, side_by_side=verb in _SIDE_BY_SIDE)
    print(f"# {verb} into {run_dir}\n{dump_recipe(recipe)}")
    if verb in _TRAIN:
        _check_training(verb, recipe)
    for line in plan(recipe, trains=verb in _TRAIN, labels=verb == "label"):
        print(f"# {line}")
    print(f"# here: {os.cpu_count()} CPUs and {gpus} GPUs; on a cluster its own count")


def _check_training(verb: str, recipe: Recipe) -> None:
    """Refuse now what a run would refuse only once it has begun, and say what is to be compared."""
    from softlabel.training.arguments import check_soft
    from softlabel.training.ways import in_words

    match verb:
        case "experiment" | "demo":
            check_soft(recipe, recipe.train.thresholds)
        case "train" if not recipe.train.store or location(recipe.train.store).is_dir():
            _checked_labels(recipe)  # else they may exist only on the cluster
        case "search":
            from softlabel.search.run import check_space

            check_space(recipe)
        case "compare":
            print(f"# {in_words(recipe)}")
