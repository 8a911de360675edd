"""Verbs of the command line that take no recipe, only what is already there: a store, weights, a run folder."""

import argparse
from typing import TYPE_CHECKING

from softlabel.errors import RecipeError
from softlabel.session import check_writable, name_log, ray_session

if TYPE_CHECKING:
    from softlabel.results.subtype import Attribute


def import_weights(arguments: argparse.Namespace) -> None:
    from softlabel.detectors.weights import import_tensors, import_weights

    source, model, classes = arguments.checkpoint, arguments.model, arguments.classes
    if (model is None) != (classes is None):
        raise RecipeError("--model and --classes belong together: give both for a bare state_dict, else neither")
    target = arguments.output or source.with_suffix(".safetensors")
    if source.is_file():  # else that is the mistake to report, and no folder is made
        check_writable(target.parent)
    if model is None:
        header = import_weights(source, target)
    else:
        header = import_tensors(source, target, model, classes.split(","), arguments.imgsz)
    print(f"{header.yaml['yaml_file']} with {len(header.classes)} classes ({', '.join(header.classes)})\n{target}")


def describe(arguments: argparse.Namespace) -> None:
    from softlabel.detectors.describe import describe

    for key, value in describe(arguments.weights).items():
        print(f"{key + ':':<12}{value}")


def status(arguments: argparse.Namespace) -> None:
    from softlabel.status import status

    print(status(arguments.run_dir))


def show(arguments: argparse.Namespace) -> None:
    from softlabel.report.run import show
    from softlabel.results.stores import open_store

    output = (arguments.output or arguments.store / "show").resolve()
    open_store(arguments.store)  # before a folder is made for nothing
    check_writable(output if arguments.output else arguments.store)
    print(show(arguments.store, output, arguments.doubtful))


def export(arguments: argparse.Namespace) -> None:
    from softlabel.results.run import export
    from softlabel.results.stores import open_store

    store = open_store(arguments.store).folder  # before Ray is started for nothing
    output = (arguments.output or store.with_name(f"export-{arguments.format}-{store.name}")).resolve()
    check_writable(output)
    name_log(output.parent, arguments.verbose)
    with ray_session(output.parent, verbose=arguments.verbose):
        export(store, output, arguments.format, arguments.threshold, arguments.merge, arguments.iou)


def fuse(arguments: argparse.Namespace) -> None:
    from softlabel.results.fuse import fuse_job
    from softlabel.results.run import fuse

    run_dir = arguments.stores[0].resolve().parent
    weights = arguments.weights or [1.0] * len(arguments.stores)
    asked = (arguments.stores, weights, arguments.threshold, arguments.iou, run_dir)
    fuse_job(*asked)  # what cannot be fused is reported before Ray is started for nothing
    check_writable(run_dir)
    name_log(run_dir, arguments.verbose)
    with ray_session(run_dir, verbose=arguments.verbose):
        fuse(*asked)


def subtype(arguments: argparse.Namespace) -> None:
    from softlabel.results.run import subtype
    from softlabel.results.stores import open_store
    from softlabel.results.subtype import subtype_job

    open_store(arguments.store)  # before a model is fetched for nothing
    job = subtype_job(arguments.store, arguments.split_class, _attribute(arguments))
    check_writable(job.run_dir)
    name_log(job.run_dir, arguments.verbose)
    with ray_session(job.run_dir, verbose=arguments.verbose):
        subtype(job, retry_rejected=arguments.retry_rejected)


def _attribute(arguments: argparse.Namespace) -> "Attribute":
    by, needs = arguments.by, {"colour": (), "classifier": ("model",), "prompts": ("model", "prompts")}
    for flag in ("model", "prompts"):
        given = getattr(arguments, flag) is not None
        if given != (flag in needs[by]):
            remedy = f"no --{flag}: remove it" if given else f"a --{flag}: give one"
            raise RecipeError(f"--by {by} takes {remedy}")
    if by == "colour":
        from softlabel.results.colour import Colour

        return Colour()
    from softlabel.detectors.crops import crop_classifier, prompted_crops

    if by == "classifier":
        return crop_classifier(arguments.model)
    from softlabel.workflows.vocabulary import read_vocabulary

    return prompted_crops(arguments.model, read_vocabulary(arguments.prompts))
